"""Gaussian features seen with known errors: x_nd | z_n = k ~ Normal(locs_kd, sqrt(scales_kd^2 + errors_nd^2)).

The generalised step is the one of extreme deconvolution (Bovy, Hogg and Roweis 2011, equations 16 and 17).
"""

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
        [-1.32, 3.41], [-0.57, 2.18], [-2.41, 4.57], [-1.04, 1.92], [0.61, 3.83], [2.43, -0.96], [3.87, 1.24],
        [1.68, 0.31], [3.94, -1.85], [1.16, 0.42], [4.31, 5.22], [6.79, 7.13], [5.58, 4.06], [7.42, 5.91],
        [6.13, 6.64],
    ],
    dtype=torch.float64,
)  # fmt: skip
ERRORS = torch.tensor(
    [
        [0.21, 0.34], [0.42, 0.13], [0.17, 0.28], [0.35, 0.31], [0.26, 0.44], [0.39, 0.19], [0.14, 0.41],
        [0.31, 0.23], [0.28, 0.37], [0.44, 0.16], [0.19, 0.33], [0.37, 0.27], [0.23, 0.12], [0.33, 0.36],
        [0.16, 0.24],
    ],
    dtype=torch.float64,
)  # fmt: skip
PARAMS = {
    "weights": torch.tensor([0.42, 0.33, 0.25], dtype=torch.float64),
    "locs": torch.tensor([[-0.8, 3.1], [2.6, -0.2], [5.9, 5.7]], dtype=torch.float64),
    "scales": torch.tensor([[1.1, 0.9], [1.2, 1.0], [1.1, 1.3]], dtype=torch.float64),
}


def model(x: Tensor, errors: Tensor) -> None:
    """Draw each row of x (N, D) from its component, with known errors (N, D); K and D follow from the parameters."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    locs = pyro.param("locs", PARAMS["locs"])
    scales = pyro.param("scales", PARAMS["scales"], constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[z], (scales[z] ** 2 + errors**2).sqrt()).to_event(1), obs=x)


def total(params: Params, errors: Tensor) -> Tensor:
    """Return the variances of what is seen, (N, K, D)."""
    return params["scales"] ** 2 + errors[:, None] ** 2


def density_table(params: Params, x: Tensor, variances: Tensor) -> Tensor:
    """Return log weights plus log densities with given variances (N, K, D), (N, K)."""
    terms = (2 * torch.pi * variances).log() + (x[:, None] - params["locs"]) ** 2 / variances
    return params["weights"].log() - terms.sum(2) / 2


def log_joint(params: Params, x: Tensor, errors: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), (N, K)."""
    return density_table(params, x, total(params, errors))


