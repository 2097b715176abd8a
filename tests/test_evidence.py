"""The evidence against sums over all allocations of few rows, repeated over seeds: its errors are what they say."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor

from mixproof.inference import tempered_smc as smc_module
from mixproof.inference.bridge_sampling import Bridge, _solve, bridge_sampling, variance_of_mean
from mixproof.inference.draws import Draws
from mixproof.inference.evidence import Evidence, _resampled, log_evidence, posterior_probabilities
from mixproof.inference.exact_evidence import exact_draws, exact_log_evidence
from mixproof.inference.gibbs import gibbs
from mixproof.inference.log_posterior import Evaluation, LogPosterior
from mixproof.inference.particles import Replicates
from mixproof.inference.relabelling import Relabelling
from mixproof.inference.tempered_smc import TemperedSMC, tempered_smc
from mixproof.models import bernoulli, gaussian_diagonal, gaussian_full, gaussian_sum
from tests.conftest import Case, randn, seeded

NUM_SEEDS = 50
RARE = 1e-4
"""How often a right estimate may fail one of the tests here over all seeds."""
SMALL: dict[str, Any] = {"num_replicates": 32, "num_chains": 8, "num_moves": 7}


def check_z_scores(z: Tensor) -> None:
    """Assert that z-scores (Z,) of right estimates have mean 0 and unit spread."""
    values = z.numpy()
    assert abs(values.mean()) * math.sqrt(len(z)) < scipy.stats.norm.isf(RARE / 2)
    low, high = scipy.stats.chi2.ppf([RARE / 2, 1 - RARE / 2], len(z) - 1)
    assert low < values.var(ddof=1) * (len(z) - 1) < high


def refuted(z: Tensor) -> bool:
    try:
        check_z_scores(z)
    except AssertionError:
        return True
    return False


class Tiny(NamedTuple):
    """A mixture of so few rows that its evidence is a sum, with two components far apart."""

    x: Tensor
    prior: Any
    posterior: LogPosterior
    exact: float


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    x = torch.tensor([[-6.1], [-5.2], [-5.7], [4.9], [6.3], [5.5], [5.2]], dtype=torch.float64)
    prior = gaussian_diagonal.Prior(
        concentration=torch.tensor([2.0, 2.0], dtype=torch.float64),
        loc=torch.tensor([0.0], dtype=torch.float64),
        strength=torch.tensor(0.05, dtype=torch.float64),
        shape=torch.tensor([4.0], dtype=torch.float64),
        rate=torch.tensor([3.0], dtype=torch.float64),
    )
    posterior = LogPosterior(partial(gaussian_diagonal.model, num_components=2, prior=prior), x)
    return Tiny(x, prior, posterior, float(exact_log_evidence(gaussian_diagonal, x, prior, num_components=2)))


def coins(num_components: int) -> Tiny:
    """Return a mixture of pairs of coins, whose evidence bears on every part of the prior."""
    x = torch.tensor([[1, 0], [1, 1], [0, 0], [1, 1], [0, 1], [1, 1]], dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    prior = bernoulli.Prior(torch.full((num_components,), 2.0, dtype=torch.float64), 2 * ones, 3 * ones)
    posterior = LogPosterior(partial(bernoulli.model, num_components=num_components, prior=prior), x)
    return Tiny(x, prior, posterior, float(exact_log_evidence(bernoulli, x, prior, num_components=num_components)))


@pytest.fixture(scope="module")
def runs(tiny: Tiny) -> list[TemperedSMC]:
    relabel = Relabelling(tiny.posterior).random
    return [tempered_smc(tiny.posterior, seed=seed, relabel=relabel, **SMALL) for seed in range(NUM_SEEDS)]


def smc_z_scores(posterior: LogPosterior, exact: float, num_seeds: int) -> Tensor:
    found = [tempered_smc(posterior, seed=seed, **SMALL) for seed in range(num_seeds)]
    return torch.tensor([(run.log_evidence - exact) / run.standard_error for run in found])


def bridges(tiny: Tiny, num_seeds: int, posterior: LogPosterior, relabelling: Relabelling | None) -> list[Any]:
    """Return bridges from independent draws, of which one label is aligned with one cluster."""
    found = []
    for seed in range(num_seeds):
        params = exact_draws(
            gaussian_diagonal, tiny.x, tiny.prior, num_components=2, num_draws=400, generator=seeded(seed)
        )
        draws = posterior.unconstrain(params._asdict())
        draws = draws[params.locs[:, 0, 0] < params.locs[:, 1, 0]]
        found.append(bridge_sampling(posterior, draws[None], seed=seed, relabelling=relabelling))
    return found


# Errors are true


@pytest.mark.slow
def test_smc_has_a_true_standard_error(tiny: Tiny, runs: list[TemperedSMC]) -> None:
    check_z_scores(torch.tensor([(run.log_evidence - tiny.exact) / run.standard_error for run in runs]))


@pytest.mark.slow
def test_a_replicate_estimates_the_evidence_itself_without_bias(tiny: Tiny, runs: list[TemperedSMC]) -> None:
    ratios = (torch.stack([run.log_evidences for run in runs]) - tiny.exact).exp()
    error = float(ratios.mean(1).std()) / math.sqrt(len(runs))
    assert abs(float(ratios.mean()) - 1) < scipy.stats.norm.isf(RARE / 2) * error


@pytest.mark.slow
def test_bridge_from_particles_has_a_true_standard_error(tiny: Tiny, runs: list[TemperedSMC]) -> None:
    relabelling = Relabelling(tiny.posterior)
    z = []
    for seed, run in enumerate(runs):
        weights = (run.log_evidences - run.log_evidence).exp()
        found = bridge_sampling(tiny.posterior, run.u, seed=seed, relabelling=relabelling, weights=weights)
        z.append((found.log_evidence - tiny.exact) / found.standard_error)
    check_z_scores(torch.tensor(z))


def test_bridge_from_independent_draws_has_a_true_standard_error(tiny: Tiny) -> None:
    found = bridges(tiny, NUM_SEEDS, tiny.posterior, Relabelling(tiny.posterior))
    check_z_scores(torch.tensor([(bridge.log_evidence - tiny.exact) / bridge.standard_error for bridge in found]))


def test_bridge_to_one_mode_is_too_low_by_log_2(tiny: Tiny) -> None:
    found = bridges(tiny, NUM_SEEDS, tiny.posterior, None)
    z = torch.tensor([(bridge.log_evidence - tiny.exact + math.log(2)) / bridge.standard_error for bridge in found])
    check_z_scores(z)
    assert refuted(torch.tensor([(bridge.log_evidence - tiny.exact) / bridge.standard_error for bridge in found]))


# Planted faults


class WithoutJacobian(LogPosterior):
    def __call__(self, u: Tensor, temperature: Tensor) -> Evaluation:
        found = super().__call__(u, temperature)
        jacobian = torch.func.vmap(torch.func.grad(self.coordinates.log_jacobian))(u)
        return Evaluation(found.gradient - jacobian, found.log_prior - self.log_jacobian(u), found.log_likelihood)


class WithTemperedPrior(LogPosterior):
    """Raises the prior too to a power that the temperature carries to 1: from 1/2 on, where it still is a density."""

    def __call__(self, u: Tensor, temperature: Tensor) -> Evaluation:
        power = (1 + temperature) / 2
        of_prior = super().__call__(u, torch.zeros_like(temperature)).gradient
        found = super().__call__(u, temperature)
        gradient = found.gradient + (power - 1)[:, None] * of_prior
        return found._replace(gradient=gradient, log_prior=power * found.log_prior)


@pytest.mark.parametrize("fault", [WithoutJacobian, WithTemperedPrior])
def test_a_wrong_density_is_caught_in_smc(fault: Callable[..., LogPosterior]) -> None:
    x, _, posterior, exact = coins(2)
    assert refuted(smc_z_scores(fault(posterior.model, x), exact, 6))


def test_weights_forgotten_at_resampling_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = smc_module.systematic
    monkeypatch.setattr(
        smc_module, "systematic", lambda weights, *rest: right(weights.sign() / weights.shape[1], *rest)
    )
    _, _, posterior, exact = coins(2)
    assert refuted(smc_z_scores(posterior, exact, 6))


def test_a_missing_jacobian_is_caught_in_the_bridge(tiny: Tiny) -> None:
    posterior = WithoutJacobian(tiny.posterior.model, tiny.x)
    found = bridges(tiny, 6, posterior, Relabelling(posterior))
    assert refuted(torch.tensor([(bridge.log_evidence - tiny.exact) / bridge.standard_error for bridge in found]))


# The bridge on values whose answer is known


def log_ratios(seed: int, log_evidence: float, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return log target - log proposal of N(0, 1) e^log_evidence and N(1/2, 1), at draws of each."""
    generator = seeded(seed)
    draws = torch.randn(*shape, generator=generator, dtype=torch.float64)
    proposed = torch.randn(shape[0] * shape[1], generator=generator, dtype=torch.float64) + 0.5
    first, second = (((u - 0.5).square() - u.square()) / 2 + log_evidence for u in (draws, proposed))
    return first, second


