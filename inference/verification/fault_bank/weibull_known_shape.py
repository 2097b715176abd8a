"""Weibull lifetimes of known shape: x_nd | z_n = k ~ Weibull(scales_kd, SHAPES_d), so (x / scale)^shape ~ Exp(1)."""

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

SHAPES = torch.tensor([1.8, 0.7], dtype=torch.float64)
X = torch.tensor(
    [
        [0.62, 3.17], [0.91, 8.46], [0.44, 1.29], [1.15, 5.73], [0.78, 12.8], [2.93, 0.21], [3.61, 0.08], [2.37, 0.54],
        [4.08, 0.13], [3.24, 0.95], [6.85, 2.42], [8.13, 0.67], [5.47, 4.31], [7.29, 1.86], [1.66, 1.04], [1.98, 6.12],
    ],
    dtype=torch.float64,
)  # fmt: skip
PARAMS = {
    "weights": torch.tensor([0.38, 0.34, 0.28], dtype=torch.float64),
    "scales": torch.tensor([[0.9, 5.2], [3.1, 0.45], [6.4, 2.3]], dtype=torch.float64),
}


def model(x: Tensor) -> None:
    """Draw each row of lifetimes x (N, D) from its component; K and D follow from the parameters."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    scales = pyro.param("scales", PARAMS["scales"], constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Weibull(scales[z], SHAPES[: x.shape[1]]).to_event(1), obs=x)


def log_density(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_nd | z_n = k), (N, K, D)."""
    shapes, scales, x = SHAPES[: x.shape[1]], params["scales"], x[:, None]
    return shapes.log() - shapes * scales.log() + (shapes - 1) * x.log() - (x / scales) ** shapes


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), (N, K)."""
    return params["weights"].log() + log_density(params, x).sum(2)


def e_step(params: Params, x: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K)."""
    return log_joint(params, x).softmax(1)


def m_step(resp: Tensor, x: Tensor) -> Params:
    """Return the soft shares, and the weighted power means of order shape."""
    counts, shapes = resp.sum(0), SHAPES[: x.shape[1]]
    return {"weights": counts / len(x), "scales": (resp.T @ x**shapes / counts[:, None]) ** (1 / shapes)}


def log_likelihood(params: Params, x: Tensor) -> Tensor:
    """Return log p(x), summed over the rows."""
    return log_joint(params, x).logsumexp(1).sum()


def e_step_by_hazards(params: Params, x: Tensor) -> Tensor:
    """Return the responsibilities from hazard times survival, one feature after the other."""
    densities = params["weights"].expand(len(x), -1)
    for d, shape in enumerate(SHAPES):
        scale, lifetime = params["scales"][:, d], x[:, d, None]
        hazard = shape / scale * (lifetime / scale) ** (shape - 1)
        densities = densities * hazard * (-((lifetime / scale) ** shape)).exp()
    return densities / densities.sum(1, keepdim=True)


def m_step_by_logs(resp: Tensor, x: Tensor) -> Params:
    """Return the same power means by way of a log-sum-exp."""
    log_shares = (resp.log() - resp.sum(0).log())[:, :, None]
    return {"weights": resp.mean(0), "scales": ((log_shares + SHAPES * x.log()[:, None]).logsumexp(0) / SHAPES).exp()}


