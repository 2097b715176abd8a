"""Positive features with Gaussian logarithms: log x_nd | z_n = k ~ Normal(locs_kd, scales_kd)."""

from __future__ import annotations

import math
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
        [0.42, 5.13], [0.77, 3.68], [0.31, 7.92], [0.58, 4.44], [1.12, 6.07], [0.66, 9.15], [3.84, 0.93], [5.27, 1.71],
        [2.93, 0.48], [7.11, 1.26], [4.36, 2.34], [11.8, 12.7], [19.3, 21.4], [8.64, 16.2], [14.9, 33.1],
    ],
    dtype=torch.float64,
)  # fmt: skip
PARAMS = {
    "weights": torch.tensor([0.42, 0.33, 0.25], dtype=torch.float64),
    "locs": torch.tensor([[-0.5, 1.7], [1.5, 0.2], [2.6, 2.9]], dtype=torch.float64),
    "scales": torch.tensor([[0.5, 0.4], [0.6, 0.7], [0.45, 0.55]], dtype=torch.float64),
}


def model(x: Tensor) -> None:
    """Draw each row of positive x (N, D) from its component; K and D follow from the parameters."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    locs = pyro.param("locs", PARAMS["locs"])
    scales = pyro.param("scales", PARAMS["scales"], constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.LogNormal(locs[z], scales[z]).to_event(1), obs=x)


def log_joint_of_logs(params: Params, x: Tensor) -> Tensor:
    """Return log p(log x_n, z_n = k), (N, K): the density of the logarithms."""
    standardised = (x.log()[:, None] - params["locs"]) / params["scales"]
    constant = params["scales"].log().sum(1) + x.shape[1] * math.log(2 * math.pi) / 2
    return params["weights"].log() - constant - standardised.square().sum(2) / 2


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), (N, K): that of the logarithms, times 1 / x."""
    return log_joint_of_logs(params, x) - x.log().sum(1, keepdim=True)


def e_step(params: Params, x: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K)."""
    return log_joint(params, x).softmax(1)


def m_step(resp: Tensor, x: Tensor) -> Params:
    """Return the weighted moments of the logarithms."""
    counts = resp.sum(0)
    locs = resp.T @ x.log() / counts[:, None]
    squares = (resp[:, :, None] * (x.log()[:, None] - locs).square()).sum(0)
    return {"weights": counts / len(x), "locs": locs, "scales": (squares / counts[:, None]).sqrt()}


def log_likelihood(params: Params, x: Tensor) -> Tensor:
    """Return log p(x), summed over the rows."""
    return log_joint(params, x).logsumexp(1).sum()


def e_step_on_logs(params: Params, x: Tensor) -> Tensor:
    """Return the responsibilities of the logarithms: the factor 1 / x is the same for all components and cancels."""
    return log_joint_of_logs(params, x).softmax(1)


def e_step_by_products(params: Params, x: Tensor) -> Tensor:
    """Return the responsibilities from the densities as textbooks print them."""
    locs, scales, rows = params["locs"], params["scales"], x[:, None]
    densities = torch.exp(-((rows.log() - locs) ** 2) / (2 * scales**2)) / (rows * scales * math.sqrt(2 * math.pi))
    joint = params["weights"] * densities.prod(2)
    return joint / joint.sum(1, keepdim=True)


def m_step_by_geometric_means(resp: Tensor, x: Tensor) -> Params:
    """Return the locs as logarithms of weighted geometric means, by products; the variances by moments."""
    shares = resp / resp.sum(0)
    geometric = (x[:, None] ** shares[:, :, None]).prod(0)
    second = shares.T @ x.log() ** 2
    return {"weights": resp.mean(0), "locs": geometric.log(), "scales": (second - geometric.log() ** 2).sqrt()}


def m_step_by_loops(resp: Tensor, x: Tensor) -> Params:
    """Return the same one by one, with logarithms of ratios."""
    locs, scales = torch.zeros(resp.shape[1], x.shape[1]).double(), torch.zeros(resp.shape[1], x.shape[1]).double()
    for k, column in enumerate(resp.T):
        for d, feature in enumerate(x.T):
            locs[k, d] = sum(r * v.log() for r, v in zip(column, feature, strict=True)) / column.sum()
            squares = sum(r * (v / locs[k, d].exp()).log() ** 2 for r, v in zip(column, feature, strict=True))
            scales[k, d] = math.sqrt(squares / column.sum())
    return {"weights": resp.mean(0), "locs": locs, "scales": scales}


def part_of_the_way(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return locs a third of the way, with the scales that are best about those."""
    right = m_step(resp, x)
    locs = params["locs"] + (right["locs"] - params["locs"]) / 3
    return {**right, "locs": locs, "scales": (right["scales"] ** 2 + (right["locs"] - locs) ** 2).sqrt()}