def test_the_root_of_the_bridge_is_the_evidence() -> None:
    z = []
    for seed in range(NUM_SEEDS):
        found = _solve(*log_ratios(seed, -10.0, (16, 50)), torch.ones(16, dtype=torch.float64))
        z.append((found.log_evidence + 10) / found.standard_error)
    check_z_scores(torch.tensor(z))


def test_draws_of_a_wrong_law_with_weights_that_mend_it() -> None:
    """Half of the chains are wrong and have no weight; counted like the others they would move the root by far."""
    z: list[float] = []
    unweighted: list[float] = []
    for seed in range(NUM_SEEDS):
        first, second = log_ratios(seed, -10.0, (16, 50))
        wrong = first.clone()
        wrong[::2] += 2.0
        weights = torch.tensor([0.0, 1.0] * 8, dtype=torch.float64)
        for scores, own in ((z, weights), (unweighted, torch.ones_like(weights))):
            found = _solve(wrong, second, own)
            scores.append((found.log_evidence + 10) / found.standard_error)
    assert abs(sum(z) / len(z)) * math.sqrt(len(z)) < scipy.stats.norm.isf(RARE / 2)
    assert refuted(torch.tensor(unweighted))


def test_the_unit_of_the_weights_does_not_matter_in_either_half(tiny: Tiny) -> None:
    """Chains 0, 2, ... are one half, and 1, 3, ... the other."""
    params = exact_draws(gaussian_diagonal, tiny.x, tiny.prior, num_components=2, num_draws=400, generator=seeded(1))
    u = tiny.posterior.unconstrain(params._asdict()).reshape(8, 50, -1)
    weights = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    scales = torch.tensor([3.0, 0.2] * 4, dtype=torch.float64)
    run = partial(bridge_sampling, tiny.posterior, u, seed=1, relabelling=Relabelling(tiny.posterior))
    assert run(weights=scales * weights) == pytest.approx(run(weights=weights), rel=1e-10)
    assert run(weights=weights).log_evidence != pytest.approx(run().log_evidence, rel=1e-6)


