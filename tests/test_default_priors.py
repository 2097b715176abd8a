"""The default priors: proper, on the scale of the data, with published numbers; some rows give none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from mixproof.inference.exact_evidence import exact_log_evidence
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.validation import check_prior, example_params
from mixproof.models import gaussian_diagonal, gaussian_full, gaussian_spherical, gaussian_sum, gaussian_tied, laplace
from mixproof.models.positive_definite import InverseWishart

if TYPE_CHECKING:
    from tests.conftest import Case

DATA = Path(__file__).parent / "data"
TWO_GROUPS = torch.cat([torch.linspace(-2, 0, 4), torch.linspace(0.7, 2.4, 4)]).double()[:, None]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_weakly_informative_priors_are_proper_and_on_the_scale_of_the_data(case: Case, size: int) -> None:
    if not hasattr(case.family, "weakly_informative_prior"):
        assert case.num_weights > 1
        return
    x = case.data(3, 60)
    prior = case.family.weakly_informative_prior(x, size)
    check_prior(case.family, prior, example_params(case.family, size, x)[0])
    posterior = LogPosterior(case.program(size, prior), x)
    assert posterior.draw_prior(50, seed=0).isfinite().all()
    if not case.has_real_data:
        return
    moved = case.family.weakly_informative_prior(x + 3, size)
    torch.testing.assert_close(moved.loc, prior.loc + 3)
    for name, value in prior._asdict().items():
        if name != "loc":
            torch.testing.assert_close(getattr(moved, name), value)


def test_the_univariate_prior_is_that_of_the_mclust_book() -> None:
    """Galaxies, K = 3, chapter 7: sigma2 ~ IG(3/2, 2.3187/2), mu ~ N(20.831, sigma2/0.01), flat weights."""
    x = torch.tensor(np.loadtxt(DATA / "galaxies_roeder1990.txt").reshape(-1, 1))
    for family in (gaussian_diagonal, gaussian_spherical):
        prior = family.weakly_informative_prior(x, 3)
        assert prior.loc.item() == pytest.approx(20.831, abs=5e-4)
        assert prior.strength.item() == 0.01
        assert prior.shape.item() == 1.5
        assert 2 * prior.rate.item() == pytest.approx(2.3187, abs=5e-5)
        assert prior.concentration.tolist() == [1, 1, 1]


@pytest.mark.parametrize(("size", "num_features"), [(1, 3), (4, 3), (3, 1)])
def test_components_share_the_volume_of_the_data(size: int, num_features: int) -> None:
    """The mean covariance under each prior has 1 / K^2 of the determinant of the data's, where it keeps the shape."""
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(40, num_features, generator=generator, dtype=torch.float64)
        * torch.tensor([1.0, 3.0, 0.2])[:num_features]
    )
    x[:, -1] += x[:, 0]
    of_data = np.atleast_2d(np.cov(x.mT.numpy()))
    full, tied, diagonal, spherical = (
        family.weakly_informative_prior(x, size)
        for family in (gaussian_full, gaussian_tied, gaussian_diagonal, gaussian_spherical)
    )
    for prior in (full, tied):
        mean = (prior.scale / (prior.df - num_features - 1)).numpy()
        assert np.linalg.det(mean) == pytest.approx(np.linalg.det(of_data) / size**2, rel=1e-12)
        np.testing.assert_allclose(mean / mean[0, 0], of_data / of_data[0, 0], rtol=1e-12)
    means = (diagonal.rate / (diagonal.shape - 1)).numpy()
    np.testing.assert_allclose(means, of_data.diagonal() / size ** (2 / num_features), rtol=1e-12)
    assert float(spherical.rate / (spherical.shape - 1)) == pytest.approx(means.mean(), rel=1e-12)
    doubly_exponential = laplace.weakly_informative_prior(x, size)
    deviations = np.abs(x.numpy() - np.median(x.numpy(), 0)).mean(0)
    assert doubly_exponential.shape.tolist() == [2] * num_features
    np.testing.assert_allclose(doubly_exponential.rate.numpy(), deviations / size ** (1 / num_features), rtol=1e-12)
    np.testing.assert_array_equal(doubly_exponential.loc.numpy(), np.quantile(x.numpy(), 0.5, axis=0, method="lower"))
    assert doubly_exponential.strength.item() == 0.1


