r"""Mixture of Gaussians, each component with its own full covariance matrix (problems 2, 3 and 5 of the sheet).

.. math::
    z_n \sim \mathrm{Cat}(\pi), \qquad x_n \mid z_n = k \sim \mathcal{N}(\mu_k, \Sigma_k), \qquad
    p(x_n) = \sum_k \pi_k \, \mathcal{N}(x_n \mid \mu_k, \Sigma_k)

Sizes: N observations, D features, K components. EM: Bishop, Pattern Recognition and Machine Learning, section 9.2.2.
The conjugate prior is Dirichlet on the weights and normal-inverse-Wishart on each component (Fraley and Raftery 2007,
section 2).
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
    covariances: Tensor  # (K, D, D)


class Prior(NamedTuple):
    """weights ~ Dirichlet(concentration), covariances ~ InverseWishart(df, scale).

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
    scatters: Tensor  # (K, D, D), of r (x - loc)(x - loc)^T


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
            covariances = pyro.sample(
                "covariances",
                dist.ImproperUniform(constraints.positive_definite, (), (num_features, num_features)),
            )
    else:
        weights = pyro.sample("weights", dist.Dirichlet(prior.concentration))
        with pyro.plate("components", num_components):
            covariances = pyro.sample("covariances", InverseWishart(prior.df, prior.scale))
            locs = pyro.sample("locs", dist.MultivariateNormal(prior.loc, covariances / prior.strength))
    with pyro.plate("data", num_data):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        return pyro.sample("x", dist.MultivariateNormal(locs[z], covariances[z]), obs=x)


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), shape (N, K)."""
    factors = cholesky(params.covariances)
    deviations = x.mT - params.locs[..., None]  # (K, D, N)
    mahalanobis = torch.linalg.solve_triangular(factors, deviations, upper=False).square().sum(-2)
    log_normal = -(x.shape[-1] * math.log(2 * math.pi) + log_det(factors)[..., None] + mahalanobis) / 2
    return params.weights.log() + log_normal.mT


def statistics(params: Params, x: Tensor, resp: Tensor) -> Stats:
    """Return the sufficient statistics of rows x (N, D) under responsibilities (N, K)."""
    deviations = x - params.locs[..., None, :]  # (K, N, D)
    weighted = resp.mT[..., None] * deviations
    return Stats(resp.sum(-2), resp.mT @ x, weighted.sum(-2), weighted.mT @ deviations)


def log_joint_observed(params: Params, x: Tensor) -> Tensor:
    """Return log p(observed part of x_n, z_n = k), shape (N, K), with NaN in x (N, D) for what is missing."""
    groups = patterns(x)
    tables = [log_joint(marginal(params, observed), x[rows][:, observed]) for rows, observed in groups]
    return in_row_order(tables, groups)


def marginal(params: Params, features: Tensor) -> Params:
    """Return the law of some features, given by their numbers (m,): a mixture of the same kind."""
    covariances = params.covariances[..., features[:, None], features]
    return Params(params.weights, params.locs[..., features], covariances)


def statistics_observed(params: Params, x: Tensor, resp: Tensor) -> Stats:
    """Return the expected statistics of rows x (N, D) given what is observed, under responsibilities (N, K)."""
    deviations, remaining = expected_deviations(params.locs, params.covariances, x, resp)
    completed = torch.where(x.isnan(), params.locs[..., None, :] + deviations, x)
    weights = resp.mT[..., None]
    weighted = weights * deviations
    scatters = weighted.mT @ deviations + remaining
    return Stats(resp.sum(-2), (weights * completed).sum(-2), weighted.sum(-2), scatters)


def recentre(stats: Stats, old: Params, new: Params) -> Stats:
    """Return the statistics about the locs of new parameters, given those about the locs of old ones."""
    moves = old.locs - new.locs
    shifts = stats.shifts + stats.counts[..., None] * moves
    cross = stats.shifts[..., :, None] * moves[..., None, :]
    scatters = stats.scatters + cross + cross.mT + stats.counts[..., None, None] * outer(moves)
    return stats._replace(shifts=shifts, scatters=scatters)


def features(x: Tensor, center: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the products of x - center with itself, x - center and ones, (..., P, N), for rows x (..., N, D).

    Of the symmetric matrix of products, the blocks on and above the diagonal are kept.
    """
    *batch, num_rows, size = x.shape
    bands = _bands_of_features(size)
    num_products = sum((end - start) * (size - start) for start, end in bands)
    result = x.new_empty(*batch, num_products + size + 1, num_rows) if out is None else out
    result[..., -1, :] = 1
    centred = torch.sub(x.mT, center[:, None], out=result[..., num_products:-1, :])
    first = 0
    for start, end in bands:
        last = first + (end - start) * (size - start)
        products = result[..., first:last, :].unflatten(-2, (end - start, size - start))
        torch.mul(centred[..., start:end, None, :], centred[..., None, start:, :], out=products)
        first = last
    return result


