r"""The sum of two independent Gaussian mixtures, itself a mixture of K_x K_y Gaussians (problem 7 of the sheet).

.. math::
    k_n \sim \mathrm{Cat}(\pi^x), \quad l_n \sim \mathrm{Cat}(\pi^y), \quad s_n = x_n + y_n, \quad
    x_n \mid k_n = k \sim \mathcal{N}(\mu^x_k, \Sigma^x_k), \quad
    y_n \mid l_n = l \sim \mathcal{N}(\mu^y_l, \Sigma^y_l)

.. math::
    p(s_n) = \sum_{k,l} \pi^x_k \pi^y_l \, \mathcal{N}(s_n \mid \mu^x_k + \mu^y_l, \Sigma^x_k + \Sigma^y_l)

Only the sum is observed; the sheet calls it z, and the contract's data argument ``x`` is it. The module is the family
in which both parts are learnt; ``KnownNoise(noise)`` is the one in which y is known measurement noise, and its EM for x
alone is extreme deconvolution (Bovy, Hogg and Roweis 2011, Annals of Applied Statistics 5(2), section 3). With both
parts learnt only the sum is identified: a shift of all x_locs against all y_locs, and covariance moved from one part to
the other, leave its density as it is.

Sizes: N observations, D features, K_x and K_y components; a pair (k, l) is column k K_y + l of the (N, K_x K_y) tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.models import gaussian_full
from mixproof.models.conjugate import draw_normal
from mixproof.models.initial import check_num_components
from mixproof.models.positive_definite import InverseWishart, cholesky


class Params(NamedTuple):
    x_weights: Tensor  # (K_x,)
    x_locs: Tensor  # (K_x, D)
    x_covariances: Tensor  # (K_x, D, D)
    y_weights: Tensor  # (K_y,)
    y_locs: Tensor  # (K_y, D)
    y_covariances: Tensor  # (K_y, D, D)


class Prior(NamedTuple):
    """The prior of each part, conjugate given both latents and both summands."""

    x: gaussian_full.Prior
    y: gaussian_full.Prior


class Stats(NamedTuple):
    """Expected statistics of the unseen summands; additive over rows."""

    x: gaussian_full.Stats
    y: gaussian_full.Stats


additive = True  # statistics of chunks of rows add up


def model(
    x: Tensor | None = None,
    *,
    num_components: tuple[int, int],
    prior: Prior | None = None,
    num_data: int | None = None,
    num_features: int | None = None,
) -> Tensor:
    """Draw both parts' parameters, then rows from the collapsed mixture of K_x K_y Gaussians; x (N, D) is the sum."""
    num_data, num_features = (num_data, num_features) if x is None else x.shape
    x_weights, x_locs, x_covariances = _draw_part("x", num_components[0], prior and prior.x, num_features)
    y_weights, y_locs, y_covariances = _draw_part("y", num_components[1], prior and prior.y, num_features)
    with pyro.plate("data", num_data):
        k = pyro.sample("k", dist.Categorical(x_weights), infer={"enumerate": "parallel"})
        l = pyro.sample("l", dist.Categorical(y_weights), infer={"enumerate": "parallel"})
        component = dist.MultivariateNormal(x_locs[k] + y_locs[l], x_covariances[k] + y_covariances[l])
        return pyro.sample("x", component, obs=x)


def generative_model(
    *, num_components: tuple[int, int], prior: Prior | None = None, num_data: int, num_features: int | None = None
) -> Tensor:
    """Draw both parts' parameters, then a row of each, sites ``x_part`` and ``y_part``, and return the sums (N, D)."""
    x_weights, x_locs, x_covariances = _draw_part("x", num_components[0], prior and prior.x, num_features)
    y_weights, y_locs, y_covariances = _draw_part("y", num_components[1], prior and prior.y, num_features)
    with pyro.plate("data", num_data):
        k = pyro.sample("k", dist.Categorical(x_weights), infer={"enumerate": "parallel"})
        l = pyro.sample("l", dist.Categorical(y_weights), infer={"enumerate": "parallel"})
        x_part = pyro.sample("x_part", dist.MultivariateNormal(x_locs[k], x_covariances[k]))
        y_part = pyro.sample("y_part", dist.MultivariateNormal(y_locs[l], y_covariances[l]))
        return pyro.deterministic("x", x_part + y_part, event_dim=1)


