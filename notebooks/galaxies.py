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
# # How many groups of galaxies?
#
# Roeder (1990) measured how fast 82 galaxies in the region of Corona Borealis move away from us. If galaxies come
# in superclusters with voids between them, the velocities come in groups. How many groups are there? Few data sets
# have been asked this more often, and published answers go from three to nine. This study asks it with the
# evidence $p(x \mid K)$, shows the mistake that the first published evidence made, and then asks how much of the
# answer is the data's and how much the prior's.

# %%
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from matplotlib_inline.backend_inline import set_matplotlib_formats

from mixproof.inference.comparison import Candidate, compare
from mixproof.inference.datatree import summary, to_datatree
from mixproof.inference.evidence import log_evidence
from mixproof.inference.labels import align
from mixproof.inference.log_posterior import LogPosterior
from mixproof.models import gaussian_diagonal

set_matplotlib_formats("jpeg", pil_kwargs={"quality": 85})

velocities = np.loadtxt("../tests/data/galaxies_roeder1990.txt")  # in 1000 km/s
x = torch.as_tensor(velocities)[:, None]

figure, axes = plt.subplots(figsize=(8, 2.2), layout="constrained")
axes.hist(velocities, bins=40, color="lightgrey")
axes.plot(velocities, np.full_like(velocities, -0.4), "|", color="black")
axes.set(xlabel="velocity, 1000 km/s", ylabel="galaxies")
plt.show()

# %% [markdown]
# ## An evidence that went wrong in print
#
# Chib (1995) computed the evidence of two groups with one common variance, under
# $\mu_j \sim \mathcal N(20, 100)$, $\sigma^2 \sim \mathrm{IG}(3, 20)$ and uniform weights. The model is a Pyro
# program like any other; `log_evidence` carries particles from the prior to the posterior.


# %%
def two_groups(x):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2, dtype=x.dtype)))
    variance = pyro.sample("variance", dist.InverseGamma(x.new_tensor(3.0), x.new_tensor(20.0)))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(x.new_tensor(20.0), 10.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[z], variance.sqrt()), obs=x)


found = log_evidence(two_groups, x[:, 0], seed=0)
print(f"log evidence {found.log_evidence:.3f}, standard error {found.standard_error:.3f}")

# %% [markdown]
# Chib printed $-240.464$. Neal (1999) summed the same integral by brute force and found $-239.764$, as we do. The
# difference is
#
# $$-239.764 - (-240.464) = 0.700 \approx \log 2! = 0.693 .$$
#
# Here is why. The labels of the groups mean nothing, so that the posterior has $K!$ copies of each mode: swap the
# two groups, and nothing changes. A sampler that never swaps them sees one copy. An estimate of the evidence that
# compares the *height* of the posterior with the *share* of its mass around there, as Chib's and as bridge sampling
# do, then takes one copy for all, and is too low by exactly $\log K!$. We can make the mistake on purpose: keep the
# draws of one copy, and do not tell the estimator of the symmetry.

# %%
posterior = LogPosterior(two_groups, x[:, 0])
in_order = align(found.draws, posterior)  # every draw in the copy where the groups have the same numbers
single = log_evidence(two_groups, x[:, 0], method="bridge", draws=in_order, relabel=False, seed=0)
whole = log_evidence(two_groups, x[:, 0], method="bridge", draws=in_order, seed=0)
for name, estimate in {"one copy taken for all": single, "both copies": whole}.items():
    print(f"{name}: {estimate.log_evidence:.3f}, standard error {estimate.standard_error:.3f}")
print(f"difference {whole.log_evidence - single.log_evidence:.3f}, log 2 = {np.log(2):.3f}")

# %% [markdown]
# Two methods that share no step, sequential Monte Carlo and bridge sampling, agree once the symmetry is treated.
#
# For the choice of $K$ this is no detail: $\log K!$ grows from 0.7 at $K = 2$ to 6.6 at $K = 6$, and an estimate
# that forgets it makes large $K$ look hundreds of times less probable than they are.
#
# ## One table for all candidates
#
# Now every group gets a variance of its own. The prior is weakly informative: `weakly_informative_prior` sets it from
# the mean and the spread of the data, and the table repeats it in full, since the evidence depends on it.

