"""The same fit from every kind of source, and every fault of a source in words."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as pads
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference import dataset
from mixproof.inference.dataset import Block, Dataset, is_chunks, numeric_columns, share, stream
from mixproof.inference.em import Fit, em
from mixproof.models import bernoulli, gaussian_diagonal, gaussian_full, laplace
from tests.conftest import Case, seeded

EPS = torch.finfo(torch.float64).eps
X = np.arange(24.0).reshape(12, 2) ** 1.5


class Chunks:
    """Chunks that can be read again and again."""

    def __init__(self, *chunks: Any):
        self.chunks = chunks

    def __iter__(self) -> Iterator[Any]:
        yield from self.chunks


def rows(x: Any, weights: Any = None, **options: Any) -> Tensor:
    """Return all rows of a source, read twice to the same."""
    found = Dataset(gaussian_full, x, weights, **options)
    first, second = (torch.cat([block.x for block in found]) for _ in range(2))
    assert torch.equal(first.nan_to_num(-1), second.nan_to_num(-1))
    return first


def few_steps(*args: Any, num_steps: int = 4, **kwargs: Any) -> Fit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return em(*args, max_steps=num_steps, rtol=0.0, **kwargs)


def assert_same(found: Fit, expected: Fit, factor: float = 1e4) -> None:
    eps = torch.finfo(expected.log_lik.dtype).eps
    for own, other in zip((*found.params, found.log_lik), (*expected.params, expected.log_lik), strict=True):
        assert own.dtype == other.dtype
        assert (own - other).abs().max() <= factor * eps * other.abs().max()


def memory_map(x: np.ndarray, folder: Path) -> np.memmap:
    np.save(folder / "x.npy", x)
    found = np.load(folder / "x.npy", mmap_mode="r")
    assert isinstance(found, np.memmap)
    return found


def table(x: np.ndarray, weights: np.ndarray | None = None) -> pa.Table:
    columns = {f"x{d}": np.ascontiguousarray(column) for d, column in enumerate(x.T)}
    return pa.table(columns if weights is None else {"w": weights, **columns})


def parquet(found: pa.Table, folder: Path, row_group_size: int = 17) -> pads.Dataset:
    pa.parquet.write_table(found.slice(0, 23), folder / "a.parquet", row_group_size=row_group_size)
    pa.parquet.write_table(found.slice(23), folder / "b.parquet", row_group_size=row_group_size)
    return pads.dataset([folder / "a.parquet", folder / "b.parquet"])


def csv(found: pa.Table, folder: Path) -> pads.Dataset:
    pa.csv.write_csv(found, folder / "x.csv")
    return pads.dataset(folder / "x.csv", format="csv")


Source = Callable[[np.ndarray, Path], Any]
SOURCES: dict[str, Source] = {
    "array": lambda x, _: x,
    "Fortran array": lambda x, _: np.asfortranarray(x),
    "read-only array": lambda x, _: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "other byte order": lambda x, _: x.astype(x.dtype.newbyteorder()),
    "lists": lambda x, _: x.tolist(),
    "data frame": lambda x, _: pd.DataFrame(x),
    "record batch": lambda x, _: table(x).to_batches()[0],
    "memory map": memory_map,
    "Fortran memory map": lambda x, folder: memory_map(np.asfortranarray(x), folder),
    "other byte order, mapped": lambda x, folder: memory_map(x.astype(x.dtype.newbyteorder()), folder),
    "part of a memory map": lambda x, folder: memory_map(np.concatenate([x[:3] + 1e9, x]), folder)[3:],
    "columns of a memory map": lambda x, folder: memory_map(np.column_stack([x[:, 0], x, x]), folder)[
        :, 1 : 1 + x.shape[1]
    ],
    "every second row, mapped": lambda x, folder: memory_map(np.repeat(x, 2, 0), folder)[::2],
    "reversed memory map": lambda x, folder: memory_map(x[::-1], folder)[::-1],
    "table": lambda x, _: table(x),
    "chunked table": lambda x, _: pa.concat_tables([table(x[:11]), table(x[11:])]),
    "Parquet": lambda x, folder: parquet(table(x), folder),
    "Parquet, filtered": lambda x, folder: parquet(table(np.concatenate([x, 0 * x - 7])), folder).filter(
        pads.field("x0") != -7.0
    ),
    "CSV": lambda x, folder: csv(table(x), folder),
    "list of arrays": lambda x, _: np.array_split(x, 7),
    "list of tensors": lambda x, _: list(torch.as_tensor(x).split(9)),
    "list of memory maps": lambda x, folder: [memory_map(x, folder)[:20], memory_map(x, folder)[20:]],
    "chunks": lambda x, _: Chunks(*np.array_split(x, 5)),
    "chunks, some empty": lambda x, _: Chunks(x[:0], x[:5], x[5:5], x[5:], x[:0]),
    "data frames": lambda x, _: Chunks(pd.DataFrame(x[:30]), pd.DataFrame(x[30:])),
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("entries", [1, 26, 1 << 20])
def test_the_rows_are_those_of_the_array(name: str, entries: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(dataset, "BLOCK_ENTRIES", entries)
    x = np.random.default_rng(0).normal(size=(60, 3))
    source = SOURCES[name](x, tmp_path)
    found = Dataset(gaussian_full, source)
    assert np.array_equal(torch.cat([block.x for block in found]).numpy(), x)
    blocks = list(found)
    starts = [block.first_row for block in blocks]
    assert starts == list(np.cumsum([0, *[len(block.x) for block in blocks]])[:-1])
    assert found.like.shape == (0, 3)
    assert found.like.dtype == torch.float64
    if not found.in_memory and "chunks" not in name and "list" not in name and name != "data frames":
        assert max(block.x.numel() for block in blocks) <= max(3, entries)
        assert len(blocks) >= min(60, 180 // max(3, entries))
    if isinstance(source, np.memmap):
        assert np.array_equal(source, x)  # its pages can be read after they were let go


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_same_fit(name: str, case: Case, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(dataset, "BLOCK_ENTRIES", 30)
    x = case.data(1, 60)
    start = case.start(2, x)
    source = SOURCES[name](x.numpy(), tmp_path)
    if not getattr(case.family, "additive", False) and not Dataset(case.family, source).in_memory:
        with pytest.raises(ValueError, match="needs all rows at once, not sums over them: give x as one matrix"):
            few_steps(case.family, source, start)
        return
    assert_same(few_steps(case.family, source, start), few_steps(case.family, x, start))


@pytest.mark.parametrize("kind_of_weights", ["vector", "list", "tensor", "mapped", "column"])
@pytest.mark.parametrize("name", ["array", "memory map", "table", "Parquet", "CSV", "chunks", "list of tensors"])
def test_row_weights_go_with_their_rows(
    name: str, kind_of_weights: str, case: Case, tmp_path: Path, monkeypatch: Any
) -> None:
    """Against the rows repeated so many times, where that can be said."""
    if not getattr(case.family, "additive", False):
        return
    monkeypatch.setattr(dataset, "BLOCK_ENTRIES", 30)
    x = case.data(1, 60)
    start = case.start(2, x)
    weights = np.random.default_rng(3).integers(0, 4, 60).astype(float)
    given: Any = {
        "vector": weights,
        "list": weights.tolist(),
        "tensor": torch.as_tensor(weights),
        "mapped": memory_map(weights[:, None], tmp_path)[:, 0],
        "column": "w",
    }[kind_of_weights]
    if kind_of_weights == "mapped" and name == "memory map":
        return  # one file
    if kind_of_weights == "column":
        if name not in ("table", "Parquet", "CSV"):
            with pytest.raises(TypeError, match="weights names a column, 'w', and x has no named columns"):
                em(case.family, SOURCES[name](x.numpy(), tmp_path), start, weights="w")
            return
        with_weights = table(x.numpy(), weights)
        source = {"table": lambda t, _: t, "Parquet": parquet, "CSV": csv}[name](with_weights, tmp_path)
    else:
        source = SOURCES[name](x.numpy(), tmp_path)
    repeated = x.repeat_interleave(torch.as_tensor(weights).long(), 0)
    assert_same(few_steps(case.family, source, start, weights=given), few_steps(case.family, repeated, start))


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12), entries=st.integers(1, 40), seed=st.integers(0, 99))
def test_blocks_of_any_size_give_the_same_fit(sizes: list[int], entries: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60 + sum(sizes), 2))
    weights = rng.random(len(x)) + 0.1
    chunks = np.split(x, np.cumsum([60, *sizes])[:-1])
    start = gaussian_diagonal.init_params(torch.as_tensor(x), 2, seeded(seed))
    expected = few_steps(gaussian_diagonal, x, start, weights=weights)
    columns = table(x, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "BLOCK_ENTRIES", entries)
        assert_same(few_steps(gaussian_diagonal, Chunks(*chunks), start, weights=weights), expected, 1e5)
        assert_same(few_steps(gaussian_diagonal, columns, start, weights="w"), expected, 1e5)
    for num_ranks in (1, 2, 3):  # the shares of the processes are disjoint and together all
        for source, own in ((Chunks(*chunks), weights), (columns, "w")):
            parts = [list(Dataset(gaussian_diagonal, share(source, rank, num_ranks), own)) for rank in range(num_ranks)]
            found = [torch.cat([b.x, b.weights[:, None]], 1) for part in parts for b in part if b.weights is not None]
            everything = torch.cat(found).numpy()
            order, expected_order = np.lexsort(everything.T), np.lexsort(np.column_stack([x, weights]).T)
            assert np.array_equal(everything[order], np.column_stack([x, weights])[expected_order])


@pytest.mark.parametrize("name", ["array", "memory map", "table", "Parquet", "chunks", "list of tensors"])
def test_float32_stays_float32(name: str, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    assert rows(SOURCES[name](x, tmp_path)).dtype == torch.float32
    start = gaussian_diagonal.init_params(torch.as_tensor(x), 2, seeded(0))
    assert_same(few_steps(gaussian_diagonal, SOURCES[name](x, tmp_path), start), few_steps(gaussian_diagonal, x, start))


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint16, np.bool_])
@pytest.mark.parametrize("name", ["array", "memory map", "table", "Parquet", "chunks", "list of tensors"])
def test_integers_and_booleans_become_float64(name: str, dtype: Any, tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 2, size=(60, 2)).astype(dtype)
    found = rows(SOURCES[name](x, tmp_path))
    assert found.dtype == torch.float64
    assert np.array_equal(found.numpy(), x)


def test_columns_of_several_types_have_one_type_in_all_blocks(monkeypatch: Any) -> None:
    """A null in an 8-bit column makes that column float64 in one block; beside float32 all blocks are float32."""
    monkeypatch.setattr(dataset, "BLOCK_ENTRIES", 4)
    columns = {"a": pa.array([1, 2, None, 4], pa.int8()), "b": pa.array([1.5, 2.5, None, 4.5], pa.float32())}
    found = rows(pa.table(columns), missing=True)
    assert found.dtype == torch.float32
    assert torch.equal(found.isnan(), torch.tensor([[False, False]] * 2 + [[True, True]] + [[False, False]]))
    assert torch.equal(found[[0, 1, 3]], torch.tensor([[1, 1.5], [2, 2.5], [4, 4.5]]))
    assert rows(pa.table({"a": pa.array([1, 2], pa.int64()), "b": pa.array([1, 2], pa.float32())})).dtype == (
        torch.float64
    )


@pytest.mark.parametrize(
    "column",
    [[1.0, None, 3.0], [1, None, 0], [True, None, False], [2**60, None, 1]],
    ids=["float", "int", "bool", "big"],
)
def test_null_is_missing_and_an_error_elsewhere(column: list, monkeypatch: Any) -> None:
    monkeypatch.setattr(dataset, "BLOCK_ENTRIES", 1)
    found = pa.table({"a": [1.0, 2.0, 3.0], "b": column})
    with pytest.raises(ValueError, match=re.escape("x[1, 1] is nan: drop or impute the row (em takes missing=True")):
        rows(found)
    expected = torch.tensor([[1.0, column[0]], [2.0, torch.nan], [3.0, column[2]]], dtype=torch.float64)
    assert torch.equal(rows(found, missing=True).nan_to_num(-1), expected.nan_to_num(-1))


def test_missing_values_in_blocks_give_the_fit_of_the_matrix(
    missing_case: Case, tmp_path: Path, monkeypatch: Any
) -> None:
    x: Tensor = missing_case.data(1, 60)
    start = missing_case.start(2, x)
    x[torch.rand(x.shape, generator=seeded(4)) < 0.2] = torch.nan
    expected = few_steps(missing_case.family, x, start, missing=True)
    monkeypatch.setattr(dataset, "BLOCK_ENTRIES", 30)
    for name in ("memory map", "table", "Parquet", "CSV", "chunks"):
        source = SOURCES[name](x.numpy(), tmp_path)
        assert_same(few_steps(missing_case.family, source, start, missing=True), expected)


def test_changes_to_a_private_memory_map_survive(tmp_path: Path) -> None:
    """Mode "c" keeps changes in pages that no file holds: letting them go would undo the changes."""
    memory_map(X, tmp_path)
    for mode in ("c", "r+"):
        mapped = np.load(tmp_path / "x.npy", mmap_mode=mode)
        mapped[3, 1] = 99.0
        changed = X.copy()
        changed[3, 1] = 99.0
        assert np.array_equal(rows(mapped).numpy(), changed)
        assert np.array_equal(mapped, changed)
        on_disk = np.load(tmp_path / "x.npy")
        assert np.array_equal(on_disk, changed if mode == "r+" else X)


def test_source_is_left_alone(tmp_path: Path) -> None:
    """A block belongs to whoever reads it: changing it changes no source that cannot be written to."""
    mapped = memory_map(X, tmp_path)
    for block in Dataset(gaussian_full, mapped):
        block.x.zero_()
    assert np.array_equal(mapped, X)


def generator() -> Iterator[np.ndarray]:
    yield X


class OneTime:
    """An iterable that gives the same iterator each time."""

    def __init__(self, *chunks: Any):
        self.iterator = iter(chunks)

    def __iter__(self) -> Iterator[Any]:
        return self.iterator


class Shrinking:
    """Chunks of which there are fewer each time."""

    def __init__(self) -> None:
        self.left = 4

    def __iter__(self) -> Iterator[Any]:
        self.left -= 1
        yield from [X] * self.left


@pytest.mark.parametrize(
    ("x", "weights", "error", "message"),
    [
        (generator(), None, TypeError, "x is a generator, which can be read only once, and each step reads all rows"),
        (OneTime(X, X, X), None, TypeError, "x is a OneTime, which can be read only once"),
        (OneTime(X), None, TypeError, "x is a OneTime, which can be read only once"),
        (Shrinking(), None, ValueError, "x had 24 rows on one pass and has 12 on the next"),
        (Chunks(X, X[:, :1]), None, ValueError, "2 columns of torch.float64 up to row 12 and 1 of torch.float64 from"),
        (Chunks(X, X, X.astype(np.float32)), None, ValueError, "up to row 24 and 2 of torch.float32 from there"),
        (Chunks(X, X[0]), None, ValueError, "x must have shape (N, D), not (2,): one feature is x[:, None]"),
        ([X, X[0]], None, ValueError, "x must have shape (N, D), not (2,): one feature is x[:, None]"),
        (Chunks(X, [["a", "b"]]), None, TypeError, "x must hold numbers"),
        (Chunks(1, 2), None, ValueError, "x must have shape (N, D), not ()"),
        (Chunks(), None, ValueError, "x has no rows: it needs at least one"),
        (Chunks(X[:0]), None, ValueError, "x has no rows: it needs at least one"),
        ([], None, ValueError, "x must have shape (N, D), not (0,)"),
        ("rows.csv", None, TypeError, "x must hold numbers"),
        ({"a": [1.0]}, None, TypeError, "x must hold numbers"),
        (Chunks(X, X * np.nan), None, ValueError, "x[12, 0] is nan"),
        (Chunks(X, np.where(np.eye(12, 2) > 0, np.inf, X)), None, ValueError, "x[12, 0] is inf"),
        (Chunks(X, X), np.ones(25), ValueError, "weights must have shape (24,), one for each row, not (25,)"),
        (Chunks(X, X), np.ones(23), ValueError, "one for each row: there are 23, and at least 24 rows"),
        (Chunks(X, X), np.ones((24, 1)), ValueError, "weights must have shape (N,), one for each row, not (24, 1)"),
        (Chunks(X, X), 1.0, ValueError, "weights must have shape (N,), one for each row, not ()"),
        (Chunks(X, X), np.r_[np.ones(20), -np.ones(4)], ValueError, "weights[20] is -1.0: a weight must be finite"),
        (Chunks(X, X), np.r_[np.ones(23), np.nan], ValueError, "weights[23] is nan: a weight must be finite"),
        (Chunks(X, X), ["a"] * 24, TypeError, "weights must hold numbers"),
        (table(X), "u", ValueError, "there is no column 'u' of weights; the columns are x0, x1"),
        (table(X, np.r_[np.ones(11), -1.0]), "w", ValueError, "weights[11] is -1.0"),
        (pa.table({"x": [1.0, 2.0], "w": [1.0, None]}), "w", ValueError, "weights[1] is nan"),
        (pa.table({"x": [1.0], "w": ["a"]}), "w", TypeError, "column 'w' holds string, not numbers"),
        (pa.table({"w": [1.0]}), "w", ValueError, "the data have no columns: at least one must hold a feature"),
        (pa.table({"a": [1.0], "b": ["z"]}), None, TypeError, "column 'b' holds string, not numbers"),
        (pa.table({"a": [1.0], "b": [None]}), None, TypeError, "column 'b' holds null, not numbers"),
        (pa.table([[1.0], [2.0]], ["a", "a"]), None, ValueError, "two columns have the name 'a': rename one"),
        (pa.table({"a": pa.array([], pa.float64())}), None, ValueError, "x has no rows"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_faults_of_a_source_are_errors_in_words(x: Any, weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        rows(x, weights)


@pytest.mark.parametrize("shape", [(12,), (2, 3, 4), (0, 2)])
def test_memory_maps_of_other_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    message = "x has no rows" if shape == (0, 2) else f"x must have shape (N, D), not {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        Dataset(gaussian_full, memory_map(np.ones(shape), tmp_path))


def test_rows_outside_the_support_are_named_by_their_number_in_all_the_data(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(dataset, "BLOCK_ENTRIES", 8)
    x = np.ones((40, 2))
    x[33, 1] = 2.0
    for name in ("memory map", "table", "Parquet", "CSV", "chunks"):
        with pytest.raises(ValueError, match=re.escape("x[33, 1] is 2.0, outside the support of this family (0 or 1)")):
            list(Dataset(bernoulli, SOURCES[name](x, tmp_path)))


def test_impossible_rows_are_named_by_their_number_in_all_the_data(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(dataset, "BLOCK_ENTRIES", 8)
    x = np.random.default_rng(0).normal(size=(40, 2))
    x[29] = 1e160
    start = gaussian_diagonal.Params(*(torch.tensor(v).double() for v in ([0.5, 0.5], [[0, 0], [1, 1]], [[1, 1]] * 2)))
    for name in ("array", "memory map", "table", "chunks"):
        with pytest.raises(ValueError, match="row 29 is impossible under every component at the start"):
            em(gaussian_diagonal, SOURCES[name](x, tmp_path), start)


def test_laplace_refuses_blocks_and_takes_the_matrix() -> None:
    start = laplace.init_params(torch.as_tensor(X), 1, seeded(0))
    message = (
        "the M-step of this family needs all rows at once, not sums over them: give x as one matrix, to one process"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        em(laplace, [X, X], start)
    assert few_steps(laplace, X, start).params.locs.shape == (1, 2)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["array", "memory map", "table", "Parquet", "Parquet, filtered", "CSV", "chunks"])
def test_shares_are_disjoint_and_together_all_rows(name: str, num_ranks: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(dataset, "BLOCK_ENTRIES", 16)
    x = np.random.default_rng(0).normal(size=(60, 2))
    found = [rows(share(SOURCES[name](x, tmp_path), rank, num_ranks)) for rank in range(num_ranks)]
    together = torch.cat(found).numpy()
    assert sum(len(part) for part in found) == 60
    assert np.array_equal(together[np.argsort(together[:, 0])], x[np.argsort(x[:, 0])])
    with pytest.raises(ValueError, match=f"rank must be between 0 and {num_ranks - 1}, and is {num_ranks}"):
        share(x, num_ranks, num_ranks)


def test_every_nth_row_keeps_its_weights() -> None:
    """Each process reads all the chunks, and takes its weights out of those of all rows."""
    source, weights = Chunks(X[:5], X[:0], X[5:6], X[6:]), np.arange(12.0)
    for rank in range(3):
        blocks = list(Dataset(gaussian_full, share(source, rank, 3), weights))
        assert np.array_equal(torch.cat([block.x for block in blocks]).numpy(), X[rank::3])
        found = torch.cat([block.weights for block in blocks if block.weights is not None])
        assert np.array_equal(found.numpy(), weights[rank::3])
        assert [b.first_row for b in blocks] == list(np.cumsum([0, *[len(b.x) for b in blocks]])[:-1])
        for wrong in (np.arange(4.0), np.arange(13.0)):  # 4 are as many as its own rows
            with pytest.raises(ValueError, match="weights must have shape"):
                list(Dataset(gaussian_full, share(source, rank, 3), wrong))


def test_union_of_datasets_and_datasets_in_memory_are_shared_by_blocks() -> None:
    for source in (pads.dataset(table(X)), pads.dataset([pads.dataset(table(X[:6])), pads.dataset(table(X[6:]))])):
        assert np.array_equal(rows(share(source, 0, 1)).numpy(), X)


def test_streams_are_read_once_and_in_order() -> None:
    blocks = list(stream(gaussian_full, (part for part in (X[:5], X[:0], X[5:]))))
    assert [(block.first_row, len(block.x)) for block in blocks] == [(0, 5), (5, 7)]
    assert np.array_equal(torch.cat([block.x for block in blocks]).numpy(), X)
    assert all(isinstance(block, Block) and block.weights is None for block in blocks)


def test_what_counts_as_chunks() -> None:
    assert is_chunks([X, X])
    assert is_chunks(Chunks(X))
    assert is_chunks([torch.as_tensor(X)])
    assert not any(is_chunks(value) for value in (X, X.tolist(), list(X), torch.as_tensor(X), [], "abc", 3, None))
    assert numeric_columns(table(X, X[:, 0]).schema, "w") == ["x0", "x1"]


MEMORY = """
import re, sys
from pathlib import Path
import numpy as np, pyarrow.dataset, torch
from mixproof.inference.dataset import Dataset
from mixproof.models import gaussian_full
torch.set_num_threads(1)
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
def source(name): return np.load(name, mmap_mode="r") if name.endswith("npy") else pyarrow.dataset.dataset(name)
for _ in Dataset(gaussian_full, source(sys.argv[1])): pass
before, total = peak(), torch.zeros(8, dtype=torch.float64)
for _ in range(2):
    for block in Dataset(gaussian_full, source(sys.argv[2])):
        total += block.x.sum(0)
