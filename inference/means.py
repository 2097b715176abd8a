"""The means of clusters: both half-steps of K-means on fixed rows."""

from __future__ import annotations

import torch
from torch import Tensor

from mixproof.inference.expectation import Workspace
from mixproof.inference.nearest import Margins, assign, chunk_size, places, relabel

FEW = 1 / 32
"""The share of rows that change at a step below which margins pay: they cost twice what a look does."""
FEW_FEATURES = 16
"""Below so many, an operation on rows is faster on one feature after another: torch's loops run over the features."""


class Means:
    """The means of clusters, and which of them is nearest to each row.

    A product of matrices in single precision tells all squared distances but for what is equal for all centres. The
    rows between whose centres its rounding could decide are asked again, by differences, as in ``assign``. Once few
    rows change, only those are asked whose margins are used up.
    """

    def __init__(self, x: Tensor, weights: Tensor) -> None:
        self.x, self.weights, self.weighted = x, weights, not bool((weights == 1).all())
        self.origin = x.mean(0).double()
        self.margins, self.settled = Margins(x, 2), False
        self._lay_out(torch.float32)
        self.rows = Workspace(x)
        self.codes, self.last = self.centred.new_empty(2, len(self.centred))

    def _lay_out(self, dtype: torch.dtype) -> None:
        """Copy the centred rows, beside them ones, and find their squared norms.

        Each core has a lane, (M, D + 1), of rows that follow one another, so that what it writes it reads again.
        """
        num_rows, num_features = self.x.shape
        num_lanes = torch.get_num_threads() if self.x.device.type == "cpu" else 1
        shape = (num_lanes, -(-num_rows // num_lanes), num_features + 1)
        self.lanes = torch.empty(shape, dtype=dtype, device=self.x.device)
        self.centred, self.norms = self.lanes.flatten(0, 1), self.lanes.new_empty(num_rows)
        self.centred[num_rows:] = 0
        features = self.lanes.new_ones(num_features + 1)
        features[-1] = 0
        size = max(1, 2**16 // num_features)
        parts = (values.split(size) for values in (self.x, self.centred[:num_rows], self.norms))
        for x, rows, norms in zip(*parts, strict=True):
            if num_features < FEW_FEATURES:
                for column, entries, center in zip(rows.unbind(1), x.unbind(1), self.origin, strict=False):
                    torch.sub(entries, center, out=column)
            else:
                rows[:, :-1] = x - self.origin
            rows[:, -1] = 1
            torch.mv(rows.square(), features, out=norms)
        self.reach = self.norms.amax()
        self.space = Workspace(self.lanes)

    def assign(self, centers: Tensor) -> Tensor:
        self.settled = False
        self._ask_all(centers)
        labels = self.codes[: len(self.x)].long().sub_(len(centers))
        self._decide(labels, torch.arange(len(labels), device=labels.device), centers)
        return labels

    def reassign(self, labels: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        if self.settled:
            rows = self.margins.used_up(centers)
            found = self._ask(rows, centers)
        else:
            self.codes, self.last = self.last, self.codes
            self._ask_all(centers)
            rows = places((self.codes != self.last)[: len(self.x)])
            found = self.codes.index_select(0, rows).long().sub_(len(centers))
        self._decide(found, rows, centers)
        rows, before = relabel(labels, rows, found)
        if not self.settled and len(rows) < len(labels) * FEW:
            self.settled = True
            self.margins.start(centers)
        return rows, before

    def _decide(self, found: Tensor, rows: Tensor, centers: Tensor) -> None:
        """Find by differences the labels of rows (n,) that have none."""
        k = len(centers)
        doubtful = places(found != found.clamp(0, k - 1))
        if len(doubtful) > len(self.x) // 8 and self.centred.dtype == torch.float32:
            self._lay_out(torch.float64)
        if len(doubtful):
            rows = rows.index_select(0, doubtful)
            labels = assign(self.x.index_select(0, rows), centers, 2)
            found.index_copy_(0, doubtful, labels)
            self.codes.index_copy_(0, rows, (labels + k).to(self.codes))

    def _products(self, centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (K, D + 1), whose products with rows are squared distances but for the norms of the rows; by how much
        rounding may put one of them off; and numbers (1, K), k and more, of which two exceed any single one."""
        k, dtype = len(centers), self.centred.dtype
        location = centers - self.origin
        squares = location.square().sum(1, keepdim=True)
        eps = max(torch.finfo(dtype).eps, torch.finfo(self.x.dtype).eps)
        longest = self.reach + squares.max().to(dtype)
        slack = 4 * (self.x.shape[1] + 8) * (eps * longest + torch.finfo(dtype).tiny)
        numbers = torch.arange(k, 2 * k, dtype=dtype, device=self.x.device)[None]
        return torch.cat([-2 * location, squares], 1).to(dtype), slack, numbers

    def _ask_all(self, centers: Tensor) -> None:
        """Set the codes: k plus the label of the nearest centre, or no such number where rounding could decide it."""
        k, num_lanes = len(centers), len(self.lanes)
        size = -(-2 * chunk_size(centers) // num_lanes)
        factors, slack, numbers = self._products(centers)
        factors, numbers = factors.expand(num_lanes, -1, -1), numbers.expand(num_lanes, 1, -1)
        codes = self.codes.view(num_lanes, 1, -1)
        for rows, some in zip(self.lanes.split(size, 1), codes.split(size, 2), strict=True):
            n = some.shape[2]
            table = torch.bmm(factors, rows.mT, out=self.space("table", num_lanes, k, n))
            least = torch.amin(table, 1, keepdim=True, out=self.space("least", num_lanes, 1, n))
            nearest = table.le_(least.add_(slack))
            some.copy_(torch.bmm(numbers, nearest, out=least))

    def _ask(self, rows: Tensor, centers: Tensor) -> Tensor:
        """Return the labels of rows (n,), or no number of a centre where rounding could decide; and set the margins."""
        k, size = len(centers), chunk_size(centers)
        factors, slack, numbers = self._products(centers)
        far = torch.finfo(factors.dtype).max / 4
        found = torch.empty_like(rows)
        for some, own in zip(rows.split(size), found.split(size), strict=True):
            n = len(some)
            centred = torch.index_select(self.centred, 0, some, out=self.space("centred", n, factors.shape[1]))
            norms = torch.index_select(self.norms, 0, some, out=self.space("norms", n))
            table = torch.mm(factors, centred.mT, out=self.space("table", k, n))
            least = torch.amin(table, 0, keepdim=True, out=self.space("least", 1, n))
            bound = torch.add(least, slack, out=self.space("bound", 1, n))
            nearest = self.space("nearest", k, n).copy_(table).le_(bound)
            other = torch.amin(table.add_(nearest, alpha=far), 0, keepdim=True, out=self.space("other", 1, n))
            code = torch.mm(numbers, nearest, out=self.space("code", 1, n))
            own.copy_(code[0]).sub_(k)
            other = other.add_(norms).sub_(slack).clamp_min_(0).sqrt_()
            self.margins.set(some, bound.add_(norms).sqrt_()[0], other.mul_(code.lt_(2 * k))[0])
        return found

    def doubt(self, row: int) -> None:
        self.codes[row] = 0
        self.margins.doubt(row)

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
