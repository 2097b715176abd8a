"""The chunked pass against ``log_joint`` and ``statistics`` of the whole table, and its guard against cancellation."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from mixproof.inference import expectation as passes
from mixproof.inference.expectation import Expectation, Moments, expectation
from mixproof.models import bernoulli, gaussian_diagonal, gaussian_full, gaussian_spherical, gaussian_tied, laplace
from mixproof.models.gaussian_isotropic import GaussianIsotropic
from tests.conftest import Case, seeded

EPS = torch.finfo(torch.float64).eps
GAUSSIANS = [gaussian_full, gaussian_diagonal, gaussian_spherical, gaussian_tied]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def in_type(params: Any, dtype: torch.dtype) -> Any:
    return type(params)(*(value.to(dtype) for value in params))


def plain(family: Any, params: Any, x: Tensor, row_weights: Tensor | None = None) -> Expectation:
    """Return what the pass must, from the whole table of ``log_joint``."""
    table = family.log_joint(params, x)
    weights = torch.ones_like(x[:, 0]) if row_weights is None else row_weights
    resp = table.softmax(-1) * weights[:, None]
    return Expectation((weights * table.logsumexp(-1)).sum(), family.statistics(params, x, resp))


def by_moments(family: Any, params: Any, x: Tensor) -> Expectation:
    """Return the pass over features without its guard."""
    return passes._pass(Moments(family, params, family.moments(params)[0]), x, None, None)


def growth(family: Any, params: Any, x: Tensor) -> float:
    """Return how many roundings an entry of the table may be off by: sqrt(P) times the sum of sizes of P products."""
    if hasattr(family, "reduction"):
        inner, inner_params, _ = family.reduction(params)
        return growth(inner, inner_params, x)
    if family is gaussian_tied:
        covariances = params.covariance.expand(len(params.weights), -1, -1)
        return growth(gaussian_full, gaussian_full.Params(params.weights, params.locs, covariances), x)
    if not hasattr(family, "features"):  # products of one sign
        return math.sqrt(x.shape[1] + 1) * family.log_joint(params, x).abs().max().item()
    center = family.moments(params)[0]
    features = family.features(x, center)
    return math.sqrt(len(features)) * (family.natural(params, center).abs() @ features.abs()).max().item()


def assert_close(found: Expectation, expected: Expectation, x: Tensor, roundings: float, eps: float = EPS) -> None:
    """Check a pass whose table is off by ``roundings``: as much in each row's log density, twice in each resp.

    A statistic is a sum over rows of resp times at most the square of what lies between the row and a location.
    """
    row = 2 * eps * (roundings + len(x))  # the second term for sums of N terms
    assert abs(found.log_lik - expected.log_lik) <= row * len(x)
    size = max(1.0, 2 * x.abs().max().item()) ** 2 * len(x) * x.shape[1]
    actual, wanted = tree_flatten(found.stats)[0], tree_flatten(expected.stats)[0]
    assert len(actual) == len(wanted)
    for a, b in zip(actual, wanted, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 2 * row * size


@pytest.mark.parametrize("chunk", [None, 1, 7, 40, 41, 1000])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("num_data", [1, 41])
def test_every_family_sums_what_its_table_says(case: Case, num_data: int, k: int, chunk: int | None) -> None:
    params = case.params(3, k)
    x = case.data(4, num_data, params)
    weights = torch.rand(num_data, generator=seeded(5), dtype=torch.float64)
    weights[1::3] = 0
    roundings = growth(case.family, params, x)
    for row_weights in (None, weights):
        found = expectation(case.family, params, x, row_weights, chunk=chunk)
        expected = plain(case.family, params, x, row_weights)
        assert type(found.stats) is type(expected.stats)
        assert_close(found, expected, x, roundings)


@pytest.mark.parametrize("num_features", [1, 3, 8, 66])
@pytest.mark.parametrize("family", GAUSSIANS, ids=lambda family: family.__name__)
def test_gaussians_in_any_dimension(family: Any, num_features: int, all_families: list[Case]) -> None:
    """Features and factors come in bands; 66 is no multiple of four and more than 64."""
    case = next(case for case in all_families if case.family is family)
    params = case.params(1, 3, num_features)
    x = case.data(2, 150, params)
    expected, roundings = plain(family, params, x), growth(family, params, x)
    assert_close(expectation(family, params, x, chunk=64), expected, x, roundings)
    if hasattr(family, "prepare"):
        precise = passes._pass(family.prepare(params, family.moments(params)[0]), x, None, 64)
        assert_close(precise, expected, x, roundings)
    if hasattr(family, "features"):
        assert_close(by_moments(family, params, x), expected, x, roundings)


def test_chunks_that_fill_the_cache(case: Case) -> None:
    """Large enough that a table in one piece would be slower, as the pass decides by itself."""
    params = case.params(3, 5)
    x = case.data(4, 8000, params)
    assert len(x) * x.shape[1] * len(params[0]) > passes.SMALL
    assert_close(expectation(case.family, params, x), plain(case.family, params, x), x, growth(case.family, params, x))


@pytest.mark.parametrize("num_threads", [2, 3])
def test_lanes_for_several_threads(case: Case, num_threads: int) -> None:
    """121 rows in chunks of 30 leave one row over, which no two lanes share."""
    params = case.params(3)
    x = case.data(4, 121, params)
    weights = torch.rand(121, generator=seeded(5), dtype=torch.float64)
    expected, roundings = plain(case.family, params, x, weights), growth(case.family, params, x)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert_close(expectation(case.family, params, x, weights, chunk=30), expected, x, roundings)
        if hasattr(case.family, "prepare"):
            center = case.family.moments(params)[0]
            found = passes._pass(case.family.prepare(params, center), x, weights, 30)
            assert_close(found, expected, x, roundings)
    finally:
        torch.set_num_threads(before)


def test_float32_sums_in_float64(case: Case) -> None:
    params = in_type(case.params(3), torch.float32)
    x = case.data(4, 300, case.params(3)).float()
    found = expectation(case.family, params, x, chunk=64)
    assert found.log_lik.dtype == torch.float64
    assert case.family is laplace or {value.dtype for value in tree_flatten(found.stats)[0]} == {torch.float64}
    exact = in_type(params, torch.float64), x.double()
    roundings = growth(case.family, *exact)
    assert_close(found, plain(case.family, *exact), x, roundings, torch.finfo(torch.float32).eps)


def test_a_row_of_weight_zero_is_no_row(case: Case) -> None:
    params = case.params(3)
    x = case.data(4, 60, params)
    weights = torch.ones(60, dtype=torch.float64)
    weights[20:] = 0
    found, expected = expectation(case.family, params, x, weights, chunk=16), plain(case.family, params, x[:20])
    if case.family is laplace:  # whose statistics are the rows
        assert (found.stats.resp[20:] == 0).all()
        found = found._replace(stats=laplace.Stats(found.stats.x[:20], found.stats.resp[:20]))
    assert_close(found, expected, x, growth(case.family, params, x))


def covariance(family: Any, params: Any) -> Tensor:
    """Return the covariances (K, D, D) of the components of a Gaussian family."""
    identity = torch.eye(params.locs.shape[1], dtype=torch.float64)
    if family is gaussian_full:
        return params.covariances
    if family is gaussian_tied:
        return params.covariance.expand(len(params.weights), -1, -1)
    variances = params.variances if family is gaussian_diagonal else params.variances[:, None]
    return variances[..., None] * identity


def gaussian(family: Any, locs: Tensor, covariance: Tensor) -> Any:
    """Return parameters with equal weights and this covariance (D, D), or its diagonal, in each component."""
    num_components = len(locs)
    weights = torch.full_like(locs[:, 0], 1 / num_components)
    variances = covariance.diagonal()
    spread = {
        gaussian_full: covariance.expand(num_components, -1, -1).clone(),
        gaussian_tied: covariance,
        gaussian_diagonal: variances.expand(num_components, -1).clone(),
        gaussian_spherical: variances[0].expand(num_components).clone(),
    }
    return family.Params(weights, locs, spread[family])


def assert_close_to_deviations(family: Any, params: Any, found: Expectation, x: Tensor) -> None:
    """Check a pass against the plain route, to the rounding of deviations from the centre.

    They are off by eps |x - center|, which the whitening factor W magnifies to ||W|| eps |x - center|, and a log
    density by that times the whitened deviation z; a scatter is off by that much of its rows' deviations, relatively,
    and by the same rounding of one of its two sides.
    """
    expected = plain(family, params, x)
    resp = family.log_joint(params, x).softmax(-1)
    factors = torch.linalg.cholesky(covariance(family, params))
    deviations = x.mT - params.locs[..., None]  # (K, D, N)
    whitened = torch.linalg.solve_triangular(factors, deviations, upper=False)
    near = resp.mT[:, None] > 0
    z = torch.where(near, whitened, 0).abs().max()
    far = (x - family.moments(params)[0]).abs().max()
    norm = 1 / torch.linalg.svdvals(factors).min()
    num_features = x.shape[1]
    row = 4 * num_features**2 * EPS * (1 + norm * far * (1 + z))
    assert abs(found.log_lik - expected.log_lik) <= row * len(x)
    sizes = torch.where(near, deviations, 0).abs().amax(-1).max()
    for name in expected.stats._fields:
        a, b = getattr(found.stats, name), getattr(expected.stats, name)
        if name == "sums":
            tolerance = len(x) * (row * sizes + len(x) * EPS * x.abs().max())
        else:
            first = len(x) * (row + len(x) * EPS)
            tolerance = first * (1 + sizes) ** 2 + len(x) * num_features**2 * EPS * far * (1 + sizes)
        assert (a - b).abs().max() <= tolerance, name


def separated(family: Any, distance: float, num_features: int = 3, offset: float = 0.0) -> tuple[Any, Tensor]:
    """Return three components ``distance`` standard deviations apart, and 300 rows of them."""
    locs = offset + distance * torch.eye(3, num_features, dtype=torch.float64)
    rows = locs.repeat(100, 1) + randn(300, num_features, seed=1)
    return gaussian(family, locs + 0.1, torch.eye(num_features, dtype=torch.float64)), rows


@pytest.mark.parametrize("family", GAUSSIANS, ids=lambda family: family.__name__)
def test_an_offset_of_the_data_costs_nothing(family: Any) -> None:
    params, x = separated(family, 3.0, offset=1e8)
    assert_close_to_deviations(family, params, expectation(family, params, x, chunk=64), x)


@pytest.mark.parametrize("family", GAUSSIANS, ids=lambda family: family.__name__)
def test_clusters_a_million_standard_deviations_apart(family: Any) -> None:
    params, x = separated(family, 1e6)
    assert_close_to_deviations(family, params, expectation(family, params, x, chunk=64), x)
    if hasattr(family, "features"):
        assert not Moments(family, params, family.moments(params)[0]).exact
        with pytest.raises(AssertionError):
            assert_close_to_deviations(family, params, by_moments(family, params, x), x)


@pytest.mark.parametrize("family", [gaussian_full, gaussian_tied], ids=lambda family: family.__name__)
def test_nearly_singular_covariances(family: Any) -> None:
    """Of condition 1e12, along no axis."""
    size = 4
    basis = torch.linalg.qr(randn(size, size, seed=2))[0]
    root = basis * torch.logspace(0, -6, size, dtype=torch.float64)
    params = gaussian(family, randn(3, size, seed=3) @ root.mT, root @ root.mT)
    x = params.locs.repeat(100, 1) + randn(300, size, seed=4) @ root.mT
    assert_close_to_deviations(family, params, expectation(family, params, x, chunk=64), x)
    if hasattr(family, "features"):
        assert not Moments(family, params, family.moments(params)[0]).exact
        with pytest.raises(AssertionError):
            assert_close_to_deviations(family, params, by_moments(family, params, x), x)


@pytest.mark.parametrize("family", GAUSSIANS[:3], ids=lambda family: family.__name__)
def test_growth_is_no_less_than_the_mean_size_of_a_sum(family: Any, all_families: list[Case]) -> None:
    """To five standard errors of the mean over simulated rows, and no more than a few times that mean."""
    params = next(case for case in all_families if case.family is family).params(3)
    center = family.moments(params)[0]
    x, z = family.sample(params, 20_000, seeded(1))
    form = Moments(family, params, center)
    sizes = form.natural.abs() @ family.features(x, center).abs()
    for k in range(3):
        own = sizes[k, z == k]
        assert form.growth[k] >= own.mean() - 5 * own.std() / math.sqrt(len(own))
        assert form.growth[k] <= 4 * own.mean()


@pytest.mark.parametrize("family", GAUSSIANS[:3], ids=lambda family: family.__name__)
@pytest.mark.parametrize("distance", [1.0, 10.0, 100.0, 200.0, 1e3, 1e4, 1e5])
def test_moments_that_the_guard_passes_keep_their_promise(family: Any, distance: float) -> None:
    """An error of eps^0.7 on average in a row's own log density, and in a covariance relative to itself."""
    params, x = separated(family, distance)
    exact = Moments(family, params, family.moments(params)[0]).exact
    assert exact == (distance < 150)
    error = abs(by_moments(family, params, x).log_lik - plain(family, params, x).log_lik) / len(x)
    covariances = [covariance(family, family.m_step(how(family, params, x).stats)) for how in (by_moments, plain)]
    relative = (torch.linalg.solve(covariances[1], covariances[0]) - torch.eye(3)).norm(dim=(-2, -1)).max()
    if exact:
        assert error <= EPS**0.7
        assert relative <= EPS**0.7
    if distance >= 1e4:
        assert max(error, relative) > EPS**0.7


