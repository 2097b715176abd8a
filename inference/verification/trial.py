"""A person's EM run against the program that it is meant for: enumeration, Q, and what is left of its gradient."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.enumeration import Coordinates, LogJoint, log_joint_table
from mixproof.inference.enumeration import inspect as inspect_program
from mixproof.inference.newton import descend
from mixproof.inference.supports import base_of, contains, ends
from mixproof.inference.verification.subject import Subject

MAX_GROUPS = 256
EDGE = 36.0
"""Stands for an infinite logit: beyond it a probability cannot be told from 0 or 1."""
INSIDE = 3.0
"""The unconstrained coordinate from which to start where a parameter lies at the edge of its support."""
ROUNDING = 2.0**10
"""How many units in the last place a well conditioned formula may lose."""
NUM_NUDGES = 4
SMALL = 1e-4
"""A site that, put right, leaves no more than this share of a residual was the cause of all of it."""
BLIND = 1e-6
"""Rounding that hides relative errors of this size leaves a derivation undecided."""
PENALISED = "grad (Q + log prior) = 0"
"""The name of the check of a MAP step."""


class StepError(Exception):
    """A person's function raised, or returned what it must not: what of it, and the site where there is one."""

    def __str__(self) -> str:
        return str(self.args[0])

    @property
    def site(self) -> dict[str, str]:
        """The site as an entry of a counterexample."""
        return {"site": self.args[1]} if len(self.args) > 1 else {}


class OutsideSupport(StepError):
    """An M-step returned parameters that are no parameters of the program."""


class Undecided(Exception):
    """The data, or the rounding, do not let a check say yes or no: the check's name, and why."""


class Target(NamedTuple):
    """What an M-step maximises: expected log joint + multiples of the log prior and of further terms."""

    resp: Tensor
    """(N, K)."""
    prior: float = 0.0
    """How often log p(params) counts."""
    penalty: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    """A further term, a function of the parameters."""
    row_weights: Tensor | None = None
    """(N,), in place of the program's."""


class Residual(NamedTuple):
    """The scale-free gradient that is left at a claimed maximiser, in unconstrained coordinates."""

    errors: Tensor
    """(P,), the sum of the terms' gradients over the sum of their sizes."""
    tolerances: Tensor
    """(P,), how far they move when the parameters are rounded."""

    @property
    def worst(self) -> int:
        """The coordinate with the largest error in units of its tolerance."""
        return int((self.errors.abs() / self.tolerances).argmax())

    @property
    def passed(self) -> bool:
        """Whether rounding explains every error."""
        return bool((self.errors.abs() <= self.tolerances).all())


