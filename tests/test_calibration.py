"""Calibration by ranks: exact posteriors pass, and planted faults fail where the theory says.

The posteriors and their faults are those of ``benchmarks/calibration.py``: of a conjugate normal law in closed form,
and of a mixture by the sum over all allocations.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from mixproof.inference.calibration import Calibration, calibrate, effective_size
from mixproof.inference.draws import Draws
from mixproof.inference.exact_evidence import exact_log_evidence
from mixproof.inference.verification.uniformity import simultaneous_band
from mixproof.models import gaussian_spherical
from tests.conftest import Case, load_script

bench = load_script("benchmarks/calibration.py")
SEED = 3


def refuted(calibration: Calibration) -> set[str]:
    return {check.name for check in calibration.report.checks if not check.passed}


# What it sees

NORMAL_PARAMETERS = {"variance", "means[0]", "means[1]"}


@pytest.mark.parametrize("subject", ["normal", "mixture"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_exact_posteriors_pass(subject: str, seed: int) -> None:
    found = bench.calibrate_fault(subject, "none", 200, seed)
    assert found.ok
    assert refuted(found) == set()
    assert found.p_value > found.false_alarm


def test_ranks_of_an_exact_posterior_are_uniform_to_every_test() -> None:
    """By a second test, of counts in ten cells, whose statistic has nothing to do with the band."""
    found = bench.calibrate_fault("normal", "none", 500, SEED)
    for ranks in found.ranks.values():
        assert stats.chisquare(np.bincount(ranks // 10, minlength=10)).pvalue > 1e-3


def test_a_posterior_that_ignores_the_data_passes_on_every_parameter_and_fails_on_the_log_likelihood() -> None:
    """As in the SBC package's vignette on its limits: 200 simulations, and every parameter looks right."""
    found = bench.calibrate_fault("normal", "data ignored", 200, SEED)
    assert refuted(found) == {"log likelihood", "log p(row 1)"}
    assert found.p_values["log likelihood"] < 1e-12
    assert min(found.p_values[name] for name in NORMAL_PARAMETERS) > 0.05


def test_lost_correlation_passes_every_marginal_and_fails_on_the_log_likelihood() -> None:
    """As in the SBC package's vignette on its limits: 1,000 simulations, and every marginal looks right."""
    found = bench.calibrate_fault("normal", "lost correlation", 1000, SEED)
    assert min(found.p_values[name] for name in NORMAL_PARAMETERS) > 0.05
    assert found.p_values["log likelihood"] < 1e-12


@pytest.mark.parametrize("subject", ["normal", "mixture"])
@pytest.mark.parametrize(
    ("fault", "must"),
    [
        ("prior ignored", {"log prior", "log p(fixed rows)"}),
        ("data ignored", {"log likelihood", "log p(row 1)"}),
        ("one row dropped", {"log likelihood"}),
        ("lost correlation", {"log likelihood", "log p(row 1)"}),
    ],
)
def test_faults_are_seen_at_200_simulations(subject: str, fault: str, must: set[str]) -> None:
    found = bench.calibrate_fault(subject, fault, 200, SEED)
    assert found.report.verdict == "refuted"
    assert must <= refuted(found)


@pytest.mark.slow
@pytest.mark.parametrize("subject", ["normal", "mixture"])
@pytest.mark.parametrize("fault", [name for name in bench.FAULTS if name != "none"])
def test_every_fault_is_seen_at_1000_simulations(subject: str, fault: str) -> None:
    for seed in (4, 5):
        assert not bench.calibrate_fault(subject, fault, 1000, seed).ok


def test_what_is_wrong_is_said_in_words() -> None:
    narrow = bench.calibrate_fault("normal", "variance times n / (n - 1)", 200, SEED)
    details = {check.name: check.detail for check in narrow.report.checks}
    assert details["variance"] == "the draws are too high"
    assert details["means[0]"] == ""


# One program in one dimension, whose posterior is normal


def location(x: Tensor, prior_scale: float = 1.0) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, prior_scale))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(torch.ones(1)), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(mean, 1.0).expand([1]).to_event(1), obs=x)


ROWS = torch.zeros(3, 1, dtype=torch.float64)


