"""Hamiltonian Monte Carlo against posteriors that are known: by conjugacy, by quadrature, and by published draws."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_stats.base import array_stats
from pyro.ops.dual_averaging import DualAveraging
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference import checkpoint
from mixproof.inference import hmc as hmc_module
from mixproof.inference.draws import Draws
from mixproof.inference.hmc import State, Step, hmc, initial_points, leapfrog, low_chains
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.nuts import nuts

DATA = Path(__file__).parent / "data"
X = torch.tensor([-1.2, -0.4, 0.3, 1.9, 2.4, 3.0], dtype=torch.float64)
MAX_Z = 5.0  # of some ten numbers a run; two-sided 6e-7 each


def conjugate(x: Tensor) -> None:
    """One component: mean and variance have a normal-inverse-gamma posterior."""
    variance = pyro.sample("variance", dist.InverseGamma(3.0, 2.0))
    loc = pyro.sample("loc", dist.Normal(0.5, (variance / 0.7).sqrt()))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(torch.ones(1)), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc, variance.sqrt()), obs=x)


def conjugate_moments(x: Tensor, power: float = 1.0) -> dict[str, tuple[float, float]]:
    """Return mean and variance of each parameter given the data (Gelman et al., 3rd edition, section 3.3).

    A likelihood to a power is that of so many times as many rows with the same moments.
    """
    n, mean = power * len(x), float(x.mean())
    strength, shape = 0.7 + n, 3 + n / 2
    rate = 2 + power * float((x - mean).square().sum()) / 2 + 0.7 * n / strength * (mean - 0.5) ** 2 / 2
    variance = rate / (shape - 1)
    return {
        "variance": (variance, variance**2 / (shape - 2)),
        "loc": ((0.7 * 0.5 + n * mean) / strength, variance / strength),
    }


def share_of_two(x: Tensor) -> None:
    """Two known components: their share alone is unknown, and its posterior a quadrature in one dimension."""
    share = pyro.sample("share", dist.Beta(1.5, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)


def share_moments(x: Tensor) -> dict[str, tuple[float, float]]:
    nodes, weights = np.polynomial.legendre.leggauss(200)
    share = (nodes + 1) / 2
    parts = [np.exp(-0.5 * (x.numpy()[:, None] - loc) ** 2) for loc in (0.0, 2.0)]
    density = weights * share**0.5 * (1 - share) * np.prod((1 - share) * parts[0] + share * parts[1], 0)
    mean = (density * share).sum() / density.sum()
    return {"share": (mean, (density * (share - mean) ** 2).sum() / density.sum())}


def z_scores(draws: Draws, moments: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Return how many of their Monte Carlo errors the mean and the variance of each parameter are off."""
    found = {}
    for name, (mean, variance) in moments.items():
        values = draws.params[name].numpy()
        for word, series, truth in (("mean", values, mean), ("variance", (values - mean) ** 2, variance)):
            ess = float(array_stats.ess(series, chain_axis=0, draw_axis=1, method="mean"))
            found[f"{word} of {name}"] = abs(series.mean() - truth) / (series.std() / math.sqrt(ess))
    return found


KNOWN = [(conjugate, conjugate_moments), (share_of_two, share_moments)]
RUN: dict[str, Any] = {"num_chains": 16, "num_draws": 400, "num_warmup": 100}