print(before, peak(), *total.tolist())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("ending", ["npy", "parquet"])
def test_memory_does_not_grow_with_the_file(ending: str, tmp_path: Path) -> None:
    """A process that has read a small file, of one row group, reads one of 400 MB in 150 MB more at most."""
    rng = np.random.default_rng(0)
    piece = rng.normal(size=(1 << 18, 8))
    small, large = (str(tmp_path / f"{size}.{ending}") for size in ("small", "large"))
    num_pieces = 24
    if ending == "npy":
        np.save(small, piece)
        mapped = np.lib.format.open_memmap(large, "w+", np.float64, (num_pieces * len(piece), 8))
        for i in range(num_pieces):
            mapped[i * len(piece) : (i + 1) * len(piece)] = piece
        mapped.flush()
        del mapped
    else:
        pa.parquet.write_table(table(piece), small)
        with pa.parquet.ParquetWriter(large, table(piece).schema) as writer:
            for _ in range(num_pieces):
                writer.write_table(table(piece))
    assert Path(large).stat().st_size >= 400e6
    done = subprocess.run([sys.executable, "-c", MEMORY, small, large], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, peak, *total = map(float, done.stdout.split())
    assert peak - before <= 150
    expected = 2 * num_pieces * piece.sum(0)
    assert np.abs(total - expected).max() <= 1e-9 * 2 * num_pieces * np.abs(piece).sum(0).max()
