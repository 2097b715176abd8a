"""Draws of the components of rows, many mixtures at once."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def draw_allocations(table: Tensor, powers: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return components drawn in proportion to exp(power table), (B, K, n) of 0 and 1, and log sum_k exp, (B,).

    By inverting the distribution function of each row, in the place of the table.
    """
    if powers is not None:
        table.mul_(powers[:, None, None])
    largest = table.amax(1, keepdim=True)
    resp = table.sub_(largest).exp_()
    columns = resp.unbind(1)
    for before, column in itertools.pairwise(columns):  # as cumsum, which is slower along an inner axis
        column.add_(before)
    normaliser = columns[-1]
    log_normaliser = _log_product(normaliser, len(columns)) + largest.sum((1, 2))
    uniform = torch.rand(normaliser.shape, generator=generator, dtype=table.dtype, device=table.device)
    resp.gt_(uniform.mul_(normaliser)[:, None])  # 1 from the component drawn onwards
    normaliser.fill_(1)  # the product may round up to the normaliser
    for column, before in itertools.pairwise(columns[::-1]):
        column.sub_(before)
    return resp, log_normaliser


def _log_product(values: Tensor, bound: int) -> Tensor:
    """Return the logs, summed along the last axis, of values between 1 and bound.

    A product costs less than a logarithm; of so many at once it stays finite, with one to spare for rounding.
    """
    size = int(math.log(torch.finfo(values.dtype).max) / math.log(max(bound, 2))) - 1
    return torch.stack([part.prod(-1).log() for part in values.split(size, -1)]).sum(0)
