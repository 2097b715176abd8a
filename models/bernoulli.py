r"""Mixture of products of Bernoullis, for binary vectors: latent class analysis (problem 4 of the sheet).

.. math::
    z_n \sim \mathrm{Cat}(\pi), \qquad p(x_n \mid z_n = k) = \prod_d \theta_{kd}^{x_{nd}} (1 - \theta_{kd})^{1 - x_{nd}}

Sizes: N observations, D features, K components; x holds 0.0 and 1.0. The module is the family with free weights;
``UniformWeights()`` is the sheet's, with p(z = k) = 1 / K known. Bishop, Pattern Recognition and Machine Learning,
section 9.3.3. The conjugate prior is Dirichlet on the weights and beta on each probability.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.models.conjugate import draw_beta, draw_dirichlet, log_allocations, log_urn
from mixproof.models.initial import check_num_components, check_rows, partition, row_weights


class Params(NamedTuple):
    weights: Tensor  # (K,)
    probs: Tensor  # (K, D), of a one


class Prior(NamedTuple):
    """Dirichlet(concentration) on weights; probs ~ Beta(ones, zeros)."""

    concentration: Tensor  # (K,)
    ones: Tensor  # (D,)
    zeros: Tensor  # (D,)


class Stats(NamedTuple):
    """Sums over rows, weighted by responsibilities; additive over rows. Both are kept: 1 - probs must not cancel."""

    counts: Tensor  # (K,), of r
    ones: Tensor  # (K, D), of r x
    zeros: Tensor  # (K, D), of r (1 - x)


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

    Flat priors here are uniform in value, yet improper to Pyro: without ``prior``, condition the sites to generate.
    """
    if prior is None:
        weights = pyro.sample("weights", dist.ImproperUniform(constraints.simplex, (), (num_components,)))
    else:
        weights = pyro.sample("weights", dist.Dirichlet(prior.concentration))
    beta = None if prior is None else (prior.ones, prior.zeros)
    return _draw_rows(weights, x, beta, num_data, num_features)


