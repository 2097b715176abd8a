"""Guides by name: against a known posterior, on positive definite sites, and as draws."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.optim import PyroOptim
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.svi import guide_draws, normal_approximation, svi
from mixproof.models.positive_definite import InverseWishart

NAMES = ["AutoNormal", "AutoMultivariateNormal", "AutoLaplace"]
X = torch.linspace(-1, 2, 30, dtype=torch.float64)


def known(x: Tensor) -> None:
    """Two correlated means with normal laws: their posterior is normal."""
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(torch.ones(1)), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs.sum(), 3.0), obs=x)


def posterior_of_known(x: Tensor) -> tuple[Tensor, Tensor]:
    precision = torch.eye(2, dtype=torch.float64) + len(x) / 9
    covariance = precision.inverse()
    return covariance @ torch.full((2,), float(x.sum()) / 9, dtype=torch.float64), covariance


@pytest.mark.parametrize("name", NAMES)
def test_a_normal_posterior_is_found(name: Any) -> None:
    """Exactly by the curvature; by the ELBO within the noise of its last steps, a tenth of a standard deviation."""
    mean, covariance = posterior_of_known(X)
    fitted = svi(known, name, X, num_steps=1000, seed=0, learning_rate=0.05)
    draws = guide_draws(known, fitted, X, num_draws=2000, seed=1)
    values = draws.params["locs"][0]
    assert draws.params["locs"].shape == (1, 2000, 2)
    # the independent normal law nearest in Kullback-Leibler divergence has the precisions of the posterior
    expected = torch.diag(1 / covariance.inverse().diagonal()) if name == "AutoNormal" else covariance
    sd = covariance.diagonal().sqrt()
    assert ((values.mean(0) - mean).abs() / sd).max() < 0.1 + 5 / 2000**0.5
    found = values.T.cov()
    scale = expected.diagonal().sqrt()
    assert ((found - expected).abs() / (scale[:, None] * scale)).max() < 0.2 + 5 * (2 / 2000) ** 0.5
    if name == "AutoLaplace":
        ratio = draws.sample_stats["lp"] - draws.sample_stats["log_q"]  # constant where the guide is the posterior
        assert ratio.std() < 1e-2
    again = guide_draws(known, fitted, X, num_draws=2000, seed=1)
    assert torch.equal(again.params["locs"], draws.params["locs"])


def three_shares(x: Tensor) -> None:
    """Three weights: with two, all coordinates of weights are alike."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([8.0, 3.0, 1.0])))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(torch.tensor([-1.0, 0.0, 2.0])[z], 0.5), obs=x)


@pytest.mark.parametrize("name", NAMES)
def test_the_guide_is_the_law_that_was_fitted(name: Any) -> None:
    """Its median, its density by a change of variables, and its losses."""
    settings: Any = {"num_steps": 200, "seed": 0}
    law = normal_approximation(three_shares, name, X, **settings)
    fitted = svi(three_shares, name, X, **settings)
    assert torch.equal(fitted.losses, law.losses[:, 0])
    median = law.posterior.constrain(law.loc)["weights"][0]
    assert (fitted.guide.median()["weights"] - median).abs().max() < 1e-12
    assert median.max() > 1.3 * median.min()
    draws = guide_draws(three_shares, fitted, X, num_draws=50, seed=1)
    u = law.posterior.unconstrain({"weights": draws.params["weights"][0]})
    normal = torch.distributions.MultivariateNormal(law.loc[0], scale_tril=law.scale_tril[0])
    expected = normal.log_prob(u) - law.posterior.log_jacobian(u)
    assert (draws.sample_stats["log_q"][0] - expected).abs().max() < 1e-8


