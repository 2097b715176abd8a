"""A first guess for EM: a hard partition of the rows around seeds, and what every start checks and draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from sklearn.cluster import kmeans_plusplus
from torch import Tensor


def partition(
    x: Tensor, num_components: int, generator: torch.Generator, method: str, weights: Tensor | None = None
) -> Tensor:
    """Return responsibilities (N, K) of 0 and 1 that assign each row of x (N, D) to the nearest of K seeds.

    Args:
        x: (N, D), N >= K.
        num_components: K.
        generator: the only source of randomness.
        method: ``"k-means++"`` spreads the seeds (Arthur and Vassilvitskii 2007); ``"random"`` draws K different rows.
        weights: (N,), how often each row counts, not negative; None counts each once. Only rows that count are seeds.

    Raises:
        TypeError: x is not a floating tensor, or the number of components is not an integer.
        ValueError: x is not a finite matrix, the method is another one, or K is below 1 or above the number of rows
            that count.
    """
    check_rows(x)
    weights = row_weights(x, weights)
    num_components = check_num_components(num_components, int((weights > 0).sum()))
    if method == "k-means++":
        rows = spread_rows(x, num_components, generator, weights)
    elif method == "random":
        uniform = torch.rand(len(x), generator=generator, device=generator.device, dtype=torch.float64)
        # Efraimidis and Spirakis (2006): the order of these keys draws one by one, in proportion to the weights
        rows = (uniform.log() / weights.detach().to(uniform)).topk(num_components).indices
    else:
        raise ValueError(f'method must be "k-means++" or "random", not {method!r}')
    scaled = rescale(x, weights)
    labels = torch.cdist(scaled, scaled[rows.to(x.device)], compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
    return torch.nn.functional.one_hot(labels, num_components).to(x.dtype)


def check_rows(x: Tensor) -> None:
    """Say what is wrong with rows x (N, D).

    Raises:
        TypeError: x is not a floating tensor.
        ValueError: x is not a matrix with an entry, or an entry is not finite.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError("x must be a floating tensor: torch.as_tensor(x, dtype=torch.float64) makes one of numbers")
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x must have shape (N, D) with at least one row and one column, not {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        row, column = (~torch.isfinite(x)).nonzero()[0].tolist()
        raise ValueError(f"x[{row}, {column}] is {x[row, column].item()}: drop or impute the row")


def row_weights(x: Tensor, weights: Tensor | None) -> Tensor:
    """Return how often each row of x (N, D) counts, (N,): once unless weights are given.

    Raises:
        ValueError: there is not one weight for each row, or one is negative or not finite.
    """
    if weights is None:
        return torch.ones_like(x[:, 0])
    if weights.shape != x.shape[:1]:
        raise ValueError(f"weights must have shape ({len(x)},), one for each row, not {tuple(weights.shape)}")
    if not (torch.isfinite(weights) & (weights >= 0)).all():
        raise ValueError("a weight must be finite and not negative")
    return weights.to(x)


def counted_rows(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return rows (N, D) with zeros in those that do not count, and how often each counts (N,).

    A square that overflows, times a weight of 0, would be NaN.

    Raises:
        ValueError: as ``row_weights``.
    """
    if weights is None:
        return x, row_weights(x, None)
    weights = row_weights(x, weights)
    return x.where(weights[:, None] > 0, 0), weights


def spread_rows(x: Tensor, k: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
    """Return the numbers (k,) of k rows of finite x (N, D), drawn by k-means++ (Arthur and Vassilvitskii 2007).

    The drawing is scikit-learn's, on the CPU, seeded from the generator. Rows repeat only if fewer than k are distinct.
    A row is as likely as if it were there as often as its weight (N,) says; one of weight 0 is never drawn.
    """
    rows = x.detach().cpu().double()
    weights = row_weights(rows, weights).detach()
    candidates = weights.nonzero()[:, 0]
    rows = rescale(rows[candidates])
    # scikit-learn expands the square, which cancels far from zero; the draw does not depend on the location
    rows = rows - rows.mean(0)
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    _, drawn = kmeans_plusplus(rows.numpy(), k, sample_weight=weights[candidates].numpy(), random_state=seed)
    return candidates[torch.as_tensor(drawn)]


def rescale(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return x (N, D) with its largest entry between 1 and 2, so that no square overflows or vanishes.

    The divisor is a power of two, which rounds nothing. Rows of weight 0 do not count, and may become infinite.
    """
    counted = x if weights is None else x[weights > 0]
    return x / math.ldexp(1.0, math.frexp(counted.abs().max().item())[1] - 1)


def check_num_components(num_components: Any, num_rows: float = math.inf) -> int:
    """Return the number of components as an int, or say why data of so many rows cannot carry it.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below 1 or above the number of rows.
    """
    if isinstance(num_components, bool) or not isinstance(num_components, int | np.integer):
        raise TypeError(f"the number of components must be an integer, not {num_components!r}")
    if num_components < 1:
        raise ValueError(f"the number of components must be at least 1, not {num_components}")
    if num_components > num_rows:
        raise ValueError(f"{num_components} components need at least as many rows, and x has {num_rows}")
    return int(num_components)
