"""Problem 5: mean and covariance of a Gaussian mixture."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pyro
import torch
from torch import Tensor

from mixproof.inference.enumeration import bind
from mixproof.inference.verification.claim import Claim, Problem, all_of, both
from mixproof.inference.verification.domain import positive_definite, reals, simplex
from mixproof.inference.verification.identity import verify_identity
from mixproof.inference.verification.moments import verify_moments
from mixproof.inference.verification.problems.p2_gaussian_e_step import enumerated, mixture_density, normal_densities
from mixproof.inference.verification.report import Report
from mixproof.models import gaussian_full

PROBLEM = Problem(
    "P5",
    "Moments of a Gaussian mixture",
    r"Consider a mixture of K Gaussians $p(\mathbf{x}) = \sum_k \pi_k \mathcal{N}(\mathbf{x} \mid \boldsymbol{\mu}_k, "
    r"\boldsymbol{\Sigma}_k)$. Derive the expected value $\mathbb{E}[\mathbf{x}]$ and the covariance $\text{Cov}[\mathbf{x}]$.",
)

MIXTURE = (simplex(3), reals(3, 2), positive_definite(3, 2, 2))


def nodes(locs: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Return Gauss-Hermite points (K, M, 2) and their weights (M,): exact for the second moments of each Gaussian."""
    points, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(3))
    grid = torch.cartesian_prod(points, points)
    product = torch.outer(weights, weights).flatten() / (2 * math.pi)
    return locs[:, None] + grid @ torch.linalg.cholesky(covariances).mT, product


def expectation(weights: Tensor, locs: Tensor, covariances: Tensor) -> Tensor:
    """Return E[x], shape (2,), by quadrature."""
    x, w = nodes(locs, covariances)
    return torch.einsum("k,m,kmi->i", weights, w, x)


def second_moment(weights: Tensor, locs: Tensor, covariances: Tensor) -> Tensor:
    """Return E[x x^T], shape (2, 2), by quadrature."""
    x, w = nodes(locs, covariances)
    return torch.einsum("k,m,kmi,kmj->ij", weights, w, x, x)


def covariance(weights: Tensor, locs: Tensor, covariances: Tensor) -> Tensor:
    """Return the expectation of (x - E x)(x - E x)^T by quadrature."""
    x, w = nodes(locs - expectation(weights, locs, covariances), covariances)
    return torch.einsum("k,m,kmi,kmj->ij", weights, w, x, x)


def iterated(weights: Tensor, locs: Tensor, covariances: Tensor) -> Tensor:
    x, w = nodes(locs, covariances)
    return sum(weights[k] * torch.einsum("m,mi,mj->ij", w, x[k], x[k]) for k in range(3))  # type: ignore[return-value]


def with_conditional_moments(weights: Tensor, locs: Tensor, covariances: Tensor) -> Tensor:
    x, w = nodes(locs, covariances)
    means = torch.einsum("m,kmi->ki", w, x)
    centred = x - means[:, None]
    covs = torch.einsum("m,kmi,kmj->kij", w, centred, centred)
    return torch.einsum("k,kij->ij", weights, covs + means[:, :, None] * means[:, None])


def with_parameters(weights: Tensor, locs: Tensor, covariances: Tensor) -> Tensor:
    return torch.einsum("k,kij->ij", weights, covariances + locs[:, :, None] * locs[:, None])


def printed_covariance(weights: Tensor, locs: Tensor, covariances: Tensor) -> Tensor:
    double_sum = torch.einsum("k,j,ka,jb->ab", weights, weights, locs, locs)
    return with_parameters(weights, locs, covariances) - double_sum


def program_draws(params: gaussian_full.Params) -> Callable[[int, torch.Generator], Tensor]:
    """Return a sampler that runs the Pyro program with its parameters set."""

    def draw(num_samples: int, generator: torch.Generator) -> Tensor:
        pyro.set_rng_seed(int(torch.randint(2**31, (), generator=generator)))
        model = bind(gaussian_full.model, params._asdict())
        return model(num_components=len(params.weights), num_data=num_samples)

    return draw


def verify_by_monte_carlo(*, with_covariance: bool, seed: int) -> Report:
    generator = torch.Generator().manual_seed(seed)
    params = gaussian_full.Params(*(domain(generator) for domain in MIXTURE))
    claimed = printed_covariance(*params) if with_covariance else None
    return verify_moments(program_draws(params), params.weights @ params.locs, claimed, seed=seed)


