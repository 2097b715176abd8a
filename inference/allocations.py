"""Draws of the components of rows, many mixtures at once."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_allocations(table: Tensor, powers: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return components drawn in proportion to exp(power table), (B, K, n) of 0 and 1, and log sum_k exp, (B,).

    By inverting the distribution function of each row, in the place of the table.
    """
    if powers is not None:
        table.mul_(powers[:, None, None])
    largest = table.amax(1, keepdim=True)
    cumulated = table.sub_(largest).exp_()
    for k in range(1, table.shape[1]):  # as cumsum, which is slower along an inner axis
        cumulated[:, k] += cumulated[:, k - 1]
    normaliser = cumulated[:, -1]
    log_normaliser = normaliser.log().add_(largest[:, 0]).sum(-1)
    uniform = torch.rand(normaliser.shape, generator=generator, dtype=table.dtype, device=table.device)
    resp = cumulated.gt_(uniform.mul_(normaliser)[:, None])  # 1 from the component drawn onwards
    resp[:, -1] = 1  # the product may round up to the normaliser
    for k in range(table.shape[1] - 1, 0, -1):
        resp[:, k] -= resp[:, k - 1]
    return resp, log_normaliser
