"""Gibbs sampling: each draw against identities of its density, the chain against exact posteriors, and its conduct."""

from __future__ import annotations

import inspect
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from mixproof.inference import checkpoint
from mixproof.inference import split_merge as split_merge_module
from mixproof.inference.draws import Draws
from mixproof.inference.enumeration import Coordinates
from mixproof.inference.exact_evidence import exact_draws, exact_posterior
from mixproof.inference.gibbs import gibbs
from mixproof.inference.gibbs_sweep import Chains
from mixproof.models import gaussian_diagonal, gaussian_full, gaussian_sum, laplace
from mixproof.models.conjugate import draw_beta, draw_dirichlet
from mixproof.models.gaussian_isotropic import GaussianIsotropic
from tests.conftest import Case, seeded

ROOT = Path(__file__).resolve().parents[1]
FALSE_ALARM = 1e-6
MODULE = "mixproof.inference.gibbs_sweep"


def z_scores(values: Tensor, expected: Tensor | float = 0.0) -> Tensor:
    """Return how many standard errors the mean of independent values (n, ...) is from what it should be."""
    return (values.mean(0) - expected) / (values.std(0) / math.sqrt(len(values))).clamp_min(1e-14)


def largest_score(scores: Tensor) -> float:
    return scores.abs().max().item()


def bound(num_scores: int) -> float:
    """Return what the largest of so many standard normal scores exceeds in one of a million cases."""
    return scipy.stats.norm.isf(FALSE_ALARM / (2 * num_scores)).item()


# Draws given complete data: Stein's identities of the density that log_joint and log_prior declare


def stein_scores(family: Any, case: Case, x: Tensor, resp: Tensor, prior: Any, k: int, num_draws: int) -> Tensor:
    """Return z-scores of E[d log p / du_j] = 0 and E[u_i d log p / du_j] = -[i = j] over draws of p(params | x, z).

    u are unconstrained coordinates. They hold for draws of a density and no other; log p(x, z, params) is here by the
    program's own log densities, which know nothing of conjugacy.
    """
    params = case.params(4, k)
    batch = type(params)(*(value.expand(num_draws, *value.shape) for value in params))
    stats = family.statistics(batch, x, resp.expand(num_draws, *resp.shape))
    drawn = family.draw(batch, stats, prior, seeded(5))
    coordinates = Coordinates(
        {name: case.sites(k)[name]["fn"].support for name in case.free},
        {name: getattr(params, name) for name in case.free},
    )

    def log_density(u: Tensor) -> Tensor:
        point = params._replace(**coordinates(u))
        log_rows = (resp * case.family.log_joint(point, x)).sum() if len(x) else 0.0
        return log_rows + case.family.log_prior(point, prior) + coordinates.log_jacobian(u)

    u = torch.func.vmap(coordinates.inverse)({name: getattr(drawn, name) for name in case.free})
    slopes = torch.func.vmap(torch.func.grad(log_density))(u)
    products = (u - u.mean(0))[:, :, None] * slopes[:, None]
    return torch.cat([z_scores(slopes), z_scores(products, -torch.eye(u.shape[1]).double()).flatten()])


def complete(case: Case, num_data: int, k: int = 3) -> tuple[Tensor, Tensor]:
    """Return rows and allocations of 0 and 1 that leave the last component empty."""
    x = case.data(1, num_data, k=k)
    return x, torch.nn.functional.one_hot(torch.arange(num_data) % (k - 1), k).double()


@pytest.mark.parametrize("num_data", [0, 5])
def test_draw_is_from_the_density_that_the_family_declares(case: Case, num_data: int) -> None:
    """Given rows in two of three components, and, given none, from the prior."""
    if hasattr(case.family, "draw_statistics"):
        return  # by way of gaussian_full, whose draw theirs is: below
    x, resp = complete(case, max(num_data, 1))
    scores = stein_scores(case.family, case, x[:num_data], resp[:num_data], case.prior(2), 3, 20_000)
    assert largest_score(scores) < bound(len(scores))


