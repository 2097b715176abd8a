"""Counts from independent Poisson laws: x_nd | z_n = k ~ Poisson(rates_kd)."""

from __future__ import annotations

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
    [[0, 7], [1, 9], [2, 8], [3, 11], [2, 6], [6, 1], [5, 2], [7, 0], [4, 3], [11, 5], [13, 4], [9, 6], [12, 7]],
    dtype=torch.float64,
)
PARAMS = {
    "weights": torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    "rates": torch.tensor([[2.0, 8.0], [5.5, 1.5], [11.0, 5.0]], dtype=torch.float64),
}


def model(x: Tensor) -> None:
    """Draw each row of counts x (N, D) from its component; K and D follow from the parameters."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    rates = pyro.param("rates", PARAMS["rates"], constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Poisson(rates[z]).to_event(1), obs=x)


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), (N, K)."""
    rates = params["rates"]
    return params["weights"].log() + x @ rates.log().T - rates.sum(1) - (x + 1).lgamma().sum(1, keepdim=True)


def e_step(params: Params, x: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K)."""
    return log_joint(params, x).softmax(1)


def m_step(resp: Tensor, x: Tensor) -> Params:
    """Return the soft shares and the weighted means."""
    counts = resp.sum(0)
    return {"weights": counts / len(x), "rates": resp.T @ x / counts[:, None]}


def log_likelihood(params: Params, x: Tensor) -> Tensor:
    """Return log p(x), summed over the rows."""
    return log_joint(params, x).logsumexp(1).sum()


def e_step_by_products(params: Params, x: Tensor) -> Tensor:
    """Return the responsibilities from densities themselves, as most textbooks write them."""
    densities = params["weights"] * dist.Poisson(params["rates"]).log_prob(x[:, None]).sum(2).exp()
    return densities / densities.sum(1, keepdim=True)


def m_step_by_loops(resp: Tensor, x: Tensor) -> Params:
    """Return the same, component by component."""
    rates = [sum(r * row for r, row in zip(column, x, strict=True)) / column.sum() for column in resp.T]
    return {"weights": resp.mean(0), "rates": torch.stack(rates)}


def halfway(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return a step that goes half of the way, in all rates."""
    right = m_step(resp, x)
    return {**right, "rates": (right["rates"] + params["rates"]) / 2}


SUBJECT = Subject(model, PARAMS, (X,), e_step, m_step, log_likelihood)
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("responsibilities by products", replace(SUBJECT, e_step=e_step_by_products), "exact EM"),
    Entry("rates by loops", replace(SUBJECT, m_step=m_step_by_loops), "exact EM"),
    Entry("half a step", replace(SUBJECT, m_step=halfway), "generalised EM"),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_weights(SUBJECT),
    *wrong_reports(SUBJECT, log_joint),
    Entry(
        "factorials forgotten in the report",
        replace(SUBJECT, log_likelihood=lambda p, x: log_likelihood(p, x) + (x + 1).lgamma().sum()),
        "wrong report",
        hint="free of the parameters",
    ),
    Entry(
        "rates over n - 1",
        replace_site(SUBJECT, "rates", lambda right, r, x: r.T @ x / (r.sum(0) - 1)[:, None]),
        "wrong M-step",
        ("rates",),
        hint="n - 1 for n",
    ),
    Entry(
        "rates from the largest responsibilities",
        replace_site(SUBJECT, "rates", lambda right, r, x: (r == r.amax(1, keepdim=True)).double().T @ x / len(x)),
        "wrong M-step",
        ("rates",),
    ),
    Entry(
        "rates over N",
        replace_site(SUBJECT, "rates", lambda right, r, x: r.T @ x / len(x)),
        "wrong M-step",
        ("rates",),
        hint="N for n",
    ),
    Entry(
        "a millionth added to the rates",
        replace_site(SUBJECT, "rates", lambda right, r, x: right + 1e-6),
        "wrong M-step",
        ("rates",),
        hint="1e-06 is added",
    ),
)
