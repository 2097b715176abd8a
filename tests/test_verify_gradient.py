"""Gradients: true ones hold, along tangents too; transposes, factors and conventions are told."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from mixproof.inference.verification import (
    assert_gradient,
    positive,
    positive_definite,
    reals,
    simplex,
    symmetric,
    verify_gradient,
)
from tests.claims import SEED, normals, spd


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
