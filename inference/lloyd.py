r"""Lloyd's algorithm: K-means and K-medians, one loop with two metrics.

Both lower

.. math:: J(X, Z, \mu) = \sum_n \sum_k z_{nk} \sum_d |x_{nd} - \mu_{kd}|^p

by turns: each row goes to its nearest centre, and each centre to the point that minimises J over its rows. For p = 2
that is the mean (Lloyd, "Least squares quantization in PCM", 1982, Method I), for p = 1 the coordinate-wise median
(problem 1 of the exercise sheet). Neither half-step raises J, and there are finitely many partitions, so a fixed point
is reached; it is a local optimum, hence the restarts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference.seeding import kmeans_plusplus, kmedians_plusplus
from mixproof.inference.validation import check_data
from mixproof.models.initial import check_num_components


class Metric(NamedTuple):
    """What K-means and K-medians differ in."""

    power: int
    """p: the distance of a row from a centre is the sum over d of abs(x_d - mu_d)^p."""
    center: Callable[[Tensor], Tensor]
    """The point (D,) with the least total distance from the given rows (M, D), M >= 1."""
    seeds: Callable[[Tensor, int, torch.Generator], Tensor]
    """Centres (K, D) to start from, given the data, K and the source of randomness."""


class Clustering(NamedTuple):
    """The result of Lloyd's algorithm."""

    centers: Tensor
    """(K, D), the mean or the coordinate-wise median of the rows with each label."""
    labels: Tensor
    """(N,), integers: the cluster of each row; if converged, a centre nearest to it."""
    objective: Tensor
    """(num_steps,), J after each step, never rising; the last belongs to these centers and labels."""
    converged: bool
    """Whether another step would change nothing."""


def mean(rows: Tensor) -> Tensor:
    """Return the mean (D,) of rows (M, D), accurate also where they lie far from zero."""
    rough = rows.mean(0)
    return rough + (rows - rough).mean(0)


def median(rows: Tensor) -> Tensor:
    """Return the coordinate-wise median (D,) of rows (M, D); of an even number, the midpoint of the middle two."""
    rows = rows.contiguous()  # torch 2.13 returns arbitrary memory for the median of an expanded tensor
    lower = rows.median(0).values
    upper = -(-rows).median(0).values  # torch takes the lower of the middle two, which reflection makes the upper
    return (lower + upper) / 2


SQUARED_EUCLIDEAN = Metric(2, mean, kmeans_plusplus)
MANHATTAN = Metric(1, median, kmedians_plusplus)


