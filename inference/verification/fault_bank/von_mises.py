"""Directions: angles x_nd | z_n = k ~ von Mises with mean direction locs_kd and concentration concentrations_kd.

Torch's ``VonMises`` has the Bessel functions by a polynomial that is right to 2e-7 only, too rough to check a formula
to rounding; the program takes ``torch.special.i0e``.
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
    replace_site,
    wrong_e_steps,
    wrong_reports,
    wrong_weights,
)
from mixproof.inference.verification.subject import Subject

Params = dict[str, Tensor]

X = torch.tensor(
    [
        [0.41, -2.13], [0.77, -1.62], [-0.22, -2.58], [1.13, -1.91], [0.08, 2.94], [2.31, 0.36], [1.82, -0.54],
        [2.77, 0.91], [-2.95, 0.17], [2.12, 1.45], [-1.34, 1.86], [-0.83, 2.41], [-1.97, 2.05], [-1.11, 1.22],
        [-2.42, 2.66], [0.93, 0.48], [-0.47, 1.03], [3.02, -2.87],
    ],
    dtype=torch.float64,
)  # fmt: skip
PARAMS = {
    "weights": torch.tensor([0.34, 0.36, 0.3], dtype=torch.float64),
    "locs": torch.tensor([[0.52, -1.94], [2.24, 0.43], [-1.42, 1.93]], dtype=torch.float64),
    "concentrations": torch.tensor([[2.7, 3.9], [1.8, 1.3], [3.2, 5.1]], dtype=torch.float64),
}


class VonMises(dist.VonMises):
    """The von Mises law with its density to rounding."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at angles."""
        return self.concentration * (value - self.loc).cos() - log_normaliser(self.concentration)


def log_normaliser(kappa: Tensor) -> Tensor:
    """Return log(2 pi I_0(kappa))."""
    return math.log(2 * math.pi) + kappa + torch.special.i0e(kappa).log()


