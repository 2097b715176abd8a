"""The verdicts on the exercise sheet as a table for a terminal, as JSON, and as a page that needs no network."""

from __future__ import annotations

import html
import json
import platform
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from latex2mathml.converter import convert
from pylatexenc.latex2text import LatexNodes2Text, MacroTextSpec, get_default_latex_context_db
from rich.console import Group
from rich.table import Table
from rich.text import Text

from mixproof.inference.verification.claim import Outcome, Problem
from mixproof.inference.verification.report import Check, Report, plain

COLOURS = {"holds": "green", "holds if": "cyan", "refuted as printed": "yellow", "illegible": "magenta"}

CAVEAT = (
    "A formula holds when it agrees with an independent computation at random points to rounding, which refutes any "
    "wrong analytic identity with probability one up to the tolerance, or within a computed Monte Carlo error. That is "
    "not a proof."
)


def worst(outcome: Outcome) -> Check | None:
    """Return the check of the formula itself that came nearest to its tolerance, or passed it farthest."""
    if not outcome.reports:
        return None
    checks = outcome.reports[0].checks
    failed = [check for check in checks if not check.passed]
    return max(failed or checks, key=lambda check: check.error / check.tolerance if check.tolerance else 0.0)


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return how many claims got which verdict, and whether that was expected."""
    counts: Counter[str] = Counter(outcome.verdict for outcome in outcomes)
    unexpected = [outcome.claim.id for outcome in outcomes if not outcome.ok]
    order = [verdict for verdict in COLOURS if verdict in counts] + sorted(counts.keys() - COLOURS.keys())
    parts = ", ".join(f"{counts[verdict]} {verdict}" for verdict in order)
    end = f"; NOT AS EXPECTED: {', '.join(unexpected)}" if unexpected else "; every verdict is the expected one"
    return f"{len(outcomes)} claims: {parts}{end}"


def to_table(outcomes: Sequence[Outcome]) -> Group:
    """Return the tables of verdicts, what stands instead of formulas that do not hold as printed, and the summary."""
    sheet = [outcome for outcome in outcomes if outcome.claim.source]
    end_to_end = [outcome for outcome in outcomes if not outcome.claim.source]
    tables = [_table(part) for part in (sheet, end_to_end) if part]
    notes = [note for outcome in outcomes if (note := _instead(outcome))]
    return Group(*(item for table in tables for item in (table, Text())), *notes, Text(summary(outcomes), "bold"))


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1), expand=True)
    table.add_column("claim", no_wrap=True, min_width=max(len(outcome.claim.id) for outcome in outcomes))
    table.add_column("formula", no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_column("verdict", no_wrap=True, min_width=max(map(len, COLOURS)))
    table.add_column("error / tolerance", justify="right", no_wrap=True, min_width=17)
    table.add_column("time", justify="right", no_wrap=True, min_width=7)
    for outcome in outcomes:
        verdict = Text(outcome.verdict, COLOURS.get(outcome.verdict, "bold red"))
        if not outcome.ok:
            verdict.append(f" (expected: {outcome.claim.expected})", "bold red")
        check = worst(outcome)
        errors = "" if check is None else f"{check.error:.1e} / {check.tolerance:.1e}"
        formula = Text(to_unicode(outcome.claim.formula) or "(lost)")
        table.add_row(outcome.claim.id, formula, verdict, errors, f"{outcome.seconds:.2f} s")
    return table


def _instead(outcome: Outcome) -> Text | None:
    """Return what a verdict other than ``holds`` comes with; every check, where the verdict is not the expected one."""
    claim = outcome.claim
    if not outcome.ok:
        words = "\n".join(str(report) for report in outcome.reports)
    elif outcome.verdict == "holds if":
        words = f"if {to_unicode(claim.condition)}"
    elif outcome.verdict == "refuted as printed":
        words = f"instead {to_unicode(claim.correction)}"
    elif outcome.verdict == "illegible":
        words = to_unicode(claim.note)
    else:
        return None
    return Text.assemble((f"{claim.id} ", "bold"), words)


def to_json(outcomes: Sequence[Outcome], seed: int) -> str:
    """Return every claim with its verdict and its reports as strict JSON."""
    document = {
        "seed": seed,
        "versions": versions(),
        "ok": all(outcome.ok for outcome in outcomes),
        "claims": [_as_dict(outcome) for outcome in outcomes],
    }
    return json.dumps(document, indent=1, allow_nan=False)


def to_html(outcomes: Sequence[Outcome], problems: Sequence[Problem], seed: int) -> str:
    """Return a self-contained page, the formulas as MathML."""
    used = [problem for problem in problems if any(outcome.claim.problem == problem.id for outcome in outcomes)]
    links = "".join(f"<a href='#{problem.id}'>{problem.id} {html.escape(problem.title)}</a>" for problem in used)
    sections = "".join(_section(problem, outcomes) for problem in used)
    return _page(
        "Exercise Sheet 12: a verdict for each formula",
        f"<p class='summary'>{html.escape(summary(outcomes))}.</p><p>{CAVEAT}</p><nav>{links}</nav>{sections}",
        seed,
    )


def reports_to_html(reports: Sequence[Report], seed: int) -> str:
    """Return a self-contained page of reports on one's own derivations."""
    return _page("EM derivations: a verdict on each", "".join(report.to_html() for report in reports), seed)


