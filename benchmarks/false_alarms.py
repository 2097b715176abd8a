"""How often the Monte Carlo checks refute a right claim: their p-values under the null, over many seeds.

Run as ``python benchmarks/false_alarms.py``. Each line is one check on one law: the number of p-values, the shares
below four levels, and whether their distribution function lies in the simultaneous 95 % band of
``mixproof.inference.verification.uniformity``. Continuous laws and single entries must give uniform p-values. A
correction for several entries, the steps of a discrete law, and samples too small for a check, which then does not
judge and counts as a p-value of one, may give larger ones: there the function must not rise above the band. One check
in twenty is expected outside its band; the exit code is 1 if one is so far outside that none of them would be.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixproof.inference.verification.goodness_of_fit import (
    bridge,
    distribution_function_agrees,
    expectations_agree,
    frequencies_agree,
    projections_agree,
)
from mixproof.inference.verification.importance import sampled_integral
from mixproof.inference.verification.moments import covariance_agrees, mean_agrees, sample_moments
from mixproof.inference.verification.report import Check
from mixproof.inference.verification.uniformity import uniform

LEVELS = (0.05, 0.01, 1e-3, 1e-4)
REPEATS = 4000
ALARM = 1e-6


class Law(NamedTuple):
    """A law on the line with its moments, and its density or probability function."""

    sample: Callable[[int, torch.Generator], Tensor]
    mean: float
    variance: float
    log_prob: Callable[[Tensor], Tensor]
    cdf: Callable[[Tensor], Tensor]


def normal_log_prob(x: Tensor, loc: float, scale: float) -> Tensor:
    return -0.5 * ((x - loc) / scale).square() - math.log(scale) - 0.5 * math.log(2 * math.pi)


def draw_normal_mixture(n: int, g: torch.Generator) -> Tensor:
    first = torch.rand(n, generator=g, dtype=torch.float64) < 0.3
    return torch.where(first, -2.0, 1.0) + torch.where(first, 0.5, 1.0) * torch.randn(n, generator=g).double()


def normal_mixture_log_prob(x: Tensor) -> Tensor:
    parts = [math.log(0.3) + normal_log_prob(x, -2.0, 0.5), math.log(0.7) + normal_log_prob(x, 1.0, 1.0)]
    return torch.logaddexp(*parts).sum(-1)


def draw_poisson_mixture(n: int, g: torch.Generator) -> Tensor:
    first = torch.rand(n, generator=g, dtype=torch.float64) < 0.4
    return torch.poisson(torch.where(first, 1.0, 6.0).double(), generator=g)


def poisson_mixture_log_prob(x: Tensor) -> Tensor:
    parts = [math.log(w) + x * math.log(r) - r - torch.lgamma(x + 1) for w, r in ((0.4, 1.0), (0.6, 6.0))]
    return torch.logaddexp(*parts).sum(-1)


def draw_exponential(n: int, g: torch.Generator) -> Tensor:
    return -torch.log1p(-torch.rand(n, generator=g, dtype=torch.float64))


def draw_bernoulli_mixture(n: int, g: torch.Generator) -> Tensor:
    """Three binary features, of probabilities (0.1, 0.5, 0.7) or, with probability 0.4, (0.8, 0.3, 0.2)."""
    first = torch.rand(n, 1, generator=g, dtype=torch.float64) < 0.4
    probs = torch.where(first, torch.tensor([0.8, 0.3, 0.2]), torch.tensor([0.1, 0.5, 0.7]))
    return (torch.rand(n, 3, generator=g) < probs).double()


CUBE = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 3)


def bernoulli_mixture_log_prob(x: Tensor) -> Tensor:
    total = torch.zeros(len(x), dtype=torch.float64)
    for weight, probs in ((0.4, (0.8, 0.3, 0.2)), (0.6, (0.1, 0.5, 0.7))):
        p = torch.tensor(probs, dtype=torch.float64)
        total += weight * torch.where(x == 1, p, 1 - p).prod(1)
    return total.log()


def bernoulli_moments() -> tuple[Tensor, Tensor]:
    weights = bernoulli_mixture_log_prob(CUBE).exp()
    mean = weights @ CUBE
    return mean, (CUBE - mean).T @ ((CUBE - mean) * weights[:, None])


def phi(x: Tensor) -> Tensor:
    return torch.special.ndtr(x)


LAWS = {
    "normal mixture": Law(
        draw_normal_mixture,
        0.1,
        0.3 * 4.25 + 0.7 * 2 - 0.01,
        normal_mixture_log_prob,
        lambda x: 0.3 * phi((x + 2) / 0.5) + 0.7 * phi(x - 1),
    ),
    "Poisson mixture": Law(
        draw_poisson_mixture,
        4.0,
        4.0 + 0.24 * 25,
        poisson_mixture_log_prob,
        lambda x: 0.4 * poisson_cdf(x, 1.0) + 0.6 * poisson_cdf(x, 6.0),
    ),
    "exponential": Law(
        draw_exponential,
        1.0,
        1.0,
        lambda x: torch.where(x >= 0, -x, -torch.inf).sum(-1),
        lambda x: -torch.expm1(-x.clamp(min=0)),
    ),
}


def poisson_cdf(x: Tensor, rate: float) -> Tensor:
    whole = x.floor()
    return torch.where(whole < 0, 0.0, torch.special.gammaincc(whole.clamp(min=0) + 1, torch.full_like(x, rate)))


def column(x: Tensor) -> Tensor:
    return x[:, None] if x.dim() == 1 else x


def moments_check(law: Law, num: int, which: str, generator: torch.Generator) -> Check:
    mean, scale = torch.tensor([law.mean]).double(), torch.tensor([law.variance**0.5]).double()
    moments = sample_moments(law.sample, mean, scale, num, generator)
    if which == "mean":
        return mean_agrees(moments, mean, scale, false_alarm=ALARM)
    return covariance_agrees(moments, mean, scale, scale.square()[:, None], false_alarm=ALARM)


def corrected_moments(num: int, which: str, generator: torch.Generator) -> Check:
    mean, covariance = bernoulli_moments()
    scale = covariance.diagonal().sqrt()
    moments = sample_moments(draw_bernoulli_mixture, mean, scale, num, generator)
    if which == "mean":
        return mean_agrees(moments, mean, scale, covariance=covariance, false_alarm=ALARM)
    return covariance_agrees(moments, mean, scale, covariance, false_alarm=ALARM)


def wide(law: Law, num: int, generator: torch.Generator) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return the log density of a Cauchy law about a law on the line, and draws from it."""
    scale = law.variance**0.5
    uniform_draws = torch.rand(num, 1, generator=generator, dtype=torch.float64)
    points = law.mean + scale * torch.tan(math.pi * (uniform_draws - 0.5))
    return lambda x: -(math.pi * scale * (1 + ((x - law.mean) / scale).square())).log().sum(-1), points


