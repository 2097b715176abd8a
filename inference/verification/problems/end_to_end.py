"""Beside the formulas, what the sheet leads to, on simulated and on real data.

For every family: both EM steps, the mode, SVI's end and the moments. For the sum of two mixtures also its density.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer.autoguide import AutoDelta, init_to_value
from pyro.optim import PyroOptim
from sklearn.datasets import load_digits, load_iris, load_sample_image
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference.em import Fit, em
from mixproof.inference.enumeration import Coordinates, bind, inspect, log_density
from mixproof.inference.posterior_mode import posterior_mode
from mixproof.inference.svi import svi
from mixproof.inference.verification.claim import Claim, Problem
from mixproof.inference.verification.density import verify_density
from mixproof.inference.verification.em import verify_em
from mixproof.inference.verification.moments import verify_moments
from mixproof.inference.verification.report import Check, Report, conclude
from mixproof.models import (
    bernoulli,
    gaussian_diagonal,
    gaussian_full,
    gaussian_spherical,
    gaussian_sum,
    gaussian_tied,
    laplace,
)
from mixproof.models.gaussian_isotropic import GaussianIsotropic

PROBLEM = Problem(
    "E",
    "End to end",
    "For every family, the E-step and the M-step derived by hand are those of the Pyro program; EM, the mode that Pyro finds on the "
    "enumerated program and SVI reach the same local maximum from the same start; the closed-form moments are those of the program's "
    "draws. For the sum of two mixtures, the density is that of its generative process.",
)

AGREEMENT = 1e-9
"""The relative agreement of the log density at EM's fixed point and at Pyro's mode that the project promises."""
SVI_STEPS = 300
SMALLEST_STEP = 1e-6
"""Of resilient backpropagation in each unconstrained coordinate: as near as it comes to rest."""


def table(name: str) -> Tensor:
    """Return a small classic as a float tensor (N, D)."""
    text = files("mixproof.inference.verification.problems") / "data" / name
    with text.open() as lines:
        return torch.tensor(np.loadtxt(lines, delimiter=",", skiprows=1))


@cache
def real_data(name: str) -> Tensor:
    """Return a real data set (N, D)."""
    match name:
        case "iris":
            return torch.tensor(load_iris().data)
        case "faithful":
            return table("faithful.csv")
        case "carcinoma":
            return table("carcinoma.csv") - 1  # coded 1 and 2
        case "digits":
            return torch.tensor(load_digits().data[:400] > 7.5, dtype=torch.float64)
        case "flower":
            pixels = torch.tensor(load_sample_image("flower.jpg").reshape(-1, 3) / 255.0)
            return pixels[::331]  # every 331st of 273,280 pixels, along no row or column
        case _:
            raise ValueError(name)


def normal_inverse_wishart(
    x: Tensor, num_components: int, *, loc: Tensor, strength: float, df: float, share: float
) -> gaussian_full.Prior:
    """Return a prior of the components about a location (D,), its scale a share of the covariance of x (N, D)."""
    return gaussian_full.Prior(
        torch.full((num_components,), 2.0, dtype=x.dtype),
        loc,
        torch.tensor(strength, dtype=x.dtype),
        torch.tensor(df, dtype=x.dtype),
        share * x.mT.cov(),
    )


def known_noise() -> gaussian_full.Params:
    """Return two kinds of measurement error for the eruptions, in minutes: small ones, and now and then large ones."""
    variances = torch.tensor([[0.01, 1.0], [0.09, 9.0]], dtype=torch.float64)
    return gaussian_full.Params(
        torch.tensor([0.8, 0.2], dtype=torch.float64),
        torch.zeros(2, 2, dtype=torch.float64),
        torch.diag_embed(variances),
    )


def sum_prior(x: Tensor) -> gaussian_sum.Prior:
    """Return a weak prior of one part about the mean of x, and a strong one of the other about 0, as of noise."""
    return gaussian_sum.Prior(
        normal_inverse_wishart(x, 2, loc=x.mean(0), strength=0.01, df=6.0, share=0.2),
        normal_inverse_wishart(x, 2, loc=torch.zeros_like(x[0]), strength=20.0, df=40.0, share=0.5),
    )


def bernoulli_prior(x: Tensor) -> bernoulli.Prior:
    return bernoulli.Prior(torch.full((6,), 2.0, dtype=x.dtype), torch.full_like(x[0], 2.0), torch.full_like(x[0], 2.0))


def uniform_prior(x: Tensor) -> bernoulli.UniformWeights.Prior:
    return bernoulli.UniformWeights.Prior(torch.full_like(x[0], 2.0), torch.full_like(x[0], 2.0))


@dataclass(frozen=True)
class Case:
    """A family with data, K and a prior that make its mode well posed."""

    family: Any
    name: str
    data: str
    num_components: Any
    prior: Callable[[Tensor], Any] | None = None
    simulated: bool = False

    @property
    def id(self) -> str:
        return f"{self.name}.{'simulated' if self.simulated else self.data}"


REAL = [
    Case(gaussian_full, "gaussian_full", "iris", 3),
    Case(gaussian_diagonal, "gaussian_diagonal", "flower", 3),
    Case(gaussian_spherical, "gaussian_spherical", "iris", 3),
    Case(gaussian_tied, "gaussian_tied", "iris", 3),
    Case(GaussianIsotropic(0.02), "gaussian_isotropic", "flower", 3),
    Case(bernoulli, "bernoulli", "digits", 6, bernoulli_prior),
    Case(bernoulli.UniformWeights(), "bernoulli_uniform", "carcinoma", 2, uniform_prior),
    Case(laplace, "laplace", "faithful", 2),
    Case(gaussian_sum.KnownNoise(known_noise()), "gaussian_sum_known_noise", "faithful", 2),
    Case(gaussian_sum, "gaussian_sum", "faithful", (2, 2), sum_prior),
]
CASES = [*REAL, *(Case(**{**vars(case), "simulated": True}) for case in REAL)]


@cache
def data_and_fit(case: Case, seed: int) -> tuple[Tensor, Any, Any, Fit]:
    """Return the data, the prior, a common start for every engine, and what EM made of it.

    Simulated data are draws from the fit to the real ones. The start is the best of five times five EM steps from k-means++ seeds, so that every engine
    begins in the basin of one mode.
    """
    generator = torch.Generator().manual_seed(seed)
    if case.simulated:
        x, _, _, real = data_and_fit(Case(**{**vars(case), "simulated": False}), seed)
        x, _ = case.family.sample(real.params, 300, generator)
    else:
        x = real_data(case.data)
    prior = None if case.prior is None else case.prior(x)
    inits = [case.family.init_params(x, case.num_components, generator) for _ in range(5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        starts = [em(case.family, x, init, prior=prior, max_steps=5) for init in inits]
    start = max(starts, key=lambda fit: fit.log_lik[-1].item()).params
    return x, prior, start, em(case.family, x, start, prior=prior, max_steps=5000, rtol=1e-13)


def program(case: Case, prior: Any) -> Callable[..., Any]:
    return partial(case.family.model, num_components=case.num_components, prior=prior)


def verify_same_mode(case: Case, *, seed: int) -> Report:
    """Compare the log density at EM's fixed point with that at the mode Pyro's enumerated program has from the same start."""
    x, prior, start, fit = data_and_fit(case, seed)
    mode = posterior_mode(program(case, prior), start, x)
    error = abs(mode.log_density - fit.log_lik[-1].item()) / abs(mode.log_density)
    detail = f"{mode.log_density:.6f} after {fit.num_steps} EM steps and {mode.num_steps} quasi-Newton steps"
    values = None if error <= AGREEMENT else {"EM": fit.params, "Pyro": mode.params}
    check = Check("log density of both modes", error <= AGREEMENT, error, AGREEMENT, None, values, detail)
    return conclude(case.id, [check], seed)


def verify_svi_optimum(case: Case, *, seed: int) -> Report:
    """Compare the end of SVI with a delta guide with EM's fixed point.

    It ends where its steps are smallest: the tolerance is the largest fall of the log density that such a step in every coordinate
    causes, among 32 random directions, and beside it the agreement that EM's own end is held to.
    """
    x, prior, start, fit = data_and_fit(case, seed)
    model = program(case, prior)
    hidden = pyro.poutine.block(model, hide=["z", "k", "l"])
    guide = AutoDelta(hidden, init_loc_fn=init_to_value(values=start._asdict()))
    rprop = PyroOptim(torch.optim.Rprop, {"lr": 0.01, "step_sizes": (SMALLEST_STEP, 50.0)})
    found = svi(model, guide, x, num_steps=SVI_STEPS, seed=seed, optimiser=rprop)
    best = fit.log_lik[-1].item()
    mode = fit.params._asdict()
    site = inspect(model, mode, x)
    coordinates = Coordinates(site.supports, mode)
    generator = torch.Generator().manual_seed(seed)
    u = coordinates.inverse(mode).nan_to_num(posinf=36, neginf=-36)  # 36: a logit at the edge of rounding
    falls = []
    for _ in range(32):
        signs = 2 * torch.randint(2, u.shape, generator=generator) - 1
        falls.append(best - log_density(model, site, coordinates(u + SMALLEST_STEP * signs), x).item())
    error, tolerance = abs(best + found.losses[-1].item()) / abs(best), AGREEMENT + max(falls) / abs(best)
    detail = f"{-found.losses[-1].item():.6f} after {SVI_STEPS} steps of SVI, {best:.6f} by EM"
    values = None if error <= tolerance else {"EM": best, "SVI": -found.losses[-1].item()}
    return conclude(
        case.id, [Check("log density at SVI's end", error <= tolerance, error, tolerance, None, values, detail)], seed
    )


def verify_steps(case: Case, *, seed: int) -> Report:
    """Try to refute the family's E-step and M-step against its program."""
    x, prior, start, _ = data_and_fit(case, seed)
    x = x[:150]
    family = case.family

    def m_step(resp: Tensor, x: Tensor, *, params: Any) -> Any:
        return family.m_step(family.statistics(params, x, resp), prior)

    return verify_em(
        program(case, prior),
        start,
        e_step=lambda params, x: family.log_joint(params, x).softmax(-1),
        m_step=m_step,
        data=(x,),
        log_likelihood=lambda params, x: family.log_joint(params, x).logsumexp(-1).sum(),
        seed=seed,
        subject=case.id,
    )


