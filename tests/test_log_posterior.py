"""The vectorised log posterior: against the families' formulas, one point at a time, autograd; for every support."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx

from mixproof.inference import captured_graph, log_posterior
from mixproof.inference.captured_graph import capture
from mixproof.inference.enumeration import inspect, log_density, log_joint_table
from mixproof.inference.evidence import log_evidence
from mixproof.inference.log_posterior import LogPosterior
from mixproof.models.positive_definite import InverseWishart

if TYPE_CHECKING:
    from tests.conftest import Case

ROUNDING = 1e-11  # of sums of some hundred terms, relative to the largest
X = torch.randn(12, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def points(posterior: LogPosterior, count: int, seed: int = 0, spread: float = 0.7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(count, posterior.size, generator=generator, dtype=torch.float64)


def powers(count: int) -> Tensor:
    return torch.linspace(0.2, 1, count, dtype=torch.float64)


def assert_close(found: Tensor, expected: Tensor, rounding: float = ROUNDING) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert torch.isfinite(expected).all()
    assert (found - expected).abs().max() <= rounding * max(1.0, float(expected.abs().max()))


def by_autograd(density: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    slopes = []
    for each in u:
        point = each.clone().requires_grad_()
        (slope,) = torch.autograd.grad(density(point), point)
        slopes.append(slope)
    return torch.stack(slopes)


def jacobian_by_autograd(posterior: LogPosterior, point: Tensor) -> Tensor:
    """Return log |d params / d u| from the matrix of derivatives, by as many free entries as there are coordinates."""

    def free(u: Tensor) -> Tensor:
        parts = []
        for name, whole in posterior.coordinates(u).items():
            value = whole
            support = posterior.program.supports[name]
            while isinstance(support, constraints.independent):
                support = support.base_constraint
            if support is constraints.simplex:
                value = value[..., :-1]
            elif support is constraints.positive_definite:
                rows, columns = torch.tril_indices(value.shape[-1], value.shape[-1])
                value = value[..., rows, columns]
            elif support is constraints.corr_cholesky:
                size = value.shape[-1]
                rows, columns = torch.tril_indices(size, size, -1)
                value = value[..., rows, columns]
            parts.append(value.reshape(-1))
        return torch.cat(parts)

    return torch.linalg.slogdet(torch.autograd.functional.jacobian(free, point)).logabsdet


def test_families_agree_with_their_formulas(case: Case) -> None:
    """The likelihood and prior by hand, the Jacobian and the slope by autograd; each part for itself."""
    x, prior = case.data(1, num_data=15), case.prior(2)
    posterior = LogPosterior(case.program(prior=prior), x)
    u, temperature = points(posterior, 4), powers(4)
    found = posterior(u, temperature)

    def parts(point: Tensor) -> tuple[Tensor, Tensor]:
        values = posterior.coordinates(point)
        known = {name: getattr(case.params(0), name) for name in case.family.Params._fields if name not in values}
        params = case.family.Params(**values, **known)
        likelihood = case.family.log_joint(params, x).logsumexp(-1).sum()
        return case.family.log_prior(params, prior) + posterior.coordinates.log_jacobian(point), likelihood

    def tempered(power: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda point: parts(point)[0] + power * parts(point)[1]

    by_hand = [parts(point) for point in u]
    assert_close(found.log_prior, torch.stack([each[0] for each in by_hand]).detach())
    assert_close(found.log_likelihood, torch.stack([each[1] for each in by_hand]).detach())
    for point, power, slope in zip(u, temperature, found.gradient, strict=True):
        expected = by_autograd(tempered(power), point[None])[0]
        assert_close(slope, expected)
    jacobian = torch.stack([jacobian_by_autograd(posterior, point) for point in u])
    assert_close(posterior.log_jacobian(u), jacobian)


def mixture(w: Tensor, locs: Tensor, scale: Tensor, x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[z], scale), obs=x)


def ordered(x: Tensor) -> None:
    locs = pyro.sample("locs", dist.ImproperUniform(pyro.distributions.constraints.ordered_vector, (), (3,)))
    pyro.factor("prior_of_locs", dist.Normal(0.0, 2.0).log_prob(locs).sum())
    mixture(pyro.sample("w", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0]))), locs, torch.tensor(0.7), x)


def intervals(x: Tensor) -> None:
    low = pyro.sample("low", dist.Uniform(-3.0, -1.0))
    share = pyro.sample("share", dist.Beta(2.0, 3.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    mixture(torch.stack([share, 1 - share]), torch.stack([low, low + 3]), scale, x)


def matrices(x: Tensor) -> None:
    x = x.reshape(-1, 2)
    with pyro.plate("components", 2):
        covariances = pyro.sample("covariances", InverseWishart(torch.tensor(5.0), torch.eye(2)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), covariances[z]), obs=x)


def correlations(x: Tensor) -> None:
    x = x.reshape(-1, 3)
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    shift = pyro.sample("shift", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.4), infer={"enumerate": "parallel"})
        loc = z[..., None] * shift
        pyro.sample("x", dist.MultivariateNormal(loc, scale_tril=factor), obs=x)


def two_latents(x: Tensor) -> None:
    locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    shifts = pyro.sample("shifts", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])), infer={"enumerate": "parallel"})
        other = pyro.sample("l", dist.Bernoulli(0.3), infer={"enumerate": "parallel"}).long()
        pyro.sample("x", dist.Laplace(locs[k] + shifts[other], 0.8), obs=x)


def param_sites(x: Tensor) -> None:
    w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
    scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
    mixture(w, pyro.sample("locs", dist.Normal(torch.zeros(2), 3.0).to_event(1)), scale, x)


def scaled(x: Tensor) -> None:
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with poutine.scale(scale=torch.linspace(0.5, 2, len(x))):
        mixture(torch.tensor([0.4, 0.6]), locs, torch.tensor(1.0), x)


def shifted_branch(x: Tensor) -> None:
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    scale = torch.tensor(1.0 if locs[0].item() < 0 else 2.0)
    mixture(torch.tensor([0.4, 0.6]), locs, scale, x)


PROGRAMS = [ordered, intervals, matrices, correlations, two_latents, param_sites, scaled]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_programs_agree_with_one_point_at_a_time(program: Any) -> None:
    x = X.reshape(-1)
    posterior = LogPosterior(program, x)
    u, temperature = points(posterior, 5), powers(5)
    found = posterior(u, temperature)
    prior, likelihood = [], []
    for point in u:
        table = log_joint_table(program, posterior.program, posterior.coordinates(point), x)
        prior.append(table.log_prior + jacobian_by_autograd(posterior, point))
        likelihood.append(table.log_likelihood)
    assert_close(found.log_prior, torch.stack(prior))
    assert_close(found.log_likelihood, torch.stack(likelihood))
    eager = posterior._one_by_one(u, temperature)
    for mine, other in zip(found, eager, strict=True):
        assert_close(mine, other)
    again = posterior(u.flip(0), temperature.flip(0))  # vector units round the last few entries otherwise than others
    for mine, other in zip(found, again, strict=True):
        assert_close(mine, other.flip(0))
    params = posterior.constrain(u)
    assert_close(posterior.unconstrain(params), u, 1e-9)


def test_a_param_site_has_a_flat_prior_over_its_values() -> None:
    posterior = LogPosterior(param_sites, X.reshape(-1))
    u = points(posterior, 3)
    locs = posterior.constrain(u)["locs"]
    expected = stats.norm(0, 3).logpdf(locs.numpy()).sum(1)
    found = posterior(u, powers(3)).log_prior - posterior.log_jacobian(u)
    assert_close(found, torch.as_tensor(expected))
    assert posterior.param_sites == ["w", "scale"]


def test_a_parameter_of_many_rows_counts_once() -> None:
    """Two groups of rows, each with a location of its own in the outer of two plates."""

    def model(x: Tensor) -> None:
        with pyro.plate("groups", 2, dim=-2):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
            with pyro.plate("data", x.shape[1], dim=-1):
                z = pyro.sample("z", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
                pyro.sample("x", dist.Normal(loc + z, 1.0), obs=x)

    x = X.reshape(2, 12)
    posterior = LogPosterior(model, x)
    u = points(posterior, 3)
    found = posterior(u, powers(3))
    assert_close(found.log_prior, dist.Normal(0.0, 1.0).log_prob(u).sum(1).double())
    parts = [dist.Normal(u[..., None] + z, 1.0).log_prob(x) + math.log(share) for z, share in ((0, 0.7), (1, 0.3))]
    assert_close(found.log_likelihood, torch.stack(parts).logsumexp(0).sum((1, 2)))


def test_latents_of_many_rows_are_refused() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
        with pyro.plate("again", len(x)):
            pyro.sample("x", dist.Normal(loc + k + z, 1.0), obs=x)

    with pytest.raises(ValueError, match="the enumerated sites k and z lie in different plates"):
        LogPosterior(model, X.reshape(-1))


def test_row_weights_count_rows_repeatedly() -> None:
    x = X.reshape(-1)[:4]

    def model(x: Tensor, counts: Tensor) -> None:
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with poutine.scale(scale=counts):
            mixture(torch.tensor([0.4, 0.6]), locs, torch.tensor(1.0), x)

    counts = torch.tensor([1.0, 3.0, 2.0, 4.0], dtype=torch.float64)
    weighted, repeated = LogPosterior(model, x, counts), LogPosterior(model, x.repeat_interleave(counts.long()), 1.0)
    u = points(weighted, 3)
    for mine, other in zip(weighted(u, powers(3)), repeated(u, powers(3)), strict=True):
        assert_close(mine, other)


@pytest.mark.parametrize("mask", [[True, True, False], [False, True, False], [False, False, False]])
def test_a_masked_row_adds_nothing_to_the_density(mask: list[bool]) -> None:
    """Its latent has K values of mass 1 together; by Pyro's own sum, and by the program of the other rows."""

    def program(x: Tensor, known: Any) -> None:
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2).double(), 3.0).to_event(1))
        with pyro.plate("data", len(x)), poutine.mask(mask=known):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7]).double()), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x)

    x, known = torch.tensor([0.0, 1.0, 5.0]).double(), torch.tensor(mask)
    u = points(LogPosterior(program, x, known), 3)
    found = LogPosterior(program, x, known)(u, u.new_ones(3))
    for i, locs in enumerate(u):
        params = {"locs": locs}
        expected: Any = dist.Normal(torch.zeros(2).double(), 3.0).log_prob(locs).sum()
        if known.any():
            few = x[known], known[known]
            expected = log_density(program, inspect(program, params, *few), params, *few)
        assert torch.allclose(found.log_prior[i] + found.log_likelihood[i], expected, rtol=1e-13)
        assert torch.allclose(log_density(program, inspect(program, params, x, known), params, x, known), expected)


