"""Components whose weights depend on a covariate: softmax regression, and Gaussian features.

Row n has weights softmax(covariates_n @ [gating, 0]): the last component is the reference, gating is (C, K - 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.verification.fault_bank.entry import Entry, replace_site
from mixproof.inference.verification.subject import Subject

Params = dict[str, Tensor]

X = torch.tensor(
    [
        [-1.32, 3.41], [-0.57, 2.18], [-2.11, 4.07], [-1.04, 2.92], [0.21, 3.63], [2.43, -0.66], [3.17, 0.94],
        [2.08, 0.31], [3.94, -1.45], [1.36, 0.12], [4.71, 5.22], [6.29, 6.83], [5.58, 4.36], [7.02, 5.91],
        [1.9, 1.7], [3.8, 3.2],
    ],
    dtype=torch.float64,
)  # fmt: skip
AGES = [-0.83, 1.14, -1.27, 0.46, -0.19, 0.71, -0.52, 1.63, 0.28, -1.05, 0.93, 1.48, -0.37, 0.64, -1.41, 0.09]
COVARIATES = torch.tensor([[1.0, age] for age in AGES], dtype=torch.float64)
PARAMS = {
    "gating": torch.tensor([[0.6, 0.3], [-0.7, 0.4]], dtype=torch.float64),
    "locs": torch.tensor([[-0.8, 3.1], [2.6, -0.2], [5.7, 5.4]], dtype=torch.float64),
    "scales": torch.tensor([[0.9, 0.7], [1.2, 0.8], [1.1, 1.3]], dtype=torch.float64),
}


def logits(gating: Tensor, covariates: Tensor) -> Tensor:
    """Return the logits of the weights, (N, K), zero for the last component."""
    return torch.nn.functional.pad(covariates @ gating, (0, 1))


def model(x: Tensor, covariates: Tensor) -> None:
    """Draw each row of x (N, D) from its component, given covariates (N, C); sizes follow from the parameters."""
    gating = pyro.param("gating", PARAMS["gating"])
    locs = pyro.param("locs", PARAMS["locs"])
    scales = pyro.param("scales", PARAMS["scales"], constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(logits=logits(gating, covariates)), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[z], scales[z]).to_event(1), obs=x)


def log_densities(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n | z_n = k), (N, K)."""
    standardised = (x[:, None] - params["locs"]) / params["scales"]
    constant = params["scales"].log().sum(1) + x.shape[1] * math.log(2 * math.pi) / 2
    return -standardised.square().sum(2) / 2 - constant


def log_joint(params: Params, x: Tensor, covariates: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k | covariates_n), (N, K)."""
    return logits(params["gating"], covariates).log_softmax(1) + log_densities(params, x)


def e_step(params: Params, x: Tensor, covariates: Tensor) -> Tensor:
    """Return p(z_n = k | x_n, covariates_n), (N, K)."""
    return log_joint(params, x, covariates).softmax(1)


def log_likelihood(params: Params, x: Tensor, covariates: Tensor) -> Tensor:
    """Return log p(x | covariates), summed over the rows."""
    return log_joint(params, x, covariates).logsumexp(1).sum()


def gaussian_part(resp: Tensor, x: Tensor) -> Params:
    """Return the weighted means and standard deviations."""
    counts = resp.sum(0)[:, None]
    locs = resp.T @ x / counts
    return {"locs": locs, "scales": ((resp[:, :, None] * (x[:, None] - locs) ** 2).sum(0) / counts).sqrt()}


def score(gating: Tensor, resp: Tensor, covariates: Tensor) -> Tensor:
    """Return the gradient of sum resp_nk log weights_nk: sum covariates_nc (resp_nk - weights_nk), (C, K - 1)."""
    return covariates.T @ (resp - logits(gating, covariates).softmax(1))[:, :-1]


def information(gating: Tensor, covariates: Tensor) -> Tensor:
    """Return the negative Hessian of the same, (C (K - 1), C (K - 1))."""
    free = logits(gating, covariates).softmax(1)[:, :-1]
    inner = free[:, :, None] * (torch.eye(free.shape[1], dtype=free.dtype) - free[:, None])
    size = gating.numel()
    return torch.einsum("nc,nkl,nd->ckdl", covariates, inner, covariates).reshape(size, size)


def gating_objective(gating: Tensor, resp: Tensor, covariates: Tensor) -> Tensor:
    """Return sum resp_nk log weights_nk."""
    return (resp * logits(gating, covariates).log_softmax(1)).sum()


def newton(gating: Tensor, resp: Tensor, covariates: Tensor, slope: Tensor, ridge: float = 0.0) -> Tensor:
    """Return gating after one Newton step along a given slope."""
    curvature = information(gating, covariates) + ridge * torch.eye(gating.numel(), dtype=gating.dtype)
    return gating + torch.linalg.solve(curvature, slope.reshape(-1)).reshape(gating.shape)


def rising(old: Tensor, target: Tensor, objective: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the first point, of the target and those halved towards the old one, that is no worse than the old one."""
    shorter = (old + (target - old) / 2**halvings for halvings in range(30))
    rounding = 1e-14 * objective(old).abs()
    return next((point for point in shorter if objective(point) >= objective(old) - rounding), old)


