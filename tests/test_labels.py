"""Which axes number the components, and the numberings of draws made to agree."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from mixproof.inference import at_draws
from mixproof.inference.at_draws import (
    co_clustering,
    label_invariant,
    log_likelihood,
    log_likelihood_and_label_invariant,
    responsibilities,
)
from mixproof.inference.datatree import to_datatree
from mixproof.inference.draws import Draws
from mixproof.inference.exchangeability import component_axes, numbering, permute
from mixproof.inference.labels import align
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.quantities import Quantities
from mixproof.models import bernoulli, gaussian_full, gaussian_tied
from tests.conftest import Case, seeded


def with_equal_components(prior: Any) -> Any:
    """Return the prior with one concentration for all components."""
    if prior is None:
        return None
    values = {
        name: with_equal_components(value) if isinstance(value, tuple) else value
        for name, value in prior._asdict().items()
    }
    if "concentration" in values:
        values["concentration"] = torch.full_like(values["concentration"], 1.5)
    return prior._replace(**values)


def expected_axes(case: Case, latent: str) -> dict[str, tuple[int, ...]]:
    """Return the first axis of each parameter whose shape comment in the source starts with K."""
    part = {"k": "x_", "l": "y_"}.get(latent, "") if case.num_weights > 1 else ""
    shared = {"covariance"}
    return {name: (0,) for name in case.free if name.startswith(part) and name not in shared}


def test_axes_are_those_of_the_families(case: Case, kind: str) -> None:
    """With as many features as components, where a (D, D) covariance has axes of length K too."""
    prior = with_equal_components(case.prior_or_flat(kind, k=2))
    posterior = LogPosterior(case.program(2, prior), case.data(0, 12, k=2))
    latent = posterior.program.latents[0]
    assert component_axes(posterior, latent) == expected_axes(case, latent)


@pytest.mark.parametrize("part", ["k", "l"])
def test_each_latent_of_the_sum_has_its_own(all_families: list[Case], part: str) -> None:
    case = next(case for case in all_families if case.name == "gaussian_sum")
    posterior = LogPosterior(case.program(3), case.data(0, 12))
    axes = component_axes(posterior, part)
    assert axes == expected_axes(case, part)
    with pytest.raises(ValueError, match="say of which one"):
        component_axes(posterior)
    with pytest.raises(ValueError, match="no latent 'z'"):
        component_axes(posterior, "z")


def test_components_of_known_noise_are_not_exchangeable(all_families: list[Case]) -> None:
    case = next(case for case in all_families if case.name == "KnownNoise")
    posterior = LogPosterior(case.program(3), case.data(0, 12))
    with pytest.raises(ValueError, match=r"components that l counts .* log joint density of the rows"):
        component_axes(posterior, "l")


def test_an_asymmetric_prior_is_seen(case: Case) -> None:
    prior = case.prior()  # concentrations that differ
    posterior = LogPosterior(case.program(3, prior), case.data(0, 12))
    latent = posterior.program.latents[0]
    if "weights" not in case.free and "x_weights" not in case.free:
        assert component_axes(posterior, latent) == {"probs": (0,)}
        return
    with pytest.raises(ValueError, match="the prior or a support tells them apart"):
        component_axes(posterior, latent)


@pytest.mark.parametrize("offset", [0.0, 1e6, 1e8])
def test_components_are_told_apart_far_from_zero(real_case: Case, offset: float) -> None:
    """Under the weakly informative prior of the data, with concentrations alike, and with two that are not."""
    if not hasattr(real_case.family, "weakly_informative_prior"):
        return
    x = real_case.data(0, 20, k=2) + offset
    alike = real_case.family.weakly_informative_prior(x, 2)
    for concentration in ([1.0, 1.0], [1.0, 3.0], [1.0, 1.0 + 1e-4]):
        prior = alike._replace(concentration=torch.tensor(concentration, dtype=torch.float64))
        posterior = LogPosterior(real_case.program(2, prior), x)
        latent = posterior.program.latents[0]
        found = numbering(posterior, latent)
        axes, exchangeable = found.axes, found.exchangeable
        assert axes == expected_axes(real_case, latent)
        assert exchangeable == (concentration[0] == concentration[1]), concentration


def test_weights_that_are_fixed_count_far_from_zero_under_a_flat_prior() -> None:
    def program(x: Tensor, weights: Tensor) -> None:
        locs = pyro.sample("locs", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
        gaussians(x, weights, locs, torch.ones(2, dtype=torch.float64))

    double = partial(torch.tensor, dtype=torch.float64)
    assert numbering(LogPosterior(program, X + 1e6, double([0.5, 0.5]))).exchangeable
    assert not numbering(LogPosterior(program, X + 1e6, double([0.25, 0.75]))).exchangeable


def test_rows_without_a_density_do_not_make_components_alike() -> None:
    def program(x: Tensor) -> None:
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.8])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Uniform(locs[z] - 1, locs[z] + 1, validate_args=False), obs=x)

    assert not numbering(LogPosterior(program, X)).exchangeable
    with pytest.raises(ValueError, match="no row has a density at any of"):
        numbering(LogPosterior(program, X + 1e6))


X = torch.tensor([-1.0, 0.2, 0.5, 2.0, 2.5, 4.0], dtype=torch.float64)


def gaussians(x: Tensor, weights: Tensor, locs: Tensor, scales: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[z], scales[z]), obs=x)


def ordered(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    locs = pyro.sample("locs", dist.ImproperUniform(dist.constraints.ordered_vector, (), (3,)))
    gaussians(x, weights, locs, torch.ones(3))


def known_scales(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    gaussians(x, weights, locs, torch.tensor([1.0, 1.0, 2.0]))  # the first two are exchangeable, the third is not


def prior_means_differ(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    locs = pyro.sample("locs", dist.Normal(torch.tensor([0.0, 0.0, 1e-4]), 3.0).to_event(1))
    gaussians(x, weights, locs, torch.ones(3))


def sticks(x: Tensor) -> None:
    parts = pyro.sample("parts", dist.Beta(torch.ones(2), torch.full((2,), 2.0)).to_event(1))
    rest = torch.cat([parts.new_ones(1), (1 - parts).cumprod(0)])
    locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    gaussians(x, torch.cat([parts, parts.new_ones(1)]) * rest, locs, torch.ones(3))


@pytest.mark.parametrize("program", [ordered, known_scales, prior_means_differ, sticks])
def test_programs_with_named_components_are_refused(program: Any) -> None:
    with pytest.raises(ValueError, match="not exchangeable"):
        component_axes(LogPosterior(program, X))


def hierarchical(x: Tensor) -> None:
    """Each component has a prior of its own, whose scale no row sees, and its number is the last axis."""
    scales = pyro.sample("prior_scales", dist.Gamma(2.0, 1.0).expand([3]).to_event(1))
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2, 3), scales).to_event(2))
    offsets = pyro.sample("offsets", dist.Normal(torch.tensor([0.0, 1.0, 2.0]), 1.0).to_event(1))  # of length K, shared
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[0, z] + offsets[0], (locs[1, z] / 2).exp()), obs=x)


def test_axes_need_not_be_first_nor_seen_by_the_rows() -> None:
    assert component_axes(LogPosterior(hierarchical, X)) == {"prior_scales": (0,), "locs": (1,)}


def test_one_component_has_one_name() -> None:
    posterior = LogPosterior(partial(gaussian_tied.model, num_components=1), X[:, None])
    assert component_axes(posterior) == {"weights": (0,), "locs": (0,)}


class ExactPosterior:
    """The posterior of a Bernoulli mixture by summing all K^N allocations, from beta functions alone."""

    def __init__(self, x: Tensor, prior: bernoulli.Prior):
        self.x, self.prior, size = x, prior, len(prior.concentration)
        allocations = torch.tensor(list(itertools.product(range(size), repeat=len(x))))
        self.z = torch.nn.functional.one_hot(allocations, size).to(x)  # (K^N, N, K)
        self.counts = prior.concentration + self.z.sum(1)
        self.ones = prior.ones + self.z.mT @ x
        self.zeros = prior.zeros + self.z.mT @ (1 - x)

        def log_dirichlet(alpha: Tensor) -> Tensor:
            return alpha.lgamma().sum(-1) - alpha.sum(-1).lgamma()

        def log_beta(ones: Tensor, zeros: Tensor) -> Tensor:
            return ones.lgamma() + zeros.lgamma() - (ones + zeros).lgamma()

        gain = log_beta(self.ones, self.zeros) - log_beta(prior.ones, prior.zeros)
        self.log_joint = log_dirichlet(self.counts) - log_dirichlet(prior.concentration) + gain.sum((-2, -1))
        self.log_evidence = float(self.log_joint.logsumexp(0))
        self.probabilities = self.log_joint.softmax(0)

    def draw(self, num_chains: int, num_draws: int, seed: int) -> Draws:
        """Return independent draws from the posterior itself."""
        rng = np.random.default_rng(seed)
        at = rng.choice(len(self.probabilities), size=num_chains * num_draws, p=self.probabilities.numpy())
        gammas = torch.as_tensor(rng.gamma(self.counts[at].numpy()))
        params = {
            "weights": gammas / gammas.sum(-1, keepdim=True),
            "probs": torch.as_tensor(rng.beta(self.ones[at].numpy(), self.zeros[at].numpy())),
        }
        lp = torch.stack(
            [
                bernoulli.log_joint(point, self.x).logsumexp(1).sum() + bernoulli.log_prior(point, self.prior)
                for point in map(bernoulli.Params._make, zip(*params.values(), strict=True))
            ]
        )
        shape = (num_chains, num_draws)
        params = {site: value.unflatten(0, shape) for site, value in params.items()}
        return Draws(params, {"lp": lp.unflatten(0, shape)}, {"engine": "exact", "seed": seed})


def binary_rows() -> tuple[Tensor, bernoulli.Prior]:
    ones = torch.ones(3, dtype=torch.float64)
    x = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 0, 1], [0, 0, 0]], dtype=torch.float64)
    return x, bernoulli.Prior(ones[:2], ones, ones)


@pytest.fixture(scope="module")
def exact() -> ExactPosterior:
    return ExactPosterior(*binary_rows())


@pytest.fixture(scope="module")
def posterior(exact: ExactPosterior) -> LogPosterior:
    return LogPosterior(partial(bernoulli.model, num_components=2, prior=exact.prior), exact.x)


@pytest.fixture(scope="module")
def draws(exact: ExactPosterior) -> Draws:
    return exact.draw(4, 500, seed=3)


def test_quantities_at_draws_are_those_of_each(draws: Draws, posterior: LogPosterior, exact: ExactPosterior) -> None:
    """The batch against one draw at a time by the family's own formulas, in an order of chains and draws that shows."""
    rows, resp = log_likelihood(posterior, draws.params), responsibilities(posterior, draws.params)
    found = label_invariant(draws, posterior, family=bernoulli)
    for at in [(0, 0), (1, 7), (3, 499)]:
        point = bernoulli.Params(*(value[at] for value in draws.params.values()))
        table = bernoulli.log_joint(point, exact.x)
        assert torch.allclose(rows[at], table.logsumexp(1), rtol=1e-13)
        assert torch.allclose(resp[at], table.softmax(1), rtol=1e-12)
        assert torch.allclose(found["lp"][at], draws.sample_stats["lp"][at], rtol=1e-13)
        assert torch.allclose(found["log_likelihood"][at], rows[at].sum(), rtol=1e-13)
        entropies = [torch.distributions.Categorical(row).entropy() for row in resp[at]]
        assert torch.allclose(found["allocation_entropy"][at], torch.stack(entropies).sum(), rtol=1e-12)
        empty = sum(math.prod(1 - p for p in resp[at][:, k].tolist()) for k in range(2))
        assert found["num_empty_components"][at].item() == pytest.approx(empty, rel=1e-11)
        mean, covariance = bernoulli.moments(point)
        assert torch.allclose(found["row_mean"][at], mean, rtol=1e-13)
        assert torch.allclose(found["row_covariance"][at], covariance, rtol=1e-12)