def test_both_halves_are_used(tiny: Tiny) -> None:
    """A change to any chain changes the result; each half is once what is fitted to and once what is bridged."""
    params = exact_draws(gaussian_diagonal, tiny.x, tiny.prior, num_components=2, num_draws=400, generator=seeded(1))
    u = tiny.posterior.unconstrain(params._asdict()).reshape(8, 50, -1)
    weights = torch.ones(8, dtype=torch.float64)
    run = partial(bridge_sampling, tiny.posterior, u, seed=1, relabelling=Relabelling(tiny.posterior))
    alike = run(weights=weights).log_evidence
    for chain in (0, 1):  # weights bear only on the half that is bridged
        assert run(weights=weights.clone().index_fill_(0, torch.tensor(chain), 0.0)).log_evidence != alike


# Two properties of a run


def planted_run(logs: list[float]) -> Replicates:
    return Replicates(torch.tensor(logs, dtype=torch.float64))


def test_the_evidence_is_the_mean_of_the_evidences_and_not_of_their_logarithms() -> None:
    """Evidences 1, 2, 3 and 6: their mean is 3, and the standard error of its logarithm sqrt(14 / 3) / 2 / 3."""
    found = planted_run([math.log(value) for value in (1.0, 2.0, 3.0, 6.0)])
    assert found.log_evidence == pytest.approx(math.log(3), rel=1e-14)
    assert found.standard_error == pytest.approx(math.sqrt(14 / 3) / 2 / 3, rel=1e-14)


def test_replicates_that_decide_the_mean_are_counted_and_those_that_miss_a_mode_are_not() -> None:
    assert planted_run([-3.0] * 32).effective_replicates == pytest.approx(32, rel=1e-12)
    assert planted_run([-3.0] * 31 + [-149.0]).effective_replicates == pytest.approx(31, rel=1e-12)
    assert planted_run([-3.0] * 31 + [7.0]).effective_replicates == pytest.approx(1, abs=0.01)
    assert planted_run([math.log(value) for value in (1.0, 2.0, 3.0)]).effective_replicates == pytest.approx(36 / 14)


@pytest.mark.parametrize(("effective", "warns"), [(2.9, True), (3.0, False)])  # 8 / e is 2.94
def test_few_replicates_that_decide_the_mean_are_a_warning(
    effective: float, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Replicates, "effective_replicates", effective)
    run = partial(tempered_smc, coins(2).posterior, seed=1, num_replicates=8, num_chains=4, num_moves=3)
    with pytest.warns(UserWarning, match="of 8 replicates rests on 2.9 of them") if warns else nullcontext():
        run()


