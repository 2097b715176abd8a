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
# # Mend a printed formula
#
# Can you trust a formula that you find on a page? Here is one from a public page that many learn from: equation (7) in
# chapter 4, Gaussian mixtures, of the [astroML notebooks](https://github.com/astroML/astroML-notebooks). The model is a
# mixture of Gaussians on the line whose rows carry known errors,
#
# $$z_n \sim \mathrm{Cat}(\pi), \qquad x_n \mid z_n = k \sim \mathcal{N}(\mu_k, \sigma_k^2 + e_n^2),$$
#
# with standard deviations $e_n$ that came with the data. Once the responsibilities $w_{nk}$ are known, the M-step
# must solve two equations in $\mu_k$ and $\sigma_k^2$. The page prints
#
# $$\mu_k = \frac{\sum_n w_{nk} \, x_n / (\sigma_k^2 + e_n^2)}{\sum_n w_{nk} / (\sigma_k^2 + e_n^2)}
# \qquad\text{and}\qquad
# \sum_n \frac{w_{nk}}{\sigma_k^2 - e_n^2} = \sum_n \frac{w_{nk} (x_n - \mu_k)^2}{(\sigma_k^2 + e_n^2)^2}. \tag{7}$$
#
# One sign in (7) is wrong. Suppose that we do not know which, nor that any is. We write the model down as a program
# and the formulas as code, exactly as printed, and ask for a verdict.
#
# ## The model as a program
#
# The known errors are a second data argument. Three components are the least that show every kind of fault.

# %%
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from mixproof.inference.verification import positive, reals, simplex, verify_em, verify_gradient

truth = {
    "weights": torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    "locs": torch.tensor([-2.0, 1.0, 4.0], dtype=torch.float64),
    "variances": torch.tensor([1.0, 0.5, 0.8], dtype=torch.float64),
}


def model(x, errors):
    """Draw each of x (N,) from its component, with known errors (N,), standard deviations."""
    weights = pyro.param("weights", truth["weights"], constraint=constraints.simplex)
    locs = pyro.param("locs", truth["locs"])
    variances = pyro.param("variances", truth["variances"], constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[z], (variances[z] + errors**2).sqrt()), obs=x)


# %% [markdown]
# ## The derivation as code
#
# The E-step is Bayes' rule. For the M-step we solve (7) by a fixed point: multiply $\sigma_k^2$ by the right side
# over the left side until they are equal. The sign on the left is an argument, so that the printed equation is
# the one with $-1$. Where there is no positive root the step says so.


# %%
def log_joint_terms(params, x, errors):
    """Return log pi_k + log N(x_n | mu_k, sigma_k^2 + e_n^2), (N, K)."""
    total = params["variances"] + errors[:, None] ** 2
    return params["weights"].log() - ((2 * torch.pi * total).log() + (x[:, None] - params["locs"]) ** 2 / total) / 2


def e_step(params, x, errors):
    return log_joint_terms(params, x, errors).softmax(1)


def log_likelihood(params, x, errors):
    return log_joint_terms(params, x, errors).logsumexp(1).sum()


def left(variances, resp, errors, sign):
    return (resp / (variances + sign * errors[:, None] ** 2)).sum(0)


def right(variances, locs, resp, x, errors):
    return (resp * (x[:, None] - locs) ** 2 / (variances + errors[:, None] ** 2) ** 2).sum(0)


def best_locs(variances, resp, x, errors):
    precisions = resp / (variances + errors[:, None] ** 2)
    return (precisions * x[:, None]).sum(0) / precisions.sum(0)


def solve(resp, x, errors, sign):
    """Return the M-step with the variances at which left and right are equal."""
    variances = (x.var(correction=0) + errors.square().mean()).expand(resp.shape[1])
    for _ in range(5000):
        old, locs = variances, best_locs(variances, resp, x, errors)
        variances = old * right(old, locs, resp, x, errors) / left(old, resp, errors, sign)
        if not (variances > 0).all():
            break
        if ((variances - old).abs() <= 1e-15 * old).all():
            return {"weights": resp.mean(0), "locs": best_locs(variances, resp, x, errors), "variances": variances}
    raise ValueError("the iteration finds no positive root of the equation for the variances")