def model(x: Tensor) -> None:
    """Draw each row of angles x (N, D) from its component; K and D follow from the parameters."""
    weights = pyro.param("weights", PARAMS["weights"], constraint=constraints.simplex)
    locs = pyro.param("locs", PARAMS["locs"])
    concentrations = pyro.param("concentrations", PARAMS["concentrations"], constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", VonMises(locs[z], concentrations[z]).to_event(1), obs=x)


def log_density(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_nd | z_n = k), (N, K, D)."""
    kappa = params["concentrations"]
    return kappa * (x[:, None] - params["locs"]).cos() - log_normaliser(kappa)


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, z_n = k), (N, K)."""
    return params["weights"].log() + log_density(params, x).sum(2)


def e_step(params: Params, x: Tensor) -> Tensor:
    """Return p(z_n = k | x_n), (N, K)."""
    return log_joint(params, x).softmax(1)


def resultant(resp: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted mean directions and the mean resultant lengths, each (K, D)."""
    counts = resp.sum(0)[:, None]
    sine, cosine = resp.T @ x.sin() / counts, resp.T @ x.cos() / counts
    return torch.atan2(sine, cosine), (sine.square() + cosine.square()).sqrt()


def approximate_concentration(length: Tensor) -> Tensor:
    """Return R (2 - R^2) / (1 - R^2), where A(kappa) = R is wanted: Banerjee et al. (2005), equation (4.4)."""
    return length * (2 - length.square()) / (1 - length.square())


def concentration(length: Tensor) -> Tensor:
    """Return kappa where A(kappa) = I_1(kappa) / I_0(kappa) = length, by Newton's method to rounding."""
    kappa = approximate_concentration(length)
    for _ in range(50):
        ratio = torch.special.i1e(kappa) / torch.special.i0e(kappa)
        kappa = kappa - (ratio - length) / (1 - ratio.square() - ratio / kappa)
    return kappa


def concentration_by_bisection(length: Tensor) -> Tensor:
    """Return the same by halving brackets of log kappa."""
    low, high = torch.full_like(length, -20.0), torch.full_like(length, 12.0)
    for _ in range(80):
        middle = (low + high) / 2
        below = torch.special.i1e(middle.exp()) / torch.special.i0e(middle.exp()) < length
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return middle.exp()


def m_step(resp: Tensor, x: Tensor) -> Params:
    """Return the soft shares, the mean directions, and the concentrations of the mean resultant lengths."""
    locs, length = resultant(resp, x)
    return {"weights": resp.mean(0), "locs": locs, "concentrations": concentration(length)}


def log_likelihood(params: Params, x: Tensor) -> Tensor:
    """Return log p(x), summed over the rows."""
    return log_joint(params, x).logsumexp(1).sum()


def e_step_by_products(params: Params, x: Tensor) -> Tensor:
    """Return the responsibilities from e^(kappa cos) / I_0(kappa), without the common power of 2 pi."""
    kappa = params["concentrations"]
    densities = params["weights"] * ((kappa * (x[:, None] - params["locs"]).cos()).exp() / kappa.i0()).prod(2)
    return densities / densities.sum(1, keepdim=True)


def m_step_by_phasors(resp: Tensor, x: Tensor) -> Params:
    """Return the same from means of e^(ix)."""
    phasors = torch.einsum("nk,nd->kd", (resp / resp.sum(0)).to(torch.complex128), (1j * x).exp())
    return {
        "weights": resp.mean(0),
        "locs": phasors.angle(),
        "concentrations": concentration_by_bisection(phasors.abs()),
    }


def halfway(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return the right directions, at which Q is concave in the concentrations, and half a step in those."""
    right = m_step(resp, x)
    return {**right, "concentrations": (right["concentrations"] + params["concentrations"]) / 2}


SUBJECT = Subject(model, PARAMS, (X,), e_step, m_step, log_likelihood)
ONE_FEATURE = replace(
    SUBJECT,
    params={
        "weights": PARAMS["weights"],
        "locs": PARAMS["locs"][:, :1],
        "concentrations": PARAMS["concentrations"][:, :1],
    },
    data=(X[:, :1],),
)


def lengths(resp: Tensor, x: Tensor) -> Tensor:
    """Return the mean resultant lengths, (K, D)."""
    return resultant(resp, x)[1]


def pooled(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return one concentration for all features, from the mean of their lengths."""
    return concentration(lengths(resp, x).mean(1, keepdim=True)).expand_as(right)


def polynomial(params: Params, x: Tensor) -> Tensor:
    """Return responsibilities with Torch's polynomial for the Bessel function."""
    density = dist.VonMises(params["locs"], params["concentrations"]).log_prob(x[:, None]).sum(2)
    return (params["weights"].log() + density).softmax(1)


def features_alone(params: Params, x: Tensor) -> Tensor:
    """Return the mean over the features of each one's own responsibilities."""
    return (params["weights"].log()[:, None] + log_density(params, x)).softmax(1).mean(2)


WRONG_LOCS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "means of the angles": ("", lambda right, r, x: r.T @ x / r.sum(0)[:, None]),
    "arctangent in two quadrants only": ("", lambda right, r, x: right.tan().atan()),
    "sine and cosine exchanged": ("", lambda right, r, x: math.pi / 2 - right),
    "opposite directions": ("", lambda right, r, x: right + math.pi),
    "directions of all rows": ("unweighted", lambda right, r, x: resultant(torch.ones_like(r), x)[0]),
    "components exchanged": ("components in another order", lambda right, r, x: right.roll(1, 0)),
    "one direction off by a millionth": ("", lambda right, r, x: right + 1e-6 * torch.eye(3, 2).to(right)),
}
WRONG_CONCENTRATIONS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "approximate concentrations": ("", lambda right, r, x: approximate_concentration(lengths(r, x))),
    "resultant lengths for concentrations": ("", lambda right, r, x: lengths(r, x)),
    "circular variances for concentrations": ("", lambda right, r, x: 1 - lengths(r, x)),
    "one over the wrapped normal's variance": ("", lambda right, r, x: -0.5 / lengths(r, x).log()),
    "lengths squared": ("", lambda right, r, x: concentration(lengths(r, x).square())),
    "lengths over N": ("", lambda right, r, x: concentration(lengths(r, x) * r.mean(0)[:, None])),
    "dispersions for concentrations": (
        "reciprocal of concentrations for concentrations",
        lambda right, r, x: 1 / right,
    ),
    "a ten-millionth added": ("1e-07 is added", lambda right, r, x: right + 1e-7),
}
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("responsibilities by products", replace(SUBJECT, e_step=e_step_by_products), "exact EM"),
    Entry("complex means, concentrations by bisection", replace(SUBJECT, m_step=m_step_by_phasors), "exact EM"),
    Entry("half a step", replace(SUBJECT, m_step=halfway), "generalised EM"),
    *wrong_e_steps(SUBJECT, log_joint),
    *wrong_weights(SUBJECT),
    *wrong_reports(SUBJECT, log_joint),
    Entry("Bessel function by a polynomial", replace(SUBJECT, e_step=polynomial), "wrong E-step"),
    Entry(
        "Bessel function forgotten",
        replace(SUBJECT, e_step=lambda p, x: (log_joint(p, x) + log_normaliser(p["concentrations"]).sum(1)).softmax(1)),
        "wrong E-step",
    ),
    Entry(
        "normal density on the line",
        replace(
            SUBJECT,
            e_step=lambda p, x: (
                p["weights"].log() + dist.Normal(p["locs"], p["concentrations"].rsqrt()).log_prob(x[:, None]).sum(2)
            ).softmax(1),
        ),
        "wrong E-step",
        source="nlmixr2est #912",
    ),
    Entry(
        "dispersion taken for a concentration",
        replace(SUBJECT, e_step=lambda p, x: e_step({**p, "concentrations": 1 / p["concentrations"]}, x)),
        "wrong E-step",
        hint="reciprocal of concentrations for concentrations",
    ),
    Entry(
        "each feature's responsibilities averaged",
        replace(SUBJECT, e_step=features_alone),
        "wrong E-step",
        blind=replace(ONE_FEATURE, e_step=features_alone),
    ),
    *(
        Entry(name, replace_site(SUBJECT, "locs", change), "wrong M-step", ("locs",), hint)
        for name, (hint, change) in WRONG_LOCS.items()
    ),
    *(
        Entry(name, replace_site(SUBJECT, "concentrations", change), "wrong M-step", ("concentrations",), hint)
        for name, (hint, change) in WRONG_CONCENTRATIONS.items()
    ),
    Entry(
        "one concentration for all features",
        replace_site(SUBJECT, "concentrations", pooled),
        "wrong M-step",
        ("concentrations",),
        blind=replace_site(ONE_FEATURE, "concentrations", pooled),
    ),
    Entry(
        "2 pi forgotten in the report",
        replace(SUBJECT, log_likelihood=lambda p, x: log_likelihood(p, x) + x.numel() * math.log(2 * math.pi)),
        "wrong report",
        hint="free of the parameters",
    ),
)
