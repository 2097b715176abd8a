r"""Lloyd's algorithm: K-means and K-medians, one loop with two metrics.

Both lower

.. math:: J(X, Z, \mu) = \sum_n w_n \sum_k z_{nk} \sum_d |x_{nd} - \mu_{kd}|^p

by turns: each row goes to its nearest centre, and each centre to the point that minimises J over its rows. For p = 2
that is the mean (Lloyd, "Least squares quantization in PCM", 1982, Method I), for p = 1 the coordinate-wise median
(problem 1 of the exercise sheet). Neither half-step raises J, and there are finitely many partitions, so a fixed point
is reached; it is a local optimum, hence the restarts. The weights w_n are 1 unless given.

After the first step both half-steps touch few rows. The triangle inequality tells which rows may have a new nearest
centre (after Hamerly, "Making k-means even faster", 2010, with one bound for a row where he has two), and a centre is
moved by the rows that change cluster. The results are those of the full half-steps, ``assign`` and ``update``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference.seeding import kmeans_plusplus, kmedians_plusplus
from mixproof.inference.validation import check_data, check_row_weights
from mixproof.models.initial import check_num_components

CHUNK = 2**18
"""How many distances to work on at a time: they fit the cache of a core."""


class Clusters(Protocol):
    """The centres of the clusters of fixed rows, brought up to date by the rows that change cluster."""

    def update(self, labels: Tensor, centers: Tensor) -> Tensor:
        """Return the centres (K, D) of all rows by their labels (N,); a cluster without weight keeps its centre."""
        ...

    def move(self, rows: Tensor, before: Tensor, labels: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the centres (K, D) after some rows (n,) left the clusters ``before`` (n,), and how much J fell."""
        ...


class Metric(NamedTuple):
    """What K-means and K-medians differ in."""

    power: int
    """p: the distance of a row from a centre is the sum over d of abs(x_d - mu_d)^p."""
    clusters: Callable[[Tensor, Tensor], Clusters]
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


