"""BFGS with a line search that also serves objectives with kinks.

The line search asks only for weak Wolfe conditions (Lewis and Overton, Nonsmooth optimization via quasi-Newton methods,
Mathematical Programming 141, 2013, algorithm 2.6), so that it closes in on the kinks of a Laplace likelihood, where the
strong-Wolfe searches of the usual libraries stop early.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Objective = Callable[[Tensor], tuple[float, Tensor]]


class Minimum(NamedTuple):
    """A local minimum of a function of a vector."""

    u: Tensor
    """(P,), where it is."""
    value: float
    """The function there."""
    converged: bool
    """Whether no further descent could be found beyond rounding."""
    num_steps: int
    """The number of steps made."""


def with_gradient(function: Callable[[Tensor], Tensor]) -> Objective:
    """Return u -> (f(u), gradient) by autograd; a point at which f cannot be evaluated is a wall of infinite height."""

    def objective(u: Tensor) -> tuple[float, Tensor]:
        u = u.detach().requires_grad_()
        try:
            value = function(u)
            (gradient,) = torch.autograd.grad(value, u)
        except (ValueError, torch.linalg.LinAlgError):  # a long step leaves the support by rounding
            return math.inf, torch.zeros_like(u)
        return value.item(), gradient

    return objective


def minimise(objective: Objective, u: Tensor, *, max_steps: int, rtol: float) -> Minimum:
    """Descend from u (P,) until 10 steps together gain no more than a share ``rtol`` of the value.

    Args:
        objective: u -> the value and its gradient (P,); a value that is not finite is a wall.
        u: (P,), the start.
        max_steps: the largest number of steps.
        rtol: see above, not negative.

    Raises:
        ValueError: the value at the start is not finite.
    """
    value, gradient = objective(u)
    if not math.isfinite(value):
        raise ValueError("the objective is not finite at the start")
    identity = torch.eye(len(u), dtype=u.dtype, device=u.device)
    inverse_hessian = identity / max(gradient.norm().item(), 1.0)
    fresh = True
    history = [value]
    for step in range(1, max_steps + 1):
        direction = -inverse_hessian @ gradient
        found = _line_search(objective, u, value, gradient, direction)
        if found is None:
            gradient, fresh = _steepest(objective, u), True
            found = _line_search(objective, u, value, gradient, -gradient / max(gradient.norm().item(), 1.0))
        if found is None:
            return Minimum(u, value, True, step)
        next_u, next_value, next_gradient = found
        s, y = next_u - u, next_gradient - gradient
        curvature = s @ y
        if fresh:
            inverse_hessian = identity * curvature / (y @ y)
        left = identity - torch.outer(s, y) / curvature
        inverse_hessian = left @ inverse_hessian @ left.T + torch.outer(s, s) / curvature
        u, value, gradient, fresh = next_u, next_value, next_gradient, False
        history.append(value)
        if len(history) > 10 and history[-11] - value <= rtol * abs(value):
            return Minimum(u, value, True, step)
    return Minimum(u, value, False, max_steps)


def _steepest(objective: Objective, u: Tensor) -> Tensor:
    """Return the shortest subgradient (P,) at u (P,), where kinks, if any, are those of separate coordinates.

    At a kink, autograd's gradient is one of many, and its opposite need not descend: a Laplace likelihood has a kink in
    each location that equals an entry of the data, as medians do. To the right and to the left of u all coordinates are
    off their kinks; between two slopes that enclose 0 a coordinate stays where it is.
    """
    shift = 2**10 * torch.finfo(u.dtype).eps * (1 + u.abs())
    (_, left), (_, right) = objective(u - shift), objective(u + shift)
    return torch.where((left <= 0) & (right >= 0), 0.0, torch.where(left.abs() > right.abs(), left, right))


def _line_search(
    objective: Objective, u: Tensor, value: float, gradient: Tensor, direction: Tensor
) -> tuple[Tensor, float, Tensor] | None:
    """Return a point along the direction that meets the weak Wolfe conditions, or None where rounding hides them."""
    slope = (gradient @ direction).item()
    if not slope < 0:
        return None
    low, high, length = 0.0, float("inf"), 1.0
    for _ in range(60):
        trial = u + length * direction
        trial_value, trial_gradient = objective(trial)
        if not trial_value < value + 1e-4 * length * slope:
            high = length
        elif not (trial_gradient @ direction).item() > 0.9 * slope:
            low = length
        else:
            return trial, trial_value, trial_gradient
        length = 2 * low if high == float("inf") else (low + high) / 2
    return None
