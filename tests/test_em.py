"""EM: what a Fit holds, when it stops, what row weights mean, and how it catches a step that does not climb."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from mixproof.inference.em import Fit, em, responsibilities
from mixproof.inference.enumeration import Coordinates, inspect
from mixproof.inference.validation import check_params
from mixproof.models import bernoulli, gaussian_diagonal, gaussian_full, gaussian_spherical, gaussian_tied
from tests.conftest import Case, seeded


def few_steps(*args: Any, num_steps: int = 5, **kwargs: Any) -> Fit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return em(*args, max_steps=num_steps, rtol=0.0, **kwargs)


def log_density(family: Any, params: Any, x: Tensor, prior: Any) -> Tensor:
    log_prior = 0.0 if prior is None else family.log_prior(params, prior)
    return family.log_joint(params, x).logsumexp(-1).sum() + log_prior


def test_every_entry_of_the_trace_belongs_to_its_step(case: Case, kind: str) -> None:
    """scikit-learn's lower_bound_ belongs to the parameters before the last step; here it may not."""
    x = case.data(1, 50)
    prior = case.prior_or_flat(kind)
    start = case.start(2, x, prior=prior)
    fit = few_steps(case.family, x, start, prior=prior)
    assert isinstance(fit.params, case.family.Params)
    assert fit.log_lik.shape == (5,)
    assert fit.num_steps == 5
    assert not fit.converged
    for step in range(1, 6):
        part = few_steps(case.family, x, start, prior=prior, num_steps=step)
        expected = log_density(case.family, part.params, x, prior)
        assert abs(fit.log_lik[step - 1] - expected) <= 1e-12 * abs(expected)
    before = log_density(case.family, start, x, prior)
    assert fit.log_lik[0] > before


def test_convergence_is_the_stated_relative_change(real_data: dict[str, Tensor]) -> None:
    x = real_data["iris"]
    start = gaussian_full.init_params(x, 3, seeded(0))
    for rtol in (1e-3, 1e-6, 1e-10):
        fit = em(gaussian_full, x, start, rtol=rtol)
        assert fit.converged
        assert fit.num_steps == len(fit.log_lik)
        changes = fit.log_lik.diff().abs() / fit.log_lik[1:].abs()
        assert changes[-1] <= rtol
        assert (changes[:-1] > rtol).all()


def test_unfinished_em_is_a_value_and_a_warning(real_data: dict[str, Tensor]) -> None:
    x = real_data["iris"]
    start = gaussian_full.init_params(x, 3, seeded(0))
    with pytest.warns(
        ConvergenceWarning, match=r"EM made 2 steps and the last still changed .* raise max_steps"
    ) as caught:
        fit = em(gaussian_full, x, start, max_steps=2)
    assert not fit.converged
    assert fit.num_steps == 2
    assert caught[0].filename == __file__


def test_inputs_are_left_alone(case: Case, kind: str) -> None:
    x, prior = case.data(3, 40), case.prior_or_flat(kind)
    start = case.start(4, x, prior=prior)
    copies = [x.clone(), *(value.clone() for value in start)]
    few_steps(case.family, x, start, prior=prior)
    assert all(map(torch.equal, copies, [x, *start]))


def test_data_and_parameters_may_be_lists_arrays_and_integers() -> None:
    rows = [[0, 1], [1, 1], [5, 6], [6, 5], [6, 7], [0, 0]]
    start = gaussian_spherical.Params([0.5, 0.5], [[0.0, 0.0], [6, 6]], [1.0, 1])  # type: ignore[arg-type]
    expected = few_steps(gaussian_spherical, torch.tensor(rows).double(), start)
    for x in (rows, np.array(rows), np.array(rows, dtype=np.uint8), torch.tensor(rows)):
        fit = few_steps(gaussian_spherical, x, start)
        assert all(map(torch.equal, fit.params, expected.params))
        assert fit.log_lik.dtype == torch.float64
    assert few_steps(gaussian_spherical, torch.tensor(rows).float(), start).log_lik.dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "name"),
    [(gaussian_full, "full"), (gaussian_diagonal, "diag"), (gaussian_spherical, "spherical"), (gaussian_tied, "tied")],
    ids=["full", "diag", "spherical", "tied"],
)
def test_converged_fit_is_that_of_scikit_learn(family: Any, name: str, real_data: dict[str, Tensor]) -> None:
    """From the same start and without its reg_covar, scikit-learn climbs to the same parameters."""
    x = real_data["iris"]
    start = family.init_params(x, 3, seeded(0))
    fit = em(family, x, start, rtol=1e-14, max_steps=5000)
    precisions = torch.linalg.inv(start[2]) if name in ("full", "tied") else 1 / start[2]
    peer = GaussianMixture(
        3,
        covariance_type=name,
        reg_covar=0.0,
        tol=1e-14,
        max_iter=5000,
        weights_init=start.weights.numpy(),
        means_init=start.locs.numpy(),
        precisions_init=precisions.numpy(),
    ).fit(x.numpy())
    assert fit.converged
    assert peer.converged_
    ours, theirs = gains_left(fit, 1e-14 * abs(fit.log_lik[-1].item()), x), gains_left(fit, 1e-14 * len(x), x)
    assert abs(peer.score(x.numpy()) * len(x) - fit.log_lik[-1].item()) <= max(ours, theirs)
    pairs = [
        (lambda params: params.weights, peer.weights_),
        (lambda params: params.locs, peer.means_),
        (lambda params: params[2], peer.covariances_),
        (lambda params: family.log_joint(params, x).softmax(-1), peer.predict_proba(x.numpy())),
    ]
    for read, expected in pairs:
        value = torch.as_tensor(expected)
        reach = (math.sqrt(ours) + math.sqrt(theirs)) * distance_of_one_nat(family, fit.params, x, read)
        rounding = 2**10 * torch.finfo(x.dtype).eps * value.abs().max()  # of two formulas for one thing
        assert ((read(fit.params) - value).abs() <= reach + rounding).all()


