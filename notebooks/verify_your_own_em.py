# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Verify your own EM, in ten minutes
#
# You have derived an E-step and an M-step on paper, for a model that no library ships. Are they right? Here the model
# is a mixture of independent Poisson counts,
#
# $$z_n \sim \mathrm{Cat}(\pi), \qquad x_{nd} \mid z_n = k \sim \mathrm{Poisson}(\lambda_{kd}),$$
#
# and paper says
#
# $$r_{nk} = \frac{\pi_k \prod_d \lambda_{kd}^{x_{nd}} e^{-\lambda_{kd}}}
# {\sum_j \pi_j \prod_d \lambda_{jd}^{x_{nd}} e^{-\lambda_{jd}}}, \qquad
# \pi_k = \frac{N_k}{N}, \qquad \lambda_{kd} = \frac{1}{N_k} \sum_n r_{nk} x_{nd}, \qquad N_k = \sum_n r_{nk}.$$
#
# ## 1. Write the model
#
# The judge is the model itself, as a [Pyro](https://pyro.ai) program: only the generating story, no derivation. The
# latent $z$ is marked for enumeration. `verify_em` sums it out and differentiates by itself; nobody writes $Q$.

# %%
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch.distributions import constraints

from mixproof.inference.verification import Refuted, assert_em, verify_em, verify_moments
from mixproof.inference.verification.fault_bank import softmax_regression_weights

params = {
    "weights": torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    "rates": torch.tensor([[2.0, 9.0], [6.0, 1.5], [12.0, 5.0]], dtype=torch.float64),
}


def model(x):
    """Draw each row of counts x (N, D) from its component."""
    weights = pyro.param("weights", params["weights"], constraint=constraints.simplex)
    rates = pyro.param("rates", params["rates"], constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Poisson(rates[z]).to_event(1), obs=x)


# %% [markdown]
# Then some rows to try the derivation on. Their values hardly matter. Their number should be well above that of the
# components.

# %%
generator = torch.Generator().manual_seed(5)


def sample(num_samples, generator):
    """Return counts (num_samples, D) from the mixture with the parameters above."""
    z = torch.multinomial(params["weights"], num_samples, replacement=True, generator=generator)
    return torch.poisson(params["rates"][z], generator=generator)


x = sample(40, generator)

# %% [markdown]
# ## 2. Write E and M
#
# As they stand on paper: `e_step(params, x)` returns responsibilities (N, K), `m_step(resp, x)` parameters under the
# names of the program's sites. The third function is optional: the log likelihood that you would report.


# %%
def log_terms(params, x):
    """Return log pi_k + sum_d log Poisson(x_nd | lambda_kd), (N, K)."""
    rates = params["rates"]
    return params["weights"].log() + x @ rates.log().T - rates.sum(1) - (x + 1).lgamma().sum(1, keepdim=True)


def e_step(params, x):
    return log_terms(params, x).softmax(1)


def m_step(resp, x):
    counts = resp.sum(0)
    return {"weights": counts / len(x), "rates": resp.T @ x / counts[:, None]}


def log_likelihood(params, x):
    return log_terms(params, x).logsumexp(1).sum()


derivation = {"e_step": e_step, "m_step": m_step, "log_likelihood": log_likelihood}
print(verify_em(model, params, **derivation, data=(x,), seed=1, subject="Poisson mixture"))

# %% [markdown]
# ## 3. Read the verdict
#
# The first line is the verdict, the second what it means:
#
# | verdict | what it says |
# |---|---|
# | `exact EM` | the E-step is the posterior of $z$, and the M-step maximises $Q$ |
# | `MAP-EM` | the same with $Q$ plus the program's log prior |
# | `generalised EM` | the M-step raises $Q$ without maximising it, and rests only where nothing is left to climb |
# | `wrong E-step` | the responsibilities are not those of this program |
# | `wrong M-step` | what it returns is none of the three above |
# | `wrong report` | the steps may be right, but the log likelihood is not that of the parameters |
# | `undecided` | these rows, or rounding, do not let the checks decide |
#
# Each line of the table is an attempt to refute:
#
# - **responsibilities = enumeration**: the E-step against the program, at your parameters and at random ones. The error
#   is the largest difference of two probabilities.
# - **grad Q = 0**: what the M-step makes of *random* responsibilities, where no cluster is clear and no symmetry hides
#   a fault. The error is the gradient of $Q$ that is left, scale-free: the size of the sum over rows, divided by the
#   sum of the sizes. It is 0 at a maximum and at most 1. Where it is 0, other points are tried for a larger $Q$.
# - **the objective rises**: one pass of both steps does not lower the log likelihood.
# - **log likelihood = enumeration**: the number you report, relative to its size.
# - A step that builds on the current parameters (it takes them as a keyword argument, `params`) need not maximise. If
#   it does not, it is held to **every parameter moves** and **a maximum is a fixed point**.
#
# The **tolerance** is what rounding explains: computed from the precision of the numbers, and measured where a function
# loses more digits. It is not chosen by taste. A right formula leaves little more than $10^{-16}$, and a wrong one
# usually many orders of magnitude more. The seed makes a report exact; another seed tries other points.
#
# ### What a pass means
#
# Two different analytic formulas differ at a random point with probability one. So agreement at random points to
# rounding refutes every wrong formula whose error is above the tolerance. It is **not a proof**: an error below the
# tolerance would pass, and so would one confined to cases that are never drawn, such as an `if` for empty
# components. And it speaks of *this program*: if the program is not your model, the pass is worth nothing.
#
# ## 4. Read a refutation
#
# **A wrong M-step.** The rates divide by $N / K$ rows instead of $N_k$: easy to miss where clusters are of equal size.


