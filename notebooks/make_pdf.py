"""Make what the sheet asks to hand in, as one PDF: the solutions to problems 1 to 7, then the evaluated notebook.

Pandoc turns Markdown with LaTeX formulas into Typst, and Typst sets it in fonts that it brings along: no TeX is needed.
"""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pypandoc
import typst
from nbformat import NotebookNode

from mixproof.inference.verification.claim import Claim, Outcome, Problem
from mixproof.inference.verification.exercise_sheet import problems, verify_sheet

NOTEBOOK = Path(__file__).with_name("exercise_12_clustering.ipynb")
TITLE = "Exercise Sheet 12: Clustering"
IMAGES = {"image/png": "png", "image/jpeg": "jpeg"}

LAYOUT = f"""
#set document(title: "{TITLE}", date: none)
#set page(paper: "a4", margin: (x: 22mm, y: 24mm), numbering: "1 / 1")
#set text(font: "Libertinus Serif", size: 10.5pt, lang: "en")
#set par(justify: true)
#show raw: set text(font: "DejaVu Sans Mono", size: 8pt)
#show raw.where(block: true): set text(size: 7pt)
#show raw.where(block: true): set block(fill: luma(246), inset: 6pt, radius: 2pt, width: 100%, breakable: false)
#show heading: set block(above: 1.6em, below: 0.9em, sticky: true)
#show heading.where(level: 1): set block(above: 2.4em)
#set table(stroke: none, inset: (x: 6pt, y: 4pt))
#show table: set par(justify: false)
// A formula wider than the page is set smaller rather than cut.
#show math.equation.where(block: true): it => layout(size => {{
  let ratio = size.width / measure(it).width
  if ratio < 1 {{ align(center, scale(ratio * 100%, reflow: true, it)) }} else {{ it }}
}})
#let horizontalrule = line(length: 100%, stroke: 0.5pt)
#let colours = ("holds": rgb("#1a7f37"), "holds if": rgb("#9a6700"), "illegible": luma(110))
#let verdict(name) = text(colours.at(name, default: rgb("#b3261e")), weight: "bold", name)
#let step(id, name, says, body) = block(
  above: 1.5em, below: 0pt, breakable: false, width: 100%, stroke: (top: 0.4pt + luma(200)), inset: (top: 5pt),
)[
  #grid(columns: (3.6em, 1fr, auto), column-gutter: 8pt, text(luma(90), id), says, verdict(name))
  #body
]
#let remark(body) = block(above: 0.7em, inset: (left: 3.6em + 8pt), width: 100%)[
  #set text(size: 9.5pt)
  #show math.equation.where(block: true): set align(left)
  #body
]
#let output(body) = block(stroke: (left: 2pt + luma(205)), inset: (left: 8pt, y: 3pt), width: 100%, body)
"""


def raw(code: str) -> str:
    """Return Typst code as a block of Markdown that pandoc passes on untouched."""
    return f"\n```{{=typst}}\n{code}\n```\n"


def display(formula: str) -> str:
    return f"\n$${formula}$$\n"


def remark(*paragraphs: str) -> str:
    return raw("#remark[") + "\n\n".join(paragraphs) + raw("]")


def step(outcome: Outcome, twin: Outcome | None) -> str:
    """Return one step of a derivation: what it does, its verdict, the right formula, and remarks.

    Args:
        outcome: the claim of transcription a and its verdict.
        twin: the same step as transcription b prints it; None if b lacks it.
    """
    claim = outcome.claim
    parts = [
        raw(f'#step("{claim.id.rstrip("ab")}", "{outcome.verdict}")['),
        claim.says,
        raw("]["),
        display(claim.correction or claim.formula),
        *remarks(claim),
    ]
    if twin is None:
        parts.append(remark("Transcription b lacks this step."))
    elif (twin.claim.formula, twin.verdict) != (claim.formula, outcome.verdict):
        printed = [display(twin.claim.formula)] if twin.claim.formula else []
        parts += [remark(f"Transcription b ({twin.verdict}) prints{'' if printed else ' nothing.'}", *printed)]
        parts += remarks(twin.claim)
    return "\n".join([*parts, raw("]")])


def remarks(claim: Claim) -> list[str]:
    """Return the remarks on a step: what the sheet prints in its place, the condition that it needs, and the note."""
    found = []
    if claim.correction and claim.source == "a":
        found.append(remark("This is the corrected form. The sheet prints", display(claim.formula)))
    if claim.condition:
        found.append(remark(f"Condition: {claim.condition}."))
    if claim.note:
        found.append(remark(claim.note))
    return found


def solution(problem: Problem, outcomes: Sequence[Outcome]) -> str:
    """Return the solution to one problem in Markdown: its statement, then the steps with their verdicts."""
    twins = {outcome.claim.id.rstrip("b"): outcome for outcome in outcomes if outcome.claim.source == "b"}
    steps = [step(o, twins.get(o.claim.id.rstrip("a"))) for o in outcomes if o.claim.source == "a"]
    number = problem.id.removeprefix("P")
    statement = raw("#block(sticky: true)[") + problem.statement + raw("]")
    return delimiters("\n".join([f"# Problem {number}: {problem.title}\n", statement, *steps]))