def assign(x: Tensor, centers: Tensor, metric: Metric) -> Tensor:
    """Return the labels (N,) of the nearest centres: the first half-step; of equally near centres, the first.

    Args:
        x: (N, D), the data.
        centers: (K, D).
        metric: ``SQUARED_EUCLIDEAN`` or ``MANHATTAN``.
    """
    # From differences: the expanded square would lose clusters that are narrow beside the spread of the data. The p-th
    # power is monotone and may be left out.
    distances = torch.cdist(x, centers, p=metric.power, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.argmin(1)


def update(x: Tensor, labels: Tensor, centers: Tensor, metric: Metric) -> Tensor:
    """Return the centres (K, D) with the least total distance from their rows: the second half-step.

    Args:
        x: (N, D), the data.
        labels: (N,), integers from 0 to K - 1.
        centers: (K, D), the present centres; one without rows stays where it is.
        metric: ``SQUARED_EUCLIDEAN`` or ``MANHATTAN``.
    """
    counts = labels.bincount(minlength=len(centers)).tolist()
    clusters = x[labels.argsort(stable=True)].split(counts)
    return torch.stack([metric.center(rows) if len(rows) else centers[k] for k, rows in enumerate(clusters)])


def deviations(x: Tensor, labels: Tensor, centers: Tensor, metric: Metric) -> Tensor:
    """Return the distance (N,) of each row from the centre of its cluster; the objective J is their sum.

    Args:
        x: (N, D), the data.
        labels: (N,), integers from 0 to K - 1.
        centers: (K, D).
        metric: ``SQUARED_EUCLIDEAN`` (distances are squared) or ``MANHATTAN``.
    """
    return (x - centers[labels]).abs().pow(metric.power).sum(1)


def lloyd(x: Tensor, centers: Tensor, metric: Metric, *, max_steps: int = 300) -> Clustering:
    """Run Lloyd's algorithm from given centres until no label changes.

    A cluster that loses all its rows is given the row farthest from its own centre, with a warning.

    Args:
        x: (N, D), the data; computed in their precision, integers as float64.
        centers: (K, D), where to start.
        metric: ``SQUARED_EUCLIDEAN`` or ``MANHATTAN``.
        max_steps: how many pairs of half-steps at most.

    Returns:
        centers: (K, D), the mean or the coordinate-wise median of the rows with each label.
        labels: (N,), the cluster of each row.
        objective: (num_steps,), J after each step.
        converged: whether a fixed point was reached; a ConvergenceWarning says so if not.

    Raises:
        TypeError: x does not hold numbers.
        ValueError: x is not a finite (N, D), centers do not fit it, fewer than K rows are distinct, or J overflows.
    """
    x = check_data(x).detach()
    centers = torch.as_tensor(centers, dtype=x.dtype, device=x.device).detach()
    if centers.ndim != 2 or centers.shape[1] != x.shape[1]:
        raise ValueError(f"centers must have shape (K, {x.shape[1]}), not {tuple(centers.shape)}")
    if not centers.isfinite().all():
        k, d = (~centers.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"centers[{k}, {d}] is {centers[k, d].item()}: every starting centre must be finite")
    check_num_components(len(centers), len(x))
    clustering = _lloyd(x, centers, metric, max_steps)
    _warn_unless_converged(clustering)
    return clustering


def kmeans(x: Tensor, k: int, *, num_starts: int = 10, generator: torch.Generator, max_steps: int = 300) -> Clustering:
    """Cluster rows about k means: the least within-cluster sum of squares over several starts of Lloyd's algorithm.

    Lloyd 1982, Method I, from the seeds of Arthur and Vassilvitskii 2007, section 2.2.

    Args:
        x: (N, D), the data; computed in their precision, integers as float64.
        k: the number of clusters.
        num_starts: how many seedings; the result with the least objective is returned.
        generator: the only source of randomness.
        max_steps: how many steps at most from each start.

    Returns:
        centers: (K, D), the mean of the rows with each label.
        labels: (N,), the cluster of each row.
        objective: (num_steps,), the within-cluster sum of squares after each step of the best start.
        converged: whether that start reached a fixed point; a ConvergenceWarning says so if not.

    Raises:
        TypeError: x does not hold numbers, or k is not an integer.
        ValueError: x is not a finite (N, D), k is below 1 or above the number of distinct rows, num_starts or max_steps
            is below 1, or the objective overflows.
    """
    clustering = _best_start(x, k, SQUARED_EUCLIDEAN, num_starts=num_starts, generator=generator, max_steps=max_steps)
    _warn_unless_converged(clustering)
    return clustering


def kmedians(
    x: Tensor, k: int, *, num_starts: int = 10, generator: torch.Generator, max_steps: int = 300
) -> Clustering:
    """Cluster rows about k coordinate-wise medians: the least total absolute deviation over several starts.

    Problem 1 of the exercise sheet, from seeds drawn by L1 distance (Arthur and Vassilvitskii 2007, section 5).

    Args:
        x: (N, D), the data; computed in their precision, integers as float64.
        k: the number of clusters.
        num_starts: how many seedings; the result with the least objective is returned.
        generator: the only source of randomness.
        max_steps: how many steps at most from each start.

    Returns:
        centers: (K, D), the coordinate-wise median of the rows with each label, midpoints for even numbers of rows.
        labels: (N,), the cluster of each row.
        objective: (num_steps,), the total absolute deviation after each step of the best start.
        converged: whether that start reached a fixed point; a ConvergenceWarning says so if not.

    Raises:
        TypeError: x does not hold numbers, or k is not an integer.
        ValueError: x is not a finite (N, D), k is below 1 or above the number of distinct rows, num_starts or max_steps
            is below 1, or the objective overflows.
    """
    clustering = _best_start(x, k, MANHATTAN, num_starts=num_starts, generator=generator, max_steps=max_steps)
    _warn_unless_converged(clustering)
    return clustering


def _best_start(
    x: Tensor, k: int, metric: Metric, *, num_starts: int, generator: torch.Generator, max_steps: int
) -> Clustering:
    x = check_data(x).detach()
    k = check_num_components(k, len(x))
    if num_starts < 1:
        raise ValueError(f"num_starts must be at least 1, not {num_starts}")
    starts = (_lloyd(x, metric.seeds(x, k, generator), metric, max_steps) for _ in range(num_starts))
    return min(starts, key=lambda clustering: clustering.objective[-1].item())


def _lloyd(x: Tensor, centers: Tensor, metric: Metric, max_steps: int) -> Clustering:
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, not {max_steps}")
    eps = torch.finfo(x.dtype).eps
    # A centre is rounded to eps times its size, which moves J by no more than this; J itself is rounded in its sums.
    center_rounding = len(x) * (2 * eps * x.abs().amax(0)).pow(metric.power).sum()
    sum_rounding = 4 * eps * (x.shape[1] + len(x).bit_length())
    objective: list[Tensor] = []
    nearest = assign(x, centers, metric)
    for step in range(1, max_steps + 1):
        labels = _fill_empty_clusters(x, nearest, centers, metric, step)
        centers = update(x, labels, centers, metric)
        objective.append(deviations(x, labels, centers, metric).sum())
        if not objective[-1].isfinite():
            raise ValueError(
                f"the objective overflows {x.dtype}: rescale x, whose largest entry is {x.abs().max():.3g}"
            )
        if step > 1 and objective[-1] > objective[-2] * (1 + sum_rounding) + center_rounding:
            raise RuntimeError(
                f"the objective rose from {objective[-2].item()} to {objective[-1].item()} at step {step}, which "
                "Lloyd's algorithm cannot do: please report this as a bug of mixproof"
            )
        nearest = assign(x, centers, metric)
        converged = torch.equal(nearest, labels)
        if converged:
            break
    return Clustering(centers, labels, torch.stack(objective), converged)


def _fill_empty_clusters(x: Tensor, labels: Tensor, centers: Tensor, metric: Metric, step: int) -> Tensor:
    """Return labels (N,) that leave no cluster empty: each empty one takes the row farthest from its own centre.

    One at a time, about centres brought up to date: the row then gives up a positive distance, so that J falls, and it
    leaves other rows behind in its old cluster, since a row alone lies on its centre.
    """
    k = len(centers)
    while len(empty := (labels.bincount(minlength=k) == 0).nonzero()):
        centers = update(x, labels, centers, metric)
        distances = deviations(x, labels, centers, metric)
        farthest = int(distances.argmax())
        if distances[farthest] == 0:
            raise ValueError(
                f"every row lies on one of {k - len(empty)} centres: x has too few distinct rows for {k} clusters"
            )
        cluster = int(empty[0])
        warnings.warn(
            f"cluster {cluster} is empty at step {step}: it takes row {farthest}, the farthest from its own centre",
            RuntimeWarning,
            stacklevel=4,
        )
        labels = labels.clone()
        labels[farthest] = cluster
    return labels


def _warn_unless_converged(clustering: Clustering) -> None:
    if not clustering.converged:
        warnings.warn(
            f"Lloyd's algorithm has not reached a fixed point after {len(clustering.objective)} steps: raise max_steps",
            ConvergenceWarning,
            stacklevel=3,
        )
