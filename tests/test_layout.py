"""The tree keeps its layers: models below inference, algorithms blind to families, nothing outside the repository."""

from __future__ import annotations

import ast
import importlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FRONT_DOORS = ("cli.py", "estimators.py", "verification/exercise_sheet.py", "verification/problems/")


NO_FAMILY = (
    "mixproof.models.initial",  # where first centres come from, for the families and for K-means
    "mixproof.models.positive_definite",  # coordinates of matrices, for the families and for any program
)


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted name of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", python_files("models"), ids=identify)
def test_models_import_nothing_from_inference(path: Path) -> None:
    assert [name for name in imports(path) if within(name, "mixproof.inference")] == []


@pytest.mark.parametrize("path", python_files("inference"), ids=identify)
def test_algorithms_import_no_family(path: Path) -> None:
    relative = path.relative_to(ROOT / "inference").as_posix()
    if not relative.startswith(FRONT_DOORS):
        found = [name for name in imports(path) if within(name, "mixproof.models")]
        assert [name for name in found if not any(within(name, each) for each in NO_FAMILY)] == []


def test_front_doors_exist() -> None:
    """So that no exception above outlives the file it was made for."""
    for door in FRONT_DOORS:
        assert (ROOT / "inference" / door).exists(), door
    assert not any(hasattr(importlib.import_module(name), "log_joint") for name in NO_FAMILY)


@pytest.mark.parametrize(
    "path", [*python_files("models"), *python_files("inference"), *python_files("tests")], ids=identify
)
def test_bare_names_are_never_imported(path: Path) -> None:
    assert [name for name in imports(path) if within(name, "models") or within(name, "inference")] == []


def test_links_lead_to_the_folders() -> None:
    for name in ("models", "inference"):
        link = ROOT / ".links" / "mixproof" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name


def test_nothing_reads_outside_the_repository() -> None:
    outside = "../" + "shared"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(listed) > 40
    offenders = [name for name in listed if (ROOT / name).is_file() and outside.encode() in (ROOT / name).read_bytes()]
    assert offenders == []


def test_there_is_no_registry_and_no_utils() -> None:
    names = {path.name for folder in ("models", "inference") for path in python_files(folder)}
    assert names.isdisjoint({"utils.py", "util.py", "helpers.py", "registry.py", "common.py"})
