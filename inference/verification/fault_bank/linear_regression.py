"""Mixture of linear regressions: y_n | z_n = k ~ N(coefs_k' u_n, scales_k^2), given covariates u_n.

The scales are standard deviations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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

Y = torch.tensor(
    [1.42, 2.95, 3.31, 0.18, 4.77, 2.09, 5.12, 2.48, -0.31, -1.94, 0.87, -2.66,
     -0.52, -3.41, 1.13, 7.86, 6.31, 8.92, 4.25, 7.14, 5.58, 9.47, 3.03, 0.64],
    dtype=torch.float64,
)  # fmt: skip
SLOPES = [-0.92, 0.31, 0.75, -1.63, 1.58, -0.24, 1.91, 0.12, -0.67, 0.83, -1.25, 1.37,
          -0.38, 1.76, -1.84, 0.45, -0.51, 1.12, -1.47, 0.22, -0.88, 1.66, 0.58, -0.15]  # fmt: skip
U = torch.stack([torch.ones(24), torch.tensor(SLOPES), torch.tensor(SLOPES).mul(5.3).cos()], 1).double()
PARAMS = {
    "weights": torch.tensor([0.37, 0.33, 0.3], dtype=torch.float64),
    "coefs": torch.tensor([[2.4, 1.3, 0.4], [-1.1, -1.2, 0.3], [6.3, 1.5, -0.6]], dtype=torch.float64),
    "scales": torch.tensor([0.8, 0.7, 1.1], dtype=torch.float64),
}
SPREAD = 2.7  # of the prior: coefs_kp ~ N(0, (SPREAD scales_k)^2)


def model(y: Tensor, u: Tensor) -> None:
    """Draw responses y (N,) at covariates u (N, P); K and P follow from the parameters."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    coefs = pyro.param("coefs", PARAMS["coefs"])
    scales = pyro.param("scales", PARAMS["scales"], constraint=constraints.positive)
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal((coefs[z] * u).sum(-1), scales[z]), obs=y)


def model_with_prior(y: Tensor, u: Tensor) -> None:
    """Draw coefficients whose spread is in units of the scales, then the responses."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    scales = pyro.param("scales", PARAMS["scales"], constraint=constraints.positive)
    coefs = pyro.sample("coefs", dist.Normal(0.0, SPREAD * scales[:, None]).expand([3, 3]).to_event(2))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal((coefs[z] * u).sum(-1), scales[z]), obs=y)


def residuals(coefs: Tensor, y: Tensor, u: Tensor) -> Tensor:
    """Return y_n - coefs_k' u_n, (N, K)."""
    return y[:, None] - u @ coefs.T


def log_joint(params: Params, y: Tensor, u: Tensor) -> Tensor:
    """Return log p(y_n, z_n = k | u_n), (N, K)."""
    scales = params["scales"]
    densities = -(residuals(params["coefs"], y, u) / scales).square() / 2 - scales.log() - math.log(2 * math.pi) / 2
    return params["weights"].log() + densities


def e_step(params: Params, y: Tensor, u: Tensor) -> Tensor:
    """Return p(z_n = k | y_n, u_n), (N, K)."""
    return log_joint(params, y, u).softmax(1)


def least_squares(resp: Tensor, y: Tensor, u: Tensor, ridge: float = 0.0) -> Tensor:
    """Return (U' R_k U + ridge I)^-1 U' R_k y, (K, P)."""
    gram = torch.einsum("nk,np,nq->kpq", resp, u, u) + ridge * torch.eye(u.shape[1]).to(u)
    return torch.linalg.solve(gram, torch.einsum("nk,np,n->kp", resp, u, y))


def variances(resp: Tensor, coefs: Tensor, y: Tensor, u: Tensor) -> Tensor:
    """Return the weighted means of the squared residuals, (K,)."""
    return (resp * residuals(coefs, y, u).square()).sum(0) / resp.sum(0)


def m_step(resp: Tensor, y: Tensor, u: Tensor) -> Params:
    """Return the soft shares, weighted least squares, and the roots of the weighted mean squared residuals."""
    coefs = least_squares(resp, y, u)
    return {"weights": resp.mean(0), "coefs": coefs, "scales": variances(resp, coefs, y, u).sqrt()}


def log_likelihood(params: Params, y: Tensor, u: Tensor) -> Tensor:
    """Return log p(y | u), summed over the rows."""
    return log_joint(params, y, u).logsumexp(1).sum()


