"""Where a claim is meant to hold: random points of a set, the arguments of the identities that are tested.

A domain is any function of a ``torch.Generator`` that returns one random point. The ones here cover the sets of the
field; all draw in float64 and put probability on every open subset, so that an analytic identity which is wrong
somewhere is wrong at the drawn point with probability one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.enumeration import unconstrain

Domain = Callable[[torch.Generator], Tensor]


def support(constraint: constraints.Constraint, *shape: int) -> Domain:
    """Return the domain of tensors of a shape that satisfy a torch constraint (its event included in the shape)."""
    transform = unconstrain(constraint)

    def draw(generator: torch.Generator) -> Tensor:
        unconstrained = transform.inverse_shape(torch.Size(shape))
        return transform(torch.randn(unconstrained, generator=generator, dtype=torch.float64))

    return draw


def reals(*shape: int) -> Domain:
    """Return the domain of real tensors of a shape, () for numbers; matrices are unsymmetric."""
    return support(constraints.real, *shape)


def positive(*shape: int) -> Domain:
    """Return the domain of positive tensors of a shape."""
    return support(constraints.positive, *shape)


def unit_interval(*shape: int) -> Domain:
    """Return the domain of tensors of a shape with entries strictly between 0 and 1."""
    return support(constraints.unit_interval, *shape)


def simplex(*shape: int) -> Domain:
    """Return the domain of tensors of a shape whose last axis is a probability vector, all entries positive."""
    return support(constraints.simplex, *shape)


def symmetric(*shape: int) -> Domain:
    """Return the domain of symmetric matrices, batched in the leading axes: shape (..., D, D)."""

    def draw(generator: torch.Generator) -> Tensor:
        entries = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (entries + entries.mT) / 2

    return draw


def positive_definite(*shape: int) -> Domain:
    """Return the domain of symmetric positive definite matrices, batched in the leading axes: shape (..., D, D)."""
    return support(constraints.positive_definite, *shape)


def binary(*shape: int) -> Domain:
    """Return the domain of float tensors of a shape with independent fair entries 0 and 1."""
    return lambda generator: torch.randint(2, shape, generator=generator).to(torch.float64)


def one_hot(*shape: int) -> Domain:
    """Return the domain of hard assignments: the last axis of the shape holds a single one, at a uniform place."""

    def draw(generator: torch.Generator) -> Tensor:
        labels = torch.randint(shape[-1], shape[:-1], generator=generator)
        return torch.nn.functional.one_hot(labels, shape[-1]).to(torch.float64)

    return draw
