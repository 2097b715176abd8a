"""Hamiltonian Monte Carlo for any enumerated Pyro program, many chains as one batch, tuned while it warms up.

Each chain has a scale for each coordinate and a step size of its own; all make the same number of leapfrog steps, so
that a step of all chains is one evaluation of the batch. The chains of a mixture stand in different modes, each other's
relabellings, and a mean or variance over chains would mix the modes. So what is adapted is measured within each chain:

- The scales minimise the Fisher divergence of the chain's draws from a standard normal law: sqrt(sd(u) / sd(gradient))
  (Seyboldt, Carlson and Carpenter 2026, arXiv:2603.18845, section 3).
- The step size is set by dual averaging of the acceptance probability (Nesterov; Hoffman and Gelman 2014, Journal of
  Machine Learning Research 15, section 3.2).
- The trajectory length, common to all chains and jittered by a Halton sequence, climbs by Adam on the ChEES criterion
  (Hoffman, Radul and Sountsov 2021, AISTATS), with distances taken from each chain's own mean.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference import checkpoint as checkpoints
from mixproof.inference.draws import Draws
from mixproof.inference.log_posterior import Evaluation, LogPosterior
from mixproof.inference.validation import as_floating, check_integer, check_probability

TARGET_ACCEPTANCE = 0.8
DIVERGENCE = 1000.0
"""An energy error above this is a divergence, as in Stan."""
ADAM_RATE = 0.05
ADAM_DECAY = 0.95
MAX_STEPS = 1000
FEW_STEPS = 16
"""The largest number of leapfrog steps while the scales are unknown."""
NUM_CANDIDATES = 8
CLIMB_STEPS = 100
CLIMB_RATE = 0.1
POOLED = 5
DUAL_AVERAGING_RATE = 0.2


class State(NamedTuple):
    """Where C chains stand."""

    u: Tensor
    """(C, P), the unconstrained coordinates."""
    evaluation: Evaluation
    """The parts of the log posterior there, and its slope."""


class Step(NamedTuple):
    """What one trajectory of each of C chains did."""

    proposal: State
    """Where it ended."""
    momentum: Tensor
    """(C, P), there, in units in which it is standard normal."""
    acceptance_rate: Tensor
    """(C,), the probability that the end is accepted."""
    energy: Tensor
    """(C,), the Hamiltonian of the draw that the chain stays with."""
    diverging: Tensor
    """(C,), whether the energy error exceeds ``DIVERGENCE`` or is not a number."""


def leapfrog(
    posterior: LogPosterior,
    state: State,
    momentum: Tensor,
    temperature: Tensor,
    step_size: Tensor,
    scale: Tensor,
    num_steps: int,
) -> tuple[State, Tensor]:
    """Return where the leapfrog integrator takes C points, and their momenta; reversible and volume-preserving.

    Args:
        posterior: the log density.
        state: the C starts.
        momentum: (C, P), standard normal at rest.
        temperature: (C,), the powers of the likelihood.
        step_size: (C,), in units in which each coordinate is divided by its scale.
        scale: (C, P), the standard deviations that the metric takes the coordinates to have.
        num_steps: how many steps to make.
    """
    stride = step_size[:, None] * scale
    u, momentum = state.u, momentum + stride / 2 * state.evaluation.gradient
    for step in range(num_steps):
        u = u + stride * momentum
        evaluation = posterior(u, temperature)
        last = step == num_steps - 1
        momentum = torch.addcmul(momentum, stride, evaluation.gradient, value=0.5 if last else 1.0)
    return State(u, evaluation), momentum


def hmc_step(
    posterior: LogPosterior,
    state: State,
    temperature: Tensor,
    step_size: Tensor,
    scale: Tensor,
    num_steps: int,
    generator: torch.Generator,
) -> tuple[State, Step]:
    """Return C chains after one trajectory of ``num_steps`` leapfrog steps each, which leaves their law as it is.

    The law is prior times likelihood to the power ``temperature`` (C,); the arguments are those of ``leapfrog``.
    """
    dtype, device = state.u.dtype, state.u.device
    momentum = torch.randn(state.u.shape, generator=generator, dtype=dtype, device=device)
    before = _energy(state, momentum, temperature)
    proposal, momentum = leapfrog(posterior, state, momentum, temperature, step_size, scale, num_steps)
    after = _energy(proposal, momentum, temperature)
    error = torch.where(torch.isfinite(after), after - before, math.inf)
    acceptance_rate = (-error).clamp(max=0).exp()
    accepted = torch.rand(len(state.u), generator=generator, dtype=dtype, device=device) < acceptance_rate
    kept = State(
        torch.where(accepted[:, None], proposal.u, state.u),
        Evaluation(
            torch.where(accepted[:, None], proposal.evaluation.gradient, state.evaluation.gradient),
            torch.where(accepted, proposal.evaluation.log_prior, state.evaluation.log_prior),
            torch.where(accepted, proposal.evaluation.log_likelihood, state.evaluation.log_likelihood),
        ),
    )
    energy = torch.where(accepted, after, before)
    return kept, Step(proposal, momentum, acceptance_rate, energy, error > DIVERGENCE)


def _energy(state: State, momentum: Tensor, temperature: Tensor) -> Tensor:
    """Return the Hamiltonian (C,)."""
    potential = -state.evaluation.log_prior - temperature * state.evaluation.log_likelihood
    return potential + momentum.square().sum(1) / 2


class Tuning(NamedTuple):
    """What the warm-up adapts. Sizes: C chains, P coordinates."""

    scale: Tensor  # (C, P), of each coordinate in each chain
    center: Tensor  # (C, P), the mean of each chain in the last window
    log_step: Tensor  # (C,), the logarithm of the step size on trial
    log_step_mean: Tensor  # (C,), a weighted mean of those, which is what the draws are made with
    shortfall: Tensor  # (C,), the weighted mean of target minus acceptance probability
    anchor: Tensor  # (C,), the logarithm of the step size before any shortfall
    step_age: Tensor  # (), draws since the step size started anew
    log_length: Tensor  # (), the logarithm of the longest trajectory, in units of the scales
    log_length_mean: Tensor  # (), a weighted mean of those
    square: Tensor  # (), Adam's mean square of the slope
    length_age: Tensor  # (), Adam's steps


def hmc(
    model: Callable[..., Any],
    *args: Any,
    num_chains: int = 32,
    num_draws: int,
    num_warmup: int = 300,
    seed: int,
    init: Mapping[str, Tensor] | None = None,
    batched: bool = False,
    target_acceptance: float = TARGET_ACCEPTANCE,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 50,
    progress: bool = False,
) -> Draws:
    """Draw from p(params | data) of a Pyro program with enumerated latents, by Hamiltonian Monte Carlo in many chains.

    By default each chain starts from the best of several draws from the prior, climbs for a while by the slope of the
    log posterior, and is moved to a chain that came far higher, if there is one: in a mode so much lower there is next
    to no posterior mass, and the chain would not leave it. Chains that stay lower all the same are named in a warning.

    Args:
        model: the program; ``model(*args)`` observes the data. Bind other arguments with ``functools.partial``.
        args: the positional arguments of the program.
        num_chains: C, at least 1. A batch of 16 to 64 costs little more than one chain.
        num_draws: S, the draws kept of each chain, at least 1.
        num_warmup: the draws before those, in which the sampler is tuned, at least 20; they are not kept.
        seed: seeds every random number.
        init: (C, *shape) by site, where the chains start, inside the supports; None as said above.
        batched: whether the arguments are tensors (C, ...) that hold C data sets, of which each chain has its own. The
            chains then differ in their posterior and share what the warm-up learns from all.
        target_acceptance: the mean acceptance probability to tune the step size for, between 0 and 1.
        checkpoint: a file for the state of the run. If it exists, the run goes on from there to the same draws. Other
            data and settings are told, and another program by the log posterior where the chains stand.
        checkpoint_every: after how many draws to write it, at least 1; the end writes it too.
        progress: whether to show the draws on stderr.

    Returns:
        ``Draws``. Its ``sample_stats`` are ``lp``, ``acceptance_rate``, ``diverging``, ``n_steps``, ``step_size`` and
        ``energy``; its ``attributes`` hold the sizes, the seed, the trajectory length and ``low_chains``, the numbers
        of the chains that stay lower than the best. On Ctrl-C after the warm-up, the draws so far, with a warning.

    Raises:
        ValueError: a setting is out of range, the program is not one that ``LogPosterior`` takes, a prior is improper
            and there is no ``init``, a start has density 0, or the checkpoint belongs to another run.
        TypeError: a setting is not a number of its kind, or there is a checkpoint, and an argument of the program holds
            something else than numbers and strings.
        OSError: the checkpoint cannot be read or written, which is tried first.
    """
    least = {"num_chains": (num_chains, 1), "num_draws": (num_draws, 1), "num_warmup": (num_warmup, 20)}
    for name, (value, bound) in {**least, "checkpoint_every": (checkpoint_every, 1)}.items():
        check_integer(value, name, bound)
    check_probability(target_acceptance, "target_acceptance")
    posterior = LogPosterior(model, *args, batched=batched)
    u = None if init is None else coordinates_of(posterior, init, num_chains)
    if u is not None:
        warn_of_improper_prior(posterior)
    file = None if checkpoint is None else Path(checkpoint)
    identity = {
        "engine": "hmc",
        "data": None if file is None else checkpoints.digest(args),
        "batched": batched,
        "init": checkpoints.digest(u),
        "num_chains": num_chains,
        "num_draws": num_draws,
        "num_warmup": num_warmup,
        "seed": seed,
        "target_acceptance": target_acceptance,
        "num_coordinates": posterior.size,
    }
    run = _Run(posterior, num_chains, num_draws, num_warmup, seed, target_acceptance)
    found = None if file is None else checkpoints.load(file, identity)
    if found is not None:
        run.restore(found)
    else:
        run.start(initial_points(posterior, num_chains, seed=seed) if u is None else u)
        if file is not None:
            checkpoints.save(file, identity, run.tensors())  # a disk that takes no file is found now
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("HMC", total=num_warmup + num_draws)
        try:
            while run.iteration < num_warmup + num_draws:
                run.advance()
                bar.update(task, completed=run.iteration)
                # not after an interrupt: it may leave half a draw, and the file must lead to the same draws
                whole = run.iteration % checkpoint_every == 0 or run.iteration == num_warmup + num_draws
                if file is not None and whole:
                    checkpoints.save(file, identity, run.tensors())
        except KeyboardInterrupt:
            if not run.kept:
                raise
            warnings.warn(f"stopped after {len(run.kept)} of {num_draws} draws", ConvergenceWarning, stacklevel=2)
    draws = run.draws()
    _warn(draws)
    return draws


def warn_of_improper_prior(posterior: LogPosterior) -> None:
    """Say that a program has an improper prior, which starts of the caller's own hide: the posterior may be so too.

    Where a factor is part of the prior, it may make it proper.
    """
    if posterior.factors:
        return
    try:
        posterior.draw_sites(1, seed=0)
    except ValueError as error:
        warnings.warn(
            f"{str(error).split(':')[0]}: the posterior of a mixture is then improper too where a component may be "
            "empty of rows, or the data do not decide a parameter, and draws are of no law; give a proper prior",
            UserWarning,
            stacklevel=3,
        )


def _warn(draws: Draws) -> None:
    """Say what is wrong with a run."""
    if low := draws.attributes["low_chains"]:
        warnings.warn(
            f"the log posterior of chains {', '.join(map(str, low))} stays below that of the others: each sits in "
            "a lower mode that it does not leave, and the draws of all chains together do not weigh the modes; draw "
            "anew from other starts, or weigh the modes by their evidence",
            ConvergenceWarning,
            stacklevel=3,
        )
    if num_divergences := draws.attributes["num_divergences"]:
        warnings.warn(
            f"{num_divergences} draws diverged: raise target_acceptance, or write the program in other coordinates",
            ConvergenceWarning,
            stacklevel=3,
        )


def initial_points(posterior: LogPosterior, num_chains: int, *, seed: int) -> Tensor:
    """Return starts (C, P): the best of several draws from the prior for each chain, after a climb.

    A chain that ends more than P + 10 nats lower than the highest goes to the place of one that does not: a mode so
    much lower would have to be e^10 times as large beyond what the fall within a mode explains (P / 2 on average).
    Where each chain has a data set of its own, all stay.
    """
    candidates = posterior.draw_sites(NUM_CANDIDATES * num_chains, seed=seed)
    best, one = candidates[:num_chains], torch.ones(num_chains).to(candidates)
    height = torch.full_like(one, -math.inf)
    for u in candidates.split(num_chains):
        value = _height(posterior(u, one))
        best = torch.where((value > height)[:, None], u, best)
        height = torch.maximum(value, height)
    u, square = best, torch.zeros_like(best)
    for step in range(CLIMB_STEPS):
        evaluation = posterior(u, one)
        value = _height(evaluation)
        best = torch.where((value > height)[:, None], u, best)
        height = torch.maximum(value, height)
        gradient = evaluation.gradient.nan_to_num(0.0, 0.0, 0.0)
        square = 0.9 * square + 0.1 * gradient.square()
        rate = CLIMB_RATE * (1 - step / CLIMB_STEPS) * (1 - 0.9 ** (step + 1)) ** 0.5
        u = u + rate * gradient / (square.sqrt() + 1e-12)
    able = torch.isfinite(height)
    if not able.any() or (posterior.batch and not able.all()):
        where = f" of data set {int((~able).nonzero()[0])}" if posterior.batch else ""
        raise ValueError(f"every draw from the prior{where} has posterior density 0: give init")
    if posterior.batch:  # of each data set the heights are its own
        return best
    able = height > height.max() - posterior.size - 10
    generator = torch.Generator().manual_seed(seed)
    others = able.nonzero()[:, 0]
    place = others[torch.randint(len(others), (num_chains,), generator=generator)]
    return torch.where(able[:, None], best, best[place])


def check_program(height: Tensor, before: Tensor, dtype: torch.dtype) -> None:
    """Check that the log posterior (C,) of a program where chains stand is that of the program of a checkpoint.

    Raises:
        CheckpointError: it is another one, to half of the digits of the type that it was computed in.
    """
    chain = int((height - before).abs().argmax())
    rounding = math.sqrt(torch.finfo(dtype).eps)
    if not torch.isclose(height[chain], before[chain], rtol=rounding, atol=rounding):
        raise checkpoints.CheckpointError(
            f"the checkpoint belongs to another program: the log posterior where chain {chain} stands is "
            f"{float(height[chain]):.10g}, and was {float(before[chain]):.10g}: delete it, or give another file"
        )


def _height(evaluation: Evaluation) -> Tensor:
    """Return the log posterior (C,) over the coordinates, -inf where it is not a number."""
    value = evaluation.log_prior + evaluation.log_likelihood
    return torch.where(torch.isfinite(value), value, -math.inf)


def coordinates_of(posterior: LogPosterior, init: Mapping[str, Tensor], num_chains: int) -> Tensor:
    """Return the caller's starts as coordinates (C, P)."""
    names = list(posterior.coordinates.transforms)
    if set(init) != set(names):
        raise ValueError(f"init must have the sites {', '.join(names)}, and has {', '.join(init) or 'none'}")
    values = {name: as_floating(init[name], f"init[{name!r}]") for name in names}
    shapes = {name: value.shape[1:] for name, value in posterior.constrain(torch.zeros(1, posterior.size)).items()}
    for name, value in values.items():
        if value.ndim == 0 or len(value) != num_chains:
            size = len(value) if value.ndim else 0
            raise ValueError(f"init[{name!r}] has {size} rows, and there are {num_chains} chains: one each")
        if value.shape[1:] != shapes[name]:
            shape = (num_chains, *shapes[name])
            raise ValueError(f"init[{name!r}] must have shape {shape}, not {tuple(value.shape)}")
    return posterior.unconstrain(values)


