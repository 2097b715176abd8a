"""Relabellings of a program's exchangeable components, as maps of its unconstrained coordinates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mixproof.inference.labels import component_axes
from mixproof.inference.log_posterior import LogPosterior


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
            try:
                axes = component_axes(posterior, latent)
            except ValueError:  # its components are told apart, and have no symmetry to treat
                continue
            if axes and size > 1:
                self.axes.append((axes, size))

    @property
    def log_count(self) -> float:
        """The logarithm of the number of relabellings, log K! of one latent."""
        return sum(math.lgamma(size + 1) for _, size in self.axes)

    def all(self, u: Tensor) -> Iterator[Tensor]:
        """Yield points u (C, P) under each relabelling, the identity first."""
        options = (itertools.permutations(range(size)) for _, size in self.axes)
        for permutations in itertools.product(*options):
            numbers = [torch.tensor(permutation).expand(len(u), -1) for permutation in permutations]
            yield self.apply(u, numbers) if any(list(p) != sorted(p) for p in permutations) else u

    def random(self, u: Tensor, generator: torch.Generator) -> Tensor:
        """Return points u (C, P), each under a relabelling of its own, all equally likely."""
        return self.apply(u, [torch.rand(len(u), size, generator=generator).argsort(1) for _, size in self.axes])

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
