"""Successes among known numbers of trials: x_nd | z_n = k ~ Binomial(trials_d, probs_kd), the trials held fixed."""

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

TRIALS = torch.tensor([14.0, 9.0], dtype=torch.float64)
X = torch.tensor(
    [
        [2, 7], [3, 8], [1, 6], [4, 7], [2, 5], [3, 6], [11, 1], [12, 2], [9, 0],
        [10, 3], [13, 1], [6, 4], [8, 3], [7, 5], [5, 5], [9, 6], [6, 2],
    ],
    dtype=torch.float64,
)  # fmt: skip
PARAMS = {
    "weights": torch.tensor([0.37, 0.28, 0.35], dtype=torch.float64),
    "trials": TRIALS,
    "probs": torch.tensor([[0.19, 0.73], [0.78, 0.16], [0.47, 0.45]], dtype=torch.float64),
}
ONES, ZEROS = 2.4, 3.3  # of the prior: probs_kd ~ Beta(ONES, ZEROS)


def model(x: Tensor) -> None:
    """Draw each row of counts x (N, D) from its component; K and D follow from the parameters."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    trials = pyro.param("trials", PARAMS["trials"], constraint=constraints.positive_integer)
    probs = pyro.param("probs", PARAMS["probs"], constraint=constraints.unit_interval)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Binomial(trials, probs[z]).to_event(1), obs=x)


def model_with_prior(x: Tensor) -> None:
    """Draw the three components' probabilities from a beta law, then the rows."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    trials = pyro.param("trials", PARAMS["trials"], constraint=constraints.positive_integer)
    probs = pyro.sample("probs", dist.Beta(ONES, ZEROS).expand([3, 2]).to_event(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Binomial(trials, probs[z]).to_event(1), obs=x)


def log_coefficients(trials: Tensor, x: Tensor) -> Tensor:
    """Return log C(trials, x), summed over the features, (N, 1)."""
    terms = (trials + 1).lgamma() - (x + 1).lgamma() - (trials - x + 1).lgamma()
    return terms.sum(1, keepdim=True)


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), (N, K)."""
    trials, probs = params["trials"], params["probs"]
    densities = x @ probs.log().T + (trials - x) @ (-probs).log1p().T
    return params["weights"].log() + densities + log_coefficients(trials, x)


def e_step(params: Params, x: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K)."""
    return log_joint(params, x).softmax(1)


