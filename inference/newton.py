"""Newton's method for a minimum, with BFGS and bisection where curvatures fail.

For functions of few variables whose minimum must be known to rounding: the Hessian comes from autograd in one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mixproof.inference.bfgs import minimise, with_gradient

MOST_VARIABLES = 128
"""Beyond so many, Hessians cost more than they give: BFGS alone."""
NUM_STEPS = 60
HALVINGS = 12
FAR = 36.0
"""A variable that went so far, relative to where it was, runs off to infinity."""
FLAT = 1e-4
"""A gradient below this share of the first is as good as none where no step lowers the function any more."""
ROUGH = 1e-6
"""How far a minimum by BFGS is taken to be known."""
BRACKET = 1e-4
"""How near to a kink BFGS ends, relative to the variable."""


def descend(function: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """Return a minimum and the Newton step that is left there, which is how far it is known.

    Newton's method with the curvatures' absolute values, so that it leaves saddles (Nocedal and Wright, Numerical
    Optimization, section 3.4); where it does not arrive, as at kinks, BFGS goes on. A coordinate that runs off to
    infinity stops the descent once it is far away.

    Args:
        function: of variables (P,) returns a number () that autograd differentiates twice; where it raises
            ``ValueError`` or a matrix in it is singular, it counts as infinite.
        u: the start (P,).

    Returns:
        The minimum (P,), and the step (P,) to subtract from it that Newton's method would take next: infinite where the
        descent ran off or did not arrive, ``ROUGH`` where there are more than ``MOST_VARIABLES``.
    """
    if len(u) > MOST_VARIABLES:
        return minimise(with_gradient(function), u, max_steps=300, rtol=1e-14).u, torch.full_like(u, ROUGH)
    start, (value, gradient, hessian) = u, _derivatives(function, u)
    first, flat = 1 + gradient.abs().max(), 64 * torch.finfo(u.dtype).eps  # near the minimum only slopes still tell
    for _ in range(NUM_STEPS):
        if (u - start).abs().max() > FAR * (1 + start.abs().max()):
            return u, torch.full_like(u, math.inf)
        if not hessian.isfinite().all():
            break
        step = _newton_step(gradient, hessian)
        if gradient.abs().max() <= torch.finfo(u.dtype).eps * first:
            return u, step
        shorter = step * min(1.0, (4 * (1 + u.abs()) / step.abs().clamp_min(1e-300)).min().item())
        for _ in range(HALVINGS):
            after = _derivatives(function, u - shorter)
            if after[0] < value or (
                after[0] <= value + flat * (1 + value.abs()) and after[1].norm() < gradient.norm() / 2
            ):
                break
            shorter = shorter / 2
        else:
            break
        u, (value, gradient, hessian) = u - shorter, after
    if gradient.abs().max() <= FLAT * first and hessian.isfinite().all():
        return u, _newton_step(gradient, hessian)
    if not value.isfinite():
        return u, torch.full_like(u, math.inf)
    u = minimise(with_gradient(function), u, max_steps=300, rtol=1e-14).u
    return _onto_kinks(function, u, first)


def _onto_kinks(function: Callable[[Tensor], Tensor], u: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """Return a minimum (P,) near u with kinks in some coordinates, by bisection of their slopes, and the step left."""
    objective = with_gradient(function)
    kinked = objective(u)[1].abs() > FLAT * first
    smooth = (~kinked).nonzero().flatten()
    for i in kinked.nonzero().flatten().tolist():
        low, high = u[i] - BRACKET * (1 + u[i].abs()), u[i] + BRACKET * (1 + u[i].abs())
        slopes = [objective(u.index_fill(0, torch.tensor(i, device=u.device), end.item()))[1][i] for end in (low, high)]
        if not slopes[0] < 0 < slopes[1]:
            return u, torch.full_like(u, math.inf)  # no kink: the descent has not arrived
        for _ in range(64):
            middle = (low + high) / 2
            rising = objective(u.index_fill(0, torch.tensor(i, device=u.device), middle.item()))[1][i] > 0
            low, high = (low, middle) if rising else (middle, high)
        u = u.index_fill(0, torch.tensor(i, device=u.device), high.item())
    if kinked.all() or not kinked.any():
        _, gradient, hessian = _derivatives(function, u)
        return u, _newton_step(gradient, hessian) if hessian.isfinite().all() else torch.zeros_like(u)
    free, step = descend(lambda free: function(u.index_copy(0, smooth, free)), u[smooth])
    return u.index_copy(0, smooth, free), torch.zeros_like(u).index_copy(0, smooth, step)


def _newton_step(gradient: Tensor, hessian: Tensor) -> Tensor:
    """Return the step (P,) to subtract, with the curvatures' absolute values."""
    curvatures, axes = torch.linalg.eigh(hessian)
    curvatures = curvatures.abs().clamp_min(1e-12 * curvatures.abs().max().clamp_min(1e-300))
    return axes @ ((axes.T @ gradient) / curvatures)


def _derivatives(function: Callable[[Tensor], Tensor], u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a function's value, gradient (P,) and Hessian (P, P); an infinite value where it cannot be evaluated."""
    u = u.detach().requires_grad_()
    try:
        value = function(u)
        (gradient,) = torch.autograd.grad(value, u, create_graph=True)
    except (ValueError, torch.linalg.LinAlgError):  # a long step leaves the support by rounding
        return torch.tensor(math.inf), torch.zeros_like(u), torch.full((len(u), len(u)), math.nan).to(u)
    hessian = torch.zeros(len(u), len(u), dtype=u.dtype, device=u.device)
    if gradient.requires_grad:
        eye = torch.eye(len(u), dtype=u.dtype, device=u.device)
        rows = torch.autograd.grad(gradient, u, eye, is_grads_batched=True, allow_unused=True)[0]
        hessian = hessian if rows is None else (rows + rows.T) / 2
    return value.detach(), gradient.detach(), hessian.detach()
