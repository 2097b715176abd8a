"""A first guess for EM: a hard partition of the rows around seeds."""

from __future__ import annotations

import torch
from sklearn.cluster import kmeans_plusplus
from torch import Tensor


def partition(x: Tensor, num_components: int, generator: torch.Generator, method: str) -> Tensor:
    """Return responsibilities (N, K) of 0 and 1 that assign each row of x (N, D) to the nearest of K seeds.

    Args:
        x: (N, D), N >= K.
        num_components: K.
        generator: the only source of randomness.
        method: ``"k-means++"`` spreads the seeds (Arthur and Vassilvitskii 2007); ``"random"`` draws K different rows.

    Raises:
        TypeError: x is not a floating tensor, or the number of components is not an integer.
        ValueError: x is not a finite matrix, the method is another one, or K is below 1 or above N.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError("x must be a floating tensor: torch.as_tensor(x, dtype=torch.float64) makes one of numbers")
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x must have shape (N, D) with at least one row and one column, not {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        row, column = (~torch.isfinite(x)).nonzero()[0].tolist()
        raise ValueError(f"x[{row}, {column}] is {x[row, column].item()}: drop or impute the row")
    check_num_components(num_components)
    if num_components > len(x):
        raise ValueError(f"{num_components} components need at least as many rows, and x has {len(x)}")
    if method == "k-means++":
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        _, rows = kmeans_plusplus(x.detach().cpu().numpy(), num_components, random_state=seed)
        seeds = x[torch.as_tensor(rows, device=x.device)]
    elif method == "random":
        rows = torch.randperm(len(x), generator=generator, device=generator.device)[:num_components]
        seeds = x[rows.to(x.device)]
    else:
        raise ValueError(f'method must be "k-means++" or "random", not {method!r}')
    labels = torch.cdist(x, seeds, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
    return torch.nn.functional.one_hot(labels, num_components).to(x.dtype)


def check_num_components(num_components: int) -> None:
    """Raise unless the number of components is an integer of at least 1."""
    if isinstance(num_components, bool) or not isinstance(num_components, int):
        raise TypeError(f"the number of components must be an integer, not {num_components!r}")
    if num_components < 1:
        raise ValueError(f"the number of components must be at least 1, not {num_components}")