# Families and programs


def check_smc(
    model: Callable[..., Any], x: Tensor, exact: float, limit: float = scipy.stats.t.isf(RARE / 2, 31)
) -> None:
    found = log_evidence(model, x, method="smc", seed=1)
    assert abs(found.log_evidence - exact) < limit * found.standard_error
    assert found.standard_error < 1


def test_every_family_whose_evidence_is_a_sum(case: Case) -> None:
    if not hasattr(case.family, "log_marginal"):
        return
    x, prior = case.data(3, num_data=6, k=2), case.prior(1, k=2)
    exact = float(exact_log_evidence(case.family, x, prior, num_components=2))
    check_smc(case.program(2, prior), x, exact)


@pytest.mark.parametrize("num_components", [1, 2, 3])
def test_exchangeable_components(num_components: int) -> None:
    x, _, posterior, exact = coins(num_components)
    model = posterior.model
    check_smc(model, x, exact)
    found = log_evidence(model, x, method="bridge", seed=2, **SMALL)
    assert abs(found.log_evidence - exact) < scipy.stats.norm.isf(RARE / 2) * found.standard_error


@pytest.mark.parametrize("with_family", [True, False])
@pytest.mark.parametrize("concentration", [0.1, 0.01])
def test_weights_of_any_size_above_zero(concentration: float, with_family: bool) -> None:
    """Sparse Dirichlet priors, whose weights go down to 1e-300: stick-breaking, as torch has it, puts the bridge at
    -573.5 for a concentration of 0.01, and says that it is sure."""
    x = torch.cat([randn(4, 1, generator=seeded(0)), 4 + randn(4, 1, generator=seeded(1))])
    prior = gaussian_diagonal.weakly_informative_prior(x, 3)
    prior = prior._replace(concentration=torch.full((3,), concentration, dtype=torch.float64))
    exact = float(exact_log_evidence(gaussian_diagonal, x, prior, num_components=3))
    model = partial(gaussian_diagonal.model, num_components=3, prior=prior)
    found = log_evidence(model, x, seed=1, family=gaussian_diagonal if with_family else None)
    for name, value, error in (
        ("bridge", found.log_evidence, found.standard_error),
        ("smc", found.diagnostics["smc_log_evidence"], found.diagnostics["smc_standard_error"]),
    ):
        assert abs(value - exact) < scipy.stats.t.isf(RARE / 2, 31) * error, name
    draws = exact_draws(gaussian_diagonal, x, prior, num_components=3, num_draws=2000, generator=seeded(2))
    params = {name: value.unflatten(0, (4, -1)) for name, value in draws._asdict().items()}
    given = log_evidence(model, x, draws=Draws(params, {}, {}), seed=3)
    assert abs(given.log_evidence - exact) < scipy.stats.norm.isf(RARE / 2) * given.standard_error


def test_probabilities_that_round_to_one_have_no_bridge() -> None:
    """Under Beta(0.05, 0.05) a sixth of those above a half are 1 in floating point; the sum over rows needs none."""
    x = (randn(9, 3, generator=seeded(0)) > 0).double()
    prior = bernoulli.Prior(*(torch.full((size,), value).double() for size, value in ((2, 1.0), (3, 0.05), (3, 0.05))))
    exact = float(exact_log_evidence(bernoulli, x, prior, num_components=2))
    model = partial(bernoulli.model, num_components=2, prior=prior)
    with pytest.warns(
        UserWarning, match="no bridge from the particles.* of the draws of probs lie within rounding of 1"
    ):
        found = log_evidence(model, x, family=bernoulli, seed=0)
    assert abs(found.log_evidence - exact) < scipy.stats.t.isf(RARE / 2, 31) * found.standard_error


def test_two_normal_summands_under_one_prior_have_an_evidence() -> None:
    """Weights of a single component are 1 in every draw, and do not tell the summands apart."""
    x = randn(6, 1, generator=seeded(0)) * 2
    part = gaussian_full.Prior(*(torch.as_tensor(v).double() for v in ([1.0], [0.0], 0.5, 4.0, [[2.0]])))
    model = partial(gaussian_sum.model, num_components=(1, 1), prior=gaussian_sum.Prior(part, part))
    found = log_evidence(model, x, seed=0)
    generator, size = np.random.default_rng(1), (1_000_000, 2)
    variances = scipy.stats.invgamma.rvs(2, scale=1, size=size, random_state=generator)  # of one feature
    locs = generator.normal(size=size) * np.sqrt(variances / 0.5)
    law = scipy.stats.norm(locs.sum(1)[:, None], np.sqrt(variances.sum(1))[:, None])
    likelihood = np.exp(law.logpdf(x.mT.numpy()).sum(1))  # plain Monte Carlo
    mean, error = likelihood.mean(), likelihood.std() / math.sqrt(len(likelihood))
    assert abs(found.log_evidence - math.log(mean)) < 5 * math.hypot(found.standard_error, error / mean)