class Trial:
    """A subject with its program inspected, and its functions guarded.

    A person's function gets copies of its arguments, so that what it changes in place is changed for itself alone.

    Raises:
        ValueError: the program raises, has no enumerated site, an unmarked one or no continuous parameter, or the
            parameters do not fit its sites or lie outside their supports.
        TypeError: the parameters are neither a mapping nor a NamedTuple, or one of them is no tensor.
    """

    def __init__(self, subject: Subject):
        self.subject, self.model, self.data = subject, subject.model, subject.data
        self.container = None if isinstance(subject.params, Mapping) else type(subject.params)
        given = {name: _given(name, value) for name, value in as_dict(subject.params).items()}
        try:
            self.program = inspect_program(self.model, given, *self.data)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"the program raises {type(error).__name__}: {error}") from error
        continuous = [name for name, support in self.program.supports.items() if not support.is_discrete]
        self.params = {name: _floating(value) if name in continuous else value for name, value in given.items()}
        for name in continuous:
            if base_of(self.program.supports[name]) is constraints.simplex:  # to the last bit, where torch allows 1e-6
                self.params[name] = self.params[name] / self.params[name].sum(-1, keepdim=True)
        self.coordinates = Coordinates(self.program.supports, self.params)
        if not self.coordinates.transforms:
            raise ValueError("the program has no continuous parameter: there is nothing for an M-step to find")
        free = self.coordinates.inverse(self.params)
        edge = ~(free.abs() <= self._edges(free))
        self.at_edge = bool(edge.any())
        self.origin = torch.where(edge, INSIDE * free.nan_to_num().sign(), free)
        self.has_prior = self._has_prior()
        self.takes_params = _takes_params(subject.m_step)

    def _has_prior(self) -> bool:
        u = self.origin.clone().requires_grad_()
        log_prior = self.joint(self.coordinates(u)).log_prior
        return log_prior.requires_grad and bool(torch.autograd.grad(log_prior, u)[0].any())

    def wrap(self, params: Mapping[str, Tensor]) -> Any:
        """Return copies of parameters in the type the person uses."""
        copies = {name: value.clone() for name, value in params.items()}
        return copies if self.container is None else self.container(**copies)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Return what a person's function makes of arguments and the data.

        Raises:
            StepError: it raises, or changes the data.
        """
        data = [_copied(argument) for argument in self.data]
        try:
            found = getattr(self.subject, name)(*args, *data, **kwargs)
        except (Exception, SystemExit) as raised:  # sys.exit(0) must not end a verification as a success
            raise StepError(f"{name} raises {type(raised).__name__}: {raised}") from raised
        for i, (before, after) in enumerate(zip(self.data, data, strict=True)):
            if not _unchanged(before, after):
                raise StepError(f"{name} changes argument {i} of the data in place: a second pass would see other data")
        return found

    def joint(self, params: Mapping[str, Tensor]) -> LogJoint:
        """Return the log joint density of data and latents by enumeration."""
        return log_joint_table(self.model, self.program, params, *self.data)

    def random_params(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return random parameters whose unconstrained coordinates are near those of the given ones."""
        noise = torch.randn(self.origin.shape, generator=generator, dtype=torch.float64)
        return self.coordinates(self.origin + 0.3 * self._units * noise.to(self.origin))

    @functools.cached_property
    def _units(self) -> Tensor:
        """The unit (P,) of each coordinate: 1 for logarithms and logits, and else what the data are measured in.

        That is how far a coordinate is moved to change the log joint density of a row by one, at a random component:
        the inverse of the root mean square slope. A location is so perturbed by a share of a standard deviation.
        """
        u = self.origin.clone().requires_grad_()
        rows = self.joint(self.coordinates(u)).rows
        some = rows[:: -(-len(rows) // MAX_GROUPS)]
        heights = torch.where(torch.isfinite(some), some, 0.0).mean(-1)
        identity = torch.eye(len(heights), dtype=heights.dtype)
        slopes = torch.autograd.grad(heights, u, identity, is_grads_batched=True)[0]
        units = 1 / slopes.square().mean(0).sqrt()
        return torch.where(self._constrained(u) | ~torch.isfinite(units), 1.0, units).detach()

    def random_resp(self, params: Mapping[str, Tensor], generator: torch.Generator, tilt: float = 0.0) -> Tensor:
        """Return random responsibilities (N, K), 0 where the program's are; ``tilt`` of their logarithms enters."""
        with torch.no_grad():
            rows = self.joint(params).rows
        logits = torch.randn(rows.shape, generator=generator, dtype=torch.float64).to(rows)
        possible = torch.isfinite(rows)
        return torch.where(possible, logits + tilt * torch.where(possible, rows, 0.0), -math.inf).softmax(1)

    def responsibilities(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return what the person's E-step makes of parameters, as (N, K)."""
        found = self.shaped(params)
        if found.ndim < 2:
            raise StepError(f"e_step returns shape {tuple(found.shape)}, and responsibilities are (rows, components)")
        return found.flatten(1)

    def shaped(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return what the person's E-step makes of parameters, in the person's shape."""
        found = self._call("e_step", self.wrap(params))
        try:
            return _floating(as_tensor(found))
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(found).__name__
            raise StepError(f"e_step returns a {kind}, which cannot be responsibilities: {error}") from error

    def in_their_shape(self, resp: Tensor) -> Tensor:
        """Return responsibilities (N, K) in the shape of the person's own, as (N, K, L) for two sites."""
        return resp.reshape(len(resp), *self.latent_shape)

    @functools.cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of the person's responsibilities of one row."""
        with torch.no_grad():
            rows = self.joint(self.params).rows
        try:
            found = self.shaped(self.params).shape
        except StepError:
            found = rows.shape
        return tuple(found[1:]) if found.numel() == rows.numel() and found[:1] == rows.shape[:1] else (rows.shape[1],)

    def reported(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the log likelihood (), that the person reports, in the precision in which they report it."""
        found = self._call("log_likelihood", self.wrap(params))
        try:
            return _floating(as_tensor(found)).reshape(())
        except (TypeError, ValueError, RuntimeError) as error:
            raise StepError(f"log_likelihood returns no number: {error}") from error

    def m_step(self, resp: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the person's M-step makes of responsibilities (N, K), refusing what lies outside the supports."""
        found = self.returned(resp, params)
        for name in self.coordinates.transforms:
            value, support = found[name], self.program.supports[name]
            if not self.is_inside(name, value):
                finite = bool(torch.isfinite(value).all())
                what = f"outside its support {support}" if finite else "with an entry that is not finite"
                raise OutsideSupport(f"m_step returns {name} {what}: {_brief(value)}", name)
        return found

    def is_inside(self, site: str, value: Tensor) -> bool:
        """Whether a value is finite and lies in the support of a site."""
        support = self.program.supports[site]
        if not contains(support, value):
            return False
        if base_of(support) is not constraints.simplex:
            return True
        return bool(((value.sum(-1) - 1).abs() <= ROUNDING * torch.finfo(value.dtype).eps).all())

    def returned(self, resp: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the person's M-step makes of responsibilities, refusing other sites and shapes."""
        extra = {"params": self.wrap(params)} if self.takes_params else {}
        new = self._call("m_step", self.in_their_shape(resp.clone()), **extra)
        if not (isinstance(new, Mapping) or hasattr(new, "_asdict")):
            raise StepError(f"m_step returns a {type(new).__name__}, and parameters are a dict or a NamedTuple")
        values = {**self.coordinates.fixed, **as_dict(new)}
        if values.keys() != self.params.keys():
            names = sorted(map(str, values))
            raise StepError(f"m_step returns {names}, and the program's parameters are {sorted(self.params)}")
        return {name: self._returned_value(name, values[name]) for name in self.params}

    def _returned_value(self, name: str, value: Any) -> Tensor:
        """Return what the person's M-step gives a site as a tensor, refusing another shape."""
        try:
            found = as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise StepError(f"m_step returns {name} as a {type(value).__name__}: {error}", name) from error
        if found.shape != self.params[name].shape:
            shapes = tuple(found.shape), tuple(self.params[name].shape)
            raise StepError(f"m_step returns {name} of shape {shapes[0]}, and the program's has {shapes[1]}", name)
        if name not in self.coordinates.fixed:
            return _floating(found)
        if not torch.equal(found, self.params[name]):
            given = _brief(self.params[name])
            raise StepError(f"m_step changes {name}, a whole number that is held fixed at {given}", name)
        return found

    def site_of(self, coordinate: int) -> str:
        """Return the parameter site that an unconstrained coordinate belongs to."""
        for name, span in self.spans().items():
            if coordinate in range(span.start, span.stop):
                return name
        raise IndexError(coordinate)

    def spans(self) -> dict[str, slice]:
        """Return where each site's unconstrained coordinates lie in the vector of all."""
        spans, start = {}, 0
        for name, shape in self.coordinates.shapes.items():
            spans[name] = slice(start, start + shape.numel())
            start += shape.numel()
        return spans

    def unconstrained(self, params: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the coordinates (P,) of parameters, infinite ones moved to where they still compute, and which are."""
        raw = self.coordinates.inverse(params)
        return raw.nan_to_num(posinf=EDGE, neginf=-EDGE), raw.isinf()

    def terms(self, u: Tensor, target: Target) -> Tensor:
        """Return the terms of the target at coordinates u (P,): one for each group of rows, one for all else."""
        params = self.coordinates(u)
        joint = self.joint(params)
        weights = joint.row_weights if target.row_weights is None else target.row_weights
        rows = weights * torch.where(target.resp > 0, target.resp * joint.rows, 0).sum(-1)
        groups = torch.arange(len(rows)) % MAX_GROUPS
        summed = torch.zeros(min(len(rows), MAX_GROUPS), dtype=rows.dtype).index_add(0, groups, rows)
        rest = target.prior * joint.log_prior if target.prior else torch.zeros_like(rows[0])
        rest = rest if target.penalty is None else rest + target.penalty(params)
        return torch.cat([summed, rest.reshape(1).to(rows)])

    def gradient(self, u: Tensor, target: Target) -> Tensor:
        """Return the gradient of the target at coordinates u (P,)."""
        u = u.detach().requires_grad_()
        return torch.autograd.grad(self.terms(u, target).sum(), u)[0]

    def residual(self, params: Mapping[str, Tensor], target: Target) -> Residual:
        """Return the gradient that a claimed maximiser leaves; 0 at an edge that the target climbs to, and at a kink.

        Scale-free: the sum of the terms' gradients over the sum of their sizes, coordinate by coordinate. At a kink the
        gradient need not vanish, only change its sign.
        """
        u, at_edge = self.unconstrained(params)
        leaf = u.detach().requires_grad_()
        terms = self.terms(leaf, target)
        each = torch.autograd.grad(terms, leaf, torch.eye(len(terms), dtype=terms.dtype), is_grads_batched=True)[0]
        total, sizes = each.sum(0), each.abs().sum(0)
        if not torch.isfinite(each).all():
            raise StepError("Q has no finite gradient at what m_step returns")
        eps = torch.finfo(u.dtype).eps
        scale = sizes.clamp_min(eps * sizes.max()).clamp_min(torch.finfo(u.dtype).tiny)
        shift = eps * (1 + u.abs())
        moved = [(self.gradient(u + sign * shift, target) - total).abs() / scale for sign in (1, -1)]
        noise = torch.maximum(*moved)
        kinks = noise > math.sqrt(eps)
        errors = total / scale
        tolerances = ROUNDING * (eps + torch.where(kinks, 0.0, noise))
        errors = torch.where(at_edge & (total * u.sign() >= 0), 0.0, errors)
        for i in (kinks & (errors.abs() > tolerances)).nonzero().flatten().tolist():
            step = torch.zeros_like(u)
            step[i] = ROUNDING * shift[i]
            below, above = (self.gradient(u + sign * step, target)[i] for sign in (-1, 1))
            if below >= 0 >= above:
                errors[i] = 0.0
        return Residual(errors, tolerances)

    def maximiser(self, start: Mapping[str, Tensor], target: Target, sites: Sequence[str]) -> dict[str, Tensor]:
        """Return the parameters with some sites moved to the maximum of the target, the others left where they are."""
        return self.maximum(start, target, sites)[0]

    def maximum(
        self, start: Mapping[str, Tensor], target: Target, sites: Sequence[str]
    ) -> tuple[dict[str, Tensor], float]:
        """Return what ``maximiser`` returns, and how far it is known: the largest relative change by a Newton step."""
        u, _ = self.unconstrained(start)
        index = torch.cat([torch.arange(span.start, span.stop) for name, span in self.spans().items() if name in sites])

        def value(free: Tensor) -> Tensor:
            return -self.terms(u.index_copy(0, index, free), target).sum()

        slope = self.gradient(u, target)[index]  # 0 at a minimum too, which a small shift leaves
        shift = torch.where(slope.abs() <= SMALL * target.resp.sum(), SMALL * (1 + u[index].abs()), 0.0)
        found, step = descend(value, u[index] + shift)
        best, next_best = (self.coordinates(u.index_copy(0, index, v)) for v in (found, found - step))
        return best, max(changes(best, next_best).values())

    def blame(
        self, params: Mapping[str, Tensor], target: Target, residual: Residual
    ) -> tuple[list[str], dict[str, Tensor]]:
        """Return the sites that keep claimed parameters from the maximum, and the parameters with them put right.

        One site is to blame where moving it alone mends all: a scale computed about a wrong location is not stationary
        either, and a location at a minimum is. Of several such the one that gains most is. Else all sites are that are
        not stationary, the worst first.
        """
        worst = {
            site: (residual.errors[span].abs() / residual.tolerances[span]).max().item()
            for site, span in self.spans().items()
            if span.stop > span.start
        }
        failed = sorted((site for site in worst if worst[site] > 1), key=lambda site: -worst[site])
        before, mended = residual.errors.abs().max(), {}
        for site in worst if len(worst) > 1 else ():
            better = self.maximiser(params, target, [site])
            after = self.residual(better, target)
            if bool((after.errors.abs() <= torch.maximum(16 * after.tolerances, SMALL * before)).all()):
                with torch.no_grad():
                    mended[self.terms(self.unconstrained(better)[0], target).sum().item()] = site, better
        if mended:
            site, better = mended[max(mended)]
            return [site], better
        return failed, self.maximiser(params, target, list(worst))

    def runs_off(self, start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> Tensor:
        """Return which coordinates (P,) of constrained sites a climb from start to end took towards an edge."""
        moved = (self.unconstrained(end)[0] - self.unconstrained(start)[0]).abs()
        return self._constrained(moved) & ~(moved < EDGE / 4)

    def _edges(self, u: Tensor) -> Tensor:
        """Return from where on each coordinate (P,) stands for the edge of its support, which ends the digits.

        A probability cannot be told from 0 or 1 soon; a scale can be of any size that the type holds.
        """
        edges = torch.full_like(u, math.inf)
        for site, span in self.spans().items():
            support = self.program.supports[site]
            low, high = ends(support)
            one_ended = math.isinf(low) != math.isinf(high) and base_of(support) is not constraints.simplex
            if one_ended or base_of(support) in (constraints.positive_definite, constraints.lower_cholesky):
                edges[span] = 0.8 * math.log(torch.finfo(u.dtype).max)
            elif base_of(support) is not constraints.real:
                edges[span] = EDGE
        return edges

    def _constrained(self, u: Tensor) -> Tensor:
        """Return which coordinates (P,) belong to sites whose support is not the whole space."""
        constrained = torch.zeros_like(u, dtype=torch.bool)
        for site, span in self.spans().items():
            constrained[span] = base_of(self.program.supports[site]) is not constraints.real
        return constrained

    def unbounded(self, start: Mapping[str, Tensor], end: Mapping[str, Tensor], target: Target) -> str:
        """Return a site in which the target still rises at the edge to which a climb ran off, or nothing."""
        slope = self.gradient(self.unconstrained(end)[0], target).abs()
        rising = self.runs_off(start, end) & ~(slope < SMALL * target.resp.sum())
        return self.site_of(int(rising.int().argmax())) if rising.any() else ""


def nudge(value: Tensor, generator: torch.Generator) -> Tensor:
    """Return a tensor changed at random by a few units in its last places."""
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
    return value * (1 + 4 * torch.finfo(value.dtype).eps * noise)


def changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the largest relative change at each site; infinite where it is not finite."""
    return {
        site: ((after[site] - value).abs() / (1 + value.abs())).max().nan_to_num(nan=math.inf).item()
        for site, value in before.items()
    }


def as_dict(params: Any) -> dict[str, Any]:
    """Return parameters, a mapping or a NamedTuple, as a new dict."""
    if not (isinstance(params, Mapping) or hasattr(params, "_asdict")):
        raise TypeError(f"parameters are a dict or a NamedTuple keyed by site, got {type(params).__name__}")
    return dict(params) if isinstance(params, Mapping) else params._asdict()


def as_tensor(value: Any) -> Tensor:
    """Return real numbers in any container as a dense tensor apart from autograd, Python's own in double precision.

    Raises:
        TypeError: these are not real numbers.
        ValueError: the rows differ in length.
        RuntimeError: the same, of tensors.
    """
    if isinstance(value, list | tuple) and any(isinstance(part, Tensor) for part in value):
        value = torch.stack([as_tensor(part) for part in value])
    if not isinstance(value, Tensor):
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError("these are not real numbers")
        value = torch.tensor(array)
    if value.is_complex():
        raise TypeError("these are complex numbers")
    return value.detach().to_dense()


def largest_eps(*values: Tensor) -> float:
    """Return the rounding unit of the coarsest precision among floating tensors."""
    return max(torch.finfo(value.dtype).eps for value in values)


def _given(name: str, value: Any) -> Tensor:
    try:
        return as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"the parameter {name} is a {type(value).__name__} and no tensor: {error}") from error


def _floating(value: Tensor) -> Tensor:
    """Return whole numbers and booleans in double precision, others as they are."""
    return value if value.is_floating_point() else value.double()


def _copied(value: Any) -> Any:
    """Return a copy of a tensor or an array, other values as they are."""
    return value.clone() if isinstance(value, Tensor) else value.copy() if isinstance(value, np.ndarray) else value


def _unchanged(before: Any, after: Any) -> bool:
    """Whether a tensor or an array holds the same numbers, NaN among them."""
    if isinstance(before, Tensor):
        same = before.shape == after.shape and (before == after) | (before.isnan() & after.isnan())
        return bool(torch.as_tensor(same).all())
    if isinstance(before, np.ndarray):
        return np.array_equal(before, after, equal_nan=before.dtype.kind in "fc")
    return True


def _takes_params(m_step: Callable[..., Any]) -> bool:
    try:
        return "params" in inspect.signature(m_step).parameters
    except ValueError:  # some built-in functions have no signature
        return False


def _brief(value: Tensor) -> str:
    return np.array2string(value.detach().numpy(), precision=4, threshold=8, edgeitems=2).replace("\n", "")
