"""Problem 4: EM for a mixture of products of Bernoullis with uniform weights."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.enumeration import log_joint
from mixproof.inference.verification.claim import Claim, Problem, both, misprinted
from mixproof.inference.verification.domain import binary, one_hot, simplex, unit_interval
from mixproof.inference.verification.gradient import verify_gradient
from mixproof.inference.verification.identity import verify_identity
from mixproof.inference.verification.maximiser import verify_maximiser
from mixproof.inference.verification.report import Report
from mixproof.models import bernoulli

PROBLEM = Problem(
    "P4",
    "Mixture of Bernoullis",
    r"Consider a mixture of products of independent Bernoullis, "
    r"$p(\mathbf{x} \mid \mathbf{z} = k) = \prod_{d=1}^D \theta_{kd}^{x_d} (1 - \theta_{kd})^{1 - x_d}$, with uniform weights "
    r"$p(\mathbf{z}) = \prod_{k=1}^K (1/K)^{z_k}$. Derive the EM algorithm for $\boldsymbol{\theta}$.",
)

K = 3
THETA, BITS, GAMMA = unit_interval(K, 4), binary(5, 4), simplex(5, K)
ONE_ROW, ONE_GAMMA = binary(4), simplex(K)


def enumerated(theta: Tensor, x: Tensor) -> Tensor:
    """Return log p(x_i, z_i = k), shape (N, K), by enumerating the Pyro program."""
    params = {"weights": torch.full((K,), 1 / K, dtype=x.dtype), "probs": theta}
    model = partial(bernoulli.UniformWeights().model, num_components=K)
    return log_joint(model, params, x).rows


def likelihood(theta: Tensor, x: Tensor) -> Tensor:
    """Return the product over the pixels, shape (N, K)."""
    return (theta ** x[:, None] * (1 - theta) ** (1 - x[:, None])).prod(-1)


def responsibilities(theta: Tensor, x: Tensor) -> Tensor:
    weighted = likelihood(theta, x) * (1 / K)
    return weighted / weighted.sum(-1, keepdim=True)


def cancelled(theta: Tensor, x: Tensor) -> Tensor:
    return likelihood(theta, x) / likelihood(theta, x).sum(-1, keepdim=True)


def expected_log_joint(theta: Tensor, gamma: Tensor, x: Tensor) -> Tensor:
    return (gamma * enumerated(theta, x)).sum()


def summand(theta: Tensor, gamma: Tensor, x: Tensor) -> Tensor:
    """Return one point's part of the objective: gamma (K,), x (D,)."""
    return (gamma[:, None] * (x * theta.log() + (1 - x) * (1 - theta).log())).sum()


def braced(theta: Tensor, gamma: Tensor, x: Tensor) -> Tensor:
    return torch.stack([summand(theta, g, row) for g, row in zip(gamma, x, strict=True)]).sum()


def constant(gamma: Tensor) -> Tensor:
    return -gamma.sum() * math.log(K)


def kronecker_slope(theta: Tensor, gamma: Tensor, x: Tensor) -> Tensor:
    """Return the double sum over k and d with the derivatives of the logarithms in it, for every k' and d'."""
    same = torch.einsum("ka,db->kdab", torch.eye(K, dtype=x.dtype), torch.eye(len(x), dtype=x.dtype))
    d_log_theta = same / theta[..., None, None]
    d_log_one_minus = -same / (1 - theta)[..., None, None]
    return (
        gamma[:, None, None, None] * (x[:, None, None] * d_log_theta + (1 - x)[:, None, None] * d_log_one_minus)
    ).sum((0, 1))


def printed_slope(theta: Tensor, gamma: Tensor, x: Tensor) -> Tensor:
    """Return the line at every k' and d' with k and d, which it leaves free, the next component and pixel."""
    k, d = gamma.roll(1)[:, None], x.roll(1)
    return k * (d / theta - (1 - d) / (1 - theta))


def primed_slope(theta: Tensor, gamma: Tensor, x: Tensor) -> Tensor:
    return gamma[:, None] * (x / theta - (1 - x) / (1 - theta))


def total_slope(theta: Tensor, gamma: Tensor, x: Tensor) -> Tensor:
    return (gamma[..., None] * (x[:, None] / theta - (1 - x[:, None]) / (1 - theta))).sum(0)


def instance(seed: int) -> tuple[Tensor, Tensor]:
    """Return random responsibilities (12, K) and rows (12, 4) in which each pixel takes both values."""
    generator = torch.Generator().manual_seed(seed)
    x = binary(10, 4)(generator)
    return simplex(12, K)(generator), torch.cat([x, torch.tensor([[0.0], [1.0]], dtype=x.dtype).expand(2, 4)])


