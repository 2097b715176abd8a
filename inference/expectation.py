"""One pass of EM over the rows: the log likelihood and the expected sufficient statistics, at the cost of two products.

A table of log p(x_n, z_n = k) needs K numbers a row, its statistics K D^2 / 2 more work, and neither is worth keeping:
the rows go through in chunks that stay in the processor's cache, each of them turned into responsibilities, which are
summed up at once. What depends on the parameters alone is computed once. How a chunk is done is up to the family, which
the pass knows by the names of the contract and by these optional ones, on top of ``log_joint`` and ``statistics``:

``reduction(params) -> (family, params, back)``
    The table of log joint densities is that of another family at other parameters, and ``back`` maps its ``Stats``.
``features(x, center) -> (P, N)``, ``natural(params, center) -> (K, P)``,
``reach(params, center) -> (K, D)`` and ``statistics_of(moments (P, K), params, center) -> Stats``
    The family is an exponential one: its table (K, N) is natural @ features, its statistics come from the moments
    features @ responsibilities^T. Features are monomials of x - center, and |x - center| has root mean squares of at
    most ``reach`` in each component.
``prepare(params, center)``
    An object that does a chunk precisely, whatever the parameters: ``width`` numbers a row in its largest temporary,
    ``table(x) -> ((K, n), kept)``, ``sums(kept, resp (K, n))``, a tuple of tensors that add up over chunks, and
    ``statistics(sums) -> Stats``.
``additive = True``
    ``Stats`` of chunks add up to those of all rows, entry by entry.

A family with none of them goes through ``log_joint`` and ``statistics`` in one piece.

Moments about one center for all components cancel when they are moved to the components' own locations. Let A hold the
absolute values of ``natural``, and T those of ``features``. By the usual analysis of a sum of P products (Higham,
Accuracy and Stability of Numerical Algorithms, section 3.1, with the square root that Higham and Mary 2019 show for
roundings that do not conspire) an entry of the table has an error of about sqrt(P) eps A T. On average over the rows
of a component, E|T_p| is at most the feature at ``reach``, by Cauchy and Schwarz, so that the average error is at most
sqrt(P) eps c for the number c = max_k A_k . features(reach_k). For a Gaussian with factor W, W Sigma W^T = I, c is of
the order of D + |W (loc - center)|^2, times how ill-conditioned Sigma is beyond its scales. The same c at the
parameters of the *next* step bounds the relative error of their covariances, since A_k . features(reach_k) is then the
absolute error of trace(Sigma^-1 Delta Sigma) / 2. Moments are used only where sqrt(P) c is at most eps^(-1/3), before
and after, which leaves eps^(2/3), 4e-11 in float64, of an absolute error in a log density and a relative one in a
covariance; otherwise the pass is made precisely.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class Expectation(NamedTuple):
    """What a step of EM needs of the rows at given parameters."""

    log_lik: Tensor
    """(), float64, the sum over rows of weight times log p(x_n | params); not finite if a row's density is not."""
    stats: Any
    """The family's ``Stats`` under the responsibilities p(z_n = k | x_n, params) times the row weights."""


def expectation(
    family: Any, params: Any, x: Tensor, row_weights: Tensor | None = None, *, chunk: int | None = None
) -> Expectation:
    """Return the log likelihood of the rows and their expected sufficient statistics: the E-step and all its sums.

    Sums over chunks are float64 whatever the type of the data, so that neither the trace of EM nor its statistics
    depend on how many rows there are. Only statistics that hold the rows themselves keep the type of the data. A
    responsibility below the square root or so of the smallest number counts as zero (e^-650 in float64).

    Args:
        family: a family of the contract.
        params: its ``Params``, valid ones, in the type and on the device of the data.
        x: (N, D), rows in the family's support.
        row_weights: (N,), how often each row counts, not negative; None counts each once.
        chunk: the number of rows in a chunk; None takes as many as the caches hold.
    """
    if hasattr(family, "reduction"):
        inner, inner_params, _ = family.reduction(params)
        log_lik, stats = expectation(inner, inner_params, x, row_weights, chunk=chunk)
        return Expectation(log_lik, family.reduction(_in_type(params, torch.float64))[2](stats))
    if not (hasattr(family, "features") or hasattr(family, "prepare") or getattr(family, "additive", False)):
        return _in_one_piece(family, params, x, row_weights)
    center = family.moments(params)[0]
    if hasattr(family, "features"):
        moments = _Moments(family, params, center)
        # K D^2 work for products of K factors is less than for a table of D^2 / 2 features where K is far below D.
        worth = not hasattr(family, "prepare") or moments.width <= 3 * params[0].shape[0] * x.shape[1]
        if worth and moments_are_exact(family, params, center):
            found = _pass(moments, x, row_weights, chunk)
            if moments_are_exact(family, _in_type(family.m_step(found.stats), x.dtype), center):
                return found
    form = family.prepare(params, center) if hasattr(family, "prepare") else _Plain(family, params)
    return _pass(form, x, row_weights, chunk)


