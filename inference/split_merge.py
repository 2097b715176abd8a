"""Split-merge moves: new allocations of the rows of two components at once, for Gibbs sampling of a fixed number.

Gibbs sampling changes the components of rows given the parameters, so that it can hardly leave an allocation in which
two components would have to change at once. Jain and Neal 2004, Journal of Computational and Graphical Statistics 13,
section 4, propose such an allocation by scans of Gibbs sampling among the rows of two components alone. Here the number
of components is fixed and one may be empty, so that a split, a merger and any other sharing out of these rows are one
move, and a proposal is drawn from all late scans of several such runs alike, so that its density is a mean over them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mixproof.inference.allocations import draw_allocations
from mixproof.inference.trees import tree_map
from mixproof.models.initial import rescale

NUM_LAUNCHES = 2
"""Runs of restricted scans, each from seeds of its own: with one, most proposals would stay in one mode."""
NUM_SCANS = 3
"""Scans before those from which the proposal is drawn."""
NUM_KEPT = 3
"""Scans from which the proposal is drawn."""


class CompleteData(Protocol):
    """A mixture of rows x (N, D) at B states at once, with powers (B,) of the likelihood or None for 1."""

    x: Tensor
    generator: torch.Generator

    def table(self, params: Any, powers: Tensor | None) -> Tensor:
        """Return log p(x_n, z_n = k | params)^power, (B, K, N)."""

    def draw(self, params: Any, resp: Tensor, powers: Tensor | None) -> Any:
        """Return parameters in proportion to p(x, z | params)^power p(params), z as 0 and 1 in resp (B, K, N)."""

    def log_marginal(self, params: Any, resp: Tensor, powers: Tensor | None) -> Tensor:
        """Return the log of the integral, (B,), of p(x, z | params)^power p(params) over the parameters."""


class Allocations(NamedTuple):
    """The components of all rows in B states, after a move."""

    resp: Tensor
    """(B, K, N), 1 for the component of a row and 0 elsewhere."""
    moved: Tensor
    """(B,), whether the move was accepted and changed the component of a row."""


def reallocate(data: CompleteData, params: Any, resp: Tensor, powers: Tensor | None) -> Allocations:
    """Propose another allocation of the rows of two components drawn at random, and accept it by Hastings's ratio.

    Let theta_1, ..., theta_M be the parameters of late scans of Gibbs sampling in which these rows may be in these two
    components only, and all other rows stay where they are. The proposal z' has the density q(z') = mean over m of
    prod_n p(z'_n | x_n, theta_m), and is accepted with probability min(1, p(x, z') q(z) / (p(x, z) q(z'))). The runs
    start from seeds among the rows of both components together, so that they do not depend on how z shares them out,
    and p(z | x) stays as it is.

    Args:
        data: the rows, and the draws of a sweep.
        params: the family's ``Params``, each field (B, ...); the draw does not depend on them.
        resp: (B, K, N), z as 0 and 1.
        powers: (B,), of the likelihood; None is 1.

    Returns:
        ``Allocations``: a draw from p(z | x)^power, the parameters integrated out, where z is one.
    """
    batch, num_components, _ = resp.shape
    if num_components == 1:
        return Allocations(resp, torch.zeros(batch, dtype=torch.bool, device=resp.device))
    uniform = torch.rand(batch, num_components, generator=data.generator, device=resp.device)
    pair = uniform.argsort(1)[:, :2]
    chosen = one_hot(pair, num_components).sum(1).to(resp)  # (B, K)
    pooled = torch.einsum("bkn,bk->bn", resp, chosen)
    allowed = torch.where(pooled[:, None] > 0, chosen[:, :, None], resp)
    tables = _launch(data, params, pair, pooled, allowed, powers)  # (M, B, K, N), log p(z_n = k | x_n, theta_m)
    which = torch.randint(len(tables), (batch,), generator=data.generator, device=resp.device)
    drawn = tables[which, torch.arange(batch, device=resp.device)]
    proposal, _ = draw_allocations(drawn, None, data.generator)

    def log_ratio(z: Tensor) -> Tensor:
        """Return log p(x, z) - log q(z), (B,)."""
        log_proposal = tables.where(z > 0, 0).sum((2, 3)).logsumexp(0) - math.log(len(tables))
        return data.log_marginal(params, z, powers) - log_proposal

    gain = log_ratio(proposal) - log_ratio(resp)
    uniform = torch.rand(gain.shape, generator=data.generator, dtype=gain.dtype, device=gain.device)
    accepted = uniform.log() < gain
    moved = accepted & (proposal != resp).flatten(1).any(1)
    return Allocations(torch.where(accepted[:, None, None], proposal, resp), moved)


def _launch(
    data: CompleteData, params: Any, pair: Tensor, pooled: Tensor, allowed: Tensor, powers: Tensor | None
) -> Tensor:
    """Return log p(z_n = k | x_n, theta_m), (M, B, K, N), of late scans restricted to allowed components (B, K, N)."""
    batch = len(allowed)
    powers = None if powers is None else powers.repeat(NUM_LAUNCHES)
    params = tree_map(lambda value: value.repeat(NUM_LAUNCHES, *[1] * (value.ndim - 1)), params)
    allowed, pooled, pair = (
        allowed.repeat(NUM_LAUNCHES, 1, 1),
        pooled.repeat(NUM_LAUNCHES, 1),
        pair.repeat(NUM_LAUNCHES, 1),
    )
    labels = pair.gather(1, _seeded_halves(data.x, pooled, data.generator))
    resp = torch.where(pooled[:, None] > 0, one_hot(labels, allowed.shape[1]).mT.to(allowed), allowed)
    barrier, tables = allowed.log(), []
    for scan in range(NUM_SCANS + NUM_KEPT):
        params = data.draw(params, resp, powers)
        table = data.table(params, powers) + barrier
        if scan >= NUM_SCANS:
            tables.append(table.log_softmax(1).unflatten(0, (NUM_LAUNCHES, batch)))
        resp, _ = draw_allocations(table, None, data.generator)
    return torch.cat(tables)


def _seeded_halves(x: Tensor, pooled: Tensor, generator: torch.Generator) -> Tensor:
    """Return 0 or 1 for each row, (B, N), as it is nearer to the first or the second of two seeds.

    The seeds are drawn by k-means++ (Arthur and Vassilvitskii 2007) among pooled rows (B, N) of x (N, D).
    """
    x = rescale(x)

    def distances(weights: Tensor) -> Tensor:
        """Return the squared distances (B, N) to a row drawn in proportion to weights (B, N), some perhaps 0."""
        seed = torch.multinomial(weights + torch.finfo(weights.dtype).tiny, 1, generator=generator)
        return torch.cdist(x[seed], x, compute_mode="donot_use_mm_for_euclid_dist")[:, 0].square()

    first = distances(pooled)
    return (distances(pooled * first) < first).long()
