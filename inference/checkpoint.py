"""The state of a long run in a file that is whole at every moment: safetensors, replaced in one step."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor


class CheckpointError(ValueError):
    """A file that is no checkpoint, or one of another run."""


def save(path: Path, run: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write tensors by name, and what identifies the run they belong to; a reader finds the old state or the new one.

    Args:
        path: where to; a file beside it with ``.new`` behind its name is written first.
        run: whatever JSON holds.
        tensors: on any device.

    Raises:
        OSError: it cannot be written.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for the checkpoint {path.name}: make it first")
    new = path.with_name(path.name + ".new")
    # safetensors takes no two tensors of the same memory
    own = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    with new.open("wb") as file:
        file.write(serialize(own, metadata={"run": _as_json(run)}))
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load(path: Path, run: dict[str, Any]) -> dict[str, Tensor] | None:
    """Return the tensors of a run by name, or None where there is no such file.

    Raises:
        CheckpointError: the file is not a checkpoint, or belongs to another run: the message says in what they differ.
        OSError: it cannot be read.
    """
    if not path.exists():
        return None
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a checkpoint: give a file")
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("run", "null"))
            # copies begin where memory of torch's does: products of matrices round by where their numbers lie
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not a checkpoint: {error}. Delete it, or give another file") from error
    expected = json.loads(_as_json(run))
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not a checkpoint of a run: delete it, or give another file")
    different = [name for name in expected if found.get(name) != expected[name]]
    if different:
        raise CheckpointError(
            f"{path} belongs to another run, which differs in {', '.join(different)}: delete it, or give another file"
        )
    return tensors


def _as_json(run: dict[str, Any]) -> str:
    return json.dumps(run, default=lambda number: number.item())  # a setting may be a number of numpy's


def digest(values: Any) -> str:
    """Return a short name for the exact values of tensors, arrays, numbers and strings, in any nest of containers.

    Raises:
        TypeError: there is something else, whose value cannot be told.
    """
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            value = [part for item in value.items() for part in item]
        if isinstance(value, tuple | list):
            found.update(f"{len(value)} values".encode())
            for part in value:
                add(part)
        elif isinstance(value, Tensor | np.ndarray | np.generic):
            array = torch.as_tensor(value).detach().cpu().contiguous()
            found.update(f"{array.dtype}{tuple(array.shape)}".encode())
            found.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
        elif value is None or isinstance(value, bool | int | float | complex | str | bytes):
            found.update(f"{type(value).__name__} {value!r}".encode())
        else:
            raise TypeError(
                f"a checkpoint cannot tell one {type(value).__name__} from another: bind it with functools.partial, or "
                "give its numbers"
            )

    add(values)
    return found.hexdigest()[:16]


def identify(family: Any) -> str:
    """Return a name for a family and the exact values of its settings."""
    if isinstance(family, ModuleType | type):
        return family.__name__
    settings = {name: value for name, value in vars(family).items() if not callable(value)}
    return f"{type(family).__qualname__} {digest(settings)}"
