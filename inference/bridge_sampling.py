"""Bridge sampling: the evidence from draws of the posterior and draws of a law that is fitted to it.

The evidence is the factor between the density of the posterior as it can be written down and its normalised density.
The draws of both sides say where the two densities overlap, and with the optimal bridge the ratio is the root of one
equation (Meng and Wong 1996, Statistica Sinica 6, equation 4.1).

A posterior of exchangeable components has K! modes alike, and a bridge from one law to all of them would be narrow. So
the parameters are confined to a region of which each K! relabellings of a point have one, and the draws relabelled into
it: 1 / K! of the evidence lies there. Without it, draws that show one mode give an evidence that is too low by log K!,
the mistake that Neal 1999 found in Chib 1995; Fruehwirth-Schnatter 2004, section 4, goes through the remedies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.particles import systematic
from mixproof.inference.relabelling import Relabelling

DEGREES_OF_FREEDOM = 5.0
"""Of the proposal, a t law: the posterior of a log scale or a log odds falls off exponentially, more slowly than a
normal law."""
CHUNK = 512
"""How many points are evaluated at once: the smallest batch whose points cost as little as those of any larger."""


class Bridge(NamedTuple):
    """What bridge sampling found."""

    log_evidence: float
    """log p(data), natural logarithm."""
    standard_error: float
    """The root of its mean squared error, to first order."""
    effective_sample_size: float
    """Of the draws, for the bridge's own average."""


class _StudentT(NamedTuple):
    """A multivariate t law."""

    loc: Tensor  # (P,)
    factor: Tensor  # (P, P), lower triangular: factor factor^T is the scale matrix

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        normal = torch.randn(count, len(self.loc), generator=generator, dtype=self.loc.dtype, device=self.loc.device)
        halves = self.loc.new_full((count, 1), DEGREES_OF_FREEDOM / 2)
        chi2 = 2 * torch._standard_gamma(halves, generator=generator)
        return self.loc + (normal @ self.factor.mT) * (DEGREES_OF_FREEDOM / chi2).sqrt()

    def log_prob(self, u: Tensor) -> Tensor:
        size, df = len(self.loc), DEGREES_OF_FREEDOM
        white = torch.linalg.solve_triangular(self.factor, (u - self.loc).mT, upper=False)
        constant = math.lgamma((df + size) / 2) - math.lgamma(df / 2) - size / 2 * math.log(df * math.pi)
        log_det = self.factor.diagonal().log().sum()
        return constant - log_det - (df + size) / 2 * (white.square().sum(0) / df).log1p()