@pytest.mark.parametrize("rows", [[], [-1.0], [-1.0, 0.2, 2.0]])
def test_laplace_draws_have_their_law_between_rows_and_in_both_tails(rows: list[float]) -> None:
    """One component: p(loc | x) in proportion to h^-(q + 1) by quadrature, and h / scale ~ Gamma(q + 1) given loc."""
    loc0, strength, shape, rate = 0.4, 0.7, 1.5, 1.2
    prior = laplace.Prior(*(torch.tensor(value).double() for value in ([1.0], [loc0], strength, [shape], [rate])))
    x = torch.tensor(rows, dtype=torch.float64)[:, None]
    stats = laplace.Stats(x, torch.ones(20_000, len(rows), 1, dtype=torch.float64))
    one = laplace.Params(*(torch.ones(20_000, *size, dtype=torch.float64) for size in ((1,), (1, 1), (1, 1))))
    drawn = laplace.draw(one, stats, prior, seeded(5))

    def h(loc: Any) -> Any:
        return rate + strength * abs(loc - loc0) + sum(abs(loc - row) for row in rows)

    grid = np.sort(np.concatenate([loc0 + np.sinh(np.linspace(-15, 15, 40_001)), [loc0, *rows]]))  # kinks are on it
    power = shape + len(rows)
    middle = h((grid[1:] + grid[:-1]) / 2) ** -(power + 1)
    ends = h(grid) ** -(power + 1)
    masses = np.diff(grid) * (ends[1:] + 4 * middle + ends[:-1]) / 6
    law = np.append(0, np.cumsum(masses)) / masses.sum()
    locs, scales = drawn.locs[:, 0, 0].numpy(), drawn.scales[:, 0, 0].numpy()
    assert scipy.stats.kstest(locs, lambda loc: np.interp(loc, grid, law)).pvalue > FALSE_ALARM
    assert scipy.stats.kstest(h(locs) / scales, scipy.stats.gamma(power + 1).cdf).pvalue > FALSE_ALARM
    for kink in (min([loc0, *rows]), max([loc0, *rows])):
        assert 0.02 < np.interp(kink, grid, law) < 0.98  # the tails count


def test_prior_draws_are_those_of_the_program(case: Case) -> None:
    """Against Pyro's own sampler, by two-sample tests of every entry."""
    num_draws, prior = 300, case.prior(2)
    params, x = case.params(4), case.data(1, 1)
    batch = type(params)(*(value.expand(num_draws, *value.shape) for value in params))
    nothing = torch.zeros(num_draws, 0, case.resp(0, 1).shape[1]).double()
    if hasattr(case.family, "draw_statistics"):
        stats = case.family.draw_statistics(batch, x[:0], nothing, seeded(6))
    else:
        stats = case.family.statistics(batch, x[:0], nothing)
    found = case.family.draw(batch, stats, prior, seeded(6))
    with torch.random.fork_rng():
        torch.manual_seed(7)
        traces = [sites_of_a_run(case, prior) for _ in range(num_draws)]
    p_values = []
    for name in case.free:
        expected = torch.stack([trace[name] for trace in traces]).flatten(1)
        for ours, theirs in zip(getattr(found, name).flatten(1).mT, expected.mT, strict=True):
            p_values.append(scipy.stats.ks_2samp(ours.numpy(), theirs.numpy()).pvalue)
    assert min(p_values) > FALSE_ALARM / len(p_values)


def sites_of_a_run(case: Case, prior: Any) -> dict[str, Tensor]:
    from pyro import poutine

    with poutine.trace() as tape:
        case.program(3, prior)(num_data=1, num_features=2)
    nodes: Any = tape.trace.nodes
    return {name: nodes[name]["value"] for name in case.free}


def faulty_draws(module: Any) -> dict[str, Any]:
    """Return families whose draw is wrong in one respect each."""

    def with_posterior(change: Any) -> Any:
        def draw(params: Any, stats: Any, prior: Any, generator: torch.Generator) -> Any:
            after = change(module.posterior(stats, prior), stats, prior)
            right = module.posterior
            module.posterior = lambda *_: after
            try:
                return module.draw(params, stats, prior, generator)
            finally:
                module.posterior = right

        return SimpleNamespace(**{**vars(module), "draw": draw})

    return {
        "half a degree of freedom": with_posterior(lambda after, *_: after._replace(shape=after.shape + 0.25)),
        "strength of the prior forgotten": with_posterior(
            lambda after, stats, prior: after._replace(strength=after.strength - 0.9 * prior.strength)
        ),
        "n / (n - 1)": with_posterior(
            lambda after, stats, prior: after._replace(rate=prior.rate + (after.rate - prior.rate) * 5 / 4)
        ),
        "counts without the prior's": with_posterior(
            lambda after, stats, prior: after._replace(concentration=stats.counts + 1)
        ),
        "loc pulled to 0": with_posterior(lambda after, *_: after._replace(loc=after.loc * 0.95)),
    }


@pytest.mark.parametrize("fault", faulty_draws(gaussian_diagonal))
def test_stein_identities_see_planted_faults(fault: str, all_families: list[Case]) -> None:
    case = next(case for case in all_families if case.family is gaussian_diagonal)
    x, resp = complete(case, 5)
    scores = stein_scores(faulty_draws(gaussian_diagonal)[fault], case, x, resp, case.prior(2), 3, 20_000)
    assert largest_score(scores) > bound(len(scores))


def test_draws_next_to_a_vertex_are_inside_the_simplex() -> None:
    """Shares below the smallest number, and their complements."""
    few = torch.full((1000,), 1e-4).double()
    weights = draw_dirichlet(torch.stack([few, few, few], -1), seeded(5))
    probs = draw_beta(few, few, seeded(5))
    assert (weights > 0).all()
    assert ((probs > 0) & (probs < 1)).all()