class _Run:
    """The state of a run: everything that the next draw depends on, and the draws so far."""

    def __init__(
        self, posterior: LogPosterior, num_chains: int, num_draws: int, num_warmup: int, seed: int, target: float
    ):
        self.posterior, self.target = posterior, target
        self.num_chains, self.num_draws, self.num_warmup = num_chains, num_draws, num_warmup
        self.ends = _windows(num_warmup)
        self.seed = seed
        self.iteration = 0
        self.window: list[Tensor] = []  # (2, C, P) each: the coordinates and the slope at each draw of the window
        self.kept: list[tuple[Tensor, Tensor]] = []  # (C, P), the coordinates, and (C, 6), what is said of them

    def start(self, u: Tensor, tuning: Tuning | None = None) -> None:
        """Put the chains at u (C, P)."""
        self.one = torch.ones(self.num_chains, dtype=u.dtype, device=u.device)
        self.generator = torch.Generator(u.device).manual_seed(self.seed)
        self.state = State(u, self.posterior(u, self.one))
        height = _height(self.state.evaluation)
        if not torch.isfinite(height).all():
            bad = int((~torch.isfinite(height)).nonzero()[0])
            raise ValueError(f"chain {bad} starts where the posterior density is 0 or not a number: start elsewhere")
        self.tuning = _untuned(u) if tuning is None else tuning

    def advance(self) -> None:
        """Make one draw in each chain; while warming up, learn from it."""
        warm, before = self.iteration < self.num_warmup, self.state.u
        step_size = (self.tuning.log_step if warm else self.tuning.log_step_mean).exp()
        common = float(step_size.log().mean().exp())
        length = float(self.tuning.log_length.exp()) * _halton(self.iteration + 1)
        most = FEW_STEPS if self.iteration < self.ends[0] else MAX_STEPS
        num_steps = min(max(1, math.ceil(length / common)), most)
        scale = self.tuning.scale
        self.state, step = hmc_step(self.posterior, self.state, self.one, step_size, scale, num_steps, self.generator)
        self.iteration += 1
        if warm:
            self._learn(before, step, num_steps * step_size)
            return
        height = self.state.evaluation.log_prior + self.state.evaluation.log_likelihood
        diverging, n_steps = step.diverging.to(self.one), num_steps * self.one
        stats = torch.stack([height, step.acceptance_rate, diverging, n_steps, step_size, step.energy], 1)
        self.kept.append((self.state.u, stats))

    def _learn(self, before: Tensor, step: Step, travelled: Tensor) -> None:
        """Adapt the tuning to one draw: to its acceptance, to where it went, and to a whole window at its end."""
        first, last = self.ends[0], self.ends[-1]
        self.tuning = _with_acceptance(self.tuning, step.acceptance_rate, self.target)
        if self.iteration > first:
            self.tuning = _with_length(self.tuning, before, step, travelled)
        if self.iteration <= last:
            self.window.append(torch.stack([self.state.u, self.state.evaluation.gradient]))
        if self.iteration in self.ends:
            self.tuning = _with_scales(self.tuning, *torch.stack(self.window, 2))
            self.window = []
        if self.iteration == self.num_warmup:
            self.tuning = self.tuning._replace(log_length=self.tuning.log_length_mean)

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a run needs to go on."""
        found = {f"tuning.{name}": value for name, value in self.tuning._asdict().items()}
        if self.window:
            found["window"] = torch.stack(self.window)
        if self.kept:
            found["kept"], found["stats"] = map(torch.stack, zip(*self.kept, strict=True))
        return {
            **found,
            "u": self.state.u,
            "height": _height(self.state.evaluation),
            "iteration": torch.tensor(self.iteration),
            "rng": self.generator.get_state(),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up a run where ``tensors`` was called."""
        states, device = tensors["rng"], self.posterior.device
        tensors = {name: value.to(device) for name, value in tensors.items()}
        self.start(tensors["u"], Tuning(**{name: tensors[f"tuning.{name}"] for name in Tuning._fields}))
        before = tensors["height"].to(self.one)
        check_program(_height(self.state.evaluation), before, before.dtype)
        self.generator.set_state(states)
        self.iteration = int(tensors["iteration"])
        self.window = list(tensors.get("window", ()))
        self.kept = list(zip(tensors.get("kept", ()), tensors.get("stats", ()), strict=True))

    def draws(self) -> Draws:
        """Return the draws so far, (C, S, ...), with what is said of them."""
        u, stats = (torch.stack(each, 1) for each in zip(*self.kept, strict=True))
        height, acceptance_rate, diverging, n_steps, step_size, energy = stats.unbind(-1)
        lp = height - self.posterior.log_jacobian(u)
        sample_stats = {
            "lp": lp,
            "acceptance_rate": acceptance_rate,
            "diverging": diverging.bool(),
            "n_steps": n_steps.long(),
            "step_size": step_size,
            "energy": energy,
        }
        attributes = {
            "engine": "hmc",
            "seed": self.seed,
            "num_warmup": self.num_warmup,
            "num_draws": u.shape[1],
            "num_chains": self.num_chains,
            "trajectory_length": float(self.tuning.log_length.exp()),
            "num_divergences": int(diverging.sum()),
            "low_chains": [] if self.posterior.batch else low_chains(height, self.posterior.size),
        }
        return Draws(self.posterior.constrain(u), sample_stats, attributes)


