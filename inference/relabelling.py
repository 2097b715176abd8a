"""Relabellings of a program's exchangeable components, as maps of its unconstrained coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mixproof.inference.labels import numbering
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
    components are exchangeable, their product for several latents, and the identity alone where none are.

    Args:
        posterior: the program with its data.
    """

    def __init__(self, posterior: LogPosterior):
        self.posterior = posterior
        self.axes: list[tuple[Mapping[str, int], int]] = []
        """For each latent with exchangeable components, the axis of each site that numbers them, and K."""
        for latent, size in zip(posterior.program.latents, posterior.program.latent_sizes, strict=True):
            found = numbering(posterior, latent)
            if found.axes and found.exchangeable and size > 1:
                self.axes.append((found.axes, size))

    @property
    def log_count(self) -> float:
        """The logarithm of the number of relabellings, log K! of one latent."""
        return sum(math.lgamma(size + 1) for _, size in self.axes)

    def random(self, u: Tensor, generator: torch.Generator) -> Tensor:
        """Return points u (C, P), each under a relabelling of its own, all equally likely."""
        keys = [torch.rand(len(u), size, generator=generator, device=u.device) for _, size in self.axes]
        return self.apply(u, [key.argsort(1) for key in keys])

    def apply(self, u: Tensor, permutations: list[Tensor]) -> Tensor:
        """Return points u (C, P) renumbered: of each latent, component j is the one that was number
        permutations[c, j], (C, K)."""
        if not self.axes:
            return u
        params = dict(self.posterior.constrain(u))
        for (axes, size), permutation in zip(self.axes, permutations, strict=True):
            for site, axis in axes.items():
                value = params[site]
                index = permutation.reshape(len(u), *[1] * axis, size, *[1] * (value.ndim - axis - 2))
                params[site] = value.gather(axis + 1, index.expand_as(value))
        return self.posterior.unconstrain(params)

    def learn(self, u: Tensor) -> list[Reference]:
        """Return references to which points u (M, P) can be aligned with the least scatter that several starts find.

        Components are assigned to the reference and the reference taken from the assigned components in turn, as in
        Stephens 2000, JRSS B 62, section 4.1, with a normal law in each place.
        """
        u = u[:: max(len(u) // NUM_LEARNT, 1)]
        references = []
        for features in self._features(u):
            starts = features[:: max(len(features) // NUM_STARTS, 1)][:NUM_STARTS]
            everywhere = features.flatten(0, 1).std(0).expand(features.shape[1:])
            found = [_learn(features, Reference(start, everywhere)) for start in starts]
            references.append(min(found, key=lambda end: end[1])[0])
        return references

    def align(self, u: Tensor, references: list[Reference]) -> Tensor:
        """Return points u (M, P), each under the relabelling that agrees best with the references."""
        return self.apply(u, self._assignments(u, references))

    def is_aligned(self, u: Tensor, references: list[Reference]) -> Tensor:
        """Return which of the points u (M, P) ``align`` leaves as they are, (M,): 1 / K! of any invariant law."""
        aligned = torch.ones(len(u), dtype=torch.bool, device=u.device)
        for assignment in self._assignments(u, references):
            aligned &= (assignment == torch.arange(assignment.shape[1], device=u.device)).all(1)
        return aligned

    def _assignments(self, u: Tensor, references: list[Reference]) -> list[Tensor]:
        pairs = zip(references, self._features(u), strict=True)
        return [_assign(reference.cost(features)) for reference, features in pairs]

    def _features(self, u: Tensor) -> list[Tensor]:
        """Return what tells components apart at points u (M, P), (M, K, F) for each latent.

        These are the parameters of each component without bounds; of a simplex, whose coordinates do not belong to
        single components, the logarithms.
        """
        params = self.posterior.constrain(u)
        features = []
        for axes, size in self.axes:
            parts = []
            for site, axis in axes.items():
                value = params[site]
                free = self.posterior.coordinates.transforms[site].inv(value)
                part = free if free.ndim > axis + 1 and free.shape[axis + 1] == size else value.log()
                parts.append(part.movedim(axis + 1, 1).flatten(2) if part.ndim > 2 else part[..., None])
            features.append(torch.cat(parts, 2))
        return features


def _learn(features: Tensor, reference: Reference) -> tuple[Reference, float]:
    """Return the reference that a start leads to, and the mean cost of the points (M, K, F) aligned to it."""
    assignment = torch.empty(0)
    for _ in range(MAX_ROUNDS):
        cost = reference.cost(features)
        before, assignment = assignment, _assign(cost)
        if before.shape == assignment.shape and (before == assignment).all():
            break
        aligned = features.gather(1, assignment[..., None].expand_as(features))
        spread = aligned.std(0)
        reference = Reference(aligned.mean(0), spread.where(spread > 0, 1))
    return reference, float(cost.gather(1, assignment[:, None]).sum((1, 2)).mean())


def _assign(cost: Tensor) -> Tensor:
    """Return for each of M costs (M, j, k) which component j takes each place k, (M, K), at the least total."""
    # of the transpose the rows are places, which scipy returns in order
    found = np.stack([linear_sum_assignment(matrix)[1] for matrix in cost.mT.cpu().numpy()])
    return torch.as_tensor(found, device=cost.device)
