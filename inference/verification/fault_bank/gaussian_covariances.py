"""Gaussian components with full matrices: x_n | z_n = k ~ Normal(locs_k, covariances_k)."""

from __future__ import annotations

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.verification.fault_bank.entry import (
    Entry,
    replace_site,
    wrong_e_steps,
    wrong_reports,
    wrong_weights,
)
from mixproof.inference.verification.subject import Subject

Params = dict[str, Tensor]

X = torch.tensor(
    [
        [-1.32, 3.41, 0.52], [-0.57, 2.18, 1.13], [-2.11, 4.07, -0.24], [-1.04, 2.92, 0.87], [0.21, 3.63, 1.91],
        [2.43, -0.66, 3.08], [3.17, 0.94, 2.11], [2.08, 0.31, 4.19], [3.94, -1.45, 2.73], [1.36, 0.12, 3.37],
        [4.71, 5.22, -2.16], [6.29, 6.83, -1.08], [5.58, 4.36, -3.41], [7.02, 5.91, -0.77], [5.13, 6.04, -1.95],
        [0.94, 1.27, 0.68], [3.28, 3.55, 1.44], [4.02, 2.61, -0.39],
    ],
    dtype=torch.float64,
)  # fmt: skip
PARAMS = {
    "weights": torch.tensor([0.42, 0.33, 0.25], dtype=torch.float64),
    "locs": torch.tensor([[-0.8, 3.1, 0.7], [2.6, -0.2, 3.2], [5.7, 5.4, -1.6]], dtype=torch.float64),
    "covariances": torch.tensor(
        [
            [[1.1, -0.4, 0.3], [-0.4, 0.8, 0.1], [0.3, 0.1, 0.9]],
            [[1.4, 0.2, -0.5], [0.2, 1.0, 0.3], [-0.5, 0.3, 1.2]],
            [[0.9, 0.5, 0.4], [0.5, 1.3, 0.2], [0.4, 0.2, 1.6]],
        ],
        dtype=torch.float64,
    ),
}


def model(x: Tensor) -> None:
    """Draw each row of x (N, D) from its component; K and D follow from the parameters."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    locs = pyro.param("locs", PARAMS["locs"])
    covariances = pyro.param("covariances", PARAMS["covariances"], constraint=constraints.positive_definite)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.MultivariateNormal(locs[z], covariances[z]), obs=x)


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), (N, K)."""
    centred = x[:, None] - params["locs"]
    distances = torch.einsum("nkd,kde,nke->nk", centred, params["covariances"].inverse(), centred)
    constants = params["covariances"].logdet() + x.shape[1] * math.log(2 * math.pi)
    return params["weights"].log() - (constants + distances) / 2


def e_step(params: Params, x: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K)."""
    return log_joint(params, x).softmax(1)


def scatter(resp: Tensor, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the sum of resp_nk (x_n - left_k)(x_n - right_k)^T over the rows, (K, D, D)."""
    return torch.einsum("nk,nkd,nke->kde", resp, x[:, None] - left, x[:, None] - right)


def m_step(resp: Tensor, x: Tensor) -> Params:
    """Return the soft shares, the weighted means and the weighted covariances about them."""
    counts = resp.sum(0)
    locs = resp.T @ x / counts[:, None]
    return {"weights": counts / len(x), "locs": locs, "covariances": scatter(resp, x, locs, locs) / _per(counts)}


def log_likelihood(params: Params, x: Tensor) -> Tensor:
    """Return log p(x), summed over the rows."""
    return log_joint(params, x).logsumexp(1).sum()


def _per(counts: Tensor) -> Tensor:
    return counts[:, None, None]


def e_step_by_cholesky(params: Params, x: Tensor) -> Tensor:
    """Return the same by a triangular solve; the determinant is the product of the diagonal."""
    factor = torch.linalg.cholesky(params["covariances"])
    white = torch.linalg.solve_triangular(factor, (x[:, None] - params["locs"]).permute(1, 2, 0), upper=False)
    log_roots = factor.diagonal(dim1=1, dim2=2).log().sum(1)
    return (params["weights"].log() - log_roots - white.square().sum(1).T / 2).softmax(1)