# %%
def m_step_of_equal_clusters(resp, x):
    return {"weights": resp.mean(0), "rates": resp.T @ x / (len(x) / resp.shape[1])}


derivation_with_a_fault = {**derivation, "m_step": m_step_of_equal_clusters}
report = verify_em(model, params, **derivation_with_a_fault, data=(x,), seed=1, subject="equal clusters")
print(report)

# %% [markdown]
# From top to bottom: the E-step is right. The M-step leaves a gradient. It comes from the site `rates`; the weights are
# right. `claimed` is what the step returned, `maximiser of Q` what it should have returned, for the responsibilities
# shown.
#
# The last part is the **smallest counterexample** that was found: few components, few rows, short numbers. It is
# Python. Paste it below your two functions, or run it from here:

# %%
exec(report.smallest, {"model": model, "m_step": m_step_of_equal_clusters})

# %% [markdown]
# **A wrong M-step with a hint.** The rates are divided by $N_k - 1$, as in a sample variance. A hint is a measurement:
# one change was made to the step, and with it the step was right to rounding at fresh random points.


# %%
def m_step_with_one_less(resp, x):
    counts = resp.sum(0)
    return {"weights": counts / len(x), "rates": resp.T @ x / (counts[:, None] - 1)}


def verdict_and_hints(**faults):
    report = verify_em(model, params, **{**derivation, **faults}, data=(x,), seed=1)
    print(report.verdict, *report.hints, sep="\n  ")


verdict_and_hints(m_step=m_step_with_one_less)

# %% [markdown]
# **A wrong E-step.** The weights are forgotten: each component counts alike.


# %%
def e_step_without_weights(params, x):
    return (log_terms(params, x) - params["weights"].log()).softmax(1)


verdict_and_hints(e_step=e_step_without_weights)

# %% [markdown]
# **A wrong report.** The log likelihood leaves out $-\log x_{nd}!$. No step depends on it, so the fit is right; a BIC
# computed from it, or a comparison with another family, is not.


# %%
def log_likelihood_without_factorials(params, x):
    return (log_terms(params, x) + (x + 1).lgamma().sum(1, keepdim=True)).logsumexp(1).sum()


verdict_and_hints(log_likelihood=log_likelihood_without_factorials)

# %% [markdown]
# ## 5. When it is undecided
#
# `undecided` is no pass, and no blame either. The report says why, and what to do. A common reason: a Gaussian M-step
# takes the variance as the mean square less the squared mean, which is right on paper, and the data lie far from zero.


# %%
def gaussian(y):
    weights = pyro.param("weights", params["weights"], constraint=constraints.simplex)
    locs = pyro.param("locs", params["rates"])
    variances = pyro.param("variances", params["rates"], constraint=constraints.positive)
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(locs[z], variances[z].sqrt()).to_event(1), obs=y)


def gaussian_e_step(params, y):
    normal = dist.Normal(params["locs"], params["variances"].sqrt()).to_event(1)
    return (params["weights"].log() + normal.log_prob(y[:, None])).softmax(1)


def gaussian_m_step(resp, y):
    counts = resp.sum(0)[:, None]
    locs = resp.T @ y / counts
    return {"weights": resp.mean(0), "locs": locs, "variances": resp.T @ y**2 / counts - locs**2}


