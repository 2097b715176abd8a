"""Rows and parameters in files, by their endings: CSV, Parquet, NumPy, safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

Write = Callable[[Tensor, Tensor], None]


def read_params(path: Path) -> dict[str, Any]:
    """Return the parameters and settings of a JSON or safetensors file by name, a setting with fields as a dict.

    Raises:
        ValueError: the file has another ending, or does not hold what the ending says.
        OSError: it cannot be read.
    """
    if path.suffix == ".safetensors":
        return _nested(_tensors(path))
    if path.suffix != ".json":
        raise ValueError(f"parameters are read from .json or .safetensors, not from {path.name}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, parameters by name")
    return found


def write_params(path: Path, values: dict[str, Any]) -> None:
    """Write parameters and settings by name to a JSON or safetensors file, as ``read_params`` reads them.

    Args:
        path: where to.
        values: tensors, numbers, and dicts of them for settings with fields.

    Raises:
        ValueError: the file has another ending.
        OSError: it cannot be written.
    """
    if path.suffix == ".safetensors":
        save_file({name: torch.as_tensor(value).contiguous() for name, value in _flat(values)}, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(_lists(values), indent=1), encoding="utf-8")
    else:
        raise ValueError(f"parameters are written to .json or .safetensors, not to {path.name}")


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries of nested dicts, their names joined by dots."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _nested(values: dict[str, Tensor]) -> dict[str, Any]:
    """Return dicts for names joined by a dot, and numbers for tensors that are one."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        owner, _, field = name.rpartition(".")
        (found.setdefault(owner, {}) if owner else found)[field] = value if value.ndim else value.item()
    return found


def _lists(value: Any) -> Any:
    """Return tensors as nested lists, in dicts too."""
    if isinstance(value, dict):
        return {name: _lists(part) for name, part in value.items()}
    return value.tolist() if isinstance(value, Tensor) else value


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _arrays(path: Path) -> Any:
    """Return the array of an .npy file or the arrays by name of an .npz file."""
    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} is not a NumPy file: {error}") from error


def _rows(arrays: Any, path: Path) -> Any:
    """Return the entry x of what a file holds by name."""
    if "x" not in arrays:
        raise ValueError(f"{path} must hold the rows under the name x, and holds {', '.join(arrays) or 'nothing'}")
    return arrays["x"]


def read_rows(path: Path) -> np.ndarray:
    """Return the rows of a file as a matrix (N, D), without the ``z`` that ``mixproof sample`` writes beside x1 to xD.

    Raises:
        TypeError: a column does not hold numbers.
        ValueError: the file has another ending, or does not hold what the ending says.
        OSError: it cannot be read.
    """
    match path.suffix:
        case ".csv":
            table = pa.csv.read_csv(path)
        case ".parquet":
            table = pa.parquet.read_table(path)
        case ".npy":
            return _arrays(path)
        case ".npz":
            return _rows(_arrays(path), path)
        case ".safetensors":
            return _rows(_tensors(path), path).numpy()
        case _:
            raise ValueError(f"rows are read from .csv, .parquet, .npy, .npz or .safetensors, not from {path.name}")
    names = [name for name in table.column_names if not (name == "z" and "x1" in table.column_names)]
    for name in names:
        kind = table.schema.field(name).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise TypeError(f"column {name!r} of {path.name} holds {kind}, not numbers: drop or encode it first")
    return np.column_stack([table.column(name).to_numpy().astype(np.float64) for name in names])


@contextmanager
def writer(path: Path) -> Iterator[Write]:
    """Give a function that appends rows x (n, D) and their components z (n,) to a file, any number of times.

    Raises:
        ValueError: the file has another ending than .csv, .parquet, .npz or .safetensors.
    """
    if path.suffix in (".csv", ".parquet"):
        sinks: list[Any] = []

        def append(x: Tensor, z: Tensor) -> None:
            columns = {f"x{d + 1}": column.cpu().numpy() for d, column in enumerate(x.mT)}
            table = pa.table({**columns, "z": z.cpu().numpy()})
            if not sinks:
                kind = pa.csv.CSVWriter if path.suffix == ".csv" else pa.parquet.ParquetWriter
                sinks.append(kind(path, table.schema))
            sinks[0].write_table(table)

        try:
            yield append
        finally:
            for sink in sinks:
                sink.close()
    elif path.suffix in (".npz", ".safetensors"):
        chunks: list[tuple[Tensor, Tensor]] = []
        yield lambda x, z: chunks.append((x.cpu(), z.cpu()))
        x, z = (torch.cat(part) for part in zip(*chunks, strict=True))
        if path.suffix == ".npz":
            np.savez(path, x=x.numpy(), z=z.numpy())
        else:
            save_file({"x": x, "z": z}, path)
    else:
        raise ValueError(f"rows are written to .csv, .parquet, .npz or .safetensors, not to {path.name}")
