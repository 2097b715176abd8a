"""Moments: true ones hold, of rare atoms too; planted faults are refuted."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixproof.inference.verification import assert_moments, verify_moments
from tests.claims import COVARIANCE, MEAN, PROBS, ROOT, SEED, failed, normal_sample, tensor


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
    with pytest.raises(ValueError, match=r"shape \(.*, 0\), expected"):
        verify_moments(lambda n, g: torch.zeros(n, 0), torch.zeros(0), seed=SEED)
    with pytest.raises(TypeError, match="returned ndarray, expected a tensor"):
        verify_moments(lambda n, g: np.zeros((n, 1)), tensor([0.0]), seed=SEED)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"the claimed mean is .*nan"):
        verify_moments(normal_sample, MEAN * math.nan, seed=SEED)
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


@pytest.mark.parametrize(("mean", "claimed"), [(1e6, 1.02), (1e7, 1.02), (1e9, 1.02), (-1e9, 0.98)])
def test_variances_far_from_zero(mean: float, claimed: float) -> None:
    def sample(num: int, generator: torch.Generator) -> Tensor:
        return mean + torch.randn(num, 1, generator=generator, dtype=torch.float64)

    assert verify_moments(sample, tensor([mean]), tensor([[1.0]]), seed=SEED).ok
    assert verify_moments(sample, tensor([mean]), tensor([[claimed]]), seed=SEED).verdict == "refuted"


def test_moments_of_which_rounding_leaves_nothing_are_undecided() -> None:
    def sample(num: int, generator: torch.Generator) -> Tensor:
        return 1e12 + 1e-3 * torch.randn(num, 1, generator=generator, dtype=torch.float64)

    report = verify_moments(sample, tensor([1e12]), tensor([[1e-6]]), seed=SEED)
    assert report.verdict == "undecided"
    assert "rounding of the draws hides errors" in str(report)


def test_complex_draws_are_refused() -> None:
    with pytest.raises(ValueError, match="return real and imaginary parts as columns"):
        verify_moments(lambda n, g: torch.ones(n, 1, dtype=torch.complex128), tensor([1.0]), seed=SEED)