def m_step_as_printed(resp, x, errors):
    return solve(resp, x, errors, sign=-1)


# %% [markdown]
# ## The verdict
#
# We simulate 60 rows. Their values are of no importance: the checks draw parameters and responsibilities of their own.

# %%
generator = torch.Generator().manual_seed(4)


def simulate(num_rows, largest_error):
    """Return x (N,) drawn at the parameters above, and errors (N,), uniform from 0 to the largest."""
    z = torch.multinomial(truth["weights"], num_rows, replacement=True, generator=generator)
    errors = largest_error * torch.rand(num_rows, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_rows, generator=generator, dtype=torch.float64)
    return truth["locs"][z] + (truth["variances"][z] + errors**2).sqrt() * noise, errors


def verdict_on(m_step, data, subject):
    return verify_em(
        model, truth, e_step=e_step, m_step=m_step, log_likelihood=log_likelihood, data=data, seed=1, subject=subject
    )


data = simulate(60, largest_error=0.5)
report = verdict_on(m_step_as_printed, data, "equation (7) as printed")
print(report)

# %% [markdown]
# The responsibilities and the log likelihood agree with the program to rounding, so the E-step is right. The M-step is
# wrong, at the site `variances` and only there: it leaves no gradient in the means and the weights. The error is what
# remains of $\nabla Q$, scale-free: 0 at a maximum and at most 1. The tolerance is what rounding explains. There is no
# hint, because none of the usual slips (a lost root, $n - 1$ for $n$, ...) was measured to mend it.

# %%
check = next(check for check in report.checks if not check.passed)
print(f"site: {check.counterexample['site']}")
print(f"residual {check.error:.2g}, tolerance {check.tolerance:.1g}: {check.error / check.tolerance:.0e} times")

# %% [markdown]
# ## The smallest counterexample
#
# The report ends with Python to run by itself, beside the two functions that were given to `verify_em`. It holds one
# component and two rows. $Q$ comes from the program, and a numerical maximiser finds a variance at which it is larger
# than at the printed equation's. We run it as it stands:

# %%
exec(report.smallest, {"model": model, "m_step": m_step_as_printed})

# %% [markdown]
# ## Where the error sits
#
# Equation (7) says that $\partial Q / \partial \sigma_k^2 = 0$. The part of $Q$ that holds $\sigma_k^2$ is
#
# $$-\frac{1}{2} \sum_n w_{nk} \log(\sigma_k^2 + e_n^2)
# \; - \; \frac{1}{2} \sum_n \frac{w_{nk} (x_n - \mu_k)^2}{\sigma_k^2 + e_n^2},$$
#
# If (7) is right, then the derivative of the first term is minus half of its left side, and that of the second term
# half of its right side. `verify_gradient` holds each against automatic differentiation at random points: variances,
# means, responsibilities, data and errors are all random.

# %%
K, N = 3, 4


def spread_term(variances, resp, errors):
    return -(resp * (variances + errors[:, None] ** 2).log()).sum() / 2


def distance_term(variances, locs, resp, x, errors):
    return -(resp * (x[:, None] - locs) ** 2 / (variances + errors[:, None] ** 2)).sum() / 2


left_as_printed = verify_gradient(
    lambda variances, resp, errors: -left(variances, resp, errors, sign=-1) / 2,
    spread_term,
    *(positive(K), simplex(N, K), positive(N)),
    seed=2,
    subject="the left side as printed",
)
right_as_printed = verify_gradient(
    lambda variances, locs, resp, x, errors: right(variances, locs, resp, x, errors) / 2,
    distance_term,
    *(positive(K), reals(K), simplex(N, K), reals(N), positive(N)),
    seed=2,
    subject="the right side as printed",
)
left_mended = verify_gradient(
    lambda variances, resp, errors: -left(variances, resp, errors, sign=1) / 2,
    spread_term,
    *(positive(K), simplex(N, K), positive(N)),
    seed=2,
    subject="the left side with a plus",
)
print(left_as_printed, right_as_printed, left_mended, sep="\n\n")