def location_draws(x: Tensor, noise: Tensor) -> Draws:
    """Return draws (B, C S) as a chain for each data set (B, N, 1), from standard normal noise."""
    size = x.shape[1] + 1
    return Draws({"mean": x.sum((1, 2))[:, None] / size + noise / size**0.5}, {}, {})


def independent(x: Tensor, seed: int, num_draws: int = 99) -> Draws:
    generator = torch.Generator().manual_seed(seed)
    return location_draws(x, torch.randn(len(x), num_draws, generator=generator, dtype=torch.float64))


def autoregressive(x: Tensor, seed: int, num_draws: int) -> Draws:
    """Return a chain from the exact posterior whose neighbours have a correlation of 0.95."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_draws, len(x), generator=generator, dtype=torch.float64)
    for i in range(1, num_draws):
        noise[i] = 0.95 * noise[i - 1] + (1 - 0.95**2) ** 0.5 * noise[i]
    return location_draws(x, noise.T)


def location_calibration(engine: Any = independent, num_simulations: int = 300, **settings: Any) -> Calibration:
    batch_size = settings.pop("batch_size", num_simulations)
    return calibrate(
        location, engine, ROWS, num_simulations=num_simulations, seed=SEED, batch_size=batch_size, **settings
    )


def test_draws_are_thinned_until_they_are_independent() -> None:
    """Left as they are, the draws of a right but slow chain would refute it."""
    slow = partial(autoregressive, num_draws=99)
    assert not location_calibration(slow, num_ranks=100).ok
    with pytest.warns(UserWarning, match="fewer than .* independent ones"):
        assert location_calibration(slow).num_ranks == 20
    found = location_calibration(partial(autoregressive, num_draws=4000))
    assert found.ok
    # a chain of 4,000 whose neighbours have correlation r is worth (1 - r) / (1 + r) of them
    assert found.effective_sizes.median().item() == pytest.approx(4000 * 0.05 / 1.95, rel=0.25)
    assert 20 < found.num_ranks <= found.effective_sizes.quantile(0.05) + 1


@pytest.mark.parametrize("num_chains", [1, 4])
@pytest.mark.parametrize("num_draws", [60, 61])
def test_effective_size_by_its_definition(num_chains: int, num_draws: int) -> None:
    """Autocovariances by sums over pairs of draws, and the sequence cut off and made monotone one pair at a time."""
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(num_chains, num_draws, generator=generator, dtype=torch.float64)
    draws = noise + noise.roll(1, -1) + noise[:, :1] / 4
    centred = draws - draws.mean(1, keepdim=True)
    covariances = [
        float((centred[:, : num_draws - lag] * centred[:, lag:]).sum(1).mean()) / num_draws for lag in range(num_draws)
    ]
    within = float(draws.var(1).mean())
    between = float(draws.mean(1).var()) if num_chains > 1 else 0.0
    total = within * (num_draws - 1) / num_draws + between
    correlations = [1 - (within - covariance) / total for covariance in covariances]
    correlations[0] = 1.0
    time, least = -1.0, float("inf")
    for lag in range(0, num_draws - 1, 2):
        pair = correlations[lag] + correlations[lag + 1]
        if pair <= 0:
            break
        least = min(least, pair)
        time += 2 * least
    assert effective_size(draws).item() == pytest.approx(num_chains * num_draws / time, rel=1e-10)
    assert time > 1
    assert effective_size(torch.ones(2, num_chains, 50)).isnan().all()
    assert effective_size(torch.ones(2, num_chains, 3)).tolist() == [3.0 * num_chains] * 2


def test_ranks_count_the_draws_below_the_truth() -> None:
    """At the ends and in the middle, and of 198 draws every second."""
    for place, expected in ((-1e3, 99), (1e3, 0)):
        found = location_calibration(
            lambda x, seed, place=place: location_draws(x, torch.full((len(x), 198), place, dtype=torch.float64)),
            20,
            num_ranks=100,
        )
        assert found.ranks["mean"].tolist() == [expected] * 20
        assert found.report.verdict == "refuted"
    half = torch.tensor([-1e3, 1e3], dtype=torch.float64).repeat_interleave(99)
    found = location_calibration(lambda x, seed: location_draws(x, half.expand(len(x), -1)), 20, num_ranks=100)
    assert set(found.ranks["mean"].tolist()) == {49}  # the draws kept are those at 1, 3, ..., 197


def test_ties_are_broken_at_random() -> None:
    quantities = {"constant": lambda params, x: params["mean"] * 0, "sign": lambda params, x: params["mean"].sign()}
    found = location_calibration(num_simulations=1000, quantities=quantities, num_ranks=100)
    assert found.ok
    assert len(found.ranks["constant"].unique()) == 100
    assert found.ranks["constant"].min() == 0
    assert found.ranks["constant"].max() == 99


def test_batches_and_single_data_sets_see_the_same_simulations() -> None:
    seen: list[Tensor] = []

    def engine(x: Tensor, seed: int) -> Draws:
        seen.extend(x if x.ndim == 3 else x[None])
        return independent(x if x.ndim == 3 else x[None], 0)

    batches = [location_calibration(engine, 7, batch_size=size, num_ranks=100) for size in (7, 3, None)]
    assert len(seen) == 21
    for i in range(7):
        assert torch.equal(seen[i], seen[7 + i])
        assert torch.equal(seen[i], seen[14 + i])
    again = location_calibration(engine, 7, num_ranks=100)
    assert all(torch.equal(again.ranks[name], batches[0].ranks[name]) for name in again.ranks)


def test_ranks_do_not_look_at_the_order_of_exchangeable_components() -> None:
    def shuffled(x: Tensor, seed: int) -> Draws:
        order = torch.rand(len(x), bench.NUM_DRAWS, 2, generator=torch.Generator().manual_seed(seed)).argsort(-1)
        params = {}
        for name, value in bench.mixture_posterior(x, seed).params.items():
            index = order.reshape(*order.shape, *(1,) * (value.ndim - 3)).expand_as(value)
            params[name] = value.gather(2, index)
        return Draws(params, {}, {})

    x = torch.zeros(6, 1, dtype=torch.float64)
    settings: dict[str, Any] = {"num_simulations": 50, "seed": SEED, "batch_size": 50, "num_ranks": 100}
    plain = calibrate(bench.MIXTURE, bench.mixture_posterior, x, **settings)
    mixed = calibrate(bench.MIXTURE, shuffled, x, **settings)
    for name, ranks in plain.ranks.items():
        assert (ranks - mixed.ranks[name]).abs().max() <= 1, name  # sums in another order round otherwise
    assert {"min weights", "max locs[0]", "mean variances", "weighted mean locs[0]"} <= set(plain.ranks)


def test_components_that_the_prior_names_are_compared_by_name() -> None:
    prior = bench.MIXTURE_PRIOR._replace(concentration=bench.real([2.0, 3.0]))
    model = partial(gaussian_spherical.model, num_components=2, prior=prior)
    x = torch.zeros(6, 1, dtype=torch.float64)
    engine = partial(bench.mixture_posterior, prior=prior)
    found = calibrate(model, engine, x, num_simulations=300, seed=1, batch_size=300, num_ranks=100)
    assert found.ok
    assert {"weights[0]", "locs[1, 0]", "variances[1]"} <= set(found.ranks)


def test_the_exact_mixture_of_these_tests_is_exact() -> None:
    """Its weights of allocations against ``exact_log_evidence``, by leaving one row out: p(x_6 | x_1, ..., x_5)."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(6, 1, generator=generator, dtype=torch.float64)
    log_evidences = [
        float(exact_log_evidence(gaussian_spherical, rows, bench.MIXTURE_PRIOR, num_components=2))
        for rows in (x, x[:5])
    ]
    draws = bench.mixture_posterior(x[None, :5].expand(400, -1, -1), SEED).params
    params = gaussian_spherical.Params(*(draws[name].flatten(0, 1) for name in gaussian_spherical.Params._fields))
    density = torch.func.vmap(gaussian_spherical.log_joint, (0, None))(params, x[5:]).logsumexp((1, 2)).exp()
    error = float(density.std()) / len(density) ** 0.5
    assert abs(float(density.mean()) - np.exp(log_evidences[0] - log_evidences[1])) < 4 * error


