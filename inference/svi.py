"""Stochastic variational inference of an enumerated Pyro program, in a parameter store of its own."""

from __future__ import annotations

import functools
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.nn import PyroModule
from pyro.optim import ClippedAdam, PyroOptim
from torch import Tensor
from torch.distributions import biject_to

from mixproof.inference import checkpoint as checkpoints
from mixproof.inference.draws import Draws
from mixproof.inference.enumeration import bind, default_dtype_of, trace_of
from mixproof.inference.hmc import initial_points
from mixproof.inference.log_posterior import Evaluation, LogPosterior
from mixproof.inference.random_state import generator_states, seeded, set_generators
from mixproof.inference.steps import take_steps
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
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
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
        checkpoint: a file for the state of the run. If it exists, the run goes on from there to the same result, with a
            guide as it was before the run. Other data and settings are told, and another program by its loss. Of the
            generators, torch's are kept.
        checkpoint_every: after how many steps to write it, at least 1; the first one writes it too.
        progress: whether to show the steps on stderr.

    Raises:
        TypeError: a number of steps is not an integer, or there is a checkpoint, and an argument of the program holds
            something else than numbers and strings.
        ValueError: a number of steps is below 1, a rate is not positive, the loss is not finite, Pyro refuses the pair
            of model and guide, a Pyro module as guide has been run before, a guide given by name does not fit the
            program or comes with an optimiser, or the checkpoint belongs to another run.
        OSError: the checkpoint cannot be read or written, which is tried after the first step.
    """
    _check_steps(num_steps, learning_rate, final_learning_rate, checkpoint_every)
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
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            progress=progress,
        )
        return Variational(_guide(model, guide, law, *args), law.losses[:, 0])
    with feasible_params(*args):
        trace_of(model, *args)  # says in words what the loss could not
    decay = (final_learning_rate / learning_rate) ** (1 / num_steps)
    file = None if checkpoint is None else Path(checkpoint)
    store = pyro.get_param_store()
    with store.scope(), default_dtype_of(*args):
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
        with seeded(seed), feasible_params(*args):
            model(*args)  # makes the param sites of its own
        for _, parameter in store.named_parameters():
            parameter.data = parameter.data.clone()  # Pyro would update the tensors that a guide starts from, in place
        optimiser = optimiser or ClippedAdam({"lr": learning_rate, "lrd": decay, "clip_norm": float("inf")})
        identity = {
            "engine": "svi",
            "data": None if file is None else checkpoints.digest(args),
            "guide": None if file is None else checkpoints.digest([value for _, value in store.named_parameters()]),
            "num_steps": num_steps,
            "seed": seed,
            "max_plate_nesting": max_plate_nesting,
            "optimiser": [
                getattr(part, "__qualname__", str(part))  # where a function lies differs from process to process
                for part in (optimiser.pt_optim_constructor, optimiser.pt_optim_args)
            ],
        }
        inference = SVI(model, guide, optimiser, TraceEnum_ELBO(max_plate_nesting=max_plate_nesting))
        with seeded(seed):
            losses = take_steps(
                _Ascent(inference, args),
                num_steps,
                file=file,
                identity=identity,
                every=checkpoint_every,
                progress="SVI" if progress else None,
            )
        found = {name: value.detach().clone() for name, value in store.items()}
    fitted = guide if isinstance(guide, PyroModule) else bind(guide, found)
    return Variational(fitted, losses.double())


def _check_steps(num_steps: int, learning_rate: float, final_learning_rate: float, checkpoint_every: int) -> None:
    check_integer(num_steps, "num_steps", 1)
    check_integer(checkpoint_every, "checkpoint_every", 1)
    for name, rate in {"learning_rate": learning_rate, "final_learning_rate": final_learning_rate}.items():
        if not 0 < rate < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {rate}")


class _Ascent:
    """The steps of Pyro's SVI on the parameters of the store."""

    def __init__(self, inference: SVI, args: Sequence[Any]):
        self._inference, self._args = inference, args
        tensors = (value for value in args if isinstance(value, Tensor))
        self._device = next((value.device for value in tensors), torch.device("cpu"))
        self._params: dict[str, Any] = dict(pyro.get_param_store().named_parameters())

    def step(self, number: int) -> Tensor:
        loss = self._inference.step(*self._args)
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {number}: lower the learning rate, or start nearer")
        return torch.tensor(loss)

    def state(self) -> dict[str, Tensor]:
        known = self._inference.optim.get_state()
        optimiser = [known.get(name) for name in self._params]
        params = {f"params.{number}": value.detach() for number, value in enumerate(self._params.values())}
        return params | {"optimiser": _as_bytes(optimiser)} | generator_states(self._device)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        optimiser = _from_bytes(state["optimiser"])
        self._inference.optim.set_state(
            {name: one for name, one in zip(self._params, optimiser, strict=True) if one is not None}
        )
        for number, value in enumerate(self._params.values()):
            value.data = state[f"params.{number}"].to(value)
        set_generators(state, self._device)