def fit_gating(resp: Tensor, covariates: Tensor, ridge: float = 0.0) -> Tensor:
    """Return the maximiser of the concave sum resp_nk log weights_nk - ridge |gating|^2 / 2, by damped Newton steps."""
    gating = torch.zeros(covariates.shape[1], resp.shape[1] - 1, dtype=resp.dtype)

    def objective(point: Tensor) -> Tensor:
        return gating_objective(point, resp, covariates) - ridge * point.square().sum() / 2

    for _ in range(60):
        target = newton(gating, resp, covariates, score(gating, resp, covariates) - ridge * gating, ridge)
        gating = rising(gating, target, objective)
    return gating


def m_step(resp: Tensor, x: Tensor, covariates: Tensor) -> Params:
    """Return the gating that maximises its part of Q, and the weighted moments."""
    return {"gating": fit_gating(resp, covariates), **gaussian_part(resp, x)}


def e_step_by_products(params: Params, x: Tensor, covariates: Tensor) -> Tensor:
    """Return the responsibilities by odds against the last component, without the weights' normaliser: it cancels."""
    odds = torch.cat([(covariates @ params["gating"]).exp(), torch.ones_like(covariates[:, :1])], 1)
    joint = odds * log_densities(params, x).exp()
    return joint / joint.sum(1, keepdim=True)


def m_step_by_bounds(resp: Tensor, x: Tensor, covariates: Tensor) -> Params:
    """Return the same by many steps with a fixed bound of the curvature (Boehning 1992), each of which rises."""
    gating = torch.zeros(covariates.shape[1], resp.shape[1] - 1, dtype=resp.dtype)
    for _ in range(2000):
        gating = bounded(gating, resp, covariates)
    return {"gating": gating, **gaussian_part(resp, x)}


def bounded(gating: Tensor, resp: Tensor, covariates: Tensor) -> Tensor:
    """Return one step with the bound (identity - 1 / K) / 2 in place of the weights' own covariance."""
    k = resp.shape[1]
    inner = (torch.eye(k - 1, dtype=resp.dtype) - 1 / k) / 2
    return gating + torch.linalg.solve(covariates.T @ covariates, score(gating, resp, covariates)) @ inner.inverse()


def one_bounded_step(resp: Tensor, x: Tensor, covariates: Tensor, *, params: Params) -> Params:
    """Return one step of that kind from the current gating."""
    return {"gating": bounded(params["gating"], resp, covariates), **gaussian_part(resp, x)}


def one_damped_step(resp: Tensor, x: Tensor, covariates: Tensor, *, params: Params) -> Params:
    """Return half of a Newton step from the current gating, or less if it does not rise."""
    old = params["gating"]
    target = (old + newton(old, resp, covariates, score(old, resp, covariates))) / 2
    gating = rising(old, target, partial(gating_objective, resp=resp, covariates=covariates))
    return {"gating": gating, **gaussian_part(resp, x)}