# What comes back


def test_the_result_can_be_read_by_people_and_programs() -> None:
    found = location_calibration(num_ranks=100)
    assert "ranks in 300 simulations among 99 thinned draws: holds" in str(found)
    read = json.loads(found.to_json())
    assert read["num_ranks"] == 100
    assert read["ranks"]["mean"] == found.ranks["mean"].tolist()
    assert [check["name"] for check in read["checks"]] == list(found.ranks)
    assert found.p_value == min(1.0, min(found.p_values.values()) * len(found.ranks))


def test_plot_shows_each_quantity_in_its_band() -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    found = location_calibration(num_ranks=100)
    plot = found.plot()
    where, lower, upper = simultaneous_band(300, 100, probability=1 - 0.01 / len(found.ranks))
    for name in found.ranks:
        axes = plot.get_viz("plot", name)
        (line,), (band,) = axes.get_lines(), axes.collections
        extent = band.get_paths()[0].get_extents()
        assert (extent.y0, extent.y1) == pytest.approx(((lower - where).min(), (upper - where).max()))
        assert len(line.get_ydata()) > 100
        assert extent.y0 < min(line.get_ydata()) < max(line.get_ydata()) < extent.y1
    plt.close("all")


# Faults of use, in words


def test_interrupt_keeps_the_simulations_that_were_done() -> None:
    calls: list[int] = []

    def engine(x: Tensor, seed: int) -> Draws:
        calls.append(seed)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return independent(x, seed)

    with pytest.warns(UserWarning, match="30 of 100 simulations"):
        found = location_calibration(engine, 100, batch_size=10, num_ranks=100)
    assert [len(ranks) for ranks in found.ranks.values()] == [30] * len(found.ranks)

    def cut_short(x: Tensor, seed: int) -> Draws:
        """Answer the interrupt of the second call by the draws so far."""
        calls.append(seed)
        return independent(x, seed, 99 if len(calls) == 5 else 40)

    with pytest.warns(UserWarning, match="10 of 100"):
        location_calibration(cut_short, 100, batch_size=10, num_ranks=20)
    calls[:] = [0] * 3
    with pytest.raises(KeyboardInterrupt):
        location_calibration(engine, 100)


