"""Problem 6: EM for isotropic Gaussians of known variance becomes K-means as the variance goes to zero."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mixproof.inference.enumeration import log_joint
from mixproof.inference.lloyd import SQUARED_EUCLIDEAN, update
from mixproof.inference.nearest import assign
from mixproof.inference.verification.claim import Claim, Problem, both, misprinted
from mixproof.inference.verification.domain import positive, reals, simplex
from mixproof.inference.verification.identity import verify_identity
from mixproof.inference.verification.limit import verify_limit
from mixproof.inference.verification.report import Report
from mixproof.models.gaussian_isotropic import GaussianIsotropic

PROBLEM = Problem(
    "P6",
    "From EM to K-means",
    r"Consider a mixture of K isotropic Gaussians, all with the same known covariances $\boldsymbol{\Sigma}_k = \sigma^2 "
    r"\mathbf{I}$. Derive the EM algorithm for $\sigma^2 \to 0$, and show that it is equivalent to Lloyd's algorithm for K-means.",
)

ARGUMENTS = (simplex(3), reals(3, 2), positive(), reals(4, 2))
WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
CENTRES = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
NEAR_FIRST = torch.tensor([[-0.4, 0.3]], dtype=torch.float64)
TIED = torch.tensor([[0.0, 0.3]], dtype=torch.float64)  # as far from the first centre as from the second
ROWS = torch.tensor([[-1.3, 0.2], [-0.2, -0.4], [0.7, 0.9], [1.9, -0.5], [0.3, 3.0], [-0.8, 5.5]], dtype=torch.float64)


def squares(locs: Tensor, x: Tensor) -> Tensor:
    return (x[:, None] - locs).square().sum(-1)


def posterior(weights: Tensor, locs: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    """Return p(z_i = k | x_i), shape (N, K), by enumerating the Pyro program."""
    params = {"weights": weights, "locs": locs}
    model = partial(GaussianIsotropic(variance.item()).model, num_components=len(weights))
    return log_joint(model, params, x).rows.softmax(-1)


def densities(locs: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    covariance = variance * torch.eye(locs.shape[-1], dtype=x.dtype)
    return torch.distributions.MultivariateNormal(locs, covariance).log_prob(x[:, None]).exp()


def equation_1(weights: Tensor, locs: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    """The integral over z read as the sum over its K values."""
    joint = densities(locs, variance, x) * weights
    evidence = torch.stack([joint[:, k] for k in range(len(weights))]).sum(0)
    return joint / evidence[:, None]


def equation_1_lebesgue(weights: Tensor, locs: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    """The integral over z read with respect to length: K points have none."""
    return densities(locs, variance, x) * weights / torch.zeros(len(x), 1, dtype=x.dtype)


def equation_2(weights: Tensor, locs: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    weighted = weights * densities(locs, variance, x)
    return weighted / weighted.sum(-1, keepdim=True)


def equation_3(weights: Tensor, locs: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    terms = weights * torch.exp(-squares(locs, x) / (2 * variance))
    return terms / terms.sum(-1, keepdim=True)


def exponents(locs: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    """Return (-||x_i - mu_l||^2 + ||x_i - mu_k||^2) / (2 sigma^2), shape (N, K, L)."""
    table = squares(locs, x)
    return (-table[:, None, :] + table[:, :, None]) / (2 * variance)


def denominators(weights: Tensor, locs: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    """Return the denominator of equation 4 for each k, shape (N, K)."""
    return (weights.log() - weights.log()[:, None] + exponents(locs, variance, x)).exp().sum(-1)


def equation_4(weights: Tensor, locs: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    return 1 / denominators(weights, locs, variance, x)


def equation_4_b(weights: Tensor, locs: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    """The minus sign before the fraction applies to both distances."""
    table = squares(locs, x)
    exponent = -(table[:, None, :] + table[:, :, None]) / (2 * variance)
    return 1 / (weights / weights[:, None] * exponent.exp()).sum(-1)


def nearest_exponents(locs: Tensor, variance: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exponents (N, L) for the nearest centre k of each row, and where l = k."""
    nearest = squares(locs, x).argmin(-1)
    rows = exponents(locs, variance, x)[torch.arange(len(x)), nearest]
    return rows, torch.nn.functional.one_hot(nearest, len(locs)).bool()


