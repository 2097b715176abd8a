"""Families of mixture models, one file each, every one a Pyro program with the mathematics done by hand beside it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any


def families() -> dict[str, Any]:
    """Return every family by name, found by walking this package.

    A module that is a family goes by its own name. A family with a setting is a class, to be called with the setting:
    it goes by ``module.Class``, and by the module's name where the module is no family itself.
    """
    found: dict[str, Any] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        classes = {
            name: member
            for name, member in inspect.getmembers(module, inspect.isclass)
            if member.__module__ == module.__name__ and hasattr(member, "log_joint")
        }
        if hasattr(module, "log_joint"):
            found[info.name] = module
        elif len(classes) == 1:
            found[info.name] = next(iter(classes.values()))
        found |= {f"{info.name}.{name}": member for name, member in classes.items()}
    return found