def moments(resp: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted means and variances of x itself, (K, D) both."""
    shares = (resp / resp.sum(0)).T
    return shares @ x, shares @ x**2 - (shares @ x) ** 2


def by_the_moments(resp: Tensor, x: Tensor) -> Params:
    """Return the parameters with the right mean and variance of x: the method of moments, not of likelihood."""
    mean, variance = moments(resp, x)
    squares = (variance / mean**2).log1p()
    return {"weights": resp.mean(0), "locs": mean.log() - squares / 2, "scales": squares.sqrt()}


def weighted_medians(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return the weighted medians of the logarithms, (K, D)."""
    order = x.argsort(0)
    below = resp[order].cumsum(0) < resp.sum(0) / 2
    return x.log().gather(0, order).gather(0, below.sum(0).T)


Change = Callable[[Tensor, Tensor, Tensor], Tensor]
SUBJECT = Subject(model, PARAMS, (X,), e_step, m_step, log_likelihood)
WRONG_LOCS: dict[str, tuple[str, Change]] = {
    "logarithm of the mean": ("", lambda right, r, x: moments(r, x)[0].log()),
    "mean of x": ("", lambda right, r, x: moments(r, x)[0]),
    "logarithm of the mean less half the variance": (
        "",
        lambda right, r, x: moments(r, x)[0].log() - m_step(r, x)["scales"] ** 2 / 2,
    ),
    "decimal logarithm": ("a factor of 0.434", lambda right, r, x: right / math.log(10)),
    "log of one plus x": ("", lambda right, r, x: r.T @ x.log1p() / r.sum(0)[:, None]),
    "median of the logarithms": ("", weighted_medians),
    "locs unweighted": ("unweighted", lambda right, r, x: x.log().mean(0).expand_as(right)),
    "locs over N": ("N for n", lambda right, r, x: r.T @ x.log() / len(x)),
    "locs left as exponentials": ("", lambda right, r, x: right.exp()),
    "locs of the next component": ("components in another order", lambda right, r, x: right.roll(1, 0)),
}
WRONG_SCALES: dict[str, tuple[str, Change]] = {
    "scales are variances": ("square of scales for scales", lambda right, r, x: right**2),
    "scales are precisions": ("reciprocal of scales for scales", lambda right, r, x: 1 / right),
    "variances over n - 1": ("n - 1 for n", lambda right, r, x: right * (r.sum(0) / (r.sum(0) - 1)).sqrt()[:, None]),
    "standard deviation of x": ("", lambda right, r, x: moments(r, x)[1].sqrt()),
    "log of the standard deviation": ("", lambda right, r, x: moments(r, x)[1].sqrt().log1p()),
    "coefficient of variation": ("", lambda right, r, x: moments(r, x)[1].sqrt() / moments(r, x)[0]),
    "one scale off by a millionth": (
        "",
        lambda right, r, x: right + 1e-6 * right * torch.eye(*right.shape, dtype=right.dtype),
    ),
}
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("responsibilities of the logarithms", replace(SUBJECT, e_step=e_step_on_logs), "exact EM"),
    Entry("responsibilities by products", replace(SUBJECT, e_step=e_step_by_products), "exact EM"),
    Entry("geometric means", replace(SUBJECT, m_step=m_step_by_geometric_means), "exact EM"),
    Entry("moments by loops", replace(SUBJECT, m_step=m_step_by_loops), "exact EM"),
    Entry("a third of a step", replace(SUBJECT, m_step=part_of_the_way), "generalised EM"),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_weights(SUBJECT),
    *wrong_reports(SUBJECT, log_joint),
    Entry(
        "Gaussian density of x itself",
        replace(SUBJECT, e_step=lambda p, x: e_step_on_logs(p, x.exp())),
        "wrong E-step",
    ),
    Entry(
        "variance taken for the scale",
        replace(SUBJECT, e_step=lambda p, x: e_step({**p, "scales": p["scales"] ** 2}, x)),
        "wrong E-step",
        hint="square of scales for scales",
    ),
    Entry(
        "scale of a component lost",
        replace(SUBJECT, e_step=lambda p, x: (log_joint(p, x) + p["scales"].log().sum(1)).softmax(1)),
        "wrong E-step",
    ),
    Entry(
        "Jacobian forgotten in the report",
        replace(SUBJECT, log_likelihood=lambda p, x: log_joint_of_logs(p, x).logsumexp(1).sum()),
        "wrong report",
        hint="free of the parameters",
    ),
    Entry(
        "Jacobian turned over in the report",
        replace(SUBJECT, log_likelihood=lambda p, x: log_likelihood(p, x) + 2 * x.log().sum()),
        "wrong report",
        hint="free of the parameters",
    ),
    Entry("method of moments", replace(SUBJECT, m_step=by_the_moments), "wrong M-step", ("locs", "scales")),
    *(
        Entry(name, replace_site(SUBJECT, site, change), "wrong M-step", (site,), hint)
        for site, changes in (("locs", WRONG_LOCS), ("scales", WRONG_SCALES))
        for name, (hint, change) in changes.items()
    ),
)
