"""Test quantities of a posterior: numbers by which calibration compares draws of parameters with the truth.

A quantity that looks at the parameters alone cannot see a posterior that ignores the data; one that looks at the data
too, the log likelihood first of all, does (Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman and Vehtari,
"Simulation-based calibration checking for Bayesian computation: the choice of test quantities shapes sensitivity",
Bayesian Analysis 20(2), 2025). The components of a mixture have no names, so that of their parameters only symmetric
functions are quantities.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.enumeration import default_dtype_of, inspect, log_joint_table
from mixproof.inference.exchangeability import numberings
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.random_state import seeded
from mixproof.inference.supports import base_of

Quantity = Callable[[dict[str, Tensor], Tensor], Tensor]
"""A number () from parameters by site and data x (N, D), written in operations that ``torch.func.vmap`` can batch."""

CHUNK = 20_000
"""How many draws are evaluated at once: it bounds the memory."""


class Simulation(NamedTuple):
    """One draw from the joint distribution of a program."""

    params: dict[str, Tensor]
    """By parameter site, a draw from p(params)."""
    x: Tensor
    """(N, D), a draw from p(x | params)."""


def simulate(
    model: Callable[..., Any], x: Tensor, *, seed: int, params: Mapping[str, Tensor] | None = None
) -> Simulation:
    """Run a program forward: draw its parameters from their prior, and data in the place of those it observes.

    Args:
        model: a Pyro program; ``model(x)`` observes the data at one site.
        x: (N, D), of which only shape and type count.
        seed: of the draw.
        params: values for all parameter sites; None to draw them.

    Raises:
        ValueError: a prior is improper and cannot be drawn from, a parameter is a ``pyro.param``, which has no prior,
            or the program does not observe one tensor of the shape of x.
    """
    program = poutine.uncondition(model)
    if params is not None:
        program = poutine.condition(program, data=dict(params))
    with pyro.get_param_store().scope(), torch.no_grad(), default_dtype_of(x), seeded(seed):
        try:
            trace: Any = poutine.trace(program).get_trace(x)
        except NotImplementedError as error:
            raise ValueError(
                "a prior of the program is improper, or has no sampler, and no parameters can be drawn from it: give "
                f"every parameter a proper prior ({str(error).splitlines()[0]})"
            ) from error
    if points := [name for name, site in trace.nodes.items() if site["type"] == "param"]:
        raise ValueError(f"{', '.join(points)} is a pyro.param and has no prior to draw from: make it a pyro.sample")
    found, data = {}, {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample" or site["infer"].get("_deterministic"):
            continue
        if site["infer"].get("was_observed"):
            data[name] = site["value"]
        elif not site["fn"].support.is_discrete:
            found[name] = site["value"]
    if [value.shape for value in data.values()] != [x.shape]:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in data.items()) or "nothing"
        raise ValueError(f"the program must observe the data {tuple(x.shape)} at one site, and observes {shapes}")
    return Simulation(found, next(iter(data.values())))


class Quantities:
    """The test quantities of a program with enumerated latents, at many draws of parameters and data at once.

    Of the data: the log likelihood, the log density of the first row, and the probability that the first two rows
    belong to one component. Of the parameters: the log prior, the log likelihood of rows that stay the same throughout,
    and each entry of each site; where a site is indexed by exchangeable components, of one latent or of several, the
    smallest and the largest entry over the components, their mean, and their mean by the components' weights.

    Args:
        model: a Pyro program; ``model(x)`` observes the data.
        x: (N, D), of which only shape and type count.
        seed: of the rows that stay the same.
        further: quantities by name, beside those above.

    Raises:
        ValueError: as ``simulate`` and ``mixproof.inference.enumeration.inspect``.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        x: Tensor,
        *,
        seed: int,
        further: Mapping[str, Quantity] | None = None,
    ):
        example = simulate(model, x, seed=seed)
        self.model, self.fixed_rows = model, example.x
        self.program = inspect(model, example.params, example.x)
        self.further = dict(further or {})
        self.components = _exchangeable(LogPosterior(model, example.x))

    def __call__(self, params: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        """Return the quantities (B, S) by name at parameters (B, S, *shape) by site and data (B, N, D)."""
        num_draws = next(iter(params.values())).shape[1]
        rows = max(1, CHUNK // num_draws)
        parts = []
        at_draws = torch.func.vmap(torch.func.vmap(self._differentiably, in_dims=(0, None)))
        with torch.no_grad(), pyro.validation_enabled(False):
            for first in range(0, len(x), rows):
                block = slice(first, first + rows)
                parts.append(at_draws({name: value[block] for name, value in params.items()}, x[block]))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _differentiably(self, params: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        """Return the quantities at one draw as if to differentiate them: under ``vmap`` alone Pyro fails."""
        return torch.func.vjp(self._at, params, x)[0]

    def _at(self, params: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        found = log_joint_table(self.model, self.program, params, x)
        values = {
            "log likelihood": found.log_likelihood,
            "log prior": found.log_prior,
            "log p(row 1)": found.rows[0].logsumexp(0),
            "log p(fixed rows)": log_joint_table(self.model, self.program, params, self.fixed_rows).log_likelihood,
        }
        if found.rows.shape[0] > 1 and found.rows.shape[1] > 1:
            resp = found.rows[:2].softmax(1)
            values["p(rows 1, 2 together)"] = resp[0] @ resp[1]
        latent = found.latent[0].exp().reshape(self.program.latent_sizes)
        for name, support in self.program.supports.items():
            if name not in self.components:
                values |= _entries(name, params[name], support)
                continue
            axes = self.components[name]
            front = tuple(range(len(axes)))
            by_component = params[name].movedim(tuple(axes), front).flatten(0, front[-1])
            reduced = {"min": by_component.amin(0), "max": by_component.amax(0)}
            if support is not constraints.simplex:
                weights = latent.movedim(tuple(axes.values()), front).reshape(len(by_component), -1).sum(1)
                reduced |= {"mean": by_component.mean(0), "weighted mean": torch.tensordot(weights, by_component, 1)}
            for kind, value in reduced.items():
                values |= _entries(f"{kind} {name}", value, support)
        return values | {name: function(params, x) for name, function in self.further.items()}


def _exchangeable(posterior: LogPosterior) -> dict[str, dict[int, int]]:
    """Return, by site, which of its axes count exchangeable components, and the number of the latent of each."""
    found: dict[str, dict[int, int]] = {}
    for numbered in numberings(posterior):
        if numbered.exchangeable and len(numbered.classes) > 1:
            numbers = [posterior.program.latents.index(latent) for latent in numbered.latents]
            for name, own in (numbered.axes or {}).items():
                found[name] = found.get(name, {}) | dict(zip(own, numbers, strict=False))
    return found


def _entries(name: str, value: Tensor, support: constraints.Constraint) -> dict[str, Tensor]:
    """Return the entries of a tensor by name, those of a symmetric matrix once."""
    support = base_of(support)
    if support is constraints.simplex and value.shape[-1:] == (1,):
        return {}  # it is 1 up to rounding
    symmetric = support is constraints.positive_definite
    found = {}
    for place in itertools.product(*map(range, value.shape)):
        if not symmetric or place[-1] <= place[-2]:
            found[f"{name}{list(place) if place else ''}"] = value[place]
    return found
