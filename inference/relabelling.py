"""Relabellings of a program's exchangeable components, as maps of its unconstrained coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mixproof.inference.exchangeability import Exchange, exchanges, numberings
from mixproof.inference.log_posterior import LogPosterior

MAX_ROUNDS = 50
NUM_STARTS = 5
NUM_LEARNT = 1000
"""From how many points a reference is learnt at most."""


class Reference(NamedTuple):
    """What the components of one latent look like once points are aligned."""

    mean: Tensor
    """(K, F), of the features of each component: its parameters without bounds."""
    scale: Tensor
    """(K, F), their standard deviations."""

    def cost(self, features: Tensor) -> Tensor:
        """Return, for features (M, K, F), minus the log density up to a constant of component j as number k, (M, j, k),
        the features taken as normal and independent."""
        deviations = (features[:, :, None] - self.mean) / self.scale
        return deviations.square().sum(-1) / 2 + self.scale.log().sum(-1)


class Relabelling:
    """The group of relabellings under which the posterior of a program is the same: K! of them for each latent whose K
    components are exchangeable, fewer where the prior tells some apart, their product for several latents, times the
    orders in which whole latents may change places, as the two summands of a sum under one prior; and the identity
    alone where there are none.

    Args:
        posterior: the program with its data.
    """

    def __init__(self, posterior: LogPosterior):
        self.posterior = posterior
        self.axes: list[tuple[Mapping[str, tuple[int, ...]], int]] = []
        """For latents of which some components are exchangeable, the axes of each site that number them, and K."""
        self.classes: list[Tensor] = []
        """For each of these, (K,), by component, the least number of those with which it may change places."""
        self.exchanges = exchanges(posterior)
        """The orders of these latents; where there is more than one, they are all latents of the program."""
        for found in numberings(posterior):
            size = len(found.classes)
            if found.axes and (found.some_exchangeable or (size == 1 and len(self.exchanges) > 1)):
                self.axes.append((found.axes, size))
                self.classes.append(torch.tensor(found.classes, device=posterior.device))
        if len(self.axes) < len(posterior.program.latents):
            self.exchanges = [Exchange(tuple(range(len(self.axes))), {})]

    @property
    def log_count(self) -> float:
        """The logarithm of the number of relabellings, log K! of one latent."""
        sizes = [size for classes in self.classes for size in classes.bincount().tolist()]
        return math.log(len(self.exchanges)) + sum(math.lgamma(size + 1) for size in sizes)

    def random(self, u: Tensor, generator: torch.Generator) -> Tensor:
        """Return points u (C, P), each under a relabelling of its own, all equally likely."""
        keys = [torch.rand(len(u), size, generator=generator, device=u.device) for _, size in self.axes]
        orders = torch.randint(len(self.exchanges), (len(u),), generator=generator, device=u.device)
        permutations = []
        for key, classes in zip(keys, self.classes, strict=True):  # places by class, each filled at random
            places = classes.argsort(stable=True).expand_as(key)
            permutations.append(torch.empty_like(places).scatter_(1, places, (classes + key).argsort(1)))
        return self._apply(u, orders, permutations)

    def _apply(self, u: Tensor, orders: Tensor, permutations: list[Tensor]) -> Tensor:
        """Return points u (C, P) under the exchanges with numbers orders (C,), and then renumbered: of each latent,
        component j is the one that was number permutations[c, j], (C, K)."""
        if not self.axes:
            return u
        before = self.posterior.constrain(u)
        params = dict(before)
        for number, exchange in enumerate(self.exchanges):
            for site, source in exchange.sources.items():
                chosen = (orders == number).reshape(-1, *[1] * (params[site].ndim - 1))
                params[site] = torch.where(chosen, before[source], params[site])
        for (axes, size), permutation in zip(self.axes, permutations, strict=True):
            for site, axis in ((site, axis) for site, own in axes.items() for axis in own):
                value = params[site]
                index = permutation.reshape(len(u), *[1] * axis, size, *[1] * (value.ndim - axis - 2))
                params[site] = value.gather(axis + 1, index.expand_as(value))
        return self.posterior.unconstrain(params)

    def learn(self, u: Tensor) -> list[Reference]:
        """Return references to which points u (M, P) can be aligned with the least scatter that several starts find.

        Components are assigned to the references and the references taken from the assigned components in turn, as in
        Stephens 2000, JRSS B 62, section 4.1, with a normal law in each place.
        """
        if not self.axes:
            return []
        u = u[:: max(len(u) // NUM_LEARNT, 1)]
        features = self._features(u)
        spreads = [each.flatten(0, 1).std(0) for each in features]
        everywhere = [
            spread.where(spread > 0, 1).expand(each.shape[1:]) for spread, each in zip(spreads, features, strict=True)
        ]
        found = []
        for start in range(len(u))[:: max(len(u) // NUM_STARTS, 1)][:NUM_STARTS]:
            first = [Reference(each[start], scale) for each, scale in zip(features, everywhere, strict=True)]
            found.append(self._learn(features, first))
        return min(found, key=lambda end: end[1])[0]

    def _learn(self, features: list[Tensor], references: list[Reference]) -> tuple[list[Reference], float]:
        """Return the references that a start leads to, and the mean cost of points aligned to them."""
        before: list[Tensor] = []
        cost = torch.zeros(1)
        for _ in range(MAX_ROUNDS):
            orders, permutations, cost = self._best(features, references)
            choice = [orders, *permutations]
            if before and all(map(torch.equal, before, choice)):
                break
            before, references = choice, []
            for place, permutation in enumerate(permutations):
                others = torch.stack([features[exchange.order[place]] for exchange in self.exchanges])
                own = others[orders, torch.arange(len(orders), device=orders.device)]
                aligned = own.gather(1, permutation[..., None].expand_as(own))
                spread = aligned.std(0)
                references.append(Reference(aligned.mean(0), spread.where(spread > 0, 1)))
        return references, float(cost.mean())

    def align(self, u: Tensor, references: list[Reference]) -> Tensor:
        """Return points u (M, P), each under the relabelling that agrees best with the references."""
        if not self.axes:
            return u
        return self._apply(u, *self._best(self._features(u), references)[:2])

    def is_aligned(self, u: Tensor, references: list[Reference]) -> Tensor:
        """Return which of the points u (M, P) ``align`` leaves as they are, (M,): one part in ``exp(log_count)`` of any
        invariant law."""
        if not self.axes:
            return torch.ones(len(u), dtype=torch.bool, device=u.device)
        orders, permutations, _ = self._best(self._features(u), references)
        aligned = orders == 0
        for permutation in permutations:
            aligned &= (permutation == torch.arange(permutation.shape[1], device=u.device)).all(1)
        return aligned

    def _best(self, features: list[Tensor], references: list[Reference]) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return the exchange (M,), the permutation of each latent (M, K) and the cost (M,) that agree best."""
        costs, choices = [], []
        for exchange in self.exchanges:
            permutations, total = [], features[0].new_zeros(())
            for reference, place, classes in zip(references, exchange.order, self.classes, strict=True):
                cost = reference.cost(features[place]).masked_fill(classes != classes[:, None], torch.inf)
                permutations.append(_assign(cost))
                total = total + cost.gather(1, permutations[-1][:, None]).sum((1, 2))
            choices.append(permutations)
            costs.append(total)
        least = torch.stack(costs).min(0)
        points = torch.arange(len(least.indices), device=least.indices.device)
        chosen = [torch.stack(options)[least.indices, points] for options in zip(*choices, strict=True)]
        return least.indices, chosen, least.values

    def _features(self, u: Tensor) -> list[Tensor]:
        """Return what tells components apart at points u (M, P), (M, K, F) for each latent.

        These are the parameters of each component without bounds; of a simplex, whose coordinates do not belong to
        single components, the logarithms; and of a matrix of all pairs of components, its diagonal.
        """
        params = self.posterior.constrain(u)
        features = []
        for axes, _ in self.axes:
            parts = []
            for site, own in axes.items():
                value = params[site]
                part = self.posterior.coordinates.transforms[site].inv(value)
                if part.shape[1:][: own[-1] + 1] != value.shape[1:][: own[-1] + 1]:
                    part = value.clamp_min(torch.finfo(value.dtype).tiny).log()
                part = part.movedim(own[0] + 1, 1)
                for other in reversed(own[1:]):
                    part = part.diagonal(dim1=1, dim2=other + 1).movedim(-1, 1)
                parts.append(part.flatten(2) if part.ndim > 2 else part[..., None])
            features.append(torch.cat(parts, 2))
        return features


def _assign(cost: Tensor) -> Tensor:
    """Return for each of M costs (M, j, k) which component j takes each place k, (M, K), at the least total."""
    # of the transpose the rows are places, which scipy returns in order
    found = np.stack([linear_sum_assignment(matrix)[1] for matrix in cost.mT.cpu().numpy()])
    return torch.as_tensor(found, device=cost.device)
