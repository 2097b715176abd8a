"""What conjugate priors share: draws from a generator, the law of allocations, and what data say of their scale."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mixproof.models.initial import check_num_components, check_rows


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


def log_urn(counts: Tensor, concentration: Tensor) -> Tensor:
    """Return log p(z = k), (..., K), of the next allocation after these counts (..., K): Polya's urn."""
    after = concentration + counts
    return after.log() - after.sum(-1, keepdim=True).log()


def log_student(squares: Tensor, size: int, shape: Tensor, rate: Tensor | float, strength: Tensor) -> Tensor:
    """Return the log density of a row from N(loc, v (1 + 1 / strength) I), v ~ InverseGamma(shape, rate) unknown.

    Murphy 2007, Conjugate Bayesian analysis of the Gaussian distribution, equation 110, in ``size`` features.

    Args:
        squares: (...), the squared distance of the row from loc.
        size: of the row.
        shape: (...), of the law of v.
        rate: (...), of the law of v.
        strength: (...), from how many rows loc is known.
    """
    scale = 2 * rate * (1 + 1 / strength)
    after = shape + size / 2
    return after.lgamma() - shape.lgamma() - size / 2 * (math.pi * scale).log() - after * (squares / scale).log1p()


class DataScale(NamedTuple):
    """What the weakly informative priors take from the data: Fraley and Raftery 2007, sections 3.1 and 3.2.

    The K components share the volume of the data between them: the mean covariance within a component is S / K^(2 / D),
    on D + 2 degrees of freedom, the fewest for which there is a mean. Locations are known as from 0.01 rows of a
    component, so that they scatter ten times as far as its rows do. The law of one variance is then the same in each
    Gaussian family, and families differ in the evidence by their shapes alone. Weights are uniform on the simplex.

    Such a prior hardly moves a mode, unless outliers, which enter S, set the scale. The evidence depends on it:
    locations a hundredfold more exact raise it by log 10 for each location and feature. See how conclusions depend on
    the prior.
    """

    loc: Tensor  # (D,), the mean of the rows
    covariance: Tensor  # (D, D), S, with divisor N - 1
    shrinkage: Tensor  # (), K^(-2 / D)


def data_scale(x: Tensor, num_components: int) -> DataScale:
    """Return the location and the scale of rows x (N, D) for a prior of K components.

    Raises:
        TypeError: x is not a floating tensor, or the number of components is not an integer.
        ValueError: x is not a finite matrix, the number of components is below 1, there is only one row, or a column is
            constant: no scale can be read off.
    """
    check_rows(x)
    num_components = check_num_components(num_components)
    if len(x) < 2:
        raise ValueError("one row says nothing of the scale of the data: give a prior of your own")
    constant = (x == x[0]).all(0)
    if constant.any():
        raise ValueError(f"column {int(constant.nonzero()[0])} of x is constant: drop it, or give a prior of your own")
    loc = x.mean(0)
    centred = x - loc
    shrinkage = loc.new_tensor(num_components) ** (-2 / x.shape[1])
    return DataScale(loc, centred.mT @ centred / (len(x) - 1), shrinkage)
