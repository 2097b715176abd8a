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
# # Compare models on data
#
# How many kinds of eruption does the Old Faithful geyser have, and what shape has each? The data are 272
# eruptions: their duration and the wait for the next one, both in minutes. We fit several families with several
# numbers of components, choose by the Bayesian information criterion, check a fit by two routes that share no
# formula with it, and then read a posterior in ArviZ.

# %%
from functools import partial

import arviz_base
import arviz_plots
import arviz_stats
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import torch
from matplotlib_inline.backend_inline import set_matplotlib_formats
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, init_to_value

from mixproof.inference.em import em, responsibilities
from mixproof.inference.posterior_mode import posterior_mode
from mixproof.inference.svi import svi
from mixproof.models import gaussian_diagonal, gaussian_full, gaussian_tied, laplace

generator = torch.Generator().manual_seed(7)
set_matplotlib_formats("jpeg", pil_kwargs={"quality": 85})

features = ["duration", "wait"]
x = torch.as_tensor(np.loadtxt("../tests/data/faithful.csv", delimiter=",", skiprows=1))
N, D = x.shape

# %% [markdown]
# ## Families and numbers of components
#
# The criterion is $\mathrm{BIC} = -2 \log p(x \mid \hat\theta) + p \log N$ with $p$ free parameters; the
# smallest value is best. EM climbs to a local maximum, so each model gets several starts, and the best of them
# is climbed to the end. A start in which a component collapses (its density grows without bound on a few rows)
# is counted and left out: it has no maximum to report.

