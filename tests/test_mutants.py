"""The mutation view: the mutants are those it says, and a mutant that no check notices is reported."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor

from mixproof.models import gaussian_full
from tests.conftest import load_script

view = load_script("benchmarks/mutants.py")

# Tiny functions


def log_gap(x: Tensor, y: Tensor) -> Tensor:
    """Return the logarithm of a difference."""
    return (x - y).log()


def doubled_sums(x: Tensor) -> Tensor:
    total = 2 * x.mT[..., None].sum(-2, keepdim=True)
    return total.clamp(0, 1.5)


def larger(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if y is None:
        return x
    return torch.where(x > y, x, y), x @ y


def half_square(x: Tensor) -> Tensor:
    return (x - 1).square().sum() / 2


def count_down(n: int) -> int:
    while n > 0:
        n = n - 1
    return n


def log_twice(x: Tensor) -> Tensor:
    return log_gap(x, -x)


EXPECTED: dict[Any, list[tuple[str, str]]] = {
    log_gap: [
        ("operator", "return (x + y).log()"),
        ("operand order", "return (y - x).log()"),
        ("sign added", "return (-x - y).log()"),
        ("dropped operand", "return x.log()"),
        ("dropped operand", "return y.log()"),
        ("dropped call", "return x - y"),
    ],
    doubled_sums: [
        ("constant", "total = 3 * x.mT[..., None].sum(-2, keepdim=True)"),
        ("constant", "total = 1 * x.mT[..., None].sum(-2, keepdim=True)"),
        ("dropped mT", "total = 2 * x[..., None].sum(-2, keepdim=True)"),
        ("dropped index", "total = 2 * x.mT.sum(-2, keepdim=True)"),
        ("moved None", "total = 2 * x.mT[...,].sum(-2, keepdim=True)"),
        ("moved None", "total = 2 * x.mT[None, ...].sum(-2, keepdim=True)"),
        ("constant", "total = 2 * x.mT[..., None].sum(-3, keepdim=True)"),
        ("constant", "total = 2 * x.mT[..., None].sum(-1, keepdim=True)"),
        ("sign dropped", "total = 2 * x.mT[..., None].sum(2, keepdim=True)"),
        ("constant", "total = 2 * x.mT[..., None].sum(-2, keepdim=False)"),
        ("dropped keyword", "total = 2 * x.mT[..., None].sum(-2)"),
        ("dropped call", "total = 2 * x.mT[..., None]"),
        ("operator", "total = 2 / x.mT[..., None].sum(-2, keepdim=True)"),
        ("dropped operand", "total = 2"),
        ("dropped operand", "total = x.mT[..., None].sum(-2, keepdim=True)"),
        ("sign added", "total = -(2 * x.mT[..., None].sum(-2, keepdim=True))"),
        ("constant", "return total.clamp(1, 1.5)"),
        ("constant", "return total.clamp(-1, 1.5)"),
        ("constant", "return total.clamp(0, 3.0)"),
        ("constant", "return total.clamp(0, 2.5)"),
        ("swapped arguments", "return total.clamp(1.5, 0)"),
        ("dropped call", "return total"),
    ],
    larger: [
        ("comparison", "if y is not None:"),
        ("sign added", "return -x"),
        ("comparison", "return (torch.where(x >= y, x, y), x @ y)"),
        ("comparison", "return (torch.where(x < y, x, y), x @ y)"),
        ("swapped arguments", "return (torch.where(x, x > y, y), x @ y)"),
        ("swapped arguments", "return (torch.where(x > y, y, x), x @ y)"),
        ("sign added", "return (torch.where(-(x > y), x, y), x @ y)"),
        ("sign added", "return (torch.where(x > y, -x, y), x @ y)"),
        ("sign added", "return (torch.where(x > y, x, -y), x @ y)"),
        ("dropped call", "return (x > y, x @ y)"),
        ("operand order", "return (torch.where(x > y, x, y), y @ x)"),
        ("dropped operand", "return (torch.where(x > y, x, y), x)"),
        ("dropped operand", "return (torch.where(x > y, x, y), y)"),
        ("swapped arguments", "return (x @ y, torch.where(x > y, x, y))"),
        ("sign added", "return (-torch.where(x > y, x, y), x @ y)"),
        ("sign added", "return (torch.where(x > y, x, y), -(x @ y))"),
    ],
}


@pytest.mark.parametrize("function", EXPECTED, ids=lambda function: function.__name__)
def test_mutants_are_these(function: FunctionType) -> None:
    found = view.mutants("tiny", function)
    assert Counter((mutant.operator, mutant.after) for mutant in found) == Counter(EXPECTED[function])


def test_code_of_a_mutant_computes_what_its_text_says() -> None:
    found = {mutant.after: FunctionType(mutant.code, globals()) for mutant in view.mutants("tiny", log_gap)}
    x, y = torch.tensor([5.0, 9.0]).double(), torch.tensor([2.0, 4.0]).double()
    expected = {
        "return (x + y).log()": (x + y).log(),
        "return (y - x).log()": (y - x).log(),
        "return (-x - y).log()": (-x - y).log(),
        "return x.log()": x.log(),
        "return y.log()": y.log(),
        "return x - y": x - y,
    }
    for text, function in found.items():
        torch.testing.assert_close(function(x, y), expected[text], rtol=0, atol=0, equal_nan=True)
    assert log_gap(x, y).equal((x - y).log()), "the function itself stays as it is"


def test_mutants_know_their_line() -> None:
    lines = Path(__file__).read_text().splitlines()
    for function in EXPECTED:
        for mutant in view.mutants("tiny", function):
            assert lines[mutant.line - 1].split("=")[0].strip() == mutant.before.split("=")[0].strip().replace(
                "return (torch.where(x > y, x, y), x @ y)", "return torch.where(x > y, x, y), x @ y"
            )


# The fates


def survey(functions: dict[str, Any], checks: list[Any], probes: list[Any]) -> dict[str, tuple[str, str]]:
    """Return fate and killer of each mutant of the functions, by its statement."""
    found = [mutant for name, function in functions.items() for mutant in view.mutants(name, function)]
    measured = view.measured(checks, functions, 2)
    outcomes = list(view.survey(found, functions, measured, {"tiny": probes}, 2))
    assert len(outcomes) == len(found)
    return {outcome.mutant.after: (outcome.fate, outcome.killer) for outcome in outcomes}


def half_square_scales() -> bool:
    x = torch.tensor([3.0, 5.0])
    return bool(4 * half_square(x + 1) == half_square(2 * x + 1))


def half_square_is_right() -> bool:
    return half_square(torch.tensor([3.0, 5.0])).item() == 10


PROBES = [lambda: half_square(torch.tensor([3.0, -5.0])), lambda: half_square(torch.zeros(3))]


def test_mutant_that_no_check_notices_is_reported() -> None:
    functions: dict[str, Any] = {"tiny.half_square": half_square}
    scales = view.Check("scales", half_square_scales)
    fates = survey(functions, [scales], PROBES)
    survivors = {after for after, (fate, _) in fates.items() if fate == "survived"}
    assert survivors == {
        "return (x - 1).square().sum() * 2",
        "return (x - 1).square().sum() / 1",
        "return (x - 1).square().sum() / 3",
        "return (x - 1).square().sum()",
        "return -((x - 1).square().sum() / 2)",
    }
    equivalent = {after for after, (fate, _) in fates.items() if fate == "equivalent"}
    assert equivalent == {"return (1 - x).square().sum() / 2"}
    assert fates["return (x + 1).square().sum() / 2"] == ("killed", "scales")
    assert fates["return (x - 1).square() / 2"] == ("killed", "scales (exit 1)")  # the truth of two numbers raises
    sharper = survey(functions, [scales, view.Check("is right", half_square_is_right)], PROBES)
    assert {fate for fate, _ in sharper.values()} == {"killed", "equivalent"}
    assert sharper["return (x - 1).square().sum() * 2"] == ("killed", "is right")


def test_endless_mutant_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "PATIENCE", 0.5)
    started = time.perf_counter()
    fates = survey(
        {"tiny.count_down": count_down}, [view.Check("ends", lambda: count_down(3) == 0)], [lambda: count_down(2)]
    )
    assert fates["n = n + 1"] == ("killed", "a probe (time limit)")
    assert time.perf_counter() - started < 60


def test_check_about_another_file_or_function_is_not_asked() -> None:
    functions: dict[str, Any] = {"tiny.half_square": half_square, "tiny.log_gap": log_gap}
    checks = [
        view.Check(name, half_square_is_right, file) for name, file in [("elsewhere", "other"), ("right", "tiny")]
    ]
    killers = {killer.split(" ")[0] for _, killer in survey(functions, checks, [*PROBES, probe_of_log_gap]).values()}
    assert "right" in killers
    assert "elsewhere" not in killers
    fates = survey(functions, checks[:1], [*PROBES, probe_of_log_gap])  # no check is about the file: others share it
    assert "elsewhere" in {killer.split(" ")[0] for _, killer in fates.values()}
    measured = {check.name: check for check in view.measured(checks, functions, 2)}
    assert measured["right"].calls == {"tiny.half_square"}
    assert 0 < measured["right"].seconds < math.inf


def probe_of_log_gap() -> Tensor:
    return log_gap(torch.tensor(3.0), torch.tensor(1.0))


def test_check_that_fails_without_a_mutation_is_refused() -> None:
    with pytest.raises(RuntimeError, match="broken fails without a mutation"):
        view.measured([view.Check("broken", lambda: False)], {}, 1)


def test_every_module_that_imported_a_function_runs_its_mutant() -> None:
    """``gaussian_full`` has imported ``log_det`` by name before it is mutated."""
    functions = view.targets()
    name = "positive_definite.log_det"
    params = gaussian_full.Params(torch.ones(1), torch.zeros(1, 2), torch.tensor([[[2.0, 0.5], [0.5, 1.0]]]))
    expected = torch.distributions.MultivariateNormal(params.locs[0], params.covariances[0]).log_prob(torch.ones(2))

    def right() -> bool:
        return bool((gaussian_full.log_joint(params, torch.ones(1, 2)) - expected).abs() < 1e-6)

    found = view.mutants(name, functions[name])
    measured = view.measured([view.Check("density", right)], functions, 1)
    assert {name, "gaussian_full.log_joint", "positive_definite.cholesky"} <= measured[0].calls
    probes = {"positive_definite": list(view.matrix_probes(functions))}
    outcomes = list(view.survey(found, functions, measured, probes, 2))
    fates = Counter(outcome.fate for outcome in outcomes)
    assert fates["killed"] >= 10
    assert "return 3 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)" in {
        outcome.mutant.after for outcome in outcomes if outcome.fate == "killed"
    }
    assert right()


def test_targets_are_the_mathematics_and_what_it_calls() -> None:
    names = set(view.targets())
    assert {"laplace.weighted_median", "gaussian_sum._summand_statistics", "bernoulli._log_beta"} <= names
    assert {"gaussian_full.draw", "conjugate.draw_gamma", "gaussian_isotropic.GaussianIsotropic.posterior"} <= names
    assert {"gaussian_sum.KnownNoise.moments", "positive_definite.cholesky", "gaussian_tied.m_step"} <= names
    assert not any(name.rsplit(".", 1)[1] in ("model", "sample", "init_params", "partition") for name in names)


# Draws


def two_normals(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    options: Any = {"generator": generator, "dtype": torch.float64}
    return torch.randn(3, **options), torch.randn(2, **options)


@pytest.mark.parametrize(
    ("change", "equal"),
    [
        (lambda u, v: (u, v.flip(0), u[0] * v), True),
        (lambda u, v: (-u, v.flip(0), -u[0] * v), True),
        (lambda u, v: (-u, -v.flip(0), u[0] * v), True),
        (lambda u, v: (u, v.flip(0), -u[0] * v), False),
        (lambda u, v: (u, v, u[0] * v), False),
        (lambda u, v: (u, v.flip(0), u[0] * v + 1e-9), False),
        (lambda u, v: (u, v.abs().flip(0), u[0] * v), False),
    ],
)
def test_signs_of_normal_variables_do_not_count(change: Any, equal: bool) -> None:
    def found(function: Any) -> Any:
        return view.over_signs(lambda generator: function(*two_normals(generator)))

    assert view.same(found(change), found(lambda u, v: (u, v.flip(0), u[0] * v))) == equal


# Equality of results, and the report


@pytest.mark.parametrize(
    ("found", "expected", "equal"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), True),
        (torch.ones(2).double(), torch.ones(2).double() + 1e-14, True),
        (torch.ones(2).double(), torch.ones(2).double() + 1e-9, False),
        (torch.tensor([1e-20]).double(), torch.tensor([2e-20]).double(), False),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]), True),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, 0.0]), False),
        (torch.tensor([math.inf]), torch.tensor([-math.inf]), False),
        (torch.tensor([math.inf]), torch.tensor([math.nan]), False),
        (torch.tensor([1.0]), torch.tensor([[1.0]]), False),
        (torch.tensor([1.0]), torch.tensor([1.0]).double(), False),
        ((torch.tensor(1.0), torch.tensor(2.0)), (torch.tensor(1.0),), False),
        (ValueError, torch.tensor(1.0), False),
        (ValueError, TypeError, False),
        (ValueError, ValueError, True),
    ],
)
def test_results_are_the_same_to_rounding(found: Any, expected: Any, equal: bool) -> None:
    assert view.same(found, expected) == equal


def test_table_counts_fates() -> None:
    one, two = view.mutants("tiny.log_gap", log_gap)[:2]
    outcomes = [
        view.Outcome(one, "killed", "a"),
        view.Outcome(one, "equivalent", ""),
        view.Outcome(two, "survived", ""),
        view.Outcome(two, "killed", "b"),
        view.Outcome(two, "killed", "b"),
    ]
    row, total = view.table(outcomes).splitlines()[1:]
    assert row.split() == ["tiny", "5", "1", "4", "3", "1", "75.0"]
    assert total.split()[1:] == row.split()[1:]


def test_list_prints_mutants_and_runs_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["mutants.py", "--list", "--family", "positive_definite"])
    view.main()
    printed = capsys.readouterr().out
    assert "positive_definite.outer, line" in printed
    assert "    + return 3 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)" in printed
