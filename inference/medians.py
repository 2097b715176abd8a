"""The medians of clusters: the second half-step of K-medians on fixed rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixproof.inference.nearest import deviations, places


class Medians:
    """The coordinate-wise medians of clusters; between two rows that share the weight evenly, the midpoint.

    Each feature is sorted once, and the sorted rows are cut into some 2 sqrt(N) blocks. The weight of every cluster in
    every block is kept, which says in which block a median lies; only the rows of that block are looked at.
    """

    def __init__(self, x: Tensor, weights: Tensor) -> None:
        self.x, self.weights = x, weights
        num_rows, num_features = x.shape
        self.size = max(1, 1 << num_rows.bit_length() // 2 >> 1)
        self.num_blocks = -(-num_rows // self.size)
        values, order = x.mT.contiguous().sort()  # (D, N)
        whole = torch.arange(self.num_blocks * self.size, device=x.device).clamp_max_(num_rows - 1)
        self.values, self.order = values.index_select(1, whole), order.index_select(1, whole)  # the last row fills up
        block = torch.arange(num_features * self.num_blocks, device=x.device).repeat_interleave(self.size)
        block = block.view_as(self.order)[:, :num_rows]
        self.block = torch.empty_like(order).scatter_(1, order, block).mT.contiguous()  # (N, D), by their numbers
        # Weights in whole multiples of a power of two have exact sums in any order.
        exponent = 60 - math.frexp(weights.double().sum().item())[1]
        self.unit = 2.0 ** -(exponent // 2), 2.0 ** -(exponent - exponent // 2)
        scaled = weights.double() * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)  # 2^1133 overflows
        self.mass = torch.where(weights > 0, scaled.round().clamp_min(1), 0).long()

    def update(self, labels: Tensor, centers: Tensor) -> Tensor:
        self.table = labels.new_zeros(*centers.shape, self.num_blocks)  # mass
        self._put(self.mass, labels, self.block)
        medians = self._medians(labels, centers)
        self.objective = self.weights @ deviations(self.x, labels, medians, 1)
        return medians

    def move(self, rows: Tensor, before: Tensor, labels: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        last, come = self.objective, labels.index_select(0, rows)
        x, weights, block = (values.index_select(0, rows) for values in (self.x, self.weights, self.block))
        mass = self.mass.index_select(0, rows)
        self._put(-mass, before, block)
        self._put(mass, come, block)
        medians = self._medians(labels, centers)
        fall = self._fall(labels, centers, medians)
        if fall is None:
            self.objective = self.weights @ deviations(self.x, labels, medians, 1)
            return medians, last - self.objective
        fall += weights @ (deviations(x, before, centers, 1) - deviations(x, come, centers, 1))
        self.objective = last - fall
        return medians, fall

    def _put(self, mass: Tensor, labels: Tensor, block: Tensor) -> None:
        """Add the mass (n,) of rows to the table, given their clusters (n,) and their blocks (n, D)."""
        cells = block + labels[:, None] * self.table[0].numel()
        self.table.view(-1).index_add_(0, cells.flatten(), mass[:, None].expand_as(cells).flatten())

    def _medians(self, labels: Tensor, centers: Tensor) -> Tensor:
        self.up_to = up_to = self.table.cumsum(-1)  # (K, D, number of blocks)
        total = up_to[..., -1:]
        slack = total >> 50  # the weights' own rounding: thirds add up to a half only to that
        # The lower row reaches half of the mass, the upper one more.
        goals = (torch.cat([total - slack, total + slack + 1], -1) + 1) >> 1  # (K, D, 2)
        block = torch.searchsorted(up_to, goals).clamp_max_(self.num_blocks - 1)
        passed = up_to.gather(-1, block) - self.table.gather(-1, block)
        goals, block, passed = (values.flatten(0, 1) for values in (goals, block, passed))
        cells = torch.arange(len(goals), device=labels.device)
        found = self._values_at(cells, block[:, 0], goals - passed[:, :1], labels)
        apart = places(block[:, 1] != block[:, 0])  # few
        found[apart, 1:] = self._values_at(apart, block[apart, 1], (goals - passed)[apart, 1:], labels)
        return torch.where(total[..., 0] > 0, found.sum(-1).view_as(centers) / 2, centers)

    def _fall(self, labels: Tensor, centers: Tensor, medians: Tensor) -> Tensor | None:
        """Return by how much J falls from centres (K, D) to the medians, or None where a pass over all rows is less.

        A row that is not between an old and a new entry comes closer by what lies between, or moves away by it.
        """
        num_rows, k = len(labels), len(centers)
        old, new = (values.mT.contiguous() for values in (centers, medians))  # (D, K)
        low, high = torch.minimum(old, new), torch.maximum(old, new)
        start, stop = torch.searchsorted(self.values, low), torch.searchsorted(self.values, high, right=True)
        stop.clamp_max_(num_rows)
        block = start.clamp_max(num_rows - 1) // self.size
        first = block * self.size  # the rows of the block count too: they tell the mass below
        lengths = (stop - first).where(low != high, 0).flatten()
        if (total := int(lengths.sum())) * 8 > self.block.numel():
            return None
        cells = torch.arange(len(lengths), device=labels.device).repeat_interleave(lengths, output_size=total)
        ends = lengths.cumsum(0)
        positions = torch.arange(total, device=labels.device) + (first.flatten() - ends + lengths).index_select(
            0, cells
        )
        positions += cells // k * self.values.shape[1]
        rows = self.order.view(-1).index_select(0, positions)
        mine = places(labels.index_select(0, rows) == cells % k)
        rows, cells, positions = (values.index_select(0, mine) for values in (rows, cells, positions))
        x = self.values.view(-1).index_select(0, positions)
        between = x >= low.view(-1).index_select(0, cells)
        mass = self.mass.index_select(0, rows)
        inside, apart = torch.zeros_like(lengths), torch.zeros_like(lengths)
        inside.index_add_(0, cells, mass.where(between, 0))
        apart.index_add_(0, cells, mass.where(~between, 0))
        index = block.mT[..., None]
        passed = (self.up_to.gather(-1, index) - self.table.gather(-1, index))[..., 0].mT.flatten()
        below = passed + apart
        above = self.up_to[..., -1].mT.flatten() - below - inside
        old, new = (values.double().flatten() for values in (old, new))
        way = new - old
        sides = (above - below).double() * self.unit[0] * self.unit[1]
        old, new = (values.index_select(0, cells) for values in (old, new))
        weights = self.weights.double().index_select(0, rows).where(between, 0)
        x = x.double()
        return way @ sides + weights @ (way.sign().index_select(0, cells) * ((x - old) + (x - new)))

    def _values_at(self, cells: Tensor, block: Tensor, goals: Tensor, labels: Tensor) -> Tensor:
        """Return the entries (m, G) at which clusters, in some of their cells (m,), cluster by feature, reach goals.

        These are masses (m, G) from the beginning of a block (m,) on.
        """
        num_features = self.table.shape[1]
        clusters, features = cells // num_features, cells % num_features
        blocks = features * self.num_blocks + block
        rows = self.order.view(-1, self.size).index_select(0, blocks).view(-1)
        mine = labels.index_select(0, rows).view(-1, self.size) == clusters[:, None]
        mass = self.mass.index_select(0, rows).view_as(mine).mul_(mine)
        place = torch.searchsorted(mass.cumsum_(-1), goals).clamp_max_(self.size - 1)
        return self.values.view(-1, self.size).index_select(0, blocks).gather(-1, place)
