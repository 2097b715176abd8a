"""Limits: a sequence is followed as its parameter falls to zero, and where it leads is compared with the claim.

With eps = 2^-1, 2^-2, ... an error C eps^p falls by the same factor 2^-p at every step, so that the last three values
give the rate p and, by Aitken's extrapolation (Richardson's with a measured rate), the limit. The error of the
extrapolation is estimated from its last two values and from the rounding of the sequence, which is measured by
changing eps in its last places.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixproof.inference.verification.identity import NUM_PERTURBATIONS, PERTURBATION, ROUNDING
from mixproof.inference.verification.report import Check, Report, asserting, conclude

HALVINGS = tuple(2.0**-k for k in range(1, 49))
RESOLUTION = 2.0**-10
"""A limit that is known less well than this, relative to the sequence's largest value, is not known."""
REGROWTH = 2.0**-16
"""Steps that were this small beside the last one had nearly vanished, and grew again."""
FEWEST = 8
"""From fewer values no limit is estimated."""
RATE_RESOLUTION = 2.0**-4
"""A rate that is known less well than this is not known: those in use are multiples of a half or a third."""


class Estimate(NamedTuple):
    """What a sequence of numbers says about its own limit."""

    limit: float
    error: float
    """A bound on the error of ``limit``; infinite where the sequence does not settle."""
    rate: float
    """p in error ~ eps^p; infinite for faster than any power or exact, NaN where there is none."""


def verify_limit(
    sequence: Callable[[float], Tensor | float],
    limit: Tensor | float,
    *,
    rate: float | None = None,
    seed: int,
    at: Sequence[float] = HALVINGS,
    tolerance: float | None = None,
    subject: str | None = None,
) -> Report:
    """Try to refute that a sequence converges as its parameter falls to zero.

    Args:
        sequence: ``sequence(eps)`` returns a number or a tensor, for eps > 0.
        limit: the claimed limit, of the same shape; entries may be plus or minus infinity (divergence). A number
            stands for all entries.
        rate: the claimed p in error ~ eps^p, infinite for faster than any power; of a tensor it is that of its slowest
            entry. None to test the limit alone.
        seed: of the changes of eps by which the rounding is measured.
        at: the values of eps, falling by a constant factor, at least eight.
        tolerance: the largest accepted scale-free error of the limit; None for what the sequence can resolve.
        subject: the claim in words, for the report.

    Returns:
        A report whose detail says at what rate; undecided where the sequence has no value or is slower than any power,
        and where its digits cancel before its values tell the limit.

    Raises:
        ValueError: ``at`` does not fall by a constant factor, or is too short; a rate is claimed and is not positive,
            or the limit is infinite.
    """
    checks = [converges_to(sequence, limit, seed=seed, at=at, tolerance=tolerance)]
    if rate is not None:
        if not rate > 0 or _tensor(limit).isinf().any():
            raise ValueError(f"a rate is a positive power of eps towards a finite limit, got {rate} towards {limit}")
        if checks[0].passed:
            checks.append(converges_at_rate(sequence, rate, seed=seed, at=at))
    return conclude(subject or "the limit", checks, seed)


def converges_to(
    sequence: Callable[[float], Tensor | float],
    limit: Tensor | float,
    *,
    seed: int,
    at: Sequence[float] = HALVINGS,
    tolerance: float | None = None,
) -> Check:
    """Compare a limit with the extrapolation of its sequence; the arguments are those of ``verify_limit``."""
    name, nan = "converges to the limit", float("nan")
    values, roundings, stopped = follow(sequence, seed=seed, at=at)
    if len(values) < FEWEST:
        return Check(name, False, nan, nan, detail=stopped)
    target = _tensor(limit)
    target = target.expand(values[0].shape) if not isinstance(limit, Tensor) else target
    if target.shape != values[0].shape:
        reason = f"the claimed limit has shape {tuple(target.shape)}, the sequence {tuple(values[0].shape)}"
        found = {"eps": at[0], "claimed": target, "actual": values[0]}
        return Check(name, False, nan, nan, counterexample=found, detail=reason)

    columns, noises = _columns(values, roundings)
    entries = [
        entry_agrees(column, noise, claim, at, tolerance)
        for column, noise, claim in zip(columns, noises, target.flatten().tolist(), strict=True)
    ]
    if not entries:
        return Check(name, True, 0.0, 0.0)
    failed = [entry for entry in entries if not entry.passed]
    refuted = [entry for entry in failed if not math.isnan(entry.error)]
    worst = max(refuted or failed or entries, key=lambda entry: entry.error)
    if not failed:
        worst = max(entries, key=lambda entry: entry.error / entry.tolerance if entry.tolerance else 0.0)
        slow = min(entries, key=lambda entry: 0 if "^" not in entry.detail else -1)
        return worst._replace(detail="; ".join(filter(None, [slow.detail, stopped])))
    if refuted and len(columns) > 1:
        index = entries.index(worst)
        worst = worst._replace(counterexample={"entry": index, **(worst.counterexample or {})})
    return worst


