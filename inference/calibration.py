"""Simulation-based calibration: whether an engine draws from the posterior of a program, over data the program makes.

Parameters from the prior, data given them, draws from the posterior given those: the truth is then one more draw, and
its rank among L draws of any quantity is uniform on 0, ..., L (Talts, Betancourt, Simpson, Vehtari and Gelman,
arXiv:1804.06788). Each quantity's ranks are held against the simultaneous band of
``mixproof.inference.verification.uniformity``, whose probability shares one budget of false alarms.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mixproof.inference import checkpoint as checkpoints
from mixproof.inference.draws import Draws
from mixproof.inference.quantities import Quantities, Quantity, simulate
from mixproof.inference.validation import check_integer, check_probability
from mixproof.inference.verification.report import Check, Report, conclude
from mixproof.inference.verification.uniformity import simultaneous_band, uniform

Engine = Callable[[Tensor, int], Draws]
"""Draws from p(params | x), given x (N, D) and a seed; in batches, given x (B, N, D), with one chain for each."""

FEWEST_RANKS, MOST_RANKS = 20, 100
SLOW_SHARE = 0.05


class Calibration(NamedTuple):
    """Where the truth stood among the draws of an engine, in M simulations, and what follows."""

    ranks: dict[str, Tensor]
    """By quantity, (M,): how many of the L thinned draws lie below the truth, ties broken at random; uniform on
    0, ..., L if the engine draws from the posterior."""
    num_ranks: int
    """L + 1."""
    effective_sizes: Tensor
    """(M,): how many independent draws those of each simulation are worth, for the quantity for which it is fewest."""
    report: Report
    """One check for each quantity, with its p-value; ``holds`` where all ranks lie in their bands."""
    false_alarm: float
    """The probability, at most, that a right engine is refuted."""

    @property
    def ok(self) -> bool:
        """Whether the ranks of every quantity lie in their band."""
        return self.report.ok

    @property
    def p_values(self) -> dict[str, float]:
        """By quantity: the probability of ranks as far from uniform, before any correction for their number."""
        return {check.name: float(check.p_value or 0.0) for check in self.report.checks}

    @property
    def p_value(self) -> float:
        """The smallest of them, corrected for their number by Bonferroni's inequality."""
        return min(1.0, min(self.p_values.values()) * len(self.ranks))

    def __rich__(self) -> Any:
        return self.report.__rich__()

    def __str__(self) -> str:
        return str(self.report)

    def to_json(self) -> str:
        """Return the report, the ranks and the effective sizes as strict JSON."""
        ranks = {name: value.tolist() for name, value in self.ranks.items()}
        sizes = self.effective_sizes.tolist()
        found = {"num_ranks": self.num_ranks, "false_alarm": self.false_alarm, "effective_sizes": sizes, "ranks": ranks}
        return json.dumps(self.report.to_dict() | found, indent=1, allow_nan=False)

    def plot(self, **settings: Any) -> Any:
        """Plot each quantity's distribution function of ranks, less the uniform one, in its band.

        Args:
            settings: of ``arviz_plots.plot_ecdf_pit``, with the backend matplotlib.

        Returns:
            The plot collection of arviz-plots.
        """
        import arviz_base
        import arviz_plots

        shares = {name: ((value + 0.5) / self.num_ranks).numpy()[None] for name, value in self.ranks.items()}
        hidden = {"credible_interval": False} | settings.pop("visuals", {})  # ours is exact, and shares the budget
        tree = arviz_base.from_dict({"prior_sbc": shares})
        plot = arviz_plots.plot_ecdf_pit(tree, visuals=hidden, backend="matplotlib", **settings)
        probability = 1 - self.false_alarm / len(self.ranks)
        size = len(self.effective_sizes)
        where, lower, upper = simultaneous_band(size, self.num_ranks, probability=probability)
        for name in shares:
            axes = plot.get_viz("plot", name)
            axes.fill_between(where, lower - where, upper - where, step="mid", color="0.85", zorder=0)
        return plot


