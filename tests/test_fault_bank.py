"""The fault bank is what it says, and ``verify_em`` judges it right: a sample here, all of it in the long run."""

from __future__ import annotations

import pytest

from mixproof.inference.verification import verify_subject
from mixproof.inference.verification.fault_bank import entries
from mixproof.inference.verification.fault_bank.entry import Entry

BANK = [(family, entry) for family, found in entries().items() for entry in found]
SAMPLED = 32
"""One derivation of so many is judged in the short run."""


def identify(found: tuple[str, Entry]) -> str:
    return f"{found[0]}: {found[1].name}"


def test_the_bank_is_large_and_its_names_are_unique() -> None:
    assert len(entries()) >= 12
    assert sum(entry.is_right for _, entry in BANK) >= 60
    assert sum(not entry.is_right for _, entry in BANK) >= 150
    names = [identify(found) for found in BANK]
    assert len(set(names)) == len(names)


def test_every_family_has_right_steps_and_faults_of_each_step() -> None:
    for family, found in entries().items():
        assert sum(entry.is_right for entry in found) >= 4, family
        assert {entry.verdict for entry in found} >= {"wrong E-step", "wrong M-step", "wrong report"}, family


def test_the_bank_covers_what_others_shipped() -> None:
    """Public threads about wrong mixture mathematics, by project; see each entry's source."""
    sources = " ".join(entry.source for _, entry in BANK)
    for project in ("hmmlearn", "dynamax", "scikit-learn", "nlmixr2est", "StepMix", "pomegranate", "astroML", "zcurve"):
        assert project.lower() in sources.lower().replace("sklearn", "scikit-learn"), project
    assert sum("millionth" in entry.name for _, entry in BANK) >= 12
    assert sum(entry.blind is not None for _, entry in BANK) >= 12


@pytest.mark.parametrize("found", BANK[::SAMPLED], ids=identify)
def test_a_sample_is_judged_right(found: tuple[str, Entry]) -> None:
    report = verify_subject(found[1].subject, seed=0)
    assert found[1].agrees(report), report


@pytest.mark.parametrize("found", [found for found in BANK if found[1].blind is not None][::SAMPLED], ids=identify)
def test_what_a_special_case_hides_passes_there(found: tuple[str, Entry]) -> None:
    assert found[1].blind is not None
    report = verify_subject(found[1].blind, seed=0)
    assert report.ok, report


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", entries())
def test_all_is_judged_right_at_every_seed(family: str, seed: int) -> None:
    wrong = []
    for entry in entries()[family]:
        report = verify_subject(entry.subject, seed=seed)
        if not entry.agrees(report):
            wrong.append(f"{entry.name}: {report.verdict}, hints {report.hints}")
        if entry.blind is not None and not verify_subject(entry.blind, seed=seed).ok:
            wrong.append(f"{entry.name}: the special case does not pass")
    assert not wrong, "\n".join(wrong)
