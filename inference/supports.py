"""The supports of a program's sites, as ``torch.distributions`` describes them."""

from __future__ import annotations

import math

from torch import Tensor
from torch.distributions import constraints


def base_of(support: constraints.Constraint) -> constraints.Constraint:
    """Return what a support asks of a single event of its base, without what makes several events one."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def ends(support: constraints.Constraint) -> tuple[float, float]:
    """Return the least and the largest value of an entry, infinite where there is no bound."""
    base = base_of(support)
    if base is constraints.simplex:
        return 0.0, math.inf
    return getattr(base, "lower_bound", -math.inf), getattr(base, "upper_bound", math.inf)


def at_edge(value: Tensor, support: constraints.Constraint) -> bool:
    """Whether an entry lies on the boundary of its support, which unconstrained coordinates cannot reach or leave."""
    low, high = ends(support)
    return bool(((value <= low) | (value >= high)).any())