def e_step(params: Params, x: Tensor, errors: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K)."""
    return log_joint(params, x, errors).softmax(1)


def log_likelihood(params: Params, x: Tensor, errors: Tensor) -> Tensor:
    """Return log p(x), summed over the rows."""
    return log_joint(params, x, errors).logsumexp(1).sum()


def weighted_locs(variances: Tensor, resp: Tensor, x: Tensor, errors: Tensor) -> Tensor:
    """Return the best locs at given intrinsic variances (K, D): means weighted by the precision of each row."""
    precisions = resp[:, :, None] / (variances + errors[:, None] ** 2)
    return (precisions * x[:, None]).sum(0) / precisions.sum(0)


def stationarity(sign: int, variances: Tensor, resp: Tensor, x: Tensor, errors: Tensor) -> Tensor:
    """Return sum w / (s + sign e^2) - sum w (x - loc)^2 / (s + e^2)^2 at the best locs, (K, D)."""
    locs = weighted_locs(variances, resp, x, errors)
    squares = errors[:, None] ** 2
    falling = (x[:, None] - locs) ** 2 / (variances + squares) ** 2
    return (resp[:, :, None] * (1 / (variances + sign * squares) - falling)).sum(0)


def solve(sign: int, low: Tensor, high: Tensor, resp: Tensor, x: Tensor, errors: Tensor) -> Tensor:
    """Return the variances at which the equation changes sign between low and high, by bisection to rounding."""
    for _ in range(100):
        middle = (low + high) / 2
        above = stationarity(sign, middle, resp, x, errors) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def spread(x: Tensor) -> Tensor:
    """Return a bound of any weighted variance, (D,)."""
    return (x.amax(0) - x.amin(0)) ** 2


def m_step(resp: Tensor, x: Tensor, errors: Tensor) -> Params:
    """Return the maximiser of Q: sum w / (s + e^2) = sum w (x - loc)^2 / (s + e^2)^2, solved by bisection."""
    high = spread(x).expand(resp.shape[1], -1)
    variances = solve(1, torch.full_like(high, 1e-9), high, resp, x, errors)
    locs = weighted_locs(variances, resp, x, errors)
    return {"weights": resp.mean(0), "locs": locs, "scales": variances.sqrt()}


def m_step_as_printed(resp: Tensor, x: Tensor, errors: Tensor) -> Params:
    """Return the solution of sum w / (s - e^2) = sum w (x - loc)^2 / (s + e^2)^2, the largest root."""
    right = m_step(resp, x, errors)["scales"] ** 2
    variances = solve(-1, 0.6 * right, right, resp, x, errors)
    return {"weights": resp.mean(0), "locs": weighted_locs(variances, resp, x, errors), "scales": variances.sqrt()}


def m_step_by_iteration(resp: Tensor, x: Tensor, errors: Tensor) -> Params:
    """Return the maximiser as the fixed point of extreme deconvolution at fixed responsibilities."""
    params = plain(resp, x, errors)
    for _ in range(400):
        params = extreme_deconvolution(resp, x, errors, params=params)
    return params


def plain(resp: Tensor, x: Tensor, errors: Tensor) -> Params:
    """Return the M-step of a mixture whose rows carry no errors."""
    locs = resp.T @ x / resp.sum(0)[:, None]
    variances = (resp[:, :, None] * (x[:, None] - locs) ** 2).sum(0) / resp.sum(0)[:, None]
    return {"weights": resp.mean(0), "locs": locs, "scales": variances.sqrt()}


def less_the_mean_error(resp: Tensor, x: Tensor, errors: Tensor) -> Params:
    """Return the plain variances less the mean squared errors: exact where all errors are equal."""
    right = plain(resp, x, errors)
    return {**right, "scales": (right["scales"] ** 2 - resp.T @ errors**2 / resp.sum(0)[:, None]).sqrt()}


def shrunk(params: Params, x: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the value behind each x_nd, given its component, (N, K, D) both."""
    share = params["scales"] ** 2 / total(params, errors)
    return params["locs"] + share * (x[:, None] - params["locs"]), share * errors[:, None] ** 2


def extreme_deconvolution(resp: Tensor, x: Tensor, errors: Tensor, *, params: Params) -> Params:
    """Return the update of extreme deconvolution, for which the values behind x are missing data too."""
    means, variances = shrunk(params, x, errors)
    shares = (resp / resp.sum(0))[:, :, None]
    locs = (shares * means).sum(0)
    scales = (shares * ((means - locs) ** 2 + variances)).sum(0).sqrt()
    return {"weights": resp.mean(0), "locs": locs, "scales": scales}


def about_the_old_means(resp: Tensor, x: Tensor, errors: Tensor, *, params: Params) -> Params:
    """Return extreme deconvolution with the scales first, about the old means: a conditional maximisation."""
    means, variances = shrunk(params, x, errors)
    shares = (resp / resp.sum(0))[:, :, None]
    scales = (shares * ((means - params["locs"]) ** 2 + variances)).sum(0).sqrt()
    return {**extreme_deconvolution(resp, x, errors, params=params), "scales": scales}


def without_the_remaining_variance(resp: Tensor, x: Tensor, errors: Tensor, *, params: Params) -> Params:
    """Return extreme deconvolution with the values behind x taken for certain."""
    return plain_of(resp, shrunk(params, x, errors)[0])


def shrunk_the_wrong_way(resp: Tensor, x: Tensor, errors: Tensor, *, params: Params) -> Params:
    """Return extreme deconvolution with the share of the error where the share of the component belongs."""
    share = errors[:, None] ** 2 / total(params, errors)
    return plain_of(resp, params["locs"] + share * (x[:, None] - params["locs"]), share * params["scales"] ** 2)


