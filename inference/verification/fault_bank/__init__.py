"""A public bank of EM derivations, right and wrong, with their true verdicts: what a verifier is measured on.

Each file has one program and its ``ENTRIES``. A new file is found by itself.
"""

from __future__ import annotations

import importlib
import pkgutil

from mixproof.inference.verification.fault_bank.entry import Entry


def entries() -> dict[str, tuple[Entry, ...]]:
    """Return the entries of every file of the bank, by the file's name."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return {
        module.__name__.rpartition(".")[2]: module.ENTRIES for module in modules if module.__name__ != Entry.__module__
    }