def test_summands_have_their_expected_statistics(case: Case) -> None:
    """The mean over draws of the summands is what EM's expectation gives at the same allocations."""
    if not hasattr(case.family, "draw_statistics"):
        return
    num_draws, params, x = 20_000, case.params(4), case.data(1, 5)
    columns = case.resp(0, 1).shape[1]
    resp = torch.nn.functional.one_hot(torch.arange(5) % columns, columns).double()
    batch = type(params)(*(value.expand(num_draws, *value.shape) for value in params))
    found = case.family.draw_statistics(batch, x, resp.expand(num_draws, -1, -1), seeded(8))
    expected = case.family.statistics(params, x, resp)
    pairs = [(found, expected)] if case.name == "KnownNoise" else list(zip(found, expected, strict=True))
    for ours, theirs in pairs:
        scores = torch.cat([z_scores(a, b).flatten() for a, b in zip(ours[1:], theirs[1:], strict=True)])
        assert torch.equal(ours.counts[0], theirs.counts)
        assert largest_score(scores) < bound(len(scores))


# The chain against the exact posterior, by summing all allocations of a few rows


def summaries(case: Case, params: Any, x: Tensor) -> Tensor:
    """Return functions (n, P) of parameters (n, ...) that do not depend on the order of components, all bounded."""
    tables = torch.func.vmap(case.family.log_joint, (0, None))(params, x)
    resp = tables.softmax(-1)
    together = (resp @ resp.mT).flatten(1)  # P(z_i = z_j | x, params)
    weights = params.weights.square().sum(-1, keepdim=True)
    others = [
        value.reshape(*value.shape[:2], -1).abs().log().clamp(-6, 6).sum(1)
        for name, value in params._asdict().items()
        if name in ("locs", "variances", "scales", "covariances", "probs")
    ]
    return torch.cat([together, weights, tables.logsumexp(-1), *others], -1)


def as_params(case: Case, draws: Draws, k: int) -> Any:
    """Return all draws of all chains as one batch of the family's Params."""
    flat = {name: value.flatten(0, 1) for name, value in draws.params.items()}
    size = len(next(iter(flat.values())))
    known = {name: value.expand(size, *value.shape) for name, value in case.params(0, k)._asdict().items()}
    return case.family.Params(**{**known, **flat})


NUM_CHAINS, NUM_DRAWS = 300, 60


def scores_against_exact(family: Any, case: Case, **options: Any) -> Tensor:
    """Return z-scores of chain means against independent draws from the exact posterior, and of co-clustering."""
    k, x, prior = 2, case.data(3, 6, case.params(3, 2, spread=1.0), 2), case.prior(2, 2)
    draws = gibbs(
        family, x, prior, num_components=k, num_chains=NUM_CHAINS, num_draws=NUM_DRAWS, num_warmup=60,
        generator=seeded(9), **options,
    )  # fmt: skip
    found = summaries(case, as_params(case, draws, k), x).unflatten(0, (NUM_CHAINS, NUM_DRAWS)).mean(1)
    exact = summaries(
        case, exact_draws(case.family, x, prior, num_components=k, num_draws=20_000, generator=seeded(10)), x
    )
    variance = found.var(0) / len(found) + exact.var(0) / len(exact)
    scores = (found.mean(0) - exact.mean(0)) / variance.sqrt().clamp_min(1e-12)
    together = exact_posterior(case.family, x, prior, num_components=k).coclustering.flatten()
    off_diagonal = ~torch.eye(len(x), dtype=torch.bool).flatten()
    return torch.cat([scores, z_scores(found[:, : len(together)], together)[off_diagonal]])


def test_chain_has_the_exact_posterior(case: Case) -> None:
    if not hasattr(case.family, "log_marginal"):
        return
    scores = scores_against_exact(case.family, case)
    assert largest_score(scores) < bound(len(scores))


@pytest.mark.slow
def test_replicas_at_temperature_one_have_the_exact_posterior(case: Case) -> None:
    if not hasattr(case.family, "log_marginal"):
        return
    scores = scores_against_exact(case.family, case, temperatures=(1.0, 0.6, 0.2))
    assert largest_score(scores) < bound(len(scores))


def without_weights(params: Any, x: Tensor) -> Tensor:
    return gaussian_diagonal.log_joint(params, x) - params.weights.log()


@pytest.mark.parametrize("fault", ["z without weights", *faulty_draws(gaussian_diagonal)])
def test_exact_posterior_sees_planted_faults(fault: str, all_families: list[Case]) -> None:
    case = next(case for case in all_families if case.family is gaussian_diagonal)
    if fault == "z without weights":
        wrong = {**vars(gaussian_diagonal), "log_joint": without_weights}
        del wrong["features"]
        family: Any = SimpleNamespace(**wrong)
    else:
        family = faulty_draws(gaussian_diagonal)[fault]
    scores = scores_against_exact(family, case)
    assert largest_score(scores) > bound(len(scores))


def faulty_swaps() -> dict[str, Any]:
    """Return log likelihoods to the powers, by which swaps are accepted, wrong in one respect each."""
    right = Chains.log_likelihood

    def with_prior(self: Any, params: Any, powers: list[Tensor]) -> list[Tensor]:
        log_prior = torch.func.vmap(partial(self.family.log_prior, prior=self.prior))(params)
        return [value + power * log_prior for value, power in zip(right(self, params, powers), powers, strict=True)]

    return {
        "always accepted": lambda self, params, powers: [self.x.new_zeros(self.num_replicas)] * 2,
        "temperature of the prior too": with_prior,
    }


