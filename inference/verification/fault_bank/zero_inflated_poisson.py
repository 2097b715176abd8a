"""Zero-inflated counts: component 0 is a point mass at the row of zeros, the others are products of Poisson laws.

Under ``rates`` (K - 1, D), x_nd | z_n = k ~ Poisson(rates_(k-1)d) for k >= 1, and x_n = 0 given z_n = 0: log p(x_n |
z_n = 0) is minus infinity for any other row.
"""

from __future__ import annotations

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

X = torch.tensor(
    [
        [0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 1], [1, 0], [0, 2], [1, 3], [2, 1],
        [0, 0], [1, 2], [3, 2], [5, 1], [7, 0], [6, 2], [4, 1], [8, 3], [5, 0], [9, 2],
    ],
    dtype=torch.float64,
)  # fmt: skip
PARAMS = {
    "weights": torch.tensor([0.26, 0.39, 0.35], dtype=torch.float64),
    "rates": torch.tensor([[0.9, 1.4], [6.2, 1.1]], dtype=torch.float64),
}
SHAPE, RATE = 2.2, 0.7  # of the prior: rates_kd ~ Gamma(SHAPE, RATE)


def emission(z: Tensor, rates: Tensor) -> dist.TorchDistribution:
    """Return p(x_n | z_n), over rows: a point mass at 0 where z_n = 0."""
    poisson = dist.Poisson(torch.cat([torch.ones_like(rates[:1]), rates])[z])
    return dist.MaskedMixture((z > 0)[..., None], dist.Delta(torch.zeros(rates.shape[1])), poisson).to_event(1)


def model(x: Tensor) -> None:
    """Draw each row of counts x (N, D) from its component; K and D follow from the parameters."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    rates = pyro.param("rates", PARAMS["rates"], constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", emission(z, rates), obs=x)


def model_with_prior(x: Tensor) -> None:
    """Draw the two Poisson components' rates from a gamma law, then the rows."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    rates = pyro.sample("rates", dist.Gamma(SHAPE, RATE).expand([2, 2]).to_event(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", emission(z, rates), obs=x)


def log_density(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n | z_n = k), (N, K): minus infinity in column 0 for rows that are not zero."""
    structural = torch.where((x == 0).all(1, keepdim=True), 0.0, -torch.inf).to(x)
    rates = params["rates"]
    poisson = x @ rates.log().T - rates.sum(1) - (x + 1).lgamma().sum(1, keepdim=True)
    return torch.cat([structural, poisson], 1)


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), (N, K)."""
    return params["weights"].log() + log_density(params, x)


def finite_log_joint(params: Params, x: Tensor) -> Tensor:
    """Return the same with a large negative number for minus infinity, so that zero times it is zero."""
    return log_joint(params, x).clamp_min(-1e300)


def e_step(params: Params, x: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K)."""
    return log_joint(params, x).softmax(1)


def m_step(resp: Tensor, x: Tensor) -> Params:
    """Return the soft shares, and the weighted means of the Poisson components."""
    return {"weights": resp.mean(0), "rates": resp[:, 1:].T @ x / resp[:, 1:].sum(0)[:, None]}


def log_likelihood(params: Params, x: Tensor) -> Tensor:
    """Return log p(x), summed over the rows."""
    return log_joint(params, x).logsumexp(1).sum()


def e_step_by_cases(params: Params, x: Tensor) -> Tensor:
    """Return the responsibilities row by row: only a row of zeros can be structural."""
    resp = []
    for row in x:
        densities = params["weights"].clone()
        densities[1:] *= dist.Poisson(params["rates"]).log_prob(row).sum(1).exp()
        densities[0] *= float(not row.any())
        resp.append(densities / densities.sum())
    return torch.stack(resp)


def m_step_of_positive_rows(resp: Tensor, x: Tensor) -> Params:
    """Return the same rates, summing only rows that are not zero: the others add nothing to the totals."""
    positive = x.any(1)
    rates = torch.einsum("nk,nd->kd", resp[positive, 1:], x[positive]) / resp[:, 1:].sum(0)[:, None]
    return {"weights": resp.sum(0) / resp.sum(), "rates": rates}


def halfway(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return a step that goes half of the way in all rates, in which Q is concave."""
    right = m_step(resp, x)
    return {**right, "rates": (right["rates"] + params["rates"]) / 2}


def m_step_with_prior(resp: Tensor, x: Tensor, shape: float = SHAPE, rate: float = RATE) -> Params:
    """Return the mode of each rate's gamma posterior, (total + shape - 1) / (count + rate)."""
    totals, counts = resp[:, 1:].T @ x, resp[:, 1:].sum(0)[:, None]
    return {"weights": resp.mean(0), "rates": (totals + shape - 1) / (counts + rate)}


