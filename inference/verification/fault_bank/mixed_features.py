"""Gaussian and yes-no columns side by side, as two arguments, with a plate of features inside the plate of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
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
        [-1.32, 3.41], [-0.57, 2.18], [-2.11, 4.07], [-1.04, 2.92], [0.21, 3.63], [2.43, -0.66], [3.17, 0.94],
        [2.08, 0.31], [3.94, -1.45], [1.36, 0.12], [4.71, 5.22], [6.29, 6.83], [5.58, 4.36], [7.02, 5.91],
    ],
    dtype=torch.float64,
)  # fmt: skip
Y = torch.tensor(
    [
        [1, 0, 1], [1, 1, 0], [1, 0, 0], [0, 0, 1], [1, 1, 1], [0, 1, 0], [0, 1, 1], [1, 0, 1], [0, 0, 0], [0, 1, 0],
        [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 0],
    ],
    dtype=torch.float64,
)  # fmt: skip
PARAMS = {
    "weights": torch.tensor([0.42, 0.33, 0.25], dtype=torch.float64),
    "locs": torch.tensor([[-0.8, 3.1], [2.6, -0.2], [5.7, 5.4]], dtype=torch.float64),
    "scales": torch.tensor([[0.9, 0.7], [1.2, 0.8], [1.1, 1.3]], dtype=torch.float64),
    "probs": torch.tensor([[0.8, 0.45, 0.6], [0.25, 0.6, 0.4], [0.7, 0.75, 0.35]], dtype=torch.float64),
}


def model(x: Tensor, y: Tensor) -> None:
    """Draw each row of x (N, D) and y (N, E) from one component; sizes follow from the parameters."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    locs = pyro.param("locs", PARAMS["locs"])
    scales = pyro.param("scales", PARAMS["scales"], constraint=constraints.positive)
    probs = pyro.param("probs", PARAMS["probs"], constraint=constraints.unit_interval)
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        with pyro.plate("measurements", x.shape[1], dim=-1) as d:
            pyro.sample("x", dist.Normal(Vindex(locs)[z, d], Vindex(scales)[z, d]), obs=x)
        with pyro.plate("answers", y.shape[1], dim=-1) as e:
            pyro.sample("y", dist.Bernoulli(Vindex(probs)[z, e]), obs=y)


def gaussian_part(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_nd | z_n = k), (N, K, D)."""
    standardised = (x[:, None] - params["locs"]) / params["scales"]
    return -(standardised**2) / 2 - params["scales"].log() - math.log(2 * math.pi) / 2


def bernoulli_part(params: Params, y: Tensor) -> Tensor:
    """Return log p(y_ne | z_n = k), (N, K, E)."""
    return y[:, None] * params["probs"].log() + (1 - y[:, None]) * (-params["probs"]).log1p()


def log_joint(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return log p(x_n, y_n, z_n = k), (N, K)."""
    return params["weights"].log() + gaussian_part(params, x).sum(2) + bernoulli_part(params, y).sum(2)