@pytest.mark.parametrize(("model", "moments"), KNOWN, ids=["conjugate", "quadrature"])
def test_draws_follow_a_known_posterior(model: Any, moments: Any) -> None:
    draws = hmc(model, X, seed=1, **RUN)
    scores = z_scores(draws, moments(X))
    assert max(scores.values()) < MAX_Z, scores
    assert not draws.sample_stats["diverging"].any()
    assert abs(float(draws.sample_stats["acceptance_rate"].mean()) - 0.8) < 0.15
    step_size, n_steps = draws.sample_stats["step_size"], draws.sample_stats["n_steps"]
    assert torch.equal(step_size, step_size[:, :1].expand_as(step_size))  # the kernel is the same in all draws
    common = float(step_size[:, 0].log().mean().exp())
    numbers = range(RUN["num_warmup"] + 1, RUN["num_warmup"] + RUN["num_draws"] + 1)
    lengths = [draws.attributes["trajectory_length"] * hmc_module._halton(number) for number in numbers]
    expected = torch.tensor([max(1, math.ceil(length / common)) for length in lengths])
    assert torch.equal(n_steps, expected.expand_as(n_steps))
    params = {name: value.reshape(-1) for name, value in draws.params.items()}
    posterior = LogPosterior(model, X)
    u = posterior.unconstrain(params)
    # the energy less the potential is half a chi-squared variable of P degrees of freedom, fresh in each draw
    potential = -draws.sample_stats["lp"].reshape(-1) - posterior.log_jacobian(u)
    kinetic = draws.sample_stats["energy"].reshape(-1) - potential
    assert (kinetic > -1e-9).all()
    assert abs(float(kinetic.mean()) - u.shape[1] / 2) < MAX_Z * math.sqrt(u.shape[1] / 2 / len(u))
    parts = posterior(u[:50], torch.ones(50, dtype=torch.float64))
    lp = parts.log_prior + parts.log_likelihood - posterior.log_jacobian(u[:50])
    assert (draws.sample_stats["lp"].reshape(-1)[:50] - lp).abs().max() < 1e-9


def kernel_scores(power: float = 1.0) -> dict[str, float]:
    """Return as ``z_scores`` what some coarse steps make of exact draws, one a chain: the law must stay as it is."""
    size = 40_000
    n, mean = power * len(X), float(X.mean())
    shape = 3 + n / 2
    rate = conjugate_moments(X, power)["variance"][0] * (shape - 1)
    generator = np.random.default_rng(0)
    variance = rate / generator.gamma(shape, size=size)
    loc = generator.normal((0.7 * 0.5 + n * mean) / (0.7 + n), np.sqrt(variance / (0.7 + n)))
    posterior = LogPosterior(conjugate, X)
    u = posterior.unconstrain({"variance": torch.as_tensor(variance), "loc": torch.as_tensor(loc)})
    one = torch.ones(size, dtype=torch.float64)
    tempered = power * one
    state, draws = State(u, posterior(u, tempered)), torch.Generator().manual_seed(1)
    scale = u.std(0).expand_as(u)
    for _ in range(6):
        state, _ = hmc_module.hmc_step(posterior, state, tempered, 1.3 * one, scale, 2, draws)
    params = {name: value[:, None] for name, value in posterior.constrain(state.u).items()}
    found = {}
    for name, (center, spread) in conjugate_moments(X, power).items():
        values = params[name].numpy().reshape(-1)
        for word, series, truth in (("mean", values, center), ("variance", (values - center) ** 2, spread)):
            found[f"{word} of {name}"] = abs(series.mean() - truth) / (series.std() / math.sqrt(size))
    return found


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_steps_keep_the_law_of_exact_draws(power: float) -> None:
    scores = kernel_scores(power)
    assert max(scores.values()) < MAX_Z, scores


def without_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixproof.inference.enumeration.Coordinates.log_jacobian", lambda _, u: 0 * u.sum())


def acceptance_upside_down(monkeypatch: pytest.MonkeyPatch) -> None:
    energy = hmc_module._energy
    monkeypatch.setattr(hmc_module, "_energy", lambda *args: -energy(*args))


def every_proposal_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    energy = hmc_module._energy
    monkeypatch.setattr(hmc_module, "_energy", lambda *args: 0 * energy(*args))


def momentum_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    randn = torch.randn

    def same(shape: Any, *, generator: torch.Generator, **kwargs: Any) -> Tensor:
        return randn(shape, generator=torch.Generator().manual_seed(5), **kwargs)

    monkeypatch.setattr(hmc_module.torch, "randn", same)


