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
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference import hmc as hmc_module
from mixproof.inference.draws import Draws
from mixproof.inference.hmc import State, hmc, initial_points, leapfrog, low_chains
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


def conjugate_moments(x: Tensor) -> dict[str, tuple[float, float]]:
    """Return mean and variance of each parameter given the data (Gelman et al., 3rd edition, section 3.3)."""
    n, mean = len(x), float(x.mean())
    strength, shape = 0.7 + n, 3 + n / 2
    rate = 2 + float((x - mean).square().sum()) / 2 + 0.7 * n / strength * (mean - 0.5) ** 2 / 2
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
    params = {name: value.reshape(-1) for name, value in draws.params.items()}
    posterior = LogPosterior(model, X)
    u = posterior.unconstrain(params)
    parts = posterior(u[:50], torch.ones(50, dtype=torch.float64))
    lp = parts.log_prior + parts.log_likelihood - posterior.log_jacobian(u[:50])
    assert (draws.sample_stats["lp"].reshape(-1)[:50] - lp).abs().max() < 1e-9


def kernel_scores() -> dict[str, float]:
    """Return as ``z_scores`` what some coarse steps make of exact draws, one a chain: the law must stay as it is."""
    size = 40_000
    n, mean = len(X), float(X.mean())
    shape = 3 + n / 2
    rate = conjugate_moments(X)["variance"][0] * (shape - 1)
    generator = np.random.default_rng(0)
    variance = rate / generator.gamma(shape, size=size)
    loc = generator.normal((0.7 * 0.5 + n * mean) / (0.7 + n), np.sqrt(variance / (0.7 + n)))
    posterior = LogPosterior(conjugate, X)
    u = posterior.unconstrain({"variance": torch.as_tensor(variance), "loc": torch.as_tensor(loc)})
    one = torch.ones(size, dtype=torch.float64)
    state, draws = State(u, posterior(u, one)), torch.Generator().manual_seed(1)
    scale = u.std(0).expand_as(u)
    for _ in range(6):
        state, _ = hmc_module.hmc_step(posterior, state, one, 1.3 * one, scale, 2, draws)
    params = {name: value[:, None] for name, value in posterior.constrain(state.u).items()}
    found = {}
    for name, (center, spread) in conjugate_moments(X).items():
        values = params[name].numpy().reshape(-1)
        for word, series, truth in (("mean", values, center), ("variance", (values - center) ** 2, spread)):
            found[f"{word} of {name}"] = abs(series.mean() - truth) / (series.std() / math.sqrt(size))
    return found


def test_steps_keep_the_law_of_exact_draws() -> None:
    scores = kernel_scores()
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
    rows[2500] += 1e-12
    with pytest.raises(ValueError, match="belongs to another run, which differs in data"):
        hmc(partial(model, loc=0.0), {"x": [rows]}, **settings, checkpoint=file)
    with pytest.raises(TypeError, match="cannot tell one partial from another"):
        hmc(share_of_two, partial(model), **settings, checkpoint=file)


def test_a_data_set_without_a_start_is_named() -> None:
    """The second data set lies outside the support that every draw from the prior gives it."""

    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(torch.ones(1)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Gamma(1.0, scale), obs=x)

    data = torch.tensor([[1.0, 2.0], [math.nan, 1.0]], dtype=torch.float64)
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
        ({"init": {"w": torch.tensor([0.5])}}, "init must have the sites share, and has w"),
        (
            {"init": {"share": torch.tensor([0.5, math.nan]).double()}},
            "chain 1 starts where the posterior density is 0",
        ),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        hmc(share_of_two, X, **{"num_chains": 2, "num_draws": 5, "num_warmup": 20, "seed": 0, **setting})


@pytest.mark.parametrize("model", [conjugate, share_of_two], ids=lambda model: model.__name__)
def test_pyros_sampler_draws_the_same_from_a_trace(model: Any) -> None:
    """A few steps, before rounding grows; the latents summed out, and lp by another route."""
    settings: Any = {"num_chains": 1, "num_draws": 5, "num_warmup": 5, "seed": 3}
    plain, traced = (nuts(model, X, **settings, jit_compile=jit_compile) for jit_compile in (False, True))
    posterior = LogPosterior(model, X)
    u = posterior.unconstrain({name: value[0] for name, value in traced.params.items()})
    parts = posterior(u, torch.ones_like(u[:, 0]))
    lp = parts.log_prior + parts.log_likelihood - posterior.log_jacobian(u)
    assert (traced.sample_stats["lp"][0] - lp).abs().max() < 1e-10
    for name, value in plain.params.items():
        assert (traced.params[name] - value).abs().max() < 1e-8
        assert len(value.unique()) > 1


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
