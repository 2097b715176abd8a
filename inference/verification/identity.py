"""Equal functions: a closed form against the formula that it should equal, at random points of its arguments.

An analytic identity that is wrong somewhere is wrong at a random point with probability one, so that what remains is
to tell algebra from rounding. The rounding is measured: both sides are evaluated again with every continuous argument
changed by a few units in the last place, and a discrepancy counts only when it is far larger than those changes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixproof.inference.verification.domain import Domain
from mixproof.inference.verification.report import Check, Report, asserting, conclude

ROUNDING = 2.0**10
"""How many units in the last place a well conditioned formula may lose."""
PERTURBATION = 2.0**4
"""The change of an argument, in units in the last place, under which the conditioning is measured."""
NUM_PERTURBATIONS = 8


class Comparison(NamedTuple):
    """The two sides at one point."""

    outcome: str
    """``equal``, ``refuted``, or ``unknown`` where the actual side has no value."""
    error: float
    """The scale-free discrepancy at the worst entry."""
    tolerance: float
    """The discrepancy that rounding explains there."""
    claimed: Any
    actual: Any
    reason: str = ""


def verify_identity(
    claimed: Callable[..., Any],
    actual: Callable[..., Any],
    *domains: Domain | Any,
    seed: int,
    num_points: int = 32,
    subject: str | None = None,
) -> Report:
    """Try to refute that two functions are equal.

    Args:
        claimed: the derived formula, of as many tensors as there are domains; returns a tensor or a tuple of tensors.
        actual: what it should equal, of the same arguments; its shapes are the right ones.
        domains: one for each argument: a function of a ``torch.Generator`` that draws it, or a constant, which is
            passed on as it is.
        seed: of the random points.
        num_points: how many.
        subject: the claim in words, for the report.

    Returns:
        A report: refuted with a counterexample as simple as could be found, undecided where ``actual`` has no value.
    """
    check = equal_at_random_points(claimed, actual, *domains, seed=seed, num_points=num_points)
    return conclude(subject or f"{describe(claimed)} = {describe(actual)}", [check], seed)


def equal_at_random_points(
    claimed: Callable[..., Any],
    actual: Callable[..., Any],
    *domains: Domain | Any,
    seed: int,
    num_points: int = 32,
    name: str = "equal at random points",
) -> Check:
    """Compare two functions at random points; the arguments are those of ``verify_identity``."""
    generator = torch.Generator().manual_seed(seed)
    points = [tuple(d(generator) if callable(d) else d for d in domains) for _ in range(num_points)]
    continuous = [
        callable(domain) and any(is_continuous(point[i]) for point in points) for i, domain in enumerate(domains)
    ]

    def compare_at(point: Sequence[Any], others: Sequence[Any]) -> Comparison:
        return compare(claimed, actual, point, continuous=continuous, others=others, seed=seed)

    def refutes(point: Sequence[Any]) -> bool:
        return compare_at(point, []).outcome == "refuted"

    worst, unknown = None, None
    for point in points:
        comparison = compare_at(point, points[:8])
        if comparison.outcome == "refuted":
            simple = simplify(point, points, continuous, refutes)
            found = compare_at(simple, points[:8])
            if found.outcome != "refuted":
                simple, found = point, comparison
            values = dict(zip(argument_names(actual, len(domains)), simple, strict=True))
            counterexample = {**values, "claimed": found.claimed, "actual": found.actual}
            return Check(name, False, found.error, found.tolerance, counterexample=counterexample, detail=found.reason)
        if comparison.outcome == "unknown":
            unknown = unknown or comparison
        elif worst is None or comparison.error / comparison.tolerance > worst.error / worst.tolerance:
            worst = comparison
    if unknown is not None or worst is None:
        return Check(name, False, float("nan"), float("nan"), detail=unknown.reason if unknown else "no points")
    return Check(name, True, worst.error, worst.tolerance)


def compare(
    claimed: Callable[..., Any],
    actual: Callable[..., Any],
    point: Sequence[Any],
    *,
    continuous: Sequence[bool],
    others: Sequence[Sequence[Any]],
    seed: int,
) -> Comparison:
    """Compare two functions at one point.

    Args:
        claimed, actual: the functions.
        point: their arguments.
        continuous: which of the arguments may be changed to measure the conditioning.
        others: other points, from which the rounding is learnt where it cannot be seen at this one; empty for a quick
            answer, which may take rounding for a refutation.
        seed: of the changes, so that the same point gets the same answer.
    """
    nan = float("nan")
    generator = torch.Generator().manual_seed(seed)
    try:
        right = evaluate(actual, point)
    except Exception as error:
        return Comparison("unknown", nan, nan, None, None, f"the actual side raised {type(error).__name__}: {error}")
    if any(part.isnan().any() for part in right):
        return Comparison("unknown", nan, nan, None, bare(right), "the actual side is NaN")
    try:
        left = evaluate(claimed, point)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return Comparison("refuted", nan, nan, text, bare(right), f"the claimed side raised {text}")
    shapes = [[tuple(part.shape) for part in side] for side in (left, right)]
    if shapes[0] != shapes[1]:
        reason = f"the claimed side has shape {bare(shapes[0])}, the actual side {bare(shapes[1])}"
        return Comparison("refuted", nan, nan, bare(left), bare(right), reason)

    eps = max(
        [torch.finfo(part.dtype).eps for side in (left, right) for part in side if part.is_floating_point()] or [0.0]
    )
    eps = max(eps, torch.finfo(torch.float64).eps)
    left_flat, right_flat = flatten(left), flatten(right)
    if left_flat.numel() == 0:
        return Comparison("equal", 0.0, ROUNDING * eps, bare(left), bare(right))
    discrepancy = torch.where(left_flat == right_flat, 0.0, (left_flat - right_flat).abs()).nan_to_num(
        torch.inf, torch.inf
    )
    size = torch.minimum(left_flat.abs(), right_flat.abs()).nan_to_num(0.0, torch.inf)
    allowed = ROUNDING * eps * size + torch.finfo(torch.float64).tiny
    if discrepancy.isfinite().all():  # no rounding explains any other
        sides = (claimed, actual)
        moved = [torch.zeros_like(size) for _ in sides]
        for measure in (movement, noise) if others else (movement,):
            if (discrepancy > allowed).any():
                found = [measure(side, point, continuous, generator) for side in sides]
                moved = [torch.maximum(*pair) for pair in zip(moved, found, strict=True)]
                allowed = allowed + ROUNDING / PERTURBATION * torch.stack(found).sum(0)
        over = discrepancy > allowed
        if others and over.any() and not (over & (moved[0] > 0) & (moved[1] > 0)).any():
            # a side that is constant here, as 1 - p - q, may show its rounding at other points
            for side, known in zip(sides, moved, strict=True):
                elsewhere = [float(m(side, p, continuous, generator).max()) for p in others for m in (movement, noise)]
                rounding = ROUNDING / PERTURBATION * max(elsewhere) + ROUNDING * eps * size.max()
                allowed = torch.where(known == 0, allowed + rounding, allowed)
    refuted = bool((discrepancy > allowed).any())
    worst = int((discrepancy / allowed if refuted else discrepancy).nan_to_num(0.0, torch.inf).argmax())
    scale = float(torch.maximum(left_flat.abs(), right_flat.abs()).nan_to_num(torch.inf).max())
    scale = max(scale, float(allowed[worst])) if scale < torch.inf else 1.0
    reason = "the claimed side is NaN" if left_flat.isnan().any() else ""
    return Comparison(
        "refuted" if refuted else "equal",
        float(discrepancy[worst]) / scale,
        float(allowed[worst]) / scale,
        bare(left),
        bare(right),
        reason,
    )


def movement(
    function: Callable[..., Any], point: Sequence[Any], continuous: Sequence[bool], generator: torch.Generator
) -> Tensor:
    """Return how far each entry of a function moves, (M,), when its arguments change in their last places."""
    value = flatten(evaluate(function, point))
    rows = [
        shifted(function, point, continuous, seed=int(seed), size=PERTURBATION, power=1.0)
        for seed in torch.randint(2**62, (NUM_PERTURBATIONS,), generator=generator)
    ]
    changes = [(row - value).abs() for row in rows if row.shape == value.shape]
    return torch.stack(changes).nan_to_num(0.0, 0.0).amax(0) if changes else torch.zeros_like(value)


def noise(
    function: Callable[..., Any], point: Sequence[Any], continuous: Sequence[bool], generator: torch.Generator
) -> Tensor:
    """Return the noise in each entry of a function near a point, (M,), as a multiple that compares with ``movement``.

    Noise is what remains of values at equally spaced points in differences of high order, where everything smooth is
    gone: it also sees the rounding at constants that dwarf the arguments. A sixth difference much below the fifth is
    still smooth, and does not count (Moré and Wild, Estimating Computational Noise, SIAM J. Sci. Comput. 33, 2011).
    """
    value = flatten(evaluate(function, point))
    largest = torch.zeros_like(value)
    for power in (0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25):
        seed = int(torch.randint(2**62, (), generator=generator))
        size = 1 + 3 * float(torch.rand((), generator=generator))
        rows = [shifted(function, point, continuous, seed=seed, size=size * k, power=power) for k in range(1, 7)]
        if any(row.shape != value.shape for row in rows):
            continue
        fifth = torch.stack([value, *rows]).diff(n=5, dim=0)
        sixth = fifth.diff(dim=0)[0].abs() / math.sqrt(math.comb(12, 6))
        smooth = sixth < fifth.abs().amin(0) / math.sqrt(math.comb(10, 5)) / 16
        largest = torch.maximum(largest, torch.where(smooth, 0.0, sixth).nan_to_num(0.0, 0.0))
    return PERTURBATION * largest


def shifted(
    function: Callable[..., Any],
    point: Sequence[Any],
    continuous: Sequence[bool],
    *,
    seed: int,
    size: float,
    power: float,
) -> Tensor:
    """Return the value (M,) of a function at a perturbed point, empty outside the domain; a seed is a direction."""
    direction = torch.Generator().manual_seed(seed)
    moved = [perturb(a, direction, size, power) if free else a for a, free in zip(point, continuous, strict=True)]
    try:
        return flatten(evaluate(function, moved))
    except Exception:
        return torch.empty(0, dtype=torch.float64)


def perturb(argument: Any, generator: torch.Generator, size: float = PERTURBATION, power: float = 1.0) -> Any:
    """Return an argument with every floating entry changed by the relative amount size * eps^power, up or down."""
    if isinstance(argument, tuple):
        parts = [perturb(part, generator, size, power) for part in argument]
        return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
    if not (isinstance(argument, Tensor) and argument.is_floating_point()):
        return argument
    signs = torch.randint(2, argument.shape, generator=generator) * 2 - 1
    return argument * (1 + size * torch.finfo(argument.dtype).eps ** power * signs.to(argument))


def simplify(
    point: Sequence[Any],
    points: Sequence[Sequence[Any]],
    continuous: Sequence[bool],
    refutes: Callable[[Sequence[Any]], bool],
) -> Sequence[Any]:
    """Round the arguments of a counterexample, one by one, to integers or else to one digit, while it remains one.

    A rounded argument keeps every structure (sign, below one, rows that sum to one, positive definite) that the
    argument has at all of the random points, so that it stays in its domain.
    """
    for i, free in enumerate(continuous):
        if not (free and isinstance(point[i], Tensor)):
            continue
        binding = [holds for holds in STRUCTURES if all(holds(other[i]) for other in points)]
        for rounded in (point[i].round() + 0.0, one_digit(point[i])):
            candidate = [*point[:i], rounded, *point[i + 1 :]]
            if all(holds(rounded) for holds in binding) and refutes(candidate):
                point = candidate
                break
    return point


def one_digit(x: Tensor) -> Tensor:
    """Return a tensor with each entry rounded to one significant digit."""
    return torch.tensor([float(f"{value:.1g}") for value in x.flatten().tolist()], dtype=x.dtype).reshape(x.shape)


def _is_positive_definite(x: Tensor) -> bool:
    square = x.dim() >= 2 and x.shape[-1] == x.shape[-2]
    return square and torch.allclose(x, x.mT) and not bool(torch.linalg.cholesky_ex(x).info.any())


STRUCTURES: tuple[Callable[[Tensor], bool], ...] = (
    lambda x: bool((x > 0).all()),
    lambda x: bool((x < 0).all()),
    lambda x: bool((x < 1).all()),
    lambda x: x.dim() > 0 and bool(((x.sum(-1) - 1).abs() < ROUNDING * torch.finfo(x.dtype).eps).all()),
    _is_positive_definite,
)


def is_continuous(argument: Any) -> bool:
    """Return whether an argument holds a floating number that is not a whole one."""
    if isinstance(argument, tuple):
        return any(is_continuous(part) for part in argument)
    return isinstance(argument, Tensor) and argument.is_floating_point() and bool((argument != argument.round()).any())


def evaluate(function: Callable[..., Any], point: Sequence[Any]) -> tuple[Tensor, ...]:
    """Return the value of a function at a copy of a point, as a tuple of tensors."""
    value = function(*[argument.clone() if isinstance(argument, Tensor) else argument for argument in point])
    parts = value if isinstance(value, tuple | list) else (value,)
    return tuple(
        part.detach() if isinstance(part, Tensor) else torch.as_tensor(part, dtype=torch.float64) for part in parts
    )


def flatten(parts: Sequence[Tensor]) -> Tensor:
    """Return the entries of several tensors as one (M,) float64 tensor, complex ones as real and imaginary parts."""
    real = [torch.view_as_real(part.resolve_conj()) if part.is_complex() else part for part in parts]
    return torch.cat([part.to(torch.float64).flatten() for part in real])


def bare(parts: Sequence[Any]) -> Any:
    """Return a single part by itself, several as a tuple."""
    return parts[0] if len(parts) == 1 else tuple(parts)


def describe(function: Callable[..., Any]) -> str:
    """Return the name of a function for a report."""
    name = getattr(function, "__name__", type(function).__name__)
    return "the claim" if name == "<lambda>" else name


def argument_names(function: Callable[..., Any], count: int) -> list[str]:
    """Return the names of a function's arguments, or numbered ones where it does not tell."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = []
    return names[:count] if len(names) >= count else [f"argument {i + 1}" for i in range(count)]


assert_identity = asserting(verify_identity)