def first_feature(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return the first feature's rate for all features."""
    return right[:, :1].expand_as(right)


def share_of_zeros(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return weights of which the structural one is the share of rows of zeros."""
    share = (x == 0).all(1).to(x).mean()
    return torch.cat([share[None], (1 - share) * right[1:] / right[1:].sum()])


def zero_in_any_feature(params: Params, x: Tensor) -> Tensor:
    """Return responsibilities as if one zero made a row structural."""
    table = log_joint(params, x)
    structural = torch.where((x == 0).any(1), params["weights"][0].log(), -torch.inf)
    return torch.cat([structural[:, None], table[:, 1:]], 1).softmax(1)


SUBJECT = Subject(model, PARAMS, (X,), e_step, m_step, log_likelihood)
MAP = replace(SUBJECT, model=model_with_prior, m_step=m_step_with_prior)
ONE_FEATURE = replace(SUBJECT, params={**PARAMS, "rates": PARAMS["rates"][:, :1]}, data=(X[:, :1],))
WRONG_RATES: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "zeros left out of the counts": (
        "",
        lambda right, r, x: r[:, 1:].T @ x / r[x.any(1), 1:].sum(0)[:, None],
    ),
    "structural rows in the counts": ("", lambda right, r, x: r[:, 1:].T @ x / (r[:, 1:] + r[:, :1]).sum(0)[:, None]),
    "over n - 1": ("", lambda right, r, x: r[:, 1:].T @ x / (r[:, 1:].sum(0) - 1)[:, None]),
    "over N": ("", lambda right, r, x: r[:, 1:].T @ x / len(x)),
    "the same rates for all components": ("unweighted", lambda right, r, x: x.mean(0).expand_as(right)),
    "responsibilities of the component before": (
        "",
        lambda right, r, x: r[:, :-1].T @ x / r[:, :-1].sum(0)[:, None],
    ),
    "variances for rates": (
        "",
        lambda right, r, x: r[:, 1:].T @ x.square() / r[:, 1:].sum(0)[:, None] - right.square(),
    ),
    "rates of all, structural rows or not": ("", lambda right, r, x: right * (1 - r[:, 0].mean())),
    "mean waiting times for rates": ("reciprocal of rates for rates", lambda right, r, x: 1 / right),
    "components exchanged": ("", lambda right, r, x: right.flip(0)),
    "one rate off by a millionth": ("", lambda right, r, x: right * (1 + 1e-6 * torch.eye(2).to(right))),
    "a millionth added to the rates": ("1e-06 is added", lambda right, r, x: right + 1e-6),
}
WRONG_MAP: dict[str, tuple[str, Callable[[Tensor, Tensor], Params]]] = {
    "prior twice": ("prior counted 2 times", lambda r, x: m_step_with_prior(r, x, 2 * SHAPE - 1, 2 * RATE)),
    "posterior mean for mode": ("", lambda r, x: m_step_with_prior(r, x, SHAPE + 1)),
    "prior's scale for its rate": ("", lambda r, x: m_step_with_prior(r, x, SHAPE, 1 / RATE)),
}
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("responsibilities by cases", replace(SUBJECT, e_step=e_step_by_cases), "exact EM"),
    Entry("rates from the rows that are not zero", replace(SUBJECT, m_step=m_step_of_positive_rows), "exact EM"),
    Entry("half a step", replace(SUBJECT, m_step=halfway), "generalised EM"),
    Entry("gamma prior", MAP, "MAP-EM"),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_weights(SUBJECT),
    *wrong_reports(SUBJECT, finite_log_joint),
    Entry(
        "shares of zeros and counts exchanged",
        replace(SUBJECT, e_step=lambda p, x: e_step({**p, "weights": p["weights"][[1, 0, 2]]}, x)),
        "wrong E-step",
        source="Bios8366 #9",
    ),
    Entry(
        "every zero structural",
        replace(SUBJECT, e_step=lambda p, x: e_step(p, x).where(x.any(1, keepdim=True), torch.eye(3).to(x)[0])),
        "wrong E-step",
    ),
    Entry(
        "no zero structural",
        replace(SUBJECT, e_step=lambda p, x: torch.cat([0 * x[:, :1], log_joint(p, x)[:, 1:].softmax(1)], 1)),
        "wrong E-step",
    ),
    Entry(
        "one zero makes a row structural",
        replace(SUBJECT, e_step=zero_in_any_feature),
        "wrong E-step",
        blind=replace(ONE_FEATURE, e_step=zero_in_any_feature),
    ),
    Entry(
        "point mass for every row",
        replace(SUBJECT, e_step=lambda p, x: (p["weights"].log() + log_density(p, x).nan_to_num(neginf=0)).softmax(1)),
        "wrong E-step",
    ),
    Entry(
        "share of zero rows for the structural weight",
        replace_site(SUBJECT, "weights", share_of_zeros),
        "wrong M-step",
        ("weights",),
    ),
    *(
        Entry(name, replace_site(SUBJECT, "rates", change), "wrong M-step", ("rates",), hint)
        for name, (hint, change) in WRONG_RATES.items()
    ),
    Entry(
        "first feature's rate for all",
        replace_site(SUBJECT, "rates", first_feature),
        "wrong M-step",
        ("rates",),
        blind=replace_site(ONE_FEATURE, "rates", first_feature),
    ),
    *(
        Entry(name, replace(MAP, m_step=wrong), "wrong M-step", ("rates",), hint)
        for name, (hint, wrong) in WRONG_MAP.items()
    ),
    Entry(
        "Poisson rows alone reported",
        replace(SUBJECT, log_likelihood=lambda p, x: log_joint(p, x)[:, 1:].logsumexp(1).sum()),
        "wrong report",
    ),
)
