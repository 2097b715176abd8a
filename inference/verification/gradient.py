"""Derivatives: a gradient or Jacobian by hand against automatic differentiation, at random points.

On a set that is thinner than the space around it, as the symmetric matrices or the simplex, a derivative is defined
only along the tangents of the set. Both sides are then projected onto them. For symmetric matrices there are two
conventions: the symmetric gradient G with df = tr(G dX), and the derivative in the distinct entries on and below the
diagonal, 2 G - diag(G) (Magnus and Neudecker, Matrix Differential Calculus, chapter 10).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from mixproof.inference.verification.domain import Domain
from mixproof.inference.verification.identity import argument_names, describe, equal_at_random_points
from mixproof.inference.verification.report import Check, Report, asserting, conclude

Structure = Literal["free", "symmetric", "distinct entries", "simplex"]


def verify_gradient(
    claimed: Callable[..., Tensor],
    function: Callable[..., Tensor],
    *domains: Domain | Any,
    wrt: int = 0,
    structure: Structure = "free",
    seed: int,
    num_points: int = 16,
    subject: str | None = None,
) -> Report:
    """Try to refute that one function is the derivative of another.

    Args:
        claimed: the derivative by hand, of all arguments; for ``function`` of shape S and an argument of shape A it has
            shape S + A, which is that of the argument where the function is a number.
        function: what is differentiated, a number or a tensor.
        domains: one for each argument: a function of a ``torch.Generator`` that draws it, or a constant.
        wrt: the place of the argument that varies.
        structure: the set in which that argument varies, and so what the derivative means.

            - ``free``: all entries are separate variables, also where the function reads only the symmetric part.
            - ``symmetric``: symmetric matrices (..., D, D), positive definite ones among them; the claim is G with
              df = tr(G dX) for every symmetric dX. The skew part of G has no meaning and is not tested.
            - ``distinct entries``: the same set; the claim is symmetric and holds the derivatives in the entries on
              and below the diagonal, where moving one entry moves its mirror image too.
            - ``simplex``: the last axis is a probability vector; the claim g gives df = g . dp for every dp of sum
              zero. A constant added to g has no meaning and is not tested.
        seed: of the random points.
        num_points: how many.
        subject: the claim in words, for the report.

    Returns:
        A report: refuted with a counterexample as simple as could be found, undecided where autograd has no value.

    Raises:
        IndexError: there is no argument in the place ``wrt``.
        ValueError: the argument does not have the structure.
    """
    check = equals_autograd(claimed, function, *domains, wrt=wrt, structure=structure, seed=seed, num_points=num_points)
    variable = argument_names(function, len(domains))[wrt]
    return conclude(subject or f"the gradient of {describe(function)} in {variable}", [check], seed)


def equals_autograd(
    claimed: Callable[..., Tensor],
    function: Callable[..., Tensor],
    *domains: Domain | Any,
    wrt: int = 0,
    structure: Structure = "free",
    seed: int,
    num_points: int = 16,
) -> Check:
    """Compare a derivative with autograd; the arguments are those of ``verify_gradient``.

    A claim that fails is tried under the other structures that the argument has, and the detail names those that fit.
    """
    wrt = range(len(domains))[wrt]
    derivative = autograd_derivative(function, wrt)

    def under(structure: Structure) -> Check:
        return equal_at_random_points(
            along_tangents(claimed, function, wrt, structure, is_claim=True),
            along_tangents(derivative, function, wrt, structure, is_claim=False),
            *domains,
            seed=seed,
            num_points=num_points,
            name="equals autograd at random points",
        )

    domain = domains[wrt]
    variable = domain(torch.Generator().manual_seed(seed)) if callable(domain) else domain
    fitting = structures_of(variable)
    if structure not in fitting:
        raise ValueError(f"the argument in place {wrt} is not {SETS[structure]}")
    check = under(structure)
    if check.passed or check.counterexample is None:
        return check
    others = [other for other in fitting if other != structure and under(other).passed]
    hints = [f"the claim does hold as {MEANINGS[other]} (structure={other!r})" for other in others]
    return check._replace(detail="; ".join(filter(None, [check.detail, *hints])))


SETS = {
    "free": "a tensor",
    "symmetric": "a symmetric matrix",
    "distinct entries": "a symmetric matrix",
    "simplex": "a probability vector",
}
MEANINGS = {
    "free": "the derivative in separate entries",
    "symmetric": "the symmetric gradient G, df = tr(G dX) for symmetric dX",
    "distinct entries": "the derivative in the distinct entries of a symmetric matrix, 2 G - diag(G)",
    "simplex": "a derivative along the simplex",
}


def structures_of(variable: Any) -> list[Structure]:
    """Return the structures that a value of an argument has, to rounding."""
    found: list[Structure] = ["free"]
    if not isinstance(variable, Tensor):
        return found
    if (
        variable.dim() >= 2
        and variable.shape[-1] == variable.shape[-2]
        and torch.allclose(variable, variable.mT, atol=0)
    ):
        found += ["symmetric", "distinct entries"]
    if variable.dim() >= 1 and (variable >= 0).all() and torch.allclose(variable.sum(-1), torch.ones(()).to(variable)):
        found.append("simplex")
    return found


def along_tangents(
    derivative: Callable[..., Tensor],
    function: Callable[..., Tensor],
    wrt: int,
    structure: Structure,
    *,
    is_claim: bool,
) -> Callable[..., Tensor]:
    """Return a derivative of a function as a set of a structure sees it: projected onto the tangents.

    Args:
        derivative: of all arguments, of shape S + A for a function of shape S and an argument of shape A.
        function: what was differentiated.
        wrt: the place of the argument that varies.
        structure: of that argument.
        is_claim: whether the derivative already follows the convention of the structure; else it counts all entries
            as separate variables.

    Returns:
        The symmetric part for symmetric matrices; for distinct entries twice it, less its diagonal, or the claim as
        it is; the deviation from the mean for the simplex.
    """

    @functools.wraps(function)  # for the names of its arguments in a counterexample
    def projected(*args: Any) -> Tensor:
        found = derivative(*args)
        expected = torch.as_tensor(function(*args)).shape + args[wrt].shape
        if structure == "free" or found.shape != expected:
            return found
        if structure == "simplex":
            return found - found.mean(-1, keepdim=True)
        if structure == "distinct entries" and is_claim:
            return found
        symmetric = (found + found.mT) / 2
        if structure == "symmetric":
            return symmetric
        return 2 * symmetric - torch.diag_embed(symmetric.diagonal(dim1=-2, dim2=-1))

    return projected


def autograd_derivative(function: Callable[..., Tensor], wrt: int) -> Callable[..., Tensor]:
    """Return the derivative of a function in one of its arguments, by autograd, as a function of all of them."""

    def derivative(*args: Any) -> Tensor:
        return torch.autograd.functional.jacobian(lambda x: function(*args[:wrt], x, *args[wrt + 1 :]), args[wrt])

    return derivative


assert_gradient = asserting(verify_gradient)