def verify_update(*, empty: bool = False, seed: int) -> Report:
    """Check the update as a maximiser; a component may be left without any responsibility."""
    gamma, x = instance(seed)
    if empty:
        gamma = torch.nn.functional.pad(simplex(12, K - 1)(torch.Generator().manual_seed(seed)), (1, 0))
    return verify_maximiser(
        gamma.mT @ x / gamma.sum(0)[:, None],
        lambda theta: expected_log_joint(theta, gamma, x),
        constraint=constraints.unit_interval,
        seed=seed,
    )


def verify_update_under_prior(*, seed: int) -> Report:
    """Check the update against the expectation over z drawn from its prior, as transcription b prints it."""
    gamma, x = instance(seed)
    return verify_maximiser(
        gamma.mT @ x / gamma.sum(0)[:, None],
        lambda theta: expected_log_joint(theta, torch.full_like(gamma, 1 / K), x),
        constraint=constraints.unit_interval,
        seed=seed,
    )


PRODUCT = r"\prod_{d=1}^D \theta_{kd}^{x_d} (1 - \theta_{kd})^{1 - x_d}"
EXPECTATION = (
    r"\mathbb{E}_{\mathbf{z} \sim \gamma_t(\mathbf{z})} [\log p(\mathbf{X}, \mathbf{z} \mid \boldsymbol{\theta})]"
)
SUM_I = r"\sum_{i=1}^N"
INNER = r"\sum_{k=1}^K \gamma_t(\mathbf{z}_i = k) \sum_{d=1}^D (x_{id} \log\theta_{kd} + (1 - x_{id}) \log(1 - \theta_{kd}))"
UPDATE = r"\frac{\sum_{i=1}^N \gamma_t(\mathbf{z}_i = k) \, x_{id}}{\sum_{i=1}^N \gamma_t(\mathbf{z}_i = k)}"