def bridge_sampling(
    posterior: LogPosterior,
    u: Tensor,
    *,
    seed: int,
    relabelling: Relabelling | None,
    weights: Tensor | None = None,
) -> Bridge:
    """Estimate the evidence from draws of the posterior.

    The proposal is fitted to one half of the draws and bridged to the other, and the same the other way round; the
    result is the mean of both. The halves are chains where there are 4 or more, and halves of each chain otherwise.

    Args:
        posterior: the program with its data.
        u: (C, S, P), draws of the unconstrained coordinates: S from each of C chains.
        seed: seeds every random number.
        relabelling: the symmetry of the posterior, which is treated; None takes the draws as they are.
        weights: (C,), how much the draws of each chain count, in any unit; None counts them alike.

    Returns:
        ``Bridge``. Its error is that of Fruehwirth-Schnatter 2004, Econometrics Journal 7, equation 19, dependence
        within chains and differences between them counted.

    Raises:
        ValueError: there are too few draws for the coordinates, they lie in too few directions, or the two sides do not
            overlap.
    """
    num_chains, num_draws, size = u.shape
    if num_chains * num_draws < 4 * (size + 1):
        raise ValueError(f"{num_chains * num_draws} draws are too few for {size} coordinates: give {4 * (size + 1)}")
    generator = torch.Generator(u.device).manual_seed(seed)
    weights = u.new_ones(num_chains) if weights is None else weights
    if num_chains >= 4:
        halves = [(u[0::2], weights[0::2]), (u[1::2], weights[1::2])]
    else:
        halves = [(u[:, : num_draws // 2], weights), (u[:, num_draws // 2 :], weights)]
    halves = [(chains, shares / shares.mean()) for chains, shares in halves]
    bridges = [
        _bridge(posterior, _in_shares(*fitted, generator), *used, relabelling, generator)
        for fitted, used in (halves, halves[::-1])
    ]
    return Bridge(
        sum(bridge.log_evidence for bridge in bridges) / 2,
        math.sqrt(sum(bridge.standard_error**2 for bridge in bridges)) / 2,
        sum(bridge.effective_sample_size for bridge in bridges),
    )


def _in_shares(u: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
    """Return as many draws (C S, P) of chains (C, S, P) as there are, each chain's in its share, (C,) of mean 1."""
    if (weights == 1).all():
        return u.flatten(0, 1)
    shares = weights[:, None].expand(u.shape[:2]).flatten() / u[..., 0].numel()
    return u.flatten(0, 1)[systematic(shares[None], len(shares), generator)[0]]


def _bridge(
    posterior: LogPosterior,
    fitted: Tensor,
    used: Tensor,
    weights: Tensor,
    relabelling: Relabelling | None,
    generator: torch.Generator,
) -> Bridge:
    """Return the bridge from draws ``used`` (C, S, P) to a proposal fitted to other draws (F, P)."""
    draws, log_count = used.flatten(0, 1), 0.0
    if relabelling is not None:
        references = relabelling.learn(fitted)
        fitted, draws = relabelling.align(fitted, references), relabelling.align(draws, references)
        log_count = relabelling.log_count
    proposal = _fit(fitted)
    proposed = proposal.sample(len(draws), generator)
    from_posterior = _log_target(posterior, draws) - proposal.log_prob(draws)
    from_proposal = _log_target(posterior, proposed) - proposal.log_prob(proposed)
    if relabelling is not None:
        inside = relabelling.is_aligned(proposed, references)
        from_proposal = torch.where(inside, from_proposal, -torch.inf)
    bridge = _solve(from_posterior.reshape(used.shape[:2]), from_proposal, weights)
    return bridge._replace(log_evidence=bridge.log_evidence + log_count)


def _solve(from_posterior: Tensor, from_proposal: Tensor, weights: Tensor) -> Bridge:
    """Return the root of the optimal bridge's equation.

    Args:
        from_posterior: (C, S), log target - log proposal at draws of the posterior.
        from_proposal: (M,), the same at draws of the proposal.
        weights: (C,), of the chains, in any unit.
    """
    weights = weights / weights.mean()
    log_evidence = from_posterior.median()
    for _ in range(1000):
        before = log_evidence
        first, second = _bridged(from_posterior, from_proposal, log_evidence)
        log_evidence = log_evidence + first.mean().log() - (weights[:, None] * second).mean().log()
        if not log_evidence.isfinite():
            raise ValueError("the proposal and the posterior do not overlap: are these draws of this posterior?")
        if abs(log_evidence - before) < 1e-12 * max(1, abs(float(log_evidence))):
            break
    first, second = _bridged(from_posterior, from_proposal, log_evidence)
    mean = (weights[:, None] * second).mean()
    of_draws = variance_of_mean(weights[:, None] * (second - mean)) / mean.square()
    of_proposal = first.var() / first.mean().square() / len(first)
    effective = second.var() / mean.square() / of_draws
    return Bridge(float(log_evidence), math.sqrt(float(of_draws + of_proposal)), float(effective))


def _bridged(from_posterior: Tensor, from_proposal: Tensor, log_evidence: Tensor) -> tuple[Tensor, Tensor]:
    """Return p / (p + q) at draws of the proposal q, and q / (p + q) at draws of the posterior p.

    The bridge is optimal for as many independent draws of both; dependence among those of the posterior costs
    efficiency, and shows in the error.
    """
    return (from_proposal - log_evidence).sigmoid(), (log_evidence - from_posterior).sigmoid()


def variance_of_mean(values: Tensor) -> Tensor:
    """Return the variance, (), of the mean of values (C, S), dependent within each of C chains.

    Autocorrelations as in Vehtari et al. 2021, Bayesian Analysis 16, section 3.2, so that differences between chains
    count, summed up to Geyer's initial monotone sequence. Those of S draws about their own mean are too low by a share
    of 1 / S; where there are so many chains that the spread of their means is known better, it is taken.
    """
    num_chains, num_draws = values.shape
    means = values.mean(1)
    if num_chains > num_draws**2:
        return means.var() / num_chains
    centred = values - means[:, None]
    spectrum = torch.fft.rfft(centred, 2 * num_draws, dim=1)
    covariances = torch.fft.irfft(spectrum.abs().square(), dim=1)[:, :num_draws].mean(0) / num_draws
    within = covariances[0] * num_draws / max(num_draws - 1, 1)
    total = covariances[0] + (means.var() if num_chains > 1 else 0)
    if total == 0:
        return total
    correlations = 1 - (within - covariances) / total
    correlations[0] = 1
    correlations = correlations * (1 - torch.arange(num_draws, dtype=values.dtype, device=values.device) / num_draws)
    pairs = correlations[: num_draws // 2 * 2].reshape(-1, 2).sum(1)
    positive = (pairs > 0).long().cumprod(0).bool()
    pairs = torch.where(positive, pairs, 0).cummin(0).values
    time = (2 * pairs.sum() - 1).clamp_min(1 / math.log10(max(values.numel(), 10)))
    return total * time / values.numel()


def _fit(u: Tensor) -> _StudentT:
    """Return the t law of the location and scatter of draws u (F, P)."""
    loc = u.mean(0)
    covariance = (u - loc).mT @ (u - loc) / (len(u) - 1)
    factor, failure = torch.linalg.cholesky_ex(covariance)
    if failure:
        raise ValueError(
            f"the draws lie in fewer directions than the {u.shape[1]} coordinates: the chains have not moved"
        )
    return _StudentT(loc, factor)


def _in_chunks(u: Tensor) -> list[Tensor]:
    """Return points u (M, P) in chunks of one size, the last filled up with its last point."""
    missing = -len(u) % CHUNK
    return list(torch.cat([u, u[-1:].expand(missing, -1)]).split(CHUNK))


def _log_target(posterior: LogPosterior, u: Tensor) -> Tensor:
    """Return log p(data, params) + log |d params / d u|, (M,), at points u (M, P); -inf where it is not a number."""
    values = []
    for chunk in _in_chunks(u):
        found = posterior(chunk, chunk.new_ones(CHUNK))
        values.append(found.log_prior + found.log_likelihood)
    value = torch.cat(values)[: len(u)]
    return torch.where(value.isnan(), -torch.inf, value)
