"""Maximisers: a claimed argmax is stationary, lies on a hilltop, and is not beaten by any point that was tried.

Stationarity is tested in unconstrained coordinates u, with v = T(u) the claimed value and T the ``transform_to`` of its
constraint. Along each axis of the Hessian the slope g is compared with sqrt(|f| h), the slope at which a Newton step
would change the objective f by its own size (h is the curvature), so that no unit of f or of v matters. Where slopes
do not vanish the claim may still sit at a kink (a median): then the one-sided slopes must change sign within a bracket
of rounding size, along every coordinate and along any direction in which a bundle of nearby gradients points.

At the boundary of a simplex or a box the claim must do the same on its face, and the objective must not rise from the
face into the set: the conditions of Karush, Kuhn and Tucker. They are of first order: on an objective that is not
concave, only curvature and random search stand against a point that satisfies them and is not a maximum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.distributions import constraints, transform_to

from mixproof.inference.supports import base_of
from mixproof.inference.verification.identity import (
    NUM_PERTURBATIONS,
    PERTURBATION,
    ROUNDING,
    bare,
    perturb,
)
from mixproof.inference.verification.report import Check, Report, asserting, conclude

Objective = Callable[..., Tensor]
Constraints = constraints.Constraint | Sequence[constraints.Constraint]
FLAT = 2.0**-20
"""Curvatures below this share of the largest count as none: rounding of the slope along them is that much larger."""
SMOOTH = 2.0**-10
"""A slope that changes by more than this share of its size, when the claimed value is rounded, jumps there."""


def verify_maximiser(
    claimed: Tensor | Sequence[Tensor],
    objective: Objective,
    *,
    constraint: Constraints = constraints.real,
    seed: int,
    num_scales: int = 40,
    subject: str | None = None,
) -> Report:
    """Try to refute that a value maximises an objective over a constraint.

    Args:
        claimed: the argmax, a tensor or a tuple of tensors, of any shapes.
        objective: ``objective(*claimed)`` returns the number that is maximised; differentiable almost everywhere.
        constraint: a torch constraint for all of the claimed tensors, or one for each.
        seed: of the perturbations.
        num_scales: how many scales of perturbation, from 2^5 times the size of the value down by halves.
        subject: the claim in words, for the report.

    Returns:
        A report: refuted with a better point or the slopes, undecided where the objective has no value at the claim, or
        the claim is at the boundary of a set that is neither a simplex nor a box.

    Raises:
        TypeError: what is claimed is no tensor.
        ValueError: there are not as many constraints as claimed tensors.
    """
    values = tuple(claimed) if isinstance(claimed, Sequence) else (claimed,)
    for given in values:
        if not isinstance(given, Tensor):
            raise TypeError(f"claimed must hold tensors, not {type(given).__name__}: the objective is differentiated")
    values = tuple(given.detach() for given in values)
    sets = (constraint,) * len(values) if isinstance(constraint, constraints.Constraint) else tuple(constraint)
    if len(sets) != len(values):
        raise ValueError(f"{len(values)} claimed tensors need one constraint or {len(values)}, got {len(sets)}")
    subject = subject or "the maximiser"
    inside = inside_constraint(values, sets)
    try:
        value = float(objective(*values))
    except Exception as error:
        value, inside = float("nan"), inside._replace(detail=f"the objective raised {type(error).__name__}: {error}")
    if not inside.passed:
        return conclude(subject, [inside], seed)
    if math.isnan(value):
        nan, detail = float("nan"), inside.detail or "the objective is NaN at the claimed value"
        return conclude(subject, [inside, Check("objective", False, nan, nan, detail=detail)], seed)

    checks = [inside]
    face = face_of(values, sets)
    on_face, face_sets = face.values, face.sets

    def restricted(*inner: Tensor) -> Tensor:
        return objective(*face.embed(inner))

    if on_boundary(on_face, face_sets):
        nan, detail = float("nan"), "at the boundary of this constraint, where slopes need not vanish: not tested"
        checks.append(Check("stationary", False, nan, nan, detail=detail))
        if any(_is_singular(v, c) for v, c in zip(values, sets, strict=True)):
            return conclude(subject, checks, seed)
    elif abs(value) < torch.inf and any(inner.numel() > 0 for inner in on_face):
        stationary = slopes_vanish(on_face, restricted, face_sets, seed=seed)
        kink = stationary if stationary.passed else slopes_change_sign(on_face, restricted, face_sets)
        checks.append(kink if kink.passed or stationary.detail else stationary)
        if stationary.passed:
            checks.append(curves_down(on_face, restricted, face_sets))
        elif kink.passed:
            checks.append(no_ascent(on_face, restricted, face_sets, seed=seed))
    if face.inward and abs(value) < torch.inf:
        checks.append(falls_inward(values, objective, face.inward))
    checks.append(not_beaten(values, objective, sets, seed=seed, num_scales=num_scales))
    return conclude(subject, checks, seed)


class Face(NamedTuple):
    """The smallest face of a set on which a value lies, and the ways from it into the set."""

    values: tuple[Tensor, ...]
    """What is free on the face; without the entries at a bound."""
    sets: tuple[constraints.Constraint, ...]
    """The constraint of each of them."""
    embed: Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
    """Leads back to the full values."""
    inward: tuple[tuple[int, Tensor], ...]
    """The number of a tensor and a direction in it, of each edge that leads off the face."""


def face_of(values: Sequence[Tensor], sets: Sequence[constraints.Constraint]) -> Face:
    """Return the face of a product of simplices, boxes and other sets on which the values lie."""
    inner: list[Tensor] = []
    inner_sets: list[constraints.Constraint] = []
    builders: list[Callable[[Sequence[Tensor]], Tensor]] = []
    inward: list[tuple[int, Tensor]] = []
    for i, (value, constraint) in enumerate(zip(values, sets, strict=True)):
        base = base_of(constraint)
        start = len(inner)
        if base is constraints.simplex:
            kept = value > 4 * torch.finfo(value.dtype).tiny
            if kept.all():
                inner.append(value)
                inner_sets.append(constraint)
                builders.append(itemgetter(start))
                continue
            for row, free in zip(value.reshape(-1, value.shape[-1]), kept.reshape(-1, value.shape[-1]), strict=True):
                inner.append(row[free])
                inner_sets.append(constraints.simplex)
            for place in (~kept).nonzero():
                direction = torch.zeros_like(value)
                direction[tuple(place[:-1])] = -value[tuple(place[:-1])]
                direction[tuple(place)] += 1
                inward.append((i, direction))

            def fill(parts: Sequence[Tensor], k: int = start, kept: Tensor = kept, n: int = len(inner)) -> Tensor:
                return torch.zeros(kept.shape, dtype=parts[k].dtype).masked_scatter(kept, torch.cat(tuple(parts[k:n])))

            builders.append(fill)
            continue
        low, high = (getattr(base, name, None) for name in ("lower_bound", "upper_bound"))
        at_low, at_high = (torch.zeros_like(value, dtype=torch.bool) for _ in range(2))
        if (low is not None or high is not None) and value.is_floating_point():
            at_low = at_low if low is None else value <= low
            at_high = at_high if high is None else value >= high
        free = ~(at_low | at_high)
        inner.append(value if free.all() else value[free])
        inner_sets.append(constraint if free.all() else base)
        for sign, places in ((1.0, at_low), (-1.0, at_high)):
            for place in places.nonzero():
                direction = torch.zeros_like(value)
                direction[tuple(place)] = sign * _width(value, low, high)
                inward.append((i, direction))

        def put(parts: Sequence[Tensor], k: int = start, free: Tensor = free, value: Tensor = value) -> Tensor:
            return parts[k] if free.all() else value.masked_scatter(free, parts[k])

        builders.append(put)
    return Face(tuple(inner), tuple(inner_sets), lambda parts: tuple(b(parts) for b in builders), tuple(inward))


def falls_inward(values: Sequence[Tensor], objective: Objective, inward: Sequence[tuple[int, Tensor]]) -> Check:
    """Check that the objective does not rise along any direction that leads from the boundary into the set.

    The slope is taken at 2^12 units in the last place along the direction, and is rounding where it is that beside
    the slope at a quarter of the direction.
    """
    name, tolerance, error, found = "falls inward", 0.0, 0.0, None
    inside = list(values)  # off every bound, for objectives whose gradient is 0 / 0 on one, as that of x log(p)
    for i, direction in inward:
        inside[i] = inside[i] + 2**12 * torch.finfo(direction.dtype).eps * direction
    for i, direction in inward:
        eps = torch.finfo(direction.dtype).eps
        tolerance = max(tolerance, ROUNDING * eps)

        def slope(start: Sequence[Tensor], share: float, i: int = i, direction: Tensor = direction) -> float:
            def along(share: Tensor) -> Tensor:
                return objective(*(v + share * direction if k == i else v for k, v in enumerate(start)))

            return float(torch.autograd.functional.jacobian(along, direction.new_tensor(share)))

        near = slope(values, 2**12 * eps)
        near = slope(inside, 2**12 * eps) if math.isnan(near) else near
        far = slope(inside, 0.25)
        if math.isnan(near):
            detail = "autograd gives no slope beside the boundary"
            return Check(name, False, near, near, detail=detail)
        relative = max(near, 0.0) / max(abs(near), abs(far), torch.finfo(torch.float64).tiny) if near > 0 else 0.0
        if relative > error:
            error = relative
            found = {"claimed": bare(values), "direction": direction, "slope just inside": near}
    passed = error <= tolerance
    detail = f"{len(inward)} directions lead off the boundary"
    return Check(name, passed, error, tolerance, None, None if passed else found, detail)


def no_ascent(
    values: Sequence[Tensor], objective: Objective, sets: Sequence[constraints.Constraint], *, seed: int
) -> Check:
    """Check that the objective rises in no direction from a kink, those between the coordinates included.

    The shortest vector in the hull of gradients near the claim is the steepest direction of ascent, as far as they
    tell. If the slope along it does not hold up, the gradient met there joins them; if the vector is zero to rounding,
    no direction is left (Lemaréchal, bundle methods; Bonnans et al., Numerical Optimization, chapter 10).
    """
    u, rebuild = unconstrained(values, sets)
    eps = torch.finfo(u.dtype).eps
    size, near, tolerance = scales(values, sets), 2**12 * eps, ROUNDING * eps
    generator = torch.Generator().manual_seed(seed)

    def gradient(step: Tensor) -> Tensor:
        found = torch.autograd.functional.jacobian(lambda x: objective(*rebuild(x)), u + size * step.to(u))
        return (found * size).to(torch.float64)

    axes = torch.cat([torch.eye(len(u)), -torch.eye(len(u))]).to(torch.float64)
    aside = [torch.randint(2, (len(u),), generator=generator) / 2 - 0.25 for _ in axes]
    bundle = [gradient(near * (axis + shift)) for axis, shift in zip(axes, aside, strict=True)]
    far = torch.stack(bundle + [gradient(axis / 4) for axis in axes]).abs().amax(0)
    units = far.clamp(min=float(far.max()) * 2.0**-8) if far.max() > 0 else torch.ones_like(far)
    rows = [row / units for row in bundle]
    error = 0.0
    for _ in range(32 + 16 * len(u)):
        hull = torch.stack(rows).T.numpy()
        weights, _ = nnls(np.vstack([hull, np.ones(hull.shape[1])]), np.append(np.zeros(len(u)), 1.0))
        shortest = torch.as_tensor(hull @ (weights / weights.sum()))
        error = float(shortest.norm())
        if error <= tolerance:
            return Check("no ascent", True, error, tolerance, detail="zero lies in the hull of nearby gradients")
        step = shortest / units
        met = gradient(near * step / step.abs().max()) / units
        slope = float(met @ shortest) / error
        if slope > tolerance:
            found = {"claimed": bare(values), "direction in unconstrained coordinates": step * size, "slope": slope}
            return Check("no ascent", False, slope, tolerance, None, found)
        rows.append(met)
    return Check("no ascent", True, 0.0, tolerance, detail="no direction was found in which the objective rises")


def _width(value: Tensor, low: float | Tensor | None, high: float | Tensor | None) -> float:
    """Return a length for steps off a bound: the width of the box, or the size of the value, at least one."""
    if low is not None and high is not None:
        return float(torch.as_tensor(high - low).max())
    return max(1.0, float(value.abs().max()))


def _is_singular(value: Tensor, constraint: constraints.Constraint) -> bool:
    """Return whether a value of a set has no unconstrained coordinates at all."""
    try:
        transform_to(constraint).inv(value)
    except Exception:
        return True
    return False


def inside_constraint(values: Sequence[Tensor], sets: Sequence[constraints.Constraint]) -> Check:
    """Check that each value satisfies its constraint, and to rounding: weights that sum to 1.0000001 do not."""
    error, name = 0.0, "inside the constraint"
    for value, constraint in zip(values, sets, strict=True):
        tolerance = ROUNDING * torch.finfo(value.dtype).eps
        if not constraint.check(value).all():
            detail = f"the claimed value is outside its constraint, {constraint}"
            return Check(name, False, torch.inf, tolerance, counterexample={"claimed": value}, detail=detail)
        if _is_singular(value, constraint):
            continue
        transform = transform_to(constraint)
        change = (transform(transform.inv(value)) - value).abs()
        if change.isfinite().all() and change.numel():
            error = max(error, float(change.max() / value.abs().max().clamp(min=torch.finfo(value.dtype).tiny)))
        if error > tolerance:
            detail = f"the claimed value is near its constraint, {constraint}, but not in it"
            return Check(name, False, error, tolerance, counterexample={"claimed": value}, detail=detail)
    return Check(name, True, error, max(ROUNDING * torch.finfo(value.dtype).eps for value in values))


def on_boundary(values: Sequence[Tensor], sets: Sequence[constraints.Constraint]) -> bool:
    """Return whether an entry is one that no finite unconstrained coordinate can move, as a weight of exactly zero.

    Entries that no coordinate moves anywhere, as above the diagonal of a Cholesky factor, do not count.
    """
    for value, constraint in zip(values, sets, strict=True):
        if _is_singular(value, constraint):
            return True
        transform = transform_to(constraint)
        free = transform.inv(value)
        if not free.isfinite().all():
            return True
        if constraint is not constraints.real and value.numel():
            elsewhere = torch.linspace(-1, 1, free.numel()).to(free).reshape(free.shape)
            here, anywhere = (
                torch.autograd.functional.jacobian(transform, at).reshape(value.numel(), -1).abs().amax(1)
                for at in (free, elsewhere)
            )
            limits = torch.finfo(value.dtype)
            stuck = here <= ROUNDING * limits.eps * value.abs().flatten() + limits.tiny * 4
            if (stuck & (anywhere > 0)).any():
                return True
    return False


def slopes_vanish(
    values: Sequence[Tensor], objective: Objective, sets: Sequence[constraints.Constraint], *, seed: int
) -> Check:
    """Check that the gradient in unconstrained coordinates vanishes to rounding along every axis of the Hessian."""
    name = "stationary"
    generator = torch.Generator().manual_seed(seed)
    u, rebuild = unconstrained(values, sets)
    eps = torch.finfo(u.dtype).eps

    def f(u: Tensor) -> Tensor:
        return objective(*rebuild(u))

    def slope(u: Tensor) -> Tensor:
        return torch.autograd.functional.jacobian(f, u)

    gradient = slope(u)
    units, curvatures, axes = principal_axes(torch.autograd.functional.hessian(f, u))
    if not (gradient.isfinite().all() and curvatures.isfinite().all()):
        nan = float("nan")
        return Check(name, False, nan, nan, detail="autograd gives no finite gradient at the claimed value")
    steps = scales(values, sets) * torch.randn(16, len(u), generator=generator, dtype=torch.float64).to(u)
    spread = torch.stack([(f(u + step) - f(u)).abs() for step in steps]).nan_to_num(0.0, 0.0).median()
    curvatures = torch.maximum(curvatures.abs(), FLAT * curvatures.abs().max())
    size = ((f(u).abs() + spread) * curvatures).sqrt()
    along = axes.T @ (units * gradient)
    moved = torch.zeros_like(along)
    for _ in range(NUM_PERTURBATIONS):
        nearby, _ = unconstrained([perturb(value, generator) for value in values], sets)
        change = axes.T @ (units * (slope(nearby) - gradient))
        moved = torch.maximum(moved, change.abs().nan_to_num(0.0, 0.0))
    allowed = ROUNDING * eps * size + ROUNDING / PERTURBATION * moved
    known = allowed <= SMOOTH * size  # else the slope jumps between neighbouring numbers: a kink
    passed = bool((known & (along.abs() <= allowed)).all())
    worst = int(torch.where(known, along.abs() / allowed, 1.0).nan_to_num(0.0).argmax())
    scale = size[worst] if size[worst] > 0 else 1.0
    found = {"claimed": bare(values), "gradient in unconstrained coordinates": gradient}
    return Check(
        name,
        passed,
        float(along[worst].abs() / scale),
        float(allowed[worst] / scale),
        counterexample=None if passed else found,
        detail="" if known.all() else "the slope jumps here",
    )


def slopes_change_sign(values: Sequence[Tensor], objective: Objective, sets: Sequence[constraints.Constraint]) -> Check:
    """Check that along each coordinate the objective rises just before the claimed value and falls just after it.

    Just before and after is at 2^12 units in the last place. A slope counts as zero when it is rounding beside the
    slopes a quarter of the coordinate's size away, so that any point of a flat top passes.
    """
    u, rebuild = unconstrained(values, sets)
    eps = torch.finfo(u.dtype).eps
    size = scales(values, sets)
    names = ("2^-2 before", "just before", "just after", "2^-2 after")

    def slopes(i: int) -> Tensor:
        found = []
        for share in (-0.25, -(2**12) * eps, 2**12 * eps, 0.25):
            moved = u.clone()
            moved[i] += share * size[i]
            found.append(torch.autograd.functional.jacobian(lambda x: objective(*rebuild(x)), moved)[i])
        return torch.stack(found)

    error, found = 0.0, None
    tolerance = ROUNDING * eps
    for i in range(len(u)):
        far = slopes(i)
        wrong = torch.maximum(-far[1], far[2]).clamp(min=0)
        relative = float(wrong / far.abs().max()) if wrong > 0 else float(wrong)
        if not relative <= error:
            error = relative
            found = {"claimed": bare(values), "coordinate": i, **dict(zip(names, far.tolist(), strict=True))}
    passed = error <= tolerance
    return Check(
        "stationary",
        passed,
        error,
        tolerance,
        counterexample=None if passed else found,
        detail="the objective has a kink here: its one-sided slopes change sign along every coordinate"
        if passed
        else "",
    )


def curves_down(values: Sequence[Tensor], objective: Objective, sets: Sequence[constraints.Constraint]) -> Check:
    """Check that the Hessian in unconstrained coordinates has no positive curvature, beyond what counts as none."""
    u, rebuild = unconstrained(values, sets)
    hessian = torch.autograd.functional.hessian(lambda u: objective(*rebuild(u)), u)
    _, curvatures, _ = principal_axes(hessian)
    largest = float(curvatures.abs().max())
    error = max(0.0, float(curvatures.max()) / largest) if largest > 0 else 0.0
    passed = error <= FLAT
    found = {"claimed": bare(values), "Hessian in unconstrained coordinates": hessian}
    return Check("curves down", passed, error, FLAT, counterexample=None if passed else found)


def not_beaten(
    values: Sequence[Tensor],
    objective: Objective,
    sets: Sequence[constraints.Constraint],
    *,
    seed: int,
    num_scales: int = 40,
) -> Check:
    """Check that no random point near or far, inside the constraint, has a larger objective.

    At each scale there are steps in all unconstrained coordinates, in one of them, and on the segment to a random
    point of the set, which leads away from a boundary too.
    """
    name = "not beaten"
    generator = torch.Generator().manual_seed(seed)
    u, rebuild = unconstrained(values, sets)
    size = scales(values, sets)
    height = float(objective(*values))
    eps = torch.finfo(u.dtype).eps
    nearby = [tuple(perturb(value, generator) for value in values) for _ in range(NUM_PERTURBATIONS)]
    moved = max(
        [abs(h - height) for h in (_height(objective, point, sets) for point in nearby) if abs(h) < torch.inf] or [0]
    )
    best, better = -torch.inf, None
    for k in range(num_scales):
        shrink = 2.0 ** (5 - k)
        dense = torch.randn(len(u), generator=generator, dtype=torch.float64).to(u)
        single = torch.zeros_like(u)
        single[torch.randint(len(u), (), generator=generator)] = dense[0]
        target = rebuild(size * torch.randn(len(u), generator=generator, dtype=torch.float64).to(u))
        share = min(shrink, 1.0)
        points = [rebuild(u + sign * shrink * size * step) for step in (dense, single) for sign in (1, -1)]
        points.append(tuple(value + share * (end - value) for value, end in zip(values, target, strict=True)))
        for point in points:
            found = _height(objective, point, sets)
            if found > best:
                best, better = found, point
    if better is None:
        nan = float("nan")
        return Check(name, False, nan, nan, detail="the objective has no value at any point that was tried")
    allowed = ROUNDING * eps * abs(height) + ROUNDING / PERTURBATION * moved if abs(height) < torch.inf else 0.0
    gain = max(best - height, 0.0) if best > height else 0.0
    passed = gain <= allowed
    scale = max(size for size in (abs(height), abs(best), allowed, 1e-300) if size < torch.inf)
    counterexample = {"claimed": bare(values), "better": bare(better), "objective": height, "better objective": best}
    return Check(name, passed, gain / scale, allowed / scale, None, None if passed else counterexample)


def unconstrained(
    values: Sequence[Tensor], sets: Sequence[constraints.Constraint]
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """Return all unconstrained coordinates as one tensor (M,), and the function that leads back to the values."""
    transforms = [transform_to(constraint) for constraint in sets]
    free = [transform.inv(value) for transform, value in zip(transforms, values, strict=True)]

    def rebuild(u: Tensor) -> tuple[Tensor, ...]:
        parts = u.split([part.numel() for part in free])
        return tuple(t(part.reshape(like.shape)) for t, part, like in zip(transforms, parts, free, strict=True))

    return torch.cat([part.flatten() for part in free]), rebuild


def scales(values: Sequence[Tensor], sets: Sequence[constraints.Constraint]) -> Tensor:
    """Return a size for each unconstrained coordinate, (M,): the largest of its tensor, at least 1 if constrained."""
    sizes = []
    for value, constraint in zip(values, sets, strict=True):
        free = transform_to(constraint).inv(value)
        largest = free.abs().max() if free.numel() else free.new_tensor(1.0)
        is_real = free.shape == value.shape and torch.equal(free, value)
        largest = largest if is_real and largest > 0 else largest.clamp(1.0, 8.0)
        sizes.append(largest.expand(free.numel()))
    return torch.cat(sizes)


def principal_axes(hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return units (M,) in which a Hessian (M, M) has a diagonal of ones, its curvatures and its axes."""
    diagonal = hessian.diagonal().abs()
    largest = diagonal.max() if diagonal.max() > 0 else diagonal.new_tensor(1.0)
    units = torch.where(diagonal > FLAT**2 * largest, diagonal, largest).rsqrt()
    scaled = units[:, None] * (hessian + hessian.T) / 2 * units
    if not scaled.isfinite().all():
        return units, scaled.diagonal(), torch.eye(len(units)).to(hessian)
    curvatures, axes = torch.linalg.eigh(scaled)
    return units, curvatures, axes


def _height(objective: Objective, point: Sequence[Tensor], sets: Sequence[constraints.Constraint]) -> float:
    """Return the objective at a point, or minus infinity where it is undefined or the constraint excludes it."""
    try:
        if not all(bool(c.check(value).all()) for c, value in zip(sets, point, strict=True)):
            return -torch.inf
        height = float(objective(*point))
    except Exception:
        return -torch.inf
    return -torch.inf if math.isnan(height) else height


assert_maximiser = asserting(verify_maximiser)
