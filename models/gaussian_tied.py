r"""Mixture of Gaussians that share one full covariance matrix, the generative side of linear discriminant analysis.

.. math::
    z_n \sim \mathrm{Cat}(\pi), \qquad x_n \mid z_n = k \sim \mathcal{N}(\mu_k, \Sigma)

Sizes: N observations, D features, K components. The conjugate prior is Dirichlet on the weights, inverse-Wishart on the
shared covariance and normal on each mean given it (Fraley and Raftery 2007, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.models.conjugate import data_scale, draw_dirichlet, draw_normal, log_allocations, log_student, log_urn
from mixproof.models.initial import counted_rows, partition
from mixproof.models.missing import expected_deviations, in_row_order, patterns
from mixproof.models.positive_definite import (
    InverseWishart,
    check_regular,
    cholesky,
    draw_inverse_wishart_root,
    log_det,
    log_inverse_wishart,
    outer,
)


class Params(NamedTuple):
    weights: Tensor  # (K,)
    locs: Tensor  # (K, D)
    covariance: Tensor  # (D, D)


class Prior(NamedTuple):
    """weights ~ Dirichlet(concentration), covariance ~ InverseWishart(df, scale).

    Given those, locs ~ N(loc, covariance / strength).
    """

    concentration: Tensor  # (K,)
    loc: Tensor  # (D,)
    strength: Tensor  # (), in pseudo-observations
    df: Tensor  # (), above D - 1
    scale: Tensor  # (D, D), positive definite


class Stats(NamedTuple):
    """Sums over rows, weighted by responsibilities; additive over rows. Second moments are about the current locs."""

    counts: Tensor  # (K,), of r
    sums: Tensor  # (K, D), of r x
    shifts: Tensor  # (K, D), of r (x - loc)
    scatter: Tensor  # (D, D), of r (x - loc)(x - loc)^T, over all components


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
        covariance = pyro.sample(
            "covariance", dist.ImproperUniform(constraints.positive_definite, (), (num_features, num_features))
        )
        with pyro.plate("components", num_components):
            locs = pyro.sample("locs", dist.ImproperUniform(constraints.real_vector, (), (num_features,)))
    else:
        weights = pyro.sample("weights", dist.Dirichlet(prior.concentration))
        covariance = pyro.sample("covariance", InverseWishart(prior.df, prior.scale))
        with pyro.plate("components", num_components):
            locs = pyro.sample("locs", dist.MultivariateNormal(prior.loc, covariance / prior.strength))
    with pyro.plate("data", num_data):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        return pyro.sample("x", dist.MultivariateNormal(locs[z], covariance), obs=x)


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), shape (N, K)."""
    factor = cholesky(params.covariance)
    deviations = x.mT - params.locs[..., None]  # (K, D, N)
    mahalanobis = torch.linalg.solve_triangular(factor, deviations, upper=False).square().sum(-2)
    log_normal = -(x.shape[-1] * math.log(2 * math.pi) + log_det(factor) + mahalanobis) / 2
    return params.weights.log() + log_normal.mT


def statistics(params: Params, x: Tensor, resp: Tensor) -> Stats:
    """Return the sufficient statistics of rows x (N, D) under responsibilities (N, K)."""
    deviations = x - params.locs[..., None, :]  # (K, N, D)
    weighted = resp.mT[..., None] * deviations
    return Stats(resp.sum(-2), resp.mT @ x, weighted.sum(-2), (weighted.mT @ deviations).sum(-3))


def log_joint_observed(params: Params, x: Tensor) -> Tensor:
    """Return log p(observed part of x_n, z_n = k), shape (N, K), with NaN in x (N, D) for what is missing."""
    groups = patterns(x)
    tables = [log_joint(marginal(params, observed), x[rows][:, observed]) for rows, observed in groups]
    return in_row_order(tables, groups)


