"""One pass of EM over the rows: the log likelihood and the expected sufficient statistics, at the cost of two products.

A table of log p(x_n, z_n = k) needs K numbers a row, its statistics K D^2 / 2 more work, and neither is worth keeping:
the rows go through in chunks that stay in the processor's cache, each of them turned into responsibilities, which are
summed up at once. What depends on the parameters alone is computed once. How a chunk is done is up to the family, which
the pass knows by the names of the contract and by these optional ones, on top of ``log_joint`` and ``statistics``:

``reduction(params) -> (family, params, back)``
    The table of log joint densities is that of another family at other parameters, and ``back`` maps its ``Stats``.
``features(x (..., N, D), center, out=None) -> (..., P, N)``, ``natural(params, center) -> (K, P)``,
``reach(params, center) -> (K, D)`` and ``statistics_of(moments (P, K), params, center) -> Stats``
    The family is an exponential one: its table (K, N) is natural @ features, its statistics come from the moments
    features @ responsibilities^T. Features are monomials of x - center, of degree two at most, and |x - center| has
    root mean squares of at most ``reach`` in each component.
``prepare(params, center)``
    An object that does a chunk precisely, whatever the parameters: ``width`` numbers a row in its largest temporary,
    ``table(x (L, n, D), space) -> (L, K, n)`` for L lanes of rows, in memory of the ``Workspace``,
    ``sums(x, resp (L, K, n), space)``, a tuple of tensors, lanes first, that add up over lanes and chunks, and
    ``statistics(sums) -> Stats``. It may have ``sums_of(components (m,), x (m, D), resp (m,), space)``, the same sums
    in one lane over rows sorted by the component that their responsibility is of: then the pass leaves out rows that
    add nothing to a component, where these are more than half.
``additive = True``
    ``Stats`` of chunks add up to those of all rows, entry by entry.

A family with none of them goes through ``log_joint`` and ``statistics`` in one piece.

Moments about one center for all components cancel when they are moved to the components' own locations. Each of the P
products in an entry of the table is off by eps of its size, so that an entry is off by eps |natural| . |features|, and
by sqrt(P) times that if the sums round as badly as they may with roundings that do not conspire (Higham and Mary 2019,
SIAM Journal on Scientific Computing 41(5), section 3). Over the rows of a component, the average size of a feature is
at most its value at ``reach``, by Cauchy and Schwarz. So the average error is of the order of eps c, where

    c = max_k |natural_k| . features(center + reach_k).

For a Gaussian with W Sigma W^T = I, c is of the order of D + ||W (loc - center)||^2, times how ill-conditioned Sigma is
beyond its scales. And since |natural_k| . features(reach_k) at the parameters of the *next* step is no less than half
of trace(|Sigma^-1| |E[(x - center)(x - center)^T]|), eps c there is the error of the new covariance relative to itself.
Moments are used only where c is at most eps^-0.3 both before and after; this leaves an error of eps^0.7, which is 1e-11
in float64, in a log density and, relatively, in a covariance. Otherwise the pass is made precisely.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mixproof.inference.trees import tree_to

SMALL = 2**14  # numbers in a table of rows, components and features, below which preparing costs more than it saves
WIDE = 64  # features, from which on summing over all rows costs more than taking a component's own rows out
MANY = 2**21  # numbers in rows taken out, from which on their products are as fast as larger ones
MOMENTS_ERROR = 0.7  # the power of eps, relative to a variance, that sums of moments may be off by
NOTHING = 3  # the power of eps that is less than what counts beside one


class Expectation(NamedTuple):
    """What a step of EM needs of the rows at given parameters."""

    log_lik: Tensor
    """(), float64, the sum over rows of weight times log p(x_n | params); not finite if a row's density is not."""
    stats: Any
    """The family's ``Stats`` under the responsibilities p(z_n = k | x_n, params) times the row weights."""


