"""A printed formula as a claim: what it says, how it is checked, and what verdict the evidence must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from mixproof.inference.verification.report import Report, conclude

Verification = Callable[..., Report]  # of the keyword ``seed``
Verdict = Literal["holds", "refuted as printed", "holds if", "illegible", "refuted", "undecided"]


@dataclass(frozen=True)
class Problem:
    """One problem of the sheet."""

    id: str
    """``P1`` to ``P7``; ``E`` for the end-to-end claims."""
    title: str
    statement: str
    """What the problem asks, in markdown with LaTeX between dollar signs."""


@dataclass(frozen=True)
class Claim:
    """A formula that somebody printed.

    With a ``condition``, ``check`` must hold under it and ``without`` must be refuted: then the verdict is ``holds
    if``. Where ``check`` is refuted, ``corrected`` must hold: then it is ``refuted as printed``. Without ``check`` it
    is ``illegible``.
    """

    id: str
    """Problem, running number and transcription, e.g. ``P3.12a``."""
    says: str
    """The step in words, one sentence of markdown."""
    formula: str
    """As the transcription prints it, LaTeX."""
    expected: Verdict
    """The verdict that the checks must give."""
    check: Verification | None = None
    """Tries to refute the formula as printed, under ``condition`` where there is one."""
    condition: str = ""
    """What the sheet does not state, and the formula needs."""
    without: Verification | None = None
    """Refutes the formula where the condition fails."""
    correction: str = ""
    """The corrected formula, LaTeX."""
    corrected: Verification | None = None
    """Tries to refute the correction."""
    note: str = ""
    """What is lost or odd, and whether it matters to the end result; markdown."""

    @property
    def problem(self) -> str:
        """The id of the problem it belongs to."""
        return self.id.split(".")[0]

    @property
    def source(self) -> str:
        """The transcription, ``a`` or ``b``; empty for the end-to-end claims, which neither prints."""
        return self.id[-1] if self.id[-1] in "ab" and self.problem != "E" else ""


@dataclass(frozen=True)
class Outcome:
    """A claim with the verdict that its checks gave."""

    claim: Claim
    verdict: Verdict
    reports: tuple[Report, ...]
    """Of ``check``, then of ``without`` or ``corrected``."""
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the verdict is the expected one."""
        return self.verdict == self.claim.expected


def both(claim: Claim) -> list[Claim]:
    """Return the claim once for each transcription: the id ``P2.1`` becomes ``P2.1a`` and ``P2.1b``."""
    return [replace(claim, id=f"{claim.id}{source}") for source in "ab"]


def misprinted(claim: Claim, formula: str, check: Verification, note: str) -> list[Claim]:
    """Return a claim of transcription a, and transcription b's misprint of it, which the former corrects.

    Args:
        claim: transcription a's, which holds.
        formula: as transcription b prints it, LaTeX.
        check: tries to refute that.
        note: what is lost or odd there, and whether it matters to the end result; markdown.
    """
    wrong = replace(
        claim, id=f"{claim.id[:-1]}b", formula=formula, check=check, note=note, expected="refuted as printed"
    )
    return [claim, replace(wrong, condition="", without=None, correction=claim.formula, corrected=claim.check)]


def all_of(*verifications: Verification) -> Verification:
    """Return the verification that makes several and holds if all do."""

    def verify(*, seed: int) -> Report:
        reports = [verification(seed=seed) for verification in verifications]
        merged = conclude(reports[0].subject, [check for report in reports for check in report.checks], seed)
        rejected = [report for report in reports if not report.ok]
        return replace(merged, verdict=rejected[0].verdict if rejected else "holds")

    return verify