@pytest.mark.parametrize("change", [1, -1])
def test_a_wrong_engine_does_not_hold_by_ending_the_study(change: int) -> None:
    """It is five standard deviations off, and changes how many draws it returns."""
    calls: list[int] = []

    def engine(x: Tensor, seed: int) -> Draws:
        calls.append(seed)
        draws = torch.randn(1, 50 + change * len(calls), generator=torch.Generator().manual_seed(seed)).double()
        return Draws({"mean": 5 + draws}, {}, {})

    run = partial(calibrate, location, engine, ROWS, num_simulations=200, seed=SEED, num_ranks=20)
    if change > 0:
        with pytest.raises(ValueError, match="returned 52 draws, and 51 in the first simulation"):
            run()
        return
    with pytest.warns(UserWarning, match="interrupted: 1 of 200"):
        found = run()
    assert found.report.verdict == "undecided"
    assert not found.ok


@pytest.mark.parametrize("batch_size", [None, 3])
def test_a_run_that_was_interrupted_or_killed_goes_on_to_the_same_ranks(batch_size: int | None, tmp_path: Path) -> None:
    """Ties are broken at random, and in the same way, though the file knows names and no order."""
    calls: list[int] = []
    stop_at = 0
    error: type[BaseException] = KeyboardInterrupt

    def engine(x: Tensor, seed: int) -> Draws:
        calls.append(seed)
        if len(calls) == stop_at:
            raise error
        return independent(x if batch_size else x[None], seed)

    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "num_ranks": 10,
        "quantities": {"sign": lambda params, x: params["mean"].sign(), "a": lambda params, x: params["mean"] * 0},
    }
    run = partial(location_calibration, engine, 10, **settings)
    whole, num_calls = run(), len(calls)
    file = tmp_path / "state"
    stop_at = num_calls + 3
    with pytest.warns(UserWarning, match=f"interrupted: {2 * (batch_size or 1)} of 10"):
        kept = run(checkpoint=file)
    assert len(kept.effective_sizes) == 2 * (batch_size or 1)
    calls.clear()
    stop_at, error = 2, SystemError
    with pytest.raises(SystemError):
        run(checkpoint=file, checkpoint_every=1)
    calls.clear()
    stop_at = 0
    found = run(checkpoint=file)
    assert len(calls) == num_calls - 3
    assert list(found.ranks) == list(whole.ranks)
    assert all(torch.equal(found.ranks[name], whole.ranks[name]) for name in whole.ranks)
    assert torch.equal(found.effective_sizes, whole.effective_sizes)
    assert found.to_json() == run(checkpoint=file).to_json() == whole.to_json()
    assert len(calls) == num_calls - 3  # nothing was left to do
    others: dict[str, tuple[Any, int]] = {
        "seed": (location, SEED + 1),
        "program": (partial(location, prior_scale=2.0), SEED),
    }
    for what, (model, seed) in others.items():
        with pytest.raises(ValueError, match=f"belongs to another run, which differs in {what}: delete it"):
            calibrate(model, engine, ROWS, num_simulations=10, seed=seed, checkpoint=file, **settings)


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (lambda x, seed: Draws({"other": ROWS}, {}, {}), "no draws of mean, but of other"),
        (lambda x, seed: independent(x[:1], seed), r"shape \(1, 99\).*5 chains, one a data set"),
        (lambda x, seed: Draws({"mean": torch.zeros(5, 9, 2)}, {}, {}), "then the shape"),
        (lambda x, seed: Draws({"mean": torch.full((5, 9), torch.nan)}, {}, {}), "not finite"),
    ],
)
def test_engines_that_return_something_else_are_told(engine: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        location_calibration(engine, 5)


def test_programs_and_settings_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match="num_simulations must be at least 1"):
        location_calibration(num_simulations=0)
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1, not 0"):
        location_calibration(num_simulations=5, checkpoint_every=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        location_calibration(num_simulations=5, batch_size=0)
    for name in ("num_simulations", "batch_size", "checkpoint_every", "num_ranks"):
        settings: dict[str, Any] = {"num_simulations": 20, name: 10.5}
        with pytest.raises(TypeError, match=f"{name} must be an integer, not 10.5"):
            location_calibration(**settings)
    with pytest.raises(ValueError, match="num_ranks must be at least 2, not 1"):
        location_calibration(num_simulations=5, num_ranks=1)
    for false_alarm in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"false_alarm must lie between 0 and 1, not {false_alarm}"):
            location_calibration(num_simulations=5, false_alarm=false_alarm)
    with pytest.raises(ValueError, match="from 2 to 100, one more than the draws, not 101"):
        location_calibration(num_simulations=5, num_ranks=101)
    with pytest.raises(ValueError, match="undefined is not a number"):
        location_calibration(num_simulations=5, quantities={"undefined": lambda params, x: params["mean"] * torch.nan})

    def point(x: Tensor) -> None:
        pyro.param("scale", torch.zeros(()))
        location(x)

    def two_sites(x: Tensor) -> None:
        location(x)
        pyro.sample("more", dist.Normal(0.0, 1.0), obs=torch.zeros(()))

    for model, words in ((point, "scale is a pyro.param and has no prior"), (two_sites, "x .3, 1., more")):
        with pytest.raises(ValueError, match=words):
            calibrate(model, independent, ROWS, num_simulations=2, seed=SEED)


def test_improper_priors_cannot_be_drawn_from(case: Case) -> None:
    x = torch.zeros(4, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="improper"):
        calibrate(case.program(2), independent, x, num_simulations=2, seed=SEED)


def test_a_program_or_an_engine_that_is_none_is_refused() -> None:
    settings: Any = {"num_simulations": 2, "seed": 0}
    x = torch.arange(4).double()[:, None]
    prior = gaussian_spherical.weakly_informative_prior(x, 2)
    model = partial(gaussian_spherical.model, num_components=2, prior=prior)
    wrong: list[tuple[Any, Any, str]] = [
        (gaussian_spherical, lambda x, seed: None, r"model must be a program.*give functools.partial\(family.model"),
        (model, "gibbs", "engine must be a function, called as engine"),
        (model, lambda x, seed: {"weights": x}, "engine must return Draws, as every sampler does, not a dict"),
    ]
    for program, engine, words in wrong:
        with pytest.raises(TypeError, match=words):
            calibrate(program, engine, x, **settings)
