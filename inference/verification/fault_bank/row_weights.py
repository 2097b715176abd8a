"""Counts whose rows carry weights: a row of weight w counts as w equal rows. x_nd | z_n = k ~ Poisson(rates_kd)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.verification.fault_bank.entry import Entry, replace_site
from mixproof.inference.verification.subject import Subject

Params = dict[str, Tensor]

X = torch.tensor(
    [[0, 7], [1, 9], [2, 8], [3, 11], [2, 6], [6, 1], [5, 2], [7, 0], [4, 3], [11, 5], [13, 4], [9, 6], [12, 7]],
    dtype=torch.float64,
)
ROW_WEIGHTS = torch.tensor([2.0, 0.7, 1.3, 3.1, 0.4, 1.7, 2.6, 0.9, 1.1, 0.3, 2.2, 1.9, 0.8], dtype=torch.float64)
PARAMS = {
    "weights": torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    "rates": torch.tensor([[2.0, 8.0], [5.5, 1.5], [11.0, 5.0]], dtype=torch.float64),
}


def model(x: Tensor, row_weights: Tensor) -> None:
    """Draw each row of counts x (N, D) from its component, row n counted row_weights (N,) times."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    rates = pyro.param("rates", PARAMS["rates"], constraint=constraints.positive)
    with pyro.plate("data", len(x)), poutine.scale(scale=row_weights):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Poisson(rates[z]).to_event(1), obs=x)


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k) of one row, whatever its weight, (N, K)."""
    rates = params["rates"]
    return params["weights"].log() + x @ rates.log().T - rates.sum(1) - (x + 1).lgamma().sum(1, keepdim=True)


def e_step(params: Params, x: Tensor, row_weights: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K): how often a row is counted does not change what is known of its component."""
    return log_joint(params, x).softmax(1)


def m_step(resp: Tensor, x: Tensor, row_weights: Tensor) -> Params:
    """Return the shares and means with the responsibilities times the row weights."""
    counted = resp * row_weights[:, None]
    return {"weights": counted.sum(0) / row_weights.sum(), "rates": counted.T @ x / counted.sum(0)[:, None]}


def log_likelihood(params: Params, x: Tensor, row_weights: Tensor) -> Tensor:
    """Return the weighted sum of log p(x_n)."""
    return row_weights @ log_joint(params, x).logsumexp(1)


def e_step_by_products(params: Params, x: Tensor, row_weights: Tensor) -> Tensor:
    """Return the responsibilities from densities times row weights, which cancel."""
    densities = params["weights"] * dist.Poisson(params["rates"]).log_prob(x[:, None]).sum(2).exp()
    counted = row_weights[:, None] * densities
    return counted / counted.sum(1, keepdim=True)


def m_step_by_loops(resp: Tensor, x: Tensor, row_weights: Tensor) -> Params:
    """Return the same, row by row."""
    counts, sums = torch.zeros(resp.shape[1]).double(), torch.zeros(resp.shape[1], x.shape[1]).double()
    for r, row, weight in zip(resp, x, row_weights, strict=True):
        counts += weight * r
        sums += weight * r[:, None] * row
    return {"weights": counts / counts.sum(), "rates": sums / counts[:, None]}


def m_step_with_shares_of_the_total(resp: Tensor, x: Tensor, row_weights: Tensor) -> Params:
    """Return the same with row weights that sum to one: their unit does not matter."""
    shares = row_weights / row_weights.sum()
    weights = torch.einsum("n,nk->k", shares, resp)
    return {"weights": weights, "rates": torch.einsum("n,nk,nd->kd", shares, resp, x) / weights[:, None]}


def halfway(resp: Tensor, x: Tensor, row_weights: Tensor, *, params: Params) -> Params:
    """Return a step half of the way, in all sites: Q is concave in them."""
    return {site: (value + params[site]) / 2 for site, value in m_step(resp, x, row_weights).items()}


def weights_forgotten(resp: Tensor, x: Tensor, row_weights: Tensor) -> Params:
    """Return the M-step of rows that count once each."""
    return m_step(resp, x, torch.ones_like(row_weights))


def weights_twice(resp: Tensor, x: Tensor, row_weights: Tensor) -> Params:
    """Return the M-step with the square of the row weights."""
    return m_step(resp, x, row_weights**2)


def with_pseudo_counts(resp: Tensor, x: Tensor, row_weights: Tensor) -> Params:
    """Return rates drawn towards an overall mean in which the rows count once each."""
    counted = resp * row_weights[:, None]
    right = m_step(resp, x, row_weights)
    return {**right, "rates": (counted.T @ x + x.mean(0)) / (counted.sum(0)[:, None] + 1)}


def counted_once(subject: Subject) -> Subject:
    """Return the subject with all row weights one."""
    return replace(subject, data=(X, torch.ones_like(ROW_WEIGHTS)))


def entry(name: str, verdict: str, sites: tuple[str, ...] = (), hint: str = "", **steps: Any) -> Entry:
    """Return a fault that rows of weight one cannot show."""
    wrong = replace(SUBJECT, **steps)
    return Entry(name, wrong, verdict, sites, hint, blind=counted_once(wrong))