def momentum_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    step = hmc_module.leapfrog

    def shrunk(posterior: Any, state: State, momentum: Tensor, *args: Any) -> Any:
        return step(posterior, state, momentum * 0.8, *args)

    monkeypatch.setattr(hmc_module, "leapfrog", shrunk)


FAULTS = [without_jacobian, acceptance_upside_down, every_proposal_accepted, momentum_kept, momentum_too_small]


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_planted_faults_are_seen(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    scores = kernel_scores()
    assert not max(scores.values()) < MAX_Z, scores


def test_leapfrog_is_reversible_and_keeps_volume() -> None:
    posterior = LogPosterior(conjugate, X)
    generator = torch.Generator().manual_seed(0)
    u = 0.3 * torch.randn(3, 2, generator=generator, dtype=torch.float64)
    momentum = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    one = torch.ones(3, dtype=torch.float64)
    scale = torch.tensor([[0.3, 0.5]] * 3, dtype=torch.float64)
    start = State(u, posterior(u, one))
    end, after = leapfrog(posterior, start, momentum, one, 0.3 * one, scale, 7)
    back, before = leapfrog(posterior, end, -after, one, 0.3 * one, scale, 7)
    assert (end.u - u).abs().min() > 1e-2
    assert (back.u - u).abs().max() < 1e-13
    assert (before + momentum).abs().max() < 1e-13

    def flow(point: Tensor) -> Tensor:
        state = State(point[None, :2], posterior(point[None, :2], one[:1]))
        moved, p = leapfrog(posterior, state, point[None, 2:], one[:1], 0.3 * one[:1], scale[:1], 7)
        return torch.cat([moved.u[0], p[0]])

    point, step = torch.cat([u[0], momentum[0]]), 1e-5
    columns = [(flow(point + step * unit) - flow(point - step * unit)) / (2 * step) for unit in torch.eye(4).double()]
    # central differences: step^2 of truncation and 1e-16 / step of rounding
    assert abs(float(torch.linalg.det(torch.stack(columns, 1))) - 1) < 1e-7
    errors = []
    for num_steps in (8, 16):  # the energy error falls as the square of the step
        moved, p = leapfrog(posterior, start, momentum, one, 2.4 / num_steps * one, scale, num_steps)
        errors.append(hmc_module._energy(moved, p, one) - hmc_module._energy(start, momentum, one))
    assert (errors[0].abs().max() / errors[1].abs().max()) > 3


def scores_of_data_sets(expected: Tensor) -> dict[str, float]:
    """Return the scores of three data sets with ten chains each, one batch, against the moments given other three."""
    data = torch.stack([X, X / 4, 2 - X])
    draws = hmc(conjugate, data.repeat(10, 1), batched=True, num_chains=30, num_draws=300, num_warmup=100, seed=2)
    assert draws.attributes["low_chains"] == []
    return {
        f"{name} given data set {i}": score
        for i, x in enumerate(expected)
        for name, score in z_scores(
            Draws({name: value[i::3] for name, value in draws.params.items()}, {}, {}), conjugate_moments(x)
        ).items()
    }


def test_chains_with_data_of_their_own_follow_their_own_posteriors() -> None:
    scores = scores_of_data_sets(torch.stack([X, X / 4, 2 - X]))
    assert max(scores.values()) < MAX_Z, scores
    exchanged = scores_of_data_sets(torch.stack([X / 4, 2 - X, X]))
    assert all(exchanged[f"mean of variance given data set {i}"] > MAX_Z for i in (0, 1))
    with pytest.raises(ValueError, match="there are 3 data sets, and 2 points: one each"):
        hmc(conjugate, X.reshape(3, 2), batched=True, num_chains=2, num_draws=5, num_warmup=20, seed=0)


def interrupt(patch: pytest.MonkeyPatch, iteration: int) -> None:
    """Raise KeyboardInterrupt where the leapfrog steps of an iteration begin."""
    calls, step = 0, hmc_module.leapfrog

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == iteration + 1:
            raise KeyboardInterrupt
        return step(*args)

    patch.setattr(hmc_module, "leapfrog", interrupted)


def test_same_seed_same_draws_and_resuming_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"num_chains": 3, "num_draws": 20, "num_warmup": 40, "seed": 4}
    whole = hmc(share_of_two, X, **settings)
    other = hmc(share_of_two, X, **{**settings, "seed": 5})
    assert not torch.equal(whole.params["share"], other.params["share"])
    for stop in (33, 52):  # while it warms up, and while it draws; where momenta are drawn and the draw is not made
        file = tmp_path / f"run{stop}"
        with monkeypatch.context() as patch:
            interrupt(patch, stop)
            if stop < 40:
                with pytest.raises(KeyboardInterrupt):
                    hmc(share_of_two, X, **settings, checkpoint=file, checkpoint_every=10)
            else:
                with pytest.warns(ConvergenceWarning, match="stopped after 12 of 20 draws"):
                    kept = hmc(share_of_two, X, **settings, checkpoint=file, checkpoint_every=10)
                assert torch.equal(kept.params["share"], whole.params["share"][:, :12])
        resumed = hmc(share_of_two, X, **settings, checkpoint=file, checkpoint_every=10)
        assert torch.equal(resumed.params["share"], whole.params["share"])
        for name, value in whole.sample_stats.items():
            assert torch.equal(resumed.sample_stats[name], value)
    with pytest.raises(ValueError, match="belongs to another run, which differs in seed"):
        hmc(share_of_two, X, **{**settings, "seed": 5}, checkpoint=file)