def test_rows_count_as_often_as_the_program_says(draws: Draws, posterior: LogPosterior, exact: ExactPosterior) -> None:
    counts = torch.tensor([1.0, 4.0, 2.0, 1.0, 0.5, 1.0, 3.0], dtype=torch.float64)

    def weighted(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
        probs = pyro.sample("probs", dist.Beta(torch.ones(2, 3), torch.ones(2, 3)).to_event(2))
        with pyro.plate("data", len(x)), pyro.poutine.scale(scale=counts):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Bernoulli(probs[z]).to_event(1), obs=x)

    counted, found = log_likelihood_and_label_invariant(draws, LogPosterior(weighted, exact.x))
    assert torch.allclose(counted, counts * log_likelihood(posterior, draws.params), rtol=1e-13)
    assert torch.allclose(found["log_likelihood"], counted.sum(-1), rtol=1e-13)


def test_the_density_of_the_parameters_of_a_row_is_no_likelihood() -> None:
    """Against p(x_n | b_n) = sum_z p(z | b_n) p(x_n | b_n, z), where z enters the densities of both."""

    def program(x: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.25, 0.75]).double()), infer={"enumerate": "parallel"})
            b = pyro.sample("b", dist.Normal(2.0 * z, 1.0))
            pyro.sample("x", dist.Normal(b + shift * z, 1.0), obs=x)

    shift, b = (torch.randn(*shape, generator=seeded(1), dtype=torch.float64) for shape in [(2, 3), (2, 3, 6)])
    draws = Draws({"shift": shift, "b": b}, {}, {})
    rows, found = log_likelihood_and_label_invariant(draws, LogPosterior(program, X))
    weights, z = torch.tensor([0.25, 0.75]).double(), torch.tensor([0.0, 1.0]).double()
    before = weights * dist.Normal(2 * z, 1.0).log_prob(b[..., None]).exp()
    given = dist.Normal(b[..., None] + shift[..., None, None] * z, 1.0).log_prob(X[:, None]).exp()
    expected = ((before / before.sum(-1, keepdim=True)) * given).sum(-1).log()
    assert torch.allclose(rows, expected, rtol=1e-12)
    assert torch.allclose(found["log_likelihood"], expected.sum(-1), rtol=1e-12)
    prior = dist.Normal(0.0, 1.0).log_prob(shift) + before.sum(-1).log().sum(-1)
    assert torch.allclose(found["lp"], prior + expected.sum(-1), rtol=1e-12)