def expectation(
    family: Any, params: Any, x: Tensor, row_weights: Tensor | None = None, *, chunk: int | None = None
) -> Expectation:
    """Return the log likelihood of the rows and their expected sufficient statistics, the E-step and its sums.

    Sums over chunks are kept and returned in float64 whatever the type of the data: in float32 the rounding of a sum
    over many rows would be larger than what a step of EM gains. Only statistics that hold the rows themselves have the
    type of the data. A responsibility near the smallest number of the type, e^-651 in float64, counts as zero. So does,
    in the sums of a Gaussian with a full covariance in many dimensions, one below eps^3 of the largest that its
    component has in the chunk: what such rows would add is less than rounding.

    Args:
        family: a family of the contract.
        params: its ``Params``, valid ones, in the type and on the device of the data.
        x: (N, D), rows in the family's support.
        row_weights: (N,), how often each row counts, not negative; None counts each once.
        chunk: the number of rows in a chunk; None takes as many as the caches hold.
    """
    if hasattr(family, "reduction"):
        inner, inner_params, _ = family.reduction(params)
        log_lik, stats = expectation(inner, tree_to(inner_params, x.dtype), x, row_weights, chunk=chunk)
        return Expectation(log_lik, family.reduction(tree_to(params, torch.float64))[2](stats))
    located = hasattr(family, "features") or hasattr(family, "prepare")
    if not located and not getattr(family, "additive", False):
        return _in_one_piece(family, params, x, row_weights)
    if chunk is None and x.numel() * params[0].shape[0] < SMALL:
        return _pass(_Plain(family, params), x, row_weights, len(x))
    if not located:
        return _pass(_Plain(family, params), x, row_weights, chunk)
    center = params.weights @ params.locs
    # With more features than this, products with K factors are less work.
    most = 2 * params[0].shape[0] * x.shape[1] if hasattr(family, "prepare") else math.inf
    if hasattr(family, "features") and len(family.features(center[None], center)) <= most:
        moments = Moments(family, params, center)
        if moments.exact:
            found = _pass(moments, x, row_weights, chunk)
            if Moments(family, tree_to(family.Params(*family.m_step(found.stats)), x.dtype), center).exact:
                return found
    form = family.prepare(params, center) if hasattr(family, "prepare") else _Plain(family, params)
    return _pass(form, x, row_weights, chunk)


class Workspace:
    """Memory that each chunk writes to again: fresh memory costs a fault a page, as slow as the arithmetic."""

    def __init__(self, like: Tensor):
        self._like = like
        self._tensors: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return the tensor of a name in a shape, with whatever it holds."""
        size = math.prod(shape)
        if name not in self._tensors or self._tensors[name].numel() < size:
            self._tensors[name] = self._like.new_empty(size)
        return self._tensors[name][:size].view(shape)


class Moments:
    """A pass by the family's features about a center (D,): two products with one matrix."""

    def __init__(self, family: Any, params: Any, center: Tensor):
        self.family, self.params, self.center = family, params, center
        self.natural = family.natural(tree_to(params, torch.float64), center.double()).to(center)
        self.width = self.natural.shape[-1]

    @property
    def growth(self) -> Tensor:
        """(K,), no less than the mean over a component's rows of the sum of sizes of the products in a log density."""
        sizes = self.family.features(self.center + self.family.reach(self.params, self.center), self.center)
        return (self.natural.abs() * sizes.mT).sum(-1)

    @property
    def exact(self) -> bool:
        """Whether sums of these features lose less than three tenths of the digits of their type."""
        return bool(self.growth.amax() <= torch.finfo(self.center.dtype).eps ** (MOMENTS_ERROR - 1))

    def table(self, x: Tensor, space: Workspace) -> Tensor:
        num_lanes, num_rows, _ = x.shape
        num_components = len(self.natural)
        features = space("features", num_lanes, self.width, num_rows)
        self.family.features(x, self.center, out=features)
        natural = self.natural.expand(num_lanes, num_components, self.width)
        return torch.bmm(natural, features, out=space("table", num_lanes, num_components, num_rows))

    def sums(self, x: Tensor, resp: Tensor, space: Workspace) -> tuple[Tensor, ...]:
        num_lanes, num_components, num_rows = resp.shape
        features = space("features", num_lanes, self.width, num_rows)
        return (torch.bmm(features, resp.mT, out=space("moments", num_lanes, self.width, num_components)),)

    def statistics(self, sums: tuple[Tensor, ...]) -> Any:
        return self.family.statistics_of(sums[0], tree_to(self.params, torch.float64), self.center.double())


class _Plain:
    """A pass by ``log_joint`` and ``statistics`` themselves, in one lane."""

    def __init__(self, family: Any, params: Any):
        self.family, self.params = family, params
        self.width = sum(value.numel() for value in params)

    def table(self, x: Tensor, space: Workspace) -> Tensor:
        return self.family.log_joint(self.params, x.flatten(0, 1)).mT.contiguous()[None]

    def sums(self, x: Tensor, resp: Tensor, space: Workspace) -> tuple[Tensor, ...]:
        leaves, self.tree = tree_flatten(self.family.statistics(self.params, x.flatten(0, 1), resp[0].mT))
        return tuple(leaf[None] for leaf in leaves)

    def statistics(self, sums: tuple[Tensor, ...]) -> Any:
        return tree_unflatten(sums, self.tree)


