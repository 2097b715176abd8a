"""EM from several starts, of which the one that ends highest is kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference.dataset import Block, Dataset
from mixproof.inference.em import Fit, em, has_collapsed, has_spread
from mixproof.inference.trees import tree_at, tree_map
from mixproof.inference.validation import check_integer, check_params, check_prior

TABLE_ENTRIES = 1 << 12
DEVIATION_ENTRIES = 1 << 14
"""Up to how large N K and N K D may be for the starts to run as one batch.

Above, the table of all starts leaves the cache, and ``em``, whose pass does less for each row, is as fast or faster.
Measured as time of ten ``em`` over that of the batch, ten starts from k-means++, one thread, K = 4 (iris K = 3 and
faithful K = 2), in ``gaussian_full``, ``gaussian_diagonal``, ``bernoulli`` and ``laplace``:

=================  ======  ========  ==========  =======
data               full    diagonal  bernoulli   laplace
=================  ======  ========  ==========  =======
iris               4.5     5.0                   1.7
faithful           3.3     2.9                   2.1
N = 500, D = 2     5.1     1.9       2.4         1.8
N = 500, D = 8     5.4     1.6       2.6         1.4
N = 1000, D = 4    3.4     1.5       2.7         1.6
N = 1000, D = 8    2.6     1.0       2.2         1.4
N = 2000, D = 2    2.0     0.8       0.8         1.2
N = 2000, D = 8    2.1     0.7       1.6         1.2
N = 20000, D = 2   0.4     0.2       0.8         1.3
N = 20000, D = 8   0.6     0.1       1.1         1.1
=================  ======  ========  ==========  =======

