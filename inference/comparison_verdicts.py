"""What a comparison says in words: where its criteria disagree, and what its candidates leave open."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor

from mixproof.inference.comparison_report import (
    CRITERIA,
    best_row,
)
from mixproof.inference.comparison_study import Candidate, Row
from mixproof.inference.validation import (
    example_params,
)
from mixproof.inference.verification.report import plain


def disagreements(rows: Sequence[Row], ranking: Any) -> list[str]:
    """Return which criterion prefers which candidate, where they do not all agree, and what is as good as a draw."""
    sentences = []
    best = {name: row.name for name in CRITERIA if (row := best_row(rows, name)) is not None}
    if len(set(best.values())) > 1:
        parts = []
        for name in dict.fromkeys(best.values()):
            own = [criterion for criterion, preferred in best.items() if preferred == name]
            parts.append(f"{_prefer(own)} {name}")
        sentences.append(f"the criteria disagree: {'; '.join(parts)}")
    if ranking is not None:
        gap, error = ranking["elpd_diff"].iloc[1], ranking["dse"].iloc[1]
        if gap < 2 * error:
            sentences.append(
                f"LOO does not tell {ranking.index[0]} from {ranking.index[1]}: {gap:.1f} apart, with a standard error "
                f"of {error:.1f}"
            )
    evidences = [(row.log_evidence, row.log_evidence_standard_error or 0.0, row.name) for row in rows]
    ordered = sorted(((-value, error, name) for value, error, name in evidences if value is not None))
    if len(ordered) > 1:
        (first, first_error, best_name), (second, second_error, second_name) = ordered[:2]
        gap, error = second - first, math.hypot(first_error, second_error)
        if gap < 2 * error:
            sentences.append(
                f"the log evidences of {best_name} and {second_name} are {gap:.2f} apart with a standard error of "
                f"{error:.2f}: this run does not say which is the larger; raise num_replicates or num_moves of the "
                "evidence"
            )
    if ordered and (without := [name for value, _, name in evidences if value is None]):
        sentences.append(
            f"{', '.join(without)} {'has' if len(without) == 1 else 'have'} no evidence, and the "
            "probabilities are among the others"
        )
    return sentences


def _prefer(criteria: Sequence[str]) -> str:
    """Return criteria in a list with their verb."""
    listed = " and ".join(filter(None, [", ".join(criteria[:-1]), criteria[-1]]))
    return f"{listed} {'prefers' if len(criteria) == 1 else 'prefer'}"


def gaps(rows: Sequence[Row], candidates: Sequence[Candidate], x: Tensor) -> list[str]:
    """Return what the candidates leave open: a likelihood that falls as K grows, a best K that is the largest tried."""
    sentences = []
    families: list[tuple[Any, list[tuple[int, Row]]]] = []
    for row, candidate in zip(rows, candidates, strict=True):
        if isinstance(candidate.num_components, int):
            members = next((members for family, members in families if _same(family, candidate.family)), None)
            if members is None:
                families.append((candidate.family, members := []))
            members.append((candidate.num_components, row))
    for family, members in families:
        free = example_params(family, 1, x)[1]
        contained = any(name.endswith("weights") for name in free)  # a weight of 0 leaves a component out
        ladder = sorted(members, key=lambda member: member[0])
        known = [(size, row.log_likelihood, row.name) for size, row in ladder if row.log_likelihood is not None]
        for (few, lower, before), (many, higher, after) in itertools.pairwise(known):
            if contained and few < many and higher < lower - 1e-8 * abs(lower):
                sentences.append(
                    f"the log likelihood falls from {before} to {after}, which contains it: EM has missed "
                    "the highest maximum; raise num_starts"
                )
        largest = ladder[-1][0]
        if ladder[0][0] < largest:
            last = {row.name for size, row in ladder if size == largest}
            leaders = {name: leader.name for name in CRITERIA if (leader := best_row(rows, name)) is not None}
            best = {criterion: name for criterion, name in leaders.items() if name in last}
            for preferred in dict.fromkeys(best.values()):
                at_end = [criterion for criterion, name in best.items() if name == preferred]
                sentences.append(f"{_prefer(at_end)} {preferred}, the largest K of its family here: try larger ones")
    return sentences


def _same(left: Any, right: Any) -> bool:
    """Whether two families are one: the same module, or instances with the same settings, which may be tensors."""
    if left is right or not is_dataclass(left) or type(left) is not type(right):
        return left is right
    return bool(plain(vars(left)) == plain(vars(right)))