def e_step_by_products(params: Params, y: Tensor, u: Tensor) -> Tensor:
    """Return the responsibilities from the densities, without the common root of 2 pi."""
    precisions = params["scales"] ** -2
    densities = precisions.sqrt() * (-precisions * residuals(params["coefs"], y, u) ** 2 / 2).exp()
    joint = params["weights"] * densities
    return joint / joint.sum(1, keepdim=True)


def m_step_by_rescaled_rows(resp: Tensor, y: Tensor, u: Tensor) -> Params:
    """Return the same by least squares of rows times the root of their weight; y'Ry less what is explained."""
    roots = resp.sqrt()
    coefs = torch.stack([torch.linalg.lstsq(root[:, None] * u, root * y).solution for root in roots.T])
    explained = torch.einsum("kp,nk,np,n->k", coefs, resp, u, y)
    return {
        "weights": resp.mean(0),
        "coefs": coefs,
        "scales": ((resp.T @ y.square() - explained) / resp.sum(0)).sqrt(),
    }


def about_the_old_coefs(resp: Tensor, y: Tensor, u: Tensor, *, params: Params) -> Params:
    """Return scales at the old coefficients, then new coefficients: each raises Q, as in ECM."""
    return {**m_step(resp, y, u), "scales": variances(resp, params["coefs"], y, u).sqrt()}


def m_step_with_prior(
    resp: Tensor, y: Tensor, u: Tensor, ridge: float = SPREAD**-2, penalty: float = SPREAD**-2, rows: float = 3.0
) -> Params:
    """Return ridge regression; each of the P prior terms counts as one more row for the scale."""
    coefs = least_squares(resp, y, u, ridge)
    total = (resp * residuals(coefs, y, u).square()).sum(0) + penalty * coefs.square().sum(1)
    return {"weights": resp.mean(0), "coefs": coefs, "scales": (total / (resp.sum(0) + rows)).sqrt()}


def by_covariate(params: Params, y: Tensor, u: Tensor) -> Tensor:
    """Return responsibilities as if each covariate had a regression of its own."""
    gaps = (y[:, None, None] - u[:, None] * params["coefs"]) / params["scales"][:, None]
    return (params["weights"].log() - gaps.square().sum(2) / 2 - params["scales"].log()).softmax(1)


def each_alone(resp: Tensor, y: Tensor, u: Tensor) -> Tensor:
    """Return each coefficient by a regression on its covariate alone, the off-diagonals of U' R U dropped."""
    return torch.einsum("nk,np,n->kp", resp, u, y) / torch.einsum("nk,np->kp", resp, u.square())


SUBJECT = Subject(model, PARAMS, (Y, U), e_step, m_step, log_likelihood)
MAP = replace(SUBJECT, model=model_with_prior, m_step=m_step_with_prior)
ONE_COVARIATE = replace(SUBJECT, params={**PARAMS, "coefs": PARAMS["coefs"][:, :1]}, data=(Y, U[:, :1]))


