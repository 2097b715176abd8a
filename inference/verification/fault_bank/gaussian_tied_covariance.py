"""Gaussian components that share one matrix: x_n | z_n = k ~ Normal(locs_k, covariance)."""

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
        [-1.32, 3.41], [-0.57, 2.18], [-2.11, 4.07], [-1.04, 2.92], [0.21, 3.63], [2.43, -0.66], [3.17, 0.94],
        [2.08, 0.31], [3.94, -1.45], [1.36, 0.12], [4.71, 5.22], [6.29, 6.83], [5.58, 4.36], [7.02, 5.91],
        [3.3, 2.7],
    ],
    dtype=torch.float64,
)  # fmt: skip
PARAMS = {
    "weights": torch.tensor([0.45, 0.35, 0.2], dtype=torch.float64),
    "locs": torch.tensor([[-0.8, 3.1], [2.6, -0.2], [5.7, 5.4]], dtype=torch.float64),
    "covariance": torch.tensor([[1.3, 0.4], [0.4, 0.9]], dtype=torch.float64),
}


def model(x: Tensor) -> None:
    """Draw each row of x (N, D) from its component; K and D follow from the parameters."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    locs = pyro.param("locs", PARAMS["locs"])
    covariance = pyro.param("covariance", PARAMS["covariance"], constraint=constraints.positive_definite)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.MultivariateNormal(locs[z], covariance), obs=x)


def distances(params: Params, x: Tensor) -> Tensor:
    """Return the squared Mahalanobis distances, (N, K)."""
    centred = x[:, None] - params["locs"]
    return torch.einsum("nkd,de,nke->nk", centred, params["covariance"].inverse(), centred)


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), (N, K)."""
    constant = params["covariance"].logdet() + x.shape[1] * math.log(2 * math.pi)
    return params["weights"].log() - (constant + distances(params, x)) / 2


def e_step(params: Params, x: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K)."""
    return log_joint(params, x).softmax(1)


def scatter(resp: Tensor, x: Tensor, locs: Tensor) -> Tensor:
    """Return the scatter about each component's mean, (K, D, D)."""
    return torch.einsum("nk,nkd,nke->kde", resp, x[:, None] - locs, x[:, None] - locs)


def m_step(resp: Tensor, x: Tensor) -> Params:
    """Return the soft shares, the weighted means, and the scatter within components over all rows."""
    locs = resp.T @ x / resp.sum(0)[:, None]
    return {"weights": resp.sum(0) / len(x), "locs": locs, "covariance": scatter(resp, x, locs).sum(0) / len(x)}


def log_likelihood(params: Params, x: Tensor) -> Tensor:
    """Return log p(x), summed over the rows."""
    return log_joint(params, x).logsumexp(1).sum()


def e_step_without_the_determinant(params: Params, x: Tensor) -> Tensor:
    """Return the responsibilities without the determinant: it is the same in all components and cancels."""
    return (params["weights"].log() - distances(params, x) / 2).softmax(1)


def e_step_by_linear_discriminants(params: Params, x: Tensor) -> Tensor:
    """Return the responsibilities from scores linear in x: the quadratic term cancels too."""
    slopes = torch.linalg.solve(params["covariance"], params["locs"].T)
    offsets = params["weights"].log() - (params["locs"] * slopes.T).sum(1) / 2
    return (x @ slopes + offsets).softmax(1)


def m_step_by_total_scatter(resp: Tensor, x: Tensor) -> Params:
    """Return the covariance as the total scatter less the scatter between the means."""
    locs = resp.T @ x / resp.sum(0)[:, None]
    between = torch.einsum("k,kd,ke->de", resp.sum(0), locs, locs)
    return {"weights": resp.mean(0), "locs": locs, "covariance": (x.T @ x - between) / len(x)}


def m_step_by_pooling(resp: Tensor, x: Tensor) -> Params:
    """Return the covariance as the mean of the components' own, weighted by their shares."""
    own = [torch.cov(x.T, correction=0, aweights=column) for column in resp.T]
    pooled = sum(share * matrix for share, matrix in zip(resp.mean(0), own, strict=True))
    return {**m_step(resp, x), "covariance": torch.as_tensor(pooled)}


