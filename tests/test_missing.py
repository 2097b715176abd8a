"""Missing entries: the observed-data law, the expected statistics and EM built from them, each by a second route."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from pyro.infer import TraceEnum_ELBO
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.utils._pytree import tree_flatten, tree_map

from mixproof.models import (
    bernoulli,
    gaussian_diagonal,
    gaussian_full,
    gaussian_spherical,
    gaussian_sum,
    gaussian_tied,
    missing,
)
from mixproof.models.gaussian_isotropic import GaussianIsotropic
from tests.conftest import Case, seeded

EPS = torch.finfo(torch.float64).eps
ROUNDINGS = 2**8  # of sums of up to a hundred products, through matrices of condition numbers up to some hundreds


def error_in_roundings(actual: Any, expected: Any) -> float:
    """Return the largest error of two trees, tensor by tensor, in roundings of the largest entry of each tensor."""
    worst = 0.0
    for a, b in zip(tree_flatten(actual)[0], tree_flatten(expected)[0], strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        finite = torch.isfinite(b)
        assert torch.equal(a[~finite], b[~finite])
        if finite.any():
            size = max(b[finite].abs().max().item(), 1.0)
            error = (a[finite] - b[finite]).abs().max().item() / size / torch.finfo(a.dtype).eps
            worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def assert_equal_to_rounding(actual: Any, expected: Any) -> None:
    assert error_in_roundings(actual, expected) <= ROUNDINGS


def num_features(case: Case, wanted: int = 3) -> int:
    """Return a number of features that the family can have: a known noise has its own."""
    return case.family.noise.locs.shape[-1] if hasattr(case.family, "noise") else wanted


def with_gaps(x: Tensor, seed: int, share: float = 0.4) -> Tensor:
    """Return x (N, D) with a random share of its entries missing."""
    gaps = torch.rand(x.shape, generator=seeded(seed), dtype=x.dtype) < share
    return torch.where(gaps, torch.nan, x)


def instance(case: Case, seed: int = 0, num_data: int = 9) -> tuple[Any, Tensor, Tensor]:
    """Return parameters, data with gaps and responsibilities: all entries of one row missing, none of another."""
    params = case.params(seed, num_features=num_features(case), spread=2.0)
    whole = case.data(seed, num_data, params=params)
    x = with_gaps(whole, seed)
    x[1], x[2] = torch.nan, whole[2]
    return params, x, case.resp(seed + 1, num_data)


# Components by their definition, and what follows from it row by row


def gaussian_law(family: Any, params: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights (C,), locs (C, D) and covariances (C, D, D) of the components of a Gaussian family."""
    if isinstance(family, gaussian_sum.KnownNoise):
        sum_params: tuple[Tensor, ...] = (*params, *family.noise)
        params, family = gaussian_sum.Params(*sum_params), gaussian_sum
    if family is gaussian_sum:
        x_weights, x_locs, x_covariances, y_weights, y_locs, y_covariances = params
        pairs = list(itertools.product(range(len(x_weights)), range(len(y_weights))))
        return (
            torch.stack([x_weights[k] * y_weights[l] for k, l in pairs]),
            torch.stack([x_locs[k] + y_locs[l] for k, l in pairs]),
            torch.stack([x_covariances[k] + y_covariances[l] for k, l in pairs]),
        )
    identity = torch.eye(params.locs.shape[1], dtype=params.locs.dtype)
    if family is gaussian_full:
        covariances = params.covariances
    elif family is gaussian_tied:
        covariances = torch.stack([params.covariance for _ in params.locs])
    elif family is gaussian_diagonal:
        covariances = torch.stack([variances.diag() for variances in params.variances])
    elif family is gaussian_spherical:
        covariances = torch.stack([variance * identity for variance in params.variances])
    else:
        assert isinstance(family, GaussianIsotropic)
        covariances = torch.stack([family.variance * identity for _ in params.locs])
    return params.weights, params.locs, covariances


