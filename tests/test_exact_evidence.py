"""Sums over all allocations: the closed forms against predictive laws row by row, quadrature, and their own axioms."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from torch import Tensor

from mixproof.inference.exact_evidence import exact_draws, exact_log_evidence, exact_posterior
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
from tests.conftest import Case, seeded

ROUNDINGS = 2**12
EPS = torch.finfo(torch.float64).eps
QUADRATURE = 1e-7
"""The error that quad is asked to stay below, relatively."""


def complete(case: Case, k: int = 3, num_data: int = 7, num_features: int = 2) -> tuple[Tensor, Tensor, Any, Any, Any]:
    """Return rows, allocations of them that leave a component empty, their statistics, the prior and parameters."""
    params = case.params(3, k, num_features)
    x = case.family.sample(params, num_data, seeded(4))[0]
    z = torch.arange(num_data) % max(k - 1, 1)
    resp = torch.nn.functional.one_hot(z, k).double()
    return x, z, case.family.statistics(params, x, resp), case.prior(1, k, num_features), params


# log p(x, z) by the chain rule: each row's predictive law given the rows before, by textbook updates one row at a time


class NormalWishart:
    """Murphy 2007, equations 234 to 238: predictive law of a component, of one feature vector at a time."""

    def __init__(self, prior: Any, num_components: int):
        self.loc = [prior.loc.numpy().copy() for _ in range(num_components)]
        self.strength = [float(prior.strength)] * num_components
        self.df = [float(prior.df)] * num_components
        self.scale = [prior.scale.numpy().copy() for _ in range(num_components)]

    def log_predictive(self, row: np.ndarray, k: int) -> float:
        df = self.df[k] - len(row) + 1
        shape = self.scale[k] * (self.strength[k] + 1) / (self.strength[k] * df)
        return float(scipy.stats.multivariate_t(self.loc[k], shape, df).logpdf(row))

    def update(self, row: np.ndarray, k: int) -> None:
        away = row - self.loc[k]
        self.scale[k] += np.outer(away, away) * self.strength[k] / (self.strength[k] + 1)
        self.loc[k] += away / (self.strength[k] + 1)
        self.strength[k] += 1
        self.df[k] += 1


class SharedWishart(NormalWishart):
    """One df and scale for all components."""

    def log_predictive(self, row: np.ndarray, k: int) -> float:
        self.df[k], self.scale[k] = self.df[0], self.scale[0]
        return super().log_predictive(row, k)

    def update(self, row: np.ndarray, k: int) -> None:
        self.df[k], self.scale[k] = self.df[0], self.scale[0].copy()
        super().update(row, k)
        self.df[0], self.scale[0] = self.df[k], self.scale[k]


class NormalGamma:
    """Murphy 2007, equations 170 to 176 and 205: features one by one."""

    def __init__(self, prior: Any, num_components: int):
        size = len(prior.loc)
        self.loc = np.tile(prior.loc.numpy(), (num_components, 1))
        self.strength = np.full(num_components, float(prior.strength))
        self.shape = np.tile(np.broadcast_to(prior.shape.numpy(), size), (num_components, 1))
        self.rate = np.tile(np.broadcast_to(prior.rate.numpy(), size), (num_components, 1))

    def log_predictive(self, row: np.ndarray, k: int) -> float:
        spread = np.sqrt(self.rate[k] * (self.strength[k] + 1) / (self.shape[k] * self.strength[k]))
        return float(scipy.stats.t(2 * self.shape[k], self.loc[k], spread).logpdf(row).sum())

    def update(self, row: np.ndarray, k: int) -> None:
        away = row - self.loc[k]
        self.rate[k] += away**2 * self.strength[k] / (2 * (self.strength[k] + 1))
        self.shape[k] += 0.5
        self.loc[k] += away / (self.strength[k] + 1)
        self.strength[k] += 1


class SphericalGamma(NormalGamma):
    """One variance for all features: a multivariate t."""

    def log_predictive(self, row: np.ndarray, k: int) -> float:
        variance = self.rate[k][0] * (self.strength[k] + 1) / (self.shape[k][0] * self.strength[k])
        shape = variance * np.eye(len(row))
        return float(scipy.stats.multivariate_t(self.loc[k], shape, 2 * self.shape[k][0]).logpdf(row))

    def update(self, row: np.ndarray, k: int) -> None:
        away = row - self.loc[k]
        before = self.rate[k][0]
        super().update(row, k)
        self.rate[k] = before + (away**2).sum() * (self.strength[k] - 1) / (2 * self.strength[k])
        self.shape[k] += (len(row) - 1) / 2


class KnownVariance(NormalGamma):
    """Murphy 2007, equation 38."""

    def __init__(self, prior: Any, num_components: int, variance: float):
        one = torch.ones_like(prior.loc)
        super().__init__(
            gaussian_diagonal.Prior(prior.concentration, prior.loc, prior.strength, one, one), num_components
        )
        self.variance = variance

    def log_predictive(self, row: np.ndarray, k: int) -> float:
        spread = math.sqrt(self.variance * (1 + 1 / self.strength[k]))
        return float(scipy.stats.norm(self.loc[k], spread).logpdf(row).sum())


class Urn:
    """Beta-Bernoulli: the share of ones seen, the prior's counts among them."""

    def __init__(self, prior: Any, num_components: int):
        self.ones = np.tile(prior.ones.numpy(), (num_components, 1))
        self.zeros = np.tile(prior.zeros.numpy(), (num_components, 1))

    def log_predictive(self, row: np.ndarray, k: int) -> float:
        share = self.ones[k] / (self.ones[k] + self.zeros[k])
        return float(np.log(np.where(row == 1, share, 1 - share)).sum())

    def update(self, row: np.ndarray, k: int) -> None:
        self.ones[k] += row
        self.zeros[k] += 1 - row


