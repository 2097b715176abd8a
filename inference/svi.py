"""Stochastic variational inference of an enumerated Pyro program, in a parameter store of its own."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from pyro.optim import ClippedAdam, PyroOptim
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.distributions import biject_to

from mixproof.inference.draws import Draws
from mixproof.inference.enumeration import bind, default_dtype_of, trace_of
from mixproof.inference.hmc import initial_points
from mixproof.inference.log_posterior import Evaluation, LogPosterior
from mixproof.inference.random_state import seeded
from mixproof.inference.validation import check_integer, feasible_params

_GUIDES: dict[str, Any] = {
    "AutoNormal": AutoNormal,
    "AutoMultivariateNormal": AutoMultivariateNormal,
    "AutoLaplace": AutoMultivariateNormal,
}
NUM_PARTICLES = 8
INITIAL_SCALE = 0.1
_NAMES = itertools.count()


class Variational(NamedTuple):
    """What SVI found."""

    guide: Any
    """The fitted guide, q(params): an autoguide, whose ``median()`` and ``quantiles()`` read it, or a function bound to
    the values of its param sites."""
    losses: Tensor
    """(num_steps,), the estimate of -ELBO before each step: an upper bound of -log p(data) in expectation. Of
    ``AutoLaplace``, which looks for the mode first, -log p(data, u) there, which bounds nothing: no two guides are to
    be compared by it."""


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
    progress: bool = False,
) -> Variational:
    """Fit a guide to the posterior of a Pyro program with enumerated discrete latents by maximising the ELBO.

    Args:
        model: the program; ``model(*args)`` observes the data. Bind other arguments with ``functools.partial``.
        guide: a Pyro guide that leaves the enumerated sites out, e.g.
            ``AutoDelta(pyro.poutine.block(model, hide=["z"]))``; or the name of one over the unconstrained coordinates
            of every continuous site, which ``normal_approximation`` fits. ``"AutoNormal"`` has independent ones,
            ``"AutoMultivariateNormal"`` a covariance, and ``"AutoLaplace"`` climbs to a mode and takes the curvature
            there. It starts where ``hmc`` starts, since a unimodal guide fits one mode of a mixture and no average.
        args: the positional arguments of the program.
        num_steps: the number of gradient steps.
        seed: seeds Pyro's random draws for the run; the states of the global generators are put back afterwards.
        max_plate_nesting: the largest number of plates inside one another in the program.
        learning_rate: the step of Adam at the start, in unconstrained coordinates.
        final_learning_rate: the step at the end; it decays geometrically in between.
        optimiser: takes the place of Adam and both rates. The ELBO of a delta guide has no noise, and resilient
            backpropagation, ``PyroOptim(torch.optim.Rprop, {"lr": 0.01})``, climbs it to rounding in a few hundred
            steps.
        progress: whether to show the steps on stderr.

    Raises:
        TypeError: ``num_steps`` is not an integer.
        ValueError: ``num_steps`` is below 1, a rate is not positive, the loss is not finite, Pyro refuses the pair of
            model and guide, a Pyro module as guide has been run before, or a guide given by name does not fit the
            program or comes with an optimiser.
    """
    _check_steps(num_steps, learning_rate, final_learning_rate)
    if isinstance(guide, str):
        if optimiser is not None:
            raise ValueError(f"{guide} is fitted by Adam, and takes no optimiser: give a Pyro guide to choose one")
        law = normal_approximation(
            model,
            guide,
            *args,
            num_steps=num_steps,
            seed=seed,
            learning_rate=learning_rate,
            final_learning_rate=final_learning_rate,
            progress=progress,
        )
        return Variational(_guide(model, guide, law, *args), law.losses[:, 0])
    with feasible_params(*args):
        trace_of(model, *args)  # says in words what the loss could not
    decay = (final_learning_rate / learning_rate) ** (1 / num_steps)
    losses = []
    with pyro.get_param_store().scope(), default_dtype_of(*args):
        if isinstance(guide, PyroModule):
            if guide._pyro_context.used:
                raise ValueError(
                    f"the {type(guide).__name__} has been run before: it would start from what it learned, and change "
                    "that; give a new one"
                )
            # Outside this store a guide reads the global one by name, and would find what another of its class left.
            guide._pyro_set_supermodule(f"svi_{next(_NAMES)}_{type(guide).__name__}", guide._pyro_context)
        with seeded(seed), torch.no_grad():
            guide(*args)
        for _, parameter in pyro.get_param_store().named_parameters():
            parameter.data = parameter.data.clone()  # Pyro would update the tensors that a guide starts from, in place
        adam = ClippedAdam({"lr": learning_rate, "lrd": decay, "clip_norm": float("inf")})
        inference = SVI(model, guide, optimiser or adam, TraceEnum_ELBO(max_plate_nesting=max_plate_nesting))
        with seeded(seed):
            for step in _steps(num_steps, progress):
                losses.append(inference.step(*args))
                if not math.isfinite(losses[-1]):
                    raise ValueError(
                        f"the loss is {losses[-1]} at step {step}: lower the learning rate, or start nearer"
                    )
        found = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    fitted = guide if isinstance(guide, PyroModule) else bind(guide, found)
    return Variational(fitted, torch.tensor(losses, dtype=torch.float64))


def _check_steps(num_steps: int, learning_rate: float, final_learning_rate: float) -> None:
    check_integer(num_steps, "num_steps", 1)
    for name, rate in {"learning_rate": learning_rate, "final_learning_rate": final_learning_rate}.items():
        if not 0 < rate < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {rate}")


def _steps(num_steps: int, progress: bool) -> Iterable[int]:
    return track(range(num_steps), "SVI", console=Console(stderr=True), disable=not progress)


class NormalApproximation(NamedTuple):
    """Normal laws over the unconstrained coordinates of a program, one for each of C data sets."""

    posterior: LogPosterior
    """Whose coordinates they are."""
    loc: Tensor
    """(C, P), the means."""
    scale_tril: Tensor
    """(C, P, P), lower triangular with a positive diagonal: the covariances are scale_tril scale_tril'."""
    losses: Tensor
    """(num_steps, C), an estimate of -ELBO before each step; for ``AutoLaplace``, -log p(data, u)."""

    def draws(self, num_draws: int, *, seed: int) -> Draws:
        """Return independent draws, those from each law as one chain: params (C, S, *shape) by site."""
        generator = torch.Generator(self.loc.device).manual_seed(seed)
        size = (len(self.loc), num_draws, self.loc.shape[1])
        noise = torch.randn(size, generator=generator, dtype=self.loc.dtype, device=self.loc.device)
        u = self.loc[:, None] + noise @ self.scale_tril.mT
        attributes = {"engine": "svi", "seed": seed, "num_draws": num_draws}
        return Draws(self.posterior.constrain(u), {}, attributes)


