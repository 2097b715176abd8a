"""Which centre is nearest to each row, and for how long it stays so."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mixproof.inference.expectation import Workspace

CHUNK = 2**18
"""How many numbers a core works on at a time: they fit its cache."""
FEW = 1 / 32
"""The share of rows that change at a step below which margins pay: they cost as much as a look, or twice that."""
FEW_FEATURES = 16
"""Below so many, an operation on rows is faster on one feature after another: torch's loops run over the features."""


def assign(x: Tensor, centers: Tensor, power: int) -> Tensor:
    """Return the labels (N,) of the nearest centres: the first half-step; of equally near centres, the first.

    Args:
        x: (N, D), the data.
        centers: (K, D).
        power: p, the distance being the sum over d of abs(x_d - mu_d)^p: 1 or 2.
    """
    # From differences: the expanded square would lose clusters that are narrow beside the spread of the data. The p-th
    # power is monotone and may be left out.
    exact = "donot_use_mm_for_euclid_dist"
    chunks = x.split(chunk_size(centers))
    return torch.cat([torch.cdist(rows, centers, power, compute_mode=exact).min(1).indices for rows in chunks])


def deviations(x: Tensor, labels: Tensor, centers: Tensor, power: int) -> Tensor:
    """Return the distance (N,) of each row from the centre of its cluster; the objective J is their weighted sum.

    Args:
        x: (N, D), the data.
        labels: (N,), integers from 0 to K - 1.
        centers: (K, D).
        power: p, the distance being the sum over d of abs(x_d - mu_d)^p: 1 or 2.
    """
    ones = torch.ones(x.shape[1], dtype=torch.float64, device=x.device)
    size = chunk_size(x[:1])
    memory = x.new_empty(min(size, len(x)), x.shape[1])
    distances = torch.empty_like(x[:, 0])
    for rows, own, some in zip(x.split(size), labels.split(size), distances.split(size), strict=True):
        near = torch.index_select(centers, 0, own, out=memory[: len(rows)])
        differences = torch.sub(rows, near, out=near)
        powers = differences.square_() if power == 2 else differences.abs_()
        some.copy_(powers.double() @ ones)  # a product is much faster than a sum over few features
    return distances