def e_step(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return p(z_n = k | x_n, y_n), (N, K)."""
    return log_joint(params, x, y).softmax(1)


def m_step(resp: Tensor, x: Tensor, y: Tensor) -> Params:
    """Return the soft shares, and the weighted means and standard deviations of either kind of column."""
    counts = resp.sum(0)
    locs = resp.T @ x / counts[:, None]
    variances = (resp[:, :, None] * (x[:, None] - locs) ** 2).sum(0) / counts[:, None]
    probs = resp.T @ y / counts[:, None]
    return {"weights": counts / len(x), "locs": locs, "scales": variances.sqrt(), "probs": probs}


def log_likelihood(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return log p(x, y), summed over the rows."""
    return log_joint(params, x, y).logsumexp(1).sum()


def e_step_in_two_updates(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the responsibilities given x, taken as the weights of a second update by y."""
    after_x = (params["weights"].log() + gaussian_part(params, x).sum(2)).softmax(1)
    joint = after_x * bernoulli_part(params, y).sum(2).exp()
    return joint / joint.sum(1, keepdim=True)


def e_step_by_odds(params: Params, x: Tensor, y: Tensor) -> Tensor:
    """Return the responsibilities with the answers' part linear in y: slopes are the log odds."""
    answers = y @ params["probs"].logit().T + (1 - params["probs"]).log().sum(1)
    return (params["weights"].log() + gaussian_part(params, x).sum(2) + answers).softmax(1)


def m_step_on_one_table(resp: Tensor, x: Tensor, y: Tensor) -> Params:
    """Return the same from the weighted means of all columns and of their squares at once."""
    columns = torch.cat([x, x**2, y], 1)
    means = torch.einsum("nk,nc->kc", resp / resp.sum(0), columns)
    locs, squares, probs = means.split([x.shape[1], x.shape[1], y.shape[1]], 1)
    return {"weights": resp.mean(0), "locs": locs, "scales": (squares - locs**2).sqrt(), "probs": probs}


def m_step_by_loops(resp: Tensor, x: Tensor, y: Tensor) -> Params:
    """Return the same, component by component."""
    locs, scales, probs = [], [], []
    for column in resp.T:
        locs.append((column[:, None] * x).sum(0) / column.sum())
        scales.append(((column[:, None] * (x - locs[-1]) ** 2).sum(0) / column.sum()).sqrt())
        probs.append(torch.stack([column[answers == 1].sum() for answers in y.T]) / column.sum())
    stacked = {"locs": torch.stack(locs), "scales": torch.stack(scales), "probs": torch.stack(probs)}
    return {"weights": resp.mean(0), **stacked}


def half_in_the_answers(resp: Tensor, x: Tensor, y: Tensor, *, params: Params) -> Params:
    """Return probabilities half of the way: Q is concave in them."""
    right = m_step(resp, x, y)
    return {**right, "probs": (right["probs"] + params["probs"]) / 2}


def old_locs_for_the_scales(resp: Tensor, x: Tensor, y: Tensor, *, params: Params) -> Params:
    """Return the scales about the old locs: a conditional maximisation (Meng and Rubin 1993)."""
    variances = (resp[:, :, None] * (x[:, None] - params["locs"]) ** 2).sum(0) / resp.sum(0)[:, None]
    return {**m_step(resp, x, y), "scales": variances.sqrt()}


def answers_never_updated(resp: Tensor, x: Tensor, y: Tensor, *, params: Params) -> Params:
    """Return the old probabilities: it rises, and stops where the likelihood still has a slope."""
    return {**m_step(resp, x, y), "probs": params["probs"]}


def one_column_each(subject: Subject) -> Subject:
    """Return the subject with one column of either kind."""
    params = {site: value if site == "weights" else value[:, :1] for site, value in PARAMS.items()}
    return replace(subject, params=params, data=(X[:, :1], Y[:, :1]))


def with_table(table: Callable[[Params, Tensor, Tensor], Tensor]) -> Subject:
    """Return the subject with the responsibilities of another table (N, K)."""
    return replace(SUBJECT, e_step=lambda p, x, y: table(p, x, y).softmax(1))


SUBJECT = Subject(model, PARAMS, (X, Y), e_step, m_step, log_likelihood)
AVERAGED = with_table(lambda p, x, y: p["weights"].log() + gaussian_part(p, x).mean(2) + bernoulli_part(p, y).mean(2))
ALL_ANSWERS = with_table(
    lambda p, x, y: (
        p["weights"].log()
        + gaussian_part(p, x).sum(2)
        + torch.where((y == 1).all(1, keepdim=True), p["probs"].prod(1).log(), (1 - p["probs"].prod(1)).log())
    )
)
ONE_PROB = replace_site(SUBJECT, "probs", lambda right, r, x, y: right.mean(1, keepdim=True).expand_as(right))
Change = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
WRONG_SITES: dict[str, tuple[str, str, Change]] = {
    "scales are variances": ("scales", "square of scales for scales", lambda right, r, x, y: right**2),
    "variances over n - 1": (
        "scales",
        "n - 1 for n",
        lambda right, r, x, y: right * (r.sum(0) / (r.sum(0) - 1)).sqrt()[:, None],
    ),
    "scales of the answers": (
        "scales",
        "",
        lambda right, r, x, y: (m_step(r, x, y)["probs"] * (1 - m_step(r, x, y)["probs"])).sqrt()[:, : x.shape[1]],
    ),
    "locs over N": ("locs", "N for n", lambda right, r, x, y: r.T @ x / len(x)),
    "locs unweighted": ("locs", "unweighted", lambda right, r, x, y: x.mean(0).expand_as(right)),
    "probabilities smoothed by one": (
        "probs",
        "smoothed by 1",
        lambda right, r, x, y: (r.T @ y + 1) / (r.sum(0)[:, None] + 2),
    ),
    "probabilities over N": ("probs", "N for n", lambda right, r, x, y: r.T @ y / len(y)),
    "probabilities transposed": ("probs", "transposed", lambda right, r, x, y: right.T),
    "probabilities of zeros": ("probs", "", lambda right, r, x, y: 1 - right),
    "probabilities kept from the edge": ("probs", "", lambda right, r, x, y: right * (1 - 2e-6) + 1e-6),
    "probabilities from the largest responsibilities": (
        "probs",
        "",
        lambda right, r, x, y: 0.01 + 0.98 * (h := (r == r.amax(1, True)).to(x)).T @ y / h.sum(0)[:, None].clamp_min(1),
    ),
    "probabilities of the next component": (
        "probs",
        "components in another order",
        lambda right, r, x, y: right.roll(1, 0),
    ),
    "one probability off by a millionth": (
        "probs",
        "",
        lambda right, r, x, y: right - 1e-6 * right * torch.eye(*right.shape, dtype=right.dtype),
    ),
}  # fmt: skip
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("responsibilities in two updates", replace(SUBJECT, e_step=e_step_in_two_updates), "exact EM"),
    Entry("responsibilities by log odds", replace(SUBJECT, e_step=e_step_by_odds), "exact EM"),
    Entry("all columns in one table", replace(SUBJECT, m_step=m_step_on_one_table), "exact EM"),
    Entry("component by component", replace(SUBJECT, m_step=m_step_by_loops), "exact EM"),
    Entry("half a step in the answers", replace(SUBJECT, m_step=half_in_the_answers), "generalised EM"),
    Entry("scales about the old locs", replace(SUBJECT, m_step=old_locs_for_the_scales), "generalised EM"),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_weights(SUBJECT),
    *wrong_reports(SUBJECT, log_joint),
    Entry("answers left out of the E-step", with_table(lambda p, x, y: p["weights"].log() + gaussian_part(p, x).sum(2)),
          "wrong E-step"),
    Entry("measurements left out of the E-step",
          with_table(lambda p, x, y: p["weights"].log() + bernoulli_part(p, y).sum(2)),
          "wrong E-step"),
    Entry("weights once for each kind", with_table(lambda p, x, y: log_joint(p, x, y) + p["weights"].log()),
          "wrong E-step", hint="weights are counted twice"),
    Entry("columns of a kind averaged", AVERAGED, "wrong E-step", blind=one_column_each(AVERAGED)),
    Entry("answers taken together", ALL_ANSWERS, "wrong E-step", blind=one_column_each(ALL_ANSWERS)),
    Entry("kinds mixed apart in the report", replace(
        SUBJECT,
        log_likelihood=lambda p, x, y: (p["weights"].log() + gaussian_part(p, x).sum(2)).logsumexp(1).sum()
        + (p["weights"].log() + bernoulli_part(p, y).sum(2)).logsumexp(1).sum(),
    ), "wrong report"),
    Entry("answers left out of the report", replace(
        SUBJECT, log_likelihood=lambda p, x, y: (p["weights"].log() + gaussian_part(p, x).sum(2)).logsumexp(1).sum()
    ), "wrong report"),
    Entry("one probability for all answers", ONE_PROB, "wrong M-step", ("probs",), blind=one_column_each(ONE_PROB)),
    Entry("answers never updated", replace(SUBJECT, m_step=answers_never_updated), "wrong M-step", ("probs",)),
    *(
        Entry(name, replace_site(SUBJECT, site, change), "wrong M-step", (site,), hint)
        for name, (site, hint, change) in WRONG_SITES.items()
    ),
)  # fmt: skip