def halfway(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return a step that goes half of the way in all scales; in each Q has no other maximum on the way."""
    right = m_step(resp, x)
    return {**right, "scales": (right["scales"] + params["scales"]) / 2}


def damped_weights(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return a step that goes nine tenths of the way in the weights, in which Q is concave."""
    right = m_step(resp, x)
    return {**right, "weights": 0.9 * right["weights"] + 0.1 * params["weights"]}


def means(resp: Tensor, x: Tensor) -> Tensor:
    """Return the weighted means, (K, D)."""
    return resp.T @ x / resp.sum(0)[:, None]


def first_shape(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return power means of the first feature's shape for all features."""
    return means(resp, x ** SHAPES[0]) ** (1 / SHAPES[0])


def features_alone(params: Params, x: Tensor) -> Tensor:
    """Return the mean over the features of each one's own responsibilities."""
    return (params["weights"].log()[:, None] + log_density(params, x)).softmax(1).mean(2)


def weighted_medians(resp: Tensor, x: Tensor) -> Tensor:
    """Return the smallest values with half of the weight at or below them, (K, D)."""
    values, order = x.sort(0)
    reached = resp[order].cumsum(0) >= resp.sum(0) / 2
    return values.T.gather(1, reached.double().argmax(0)).T


SUBJECT = Subject(model, PARAMS, (X,), e_step, m_step, log_likelihood)
ONE_FEATURE = replace(SUBJECT, params={**PARAMS, "scales": PARAMS["scales"][:, :1]}, data=(X[:, :1],))
WRONG_SCALES: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "power mean without its root": ("", lambda right, r, x: right**SHAPES),
    "means for scales": ("", lambda right, r, x: means(r, x)),
    "means over the gamma function": ("", lambda right, r, x: means(r, x) / (1 + 1 / SHAPES).lgamma().exp()),
    "powers of the means": ("", lambda right, r, x: means(r, x ** (1 / SHAPES)) ** SHAPES),
    "medians for scales": ("", lambda right, r, x: weighted_medians(r, x)),
    "rates for scales": ("reciprocal of scales for scales", lambda right, r, x: 1 / right),
    "over n - 1": (
        "",
        lambda right, r, x: (r.T @ x**SHAPES / (r.sum(0)[:, None] - 1)) ** (1 / SHAPES),
    ),
    "over N": ("", lambda right, r, x: (r.T @ x**SHAPES / len(x)) ** (1 / SHAPES)),
    "the same scales for all components": (
        "unweighted",
        lambda right, r, x: ((x**SHAPES).mean(0) ** (1 / SHAPES)).expand_as(right),
    ),
    "components exchanged": ("components in another order", lambda right, r, x: right.flip(0)),
    "one scale off by a millionth": ("", lambda right, r, x: right * (1 + 1e-6 * torch.eye(3, 2).to(right))),
    "a millionth added to the scales": ("1e-06 is added", lambda right, r, x: right + 1e-6),
}
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("responsibilities by hazards", replace(SUBJECT, e_step=e_step_by_hazards), "exact EM"),
    Entry("power means by logs", replace(SUBJECT, m_step=m_step_by_logs), "exact EM"),
    Entry("half a step", replace(SUBJECT, m_step=halfway), "generalised EM"),
    Entry("damped weights", replace(SUBJECT, m_step=damped_weights), "generalised EM"),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_weights(SUBJECT),
    *wrong_reports(SUBJECT, log_joint),
    Entry(
        "scale not taken to the power",
        replace(
            SUBJECT,
            e_step=lambda p, x: (
                log_joint(p, x) + ((x[:, None] / p["scales"]) ** SHAPES - x[:, None] ** SHAPES / p["scales"]).sum(2)
            ).softmax(1),
        ),
        "wrong E-step",
    ),
    Entry(
        "scale before the power forgotten",
        replace(SUBJECT, e_step=lambda p, x: (log_joint(p, x) + p["scales"].log().sum(1)).softmax(1)),
        "wrong E-step",
    ),
    Entry(
        "survival for density",
        replace(
            SUBJECT,
            e_step=lambda p, x: (p["weights"].log() - ((x[:, None] / p["scales"]) ** SHAPES).sum(2)).softmax(1),
        ),
        "wrong E-step",
    ),
    Entry(
        "rate taken for a scale",
        replace(SUBJECT, e_step=lambda p, x: e_step({**p, "scales": 1 / p["scales"]}, x)),
        "wrong E-step",
        hint="reciprocal of scales for scales",
    ),
    Entry(
        "each feature's responsibilities averaged",
        replace(SUBJECT, e_step=features_alone),
        "wrong E-step",
        blind=replace(ONE_FEATURE, e_step=features_alone),
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
    Entry(
        "shape before the power forgotten in the report",
        replace(SUBJECT, log_likelihood=lambda p, x: log_likelihood(p, x) - len(x) * SHAPES.log().sum()),
        "wrong report",
        hint="free of the parameters",
    ),
    Entry(
        "report after one more pass",
        replace(SUBJECT, log_likelihood=lambda p, x: log_likelihood(m_step(e_step(p, x), x), x)),
        "wrong report",
        source="zcurve #30",
    ),
)