def test_rows_in_single_precision_and_the_callers_random_numbers(tiny: Tiny) -> None:
    """The first have an evidence too, and the second are as they were."""
    x = randn(8, 2, generator=seeded(0)).float()
    prior = gaussian_full.weakly_informative_prior(x, 2)
    before = torch.get_rng_state()
    found = log_evidence(partial(gaussian_full.model, num_components=2, prior=prior), x, seed=0, **SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    doubles = gaussian_full.Prior(*(value.double() for value in prior))
    exact = float(exact_log_evidence(gaussian_full, x.double(), doubles, num_components=2))
    assert abs(found.log_evidence - exact) < scipy.stats.norm.isf(RARE / 2) * found.standard_error


def test_a_bridge_that_cannot_be_built_leaves_the_particles_evidence(tiny: Tiny) -> None:
    settings: dict[str, Any] = {"num_replicates": 4, "num_chains": 2, "num_moves": 1}
    program = partial(gaussian_diagonal.model, num_components=2, prior=tiny.prior)
    with pytest.warns(UserWarning, match="no bridge from the particles, whose own evidence it is: .* are too few"):
        found = log_evidence(program, tiny.x, family=gaussian_diagonal, seed=0, **settings)
    alone = log_evidence(program, tiny.x, family=gaussian_diagonal, seed=0, method="smc", **settings)
    assert found[:2] == alone[:2]


@pytest.mark.parametrize(("off", "agrees"), [(0.1, True), (-3.0, False), (3.0, False)])
def test_a_bridge_that_the_particles_contradict_is_no_better_than_their_distance(
    off: float, agrees: bool, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = partial(gaussian_diagonal.model, num_components=2, prior=tiny.prior)
    few: Any = {"seed": 0, "num_replicates": 8, "num_chains": 16}
    particles = log_evidence(program, tiny.x, family=gaussian_diagonal, method="smc", **few)
    wrong = Bridge(particles.log_evidence + off, 0.1, 100.0)
    monkeypatch.setattr("mixproof.inference.evidence.bridge_sampling", lambda *_, **__: wrong)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = log_evidence(program, tiny.x, family=gaussian_diagonal, **few)
    assert found.log_evidence == wrong.log_evidence
    assert found.standard_error == pytest.approx(0.1 if agrees else 3, rel=1e-12)
    said = any("its standard error is their distance" in str(each.message) for each in caught)
    assert said is not agrees


def test_an_evidence_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ArithmeticError, match=r"the evidence of the particles is nan: .* centre and scale"):
        Replicates(torch.tensor([-3.0, math.nan])).check()


def test_the_chains_of_the_draws_share_no_replicate() -> None:
    """Draws say which replicate they are from; in a chain they are as many as the evidence of that says."""
    where = torch.arange(8.0).double()[:, None].expand(8, 50)
    logs = torch.tensor([0.0, math.log(3.0)] * 4).double()
    found = _resampled(Draws({"where": where}, {"lp": where}, {}), logs, seed=0)
    assert found.params["where"].shape == (4, 100)
    for chain, values in enumerate(found.params["where"]):
        first, second = ((values == 2 * chain + own).sum().item() for own in (0, 1))
        assert first + second == 100
        assert abs(first - 25) <= 1
    assert torch.equal(found.params["where"], found.sample_stats["lp"])


def test_one_component_has_a_closed_form_for_any_number_of_rows(real_data: dict[str, Tensor]) -> None:
    x = real_data["carcinoma"]
    ones = torch.ones(x.shape[1], dtype=torch.float64)
    prior = bernoulli.Prior(torch.ones(1, dtype=torch.float64), ones, ones)
    counts = x.sum(0)
    exact = float((torch.lgamma(counts + 1) + torch.lgamma(len(x) - counts + 1) - math.lgamma(len(x) + 2)).sum())
    model = partial(bernoulli.model, num_components=1, prior=prior)
    check_smc(model, x, exact)
    found = log_evidence(model, x, method="bridge", seed=2, **SMALL)
    assert abs(found.log_evidence - exact) < scipy.stats.norm.isf(RARE / 2) * found.standard_error


# Neal 1999 (https://glizen.com/radfordneal/ftp/chib-mix.pdf), of Chib 1995: galaxies, two components of one variance


def galaxies(x: Tensor, num_components: int) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(num_components)))
    variance = pyro.sample("variance", dist.InverseGamma(torch.tensor(3.0), torch.tensor(20.0)))
    with pyro.plate("components", num_components):
        locs = pyro.sample("locs", dist.Normal(torch.tensor(20.0), torch.tensor(10.0)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[z], variance.sqrt()), obs=x)