def test_one_variance_has_the_same_prior_in_every_gaussian_family() -> None:
    """So that full and diagonal with D = 1 are one model, of one evidence; exactly."""
    x = TWO_GROUPS
    values = [
        exact_log_evidence(family, x, family.weakly_informative_prior(x, 2), num_components=2).item()
        for family in (gaussian_full, gaussian_diagonal, gaussian_spherical)
    ]
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-12)


def test_a_column_without_scale_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="column 1 of x is constant"):
        gaussian_full.weakly_informative_prior(torch.tensor([[1.0, 2.0], [2.0, 2.0]]).double(), 2)
    with pytest.raises(ValueError, match="one row says nothing"):
        gaussian_diagonal.weakly_informative_prior(torch.ones(1, 2).double(), 1)


@pytest.mark.parametrize("size", [1, 2])
def test_rows_that_give_no_prior_are_refused_in_words(case: Case, size: int) -> None:
    if not hasattr(case.family, "weakly_informative_prior"):
        assert case.num_weights > 1
        return
    make, x = case.family.weakly_informative_prior, case.data(3, 20)
    spoilt = x.clone()
    spoilt[3, 1] = math.nan
    for rows, number, words in (
        (x.numpy(), size, "x must be a floating tensor"),
        (x.long(), size, "x must be a floating tensor"),
        (x[:, 0], size, r"x must have shape \(N, D\)"),
        (spoilt, size, r"x\[3, 1\] is nan"),
        (x, 0, "the number of components must be at least 1, not 0"),
        (x, 1.5, "the number of components must be an integer, not 1.5"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            make(rows, number)


@pytest.mark.parametrize("family", [gaussian_full, gaussian_tied])
def test_a_singular_covariance_gives_no_prior(family: Any) -> None:
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(ValueError, match="3 rows of 3 columns, whose covariance is singular"):
        family.weakly_informative_prior(x[:3], 2)
    x[:, 2] = x[:, 0] - 2 * x[:, 1]
    with pytest.raises(ValueError, match="columns of x are linearly dependent"):
        family.weakly_informative_prior(x, 2)


def test_priors_of_another_shape_are_refused_where_they_broadcast() -> None:
    """K = D = 2: two degrees of freedom could be those of two components or of two columns."""
    params = example_params(gaussian_full, 2, TWO_GROUPS.expand(-1, 2))[0]
    prior = gaussian_full.Prior(*(torch.as_tensor(v) for v in ([1.0, 1.0], [0.0, 0.0], 0.1, 4.0, torch.eye(2))))
    assert check_prior(gaussian_full, prior, params).df.shape == ()
    words = r"(strength|loc) of the prior must have shape|the degrees of freedom must be one number"
    for name, value in {"df": [4.0, 50.0], "strength": [0.1, 1.0], "loc": [[0.0, 0.0], [1.0, 1.0]]}.items():
        wrong = prior._replace(**{name: torch.tensor(value)})
        with pytest.raises(ValueError, match=words):
            check_prior(gaussian_full, wrong, params)
        pair = gaussian_sum.Prior(prior, wrong)
        with pytest.raises(ValueError, match=words):
            check_prior(
                gaussian_sum,
                pair,
                example_params(gaussian_sum, (2, 2), TWO_GROUPS.expand(-1, 2))[0],
            )
    with pytest.raises(ValueError, match="must be one number and the scale one matrix, not of shapes"):
        InverseWishart(torch.tensor([4.0, 50.0]), torch.eye(2))
