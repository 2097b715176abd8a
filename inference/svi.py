"""Stochastic variational inference of an enumerated Pyro program, in a parameter store of its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.nn import PyroModule
from pyro.optim import ClippedAdam, PyroOptim
from torch import Tensor

from mixproof.inference.enumeration import bind, default_dtype_of
from mixproof.inference.random_state import seeded

_NAMES = itertools.count()


class Variational(NamedTuple):
    """What SVI found."""

    guide: Any
    """The fitted guide, q(params): an autoguide, whose ``median()`` and ``quantiles()`` read it, or a function bound to
    the values of its param sites."""
    losses: Tensor
    """(num_steps,), the estimate of -ELBO before each step: an upper bound of -log p(data) in expectation."""


def svi(
    model: Callable[..., Any],
    guide: Any,
    *args: Any,
    num_steps: int,
    seed: int,
    max_plate_nesting: int = 1,
    learning_rate: float = 0.1,
    final_learning_rate: float = 1e-4,
    optimiser: PyroOptim | None = None,
) -> Variational:
    """Fit a guide to the posterior of a Pyro program with enumerated discrete latents by maximising the ELBO.

    Args:
        model: the program; ``model(*args)`` observes the data. Bind other arguments with ``functools.partial``.
        guide: a Pyro guide that leaves the enumerated sites out, e.g.
            ``AutoDelta(pyro.poutine.block(model, hide=["z"]))``.
        args: the positional arguments of the program.
        num_steps: the number of gradient steps.
        seed: seeds Pyro's random draws for the run; the states of the global generators are put back afterwards.
        max_plate_nesting: the largest number of plates inside one another in the program.
        learning_rate: the step of Adam at the start, in unconstrained coordinates.
        final_learning_rate: the step at the end; it decays geometrically in between.
        optimiser: takes the place of Adam and both rates. The ELBO of a delta guide has no noise, and resilient
            backpropagation, ``PyroOptim(torch.optim.Rprop, {"lr": 0.01})``, climbs it to rounding in a few hundred
            steps.

    Raises:
        ValueError: ``num_steps`` is below 1, the loss is not finite, or Pyro refuses the pair of model and guide.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, not {num_steps}")
    decay = (final_learning_rate / learning_rate) ** (1 / num_steps)
    losses = []
    with pyro.get_param_store().scope(), default_dtype_of(*args):
        if isinstance(guide, PyroModule):
            # Outside this store a guide reads the global one by name, and would find what another of its class left.
            guide._pyro_set_supermodule(f"svi_{next(_NAMES)}_{type(guide).__name__}", guide._pyro_context)
        with seeded(seed), torch.no_grad():
            guide(*args)
        for _, parameter in pyro.get_param_store().named_parameters():
            parameter.data = parameter.data.clone()  # Pyro would update the tensors that a guide starts from, in place
        adam = ClippedAdam({"lr": learning_rate, "lrd": decay, "clip_norm": float("inf")})
        inference = SVI(model, guide, optimiser or adam, TraceEnum_ELBO(max_plate_nesting=max_plate_nesting))
        with seeded(seed):
            for step in range(num_steps):
                losses.append(inference.step(*args))
                if not math.isfinite(losses[-1]):
                    raise ValueError(
                        f"the loss is {losses[-1]} at step {step}: lower the learning rate, or start nearer"
                    )
        found = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    fitted = guide if isinstance(guide, PyroModule) else bind(guide, found)
    return Variational(fitted, torch.tensor(losses, dtype=torch.float64))