def plain_of(resp: Tensor, means: Tensor, variances: Tensor | float = 0.0) -> Params:
    """Return the weighted moments of values (N, K, D) with given remaining variances."""
    shares = (resp / resp.sum(0))[:, :, None]
    locs = (shares * means).sum(0)
    return {
        "weights": resp.mean(0),
        "locs": locs,
        "scales": (shares * ((means - locs) ** 2 + variances)).sum(0).sqrt(),
    }


def equal_errors(subject: Subject) -> Subject:
    """Return the subject with the same error everywhere."""
    return replace(subject, data=(X, torch.full_like(X, 0.27)))


def with_variances(variances: Callable[[Params, Tensor], Tensor]) -> Subject:
    """Return the subject with an E-step of its own idea of the variances (N, K, D)."""
    return replace(SUBJECT, e_step=lambda p, x, e: density_table(p, x, variances(p, e)).softmax(1))


SUBJECT = Subject(model, PARAMS, (X, ERRORS), e_step, m_step, log_likelihood)
MEAN_ERROR = replace(SUBJECT, m_step=less_the_mean_error)
PLAIN_LOCS = replace_site(SUBJECT, "locs", lambda right, r, x, e: r.T @ x / r.sum(0)[:, None])
MEAN_ERROR_E = with_variances(lambda p, e: p["scales"] ** 2 + (e**2).mean() + 0 * e[:, None])
SITES = ("locs", "scales")
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("maximised by iteration", replace(SUBJECT, m_step=m_step_by_iteration), "exact EM"),
    Entry("extreme deconvolution", replace(SUBJECT, m_step=extreme_deconvolution), "generalised EM"),
    Entry("extreme deconvolution about the old means", replace(SUBJECT, m_step=about_the_old_means), "generalised EM"),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_weights(SUBJECT),
    *wrong_reports(SUBJECT, log_joint),
    Entry("E-step without the errors", with_variances(lambda p, e: p["scales"] ** 2 + 0 * e[:, None]), "wrong E-step",
          source="nlmixr2est #912"),
    Entry("standard deviations added", with_variances(lambda p, e: (p["scales"] + e[:, None]) ** 2), "wrong E-step"),
    Entry("errors taken for variances", with_variances(lambda p, e: p["scales"] ** 2 + e[:, None]), "wrong E-step"),
    Entry("one error for all rows", MEAN_ERROR_E, "wrong E-step", blind=equal_errors(MEAN_ERROR_E)),
    Entry(
        "report without the errors",
        replace(
            SUBJECT,
            log_likelihood=lambda p, x, e: density_table(p, x, total(p, 0 * e)).logsumexp(1).sum(),
        ),
        "wrong report",
        source="nlmixr2est #912",
    ),
    Entry("equation as printed", replace(SUBJECT, m_step=m_step_as_printed), "wrong M-step", ("scales",),
          source="astroML-notebooks, chapter 4, equation 7"),
    Entry("M-step without the errors", replace(SUBJECT, m_step=plain), "wrong M-step", SITES, source="nlmixr2est #912"),
    Entry("variances less the mean error", MEAN_ERROR, "wrong M-step", SITES, blind=equal_errors(MEAN_ERROR)),
    Entry("means not weighted by precision", PLAIN_LOCS, "wrong M-step", ("locs",), blind=equal_errors(PLAIN_LOCS)),
    Entry("remaining variance forgotten", replace(SUBJECT, m_step=without_the_remaining_variance), "wrong M-step",
          SITES),
    Entry("shrunk the wrong way", replace(SUBJECT, m_step=shrunk_the_wrong_way), "wrong M-step", SITES),
    Entry("errors not subtracted",
          replace_site(SUBJECT, "scales", lambda right, r, x, e: (right**2 + (e**2).mean(0)).sqrt()),
          "wrong M-step", ("scales",)),
    Entry("scales are variances", replace_site(SUBJECT, "scales", lambda right, r, x, e: right**2), "wrong M-step",
          ("scales",), "square of scales for scales"),
    Entry("scales of the next component", replace_site(SUBJECT, "scales", lambda right, r, x, e: right.roll(1, 0)),
          "wrong M-step", ("scales",), "components in another order"),
    Entry("scales off by a millionth", replace_site(SUBJECT, "scales", lambda right, r, x, e: right * (1 + 1e-6)),
          "wrong M-step", ("scales",)),
)  # fmt: skip
