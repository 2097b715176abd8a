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

from mixproof.inference import acceleration
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


def linear_em(jacobian: Tensor, num_steps: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Return points and EM's steps there, (u, f), and the last step, where EM is u -> J u + c."""
    offset, u = torch.linspace(0.5, 1.5, len(jacobian), dtype=torch.float64), torch.zeros(len(jacobian)).double()
    points = []
    for _ in range(num_steps):
        points.append((u, jacobian @ u + offset - u))
        u = jacobian @ u + offset
    return points, points[-1][1]


@pytest.mark.parametrize(("level", "num_steps"), [(1, 2), (2, 3), (3, 5), (6, 33)])
def test_it_sees_linear_em_as_many_steps_ahead_as_it_looks(level: int, num_steps: int) -> None:
    """Against the steps made one by one, on a map with a slow, a fast and a turning direction.

    The five points span the space, whose Gram matrix has a condition number of about 1e6: that many roundings are lost.
    """
    jacobian = torch.tensor([[0.9, 0.1, 0.0], [-0.1, 0.5, 0.2], [0.0, 0.1, -0.4]]).double()
    task = TASKS["1.5 sd apart, tied, K = 2"]
    accelerator = Anderson(task.family, bench.start(task, 1))
    accelerator._points, f = linear_em(jacobian, 5)
    accelerator._level = level
    (u, _), way = accelerator._points[-1], torch.zeros(3).double()
    own, ahead = accelerator._look_ahead(u, f)
    tolerance = 1e6 * torch.finfo(torch.float64).eps * f.norm() * num_steps
    assert own is not None
    assert (own.step - jacobian @ f).norm() <= tolerance
    for _ in range(num_steps):
        way, f = way + f, jacobian @ f
    assert ahead is not None
    assert ahead.level == level
    assert (ahead.way - way).norm() <= tolerance
    assert (ahead.step - f).norm() <= tolerance


def test_it_leaves_a_saddle_as_em_does_and_not_at_a_leap() -> None:
    """The direction that EM leaves in has the eigenvalue 1.2: Newton's step would lead back to the saddle."""
    jacobian = torch.tensor([[1.2, 0.0], [0.0, 0.3]]).double()
    task = TASKS["1.5 sd apart, tied, K = 2"]
    accelerator = Anderson(task.family, bench.start(task, 1))
    accelerator._points, f = linear_em(jacobian, 5)
    accelerator._level = 30
    _, ahead = accelerator._look_ahead(accelerator._points[-1][0], f)
    assert ahead is not None
    assert ahead.level == 2
    assert ahead.way[0] / f[0] == pytest.approx(1 + 1.2 + 1.2**2)
    assert ahead.step[0] / f[0] == pytest.approx(1.2**3)


@pytest.mark.parametrize(
    "name",
    [
        "1.0 sd apart, isotropic, K = 2",
        "1.5 sd apart, diagonal, K = 2",
        "plane, full, K = 3",
        "plane, full, K = 3, prior",
        "carcinoma, K = 4",
    ],
)
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


def num_lower(name: str, num_starts: int) -> int:
    runs = [bench.compare(TASKS[name], seed) for seed in range(num_starts)]
    return int(bench.summary([run for run in runs if run is not None])["lower"])


@pytest.mark.slow
def test_without_a_bound_on_the_model_s_error_it_ends_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "iris, full, K = 4, prior"
    assert num_lower(name, 48) == 0
    monkeypatch.setattr(acceleration, "NATS", math.inf)
    assert num_lower(name, 48) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_it_ends_no_lower_than_em_from_many_starts(name: str) -> None:
    assert num_lower(name, 8) == 0


def test_a_resumed_run_has_the_identical_trace() -> None:
    """The state goes through a copy before every proposal, into an accelerator made from other parameters."""
    task = TASKS["plane, full, K = 3"]
    params = bench.start(task, 1)

    class Resumed:
        def __init__(self) -> None:
            self.inner = Anderson(task.family, params)

        def propose(self, *args: Any) -> Any:
            state = {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in self.inner.state_dict().items()
            }
            self.inner = Anderson(task.family, bench.start(task, 5))
            self.inner.load_state_dict(state)
            return self.inner.propose(*args)

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


def first_candidate(task: Any) -> tuple[Anderson, Any, Any, float]:
    """Return an accelerator and its first candidate, the image there, and the objective before."""
    params = bench.start(task, 1)
    accelerator = Anderson(task.family, params)
    while True:
        objective, image = bench.one_pass(task, params)
        candidate = accelerator.propose(params, image, objective)
        if candidate is not None:
            return accelerator, candidate, bench.one_pass(task, candidate)[1], objective
        params = image


@pytest.mark.parametrize("change", [-1e-6, -math.inf, math.nan, math.inf])
def test_a_candidate_that_lowers_the_objective_is_refused(change: float) -> None:
    accelerator, candidate, image, objective = first_candidate(TASKS["1.5 sd apart, diagonal, K = 2"])
    assert not accelerator.accept(candidate, image, objective + change)


def test_a_candidate_at_which_em_is_not_as_expected_is_refused() -> None:
    """The candidate that is accepted for what it is, with an image a standard deviation off and a gain of nats."""
    task = TASKS["1.5 sd apart, diagonal, K = 2"]
    for shift in (0.0, 1.0):
        accelerator, candidate, image, objective = first_candidate(task)
        shifted = image._replace(locs=image.locs + shift)
        assert accelerator.accept(candidate, shifted, objective + 5.0) == (shift == 0)


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
