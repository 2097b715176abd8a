"""Two routes to one mode, on real data: EM by hand and quasi-Newton on the program; and SVI with AutoDelta."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta
from pyro.infer.autoguide.initialization import init_to_value
from scipy.optimize import minimize
from scipy.special import gammaln, logsumexp
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.bfgs import minimise, with_gradient
from mixproof.inference.em import em
from mixproof.inference.enumeration import Coordinates
from mixproof.inference.enumeration import inspect as inspect_program
from mixproof.inference.posterior_mode import posterior_mode
from mixproof.inference.svi import svi
from mixproof.models import gaussian_full, gaussian_sum, laplace
from mixproof.models.gaussian_isotropic import GaussianIsotropic

if TYPE_CHECKING:
    from tests.conftest import Case

AGREEMENT = 1e-9  # relative, in log density: what the project promises of EM and Pyro's mode
NUM_COMPONENTS = {"iris": 3, "faithful": 2, "flower": 4, "carcinoma": 3, "digits": 2}


class Problem(NamedTuple):
    """Data with a family, a prior and a start that lies in the basin of one mode."""

    family: Any
    x: Tensor
    num_components: Any
    prior: Any
    start: Any

    @property
    def model(self) -> Any:
        return partial(self.family.model, num_components=self.num_components, prior=self.prior)

    def log_density(self, params: Any) -> float:
        log_prior = 0.0 if self.prior is None else self.family.log_prior(params, self.prior)
        return (self.family.log_joint(params, self.x).logsumexp(-1).sum() + log_prior).item()


def settings_for(case: Case, x: Tensor) -> Any:
    """Return the family with a setting that suits data of unit variance."""
    if case.name == "GaussianIsotropic":
        return GaussianIsotropic(variance=1 / 6)
    if case.name == "KnownNoise":
        size = x.shape[1]
        locs = torch.stack([torch.full((size,), 0.05), torch.full((size,), -0.02)]).double()
        covariances = 0.01 * torch.eye(size, dtype=torch.float64).expand(2, -1, -1)
        return gaussian_sum.KnownNoise(
            gaussian_full.Params(torch.tensor([0.6, 0.4], dtype=torch.float64), locs, covariances)
        )
    return case.family


def problem(case: Case, kind: str, name: str, data: dict[str, Tensor], num_steps: int = 5) -> Problem:
    """Start EM from a partition for a few steps: from there it and a quasi-Newton method climb the same hill."""
    x, k = data[name], NUM_COMPONENTS[name]
    if case.has_real_data:  # to where a random prior lies
        x = (x - x.mean(0)) / x.std(0) + x.shape[1] + 1.5
    family = settings_for(case, x)
    prior = None if kind == "flat" else case.prior(0, k, x.shape[1])
    sizes = case.num_components(k)
    generator = torch.Generator().manual_seed(0)
    start = family.init_params(x, sizes, generator)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        start = em(family, x, start, prior=prior, max_steps=num_steps).params
    return Problem(family, x, sizes, prior, start)


def data_sets(case: Case, kind: str) -> list[str]:
    """Return the data sets for a family.

    The likelihood of a sum has no interior maximum where a component is narrower than the noise, or where the
    covariances of more than two components can be shared out in many ways: without a prior, two clear ones remain.
    """
    if not case.has_real_data:
        return ["carcinoma", "digits"]
    if case.module is gaussian_sum and kind == "flat":
        return ["faithful"]
    if case.module in (gaussian_sum, laplace):  # whose programs take ten times as long as the others
        return ["iris", "faithful"]
    return ["iris", "faithful", "flower"]


@pytest.mark.slow_for("gaussian_sum", "laplace")
def test_em_and_posterior_mode_find_one_mode(case: Case, kind: str, real_data: dict[str, Tensor]) -> None:
    for name in data_sets(case, kind):
        own = problem(case, kind, name, real_data, num_steps=20 if case.has_real_data else 5)
        fit = em(own.family, own.x, own.start, prior=own.prior, rtol=1e-14, max_steps=5000)
        mode = posterior_mode(own.model, own.start, own.x)
        assert fit.converged
        assert mode.converged
        assert isinstance(mode.params, case.family.Params)
        by_em, by_program = fit.log_lik[-1].item(), mode.log_density
        assert abs(by_em - by_program) <= AGREEMENT * abs(by_em), name
        assert abs(own.log_density(mode.params) - by_program) <= 1e-12 * abs(by_program), name
        assert by_program >= own.log_density(own.start)


def test_mode_is_stationary_and_beats_its_neighbours(case: Case, real_data: dict[str, Tensor]) -> None:
    """By autograd through the family's own formulas, which posterior_mode never calls, and by looking around."""
    own = problem(case, "prior", "faithful" if case.has_real_data else "carcinoma", real_data)
    mode = posterior_mode(own.model, own.start, own.x)
    program = inspect_program(own.model, own.start._asdict(), own.x)
    coordinates = Coordinates(program.supports, own.start._asdict())
    u = coordinates.inverse(mode.params._asdict()).requires_grad_()

    def log_density(u: Tensor) -> Tensor:
        params = case.family.Params(**coordinates(u))
        return own.family.log_joint(params, own.x).logsumexp(-1).sum() + own.family.log_prior(params, own.prior)

    best = log_density(u)
    generator = torch.Generator().manual_seed(1)
    for radius in (1e-4, 1e-2, 0.3):
        for _ in range(10):
            step = radius * torch.randn(u.shape, generator=generator, dtype=u.dtype)
            assert log_density(u + step) <= best + 1e-12 * best.abs()
    if case.family is not laplace:  # whose mode lies on kinks
        (gradient,) = torch.autograd.grad(best, u)
        # Where only a gain of d is left, the gradient is at most the root of 2 d times the largest curvature.
        curvature = torch.linalg.eigvalsh(torch.autograd.functional.hessian(log_density, u.detach())).abs().max()
        left = 10 * 1e-13 * abs(best.item())
        assert gradient.norm() <= torch.sqrt(2 * left * curvature)