class Nearest:
    """Which centre is nearest to each of fixed rows, kept from step to step.

    Distances in single precision tell it but for the rows between whose centres rounding could decide; those are asked
    again as in ``assign``. Of squared distances, what is equal for all centres is left out: a product of matrices gives
    the rest. Once few rows change, only those are asked whose margins are used up.
    """

    def __init__(self, x: Tensor, power: int) -> None:
        self.x, self.power = x, power
        self.origin = x.mean(0).double()
        self.margins, self.settled = Margins(x, power), False
        self._lay_out(torch.float32)
        self.codes, self.last = self.centred.new_empty(2, len(self.centred))

    def _lay_out(self, dtype: torch.dtype) -> None:
        """Copy the centred rows, beside them ones for squared distances, and find their norms to the power.

        Each core has a lane of rows that follow one another, so that what it writes it reads again.
        """
        num_rows, num_features = self.x.shape
        num_lanes = torch.get_num_threads() if self.x.device.type == "cpu" else 1
        shape = (num_lanes, -(-num_rows // num_lanes), num_features + self.power - 1)
        self.lanes = torch.empty(shape, dtype=dtype, device=self.x.device)
        self.centred, self.norms = self.lanes.flatten(0, 1), self.lanes.new_empty(num_rows)
        self.centred[num_rows:] = 0
        self.centred[:num_rows, num_features:] = 1
        features = self.lanes.new_ones(shape[2])
        features[num_features:] = 0
        size = max(1, 2**16 // num_features)
        parts = (values.split(size) for values in (self.x, self.centred[:num_rows], self.norms))
        for x, rows, norms in zip(*parts, strict=True):
            if num_features < FEW_FEATURES:
                for column, entries, center in zip(rows.unbind(1), x.unbind(1), self.origin, strict=False):
                    torch.sub(entries, center, out=column)
            else:
                rows[:, :num_features] = x - self.origin
            torch.mv(rows.square() if self.power == 2 else rows.abs(), features, out=norms)
        self.reach = self.norms.amax()
        self.space = Workspace(self.lanes)

    def assign(self, centers: Tensor) -> Tensor:
        """Return the labels (N,) of the centres (K, D) nearest to the rows."""
        self.settled = False
        self._ask_all(centers)
        labels = self.codes[: len(self.x)].long().sub_(len(centers))
        self._decide(labels, torch.arange(len(labels), device=labels.device), centers)
        return labels

    def reassign(self, labels: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        """Bring up to date the labels of the last call; return which rows (n,) changed, and their labels before."""
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

    def doubt(self, row: int) -> None:
        """Have the next call ask again for the label of a row, which has been changed from outside."""
        self.codes[row] = 0
        self.margins.doubt(row)

    def _decide(self, found: Tensor, rows: Tensor, centers: Tensor) -> None:
        """Find by differences the labels of rows (n,) that have none."""
        k = len(centers)
        doubtful = places(found != found.clamp(0, k - 1))
        if len(doubtful) > len(self.x) // 8 and self.centred.dtype == torch.float32:
            self._lay_out(torch.float64)
        if len(doubtful):
            rows = rows.index_select(0, doubtful)
            labels = assign(self.x.index_select(0, rows), centers, self.power)
            found.index_copy_(0, doubtful, labels)
            self.codes.index_copy_(0, rows, (labels + k).to(self.codes))

    def _prepared(self, centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return centres as ``_distances`` takes them; by how much rounding may put a distance off; and numbers (1, K),
        k and more, of which two exceed any single one."""
        k, dtype = len(centers), self.centred.dtype
        location = centers - self.origin
        norms = location.abs().pow(self.power).sum(1, keepdim=True)
        eps = max(torch.finfo(dtype).eps, torch.finfo(self.x.dtype).eps)
        longest = self.reach + norms.max().to(dtype)
        slack = 4 * (self.x.shape[1] + 8) * (eps * longest + torch.finfo(dtype).tiny)
        numbers = torch.arange(k, 2 * k, dtype=dtype, device=self.x.device)[None]
        factors = torch.cat([-2 * location, norms], 1) if self.power == 2 else location
        return factors.to(dtype), slack, numbers

    def _distances(self, factors: Tensor, rows: Tensor) -> Tensor:
        """Return the distances (*, K, n) of rows (*, n, ...) to the power, squared ones less the rows' norms."""
        if self.power == 1:
            return torch.cdist(factors, rows, 1)
        return torch.matmul(factors, rows.mT, out=self.space("table", *factors.shape[:-1], rows.shape[-2]))

    def _ask_all(self, centers: Tensor) -> None:
        """Set the codes: k plus the label of the nearest centre, or no such number where rounding could decide it."""
        num_lanes = len(self.lanes)
        size = -(-2 * chunk_size(centers) // num_lanes)
        factors, slack, numbers = self._prepared(centers)
        factors, numbers = factors.expand(num_lanes, -1, -1), numbers.expand(num_lanes, 1, -1)
        codes = self.codes.view(num_lanes, 1, -1)
        for rows, some in zip(self.lanes.split(size, 1), codes.split(size, 2), strict=True):
            table = self._distances(factors, rows)
            least = torch.amin(table, 1, keepdim=True, out=self.space("least", num_lanes, 1, some.shape[2]))
            nearest = table.le_(least.add_(slack))
            some.copy_(torch.bmm(numbers, nearest, out=least))

    def _ask(self, rows: Tensor, centers: Tensor) -> Tensor:
        """Return the labels of rows (n,), or no number of a centre where rounding could decide; and set the margins."""
        k, size = len(centers), chunk_size(centers)
        factors, slack, numbers = self._prepared(centers)
        far = torch.finfo(factors.dtype).max / 4
        found = torch.empty_like(rows)
        for some, own in zip(rows.split(size), found.split(size), strict=True):
            n = len(some)
            centred = torch.index_select(self.centred, 0, some, out=self.space("centred", n, factors.shape[1]))
            table = self._distances(factors, centred)
            least = torch.amin(table, 0, keepdim=True, out=self.space("least", 1, n))
            bound = torch.add(least, slack, out=self.space("bound", 1, n))
            nearest = self.space("nearest", k, n).copy_(table).le_(bound)
            other = torch.amin(table.add_(nearest, alpha=far), 0, keepdim=True, out=self.space("other", 1, n))
            code = torch.mm(numbers, nearest, out=self.space("code", 1, n))
            own.copy_(code[0]).sub_(k)
            other.sub_(slack)
            if self.power == 2:
                norms = torch.index_select(self.norms, 0, some, out=self.space("norms", n))
                other, bound = other.add_(norms).clamp_min_(0).sqrt_(), bound.add_(norms).sqrt_()
            self.margins.set(some, bound[0], other.mul_(code.lt_(2 * k))[0])
        return found


class Margins:
    """How far the centres may still move before a row can have another nearest one.

    By the triangle inequality its own centre and any other move together by the two largest shifts at most: what the
    row loses of the gap between the two at each step.
    """

    def __init__(self, x: Tensor, power: int) -> None:
        self.power = power
        self.safe_until = torch.empty_like(x[:, 0], dtype=torch.float64)  # on the path of the centres

    def start(self, centers: Tensor) -> None:
        """Forget all gaps; the path begins at these centres (K, D)."""
        self.centers, self.path, self.num_moves = centers, self.safe_until.new_zeros(()), 0
        self.safe_until.fill_(-torch.inf)

    def used_up(self, centers: Tensor) -> Tensor:
        """Move on to centres (K, D); return the rows (n,) of which it is open which is nearest."""
        rounding = 4 * (centers.shape[1] + 8) * torch.finfo(centers.dtype).eps
        shifts = torch.linalg.vector_norm((centers - self.centers).double(), self.power, 1)
        self.path = self.path + shifts.topk(min(2, len(shifts))).values.sum()
        self.centers, self.num_moves = centers, self.num_moves + 1
        return places(self.safe_until <= self.path * (1 + self.num_moves * rounding))

    def set(self, rows: Tensor, least: Tensor, other: Tensor) -> None:
        """Keep for rows (n,) how far they are from their centres (n,) at most, and from any other (n,) at least."""
        self.safe_until.index_copy_(0, rows, other.double() - least + self.path)

    def doubt(self, row: int) -> None:
        self.safe_until[row] = -torch.inf


def relabel(labels: Tensor, rows: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Give rows (n,) the labels found; return those that changed, and their labels before."""
    before = labels.index_select(0, rows)
    changed = places(found != before)
    rows, found, before = (values.index_select(0, changed) for values in (rows, found, before))
    labels.index_copy_(0, rows, found)
    return rows, before


def places(mask: Tensor) -> Tensor:
    """Return where a mask (N,) is true, in order."""
    if mask.device.type == "cpu":  # numpy finds them several times as fast as torch
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero()[:, 0]


def chunk_size(centers: Tensor) -> int:
    """Return how many rows to work on at a time."""
    num_cores = torch.get_num_threads() if centers.device.type == "cpu" else 2**7
    return max(1, num_cores * CHUNK // max(centers.shape))