def test_empty_components_are_counted_for_each_latent(all_families: list[Case]) -> None:
    case = next(case for case in all_families if case.name == "gaussian_sum")
    posterior = LogPosterior(case.program(3), case.data(0, 9))
    u = torch.randn(1, 5, posterior.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    params = posterior.constrain(u)
    found = label_invariant(Draws(params, {}, {}), posterior)
    for latent in ("k", "l"):
        absent = 1 - responsibilities(posterior, params, latent)
        assert torch.allclose(found[f"num_empty_components_{latent}"], absent.prod(-2).sum(-1), rtol=1e-11)


def test_large_problems_go_in_parts(draws: Draws, posterior: LogPosterior, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = log_likelihood(posterior, draws.params)
    monkeypatch.setattr("mixproof.inference.at_draws.TABLE_ENTRIES", 300 * 14)  # 300 draws at once, of 2,000
    assert torch.allclose(log_likelihood(posterior, draws.params), whole, rtol=1e-13)


def test_co_clustering_is_that_of_all_allocations(draws: Draws, posterior: LogPosterior, exact: ExactPosterior) -> None:
    together = co_clustering(posterior, draws.params)
    truth = torch.einsum("a,ank,amk->nm", exact.probabilities, exact.z, exact.z)
    resp = responsibilities(posterior, draws.params).flatten(0, 1)
    spread = torch.einsum("snk,smk->snm", resp, resp).std(0)
    error = (together - truth).abs() / (spread / math.sqrt(len(resp))).fill_diagonal_(1)
    assert error.max() < 5  # 21 pairs: beyond 5 standard errors once in 10^5
    assert torch.equal(together.diagonal(), torch.ones(7, dtype=torch.float64))


def test_invariant_quantities_are_invariant(draws: Draws, posterior: LogPosterior) -> None:
    switched = draws._replace(params=permuted_at_random(draws.params, component_axes(posterior), 2, seed=4))
    assert not torch.equal(switched.params["weights"], draws.params["weights"])
    before, after = (label_invariant(each, posterior, family=bernoulli) for each in (draws, switched))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.allclose(after[name], value, rtol=1e-11), name
    assert torch.allclose(co_clustering(posterior, switched.params), co_clustering(posterior, draws.params), rtol=1e-12)


def crossed(x: Tensor, concentration: Tensor) -> None:
    """Two latents index the locations together, the second latent's components on the first axis."""
    locs = pyro.sample("locs", dist.Normal(torch.zeros(3, 2), 3.0).to_event(2))
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones(2)))
    others = pyro.sample("others", dist.Dirichlet(concentration))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(shares), infer={"enumerate": "parallel"})
        t = pyro.sample("t", dist.Categorical(others), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[t, z], 1.0), obs=x)