@pytest.mark.parametrize("name", ["faithful", "flower"])
def test_climb_leaves_a_start_on_kinks(name: str, real_data: dict[str, Tensor]) -> None:
    """Medians lie on entries of the data, where autograd's gradient of a Laplace likelihood need not point uphill."""
    x = real_data[name]
    start = laplace.init_params(x, 2, torch.Generator().manual_seed(0))
    assert (x[:, None] == start.locs).any()
    mode = posterior_mode(partial(laplace.model, num_components=2), start, x)
    at_start = laplace.log_joint(start, x).logsumexp(-1).sum().item()
    assert mode.num_steps > 1
    assert mode.log_density > at_start + 1
    fit = em(laplace, x, start)
    assert mode.log_density >= fit.log_lik[0].item()


def test_minimise_finds_the_corner_of_absolute_values() -> None:
    target = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)

    def function(u: Tensor) -> Tensor:
        return (u - target).abs().sum() + 0.1 * (u[0] - target[0] + u[2] - target[2]) ** 2

    for start in (torch.zeros(3), torch.tensor([1.0, 5.0, 3.0]), torch.tensor([1.0, -2.0, 7.0])):
        found = minimise(with_gradient(function), start.double(), max_steps=500, rtol=1e-14)
        assert (found.u - target).abs().max() <= 1e-6
        assert found.value <= 1e-6
        assert found.converged


def test_minimise_agrees_with_scipy_on_a_curved_valley() -> None:
    def rosenbrock(u: Tensor) -> Tensor:
        return (100 * (u[1:] - u[:-1] ** 2) ** 2 + (1 - u[:-1]) ** 2).sum()

    found = minimise(with_gradient(rosenbrock), torch.full((5,), -0.5, dtype=torch.float64), max_steps=1000, rtol=1e-15)
    assert (found.u - 1).abs().max() < 1e-6
    capped = minimise(with_gradient(rosenbrock), torch.full((5,), -0.5, dtype=torch.float64), max_steps=3, rtol=1e-15)
    assert not capped.converged
    assert capped.num_steps == 3
    with pytest.raises(ValueError, match="not finite at the start"):
        minimise(with_gradient(lambda u: u.sum().log()), torch.zeros(2).double(), max_steps=3, rtol=1e-9)