def predictive_law(case: Case, prior: Any, k: int) -> Any:
    if isinstance(case.family, GaussianIsotropic):
        return KnownVariance(prior, k, case.family.variance)
    if case.module is bernoulli:
        return Urn(prior, k)
    by_module = {
        gaussian_full: NormalWishart,
        gaussian_tied: SharedWishart,
        gaussian_diagonal: NormalGamma,
        gaussian_spherical: SphericalGamma,
    }
    return by_module[case.module](prior, k)


def chain_rule(case: Case, x: Tensor, z: Tensor, prior: Any, k: int) -> Iterator[list[float]]:
    """Yield for each row log p(x_n, z_n = j | rows before) of every component j."""
    law = predictive_law(case, prior, k)
    urn = prior.concentration.numpy().copy() if hasattr(prior, "concentration") else None
    for row, own in zip(x.numpy(), z.tolist(), strict=True):
        shares = np.full(k, 1 / k) if urn is None else urn / urn.sum()
        yield [math.log(shares[j]) + law.log_predictive(row, j) for j in range(k)]
        law.update(row, own)
        if urn is not None:
            urn[own] += 1


def able(case: Case) -> bool:
    return hasattr(case.family, "log_marginal")


def test_only_the_sums_have_no_closed_form(all_families: list[Case]) -> None:
    assert {case.name for case in all_families if not able(case)} == {"gaussian_sum", "KnownNoise"}


@pytest.mark.parametrize(("k", "num_features"), [(1, 2), (3, 2), (2, 1)])
def test_closed_form_is_the_product_of_predictive_laws(case: Case, k: int, num_features: int) -> None:
    if not able(case) or case.family is laplace:
        return  # laplace by quadrature, below
    x, z, stats, prior, _ = complete(case, k, num_features=num_features)
    found = case.family.log_marginal(stats, prior).item()
    expected = sum(terms[own] for terms, own in zip(chain_rule(case, x, z, prior, k), z.tolist(), strict=True))
    assert abs(found - expected) <= ROUNDINGS * EPS * abs(expected)


def test_families_whose_statistics_add_predict_the_next_row(all_families: list[Case]) -> None:
    for case in all_families:
        assert hasattr(case.family, "log_predictive") == (able(case) and getattr(case.family, "additive", False))


@pytest.mark.parametrize("k", [1, 3])
def test_the_next_row_is_as_the_rows_so_far_predict(case: Case, k: int) -> None:
    """From no rows at all to all but one, in one batch, and the last alone."""
    if not hasattr(case.family, "log_predictive"):
        return
    x, z, _, prior, params = complete(case, k)
    resp = torch.nn.functional.one_hot(z, k).double()
    before = [case.family.statistics(params, x[:n], resp[:n]) for n in range(len(x))]
    stats = type(before[0])(*(torch.stack(values) for values in zip(*before, strict=True)))
    found = case.family.log_predictive(stats, prior, x)
    expected = torch.tensor(list(chain_rule(case, x, z, prior, k)), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=ROUNDINGS * EPS, atol=ROUNDINGS * EPS)
    last = case.family.log_predictive(before[-1], prior, x[-1])
    torch.testing.assert_close(last, expected[-1], rtol=ROUNDINGS * EPS, atol=ROUNDINGS * EPS)