def _draw_rows(
    weights: Tensor,
    x: Tensor | None,
    beta: tuple[Tensor, Tensor] | None,
    num_data: int | None,
    num_features: int | None,
) -> Tensor:
    num_data = num_data if x is None else x.shape[0]
    with pyro.plate("components", weights.shape[-1]):
        if beta is None:
            num_features = num_features if x is None else x.shape[1]
            unit_vector = constraints.independent(constraints.unit_interval, 1)
            probs = pyro.sample("probs", dist.ImproperUniform(unit_vector, (), (num_features,)))
        else:
            probs = pyro.sample("probs", dist.Beta(*beta).to_event(1))
    with pyro.plate("data", num_data):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        return pyro.sample("x", dist.Bernoulli(probs[z]).to_event(1), obs=x)


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), shape (N, K); -inf where a probability of exactly 0 or 1 excludes the row."""
    probs = params.probs
    never, always = (probs == 0).to(probs.dtype), (probs == 1).to(probs.dtype)
    log_ones = torch.where(probs > 0, probs, 1).log()
    log_zeros = torch.where(probs < 1, -probs, 0).log1p()
    excluded = x @ never.mT + (1 - x) @ always.mT > 0
    log_likelihood = x @ log_ones.mT + (1 - x) @ log_zeros.mT
    return params.weights.log() + torch.where(excluded, -torch.inf, log_likelihood)


def statistics(params: Params, x: Tensor, resp: Tensor) -> Stats:
    """Return the sufficient statistics of rows x (N, D) under responsibilities (N, K)."""
    return Stats(resp.sum(-2), resp.mT @ x, resp.mT @ (1 - x))


def log_joint_observed(params: Params, x: Tensor) -> Tensor:
    """Return log p(observed part of x_n, z_n = k), shape (N, K), with NaN in x (N, D) for what is missing.

    It is -inf where a probability of exactly 0 or 1 excludes the row.
    """
    probs, missing = params.probs, x.isnan()
    ones, zeros = torch.where(missing, 0, x), torch.where(missing, 0, 1 - x)
    never, always = (probs == 0).to(probs.dtype), (probs == 1).to(probs.dtype)
    log_ones = torch.where(probs > 0, probs, 1).log()
    log_zeros = torch.where(probs < 1, -probs, 0).log1p()
    excluded = ones @ never.mT + zeros @ always.mT > 0
    log_likelihood = ones @ log_ones.mT + zeros @ log_zeros.mT
    return params.weights.log() + torch.where(excluded, -torch.inf, log_likelihood)


def statistics_observed(params: Params, x: Tensor, resp: Tensor) -> Stats:
    """Return the expected statistics of rows x (N, D) given what is observed, under responsibilities (N, K)."""
    missing = x.isnan()
    ones, zeros = torch.where(missing, 0, x), torch.where(missing, 0, 1 - x)
    unseen = resp.mT @ missing.to(x.dtype)  # (K, D), of r where the feature is missing
    return Stats(resp.sum(-2), resp.mT @ ones + unseen * params.probs, resp.mT @ zeros + unseen * (1 - params.probs))


def recentre(stats: Stats, old: Params, new: Params) -> Stats:
    """Return the statistics as they are: they are about no location."""
    return stats


def m_step(stats: Stats, prior: Prior | None = None) -> Params:
    """Return the parameters that maximise Q, or Q + log prior (problem 4 of the sheet)."""
    if prior is None:
        return Params(stats.counts / stats.counts.sum(-1, keepdim=True), stats.ones / (stats.ones + stats.zeros))
    weights = stats.counts + prior.concentration - 1
    ones, zeros = stats.ones + prior.ones - 1, stats.zeros + prior.zeros - 1
    return Params(weights / weights.sum(-1, keepdim=True), ones / (ones + zeros))


def log_prior(params: Params, prior: Prior) -> Tensor:
    """Return the log density of the prior at the parameters, a number ()."""
    alpha = prior.concentration
    log_dirichlet = torch.xlogy(alpha - 1, params.weights).sum(-1) + alpha.sum().lgamma() - alpha.lgamma().sum()
    return log_dirichlet + _log_beta(params.probs, prior.ones, prior.zeros)


def _log_beta(probs: Tensor, ones: Tensor, zeros: Tensor) -> Tensor:
    log_normaliser = (ones + zeros).lgamma() - ones.lgamma() - zeros.lgamma()
    log_density = torch.xlogy(ones - 1, probs) + torch.special.xlog1py(zeros - 1, -probs)
    return (log_density + log_normaliser).sum((-2, -1))


def posterior(stats: Stats, prior: Prior) -> Prior:
    """Return the hyperparameters of p(params | x, z): concentration (K,), ones and zeros (K, D), of each component."""
    return Prior(prior.concentration + stats.counts, prior.ones + stats.ones, prior.zeros + stats.zeros)


def draw(params: Params, stats: Stats, prior: Prior, generator: torch.Generator) -> Params:
    """Return a draw from p(params | x, z), Dirichlet and beta; of no rows, from the prior.

    Args:
        params: not looked at: the statistics are about no location.
        stats: those of all rows, each in one component; leading dimensions are chains.
        prior: the prior.
        generator: the only source of randomness.
    """
    concentration, ones, zeros = posterior(stats, prior)
    return Params(draw_dirichlet(concentration, generator), draw_beta(ones, zeros, generator))


def log_marginal(stats: Stats, prior: Prior) -> Tensor:
    """Return log p(x, z), the parameters integrated out, for statistics of rows each in one component.

    The beta-binomial law, row by row: a ratio of beta functions for each component and feature.
    """
    log_urns = _log_beta_ratio(stats.ones, stats.zeros, prior.ones, prior.zeros)
    return log_allocations(stats.counts, prior.concentration) + log_urns


def _log_beta_ratio(ones: Tensor, zeros: Tensor, prior_ones: Tensor, prior_zeros: Tensor) -> Tensor:
    """Return the sum over components and features of log B(prior + counts) - log B(prior)."""
    counts = torch.stack([ones, zeros], -1)
    return log_allocations(counts, torch.stack([prior_ones, prior_zeros], -1)).sum((-2, -1))


def log_predictive(stats: Stats, prior: Prior, x: Tensor) -> Tensor:
    """Return log p(x, z = k | rows so far), (..., K), of one more row, the parameters integrated out.

    An urn for each component and feature.

    Args:
        stats: those of the rows so far, each in one component, behind any leading dimensions.
        prior: the prior.
        x: (..., D), the row.
    """
    log_density = _log_urns(prior.ones + stats.ones, prior.zeros + stats.zeros, x)
    return log_urn(stats.counts, prior.concentration) + log_density


def _log_urns(ones: Tensor, zeros: Tensor, x: Tensor) -> Tensor:
    """Return the log probability (..., K) of a row x (..., D) from urns with so many ones and zeros (..., K, D)."""
    return (torch.where(x[..., None, :] > 0, ones, zeros) / (ones + zeros)).log().sum(-1)


def sample(params: Params, num_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ``num_samples`` draws x (n, D) of 0.0 and 1.0 and the components z (n,) that they came from."""
    z = torch.multinomial(params.weights, num_samples, replacement=True, generator=generator)
    probs = params.probs
    uniform = torch.rand(num_samples, probs.shape[-1], generator=generator, dtype=probs.dtype, device=probs.device)
    return (uniform < probs.index_select(0, z)).to(probs.dtype), z