def density_check(law: Law, num: int, which: str, num_tests: int, generator: torch.Generator) -> Check:
    pilot, draws = (column(law.sample(n, generator)) for n in (500, num))
    log_proposal, points = wide(law, num, generator)
    log_weights = law.log_prob(points) - log_proposal(points)
    log_ratios = law.log_prob(draws) - log_proposal(draws)
    options: dict[str, Any] = {"generator": generator, "false_alarm": ALARM, "num_tests": num_tests}
    if which == "bridge":
        return bridge(log_ratios, log_weights, false_alarm=ALARM)
    if which == "integral":
        return sampled_integral(log_weights, false_alarm=ALARM)
    if which == "projections":
        return projections_agree(pilot, draws, points, log_weights, **options)
    if which == "bridged expectations":
        return expectations_agree(pilot, draws, points, log_weights, log_ratios=log_ratios, **options)
    return expectations_agree(pilot, draws, points, log_weights, **options)


def distribution_function_check(law: Law, num: int, generator: torch.Generator) -> Check:
    draws = column(law.sample(num, generator))
    return distribution_function_agrees(law.cdf, draws, generator=generator, false_alarm=ALARM)


def binary_frequencies(num: int, generator: torch.Generator) -> Check:
    draws = draw_bernoulli_mixture(num, generator)
    return frequencies_agree(bernoulli_mixture_log_prob, draws, CUBE, false_alarm=ALARM)


