"""The README's examples run as they stand, and its table is the one that the command prints."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

from mixproof.inference.verification import exercise_sheet, sheet_report
from mixproof.inference.verification.claim import Outcome

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_give_what_they_show() -> None:
    result = doctest.testfile(str(README), module_relative=False)
    assert result.attempted > 20
    assert result.failed == 0


def test_the_table_shows_claims_as_they_are() -> None:
    table = re.search(r"```text\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert table is not None
    by_id = {claim.id: claim for claim in exercise_sheet.claims()}
    rows = [line for line in table[1].splitlines() if line.split(" ")[0] in by_id]
    assert len(rows) > 15
    for row in rows:
        claim = by_id[row.split(" ")[0]]
        cells = [cell for cell in re.split(r"\s{2,}", row) if cell]
        start = (sheet_report.to_unicode(claim.formula) or "(lost)").split("  ")[0]
        assert start.startswith(cells[1].rstrip("…")), row
        assert cells[2] == claim.expected, row
    as_expected = [Outcome(claim, claim.expected, (), 0.0) for claim in by_id.values()]
    assert sheet_report.summary(as_expected) in table[1].splitlines()
