"""Rows and parameters in files, by their endings: CSV, Parquet, NumPy, safetensors and JSON."""

from __future__ import annotations

import json
import os
from collections import defaultdict
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
    try:
        if path.suffix == ".safetensors":
            save_file({name: torch.as_tensor(value).contiguous() for name, value in _flat(values)}, path)
        else:
            path.write_text(json.dumps(_lists(values), indent=1), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise OSError(f"the parameters cannot be written to {path}: {error}") from error


def check_params_path(path: Path) -> None:
    """Say before a long run that its parameters could not be written there.

    Raises:
        ValueError: the file has another ending, or its folder does not exist.
        OSError: it is a folder, or may not be written.
    """
    if path.suffix not in (".json", ".safetensors"):
        raise ValueError(f"parameters are written to .json or .safetensors, not to {path.name}")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write {path.name} to: make it first")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give a file in it")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"you may not write {path}: give another file, or the permission")


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


def open_rows(path: Path, weights: str | None = None) -> Any:
    """Return the rows of a file as a source for ``Dataset``.

    CSV and Parquet, a folder of Parquet files too, are a ``pyarrow.dataset.Dataset`` and .npy is a memory map, of which
    nothing is read yet; .npz and .safetensors are a matrix (N, D) in memory. Two kinds of columns are no data and left
    out: the index that pandas stores in Parquet, and ``z`` beside nothing but x1 to xD, as ``mixproof sample`` writes.

    Args:
        path: the file or folder.
        weights: the name of a column of row weights, which stays; None if there is none.

    Raises:
        TypeError: a column does not hold numbers.
        ValueError: the file has another ending, does not hold what the ending says, or has no names of columns; or the
            files of a folder differ in their columns.
        OSError: it cannot be read.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if path.is_dir():
        files = sorted(str(file) for file in path.rglob("*.parquet"))
        if not files:
            raise ValueError(f"the folder {path} holds no .parquet files")
        return _parquet(files, weights)
    match path.suffix:
        case ".csv":
            guessed = pads.dataset(path, format="csv").schema
            _check_header(guessed.names, path)
            # with one column an empty line is a missing entry
            lines = pads.CsvFileFormat(pyarrow.csv.ParseOptions(ignore_empty_lines=len(guessed.names) > 1))
            # a column may begin with whole numbers, or with none
            kinds = [pa.float64() if _is_whole(field.type) else field.type for field in guessed]
            schema = pa.schema(zip(guessed.names, kinds, strict=True))
            rows = pads.dataset(path, format=lines, schema=schema)
            return rows.replace_schema(pa.schema(_numbers(schema, path.name, weights)))
        case ".parquet":
            return _parquet([str(path)], weights)
        case ".npy":
            return _arrays(path)
        case ".npz":
            return _rows(_arrays(path), path)
        case ".safetensors":
            return _rows(_tensors(path), path)
        case _:
            raise ValueError(
                "rows are read from .csv, .parquet, a folder of .parquet, .npy, .npz or .safetensors, not from "
                f"{path.name}"
            )


def _check_header(names: list[str], path: Path) -> None:
    """Say what tells that the first line of a CSV file is not one of names, or not of all columns."""
    if numbers := [name for name in names if _is_number(name)]:
        raise ValueError(
            f"the first line of {path} must be the names of its columns and holds the number {numbers[0]}: if it is "
            "the first row it would be lost, so write a line of names above it; else rename the column"
        )
    if "" in names:
        raise ValueError(
            f"column {names.index('') + 1} of {path} has no name: name it, or leave it out if it is the index that "
            "pandas writes, df.to_csv(..., index=False)"
        )


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True


def _is_whole(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_null(kind)


def _parquet(files: list[str], weights: str | None) -> pads.Dataset:
    """Return the rows of files with the same columns, of types that hold the numbers of each."""
    pieces = list(pads.dataset(files, format="parquet").get_fragments())
    columns = [_numbers(piece.physical_schema, Path(piece.path).name, weights) for piece in pieces]
    first = {field.name for field in columns[0]}
    for piece, fields in zip(pieces, columns, strict=True):
        if odd := sorted(first ^ {field.name for field in fields}):
            raise ValueError(
                f"{pieces[0].path} and {piece.path} must have the same columns, and only one of them has "
                f"{', '.join(odd)}: rename or drop these, or read the files one by one"
            )
    kinds: dict[str, set[pa.DataType]] = defaultdict(set)
    for field in (field for fields in columns for field in fields):
        kinds[field.name].add(field.type)
    schema = pa.schema([(field.name, _common_type(kinds[field.name])) for field in columns[0]])
    return pads.dataset(files, format="parquet", schema=schema)


def _common_type(kinds: set[pa.DataType]) -> pa.DataType:
    """Return the type of numbers of a column that has several, as NumPy promotes them; empty columns have any."""
    numbers = [kind.to_pandas_dtype() for kind in kinds if not pa.types.is_null(kind)]
    return pa.from_numpy_dtype(np.result_type(*numbers)) if numbers else pa.float64()


def _numbers(schema: pa.Schema, name: str, weights: str | None) -> list[pa.Field]:
    """Return the columns of a file that are data and weights, or say which does not hold numbers."""
    index = (schema.pandas_metadata or {}).get("index_columns", [])
    fields = [field for field in schema if field.name == weights or field.name not in index]
    features = {field.name for field in fields} - {weights}
    if len(features) > 1 and features == {"z", *(f"x{d + 1}" for d in range(len(features) - 1))}:
        fields = [field for field in fields if field.name != "z"]
    for field in fields:
        kind = field.type
        is_number = pa.types.is_floating(kind) or pa.types.is_boolean(kind) or _is_whole(kind)
        if not is_number:
            raise TypeError(f"column {field.name!r} of {name} holds {kind}, not numbers: drop or encode it first")
    return fields


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
