"""Which centre is nearest to each row, and for how long it stays so."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**18
"""How many numbers a core works on at a time: they fit its cache."""


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
