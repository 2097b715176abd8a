r"""Lloyd's algorithm: K-means and K-medians, one loop with two metrics.

Both lower

.. math:: J(X, Z, \mu) = \sum_n w_n \sum_k z_{nk} \sum_d |x_{nd} - \mu_{kd}|^p

by turns: each row goes to its nearest centre, and each centre to the point that minimises J over its rows. For p = 2
that is the mean (Lloyd, "Least squares quantization in PCM", 1982, Method I), for p = 1 the coordinate-wise median
(problem 1 of the exercise sheet). Neither half-step raises J, and there are finitely many partitions, so a fixed point
is reached; it is a local optimum, hence the restarts. The weights w_n are 1 unless given.

After the first step a centre is moved by the rows that change cluster, and the triangle inequality tells which rows may
have a new nearest centre (after Hamerly, "Making k-means even faster", 2010, with one bound for a row where he has
two); while many rows change, the nearest of K means is found from a product of matrices for all of them. The results
are those of the full half-steps, ``assign`` and ``update``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference.means import Means
from mixproof.inference.medians import Medians
from mixproof.inference.nearest import Nearest, deviations
from mixproof.inference.seeding import kmeans_plusplus, kmedians_plusplus
from mixproof.inference.validation import as_floating, check_data, check_generator, check_integer, check_row_weights
from mixproof.models.initial import check_num_components


class Centroids(Protocol):
    """The second half-step on fixed rows, from one to the next."""

    objective: Tensor
    """(), J of the labels and centres of the last ``update``."""

    def update(self, labels: Tensor, centers: Tensor) -> Tensor:
        """Return the centres (K, D) of all rows by their labels (N,); a cluster without weight keeps its centre."""
        ...

    def move(self, rows: Tensor, before: Tensor, labels: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the centres (K, D) after some rows (n,) left the clusters ``before`` (n,), and by how much J fell."""
        ...


class Metric(NamedTuple):
    """What K-means and K-medians differ in."""

    power: int
    """p: the distance of a row from a centre is the sum over d of abs(x_d - mu_d)^p."""
    centroids: Callable[[Tensor, Tensor], Centroids]
    """What finds the centres, given the rows (N, D) and their weights (N,)."""
    seeds: Callable[[Tensor, int, torch.Generator, Tensor], Tensor]
    """Centres (K, D) to start from, given the rows, K, the source of randomness and the weights."""


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


SQUARED_EUCLIDEAN = Metric(2, Means, kmeans_plusplus)
MANHATTAN = Metric(1, Medians, kmedians_plusplus)


def update(x: Tensor, labels: Tensor, centers: Tensor, metric: Metric, weights: Tensor | None = None) -> Tensor:
    """Return the centres (K, D) with the least total distance from their rows: the second half-step.

    Args:
        x: (N, D), the data.
        labels: (N,), integers from 0 to K - 1.
        centers: (K, D), the present centres; one whose rows have no weight stays where it is.
        metric: ``SQUARED_EUCLIDEAN`` or ``MANHATTAN``.
        weights: (N,), how often each row counts; None counts each once.
    """
    return metric.centroids(x, torch.ones_like(x[:, 0]) if weights is None else weights).update(labels, centers)


