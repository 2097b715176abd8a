"""Independent Student features with four degrees of freedom: x_nd | z_n = k ~ StudentT(4, locs_kd, scales_kd).

The generalised steps weigh each value by the expected precision behind it (Liu and Rubin 1995; Kent, Tyler and Vardi
1994 for the denominator that may be replaced).
"""

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
    wrong_e_steps,
    wrong_reports,
)
from mixproof.inference.verification.subject import Subject

Params = dict[str, Tensor]
DF = 4.0

X = torch.tensor(
    [
        [-1.32, 3.41], [-0.57, 2.18], [-2.11, 4.07], [-1.04, 2.92], [0.21, 3.63], [2.43, -0.66], [3.17, 0.94],
        [2.08, 0.31], [3.94, -1.45], [1.36, 0.12], [4.71, 5.22], [6.29, 6.83], [5.58, 4.36], [7.02, 5.91],
        [0.83, 1.57], [9.45, -3.26], [6.61, 8.74],
    ],
    dtype=torch.float64,
)  # fmt: skip
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
        pyro.sample("x", dist.StudentT(DF, locs[z], scales[z]).to_event(1), obs=x)


def squares(params: Params, x: Tensor) -> Tensor:
    """Return ((x_nd - locs_kd) / scales_kd)^2, (N, K, D)."""
    return ((x[:, None] - params["locs"]) / params["scales"]) ** 2


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), (N, K)."""
    constant = math.lgamma((DF + 1) / 2) - math.lgamma(DF / 2) - math.log(DF * math.pi) / 2
    terms = constant - params["scales"].log() - (DF + 1) / 2 * (squares(params, x) / DF).log1p()
    return params["weights"].log() + terms.sum(2)


def e_step(params: Params, x: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K)."""
    return log_joint(params, x).softmax(1)


def log_likelihood(params: Params, x: Tensor) -> Tensor:
    """Return log p(x), summed over the rows."""
    return log_joint(params, x).logsumexp(1).sum()


def precisions(params: Params, x: Tensor) -> Tensor:
    """Return the expected precision behind each value, given its component, (N, K, D)."""
    return (DF + 1) / (DF + squares(params, x))


def reweighted(resp: Tensor, x: Tensor, trust: Tensor, counts: Tensor | None = None) -> Params:
    """Return weighted moments with responsibilities times trust (N, K, D); the variances over counts, (K, 1)."""
    used = resp[:, :, None] * trust
    locs = (used * x[:, None]).sum(0) / used.sum(0)
    counts = resp.sum(0)[:, None] if counts is None else counts
    variances = (used * (x[:, None] - locs) ** 2).sum(0) / counts
    return {"weights": resp.mean(0), "locs": locs, "scales": variances.sqrt()}


