"""Uniformity: whether p-values, or any numbers between 0 and 1, look like independent draws from the uniform law.

Their empirical distribution function is held against a band that contains it everywhere at once with a given
probability: pointwise binomial intervals at a level gamma that is adjusted so that all evaluation points hold together
(Säilynoja, Bürkner and Vehtari, Statistics and Computing 32, 2022, section 2). The probability of staying inside is
computed by their recursion over the evaluation points, not simulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from mixproof.inference.validation import check_probability
from mixproof.inference.verification.report import Check

BISECTIONS = 40
AT_LEAST = 1 + 1e-9
"""A level times this has intervals that leave out the counts that have the level itself."""


@cache
def simultaneous_level(num_values: int, num_points: int | None = None, *, probability: float = 0.95) -> float:
    """Return the level gamma at which all pointwise intervals hold at once with a probability.

    Args:
        num_values: N, how many values the empirical distribution function is made of.
        num_points: K, the function is evaluated at 1/K, ..., (K - 1)/K; None for as many as values.
        probability: with which the whole function lies in the band, if the values are uniform.

    Returns:
        gamma: the largest level, to nine digits, whose band holds with at least that probability. Each pointwise
        interval has the probability 1 - gamma.

    Raises:
        ValueError: the probability is not in (0, 1), or there is no value or evaluation point.
    """
    check_probability(probability, "probability")
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if probability_inside(*_counts(num_values, num_points, middle)) >= probability:
            low = middle
        else:
            high = middle
    return low


def simultaneous_band(
    num_values: int, num_points: int | None = None, *, probability: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the evaluation points (K - 1,), and the lower and upper end of the band at each, as shares of the values.

    The arguments are those of ``simultaneous_level``.
    """
    gamma = simultaneous_level(num_values, num_points, probability=probability)
    lower, upper, _ = _counts(num_values, num_points, gamma)
    num_points = num_values if num_points is None else num_points
    return np.arange(1, num_points) / num_points, lower / num_values, upper / num_values


def probability_inside(lower: NDArray[np.int64], upper: NDArray[np.int64], num_values: int) -> float:
    """Return the probability that counts of uniform values below 1/K, ..., (K - 1)/K all lie in their intervals.

    The counts in the K cells are multinomial, which is the law of independent Poisson counts with mean N / K given
    their sum N: the recursion from one evaluation point to the next is then a convolution.

    Args:
        lower, upper: (K - 1,), the ends of the intervals, both allowed.
        num_values: N.
    """
    mean = num_values / (len(lower) + 1)
    low = np.append(lower, num_values)
    high = np.append(upper, num_values)
    longest = int(mean + 10 * mean**0.5 + 30)  # by Chernoff's bound, larger counts have probability below 1e-20
    kernel = stats.poisson.pmf(np.arange(longest + 1), mean)
    inside, start = np.ones(1), 0
    for first, last in zip(low.tolist(), high.tolist(), strict=True):
        spread = np.convolve(inside, kernel)[max(first - start, 0) : last - start + 1]
        inside = np.concatenate([np.zeros(max(start - first, 0)), spread])
        start = first
        if not inside.any():
            return 0.0
    return float(inside.sum() / stats.poisson.pmf(num_values, num_values))


def uniform(
    values: Sequence[float] | Tensor,
    *,
    num_points: int | None = None,
    probability: float = 0.95,
    conservative: bool = False,
    name: str = "uniform",
) -> Check:
    """Test that values are independent draws from the uniform law: their distribution function lies in its band.

    Args:
        values: N numbers between 0 and 1.
        num_points: K of ``simultaneous_level``; None for as many as values, at most a thousand.
        probability: with which uniform values pass.
        conservative: whether values may be larger than uniform ones, as p-values under a correction for several tests
            are: then only the upper end of the band counts, and uniform values pass more often.
        name: of the check.

    Returns:
        A check, whose error is the distance of the function from the uniform one at the worst place, and whose
        p-value is the exact probability of values as unlikely somewhere as these are; it passes where that is above
        1 - probability.

    Raises:
        ValueError: there are no values, or one is outside [0, 1].
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    if not len(x) or not (x[0] >= 0 and x[-1] <= 1):
        raise ValueError("the values must be numbers between 0 and 1, at least one")
    num_points = min(len(x), 1000) if num_points is None else num_points
    where, lower, upper = simultaneous_band(len(x), num_points, probability=probability)
    counts = np.searchsorted(x, where, side="right")
    tails = [stats.binom.sf(counts - 1, len(x), where)]
    over = counts / len(x) - upper
    if not conservative:
        tails.append(stats.binom.cdf(counts, len(x), where))
        over = np.maximum(over, lower - counts / len(x))
    level = 2 * min(float(tail.min()) for tail in tails) * AT_LEAST
    inside = probability_inside(*_counts(len(x), num_points, level)) if level < 1 else 0.0
    worst = int(over.argmax())
    passed = bool(over[worst] <= 0)
    share = counts[worst] / len(x)
    allowed = float(max(upper[worst] - where[worst], where[worst] - lower[worst]))
    band = (float(lower[worst]), float(upper[worst]))
    found = {"at": float(where[worst]), "share below": float(share), "band": band}
    return Check(
        name,
        passed,
        abs(float(share - where[worst])),
        allowed,
        max(0.0, 1 - inside),
        None if passed else found,
        f"{len(x)} values at {len(where)} points, {'at least ' if conservative else ''}uniform",
    )


def _counts(num_values: int, num_points: int | None, gamma: float) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Return the ends of the pointwise intervals at level gamma, as counts, and the number of values."""
    num_points = num_values if num_points is None else num_points
    if num_values < 1 or num_points < 2:
        raise ValueError(f"a band needs a value and two cells, got {num_values} and {num_points}")
    where = np.arange(1, num_points) / num_points
    lower = stats.binom.ppf(gamma / 2, num_values, where).astype(np.int64).clip(0)
    return lower, num_values - lower[::-1], num_values