@pytest.mark.parametrize("family", GAUSSIANS[:3], ids=lambda family: family.__name__)
def test_the_guard_looks_at_the_next_covariances_too(family: Any) -> None:
    """At the start the components are as wide as the distance between them, so that nothing in the table cancels."""
    _, x = separated(family, 1e6)
    start = gaussian(family, 1e6 * torch.eye(3, dtype=torch.float64) + 0.1, 1e10 * torch.eye(3, dtype=torch.float64))
    assert Moments(family, start, family.moments(start)[0]).exact
    ways = partial(expectation, chunk=64), plain, by_moments
    new = [covariance(family, family.m_step(how(family, start, x).stats)) for how in ways]
    within = torch.linalg.eigvalsh(new[1]).min()
    # Rounding of the data about the center is 1e6 eps, of whitened deviations and so of responsibilities 10 eps.
    rounding = 3 * 1e6 * EPS * len(x)
    assert (new[0] - new[1]).abs().max() / within <= rounding
    assert (new[2] - new[1]).abs().max() / within > rounding


@pytest.mark.parametrize("family", GAUSSIANS, ids=lambda family: family.__name__)
def test_a_component_without_rows_gets_zeros(family: Any) -> None:
    params, x = separated(family, 3.0)
    params = params._replace(locs=params.locs + torch.tensor([[0.0], [0.0], [1e3]]))
    found = expectation(family, params, x, chunk=64)
    assert found.stats.counts[2] == 0
    assert_close_to_deviations(family, params, found, x)


