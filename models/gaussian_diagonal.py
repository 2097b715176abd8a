r"""Mixture of Gaussians with diagonal covariances: the features are independent given the component.

.. math::
    z_n \sim \mathrm{Cat}(\pi), \qquad x_{nd} \mid z_n = k \sim \mathcal{N}(\mu_{kd}, \sigma^2_{kd})

Sizes: N observations, D features, K components. Every scale here is a variance. The conjugate prior is Dirichlet on the
weights and normal-inverse-gamma on each (component, feature) pair (Fraley and Raftery 2007, section 2; with D = 1 it is
their univariate model with unequal variances).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.models.conjugate import (
    data_scale,
    draw_dirichlet,
    draw_gamma,
    draw_normal,
    log_allocations,
    log_student,
    log_urn,
)
from mixproof.models.initial import counted_rows, partition


class Params(NamedTuple):
    weights: Tensor  # (K,)
    locs: Tensor  # (K, D)
    variances: Tensor  # (K, D)


class Prior(NamedTuple):
    """weights ~ Dirichlet(concentration), variances ~ InverseGamma(shape, rate).

    Given those, locs ~ N(loc, variance / strength).
    """

    concentration: Tensor  # (K,)
    loc: Tensor  # (D,)
    strength: Tensor  # (), in pseudo-observations
    shape: Tensor  # (D,)
    rate: Tensor  # (D,)


class Stats(NamedTuple):
    """Sums over rows, weighted by responsibilities; additive over rows. Second moments are about the current locs."""

    counts: Tensor  # (K,), of r
    sums: Tensor  # (K, D), of r x
    shifts: Tensor  # (K, D), of r (x - loc)
    squares: Tensor  # (K, D), of r (x - loc)^2


additive = True  # statistics of chunks of rows add up


def model(
    x: Tensor | None = None,
    *,
    num_components: int,
    prior: Prior | None = None,
    num_data: int | None = None,
    num_features: int | None = None,
) -> Tensor:
    """Draw the parameters, then each row from its component; observe x (N, D), or generate ``num_data`` rows.

    Flat priors are improper and cannot be drawn from: without ``prior``, condition the parameter sites to generate.
    """
    num_data = num_data if x is None else x.shape[0]
    if prior is None:
        num_features = num_features if x is None else x.shape[1]
        weights = pyro.sample("weights", dist.ImproperUniform(constraints.simplex, (), (num_components,)))
        with pyro.plate("components", num_components):
            locs = pyro.sample("locs", dist.ImproperUniform(constraints.real_vector, (), (num_features,)))
            positive_vector = constraints.independent(constraints.positive, 1)
            variances = pyro.sample("variances", dist.ImproperUniform(positive_vector, (), (num_features,)))
    else:
        weights = pyro.sample("weights", dist.Dirichlet(prior.concentration))
        with pyro.plate("components", num_components):
            variances = pyro.sample("variances", dist.InverseGamma(prior.shape, prior.rate).to_event(1))
            locs = pyro.sample("locs", dist.Normal(prior.loc, (variances / prior.strength).sqrt()).to_event(1))
    with pyro.plate("data", num_data):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        return pyro.sample("x", dist.Normal(locs[z], variances[z].sqrt()).to_event(1), obs=x)


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), shape (N, K)."""
    deviations = x[..., None, :] - params.locs  # (N, K, D)
    log_normal = -((2 * math.pi * params.variances).log() + deviations.square() / params.variances) / 2
    return params.weights.log() + log_normal.sum(-1)


def statistics(params: Params, x: Tensor, resp: Tensor) -> Stats:
    """Return the sufficient statistics of rows x (N, D) under responsibilities (N, K)."""
    deviations = x - params.locs[..., None, :]  # (K, N, D)
    weighted = resp.mT[..., None] * deviations
    return Stats(resp.sum(-2), resp.mT @ x, weighted.sum(-2), (weighted * deviations).sum(-2))


def log_joint_observed(params: Params, x: Tensor) -> Tensor:
    """Return log p(observed part of x_n, z_n = k), shape (N, K), with NaN in x (N, D) for what is missing."""
    missing = x.isnan()[..., None, :]
    deviations = torch.where(missing, 0, x[..., None, :] - params.locs)  # (N, K, D)
    log_normal = -((2 * math.pi * params.variances).log() + deviations.square() / params.variances) / 2
    return params.weights.log() + torch.where(missing, 0, log_normal).sum(-1)


