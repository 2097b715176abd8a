"""Rows and parameters in files, by their endings: CSV, Parquet, NumPy, safetensors and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as pads
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
    check_params_path(path)
    if path.suffix == ".safetensors":
        save_file({name: torch.as_tensor(value).contiguous() for name, value in _flat(values)}, path)
    else:
        path.write_text(json.dumps(_lists(values), indent=1), encoding="utf-8")


def check_params_path(path: Path) -> None:
    """Say before a long run that its parameters could not be written there.

    Raises:
        ValueError: the file has another ending, or its folder does not exist.
    """
    if path.suffix not in (".json", ".safetensors"):
        raise ValueError(f"parameters are written to .json or .safetensors, not to {path.name}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write {path.name} to: make it first")


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
    """Return the memory map of an .npy file or the arrays by name of an .npz file."""
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with path.open("rb") as file:  # which NumPy leaves open where the archive is broken
            found = np.load(file, allow_pickle=False)
            return dict(found) if isinstance(found, Mapping) else {"": found}
    except (ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{path} is not a NumPy file: {error}") from error


def _rows(arrays: Any, path: Path) -> Any:
    """Return the entry x of what a file holds by name."""
    if "x" not in arrays:
        raise ValueError(f"{path} must hold the rows under the name x, and holds {', '.join(arrays) or 'nothing'}")
    return arrays["x"]


def open_rows(path: Path) -> Any:
    """Return the rows of a file as a source for ``Dataset``, without the ``z`` that ``mixproof sample`` writes.

    CSV and Parquet, a folder of Parquet files too, are a ``pyarrow.dataset.Dataset`` and .npy is a memory map, of which
    nothing is read yet; .npz and .safetensors are a matrix (N, D) in memory.

    Raises:
        TypeError: a column does not hold numbers.
        ValueError: the file has another ending, or does not hold what the ending says.
        OSError: it cannot be read.
    """
    if path.is_dir():
        files = sorted(str(file) for file in path.rglob("*.parquet"))
        if not files:
            raise ValueError(f"the folder {path} holds no .parquet files")
        return _numbers(pads.dataset(files, format="parquet"), path)
    match path.suffix:
        case ".csv":
            guessed = pads.dataset(path, format="csv").schema
            if all(_is_number(name) for name in guessed.names):
                raise ValueError(f"the first line of {path} holds numbers and would be lost: give its columns names")
            # with one column an empty line is a missing entry
            lines = pads.CsvFileFormat(pyarrow.csv.ParseOptions(ignore_empty_lines=len(guessed.names) > 1))
            # a column may begin with whole numbers, or with none
            kinds = [pa.float64() if _is_whole(field.type) else field.type for field in guessed]
            schema = pa.schema(zip(guessed.names, kinds, strict=True))
            return _numbers(pads.dataset(path, format=lines, schema=schema), path)
        case ".parquet":
            return _numbers(pads.dataset(path, format="parquet"), path)
        case ".npy":
            return _arrays(path)
        case ".npz":
            return _rows(_arrays(path), path)
        case ".safetensors":
            return _rows(_tensors(path), path)
        case _:
            raise ValueError(
                "rows are read from .csv, .parquet, a folder of these, .npy, .npz or .safetensors, not from "
                f"{path.name}"
            )


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def _is_whole(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_null(kind)


def _numbers(rows: pads.Dataset, path: Path) -> pads.Dataset:
    """Return the columns that are rows of numbers, or say which is not."""
    fields = [field for field in rows.schema if not (field.name == "z" and "x1" in rows.schema.names)]
    for field in fields:
        kind = field.type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise TypeError(f"column {field.name!r} of {path.name} holds {kind}, not numbers: drop or encode it first")
    return rows.replace_schema(pa.schema(fields))


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