@pytest.mark.parametrize("family", GAUSSIANS, ids=lambda family: family.__name__)
def test_a_collapsed_component_leaves_no_finite_log_likelihood(family: Any) -> None:
    params, x = separated(family, 3.0)
    collapsed = gaussian(family, params.locs, torch.zeros(3, 3, dtype=torch.float64))
    x = torch.cat([x, collapsed.locs])
    assert not torch.isfinite(expectation(family, collapsed, x, chunk=64).log_lik)


def apart(num_features: int = 64) -> tuple[Any, Tensor]:
    """Return six components and 240 rows of them: two 8 standard deviations apart, the others 30 from all.

    The responsibilities of the two for each other's rows are about e^-32, the others' for any rows e^-450.
    """
    locs = torch.zeros(6, num_features, dtype=torch.float64)
    locs[1, 0] = 8
    locs[range(2, 6), range(2, 6)] = 30
    rows = locs.repeat(40, 1) + randn(240, num_features, seed=1)
    return gaussian(gaussian_full, locs + 0.01, torch.eye(num_features, dtype=torch.float64)), rows


def assert_left_out_is_less_than_rounding(found: Any, expected: Any, params: Any, x: Tensor, weights: Tensor) -> None:
    """Check statistics from a component's own rows against those from all rows, for the same responsibilities.

    Each adds up N products r (x - loc)(x - center)^T and moves the center to loc; each entry of the two is off by no
    more than N + 6 roundings of the sum of sizes.
    """
    resp = gaussian_full.log_joint(params, x).softmax(-1).mT[..., None] * weights[:, None]  # (K, N, 1)
    deviations, center = (x - params.locs[:, None]).abs(), gaussian_full.moments(params)[0]
    centred = (x - center).abs() + (params.locs - center).abs()[:, None]
    roundings = 2 * (len(x) + 6) * torch.finfo(x.dtype).eps
    products = (resp * deviations).mT @ centred
    sizes = {
        "counts": resp.sum((1, 2)),
        "sums": (resp * (deviations + params.locs.abs()[:, None])).sum(1),
        "shifts": (resp * deviations).sum(1),
        "scatters": products + products.mT,
    }
    for name, size in sizes.items():
        assert ((getattr(found, name) - getattr(expected, name)).abs() <= roundings * size).all(), name


