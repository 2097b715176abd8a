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
# # Verify your own EM derivation
#
# You have derived an E-step and an M-step on paper, for a model that no library ships. Here the model is a
# mixture of independent Poisson counts,
#
# $$z_n \sim \mathrm{Cat}(\pi), \qquad x_{nd} \mid z_n = k \sim \mathrm{Poisson}(\lambda_{kd}),$$
#
# and paper says
#
# $$r_{nk} = \frac{\pi_k \prod_d \lambda_{kd}^{x_{nd}} e^{-\lambda_{kd}}}
# {\sum_j \pi_j \prod_d \lambda_{jd}^{x_{nd}} e^{-\lambda_{jd}}}, \qquad
# \pi_k = \frac{N_k}{N}, \qquad \lambda_{kd} = \frac{1}{N_k} \sum_n r_{nk} x_{nd}, \qquad N_k = \sum_n r_{nk}.$$
#
# The judge is the model itself, written as a Pyro program: it needs no derivation, only the generating story.
# `verify_em` sums the latent $z$ out by enumeration, takes gradients by automatic differentiation, and holds
# both steps against them.

# %%
import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from mixproof.inference.verification import positive, simplex, verify_em, verify_gradient, verify_moments

N, D, K = 200, 2, 3


def model(x):
    """Draw weights and rates (flat priors), then each row of counts x (N, D) from its component."""
    weights = pyro.sample("weights", dist.ImproperUniform(constraints.simplex, (), (K,)))
    with pyro.plate("components", K):
        positive_vector = constraints.independent(constraints.positive, 1)
        rates = pyro.sample("rates", dist.ImproperUniform(positive_vector, (), (D,)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        return pyro.sample("x", dist.Poisson(rates[z]).to_event(1), obs=x)


# %% [markdown]
# Counts to try the derivation on, and parameters to start from. Three components and two features are the least
# that show every kind of fault; the numbers themselves are of no importance.

# %%
generator = torch.Generator().manual_seed(5)
params = {
    "weights": torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    "rates": torch.tensor([[2.0, 9.0], [6.0, 1.5], [12.0, 5.0]], dtype=torch.float64),
}


def sample(num_samples, generator):
    """Return counts (num_samples, D) from the mixture with the parameters above."""
    z = torch.multinomial(params["weights"], num_samples, replacement=True, generator=generator)
    return torch.poisson(params["rates"][z], generator=generator)


x = sample(N, generator)

# %% [markdown]
# ## The derivation as code
#
# Three functions, as they stand on paper. The log likelihood is the number one would print during a fit.


# %%
def log_terms(params, x):
    """Return log pi_k + sum_d log Poisson(x_nd | lambda_kd), shape (N, K)."""
    rates = params["rates"]
    return params["weights"].log() + x @ rates.log().T - rates.sum(1) - x.add(1).lgamma().sum(1, keepdim=True)


def e_step(params, x):
    return log_terms(params, x).softmax(1)


def m_step(resp, x):
    counts = resp.sum(0)
    return {"weights": counts / len(x), "rates": resp.T @ x / counts[:, None]}


def log_likelihood(params, x):
    return log_terms(params, x).logsumexp(1).sum()


def verdict_on(**steps):
    """Print the report on a derivation, part of which may be replaced."""
    derivation = {"e_step": e_step, "m_step": m_step, "log_likelihood": log_likelihood, **steps}
    print(verify_em(model, params, **derivation, data=(x,), seed=1, subject="Poisson mixture"))


verdict_on()

# %% [markdown]
# Every error is of the size of rounding: the steps are exact EM for this program. In a test suite of your own,
# `assert_em` with the same arguments raises when that ceases to be true.
#
# ## Three faults, and what is said about them
#
# **A fault in the E-step.** The weights are forgotten: each component counts alike.


# %%
def e_step_without_weights(params, x):
    return (log_terms(params, x) - params["weights"].log()).softmax(1)


verdict_on(e_step=e_step_without_weights)

# %% [markdown]
# The report shows a row of the data, the responsibilities claimed for it and those that the program implies.
#
# **A fault in the M-step.** The rates divide by the number of rows of the most likely component (a hard count)
# in place of the soft count $N_k$. With well-separated clusters the two are close, and the fit looks
# reasonable.


# %%
def m_step_with_hard_counts(resp, x):
    hard = torch.bincount(resp.argmax(1), minlength=K)
    return {"weights": resp.mean(0), "rates": resp.T @ x / hard[:, None]}


verdict_on(m_step=m_step_with_hard_counts)

# %% [markdown]
# The report names the site, `rates`, and puts the claimed value beside what maximises $Q$. It uses random
# responsibilities, at which no cluster is clear; at those of a good fit soft and hard counts nearly agree.
#
# **A fault in the report.** The log likelihood leaves out $-\log x_{nd}!$. No step depends on it, so the fit is
# right; a BIC computed from it, or a comparison with another family, is not.


# %%
def log_likelihood_without_factorials(params, x):
    return (log_terms(params, x) + x.add(1).lgamma().sum(1, keepdim=True)).logsumexp(1).sum()


verdict_on(log_likelihood=log_likelihood_without_factorials)

# %% [markdown]
# ## Moments
#
# The law of total variance gives the mixture
#
# $$\mathbb{E}[\mathbf{x}] = \sum_k \pi_k \boldsymbol\lambda_k, \qquad
# \mathrm{Cov}[\mathbf{x}] = \sum_k \pi_k \left(\mathrm{diag}(\boldsymbol\lambda_k)
# + \boldsymbol\lambda_k \boldsymbol\lambda_k^T\right)
# - \mathbb{E}[\mathbf{x}] \, \mathbb{E}[\mathbf{x}]^T .$$
#
# `verify_moments` draws as many samples as it takes to see an error of a hundredth of a standard deviation.

# %%
weights, rates = params["weights"], params["rates"]
mean = weights @ rates
covariance = torch.diag(mean) + torch.einsum("k,ki,kj->ij", weights, rates, rates) - torch.outer(mean, mean)
print(verify_moments(sample, mean, covariance, seed=2, subject="moments of the Poisson mixture"))

# %% [markdown]
# The same without the Poisson variance inside each component, as if a row were its component's rate:

# %%
print(verify_moments(sample, mean, covariance - torch.diag(mean), seed=2, subject="without the counting noise"))

# %% [markdown]
# ## A gradient
#
# For a fit by gradient ascent one needs $\partial \log p(\mathbf{x}) / \partial \lambda_{kd} = r_k \, (x_d /
# \lambda_{kd} - 1)$. `verify_gradient` compares it with automatic differentiation at random points of the
# domains given.

# %%
row = x[:1]


def log_density(rates, weights):
    return log_terms({"weights": weights, "rates": rates}, row).logsumexp(1).sum()


def slope(rates, weights):
    resp = e_step({"weights": weights, "rates": rates}, row)
    return resp.T * (row / rates - 1)


print(verify_gradient(slope, log_density, positive(K, D), simplex(K), seed=3))