def test_closed_form_of_laplace_is_the_double_integral() -> None:
    """Over location and log scale of one component, with a row twice and one at the prior's location."""
    loc0, strength, shape, rate = 0.3, 0.7, 2.5, 1.2
    prior = laplace.Prior(*(torch.tensor(value).double() for value in ([2.0], [loc0], strength, [shape], [rate])))
    rows = [-1.0, loc0, 2.0, 2.0, 5.0]

    def density(scale: float, loc: float) -> float:
        log_rows = -sum(abs(row - loc) for row in rows) / scale - len(rows) * math.log(2 * scale)
        log_loc = math.log(strength / (2 * scale)) - strength * abs(loc - loc0) / scale
        log_scale = shape * math.log(rate) - math.lgamma(shape) - (shape + 1) * math.log(scale) - rate / scale
        return math.exp(log_rows + log_loc + log_scale + 15)

    def over_scale(loc: float) -> float:
        return scipy.integrate.quad(density, 0, np.inf, args=(loc,), epsrel=QUADRATURE, epsabs=0)[0]

    kinks = [-math.inf, *sorted({*rows}), math.inf]
    pieces = [scipy.integrate.quad(over_scale, a, b, epsrel=QUADRATURE, epsabs=1e-10)[0] for a, b in pairwise(kinks)]
    stats = laplace.Stats(torch.tensor(rows)[:, None], torch.ones(len(rows), 1).double())
    found = laplace.log_marginal(stats, prior).item()
    assert abs(found + 15 - math.log(sum(pieces))) <= 10 * QUADRATURE


# p(x) is a density in x: it sums to one, and a row integrated out leaves the density of the others


def integral_over_last_row(family: Any, x: Tensor, prior: Any, k: int) -> float:
    def density(value: float) -> float:
        rows = torch.cat([x, torch.full((1, 1), value, dtype=torch.float64)])
        return exact_log_evidence(family, rows, prior, num_components=k).exp().item()

    kinks = [-math.inf, *sorted({*x[:, 0].tolist(), prior.loc.item()}), math.inf]
    return sum(scipy.integrate.quad(density, a, b, epsrel=QUADRATURE)[0] for a, b in pairwise(kinks))


def error_of_marginalisation(family: Any, x: Tensor, prior: Any, k: int = 2) -> float:
    expected = exact_log_evidence(family, x, prior, num_components=k).item()
    return abs(math.log(integral_over_last_row(family, x, prior, k)) - expected)


def test_a_row_integrated_out_leaves_the_evidence_of_the_others(real_case: Case) -> None:
    if not able(real_case):
        return
    x = real_case.family.sample(real_case.params(2, 2, 1), 2, seeded(3))[0]
    assert error_of_marginalisation(real_case.family, x, real_case.prior(1, 2, 1)) <= 10 * QUADRATURE


def test_evidence_of_all_binary_data_is_one(case: Case) -> None:
    if case.module is not bernoulli:
        return
    prior = case.prior(1, 2, 2)
    rows = list(itertools.product([0.0, 1.0], repeat=6))
    evidence = [exact_log_evidence(case.family, np.reshape(row, (3, 2)), prior, num_components=2) for row in rows]
    assert abs(torch.stack(evidence).exp().sum().item() - 1) <= ROUNDINGS * EPS


def test_one_bit_is_a_fair_coin_before_any_was_seen(case: Case) -> None:
    """Its evidence, and its probability in the mean over draws of the parameters given nothing."""
    if case.module is not bernoulli:
        return
    x, params = torch.ones(1, 1).double(), case.params(1, 3, 1)
    prior = case.family.weakly_informative_prior(x, 3)
    evidence = exact_log_evidence(case.family, x, prior, num_components=3).exp().item()
    assert abs(evidence - 0.5) <= ROUNDINGS * EPS
    batch = type(params)(*(value.expand(10_000, *value.shape) for value in params))
    nothing = case.family.statistics(batch, x[:0], torch.zeros(10_000, 0, 3).double())
    drawn = case.family.draw(batch, nothing, prior, seeded(0))
    probs = torch.func.vmap(case.family.log_joint, (0, None))(drawn, x).exp().sum((-2, -1))
    error = (probs.mean() - 0.5).abs() / (probs.std() / math.sqrt(len(probs)))
    assert error < scipy.stats.norm.isf(1e-6)