def all_rows(monkeypatch: pytest.MonkeyPatch, *args: Any, **settings: Any) -> Expectation:
    with monkeypatch.context() as context:
        context.setattr(passes, "WIDE", math.inf)
        return expectation(gaussian_full, *args, **settings)


def own_rows(monkeypatch: pytest.MonkeyPatch, *args: Any, **settings: Any) -> Expectation:
    """Return the pass, which must not sum over all rows of any chunk."""

    def sums(*args: Any) -> Any:
        raise AssertionError("summed over all rows")

    with monkeypatch.context() as context:
        context.setattr(gaussian_full._Whitened, "sums", sums)
        return expectation(gaussian_full, *args, **settings)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    ("chunk", "many", "num_threads"), [(None, 2**21, 1), (60, 2**21, 2), (60, 1, 1), (47, 64 * 100, 1)]
)
def test_rows_that_add_nothing_are_left_out(
    monkeypatch: pytest.MonkeyPatch, chunk: int | None, many: int, num_threads: int, dtype: torch.dtype
) -> None:
    """In chunks that lie in one batch of rows, or one by one, or in batches that are not full at the end."""
    monkeypatch.setattr(passes, "MANY", many)
    params, x = apart()
    params, x = in_type(params, dtype), x.to(dtype)
    weights = torch.rand(len(x), generator=seeded(5), dtype=torch.float64).to(dtype)
    weights[1::3] = 0
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for row_weights in (None, weights):
            found = own_rows(monkeypatch, params, x, row_weights, chunk=chunk)
            expected = all_rows(monkeypatch, params, x, row_weights, chunk=chunk)
            assert found.log_lik == expected.log_lik
            counted = torch.ones_like(x[:, 0]) if row_weights is None else row_weights
            assert_left_out_is_less_than_rounding(found.stats, expected.stats, params, x, counted)
    finally:
        torch.set_num_threads(before)


