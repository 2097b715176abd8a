"""Yes-no items under proper priors: x_nd | z_n = k ~ Bernoulli(probs_kd), probs_kd ~ Beta, weights ~ Dirichlet."""

from __future__ import annotations

from dataclasses import replace

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

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
        [1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 1],
        [0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1],
    ],
    dtype=torch.float64,
)  # fmt: skip
CONCENTRATION = torch.tensor([2.5, 1.5, 3.0], dtype=torch.float64)
SHAPES = torch.tensor([2.25, 1.75], dtype=torch.float64)
PARAMS = {
    "weights": torch.tensor([0.45, 0.35, 0.2], dtype=torch.float64),
    "probs": torch.tensor([[0.8, 0.7, 0.75, 0.2], [0.15, 0.3, 0.25, 0.7], [0.55, 0.6, 0.4, 0.85]], dtype=torch.float64),
}


def model(x: Tensor, concentration: Tensor, shapes: Tensor) -> None:
    """Draw each row of x (N, D) from its component.

    Args:
        x: (N, D), zeros and ones.
        concentration: (K,), of the Dirichlet prior of the weights.
        shapes: (2,), of the Beta prior of every probability.
    """
    weights = pyro.sample("weights", dist.Dirichlet(concentration))
    beta = dist.Beta(shapes[0], shapes[1]).expand([len(concentration), x.shape[1]]).to_event(2)
    probs = pyro.sample("probs", beta)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Bernoulli(probs[z]).to_event(1), obs=x)


def log_joint(params: Params, x: Tensor, concentration: Tensor, shapes: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k | params), (N, K)."""
    return params["weights"].log() + x @ params["probs"].log().T + (1 - x) @ (1 - params["probs"]).log().T


def e_step(params: Params, x: Tensor, concentration: Tensor, shapes: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K)."""
    return log_joint(params, x, concentration, shapes).softmax(1)


def log_likelihood(params: Params, x: Tensor, concentration: Tensor, shapes: Tensor) -> Tensor:
    """Return log p(x | params), summed over the rows."""
    return log_joint(params, x, concentration, shapes).logsumexp(1).sum()


def log_prior(params: Params, concentration: Tensor, shapes: Tensor) -> Tensor:
    """Return log p(params)."""
    beta = dist.Beta(shapes[0], shapes[1]).log_prob(params["probs"]).sum()
    return beta + dist.Dirichlet(concentration).log_prob(params["weights"])


def weights_with(resp: Tensor, pseudo: Tensor) -> Tensor:
    """Return the shares with pseudo counts (K,) added to the soft counts."""
    counts = resp.sum(0) + pseudo
    return counts / counts.sum()


def probs_with(resp: Tensor, x: Tensor, heads: Tensor | float, tails: Tensor | float) -> Tensor:
    """Return the shares of ones with pseudo counts of ones and of zeros."""
    return (resp.T @ x + heads) / (resp.sum(0)[:, None] + heads + tails)


def m_step(resp: Tensor, x: Tensor, concentration: Tensor, shapes: Tensor) -> Params:
    """Return the modes of a Dirichlet and of Betas: pseudo counts of the priors' shapes less one."""
    heads, tails = shapes - 1
    return {"weights": weights_with(resp, concentration - 1), "probs": probs_with(resp, x, heads, tails)}


def without_priors(resp: Tensor, x: Tensor, concentration: Tensor, shapes: Tensor) -> Params:
    """Return the M-step of the likelihood: right, for an EM that leaves the priors out altogether."""
    return {"weights": resp.mean(0), "probs": probs_with(resp, x, 0.0, 0.0)}


def e_step_by_products(params: Params, x: Tensor, concentration: Tensor, shapes: Tensor) -> Tensor:
    """Return the responsibilities from products of probs and their complements."""
    chosen = torch.where(x[:, None] == 1, params["probs"], 1 - params["probs"]).prod(2) * params["weights"]
    return chosen / chosen.sum(1, keepdim=True)


def e_step_by_odds(params: Params, x: Tensor, concentration: Tensor, shapes: Tensor) -> Tensor:
    """Return the responsibilities by scores linear in x: slopes are the log odds."""
    offsets = params["weights"].log() + (-params["probs"]).log1p().sum(1)
    return (x @ params["probs"].logit().T + offsets).softmax(1)


def m_step_with_phantom_rows(resp: Tensor, x: Tensor, concentration: Tensor, shapes: Tensor) -> Params:
    """Return the same from data to which each prior adds weighted rows of ones and of zeros."""
    heads, tails = (shape - 1 for shape in shapes)
    rows = torch.cat([x, torch.ones_like(x[:1]), torch.zeros_like(x[:1])])
    k = resp.shape[1]
    weights = torch.cat([resp, heads.expand(1, k), tails.expand(1, k)])
    probs = torch.stack([(column[:, None] * rows).sum(0) / column.sum() for column in weights.T])
    counts = resp.sum(0)
    total = len(x) + concentration.sum() - k
    return {"weights": (counts + concentration - 1) / total, "probs": probs}


def halfway(resp: Tensor, x: Tensor, concentration: Tensor, shapes: Tensor, *, params: Params) -> Params:
    """Return a step half of the way, in all sites: Q plus log prior is concave in them."""
    right = m_step(resp, x, concentration, shapes)
    return {site: (value + params[site]) / 2 for site, value in right.items()}