def test_the_evidence_that_neal_published() -> None:
    x = torch.as_tensor(np.loadtxt(Path(__file__).parent / "data" / "galaxies_roeder1990.txt"))
    model = partial(galaxies, num_components=2)
    bridge = log_evidence(model, x, method="bridge", seed=1)
    assert abs(bridge.log_evidence - -239.764) < 0.02
    smc = log_evidence(model, x, method="smc", seed=2)
    error = math.hypot(smc.standard_error, bridge.standard_error)
    assert abs(smc.log_evidence - bridge.log_evidence) < scipy.stats.t.isf(RARE / 2, 31) * error


def check_routes_agree(x: Tensor, family: Any, num_components: int, limit: float) -> None:
    """Particles by rows, their bridge, and a bridge from the draws of Gibbs chains: three routes to one number."""
    prior = family.weakly_informative_prior(x, num_components)
    program = partial(family.model, num_components=num_components, prior=prior)
    found = log_evidence(program, x, family=family, seed=1)
    chains = gibbs(
        family,
        x,
        prior,
        num_components=num_components,
        num_chains=32,
        num_draws=250,
        num_warmup=250,
        generator=seeded(2),
    )
    other = log_evidence(program, x, draws=chains, seed=3)
    smc = found.diagnostics["smc_log_evidence"], found.diagnostics["smc_standard_error"]
    for (left, left_error), (right, right_error) in itertools.combinations((smc, found[:2], other[:2]), 2):
        error = math.hypot(left_error, right_error)
        assert error < limit
        assert abs(left - right) < 4 * error


def test_routes_agree_on_old_faithful(real_data: dict[str, Tensor]) -> None:
    check_routes_agree(real_data["faithful"], gaussian_full, 2, 0.5)


# Relabelling


def test_relabelling_is_a_symmetry_and_alignment_undoes_it(tiny: Tiny) -> None:
    relabelling = Relabelling(tiny.posterior)
    u = tiny.posterior.draw_prior(50, seed=1)
    renamed = relabelling.random(u, seeded(2))
    one = torch.ones(50, dtype=torch.float64)
    density = [(tiny.posterior(v, one), tiny.posterior.log_jacobian(v)) for v in (u, renamed)]
    for sides in zip(*((found.log_prior - jacobian, found.log_likelihood) for found, jacobian in density), strict=True):
        torch.testing.assert_close(*sides, rtol=1e-9, atol=1e-9)
    assert 0 < int((renamed != u).any(1).sum()) < 50
    references = relabelling.learn(u)
    aligned = relabelling.align(renamed, references)
    torch.testing.assert_close(aligned, relabelling.align(u, references), rtol=1e-9, atol=1e-9)
    assert relabelling.is_aligned(aligned, references).all()
    assert relabelling.log_count == pytest.approx(math.log(2))


def test_components_that_the_prior_tells_apart_have_no_relabelling(tiny: Tiny) -> None:
    prior = tiny.prior._replace(concentration=torch.tensor([1.0, 2.0], dtype=torch.float64))
    told_apart = LogPosterior(partial(gaussian_diagonal.model, num_components=2, prior=prior), tiny.x)
    assert Relabelling(told_apart).log_count == 0


# The variance of a mean


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_variance_of_the_mean_of_dependent_chains(correlation: float) -> None:
    chains, draws, repetitions = 8, 500, 200
    noise = torch.randn(repetitions, chains, draws, generator=seeded(1), dtype=torch.float64)
    series = noise.clone()
    for i in range(1, draws):
        series[..., i] = correlation * series[..., i - 1] + math.sqrt(1 - correlation**2) * noise[..., i]
    claimed = torch.stack([variance_of_mean(each) for each in series]).mean()
    spread = series.mean((1, 2)).var() / claimed * (repetitions - 1)
    low, high = scipy.stats.chi2.ppf([RARE / 2, 1 - RARE / 2], repetitions - 1)
    assert low < float(spread) < high


