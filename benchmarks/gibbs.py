"""Effective draws a second of the Gibbs sampler, at the worst parameter, on a mixture of 3 Gaussians with 300 rows.

The time is that of one thread, start and warm-up included. Components are put in the order of their first coordinate,
which is theirs alone where the separation is 4 standard deviations or more. Effective draws are ArviZ's (bulk, split
chains). Says also the largest R-hat.

    python benchmarks/gibbs.py [--chains 128] [--draws 500] [--warmup 50] [--seed 0] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from arviz_stats.base import array_stats
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mixproof.inference.draws import Draws
from mixproof.inference.gibbs import gibbs
from mixproof.models import gaussian_diagonal

NUM_ROWS, NUM_COMPONENTS = 300, 3


def main() -> None:
    """Print the table, and write it where ``--json`` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=128)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(separation, options) for separation in (4.0, 5.0, 6.0)]
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    Console(width=120).print(table(rows))


def data(separation: float, seed: int) -> Tensor:
    """Return rows (N, 2) around three centres on a diagonal, neighbours so many standard deviations apart."""
    step = separation / math.sqrt(2)
    locs = torch.tensor([[-step, -step], [0.0, 0.0], [step, step]], dtype=torch.float64)
    weights = torch.full((NUM_COMPONENTS,), 1 / NUM_COMPONENTS, dtype=torch.float64)
    params = gaussian_diagonal.Params(weights, locs, torch.ones_like(locs))
    return gaussian_diagonal.sample(params, NUM_ROWS, torch.Generator().manual_seed(seed))[0]


def weak_prior() -> gaussian_diagonal.Prior:
    """Return a prior of a tenth of an observation for the locations and of four for the variances."""
    ones, concentration = torch.ones(2, dtype=torch.float64), torch.ones(NUM_COMPONENTS, dtype=torch.float64)
    return gaussian_diagonal.Prior(concentration, 0 * ones, ones[0] / 10, 2 * ones, ones)


def measure(separation: float, options: argparse.Namespace) -> dict[str, Any]:
    """Return seconds, effective draws a second and the largest R-hat for one set of rows."""
    x = data(separation, options.seed)
    start = time.thread_time()
    draws = gibbs(
        gaussian_diagonal,
        x,
        weak_prior(),
        num_components=NUM_COMPONENTS,
        num_chains=options.chains,
        num_draws=options.draws,
        num_warmup=options.warmup,
        generator=torch.Generator().manual_seed(options.seed + 1),
    )
    seconds = time.thread_time() - start
    entries = [value.numpy() for value in in_order(draws)]
    effective = [float(array_stats.ess(value, chain_axis=0, draw_axis=1)) for value in entries]
    rhat = [float(array_stats.rhat(value, chain_axis=0, draw_axis=1)) for value in entries]
    lp = float(array_stats.ess(draws.sample_stats["lp"].numpy(), chain_axis=0, draw_axis=1))
    return {
        "separation": separation,
        "seconds": seconds,
        "milliseconds a sweep": 1e3 * seconds / (options.draws + options.warmup),
        "effective draws a second": min(effective) / seconds,
        "of lp": lp / seconds,
        "share of draws": min(effective) / (options.chains * options.draws),
        "R-hat": max(rhat),
    }


def in_order(draws: Draws) -> list[Tensor]:
    """Return every entry of every parameter, (C, S), the components in the order of their first coordinate."""
    order = draws.params["locs"][..., 0].argsort(-1)
    entries: list[Tensor] = []
    for value in draws.params.values():
        index = order.view(*order.shape, *(1,) * (value.ndim - 3)).expand_as(value)
        entries += value.gather(2, index).flatten(2).unbind(-1)
    return entries


def table(rows: list[dict[str, Any]]) -> Table:
    """Return the figures as a table, a line for each separation."""
    result = Table(*rows[0])
    for row in rows:
        result.add_row(*(f"{value:,.3g}" if value < 1e3 else f"{value:,.0f}" for value in row.values()))
    return result


if __name__ == "__main__":
    main()
