"""EM in several processes: the same Fit in each and as in one, failure in all when one fails, and shares of the data.

The processes are real ones. This file run as a script forks them, so that a test session pays for one more start of
Python and no more; what each of them found comes back in a file.
"""

from __future__ import annotations

import builtins
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as pads
import pyarrow.parquet
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference.dataset import Dataset, read_at_once, sample_rows, share
from mixproof.inference.em import em
from mixproof.models import gaussian_full, laplace

if TYPE_CHECKING:
    from tests.conftest import Case

ROOT = Path(__file__).resolve().parents[1]
SIZES = (2, 3)
NUM_ROWS = 61
CUTS = {2: (0, 7, NUM_ROWS), 3: (0, 4, 25, NUM_ROWS)}
"""Where the rows of one process end and those of the next begin."""
FALSE_ALARM = 1e-6
"""Of each test of draws."""

# What a process does. Each function below runs in every process of a group at once.


def fit_arguments(case: Case, kind: str, seed: int = 1) -> tuple[Tensor, Any, dict[str, Any]]:
    """Return rows, a start and settings: flat with row weights, of which some are 0, or a prior without."""
    x = case.data(seed, NUM_ROWS)
    prior = case.prior_or_flat(kind)
    weights = None
    if kind == "flat":
        weights = 3 * torch.rand(NUM_ROWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        weights[:7] = 0  # with two processes all that the first one has
    return x, case.start(seed + 1, x, prior=prior), {"prior": prior, "weights": weights}


def few_steps(case: Case, kind: str, own: slice = slice(None), **kwargs: Any) -> Any:
    x, start, options = fit_arguments(case, kind)
    if options["weights"] is not None:
        options["weights"] = options["weights"][own]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return em(case.family, x[own], start, max_steps=6, rtol=0.0, **options, **kwargs)


def overlapping() -> tuple[Tensor, Any]:
    """Return data and a start from which EM is slow and its accelerator is at work."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(300, 2, generator=generator, dtype=torch.float64)
    x[::2, 0] += 3
    return x, gaussian_full.init_params(x, 2, generator)


class GoesBad:
    """Chunks of a file that is whole in the first two passes."""

    def __init__(self, x: Tensor):
        self.x, self.num_passes = x, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.num_passes += 1
        yield self.x[:3]
        if self.num_passes > 4:
            raise OSError("the disk is gone")
        yield self.x[3:]


def provoke(rank: int, name: str) -> dict[str, Any]:
    """Return x and the settings of a run in which the second process has something that the others have not."""
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    options: dict[str, Any] = {"x": x}
    odd = rank == 1
    match name:
        case "NaN":
            x[3, 0] = torch.nan if odd else 0.0
        case "no rows":
            options["x"] = x[:0] if odd else x
        case "columns":
            options["x"] = x[:, :1] if odd else x
        case "weights":
            options["weights"] = torch.full((30,), -1.0 if odd else 1.0)
        case "all weights are 0":
            options["weights"] = torch.zeros(30)
        case "disk":
            options["x"] = GoesBad(x) if odd else x
        case "settings":
            options["max_steps"] = 20 if odd else 21
        case "checkpoint":
            options["checkpoint"] = "no such folder/state"
    return options


PROVOCATIONS: dict[str, tuple[type[Exception], str, bool]] = {
    "NaN": (ValueError, "x[3, 0] is nan", True),
    "no rows": (ValueError, "it needs at least one row", True),
    "columns": (ValueError, "the other parameters and the data call for", True),
    "weights": (ValueError, "weights[0] is -1.0: a weight must be finite and not negative", True),
    "all weights are 0": (ValueError, "all weights are 0", False),
    "disk": (OSError, "the disk is gone", True),
    "settings": (ValueError, "this process and the first of the group differ in max_steps", True),
    "checkpoint": (OSError, "there is no folder", False),
}
"""The error, its words, and whether the second process alone meets it."""


def failure_of(rank: int, name: str, group: Any) -> tuple[str, str, float]:
    start = gaussian_full.Params(
        torch.full((2,), 0.5).double(),
        torch.tensor([[-1.0, 0], [1, 0]]).double(),
        torch.eye(2).double().expand(2, 2, 2),
    )
    options = provoke(rank, name)
    began = time.perf_counter()
    try:
        em(gaussian_full, options.pop("x"), start, rtol=0.0, group=group, **options)
    except Exception as error:
        return type(error).__name__, str(error), time.perf_counter() - began
    return "None", "", 0.0


def weighted_rows(num_rows: int = 10) -> tuple[Tensor, Tensor]:
    """Return rows that are their own numbers, and their weights."""
    return torch.arange(num_rows).double()[:, None], (1.0 + torch.arange(num_rows) % 4).double()


def work(rank: int, folder: Path) -> dict[str, Any]:
    """Return all that one process finds."""
    from tests.conftest import FAMILIES

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=max(SIZES))
    found: dict[str, Any] = {}
    groups = {size: dist.new_group(list(range(size))) for size in SIZES}
    for size, group in groups.items():
        if rank >= size:
            continue
        own = slice(CUTS[size][rank], CUTS[size][rank + 1])
        for case in FAMILIES:
            if getattr(case.family, "additive", False):
                for kind in ("flat", "prior"):
                    found[f"{case.name} {kind} {size}"] = tuple(few_steps(case, kind, own, group=group))
        x, start = overlapping()
        for accelerate in (None, "anderson"):
            fit = em(gaussian_full, share(x, rank, size), start, accelerate=accelerate, group=group)
            found[f"converged {accelerate} {size}"] = tuple(fit)
    x, start = overlapping()
    apart = start._replace(locs=start.locs * (1 + rank * torch.finfo(torch.float64).eps))
    found["starts apart"] = tuple(em(gaussian_full, share(x, rank, 3), apart, group=groups[3]))
    found["failures"] = {name: failure_of(rank, name, groups[3]) for name in PROVOCATIONS}
    rows, weights = weighted_rows()
    generator = torch.Generator().manual_seed(3)
    dataset = Dataset(gaussian_full, share(rows, rank, 3), share(weights, rank, 3))
    found["samples"] = [sample_rows(dataset, 2, generator, groups[3]) for _ in range(300)]
    found["sample of all"] = sample_rows(dataset, 10, generator, groups[3])
    try:
        em(laplace, share(x, rank, 3), laplace.init_params(x, 2, generator), group=groups[3])
    except ValueError as error:
        found["laplace"] = str(error)
    dist.destroy_process_group()
    return found


def fork_processes(folder: Path) -> int:
    """Run ``work`` in every process, and return how many failed."""
    children = []
    for rank in range(max(SIZES)):
        child = os.fork()
        if child == 0:
            try:
                torch.save(work(rank, folder), folder / f"found.{rank}")
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return sum(os.waitpid(child, 0)[1] != 0 for child in children)


# What the processes found, each against the others and against one process


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    path = os.pathsep.join([str(ROOT / ".links"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return [torch.load(folder / f"found.{rank}", weights_only=False) for rank in range(max(SIZES))]


def assert_one_answer(found: list[dict[str, Any]], name: str, size: int) -> tuple[Any, ...]:
    """Return the Fit that all processes of a group found, equal to the last bit."""
    first = found[0][name]
    for other in found[1:size]:
        assert all(map(torch.equal, other[name][0], first[0]))
        assert torch.equal(other[name][1], first[1])
        assert other[name][2:] == first[2:]
    return first


@pytest.mark.parametrize("size", SIZES)
def test_processes_find_what_one_process_finds(case: Case, kind: str, size: int, found: list[dict[str, Any]]) -> None:
    if not getattr(case.family, "additive", False):
        assert case.family is laplace
        return
    params, log_lik, _, num_steps = assert_one_answer(found, f"{case.name} {kind} {size}", size)
    expected = few_steps(case, kind)
    assert num_steps == expected.num_steps == 6
    assert torch.allclose(log_lik, expected.log_lik, rtol=1e-12)
    for value, other in zip(params, expected.params, strict=True):
        assert torch.allclose(value, other, rtol=1e-11, atol=1e-11)
    assert (log_lik != expected.log_lik[0]).any()


@pytest.mark.parametrize("accelerate", [None, "anderson"])
@pytest.mark.parametrize("size", SIZES)
def test_they_converge_as_one_process_does(accelerate: Any, size: int, found: list[dict[str, Any]]) -> None:
    x, start = overlapping()
    _, log_lik, converged, num_steps = assert_one_answer(found, f"converged {accelerate} {size}", size)
    expected = em(gaussian_full, x, start, accelerate=accelerate)
    assert converged
    assert expected.converged
    # the last change that EM still makes is this share of the log likelihood, in which rounding is far below it
    assert abs(log_lik[-1] - expected.log_lik[-1]) <= 1e-10 * len(log_lik) * abs(log_lik[-1])
    plain = found[0][f"converged None {size}"]
    assert num_steps < plain[3] if accelerate else num_steps == plain[3]


def test_all_start_where_the_first_does(found: list[dict[str, Any]]) -> None:
    """A start drawn on another machine may differ in its last bit, and what follows may not."""
    answer = assert_one_answer(found, "starts apart", 3)
    assert torch.equal(answer[1], found[0]["converged None 3"][1])


@pytest.mark.parametrize("name", PROVOCATIONS)
def test_all_fail_at_once_when_one_does(name: str, found: list[dict[str, Any]]) -> None:
    kind, words, one_alone = PROVOCATIONS[name]
    for rank in range(3):
        error, message, seconds = found[rank]["failures"][name]
        assert issubclass(getattr(builtins, error), kind)
        assert words in message
        assert seconds < 5  # gloo itself gives up after half an hour
        if one_alone:
            assert message.startswith("process 1 of the group failed: ") == (rank != 1)


def test_statistics_that_do_not_add_up_are_refused(found: list[dict[str, Any]]) -> None:
    assert all("needs all rows at once" in each["laplace"] for each in found)


# A sample of the rows


def test_a_sample_is_the_same_in_all_processes_and_each_row_keeps_its_weight(found: list[dict[str, Any]]) -> None:
    rows, weights = weighted_rows()
    for sample, *others in zip(*(each["samples"] for each in found), strict=True):
        assert torch.equal(sample[1], weights[sample[0].flatten().long()])
        for other in others:
            assert all(map(torch.equal, other, sample))
    for each in found:
        assert all(map(torch.equal, each["sample of all"], (rows, weights)))


def p_value(samples: list[Tensor], num_rows: int = 10) -> float:
    """Return the p-value of samples of two rows, of which all pairs are as likely, by Pearson's test."""
    counts = np.zeros((num_rows, num_rows))
    for first, second in (sorted(sample.flatten().int().tolist()) for sample in samples):
        counts[first, second] += 1
    return stats.chisquare(counts[np.triu_indices(num_rows, 1)]).pvalue


def test_a_sample_over_processes_has_its_law(found: list[dict[str, Any]]) -> None:
    assert p_value([sample for sample, _ in found[0]["samples"]]) > FALSE_ALARM


def test_a_sample_over_blocks_has_its_law_and_another_law_is_seen() -> None:
    rows, weights = weighted_rows()
    generator = torch.Generator().manual_seed(0)
    for dataset in (Dataset(gaussian_full, list(rows.split(4)), own) for own in (weights, None)):
        assert p_value([sample_rows(dataset, 2, generator)[0] for _ in range(500)]) > FALSE_ALARM
    assert p_value([rows[weights.multinomial(2, generator=generator)] for _ in range(500)]) < FALSE_ALARM


def test_a_sample_has_no_row_twice_and_none_of_weight_zero() -> None:
    rows, weights = weighted_rows(1000)
    weights[::3] = 0
    generator = torch.Generator().manual_seed(0)
    found, counts = sample_rows(Dataset(gaussian_full, list(rows.split(7)), weights), 100, generator)
    assert found.shape == (100, 1)
    assert (found.flatten().diff() > 0).all()
    assert torch.equal(counts, weights[found.flatten().long()])
    assert (counts > 0).all()
    everything = sample_rows(Dataset(gaussian_full, rows, weights), 5000, generator)
    assert all(map(torch.equal, everything, (rows[weights > 0], weights[weights > 0])))
    unweighted = sample_rows(Dataset(gaussian_full, rows), 5000, generator)
    assert all(map(torch.equal, unweighted, (rows, torch.ones(1000).double())))
    with pytest.raises(ValueError, match="all weights are 0"):
        sample_rows(Dataset(gaussian_full, rows, torch.zeros(1000)), 5, generator)


# Shares


def parquet(table: pa.Table, folder: Path, group_size: int) -> Any:
    pa.parquet.write_table(table, folder / "rows.parquet", row_group_size=group_size)
    return pads.dataset(folder / "rows.parquet")


def files(table: pa.Table, folder: Path, group_size: int) -> Any:
    half = table.num_rows // 2
    for i, part in enumerate((table.slice(0, half), table.slice(half))):
        pa.parquet.write_table(part, folder / f"{i}.parquet", row_group_size=group_size)
    return pads.dataset([str(folder / "0.parquet"), str(folder / "1.parquet")])


def csv(table: pa.Table, folder: Path, block_size: int) -> Any:
    pa.csv.write_csv(table, folder / "rows.csv")
    reading = pads.CsvFileFormat(read_options=pa.csv.ReadOptions(block_size=32 * block_size + 32))
    return pads.dataset(folder / "rows.csv", format=reading)


def memmap(table: pa.Table, folder: Path, _: int) -> Any:
    np.save(folder / "rows.npy", np.column_stack([column.to_numpy() for column in table.columns]))
    return np.load(folder / "rows.npy", mmap_mode="r")


def matrix(table: pa.Table) -> Tensor:
    return torch.tensor(np.column_stack([column.to_numpy() for column in table.columns]))


SOURCES: dict[str, Callable[[pa.Table, Path, int], Any]] = {
    "tensor": lambda table, folder, size: matrix(table),
    "table": lambda table, folder, size: table,
    "chunks": lambda table, folder, size: list(matrix(table).split(size)),
    "filter": lambda table, folder, size: parquet(table, folder, size).filter(pads.field("id") >= 0),
    "in memory": lambda table, folder, size: pads.dataset(table),
    "parquet": parquet,
    "files": files,
    "csv": csv,
    "memory map": memmap,
}


@pytest.mark.parametrize("source", SOURCES)
def test_shares_are_disjoint_and_complete(source: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    @settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(num_rows=st.integers(1, 40), size=st.integers(1, 12), num_ranks=st.integers(1, 5))
    def hold(num_rows: int, size: int, num_ranks: int) -> None:
        table = pa.table({"id": np.arange(num_rows, dtype=float), "y": np.full(num_rows, 0.5)})
        given_rows = SOURCES[source](table, tmp_path_factory.mktemp("share"), size)
        rows = []
        for rank in range(min(num_ranks, num_rows)):
            block = read_at_once(Dataset(gaussian_full, share(given_rows, rank, min(num_ranks, num_rows))))
            assert block is not None
            rows += block.x[:, 0].tolist()
        assert sorted(rows) == list(range(num_rows))

    hold()


def test_row_groups_are_shared_by_rows_and_each_is_read_by_one_process(tmp_path: Path) -> None:
    table = pa.table({"id": np.arange(100.0)})
    with pa.parquet.ParquetWriter(tmp_path / "rows.parquet", table.schema) as writer:
        for start, end in ((0, 50), (50, 60), (60, 70), (70, 90), (90, 100)):
            writer.write_table(table.slice(start, end - start))
    source = pads.dataset(tmp_path / "rows.parquet")
    own = [[fragment.row_groups[0].id for fragment in share(source, rank, 2).get_fragments()] for rank in (0, 1)]
    assert own == [[0], [1, 2, 3, 4]]


def test_rank_must_be_one_of_them() -> None:
    with pytest.raises(ValueError, match="rank must be between 0 and 1, and is 2"):
        share(torch.zeros(3, 1), 2, 2)


if __name__ == "__main__":
    sys.exit(fork_processes(Path(sys.argv[1])))