def moments_are_exact(family: Any, params: Any, center: Tensor) -> bool:
    """Return whether sums of features about a center (D,) lose no more than a third of the digits of their type."""
    eps = torch.finfo(center.dtype).eps
    sizes = family.features(center + family.reach(params, center), center)
    growth = (family.natural(params, center).abs() * sizes.mT).sum(-1).amax()
    return bool(math.sqrt(len(sizes)) * growth <= eps ** (-1 / 3))


class _Moments:
    """A pass by the family's features: two products with one matrix."""

    def __init__(self, family: Any, params: Any, center: Tensor):
        self.family, self.params, self.center = family, params, center
        self.natural = family.natural(_in_type(params, torch.float64), center.double()).to(center)
        self.width = self.natural.shape[-1]

    def table(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.family.features(x, self.center)
        return self.natural @ features, features

    def sums(self, features: Tensor, resp: Tensor) -> tuple[Tensor, ...]:
        return (features @ resp.mT,)

    def statistics(self, sums: tuple[Tensor, ...]) -> Any:
        return self.family.statistics_of(sums[0], _in_type(self.params, torch.float64), self.center.double())


class _Plain:
    """A pass by ``log_joint`` and ``statistics`` themselves."""

    def __init__(self, family: Any, params: Any):
        self.family, self.params = family, params
        self.width = sum(value.numel() for value in params)

    def table(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.family.log_joint(self.params, x).mT.contiguous(), x

    def sums(self, x: Tensor, resp: Tensor) -> tuple[Tensor, ...]:
        leaves, self.tree = tree_flatten(self.family.statistics(self.params, x, resp.mT))
        return tuple(leaves)

    def statistics(self, sums: tuple[Tensor, ...]) -> Any:
        return tree_unflatten(sums, self.tree)


def _pass(form: Any, x: Tensor, row_weights: Tensor | None, chunk: int | None) -> Expectation:
    """Return the sums over all chunks of rows."""
    chunk = chunk or _rows_in_cache(form.width, x.device)
    floor = 0.92 * math.log(torch.finfo(x.dtype).tiny)  # subnormal numbers are twenty times slower
    log_lik = torch.zeros((), dtype=torch.float64, device=x.device)
    total: tuple[Tensor, ...] = ()
    for start in range(0, len(x), chunk):
        table, kept = form.table(x[start : start + chunk])
        if row_weights is not None:
            table.masked_fill_(row_weights[start : start + chunk] == 0, 0)  # such a row may be impossible
        largest = table.amax(0)
        resp = torch.nn.functional.threshold(table - largest, floor, -torch.inf, inplace=True).exp_()
        normaliser = resp.sum(0)
        log_density = normaliser.log().add_(largest)
        if row_weights is None:
            resp.mul_(normaliser.reciprocal_())
        else:
            weights = row_weights[start : start + chunk]
            log_density.mul_(weights)
            resp.mul_(weights / normaliser)
        log_lik += log_density.sum(dtype=torch.float64)
        sums = form.sums(kept, resp)
        if total:
            for so_far, part in zip(total, sums, strict=True):
                so_far.add_(part)
        else:
            total = tuple(part.to(torch.float64, copy=True) for part in sums)
    return Expectation(log_lik, form.statistics(total))


def _in_one_piece(family: Any, params: Any, x: Tensor, row_weights: Tensor | None) -> Expectation:
    table = family.log_joint(params, x)
    if row_weights is not None:
        table = table.masked_fill((row_weights == 0)[:, None], 0)  # such a row may be impossible
    resp, log_density = table.softmax(-1), table.logsumexp(-1)
    if row_weights is not None:
        resp, log_density = resp * row_weights[:, None], log_density * row_weights
    return Expectation(log_density.sum(dtype=torch.float64), family.statistics(params, x, resp))


def _rows_in_cache(width: int, device: torch.device) -> int:
    """Return how many rows fill a core's cache with a temporary of so many numbers a row; a GPU takes far more."""
    cores = torch.get_num_threads() if device.type == "cpu" else 2**9
    return cores * max(2**17 // width, 128)


def _in_type(params: Any, dtype: torch.dtype) -> Any:
    return type(params)(*(value.to(dtype) for value in params))