def lloyd(
    x: Tensor, centers: Tensor, metric: Metric, *, weights: Tensor | None = None, max_steps: int = 300
) -> Clustering:
    """Run Lloyd's algorithm from given centres until no label changes.

    A cluster that loses all its rows is given the row farthest from its own centre, with a warning.

    Args:
        x: (N, D), the data; computed in their precision, integers as float64.
        centers: (K, D), where to start.
        metric: ``SQUARED_EUCLIDEAN`` or ``MANHATTAN``.
        weights: (N,), how often each row counts, not negative; None counts each once.
        max_steps: how many pairs of half-steps at most.

    Returns:
        centers: (K, D), the mean or the coordinate-wise median of the rows with each label.
        labels: (N,), the cluster of each row.
        objective: (num_steps,), J after each step.
        converged: whether a fixed point was reached; a ConvergenceWarning says so if not.

    Raises:
        TypeError: x or centers do not hold numbers.
        ValueError: x is not a finite (N, D), centers do not fit it, fewer than K rows are distinct, or J over- or
            underflows.
    """
    x = check_data(x).detach()
    centers = as_floating(centers, "centers").to(x)
    if centers.ndim != 2 or centers.shape[1] != x.shape[1]:
        raise ValueError(f"centers must have shape (K, {x.shape[1]}), not {tuple(centers.shape)}")
    if not centers.isfinite().all():
        k, d = (~centers.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"centers[{k}, {d}] is {centers[k, d].item()}: every starting centre must be finite")
    weights = _check_weights(weights, x, len(centers))
    clustering = _Descent(x, weights, metric).run(centers, max_steps)
    _warn_unless_converged(clustering)
    return clustering


def kmeans(
    x: Tensor,
    k: int,
    *,
    num_starts: int = 10,
    generator: torch.Generator,
    weights: Tensor | None = None,
    max_steps: int = 300,
) -> Clustering:
    """Cluster rows about k means: the least within-cluster sum of squares over several starts of Lloyd's algorithm.

    Lloyd 1982, Method I, from the seeds of Arthur and Vassilvitskii 2007, section 2.2.

    Args:
        x: (N, D), the data; computed in their precision, integers as float64.
        k: the number of clusters.
        num_starts: how many seedings; the result with the least objective is returned.
        generator: the only source of randomness.
        weights: (N,), how often each row counts, not negative; None counts each once.
        max_steps: how many steps at most from each start.

    Returns:
        centers: (K, D), the mean of the rows with each label.
        labels: (N,), the cluster of each row.
        objective: (num_steps,), the within-cluster sum of squares after each step of the best start.
        converged: whether that start reached a fixed point; a ConvergenceWarning says so if not.

    Raises:
        TypeError: x does not hold numbers, or k is not an integer.
        ValueError: x is not a finite (N, D), k is below 1 or above the number of distinct rows, num_starts or max_steps
            is below 1, or the objective over- or underflows.
    """
    clustering = _best_start(x, k, SQUARED_EUCLIDEAN, num_starts, generator, weights, max_steps)
    _warn_unless_converged(clustering)
    return clustering


def kmedians(
    x: Tensor,
    k: int,
    *,
    num_starts: int = 10,
    generator: torch.Generator,
    weights: Tensor | None = None,
    max_steps: int = 300,
) -> Clustering:
    """Cluster rows about k coordinate-wise medians: the least total absolute deviation over several starts.

    Problem 1 of the exercise sheet, from seeds drawn by L1 distance (Arthur and Vassilvitskii 2007, section 5).

    Args:
        x: (N, D), the data; computed in their precision, integers as float64.
        k: the number of clusters.
        num_starts: how many seedings; the result with the least objective is returned.
        generator: the only source of randomness.
        weights: (N,), how often each row counts, not negative; None counts each once.
        max_steps: how many steps at most from each start.

    Returns:
        centers: (K, D), the coordinate-wise median of the rows with each label, midpoints for even numbers of rows.
        labels: (N,), the cluster of each row.
        objective: (num_steps,), the total absolute deviation after each step of the best start.
        converged: whether that start reached a fixed point; a ConvergenceWarning says so if not.

    Raises:
        TypeError: x does not hold numbers, or k is not an integer.
        ValueError: x is not a finite (N, D), k is below 1 or above the number of distinct rows, num_starts or max_steps
            is below 1, or the objective over- or underflows.
    """
    clustering = _best_start(x, k, MANHATTAN, num_starts, generator, weights, max_steps)
    _warn_unless_converged(clustering)
    return clustering


