"""Rows that can be read again and again in blocks: tensors, arrays and memory maps, Arrow tables and files, chunks.

EM and its relatives need one pass over the data a step and no more than a block of them at a time, so that the data may
lie on disk. A block is checked each time it is read, and an error names the row by its number in all the data.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import torch
from torch import Tensor

from mixproof.inference.validation import check_row_weights, check_rows

BLOCK_ENTRIES = 1 << 21
"""How many numbers of a memory map or an Arrow source are in memory at a time: 16 MiB in float64."""


class Block(NamedTuple):
    """Consecutive rows."""

    first_row: int
    """The number of the first of them in all the data."""
    x: Tensor
    """(n, D)."""
    weights: Tensor | None
    """(n,), how often each row counts; None counts each once."""


class Dataset:
    """The rows of a family and their weights, in blocks; iterating starts anew each time.

    Args:
        family: a family of the contract.
        x: the data (N, D): a tensor, or what numpy reads as a numeric matrix; a ``numpy.memmap``; a ``pyarrow.Table``
            or a ``pyarrow.dataset.Dataset`` (Parquet, CSV and others) whose columns are the features; or chunks (n, D)
            in a list or in any object whose ``__iter__`` starts anew.
        weights: (N,), how often each row counts, not negative; the name of the column of an Arrow source that holds
            them; None counts each once.
        device: where the blocks go; None leaves them where they are.
        missing: whether NaN marks a missing entry.

    Raises:
        TypeError: x can be read only once, holds no numbers, or the weights name a column and x has none.
        ValueError: the first block is not what it must be.
    """

    def __init__(
        self,
        family: Any,
        x: Any,
        weights: Any = None,
        *,
        device: torch.device | str | None = None,
        missing: bool = False,
    ):
        self._family, self._device, self._missing = family, device, missing
        self._weight_column = weights if isinstance(weights, str) else None
        self._weights = None if isinstance(weights, str) else weights
        self.in_memory = not isinstance(x, np.memmap | pa.Table | pads.Dataset | _EveryNth) and not is_chunks(x)
        named = x.source if isinstance(x, _EveryNth) else x
        if self._weight_column is not None and not isinstance(named, pa.Table | pads.Dataset):
            raise TypeError(f"weights names a column, {weights!r}, and x has no named columns: give the weights (N,)")
        if self.in_memory:
            rows = self._check(x, 0)
            whole = Block(0, rows, check_row_weights(self._weights, rows, first_row=0))
            self._blocks: Callable[[], Iterable[Block]] = lambda: [whole]
        else:
            read = _reader(x, self._weight_column)
            self._blocks = lambda: self._checked(read())
        first = next(iter(self), None)
        if first is None:
            raise ValueError("x has no rows: it needs at least one")
        self.like = first.x[:0]
        """A tensor (0, D) of the type and on the device of the data."""

    def __iter__(self) -> Iterator[Block]:
        yield from self._blocks()

    def _checked(self, chunks: Iterator[tuple[Any, Any]]) -> Iterator[Block]:
        first_row, like = 0, None
        for chunk, column in chunks:
            x = self._check(chunk, first_row)
            if like is not None and (x.shape[1], x.dtype) != like:
                before, now = f"{like[0]} columns of {like[1]}", f"{x.shape[1]} of {x.dtype}"
                raise ValueError(f"x has {before} up to row {first_row} and {now} from there")
            like = (x.shape[1], x.dtype)
            weights = column
            if weights is None and self._weights is not None:
                weights = self._weights[first_row : first_row + len(x)]
            yield Block(first_row, x, check_row_weights(weights, x, first_row=first_row))
            first_row += len(x)
        if self._weights is not None and len(self._weights) != first_row:
            raise ValueError(f"weights must have shape ({first_row},), one for each row, not ({len(self._weights)},)")

    def _check(self, x: Any, first_row: int) -> Tensor:
        x = check_rows(self._family, x, first_row=first_row, missing=self._missing)
        return x if self._device is None else x.to(self._device)


def is_chunks(x: Any) -> bool:
    """Return whether x is a series of matrices rather than one.

    Raises:
        TypeError: it can be read only once.
    """
    if isinstance(x, Tensor | np.ndarray) or hasattr(x, "__array__"):
        return False
    if isinstance(x, Sequence):
        return len(x) > 0 and all(getattr(part, "ndim", None) == 2 for part in x)
    if isinstance(x, Iterator):
        raise TypeError(
            f"x is a {type(x).__name__}, which can be read only once, and each step reads all rows: give an object "
            "whose __iter__ starts anew, or a list of chunks"
        )
    return isinstance(x, Iterable)


def _reader(x: Any, weight_column: str | None) -> Callable[[], Iterator[tuple[Any, Any]]]:
    """Return what reads the chunks (n, D) of a source and their weights (n,) or None, from the first row on."""
    if isinstance(x, _EveryNth):
        read = _reader(x.source, weight_column)
        return lambda: islice(read(), x.rank, None, x.num_ranks)
    if isinstance(x, np.memmap):
        return lambda: _read_memmap(x)
    if isinstance(x, pa.Table | pads.Dataset):
        names = numeric_columns(x.schema, weight_column)
        return lambda: _read_arrow(x, names, weight_column)
    return lambda: ((chunk, None) for chunk in x)


def _read_memmap(x: np.memmap) -> Iterator[tuple[Any, None]]:
    rows = max(1, BLOCK_ENTRIES // max(1, x.shape[-1]))
    for start in range(0, len(x), rows):
        yield np.array(x[start : start + rows]), None
        pages: mmap.mmap | None = getattr(x, "_mmap", None)
        if pages is not None and x.mode in ("r", "r+") and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)  # else what was read stays in the resident set


def _read_arrow(x: Any, names: list[str], weight_column: str | None) -> Iterator[tuple[Any, Any]]:
    columns = names if weight_column is None else [*names, weight_column]
    rows = max(1, BLOCK_ENTRIES // len(columns))
    if isinstance(x, pa.Table):
        batches = iter(x.select(columns).to_batches(max_chunksize=rows))
    else:
        batches = x.to_batches(columns=columns, batch_size=rows, batch_readahead=2, fragment_readahead=1)
    for batch in batches:
        if batch.num_rows:
            arrays = [batch.column(name).to_numpy(zero_copy_only=False) for name in columns]
            weights = None if weight_column is None else arrays.pop()
            yield np.column_stack(arrays), weights


@dataclass(frozen=True)
class _EveryNth:
    """A source of which a process keeps every ``num_ranks``-th chunk."""

    source: Any
    rank: int
    num_ranks: int


def numeric_columns(schema: pa.Schema, weight_column: str | None = None) -> list[str]:
    """Return the names of the features of an Arrow schema, all columns but that of the weights.

    Raises:
        TypeError: a column does not hold numbers.
        ValueError: there is no such column of weights, or nothing else.
    """
    if weight_column is not None and weight_column not in schema.names:
        raise ValueError(f"there is no column {weight_column!r} of weights; the columns are {', '.join(schema.names)}")
    names = [name for name in schema.names if name != weight_column]
    for name in names:
        kind = schema.field(name).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
            raise TypeError(f"column {name!r} holds {kind}, not numbers: drop or encode it first")
    if not names:
        raise ValueError("the data have no columns: at least one must hold a feature")
    return names


def share(x: Any, rank: int, num_ranks: int) -> Any:
    """Return the rows of a source that are one process's own: disjoint, together all of them.

    Args:
        x: the data, as ``Dataset`` takes them.
        rank: the number of the process, from 0.
        num_ranks: how many processes there are.

    Returns:
        A source of the same kind where rows can be addressed: consecutive rows of a matrix or table, row groups of
        Parquet files. Of other files and chunks each process reads all and keeps every ``num_ranks``-th block.

    Raises:
        ValueError: the rank is not one of them.
    """
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank must be between 0 and {num_ranks - 1}, and is {rank}")
    if isinstance(x, pa.Table):
        first, last = (x.num_rows * r // num_ranks for r in (rank, rank + 1))
        return x.slice(first, last - first)
    if isinstance(x, pads.Dataset):
        return _dataset_share(x, rank, num_ranks)
    if is_chunks(x):
        return _EveryNth(x, rank, num_ranks)
    first, last = (len(x) * r // num_ranks for r in (rank, rank + 1))
    return x[first:last]


def _dataset_share(x: pads.Dataset, rank: int, num_ranks: int) -> Any:
    fragments: list[Any] = list(x.get_fragments())
    if all(isinstance(fragment, pads.ParquetFileFragment) for fragment in fragments):
        fragments = [group for fragment in fragments for group in fragment.split_by_row_group()]
    if len(fragments) < num_ranks:
        return _EveryNth(x, rank, num_ranks)
    first, last = (len(fragments) * r // num_ranks for r in (rank, rank + 1))
    return pads.FileSystemDataset(fragments[first:last], x.schema, fragments[0].format, fragments[0].filesystem)