# %% [markdown]
# The right side holds, the left side does not, and with the other sign it does. The mended equation is
#
# $$\sum_n \frac{w_{nk}}{\sigma_k^2 + e_n^2} = \sum_n \frac{w_{nk} (x_n - \mu_k)^2}{(\sigma_k^2 + e_n^2)^2}.$$


# %%
def m_step_mended(resp, x, errors):
    return solve(resp, x, errors, sign=1)


print(verdict_on(m_step_mended, data, "equation (7) with a plus"))

# %% [markdown]
# `exact EM`: this is the M-step.
#
# ## Without an equation to solve
#
# The equation has no solution in closed form. Extreme deconvolution (Bovy, Hogg and Roweis 2011, equations 16 and 17)
# gets by without solving it: the error-free value behind each row is missing too, and given its component it is
# Gaussian with mean and variance
#
# $$b_{nk} = \mu_k + \frac{\sigma_k^2}{\sigma_k^2 + e_n^2} (x_n - \mu_k), \qquad
# B_{nk} = \frac{\sigma_k^2 e_n^2}{\sigma_k^2 + e_n^2}.$$
#
# The new mean is the weighted mean of $b$, the new variance that of $(b - \mu)^2 + B$. The step builds on the current
# parameters; it says so by taking them as a keyword argument.


# %%
def extreme_deconvolution(resp, x, errors, *, params):
    share = params["variances"] / (params["variances"] + errors[:, None] ** 2)
    means = params["locs"] + share * (x[:, None] - params["locs"])
    rows = resp / resp.sum(0)
    locs = (rows * means).sum(0)
    return {
        "weights": resp.mean(0),
        "locs": locs,
        "variances": (rows * ((means - locs) ** 2 + share * errors[:, None] ** 2)).sum(0),
    }


print(verdict_on(extreme_deconvolution, data, "extreme deconvolution"))

# %% [markdown]
# `generalised EM`: the step raises $Q$ and does not maximise it, and it stops only where nothing is left to climb. So
# it climbs as well, and each step is in closed form.
#
# ## What would not have found it
#
# Most tests of an EM code look at a fit: the log likelihood goes up, and the parameters that made the data come
# back. We make 600 rows with small errors, at most a tenth, and fit both equations from ten random starts. A fit stops
# when a step gains less than a millionth of the log likelihood, a usual rule.

# %%
x, errors = simulate(600, largest_error=0.1)


def fit(m_step, start, num_steps=1000, rtol=0.0):
    """Return the parameters and the log likelihood after each step."""
    params, trace = start, [log_likelihood(start, x, errors).item()]
    for _ in range(num_steps):
        params = m_step(e_step(params, x, errors), x, errors)
        trace.append(log_likelihood(params, x, errors).item())
        if abs(trace[-1] - trace[-2]) < rtol * abs(trace[-1]):
            break
    return params, torch.tensor(trace, dtype=torch.float64)


def random_start():
    return {
        "weights": torch.full((3,), 1 / 3, dtype=torch.float64),
        "locs": x[torch.randperm(len(x), generator=generator)[:3]],
        "variances": x.var().expand(3),
    }


m_steps = {"printed": m_step_as_printed, "mended": m_step_mended}
starts = [random_start() for _ in range(10)]
fits = {name: [fit(m_step, start, rtol=1e-6) for start in starts] for name, m_step in m_steps.items()}
summary = {
    name: {
        "fits that a step lowered": sum(bool((trace.diff() < 0).any()) for _, trace in found),
        "steps, on average": sum(len(trace) - 1 for _, trace in found) / len(found),
        "best log likelihood": max(trace[-1].item() for _, trace in found),
    }
    for name, found in fits.items()
}
pd.DataFrame.from_dict(summary, orient="index").round(3)

# %% [markdown]
# With the wrong equation as with the right one, no step lowers the log likelihood before the fit stops. Do the
# parameters come back? We climb on from the best fit to the end, and take standard errors from the Hessian of the log
# likelihood there.


