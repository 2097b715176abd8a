"""The estimators: scikit-learn's own checks, agreement with its mixtures, and what they promise beyond them."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as PeerGaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks

from mixproof.inference.em import em
from mixproof.inference.estimators import BernoulliMixture, GaussianMixture, LaplaceMixture
from mixproof.models import bernoulli, gaussian_diagonal, gaussian_full, gaussian_spherical, gaussian_tied, laplace

Matrix = NDArray[np.float64]

IRIS: Matrix = load_iris().data
DIGITS: Matrix = load_digits().data[::3]
FAMILIES: dict[Any, Any] = {
    "full": gaussian_full,
    "tied": gaussian_tied,
    "diag": gaussian_diagonal,
    "spherical": gaussian_spherical,
}
every_type = pytest.mark.parametrize("covariance_type", list(FAMILIES))


def first_start(family: Any, x: Matrix, num_components: int, random_state: int) -> Any:
    """Return the start of a fit with ``n_init=1``: the generator takes its seed from the random state."""
    seed = np.random.RandomState(random_state).randint(2**31 - 1)
    return family.init_params(torch.as_tensor(x), num_components, torch.Generator().manual_seed(seed))


def peer_at(model: GaussianMixture) -> PeerGaussianMixture:
    """Return scikit-learn's mixture at the parameters of ours."""
    peer = PeerGaussianMixture(model.n_components, covariance_type=model.covariance_type)
    peer.weights_, peer.means_, peer.covariances_ = model.weights_, model.means_, model.covariances_
    if model.covariance_type in ("full", "tied"):
        peer.precisions_cholesky_ = np.linalg.inv(np.linalg.cholesky(model.covariances_)).swapaxes(-1, -2)
    else:
        peer.precisions_cholesky_ = model.covariances_**-0.5
    return peer


# scikit-learn's checks


def expected_failures(estimator: Any) -> dict[str, str]:
    """Return the checks that an estimator cannot pass, and why."""
    equivalence = "check_sample_weight_equivalence_on_dense_data"
    if isinstance(estimator, GaussianMixture) and estimator.covariance_type in ("full", "tied"):
        return {equivalence: "15 rows of 30 features have no positive definite covariance, and none is made up"}
    return {}