CLAIMS = [
    *misprinted(
        Claim(
            "P4.1a",
            "Given its component, a vector is a product of independent Bernoullis.",
            rf"p(\mathbf{{x}} \mid \mathbf{{z}} = k) = {PRODUCT}",
            "holds",
            partial(verify_identity, likelihood, lambda t, x: enumerated(t, x).exp() * K, THETA, BITS, num_points=8),
        ),
        rf"p(\mathbf{{x}}) = {PRODUCT}",
        partial(
            verify_identity,
            likelihood,
            lambda t, x: enumerated(t, x).exp().sum(-1, keepdim=True).expand(-1, K),
            THETA,
            BITS,
            num_points=8,
        ),
        note="The condition on the component is lost.",
    ),
    *both(
        Claim(
            "P4.2",
            "The components are equally likely.",
            r"p(\mathbf{z}) = \prod_{k=1}^K \pi_k^{z_k} = \prod_{k=1}^K \left(\frac{1}{K}\right)^{z_k}",
            "holds",
            partial(
                verify_identity,
                lambda z: torch.full_like(z, 1 / K).pow(z).prod(-1),
                lambda z: torch.distributions.OneHotCategorical(torch.ones(K, dtype=z.dtype)).log_prob(z).exp(),
                one_hot(6, K),
            ),
        )
    ),
    *both(
        Claim(
            "P4.3",
            "The E-step: Bayes' theorem, and uniform weights cancel.",
            r"\gamma_t(\mathbf{z}_i = k) = \frac{p(\mathbf{x}_i \mid \mathbf{z}_i = k, \boldsymbol{\theta}) \, p(\mathbf{z}_i = "
            r"k)}{\sum_{l=1}^K p(\mathbf{x}_i \mid \mathbf{z}_i = l, \boldsymbol{\theta}) \, p(\mathbf{z}_i = l)} = "
            r"\frac{p(\mathbf{x}_i \mid \mathbf{z}_i = k, \boldsymbol{\theta})}{\sum_{l=1}^K p(\mathbf{x}_i \mid \mathbf{z}_i = l, "
            r"\boldsymbol{\theta})}",
            "holds",
            partial(
                verify_identity,
                lambda t, x: torch.stack([responsibilities(t, x), cancelled(t, x)]),
                lambda t, x: enumerated(t, x).softmax(-1).expand(2, -1, -1),
                THETA,
                BITS,
                num_points=8,
            ),
        )
    ),
    *both(
        Claim(
            "P4.4",
            "The objective of the M-step.",
            rf"{EXPECTATION} = {SUM_I} \sum_{{k=1}}^K \gamma_t(\mathbf{{z}}_i = k) \log\left(\frac{{1}}{{K}} \prod_{{d=1}}^D "
            r"\theta_{kd}^{x_{id}} (1 - \theta_{kd})^{1 - x_{id}}\right)",
            "holds",
            partial(
                verify_identity,
                lambda t, g, x: (g * (likelihood(t, x) / K).log()).sum(),
                expected_log_joint,
                THETA,
                GAMMA,
                BITS,
                num_points=8,
            ),
        )
    ),
    *both(
        Claim(
            "P4.5",
            r"The part that depends on the parameters, $\mathcal{L}_i$ for each point.",
            rf"{EXPECTATION} = C + \underbrace{{{SUM_I} {INNER}}}_{{=: \mathcal{{L}}_i}}",
            "refuted as printed",
            partial(
                verify_identity,
                lambda t, g, x: constant(g) + len(x) * braced(t, g, x),
                expected_log_joint,
                THETA,
                GAMMA,
                BITS,
                num_points=8,
            ),
            correction=rf"{EXPECTATION} = C + {SUM_I} \underbrace{{{INNER}}}_{{=: \mathcal{{L}}_i}}, \quad C = -N \log K",
            corrected=partial(
                verify_identity,
                lambda t, g, x: constant(g) + braced(t, g, x),
                expected_log_joint,
                THETA,
                GAMMA,
                BITS,
                num_points=8,
            ),
            note=r"The brace takes in the sum over $i$, so that $\mathcal{L}_i$ would not depend on $i$ and the "
            r"$\sum_i \mathcal{L}_i$ of P4.8 would be $N$ times too large (this is what is refuted). The sum itself is right.",
        )
    ),
    *both(
        Claim(
            "P4.6",
            "Its derivative, term by term.",
            r"\frac{\partial \mathcal{L}_i}{\partial \theta_{k',d'}} = \sum_{k=1}^K \gamma_t(\mathbf{z}_i = k) \sum_{d=1}^D "
            r"\left(x_{id} \frac{\partial \log\theta_{kd}}{\partial \theta_{k',d'}} + (1 - x_{id}) \frac{\partial \log(1 - "
            r"\theta_{kd})}{\partial \theta_{k',d'}}\right)",
            "holds",
            partial(verify_gradient, kronecker_slope, summand, THETA, ONE_GAMMA, ONE_ROW),
            note=r"With $\mathcal{L}_i$ as corrected in P4.5.",
        )
    ),
    *both(
        Claim(
            "P4.7",
            "Only one term of the double sum remains.",
            r"\frac{\partial \mathcal{L}_i}{\partial \theta_{k',d'}} = \gamma_t(\mathbf{z}_i = k) \left(\frac{x_{id}}{\theta_{k',d'}} "
            r"- \frac{1 - x_{id}}{1 - \theta_{k',d'}}\right)",
            "refuted as printed",
            partial(verify_gradient, printed_slope, summand, THETA, ONE_GAMMA, ONE_ROW),
            correction=r"\frac{\partial \mathcal{L}_i}{\partial \theta_{k',d'}} = \gamma_t(\mathbf{z}_i = k') "
            r"\left(\frac{x_{id'}}{\theta_{k',d'}} - \frac{1 - x_{id'}}{1 - \theta_{k',d'}}\right)",
            corrected=partial(verify_gradient, primed_slope, summand, THETA, ONE_GAMMA, ONE_ROW),
            note=r"The sums are gone, and $k$ and $d$ stay behind without their primes; harmless to the end result.",
        )
    ),
    *both(
        Claim(
            "P4.8",
            "The derivative of the objective adds up the points'.",
            rf"\frac{{\partial {EXPECTATION}}}{{\partial \theta_{{kd}}}} = {SUM_I} \frac{{\partial \mathcal{{L}}_i}}{{\partial "
            rf"\theta_{{kd}}}} = {SUM_I} \gamma_t(\mathbf{{z}}_i = k) \left(\frac{{x_{{id}}}}{{\theta_{{kd}}}} - \frac{{1 - x_{{id}}}}{{1 - "
            r"\theta_{kd}}\right)",
            "holds",
            partial(verify_gradient, total_slope, expected_log_joint, THETA, GAMMA, BITS, num_points=6),
        )
    ),
    *misprinted(
        Claim(
            "P4.9a",
            "The update is its root.",
            rf"\frac{{\partial {EXPECTATION}}}{{\partial \theta_{{kd}}}} = 0",
            "holds",
            verify_update,
        ),
        r"\frac{\partial \mathbb{E}_{z \sim p_\theta(z)} [\log p(x, z; \theta)]}{\partial \theta_{kd}} = 0",
        verify_update_under_prior,
        note=r"The expectation is over the responsibilities, not the prior of $z$; under the prior every component would get the "
        r"mean of all the data.",
    ),
    Claim(
        "P4.10a",
        "The update.",
        rf"\theta_{{kd}} = {UPDATE}",
        "holds if",
        verify_update,
        condition="$N_k > 0$",
        without=partial(verify_update, empty=True),
    ),
    Claim(
        "P4.10b",
        "The update.",
        UPDATE,
        "holds if",
        verify_update,
        condition="$N_k > 0$",
        without=partial(verify_update, empty=True),
        note=r"The left-hand side $\theta_{kd} =$ is lost; the sentence before it says that this is the update.",
    ),
]