def _best_start(
    x: Tensor,
    k: int,
    metric: Metric,
    num_starts: int,
    generator: torch.Generator,
    weights: Tensor | None,
    max_steps: int,
) -> Clustering:
    x = check_data(x).detach()
    k = check_num_components(k, len(x))
    weights = _check_weights(weights, x, k)
    check_integer(num_starts, "num_starts", 1)
    check_generator(generator)
    descent = _Descent(x, weights, metric)
    starts = (descent.run(metric.seeds(x, k, generator, weights), max_steps) for _ in range(num_starts))
    return min(starts, key=lambda clustering: clustering.objective[-1].item())


def _check_weights(weights: Tensor | None, x: Tensor, k: int) -> Tensor:
    """Return weights (N,), of which at least k are positive, or say what is wrong with them."""
    weights = check_row_weights(weights, x)
    if weights is None:
        weights = torch.ones_like(x[:, 0])
    check_num_components(k, len(x))
    counted = int((weights > 0).sum())
    if counted < k:
        raise ValueError(f"{k} clusters need at least as many rows that count, and {counted} have weight above 0")
    return weights.detach()


class _Descent:
    """Lloyd's algorithm on fixed rows, from any start."""

    def __init__(self, x: Tensor, weights: Tensor, metric: Metric) -> None:
        self.x, self.weights, self.metric = x, weights, metric
        self.counted = weights > 0
        self.all_counted = bool(self.counted.all())
        self.nearest, self.centroids = Nearest(x, metric.power), metric.centroids(x, weights)

    def run(self, centers: Tensor, max_steps: int) -> Clustering:
        check_integer(max_steps, "max_steps", 1)
        centroids, k = self.centroids, len(centers)
        labels = self.nearest.assign(centers)
        self._fill_empty_clusters(labels, centers, 1)
        centers = centroids.update(labels, centers)
        counts = self._counts(labels, k)
        first, size = centroids.objective, centers.abs().amax(0)
        self._raise_unless_in_range(first, labels, centers)
        falls: list[Tensor] = []  # by how much each later step lowers J
        for step in range(2, max_steps + 2):
            rows, before = self._reassign(labels, centers)
            if not len(rows):  # clear the rounding that the moves have gathered before the last word
                centers = centroids.update(labels, centers)
                rows, before = self._reassign(labels, centers)
            if not len(rows) or step > max_steps:
                break
            counts += labels.index_select(0, rows).bincount(minlength=k) - before.bincount(minlength=k)
            if counts.all():
                centers, fall = centroids.move(rows, before, labels, centers)
            else:
                objective = self.weights @ self._deviations(labels.index_copy(0, rows, before), centers)
                self._fill_empty_clusters(labels, centers, step)
                centers = centroids.update(labels, centers)
                counts = self._counts(labels, k)
                fall = objective - centroids.objective
            falls.append(fall)
            size = torch.maximum(size, centers.abs().amax(0))
        converged = not len(rows)
        if not converged:
            labels[rows] = before
            centers = centroids.update(labels, centers)
        last = (self.weights * self._deviations(labels, centers)).sum()
        later = torch.stack([*falls, torch.zeros_like(last)]).flip(0).cumsum(0).flip(0)  # from each step to the last
        self._raise_unless_sum(size, first, later[0], last, len(falls) + 1)
        return Clustering(centers, labels, last + later, converged)

    def _reassign(self, labels: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        rows, before = self.nearest.reassign(labels, centers)
        if self.all_counted:
            return rows, before
        counted = self.counted[rows]  # the others move nothing
        return rows[counted], before[counted]

    def _deviations(self, labels: Tensor, centers: Tensor) -> Tensor:
        return deviations(self.x, labels, centers, self.metric.power)

    def _counts(self, labels: Tensor, k: int) -> Tensor:
        """Return the numbers (K,) of rows with weight in each cluster, by the labels (N,)."""
        return torch.zeros(k, dtype=torch.long, device=labels.device).index_add_(0, labels, self.counted.long())

    def _fill_empty_clusters(self, labels: Tensor, centers: Tensor, step: int) -> None:
        """Leave no cluster empty: each empty one takes the row farthest from its own centre.

        One at a time, about centres brought up to date: the row then gives up a positive distance, so that J falls, and
        it leaves other rows behind in its old cluster, since a row alone lies on its centre. Rows without weight stay.
        """
        k = len(centers)
        while len(empty := (self._counts(labels, k) == 0).nonzero()):
            centers = self.centroids.update(labels, centers)
            distances = self._deviations(labels, centers).where(self.counted, 0)
            farthest = int(distances.argmax())
            if distances[farthest] == 0:
                self._raise_if_vanished(labels, centers)
                raise ValueError(
                    f"every row lies on one of {k - len(empty)} centres: x has too few distinct rows for {k} clusters"
                )
            cluster = int(empty[0])
            warnings.warn(
                f"cluster {cluster} is empty at step {step}: it takes row {farthest}, the farthest from its own centre",
                RuntimeWarning,
                stacklevel=4,
            )
            labels[farthest] = cluster
            self.nearest.doubt(farthest)

    def _raise_unless_in_range(self, objective: Tensor, labels: Tensor, centers: Tensor) -> None:
        """Raise if J over- or underflows."""
        if not objective.isfinite():
            largest = self.x.abs().max()
            raise ValueError(f"the objective overflows {self.x.dtype}: rescale x, whose largest entry is {largest:.3g}")
        smallest = self.weights.sum() * self.x.shape[1] * torch.finfo(self.x.dtype).tiny
        if self.metric.power == 2 and objective < smallest:
            self._raise_if_vanished(labels, centers)

    def _raise_if_vanished(self, labels: Tensor, centers: Tensor) -> None:
        """Raise if a row that counts is off its centre by more than rounding: its distance, near 0, has underflowed."""
        rounding = 8 * torch.finfo(self.x.dtype).eps * centers.abs().amax(0)
        off = (self.x - centers[labels]).abs() > rounding
        if (off & self.counted[:, None]).any():
            raise self._underflow()

    def _underflow(self) -> ValueError:
        largest = f"whose largest entry is {self.x.abs().max():.3g}"
        return ValueError(f"the objective underflows {self.x.dtype}: rescale the weights or x, {largest}")

    def _raise_unless_sum(self, size: Tensor, first: Tensor, fall: Tensor, last: Tensor, num_steps: int) -> None:
        """Raise unless J fell by what the steps lowered it, to rounding: it then fell at each of them.

        No entry of a centre was larger than ``size`` (D,).
        """
        num_rows, num_features = self.x.shape
        eps, total = torch.finfo(self.x.dtype).eps, self.weights.sum()
        # A centre is rounded to eps times its size, at each move anew, and the sums are rounded to eps times theirs.
        drift = 2 * eps * num_steps * size
        rounding = 8 * eps * num_steps * (num_features + num_rows.bit_length()) * first
        rounding = rounding + total * drift.pow(self.metric.power).sum()
        rounding = rounding + 2 * num_steps * drift.sum() * (total * first).sqrt()
        if not (first - fall - last).abs() <= rounding:
            if first < num_rows * torch.finfo(self.x.dtype).tiny:
                raise self._underflow()
            raise RuntimeError(
                f"the objective went from {first.item()} to {last.item()} in {num_steps} steps that lowered it by "
                f"{fall.item()}, which Lloyd's algorithm cannot do: please report this as a bug of mixproof"
            )


def _warn_unless_converged(clustering: Clustering) -> None:
    if not clustering.converged:
        warnings.warn(
            f"Lloyd's algorithm has not reached a fixed point after {len(clustering.objective)} steps: raise max_steps",
            ConvergenceWarning,
            stacklevel=3,
        )