def test_a_checkpoint_of_another_program_or_other_data_is_refused(tmp_path: Path) -> None:
    """The prior is no argument of the program; the data lie in containers."""

    def model(data: Any, loc: float) -> None:
        rows = torch.as_tensor(data["x"][0])
        mean = pyro.sample("mean", dist.Normal(loc, 0.5))
        with pyro.plate("data", len(rows)):
            pyro.sample("z", dist.Categorical(torch.ones(1)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(mean, 1.0), obs=rows)

    settings: dict[str, Any] = {"num_chains": 2, "num_draws": 3, "num_warmup": 20, "seed": 0}
    file = tmp_path / "run"
    rows = np.linspace(-1, 1, 5000)
    first = hmc(partial(model, loc=0.0), {"x": [rows]}, **settings, checkpoint=file)
    again = hmc(partial(model, loc=0.0), {"x": [rows.copy()]}, **settings, checkpoint=file)
    assert torch.equal(again.params["mean"], first.params["mean"])
    with pytest.raises(ValueError, match=r"belongs to another program: the log posterior where chain [01] stands is -"):
        hmc(partial(model, loc=1.0), {"x": [rows]}, **settings, checkpoint=file)
    with pytest.raises(FileNotFoundError):
        hmc(partial(model, loc=0.0), {"x": [rows]}, **settings | {"num_draws": 10**9}, checkpoint=tmp_path / "a" / "b")
    rows[2500] += 1e-12
    with pytest.raises(ValueError, match="belongs to another run, which differs in data"):
        hmc(partial(model, loc=0.0), {"x": [rows]}, **settings, checkpoint=file)
    with pytest.raises(TypeError, match="cannot tell one partial from another"):
        checkpoint.digest((X, [partial(model)]))


def test_a_data_set_without_a_start_is_named() -> None:
    """The second data set lies outside the support that every draw from the prior gives it."""

    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(torch.ones(1)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Gamma(2.0, scale), obs=x)

    data = torch.tensor([[1.0, 2.0], [math.nan, 1.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="data set 1 holds an entry that is NaN or infinite: drop or impute its row"):
        hmc(model, data, num_chains=2, num_draws=5, num_warmup=20, seed=0, batched=True)
    data = torch.tensor([[1.0, 2.0], [-1.0, 1.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="every draw from the prior of data set 1 has posterior density 0"):
        hmc(model, data, batched=True, num_chains=2, num_draws=5, num_warmup=20, seed=0)


def test_low_chains_are_named() -> None:
    height = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    assert low_chains(height, 2) == []
    height[2] -= 20
    assert low_chains(height, 2) == [2]


def test_chains_do_not_start_in_hopeless_modes() -> None:
    """The rows lie at 25, where the component of weight 0.9 can be and that of 0.1: 20 log 9 = 44 nats apart."""

    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 30.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.9, 0.1])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(torch.stack([loc, -loc])[z], 1.0), obs=x)

    x = 25 + torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    starts = initial_points(LogPosterior(model, x), 16, seed=0)
    assert (starts - 25).abs().max() < 2
    init = {"loc": torch.tensor([25.0, 25.0, 25.0, -25.0], dtype=torch.float64)}
    with pytest.warns(ConvergenceWarning, match="the log posterior of chains 3 stays below that of the others"):
        draws = hmc(model, x, num_chains=4, num_draws=30, num_warmup=40, seed=0, init=init)
    assert draws.attributes["low_chains"] == [3]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"num_chains": 0}, "num_chains must be at least 1, not 0"),
        ({"num_warmup": 5}, "num_warmup must be at least 20, not 5"),
        ({"target_acceptance": 1.0}, "target_acceptance must lie between 0 and 1"),
        ({"init": {"share": torch.tensor([0.5])}}, r"init\['share'\] has 1 rows, and there are 2 chains"),
        ({"init": {"share": torch.full((2, 3), 0.5)}}, r"init\['share'\] must have shape \(2,\), not \(2, 3\)"),
        ({"init": {"w": torch.tensor([0.5])}}, "init must have the sites share, and has w"),
        (
            {"init": {"share": torch.tensor([0.5, math.nan]).double()}},
            "chain 1 starts where the posterior density is 0",
        ),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], words: str) -> None:
    x = X[:, None] if "batched" in setting else X
    with pytest.raises(ValueError, match=words):
        hmc(share_of_two, x, **{"num_chains": 2, "num_draws": 5, "num_warmup": 20, "seed": 0, **setting})


