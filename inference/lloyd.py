r"""Lloyd's algorithm: K-means and K-medians, one loop with two metrics.

Both lower

.. math:: J(X, Z, \mu) = \sum_n w_n \sum_k z_{nk} \sum_d |x_{nd} - \mu_{kd}|^p

by turns: each row goes to its nearest centre, and each centre to the point that minimises J over its rows. For p = 2
that is the mean (Lloyd, "Least squares quantization in PCM", 1982, Method I), for p = 1 the coordinate-wise median
(problem 1 of the exercise sheet). Neither half-step raises J, and there are finitely many partitions, so a fixed point
is reached; it is a local optimum, hence the restarts. The weights w_n are 1 unless given.

After the first step a centre is moved by the rows that change cluster. The nearest of K means is found from a product
of matrices for all rows; for medians the triangle inequality tells which rows may have a new nearest centre (after
Hamerly, "Making k-means even faster", 2010, with one bound for a row where he has two). The results are those of the
full half-steps, ``assign`` and ``update``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference.expectation import Workspace
from mixproof.inference.seeding import kmeans_plusplus, kmedians_plusplus
from mixproof.inference.validation import check_data, check_row_weights
from mixproof.models.initial import check_num_components

CHUNK = 2**17
"""How many numbers a core works on at a time: they fit its cache."""


class Clusters(Protocol):
    """Both half-steps on fixed rows, from one to the next."""

    objective: Tensor
    """(), J of the labels and centres of the last ``update``."""

    def assign(self, centers: Tensor) -> Tensor:
        """Return the labels (N,) of the centres (K, D) nearest to the rows."""
        ...

    def reassign(self, labels: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        """Bring up to date the labels of the last call; return which rows (n,) changed, and their labels before."""
        ...

    def doubt(self, row: int) -> None:
        """Have the next call ask again for the label of a row, which has been changed from outside."""
        ...

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
    """The means of clusters, and which of them is nearest to each row.

    A product of matrices in single precision tells all squared distances but for what is equal for all centres. The
    rows between whose centres its rounding could decide are asked again, by differences, as in ``assign``.
    """

    def __init__(self, x: Tensor, weights: Tensor) -> None:
        self.x, self.weights = x, weights
        self.origin = x.mean(0).double()
        self._lay_out(torch.float32)
        self.rows, self.flags = Workspace(x), Workspace(x.new_empty(0, dtype=torch.float64))
        self.codes, self.last = self.columns.new_empty(2, self.columns[:, 0].numel())

    def _lay_out(self, dtype: torch.dtype) -> None:
        """Copy the centred rows, features first: operations then run over neighbouring numbers.

        Each core has a lane, (D + 1, M), of rows that follow one another, so that what it writes it reads again.
        """
        num_rows, num_features = self.x.shape
        num_lanes = torch.get_num_threads() if self.x.device.type == "cpu" else 1
        shape = (num_lanes, num_features + 1, -(-num_rows // num_lanes))
        self.columns = torch.ones(shape, dtype=dtype, device=self.x.device)
        self.reach = self.columns.new_zeros(())  # the squared norm of the longest column
        size = max(1, 2**16 // num_features)
        for lane, own in zip(self.columns, self.x.split(shape[2]), strict=False):  # there may be fewer rows than lanes
            for columns, rows in zip(lane[:-1, : len(own)].split(size, 1), own.split(size), strict=True):
                columns.copy_((rows - self.origin).to(dtype).mT)
                self.reach = torch.maximum(self.reach, columns.square().sum(0).amax())
        self.space = Workspace(self.columns)

    def assign(self, centers: Tensor) -> Tensor:
        self._nearest(centers)
        labels = self.codes[: len(self.x)].long().sub_(len(centers))
        self._decide(labels, torch.arange(len(labels), device=labels.device), centers)
        return labels

    def reassign(self, labels: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        self.codes, self.last = self.last, self.codes
        self._nearest(centers)
        rows = (self.codes != self.last)[: len(self.x)].nonzero()[:, 0]
        found = self.codes.index_select(0, rows).long().sub_(len(centers))
        self._decide(found, rows, centers)
        return _relabel(labels, rows, found)

    def _decide(self, found: Tensor, rows: Tensor, centers: Tensor) -> None:
        """Find by differences the labels of rows (n,) that have none."""
        k = len(centers)
        doubtful = ((found < 0) | (found >= k)).nonzero()[:, 0]
        if len(doubtful) > len(self.x) // 8 and self.columns.dtype == torch.float32:
            self._lay_out(torch.float64)
        if len(doubtful):
            rows = rows[doubtful]
            found[doubtful] = labels = assign(self.x.index_select(0, rows), centers, SQUARED_EUCLIDEAN)
            self.codes[rows] = (labels + k).to(self.codes)

    def _nearest(self, centers: Tensor) -> None:
        """Set the codes: k plus the label of the nearest centre, or no such number where rounding could decide it."""
        k, size = len(centers), max(1, 2 * CHUNK // max(centers.shape))
        location = centers - self.origin
        squares = location.square().sum(1, keepdim=True)
        factors = torch.cat([-2 * location, squares], 1).to(self.columns)
        eps, tiny = (
            max(torch.finfo(dtype).eps for dtype in (self.columns.dtype, self.x.dtype)),
            torch.finfo(self.columns.dtype).tiny,
        )
        slack = 4 * (self.x.shape[1] + 8) * (eps * (self.reach + squares.max().to(self.columns)) + tiny)
        num_lanes, codes = len(self.columns), self.codes.view(len(self.columns), 1, -1)
        numbers = torch.arange(k, 2 * k, dtype=self.columns.dtype, device=self.x.device)  # two exceed any single one
        factors, numbers = factors.expand(num_lanes, -1, -1), numbers.expand(num_lanes, 1, -1)
        for columns, some in zip(self.columns.split(size, 2), codes.split(size, 2), strict=True):
            n = some.shape[2]
            table = torch.bmm(factors, columns, out=self.space("table", num_lanes, k, n))
            least = torch.amin(table, 1, keepdim=True, out=self.space("least", num_lanes, 1, n))
            nearest = table.le_(least.add_(slack))
            some.copy_(torch.bmm(numbers, nearest, out=least))

    def doubt(self, row: int) -> None:
        self.codes[row] = 0

    def update(self, labels: Tensor, centers: Tensor) -> Tensor:
        while True:
            sums, totals, squares = self._sums(None, labels, self.weights.double(), centers)
            shift = torch.where(totals > 0, sums / totals, 0)
            gain = (totals * shift.square()).sum()  # the theorem of Huygens and Steiner
            centers = centers + shift.to(centers)
            # Else the centres were so far off that the difference below has lost digits; once at the means, gain is a
            # rounding of squares, and not half of it.
            if not gain > squares / 2:
                break
        self.objective = (squares - gain).to(centers)
        self.totals = self.totals_summed = totals
        return centers

    def move(self, rows: Tensor, before: Tensor, labels: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        # Each row comes to one cluster and goes, with a negative weight, from another.
        weights = self.weights.index_select(0, rows).double()
        sums, totals, squares = self._sums(
            torch.cat([rows, rows]),
            torch.cat([labels.index_select(0, rows), before]),
            torch.cat([weights, -weights]),
            centers,
        )
        self.totals = self.totals + totals
        if (self.totals < self.totals_summed / 64).any():  # what has left would weigh in by its rounding
            shift = (self.update(labels, centers) - centers).double()
        else:
            shift = sums / self.totals
        return centers + shift.to(centers), (self.totals * shift.square()).sum() - squares

    def _sums(
        self, rows: Tensor | None, labels: Tensor, weights: Tensor, centers: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return sums over rows (n,), or all: (K, D) of deviations from centres, (K, 1) of weights, () of squares.

        Products with indicators are the same on every run also on a GPU.
        """
        k, size = len(centers), _chunk(centers)
        sums = torch.zeros_like(centers, dtype=torch.float64)
        totals, squares, ones = sums.new_zeros(k, 1), sums.new_zeros(()), torch.ones_like(sums[0])
        for first in range(0, len(labels), size):
            own, counts = labels[first : first + size], weights[first : first + size]
            shape = len(own), len(ones)
            if rows is None:
                some = self.x[first : first + size]
            else:
                some = torch.index_select(self.x, 0, rows[first : first + size], out=self.rows("rows", *shape))
            near = torch.index_select(centers, 0, own, out=self.rows("centers", *shape))
            deviations = torch.sub(some, near, out=near).double()
            indicators = self.flags("flags", k, len(own)).zero_().scatter_(0, own[None], counts[None])
            totals += indicators.sum(1, keepdim=True)
            sums.addmm_(indicators, deviations)
            squares += counts @ (deviations.square_() @ ones)
        return sums, totals, squares