def gains_left(fit: Fit, last_gain: float, x: Tensor) -> float:
    """Return what EM, whose gains shrink by a constant factor at last, still has to gain after a gain; or rounding."""
    rounding = 8 * torch.finfo(x.dtype).eps * math.sqrt(len(x)) * (abs(fit.log_lik[-1].item()) + len(x))
    gains = fit.log_lik.diff()
    clear = gains[gains > 1e3 * rounding]  # of which rounding leaves three digits
    factor = (clear[-1] / clear[-2]).item()
    assert 0 < factor < 1
    return last_gain * factor / (1 - factor) + rounding


def distance_of_one_nat(family: Any, params: Any, x: Tensor, read: Callable[[Any], Tensor]) -> Tensor:
    """Return how far each entry read from the parameters moves where the log likelihood is 1 below its maximum."""
    program = inspect(partial(family.model, num_components=3), params._asdict(), x)
    coordinates = Coordinates(program.supports, params._asdict())
    u = coordinates.inverse(params._asdict())

    def at(u: Tensor) -> Any:
        return family.Params(**coordinates(u))

    curvature = -torch.autograd.functional.hessian(lambda u: family.log_joint(at(u), x).logsumexp(-1).sum(), u)
    slopes = torch.autograd.functional.jacobian(lambda u: read(at(u)), u)
    # Coordinates that change nothing, as the upper triangle of a Cholesky factor, have no curvature.
    inverse = torch.linalg.pinv(curvature, hermitian=True)
    return (2 * ((slopes @ inverse) * slopes).sum(-1)).clamp_min(0).sqrt()


def test_start_is_valid_and_exact_by_its_seed(case: Case) -> None:
    x = case.data(5, 60)
    for method in ("k-means++", "random"):
        first, again = (case.family.init_params(x, case.num_components(), seeded(1), method) for _ in range(2))
        others = [case.family.init_params(x, case.num_components(), seeded(seed), method) for seed in range(2, 6)]
        assert all(map(torch.equal, first, again))
        assert not all(all(map(torch.equal, first, other)) for other in others)
        check_params(case.family, first, 2)
        assert all((value > 0).all() for name, value in first._asdict().items() if name.endswith("weights"))
        assert torch.isfinite(case.family.log_joint(first, x)).all()
    with pytest.raises(ValueError, match='method must be "k-means\\+\\+" or "random", not \'kmeans\''):
        case.family.init_params(x, case.num_components(), seeded(1), "kmeans")


# Row weights


def test_row_of_weight_zero_is_no_row(case: Case, kind: str) -> None:
    x, prior = case.data(6, 60), case.prior_or_flat(kind)
    start = case.start(7, x, prior=prior)
    weights = torch.ones(60)
    weights[40:] = 0
    fit = few_steps(case.family, x, start, prior=prior, weights=weights)
    expected = few_steps(case.family, x[:40], start, prior=prior)
    for found, value in zip(fit.params, expected.params, strict=True):
        assert torch.allclose(found, value, rtol=1e-11, atol=1e-11)
    assert torch.allclose(fit.log_lik, expected.log_lik, rtol=1e-12)