def _untuned(u: Tensor) -> Tuning:
    """Return what the warm-up starts with, for chains at u (C, P)."""
    zero, step = u.new_zeros(()), u.new_full((len(u),), math.log(0.1))
    return Tuning(torch.ones_like(u), u, step, step, torch.zeros_like(step), step, zero, zero, zero, zero, zero)


def _with_acceptance(tuning: Tuning, acceptance_rate: Tensor, target: float) -> Tuning:
    """Return the tuning after a step of dual averaging, with the constants of Hoffman and Gelman 2014."""
    age = tuning.step_age + 1
    shortfall = tuning.shortfall + (target - acceptance_rate - tuning.shortfall) / (age + 10)
    log_step = tuning.anchor - age.sqrt() / DUAL_AVERAGING_RATE * shortfall
    log_step_mean = tuning.log_step_mean + age**-0.75 * (log_step - tuning.log_step_mean)
    return tuning._replace(log_step=log_step, log_step_mean=log_step_mean, shortfall=shortfall, step_age=age)


def _with_scales(tuning: Tuning, u: Tensor, gradient: Tensor) -> Tuning:
    """Return the tuning with the scales of a window of draws u (C, W, P) and slopes there, the step size starting anew.

    A chain's own estimate is drawn towards the geometric mean of all by the weight of ``POOLED`` draws.
    """
    own = (u.std(1).log() - gradient.std(1).log()) / 2
    known = torch.isfinite(own)
    everyone = torch.where(known, own, 0).sum(0) / known.sum(0).clamp(min=1)
    weight = u.shape[1] / (u.shape[1] + POOLED)
    log_scale = torch.where(known, weight * own.nan_to_num(0, 0, 0) + (1 - weight) * everyone, everyone)
    log_scale = torch.where(known.any(0), log_scale, tuning.scale.log())
    anchor = torch.full_like(tuning.anchor, math.log(0.5))
    return tuning._replace(
        scale=log_scale.exp(),
        center=u.mean(1),
        log_step=anchor,
        log_step_mean=anchor,
        shortfall=torch.zeros_like(anchor),
        anchor=anchor,
        step_age=torch.zeros_like(tuning.step_age),
    )