def _draw_part(
    part: str, num_components: int, prior: gaussian_full.Prior | None, num_features: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    if prior is None:
        weights = pyro.sample(f"{part}_weights", dist.ImproperUniform(constraints.simplex, (), (num_components,)))
        with pyro.plate(f"{part}_components", num_components):
            locs = pyro.sample(f"{part}_locs", dist.ImproperUniform(constraints.real_vector, (), (num_features,)))
            covariances = pyro.sample(
                f"{part}_covariances",
                dist.ImproperUniform(constraints.positive_definite, (), (num_features, num_features)),
            )
    else:
        weights = pyro.sample(f"{part}_weights", dist.Dirichlet(prior.concentration))
        with pyro.plate(f"{part}_components", num_components):
            covariances = pyro.sample(f"{part}_covariances", InverseWishart(prior.df, prior.scale))
            locs = pyro.sample(f"{part}_locs", dist.MultivariateNormal(prior.loc, covariances / prior.strength))
    return weights, locs, covariances


def parts(params: Params) -> tuple[gaussian_full.Params, gaussian_full.Params]:
    """Return the two mixtures whose draws are added."""
    return gaussian_full.Params(*params[:3]), gaussian_full.Params(*params[3:])


def collapse(x_part: gaussian_full.Params, y_part: gaussian_full.Params) -> gaussian_full.Params:
    """Return the mixture of K_x K_y Gaussians that is the law of the sum."""
    weights = x_part.weights[..., :, None] * y_part.weights[..., None, :]
    locs = x_part.locs[..., :, None, :] + y_part.locs[..., None, :, :]
    covariances = x_part.covariances[..., :, None, :, :] + y_part.covariances[..., None, :, :, :]
    return gaussian_full.Params(weights.flatten(-2), locs.flatten(-3, -2), covariances.flatten(-4, -3))


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, k_n = k, l_n = l), shape (N, K_x K_y)."""
    return gaussian_full.log_joint(collapse(*parts(params)), x)


def statistics(params: Params, x: Tensor, resp: Tensor) -> Stats:
    """Return the expected statistics of both summands of rows x (N, D) under responsibilities (N, K_x K_y)."""
    x_part, y_part = parts(params)
    pairs = resp.unflatten(-1, (x_part.weights.shape[-1], y_part.weights.shape[-1]))
    return Stats(_summand_statistics(x_part, y_part, x, pairs), _summand_statistics(y_part, x_part, x, pairs.mT))


def _summand_statistics(
    part: gaussian_full.Params, other: gaussian_full.Params, x: Tensor, resp: Tensor
) -> gaussian_full.Stats:
    """Return the statistics of one summand u = x - v given the sum x (N, D) and resp (N, K, L).

    Given its pair, u is Gaussian with mean m_k + G (x - m_k - m_l) and covariance S_k - G S_k, G = S_k (S_k + S_l)^-1
    (Bovy, Hogg and Roweis 2011, equation 13).
    """
    covariances = part.covariances[..., :, None, :, :]
    factors = cholesky(covariances + other.covariances[..., None, :, :, :])  # (K, L, D, D)
    gains = torch.cholesky_solve(covariances.expand_as(factors), factors).mT
    residuals = x - (part.locs[..., :, None, :] + other.locs[..., None, :, :])[..., None, :]  # (K, L, N, D)
    deviations = residuals @ gains.mT  # E[u | x, k, l] - m_k
    weights = resp.movedim(-3, -1)  # (K, L, N)
    counts = weights.sum(-1)
    weighted = weights[..., None] * deviations
    shifts = weighted.sum((-3, -2))
    remaining = counts[..., None, None] * (covariances - gains @ covariances)
    scatters = (weighted.mT @ deviations + remaining).sum(-3)
    counts = counts.sum(-1)
    return gaussian_full.Stats(counts, counts[..., None] * part.locs + shifts, shifts, scatters)


def log_joint_observed(params: Params, x: Tensor) -> Tensor:
    """Return log p(observed part of x_n, k_n = k, l_n = l), shape (N, K_x K_y), with NaN in x for what is missing."""
    return gaussian_full.log_joint_observed(collapse(*parts(params)), x)


def statistics_observed(params: Params, x: Tensor, resp: Tensor) -> Stats:
    """Return the expected statistics of both summands given what is observed, under responsibilities (N, K_x K_y)."""
    _, pairs, back = reduction(params)
    return back(gaussian_full.statistics_observed(pairs, x, resp))


def reduction(
    params: Params,
) -> tuple[ModuleType, gaussian_full.Params, Callable[[gaussian_full.Stats], Stats]]:
    """Return the collapsed mixture, and how its statistics give those of both summands."""
    x_part, y_part = parts(params)

    def back(pairs: gaussian_full.Stats) -> Stats:
        counts, shifts, scatters = _by_pair(pairs, x_part, y_part)
        return Stats(
            _summand_of_pairs(x_part, y_part, counts, shifts, scatters),
            _summand_of_pairs(y_part, x_part, counts.mT, shifts.transpose(-3, -2), scatters.transpose(-4, -3)),
        )

    return gaussian_full, collapse(x_part, y_part), back


def _by_pair(
    pairs: gaussian_full.Stats, part: gaussian_full.Params, other: gaussian_full.Params
) -> tuple[Tensor, Tensor, Tensor]:
    """Return counts (K, L), shifts (K, L, D) and scatters (K, L, D, D) of the collapsed mixture's K L components."""
    sizes = part.weights.shape[-1], other.weights.shape[-1]
    return pairs.counts.unflatten(-1, sizes), pairs.shifts.unflatten(-2, sizes), pairs.scatters.unflatten(-3, sizes)


