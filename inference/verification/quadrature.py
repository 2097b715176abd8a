"""Sums of a density: over all points of a finite support exactly, and over a grid in up to three dimensions.

The error of a grid is read off from coarser grids within it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixproof.inference.verification.report import Check

LogProb = Callable[[Tensor], Tensor]
GRID = {0: 1, 1: 5461 * 12, 2: 43 * 12, 3: 8 * 12}
"""Points on each continuous axis, by the number of those axes; multiples of twelve, for the coarser grids within."""
SMALLEST_GRID = 48
LARGEST_GRID = 2**20
UNSEEN = 4.0
SOME = 2**12
"""How many draws are asked for their density at most."""
COARSE = 2.0**-7
"""A grid that resolves less than this share of the mass says nothing."""


class DensityError(ValueError):
    """A log density raised at some points (N, D), was NaN there, or returned something other than (N,)."""

    def __init__(self, message: str, points: Tensor):
        super().__init__(message)
        self.points = points


def sums_to_one(log_prob: LogProb, support: Tensor) -> Check:
    """Check that the probabilities of all points of a finite support sum to one, to rounding.

    Args:
        log_prob: of points (M, D) returns their log probabilities (M,).
        support: all points (M, D).

    Raises:
        DensityError: as ``heights``.
    """
    total = float(heights(log_prob, support).exp().sum())
    tolerance = rounding(log_prob, support)
    passed = abs(total - 1) <= tolerance
    return Check(
        "sums to one", passed, abs(total - 1), tolerance, None, None if passed else {"sum": total, "claimed": 1.0}
    )


def grid_integral(log_prob: LogProb, draws: Tensor, *, columns: Sequence[Any] | None = None) -> Check | None:
    """Check that a density integrates to one, on a grid about draws.

    The box is the range of the draws, widened by itself on each side; discrete columns take all whole numbers in it.
    The tolerance is what the grid can resolve: how far the sums over the coarser grids inside it differ, the mass in
    the outer half of the widening, of which less lies beyond it, and the share of draws where the density is more than
    ``UNSEEN`` times as high as anywhere on the grid, whose points have then missed a peak. A grid that resolves less
    than ``COARSE`` says nothing, and passes with an infinite tolerance.

    Args:
        log_prob: of points (M, D) returns their log densities (M,).
        draws: (N, D), with at most three continuous columns.
        columns: D statements, as ``fitting_columns`` returns them; None if all columns are continuous.

    Returns:
        The check, or None where the grid would have too many points.

    Raises:
        DensityError: as ``heights``.
    """
    name = "integrates to one on a grid"
    columns = ["continuous"] * draws.shape[1] if columns is None else columns
    low, high = draws.amin(0), draws.amax(0)
    width = torch.where(high > low, high - low, 1.0)
    discrete = [isinstance(column, str) and column == "discrete" for column in columns]
    counted = math.prod(int(3 * w) + 1 for w, is_counted in zip(width.tolist(), discrete, strict=True) if is_counted)
    smooth = len(columns) - sum(discrete)
    size = GRID[smooth]
    if smooth:
        size = min(size, int((LARGEST_GRID / counted) ** (1 / smooth)) // 12 * 12)
    if counted > LARGEST_GRID or (smooth and size < SMALLEST_GRID):
        return None
    axes, masses = [], []  # of each axis, a function of (offset, step) that gives the weights of a coarser grid
    inner = []
    for lo, hi, w, column, is_counted in zip(
        low.tolist(), high.tolist(), width.tolist(), columns, discrete, strict=True
    ):
        if is_counted:
            axis = torch.arange(lo - w, hi + w + 1, dtype=torch.float64)
            fine = torch.zeros(len(axis), dtype=torch.bool)
        else:
            atoms = torch.empty(0, dtype=torch.float64) if isinstance(column, str) else column
            cell = 3 * w / size
            grid = lo - w + cell * (torch.arange(size, dtype=torch.float64) + 0.5)
            grid = torch.where(torch.isin(grid, atoms), grid + cell / 2**10, grid)
            axis = torch.cat([grid, atoms])
            fine = torch.arange(len(axis)) < size
        axes.append(axis)
        masses.append((fine, fine.double() * (3 * w / size) + (~fine).double()))
        inner.append(~((axis < lo - w / 2) | (axis > hi + w / 2)) | (~fine & (not is_counted)))
    points = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    parts = [heights(log_prob, part) for part in points.split(2**17)]
    density = torch.cat(parts).exp().reshape([len(axis) for axis in axes])

    def total(weights: Sequence[Tensor]) -> float:
        left = density
        for weight in weights:
            left = torch.tensordot(weight, left, dims=1)
        return float(left)

    def coarser(offset: int, step: int) -> float:
        kept = [~fine | (torch.arange(len(fine)) % step == offset) for fine, _ in masses]
        return total([mass * keep * (1 + (step - 1) * fine) for (fine, mass), keep in zip(masses, kept, strict=True)])

    whole = total([mass for _, mass in masses])
    beyond = abs(whole - total([mass * keep for (_, mass), keep in zip(masses, inner, strict=True)]))
    halves = [abs(coarser(i, 2) - whole) for i in range(2)]
    quarters = [abs(coarser(i, 4) - whole) / 4 for i in range(4)]
    some = draws[:: -(-len(draws) // SOME)]
    above = heights(log_prob, some) > density.max().log() + math.log(UNSEEN)
    missed = float(above.double().mean())
    missed += 4 * math.sqrt(missed / len(some))
    tolerance = 2 * max(halves + quarters) + beyond + missed + rounding(log_prob, points)
    error = abs(whole - 1)
    tolerance = tolerance if tolerance < COARSE else math.inf
    passed = error <= tolerance
    box = {"low": low - width, "high": high + width}
    return Check(
        name,
        passed,
        error,
        tolerance,
        counterexample=None if passed else {"integral": whole, "claimed": 1.0, **box},
        detail="" if tolerance < COARSE else "the grid does not resolve this density: left to sampling",
    )


def heights(log_prob: LogProb, points: Tensor) -> Tensor:
    """Return the log density at points (N, D) as float64 (N,).

    Raises:
        DensityError: the log density raises, is NaN, or has another shape.
    """
    try:
        found = log_prob(points).detach().to(torch.float64)
    except Exception as error:
        raise DensityError(f"log_prob raised {type(error).__name__}: {error}", points[:7]) from error
    if found.shape != points.shape[:1]:
        message = f"log_prob of points {tuple(points.shape)} has shape {tuple(found.shape)}"
        raise DensityError(message, points[:7])
    if (nan := found.isnan()).any():
        raise DensityError(f"log_prob is NaN at {int(nan.sum())} of {len(points)} points", points[nan][:7])
    return found


def rounding(log_prob: LogProb, points: Tensor) -> float:
    """Return the rounding that a sum of densities may carry, in the precision in which a log density answers.

    The log probability of a count n is a difference of terms as large as log n!.
    """
    dtype = log_prob(points[:1]).dtype
    counts = points[:, (points == points.round()).all(0)].abs()
    largest = float(counts.max()) if counts.numel() else 0.0
    terms = 2.0**10 + 8 * largest * math.log1p(largest)
    return terms * torch.finfo(dtype if dtype.is_floating_point else torch.float64).eps
