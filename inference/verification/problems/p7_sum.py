"""Problem 7: the sum of two Gaussian mixtures."""

from __future__ import annotations

from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from mixproof.inference.enumeration import bind
from mixproof.inference.verification.claim import Claim, Problem, both
from mixproof.inference.verification.density import verify_density
from mixproof.inference.verification.moments import verify_moments
from mixproof.inference.verification.report import Report
from mixproof.models import gaussian_full, gaussian_sum

PROBLEM = Problem(
    "P7",
    "The sum of two Gaussian mixtures",
    r"Consider $\mathbf{x}, \mathbf{y} \in \mathbb{R}^D$ distributed according to two different Gaussian mixtures with parameters "
    r"$\boldsymbol{\theta}^x$ and $\boldsymbol{\theta}^y$, and $\mathbf{z} = \mathbf{x} + \mathbf{y}$. a) Describe a generative "
    r"process for $\mathbf{z}$. b) Explain why $p(\mathbf{z} \mid \boldsymbol{\theta}^x, \boldsymbol{\theta}^y)$ is again a mixture "
    r"of Gaussians. c) State its density.",
)


def tensor(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


X_PART = gaussian_full.Params(
    tensor(0.5, 0.3, 0.2),
    tensor([-2.0, 0.0], [1.0, 1.5], [2.0, -2.0]),
    tensor([[0.6, 0.2], [0.2, 0.4]], [[0.5, -0.3], [-0.3, 0.8]], [[0.3, 0.0], [0.0, 0.9]]),
)
Y_PART = gaussian_full.Params(
    tensor(0.7, 0.3),
    tensor([0.5, -0.5], [-1.0, 2.0]),
    tensor([[0.4, 0.1], [0.1, 0.3]], [[0.7, -0.2], [-0.2, 0.5]]),
)
PARAMS = gaussian_sum.Params(*X_PART, *Y_PART)


def log_mixture(params: gaussian_full.Params, x: Tensor) -> Tensor:
    """Return the log of the sum of weighted Gaussian densities, shape (N,), written out."""
    deviations = x[:, None] - params.locs
    quadratic = torch.einsum("nki,kij,nkj->nk", deviations, torch.linalg.inv(params.covariances), deviations)
    densities = torch.exp(-quadratic / 2) / torch.linalg.det(2 * torch.pi * params.covariances).sqrt()
    return (params.weights * densities).sum(-1).log()


def log_sum_density(x: Tensor) -> Tensor:
    """Return the claimed log density of the sum, shape (N,): a double sum over the pairs of components."""
    pairs = [
        (
            X_PART.weights[k] * Y_PART.weights[l],
            X_PART.locs[k] + Y_PART.locs[l],
            X_PART.covariances[k] + Y_PART.covariances[l],
        )
        for k in range(3)
        for l in range(2)
    ]
    return log_mixture(gaussian_full.Params(*(torch.stack(part) for part in zip(*pairs, strict=True))), x)


def seeded(generator: torch.Generator) -> None:
    pyro.set_rng_seed(int(torch.randint(2**31, (), generator=generator)))


def draw_part(params: gaussian_full.Params, num_samples: int, generator: torch.Generator) -> Tensor:
    """Return draws of one part by its Pyro program."""
    seeded(generator)
    return bind(gaussian_full.model, params._asdict())(num_components=len(params.weights), num_data=num_samples)


def draw_sum(num_samples: int, generator: torch.Generator) -> Tensor:
    """Return draws of the sum by the generative Pyro program: draw x, draw y, add."""
    seeded(generator)
    return bind(gaussian_sum.generative_model, PARAMS._asdict())(num_components=(3, 2), num_data=num_samples)


def draw_dependent_sum(num_samples: int, generator: torch.Generator) -> Tensor:
    """Return sums in which both parts have the right laws and y moves with x: its component and noise are those of x."""
    k = torch.multinomial(X_PART.weights, num_samples, replacement=True, generator=generator)
    l = (k == 1).long()  # probability 0.3, as y has it
    noise = torch.randn(num_samples, 2, generator=generator, dtype=torch.float64)
    parts = []
    for part, z in ((X_PART, k), (Y_PART, l)):
        factors = torch.linalg.cholesky(part.covariances)[z]
        parts.append(part.locs[z] + (factors @ noise[..., None])[..., 0])
    return parts[0] + parts[1]


def draw_pair(dependent: bool, num_samples: int, generator: torch.Generator) -> Tensor:
    """Return draws of one summand each from the second component of x and the first of y, added."""
    noise = torch.randn(2, num_samples, 2, generator=generator, dtype=torch.float64)
    x = X_PART.locs[1] + noise[0] @ torch.linalg.cholesky(X_PART.covariances[1]).mT
    y = Y_PART.locs[0] + noise[0 if dependent else 1] @ torch.linalg.cholesky(Y_PART.covariances[0]).mT
    return x + y


def verify_pair(*, dependent: bool, seed: int) -> Report:
    """Check the law of one pair by its density; a dependent pair is normal too, and only its covariance is another."""
    one = gaussian_full.Params(
        tensor(1.0), (X_PART.locs[1] + Y_PART.locs[0])[None], (X_PART.covariances[1] + Y_PART.covariances[0])[None]
    )
    return verify_density(partial(log_mixture, one), partial(draw_pair, dependent), seed=seed)


def draw_labels(dependent: bool, num_samples: int, generator: torch.Generator) -> Tensor:
    """Return pairs (k, l), of the generative program or of parts whose components move together."""
    if dependent:
        k = torch.multinomial(X_PART.weights, num_samples, replacement=True, generator=generator)
        return torch.stack([k, (k == 1).long()], -1).to(torch.float64)
    seeded(generator)
    with pyro.poutine.trace() as tape:
        bind(gaussian_sum.generative_model, PARAMS._asdict())(num_components=(3, 2), num_data=num_samples)
    nodes: Any = tape.trace.nodes
    return torch.stack([nodes[name]["value"] for name in "kl"], -1).to(torch.float64)


def log_label_probability(pairs: Tensor) -> Tensor:
    k, l = pairs.long().unbind(-1)
    return (X_PART.weights[k] * Y_PART.weights[l]).log()


def verify_labels(*, dependent: bool, seed: int) -> Report:
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(2)).to(torch.float64)
    return verify_density(log_label_probability, partial(draw_labels, dependent), support=pairs, seed=seed)