def calibrate(
    model: Callable[..., Any],
    engine: Engine,
    x: Tensor,
    *,
    num_simulations: int,
    seed: int,
    quantities: Mapping[str, Quantity] | None = None,
    num_ranks: int | None = None,
    batch_size: int | None = None,
    false_alarm: float = 0.01,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 20,
    progress: bool = False,
) -> Calibration:
    """Check an engine's posterior draws on data that the program itself makes.

    The draws of a simulation are worth fewer than their number where they depend on one another. Their effective number
    is taken for each quantity, and the least over the quantities; the draws are thinned, evenly, to the number L that
    all but a twentieth of the simulations have independent, and to 99 at most.

    Args:
        model: a Pyro program with enumerated latents; ``model(x)`` observes the data, and all its priors are proper.
            Bind the rest, as ``functools.partial(family.model, num_components=2, prior=prior)``.
        engine: ``engine(x, seed)`` returns draws given data (N, D), from any number of chains.
        x: (N, D), of which only shape and type count.
        num_simulations: M.
        seed: of the simulations and of all that follows.
        quantities: further ones by name, each a function of the parameters by site and the data x (N, D).
        num_ranks: L + 1, in place of the number that the effective sizes call for.
        batch_size: B, for an engine that takes data (B, N, D) and returns one chain for each, all as long.
        false_alarm: the probability, at most, that a right engine is refuted: each of Q quantities takes a Q-th.
        checkpoint: a file for the simulations that are done. If it exists, the run goes on from there to the same
            ranks; it knows the sizes, the seed and the quantities of its run, the program by one data set that it
            makes, and not the engine.
        checkpoint_every: after how many calls of the engine to write it, at least 1; the end and Ctrl-C write it too.
        progress: whether a bar on stderr shows the simulations.

    Raises:
        TypeError: a number of simulations, ranks, data sets or calls is not an integer, the program or the engine is
            not a function, or the engine returns something else than ``Draws``.
        ValueError: a prior is improper, the program is not as above otherwise, the engine leaves a site out or returns
            numbers that are not finite or more draws than before, there are fewer draws than ``num_ranks`` asks for, a
            setting is out of its range, or the checkpoint belongs to another run.
        OSError: the checkpoint cannot be read or written.

    Warns:
        The draws are worth too few independent ones to judge by, or the run was interrupted, be it that the engine
        returned fewer draws than before: it then keeps the simulations that were done, and is undecided if they do not
        refute.
    """
    if not callable(model):
        raise TypeError(
            f"model must be a program, called as model(x), and {model!r} is none: of a family, give "
            "functools.partial(family.model, num_components=K, prior=prior)"
        )
    if not callable(engine):
        raise TypeError(
            f"engine must be a function, called as engine(x, seed), that returns draws, and {engine!r} is none: for "
            "instance lambda x, seed: hmc(model, x, num_draws=100, seed=seed)"
        )
    numbers = {"num_simulations": num_simulations, "checkpoint_every": checkpoint_every}
    if batch_size is not None:
        numbers["batch_size"] = batch_size
    for name, number in numbers.items():
        check_integer(number, name, 1)
    if num_ranks is not None:
        check_integer(num_ranks, "num_ranks", 2)
    check_probability(false_alarm, "false_alarm")
    generator = torch.Generator().manual_seed(seed)
    simulation_seeds, engine_seeds = torch.randint(2**31, (2, num_simulations), generator=generator).tolist()
    compared = Quantities(model, x, seed=seed, further=quantities)
    size = batch_size or 1
    file = None if checkpoint is None else Path(checkpoint)
    identity = {
        "engine": "calibrate",
        "shape": [*x.shape],
        "dtype": str(x.dtype),
        "num_simulations": num_simulations,
        "batch_size": batch_size,
        "seed": seed,
        "quantities": sorted(quantities or {}),
        "program": checkpoints.digest(simulate(model, x, seed=0)),
    }
    known = None if file is None else checkpoints.load(file, identity)
    found = [] if known is None else [_Done.restored(known)]

    def keep() -> None:
        if file is not None:
            checkpoints.save(file, identity, _Done.joined(found).tensors())

    starts = range(len(found[0].effective_sizes) if found else 0, num_simulations, size)
    bar: dict[str, Any] = {"console": Console(stderr=True), "disable": not progress, "description": "simulations"}
    cut = False
    try:
        for calls, first in enumerate(
            track(starts, total=num_simulations / size, completed=starts.start // size, **bar), 1
        ):
            made = [simulate(model, x, seed=s) for s in simulation_seeds[first : first + size]]
            data = torch.stack([one.x for one in made])
            draws = engine(data if batch_size else data[0], engine_seeds[first])
            if not isinstance(draws, Draws):
                raise TypeError(f"engine must return Draws, as every sampler does, not a {type(draws).__name__}")
            truth = {name: torch.stack([one.params[name] for one in made]) for name in made[0].params}
            chains = _by_simulation(draws.params, truth, batch_size is not None)
            values = _evaluate(compared, truth, chains, data)
            if found and (cut := _is_cut(values, found[0].values)):
                break
            num_chains = next(iter(chains.values())).shape[1]
            found.append(_Done(values, _least_effective_size(values, num_chains)))
            if calls % checkpoint_every == 0:
                keep()
    except KeyboardInterrupt:
        if not found:
            raise
        cut = True
    if cut:
        num_done = sum(len(part.effective_sizes) for part in found)
        words = f"interrupted: {num_done} of {num_simulations} simulations were done and count"
        warnings.warn(words, stacklevel=2)
    keep()
    values, effective_sizes = _Done.joined(found)
    num_draws = next(iter(values.values())).shape[1] - 1
    if num_ranks is None:
        num_ranks = _affordable_ranks(effective_sizes, num_draws)
    elif num_ranks > num_draws + 1:
        raise ValueError(f"num_ranks must be from 2 to {num_draws + 1}, one more than the draws, not {num_ranks}")
    ranks = {name: _ranks(value, num_ranks - 1, generator) for name, value in values.items()}
    checks = [_check(name, rank, num_ranks, 1 - false_alarm / len(ranks)) for name, rank in ranks.items()]
    subject = f"ranks in {len(effective_sizes)} simulations among {num_ranks - 1} thinned draws"
    report = conclude(subject, checks, seed)
    if cut and report.ok:  # that few ranks lie in a band as wide as theirs says little
        report = dataclasses.replace(report, verdict="undecided")
    return Calibration(ranks, num_ranks, effective_sizes, report, false_alarm)


def _is_cut(values: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> bool:
    """Return whether an engine answered an interrupt by what it had drawn so far, less than the first time."""
    size, expected = (next(iter(each.values())).shape[1] - 1 for each in (values, first))
    if size > expected:
        raise ValueError(
            f"the engine returned {size} draws, and {expected} in the first simulation: it must return as many for any "
            "data, since ranks among more draws are other ranks"
        )
    return size < expected


class _Done(NamedTuple):
    """Simulations that are done."""

    values: dict[str, Tensor]  # (M, 1 + C S) by quantity, at the truth and then at the draws
    effective_sizes: Tensor  # (M,)

    @classmethod
    def joined(cls, parts: Sequence[_Done]) -> _Done:
        values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
        return cls(values, torch.cat([part.effective_sizes for part in parts]))

    def tensors(self) -> dict[str, Tensor]:
        """Return all by names of one length at the start, which keep the order of the quantities in a file."""
        numbered = {f"{number:06} {name}": value for number, (name, value) in enumerate(self.values.items())}
        return numbered | {"effective sizes": self.effective_sizes}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor]) -> _Done:
        *numbered, sizes = sorted(tensors)
        return cls({name[7:]: tensors[name] for name in numbered}, tensors[sizes])


