"""K-means and K-medians: published optima, brute force over all partitions, scikit-learn, laws of the iteration."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from sklearn.cluster import KMeans
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference.lloyd import (
    MANHATTAN,
    SQUARED_EUCLIDEAN,
    Clustering,
    Metric,
    kmeans,
    kmedians,
    lloyd,
    update,
)
from mixproof.inference.means import Means
from mixproof.inference.medians import Medians
from mixproof.inference.nearest import Nearest, assign, deviations
from mixproof.inference.seeding import kmeans_plusplus, kmedians_plusplus
from tests.conftest import seeded

METRICS = pytest.mark.parametrize("metric", [SQUARED_EUCLIDEAN, MANHATTAN], ids=["kmeans", "kmedians"])
ALGORITHMS = pytest.mark.parametrize(
    ("algorithm", "metric"), [(kmeans, SQUARED_EUCLIDEAN), (kmedians, MANHATTAN)], ids=["kmeans", "kmedians"]
)
Algorithm = Callable[..., Clustering]


def blobs(seed: int, num_rows: int = 90, num_features: int = 2, num_blobs: int = 3) -> Tensor:
    """Return rows about well separated centres, on a grid of 1/1024 so that adding 1e6 to them is exact."""
    generator = seeded(seed)
    locs = 20 * torch.randn(num_blobs, num_features, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_rows, num_features, generator=generator, dtype=torch.float64)
    return ((locs.repeat(num_rows // num_blobs, 1) + noise) * 1024).round() / 1024


def numpy_objective(x: np.ndarray, labels: np.ndarray, metric: Metric) -> float:
    """Return J of a partition with the best centres, by numpy alone."""
    total = 0.0
    for label in np.unique(labels):
        rows = x[labels == label]
        center = rows.mean(0) if metric is SQUARED_EUCLIDEAN else np.median(rows, axis=0)
        total += float((np.abs(rows - center) ** metric.power).sum())
    return total


def global_optimum(x: np.ndarray, k: int, metric: Metric) -> float:
    """Return the least J over all k^N assignments."""
    every_row = np.arange(len(x))
    return min(
        numpy_objective(x, np.array(labels)[every_row], metric) for labels in itertools.product(range(k), repeat=len(x))
    )


def quiet_lloyd(x: Tensor, centers: Tensor, metric: Metric, max_steps: int = 300) -> Clustering:
    """Run from arbitrary centres, where an empty cluster is nothing unusual; other warnings stay errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="cluster .* is empty", category=RuntimeWarning)
        return lloyd(x, centers, metric, max_steps=max_steps)


# Published figures


@pytest.mark.parametrize(("k", "printed"), [(2, "152.347951760358"), (3, "78.8514414261460"), (4, "57.2284732142857")])
def test_iris_reaches_the_published_global_optimum(k: int, printed: str) -> None:
    """du Merle et al., "An interior point algorithm for minimum sum-of-squares clustering" (2000).

    scikit-learn's iris is Fisher's, as theirs is. The copy at UCI differs in the 35th and 38th row and its optima are
    152.3687, 78.9408 and 57.3173.
    """
    result = kmeans(load_iris().data, k, num_starts=20, generator=seeded(0))
    half_a_digit = 0.5 * 10.0 ** -len(printed.split(".")[1])
    rounding = 4 * np.spacing(float(printed))
    assert abs(result.objective[-1].item() - float(printed)) <= half_a_digit + rounding
    assert result.converged


def test_kmedians_in_one_dimension_finds_the_published_optimum() -> None:
    """Tests of the R package Ckmeans.1d.dp (Wang and Song 2011), weighted and unweighted K-medians."""
    result = kmedians(torch.tensor([[-1.0], [2.0], [4.0], [5.0], [6.0]]), 3, generator=seeded(0))
    assert sorted(result.centers[:, 0].tolist()) == [-1, 2, 5]
    assert result.objective[-1] == 2


# Another implementation


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_kmeans_agrees_with_scikit_learn_from_the_same_centres(k: int, offset: float) -> None:
    """On continuous data: iris, with one decimal, has rows exactly midway between centres; either label is right."""
    x = np.random.default_rng(0).normal(size=(300, 4)) * [1, 2, 3, 4] + offset
    for seed in range(4):
        centers = x[np.random.default_rng(seed).permutation(len(x))[:k]]
        peer = KMeans(k, init=centers, n_init=1, tol=0, max_iter=300, algorithm="lloyd").fit(x)
        ours = lloyd(torch.tensor(x), torch.tensor(centers), SQUARED_EUCLIDEAN)
        np.testing.assert_array_equal(ours.labels, peer.labels_)
        np.testing.assert_allclose(ours.centers, peer.cluster_centers_, rtol=1e-13)
        np.testing.assert_allclose(ours.objective[-1], peer.inertia_, rtol=1e-13)


