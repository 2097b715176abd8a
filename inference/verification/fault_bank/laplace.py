"""Independent Laplace features: x_nd | z_n = k ~ Laplace(locs_kd, scales_kd), by weighted medians."""

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

X = torch.tensor(
    [
        [-1.32, 3.41], [-0.57, 2.18], [-2.11, 4.07], [-1.04, 2.92], [0.21, 3.63], [2.43, -0.66], [3.17, 0.94],
        [2.08, 0.31], [3.94, -1.45], [1.36, 0.12], [4.71, 5.22], [6.29, 6.83], [5.58, 4.36], [7.02, 5.91],
        [0.83, 1.57], [9.45, -3.26],
    ],
    dtype=torch.float64,
)  # fmt: skip
PARAMS = {
    "weights": torch.tensor([0.42, 0.33, 0.25], dtype=torch.float64),
    "locs": torch.tensor([[-0.83, 3.17], [2.61, -0.24], [5.72, 5.43]], dtype=torch.float64),
    "scales": torch.tensor([[0.9, 0.7], [1.2, 0.8], [1.1, 1.3]], dtype=torch.float64),
}


def model(x: Tensor) -> None:
    """Draw each row of x (N, D) from its component; K and D follow from the parameters."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    locs = pyro.param("locs", PARAMS["locs"])
    scales = pyro.param("scales", PARAMS["scales"], constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Laplace(locs[z], scales[z]).to_event(1), obs=x)


def distances(params: Params, x: Tensor) -> Tensor:
    """Return |x_nd - locs_kd| / scales_kd, (N, K, D)."""
    return (x[:, None] - params["locs"]).abs() / params["scales"]


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), (N, K)."""
    return params["weights"].log() - (2 * params["scales"]).log().sum(1) - distances(params, x).sum(2)


def e_step(params: Params, x: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K)."""
    return log_joint(params, x).softmax(1)


def log_likelihood(params: Params, x: Tensor) -> Tensor:
    """Return log p(x), summed over the rows."""
    return log_joint(params, x).logsumexp(1).sum()


def quantiles(resp: Tensor, x: Tensor, share: float, shift: int = 0) -> Tensor:
    """Return the first value of each feature that reaches a share of the responsibilities, (K, D)."""
    order = x.argsort(0)
    below = (resp[order].cumsum(0) < share * resp.sum(0)).sum(0).T
    return x.gather(0, order).gather(0, (below + shift).clamp(0, len(x) - 1))


def deviations(centres: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return the weighted mean absolute deviations about centres (K, D), (K, D)."""
    return (resp[:, :, None] * (x[:, None] - centres).abs()).sum(0) / resp.sum(0)[:, None]


def m_step(resp: Tensor, x: Tensor) -> Params:
    """Return the soft shares, the weighted medians, and the weighted mean absolute deviations about them."""
    locs = quantiles(resp, x, 0.5)
    return {"weights": resp.sum(0) / len(x), "locs": locs, "scales": deviations(locs, resp, x)}


def e_step_by_products(params: Params, x: Tensor) -> Tensor:
    """Return the responsibilities from the densities themselves; the factors 1 / 2 cancel."""
    densities = params["weights"] * ((-distances(params, x)).exp() / params["scales"]).prod(2)
    return densities / densities.sum(1, keepdim=True)


def m_step_by_search(resp: Tensor, x: Tensor) -> Params:
    """Return the same by trying each value of the feature as the median: one of them is best."""
    costs = torch.einsum("nk,mnd->mkd", resp, (x[:, None] - x).abs())
    locs = torch.stack([x[costs[:, :, d].argmin(0), d] for d in range(x.shape[1])], 1)
    return {"weights": resp.mean(0), "locs": locs, "scales": costs.amin(0) / resp.sum(0)[:, None]}


def m_step_by_loops(resp: Tensor, x: Tensor) -> Params:
    """Return the same one by one, summing from above until half is reached."""
    locs = torch.zeros(resp.shape[1], x.shape[1], dtype=x.dtype)
    for k, column in enumerate(resp.T):
        for d, feature in enumerate(x.T):
            above = 0.0
            for row in feature.argsort(descending=True).tolist():
                above += float(column[row])
                if above > float(column.sum()) / 2:
                    locs[k, d] = feature[row]
                    break
    return {"weights": resp.mean(0), "locs": locs, "scales": deviations(locs, resp, x)}


