"""Latent class analysis: items x_nd in {0, ..., C - 1}, x_nd | z_n = k ~ Categorical(probs_kd), given the class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import one_hot

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
        [1, 3, 1], [1, 2, 3], [3, 1, 1], [2, 0, 3], [0, 3, 2], [3, 0, 2], [2, 1, 1], [2, 3, 0], [1, 2, 2],
        [0, 3, 1], [3, 0, 0], [0, 1, 0], [0, 3, 0], [1, 1, 0], [3, 3, 1], [0, 0, 0], [1, 2, 1], [0, 3, 3],
        [0, 0, 1], [3, 3, 0], [0, 1, 3], [3, 2, 2], [0, 3, 1], [0, 2, 1], [1, 3, 0],
    ],
)  # fmt: skip
PARAMS = {
    "weights": torch.tensor([0.42, 0.33, 0.25], dtype=torch.float64),
    "probs": torch.tensor(
        [
            [[0.55, 0.25, 0.12, 0.08], [0.48, 0.31, 0.11, 0.1], [0.52, 0.29, 0.07, 0.12]],
            [[0.06, 0.14, 0.35, 0.45], [0.09, 0.16, 0.42, 0.33], [0.13, 0.11, 0.43, 0.33]],
            [[0.18, 0.43, 0.22, 0.17], [0.14, 0.27, 0.15, 0.44], [0.36, 0.34, 0.17, 0.13]],
        ],
        dtype=torch.float64,
    ),
}
CLASSES, ANSWERS = 2.2, torch.tensor([1.6, 2.1, 1.3, 2.8], dtype=torch.float64)  # of the Dirichlet priors


def model(x: Tensor) -> None:
    """Draw each row of answers x (N, D) from its class; K, D and C follow from the parameters."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    probs = pyro.param("probs", PARAMS["probs"], constraint=constraints.simplex)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Categorical(probs[z]).to_event(1), obs=x)


def model_with_prior(x: Tensor) -> None:
    """Draw the weights and the three classes' tables from Dirichlet laws, then the rows."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((3,), CLASSES)))
    probs = pyro.sample("probs", dist.Dirichlet(ANSWERS).expand([3, 3]).to_event(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Categorical(probs[z]).to_event(1), obs=x)


def item_table(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_nd | z_n = k), (N, K, D)."""
    return params["probs"].log()[:, torch.arange(x.shape[1]), x].transpose(0, 1)


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), (N, K)."""
    return params["weights"].log() + item_table(params, x).sum(2)


def e_step(params: Params, x: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K)."""
    return log_joint(params, x).softmax(1)


def soft_counts(resp: Tensor, x: Tensor) -> Tensor:
    """Return how often class k gave answer c to item d, (K, D, C)."""
    return torch.einsum("nk,ndc->kdc", resp, one_hot(x, 4).double())


def m_step(resp: Tensor, x: Tensor) -> Params:
    """Return the soft shares of the classes and of the answers in each."""
    return {"weights": resp.mean(0), "probs": soft_counts(resp, x) / resp.sum(0)[:, None, None]}


def log_likelihood(params: Params, x: Tensor) -> Tensor:
    """Return log p(x), summed over the rows."""
    return log_joint(params, x).logsumexp(1).sum()


def e_step_by_lookup(params: Params, x: Tensor) -> Tensor:
    """Return the responsibilities from products of looked up probabilities."""
    densities = params["weights"].expand(len(x), -1)
    for d in range(x.shape[1]):
        densities = densities * params["probs"][:, d, x[:, d]].T
    return densities / densities.sum(1, keepdim=True)


def m_step_by_loops(resp: Tensor, x: Tensor) -> Params:
    """Return the same shares, adding each row's responsibilities to its answers' cells."""
    counts = torch.zeros(resp.shape[1], x.shape[1], 4, dtype=resp.dtype)
    for r, row in zip(resp, x.tolist(), strict=True):
        for d, c in enumerate(row):
            counts[:, d, c] += r
    return {"weights": resp.sum(0) / resp.sum(), "probs": counts / counts.sum(2, keepdim=True)}