def is_negative(locs: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    return (nearest_exponents(locs, variance, x)[0] < 0).to(x.dtype)


def signs(locs: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    """Return whether each exponent is at most 0, and whether it is 0, shape (2, N, L)."""
    rows, _ = nearest_exponents(locs, variance, x)
    return torch.stack([rows <= 0, rows == 0]).to(x.dtype)


def claimed_signs(locs: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    _, own = nearest_exponents(locs, variance, x)
    return torch.stack([torch.ones_like(own), own]).to(x.dtype)


def at_variance(function: Callable[..., Tensor], weights: Tensor, x: Tensor) -> Callable[[float], Tensor]:
    """Return a function of sigma as one of the variance at fixed weights, centres and rows."""
    return lambda sigma: function(weights, CENTRES, torch.tensor(sigma**2, dtype=x.dtype), x)


def em_step(x: Tensor, centres: Tensor) -> Callable[[float], Tensor]:
    """Return the locations after one EM step of the family, as a function of sigma."""

    def locs(sigma: float) -> Tensor:
        family = GaussianIsotropic(sigma**2)
        params = family.Params(WEIGHTS, centres)
        resp = family.log_joint(params, x).softmax(-1)
        return family.m_step(family.statistics(params, x, resp)).locs

    return locs


def lloyd_step(x: Tensor, centres: Tensor) -> Tensor:
    return update(x, assign(x, centres, SQUARED_EUCLIDEAN.power), centres, SQUARED_EUCLIDEAN)


def verify_em_becomes_lloyd(x: Tensor, *, seed: int) -> Report:
    return verify_limit(em_step(x, CENTRES), lloyd_step(x, CENTRES), seed=seed)


def one_hot_first(weights: Tensor, x: Tensor) -> Callable[[float], Tensor]:
    return at_variance(
        lambda w, m, v, x: GaussianIsotropic(v.item()).log_joint(GaussianIsotropic.Params(w, m), x).softmax(-1),
        weights,
        x,
    )


DISTANCE = r"\|\mathbf{x}_i - \boldsymbol{\mu}_{%s}\|^2"
DIFFERENCE = r"-\|\mathbf{x}_i - \boldsymbol{\mu}_l\|^2 + \|\mathbf{x}_i - \boldsymbol{\mu}_k\|^2"
RESPONSIBILITY = r"p(z_{ik} = 1 \mid \mathbf{x}_i, \boldsymbol{\theta})"
NUMERATOR = r"p(\mathbf{x}_i \mid z_{ik} = 1, \boldsymbol{\mu}_k, \boldsymbol{\Sigma}_k) \, p(z_{ik} = 1 \mid \pi_k)"
SECOND = (
    r"\frac{\pi_k \mathcal{N}(\mathbf{x}_i \mid \boldsymbol{\mu}_k, \boldsymbol{\Sigma}_k)}{\sum_{l=1}^K \pi_l "
    r"\mathcal{N}(\mathbf{x}_i \mid \boldsymbol{\mu}_l, \boldsymbol{\Sigma}_l)}"
)
THIRD = (
    r"\frac{\pi_k \exp\left(\frac{-\|\mathbf{x}_i - \boldsymbol{\mu}_k\|^2}{2\sigma^2}\right)}{\sum_l \pi_l "
    r"\exp\left(\frac{-\|\mathbf{x}_i - \boldsymbol{\mu}_l\|^2}{2\sigma^2}\right)}"
)
FOURTH = rf"\frac{{1}}{{\sum_l \frac{{\pi_l}}{{\pi_k}} \exp\left(\frac{{{DIFFERENCE}}}{{2\sigma^2}}\right)}}"
LOST_LEFT = (
    "The left-hand side and its equality sign are lost; the numbering says that the fraction continues equation 1."
)
UNIQUE = "the nearest centre is unique"

CHECK_2 = partial(verify_identity, equation_2, posterior, *ARGUMENTS, num_points=8)
CHECK_3 = partial(verify_identity, equation_3, posterior, *ARGUMENTS, num_points=8)
CHECK_4 = partial(verify_identity, equation_4, posterior, num_points=8)
CHECK_SIGNS = partial(verify_identity, claimed_signs, signs, reals(3, 2), positive(), reals(6, 2))
ONE_HOT = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
NO_SECOND_WEIGHT = torch.tensor([0.0, 0.3, 0.7], dtype=torch.float64)

CLAIMS = [
    Claim(
        "P6.1a",
        "Bayes' theorem for the responsibilities, equation 1.",
        rf"{RESPONSIBILITY} = \frac{{{NUMERATOR}}}{{\int p(\mathbf{{x}}_i \mid \mathbf{{z}}) p(\mathbf{{z}}) \, d\mathbf{{z}}}}",
        "holds if",
        partial(verify_identity, equation_1, posterior, *ARGUMENTS, num_points=8),
        condition=r"the integral over the discrete $\mathbf{z}$ is meant as the sum over its K values",
        without=partial(verify_identity, equation_1_lebesgue, posterior, *ARGUMENTS, num_points=8),
    ),
    Claim(
        "P6.1b",
        "Bayes' theorem for the responsibilities, equation 1.",
        NUMERATOR,
        "illegible",
        note="The left-hand side and the denominator are lost; what is left is no statement, and no fraction either.",
    ),
    Claim("P6.2a", "Equation 2.", rf"{RESPONSIBILITY} = {SECOND}", "holds", CHECK_2),
    Claim("P6.2b", "Equation 2.", SECOND, "holds", CHECK_2, note=LOST_LEFT),
    Claim("P6.3a", "Equation 3: the normalisers cancel.", rf"{RESPONSIBILITY} = {THIRD}", "holds", CHECK_3),
    Claim("P6.3b", "Equation 3: the normalisers cancel.", THIRD, "holds", CHECK_3, note=LOST_LEFT),
    *misprinted(
        Claim(
            "P6.4a",
            "Equation 4: numerator and denominator divided by the numerator.",
            rf"{RESPONSIBILITY} = {FOURTH}",
            "holds if",
            partial(CHECK_4, *ARGUMENTS),
            condition=r"$\pi_k > 0$",
            without=partial(CHECK_4, NO_SECOND_WEIGHT, *ARGUMENTS[1:]),
        ),
        r"= \frac{1}{\sum_{l=1}^K \frac{\pi_l}{\pi_k} \exp\left(-\frac{\|\mathbf{x}_i - \boldsymbol{\mu}_l\|^2 + \|\mathbf{x}_i - "
        r"\boldsymbol{\mu}_k\|^2}{2\sigma^2}\right)}",
        partial(verify_identity, equation_4_b, posterior, *ARGUMENTS, num_points=8),
        note=r"Before the fraction, the minus sign also turns the second distance. Like P6.4a the correction holds if $\pi_k > 0$.",
    ),
    Claim(
        "P6.5a",
        "For the nearest centre k the exponents are not positive.",
        rf"\frac{{{DIFFERENCE}}}{{2\sigma^2}} < 0 \text{{ for all }} l \text{{, with equality if and only if }} k = l",
        "refuted as printed",
        partial(
            verify_identity,
            lambda m, v, x: torch.ones(len(x), len(m), dtype=x.dtype),
            is_negative,
            reals(3, 2),
            positive(),
            reals(6, 2),
        ),
        correction=rf"\frac{{{DIFFERENCE}}}{{2\sigma^2}} \leq 0 \text{{ for all }} l \text{{, with equality if and only if }} k = l",
        corrected=CHECK_SIGNS,
        note=r"At $l = k$ it is 0, as the words behind the formula say. Like P6.5b the correction needs a unique nearest centre.",
    ),
    Claim(
        "P6.5b",
        "For the nearest centre k the exponents are not positive.",
        rf"\frac{{{DIFFERENCE}}}{{2\sigma^2}} \leq 0 \text{{ for all }} l \text{{, with equality if and only if }} k = l",
        "holds if",
        CHECK_SIGNS,
        condition=UNIQUE,
        without=partial(verify_identity, claimed_signs, signs, CENTRES, positive(), TIED),
    ),
    *both(
        Claim(
            "P6.6",
            "For the nearest centre k the denominator of equation 4 converges to 1.",
            rf"\sum_l \frac{{\pi_l}}{{\pi_k}} \exp\left(\frac{{{DIFFERENCE}}}{{2\sigma^2}}\right) \to 1 \quad \text{{as }} \sigma \to 0",
            "holds if",
            partial(verify_limit, at_variance(lambda *a: denominators(*a)[0, 0], WEIGHTS, NEAR_FIRST), 1.0),
            condition=f"{UNIQUE} and its weight is positive",
            without=partial(verify_limit, at_variance(lambda *a: denominators(*a)[0, 0], WEIGHTS, TIED), 1.0),
            note=r"With a tie the limit is the sum of $\pi_l / \pi_k$ over the nearest centres.",
        )
    ),
    *both(
        Claim(
            "P6.7",
            "For another centre k, one exponent is positive and diverges.",
            rf"0 < \frac{{{DIFFERENCE}}}{{2\sigma^2}} \to \infty \quad \text{{as }} \sigma \to 0",
            "holds",
            partial(
                verify_limit,
                at_variance(lambda w, m, v, x: exponents(m, v, x)[0, 1, 0], WEIGHTS, NEAR_FIRST),
                torch.inf,
            ),
        )
    ),
    *both(
        Claim(
            "P6.8",
            "Then the denominator of equation 4 diverges.",
            rf"\sum_l \frac{{\pi_l}}{{\pi_k}} \exp\left(\frac{{{DIFFERENCE}}}{{2\sigma^2}}\right) \to \infty \quad \text{{as }} \sigma "
            r"\to 0",
            "holds if",
            partial(verify_limit, at_variance(lambda *a: denominators(*a)[0, 1], WEIGHTS, NEAR_FIRST), torch.inf),
            condition=r"a centre nearer than k has $\pi_l > 0$",
            without=partial(
                verify_limit, at_variance(lambda *a: denominators(*a)[0, 1], NO_SECOND_WEIGHT, NEAR_FIRST), torch.inf
            ),
            note="The sheet says that the weights are irrelevant: all but those that are 0.",
        )
    ),
    *both(
        Claim(
            "P6.9",
            "The responsibilities become a one-hot assignment to the nearest centre.",
            r"p(z_{ik} = 1 \mid \mathbf{x}_i, \boldsymbol{\theta}) \to \mathbb{I}[k = \arg\min_j \|\mathbf{x}_i - "
            r"\boldsymbol{\mu}_j\|^2]",
            "holds if",
            partial(verify_limit, one_hot_first(WEIGHTS, NEAR_FIRST), ONE_HOT),
            condition=f"{UNIQUE} and its weight is positive",
            without=partial(verify_limit, one_hot_first(WEIGHTS, TIED), ONE_HOT),
            note="With a tie the nearest centres share the point in the ratio of their weights. The sheet says this in words.",
        )
    ),
    *both(
        Claim(
            "P6.10",
            "The EM step becomes the step of Lloyd's algorithm.",
            r"\boldsymbol{\mu}_k^{(t+1)} \to \frac{1}{N_k} \sum_{i : z_{ik} = 1} \mathbf{x}_i \quad \text{as } \sigma \to 0",
            "holds if",
            partial(verify_em_becomes_lloyd, ROWS),
            condition="no point is tied, no cluster is empty and every weight is positive",
            without=partial(verify_em_becomes_lloyd, torch.cat([ROWS, TIED])),
            note="The sheet says this in words.",
        )
    ),
]