def _bands(size: int, width: int) -> list[tuple[int, int]]:
    """Return the first row and the end of each band of rows of a matrix."""
    return [(start, min(start + width, size)) for start in range(0, size, width)]


def _bands_of_features(size: int) -> list[tuple[int, int]]:
    """Return at most eight bands: few operations, on little more than half of the matrix."""
    return _bands(size, math.ceil(size / 8))


def natural(params: Params, center: Tensor) -> Tensor:
    """Return the coefficients (K, P) of the features in log p(x_n, z_n = k)."""
    whitening, constant = _whitening(params)
    precisions = whitening.mT @ whitening
    locs = (params.locs - center)[..., None]
    linear = (precisions @ locs)[..., 0]
    constant = constant - (whitening @ locs).square().sum((-2, -1)) / 2
    quadratic = []
    for start, end in _bands_of_features(center.shape[-1]):
        band = -precisions[:, start:end, start:]
        band[..., : end - start] /= 2  # both halves of a block on the diagonal are there
        quadratic.append(band.flatten(1))
    return torch.cat([*quadratic, linear, constant[:, None]], -1)


def _whitening(params: Params) -> tuple[Tensor, Tensor]:
    """Return lower triangular W (K, D, D) with W Sigma W^T = I, and the log joint densities (K,) at the locations."""
    factors = cholesky(params.covariances)
    identity = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device).expand_as(factors)
    whitening = torch.linalg.solve_triangular(factors, identity, upper=False, left=False)
    return whitening, params.weights.log() - (factors.shape[-1] * math.log(2 * math.pi) + log_det(factors)) / 2


def reach(params: Params, center: Tensor) -> Tensor:
    """Return no less than the root mean squares (K, D) of x - center in each component."""
    return (params.locs - center).abs() + params.covariances.diagonal(dim1=-2, dim2=-1).sqrt()


def statistics_of(moments: Tensor, params: Params, center: Tensor) -> Stats:
    """Return the sufficient statistics from the sums of features times responsibilities, shape (P, K)."""
    size = center.shape[-1]
    counts, sums = moments[-1], moments[-1 - size : -1].mT
    products = moments.new_empty(len(counts), size, size)
    first = 0
    for start, end in _bands_of_features(size):
        last = first + (end - start) * (size - start)
        band = moments[first:last].mT.unflatten(-1, (end - start, size - start))
        products[:, start:end, start:] = band
        products[:, start:, start:end] = band.mT
        first = last
    locs = params.locs - center
    crossed = locs[..., :, None] * sums[..., None, :]
    scatters = products - crossed - crossed.mT + counts[:, None, None] * outer(locs)
    return Stats(counts, sums + counts[:, None] * center, sums - counts[:, None] * locs, scatters)