def _page(title: str, body: str, seed: int) -> str:
    made = ", ".join(f"{name} {number}" for name, number in versions().items())
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>"
        f"{body}<p class='note'>Seed {seed}; {html.escape(made)}.</p></body></html>"
    )


def versions() -> dict[str, str]:
    """Return the versions that a report depends on."""
    packages = ("mixproof", "torch", "pyro-ppl", "numpy", "scipy", "scikit-learn")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def to_unicode(latex: str) -> str:
    """Return LaTeX, or text with LaTeX between dollar signs, as one line of characters for a terminal."""
    joined = re.sub(r"\\\\", "; ", latex.replace("&", " ").replace(r"\stackrel{!}{=}", "="))
    grouped = re.sub(r"([_^])\{([^{}()\\]{2,})\}", r"\1{(\2)}", joined)
    text = re.sub(r"(?<=[^\s<>!])= ", " = ", TEXT.latex_to_text(grouped))
    return re.sub(r"\s+", " ", text).strip()


def _fraction(node: Any, l2tobj: LatexNodes2Text) -> str:
    """Return a fraction on one line, with parentheses about what is not a single factor."""
    parts = [l2tobj.nodelist_to_text([argument]).strip() for argument in node.nodeargd.argnlist]
    return " / ".join(f"({part})" if re.search(r"[-+ ∑/]", part) else part for part in parts)


def _plain_text() -> LatexNodes2Text:
    context = get_default_latex_context_db()
    specs = [
        MacroTextSpec("frac", simplify_repl=_fraction),
        MacroTextSpec("|", simplify_repl="‖"),
        MacroTextSpec("arg", simplify_repl="arg "),
        MacroTextSpec("det", simplify_repl="det "),
        MacroTextSpec("Leftrightarrow", simplify_repl=" ⇔ "),
        MacroTextSpec("to", simplify_repl=" → "),
        MacroTextSpec("mid", simplify_repl=" | "),
        MacroTextSpec("sim", simplify_repl=" ~ "),
        MacroTextSpec("quad", simplify_repl="  "),
        MacroTextSpec("log", simplify_repl=" log "),
        MacroTextSpec("underbrace", simplify_repl="⟦%s⟧"),
    ]
    context.add_context_category("sheet", prepend=True, macros=specs)
    return LatexNodes2Text(math_mode="text", latex_context=context)


TEXT = _plain_text()


def to_mathml(latex: str, display: str = "block") -> str:
    """Return LaTeX as MathML."""
    known = re.sub(r"\\arg\\(min|max)", r"\\mathrm{arg\\,\1}", latex)
    return re.sub(r'<mi mathvariant="bold-italic">(.*?)</mi>', _bold_letter, convert(known, display=display))


def _bold_letter(element: re.Match[str]) -> str:
    """Return a bold letter as a character of its own, as LaTeX sets it: browsers ignore the attribute."""
    script, size, _, letter = unicodedata.name(html.unescape(element[1])).split()
    slant = "" if (script, size) == ("GREEK", "CAPITAL") else "ITALIC "
    return f"<mi>{unicodedata.lookup(f'MATHEMATICAL BOLD {slant}{size} {letter}')}</mi>"


