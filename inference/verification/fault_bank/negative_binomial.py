"""Counts of successes before a known number of failures: p(x) = C(FAILURES + x - 1, x) probs^x (1 - probs)^FAILURES.

``probs_kd`` is the probability of a success, as in Pyro: the mean is FAILURES probs / (1 - probs). Many texts exchange
success and failure.
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

FAILURES = torch.tensor([3.0, 5.5], dtype=torch.float64)
X = torch.tensor(
    [
        [1, 13], [0, 9], [2, 17], [3, 11], [1, 8], [2, 15], [7, 2], [9, 1], [6, 4],
        [11, 3], [8, 0], [17, 12], [21, 9], [14, 16], [26, 14], [5, 6], [4, 19],
    ],
    dtype=torch.float64,
)  # fmt: skip
PARAMS = {
    "weights": torch.tensor([0.37, 0.36, 0.27], dtype=torch.float64),
    "probs": torch.tensor([[0.34, 0.68], [0.72, 0.29], [0.86, 0.71]], dtype=torch.float64),
}
ONES, ZEROS = 1.9, 2.7  # of the prior: probs_kd ~ Beta(ONES, ZEROS)


def model(x: Tensor) -> None:
    """Draw each row of counts x (N, D) from its component; K and D follow from the parameters."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    probs = pyro.param("probs", PARAMS["probs"], constraint=constraints.unit_interval)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.NegativeBinomial(FAILURES[: x.shape[1]], probs=probs[z]).to_event(1), obs=x)


def model_with_prior(x: Tensor) -> None:
    """Draw the three components' probabilities from a beta law, then the rows."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    probs = pyro.sample("probs", dist.Beta(ONES, ZEROS).expand([3, 2]).to_event(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.NegativeBinomial(FAILURES, probs=probs[z]).to_event(1), obs=x)


def log_coefficients(x: Tensor) -> Tensor:
    """Return log C(FAILURES + x - 1, x), summed over the features, (N, 1)."""
    failures = FAILURES[: x.shape[1]]
    return ((failures + x).lgamma() - failures.lgamma() - (x + 1).lgamma()).sum(1, keepdim=True)


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), (N, K)."""
    probs = params["probs"]
    densities = x @ probs.log().T + (-probs).log1p() @ FAILURES[: x.shape[1]]
    return params["weights"].log() + densities + log_coefficients(x)


def e_step(params: Params, x: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K)."""
    return log_joint(params, x).softmax(1)


def m_step(resp: Tensor, x: Tensor) -> Params:
    """Return the soft shares, and successes over trials, of which each row has x and FAILURES."""
    counts, successes = resp.sum(0), resp.T @ x
    return {"weights": counts / len(x), "probs": successes / (successes + counts[:, None] * FAILURES[: x.shape[1]])}


def log_likelihood(params: Params, x: Tensor) -> Tensor:
    """Return log p(x), summed over the rows."""
    return log_joint(params, x).logsumexp(1).sum()


def e_step_by_means(params: Params, x: Tensor) -> Tensor:
    """Return the responsibilities by the other parametrisation, mean m: (m / (r + m))^x (r / (r + m))^r."""
    mean = FAILURES * params["probs"] / (1 - params["probs"])
    share = mean / (FAILURES + mean)
    densities = params["weights"] * (share ** x[:, None] * (FAILURES / (FAILURES + mean)) ** FAILURES).prod(2)
    return densities / densities.sum(1, keepdim=True)


def m_step_by_means(resp: Tensor, x: Tensor) -> Params:
    """Return one less the share of failures, from weighted means component by component."""
    means = torch.stack([(column[:, None] * x).sum(0) / column.sum() for column in resp.T])
    return {"weights": resp.mean(0), "probs": 1 - FAILURES / (FAILURES + means)}


def halfway(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return a step that goes half of the way in all probabilities, in which Q is concave."""
    right = m_step(resp, x)
    return {**right, "probs": (right["probs"] + params["probs"]) / 2}


def m_step_with_prior(resp: Tensor, x: Tensor, ones: float = ONES - 1, zeros: float = ZEROS - 1) -> Params:
    """Return the mode of each beta posterior: successes plus ONES - 1, failures plus ZEROS - 1."""
    successes, failures = resp.T @ x + ones, resp.sum(0)[:, None] * FAILURES + zeros
    return {"weights": resp.mean(0), "probs": successes / (successes + failures)}


