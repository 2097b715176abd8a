"""Failures before the first success: x_nd | z_n = k ~ Geometric, p(x) = probs_kd (1 - probs_kd)^x for x = 0, 1, ..."""

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
        [0, 29], [1, 44], [0, 17], [2, 31], [0, 58], [1, 12], [16, 0], [28, 1], [11, 0],
        [41, 2], [23, 0], [63, 37], [19, 48], [9, 76], [2, 3], [0, 1], [3, 0],
    ],
    dtype=torch.float64,
)  # fmt: skip
PARAMS = {
    "weights": torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64),
    "probs": torch.tensor([[0.52, 0.035], [0.05, 0.61], [0.17, 0.11]], dtype=torch.float64),
}
ONES, ZEROS = 2.3, 4.1  # of the prior: probs_kd ~ Beta(ONES, ZEROS)


def model(x: Tensor) -> None:
    """Draw each row of counts x (N, D) from its component; K and D follow from the parameters."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    probs = pyro.param("probs", PARAMS["probs"], constraint=constraints.unit_interval)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Geometric(probs[z]).to_event(1), obs=x)


def model_with_prior(x: Tensor) -> None:
    """Draw the three components' probabilities from a beta law, then the rows."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    probs = pyro.sample("probs", dist.Beta(ONES, ZEROS).expand([3, 2]).to_event(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Geometric(probs[z]).to_event(1), obs=x)


def model_of_equal_weights(x: Tensor) -> None:
    """Draw each row from one of equally likely components."""
    probs = pyro.param("probs", PARAMS["probs"], constraint=constraints.unit_interval)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(len(probs))), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Geometric(probs[z]).to_event(1), obs=x)


def log_density(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n | z_n = k), (N, K)."""
    return params["probs"].log().sum(1) + x @ (-params["probs"]).log1p().T


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), (N, K)."""
    return params["weights"].log() + log_density(params, x)


def e_step(params: Params, x: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K)."""
    return log_joint(params, x).softmax(1)


def m_step(resp: Tensor, x: Tensor) -> Params:
    """Return the soft shares, and successes over trials: each row is one success after x failures."""
    counts = resp.sum(0)
    return {"weights": counts / len(x), "probs": counts[:, None] / (counts[:, None] + resp.T @ x)}


def log_likelihood(params: Params, x: Tensor) -> Tensor:
    """Return log p(x), summed over the rows."""
    return log_joint(params, x).logsumexp(1).sum()


def e_step_by_powers(params: Params, x: Tensor) -> Tensor:
    """Return the responsibilities from p (1 - p)^x itself."""
    densities = params["weights"] * (params["probs"] * (1 - params["probs"]) ** x[:, None]).prod(2)
    return densities / densities.sum(1, keepdim=True)


def m_step_by_means(resp: Tensor, x: Tensor) -> Params:
    """Return one over one more than the weighted mean."""
    return {"weights": resp.mean(0), "probs": 1 / (1 + torch.einsum("nk,nd->kd", resp / resp.sum(0), x))}


def halfway(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return a step that goes half of the way in all probabilities, in which Q is concave."""
    right = m_step(resp, x)
    return {**right, "probs": (right["probs"] + params["probs"]) / 2}


def m_step_with_prior(resp: Tensor, x: Tensor, ones: float = ONES - 1, zeros: float = ZEROS - 1) -> Params:
    """Return the mode of each beta posterior: successes plus ONES - 1, failures plus ZEROS - 1."""
    successes, failures = resp.sum(0)[:, None] + ones, resp.T @ x + zeros
    return {"weights": resp.mean(0), "probs": successes / (successes + failures)}


def without_weights(params: Params, x: Tensor) -> Tensor:
    """Return responsibilities as if the weights were equal."""
    return log_density(params, x).softmax(1)


