"""Coordinates of probabilities that sum to 1, for samplers: torch's own lose those below 1e-16."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Transform, constraints
from torch.nn.functional import pad


class LogRatios(Transform):
    """Vectors (..., K - 1) to K positive numbers of sum 1, whose logarithms less that of the last one they are.

    The additive log-ratio transformation (Aitchison 1982, JRSS B 44, section 4.2). A draw from a Dirichlet law of small
    concentration has entries of any size above 0, each of which has its coordinate here. Stick-breaking, which torch
    takes, rounds what is left of the stick.
    """

    domain = constraints.real_vector
    codomain = constraints.simplex
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return pad(x, (0, 1)).softmax(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        logs = y.clamp_min(torch.finfo(y.dtype).tiny).log()
        return logs[..., :-1] - logs[..., -1:]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log |d (y_1 ... y_{K-1}) / d x| = sum over k of log y_k."""
        return pad(x, (0, 1)).log_softmax(-1).sum(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] + 1))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] - 1))