def one_step_by_components(resp: Tensor, x: Tensor, covariates: Tensor, *, params: Params) -> Params:
    """Return half of a Newton step for each component alone, if it rises: a right slope with a diagonal curvature."""
    old = params["gating"]
    free = logits(old, covariates).softmax(1)[:, :-1]
    slope = score(old, resp, covariates)
    steps = [
        torch.linalg.solve(covariates.T @ ((p * (1 - p))[:, None] * covariates), g)
        for p, g in zip(free.T, slope.T, strict=True)
    ]
    objective = partial(gating_objective, resp=resp, covariates=covariates)
    return {"gating": rising(old, old + torch.stack(steps, 1) / 2, objective), **gaussian_part(resp, x)}


def one_step_with_a_diagonal_jacobian(resp: Tensor, x: Tensor, covariates: Tensor, *, params: Params) -> Params:
    """Return half of a Newton step whose slope leaves out how one logit moves the other weights.

    The chain rule from the free weights, (resp_k / w_k - resp_K / w_K) dw_k, with dw_k = w_k (1 - w_k): complete for
    two components, where there is one free weight.
    """
    old = params["gating"]
    weights = logits(old, covariates).softmax(1)
    ratios = resp / weights
    free = weights[:, :-1]
    slope = covariates.T @ ((ratios[:, :-1] - ratios[:, -1:]) * free * (1 - free))
    target = newton(old, resp, covariates, slope)
    return {"gating": (old + target) / 2, **gaussian_part(resp, x)}


def two_components(subject: Subject) -> Subject:
    """Return the subject with two components, one logit."""
    return replace(
        subject, params={"gating": PARAMS["gating"][:, :1], **{s: PARAMS[s][:2] for s in ("locs", "scales")}}
    )


def intercept_only(subject: Subject) -> Subject:
    """Return the subject with a constant as its only covariate: a plain mixture."""
    return replace(subject, params={**PARAMS, "gating": PARAMS["gating"][:1]}, data=(X, COVARIATES[:, :1]))


def with_weights(weights: Callable[[Params, Tensor], Tensor]) -> Subject:
    """Return the subject with an E-step of other component weights (N, K)."""
    return replace(SUBJECT, e_step=lambda p, x, c: (weights(p, c).log() + log_densities(p, x)).softmax(1))


def weights_of(params: Params, covariates: Tensor) -> Tensor:
    """Return the right component weights, (N, K)."""
    return logits(params["gating"], covariates).softmax(1)


def intercepts_alone(right: Tensor, resp: Tensor, x: Tensor, covariates: Tensor) -> Tensor:
    """Return the log odds of the soft shares as intercepts, and no slopes."""
    counts = resp.sum(0)
    return torch.cat([(counts[:-1] / counts[-1]).log()[None], torch.zeros_like(right[1:])])


def hard_labels(right: Tensor, resp: Tensor, x: Tensor, covariates: Tensor) -> Tensor:
    """Return the fit to the likeliest components, a little softened so that it exists."""
    hard = torch.nn.functional.one_hot(resp.argmax(1), resp.shape[1]).to(resp)
    return fit_gating(0.9 * hard + 0.1 / resp.shape[1], covariates)


def log_odds_regression(right: Tensor, resp: Tensor, x: Tensor, covariates: Tensor) -> Tensor:
    """Return the least-squares fit to the log odds of the responsibilities."""
    odds = (resp[:, :-1] / resp[:, -1:]).clamp(1e-12, 1e12)
    return torch.linalg.lstsq(covariates, odds.log()).solution


