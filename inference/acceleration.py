r"""Anderson acceleration of EM along its own path: the same limit in a fraction of the passes.

EM is slow where components overlap: its steps are many, short and alike. From the points u that were visited last and
EM's steps there, f(u) = g(u) - u, the method learns the Jacobian J of g on the space that these points span, as in
Anderson acceleration of type I (Fang and Saad 2009, Two classes of multisecant methods for nonlinear acceleration,
Numerical Linear Algebra with Applications 16, section 2.3). With Q an orthonormal basis of that space, the model of EM
near u is g(u + d) = u + f + J Q Q^T d. By it, T steps of EM lead from u to u + d, where EM's next step is e:

.. math::
    B = Q^T J Q, \qquad d = f + J Q \sum_{t=0}^{T-2} B^t Q^T f, \qquad e = J Q B^{T-1} Q^T f.

T = 1 is EM; T to infinity is the fixed point of the model, the candidate of Anderson acceleration and of quasi-Newton
methods (for EM, Jamshidian and Jennrich 1997, JRSS B 59, section 3). Here T doubles where EM's step turned out about as
the model said, and halves where the candidate is refused: the method follows EM's path in steps as long as the path
allows, as projective integration follows a flow (Gear and Kevrekidis 2003, Projective methods for stiff differential
equations, SIAM Journal on Scientific Computing 24). So it leaves a saddle on EM's side, and need not wait for a linear
phase. A candidate at which the model was wrong by more than a nat is refused, as EM might have gone elsewhere.
That is no promise to end where EM ends: EM may turn at any pass, and only a run of EM itself tells where. How many
passes it takes, and how often it ends elsewhere, is printed by ``benchmarks/acceleration.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.supports import base_of
from mixproof.inference.validation import feasible_params, num_components, settings_of

MEMORY = 5
"""How many earlier points the method looks back on; more of them reach back to where EM was another linear map."""
FARTHER = 0.5
"""The model's error of EM's step at a point, in lengths of the step before, up to which to look farther next time."""
NATS = 1.0
"""The largest error of the model that a candidate may have: its square, in units of the step before, times the gain, as
what a step gains goes with its square. Basins of EM are told apart by steps of nats."""
GROWTH = 2.0
"""No candidate lies where the model's step is longer than this multiple of EM's: no model reaches far from a saddle."""
TOWARDS_BOUNDARY = 0.5
"""The largest share of the way to the edge of a support that a candidate goes beyond EM's own step: EM cannot leave it,
and a probability extrapolated to 0 would be a false limit (the fraction-to-the-boundary rule of interior points)."""


class Anderson:
    """Proposes where EM will be, from where it has been; told how that went, it looks farther ahead or less far.

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
        self._level = 0  # how far to look: 0 is EM's own step, and k is T = 1 + 2^(k - 1) of them
        self._own: _Ahead | None = None  # of EM's own step from the point it stands on, where it may go next
        self._ahead: _Ahead | None = None  # of the last candidate

    def propose(self, params: Any, image: Any, objective: float) -> Any:
        """Return a candidate for the next point, ``Params`` inside their supports, or None for EM's own step.

        Args:
            params: where EM stands.
            image: where EM's own step leads from there.
            objective: the log likelihood, plus the log prior, at ``params``.
        """
        u, g = self._coordinates(params), self._coordinates(image)
        f = g - u
        if self._own is not None:
            self._agrees(self._own, f, objective - self._objective)
        self._objective = objective
        self._points = [*self._points, (u, f)][-1 - MEMORY :]
        self._own, self._ahead = self._look_ahead(u, f)
        if self._ahead is None:
            return None
        candidate = self._coordinates.inverse(self._coordinates.inside(u + self._ahead.way, g), image)
        finite = all(torch.isfinite(value).all() for value in candidate)
        return candidate if finite else None

    def accept(self, candidate: Any, image: Any, objective: float) -> bool:
        """Return whether EM goes to the candidate: the objective there is not lower, and EM's step as the model said.

        Args:
            candidate: what ``propose`` gave.
            image: where EM's own step leads from there; of no matter where the objective is not finite.
            objective: the log likelihood, plus the log prior, at the candidate.
        """
        assert self._ahead is not None
        accepted = False
        if math.isfinite(objective):
            u = self._coordinates(candidate)
            f = self._coordinates(image) - u
            accepted = self._agrees(self._ahead, f, objective - self._objective) and objective >= self._objective
            if not accepted and f.isfinite().all():
                self._points.insert(-1, (u, f))
        if accepted:
            self._own = None
        else:
            self._level = self._ahead.level - 1
        return accepted

    def _agrees(self, ahead: _Ahead, f: Tensor, gain: float) -> bool:
        """Return whether EM's step f (P,) at a point is what the model said; if nearly so, look farther from now on."""
        error = ((f - ahead.step).norm() / self._points[-1][1].norm()).item()
        agrees = gain * error * error <= NATS
        if agrees and error <= FARTHER:
            self._level = max(self._level, ahead.level + 1)
        return agrees

    def _look_ahead(self, u: Tensor, f: Tensor) -> tuple[_Ahead | None, _Ahead | None]:
        """Return what the model says of EM's step f (P,) from u (P,), and of as many as it sees ahead, or None."""
        earlier = [(v - u, h - f) for v, h in self._points[:-1] if not torch.equal(v, u)]
        if not earlier or not f.any():
            return None, None
        moves, changes = (torch.stack(columns, 1) for columns in zip(*earlier, strict=True))
        if not (torch.isfinite(moves).all() and torch.isfinite(changes).all()):
            return None, None
        lengths = moves.norm(dim=0)
        left, singular, right = torch.linalg.svd(moves / lengths, full_matrices=False)
        kept = singular > math.sqrt(torch.finfo(u.dtype).eps) * singular[0]
        basis = left[:, kept]  # Q
        image = basis + (changes / lengths) @ right[kept].mT / singular[kept]  # J Q
        power, projected = basis.mT @ image, basis.mT @ f
        own, ahead, total = _Ahead(f, image @ projected, 0), None, projected
        for level in range(1, self._level + 1):  # power is B^(T - 1), and total the sum of B^t Q^T f over t < T - 1
            step = image @ (power @ projected)
            if not step.norm() <= GROWTH * f.norm():
                break
            ahead = _Ahead(f + image @ total, step, level)
            total, power = total + power @ total, power @ power
        return own, ahead if ahead is not None and ahead.way @ f > 0 else None

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
            "level": self._level,
            "own_step": torch.zeros(0, dtype=torch.float64) if self._own is None else self._own.step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self._points = list(zip(state["points"], state["steps"], strict=True))
        self._coordinates.loc, self._coordinates.scale = state["loc"], state["scale"]
        self._objective, self._level = float(state["objective"]), int(state["level"])
        step = state["own_step"]
        self._own = _Ahead(self._points[-1][1], step, 0) if step.numel() else None


class _Ahead(NamedTuple):
    """What the model says of some steps of EM."""

    way: Tensor
    """(P,), where they lead."""
    step: Tensor
    """(P,), EM's own step from there."""
    level: int
    """0 for one step, k for 1 + 2^(k - 1)."""


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
        with feasible_params(*settings_of(family)), poutine.trace() as tape:
            family.model(num_components=num_components(params), num_data=1, num_features=len(mean))
        nodes: Any = tape.trace.nodes
        self.supports: dict[str, constraints.Constraint] = {}
        for name in params._fields:
            if not nodes[name]["infer"].get("_deterministic"):  # a known one stays as it is
                self.supports[name] = base_of(nodes[name]["fn"].support)
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
