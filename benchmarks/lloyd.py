"""How long Lloyd's algorithm takes: scikit-learn's against ``SQUARED_EUCLIDEAN``, and that against ``MANHATTAN``.

Both sides start from the same centres and run to a fixed point, alternately and on as many threads as torch uses. The
ratios of neighbouring runs are summed up by their median and their quartiles. Says also whether the labels agree.

    python benchmarks/lloyd.py [--repeats 7] [--threads 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.cluster import KMeans
from sklearn.datasets import load_sample_image, make_blobs
from threadpoolctl import threadpool_limits

from mixproof.inference.lloyd import MANHATTAN, SQUARED_EUCLIDEAN, Clustering, lloyd

SEED = 0
SPREAD = 5.0
"""The standard deviation within a blob, whose centres are uniform on (-10, 10): the blobs overlap."""
Matrix = NDArray[np.float64]


def main() -> None:
    """Print the table, and write it where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the ratios there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads):
        rows = [measure(name, x, k, options.repeats) for name, x, k in cases()]
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    Console(width=120).print(table(rows))


def cases() -> Iterator[tuple[str, Matrix, int]]:
    """Yield the name, the rows (N, D) and the number of clusters of each case."""
    flower = load_sample_image("flower.jpg").reshape(-1, 3) / 255.0
    yield "flower", flower, 5
    yield "flower", flower, 16
    for num_rows, num_features, k in ((100_000, 8, 8), (100_000, 16, 16), (50_000, 32, 32), (20_000, 64, 16)):
        x, _ = make_blobs(num_rows, num_features, centers=k, cluster_std=SPREAD, random_state=SEED)
        yield "blobs", x, k


def measure(name: str, x: Matrix, k: int, repeats: int) -> dict[str, Any]:
    """Return the sizes of a case, whether the labels agree, and the ratios of times: below 1, the first is faster."""
    start = x[np.random.default_rng(SEED).permutation(len(x))[:k]]
    rows, centers = torch.tensor(x), torch.tensor(start)
    peer = KMeans(k, init=start, n_init=1, tol=0, max_iter=10_000, algorithm="lloyd")

    def means() -> Clustering:
        return lloyd(rows, centers, SQUARED_EUCLIDEAN, max_steps=10_000)

    def medians() -> Clustering:
        return lloyd(rows, centers, MANHATTAN, max_steps=10_000)

    seconds: dict[str, list[float]] = {"peer": [], "kmeans": [], "kmedians": []}
    for repeat in range(repeats + 1):
        for side, call in {"peer": lambda: peer.fit(x), "kmeans": means, "kmedians": medians}.items():
            elapsed = _time(call)
            if repeat:  # the first is to warm up
                seconds[side].append(elapsed)
    by_means, by_medians = means(), medians()
    steps = {"kmeans": len(by_means.objective), "kmedians": len(by_medians.objective)}
    times = {side: np.array(values) for side, values in seconds.items()}
    per_step = (times["kmedians"] / steps["kmedians"]) / (times["kmeans"] / steps["kmeans"])
    return {
        "case": f"{name} {len(x)} x {x.shape[1]}, k = {k}",
        "labels_agree": bool(np.array_equal(peer.labels_, by_means.labels.numpy())),
        "steps": steps,
        "milliseconds": {side: 1e3 * float(np.median(values)) for side, values in times.items()},
        "kmeans / scikit-learn": _quartiles(times["kmeans"] / times["peer"]),
        "kmedians / kmeans, per step": _quartiles(per_step),
    }


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _quartiles(ratios: Matrix) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    return [float(value) for value in np.quantile(ratios, [0.25, 0.5, 0.75])]


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the ratios as a table: the median, and the quartiles in brackets."""
    ratios = ("kmeans / scikit-learn", "kmedians / kmeans, per step")
    result = Table("case", "labels", "steps", "kmeans, ms", *ratios)
    for row in rows:
        shown = [f"{row[name][1]:.2f} ({row[name][0]:.2f} to {row[name][2]:.2f})" for name in ratios]
        agree = "agree" if row["labels_agree"] else "DIFFER"
        result.add_row(row["case"], agree, str(row["steps"]["kmeans"]), f"{row['milliseconds']['kmeans']:.0f}", *shown)
    return result


if __name__ == "__main__":
    main()
