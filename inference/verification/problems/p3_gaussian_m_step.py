"""Problem 3: the M-step of the Gaussian mixture."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, constraints

from mixproof.inference.verification.claim import Claim, Problem, all_of, both, misprinted
from mixproof.inference.verification.domain import positive, positive_definite, reals, simplex
from mixproof.inference.verification.gradient import verify_gradient
from mixproof.inference.verification.identity import verify_identity
from mixproof.inference.verification.maximiser import verify_maximiser
from mixproof.inference.verification.problems.p2_gaussian_e_step import MIXTURE, enumerated
from mixproof.inference.verification.report import Report

PROBLEM = Problem("P3", "M-step of the Gaussian mixture", "Derive the M-step update for the Gaussian mixture model.")

GAMMA = simplex(4, 3)  # of 4 points over 3 components; they need not be those of any E-step
COUNTS = positive(3)
CENTRE, MATRIX, ROWS, MEMBERSHIP = reals(2), reals(2, 2), reals(5, 2), positive(5)  # a matrix need not be symmetric


def expected_log_joint(gamma: Tensor, weights: Tensor, locs: Tensor, covariances: Tensor, x: Tensor) -> Tensor:
    """Return the expectation of log p(X, Z) over all K^N assignments Z drawn from gamma, term by term."""
    table = enumerated(weights, locs, covariances, x)
    rows = torch.arange(len(x))
    total = table.new_zeros(())
    for labels in product(range(len(weights)), repeat=len(x)):
        total = total + gamma[rows, list(labels)].prod() * table[rows, list(labels)].sum()
    return total


def double_sum(gamma: Tensor, weights: Tensor, locs: Tensor, covariances: Tensor, x: Tensor) -> Tensor:
    return (gamma * enumerated(weights, locs, covariances, x)).sum()


def l_x(gamma: Tensor, locs: Tensor, covariances: Tensor, x: Tensor) -> Tensor:
    """Return the part of the objective that depends on means and covariances, its terms written out."""
    terms = [gamma[:, k] * gaussian_terms(x, locs[k], covariances[k]) for k in range(len(locs))]
    return -torch.stack(terms).sum() / 2


def gaussian_terms(x: Tensor, loc: Tensor, matrix: Tensor) -> Tensor:
    """Return (x_i - mu)^T S^-1 (x_i - mu) + D log(2 pi) + log det S for a matrix that need not be symmetric; |det| for its log."""
    deviations = x - loc
    quadratic = (deviations @ torch.linalg.inv(matrix) * deviations).sum(-1)
    return quadratic + x.shape[-1] * math.log(2 * math.pi) + torch.linalg.slogdet(matrix).logabsdet


def l_k(loc: Tensor, matrix: Tensor, membership: Tensor, x: Tensor) -> Tensor:
    """Return the terms of L_x that hold one component's mean and covariance."""
    return -(membership * gaussian_terms(x, loc, matrix)).sum() / 2


def l_z(gamma: Tensor, weights: Tensor) -> Tensor:
    return (gamma * weights.log()).sum()


def both_parts(gamma: Tensor, weights: Tensor, locs: Tensor, covariances: Tensor, x: Tensor) -> Tensor:
    return l_x(gamma, locs, covariances, x) + l_z(gamma, weights)


def printed_l_x_b(gamma: Tensor, locs: Tensor, covariances: Tensor, x: Tensor) -> Tensor:
    """Return transcription b's line for component 0: the free index k has no sum and the first factor lost its point."""
    inverse = torch.linalg.inv(covariances[0])
    quadratic = (x - locs[0]) @ inverse @ locs[0]
    constant = x.shape[-1] * math.log(2 * math.pi) + torch.logdet(covariances[0])
    return -(gamma[:, 0] * (quadratic + constant)).sum() / 2


def lagrangian(weights: Tensor, multiplier: Tensor, counts: Tensor) -> Tensor:
    return (counts * weights.log()).sum() + multiplier * (1 - weights.sum())