@pytest.mark.parametrize("draws", [1, 2, 5])
def test_variance_of_the_mean_of_many_short_chains(draws: int) -> None:
    chains, repetitions = 500, 40
    values = torch.randn(repetitions, chains, draws, generator=seeded(draws), dtype=torch.float64)
    ratios = torch.stack([variance_of_mean(each) for each in values]) * chains * draws  # the truth is 1 / (C S)
    error = math.sqrt(2 / (chains - 1) / repetitions)  # of the mean of variances of normal means
    assert abs(float(ratios.mean()) - 1) < scipy.stats.norm.isf(RARE / 2) * error


def test_differences_between_chains_count() -> None:
    chains = torch.randn(100, 1, generator=seeded(1), dtype=torch.float64)
    values = chains + 0.1 * torch.randn(100, 50, generator=seeded(2), dtype=torch.float64)
    assert float(variance_of_mean(values)) == pytest.approx(float(values.mean(1).var()) / 100, rel=0.2)


# Candidates


def evidence(log_evidence: float, standard_error: float) -> Evidence:
    return Evidence(log_evidence, standard_error, Draws({}, {}, {}), {})


def test_posterior_probabilities_and_their_errors() -> None:
    logs, errors, before = np.array([-10.0, -9.0, -11.5]), np.array([0.02, 0.05, 0.03]), np.array([1.0, 2.0, 1.0])
    candidates = {k: evidence(*each) for k, each in enumerate(zip(logs, errors, strict=True), 1)}
    found = posterior_probabilities(candidates, dict(enumerate(before, 1)))
    mass = before * np.exp(logs)
    rng = np.random.default_rng(1)
    samples = before * np.exp(logs + errors * rng.standard_normal((100_000, 3)))
    samples /= samples.sum(1, keepdims=True)
    for (probability, error), expected, sample in zip(found.values(), mass / mass.sum(), samples.T, strict=True):
        assert probability == pytest.approx(expected, rel=1e-12)
        assert error == pytest.approx(sample.std(), rel=0.02)  # of a linearisation: errors squared, and simulation
    assert sum(probability for probability, _ in found.values()) == pytest.approx(1)


# Bad input