def _summand_of_pairs(
    part: gaussian_full.Params, other: gaussian_full.Params, counts: Tensor, shifts: Tensor, scatters: Tensor
) -> gaussian_full.Stats:
    """Return the statistics of one summand from the expected ones of the sum for each pair, (K, L) and more.

    The moments of the summand given the sum are linear and quadratic in the sum, so that those of the sum given its
    observed part are enough: the law of total expectation (Bovy, Hogg and Roweis 2011, equation 13, for the former).
    """
    covariances = part.covariances[..., :, None, :, :]
    factors = cholesky(covariances + other.covariances[..., None, :, :, :])  # (K, L, D, D)
    gains = torch.cholesky_solve(covariances.expand_as(factors), factors).mT
    remaining = counts[..., None, None] * (covariances - gains @ covariances)
    counts = counts.sum(-1)
    shifts = (gains @ shifts[..., None]).squeeze(-1).sum(-2)
    scatters = (gains @ scatters @ gains.mT + remaining).sum(-3)
    scatters = (scatters + scatters.mT) / 2  # EM would otherwise raise an asymmetry of rounding step by step
    return gaussian_full.Stats(counts, counts[..., None] * part.locs + shifts, shifts, scatters)


def recentre(stats: Stats, old: Params, new: Params) -> Stats:
    """Return the statistics about the locs of new parameters, given those about the locs of old ones."""
    return Stats(*map(gaussian_full.recentre, stats, parts(old), parts(new)))


def m_step(stats: Stats, prior: Prior | None = None) -> Params:
    """Return the parameters that maximise the expected log density of latents and summands, plus log prior if given."""
    return Params(*gaussian_full.m_step(stats.x, prior and prior.x), *gaussian_full.m_step(stats.y, prior and prior.y))


def log_prior(params: Params, prior: Prior) -> Tensor:
    """Return the log density of the prior at the parameters, a number ()."""
    x_part, y_part = parts(params)
    return gaussian_full.log_prior(x_part, prior.x) + gaussian_full.log_prior(y_part, prior.y)


def draw(params: Params, stats: Stats, prior: Prior, generator: torch.Generator) -> Params:
    """Return a draw from p(params | summands, k, l), each part by ``gaussian_full``; of no rows, from the prior.

    Args:
        params: the parameters about whose locs the statistics are; the draw does not depend on them otherwise.
        stats: those of all rows, as from ``draw_statistics``; leading dimensions are chains.
        prior: the prior.
        generator: the only source of randomness.
    """
    x_part, y_part = parts(params)
    drawn = gaussian_full.draw(x_part, stats.x, prior.x, generator)
    return Params(*drawn, *gaussian_full.draw(y_part, stats.y, prior.y, generator))


