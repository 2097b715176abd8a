"""What a verification returns: checks, gathered into a report with one verdict."""

from __future__ import annotations

import functools
import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec

import numpy as np
import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

Arguments = ParamSpec("Arguments")

ACCEPTED = frozenset({"holds", "exact EM", "MAP-EM", "generalised EM"})
"""The verdicts of claims that survived."""
MEANING = {
    "exact EM": "both steps agree with the program to rounding, and the M-step maximises Q",
    "MAP-EM": "both steps agree with the program to rounding, and the M-step maximises Q + the program's log prior",
    "generalised EM": "the M-step raises Q without maximising it, and rests only where nothing is left to climb",
    "wrong E-step": "the responsibilities are not p(z | x, params) of this program",
    "wrong M-step": "the parameters returned do not maximise Q, nor Q + log prior, nor climb to a place of rest",
    "wrong report": "the log likelihood reported is not that of the parameters",
}
"""What the verdicts on an EM derivation say."""
PASSED = (
    "Agreement at random points to rounding refutes any wrong analytic step with probability one, up to the tolerance. "
    "It is not a proof."
)


class Check(NamedTuple):
    """The outcome of one attempt to refute a claim."""

    name: str
    """What was checked, in a few words."""
    passed: bool
    """Whether the claim survived: the error is within the tolerance, or the p-value above its share of the budget."""
    error: float
    """The scale-free discrepancy that was measured; NaN where it could not be measured."""
    tolerance: float
    """The largest error that rounding, or the computed Monte Carlo error, explains."""
    p_value: float | None = None
    """Of a Monte Carlo check: the probability of an error at least this large if the claim holds; else None."""
    counterexample: Mapping[str, Any] | None = None
    """Where the claim was refuted: the arguments by name, and the claimed and the actual value."""
    detail: str = ""
    """What a person should know beside the numbers."""


def blamed(checks: Sequence[Check]) -> Check | None:
    """Return the first failed check of an M-step that names a site, or None where none does."""
    return next((check for check in checks if not check.passed and "site" in (check.counterexample or {})), None)


class Refuted(AssertionError):
    """A claim did not survive; the message is the whole report."""