@METRICS
def test_update_is_the_numpy_mean_or_median(metric: Metric) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    labels = np.concatenate([np.repeat(np.arange(5), [1, 2, 3, 4, 7]), rng.integers(5, 7, size=183)])
    centers = update(torch.tensor(x), torch.tensor(labels), torch.zeros(7, 3, dtype=torch.float64), metric)
    center = np.mean if metric is SQUARED_EUCLIDEAN else np.median
    expected = np.stack([center(x[labels == k], axis=0) for k in range(7)])
    np.testing.assert_allclose(centers, expected, rtol=1e-14, atol=1e-15)


@METRICS
def test_update_leaves_the_centre_of_an_empty_cluster_alone(metric: Metric) -> None:
    x = torch.tensor([[0.0], [2.0], [10.0]])
    centers = update(x, torch.tensor([0, 0, 2]), torch.tensor([[5.0], [6.0], [7.0]]), metric)
    assert centers.tolist() == [[1], [6], [10]]


# Brute force


@ALGORITHMS
@pytest.mark.parametrize("num_features", [1, 2])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_restarts_find_the_optimum_over_all_partitions(
    algorithm: Algorithm, metric: Metric, num_features: int, k: int
) -> None:
    for seed in range(2):
        x = np.random.default_rng(seed).normal(size=(7, num_features))
        optimum = global_optimum(x, k, metric)
        best = algorithm(x, k, num_starts=30, generator=seeded(seed))
        assert best.objective[-1].item() == pytest.approx(optimum, rel=1e-13)
        for rows in itertools.combinations(range(7), k):
            from_rows = quiet_lloyd(torch.tensor(x), torch.tensor(x[list(rows)]), metric)
            assert from_rows.objective[-1] >= optimum * (1 - 1e-13)


# Laws of the iteration