def test_common_weight_scales_the_likelihood_and_no_more(case: Case) -> None:
    x = case.data(8, 60)
    start = case.start(9, x)
    fit = few_steps(case.family, x, start, weights=np.full(60, 2.5))
    expected = few_steps(case.family, x, start)
    for found, value in zip(fit.params, expected.params, strict=True):
        assert torch.allclose(found, value, rtol=1e-11, atol=1e-11)
    assert torch.allclose(fit.log_lik, 2.5 * expected.log_lik, rtol=1e-12)


# A step that does not climb


def planted(family: Any, m_step: Any) -> Any:
    """Return a family in which only the M-step is another one."""
    names = ["Params", "Prior", "Stats", "model", "log_joint", "statistics", "log_prior"]
    return SimpleNamespace(**{name: getattr(family, name) for name in names}, m_step=m_step)


def standard_deviation_for_variance(stats: Any, prior: Any = None) -> Any:
    params = gaussian_diagonal.m_step(stats, prior)
    return params._replace(variances=params.variances.sqrt())


def second_moment_for_variance(stats: Any, prior: Any = None) -> Any:
    params = gaussian_diagonal.m_step(stats, prior)
    return params._replace(variances=params.variances + params.locs.square())


def weights_off_by_one_component(stats: Any, prior: Any = None) -> Any:
    params = gaussian_diagonal.m_step(stats, prior)
    return params._replace(weights=params.weights.roll(1))


def locations_of_other_components(stats: Any, prior: Any = None) -> Any:
    params = gaussian_diagonal.m_step(stats, prior)
    return params._replace(locs=params.locs.roll(1, 0))


@pytest.mark.parametrize(
    "m_step",
    [
        standard_deviation_for_variance,
        second_moment_for_variance,
        weights_off_by_one_component,
        locations_of_other_components,
    ],
)
def test_wrong_m_step_is_caught_when_it_falls(m_step: Any, real_data: dict[str, Tensor]) -> None:
    x = real_data["iris"]
    start = em(gaussian_diagonal, x, gaussian_diagonal.init_params(x, 3, seeded(0))).params
    with pytest.raises(
        ArithmeticError, match=r"step 1 lowered the objective from .* verify_em says which part is wrong"
    ):
        em(planted(gaussian_diagonal, m_step), x, start)


def test_wrong_log_prior_is_caught_when_it_falls(real_data: dict[str, Tensor], all_families: list[Case]) -> None:
    case = next(case for case in all_families if case.family is gaussian_diagonal)
    x = real_data["iris"]
    prior = case.prior(0, 3, 4)
    # From the maximum of the likelihood, a step towards the prior lowers both terms of the wrong objective.
    start = em(gaussian_diagonal, x, gaussian_diagonal.init_params(x, 3, seeded(0))).params
    family = planted(gaussian_diagonal, gaussian_diagonal.m_step)
    family.log_prior = lambda params, prior: -gaussian_diagonal.log_prior(params, prior)
    with pytest.raises(ArithmeticError, match="m_step does not maximise what log_joint and log_prior declare"):
        em(family, x, start, prior=prior)


@pytest.mark.parametrize(
    ("noise", "dtype", "message"),
    [
        (0.01, torch.float32, "lowered the objective .* by rounding: .* nearly singular .*; give x in float64"),
        (
            3e-7,
            torch.float64,
            "along some direction .* Drop one of two features that are nearly the same",
        ),
    ],
)
def test_a_fall_by_rounding_is_not_laid_at_the_m_step(noise: float, dtype: torch.dtype, message: str) -> None:
    """Two features that differ by noise: the sums of the step round more than the narrow direction is wide."""
    common = (
        torch.randn(2000, 1, generator=seeded(0), dtype=torch.float64) * 3 + 15 + 10 * (torch.arange(2000) % 2)[:, None]
    )
    x = (common + noise * torch.randn(2000, 2, generator=seeded(1), dtype=torch.float64)).to(dtype)
    with pytest.raises(ValueError, match=message):
        em(gaussian_full, x, gaussian_full.init_params(x, 2, seeded(0)))


def test_probabilities_may_reach_zero_and_one() -> None:
    """The maximum likelihood of a constant column is at the edge, where log(0) must not spoil the rest."""
    x = torch.tensor([[0.0, 1, 0], [0, 1, 1], [0, 1, 0], [0, 1, 1], [0, 0, 1]]).double()
    start = bernoulli.Params(
        torch.tensor([0.5, 0.5]).double(), torch.tensor([[0.3, 0.9, 0.5], [0.3, 0.4, 0.8]]).double()
    )
    fit = em(bernoulli, x, start, max_steps=5000)
    assert torch.equal(fit.params.probs[:, 0], torch.zeros(2).double())
    assert torch.isfinite(fit.log_lik).all()
    assert torch.allclose(responsibilities(bernoulli, fit.params, x).sum(1), torch.ones(5).double())
