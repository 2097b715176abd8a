"""One step of EM for Gaussians with full covariances, in float64: this package beside scikit-learn and other peers.

A step is the responsibilities and the log likelihood of all rows, and the next parameters. All peers take it from the
same parameters on the same rows, and must agree on the log likelihood before anything is timed. They then take turns of
a few steps, as a run of EM does, so that whatever else the machine does falls on all of them. Printed are medians, with
the smallest and the largest ratio of a turn, and the share of the bound: the 4 N K D^2 operations that two products
with K matrices D x D take, at the rate that a product of large matrices reaches in the same turns. A share above one is
possible, since half of a symmetric matrix is enough, and since in many dimensions, where the components are apart, a
covariance takes only its component's own rows; two of the sizes come with overlapping components too. With one thread
the clock is the thread's own time on the processor.

    python benchmarks/em_step.py [--threads 2] [--repeats 7] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import threadpoolctl
import torch
from rich.console import Console
from rich.table import Table
from sklearn.mixture import GaussianMixture
from torch import Tensor

from mixproof.inference.expectation import expectation
from mixproof.models import gaussian_full

SEED = 0
APART = [(100_000, 2, 3), (100_000, 8, 8), (100_000, 16, 16), (50_000, 32, 32), (20_000, 64, 16), (20_000, 128, 8)]
OVERLAPPING = [(20_000, 64, 16), (20_000, 128, 8)]  # where it makes a difference
RATE_SIZE = 1024
TURN = 0.1  # seconds; a run of EM takes one step after another
AGREEMENT = 1e-6  # a peer that works in float32 inside would be no peer
Step = Callable[[], float]


def problem(
    num_data: int, num_features: int, num_components: int, spread: float = 1.0
) -> tuple[Tensor, gaussian_full.Params]:
    """Return rows of a mixture, and parameters near those that they come from.

    The components' locations and covariances differ in proportion to the spread: at 1 their distance in standard
    deviations is three times the root of 2 D.
    """
    generator = torch.Generator().manual_seed(SEED)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    locs = 3 * spread * randn(num_components, num_features)
    noise = randn(num_components, num_features, num_features)
    roots = torch.eye(num_features) + 0.6 * spread / math.sqrt(num_features) * noise
    z = torch.randint(num_components, (num_data,), generator=generator)
    x = torch.empty(num_data, num_features, dtype=torch.float64)
    for k in range(num_components):
        own = z == k
        x[own] = locs[k] + randn(int(own.sum()), num_features) @ roots[k].mT
    weights = torch.full((num_components,), 1 / num_components, dtype=torch.float64)
    return x, gaussian_full.Params(weights, locs + 0.1 * spread, 1.1 * roots @ roots.mT)


def mixproof(x: Tensor, params: gaussian_full.Params) -> Step:
    def step() -> float:
        found = expectation(gaussian_full, params, x)
        gaussian_full.m_step(found.stats)
        return found.log_lik.item()

    return step


def scikit_learn(x: Tensor, params: gaussian_full.Params) -> Step:
    rows, values = x.numpy(), [value.numpy() for value in params]
    model = GaussianMixture(len(params.weights), reg_covar=0.0)

    def step() -> float:
        model.weights_, model.means_, model.covariances_ = values
        model.precisions_cholesky_ = factors
        log_lik, log_resp = model._e_step(rows)
        model._m_step(rows, log_resp)
        return float(log_lik) * len(rows)

    factors = torch.linalg.inv(torch.linalg.cholesky(params.covariances)).mT.contiguous().numpy()
    return step


def pomegranate(x: Tensor, params: gaussian_full.Params) -> Step:
    normal = import_module("pomegranate.distributions").Normal
    mixture = import_module("pomegranate.gmm").GeneralMixtureModel

    def step() -> float:
        weights, locs, covariances = (value.clone() for value in params)  # the step overwrites them
        model = mixture([normal(*both) for both in zip(locs, covariances, strict=True)], priors=weights)
        log_lik = model.summarize(x)
        model.from_summaries()
        return log_lik.item()

    return step


def tgmm(x: Tensor, params: gaussian_full.Params) -> Step:
    num_components, num_features = params.locs.shape
    model = import_module("tgmm").GaussianMixture(
        num_components,
        num_features,
        init_means=params.locs,
        init_weights=params.weights,
        init_covariances=params.covariances,
        reg_covar=0.0,
        max_iter=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one step has not converged
        model.fit(x)

    def step() -> float:
        model.weights_, model.means_, model.covariances_ = params
        resp, log_density = model._e_step(x)
        model._m_step(x, resp)
        return log_density.sum().item()

    return step


PEERS = {"scikit-learn": scikit_learn, "pomegranate": pomegranate, "tgmm": tgmm}


def seconds_a_step(step: Callable[[], Any], clock: Step) -> float:
    """Return the mean over the steps of a turn, after as many seconds in which another's threads may come to rest."""
    for _ in range(2):
        start, num_steps = clock(), 0
        while clock() - start < TURN:
            step()
            num_steps += 1
    return (clock() - start) / num_steps