@pytest.mark.parametrize("fault", faulty_swaps())
def test_wrong_swaps_are_seen(fault: str, all_families: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in all_families if case.family is gaussian_diagonal)
    monkeypatch.setattr(f"{MODULE}.Chains.log_likelihood", faulty_swaps()[fault])
    scores = scores_against_exact(gaussian_diagonal, case, temperatures=(1.0, 0.6, 0.2))
    assert largest_score(scores) > bound(len(scores))


@pytest.mark.slow
@pytest.mark.parametrize("temperatures", [None, (1.0, 0.4)])
def test_split_merge_moves_keep_the_exact_posterior(case: Case, temperatures: Any) -> None:
    """With temperatures too, at which a move must count each row as often as its power says."""
    if not hasattr(case.family, "log_marginal"):
        return
    scores = scores_against_exact(case.family, case, split_merge=True, temperatures=temperatures)
    assert largest_score(scores) < bound(len(scores))


@pytest.mark.slow
def test_sums_have_the_posterior_by_importance_sampling(case: Case) -> None:
    """Two rows of one feature: draws of the prior, weighted by the likelihood, are the other route."""
    if not hasattr(case.family, "draw_statistics"):
        return
    k, num_draws = case.num_components(2), 400_000
    params, prior = case.params(4, 2), case.prior(2, 2)
    x = case.data(1, 2, params, 2)
    batch = type(params)(*(value.expand(num_draws, *value.shape) for value in params))
    nothing = torch.zeros(num_draws, 0, case.family.log_joint(params, x).shape[1]).double()
    from_prior = case.family.draw(
        batch, case.family.draw_statistics(batch, x[:0], nothing, seeded(1)), prior, seeded(2)
    )
    log_lik = torch.func.vmap(lambda p: case.family.log_joint(p, x).logsumexp(-1).sum())(from_prior)
    weights = log_lik.softmax(0)
    assert 1 / weights.square().sum() > 2_000  # effective draws

    def functions(params: Any) -> Tensor:
        log_lik = torch.func.vmap(lambda p: case.family.log_joint(p, x).logsumexp(-1))(params)
        locs = [value.sum(-2) for name, value in params._asdict().items() if name.endswith("locs")]
        shares = [value.square().sum(-1, keepdim=True) for name, value in params._asdict().items()
                  if value.shape[-1] > 1 and name.endswith("weights")]  # fmt: skip
        traces = [value.diagonal(dim1=-2, dim2=-1).log().sum(-2) for name, value in params._asdict().items()
                  if name.endswith("covariances")]  # fmt: skip
        return torch.cat([log_lik, *locs, *shares, *traces], -1)

    values = functions(from_prior)
    expected = weights @ values
    variance = weights.square() @ (values - expected).square()
    draws = gibbs(
        case.family, x, prior, num_components=k, num_chains=200, num_draws=300, num_warmup=100, generator=seeded(3)
    )
    flat = case.family.Params(**{name: value.flatten(0, 1) for name, value in draws.params.items()})
    means = functions(flat).unflatten(0, (200, 300)).mean(1)
    scores = (means.mean(0) - expected) / (variance + means.var(0) / len(means)).sqrt()
    assert largest_score(scores) < bound(len(scores))


# Modes


def two_modes() -> tuple[Any, Tensor, Any]:
    """Two clusters far apart, and a prior under which it matters which of them is component 0."""
    family = GaussianIsotropic(1.0)
    x = torch.tensor([[-4.0], [-3.4], [-4.6], [3.7], [4.2], [4.4], [3.1]]).double()
    prior = family.Prior(*(torch.tensor(value).double() for value in ([3.0, 6.0], [0.0], 0.05)))
    return family, x, prior


def share_in_order(draws: Draws) -> Tensor:
    """Return how often component 0 is the left one, (C,) by chain."""
    locs = draws.params["locs"][..., 0]
    return (locs[..., 0] < locs[..., 1]).double().mean(1)


def test_tempered_chains_change_modes_as_often_as_is_right() -> None:
    family, x, prior = two_modes()
    exact = exact_draws(family, x, prior, num_components=2, num_draws=40_000, generator=seeded(1)).locs[..., 0]
    expected = (exact[:, 0] < exact[:, 1]).double()
    settings: dict[str, Any] = {"num_components": 2, "num_chains": 40, "num_draws": 800, "num_warmup": 100}
    stuck = gibbs(family, x, prior, **settings, generator=seeded(2))
    assert set(share_in_order(stuck).tolist()) == {0.0, 1.0}  # every chain stays where it began
    ladder = (1.0, 0.5, 0.25, 0.12, 0.06, 0.03, 0.01)
    draws = gibbs(family, x, prior, **settings, temperatures=ladder, generator=seeded(2))
    shares = share_in_order(draws)
    assert ((shares > 0) & (shares < 1)).all()
    score = (shares.mean() - expected.mean()) / (shares.var() / 40 + expected.var() / 40_000).sqrt()
    assert abs(score.item()) < bound(1)
    assert abs(expected.mean().item() - 0.5) > 0.1  # so that an even share would not do
    assert all(0.1 < rate < 1 for rate in draws.attributes["swap_rates"])
    assert len(draws.attributes["swap_rates"]) == len(ladder) - 1
    assert draws.attributes["round_trips"] > 40