@pytest.mark.parametrize(("name", "value"), [("num_chains", 2.5), ("num_draws", True), ("checkpoint_every", "3")])
def test_settings_that_are_no_integers_are_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an integer, not {value!r}"):
        hmc(share_of_two, X, **{"num_chains": 2, "num_draws": 5, "num_warmup": 20, "seed": 0, name: value})


# What the warm-up adapts, each piece for itself


def test_a_step_is_accepted_by_its_energies() -> None:
    """Energies by hand at half the likelihood, with steps so long that some proposals are refused."""
    posterior = LogPosterior(conjugate, X)
    u = 0.3 * torch.randn(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = torch.ones(40, dtype=torch.float64)
    power, scale = 0.5 * one, torch.tensor([[0.5, 0.7]], dtype=torch.float64).expand(40, 2)
    state = State(u, posterior(u, power))
    kept, step = hmc_module.hmc_step(posterior, state, power, 0.9 * one, scale, 3, torch.Generator().manual_seed(1))
    again = torch.Generator().manual_seed(1)
    momentum = torch.randn(40, 2, generator=again, dtype=torch.float64)
    uniform = torch.rand(40, generator=again, dtype=torch.float64)
    end, final = leapfrog(posterior, state, momentum, power, 0.9 * one, scale, 3)

    def energy(place: Tensor, momentum: Tensor) -> Tensor:
        values = []
        for each, p in zip(place, momentum, strict=True):
            params = posterior.coordinates(each)
            variance, loc = params["variance"], params["loc"]
            log_lik = dist.Normal(loc, variance.sqrt()).log_prob(X).sum()
            prior = dist.InverseGamma(torch.tensor(3.0).to(u), torch.tensor(2.0).to(u)).log_prob(variance)
            prior = prior + dist.Normal(0.5, (variance / 0.7).sqrt()).log_prob(loc) + variance.log()  # variance = exp u
            values.append(p.square().sum() / 2 - prior - log_lik / 2)
        return torch.stack(values)

    before, after = energy(u, momentum), energy(end.u, final)
    accepted = uniform < (before - after).clamp(max=0).exp()
    assert 5 < accepted.sum() < 35
    torch.testing.assert_close(step.acceptance_rate, (before - after).clamp(max=0).exp(), rtol=1e-10, atol=0)
    torch.testing.assert_close(step.energy, torch.where(accepted, after, before), rtol=1e-10, atol=0)
    assert torch.equal(kept.u, torch.where(accepted[:, None], end.u, u))
    found = posterior(kept.u, power)
    for mine, other in zip(kept.evaluation, found, strict=True):
        torch.testing.assert_close(mine, other)


def test_divergences_are_counted_and_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no error of the energy allowed, each proposal that may be refused is one."""
    monkeypatch.setattr(hmc_module, "DIVERGENCE", 0.0)
    with pytest.warns(ConvergenceWarning, match="[1-9][0-9]* draws diverged: raise target_acceptance"):
        draws = hmc(share_of_two, X, num_chains=3, num_draws=20, num_warmup=20, seed=0)
    diverging = draws.sample_stats["diverging"]
    assert torch.equal(diverging, draws.sample_stats["acceptance_rate"] < 1)
    assert draws.attributes["num_divergences"] == diverging.sum()


def test_a_trajectory_that_leaves_all_bounds_diverges_and_is_refused() -> None:
    posterior, one = LogPosterior(conjugate, X), torch.ones(8, dtype=torch.float64)
    u = torch.zeros(8, 2, dtype=torch.float64)
    state, generator = State(u, posterior(u, one)), torch.Generator().manual_seed(0)
    kept, step = hmc_module.hmc_step(posterior, state, one, 30 * one, torch.ones_like(u), 5, generator)
    assert step.diverging.all()
    assert torch.equal(kept.u, u)


def test_scales_are_those_of_a_normal_law() -> None:
    """Of draws from N(m, s^2), whose slope is -(u - m) / s^2, the root of both deviations' ratio is s."""
    sd = torch.tensor([[1.0, 3.0], [4.0, 0.2], [0.5, 7.0]], dtype=torch.float64)[:, None]
    mean = torch.tensor([-2.0, 5.0], dtype=torch.float64)
    u = mean + sd * torch.randn(3, 20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = hmc_module._with_scales(hmc_module._untuned(u[:, 0]), u, -(u - mean) / sd.square())
    own = sd[:, 0].log()
    share = 20 / (20 + hmc_module.POOLED)
    torch.testing.assert_close(found.scale.log(), share * own + (1 - share) * own.mean(0))
    torch.testing.assert_close(found.center, u.mean(1))
    assert (found.log_step == math.log(0.5)).all()


def test_step_sizes_are_those_of_pyros_dual_averaging() -> None:
    rates = torch.rand(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tuning = hmc_module._untuned(torch.zeros(2, 3, dtype=torch.float64))
    pyros = [DualAveraging(math.log(0.1), t0=10, kappa=0.75, gamma=hmc_module.DUAL_AVERAGING_RATE) for _ in range(2)]
    for rate in rates:
        tuning = hmc_module._with_acceptance(tuning, rate, 0.8)
        for chain, other in enumerate(pyros):
            other.step(0.8 - float(rate[chain]))
            log_step, log_step_mean = other.get_state()
            assert float(tuning.log_step[chain]) == pytest.approx(log_step, abs=1e-13)
            assert float(tuning.log_step_mean[chain]) == pytest.approx(log_step_mean, abs=1e-13)


def test_lengths_climb_the_criterion_by_adam() -> None:
    """On a normal law, whose trajectories are known: the criterion by autograd, and torch's Adam."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([[0.5, 3.0]], dtype=torch.float64).expand(6, 2)
    center = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    tuning = hmc_module._untuned(center)._replace(scale=scale, center=center)
    log_length = torch.zeros((), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam(
        [log_length], lr=hmc_module.ADAM_RATE, betas=(0.0, hmc_module.ADAM_DECAY), eps=1e-30, maximize=True
    )
    for _ in range(5):
        q, p = torch.randn(2, 6, 2, generator=generator, dtype=torch.float64)
        time, rate = torch.rand(2, 6, generator=generator, dtype=torch.float64)
        factor = torch.zeros((), dtype=torch.float64, requires_grad=True)
        t = (time * factor.exp())[:, None]
        end, momentum = q * t.cos() + p * t.sin(), p * t.cos() - q * t.sin()
        criterion = (end.square().sum(1) - q.square().sum(1)).square() / 4
        ((rate * criterion).sum() / rate.sum()).backward()
        log_length.grad = factor.grad
        adam.step()
        proposal: Any = State(center + scale * end.detach(), None)  # type: ignore[arg-type]
        step = Step(proposal, momentum.detach(), rate, rate, rate > 2)
        tuning = hmc_module._with_length(tuning, center + scale * q, step, time)
        assert float(tuning.log_length) == pytest.approx(log_length.item(), abs=1e-12)
    assert abs(log_length.item()) > 0.01


def test_windows_double_and_lengths_are_spread_evenly() -> None:
    assert hmc_module._windows(300) == [15, 45, 105, 255]
    assert [hmc_module._halton(number) for number in range(1, 8)] == [1 / 2, 1 / 4, 3 / 4, 1 / 8, 5 / 8, 3 / 8, 7 / 8]


# Published draws


def gauss_mix(y: Tensor) -> None:
    """The posteriordb model low_dim_gauss_mix."""
    support = pyro.distributions.constraints.ordered_vector
    mu = pyro.sample("mu", dist.ImproperUniform(support, (), (2,)))
    pyro.factor("prior_of_mu", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.stack([theta, 1 - theta])), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(mu[z], sigma[z]), obs=y)


def published_scores(sampler: Any, num_chains: int, **settings: Any) -> dict[str, float]:
    y = torch.tensor(json.loads((DATA / "low_dim_gauss_mix.data.json").read_text())["y"], dtype=torch.float64)
    reference = json.loads((DATA / "low_dim_gauss_mix.reference.json").read_text())["stats"]
    init = {
        "mu": torch.tensor([[-1.0, 1.0]] * num_chains, dtype=torch.float64),
        "sigma": torch.ones(num_chains, 2, dtype=torch.float64),
        "theta": torch.full((num_chains,), 0.5, dtype=torch.float64),
    }
    draws = sampler(gauss_mix, y, num_chains=num_chains, seed=0, init=init, **settings)
    found = {}
    for name, value in draws.params.items():
        columns = value.reshape(*value.shape[:2], -1).unbind(-1)
        for i, column in enumerate(columns):
            published = reference[f"{name}[{i + 1}]" if len(columns) > 1 else name]
            series, sd = column.numpy(), published["sd"]
            ess = {
                kind: float(array_stats.ess(series, chain_axis=0, draw_axis=1, method=kind)) for kind in ("mean", "sd")
            }
            error = sd * math.sqrt(1 / ess["mean"] + 1 / 10_000)
            found[f"mean of {name}[{i}]"] = abs(series.mean() - published["mean"]) / error
            # the standard deviation of n independent normal draws has the error sd / sqrt(2 n)
            error = sd * math.sqrt(0.5 / ess["sd"] + 0.5 / 10_000)
            found[f"sd of {name}[{i}]"] = abs(series.std(ddof=1) - sd) / error
    return found


def test_published_posterior_is_met() -> None:
    scores = published_scores(hmc, 16, num_draws=250, num_warmup=150)
    assert len(scores) == 10
    assert max(scores.values()) < 4, scores


@pytest.mark.slow
def test_published_posterior_is_met_by_pyros_sampler() -> None:
    scores = published_scores(nuts, 1, num_draws=500, num_warmup=150)
    assert max(scores.values()) < 4, scores