def _as_bytes(state: Any) -> Tensor:
    """Return the state of an optimiser as (n,) bytes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _from_bytes(values: Tensor) -> Any:
    return torch.load(io.BytesIO(values.numpy().tobytes()), weights_only=True)


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
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
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
        checkpoint: as in ``svi``.
        checkpoint_every: as in ``svi``.
        progress: whether to show the steps on stderr.

    Raises:
        TypeError, OSError: as in ``svi``.
        ValueError: there is no guide of this name, the program has param sites or is not one that ``LogPosterior``
            takes, a loss is not finite, the log density does not curve down where ``AutoLaplace`` ended, or the
            checkpoint belongs to another run.
    """
    if name not in _GUIDES:
        raise ValueError(f"there is no guide named {name}: give {', '.join(_GUIDES)}, or a Pyro guide")
    _check_steps(num_steps, learning_rate, final_learning_rate, checkpoint_every)
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
    decay = (final_learning_rate / learning_rate) ** (1 / num_steps)
    climb = _Climb(name, posterior, at_particles, starts, seed=seed, learning_rate=learning_rate, decay=decay)
    file = None if checkpoint is None else Path(checkpoint)
    identity = {
        "engine": f"svi, {name}",
        "data": None if file is None else checkpoints.digest(args),
        "batched": batched,
        "sites": {site: list(shape) for site, shape in posterior.coordinates.shapes.items()},
        "num_steps": num_steps,
        "seed": seed,
        "learning_rate": learning_rate,
        "final_learning_rate": final_learning_rate,
    }
    losses = take_steps(
        climb,
        num_steps,
        file=file,
        identity=identity,
        every=checkpoint_every,
        progress="SVI" if progress else None,
    )
    loc = climb.loc.detach()
    scale_tril = _inverse_factor(-posterior.hessian(loc)) if name == "AutoLaplace" else climb.factor().detach()
    return NormalApproximation(posterior, loc, scale_tril, losses)


class _Climb:
    """Adam's steps on the parameters of normal laws, each from the highest of its starts (C, NUM_PARTICLES, P)."""

    def __init__(
        self,
        name: str,
        posterior: LogPosterior,
        at_particles: LogPosterior,
        starts: Tensor,
        *,
        seed: int,
        learning_rate: float,
        decay: float,
    ):
        num_laws = len(starts)
        self._posterior, self._at_particles, self._at_mode = posterior, at_particles, name == "AutoLaplace"
        self._one = starts.new_ones(num_laws * NUM_PARTICLES)
        heights = _mean_height(at_particles(starts.flatten(0, 1), self._one), (num_laws, NUM_PARTICLES, 1))
        self.loc = starts[torch.arange(num_laws), heights.argmax(1)].requires_grad_()
        self._log_scale = torch.full_like(self.loc, math.log(INITIAL_SCALE)).requires_grad_()
        self._below = torch.zeros(*self.loc.shape, self.loc.shape[1]).to(self.loc).requires_grad_()
        every = {"loc": self.loc, "log_scale": self._log_scale, "below": self._below}
        used = {"AutoNormal": ("loc", "log_scale"), "AutoMultivariateNormal": tuple(every), "AutoLaplace": ("loc",)}
        self._free = {part: every[part] for part in used[name]}
        self._adam = torch.optim.Adam(self._free.values(), lr=learning_rate)
        self._decay = torch.optim.lr_scheduler.ExponentialLR(self._adam, decay)
        self._generator = torch.Generator(self.loc.device).manual_seed(seed)

    def factor(self) -> Tensor:
        """Return the lower triangular factors of the covariances, (C, P, P)."""
        unit = self._below.tril(-1) + torch.eye(self.loc.shape[1]).to(self.loc)
        return self._log_scale.exp()[..., None] * unit

    def step(self, number: int) -> Tensor:
        if self._at_mode:
            u, entropy, density = self.loc[:, None], torch.zeros_like(self.loc[:, 0]), self._posterior
        else:
            shape = (len(self.loc), NUM_PARTICLES, self.loc.shape[1])
            noise = torch.randn(shape, generator=self._generator, dtype=self.loc.dtype, device=self.loc.device)
            u, density = self.loc[:, None] + noise @ self.factor().mT, self._at_particles
            entropy = (self._log_scale + (1 + math.log(2 * math.pi)) / 2).sum(1)
        flat = u.flatten(0, 1)
        evaluation = density(flat.detach(), self._one[: len(flat)])
        losses = -_mean_height(evaluation, u.shape[:2]) - entropy.detach()
        if not torch.isfinite(losses).all():
            raise ValueError(f"the loss is not finite at step {number}: lower the learning rate")
        self._adam.zero_grad()
        # the slope at each point is known: as a constant, it makes the derivative by the law's parameters
        (-(evaluation.gradient * flat).sum() / u.shape[1] - entropy.sum()).backward()
        self._adam.step()
        self._decay.step()
        return losses

    def state(self) -> dict[str, Tensor]:
        found = {part: value.detach() for part, value in self._free.items()}
        found["optimiser"] = _as_bytes([self._adam.state_dict(), self._decay.state_dict()])
        return found | {"generator": self._generator.get_state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for part, value in self._free.items():
            value.data = state[part].to(value)
        adam, decay = _from_bytes(state["optimiser"])
        self._adam.load_state_dict(adam)
        self._decay.load_state_dict(decay)
        self._generator.set_state(state["generator"])


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
