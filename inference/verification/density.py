"""Densities: one integrates to one, and agrees with the sampler of the same law.

A density is one with respect to Lebesgue measure in the continuous columns, to counting measure in the discrete ones,
and to their sum in a column of atoms beside a density. A finite support is summed exactly. In up to three dimensions a
grid is summed, with the error read off from coarser grids within it. In any dimension the integral is a Monte Carlo
average under a proposal of heavy tails, fitted to a pilot sample; the same proposal gives expectations of bounded
functions and distribution functions of random projections, which are compared with those of the sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid as log_sigmoid

from mixproof.inference.validation import check_probability
from mixproof.inference.verification.goodness_of_fit import (
    bridge,
    distribution_function_agrees,
    expectations_agree,
    frequencies_agree,
    projections_agree,
)
from mixproof.inference.verification.importance import effective_size, proposal, sampled_integral
from mixproof.inference.verification.moments import Sampler, draw
from mixproof.inference.verification.quadrature import GRID, DensityError, LogProb, grid_integral, heights, sums_to_one
from mixproof.inference.verification.report import Check, Report, asserting, conclude

Column = Literal["continuous", "discrete"] | Sequence[float]
NUM_SAMPLES = 2**16
NUM_PILOT = 2**14
SMALLEST_EFFECTIVE_SIZE = 5000
"""How many draws the proposal's weighted ones must be worth for averages under them to be near normal."""
SMALLEST_OVERLAP = 1000
"""How many draws both sides of a bridge must be worth, else law and proposal are too far apart to tell anything."""
REPEATS = 8
"""So many equal draws are an atom: continuous ones in single precision repeat two or three times."""


def verify_density(
    log_prob: LogProb,
    sample: Sampler,
    *,
    support: Tensor | None = None,
    columns: Sequence[Column] | None = None,
    cdf: Callable[..., Tensor] | None = None,
    seed: int,
    false_alarm: float = 1e-6,
    num_samples: int = NUM_SAMPLES,
    subject: str | None = None,
) -> Report:
    """Try to refute that a log density is normalised and belongs to a sampler.

    What is not seen: atoms of probability below about 8 / ``num_samples``; mass that neither the sampler nor the
    proposal ever reaches; errors of the law below about 5 / sqrt(``num_samples``) in the probability of a half-space;
    on a finite support or a grid the normalisation is tested to rounding or to what the grid resolves, else within
    the Monte Carlo error that the report states.

    Args:
        log_prob: of points (N, D) returns their log densities (N,), or log probabilities on a finite support. It must
            be minus infinity (not an error, not NaN) where the density vanishes.
        sample: ``sample(num_samples, generator)`` returns independent draws (N, D), or (N,) for a law on the line.
        support: all points (M, D) of a finite support; None for a density.
        columns: one statement for each column, None if all are ``"continuous"``: ``"discrete"`` for whole numbers,
            finitely many or not, where the density is with respect to counting measure; the list of the atoms for a
            column that is continuous elsewhere, such as ``[0.0]`` for a zero-inflated one, where ``log_prob`` counts
            probability at the atoms and density elsewhere.
        cdf: the distribution function, where known: on the line ``cdf(x)`` of points (N,) returns P(X <= x), in more
            dimensions ``cdf(x, direction)`` returns P(direction . X <= x) for a direction (D,).
        seed: of the draws.
        false_alarm: the probability of refuting a right claim, shared by the checks.
        num_samples: how many draws of the sampler, and how many of the proposal.
        subject: the claim in words, for the report.

    Returns:
        A report; undecided where the sampler is not finite, a continuous column has atoms that were not stated, or the
        proposal covers too little of the law.

    Raises:
        ValueError: the support has repeated points or is given beside ``columns``, ``false_alarm`` is no probability,
            the sampler does not return (N, D), or ``columns`` does not fit its draws.
    """
    if support is not None and columns is not None:
        raise ValueError("a finite support is discrete: give columns only without a support")
    check_probability(false_alarm, "false_alarm")
    subject = subject or "the density"
    generator = torch.Generator().manual_seed(seed)
    pilot = draw(sample, NUM_PILOT, generator)  # apart, so that what is fitted to it is independent of the draws
    draws = draw(sample, num_samples, generator)
    if not (pilot.isfinite().all() and draws.isfinite().all()):
        nan = float("nan")
        return conclude(subject, [Check("finite draws", False, nan, nan, detail="the sampler is not finite")], seed)
    share = false_alarm / 6  # of the tests that can alarm by chance
    extra = []
    if cdf is not None:
        extra.append(distribution_function_agrees(cdf, draws, generator=generator, false_alarm=share))
    try:
        if support is None:
            checks = _continuous_or_infinite(log_prob, pilot, draws, columns, generator, share)
        else:
            points = support.reshape(len(support), -1).to(torch.float64)
            left = false_alarm - share * len(extra)
            checks = [sums_to_one(log_prob, points), frequencies_agree(log_prob, draws, points, false_alarm=left)]
    except DensityError as error:
        found = {"points": error.points}
        checks = [Check("log_prob", False, float("nan"), 0.0, counterexample=found, detail=str(error))]
    return conclude(subject, checks + extra, seed)