def draw_statistics(params: Params, x: Tensor, resp: Tensor, generator: torch.Generator) -> Stats:
    """Return the statistics of summands drawn from p(summands | x, k, l, params).

    Args:
        params: leading dimensions are chains.
        x: (N, D), the sums.
        resp: (N, K_x K_y), 1 where the row's pair is and 0 elsewhere, behind the same leading dimensions.
        generator: the only source of randomness.
    """
    x_part, y_part = parts(params)
    pairs = resp.unflatten(-1, (x_part.weights.shape[-1], y_part.weights.shape[-1]))
    summand = _draw_summand(x_part, y_part, x, pairs, generator)
    return Stats(
        _statistics_of_summand(x_part, summand, pairs.sum(-1)),
        _statistics_of_summand(y_part, x - summand, pairs.sum(-2)),
    )


def _draw_summand(
    part: gaussian_full.Params, other: gaussian_full.Params, x: Tensor, pairs: Tensor, generator: torch.Generator
) -> Tensor:
    """Return u (N, D) drawn from p(u | u + v = x), v of the other part, each row in the pair (N, K, L) given.

    Draw u and v from their own laws and move u by what the sum lacks, times the gain (Matheron's rule; Doucet 2010, A
    note on efficient conditional simulation of Gaussian distributions).
    """
    own, others = pairs.sum(-1), pairs.sum(-2)
    u, v = (_draw_rows(side, labels, generator) for side, labels in ((part, own), (other, others)))
    covariances = part.covariances[..., :, None, :, :]
    factors = cholesky(covariances + other.covariances[..., None, :, :, :])  # (K, L, D, D)
    gains = torch.cholesky_solve(covariances.expand_as(factors), factors).mT
    gains_of_rows = (pairs.flatten(-2) @ gains.flatten(-4, -3).flatten(-2)).unflatten(-1, gains.shape[-2:])
    return u + (gains_of_rows @ (x - u - v)[..., None]).squeeze(-1)


