r"""Mixture of products of Laplace laws; as their scale goes to 0, EM becomes K-medians (problem 1 of the sheet).

.. math::
    z_n \sim \mathrm{Cat}(\pi), \qquad
    p(x_n \mid z_n = k) = \prod_d \frac{1}{2 b_{kd}} \exp\left(-\frac{|x_{nd} - \mu_{kd}|}{b_{kd}}\right)

Sizes: N observations, D features, K components; b is the scale, the standard deviation is b sqrt(2). The location of
the M-step is a weighted median, so it needs the data: the statistics are the rows themselves, and chunks of them are
joined, not added. The prior is Dirichlet on the weights, inverse-gamma on each scale and, given it, Laplace on each
location: in the median and in the sum of deviations it acts as ``strength`` further rows at ``loc``, which neither the
weights nor the divisor of the scales count.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.models.conjugate import data_scale, draw_dirichlet, draw_gamma, draw_uniform, log_allocations
from mixproof.models.initial import counted_rows, partition


class Params(NamedTuple):
    weights: Tensor  # (K,)
    locs: Tensor  # (K, D)
    scales: Tensor  # (K, D)


class Prior(NamedTuple):
    """weights ~ Dirichlet(concentration), scales ~ InverseGamma(shape, rate).

    Given those, locs ~ Laplace(loc, scale / strength).
    """

    concentration: Tensor  # (K,)
    loc: Tensor  # (D,)
    strength: Tensor  # (), in pseudo-observations
    shape: Tensor  # (D,)
    rate: Tensor  # (D,)


class Stats(NamedTuple):
    """The rows and their responsibilities: no sums are sufficient for a median."""

    x: Tensor  # (N, D)
    resp: Tensor  # (N, K)


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
            scales = pyro.sample("scales", dist.ImproperUniform(positive_vector, (), (num_features,)))
    else:
        weights = pyro.sample("weights", dist.Dirichlet(prior.concentration))
        with pyro.plate("components", num_components):
            scales = pyro.sample("scales", dist.InverseGamma(prior.shape, prior.rate).to_event(1))
            locs = pyro.sample("locs", dist.Laplace(prior.loc, scales / prior.strength).to_event(1))
    with pyro.plate("data", num_data):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        return pyro.sample("x", dist.Laplace(locs[z], scales[z]).to_event(1), obs=x)


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), shape (N, K)."""
    deviations = (x[..., None, :] - params.locs).abs()  # (N, K, D)
    return params.weights.log() - ((2 * params.scales).log() + deviations / params.scales).sum(-1)


def statistics(params: Params, x: Tensor, resp: Tensor) -> Stats:
    """Return the rows x (N, D) and their responsibilities (N, K)."""
    return Stats(x, resp)


def m_step(stats: Stats, prior: Prior | None = None) -> Params:
    """Return the parameters that maximise Q, or Q + log prior: weighted medians, and mean deviations about them."""
    counts = stats.resp.sum(-2)
    if prior is None:
        locs = weighted_median(stats.x, stats.resp)
        return Params(
            counts / counts.sum(-1, keepdim=True), locs, _deviations(stats.x, stats.resp, locs) / counts[..., None]
        )
    x = torch.cat([stats.x, prior.loc[None]])
    resp = torch.cat([stats.resp, prior.strength.expand(1, counts.shape[-1])])
    locs = weighted_median(x, resp)
    weights = counts + prior.concentration - 1
    scales = (prior.rate + _deviations(x, resp, locs)) / (prior.shape + 2 + counts[..., None])
    return Params(weights / weights.sum(-1, keepdim=True), locs, scales)


def _deviations(x: Tensor, resp: Tensor, locs: Tensor) -> Tensor:
    return (resp.mT[..., None] * (x - locs[..., None, :]).abs()).sum(-2)


def weighted_median(x: Tensor, resp: Tensor) -> Tensor:
    """Return the points (K, D) that minimise the weighted absolute deviations; of an interval of them, the midpoint.

    Args:
        x: (N, D).
        resp: (N, K), the weights of the rows for each of K medians, not negative.
    """
    values, order = x.sort(dim=-2)  # (N, D)
    cumulated = resp.mT[:, order].cumsum(-2)  # (K, N, D)
    half = cumulated[:, -1:] / 2
    lower = (cumulated < half).sum(-2)  # first row at which half the weight is reached
    upper = (cumulated <= half).sum(-2).clamp_max(x.shape[-2] - 1)  # first row at which it is exceeded, if there is one
    median = (values.gather(-2, lower) + values.gather(-2, upper)) / 2
    return torch.where(half[:, 0] > 0, median, torch.nan)