def _by_simulation(draws: Mapping[str, Tensor], truth: Mapping[str, Tensor], batched: bool) -> dict[str, Tensor]:
    """Return draws (B, C, S, *shape) by site, or say what is wrong with them."""
    found = {}
    for name, true in truth.items():
        if name not in draws:
            raise ValueError(f"the engine returned no draws of {name}, but of {', '.join(draws) or 'nothing'}")
        value = draws[name][:, None] if batched else draws[name][None]
        if value.shape[0] != true.shape[0] or value.shape[3:] != true.shape[1:]:
            raise ValueError(
                f"the draws of {name} have shape {tuple(draws[name].shape)}: it must be chains, draws, then the shape "
                f"{tuple(true.shape[1:])} of the site{f', with {len(true)} chains, one a data set' if batched else ''}"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"the engine returned draws of {name} that are not finite")
        found[name] = value
    return found


def _evaluate(
    quantities: Quantities, truth: Mapping[str, Tensor], draws: Mapping[str, Tensor], x: Tensor
) -> dict[str, Tensor]:
    """Return the quantities (B, 1 + C S) by name at the truth and then at the draws, rounded alike."""
    together = {name: torch.cat([truth[name][:, None], value.flatten(1, 2)], 1) for name, value in draws.items()}
    values = quantities(together, x)
    for name, value in values.items():
        if value.isnan().any():
            raise ValueError(f"the quantity {name} is not a number at some draw")
    return values


