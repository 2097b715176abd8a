r"""Mixture of spherical Gaussians: each component has one variance for all its features.

.. math::
    z_n \sim \mathrm{Cat}(\pi), \qquad x_n \mid z_n = k \sim \mathcal{N}(\mu_k, \sigma^2_k I)

Sizes: N observations, D features, K components. Every scale here is a variance. The conjugate prior is Dirichlet on the
weights and normal-inverse-gamma on each component (Fraley and Raftery 2007, section 2).
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
    variances: Tensor  # (K,)


class Prior(NamedTuple):
    """weights ~ Dirichlet(concentration), variances ~ InverseGamma(shape, rate).

    Given those, locs ~ N(loc, variance / strength I).
    """

    concentration: Tensor  # (K,)
    loc: Tensor  # (D,)
    strength: Tensor  # (), in pseudo-observations
    shape: Tensor  # ()
    rate: Tensor  # ()


class Stats(NamedTuple):
    """Sums over rows, weighted by responsibilities; additive over rows. Second moments are about the current locs."""

    counts: Tensor  # (K,), of r
    sums: Tensor  # (K, D), of r x
    shifts: Tensor  # (K, D), of r (x - loc)
    squares: Tensor  # (K,), of r ||x - loc||^2


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
            variances = pyro.sample("variances", dist.ImproperUniform(constraints.positive, (), ()))
    else:
        weights = pyro.sample("weights", dist.Dirichlet(prior.concentration))
        with pyro.plate("components", num_components):
            variances = pyro.sample("variances", dist.InverseGamma(prior.shape, prior.rate))
            spread = (variances / prior.strength).sqrt()[..., None]
            locs = pyro.sample("locs", dist.Normal(prior.loc, spread).to_event(1))
    with pyro.plate("data", num_data):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        return pyro.sample("x", dist.Normal(locs[z], variances[z].sqrt()[..., None]).to_event(1), obs=x)


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), shape (N, K)."""
    squares = (x[..., None, :] - params.locs).square().sum(-1)
    log_normal = -(x.shape[-1] * (2 * math.pi * params.variances).log() + squares / params.variances) / 2
    return params.weights.log() + log_normal


def statistics(params: Params, x: Tensor, resp: Tensor) -> Stats:
    """Return the sufficient statistics of rows x (N, D) under responsibilities (N, K)."""
    deviations = x - params.locs[..., None, :]  # (K, N, D)
    weighted = resp.mT[..., None] * deviations
    return Stats(resp.sum(-2), resp.mT @ x, weighted.sum(-2), (weighted * deviations).sum((-2, -1)))


def log_joint_observed(params: Params, x: Tensor) -> Tensor:
    """Return log p(observed part of x_n, z_n = k), shape (N, K), with NaN in x (N, D) for what is missing."""
    missing = x.isnan()
    size = (~missing).to(x.dtype).sum(-1)[..., None]  # of the observed part
    squares = torch.where(missing[..., None, :], 0, x[..., None, :] - params.locs).square().sum(-1)
    log_normal = -(size * (2 * math.pi * params.variances).log() + squares / params.variances) / 2
    return params.weights.log() + log_normal


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
        (weighted * deviations).sum((-2, -1)) + unseen.sum(-1) * params.variances,
    )


def recentre(stats: Stats, old: Params, new: Params) -> Stats:
    """Return the statistics about the locs of new parameters, given those about the locs of old ones."""
    moves = old.locs - new.locs
    shifts = stats.shifts + stats.counts[..., None] * moves
    squares = stats.squares + (moves * (2 * stats.shifts + stats.counts[..., None] * moves)).sum(-1)
    return stats._replace(shifts=shifts, squares=squares)


