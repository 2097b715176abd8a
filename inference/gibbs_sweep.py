"""The two draws of a Gibbs sweep, for all chains and tempered replicas of a mixture as one batch.

A sweep makes the table of log joint densities of rows, components and replicas in pieces that stay in a core's cache,
draws the components there, and keeps the sums that the draw of the parameters takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from mixproof.inference.allocations import draw_allocations
from mixproof.inference.split_merge import reallocate
from mixproof.inference.trees import tree_at, tree_expand, tree_map, tree_to
from mixproof.inference.validation import check_num_components, check_params, check_proper_prior, example_params
from mixproof.models.initial import partition

TABLE_ENTRIES = 1 << 18
"""Up to how large the table of rows, components and replicas is made in one piece: it stays in a core's cache."""
DEVICE_ENTRIES = 1 << 26
"""The same on other devices, which want large pieces: half a gibibyte."""
ROWS = 1 << 10
"""From how many rows on blocks of them are divided among replicas rather than made smaller."""


class Chains:
    """The rows, the prior, and the two draws of a sweep for B = C R replicas at once.

    Args:
        family: a family of the contract.
        x: (N, D), the data.
        prior: the family's ``Prior``, proper.
        num_components: K, or a number for each latent.
        num_chains: C.
        ladder: (R,), the powers of the likelihood of the replicas of a chain.
        generator: the only source of randomness, on the device of x.

    Raises:
        TypeError: the family has no ``draw``, or the prior is not its own.
        ValueError: the prior is improper or of another shape, or the number of components is not one.
    """

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
        self._template = tree_expand(template, self.num_replicas)
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
        params = tree_to(tree_at(self.draw_prior(), 0), torch.float64)
        prior = tree_to(self.prior, torch.float64)
        self.generator.set_state(state)
        before = self.family.log_prior(params, prior)
        for group in (name for name in params._fields if name.endswith("weights")):
            rolled = {
                name: getattr(params, name).roll(1, own[group]) for name, own in self.axes.items() if group in own
            }
            after = self.family.log_prior(params._replace(**rolled), prior)
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
        one = tree_at(self._template, 0)
        for name in self.axes:
            shape, expected = tuple(torch.as_tensor(init[name]).shape), (self.num_chains, *getattr(one, name).shape)
            if shape != expected:
                raise ValueError(f"init[{name!r}] must have shape {expected}, one start for each chain, not {shape}")
        starts = [
            check_params(self.family, one._asdict() | {name: init[name][chain] for name in self.axes})
            for chain in range(self.num_chains)
        ]
        return tree_map(lambda *values: torch.stack(values).to(self.x).repeat_interleave(len(self.ladder), 0), *starts)

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
                total = part if total is None else tree_map(torch.add, total, part)
            totals.append(total)
        stats = form.statistics(tree_map(_joined, *totals))
        return self.family.draw(params, stats, self.prior, self.generator), log_lik

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
        sums = (form.sums(number, x, part) for number, (x, part) in blocks)
        return form.statistics(reduce(partial(tree_map, torch.add), sums))

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

    def __init__(self, chains: Chains, params: Any):
        self.chains, self.params = chains, params

    def of(self, some: slice) -> _Plain:
        """Return the same of some of the replicas, for their tables and sums."""
        return _Plain(self.chains, tree_at(self.params, some))

    def table(self, number: int, x: Tensor) -> Tensor:
        """Return log p(x_n, z_n = k), shape (B, K, n), for rows x (n, D)."""
        return torch.func.vmap(self.chains.family.log_joint, (0, None))(self.params, x).mT.contiguous()

    def sums(self, number: int, x: Tensor, resp: Tensor) -> Any:
        return self.chains._statistics(self.params, x, resp.mT)

    def statistics(self, total: Any) -> Any:
        return total


class _Moments(_Plain):
    """Tables and statistics by products with the family's features, all replicas as one mixture of B K components."""

    def __init__(self, chains: Chains, params: Any, inner: Any, inner_params: Any, back: Callable[[Any], Any]):
        super().__init__(chains, params)
        self._inner, self._back = inner, back
        self._flat = tree_map(lambda value: value.flatten(0, 1), inner_params)
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
        found.params = tree_at(self.params, some)
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
        return self._back(tree_map(lambda value: value.unflatten(0, (len(self.params[0]), -1)), stats))


def _same(stats: Any) -> Any:
    return stats


def _joined(*groups: Tensor) -> Tensor:
    return groups[0] if len(groups) == 1 else torch.cat(groups)
