"""The mode of an enumerated Pyro program's parameters: what ``AutoDelta`` looks for, found to rounding."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.bfgs import Minimum, Objective, minimise, with_gradient
from mixproof.inference.enumeration import Coordinates, inspect, log_density
from mixproof.inference.supports import at_edge
from mixproof.inference.validation import check_integer, check_tolerance

STEP = 0.1
"""How far, in unconstrained coordinates, to look for a higher density than at the mode."""
LEAST_GAIN = 1e-8
"""What share of the log density is a gain."""


class Mode(NamedTuple):
    """A local maximum of the log density."""

    params: Any
    """The parameters there, in the type of ``init``: a dict or a NamedTuple keyed by site."""
    log_density: float
    """log p(data, params) there, the discrete latents summed out; under flat priors the log likelihood."""
    converged: bool
    """Whether no further descent could be found beyond rounding."""
    num_steps: int
    """The number of quasi-Newton steps made."""


def posterior_mode(
    model: Callable[..., Any], init: Any, *args: Any, max_steps: int = 2000, rtol: float = 1e-13
) -> Mode:
    """Climb from a start to a mode of p(params | data) under a Pyro program with enumerated discrete latents.

    Args:
        model: the program; ``model(*args)`` observes the data. Bind other arguments with ``functools.partial``.
        init: a value for each parameter site, as a dict or NamedTuple.
        args: the positional arguments of the program.
        max_steps: the largest number of quasi-Newton steps.
        rtol: stop when 10 steps together gain no more than this share of the log density.

    Returns:
        The mode as density over the constrained parameters: no Jacobian of a change of variables enters. Where the
        density still rises along a coordinate, or a site has run to its edge, the climb has not converged, and a
        ConvergenceWarning names the site.

    Raises:
        TypeError: ``init`` names no sites, or ``max_steps`` is not an integer.
        ValueError: a setting is out of range, the program has no enumerated site or an unmarked one, a parameter has no
            value, or the start has density 0 or values of other shapes than the program's or outside of their supports.
    """
    check_integer(max_steps, "max_steps", 1)
    check_tolerance(rtol)
    if not (isinstance(init, Mapping) or hasattr(init, "_asdict")):
        raise TypeError(f"init must be a dict or a NamedTuple of values by site, not a {type(init).__name__}")
    start: Mapping[str, Tensor] = init if isinstance(init, Mapping) else init._asdict()
    start = {name: torch.as_tensor(value).detach() for name, value in start.items()}
    floating = [value for value in (*start.values(), *args) if isinstance(value, Tensor) and value.is_floating_point()]
    widest = functools.reduce(torch.promote_types, (value.dtype for value in floating), torch.float32)
    start = {name: value.to(widest) if value.is_floating_point() else value for name, value in start.items()}
    try:
        program = inspect(model, start, *args)
    except NotImplementedError as error:  # an improper prior, which cannot be drawn from
        raise ValueError(f"a parameter site has no value among those of init: {', '.join(start) or 'none'}") from error
    coordinates = Coordinates(program.supports, start)

    objective = with_gradient(lambda u: -log_density(model, program, coordinates(u), *args))
    for name in coordinates.transforms:
        if at_edge(start[name], program.supports[name]):
            raise ValueError(f"the start is at the edge of the support of {name}, which no step leaves: start inside")
    u = coordinates.inverse(start)
    found = minimise(objective, u, max_steps=max_steps, rtol=rtol)
    with torch.no_grad():
        params = coordinates(found.u)
    rising = _rising(objective, coordinates, program.supports, found) if found.converged else None
    if not found.converged:
        warnings.warn(f"no mode within {max_steps} steps: raise max_steps", ConvergenceWarning, stacklevel=2)
    elif rising is not None:
        warnings.warn(
            f"no mode: the log density still rises along {rising}, as it does without end where a component closes in "
            "on few rows. Give a prior, use fewer components, or start elsewhere",
            ConvergenceWarning,
            stacklevel=2,
        )
    mode = params if isinstance(init, Mapping) else type(init)(**params)
    return Mode(mode, -found.value, found.converged and rising is None, found.num_steps)


def _rising(
    objective: Objective, coordinates: Coordinates, supports: Mapping[str, constraints.Constraint], found: Minimum
) -> str | None:
    """Return a site at its edge, or that of the coordinate along which the objective falls most; None if none falls.

    Next to an infinity of the likelihood the quasi-Newton method sees walls: a location is off by more than its
    component is wide, whichever way it moves with the other coordinates.
    """
    u, value = found.u, found.value
    params = coordinates(u)
    for site in coordinates.transforms:
        if at_edge(params[site], supports[site]):
            return site
    gradient = objective(u)[1]
    owners = [site for site, shape in coordinates.shapes.items() for _ in range(shape.numel())]
    most, rising = LEAST_GAIN * abs(value), None
    for i in (STEP * gradient.abs() > most).nonzero()[:, 0].tolist():
        moved = u.clone()
        moved[i] -= STEP * gradient[i].sign()
        gain = value - objective(moved)[0]
        if gain > most:
            most, rising = gain, owners[i]
    return rising