def lagrangian_b(weights: Tensor, multiplier: Tensor, counts: Tensor) -> Tensor:
    return (counts * weights.log()).sum() + multiplier * (weights.sum() - 1)


def dual(multiplier: Tensor, counts: Tensor) -> Tensor:
    return (counts * (counts / multiplier).log()).sum() + multiplier - counts.sum()


def slope_in_loc(loc: Tensor, matrix: Tensor, membership: Tensor, x: Tensor) -> Tensor:
    inverse = torch.linalg.inv(matrix)
    return -(membership[:, None] * (-((x - loc) @ (inverse + inverse.mT).mT))).sum(0) / 2


def slope_in_loc_b(loc: Tensor, matrix: Tensor, membership: Tensor, x: Tensor) -> Tensor:
    inverse = torch.linalg.inv(matrix)
    return -(membership[:, None] * (-((x - loc) @ (inverse.mT + inverse.mT).mT))).sum(0) / 2


def symmetric_slope_in_loc(loc: Tensor, matrix: Tensor, membership: Tensor, x: Tensor) -> Tensor:
    return (membership[:, None] * ((x - loc) @ torch.linalg.inv(matrix).mT)).sum(0)


def slope_in_covariance(matrix: Tensor, loc: Tensor, membership: Tensor, x: Tensor) -> Tensor:
    transposed = torch.linalg.inv(matrix).mT
    terms = [
        r * (-transposed @ torch.outer(d, d) @ transposed + transposed)
        for r, d in zip(membership, x - loc, strict=True)
    ]
    return -torch.stack(terms).sum(0) / 2


def slope_in_covariance_b(matrix: Tensor, loc: Tensor, membership: Tensor, x: Tensor) -> Tensor:
    transposed = torch.linalg.inv(matrix).mT
    terms = [r * (transposed @ torch.outer(d, d) + transposed) for r, d in zip(membership, x - loc, strict=True)]
    return -torch.stack(terms).sum(0) / 2


def factored_slope_in_covariance(matrix: Tensor, loc: Tensor, membership: Tensor, x: Tensor) -> Tensor:
    transposed = torch.linalg.inv(matrix).mT
    scatter = scatter_about(loc, membership, x)
    return -(membership.sum() * torch.eye(len(loc), dtype=x.dtype) - transposed @ scatter) @ transposed / 2


def scatter_about(loc: Tensor, membership: Tensor, x: Tensor) -> Tensor:
    return (membership[:, None] * (x - loc)).mT @ (x - loc)


def new_locs(gamma: Tensor, x: Tensor) -> Tensor:
    return (gamma.mT @ x) / gamma.sum(0)[:, None]


def new_covariances(gamma: Tensor, x: Tensor, locs: Tensor) -> Tensor:
    scatters = [scatter_about(loc, gamma[:, k], x) / gamma[:, k].sum() for k, loc in enumerate(locs)]
    return torch.stack(scatters)