E_XX = r"\mathbb{E}[\mathbf{x}\mathbf{x}^T]"
COV = r"\text{Cov}[\mathbf{x}]"
E_E = r"\mathbb{E}[\mathbf{x}]\mathbb{E}[\mathbf{x}]^T"

CLAIMS = [
    *both(
        Claim(
            "P5.1",
            "The density of the mixture.",
            r"p(\mathbf{x}) = \sum_k \pi_k \mathcal{N}(\mathbf{x} \mid \boldsymbol{\mu}_k, \boldsymbol{\Sigma}_k)",
            "holds",
            partial(
                verify_identity,
                lambda w, m, s, x: torch.stack([normal_densities(m, s, x) @ w, mixture_density(w, m, s, x)]),
                lambda w, m, s, x: enumerated(w, m, s, x).exp().sum(-1).expand(2, -1),
                *MIXTURE,
                reals(5, 2),
                num_points=8,
            ),
            note="Transcription b calls the Gaussians isotropic and prints a covariance for each; nothing below needs isotropy.",
        )
    ),
    *both(
        Claim(
            "P5.2",
            "The hint.",
            rf"{COV} = {E_XX} - {E_E}",
            "holds",
            partial(
                verify_identity,
                lambda w, m, s: second_moment(w, m, s) - torch.outer(expectation(w, m, s), expectation(w, m, s)),
                covariance,
                *MIXTURE,
            ),
        )
    ),
    Claim(
        "P5.3a",
        "The mean, by the law of iterated expectations.",
        r"\mathbb{E}[\mathbf{x}] = \mathbb{E}_{\mathbf{z}} [\mathbb{E}[\mathbf{x} \mid \mathbf{z}]] = \sum_{k=1}^K \pi_k "
        r"\mathbb{E}[\mathbf{x} \mid \mathbf{z} = k] = \sum_{k=1}^K \pi_k \boldsymbol{\mu}_k",
        "holds",
        all_of(
            partial(verify_identity, lambda w, m, s: w @ m, expectation, *MIXTURE),
            partial(verify_by_monte_carlo, with_covariance=False),
        ),
    ),
    Claim(
        "P5.3b",
        "The mean, by the law of iterated expectations.",
        r"",
        "illegible",
        note="The whole formula is lost.",
    ),
    *both(
        Claim(
            "P5.4",
            "The second moment, by the same law.",
            rf"{E_XX} = \mathbb{{E}}_{{\mathbf{{z}}}} [\mathbb{{E}}[\mathbf{{x}}\mathbf{{x}}^T \mid \mathbf{{z}}]] = \sum_{{k=1}}^K \pi_k "
            r"\mathbb{E}[\mathbf{x}\mathbf{x}^T \mid \mathbf{z} = k]",
            "holds",
            partial(verify_identity, iterated, second_moment, *MIXTURE),
        )
    ),
    *both(
        Claim(
            "P5.5",
            "The hint within a component.",
            rf"{E_XX} = \sum_{{k=1}}^K \pi_k (\text{{Cov}}[\mathbf{{x}} \mid \mathbf{{z}} = k] + \mathbb{{E}}[\mathbf{{x}} \mid \mathbf{{z}} "
            r"= k] \mathbb{E}[\mathbf{x} \mid \mathbf{z} = k]^T)",
            "holds",
            partial(verify_identity, with_conditional_moments, second_moment, *MIXTURE),
        )
    ),
    *both(
        Claim(
            "P5.6",
            "The moments of a Gaussian.",
            rf"{E_XX} = \sum_{{k=1}}^K \pi_k (\boldsymbol{{\Sigma}}_k + \boldsymbol{{\mu}}_k \boldsymbol{{\mu}}_k^T)",
            "holds",
            partial(verify_identity, with_parameters, second_moment, *MIXTURE),
        )
    ),
    *both(
        Claim(
            "P5.7",
            "The covariance.",
            rf"{COV} = {E_XX} - {E_E} = \sum_{{k=1}}^K \pi_k (\boldsymbol{{\Sigma}}_k + \boldsymbol{{\mu}}_k \boldsymbol{{\mu}}_k^T) - "
            r"\sum_{k=1}^K \sum_{j=1}^K \pi_k \pi_j \boldsymbol{\mu}_k \boldsymbol{\mu}_j^T",
            "holds",
            all_of(
                partial(verify_identity, printed_covariance, covariance, *MIXTURE),
                partial(verify_by_monte_carlo, with_covariance=True),
            ),
        )
    ),
]
