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
    """Return the weights (N, K) of the rows in each of K parts: a row of x (N, D) counts where its nearest seed is.

    Without weights these are responsibilities of 0 and 1.

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
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError("x must be a floating tensor: torch.as_tensor(x, dtype=torch.float64) makes one of numbers")
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x must have shape (N, D) with at least one row and one column, not {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        row, column = (~torch.isfinite(x)).nonzero()[0].tolist()
        raise ValueError(f"x[{row}, {column}] is {x[row, column].item()}: drop or impute the row")
    num_components = check_num_components(num_components, len(x) if weights is None else int((weights > 0).sum()))
    if method == "k-means++":
        rows = spread_rows(x, num_components, generator, weights)
    elif method == "random":
        rows = random_rows(len(x), num_components, generator, weights)
    else:
        raise ValueError(f'method must be "k-means++" or "random", not {method!r}')
    scaled = rescale(x)
    labels = torch.cdist(scaled, scaled[rows.to(x.device)], compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
    parts = torch.nn.functional.one_hot(labels, num_components).to(x.dtype)
    return parts if weights is None else parts * weights[:, None]


def random_rows(num_rows: int, k: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
    """Return the numbers (k,) of different rows, drawn one after another with chances in proportion to their weights.

    Raises:
        ValueError: fewer than k rows have weight.
    """
    if weights is None:
        return torch.randperm(num_rows, generator=generator, device=generator.device)[:k]
    return torch.multinomial(weights.detach().to(generator.device), k, generator=generator)


def spread_rows(x: Tensor, k: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
    """Return the numbers (k,) of k rows of finite x (N, D), drawn by k-means++ (Arthur and Vassilvitskii 2007).

    The drawing is scikit-learn's, on the CPU, seeded from the generator. Rows repeat only if fewer than k are distinct.
    A row is as likely as if it were there as often as its weight (N,) says.
    """
    rows = rescale(x.detach().cpu().double())
    # scikit-learn expands the square, which cancels far from zero; the draw does not depend on the location
    rows = rows - rows.mean(0)
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
    sample_weight = None if weights is None else weights.detach().cpu().double().numpy()
    return torch.as_tensor(kmeans_plusplus(rows.numpy(), k, sample_weight=sample_weight, random_state=seed)[1])


def rescale(x: Tensor) -> Tensor:
    """Return x (N, D) with its largest entry between 1 and 2, so that no square overflows or vanishes.

    The divisor is a power of two, which rounds nothing.
    """
    return x / math.ldexp(1.0, math.frexp(x.abs().max().item())[1] - 1)


def check_num_components(num_components: Any, num_rows: int) -> int:
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
