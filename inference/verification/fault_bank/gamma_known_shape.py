"""Gamma laws of known shape: x_nd | z_n = k ~ Gamma(SHAPES_d, scale scales_kd), so with mean SHAPES_d scales_kd."""

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

SHAPES = torch.tensor([3.2, 1.4], dtype=torch.float64)
X = torch.tensor(
    [
        [1.12, 5.31], [0.74, 3.88], [1.93, 7.42], [1.38, 2.05], [0.91, 4.67], [5.24, 0.42], [6.81, 0.93], [4.37, 0.18],
        [7.66, 1.35], [5.92, 0.77], [13.1, 2.91], [9.85, 4.13], [16.4, 1.82], [11.7, 6.24], [2.58, 1.49],
    ],
    dtype=torch.float64,
)  # fmt: skip
PARAMS = {
    "weights": torch.tensor([0.36, 0.4, 0.24], dtype=torch.float64),
    "scales": torch.tensor([[0.41, 3.1], [1.7, 0.6], [3.6, 2.4]], dtype=torch.float64),
}
ALPHA, BETA = 2.6, 1.9  # of the prior: scales_kd ~ InverseGamma(ALPHA, BETA)


def model(x: Tensor) -> None:
    """Draw each row x (N, D) from its component; K and D follow from the parameters."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    scales = pyro.param("scales", PARAMS["scales"], constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Gamma(SHAPES[: x.shape[1]], 1 / scales[z]).to_event(1), obs=x)


def model_with_prior(x: Tensor) -> None:
    """Draw the three components' scales from an inverse gamma law, then the rows."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    scales = pyro.sample("scales", dist.InverseGamma(ALPHA, BETA).expand([3, 2]).to_event(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Gamma(SHAPES, 1 / scales[z]).to_event(1), obs=x)


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), (N, K)."""
    shapes = SHAPES[: x.shape[1]]
    free = ((shapes - 1) * x.log() - shapes.lgamma()).sum(1, keepdim=True)
    return params["weights"].log() - params["scales"].log() @ shapes - x @ (1 / params["scales"]).T + free


def e_step(params: Params, x: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K)."""
    return log_joint(params, x).softmax(1)


def m_step(resp: Tensor, x: Tensor) -> Params:
    """Return the soft shares, and the weighted means over the shapes."""
    counts = resp.sum(0)
    return {"weights": counts / len(x), "scales": resp.T @ x / (counts[:, None] * SHAPES[: x.shape[1]])}


def log_likelihood(params: Params, x: Tensor) -> Tensor:
    """Return log p(x), summed over the rows."""
    return log_joint(params, x).logsumexp(1).sum()


def e_step_by_products(params: Params, x: Tensor) -> Tensor:
    """Return the responsibilities from s^-a e^(-x / s); what is common to all components cancels."""
    densities = params["weights"] * (params["scales"] ** -SHAPES * (-x[:, None] / params["scales"]).exp()).prod(2)
    return densities / densities.sum(1, keepdim=True)


def m_step_by_rates(resp: Tensor, x: Tensor) -> Params:
    """Return one over the rates, shape times count over total."""
    rates = [SHAPES * column.sum() / (column[:, None] * x).sum(0) for column in resp.T]
    return {"weights": resp.mean(0), "scales": 1 / torch.stack(rates)}


