"""Rows that can be read again and again in blocks: tensors, arrays and memory maps, Arrow tables and files, chunks.

EM and its relatives need one pass over the data a step and no more than a block of them at a time, so that the data may
lie on disk. A block is checked each time it is read, and an error names the row by its number in all the data.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import torch
from torch import Tensor

from mixproof.inference.distributed import Group, gather_objects, rank_and_size, together
from mixproof.inference.validation import as_array, check_data, check_row_weights, check_rows, data_support

BLOCK_ENTRIES = 1 << 21
"""How many numbers of a memory map or an Arrow source are in memory at a time: 16 MiB in float64."""


class Block(NamedTuple):
    """Consecutive rows."""

    first_row: int
    """The number of the first of them in all the data; of a group, in this process's own."""
    x: Tensor
    """(n, D)."""
    weights: Tensor | None
    """(n,), how often each row counts; None counts each once."""

    def rows(self, start: int, stop: int) -> Block:
        """Return the block of some of the rows."""
        weights = None if self.weights is None else self.weights[start:stop]
        return Block(self.first_row + start, self.x[start:stop], weights)


class Dataset:
    """The rows of a family and their weights, in blocks; iterating starts anew each time.

    Args:
        family: a family of the contract.
        x: the data (N, D): a tensor, or what numpy reads as a numeric matrix; a ``numpy.memmap``; a ``pyarrow.Table``
            or a ``pyarrow.dataset.Dataset`` (Parquet, CSV and others) whose columns are the features; or chunks (n, D)
            in a list or in any object whose ``__iter__`` starts anew, each of them a block, a memory map several.
        weights: (N,), how often each row counts, not negative; the name of the column of an Arrow source that holds
            them; None counts each once.
        device: where the blocks go; None leaves them where they are.
        missing: whether NaN, or null in an Arrow source, marks a missing entry.

    Raises:
        TypeError: x can be read only once, holds no numbers, or the weights name a column and x has none.
        ValueError: the first block is not what it must be. Iterating raises for the others, and where a pass gives
            other rows than the one before, or the weights are not as many as the rows.
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
        x, self._rank, self._num_ranks = (x.source, x.rank, x.num_ranks) if isinstance(x, _EveryNth) else (x, 0, 1)
        self._check = _Check(family, device, missing)
        weight_column = weights if isinstance(weights, str) else None
        if weight_column is not None and not isinstance(x, pa.Table | pads.Dataset):
            raise TypeError(f"weights names a column, {weights!r}, and x has no named columns: give the weights (N,)")
        self.in_memory = not isinstance(x, np.memmap | pa.Table | pads.Dataset) and not is_chunks(x)
        self._num_rows: int | None = None
        if self.in_memory:
            rows = self._check(x, 0)
            whole = Block(0, rows, check_row_weights(weights, rows, first_row=0))
            self._blocks: Callable[[], Iterable[Block]] = lambda: [whole]
        else:
            self._weights = None if weights is None or weight_column is not None else _vector(weights)
            read = _reader(x, weight_column)
            self._blocks = lambda: self._checked(read())
        first = next(iter(self), None)
        if first is None:
            raise ValueError("x has no rows: it needs at least one")
        self.like = first.x.new_empty(0, first.x.shape[1])
        """A tensor (0, D) of the type and on the device of the data."""

    def __iter__(self) -> Iterator[Block]:
        yield from self._blocks()

    def _checked(self, chunks: Iterator[tuple[Any, Any]]) -> Iterator[Block]:
        """Yield the blocks of this process out of all chunks; the weights are those of all rows."""
        first_row = own_rows = 0
        for chunk, column in chunks:
            x, weights = self._check(chunk, first_row), column
            if self._weights is not None:
                weights = self._weights[first_row : first_row + len(x)]
                if len(weights) < len(x):
                    have = f"there are {len(self._weights)}, and at least {first_row + len(x)} rows"
                    raise ValueError(f"weights must have shape (N,), one for each row: {have}")
            weights = check_row_weights(weights, x, first_row=first_row)
            own = slice((self._rank - first_row) % self._num_ranks, None, self._num_ranks)
            first_row += len(x)
            if len(x[own]):
                yield Block(own_rows, x[own], None if weights is None else weights[own])
                own_rows += len(x[own])
        if self._num_rows not in (None, first_row):
            raise ValueError(f"x had {self._num_rows} rows on one pass and has {first_row} on the next: they must stay")
        self._num_rows = first_row
        if self._weights is not None and len(self._weights) != first_row:
            raise ValueError(f"weights must have shape ({first_row},), one for each row, not ({len(self._weights)},)")


def stream(family: Any, chunks: Any, *, device: torch.device | str | None = None) -> Iterator[Block]:
    """Yield the rows of a source that may be readable only once, such as a generator, in checked blocks.

    Args:
        family: a family of the contract.
        chunks: matrices (n, D) in any iterable, or one of the sources that ``Dataset`` reads in blocks.
        device: where the blocks go; None leaves them where they are.

    Raises:
        TypeError: chunks is a single matrix or no iterable at all, or holds no numbers.
        ValueError: a chunk is not what it must be, or has another number of columns or another type than the first.
    """
    if not isinstance(chunks, np.memmap | pa.Table | pads.Dataset | Iterator) and not is_chunks(chunks):
        raise TypeError("chunks must be an iterable of matrices (n, D): a single matrix x goes as [x]")
    check, first_row = _Check(family, device, missing=False), 0
    for chunk, _ in _reader(chunks, None)():
        x = check(chunk, first_row)
        yield Block(first_row, x, None)
        first_row += len(x)


class _Check:
    """The checks of blocks (n, D), and that each is like the first."""

    def __init__(self, family: Any, device: torch.device | str | None, missing: bool):
        self._family, self._device, self._missing = family, device, missing
        self._like: tuple[int, torch.dtype] | None = None

    def __call__(self, x: Any, first_row: int) -> Tensor:
        if self._like is None:
            x = check_rows(self._family, x, first_row=first_row, missing=self._missing)
            self._like, self._support = (x.shape[1], x.dtype), data_support(self._family, x.shape[1])
        else:
            x = check_data(x, self._support, first_row=first_row, missing=self._missing)
            if (x.shape[1], x.dtype) != self._like:
                before, now = f"{self._like[0]} columns of {self._like[1]}", f"{x.shape[1]} of {x.dtype}"
                raise ValueError(f"x has {before} up to row {first_row} and {now} from there")
        return x if self._device is None else x.to(self._device)


def is_chunks(x: Any) -> bool:
    """Return whether x is a series of matrices rather than one.

    Raises:
        TypeError: it can be read only once.
    """
    if isinstance(x, Tensor | np.ndarray | str | Mapping) or hasattr(x, "__array__"):
        return False
    if isinstance(x, Sequence):
        return any(getattr(part, "ndim", None) == 2 for part in x)
    if isinstance(x, Iterator):
        raise TypeError(_only_once(x))
    return isinstance(x, Iterable)


def _only_once(x: Any) -> str:
    return (
        f"x is a {type(x).__name__}, which can be read only once, and each step reads all rows: give an object whose "
        "__iter__ starts anew, or a list of chunks"
    )


def _reader(x: Any, weight_column: str | None) -> Callable[[], Iterator[tuple[Any, Any]]]:
    """Return what reads the chunks (n, D) of a source, n >= 1, and their weights (n,) or None, from the first on."""
    if isinstance(x, np.memmap):
        if x.ndim != 2:
            raise ValueError(f"x must have shape (N, D), not {x.shape}")
        return lambda: _read_memmap(x)
    if isinstance(x, pa.Table | pads.Dataset):
        names = numeric_columns(x.schema, weight_column)
        return lambda: _read_arrow(x, names, weight_column)
    last: Any = None

    def read() -> Iterator[tuple[Any, None]]:
        nonlocal last
        chunks = iter(x)
        if chunks is last:
            raise TypeError(_only_once(x))
        last = chunks
        for chunk in chunks:
            if isinstance(chunk, np.memmap) and chunk.ndim == 2:
                yield from _read_memmap(chunk)
            elif np.ndim(chunk) == 0 or len(chunk):
                yield chunk, None

    return read


def _own_slice(num_rows: int, rank: int, num_ranks: int) -> slice:
    return slice(num_rows * rank // num_ranks, num_rows * (rank + 1) // num_ranks)


def _read_memmap(x: np.memmap) -> Iterator[tuple[Any, None]]:
    rows = max(1, BLOCK_ENTRIES // max(1, x.shape[1]))
    for start in range(0, len(x), rows):
        yield np.array(x[start : start + rows], order="C"), None
        pages: mmap.mmap | None = getattr(x, "_mmap", None)
        if pages is not None and x.mode in ("r", "r+", "w+") and hasattr(mmap, "MADV_DONTNEED"):
            # else what was read stays in the resident set; changes in mode "c" are nowhere else, and must stay
            pages.madvise(mmap.MADV_DONTNEED)


def _read_arrow(x: Any, names: list[str], weight_column: str | None) -> Iterator[tuple[Any, Any]]:
    columns = names if weight_column is None else [*names, weight_column]
    rows = max(1, BLOCK_ENTRIES // len(columns))
    dtype = np.result_type(*(x.schema.field(name).type.to_pandas_dtype() for name in names))
    dtype = dtype if dtype.kind == "f" else np.dtype(np.float64)  # of all blocks, whether a null is in one or not
    if isinstance(x, pa.Table):
        batches = iter(x.select(columns).to_batches(max_chunksize=rows))
    else:
        batches = _scan(x, columns, rows)
    for batch in batches:
        if batch.num_rows:
            chunk = np.empty((batch.num_rows, len(names)), dtype)
            for d, name in enumerate(names):
                chunk[:, d] = _values(batch.column(name))
            yield chunk, None if weight_column is None else _values(batch.column(weight_column)).astype(np.float64)


def _scan(x: pads.Dataset, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Yield a dataset in batches of at most so many rows, one piece of a file after the other.

    A scan of all of it at once decodes more and more ahead of a slow reader, a gigabyte of Parquet in the end.
    """
    options = {"columns": columns, "batch_size": rows, "batch_readahead": 0, "fragment_readahead": 0}
    pieces = _pieces(x)
    if pieces is None:
        yield from x.to_batches(**options)
    else:
        for piece in pieces:
            yield from piece.to_batches(schema=x.schema, **options)


