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
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from mixproof.inference import checkpoint as checkpoints
from mixproof.inference.allocations import draw_allocations
from mixproof.inference.draws import Draws
from mixproof.inference.split_merge import reallocate
from mixproof.inference.validation import (
    check_integer,
    check_num_components,
    check_params,
    check_proper_prior,
    check_rows,
    example_params,
)
from mixproof.models.initial import partition

TABLE_ENTRIES = 1 << 17
"""Up to how large the table of rows, components and replicas is made in one piece: it stays in a core's cache."""
DEVICE_ENTRIES = 1 << 26
"""The same on other devices, which want large pieces: half a gibibyte."""
ROWS = 1 << 10
"""From how many rows on blocks of them are divided among replicas rather than made smaller."""


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
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, as torch.Generator().manual_seed(0), not {generator!r}")
    x = check_rows(family, x)
    if generator.device.type != x.device.type:
        raise ValueError(f"the generator is on {generator.device} and x on {x.device}: put both on one device")
    ladder = _check_temperatures(family, temperatures, x)
    if split_merge and not hasattr(family, "log_marginal"):
        raise ValueError("split-merge moves need a family with log_marginal, and this one has none: leave them out")
    chains = _Chains(family, x, prior, num_components, num_chains, ladder, generator)
    start = None if init is None else chains.check_start(init)
    run = _Run(chains, num_draws, num_warmup, start, split_merge)
    if relabel:
        chains.check_exchangeable()
    file = None if checkpoint is None else Path(checkpoint)
    if file is not None:
        run.load(file)
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