def count_frequencies(num: int, generator: torch.Generator) -> Check:
    pilot, draws = (column(draw_poisson_mixture(num, generator)) for _ in range(2))
    return frequencies_agree(
        poisson_mixture_log_prob, draws, torch.unique(pilot, dim=0), complete=False, false_alarm=ALARM
    )


def cases() -> Iterator[tuple[str, bool, Callable[[torch.Generator], Check]]]:
    """Yield what is tested, whether its p-values may be larger than uniform ones, and the check."""
    for name, law in LAWS.items():
        steps = name == "Poisson mixture"
        for num in (200, 2000):
            yield f"mean_agrees, {name}, N = {num}", steps or num < 2000, partial(moments_check, law, num, "mean")
        large = 40_000 if name == "exponential" else 10_000  # its squares are the more skewed
        for num in (200, large):
            small = steps or num < large
            yield f"covariance_agrees, {name}, N = {num}", small, partial(moments_check, law, num, "covariance")
        if not steps:
            single = partial(density_check, law, 1000)
            yield f"bridge, {name}", False, partial(single, "bridge", 1)
            yield f"sampled_integral, {name}", False, partial(single, "integral", 1)
            yield f"expectations_agree, {name}", False, partial(single, "expectations", 1)
            yield f"expectations_agree, bridged, {name}", False, partial(single, "bridged expectations", 1)
            yield f"projections_agree, {name}", True, partial(density_check, law, 4000, "projections", 1)
        yield f"distribution_function_agrees, {name}", steps, partial(distribution_function_check, law, 1000)
    yield "mean_agrees, 3 binary features", True, partial(corrected_moments, 1000, "mean")
    yield "covariance_agrees, 3 binary features", True, partial(corrected_moments, 1000, "covariance")
    yield "frequencies_agree, 3 binary features", True, partial(binary_frequencies, 300)
    yield "frequencies_agree, counts, incomplete", True, partial(count_frequencies, 1000)
    yield "expectations_agree, 16 tests", True, partial(density_check, LAWS["normal mixture"], 1000, "expectations", 16)


def main() -> int:
    """Print the table; return 1 if the p-values of some check are neither uniform nor larger, as they should be."""
    start, total, all_cases, lowest = time.perf_counter(), 0, list(cases()), 1.0
    print(f"{'check':<50}{'p-values':>9}" + "".join(f"{f'< {level:g}':>10}" for level in LEVELS) + "  band")
    for seed, (name, conservative, check) in enumerate(all_cases):
        checks = [check(torch.Generator().manual_seed(REPEATS * seed + k)) for k in range(REPEATS)]
        found = [1.0 if check.p_value is None else check.p_value for check in checks]
        total += len(found)
        inside = uniform(found, num_points=200, conservative=conservative)
        lowest = min(lowest, inside.p_value or 0.0)
        shares = "".join(f"{sum(p < level for p in found) / len(found):>10.5f}" for level in LEVELS)
        verdict = ("inside" if inside.passed else "OUTSIDE") + (", one-sided" if conservative else "")
        unknown = sum(check.p_value is None for check in checks)
        note = f", {unknown} not judged" if unknown else ""
        print(f"{name:<50}{len(found):>9}{shares}  {verdict} (p = {inside.p_value:.2g}){note}", flush=True)
    print(f"{total} p-values in {time.perf_counter() - start:.0f} s; the smallest p-value of a band is {lowest:.2g}")
    return int(lowest < 0.05 / len(all_cases))


if __name__ == "__main__":
    raise SystemExit(main())