def coefs_wrong(change: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Subject:
    """Return an M-step with other coefficients and the right scales about those."""

    def wrong(resp: Tensor, y: Tensor, u: Tensor) -> Params:
        coefs = change(resp, y, u)
        return {"weights": resp.mean(0), "coefs": coefs, "scales": variances(resp, coefs, y, u).sqrt()}

    return replace(SUBJECT, m_step=wrong)


WRONG_COEFS: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "unweighted least squares": ("", lambda r, y, u: least_squares(torch.ones_like(r), y, u)),
    "weights squared": ("", lambda r, y, u: least_squares(r.square(), y, u)),
    "roots of the weights": ("", lambda r, y, u: least_squares(r.sqrt(), y, u)),
    "hard assignments": (
        "",
        lambda r, y, u: least_squares((r == r.amax(1, keepdim=True)).to(r) + 1e-6, y, u),
    ),
    "ridge of a thousandth": ("", lambda r, y, u: least_squares(r, y, u, 1e-3)),
    "one coefficient off by a millionth": (
        "",
        lambda r, y, u: least_squares(r, y, u) * (1 + 1e-6 * torch.eye(3)[1].to(r)),
    ),
}
WRONG_SCALES: dict[str, tuple[str, str, Callable[..., Tensor]]] = {
    "variances for standard deviations": ("square of scales for scales", "", lambda right, r, y, u: right.square()),
    "precisions for standard deviations": ("", "", lambda right, r, y, u: right**-2),
    "variances over n - 1": (
        "n - 1 for n",
        "pomegranate #633",
        lambda right, r, y, u: right * (r.sum(0) / (r.sum(0) - 1)).sqrt(),
    ),
    "variances over n - P": ("", "", lambda right, r, y, u: right * (r.sum(0) / (r.sum(0) - 3)).sqrt()),
    "variances over N": ("N for n", "", lambda right, r, y, u: right * r.mean(0).sqrt()),
    "floor in the variances, over N": (
        "",
        "sklearn PR #4109",
        lambda right, r, y, u: (right.square() + 1e-3 / len(y)).sqrt(),
    ),
    "one scale for all components": (
        "",
        "",
        lambda right, r, y, u: (r.mean(0) @ right.square()).sqrt().expand_as(right),
    ),
    "mean absolute residuals": (
        "",
        "",
        lambda right, r, y, u: (r * residuals(least_squares(r, y, u), y, u).abs()).sum(0) / r.sum(0),
    ),
    "a millionth added": ("1e-06 is added", "", lambda right, r, y, u: right + 1e-6),
}
WRONG_MAP: dict[str, tuple[tuple[str, ...], Callable[[Tensor, Tensor, Tensor], Params]]] = {
    "prior twice in the coefficients": (("coefs",), lambda r, y, u: m_step_with_prior(r, y, u, ridge=2 * SPREAD**-2)),
    "prior's normaliser forgotten": (("scales",), lambda r, y, u: m_step_with_prior(r, y, u, rows=0.0)),
    "prior's squares forgotten": (("scales",), lambda r, y, u: m_step_with_prior(r, y, u, penalty=0.0)),
}
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("responsibilities by products", replace(SUBJECT, e_step=e_step_by_products), "exact EM"),
    Entry("rows times the root of their weight", replace(SUBJECT, m_step=m_step_by_rescaled_rows), "exact EM"),
    Entry("scales about the old coefficients", replace(SUBJECT, m_step=about_the_old_coefs), "generalised EM"),
    Entry("normal prior in units of the scales", MAP, "MAP-EM"),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_weights(SUBJECT),
    *wrong_reports(SUBJECT, log_joint),
    Entry(
        "scale taken for a variance",
        replace(SUBJECT, e_step=lambda p, y, u: e_step({**p, "scales": p["scales"].sqrt()}, y, u)),
        "wrong E-step",
    ),
    Entry(
        "variance for the scale",
        replace(SUBJECT, e_step=lambda p, y, u: e_step({**p, "scales": p["scales"].square()}, y, u)),
        "wrong E-step",
    ),
    Entry(
        "parenthesis that takes in too much",
        replace(SUBJECT, e_step=lambda p, y, u: (log_joint(p, y, u) + p["scales"].log() / 2).softmax(1)),
        "wrong E-step",
        source="gmm-torch #31",
    ),
    Entry(
        "one scale for all in the E-step",
        replace(SUBJECT, e_step=lambda p, y, u: e_step({**p, "scales": p["scales"].mean().expand(3)}, y, u)),
        "wrong E-step",
        source="nlmixr2est #912",
    ),
    Entry(
        "a factor for each covariate",
        replace(SUBJECT, e_step=by_covariate),
        "wrong E-step",
        source="StepMix #15",
        blind=replace(ONE_COVARIATE, e_step=by_covariate),
    ),
    *(
        Entry(name, coefs_wrong(change), "wrong M-step", ("coefs",), hint)
        for name, (hint, change) in WRONG_COEFS.items()
    ),
    Entry(
        "covariates one at a time",
        coefs_wrong(each_alone),
        "wrong M-step",
        ("coefs",),
        blind=replace(ONE_COVARIATE, m_step=coefs_wrong(each_alone).m_step),
    ),
    *(
        Entry(name, replace_site(SUBJECT, "scales", change), "wrong M-step", ("scales",), hint, source)
        for name, (hint, source, change) in WRONG_SCALES.items()
    ),
    *(Entry(name, replace(MAP, m_step=wrong), "wrong M-step", sites) for name, (sites, wrong) in WRONG_MAP.items()),
    Entry(
        "2 pi forgotten in the report",
        replace(SUBJECT, log_likelihood=lambda p, y, u: log_likelihood(p, y, u) + len(y) * math.log(2 * math.pi) / 2),
        "wrong report",
        hint="free of the parameters",
    ),
    Entry(
        "log likelihood of the responsibilities",
        replace(SUBJECT, log_likelihood=lambda p, y, u: e_step(p, y, u).sum(1).log().sum()),
        "wrong report",
        source="gaussian_mixture_models #2",
    ),
)