THREE_CLUSTERS = torch.tensor([[-12.3], [-12.0], [-11.5], [-0.4], [0.1], [0.2], [11.5], [11.9], [12.4]]).double()
CHAINS_OF_MODES = 40


def modes_of_three_clusters(**options: Any) -> tuple[Tensor, float]:
    """Return whether rows 3 and 0 are together, (C, S) from two components, and how probable it is exactly.

    The middle one of three clusters shares a component with the left or with the right one, and at the start, in all
    chains, with the right one. Its three rows would have to change at once, against odds of about exp(-54) each.
    """
    family = GaussianIsotropic(1.0)
    prior = family.Prior(*(torch.tensor(value).double() for value in ([1.0, 1.0], [0.0], 0.05)))
    exact = exact_posterior(family, THREE_CLUSTERS, prior, num_components=2)
    init = {
        "weights": torch.tensor([1 / 3, 2 / 3]).double().expand(CHAINS_OF_MODES, 2),
        "locs": torch.tensor([[-12.0], [6.0]]).double().expand(CHAINS_OF_MODES, 2, 1),
    }
    draws = gibbs(
        family, THREE_CLUSTERS, prior, num_components=2, num_chains=CHAINS_OF_MODES, num_draws=150, num_warmup=100,
        generator=seeded(2), init=init, **options,
    )  # fmt: skip
    locs, log_weights = draws.params["locs"][..., 0], draws.params["weights"].log()
    log_joint = log_weights[..., None, :] - (THREE_CLUSTERS[[0, 3]] - locs[..., None, :]).square() / 2
    resp = log_joint.softmax(-1)
    return (resp[..., 0, :] * resp[..., 1, :]).sum(-1), exact.coclustering[0, 3].item()


def test_split_merge_moves_change_modes_as_often_as_is_right() -> None:
    stuck, expected = modes_of_three_clusters()
    assert 0.1 < expected < 0.9
    assert (stuck < 0.01).all()  # every chain stays where it began
    together, _ = modes_of_three_clusters(split_merge=True)
    shares = together.mean(1)
    assert ((shares > 0.01) & (shares < 0.99)).all()
    assert largest_score(z_scores(shares[:, None], expected)) < bound(1)


def faulty_moves() -> dict[str, Any]:
    """Return split-merge moves that are wrong in one respect each."""
    source = inspect.getsource(split_merge_module.reallocate)
    found = {}
    for name, right, wrong in (
        ("no Hastings's ratio", " - log_proposal", ""),
        ("Hastings's ratio turned over", " - log_proposal", " + log_proposal"),
        ("always accepted", "uniform.log() < gain", "uniform < 1"),
        ("no marginal likelihood", "data.log_marginal(params, z, powers)", "0"),
        ("density of one scan", "tables.where(z > 0, 0)", "tables[:1].where(z > 0, 0)"),
    ):
        assert right in source
        namespace = dict(vars(split_merge_module))
        exec(source.replace(right, wrong), namespace)
        found[name] = namespace["reallocate"]
    return found


@pytest.mark.parametrize("fault", faulty_moves())
def test_wrong_split_merge_moves_are_seen(
    fault: str, all_families: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in all_families if case.family is gaussian_diagonal)
    monkeypatch.setattr(f"{MODULE}.reallocate", faulty_moves()[fault])
    scores = scores_against_exact(gaussian_diagonal, case, split_merge=True)
    assert largest_score(scores) > bound(len(scores))


def test_relabelled_draws_are_the_same_up_to_the_order_of_components(case: Case) -> None:
    k, prior = case.num_components(3), case.prior(2)
    prior = even(prior)
    settings: dict[str, Any] = {"num_components": k, "num_chains": 20, "num_draws": 50, "num_warmup": 5}
    plain = gibbs(case.family, case.data(), prior, **settings, generator=seeded(3))
    mixed = gibbs(case.family, case.data(), prior, **settings, generator=seeded(3), relabel=True)
    assert torch.allclose(plain.sample_stats["lp"], mixed.sample_stats["lp"], rtol=1e-12)
    for name, value in plain.params.items():
        if name == "covariance":  # which all components share
            assert torch.equal(value, mixed.params[name])
            continue
        components, permuted = (
            each.flatten(3) if each.ndim > 3 else each[..., None] for each in (value, mixed.params[name])
        )
        same = (components[:, :, :, None] == permuted[:, :, None]).all(-1)  # (C, S, K, K), which became which
        assert (same.sum(-1) == 1).all()
        stayed = same.diagonal(dim1=-2, dim2=-1).double().flatten(0, 1)
        assert largest_score(z_scores(stayed, 1 / value.shape[2])) < bound(value.shape[2])