def flat(subject: Subject) -> Subject:
    """Return the subject with flat priors, which no pseudo count can see."""
    return replace(subject, data=(X, torch.ones_like(CONCENTRATION), torch.ones_like(SHAPES)))


def symmetric(subject: Subject) -> Subject:
    """Return the subject with the same shape for ones and zeros."""
    return replace(subject, data=(X, CONCENTRATION, torch.full_like(SHAPES, 1.6)))


SUBJECT = Subject(model, PARAMS, (X, CONCENTRATION, SHAPES), e_step, m_step, log_likelihood)
TWICE = replace_site(SUBJECT, "probs", lambda right, r, x, c, s: probs_with(r, x, *(2 * (s - 1))))
FORGOTTEN = replace_site(SUBJECT, "probs", lambda right, r, x, c, s: probs_with(r, x, 0.0, 0.0))
WEIGHTS_TWICE = replace_site(SUBJECT, "weights", lambda right, r, x, c, s: weights_with(r, 2 * (c - 1)))
WEIGHTS_FORGOTTEN = replace_site(SUBJECT, "weights", lambda right, r, x, c, s: r.mean(0))
EXCHANGED = replace_site(SUBJECT, "probs", lambda right, r, x, c, s: probs_with(r, x, *(s.flip(0) - 1)))
PER_ROW = replace_site(SUBJECT, "probs", lambda right, r, x, c, s: probs_with(r, x, *(len(x) * (s - 1))))
WITH_PRIOR = replace(SUBJECT, log_likelihood=lambda p, *data: log_likelihood(p, *data) + log_prior(p, *data[1:]))
BOTH = ("weights", "probs")
ENTRIES = (
    Entry("as derived", SUBJECT, "MAP-EM"),
    Entry("responsibilities by products", replace(SUBJECT, e_step=e_step_by_products), "MAP-EM"),
    Entry("responsibilities by log odds", replace(SUBJECT, e_step=e_step_by_odds), "MAP-EM"),
    Entry("priors as phantom rows", replace(SUBJECT, m_step=m_step_with_phantom_rows), "MAP-EM"),
    Entry("half a step", replace(SUBJECT, m_step=halfway), "generalised EM"),
    Entry("both priors left out", replace(SUBJECT, m_step=without_priors), "exact EM"),
    Entry("flat priors", flat(SUBJECT), "exact EM"),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_weights(SUBJECT),
    *wrong_reports(SUBJECT, log_joint),
    Entry(
        "zeros forgotten",
        replace(SUBJECT, e_step=lambda p, x, c, s: (p["weights"].log() + x @ p["probs"].log().T).softmax(1)),
        "wrong E-step",
    ),
    Entry(
        "prior in every row",
        replace(
            SUBJECT,
            e_step=lambda p, x, c, s: (
                log_joint(p, x, c, s) + dist.Beta(s[0], s[1]).log_prob(p["probs"]).sum(1)
            ).softmax(1),
        ),
        "wrong E-step",
    ),
    Entry("log posterior reported", WITH_PRIOR, "wrong report"),
    Entry("prior counted twice", TWICE, "wrong M-step", ("probs",), "prior counted 2 times", blind=flat(TWICE)),
    Entry("prior of the weights counted twice", WEIGHTS_TWICE, "wrong M-step", ("weights",), "prior counted 2 times",
          blind=flat(WEIGHTS_TWICE)),
    Entry("prior of the probabilities forgotten", FORGOTTEN, "wrong M-step", BOTH, blind=flat(FORGOTTEN)),
    Entry("prior of the weights forgotten", WEIGHTS_FORGOTTEN, "wrong M-step", BOTH, blind=flat(WEIGHTS_FORGOTTEN)),
    Entry("prior counted for every row", PER_ROW, "wrong M-step", ("probs",), "prior counted 16 times",
          blind=flat(PER_ROW)),
    Entry("shapes exchanged", EXCHANGED, "wrong M-step", ("probs",), blind=symmetric(EXCHANGED)),
    Entry("posterior mean for mode", replace_site(SUBJECT, "probs", lambda right, r, x, c, s: probs_with(r, x, *s)),
          "wrong M-step", ("probs",)),
    Entry("posterior mean of the weights",
          replace_site(SUBJECT, "weights", lambda right, r, x, c, s: weights_with(r, c)),
          "wrong M-step", ("weights",)),
    Entry("prior in the numerator only",
          replace_site(SUBJECT, "probs", lambda right, r, x, c, s: (r.T @ x + s[0] - 1) / (r.sum(0)[:, None] + s[0] - 1)
                       ),
          "wrong M-step", ("probs",)),
    Entry("probabilities over N",
          replace_site(SUBJECT, "probs", lambda right, r, x, c, s: (r.T @ x + s[0] - 1) / (len(x) + s.sum() - 2)),
          "wrong M-step", ("probs",)),
    Entry("zeros counted as ones", replace_site(SUBJECT, "probs", lambda right, r, x, c, s: 1 - right), "wrong M-step",
          ("probs",)),
    Entry("probabilities of the next component",
          replace_site(SUBJECT, "probs", lambda right, r, x, c, s: right.roll(1, 0)),
          "wrong M-step", ("probs",), "components in another order"),
    Entry("probabilities off by a millionth",
          replace_site(SUBJECT, "probs", lambda right, r, x, c, s: right * (1 - 1e-6)), "wrong M-step", ("probs",)),
)  # fmt: skip