# %%
def to_the_end(name):
    """Return the best fit of an equation, run on for 1000 steps, its components from left to right."""
    start, _ = max(fits[name], key=lambda found: found[1][-1])
    params, _ = fit(m_steps[name], start)
    order = params["locs"].argsort()
    return {site: value[order] for site, value in params.items()}


def log_likelihood_of(free):
    """Return the log likelihood as a function of two weights, three locs and three variances, (8,)."""
    weights = torch.cat([free[:2], 1 - free[:2].sum(0, keepdim=True)])
    return log_likelihood({"weights": weights, "locs": free[2:5], "variances": free[5:]}, x, errors)


printed, mended = to_the_end("printed"), to_the_end("mended")
mode = torch.cat([mended["weights"][:2], mended["locs"], mended["variances"]])
hessian = torch.autograd.functional.hessian(log_likelihood_of, mode)
standard_errors = torch.linalg.inv(-hessian).diagonal().sqrt()
sites = {"loc": ("locs", slice(2, 5)), "variance": ("variances", slice(5, 8))}
table = {
    f"{name} {k + 1}": {
        "truth": truth[site][k].item(),
        "mended": mended[site][k].item(),
        "printed": printed[site][k].item(),
        "standard error": standard_errors[span][k].item(),
    }
    for name, (site, span) in sites.items()
    for k in range(3)
}
table = pd.DataFrame.from_dict(table, orient="index")
table["|mended - truth| / s.e."] = (table["mended"] - table["truth"]).abs() / table["standard error"]
table["|printed - mended| / s.e."] = (table["printed"] - table["mended"]).abs() / table["standard error"]
table.round(3)

# %% [markdown]
# Both come back: what the wrong equation moves is a fraction of the noise in the data. So neither test sees the
# fault. A finer look would see something. Run on for 500 steps, the fits of the printed equation come past the
# maximum on their way to the wrong place, and then they fall, by very little:

# %%
for name, m_step in m_steps.items():
    falls = torch.stack([-fit(m_step, start, num_steps=500)[1].diff().min() for start in starts])
    print(f"{name}: {int((falls > 1e-9).sum())} of {len(falls)} fall, by {falls.max():.0e} in a step at most")

# %% [markdown]
# A test of ascent sees this if it allows for rounding and nothing more, and if the fit is not stopped where fits are
# usually stopped. It then says neither which step is wrong nor which parameter. The verdict, on these same rows:

# %%
report = verdict_on(m_step_as_printed, (x, errors), "equation (7) as printed, small errors")
check = next(check for check in report.checks if not check.passed)
print(
    f"{report.verdict} in {check.counterexample['site']}: residual {check.error:.1e}, tolerance {check.tolerance:.0e}"
)

# %% [markdown]
# ## How wrong is it?
#
# With one component and equal errors $e$ the mended equation gives $\sigma^2 = V - e^2$, the variance of the data less
# that of the errors; the page itself states this for equal errors. What does the printed equation subtract?

# %%
rows, resp = torch.randn(50, generator=generator, dtype=torch.float64), torch.ones(50, 1, dtype=torch.float64)
rows = (rows - rows.mean()) / rows.std(correction=0)  # V = 1
subtracted = {
    e: {
        name: (1 - m_step(resp, rows, torch.full_like(rows, e))["variances"].item()) / e**2
        for name, m_step in m_steps.items()
    }
    for e in (0.01, 0.03, 0.1, 0.2, 0.3, 0.35)
}
pd.DataFrame.from_dict(subtracted, orient="index").rename_axis("e").round(3)

# %% [markdown]
# In units of $e^2$: the mended equation subtracts it once, the printed one three times and more. Small errors hide the
# fault, because what is subtracted too much is small too. The surplus grows with the errors. With equal errors (7) is a
# quadratic equation in $\sigma^2$ with the discriminant $V^2 - 8 V e^2$, so that beyond $e = \sqrt{V / 8}$ it has no
# root:

# %%
for e in (0.125**0.5 - 0.001, 0.125**0.5 + 0.001):
    try:
        print(f"e = {e:.4f}: {m_step_as_printed(resp, rows, torch.full_like(rows, e))['variances'].item():.4f}")
    except ValueError as error:
        print(f"e = {e:.4f}: {error}")
