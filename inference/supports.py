"""The supports of a program's sites, as ``torch.distributions`` describes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.expectation import MOMENTS_ERROR


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


def contains(support: constraints.Constraint, value: Tensor) -> bool:
    """Whether all entries are finite and lie in a support.

    A positive definite matrix is also symmetric to half of the digits of its own variances: torch allows 1e-6 in any
    unit, and its Cholesky factor does not read the upper triangle.
    """
    if not (torch.isfinite(value).all() and support.check(value).all()):
        return False
    if base_of(support) is not constraints.positive_definite:
        return True
    scales = value.diagonal(dim1=-2, dim2=-1).sqrt()
    allowed = math.sqrt(torch.finfo(value.dtype).eps) * scales[..., :, None] * scales[..., None, :]
    return bool(((value - value.mT).abs() <= allowed).all())


def at_edge(value: Tensor, support: constraints.Constraint) -> bool:
    """Whether an entry lies on the boundary of its support, which unconstrained coordinates cannot reach or leave.

    So does a positive definite matrix (..., D, D) of which a variance given the features before is a share of it that
    EM's sums may be off by.
    """
    if base_of(support) is constraints.positive_definite:
        variances = value.diagonal(dim1=-2, dim2=-1)
        factor, info = torch.linalg.cholesky_ex(value)
        remaining = factor.diagonal(dim1=-2, dim2=-1).square()
        return bool((info > 0).any() or (remaining <= torch.finfo(value.dtype).eps ** MOMENTS_ERROR * variances).any())
    low, high = ends(support)
    return bool(((value <= low) | (value >= high)).any())
