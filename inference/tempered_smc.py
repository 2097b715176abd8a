"""Sequential Monte Carlo from the prior of a program to its posterior, through powers of the likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from mixproof.inference import checkpoint as checkpoints
from mixproof.inference.hmc import TARGET_ACCEPTANCE, State, hmc_step
from mixproof.inference.log_posterior import Evaluation, LogPosterior
from mixproof.inference.particles import Replicates, check_settings, systematic

MAX_TEMPERATURES = 1000
MAX_STEPS = 32
"""The largest number of leapfrog steps of a move."""


@dataclass(frozen=True)
class TemperedSMC(Replicates):
    """What R replicates of tempered sequential Monte Carlo found, each with S particles at every temperature."""

    u: Tensor
    """(R, S, P), draws of the unconstrained coordinates from the posterior, dependent within a replicate."""
    log_prior: Tensor
    """(R, S), log p(params) + log |d params / d u| at the draws."""
    log_likelihood: Tensor
    """(R, S), log p(data | params) at the draws."""
    temperatures: Tensor
    """(T,), the powers of the likelihood, from 0 to 1."""
    effective_sample_size: Tensor
    """(T - 1,), the smallest among replicates, of S, of the weights that lead to each temperature but the first."""
    acceptance_rate: Tensor
    """(T,), of the moves at each temperature."""
    step_size: Tensor
    """(T,), the last at each temperature."""


def tempered_smc(
    posterior: LogPosterior,
    *,
    seed: int,
    num_replicates: int = 32,
    num_chains: int = 16,
    num_moves: int = 15,
    efficiency: float = 0.5,
    relabel: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> TemperedSMC:
    """Carry particles from the prior to the posterior along p(params) p(data | params)^temperature.

    The next temperature is the highest at which the weights p(data | params)^(difference) keep the given efficiency.
    ``num_chains`` particles of each replicate are drawn in proportion to their weights and moved by as many chains of
    Hamiltonian Monte Carlo, of which every state is a particle of the next temperature ("waste-free"). The replicates
    run as one batch and never exchange particles: what they differ by is the error.

    Args:
        posterior: the program with its data.
        seed: of all random numbers.
        num_replicates: R, at least 2.
        num_chains: chains in each replicate.
        num_moves: moves of each chain at each temperature; S = num_chains (num_moves + 1).
        efficiency: the conditional effective sample size of a step of temperature, as share of the particles.
        relabel: maps points (C, P) and a generator to points of the same posterior density and likelihood, by random
            relabelling.
        checkpoint: a file for the state at each temperature. If it exists, the run goes on from there, to the same end.
        progress: whether to show temperature and rate of acceptance on stderr.

    Returns:
        ``TemperedSMC``.

    Raises:
        ValueError: a setting is out of range, the density of prior draws is NaN or infinite, a replicate finds no draw
            of positive likelihood, or the checkpoint is of another run.
        RuntimeError: moves are not accepted, or the particles of a replicate collapse to one.
        KeyboardInterrupt: with a note that says how far it was; there is no evidence before temperature 1.
        OSError: the checkpoint cannot be read or written, which is tried first.

    Source: Del Moral, Doucet and Jasra 2006, JRSS B 68, section 3; the temperatures: Zhou, Johansen and Aston 2016,
    Journal of Computational and Graphical Statistics 25, section 3.3; all states kept: Dau and Chopin 2022, JRSS B 84.
    """
    check_settings(num_replicates=num_replicates, num_chains=num_chains, num_moves=num_moves, efficiency=efficiency)
    generator = torch.Generator(posterior.device).manual_seed(seed)
    starts = posterior.draw_prior(num_replicates * num_chains, seed=seed)
    kernel = _Kernel(posterior, generator)
    path = _Path(starts, starts.new_zeros(num_replicates))
    file = None if checkpoint is None else Path(checkpoint)
    if file is not None:
        sizes = {"num_replicates": num_replicates, "num_chains": num_chains, "num_moves": num_moves}
        identity = {"engine": "tempered_smc", "seed": seed, "efficiency": efficiency, "relabel": relabel is not None}
        identity |= sizes | {"program": _fingerprint(posterior, starts), "arguments": _digest(posterior.args)}
        path.restore(checkpoints.load(file, identity), kernel)
        checkpoints.save(file, identity, path.state(kernel))  # a disk that takes no file is found now
    with _Bar(progress) as bar:
        try:
            while True:
                temperature = path.temperatures[-1]
                u, log_prior, log_lik, rate = _walk(kernel, path.starts, temperature, num_moves, num_replicates)
                path.rates.append(rate)
                path.steps.append(kernel.step_size)
                bar.show(temperature, rate)
                if temperature == 1:
                    break
                _check_likelihood(log_lik, temperature)
                path.advance(u, log_lik, efficiency, num_chains, generator)
                if relabel is not None:
                    path.starts = relabel(path.starts, generator)
                if file is not None:
                    checkpoints.save(file, identity, path.state(kernel))
        except KeyboardInterrupt as interrupt:
            reached = path.temperatures[-1]
            interrupt.add_note(f"stopped at temperature {reached:.2g}: there is no evidence before temperature 1")
            raise
    found = TemperedSMC(
        path.log_evidences,
        u,
        log_prior,
        log_lik,
        *(torch.tensor(getattr(path, name), dtype=starts.dtype) for name in _Path.LISTS),
    )
    found.check()
    return found


class _Path:
    """Where a run is: the starts of the chains at its last temperature, and what it found on the way there."""

    LISTS = ("temperatures", "sizes", "rates", "steps")

    def __init__(self, starts: Tensor, log_evidences: Tensor):
        self.starts, self.log_evidences = starts, log_evidences
        self.temperatures, self.sizes = [0.0], list[float]()
        self.rates, self.steps = list[float](), list[float]()

    def advance(
        self, u: Tensor, log_lik: Tensor, efficiency: float, num_chains: int, generator: torch.Generator
    ) -> None:
        """Go on to the next temperature, with starts drawn from the particles u (R, S, P) in proportion to weights."""
        before, temperature = self.temperatures[-1], _next_temperature(log_lik, self.temperatures[-1], efficiency)
        log_weights = (temperature - before) * log_lik
        self.log_evidences = self.log_evidences + log_weights.logsumexp(1) - math.log(log_lik.shape[1])
        weights = log_weights.softmax(1)
        size = float((1 / weights.square().sum(1)).min())
        if size < 1.5:
            raise RuntimeError(
                f"the particles of a replicate collapsed to one at temperature {temperature:.2g} "
                f"(effective sample size {size:.2f} of {log_lik.shape[1]}): raise num_chains or num_moves"
            )
        if len(self.temperatures) == MAX_TEMPERATURES:
            raise RuntimeError(
                f"{MAX_TEMPERATURES} temperatures lead no further than {temperature:.2g}: the log likelihood "
                f"ranges from {float(log_lik.min()):.3g} to {float(log_lik.max()):.3g} over the particles; is "
                "the prior that wide?"
            )
        self.sizes.append(size)
        self.temperatures.append(temperature)
        self.starts = _at(u, systematic(weights, num_chains, generator))

    def state(self, kernel: _Kernel) -> dict[str, Tensor]:
        """Return what a run needs to go on from here."""
        lists = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in self.LISTS}
        of_kernel = {
            "generator": kernel.generator.get_state(),
            "step_size": torch.tensor(kernel.step_size, dtype=torch.float64),
        }
        return {"starts": self.starts, "log_evidences": self.log_evidences, **lists, **of_kernel}

    def restore(self, state: dict[str, Tensor] | None, kernel: _Kernel) -> None:
        """Go on from a state, if there is one."""
        if state is None:
            return
        self.starts, self.log_evidences = (state[name].to(self.starts) for name in ("starts", "log_evidences"))
        for name in self.LISTS:
            setattr(self, name, state[name].tolist())
        kernel.generator.set_state(state["generator"])
        kernel.step_size = float(state["step_size"])


def _fingerprint(posterior: LogPosterior, u: Tensor) -> list[str]:
    """Return what tells a program from others: both parts of its density, to half of their digits, at the first of
    points u at which it is finite."""
    found = posterior(u, u.new_ones(len(u)))  # as many points as the run has, so that no other graph is captured
    some = found.log_likelihood.isfinite().nonzero()[:4, 0]
    return [f"{float(value):.8g}" for part in (found.log_prior, found.log_likelihood) for value in part[some]]


def _digest(args: tuple[Any, ...]) -> str | None:
    """Return a name for the arguments of a program, the data among them; None where one cannot be told from others."""
    try:
        return checkpoints.digest(args)
    except TypeError:
        return None


class _Kernel:
    """Hamiltonian Monte Carlo on C points at once, whose step size follows the rate of acceptance among them.

    The metric is the mean outer product of the gradients over the points, the Fisher information of the posterior
    itself: the mean of the precisions at the modes, where the covariance of a posterior with several modes, as all
    mixtures have, would say how far the modes lie apart (Titsias 2023, NeurIPS, section 3).
    """

    def __init__(self, posterior: LogPosterior, generator: torch.Generator):
        self.posterior, self.generator = posterior, generator
        self.step_size = 0.5

    def start(self, u: Tensor, temperature: float) -> State:
        """Return the state at points u (C, P) of a new temperature, and take the metric from their gradients."""
        count, size = u.shape
        self.temperature = u.new_full((count,), temperature)
        found = self.posterior(u, self.temperature)
        gradients = found.gradient[found.gradient.isfinite().all(1)]
        if not len(gradients):
            raise ValueError(f"the gradient of the log posterior is finite at none of {count} particles")
        fisher = gradients.mT @ gradients / len(gradients)
        diagonal = torch.diag(fisher.diagonal().clamp_min(torch.finfo(u.dtype).tiny ** 0.5))
        share = size / (size + len(gradients))  # off the diagonal the mean of few outer products is noise
        factor = torch.linalg.cholesky((1 - share) * fisher + share * diagonal)
        self.white = _Whitened(self.posterior, factor)
        return State(u @ factor, found._replace(gradient=self.white.slope(found.gradient)))

    def move(self, state: State) -> tuple[State, float]:
        """Return the state after a move of every point, and the mean probability of acceptance."""
        count, size = state.u.shape
        # Lengths vary over the points and moves, so that no period of the dynamics returns a point to its start.
        share = torch.rand(count, generator=self.generator, dtype=state.u.dtype, device=state.u.device)
        longest = min(max(round(math.pi / 2 / self.step_size), 1), MAX_STEPS)
        few, device = (longest + 1) // 2, state.u.device
        num_steps = int(torch.randint(few, longest + 1, (), generator=self.generator, device=device))
        state, step = hmc_step(
            self.white,  # type: ignore[arg-type]  # all it asks of a posterior is a call
            state,
            self.temperature,
            self.step_size * (0.6 + 0.8 * share),
            state.u.new_ones(count, size),
            num_steps,
            self.generator,
        )
        rate = float(step.acceptance_rate.nan_to_num(0.0).mean())
        self.step_size *= math.exp(rate - TARGET_ACCEPTANCE)
        return state, rate


class _Whitened:
    """A log posterior in the coordinates v = L^T u, in which a metric L L^T is the unit matrix."""

    def __init__(self, posterior: LogPosterior, factor: Tensor):
        self.posterior, self.factor = posterior, factor

    def __call__(self, v: Tensor, temperature: Tensor) -> Evaluation:
        found = self.posterior(self.coordinates(v), temperature)
        return found._replace(gradient=self.slope(found.gradient))

    def coordinates(self, v: Tensor) -> Tensor:
        """Return u (C, P) at v (C, P)."""
        found = torch.linalg.solve_triangular(self.factor, v, upper=False, left=False)
        return found.contiguous()  # as the points are at which the program was captured

    def slope(self, gradient: Tensor) -> Tensor:
        """Return the gradient (C, P) in v from that in u."""
        return torch.linalg.solve_triangular(self.factor.mT, gradient, upper=True, left=False)


def _walk(
    kernel: _Kernel, starts: Tensor, temperature: float, num_moves: int, num_replicates: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return all states of the chains from starts (R M, P) and the rate of acceptance.

    The states are their coordinates (R, S, P), the log prior (R, S) and the log likelihood (R, S).
    """
    state = kernel.start(starts, temperature)
    if temperature == 0 and not state.evaluation.log_prior.isfinite().all():
        bad = int((~state.evaluation.log_prior.isfinite()).sum())
        raise ValueError(
            f"the prior density is not finite at {bad} of {len(starts)} draws from the prior, in unconstrained "
            "coordinates: the prior reaches the edge of its support in rounding"
        )
    if not state.evaluation.log_likelihood.isfinite().any():
        raise ValueError(
            f"the likelihood is positive at 0 of {len(starts)} particles at temperature {temperature:.2g}: does the "
            "prior allow the data?"
        )
    states, rates = [state], []
    for _ in range(num_moves):
        state, rate = kernel.move(state)
        states.append(state)
        rates.append(rate)
    mean = sum(rates) / len(rates)
    if mean < 0.01:
        raise RuntimeError(
            f"the particles do not move: {mean:.1%} of moves are accepted at temperature {temperature:.2g}, with a "
            f"step size of {kernel.step_size:.2g}; is the log posterior continuous?"
        )
    u = kernel.white.coordinates(torch.stack([state.u for state in states], 1).flatten(0, 1))
    log_prior = torch.stack([state.evaluation.log_prior for state in states], 1)
    log_lik = torch.stack([state.evaluation.log_likelihood for state in states], 1)
    shape = (num_replicates, -1)
    return u.reshape(*shape, u.shape[1]), log_prior.reshape(shape), log_lik.reshape(shape), mean