def about_the_old_locs(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return a conditional maximisation: the scales at the old locs, then the locs (Meng and Rubin 1993)."""
    return {**m_step(resp, x), "scales": deviations(params["locs"], resp, x)}


def half_in_the_logarithm(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return scales half of the way in log scale, in which Q is concave at fixed locs."""
    right = m_step(resp, x)
    return {**right, "scales": (right["scales"] * params["scales"]).sqrt()}


def means(resp: Tensor, x: Tensor) -> Tensor:
    """Return the weighted means, (K, D)."""
    return resp.T @ x / resp.sum(0)[:, None]


def standard_deviations(resp: Tensor, x: Tensor) -> Tensor:
    """Return the weighted standard deviations, (K, D)."""
    return (resp.T @ x**2 / resp.sum(0)[:, None] - means(resp, x) ** 2).sqrt()


def interpolated_medians(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return medians between two values of the feature, as statistics packages interpolate them."""
    order = x.argsort(0)
    values, shares = x.gather(0, order), resp[order].permute(2, 0, 1) / resp.sum(0)[:, None, None]
    middles = shares.cumsum(1) - shares / 2  # (K, N, D)
    low = (middles < 0.5).sum(1, keepdim=True) - 1
    left, right_, start, end = (
        rows.gather(1, index)[:, 0]
        for rows, index in (
            (values.expand_as(middles), low),
            (values.expand_as(middles), low + 1),
            (middles, low),
            (middles, low + 1),
        )
    )
    return left + (right_ - left) * (0.5 - start) / (end - start)


def median_deviations(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return the weighted medians of the absolute deviations in place of their means, (K, D)."""
    away = (x[:, None] - quantiles(resp, x, 0.5)).abs()
    return torch.stack([quantiles(resp[:, [k]], away[:, k], 0.5)[0] for k in range(resp.shape[1])])


def one_feature(subject: Subject) -> Subject:
    """Return the subject with its first feature alone."""
    first = {"weights": PARAMS["weights"], "locs": PARAMS["locs"][:, :1], "scales": PARAMS["scales"][:, :1]}
    return replace(subject, params=first, data=(X[:, :1],))


def with_scales(change: Callable[[Tensor], Tensor]) -> Subject:
    """Return the subject with an E-step that takes ``change(scales)`` for the scales."""
    return replace(SUBJECT, e_step=lambda p, x: e_step({**p, "scales": change(p["scales"])}, x))


SUBJECT = Subject(model, PARAMS, (X,), e_step, m_step, log_likelihood)
EUCLIDEAN = replace(
    SUBJECT,
    e_step=lambda p, x: (p["weights"].log() - p["scales"].log().sum(1) - distances(p, x).norm(dim=2)).softmax(1),
)
POOLED = replace_site(SUBJECT, "scales", lambda right, r, x: right.mean(1, keepdim=True).expand_as(right))
Change = Callable[[Tensor, Tensor, Tensor], Tensor]
WRONG_LOCS: dict[str, tuple[str, Change]] = {
    "means": ("mean for median", lambda right, r, x: means(r, x)),
    "medians of all rows": ("unweighted", lambda right, r, x: x.quantile(0.5, 0).expand_as(right)),
    "interpolated medians": ("", interpolated_medians),
    "the value after the median": ("", lambda right, r, x: quantiles(r, x, 0.5, 1)),
    "lower quartiles": ("", lambda right, r, x: quantiles(r, x, 0.25)),
    "medians of the sorted rows, weights unsorted": (
        "",
        lambda right, r, x: x.sort(0).values[(r.cumsum(0) < r.sum(0) / 2).sum(0)],
    ),
    "one median off by a millionth": (
        "",
        lambda right, r, x: right + 1e-6 * torch.eye(*right.shape, dtype=right.dtype),
    ),
}
WRONG_SCALES: dict[str, tuple[str, Change]] = {
    "standard deviations": ("", lambda right, r, x: standard_deviations(r, x)),
    "standard deviations over the root of 2": ("", lambda right, r, x: standard_deviations(r, x) / 2**0.5),
    "deviations about the means": ("", lambda right, r, x: deviations(means(r, x), r, x)),
    "median deviations": ("", median_deviations),
    "twice the scale": ("a factor of 2", lambda right, r, x: 2 * right),
    "rate for scale": ("reciprocal of scales for scales", lambda right, r, x: 1 / right),
    "deviations over n - 1": ("n - 1 for n", lambda right, r, x: right * (r.sum(0) / (r.sum(0) - 1))[:, None]),
    "deviations over N": ("N for n", lambda right, r, x: right * r.mean(0)[:, None]),
    "scales of the next component": ("components in another order", lambda right, r, x: right.roll(1, 0)),
    "a millionth added to the scales": ("1e-06 is added", lambda right, r, x: right + 1e-6),
}
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("responsibilities by products", replace(SUBJECT, e_step=e_step_by_products), "exact EM"),
    Entry("medians by search", replace(SUBJECT, m_step=m_step_by_search), "exact EM"),
    Entry("medians by loops from above", replace(SUBJECT, m_step=m_step_by_loops), "exact EM"),
    Entry("scales about the old medians", replace(SUBJECT, m_step=about_the_old_locs), "generalised EM"),
    Entry("half a step in the log scales", replace(SUBJECT, m_step=half_in_the_logarithm), "generalised EM"),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_weights(SUBJECT),
    *wrong_reports(SUBJECT, log_joint),
    Entry("rate for scale in the E-step", with_scales(torch.reciprocal), "wrong E-step",
          hint="reciprocal of scales for scales"),
    Entry("squared scale", with_scales(torch.square), "wrong E-step", hint="square of scales for scales"),
    Entry("Euclidean distance", EUCLIDEAN, "wrong E-step", blind=one_feature(EUCLIDEAN)),
    Entry("Gaussian densities", replace(
        SUBJECT,
        e_step=lambda p, x: (
            p["weights"].log() - p["scales"].log().sum(1) - distances(p, x).square().sum(2) / 2
        ).softmax(1),
    ), "wrong E-step"),
    Entry("factor 2 forgotten in the report", replace(
        SUBJECT, log_likelihood=lambda p, x: log_likelihood(p, x) + x.numel() * torch.tensor(2.0).double().log()
    ), "wrong report", hint="free of the parameters"),
    Entry("one scale for all features", POOLED, "wrong M-step", ("scales",), blind=one_feature(POOLED)),
    *(
        Entry(name, replace_site(SUBJECT, site, change), "wrong M-step", (site,), hint)
        for site, changes in (("locs", WRONG_LOCS), ("scales", WRONG_SCALES))
        for name, (hint, change) in changes.items()
    ),
)  # fmt: skip
