"""Stochastic variational inference of an enumerated Pyro program, in a parameter store of its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from pyro.nn import PyroModule
from pyro.optim import ClippedAdam, PyroOptim
from torch import Tensor

from mixproof.inference.draws import Draws
from mixproof.inference.enumeration import bind, default_dtype_of
from mixproof.inference.hmc import initial_points
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.random_state import seeded

_GUIDES = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLaplace": AutoLaplaceApproximation,
}
NUM_STARTS = 8
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
            ``AutoDelta(pyro.poutine.block(model, hide=["z"]))``; or the name of one over the unconstrained coordinates
            of every continuous site. ``"AutoNormal"`` has independent ones, ``"AutoMultivariateNormal"`` a covariance,
            and ``"AutoLaplace"`` climbs to a mode and takes the curvature there. It starts where ``hmc`` starts,
            since a unimodal guide fits one mode of a mixture and no average of them.
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
        ValueError: ``num_steps`` is below 1, the loss is not finite, Pyro refuses the pair of model and guide, or a
            guide given by name does not fit the program.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, not {num_steps}")
    name = guide if isinstance(guide, str) else None
    if name is not None:
        guide, max_plate_nesting = _by_name(model, name, args, seed)
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
        if name == "AutoLaplace":
            guide = _around_the_mode(model, guide, *args)
    fitted = guide if isinstance(guide, PyroModule) else bind(guide, found)
    return Variational(fitted, torch.tensor(losses, dtype=torch.float64))


def _by_name(model: Callable[..., Any], name: str, args: tuple[Any, ...], seed: int) -> tuple[Any, int]:
    """Return an autoguide over the continuous sites that starts at a good place, and how deep the plates are nested."""
    if name not in _GUIDES:
        raise ValueError(f"there is no guide named {name}: give {', '.join(_GUIDES)}, or a Pyro guide")
    posterior = LogPosterior(model, *args)
    if posterior.param_sites:
        raise ValueError(
            f"{name} has no place for the param sites {', '.join(posterior.param_sites)}: give a Pyro guide"
        )
    start = posterior.constrain(initial_points(posterior, NUM_STARTS, seed=seed))
    u = posterior.unconstrain(start)
    evaluation = posterior(u, torch.ones_like(u[:, 0]))
    best = int((evaluation.log_prior + evaluation.log_likelihood).argmax())
    values = {site: value[best] for site, value in start.items()}
    blocked = poutine.block(model, hide=list(posterior.program.latents))
    with default_dtype_of(*args):
        guide = _GUIDES[name](blocked, init_loc_fn=init_to_value(values=values))
    return guide, posterior.program.max_plate_nesting


def _around_the_mode(model: Callable[..., Any], guide: Any, *args: Any) -> Any:
    """Return the normal guide whose covariance is the inverse curvature of the log density where this one ended.

    Pyro's own ``laplace_approximation`` draws the enumerated sites instead of summing them out.
    """
    posterior = LogPosterior(model, *args)
    u = guide.loc.detach()
    with torch.enable_grad():
        curvature = torch.autograd.functional.hessian(lambda u: -posterior.log_density(u), u)
    factor, info = torch.linalg.cholesky_ex(curvature)
    if info != 0:
        raise ValueError("the log density does not curve down where the climb ended: take more steps, or another guide")
    scale_tril = torch.linalg.cholesky(torch.cholesky_inverse(factor))
    normal = AutoMultivariateNormal(guide.model)
    normal._setup_prototype(*args)
    scale = scale_tril.diagonal()
    for name, value in {"loc": u, "scale": scale, "scale_tril": scale_tril / scale[:, None]}.items():
        delattr(normal, name)
        normal.register_buffer(name, value)
    return normal


def guide_draws(model: Callable[..., Any], fitted: Variational, *args: Any, num_draws: int, seed: int) -> Draws:
    """Return independent draws from a fitted guide, as one chain.

    Args:
        model: the program that the guide was fitted to.
        fitted: what ``svi`` found.
        args: the positional arguments of the program.
        num_draws: S, at least 1.
        seed: seeds the draws.

    Returns:
        ``Draws`` with C = 1. Its ``sample_stats`` are ``lp``, log p(data, params), and ``log_q``, the log density of
        the guide over the same parameters: the ratio of both weighs the draws (Yao et al. 2018, ICML).

    Raises:
        ValueError: ``num_draws`` is below 1, or the guide leaves a site of the program out.
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, not {num_draws}")
    posterior = LogPosterior(model, *args)
    names = list(posterior.program.supports)
    values: dict[str, list[Tensor]] = {name: [] for name in names}
    log_q = []
    with pyro.get_param_store().scope(), default_dtype_of(*args), seeded(seed), torch.no_grad():
        for _ in range(num_draws):
            trace: Any = poutine.trace(fitted.guide).get_trace(*args)
            if missing := [name for name in names if name not in trace.nodes]:
                raise ValueError(f"the guide has no site {', '.join(missing)}, which the program has")
            for name in names:
                values[name].append(trace.nodes[name]["value"])
            log_q.append(trace.log_prob_sum())
    params = {name: torch.stack(each) for name, each in values.items()}
    u = posterior.unconstrain(params)
    evaluation = posterior(u, torch.ones_like(u[:, 0]))
    lp = evaluation.log_prior + evaluation.log_likelihood - posterior.log_jacobian(u)
    attributes = {"engine": "svi", "guide": type(fitted.guide).__name__, "seed": seed, "num_draws": num_draws}
    attributes["final_loss"] = float(fitted.losses[-1])
    return Draws(
        {name: value[None] for name, value in params.items()},
        {"lp": lp[None], "log_q": torch.stack(log_q)[None]},
        attributes,
    )
