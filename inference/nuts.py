"""Pyro's own No-U-Turn sampler on an enumerated program: slow, and a second opinion on everything faster."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from mixproof.inference.draws import Draws
from mixproof.inference.enumeration import default_dtype_of
from mixproof.inference.hmc import coordinates_of, initial_points
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.random_state import seeded
from mixproof.inference.validation import check_integer, check_probability


def nuts(
    model: Callable[..., Any],
    *args: Any,
    num_chains: int = 2,
    num_draws: int,
    num_warmup: int = 300,
    seed: int,
    init: Mapping[str, Tensor] | None = None,
    target_acceptance: float = 0.8,
    max_tree_depth: int = 10,
    jit_compile: bool = False,
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
        target_acceptance: the mean acceptance probability to adapt the step size to, between 0 and 1.
        max_tree_depth: a trajectory has at most 2^max_tree_depth steps; at least 1.
        jit_compile: whether Pyro runs the density from a trace of it, which is wrong for a program that branches on the
            values of its parameters, and faster for others once a second or so has gone into it.
        progress: whether Pyro shows its progress bar.

    Returns:
        ``Draws``. Its ``sample_stats`` are ``lp``, ``acceptance_rate`` (the mean over the trajectory's tree),
        ``diverging`` and ``step_size``.

    Raises:
        TypeError: a setting is not an integer.
        ValueError: a setting is out of range, the program is not one that ``LogPosterior`` takes, it has param sites,
            or a prior is improper and there is no ``init``.
    """
    sizes = {"num_chains": num_chains, "num_draws": num_draws, "num_warmup": num_warmup}
    for name, value in {**sizes, "max_tree_depth": max_tree_depth}.items():
        check_integer(value, name, 1)
    check_probability(target_acceptance, "target_acceptance")
    posterior = LogPosterior(model, *args)
    if posterior.param_sites:
        raise ValueError(f"Pyro's NUTS takes the param sites {', '.join(posterior.param_sites)} as fixed: use hmc")
    starts = posterior.constrain(
        initial_points(posterior, num_chains, seed=seed)
        if init is None
        else coordinates_of(posterior, init, num_chains)
    )
    chains: list[dict[str, Tensor]] = []
    stats: list[Tensor] = []
    with pyro.get_param_store().scope(), default_dtype_of(*args), seeded(seed), _own_traces():
        for chain in range(num_chains):
            kernel = NUTS(
                model,
                max_plate_nesting=posterior.program.max_plate_nesting,
                init_strategy=init_to_value(values={name: value[chain] for name, value in starts.items()}),
                target_accept_prob=target_acceptance,
                max_tree_depth=max_tree_depth,
                jit_compile=jit_compile,
                ignore_jit_warnings=True,
            )
            record: list[tuple[float, int, float, float]] = []
            sampler = MCMC(
                kernel,
                num_samples=num_draws,
                warmup_steps=num_warmup,
                hook_fn=_recorder(record),
                disable_progbar=not progress,
            )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="`torch.jit.trace", category=DeprecationWarning)
                sampler.run(*args)
            chains.append({name: value.detach() for name, value in sampler.get_samples().items() if name in starts})
            means, counts, *others = torch.tensor(record, dtype=torch.float64).unbind(1)
            sums, none = means * torch.arange(1, num_draws + 1), means.new_zeros(1)
            stats.append(torch.stack([sums.diff(prepend=none), counts.diff(prepend=none), *others]))
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
        "num_chains": num_chains,
        "num_divergences": int(diverging.sum()),
    }
    return Draws(params, sample_stats, attributes)


@contextmanager
def _own_traces() -> Iterator[None]:
    """Let the traces of the jit go with what holds them: torch's own unit keeps every one, 10 MB and more, for good."""
    state: Any = torch.jit._state
    before, state._python_cu = state._python_cu, torch.jit.CompilationUnit()
    try:
        yield
    finally:
        state._python_cu = before


def _recorder(record: list[tuple[float, int, float, float]]) -> Callable[..., None]:
    """Return a hook that keeps what Pyro's kernel knows after each draw.

    That is the mean acceptance probability and the number of divergences of the draws since the warm-up, from which
    each one's follow, the step size, and minus the log density over the unconstrained coordinates.
    """

    def hook(kernel: Any, params: Any, stage: str, number: int) -> None:
        if stage.startswith("Sample"):
            energy = float(kernel._potential_energy_last)
            record.append((kernel._mean_accept_prob, len(kernel._divergences), float(kernel.step_size), energy))

    return hook