def instance(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random responsibilities (8, 3), rows (8, 2) and means (3, 2) that are not those of the M-step."""
    generator = torch.Generator().manual_seed(seed)
    return simplex(8, 3)(generator), reals(8, 2)(generator), reals(3, 2)(generator)


def verify_weights(*, seed: int) -> Report:
    gamma, _, _ = instance(seed)
    claimed = gamma.sum(0) / len(gamma)
    return verify_maximiser(claimed, partial(l_z, gamma), constraint=constraints.simplex, seed=seed)


def verify_stationary_weights(*, sign: int, seed: int) -> Report:
    """Check that N_k / lambda maximises the Lagrangian over positive weights, for a multiplier of a sign."""
    generator = torch.Generator().manual_seed(seed)
    counts, multiplier = COUNTS(generator), sign * positive()(generator)
    return verify_maximiser(
        counts / multiplier,
        lambda weights: lagrangian(weights, multiplier, counts),
        constraint=constraints.independent(constraints.positive, 1),
        seed=seed,
    )


def verify_multiplier(*, seed: int) -> Report:
    counts = COUNTS(torch.Generator().manual_seed(seed))
    return verify_maximiser(counts.sum(), lambda m: -dual(m, counts), constraint=constraints.positive, seed=seed)


def verify_locs(*, empty: bool = False, seed: int) -> Report:
    """Check the means as maximisers; a component may be left without any responsibility."""
    gamma, x, _ = instance(seed)
    if empty:
        gamma = torch.nn.functional.pad(simplex(8, 2)(torch.Generator().manual_seed(seed)), (1, 0))
    covariances = positive_definite(3, 2, 2)(torch.Generator().manual_seed(seed))
    return verify_maximiser(new_locs(gamma, x), lambda locs: l_x(gamma, locs, covariances, x), seed=seed)


def verify_locs_and_covariances(*, about_new_locs: bool, seed: int) -> Report:
    gamma, x, old_locs = instance(seed)
    locs = new_locs(gamma, x)
    covariances = new_covariances(gamma, x, locs if about_new_locs else old_locs)
    return verify_maximiser(
        (locs, covariances),
        lambda m, s: (gamma * MultivariateNormal(m, s).log_prob(x[:, None])).sum(),
        constraint=(constraints.real, constraints.positive_definite),
        seed=seed,
    )


SPLIT = r"\sum_{i=1}^N \sum_{k=1}^K \gamma_t(\mathbf{z}_i = k)"
GIVEN = r"\boldsymbol{\pi}, \boldsymbol{\mu}, \boldsymbol{\Sigma}"
LIKELIHOOD = r"\log p(\mathbf{x}_i \mid \mathbf{z}_i = k, \boldsymbol{\mu}, \boldsymbol{\Sigma})"
QUADRATIC = r"(\mathbf{x}_i - \boldsymbol{\mu}_k)^T \boldsymbol{\Sigma}_k^{-1} (\mathbf{x}_i - \boldsymbol{\mu}_k)"
CONSTANT = r"D \log(2\pi) + \log\det\boldsymbol{\Sigma}_k"
OUTER = r"(\mathbf{x}_i - \boldsymbol{\mu}_k)(\mathbf{x}_i - \boldsymbol{\mu}_k)^T"
D_LOC = r"\frac{\partial \mathcal{L}_{\mathbf{x}}}{\partial \boldsymbol{\mu}_k}"
D_COV = r"\frac{\partial \mathcal{L}_{\mathbf{x}}}{\partial \boldsymbol{\Sigma}_k}"
SUM_GAMMA = r"\sum_{i=1}^N \gamma_t(z_i = k)"

POSITIVE_MULTIPLIER = r"$\lambda > 0$ and every $N_k > 0$"
NOT_EMPTY = "$N_k > 0$"
FULL_RANK = "the scatter has full rank"
ON_A_LINE = torch.tensor([[-2.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], dtype=torch.float64)

ROOT_IN_LOC = partial(
    verify_identity,
    lambda s, r, x: r.sum() * torch.linalg.inv(s) @ ((r @ x) / r.sum()),
    lambda s, r, x: (r @ x) @ torch.linalg.inv(s),
    positive_definite(2, 2),
)
ROOT_IN_COVARIANCE = partial(
    verify_identity,
    lambda m, r, x: torch.linalg.inv(scatter_about(m, r, x) / r.sum()).mT @ scatter_about(m, r, x),
    lambda m, r, x: r.sum() * torch.eye(2, dtype=x.dtype),
)

DOUBLE_SUM = partial(verify_identity, double_sum, expected_log_joint, GAMMA, *MIXTURE, num_points=4)
ONLY_WEIGHTS = partial(
    verify_identity, lambda g, w, m, s, x: l_z(g, w), expected_log_joint, GAMMA, *MIXTURE, num_points=4
)
WRITTEN_L_X = partial(
    verify_identity,
    l_x,
    lambda g, m, s, x: double_sum(g, torch.ones(3, dtype=x.dtype) / 3, m, s, x) + len(x) * math.log(3),
    GAMMA,
    *MIXTURE[1:],
    num_points=8,
)
LAGRANGIAN_SLOPE = partial(verify_gradient, lambda w, m, n: n / w - m, lagrangian, simplex(3), positive(), COUNTS)
IN_COVARIANCE = (lambda s, m, r, x: l_k(m, s, r, x), MATRIX, CENTRE, MEMBERSHIP, ROWS)

CLAIMS = [
    *misprinted(
        Claim(
            "P3.1a",
            "The objective of the M-step is the expected log joint density.",
            rf"\mathcal{{L}} = \mathbb{{E}}_{{\mathbf{{Z}} \sim \gamma_t(\mathbf{{Z}})}} [\log p(\mathbf{{X}}, \mathbf{{Z}} \mid {GIVEN})]",
            "holds",
            DOUBLE_SUM,
        ),
        rf"\mathcal{{L}} = \mathbb{{E}}_{{z \sim \gamma_t(z)}} [\log p(z_i \mid {GIVEN})]",
        ONLY_WEIGHTS,
        note="The data and the other points are lost.",
    ),
    *misprinted(
        Claim(
            "P3.2a",
            "The expectation is a sum over points and components.",
            rf"\mathcal{{L}} = {SPLIT} \log p(\mathbf{{x}}_i, \mathbf{{z}}_i = k \mid {GIVEN})",
            "holds",
            DOUBLE_SUM,
        ),
        rf"\mathcal{{L}} = \sum_{{i=1}}^N \sum_{{k=1}}^K \gamma_t(z_i = k \mid {GIVEN}) \log p(z_i = k \mid \boldsymbol{{\pi}})",
        ONLY_WEIGHTS,
        note="The point is lost from the logarithm: what is left is only the part that depends on the weights.",
    ),
    Claim(
        "P3.3a",
        "The joint density is likelihood times prior.",
        rf"\mathcal{{L}} = {SPLIT} {LIKELIHOOD} \, p(\mathbf{{z}}_i = k \mid \boldsymbol{{\pi}})",
        "holds",
        partial(verify_identity, both_parts, expected_log_joint, GAMMA, *MIXTURE, num_points=4),
        note="The logarithm is of the product of both factors.",
    ),
    Claim(
        "P3.3b",
        "The joint density is likelihood times prior.",
        rf"\mathcal{{L}} = \underbrace{{\sum_{{i=1}}^N \sum_{{k=1}}^K \gamma_t(z_i = k \mid {GIVEN})}}_{{\mathcal{{L}}_x}} \log p(z_i = k "
        r"\mid \boldsymbol{\pi})",
        "illegible",
        note="The brace closes both sums before the logarithm, whose i and k are then free: the likelihood that stood between is lost.",
    ),
    *misprinted(
        Claim(
            "P3.4a",
            "The logarithm splits the objective in two.",
            rf"\mathcal{{L}} = \underbrace{{{SPLIT} {LIKELIHOOD}}}_{{\mathcal{{L}}_{{\mathbf{{x}}}}}} + \underbrace{{{SPLIT} \log "
            r"p(\mathbf{z}_i = k \mid \boldsymbol{\pi})}_{\mathcal{L}_{\mathbf{z}}}",
            "holds",
            partial(verify_identity, both_parts, double_sum, GAMMA, *MIXTURE, num_points=8),
        ),
        rf"\mathcal{{L}} = \underbrace{{\sum_{{i=1}}^N \sum_{{k=1}}^K \gamma_t(z_i = k \mid {GIVEN})}}_{{\mathcal{{L}}_x}} + "
        r"\underbrace{\sum_{i=1}^N \sum_{k=1}^K \gamma_t(z_i = k) \log p(z_i = k \mid \boldsymbol{\pi})}_{\mathcal{L}_z}",
        partial(verify_identity, lambda g, w, m, s, x: g.sum() + l_z(g, w), double_sum, GAMMA, *MIXTURE, num_points=8),
        note=r"The log likelihood behind the first sums is lost; they add up to $N$.",
    ),
    *both(
        Claim(
            "P3.5",
            "The weights maximise their part of the objective on the simplex.",
            r"\text{maximize } \mathcal{L}_{\mathbf{z}} \quad \text{subject to } \sum_{k=1}^K \pi_k - 1 = 0",
            "holds",
            verify_weights,
            note=r"That $\pi_k \geq 0$ need not be asked for: the logarithm forbids the rest. The maximiser found is that of P3.11.",
        )
    ),
    *both(
        Claim(
            "P3.6",
            "The sums over the points collect into cluster sizes.",
            rf"\mathcal{{L}}_{{\mathbf{{z}}}} = {SPLIT} \log p(\mathbf{{z}}_i = k \mid \boldsymbol{{\pi}}) = \sum_{{k=1}}^K N_k \log \pi_k",
            "holds",
            partial(verify_identity, lambda g, w: (g.sum(0) * w.log()).sum(), l_z, GAMMA, simplex(3)),
        )
    ),
    *misprinted(
        Claim(
            "P3.7a",
            "The Lagrangian, whose derivative the next line prints.",
            r"f(\boldsymbol{\pi}, \lambda) = \sum_{k=1}^K N_k \log \pi_k + \lambda \left(1 - \sum_{k=1}^K \pi_k\right)",
            "holds",
            LAGRANGIAN_SLOPE,
        ),
        r"f(\boldsymbol{\pi}, \lambda) = \sum_{k=1}^K N_k \log \pi_k + \lambda \left(\sum_{k=1}^K \pi_k - 1\right)",
        partial(verify_gradient, lambda w, m, n: n / w - m, lagrangian_b, simplex(3), positive(), COUNTS),
        note=r"With this sign the derivative is $N_k / \pi_k + \lambda$ and the multiplier $-N$; harmless to the end result.",
    ),
    *both(
        Claim(
            "P3.8",
            "Its maximum in the weights.",
            r"\frac{\partial f}{\partial \pi_k} = \frac{N_k}{\pi_k} - \lambda \stackrel{!}{=} 0 \Leftrightarrow \pi_k = "
            r"\frac{N_k}{\lambda}",
            "holds if",
            all_of(LAGRANGIAN_SLOPE, partial(verify_stationary_weights, sign=1)),
            condition=POSITIVE_MULTIPLIER,
            without=partial(verify_stationary_weights, sign=-1),
            note=r"For $\lambda \leq 0$ the Lagrangian grows without bound in the weights and has no maximum.",
        )
    ),
    *both(
        Claim(
            "P3.9",
            "The dual function.",
            r"g(\lambda) = \max_{\boldsymbol{\pi}} f(\boldsymbol{\pi}, \lambda) = f\left(\left(\frac{N_1}{\lambda}, \dots, "
            r"\frac{N_K}{\lambda}\right), \lambda\right) = \sum_{k=1}^K N_k \log \frac{N_k}{\lambda} + \lambda - N",
            "holds if",
            all_of(
                partial(verify_stationary_weights, sign=1),
                partial(verify_identity, dual, lambda m, n: lagrangian(n / m, m, n), positive(), COUNTS),
            ),
            condition=POSITIVE_MULTIPLIER,
            without=partial(verify_stationary_weights, sign=-1),
            note="As in P3.8. Checked are that the weights put in are the maximum over all positive ones, and the value there.",
        )
    ),
    *both(
        Claim(
            "P3.10",
            "The minimum of the dual.",
            r"\frac{\partial g}{\partial \lambda} = \sum_{k=1}^K N_k \frac{\lambda}{N_k} \left(-\frac{N_k}{\lambda^2}\right) + 1 = "
            r"1 - \frac{N}{\lambda} \stackrel{!}{=} 0 \Leftrightarrow \lambda = N",
            "holds",
            all_of(
                partial(verify_gradient, lambda m, n: (n * (m / n) * (-n / m**2)).sum() + 1, dual, positive(), COUNTS),
                partial(verify_gradient, lambda m, n: 1 - n.sum() / m, dual, positive(), COUNTS),
                verify_multiplier,
            ),
        )
    ),
    *both(
        Claim(
            "P3.11",
            "The new weights.",
            r"\pi_k^{(t+1)} = \frac{N_k}{N}",
            "holds",
            verify_weights,
        )
    ),
    *both(
        Claim(
            "P3.12",
            "The part of the objective with means and covariances.",
            rf"\mathcal{{L}}_{{\mathbf{{x}}}} = {SPLIT} \log(\mathcal{{N}}(\mathbf{{x}}_i \mid \boldsymbol{{\mu}}_k, "
            r"\boldsymbol{\Sigma}_k))",
            "holds",
            WRITTEN_L_X,
        )
    ),
    *misprinted(
        Claim(
            "P3.13a",
            "The Gaussian density put in.",
            rf"\mathcal{{L}}_{{\mathbf{{x}}}} = -\frac{{1}}{{2}} {SPLIT} \left({QUADRATIC} + {CONSTANT}\right)",
            "holds",
            WRITTEN_L_X,
        ),
        rf"\mathcal{{L}}_{{\mathbf{{x}}}} = -\frac{{1}}{{2}} {SUM_GAMMA} \left(\boldsymbol{{\mu}}_k^T \boldsymbol{{\Sigma}}_k^{{-1}} "
        rf"(\mathbf{{x}}_i - \boldsymbol{{\mu}}_k) + {CONSTANT}\right)",
        partial(verify_identity, printed_l_x_b, l_x, GAMMA, *MIXTURE[1:], num_points=8),
        note="The sum over the components and the point in the first factor of the quadratic form are lost.",
    ),
    *misprinted(
        Claim(
            "P3.14a",
            "The derivative with respect to a mean.",
            rf"{D_LOC} = -\frac{{1}}{{2}} {SUM_GAMMA} \left((-1) \cdot (\boldsymbol{{\Sigma}}_k^{{-1}} + \boldsymbol{{\Sigma}}_k^{{-T}}) "
            r"(\mathbf{x}_i - \boldsymbol{\mu}_k)\right)",
            "holds",
            partial(verify_gradient, slope_in_loc, l_k, CENTRE, MATRIX, MEMBERSHIP, ROWS),
            note="Checked with unsymmetric matrices, for which the two inverses differ.",
        ),
        rf"{D_LOC} = -\frac{{1}}{{2}} {SUM_GAMMA} \left((-1) \cdot (\boldsymbol{{\Sigma}}_k^{{-T}} + \boldsymbol{{\Sigma}}_k^{{-T}}) "
        r"(\mathbf{x}_i - \boldsymbol{\mu}_k)\right)",
        partial(verify_gradient, slope_in_loc_b, l_k, CENTRE, MATRIX, MEMBERSHIP, ROWS),
        note="The rule for a quadratic form holds both the matrix and its transpose; harmless, since a covariance is symmetric.",
    ),
    *both(
        Claim(
            "P3.15",
            "A covariance is symmetric, so both inverses are the same.",
            rf"{D_LOC} = {SUM_GAMMA} (\boldsymbol{{\Sigma}}_k^{{-1}} (\mathbf{{x}}_i - \boldsymbol{{\mu}}_k))",
            "holds",
            partial(verify_gradient, symmetric_slope_in_loc, l_k, CENTRE, positive_definite(2, 2), MEMBERSHIP, ROWS),
        )
    ),
    *both(
        Claim(
            "P3.16",
            "Its root.",
            rf"{D_LOC} = 0 \Leftrightarrow {SUM_GAMMA} \boldsymbol{{\Sigma}}_k^{{-1}} \mathbf{{x}}_i = N_k \boldsymbol{{\Sigma}}_k^{{-1}} "
            rf"\boldsymbol{{\mu}}_k \Leftrightarrow \boldsymbol{{\mu}}_k = \frac{{1}}{{N_k}} {SUM_GAMMA} \mathbf{{x}}_i",
            "holds if",
            all_of(
                partial(
                    verify_identity,
                    lambda m, s, r, x: (r @ x) @ torch.linalg.inv(s) - r.sum() * torch.linalg.inv(s) @ m,
                    symmetric_slope_in_loc,
                    CENTRE,
                    positive_definite(2, 2),
                    MEMBERSHIP,
                    ROWS,
                ),
                partial(ROOT_IN_LOC, MEMBERSHIP, ROWS),
            ),
            condition=NOT_EMPTY,
            without=partial(ROOT_IN_LOC, torch.zeros(5, dtype=torch.float64), ROWS),
            note="A component without responsibility has derivative 0 at every mean.",
        )
    ),
    *both(
        Claim(
            "P3.17",
            "The new means.",
            rf"\boldsymbol{{\mu}}_k^{{(t+1)}} = \frac{{1}}{{N_k}} {SUM_GAMMA} \mathbf{{x}}_i",
            "holds if",
            verify_locs,
            condition=NOT_EMPTY,
            without=partial(verify_locs, empty=True),
        )
    ),
    *misprinted(
        Claim(
            "P3.18a",
            "The derivative with respect to a covariance.",
            rf"{D_COV} = -\frac{{1}}{{2}} {SUM_GAMMA} \left[-\boldsymbol{{\Sigma}}_k^{{-T}} {OUTER} \boldsymbol{{\Sigma}}_k^{{-T}} + "
            r"\boldsymbol{\Sigma}_k^{-T}\right]",
            "holds",
            partial(verify_gradient, slope_in_covariance, *IN_COVARIANCE),
            note="Checked with unsymmetric matrices, all entries free.",
        ),
        rf"{D_COV} = -\frac{{1}}{{2}} {SUM_GAMMA} \left[\boldsymbol{{\Sigma}}_k^{{-T}} {OUTER} + \boldsymbol{{\Sigma}}_k^{{-T}}\right]",
        partial(verify_gradient, slope_in_covariance_b, *IN_COVARIANCE),
        note="The minus sign and the second inverse of the derivative of an inverse are lost; the next line has them again.",
    ),
    *both(
        Claim(
            "P3.19",
            "The last factor taken out.",
            rf"{D_COV} = -\frac{{1}}{{2}} \left(N_k I_D - {SUM_GAMMA} \left[\boldsymbol{{\Sigma}}_k^{{-T}} {OUTER}\right]\right) "
            r"\boldsymbol{\Sigma}_k^{-T}",
            "holds",
            partial(verify_gradient, factored_slope_in_covariance, *IN_COVARIANCE),
        )
    ),
    *both(
        Claim(
            "P3.20",
            "Its root.",
            rf"{D_COV} = 0 \Leftrightarrow N_k I_D = \boldsymbol{{\Sigma}}_k^{{-T}} {SUM_GAMMA} {OUTER}",
            "holds if",
            all_of(
                partial(
                    verify_identity,
                    lambda s, m, r, x: (
                        r.sum() * torch.eye(2, dtype=x.dtype) - torch.linalg.inv(s).mT @ scatter_about(m, r, x)
                    ),
                    lambda s, m, r, x: -2 * factored_slope_in_covariance(s, m, r, x) @ s.mT,
                    *IN_COVARIANCE[1:],
                ),
                partial(ROOT_IN_COVARIANCE, CENTRE, MEMBERSHIP, ROWS),
            ),
            condition=FULL_RANK,
            without=partial(ROOT_IN_COVARIANCE, torch.zeros(2, dtype=torch.float64), MEMBERSHIP, ON_A_LINE),
            note="The equivalence holds for every invertible covariance; without the condition no covariance satisfies either side.",
        )
    ),
    *both(
        Claim(
            "P3.21",
            "The new covariances.",
            rf"\boldsymbol{{\Sigma}}_k^{{(t+1)}} = \frac{{1}}{{N_k}} {SUM_GAMMA} {OUTER}",
            "holds if",
            partial(verify_locs_and_covariances, about_new_locs=True),
            condition=rf"$\boldsymbol{{\mu}}_k$ is the new mean $\boldsymbol{{\mu}}_k^{{(t+1)}}$ (and {FULL_RANK})",
            without=partial(verify_locs_and_covariances, about_new_locs=False),
            note=r"The right-hand side carries no superscript. About the old mean $\boldsymbol{\mu}_k^{(t)}$ it is not the maximiser.",
        )
    ),
    *both(
        Claim(
            "P3.22",
            "The gradient of a quadratic form.",
            r"\frac{\partial \mathbf{a}^T \mathbf{X} \mathbf{a}}{\partial \mathbf{a}} = (\mathbf{X} + \mathbf{X}^T) \mathbf{a}^T",
            "refuted as printed",
            partial(
                verify_gradient,
                lambda a, x: (x + x.mT) @ a.mT,
                lambda a, x: (a.mT @ x @ a).squeeze(),
                reals(3, 1),
                reals(3, 3),
            ),
            correction=r"\frac{\partial \mathbf{a}^T \mathbf{X} \mathbf{a}}{\partial \mathbf{a}} = (\mathbf{X} + \mathbf{X}^T) "
            r"\mathbf{a}",
            corrected=partial(
                verify_gradient,
                lambda a, x: (x + x.mT) @ a,
                lambda a, x: (a.mT @ x @ a).squeeze(),
                reals(3, 1),
                reals(3, 3),
            ),
            note="A matrix of D columns cannot be multiplied by a row; P3.14 uses the rule as corrected.",
        )
    ),
    *both(
        Claim(
            "P3.23",
            "The gradient of a bilinear form in an inverse.",
            r"\frac{\partial \mathbf{a}^T \mathbf{X}^{-1} \mathbf{b}}{\partial \mathbf{X}} = -\mathbf{X}^{-T} \mathbf{b} \mathbf{a}^T "
            r"\mathbf{X}^{-T}",
            "refuted as printed",
            partial(
                verify_gradient,
                lambda x, a, b: -torch.linalg.inv(x).mT @ torch.outer(b, a) @ torch.linalg.inv(x).mT,
                lambda x, a, b: a @ torch.linalg.inv(x) @ b,
                reals(3, 3),
                reals(3),
                reals(3),
            ),
            correction=r"\frac{\partial \mathbf{a}^T \mathbf{X}^{-1} \mathbf{b}}{\partial \mathbf{X}} = -\mathbf{X}^{-T} \mathbf{a} "
            r"\mathbf{b}^T \mathbf{X}^{-T}",
            corrected=partial(
                verify_gradient,
                lambda x, a, b: -torch.linalg.inv(x).mT @ torch.outer(a, b) @ torch.linalg.inv(x).mT,
                lambda x, a, b: a @ torch.linalg.inv(x) @ b,
                reals(3, 3),
                reals(3),
                reals(3),
            ),
            note=r"Harmless in P3.18, where $\mathbf{a} = \mathbf{b}$.",
        )
    ),
    *both(
        Claim(
            "P3.24",
            "The gradient of a log determinant.",
            r"\frac{\partial \log |\det \mathbf{X}|}{\partial \mathbf{X}} = \mathbf{X}^{-T}",
            "holds",
            partial(
                verify_gradient,
                lambda x: torch.linalg.inv(x).mT,
                lambda x: torch.linalg.slogdet(x).logabsdet,
                reals(3, 3),
            ),
        )
    ),
]
