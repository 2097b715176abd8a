"""Limits: true ones hold at their rates; what no power describes is undecided."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mixproof.inference.verification import assert_limit, verify_limit
from tests.claims import SEED, failed, softmax, tensor

TRUE_LIMITS: dict[str, tuple] = {
    "linear": (lambda e: 1 + e, 1.0, "eps^1.00"),
    "quadratic": (math.cos, 1.0, "eps^2.00"),
    "square root": (lambda e: 2 + e**0.5 + e, 2.0, "eps^0.50"),
    "slow": (lambda e: 1 + e**0.1, 1.0, "eps^0.10"),
    "logarithm": (lambda e: e * math.log(e), 0.0, "eps^0.9"),
    "cancelling": (lambda e: (math.exp(e) - 1) / e, 1.0, "eps^1.00"),
    "no ties": (softmax([3.0, 2.0, 1.0]), tensor([1.0, 0, 0]), "faster than any power"),
    "ties": (softmax([3.0, 3.0, 1.0]), tensor([0.5, 0.5, 0]), "faster than any power"),
    "damped oscillation": (lambda e: e * math.sin(1 / e), 0.0, "eps"),
    "divergence": (lambda e: -math.log(e), math.inf, "diverges"),
    "overflow": (lambda e: -((1 / e) ** 30), -math.inf, "diverges"),
    "mixed": (lambda e: tensor([1 / e, e]), tensor([math.inf, 0.0]), ""),
}
FALSE_LIMITS: dict[str, tuple] = {
    "another limit": (lambda e: 1 + e, 1.001),
    "relative 1e-9": (lambda e: (math.exp(e) - 1) / e, 1 + 1e-9),
    "square root, 1e-8": (lambda e: 2 + e**0.5 + e, 2 + 1e-8),
    "ties forgotten": (softmax([3.0, 3.0, 1.0]), tensor([1.0, 0, 0])),
    "oscillation": (lambda e: math.sin(1 / e), 0.0),
    "divergence": (lambda e: 1 / e, 0.0),
    "wrong infinity": (lambda e: 1 / e, -math.inf),
    "bounded": (lambda e: 2 - e, math.inf),
    "shape": (lambda e: torch.ones(2) * e, torch.zeros(3)),
}


@pytest.mark.parametrize("name", TRUE_LIMITS)
def test_true_limits_hold_at_the_right_rate(name: str) -> None:
    sequence, limit, rate = TRUE_LIMITS[name]
    assert rate in assert_limit(sequence, limit, seed=SEED).checks[0].detail


@pytest.mark.parametrize("name", FALSE_LIMITS)
def test_false_limits_are_refuted(name: str) -> None:
    report = verify_limit(*FALSE_LIMITS[name], seed=SEED)
    assert report.verdict == "refuted"
    assert {"eps", "claimed", "actual"} <= set(report.checks[0].counterexample or {})


def test_limit_that_no_power_describes_is_undecided() -> None:
    assert verify_limit(lambda e: 1 / (1 - math.log(e)), 0.0, seed=SEED).verdict == "undecided"
    assert verify_limit(lambda e: math.nan, 0.0, seed=SEED).verdict == "undecided"


def versine(power: int) -> Callable[[float], float]:
    """Return what cancels to 0 below 1e-8, where the cosine of eps is 1 to the last digit and moves with no eps."""
    return lambda e: (1 - math.cos(e)) / e**power


@pytest.mark.parametrize("first", [0.5, 0.35])
def test_limit_before_digits_cancel_and_number_after_are_not_confused(first: float) -> None:
    at = [first * 2.0**-k for k in range(40)]
    for power, claim in ((2, 0.5), (4, math.inf)):
        report = verify_limit(versine(power), claim, seed=SEED, at=at)
        assert report.verdict == "undecided"
        assert "Choose an `at` that ends before" in report.checks[0].detail
        assert verify_limit(versine(power), 0.0, seed=SEED, at=at).verdict != "holds"
    assert verify_limit(versine(2), 0.4, seed=SEED, at=at).verdict == "refuted"


def test_limit_is_decided_by_what_comes_before_the_cancellation() -> None:
    at = [2.0**-k for k in range(1, 25)]
    assert_limit(versine(2), 0.5, seed=SEED, at=at)
    for claim in (0.0, 0.5001):
        assert verify_limit(versine(2), claim, seed=SEED, at=at).verdict == "refuted"


@pytest.mark.parametrize(
    ("terms", "verdicts"), [(2, ["holds", "refuted"]), (3, ["undecided"] * 2), (4, ["undecided"] * 2)]
)
def test_values_that_rounding_has_swamped_say_nothing(terms: int, verdicts: list[str]) -> None:
    """The remainders of the exponential series, of which nothing is left at 1e-14: of the later ones, soon."""

    def remainder(e: float) -> float:
        return (math.exp(e) - sum(e**n / math.factorial(n) for n in range(terms))) / e**terms

    claims = (1 / math.factorial(terms), 1.001 / math.factorial(terms))
    assert [verify_limit(remainder, claim, seed=SEED).verdict for claim in claims] == verdicts


def test_a_wrong_entry_is_refuted_beside_one_that_rounding_swamps() -> None:
    def sequence(e: float) -> Tensor:
        return tensor([(math.exp(e) - 1 - e - e**2 / 2 - e**3 / 6) / e**4, 1 + e])

    for second, verdict in ((1.0, "undecided"), (1.001, "refuted")):
        assert verify_limit(sequence, tensor([1 / 24, second]), seed=SEED).verdict == verdict


RATES: dict[str, tuple] = {
    "linear": (lambda e: 1 + e, 1.0, 1.0),
    "quadratic": (math.cos, 1.0, 2.0),
    "cubic": (lambda e: math.sin(e) - e, 0.0, 3.0),
    "square root with a linear term": (lambda e: 2 + e**0.5 + e, 2.0, 0.5),
    "cube root": (lambda e: e ** (1 / 3) + e ** (2 / 3), 0.0, 1 / 3),
    "slow": (lambda e: 1 + e**0.1, 1.0, 0.1),
    "a close second power": (lambda e: e + e**1.1, 0.0, 1.0),
    "cancelling": (lambda e: (math.exp(e) - 1) / e, 1.0, 1.0),
    "the slowest entry": (lambda e: tensor([1 + e, e**2, 3.0]), tensor([1.0, 0, 3]), 1.0),
    "exact entries": (lambda e: tensor([1.0, e**2]), tensor([1.0, 0]), 2.0),
    "softmax": (softmax([3.0, 2.0, 1.0]), tensor([1.0, 0, 0]), math.inf),
    "constant": (lambda e: 1.0, 1.0, math.inf),
}


@pytest.mark.parametrize("name", RATES)
def test_claimed_rates(name: str) -> None:
    sequence, limit, rate = RATES[name]
    assert_limit(sequence, limit, rate=rate, seed=SEED)
    wrong = [1.0, 2.0] if rate == math.inf else [rate * 1.1, rate * 0.9, rate + 1, math.inf]
    for claim in wrong:
        report = verify_limit(sequence, limit, rate=claim, seed=SEED)
        assert report.verdict == "refuted"
        assert failed(report) == ["converges at the rate"]


def test_rate_that_does_not_settle_is_undecided() -> None:
    for sequence in (lambda e: e * math.log(e), lambda e: e * math.sin(1 / e)):
        assert verify_limit(sequence, 0.0, rate=1.0, seed=SEED).verdict == "undecided"
    single = verify_limit(lambda e: torch.tensor(1 + e, dtype=torch.float32), 1.0, rate=1.0, seed=SEED)
    assert single.verdict == "undecided"


@pytest.mark.parametrize(("limit", "rate"), [(0.0, 0.0), (0.0, -1.0), (0.0, math.nan), (math.inf, 1.0)])
def test_rate_must_be_positive_and_towards_a_number(limit: float, rate: float) -> None:
    with pytest.raises(ValueError, match="positive power"):
        verify_limit(lambda e: e, limit, rate=rate, seed=SEED)


def test_limit_needs_a_geometric_sequence() -> None:
    with pytest.raises(ValueError, match="constant factor"):
        verify_limit(lambda e: e, 0.0, seed=SEED, at=[0.1, 0.2])