def first_feature(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return the first feature's probability for all features."""
    return right[:, :1].expand_as(right)


SUBJECT = Subject(model, PARAMS, (X,), e_step, m_step, log_likelihood)
MAP = replace(SUBJECT, model=model_with_prior, m_step=m_step_with_prior)
ONE_FEATURE = replace(SUBJECT, params={**PARAMS, "probs": PARAMS["probs"][:, :1]}, data=(X[:, :1],))
EQUAL_WEIGHTS = Subject(
    model_of_equal_weights,
    {"probs": PARAMS["probs"]},
    (X,),
    without_weights,
    lambda resp, x: {"probs": m_step(resp, x)["probs"]},
    lambda params, x: (log_density(params, x).logsumexp(1) - torch.tensor(len(params["probs"])).double().log()).sum(),
)
WRONG_PROBS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "successes over failures": ("", lambda right, r, x: r.sum(0)[:, None] / (r.T @ x)),
    "the probability of a failure": ("", lambda right, r, x: 1 - right),
    "mean number of trials": ("reciprocal of probs for probs", lambda right, r, x: 1 / right),
    "unbiased probabilities": ("", lambda right, r, x: (r.sum(0)[:, None] - 1) / (r.sum(0)[:, None] - 1 + r.T @ x)),
    "successes over N and failures": ("", lambda right, r, x: r.sum(0)[:, None] / (len(x) + r.T @ x)),
    "the same probabilities for all components": (
        "unweighted",
        lambda right, r, x: (1 / (1 + x.mean(0))).expand_as(right),
    ),
    "one success and one failure added": (
        "smoothed by 1",
        lambda right, r, x: (r.sum(0)[:, None] + 1) / (r.sum(0)[:, None] + r.T @ x + 2),
    ),
    "share of zeros": ("", lambda right, r, x: (r.T @ (x == 0).double() + 1e-9) / r.sum(0)[:, None]),
    "mean of the rows' own estimates": ("", lambda right, r, x: r.T @ (1 / (1 + x)) / r.sum(0)[:, None]),
    "components exchanged": ("components in another order", lambda right, r, x: right.roll(1, 0)),
    "one probability off by a millionth": ("", lambda right, r, x: right * (1 - 1e-6 * torch.eye(3, 2).to(right))),
}
WRONG_MAP: dict[str, tuple[str, Callable[[Tensor, Tensor], Params]]] = {
    "prior twice": ("prior counted 2 times", lambda r, x: m_step_with_prior(r, x, 2 * ONES - 2, 2 * ZEROS - 2)),
    "posterior mean for mode": ("", lambda r, x: m_step_with_prior(r, x, ONES, ZEROS)),
    "prior's failures forgotten": ("", lambda r, x: m_step_with_prior(r, x, ONES - 1, 0.0)),
    "prior's counts exchanged": ("", lambda r, x: m_step_with_prior(r, x, ZEROS - 1, ONES - 1)),
}
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("responsibilities by powers", replace(SUBJECT, e_step=e_step_by_powers), "exact EM"),
    Entry("probabilities by means", replace(SUBJECT, m_step=m_step_by_means), "exact EM"),
    Entry("equal weights that are known", EQUAL_WEIGHTS, "exact EM"),
    Entry("half a step", replace(SUBJECT, m_step=halfway), "generalised EM"),
    Entry("beta prior", MAP, "MAP-EM"),
    *(
        fault._replace(blind=EQUAL_WEIGHTS) if fault.name == "weights forgotten" else fault
        for fault in wrong_e_steps(SUBJECT, log_joint)
    ),
    *wrong_weights(SUBJECT),
    *wrong_reports(SUBJECT, log_joint),
    Entry(
        "failures counted from one",
        replace(SUBJECT, e_step=lambda p, x: e_step(p, x - 1)),
        "wrong E-step",
    ),
    Entry(
        "probabilities of failure and success exchanged",
        replace(SUBJECT, e_step=lambda p, x: e_step({**p, "probs": 1 - p["probs"]}, x)),
        "wrong E-step",
    ),
    *(
        Entry(name, replace_site(SUBJECT, "probs", change), "wrong M-step", ("probs",), hint)
        for name, (hint, change) in WRONG_PROBS.items()
    ),
    Entry(
        "first feature's probability for all",
        replace_site(SUBJECT, "probs", first_feature),
        "wrong M-step",
        ("probs",),
        blind=replace_site(ONE_FEATURE, "probs", first_feature),
    ),
    *(
        Entry(name, replace(MAP, m_step=wrong), "wrong M-step", ("probs",), hint)
        for name, (hint, wrong) in WRONG_MAP.items()
    ),
    Entry(
        "sum of the responsibilities' logs reported",
        replace(SUBJECT, log_likelihood=lambda p, x: e_step(p, x).sum(1).log().sum()),
        "wrong report",
        source="gaussian_mixture_models #2",
    ),
    Entry(
        "log posterior reported",
        replace(
            MAP, log_likelihood=lambda p, x: log_likelihood(p, x) + dist.Beta(ONES, ZEROS).log_prob(p["probs"]).sum()
        ),
        "wrong report",
    ),
)