@pytest.mark.parametrize("program", [intervals, matrices, shifted_branch], ids=lambda program: program.__name__)
def test_second_derivatives_are_those_of_each_point(program: Any) -> None:
    """Against central differences of the slope, which err by the square of the step and by rounding over it."""
    posterior, step = LogPosterior(program, X.reshape(-1)), 1e-4
    u = points(posterior, 2) - 3 * (program is shifted_branch)
    found = posterior.hessian(u)
    for each, mine in zip(u, found, strict=True):
        ends = torch.cat(
            [
                each + step * torch.eye(posterior.size, dtype=torch.float64),
                each - step * torch.eye(posterior.size, dtype=torch.float64),
            ]
        )
        up, down = by_autograd(posterior.log_density, ends).split(posterior.size)
        assert_close(mine, (up - down) / (2 * step), 1e-6)


@pytest.mark.slow_for("gaussian_sum", "KnownNoise")
def test_each_point_may_have_data_of_its_own(case: Case) -> None:
    """Against one log posterior for each data set."""
    data = torch.stack([case.data(seed, num_data=7) for seed in range(2)])
    program = case.program(prior=case.prior(2))
    together = LogPosterior(program, data, batched=True)
    u = points(together, 2)
    found = together(u, powers(2))
    for i, x in enumerate(data):
        alone = LogPosterior(program, x)(u[i : i + 1], powers(2)[i : i + 1])
        for mine, other in zip(found, alone, strict=True):
            assert_close(mine[i : i + 1], other)