class Means:
    """The means of clusters. Deviations are what is summed, so that nothing is lost far from zero."""

    def __init__(self, x: Tensor, weights: Tensor) -> None:
        self.x, self.weights = x, weights

    def update(self, labels: Tensor, centers: Tensor) -> Tensor:
        means = torch.zeros_like(centers)
        for _ in range(2):
            sums, totals = _sums(self.x, means, labels, self.weights)
            means = torch.where(totals > 0, means + sums / totals, centers)
        self.totals = self.totals_summed = totals
        return means

    def move(self, rows: Tensor, before: Tensor, labels: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        x, weights = self.x.index_select(0, rows), self.weights[rows]
        come, gain = _sums(x, centers, labels[rows], weights)
        gone, loss = _sums(x, centers, before, weights)
        self.totals = self.totals + gain - loss
        if (self.totals < self.totals_summed / 2).any():  # what has left would weigh in by its rounding
            shift = self.update(labels, centers) - centers
        else:
            shift = (come - gone) / self.totals
        return centers + shift, (self.totals * shift.square()).sum()  # the theorem of Huygens and Steiner


class Medians:
    """The coordinate-wise medians of clusters; between two rows that share the weight evenly, the midpoint.

    Each feature is sorted once, and the sorted rows are cut into about sqrt(N) blocks. The weight of every cluster in
    every block is kept, which says in which block a median lies; only the rows of that block are looked at.
    """

    def __init__(self, x: Tensor, weights: Tensor) -> None:
        self.x, self.weights = x, weights
        self.values, self.order = x.mT.sort(-1)  # (D, N)
        self.size = 1 << len(x).bit_length() // 2
        self.num_blocks = -(-len(x) // self.size)
        block = (torch.arange(len(x), device=x.device) // self.size).expand_as(self.order)
        self.block = torch.empty_like(self.order).scatter_(1, self.order, block).mT.contiguous()  # (N, D)
        # Weights in whole multiples of a power of two have exact sums in any order.
        unit = 2.0 ** (60 - math.frexp(weights.double().sum().item())[1])
        self.mass = torch.where(weights > 0, (weights.double() * unit).round().clamp_min(1), 0).long()

    def update(self, labels: Tensor, centers: Tensor) -> Tensor:
        self.table = labels.new_zeros(*centers.shape, self.num_blocks)  # mass
        self._put(self.mass, labels, self.block)
        return self._medians(labels, centers)

    def move(self, rows: Tensor, before: Tensor, labels: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        self._put(-self.mass[rows], before, self.block[rows])
        self._put(self.mass[rows], labels[rows], self.block[rows])
        medians = self._medians(labels, centers)
        touched = (medians != centers).any(1)[labels].nonzero()[:, 0]
        x, own = self.x[touched], labels[touched]
        fall = deviations(x, own, centers, MANHATTAN) - deviations(x, own, medians, MANHATTAN)
        return medians, self.weights[touched] @ fall

    def _put(self, mass: Tensor, labels: Tensor, block: Tensor) -> None:
        """Add the mass (n,) of rows to the table, given their clusters (n,) and their blocks (n, D)."""
        features = torch.arange(block.shape[1], device=block.device)
        cells = (labels[:, None] * len(features) + features) * self.num_blocks + block
        self.table.view(-1).index_add_(0, cells.flatten(), mass[:, None].expand_as(cells).flatten())

    def _medians(self, labels: Tensor, centers: Tensor) -> Tensor:
        up_to = self.table.cumsum(-1)  # (K, D, number of blocks)
        total = up_to[..., -1:]
        offsets = torch.arange(self.size, device=labels.device)
        clusters = torch.arange(len(centers), device=labels.device)[:, None, None]
        order, values = (sorted_.expand(len(centers), -1, -1) for sorted_ in (self.order, self.values))
        middle = []
        slack = total >> 50  # the weights' own rounding: thirds add up to a half only to that
        for goal in (total - slack, total + slack + 1):  # the lower row reaches half of the mass, the upper one more
            block = (2 * up_to < goal).sum(-1, keepdim=True).clamp_max(self.num_blocks - 1)
            places = (block * self.size + offsets).clamp_max(len(labels) - 1)  # (K, D, size)
            rows = order.gather(-1, places)
            mass = self.mass[rows] * (labels[rows] == clusters)
            reached = (up_to - self.table).gather(-1, block) + mass.cumsum(-1)
            place = (2 * reached < goal).sum(-1, keepdim=True).clamp_max(self.size - 1)
            middle.append(values.gather(-1, places.gather(-1, place))[..., 0])
        return torch.where(total[..., 0] > 0, (middle[0] + middle[1]) / 2, centers)


SQUARED_EUCLIDEAN = Metric(2, Means, kmeans_plusplus)
MANHATTAN = Metric(1, Medians, kmedians_plusplus)


class Assignment:
    """The nearest centre of every row, kept while the centres move.

    By the triangle inequality a row keeps its label until the centres have moved by the gap between its two nearest:
    its own centre and any other together move by the two largest shifts at most. Gaps are rounded down.
    """

    def __init__(self, x: Tensor, centers: Tensor, metric: Metric) -> None:
        self.x, self.centers, self.metric = x, centers, metric
        self.rounding = 4 * (x.shape[1] + 8) * torch.finfo(x.dtype).eps
        if metric.power == 2:
            self.origin = x.mean(0)
            self.centred = (x - self.origin).double()
            self.norms = torch.linalg.vector_norm(self.centred, dim=1).square()
        self.labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
        self.path = x.new_zeros((), dtype=torch.float64)  # how far the centres have moved
        self.num_moves = 0
        self.safe_until = torch.full(x.shape[:1], -torch.inf, dtype=torch.float64, device=x.device)  # on the path
        self.follow(centers)

    def follow(self, centers: Tensor) -> tuple[Tensor, Tensor]:
        """Bring the labels up to date; return the numbers (n,) of the rows that changed, and their labels before."""
        shifts = torch.linalg.vector_norm((centers - self.centers).double(), self.metric.power, dim=1)
        self.path = self.path + shifts.topk(min(2, len(shifts))).values.sum()
        self.centers = centers
        self.num_moves += 1
        suspects = (self.safe_until <= self.path * (1 + self.num_moves * self.rounding)).nonzero()[:, 0]
        suspects = self._measure(suspects)
        before = self.labels.index_select(0, suspects)
        chunks = suspects.split(_chunk(centers))
        self.labels[suspects] = torch.cat([self._table(rows, centers)[0].min(0).indices for rows in chunks])
        unsure = self._measure(suspects)  # rounding could decide
        self.labels[unsure] = assign(self.x.index_select(0, unsure), centers, self.metric)
        changed = (self.labels.index_select(0, suspects) != before).nonzero()[:, 0]
        return suspects[changed], before[changed]

    def _measure(self, rows: Tensor) -> Tensor:
        """Note until when the labels of some rows are safe, and return the rows (n,) that are not safe even now."""
        suspects = []
        for some in rows.split(_chunk(self.centers)):
            gap = self._gap(some, self.labels.index_select(0, some), self.centers)
            self.safe_until.index_copy_(0, some, gap + self.path)
            suspects.append(some[~(gap > 0)])
        return torch.cat(suspects)

    def _gap(self, rows: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
        """Return by how much farther than the centre of its label (n,) the nearest other centre is from each row."""
        table, norm, error = self._table(rows, centers)
        own = table.gather(0, labels[None])[0]
        other = table.scatter_(0, labels[None], torch.inf).amin(0)
        if self.metric.power == 2:
            own, other = (own + norm + error).sqrt(), (other + norm - error).clamp_min(0).sqrt()
        return other.double() * (1 - self.rounding) - own

    def _table(self, rows: Tensor, centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return distances (K, n) less what is equal for all centres, the latter (n,), and the rounding (n,)."""
        if self.metric.power == 1:
            zero = centers.new_zeros(())
            return torch.cdist(centers, self.x.index_select(0, rows), p=1), zero, zero
        origin, norm = (centers - self.origin).double(), self.norms.index_select(0, rows)
        squares = origin.square().sum(1)
        table = torch.addmm(squares[:, None], origin, self.centred.index_select(0, rows).mT, alpha=-2)
        return table, norm, self.rounding * (norm + squares.max())


def assign(x: Tensor, centers: Tensor, metric: Metric) -> Tensor:
    """Return the labels (N,) of the nearest centres: the first half-step; of equally near centres, the first.

    Args:
        x: (N, D), the data.
        centers: (K, D).
        metric: ``SQUARED_EUCLIDEAN`` or ``MANHATTAN``.
    """
    # From differences: the expanded square would lose clusters that are narrow beside the spread of the data. The p-th
    # power is monotone and may be left out.
    exact = "donot_use_mm_for_euclid_dist"
    chunks = x.split(_chunk(centers))
    return torch.cat([torch.cdist(rows, centers, metric.power, compute_mode=exact).argmin(1) for rows in chunks])


def update(x: Tensor, labels: Tensor, centers: Tensor, metric: Metric, weights: Tensor | None = None) -> Tensor:
    """Return the centres (K, D) with the least total distance from their rows: the second half-step.

    Args:
        x: (N, D), the data.
        labels: (N,), integers from 0 to K - 1.
        centers: (K, D), the present centres; one whose rows have no weight stays where it is.
        metric: ``SQUARED_EUCLIDEAN`` or ``MANHATTAN``.
        weights: (N,), how often each row counts; None counts each once.
    """
    return metric.clusters(x, torch.ones_like(x[:, 0]) if weights is None else weights).update(labels, centers)


def deviations(x: Tensor, labels: Tensor, centers: Tensor, metric: Metric) -> Tensor:
    """Return the distance (N,) of each row from the centre of its cluster; the objective J is their weighted sum.

    Args:
        x: (N, D), the data.
        labels: (N,), integers from 0 to K - 1.
        centers: (K, D).
        metric: ``SQUARED_EUCLIDEAN`` (distances are squared) or ``MANHATTAN``.
    """
    ones = torch.ones(x.shape[1], dtype=torch.float64, device=x.device)
    size = _chunk(x[:1])
    distances = []
    for rows, own in zip(x.split(size), labels.split(size), strict=True):
        differences = rows - centers.index_select(0, own)
        powers = differences.square_() if metric.power == 2 else differences.abs_()
        distances.append(powers.double() @ ones)  # a product is much faster than a sum over few features
    return torch.cat(distances).to(x.dtype)


def _sums(x: Tensor, centers: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted sums (K, D) of the deviations of rows (n, D) from their centres, and of the weights (K, 1).

    As products with indicators, which are the same on every run also on a GPU.
    """
    sums = torch.zeros_like(centers, dtype=torch.float64)
    totals = torch.zeros_like(sums[:, :1])
    size = _chunk(centers)
    for rows, own, counts in zip(x.split(size), labels.split(size), weights.split(size), strict=True):
        indicators = sums.new_zeros(len(centers), len(rows)).scatter_(0, own[None], counts[None].double())
        sums += indicators @ (rows - centers.index_select(0, own)).double()
        totals += indicators.sum(1, keepdim=True)
    return sums.to(x.dtype), totals.to(x.dtype)


def _chunk(centers: Tensor) -> int:
    """Return how many rows to work on at a time."""
    return max(1, CHUNK // max(centers.shape))


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
    weights = _check_weights(weights, x, len(centers))
    clustering = _lloyd(x, weights, centers, metric, metric.clusters(x, weights), max_steps)
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
            is below 1, or the objective overflows.
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
            is below 1, or the objective overflows.
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
    if num_starts < 1:
        raise ValueError(f"num_starts must be at least 1, not {num_starts}")
    clusters = metric.clusters(x, weights)
    starts = (
        _lloyd(x, weights, metric.seeds(x, k, generator, weights), metric, clusters, max_steps)
        for _ in range(num_starts)
    )
    return min(starts, key=lambda clustering: clustering.objective[-1].item())


def _check_weights(weights: Tensor | None, x: Tensor, k: int) -> Tensor:
    """Return weights (N,), of which at least k are positive, or say what is wrong with them."""
    weights = check_row_weights(weights, x)
    if weights is None:
        weights = torch.ones_like(x[:, 0])
    check_num_components(k, int((weights > 0).sum()))
    return weights.detach()


def _lloyd(
    x: Tensor, weights: Tensor, centers: Tensor, metric: Metric, clusters: Clusters, max_steps: int
) -> Clustering:
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, not {max_steps}")
    assignment = Assignment(x, centers, metric)
    labels, k = assignment.labels, len(centers)

    def follow(centers: Tensor) -> tuple[Tensor, Tensor]:
        rows, before = assignment.follow(centers)
        count = weights[rows] > 0  # the others move nothing
        return rows[count], before[count]

    _fill_empty_clusters(x, weights, assignment, centers, clusters, 1)
    centers = clusters.update(labels, centers)
    counts = _counts(labels, weights, k)
    first = (weights * deviations(x, labels, centers, metric)).sum()
    if not first.isfinite():
        raise ValueError(f"the objective overflows {x.dtype}: rescale x, whose largest entry is {x.abs().max():.3g}")
    falls: list[Tensor] = []  # by how much each later step lowers J
    for step in range(2, max_steps + 2):
        rows, before = follow(centers)
        if not len(rows):  # clear the rounding that the moves have gathered before the last word
            centers = clusters.update(labels, centers)
            rows, before = follow(centers)
        if not len(rows) or step > max_steps:
            break
        x_, weights_, after = x.index_select(0, rows), weights[rows], labels[rows]
        fall = weights_ @ (deviations(x_, before, centers, metric) - deviations(x_, after, centers, metric))
        counts += _counts(after, weights_, k) - _counts(before, weights_, k)
        if counts.all():
            centers, gain = clusters.move(rows, before, labels, centers)
        else:
            gain = (weights * deviations(x, labels, centers, metric)).sum()
            _fill_empty_clusters(x, weights, assignment, centers, clusters, step)
            centers = clusters.update(labels, centers)
            counts = _counts(labels, weights, k)
            gain = gain - (weights * deviations(x, labels, centers, metric)).sum()
        falls.append(fall + gain)
    converged = not len(rows)
    if not converged:
        labels[rows] = before
        centers = clusters.update(labels, centers)
    last = (weights * deviations(x, labels, centers, metric)).sum()
    later = torch.stack([*falls, torch.zeros_like(last)]).flip(0).cumsum(0).flip(0)  # from each step to the last
    _raise_unless_sum(x, weights, metric, first, later[0], last, len(falls) + 1)
    return Clustering(centers, labels, last + later, converged)


def _raise_unless_sum(
    x: Tensor, weights: Tensor, metric: Metric, first: Tensor, fall: Tensor, last: Tensor, num_steps: int
) -> None:
    """Raise unless J fell by what the steps lowered it, to rounding: it then fell at each of them."""
    eps = torch.finfo(x.dtype).eps
    size, total = torch.linalg.vector_norm(x, torch.inf, dim=0), weights.sum()
    # A centre is rounded to eps times its size, at each move anew, and the sums are rounded to eps times theirs.
    drift = 2 * eps * num_steps * size
    rounding = 8 * eps * num_steps * (x.shape[1] + len(x).bit_length()) * first
    rounding = rounding + total * drift.pow(metric.power).sum() + 2 * num_steps * drift.sum() * (total * first).sqrt()
    if not (first - fall - last).abs() <= rounding:
        raise RuntimeError(
            f"the objective went from {first.item()} to {last.item()} in {num_steps} steps that lowered it by "
            f"{fall.item()}, which Lloyd's algorithm cannot do: please report this as a bug of mixproof"
        )


def _counts(labels: Tensor, weights: Tensor, k: int) -> Tensor:
    """Return the numbers (K,) of rows with weight, by the labels (n,) and the weights (n,) of rows."""
    return torch.zeros(k, dtype=torch.long, device=labels.device).index_add_(0, labels, (weights > 0).long())


def _fill_empty_clusters(
    x: Tensor, weights: Tensor, assignment: Assignment, centers: Tensor, clusters: Clusters, step: int
) -> None:
    """Leave no cluster empty: each empty one takes the row farthest from its own centre.

    One at a time, about centres brought up to date: the row then gives up a positive distance, so that J falls, and it
    leaves other rows behind in its old cluster, since a row alone lies on its centre. Rows without weight stay.
    """
    k, labels = len(centers), assignment.labels
    while len(empty := (_counts(labels, weights, k) == 0).nonzero()):
        centers = clusters.update(labels, centers)
        distances = deviations(x, labels, centers, assignment.metric).where(weights > 0, 0)
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
        labels[farthest] = cluster
        assignment.safe_until[farthest] = -torch.inf


def _warn_unless_converged(clustering: Clustering) -> None:
    if not clustering.converged:
        warnings.warn(
            f"Lloyd's algorithm has not reached a fixed point after {len(clustering.objective)} steps: raise max_steps",
            ConvergenceWarning,
            stacklevel=3,
        )