FAULTS: dict[str, Callable[[Any, Any], Any]] = {
    "half a degree of freedom too many": lambda after, prior: after._replace(shape=after.shape + 0.25),
    "strength of the prior forgotten": lambda after, prior: after._replace(strength=after.strength - prior.strength),
    "rows weigh n / (n - 1)": lambda after, prior: after._replace(
        rate=prior.rate + (after.rate - prior.rate) * 4 / 3  # as if of 4 rows
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_marginalisation_sees_planted_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty components stay right, so that only the law of rows is at fault."""
    right = gaussian_diagonal.posterior

    def faulty(stats: Any, prior: Any) -> Any:
        after = right(stats, prior)
        found = FAULTS[fault](after, prior)
        empty = (stats.counts == 0)[..., None]
        return found._replace(
            strength=torch.where(empty, after.strength, found.strength),
            shape=torch.where(empty, after.shape, found.shape),
            rate=torch.where(empty, after.rate, found.rate),
        )

    prior = gaussian_diagonal.Prior(*(torch.tensor(value).double() for value in ([2.0, 1.0], [0.3], 0.7, [2.5], [1.2])))
    x = torch.tensor([[0.2], [1.1]]).double()
    assert error_of_marginalisation(gaussian_diagonal, x, prior) <= 10 * QUADRATURE
    monkeypatch.setattr(gaussian_diagonal, "posterior", faulty)
    assert error_of_marginalisation(gaussian_diagonal, x, prior) > 1e-3


# The sum over allocations


def test_posterior_is_over_all_allocations(case: Case) -> None:
    if not able(case):
        return
    x, prior = case.data(1, 4), case.prior(2)
    found = exact_posterior(case.family, x, prior, num_components=3)
    assert {tuple(z) for z in found.allocations.tolist()} == set(itertools.product(range(3), repeat=4))
    params = case.params(5)  # about whose locations the statistics are, which must not matter
    log_joint = torch.stack(
        [
            case.family.log_marginal(
                case.family.statistics(params, x, torch.nn.functional.one_hot(z, 3).double()), prior
            )
            for z in found.allocations
        ]
    )
    assert abs((found.log_evidence - log_joint.logsumexp(0)).item()) <= ROUNDINGS * EPS * abs(found.log_evidence.item())
    assert torch.allclose(found.probs, log_joint.softmax(0), rtol=1e-9)
    together = torch.zeros(4, 4).double()
    for z, prob in zip(found.allocations, found.probs, strict=True):
        together += prob * (z[:, None] == z)
    assert torch.allclose(found.coclustering, together, rtol=0, atol=ROUNDINGS * EPS)


def test_rows_in_float32_are_summed_in_float64() -> None:
    """At 1e4, where the squares of float32 have two digits left."""
    x = (torch.tensor([[-1.2], [-0.7], [0.1], [0.4], [1.1]]) + 1e4).float()
    prior = gaussian_diagonal.weakly_informative_prior(x.double(), 2)
    single, double = (exact_posterior(gaussian_diagonal, rows, prior, num_components=2) for rows in (x, x.double()))
    assert single.log_evidence.dtype == torch.float64
    assert torch.equal(single.log_evidence, double.log_evidence)
    assert torch.equal(single.probs, double.probs)
    run: Any = partial(exact_draws, gaussian_diagonal, prior=prior, num_components=2, num_draws=5)
    assert torch.equal(run(x=x, generator=seeded(0)).locs, run(x=x.double(), generator=seeded(0)).locs)


def test_the_evidence_alone_is_that_of_the_posterior() -> None:
    """It keeps no allocations; 2^14 of them are two chunks."""
    x = torch.linspace(-1, 1, 14).double()[:, None]
    prior = gaussian_diagonal.weakly_informative_prior(x, 2)
    found = exact_posterior(gaussian_diagonal, x, prior, num_components=2)
    assert torch.equal(exact_log_evidence(gaussian_diagonal, x, prior, num_components=2), found.log_evidence)


def test_exact_draws_are_from_the_posterior_over_allocations() -> None:
    """The mean of the weights given z is known, so that over z is."""
    prior = bernoulli.Prior(*(torch.tensor(value).double() for value in ([1.0, 2.0], [1.5, 1.0], [1.0, 2.0])))
    x = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]).double()
    posterior = exact_posterior(bernoulli, x, prior, num_components=2)
    counts = torch.nn.functional.one_hot(posterior.allocations, 2).double().sum(1)
    expected = posterior.probs @ ((prior.concentration + counts) / (prior.concentration.sum() + len(x)))
    found = exact_draws(bernoulli, x, prior, num_components=2, num_draws=40_000, generator=seeded(0)).weights
    error = (found.mean(0) - expected).abs() / (found.std(0) / math.sqrt(len(found)))
    assert (error < scipy.stats.norm.isf(1e-6)).all()


# What it refuses


def test_too_many_allocations_are_refused(case: Case) -> None:
    if able(case):
        with pytest.raises(ValueError, match=r"3 components and 40 rows have 1.22e\+19 allocations"):
            exact_log_evidence(case.family, case.data(), case.prior(), num_components=3)


def test_bad_settings_get_one_sentence() -> None:
    x = torch.tensor([[0.0], [1.0]]).double()
    prior = gaussian_diagonal.Prior(*(torch.tensor(value).double() for value in ([1.0, 1.0], [0.0], 1.0, [2.0], [1.0])))
    run: Any = partial(exact_log_evidence, gaussian_diagonal, x, prior)
    with pytest.raises(ValueError, match="num_components must be at least 1, not 0"):
        run(num_components=0)
    with pytest.raises(TypeError, match="num_components must be an integer, not 2"):
        run(num_components=2.0)
    with pytest.raises(ValueError, match="the prior is one of weights of shape"):
        run(num_components=3)
    with pytest.raises(ValueError, match="prior is None, which is flat"):
        exact_log_evidence(gaussian_diagonal, x, None, num_components=2)
    with pytest.raises(TypeError, match="no log_marginal"):
        exact_log_evidence(gaussian_sum, x, None, num_components=2)
    with pytest.raises(ValueError, match=r"x\[1, 0\] is nan"):
        exact_log_evidence(gaussian_diagonal, [[0.0], [math.nan]], prior, num_components=2)


@pytest.mark.parametrize("family", [gaussian_full, gaussian_diagonal, gaussian_spherical, gaussian_tied])
@pytest.mark.parametrize("offset", [1e6, 1.7e9])
def test_data_far_from_zero_have_the_same_evidence(family: Any, offset: float) -> None:
    """The offset is exact in the rows; the prior goes with it. Times in seconds since 1970 lie that far."""
    x = (torch.randn(8, 2, generator=seeded(3), dtype=torch.float64) * 2**10).round() / 2**10
    near = exact_log_evidence(family, x, family.weakly_informative_prior(x, 2), num_components=2)
    prior = family.weakly_informative_prior(x, 2)
    far = exact_log_evidence(family, x + offset, prior._replace(loc=prior.loc + offset), num_components=2)
    torch.testing.assert_close(far, near, rtol=0, atol=1e3 * EPS * offset)


@pytest.mark.parametrize("family", [gaussian_diagonal, gaussian_spherical])
def test_rounding_leaves_no_rate_below_that_of_the_prior(family: Any) -> None:
    """Equal rows at the prior's location, their squares about a place 1e8 away short by eight roundings."""
    x, resp = torch.full((5, 2), 0.25).double(), torch.ones(5, 1).double()
    prior = family.weakly_informative_prior(torch.eye(2).double(), 1)._replace(loc=x[0])
    params = family.Params(torch.ones(1).double(), torch.full((1, 2), 1e8).double(), torch.ones(1).double())
    stats = family.statistics(params, x, resp)
    after = family.posterior(stats._replace(squares=stats.squares * (1 - 8 * EPS)), prior)
    assert (after.rate == prior.rate).all()


# Priors on the scale of the data


@pytest.mark.parametrize("k", [1, 3])
def test_one_covariance_for_all_has_the_prior_of_one_for_each(k: int) -> None:
    x = torch.randn(9, 2, generator=seeded(1), dtype=torch.float64)
    tied, full = (family.weakly_informative_prior(x, k) for family in (gaussian_tied, gaussian_full))
    for value, expected in zip(tied, full, strict=True):
        torch.testing.assert_close(value, expected, rtol=ROUNDINGS * EPS, atol=0)


def test_one_variance_for_all_features_has_the_mean_of_the_rates() -> None:
    x = torch.randn(9, 2, generator=seeded(1), dtype=torch.float64)
    one, each = (family.weakly_informative_prior(x, 3) for family in (gaussian_spherical, gaussian_diagonal))
    torch.testing.assert_close(one.rate, each.rate.mean(), rtol=ROUNDINGS * EPS, atol=0)


def test_locations_scatter_as_the_rows_where_the_variance_is_known() -> None:
    x = torch.randn(9, 2, generator=seeded(1), dtype=torch.float64)
    for variance in (0.7, 3.0):
        prior = GaussianIsotropic(variance).weakly_informative_prior(x, 3)
        torch.testing.assert_close(variance / prior.strength, x.var(0).mean(), rtol=ROUNDINGS * EPS, atol=0)
