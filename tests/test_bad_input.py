"""Bad input is refused with words that say what is wrong, where, and what to do; hard good input comes out right."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference.em import Fit, em, responsibilities
from mixproof.inference.enumeration import inspect
from mixproof.inference.estimators import GaussianMixture
from mixproof.inference.evidence import log_evidence
from mixproof.inference.gibbs import gibbs
from mixproof.inference.hmc import hmc
from mixproof.inference.lloyd import kmeans, kmedians
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.nuts import nuts
from mixproof.inference.posterior_mode import posterior_mode
from mixproof.inference.restarts import em_restarts
from mixproof.inference.sampling import sample
from mixproof.inference.standard_errors import standard_errors
from mixproof.inference.svi import svi
from mixproof.inference.validation import check_data, check_params
from mixproof.models import bernoulli, gaussian_diagonal, gaussian_full, gaussian_spherical, gaussian_sum, laplace
from mixproof.models.gaussian_isotropic import GaussianIsotropic
from mixproof.models.gaussian_sum import KnownNoise
from mixproof.models.initial import partition
from tests.conftest import Case, seeded

X = torch.randn(20, 2, generator=seeded(0), dtype=torch.float64)
PARAMS = gaussian_full.init_params(X, 2, seeded(0))
BINARY = (X > 0).double()
NAN, INF = float("nan"), float("inf")


def with_entry(x: Tensor, value: float, row: int = 3, column: int = 1) -> Tensor:
    x = x.clone()
    x[row, column] = value
    return x


def few_steps(*args: Any, num_steps: int = 20, **kwargs: Any) -> Fit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return em(*args, max_steps=num_steps, **kwargs)


def says(words: str) -> str:
    return re.escape(words)


# Data

MASKED = np.ma.array(X.numpy(), mask=np.arange(40).reshape(20, 2) == 7)
BAD_DATA = {
    "NaN": (with_entry(X, NAN), ValueError, "x[3, 1] is nan: drop or impute the row (em takes missing=True"),
    "infinity": (with_entry(X, -INF, 19, 0), ValueError, "x[19, 0] is -inf: drop or impute the row"),
    "several": (X * torch.tensor([1.0, INF]).double(), ValueError, "(and 19 more entries)"),
    "a vector": (X[:, 0], ValueError, "x must have shape (N, D), not (20,): one feature is x[:, None]"),
    "an array of three axes": (X[None], ValueError, "x must have shape (N, D), not (1, 20, 2)"),
    "a number": (torch.tensor(1.0), ValueError, "x must have shape (N, D), not ()"),
    "no rows": (X[:0], ValueError, "x has shape (0, 2): it needs at least one row and one column"),
    "no columns": (X[:, :0], ValueError, "x has shape (20, 0): it needs at least one row and one column"),
    "strings": ([["a", "b"]], TypeError, "x must hold numbers, not <U1: convert or encode the columns first"),
    "objects": (np.array([[1, None]], dtype=object), TypeError, "x must hold numbers, not object: convert or encode"),
    "dates": (np.array([["2020-01-01"]], dtype="datetime64[D]"), TypeError, "x must hold numbers, not datetime64[D]"),
    "complex tensor": (X.to(torch.complex128), TypeError, "x must hold real numbers, not complex ones"),
    "complex array": (X.numpy() + 1j, TypeError, "x must hold numbers, not complex128"),
    "ragged rows": ([[1.0, 2.0], [3.0]], TypeError, "x must hold numbers in the shape of an array"),
    "masked entries": (MASKED, TypeError, "x has masked entries: drop their rows, or fill them with NaN, x.astype"),
    "other features": (
        torch.randn(9, 3, generator=seeded(1)),
        ValueError,
        "locs has shape (2, 2); the other parameters",
    ),
    "fewer rows than components": (X[:1], ValueError, "2 components need at least as many rows, and x has 1"),
}


@pytest.mark.parametrize("what", BAD_DATA)
def test_bad_data_are_refused(what: str) -> None:
    x, error, words = BAD_DATA[what]
    with pytest.raises(error, match=says(words)):
        em(gaussian_full, x, PARAMS)
    if what != "fewer rows than components":  # one row has responsibilities
        with pytest.raises(error, match=says(words)):
            responsibilities(gaussian_full, PARAMS, x)


def test_non_finite_data_are_refused_by_every_family(case: Case) -> None:
    x = case.data(0, 20)
    start = case.family.init_params(x, case.num_components(2), seeded(0))
    for value in (NAN, INF):
        bad = with_entry(x, value, 7, 1)
        with pytest.raises(ValueError, match=says(f"x[7, 1] is {value}: drop or impute the row")):
            em(case.family, bad, start)
        with pytest.raises(ValueError, match=says(f"x[7, 1] is {value}: drop or impute the row")):
            case.family.init_params(bad, case.num_components(2), seeded(0), "random")


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0])
def test_bernoulli_takes_zeros_and_ones_alone(value: float, all_families: list[Case]) -> None:
    words = says(f"x[3, 1] is {value}, outside the support of this family (0 or 1)")
    for case in all_families:
        if case.module is bernoulli:
            start = case.family.init_params(BINARY, 2, seeded(0))
            with pytest.raises(ValueError, match=words):
                em(case.family, with_entry(BINARY, value), start)
            with pytest.raises(ValueError, match=words):
                responsibilities(case.family, start, with_entry(BINARY, value))


def test_masked_arrays_are_refused_at_every_front_door_and_those_without_a_masked_entry_taken() -> None:
    unmasked = np.ma.array(X.numpy(), mask=np.zeros((20, 2), bool))
    doors: list[tuple[str, Callable[[Any], Any]]] = [
        ("x", lambda x: few_steps(gaussian_full, x, PARAMS)),
        ("x", lambda x: few_steps(gaussian_full, [x[:3], x[3:]], PARAMS, missing=True)),
        ("x", lambda x: responsibilities(gaussian_full, PARAMS, x)),
        ("x", lambda x: kmeans(x, 2, generator=seeded(0))),
        ("x", lambda x: kmedians(x, 2, generator=seeded(0))),
        ("X", lambda x: GaussianMixture(2, random_state=0).fit(x)),
        ("sample_weight", lambda x: GaussianMixture(2, random_state=0).fit(X, sample_weight=abs(x[:, 1]))),
        ("weights", lambda x: few_steps(gaussian_full, X, PARAMS, weights=abs(x[:, 1]))),
        ("weights", lambda x: few_steps(gaussian_full, [X], PARAMS, weights=abs(x[:, 1]))),
        ("locs", lambda x: check_params(gaussian_full, PARAMS._replace(locs=x[2:4]))),
    ]
    for name, door in doors:
        door(unmasked)
        with pytest.raises(TypeError, match=f"^{name} has masked entries: drop their rows"):
            door(MASKED)


@pytest.mark.parametrize("how", ["read-only", "other byte order", "reversed"])
def test_arrays_that_torch_does_not_share_are_taken_without_a_word(how: str) -> None:
    x = X.numpy().copy()
    x.flags.writeable = how != "read-only"
    given = {"read-only": x, "other byte order": x.astype(">f8"), "reversed": x[::-1].copy()[::-1]}[how]
    weights = given[:, 0] ** 2
    weights.flags.writeable = how != "read-only"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(check_data(given), X)
        for method in (kmeans, kmedians):
            found = method(given, 2, generator=seeded(0), weights=weights.astype(given.dtype))  # type: ignore[arg-type]
            assert torch.equal(found.labels, method(X, 2, generator=seeded(0), weights=X[:, 0] ** 2).labels)
        assert torch.equal(responsibilities(gaussian_full, PARAMS, given), responsibilities(gaussian_full, PARAMS, X))


def test_a_program_takes_no_numpy_array_and_says_so() -> None:
    program = partial(gaussian_full.model, num_components=2)
    for door in (
        lambda: posterior_mode(program, PARAMS, X.numpy()),
        lambda: standard_errors(LogPosterior(program, X.numpy()), PARAMS),
        lambda: hmc(program, X.numpy(), num_draws=2, seed=0),
    ):
        with pytest.raises(TypeError, match=says("x is observed to be a NumPy array: give the program tensors, torch")):
            door()


# The number of components


@pytest.mark.parametrize(
    ("k", "error", "words"),
    [
        (0, ValueError, "the number of components must be at least 1, not 0"),
        (-2, ValueError, "the number of components must be at least 1, not -2"),
        (2.5, TypeError, "the number of components must be an integer, not 2.5"),
        ("2", TypeError, "the number of components must be an integer, not '2'"),
        (True, TypeError, "the number of components must be an integer, not True"),
        (21, ValueError, "21 components need at least as many rows, and x has 20"),
    ],
)
def test_bad_number_of_components_is_refused(case: Case, k: Any, error: type, words: str) -> None:
    sizes = k if case.num_weights == 1 else (k, 2)
    x = case.data(0, 20)
    for method in ("k-means++", "random"):
        with pytest.raises(error, match=says(words)):
            case.family.init_params(x, sizes, seeded(0), method)


def test_sum_takes_a_pair_of_numbers_of_components() -> None:
    with pytest.raises(TypeError, match=says("the number of components must be a pair (K_x, K_y), not 3")):
        gaussian_sum.init_params(X, 3, seeded(0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the number of components must be at least 1, not 0"):
        gaussian_sum.init_params(X, (2, 0), seeded(0))


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (X.numpy(), TypeError, "x must be a floating tensor: torch.as_tensor(x, dtype=torch.float64)"),
        ((10 * X).long(), TypeError, "x must be a floating tensor"),
        (X[:, 0], ValueError, "x must have shape (N, D) with at least one row and one column, not (20,)"),
        (X[:, :0], ValueError, "x must have shape (N, D) with at least one row and one column, not (20, 0)"),
    ],
    ids=["numpy", "integers", "vector", "no columns"],
)
def test_start_refuses_what_is_no_floating_matrix(x: Any, error: type, words: str) -> None:
    for family in (gaussian_full, laplace, bernoulli):
        with pytest.raises(error, match=says(words)):
            family.init_params(x, 2, seeded(0))


# Parameters

GOOD = {"weights": [0.5, 0.5], "locs": [[0.0, 0], [1, 1]], "covariances": [[[1.0, 0], [0, 1]], [[2, 0.5], [0.5, 1]]]}
BAD_PARAMS: dict[str, tuple[Any, type, str]] = {
    "weights above 1": (
        {**GOOD, "weights": [0.9, 0.6]},
        ValueError,
        "weights must be a probability vector: entries >= 0",
    ),
    "negative weight": ({**GOOD, "weights": [1.5, -0.5]}, ValueError, "weights must be a probability vector"),
    "weights for others": (
        {**GOOD, "weights": [0.2, 0.3, 0.5]},
        ValueError,
        "locs has shape (2, 2); the other parameters",
    ),
    "one number for weights": ({**GOOD, "weights": 1.0}, ValueError, "weights must have at least 1 axis"),
    "no weights": ({**GOOD, "weights": []}, ValueError, "weights has shape (0,): it needs at least one entry"),
    "locations of one axis": ({**GOOD, "locs": [1.0, 2.0]}, ValueError, "locs has shape (2,); the other parameters"),
    "NaN": ({**GOOD, "locs": [[0.0, 1], [NAN, 1]]}, ValueError, "locs[1, 0] is nan: every parameter must be finite"),
    "infinity": (
        {**GOOD, "locs": [[0.0, INF], [1, 1]]},
        ValueError,
        "locs[0, 1] is inf: every parameter must be finite",
    ),
    "not positive definite": (
        {**GOOD, "covariances": [[[1.0, 0], [0, 1]], [[1, 2], [2, 1]]]},
        ValueError,
        "covariances[1] must be a symmetric positive definite matrix, and is [[1.0, 2.0], [2.0, 1.0]]",
    ),
    "not symmetric": (
        {**GOOD, "covariances": [[[1.0, 0.5], [0, 1]], [[2, 0.5], [0.5, 1]]]},
        ValueError,
        "covariances[0] must be a symmetric positive definite matrix",
    ),
    "singular": (
        {**GOOD, "covariances": [[[1.0, 1], [1, 1]], [[2, 0.5], [0.5, 1]]]},
        ValueError,
        "covariances[0] must be a symmetric positive definite matrix",
    ),
    "strings": (
        {**GOOD, "locs": [["a", "b"], ["c", "d"]]},
        TypeError,
        "locs must hold numbers in the shape of an array",
    ),
    "ragged": ({**GOOD, "locs": [[1.0, 2], [3]]}, TypeError, "locs must hold numbers in the shape of an array"),
    "complex": ({**GOOD, "locs": np.ones((2, 2)) * 1j}, TypeError, "locs must hold real numbers, not complex ones"),
    "missing field": (
        {name: GOOD[name] for name in ("weights", "locs")},
        TypeError,
        "the parameters of this family are weights, locs, covariances; missing or unknown: covariances",
    ),
    "unknown field": ({**GOOD, "means": [1]}, TypeError, "missing or unknown: means"),
    "too few values": (list(GOOD.values())[:2], TypeError, "weights, locs, covariances, and there are 2 values"),
    "too many values": ([*GOOD.values(), 1.0], TypeError, "weights, locs, covariances, and there are 4 values"),
    "nothing": (None, TypeError, "the parameters of this family are weights, locs, covariances, not a NoneType"),
}


@pytest.mark.parametrize("what", BAD_PARAMS)
def test_bad_parameters_are_refused_at_every_front_door(what: str) -> None:
    params, error, words = BAD_PARAMS[what]
    doors = [
        lambda: check_params(gaussian_full, params),
        lambda: em(gaussian_full, X, params),
        lambda: responsibilities(gaussian_full, params, X),
        lambda: sample(gaussian_full, params, 5, generator=seeded(0)),
    ]
    for door in doors:
        with pytest.raises(error, match=says(words)):
            door()


@pytest.mark.parametrize(
    ("family", "params", "words"),
    [
        (gaussian_diagonal, ([0.5, 0.5], [[0.0, 0], [1, 1]], [[1.0, 1], [1, -1]]), "variances[1] must be positive"),
        (gaussian_diagonal, ([0.5, 0.5], [[0.0, 0], [1, 1]], [[0.0, 1], [1, 1]]), "variances[0] must be positive"),
        (
            gaussian_spherical,
            ([0.5, 0.5], [[0.0, 0], [1, 1]], [1.0, -3.0]),
            "variances[1] must be positive, and is -3.0",
        ),
        (laplace, ([0.5, 0.5], [[0.0, 0], [1, 1]], [[1.0, 1], [1, -1]]), "scales[1] must be positive"),
        (bernoulli, ([0.5, 0.5], [[0.0, 1.5], [1, 1]]), "probs[0] must be between 0 and 1, and is [0.0, 1.5]"),
        (
            bernoulli.UniformWeights(),
            ([0.3, 0.7], [[0.0, 0.5], [1, 1]]),
            "weights is known in this family, [0.5, 0.5], and not [0.3, 0.7]",
        ),
    ],
)
def test_parameters_outside_their_support_are_refused(family: Any, params: Any, words: str) -> None:
    with pytest.raises(ValueError, match=says(words)):
        check_params(family, params)


def test_weights_are_normalised_to_the_last_bit() -> None:
    """Single-precision weights leave the simplex by 1e-8 in double: no such error is carried into a log likelihood."""
    weights = torch.tensor([0.6, 0.3, 0.1]).double()
    assert weights.sum() != 1
    checked = check_params(bernoulli, (weights, torch.full((3, 2), 0.5)))
    assert abs(checked.weights.sum().item() - 1) <= 2e-16


@pytest.mark.parametrize("variance", [0.0, -1.0, NAN, INF])
def test_known_variance_must_be_positive(variance: float) -> None:
    with pytest.raises(ValueError, match="the known variance must be positive and finite, not"):
        GaussianIsotropic(variance)


def test_known_noise_must_be_a_mixture() -> None:
    good = check_params(gaussian_full, GOOD)
    with pytest.raises(ValueError, match="the weights of the noise must be a probability vector"):
        gaussian_sum.KnownNoise(good._replace(weights=good.weights * 2))
    with pytest.raises(ValueError, match="the noise needs finite locs and symmetric positive definite covariances"):
        gaussian_sum.KnownNoise(good._replace(covariances=-good.covariances))
    with pytest.raises(ValueError, match=says("has shapes (2,), (1, 2), (2, 2, 2)")):
        gaussian_sum.KnownNoise(good._replace(locs=good.locs[:1]))


@pytest.mark.parametrize("num_features", [1, 3])
def test_known_noise_has_the_features_of_the_data(num_features: int) -> None:
    """A single feature would be spread over the two of the noise, without a word from torch."""
    family = gaussian_sum.KnownNoise(check_params(gaussian_full, GOOD))
    x = torch.randn(20, num_features, generator=seeded(0), dtype=torch.float64)
    start = gaussian_full.init_params(x, 2, seeded(0))
    words = says(f"the noise has 2 features, not {num_features}")
    with pytest.raises(ValueError, match=words):
        em(family, x, start)
    with pytest.raises(ValueError, match=words):
        responsibilities(family, start, x)
    with pytest.raises(ValueError, match=words):
        family.init_params(x, 2, seeded(0))
    with pytest.raises(ValueError, match=words):
        sample(family, start, 5, generator=seeded(0))
    with pytest.raises(ValueError, match=words):
        posterior_mode(partial(family.model, num_components=2), start, x)


# Silent wrong numbers behind the front door


def test_family_sample_trusts_its_caller_and_the_front_door_does_not() -> None:
    """torch.multinomial would renormalise weights, and Cholesky would read one triangle: neither may pass unseen."""
    for bad in (
        PARAMS._replace(weights=3 * PARAMS.weights),
        PARAMS._replace(covariances=PARAMS.covariances + torch.tensor([[0.0, 0.5], [0.0, 0.0]])),
    ):
        x, _ = gaussian_full.sample(bad, 5, seeded(0))
        assert torch.isfinite(x).all()
        with pytest.raises(ValueError, match="must be a"):
            sample(gaussian_full, bad, 5, generator=seeded(0))


def test_front_door_draws_what_the_family_draws(case: Case) -> None:
    params = case.params(3)
    x, z = sample(case.family, params, 7, generator=seeded(1))
    expected_x, expected_z = case.family.sample(params, 7, seeded(1))
    assert torch.allclose(x, expected_x, rtol=1e-14)
    assert torch.equal(z, expected_z)
    for n, error, words in (
        (0, ValueError, "the number of samples must be at least 1, not 0"),
        (2.0, TypeError, "the number of samples must be an integer, not 2.0"),
        (True, TypeError, "the number of samples must be an integer, not True"),
    ):
        with pytest.raises(error, match=says(words)):
            sample(case.family, params, n, generator=seeded(1))  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=says("generator must be a torch.Generator, as torch.Generator().manual_seed(0)")
    ):
        sample(case.family, params, 7, generator=0)  # type: ignore[arg-type]


# Row weights, priors and settings of EM


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (-np.ones(20), "weights[0] is -1.0: a weight must be finite and not negative"),
        (np.ones(3), "weights must have shape (20,), one for each row, not (3,)"),
        (1.0, "weights must have shape (20,), one for each row, and is the number 1.0"),
        ([1.0] * 19 + [NAN], "weights[19] is nan: a weight must be finite and not negative"),
        (np.zeros(20), "all weights are 0: at least one row must count"),
    ],
)
def test_bad_row_weights_are_refused(weights: Any, words: str) -> None:
    with pytest.raises(ValueError, match=says(words)):
        em(gaussian_full, X, PARAMS, weights=weights)


@pytest.mark.parametrize("weights", [["abc"] * 20, [["a"]] * 20, object()])
def test_row_weights_must_be_numbers(weights: Any) -> None:
    with pytest.raises(TypeError, match="weights must hold numbers in the shape of an array"):
        em(gaussian_full, X, PARAMS, weights=weights)


def test_weights_by_name_need_columns_with_names() -> None:
    with pytest.raises(TypeError, match="weights names a column, 'count', and x has no named columns"):
        em(gaussian_full, X, PARAMS, weights="count")


def test_arrays_may_be_read_backwards() -> None:
    """torch takes no array of negative strides, and a view of one is no bad input."""
    rows, weights = X.numpy(), np.linspace(1, 2, 20)
    forwards = few_steps(gaussian_full, rows[::-1].copy(), PARAMS, weights=weights[::-1].copy())
    start = [value.numpy()[::-1].copy()[::-1] for value in PARAMS]
    backwards = few_steps(gaussian_full, rows[::-1], start, weights=weights[::-1])
    assert all(map(torch.equal, backwards.params, forwards.params))
    column, row = rows[:, ::-1][:, :1], rows[:1][::-1]  # numpy calls these contiguous
    for view in (column, row):
        assert np.array_equal(check_data(view).numpy(), view)


@pytest.mark.parametrize("num_data", [20, 20_000])
def test_tensors_that_require_a_gradient_are_data_like_others(num_data: int) -> None:
    """A fit has no gradient, whichever of the ways through the rows it takes."""
    x = torch.randn(num_data, 2, generator=seeded(0), dtype=torch.float64)
    prior = gaussian_full.weakly_informative_prior(x, 2)
    expected = few_steps(gaussian_full, x, PARAMS, prior=prior, num_steps=2)
    x, *tensors = (value.clone().requires_grad_() for value in (x, *PARAMS, *prior))
    params, prior = gaussian_full.Params(*tensors[:3]), gaussian_full.Prior(*tensors[3:])
    found = few_steps(gaussian_full, x, params, prior=prior, num_steps=2)
    assert all(map(torch.equal, found.params, expected.params))
    assert not any(value.requires_grad for value in found.params)
    settings: dict[str, Any] = {"num_components": 2, "num_chains": 2, "num_draws": 2, "num_warmup": 0}
    draws = gibbs(gaussian_full, x, prior, generator=seeded(1), **settings)
    assert not any(value.requires_grad for value in draws.params.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused_in_words(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=says("convert it to float32 or float64")):
        em(gaussian_full, X.to(dtype), PARAMS)


class Plain:
    """``gaussian_diagonal`` with functions that give tuples without names."""

    Params, Stats, Prior = gaussian_diagonal.Params, gaussian_diagonal.Stats, gaussian_diagonal.Prior
    additive = True
    model, log_joint = staticmethod(gaussian_diagonal.model), staticmethod(gaussian_diagonal.log_joint)

    @staticmethod
    def statistics(params: Any, x: Tensor, resp: Tensor) -> Any:
        return tuple(gaussian_diagonal.statistics(params, x, resp))

    @staticmethod
    def m_step(stats: Any, prior: Any = None) -> Any:
        return tuple(gaussian_diagonal.m_step(gaussian_diagonal.Stats(*stats), prior))


def test_a_family_may_return_plain_tuples() -> None:
    rows = [X[:7], X[7:]]
    start = gaussian_diagonal.init_params(X, 2, seeded(0))
    for data in (X, rows):
        expected = few_steps(gaussian_diagonal, data, start)
        found = few_steps(Plain(), data, start)
        for value, other in zip(found.params, expected.params, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-12)
    starts = [gaussian_diagonal.init_params(X, 2, seeded(seed)) for seed in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        best, other = (em_restarts(each, X, starts, max_steps=20).best for each in (Plain(), gaussian_diagonal))
    torch.testing.assert_close(best.log_lik[-1], other.log_lik[-1], rtol=1e-9, atol=0)


def test_looking_at_a_program_leaves_the_random_generators_alone() -> None:
    x = torch.randn(6, generator=seeded(0), dtype=torch.float64)
    calls: list[Callable[[], Any]] = [
        partial(inspect, marked, LOC, x),
        partial(posterior_mode, marked, LOC, x),
        *(partial(svi, marked, name, x, num_steps=5, seed=0) for name in ("AutoNormal", "AutoMultivariateNormal")),
        partial(svi, marked, AutoNormal(pyro.poutine.block(marked, hide=["z"])), x, num_steps=2, seed=0),
    ]
    for call in calls:
        before = torch.get_rng_state()
        call()
        assert torch.equal(torch.get_rng_state(), before)


def test_a_start_in_single_precision_reaches_the_mode() -> None:
    """Lists of numbers among them, which torch reads in single precision."""
    x = torch.randn(6, generator=seeded(0), dtype=torch.float64)
    found = posterior_mode(marked, {"loc": [0.25, -0.5]}, x)
    expected = posterior_mode(marked, {"loc": torch.tensor([0.25, -0.5], dtype=torch.float64)}, x)
    assert torch.equal(found.params["loc"], expected.params["loc"])


@pytest.mark.parametrize("missing", [False, True])
def test_noise_known_in_double_precision_has_rows_in_single(missing: bool) -> None:
    noise = gaussian_full.Params(*(torch.tensor(v).double() for v in ([1.0], [[0.5, 0.0]], [[[0.2, 0.0], [0.0, 0.1]]])))
    family, rows = KnownNoise(noise), X.clone()
    rows[3, 1] = NAN if missing else 0.0
    start = family.init_params(X, 2, seeded(0))
    settings: dict[str, Any] = {"num_components": 2, "num_chains": 2, "num_draws": 2, "num_warmup": 0}
    found, expected = (
        few_steps(family, rows.to(dtype), [value.to(dtype) for value in start], missing=missing, num_steps=3)
        for dtype in (torch.float32, torch.float64)
    )
    for value, other in zip(found.params, expected.params, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), other, rtol=1e-3, atol=1e-3)
    prior = family.weakly_informative_prior(X.float(), 2)
    draws = gibbs(family, X.float(), prior, generator=seeded(1), **settings)
    assert {value.dtype for value in draws.params.values()} == {torch.float32}


def test_posterior_mode_needs_a_value_for_every_site() -> None:
    program = partial(gaussian_full.model, num_components=2)
    with pytest.raises(TypeError, match="init must be a dict or a NamedTuple of values by site, not a list"):
        posterior_mode(program, [*PARAMS], X)
    start = PARAMS._asdict()
    for site in start:
        rest = {name: value for name, value in start.items() if name != site}
        words = f"a parameter site has no value among those of init: {', '.join(rest)}"
        with pytest.raises(ValueError, match=says(words)):
            posterior_mode(program, rest, X)


PRIOR: Any = gaussian_full.Prior(
    *[torch.tensor(value).double() for value in ([2.0, 2], [0.0, 0], 1.0, 5.0, [[1.0, 0], [0, 1]])]
)


@pytest.mark.parametrize(
    ("prior", "error", "words"),
    [
        (PRIOR._replace(df=0.5), ValueError, "the degrees of freedom must exceed D - 1 = 1, and are 0.5"),
        (PRIOR._replace(scale=-PRIOR.scale), ValueError, "the prior does not define a distribution of the parameters"),
        (PRIOR._replace(strength=-1.0), ValueError, "the prior does not define a distribution of the parameters"),
        (PRIOR._replace(concentration=[1.0, 0]), ValueError, "the prior does not define a distribution"),
        (
            PRIOR._replace(concentration=[1.0, 1, 1]),
            ValueError,
            "the prior is one of weights of shape (3,), and the par",
        ),
        (PRIOR._replace(concentration=1.0), ValueError, "the prior does not define a distribution"),
        (PRIOR._replace(loc=[NAN, 0]), ValueError, "loc of the prior must be finite"),
        (PRIOR._replace(loc=["a", "b"]), TypeError, "loc of the prior must hold numbers in the shape of an array"),
        (
            PRIOR._asdict(),
            TypeError,
            "the prior of this family is a Prior(concentration, loc, strength, df, scale), not a",
        ),
        (tuple(PRIOR), TypeError, "the prior of this family is a Prior(concentration, loc, strength, df, scale)"),
    ],
)
def test_bad_priors_are_refused(prior: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=says(words)):
        em(gaussian_full, X, PARAMS, prior=prior)


def test_prior_may_hold_numbers_and_lists() -> None:
    loose = gaussian_full.Prior([2, 2], [0, 0], 1, 5, [[1, 0], [0, 1]])  # type: ignore[arg-type]
    expected = few_steps(gaussian_full, X, PARAMS, prior=PRIOR)
    assert all(map(torch.equal, few_steps(gaussian_full, X, PARAMS, prior=loose).params, expected.params))


def test_bad_settings_of_em_are_refused() -> None:
    with pytest.raises(ValueError, match="max_steps must be at least 1, not 0"):
        em(gaussian_full, X, PARAMS, max_steps=0)
    for rtol in (-1e-3, NAN, INF):
        with pytest.raises(ValueError, match="rtol must be finite and not negative, and is"):
            em(gaussian_full, X, PARAMS, rtol=rtol)


# Components that lose their rows or collapse


def test_component_without_rows_is_named() -> None:
    far = PARAMS._replace(locs=torch.stack([PARAMS.locs[0], PARAMS.locs[0] + 1e4]))
    with pytest.raises(
        ValueError, match=says("component 1 lost its last row at step 1: weights[1] is 0. Start elsewhere")
    ):
        em(gaussian_full, X, far)


def test_component_without_rows_is_named_where_weights_are_known() -> None:
    family = bernoulli.UniformWeights()
    start = family.Params(torch.full((2,), 0.5).double(), torch.tensor([[1.0, 1.0, 1.0], [0.4, 0.5, 0.6]]).double())
    x = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]]).double()
    with pytest.raises(ValueError, match=says("probs[0] is not finite at step 1: component 0 has collapsed")):
        em(family, x, start)


@pytest.mark.parametrize("family", [gaussian_full, gaussian_diagonal, gaussian_spherical, laplace])
def test_component_on_a_single_row_collapses_by_name(family: Any) -> None:
    """The likelihood is unbounded there: EM must say which component runs away and when, not report a number."""
    x = torch.cat([X, torch.full((1, 2), 50.0).double()])
    start = family.init_params(X, 2, seeded(0))
    start = start._replace(locs=torch.stack([start.locs[0], x[-1]]))
    with pytest.raises(ValueError, match=r"component 1 has collapsed at step \d+.*Give a prior, use fewer components"):
        em(family, x, start)


@pytest.mark.parametrize("family", [gaussian_full, gaussian_diagonal, gaussian_spherical, laplace])
def test_prior_keeps_a_component_on_a_single_row(family: Any, all_families: list[Case]) -> None:
    case = next(case for case in all_families if case.family is family)
    x = torch.cat([X, torch.full((1, 2), 50.0).double()])
    start = family.init_params(X, 2, seeded(0))
    start = start._replace(locs=torch.stack([start.locs[0], x[-1]]))
    fit = em(family, x, start, prior=case.prior(0, 2), max_steps=2000)
    assert fit.converged
    assert torch.isfinite(fit.log_lik).all()


def test_near_collapse_is_reported_as_collapse_and_not_as_a_wrong_m_step() -> None:
    """Rows that agree in one column: a variance falls towards 0 without reaching it, and rounding takes over."""
    flat = torch.cat([torch.full((6, 1), 3.1).double(), torch.randn(6, 1, generator=seeded(5)).double()], 1)
    x = torch.cat([X, flat])
    start = gaussian_full.Params(
        torch.tensor([0.75, 0.25]).double(),
        torch.stack([X.mean(0), flat.mean(0)]),
        torch.stack([torch.cov(X.mT), torch.diag(torch.tensor([1e-3, 1.0]).double())]),
    )
    with pytest.raises(ValueError, match=r"component 1 has collapsed at step \d+: its spread is"):
        em(gaussian_full, x, start)


def test_impossible_row_is_named() -> None:
    start = bernoulli.Params(torch.tensor([0.5, 0.5]).double(), torch.tensor([[1.0, 0.5], [1.0, 0.2]]).double())
    x = torch.tensor([[1.0, 0], [1, 1], [0, 1]]).double()
    words = "row 2 is impossible under every component {}: its density underflows to 0; {}"
    with pytest.raises(ValueError, match=says(words.format("at the start", "start from"))):
        em(bernoulli, x, start)
    with pytest.raises(ValueError, match=says(words.format("in these parameters", "drop it, or take others"))):
        responsibilities(bernoulli, start, x)


def test_constant_column_and_single_row_are_named() -> None:
    x = torch.cat([X, torch.ones(20, 1).double()], 1)
    with pytest.raises(
        ValueError, match=says("EM cannot start: covariances[0] must be") + ".*" + says("constant in column 2: drop it")
    ):
        em(gaussian_full, x, gaussian_full.init_params(x, 2, seeded(0)))
    with pytest.raises(
        ValueError, match="x has a single row, which has no spread: give a start of your own and a prior"
    ):
        em(gaussian_full, X[:1], gaussian_full.init_params(X[:1], 1, seeded(0)))


def test_nearly_singular_covariance_comes_out_right() -> None:
    """Correlation 1 - 1e-12: a density by the closed form in two dimensions, whose factors do not cancel."""
    gap = 1e-12
    rho = 1 - gap
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)
    x = torch.tensor([[0.3, 0.3], [1.0, 1.0 + 1e-6], [-2.0, -2.0]], dtype=torch.float64)
    params = gaussian_full.Params(torch.ones(1).double(), torch.zeros(1, 2).double(), covariance[None])
    found = gaussian_full.log_joint(params, x)[:, 0]
    exact_gap = 1 - covariance[0, 1].item()
    total, difference = x.sum(1), x[:, 1] - x[:, 0]
    variance_of_sum, variance_of_difference = 4 - 2 * exact_gap, 2 * exact_gap
    quadratic = total**2 / variance_of_sum + difference**2 / variance_of_difference
    expected = -np.log(2 * np.pi) - 0.5 * np.log(variance_of_sum * variance_of_difference / 4) - quadratic / 2
    # The condition number is 2 / gap: so many roundings of 1 are lost.
    tolerance = 2 / gap * 4 * torch.finfo(torch.float64).eps * (1 + quadratic)
    assert ((found - expected).abs() <= tolerance).all()


# A Pyro program that cannot be enumerated


def unmarked(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5)).long()
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def marked(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"}).long()
        pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)


def without_latent(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(loc[0], 1.0), obs=x)


def with_a_continuous_latent(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5), infer={"enumerate": "parallel"}).long()
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc[z] + noise, 1.0), obs=x)


def without_finite_support(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(x)):
        count = pyro.sample("count", dist.Poisson(2.0))
        pyro.sample("x", dist.Normal(loc[0] + count, 1.0), obs=x)


def with_weights(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=x)


LOC = {"loc": torch.zeros(2)}
BAD_PROGRAMS: list[tuple[Any, dict[str, Tensor], str]] = [
    (unmarked, LOC, 'site "z"'),
    (without_latent, LOC, "the program has no enumerated site: there is no discrete latent to sum out"),
    (with_a_continuous_latent, LOC, "site \"noise\" is continuous, unobserved and not among the parameters ['loc']"),
    (without_finite_support, LOC, 'site "count"'),
    (marked, {**LOC, "scale": torch.ones(1)}, "the program has no site scale; its parameter sites are loc"),
    (marked, {"loc": torch.zeros(3)}, "loc has shape (3,), and that of the program has (2,)"),
    (marked, {"loc": torch.tensor([0.0, torch.nan])}, "loc lies outside of its support, Real()"),
    (with_weights, {"weights": torch.tensor([1.0, 3.0])}, "weights lies outside of its support, Simplex()"),
]


@pytest.mark.parametrize(("program", "params", "words"), BAD_PROGRAMS)
def test_programs_that_cannot_be_enumerated_are_refused(program: Any, params: Any, words: str) -> None:
    x = torch.randn(6, generator=seeded(0))
    for door in (partial(inspect, program, params, x), partial(posterior_mode, program, params, x)):
        with pytest.raises(ValueError, match=says(words)):
            door()


BAD_OBSERVATIONS = [
    (torch.tensor([0.5, torch.nan, 1.0]), "x[1] is observed to be nan: drop or impute the row"),
    (torch.tensor([0.5, 1.0, -torch.inf]), "x[2] is observed to be -inf: drop or impute the row"),
    (torch.zeros(0), "a plate of the program is empty: the data need at least one row"),
]


@pytest.mark.parametrize(("x", "words"), BAD_OBSERVATIONS)
def test_rows_without_a_density_are_refused_for_any_program(x: Tensor, words: str) -> None:
    doors: list[Callable[[], Any]] = [
        partial(inspect, marked, LOC, x),
        partial(posterior_mode, marked, LOC, x),
        partial(hmc, marked, x, num_chains=4, num_draws=5, num_warmup=20, seed=0),
        partial(nuts, marked, x, num_chains=1, num_draws=5, num_warmup=5, seed=0),
        partial(svi, marked, "AutoNormal", x, num_steps=5, seed=0),
        partial(svi, marked, AutoNormal(pyro.poutine.block(marked, hide=["z"])), x, num_steps=5, seed=0),
        partial(log_evidence, marked, x, seed=0),
    ]
    for door in doors:
        with pytest.raises(ValueError, match=says(words)):
            door()


def test_unmarked_site_is_told_how_to_be_marked() -> None:
    with pytest.raises(ValueError, match=says('infer={"enumerate": "parallel"}')):
        inspect(unmarked, LOC, torch.zeros(3))


# Hard but good input


def test_bernoulli_with_ten_thousand_columns() -> None:
    """p(x | k) underflows a thousand times over: responsibilities and steps against numpy in log space."""
    size, num_data = 10_000, 30
    probs = torch.rand(3, size, generator=seeded(1), dtype=torch.float64)
    params = bernoulli.Params(torch.tensor([0.2, 0.5, 0.3]).double(), probs)
    x, z = bernoulli.sample(params, num_data, seeded(2))
    table = np.log(params.weights.numpy()) + np.array(
        [[np.where(row == 1, np.log(p), np.log1p(-p)).sum() for p in probs.numpy()] for row in x.numpy()]
    )
    found = bernoulli.log_joint(params, x)
    assert found.max() < -4000
    assert np.abs(found.numpy() - table).max() <= 64 * np.finfo(float).eps * np.abs(table).max()
    assert torch.equal(responsibilities(bernoulli, params, x).argmax(1), z)
    fit = em(bernoulli, x, bernoulli.init_params(x, 3, seeded(3)))
    assert torch.isfinite(fit.log_lik).all()
    labels = responsibilities(bernoulli, fit.params, x)
    means = (labels.mT @ x) / labels.sum(0)[:, None]
    assert torch.allclose(fit.params.probs, means, atol=1e-12)


@pytest.mark.parametrize(
    "family",
    [bernoulli, gaussian_diagonal, gaussian_spherical, GaussianIsotropic(0.25), laplace],
    ids=lambda family: getattr(family, "__name__", "gaussian_isotropic").removeprefix("mixproof.models."),
)
def test_no_matrix_of_features_by_features_where_none_is_fitted(family: Any) -> None:
    """One of 200,000 x 200,000 numbers would take 320 GB."""
    x = torch.rand(21, 200_000, generator=seeded(4), dtype=torch.float64)
    x = x.round() if family is bernoulli else x
    fit = em(family, x, family.init_params(x, 1, seeded(5)))
    assert torch.isfinite(fit.log_lik).all()
    centers = fit.params.probs if family is bernoulli else fit.params.locs
    assert torch.allclose(centers[0], x.median(0).values if family is laplace else x.mean(0), atol=1e-12)


def test_offset_of_a_million_changes_no_density(real_case: Case) -> None:
    """Rows and locations on a grid move by 1e6 without rounding, and so the density may not change at all."""
    params = real_case.params(4)
    name = real_case.location
    params = params._replace(**{name: (getattr(params, name) * 1024).round() / 1024})
    if real_case.num_weights == 2:
        params = params._replace(y_locs=(params.y_locs * 1024).round() / 1024)
    x = (real_case.data(5, 30) * 1024).round() / 1024
    near = real_case.family.log_joint(params, x)
    far = real_case.family.log_joint(params._replace(**{name: getattr(params, name) + 1e6}), x + 1e6)
    rounding = 0.0 if real_case.name != "KnownNoise" else 64 * 2e-16 * 1e6  # its own locations lie on no grid
    assert (far - near).abs().max() <= rounding * (1 + near.abs().max()) + 16 * 2.3e-16 * near.abs().max()


def test_offset_of_a_million_changes_no_start(real_case: Case) -> None:
    x = (real_case.data(6, 60) * 1024).round() / 1024
    near = real_case.family.init_params(x, real_case.num_components(), seeded(0), "random")
    far = real_case.family.init_params(x + 1e6, real_case.num_components(), seeded(0), "random")
    for name, value in far._asdict().items():
        moved = value - 1e6 if name == real_case.location else value
        assert torch.allclose(moved, getattr(near, name), rtol=1e-8, atol=1e-8), name


@pytest.mark.parametrize("scale", [1.0, 2.0**-1000, 2.0**990])
@pytest.mark.parametrize("method", ["k-means++", "random"])
def test_offset_and_scale_change_no_partition(method: str, scale: float) -> None:
    """On a grid on which both are exact, every row keeps its part; its distances squared may overflow or vanish."""
    x = (torch.randn(60, 3, generator=seeded(0), dtype=torch.float64) * 1024).round() / 1024
    assert torch.equal(x + 1e9 - 1e9, x)
    for seed in range(5):
        near = partition(x, 4, seeded(seed), method)
        assert torch.equal(partition((x + 1e9) * scale, 4, seeded(seed), method), near)