def log_prior(params: Params, prior: Prior) -> Tensor:
    """Return the log density of the prior at the parameters, a number ()."""
    alpha, scales = prior.concentration, params.scales
    log_dirichlet = torch.xlogy(alpha - 1, params.weights).sum(-1) + alpha.sum().lgamma() - alpha.lgamma().sum()
    log_scales = (
        prior.shape * prior.rate.log() - prior.shape.lgamma() - (prior.shape + 1) * scales.log() - prior.rate / scales
    )
    log_locs = (prior.strength / (2 * scales)).log() - prior.strength * (params.locs - prior.loc).abs() / scales
    return log_dirichlet + (log_scales + log_locs).sum((-2, -1))


class _Pieces(NamedTuple):
    """p(x, loc | z) of each component and feature, its scale integrated out: a power of a piecewise linear function.

    Given loc, the scale is inverse-gamma with shape q + 1 and rate h(loc) = rate + strength |loc - prior.loc| + sum_n
    r_n |x_n - loc|, so that loc has a density in proportion to h^-(q + 1), with kinks at the rows and at the prior's
    loc.
    """

    kinks: Tensor  # (D, N + 1), in order
    heights: Tensor  # (K, D, N + 1), h at the kinks
    slope: Tensor  # (K, D), of h to the right of all kinks; minus it to the left
    power: Tensor  # (K, D), q
    log_masses: Tensor  # (K, D, N + 2), of h^-(q + 1) left of all kinks, between each two, and right of all


def _pieces(stats: Stats, prior: Prior) -> _Pieces:
    x = torch.cat([stats.x, prior.loc[None]])
    resp = torch.cat([stats.resp, prior.strength.expand(*stats.resp.shape[:-2], 1, stats.resp.shape[-1])], -2)
    kinks, order = x.mT.sort(-1)
    weights = resp.mT[..., order]  # (K, D, N + 1)
    power = prior.shape + stats.resp.sum(-2)[..., None]
    gaps = kinks.diff(dim=-1)
    cumulated = weights.cumsum(-1)
    slope = cumulated[..., -1]
    first = (weights * (kinks - kinks[:, :1])).sum(-1, keepdim=True)
    climbs = (2 * cumulated[..., :-1] - slope[..., None]) * gaps
    heights = prior.rate[:, None] + torch.cat([first, first + climbs.cumsum(-1)], -1).clamp_min(0)
    logs = heights.log()
    change, lower = logs.diff(dim=-1).abs(), torch.minimum(logs[..., 1:], logs[..., :-1])
    q = power[..., None]
    # the mean of (h / min h)^-(q + 1) over a piece, whose ends have log h differ by ``change``
    log_mean = _log_decay(q * change) - _log_decay(change) - change
    inner = gaps.log() - (q + 1) * lower + log_mean
    tails = -q * logs[..., [0, -1]] - (q * slope[..., None]).log()
    return _Pieces(kinks, heights, slope, power, torch.cat([tails[..., :1], inner, tails[..., 1:]], -1))


def _log_decay(t: Tensor) -> Tensor:
    """Return log((1 - exp(-t)) / t) for t >= 0."""
    safe = torch.where(t > 0, t, 1)
    return torch.where(t > 0, (-torch.expm1(-safe) / safe).log(), 0)