def measure(case: tuple[int, int, int], spread: float, repeats: int, threads: int) -> dict[str, Any]:
    """Return the seconds of each turn by who took it, and what follows from them."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    x, params = problem(*case, spread)
    steps = {"mixproof": mixproof(x, params)}
    steps |= {
        name: make(x, params) for name, make in PEERS.items() if name == "scikit-learn" or find_spec(name) is not None
    }
    torch.set_num_threads(threads)  # after the peers' imports, which change it
    log_liks = {name: step() for name, step in steps.items()}
    for name, log_lik in log_liks.items():
        if not abs(log_lik - log_liks["mixproof"]) <= AGREEMENT * abs(log_lik):
            raise ArithmeticError(f"{name} has the log likelihood {log_lik}, mixproof {log_liks['mixproof']}")
    matrix = torch.randn(RATE_SIZE, RATE_SIZE, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
    product = torch.empty_like(matrix)
    turns: dict[str, list[float]] = {name: [] for name in [*steps, "product"]}
    for _ in range(repeats):
        for name, step in {**steps, "product": lambda: torch.mm(matrix, matrix, out=product)}.items():
            turns[name].append(seconds_a_step(step, clock))
    num_data, num_features, num_components = case
    operations = 4 * num_data * num_components * num_features**2
    rate = 2 * RATE_SIZE**3 / statistics.median(turns["product"])
    ratios = {name: sorted(b / a for a, b in zip(turns["mixproof"], turns[name], strict=True)) for name in steps}
    return {
        "N, D, K": case,
        "spread": spread,
        "seconds": turns,
        "gigaflops": rate / 1e9,
        "share of bound": operations / rate / statistics.median(turns["mixproof"]),
        "ratios": {name: values for name, values in ratios.items() if name != "mixproof"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads for everybody")
    parser.add_argument("--repeats", type=int, default=7, help="turns, of which the median counts")
    parser.add_argument("--json", type=Path, help="where to write every turn")
    arguments = parser.parse_args()
    names = [name for name in PEERS if name == "scikit-learn" or find_spec(name) is not None]
    table = Table("N, D, K", "data", "mixproof", "GFLOPS", "share of bound", *names)
    results = []
    with threadpoolctl.threadpool_limits(arguments.threads), torch.no_grad():
        for case, spread in [*((case, 1.0) for case in APART), *((case, 0.1) for case in OVERLAPPING)]:
            result = measure(case, spread, arguments.repeats, arguments.threads)
            results.append(result)
            cells = [
                f"x {statistics.median(values):.1f} ({values[0]:.1f} to {values[-1]:.1f})"
                for values in result["ratios"].values()
            ]
            milliseconds = 1e3 * statistics.median(result["seconds"]["mixproof"])
            table.add_row(
                ", ".join(map(str, case)),
                "apart" if spread == 1 else "overlapping",
                f"{milliseconds:.1f} ms",
                f"{result['gigaflops']:.0f}",
                f"{result['share of bound']:.0%}",
                *cells,
            )
    Console().print(table)
    if arguments.json:
        versions = {name: version(name) for name in ["torch", *names]}
        record = {"threads": arguments.threads, "versions": versions, "cases": results}
        arguments.json.write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