def marginal(params: Params, features: Tensor) -> Params:
    """Return the law of some features, given by their numbers (m,): a mixture of the same kind."""
    return Params(params.weights, params.locs[..., features], params.covariance[..., features[:, None], features])


def statistics_observed(params: Params, x: Tensor, resp: Tensor) -> Stats:
    """Return the expected statistics of rows x (N, D) given what is observed, under responsibilities (N, K)."""
    deviations, remaining = expected_deviations(params.locs, params.covariance[..., None, :, :], x, resp)
    completed = torch.where(x.isnan(), params.locs[..., None, :] + deviations, x)
    weights = resp.mT[..., None]
    weighted = weights * deviations
    scatter = (weighted.mT @ deviations + remaining).sum(-3)
    return Stats(resp.sum(-2), (weights * completed).sum(-2), weighted.sum(-2), scatter)


def recentre(stats: Stats, old: Params, new: Params) -> Stats:
    """Return the statistics about the locs of new parameters, given those about the locs of old ones."""
    moves = old.locs - new.locs
    shifts = stats.shifts + stats.counts[..., None] * moves
    cross = (stats.shifts[..., :, None] * moves[..., None, :]).sum(-3)
    scatter = stats.scatter + cross + cross.mT + (stats.counts[..., None, None] * outer(moves)).sum(-3)
    return stats._replace(shifts=shifts, scatter=scatter)