def test_leaving_out_more_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    params, x = apart()
    expected = all_rows(monkeypatch, params, x)
    monkeypatch.setattr(passes, "NOTHING", 0.5)
    with pytest.raises(AssertionError, match=r"counts|sums|shifts|scatters"):
        assert_left_out_is_less_than_rounding(
            own_rows(monkeypatch, params, x).stats, expected.stats, params, x, torch.ones_like(x[:, 0])
        )


def test_a_component_with_next_to_no_rows_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is measured by a component's own largest responsibility, e^-200 here."""
    params, x = apart()
    params = params._replace(locs=params.locs.index_fill(0, torch.tensor([5]), 0.0))
    params.locs[5, 7] = -20
    x = x[torch.arange(len(x)) % 6 != 5]
    found, expected = own_rows(monkeypatch, params, x), all_rows(monkeypatch, params, x)
    assert 0 < expected.stats.counts[5] < EPS**3
    assert_left_out_is_less_than_rounding(found.stats, expected.stats, params, x, torch.ones_like(x[:, 0]))


def test_overlapping_components_are_summed_over_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    params, x = apart()
    near = params._replace(locs=params.locs / 30)
    with pytest.raises(AssertionError, match="all rows"):
        own_rows(monkeypatch, near, x)
    found, expected = expectation(gaussian_full, near, x), all_rows(monkeypatch, near, x)
    for a, b in zip(found.stats, expected.stats, strict=True):
        assert torch.equal(a, b)