@dataclass(frozen=True)
class Report:
    """The verdict on one claim, with the checks behind it."""

    subject: str
    """The claim, in words or as a formula."""
    verdict: str
    """``holds``, ``refuted`` or ``undecided``; for an EM derivation one of the verdicts of ``verify_em``."""
    checks: tuple[Check, ...]
    """Every check that was made, in order."""
    seed: int
    """The seed that reproduces the report."""
    hints: tuple[str, ...] = ()
    """Changes that were made, one at a time, and each measured to mend all."""
    smallest: str = ""
    """The smallest counterexample that was found, as Python to run; empty where there is none."""

    @property
    def ok(self) -> bool:
        """Whether the claim survived every check."""
        return self.verdict in ACCEPTED

    @property
    def meaning(self) -> str:
        """What the verdict on an EM derivation says, in one or two sentences; empty for the other verbs."""
        says = MEANING.get(self.verdict, "")
        return f"{says}. {PASSED}" if says and self.ok else f"{says}." if says else ""

    def raise_for_refuted(self) -> Report:
        """Return the report itself, or raise ``Refuted`` with the whole report unless the claim survived."""
        if not self.ok:
            raise Refuted(str(self))
        return self

    def __rich__(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for column in ("check", "result", "error", "tolerance", "p-value"):
            table.add_column(column, justify="left" if column in ("check", "result") else "right")
        notes = []
        for check in self.checks:
            outcome = Text("passed", "green") if check.passed else Text("FAILED", "bold red")
            p_value = "" if check.p_value is None else f"{check.p_value:.2g}"
            table.add_row(Text(check.name), outcome, f"{check.error:.2g}", f"{check.tolerance:.2g}", p_value)
            if check.detail:
                notes.append(Text(f"{check.name}: {check.detail}"))
            if check.counterexample is not None:
                lines = [f"  {name} = {_short(value)}" for name, value in check.counterexample.items()]
                notes.append(Text("\n".join([f"{check.name}, counterexample:", *lines])))
        title = Text.assemble((self.subject, "bold"), ": ", (self.verdict, "green" if self.ok else "bold red"))
        notes += [Text(f"hint, measured: {hint}", "bold") for hint in self.hints]
        if self.smallest:
            notes.append(Text(f"smallest counterexample found, to run:\n\n{self.smallest}"))
        return Group(title, *([Text(self.meaning)] if self.meaning else []), table, *notes)

    def __str__(self) -> str:
        console = Console(width=120, color_system=None, force_terminal=False, force_jupyter=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain Python values, tensors as nested lists."""
        return {
            "subject": self.subject,
            "verdict": self.verdict,
            "ok": self.ok,
            "seed": self.seed,
            "meaning": self.meaning,
            "hints": list(self.hints),
            "smallest": self.smallest,
            "checks": [{name: plain(value) for name, value in check._asdict().items()} for check in self.checks],
        }

    def to_json(self) -> str:
        """Return the report as strict JSON; non-finite numbers are the strings ``NaN``, ``Infinity``, ``-Infinity``."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_html(self) -> str:
        """Return the report as an HTML fragment: a heading, a table of the checks, and the counterexamples."""
        rows = "".join(
            f"<tr class='{'passed' if check.passed else 'failed'}'><td>{html.escape(check.name)}</td>"
            f"<td>{'passed' if check.passed else 'failed'}</td><td>{check.error:.2g}</td><td>{check.tolerance:.2g}</td>"
            f"<td>{'' if check.p_value is None else f'{check.p_value:.2g}'}</td>"
            f"<td>{html.escape(check.detail)}</td></tr>"
            for check in self.checks
        )
        head = "".join(f"<th>{name}</th>" for name in ("check", "result", "error", "tolerance", "p-value", "detail"))
        return (
            f"<section class='report'><h4>{html.escape(self.subject)}: {html.escape(self.verdict)}</h4>"
            f"{f'<p>{html.escape(self.meaning)}</p>' if self.meaning else ''}"
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
            f"{''.join(_counterexample(check) for check in self.checks if check.counterexample is not None)}"
            f"{''.join(f'<p>Hint, measured: {html.escape(hint)}</p>' for hint in self.hints)}"
            f"{_runnable(self.smallest)}</section>"
        )

    _repr_html_ = to_html


def conclude(subject: str, checks: Sequence[Check], seed: int) -> Report:
    """Gather checks into a report: refuted if one failed, undecided if one could not be measured, else it holds."""
    failed = [check for check in checks if not check.passed]
    if any(check.counterexample is not None or not math.isnan(check.error) for check in failed):
        verdict = "refuted"
    else:
        verdict = "undecided" if failed else "holds"
    return Report(subject, verdict, tuple(checks), seed)


def asserting(verify: Callable[Arguments, Report]) -> Callable[Arguments, Report]:
    """Return the twin of a verb that takes the same arguments and raises ``Refuted`` unless the claim survives."""

    @functools.wraps(verify)
    def twin(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Report:
        return verify(*args, **kwargs).raise_for_refuted()

    twin.__name__ = twin.__qualname__ = verify.__name__.replace("verify", "assert")
    twin.__doc__ = f"Return the report of ``{verify.__name__}``, or raise ``Refuted`` unless the claim survived."
    return twin


def plain(value: Any) -> Any:
    """Return a value with tensors and arrays as nested lists, and non-finite numbers as strings, fit for JSON."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        text = np.array2string(value.detach().cpu().numpy(), precision=8, threshold=60, edgeitems=3)
        return text.replace("\n", "\n    ")
    return str(value)


def _counterexample(check: Check) -> str:
    lines = "\n".join(f"{name} = {_short(value)}" for name, value in (check.counterexample or {}).items())
    return f"<p>{html.escape(check.name)}, counterexample:</p><pre>{html.escape(lines)}</pre>"


def _runnable(snippet: str) -> str:
    return f"<p>Smallest counterexample found, to run:</p><pre>{html.escape(snippet)}</pre>" if snippet else ""
