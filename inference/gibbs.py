"""Gibbs sampling of a mixture under its conjugate prior, all chains and tempered replicas as one batch.

A sweep draws the component of each row given the parameters, and the parameters given the complete data (Diebolt and
Robert 1994, JRSS B 56(2), section 3). Tempered replicas follow sum_z p(x, z | params)^beta p(params), to which the same
two draws belong with the table of log joint densities and the statistics times beta; neighbours exchange their
temperatures (Geyer 1991) in the alternating order of Okabe et al. 2001, whose gain is shown by Syed et al. 2022, JRSS B
84(2).

Chains stick where several rows would have to change components at once. Split-merge moves between the two draws of a
sweep change them (``mixproof.inference.split_merge``). Temperatures need not: swaps may be accepted often while no
replica makes a round trip, and chains then agree with each other and not with the posterior.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from mixproof.inference import checkpoint as checkpoints
from mixproof.inference.draws import Draws
from mixproof.inference.gibbs_sweep import Chains
from mixproof.inference.validation import check_generator, check_integer, check_rows


def gibbs(
    family: Any,
    x: Any,
    prior: Any,
    *,
    num_components: int | tuple[int, ...],
    num_chains: int,
    num_draws: int,
    num_warmup: int,
    generator: torch.Generator,
    init: Mapping[str, Tensor] | None = None,
    split_merge: bool = False,
    temperatures: Sequence[float] | None = None,
    relabel: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 1000,
    progress: bool = False,
) -> Draws:
    """Draw from the posterior of a mixture's parameters under its conjugate prior.

    Unless ``init`` is given, each chain starts from a draw of the parameters given a partition of the rows around its
    own seeds by k-means++: prior draws leave every row to one component where the prior is vague, and random labels
    make all components alike.

    Args:
        family: a family of the contract.
        x: (N, D), the data; what numpy reads as a matrix. The draws are made where a tensor lies.
        prior: the family's ``Prior``; it must be proper, so None is refused.
        num_components: K, or a number for each latent.
        num_chains: C, at least 1.
        num_draws: S, from each chain, at least 1; every sweep after the warm-up is kept.
        num_warmup: how many sweeps of each chain come before, and are not kept.
        generator: the only source of randomness, on the device of x.
        init: (C, *shape) by site that is not known, where the chains start, inside the supports; None as said above.
        split_merge: whether each sweep also proposes another allocation of the rows of two components at once, as
            ``mixproof.inference.split_merge`` says. Chains that stick in modes then leave them; others only become
            slower. For families with ``log_marginal``.
        temperatures: powers of the likelihood, falling from 1 to above 0: each chain becomes so many replicas, of which
            the draws are those at 1. For families whose rows are complete once their components are known.
        relabel: whether to permute the components of each draw at random, where the prior makes them exchangeable
            (Frühwirth-Schnatter 2001, JASA 96, section 3.2): each parameter then has its whole marginal posterior.
        checkpoint: a file for the state of the run. If it exists, the run goes on from there, to the same draws.
        checkpoint_every: after how many sweeps to write it, at least 1.
        progress: whether to show the sweeps on stderr.

    Returns:
        ``Draws`` of the parameter sites that are not known, with ``lp`` = log p(x, params), the components summed out.
        The attributes hold the settings and, with split-merge moves, ``split_merge_rate``, how many of them changed the
        allocation, and, with temperatures, ``swap_rates`` between neighbours and ``round_trips``, how often a replica
        came back to temperature 1 from the lowest; all replicas and the warm-up count. An interrupt from the keyboard
        is a warning once draws are kept, and they are returned.

    Raises:
        TypeError, ValueError: the data, the prior or a setting are not what they must be, the prior is None, or the
            components are not exchangeable where they are to be relabelled.
        ArithmeticError: a draw was not finite, or singular to rounding: the prior is too wide or the data too far off.
        OSError: the checkpoint cannot be read or written, which is tried first.
    """
    sizes = {"num_chains": (num_chains, 1), "num_draws": (num_draws, 1), "num_warmup": (num_warmup, 0)}
    for name, (value, least) in {**sizes, "checkpoint_every": (checkpoint_every, 1)}.items():
        check_integer(value, name, least)
    check_generator(generator)
    x = check_rows(family, x)
    if generator.device.type != x.device.type:
        raise ValueError(f"the generator is on {generator.device} and x on {x.device}: put both on one device")
    ladder = _check_temperatures(family, temperatures, x)
    if split_merge and not hasattr(family, "log_marginal"):
        raise ValueError("split-merge moves need a family with log_marginal, and this one has none: leave them out")
    chains = Chains(family, x, prior, num_components, num_chains, ladder, generator)
    start = None if init is None else chains.check_start(init)
    run = _Run(chains, num_draws, num_warmup, start, split_merge)
    if relabel:
        chains.check_exchangeable()
    file = None if checkpoint is None else Path(checkpoint)
    if file is not None:
        run.load(file)
        if run.num_sweeps < num_warmup + num_draws:  # else the file may hold more draws, which stay
            run.save(file)  # a disk that takes no file is found before the first sweep, not after
    run.start()
    total = num_warmup + num_draws
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
            task = bar.add_task("Gibbs", total=total, completed=run.num_sweeps)
            while run.num_sweeps < total:
                run.sweep()
                bar.update(task, completed=run.num_sweeps)
                if file is not None and (run.num_sweeps % checkpoint_every == 0 or run.num_sweeps == total):
                    run.save(file)
    except KeyboardInterrupt:
        if run.num_kept == 0:
            raise
        warnings.warn(
            f"interrupted after {run.num_kept} of {num_draws} draws from each chain, which are returned", stacklevel=2
        )
    return run.draws(relabel)


def _check_temperatures(family: Any, temperatures: Sequence[float] | None, x: Tensor) -> Tensor:
    """Return the powers of the likelihood, (R,); (1.0,) without replicas."""
    if temperatures is None:
        return x.new_ones(1)
    values = torch.as_tensor(temperatures, dtype=x.dtype, device=x.device)
    if values.ndim != 1 or len(values) == 0 or values[0] != 1 or not (values > 0).all() or (values.diff() >= 0).any():
        raise ValueError(f"temperatures must fall from 1 to above 0, as (1.0, 0.5, 0.2), not {temperatures}")
    if len(values) > 1 and hasattr(family, "draw_statistics"):
        raise ValueError(
            "temperatures need rows that are complete once their components are known, and the summands of this "
            "family's are not: leave temperatures out, and run more chains"
        )
    return values


class _Run:
    """Where a run is: parameters of all replicas, which temperature each has, and the draws kept so far."""

    def __init__(self, chains: Chains, num_draws: int, num_warmup: int, init: Any, split_merge: bool):
        self._chains, self._num_draws, self._num_warmup = chains, num_draws, num_warmup
        self._init, self._split_merge = init, split_merge
        self._initial = checkpoints.digest(chains.generator.get_state())
        self.num_sweeps = 0
        x, shape = chains.x, (chains.num_chains, len(chains.ladder))
        self._params: Any = None
        self._rung = torch.arange(shape[1], device=x.device).expand(shape).clone()  # (C, R), of each replica
        self._from_hottest = torch.zeros(shape, dtype=torch.bool, device=x.device)  # whether it was there since rung 0
        self._round_trips = torch.zeros((), dtype=torch.int64, device=x.device)
        self._swaps = torch.zeros(2, max(shape[1] - 1, 0), dtype=torch.int64, device=x.device)  # accepted, tried
        self._moves = torch.zeros(2, dtype=torch.int64, device=x.device)  # split-merge moves accepted, tried
        self._kept: dict[str, Tensor] = {}
        self._log_lik = x.new_empty(chains.num_chains, num_draws)

    @property
    def num_kept(self) -> int:
        return max(self.num_sweeps - self._num_warmup, 0)

    def start(self) -> None:
        """Draw where the replicas start, unless the run goes on from a checkpoint."""
        if self._params is None:
            self._params = self._chains.draw_start() if self._init is None else self._init
        for name in self._chains.axes:
            if name not in self._kept:
                value = getattr(self._params, name)
                shape = (self._chains.num_chains, self._num_draws, *value.shape[1:])
                self._kept[name] = value.new_empty(shape)

    def sweep(self) -> None:
        """Exchange temperatures, keep the parameters at 1, and draw the next ones."""
        chains, powers = self._chains, None
        cold = torch.arange(chains.num_replicas, device=chains.x.device)
        if len(chains.ladder) > 1:
            self._swap()
            powers = chains.ladder[self._rung.flatten()]
            cold = (self._rung == 0).flatten().nonzero()[:, 0]  # in the order of the chains
        if self._split_merge:
            params, log_lik, moved = chains.split_merge_sweep(self._params, powers)
            self._moves[0] += moved.sum()
            self._moves[1] += len(moved)
        else:
            params, log_lik = chains.sweep(self._params, powers)
        if self.num_sweeps >= self._num_warmup:
            place = self.num_sweeps - self._num_warmup
            for name, kept in self._kept.items():
                kept[:, place] = getattr(self._params, name)[cold]
            self._log_lik[:, place] = log_lik[cold]
        self._params = params
        self.num_sweeps += 1

    def _swap(self) -> None:
        """Let replicas of neighbouring temperatures exchange them: the even pairs and the odd ones by turns."""
        chains, rung = self._chains, self._rung
        last = len(chains.ladder) - 1
        lower = torch.arange(self.num_sweeps % 2, last, 2, device=rung.device)  # the colder rung of each pair
        if len(lower) == 0:
            return
        order = rung.argsort(1)  # (C, R), the replica on each rung
        partner = torch.arange(last + 1, device=rung.device)
        partner[lower], partner[lower + 1] = lower + 1, lower
        own, others = (chains.ladder[rungs].flatten() for rungs in (rung, partner[rung]))
        here, there = chains.log_likelihood(self._params, (own, others))
        gains = (there - here).view_as(rung).gather(1, order)  # (C, R), by rung
        log_ratio = gains[:, lower] + gains[:, lower + 1]
        uniform = torch.rand(
            log_ratio.shape, generator=chains.generator, dtype=log_ratio.dtype, device=log_ratio.device
        )
        accepted = uniform.log() < log_ratio
        self._swaps[0, lower] += accepted.sum(0)
        self._swaps[1, lower] += len(accepted)
        moved = torch.arange(last + 1, device=rung.device).expand_as(rung).clone()  # (C, R), each rung's new one
        moved[:, lower] += accepted.long()
        moved[:, lower + 1] -= accepted.long()
        self._rung = moved.gather(1, rung)
        self._round_trips += (self._from_hottest & (self._rung == 0)).sum()
        self._from_hottest = (self._from_hottest & (self._rung != 0)) | (self._rung == last)

    def draws(self, relabel: bool) -> Draws:
        """Return what was kept, its components permuted at random if asked for."""
        chains, size = self._chains, self.num_kept
        family = chains.family
        params = {name: kept[:, :size] for name, kept in self._kept.items()}
        if relabel:
            groups = [name for name in family.Params._fields if name.endswith("weights")]
            for number, group in enumerate(groups):
                # of the first state alone, so that the orders do not depend on where a run stopped and went on
                generator = torch.Generator(chains.x.device).manual_seed(int(self._initial[:15], 16) + number)
                params = self._permuted(params, group, generator)
        known = {name: value[:1] for name, value in self._params._asdict().items() if name not in params}
        flat = family.Params(
            **{name: value.flatten(0, 1) for name, value in params.items()},
            **{name: value.expand(chains.num_chains * size, *value.shape[1:]) for name, value in known.items()},
        )
        log_prior = torch.func.vmap(partial(family.log_prior, prior=chains.prior))(flat)
        lp = self._log_lik[:, :size] + log_prior.view(chains.num_chains, size)
        if not torch.isfinite(lp).all():
            chain, draw = (~torch.isfinite(lp)).nonzero()[0].tolist()
            raise ArithmeticError(
                f"log p(x, params) is {lp[chain, draw].item()} in draw {draw} of chain {chain}: a component became "
                "singular to rounding, or the data are too far from the prior. Rescale x, or give the prior a larger "
                "scale of its variances or more degrees of freedom"
            )
        attributes: dict[str, Any] = {
            "engine": "gibbs",
            "seed": chains.generator.initial_seed(),
            "num_warmup": self._num_warmup,
            "num_draws": size,
            "relabel": relabel,
        }
        if self._split_merge:
            attributes["split_merge_rate"] = float(self._moves[0] / self._moves[1])
        if len(chains.ladder) > 1:
            attributes["temperatures"] = chains.ladder.tolist()
            attributes["swap_rates"] = (self._swaps[0] / self._swaps[1]).tolist()
            attributes["round_trips"] = int(self._round_trips)
        return Draws(params, {"lp": lp}, attributes)

    def _permuted(self, params: dict[str, Tensor], group: str, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the draws, the components of one field of weights in an order of their own in each."""
        result = dict(params)
        order: Tensor | None = None
        for name, axes in self._chains.axes.items():
            if group not in axes:
                continue
            value, axis = params[name].movedim(axes[group] + 2, 2), axes[group] + 2
            if order is None:
                # by draws first, so that fewer draws get the first permutations of more
                shape = (value.shape[1], value.shape[0], value.shape[2])
                uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=value.device)
                order = uniform.transpose(0, 1).argsort(-1)
            index = order.view(*order.shape, *(1,) * (value.ndim - 3)).expand_as(value)
            result[name] = value.gather(2, index).movedim(2, axis)
        return result

    def _identity(self) -> dict[str, Any]:
        chains = self._chains
        return {
            "engine": "gibbs",
            "family": checkpoints.identify(chains.family),
            "prior": checkpoints.digest(chains.prior),
            "x": checkpoints.digest(chains.x),
            "num_components": chains.num_components,
            "num_chains": chains.num_chains,
            "num_warmup": self._num_warmup,
            "init": checkpoints.digest(self._init),
            "split_merge": self._split_merge,
            "temperatures": chains.ladder.tolist(),
            "generator": self._initial,
        }

    def save(self, file: Path) -> None:
        """Write the state and the draws kept so far."""
        tensors = {
            "num_sweeps": torch.tensor(self.num_sweeps),
            "generator": self._chains.generator.get_state(),
            "rung": self._rung,
            "from_hottest": self._from_hottest,
            "round_trips": self._round_trips,
            "swaps": self._swaps,
            "moves": self._moves,
            "log_lik": self._log_lik[:, : self.num_kept],
        }
        if self._params is not None:
            tensors |= {f"params.{name}": value for name, value in self._params._asdict().items()}
            tensors |= {f"kept.{name}": value[:, : self.num_kept] for name, value in self._kept.items()}
        checkpoints.save(file, self._identity(), tensors)

    def load(self, file: Path) -> None:
        """Go on from where a run of the same settings was, if there is a file of one."""
        found = checkpoints.load(file, self._identity())
        if found is None:
            return
        device = self._chains.x.device
        self._chains.generator.set_state(found["generator"])
        if not any(name.startswith("params.") for name in found):
            return
        fields = self._chains.family.Params._fields
        self._params = self._chains.family.Params(*(found[f"params.{name}"].to(device) for name in fields))
        self._rung, self._from_hottest, self._round_trips, self._swaps, self._moves = (
            found[name].to(device) for name in ("rung", "from_hottest", "round_trips", "swaps", "moves")
        )
        self.num_sweeps = min(int(found["num_sweeps"]), self._num_warmup + self._num_draws)
        size = min(found["log_lik"].shape[1], self._num_draws)
        self._log_lik[:, :size] = found["log_lik"][:, :size]
        for name in self._chains.axes:
            kept = found[f"kept.{name}"].to(device)
            self._kept[name] = kept.new_empty(kept.shape[0], self._num_draws, *kept.shape[2:])
            self._kept[name][:, :size] = kept[:, :size]