@parametrize_with_checks(
    [
        *(GaussianMixture(covariance_type=name) for name in ("full", "tied", "diag", "spherical")),
        BernoulliMixture(binarize=0.0),
        BernoulliMixture(2, binarize=0.0),
        LaplaceMixture(),
    ],
    expected_failed_checks=expected_failures,
    xfail_strict=True,
)
def test_scikit_learn_check(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


# Against scikit-learn


@every_type
def test_fit_is_that_of_em_in_the_shapes_of_scikit_learn(covariance_type: Any) -> None:
    """EM's own test holds it against scikit-learn's EM."""
    model = GaussianMixture(3, covariance_type=covariance_type, tol=1e-12, max_iter=5000, random_state=0).fit(IRIS)
    start = first_start(FAMILIES[covariance_type], IRIS, 3, 0)
    fit = em(FAMILIES[covariance_type], IRIS, start, rtol=1e-12, max_steps=5000)
    peer = PeerGaussianMixture(3, covariance_type=covariance_type, random_state=0).fit(IRIS)
    for name, value in zip(("weights_", "means_", "covariances_"), fit.params, strict=True):
        assert np.array_equal(getattr(model, name), value), name
        assert getattr(model, name).shape == getattr(peer, name).shape, name
    assert np.array_equal(model.predict(IRIS), peer_at(model).predict(IRIS))


@every_type
def test_criteria_are_those_of_scikit_learn_at_equal_parameters(covariance_type: Any) -> None:
    model = GaussianMixture(3, covariance_type=covariance_type, random_state=1).fit(IRIS)
    peer = peer_at(model)
    assert math.isclose(model.bic(IRIS), peer.bic(IRIS), rel_tol=1e-12)
    assert math.isclose(model.aic(IRIS), peer.aic(IRIS), rel_tol=1e-12)
    assert np.allclose(model.score_samples(IRIS), peer.score_samples(IRIS), rtol=1e-11)
    assert np.allclose(model.predict_proba(IRIS), peer.predict_proba(IRIS), rtol=0, atol=1e-11)


def test_criteria_count_the_free_parameters_of_the_other_families() -> None:
    bits = DIGITS > 7.5
    for model, x, count in (
        (BernoulliMixture(5, random_state=0).fit(bits), bits, 4 + 5 * 64),
        (LaplaceMixture(3, random_state=0).fit(IRIS), IRIS, 2 + 3 * 4 + 3 * 4),
    ):
        deviance = -2 * model.score(x) * len(x)
        assert math.isclose(model.bic(x), deviance + count * math.log(len(x)), rel_tol=1e-12)
        assert math.isclose(model.aic(x), deviance + 2 * count, rel_tol=1e-12)


# Against formulas in numpy


def test_bernoulli_score_is_the_log_sum_of_its_products() -> None:
    bits = (DIGITS > 7.5).astype(float)
    model = BernoulliMixture(10, n_init=2, random_state=0).fit(bits)
    theta = model.probs_
    with np.errstate(divide="ignore"):  # a pixel that is never on in a component has log 0
        log_ones, log_zeros = np.log(theta), np.log1p(-theta)
    log_joint = np.log(model.weights_) + np.where(bits[:, None] == 1, log_ones, log_zeros).sum(-1)
    assert np.allclose(model.score_samples(bits), logsumexp(log_joint, axis=1), rtol=1e-12)
    assert math.isclose(model.score(bits), logsumexp(log_joint, axis=1).mean(), rel_tol=1e-12)
    assert np.array_equal(model.predict(bits), log_joint.argmax(1))


def test_laplace_score_is_the_log_sum_of_its_products() -> None:
    model = LaplaceMixture(3, random_state=0).fit(IRIS)
    deviations = np.abs(IRIS[:, None] - model.means_) / model.scales_
    log_joint = np.log(model.weights_) - (np.log(2 * model.scales_) + deviations).sum(-1)
    assert np.allclose(model.score_samples(IRIS), logsumexp(log_joint, axis=1), rtol=1e-12)


def test_threshold_stands_for_the_bits() -> None:
    model = BernoulliMixture(5, binarize=7.0, random_state=0).fit(DIGITS)
    on_bits = BernoulliMixture(5, random_state=0).fit(DIGITS > 7)
    assert np.array_equal(model.probs_, on_bits.probs_)
    assert model.bic(DIGITS) == on_bits.bic(DIGITS > 7)
    assert set(np.unique(model.sample(50)[0])) == {0.0, 1.0}


def test_row_that_no_component_allows_has_no_responsibilities() -> None:
    bits = np.array([[0, 0, 1], [0, 1, 1], [0, 1, 0], [0, 0, 0]])
    model = BernoulliMixture(1).fit(bits)
    assert model.probs_[0, 0] == 0
    impossible = [[1, 0, 1]]
    assert model.score_samples(impossible) == [-np.inf]
    with pytest.raises(ValueError, match="row 0 is impossible under every component"):
        model.predict_proba(impossible)


# What is fitted


def test_log_likelihood_is_that_of_the_fitted_parameters(kind: str) -> None:
    """scikit-learn's lower_bound_ is that of the parameters before; and a prior is no part of it."""
    family: Any = gaussian_diagonal
    prior = None if kind == "flat" else family.Prior([2.0] * 3, IRIS.mean(0), 2.0, [3.0] * 4, [0.1] * 4)
    weights = np.random.RandomState(0).randint(1, 4, len(IRIS))
    model = GaussianMixture(3, covariance_type="diag", prior=prior, tol=1e-2, random_state=0)
    model.fit(IRIS, sample_weight=weights)
    assert math.isclose(model.log_likelihood_, weights @ model.score_samples(IRIS), rel_tol=1e-12)
    model.fit(IRIS)
    assert math.isclose(model.log_likelihood_, len(IRIS) * model.score(IRIS), rel_tol=1e-12)
    assert isinstance(model.params_, gaussian_diagonal.Params)


def test_best_start_is_kept() -> None:
    seed = np.random.RandomState(0).randint(2**31 - 1)
    generator = torch.Generator().manual_seed(seed)
    x = torch.as_tensor(IRIS)
    fits = [em(gaussian_tied, x, gaussian_tied.init_params(x, 3, generator)) for _ in range(6)]
    log_likelihoods = [fit.log_lik[-1].item() for fit in fits]
    best = int(np.argmax(log_likelihoods))
    assert log_likelihoods[best] > log_likelihoods[0] + 1
    model = GaussianMixture(3, covariance_type="tied", n_init=6, random_state=0).fit(IRIS)
    assert model.log_likelihood_ == pytest.approx(log_likelihoods[best], rel=1e-12)
    assert model.n_iter_ == fits[best].num_steps
    assert model.converged_
    np.testing.assert_allclose(model.means_, fits[best].params.locs, rtol=1e-10)


def test_fit_and_labels_repeat_exactly() -> None:
    for init_params in ("k-means++", "random"):
        model = LaplaceMixture(3, init_params=init_params, random_state=5)
        labels = model.fit_predict(IRIS)
        assert np.array_equal(labels, LaplaceMixture(3, init_params=init_params, random_state=5).fit_predict(IRIS))
        assert np.array_equal(labels, model.predict_proba(IRIS).argmax(1))
        assert np.array_equal(labels, pickle.loads(pickle.dumps(model)).predict(IRIS))


def test_fitted_attributes_are_copies_and_inputs_are_left_alone() -> None:
    x, weights = IRIS.copy(), np.ones(len(IRIS))
    x.flags.writeable = weights.flags.writeable = False
    model = GaussianMixture(2, random_state=0).fit(x, sample_weight=weights)
    before = model.score(IRIS)
    model.means_[:] = 0
    assert model.score(IRIS) == before


def test_precision_is_that_of_the_data() -> None:
    single = GaussianMixture(3, covariance_type="tied", random_state=0).fit(IRIS.astype(np.float32))
    double = GaussianMixture(3, covariance_type="tied", random_state=0).fit(IRIS)
    assert single.means_.dtype == single.predict_proba(IRIS).dtype == np.float32
    assert double.means_.dtype == double.predict_proba(IRIS.astype(np.float32)).dtype == np.float64
    # The last change that either sees is the rounding of a sum of N terms of a few nats.
    assert abs(single.score(IRIS) - double.score(IRIS)) <= 100 * np.finfo(np.float32).eps


# Row weights


def test_row_of_weight_zero_is_no_row() -> None:
    weights = np.random.RandomState(0).randint(0, 2, len(IRIS))
    for model in (GaussianMixture(3, random_state=0), LaplaceMixture(3, random_state=0)):
        means = model.fit(IRIS, sample_weight=weights).means_
        assert np.array_equal(means, model.fit(IRIS[weights == 1]).means_)
    with pytest.raises(ValueError, match="3 components need at least as many rows, and x has 2"):
        GaussianMixture(3).fit(IRIS, sample_weight=[1.0, 1.0] + [0.0] * 148)


@every_type
def test_whole_weight_repeats_a_row(covariance_type: Any) -> None:
    """With one component the start does not matter, and there are more rows here than in scikit-learn's check."""
    weights = np.random.RandomState(1).randint(0, 4, len(IRIS))
    weighted = GaussianMixture(covariance_type=covariance_type).fit(IRIS, sample_weight=weights)
    repeated = GaussianMixture(covariance_type=covariance_type).fit(IRIS.repeat(weights, axis=0))
    assert np.allclose(weighted.means_, repeated.means_, rtol=1e-12)
    assert np.allclose(weighted.covariances_, repeated.covariances_, rtol=1e-10)
    assert math.isclose(weighted.log_likelihood_, repeated.log_likelihood_, rel_tol=1e-12)


# Drawing


@pytest.mark.parametrize(
    ("model", "family"),
    [
        *((GaussianMixture(2, covariance_type=name, random_state=0), family) for name, family in FAMILIES.items()),
        (LaplaceMixture(2, random_state=0), laplace),
        (BernoulliMixture(2, binarize=3.0, random_state=0), bernoulli),
    ],
    ids=[*FAMILIES, "laplace", "bernoulli"],
)
def test_draws_have_the_moments_of_the_fit(model: Any, family: Any) -> None:
    x, z = model.fit(IRIS).sample(20_000)
    assert x.shape == (20_000, 4)
    mean, covariance = (value.numpy() for value in family.moments(model.params_))
    assert (np.abs(x.mean(0) - mean) <= 6 * np.sqrt(covariance.diagonal() / len(x))).all()
    share = model.weights_[0]
    assert abs((z == 0).mean() - share) <= 6 * math.sqrt(share * (1 - share) / len(x))


def test_draws_are_a_function_of_the_random_state() -> None:
    model = GaussianMixture(2, random_state=0).fit(IRIS)
    first, again = model.sample(5), model.sample(5)
    assert all(map(np.array_equal, first, again))
    other = model.set_params(random_state=1).sample(5)
    assert not np.array_equal(first[0], other[0])
    model.set_params(random_state=np.random.RandomState(0))
    assert all(map(np.array_equal, first, model.sample(5)))
    assert not np.array_equal(first[0], model.sample(5)[0])
    with pytest.raises(ValueError, match="number of samples must be at least 1, not 0"):
        model.sample(0)


# What goes wrong


def test_collapsed_component_is_an_error_unless_another_start_survives() -> None:
    """Ten full covariances for 150 rows: most starts end on a handful of rows in a plane."""
    with pytest.raises(ValueError, match=r"no start survived: component \d has collapsed at step \d+"):
        GaussianMixture(10, random_state=0).fit(IRIS)
    with pytest.warns(RuntimeWarning, match=r"\d of 8 starts failed and are left out; the last: component \d"):
        model = GaussianMixture(10, n_init=8, random_state=0).fit(IRIS)
    assert np.isfinite(model.log_likelihood_)
    assert np.linalg.eigvalsh(model.covariances_).min() > 0


WISHART = {"df": 4.0, "scale": np.eye(2)}
GAMMA = {"shape": [2.0, 2.0], "rate": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("model", "family", "spread"),
    [
        (GaussianMixture(2, covariance_type="full", random_state=0), gaussian_full, WISHART),
        (GaussianMixture(2, covariance_type="tied", random_state=0), gaussian_tied, WISHART),
        (GaussianMixture(2, covariance_type="diag", random_state=0), gaussian_diagonal, GAMMA),
        (LaplaceMixture(2, random_state=0), laplace, GAMMA),
    ],
    ids=["full", "tied", "diag", "laplace"],
)
def test_prior_keeps_a_constant_column(model: Any, family: Any, spread: dict[str, Any]) -> None:
    x = np.random.RandomState(0).randn(40, 2)
    x[:, 1] = 3.0
    with pytest.raises(ValueError, match="no start survived"):
        model.fit(x)
    prior = family.Prior(concentration=[3.0, 3.0], loc=[0.0, 0.0], strength=0.5, **spread)
    model.set_params(prior=prior).fit(x)
    assert np.array_equal(model.means_, model.params_.locs)
    assert em(family, x, model.params_, prior=prior).num_steps == 1  # it is at rest


def test_prior_stands_in_for_missing_rows() -> None:
    """Fewer rows than features: no covariance without a prior; with one, the mode of Fraley and Raftery (2007)."""
    x = np.random.RandomState(0).randn(6, 10)
    with pytest.raises(
        ValueError, match=r"no start survived: .*covariances\[0\] must be a symmetric positive definite"
    ):
        GaussianMixture().fit(x)
    family: Any = gaussian_full
    prior = family.Prior([1.0], np.zeros(10), 0.5, 12.0, np.eye(10))
    model = GaussianMixture(prior=prior).fit(x)
    mean = x.sum(0) / 6.5
    scatter = (x - x.mean(0)).T @ (x - x.mean(0)) + 0.5 * 6 / 6.5 * np.outer(x.mean(0), x.mean(0))
    assert np.allclose(model.means_[0], mean, rtol=1e-12)
    assert np.allclose(model.covariances_[0], (np.eye(10) + scatter) / (12 + 6 + 10 + 2), rtol=1e-10)
    with pytest.raises(TypeError, match="the prior of this family is a Prior"):
        GaussianMixture(covariance_type="diag", prior=prior).fit(x)


def test_unfinished_fit_warns_with_the_names_of_its_own_settings() -> None:
    model = GaussianMixture(3, max_iter=2, n_init=3, random_state=0)
    with pytest.warns(ConvergenceWarning, match="not converged after 2 steps: raise max_iter, or tol") as caught:
        model.fit(IRIS)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert not model.converged_
    assert model.n_iter_ == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_components": 0}, "number of components must be at least 1, not 0"),
        ({"n_components": 151}, "151 components need at least as many rows, and x has 150"),
        ({"n_components": 2.0}, "number of components must be an integer, not 2.0"),
        ({"max_iter": 0}, "max_iter must be an integer of at least 1, not 0"),
        ({"n_init": 1.5}, "n_init must be an integer of at least 1, not 1.5"),
        ({"tol": -1.0}, "tol must be a finite number that is not negative, not -1.0"),
        ({"tol": float("inf")}, "tol must be a finite number that is not negative, not inf"),
        ({"tol": "small"}, "tol must be a finite number that is not negative, not 'small'"),
        ({"init_params": "kmeans"}, 'init_params must be "k-means\\+\\+" or "random", not \'kmeans\''),
        ({"covariance_type": "diagonal"}, "covariance_type must be one of full, tied, diag, spherical, not 'diagonal'"),
        ({"prior": 3.0}, "the prior of this family is a Prior"),
    ],
)
def test_bad_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        GaussianMixture(**settings).fit(IRIS)


def test_bad_data_are_named() -> None:
    with pytest.raises(ValueError, match=r"x\[0, 0\] is 5.1, outside the support of this family \(0 or 1\)"):
        BernoulliMixture().fit(IRIS)
    with pytest.raises(ValueError, match=r"weights\[1\] is -1.0: a weight must be finite and not negative"):
        LaplaceMixture().fit(IRIS[:3], sample_weight=[1, -1, 1])


def test_model_selection_works() -> None:
    """The held-out log likelihood finds the two groups that were put there."""
    rng = np.random.RandomState(0)
    x = np.concatenate([rng.randn(100, 2), rng.randn(100, 2) + 8])
    search = GridSearchCV(GaussianMixture(random_state=0), {"n_components": [1, 2]}, cv=3).fit(rng.permutation(x))
    assert search.best_params_ == {"n_components": 2}
