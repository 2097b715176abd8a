"""Every engine that draws from a posterior passes calibration, and the same calibration sees faults planted in it.

Each quick run refutes a right engine with probability 0.01 at most (``FALSE_ALARM``, exact by the simultaneous band and
Bonferroni's inequality), 0.04 at most over the four, for seeds drawn anew; those here are fixed. The slow runs, one for
each engine and family, share 0.01 between them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from mixproof.inference import hmc as hmc_module
from mixproof.inference.enumeration import Coordinates
from mixproof.inference.log_posterior import LogPosterior
from mixproof.models import bernoulli
from tests.conftest import load_script

bench = load_script("benchmarks/calibration.py")
SEED = 5
NUM_SIMULATIONS = 100
FAMILY = "bernoulli"
FAMILIES = list(bench.family_cases())
SHARED = bench.FALSE_ALARM / (2 * len(FAMILIES) + 1)
"""How often each of the slow runs may refute a right engine: both samplers on all families, and Pyro's on one."""


def rows_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = bernoulli.draw

    def doubled(params: Any, stats: Any, *args: Any) -> Any:
        return draw(params, type(stats)(*(2 * value for value in stats)), *args)

    monkeypatch.setattr(bernoulli, "draw", doubled)


def rows_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = bernoulli.draw

    def without(params: Any, stats: Any, *args: Any) -> Any:
        return draw(params, type(stats)(*(0 * value for value in stats)), *args)

    monkeypatch.setattr(bernoulli, "draw", without)


def without_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Coordinates, "log_jacobian", lambda self, u: 0 * u.sum())


def every_proposal_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    energy = hmc_module._energy
    monkeypatch.setattr(hmc_module, "_energy", lambda *args: 0 * energy(*args))


def momentum_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    step = hmc_module.leapfrog

    def grown(posterior: Any, state: Any, momentum: Tensor, *args: Any) -> Any:
        return step(posterior, state, momentum * 1.5, *args)

    monkeypatch.setattr(hmc_module, "leapfrog", grown)


def data_sets_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    start = LogPosterior.__init__

    def exchanged(self: Any, model: Any, *args: Tensor, **settings: Any) -> None:
        start(self, model, *(values.roll(1, 0) for values in args), **settings)

    monkeypatch.setattr(LogPosterior, "__init__", exchanged)


FAULTS: dict[str, list[Callable[[pytest.MonkeyPatch], None]]] = {
    "gibbs": [rows_count_twice, rows_do_not_count],
    "hmc": [without_jacobian, every_proposal_accepted, momentum_too_large, data_sets_exchanged],
}


QUICK = (rows_count_twice, without_jacobian, data_sets_exchanged)
SIZES = {"gibbs": {"num_chains": 12, "num_warmup": 10, "num_draws": 40}}


def calibration(engine: str, name: str = FAMILY) -> Any:
    return bench.calibrate_engine(engine, name, NUM_SIMULATIONS, SEED, **SIZES.get(engine, {}))


@pytest.mark.parametrize("engine", list(FAULTS))
def test_engines_pass(engine: str) -> None:
    found = calibration(engine)
    assert found.ok, str(found)


@pytest.mark.parametrize(
    ("engine", "plant"),
    [
        pytest.param(engine, plant, id=plant.__name__, marks=[] if plant in QUICK else [pytest.mark.slow])
        for engine, faults in FAULTS.items()
        for plant in faults
    ],
)
@pytest.mark.filterwarnings("ignore")  # an engine may say that a fault slows it down, and must not need to
def test_faults_in_engines_are_seen(engine: str, plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert not calibration(engine).ok


@pytest.mark.slow
def test_normal_approximations_pass_where_the_posterior_is_close_to_normal() -> None:
    for guide in ("AutoMultivariateNormal", "AutoLaplace"):
        found = calibration(guide, "separated")
        assert found.ok, str(found)


def test_independent_coordinates_are_refuted_where_the_posterior_is_correlated() -> None:
    """The independent law nearest in Kullback-Leibler divergence has the variances of each given all others."""
    found = calibration("AutoNormal", "separated")
    words = {check.name: check.detail for check in found.report.checks if not check.passed}
    assert {words[f"locs[{k}, {d}]"] for k in (0, 1) for d in (0, 1)} == {"the draws are too narrow"}


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*draws diverged"
)  # a few of 60,000 in the tails: the ranks tell whether it matters
@pytest.mark.parametrize("family", FAMILIES)
def test_hamiltonian_draws_of_every_family_pass(family: str) -> None:
    found = bench.calibrate_engine("hmc", family, 300, SEED, false_alarm=SHARED)
    assert found.ok, str(found)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_gibbs_draws_of_every_family_pass(family: str) -> None:
    found = bench.calibrate_engine("gibbs", family, 300, SEED, false_alarm=SHARED)
    assert found.ok, str(found)


@pytest.mark.slow
def test_pyros_own_sampler_passes() -> None:
    found = bench.calibrate_engine("nuts", FAMILY, NUM_SIMULATIONS, SEED, false_alarm=SHARED)
    assert found.ok, str(found)
