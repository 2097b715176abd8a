"""How many passes over the data EM needs, plain over accelerated, and whether the accelerated one ends lower.

Run as ``python benchmarks/acceleration.py [--starts N] [--json FILE]``. Both run from the same starts to the same stop
rule. A line gives the median passes until the log likelihood (plus log prior) is within 1e-10 of its limit, relative,
plain and accelerated, their ratio (median, least), the passes until the stop rule held, refused candidates included in
all of them, and how many starts ended lower, or higher, than plain EM by more than 1e-6, relative.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits, load_iris
from torch import Tensor

from mixproof.inference.acceleration import Anderson
from mixproof.models import (
    bernoulli,
    gaussian_diagonal,
    gaussian_full,
    gaussian_spherical,
    gaussian_sum,
    gaussian_tied,
    laplace,
)
from mixproof.models.gaussian_isotropic import GaussianIsotropic

DATA = Path(__file__).resolve().parents[1] / "tests" / "data"
RTOL = 1e-13
MAX_PASSES = 20_000


class Task(NamedTuple):
    """A family, data, the number of components, and what is optional."""

    family: Any
    x: Tensor
    num_components: Any
    prior: Any = None
    row_weights: Tensor | None = None


class Run(NamedTuple):
    """Where a run ended."""

    params: Any
    trace: list[float]
    """The objective where EM stood after each pass; a refused candidate repeats the entry before."""
    converged: bool
    num_refused: int


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_pass(task: Task, params: Any) -> tuple[float, Any]:
    """Return the objective at parameters and their EM image."""
    table = task.family.log_joint(params, task.x)
    log_lik, resp = table.logsumexp(-1), table.softmax(-1)
    if task.row_weights is not None:
        log_lik, resp = log_lik * task.row_weights, resp * task.row_weights[:, None]
    objective = log_lik.sum()
    if task.prior is not None:
        objective = objective + task.family.log_prior(params, task.prior)
    return objective.item(), task.family.m_step(task.family.statistics(params, task.x, resp), task.prior)


def climb(task: Task, params: Any, accelerator: Any = None, *, rtol: float = RTOL, max_passes: int = MAX_PASSES) -> Run:
    """Run EM from a start until an EM step of its own changes the objective by no more than a share ``rtol`` of it."""
    objective, image = one_pass(task, params)
    trace, num_refused, quiet = [objective], 0, False
    while len(trace) < max_passes and math.isfinite(objective):
        candidate = None if accelerator is None else accelerator.propose(params, image, objective)
        if candidate is not None and not quiet:
            found, its_image = one_pass(task, candidate)
            accepted = accelerator.accept(candidate, its_image, found)
            if accepted:
                quiet = abs(found - objective) <= rtol * abs(found)
                params, image, objective = candidate, its_image, found
            num_refused += not accepted
            trace.append(objective)
            if accepted or len(trace) == max_passes:
                continue
        previous, params = objective, image
        objective, image = one_pass(task, params)
        trace.append(objective)
        if abs(objective - previous) <= rtol * abs(objective):
            return Run(params, trace, True, num_refused)
        quiet = False
    return Run(params, trace, False, num_refused)


def overlapping(num_data: int, separation: float, seed: int) -> Tensor:
    """Return draws (N, 1) from two normals of standard deviation 1, so many standard deviations apart."""
    generator = seeded(seed)
    second = torch.rand(num_data, 1, generator=generator, dtype=torch.float64) < 0.4
    return torch.randn(num_data, 1, generator=generator, dtype=torch.float64) + separation * second


def overlapping_plane(num_data: int, seed: int) -> Tensor:
    """Return draws (N, 2) from three overlapping normals with different covariances."""
    factors = torch.tensor([[[1.0, 0.0], [0.3, 0.8]], [[0.7, 0.0], [-0.4, 1.0]], [[1.0, 0.0], [0.0, 0.6]]]).double()
    locs = torch.tensor([[0.0, 0.0], [1.5, 0.0], [0.5, 1.5]]).double()
    params = gaussian_full.Params(torch.tensor([0.3, 0.3, 0.4]).double(), locs, factors @ factors.mT)
    return gaussian_full.sample(params, num_data, seeded(seed))[0]


def prior_for(family: Any, x: Tensor, k: int) -> Any:
    """Return a weak conjugate prior about the data, that keeps components from collapsing."""
    size, covariance = x.shape[1], x.mT.cov(correction=0).reshape(x.shape[1], -1)
    two, weak = torch.tensor(2.0).double(), torch.tensor(0.01).double()
    if family is bernoulli:
        return bernoulli.Prior(two.expand(k), two.expand(size), two.expand(size))
    if family is gaussian_diagonal:
        return family.Prior(two.expand(k), x.mean(0), weak, two.expand(size), covariance.diagonal() / 4)
    if family is gaussian_spherical:
        return family.Prior(two.expand(k), x.mean(0), weak, two, covariance.trace() / size / 4)
    return family.Prior(two.expand(k), x.mean(0), weak, two + size, covariance / 4)


def tasks() -> dict[str, Task]:
    """Return the cases by name: the slow ones first."""
    iris = torch.as_tensor(load_iris().data)
    galaxies = torch.as_tensor(np.loadtxt(DATA / "galaxies_roeder1990.txt"))[:, None]
    faithful, carcinoma = (
        torch.as_tensor(np.loadtxt(DATA / name, delimiter=",", skiprows=1))
        for name in ("faithful.csv", "carcinoma.csv")
    )
    carcinoma = carcinoma - 1
    pixels = torch.as_tensor(load_digits().data) > 7.5
    digits = pixels[::6][:, pixels.double().var(0) > 0.05].double()
    near, apart, plane = overlapping(1000, 1.0, 5), overlapping(1000, 1.5, 7), overlapping_plane(600, 11)

    def counts(x: Tensor) -> Tensor:
        return 0.2 + 2 * torch.rand(len(x), generator=seeded(99), dtype=torch.float64)

    noise = gaussian_full.Params(
        torch.tensor([0.5, 0.5]).double(),
        torch.tensor([[0.0, 0.0], [0.3, 2.0]]).double(),
        torch.tensor([[[0.05, 0.0], [0.0, 9.0]], [[0.1, 0.0], [0.0, 4.0]]]).double(),
    )
    return {
        "1.0 sd apart, diagonal, K = 2": Task(gaussian_diagonal, near, 2),
        "1.0 sd apart, isotropic, K = 2": Task(GaussianIsotropic(1.0), near, 2),
        "1.5 sd apart, diagonal, K = 2": Task(gaussian_diagonal, apart, 2),
        "1.5 sd apart, tied, K = 2": Task(gaussian_tied, apart, 2),
        "plane, full, K = 3": Task(gaussian_full, plane, 3),
        "plane, full, K = 3, prior": Task(gaussian_full, plane, 3, prior_for(gaussian_full, plane, 3)),
        "plane, full, K = 3, row weights": Task(gaussian_full, plane, 3, None, counts(plane)),
        "plane, diagonal, K = 3": Task(gaussian_diagonal, plane, 3),
        "carcinoma, K = 2": Task(bernoulli, carcinoma, 2),
        "carcinoma, K = 3": Task(bernoulli, carcinoma, 3),
        "carcinoma, K = 4": Task(bernoulli, carcinoma, 4),
        "carcinoma, K = 4, row weights": Task(bernoulli, carcinoma, 4, None, counts(carcinoma)),
        "carcinoma, K = 3, prior": Task(bernoulli, carcinoma, 3, prior_for(bernoulli, carcinoma, 3)),
        "carcinoma, uniform weights, K = 3": Task(bernoulli.UniformWeights(), carcinoma, 3),
        "digits, K = 6": Task(bernoulli, digits, 6),
        "digits, K = 4, prior": Task(bernoulli, digits, 4, prior_for(bernoulli, digits, 4)),
        "iris, full, K = 3": Task(gaussian_full, iris, 3),
        "iris, full, K = 4, prior": Task(gaussian_full, iris, 4, prior_for(gaussian_full, iris, 4)),
        "iris, diagonal, K = 5": Task(gaussian_diagonal, iris, 5),
        "iris, spherical, K = 4": Task(gaussian_spherical, iris, 4),
        "iris, spherical, K = 3, prior": Task(gaussian_spherical, iris, 3, prior_for(gaussian_spherical, iris, 3)),
        "iris, tied, K = 4": Task(gaussian_tied, iris, 4),
        "iris, tied, K = 3, row weights": Task(gaussian_tied, iris, 3, None, counts(iris)),
        "iris, isotropic, K = 4": Task(GaussianIsotropic(0.2), iris, 4),
        "iris, Laplace, K = 3": Task(laplace, iris, 3),
        "galaxies, diagonal, K = 3": Task(gaussian_diagonal, galaxies, 3),
        "galaxies, diagonal, K = 4, prior": Task(
            gaussian_diagonal, galaxies, 4, prior_for(gaussian_diagonal, galaxies, 4)
        ),
        "galaxies, spherical, K = 6, prior": Task(
            gaussian_spherical, galaxies, 6, prior_for(gaussian_spherical, galaxies, 6)
        ),
        "galaxies, tied, K = 4": Task(gaussian_tied, galaxies, 4),
        "galaxies, tied, K = 6": Task(gaussian_tied, galaxies, 6),
        "faithful, full, K = 3": Task(gaussian_full, faithful, 3),
        "faithful, diagonal, K = 4": Task(gaussian_diagonal, faithful, 4),
        "faithful, known noise, K = 2": Task(gaussian_sum.KnownNoise(noise), faithful, 2),
        "faithful, sum, K = (2, 2)": Task(gaussian_sum, faithful, (2, 2)),
    }


def start(task: Task, seed: int) -> Any:
    """Return the start of a number: by k-means++ and at random in turn."""
    method = "k-means++" if seed % 2 else "random"
    return task.family.init_params(task.x, task.num_components, seeded(seed), method)


def compare(task: Task, seed: int) -> dict[str, Any] | None:
    """Return how plain and accelerated EM went from one start, or None where plain EM collapses."""
    params = start(task, seed)
    plain, fast = climb(task, params), climb(task, params, Anderson(task.family, params))
    goal = plain.trace[-1]
    if not math.isfinite(goal):
        return None

    def passes(run: Run) -> int | None:
        return next((i + 1 for i, value in enumerate(run.trace) if value >= goal - 1e-10 * abs(goal)), None)

    return {
        "seed": seed,
        "difference": fast.trace[-1] - goal,
        "relative": (fast.trace[-1] - goal) / abs(goal),
        "plain": passes(plain),
        "accelerated": passes(fast),
        "plain_stop": len(plain.trace),
        "accelerated_stop": len(fast.trace),
        "plain_converged": plain.converged,
        "refused": fast.num_refused,
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one line; passes are compared where both ended alike."""
    alike = [run for run in runs if abs(run["relative"]) <= 1e-6 and run["accelerated"] is not None]
    ratios = [run["plain"] / run["accelerated"] for run in alike]
    return {
        "starts": len(runs),
        "lower": sum(run["relative"] < -1e-6 or not math.isfinite(run["relative"]) for run in runs),
        "higher": sum(run["relative"] > 1e-6 for run in runs),
        "plain": float(np.median([run["plain"] for run in alike])) if alike else math.nan,
        "accelerated": float(np.median([run["accelerated"] for run in alike])) if alike else math.nan,
        "ratio": float(np.median(ratios)) if alike else math.nan,
        "least_ratio": min(ratios, default=math.nan),
        "plain_stop": float(np.median([run["plain_stop"] for run in runs])),
        "accelerated_stop": float(np.median([run["accelerated_stop"] for run in runs])),
        "refused": float(np.mean([run["refused"] for run in runs])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=4, help="starts for each case")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="where to write all runs")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    columns = ("plain", "accelerated", "ratio", "least_ratio", "plain_stop", "accelerated_stop", "refused")
    print(f"{'case':<36}{'starts':>7}{'lower':>6}{'higher':>7}" + "".join(f"{c:>17}" for c in columns))
    results = {}
    for name, task in tasks().items():
        if options.only not in name:
            continue
        found = [compare(task, seed) for seed in range(options.starts)]
        runs = [run for run in found if run is not None]
        line = summary(runs)
        results[name] = {"summary": line, "runs": runs}
        print(
            f"{name:<36}{line['starts']:>7}{line['lower']:>6}{line['higher']:>7}"
            + "".join(f"{line[c]:>17.1f}" for c in columns),
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    with torch.no_grad():
        main()