@pytest.mark.parametrize(
    ("concentration", "order", "classes", "dims"),
    [
        ([1.0, 1.0, 1.0], [1, 2, 0], [[0, 1, 2]], ["rank_z_t"]),
        ([1.0, 4.0, 1.0], [2, 1, 0], [[0, 2], [1]], ["rank_z_t"]),
        ([1.0, 2.0, 4.0], [0, 1, 2], [[0], [1], [2]], ["component_t", "rank_z"]),
    ],
)
def test_a_parameter_of_two_latents_is_sorted_over_both(
    concentration: list[float], order: list[int], classes: list[list[int]], dims: list[str]
) -> None:
    """Those of one class of the second latent's components together, where the first one's may all change places."""
    model = partial(crossed, concentration=torch.tensor(concentration, dtype=torch.float64))
    posterior = LogPosterior(model, X)
    u = torch.randn(2, 20, posterior.size, generator=seeded(0), dtype=torch.float64)
    draws = Draws(posterior.constrain(u), {}, {})
    of_z = permute(draws.params, {"locs": (3,), "shares": (2,)}, torch.tensor([1, 0]))
    switched = draws._replace(params=permute(of_z, {"locs": (2,), "others": (2,)}, torch.tensor(order)))
    before, after = (label_invariant(each, posterior) for each in (draws, switched))
    for name, value in before.items():
        assert torch.allclose(after[name], value, rtol=1e-11), name
    found = before["locs_sorted"]
    by_z = found.unflatten(-1, (2, 3)) if found.ndim == 3 else found.mT
    for members in classes:
        alone = draws.params["locs"][..., members, :].flatten(2).sort(-1).values
        assert torch.equal(by_z[..., members].flatten(2), alone)
    tree: Any = to_datatree(draws, posterior, seed=0, num_predictive=0, num_prior=0)
    assert tree["posterior"]["locs"].dims[2:] == ("component_t", "component_z")
    assert list(tree["label_invariant"]["locs_sorted"].dims[2:]) == dims
    quantities = Quantities(model, X, seed=0)
    first, second = (quantities(each.params, X.expand(2, -1)) for each in (draws, switched))
    if len(classes) == 1:
        mean = torch.einsum("cstz,csz,cst->cs", *(draws.params[name] for name in ("locs", "shares", "others")))
        assert torch.allclose(first["weighted mean locs"], mean, rtol=1e-11)
        assert torch.equal(first["min locs"], draws.params["locs"].amin((2, 3)))
    for name in first if len(classes) == 1 else {"log likelihood", "min shares"}:
        assert torch.allclose(second[name], first[name], rtol=1e-11), name


