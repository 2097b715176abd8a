"""Independent Gaussian features: x_nd | z_n = k ~ Normal(locs_kd, scales_kd), with scales the standard deviations."""

from __future__ import annotations

import math
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
        [-1.32, 3.41], [-0.57, 2.18], [-2.11, 4.07], [-1.04, 2.92], [0.21, 3.63], [2.43, -0.66], [3.17, 0.94],
        [2.08, 0.31], [3.94, -1.45], [1.36, 0.12], [4.71, 5.22], [6.29, 6.83], [5.58, 4.36], [7.02, 5.91],
    ],
    dtype=torch.float64,
)  # fmt: skip
OVERLAPPING = torch.tensor(
    [
        [2.82, 4.53], [2.97, 1.03], [1.3, 0.29], [4.41, 2.89], [1.02, 1.77], [5.68, 7.83], [-2.79, 1.5],
        [1.57, 2.38], [0.86, 2.0], [0.64, 4.78], [-0.32, 4.14], [-1.42, 3.54], [-2.92, 2.39], [0.98, 0.15],
        [0.21, 2.25], [1.42, 1.85], [1.48, 1.69], [-1.89, 3.1], [2.69, 0.28], [5.05, 3.87], [-1.12, 6.09],
        [-0.85, 0.74], [-2.16, 1.86], [1.64, 1.72],
    ],
    dtype=torch.float64,
)  # fmt: skip
"""Rows whose responsibilities at the mode are soft: at hard ones a second E-step changes nothing."""
PARAMS = {
    "weights": torch.tensor([0.42, 0.33, 0.25], dtype=torch.float64),
    "locs": torch.tensor([[-0.8, 3.1], [2.6, -0.2], [5.7, 5.4]], dtype=torch.float64),
    "scales": torch.tensor([[0.9, 0.7], [1.2, 0.8], [1.1, 1.3]], dtype=torch.float64),
}


def model(x: Tensor) -> None:
    """Draw each row of x (N, D) from its component; K and D follow from the parameters."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    locs = pyro.param("locs", PARAMS["locs"])
    scales = pyro.param("scales", PARAMS["scales"], constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[z], scales[z]).to_event(1), obs=x)


def standardised(params: Params, x: Tensor) -> Tensor:
    """Return (x_nd - locs_kd) / scales_kd, (N, K, D)."""
    return (x[:, None] - params["locs"]) / params["scales"]


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), (N, K)."""
    constant = params["scales"].log().sum(1) + x.shape[1] * math.log(2 * math.pi) / 2
    return params["weights"].log() - constant - standardised(params, x).square().sum(2) / 2


def e_step(params: Params, x: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K)."""
    return log_joint(params, x).softmax(1)


def variances_about(centres: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return the weighted mean squares about centres (K, D), (K, D)."""
    return (resp[:, :, None] * (x[:, None] - centres).square()).sum(0) / resp.sum(0)[:, None]


def m_step(resp: Tensor, x: Tensor) -> Params:
    """Return the soft shares, the weighted means, and the weighted standard deviations about them."""
    counts = resp.sum(0)
    locs = resp.T @ x / counts[:, None]
    return {"weights": counts / len(x), "locs": locs, "scales": variances_about(locs, resp, x).sqrt()}


def log_likelihood(params: Params, x: Tensor) -> Tensor:
    """Return log p(x), summed over the rows."""
    return log_joint(params, x).logsumexp(1).sum()


def e_step_by_products(params: Params, x: Tensor) -> Tensor:
    """Return the responsibilities from the densities themselves; the powers of 2 pi cancel."""
    densities = (torch.exp(-(standardised(params, x) ** 2) / 2) / params["scales"]).prod(2) * params["weights"]
    return densities / densities.sum(1, keepdim=True)


def m_step_by_moments(resp: Tensor, x: Tensor) -> Params:
    """Return the same through E[x^2] - E[x]^2."""
    shares = resp / resp.sum(0)
    locs = torch.einsum("nk,nd->kd", shares, x)
    return {"weights": resp.mean(0), "locs": locs, "scales": (shares.T @ x**2 - locs**2).sqrt()}


def m_step_by_pairs(resp: Tensor, x: Tensor) -> Params:
    """Return the variances as half the mean squared difference of two draws, without a mean."""
    shares = resp / resp.sum(0)
    differences = (x[:, None] - x).square()
    variances = torch.einsum("nk,mk,nmd->kd", shares, shares, differences) / 2
    return {"weights": resp.mean(0), "locs": shares.T @ x, "scales": variances.sqrt()}