def m_step(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return one reweighted step, for which the precisions behind x are missing data too."""
    return reweighted(resp, x, precisions(params, x))


def m_step_over_trust(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return the step with the variances over the summed precisions: the same limit, in fewer steps."""
    trust = precisions(params, x)
    return reweighted(resp, x, trust, (resp[:, :, None] * trust).sum(0))


def m_step_in_two_cycles(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return new locs, then precisions at those, then new scales about them."""
    locs = m_step(resp, x, params=params)["locs"]
    used = resp[:, :, None] * precisions({**params, "locs": locs}, x)
    variances = (used * (x[:, None] - locs) ** 2).sum(0) / resp.sum(0)[:, None]
    return {"weights": resp.mean(0), "locs": locs, "scales": variances.sqrt()}


def m_step_about_the_old_locs(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return the scales about the old locs, then the locs: a conditional maximisation."""
    used = resp[:, :, None] * precisions(params, x)
    variances = (used * (x[:, None] - params["locs"]) ** 2).sum(0) / resp.sum(0)[:, None]
    return {**m_step(resp, x, params=params), "scales": variances.sqrt()}


def m_step_by_loops(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return the same as ``m_step``, one by one."""
    locs, scales = torch.zeros_like(params["locs"]), torch.zeros_like(params["scales"])
    for k, column in enumerate(resp.T):
        for d, feature in enumerate(x.T):
            away = (feature - params["locs"][k, d]) / params["scales"][k, d]
            used = column * (DF + 1) / (DF + away * away)
            locs[k, d] = used @ feature / used.sum()
            scales[k, d] = (used @ (feature - locs[k, d]) ** 2 / column.sum()).sqrt()
    return {"weights": resp.mean(0), "locs": locs, "scales": scales}


def e_step_by_products(params: Params, x: Tensor) -> Tensor:
    """Return the responsibilities from the densities themselves; their constants cancel."""
    densities = (1 + squares(params, x) / DF) ** (-(DF + 1) / 2) / params["scales"]
    joint = params["weights"] * densities.prod(2)
    return joint / joint.sum(1, keepdim=True)


def m_step_to_the_end(resp: Tensor, x: Tensor) -> Params:
    """Return the limit of the steps at fixed responsibilities: the maximiser of Q, unique by Kent and Tyler (1991)."""
    params = reweighted(resp, x, torch.ones(*resp.shape, x.shape[1], dtype=x.dtype))
    for _ in range(300):
        params = m_step_over_trust(resp, x, params=params)
    return params


def with_trust(trust: Callable[[Params, Tensor], Tensor]) -> Subject:
    """Return the subject with other precisions in the M-step."""
    return replace(SUBJECT, m_step=lambda resp, x, *, params: reweighted(resp, x, trust(params, x)))


def changed(site: str, change: Callable[[Tensor, Tensor], Tensor]) -> Subject:
    """Return the subject with one site of the M-step changed: ``change(right, resp)``."""

    def wrong(resp: Tensor, x: Tensor, *, params: Params) -> Params:
        right = m_step(resp, x, params=params)
        return {**right, site: change(right[site], resp)}

    return replace(SUBJECT, m_step=wrong)


def one_feature(subject: Subject) -> Subject:
    """Return the subject with its first feature alone."""
    first = {"weights": PARAMS["weights"], "locs": PARAMS["locs"][:, :1], "scales": PARAMS["scales"][:, :1]}
    return replace(subject, params=first, data=(X[:, :1],))


def with_scales(change: Callable[[Tensor], Tensor]) -> Subject:
    """Return the subject with an E-step that takes ``change(scales)`` for the scales."""
    return replace(SUBJECT, e_step=lambda p, x: e_step({**p, "scales": change(p["scales"])}, x))


SUBJECT = Subject(model, PARAMS, (X,), e_step, m_step, log_likelihood)
JOINT_TRUST = with_trust(
    lambda p, x: ((DF + x.shape[1]) / (DF + squares(p, x).sum(2, keepdim=True))).expand(-1, -1, x.shape[1])
)
JOINT_DENSITY = replace(
    SUBJECT,
    e_step=lambda p, x: (
        p["weights"].log() - p["scales"].log().sum(1) - (DF + x.shape[1]) / 2 * (squares(p, x).sum(2) / DF).log1p()
    ).softmax(1),
)
SITES = ("locs", "scales")
ENTRIES = (
    Entry("as derived", SUBJECT, "generalised EM"),
    Entry("reweighted by loops", replace(SUBJECT, m_step=m_step_by_loops), "generalised EM"),
    Entry("responsibilities by products", replace(SUBJECT, e_step=e_step_by_products), "generalised EM"),
    Entry("variances over the summed precisions", replace(SUBJECT, m_step=m_step_over_trust), "generalised EM"),
    Entry("precisions twice a step", replace(SUBJECT, m_step=m_step_in_two_cycles), "generalised EM"),
    Entry("scales about the old locs", replace(SUBJECT, m_step=m_step_about_the_old_locs), "generalised EM"),
    Entry("reweighted to the end", replace(SUBJECT, m_step=m_step_to_the_end), "exact EM"),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_reports(SUBJECT, log_joint),
    Entry("Gaussian densities", replace(
        SUBJECT,
        e_step=lambda p, x: (p["weights"].log() - p["scales"].log().sum(1) - squares(p, x).sum(2) / 2).softmax(1),
    ), "wrong E-step"),
    Entry("density of a joint Student law", JOINT_DENSITY, "wrong E-step", blind=one_feature(JOINT_DENSITY)),
    Entry("exponent of half the degrees of freedom", replace(
        SUBJECT,
        e_step=lambda p, x: (
            p["weights"].log() - p["scales"].log().sum(1) - DF / 2 * (squares(p, x) / DF).log1p().sum(2)
        ).softmax(1)), "wrong E-step"),
    Entry("variance taken for the scale", with_scales(torch.square), "wrong E-step",
          hint="square of scales for scales"),
    Entry("gamma functions forgotten in the report", replace(
        SUBJECT, log_likelihood=lambda p, x: log_likelihood(p, x) - x.numel() * math.lgamma((DF + 1) / 2)
    ), "wrong report", hint="free of the parameters"),
    Entry("Gaussian M-step", with_trust(lambda p, x: torch.ones_like(squares(p, x))), "wrong M-step", SITES),
    Entry("degrees of freedom without the one", with_trust(lambda p, x: DF / (DF + squares(p, x))), "wrong M-step",
          ("scales",)),
    Entry("precisions squared", with_trust(lambda p, x: precisions(p, x) ** 2), "wrong M-step", SITES),
    Entry("precisions of a joint Student law", JOINT_TRUST, "wrong M-step", SITES, blind=one_feature(JOINT_TRUST)),
    Entry("precisions without the scales", with_trust(lambda p, x: (DF + 1) / (DF + (x[:, None] - p["locs"]) ** 2)),
          "wrong M-step", SITES),
    Entry("variances of the law for squared scales",
          changed("scales", lambda right, r: right * (DF / (DF - 2)) ** 0.5),
          "wrong M-step", ("scales",)),
    Entry("variances over n - 1",
          changed("scales", lambda right, r: right * (r.sum(0) / (r.sum(0) - 1)).sqrt()[:, None]),
          "wrong M-step", ("scales",)),
    Entry("scales are variances", changed("scales", lambda right, r: right**2), "wrong M-step", ("scales",)),
    Entry("scales off by a millionth",
          changed("scales", lambda right, r: right * (1 + 1e-6)), "wrong M-step", ("scales",)),
    Entry("locs of the next component", changed("locs", lambda right, r: right.roll(1, 0)), "wrong M-step", SITES),
    Entry("weights smoothed by one", changed("weights", lambda right, r: (r.sum(0) + 1) / (len(r) + 3)), "wrong M-step",
          ("weights",)),
)  # fmt: skip
