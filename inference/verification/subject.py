"""A subject: a Pyro program and a person's EM for it, in one object."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Subject:
    """A Pyro program with enumerated latents, and the two steps that a person derived for it."""

    model: Callable[..., Any]
    """The program; ``model(*data)`` observes the data."""
    params: Any
    """A dict or NamedTuple with a value for each parameter site, inside its support."""
    data: tuple[Any, ...]
    """The positional arguments of the program."""
    e_step: Callable[..., Any]
    """``e_step(params, *data)`` -> responsibilities p(z_n = k | x_n, params), (N, K)."""
    m_step: Callable[..., Any]
    """``m_step(resp, *data)`` -> params; with a keyword ``params`` where it builds on the current ones."""
    log_likelihood: Callable[..., Any] | None = None
    """``log_likelihood(params, *data)`` -> log p(data | params), the number that the person reports."""


def load_subject(reference: str) -> Subject:
    """Return the subject that a file holds.

    Args:
        reference: ``my_model.py:subject``, a file and the name of an object in it with the attributes ``model``,
            ``params``, ``data``, ``e_step``, ``m_step`` and, if wanted, ``log_likelihood``; ``my_model.py`` alone where
            the file itself has them. The file is run.

    Raises:
        ValueError: there is no such file or name, the file has the name of an installed module in use, it raises, or an
            attribute is missing.
    """
    file, _, name = reference.partition(".py:")
    path = Path(file if file.endswith(".py") else f"{file}.py")
    if not path.is_file():
        raise ValueError(f"there is no file {path}: name a subject as my_model.py:subject")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if path.stem in sys.modules and _is_installed(path):
        raise ValueError(f"{path} has the name of an installed module that is in use: rename the file")
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)  # so that it finds its neighbours, as a script does
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # sys.exit(0) must not end a verification as a success
        del sys.modules[path.stem]
        raise ValueError(f"{path} raises {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    if name and not hasattr(module, name):
        raise ValueError(f"{path} has no {name}")
    found = getattr(module, name) if name else module
    fields = ("model", "params", "data", "e_step", "m_step")
    if missing := [field for field in fields if not hasattr(found, field)]:
        raise ValueError(f"{reference} has no {', '.join(missing)}: a subject has {', '.join(fields)}")
    log_likelihood = getattr(found, "log_likelihood", None)
    return Subject(**{field: getattr(found, field) for field in fields}, log_likelihood=log_likelihood)


def _is_installed(path: Path) -> bool:
    """Whether the import system finds another module under the name of a file."""
    spec = importlib.machinery.PathFinder.find_spec(path.stem)
    found = spec is not None and spec.origin != str(path.resolve())
    return found or path.stem in sys.builtin_module_names
