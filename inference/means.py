"""The means of clusters: the second half-step of K-means on fixed rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mixproof.inference.expectation import Workspace
from mixproof.inference.nearest import FEW_FEATURES, chunk_size


class Means:
    """The means of clusters, brought up to date by the rows that change cluster."""

    def __init__(self, x: Tensor, weights: Tensor) -> None:
        self.x, self.weights, self.weighted = x, weights, not bool((weights == 1).all())
        self.rows = Workspace(x)

    def update(self, labels: Tensor, centers: Tensor) -> Tensor:
        while True:
            sums, totals, squares = self._sums(centers, labels)
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
        sums, totals, squares = self._sums(centers, labels.index_select(0, rows), before, rows=rows)
        self.totals = self.totals + totals
        if (self.totals < self.totals_summed / 64).any():  # what has left would weigh in by its rounding
            shift = (self.update(labels, centers) - centers).double()
        else:
            shift = sums / self.totals
        return centers + shift.to(centers), (self.totals * shift.square()).sum() - squares

    def _sums(
        self, centers: Tensor, come: Tensor, gone: Tensor | None = None, *, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return sums over rows (n,), or all: (K, D) of deviations from centres, (K, 1) of weights, () of squares.

        A row counts for the cluster that it has come to and, where ``gone`` is given, against the one it has left.
        """
        size = chunk_size(centers)
        sums = torch.zeros_like(centers, dtype=torch.float64)
        totals, squares = sums.new_zeros(len(centers), 1), sums.new_zeros(())
        moves = [(1, come)] if gone is None else [(1, come), (-1, gone)]
        for first in range(0, len(come), size):
            part = slice(first, first + size)
            x, weights = (
                values[part] if rows is None else values.index_select(0, rows[part])
                for values in (self.x, self.weights)
            )
            counts = weights.double()[:, None]
            for sign, labels in moves:
                own = labels[part]
                near = torch.index_select(centers, 0, own, out=self.rows("centers", *x.shape))
                deviations = torch.sub(x, near, out=near).double()
                weighted = deviations * counts if self.weighted else deviations
                sums += sign * _sums_by_label(weighted, own, len(centers))
                totals += sign * _sums_by_label(counts, own, len(centers))
                squares += sign * torch.dot(weighted.flatten(), deviations.flatten())
        return sums, totals, squares


def _sums_by_label(values: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return the sums (K, D) of the values (n, D) of each label (n,)."""
    if values.device.type == "cpu" and values.shape[1] < FEW_FEATURES:
        return torch.stack([values.new_zeros(k).index_add_(0, labels, column) for column in values.unbind(1)], 1)
    if values.device.type == "cpu":
        return values.new_zeros(k, values.shape[1]).index_add_(0, labels, values)
    # unlike additions in any order, a product with indicators is the same on every run of a GPU
    return values.new_zeros(k, len(values)).scatter_(0, labels[None], 1) @ values