@pytest.mark.parametrize("name", ["lp", "log_likelihood", "num_empty_components", "locs_sorted"])
def test_a_site_with_the_name_of_another_quantity_is_refused(name: str) -> None:
    def program(x: Tensor) -> None:
        scale = pyro.sample(name, dist.LogNormal(0.0, 1.0))
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        gaussians(x, torch.ones(2) / 2, locs, scale.expand(2))

    posterior = LogPosterior(program, X)
    params = posterior.constrain(torch.zeros(1, 2, posterior.size, dtype=torch.float64))
    with pytest.raises(ValueError, match="has the name of another quantity of the draws"):
        label_invariant(Draws(params, {}, {}), posterior)


def permuted_at_random(
    params: dict[str, Tensor], axes: dict[str, tuple[int, ...]], size: int, seed: int
) -> dict[str, Tensor]:
    """Renumber the components of each draw on its own, one draw at a time."""
    generator = torch.Generator().manual_seed(seed)
    shape = next(iter(params.values())).shape[:2]
    renumbered = {site: value.clone() for site, value in params.items()}
    for chain, draw in itertools.product(range(shape[0]), range(shape[1])):
        permutation = torch.randperm(size, generator=generator)
        point = permute({site: value[chain, draw] for site, value in params.items()}, axes, permutation)
        for site, value in point.items():
            renumbered[site][chain, draw] = value
    return renumbered


