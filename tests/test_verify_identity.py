"""Identities: truths hold at many seeds, planted faults are refuted with a counterexample that is simple."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mixproof.inference.verification import (
    Refuted,
    assert_identity,
    binary,
    positive,
    reals,
    simplex,
    unit_interval,
    verify_identity,
)
from tests.claims import SEED, spd, tensor


def woodbury(matrix: Tensor, u: Tensor) -> Tensor:
    inverse = torch.linalg.inv(matrix)
    return inverse - (inverse @ u)[:, None] * (u @ inverse) / (1 + u @ inverse @ u)


TRUE_IDENTITIES: dict[str, tuple] = {
    "woodbury": (woodbury, lambda a, u: torch.linalg.inv(a + u[:, None] * u), spd(4), reals(4)),
    "log det": (torch.logdet, lambda a: torch.linalg.eigvalsh(a).log().sum(), spd(4)),
    "inverse": (lambda a: torch.eye(3, dtype=a.dtype), lambda a: a @ torch.linalg.inv(a), spd(3)),
    "exact zero": (lambda p: torch.zeros((), dtype=p.dtype), lambda p: p + (1 - p) - 1, unit_interval()),
    "cancellation": (
        lambda x: (x + 1e6).square().mean() - (x + 1e6).mean() ** 2,
        lambda x: (x - x.mean()).square().mean(),
        reals(9),
    ),
    "constants and counts": (lambda x, n: x.sum() / n, lambda x, n: x.mean(), binary(4), 4),
    "softmax shift": (lambda x: (x - 700).softmax(0), lambda x: x.softmax(0), reals(4)),
    "infinite on both sides": (lambda x: torch.special.xlogy(x, 0 * x), lambda x: -x / (0 * x), positive(2)),
    "several parts": (lambda x: (x + x, x * x), lambda x: (2 * x, x.square()), reals(2)),
    "entropy on the simplex": (lambda p: -(p * p.log()).sum(), lambda p: torch.special.entr(p).sum(), simplex(3)),
}
FALSE_IDENTITIES: dict[str, tuple] = {
    "relative 1e-9": (lambda x: x.exp() * (1 + 1e-9), torch.exp, reals(3)),
    "transposed": (lambda a, b: b[:, None] * a, lambda a, b: a[:, None] * b, reals(3), reals(3)),
    "n - 1 for n": (lambda x: x.var(), lambda x: (x - x.mean()).square().mean(), reals(5)),
    "wrong sign": (lambda a, u: 2 * torch.linalg.inv(a) - woodbury(a, u), woodbury, spd(3), reals(3)),
    "factor of a half": (torch.logdet, lambda a: torch.logdet(a) / 2, spd(3)),
    "true of positive numbers only": (lambda x: x, lambda x: x.abs(), reals()),
    "one entry": (lambda x: x * (1 + 1e-6 * (torch.arange(4) == 2)), lambda x: 1 * x, reals(4)),
    "NaN": (lambda x: (x - 10).log(), lambda x: x.exp(), reals()),
    "infinite": (lambda x: x / 0, lambda x: x.exp(), positive()),
    "shape": (lambda x: x[None], lambda x: x.exp(), reals(2)),
}


@pytest.mark.parametrize("name", TRUE_IDENTITIES)
def test_true_identities_hold_at_many_seeds(name: str) -> None:
    for seed in range(8):
        assert_identity(*TRUE_IDENTITIES[name], seed=seed)


@pytest.mark.parametrize("name", FALSE_IDENTITIES)
def test_false_identities_are_refuted(name: str) -> None:
    report = verify_identity(*FALSE_IDENTITIES[name], seed=SEED)
    assert report.verdict == "refuted"
    with pytest.raises(Refuted, match="counterexample"):
        assert_identity(*FALSE_IDENTITIES[name], seed=SEED)


def test_exception_of_the_claim_refutes_with_its_text() -> None:
    report = verify_identity(lambda a, x: a @ x[None], lambda a, x: a @ x, spd(3), reals(3), seed=SEED)
    assert report.verdict == "refuted"
    assert "cannot be multiplied" in report.checks[0].detail


@pytest.mark.parametrize("actual", [lambda x: (x - x).log() - (x - x).log(), lambda x: x @ x])
def test_actual_side_without_a_value_leaves_the_claim_undecided(actual: Callable[[Tensor], Tensor]) -> None:
    report = verify_identity(lambda x: x, actual, reals(), seed=SEED)
    assert report.verdict == "undecided"
    assert "actual side" in report.checks[0].detail


def test_counterexample_is_simple_and_stays_in_its_domain() -> None:
    wrong = verify_identity(lambda p, x: p.sum() + x, lambda p, x: p.sum() + x.abs(), simplex(3), reals(), seed=SEED)
    example = wrong.checks[0].counterexample
    assert example is not None
    assert example["x"] == example["x"].round()
    assert example["p"].sum() == pytest.approx(1, abs=1e-13)


def test_constants_reach_both_sides_unchanged() -> None:
    seen: list[object] = []
    flag, table = object(), tensor([1.5, 2.5])

    def claimed(x: Tensor, *rest: Any) -> Tensor:
        seen.append((rest[0] is flag, rest[1], torch.equal(table, rest[2])))
        return x * 2 + 1e-12

    verify_identity(claimed, lambda x, *rest: x + x, reals(), flag, 7, table, seed=SEED)
    assert set(seen) == {(True, 7, True)}


def test_imaginary_parts_are_compared() -> None:
    """The characteristic function of N(2, 1), and that of N(-2, 1)."""

    def function(sign: int) -> Callable[[Tensor], Tensor]:
        return lambda t: torch.exp(torch.complex(-t.square() / 2, sign * 2 * t))

    def frequencies(generator: torch.Generator) -> Tensor:
        return torch.randn(3, generator=generator, dtype=torch.float64)

    assert verify_identity(function(1), function(1), frequencies, seed=0).ok
    assert verify_identity(function(-1), function(1), frequencies, seed=0).verdict == "refuted"