def test_each_point_has_its_own_of_several_arguments_and_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prior and the number of each row depend on the data set; of 6 draws, 0, 2, 4 are of the first."""

    def model(x: Tensor, counts: Tensor) -> None:
        locs = pyro.sample("locs", dist.Normal(x.mean().expand(2), 1e-6).to_event(1))
        with poutine.scale(scale=counts):
            mixture(torch.tensor([0.4, 0.6]), locs, torch.tensor(1.0), x)

    x = X.reshape(-1)[:4]
    data, counts = torch.stack([x, x + 50]), torch.tensor([[1.0, 3.0, 2.0, 4.0], [2.0, 1.0, 1.0, 1.0]]).double()
    together = LogPosterior(model, data, counts, batched=True)

    def check() -> None:
        draws = together.draw_prior(6, seed=0)
        assert (draws - data.mean(1).repeat(3)[:, None]).abs().max() < 1e-5
        assert len(draws.unique()) == 12
        found = together(draws[:2], powers(2))
        for i in range(2):
            alone = LogPosterior(model, data[i], counts[i])(draws[i : i + 1], powers(2)[i : i + 1])
            assert_close(found.log_likelihood[i : i + 1], alone.log_likelihood)
            assert_close(found.gradient[i : i + 1], alone.gradient)

    check()
    together = LogPosterior(model, data, counts, batched=True)

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no vmap")

    with monkeypatch.context() as patch:
        patch.setattr(log_posterior, "capture", refuse)
        patch.setattr(torch.func, "vmap", refuse)
        draws = together.draw_prior(6, seed=0)
        with pytest.warns(UserWarning, match="run point by point"):
            found = together(draws[:2], powers(2))
    expected = LogPosterior(model, data, counts, batched=True)(draws[:2], powers(2))
    assert (draws - data.mean(1).repeat(3)[:, None]).abs().max() < 1e-5
    for mine, other in zip(found, expected, strict=True):
        assert_close(mine, other)


def test_data_sets_that_do_not_fit_are_refused() -> None:
    x = X.reshape(3, 8)
    different: list[tuple[Any, ...]] = [(), (x, 2.0), (x, torch.tensor(1.0))]
    for args in different:
        with pytest.raises(ValueError, match="must be tensors with a leading dimension of data sets: bind the others"):
            LogPosterior(intervals, *args, batched=True)
    for args in ((x, x[:2]), (x[:0],)):
        with pytest.raises(ValueError, match="must hold as many data sets each, at least one, not "):
            LogPosterior(intervals, *args, batched=True)
    posterior = LogPosterior(intervals, x, batched=True)
    with pytest.raises(ValueError, match="there are 3 data sets, and 2 points: one each"):
        posterior(points(posterior, 2), powers(2))


def test_single_precision_stays_single() -> None:
    x = X.reshape(-1)
    single, double = LogPosterior(two_latents, x.float()), LogPosterior(two_latents, x)
    u = points(double, 4)
    found, expected = single(u.float(), powers(4).float()), double(u, powers(4))
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine.double(), other, 1e-4)  # a hundred roundings of 6e-8, and cancellation
    assert single.draw_prior(3, seed=0).dtype == torch.float32


def test_a_program_that_branches_runs_point_by_point() -> None:
    x = X.reshape(-1)
    posterior = LogPosterior(shifted_branch, x)
    u = torch.tensor([[-1.0, 0.5], [1.0, 0.5]], dtype=torch.float64)
    with pytest.warns(UserWarning, match=r"cannot be vectorised, by .item\(\) or an if, and is run point by point"):
        found = posterior(u, powers(2))
    for i, scale in enumerate((1.0, 2.0)):
        log_joint = torch.tensor([0.4, 0.6], dtype=torch.float64).log() + dist.Normal(u[i], scale).log_prob(x[:, None])
        assert_close(found.log_likelihood[i], log_joint.logsumexp(1).sum())
    assert torch.equal(posterior(u, powers(2)).gradient, found.gradient)  # the second time without a warning


def test_few_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_posterior, "MAX_GRAPHS", 2)
    posterior = LogPosterior(intervals, X.reshape(-1))
    u = points(posterior, 3)
    values = [posterior(u[:count], powers(3)[:count]).log_likelihood for count in (1, 2, 1, 3)]
    assert [key[0] for key in posterior._graphs] == [1, 3]
    assert_close(values[0], values[3][:1])


def test_prior_draws_follow_the_prior_by_either_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kolmogorov-Smirnov distances below the 1e-6 quantile of each marginal's own law."""

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Dirichlet(torch.tensor([0.05, 1.0, 3.0])))
        locs = pyro.sample("locs", dist.Normal(torch.tensor([0.0, 1.0, 5.0]), 2.0).to_event(1))
        mixture(w, locs, pyro.sample("scale", dist.InverseGamma(3.0, 2.0)), x)

    def check(draws: Tensor) -> None:
        params = posterior.constrain(draws)
        laws = {
            "w": [stats.beta(a, 4.05 - a) for a in (0.05, 1.0, 3.0)],
            "locs": [stats.norm(loc, 2) for loc in (0, 1, 5)],
            "scale": [stats.invgamma(3, scale=2)],
        }
        for name, marginals in laws.items():
            for column, law in zip(params[name].reshape(len(draws), -1).T, marginals, strict=True):
                inside = column[column > 1e-300] if name == "w" else column
                assert stats.kstest(inside.numpy(), law.cdf).pvalue > 1e-6
        assert stats.kstest(params["locs"][:, 0].numpy(), stats.norm(0.5, 2).cdf).pvalue < 1e-6  # the check can fail

    posterior = LogPosterior(model, X.reshape(-1))
    check(posterior.draw_prior(3000, seed=1))
    assert torch.equal(posterior.draw_prior(5, seed=2), posterior.draw_prior(5, seed=2))

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no vmap")

    with monkeypatch.context() as patch:
        patch.setattr(torch.func, "vmap", refuse)
        slow = posterior.draw_prior(1000, seed=1)
    check(slow)