def normal_approximation(
    model: Callable[..., Any],
    name: str,
    *args: Any,
    num_steps: int,
    seed: int,
    learning_rate: float = 0.1,
    final_learning_rate: float = 1e-4,
    batched: bool = False,
    progress: bool = False,
) -> NormalApproximation:
    """Fit a normal law to a posterior over unconstrained coordinates, or to those of many data sets at once.

    The ELBO is estimated from ``NUM_PARTICLES`` points of the captured log density, and climbed by Adam along its
    derivative by the law's parameters through the points (Kucukelbir et al. 2017, Journal of Machine Learning Research
    18(14), section 2). The coordinates are those of Pyro's guides of the same names, by ``biject_to``. Each law starts
    at the highest of as many places from which ``hmc`` would start.

    Args:
        model: the program; ``model(*args)`` observes the data. Bind other arguments with ``functools.partial``.
        name: as in ``svi``.
        args: the positional arguments of the program.
        num_steps: the number of gradient steps, at least 1.
        seed: seeds every random number.
        learning_rate: the step of Adam at the start, in unconstrained coordinates.
        final_learning_rate: the step at the end; it decays geometrically in between.
        batched: whether the arguments are tensors (C, ...) that hold C data sets; without, C = 1.
        progress: whether to show the steps on stderr.

    Raises:
        ValueError: there is no guide of this name, the program has param sites or is not one that ``LogPosterior``
            takes, a loss is not finite, or the log density does not curve down where ``AutoLaplace`` ended.
    """
    if name not in _GUIDES:
        raise ValueError(f"there is no guide named {name}: give {', '.join(_GUIDES)}, or a Pyro guide")
    _check_steps(num_steps, learning_rate, final_learning_rate)
    posterior = at_particles = LogPosterior(model, *args, batched=batched, onto=biject_to)
    if posterior.param_sites:
        raise ValueError(
            f"{name} has no place for the param sites {', '.join(posterior.param_sites)}: give a Pyro guide"
        )
    if batched:
        data = (values.repeat_interleave(NUM_PARTICLES, 0) for values in args)
        at_particles = LogPosterior(model, *data, batched=True, onto=biject_to)
    num_laws = len(args[0]) if batched else 1
    starts = initial_points(at_particles, num_laws * NUM_PARTICLES, seed=seed).unflatten(0, (num_laws, -1))
    one = starts.new_ones(num_laws * NUM_PARTICLES)
    best = _mean_height(at_particles(starts.flatten(0, 1), one), (num_laws, NUM_PARTICLES, 1)).argmax(1)
    loc = starts[torch.arange(num_laws), best].requires_grad_()
    log_scale = torch.full_like(loc, math.log(INITIAL_SCALE)).requires_grad_()
    below = torch.zeros(*loc.shape, loc.shape[1]).to(loc).requires_grad_()
    free = {"AutoNormal": [loc, log_scale], "AutoMultivariateNormal": [loc, log_scale, below], "AutoLaplace": [loc]}

    def factor() -> Tensor:
        return log_scale.exp()[..., None] * (below.tril(-1) + torch.eye(loc.shape[1]).to(loc))

    adam = torch.optim.Adam(free[name], lr=learning_rate)
    decay = torch.optim.lr_scheduler.ExponentialLR(adam, (final_learning_rate / learning_rate) ** (1 / num_steps))
    generator = torch.Generator(loc.device).manual_seed(seed)
    losses = []
    for step in _steps(num_steps, progress):
        if name == "AutoLaplace":
            u, entropy, density = loc[:, None], torch.zeros_like(loc[:, 0]), posterior
        else:
            shape = (num_laws, NUM_PARTICLES, loc.shape[1])
            noise = torch.randn(shape, generator=generator, dtype=loc.dtype, device=loc.device)
            u, density = loc[:, None] + noise @ factor().mT, at_particles
            entropy = (log_scale + (1 + math.log(2 * math.pi)) / 2).sum(1)
        flat = u.flatten(0, 1)
        evaluation = density(flat.detach(), one[: len(flat)])
        losses.append(-_mean_height(evaluation, u.shape[:2]) - entropy.detach())
        if not torch.isfinite(losses[-1]).all():
            raise ValueError(f"the loss is not finite at step {step}: lower the learning rate")
        adam.zero_grad()
        # the slope at each point is known: as a constant, it makes the derivative by the law's parameters
        (-(evaluation.gradient * flat).sum() / u.shape[1] - entropy.sum()).backward()
        adam.step()
        decay.step()
    loc = loc.detach()
    scale_tril = _inverse_factor(-posterior.hessian(loc)) if name == "AutoLaplace" else factor().detach()
    return NormalApproximation(posterior, loc, scale_tril, torch.stack(losses))


