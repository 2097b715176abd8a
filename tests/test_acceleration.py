"""Accelerated EM ends where EM ends, in fewer passes, never falls, and resumes to the identical trace.

The loop under test and its cases are those of ``benchmarks/acceleration.py``.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mixproof.inference.acceleration import Anderson, _Coordinates
from tests.conftest import Case, load_script

bench = load_script("benchmarks/acceleration.py")
TASKS = bench.tasks()


def fast(task: Any, params: Any, **options: Any) -> Any:
    return bench.climb(task, params, Anderson(task.family, params), **options)


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    for name, value in expected._asdict().items():
        error = (getattr(found, name) - value).abs().max()
        assert error <= tolerance * (1 + value.abs().max()), (name, error)


def test_coordinates_there_and_back_are_the_same_point(case: Case) -> None:
    """Rounding: a square root, an angle or a factor and back lose a few units in the last place."""
    params = case.params(3)
    coordinates = _Coordinates(case.family, params)
    assert_close(coordinates.inverse(coordinates(params), params), params, 64 * torch.finfo(torch.float64).eps)


def test_any_coordinates_are_a_point_of_the_supports(case: Case) -> None:
    params = case.params(3)
    coordinates = _Coordinates(case.family, params)
    u = coordinates(params)
    u = u + torch.randn(u.shape, generator=bench.seeded(0), dtype=u.dtype)
    point, sites = coordinates.inverse(u, params), case.sites()
    for name in case.free:
        assert sites[name]["fn"].support.check(getattr(point, name)).all(), name


@pytest.mark.parametrize("name", ["1.0 sd apart, isotropic, K = 2", "1.5 sd apart, diagonal, K = 2"])
def test_overlapping_components_take_a_tenth_of_the_passes_or_less(name: str) -> None:
    run = bench.compare(TASKS[name], 1)
    assert run["plain_converged"]
    assert abs(run["relative"]) <= 1e-10
    assert run["plain"] >= 10 * run["accelerated"], run


@pytest.mark.parametrize(
    "name",
    [
        "plane, full, K = 3, prior",
        "plane, full, K = 3, row weights",
        "carcinoma, K = 4",
        "carcinoma, K = 3, prior",
        "iris, tied, K = 3, row weights",
        "faithful, full, K = 3",
        "iris, Laplace, K = 3",
    ],
)
def test_it_ends_where_em_ends_and_never_falls(name: str) -> None:
    task = TASKS[name]
    params = bench.start(task, 1)
    plain, accelerated = bench.climb(task, params), fast(task, params)
    goal = plain.trace[-1]
    assert accelerated.converged
    assert accelerated.trace[-1] >= goal - 1e-10 * abs(goal)
    assert len(accelerated.trace) <= len(plain.trace)
    rounding = 8 * torch.finfo(torch.float64).eps * (abs(goal) + len(task.x)) * math.sqrt(len(task.x))
    assert min(b - a for a, b in itertools.pairwise(accelerated.trace)) >= -rounding


def test_every_family_ends_no_lower_than_em(case: Case, kind: str) -> None:
    prior = case.prior_or_flat(kind)
    x = case.data(1, 400)
    task = bench.Task(case.family, x, case.num_components(), prior)
    params = case.start(2, x, prior=prior)
    plain = bench.climb(task, params, max_passes=1000)
    accelerated = fast(task, params, max_passes=1000)
    assert accelerated.trace[-1] >= plain.trace[-1] - 1e-6 * abs(plain.trace[-1])


def test_a_resumed_run_has_the_identical_trace() -> None:
    """The state goes through a copy after every pass, into an accelerator made from other parameters."""
    task = TASKS["plane, full, K = 3"]
    params = bench.start(task, 1)

    class Resumed:
        def __init__(self) -> None:
            self.inner = Anderson(task.family, params)

        def again(self) -> None:
            state = {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in self.inner.state_dict().items()
            }
            self.inner = Anderson(task.family, bench.start(task, 5))
            self.inner.load_state_dict(state)

        def propose(self, *args: Any) -> Any:
            self.again()
            candidate = self.inner.propose(*args)
            self.again()
            return candidate

        def accept(self, *args: Any) -> bool:
            return self.inner.accept(*args)

    whole = fast(task, params)
    assert whole.num_refused > 0
    assert bench.climb(task, params, Resumed()).trace == whole.trace


def test_units_of_the_data_do_not_matter() -> None:
    """In units that are powers of two, which round nothing, the passes are the same but for the log Jacobian."""
    task = TASKS["plane, full, K = 3"]
    scale = 2.0**10
    params = bench.start(task, 1)
    scaled = params._replace(locs=params.locs * scale, covariances=params.covariances * scale**2)
    found = fast(task, params, rtol=0.0, max_passes=20)
    other = fast(task._replace(x=task.x * scale), scaled, rtol=0.0, max_passes=20)
    shift = 2 * len(task.x) * math.log(scale)
    assert other.trace == pytest.approx([value - shift for value in found.trace], rel=1e-9)


def test_a_candidate_that_lowers_the_objective_is_refused() -> None:
    task = TASKS["1.5 sd apart, diagonal, K = 2"]
    params = bench.start(task, 1)
    accelerator = Anderson(task.family, params)
    objective, image = bench.one_pass(task, params)
    assert accelerator.propose(params, image, objective) is None
    for worse in (objective - 1e-6, -math.inf, math.nan, math.inf):
        assert not accelerator.accept(image, image, worse)
    assert accelerator.accept(image, image, objective)


def test_parameters_at_an_edge_are_no_obstacle() -> None:
    """Probabilities of exactly 0 and 1 stay there, as EM keeps them, and the others go on."""
    task = TASKS["carcinoma, K = 3"]
    params = bench.start(task, 1)
    probs = params.probs.clone()
    probs[0, 0], probs[1, 1] = 0.0, 1.0
    params = params._replace(probs=probs)
    plain, accelerated = bench.climb(task, params), fast(task, params)
    assert accelerated.params.probs[0, 0] == 0
    assert accelerated.params.probs[1, 1] == 1
    assert accelerated.trace[-1] >= plain.trace[-1] - 1e-10 * abs(plain.trace[-1])