def _with_length(tuning: Tuning, before: Tensor, step: Step, travelled: Tensor) -> Tuning:
    """Return the tuning after a step of Adam that lengthens or shortens the trajectories, up the ChEES criterion.

    That is the mean of d^2 / 4, d the change of the squared distance from the chain's mean. Its derivative by the
    logarithm of the length t is the mean of t d (u - mean) . velocity, each chain weighing by its acceptance.
    """
    old, new = ((u - tuning.center) / tuning.scale for u in (before, step.proposal.u))
    change = new.square().sum(1) - old.square().sum(1)
    slope = travelled * change * (new * step.momentum).sum(1)
    weight = torch.where(torch.isfinite(slope), step.acceptance_rate, 0)
    slope = (weight * slope.nan_to_num(0, 0, 0)).sum() / weight.sum().clamp(min=1e-3)
    age = tuning.length_age + 1
    square = ADAM_DECAY * tuning.square + (1 - ADAM_DECAY) * slope.square()
    move = ADAM_RATE * slope / ((square / (1 - ADAM_DECAY**age)).sqrt() + 1e-30)
    common = float(tuning.log_step.mean())
    log_length = (tuning.log_length + move).clamp(common, common + math.log(MAX_STEPS))
    # a mean that forgets all but the last third or so
    log_length_mean = tuning.log_length_mean + 3 / (age + 2) * (log_length - tuning.log_length_mean)
    return tuning._replace(log_length=log_length, log_length_mean=log_length_mean, square=square, length_age=age)