def _draw_rows(part: gaussian_full.Params, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return rows (N, D) drawn each from its component, given by labels (N, K) of 0 and 1."""
    locs = labels @ part.locs
    factors = (labels @ cholesky(part.covariances).flatten(-2)).unflatten(-1, part.covariances.shape[-2:])
    return locs + (factors @ draw_normal(locs, generator)[..., None]).squeeze(-1)


def _statistics_of_summand(part: gaussian_full.Params, u: Tensor, labels: Tensor) -> gaussian_full.Stats:
    """Return the statistics of rows u (N, D), each in the component that labels (N, K) of 0 and 1 give."""
    deviations = u - labels @ part.locs
    weighted = labels.mT[..., None] * deviations[..., None, :, :]  # (K, N, D)
    scatters = weighted.mT @ deviations[..., None, :, :]
    return gaussian_full.Stats(labels.sum(-2), labels.mT @ u, weighted.sum(-2), scatters)


def sample(params: Params, num_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ``num_samples`` sums x (n, D) of a draw from each part, and their pairs z (n,), numbered k K_y + l."""
    x_part, y_part = parts(params)
    x, k = gaussian_full.sample(x_part, num_samples, generator)
    y, l = gaussian_full.sample(y_part, num_samples, generator)
    return x + y, k * y_part.weights.shape[-1] + l


def moments(params: Params) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and the covariance (D, D) of the sum: those of the independent parts add."""
    (x_mean, x_covariance), (y_mean, y_covariance) = map(gaussian_full.moments, parts(params))
    return x_mean + y_mean, x_covariance + y_covariance


def init_params(
    x: Tensor,
    num_components: tuple[int, int],
    generator: torch.Generator,
    method: str = "k-means++",
    weights: Tensor | None = None,
) -> Params:
    """Return a start for EM: x explains the data by a partition of x (N, D), and y spreads each part about 0.

    Both take half the covariance within the parts; the locations of y are drawn from that normal law.
    Rows count as often as their weights (N,) say; None counts each once.
    """
    if not isinstance(num_components, tuple) or len(num_components) != 2:
        raise TypeError(f"the number of components must be a pair (K_x, K_y), not {num_components!r}")
    start = gaussian_full.init_params(x, num_components[0], generator, method, weights)
    check_num_components(num_components[1], len(x))
    half = start.covariances[0] / 2
    noise = torch.randn(num_components[1], x.shape[1], generator=generator, dtype=x.dtype, device=x.device)
    y_locs = noise @ cholesky(half).mT
    y_weights = torch.full_like(y_locs[:, 0], 1 / num_components[1])
    covariances = half.expand(num_components[1], -1, -1).clone()
    return Params(start.weights, start.locs, start.covariances / 2, y_weights, y_locs, covariances)


@dataclass(frozen=True)
class KnownNoise:
    """The family in which y is known: the law of noise added to x. Its parameters are those of x alone."""

    noise: gaussian_full.Params  # weights (K_y,), locs (K_y, D), covariances (K_y, D, D)

    Params: ClassVar = gaussian_full.Params
    Prior: ClassVar = gaussian_full.Prior
    Stats: ClassVar = gaussian_full.Stats
    additive: ClassVar = True

    def __post_init__(self) -> None:
        weights, locs, covariances = self.noise
        if locs.shape != (*weights.shape, locs.shape[-1]) or covariances.shape != (*locs.shape, locs.shape[-1]):
            raise ValueError(
                "the noise needs weights (K,), locs (K, D) and covariances (K, D, D), and has shapes "
                f"{', '.join(str(tuple(value.shape)) for value in self.noise)}"
            )
        if not constraints.simplex.check(weights):
            raise ValueError(f"the weights of the noise must be a probability vector, not {weights.tolist()}")
        if not (torch.isfinite(locs).all() and constraints.positive_definite.check(covariances).all()):
            raise ValueError("the noise needs finite locs and symmetric positive definite covariances")

    def _noise_like(self, value: Tensor) -> gaussian_full.Params:
        """Return the noise in the type and on the device of a tensor."""
        return gaussian_full.Params(*(part.to(value) for part in self.noise))

    def _check_num_features(self, num_features: int | None) -> int:
        """Return D of the noise, or raise where another is asked for."""
        own = self.noise.locs.shape[-1]
        if num_features not in (None, own):
            raise ValueError(f"the noise has {own} features, not {num_features}")
        return own

    def model(
        self,
        x: Tensor | None = None,
        *,
        num_components: int,
        prior: gaussian_full.Prior | None = None,
        num_data: int | None = None,
        num_features: int | None = None,
    ) -> Tensor:
        """Draw the parameters of x, then each row of x (N, D) plus noise from the collapsed mixture."""
        num_data, num_features = (num_data, num_features) if x is None else x.shape
        num_features = self._check_num_features(num_features)
        if prior is None:
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
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            l = pyro.sample("l", dist.Categorical(self.noise.weights), infer={"enumerate": "parallel"})
            component = dist.MultivariateNormal(
                locs[k] + self.noise.locs[l], covariances[k] + self.noise.covariances[l]
            )
            return pyro.sample("x", component, obs=x)

    def log_joint(self, params: gaussian_full.Params, x: Tensor) -> Tensor:
        """Return log p(x_n, k_n = k, l_n = l), shape (N, K_x K_y)."""
        return gaussian_full.log_joint(collapse(params, self._noise_like(params.locs)), x)

    def statistics(self, params: gaussian_full.Params, x: Tensor, resp: Tensor) -> gaussian_full.Stats:
        """Return the expected statistics of x before the noise under responsibilities (N, K_x K_y)."""
        pairs = resp.unflatten(-1, (params.weights.shape[-1], self.noise.weights.shape[-1]))
        return _summand_statistics(params, self._noise_like(params.locs), x, pairs)

    def log_joint_observed(self, params: gaussian_full.Params, x: Tensor) -> Tensor:
        """Return log p(observed part of x_n, k_n = k, l_n = l), shape (N, K_x K_y), with NaN in x for the missing."""
        return gaussian_full.log_joint_observed(collapse(params, self._noise_like(params.locs)), x)

    def statistics_observed(self, params: gaussian_full.Params, x: Tensor, resp: Tensor) -> gaussian_full.Stats:
        """Return the expected statistics of x before the noise given what is observed, under (N, K_x K_y) resp."""
        _, pairs, back = self.reduction(params)
        return back(gaussian_full.statistics_observed(pairs, x, resp))

    def reduction(
        self, params: gaussian_full.Params
    ) -> tuple[ModuleType, gaussian_full.Params, Callable[[gaussian_full.Stats], gaussian_full.Stats]]:
        """Return the collapsed mixture, and how its statistics give those of x before the noise."""

        noise = self._noise_like(params.locs)

        def back(pairs: gaussian_full.Stats) -> gaussian_full.Stats:
            return _summand_of_pairs(params, noise, *_by_pair(pairs, params, noise))

        return gaussian_full, collapse(params, noise), back

    def recentre(
        self, stats: gaussian_full.Stats, old: gaussian_full.Params, new: gaussian_full.Params
    ) -> gaussian_full.Stats:
        """Return the statistics about the locs of new parameters, given those about the locs of old ones."""
        return gaussian_full.recentre(stats, old, new)

    def m_step(self, stats: gaussian_full.Stats, prior: gaussian_full.Prior | None = None) -> gaussian_full.Params:
        """Return the parameters of x that maximise the expected log density of x and k, plus log prior if given."""
        return gaussian_full.m_step(stats, prior)

    def log_prior(self, params: gaussian_full.Params, prior: gaussian_full.Prior) -> Tensor:
        """Return the log density of the prior at the parameters, a number ()."""
        return gaussian_full.log_prior(params, prior)

    def draw(
        self,
        params: gaussian_full.Params,
        stats: gaussian_full.Stats,
        prior: gaussian_full.Prior,
        generator: torch.Generator,
    ) -> gaussian_full.Params:
        """Return a draw from p(params | x before the noise, k), by ``gaussian_full``; of no rows, from the prior."""
        return gaussian_full.draw(params, stats, prior, generator)

    def draw_statistics(
        self, params: gaussian_full.Params, x: Tensor, resp: Tensor, generator: torch.Generator
    ) -> gaussian_full.Stats:
        """Return the statistics of x before the noise, drawn given rows (N, D) and pairs (N, K_x K_y) of 0 and 1."""
        noise = self._noise_like(params.locs)
        pairs = resp.unflatten(-1, (params.weights.shape[-1], noise.weights.shape[-1]))
        return _statistics_of_summand(params, _draw_summand(params, noise, x, pairs, generator), pairs.sum(-1))

    def sample(
        self, params: gaussian_full.Params, num_samples: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return ``num_samples`` draws of x plus noise (n, D), and their pairs z (n,), numbered k K_y + l."""
        return sample(Params(*params, *self._noise_like(params.locs)), num_samples, generator)

    def moments(self, params: gaussian_full.Params) -> tuple[Tensor, Tensor]:
        """Return the mean (D,) and the covariance (D, D) of x plus noise."""
        return moments(Params(*params, *self._noise_like(params.locs)))

    def init_params(
        self,
        x: Tensor,
        num_components: int,
        generator: torch.Generator,
        method: str = "k-means++",
        weights: Tensor | None = None,
    ) -> gaussian_full.Params:
        """Return a start for EM: the partition of the noisy rows x (N, D), weighted (N,), without their mean noise."""
        start = gaussian_full.init_params(x, num_components, generator, method, weights)
        self._check_num_features(x.shape[1])
        return start._replace(locs=start.locs - gaussian_full.moments(self._noise_like(start.locs))[0])

    def weakly_informative_prior(self, x: Tensor, num_components: int) -> gaussian_full.Prior:
        """Return a proper prior for x on the scale of the sums (N, D), which bounds its own, less the noise's mean.

        Raises:
            TypeError, ValueError: as ``data_scale``.
        """
        prior = gaussian_full.weakly_informative_prior(x, num_components)
        return prior._replace(loc=prior.loc - gaussian_full.moments(self._noise_like(prior.loc))[0])