# A coarse grid makes ties and duplicates the rule; thirds and the offset 0.7 make them inexact.
GRIDS = st.tuples(st.sampled_from([1.0, 1 / 3, 1e-3, 1e4]), st.sampled_from([0.0, 0.7]))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Draw data and starting centres: rows of the data in some order, some of them pushed away."""
    num_rows, num_features = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    k = draw(st.integers(1, min(num_rows, 5)))
    scale, offset = draw(GRIDS)
    entries = draw(st.lists(st.integers(0, 9), min_size=num_rows * num_features, max_size=num_rows * num_features))
    x = torch.tensor(entries, dtype=torch.float64).reshape(num_rows, num_features) * scale + offset
    pushes = draw(st.lists(st.sampled_from([0, 0, 1, 50]), min_size=k, max_size=k))
    centers = x[draw(st.permutations(range(num_rows)))[:k]] + torch.tensor(pushes)[:, None] * scale
    assume(len(x.unique(dim=0)) >= k)
    return x, centers


@METRICS
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])
@given(problem=problems())
def test_every_run_descends_to_a_fixed_point(metric: Metric, problem: tuple[Tensor, Tensor]) -> None:
    x, centers = problem
    result = quiet_lloyd(x, centers, metric)
    assert result.converged

    rounding = 1e-13 * deviations(x, result.labels, centers, metric.power).sum()
    assert (result.objective.diff() <= rounding).all()
    assert result.objective[-1] == deviations(x, result.labels, result.centers, metric.power).sum()

    assert sorted(set(result.labels.tolist())) == list(range(len(centers)))
    own = deviations(x, result.labels, result.centers, metric.power)
    to_each = (x[:, None] - result.centers).abs().pow(metric.power).sum(-1)
    assert (own <= to_each.amin(1) * (1 + 1e-14)).all()

    again = lloyd(x, result.centers, metric)
    assert torch.equal(again.labels, result.labels)
    assert torch.equal(again.centers, result.centers)
    assert len(again.objective) == 1

    center = np.mean if metric is SQUARED_EUCLIDEAN else np.median
    for k in range(len(centers)):
        expected = center(x[result.labels == k].numpy(), axis=0)
        np.testing.assert_allclose(result.centers[k], expected, rtol=1e-14, atol=1e-15)


@METRICS
@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])
@given(problem=problems())
def test_each_half_step_minimises(metric: Metric, problem: tuple[Tensor, Tensor]) -> None:
    """No single label moved, and no centre shifted, lowers J below what the half-step reached."""
    x, centers = problem
    labels = assign(x, centers, metric.power)
    assigned = deviations(x, labels, centers, metric.power)
    for k in range(len(centers)):
        others = deviations(x, torch.full_like(labels, k), centers, metric.power)
        assert (assigned <= others * (1 + 1e-14)).all()
    updated = update(x, labels, centers, metric)
    reached = deviations(x, labels, updated, metric.power).sum()
    assert reached <= assigned.sum() * (1 + 1e-14)
    for shift in (-0.5, -1e-3, 1e-3, 0.5):
        for d in range(x.shape[1]):
            shifted = updated.clone()
            shifted[:, d] += shift
            assert reached <= deviations(x, labels, shifted, metric.power).sum() * (1 + 1e-14)


@METRICS
def test_stopping_early_is_a_value_and_a_warning(metric: Metric) -> None:
    x = torch.arange(40, dtype=torch.float64)[:, None]
    with pytest.warns(ConvergenceWarning, match="after 2 steps"):
        result = lloyd(x, x[:3], metric, max_steps=2)
    assert not result.converged
    assert len(result.objective) == 2
    assert result.objective[-1] == deviations(x, result.labels, result.centers, metric.power).sum()
    assert torch.equal(result.centers, update(x, result.labels, result.centers, metric))


@ALGORITHMS
def test_the_front_door_warns_of_stopping_early(algorithm: Algorithm, metric: Metric) -> None:
    x = torch.randn(200, 2, generator=seeded(0), dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="after 1 steps"):
        assert not algorithm(x, 5, num_starts=3, generator=seeded(0), max_steps=1).converged


# Degenerate data


@METRICS
def test_an_empty_cluster_takes_the_farthest_row_and_says_so(metric: Metric) -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0]])
    with pytest.warns(RuntimeWarning, match="cluster 1 is empty at step 1: it takes row 4"):
        result = lloyd(x, torch.tensor([[1.0], [1000.0]]), metric)
    assert result.converged
    assert result.labels.tolist() == [0, 0, 0, 1, 1]


@METRICS
def test_several_empty_clusters_are_filled_one_by_one(metric: Metric) -> None:
    """The rows farthest from the common centre come in pairs: moving a pair at once would empty its old cluster."""
    x = torch.tensor([[0.0], [1.0], [100.0], [101.0]])
    with pytest.warns(RuntimeWarning, match="is empty") as caught:
        result = lloyd(x, torch.tensor([[50.0], [1e4], [1e4], [1e4]]), metric)
    assert [str(warning.message).split(" is")[0] for warning in caught] == ["cluster 1", "cluster 2", "cluster 3"]
    assert result.objective[-1] == 0
    assert sorted(result.labels.tolist()) == [0, 1, 2, 3]


@ALGORITHMS
@pytest.mark.parametrize("k", [3, 4])
def test_more_clusters_than_distinct_rows_is_an_error(algorithm: Algorithm, metric: Metric, k: int) -> None:
    x = [[0.1, 0.3], [0.7, 0.9]] * 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(ValueError, match=rf"every row lies on one of 2 centres.*{k} clusters"):
            algorithm(x, k, generator=seeded(0))


@ALGORITHMS
def test_as_many_clusters_as_distinct_rows(algorithm: Algorithm, metric: Metric) -> None:
    x = torch.tensor([[0.1, 0.3], [0.7, 0.9], [0.7, 0.3]] * 10, dtype=torch.float64)
    result = algorithm(x, 3, generator=seeded(0))
    assert result.objective[-1] == 0
    assert torch.equal(result.centers[result.labels], x)


@METRICS
@pytest.mark.parametrize("num_copies", range(1, 40))
def test_the_centre_of_equal_rows_is_that_row(metric: Metric, num_copies: int) -> None:
    """The plain mean of three copies of 0.1 is not 0.1, and would leave a distance where there is none."""
    x = torch.tensor([[0.1, 0.7 + 1e6]], dtype=torch.float64).expand(num_copies, 2)
    assert torch.equal(update(x, torch.zeros(num_copies, dtype=torch.long), x[:1] + 1, metric), x[:1])


@ALGORITHMS
def test_one_cluster_is_the_mean_or_the_median(algorithm: Algorithm, metric: Metric) -> None:
    x = blobs(0)
    result = algorithm(x, 1, num_starts=1, generator=seeded(0))
    center = np.mean if metric is SQUARED_EUCLIDEAN else np.median
    np.testing.assert_allclose(result.centers[0], center(x.numpy(), axis=0), rtol=1e-14)
    assert result.converged
    assert not result.labels.any()


@ALGORITHMS
def test_as_many_clusters_as_rows(algorithm: Algorithm, metric: Metric) -> None:
    x = torch.randn(30, 2, generator=seeded(3), dtype=torch.float64)
    result = algorithm(x, 30, num_starts=1, generator=seeded(0))
    assert result.objective[-1] == 0
    assert torch.equal(result.centers[result.labels], x)


@ALGORITHMS
def test_an_offset_of_a_million_changes_nothing(algorithm: Algorithm, metric: Metric) -> None:
    x = blobs(1, num_features=3)
    near = algorithm(x, 5, generator=seeded(0))
    far = algorithm(x + 1e6, 5, generator=seeded(0))
    assert torch.equal(near.labels, far.labels)
    # A centre is rounded to half a unit in the last place of 1e6.
    torch.testing.assert_close(far.centers - 1e6, near.centers, rtol=0, atol=np.spacing(1e6))
    torch.testing.assert_close(far.objective, near.objective, rtol=1e-9, atol=0)


@METRICS
def test_clusters_narrow_beside_the_spread_are_told_apart(metric: Metric) -> None:
    """Two pairs lie 1e-4 apart and two million from the rest: the expanded square would be all rounding."""
    x = torch.tensor([[-1e6], [1e6], [1e6 + 1e-6], [1e6 + 1e-4], [1e6 + 1.01e-4]], dtype=torch.float64)
    result = lloyd(x, x[[0, 1, 3]], metric)
    assert result.labels.tolist() == [0, 1, 1, 2, 2]


@ALGORITHMS
def test_a_constant_column_changes_nothing(algorithm: Algorithm, metric: Metric) -> None:
    x = blobs(2)
    with_constant = torch.cat([x, torch.full((len(x), 1), 0.1, dtype=x.dtype)], 1)
    plain = algorithm(x, 3, generator=seeded(0))
    result = algorithm(with_constant, 3, generator=seeded(0))
    assert torch.equal(result.labels, plain.labels)
    assert (result.centers[:, 2] == 0.1).all()


@ALGORITHMS
def test_single_precision_stays_single(algorithm: Algorithm, metric: Metric) -> None:
    x = blobs(4)
    double = algorithm(x, 3, generator=seeded(0))
    single = algorithm(x.float(), 3, generator=seeded(0))
    assert single.centers.dtype == single.objective.dtype == torch.float32
    assert torch.equal(single.labels, double.labels)
    torch.testing.assert_close(single.objective[-1].double(), double.objective[-1], rtol=1e-5, atol=0)


# Seeding and reproducibility


@ALGORITHMS
def test_the_generator_is_the_only_randomness(algorithm: Algorithm, metric: Metric) -> None:
    x = torch.randn(100, 2, generator=seeded(0), dtype=torch.float64)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    first = algorithm(x, 6, num_starts=2, generator=seeded(7))
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    second = algorithm(x, 6, num_starts=2, generator=seeded(7))
    assert torch.equal(first.labels, second.labels)
    assert torch.equal(first.objective, second.objective)


@pytest.mark.parametrize("seeds", [kmeans_plusplus, kmedians_plusplus])
def test_seeds_are_distinct_rows_one_in_each_far_blob(seeds: Callable[..., Tensor]) -> None:
    """The odds of two seeds in one blob are at most about 1e-4 in L1 and 1e-8 squared, before the greedy choice."""
    x = torch.cat([1e4 * k + torch.rand(50, 2, generator=seeded(k), dtype=torch.float64) for k in range(4)])
    for seed in range(20):
        centers = seeds(x, 4, seeded(seed))
        assert sorted((centers[:, 0] // 1e4).tolist()) == [0, 1, 2, 3]
        assert all((x == center).all(1).any() for center in centers)


@pytest.mark.parametrize("seeds", [kmeans_plusplus, kmedians_plusplus])
def test_seeds_far_from_zero_are_the_same_rows(seeds: Callable[..., Tensor]) -> None:
    x = (torch.randn(200, 2, generator=seeded(0), dtype=torch.float64) * 1024).round() / 2**20  # exact after the shift
    for seed in range(5):
        assert torch.equal(seeds(x + 2.0**20, 6, seeded(seed)) - 2.0**20, seeds(x, 6, seeded(seed)))


@pytest.mark.parametrize("power", [1, 2])
def test_the_second_seed_is_drawn_by_its_distance(power: int) -> None:
    """The pair of first and second seed follows the greedy law, worked out by enumeration."""
    x = torch.tensor([[0.0, 0.0], [1.0, 3.0], [2.0, 2.0], [3.0, -4.5]], dtype=torch.float64)
    seeds = kmeans_plusplus if power == 2 else kmedians_plusplus
    distance = (x[:, None] - x).abs().pow(power).sum(-1)
    law = torch.zeros(4, 4, dtype=torch.float64)
    for first in range(4):
        chances = distance[first] / distance[first].sum()
        for candidates in itertools.product(range(4), repeat=2):  # 2 + int(log 2) of them
            left = [torch.minimum(distance[first], distance[c]).sum().item() for c in candidates]
            second = candidates[int(np.argmin(left))]
            law[first, second] += chances[list(candidates)].prod() / 4
    generator, num_draws = seeded(0), 2000
    counts = torch.zeros(4, 4, dtype=torch.float64)
    for _ in range(num_draws):
        first, second = (int(row) for row in seeds(x, 2, generator)[:, 0])  # the first column numbers the rows
        counts[first, second] += 1
    assert (counts[law == 0] == 0).all()
    errors = (counts / num_draws - law)[law > 0] / (law * (1 - law) / num_draws).sqrt()[law > 0]
    assert (
        errors.abs().max() < 5
    )  # standard errors: each cell fails by chance once in 1.7 million, and the seed is fixed


# Errors


@ALGORITHMS
def test_errors_say_what_is_wrong(algorithm: Algorithm, metric: Metric) -> None:
    x = blobs(0)
    holed = x.clone()
    holed[4, 1] = torch.nan
    with pytest.raises(ValueError, match=r"x\[4, 1\] is nan"):
        algorithm(holed, 2, generator=seeded(0))
    with pytest.raises(ValueError, match=r"shape \(N, D\)"):
        algorithm(x[:, 0], 2, generator=seeded(0))
    with pytest.raises(TypeError, match="numbers"):
        algorithm([["a", "b"]], 1, generator=seeded(0))
    with pytest.raises(ValueError, match="at least 1, not 0"):
        algorithm(x, 0, generator=seeded(0))
    with pytest.raises(ValueError, match="91 components need"):
        algorithm(x, 91, generator=seeded(0))
    with pytest.raises(TypeError, match="integer"):
        algorithm(x, 2.0, generator=seeded(0))
    with pytest.raises(ValueError, match="num_starts must be at least 1"):
        algorithm(x, 2, num_starts=0, generator=seeded(0))
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        algorithm(x, 2, max_steps=0, generator=seeded(0))
    with pytest.raises(ValueError, match="overflows"):
        algorithm(x / x.abs().max() * 1e307, 2, generator=seeded(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squares_that_underflow_are_said_to_and_no_others(dtype: torch.dtype) -> None:
    x = blobs(0).to(dtype)
    x = x / x.abs().max()
    root = torch.finfo(dtype).tiny ** 0.5
    for scale in (3 * root, root / 10, root / 1e3, root / 1e6, root / 1e15):
        found = kmedians(x * scale, 3, generator=seeded(0))
        assert torch.equal(found.labels, kmedians(x, 3, generator=seeded(0)).labels)
        with pytest.raises(ValueError, match=f"underflows {dtype}: rescale the weights or x, whose largest"):
            kmeans(x * scale, 3, generator=seeded(0))
    kmeans(x * root * 1e3, 3, generator=seeded(0))
    repeated = x[:3].repeat(4, 1) * root / 10
    assert kmeans(repeated, 3, generator=seeded(0)).objective[-1] <= torch.finfo(dtype).tiny
    with pytest.raises(ValueError, match="too few distinct rows"):
        kmeans(repeated, 4, generator=seeded(0))


@pytest.mark.parametrize("algorithm", [kmeans, kmedians])
@pytest.mark.parametrize("scale", [1e-310, 1e-300, 1e300])
def test_the_unit_of_the_weights_does_not_matter(algorithm: Algorithm, scale: float) -> None:
    x = blobs(0)
    weights = torch.full((len(x),), scale, dtype=torch.float64)
    found, expected = (algorithm(x, 3, generator=seeded(0), weights=own) for own in (weights, None))
    assert torch.equal(found.labels, expected.labels)
    assert torch.allclose(found.centers, expected.centers, rtol=1e-12)


def test_starting_centres_must_fit_the_data() -> None:
    x = blobs(0)
    with pytest.raises(ValueError, match=r"shape \(K, 2\), not \(3, 1\)"):
        lloyd(x, torch.zeros(3, 1), SQUARED_EUCLIDEAN)
    with pytest.raises(ValueError, match=r"centers\[1, 0\] is inf"):
        lloyd(x, torch.tensor([[0.0, 0.0], [torch.inf, 0.0]]), SQUARED_EUCLIDEAN)
    with pytest.raises(ValueError, match="92 components need"):
        lloyd(x, torch.zeros(92, 2), MANHATTAN)


class DriftingMeans(Means):
    """Planted fault: centres that drift off by 1e-6 more at each move."""

    def move(self, rows: Tensor, before: Tensor, labels: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        moved, fall = super().move(rows, before, labels, centers)
        return moved + 1e-6, fall


class BoastfulMedians(Medians):
    """Planted fault: falls of J that are too large by 1e-6."""

    def move(self, rows: Tensor, before: Tensor, labels: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        moved, fall = super().move(rows, before, labels, centers)
        return moved, fall + 1e-6


@pytest.mark.parametrize(
    "faulty", [Metric(2, DriftingMeans, kmeans_plusplus), Metric(1, BoastfulMedians, kmedians_plusplus)]
)
def test_steps_that_do_not_lower_the_objective_by_what_they_say_are_reported_as_a_bug(faulty: Metric) -> None:
    x = torch.arange(40, dtype=torch.float64)[:, None] / 40
    with pytest.raises(RuntimeError, match=r"lowered it by .* bug"):
        quiet_lloyd(x, x[:3], faulty, max_steps=5)


# Rows and centres that do not move are not looked at again


def plain_lloyd(x: Tensor, centers: Tensor, metric: Metric) -> tuple[Tensor, Tensor, list[float]]:
    """Return centres, labels and objectives of the two half-steps over all rows, the second by numpy."""
    labels, trace = torch.full((len(x),), -1), []
    center = np.mean if metric.power == 2 else np.median
    while not torch.equal(labels, (nearest := (x[:, None] - centers).abs().pow(metric.power).sum(-1).argmin(1))):
        labels = nearest
        clusters = [x[labels == k].numpy() for k in range(len(centers))]
        centers = torch.stack([torch.as_tensor(np.asarray(center(rows, axis=0), rows.dtype)) for rows in clusters])
        trace.append(
            sum(float((abs(rows - c) ** metric.power).sum()) for rows, c in zip(clusters, centers.numpy(), strict=True))
        )
    return centers, labels, trace


FEW = pytest.mark.parametrize("few", [0.0, 1 / 32, 2.0], ids=["never by margins", "late by margins", "by margins"])


@METRICS
@FEW
@pytest.mark.parametrize("chunk", [1, 7, 2**18])
@pytest.mark.parametrize(("offset", "dtype"), [(0.0, torch.float64), (1e8, torch.float64), (0.0, torch.float32)])
@pytest.mark.parametrize("num_features", [1, 2, 9])
def test_steps_over_few_rows_are_those_over_all(
    metric: Metric,
    chunk: int,
    offset: float,
    dtype: torch.dtype,
    num_features: int,
    few: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mixproof.inference.nearest.CHUNK", chunk)
    monkeypatch.setattr("mixproof.inference.nearest.FEW", few)
    x = blobs(5, 240, num_features, 3)
    x[::3] = x[::3] * 0.5 + 1  # wide and overlapping
    x = (torch.cat([x, x[:40]]) + offset).to(dtype)
    centers = x[[3, 30, 60, 90, 120]]
    expected_centers, expected_labels, trace = plain_lloyd(x, centers, metric)
    assert len(trace) > 3
    result = lloyd(x, centers, metric)
    assert torch.equal(result.labels, expected_labels)
    eps = torch.finfo(dtype).eps
    assert (result.centers - expected_centers).abs().max() <= 4 * eps * x.abs().max()
    assert len(result.objective) == len(trace)
    # Moving a centre by its rounding moves J by twice the sum of the distances times that, at most.
    rounding = 64 * eps * trace[0] + 16 * eps * x.abs().max() * len(x) * (trace[0] / len(x)) ** 0.5 * num_features
    assert (result.objective.double() - torch.tensor(trace, dtype=torch.float64)).abs().max() <= rounding


@METRICS
@settings(max_examples=300, deadline=None, derandomize=True)
@given(problem=problems(), seed=st.integers(0, 99), few=st.sampled_from([0.0, 2.0]))
def test_labels_are_those_of_all_distances_wherever_the_centres_go(
    metric: Metric, problem: tuple[Tensor, Tensor], seed: int, few: float
) -> None:
    """Also at ties, which the rule breaks in favour of the first centre, and between equal rows and equal centres."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixproof.inference.nearest.FEW", few)
        _follow_the_centres(metric, *problem, seed)