def near_a_fit() -> tuple[LogPosterior, Draws]:
    """Draws of three separated Gaussians around one point, which all number the components alike."""
    generator = torch.Generator().manual_seed(5)
    truth = gaussian_full.Params(
        torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.float64),
        torch.eye(2, dtype=torch.float64).expand(3, 2, 2),
    )
    x, _ = gaussian_full.sample(truth, 60, generator)
    posterior = LogPosterior(partial(gaussian_full.model, num_components=3), x)
    center = posterior.unconstrain({site: value[None] for site, value in truth._asdict().items()})
    noise = torch.randn(2, 40, posterior.size, generator=generator, dtype=torch.float64)
    draws = Draws(posterior.constrain(center + 0.1 * noise), {}, {})
    return posterior, draws._replace(sample_stats={"lp": label_invariant(draws, posterior)["lp"]})


@pytest.mark.parametrize("method", ["stephens", "equivalence"])
def test_planted_numberings_are_undone(method: Any) -> None:
    """Three components, so that a permutation and its inverse differ."""
    posterior, draws = near_a_fit()
    axes = component_axes(posterior)
    undisturbed = align(draws, posterior, method=method)
    assert undisturbed.attributes["relabelled_z_share"] == 0
    assert all(torch.equal(undisturbed.params[site], value) for site, value in draws.params.items())
    switched = draws._replace(params=permuted_at_random(draws.params, axes, 3, seed=6))
    aligned = align(switched, posterior, method=method)
    for permutation in map(torch.tensor, itertools.permutations(range(3))):
        named = permute(aligned.params, {site: (axis + 2,) for site, (axis,) in axes.items()}, permutation)
        if all(torch.equal(named[site], value) for site, value in draws.params.items()):
            break
    else:
        pytest.fail("no one numbering of the aligned draws gives back those that were not switched")
    in_place = {site: (value == switched.params[site]).flatten(2).all(2) for site, value in aligned.params.items()}
    share = 1 - torch.stack(list(in_place.values())).all(0).double().mean()
    assert aligned.attributes["relabelled_z_share"] == pytest.approx(float(share))
    assert aligned.attributes["relabelled_z"] == method


def divergence(resp: Tensor) -> float:
    """Return Stephens's loss of responsibilities (S, N, K): the divergence of each draw from the average, summed."""
    average = resp.mean(0)
    return float((torch.special.xlogy(resp, resp) - torch.special.xlogy(resp, average)).sum())


def disagreement(resp: Tensor) -> float:
    """Return in how many rows the most probable component differs from that of the average, summed over draws."""
    return float((resp.argmax(-1) != resp.mean(0).argmax(-1)).sum())