def halfway(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return a step that goes half of the way in all probabilities, in which Q is concave."""
    right = m_step(resp, x)
    return {**right, "probs": (right["probs"] + params["probs"]) / 2}


def m_step_with_prior(
    resp: Tensor, x: Tensor, classes: float = CLASSES - 1, answers: Tensor | float = ANSWERS - 1
) -> Params:
    """Return the modes of the Dirichlet posteriors: counts plus concentration less one, to sum one."""
    weights, probs = resp.sum(0) + classes, soft_counts(resp, x) + answers
    return {"weights": weights / weights.sum(), "probs": probs / probs.sum(2, keepdim=True)}


def softmax_step(resp: Tensor, x: Tensor, *, params: Params, diagonal: bool) -> Params:
    """Return new weights by one step of gradient ascent in their logits, the last logit held at 0.

    With ``diagonal``, the softmax's Jacobian has no entries between two free logits: right for two classes only. The
    step 1 / N is below one over the largest curvature, N / 2, so that the right one raises Q.
    """
    counts, weights = resp.sum(0), params["weights"]
    against = counts[:-1] + counts[-1] if diagonal else counts.sum()
    gradient = counts[:-1] - against * weights[:-1]
    logits = weights.log() - weights[-1].log()
    logits = torch.cat([logits[:-1] + gradient / len(x), logits[-1:]])
    return {**m_step(resp, x), "weights": logits.softmax(0)}


SUBJECT = Subject(model, PARAMS, (X,), e_step, m_step, log_likelihood)
MAP = replace(SUBJECT, model=model_with_prior, m_step=m_step_with_prior)
ONE_ITEM = replace(SUBJECT, params={**PARAMS, "probs": PARAMS["probs"][:, :1]}, data=(X[:, :1],))
TWO_CLASSES = replace(
    SUBJECT, params={"weights": torch.tensor([0.6, 0.4], dtype=torch.float64), "probs": PARAMS["probs"][:2]}
)


def items_averaged(params: Params, x: Tensor) -> Tensor:
    """Return responsibilities from the mean, not the sum, of the items' log probabilities."""
    return (params["weights"].log() + item_table(params, x).mean(2)).softmax(1)


def first_item(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return the first item's table for all items."""
    return right[:, :1].expand_as(right)


def diagonal_step(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return the step with the diagonal Jacobian."""
    return softmax_step(resp, x, params=params, diagonal=True)


def to_sum_one(table: Tensor) -> Tensor:
    """Return a table with its last axis divided by its sum."""
    return table / table.sum(-1, keepdim=True)


WRONG_PROBS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "answers smoothed by one": ("smoothed by 1", lambda right, r, x: to_sum_one(soft_counts(r, x) + 1)),
    "answers from hard classes": (
        "",
        lambda right, r, x: to_sum_one(soft_counts(one_hot(r.argmax(1), r.shape[1]).double(), x) + 1e-12),
    ),
    "the same table for all classes": (
        "unweighted",
        lambda right, r, x: to_sum_one(one_hot(x, 4).double().sum(0)).expand_as(right),
    ),
    "table over N": ("N for n", lambda right, r, x: soft_counts(r, x) / len(x)),
    "table to sum one over the classes": ("", lambda right, r, x: right / right.sum(0)),
    "items pooled": ("", lambda right, r, x: right.mean(1, keepdim=True).expand_as(right)),
    "responsibilities squared": ("", lambda right, r, x: to_sum_one(soft_counts(r.square(), x))),
    "answers counted from the far end": ("", lambda right, r, x: right.flip(2)),
    "classes exchanged": ("components in another order", lambda right, r, x: right.flip(0)),
    "classes and items exchanged": ("", lambda right, r, x: right.transpose(0, 1)),
    "shares through a softmax": ("", lambda right, r, x: right.softmax(2)),
    "one answer off by a millionth": (
        "",
        lambda right, r, x: to_sum_one(right + 1e-6 * right * one_hot(torch.tensor(0), 36).reshape(3, 3, 4)),
    ),
}
WRONG_MAP: dict[str, tuple[str, tuple[str, ...], Callable[[Tensor, Tensor], Params]]] = {
    "prior of the answers twice": (
        "prior counted 2 times",
        ("probs",),
        lambda r, x: m_step_with_prior(r, x, answers=2 * (ANSWERS - 1)),
    ),
    "posterior mean for mode": ("", ("probs",), lambda r, x: m_step_with_prior(r, x, answers=ANSWERS)),
    "posterior mean of the weights": ("", ("weights",), lambda r, x: m_step_with_prior(r, x, classes=CLASSES)),
    "one prior forgotten": ("", ("weights", "probs"), lambda r, x: m_step_with_prior(r, x, classes=0.0)),
}
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("responsibilities by look-up", replace(SUBJECT, e_step=e_step_by_lookup), "exact EM"),
    Entry("table by loops", replace(SUBJECT, m_step=m_step_by_loops), "exact EM"),
    Entry("half a step", replace(SUBJECT, m_step=halfway), "generalised EM"),
    Entry(
        "gradient step in the weights' logits",
        replace(SUBJECT, m_step=lambda r, x, *, params: softmax_step(r, x, params=params, diagonal=False)),
        "generalised EM",
    ),
    Entry("Dirichlet priors", MAP, "MAP-EM"),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_weights(SUBJECT),
    *wrong_reports(SUBJECT, log_joint),
    Entry(
        "items averaged",
        replace(SUBJECT, e_step=items_averaged),
        "wrong E-step",
        blind=replace(ONE_ITEM, e_step=items_averaged),
    ),
    Entry(
        "last item left out",
        replace(SUBJECT, e_step=lambda p, x: e_step({**p, "probs": p["probs"][:, :-1]}, x[:, :-1])),
        "wrong E-step",
    ),
    Entry(
        "weights added to the densities",
        replace(SUBJECT, e_step=lambda p, x: to_sum_one(p["weights"] + item_table(p, x).sum(2).exp())),
        "wrong E-step",
        source="JavierAntoran BNN #15",
    ),
    Entry(
        "Jacobian of the softmax taken as diagonal",
        replace(SUBJECT, m_step=diagonal_step),
        "wrong M-step",
        ("weights",),
        source="nlmixr2est #1054",
        blind=replace(TWO_CLASSES, m_step=diagonal_step),
    ),
    Entry(
        "weights through the softmax twice",
        replace_site(SUBJECT, "weights", lambda right, r, x: right.softmax(0)),
        "wrong M-step",
        ("weights",),
        source="nlmixr2est #1058",
    ),
    *(
        Entry(name, replace_site(SUBJECT, "probs", change), "wrong M-step", ("probs",), hint)
        for name, (hint, change) in WRONG_PROBS.items()
    ),
    Entry(
        "first item's table for all",
        replace_site(SUBJECT, "probs", first_item),
        "wrong M-step",
        ("probs",),
        blind=replace_site(ONE_ITEM, "probs", first_item),
    ),
    *(
        Entry(name, replace(MAP, m_step=wrong), "wrong M-step", sites, hint)
        for name, (hint, sites, wrong) in WRONG_MAP.items()
    ),
    Entry(
        "sum over the wrong axis",
        replace(SUBJECT, log_likelihood=lambda p, x: log_joint(p, x).logsumexp(0).sum()),
        "wrong report",
        source="edward PR #205",
    ),
    Entry(
        "bits for nats",
        replace(SUBJECT, log_likelihood=lambda p, x: log_likelihood(p, x) / torch.tensor(2.0).double().log()),
        "wrong report",
    ),
)