SUBJECT = Subject(model, PARAMS, (X, COVARIATES), e_step, m_step, log_likelihood)
DIAGONAL = replace(SUBJECT, m_step=one_step_with_a_diagonal_jacobian)
MARGINAL = with_weights(lambda p, c: weights_of(p, c).mean(0, keepdim=True))
INTERCEPTS = replace_site(SUBJECT, "gating", intercepts_alone)
Change = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
WRONG_GATING: dict[str, tuple[str, Change]] = {
    "ridge of a library's default": ("", lambda right, r, x, c: fit_gating(r, c, 1.0)),
    "hard labels": ("", hard_labels),
    "regression of the log odds": ("", log_odds_regression),
    "gating transposed": ("transposed", lambda right, r, x, c: right.T),
    "gating of the other sign": ("other sign", lambda right, r, x, c: -right),
    "first component as reference": ("", lambda right, r, x, c: fit_gating(r.roll(-1, 1), c)),
    "components exchanged": ("in another order", lambda right, r, x, c: right.flip(1)),
    "one Newton step from zero": ("", lambda right, r, x, c: newton(0 * right, r, c, score(0 * right, r, c))),
    "gating off by a millionth": ("", lambda right, r, x, c: right * (1 + 1e-6)),
}
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("two components", two_components(SUBJECT), "exact EM"),
    Entry("responsibilities by odds", replace(SUBJECT, e_step=e_step_by_products), "exact EM"),
    Entry("maximised by bounds", replace(SUBJECT, m_step=m_step_by_bounds), "exact EM"),
    Entry("one step with a bound", replace(SUBJECT, m_step=one_bounded_step), "generalised EM"),
    Entry("half a Newton step", replace(SUBJECT, m_step=one_damped_step), "generalised EM"),
    Entry("half a Newton step by components", replace(SUBJECT, m_step=one_step_by_components), "generalised EM"),
    Entry("weights of the average row", MARGINAL, "wrong E-step", source="StepMix #15", blind=intercept_only(MARGINAL)),
    Entry("weights back-transformed twice", with_weights(lambda p, c: weights_of(p, c).softmax(1)), "wrong E-step",
          source="nlmixr2est #1058, #1061"),
    Entry("weights left out", with_weights(lambda p, c: torch.ones_like(weights_of(p, c))), "wrong E-step",
          hint="weights are missing"),
    Entry("covariate counted twice", with_weights(lambda p, c: weights_of(p, c) ** 2), "wrong E-step",
          source="StepMix #15", hint="weights are counted twice"),
    Entry("covariate with the other sign", with_weights(lambda p, c: weights_of(p, -c)), "wrong E-step"),
    Entry("softmax over the rows", with_weights(lambda p, c: logits(p["gating"], c).softmax(0)), "wrong E-step"),
    Entry("reference component forgotten", with_weights(
        lambda p, c: torch.cat([weights_of(p, c)[:, :-1], torch.ones_like(c[:, :1])], 1)), "wrong E-step"),
    Entry("softmax Jacobian taken for diagonal", DIAGONAL, "wrong M-step", ("gating",), source="nlmixr2est #1054",
          blind=two_components(DIAGONAL)),
    Entry("slopes never fitted", INTERCEPTS, "wrong M-step", ("gating",), blind=intercept_only(INTERCEPTS)),
    *(
        Entry(name, replace_site(SUBJECT, "gating", change), "wrong M-step", ("gating",), hint)
        for name, (hint, change) in WRONG_GATING.items()
    ),
    Entry("scales are variances", replace_site(SUBJECT, "scales", lambda right, r, x, c: right**2), "wrong M-step",
          ("scales",), "square of scales for scales"),
    Entry("weights of the average row in the report", replace(
        SUBJECT,
        log_likelihood=lambda p, x, c: (weights_of(p, c).mean(0).log() + log_densities(p, x)).logsumexp(1).sum(),
    ), "wrong report", source="StepMix #15"),
    Entry("gating reported as weights", replace(
        SUBJECT, log_likelihood=lambda p, x, c: (logits(p["gating"], c) + log_densities(p, x)).logsumexp(1).sum()
    ), "wrong report"),
)  # fmt: skip