# %%
sizes = range(1, 7)
candidates = [
    Candidate(gaussian_diagonal, k, gaussian_diagonal.weakly_informative_prior(x, k), f"K = {k}") for k in sizes
]
study = compare(candidates, x, seed=0)
print(study)

# %%
study.plot()

# %% [markdown]
# The criteria do not ask the same question, and the warnings say where they part. BIC and the evidence ask which
# $K$ made the data; LOO asks which predicts a galaxy that was left out, and does not mind components that it does
# not need. ICL asks for groups that do not overlap.
#
# ## How sure, and how much of it is the prior?
#
# The posterior over $K$ has a Monte Carlo error, which is small. What is not small is its dependence on the prior of
# the variances. The scale of that prior says how wide a group is expected to be; let it go from a third to three
# times what it was. More particles than by default keep the error small where groups may be very narrow.

# %%
rows = []
for factor in (1 / 3, 1.0, 3.0):
    widened = [
        candidate._replace(prior=candidate.prior._replace(rate=candidate.prior.rate * factor))
        for candidate in candidates
    ]
    evidences = {
        candidate.num_components: log_evidence(
            partial(gaussian_diagonal.model, num_components=candidate.num_components, prior=candidate.prior),
            x,
            seed=1,
            family=gaussian_diagonal,
            num_chains=512,
        ).log_evidence
        for candidate in widened[2:]
    }
    shares = torch.tensor(list(evidences.values())).softmax(0)
    rows.append({"rate": f"x {factor:.2g}", **{f"K = {k}": f"{p:.2f}" for k, p in zip(evidences, shares, strict=True)}})
pd.DataFrame(rows).set_index("rate")

# %% [markdown]
# ## The groups themselves
#
# We look at the groups of one $K$, the one with most posterior probability in the table. A Gibbs chain hardly changes
# modes here, and chains that all sit in one mode agree with each other: a small R-hat does not show it. The particles
# of sequential Monte Carlo, from which the draws of the table come too, take in galaxy by galaxy and need not cross
# from mode to mode; their four chains share no particle. Draws that do not agree on labels cannot be asked for
# "group 1": `summary` would warn. Aligned draws can, and the density of the data needs no labels.

# %%
best = max(study.rows, key=lambda row: row.probability)
candidate = candidates[[row.name for row in study.rows].index(best.name)]
program = partial(gaussian_diagonal.model, num_components=candidate.num_components, prior=candidate.prior)
draws = log_evidence(program, x, seed=2, family=gaussian_diagonal).draws
posterior = LogPosterior(program, x)
aligned = align(draws, posterior)
tree = to_datatree(aligned, posterior, seed=3, family=gaussian_diagonal)
summary(tree, components=True)

# %%
grid = torch.linspace(5, 40, 400, dtype=torch.float64)[:, None]
num_chains, num_draws = draws.params["weights"].shape[:2]
chosen = torch.arange(0, num_draws, max(num_draws // 80, 1))
densities = torch.stack(
    [
        gaussian_diagonal.log_joint(
            gaussian_diagonal.Params(*(draws.params[name][chain, draw] for name in gaussian_diagonal.Params._fields)),
            grid,
        ).logsumexp(1)
        for chain in range(num_chains)
        for draw in chosen
    ]
).exp()
lower, middle, upper = densities.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64), 0)
figure, axes = plt.subplots(figsize=(8, 2.6), layout="constrained")
axes.hist(velocities, bins=40, density=True, color="lightgrey")
axes.fill_between(grid[:, 0], lower, upper, alpha=0.4)
axes.plot(grid[:, 0], middle)
axes.set(xlabel="velocity, 1000 km/s", ylabel="density", title=f"{best.name}: median and 90 % of the posterior")
plt.show()

# %% [markdown]
# ## What we may say
#
# One or two groups are out of the question. Beyond that the data narrow $K$ to four, five or six, and no further: with
# the prior of the table $K = 5$ has probability 0.41, and none has more. A prior that expects groups a third as wide
# in variance makes it four, one that expects them three times as wide makes it six. Leave-one-out prediction does not
# tell the last two apart, and a criterion that asks for separate groups, ICL, sees three. So "how many groups?" is
# answered only together with "how wide is a group?", and whoever publishes one number should publish the prior with it.