def shares(change: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Params]:
    """Return an M-step with changed weights alone."""
    return replace_site(SUBJECT, "weights", change).m_step


def rates(change: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Params]:
    """Return an M-step with changed rates alone."""
    return replace_site(SUBJECT, "rates", change).m_step


SUBJECT = Subject(model, PARAMS, (X, ROW_WEIGHTS), e_step, m_step, log_likelihood)
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("all rows counted once", counted_once(SUBJECT), "exact EM"),
    Entry("responsibilities by products", replace(SUBJECT, e_step=e_step_by_products), "exact EM"),
    Entry("row by row", replace(SUBJECT, m_step=m_step_by_loops), "exact EM"),
    Entry("row weights as shares", replace(SUBJECT, m_step=m_step_with_shares_of_the_total), "exact EM"),
    Entry("half a step", replace(SUBJECT, m_step=halfway), "generalised EM"),
    entry("row weights as an exponent", "wrong E-step",
          e_step=lambda p, x, w: (w[:, None] * log_joint(p, x)).softmax(1)),
    entry("responsibilities times row weights", "wrong E-step", hint="not normalised",
          e_step=lambda p, x, w: w[:, None] * log_joint(p, x).softmax(1)),
    entry("row weights on the counts", "wrong E-step", e_step=lambda p, x, w: log_joint(p, w[:, None] * x).softmax(1)),
    Entry("weights forgotten",
          replace(SUBJECT, e_step=lambda p, x, w: (log_joint(p, x) - p["weights"].log()).softmax(1)),
          "wrong E-step", hint="weights are missing"),
    Entry("hard assignment",
          replace(SUBJECT, e_step=lambda p, x, w: (e_step(p, x, w) == e_step(p, x, w).amax(1, True)).to(x)),
          "wrong E-step", hint="hard assignments"),
    Entry("softmax over the rows", replace(SUBJECT, e_step=lambda p, x, w: log_joint(p, x).softmax(0)), "wrong E-step",
          hint="over the rows"),
    entry("row weights forgotten in the M-step", "wrong M-step", ("weights", "rates"), m_step=weights_forgotten),
    entry("row weights counted twice", "wrong M-step", ("weights", "rates"), m_step=weights_twice),
    entry("row weights forgotten in the shares", "wrong M-step", ("weights",), "row weights are missing",
          m_step=shares(lambda right, r, x, w: r.mean(0))),
    entry("row weights forgotten in the rates", "wrong M-step", ("rates",), "row weights are missing",
          m_step=rates(lambda right, r, x, w: r.T @ x / r.sum(0)[:, None])),
    entry("row weights forgotten in the denominator", "wrong M-step", ("rates",),
          m_step=rates(lambda right, r, x, w: (w[:, None] * r).T @ x / r.sum(0)[:, None])),
    entry("row weights forgotten in the numerator", "wrong M-step", ("rates",),
          m_step=rates(lambda right, r, x, w: r.T @ x / (w @ r)[:, None])),
    entry("square roots of the row weights", "wrong M-step", ("rates",),
          m_step=rates(lambda right, r, x, w: (w.sqrt()[:, None] * r).T @ x / (w.sqrt() @ r)[:, None])),
    entry("row weights inverted", "wrong M-step", ("weights", "rates"),
          m_step=lambda r, x, w: m_step(r, x, 1 / w)),
    Entry("pseudo counts that ignore the row weights", replace(SUBJECT, m_step=with_pseudo_counts), "wrong M-step",
          ("rates",), source="pomegranate PR #1038"),
    Entry("rates over n - 1", replace(SUBJECT, m_step=rates(
        lambda right, r, x, w: right * ((w @ r) / (w @ r - 1))[:, None])), "wrong M-step", ("rates",), "n - 1 for n"),
    Entry("rates of the next component", replace(SUBJECT, m_step=rates(lambda right, r, x, w: right.roll(1, 0))),
          "wrong M-step", ("rates",), "components in another order"),
    Entry("rates off by a millionth", replace(SUBJECT, m_step=rates(lambda right, r, x, w: right * (1 + 1e-6))),
          "wrong M-step", ("rates",)),
    entry("row weights forgotten in the report", "wrong report", hint="row weights are missing",
          log_likelihood=lambda p, x, w: log_joint(p, x).logsumexp(1).sum()),
    entry("row weights inside the logarithm", "wrong report",
          log_likelihood=lambda p, x, w: (log_joint(p, x) + w.log()[:, None]).logsumexp(1).sum()),
    entry("row weights on the log joint", "wrong report",
          log_likelihood=lambda p, x, w: (w[:, None] * log_joint(p, x)).logsumexp(1).sum()),
    Entry("weighted mean for weighted sum",
          replace(SUBJECT, log_likelihood=lambda p, x, w: log_likelihood(p, x, w) / w.sum()),
          "wrong report"),
)  # fmt: skip