def statistics_observed(params: Params, x: Tensor, resp: Tensor) -> Stats:
    """Return the expected statistics of rows x (N, D) given what is observed, under responsibilities (N, K)."""
    missing = x.isnan()
    deviations = torch.where(missing, 0, x - params.locs[..., None, :])  # (K, N, D)
    weighted = resp.mT[..., None] * deviations
    unseen = resp.mT @ missing.to(x.dtype)  # (K, D), of r where the feature is missing
    return Stats(
        resp.sum(-2),
        resp.mT @ torch.where(missing, 0, x) + unseen * params.locs,
        weighted.sum(-2),
        (weighted * deviations).sum(-2) + unseen * params.variances,
    )


def recentre(stats: Stats, old: Params, new: Params) -> Stats:
    """Return the statistics about the locs of new parameters, given those about the locs of old ones."""
    moves = old.locs - new.locs
    shifts = stats.shifts + stats.counts[..., None] * moves
    squares = stats.squares + moves * (2 * stats.shifts + stats.counts[..., None] * moves)
    return stats._replace(shifts=shifts, squares=squares)


def features(x: Tensor, center: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the squares of x - center, x - center and ones, shape (..., 2 D + 1, N), for rows x (..., N, D)."""
    *batch, num_rows, size = x.shape
    result = x.new_empty(*batch, 2 * size + 1, num_rows) if out is None else out
    result[..., -1, :] = 1
    centred = torch.sub(x.mT, center[:, None], out=result[..., size:-1, :])
    torch.square(centred, out=result[..., :size, :])
    return result


def natural(params: Params, center: Tensor) -> Tensor:
    """Return the coefficients (K, 2 D + 1) of the features in log p(x_n, z_n = k)."""
    locs, precisions = params.locs - center, 1 / params.variances
    constant = params.weights.log() - ((2 * math.pi * params.variances).log() + locs.square() * precisions).sum(-1) / 2
    return torch.cat([-precisions / 2, precisions * locs, constant[:, None]], -1)


def reach(params: Params, center: Tensor) -> Tensor:
    """Return no less than the root mean squares (K, D) of x - center in each component."""
    return (params.locs - center).abs() + params.variances.sqrt()


def statistics_of(moments: Tensor, params: Params, center: Tensor) -> Stats:
    """Return the sufficient statistics from the sums of features times responsibilities, shape (2 D + 1, K)."""
    squares, sums, counts = moments.mT.split([center.shape[-1], center.shape[-1], 1], -1)
    locs = params.locs - center
    return Stats(
        counts[:, 0], sums + counts * center, sums - counts * locs, squares - 2 * locs * sums + counts * locs.square()
    )


def m_step(stats: Stats, prior: Prior | None = None) -> Params:
    """Return the parameters that maximise Q, or Q + log prior."""
    counts = stats.counts[..., None]
    safe = counts.clamp_min(torch.finfo(counts.dtype).tiny)
    within = stats.squares - stats.shifts.square() / safe  # about the component's own mean
    if prior is None:
        return Params(stats.counts / stats.counts.sum(-1, keepdim=True), stats.sums / counts, within / counts)
    weights = stats.counts + prior.concentration - 1
    locs = (prior.strength * prior.loc + stats.sums) / (prior.strength + counts)
    pull = prior.strength / (prior.strength + counts) * (stats.sums - counts * prior.loc).square() / safe
    variances = (2 * prior.rate + within + pull) / (2 * prior.shape + counts + 3)
    return Params(weights / weights.sum(-1, keepdim=True), locs, variances)


def log_prior(params: Params, prior: Prior) -> Tensor:
    """Return the log density of the prior at the parameters, a number ()."""
    alpha, variances = prior.concentration, params.variances
    log_dirichlet = torch.xlogy(alpha - 1, params.weights).sum(-1) + alpha.sum().lgamma() - alpha.lgamma().sum()
    log_variances = (
        prior.shape * prior.rate.log()
        - prior.shape.lgamma()
        - (prior.shape + 1) * variances.log()
        - prior.rate / variances
    )
    precision = prior.strength / variances
    log_locs = ((precision / (2 * math.pi)).log() - precision * (params.locs - prior.loc).square()) / 2
    return log_dirichlet + (log_variances + log_locs).sum((-2, -1))


def posterior(stats: Stats, prior: Prior) -> Prior:
    """Return the hyperparameters of p(params | x, z), of each component its own.

    Gelman et al., Bayesian Data Analysis, 3rd edition, section 3.3, feature by feature. Shapes: concentration (K,),
    strength (K, 1), loc, shape and rate (K, D), behind any leading dimensions of the statistics.
    """
    counts = stats.counts[..., None]
    safe = counts.clamp_min(torch.finfo(counts.dtype).tiny)
    strength = prior.strength + counts
    within = (stats.squares - stats.shifts.square() / safe).clamp_min(0)  # about the component's own mean
    pull = prior.strength / strength * (stats.sums - counts * prior.loc).square() / safe
    return Prior(
        concentration=prior.concentration + stats.counts,
        loc=(prior.strength * prior.loc + stats.sums) / strength,
        strength=strength,
        shape=prior.shape + counts / 2,
        rate=prior.rate + (within + pull) / 2,
    )


def draw(params: Params, stats: Stats, prior: Prior, generator: torch.Generator) -> Params:
    """Return a draw from p(params | x, z), Dirichlet and normal-inverse-gamma; of no rows, from the prior.

    Args:
        params: the parameters about whose locs the statistics are; the draw does not depend on them otherwise.
        stats: those of all rows, each in one component; leading dimensions are chains.
        prior: the prior.
        generator: the only source of randomness.
    """
    concentration, loc, strength, shape, rate = posterior(stats, prior)
    weights = draw_dirichlet(concentration, generator)
    variances = rate / draw_gamma(shape, generator)
    return Params(weights, loc + draw_normal(loc, generator) * (variances / strength).sqrt(), variances)


def log_marginal(stats: Stats, prior: Prior) -> Tensor:
    """Return log p(x, z), the parameters integrated out, for statistics of rows each in one component.

    Murphy 2007, Conjugate Bayesian analysis of the Gaussian distribution, equation 203, feature by feature.
    """
    after = posterior(stats, prior)
    log_density = (
        -stats.counts[..., None] / 2 * math.log(2 * math.pi)
        + (prior.strength.log() - after.strength.log()) / 2
        + after.shape.lgamma()
        - prior.shape.lgamma()
        + prior.shape * prior.rate.log()
        - after.shape * after.rate.log()
    )
    return log_allocations(stats.counts, prior.concentration) + log_density.sum((-2, -1))


def log_predictive(stats: Stats, prior: Prior, x: Tensor) -> Tensor:
    """Return log p(x, z = k | rows so far), (..., K), of one more row, the parameters integrated out.

    Student's law in each feature.

    Args:
        stats: those of the rows so far, each in one component, behind any leading dimensions.
        prior: the prior.
        x: (..., D), the row.
    """
    after = posterior(stats, prior)
    squares = (x[..., None, :] - after.loc).square()
    log_density = log_student(squares, 1, after.shape, after.rate, after.strength)
    return log_urn(stats.counts, prior.concentration) + log_density.sum(-1)


def sample(params: Params, num_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ``num_samples`` draws x (n, D) and the components z (n,) that they came from."""
    z = torch.multinomial(params.weights, num_samples, replacement=True, generator=generator)
    locs = params.locs
    noise = torch.randn(num_samples, locs.shape[-1], generator=generator, dtype=locs.dtype, device=locs.device)
    return noise.mul(params.variances.sqrt().index_select(0, z)).add_(locs.index_select(0, z)), z


def moments(params: Params) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and the covariance (D, D) of one observation."""
    mean = params.weights @ params.locs
    deviations = params.locs - mean
    between = (params.weights[:, None] * deviations).mT @ deviations
    return mean, between + torch.diag_embed(params.weights @ params.variances)


def init_params(
    x: Tensor, num_components: int, generator: torch.Generator, method: str = "k-means++", weights: Tensor | None = None
) -> Params:
    """Return a start for EM: shares and means of a partition of x (N, D), and its variances within the parts for all.

    One pseudo-observation with the variances of all the data keeps the start regular where a part has a single row.
    Rows count as often as their weights (N,) say; None counts each once.
    """
    resp = partition(x, num_components, generator, method, weights)
    x, weights = counted_rows(x, weights)
    parts = resp * weights[:, None]
    counts, total = parts.sum(0), weights.sum()
    locs = (parts.mT @ x) / counts.where(counts > 0, 1)[:, None]
    centred = x - weights @ x / total
    within = (weights @ (x - resp @ locs).square() + weights @ centred.square() / total) / (total + 1)
    return Params((counts + 1) / (counts + 1).sum(), locs, within.expand(num_components, -1).clone())


def weakly_informative_prior(x: Tensor, num_components: int) -> Prior:
    """Return a proper prior on the scale of rows x (N, D), as ``DataScale`` says; mean variances diag S / K^(2 / D).

    Raises:
        TypeError, ValueError: as ``data_scale``.
    """
    loc, covariance, shrinkage = data_scale(x, num_components)
    rate = covariance.diagonal() * shrinkage / 2
    return Prior(loc.new_ones(num_components), loc, loc.new_tensor(0.01), torch.full_like(rate, 1.5), rate)
