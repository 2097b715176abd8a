"""Pyro's own No-U-Turn sampler on an enumerated program: slow, and a second opinion on everything faster."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.mcmc.util import initialize_model
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mixproof.inference import checkpoint as checkpoints
from mixproof.inference.draws import Draws
from mixproof.inference.enumeration import default_dtype_of
from mixproof.inference.hmc import check_program, coordinates_of, initial_points, warn_of_improper_prior
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.random_state import generator_states, seeded, set_generators
from mixproof.inference.validation import check_integer, check_probability


def nuts(
    model: Callable[..., Any],
    *args: Any,
    num_chains: int = 2,
    num_draws: int,
    num_warmup: int = 300,
    seed: int,
    init: Mapping[str, Tensor] | None = None,
    batched: bool = False,
    target_acceptance: float = 0.8,
    max_tree_depth: int = 10,
    jit_compile: bool = False,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> Draws:
    """Draw from p(params | data) of a Pyro program with enumerated latents by ``pyro.infer.NUTS``, chain after chain.

    The density, its enumeration and its changes of variables are Pyro's; only the starts and the Jacobian of ``lp`` are
    computed here.

    Args:
        model: the program; ``model(*args)`` observes the data. Bind other arguments with ``functools.partial``.
        args: the positional arguments of the program.
        num_chains: C, at least 1.
        num_draws: S, the draws kept of each chain, at least 1.
        num_warmup: the draws before those, in which Pyro adapts the step size and a diagonal metric, at least 1.
        seed: seeds every random number.
        init: (C, *shape) by site, where the chains start, inside the supports; None starts them where ``hmc`` does.
        batched: whether the arguments are tensors (C, ...) that hold C data sets, of which each chain has its own.
        target_acceptance: the mean acceptance probability to adapt the step size to, between 0 and 1.
        max_tree_depth: a trajectory has at most 2^max_tree_depth steps; at least 1.
        jit_compile: whether Pyro's density and its slope are run by ``torch.compile``: half a minute once for all
            chains, and then a small part of the time that they take without. Needs a C++ compiler.
        checkpoint: a file for the chains that are whole. If it exists, the run goes on with the next one, to the same
            draws. Other data and settings are told, and another program by the log posterior where the chains ended.
        progress: whether Pyro shows its progress bar.

    Returns:
        ``Draws``. Its ``sample_stats`` are ``lp``, ``acceptance_rate`` (the mean over the trajectory's tree),
        ``diverging`` and ``step_size``. On Ctrl-C, with a warning, the chains that are whole, or the draws so far of
        the first; chains with data sets of their own are wanted all, and the interrupt goes on.

    Raises:
        TypeError: a setting is not an integer, or there is a checkpoint, and an argument of the program holds something
            else than numbers and strings.
        ValueError: a setting is out of range, the program is not one that ``LogPosterior`` takes, it has param sites,
            a prior is improper and there is no ``init``, there are more or fewer data sets than chains, the program
            is to be compiled and branches on the values of its parameters, or the checkpoint belongs to another run.
        OSError: the checkpoint cannot be read or written, which is tried first.
        RuntimeError: ``torch.compile`` fails, as where there is no compiler.
    """
    sizes = {"num_chains": num_chains, "num_draws": num_draws, "num_warmup": num_warmup}
    for name, value in {**sizes, "max_tree_depth": max_tree_depth}.items():
        check_integer(value, name, 1)
    check_probability(target_acceptance, "target_acceptance")
    posterior = LogPosterior(model, *args, batched=batched)
    if posterior.param_sites:
        raise ValueError(f"Pyro's NUTS takes the param sites {', '.join(posterior.param_sites)} as fixed: use hmc")
    if batched and len(posterior.batch[0]) != num_chains:
        raise ValueError(f"there are {len(posterior.batch[0])} data sets, and {num_chains} chains: one each")
    if init is not None:
        warn_of_improper_prior(posterior)
    starts = posterior.constrain(
        initial_points(posterior, num_chains, seed=seed)
        if init is None
        else coordinates_of(posterior, init, num_chains)
    )
    file = None if checkpoint is None else Path(checkpoint)
    identity = {
        "engine": "pyro nuts",
        "data": None if file is None else checkpoints.digest(args),
        "batched": batched,
        "init": checkpoints.digest(init),
        "sites": {name: value.shape[1:] for name, value in starts.items()},
        **sizes,
        "seed": seed,
        "target_acceptance": target_acceptance,
        "max_tree_depth": max_tree_depth,
        "jit_compile": jit_compile,
    }
    known = None if file is None else checkpoints.load(file, identity)
    if file is not None and known is None:
        checkpoints.save(file, identity, {})  # a disk that takes no file is found before the first chain, not after
    chains: list[dict[str, Tensor]] = []
    stats: list[Tensor] = []
    graph, interrupted = None, False
    with pyro.get_param_store().scope(), default_dtype_of(*args), seeded(seed):
        if known:
            chains, stats = _restored(posterior, known, starts)
        for chain in range(len(chains), num_chains):
            start = {name: value[chain] for name, value in starts.items()}
            data = tuple(values[chain] for values in posterior.batch)
            sites, potential, transforms = _set_up(posterior, start, data)
            point = sites
            if jit_compile:
                graph = _compiled(posterior, start, data, sites) if graph is None else graph
                potential, point = partial(_energy, graph, data), {FLAT: _flat(sites)}
            kernel = NUTS(potential_fn=potential, target_accept_prob=target_acceptance, max_tree_depth=max_tree_depth)
            record: list[tuple[float, int, float, float]] = []
            points: list[dict[str, Tensor]] = []
            sampler = MCMC(
                kernel,
                num_samples=num_draws,
                warmup_steps=num_warmup,
                initial_params=point,
                hook_fn=_recorder(record, points),
                disable_progbar=not progress,
            )
            try:
                sampler.run()
            except KeyboardInterrupt:
                if batched or not (chains or points):
                    raise
                kept = f"{chain} of {num_chains} chains" if chains else f"{len(points)} of {num_draws} draws of a chain"
                warnings.warn(f"stopped after {kept}", ConvergenceWarning, stacklevel=2)
                if chains:
                    break
                interrupted, num_draws = True, len(points)
            found = {name: torch.stack([each[name] for each in points]) for name in points[0]}
            found = _by_site(sites, found[FLAT]) if jit_compile else found
            chains.append({name: transforms[name].inv(value) for name, value in found.items()})
            means, counts, *others = torch.tensor(record[:num_draws], dtype=torch.float64).unbind(1)
            sums, none = means * torch.arange(1, num_draws + 1), means.new_zeros(1)
            stats.append(torch.stack([sums.diff(prepend=none), counts.diff(prepend=none), *others]))
            if interrupted:
                break
            if file is not None:
                checkpoints.save(file, identity, _tensors(posterior, chains, stats))
    params = {name: torch.stack([chain[name] for chain in chains]) for name in starts}
    acceptance_rate, diverging, step_size, energy = torch.stack(stats, 1).to(posterior.device)
    u = posterior.unconstrain({name: value.flatten(0, 1) for name, value in params.items()})
    sample_stats = {
        "lp": -energy - posterior.log_jacobian(u).reshape(energy.shape),
        "acceptance_rate": acceptance_rate,
        "diverging": diverging.bool(),
        "step_size": step_size,
    }
    attributes = {
        "engine": "pyro nuts",
        "seed": seed,
        "num_warmup": num_warmup,
        "num_draws": num_draws,
        "num_chains": len(chains),
        "num_divergences": int(diverging.sum()),
    }
    return Draws(params, sample_stats, attributes)


def _tensors(
    posterior: LogPosterior, chains: Sequence[dict[str, Tensor]], stats: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return all that the next chain needs to be what it would have been."""
    found = {f"params.{name}": torch.stack([chain[name] for chain in chains]) for name in chains[0]}
    return {**found, "stats": torch.stack(list(stats)), **generator_states(posterior.device)}


def _restored(
    posterior: LogPosterior, tensors: Mapping[str, Tensor], starts: Mapping[str, Tensor]
) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Return chains by site and what is known of them, and set the generators to where these left them."""
    params = {name: tensors[f"params.{name}"].to(value) for name, value in starts.items()}
    stats = tensors["stats"]
    energy = stats[:, -1, -1].to(posterior.device)
    last = {name: torch.cat([params[name][:, -1], value[len(stats) :]]) for name, value in starts.items()}
    u = posterior.unconstrain(last)
    evaluation = posterior(u, torch.ones_like(u[:, 0]))
    height = evaluation.log_prior + evaluation.log_likelihood
    check_program(height[: len(stats)], -energy, next(iter(starts.values())).dtype)
    set_generators(tensors, posterior.device)
    return [{name: value[chain] for name, value in params.items()} for chain in range(len(stats))], list(stats)


def _set_up(
    posterior: LogPosterior, start: Mapping[str, Tensor], data: Sequence[Tensor], **settings: Any
) -> tuple[dict[str, Tensor], Callable[..., Any], dict[str, Any]]:
    """Return Pyro's coordinates of a start by site, its energy at such coordinates and its changes of variables."""
    sites, potential, transforms, _ = initialize_model(
        posterior.model,
        tuple(data) or posterior.args,
        max_plate_nesting=posterior.program.max_plate_nesting,
        init_strategy=init_to_value(values=dict(start)),
        **settings,
    )
    return sites, potential, transforms


FLAT = "u"
"""The one site of the sampler on a compiled density: it takes a step sooner there than in each of several."""


def _flat(sites: Mapping[str, Tensor]) -> Tensor:
    """Return coordinates (P,) in the order in which Pyro draws momenta, that of the names."""
    return torch.cat([sites[name].reshape(-1) for name in sorted(sites)])


def _by_site(sites: Mapping[str, Tensor], u: Tensor) -> dict[str, Tensor]:
    """Return the parts (..., *shape) of coordinates (..., P), of the shapes of the given ones."""
    names = sorted(sites)
    parts = u.split([sites[name].numel() for name in names], -1)
    return {name: part.reshape((*u.shape[:-1], *sites[name].shape)) for name, part in zip(names, parts, strict=True)}


def _compiled(
    posterior: LogPosterior, start: Mapping[str, Tensor], data: Sequence[Tensor], sites: dict[str, Tensor]
) -> Callable[..., Any]:
    """Return a function of data and coordinates (P,), shaped as these, whose results are Pyro's energy and slope."""

    def energy_and_slope(*tensors: Tensor) -> tuple[Tensor, ...]:
        *data, u = tensors
        _, potential, _ = _set_up(posterior, start, data, initial_params=sites)
        with torch.enable_grad():
            at = u.detach().requires_grad_()
            energy = potential(_by_site(sites, at))
            return energy.detach(), *torch.autograd.grad(energy, at)

    examples = (*data, _flat(sites))
    with pyro.validation_enabled(False), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        try:
            graph = make_fx(energy_and_slope)(*examples)
        except RuntimeError as error:
            raise ValueError(
                "the program depends on its parameters in a way that cannot be compiled, by .item() or an if: leave "
                "jit_compile out, or write it with torch.where"
            ) from error
        graph.graph.eliminate_dead_code()
        graph.recompile()
        found = torch.compile(graph, dynamic=False)
        try:
            found(*examples)
        except RuntimeError as error:
            raise RuntimeError(
                f"torch.compile failed ({str(error).splitlines()[0]}): install a C++ compiler, or leave jit_compile out"
            ) from error
    return found


class _Energy(torch.autograd.Function):
    """The energy of a graph that also gives its slope, as a function that autograd can take the slope of."""

    @staticmethod
    def forward(ctx: Any, graph: Callable[..., Any], data: Sequence[Tensor], u: Tensor) -> Tensor:
        energy, slope = graph(*data, u.detach())  # compiled for inputs that ask for no slope
        ctx.save_for_backward(slope)
        return energy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return None, None, grad_outputs[0] * slope


def _energy(graph: Callable[..., Any], data: Sequence[Tensor], point: Mapping[str, Tensor]) -> Tensor:
    return _Energy.apply(graph, data, point[FLAT])


def _recorder(record: list[tuple[float, int, float, float]], points: list[dict[str, Tensor]]) -> Callable[..., None]:
    """Return a hook that keeps each draw, and what Pyro's kernel knows after it.

    The latter is the mean acceptance probability and the number of divergences of the draws since the warm-up, from
    which each one's follow, the step size, and minus the log density over the unconstrained coordinates.
    """

    def hook(kernel: Any, params: Any, stage: str, number: int) -> None:
        if stage.startswith("Sample"):
            energy = float(kernel._potential_energy_last)
            record.append((kernel._mean_accept_prob, len(kernel._divergences), float(kernel.step_size), energy))
            points.append({name: value.detach().clone() for name, value in params.items()})

    return hook
