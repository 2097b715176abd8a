"""Moments: a closed-form mean and covariance against those of a sample, with computed Monte Carlo errors.

Each entry is an average of draws, tested by Hall's transformation of Student's ratio, which takes out its skewness to
first order (Hall, Journal of the Royal Statistical Society B 54, 1992). Where rare values leave more skewness than
that, the entry is not tested. No test of a mean can do without an assumption of that kind (Bahadur and Savage, Annals
of Mathematical Statistics 27, 1956): a law whose moments rest on values that fewer than about ten of the draws take is
out of reach, and a right claim about it may be refuted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor

from mixproof.inference.validation import check_probability
from mixproof.inference.verification.report import Check, Report, asserting, conclude

Sampler = Callable[[int, torch.Generator], Tensor]
NUM_PILOT = 10_000
CHUNK = 2**20
"""How many numbers are drawn at once."""
ROUNDING = 2.0**10 * torch.finfo(torch.float64).eps
BLIND = 1e-3
"""Rounding that hides more than this, in standard deviations, and more than chance does, leaves moments undecided."""
LARGEST_SKEWNESS = 0.125
"""Of an average: that of the number of rare events if 64 are expected, where Hall's transformation still holds."""


class Moments(NamedTuple):
    """Sample moments of y = (x - center) / scale."""

    num_samples: int
    first: Tensor
    """(D,), the average of y."""
    second: Tensor
    """(D, D), the average of y y^T."""
    fourth: Tensor
    """(D, D), the average of y_i^2 y_j^2."""
    third: Tensor
    """(D,), the average of y^3."""
    sixth: Tensor
    """(D, D), the average of y_i^3 y_j^3."""


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
    claim is refuted. The law may be continuous, discrete or mixed. A feature of claimed variance zero must not move
    at all; one that never moved although its claimed variance is positive is refuted where the two claimed moments
    make that improbable, and is otherwise undecided.

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
        A report; undecided where the sampler returns a number that is not finite, or where an entry rests on so few
        draws of rare values that the error of its average is not known.

    Raises:
        TypeError: the sampler does not return a tensor.
        ValueError: ``smallest`` or ``false_alarm`` is not in (0, 1), the sampler does not return (N, D), or the claimed
            mean is not finite.
    """
    check_probability(smallest, "smallest")
    check_probability(false_alarm, "false_alarm")
    subject = subject or "the moments of the law"
    generator = torch.Generator().manual_seed(seed)
    pilot = draw(sample, NUM_PILOT, generator)
    dim = pilot.shape[1]
    center = torch.as_tensor(mean, dtype=torch.float64).detach()
    center = center.reshape(1) if center.dim() == 0 else center
    if center.shape != (dim,):
        return conclude(subject, [_wrong_shape("mean", center, (dim,))], seed)
    if not center.isfinite().all():
        raise ValueError(f"the claimed mean is {center.tolist()}: claim numbers, of a law that has a mean")
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
    most = max(NUM_PILOT, max_numbers // dim)
    share = false_alarm * dim / num_entries
    for size in (min(num_samples, most), most):
        moments = sample_moments(sample, center, scale, size, generator)
        found = [mean_agrees(moments, center, scale, covariance=covariance, false_alarm=share)]
        if covariance is not None:
            found.append(covariance_agrees(moments, center, scale, covariance, false_alarm=false_alarm - share))
        if not any(math.isnan(check.error) for check in found):
            break  # else the pilot has not shown how rare some values are
    return conclude(subject, [*checks, *found], seed)


def required_samples(standardised: Tensor, smallest: float, false_alarm: float, mean_only: bool) -> int:
    """Return the number of draws at which the smallest error is missed as rarely as a right claim is refuted.

    Args:
        standardised: a pilot sample (N, D) in standard deviations about the claimed mean.
        smallest: the error that must be seen, in the same units.
        false_alarm: of one entry.
        mean_only: whether second moments need not be tested.
    """
    y = standardised - standardised.mean(0)
    variance, cubed = y.square().mean(0), y.pow(3).mean(0)
    needed = [variance, (cubed.square() / variance.pow(3)).nan_to_num(0.0, 0.0) / LARGEST_SKEWNESS**2]
    if not mean_only:
        variance, skewness = _of_products(_moments(y))
        needed[0] = torch.maximum(needed[0].max(), variance.max())
        needed.append((skewness / LARGEST_SKEWNESS).square())
    quantiles = stats.norm.isf(false_alarm / 2) + stats.norm.isf(false_alarm)
    sizes = [float(needed[0].max()) * (quantiles / smallest) ** 2, *(float(size.max()) for size in needed[1:])]
    return max(NUM_PILOT, math.ceil(max(sizes)))


def sample_moments(
    sample: Sampler, center: Tensor, scale: Tensor, num_samples: int, generator: torch.Generator
) -> Moments:
    """Return the moments of (x - center) / scale over fresh draws, in chunks; center and scale are (D,)."""
    chunk = max(1, CHUNK // len(center))
    total = None
    for start in range(0, num_samples, chunk):
        part = _moments((draw(sample, min(chunk, num_samples - start), generator) - center) / scale)
        parts = [part.num_samples / num_samples * average for average in part[1:]]
        total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]
    assert total is not None
    return Moments(num_samples, *total)


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


def mean_agrees(
    moments: Moments, mean: Tensor, scale: Tensor, *, covariance: Tensor | None = None, false_alarm: float
) -> Check:
    """Test a mean (D,), which was the center of the moments, in standard deviations ``scale`` (D,).

    With the claimed covariance (D, D), a feature of variance zero must not move, and one that never moved gets the
    largest probability with which that happens under the claimed mean and variance.
    """
    variance, skewness = _of_features(moments)
    floor = ROUNDING * (1 + mean.abs() / scale)
    found = {"claimed": mean, "actual": mean + moments.first * scale}
    fixed, unmoved = torch.zeros(len(mean), dtype=torch.bool), torch.full_like(mean, torch.nan)
    if covariance is not None:
        fixed = covariance.diagonal() == 0
        # a value c of probability 1 - q leaves (mean - c)^2 <= q ((mean - c)^2 + variance)
        unmoved = moments.num_samples * -torch.log1p(moments.first.square())
    return _z_test(
        "mean",
        moments.first,
        variance,
        skewness,
        floor=floor,
        fixed=fixed,
        unmoved=unmoved,
        num=moments.num_samples,
        false_alarm=false_alarm,
        found=found,
    )


def covariance_agrees(
    moments: Moments, mean: Tensor, scale: Tensor, covariance: Tensor, *, false_alarm: float
) -> Check:
    """Test a covariance (D, D), in units of s_i s_j for the standard deviations ``scale`` (D,).

    Products are taken about the claimed mean, where their average has a known error; a mean that is wrong shows here
    too.
    """
    units = scale[:, None] * scale
    variance, skewness = _of_products(moments)
    shifts = ROUNDING * (mean.abs() / scale).clamp(min=1)  # of a draw, and so of the mean of all
    floor = shifts[:, None] + shifts + shifts[:, None] * shifts
    rows, columns = torch.tril_indices(len(mean), len(mean))
    error = (moments.second - covariance / units)[rows, columns]
    found = {"claimed": covariance, "actual": moments.second * units}
    fixed = covariance.diagonal() == 0
    still = _of_features(moments)[0] == 0
    unmoved = torch.where(still[:, None] | still, torch.nan, -torch.inf).to(error)
    return _z_test(
        "covariance",
        error,
        variance[rows, columns],
        skewness[rows, columns],
        floor=floor[rows, columns],
        fixed=(fixed[:, None] | fixed)[rows, columns],
        unmoved=unmoved[rows, columns],
        num=moments.num_samples,
        false_alarm=false_alarm,
        found=found,
    )


def without_skewness(ratio: Tensor, skewness: Tensor) -> Tensor:
    """Return Hall's transformation of Student's ratio of an average, given the skewness of the average itself."""
    return ratio + skewness / 3 * ratio.square() + skewness.square() / 27 * ratio.pow(3) + skewness / 6


def draw(sample: Sampler, num_samples: int, generator: torch.Generator) -> Tensor:
    """Return draws (N, D) in float64, a law on the line as one column."""
    draws = sample(num_samples, generator)
    if not isinstance(draws, Tensor):
        raise TypeError(f"sample({num_samples}, generator) returned {type(draws).__name__}, expected a tensor (N, D)")
    draws = draws[:, None] if draws.dim() == 1 else draws
    if draws.dim() != 2 or len(draws) != num_samples or not draws.shape[1]:
        raise ValueError(f"sample({num_samples}, generator) returned shape {tuple(draws.shape)}, expected (N, D)")
    if draws.is_complex():
        raise ValueError("sample returned complex numbers: return real and imaginary parts as columns")
    return draws.detach().to(torch.float64)


def _moments(y: Tensor) -> Moments:
    """Return the moments of standardised draws (N, D)."""
    squares, cubes = y.square(), y.pow(3)
    second, fourth, sixth = (powers.T @ powers / len(y) for powers in (y, squares, cubes))
    return Moments(len(y), y.mean(0), second, fourth, cubes.mean(0), sixth)


def _central(first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor]:
    """Return the variance and the skewness of variables with these moments about zero; both zero for a constant."""
    variance = second - first.square()
    rounding = CHUNK * torch.finfo(torch.float64).eps  # of a sum of so many numbers
    variance = torch.where(variance > rounding * second, variance, 0.0)
    skewness = (third - 3 * first * second + 2 * first.pow(3)) / variance.pow(1.5)
    return variance, torch.where(variance > 0, skewness, 0.0)


def _of_features(moments: Moments) -> tuple[Tensor, Tensor]:
    """Return the variance and the skewness (D,) of the standardised features."""
    return _central(moments.first, moments.second.diagonal(), moments.third)


def _of_products(moments: Moments) -> tuple[Tensor, Tensor]:
    """Return the variance and the skewness (D, D) of the products of two standardised features."""
    return _central(moments.second, moments.fourth, moments.sixth)


def _z_test(
    name: str,
    error: Tensor,
    variance: Tensor,
    skewness: Tensor,
    *,
    floor: Tensor,
    fixed: Tensor,
    unmoved: Tensor,
    num: int,
    false_alarm: float,
    found: dict[str, Any],
) -> Check:
    """Test that averages of ``num`` draws differ from their expectations by ``error`` (M,), by chance alone.

    Args:
        name: of the check.
        error: average less expectation.
        variance, skewness: (M,), of what is averaged.
        floor: (M,), the largest error that is rounding.
        fixed: (M,), whether it cannot vary under the claim.
        unmoved: (M,), the log probability under the claim that it did not vary, NaN where the claim says nothing.
        num: the number of draws.
        false_alarm: the probability of refuting a right claim, for all entries together.
        found: the counterexample.
    """
    standard_error = torch.where(fixed, 0.0, (variance / num).sqrt())
    wrong = error.abs() > floor
    adjust = skewness / num**0.5
    ratio = without_skewness(error / standard_error, adjust)
    p_values = 2 * torch.as_tensor(stats.t.sf(ratio.abs().numpy(), num - 1))
    p_values = torch.where(variance == 0, unmoved.exp(), p_values)
    p_values = torch.where(adjust.abs() > LARGEST_SKEWNESS, torch.nan, p_values)
    p_values = torch.where(fixed, 0.0, p_values)
    p_values = torch.where(wrong, p_values, 1.0)
    unknown = p_values.isnan()
    worst = int(p_values.nan_to_num(2.0).argmin())
    p_value = min(1.0, len(error) * float(p_values[worst]))
    quantile = float(stats.t.isf(false_alarm / len(error) / 2, num - 1))
    if unknown.any() and not p_value < false_alarm:
        rare = f"in {int(unknown.sum())} of {len(error)} entries the draws hold too few rare values to know the error"
        return Check(name, False, math.nan, math.nan, detail=f"{num} draws; {rare}")
    passed = p_value >= false_alarm
    sampling = (quantile + float(stats.norm.isf(false_alarm / len(error)))) * standard_error
    seen = float(torch.maximum(sampling, floor).max())
    if passed and bool((~fixed & (floor > sampling.clamp_min(BLIND))).any()):
        hidden = f"rounding of the draws hides errors of up to {float(floor.max()):.2g} standard deviations of the law"
        return Check(name, False, math.nan, math.nan, detail=f"{num} draws; {hidden}: subtract the mean in the sampler")
    return Check(
        name,
        passed,
        float(error[worst].abs()),
        float(torch.maximum(quantile * standard_error[worst], floor[worst])),
        p_value,
        None if passed else found,
        f"{num} draws; in {len(error)} entries errors above {seen:.2g} standard deviations of the law are seen",
    )


def _wrong_shape(name: str, claimed: Tensor, expected: tuple[int, ...]) -> Check:
    reason = f"the claimed {name} has shape {tuple(claimed.shape)}, the draws need {expected}"
    return Check(f"shape of the {name}", False, float("nan"), 0.0, counterexample={"claimed": claimed}, detail=reason)


assert_moments = asserting(verify_moments)
