"""Problem 2: the E-step of the Gaussian mixture."""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from mixproof.inference.enumeration import log_joint
from mixproof.inference.verification.claim import Claim, Problem, both
from mixproof.inference.verification.domain import positive_definite, reals, simplex
from mixproof.inference.verification.identity import verify_identity
from mixproof.models import gaussian_full

PROBLEM = Problem("P2", "E-step of the Gaussian mixture", "Derive the E-step update for the Gaussian mixture model.")

MIXTURE = (simplex(3), reals(3, 2), positive_definite(3, 2, 2), reals(4, 2))


def normal_densities(locs: Tensor, covariances: Tensor, x: Tensor) -> Tensor:
    """Return N(x_i | mu_k, Sigma_k), shape (N, K)."""
    return MultivariateNormal(locs, covariances).log_prob(x[:, None]).exp()


def mixture_density(weights: Tensor, locs: Tensor, covariances: Tensor, x: Tensor) -> Tensor:
    """Return p(x_i), shape (N,), by torch's mixture."""
    return MixtureSameFamily(Categorical(weights), MultivariateNormal(locs, covariances)).log_prob(x).exp()


def enumerated(weights: Tensor, locs: Tensor, covariances: Tensor, x: Tensor) -> Tensor:
    """Return log p(x_i, z_i = k), shape (N, K), by enumerating the Pyro program."""
    params = {"weights": weights, "locs": locs, "covariances": covariances}
    model = partial(gaussian_full.model, num_components=len(weights))
    return log_joint(model, params, x).rows


def posterior(weights: Tensor, locs: Tensor, covariances: Tensor, x: Tensor) -> Tensor:
    """Return p(z_i = k | x_i), shape (N, K), by enumerating the Pyro program."""
    return enumerated(weights, locs, covariances, x).softmax(-1)


def joint_posterior(weights: Tensor, locs: Tensor, covariances: Tensor, x: Tensor) -> Tensor:
    """Return p(Z | X) for each of the K^N assignments, by summing over all of them."""
    table = enumerated(weights, locs, covariances, x)
    rows = torch.arange(len(x))
    assignments = product(range(len(weights)), repeat=len(x))
    return torch.stack([table[rows, list(labels)].sum() for labels in assignments]).softmax(0)


def product_posterior(weights: Tensor, locs: Tensor, covariances: Tensor, x: Tensor) -> Tensor:
    table = posterior(weights, locs, covariances, x)
    rows = torch.arange(len(x))
    return torch.stack([table[rows, list(z)].prod() for z in product(range(len(weights)), repeat=len(x))])


def bayes(weights: Tensor, locs: Tensor, covariances: Tensor, x: Tensor) -> Tensor:
    densities = normal_densities(locs, covariances, x)
    return densities * weights / mixture_density(weights, locs, covariances, x)[:, None]


def total_probability(weights: Tensor, locs: Tensor, covariances: Tensor, x: Tensor) -> Tensor:
    likelihood = torch.stack(
        [MultivariateNormal(m, s).log_prob(x).exp() for m, s in zip(locs, covariances, strict=True)]
    )
    evidence = sum(likelihood[j] * weights[j] for j in range(len(weights)))
    return (likelihood * weights[:, None] / evidence).mT


def responsibilities(weights: Tensor, locs: Tensor, covariances: Tensor, x: Tensor) -> Tensor:
    weighted = weights * normal_densities(locs, covariances, x)
    return weighted / weighted.sum(-1, keepdim=True)


CLAIMS = [
    *both(
        Claim(
            "P2.1",
            "The latent variables are independent given the data, so one point at a time will do.",
            r"\gamma_t(\mathbf{Z}) = \prod_{i=1}^N \gamma_t(\mathbf{z}_i)",
            "holds",
            partial(verify_identity, product_posterior, joint_posterior, *MIXTURE[:3], reals(3, 2), num_points=6),
        )
    ),
    *both(
        Claim(
            "P2.2",
            "Bayes' theorem for one point.",
            r"\gamma_t(\mathbf{z}_i = k) = \frac{p(\mathbf{x}_i \mid \mathbf{z}_i = k, \boldsymbol{\mu}^{(t)}, "
            r"\boldsymbol{\Sigma}^{(t)}) \, p(\mathbf{z}_i = k \mid \boldsymbol{\pi}^{(t)})}{p(\mathbf{x}_i \mid "
            r"\boldsymbol{\pi}^{(t)}, \boldsymbol{\mu}^{(t)}, \boldsymbol{\Sigma}^{(t)})}",
            "holds",
            partial(verify_identity, bayes, posterior, *MIXTURE, num_points=8),
        )
    ),
    *both(
        Claim(
            "P2.3",
            "The evidence by the law of total probability.",
            r"\gamma_t(\mathbf{z}_i = k) = \frac{p(\mathbf{x}_i \mid \mathbf{z}_i = k, \boldsymbol{\mu}^{(t)}, "
            r"\boldsymbol{\Sigma}^{(t)}) \, p(\mathbf{z}_i = k \mid \boldsymbol{\pi}^{(t)})}{\sum_{j=1}^K p(\mathbf{x}_i \mid "
            r"\mathbf{z}_i = j, \boldsymbol{\pi}^{(t)}, \boldsymbol{\mu}^{(t)}, \boldsymbol{\Sigma}^{(t)}) \, p(\mathbf{z}_i = j "
            r"\mid \boldsymbol{\pi}^{(t)})}",
            "holds",
            partial(verify_identity, total_probability, posterior, *MIXTURE, num_points=8),
            note=r"The $\boldsymbol{\pi}^{(t)}$ behind the bar of the likelihood is idle: given $\mathbf{z}_i$ it has no effect.",
        )
    ),
    *both(
        Claim(
            "P2.4",
            "The model's densities put in.",
            r"\gamma_t(\mathbf{z}_i = k) = \frac{\pi_k^{(t)} \mathcal{N}(\mathbf{x}_i \mid \boldsymbol{\mu}_k^{(t)}, "
            r"\boldsymbol{\Sigma}_k^{(t)})}{\sum_{j=1}^K \pi_j^{(t)} \mathcal{N}(\mathbf{x}_i \mid \boldsymbol{\mu}_j^{(t)}, "
            r"\boldsymbol{\Sigma}_j^{(t)})}",
            "holds",
            partial(verify_identity, responsibilities, posterior, *MIXTURE, num_points=8),
        )
    ),
]