class _Whitened:
    """A pass in deviations: loses to a center far away what rounding the data there loses, and no more.

    One factor whitens rows and locations alike, once for all components; the scatter over all components has one side
    about their own locations and the other about the center.
    """

    def __init__(self, params: Params, center: Tensor):
        self.params, self.center = params, center
        self.locs = params.locs - center
        self.columns = self.locs.mT.contiguous()[..., None]  # (D, K, 1)
        self.width = self.locs.numel()
        factor = cholesky(params.covariance)
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        self.whitening = torch.linalg.solve_triangular(factor, identity, upper=False, left=False)
        self.whitened_columns = (self.whitening @ self.columns[..., 0])[..., None]
        self.constant = params.weights.log() - (len(factor) * math.log(2 * math.pi) + log_det(factor)) / 2

    def table(self, x: Tensor, space: Callable[..., Tensor]) -> Tensor:
        """Return log p(x_n, z_n = k), shape (L, K, n), for rows x (L, n, D)."""
        (num_lanes, num_rows, size), num_components = x.shape, len(self.constant)
        centred = torch.sub(x.mT, self.center[:, None], out=space("centred", num_lanes, size, num_rows))
        whitened = space("whitened", num_lanes, size, num_rows)
        torch.bmm(self.whitening.expand(num_lanes, -1, -1), centred, out=whitened)
        deviations = space("deviations", num_lanes, size, num_components, num_rows)
        torch.sub(whitened[:, :, None], self.whitened_columns, out=deviations)
        table = torch.sum(deviations.square_(), 1, out=space("table", num_lanes, num_components, num_rows))
        return table.div_(-2).add_(self.constant[:, None])

    def sums(self, x: Tensor, resp: Tensor, space: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """Return the sums of r, of r (x - loc), and of r (x - loc)(x - center)^T over all components."""
        num_lanes, num_rows, size = x.shape
        centred = space("centred", num_lanes, size, num_rows)
        weighted = space("deviations", num_lanes, size, len(self.constant), num_rows)
        torch.sub(centred[:, :, None], self.columns, out=weighted).mul_(resp[:, None])
        return resp.sum(-1), weighted.sum(-1), torch.bmm(weighted.sum(2), centred.mT)

    def statistics(self, sums: tuple[Tensor, ...]) -> Stats:
        """Return the sufficient statistics from the sums over all rows."""
        counts, shifts, scatter = sums
        scatter = scatter - (shifts[:, None] * self.locs.mT).sum(-1)
        return Stats(counts, shifts.mT + counts[:, None] * self.params.locs, shifts.mT, (scatter + scatter.mT) / 2)


def prepare(params: Params, center: Tensor) -> _Whitened:
    """Return what a precise pass over rows needs of the parameters."""
    return _Whitened(params, center)


def m_step(stats: Stats, prior: Prior | None = None) -> Params:
    """Return the parameters that maximise Q, or Q + log prior."""
    counts = stats.counts[..., None]
    safe = counts.clamp_min(torch.finfo(counts.dtype).tiny)
    within = stats.scatter - (outer(stats.shifts) / safe[..., None]).sum(-3)  # about the components' own means
    total = stats.counts.sum(-1)
    if prior is None:
        return Params(stats.counts / total, stats.sums / counts, within / total)
    num_components, size = stats.sums.shape[-2:]
    weights = stats.counts + prior.concentration - 1
    locs = (prior.strength * prior.loc + stats.sums) / (prior.strength + counts)
    pull = outer(stats.sums - counts * prior.loc) * (prior.strength / (prior.strength + counts) / safe)[..., None]
    covariance = (prior.scale + within + pull.sum(-3)) / (prior.df + size + 1 + num_components + total)
    return Params(weights / weights.sum(-1, keepdim=True), locs, covariance)


def log_prior(params: Params, prior: Prior) -> Tensor:
    """Return the log density of the prior at the parameters, a number ()."""
    alpha = prior.concentration
    log_dirichlet = torch.xlogy(alpha - 1, params.weights).sum(-1) + alpha.sum().lgamma() - alpha.lgamma().sum()
    factor = cholesky(params.covariance)
    deviations = (params.locs - prior.loc).mT
    mahalanobis = torch.linalg.solve_triangular(factor, deviations, upper=False).square().sum(-2)
    size = params.locs.shape[-1]
    log_locs = (size * (prior.strength / (2 * math.pi)).log() - log_det(factor) - prior.strength * mahalanobis) / 2
    return log_dirichlet + log_locs.sum(-1) + log_inverse_wishart(params.covariance, prior.df, prior.scale)


def posterior(stats: Stats, prior: Prior) -> Prior:
    """Return the hyperparameters of p(params | x, z), of each component its own but for df and scale.

    Gelman et al., Bayesian Data Analysis, 3rd edition, section 3.6, with a mean for each component. Shapes:
    concentration and strength (K,), loc (K, D), df (), scale (D, D), behind any leading dimensions of the statistics.
    """
    counts = stats.counts[..., None]
    safe = counts.clamp_min(torch.finfo(counts.dtype).tiny)
    strength = prior.strength + counts
    within = stats.scatter - (outer(stats.shifts) / safe[..., None]).sum(-3)  # about the components' own means
    pull = outer(stats.sums - counts * prior.loc) * (prior.strength / strength / safe)[..., None]
    return Prior(
        concentration=prior.concentration + stats.counts,
        loc=(prior.strength * prior.loc + stats.sums) / strength,
        strength=strength[..., 0],
        df=prior.df + stats.counts.sum(-1),
        scale=prior.scale + within + pull.sum(-3),
    )


def draw(params: Params, stats: Stats, prior: Prior, generator: torch.Generator) -> Params:
    """Return a draw from p(params | x, z), Dirichlet, inverse-Wishart and normal; of no rows, from the prior.

    Args:
        params: the parameters about whose locs the statistics are; the draw does not depend on them otherwise.
        stats: those of all rows, each in one component; leading dimensions are chains.
        prior: the prior.
        generator: the only source of randomness.
    """
    concentration, loc, strength, df, scale = posterior(stats, prior)
    weights = draw_dirichlet(concentration, generator)
    root = draw_inverse_wishart_root(df, scale, generator)
    deviations = draw_normal(loc, generator) @ root.mT
    return Params(weights, loc + deviations / strength.sqrt()[..., None], root @ root.mT)


def log_marginal(stats: Stats, prior: Prior) -> Tensor:
    """Return log p(x, z), the parameters integrated out, for statistics of rows each in one component.

    Murphy 2007, Conjugate Bayesian analysis of the Gaussian distribution, equation 266, with a mean for each component.
    """
    size, after = stats.sums.shape[-1], posterior(stats, prior)
    log_density = (
        -stats.counts.sum(-1) * size / 2 * math.log(math.pi)
        + torch.special.multigammaln(after.df / 2, size)
        - torch.special.multigammaln(prior.df / 2, size)
        + prior.df / 2 * log_det(cholesky(prior.scale))
        - after.df / 2 * log_det(cholesky(after.scale))
        + size / 2 * (prior.strength.log() - after.strength.log()).sum(-1)
    )
    return log_allocations(stats.counts, prior.concentration) + log_density


def log_predictive(stats: Stats, prior: Prior, x: Tensor) -> Tensor:
    """Return log p(x, z = k | rows so far), (..., K), of one more row, the parameters integrated out.

    Student's law of all features together, in coordinates in which the posterior scale is the unit matrix.

    Args:
        stats: those of the rows so far, each in one component, behind any leading dimensions.
        prior: the prior.
        x: (..., D), the row.
    """
    after, size = posterior(stats, prior), x.shape[-1]
    factor = cholesky(after.scale)
    deviations = (x[..., None, :] - after.loc).mT
    squares = torch.linalg.solve_triangular(factor, deviations, upper=False).square().sum(-2)
    log_density = log_student(squares, size, (after.df[..., None] + 1 - size) / 2, 0.5, after.strength)
    return log_urn(stats.counts, prior.concentration) + log_density - log_det(factor)[..., None] / 2


def sample(params: Params, num_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ``num_samples`` draws x (n, D) and the components z (n,) that they came from."""
    z = torch.multinomial(params.weights, num_samples, replacement=True, generator=generator)
    locs = params.locs
    noise = torch.randn(num_samples, locs.shape[-1], generator=generator, dtype=locs.dtype, device=locs.device)
    return (noise @ cholesky(params.covariance).mT).add_(locs.index_select(0, z)), z


def moments(params: Params) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and the covariance (D, D) of one observation."""
    mean = params.weights @ params.locs
    deviations = params.locs - mean
    return mean, params.covariance + (params.weights[:, None] * deviations).mT @ deviations


def init_params(
    x: Tensor, num_components: int, generator: torch.Generator, method: str = "k-means++", weights: Tensor | None = None
) -> Params:
    """Return a start for EM: shares and means of a partition of x (N, D), and its covariance within the parts.

    One pseudo-observation with the covariance of all the data keeps the start regular where every part has a single
    row. Rows count as often as their weights (N,) say; None counts each once.
    """
    resp = partition(x, num_components, generator, method, weights)
    x, weights = counted_rows(x, weights)
    parts = resp * weights[:, None]
    counts, total = parts.sum(0), weights.sum()
    locs = (parts.mT @ x) / counts.where(counts > 0, 1)[:, None]
    centred = x - weights @ x / total
    residuals, weighted = x - resp @ locs, weights[:, None]
    within = (residuals.mT @ (weighted * residuals) + centred.mT @ (weighted * centred) / total) / (total + 1)
    return Params((counts + 1) / (counts + 1).sum(), locs, within)


def weakly_informative_prior(x: Tensor, num_components: int) -> Prior:
    """Return a proper prior on the scale of rows x (N, D), as ``DataScale`` says; the mean covariance is S / K^(2 / D).

    Raises:
        TypeError, ValueError: as ``data_scale``, or the covariance of the rows is singular.
    """
    loc, covariance, shrinkage = data_scale(x, num_components)
    check_regular(covariance, len(x))
    df = loc.new_tensor(x.shape[1] + 2)
    return Prior(loc.new_ones(num_components), loc, loc.new_tensor(0.01), df, covariance * shrinkage)