def _follow_the_centres(metric: Metric, x: Tensor, centers: Tensor, seed: int) -> None:
    nearest, generator = Nearest(x, metric.power), seeded(seed)
    labels = nearest.assign(centers)
    assert torch.equal(labels, assign(x, centers, metric.power))
    for scale in (0.0, 1e-16, 1e-3, 1.0, 1.0, 0.1):
        before = labels.clone()
        centers = centers + scale * torch.randn(centers.shape, generator=generator, dtype=torch.float64).round(
            decimals=1
        )
        rows, old = nearest.reassign(labels, centers)
        assert torch.equal(labels, assign(x, centers, metric.power))
        assert torch.equal(rows, (labels != before).nonzero()[:, 0])
        assert torch.equal(old, before[rows])


@METRICS
@pytest.mark.parametrize(("num_rows", "num_threads"), [(1001, 2), (1001, 3), (5, 4), (5, 8)])
def test_every_row_has_its_label_on_several_cores(metric: Metric, num_rows: int, num_threads: int) -> None:
    """Each core has a lane of rows, the last of which is not full, or is empty."""
    x, before = blobs(5, 1002, 3, 3)[-num_rows:], torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        nearest = Nearest(x, metric.power)
        labels = nearest.assign(x[:3])
        assert torch.equal(labels, assign(x, x[:3], metric.power))
        rows, _ = nearest.reassign(labels, x[-3:])
        assert torch.equal(labels, assign(x, x[-3:], metric.power))
        assert 0 <= rows.min() <= rows.max() < num_rows
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("decimals", [1, 12])
def test_the_objective_about_medians_follows_from_the_rows_between_them(
    decimals: int, weighted: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where many rows lie on a median, and where it lies between two."""
    x = (100 + torch.randn(4000, 3, generator=seeded(0), dtype=torch.float64)).round(decimals=decimals).to(dtype)
    weights = torch.rand(4000, generator=seeded(1), dtype=torch.float64).sub(0.2).clamp_min(0).to(dtype)
    medians = Medians(x, weights := weights if weighted else torch.ones_like(weights))
    labels = torch.randint(3, (4000,), generator=seeded(2))
    centers, looks = medians.update(labels, x[:3]), []

    def counted(rows: Tensor, labels: Tensor, centers: Tensor, power: int) -> Tensor:
        looks.append(len(rows))
        return deviations(rows, labels, centers, power)

    monkeypatch.setattr("mixproof.inference.medians.deviations", counted)
    for step in range(20):
        rows = torch.arange(step, 4000, 97)
        before = labels[rows]
        labels[rows] = (before + 1 + step % 2) % 3
        centers = medians.move(rows, before, labels, centers)[0]
        expected = weights.double() @ deviations(x.double(), labels, centers.double(), 1)
        tolerance = 64 * torch.finfo(dtype).eps
        torch.testing.assert_close(medians.objective.double(), expected, rtol=tolerance, atol=0)
    assert max(looks) < 100


@pytest.mark.parametrize("far", [0.0, 1e3, 1e12])
def test_means_are_exact_wherever_the_centres_were(far: float) -> None:
    """The rows are multiples of 2^-20 about 0, so that their sums are exact; the centres come from far off."""
    x = (torch.randn(1000, 2, generator=seeded(0), dtype=torch.float64) * 2**20).round() / 2**20
    labels = torch.arange(1000) % 3
    means_of = Means(x, torch.ones_like(x[:, 0]))
    found = means_of.update(labels, torch.full((3, 2), far, dtype=torch.float64))
    means = torch.stack([x[labels == k].sum(0) / (labels == k).sum() for k in range(3)])
    torch.testing.assert_close(found, means, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(means_of.objective, (x - means[labels]).square().sum(), rtol=1e-13, atol=0)


def test_labels_that_nothing_vouches_for_are_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted faults that the test above would see: no second look where rounding decides, and gaps too wide."""
    x = torch.arange(10, dtype=torch.float64)[:, None]
    monkeypatch.setattr("mixproof.inference.nearest.FEW", 2.0)
    for power in (1, 2):
        nearest = Nearest(x, power)
        labels = nearest.assign(x[[0, 9]])
        for _ in range(2):
            nearest.reassign(labels, x[[0, 9]])
        nearest.margins.safe_until += 10
        nearest.reassign(labels, x[[0, 5]])
        assert not torch.equal(labels, assign(x, x[[0, 5]], power))
    monkeypatch.setattr(Nearest, "_decide", lambda *args: None)
    for power in (1, 2):
        assert not torch.equal(Nearest(x, power).assign(x[[0, 8]]), assign(x, x[[0, 8]], power))


@METRICS
@FEW
@pytest.mark.parametrize("outlier", [1e2, 1e5, 1e20, 1e150])
def test_an_outlier_blurs_no_label(metric: Metric, outlier: float, few: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what single precision is relative to: the rows that it can tell apart become none."""
    monkeypatch.setattr("mixproof.inference.nearest.FEW", few)
    x = torch.randn(1000, 3, generator=seeded(0), dtype=torch.float64)
    x[0] = outlier
    nearest, labels = Nearest(x, metric.power), torch.full((1000,), -1)
    for seed in range(5):
        centers = torch.randn(5, 3, generator=seeded(seed), dtype=torch.float64)
        if seed == 0:
            labels = nearest.assign(centers)
        else:
            nearest.reassign(labels, centers)
        assert torch.equal(labels, assign(x, centers, metric.power))


# Row weights


@METRICS
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])
@given(problem=problems(), data=st.data())
def test_whole_weights_are_repeats(metric: Metric, problem: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    """From starts that leave no cluster empty: such a cluster takes a row, and there all its copies."""
    x, centers = problem
    weights = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=len(x), max_size=len(x))))
    labels = assign(x, centers, metric.power)
    assume(len(labels[weights > 0].unique()) == len(centers))
    repeated = x.repeat_interleave(weights, 0)
    by_weights = update(x, labels, centers, metric, weights.double())
    by_repeats = update(repeated, labels.repeat_interleave(weights), centers, metric)
    torch.testing.assert_close(by_weights, by_repeats, rtol=1e-14, atol=1e-15)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weighted, expected = lloyd(x, centers, metric, weights=weights), lloyd(repeated, centers, metric)
    # A mean rounded one way or the other decides a tie; medians of a grid are not rounded but at thirds.
    own = (x - weighted.centers[weighted.labels]).abs().pow(metric.power).sum(1)
    assert torch.isclose(weighted.objective[-1], (weights * own).sum(), rtol=1e-14, atol=0)
    tied = (
        (x[:, None] - expected.centers).abs().pow(metric.power).sum(-1).sort(1).values.diff(dim=1)[:, :1] < 1e-9
    ).any()
    if not caught and not tied and torch.equal(weighted.labels.repeat_interleave(weights), expected.labels):
        torch.testing.assert_close(weighted.centers, expected.centers, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(weighted.objective[-1], expected.objective[-1], rtol=1e-12, atol=1e-14)


@METRICS
@pytest.mark.parametrize("seed", range(8))
def test_whole_weights_are_repeats_all_the_way(metric: Metric, seed: int) -> None:
    x = torch.randn(150, 3, generator=seeded(seed), dtype=torch.float64)
    weights = torch.randint(0, 4, (150,), generator=seeded(seed))
    centers = torch.randn(4, 3, generator=seeded(seed + 50), dtype=torch.float64)
    weighted = lloyd(x, centers, metric, weights=weights)
    repeated = lloyd(x.repeat_interleave(weights, 0), centers, metric)
    assert torch.equal(weighted.labels.repeat_interleave(weights), repeated.labels)
    torch.testing.assert_close(weighted.centers, repeated.centers, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(weighted.objective, repeated.objective, rtol=1e-13, atol=0)
    thirds = lloyd(x, centers, metric, weights=weights.double() / 3)
    assert torch.equal(thirds.labels, weighted.labels)
    torch.testing.assert_close(thirds.centers, weighted.centers, rtol=1e-13, atol=1e-14)
    if metric is SQUARED_EUCLIDEAN:
        peer = KMeans(4, init=centers.numpy(), n_init=1, tol=0).fit(x.numpy(), sample_weight=weights.numpy())
        assert np.array_equal(peer.labels_[weights > 0], weighted.labels[weights > 0])
        np.testing.assert_allclose(weighted.centers, peer.cluster_centers_, rtol=1e-12)


@METRICS
def test_equal_weights_of_any_size_have_the_midpoint_of_the_middle_rows(metric: Metric) -> None:
    """Ten times 0.1 is 1 only to rounding, and half of it is five rows."""
    x = torch.arange(10, dtype=torch.float64)[:, None] ** 2
    for weight in (0.1, 1 / 3, 1e-200, 1e200):
        centers = update(x, torch.zeros(10, dtype=torch.long), x[:1], metric, torch.full((10,), weight, dtype=x.dtype))
        assert centers.item() == pytest.approx(28.5 if metric is SQUARED_EUCLIDEAN else 20.5, rel=1e-15)


@ALGORITHMS
def test_a_row_of_weight_zero_moves_nothing(algorithm: Algorithm, metric: Metric) -> None:
    x = blobs(3)
    far = torch.cat([x, torch.full((30, 2), 1e6, dtype=x.dtype)])
    weights = torch.cat([torch.ones(90), torch.zeros(30)])
    for seed in range(5):
        near, result = (
            algorithm(x, 4, generator=seeded(seed)),
            algorithm(far, 4, generator=seeded(seed), weights=weights),
        )
        assert torch.equal(result.labels[:90], near.labels)
        torch.testing.assert_close(result.centers, near.centers, rtol=1e-13, atol=0)
        assert torch.equal(result.labels, assign(far, result.centers, metric.power))


@ALGORITHMS
def test_weights_must_fit(algorithm: Algorithm, metric: Metric) -> None:
    x = blobs(0)
    with pytest.raises(ValueError, match=r"weights must have shape \(90,\)"):
        algorithm(x, 2, generator=seeded(0), weights=torch.ones(3))
    with pytest.raises(ValueError, match=r"weights\[0\] is -1"):
        algorithm(x, 2, generator=seeded(0), weights=-torch.ones(90))
    with pytest.raises(ValueError, match="2 clusters need at least as many rows that count, and 1 have weight above 0"):
        algorithm(x, 2, generator=seeded(0), weights=(torch.arange(90) == 3).double())


@pytest.mark.parametrize("power", [1, 2])
def test_weighted_seeds_follow_the_law_of_repeated_rows(power: int) -> None:
    """The pair of first and second seed, against the greedy law over weighted rows, worked out by enumeration."""
    x = torch.tensor([[0.0, 0.0], [1.0, 3.0], [2.0, 2.0], [3.0, -4.5], [9.0, 9.0]], dtype=torch.float64)
    weights = torch.tensor([1.0, 3.0, 0.5, 2.0, 0.0], dtype=torch.float64)
    seeds = kmeans_plusplus if power == 2 else kmedians_plusplus
    distance = (x[:, None] - x).abs().pow(power).sum(-1)
    law = torch.zeros(5, 5, dtype=torch.float64)
    for first in range(5):
        chances = weights * distance[first] / (weights @ distance[first])
        for candidates in itertools.product(range(5), repeat=2):
            left = [(weights @ torch.minimum(distance[first], distance[c])).item() for c in candidates]
            second = candidates[int(np.argmin(left))]
            law[first, second] += chances[list(candidates)].prod() * weights[first] / weights.sum()
    generator, num_draws = seeded(1), 2000
    counts = torch.zeros(5, 5, dtype=torch.float64)
    for _ in range(num_draws):
        first, second = (row[0] for row in seeds(x, 2, generator, weights))
        counts[(x[:, 0] == first).nonzero()[0, 0], (x[:, 0] == second).nonzero()[0, 0]] += 1
    assert (counts[law == 0] == 0).all()
    errors = (counts / num_draws - law)[law > 0] / (law * (1 - law) / num_draws).sqrt()[law > 0]
    assert errors.abs().max() < 5  # standard errors, as above