def log_marginals(family: Any, params: Any, x: Tensor) -> Tensor:
    """Return log p(observed part of x_n, z_n = k) by torch's distributions, row by row and component by component."""
    if "probs" in params._fields:
        rows = []
        for row in x:
            seen = ~row.isnan()
            law = torch.distributions.Bernoulli(params.probs[:, seen])
            rows.append(law.log_prob(row[seen]).sum(-1))
        return params.weights.log() + torch.stack(rows)
    weights, locs, covariances = gaussian_law(family, params)
    rows = []
    for row in x:
        seen = ~row.isnan()
        if not seen.any():
            rows.append(weights.log())
            continue
        laws = [
            torch.distributions.MultivariateNormal(loc[seen], covariance[seen][:, seen])
            for loc, covariance in zip(locs, covariances, strict=True)
        ]
        rows.append(weights.log() + torch.stack([law.log_prob(row[seen]) for law in laws]))
    return torch.stack(rows)


def completions(family: Any, params: Any, row: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return, for each component, probabilities (m,) and completed rows (m, D) with the row's conditional moments.

    Binary rows are all those that agree with what is observed. Gaussian ones are the mean and points on the axes of
    the conditional law around it: the average of a quadratic function over them is its expectation. The conditional law
    comes from the precision matrix (Bishop, Pattern Recognition and Machine Learning, equations 2.96 and 2.97).
    """
    gaps = row.isnan()
    size = int(gaps.sum())
    found = []
    if "probs" in params._fields:
        for probs in params.probs:
            values = torch.tensor(list(itertools.product([0.0, 1.0], repeat=size)), dtype=row.dtype)
            points = row.repeat(len(values), 1)
            points[:, gaps] = values
            found.append(((values * probs[gaps] + (1 - values) * (1 - probs[gaps])).prod(-1), points))
        return found
    _, locs, covariances = gaussian_law(family, params)
    for loc, covariance in zip(locs, covariances, strict=True):
        precision = covariance.inverse()
        remaining = precision[gaps][:, gaps].inverse()
        mean = loc[gaps] - remaining @ precision[gaps][:, ~gaps] @ (row - loc)[~gaps]
        axes = math.sqrt(size) * torch.linalg.cholesky(remaining).mT
        points = row.repeat(max(2 * size, 1), 1)
        points[:, gaps] = torch.cat([mean + axes, mean - axes]) if size else mean
        found.append((row.new_full((len(points),), 1 / len(points)), points))
    return found


Completions = Callable[[Any, Any, Tensor], list[tuple[Tensor, Tensor]]]


def averaged_statistics(family: Any, params: Any, x: Tensor, resp: Tensor, complete: Completions = completions) -> Any:
    """Return the average of ``statistics`` over completions of each row for each component, whose column alone counts.

    Statistics of a sum of rows are summed, so one call takes them all.
    """
    rows, weights = [], []
    for row, own in zip(x, resp, strict=True):
        for k, (probabilities, points) in enumerate(complete(family, params, row)):
            rows.append(points)
            columns = torch.zeros(len(points), len(own), dtype=x.dtype)
            columns[:, k] = own[k] * probabilities
            weights.append(columns)
    return family.statistics(params, torch.cat(rows), torch.cat(weights))


# The observed-data law


@given(
    st.integers(0, 2**16), st.integers(1, 4), st.integers(1, 3), st.lists(st.integers(0, 15), min_size=1, max_size=5)
)
@settings(max_examples=25, deadline=None)
def test_log_joint_is_that_of_the_observed_part(
    missing_case: Case, seed: int, size: int, k: int, gaps: list[int]
) -> None:
    """Each of the gaps holds, bit by bit, which entries of a row are missing."""
    size = num_features(missing_case, size)
    params = missing_case.params(seed, k, size, spread=2.0)
    x = missing_case.data(seed, len(gaps), params=params)
    bits = torch.tensor(gaps)[:, None] >> torch.arange(size) & 1
    x = torch.where(bits == 1, torch.nan, x)
    expected = log_marginals(missing_case.family, params, x)
    assert_equal_to_rounding(missing_case.family.log_joint_observed(params, x), expected)


def test_where_nothing_is_missing_both_are_the_plain_functions(missing_case: Case) -> None:
    family = missing_case.family
    params, _, resp = instance(missing_case)
    x = missing_case.data(0, len(resp), params=params)
    assert_equal_to_rounding(family.log_joint_observed(params, x), family.log_joint(params, x))
    assert_equal_to_rounding(family.statistics_observed(params, x, resp), family.statistics(params, x, resp))


def test_a_probability_of_0_or_1_excludes_observed_entries_only() -> None:
    params = bernoulli.Params(torch.tensor([0.5, 0.5]).double(), torch.tensor([[0.0, 0.3], [1.0, 0.3]]).double())
    nan = torch.nan
    x = torch.tensor([[1, nan], [0, nan], [nan, 1], [nan, 0]]).double()
    impossible = torch.tensor([[True, False], [False, True], [False, False], [False, False]])
    assert torch.equal(bernoulli.log_joint_observed(params, x) == -torch.inf, impossible)
    halves = torch.tensor([[0.0, 0.5], [0.5, 0.0], [0.15, 0.15], [0.35, 0.35]]).double()
    assert_equal_to_rounding(bernoulli.log_joint_observed(params, x).exp(), halves)


# The expected statistics


@pytest.mark.parametrize("seed", range(3))
def test_statistics_are_averages_over_completions(missing_case: Case, seed: int) -> None:
    family = missing_case.family
    params, x, resp = instance(missing_case, seed)
    assert_equal_to_rounding(family.statistics_observed(params, x, resp), averaged_statistics(family, params, x, resp))


def expected_log_joint(family: Any, params: Any, stats: Any, at: Any) -> Tensor:
    """Return Q, the expected log density of rows and components at ``params``, from statistics taken at ``at``.

    Terms that no parameter enters are left out.
    """
    if family is gaussian_sum:
        (x_part, y_part), (x_at, y_at) = gaussian_sum.parts(params), gaussian_sum.parts(at)
        of_x = expected_log_joint(gaussian_full, x_part, stats.x, x_at)
        return of_x + expected_log_joint(gaussian_full, y_part, stats.y, y_at)
    if "probs" in params._fields:
        q = (stats.ones * params.probs.log() + stats.zeros * (1 - params.probs).log()).sum()
        return q + stats.counts @ params.weights.log() if "counts" in stats._fields else q
    counts, size = stats.counts, params.locs.shape[1]
    q = counts @ params.weights.log()
    if isinstance(family, GaussianIsotropic):
        return q - (counts @ params.locs.square().sum(-1) - 2 * (params.locs * stats.sums).sum()) / family.variance / 2
    moved = params.locs - at.locs
    if family in (gaussian_diagonal, gaussian_spherical):
        squares = counts[:, None] * moved.square() - 2 * moved * stats.shifts
        if family is gaussian_spherical:
            squares = stats.squares + squares.sum(-1)
            return q - (size * counts * params.variances.log() + squares / params.variances).sum() / 2
        return q - (counts[:, None] * params.variances.log() + (stats.squares + squares) / params.variances).sum() / 2
    crossed = moved[:, :, None] * stats.shifts[:, None, :]
    scatters = counts[:, None, None] * moved[:, :, None] * moved[:, None, :] - crossed - crossed.mT
    if family is gaussian_tied:
        log_det = counts.sum() * params.covariance.logdet()
        return q - (log_det + (params.covariance.inverse() * (stats.scatter + scatters.sum(0))).sum()) / 2
    traces = (params.covariances.inverse() * (stats.scatters + scatters)).sum()
    return q - (counts @ params.covariances.logdet() + traces) / 2


def gradients(function: Callable[[Any], Tensor], params: Any, free: tuple[str, ...]) -> list[Tensor]:
    """Return the gradient of a function (...) by each free field, (..., *shape), in scale-free directions.

    Weights move along the simplex, a covariance C by C dC C, so that no inverse magnifies the rounding.
    """

    def of_fields(*values: Tensor) -> Tensor:
        return function(params._replace(**dict(zip(free, values, strict=True))))

    found = []
    for name, slope in zip(free, jacobian(of_fields, tuple(getattr(params, name) for name in free)), strict=True):
        value = getattr(params, name)
        if name.endswith("weights"):
            found.append(value * (slope - (slope * value).sum(-1, keepdim=True)))
        else:
            found.append(value @ (slope + slope.mT) @ value if "covariance" in name else slope)
    return found


@pytest.mark.parametrize("seed", range(2))
def test_fisher_identity(missing_case: Case, seed: int) -> None:
    """The gradient of the observed-data log likelihood is that of Q at the parameters of its responsibilities."""
    family, free = missing_case.family, missing_case.free
    params, x, _ = instance(missing_case, seed)
    resp = family.log_joint_observed(params, x).softmax(-1)
    stats = family.statistics_observed(params, x, resp)
    expected = gradients(lambda own: log_marginals(family, own, x).logsumexp(-1).sum(), params, free)
    actual = gradients(lambda own: expected_log_joint(family, own, stats, params), params, free)
    assert_equal_to_rounding(actual, expected)


def test_m_step_from_them_is_stationary(missing_case: Case, kind: str) -> None:
    family, free = missing_case.family, missing_case.free
    prior = None if kind == "flat" else missing_case.prior(0, num_features=num_features(missing_case))
    params, x, resp = instance(missing_case, 4, num_data=40)
    stats = family.statistics_observed(params, x, resp)
    found = family.m_step(stats, prior)

    def objective(own: Any) -> Tensor:
        q = expected_log_joint(family, own, stats, params)
        return q if prior is None else q + family.log_prior(own, prior)

    for slope, before in zip(gradients(objective, found, free), gradients(objective, params, free), strict=True):
        assert slope.abs().max() <= ROUNDINGS * EPS * len(x) * (1 + before.abs().max())


def test_statistics_are_additive_over_rows_in_any_order(missing_case: Case) -> None:
    family = missing_case.family
    params, x, resp = instance(missing_case, 2)
    whole = family.statistics_observed(params, x, resp)
    parts = [family.statistics_observed(params, x[rows], resp[rows]) for rows in (slice(0, 4), slice(4, None))]
    assert_equal_to_rounding(tree_map(torch.add, *parts), whole)
    order = torch.randperm(len(x), generator=seeded(0))
    assert_equal_to_rounding(family.statistics_observed(params, x[order], resp[order]), whole)
    table = family.log_joint_observed(params, x)
    assert_equal_to_rounding(family.log_joint_observed(params, x[order]), table[order])


def test_a_shift_of_data_and_locs_changes_nothing(missing_case: Case) -> None:
    """With entries that are multiples of 2^-20, the shift by 2^22 is exact, and so is every deviation."""
    if not missing_case.has_real_data:
        assert "probs" in missing_case.family.Params._fields
        return
    family, name = missing_case.family, missing_case.location
    params, x, resp = instance(missing_case, 3)
    x = (x * 2**20).round() / 2**20

    def rounded(params: Any) -> Any:
        return params._replace(
            **{field: (v * 2**20).round() / 2**20 for field, v in params._asdict().items() if field.endswith("locs")}
        )

    params = rounded(params)
    if isinstance(family, gaussian_sum.KnownNoise):
        family = gaussian_sum.KnownNoise(rounded(family.noise))
    far = params._replace(**{name: getattr(params, name) + 2**22})
    assert torch.equal(family.log_joint_observed(far, x + 2**22), family.log_joint_observed(params, x))
    near, there = family.statistics_observed(params, x, resp), family.statistics_observed(far, x + 2**22, resp)
    pairs = zip((near.x, near.y), (there.x, there.y), strict=True) if family is gaussian_sum else [(near, there)]
    for a, b in pairs:
        for field in set(a._fields) - {"sums"}:
            assert torch.equal(getattr(a, field), getattr(b, field)), field


def test_float32_stays_float32(missing_case: Case) -> None:
    family = missing_case.family
    if isinstance(family, gaussian_sum.KnownNoise):  # its noise has a type of its own
        family = gaussian_sum.KnownNoise(tree_map(lambda leaf: leaf.float(), family.noise))
    params, x, resp = instance(missing_case)
    single = tree_map(lambda leaf: leaf.float(), (params, x, resp))
    table, stats = family.log_joint_observed(*single[:2]), family.statistics_observed(*single)
    assert_equal_to_rounding(table, family.log_joint_observed(params, x).float())
    assert_equal_to_rounding(stats, tree_map(lambda leaf: leaf.float(), family.statistics_observed(params, x, resp)))


def test_a_batch_of_parameters_goes_through_vmap(missing_case: Case) -> None:
    family = missing_case.family
    params, x, resp = instance(missing_case)
    other = missing_case.params(9, num_features=num_features(missing_case))
    batch = tree_map(lambda *leaves: torch.stack(leaves), params, other)
    tables = torch.func.vmap(family.log_joint_observed, (0, None))(batch, x)
    stats = torch.func.vmap(family.statistics_observed, (0, None, None))(batch, x, resp)
    for i, own in enumerate((params, other)):
        assert_equal_to_rounding(tables[i], family.log_joint_observed(own, x))
        each = tree_map(lambda leaf, i=i: leaf[i], stats)
        assert_equal_to_rounding(each, family.statistics_observed(own, x, resp))


@pytest.mark.parametrize("family", [gaussian_full, gaussian_tied], ids=["full", "tied"])
def test_one_factorisation_a_pattern(family: Any, all_families: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in all_families if case.family is family)
    params = case.params(0)
    x = case.data(0, 300, params=params)
    x[:100, 0] = x[100:200, 1] = torch.nan
    sizes = []

    def counted(covariances: Tensor) -> Tensor:
        sizes.append(tuple(covariances.shape))
        return torch.linalg.cholesky(covariances)

    monkeypatch.setattr(missing, "cholesky", counted)
    family.statistics_observed(params, x, case.resp(1, 300))
    own = 3 if family is gaussian_full else 1
    assert sorted(sizes) == [(own, 1, 1), (own, 1, 1), (own, 2, 2)]


# Faults that the check of the statistics must see


def only_means(family: Any, params: Any, row: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The conditional covariance is forgotten."""
    found = completions(family, params, row)
    return [(p.sum().reshape(1), (p @ points)[None]) for p, points in found]


def component_means(family: Any, params: Any, row: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Missing entries become the component's mean, as if features were independent and did not vary."""
    means = params.probs if "probs" in params._fields else gaussian_law(family, params)[1]
    return [(row.new_ones(1), torch.where(row.isnan(), mean, row)[None]) for mean in means]


def overall_mean(family: Any, params: Any, row: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Missing entries become the mixture's mean, whatever the component."""
    mean = family.moments(params)[0]
    found = component_means(family, params, row)
    return [(one, torch.where(row.isnan(), mean, row)[None]) for one, _ in found]


def complete_rows(family: Any, params: Any, row: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows with a gap are left out."""
    whole = 0.0 if row.isnan().any() else 1.0
    return [(whole * one, rows) for one, rows in component_means(family, params, row)]


def marginal_covariance(family: Any, params: Any, row: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The missing entries keep all of their covariance, as if nothing were observed."""
    gaps = row.isnan()
    size = int(gaps.sum())
    means = only_means(family, params, row)
    if "probs" in params._fields or size == 0:
        return means
    found = []
    for (_, mean), covariance in zip(means, gaussian_law(family, params)[2], strict=True):
        axes = row.new_zeros(size, len(row))
        axes[:, gaps] = math.sqrt(size) * torch.linalg.cholesky(covariance[gaps][:, gaps]).mT
        points = torch.cat([mean + axes, mean - axes])
        found.append((row.new_full((len(points),), 1 / len(points)), points))
    return found


LINEAR = ("bernoulli", "UniformWeights")  # statistics without squares: means are enough
# Nothing observed bears on what is missing.
INDEPENDENT = (*LINEAR, "GaussianIsotropic", "gaussian_diagonal", "gaussian_spherical")


@pytest.mark.parametrize(
    ("fault", "right_for"),
    [
        (only_means, LINEAR),
        (component_means, LINEAR),
        (overall_mean, ()),
        (complete_rows, ()),
        (marginal_covariance, INDEPENDENT),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_check_sees_planted_faults(missing_case: Case, fault: Completions, right_for: tuple[str, ...]) -> None:
    """Each fault is seen where it is one, and raises no alarm where it is none."""
    family = missing_case.family
    params, x, resp = instance(missing_case)
    faulty = averaged_statistics(family, params, x, resp, fault)
    error = error_in_roundings(faulty, averaged_statistics(family, params, x, resp))
    assert (error <= ROUNDINGS) == (missing_case.name in right_for)


# EM


def em_step(family: Any, params: Any, x: Tensor) -> Any:
    resp = family.log_joint_observed(params, x).softmax(-1)
    return family.m_step(family.statistics_observed(params, x, resp))


def climb(family: Any, params: Any, x: Tensor, max_steps: int = 2000) -> tuple[Any, list[float]]:
    """Return where EM stays to rounding, and the log likelihoods on its way."""
    trace = []
    for _ in range(max_steps):
        trace.append(family.log_joint_observed(params, x).logsumexp(-1).sum().item())
        before, params = params, em_step(family, params, x)
        if error_in_roundings(params, before) <= 4:
            return params, trace
    raise AssertionError(f"EM still moves after {max_steps} steps")


def test_em_rises_to_a_point_without_slope(missing_case: Case) -> None:
    """The data are such that the maximum is at regular covariances, to which EM goes at a constant rate."""
    family = missing_case.family
    seed = 4 if hasattr(family, "noise") else 2
    truth = missing_case.params(seed, 2, 2, spread=6.0)
    x = with_gaps(missing_case.data(seed, 80, params=truth), 5, share=0.2)
    params, trace = climb(family, em_step(family, truth, x), x)
    rounding = 2**6 * EPS * (abs(trace[-1]) + len(x))
    assert all(after >= before - rounding for before, after in itertools.pairwise(trace))
    assert trace[-1] > trace[0] + rounding
    for slopes in gradients(lambda own: family.log_joint_observed(own, x).logsumexp(-1), params, missing_case.free):
        assert (slopes.sum(0).abs() <= ROUNDINGS * EPS * slopes.abs().sum(0).max()).all()


@pytest.mark.parametrize("name", ["gaussian_full", "gaussian_tied", "gaussian_sum", "KnownNoise"])
def test_an_asymmetry_of_rounding_does_not_grow(name: str, all_families: list[Case]) -> None:
    """A row of which nothing is observed hands the covariance on, and with it what rounding has done to it."""
    case = next(case for case in all_families if case.name == name)
    family, params = case.family, case.params(2, 2, 2)
    x = with_gaps(case.data(2, 80, params=params), 5, share=0.6)
    names = [field for field in params._fields if "covariance" in field]
    rounding = torch.tensor([[0, 2.0**-40], [-(2.0**-40), 0]], dtype=torch.float64)
    params = params._replace(**{field: getattr(params, field) + rounding for field in names})
    found = em_step(family, params, x)
    for field in names:
        before, after = getattr(params, field), getattr(found, field)
        assert (after - after.mT).abs().max() < (before - before.mT).abs().max()


def one_component(family: Any, x: Tensor) -> Any:
    """Return where EM with K = 1 ends, from standard scales about 0."""
    size = x.shape[1]
    scale = {"variances": (1, size), "covariances": (1, size, size), "covariance": (size, size)}
    values: dict[str, Tensor] = {
        "weights": x.new_ones(1),
        "locs": x.new_zeros(1, size),
        "probs": x.new_full((1, size), 0.5),
    }
    for name, shape in scale.items():
        values[name] = torch.eye(size, dtype=x.dtype).expand(shape) if "cov" in name else x.new_ones(shape)
    if family is gaussian_spherical:
        values["variances"] = x.new_ones(1)
    start = family.Params(**{name: values[name] for name in family.Params._fields})
    return climb(family, start, x)[0]


@pytest.mark.parametrize("family", [gaussian_full, gaussian_tied], ids=["full", "tied"])
def test_monotone_bivariate_normal_has_anderson_s_closed_form(family: Any, real_data: dict[str, Tensor]) -> None:
    """Where one variable is always observed, the other's maximum likelihood estimate is by regression on it.

    Anderson, Journal of the American Statistical Association 52 (1957), 200-203; the durations of Old Faithful's
    eruptions are all known, the waiting times of a third are taken away.
    """
    x = real_data["faithful"].clone()
    x[::3, 1] = torch.nan
    seen = ~x[:, 1].isnan()
    first, (a, b) = x[:, 0], x[seen].T
    slope = ((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum()
    residual = b - b.mean() - slope * (a - a.mean())
    mean = torch.stack([first.mean(), b.mean() + slope * (first.mean() - a.mean())])
    variance = first.var(correction=0)
    last = residual.square().mean() + slope.square() * variance
    covariance = torch.stack([variance, slope * variance, slope * variance, last]).reshape(2, 2)
    found = one_component(family, x)
    assert_equal_to_rounding(found.locs[0], mean)
    assert_equal_to_rounding(found[2].reshape(2, 2), covariance)


@pytest.mark.parametrize("family", [gaussian_full, gaussian_tied], ids=["full", "tied"])
@pytest.mark.parametrize(("correlation", "variance"), [(0.5, 8 / 3), (-0.5, 8 / 3), (0.0, 5 / 2)])
def test_murray_s_twelve_rows(family: Any, correlation: float, variance: float) -> None:
    """Two maxima and a saddle, as published: Murray's discussion of Dempster, Laird and Rubin.

    Journal of the Royal Statistical Society B 39 (1977), 27-28. He takes the means
    as 0; here symmetry keeps them there. EM that starts with no correlation stays at the saddle.
    """
    nan = torch.nan
    corners = [[1, 1], [1, -1], [-1, 1], [-1, -1]]
    first, second = [[2, nan], [2, nan], [-2, nan], [-2, nan]], [[nan, 2], [nan, 2], [nan, -2], [nan, -2]]
    x = torch.tensor([*corners, *first, *second], dtype=torch.float64)
    expected = variance * torch.tensor([[1, correlation], [correlation, 1]], dtype=torch.float64)
    start = torch.eye(2, dtype=torch.float64) + math.copysign(0.1, correlation) * (correlation != 0) * (
        1 - torch.eye(2)
    )
    covariance = start if family is gaussian_tied else start[None]
    params, _ = climb(family, family.Params(x.new_ones(1), x.new_zeros(1, 2), covariance), x)
    assert_equal_to_rounding(params.locs, x.new_zeros(1, 2))
    assert_equal_to_rounding(params[2].reshape(2, 2), expected)


@pytest.mark.parametrize(
    "family", [bernoulli, gaussian_diagonal, gaussian_spherical], ids=lambda family: family.__name__
)
def test_independent_features_with_one_component_use_what_they_see(family: Any, real_data: dict[str, Tensor]) -> None:
    x = with_gaps(real_data["carcinoma" if family is bernoulli else "iris"], 0, share=0.3)
    seen = [column[~column.isnan()] for column in x.T]
    means = torch.stack([column.mean() for column in seen])
    found = one_component(family, x)
    assert_equal_to_rounding(found[1][0], means)
    if family is gaussian_diagonal:
        assert_equal_to_rounding(found.variances[0], torch.stack([column.var(correction=0) for column in seen]))
    if family is gaussian_spherical:
        squares = torch.cat([(column - column.mean()).square() for column in seen])
        assert_equal_to_rounding(found.variances[0], squares.mean())


# Rows and columns of which little or nothing is observed


def test_rows_without_an_entry_teach_nothing(missing_case: Case) -> None:
    """Their log density is the log weight, and EM from them alone stays where it is."""
    family = missing_case.family
    params = missing_case.params(3, num_features=num_features(missing_case))
    x = torch.full((5, num_features(missing_case)), torch.nan, dtype=torch.float64)
    table = family.log_joint_observed(params, x)
    weights = params.weights if "probs" in params._fields else gaussian_law(family, params)[0]
    assert torch.equal(table, weights.log().expand(5, -1))
    assert_equal_to_rounding(em_step(family, params, x), params)


def test_a_column_without_an_entry_is_left_as_it_is(missing_case: Case) -> None:
    """EM leaves its law given the other columns alone: the regression on them, or its own law where there is none."""
    family = missing_case.family
    params, _, _ = instance(missing_case, 5)
    x = missing_case.data(5, 30, params=params)
    x[:, 1] = torch.nan
    found = em_step(family, params, x)
    if missing_case.name in INDEPENDENT:
        assert_equal_to_rounding(found[1][:, 1], params[1][:, 1])
        assert error_in_roundings(found[1][:, 0], params[1][:, 0]) > ROUNDINGS
        return
    if family is gaussian_sum or missing_case.name == "KnownNoise":
        others = [column for column in range(x.shape[1]) if column != 1]
        law = [
            value[:, others][..., others] if value.ndim == 3 else value[:, others] if value.ndim == 2 else value
            for value in gaussian_law(family, params)
        ]
        expected = gaussian_full.log_joint(gaussian_full.Params(*law), x[:, others])
        assert_equal_to_rounding(family.log_joint_observed(params, x), expected)
        return
    for before, after in zip(regressions(family, params), regressions(family, found), strict=True):
        assert_equal_to_rounding(after, before)
    assert error_in_roundings(found.locs, params.locs) > ROUNDINGS


def regressions(family: Any, params: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return slopes, intercept and residual variance of column 1 on the others, for each component."""
    found = []
    _, locs, covariances = gaussian_law(family, params)
    others = [column for column in range(locs.shape[1]) if column != 1]
    for loc, covariance in zip(locs, covariances, strict=True):
        slopes = torch.linalg.solve(covariance[others][:, others], covariance[others, 1])
        found.append((slopes, loc[1] - slopes @ loc[others], covariance[1, 1] - slopes @ covariance[others, 1]))
    return found


def test_one_observed_entry_a_row(missing_case: Case) -> None:
    family = missing_case.family
    params, _, resp = instance(missing_case, 6)
    whole = missing_case.data(6, len(resp), params=params)
    columns = torch.arange(len(resp)) % whole.shape[1]
    x = torch.full_like(whole, torch.nan)
    x[torch.arange(len(x)), columns] = whole[torch.arange(len(x)), columns]
    value = x.nan_to_num().sum(-1)[:, None]
    if "probs" in params._fields:
        expected = params.weights.log() + torch.distributions.Bernoulli(params.probs[:, columns].T).log_prob(value)
    else:
        weights, locs, covariances = gaussian_law(family, params)
        scales = covariances.diagonal(dim1=-2, dim2=-1)[:, columns].sqrt()
        expected = weights.log() + torch.distributions.Normal(locs[:, columns].T, scales.T).log_prob(value)
    assert_equal_to_rounding(family.log_joint_observed(params, x), expected)
    assert_equal_to_rounding(family.statistics_observed(params, x, resp), averaged_statistics(family, params, x, resp))


# Pyro


def masked_program(family: Any, params: Any, x: Tensor) -> None:
    """The mixture with the missing entries' factors taken out by Pyro's own mask."""
    seen = ~x.isnan()
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(params.weights), infer={"enumerate": "parallel"})
        if family is bernoulli:
            law = dist.Bernoulli(params.probs[z])
        else:
            law = dist.Normal(params.locs[z], params.variances[z].sqrt())
        pyro.sample("x", law.mask(seen).to_event(1), obs=x.nan_to_num())


def row_program(params: Any, x: Tensor) -> None:
    """The mixture of full Gaussians with one site for the observed part of each row."""
    for n, row in enumerate(x):
        seen = (~row.isnan()).nonzero().flatten()
        z = pyro.sample(f"z_{n}", dist.Categorical(params.weights), infer={"enumerate": "parallel"})
        if len(seen):
            law = dist.MultivariateNormal(params.locs[z][..., seen], params.covariances[z][..., seen[:, None], seen])
            pyro.sample(f"x_{n}", law, obs=row[seen])


@pytest.mark.parametrize("family", [bernoulli, gaussian_diagonal, gaussian_full], ids=lambda family: family.__name__)
def test_enumerated_pyro_program_has_the_same_likelihood_gradient_and_responsibilities(
    family: Any, all_families: list[Case]
) -> None:
    case = next(case for case in all_families if case.family is family)
    params, x, _ = instance(case, 7, num_data=6)

    def program(own: Any) -> None:
        row_program(own, x) if family is gaussian_full else masked_program(family, own, x)

    def guide(own: Any) -> None:
        pass

    elbo = TraceEnum_ELBO(max_plate_nesting=0 if family is gaussian_full else 1)

    def log_lik(own: Any) -> Tensor:
        return -elbo.differentiable_loss(program, guide, own)

    def ours(own: Any) -> Tensor:
        return family.log_joint_observed(own, x).logsumexp(-1).sum()

    assert_equal_to_rounding(ours(params), x.new_tensor(-elbo.loss(program, guide, params)))
    assert_equal_to_rounding(gradients(ours, params, params._fields), gradients(log_lik, params, params._fields))
    marginals = elbo.compute_marginals(program, guide, params)
    expected = torch.stack([m.probs for m in marginals.values()]) if family is gaussian_full else marginals["z"].probs
    assert_equal_to_rounding(family.log_joint_observed(params, x).softmax(-1), expected)


# The contract


def test_both_functions_stand_after_statistics_or_neither(case: Case) -> None:
    owner = vars(case.family) if inspect.ismodule(case.family) else vars(type(case.family))
    names = ["log_joint", "statistics", "log_joint_observed", "statistics_observed", "m_step"]
    found = [name for name in owner if name in names]
    if "log_joint_observed" not in found:
        assert found == ["log_joint", "statistics", "m_step"]
        return
    assert found == names
    for name in ("log_joint", "statistics"):
        plain, observed = getattr(case.family, name), getattr(case.family, f"{name}_observed")
        assert list(inspect.signature(observed).parameters) == list(inspect.signature(plain).parameters)
        assert observed.__doc__


def test_families_that_take_missing_entries(all_families: list[Case]) -> None:
    able = {case.name for case in all_families if hasattr(case.family, "log_joint_observed")}
    gaussian = {f"gaussian_{shape}" for shape in ("full", "tied", "diagonal", "spherical", "sum")}
    assert able >= {*gaussian, "GaussianIsotropic", "KnownNoise", "bernoulli", "UniformWeights"}
    assert "laplace" not in able  # of |x - loc| the expectation at a new loc is no finite statistic
