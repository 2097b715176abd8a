"""First centres spread over the data: k-means++ for squared Euclidean distance, and its counterpart for L1.

Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding" (2007), section 2.2, in the greedy variant: of
a few candidates for each further centre, the one that lowers the potential most is kept. Section 5 of the paper covers
a potential that sums the l-th power of the distance, by drawing rows with probability proportional to it; L1 is l = 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixproof.inference.validation import check_data, check_row_weights
from mixproof.models.initial import check_num_components, spread_rows


def kmeans_plusplus(x: Tensor, k: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
    """Return k rows of x, drawn one after another by their squared distance to the nearest row drawn before.

    The drawing is scikit-learn's, on the CPU, seeded from the generator, and loses nothing far from zero.

    Args:
        x: (N, D), the data.
        k: the number of centres.
        generator: the only source of randomness; it may live on another device than x.
        weights: (N,), how often each row counts, not negative; None counts each once. A row of weight 0 is never drawn.

    Returns:
        centers: (K, D), rows of x. Rows repeat only if fewer than k are distinct.

    Raises:
        TypeError: x does not hold numbers, or k is not an integer.
        ValueError: x is not a finite (N, D), or k is not between 1 and the number of rows that count.
    """
    x = check_data(x)
    weights = check_row_weights(weights, x)
    k = check_num_components(k, len(x) if weights is None else int((weights > 0).sum()))
    return x[spread_rows(x, k, generator, weights).to(x.device)]


def kmedians_plusplus(x: Tensor, k: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
    """Return k rows of x, drawn one after another by their L1 distance to the nearest row drawn before.

    Args:
        x: (N, D), the data.
        k: the number of centres.
        generator: the only source of randomness; it may live on another device than x.
        weights: (N,), how often each row counts, not negative; None counts each once. A row of weight 0 is never drawn.

    Returns:
        centers: (K, D), rows of x. Rows repeat only if fewer than k are distinct.

    Raises:
        TypeError: x does not hold numbers, or k is not an integer.
        ValueError: x is not a finite (N, D), or k is not between 1 and the number of rows that count.
    """
    x = check_data(x)
    weights = check_row_weights(weights, x)
    weights = torch.ones_like(x[:, 0]) if weights is None else weights
    k = check_num_components(k, int((weights > 0).sum()))
    num_candidates = 2 + int(math.log(k))  # as many as scikit-learn tries for K-means

    def draw(chances: Tensor, size: int) -> Tensor:
        uniform = torch.rand(size, generator=generator, device=generator.device, dtype=torch.float64).to(x.device)
        cumulative = chances.double().cumsum(0)
        # right=True passes over rows of probability zero; rounding may put a draw past the last row
        return torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp_max(last)

    last = int((weights > 0).nonzero()[-1])
    rows = [int(draw(weights, 1))]
    nearest = torch.cdist(x, x[rows], p=1)[:, 0]
    for _ in range(1, k):
        candidates = draw(weights * nearest, num_candidates)
        nearest_with = torch.minimum(nearest[:, None], torch.cdist(x, x[candidates], p=1))
        best = int((weights @ nearest_with).argmin())
        rows.append(int(candidates[best]))
        nearest = nearest_with[:, best]
    return x[rows]