``em`` spends about a millisecond of a step on other things than the rows, and the batch does so once for all starts.
"""


class Restarts(NamedTuple):
    """What EM found from several starts."""

    best: Fit
    """From the start that ended highest, the first of equals: what ``em`` gives from there, to rounding."""
    log_lik: Tensor
    """(S,), log p(x | params), plus log p(params) under a prior, where each start ended; NaN where it failed."""
    failures: dict[int, str]
    """The sentence that says why, for each start that failed, by its number."""


def em_restarts(
    family: Any,
    x: Any,
    inits: Sequence[Any],
    *,
    prior: Any = None,
    weights: Any = None,
    max_steps: int = 500,
    rtol: float = 1e-10,
    accelerate: Literal["anderson"] | None = None,
    missing: bool = False,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Restarts:
    """Run EM from each of several starts, and return the best end and how the others fared.

    Small problems run as one batch, in which a step costs little more for all starts than for one; each start leaves it
    as it ends, and one that fails disturbs no other. All others run one after another.

    Args:
        family: a family of the contract.
        x: (N, D), the data, as ``em`` takes them.
        inits: S starts, the family's ``Params`` each, at least one.
        prior: the family's ``Prior``, or None.
        weights: (N,), how often each row counts, as ``em`` takes them; None counts each once.
        max_steps: the largest number of steps from each start, at least 1.
        rtol: the relative change of the log likelihood at which a start stops, finite and not negative.
        accelerate: ``"anderson"`` or None, as for ``em``.
        missing: whether NaN in x marks an entry that is missing at random.
        device: where to compute; None computes where x lies.
        progress: whether to show the steps on stderr, where the starts run one after another.

    Returns:
        ``Restarts``; that the best start reached ``max_steps`` first is a warning and its ``converged`` False.

    Raises:
        TypeError, ValueError: the data, the weights or a setting are not what they must be, or every start failed: the
            message is that of the last.
        ArithmeticError: a step lowered the objective by more than rounding.
    """
    check_integer(max_steps, "max_steps", 1)
    if len(inits) == 0:
        raise ValueError("inits is empty: give at least one start")
    rows = Dataset(family, x, weights, device=device, missing=missing)
    ends: dict[int, _End] = {}
    if rows.in_memory and accelerate is None and not missing and max_steps > 1 and 0 <= rtol < math.inf:
        ends = _run_as_batch(family, next(iter(rows)), inits, prior, max_steps, rtol)
    run = partial(
        em,
        family,
        x,
        prior=prior,
        weights=weights,
        rtol=rtol,
        accelerate=accelerate,
        missing=missing,
        device=device,
        progress=progress,
    )
    log_lik = torch.full((len(inits),), math.nan, dtype=torch.float64)
    fits: dict[int, Fit] = {}
    failures: dict[int, str] = {}

    def settle(number: int) -> None:
        try:
            fits[number] = _climb(run, inits[number], ends.get(number), max_steps)
            log_lik[number] = fits[number].log_lik[-1]
        except ValueError as error:
            failures[number] = str(error)
            log_lik[number] = math.nan

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for number in range(len(inits)):
            if number in ends:
                log_lik[number] = ends[number].trace[-1]
            else:
                settle(number)
        while len(failures) < len(inits):
            survivors = [number for number in range(len(inits)) if number not in failures]
            best = max(survivors, key=lambda number: log_lik[number].item())
            if best in fits:
                break
            settle(best)
    if len(failures) == len(inits):
        raise ValueError(failures[len(inits) - 1])
    if not fits[best].converged:
        warnings.warn(
            f"the best start has not converged after {max_steps} steps: raise max_steps, or rtol if this is enough",
            ConvergenceWarning,
            stacklevel=2,
        )
    return Restarts(fits[best], log_lik, failures)


class _End(NamedTuple):
    """How a start left the batch, at rest or after the last step that it may make."""

    before: Any
    """Its ``Params`` before the last step."""
    trace: list[float]
    """The objective after each step, the last included."""


def _climb(run: Callable[..., Fit], init: Any, end: _End | None, max_steps: int) -> Fit:
    """Return what EM gives from a start: the batch's steps and the last by ``em``, which checks where that leads.

    Where it fails, so does ``em`` all the way, whose sentence has the step's own number.
    """
    if end is not None:
        trace = end.trace[:-1]
        try:
            fit = run(end.before, max_steps=max_steps - len(trace))
        except ValueError:
            pass
        else:
            log_lik = torch.cat([fit.log_lik.new_tensor(trace), fit.log_lik])
            return Fit(fit.params, log_lik, fit.converged, len(log_lik))
    return run(init, max_steps=max_steps)


def _run_as_batch(
    family: Any, block: Block, inits: Sequence[Any], prior: Any, max_steps: int, rtol: float
) -> dict[int, _End]:
    """Return the ends of the starts that ran as one batch and did not fail; of none where a batch does not pay."""
    x, row_weights = block.x, block.weights
    starts = {}
    for number, init in enumerate(inits):
        try:
            params = check_params(family, init, x.shape[1])
        except ValueError:  # em words it
            continue
        starts[number] = family.Params(*(value.to(x) for value in params))
    shapes = {tuple(value.shape for value in params) for params in starts.values()}
    if len(starts) < 2 or len(shapes) > 1 or x.dtype != torch.float64:
        return {}
    first = next(iter(starts.values()))
    size = math.prod(len(value) for name, value in first._asdict().items() if name.endswith("weights"))
    if len(x) * size > TABLE_ENTRIES or x.numel() * size > DEVIATION_ENTRIES:
        return {}
    prior = check_prior(family, prior, first)

    def evaluate(params: Any) -> tuple[Tensor, Any]:
        table = family.log_joint(params, x)
        if row_weights is not None:
            table = table.masked_fill((row_weights == 0)[:, None], 0)  # such a row may be impossible
        log_density = table.logsumexp(-1)
        resp = (table - log_density[:, None]).exp()
        if row_weights is not None:
            log_density, resp = log_density * row_weights, resp * row_weights[:, None]
        objective = log_density.sum()
        if prior is not None:
            objective = objective + family.log_prior(params, prior)
        return objective, family.Params(*family.m_step(family.statistics(params, x, resp), prior))

    step_of_all = torch.func.vmap(evaluate)
    numbers = list(starts)
    traces: dict[int, list[float]] = {number: [] for number in numbers}
    points = tree_map(lambda *values: torch.stack(values), *starts.values())
    before, last = points, torch.full((len(numbers),), -math.inf, dtype=x.dtype, device=x.device)
    least = rtol + 16 * torch.finfo(x.dtype).eps  # what rounding hides, em itself decides
    spread = has_spread(family, x.shape[1])
    ends = {}
    for step in range(max_steps + 1):
        try:
            objective, images = step_of_all(points)
        except RuntimeError:  # the family branches on values, which vmap does not take
            return {}
        change, rounding = objective - last, least * objective.abs()
        sound = torch.isfinite(objective) & (change >= -rounding)
        at_rest = change.abs() <= rounding if step < max_steps else torch.ones_like(sound)
        goes_on = sound & ~at_rest
        for name, value in images._asdict().items():
            valid = value > 0 if name.endswith("weights") else torch.isfinite(value)
            goes_on &= valid.flatten(1).all(1)
        ending, staying = (mask.tolist() for mask in (sound & at_rest, goes_on))
        for i, value in enumerate(objective.tolist()):
            if step > 0:
                traces[numbers[i]].append(value)
            if ending[i] and not (spread and has_collapsed(family, tree_at(points, i), block)):
                ends[numbers[i]] = _End(tree_at(before, i), traces[numbers[i]])
        if not all(staying):
            numbers = [number for number, stays in zip(numbers, staying, strict=True) if stays]
            points, images = tree_at(points, goes_on), tree_at(images, goes_on)
            objective = objective[goes_on]
        if not numbers:
            break
        before, points, last = points, images, objective
    return ends