def first_number(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return probabilities as if the first feature's number of failures were that of all."""
    successes = resp.T @ x
    return successes / (successes + resp.sum(0)[:, None] * FAILURES[0])


def against_the_next(params: Params, x: Tensor) -> Tensor:
    """Return the odds of each component against the next one as a probability, as for two components."""
    table = log_joint(params, x)
    return (table - table.roll(-1, 1)).sigmoid()


SUBJECT = Subject(model, PARAMS, (X,), e_step, m_step, log_likelihood)
MAP = replace(SUBJECT, model=model_with_prior, m_step=m_step_with_prior)
ONE_FEATURE = replace(SUBJECT, params={**PARAMS, "probs": PARAMS["probs"][:, :1]}, data=(X[:, :1],))
TWO_COMPONENTS = replace(
    SUBJECT, params={"weights": torch.tensor([0.55, 0.45], dtype=torch.float64), "probs": PARAMS["probs"][:2]}
)
WRONG_PROBS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "the probability of a failure": ("", lambda right, r, x: 1 - right),
    "one failure for any number": ("", lambda right, r, x: (r.T @ x) / (r.T @ (x + 1))),
    "unbiased probabilities": (
        "",
        lambda right, r, x: (r.T @ x) / (r.T @ x + r.sum(0)[:, None] * FAILURES - 1),
    ),
    "failures of all the rows": ("", lambda right, r, x: (r.T @ x) / (r.T @ x + len(x) * FAILURES)),
    "the same probabilities for all components": (
        "unweighted",
        lambda right, r, x: (x.mean(0) / (x.mean(0) + FAILURES)).expand_as(right),
    ),
    "successes over all trials of the data": ("N for n", lambda right, r, x: right * r.sum(0)[:, None] / len(x)),
    "mean of the rows' own estimates": ("", lambda right, r, x: r.T @ (x / (x + FAILURES)) / r.sum(0)[:, None]),
    "one success and one failure added": (
        "smoothed by 1",
        lambda right, r, x: (r.T @ x + 1) / (r.T @ x + r.sum(0)[:, None] * FAILURES + 2),
    ),
    "components exchanged": ("components in another order", lambda right, r, x: right.flip(0)),
    "one component off by a millionth": (
        "",
        lambda right, r, x: right * torch.tensor([[1 - 1e-6], [1.0], [1.0]]).to(right),
    ),
}
WRONG_MAP: dict[str, tuple[str, Callable[[Tensor, Tensor], Params]]] = {
    "prior twice": ("prior counted 2 times", lambda r, x: m_step_with_prior(r, x, 2 * ONES - 2, 2 * ZEROS - 2)),
    "posterior mean for mode": ("", lambda r, x: m_step_with_prior(r, x, ONES, ZEROS)),
    "prior's failures forgotten": ("", lambda r, x: m_step_with_prior(r, x, ONES - 1, 0.0)),
}
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("responsibilities by means", replace(SUBJECT, e_step=e_step_by_means), "exact EM"),
    Entry("probabilities by means", replace(SUBJECT, m_step=m_step_by_means), "exact EM"),
    Entry("half a step", replace(SUBJECT, m_step=halfway), "generalised EM"),
    Entry("beta prior", MAP, "MAP-EM"),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_weights(SUBJECT),
    *wrong_reports(SUBJECT, log_joint),
    Entry(
        "success and failure exchanged",
        replace(SUBJECT, e_step=lambda p, x: e_step({**p, "probs": 1 - p["probs"]}, x)),
        "wrong E-step",
    ),
    Entry(
        "known failures left out of the density",
        replace(SUBJECT, e_step=lambda p, x: (p["weights"].log() + x @ p["probs"].log().T).softmax(1)),
        "wrong E-step",
    ),
    Entry(
        "sigmoid for softmax",
        replace(SUBJECT, e_step=against_the_next),
        "wrong E-step",
        blind=replace(TWO_COMPONENTS, e_step=against_the_next),
    ),
    *(
        Entry(name, replace_site(SUBJECT, "probs", change), "wrong M-step", ("probs",), hint)
        for name, (hint, change) in WRONG_PROBS.items()
    ),
    Entry(
        "first feature's failures for all",
        replace_site(SUBJECT, "probs", first_number),
        "wrong M-step",
        ("probs",),
        blind=replace_site(ONE_FEATURE, "probs", first_number),
    ),
    *(
        Entry(name, replace(MAP, m_step=wrong), "wrong M-step", ("probs",), hint)
        for name, (hint, wrong) in WRONG_MAP.items()
    ),
    Entry(
        "coefficients forgotten in the report",
        replace(SUBJECT, log_likelihood=lambda p, x: log_likelihood(p, x) - log_coefficients(x).sum()),
        "wrong report",
        hint="free of the parameters",
    ),
)