def halfway(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return the geometric means of old and new scales; in each Q has no other maximum on the way."""
    right = m_step(resp, x)
    return {**right, "scales": (right["scales"] * params["scales"]).sqrt()}


def m_step_with_prior(resp: Tensor, x: Tensor, alpha: float = ALPHA + 1, beta: float = BETA) -> Params:
    """Return the mode of each inverse gamma posterior, (total + BETA) / (count shape + ALPHA + 1)."""
    counts = resp.sum(0)
    return {"weights": counts / len(x), "scales": (resp.T @ x + beta) / (counts[:, None] * SHAPES + alpha)}


def first_shape(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return scales as if the first feature's shape were that of all."""
    return resp.T @ x / (resp.sum(0)[:, None] * SHAPES[0])


def variance(resp: Tensor, x: Tensor) -> Tensor:
    """Return the weighted variances, (K, D)."""
    counts = resp.sum(0)[:, None]
    return resp.T @ x.square() / counts - (resp.T @ x / counts).square()


SUBJECT = Subject(model, PARAMS, (X,), e_step, m_step, log_likelihood)
MAP = replace(SUBJECT, model=model_with_prior, m_step=m_step_with_prior)
ONE_FEATURE = replace(SUBJECT, params={**PARAMS, "scales": PARAMS["scales"][:, :1]}, data=(X[:, :1],))
WRONG_SCALES: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "rates for scales": ("reciprocal of scales for scales", lambda right, r, x: 1 / right),
    "means for scales": ("", lambda right, r, x: right * SHAPES),
    "over n - 1": ("n - 1 for n", lambda right, r, x: r.T @ x / ((r.sum(0) - 1)[:, None] * SHAPES)),
    "over N": ("N for n", lambda right, r, x: r.T @ x / (len(x) * SHAPES)),
    "the same scales for all components": ("unweighted", lambda right, r, x: (x.mean(0) / SHAPES).expand_as(right)),
    "moments: variance over mean": ("", lambda right, r, x: variance(r, x) / (right * SHAPES)),
    "moments: root of variance over shape": ("", lambda right, r, x: (variance(r, x) / SHAPES).sqrt()),
    "geometric means over shapes": ("", lambda right, r, x: (r.T @ x.log() / r.sum(0)[:, None]).exp() / SHAPES),
    "shape less one": ("", lambda right, r, x: right * SHAPES / (SHAPES - 1)),
    "twice the scales, as of a chi-squared law": ("a factor of 2", lambda right, r, x: 2 * right),
    "components exchanged": ("components in another order", lambda right, r, x: right.flip(0)),
    "a millionth added to the scales": ("1e-06 is added", lambda right, r, x: right + 1e-6),
}
WRONG_MAP: dict[str, tuple[str, Callable[[Tensor, Tensor], Params]]] = {
    "prior twice": ("prior counted 2 times", lambda r, x: m_step_with_prior(r, x, 2 * ALPHA + 2, 2 * BETA)),
    "posterior mean for mode": ("", lambda r, x: m_step_with_prior(r, x, ALPHA - 1)),
    "mode of the logarithms": ("", lambda r, x: m_step_with_prior(r, x, ALPHA)),
    "prior's scale forgotten": ("", lambda r, x: m_step_with_prior(r, x, beta=0.0)),
}
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("responsibilities by products", replace(SUBJECT, e_step=e_step_by_products), "exact EM"),
    Entry("scales by rates", replace(SUBJECT, m_step=m_step_by_rates), "exact EM"),
    Entry("half a step", replace(SUBJECT, m_step=halfway), "generalised EM"),
    Entry("inverse gamma prior", MAP, "MAP-EM"),
    Entry("maximum likelihood beside a prior", replace(MAP, m_step=m_step), "exact EM"),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_weights(SUBJECT),
    *wrong_reports(SUBJECT, log_joint),
    Entry(
        "scale taken for a rate",
        replace(SUBJECT, e_step=lambda p, x: e_step({**p, "scales": 1 / p["scales"]}, x)),
        "wrong E-step",
        hint="reciprocal of scales for scales",
    ),
    Entry(
        "scale's power in the density forgotten",
        replace(SUBJECT, e_step=lambda p, x: (log_joint(p, x) + p["scales"].log() @ SHAPES).softmax(1)),
        "wrong E-step",
    ),
    Entry(
        "scale's power in the density one, not the shape",
        replace(SUBJECT, e_step=lambda p, x: (log_joint(p, x) + p["scales"].log() @ (SHAPES - 1)).softmax(1)),
        "wrong E-step",
        source="nlmixr2est #912",
    ),
    *(
        Entry(name, replace_site(SUBJECT, "scales", change), "wrong M-step", ("scales",), hint)
        for name, (hint, change) in WRONG_SCALES.items()
    ),
    Entry(
        "first feature's shape for all",
        replace_site(SUBJECT, "scales", first_shape),
        "wrong M-step",
        ("scales",),
        blind=replace_site(ONE_FEATURE, "scales", first_shape),
    ),
    *(
        Entry(name, replace(MAP, m_step=wrong), "wrong M-step", ("scales",), hint)
        for name, (hint, wrong) in WRONG_MAP.items()
    ),
    Entry(
        "gamma function forgotten in the report",
        replace(SUBJECT, log_likelihood=lambda p, x: log_likelihood(p, x) + len(x) * SHAPES.lgamma().sum()),
        "wrong report",
        hint="free of the parameters",
    ),
    Entry(
        "twice the log likelihood",
        replace(SUBJECT, log_likelihood=lambda p, x: 2 * log_likelihood(p, x)),
        "wrong report",
        hint="a factor of 2",
    ),
)