def moments(params: Params) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and the covariance (D, D) of one observation."""
    mean = params.weights @ params.probs
    deviations = params.probs - mean
    between = (params.weights[:, None] * deviations).mT @ deviations
    return mean, between + torch.diag_embed(params.weights @ (params.probs * (1 - params.probs)))


def init_params(
    x: Tensor, num_components: int, generator: torch.Generator, method: str = "k-means++", weights: Tensor | None = None
) -> Params:
    """Return a start for EM: the shares and frequencies of a partition of x (N, D), drawn to those of all the data.

    One pseudo-observation at the overall frequencies keeps a part from excluding a value that it has not seen, and half
    a one and half a zero more keep those frequencies inside (0, 1).
    Rows count as often as their weights (N,) say; None counts each once.
    """
    resp = partition(x, num_components, generator, method, weights)
    weights = row_weights(x, weights)
    parts = resp * weights[:, None]
    counts, total = parts.sum(0), weights.sum()
    overall = (weights @ x + 0.5) / (total + 1)
    return Params((counts + 1) / (counts + 1).sum(), (parts.mT @ x + overall) / (counts[:, None] + 1))


def weakly_informative_prior(x: Tensor, num_components: int) -> Prior:
    """Return the uniform prior, on the simplex and on the unit interval, for rows x (N, D).

    Raises:
        TypeError: x is not a floating tensor, or the number of components is not an integer.
        ValueError: x is not a finite matrix, or the number of components is below 1.
    """
    check_rows(x)
    num_components = check_num_components(num_components)
    return Prior(x.new_ones(num_components), torch.ones_like(x[0]), torch.ones_like(x[0]))


@dataclass(frozen=True)
class UniformWeights:
    """The sheet's family: the weights are known, p(z = k) = 1 / K, and EM learns the probabilities alone."""

    class Params(NamedTuple):
        weights: Tensor  # (K,), 1 / K each
        probs: Tensor  # (K, D), of a one

    class Prior(NamedTuple):
        """probs ~ Beta(ones, zeros)."""

        ones: Tensor  # (D,)
        zeros: Tensor  # (D,)

    class Stats(NamedTuple):
        """Sums over rows, weighted by responsibilities; additive over rows."""

        ones: Tensor  # (K, D), of r x
        zeros: Tensor  # (K, D), of r (1 - x)

    additive: ClassVar = True

    def model(
        self,
        x: Tensor | None = None,
        *,
        num_components: int,
        prior: UniformWeights.Prior | None = None,
        num_data: int | None = None,
        num_features: int | None = None,
    ) -> Tensor:
        """Draw the probabilities, then each row from its component; observe x (N, D), or generate ``num_data`` rows.

        The weights are a deterministic site. Without ``prior``, condition the site ``probs`` to generate.
        """
        reference = prior[0] if prior is not None else torch.empty((), dtype=torch.float64) if x is None else x
        weights = reference.new_full((num_components,), 1 / num_components)
        weights = pyro.deterministic("weights", weights, event_dim=1)
        return _draw_rows(weights, x, prior, num_data, num_features)

    def log_joint(self, params: UniformWeights.Params, x: Tensor) -> Tensor:
        """Return log p(x_n, z_n = k), shape (N, K); -inf where a probability of exactly 0 or 1 excludes the row."""
        return log_joint(Params(*params), x)

    def statistics(self, params: UniformWeights.Params, x: Tensor, resp: Tensor) -> UniformWeights.Stats:
        """Return the sufficient statistics of rows x (N, D) under responsibilities (N, K)."""
        return UniformWeights.Stats(*statistics(Params(*params), x, resp)[1:])

    def log_joint_observed(self, params: UniformWeights.Params, x: Tensor) -> Tensor:
        """Return log p(observed part of x_n, z_n = k), shape (N, K), with NaN in x (N, D) for what is missing.

        It is -inf where a probability of exactly 0 or 1 excludes the row.
        """
        return log_joint_observed(Params(*params), x)

    def statistics_observed(self, params: UniformWeights.Params, x: Tensor, resp: Tensor) -> UniformWeights.Stats:
        """Return the expected statistics of rows x (N, D) given what is observed, under responsibilities (N, K)."""
        return UniformWeights.Stats(*statistics_observed(Params(*params), x, resp)[1:])

    def recentre(
        self, stats: UniformWeights.Stats, old: UniformWeights.Params, new: UniformWeights.Params
    ) -> UniformWeights.Stats:
        """Return the statistics as they are: they are about no location."""
        return stats

    def m_step(self, stats: UniformWeights.Stats, prior: UniformWeights.Prior | None = None) -> UniformWeights.Params:
        """Return the probabilities that maximise Q, or Q + log prior, beside the weights as they are known."""
        ones, zeros = stats
        if prior is not None:
            ones, zeros = ones + prior.ones - 1, zeros + prior.zeros - 1
        num_components = ones.shape[-2]
        return UniformWeights.Params(torch.full_like(ones[..., 0], 1 / num_components), ones / (ones + zeros))

    def log_prior(self, params: UniformWeights.Params, prior: UniformWeights.Prior) -> Tensor:
        """Return the log density of the prior at the probabilities, a number ()."""
        return _log_beta(params.probs, prior.ones, prior.zeros)

    def draw(
        self,
        params: UniformWeights.Params,
        stats: UniformWeights.Stats,
        prior: UniformWeights.Prior,
        generator: torch.Generator,
    ) -> UniformWeights.Params:
        """Return a draw from p(probs | x, z) beside the weights as they are known; of no rows, from the prior."""
        probs = draw_beta(prior.ones + stats.ones, prior.zeros + stats.zeros, generator)
        return UniformWeights.Params(torch.full_like(probs[..., 0], 1 / probs.shape[-2]), probs)

    def log_marginal(self, stats: UniformWeights.Stats, prior: UniformWeights.Prior) -> Tensor:
        """Return log p(x, z), the probabilities integrated out, for statistics of rows each in one component."""
        ones, zeros = stats
        num_data = (ones + zeros)[..., 0].sum(-1)
        return _log_beta_ratio(ones, zeros, *prior) - num_data * math.log(ones.shape[-2])

    def log_predictive(self, stats: UniformWeights.Stats, prior: UniformWeights.Prior, x: Tensor) -> Tensor:
        """Return log p(x, z = k | rows so far), (..., K), of one more row x (..., D), probabilities integrated out."""
        log_density = _log_urns(prior.ones + stats.ones, prior.zeros + stats.zeros, x)
        return log_density - math.log(log_density.shape[-1])

    def sample(
        self, params: UniformWeights.Params, num_samples: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return ``num_samples`` draws x (n, D) of 0.0 and 1.0 and the components z (n,) that they came from."""
        return sample(Params(*params), num_samples, generator)

    def moments(self, params: UniformWeights.Params) -> tuple[Tensor, Tensor]:
        """Return the mean (D,) and the covariance (D, D) of one observation."""
        return moments(Params(*params))

    def init_params(
        self,
        x: Tensor,
        num_components: int,
        generator: torch.Generator,
        method: str = "k-means++",
        weights: Tensor | None = None,
    ) -> UniformWeights.Params:
        """Return a start for EM: uniform weights, and frequencies of a partition of x (N, D), rows weighted (N,)."""
        start = init_params(x, num_components, generator, method, weights)
        return UniformWeights.Params(torch.full_like(start.weights, 1 / num_components), start.probs)

    def weakly_informative_prior(self, x: Tensor, num_components: int) -> UniformWeights.Prior:
        """Return the uniform prior on the unit interval, for rows x (N, D), or raise as that of all parameters."""
        return self.Prior(*weakly_informative_prior(x, num_components)[1:])
