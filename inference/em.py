"""Expectation-maximisation for any family of the contract (Dempster, Laird and Rubin 1977)."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.validation import (
    check_params,
    check_prior,
    check_row_weights,
    check_rows,
    data_support,
)
from mixproof.models.initial import check_num_components


class Fit(NamedTuple):
    """What EM found."""

    params: Any
    """The family's ``Params`` after the last step."""
    log_lik: Tensor
    """(num_steps,), log p(x | params), plus log p(params) under a prior, after each step; the last is at ``params``."""
    converged: bool
    """Whether the last step changed ``log_lik`` by no more than ``rtol`` of its size."""
    num_steps: int
    """The number of M-steps made."""


def em(
    family: Any,
    x: Any,
    init: Any,
    *,
    prior: Any = None,
    weights: Any = None,
    max_steps: int = 500,
    rtol: float = 1e-10,
) -> Fit:
    """Return the parameters at which EM from a start stops rising.

    Args:
        family: a family of the contract.
        x: (N, D), the data.
        init: the family's ``Params`` to start from, as from ``family.init_params``.
        prior: the family's ``Prior``; EM then climbs to a mode of the posterior. None climbs the likelihood.
        weights: (N,), how often each row counts, not negative; None counts each once.
        max_steps: the largest number of steps, at least 1.
        rtol: the relative change of the log likelihood at which to stop, not negative.

    Returns:
        A ``Fit``; reaching ``max_steps`` first is a warning and ``converged`` False.

    Raises:
        TypeError, ValueError: the data, the start, the weights or a setting are not what they must be, or a component
            has lost its last row or collapsed: the message names it.
        ArithmeticError: a step lowered the objective by more than rounding, so that ``m_step`` does not belong to
            ``log_joint``.
    """
    x = check_rows(family, x)
    try:
        params = family.Params(*(value.to(x) for value in check_params(family, init, x.shape[1])))
    except ValueError as error:
        raise ValueError(f"EM cannot start: {error}.{_no_spread(x)}") from error
    for value in (value for name, value in params._asdict().items() if name.endswith("weights")):
        check_num_components(len(value), len(x))
    row_weights = check_row_weights(weights, x)
    prior = check_prior(family, prior, params)
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, not {max_steps}")
    if not rtol >= 0:
        raise ValueError(f"rtol must not be negative, and is {rtol}")
    table = family.log_joint(params, x)
    objective = _objective(family, params, table, row_weights=row_weights, prior=prior, step=0)
    trace: list[float] = []
    for step in range(1, max_steps + 1):
        resp = table.softmax(-1)
        if row_weights is not None:
            resp = resp * row_weights[:, None]
        params = family.m_step(family.statistics(params, x, resp), prior)
        _raise_for_lost_component(params, step)
        table = family.log_joint(params, x)
        previous = objective
        objective = _objective(family, params, table, row_weights=row_weights, prior=prior, step=step)
        trace.append(objective)
        rounding = 8 * torch.finfo(x.dtype).eps * (abs(objective) + len(x))
        if objective < previous - math.sqrt(len(x)) * rounding:
            _raise_for_collapse(family, params, x, table, step)
            raise ArithmeticError(
                f"step {step} lowered the objective from {previous!r} to {objective!r}: "
                "m_step does not maximise what log_joint and log_prior declare; verify_em says which part is wrong"
            )
        if abs(objective - previous) <= rtol * abs(objective):
            _raise_for_collapse(family, params, x, table, step)
            return Fit(params, torch.tensor(trace, dtype=x.dtype), True, step)
    _raise_for_collapse(family, params, x, table, max_steps)
    warnings.warn(
        f"EM made {max_steps} steps and the last still changed the log likelihood by {objective - previous:.3g}: "
        "raise max_steps, or raise rtol if that is close enough",
        ConvergenceWarning,
        stacklevel=2,
    )
    return Fit(params, torch.tensor(trace, dtype=x.dtype), False, max_steps)


def _no_spread(x: Tensor) -> str:
    """Return the advice that a start without spread calls for, if the data are to blame."""
    constant = (x == x[0]).all(0).nonzero().flatten().tolist()
    if len(x) == 1:
        return " x has a single row, which has no spread: give a start of your own and a prior"
    return f" x is constant in column {', '.join(map(str, constant))}: drop it" if constant else ""


def responsibilities(family: Any, params: Any, x: Any) -> Tensor:
    """Return p(z_n = k | x_n, params), shape (N, K), for data x (N, D).

    Raises:
        TypeError, ValueError: the data or the parameters are not what they must be, or a row is impossible under them.
    """
    x = check_rows(family, x)
    params = family.Params(*(value.to(x) for value in check_params(family, params, x.shape[1])))
    table = family.log_joint(params, x)
    _objective(family, params, table, step=0)
    return table.softmax(-1)


def _objective(
    family: Any, params: Any, table: Tensor, *, row_weights: Tensor | None = None, prior: Any = None, step: int
) -> float:
    """Return the log likelihood, plus log prior, from the table log p(x_n, z_n = k), or say why it is not finite."""
    when = "at the start" if step == 0 else f"at step {step}"
    impossible = torch.isnan(table) | (table == torch.inf)
    if impossible.any():
        row, k = impossible.nonzero()[0].tolist()
        raise ValueError(
            f"component {k} has collapsed {when}: its spread is zero to rounding, so that the density of row {row} "
            "is not finite. Give a prior, use fewer components, or start elsewhere"
        )
    log_lik = table.logsumexp(-1)
    if (log_lik == -torch.inf).any():
        row = int((log_lik == -torch.inf).nonzero()[0])
        raise ValueError(
            f"row {row} is impossible under every component {when}: its density underflows to 0. Start from "
            "parameters under which each row has positive density, as init_params gives"
        )
    total = (log_lik if row_weights is None else log_lik * row_weights).sum()
    if prior is not None:
        total = total + family.log_prior(params, prior)
        if not torch.isfinite(total):
            raise ValueError(
                f"the log prior is {total.item()} {when}: a parameter is at the edge of the prior's support"
            )
    return total.item()


def _raise_for_collapse(family: Any, params: Any, x: Tensor, table: Tensor, step: int) -> None:
    """Raise if a component is so narrow that its density at its own rows changes with the rounding of the data."""
    support = data_support(family, x.shape[1])
    if getattr(support, "base_constraint", support) is not constraints.real:
        return
    nudged = x + torch.finfo(x.dtype).eps * x.abs().amax(0)
    moved = table.softmax(-1) * (family.log_joint(params, nudged) - table).abs()
    row, k = divmod(int(moved.argmax()), moved.shape[1])
    if not moved[row, k] < 0.5:  # what a standard deviation from the location costs
        raise ValueError(
            f"component {k} has collapsed at step {step}: its spread is below the rounding of x, so that the "
            f"density of row {row} means nothing. Give a prior, use fewer components, or start elsewhere"
        )


def _raise_for_lost_component(params: Any, step: int) -> None:
    for name, value in params._asdict().items():
        if name.endswith("weights") and not (value > 0).all():
            k = int((~(value > 0)).nonzero()[0])
            raise ValueError(
                f"component {k} lost its last row at step {step}: {name}[{k}] is {value[k].item():.3g}. "
                "Start elsewhere, use fewer components, or give a prior (with concentration above 1 where the "
                "weight itself vanished)"
            )
        if not torch.isfinite(value).all():
            k = int((~torch.isfinite(value)).nonzero()[0][0])
            raise ValueError(
                f"{name}[{k}] is not finite at step {step}: component {k} has collapsed. Start elsewhere, use fewer "
                "components, or give a prior"
            )