def _mean_height(evaluation: Evaluation, sizes: Sequence[int]) -> Tensor:
    """Return the log posterior over the coordinates, spread to the sizes, averaged over the last of them."""
    return (evaluation.log_prior + evaluation.log_likelihood).reshape(sizes).mean(-1)


def _inverse_factor(curvature: Tensor) -> Tensor:
    """Return lower triangular L (C, P, P) with L L' the inverse of the curvature (C, P, P)."""
    factor, info = torch.linalg.cholesky_ex(curvature)
    if info.any():
        raise ValueError("the log density does not curve down where the climb ended: take more steps, or another guide")
    return torch.linalg.cholesky(torch.cholesky_inverse(factor))


def _guide(model: Callable[..., Any], name: str, law: NormalApproximation, *args: Any) -> Any:
    """Return Pyro's guide of a name with the parameters of a law."""
    posterior, loc, scale_tril = law.posterior, law.loc[0], law.scale_tril[0]
    guide = _GUIDES[name](poutine.block(model, hide=list(posterior.program.latents)))
    with pyro.get_param_store().scope(), default_dtype_of(*args), feasible_params(*args), seeded(0):
        guide._setup_prototype(*args)
    scale = scale_tril.diagonal()
    if name == "AutoNormal":
        sizes = [shape.numel() for shape in posterior.coordinates.shapes.values()]
        parts = zip(posterior.coordinates.shapes.items(), loc.split(sizes), scale.split(sizes), strict=True)
        known = [
            (f"{kind}.{site}", value.reshape(shape))
            for (site, shape), *values in parts
            for kind, value in zip(("locs", "scales"), values, strict=True)
        ]
    else:
        known = [("loc", loc), ("scale", scale), ("scale_tril", scale_tril / scale[:, None])]
    for path, value in known:
        *owners, attribute = path.split(".")
        owner = functools.reduce(getattr, owners, guide)
        delattr(owner, attribute)
        owner.register_buffer(attribute, value)
    return guide


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
    check_integer(num_draws, "num_draws", 1)
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
