"""Effective draws a second of CPU time: our samplers beside Pyro's, NumPyro's and nutpie, on one model, data, thread.

A mixture of 3 diagonal Gaussians under a conjugate prior, 300 rows in 2 dimensions. The effective draws are those of
the worst of all parameters, components ordered by their first location in each draw. The time is the process's CPU time
from the call to the draws, with warm-up and without imports; what compiling took, where it can be told, is in a column
of its own and not in the rate. Each sampler runs in a process of its own with one thread.

    python benchmarks/samplers.py [--only gibbs hmc] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "NUMBA_NUM_THREADS")
NUM_ROWS, NUM_COMPONENTS = 300, 3
OWN = ("gibbs", "hmc")


def problem() -> tuple[Any, Any]:
    """Return the rows and the prior."""
    import torch

    from mixproof.models import gaussian_diagonal

    def tensor(*values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    truth = gaussian_diagonal.Params(
        tensor(0.3, 0.3, 0.4), tensor((-2, 0), (2, 1), (0, 3)), tensor((0.5, 0.8), (0.6, 0.5), (0.4, 0.7))
    )
    x, _ = gaussian_diagonal.sample(truth, NUM_ROWS, torch.Generator().manual_seed(0))
    prior = gaussian_diagonal.Prior(
        tensor(1, 1, 1), tensor(0, 0), torch.tensor(0.1, dtype=torch.float64), tensor(2, 2), tensor(1, 1)
    )
    return x, prior


Found = tuple[dict[str, Any], float]
"""Draws by site, (C, S, ...), and the seconds that compiling took."""


def conjugate(**settings: Any) -> Found:
    import torch

    from mixproof.inference.gibbs import gibbs
    from mixproof.models import gaussian_diagonal

    x, prior = problem()
    generator = torch.Generator().manual_seed(1)
    draws = gibbs(gaussian_diagonal, x, prior, num_components=NUM_COMPONENTS, generator=generator, **settings)
    return {site: value.numpy() for site, value in draws.params.items()}, 0.0


def ours(name: str, **settings: Any) -> Found:
    from mixproof.inference.hmc import hmc
    from mixproof.inference.nuts import nuts
    from mixproof.models import gaussian_diagonal

    x, prior = problem()
    model = partial(gaussian_diagonal.model, num_components=NUM_COMPONENTS, prior=prior)
    samplers: dict[str, Callable[..., Any]] = {"hmc": hmc, "nuts": nuts}
    draws = samplers[name](model, x, seed=1, **settings)
    return {site: value.numpy() for site, value in draws.params.items()}, 0.0


def numpyro_nuts(num_chains: int, num_warmup: int, num_draws: int) -> Found:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import MCMC, NUTS

    numpyro.enable_x64()
    rows, hyper = problem()
    x = jnp.asarray(rows.numpy())
    prior = type(hyper)(*(jnp.asarray(value.numpy()) for value in hyper))

    def model(x: Any) -> None:
        weights = numpyro.sample("weights", dist.Dirichlet(prior.concentration))
        with numpyro.plate("components", NUM_COMPONENTS):
            variances = numpyro.sample("variances", dist.InverseGamma(prior.shape, prior.rate).to_event(1))
            locs = numpyro.sample("locs", dist.Normal(prior.loc, jnp.sqrt(variances / prior.strength)).to_event(1))
        with numpyro.plate("data", len(x)):
            parts = dist.Normal(locs, jnp.sqrt(variances)).to_event(1)
            numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), parts), obs=x)

    began = time.process_time()
    kernel = NUTS(model)
    sampler = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_draws,
        num_chains=num_chains,
        chain_method="sequential",
        progress_bar=False,
    )
    warm = MCMC(kernel, num_warmup=1, num_samples=1, num_chains=1, progress_bar=False)
    warm.run(jax.random.PRNGKey(0), x)
    compiling = time.process_time() - began
    sampler.run(jax.random.PRNGKey(1), x)
    return {site: jax.device_get(value) for site, value in sampler.get_samples(group_by_chain=True).items()}, compiling


def nutpie_nuts(num_chains: int, num_warmup: int, num_draws: int) -> Found:
    import nutpie
    import pymc as pm

    rows, hyper = problem()
    prior = type(hyper)(*(value.numpy() for value in hyper))
    with pm.Model() as model:
        weights = pm.Dirichlet("weights", prior.concentration)
        shape = (NUM_COMPONENTS, rows.shape[1])
        variances = pm.InverseGamma("variances", prior.shape, prior.rate, shape=shape)
        locs = pm.Normal("locs", prior.loc, pm.math.sqrt(variances / prior.strength), shape=shape)
        parts = pm.logp(pm.Normal.dist(locs, pm.math.sqrt(variances)), rows.numpy()[:, None]).sum(-1)
        pm.Potential("x", pm.math.logsumexp(pm.math.log(weights) + parts, axis=1).sum())
    began = time.process_time()
    compiled = nutpie.compile_pymc_model(model)
    compiling = time.process_time() - began
    found = nutpie.sample(
        compiled, chains=num_chains, tune=num_warmup, draws=num_draws, cores=1, seed=1, progress_bar=False
    )
    return {site: found.posterior[site].values for site in ("weights", "variances", "locs")}, compiling


RUNS: dict[str, Callable[[], Found]] = {
    "gibbs": partial(conjugate, num_chains=512, num_warmup=200, num_draws=8000),
    "hmc": partial(ours, "hmc", num_chains=64, num_warmup=200, num_draws=2000),
    "Pyro NUTS": partial(ours, "nuts", num_chains=1, num_warmup=300, num_draws=1000),
    "NumPyro NUTS": partial(numpyro_nuts, 4, 500, 2000),
    "nutpie": partial(nutpie_nuts, 4, 500, 2000),
}

MODULES = {
    "gibbs": ["mixproof.inference.gibbs"],
    "hmc": ["mixproof.inference.hmc", "mixproof.inference.nuts"],
    "Pyro NUTS": ["mixproof.inference.hmc", "mixproof.inference.nuts"],
    "NumPyro NUTS": ["numpyro", "jax"],
    "nutpie": ["nutpie", "pymc"],
}


def effective_draws(params: dict[str, Any]) -> float:
    """Return the bulk effective sample size of the worst parameter, components ordered by their first location."""
    import numpy as np
    from arviz_stats.base import array_stats

    order = np.argsort(params["locs"][..., 0], -1)
    sizes = []
    for value in params.values():
        where = order.reshape(*order.shape, *(1,) * (value.ndim - 3))
        columns = np.take_along_axis(value, where, 2).reshape(*value.shape[:2], -1)
        for column in np.moveaxis(columns, -1, 0):
            sizes.append(float(array_stats.ess(column, chain_axis=0, draw_axis=1, method="bulk")))
    return min(sizes)


def measure(name: str) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    problem()
    for module in MODULES[name]:  # imports are no part of the time
        importlib.import_module(module)
    began = time.process_time()
    params, compiling = RUNS[name]()
    seconds = time.process_time() - began - compiling
    ess = effective_draws(params)
    return {"seconds": seconds, "compiling": compiling, "ess": ess, "ess_a_second": ess / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--one", choices=list(RUNS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    environment = {**os.environ, **dict.fromkeys(THREADS, "1")}
    environment["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    found = {}
    for name in arguments.only:
        run = subprocess.run(
            [sys.executable, __file__, "--one", name], env=environment, capture_output=True, text=True, check=False
        )
        if run.returncode != 0:
            print(f"{name}: {run.stderr.strip().splitlines()[-1]}")
            continue
        found[name] = json.loads(run.stdout.splitlines()[-1])
    heads = "".join(f"{f'{name} is ahead by':>20}" for name in OWN)
    print(f"{'sampler':<14}{'CPU s':>9}{'compiling':>11}{'worst ESS':>11}{'ESS/s':>10}{heads}")
    for name, each in found.items():
        numbers = f"{each['seconds']:>9.1f}{each['compiling']:>11.1f}{each['ess']:>11.0f}{each['ess_a_second']:>10.1f}"
        rates = (found[own]["ess_a_second"] / each["ess_a_second"] if own in found else math.nan for own in OWN)
        print(f"{name:<14}{numbers}{''.join(f'{rate:>20.1f}' for rate in rates)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