def effective_size(draws: Tensor) -> Tensor:
    """Return how many independent draws those of C chains are worth for their mean; NaN where all are alike.

    By the initial monotone sequence of Geyer 1992, Statistical Science 7(4), section 3.3, of autocorrelations that
    count the variance between chains (Gelman et al., Bayesian Data Analysis, 3rd edition, equation 11.7).

    Args:
        draws: (..., C, S).

    Returns:
        (...), at most C S.
    """
    num_chains, num_draws = draws.shape[-2:]
    if num_draws < 4:
        return draws.new_full(draws.shape[:-2], num_chains * num_draws)
    centred = draws - draws.mean(-1, keepdim=True)
    spectrum = torch.fft.rfft(centred, n=2 * num_draws)  # padded, so that the ends do not meet
    products = torch.fft.irfft(spectrum.abs().square(), n=2 * num_draws)[..., :num_draws] / num_draws
    covariances = products.mean(-2)  # (..., S)
    within = covariances[..., :1] * num_draws / (num_draws - 1)
    between = draws.mean(-1).var(-1, keepdim=True) if num_chains > 1 else 0
    correlations = 1 - (within - covariances) / (within * (num_draws - 1) / num_draws + between)
    correlations[..., 0] = torch.where(within[..., 0] > 0, 1, torch.nan)
    pairs = correlations[..., : num_draws // 2 * 2].unflatten(-1, (-1, 2)).sum(-1).clamp_min(0)
    time = 2 * pairs.cummin(-1).values.sum(-1) - 1
    return num_chains * num_draws / time.clamp_min(1)


def _least_effective_size(values: Mapping[str, Tensor], num_chains: int) -> Tensor:
    """Return the effective number (B,) of draws for the quantity for which it is least; constant ones do not count."""
    first = next(iter(values.values()))
    least = torch.full((len(first),), float(first.shape[1] - 1), dtype=torch.float64)
    for value in values.values():
        size = effective_size(value[:, 1:].unflatten(1, (num_chains, -1)).double())
        least = torch.fmin(least, size)
    return least


def _affordable_ranks(effective_sizes: Tensor, num_draws: int) -> int:
    """Return the number of ranks for which all but a share of the simulations have independent draws."""
    enough = int(effective_sizes.quantile(SLOW_SHARE)) + 1
    if enough < FEWEST_RANKS:
        warnings.warn(
            f"in {SLOW_SHARE:.0%} of the simulations the draws are worth fewer than {enough} independent ones: ranks "
            "among such are not uniform even if the engine is right; draw more, or give it chains that move faster",
            stacklevel=3,
        )
    return min(max(enough, FEWEST_RANKS), MOST_RANKS, num_draws + 1)


def _ranks(values: Tensor, num_draws: int, generator: torch.Generator) -> Tensor:
    """Return the ranks (B,) of the first column of values (B, 1 + T) among ``num_draws`` others, evenly apart."""
    truth, draws = values[:, :1], values[:, 1:]
    where = ((torch.arange(num_draws) + 0.5) * draws.shape[1] / num_draws).long()
    thinned = draws[:, where]
    ties = (thinned == truth).sum(1)
    share = torch.rand(len(values), generator=generator, dtype=torch.float64)
    return (thinned < truth).sum(1) + (share * (ties + 1)).long()


def _check(name: str, ranks: Tensor, num_ranks: int, probability: float) -> Check:
    """Test that ranks are uniform, and say of those that are not what that means of the draws."""
    shares = (ranks + 0.5) / num_ranks
    check = uniform(shares, num_points=num_ranks, probability=probability, name=name)
    if check.passed:
        return check._replace(detail="")
    excess = {
        ("too high", "too low"): (shares - 0.5) * 12**0.5,
        ("too wide", "too narrow"): ((shares - 0.5).square() - 1 / 12) * 180**0.5,
    }
    words, z = max(((words, float(value.mean())) for words, value in excess.items()), key=lambda pair: abs(pair[1]))
    return check._replace(detail=f"the draws are {words[z > 0]}")