def draw(model: Callable[..., Tensor], case: Case, params: Any, num_samples: int, generator: torch.Generator) -> Tensor:
    """Return draws of a Pyro program with its parameters set."""
    pyro.set_rng_seed(int(torch.randint(2**31, (), generator=generator)))
    return bind(model, params._asdict())(
        num_components=case.num_components, num_data=num_samples, num_features=params[1].shape[-1]
    )


def verify_program_moments(case: Case, *, seed: int) -> Report:
    """Compare the closed-form moments at the fit with those of the program's draws."""
    params = data_and_fit(case, seed)[3].params
    mean, covariance = case.family.moments(params)
    sampler = partial(draw, case.family.model, case, params)
    smallest = 0.02 if len(mean) <= 8 else 0.1  # the draws of an image cost more, and there are 2,080 covariances
    return verify_moments(sampler, mean, covariance, smallest=smallest, seed=seed, subject=case.id)


def verify_sum_density(case: Case, *, seed: int) -> Report:
    """Compare the density of the sum at the fit with draws of the generative process: draw x, draw y, add."""
    params = data_and_fit(case, seed)[3].params
    sampler = partial(draw, gaussian_sum.generative_model, case, params)
    return verify_density(
        lambda x: gaussian_sum.log_joint(params, x).logsumexp(-1), sampler, seed=seed, subject=case.id
    )


