"""Published results that nobody on this project computed; tests/data/README.md says where the data come from."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference.em import Fit, em, responsibilities
from mixproof.models import bernoulli, gaussian_diagonal, gaussian_full

DATA = Path(__file__).parent / "data"


def iris() -> tuple[Tensor, Tensor]:
    bunch = load_iris()
    species = torch.nn.functional.one_hot(torch.as_tensor(bunch.target), 3).double()
    return torch.as_tensor(bunch.data), species


def mclust(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"iris_{name}_VVV_from_species.json").read_text())


def after_m_step(x: Tensor, resp: Tensor) -> gaussian_full.Params:
    """Return the parameters that one M-step makes of responsibilities, from statistics about the mean of the data."""
    size, k = x.shape[1], resp.shape[1]
    anywhere = gaussian_full.Params(
        resp.new_full((k,), 1 / k), x.mean(0).expand(k, -1), torch.eye(size, dtype=x.dtype).expand(k, -1, -1)
    )
    return gaussian_full.m_step(gaussian_full.statistics(anywhere, x, resp))


def few_steps(family: Any, x: Tensor, start: Any, num_steps: int) -> Fit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return em(family, x, start, max_steps=num_steps, rtol=0.0)


def assert_prints_as(found: Tensor, printed: Any, significant: int = 7, decimals: int | None = None) -> None:
    """Check numbers against print-outs to half a unit in the last printed digit, and a hair for rounded halves."""
    expected = np.asarray(printed, dtype=float)
    if decimals is None:
        exponents = np.floor(np.log10(np.abs(np.where(expected == 0, 1, expected))))
        unit = 10.0 ** (exponents - significant + 1)
    else:
        unit = np.full_like(expected, 10.0**-decimals)
    error = np.abs(found.numpy() - expected)
    assert (error <= 0.5001 * unit).all(), (error / unit).max()


# Reference 1 and 2: mclust, function estep() and me() of its reference pages, model VVV


def test_iris_of_scikit_learn_is_fishers() -> None:
    x, _ = iris()
    assert torch.equal(x[34], torch.tensor([4.9, 3.1, 1.5, 0.2], dtype=torch.float64))
    assert torch.equal(x[37], torch.tensor([4.9, 3.6, 1.4, 0.1], dtype=torch.float64))


def test_the_errors_of_the_uci_copy_would_show() -> None:
    x, species = iris()
    x[34, 3] = 0.1
    x[37, 1:3] = torch.tensor([3.1, 1.5], dtype=torch.float64)
    found = gaussian_full.log_joint(after_m_step(x, species), x).logsumexp(-1).sum()
    assert abs(found - mclust("estep")["loglik"]) > 0.1


def test_iris_one_m_step_and_one_e_step_from_the_species() -> None:
    reference, (x, species) = mclust("estep"), iris()
    params = after_m_step(x, species)
    assert_prints_as(gaussian_full.log_joint(params, x).logsumexp(-1).sum(), reference["loglik"], decimals=4)
    assert_prints_as(params.weights, reference["pro"])
    assert_prints_as(params.locs.mT, reference["means_by_variable_then_component"])
    assert_prints_as(params.covariances, reference["covariances"], decimals=6)
    found, printed = responsibilities(gaussian_full, params, x), np.array(reference["z"])
    assert_prints_as(found, printed)


def test_iris_after_eleven_iterations_of_mclust() -> None:
    """mclust counts the M-step from the labels, so ours are ten steps from the parameters it makes."""
    reference, (x, species) = mclust("me"), iris()
    assert reference["iterations"] == 11
    fit = few_steps(gaussian_full, x, after_m_step(x, species), 10)
    assert_prints_as(fit.log_lik[-1], reference["loglik"], decimals=4)
    assert_prints_as(fit.params.weights, reference["pro"])
    assert_prints_as(fit.params.locs.mT, reference["means_by_variable_then_component"])
    assert_prints_as(fit.params.covariances, reference["covariances"], decimals=8)
    found, printed = responsibilities(gaussian_full, fit.params, x), np.array(reference["z"])
    assert_prints_as(found, printed)


def test_iris_tight_optimum_from_the_species() -> None:
    x, species = iris()
    fit = em(gaussian_full, x, after_m_step(x, species), rtol=1e-12)
    assert fit.converged
    assert_prints_as(fit.log_lik[-1], -180.1855, decimals=4)


# Reference 3: tests of the R package tidyLPA, Mplus and mclust side by side


def test_iris_with_two_components() -> None:
    x, species = iris()
    two = torch.stack([species[:, 0], species[:, 1] + species[:, 2]], 1)
    fit = em(gaussian_full, x, after_m_step(x, two), rtol=1e-12)
    assert_prints_as(fit.log_lik[-1], -214.3547, decimals=4)
    free = em(gaussian_full, x, gaussian_full.init_params(x, 2, torch.Generator().manual_seed(0)), rtol=1e-12)
    assert_prints_as(free.log_lik[-1], -214.3547, decimals=4)


# Reference 4: Linzer and Lewis, poLCA, Journal of Statistical Software 42(10), 2011, section 5.1


def carcinoma() -> Tensor:
    coded = np.loadtxt(DATA / "carcinoma.csv", delimiter=",", skiprows=1)
    assert coded.shape == (118, 7)
    assert set(np.unique(coded)) == {1.0, 2.0}
    return torch.as_tensor(coded - 1)


def latent_class_fits(k: int, num_starts: int, method: str) -> list[Fit]:
    x, generator = carcinoma(), torch.Generator().manual_seed(1)
    starts = [bernoulli.init_params(x, k, generator, method) for _ in range(num_starts)]
    return [em(bernoulli, x, start, max_steps=5000, rtol=1e-12) for start in starts]


def test_carcinoma_with_two_classes() -> None:
    fits = latent_class_fits(2, 5, "k-means++")
    assert_prints_as(torch.stack([fit.log_lik[-1] for fit in fits]).max(), -317.2568, decimals=4)


def test_carcinoma_with_three_classes() -> None:
    """The best of several starts; the worse optimum is found too, and the best has probabilities at exactly 0 and 1."""
    fits = latent_class_fits(3, 20, "random")
    ends = torch.stack([fit.log_lik[-1] for fit in fits])
    best = fits[int(ends.argmax())].params
    assert_prints_as(ends.max(), -293.705, decimals=3)
    assert any(abs(end + 296.808) < 5e-4 for end in ends.tolist())
    # The manual's table of class-conditional probabilities shows entries of 0.0000 and 1.0000.
    assert (best.probs < 5e-5).any()
    assert (best.probs > 1 - 5e-5).any()


# Reference 5: Scrucca, Fraley, Murphy and Raftery, Model-Based Clustering, Classification, and Density Estimation Using
# mclust in R (2023), chapter 7: galaxies, model V with a conjugate prior


def galaxies() -> Tensor:
    x = torch.as_tensor(np.loadtxt(DATA / "galaxies_roeder1990.txt"))[:, None]
    assert x.shape == (82, 1)
    assert x[77] == 26.960
    return x


def galaxy_mode(family: Any, x: Tensor) -> Any:
    """Return MAP-EM's parameters from the partition into the slow, the fast and the rest, under mclust's default prior.

    The book prints the hyperparameters 20.831 and 2.3187, which are the mean and the variance over 3^2 of the data; the
    figures below them were computed from the unrounded ones (mclust's documentation, defaultPrior).
    """
    mean, scale = x.mean(0), x.var(0) / 9
    strength, flat = x.new_tensor(0.01), x.new_ones(3)
    if family is gaussian_diagonal:
        prior: Any = family.Prior(flat, mean, strength, x.new_tensor([3 / 2]), scale / 2)
        spread = x.new_ones(3, 1)
    else:  # with D = 1, InverseWishart(df, scale) is InverseGamma(df / 2, scale / 2)
        prior = family.Prior(flat, mean, strength, x.new_tensor(3.0), scale[None])
        spread = x.new_ones(3, 1, 1)
    resp = torch.cat([x < 15, x > 30, (x >= 15) & (x <= 30)], 1).double()
    anywhere = family.Params(flat / 3, mean.expand(3, 1), spread)
    start = family.m_step(family.statistics(anywhere, x, resp), prior)
    return em(family, x, start, prior=prior, rtol=1e-14).params


VARIANCES = [0.36949, 0.70599, 4.51272]
FAMILIES = pytest.mark.parametrize("family", [gaussian_diagonal, gaussian_full], ids=["diagonal", "full"])


@FAMILIES
def test_galaxies_mode_under_the_normal_inverse_gamma_prior(family: Any) -> None:
    x = galaxies()
    assert_prints_as(x.mean(), 20.831, decimals=3)
    assert_prints_as(x.var() / 9, 2.3187, decimals=4)
    params = galaxy_mode(family, x)
    assert_prints_as(params.weights, [0.085366, 0.036585, 0.878050], decimals=6)
    assert_prints_as(params.locs[:, 0], [9.726, 33.004, 21.404], decimals=3)
    assert_prints_as(params[2].flatten(), VARIANCES, decimals=5)
    assert_prints_as(family.log_joint(params, x).logsumexp(-1).sum(), -204.35, decimals=2)


@FAMILIES
def test_the_typing_error_in_galaxies_would_show(family: Any) -> None:
    x = galaxies()
    x[77] = 26.690
    assert abs(galaxy_mode(family, x)[2].flatten()[2].item() - VARIANCES[2]) > 1e-2