def _pieces(x: pads.Dataset) -> Iterator[Any] | None:
    """Yield the row groups of Parquet files and other files whole; None of a filtered or projected dataset."""
    try:
        fragments = x.get_fragments()
    except ValueError:  # the fragments would lose the filter
        return None
    return (
        piece
        for fragment in fragments
        for piece in (fragment.split_by_row_group() if isinstance(fragment, pads.ParquetFileFragment) else [fragment])
    )


def _values(column: pa.Array) -> np.ndarray:
    """Return the numbers of an Arrow column (n,), NaN for a null."""
    if column.null_count and not pa.types.is_floating(column.type):
        column = column.cast(pa.float64(), safe=False)
    return column.to_numpy(zero_copy_only=False)


def _vector(weights: Any) -> Any:
    """Return weights as something that can be sliced, or say that they are no vector."""
    weights = weights if isinstance(weights, Tensor | np.memmap) else as_array(weights, "weights")
    if weights.ndim != 1:
        raise ValueError(f"weights must have shape (N,), one for each row, not {tuple(weights.shape)}")
    return weights


@dataclass(frozen=True)
class _EveryNth:
    """A source of which a process keeps every ``num_ranks``-th row."""

    source: Any
    rank: int
    num_ranks: int


def numeric_columns(schema: pa.Schema, weight_column: str | None = None) -> list[str]:
    """Return the names of the features of an Arrow schema, all columns but that of the weights.

    Raises:
        TypeError: a column does not hold numbers.
        ValueError: there is no such column of weights, or nothing else, or two columns have one name.
    """
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise ValueError(f"two columns have the name {twice[0]!r}: rename one")
    if weight_column is not None and weight_column not in schema.names:
        raise ValueError(f"there is no column {weight_column!r} of weights; the columns are {', '.join(schema.names)}")
    names = [name for name in schema.names if name != weight_column]
    for name in schema.names:
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
        Consecutive rows of a matrix or table, or row groups of Parquet files if there are enough for each process to
        have some. Of other sources each process reads all, and keeps every ``num_ranks``-th row: beside those, weights
        (N,) go whole to each process, and beside a matrix or a table they are shared as it is.

    Raises:
        ValueError: the rank is not one of them.
    """
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank must be between 0 and {num_ranks - 1}, and is {rank}")
    if isinstance(x, pa.Table):
        own = _own_slice(x.num_rows, rank, num_ranks)
        return x.slice(own.start, own.stop - own.start)
    if isinstance(x, pads.Dataset):
        return _dataset_share(x, rank, num_ranks)
    if is_chunks(x):
        return _EveryNth(x, rank, num_ranks)
    return x[_own_slice(len(x), rank, num_ranks)]


def _dataset_share(x: pads.Dataset, rank: int, num_ranks: int) -> Any:
    groups = list(_pieces(x) or ())
    if not all(isinstance(group, pads.ParquetFileFragment) for group in groups):
        return _EveryNth(x, rank, num_ranks)
    sizes = np.array([group.row_groups[0].num_rows for group in groups])
    # the process in whose part of the rows the middle of the group lies
    owners = (2 * sizes.cumsum() - sizes) * num_ranks // max(1, 2 * sizes.sum())
    if len(np.unique(owners[sizes > 0])) < num_ranks:
        return _EveryNth(x, rank, num_ranks)
    own = [group for group, owner in zip(groups, owners, strict=True) if owner == rank]
    return pads.FileSystemDataset(own, x.schema, own[0].format, own[0].filesystem)


def read_at_once(dataset: Dataset, max_entries: int | None = None) -> Block | None:
    """Return all rows as one block, or None where they hold more numbers than may be in memory.

    Args:
        dataset: the rows.
        max_entries: the largest N D; None sets no limit.
    """
    blocks, entries = [], 0
    for block in dataset:
        entries += block.x.numel()
        if max_entries is not None and entries > max_entries:
            return None
        blocks.append(block)
    parts = [block.weights for block in blocks if block.weights is not None]
    return Block(0, torch.cat([block.x for block in blocks]), torch.cat(parts) if parts else None)


def sample_rows(
    dataset: Dataset, num_rows: int, generator: torch.Generator, group: Group = None
) -> tuple[Tensor, Tensor]:
    """Return rows drawn without replacement, all that count as likely as each other, and their weights, in one pass.

    Each row gets an exponential time of arrival, and the first to arrive are the sample. The first of all are among the
    first of each process, so that what processes keep can be put together.

    Args:
        dataset: the rows; of a group, this process's own.
        num_rows: how many to draw; if there are no more of positive weight, they are all returned.
        generator: the only source of randomness, on the CPU; of a group, in the same state in all processes.
        group: the ``torch.distributed`` processes that hold the rows together, as ``em`` takes it.

    Returns:
        (n, D) and (n,), n <= num_rows, on the CPU, in the order of the data, the same in all processes; the weights are
        positive, and 1 where the rows have none.

    Raises:
        ValueError: num_rows is below 1, or all weights are 0.
    """
    if num_rows < 1:
        raise ValueError(f"num_rows must be at least 1, not {num_rows}")
    rank, num_ranks = rank_and_size(group)
    common = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=generator)))
    own = torch.Generator().manual_seed(int(torch.randint(2**62, (num_ranks,), generator=common)[rank]))
    times = torch.zeros(0, dtype=torch.float64)
    rows = dataset.like.cpu()
    weights = rows.new_empty(0)
    with together(group, dataset.like.device):
        for block in dataset:
            arrivals = torch.empty(len(block.x), dtype=torch.float64).exponential_(generator=own)
            counts = torch.ones_like(block.x[:, 0]) if block.weights is None else block.weights
            latest = times.max() if len(times) == num_rows else torch.tensor(torch.inf)
            early = ((arrivals < latest) & (counts > 0).cpu()).nonzero().flatten()
            times = torch.cat([times, arrivals[early]])
            rows = torch.cat([rows, block.x[early.to(block.x.device)].cpu()])
            weights = torch.cat([weights, counts[early.to(block.x.device)].cpu()])
            first = _first_to_arrive(times, num_rows)
            times, rows, weights = times[first], rows[first], weights[first]
    all_times = torch.cat(gather_objects(group, times))
    if not len(all_times):
        raise ValueError("all weights are 0: at least one row must count")
    early = times <= all_times[_first_to_arrive(all_times, num_rows)].max()
    return torch.cat(gather_objects(group, rows[early])), torch.cat(gather_objects(group, weights[early]))


def _first_to_arrive(times: Tensor, num_rows: int) -> Tensor:
    """Return the numbers (n,) of the smallest times (m,), n <= num_rows, in rising order of the numbers."""
    if len(times) <= num_rows:
        return torch.arange(len(times))
    return times.topk(num_rows, largest=False).indices.sort().values