def even(prior: Any) -> Any:
    """Return a prior that treats all components alike."""
    if hasattr(prior, "x"):
        return type(prior)(even(prior.x), even(prior.y))
    return prior._replace(concentration=torch.full_like(prior.concentration, 2.0)) if "concentration" in prior._fields else prior  # noqa: E501  # fmt: skip


def test_a_finished_run_asked_for_fewer_relabelled_draws_gives_the_first(case: Case, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_components": case.num_components(3), "num_chains": 3, "num_warmup": 2}
    prior, file = even(case.prior(2)), tmp_path / "run"
    run = partial(gibbs, case.family, case.data(), prior, **settings, relabel=True)
    more = run(num_draws=9, generator=seeded(3), checkpoint=file)
    for fewer in (run(num_draws=5, generator=seeded(3), checkpoint=file), run(num_draws=5, generator=seeded(3))):
        for name, value in fewer.params.items():
            assert torch.equal(value, more.params[name][:, :5])


@pytest.mark.parametrize("seed", range(10))
def test_single_precision_tells_no_components_apart(seed: int) -> None:
    x = torch.randn(20, 2, generator=seeded(seed))
    prior = gaussian_diagonal.weakly_informative_prior(x, 3)
    gibbs(
        gaussian_diagonal, x, prior, num_components=3, num_chains=1, num_draws=1, num_warmup=0, generator=seeded(seed),
        relabel=True,
    )  # fmt: skip


def test_components_that_the_prior_tells_apart_are_not_relabelled() -> None:
    family, x, prior = two_modes()
    with pytest.raises(ValueError, match="the prior tells the components of weights apart"):
        gibbs(
            family, x, prior, num_components=2, num_chains=1, num_draws=1, num_warmup=0, generator=seeded(0),
            relabel=True,
        )  # fmt: skip


# Where chains start


def last(draws: Draws) -> dict[str, Tensor]:
    """Return where each chain ended, as another run takes it."""
    return {name: value[:, -1] for name, value in draws.params.items()}


def test_chains_start_where_they_are_told(case: Case) -> None:
    ends = last(run(case))
    options: dict[str, Any] = {} if hasattr(case.family, "draw_statistics") else {"temperatures": (1.0, 0.5)}
    draws = run(case, 1, init=ends, num_warmup=0)
    for name, value in ends.items():
        assert torch.allclose(draws.params[name][:, 0], value, rtol=1e-15)
    assert all(torch.isfinite(value).all() for value in run(case, 1, init=ends, **options).params.values())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"locs": None}, ValueError, "init must have the sites weights, locs, variances, and has weights, variances"),
        ({"locs": torch.zeros(3, 2, 2)}, ValueError, r"init\['locs'\] must have shape \(3, 3, 2\), one start for each"),
        ({"variances": -torch.ones(3, 3, 2)}, ValueError, "variances.* must be positive"),
        ({"locs": torch.full((3, 3, 2), math.nan)}, ValueError, "locs.* is nan: every parameter must be finite"),
    ],
)
def test_bad_starts_get_one_sentence(
    change: dict[str, Any], error: type[Exception], words: str, all_families: list[Case]
) -> None:
    case = next(case for case in all_families if case.family is gaussian_diagonal)
    changed = last(run(case)) | change
    init = {name: value for name, value in changed.items() if value is not None}
    with pytest.raises(error, match=words):
        run(case, init=init)


# What it computes on the way


def run(case: Case, seed: int = 0, x: Any = None, **options: Any) -> Draws:
    settings = {"num_components": case.num_components(), "num_chains": 3, "num_draws": 8, "num_warmup": 2}
    x = case.data() if x is None else x
    return gibbs(case.family, x, case.prior(), **{**settings, "generator": seeded(seed), **options})


def test_draws_have_their_log_joint_density_and_the_names_of_the_sites(case: Case) -> None:
    x, draws = case.data(), run(case)
    assert tuple(draws.params) == case.free
    flat = as_params(case, draws, 3)
    expected = [
        case.family.log_joint(p, x).logsumexp(-1).sum() + case.family.log_prior(p, case.prior())
        for p in (case.family.Params(*values) for values in zip(*flat, strict=True))
    ]
    assert torch.allclose(draws.sample_stats["lp"].flatten(), torch.stack(expected), rtol=1e-9)
    assert draws.attributes == {"engine": "gibbs", "seed": 0, "num_warmup": 2, "num_draws": 8, "relabel": False}


def test_same_seed_same_draws(case: Case) -> None:
    one, two, other = run(case), run(case), run(case, 1)
    for name in one.params:
        assert torch.equal(one.params[name], two.params[name])
        assert not torch.equal(one.params[name], other.params[name])