def test_failures_are_said_in_words(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_param(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z.to(x.dtype), scale).to_event(0), obs=x)

    def impossible(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.tensor(0.0), torch.tensor(1.0)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc + z, 1.0).mask(False), obs=x)
            pyro.factor("never", torch.where(loc > 100.0, 0.0, -math.inf) * torch.ones(len(x)))

    def half_observed(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.tensor(0.0), torch.tensor(1.0)))
        pyro.sample("summary", dist.Normal(loc, torch.tensor(1.0)), obs=torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc + z, 1.0), obs=x)

    row = tiny.x[:, 0]
    flat = partial(gaussian_diagonal.model, num_components=2)
    prior = gaussian_diagonal.weakly_informative_prior(tiny.x, 2)
    endless = partial(flat, prior=prior._replace(strength=torch.zeros_like(prior.strength)))
    cases: list[tuple[Any, Tensor, str]] = [
        (flat, tiny.x, '"weights" is improper'),
        (endless, tiny.x, '"locs" is improper'),
        (with_param, row, '"scale" is a pyro.param'),
        (half_observed, row, '"summary" is observed outside'),
        (impossible, row, "no row has a density at any of 16 points"),
    ]
    for model, data, words in cases:
        with pytest.raises(ValueError, match=words):
            log_evidence(model, data, seed=1, **SMALL)
    with pytest.raises(ValueError, match="num_moves must be at least 1"):
        tempered_smc(tiny.posterior, seed=1, num_moves=0)
    with pytest.raises(ValueError, match="efficiency must lie between"):
        tempered_smc(tiny.posterior, seed=1, efficiency=1.0)
    with pytest.raises(ValueError, match='"smc" or "bridge"'):
        log_evidence(tiny.posterior.model, tiny.x, method="chib", seed=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lack the sites"):
        log_evidence(tiny.posterior.model, tiny.x, method="bridge", draws=Draws({"locs": tiny.x}, {}, {}), seed=1)
    with pytest.raises(ValueError, match="there are no candidates"):
        posterior_probabilities({})
    with pytest.raises(ValueError, match="must be positive"):
        posterior_probabilities({1: evidence(0.0, 0.1)}, {1: 0.0})
    for nothing in (evidence(math.nan, 0.1), evidence(-math.inf, 0.1), evidence(0.0, math.nan)):
        with pytest.raises(ValueError, match=r"the log evidence of 2 is .* leave 2 out"):
            posterior_probabilities({1: evidence(0.0, 0.1), 2: nothing})


def test_particles_that_do_not_move_are_an_error(tiny: Tiny) -> None:
    class Frozen(LogPosterior):
        """Is a number only where the particles start."""

        started = False

        def __call__(self, u: Tensor, temperature: Tensor) -> Evaluation:
            found = super().__call__(u, temperature)
            if self.started:
                return found._replace(log_prior=torch.full_like(found.log_prior, math.nan))
            self.started = True
            return found

    with pytest.raises(RuntimeError, match="do not move"):
        tempered_smc(Frozen(tiny.posterior.model, tiny.x), seed=1, **SMALL)


def test_an_interrupt_says_how_far_it_was(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = itertools.count()
    right = smc_module.systematic

    def interrupted(*args: Any) -> Tensor:
        if next(steps) == 2:
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr(smc_module, "systematic", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        tempered_smc(tiny.posterior, seed=1, **SMALL)
    assert "no evidence before temperature 1" in caught.value.__notes__[0]


def test_the_same_seed_gives_the_same_evidence_and_draws(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (
        log_evidence(tiny.posterior.model, tiny.x, method="bridge", seed=5, progress=progress, **SMALL)
        for progress in (False, True)
    )
    assert first[:2] == second[:2]
    assert torch.equal(first.draws.params["locs"], second.draws.params["locs"])
    captured = capsys.readouterr()
    assert "SMC temperature" in captured.err
    assert not captured.out


# A sum of two mixtures under one prior


def sum_of_two(same: bool) -> LogPosterior:
    """Return the posterior of a sum of two mixtures of two, under priors that are the same or not."""
    rows = torch.tensor([[-4.0], [-3.5], [0.2], [4.1], [3.6]], dtype=torch.float64)
    one, few = torch.ones(2, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    part = gaussian_full.Prior(one, torch.zeros(1, dtype=torch.float64), few, 20 * few, few[None, None])
    other = part if same else part._replace(strength=2 * few)
    prior = gaussian_sum.Prior(part, other)
    return LogPosterior(partial(gaussian_sum.model, num_components=(2, 2), prior=prior), rows)


def test_summands_under_one_prior_may_change_places() -> None:
    posterior = sum_of_two(same=True)
    relabelling = Relabelling(posterior)
    assert relabelling.log_count == pytest.approx(math.log(2 * 2 * 2))
    u = posterior.draw_prior(400, seed=1)
    renamed = relabelling.random(u, seeded(2))
    one = torch.ones(len(u), dtype=torch.float64)
    density = [(posterior(v, one), posterior.log_jacobian(v)) for v in (u, renamed)]
    for sides in zip(*((found.log_prior - jacobian, found.log_likelihood) for found, jacobian in density), strict=True):
        torch.testing.assert_close(*sides, rtol=1e-9, atol=1e-9)
    references = relabelling.learn(u)
    aligned = relabelling.align(renamed, references)
    torch.testing.assert_close(aligned, relabelling.align(u, references), rtol=1e-9, atol=1e-9)
    assert relabelling.is_aligned(aligned, references).all()
    inside = int(relabelling.is_aligned(renamed, references).sum())  # one in eight of an invariant law
    assert scipy.stats.binomtest(inside, len(u), 1 / 8).pvalue > RARE
    assert Relabelling(sum_of_two(same=False)).log_count == pytest.approx(math.log(2 * 2))


@pytest.mark.slow
def test_draws_of_one_order_of_the_summands_give_the_whole_evidence() -> None:
    """Draws whose x has the larger spread show half of the posterior: log 2 is added to it, as of labels."""
    posterior = sum_of_two(same=True)
    whole = log_evidence(posterior.model, *posterior.args, seed=1, num_replicates=16, num_chains=16, num_moves=7)
    params = {site: value.clone() for site, value in whole.draws.params.items()}
    spread = [params[f"{part}_covariances"].sum((2, 3, 4)) for part in "xy"]
    swap = spread[0] < spread[1]
    for name in ("weights", "locs", "covariances"):
        x, y = whole.draws.params[f"x_{name}"], whole.draws.params[f"y_{name}"]
        where = swap.reshape(*swap.shape, *[1] * (x.ndim - 2))
        params[f"x_{name}"], params[f"y_{name}"] = torch.where(where, y, x), torch.where(where, x, y)
    half = whole.draws._replace(params=params)
    found = log_evidence(posterior.model, *posterior.args, draws=half, seed=2)
    error = math.hypot(found.standard_error, whole.standard_error)
    assert abs(found.log_evidence - whole.log_evidence) < 4 * error
