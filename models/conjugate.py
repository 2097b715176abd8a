"""What conjugate priors share: draws of gamma, Dirichlet and beta laws from a generator, and the law of allocations."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_gamma(shape: Tensor, generator: torch.Generator) -> Tensor:
    """Return draws (...) from Gamma(shape, 1), one for each shape (...); at least the smallest normal number."""
    return torch._standard_gamma(shape, generator).clamp_min(torch.finfo(shape.dtype).tiny)


def draw_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return standard normal draws in the shape and type of a tensor, and where it lies."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def draw_uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return draws from [0, 1) in the shape and type of a tensor, and where it lies."""
    return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def draw_dirichlet(concentration: Tensor, generator: torch.Generator) -> Tensor:
    """Return draws (..., K) from Dirichlet(concentration (..., K)), inside the simplex to the last bit.

    A gamma variable of shape a is one of shape a + 1 times U^(1 / a) (Marsaglia and Tsang 2000, section 6): its
    logarithm stays finite where a is so small that the variable itself underflows.
    """
    boost = (-draw_uniform(concentration, generator)).log1p() / concentration
    weights = (draw_gamma(concentration + 1, generator).log() + boost).softmax(-1)
    return weights.clamp_min(torch.finfo(weights.dtype).tiny)


def draw_beta(ones: Tensor, zeros: Tensor, generator: torch.Generator) -> Tensor:
    """Return draws (...) from Beta(ones, zeros), inside (0, 1)."""
    probs = draw_dirichlet(torch.stack([ones, zeros], -1), generator)[..., 0]
    return probs.clamp_max(1 - torch.finfo(probs.dtype).eps / 2)


def log_allocations(counts: Tensor, concentration: Tensor) -> Tensor:
    """Return log p(z), (...), of allocations with these counts (..., K): Polya's urn of Dirichlet weights."""
    total, rows = concentration.sum(-1), counts.sum(-1)
    urns = (concentration + counts).lgamma() - concentration.lgamma()
    return total.lgamma() - (total + rows).lgamma() + urns.sum(-1)
