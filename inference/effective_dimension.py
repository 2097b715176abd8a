"""How many numbers the data decide: the dimension of the set of densities that a mixture can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.supports import base_of

ROUNDING = 1e-11
"""The share of the largest singular value below which one is rounding."""
SPREAD = 50.0
"""How far apart locations lie: components that overlap give directions that are decided, and hardly look so."""
NUM_POINTS = 3
AT_ONCE = 1024


def effective_dimension(family: Any, posterior: LogPosterior, params: Any, *, seed: int) -> int:
    """Return the dimension of the set of densities of one row, which is that of the parameters or less.

    It is the rank, at a generic point, of the derivative of log p(x_n | params) of many rows in the P unconstrained
    coordinates (Geiger, Heckerman and Meek 1996, UAI). Weights sum to 1 and a covariance matrix is
    symmetric, so that P counts neither twice. The rank is less where parameters can be moved without moving the
    density: the location and the covariance that the two parts of a sum may pass to one another, or the components
    beyond what few binary features tell apart, at most 2^D - 1 of them. The rows are drawn from the family, so that
    how many there are in the data does not enter.

    Args:
        family: a family of the contract.
        posterior: its program with data of D features.
        params: its ``Params``; fields that the program does not draw, such as fixed weights, are taken as they are.
        seed: draws the points and the rows.
    """
    generator = torch.Generator(posterior.device).manual_seed(seed)
    size, found = posterior.size, 0

    def of_row(u: Tensor, row: Tensor) -> Tensor:
        return family.log_joint(params._replace(**posterior.coordinates(u)), row[None]).logsumexp(1)[0]

    for _ in range(NUM_POINTS):  # at each the rank is that or, where a point happens to be special, less
        parts = []
        for site, shape in posterior.coordinates.shapes.items():
            part = torch.randn(shape.numel(), generator=generator, dtype=torch.float64, device=posterior.device)
            real = base_of(posterior.program.supports[site]) is constraints.real
            parts.append(SPREAD * part if real else part)
        u = torch.cat(parts)
        at = params._replace(**posterior.constrain(u))
        alike = {name: torch.ones_like(getattr(at, name)) for name in at._fields if name.endswith("weights")}
        alike = {name: value / value.sum() for name, value in alike.items()}  # rows of every component, light ones too
        rows, _ = family.sample(at._replace(**alike), 4 * size + 32, generator)
        jacobian = torch.func.vmap(torch.func.grad(of_row), in_dims=(None, 0), chunk_size=AT_ONCE)(u, rows)
        lengths = jacobian.norm(dim=0)
        values = torch.linalg.svdvals(jacobian / lengths.where(lengths > 0, 1))
        found = max(found, int((values > ROUNDING * values[0]).sum()))
        if found == size:
            break
    return found