@pytest.mark.parametrize(("method", "loss"), [("stephens", divergence), ("equivalence", disagreement)])
def test_the_loss_is_the_least_of_all_numberings(method: Any, loss: Any, draws: Draws, posterior: LogPosterior) -> None:
    """Against all 2^9 numberings of ten draws, that of the first draw being free."""
    few = Draws({site: value[:1, :10] for site, value in draws.params.items()}, {}, {})
    few = few._replace(sample_stats={"lp": draws.sample_stats["lp"][:1, :10]})
    aligned = align(few, posterior, method=method)
    found = loss(responsibilities(posterior, aligned.params)[0])
    raw = responsibilities(posterior, few.params)[0]
    losses = []
    for swaps in itertools.product([False, True], repeat=9):
        switched = torch.tensor([False, *swaps])
        losses.append(loss(torch.where(switched[:, None, None], raw.flip(-1), raw)))
    assert found == pytest.approx(min(losses), rel=1e-12)
    assert loss(raw) > min(losses)  # there was something to do


def test_aligning_separates_what_switching_mixes(draws: Draws, posterior: LogPosterior) -> None:
    """The law of either component is the same; that of the one which holds the rows of ones is another."""

    def z_score(draws: Draws) -> Tensor:
        difference = draws.params["probs"].flatten(0, 1).diff(dim=1)
        return difference.mean(0).abs() * len(difference) ** 0.5 / difference.std(0)

    assert z_score(draws).max() < 5
    assert z_score(align(draws, posterior)).min() > 20


def test_settings_of_align_are_checked(draws: Draws, posterior: LogPosterior, exact: ExactPosterior) -> None:
    with pytest.raises(ValueError, match="method must be"):
        align(draws, posterior, method="hungarian")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_iterations"):
        align(draws, posterior, max_iterations=0)
    with pytest.warns(UserWarning, match="still changed after 1"):
        align(draws, posterior, max_iterations=1)
    unequal = exact.prior._replace(concentration=torch.tensor([1.0, 2.0], dtype=torch.float64))
    program = partial(bernoulli.model, num_components=2, prior=unequal)
    with pytest.raises(ValueError, match="not exchangeable"):
        align(draws, LogPosterior(program, exact.x))


def test_each_latent_is_aligned_on_its_own(all_families: list[Case]) -> None:
    case = next(case for case in all_families if case.name == "gaussian_sum")
    params = case.params(1, spread=4.0)
    posterior = LogPosterior(case.program(3), case.data(0, 30, params))
    center = posterior.unconstrain({site: value[None] for site, value in params._asdict().items()})
    noise = torch.randn(1, 30, posterior.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    draws = Draws(posterior.constrain(center + 0.01 * noise), {}, {})
    draws = draws._replace(sample_stats={"lp": label_invariant(draws, posterior)["lp"]})
    switched = draws
    for seed, (latent, size) in enumerate([("k", 3), ("l", 2)]):
        axes = component_axes(posterior, latent)
        switched = switched._replace(params=permuted_at_random(switched.params, axes, size, seed))
    aligned = align(align(switched, posterior, latent="k"), posterior, latent="l")
    assert {"relabelled_k", "relabelled_l"} <= aligned.attributes.keys()
    for name, value in aligned.params.items():
        variance, before = (each.params[name].var((0, 1)).sum() for each in (draws, switched))
        assert torch.allclose(value.var((0, 1)).sum(), variance, rtol=1e-10), name
        assert before > 2 * variance, name


MANY_DRAWS = """
import resource, torch
from functools import partial
from mixproof.inference.at_draws import log_likelihood
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.quantities import Quantities
from mixproof.models import bernoulli
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
x = (torch.rand(1800, 64, generator=generator, dtype=torch.float64) < 0.5).double()
prior = bernoulli.weakly_informative_prior(x, 5)
posterior = LogPosterior(partial(bernoulli.model, num_components=5, prior=prior), x)
for count in (100, 900):
    weights = torch.rand(1, count, 5, generator=generator, dtype=torch.float64).softmax(-1)
    probs = torch.rand(1, count, 5, 64, generator=generator, dtype=torch.float64)
    log_likelihood(posterior, {"weights": weights, "probs": probs})
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_draws() -> None:
    """By no more than a dozen of the tables that are worked on at once, of 8 bytes an entry; it grew by 0.7 GB."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MANY_DRAWS]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    few, many = (1024 * int(line) for line in shown.split())
    assert many - few < 12 * 8 * at_draws.TABLE_ENTRIES