for offset in (1e6, 0.0):
    shifted = {"weights": params["weights"], "locs": params["rates"] + offset, "variances": params["rates"]}
    found = verify_em(gaussian, shifted, e_step=gaussian_e_step, m_step=gaussian_m_step, data=(x + offset,), seed=1)
    reasons = [check.detail for check in found.checks if check.detail]
    print(f"data near {offset:g}: {found.verdict}", *reasons, sep="\n  ")

# %% [markdown]
# So do what it says, here center the data, and ask again. Other reasons are too few rows, so that $Q$ has no maximum,
# and parameters at the edge of their support: start inside it.
#
# ## 6. Keep it right
#
# `assert_em` takes the same arguments and raises `Refuted`, with the whole report as its message, unless the derivation
# passes. In your pytest that is one test:
#
# ```python
# def test_em_is_exact():
#     assert assert_em(model, params, e_step=e_step, m_step=m_step, data=(x,), seed=0).verdict == "exact EM"
# ```

# %%
print(assert_em(model, params, **derivation, data=(x,), seed=0).verdict)
try:
    assert_em(model, params, **derivation_with_a_fault, data=(x,), seed=0)
except Refuted as refuted:
    print("Refuted:", str(refuted).splitlines()[0])

# %% [markdown]
# From the command line, give the file and the name of an object in it with the attributes `model`, `params`, `data`,
# `e_step`, `m_step` and, if you like, `log_likelihood`. A file that has these names itself needs no object:
#
#     mixproof verify my_model.py:subject
#     mixproof verify my_model.py --json report.json --html report.html
#
# The exit code is 0 if the derivation is right, 1 if it is wrong or undecided, and 2 if the input is bad, as for a
# missing name.
#
# ## 7. Choose three components and two features
#
# Some faults cannot be seen with less. With two components one number fixes both weights; with one feature no index
# can be mixed up. In a public project the weights followed a covariate through a softmax, and its Jacobian was taken
# for diagonal: $\partial \pi_k / \partial \eta_k = \pi_k (1 - \pi_k)$ alone, without the terms between components. The
# fault is kept in this project's bank of faults. With three components and with two:

# %%
three = softmax_regression_weights.DIAGONAL
two = softmax_regression_weights.two_components(three)
for name, subject in (("three components", three), ("two components", two)):
    found = verify_em(
        subject.model, subject.params, e_step=subject.e_step, m_step=subject.m_step, data=subject.data, seed=0
    )
    print(f"{name}: {found.verdict}")

# %% [markdown]
# With two components the Jacobian has one free entry, and the wrong formula is right. The project's own test used two
# components, and passed.
#
# ## 8. Rows that count differently
#
# Row weights, such as survey weights or counts of equal rows, are `poutine.scale` inside the data plate. They enter
# the M-step and the log likelihood. The E-step has none of them: how often a row counts does not change what is known
# of its component.

# %%
row_weights = 0.5 + 2 * torch.rand(len(x), generator=generator, dtype=torch.float64)


def weighted_model(x, row_weights):
    weights = pyro.param("weights", params["weights"], constraint=constraints.simplex)
    rates = pyro.param("rates", params["rates"], constraint=constraints.positive)
    with pyro.plate("data", len(x)), poutine.scale(scale=row_weights):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Poisson(rates[z]).to_event(1), obs=x)


def weighted_m_step(resp, x, row_weights):
    counted = resp * row_weights[:, None]
    return {"weights": counted.sum(0) / row_weights.sum(), "rates": counted.T @ x / counted.sum(0)[:, None]}


for step in (weighted_m_step, lambda resp, x, row_weights: m_step(resp, x)):
    found = verify_em(
        weighted_model, params, e_step=lambda p, x, w: e_step(p, x), m_step=step, data=(x, row_weights), seed=1
    )
    print(found.verdict, *found.hints, sep="\n  ")

# %% [markdown]
# ## Beyond EM
#
# The other verbs read the same way: a claim, an independent computation, a report. `verify_gradient` is at work in
# `mend_a_printed_formula`, which takes a wrong formula from a public page and mends it. `verify_moments` holds
# moments against as many samples as it takes to see a hundredth of a standard deviation. Here are those of this
# mixture by the law of total variance, and then without the counting noise inside each component:

# %%
weights, rates = params["weights"], params["rates"]
mean = weights @ rates
covariance = torch.diag(mean) + torch.einsum("k,ki,kj->ij", weights, rates, rates) - torch.outer(mean, mean)
for name, claimed in (("total variance", covariance), ("without the counting noise", covariance - torch.diag(mean))):
    found = verify_moments(sample, mean, claimed, seed=2, subject=name)
    print(f"{name}: {found.verdict}")
