"""The evidence: a published value by many seeds, and the routes to it side by side on real data.

The first table is of 82 galaxies under two components of one variance, whose log evidence Neal 1999 put at -239.764:
each way to estimate it over seeds, its mean, its standard deviation, the standard error that it claims, how far it is
off at most, and the CPU time of a run. The estimate of one mode takes the same draws as the bridge, put in order, and
nothing for the other numberings: it is too low by log K!, as the value that Chib 1995 printed was, -240.464.

The second has each route on two data sets under weakly informative priors: sequential Monte Carlo row by row, the
bridge from where that ends, and the same two by way of temperatures. They have one true value.

    python benchmarks/evidence.py [--seeds 12] [--only galaxies faithful iris] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_iris
from torch import Tensor

from mixproof.inference.draws import Draws
from mixproof.inference.evidence import Evidence, log_evidence
from mixproof.models import gaussian_full, gaussian_tied

DATA = Path(__file__).parent.parent / "tests" / "data"
PUBLISHED = -239.764
"""Neal 1999, Erroneous results in "Marginal likelihood from the Gibbs output"."""
SIZES = (2, 3)


def two_groups(x: Tensor) -> None:
    """Draw two components of one variance, and each galaxy from one: Chib 1995, JASA 90, section 3.4."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    variance = pyro.sample("variance", dist.InverseGamma(torch.tensor(3.0), torch.tensor(20.0)))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(torch.tensor(20.0), torch.tensor(10.0)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[z], variance.sqrt()), obs=x)


def timed(run: Callable[..., Evidence]) -> tuple[Evidence, float]:
    began = time.process_time()
    found = run()
    return found, time.process_time() - began


def in_order(draws: Draws) -> Draws:
    """Return draws whose first component lies to the left of the second, as a sampler that never swaps them has."""
    order = draws.params["locs"].argsort(-1)
    params = {site: value.gather(-1, order) if site != "variance" else value for site, value in draws.params.items()}
    return Draws(params, draws.sample_stats, draws.attributes)


def galaxies(num_seeds: int) -> list[dict[str, Any]]:
    x = torch.as_tensor(np.loadtxt(DATA / "galaxies_roeder1990.txt"))
    runs: dict[str, list[tuple[float, float, float]]] = {"SMC": [], "bridge": [], "bridge to one mode": []}
    for seed in range(num_seeds):
        bridge, seconds = timed(partial(log_evidence, two_groups, x, seed=seed))
        smc = bridge.diagnostics["smc_log_evidence"], bridge.diagnostics["smc_standard_error"]
        runs["SMC"].append((*smc, seconds))
        runs["bridge"].append((*bridge[:2], seconds))
        single = partial(log_evidence, two_groups, x, draws=in_order(bridge.draws), relabel=False, seed=seed)
        found, more = timed(single)
        runs["bridge to one mode"].append((*found[:2], seconds + more))
    table = []
    for name, found_runs in runs.items():
        values, errors, times = np.array(found_runs).T
        table.append(
            {
                "estimate": name,
                "seeds": num_seeds,
                "mean": values.mean(),
                "spread": values.std(ddof=1),
                "claimed": math.sqrt(np.square(errors).mean()),
                "farthest": abs(values - PUBLISHED).max(),
                "off": values.mean() - PUBLISHED,
                "seconds": times.mean(),
            }
        )
    return table


def side_by_side(name: str) -> list[dict[str, Any]]:
    if name == "iris":
        x = torch.as_tensor(load_iris().data)
    else:
        x = torch.as_tensor(np.loadtxt(DATA / "faithful.csv", delimiter=",", skiprows=1))
    table = []
    for family in (gaussian_full, gaussian_tied):
        for size in SIZES:
            prior = family.weakly_informative_prior(x, size)
            program = partial(family.model, num_components=size, prior=prior)
            for way, given in (("rows", family), ("temperatures", None)):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    found, seconds = timed(partial(log_evidence, program, x, seed=0, family=given))
                smc = found.diagnostics["smc_log_evidence"], found.diagnostics["smc_standard_error"]
                row = {"data": name, "family": family.__name__.split(".")[-1], "num_components": size, "way": way}
                row |= {"smc": smc[0], "smc_error": smc[1], "bridge": found[0], "bridge_error": found[1]}
                table.append(row | {"seconds": seconds, "warnings": [str(each.message) for each in caught]})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--only", nargs="+", choices=("galaxies", "faithful", "iris"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = arguments.only or ["galaxies", "faithful", "iris"]
    found: dict[str, list[dict[str, Any]]] = {}
    if "galaxies" in chosen:
        found["galaxies"] = galaxies(arguments.seeds)
        print(f"two groups of galaxies, published {PUBLISHED}; log 2! = {math.log(2):.3f}")
        print(f"{'estimate':<20}{'mean':>10}{'spread':>9}{'claimed':>9}{'farthest':>10}{'mean off':>10}{'CPU s':>8}")
        for row in found["galaxies"]:
            numbers = f"{row['mean']:>10.3f}{row['spread']:>9.4f}{row['claimed']:>9.4f}{row['farthest']:>10.4f}"
            print(f"{row['estimate']:<20}{numbers}{row['off']:>10.4f}{row['seconds']:>8.1f}")
        print()
    for name in (each for each in ("faithful", "iris") if each in chosen):
        if not any(each in found for each in ("faithful", "iris")):
            print(f"{'data':<10}{'family':<15}{'K':>2}  {'by':<14}{'SMC':>20}{'bridge':>20}{'CPU s':>8}  warnings")
        found[name] = side_by_side(name)
        for row in found[name]:
            smc, bridge = (f"{row[each]:.2f} ± {row[f'{each}_error']:.2f}" for each in ("smc", "bridge"))
            head = f"{row['data']:<10}{row['family']:<15}{row['num_components']:>2}  {row['way']:<14}"
            print(f"{head}{smc:>20}{bridge:>20}{row['seconds']:>8.1f}  {len(row['warnings'])}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
