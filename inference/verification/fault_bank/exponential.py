"""Independent exponential waiting times: x_nd | z_n = k ~ Exponential with rate rates_kd, so with mean 1 / rates_kd."""

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
        [0.31, 4.42], [0.87, 2.95], [0.12, 6.71], [0.55, 3.38], [1.34, 0.27], [2.21, 0.43], [3.05, 0.11], [1.72, 0.66],
        [5.63, 2.14], [8.94, 1.23], [4.17, 3.86], [7.48, 0.92], [0.76, 5.09], [2.69, 0.35], [6.02, 1.57], [1.11, 1.93],
    ],
    dtype=torch.float64,
)  # fmt: skip
PARAMS = {
    "weights": torch.tensor([0.45, 0.35, 0.2], dtype=torch.float64),
    "rates": torch.tensor([[1.9, 0.25], [0.5, 2.6], [0.15, 0.6]], dtype=torch.float64),
}
SHAPE, RATE = 2.5, 1.7  # of the prior: rates_kd ~ Gamma(SHAPE, RATE)


def model(x: Tensor) -> None:
    """Draw each row of times x (N, D) from its component; K and D follow from the parameters."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    rates = pyro.param("rates", PARAMS["rates"], constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Exponential(rates[z]).to_event(1), obs=x)


def model_with_prior(x: Tensor) -> None:
    """Draw the three components' rates from a gamma law, then the rows."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    rates = pyro.sample("rates", dist.Gamma(SHAPE, RATE).expand([3, 2]).to_event(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Exponential(rates[z]).to_event(1), obs=x)


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), (N, K)."""
    return params["weights"].log() + params["rates"].log().sum(1) - x @ params["rates"].T


def e_step(params: Params, x: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K)."""
    return log_joint(params, x).softmax(1)


def m_step(resp: Tensor, x: Tensor) -> Params:
    """Return the soft shares, and the soft counts over the soft totals of time."""
    counts = resp.sum(0)
    return {"weights": counts / len(x), "rates": counts[:, None] / (resp.T @ x)}


def log_likelihood(params: Params, x: Tensor) -> Tensor:
    """Return log p(x), summed over the rows."""
    return log_joint(params, x).logsumexp(1).sum()


def e_step_by_products(params: Params, x: Tensor) -> Tensor:
    """Return the responsibilities from the densities, rate e^(-rate x), themselves."""
    densities = params["weights"] * (params["rates"] * (-params["rates"] * x[:, None]).exp()).prod(2)
    return densities / densities.sum(1, keepdim=True)


def m_step_by_means(resp: Tensor, x: Tensor) -> Params:
    """Return one over the weighted means, component by component."""
    shares = resp / resp.sum(0)
    means = [sum(s * row for s, row in zip(column, x, strict=True)) for column in shares.T]
    return {"weights": resp.mean(0), "rates": 1 / torch.stack(means)}