SUM_DENSITY = (
    r"p(\mathbf{z} \mid \boldsymbol{\theta}^x, \boldsymbol{\theta}^y) = \sum_{k=1}^{K_x} \sum_{l=1}^{K_y} \pi_k^x \pi_l^y "
    r"\mathcal{N}(\mathbf{z} \mid \boldsymbol{\mu}_k^x + \boldsymbol{\mu}_l^y, \boldsymbol{\Sigma}_k^x + \boldsymbol{\Sigma}_l^y)"
)
INDEPENDENT = r"$\mathbf{x}$ and $\mathbf{y}$ are independent"

CLAIMS = [
    *both(
        Claim(
            "P7.1",
            "The density of the first mixture.",
            r"p(\mathbf{x} \mid \boldsymbol{\theta}^x) = \sum_{k=1}^{K_x} \pi_k^x \mathcal{N}(\mathbf{x} \mid \boldsymbol{\mu}_k^x, "
            r"\boldsymbol{\Sigma}_k^x)",
            "holds",
            partial(verify_density, partial(log_mixture, X_PART), partial(draw_part, X_PART)),
        )
    ),
    *both(
        Claim(
            "P7.2",
            "The density of the second mixture.",
            r"p(\mathbf{y} \mid \boldsymbol{\theta}^y) = \sum_{l=1}^{K_y} \pi_l^y \mathcal{N}(\mathbf{y} \mid \boldsymbol{\mu}_l^y, "
            r"\boldsymbol{\Sigma}_l^y)",
            "holds",
            partial(verify_density, partial(log_mixture, Y_PART), partial(draw_part, Y_PART)),
        )
    ),
    Claim(
        "P7.3a",
        "The random variable of the problem: draw x, draw y, add.",
        r"\mathbf{z} = \mathbf{x} + \mathbf{y}",
        "holds",
        partial(verify_moments, draw_sum, sum(part.weights @ part.locs for part in (X_PART, Y_PART))),
        note="A definition; checked is that the generative program's mean is the sum of both means, which needs no independence.",
    ),
    Claim(
        "P7.3b",
        "The random variable of the problem.",
        r"",
        "illegible",
        note="The formula is lost: the sentence ends with “and the random variable”.",
    ),
    *both(
        Claim(
            "P7.4",
            "Given both components, the sum is Gaussian.",
            r"\mathbf{z} \sim \mathcal{N}(\boldsymbol{\mu}_k^x + \boldsymbol{\mu}_l^y, \boldsymbol{\Sigma}_k^x + "
            r"\boldsymbol{\Sigma}_l^y)",
            "holds if",
            partial(verify_pair, dependent=False),
            condition=INDEPENDENT,
            without=partial(verify_pair, dependent=True),
            note="If y moves with x, the covariance of the sum has cross terms; if they are not jointly normal, the sum is not normal.",
        )
    ),
    *both(
        Claim(
            "P7.5",
            "Each pair of components has the product of the probabilities.",
            r"p(k, l) = \pi_k^x \pi_l^y",
            "holds if",
            partial(verify_labels, dependent=False),
            condition=INDEPENDENT,
            without=partial(verify_labels, dependent=True),
            note="The sheet says this in words.",
        )
    ),
    *both(
        Claim(
            "P7.6",
            "The density of the sum.",
            SUM_DENSITY,
            "holds if",
            partial(verify_density, log_sum_density, draw_sum),
            condition=INDEPENDENT,
            without=partial(verify_density, log_sum_density, draw_dependent_sum),
        )
    ),
]