def prose(text: str) -> str:
    """Return text with LaTeX between dollar signs as HTML."""
    pieces = text.split("$")
    return "".join(to_mathml(piece, "inline") if i % 2 else html.escape(piece) for i, piece in enumerate(pieces))


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    claim = outcome.claim
    return {
        "id": claim.id,
        "problem": claim.problem,
        "transcription": claim.source,
        "says": claim.says,
        "formula": claim.formula,
        "verdict": outcome.verdict,
        "expected": claim.expected,
        "ok": outcome.ok,
        "condition": claim.condition,
        "correction": claim.correction,
        "note": claim.note,
        "seconds": outcome.seconds,
        "reports": [plain(report.to_dict()) for report in outcome.reports],
    }


def _section(problem: Problem, outcomes: Sequence[Outcome]) -> str:
    rows = "".join(_row(outcome) for outcome in outcomes if outcome.claim.problem == problem.id)
    head = "".join(f"<th>{name}</th>" for name in ("claim", "formula", "verdict", "error / tolerance", "time"))
    return (
        f"<section id='{problem.id}'><h2>{problem.id}. {html.escape(problem.title)}</h2>"
        f"<p>{prose(problem.statement)}</p>"
        f"<table class='claims'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></section>"
    )


def _row(outcome: Outcome) -> str:
    claim, check = outcome.claim, worst(outcome)
    formula = to_mathml(claim.formula) if claim.formula else "<em>lost</em>"
    remarks = [f"<p class='says'>{prose(claim.says)}</p>", formula]
    if outcome.verdict == "refuted as printed":
        remarks.append(f"<p>Instead:</p>{to_mathml(claim.correction)}")
    if outcome.verdict == "holds if":
        remarks.append(f"<p>Holds if {prose(claim.condition)}.</p>")
    if claim.note:
        remarks.append(f"<p class='note'>{prose(claim.note)}</p>")
    reports = "".join(report.to_html() for report in outcome.reports)
    details = f"<details><summary>checks</summary>{reports}</details>" if reports else ""
    errors = "" if check is None else f"{check.error:.1e} / {check.tolerance:.1e}"
    kind = outcome.verdict.replace(" ", "-") if outcome.ok else "unexpected"
    verdict = outcome.verdict if outcome.ok else f"{outcome.verdict}, expected: {claim.expected}"
    return (
        f"<tr id='{claim.id}' class='{kind}'><td>{claim.id}</td><td><div>{''.join(remarks)}{details}</div></td>"
        f"<td class='verdict'>{verdict}</td><td class='number'>{errors}</td>"
        f"<td class='number'>{outcome.seconds:.2f} s</td></tr>"
    )


STYLE = """
body { font-family: system-ui, sans-serif; max-width: 90rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.45; }
body { color: #1b1b1b; background: #fff; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
.summary { font-weight: 600; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; border-bottom: 2px solid #888; padding: .3rem .5rem; }
td { vertical-align: top; border-bottom: 1px solid #ddd; padding: .4rem .5rem; }
td:first-child { white-space: nowrap; font-variant-numeric: tabular-nums; }
.claims td:nth-child(2) { width: 100%; max-width: 0; }
.claims td:nth-child(2) > div { overflow-x: auto; }
.says, .note { max-width: 42rem; }
.number { white-space: nowrap; text-align: right; font-variant-numeric: tabular-nums; }
.verdict { font-weight: 600; }
.holds .verdict { color: #16692f; }
.holds-if .verdict { color: #0b5c86; }
.refuted-as-printed .verdict { color: #8a5a00; }
.illegible .verdict { color: #7a2a86; }
.unexpected .verdict, .failed td:nth-child(2) { color: #b00020; }
.says { margin: 0; color: #444; }
.note { color: #555; font-size: .92em; }
math { font-family: "STIX Two Math", "Latin Modern Math", "Cambria Math", "DejaVu Math TeX Gyre", math; }
math[display=block] { margin: .35rem 0; width: fit-content; }
details { margin-top: .3rem; font-size: .88em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 38rem; }
"""