def _pass(form: Any, x: Tensor, row_weights: Tensor | None, chunk: int | None) -> Expectation:
    """Return the sums over all chunks of rows.

    A chunk has a lane for each core, laid out one after the other, so that an operation on all lanes hands a core the
    rows that are in its cache.
    """
    num_lanes = torch.get_num_threads() if x.device.type == "cpu" else 1
    chunk = chunk or num_lanes * _rows_in_cache(form.width, x.device)
    floor = 0.92 * math.log(torch.finfo(x.dtype).tiny)  # subnormal numbers are twenty times slower
    space = Workspace(x)
    log_lik = torch.zeros((), dtype=torch.float64, device=x.device)
    total: tuple[Tensor, ...] = ()
    # On a GPU the host would have to wait for the number of rows.
    selective = hasattr(form, "sums_of") and x.device.type == "cpu" and x.shape[1] >= WIDE
    own: list[tuple[Tensor, ...]] = []  # what counts and is not summed up yet
    for start in range(0, len(x), chunk):
        rows = x[start : start + chunk]
        lanes = rows.unflatten(0, (num_lanes if len(rows) % num_lanes == 0 else 1, -1))
        table = form.table(lanes, space)
        if row_weights is not None:
            weights = row_weights[start : start + chunk].view(len(table), 1, -1)
            table.masked_fill_(weights == 0, 0)  # such a row may be impossible
        largest = table.amax(1, keepdim=True)
        resp = torch.threshold_(table.sub_(largest), floor, -torch.inf).exp_()
        normaliser = resp.sum(1, keepdim=True)
        log_density = normaliser.log().add_(largest)
        if row_weights is None:
            resp.mul_(normaliser.reciprocal_())
        else:
            log_density.mul_(weights)
            resp.mul_(weights / normaliser)
        log_lik += log_density.sum(dtype=torch.float64)
        counted = _own(resp, start) if selective else None
        if counted is None:
            total = _added(total, form.sums(lanes, resp, space))
        else:
            own.append(counted)
        if own and (start + chunk >= len(x) or sum(len(part[0]) for part in own) * x.shape[1] >= MANY):
            total = _added(total, _sums_of(form, x, own, space))
            own = []
    return Expectation(log_lik, form.statistics(total))


def _own(resp: Tensor, start: int) -> tuple[Tensor, ...] | None:
    """Return components, rows and values of the responsibilities (L, K, n) that count, if they are less than half.

    In many dimensions most rows belong to one component, and most responsibilities are zero or next to it. What is less
    than eps^3 of the largest of its component, r, is left out. Let d be the deviation of such a row, and let
    m = d^T Sigma^-1 d. To the scatter, of the order of N_k Sigma, it would add no more than eps^3 r m Sigma. If
    m < 1 / eps, n such rows are n eps^2 of the scatter, which is less than rounding. If m is larger, the log density is
    off by more than one, and the responsibility means nothing.
    """
    table = resp.transpose(0, 1).flatten(1)
    nothing = torch.finfo(table.dtype).eps ** NOTHING * table.amax(1, keepdim=True)
    counts = ~(table <= nothing)  # a NaN counts
    if 2 * int(counts.sum()) >= counts.numel():
        return None
    components, rows = counts.nonzero(as_tuple=True)
    return components, rows + start, table[counts]


def _sums_of(form: Any, x: Tensor, own: list[tuple[Tensor, ...]], space: Workspace) -> tuple[Tensor, ...]:
    """Return the form's sums over those rows of x (N, D) that count."""
    components, rows, resp = map(torch.cat, zip(*own, strict=True))
    components, order = components.sort(stable=True)
    own_rows = torch.index_select(x, 0, rows[order], out=space("own rows", len(rows), x.shape[1]))
    return form.sums_of(components, own_rows, resp[order], space)


def _added(total: tuple[Tensor, ...], lanes: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the total, if there is one yet, with the sums of each lane added to it in float64."""
    sums = tuple(part.sum(0, dtype=torch.float64) for part in lanes)
    return tuple(a.add_(b) for a, b in zip(total, sums, strict=True)) if total else sums


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
    return max(2**20 // width, 256) * (1 if device.type == "cpu" else 2**7)