class _Whitened:
    """A pass in deviations: loses to a center far away what rounding the data there loses, and no more.

    Whitened deviations come from one product with all factors; in the scatters only one side is about the center. Bands
    of the factors' rows and of the scatters' columns leave out most of what is zero or known by symmetry.
    """

    def __init__(self, params: Params, center: Tensor):
        self.params, self.center = params, center
        self.locs = params.locs - center
        self.columns = self.locs.mT.contiguous()[..., None]  # (D, K, 1)
        num_components, size = self.locs.shape
        self.width = num_components * size
        self.rows, self.bands = _bands(size, 16), _bands(size, 32)
        whitening, self.constant = _whitening(params)
        affine = torch.cat([-whitening @ self.locs[..., None], whitening], -1)
        self.factors = [affine[:, start:end, : end + 1].flatten(0, 1) for start, end in self.rows]

    def table(self, x: Tensor, space: Callable[..., Tensor]) -> Tensor:
        """Return log p(x_n, z_n = k), shape (L, K, n), for rows x (L, n, D)."""
        (num_lanes, num_rows, size), num_components = x.shape, len(self.constant)
        centred = space("centred", num_lanes, 1 + size, num_rows)  # ones above x - center
        centred[:, 0] = 1
        torch.sub(x.mT, self.center[:, None], out=centred[:, 1:])
        table = space("table", num_lanes, num_components, num_rows).copy_(self.constant[:, None])
        for (start, end), factors in zip(self.rows, self.factors, strict=True):
            whitened = space("whitened", num_lanes, len(factors), num_rows)
            torch.bmm(factors.expand(num_lanes, -1, -1), centred[:, : end + 1], out=whitened)
            table.sub_(whitened.square_().view(num_lanes, num_components, end - start, num_rows).sum(2), alpha=0.5)
        return table

    def sums(self, x: Tensor, resp: Tensor, space: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """Return the sums of r, of r (x - loc) and, from each band's diagonal on, of r (x - loc)(x - center)^T.

        Their shapes are (L, K, ...).
        """
        (num_lanes, num_components, num_rows), size = resp.shape, x.shape[-1]
        centred = space("centred", num_lanes, 1 + size, num_rows)
        weighted = space("weighted", num_lanes, size, num_components, num_rows)
        torch.sub(centred[:, 1:, None], self.columns, out=weighted).mul_(resp[:, None])
        first, *others = (
            torch.bmm(weighted[:, start:].flatten(1, 2), centred[:, start + (start > 0) : end + 1].mT)
            .unflatten(1, (-1, num_components))
            .transpose(1, 2)
            for start, end in self.bands
        )
        return resp.sum(-1), first[..., 0], first[..., 1:], *others

    def sums_of(self, components: Tensor, x: Tensor, resp: Tensor, space: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """Return these sums for rows x (m, D) and responsibilities (m,), sorted by their components (m,)."""
        num_components, size = self.locs.shape
        sizes = components.bincount(minlength=num_components).tolist()
        counts = torch.stack([part.sum() for part in resp.split(sizes)])
        sums = space("sums", 1, num_components, size, 1 + size)
        for k, (rows, its) in enumerate(zip(x.split(sizes), resp.split(sizes), strict=True)):
            centred, weighted = space("own centred", len(rows), 1 + size), space("own weighted", len(rows), size)
            centred[:, 0] = 1
            torch.sub(rows, self.center, out=centred[:, 1:])
            torch.sub(centred[:, 1:], self.locs[k], out=weighted).mul_(its[:, None])
            torch.mm(weighted.mT, centred, out=sums[0, k])
        scatters = (sums[..., start:, 1 + start : 1 + end] for start, end in self.bands)
        return counts[None], sums[..., 0], *scatters

    def statistics(self, sums: tuple[Tensor, ...]) -> Stats:
        """Return the sufficient statistics from the sums over all rows."""
        counts, shifts, *bands = sums
        scatters = counts.new_empty(*shifts.shape, shifts.shape[-1])
        for (start, end), band in zip(self.bands, bands, strict=True):
            below = band - shifts[:, start:, None] * self.locs[:, None, start:end]
            scatters[:, start:, start:end] = below
            scatters[:, start:end, start:] = below.mT
        shifted = shifts + counts[:, None] * self.params.locs
        return Stats(counts, shifted, shifts, (scatters + scatters.mT) / 2)


def prepare(params: Params, center: Tensor) -> _Whitened:
    """Return what a precise pass over rows needs of the parameters."""
    return _Whitened(params, center)


def m_step(stats: Stats, prior: Prior | None = None) -> Params:
    """Return the parameters that maximise Q, or Q + log prior (problem 3 of the sheet; Fraley and Raftery 2007)."""
    counts = stats.counts[..., None]
    safe = counts.clamp_min(torch.finfo(counts.dtype).tiny)
    within = stats.scatters - outer(stats.shifts) / safe[..., None]  # scatter about the component's own mean
    if prior is None:
        return Params(
            stats.counts / stats.counts.sum(-1, keepdim=True), stats.sums / counts, within / counts[..., None]
        )
    weights = stats.counts + prior.concentration - 1
    locs = (prior.strength * prior.loc + stats.sums) / (prior.strength + counts)
    pull = outer(stats.sums - counts * prior.loc) * (prior.strength / (prior.strength + counts) / safe)[..., None]
    covariances = (prior.scale + within + pull) / (prior.df + counts + stats.sums.shape[-1] + 2)[..., None]
    return Params(weights / weights.sum(-1, keepdim=True), locs, covariances)


def log_prior(params: Params, prior: Prior) -> Tensor:
    """Return the log density of the prior at the parameters, a number ()."""
    alpha = prior.concentration
    log_dirichlet = torch.xlogy(alpha - 1, params.weights).sum(-1) + alpha.sum().lgamma() - alpha.lgamma().sum()
    factors = cholesky(params.covariances)
    deviations = (params.locs - prior.loc)[..., None]
    mahalanobis = torch.linalg.solve_triangular(factors, deviations, upper=False).square().sum((-2, -1))
    size = params.locs.shape[-1]
    log_locs = (size * (prior.strength / (2 * math.pi)).log() - log_det(factors) - prior.strength * mahalanobis) / 2
    return log_dirichlet + (log_locs + log_inverse_wishart(params.covariances, prior.df, prior.scale)).sum(-1)


def posterior(stats: Stats, prior: Prior) -> Prior:
    """Return the hyperparameters of p(params | x, z), of each component its own.

    Gelman et al., Bayesian Data Analysis, 3rd edition, section 3.6. Shapes: concentration and strength (K,), loc
    (K, D), df (K,), scale (K, D, D), behind any leading dimensions of the statistics.
    """
    counts = stats.counts[..., None]
    safe = counts.clamp_min(torch.finfo(counts.dtype).tiny)
    strength = prior.strength + counts
    within = stats.scatters - outer(stats.shifts) / safe[..., None]  # scatter about the component's own mean
    pull = outer(stats.sums - counts * prior.loc) * (prior.strength / strength / safe)[..., None]
    return Prior(
        concentration=prior.concentration + stats.counts,
        loc=(prior.strength * prior.loc + stats.sums) / strength,
        strength=strength[..., 0],
        df=prior.df + stats.counts,
        scale=prior.scale + within + pull,
    )


def draw(params: Params, stats: Stats, prior: Prior, generator: torch.Generator) -> Params:
    """Return a draw from p(params | x, z), Dirichlet and normal-inverse-Wishart; of no rows, from the prior.

    Args:
        params: the parameters about whose locs the statistics are; the draw does not depend on them otherwise.
        stats: those of all rows, each in one component; leading dimensions are chains.
        prior: the prior.
        generator: the only source of randomness.
    """
    concentration, loc, strength, df, scale = posterior(stats, prior)
    weights = draw_dirichlet(concentration, generator)
    roots = draw_inverse_wishart_root(df, scale, generator)
    deviations = (roots @ draw_normal(loc, generator)[..., None]).squeeze(-1)
    return Params(weights, loc + deviations / strength.sqrt()[..., None], roots @ roots.mT)


def log_marginal(stats: Stats, prior: Prior) -> Tensor:
    """Return log p(x, z), the parameters integrated out, for statistics of rows each in one component.

    Murphy 2007, Conjugate Bayesian analysis of the Gaussian distribution, equation 266.
    """
    size, after = stats.sums.shape[-1], posterior(stats, prior)
    log_density = (
        -stats.counts * size / 2 * math.log(math.pi)
        + torch.special.multigammaln(after.df / 2, size)
        - torch.special.multigammaln(prior.df / 2, size)
        + prior.df / 2 * log_det(cholesky(prior.scale))
        - after.df / 2 * log_det(cholesky(after.scale))
        + size / 2 * (prior.strength.log() - after.strength.log())
    )
    return log_allocations(stats.counts, prior.concentration) + log_density.sum(-1)


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
    deviations = (x[..., None, :] - after.loc)[..., None]
    squares = torch.linalg.solve_triangular(factor, deviations, upper=False).square().sum((-2, -1))
    log_density = log_student(squares, size, (after.df + 1 - size) / 2, 0.5, after.strength)
    return log_urn(stats.counts, prior.concentration) + log_density - log_det(factor) / 2


def sample(params: Params, num_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ``num_samples`` draws x (n, D) and the components z (n,) that they came from."""
    z = torch.multinomial(params.weights, num_samples, replacement=True, generator=generator)
    locs, factors = params.locs, cholesky(params.covariances)
    blocks = []
    for part in z.split(2**14):  # rows that stay in the cache, features first so that the choice runs along rows
        noise = torch.randn(locs.shape[-1], len(part), generator=generator, dtype=locs.dtype, device=locs.device)
        x = locs[0][:, None] + factors[0] @ noise
        for k in range(1, locs.shape[-2]):
            x = torch.where(part == k, locs[k][:, None] + factors[k] @ noise, x)
        blocks.append(x.mT)
    return torch.cat(blocks), z


def moments(params: Params) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and the covariance (D, D) of one observation (problem 5 of the sheet, centred)."""
    mean = params.weights @ params.locs
    between = outer(params.locs - mean)
    return mean, torch.einsum("k,kij->ij", params.weights, params.covariances + between)


def init_params(
    x: Tensor, num_components: int, generator: torch.Generator, method: str = "k-means++", weights: Tensor | None = None
) -> Params:
    """Return a start for EM: shares and means of a partition of x (N, D), and its covariance within the parts for all.

    One pseudo-observation with the covariance of all the data keeps the start regular where a part has a single row.
    Rows count as often as their weights (N,) say; None counts each once.
    """
    resp = partition(x, num_components, generator, method, weights)
    x, weights = counted_rows(x, weights)
    parts = resp * weights[:, None]
    counts, total = parts.sum(0), weights.sum()
    locs = (parts.mT @ x) / counts.where(counts > 0, 1)[:, None]
    centred = x - weights @ x / total
    residuals, weighted = x - resp @ locs, weights[:, None]
    within = (residuals.mT @ (weighted * residuals) + centred.mT @ (weighted * centred) / total) / (total + 1)
    return Params((counts + 1) / (counts + 1).sum(), locs, within.expand(num_components, -1, -1).clone())


def weakly_informative_prior(x: Tensor, num_components: int) -> Prior:
    """Return a proper prior on the scale of rows x (N, D), as ``DataScale`` says; the mean covariance is S / K^(2 / D).

    Raises:
        TypeError, ValueError: as ``data_scale``, or the covariance of the rows is singular.
    """
    loc, covariance, shrinkage = data_scale(x, num_components)
    check_regular(covariance, len(x))
    df = loc.new_tensor(x.shape[1] + 2)
    return Prior(loc.new_ones(num_components), loc, loc.new_tensor(0.01), df, covariance * shrinkage)
