"""How much memory EM needs for data on disk, and whether reading or computing sets its pace.

Run as ``python benchmarks/size.py --folder DIR [--rows N] [--steps S] [--threads T] [--json FILE]``. It writes N rows
of 8 float64 features, draws from 8 normals, to DIR as a NumPy file and as a Parquet file, unless they are there; they
stay. Each of them then goes through S steps of EM for ``gaussian_full`` with K = 8 in a process of its own. A line
gives the peak resident memory of that process, mapped pages of the file included, and what of it was there before the
data; the millions of rows a second of EM, and those of reading the same blocks and computing nothing, from the disk
and from the page cache of the system; and how long reading from there takes, as a share of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import torch

from mixproof.inference import em as em_module
from mixproof.inference.dataset import Dataset
from mixproof.inference.progress import EMProgress
from mixproof.models import gaussian_full

NUM_FEATURES, NUM_COMPONENTS = 8, 8
ROWS_A_WRITE = 1 << 20


def truth() -> gaussian_full.Params:
    """Return the mixture that the rows are drawn from: overlapping components with covariances of their own."""
    generator = torch.Generator().manual_seed(0)
    locs = 2 * torch.randn(NUM_COMPONENTS, NUM_FEATURES, generator=generator, dtype=torch.float64)
    factors = torch.randn(NUM_COMPONENTS, NUM_FEATURES, NUM_FEATURES, generator=generator, dtype=torch.float64) / 3
    covariances = factors @ factors.mT + torch.eye(NUM_FEATURES, dtype=torch.float64)
    return gaussian_full.Params(torch.full_like(locs[:, 0], 1 / NUM_COMPONENTS), locs, covariances)


def write(folder: Path, num_rows: int) -> list[Path]:
    """Write the rows to a file of each kind, piece by piece, unless they are there."""
    files = [folder / f"rows_{num_rows}.npy", folder / f"rows_{num_rows}.parquet"]
    if all(file.exists() for file in files):
        return files
    needed = 2 * num_rows * NUM_FEATURES * 8
    if (free := shutil.disk_usage(folder).free) < 1.2 * needed:
        sys.exit(f"{folder} has {free / 1e9:.1f} GB free, and the files need {needed / 1e9:.1f} GB: give fewer --rows")
    unfinished = [file.with_name(f"{file.name}.unfinished") for file in files]
    schema = pa.schema([(f"x{d + 1}", pa.float64()) for d in range(NUM_FEATURES)])
    generator, params = torch.Generator().manual_seed(1), truth()
    header = {"descr": "<f8", "fortran_order": False, "shape": (num_rows, NUM_FEATURES)}
    with unfinished[0].open("wb") as array, pa.parquet.ParquetWriter(unfinished[1], schema) as table:
        np.lib.format.write_array_header_1_0(array, header)
        for start in range(0, num_rows, ROWS_A_WRITE):
            x = gaussian_full.sample(params, min(ROWS_A_WRITE, num_rows - start), generator)[0].numpy()
            array.write(x.tobytes())
            table.write_table(pa.table(list(x.T.copy()), schema=schema))
    for before, after in zip(unfinished, files, strict=True):
        before.rename(after)
    return files


def source(file: Path) -> Any:
    """Return the rows of a file, of which a block at a time is read."""
    return np.load(file, mmap_mode="r") if file.suffix == ".npy" else pyarrow.dataset.dataset(file)


def peak_memory() -> float:
    """Return the peak resident memory of this process in MB; getrusage would count that of the one it came from."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def seconds_to_read(file: Path) -> float:
    """Return how long one pass over the blocks takes, with nothing computed but the checks of the rows."""
    began = time.perf_counter()
    for _ in Dataset(gaussian_full, source(file)):
        pass
    return time.perf_counter() - began


def forget(file: Path) -> None:
    """Drop a file from the system's page cache."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(file: Path, num_rows: int, num_steps: int) -> dict[str, Any]:
    """Return what this process needs for EM on a file."""
    ends: list[float] = []

    class Clock(EMProgress):
        def end_pass(self, step: int, objective: float) -> None:
            ends.append(time.perf_counter())

    em_module.EMProgress = Clock  # type: ignore[misc]
    params = truth()
    before = peak_memory()
    fit = em_module.em(gaussian_full, source(file), params, max_steps=num_steps, rtol=0.0)
    peak = peak_memory()
    forget(file)
    from_disk = seconds_to_read(file)
    from_cache = min(seconds_to_read(file) for _ in range(2))
    step = float(np.median(np.diff(ends)))
    return {
        "file": file.suffix[1:],
        "rows": num_rows,
        "bytes": file.stat().st_size,
        "threads": torch.get_num_threads(),
        "peak_mb": peak,
        "before_mb": before,
        "em_rows_per_second": num_rows / step,
        "disk_rows_per_second": num_rows / from_disk,
        "cache_rows_per_second": num_rows / from_cache,
        "reading_share": from_cache / step,
        "log_lik": fit.log_lik.tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the files lie or go: 128 bytes a row")
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--steps", type=int, default=2, help="steps of EM")
    parser.add_argument("--threads", type=int, help="of torch; all cores unless given")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.child:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(options.child, options.rows, options.steps)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    files = write(options.folder, options.rows)
    columns = ("peak MB", "before MB", "EM M rows/s", "disk M rows/s", "cache M rows/s", "reading %")
    print(f"{'file':<9}{'rows':>13}{'GB':>6}" + "".join(f"{column:>16}" for column in columns))
    results = []
    for file in files:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", str(file)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            sys.exit(child.stderr)
        found = json.loads(child.stdout)
        results.append(found)
        figures = [found["peak_mb"], found["before_mb"]]
        figures += [found[f"{name}_rows_per_second"] / 1e6 for name in ("em", "disk", "cache")]
        figures += [100 * found["reading_share"]]
        print(
            f"{found['file']:<9}{found['rows']:>13,}{found['bytes'] / 1e9:>6.1f}"
            + "".join(f"{figure:>16.2f}" for figure in figures),
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    different = np.ptp([found["log_lik"][-1] for found in results]) / abs(results[0]["log_lik"][-1])
    if different > 1e-9:
        sys.exit(f"the fits from the two files differ by {different:.1e}, relative")


if __name__ == "__main__":
    with torch.no_grad():
        main()
