"""Laws and domains that the tests of several verbs make claims about."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixproof.inference.verification import Domain, Report

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


COVARIANCE = tensor([[2.0, 0.6], [0.6, 0.5]])
ROOT = torch.linalg.cholesky(COVARIANCE)
MEAN = tensor([1.0, -4.0])
PROBS = tensor([0.2, 0.3, 0.5])


def normal_sample(num_samples: int, generator: torch.Generator) -> Tensor:
    return MEAN + torch.randn(num_samples, 2, generator=generator, dtype=torch.float64) @ ROOT.T


def softmax(scores: list[float]) -> Callable[[float], Tensor]:
    return lambda eps: (tensor(scores) / eps).softmax(0)