def test_products_with_features_draw_what_plain_tables_draw(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """And do without them where the data lie so that they would cancel."""
    quick = run(case)
    monkeypatch.setattr(f"{MODULE}._Moments.precise", False)
    for name, value in run(case).params.items():
        assert torch.allclose(value, quick.params[name], rtol=1e-6, atol=1e-6)


def test_narrow_components_far_apart_are_drawn_precisely() -> None:
    """Standard deviations of 1e-6 around -1e6 and 1e6: sums about one center would have lost them all."""
    generator = seeded(1)
    x = torch.randn(40, 1, generator=generator).double() * 1e-6
    x = x + torch.where(torch.arange(40) % 2 == 0, -1e6, 1e6)[:, None].double()
    prior = gaussian_diagonal.Prior(
        *(torch.tensor(value).double() for value in ([1.0, 1.0], [0.0], 1e-24, [1.0], [1e-12]))
    )
    draws = gibbs(
        gaussian_diagonal, x, prior, num_components=2, num_chains=20, num_draws=50, num_warmup=10, generator=generator
    )
    means = torch.stack([x[::2].mean(), x[1::2].mean()])
    found = draws.params["locs"][..., 0].sort(-1).values
    # Ten standard deviations of a mean of 20 rows, an ulp of 1e6 being 1e-10; moments about 0 lose the variance.
    assert (found - means).abs().max() < 10 * 1e-6 / math.sqrt(20)
    assert draws.params["variances"].max() < 1e-11


def test_rows_and_chains_in_several_blocks_are_all_counted(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    x = case.data(0, 600)
    monkeypatch.setattr(f"{MODULE}.TABLE_ENTRIES", 5000)
    monkeypatch.setattr(f"{MODULE}.ROWS", 256)
    draws = run(case, x=x, num_chains=20)
    flat = as_params(case, draws, 3)
    log_lik = torch.func.vmap(lambda p: case.family.log_joint(p, x).logsumexp(-1).sum())(flat)
    prior = case.prior()
    log_prior = torch.func.vmap(lambda p: case.family.log_prior(p, prior))(flat)
    assert torch.allclose(draws.sample_stats["lp"].flatten(), log_lik + log_prior, rtol=1e-9)


def test_more_components_than_rows_and_a_single_row_are_fine(case: Case) -> None:
    for num_data in (1, 2):
        draws = run(case, x=case.data(0, num_data))
        assert all(torch.isfinite(value).all() for value in draws.params.values())


# Long runs


def test_a_run_goes_on_to_the_identical_draws(case: Case, tmp_path: Path) -> None:
    complete = not hasattr(case.family, "draw_statistics")
    options: dict[str, Any] = {"temperatures": (1.0, 0.5), "split_merge": True} if complete else {}
    expected = run(case, num_draws=20, **options)
    for num_draws in (3, 11, 5, 20, 8, 20):  # fewer are read from the file, which keeps the others
        found = run(case, num_draws=num_draws, checkpoint=tmp_path / "state", **options)
        for name, value in found.params.items():
            assert torch.equal(value, expected.params[name][:, :num_draws])
        assert torch.equal(found.sample_stats["lp"], expected.sample_stats["lp"][:, :num_draws])
    assert found.attributes == expected.attributes


KILLED = """
import sys, torch
from pathlib import Path
from mixproof.inference.gibbs import gibbs
from mixproof.models import gaussian_full
x, prior = torch.load(sys.argv[1], weights_only=False)
torch.set_num_threads(1)
gibbs(gaussian_full, x, gaussian_full.Prior(*prior), num_components=3, num_chains=4, num_draws=int(sys.argv[3]),
      num_warmup=5, generator=torch.Generator().manual_seed(4), checkpoint=Path(sys.argv[2]), checkpoint_every=1,
      split_merge=True)
"""


def test_a_killed_run_goes_on_to_the_identical_draws(all_families: list[Case], tmp_path: Path) -> None:
    """A process that writes after every sweep is killed when it has kept some draws."""
    case = next(case for case in all_families if case.family is gaussian_full)
    x, prior, file = case.data(), case.prior(), tmp_path / "state"
    torch.save((x, tuple(prior)), tmp_path / "problem")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / ".links"), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "problem"), str(file), "1000000"]
    process = subprocess.Popen(arguments, env=environment)
    kept = 0
    while kept < 5:
        assert process.poll() is None
        time.sleep(0.02)
        state = checkpoint.load(file, {})
        kept = 0 if state is None else state["log_lik"].shape[1]
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = checkpoint.load(file, {})
    assert state is not None
    num_draws = state["log_lik"].shape[1] + 7
    settings: dict[str, Any] = {"num_components": 3, "num_chains": 4, "num_draws": num_draws, "num_warmup": 5}
    settings["split_merge"] = True
    found = gibbs(gaussian_full, x, prior, **settings, generator=seeded(4), checkpoint=file)
    expected = gibbs(gaussian_full, x, prior, **settings, generator=seeded(4))
    assert all(torch.equal(found.params[name], expected.params[name]) for name in expected.params)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"seed": 1}, "generator"), ({"num_chains": 4}, "num_chains"), ({"num_warmup": 3}, "num_warmup"),
     ({"x": torch.zeros(40, 2).double()}, "x"), ({"temperatures": (1.0, 0.5)}, "temperatures"),
     ({"split_merge": True}, "split_merge"), ({"init": "drawn"}, "init")],
)  # fmt: skip
def test_a_checkpoint_of_another_run_is_refused(
    change: dict[str, Any], words: str, all_families: list[Case], tmp_path: Path
) -> None:
    case = next(case for case in all_families if case.family is gaussian_diagonal)
    drawn = run(case, checkpoint=tmp_path / "state")
    if "init" in change:
        change = {"init": last(drawn)}
    with pytest.raises(ValueError, match=f"belongs to another run, which differs in {words}"):
        run(case, checkpoint=tmp_path / "state", **change)


