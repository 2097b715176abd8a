"""How fast EM is over several processes: measured with two, and computed from measured numbers for many machines.

One rank of one thread and two ranks of one thread each make the same steps on the same rows, in turns; the speed-up is
the ratio of the medians of the wall time of the steps alone. The table takes the measured rows a second of a rank and
the measured time of an all-reduce of two processes, and states what it assumes of machines that are not here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from mixproof.inference.dataset import share
from mixproof.inference.distributed import all_sum
from mixproof.inference.em import em
from mixproof.inference.expectation import expectation
from mixproof.models import gaussian_full

RANKS_A_MACHINE = 16
DISK = 2e9
"""Bytes a second that a machine reads; rows are float64 and read in each step."""
MEMORY = 256e9
"""Bytes of a machine in which rows stay, so that nothing is read."""
NETWORK = 3e9
"""Bytes a second between two machines."""
LATENCY = 50e-6
"""Seconds of one message between two machines."""
SIZES = ((8, 8), (64, 64))


def data(num_rows: int, num_features: int, num_components: int) -> tuple[Tensor, Any]:
    generator = torch.Generator().manual_seed(0)
    locs = 3 * torch.randn(num_components, num_features, generator=generator, dtype=torch.float64)
    covariances = torch.eye(num_features, dtype=torch.float64).expand(num_components, -1, -1).clone()
    weights = torch.full((num_components,), 1 / num_components, dtype=torch.float64)
    x = gaussian_full.sample(gaussian_full.Params(weights, locs, covariances), num_rows, generator)[0]
    return x, gaussian_full.Params(weights, locs + 0.1, 2 * covariances)


def time_steps(x: Tensor, start: Any, num_steps: int, group: Any) -> float:
    """Return the seconds of a step: of a run of many, less a run of one, so that what a run does once drops out."""
    seconds = []
    for steps in (1, 1 + num_steps):
        if group is not None:
            dist.barrier(group)
        began = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            em(gaussian_full, x, start, max_steps=steps, rtol=0.0, group=group)
        seconds.append(time.perf_counter() - began)
    return (seconds[1] - seconds[0]) / num_steps


def measure(rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, start = data(options.rows, 8, 8)
    own = share(x, rank, 2).clone()
    times: dict[str, list[float]] = {"one": [], "two": []}
    for _ in range(options.repeats):
        if rank == 0:  # the other waits at the barrier, without a turn of the processor
            times["one"].append(time_steps(x, start, options.steps, None))
        dist.barrier()
        times["two"].append(time_steps(own, start, options.steps, dist.group.WORLD))
    sizes = {}
    for num_features, num_components in SIZES:
        rows, params = data(20_000, num_features, num_components)
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            sums = expectation(gaussian_full, params, rows)
            seconds.append(time.perf_counter() - began)
        waits = []
        for _ in range(50):
            began = time.perf_counter()
            all_sum(dist.group.WORLD, sums)
            waits.append(time.perf_counter() - began)
        sizes[f"D = {num_features}, K = {num_components}"] = {
            "rows a second of a rank": len(rows) / statistics.median(seconds),
            "bytes of the sums": 8 * (1 + sum(value.numel() for value in sums.stats)),
            "seconds of an all-reduce of 2 processes": statistics.median(waits),
        }
    if rank == 0:
        one, two = (statistics.median(times[name]) for name in ("one", "two"))
        found = {"seconds a step": {"one rank": one, "two ranks": two}, "speed-up": one / two, "sizes": sizes}
        Path(folder, "found").write_text(json.dumps(found | {"all times": times}), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def predict(measured: dict[str, Any], num_features: int, num_rows: float, num_machines: int) -> dict[str, Any]:
    """Return the seconds of a step and of 100, and what bounds them; reading overlaps with nothing."""
    share_of = num_rows / num_machines
    compute = share_of / RANKS_A_MACHINE / measured["rows a second of a rank"]
    num_bytes = 8 * num_features * share_of
    read = 0.0 if num_bytes <= MEMORY else num_bytes / DISK
    hops = math.ceil(math.log2(num_machines)) if num_machines > 1 else 0
    # what was measured within a machine, then a ring between machines
    reduce = measured["seconds of an all-reduce of 2 processes"] * math.log2(RANKS_A_MACHINE)
    reduce += 2 * (LATENCY * hops + measured["bytes of the sums"] / NETWORK * (1 - 1 / num_machines))
    parts = {"compute": compute, "reading": read, "all-reduce": reduce}
    total = sum(parts.values())
    return {
        "rows": num_rows,
        "machines": num_machines,
        **parts,
        "a step": total,
        "100 steps": 100 * total,
        "bound by": max(parts, key=lambda name: parts[name]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (folder, options), nprocs=2)
        found = json.loads(Path(folder, "found").read_text(encoding="utf-8"))
    one, two = found["seconds a step"].values()
    print(f"gaussian_full, {options.rows:,} rows, D = 8, K = 8, one thread a rank, medians of {options.repeats}")
    print(f"one rank {one:.3f} s a step, two ranks {two:.3f} s: {found['speed-up']:.2f} times as fast\n")
    print(
        f"Assumed: {RANKS_A_MACHINE} ranks a machine, each as fast as here; rows stay in memory up to "
        f"{MEMORY / 1e9:.0f} GB a machine and are else read at {DISK / 1e9:.0f} GB/s in each step, which overlaps with "
        f"nothing; between machines {NETWORK / 1e9:.0f} GB/s and {LATENCY * 1e6:.0f} microseconds a message.\n"
    )
    found["table"] = {}
    for (num_features, _), (name, measured) in zip(SIZES, found["sizes"].items(), strict=True):
        lines = [predict(measured, num_features, rows, machines) for rows in (1e9, 1e11) for machines in (1, 16, 256)]
        found["table"][name] = lines
        print(
            f"{name}: {measured['rows a second of a rank']:,.0f} rows a second of a rank, "
            f"{measured['bytes of the sums']:,} bytes of sums, all-reduce of 2 processes "
            f"{1e3 * measured['seconds of an all-reduce of 2 processes']:.2f} ms"
        )
        print(f"{'rows':>8} {'machines':>9} {'a step':>12} {'100 steps':>14}  bound by")
        for line in lines:
            print(
                f"{line['rows']:>8.0e} {line['machines']:>9} {line['a step']:>10.2f} s {line['100 steps']:>12.0f} s  "
                f"{line['bound by']}"
            )
        print()
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