@pytest.mark.parametrize("name", NAMES)
def test_many_data_sets_are_fitted_at_once(name: Any) -> None:
    """Each to its own posterior, known as above; the tolerances are those from above."""
    data = torch.stack([X, X - 3, 2 * X])
    law = normal_approximation(known, name, data, num_steps=500, seed=0, learning_rate=0.05, batched=True)
    assert law.losses.shape == (500, 3)
    for x, loc, factor in zip(data, law.loc, law.scale_tril, strict=True):
        mean, covariance = posterior_of_known(x)
        expected = torch.diag(1 / covariance.inverse().diagonal()) if name == "AutoNormal" else covariance
        sd = covariance.diagonal().sqrt()
        assert ((loc - mean).abs() / sd).max() < (1e-3 if name == "AutoLaplace" else 0.1)
        scale = expected.diagonal().sqrt()
        error = ((factor @ factor.mT - expected).abs() / (scale[:, None] * scale)).max()
        assert error < (1e-9 if name == "AutoLaplace" else 0.2)
    draws = law.draws(4000, seed=1).params["locs"]
    assert draws.shape == (3, 4000, 2)
    for values, loc, factor in zip(draws, law.loc, law.scale_tril, strict=True):
        covariance = factor @ factor.mT
        scale = covariance.diagonal().sqrt()
        assert ((values.mean(0) - loc).abs() / scale).max() < 5 / 4000**0.5
        assert ((values.T.cov() - covariance).abs() / (scale[:, None] * scale)).max() < 5 * (2 / 4000) ** 0.5


def test_the_elbo_is_as_high_as_pyros_own() -> None:
    """On a posterior that is not normal. Each is the mean of 300 estimates with the steps all but at rest."""

    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.HalfNormal(2.0))
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.stack([share, 1 - share])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[z], scale), obs=x)

    x = X[::6]
    settings: Any = {"learning_rate": 0.05, "final_learning_rate": 1e-4, "seed": 0}
    mine = svi(model, "AutoMultivariateNormal", x, num_steps=800, **settings).losses[-300:]
    guide = AutoMultivariateNormal(poutine.block(model, hide=["z"]), init_scale=0.3)
    pyros = svi(model, guide, x, num_steps=800, **settings).losses[-300:]
    error = (mine.var() / 300 + pyros.var() / 300).sqrt()
    assert abs(mine.mean() - pyros.mean()) < 5 * error
    assert error < 0.05


def matrices(x: Tensor) -> None:
    with pyro.plate("components", 2):
        covariances = pyro.sample("covariances", InverseWishart(torch.tensor(5.0), torch.eye(2)))
        locs = pyro.sample("locs", dist.MultivariateNormal(torch.zeros(2), 4 * torch.eye(2)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.MultivariateNormal(locs[z], covariances[z]), obs=x)


@pytest.mark.parametrize("name", NAMES)
def test_positive_definite_sites_have_guides(name: Any) -> None:
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[::2] += 3
    settings: Any = {"num_steps": 150, "seed": 0, "learning_rate": 0.02}
    fitted = svi(matrices, name, x, **settings)
    assert fitted.losses[-20:].mean() < fitted.losses[0] or name == "AutoLaplace"
    draws = guide_draws(matrices, fitted, x, num_draws=50, seed=0)
    law = normal_approximation(matrices, name, x, **settings)
    u = law.posterior.unconstrain({site: value[0] for site, value in draws.params.items()})
    log_q = torch.distributions.MultivariateNormal(law.loc, scale_tril=law.scale_tril).log_prob(u)
    assert (draws.sample_stats["log_q"][0] - log_q + law.posterior.log_jacobian(u)).abs().max() < 1e-8
    for site, value in fitted.guide.median(x).items():
        assert (value - law.posterior.constrain(law.loc)[site][0]).abs().max() < 1e-10
    assert draws.params["covariances"].shape == (1, 50, 2, 2, 2)
    assert (torch.linalg.eigvalsh(draws.params["covariances"]) > 0).all()
    assert torch.isfinite(draws.sample_stats["lp"]).all()


def test_laplace_sums_the_latents_out() -> None:
    """The covariance is the inverse of the second derivatives of the log posterior with the latents summed out."""
    x = torch.cat([X, X + 5])

    def model(x: Tensor) -> None:
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 5.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[z], 1.5), obs=x)

    guide = svi(model, "AutoLaplace", x, num_steps=400, seed=0, learning_rate=0.05).guide
    u = guide.loc
    log_prior = dist.Normal(0.0, 5.0)

    def density(u: Tensor) -> Tensor:
        rows = dist.Normal(u, 1.5).log_prob(x[:, None]).logsumexp(1) - torch.log(torch.tensor(2.0))
        return rows.sum() + log_prior.log_prob(u).sum()

    hessian = torch.autograd.functional.hessian(density, u)
    factor = guide.scale[:, None] * guide.scale_tril
    assert (factor @ factor.mT @ -hessian - torch.eye(2)).abs().max() < 1e-6
    assert torch.autograd.functional.jacobian(density, u).abs().max() < 1e-2