def converges_at_rate(
    sequence: Callable[[float], Tensor | float],
    rate: float,
    *,
    seed: int,
    at: Sequence[float] = HALVINGS,
) -> Check:
    """Compare a claimed rate with the one that the sequence shows; the arguments are those of ``verify_limit``.

    The tolerance is the error of the measured rate. Where the rates at successive values of eps do not settle, as
    under a logarithm, or too few stand clear of the rounding, the claim is undecided.
    """
    name, nan = "converges at the rate", float("nan")
    values, roundings, stopped = follow(sequence, seed=seed, at=at)
    if len(values) < FEWEST:
        return Check(name, False, nan, nan, detail=stopped)
    measured = [
        measure_rate(column, noise, at[0] / at[1]) for column, noise in zip(*_columns(values, roundings), strict=True)
    ]
    known = [(found, error) for found, error in measured if not math.isnan(found)]
    found, error = min(known, default=(nan, nan))
    slower = found + error < rate
    if math.isnan(found) or (len(known) < len(measured) and not slower):
        return Check(name, False, nan, nan, detail="the rate cannot be told from these values")
    distance = 0.0 if found == rate else abs(found - rate)
    passed = distance <= error
    example = {"claimed rate": rate, "measured rate": found, "error of the measurement": error}
    speed = f"error ~ eps^{found:.4g}" if math.isfinite(found) else "faster than any power of eps"
    return Check(name, passed, distance, error, None, None if passed else example, speed)


def follow(
    sequence: Callable[[float], Tensor | float], *, seed: int, at: Sequence[float]
) -> tuple[list[Tensor], list[Tensor], str]:
    """Return the values of a sequence, bounds on their rounding errors, and why it stopped early if it did.

    Raises:
        ValueError: ``at`` does not fall by a constant factor, or is too short.
    """
    factors = [b / a for a, b in itertools.pairwise(at)]
    if len(at) < FEWEST or not all(0 < f < 1 and math.isclose(f, factors[0], rel_tol=1e-9) for f in factors):
        raise ValueError("at needs eight or more positive values that fall by a constant factor")
    generator = torch.Generator().manual_seed(seed)
    values, roundings, stopped = [], [], ""
    for eps in at:
        try:
            raw = sequence(eps)
            value = _tensor(raw)
            signs = (torch.rand(NUM_PERTURBATIONS, generator=generator) * 2 - 1).tolist()
            precision = torch.finfo(
                raw.dtype if isinstance(raw, Tensor) and raw.is_floating_point() else torch.float64
            ).eps
            shifts = [eps * (1 + PERTURBATION * precision * sign) for sign in signs]
            nearby = torch.stack([_tensor(sequence(shift)) for shift in shifts])
        except Exception as error:
            stopped = f"at eps = {eps:.3g} the sequence raised {type(error).__name__}: {error}"
            break
        if value.isnan().any():
            stopped = f"at eps = {eps:.3g} the sequence is NaN"
            break
        values.append(value)
        moved = (nearby - value).abs().amax(0).nan_to_num(0.0, 0.0)
        size = torch.maximum(value.abs(), values[0].abs())
        roundings.append(ROUNDING / PERTURBATION * moved + ROUNDING * precision * size)
    return values, roundings, stopped


def entry_agrees(
    values: Sequence[float],
    rounding: Sequence[float],
    claim: float,
    at: Sequence[float],
    tolerance: float | None = None,
) -> Check:
    """Compare the claimed limit of a sequence of numbers with what its values at ``at``, exact to ``rounding``, say.

    Where all digits may have cancelled from some eps on, what comes before must say the same.
    """
    name, nan = "converges to the limit", float("nan")
    if len(values) < FEWEST:
        return Check(name, False, nan, nan, detail="rounding swamps the sequence before it settles")
    whole = _agrees(values, rounding, claim, at, tolerance)
    size = cancellation(values)
    if size is None:
        return whole
    before = _agrees(values[:size], rounding[:size], claim, at, tolerance)
    if before.passed == whole.passed and not math.isnan(before.error):
        return before
    return Check(
        name, False, nan, nan, None, None,
        f"the sequence leaves its course below eps = {at[size - 1]:.3g}, and in the end stays at {values[-1]:.6g} to "
        "the last digit: all digits may have cancelled there. Choose an `at` that ends before",
    )  # fmt: skip