def e_step_by_products(params: Params, x: Tensor) -> Tensor:
    """Return the same with the density as it is printed in textbooks, row by row."""
    densities = torch.stack(
        [
            weight * torch.exp(-((x - loc) @ covariance.inverse() * (x - loc)).sum(1) / 2) / covariance.det().sqrt()
            for weight, loc, covariance in zip(*params.values(), strict=True)
        ],
        1,
    )
    return densities / densities.sum(1, keepdim=True)


def m_step_by_moments(resp: Tensor, x: Tensor) -> Params:
    """Return the same through E[x x^T] - E[x] E[x]^T."""
    shares = (resp / resp.sum(0)).T
    locs = shares @ x
    second = (shares[:, :, None] * x).transpose(1, 2) @ x
    return {"weights": resp.mean(0), "locs": locs, "covariances": second - locs[:, :, None] * locs[:, None]}


def m_step_by_numpy(resp: Tensor, x: Tensor) -> Params:
    """Return the covariances from ``torch.cov`` with importance weights and no correction."""
    covariances = [torch.cov(x.T, correction=0, aweights=column) for column in resp.T]
    return {**m_step(resp, x), "covariances": torch.stack(covariances)}


def m_step_with_one_old_factor(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return the covariances as E[(x - new)(x - old)^T]: the right ones, because E[x - new] = 0."""
    right = m_step(resp, x)
    return {**right, "covariances": scatter(resp, x, right["locs"], params["locs"]) / _per(resp.sum(0))}


def about_the_old_means(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return a conditional maximisation: the covariances at the old means, then the means (Meng and Rubin 1993)."""
    covariances = scatter(resp, x, params["locs"], params["locs"]) / _per(resp.sum(0))
    return {**m_step(resp, x), "covariances": covariances}


def sequence_by_sequence(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return the pooled scatter of two halves of the rows, each about its own mean: too small."""
    halves = [(resp[rows], x[rows]) for rows in (slice(None, len(x) // 2), slice(len(x) // 2, None))]
    means = [r.T @ part / r.sum(0)[:, None] for r, part in halves]
    pooled = sum(scatter(r, part, mean, mean) for (r, part), mean in zip(halves, means, strict=True))
    return pooled / _per(resp.sum(0))


def with_covariances(change) -> Subject:  # type: ignore[no-untyped-def]
    """Return the subject with an M-step that changes the covariances alone: ``change(right, resp, x)``."""
    return replace_site(SUBJECT, "covariances", change)


def one_feature(subject: Subject) -> Subject:
    """Return the subject with its first feature alone."""
    covariances = PARAMS["covariances"][:, :1, :1]
    params = {"weights": PARAMS["weights"], "locs": PARAMS["locs"][:, :1], "covariances": covariances}
    return replace(subject, params=params, data=(X[:, :1],))


def diagonal(matrices: Tensor) -> Tensor:
    """Return the matrices without what is off the diagonal."""
    return matrices.diagonal(dim1=-2, dim2=-1).diag_embed()


def white_by_the_wrong_triangle(params: Params, x: Tensor) -> Tensor:
    """Return log joint with the Cholesky factor transposed in the quadratic form."""
    factor = torch.linalg.cholesky(params["covariances"]).transpose(1, 2)
    white = torch.linalg.solve_triangular(factor, (x[:, None] - params["locs"]).permute(1, 2, 0), upper=True)
    return params["weights"].log() - params["covariances"].logdet() / 2 - white.square().sum(1).T / 2


def millionth_off_the_diagonal(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return the covariances with one pair of entries off by a millionth of itself."""
    off = torch.ones_like(right)
    off[1, 0, 1] += 1e-6
    off[1, 1, 0] += 1e-6
    return right * off


SUBJECT = Subject(model, PARAMS, (X,), e_step, m_step, log_likelihood)
TRANSPOSED = replace(SUBJECT, e_step=lambda p, x: white_by_the_wrong_triangle(p, x).softmax(1))
DIAGONAL_E = replace(SUBJECT, e_step=lambda p, x: e_step({**p, "covariances": diagonal(p["covariances"])}, x))
DIAGONAL_M = with_covariances(lambda right, r, x: diagonal(right))
ONE_TWO_PI = replace(
    SUBJECT, log_likelihood=lambda p, x: log_likelihood(p, x) + len(x) * (x.shape[1] - 1) * math.log(2 * math.pi) / 2
)
WRONG_COVARIANCES = {
    "covariances over n - 1": (
        "n - 1 for n",
        "pomegranate #633",
        lambda right, r, x: right * _per(r.sum(0) / (r.sum(0) - 1)),
    ),
    "covariances over N": ("N for n", "", lambda right, r, x: right * _per(r.mean(0))),
    "a floor on the diagonal": ("1e-06 is added", "", lambda right, r, x: right + 1e-6 * torch.eye(x.shape[1]).to(x)),
    "a floor before the division": (
        "",
        "scikit-learn PR #4109",
        lambda right, r, x: right + 1e-3 * torch.eye(x.shape[1]).to(x) / _per(r.sum(0)),
    ),
    "scatter within sequences only": ("", "hmmlearn #78", sequence_by_sequence),
    "about the overall mean": ("", "", lambda right, r, x: scatter(r, x, x.mean(0), x.mean(0)) / _per(r.sum(0))),
    "second moment": ("", "", lambda right, r, x: scatter(r, x, 0 * x[0], 0 * x[0]) / _per(r.sum(0))),
    "unweighted, about the overall mean": ("", "", lambda right, r, x: torch.cov(x.T, correction=0).expand_as(right)),
    "responsibilities squared": ("", "", lambda right, r, x: m_step(r**2, x)["covariances"]),
    "covariances twice too large": ("a factor of 2", "", lambda right, r, x: 2 * right),
    "precisions returned": ("", "", lambda right, r, x: right.inverse()),
    "covariances of the next component": ("components in another order", "", lambda right, r, x: right.roll(1, 0)),
    "one entry off by a millionth": ("", "", millionth_off_the_diagonal),
}  # fmt: skip
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("responsibilities by Cholesky factors", replace(SUBJECT, e_step=e_step_by_cholesky), "exact EM"),
    Entry("responsibilities by products", replace(SUBJECT, e_step=e_step_by_products), "exact EM"),
    Entry("covariances by moments", replace(SUBJECT, m_step=m_step_by_moments), "exact EM"),
    Entry("covariances by a library", replace(SUBJECT, m_step=m_step_by_numpy), "exact EM"),
    Entry("one factor about the old mean", replace(SUBJECT, m_step=m_step_with_one_old_factor), "exact EM"),
    Entry("transposed, which changes nothing", with_covariances(lambda right, r, x: right.mT), "exact EM"),
    Entry("covariances about the old means", replace(SUBJECT, m_step=about_the_old_means), "generalised EM"),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_weights(SUBJECT),
    *wrong_reports(SUBJECT, log_joint),
    Entry("Cholesky factor transposed", TRANSPOSED, "wrong E-step", blind=one_feature(TRANSPOSED)),
    Entry("E-step without off-diagonals", DIAGONAL_E, "wrong E-step", blind=one_feature(DIAGONAL_E)),
    Entry(
        "log-determinant lost",
        replace(SUBJECT, e_step=lambda p, x: (log_joint(p, x) + p["covariances"].logdet() / 2).softmax(1)),
        "wrong E-step",
    ),
    Entry(
        "determinant without its square root",
        replace(SUBJECT, e_step=lambda p, x: (log_joint(p, x) - p["covariances"].logdet() / 2).softmax(1)),
        "wrong E-step",
    ),
    Entry(
        "parenthesis closed too early",
        replace(SUBJECT, e_step=lambda p, x: (2 * log_joint(p, x) - p["weights"].log()
                                              + p["covariances"].logdet() / 2).softmax(1)),
        "wrong E-step",
        source="gmm-torch #31",
    ),
    Entry(
        "precisions used as covariances",
        replace(SUBJECT, e_step=lambda p, x: e_step({**p, "covariances": p["covariances"].inverse()}, x)),
        "wrong E-step",
    ),
    Entry("one 2 pi for all features in the report", ONE_TWO_PI, "wrong report", hint="free of the parameters",
          blind=one_feature(ONE_TWO_PI)),
    Entry("off-diagonals dropped", DIAGONAL_M, "wrong M-step", ("covariances",), blind=one_feature(DIAGONAL_M)),
    *(
        Entry(name, with_covariances(change), "wrong M-step", ("covariances",), hint, source)
        for name, (hint, source, change) in WRONG_COVARIANCES.items()
    ),
)  # fmt: skip