class Medians:
    """The coordinate-wise medians of clusters; between two rows that share the weight evenly, the midpoint.

    Each feature is sorted once, and the sorted rows are cut into some 2 sqrt(N) blocks. The weight of every cluster in
    every block is kept, which says in which block a median lies; only the rows of that block are looked at.
    """

    def __init__(self, x: Tensor, weights: Tensor) -> None:
        self.x, self.weights = x, weights
        columns = x.mT.contiguous()
        # On a CPU numpy sorts several times as fast as torch.
        self.order = torch.from_numpy(np.argsort(columns.numpy())) if x.device.type == "cpu" else columns.argsort()
        self.values = columns.gather(1, self.order)  # (D, N)
        self.size = max(1, 1 << len(x).bit_length() // 2 >> 1)
        self.num_blocks = -(-len(x) // self.size)
        block = (torch.arange(len(x), device=x.device) // self.size).expand_as(self.order)
        self.block = torch.empty_like(self.order).scatter_(1, self.order, block).mT.contiguous()  # (N, D)
        # Weights in whole multiples of a power of two have exact sums in any order.
        unit = 2.0 ** (60 - math.frexp(weights.double().sum().item())[1])
        self.mass = torch.where(weights > 0, (weights.double() * unit).round().clamp_min(1), 0).long()
        self.safe_until = torch.empty_like(weights, dtype=torch.float64)  # on the path of the centres

    def assign(self, centers: Tensor) -> Tensor:
        self.centers, self.path, self.num_moves = centers, self.safe_until.new_zeros(()), 0
        self.safe_until.fill_(-torch.inf)
        labels = torch.zeros_like(self.mass)
        self.reassign(labels, centers)
        return labels

    def reassign(self, labels: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        """Ask only where the centres have moved by the gap between the two nearest to a row since it was asked.

        By the triangle inequality: its own centre and any other move together by the two largest shifts at most. Gaps
        are rounded down.
        """
        rounding = 4 * (centers.shape[1] + 8) * torch.finfo(centers.dtype).eps
        shifts = (centers - self.centers).abs().sum(1).double()
        self.path = self.path + shifts.topk(min(2, len(shifts))).values.sum()
        self.centers, self.num_moves = centers, self.num_moves + 1
        rows = (self.safe_until <= self.path * (1 + self.num_moves * rounding)).nonzero()[:, 0]
        found = torch.empty_like(rows)
        for some, own in zip(rows.split(_chunk(centers)), found.split(_chunk(centers)), strict=True):
            table = torch.cdist(self.x.index_select(0, some), centers, p=1)
            least, nearest = table.min(1)
            own.copy_(nearest)
            other = table.scatter_(1, nearest[:, None], torch.inf).amin(1)
            self.safe_until.index_copy_(0, some, other.double() * (1 - rounding) - least + self.path)
        return _relabel(labels, rows, found)

    def doubt(self, row: int) -> None:
        self.safe_until[row] = -torch.inf

    def update(self, labels: Tensor, centers: Tensor) -> Tensor:
        self.table = labels.new_zeros(*centers.shape, self.num_blocks)  # mass
        self._put(self.mass, labels, self.block)
        medians = self._medians(labels, centers)
        self.objective = self.weights @ deviations(self.x, labels, medians, MANHATTAN)
        return medians

    def move(self, rows: Tensor, before: Tensor, labels: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        self._put(-self.mass[rows], before, self.block[rows])
        self._put(self.mass[rows], labels[rows], self.block[rows])
        medians = self._medians(labels, centers)
        last, self.objective = self.objective, self.weights @ deviations(self.x, labels, medians, MANHATTAN)
        return medians, last - self.objective

    def _put(self, mass: Tensor, labels: Tensor, block: Tensor) -> None:
        """Add the mass (n,) of rows to the table, given their clusters (n,) and their blocks (n, D)."""
        features = torch.arange(block.shape[1], device=block.device)
        cells = (labels[:, None] * len(features) + features) * self.num_blocks + block
        self.table.view(-1).index_add_(0, cells.flatten(), mass[:, None].expand_as(cells).flatten())

    def _medians(self, labels: Tensor, centers: Tensor) -> Tensor:
        up_to = self.table.cumsum(-1)  # (K, D, number of blocks)
        total = up_to[..., -1:]
        slack = total >> 50  # the weights' own rounding: thirds add up to a half only to that
        # The lower row reaches half of the mass, the upper one more.
        goals = (torch.cat([total - slack, total + slack + 1], -1) + 1) >> 1  # (K, D, 2)
        block = torch.searchsorted(up_to, goals).clamp_max_(self.num_blocks - 1)
        passed = up_to.gather(-1, block) - self.table.gather(-1, block)
        clusters, features, offsets = (torch.arange(n, device=labels.device) for n in (*centers.shape, self.size))
        places = (block[..., None] * self.size + offsets).clamp_max_(len(labels) - 1)
        places += features[:, None, None] * len(labels)
        rows = self.order.view(-1).index_select(0, places.view(-1))
        mass = self.mass.index_select(0, rows).view_as(places)
        mass *= labels.index_select(0, rows).view_as(places) == clusters[:, None, None, None]
        reached = passed[..., None] + mass.cumsum_(-1)
        place = torch.searchsorted(reached, goals[..., None]).clamp_max_(self.size - 1)
        middle = self.values.view(-1).index_select(0, places.gather(-1, place).view(-1)).view_as(goals)
        return torch.where(total[..., 0] > 0, middle.sum(-1) / 2, centers)


SQUARED_EUCLIDEAN = Metric(2, Means, kmeans_plusplus)
MANHATTAN = Metric(1, Medians, kmedians_plusplus)


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
    return torch.cat([torch.cdist(rows, centers, metric.power, compute_mode=exact).min(1).indices for rows in chunks])


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
    memory = x.new_empty(min(size, len(x)), x.shape[1])
    distances = torch.empty_like(x[:, 0])
    for rows, own, some in zip(x.split(size), labels.split(size), distances.split(size), strict=True):
        differences = _differences(rows, own, centers, memory)
        powers = differences.square_() if metric.power == 2 else differences.abs_()
        some.copy_(powers.double() @ ones)  # a product is much faster than a sum over few features
    return distances


def _differences(x: Tensor, labels: Tensor, centers: Tensor, memory: Tensor) -> Tensor:
    """Return the differences (n, D) of rows from the centres of their clusters, in memory (m, D) for m >= n of them."""
    own = torch.index_select(centers, 0, labels, out=memory[: len(x)])
    return torch.sub(x, own, out=own)


def _chunk(centers: Tensor) -> int:
    """Return how many rows to work on at a time."""
    num_cores = torch.get_num_threads() if centers.device.type == "cpu" else 2**7
    return max(1, num_cores * CHUNK // max(centers.shape))


def _relabel(labels: Tensor, rows: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Give rows (n,) the labels found; return those that changed, and their labels before."""
    before = labels.index_select(0, rows)
    changed = (found != before).nonzero()[:, 0]
    rows, found, before = (values.index_select(0, changed) for values in (rows, found, before))
    labels.index_copy_(0, rows, found)
    return rows, before


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
    k, labels = len(centers), clusters.assign(centers)
    weighed = bool((weights > 0).all())

    def reassign(centers: Tensor) -> tuple[Tensor, Tensor]:
        rows, before = clusters.reassign(labels, centers)
        if weighed:
            return rows, before
        count = weights[rows] > 0  # the others move nothing
        return rows[count], before[count]

    _fill_empty_clusters(x, weights, labels, centers, metric, clusters, 1)
    centers = clusters.update(labels, centers)
    counts = _counts(labels, weights, k)
    first, size = clusters.objective, centers.abs().amax(0)
    if not first.isfinite():
        raise ValueError(f"the objective overflows {x.dtype}: rescale x, whose largest entry is {x.abs().max():.3g}")
    falls: list[Tensor] = []  # by how much each later step lowers J
    for step in range(2, max_steps + 2):
        rows, before = reassign(centers)
        if not len(rows):  # clear the rounding that the moves have gathered before the last word
            centers = clusters.update(labels, centers)
            rows, before = reassign(centers)
        if not len(rows) or step > max_steps:
            break
        counts += labels.index_select(0, rows).bincount(minlength=k) - before.bincount(minlength=k)
        if counts.all():
            centers, fall = clusters.move(rows, before, labels, centers)
        else:
            objective = weights @ deviations(x, labels.index_copy(0, rows, before), centers, metric)
            _fill_empty_clusters(x, weights, labels, centers, metric, clusters, step)
            centers = clusters.update(labels, centers)
            counts = _counts(labels, weights, k)
            fall = objective - clusters.objective
        falls.append(fall)
        size = torch.maximum(size, centers.abs().amax(0))
    converged = not len(rows)
    if not converged:
        labels[rows] = before
        centers = clusters.update(labels, centers)
    last = (weights * deviations(x, labels, centers, metric)).sum()
    later = torch.stack([*falls, torch.zeros_like(last)]).flip(0).cumsum(0).flip(0)  # from each step to the last
    _raise_unless_sum(x, weights, metric, size, first, later[0], last, len(falls) + 1)
    return Clustering(centers, labels, last + later, converged)


def _raise_unless_sum(
    x: Tensor, weights: Tensor, metric: Metric, size: Tensor, first: Tensor, fall: Tensor, last: Tensor, num_steps: int
) -> None:
    """Raise unless J fell by what the steps lowered it, to rounding: it then fell at each of them.

    No entry of a centre was larger than ``size`` (D,).
    """
    eps = torch.finfo(x.dtype).eps
    total = weights.sum()
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
    x: Tensor, weights: Tensor, labels: Tensor, centers: Tensor, metric: Metric, clusters: Clusters, step: int
) -> None:
    """Leave no cluster empty: each empty one takes the row farthest from its own centre.

    One at a time, about centres brought up to date: the row then gives up a positive distance, so that J falls, and it
    leaves other rows behind in its old cluster, since a row alone lies on its centre. Rows without weight stay.
    """
    k = len(centers)
    while len(empty := (_counts(labels, weights, k) == 0).nonzero()):
        centers = clusters.update(labels, centers)
        distances = deviations(x, labels, centers, metric).where(weights > 0, 0)
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
        clusters.doubt(farthest)


def _warn_unless_converged(clustering: Clustering) -> None:
    if not clustering.converged:
        warnings.warn(
            f"Lloyd's algorithm has not reached a fixed point after {len(clustering.objective)} steps: raise max_steps",
            ConvergenceWarning,
            stacklevel=3,
        )
