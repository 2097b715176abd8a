"""Moments: a closed-form mean and covariance against those of a sample, with computed Monte Carlo errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor

from mixproof.inference.verification.report import Check, Report, asserting, conclude

Sampler = Callable[[int, torch.Generator], Tensor]
NUM_PILOT = 10_000
CHUNK = 2**20
"""How many numbers are drawn at once."""
ROUNDING = 2.0**10 * torch.finfo(torch.float64).eps


class Moments(NamedTuple):
    """Sample moments of y = (x - center) / scale."""

    num_samples: int
    first: Tensor
    """(D,), the average of y."""
    second: Tensor
    """(D, D), the average of y y^T."""
    fourth: Tensor
    """(D, D), the average of y_i^2 y_j^2."""


def verify_moments(
    sample: Sampler,
    mean: Tensor | float,
    covariance: Tensor | float | None = None,
    *,
    seed: int,
    smallest: float = 0.01,
    false_alarm: float = 1e-6,
    max_numbers: int = 2**25,
    subject: str | None = None,
) -> Report:
    """Try to refute that a law has a mean and a covariance.

    The number of draws follows from ``smallest``: an error of that size is missed no more often than a right
    claim is refuted.

    Args:
        sample: ``sample(num_samples, generator)`` returns independent draws (N, D), or (N,) for a law on the line.
        mean: the claimed mean (D,).
        covariance: the claimed covariance (D, D), which may be singular; None to test the mean alone.
        seed: of the draws.
        smallest: the smallest error that must be seen: of a mean in standard deviations s_i of the claimed law, of a
            covariance in products s_i s_j.
        false_alarm: the probability of refuting a right claim, shared by all tested entries.
        max_numbers: the most numbers (draws times features) that are drawn; rare events, as pixels nearly always
            off, need more, and the report's detail then says how much is seen instead.
        subject: the claim in words, for the report.

    Returns:
        A report; undecided where the sampler returns a number that is not finite.

    Raises:
        ValueError: ``smallest`` or ``false_alarm`` is not in (0, 1), or the sampler does not return (N, D).
    """
    if not (0 < smallest < 1 and 0 < false_alarm < 1):
        raise ValueError(f"smallest and false_alarm lie between 0 and 1, got {smallest} and {false_alarm}")
    subject = subject or "the moments of the law"
    generator = torch.Generator().manual_seed(seed)
    pilot = draw(sample, NUM_PILOT, generator)
    dim = pilot.shape[1]
    center = torch.as_tensor(mean, dtype=torch.float64).detach()
    center = center.reshape(1) if center.dim() == 0 else center
    if center.shape != (dim,):
        return conclude(subject, [_wrong_shape("mean", center, (dim,))], seed)
    checks = []
    spread = pilot.std(0)
    if covariance is not None:
        covariance = torch.as_tensor(covariance, dtype=torch.float64).detach()
        covariance = covariance.reshape(1, 1) if covariance.dim() == 0 else covariance
        if covariance.shape != (dim, dim):
            return conclude(subject, [_wrong_shape("covariance", covariance, (dim, dim))], seed)
        checks.append(is_covariance(covariance))
        if not checks[0].passed:
            return conclude(subject, checks, seed)
        spread = torch.where(covariance.diagonal() > 0, covariance.diagonal().sqrt(), spread)
    scale = torch.where(spread > 0, spread, 1.0)
    if not pilot.isfinite().all():
        nan = float("nan")
        return conclude(subject, [Check("finite draws", False, nan, nan, detail="the sampler is not finite")], seed)

    num_entries = dim if covariance is None else dim + dim * (dim + 1) // 2
    num_samples = required_samples((pilot - center) / scale, smallest, false_alarm / num_entries, covariance is None)
    num_samples = max(NUM_PILOT, min(num_samples, max_numbers // dim))
    moments = sample_moments(sample, center, scale, num_samples, generator)
    share = false_alarm * dim / num_entries
    checks.append(mean_agrees(moments, center, scale, false_alarm=share))
    if covariance is not None:
        checks.append(covariance_agrees(moments, center, scale, covariance, false_alarm=false_alarm - share))
    return conclude(subject, checks, seed)


def required_samples(standardised: Tensor, smallest: float, false_alarm: float, mean_only: bool) -> int:
    """Return the number of draws at which the smallest error is missed as rarely as a right claim is refuted.

    Args:
        standardised: a pilot sample (N, D) in standard deviations about the claimed mean.
        smallest: the error that must be seen, in the same units.
        false_alarm: of one entry.
        mean_only: whether second moments need not be tested.
    """
    y = standardised - standardised.mean(0)
    variance = y.square().mean(0).max()
    if not mean_only:
        squares = y.square()
        variance = torch.maximum(variance, (squares.T @ squares / len(y) - (y.T @ y / len(y)).square()).max())
    quantiles = stats.norm.isf(false_alarm / 2) + stats.norm.isf(false_alarm)
    return max(NUM_PILOT, math.ceil(float(variance) * (quantiles / smallest) ** 2))


def sample_moments(
    sample: Sampler, center: Tensor, scale: Tensor, num_samples: int, generator: torch.Generator
) -> Moments:
    """Return the moments of (x - center) / scale over fresh draws, in chunks; center and scale are (D,)."""
    dim = len(center)
    first, second, fourth = torch.zeros(dim).double(), torch.zeros(dim, dim).double(), torch.zeros(dim, dim).double()
    chunk = max(1, CHUNK // dim)
    for start in range(0, num_samples, chunk):
        y = (draw(sample, min(chunk, num_samples - start), generator) - center) / scale
        squares = y.square()
        first += y.sum(0) / num_samples
        second += y.T @ y / num_samples
        fourth += squares.T @ squares / num_samples
    return Moments(num_samples, first, second, fourth)


def is_covariance(covariance: Tensor) -> Check:
    """Check that a matrix (D, D) is symmetric and positive semidefinite to rounding."""
    size = covariance.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    asymmetry = float((covariance - covariance.T).abs().max() / size)
    lowest = float(-torch.linalg.eigvalsh((covariance + covariance.T) / 2).min() / size)
    error = max(asymmetry, lowest, 0.0)
    passed = error <= ROUNDING
    reason = "not symmetric" if asymmetry >= lowest else "a direction has negative variance"
    return Check(
        "a covariance matrix",
        passed,
        error,
        ROUNDING,
        counterexample=None if passed else {"covariance": covariance},
        detail="" if passed else reason,
    )


def mean_agrees(moments: Moments, mean: Tensor, scale: Tensor, *, false_alarm: float) -> Check:
    """Test a mean (D,), which was the center of the moments, in standard deviations ``scale`` (D,)."""
    variance = moments.second.diagonal() - moments.first.square()
    floor = ROUNDING * (1 + mean.abs() / scale)
    found = {"claimed": mean, "actual": mean + moments.first * scale}
    return _z_test(
        "mean", moments.first, variance, floor=floor, num=moments.num_samples, false_alarm=false_alarm, found=found
    )


def covariance_agrees(
    moments: Moments, mean: Tensor, scale: Tensor, covariance: Tensor, *, false_alarm: float
) -> Check:
    """Test a covariance (D, D), in units of s_i s_j for the standard deviations ``scale`` (D,).

    Products are taken about the claimed mean, where their average has a known error; a mean that is wrong shows here
    too.
    """
    units = scale[:, None] * scale
    variance = moments.fourth - moments.second.square()
    relative = (mean.abs() / scale).clamp(min=1)
    floor = ROUNDING * relative[:, None] * relative
    rows, columns = torch.tril_indices(len(mean), len(mean))
    error = (moments.second - covariance / units)[rows, columns]
    found = {"claimed": covariance, "actual": moments.second * units}
    return _z_test(
        "covariance",
        error,
        variance[rows, columns],
        floor=floor[rows, columns],
        num=moments.num_samples,
        false_alarm=false_alarm,
        found=found,
    )


def draw(sample: Sampler, num_samples: int, generator: torch.Generator) -> Tensor:
    """Return draws (N, D) in float64, a law on the line as one column."""
    draws = sample(num_samples, generator)
    draws = draws[:, None] if draws.dim() == 1 else draws
    if draws.dim() != 2 or len(draws) != num_samples:
        raise ValueError(f"sample({num_samples}, generator) returned shape {tuple(draws.shape)}, expected (N, D)")
    return draws.detach().to(torch.float64)


def _z_test(
    name: str,
    error: Tensor,
    variance: Tensor,
    *,
    floor: Tensor,
    num: int,
    false_alarm: float,
    found: dict[str, Any],
) -> Check:
    standard_error = (variance.clamp(min=0) / num).sqrt()
    excess = torch.where(error.abs() <= floor, 0.0, error.abs())
    z = torch.where(excess == 0, 0.0, excess / standard_error)
    worst = int(z.argmax())
    p_value = min(1.0, len(z) * 2 * float(stats.t.sf(float(z[worst]), num - 1)))
    quantile = float(stats.t.isf(false_alarm / len(z) / 2, num - 1))
    passed = p_value >= false_alarm
    seen = float(((quantile + stats.norm.isf(false_alarm / len(z))) * standard_error).max())
    return Check(
        name,
        passed,
        float(error[worst].abs()),
        float(torch.maximum(quantile * standard_error[worst], floor[worst])),
        p_value,
        None if passed else found,
        f"{num} draws; in {len(z)} entries errors above {seen:.2g} standard deviations of the law are seen",
    )


def _wrong_shape(name: str, claimed: Tensor, expected: tuple[int, ...]) -> Check:
    reason = f"the claimed {name} has shape {tuple(claimed.shape)}, the draws need {expected}"
    return Check(f"shape of the {name}", False, float("nan"), 0.0, counterexample={"claimed": claimed}, detail=reason)


assert_moments = asserting(verify_moments)