def test_no_other_device_is_asked_for_the_number_of_rows() -> None:
    """A tensor on the device ``meta`` has no values that could be asked for."""
    params, x = apart()
    params, x = type(params)(*(value.to("meta") for value in params)), x.to("meta")
    found = passes._pass(gaussian_full.prepare(params, x[0]), x, None, 60)
    assert found.stats.scatters.shape == params.covariances.shape


@pytest.mark.parametrize("family", [bernoulli, bernoulli.UniformWeights()], ids=["free", "uniform"])
def test_probabilities_of_zero_and_one(family: Any) -> None:
    weights = torch.full((2,), 0.5, dtype=torch.float64)
    params = family.Params(weights, torch.tensor([[0.0, 1.0, 0.3], [0.5, 0.5, 1.0]], dtype=torch.float64))
    x = torch.tensor([[0, 1, 1], [0, 1, 0], [1, 1, 1], [1, 0, 1]], dtype=torch.float64)
    found = expectation(family, params, x, chunk=3)
    assert_close(found, plain(family, params, x), x, growth(bernoulli, params, x[:1]))
    impossible = torch.tensor([[1, 1, 0]], dtype=torch.float64)
    assert not torch.isfinite(expectation(family, params, torch.cat([x, impossible]), chunk=3).log_lik)


class Calls(NamedTuple):
    rows: list[int]


def geometric(calls: Calls, additive: bool | None) -> Any:
    """Return a family with the required names only; its data are counts (N, 1)."""

    class Params(NamedTuple):
        weights: Tensor
        probs: Tensor

    class Stats(NamedTuple):
        counts: Tensor
        inner: bernoulli.Stats

    def log_joint(params: Any, x: Tensor) -> Tensor:
        calls.rows.append(len(x))
        return params.weights.log() + x * (-params.probs).log1p() + params.probs.log()

    def statistics(params: Any, x: Tensor, resp: Tensor) -> Stats:
        return Stats(resp.sum(0), bernoulli.Stats(resp.sum(0), resp.mT @ x, resp.mT @ (x + 1)))

    def moments(params: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, dtype=torch.float64), torch.eye(1, dtype=torch.float64)

    names = {} if additive is None else {"additive": additive}
    return SimpleNamespace(
        Params=Params, Stats=Stats, log_joint=log_joint, statistics=statistics, moments=moments, **names
    )


@pytest.mark.parametrize(("additive", "rows"), [(None, [50]), (False, [50]), (True, [20, 20, 10])])
def test_a_family_of_ones_own_goes_in_chunks_if_its_statistics_add_up(additive: bool | None, rows: list[int]) -> None:
    calls = Calls([])
    family = geometric(calls, additive)
    params = family.Params(torch.tensor([0.4, 0.6]).double(), torch.tensor([0.2, 0.7]).double())
    x = torch.arange(50, dtype=torch.float64)[:, None] % 7
    found = expectation(family, params, x, chunk=20)
    assert calls.rows == rows
    assert_close(found, plain(family, params, x), x, growth(family, params, x))


def test_laplace_keeps_its_rows(all_families: list[Case]) -> None:
    case = next(case for case in all_families if case.family is laplace)
    params = case.params(3)
    x = case.data(4, 50, params)
    for a, b in zip(expectation(laplace, params, x, chunk=7).stats, plain(laplace, params, x).stats, strict=True):
        assert torch.equal(a, b)


def test_one_step_of_the_known_variance(all_families: list[Case]) -> None:
    """The known variance goes to 0: the guard leaves the moments of the spherical family behind."""
    x = torch.cat([randn(40, 2, seed=1), 5 + randn(40, 2, seed=2)])
    locs = torch.tensor([[0.0, 0.0], [5.0, 5.0]], dtype=torch.float64)
    for variance in (1.0, 1e-6, 1e-12):
        family = GaussianIsotropic(variance)
        params = family.Params(torch.tensor([0.5, 0.5]).double(), locs)
        found, expected = expectation(family, params, x, chunk=16), plain(family, params, x)
        size = family.log_joint(params, x).abs().max()
        assert abs(found.log_lik - expected.log_lik) <= len(x) ** 2 * EPS * size
        assert (found.stats.sums - expected.stats.sums).abs().max() <= len(x) ** 2 * EPS * x.abs().max()