def draw(params: Params, stats: Stats, prior: Prior, generator: torch.Generator) -> Params:
    """Return a draw from p(params | x, z); of no rows, from the prior.

    The scale integrated out, a location is drawn by inverting its distribution function piece by piece; the scale given
    it is inverse-gamma.

    Args:
        params: not looked at: the statistics are about no location.
        stats: those of all rows, each in one component; leading dimensions of ``resp`` are chains.
        prior: the prior.
        generator: the only source of randomness.
    """
    weights = draw_dirichlet(prior.concentration + stats.resp.sum(-2), generator)
    kinks, heights, slope, power, log_masses = _pieces(stats, prior)
    cumulated = log_masses.softmax(-1).cumsum(-1)
    uniform = draw_uniform(slope, generator)[..., None] * cumulated[..., -1:]
    piece = (cumulated <= uniform).sum(-1, keepdim=True).clamp_max(kinks.shape[-1])
    ends = torch.cat([piece - 1, piece], -1).clamp(0, kinks.shape[-1] - 1)  # of the piece; twice the same of a tail
    x, h = kinks.expand_as(heights).gather(-1, ends), heights.gather(-1, ends)
    low = h.argmin(-1, keepdim=True)
    x_low, h_low = x.gather(-1, low)[..., 0], h.gather(-1, low)[..., 0]
    x_high, h_high = x.gather(-1, 1 - low)[..., 0], h.gather(-1, 1 - low)[..., 0]
    # log h / h_low within the piece is exponential with rate q, cut off at the other end
    change = (h_high / h_low).log()
    is_tail = ((piece == 0) | (piece == kinks.shape[-1]))[..., 0]
    v = draw_uniform(slope, generator)
    climb = -torch.log1p(v * torch.expm1(-power * torch.where(is_tail, torch.inf, change))) / power
    inside = torch.where(change > 0, climb.expm1() / torch.where(change > 0, change, 1).expm1(), v)
    outwards = torch.where(piece[..., 0] == 0, -1, 1) * h_low * climb.expm1() / slope
    locs = torch.where(is_tail, x_low + outwards, x_low + inside * (x_high - x_low))
    scales = h_low * climb.exp() / draw_gamma((power + 1).expand_as(slope), generator)
    return Params(weights, locs, scales)


def log_marginal(stats: Stats, prior: Prior) -> Tensor:
    """Return log p(x, z), the parameters integrated out, for statistics of rows each in one component.

    The integral over the scale is a gamma function, that over the location a sum over pieces.
    """
    counts = stats.resp.sum(-2)
    pieces = _pieces(stats, prior)
    log_density = (
        (prior.strength / 2).log()
        - counts[..., None] * math.log(2)
        + prior.shape * prior.rate.log()
        - prior.shape.lgamma()
        + (pieces.power + 1).lgamma()
        + pieces.log_masses.logsumexp(-1)
    )
    return log_allocations(counts, prior.concentration) + log_density.sum((-2, -1))


def sample(params: Params, num_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ``num_samples`` draws x (n, D) and the components z (n,) that they came from."""
    z = torch.multinomial(params.weights, num_samples, replacement=True, generator=generator)
    locs = params.locs
    shape = (2, num_samples, locs.shape[-1])
    uniform = torch.rand(shape, generator=generator, dtype=locs.dtype, device=locs.device)
    logs = uniform.neg_().log1p_()  # of minus two exponentials; finite: uniform draws are below 1
    return (logs[1] - logs[0]).mul_(params.scales.index_select(0, z)).add_(locs.index_select(0, z)), z


def moments(params: Params) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and the covariance (D, D) of one observation."""
    mean = params.weights @ params.locs
    deviations = params.locs - mean
    between = (params.weights[:, None] * deviations).mT @ deviations
    return mean, between + torch.diag_embed(params.weights @ (2 * params.scales.square()))


def init_params(
    x: Tensor, num_components: int, generator: torch.Generator, method: str = "k-means++", weights: Tensor | None = None
) -> Params:
    """Return a start for EM: shares and medians of a partition of x (N, D), and its mean deviations for all.

    One pseudo-observation with the deviation of all the data keeps the start regular where a part has a single row.
    Rows count as often as their weights (N,) say; None counts each once.
    """
    resp = partition(x, num_components, generator, method, weights)
    x, weights = counted_rows(x, weights)
    parts = resp * weights[:, None]
    counts, total = parts.sum(0), weights.sum()
    locs = weighted_median(x, parts)
    centred = x - weights @ x / total
    within = (weights @ (x - resp @ locs).abs() + weights @ centred.abs() / total) / (total + 1)
    return Params((counts + 1) / (counts + 1).sum(), locs, within.expand(num_components, -1).clone())


def weakly_informative_prior(x: Tensor, num_components: int) -> Prior:
    """Return a proper prior on the scale of rows x (N, D), as ``DataScale`` says, deviations in the place of variances.

    Mean scales are the mean absolute deviations from the medians over K^(1 / D), with the smallest whole shape for
    which there is a mean; the locations scatter about the medians ten times as far as the rows of a component.

    Raises:
        TypeError, ValueError: as ``data_scale``.
    """
    _, _, shrinkage = data_scale(x, num_components)
    loc = x.median(0).values
    rate = (x - loc).abs().mean(0) * shrinkage.sqrt()
    return Prior(loc.new_ones(num_components), loc, loc.new_tensor(0.1), torch.full_like(rate, 2), rate)
