"""Derivatives: a gradient or Jacobian by hand against automatic differentiation, at random points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixproof.inference.verification.domain import Domain
from mixproof.inference.verification.identity import argument_names, describe, equal_at_random_points
from mixproof.inference.verification.report import Check, Report, asserting, conclude


def verify_gradient(
    claimed: Callable[..., Tensor],
    function: Callable[..., Tensor],
    *domains: Domain | Any,
    wrt: int = 0,
    seed: int,
    num_points: int = 16,
    subject: str | None = None,
) -> Report:
    """Try to refute that one function is the derivative of another.

    Args:
        claimed: the derivative by hand, of all arguments; for ``function`` of shape S and an argument of shape A it has
            shape S + A, which is that of the argument where the function is a number. Entries of a matrix count as
            separate variables, also where the function reads only the symmetric part.
        function: what is differentiated, a number or a tensor.
        domains: one for each argument: a function of a ``torch.Generator`` that draws it, or a constant.
        wrt: the place of the argument that varies.
        seed: of the random points.
        num_points: how many.
        subject: the claim in words, for the report.

    Returns:
        A report: refuted with a counterexample as simple as could be found, undecided where autograd has no value.

    Raises:
        IndexError: there is no argument in the place ``wrt``.
    """
    check = equals_autograd(claimed, function, *domains, wrt=wrt, seed=seed, num_points=num_points)
    variable = argument_names(function, len(domains))[wrt]
    return conclude(subject or f"the gradient of {describe(function)} in {variable}", [check], seed)


def equals_autograd(
    claimed: Callable[..., Tensor],
    function: Callable[..., Tensor],
    *domains: Domain | Any,
    wrt: int = 0,
    seed: int,
    num_points: int = 16,
) -> Check:
    """Compare a derivative with autograd; the arguments are those of ``verify_gradient``."""
    derivative = autograd_derivative(function, range(len(domains))[wrt])
    return equal_at_random_points(
        claimed, derivative, *domains, seed=seed, num_points=num_points, name="equals autograd at random points"
    )


def autograd_derivative(function: Callable[..., Tensor], wrt: int) -> Callable[..., Tensor]:
    """Return the derivative of a function in one of its arguments, by autograd, as a function of all of them."""

    def derivative(*args: Any) -> Tensor:
        return torch.autograd.functional.jacobian(lambda x: function(*args[:wrt], x, *args[wrt + 1 :]), args[wrt])

    return derivative


assert_gradient = asserting(verify_gradient)