def halfway(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return a step that goes half of the way in all rates, in which Q is concave."""
    right = m_step(resp, x)
    return {**right, "rates": (right["rates"] + params["rates"]) / 2}


def two_cycles(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return new weights, then new rates from responsibilities at those weights: multicycle ECM raises log p(x)."""
    weights = resp.mean(0)
    again = e_step({"weights": weights, "rates": params["rates"]}, x)
    return {"weights": weights, "rates": m_step(again, x)["rates"]}


def m_step_with_prior(resp: Tensor, x: Tensor, shape: float = SHAPE, rate: float = RATE) -> Params:
    """Return the mode of each rate's gamma posterior, (n + shape - 1) / (total + rate)."""
    counts = resp.sum(0)
    return {"weights": counts / len(x), "rates": (counts[:, None] + shape - 1) / (resp.T @ x + rate)}


SUBJECT = Subject(model, PARAMS, (X,), e_step, m_step, log_likelihood)
MAP = replace(SUBJECT, model=model_with_prior, m_step=m_step_with_prior)
ONE_FEATURE = replace(SUBJECT, params={**PARAMS, "rates": PARAMS["rates"][:, :1]}, data=(X[:, :1],))
TWO_COMPONENTS = replace(
    SUBJECT, params={"weights": torch.tensor([0.6, 0.4], dtype=torch.float64), "rates": PARAMS["rates"][:2]}
)


def features_alone(params: Params, x: Tensor) -> Tensor:
    """Return the mean over the features of each one's own responsibilities."""
    table = params["rates"].log() - params["rates"] * x[:, None] + params["weights"].log()[:, None]
    return table.softmax(1).mean(2)


def against_the_next(params: Params, x: Tensor) -> Tensor:
    """Return the odds of each component against the next one as a probability, as for two components."""
    table = log_joint(params, x)
    return (table - table.roll(-1, 1)).sigmoid()


def pooled(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return one rate for all features of a component."""
    return (resp.sum(0) / (resp.T @ x.mean(1)))[:, None].expand_as(right)


WRONG_RATES: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "means for rates": ("reciprocal of rates for rates", lambda right, r, x: 1 / right),
    "unbiased rates, n - 1": ("n - 1 for n", lambda right, r, x: (r.sum(0) - 1)[:, None] / (r.T @ x)),
    "rates from N": ("N for n", lambda right, r, x: len(x) / (r.T @ x)),
    "the same rates for all components": ("unweighted", lambda right, r, x: (1 / x.mean(0)).expand_as(right)),
    "one over the standard deviation": (
        "",
        lambda right, r, x: ((r.T @ x.square()) / r.sum(0)[:, None] - right**-2).rsqrt(),
    ),
    "mean of the reciprocals": ("", lambda right, r, x: r.T @ (1 / x) / r.sum(0)[:, None]),
    "components exchanged": ("components in another order", lambda right, r, x: right.flip(0)),
    "one event added": ("", lambda right, r, x: (r.sum(0)[:, None] + 1) / (r.T @ x)),
    "one rate off by a millionth": ("", lambda right, r, x: right * (1 + 1e-6 * torch.eye(3, 2).to(right))),
    "a millionth added to the rates": ("1e-06 is added", lambda right, r, x: right + 1e-6),
}
WRONG_MAP: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "prior twice": (
        "prior counted 2 times",
        lambda right, r, x: m_step_with_prior(r, x, 2 * SHAPE - 1, 2 * RATE)["rates"],
    ),
    "posterior mean for mode": ("", lambda right, r, x: m_step_with_prior(r, x, SHAPE + 1)["rates"]),
    "prior's scale for its rate": ("", lambda right, r, x: m_step_with_prior(r, x, SHAPE, 1 / RATE)["rates"]),
}
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("responsibilities by products", replace(SUBJECT, e_step=e_step_by_products), "exact EM"),
    Entry("rates by loops over means", replace(SUBJECT, m_step=m_step_by_means), "exact EM"),
    Entry("half a step", replace(SUBJECT, m_step=halfway), "generalised EM"),
    Entry(
        "two cycles", replace(SUBJECT, m_step=two_cycles), "generalised EM", source="Meng and Rubin (1993), section 4"
    ),
    Entry("gamma prior", MAP, "MAP-EM"),
    Entry("maximum likelihood beside a prior", replace(MAP, m_step=m_step), "exact EM"),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_weights(SUBJECT),
    *wrong_reports(SUBJECT, log_joint),
    Entry(
        "density of a scale",
        replace(SUBJECT, e_step=lambda p, x: e_step({**p, "rates": 1 / p["rates"]}, x)),
        "wrong E-step",
        hint="reciprocal of rates for rates",
    ),
    Entry(
        "rate before the exponential forgotten",
        replace(SUBJECT, e_step=lambda p, x: (log_joint(p, x) - p["rates"].log().sum(1)).softmax(1)),
        "wrong E-step",
    ),
    Entry(
        "each feature's responsibilities averaged",
        replace(SUBJECT, e_step=features_alone),
        "wrong E-step",
        blind=replace(ONE_FEATURE, e_step=features_alone),
    ),
    Entry(
        "sigmoid for softmax",
        replace(SUBJECT, e_step=against_the_next),
        "wrong E-step",
        blind=replace(TWO_COMPONENTS, e_step=against_the_next),
    ),
    *(
        Entry(name, replace_site(SUBJECT, "rates", change), "wrong M-step", ("rates",), hint)
        for name, (hint, change) in WRONG_RATES.items()
    ),
    Entry(
        "one rate for all features",
        replace_site(SUBJECT, "rates", pooled),
        "wrong M-step",
        ("rates",),
        blind=replace_site(ONE_FEATURE, "rates", pooled),
    ),
    Entry(
        "rates never updated",
        replace(SUBJECT, m_step=lambda r, x, *, params: {**m_step(r, x), "rates": params["rates"]}),
        "wrong M-step",
        ("rates",),
    ),
    *(
        Entry(name, replace_site(MAP, "rates", change), "wrong M-step", ("rates",), hint)
        for name, (hint, change) in WRONG_MAP.items()
    ),
    Entry(
        "sign of the report",
        replace(SUBJECT, log_likelihood=lambda p, x: -log_likelihood(p, x)),
        "wrong report",
        hint="a factor of -1",
    ),
    Entry(
        "report after one more pass",
        replace(SUBJECT, log_likelihood=lambda p, x: log_likelihood(m_step(e_step(p, x), x), x)),
        "wrong report",
        source="zcurve #30",
    ),
)