class _Chains:
    """The rows, the prior, and the two draws of a sweep for B = C R replicas at once."""

    def __init__(
        self,
        family: Any,
        x: Tensor,
        prior: Any,
        num_components: int | tuple[int, ...],
        num_chains: int,
        ladder: Tensor,
        generator: torch.Generator,
    ):
        if not hasattr(family, "draw"):
            raise TypeError("this family has no draw(params, stats, prior, generator), which Gibbs sampling needs")
        self.family, self.x, self.ladder, self.generator = family, x, ladder, generator
        self.num_components, self.num_chains = check_num_components(family, num_components), num_chains
        self.num_replicas = num_chains * len(ladder)
        template, free = example_params(family, self.num_components, x)
        self.axes = self._component_axes(template, free)
        self.prior = check_proper_prior(family, prior, template)
        num_columns = family.log_joint(template, x[:1]).shape[1]
        self._none = x.new_zeros(self.num_replicas, 0, num_columns)  # responsibilities of no rows
        self._template = type(template)(*(value.expand(self.num_replicas, *value.shape) for value in template))
        self._center = x.mean(0)
        rows, some = len(x), self.num_replicas
        if getattr(family, "additive", False):
            entries = TABLE_ENTRIES if x.device.type == "cpu" else DEVICE_ENTRIES
            rows = min(max(entries // (some * num_columns), ROWS), rows)
            some = max(entries // (rows * num_columns), 1)
        self._blocks = x.split(rows)
        self._groups = [slice(first, first + some) for first in range(0, self.num_replicas, some)]
        self._features: list[Tensor] = []

    def _component_axes(self, template: Any, free: tuple[str, ...]) -> dict[str, dict[str, int]]:
        """Return for each free parameter its axis of components by field of weights.

        It is the one that grows where the program is run with one more component.
        """
        size: Any = self.num_components
        axes: dict[str, dict[str, int]] = {name: {} for name in free}
        for i, group in enumerate(name for name in template._fields if name.endswith("weights")):
            more = size + 1 if isinstance(size, int) else tuple(k + (i == j) for j, k in enumerate(size))
            larger, _ = example_params(self.family, more, self.x)
            for name in free:
                shapes = zip(getattr(template, name).shape, getattr(larger, name).shape, strict=True)
                for axis, (before, after) in enumerate(shapes):
                    if before != after:
                        axes[name][group] = axis
        return axes

    def check_exchangeable(self) -> None:
        """Raise where the prior tells components apart: where exchanging two of a draw changes its density."""
        state = self.generator.get_state()  # the draws of the run are the same whether they are relabelled or not
        params = _member(self.draw_prior(), 0)
        self.generator.set_state(state)
        before = self.family.log_prior(params, self.prior)
        for group in (name for name in params._fields if name.endswith("weights")):
            rolled = {
                name: getattr(params, name).roll(1, own[group]) for name, own in self.axes.items() if group in own
            }
            after = self.family.log_prior(params._replace(**rolled), self.prior)
            if not (after - before).abs() <= 1e-8 * (1 + before.abs()):
                raise ValueError(
                    f"the prior tells the components of {group} apart, so that they must not be relabelled: leave "
                    "relabel out, or give all of them the same concentration"
                )

    def draw_prior(self) -> Any:
        """Return a draw from the prior for each replica."""
        nothing = self._statistics(self._template, self.x[:0], self._none)
        return self.family.draw(self._template, nothing, self.prior, self.generator)

    def draw_start(self) -> Any:
        """Return a draw of the parameters given labels by a partition of the rows, one for each replica."""
        params = self.draw_prior()
        sizes = self.num_components if isinstance(self.num_components, tuple) else (self.num_components,)
        labels = torch.stack([self._partition(sizes[0]) for _ in range(self.num_replicas)])
        others = self._none.shape[-1] // sizes[0]
        uniform = torch.rand(labels.shape, generator=self.generator, dtype=self.x.dtype, device=self.x.device)
        columns = labels * others + (uniform * others).long()
        resp = torch.nn.functional.one_hot(columns, self._none.shape[-1]).to(self.x)
        stats = self._statistics(params, self.x, resp)
        return self.family.draw(params, stats, self.prior, self.generator)

    def _partition(self, num_components: int) -> Tensor:
        """Return labels (N,) around seeds of their own, as many as there are rows for."""
        size = min(num_components, len(self.x))
        return partition(self.x, size, self.generator, "k-means++").argmax(-1)

    def _statistics(self, params: Any, x: Tensor, resp: Tensor) -> Any:
        """Return the statistics of rows x (n, D), each replica with its own resp (B, n, K)."""
        if hasattr(self.family, "draw_statistics"):
            return self.family.draw_statistics(params, x, resp, self.generator)
        return self.family.statistics(params, x, resp)

    def check_start(self, init: Mapping[str, Tensor]) -> Any:
        """Return the parameters of every replica, those of one chain alike, from (C, *shape) by site."""
        if init.keys() != self.axes.keys():
            raise ValueError(f"init must have the sites {', '.join(self.axes)}, and has {', '.join(init) or 'none'}")
        one = _member(self._template, 0)
        for name in self.axes:
            shape, expected = tuple(torch.as_tensor(init[name]).shape), (self.num_chains, *getattr(one, name).shape)
            if shape != expected:
                raise ValueError(f"init[{name!r}] must have shape {expected}, one start for each chain, not {shape}")
        starts = [
            check_params(self.family, one._asdict() | {name: init[name][chain] for name in self.axes})
            for chain in range(self.num_chains)
        ]
        return type(one)(
            *(
                torch.stack(values).to(self.x).repeat_interleave(len(self.ladder), 0)
                for values in zip(*starts, strict=True)
            )
        )

    def sweep(self, params: Any, powers: Tensor | None) -> tuple[Any, Tensor]:
        """Return parameters after both draws, and log p(x | params)^power, (B,), at those given.

        Args:
            params: the family's ``Params``, each field (B, ...).
            powers: (B,), of the likelihood; None is 1.
        """
        log_lik = self.x.new_zeros(self.num_replicas)
        form = self._form(params)
        totals = []
        for some in self._groups:
            of_some, own = form.of(some), None if powers is None else powers[some]
            total: Any = None
            for number, x in enumerate(self._blocks):
                resp, log_densities = draw_allocations(of_some.table(number, x), own, self.generator)
                log_lik[some] += log_densities
                part = of_some.sums(number, x, resp if own is None else resp * own[:, None, None])
                total = part if total is None else _add(total, part)
            totals.append(total)
        return self.family.draw(params, form.statistics(_joined(totals)), self.prior, self.generator), log_lik

    def split_merge_sweep(self, params: Any, powers: Tensor | None) -> tuple[Any, Tensor, Tensor]:
        """Return what ``sweep`` does with a split-merge move between both draws, and whether it moved, (B,)."""
        resp, log_lik = draw_allocations(self.table(params, powers), None, self.generator)
        resp, moved = reallocate(self, params, resp, powers)
        return self.draw(params, resp, powers), log_lik, moved

    def table(self, params: Any, powers: Tensor | None) -> Tensor:
        """Return log p(x_n, z_n = k | params)^power, (B, K, N)."""
        form = self._form(params)
        table = torch.cat([form.table(number, x) for number, x in enumerate(self._blocks)], -1)
        return table if powers is None else table * powers[:, None, None]

    def draw(self, params: Any, resp: Tensor, powers: Tensor | None) -> Any:
        """Return parameters in proportion to p(x, z | params)^power p(params), z as 0 and 1 in resp (B, K, N)."""
        return self.family.draw(params, self._complete(params, resp, powers), self.prior, self.generator)

    def log_marginal(self, params: Any, resp: Tensor, powers: Tensor | None) -> Tensor:
        """Return the log of the integral, (B,), of p(x, z | params)^power p(params) over the parameters."""
        return self.family.log_marginal(self._complete(params, resp, powers), self.prior)

    def _complete(self, params: Any, resp: Tensor, powers: Tensor | None) -> Any:
        """Return the statistics of all rows in components resp (B, K, N), each counted as often as its power says."""
        form = self._form(params)
        weighted = resp if powers is None else resp * powers[:, None, None]
        parts = weighted.split([len(x) for x in self._blocks], -1)
        blocks = enumerate(zip(self._blocks, parts, strict=True))
        return form.statistics(reduce(_add, (form.sums(number, x, part) for number, (x, part) in blocks)))

    def log_likelihood(self, params: Any, powers: Sequence[Tensor]) -> list[Tensor]:
        """Return log p(x | params)^power, (B,), for each of several powers (B,)."""
        form = self._form(params)
        found = [self.x.new_zeros(self.num_replicas) for _ in powers]
        for number, x in enumerate(self._blocks):
            table = form.table(number, x)
            for i, power in enumerate(powers):
                found[i] += (table * power[:, None, None]).logsumexp(1).sum(-1)
        return found

    def _form(self, params: Any) -> _Plain | _Moments:
        """Return how to make tables and statistics: by products with features where they are precise enough."""
        inner, inner_params, back = self.family, params, _same
        if hasattr(self.family, "reduction"):
            inner, inner_params, back = self.family.reduction(params)
        if not hasattr(inner, "features"):
            return _Plain(self, params)
        if not self._features:
            self._features = [inner.features(x, self._center) for x in self._blocks]
        form = _Moments(self, params, inner, inner_params, back)
        return form if form.precise else _Plain(self, params)


class _Plain:
    """Tables and statistics by ``log_joint`` and ``statistics`` themselves."""

    def __init__(self, chains: _Chains, params: Any):
        self.chains, self.params = chains, params

    def of(self, some: slice) -> _Plain:
        """Return the same of some of the replicas, for their tables and sums."""
        return _Plain(self.chains, _member(self.params, some))

    def table(self, number: int, x: Tensor) -> Tensor:
        """Return log p(x_n, z_n = k), shape (B, K, n), for rows x (n, D)."""
        return torch.func.vmap(self.chains.family.log_joint, (0, None))(self.params, x).mT.contiguous()

    def sums(self, number: int, x: Tensor, resp: Tensor) -> Any:
        return self.chains._statistics(self.params, x, resp.mT)

    def statistics(self, total: Any) -> Any:
        return total


class _Moments(_Plain):
    """Tables and statistics by products with the family's features, all replicas as one mixture of B K components."""

    def __init__(self, chains: _Chains, params: Any, inner: Any, inner_params: Any, back: Callable[[Any], Any]):
        super().__init__(chains, params)
        self._inner, self._back = inner, back
        self._flat = type(inner_params)(*(value.flatten(0, 1) for value in inner_params))
        self._natural = inner.natural(self._flat, chains._center)

    @property
    def precise(self) -> bool:
        """Whether a log density is off by less than the root of a rounding (``expectation`` says how far it is)."""
        center = self.chains._center
        sizes = self._inner.features(center + self._inner.reach(self._flat, center), center)
        growth = (self._natural.abs() * sizes.mT).sum(-1).amax()
        return bool(growth <= torch.finfo(center.dtype).eps ** -0.5)

    def of(self, some: slice) -> _Plain:
        found = copy(self)
        found.params = _member(self.params, some)
        found._natural = self._natural.unflatten(0, (len(self.params[0]), -1))[some].flatten(0, 1)
        return found

    def table(self, number: int, x: Tensor) -> Tensor:
        return (self._natural @ self.chains._features[number]).unflatten(0, (len(self.params[0]), -1))

    def sums(self, number: int, x: Tensor, resp: Tensor) -> Any:
        if hasattr(self.chains.family, "draw_statistics"):
            return super().sums(number, x, resp)
        return resp.flatten(0, 1) @ self.chains._features[number].mT  # (B K, P)

    def statistics(self, total: Any) -> Any:
        if not isinstance(total, Tensor):
            return total
        stats = self._inner.statistics_of(total.mT, self._flat, self.chains._center)
        return self._back(type(stats)(*(value.unflatten(0, (len(self.params[0]), -1)) for value in stats)))


def _same(stats: Any) -> Any:
    return stats


def _add(left: Any, right: Any) -> Any:
    """Return the sum of two tensors, or of two statistics, whose parts may be statistics."""
    if isinstance(left, Tensor):
        return left + right
    return type(left)(*map(_add, left, right))


def _joined(parts: list[Any]) -> Any:
    """Return sums of groups of replicas in one."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return type(parts[0])(*(_joined(list(values)) for values in zip(*parts, strict=True)))


def _member(params: Any, i: Tensor | int | slice) -> Any:
    return type(params)(*(value[i] for value in params))


class _Run:
    """Where a run is: parameters of all replicas, which temperature each has, and the draws kept so far."""

    def __init__(self, chains: _Chains, num_draws: int, num_warmup: int, init: Any, split_merge: bool):
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