def test_improper_priors_are_named() -> None:
    x = X.reshape(-1)
    with pytest.raises(ValueError, match='the prior of "locs" is improper: it cannot be drawn from; give init'):
        LogPosterior(ordered, x).draw_prior(2, seed=0)
    with pytest.raises(ValueError, match='the prior of the param site "w" is flat and improper'):
        LogPosterior(param_sites, x).draw_prior(2, seed=0)

    def with_factor(x: Tensor) -> None:
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        pyro.factor("pull", -locs.square().sum())
        mixture(torch.tensor([0.4, 0.6]), locs, torch.tensor(1.0), x)

    posterior = LogPosterior(with_factor, x)
    with pytest.raises(ValueError, match="includes the density of pull, which the program does not draw from"):
        posterior.draw_prior(2, seed=0)
    assert posterior.draw_sites(2, seed=0).shape == (2, 2)


def random_effects(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        effect = pyro.sample("effect", dist.Normal(loc + 3 * _bernoulli("z", 0.3), 1.0))
        pyro.sample("x", dist.Normal(effect, 1.0), obs=x)


def test_a_parameter_in_the_rows_has_no_way_from_the_prior() -> None:
    """Its density is part of the likelihood: at power 0 of that it would have none."""
    x = X.reshape(-1)[:3]
    with pytest.raises(ValueError, match=r'parameter effect lies in the plates of the rows.*draws to method="bridge"'):
        LogPosterior(random_effects, x).draw_prior(2, seed=0)
    for method in ("smc", "bridge"):
        with pytest.raises(ValueError, match="parameter effect lies in the plates of the rows"):
            log_evidence(random_effects, x, method=method, seed=0, relabel=False)
    assert LogPosterior(random_effects, x).draw_sites(2, seed=0).shape == (2, 4)


def test_positive_definite_sites_need_no_family() -> None:
    """In a process of its own, which imports no model."""
    script = """
import pyro, torch
from mixproof.inference.log_posterior import LogPosterior
def model(x):
    pyro.sample("c", pyro.distributions.ImproperUniform(torch.distributions.constraints.positive_definite, (), (3, 3)))
    with pyro.plate("rows", 4):
        z = pyro.sample("z", pyro.distributions.Bernoulli(0.3), infer={"enumerate": "parallel"})
        pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x)
print(LogPosterior(model, torch.zeros(4)).size)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["6"]


def test_a_program_without_continuous_parameters_is_refused() -> None:
    def model(x: Tensor) -> None:
        mixture(torch.tensor([0.4, 0.6]), torch.tensor([0.0, 1.0]), torch.tensor(1.0), x)

    with pytest.raises(ValueError, match="no continuous parameter to draw"):
        LogPosterior(model, X.reshape(-1))


# Rows that are not independent given the parameters


def _bernoulli(name: str, probability: float) -> Tensor:
    return pyro.sample(name, dist.Bernoulli(probability), infer={"enumerate": "parallel"})


def latent_in_a_deeper_plate(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x), dim=-2):
        z = _bernoulli("z", 0.3)
        with pyro.plate("columns", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(loc + z + 2 * _bernoulli("w", 0.4), 1.0), obs=x)


def latents_in_disjoint_plates(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    for name, values in (("z", x[:, 0]), ("w", x[:, 1])):
        with pyro.plate(f"plate of {name}", len(x)):
            pyro.sample(f"x of {name}", dist.Normal(loc + _bernoulli(name, 0.3), 1.0), obs=values)


def latent_of_all_rows(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(loc + _bernoulli("z", 0.3), 1.0), obs=x[:, 0])
    pyro.sample("y", dist.Normal(loc + 2 * _bernoulli("w", 0.4), 1.0), obs=x[0, 1])


def observation_of_a_pair_of_rows(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        z = _bernoulli("z", 0.3)
    pyro.sample("y", dist.Normal(loc + z[..., :1] - z[..., -1:], 1.0), obs=x[0, 1])


def observation_of_a_whole_row(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x), dim=-2):
        with pyro.plate("columns", x.shape[1], dim=-1):
            z = _bernoulli("z", 0.3)
        pyro.sample("x", dist.Normal(loc + z.sum(-1, keepdim=True), 1.0), obs=x[:, :1])


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (latent_in_a_deeper_plate, "sites z and w lie in different plates, rows and columns, rows, and rows are not"),
        (latents_in_disjoint_plates, "sites z and w lie in different plates, plate of z and plate of w"),
        (latent_of_all_rows, "sites z and w lie in different plates, rows and none"),
        (observation_of_a_pair_of_rows, "y depends on the enumerated site z and lies outside its plates rows"),
        (observation_of_a_whole_row, "x depends on the enumerated site z and lies outside its plates columns, rows"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_rows_that_are_not_independent_are_refused(program: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LogPosterior(program, X)


def test_an_observation_of_some_of_the_plates_alone_counts_once() -> None:
    """Rows and columns have a latent for each entry; each row has a number more, which knows of no latent."""
    numbers = torch.tensor([[0.3], [-1.0], [2.0]], dtype=torch.float64)

    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("y", dist.Normal(loc, 2.0), obs=numbers)
            with pyro.plate("columns", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(loc + _bernoulli("z", 0.3), 1.0), obs=x)

    x, loc = X[:3], torch.tensor(0.4, dtype=torch.float64)
    posterior = LogPosterior(model, x)
    found = posterior(loc.reshape(1, 1), powers(1))
    mixed = torch.stack([dist.Normal(loc + z, 1.0).log_prob(x) for z in (0, 1)], -1) + torch.tensor([0.7, 0.3]).log()
    outside = dist.Normal(0.0, 1.0).log_prob(loc) + dist.Normal(loc, 2.0).log_prob(numbers).sum()
    assert_close(found.log_likelihood[0], mixed.logsumexp(-1).sum(), 1e-7)  # the shares are in single precision
    assert_close(found.log_prior[0], outside)
    assert posterior.factors == ["y"]


def test_a_latent_of_infinitely_many_values_is_called_so() -> None:
    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Poisson(rate))
            pyro.sample("x", dist.Normal(k, 1.0), obs=x)

    with pytest.raises(ValueError, match='"k" is discrete with infinitely many values'):
        LogPosterior(model, X.reshape(-1))


# The graph


def test_a_graph_does_what_the_function_does() -> None:
    """Operations in odd combinations: broadcasting of every kind, masks, views that split and merge, dead branches."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((4, 1, 3), (4, 5, 1)))
    c = torch.randn(5, 3, generator=generator, dtype=torch.float64)

    def function(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        spread = a.expand(4, 5, 3)
        outer = 2 * spread * b / 3 - spread
        masked = torch.where(spread > 0, outer * a.exp(), torch.zeros(()).double())
        merged = (spread * b).reshape(20, 3).sum(0)
        split = (spread * a).reshape(2, 2, 15).sum((0, 2))
        order = torch.arange(3)
        picked = spread[..., order] * b
        same = (c * spread + c * b).sum(1) + (a**1.0).mean() * torch.zeros_like(a).sum() - torch.ones_like(b).sum(1)
        return outer.sum((1, 2)), masked.sum(1), merged, split, picked.logsumexp(1), same, spread.prod(2), a + 0 * b

    graph = capture(function, a, b)
    for scale in (1.0, -0.3):  # the graph is of the function and not of its example
        for mine, other in zip(graph(scale * a, b), function(scale * a, b), strict=True):
            assert_close(mine, other, 1e-13)


def test_a_graph_keeps_differences_of_large_numbers() -> None:
    """Sums are not split: at an offset of 1e8 the sum of x - m would keep no digit otherwise."""
    x = 1e8 + torch.linspace(-1, 1, 101, dtype=torch.float64)
    m = torch.tensor([1e8, 1e8 + 0.5], dtype=torch.float64)

    def function(m: Tensor) -> Tensor:
        return (x - m[:, None]).sum(1)

    expected = torch.tensor([0.0, -50.5], dtype=torch.float64)
    assert (capture(function, m)(m) - expected).abs().max() <= 101 * 1.5e-8 * math.sqrt(101)


def test_every_constant_lives_as_long_as_its_place_in_the_graph() -> None:
    """Equal operations are told by the identity of tensors, which a later tensor could take over from a dead one."""
    rewriter = captured_graph._Rewriter(make_fx(lambda x: torch.where(x > 0, 2 * x.exp(), 0.0))(X), [X])
    rewriter.run()
    assert rewriter.made
    for (_, _, leaves), (_, values) in rewriter.made.items():
        assert [leaf for leaf in leaves if isinstance(leaf, int)] == [id(value.example) for value in values]


@pytest.mark.parametrize("singular_first", [False, True])
def test_a_singular_matrix_spoils_its_own_point_alone(singular_first: bool) -> None:
    posterior = LogPosterior(matrices, X.reshape(-1))
    regular = points(posterior, 3)
    far = regular.clone()
    far[2] = torch.tensor([400.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    far[2, 1], far[2, 2] = 1e200, -400.0
    expected = posterior(regular, powers(3))
    again = LogPosterior(matrices, X.reshape(-1))
    found = (again if singular_first else posterior)(far, powers(3))
    assert_close(found.log_likelihood[:2], expected.log_likelihood[:2])
    assert not torch.isfinite(found.log_likelihood[2])


def test_a_graph_that_came_out_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: a rewriter that forgets a factor."""
    monkeypatch.setattr(captured_graph._Rewriter, "run", lambda self: Tensor.sum)
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="came out wrong"):
        graph = capture(lambda x: (3 * x.exp()).sum(), x)
    assert graph(x + 1) == (3 * (x + 1).exp()).sum()