def m_step(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return the soft shares, the trials as they are, and successes over trials."""
    counts, trials = resp.sum(0), params["trials"]
    return {"weights": counts / len(x), "trials": trials, "probs": resp.T @ x / (counts[:, None] * trials)}


def log_likelihood(params: Params, x: Tensor) -> Tensor:
    """Return log p(x), summed over the rows."""
    return log_joint(params, x).logsumexp(1).sum()


def e_step_by_odds(params: Params, x: Tensor) -> Tensor:
    """Return the responsibilities from odds^x (1 - p)^trials."""
    probs = params["probs"]
    odds = probs / (1 - probs)
    densities = params["weights"] * (odds ** x[:, None] * (1 - probs) ** params["trials"]).prod(2)
    return densities / densities.sum(1, keepdim=True)


def m_step_by_tosses(resp: Tensor, x: Tensor) -> Params:
    """Return successes over successes and failures; the trials are a constant of the derivation."""
    successes = torch.stack([(column[:, None] * x).sum(0) for column in resp.T])
    failures = torch.stack([(column[:, None] * (TRIALS - x)).sum(0) for column in resp.T])
    return {"weights": resp.mean(0), "trials": TRIALS, "probs": successes / (successes + failures)}


def halfway(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return a step that goes half of the way in all probabilities, in which Q is concave."""
    right = m_step(resp, x, params=params)
    return {**right, "probs": (right["probs"] + params["probs"]) / 2}


def m_step_with_prior(resp: Tensor, x: Tensor, ones: float = ONES - 1, zeros: float = ZEROS - 1) -> Params:
    """Return the mode of each beta posterior: successes plus ONES - 1, failures plus ZEROS - 1."""
    successes, failures = resp.T @ x + ones, resp.T @ (TRIALS - x) + zeros
    return {"weights": resp.mean(0), "trials": TRIALS, "probs": successes / (successes + failures)}


def first_trials(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return probabilities as if the first feature's number of trials were that of all."""
    return resp.T @ x / (resp.sum(0)[:, None] * TRIALS[0])


def features_alone(params: Params, x: Tensor) -> Tensor:
    """Return the mean over the features of each one's own responsibilities."""
    densities = dist.Binomial(params["trials"], params["probs"]).log_prob(x[:, None])
    return (params["weights"].log()[:, None] + densities).softmax(1).mean(2)


def short(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return right probabilities of the first components only, the last one's at the first one's."""
    return torch.cat([right[:-1], right[:1]])


SUBJECT = Subject(model, PARAMS, (X,), e_step, m_step, log_likelihood)
CONSTANT = replace(SUBJECT, m_step=m_step_by_tosses)  # its M-step needs no params, which replace_site cannot pass on
MAP = replace(SUBJECT, model=model_with_prior, m_step=m_step_with_prior)
ONE_FEATURE = replace(
    SUBJECT, params={**PARAMS, "trials": TRIALS[:1], "probs": PARAMS["probs"][:, :1]}, data=(X[:, :1],)
)
WRONG_PROBS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "the probability of a failure": ("", lambda right, r, x: 1 - right),
    "largest count for the trials": ("", lambda right, r, x: right * TRIALS / x.amax(0)),
    "all features' trials": ("", lambda right, r, x: right * TRIALS / TRIALS.mean()),
    "over N": ("N for n", lambda right, r, x: r.T @ x / (len(x) * TRIALS)),
    "over one trial more": ("", lambda right, r, x: right * TRIALS / (TRIALS + 1)),
    "the same probabilities for all components": (
        "unweighted",
        lambda right, r, x: (x.mean(0) / TRIALS).expand_as(right),
    ),
    "one success and one failure added": (
        "smoothed by 1",
        lambda right, r, x: (r.T @ x + 1) / (r.sum(0)[:, None] * TRIALS + 2),
    ),
    "one success added": ("smoothed by 1", lambda right, r, x: (r.T @ x + 1) / (r.sum(0)[:, None] * TRIALS + 1)),
    "odds for probabilities": ("", lambda right, r, x: (right / (1 - right)).clamp_max(1 - 1e-9)),
    "last component at the first's": ("", short),
    "components exchanged": ("components in another order", lambda right, r, x: right.roll(1, 0)),
    "one probability off by a millionth": ("", lambda right, r, x: right * (1 + 1e-6 * torch.eye(3, 2).to(right))),
    "a millionth added to the probabilities": ("1e-06 is added", lambda right, r, x: right + 1e-6),
}
WRONG_MAP: dict[str, tuple[str, Callable[[Tensor, Tensor], Params]]] = {
    "prior twice": ("prior counted 2 times", lambda r, x: m_step_with_prior(r, x, 2 * ONES - 2, 2 * ZEROS - 2)),
    "posterior mean for mode": ("", lambda r, x: m_step_with_prior(r, x, ONES, ZEROS)),
    "prior's failures forgotten": ("", lambda r, x: m_step_with_prior(r, x, ONES - 1, 0.0)),
}
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("responsibilities by odds", replace(SUBJECT, e_step=e_step_by_odds), "exact EM"),
    Entry("probabilities by tosses", CONSTANT, "exact EM"),
    Entry("half a step", replace(SUBJECT, m_step=halfway), "generalised EM"),
    Entry("beta prior", MAP, "MAP-EM"),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_weights(CONSTANT),
    *wrong_reports(SUBJECT, log_joint),
    Entry(
        "failures left out of the density",
        replace(SUBJECT, e_step=lambda p, x: (p["weights"].log() + x @ p["probs"].log().T).softmax(1)),
        "wrong E-step",
    ),
    Entry(
        "success and failure exchanged",
        replace(SUBJECT, e_step=lambda p, x: e_step(p, p["trials"] - x)),
        "wrong E-step",
    ),
    Entry(
        "each feature's responsibilities averaged",
        replace(SUBJECT, e_step=features_alone),
        "wrong E-step",
        blind=replace(ONE_FEATURE, e_step=features_alone),
    ),
    *(
        Entry(name, replace_site(CONSTANT, "probs", change), "wrong M-step", ("probs",), hint)
        for name, (hint, change) in WRONG_PROBS.items()
    ),
    Entry(
        "first feature's trials for all",
        replace_site(CONSTANT, "probs", first_trials),
        "wrong M-step",
        ("probs",),
        blind=replace(
            ONE_FEATURE,
            m_step=lambda r, x, *, params: {
                **m_step(r, x, params=params),
                "probs": first_trials(params["probs"], r, x),
            },
        ),
    ),
    Entry(
        "trials set to one more than the largest count",
        replace_site(CONSTANT, "trials", lambda right, r, x: x.amax(0) + 1),
        "wrong M-step",
        ("trials",),
    ),
    *(
        Entry(name, replace(MAP, m_step=wrong), "wrong M-step", ("probs",), hint)
        for name, (hint, wrong) in WRONG_MAP.items()
    ),
    Entry(
        "coefficients forgotten in the report",
        replace(SUBJECT, log_likelihood=lambda p, x: log_likelihood(p, x) - log_coefficients(p["trials"], x).sum()),
        "wrong report",
        hint="free of the parameters",
    ),
)