def delimiters(formulas: str) -> str:
    """Return LaTeX with the bars of norms and absolute values as delimiters; plain, they would be set as relations."""
    formulas = re.sub(r"\\\|(.+?)\\\|", r"\\lVert \1\\rVert", formulas)
    return re.sub(r"(?<!\\left)(?<!\\right)\|(.+?)\|", r"\\left|\1\\right|", formulas)


def introduction(outcomes: Sequence[Outcome]) -> str:
    """Return the first page: what the verdicts mean, and how many there are of each."""
    meaning = {
        "holds": "survived every attempt to refute it",
        "holds if": "holds under a condition that the sheet does not state; without it there is a counterexample",
        "refuted as printed": "is wrong as printed; the corrected form, which is shown, holds",
        "illegible": "has lost too much in transcription to mean anything",
        "refuted": "is wrong, and so is the correction given",
        "undecided": "could not be decided",
    }
    rows = []
    for verdict, words in meaning.items():
        counts = [sum(o.verdict == verdict and o.claim.source == source for o in outcomes) for source in "ab"]
        if any(counts):
            rows.append(f"| {verdict} | {words} | {counts[0]} | {counts[1]} |")
    return "\n".join(
        [
            raw(f'#align(center, text(size: 18pt, weight: "bold")[{TITLE}])'),
            "\nThe sheet is read in two transcriptions, a and b, both damaged in places. The solutions follow a; where",
            "b differs, a remark says so. Every displayed formula was tested against automatic differentiation,",
            "enumeration, numerical maximisation or Monte Carlo, and carries its verdict; `make verify` prints the",
            "errors and tolerances behind it.\n",
            "| verdict | the formula ... | in a | in b |",
            "|:--|:-----|--:|--:|",
            *rows,
            "\nThe evaluated notebook of problem 8 follows the solutions.\n",
        ]
    )


def evaluated(notebook: NotebookNode, media: Path) -> str:
    """Return an executed notebook in Markdown; its pictures are written into the folder ``media``."""
    parts = []
    for position, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for number, output in enumerate(cell.outputs):
            parts += [raw("#output["), shown(output, media / f"cell{position}-{number}"), raw("]")]
    return "\n\n".join(parts)


def shown(output: NotebookNode, stem: Path) -> str:
    """Return the output of a cell in Markdown; a picture is written to ``stem`` with the suffix of its kind."""
    if output.output_type == "stream":
        return f"```\n{output.text.rstrip()}\n```"
    data = output.data
    for kind, suffix in IMAGES.items():
        if kind in data:
            file = stem.with_suffix(f".{suffix}")
            file.write_bytes(base64.b64decode(data[kind]))
            return f"![]({file.name})"
    return data.get("text/markdown") or f"```\n{data['text/plain']}\n```"


def to_typst(markdown: str, *, shift: int = 0) -> str:
    """Return Markdown as Typst, headings lowered by ``shift`` levels."""
    options = [
        "--syntax-highlighting=idiomatic",
        "--wrap=preserve",
        "--columns=1000",
        f"--shift-heading-level-by={shift}",
    ]
    return pypandoc.convert_text(
        markdown, "typst", format="markdown-auto_identifiers-implicit_figures", extra_args=options
    )


def make_pdf(outcomes: Sequence[Outcome], notebook: NotebookNode, file: Path) -> None:
    """Write the PDF.

    Args:
        outcomes: the verdicts on the claims of the problems to solve.
        notebook: the executed notebook of problem 8.
        file: where to; its folder is made if it is missing.
    """
    chapters = [introduction(outcomes)]
    for problem in problems():
        own = [outcome for outcome in outcomes if outcome.claim.problem == problem.id and outcome.claim.source]
        if own:
            chapters.append(solution(problem, own))
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        body = evaluated(notebook, Path(folder))
        text = (
            LAYOUT
            + to_typst("\n\n".join(chapters))
            + "\n#pagebreak()\n= Problem 8: the evaluated notebook\n"
            + to_typst(body, shift=1)
        )
        source = Path(folder) / "sheet.typ"
        source.write_text(text, encoding="utf-8")
        typst.compile(source, output=file, ignore_system_fonts=True, timestamp=0)


def main(file: str) -> None:
    """Verify the sheet and write its solutions and the committed notebook to a PDF."""
    sheet = [problem.id for problem in problems() if problem.id.startswith("P")]
    outcomes = verify_sheet(0, sheet, progress=lambda outcome: print(outcome.claim.id, outcome.verdict, flush=True))
    make_pdf(outcomes, nbformat.read(NOTEBOOK, as_version=4), Path(file))


if __name__ == "__main__":
    main(sys.argv[1])