def _continuous_or_infinite(
    log_prob: LogProb,
    pilot: Tensor,
    draws: Tensor,
    columns: Sequence[Column] | None,
    generator: torch.Generator,
    share: float,
) -> list[Check]:
    """Return the checks of a law without a finite support, each test with its share of the false alarms."""
    kinds = fitting_columns(columns, pilot, draws)
    repeated = no_atoms(draws, kinds)
    if not repeated.passed:
        return [repeated]
    summed = grid_integral(log_prob, draws, columns=kinds) if draws.shape[1] in GRID else None
    checks = [] if summed is None else [summed]
    if all(isinstance(kind, str) and kind == "discrete" for kind in kinds):
        seen = torch.unique(pilot, dim=0)
        checks.append(frequencies_agree(log_prob, draws, seen, complete=False, false_alarm=share))
    log_proposal, points = proposal(pilot, len(draws), generator, columns=kinds)
    log_weights = heights(log_prob, points) - log_proposal(points)
    log_ratios = heights(log_prob, draws) - log_proposal(draws)
    bridged = bridge(log_ratios, log_weights, false_alarm=share)
    options: dict[str, Any] = {"generator": generator, "false_alarm": share}
    effective = effective_size(log_weights)
    if effective >= SMALLEST_EFFECTIVE_SIZE:
        integral = sampled_integral(log_weights, false_alarm=share)
        expectations = expectations_agree(pilot, draws, points, log_weights, **options)
        return [
            *checks,
            bridged,
            integral,
            expectations,
            projections_agree(pilot, draws, points, log_weights, **options),
        ]
    detail = f"the proposal's draws are worth only {effective:.0f}: law and normalisation were not tested apart"
    checks.append(bridged._replace(detail=detail))
    checks.append(expectations_agree(pilot, draws, points, log_weights, log_ratios=log_ratios, **options))
    overlap = min(effective_size(side) for side in (log_sigmoid(-log_ratios), log_sigmoid(log_weights)))
    if overlap < SMALLEST_OVERLAP:
        nan, detail = float("nan"), f"the density and the proposal share draws worth only {overlap:.0f}"
        checks.append(Check("overlap with the proposal", False, nan, nan, detail=detail))
    return checks


def fitting_columns(columns: Sequence[Column] | None, *samples: Tensor) -> list[Any]:
    """Return what each column is, atoms as a sorted tensor, or say why samples do not fit it.

    Args:
        columns: as in ``verify_density``.
        samples: draws (N, D), each.

    Raises:
        ValueError: there is not one statement for each column, or a discrete column holds other than whole numbers.
    """
    dim = samples[0].shape[1]
    found: list[Any] = ["continuous"] * dim if columns is None else list(columns)
    if len(found) != dim:
        raise ValueError(f"columns has {len(found)} entries, the draws have {dim} columns")
    for j, column in enumerate(found):
        if isinstance(column, str) and column not in ("continuous", "discrete"):
            raise ValueError(f"a column is 'continuous', 'discrete' or a list of atoms, not {column!r}")
        if not isinstance(column, str):
            found[j] = torch.as_tensor(column, dtype=torch.float64).reshape(-1).unique()
        if column == "discrete" and any((sample[:, j] != sample[:, j].round()).any() for sample in samples):
            raise ValueError(f"column {j} is not of whole numbers: rescale it, or give a finite support")
    return found


def no_atoms(draws: Tensor, columns: Sequence[Any]) -> Check:
    """Check that values of draws do not repeat, but for discrete columns and stated atoms.

    Args:
        draws: (N, D).
        columns: D statements, as ``fitting_columns`` returns them.

    Returns:
        A check; where it fails its error is NaN, as nothing was measured of the density.
    """
    name, nan = "no other atoms", float("nan")
    for j, column in enumerate(columns):
        if isinstance(column, str) and column == "discrete":
            continue
        values = draws[:, j] if isinstance(column, str) else draws[~torch.isin(draws[:, j], column), j]
        found, counts = values.unique(return_counts=True)
        if len(counts) and int(counts.max()) >= REPEATS:
            value, times = float(found[counts.argmax()]), int(counts.max())
            detail = f"column {j} has {times} of {len(draws)} draws at {value:.8g}: state its atoms in columns"
            return Check(name, False, nan, nan, detail=detail)
    return Check(name, True, 0.0, 0.0)


assert_density = asserting(verify_density)