def _check_likelihood(log_lik: Tensor, temperature: float) -> None:
    if log_lik.isnan().any() or (log_lik == torch.inf).any():
        bad = int((log_lik.isnan() | (log_lik == torch.inf)).sum())
        raise ValueError(f"the log likelihood is NaN or infinite at {bad} of {log_lik.numel()} particles")
    finite = log_lik.isfinite()
    if not finite.any(1).all():
        raise ValueError(
            f"the likelihood is positive at {int(finite.sum())} of {log_lik.numel()} particles at temperature "
            f"{temperature:.2g}, and a replicate has none: raise num_chains, or see whether the prior allows the data"
        )


def _next_temperature(log_lik: Tensor, temperature: float, efficiency: float) -> float:
    """Return the highest temperature up to 1 at which the weights of the particles keep the efficiency.

    Particles of likelihood 0 have no weight at any temperature, and do not count.
    """
    log_lik = log_lik[log_lik.isfinite()]
    log_lik = log_lik - log_lik.max()

    def excess(step: float) -> float:
        weights = (step * log_lik).exp()
        return float(weights.mean().square() / weights.square().mean()) - efficiency

    if excess(1 - temperature) >= 0:
        return 1.0
    low, high = 0.0, 1 - temperature
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) >= 0 else (low, middle)
    return temperature + low


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Return entries index (R, M) of values (R, S, P), one after another, (R M, P)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1])).flatten(0, 1)


class _Bar:
    """A bar that fills with the temperature."""

    def __init__(self, shown: bool):
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not shown)
        self._task = self._bar.add_task("SMC", total=1.0)

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, temperature: float, rate: float) -> None:
        words = f"SMC temperature {temperature:.3g}  accepted {rate:.0%}"
        self._bar.update(self._task, description=words, completed=temperature)
