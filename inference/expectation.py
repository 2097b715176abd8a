"""One pass of EM over rows in memory: the log likelihood and the expected sufficient statistics."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Expectation(NamedTuple):
    log_lik: Tensor
    stats: Any


def expectation(family: Any, params: Any, x: Tensor, row_weights: Tensor | None = None) -> Expectation:
    table = family.log_joint(params, x)
    log_lik = table.logsumexp(-1)
    resp = table.softmax(-1)
    if row_weights is not None:
        resp = resp * row_weights[:, None]
        log_lik = log_lik * row_weights
    return Expectation(log_lik.sum(), family.statistics(params, x, resp))
