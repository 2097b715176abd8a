"""The sheet to hand in: one PDF with the solutions of problems 1 to 7, step by step, and the evaluated notebook."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
from pypdf import PdfReader

from mixproof.inference.verification.claim import Outcome
from mixproof.inference.verification.exercise_sheet import problems, verify_sheet
from tests.conftest import load_script

PROBLEMS = [problem for problem in problems() if problem.id.startswith("P")]
make_pdf = load_script("notebooks/make_pdf.py")
NOTEBOOK = nbformat.read(make_pdf.NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return verify_sheet(0, [problem.id for problem in PROBLEMS], num_workers=1)


@pytest.fixture(scope="module")
def file(outcomes: list[Outcome], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("pdf") / "build" / "sheet.pdf"
    make_pdf.make_pdf(outcomes, NOTEBOOK, path)
    return path


def text_of(file: Path) -> str:
    return "\n".join(page.extract_text() for page in PdfReader(file).pages)


def headings(outline: list[Any]) -> Iterator[str]:
    """Yield the titles of the first level of an outline; deeper ones are nested lists."""
    yield from (str(entry.title) for entry in outline if not isinstance(entry, list))


def test_sections(file: Path) -> None:
    solved = [f"Problem {problem.id.removeprefix('P')}: {problem.title}" for problem in PROBLEMS]
    assert len(solved) == 7
    assert list(headings(PdfReader(file).outline)) == [*solved, "Problem 8: the evaluated notebook"]


def test_every_step_stands_with_its_verdict(file: Path, outcomes: list[Outcome]) -> None:
    text = re.sub(r"\s+", " ", text_of(file))
    steps = [outcome for outcome in outcomes if outcome.claim.source == "a"]
    assert steps
    position = 0
    for outcome in steps:
        start = text.find(f"{outcome.claim.id.rstrip('a')} ", position)
        assert start >= position, f"{outcome.claim.id} is missing or out of order"
        position = start + 1
        assert outcome.verdict in text[start : start + 250], outcome.claim.id


def test_corrected_steps_show_what_was_printed(file: Path, outcomes: list[Outcome]) -> None:
    corrected = [o for o in outcomes if o.claim.source == "a" and o.verdict == "refuted as printed"]
    assert corrected
    assert text_of(file).count("This is the corrected form. The sheet prints") == len(corrected)


def test_notebook_is_there_with_its_figures(file: Path) -> None:
    text = re.sub(r"\s+", " ", text_of(file))
    notebook = text[text.index("Problem 8: the evaluated notebook") :]
    for phrase in (
        "def gmm_log_probability",
        "Pixels drawn from the mixture",
        "what one sees is noise",
        "variance kept",
    ):
        assert phrase in notebook
    outputs = [output for cell in NOTEBOOK.cells for output in cell.get("outputs", [])]
    figures = [output for output in outputs if make_pdf.IMAGES.keys() & output.get("data", {}).keys()]
    assert len(figures) == 3
    assert sum(len(page.images) for page in PdfReader(file).pages) == len(figures)


def test_fonts_are_embedded(file: Path) -> None:
    """Every font is carried along, none of them a stand-in for one that is missing."""
    families = set()
    pages: Any = PdfReader(file).pages
    for page in pages:
        for font in page["/Resources"]["/Font"].values():
            descriptor = font["/DescendantFonts"][0].get_object()["/FontDescriptor"]
            assert {"/FontFile2", "/FontFile3"} & descriptor.keys()
            families.add(descriptor["/FontName"].split("+")[-1].split("-")[0])
    assert families == {"LibertinusSerif", "NewCMMath", "DejaVuSansMono"}


def test_same_outcomes_same_file(file: Path, outcomes: list[Outcome], tmp_path: Path) -> None:
    make_pdf.make_pdf(outcomes, NOTEBOOK, tmp_path / "again.pdf")
    assert (tmp_path / "again.pdf").read_bytes() == file.read_bytes()


def test_unexpected_verdicts_are_counted(outcomes: list[Outcome], tmp_path: Path) -> None:
    make_pdf.make_pdf([replace(outcomes[0], verdict="refuted"), *outcomes[1:4]], NOTEBOOK, tmp_path / "planted.pdf")
    assert "refuted is wrong, and so is the correction given 1 0" in text_of(tmp_path / "planted.pdf")


@pytest.mark.parametrize(
    ("latex", "expected"),
    [
        (r"\|x\|_1 = |x|", r"\lVert x\rVert_1 = \left|x\right|"),
        (r"\|x - m\|^2 + \|y\|^2", r"\lVert x - m\rVert^2 + \lVert y\rVert^2"),
        (r"\log |\det X| = \left|y\right|", r"\log \left|\det X\right| = \left|y\right|"),
        (r"p(x \mid z)", r"p(x \mid z)"),
    ],
)
def test_delimiters(latex: str, expected: str) -> None:
    assert make_pdf.delimiters(latex) == expected
