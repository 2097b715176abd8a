"""Densities: true ones hold, discrete and mixed ones too; planted faults are refuted, with honest p-values."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Bernoulli, Laplace, MultivariateNormal

from mixproof.inference.verification import assert_density, verify_density, verify_moments
from mixproof.inference.verification.goodness_of_fit import frequencies_agree
from mixproof.inference.verification.uniformity import uniform
from tests.claims import COVARIANCE, MEAN, PROBS, ROOT, SEED, failed, normal_sample, normals, tensor


def laplace_sample(num_samples: int, generator: torch.Generator) -> Tensor:
    """Variance one, as the standard normal law."""
    u = torch.rand(num_samples, 1, generator=generator, dtype=torch.float64) - 0.5
    return -u.sign() * torch.log1p(-2 * u.abs()) * math.sqrt(0.5)


def laplace_density(x: Tensor) -> Tensor:
    return Laplace(tensor(0.0), tensor(math.sqrt(0.5))).log_prob(x).sum(-1)


LOCS = 3 * normals(3, 10)


def mixture_sample(num_samples: int, generator: torch.Generator, power: float = 1.0) -> Tensor:
    labels = torch.multinomial(PROBS, num_samples, replacement=True, generator=generator)
    return LOCS[labels] + 0.6**power * torch.randn(num_samples, 10, generator=generator, dtype=torch.float64)


def mixture_density(x: Tensor) -> Tensor:
    normal = torch.distributions.Normal(LOCS, tensor(0.6))
    return (PROBS.log() + normal.log_prob(x[:, None]).sum(-1)).logsumexp(1)


def cauchy_sample(num_samples: int, generator: torch.Generator) -> Tensor:
    return torch.tan(math.pi * (torch.rand(num_samples, generator=generator, dtype=torch.float64) - 0.5))


def cauchy_density(x: Tensor) -> Tensor:
    return torch.as_tensor(stats.cauchy.logpdf(x[:, 0].numpy()))


def normal_density(x: Tensor) -> Tensor:
    return MultivariateNormal(MEAN, COVARIANCE).log_prob(x)


def standard_sample(num_samples: int, generator: torch.Generator) -> Tensor:
    return torch.randn(num_samples, 1, generator=generator, dtype=torch.float64)


TRUE_DENSITIES: dict[str, tuple] = {
    "normal": (normal_density, normal_sample),
    "Laplace": (laplace_density, laplace_sample),
    "Cauchy": (cauchy_density, cauchy_sample),
    "mixture": (mixture_density, mixture_sample),
}
FALSE_DENSITIES: dict[str, tuple] = {
    "0.1 % too large": (lambda x: normal_density(x) + 1e-3, normal_sample, "integrates to one on a grid"),
    "1e-6 too large": (lambda x: normal_density(x) + 1e-6, normal_sample, "integrates to one on a grid"),
    "kinked, 0.1 % too small": (lambda x: laplace_density(x) - 1e-3, laplace_sample, "integrates to one on a grid"),
    "5 % too large": (lambda x: mixture_density(x) + 0.05, mixture_sample, "integrates to one, by sampling"),
    "another law of the same moments": (laplace_density, standard_sample, "agrees with its sampler"),
    "no correlation": (
        MultivariateNormal(MEAN, COVARIANCE.diagonal().diag()).log_prob,
        normal_sample,
        "agrees with its sampler",
    ),
    "mean moved": (MultivariateNormal(MEAN + 0.1, COVARIANCE).log_prob, normal_sample, "agrees with its sampler"),
    "variance for standard deviation": (
        mixture_density,
        lambda n, g: mixture_sample(n, g, 2.0),
        "the sampler's density",
    ),
    "no sum over features": (lambda x: normal_density(x)[:, None], normal_sample, "log_prob"),
    "raises": (lambda x: x @ ROOT @ x, normal_sample, "log_prob"),
}


@pytest.mark.parametrize("name", TRUE_DENSITIES)
def test_true_densities_hold(name: str) -> None:
    for seed in range(2):
        assert_density(*TRUE_DENSITIES[name], seed=seed)


@pytest.mark.parametrize("name", FALSE_DENSITIES)
def test_false_densities_are_refuted(name: str) -> None:
    log_prob, sample, check = FALSE_DENSITIES[name]
    report = verify_density(log_prob, sample, seed=SEED)
    assert report.verdict == "refuted"
    assert check in failed(report)


RATES_2 = tensor([[0.5, 4.0, 1.0, 9.0, 2.0, 0.2], [6.0, 1.0, 3.0, 20.0, 0.1, 2.0]])


def poisson_mixture(dim: int, share: float = 0.4) -> tuple[Callable, Callable]:
    rates, shares = RATES_2[:, :dim], tensor([share, 1 - share])

    def log_prob(x: Tensor) -> Tensor:
        inside = (x >= 0).all(1)
        counts = x.clamp(min=0)[:, None]
        terms = (counts * rates.log() - rates - torch.lgamma(counts + 1)).sum(-1)
        return torch.where(inside, (shares.log() + terms).logsumexp(1), -torch.inf)

    def sample(n: int, generator: torch.Generator) -> Tensor:
        label = (torch.rand(n, generator=generator, dtype=torch.float64) > share).long()
        return torch.poisson(rates[label], generator=generator)

    return log_prob, sample


def hurdle_density(x: Tensor, zero: float = 0.3, loc: float = 0.5) -> Tensor:
    """An atom at zero beside an exponential law, a label that depends on it, a normal law that depends on both."""
    size, label, y = x.T
    first = torch.where(size == 0, math.log(zero), math.log(1 - zero) - size)
    first = torch.where(size < 0, -torch.inf, first)
    chance = torch.where(size == 0, 0.2, 0.7)
    second = torch.where(label == 1, chance, 1 - chance).log()
    second = torch.where((label == 0) | (label == 1), second, -torch.inf)
    third = torch.distributions.Normal(loc * label - (size == 0).double(), 0.8).log_prob(y)
    return first + second + third


def hurdle_sample(n: int, generator: torch.Generator) -> Tensor:
    u = torch.rand(n, 3, generator=generator, dtype=torch.float64)
    size = torch.where(u[:, 0] < 0.3, 0.0, -torch.log1p(-u[:, 1]))
    label = (u[:, 2] < torch.where(size == 0, 0.2, 0.7)).double()
    y = 0.5 * label - (size == 0).double() + 0.8 * torch.randn(n, generator=generator, dtype=torch.float64)
    return torch.stack([size, label, y], 1)


HURDLE: tuple = ([0.0], "discrete", "continuous")
CORRELATED = tensor([[1.0, 0.8, 0.1], [0.8, 1.5, -0.3], [0.1, -0.3, 0.7]])


def solid_sample(n: int, generator: torch.Generator) -> Tensor:
    z = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return (
        torch.where(z[:, :1] > 0.3, 2.0, -2.0)
        + torch.randn(n, 3, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(CORRELATED).T
    )


def solid_density(x: Tensor, moved: float = 0.0) -> Tensor:
    low = stats.norm.cdf(0.3)
    parts = [MultivariateNormal(tensor([sign * 2.0, sign * 2 + moved, sign * 2.0]), CORRELATED) for sign in (-1, 1)]
    return torch.stack(
        [part.log_prob(x) + math.log(w) for part, w in zip(parts, (low, 1 - low), strict=True)]
    ).logsumexp(0)


COUNTED = {dim: {"columns": ["discrete"] * dim} for dim in (1, 2, 6)}
TRUE_MIXED: dict[str, tuple] = {
    **{f"Poisson mixture in {dim}-D": (*poisson_mixture(dim), COUNTED[dim]) for dim in (1, 2, 6)},
    "atom, label and density": (hurdle_density, hurdle_sample, {"columns": HURDLE}),
    "zero-inflated": (
        lambda x: torch.where(x[:, 0] == 0, math.log(0.3), math.log(0.7) - x[:, 0].abs() - math.log(2)),
        lambda n, g: (
            (torch.rand(n, generator=g) < 0.7)
            * (2.0 * (torch.rand(n, generator=g) < 0.5) - 1)
            * -torch.log1p(-torch.rand(n, generator=g, dtype=torch.float64))
        ),
        {"columns": [[0.0]]},
    ),
    "in space": (solid_density, solid_sample, {}),
    "single precision": (
        lambda x: torch.distributions.Normal(0.0, 1.0).log_prob(x.float()).sum(1),
        lambda n, g: torch.randn(n, 2, generator=g),
        {},
    ),
    "distribution function": (
        normal_density,
        normal_sample,
        {"cdf": lambda x, a: torch.distributions.Normal(a @ MEAN, (a @ COVARIANCE @ a).sqrt()).cdf(x)},
    ),
    "distribution function of counts": (
        poisson_mixture(1, 1 - 1e-12)[0],
        lambda n, g: torch.poisson(torch.full((n,), 0.5, dtype=torch.float64), generator=g),
        {**COUNTED[1], "cdf": lambda x: torch.as_tensor(stats.poisson.cdf(x.numpy(), 0.5))},
    ),
}
FALSE_MIXED: dict[str, tuple] = {
    "1e-6 too large, counts": (
        lambda x: poisson_mixture(2)[0](x) + 1e-6,
        poisson_mixture(2)[1],
        COUNTED[2],
        "integrates to one on a grid",
    ),
    "5 % too large, six counts": (
        lambda x: poisson_mixture(6)[0](x) + 0.05,
        poisson_mixture(6)[1],
        COUNTED[6],
        "integrates to one, by sampling",
    ),
    "other weights": (poisson_mixture(6, 0.5)[0], poisson_mixture(6)[1], COUNTED[6], "agrees with its sampler"),
    "other weights, two counts": (
        poisson_mixture(2, 0.42)[0],
        poisson_mixture(2)[1],
        COUNTED[2],
        "agrees with its sampler",
    ),
    "independent counts": (
        lambda x: sum(poisson_mixture(2)[0](torch.stack([x[:, i], x[:, i]], 1)) for i in range(2)) / 2,
        poisson_mixture(2)[1],
        COUNTED[2],
        "frequencies",
    ),
    "impossible counts": (
        lambda x: torch.where(x[:, 0] == 0, -torch.inf, poisson_mixture(2)[0](x)),
        poisson_mixture(2)[1],
        COUNTED[2],
        "frequencies",
    ),
    "another atom": (
        lambda x: hurdle_density(x, zero=0.33),
        hurdle_sample,
        {"columns": HURDLE},
        "agrees with its sampler",
    ),
    "atom counted twice": (
        lambda x: hurdle_density(x) + math.log(2) * (x[:, 0] == 0),
        hurdle_sample,
        {"columns": HURDLE},
        "integrates to one, by sampling",
    ),
    "regression moved": (
        lambda x: hurdle_density(x, loc=0.6),
        hurdle_sample,
        {"columns": HURDLE},
        "agrees with its sampler",
    ),
    "1e-6 too large, in space": (
        lambda x: torch.distributions.Normal(0.0, tensor(1.0)).log_prob(x).sum(1) + 1e-6,
        lambda n, g: torch.randn(n, 3, generator=g, dtype=torch.float64),
        {},
        "integrates to one on a grid",
    ),
    "2 % too large, in space": (lambda x: solid_density(x) + 0.02, solid_sample, {}, "integrates to one on a grid"),
    "moved, in space": (lambda x: solid_density(x, 0.1), solid_sample, {}, "agrees with its sampler"),
    "moved far, in space": (lambda x: solid_density(x, 0.5), solid_sample, {}, "projections"),
    "another mean in the distribution function": (
        normal_density,
        normal_sample,
        {"cdf": lambda x, a: torch.distributions.Normal(a @ MEAN + 0.1, (a @ COVARIANCE @ a).sqrt()).cdf(x)},
        "agrees with the distribution function",
    ),
    "distribution function of one count": (
        *poisson_mixture(1),
        {**COUNTED[1], "cdf": lambda x: torch.as_tensor(stats.poisson.cdf(x.numpy(), 0.5))},
        "agrees with the distribution function",
    ),
    "no direction in the distribution function": (
        normal_density,
        normal_sample,
        {"cdf": lambda x: x.sigmoid()},
        "agrees with the distribution function",
    ),
}


@pytest.mark.parametrize("name", TRUE_MIXED)
def test_true_densities_of_discrete_and_mixed_laws_hold(name: str) -> None:
    log_prob, sample, options = TRUE_MIXED[name]
    for seed in range(2):
        assert_density(log_prob, sample, **options, seed=seed)


@pytest.mark.parametrize("name", FALSE_MIXED)
def test_false_densities_of_discrete_and_mixed_laws_are_refuted(name: str) -> None:
    log_prob, sample, options, check = FALSE_MIXED[name]
    report = verify_density(log_prob, sample, **options, seed=SEED)
    assert report.verdict == "refuted"
    assert check in failed(report)


def test_what_a_density_cannot_show_is_undecided() -> None:
    counts = verify_density(*poisson_mixture(2), seed=SEED)
    assert counts.verdict == "undecided"
    assert "state its atoms" in str(counts)
    inflated = verify_density(
        hurdle_density, hurdle_sample, columns=("continuous", "discrete", "continuous"), seed=SEED
    )
    assert inflated.verdict == "undecided"
    far = verify_density(partial(normal_in_many, 300), partial(many_normals, 300), seed=SEED, num_samples=2**14)
    assert far.verdict == "undecided"
    assert "share draws worth only" in str(far)


def normal_in_many(dim: int, x: Tensor, scale: float = 1.0) -> Tensor:
    return -0.5 * (x / scale).square().sum(1) - dim * (0.5 * math.log(2 * math.pi) + math.log(scale))


def many_normals(dim: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, dim, generator=generator, dtype=torch.float64)


def test_density_that_the_proposal_hardly_covers() -> None:
    options: dict[str, Any] = {"seed": SEED, "num_samples": 2**14}
    sample = partial(many_normals, 60)
    assert "not tested apart" in str(assert_density(partial(normal_in_many, 60), sample, **options))
    for fault in (lambda x: normal_in_many(60, x, 1.05), lambda x: normal_in_many(60, x) + 0.5):
        assert verify_density(fault, sample, **options).verdict == "refuted"


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        (["discrete"], "2 columns"),
        (["discrete", "continuous"], "whole numbers"),
        (["count", "continuous"], "list of atoms"),
    ],
)
def test_columns_that_do_not_fit_raise(columns: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        verify_density(normal_density, normal_sample, columns=columns, seed=SEED)


def test_a_false_alarm_that_is_no_probability_raises() -> None:
    for false_alarm in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="false_alarm must lie between 0 and 1"):
            verify_density(normal_density, normal_sample, false_alarm=false_alarm, seed=SEED)


def test_columns_and_support_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="without a support"):
        verify_density(coin_density, coin_sample, support=CUBE, columns=["discrete"] * 4, seed=SEED)


CUBE = torch.cartesian_prod(*[tensor([0.0, 1.0])] * 4)
COINS = tensor([0.1, 0.5, 0.7, 0.95])


def coin_density(x: Tensor) -> Tensor:
    return Bernoulli(COINS, validate_args=False).log_prob(x).sum(-1)


def coin_sample(num_samples: int, generator: torch.Generator) -> Tensor:
    return (torch.rand(num_samples, 4, generator=generator, dtype=torch.float64) < COINS).double()


def test_finite_support() -> None:
    assert_density(coin_density, coin_sample, support=CUBE, seed=SEED)
    faults = {
        "sums to one": (lambda x: coin_density(x) + 1e-9, coin_sample),
        "agrees with its sampler": (lambda x: coin_density(1 - x), coin_sample),
    }
    for name, fault in faults.items():
        assert failed(verify_density(*fault, support=CUBE, seed=SEED)) == [name]
    outside = verify_density(coin_density, lambda n, g: 2 * coin_sample(n, g), support=CUBE, seed=SEED)
    assert "impossible" in str(outside)
    missing = verify_density(coin_density, coin_sample, support=CUBE[1:], seed=SEED)
    assert failed(missing) == ["sums to one", "agrees with its sampler"]
    with pytest.raises(ValueError, match="repeated"):
        verify_density(coin_density, coin_sample, support=torch.cat([CUBE, CUBE]), seed=SEED)


@pytest.mark.slow
def test_p_values_are_uniform_if_the_claim_holds() -> None:
    found: dict[str, list[float]] = {}
    for seed in range(200):
        reports = [
            verify_moments(standard_sample, tensor([0.0]), tensor(1.0), seed=seed, smallest=0.2),
            verify_density(mixture_density, mixture_sample, seed=seed, num_samples=2**11),
            verify_density(coin_density, coin_sample, support=CUBE, seed=seed, num_samples=2**11),
        ]
        for i, report in enumerate(reports):
            for check in report.checks:
                if check.p_value is not None:
                    found.setdefault(f"{i} {check.name}", []).append(check.p_value)
    for name, p_values in found.items():
        if name == "1 agrees with its sampler":  # the smallest of 64, with Bonferroni's correction: at least uniform
            assert stats.kstest(p_values, "uniform", alternative="greater").pvalue > 1e-3
        else:
            assert stats.kstest(p_values, "uniform").pvalue > 1e-3, name
    assert len(found) >= 4


def test_the_frequencies_of_rare_cells_alarm_no_more_often_than_promised() -> None:
    """Exactly: the binomial probability of all counts of a cell that expects ten draws at which the test refutes."""
    num, false_alarm = 4096, 1e-6
    probs = tensor([10 / num, 1 - 10 / num])
    support = tensor([[0.0], [1.0]])
    counts = range(70)
    refuted = []
    for count in counts:
        draws = torch.cat([torch.zeros(count, 1), torch.ones(num - count, 1)]).double()
        found = frequencies_agree(lambda x: probs.log()[x[:, 0].long()], draws, support, false_alarm=false_alarm)
        refuted += [] if found.passed else [count]
    assert max(counts) in refuted
    assert stats.binom.pmf(refuted, num, 10 / num).sum() + stats.binom.sf(max(counts), num, 10 / num) <= false_alarm


def test_every_pool_of_sparse_cells_expects_enough_draws_for_chi_square() -> None:
    """Half of the mass on 5,000 unequal cells that expect one draw each, or fewer: p-values must stay uniform."""
    sparse = torch.linspace(0.05, 1.95, 5000, dtype=torch.float64)
    probs = torch.cat([tensor([0.25, 0.25]), sparse / 10_000])
    support = torch.arange(len(probs), dtype=torch.float64)[:, None]
    found = []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        draws = torch.multinomial(probs, 5000, replacement=True, generator=generator)[:, None].double()
        check = frequencies_agree(lambda x: probs.log()[x[:, 0].long()], draws, support, false_alarm=1e-3)
        assert check.p_value is not None
        found.append(check.p_value)
    assert uniform(found, num_points=50).passed


def test_a_density_that_is_nan_somewhere_is_refuted_there() -> None:
    def nan_far_out(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 2, torch.nan, torch.distributions.Normal(0.0, tensor(1.0)).log_prob(x).sum(1))

    report = verify_density(
        nan_far_out, lambda n, g: torch.randn(n, 5, generator=g, dtype=torch.float64), seed=SEED, num_samples=2**14
    )
    assert report.verdict == "refuted"
    (check,) = report.checks
    assert check.counterexample is not None
    assert (check.counterexample["points"][:, 0] > 2).all()
    assert "NaN" in check.detail


@pytest.mark.parametrize("rate", [1e3, 1e4])
def test_large_counts(rate: float) -> None:
    """A log probability near -5 is a difference of terms near 1e5, whose rounding no law of smaller counts has."""

    def log_prob(x: Tensor, rate: float) -> Tensor:
        n = x[:, 0]
        return torch.where(n < 0, -math.inf, n * math.log(rate) - rate - (n.clamp_min(0) + 1).lgamma())

    def sample(num: int, generator: torch.Generator) -> Tensor:
        return torch.poisson(torch.full((num, 1), rate, dtype=torch.float64), generator=generator)

    check = partial(verify_density, sample=sample, columns=["discrete"], seed=SEED)
    assert check(partial(log_prob, rate=rate)).ok
    assert check(lambda x: log_prob(x, rate) + 1e-8).verdict == "refuted"
    assert check(partial(log_prob, rate=1.01 * rate)).verdict == "refuted"


@pytest.mark.parametrize("width", [1e-3, 1e-5])
def test_a_peak_that_no_grid_meets(width: float) -> None:
    weights, locs, scales = tensor([0.5, 0.5]), tensor([0.0, 0.3]), tensor([1.0, width])

    def log_prob(x: Tensor) -> Tensor:
        return (weights.log() + torch.distributions.Normal(locs, scales).log_prob(x)).logsumexp(-1)

    def sample(num: int, generator: torch.Generator) -> Tensor:
        z = torch.multinomial(weights, num, True, generator=generator)
        return (locs[z] + scales[z] * torch.randn(num, generator=generator, dtype=torch.float64))[:, None]

    assert verify_density(log_prob, sample, seed=SEED).verdict != "refuted"
    assert verify_density(lambda x: log_prob(x) + 0.1, sample, seed=SEED).verdict != "holds"