def m_step_with_one_old_factor(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return the variances as E[(x - old)(x - new)]: equal to E[(x - new)^2], because E[x - new] = 0."""
    right = m_step(resp, x)
    products = (x[:, None] - params["locs"]) * (x[:, None] - right["locs"])
    variances = (resp[:, :, None] * products).sum(0) / resp.sum(0)[:, None]
    return {**right, "scales": variances.sqrt()}


def about_the_old_means(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return a conditional maximisation: first the scales at the old means, then the means (Meng and Rubin 1993)."""
    return {**m_step(resp, x), "scales": variances_about(params["locs"], resp, x).sqrt()}


def half_in_the_logarithm(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return scales half of the way in log scale, in which Q is concave at fixed means."""
    right = m_step(resp, x)
    return {**right, "scales": (right["scales"] * params["scales"]).sqrt()}


def half_of_the_means(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return means half of the way, and the scales that are best about those."""
    right = m_step(resp, x)
    locs = (right["locs"] + params["locs"]) / 2
    return {**right, "locs": locs, "scales": variances_about(locs, resp, x).sqrt()}


def responsibilities_refreshed(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return scales at responsibilities taken again after the means: two cycles of ECM (Meng and Rubin 1993, 3)."""
    right = m_step(resp, x)
    again = e_step({**right, "scales": params["scales"]}, x)
    return {**right, "scales": variances_about(right["locs"], again, x).sqrt()}


def scales_never_updated(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return the old scales: it rises, and stops where the likelihood still has a slope."""
    return {**m_step(resp, x), "scales": params["scales"]}


def medians(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return the weighted medians, (K, D)."""
    order = x.argsort(0)
    below = resp[order].cumsum(0) < resp.sum(0) / 2  # (N, D, K)
    return x.gather(0, order).gather(0, below.sum(0).T)


def hard_means(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return the means of the rows that each component is likeliest for; its old mean where there are none."""
    hard = torch.nn.functional.one_hot(resp.argmax(1), resp.shape[1]).to(x)
    return torch.where(hard.sum(0)[:, None] > 0, hard.T @ x / hard.sum(0)[:, None].clamp_min(1), right)


def one_feature(subject: Subject) -> Subject:
    """Return the subject with its first feature alone."""
    first = {"weights": PARAMS["weights"], "locs": PARAMS["locs"][:, :1], "scales": PARAMS["scales"][:, :1]}
    return replace(subject, params=first, data=(X[:, :1],))


def with_scales(change) -> Subject:  # type: ignore[no-untyped-def]
    """Return the subject with an E-step that takes ``change(scales)`` for the scales."""
    return replace(SUBJECT, e_step=lambda p, x: e_step({**p, "scales": change(p["scales"])}, x))


def millionth(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return the right value with one coordinate off by a millionth of itself."""
    off = torch.ones_like(right)
    off[0, -1] += 1e-6
    return right * off


SUBJECT = Subject(model, PARAMS, (X,), e_step, m_step, log_likelihood)
DISTANCE_MEAN = replace(
    SUBJECT,
    e_step=lambda p, x: (
        p["weights"].log() - p["scales"].log().sum(1) - standardised(p, x).square().mean(2) / 2
    ).softmax(1),
)
LOG_OF_SUM = replace(
    SUBJECT,
    e_step=lambda p, x: (
        p["weights"].log() - p["scales"].sum(1).log() - standardised(p, x).square().sum(2) / 2
    ).softmax(1),
)
POOLED = replace_site(
    SUBJECT, "scales", lambda right, r, x: right.square().mean(1, keepdim=True).sqrt().expand(-1, x.shape[1])
)
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("responsibilities by products", replace(SUBJECT, e_step=e_step_by_products), "exact EM"),
    Entry("variances by moments", replace(SUBJECT, m_step=m_step_by_moments), "exact EM"),
    Entry("variances by pairs of rows", replace(SUBJECT, m_step=m_step_by_pairs), "exact EM"),
    Entry("one factor about the old mean", replace(SUBJECT, m_step=m_step_with_one_old_factor), "exact EM"),
    Entry("scales about the old means", replace(SUBJECT, m_step=about_the_old_means), "generalised EM"),
    Entry("half a step in the log scales", replace(SUBJECT, m_step=half_in_the_logarithm), "generalised EM"),
    Entry("half a step in the means", replace(SUBJECT, m_step=half_of_the_means), "generalised EM"),
    Entry(
        "responsibilities taken again",
        replace(SUBJECT, data=(OVERLAPPING,), m_step=responsibilities_refreshed),
        "generalised EM",
    ),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_weights(SUBJECT),
    *wrong_reports(SUBJECT, log_joint),
    Entry(
        "variance taken for the scale", with_scales(torch.square), "wrong E-step", hint="square of scales for scales"
    ),
    Entry("root of the scale", with_scales(torch.sqrt), "wrong E-step", hint="square root of scales for scales"),
    Entry("precision for scale", with_scales(torch.reciprocal), "wrong E-step", hint="reciprocal of scales for scales"),
    Entry("mean over the features", DISTANCE_MEAN, "wrong E-step", blind=one_feature(DISTANCE_MEAN)),
    Entry("log of the summed scales", LOG_OF_SUM, "wrong E-step", blind=one_feature(LOG_OF_SUM)),
    Entry(
        "weights added to the densities",
        replace(
            SUBJECT, e_step=lambda p, x: (p["weights"] + (log_joint(p, x) - p["weights"].log()).exp()).log().softmax(1)
        ),
        "wrong E-step",
        source="JavierAntoran Bayesian-Neural-Networks #15",
    ),
    Entry(
        "normaliser without its square root",
        replace(SUBJECT, e_step=lambda p, x: (log_joint(p, x) - p["scales"].log().sum(1)).softmax(1)),
        "wrong E-step",
    ),
    Entry(
        "2 pi forgotten in the report",
        replace(SUBJECT, log_likelihood=lambda p, x: log_likelihood(p, x) + x.numel() * math.log(2 * math.pi) / 2),
        "wrong report",
        hint="free of the parameters",
    ),
    Entry(
        "negative log likelihood",
        replace(SUBJECT, log_likelihood=lambda p, x: -log_likelihood(p, x)),
        "wrong report",
        hint="a factor of -1",
    ),
    Entry(
        "log likelihood of normalised responsibilities",
        replace(SUBJECT, log_likelihood=lambda p, x: e_step(p, x).sum(1).log().sum()),
        "wrong report",
        source="Bios8366 #9, gaussian_mixture_models #2, em-gaussian #2",
    ),
    Entry(
        "summed over the rows before the components",
        replace(SUBJECT, log_likelihood=lambda p, x: log_joint(p, x).logsumexp(0).sum()),
        "wrong report",
        source="edward PR #205, cpnest PR #83",
    ),
    Entry(
        "scales are variances",
        replace_site(SUBJECT, "scales", lambda right, r, x: right**2),
        "wrong M-step",
        ("scales",),
        "square of scales for scales",
    ),
    Entry(
        "root taken twice",
        replace_site(SUBJECT, "scales", lambda right, r, x: right.sqrt()),
        "wrong M-step",
        ("scales",),
        "square root of scales for scales",
    ),
    Entry(
        "scales are precisions",
        replace_site(SUBJECT, "scales", lambda right, r, x: 1 / right),
        "wrong M-step",
        ("scales",),
        "reciprocal of scales for scales",
    ),
    Entry(
        "variances over n - 1",
        replace_site(SUBJECT, "scales", lambda right, r, x: right * (r.sum(0) / (r.sum(0) - 1)).sqrt()[:, None]),
        "wrong M-step",
        ("scales",),
        "n - 1 for n",
    ),
    Entry(
        "a floor under the variances",
        replace_site(SUBJECT, "scales", lambda right, r, x: (right**2 + 1e-6).sqrt()),
        "wrong M-step",
        ("scales",),
    ),
    Entry(
        "a floor under the scales",
        replace_site(SUBJECT, "scales", lambda right, r, x: right + 1e-6),
        "wrong M-step",
        ("scales",),
        "1e-06 is added",
    ),
    Entry(
        "variances about the overall mean",
        replace_site(SUBJECT, "scales", lambda right, r, x: variances_about(x.mean(0), r, x).sqrt()),
        "wrong M-step",
        ("scales",),
    ),
    Entry("one scale for all features", POOLED, "wrong M-step", ("scales",), blind=one_feature(POOLED)),
    Entry("scales never updated", replace(SUBJECT, m_step=scales_never_updated), "wrong M-step", ("scales",)),
    Entry(
        "scales of the next component",
        replace_site(SUBJECT, "scales", lambda right, r, x: right.roll(1, 0)),
        "wrong M-step",
        ("scales",),
        "components in another order",
    ),
    Entry("one scale off by a millionth", replace_site(SUBJECT, "scales", millionth), "wrong M-step", ("scales",)),
    Entry("medians", replace_site(SUBJECT, "locs", medians), "wrong M-step", ("locs",), "median for mean"),
    Entry("hard means", replace_site(SUBJECT, "locs", hard_means), "wrong M-step", ("locs",), "hard assignments"),
    Entry("one mean off by a millionth", replace_site(SUBJECT, "locs", millionth), "wrong M-step", ("locs",)),
)