# %%
families = {
    "full covariances": (gaussian_full, lambda k: k - 1 + k * D + k * D * (D + 1) // 2),
    "one shared covariance": (gaussian_tied, lambda k: k - 1 + k * D + D * (D + 1) // 2),
    "diagonal covariances": (gaussian_diagonal, lambda k: k - 1 + 2 * k * D),
    "Laplace": (laplace, lambda k: k - 1 + 2 * k * D),
}


def best_of(family, k, num_starts=15):
    """Return the fit of highest log likelihood over several starts, and how many starts collapsed."""
    fits, num_collapsed = [], 0
    for _ in range(num_starts):
        try:
            fits.append(em(family, x, family.init_params(x, k, generator), max_steps=5000, rtol=1e-6))
        except ValueError:
            num_collapsed += 1
    best = max(fits, key=lambda fit: fit.log_lik[-1])
    return em(family, x, best.params, max_steps=20_000), num_collapsed


rows, fits = [], {}
for name, (family, num_free) in families.items():
    for k in range(1, 5):
        fits[name, k], num_collapsed = best_of(family, k)
        log_lik = fits[name, k].log_lik[-1].item()
        bic = -2 * log_lik + num_free(k) * np.log(N)
        rows.append((name, k, num_free(k), log_lik, bic, num_collapsed))

columns = ["family", "components", "free parameters", "log likelihood", "BIC", "starts collapsed"]
models = pd.DataFrame(rows, columns=columns).sort_values("BIC", ignore_index=True)
models.round(3)

# %% [markdown]
# EM finds local maxima, and more starts might raise a row with many parameters; the order at the top is what
# matters. The best model:

# %%
name, k = models.loc[0, "family"], models.loc[0, "components"]
family, best = families[name][0], fits[name, k]
table = pd.DataFrame(np.column_stack([best.params.weights, best.params.locs]), columns=["weight", *features])
table.rename_axis("component").round(3)

# %%
labels = responsibilities(family, best.params, x).argmax(1)
fig, ax = plt.subplots(figsize=(5, 3.4), dpi=90, layout="constrained")
ax.scatter(*x.T, c=labels, s=12, cmap="viridis")
ax.set(xlabel="duration (minutes)", ylabel="wait (minutes)", title=f"{name}, {k} components")
plt.show()

# %% [markdown]
# ## The same maximum by another route
#
# `posterior_mode` knows nothing of E-steps and M-steps: it climbs the log density of the Pyro program, the
# latent summed out by enumeration, along gradients by automatic differentiation. From the parameters at which
# EM stopped, there should be nothing left to climb.

# %%
program = partial(family.model, num_components=int(k))
mode = posterior_mode(program, best.params, x)
log_lik = best.log_lik[-1].item()
print(f"EM:             {log_lik:.9f}")
print(f"posterior_mode: {mode.log_density:.9f}")
print(f"relative gap:   {abs(mode.log_density - log_lik) / abs(log_lik):.1e}")

# %% [markdown]
# ## A posterior
#
# For uncertainty we need a prior. We take the two plain groups, short and long eruptions, as a mixture with
# diagonal covariances, and a weak conjugate prior: it counts as a hundredth of an eruption for each mean, and
# as four degrees of freedom for each variance.

# %%
prior = gaussian_diagonal.Prior(
    concentration=torch.full((2,), 2.0, dtype=torch.float64),
    loc=x.mean(0),
    strength=torch.tensor(0.01, dtype=torch.float64),
    shape=torch.full((D,), 2.0, dtype=torch.float64),
    rate=x.var(0) / 4,
)
program = partial(gaussian_diagonal.model, num_components=2, prior=prior)
start = gaussian_diagonal.init_params(x, 2, generator)
by_em = em(gaussian_diagonal, x, start, prior=prior)

# %% [markdown]
# The mode once more by three routes: EM with the prior, the gradient climb, and stochastic variational
# inference with a guide that is a point. All three report $\log p(x, \theta)$ where they stop.

# %%
hidden = pyro.poutine.block(program, hide=["z"])
point = svi(program, AutoDelta(hidden, init_loc_fn=init_to_value(values=start._asdict())), x, num_steps=500, seed=1)
print(f"EM with prior:   {by_em.log_lik[-1].item():.6f}")
print(f"posterior_mode:  {posterior_mode(program, start, x).log_density:.6f}")
print(f"SVI, point guide: {-point.losses[-1].item():.6f}")

# %% [markdown]
# A Gaussian guide in unconstrained coordinates, started at the mode, spreads out until it fits the posterior
# about it. A posterior of a mixture has $K!$ mirror images, one for each order of the components; the guide
# sits on one of them, which is what one wants here, since the labels keep their meaning.

# %%
guide = AutoMultivariateNormal(hidden, init_loc_fn=init_to_value(values=by_em.params._asdict()), init_scale=0.05)
found = svi(program, guide, x, num_steps=800, seed=2, learning_rate=0.02)
elbo = -found.losses[-200:].mean().item()
print(f"log evidence is at least {elbo:.2f}, up to noise: the mean of the last 200 estimates of the ELBO")

# %% [markdown]
# ## Reading it in ArviZ
#
# Draws from the fitted guide go into an ArviZ `DataTree` with named dimensions. They are independent, so that
# there is nothing to diagnose about a chain; the summary gives means, standard deviations and intervals.

# %%
with torch.random.fork_rng(), torch.no_grad():
    pyro.set_rng_seed(3)
    draws = Predictive(guide, num_samples=1000, return_sites=gaussian_diagonal.Params._fields)(x)
order = by_em.params.locs[:, 0].argsort()  # short eruptions first
posterior = {
    "weights": draws["weights"].reshape(1, 1000, 2)[..., order],
    "locs": draws["locs"].reshape(1, 1000, 2, D)[..., order, :],
    "sds": draws["variances"].reshape(1, 1000, 2, D)[..., order, :].sqrt(),
}
data = arviz_base.from_dict(
    {"posterior": {name: value.numpy() for name, value in posterior.items()}},
    coords={"component": ["short", "long"], "feature": features},
    dims={"weights": ["component"], "locs": ["component", "feature"], "sds": ["component", "feature"]},
)
arviz_stats.summary(data, kind="stats", round_to=3)

# %%
arviz_plots.plot_dist(
    data,
    var_names=["locs"],
    stats={"point_estimate": {"round_to": 4}},
    figure_kwargs={"figsize": (9, 2.4), "dpi": 80},
)
plt.show()

# %% [markdown]
# ArviZ needs one more step to judge a fit: the pointwise log likelihood. Without it the answer to "how many
# components" above rests on BIC alone, which counts parameters and does not ask how well each is known.
