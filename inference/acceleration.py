r"""Anderson acceleration of EM, of type I and within a trust region: the same limit in a fraction of the passes.

Near its limit EM is a linear iteration, u -> g(u) with g(u) - u = f(u) ~ (J - I)(u - u*), and slow where components
overlap, for then J has an eigenvalue near 1. From the points that were visited last and their steps f, the method
learns the action of I - J on the space that these points span, and solves for the fixed point u* there. It is
Anderson acceleration of type I (Fang and Saad 2009, Two classes of multisecant methods for nonlinear acceleration,
Numerical Linear Algebra with Applications 16, section 2.3; for EM it is the quasi-Newton method QN1 of Jamshidian and
Jennrich 1997, JRSS B 59, section 3, on a subspace). With Q an orthonormal basis of that space,

.. math::
    A = -Q^T (J - I) Q, \qquad (A + \mu I) y = Q^T f, \qquad d = f + J Q y,

and u + d is the candidate. The shift mu >= 0 makes A + mu I positive definite, so that d leads away from a saddle as EM
itself does, and keeps d within a radius in units of the EM step ||f||, as in a trust-region Newton method (Nocedal and
Wright 2006, Numerical Optimization, section 4.3). The radius doubles after a success and halves after a refusal; mu to
infinity is plain EM. Type II (DAAREM, Henderson and Varadhan 2019) and SQUAREM (Varadhan and Roland 2008) were measured
beside it and need more passes; ``benchmarks/acceleration.py`` prints how many this one needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.validation import feasible_params, num_components

MEMORY = 5
"""How many earlier points the method looks back on; more of them reach back to where EM was another linear map."""
LINEAR_PHASE = 0.1
"""In nats. A step that gains more is not of the linear phase: EM goes on alone, as such steps choose the basin."""
FIRST_RADIUS = 2.0
LEAST_RADIUS = 1.2
"""Both in lengths of the EM step at the point."""
TOWARDS_BOUNDARY = 0.5
"""The largest share of the way to the edge of a support that a candidate goes beyond EM's own step: EM cannot leave it,
and a probability extrapolated to 0 would be a false limit (the fraction-to-the-boundary rule of interior points)."""


class Anderson:
    """Proposes where EM will end, from where it has been; told how that went, it learns and grows bolder or more timid.

    After each pass at a point that EM stands on, ``propose`` gives a candidate or None. After a pass at the candidate,
    ``accept`` says whether EM goes there. Where there is no candidate or it is refused, EM takes its own step, which
    never lowers the objective; so the objective never falls, whatever is proposed.

    Args:
        family: a family of the contract.
        params: its ``Params``, inside their supports; only the location and scale of their ``moments`` are used, as the
            units of the coordinates.
    """

    def __init__(self, family: Any, params: Any):
        self._coordinates = _Coordinates(family, params)
        self._points: list[tuple[Tensor, Tensor]] = []  # (u, f), the current one last
        self._objective = -math.inf
        self._radius = FIRST_RADIUS
        self._length = 0.0  # of the last candidate's step, in EM steps
        self._bounded = False  # whether the radius cut it short

    def propose(self, params: Any, image: Any, objective: float) -> Any:
        """Return a candidate for the next point, ``Params`` inside their supports, or None for EM's own step.

        Args:
            params: where EM stands.
            image: where EM's own step leads from there.
            objective: the log likelihood, plus the log prior, at ``params``.
        """
        gain, self._objective = objective - self._objective, objective
        u, g = self._coordinates(params), self._coordinates(image)
        f = g - u
        self._points = [*self._points, (u, f)][-1 - MEMORY :]
        if not gain < LINEAR_PHASE or len(self._points) < 3 or not torch.isfinite(f).all() or not f.any():
            return None
        step = self._step(u, f)
        if step is None:
            return None
        candidate = self._coordinates.inverse(self._coordinates.inside(u + step, g), image)
        finite = all(torch.isfinite(value).all() for value in candidate)
        return candidate if finite else None

    def accept(self, candidate: Any, image: Any, objective: float) -> bool:
        """Return whether EM goes to the candidate: the objective there is not lower, and not higher by a leap.

        Args:
            candidate: what ``propose`` gave.
            image: where EM's own step leads from there; of no matter where the objective is not finite.
            objective: the log likelihood, plus the log prior, at the candidate.
        """
        if 0 <= objective - self._objective < LINEAR_PHASE:
            self._radius *= 2 if self._bounded else 1
            return True
        self._radius = max(LEAST_RADIUS, min(self._radius, self._length) / 2)
        if math.isfinite(objective):
            u = self._coordinates(candidate)
            self._points.insert(-1, (u, self._coordinates(image) - u))
        return False

    def _step(self, u: Tensor, f: Tensor) -> Tensor | None:
        """Return the step d (P,) from u (P,), or None where it would turn back on EM's own step f (P,)."""
        earlier = [(v - u, h - f) for v, h in self._points[:-1] if not torch.equal(v, u)]
        if not earlier:
            return None
        moves, changes = (torch.stack(columns, 1) for columns in zip(*earlier, strict=True))
        if not (torch.isfinite(moves).all() and torch.isfinite(changes).all()):
            return None
        lengths = moves.norm(dim=0)
        left, singular, right = torch.linalg.svd(moves / lengths, full_matrices=False)
        kept = singular > math.sqrt(torch.finfo(u.dtype).eps) * singular[0]
        basis = left[:, kept]  # Q
        change = (changes / lengths) @ right[kept].mT / singular[kept]  # (J - I) Q
        matrix, projected = -basis.mT @ change, basis.mT @ f
        identity = torch.eye(len(projected), dtype=u.dtype)
        # the eigenvalues of I - J are real; a negative one is a direction in which EM moves away from a saddle
        convex = matrix + max(0.0, -2 * torch.linalg.eigvals(matrix).real.min().item()) * identity

        def shifted(shift: float) -> Tensor:
            y, info = torch.linalg.solve_ex(convex + shift * identity, projected)
            return f + (basis + change) @ y if info == 0 else torch.full_like(f, math.inf)

        radius = self._radius * f.norm()
        step = shifted(0.0)
        self._bounded = not step.norm() <= radius
        if self._bounded:
            low, high = 1e-20, 1e6  # I - J has eigenvalues of size 1 and below
            for _ in range(60):
                middle = math.sqrt(low * high)
                low, high = (low, middle) if shifted(middle).norm() <= radius else (middle, high)
            step = shifted(high)
        self._length = (step.norm() / f.norm()).item()
        return step if step @ f > 0 else None

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next proposals depend on, as a flat dict of tensors and numbers."""
        points, steps = (
            (torch.stack(part) for part in zip(*self._points, strict=True)) if self._points else (None, None)
        )
        empty = torch.zeros(0, 0, dtype=torch.float64)
        return {
            "points": empty if points is None else points,
            "steps": empty if steps is None else steps,
            "loc": self._coordinates.loc,
            "scale": self._coordinates.scale,
            "objective": self._objective,
            "radius": self._radius,
            "length": self._length,
            "bounded": int(self._bounded),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self._points = list(zip(state["points"], state["steps"], strict=True))
        self._coordinates.loc, self._coordinates.scale = state["loc"], state["scale"]
        self._objective, self._radius = float(state["objective"]), float(state["radius"])
        self._length, self._bounded = float(state["length"]), bool(state["bounded"])


class _Coordinates:
    """Coordinates of ``Params`` as one flat vector u (P,) in float64, in which any u is a point of the supports.

    Square roots of weights and angles 2 arcsin(sqrt(p)) of probabilities, in which the Fisher information is constant
    and the edge of the support is not infinitely far; logarithms of positive numbers; of a covariance the Cholesky
    factor with the logarithm of its diagonal; locations as they are. Locations and covariances are in units of the
    mixture's own standard deviations, so that no unit of the data matters.
    """

    def __init__(self, family: Any, params: Any):
        mean, covariance = family.moments(params)
        self.loc, self.scale = mean.double().cpu(), covariance.diagonal().sqrt().double().cpu()
        with feasible_params(), poutine.trace() as tape:
            family.model(num_components=num_components(params), num_data=1, num_features=len(mean))
        nodes: Any = tape.trace.nodes
        self.supports: dict[str, constraints.Constraint] = {}
        for name in params._fields:
            support = nodes[name]["fn"].support
            while isinstance(support, constraints.independent):
                support = support.base_constraint
            if not nodes[name]["infer"].get("_deterministic"):  # a known one stays as it is
                self.supports[name] = support
        edges = []
        for name, support in self.supports.items():
            size = self._flat(name, getattr(params, name).double().cpu()).numel()
            edges.append(torch.tensor(EDGES.get(support, (-math.inf, math.inf)), dtype=torch.float64).expand(size, 2))
        self.edges = torch.cat(edges).unbind(1)

    def __call__(self, params: Any) -> Tensor:
        """Return the coordinates (P,) of parameters; not finite at an edge that the coordinates do not reach."""
        return torch.cat([self._flat(name, getattr(params, name).double().cpu()) for name in self.supports])

    def _flat(self, name: str, value: Tensor) -> Tensor:
        support = self.supports[name]
        if support is constraints.simplex:
            return value.sqrt()
        if support is constraints.unit_interval:
            return 2 * value.sqrt().asin().flatten()
        if support is constraints.positive_definite:
            factor, info = torch.linalg.cholesky_ex(value / self.scale[:, None] / self.scale)
            factor = torch.where(info[..., None, None] == 0, factor, torch.nan)
            diagonal = factor.diagonal(dim1=-2, dim2=-1)
            return torch.where(_diagonal(factor), torch.diag_embed(diagonal.log()), factor)[_lower(factor)]
        if support in (constraints.real, constraints.real_vector):
            return ((value - self.loc) / self.scale).flatten()
        return value.log().flatten()

    def inverse(self, u: Tensor, like: Any) -> Any:
        """Return the parameters at coordinates u (P,), shaped as others, from which the known ones come."""
        values, start = {}, 0
        for name, support in self.supports.items():
            old = getattr(like, name)
            if support is constraints.positive_definite:
                blank = torch.zeros(old.shape, dtype=u.dtype)
                size = int(_lower(blank).sum())
                factor = blank.masked_scatter(_lower(blank), u[start : start + size])
                factor = torch.where(_diagonal(blank), factor.exp(), factor)
                value = factor @ factor.mT * self.scale[:, None] * self.scale
            else:
                size = old.numel()
                value = self._shaped(support, u[start : start + size].reshape(old.shape))
            values[name] = value.to(old)
            start += size
        return like._replace(**values)

    def _shaped(self, support: constraints.Constraint, block: Tensor) -> Tensor:
        if support is constraints.simplex:
            return block.square() / block.square().sum()
        if support is constraints.unit_interval:
            return (block / 2).sin().square()
        if support in (constraints.real, constraints.real_vector):
            return block * self.scale + self.loc
        return block.exp()

    def inside(self, u: Tensor, image: Tensor) -> Tensor:
        """Return u (P,), no weight or probability nearer to an edge than a share of the way from EM's image (P,).

        What is at an edge stays there, as EM keeps it.
        """
        (lower, upper), share = self.edges, TOWARDS_BOUNDARY
        u = u.maximum((1 - share) * image + share * lower).minimum((1 - share) * image + share * upper)
        return torch.where((image == lower) | (image == upper), image, u)


EDGES = {constraints.simplex: (0.0, math.inf), constraints.unit_interval: (0.0, math.pi)}
"""Where the coordinates of a support end; elsewhere they are the whole line."""


def _lower(matrices: Tensor) -> Tensor:
    """Return which entries of matrices (..., D, D) are on the diagonal or below it."""
    return torch.ones_like(matrices, dtype=torch.bool).tril()


def _diagonal(matrices: Tensor) -> Tensor:
    return torch.eye(matrices.shape[-1], dtype=torch.bool).expand_as(matrices)
