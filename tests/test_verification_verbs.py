"""Every verb passes on truths and refutes planted faults, and its Monte Carlo p-values are those of the claim."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Bernoulli, Laplace, MultivariateNormal, constraints

from mixproof.inference.verification import (
    Domain,
    Refuted,
    Report,
    assert_density,
    assert_gradient,
    assert_identity,
    assert_limit,
    assert_maximiser,
    assert_moments,
    binary,
    positive,
    positive_definite,
    reals,
    simplex,
    symmetric,
    unit_interval,
    verify_density,
    verify_gradient,
    verify_identity,
    verify_limit,
    verify_maximiser,
    verify_moments,
)
from mixproof.inference.verification.goodness_of_fit import frequencies_agree
from mixproof.inference.verification.uniformity import uniform

SEED = 3


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def spd(size: int) -> Domain:
    """Symmetric positive definite matrices (D, D) with eigenvalues above one half."""

    def draw(generator: torch.Generator) -> Tensor:
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        return root @ root.T + 0.5 * torch.eye(size, dtype=torch.float64)

    return draw


def normals(*shape: int, seed: int = SEED) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def failed(report: Report) -> list[str]:
    return [check.name for check in report.checks if not check.passed]


# identities


def woodbury(matrix: Tensor, u: Tensor) -> Tensor:
    inverse = torch.linalg.inv(matrix)
    return inverse - (inverse @ u)[:, None] * (u @ inverse) / (1 + u @ inverse @ u)


TRUE_IDENTITIES: dict[str, tuple] = {
    "woodbury": (woodbury, lambda a, u: torch.linalg.inv(a + u[:, None] * u), spd(4), reals(4)),
    "log det": (torch.logdet, lambda a: torch.linalg.eigvalsh(a).log().sum(), spd(4)),
    "inverse": (lambda a: torch.eye(3, dtype=a.dtype), lambda a: a @ torch.linalg.inv(a), spd(3)),
    "exact zero": (lambda p: torch.zeros((), dtype=p.dtype), lambda p: p + (1 - p) - 1, unit_interval()),
    "cancellation": (
        lambda x: (x + 1e6).square().mean() - (x + 1e6).mean() ** 2,
        lambda x: (x - x.mean()).square().mean(),
        reals(9),
    ),
    "constants and counts": (lambda x, n: x.sum() / n, lambda x, n: x.mean(), binary(4), 4),
    "softmax shift": (lambda x: (x - 700).softmax(0), lambda x: x.softmax(0), reals(4)),
    "infinite on both sides": (lambda x: torch.special.xlogy(x, 0 * x), lambda x: -x / (0 * x), positive(2)),
    "several parts": (lambda x: (x + x, x * x), lambda x: (2 * x, x.square()), reals(2)),
    "entropy on the simplex": (lambda p: -(p * p.log()).sum(), lambda p: torch.special.entr(p).sum(), simplex(3)),
}
FALSE_IDENTITIES: dict[str, tuple] = {
    "relative 1e-9": (lambda x: x.exp() * (1 + 1e-9), torch.exp, reals(3)),
    "transposed": (lambda a, b: b[:, None] * a, lambda a, b: a[:, None] * b, reals(3), reals(3)),
    "n - 1 for n": (lambda x: x.var(), lambda x: (x - x.mean()).square().mean(), reals(5)),
    "wrong sign": (lambda a, u: 2 * torch.linalg.inv(a) - woodbury(a, u), woodbury, spd(3), reals(3)),
    "factor of a half": (torch.logdet, lambda a: torch.logdet(a) / 2, spd(3)),
    "true of positive numbers only": (lambda x: x, lambda x: x.abs(), reals()),
    "one entry": (lambda x: x * (1 + 1e-6 * (torch.arange(4) == 2)), lambda x: 1 * x, reals(4)),
    "NaN": (lambda x: (x - 10).log(), lambda x: x.exp(), reals()),
    "infinite": (lambda x: x / 0, lambda x: x.exp(), positive()),
    "shape": (lambda x: x[None], lambda x: x.exp(), reals(2)),
}


@pytest.mark.parametrize("name", TRUE_IDENTITIES)
def test_true_identities_hold_at_many_seeds(name: str) -> None:
    for seed in range(8):
        assert_identity(*TRUE_IDENTITIES[name], seed=seed)


@pytest.mark.parametrize("name", FALSE_IDENTITIES)
def test_false_identities_are_refuted(name: str) -> None:
    report = verify_identity(*FALSE_IDENTITIES[name], seed=SEED)
    assert report.verdict == "refuted"
    with pytest.raises(Refuted, match="counterexample"):
        assert_identity(*FALSE_IDENTITIES[name], seed=SEED)


def test_exception_of_the_claim_refutes_with_its_text() -> None:
    report = verify_identity(lambda a, x: a @ x[None], lambda a, x: a @ x, spd(3), reals(3), seed=SEED)
    assert report.verdict == "refuted"
    assert "cannot be multiplied" in report.checks[0].detail


@pytest.mark.parametrize("actual", [lambda x: (x - x).log() - (x - x).log(), lambda x: x @ x])
def test_actual_side_without_a_value_leaves_the_claim_undecided(actual: Callable[[Tensor], Tensor]) -> None:
    report = verify_identity(lambda x: x, actual, reals(), seed=SEED)
    assert report.verdict == "undecided"
    assert "actual side" in report.checks[0].detail


def test_counterexample_is_simple_and_stays_in_its_domain() -> None:
    wrong = verify_identity(lambda p, x: p.sum() + x, lambda p, x: p.sum() + x.abs(), simplex(3), reals(), seed=SEED)
    example = wrong.checks[0].counterexample
    assert example is not None
    assert example["x"] == example["x"].round()
    assert example["p"].sum() == pytest.approx(1, abs=1e-13)


def test_constants_reach_both_sides_unchanged() -> None:
    seen: list[object] = []
    flag, table = object(), tensor([1.5, 2.5])

    def claimed(x: Tensor, *rest: Any) -> Tensor:
        seen.append((rest[0] is flag, rest[1], torch.equal(table, rest[2])))
        return x * 2 + 1e-12

    verify_identity(claimed, lambda x, *rest: x + x, reals(), flag, 7, table, seed=SEED)
    assert set(seen) == {(True, 7, True)}


# gradients


def log_normal(mean: Tensor, covariance: Tensor, x: Tensor) -> Tensor:
    return MultivariateNormal(mean, covariance).log_prob(x)


def covariance_gradient(mean: Tensor, covariance: Tensor, x: Tensor) -> Tensor:
    precision = torch.linalg.inv(covariance)
    pull = precision @ (x - mean)
    return (pull[:, None] * pull - precision) / 2


NORMAL = (reals(3), spd(3), reals(3))


def test_true_gradients_hold() -> None:
    for seed in range(4):
        assert_gradient(lambda m, s, x: torch.linalg.solve(s, x - m), log_normal, *NORMAL, seed=seed)
        assert_gradient(covariance_gradient, log_normal, *NORMAL, wrt=1, seed=seed)
        assert_gradient(
            lambda x: x.softmax(0).diag() - x.softmax(0)[:, None] * x.softmax(0),
            lambda x: x.softmax(0),
            reals(4),
            seed=seed,
        )
        assert_gradient(lambda a, k: k * a, lambda a, k: k * a.square().sum() / 2, reals(2, 3), 5, seed=seed)


@pytest.mark.parametrize(
    ("wrong", "wrt"),
    [
        (lambda m, s, x: torch.linalg.solve(s, m - x), 0),
        (lambda m, s, x: s @ (x - m), 0),
        (lambda m, s, x: torch.linalg.solve(s, x - m) / 2, 0),
        (lambda m, s, x: torch.linalg.solve(s, x - m)[None], 0),
        (lambda m, s, x: 2 * covariance_gradient(m, s, x), 1),
        (lambda m, s, x: covariance_gradient(m, s, x).tril(), 1),
        (lambda m, s, x: covariance_gradient(m, s, x) * (1 + 1e-8), 1),
    ],
)
def test_false_gradients_are_refuted(wrong: Callable[..., Tensor], wrt: int) -> None:
    assert verify_gradient(wrong, log_normal, *NORMAL, wrt=wrt, seed=SEED).verdict == "refuted"


def test_transposed_jacobian_is_refuted() -> None:
    matrix = normals(3, 3)
    assert_gradient(lambda x: matrix, lambda x: matrix @ x, reals(3), seed=SEED)
    assert verify_gradient(lambda x: matrix.T, lambda x: matrix @ x, reals(3), seed=SEED).verdict == "refuted"


def symmetric_gradient(a: Tensor) -> Tensor:
    return torch.linalg.inv(a)


def distinct_entries(gradient: Tensor) -> Tensor:
    return 2 * gradient - torch.diag_embed(gradient.diagonal(dim1=-2, dim2=-1))


def log_det(a: Tensor) -> Tensor:
    return torch.linalg.cholesky(a).diagonal(dim1=-2, dim2=-1).log().sum() * 2


def corner_trace(a: Tensor) -> Tensor:
    """Reads one triangle only: as a function of separate entries its gradient is lower triangular."""
    return (a.tril() * torch.arange(9.0, dtype=torch.float64).reshape(3, 3)).sum()


CORNERS = torch.arange(9.0, dtype=torch.float64).reshape(3, 3).tril()
STRUCTURED: dict[str, tuple] = {
    "log det, symmetric": ("symmetric", symmetric_gradient, log_det, positive_definite(3, 3)),
    "log det, distinct entries": (
        "distinct entries",
        lambda a: distinct_entries(torch.linalg.inv(a)),
        log_det,
        positive_definite(3, 3),
    ),
    "batches": ("symmetric", symmetric_gradient, log_det, positive_definite(4, 3, 3)),
    "one triangle, symmetric": ("symmetric", lambda a: (CORNERS + CORNERS.T) / 2, corner_trace, symmetric(3, 3)),
    "one triangle, distinct entries": (
        "distinct entries",
        lambda a: CORNERS + CORNERS.T - CORNERS.diag().diag(),
        corner_trace,
        symmetric(3, 3),
    ),
    "a Jacobian": (
        "symmetric",
        lambda a: torch.stack([torch.linalg.inv(a), torch.eye(3).double()]),
        lambda a: torch.stack([torch.logdet(a), a.trace()]),
        positive_definite(3, 3),
    ),
    "entropy": ("simplex", lambda p: -p.log(), lambda p: torch.special.entr(p).sum(), simplex(4)),
    "entropy with its constant": ("simplex", lambda p: -p.log() - 1, lambda p: -(p * p.log()).sum(), simplex(4)),
    "rows of probabilities": ("simplex", lambda p: 1 / p, lambda p: p.log().sum(), simplex(3, 4)),
}


@pytest.mark.parametrize("name", STRUCTURED)
def test_derivatives_along_tangents(name: str) -> None:
    structure, claimed, function, domain = STRUCTURED[name]
    for seed in range(4):
        assert_gradient(claimed, function, domain, structure=structure, seed=seed)
    faults: list[Callable[[Tensor], Tensor]] = [
        lambda x: claimed(x) * (1 + 1e-8),
        lambda x: -claimed(x),
        lambda x: claimed(x) + x,
        lambda x: claimed(x)[..., :-1],
    ]
    for wrong in faults:
        assert verify_gradient(wrong, function, domain, structure=structure, seed=SEED).verdict == "refuted"


def test_wrong_convention_is_named() -> None:
    def entries(a: Tensor) -> Tensor:
        return distinct_entries(torch.linalg.inv(a))

    cases: list[tuple] = [
        ("free", "symmetric", lambda a: (CORNERS + CORNERS.T) / 2, corner_trace),
        ("free", "distinct entries", entries, torch.logdet),
        ("symmetric", "distinct entries", entries, torch.logdet),
        ("distinct entries", "symmetric", symmetric_gradient, torch.logdet),
    ]
    for asked, meant, wrong, function in cases:
        found = verify_gradient(wrong, function, positive_definite(3, 3), structure=asked, seed=SEED)
        assert found.verdict == "refuted"
        assert f"structure={meant!r}" in found.checks[0].detail
        assert_gradient(wrong, function, positive_definite(3, 3), structure=meant, seed=SEED)
    off = verify_gradient(lambda p: 3 + p.log(), lambda p: (p * p.log()).sum(), simplex(4), seed=SEED)
    assert "structure='simplex'" in off.checks[0].detail
    lopsided = verify_gradient(
        lambda a: entries(a) + a.triu(1) - a.tril(-1),
        torch.logdet,
        positive_definite(3, 3),
        structure="distinct entries",
        seed=SEED,
    )
    assert lopsided.verdict == "refuted"
    with pytest.raises(ValueError, match="not a symmetric matrix"):
        verify_gradient(symmetric_gradient, torch.logdet, reals(3, 3), structure="symmetric", seed=SEED)
    with pytest.raises(ValueError, match="not a probability vector"):
        verify_gradient(lambda p: -p.log(), lambda p: -p.log().sum(), positive(3), structure="simplex", seed=SEED)


# maximisers

DATA = normals(21, 2) @ tensor([[1.0, 0.5], [0.0, 0.3]]) + tensor([3.0, -2.0])
NORMAL_SET = (constraints.real, constraints.positive_definite)


def scatter(x: Tensor) -> Tensor:
    return (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)


def normal_likelihood(mean: Tensor, covariance: Tensor) -> Tensor:
    return MultivariateNormal(mean, covariance).log_prob(DATA).sum()


def laplace_likelihood(median: Tensor, scale: Tensor) -> Tensor:
    return Laplace(median, scale).log_prob(DATA).sum()


def absolute_error(x: Tensor, weights: Tensor | float = 1.0) -> Callable[[Tensor], Tensor]:
    return lambda m: -(weights * (x - m).abs()).sum()


COUNTS = tensor([3.0, 0.0, 5.0])
LINE = DATA[:, 0].sort().values
MEDIAN = DATA.median(0).values
SIMPLEX = {"constraint": constraints.simplex}
TRUE_MAXIMISERS: dict[str, tuple] = {
    "normal": ((DATA.mean(0), scatter(DATA)), normal_likelihood, {"constraint": NORMAL_SET}),
    "weights": (tensor([0.2, 0.5, 0.3]), lambda p: (tensor([2.0, 5, 3]) * p.log()).sum(), SIMPLEX),
    "weight of zero": (COUNTS / 8, lambda p: torch.special.xlogy(COUNTS, p).sum(), SIMPLEX),
    "vertex": (tensor([1.0, 0, 0]), lambda p: 2 * p[0] + p[1], SIMPLEX),
    "median": (LINE[10], absolute_error(LINE), {}),
    "left end of a flat top": (LINE[9], absolute_error(LINE[:20]), {}),
    "inside a flat top": ((LINE[9] + LINE[10]) / 2, absolute_error(LINE[:20]), {}),
    "rounded flat top": (tensor(2.5), absolute_error(tensor([1.0, 2, 3]), tensor([0.1, 0.2, 0.3])), {}),
    "weighted median": (tensor(2.0), absolute_error(tensor([1.0, 2, 3]), tensor([0.2, 0.2, 0.3])), {}),
    "Laplace": (
        (MEDIAN, (DATA - MEDIAN).abs().mean(0)),
        laplace_likelihood,
        {"constraint": (constraints.real, constraints.positive)},
    ),
    "mean of zero": (tensor(0.0), lambda m: -(torch.cat([LINE, -LINE]) - m).square().sum(), {}),
    "mean far from zero": (
        (1e6 + LINE / 1e3).mean(),
        lambda m: -(1e6 + LINE / 1e3 - m).square().sum(),
        {},
    ),
    "height of zero": (tensor(0.1) * 3, lambda m: -(m - 0.3).square(), {}),
    "ridge": (tensor([1.0, 2.0]), lambda m: -(m.sum() - 3).square(), {}),
}
FALSE_MAXIMISERS: dict[str, tuple] = {
    "n - 1 for n": ((DATA.mean(0), scatter(DATA) * 21 / 20), normal_likelihood, {"constraint": NORMAL_SET}),
    "relative 1e-8": ((DATA.mean(0) * (1 + 1e-8), scatter(DATA)), normal_likelihood, {"constraint": NORMAL_SET}),
    "minimum": ((DATA.mean(0), scatter(DATA)), lambda *a: -normal_likelihood(*a), {"constraint": NORMAL_SET}),
    "saddle": (torch.zeros(2).double(), lambda m: m[0] ** 2 - m[1] ** 2, {}),
    "lower of two hills": (
        tensor(0.0),
        lambda m: (-m.square() / 2).exp() + 2 * (-(m - 6).square() / 2).exp(),
        {},
    ),
    "permuted weights": (tensor([0.5, 0.2, 0.3]), lambda p: (tensor([2.0, 5, 3]) * p.log()).sum(), SIMPLEX),
    "unnormalised weights": (tensor([2.0, 5, 3]), lambda p: (tensor([2.0, 5, 3]) * p.log()).sum(), SIMPLEX),
    "nearly normalised": (tensor([0.2, 0.5, 0.3 + 1e-8]), lambda p: (tensor([2.0, 5, 3]) * p.log()).sum(), SIMPLEX),
    "wrong face": (tensor([0.5, 0.0, 0.5]), lambda p: torch.special.xlogy(COUNTS, p).sum(), SIMPLEX),
    "worst face": (tensor([0.0, 0.5, 0.5]), lambda p: torch.special.xlogy(COUNTS, p).sum(), SIMPLEX),
    "mean for median": (LINE.mean(), absolute_error(LINE), {}),
    "neighbour of the median": (LINE[11], absolute_error(LINE), {}),
    "median moved by 1e-9": (LINE[10] + 1e-9, absolute_error(LINE), {}),
    "scale about the median, n - 1": (
        (MEDIAN, (DATA - MEDIAN).abs().sum(0) / 20),
        laplace_likelihood,
        {"constraint": (constraints.real, constraints.positive)},
    ),
}


CORRELATION = tensor([[1.0, 0.5, 0.1], [0.5, 1.0, 0.3], [0.1, 0.3, 1.0]])
CLOUD = normals(9, 4)
LEVELS = tensor([1.0, 200.0, 0.03, 1.5])
FLAT_CLOUD = normals(8, 3)
BETWEEN = FLAT_CLOUD.sort(0).values[3:5]


def cholesky_likelihood(root: Tensor, scatter: Tensor = CORRELATION) -> Tensor:
    return -2 * root.diagonal().log().sum() - torch.trace(torch.cholesky_inverse(root) @ scatter)


def nearest(*target: float) -> Callable[[Tensor], Tensor]:
    return lambda v: -(v - tensor([*target])).square().sum()


def kinks(m: Tensor) -> Tensor:
    return -(LEVELS * (CLOUD - m).abs()).sum()


def flat_and_smooth(m: Tensor) -> Tensor:
    """Flat in the first two coordinates between data, smooth in the last."""
    return -(FLAT_CLOUD[:, :2] - m[:2]).abs().sum() - (FLAT_CLOUD[:, 2] - m[2]).square().sum()


def roof(m: Tensor) -> Tensor:
    """Two oblique ridges that cross at (1, 1)."""
    return -(100 * (m[0] - m[1]).abs() + (m.sum() - 2).abs())


def ridge_and_hill(m: Tensor) -> Tensor:
    """An oblique ridge with a smooth top at (1, 1)."""
    return -(m[0] - m[1]).abs() - (m.sum() - 2).square()


BOX = {"constraint": constraints.unit_interval}
FACTOR = {"constraint": constraints.lower_cholesky}
FLAT_TOP = torch.cat([BETWEEN[:, :2].mean(0), FLAT_CLOUD[:, 2].mean()[None]])
CORRELATION_FACTOR = {"constraint": constraints.corr_cholesky}
TRUE_MAXIMISERS |= {
    "correlation factor": (torch.linalg.cholesky(CORRELATION), cholesky_likelihood, CORRELATION_FACTOR),
    "Cholesky factor": (
        torch.linalg.cholesky(4 * CORRELATION),
        lambda r: cholesky_likelihood(r, 4 * CORRELATION),
        FACTOR,
    ),
    "corner and face of a box": (tensor([1.0, 0.0, 0.3]), nearest(2.0, -0.5, 0.3), BOX),
    "corner of a box": (tensor([1.0, 0.0]), nearest(1.0, -1e-9), BOX),
    "half-line": (tensor([0.0, 2.0]), nearest(-1.0, 2.0), {"constraint": constraints.nonnegative}),
    "all fair, at the edge": (
        tensor([0.0, 0.5, 1.0]),
        lambda p: (torch.special.xlogy(tensor([0.0, 2, 4]), p) + torch.special.xlogy(tensor([4.0, 2, 0]), 1 - p)).sum(),
        BOX,
    ),
    "projection onto the simplex": (tensor([0.5, 0.5, 0.0]), nearest(0.6, 0.6, -0.2), SIMPLEX),
    "rows, some at a face": (
        tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]]),
        lambda p: -(p - tensor([[0.6, 0.6, -0.2], [2.0, 0.0, -1.0], [0.2, 0.3, 0.5]])).square().sum(),
        SIMPLEX,
    ),
    "medians of unequal weights": (CLOUD.median(0).values, kinks, {}),
    "flat and smooth": (FLAT_TOP, flat_and_smooth, {}),
    "roof": (tensor([1.0, 1.0]), roof, {}),
    "ridge and hill": (tensor([1.0, 1.0]), ridge_and_hill, {}),
    "single precision": (
        torch.tensor([0.2, 0.5, 0.3]),
        lambda p: (torch.tensor([2.0, 5, 3]) * p.log()).sum(),
        SIMPLEX,
    ),
    "single precision at a kink": (
        CLOUD.float().median(0).values,
        lambda m: -(CLOUD.float() - m).abs().sum(),
        {},
    ),
}
ONE_UP = CLOUD.sort(0).values[5]
FALSE_MAXIMISERS |= {
    "correlation 1e-6": (
        torch.linalg.cholesky(CORRELATION + 1e-6 * (tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 0]]))),
        cholesky_likelihood,
        CORRELATION_FACTOR,
    ),
    "Cholesky factor 1e-6": (torch.linalg.cholesky(CORRELATION) * (1 + 1e-6), cholesky_likelihood, FACTOR),
    "covariance 1e-6": ((DATA.mean(0), scatter(DATA) * (1 + 1e-6)), normal_likelihood, {"constraint": NORMAL_SET}),
    "wrong corner": (tensor([0.0, 0.0, 0.3]), nearest(2.0, -0.5, 0.3), BOX),
    "face of a box, 1e-6": (tensor([1.0, 0.0, 0.3 + 3e-7]), nearest(2.0, -0.5, 0.3), BOX),
    "bound for a maximum 1e-6 away": (tensor([1.0, 0.0]), nearest(1 - 1e-6, -0.5), BOX),
    "interior for a bound": (tensor([1 - 1e-6, 0.0]), nearest(2.0, -0.5), BOX),
    "half-line 1e-6": (tensor([0.0, 2.0]), nearest(1e-6, 2.0), {"constraint": constraints.nonnegative}),
    "face of the simplex, 1e-6": (tensor([0.5 + 5e-7, 0.5 - 5e-7, 0.0]), nearest(0.6, 0.6, -0.2), SIMPLEX),
    "weight dropped that is 1e-6": (tensor([0.5, 0.5, 0.0]), nearest(0.5, 0.5, 1e-6), SIMPLEX),
    "weight of 1e-6 for none": (tensor([0.5, 0.5 - 1e-6, 1e-6]), nearest(0.6, 0.6, -0.2), SIMPLEX),
    **{
        f"median {i} one up": (torch.where(torch.arange(4) == i, ONE_UP, CLOUD.median(0).values), kinks, {})
        for i in range(4)
    },
    "flat and smooth, 1e-6": (FLAT_TOP * tensor([1, 1, 1 + 1e-6]), flat_and_smooth, {}),
    "off the flat top": (
        torch.where(torch.arange(3) == 1, FLAT_CLOUD.sort(0).values[5], FLAT_TOP),
        flat_and_smooth,
        {},
    ),
    "along the roof, 1e-6": (tensor([1 + 1e-6, 1 + 1e-6]), roof, {}),
    "along the ridge, 1e-6": (tensor([1 + 1e-6, 1 + 1e-6]), ridge_and_hill, {}),
    "single precision, 1 %": (
        torch.tensor([0.21, 0.49, 0.3]),
        lambda p: (torch.tensor([2.0, 5, 3]) * p.log()).sum(),
        SIMPLEX,
    ),
}


@pytest.mark.parametrize("name", TRUE_MAXIMISERS)
def test_true_maximisers_hold(name: str) -> None:
    claimed, objective, options = TRUE_MAXIMISERS[name]
    for seed in range(3):
        assert_maximiser(claimed, objective, **options, seed=seed)


@pytest.mark.parametrize("name", FALSE_MAXIMISERS)
def test_false_maximisers_are_refuted(name: str) -> None:
    claimed, objective, options = FALSE_MAXIMISERS[name]
    assert verify_maximiser(claimed, objective, **options, seed=SEED).verdict == "refuted"


def test_boundary_and_outside_are_said() -> None:
    claimed, objective, options = TRUE_MAXIMISERS["weight of zero"]
    assert "off the boundary" in str(assert_maximiser(claimed, objective, **options, seed=SEED))
    claimed, objective, options = FALSE_MAXIMISERS["weight dropped that is 1e-6"]
    assert "falls inward" in failed(verify_maximiser(claimed, objective, **options, seed=SEED))
    claimed, objective, options = FALSE_MAXIMISERS["unnormalised weights"]
    assert "outside its constraint" in str(verify_maximiser(claimed, objective, **options, seed=SEED))


def test_boundary_of_other_sets_is_undecided() -> None:
    target = tensor([1.0, -1.0]).diag()
    report = verify_maximiser(
        tensor([1.0, 0.0]).diag(),
        lambda s: -(s - target).square().sum(),
        constraint=constraints.positive_semidefinite,
        seed=SEED,
    )
    assert report.verdict == "undecided"


def test_oblique_kinks_are_told_by_their_directions() -> None:
    for name in ("roof", "ridge and hill", "medians of unequal weights"):
        claimed, objective, options = TRUE_MAXIMISERS[name]
        report = assert_maximiser(claimed, objective, **options, seed=SEED)
        assert "zero lies in the hull" in str(report)
    claimed, objective, options = FALSE_MAXIMISERS["along the roof, 1e-6"]
    assert "no ascent" in failed(verify_maximiser(claimed, objective, **options, seed=SEED))


def test_objective_without_a_value_leaves_the_claim_undecided() -> None:
    assert verify_maximiser(tensor(1.0), lambda m: m * torch.nan, seed=SEED).verdict == "undecided"


def test_verdict_has_no_units() -> None:
    for unit in (1e-6, 1e6):
        x = LINE * unit
        for factor in (1e-6, 1e6):
            assert_maximiser(x.mean(), lambda m, x=x, c=factor: -c * (x - m).square().sum(), seed=SEED)
            assert_maximiser(x.median(), lambda m, x=x, c=factor: -c * (x - m).abs().sum(), seed=SEED)
            moved = x.mean() + 1e-7 * unit
            wrong = verify_maximiser(moved, lambda m, x=x, c=factor: -c * (x - m).square().sum(), seed=SEED)
            assert "stationary" in failed(wrong)


# moments

COVARIANCE = tensor([[2.0, 0.6], [0.6, 0.5]])
ROOT = torch.linalg.cholesky(COVARIANCE)
MEAN = tensor([1.0, -4.0])


def normal_sample(num_samples: int, generator: torch.Generator) -> Tensor:
    return MEAN + torch.randn(num_samples, 2, generator=generator, dtype=torch.float64) @ ROOT.T


PROBS = tensor([0.2, 0.3, 0.5])


def one_hot_sample(num_samples: int, generator: torch.Generator) -> Tensor:
    labels = torch.multinomial(PROBS, num_samples, replacement=True, generator=generator)
    return torch.nn.functional.one_hot(labels, 3)


def test_true_moments_hold() -> None:
    assert_moments(normal_sample, MEAN, COVARIANCE, seed=SEED)
    assert_moments(normal_sample, MEAN, seed=SEED)
    assert_moments(one_hot_sample, PROBS, PROBS.diag() - PROBS[:, None] * PROBS, seed=SEED)
    assert_moments(lambda n, g: torch.rand(n, generator=g), 0.5, 1 / 12, seed=SEED)
    assert_moments(lambda n, g: torch.full((n, 1), 0.3), torch.tensor([0.3]), torch.zeros(1, 1), seed=SEED)


@pytest.mark.parametrize(
    ("mean", "covariance", "name"),
    [
        (MEAN + 0.01 * COVARIANCE.diagonal().sqrt(), None, "mean"),
        (-MEAN, COVARIANCE, "mean"),
        (MEAN, 1.02 * COVARIANCE, "covariance"),
        (MEAN, ROOT @ ROOT.T * tensor([[1.0, -1.0], [-1.0, 1.0]]), "covariance"),
        (MEAN, COVARIANCE + tensor([[0.02, 0.0], [0.0, 0.0]]), "covariance"),
        (MEAN, torch.linalg.inv(COVARIANCE), "covariance"),
        (MEAN, COVARIANCE + MEAN[:, None] * MEAN, "covariance"),
        (MEAN, ROOT, "a covariance matrix"),
        (MEAN, -COVARIANCE, "a covariance matrix"),
        (MEAN[:1], COVARIANCE, "shape of the mean"),
        (MEAN, COVARIANCE.diagonal(), "shape of the covariance"),
    ],
)
def test_false_moments_are_refuted(mean: Tensor, covariance: Tensor | None, name: str) -> None:
    report = verify_moments(normal_sample, mean, covariance, seed=SEED)
    assert report.verdict == "refuted"
    assert name in failed(report)


def test_variance_as_standard_deviation_is_refuted() -> None:
    def sample(n: int, generator: torch.Generator) -> Tensor:
        return 0.5 * torch.randn(n, 1, generator=generator, dtype=torch.float64)

    assert_moments(sample, tensor([0.0]), tensor(0.25), seed=SEED)
    assert verify_moments(sample, tensor([0.0]), tensor(0.5), seed=SEED).verdict == "refuted"


def test_number_of_draws_follows_the_smallest_error() -> None:
    for smallest in (0.05, 0.02):
        moved = MEAN + smallest * COVARIANCE.diagonal().sqrt()
        for seed in range(20):
            assert verify_moments(normal_sample, moved, seed=seed, smallest=smallest).verdict == "refuted"


def test_sampler_that_is_not_finite_is_undecided_and_wrong_shapes_raise() -> None:
    assert verify_moments(lambda n, g: torch.full((n, 1), torch.nan), tensor([0.0]), seed=SEED).verdict == "undecided"
    with pytest.raises(ValueError, match="expected"):
        verify_moments(lambda n, g: torch.zeros(3, 1), tensor([0.0]), seed=SEED)
    with pytest.raises(ValueError, match="between 0 and 1"):
        verify_moments(normal_sample, MEAN, seed=SEED, smallest=0.0)


def bernoulli_sample(*probs: float, value: float = 1.0) -> Callable[[int, torch.Generator], Tensor]:
    def sample(n: int, generator: torch.Generator) -> Tensor:
        return value * (torch.rand(n, len(probs), generator=generator, dtype=torch.float64) < tensor([*probs])).double()

    return sample


def bernoulli_moments(*probs: float) -> tuple[Tensor, Tensor]:
    return tensor([*probs]), (tensor([*probs]) * (1 - tensor([*probs]))).diag()


def inflated_sample(n: int, generator: torch.Generator) -> Tensor:
    """Zero with probability 0.7, else exponential of mean 2; beside it a count that depends on which."""
    positive = torch.rand(n, generator=generator, dtype=torch.float64) < 0.3
    size = -2 * torch.log1p(-torch.rand(n, generator=generator, dtype=torch.float64))
    count = (torch.rand(n, 3, generator=generator, dtype=torch.float64) < 0.5).sum(1)
    return torch.stack([torch.where(positive, size, 0.0), positive + count, torch.full((n,), 4.0)], 1)


# Var = 0.3 * 8 - 0.36, Cov = E[x b] - E[x] E[b] for the indicator b
INFLATED = tensor([0.6, 1.8, 4.0]), tensor([[2.04, 0.42, 0], [0.42, 0.21 + 0.75, 0], [0, 0, 0]])


def test_rare_atoms_and_degenerate_columns() -> None:
    options: dict[str, Any] = {"smallest": 0.1, "max_numbers": 2**21}
    for seed in range(3):
        for probs in ((1e-3, 0.5), (0.5, 0.5), (0.9, 1e-2)):
            assert_moments(bernoulli_sample(*probs), *bernoulli_moments(*probs), seed=seed, **options)
        assert_moments(inflated_sample, *INFLATED, seed=seed, **options)
        for mean in (1e-5, 1e-7):  # never or hardly seen: no verdict in place of a wrong alarm
            law = bernoulli_sample(mean, 0.5)
            assert verify_moments(law, *bernoulli_moments(mean, 0.5), seed=seed, **options).verdict == "undecided"
            assert verify_moments(law, tensor([mean, 0.5]), seed=seed, **options).verdict == "undecided"


@pytest.mark.parametrize(
    ("sample", "mean", "covariance", "check"),
    [
        (bernoulli_sample(1e-3, 0.5), *bernoulli_moments(1.2e-3, 0.5), "mean"),
        (bernoulli_sample(1e-3, 0.5), bernoulli_moments(1e-3, 0.5)[0], bernoulli_moments(1.2e-3, 0.5)[1], "covariance"),
        (bernoulli_sample(0.5), tensor([0.5]), tensor([[0.26]]), "covariance"),
        (bernoulli_sample(0.0, 0.5), *bernoulli_moments(1e-3, 0.5), "mean"),
        (bernoulli_sample(1e-4, 0.5), tensor([0.0, 0.5]), tensor([[0, 0], [0, 0.25]]), "mean"),
        (bernoulli_sample(1e-4, 0.5), tensor([1e-4, 0.5]), tensor([[0, 0], [0, 0.25]]), "mean"),
        (inflated_sample, INFLATED[0] + tensor([0, 0, 1e-9]), INFLATED[1], "mean"),
        (inflated_sample, INFLATED[0], INFLATED[1] + tensor([1.0, 0, 0]).diag() * 0.05, "covariance"),
        (inflated_sample, INFLATED[0], INFLATED[1] * (1 - tensor([[0.0, 0.1, 0]] * 3)), "a covariance matrix"),
        (inflated_sample, INFLATED[0], INFLATED[1].diagonal().diag(), "covariance"),
    ],
)
def test_false_moments_of_rare_atoms_and_degenerate_columns(
    sample: Callable[[int, torch.Generator], Tensor], mean: Tensor, covariance: Tensor, check: str
) -> None:
    report = verify_moments(sample, mean, covariance, smallest=0.02, max_numbers=2**23, seed=SEED)
    assert report.verdict == "refuted"
    assert check in failed(report)


def test_single_precision_draws_have_moments() -> None:
    assert_moments(lambda n, g: torch.randn(n, 2, generator=g) + 100, tensor([100.0, 100]), torch.eye(2), seed=SEED)
    moved = verify_moments(
        lambda n, g: torch.randn(n, 2, generator=g) + 100, tensor([100.0, 100.02]), torch.eye(2), seed=SEED
    )
    assert moved.verdict == "refuted"


# densities


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


# limits


def softmax(scores: list[float]) -> Callable[[float], Tensor]:
    return lambda eps: (tensor(scores) / eps).softmax(0)


TRUE_LIMITS: dict[str, tuple] = {
    "linear": (lambda e: 1 + e, 1.0, "eps^1.00"),
    "quadratic": (math.cos, 1.0, "eps^2.00"),
    "square root": (lambda e: 2 + e**0.5 + e, 2.0, "eps^0.50"),
    "slow": (lambda e: 1 + e**0.1, 1.0, "eps^0.10"),
    "logarithm": (lambda e: e * math.log(e), 0.0, "eps^0.9"),
    "cancelling": (lambda e: (math.exp(e) - 1) / e, 1.0, "eps^1.00"),
    "no ties": (softmax([3.0, 2.0, 1.0]), tensor([1.0, 0, 0]), "faster than any power"),
    "ties": (softmax([3.0, 3.0, 1.0]), tensor([0.5, 0.5, 0]), "faster than any power"),
    "damped oscillation": (lambda e: e * math.sin(1 / e), 0.0, "eps"),
    "divergence": (lambda e: -math.log(e), math.inf, "diverges"),
    "overflow": (lambda e: -((1 / e) ** 30), -math.inf, "diverges"),
    "mixed": (lambda e: tensor([1 / e, e]), tensor([math.inf, 0.0]), ""),
}
FALSE_LIMITS: dict[str, tuple] = {
    "another limit": (lambda e: 1 + e, 1.001),
    "relative 1e-9": (lambda e: (math.exp(e) - 1) / e, 1 + 1e-9),
    "square root, 1e-8": (lambda e: 2 + e**0.5 + e, 2 + 1e-8),
    "ties forgotten": (softmax([3.0, 3.0, 1.0]), tensor([1.0, 0, 0])),
    "oscillation": (lambda e: math.sin(1 / e), 0.0),
    "divergence": (lambda e: 1 / e, 0.0),
    "wrong infinity": (lambda e: 1 / e, -math.inf),
    "bounded": (lambda e: 2 - e, math.inf),
    "shape": (lambda e: torch.ones(2) * e, torch.zeros(3)),
}


@pytest.mark.parametrize("name", TRUE_LIMITS)
def test_true_limits_hold_at_the_right_rate(name: str) -> None:
    sequence, limit, rate = TRUE_LIMITS[name]
    assert rate in assert_limit(sequence, limit, seed=SEED).checks[0].detail


@pytest.mark.parametrize("name", FALSE_LIMITS)
def test_false_limits_are_refuted(name: str) -> None:
    report = verify_limit(*FALSE_LIMITS[name], seed=SEED)
    assert report.verdict == "refuted"
    assert {"eps", "claimed", "actual"} <= set(report.checks[0].counterexample or {})


def test_limit_that_no_power_describes_is_undecided() -> None:
    assert verify_limit(lambda e: 1 / (1 - math.log(e)), 0.0, seed=SEED).verdict == "undecided"
    assert verify_limit(lambda e: math.nan, 0.0, seed=SEED).verdict == "undecided"


RATES: dict[str, tuple] = {
    "linear": (lambda e: 1 + e, 1.0, 1.0),
    "quadratic": (math.cos, 1.0, 2.0),
    "cubic": (lambda e: math.sin(e) - e, 0.0, 3.0),
    "square root with a linear term": (lambda e: 2 + e**0.5 + e, 2.0, 0.5),
    "cube root": (lambda e: e ** (1 / 3) + e ** (2 / 3), 0.0, 1 / 3),
    "slow": (lambda e: 1 + e**0.1, 1.0, 0.1),
    "a close second power": (lambda e: e + e**1.1, 0.0, 1.0),
    "cancelling": (lambda e: (math.exp(e) - 1) / e, 1.0, 1.0),
    "the slowest entry": (lambda e: tensor([1 + e, e**2, 3.0]), tensor([1.0, 0, 3]), 1.0),
    "exact entries": (lambda e: tensor([1.0, e**2]), tensor([1.0, 0]), 2.0),
    "softmax": (softmax([3.0, 2.0, 1.0]), tensor([1.0, 0, 0]), math.inf),
    "constant": (lambda e: 1.0, 1.0, math.inf),
}


@pytest.mark.parametrize("name", RATES)
def test_claimed_rates(name: str) -> None:
    sequence, limit, rate = RATES[name]
    assert_limit(sequence, limit, rate=rate, seed=SEED)
    wrong = [1.0, 2.0] if rate == math.inf else [rate * 1.1, rate * 0.9, rate + 1, math.inf]
    for claim in wrong:
        report = verify_limit(sequence, limit, rate=claim, seed=SEED)
        assert report.verdict == "refuted"
        assert failed(report) == ["converges at the rate"]


def test_rate_that_does_not_settle_is_undecided() -> None:
    for sequence in (lambda e: e * math.log(e), lambda e: e * math.sin(1 / e)):
        assert verify_limit(sequence, 0.0, rate=1.0, seed=SEED).verdict == "undecided"
    single = verify_limit(lambda e: torch.tensor(1 + e, dtype=torch.float32), 1.0, rate=1.0, seed=SEED)
    assert single.verdict == "undecided"


@pytest.mark.parametrize(("limit", "rate"), [(0.0, 0.0), (0.0, -1.0), (0.0, math.nan), (math.inf, 1.0)])
def test_rate_must_be_positive_and_towards_a_number(limit: float, rate: float) -> None:
    with pytest.raises(ValueError, match="positive power"):
        verify_limit(lambda e: e, limit, rate=rate, seed=SEED)


def test_limit_needs_a_geometric_sequence() -> None:
    with pytest.raises(ValueError, match="constant factor"):
        verify_limit(lambda e: e, 0.0, seed=SEED, at=[0.1, 0.2])


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