# A program that is no family


TWO = torch.tensor(2.0, dtype=torch.float64)


def poisson_mixture(counts: Tensor) -> Tensor:
    """Two Poisson components with a beta prior on the share and gamma priors on the rates, one of them a param site."""
    share = pyro.sample("share", dist.Beta(TWO, 3.0))
    low = pyro.sample("low", dist.Gamma(TWO, 1.0))
    high = pyro.param("high", torch.tensor(9.0), constraint=constraints.positive)
    with pyro.plate("data", len(counts)):
        z = pyro.sample("z", dist.Bernoulli(share), infer={"enumerate": "parallel"}).long()
        return pyro.sample("x", dist.Poisson(torch.stack([low, high])[z]), obs=counts)


COUNTS = torch.tensor([0, 1, 1, 2, 3, 2, 0, 9, 11, 8, 12, 7, 10, 1, 2], dtype=torch.float64)


def test_any_program_with_params_and_samples() -> None:
    start = {"share": torch.tensor(0.5).double(), "low": torch.tensor(1.0).double(), "high": torch.tensor(5.0).double()}
    pyro.clear_param_store()
    mode = posterior_mode(poisson_mixture, start, COUNTS)
    assert len(list(pyro.get_param_store().keys())) == 0
    assert set(mode.params) == set(start)

    def negative(v: np.ndarray) -> float:
        share, low, high = 1 / (1 + np.exp(-v[0])), np.exp(v[1]), np.exp(v[2])
        x = COUNTS.numpy()[:, None]
        rates = np.array([low, high])
        table = np.log([1 - share, share]) + x * np.log(rates) - rates - gammaln(x + 1)
        log_share = np.log(share) + 2 * np.log1p(-share) + gammaln(5) - gammaln(2) - gammaln(3)
        return -(logsumexp(table, axis=1).sum() + log_share + np.log(low) - low)

    options = {"xatol": 1e-10, "fatol": 1e-14, "maxiter": 5000}
    found = minimize(negative, [0.0, 0.0, np.log(5.0)], method="Nelder-Mead", options=options)
    assert found.success
    assert abs(mode.log_density + found.fun) <= 1e-10
    expected = [1 / (1 + np.exp(-found.x[0])), *np.exp(found.x[1:])]
    assert np.allclose([mode.params[name].item() for name in ("share", "low", "high")], expected, rtol=1e-5)


def test_unfinished_climb_warns(real_data: dict[str, Tensor]) -> None:
    x = real_data["faithful"]
    start = gaussian_full.init_params(x, 2, torch.Generator().manual_seed(0))
    with pytest.warns(ConvergenceWarning, match="no mode within 3 steps: raise max_steps"):
        mode = posterior_mode(partial(gaussian_full.model, num_components=2), start, x, max_steps=3)
    assert not mode.converged
    assert mode.num_steps == 3