def test_an_interrupt_keeps_what_was_drawn(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(case)
    owner = case.family if not hasattr(type(case.family), "draw") else type(case.family)
    right = owner.draw
    calls: list[None] = []
    for sweeps, kept in ((2 + 5, 4), (1, 0)):
        calls.clear()

        def interrupted(*args: Any, sweeps: int = sweeps) -> Any:
            calls.append(None)
            if len(calls) > 2 + sweeps - 1:  # two draws make the start
                raise KeyboardInterrupt
            return right(*args)

        with monkeypatch.context() as patch:
            patch.setattr(owner, "draw", interrupted)
            if kept == 0:
                with pytest.raises(KeyboardInterrupt):
                    run(case)
                continue
            with pytest.warns(UserWarning, match=f"interrupted after {kept} of 8 draws"):
                found = run(case)
        assert found.attributes["num_draws"] == kept
        for name, value in found.params.items():
            assert torch.equal(value, expected.params[name][:, :kept])


def test_progress_is_on_stderr(all_families: list[Case], capsys: pytest.CaptureFixture) -> None:
    run(all_families[0], progress=True)
    captured = capsys.readouterr()
    assert "Gibbs" in captured.err
    assert "10/10" in captured.err
    assert captured.out == ""


# Bad input


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"num_chains": 0}, ValueError, "num_chains must be at least 1, not 0"),
        ({"num_draws": 2.5}, TypeError, "num_draws must be an integer"),
        ({"num_warmup": -1}, ValueError, "num_warmup must be at least 0, not -1"),
        ({"num_components": 0}, ValueError, "num_components must be at least 1, not 0"),
        ({"num_components": (2, 2)}, TypeError, "num_components must be an integer"),
        ({"num_components": 2}, ValueError, "the prior is one of weights of shape"),
        ({"generator": 7}, TypeError, "generator must be a torch.Generator"),
        ({"temperatures": (0.9, 0.5)}, ValueError, "temperatures must fall from 1 to above 0"),
        ({"temperatures": (1.0, 1.0)}, ValueError, "temperatures must fall from 1 to above 0"),
        ({"temperatures": (1.0, 0.0)}, ValueError, "temperatures must fall from 1 to above 0"),
        ({"x": [[0.0, math.nan]]}, ValueError, r"x\[0, 1\] is nan"),
        ({"x": [1.0, 2.0]}, ValueError, "one feature is"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1"),
    ],
)
def test_bad_settings_get_one_sentence(
    change: dict[str, Any], error: type[Exception], words: str, all_families: list[Case]
) -> None:
    case = next(case for case in all_families if case.family is gaussian_diagonal)
    with pytest.raises(error, match=words):
        run(case, **change)


def test_improper_priors_and_incomplete_rows_are_refused(case: Case) -> None:
    with pytest.raises(ValueError, match="the posterior of a mixture is then improper"):
        gibbs(
            case.family, case.data(), None, num_components=case.num_components(), num_chains=1, num_draws=1,
            num_warmup=0, generator=seeded(0),
        )  # fmt: skip
    prior = case.prior()
    if hasattr(prior, "strength"):
        with pytest.raises(ValueError, match=r"prior (is improper, .* is a strength 0|does not define)"):
            gibbs(
                case.family, case.data(), prior._replace(strength=0 * prior.strength), num_chains=1, num_draws=1,
                num_components=case.num_components(), num_warmup=0, generator=seeded(0),
            )  # fmt: skip
    if hasattr(case.family, "draw_statistics"):
        with pytest.raises(ValueError, match="temperatures need rows that are complete"):
            run(case, temperatures=(1.0, 0.5))
        with pytest.raises(ValueError, match="split-merge moves need a family with log_marginal"):
            run(case, split_merge=True)


def test_a_family_without_draw_is_refused() -> None:
    family = SimpleNamespace(**{name: value for name, value in vars(laplace).items() if name != "draw"})
    with pytest.raises(TypeError, match="this family has no draw"):
        gibbs(family, [[0.0]], None, num_components=1, num_chains=1, num_draws=1, num_warmup=0, generator=seeded(0))


def test_the_sum_needs_two_numbers_of_components() -> None:
    with pytest.raises(TypeError, match="a number for each of x_weights, y_weights, not 2"):
        gibbs(gaussian_sum, [[0.0]], 1, num_components=2, num_chains=1, num_draws=1, num_warmup=0, generator=seeded(0))