def test_what_has_no_guide_is_refused() -> None:
    with pytest.raises(
        ValueError, match="no guide named AutoFlow: give AutoNormal, AutoMultivariateNormal, AutoLaplace"
    ):
        svi(known, "AutoFlow", X, num_steps=1, seed=0)

    def with_param(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(torch.ones(1)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc, scale), obs=x)

    with pytest.raises(ValueError, match="AutoNormal has no place for the param sites scale"):
        svi(with_param, "AutoNormal", X, num_steps=1, seed=0)
    with pytest.raises(ValueError, match="AutoNormal is fitted by Adam, and takes no optimiser"):
        svi(known, "AutoNormal", X, num_steps=1, seed=0, optimiser=PyroOptim(torch.optim.Rprop, {"lr": 0.01}))
    with pytest.raises(ValueError, match="the loss is not finite at step 1: lower the learning rate"):
        svi(known, "AutoNormal", X, num_steps=2, seed=0, learning_rate=1e200)
    fitted = svi(known, "AutoNormal", X, num_steps=1, seed=0)
    with pytest.raises(ValueError, match="num_draws must be at least 1, not 0"):
        guide_draws(known, fitted, X, num_draws=0, seed=0)
    assert LogPosterior(known, X).size == 2
    settings: Any
    for settings, words in (
        ({"learning_rate": 0.0}, "learning_rate must be positive and finite, not 0.0"),
        ({"final_learning_rate": -1.0}, "final_learning_rate must be positive and finite, not -1.0"),
        ({"num_steps": 0}, "num_steps must be at least 1, not 0"),
    ):
        for guide in ("AutoNormal", AutoNormal(pyro.poutine.block(known, hide=["z"]))):
            with pytest.raises(ValueError, match=words):
                svi(known, guide, X, **{"num_steps": 2, "seed": 0, **settings})
    with pytest.raises(TypeError, match=r"num_steps must be an integer, not 2\.5"):
        svi(known, "AutoNormal", X, num_steps=2.5, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_a_guide_is_fitted_once(guide: Any) -> None:
    """A second fit would start where the first ended, and change what that one returned."""
    own = guide(poutine.block(known, hide=["z"]))
    fitted = svi(known, own, X, num_steps=3, seed=0).guide.median()["locs"].clone()
    with pytest.raises(ValueError, match=f"the {guide.__name__} has been run before"):
        svi(known, own, X + 5, num_steps=3, seed=0)
    assert torch.equal(own.median()["locs"], fitted)


@pytest.mark.parametrize("own", [False, True])
def test_progress_is_on_stderr(own: bool, capsys: pytest.CaptureFixture) -> None:
    losses = []
    for progress in (True, False):
        guide = AutoNormal(poutine.block(known, hide=["z"])) if own else "AutoNormal"
        losses.append(svi(known, guide, X, num_steps=3, seed=0, progress=progress).losses)
    captured = capsys.readouterr()
    assert [captured.err.count("SVI"), captured.err.count("100%"), captured.out] == [1, 1, ""]
    assert torch.equal(*losses)
