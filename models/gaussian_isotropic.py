r"""Mixture of isotropic Gaussians with one known variance; as it goes to 0, EM becomes K-means (problem 6).

.. math::
    z_n \sim \mathrm{Cat}(\pi), \qquad x_n \mid z_n = k \sim \mathcal{N}(\mu_k, \sigma^2 I), \; \sigma^2 \text{ known}

Sizes: N observations, D features, K components. Bishop, Pattern Recognition and Machine Learning, section 9.3.2. The
conjugate prior is Dirichlet on the weights and normal on each mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.models import gaussian_spherical
from mixproof.models.conjugate import data_scale, draw_dirichlet, draw_normal, log_allocations, log_urn
from mixproof.models.initial import counted_rows, partition


@dataclass(frozen=True)
class GaussianIsotropic:
    """The family with its setting, the variance sigma^2 > 0 that all components and features share."""

    variance: float

    class Params(NamedTuple):
        weights: Tensor  # (K,)
        locs: Tensor  # (K, D)

    class Prior(NamedTuple):
        """Dirichlet(concentration) on weights; locs ~ N(loc, variance / strength I)."""

        concentration: Tensor  # (K,)
        loc: Tensor  # (D,)
        strength: Tensor  # (), in pseudo-observations

    class Stats(NamedTuple):
        """Sums over rows, weighted by responsibilities; additive over rows. Second moments are about the locs."""

        counts: Tensor  # (K,), of r
        sums: Tensor  # (K, D), of r x
        shifts: Tensor  # (K, D), of r (x - loc)
        squares: Tensor  # (K,), of r ||x - loc||^2

    additive: ClassVar = True

    def __post_init__(self) -> None:
        if not (self.variance > 0 and math.isfinite(self.variance)):
            raise ValueError(f"the known variance must be positive and finite, not {self.variance}")

    def model(
        self,
        x: Tensor | None = None,
        *,
        num_components: int,
        prior: GaussianIsotropic.Prior | None = None,
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
        else:
            weights = pyro.sample("weights", dist.Dirichlet(prior.concentration))
            with pyro.plate("components", num_components):
                spread = (self.variance / prior.strength).sqrt()
                locs = pyro.sample("locs", dist.Normal(prior.loc, spread).to_event(1))
        with pyro.plate("data", num_data):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            return pyro.sample("x", dist.Normal(locs[z], math.sqrt(self.variance)).to_event(1), obs=x)

    def log_joint(self, params: GaussianIsotropic.Params, x: Tensor) -> Tensor:
        """Return log p(x_n, z_n = k), shape (N, K)."""
        squares = (x[..., None, :] - params.locs).square().sum(-1)
        log_normaliser = x.shape[-1] * math.log(2 * math.pi * self.variance) / 2
        return params.weights.log() - log_normaliser - squares / (2 * self.variance)

    def statistics(self, params: GaussianIsotropic.Params, x: Tensor, resp: Tensor) -> GaussianIsotropic.Stats:
        """Return the sufficient statistics of rows x (N, D) under responsibilities (N, K)."""
        deviations = x - params.locs[..., None, :]  # (K, N, D)
        weighted = resp.mT[..., None] * deviations
        squares = (weighted * deviations).sum((-2, -1))
        return GaussianIsotropic.Stats(resp.sum(-2), resp.mT @ x, weighted.sum(-2), squares)

    def log_joint_observed(self, params: GaussianIsotropic.Params, x: Tensor) -> Tensor:
        """Return log p(observed part of x_n, z_n = k), shape (N, K), with NaN in x (N, D) for what is missing."""
        missing = x.isnan()
        size = (~missing).to(x.dtype).sum(-1)[..., None]  # of the observed part
        squares = torch.where(missing[..., None, :], 0, x[..., None, :] - params.locs).square().sum(-1)
        log_normaliser = size * math.log(2 * math.pi * self.variance) / 2
        return params.weights.log() - log_normaliser - squares / (2 * self.variance)

    def statistics_observed(self, params: GaussianIsotropic.Params, x: Tensor, resp: Tensor) -> GaussianIsotropic.Stats:
        """Return the expected statistics of rows x (N, D) given what is observed, under responsibilities (N, K)."""
        missing = x.isnan()
        deviations = torch.where(missing, 0, x - params.locs[..., None, :])  # (K, N, D)
        weighted = resp.mT[..., None] * deviations
        unseen = resp.mT @ missing.to(x.dtype)  # (K, D), of r where the feature is missing
        return GaussianIsotropic.Stats(
            resp.sum(-2),
            resp.mT @ torch.where(missing, 0, x) + unseen * params.locs,
            weighted.sum(-2),
            (weighted * deviations).sum((-2, -1)) + unseen.sum(-1) * self.variance,
        )

    def recentre(
        self, stats: GaussianIsotropic.Stats, old: GaussianIsotropic.Params, new: GaussianIsotropic.Params
    ) -> GaussianIsotropic.Stats:
        """Return the statistics about the locs of new parameters, given those about the locs of old ones."""
        moves = old.locs - new.locs
        shifts = stats.shifts + stats.counts[..., None] * moves
        squares = stats.squares + (moves * (2 * stats.shifts + stats.counts[..., None] * moves)).sum(-1)
        return stats._replace(shifts=shifts, squares=squares)

    def reduction(
        self, params: GaussianIsotropic.Params
    ) -> tuple[ModuleType, gaussian_spherical.Params, Callable[[gaussian_spherical.Stats], GaussianIsotropic.Stats]]:
        """Return the spherical family with this variance in every component, and how its statistics give these."""
        variances = torch.full_like(params.weights, self.variance)
        return (
            gaussian_spherical,
            gaussian_spherical.Params(*params, variances),
            lambda stats: GaussianIsotropic.Stats(*stats),
        )

    def m_step(
        self, stats: GaussianIsotropic.Stats, prior: GaussianIsotropic.Prior | None = None
    ) -> GaussianIsotropic.Params:
        """Return the parameters that maximise Q, or Q + log prior."""
        counts = stats.counts[..., None]
        if prior is None:
            return GaussianIsotropic.Params(stats.counts / stats.counts.sum(-1, keepdim=True), stats.sums / counts)
        weights = stats.counts + prior.concentration - 1
        locs = (prior.strength * prior.loc + stats.sums) / (prior.strength + counts)
        return GaussianIsotropic.Params(weights / weights.sum(-1, keepdim=True), locs)

    def log_prior(self, params: GaussianIsotropic.Params, prior: GaussianIsotropic.Prior) -> Tensor:
        """Return the log density of the prior at the parameters, a number ()."""
        alpha, precision = prior.concentration, prior.strength / self.variance
        log_dirichlet = torch.xlogy(alpha - 1, params.weights).sum(-1) + alpha.sum().lgamma() - alpha.lgamma().sum()
        log_locs = ((precision / (2 * math.pi)).log() - precision * (params.locs - prior.loc).square()) / 2
        return log_dirichlet + log_locs.sum((-2, -1))

    def posterior(self, stats: GaussianIsotropic.Stats, prior: GaussianIsotropic.Prior) -> GaussianIsotropic.Prior:
        """Return the hyperparameters of p(params | x, z): concentration and strength (K,), loc (K, D)."""
        strength = prior.strength + stats.counts
        loc = (prior.strength * prior.loc + stats.sums) / strength[..., None]
        return GaussianIsotropic.Prior(prior.concentration + stats.counts, loc, strength)

    def draw(
        self,
        params: GaussianIsotropic.Params,
        stats: GaussianIsotropic.Stats,
        prior: GaussianIsotropic.Prior,
        generator: torch.Generator,
    ) -> GaussianIsotropic.Params:
        """Return a draw from p(params | x, z), Dirichlet and normal; of no rows, from the prior.

        Args:
            params: not looked at: the posterior depends on no second moment.
            stats: those of all rows, each in one component; leading dimensions are chains.
            prior: the prior.
            generator: the only source of randomness.
        """
        concentration, loc, strength = self.posterior(stats, prior)
        weights = draw_dirichlet(concentration, generator)
        spread = (self.variance / strength).sqrt()[..., None]
        return GaussianIsotropic.Params(weights, loc + draw_normal(loc, generator) * spread)

    def log_marginal(self, stats: GaussianIsotropic.Stats, prior: GaussianIsotropic.Prior) -> Tensor:
        """Return log p(x, z), the parameters integrated out, for statistics of rows each in one component.

        Murphy 2007, Conjugate Bayesian analysis of the Gaussian distribution, equation 55, feature by feature.
        """
        counts, size = stats.counts, stats.sums.shape[-1]
        safe = counts.clamp_min(torch.finfo(counts.dtype).tiny)
        strength = prior.strength + counts
        within = stats.squares - stats.shifts.square().sum(-1) / safe  # about the component's own mean
        distances = (stats.sums - counts[..., None] * prior.loc).square().sum(-1)
        pull = prior.strength / strength * distances / safe
        log_density = (
            size * (prior.strength.log() - strength.log() - counts * math.log(2 * math.pi * self.variance))
            - (within + pull) / self.variance
        ) / 2
        return log_allocations(counts, prior.concentration) + log_density.sum(-1)

    def log_predictive(self, stats: GaussianIsotropic.Stats, prior: GaussianIsotropic.Prior, x: Tensor) -> Tensor:
        """Return log p(x, z = k | rows so far), (..., K), of one more row, the parameters integrated out.

        Normal: the location of a component adds to the variance.

        Args:
            stats: those of the rows so far, each in one component, behind any leading dimensions.
            prior: the prior.
            x: (..., D), the row.
        """
        _, loc, strength = self.posterior(stats, prior)
        variance = self.variance * (1 + 1 / strength)
        squares = (x[..., None, :] - loc).square().sum(-1)
        log_density = -(x.shape[-1] * (2 * math.pi * variance).log() + squares / variance) / 2
        return log_urn(stats.counts, prior.concentration) + log_density

    def sample(
        self, params: GaussianIsotropic.Params, num_samples: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return ``num_samples`` draws x (n, D) and the components z (n,) that they came from."""
        z = torch.multinomial(params.weights, num_samples, replacement=True, generator=generator)
        locs = params.locs
        noise = torch.randn(num_samples, locs.shape[-1], generator=generator, dtype=locs.dtype, device=locs.device)
        return noise.mul(math.sqrt(self.variance)).add_(locs.index_select(0, z)), z

    def moments(self, params: GaussianIsotropic.Params) -> tuple[Tensor, Tensor]:
        """Return the mean (D,) and the covariance (D, D) of one observation."""
        mean = params.weights @ params.locs
        deviations = params.locs - mean
        between = (params.weights[:, None] * deviations).mT @ deviations
        return mean, between + self.variance * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)

    def init_params(
        self,
        x: Tensor,
        num_components: int,
        generator: torch.Generator,
        method: str = "k-means++",
        weights: Tensor | None = None,
    ) -> GaussianIsotropic.Params:
        """Return a start for EM: the shares and means of a partition of x (N, D), its rows weighted (N,)."""
        resp = partition(x, num_components, generator, method, weights)
        x, weights = counted_rows(x, weights)
        parts = resp * weights[:, None]
        counts = parts.sum(0)
        locs = (parts.mT @ x) / counts.where(counts > 0, 1)[:, None]
        return GaussianIsotropic.Params((counts + 1) / (counts + 1).sum(), locs)

    def weakly_informative_prior(self, x: Tensor, num_components: int) -> GaussianIsotropic.Prior:
        """Return a proper prior on the scale of rows x (N, D): locations as far apart as they, of variance tr S / D.

        Raises:
            TypeError, ValueError: as ``data_scale``.
        """
        loc, covariance, _ = data_scale(x, num_components)
        return self.Prior(loc.new_ones(num_components), loc, self.variance / covariance.diagonal().mean())