def about_the_old_means(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return a conditional maximisation: the covariance at the old means, then the means (Meng and Rubin 1993)."""
    return {**m_step(resp, x), "covariance": scatter(resp, x, params["locs"]).sum(0) / len(x)}


def covariance_never_updated(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return the old covariance: it rises, and stops where the likelihood still has a slope."""
    return {**m_step(resp, x), "covariance": params["covariance"]}


def own_covariances(resp: Tensor, x: Tensor) -> Tensor:
    """Return each component's own covariance, (K, D, D)."""
    locs = resp.T @ x / resp.sum(0)[:, None]
    return scatter(resp, x, locs) / resp.sum(0)[:, None, None]


def identity(x: Tensor) -> Tensor:
    """Return the identity matrix (D, D)."""
    return torch.eye(x.shape[1], dtype=x.dtype)


def one_feature(subject: Subject) -> Subject:
    """Return the subject with its first feature alone."""
    covariance = PARAMS["covariance"][:1, :1]
    params = {"weights": PARAMS["weights"], "locs": PARAMS["locs"][:, :1], "covariance": covariance}
    return replace(subject, params=params, data=(X[:, :1],))


SUBJECT = Subject(model, PARAMS, (X,), e_step, m_step, log_likelihood)
DIAGONAL = replace_site(SUBJECT, "covariance", lambda right, r, x: right.diag().diag())
TRACE = replace_site(SUBJECT, "covariance", lambda right, r, x: right.trace() / x.shape[1] * identity(x))
WRONG_COVARIANCE = {
    "equal shares for unequal components": (
        "",
        "dynamax PR #133",
        lambda right, r, x: own_covariances(r, x).mean(0),
    ),
    "covariances summed, not averaged": ("", "dynamax PR #133", lambda right, r, x: own_covariances(r, x).sum(0)),
    "covariance of the last component": ("", "dynamax #34", lambda right, r, x: own_covariances(r, x)[-1]),
    "floor divided by the number of rows": (
        "",
        "scikit-learn PR #4109",
        lambda right, r, x: right + 1e-3 * identity(x) / len(x),
    ),
    "floor on the diagonal": ("1e-06 is added", "", lambda right, r, x: right + 1e-6 * identity(x)),
    "over N - K": ("", "", lambda right, r, x: right * len(x) / (len(x) - r.shape[1])),
    "over N - 1": ("n - 1 for n", "", lambda right, r, x: right * len(x) / (len(x) - 1)),
    "scatter between the means forgotten": ("", "", lambda right, r, x: torch.cov(x.T, correction=0)),
    "responsibilities squared": ("", "", lambda right, r, x: scatter(r**2, x, m_step(r, x)["locs"]).sum(0) / len(x)),
    "twice too large": ("a factor of 2", "", lambda right, r, x: 2 * right),
    "covariance off by a millionth": ("", "", lambda right, r, x: right * (1 + 1e-6)),
}
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("the determinant cancels", replace(SUBJECT, e_step=e_step_without_the_determinant), "exact EM"),
    Entry("linear discriminants", replace(SUBJECT, e_step=e_step_by_linear_discriminants), "exact EM"),
    Entry("total less between", replace(SUBJECT, m_step=m_step_by_total_scatter), "exact EM"),
    Entry("pooled covariances", replace(SUBJECT, m_step=m_step_by_pooling), "exact EM"),
    Entry("covariance about the old means", replace(SUBJECT, m_step=about_the_old_means), "generalised EM"),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_weights(SUBJECT),
    *wrong_reports(SUBJECT, log_joint),
    Entry(
        "half forgotten in the discriminants",
        replace(SUBJECT, e_step=lambda p, x: (p["weights"].log() - distances(p, x)).softmax(1)),
        "wrong E-step",
    ),
    Entry(
        "covariance used as precision",
        replace(SUBJECT, e_step=lambda p, x: e_step({**p, "covariance": p["covariance"].inverse()}, x)),
        "wrong E-step",
    ),
    Entry(
        "the determinant does not cancel in the report",
        replace(
            SUBJECT, log_likelihood=lambda p, x: log_likelihood(p, x) + len(x) * p["covariance"].logdet() / 2
        ),
        "wrong report",
    ),
    Entry("off-diagonals dropped", DIAGONAL, "wrong M-step", ("covariance",), blind=one_feature(DIAGONAL)),
    Entry("one variance for all features", TRACE, "wrong M-step", ("covariance",), blind=one_feature(TRACE)),
    Entry("covariance never updated", replace(SUBJECT, m_step=covariance_never_updated), "wrong M-step",
          ("covariance",)),
    *(
        Entry(name, replace_site(SUBJECT, "covariance", change), "wrong M-step", ("covariance",), hint, source)
        for name, (hint, source, change) in WRONG_COVARIANCE.items()
    ),
)  # fmt: skip