def _agrees(
    values: Sequence[float], rounding: Sequence[float], claim: float, at: Sequence[float], tolerance: float | None
) -> Check:
    name, nan = "converges to the limit", float("nan")
    found = {"eps": at[len(values) - 1], "actual": values[-1], "claimed": claim}
    if math.isinf(claim):
        rises = [math.copysign(1.0, claim) * (b - a) if a != b else 0.0 for a, b in itertools.pairwise(values)]
        half = rises[len(rises) // 2]
        reached = values[-1] == claim
        diverges = reached or (min(rises[len(rises) // 2 :]) > 0 and rises[-1] >= 0.9 * half)
        return Check(
            name, diverges, 0.0 if diverges else math.inf, 0.0, None, None if diverges else found,
            "diverges, as claimed" if diverges else "the sequence does not diverge to the claimed infinity",
        )  # fmt: skip
    if any(math.isinf(value) for value in values):
        return Check(name, False, math.inf, 0.0, counterexample=found, detail="the sequence is infinite")
    scale = max(abs(claim), abs(values[0]), torch.finfo(torch.float64).tiny)
    estimate = estimate_limit(values, rounding, at[0] / at[1])
    found = {**found, "extrapolated": estimate.limit}
    if math.isinf(estimate.error):
        return Check(name, False, math.inf, 0.0, None, found, "the sequence does not settle")
    if math.isnan(estimate.error):
        return Check(name, False, nan, nan, None, None, "the sequence settles slower than any power of eps")
    allowed = estimate.error / scale if tolerance is None else max(tolerance, estimate.error / scale)
    error = abs(estimate.limit - claim) / scale
    speed = f"error ~ eps^{estimate.rate:.2f}" if math.isfinite(estimate.rate) else "faster than any power of eps"
    passed = error <= allowed
    return Check(name, passed, error, allowed, None, None if passed else found, speed if passed else "another limit")


def cancellation(values: Sequence[float]) -> int | None:
    """Return how many values come before steps that had nearly vanished grew again, to end in one number; or None.

    So ends a difference of ever closer numbers over a power of eps: rounding grows until it is all that is left, and
    then both numbers are equal. Changes of eps in its last places do not show it: cos eps does not change with them.
    """
    steps = [abs(b - a) for a, b in itertools.pairwise(values)]
    last = max((k for k, step in enumerate(steps) if step != 0), default=0)
    if len(steps) - last < 4 or not RESOLUTION * max(map(abs, values)) < steps[last] < math.inf:
        return None
    recent = [max(steps[k - 3 : k]) for k in range(FEWEST - 1, last + 1)]  # of three: a single one may vanish by luck
    least = min(recent, default=math.inf)
    return last + 1 - recent[::-1].index(least) if least <= REGROWTH * steps[last] else None


def estimate_limit(values: Sequence[float], rounding: Sequence[float], factor: float) -> Estimate:
    """Return the limit of a sequence of numbers, as its values themselves tell.

    Args:
        values: at eps, eps / factor, eps / factor^2, ...
        rounding: a bound on the rounding error of each.
        factor: by which eps falls.
    """
    steps = [b - a for a, b in itertools.pairwise(values)]
    candidates = []
    previous = math.nan
    for k in range(2, len(values)):
        last, step = steps[k - 2], steps[k - 1]
        noise = max(rounding[k - 2 : k + 1])
        if max(abs(last), abs(step)) <= noise:
            candidates.append((k, Estimate(values[k], 2 * noise, math.inf)))
            continue
        if abs(step) >= abs(last):
            previous = math.nan
            continue
        ratio = step / last
        limit = values[k] + step * ratio / (1 - ratio)
        error = 4 * abs(limit - previous) / (1 - abs(ratio)) + 4 * noise / (1 - abs(ratio)) ** 2
        previous = limit
        if not math.isnan(error):
            candidates.append((k, Estimate(limit, error, -math.log(max(abs(ratio), 1e-300)) / math.log(factor))))
    rates = _rates(steps, rounding, factor)
    tail = [
        estimate
        for k, estimate in candidates
        if all(
            abs(values[j] - estimate.limit) <= abs(values[k] - estimate.limit) + estimate.error + rounding[j]
            for j in range(k, len(values))
        )
    ]
    best = min(tail, key=lambda estimate: estimate.error, default=Estimate(math.nan, math.inf, math.nan))
    if not best.error <= RESOLUTION * max(abs(value) for value in values):
        third = len(steps) // 3
        shrinks = max(map(abs, steps[-third:])) < 0.5 * max(map(abs, steps[:third]))
        return Estimate(math.nan, math.nan if shrinks else math.inf, math.nan)
    if len(rates) >= 8 and max(rates[-3:]) < 0.75 * rates[len(rates) // 2] and rates[-1] < 0.25:
        return Estimate(best.limit, math.nan, math.nan)
    return best._replace(rate=_measured_rate(rates))


def _rates(steps: Sequence[float], rounding: Sequence[float], factor: float) -> list[float]:
    """Return the rate at every place where two steps stand clear of the rounding."""
    return [
        math.log(abs(a / b)) / math.log(factor)
        for a, b, noise in zip(steps, steps[1:], rounding[2:], strict=False)
        if min(abs(a), abs(b)) > 2**6 * noise
    ]


def measure_rate(values: Sequence[float], rounding: Sequence[float], factor: float) -> tuple[float, float]:
    """Return the rate p at which a sequence of numbers converges, and a bound on its error.

    Both are NaN where it cannot be told; p is infinite where the rates keep growing, or the sequence is constant.

    Args:
        values: at eps, eps / factor, eps / factor^2, ...
        rounding: a bound on the rounding error of each.
        factor: by which eps falls.
    """
    steps = [b - a for a, b in itertools.pairwise(values)]
    if all(abs(step) <= noise for step, noise in zip(steps, rounding[1:], strict=True)):
        return math.inf, 0.0
    rates = _rates(steps, rounding, factor)
    noises = [
        noise * (1 / abs(a) + 1 / abs(b)) / math.log(factor)
        for a, b, noise in zip(steps, steps[1:], rounding[2:], strict=False)
        if min(abs(a), abs(b)) > 2**6 * noise
    ]
    # a step that vanishes in the rounding bounds the last rate from below
    unseen = [
        math.log(abs(a) / (2**6 * noise)) / math.log(factor)
        for a, b, noise in zip(steps, steps[1:], rounding[2:], strict=False)
        if abs(a) > 2**6 * noise >= abs(b)
    ]
    for last in (rates, [*rates, *unseen[-1:]]):
        if len(last) >= 3 and all(b > 1.5 * a for a, b in itertools.pairwise(last[-3:])):
            return math.inf, 0.0
    best = math.nan, math.inf
    for k in range(2, len(rates)):
        before, change = abs(rates[k - 1] - rates[k - 2]), abs(rates[k] - rates[k - 1])
        error = 4 * max(noises[k - 2 : k + 1])
        if change > error:
            ratio = (change + error) / (before - error) if before > error else 1.0
            if ratio > 0.9:  # no geometric approach: a logarithm, or an oscillation
                continue
            error += 4 * change * ratio / (1 - ratio)
        else:  # the changes may still add up, under a logarithm as those of 1 / k
            error *= k + 1
        settled = all(abs(r - rates[k]) <= error + n for r, n in zip(rates[k:], noises[k:], strict=True))
        if settled and error < best[1]:
            best = rates[k], error
    return best if best[1] <= RATE_RESOLUTION else (math.nan, math.nan)


def _measured_rate(rates: Sequence[float]) -> float:
    """Return the rate to which the rates settle, or infinity where they keep growing or none can be measured."""
    if len(rates) < 4 or rates[-1] > 1.5 * rates[-3]:
        return math.inf
    return sorted(rates[-3:])[1]


def _columns(values: Sequence[Tensor], roundings: Sequence[Tensor]) -> tuple[list[list[float]], list[list[float]]]:
    """Return the sequence of each entry, and its rounding errors, up to where rounding has swamped it."""
    found = torch.stack(tuple(values)).reshape(len(values), -1)
    noise = torch.stack(tuple(roundings)).nan_to_num(posinf=0.0).reshape(len(values), -1)
    largest = found.abs().nan_to_num(posinf=0.0).cummax(0).values
    clear = (noise <= RESOLUTION * largest) | (noise <= noise[0])
    sizes = clear.long().cummin(0).values.sum(0).tolist()
    columns = [column[:size] for column, size in zip(found.T.tolist(), sizes, strict=True)]
    return columns, [column[:size] for column, size in zip(noise.T.tolist(), sizes, strict=True)]


def _tensor(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).detach()


assert_limit = asserting(verify_limit)