def test_start_at_the_edge_is_refused(real_data: dict[str, Tensor]) -> None:
    x = real_data["faithful"]
    start = gaussian_full.init_params(x, 2, torch.Generator().manual_seed(0))
    edge = start._replace(weights=torch.tensor([1.0, 0.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="edge of the support of weights, which no step leaves: start inside"):
        posterior_mode(partial(gaussian_full.model, num_components=2), edge, x)


# SVI


def auto_delta(own: Problem) -> AutoDelta:
    latents = [name for name in ("z", "k", "l") if name not in own.start._fields]
    return AutoDelta(poutine.block(own.model, hide=latents), init_loc_fn=init_to_value(values=own.start._asdict()))


@pytest.mark.slow_for("gaussian_sum", "laplace", "KnownNoise")
def test_svi_reaches_the_same_mode(case: Case, real_data: dict[str, Tensor]) -> None:
    """Within what steps of the final learning rate leave: ten of them along each coordinate, by the curvature there."""
    ridge = case.family is gaussian_sum  # two parts that share one covariance out: Adam needs a start near its end
    name = "faithful" if case.has_real_data else "carcinoma"
    own = problem(case, "prior", name, real_data, num_steps=300 if ridge else 5)
    final = 1e-4
    guide = auto_delta(own)
    fitted = svi(own.model, guide, own.x, num_steps=400, seed=0, learning_rate=0.05, final_learning_rate=final)
    medians = guide.median()
    params = own.start._replace(**{name: medians[name].detach() for name in case.free})
    mode = posterior_mode(own.model, own.start, own.x)
    coordinates = Coordinates(inspect_program(own.model, own.start._asdict(), own.x).supports, own.start._asdict())
    u = coordinates.inverse(mode.params._asdict())

    def log_density(u: Tensor) -> float:
        return own.log_density(case.family.Params(**coordinates(u)))

    step = 10 * final
    losses = [mode.log_density - log_density(u + step * unit) for unit in torch.eye(len(u), dtype=u.dtype)]
    tolerance = len(u) * max(losses)  # a quadratic form is at most P times its largest diagonal entry times |step|^2
    gap = mode.log_density - own.log_density(params)
    assert -AGREEMENT * abs(mode.log_density) <= gap <= tolerance
    assert fitted.losses.shape == (400,)
    assert fitted.losses[0] > fitted.losses[-1] - tolerance


def test_svi_is_exact_by_its_seed_and_leaves_no_trace(real_data: dict[str, Tensor], all_families: list[Case]) -> None:
    case = next(case for case in all_families if case.name == "gaussian_diagonal")
    own = problem(case, "prior", "faithful", real_data)
    pyro.clear_param_store()
    states = pyro.util.get_rng_state()
    runs = [svi(own.model, auto_delta(own), own.x, num_steps=5, seed=3).losses for _ in range(2)]
    assert torch.equal(*runs)
    after = pyro.util.get_rng_state()
    assert torch.equal(after["torch"], states["torch"])
    assert after["random"] == states["random"]
    assert np.array_equal(after["numpy"][1], states["numpy"][1])
    assert after["numpy"][2:] == states["numpy"][2:]
    assert len(list(pyro.get_param_store().keys())) == 0
    assert torch.get_default_dtype() == torch.float32
    assert abs(runs[0][0] + own.log_density(own.start)) <= 1e-9 * abs(runs[0][0])


def test_fitted_guides_keep_apart_outside_svi(real_data: dict[str, Tensor], all_families: list[Case]) -> None:
    """Two autoguides of one class share their names in Pyro's global store: reading one must not change the other."""
    medians = []
    for name, num_steps in (("faithful", 5), ("iris", 5), ("faithful", 5)):
        case = next(case for case in all_families if case.name == "gaussian_diagonal")
        own = problem(case, "prior", name, real_data)
        guide = svi(own.model, auto_delta(own), own.x, num_steps=num_steps, seed=0).guide
        medians.append(guide.median())
    assert medians[1]["locs"].shape == (3, 4)
    assert all(torch.equal(medians[0][site], medians[2][site]) for site in medians[0])


def test_guide_that_is_a_function_keeps_what_it_found() -> None:
    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Poisson(rate * (1 + z)), obs=x)

    def guide(x: Tensor) -> None:
        rate = pyro.param("where", torch.tensor(2.0), constraint=constraints.positive)
        pyro.sample("rate", dist.Delta(rate))

    pyro.clear_param_store()
    fitted = svi(model, guide, COUNTS, num_steps=300, seed=0)
    trace: Any = poutine.trace(fitted.guide).get_trace(COUNTS)
    mode = posterior_mode(model, {"rate": torch.tensor(2.0, dtype=torch.float64)}, COUNTS)
    assert abs(trace.nodes["rate"]["value"] - mode.params["rate"]) <= 1e-2
    assert len(list(pyro.get_param_store().keys())) == 0


def test_svi_refuses_what_it_cannot_do(real_data: dict[str, Tensor], all_families: list[Case]) -> None:
    case = next(case for case in all_families if case.name == "gaussian_diagonal")
    own = problem(case, "prior", "faithful", real_data)
    with pytest.raises(ValueError, match="num_steps must be at least 1, not 0"):
        svi(own.model, auto_delta(own), own.x, num_steps=0, seed=0)