def _windows(num_warmup: int) -> list[int]:
    """Return after how many draws the scales are set: windows twice as long each, the last until 85 % of warm-up."""
    length, last = max(10, num_warmup // 20), int(0.85 * num_warmup)
    ends = [length]
    while ends[-1] + 4 * length + 2 * length <= last:
        length *= 2
        ends.append(ends[-1] + length)
    return [*ends, last] if last > ends[-1] else ends


def _halton(number: int) -> float:
    """Return an entry of the Halton sequence in base 2, from number 1 on: 1/2, 1/4, 3/4, 1/8, ..."""
    bits = f"{number:b}"
    return int(bits[::-1], 2) / 2 ** len(bits)


def low_chains(height: Tensor, num_coordinates: int) -> list[int]:
    """Return the numbers of the chains whose log posterior (C, S) stays below that of the best chain.

    A chain is low if the mean of its log posterior is below that of the highest by more than four times what two chains
    that draw from one mode could differ by: the root of the sum of both variances, none below P / 2, a normal law's.
    """
    mean, variance = height.mean(1), height.var(1, correction=0).clamp(min=num_coordinates / 2)
    best = int(mean.argmax())
    return (mean[best] - mean > 4 * (variance + variance[best]).sqrt()).nonzero()[:, 0].tolist()
