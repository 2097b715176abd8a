"""The posterior of a Pyro program over unconstrained coordinates, for many points at once: what samplers walk on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from mixproof.inference.captured_graph import capture
from mixproof.inference.enumeration import Coordinates, default_dtype_of, inspect, log_joint_table
from mixproof.inference.random_state import seeded
from mixproof.inference.validation import feasible


class Evaluation(NamedTuple):
    """The two parts of a log posterior at C points, and its slope."""

    gradient: Tensor
    """(C, P), of log_prior + temperature * log_likelihood in the coordinates."""
    log_prior: Tensor
    """(C,), log p(params) + log |d params / d u|: the prior density over the coordinates u."""
    log_likelihood: Tensor
    """(C,), log p(data | params), the discrete latents summed out."""


class LogPosterior:
    """log p(u | data) of ``model(*args)`` up to a constant, at C points of unconstrained coordinates u (C, P) at once.

    The program is run and differentiated once, under ``torch.func.vmap``, and captured as a graph of tensor operations;
    each further evaluation costs these operations alone.
    """

    def __init__(self, model: Callable[..., Any], *args: Any):
        with pyro.get_param_store().scope(), torch.no_grad(), default_dtype_of(*args), InitMessenger(feasible):
            trace: Any = poutine.trace(model).get_trace(*args)
        example = {
            name: site["value"]
            for name, site in trace.nodes.items()
            if site["type"] == "param" or (site["type"] == "sample" and _is_parameter(site))
        }
        self.model, self.args = model, args
        self.program = inspect(model, example, *args)
        self.coordinates = Coordinates(self.program.supports, example)
        self.size = len(self.coordinates.inverse(example))
        self._graphs: dict[int, Any] = {}

    def __call__(self, u: Tensor, temperature: Tensor) -> Evaluation:
        """Return both parts and the slope at points u (C, P), the likelihood raised to powers (C,) between 0 and 1."""
        if len(u) not in self._graphs:

            def slope(u: Tensor, temperature: Tensor) -> Any:
                return torch.func.vmap(torch.func.grad(self._at, has_aux=True))(u, temperature)

            with torch.no_grad(), pyro.validation_enabled(False):
                self._graphs[len(u)] = capture(slope, u, temperature)
        with torch.no_grad():
            gradient, (log_prior, log_likelihood) = self._graphs[len(u)](u, temperature)
        return Evaluation(gradient, log_prior, log_likelihood)

    def _at(self, u: Tensor, temperature: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        found = log_joint_table(self.model, self.program, self.coordinates(u), *self.args)
        log_prior = found.log_prior + self.coordinates.log_jacobian(u)
        return log_prior + temperature * found.log_likelihood, (log_prior, found.log_likelihood)

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Return the parameters, (..., *shape) by site, at points u (..., P)."""
        flat = torch.func.vmap(self.coordinates)(u.reshape(-1, u.shape[-1]))
        return {name: value.reshape(*u.shape[:-1], *value.shape[1:]) for name, value in flat.items()}

    def log_jacobian(self, u: Tensor) -> Tensor:
        """Return log |d params / d u|, (...), at points u (..., P)."""
        return torch.func.vmap(self.coordinates.log_jacobian)(u.reshape(-1, u.shape[-1])).reshape(u.shape[:-1])

    def unconstrain(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the points u (C, P) of parameters (C, *shape) by site, inside their supports."""
        return torch.func.vmap(self.coordinates.inverse)(dict(params))

    def draw_prior(self, num_draws: int, *, seed: int) -> Tensor:
        """Return draws (num_draws, P) of the coordinates under the prior.

        Raises:
            NotImplementedError: a prior is improper and cannot be drawn from.
        """
        draws = []
        with pyro.get_param_store().scope(), torch.no_grad(), default_dtype_of(*self.args), seeded(seed):
            for _ in range(num_draws):
                nodes: Any = poutine.trace(self.model).get_trace(*self.args).nodes
                draws.append(self.coordinates.inverse({name: nodes[name]["value"] for name in self.program.supports}))
        return torch.stack(draws)


def _is_parameter(site: Mapping[str, Any]) -> bool:
    """Whether a sample site is a continuous latent: not observed, not enumerated, not a deterministic name."""
    known = site["is_observed"] or site["infer"].get("_deterministic") or type(site["fn"]).__name__ == "_Subsample"
    return not known and not site["fn"].support.is_discrete
