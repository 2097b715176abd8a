"""Every example in a docstring runs, and every file is imported under one name."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import mixproof

ROOT = Path(__file__).resolve().parents[1]


def walk() -> list[str]:
    """Return the dotted names of all modules of the package."""
    return [info.name for info in pkgutil.walk_packages(mixproof.__path__, "mixproof.")]


MODULES = walk()


def test_walk_finds_both_halves_of_the_package() -> None:
    files = {path for folder in ("models", "inference") for path in (ROOT / folder).rglob("*.py")}
    found = {Path(str(importlib.import_module(name).__file__)).resolve() for name in MODULES}
    assert found == files
    assert len(files) > 20


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", [name for name in MODULES if ".problems." not in name])  # whose functions are formulas
def test_module_and_its_public_functions_are_documented(name: str) -> None:
    module = importlib.import_module(name)
    is_package_marker = Path(str(module.__file__)).name == "__init__.py" and not Path(str(module.__file__)).read_text()
    assert is_package_marker or module.__doc__
    for attribute, value in vars(module).items():
        if callable(value) and getattr(value, "__module__", None) == name and not attribute.startswith("_"):
            assert value.__doc__, f"{name}.{attribute} has no docstring"


def test_no_file_is_imported_under_two_names() -> None:
    for name in MODULES:
        importlib.import_module(name)
    names = defaultdict(set)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        path = Path(file or "/").resolve()
        if any(path.is_relative_to(ROOT / folder) for folder in ("models", "inference")):
            names[path].add(name)
    assert names
    assert {path: found for path, found in names.items() if len(found) > 1} == {}
    assert all(name.startswith("mixproof.") for found in names.values() for name in found)
