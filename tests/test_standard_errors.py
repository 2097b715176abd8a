"""Curvature against Louis's identity, other coordinates and closed forms; the bootstrap against EM and curvature."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference import standard_errors as module
from mixproof.inference.datatree import to_datatree
from mixproof.inference.em import em
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.standard_errors import bootstrap, observed_information, standard_errors
from mixproof.models import bernoulli, gaussian_diagonal, gaussian_full
from mixproof.models.gaussian_isotropic import GaussianIsotropic
from tests.conftest import Case, seeded


def program(family: Any, x: Tensor, num_components: Any) -> LogPosterior:
    return LogPosterior(partial(family.model, num_components=num_components), x)


def louis(case: Case, posterior: LogPosterior, params: Any, x: Tensor) -> Tensor:
    """Return the information by Louis 1982, from the complete data's scores and curvature and the family's formulas."""
    known = params._asdict()
    free = {site: known[site] for site in posterior.program.supports}
    u = posterior.coordinates.inverse(free)

    def table(u: Tensor) -> Tensor:
        return case.family.log_joint(case.family.Params(**known | posterior.coordinates(u)), x)

    resp = table(u).softmax(1)
    complete = -torch.autograd.functional.hessian(lambda u: (resp * table(u)).sum(), u)
    scores = torch.autograd.functional.jacobian(table, u)  # (N, K, P)
    mean = torch.einsum("nk,nkp->np", resp, scores)
    lost = torch.einsum("nk,nkp,nkq->pq", resp, scores, scores) - mean.mT @ mean
    return complete - lost


def test_information_is_that_of_the_complete_data_less_what_is_missing(case: Case) -> None:
    """Away from a maximum too, where the identity holds as well."""
    params, x = case.params(1), case.data(2, 12)
    posterior = LogPosterior(case.program(3), x)
    expected = louis(case, posterior, params, x)
    found = observed_information(posterior, params)
    assert torch.allclose(found, expected, rtol=0, atol=1e-11 * float(expected.abs().max()))


def fitted(family: Any, x: Tensor, start: Any) -> Any:
    return em(family, x, start, rtol=1e-15, max_steps=20000).params


def binary_fit() -> tuple[Tensor, bernoulli.Params]:
    probs = torch.tensor([[0.9, 0.8, 0.85, 0.7, 0.9], [0.2, 0.1, 0.3, 0.15, 0.3]], dtype=torch.float64)
    truth = bernoulli.Params(torch.tensor([0.4, 0.6], dtype=torch.float64), probs)
    x, _ = bernoulli.sample(truth, 400, seeded(1))
    return x, fitted(bernoulli, x, truth)


def test_errors_do_not_depend_on_coordinates() -> None:
    """Against the inverse of the Hessian in the parameters themselves, of weights all but the last."""
    x, fit = binary_fit()
    place = torch.cat([fit.weights[:1], fit.probs.reshape(-1)])

    def log_lik(place: Tensor) -> Tensor:
        weights = torch.stack([place[0], 1 - place[0]])
        return bernoulli.log_joint(bernoulli.Params(weights, place[1:].reshape(2, 5)), x).logsumexp(1).sum()

    covariance = torch.linalg.inv(-torch.autograd.functional.hessian(log_lik, place))
    expected = covariance.diagonal().sqrt()
    found = standard_errors(program(bernoulli, x, 2), fit)
    assert torch.allclose(found.params["weights"], expected[:1].expand(2), rtol=1e-5)
    assert torch.allclose(found.params["probs"].reshape(-1), expected[1:], rtol=1e-5)
    assert torch.allclose(found.covariance[2:, 2:], covariance[1:, 1:], rtol=0, atol=1e-5 * float(covariance.max()))


def test_errors_of_one_component_are_the_textbook_ones() -> None:
    x = torch.randn(50, 2, generator=seeded(0), dtype=torch.float64) * torch.tensor([1.0, 3.0])
    variances = x.var(0, correction=0)
    fit: Any = gaussian_diagonal.Params(torch.ones(1).double(), x.mean(0)[None], variances[None])
    found = standard_errors(program(gaussian_diagonal, x, 1), fit).params
    assert torch.allclose(found["locs"][0], (variances / 50).sqrt(), rtol=1e-10)
    assert torch.allclose(found["variances"][0], variances * math.sqrt(2 / 50), rtol=1e-10)
    assert found["weights"].item() == 0
    arrays = {name: value.numpy() for name, value in fit._asdict().items()}
    assert torch.equal(standard_errors(program(gaussian_diagonal, x, 1), arrays).params["locs"], found["locs"])
    ones = (x > 0.3).double()
    probs = ones.mean(0)
    fit = bernoulli.Params(torch.ones(1).double(), probs[None])
    found = standard_errors(program(bernoulli, ones, 1), fit).params
    assert torch.allclose(found["probs"][0], (probs * (1 - probs) / 50).sqrt(), rtol=1e-10)


def test_a_prior_of_the_program_does_not_enter() -> None:
    x, fit = binary_fit()
    ones = torch.ones(5, dtype=torch.float64)
    prior = bernoulli.Prior(9 * ones[:2], 5 * ones, 7 * ones)
    informed = LogPosterior(partial(bernoulli.model, num_components=2, prior=prior), x)
    found, flat = standard_errors(informed, fit), standard_errors(program(bernoulli, x, 2), fit)
    assert torch.allclose(found.covariance, flat.covariance, rtol=1e-12)


def test_what_the_curvature_cannot_say_is_said() -> None:
    x, fit = binary_fit()
    posterior = program(bernoulli, x, 2)
    edge = fit._replace(probs=torch.where(fit.probs == fit.probs.max(), 1.0, fit.probs))
    with pytest.raises(ValueError, match="probs is at the edge of its support"):
        standard_errors(posterior, edge)
    certain = x.clone()
    certain[:, 0] = (bernoulli.log_joint(fit, x).argmax(1) == fit.probs[:, 0].argmax()).double()
    nearly = em(bernoulli, certain, fit, rtol=1e-15, max_steps=20000).params
    nearly = nearly._replace(probs=nearly.probs.clamp(1e-14, 1 - 1e-14))
    with pytest.raises(ValueError, match=r"probs is next to the edge of its support: on its logarithmic scale"):
        standard_errors(program(bernoulli, certain, 2), nearly)
    with pytest.warns(ConvergenceWarning, match="standard errors away from the maximum"):
        standard_errors(posterior, fit._replace(weights=fit.weights.flip(0) * 0.1 + fit.weights * 0.9))
    middle = gaussian_full.Params(
        torch.tensor([0.5, 0.5]).double(),
        torch.tensor([[-1e-3], [1e-3]]).double(),
        torch.full((2, 1, 1), 2.0).double(),
    )
    apart = torch.cat([torch.linspace(-2, -1, 20), torch.linspace(1, 2, 20)])[:, None].double()
    with pytest.raises(ValueError, match="no maximum: the likelihood curves upwards along"):
        standard_errors(program(gaussian_full, apart, 2), middle)


def shifted(x: Tensor) -> None:
    """Locations a common shift of which no row sees."""
    weights = pyro.sample("weights", dist.ImproperUniform(dist.constraints.simplex, (), (2,)))
    locs = pyro.sample("locs", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
    shift = pyro.sample("shift", dist.ImproperUniform(dist.constraints.real, (), ()))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[z] + shift, 1.0), obs=x)


def test_a_fit_of_another_program_is_refused_in_words() -> None:
    x, fit = binary_fit()
    posterior = program(bernoulli, x, 2)
    for function in (standard_errors, observed_information):
        with pytest.raises(ValueError, match="the fit lacks the sites weights; it has probs"):
            function(posterior, {"probs": fit.probs})
        with pytest.raises(ValueError, match=r"probs of the fit has shape \(2, 4\), not \(2, 5\)"):
            function(posterior, fit._replace(probs=fit.probs[:, :4]))


def test_a_model_that_is_not_identified_is_named() -> None:
    x = torch.cat([torch.randn(40, generator=seeded(0)), 4 + torch.randn(40, generator=seeded(1))]).double()
    family = GaussianIsotropic(1.0)
    start = family.Params(torch.tensor([0.5, 0.5]).double(), torch.tensor([[0.0], [4.0]]).double())
    fit = fitted(family, x[:, None], start)
    point = {"weights": fit.weights, "locs": fit.locs[:, 0], "shift": torch.zeros((), dtype=torch.float64)}
    with pytest.raises(ValueError, match="singular: along locs, shift the likelihood is flat"):
        standard_errors(LogPosterior(shifted, x), point)


@pytest.mark.parametrize("method", ["parametric", "nonparametric"])
def test_bootstrap_replicates_are_fits_by_em(method: Any) -> None:
    x, fit = binary_fit()
    draws = bootstrap(bernoulli, x, fit, num_replicates=6, generator=seeded(2), method=method)
    generator = seeded(2)
    again = bootstrap(bernoulli, x, fit, num_replicates=6, generator=generator, method=method)
    assert all(torch.equal(again.params[site], value) for site, value in draws.params.items())
    generator = seeded(2)
    rows: list[tuple[Tensor, Tensor | None]]
    if method == "parametric":
        rows = [(bernoulli.sample(fit, 400, generator)[0], None) for _ in range(6)]
    else:
        drawn = torch.multinomial(torch.ones(6, 400).double(), 400, replacement=True, generator=generator)
        rows = [(x, torch.bincount(each, minlength=400).double()) for each in drawn]
    for number, (data, counts) in enumerate(rows):
        alone = em(bernoulli, data, fit, weights=counts).params
        assert torch.allclose(draws.params["probs"][0, number], alone.probs, rtol=1e-6)
        assert torch.allclose(draws.params["weights"][0, number], alone.weights, rtol=1e-6)


@pytest.mark.parametrize("method", ["parametric", "nonparametric"])
def test_bootstrap_and_curvature_agree(method: Any) -> None:
    """The standard deviation of B replicates has a relative standard error of 1 / sqrt(2 B)."""
    x, fit = binary_fit()
    replicates = 300
    draws = bootstrap(bernoulli, x, fit, num_replicates=replicates, generator=seeded(5), method=method)
    assert draws.attributes["num_failed"] == 0
    expected = standard_errors(program(bernoulli, x, 2), fit).params
    for site, error in expected.items():
        ratio = draws.params[site][0].std(0) / error
        assert (ratio - 1).abs().max() < 5 / math.sqrt(2 * replicates), site
    tree = to_datatree(draws, program(bernoulli, x, 2), seed=0, num_predictive=0)
    assert tree["posterior"].attrs["component_labels"] == "aligned"
    assert tree["posterior"]["probs"].sizes == {"chain": 1, "draw": replicates, "component": 2, "feature": 5}


def test_replicates_that_switched_labels_are_renumbered(monkeypatch: pytest.MonkeyPatch) -> None:
    x, fit = binary_fit()
    settings: Any = {"num_replicates": 8, "method": "nonparametric"}
    draws = bootstrap(bernoulli, x, fit, generator=seeded(3), **settings)
    em_step = module._Replicates.step

    def switching(replicates: Any) -> None:
        em_step(replicates)
        if replicates.num_stopped == settings["num_replicates"]:
            for value in replicates.fits:
                value[::2] = value[::2].flip(1)

    monkeypatch.setattr(module._Replicates, "step", switching)
    switched = bootstrap(bernoulli, x, fit, generator=seeded(3), **settings)
    assert all(torch.equal(switched.params[site], value) for site, value in draws.params.items())


def test_every_family_can_be_resampled(case: Case) -> None:
    params = case.params(0, k=2, spread=3.0)
    x = case.data(0, 60, params)
    fit = em(case.family, x, params, max_steps=3000, rtol=1e-12).params
    draws = bootstrap(case.family, x, fit, num_replicates=4, generator=seeded(1), max_steps=5000, rtol=1e-8)
    assert draws.params.keys() == set(case.free)
    assert all(bool(torch.isfinite(value).all()) for value in draws.params.values())


def test_failing_replicates_are_counted() -> None:
    """A component of two rows, which half the resamples lose."""
    x = torch.cat([torch.randn(30, 1, generator=seeded(0)).double(), torch.tensor([[50.0], [51.0]]).double()])
    start = gaussian_full.Params(
        torch.tensor([0.9, 0.1]).double(), torch.tensor([[0.0], [50.5]]).double(), torch.ones(2, 1, 1).double()
    )
    fit = fitted(gaussian_full, x, start)
    settings: Any = {"generator": seeded(1), "method": "nonparametric"}
    with pytest.warns(ConvergenceWarning, match=r"of 40 replicates lost a component"):
        draws = bootstrap(gaussian_full, x, fit, num_replicates=40, **settings)
    assert draws.params["locs"].shape[1] == 40 - draws.attributes["num_failed"]
    with pytest.raises(ValueError, match="none of 2 replicates converged in 1 steps"):
        bootstrap(gaussian_full, x, fit, num_replicates=2, max_steps=1, **settings)
    with pytest.raises(ValueError, match="num_replicates"):
        bootstrap(gaussian_full, x, fit, num_replicates=1, **settings)
    with pytest.raises(ValueError, match="method must be"):
        bootstrap(gaussian_full, x, fit, num_replicates=2, generator=seeded(1), method="jackknife")  # type: ignore[arg-type]


def test_a_density_with_corners_is_sent_to_the_bootstrap(all_families: list[Case]) -> None:
    case = next(case for case in all_families if case.name == "laplace")
    params = case.params(0, k=2, spread=3.0)
    x = case.data(0, 200, params)
    with pytest.raises(ValueError, match=r"along .*locs.* A density with corners"):
        standard_errors(LogPosterior(case.program(2), x), fitted(case.family, x, params))


def test_a_fit_outside_of_its_support_is_refused() -> None:
    x = torch.randn(50, 2, generator=seeded(0), dtype=torch.float64)
    fit = gaussian_full.init_params(x, 2, seeded(1))
    posterior = program(gaussian_full, x, 2)
    upper = fit.covariances.clone()
    upper[:, 0, 1] += 0.1
    for name, value in (("weights", 2 * fit.weights), ("covariances", upper), ("covariances", -fit.covariances)):
        with pytest.raises(ValueError, match=f"{name} of the fit lies outside of its support"):
            observed_information(posterior, fit._replace(**{name: value}))


def test_progress_is_on_stderr(capsys: pytest.CaptureFixture) -> None:
    x, fit = binary_fit()
    bootstrap(bernoulli, x, fit, num_replicates=2, generator=seeded(2), progress=True)
    captured = capsys.readouterr()
    assert [captured.err.count("bootstrap"), captured.err.count("100%"), captured.out] == [1, 1, ""]