def claim(kind: str, case: Case, says: str, formula: str, check: Callable[..., Report]) -> Claim:
    return Claim(f"E.{kind}.{case.id}", says, formula, "holds", partial(check, case))


SAME_MODE = r"\log p(\mathbf{X}, \theta_{\text{EM}}) = \log p(\mathbf{X}, \theta_{\text{Pyro}})"
SAME_OPTIMUM = r"\log p(\mathbf{X}, \theta_{\text{EM}}) = \log p(\mathbf{X}, \theta_{\text{SVI}})"
REACH = "EM and {} reach the same local maximum from the same start."
SAME_STEPS = r"\gamma = p(\mathbf{Z} \mid \mathbf{X}, \theta), \quad \nabla_\theta Q = 0"
SAME_MOMENTS = r"\mathbb{E}[\mathbf{x}], \text{Cov}[\mathbf{x}]"
SAME_DENSITY = r"p(\mathbf{z}) = \sum_{k,l} \pi_k^x \pi_l^y \mathcal{N}(\mathbf{z} \mid \cdot)"

CLAIMS = [
    *(claim("map", case, REACH.format("Pyro's MAP"), SAME_MODE, verify_same_mode) for case in CASES),
    *(claim("svi", case, REACH.format("SVI"), SAME_OPTIMUM, verify_svi_optimum) for case in CASES),
    *(claim("em", case, "Both steps belong to the program.", SAME_STEPS, verify_steps) for case in CASES),
    *(claim("moments", case, "The moments are the program's.", SAME_MOMENTS, verify_program_moments) for case in CASES),
    *(
        claim("density", case, "The density is that of the generative process.", SAME_DENSITY, verify_sum_density)
        for case in CASES
        if case.family is gaussian_sum
    ),
]