def features(x: Tensor, center: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ||x - center||^2, x - center and ones, shape (..., D + 2, N), for rows x (..., N, D)."""
    *batch, num_rows, size = x.shape
    result = x.new_empty(*batch, size + 2, num_rows) if out is None else out
    result[..., -1, :] = 1
    centred = torch.sub(x.mT, center[:, None], out=result[..., 1:-1, :])
    torch.sum(centred.square(), -2, out=result[..., 0, :])
    return result


def natural(params: Params, center: Tensor) -> Tensor:
    """Return the coefficients (K, D + 2) of the features in log p(x_n, z_n = k)."""
    locs, precisions = params.locs - center, 1 / params.variances[:, None]
    log_normaliser = locs.shape[-1] * (2 * math.pi * params.variances).log() / 2
    constant = params.weights.log() - log_normaliser - (locs.square() * precisions).sum(-1) / 2
    return torch.cat([-precisions / 2, precisions * locs, constant[:, None]], -1)


def reach(params: Params, center: Tensor) -> Tensor:
    """Return no less than the root mean squares (K, D) of x - center in each component."""
    return (params.locs - center).abs() + params.variances.sqrt()[:, None]


def statistics_of(moments: Tensor, params: Params, center: Tensor) -> Stats:
    """Return the sufficient statistics from the sums of features times responsibilities, shape (D + 2, K)."""
    squares, sums, counts = moments.mT.split([1, center.shape[-1], 1], -1)
    locs = params.locs - center
    about_locs = squares[:, 0] + (counts * locs.square() - 2 * locs * sums).sum(-1)
    return Stats(counts[:, 0], sums + counts * center, sums - counts * locs, about_locs)


def m_step(stats: Stats, prior: Prior | None = None) -> Params:
    """Return the parameters that maximise Q, or Q + log prior."""
    size = stats.sums.shape[-1]
    counts = stats.counts
    safe = counts.clamp_min(torch.finfo(counts.dtype).tiny)
    within = stats.squares - stats.shifts.square().sum(-1) / safe  # about the component's own mean
    if prior is None:
        return Params(counts / counts.sum(-1, keepdim=True), stats.sums / counts[..., None], within / (size * counts))
    weights = counts + prior.concentration - 1
    locs = (prior.strength * prior.loc + stats.sums) / (prior.strength + counts)[..., None]
    distances = (stats.sums - counts[..., None] * prior.loc).square().sum(-1) / safe
    pull = prior.strength / (prior.strength + counts) * distances
    variances = (2 * prior.rate + within + pull) / (2 * prior.shape + 2 + size * (counts + 1))
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
    distances = (params.locs - prior.loc).square().sum(-1)
    log_locs = (params.locs.shape[-1] * (precision / (2 * math.pi)).log() - precision * distances) / 2
    return log_dirichlet + (log_variances + log_locs).sum(-1)


def posterior(stats: Stats, prior: Prior) -> Prior:
    """Return the hyperparameters of p(params | x, z), of each component its own.

    Gelman et al., Bayesian Data Analysis, 3rd edition, section 3.3, with one variance for all features. Shapes:
    concentration, strength, shape and rate (K,), loc (K, D), behind any leading dimensions of the statistics.
    """
    counts, size = stats.counts, stats.sums.shape[-1]
    safe = counts.clamp_min(torch.finfo(counts.dtype).tiny)
    strength = prior.strength + counts
    within = (stats.squares - stats.shifts.square().sum(-1) / safe).clamp_min(0)  # about the component's own mean
    distances = (stats.sums - counts[..., None] * prior.loc).square().sum(-1)
    pull = prior.strength / strength * distances / safe
    return Prior(
        concentration=prior.concentration + counts,
        loc=(prior.strength * prior.loc + stats.sums) / strength[..., None],
        strength=strength,
        shape=prior.shape + size * counts / 2,
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
    spread = (variances / strength).sqrt()[..., None]
    return Params(weights, loc + draw_normal(loc, generator) * spread, variances)


def log_marginal(stats: Stats, prior: Prior) -> Tensor:
    """Return log p(x, z), the parameters integrated out, for statistics of rows each in one component.

    Murphy 2007, Conjugate Bayesian analysis of the Gaussian distribution, equation 203, with one variance for all
    features.
    """
    size, after = stats.sums.shape[-1], posterior(stats, prior)
    log_density = (
        -stats.counts * size / 2 * math.log(2 * math.pi)
        + size / 2 * (prior.strength.log() - after.strength.log())
        + after.shape.lgamma()
        - prior.shape.lgamma()
        + prior.shape * prior.rate.log()
        - after.shape * after.rate.log()
    )
    return log_allocations(stats.counts, prior.concentration) + log_density.sum(-1)


def log_predictive(stats: Stats, prior: Prior, x: Tensor) -> Tensor:
    """Return log p(x, z = k | rows so far), (..., K), of one more row, the parameters integrated out.

    Student's law of all features together.

    Args:
        stats: those of the rows so far, each in one component, behind any leading dimensions.
        prior: the prior.
        x: (..., D), the row.
    """
    after = posterior(stats, prior)
    squares = (x[..., None, :] - after.loc).square().sum(-1)
    log_density = log_student(squares, x.shape[-1], after.shape, after.rate, after.strength)
    return log_urn(stats.counts, prior.concentration) + log_density


def sample(params: Params, num_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ``num_samples`` draws x (n, D) and the components z (n,) that they came from."""
    z = torch.multinomial(params.weights, num_samples, replacement=True, generator=generator)
    locs = params.locs
    noise = torch.randn(num_samples, locs.shape[-1], generator=generator, dtype=locs.dtype, device=locs.device)
    return noise.mul(params.variances.sqrt().index_select(0, z)[:, None]).add_(locs.index_select(0, z)), z


def moments(params: Params) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and the covariance (D, D) of one observation."""
    mean = params.weights @ params.locs
    deviations = params.locs - mean
    between = (params.weights[:, None] * deviations).mT @ deviations
    return mean, between + (params.weights @ params.variances) * torch.eye(
        len(mean), dtype=mean.dtype, device=mean.device
    )


def init_params(
    x: Tensor, num_components: int, generator: torch.Generator, method: str = "k-means++", weights: Tensor | None = None
) -> Params:
    """Return a start for EM: shares and means of a partition of x (N, D), and its variance within the parts for all.

    One pseudo-observation with the variance of all the data keeps the start regular where a part has a single row.
    Rows count as often as their weights (N,) say; None counts each once.
    """
    resp = partition(x, num_components, generator, method, weights)
    x, weights = counted_rows(x, weights)
    parts = resp * weights[:, None]
    counts, total = parts.sum(0), weights.sum()
    locs = (parts.mT @ x) / counts.where(counts > 0, 1)[:, None]
    centred = x - weights @ x / total
    squares = weights @ (x - resp @ locs).square() + weights @ centred.square() / total
    within = squares.mean() / (total + 1)
    return Params((counts + 1) / (counts + 1).sum(), locs, within.expand(num_components).clone())


def weakly_informative_prior(x: Tensor, num_components: int) -> Prior:
    """Return a proper prior on the scale of rows x (N, D), as ``DataScale`` says; mean variance tr S / (D K^(2 / D)).

    Raises:
        TypeError, ValueError: as ``data_scale``.
    """
    loc, covariance, shrinkage = data_scale(x, num_components)
    rate = covariance.diagonal().mean() * shrinkage / 2
    return Prior(loc.new_ones(num_components), loc, loc.new_tensor(0.01), torch.full_like(rate, 1.5), rate)
