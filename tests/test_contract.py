"""Every family against its contract: by enumeration, by scipy, by brute force, by simulation and by symmetry."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pyro
import pytest
import scipy.integrate
import scipy.stats
import torch
from hypothesis import given, settings
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from pyro.poutine.messenger import Messenger
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.distributions import transform_to
from torch.utils._pytree import tree_flatten, tree_map

from mixproof.inference.em import Fit, em, responsibilities
from mixproof.inference.enumeration import inspect as inspect_program
from mixproof.inference.enumeration import log_joint_table
from mixproof.inference.verification.em import verify_em
from mixproof.models import (
    bernoulli,
    gaussian_diagonal,
    gaussian_full,
    gaussian_isotropic,
    gaussian_spherical,
    gaussian_sum,
    gaussian_tied,
    laplace,
)
from mixproof.models.gaussian_isotropic import GaussianIsotropic
from mixproof.models.initial import partition
from mixproof.models.positive_definite import InverseWishart, cholesky, log_inverse_wishart
from tests.conftest import Case, seeded

FALSE_ALARM = 1e-6
CONTRACT = {
    "model": ["x", "num_components", "prior", "num_data"],
    "log_joint": ["params", "x"],
    "statistics": ["params", "x", "resp"],
    "m_step": ["stats", "prior"],
    "log_prior": ["params", "prior"],
    "sample": ["params", "num_samples", "generator"],
    "moments": ["params"],
    "init_params": ["x", "num_components", "generator", "method", "weights"],
}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def assert_equal_to_rounding(actual: Any, expected: Any, factor: float = 2**10) -> None:
    """Check two trees of tensors entry by entry, against ``factor`` roundings of the largest entry of each tensor."""
    actual_leaves, expected_leaves = tree_flatten(actual)[0], tree_flatten(expected)[0]
    assert len(actual_leaves) == len(expected_leaves)
    for a, b in zip(map(torch.as_tensor, actual_leaves), map(torch.as_tensor, expected_leaves), strict=True):
        assert a.shape == b.shape
        finite = torch.isfinite(b)
        assert torch.equal(a[~finite], b[~finite].to(a.dtype))
        if finite.any():
            size = max(b[finite].abs().max().item(), 1.0)
            assert (a[finite] - b[finite]).abs().max().item() <= factor * torch.finfo(a.dtype).eps * size


def assert_unbiased(draws: Tensor, expected: Tensor, budget: float = FALSE_ALARM) -> None:
    """Check that draws (n, ...) have the expected mean by z-scores, all entries within one false-alarm budget."""
    error = draws.mean(0) - expected
    standard_error = draws.std(0) / math.sqrt(len(draws))
    largest = scipy.stats.norm.isf(budget / (2 * expected.numel()))
    rounding = 2**10 * torch.finfo(draws.dtype).eps * (1 + expected.abs())
    assert (error.abs() <= largest * standard_error + rounding).all(), (error / standard_error).tolist()


def few_steps(*args: Any, **kwargs: Any) -> Fit:
    """Run EM for a fixed number of steps, converged or not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return em(*args, **{"max_steps": 5, "rtol": 0.0, **kwargs})


def assert_equal_traces(actual: Tensor, expected: Tensor, factor: float) -> None:
    """Check two traces, of which one may have stopped earlier because rounding left it nothing to gain."""
    common = min(len(actual), len(expected))
    assert common >= 1
    assert_equal_to_rounding(actual[:common], expected[:common], factor)
    assert_equal_to_rounding(actual[-1], expected[-1], factor)


# The names, their order and their documentation


def test_contract_names_are_present_in_order(case: Case) -> None:
    owner = vars(case.family) if inspect.ismodule(case.family) else vars(type(case.family))
    names = ["Params", "Prior", "Stats", *CONTRACT]
    assert [name for name in owner if name in names] == names
    for name, expected in CONTRACT.items():
        function = getattr(case.family, name)
        parameters = inspect.signature(function).parameters
        assert list(parameters)[: len(expected)] == expected, name
        assert function.__doc__, name
        assert function.__doc__[0].isupper(), name
    assert inspect.signature(case.family.init_params).parameters["method"].default == "k-means++"
    for name in ("m_step", "model"):
        assert inspect.signature(getattr(case.family, name)).parameters["prior"].default is None


@pytest.mark.parametrize("seed", range(3))
def test_start_counts_a_row_as_often_as_its_weight_says(case: Case, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same seeds, weighted rows and repeated rows give the same start."""
    x = case.data(seed, 40)
    weights = torch.randint(0, 4, (40,), generator=seeded(seed))
    seeds = weights.nonzero()[:, 0]
    copies = weights.cumsum(0) - weights  # where the first of each row is
    monkeypatch.setattr("mixproof.models.initial.spread_rows", lambda x, k, *others: seeds[:k])
    weighted = case.family.init_params(x, case.num_components(), seeded(1), weights=weights)
    monkeypatch.setattr("mixproof.models.initial.spread_rows", lambda x, k, *others: copies[seeds[:k]])
    repeated = case.family.init_params(x.repeat_interleave(weights, 0), case.num_components(), seeded(1))
    assert_equal_to_rounding(weighted, repeated)
    plain = case.family.init_params(x, case.num_components(), seeded(1))
    assert any(not torch.allclose(a, b) for a, b in zip(weighted, plain, strict=True))
    ones = case.family.init_params(x, case.num_components(), seeded(1), weights=torch.ones(40))
    assert_equal_to_rounding(ones, plain)


def test_row_of_weight_zero_is_nothing_to_a_start_however_large(real_case: Case) -> None:
    """In float32, where its square overflows."""
    x = real_case.data(0, 40).float()
    weights = torch.arange(40.0) % 3
    family, size = real_case.family, real_case.num_components()
    expected = family.init_params(x, size, seeded(1), weights=weights)
    for value in (1e25, -3.4e38):
        x[::3] = value
        assert_equal_to_rounding(family.init_params(x, size, seeded(1), weights=weights), expected)


@pytest.mark.parametrize("method", ["k-means++", "random"])
def test_row_of_weight_zero_is_no_seed(method: str) -> None:
    x = randn(30, 2, seed=0)
    for seed in range(20):
        weights = torch.zeros(30)
        weights[torch.randperm(30, generator=seeded(seed))[:3]] = torch.tensor([0.1, 1.0, 9.0])
        resp = partition(x, 3, seeded(seed), method, weights)
        assert resp[weights > 0].sum(0).tolist() == [1, 1, 1]
        with pytest.raises(ValueError, match="4 components need at least as many rows, and x has 3"):
            partition(x, 4, seeded(seed), method, weights)
    for bad, words in ((-weights, "must be finite and not negative"), (weights[:4], r"must have shape \(30,\)")):
        with pytest.raises(ValueError, match=words):
            partition(x, 2, seeded(0), method, bad)


def test_random_seeds_are_drawn_in_proportion_to_the_weights() -> None:
    """One after another: the pairs of seeds, as far as their parts tell them apart, have the shares of that law."""
    x, weights = torch.arange(4.0, dtype=torch.float64)[:, None], torch.tensor([1.0, 2.0, 0.0, 5.0])
    generator, num_draws = seeded(0), 4000
    draws = torch.stack([partition(x, 2, generator, "random", weights) for _ in range(num_draws)])
    pairs = {(i, j): weights[i] / 8 * weights[j] / (8 - weights[i]) for i in (0, 1, 3) for j in (0, 1, 3) if i != j}
    parts = {pair: partition_of(x, pair) for pair in pairs}
    for pair, part in parts.items():
        same = [other for other in pairs if torch.equal(parts[other], part)]
        share = sum(float(pairs[other]) for other in same)
        observed = (draws == part).all(-1).all(-1).double().mean().item()
        assert abs(observed - share) <= 5 * math.sqrt(share * (1 - share) / num_draws), pair


def partition_of(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Return the responsibilities that assign each row to the nearest of some rows."""
    return torch.nn.functional.one_hot((x - x[list(rows), 0]).abs().argmin(1), len(rows)).to(x)


def test_contract_is_documented_with_maths_and_shapes(case: Case) -> None:
    documentation = case.module.__doc__ or ""
    assert ".. math::" in documentation
    assert "N observations, D features" in documentation
    for tuple_type in (case.family.Params, case.family.Prior, case.family.Stats):
        assert issubclass(tuple_type, tuple)
        source = inspect.getsource(tuple_type)
        for field in tuple_type._fields:
            line = next(line for line in source.splitlines() if line.strip().startswith(f"{field}:"))
            assert "# (" in line or ".Prior" in line or ".Stats" in line, f"{field} of {tuple_type} has no shape"


def test_first_field_is_weights(case: Case) -> None:
    assert case.family.Params._fields[0].endswith("weights")


# The program in its roles


def test_params_fields_are_the_sample_sites(case: Case, kind: str) -> None:
    prior = case.prior_or_flat(kind)
    x = case.data()
    params = case.params()
    known = {name: getattr(params, name) for name in case.free}
    trace: Any = poutine.trace(poutine.condition(case.program(prior=prior), data=known)).get_trace(x)
    plates = {name for name, site in trace.nodes.items() if type(site.get("fn")).__name__ == "_Subsample"}
    sites = [name for name, site in trace.nodes.items() if site["type"] == "sample" and name not in plates]
    latents = [name for name in sites if (trace.nodes[name]["infer"] or {}).get("enumerate") == "parallel"]
    assert latents
    assert set(sites) == {*case.family.Params._fields, *latents, "x"}
    for name, value in params._asdict().items():
        assert trace.nodes[name]["fn"].shape() == value.shape
        assert trace.nodes[name]["fn"].support.check(value).all()
    assert "data" in plates
    assert any(name.endswith("components") for name in plates)
    assert torch.equal(trace.nodes["x"]["value"], x)


def test_program_generates_under_a_prior(case: Case) -> None:
    prior = case.prior()
    with torch.random.fork_rng(), poutine.trace() as tape:
        pyro.set_rng_seed(3)
        x = case.program(prior=prior)(num_data=7)
    nodes: Any = tape.trace.nodes
    assert x.shape == (7, 2)
    assert x.dtype == torch.float64
    for name in (*case.family.Params._fields, "x"):
        site = nodes[name]
        assert site["fn"].support.check(site["value"]).all(), name
    params = case.family.Params(**{name: nodes[name]["value"] for name in case.family.Params._fields})
    assert torch.isfinite(case.family.log_prior(params, prior))


def test_program_generates_at_given_parameters_under_flat_priors(case: Case) -> None:
    params = case.params(2)
    draws = case.program_draws(params, 9, seed=1)
    assert draws["x"].shape == (9, 2)
    assert case.sites()["x"]["fn"].support.check(draws["x"]).all()
    for name, value in params._asdict().items():
        assert torch.equal(draws[name], value)


def test_enumerated_program_agrees_in_loss_and_every_gradient(case: Case, kind: str) -> None:
    prior = case.prior_or_flat(kind)
    x = case.data(4)
    params = case.params(5, spread=2.0)
    sites = case.sites()
    transforms = {name: transform_to(sites[name]["fn"].support) for name in case.free}

    def losses(log_density: Callable[[Any], Tensor]) -> tuple[Tensor, list[Tensor]]:
        leaves = {name: transforms[name].inv(getattr(params, name)).detach().requires_grad_() for name in case.free}
        constrained = params._replace(**{name: transforms[name](leaf) for name, leaf in leaves.items()})
        loss = -log_density(constrained)
        return loss.detach(), list(torch.autograd.grad(loss, list(leaves.values())))

    def enumerated(own: Any) -> Tensor:
        known = {name: getattr(own, name) for name in case.free}
        conditioned = poutine.condition(case.program(prior=prior), data=known)
        return -TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(conditioned, lambda x: None, x)

    def by_hand(own: Any) -> Tensor:
        log_prior = 0.0 if prior is None else case.family.log_prior(own, prior)
        return case.family.log_joint(own, x).logsumexp(-1).sum() + log_prior

    assert_equal_to_rounding(losses(enumerated), losses(by_hand), factor=2**12)


class MaskSites(Messenger):
    """Takes the log densities of named sites out of a program."""

    def __init__(self, names: tuple[str, ...]):
        super().__init__()
        self.names = names

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] in self.names:
            message["mask"] = False


def test_log_prior_vanishes_under_mask_and_flat_priors(case: Case) -> None:
    x, params, prior = case.data(), case.params(1), case.prior(2)
    log_likelihood = case.family.log_joint(params, x).logsumexp(-1).sum()

    def tabulate(model: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        program = inspect_program(model, params._asdict(), x)
        return log_joint_table(model, program, params._asdict(), x)[:2]

    _, flat = tabulate(case.program())
    assert flat == 0
    table, masked = tabulate(MaskSites(case.family.Params._fields)(case.program(prior=prior)))
    assert masked == 0
    assert_equal_to_rounding(table.logsumexp(-1).sum(), log_likelihood)
    table, log_prior = tabulate(poutine.mask(case.program(prior=prior), mask=False))
    assert log_prior == 0
    assert table.logsumexp(-1).abs().max() < 1e-14  # the latents keep their law, of mass 1


def test_log_joint_is_the_enumerated_table(case: Case, kind: str) -> None:
    prior = case.prior_or_flat(kind, 3)
    x, params = case.data(6), case.params(7, spread=2.0)
    model = case.program(prior=prior)
    table, log_prior = log_joint_table(model, inspect_program(model, params._asdict(), x), params._asdict(), x)[:2]
    assert_equal_to_rounding(case.family.log_joint(params, x), table)
    expected = torch.zeros((), dtype=torch.float64) if prior is None else case.family.log_prior(params, prior)
    assert_equal_to_rounding(log_prior, expected)


# Other people's densities


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_cholesky_tells_regular_matrices_from_the_others(scale: float) -> None:
    """Positive definite beyond rounding, on whatever scale, or NaN; each member of a batch by itself."""
    above, below = 1 - 6e-16, 1 - torch.finfo(torch.float64).eps / 2  # variances given the other: 1.2e-15, 2.2e-16
    regular = [
        [[1.0, 0.6], [0.6, 1.0]],
        [[1e-9, 0.0], [0.0, 1.0]],
        [[1.0, 0.0], [0.0, 1e-20]],
        [[1.0, above], [above, 1.0]],
    ]
    singular = [
        [[1.0, 2.0], [2.0, 1.0]],
        [[-1.0, 0.0], [0.0, 1.0]],
        [[1.0, 1.0], [1.0, 1.0]],
        [[1.0, below], [below, 1.0]],
    ]
    batch = scale * torch.tensor([*regular, *singular], dtype=torch.float64)
    factors = cholesky(batch)
    assert torch.isnan(factors[4:]).all()
    assert torch.equal(factors[:4], factors[:4].tril())
    assert (factors[:4].diagonal(dim1=-2, dim2=-1) > 0).all()
    assert_equal_to_rounding(factors[:4] @ factors[:4].mT / scale, batch[:4] / scale, 2**2)
    apart = torch.stack([cholesky(matrix) for matrix in batch])
    for others in (apart, cholesky(batch[None])[0]):
        torch.testing.assert_close(others, factors, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_inverse_wishart_density_against_scipy(size: int) -> None:
    roots = randn(8, size, size, seed=size)
    covariances = roots @ roots.mT + 0.1 * torch.eye(size, dtype=torch.float64)
    scale, df = covariances[0] + 1, torch.tensor(size + 1.3, dtype=torch.float64)
    expected = [
        scipy.stats.invwishart.logpdf(covariance.numpy(), df.item(), scale.numpy()) for covariance in covariances
    ]
    assert_equal_to_rounding(log_inverse_wishart(covariances, df, scale), torch.tensor(np.array(expected)), 2**14)
    assert_equal_to_rounding(InverseWishart(df, scale).log_prob(covariances), torch.tensor(np.array(expected)), 2**14)
    table = log_inverse_wishart(covariances.unflatten(0, (2, 4)), df, scale)
    assert_equal_to_rounding(table.flatten(), torch.tensor(np.array(expected)), 2**14)


def test_inverse_wishart_sampler_moments() -> None:
    size, df = 3, 11.0
    root = randn(size, size, seed=1)
    scale = root @ root.mT + torch.eye(size, dtype=torch.float64)
    law = InverseWishart(torch.tensor(df, dtype=torch.float64), scale)
    with torch.random.fork_rng():
        pyro.set_rng_seed(5)
        draws = law.expand((2,)).sample((20_000,)).flatten(0, 1)
    assert law.support.check(draws).all()
    assert_unbiased(draws, scale / (df - size - 1))
    # Gelman et al., Bayesian Data Analysis, 3rd edition, appendix A: the inverse is Wishart(df, inverse of scale), so
    # that its mean is df times that matrix, and its log determinant a sum of log chi-squares.
    assert_unbiased(torch.linalg.inv(draws), df * torch.linalg.inv(scale))
    halves = (df - torch.arange(size, dtype=torch.float64)) / 2
    expected = scale.logdet() - size * math.log(2) - halves.digamma().sum()
    assert_unbiased(draws.logdet(), expected)


def scipy_normals(x: np.ndarray, weights: Any, locs: Any, covariances: Any) -> np.ndarray:
    columns = [
        np.log(weight) + scipy.stats.multivariate_normal.logpdf(x, loc, covariance)
        for weight, loc, covariance in zip(weights, locs, covariances, strict=True)
    ]
    return np.stack(columns, -1)


def scipy_sum(x: np.ndarray, x_part: Any, y_part: Any) -> np.ndarray:
    pairs = [(a, b) for a in zip(*x_part, strict=True) for b in zip(*y_part, strict=True)]
    return scipy_normals(x, *zip(*[(a[0] * b[0], a[1] + b[1], a[2] + b[2]) for a, b in pairs], strict=True))


def scipy_products(x: np.ndarray, weights: Any, log_density: Callable[..., np.ndarray], *settings: Any) -> np.ndarray:
    return np.log(weights) + log_density(x[:, None, :], *settings).sum(-1)


def scipy_log_joint(family: Any, params: Any, x: np.ndarray) -> np.ndarray:
    """Return log p(x_n, z_n = k) with scipy's densities."""
    values = [value.numpy() for value in params]
    size = x.shape[1]
    if isinstance(family, GaussianIsotropic):
        return scipy_normals(x, values[0], values[1], [family.variance * np.eye(size)] * len(values[0]))
    if isinstance(family, gaussian_sum.KnownNoise):
        return scipy_sum(x, values, [value.numpy() for value in family.noise])
    if family is gaussian_sum:
        return scipy_sum(x, values[:3], values[3:])
    if family is gaussian_full:
        return scipy_normals(x, *values)
    if family is gaussian_tied:
        return scipy_normals(x, values[0], values[1], [values[2]] * len(values[0]))
    if family is gaussian_diagonal:
        return scipy_products(x, values[0], scipy.stats.norm.logpdf, values[1], np.sqrt(values[2]))
    if family is gaussian_spherical:
        return scipy_normals(x, values[0], values[1], [variance * np.eye(size) for variance in values[2]])
    if family is laplace:
        return scipy_products(x, values[0], scipy.stats.laplace.logpdf, *values[1:])
    return scipy_products(x, values[0], scipy.stats.bernoulli.logpmf, values[1])


@pytest.mark.parametrize(
    "module",
    [bernoulli, gaussian_diagonal, gaussian_full, gaussian_spherical, gaussian_sum, gaussian_tied, laplace],
    ids=lambda module: module.__name__.rsplit(".", 1)[-1],
)
def test_modules_against_scipy(module: Any, request: pytest.FixtureRequest) -> None:
    case = next(case for case in request.getfixturevalue("all_families") if case.family is module)
    check_against_scipy(case)


@pytest.mark.parametrize("name", ["UniformWeights", "GaussianIsotropic", "KnownNoise"])
def test_settings_against_scipy(name: str, request: pytest.FixtureRequest) -> None:
    case = next(case for case in request.getfixturevalue("all_families") if case.name == name)
    check_against_scipy(case)


def check_against_scipy(case: Case) -> None:
    for seed in range(3):
        params, x = case.params(seed, spread=3.0), case.data(seed + 10, 30)
        expected = torch.tensor(scipy_log_joint(case.family, params, x.numpy()))
        assert_equal_to_rounding(case.family.log_joint(params, x), expected, 2**12)


def test_probabilities_of_zero_and_one_exclude_rows() -> None:
    """log p is that of scipy, -inf included: the other rows keep their densities."""
    probs = torch.tensor([[0.0, 0.3], [1.0, 0.6], [0.2, 0.0], [0.5, 1.0], [0.0, 1.0]], dtype=torch.float64)
    weights = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    params = bernoulli.Params(weights, probs)
    expected = torch.tensor(scipy_log_joint(bernoulli, params, x.numpy()))
    assert (expected == -torch.inf).any(0).all()
    assert torch.isfinite(expected).any(0).all()
    assert_equal_to_rounding(bernoulli.log_joint(params, x), expected)
    uniform = bernoulli.UniformWeights()
    assert_equal_to_rounding(uniform.log_joint(uniform.Params(weights, probs), x), expected)


def test_a_single_column_is_enough(case: Case, kind: str) -> None:
    """With D = 1 the table is the program's, and EM climbs."""
    own: Any = case
    if case.name == "KnownNoise":
        weights, locs, covariances = case.family.noise
        noise = gaussian_full.Params(weights, locs[:, :1], covariances[:, :1, :1])
        own = type(case)(case.name, gaussian_sum.KnownNoise(noise))
    params, prior = own.params(3, num_features=1), None if kind == "flat" else own.prior(2, num_features=1)
    x = own.data(4, 50, params=params)
    model, values = own.program(prior=prior), params._asdict()
    table, log_prior = log_joint_table(model, inspect_program(model, values, x), values, x)[:2]
    assert_equal_to_rounding(own.family.log_joint(params, x), table)
    if prior is not None:
        assert_equal_to_rounding(own.family.log_prior(params, prior), log_prior)
    fit = few_steps(own.family, x, params, prior=prior)
    assert {name: value.shape for name, value in fit.params._asdict().items()} == {
        name: value.shape for name, value in values.items()
    }
    assert fit.log_lik[0] > (table.logsumexp(-1).sum() + log_prior)
    mean, covariance = own.family.moments(params)
    assert mean.shape == (1,)
    assert covariance.shape == (1, 1)


# Statistics and the M-step


def test_statistics_add_over_chunks_of_rows(case: Case, kind: str) -> None:
    """Rows in chunks, each with its own statistics, make the same step; what holds the rows themselves is joined."""
    num_data = 41
    x, params, resp = case.data(1, num_data), case.params(2), case.resp(3, num_data)
    whole = case.family.statistics(params, x, resp)
    chunks = [case.family.statistics(params, rows, part) for rows, part in zip(x.split(7), resp.split(7), strict=True)]

    def combine(total: Tensor, *parts: Tensor) -> Tensor:
        return torch.cat(parts) if total.shape[:1] == (num_data,) else torch.stack(parts).sum(0)

    combined = tree_map(combine, whole, *chunks)
    assert_equal_to_rounding(combined, whole)
    prior = case.prior_or_flat(kind)
    assert_equal_to_rounding(case.family.m_step(combined, prior), case.family.m_step(whole, prior), 2**12)


def test_statistics_are_what_their_fields_say(case: Case) -> None:
    """Each sum by a loop over rows and components, as the comments beside the fields define it."""
    params, x, resp = case.params(2), case.data(1, 9), case.resp(3, 9)
    stats = case.family.statistics(params, x, resp)
    if case.module is gaussian_sum:
        return check_first_moments_of_summands(case, params, x, resp, stats)
    terms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "counts": lambda row, loc: torch.ones_like(row[0]),
        "sums": lambda row, loc: row,
        "ones": lambda row, loc: row,
        "zeros": lambda row, loc: 1 - row,
        "shifts": lambda row, loc: row - loc,
        "squares": lambda row, loc: (row - loc) ** 2,
        "scatters": lambda row, loc: torch.outer(row - loc, row - loc),
        "scatter": lambda row, loc: torch.outer(row - loc, row - loc),
    }
    for name, found in stats._asdict().items():
        if case.family is laplace:
            assert torch.equal(found, {"x": x, "resp": resp}[name])
            continue
        locs = params[1]  # not looked at where there are none
        sums = [
            [r * terms[name](row, loc) for row, r in zip(x, own, strict=True)]
            for loc, own in zip(locs, resp.mT, strict=True)
        ]
        expected = torch.stack([torch.stack(own).sum(0) for own in sums])
        if name == "scatter":
            expected = expected.sum(0)
        if case.module in (gaussian_spherical, gaussian_isotropic) and name == "squares":
            expected = expected.sum(-1)
        assert_equal_to_rounding(found, expected)
    return None


def check_first_moments_of_summands(case: Case, params: Any, x: Tensor, resp: Tensor, stats: Any) -> None:
    """The first moments about 0 and about the locations agree, and those of the two summands add to the data's."""
    parts = (
        [(stats, params.locs)] if case.name == "KnownNoise" else [(stats.x, params.x_locs), (stats.y, params.y_locs)]
    )
    for part, locs in parts:
        assert_equal_to_rounding(part.sums, part.counts[:, None] * locs + part.shifts)
        assert_equal_to_rounding(part.counts.sum(), resp.sum())
    if len(parts) == 2:
        assert_equal_to_rounding(stats.x.sums.sum(0) + stats.y.sums.sum(0), resp.sum(-1) @ x)


def test_step_without_rows_is_the_mode_of_the_prior(case: Case) -> None:
    """Components that no row belongs to go to where the gradient of the log prior is 0."""
    params, prior, x = case.params(2), case.prior(1), case.data(1, 5)
    nothing = torch.zeros_like(case.resp(3, 5))
    mode = case.family.m_step(case.family.statistics(params, x, nothing), prior)

    def gradient(point: Any) -> dict[str, Tensor]:
        leaves = {name: getattr(point, name).detach().requires_grad_() for name in case.free}
        log_prior = case.family.log_prior(point._replace(**leaves), prior)
        return dict(zip(leaves, torch.autograd.grad(log_prior, list(leaves.values())), strict=True))

    elsewhere = gradient(params)
    for name, value in gradient(mode).items():
        tangent = value - value.mean() if name.endswith("weights") else value  # a simplex has no other directions
        size = elsewhere[name].abs().max() + value.abs().max()
        assert tangent.abs().max() <= 2**10 * torch.finfo(value.dtype).eps * size, name


def test_component_without_rows_has_no_median() -> None:
    """EM tells a lost component by its NaNs; the others have the medians that they have without it."""
    x, resp = randn(7, 2, seed=1), randn(7, 3, seed=2).softmax(-1)
    without = torch.cat([resp[:, :1], torch.zeros(7, 1).double(), resp[:, 2:]], 1)
    found = laplace.weighted_median(x, without)
    assert torch.isnan(found[1]).all()
    assert torch.equal(found[[0, 2]], laplace.weighted_median(x, resp[:, [0, 2]]))
    costs = (resp[:, [0, 2], None, None] * (x[:, None, :, None] - x.mT[None, None]).abs()).sum(0)  # at each of the rows
    own = (resp[:, [0, 2], None] * (x[:, None] - found[[0, 2]]).abs()).sum(0)
    assert (own <= costs.amin(-1) * (1 + 2**4 * torch.finfo(x.dtype).eps)).all()


def test_only_laplace_keeps_the_rows(case: Case) -> None:
    stats = case.family.statistics(case.params(), case.data(1, 41), case.resp(1, 41))
    keeps_rows = any(leaf.shape[:1] == (41,) for leaf in tree_flatten(stats)[0])
    assert keeps_rows == (case.family is laplace)


def test_em_is_exact_by_the_program(case: Case, kind: str) -> None:
    prior = case.prior_or_flat(kind)
    params = case.params(9, spread=4.0)
    x = case.data(9, 120, params=params)

    def e_step(params: Any, x: Tensor) -> Tensor:
        return case.family.log_joint(params, x).softmax(-1)

    def m_step(resp: Tensor, x: Tensor, *, params: Any) -> Any:
        return case.family.m_step(case.family.statistics(params, x, resp), prior)

    def log_likelihood(params: Any, x: Tensor) -> Tensor:
        return case.family.log_joint(params, x).logsumexp(-1).sum()

    report = verify_em(
        case.program(prior=prior),
        params,
        e_step=e_step,
        m_step=m_step,
        data=(x,),
        log_likelihood=log_likelihood,
        seed=0,
    )
    hidden_summands = case.module is gaussian_sum
    expected = "generalised EM" if hidden_summands else "exact EM" if prior is None else "MAP-EM"
    assert report.verdict == expected, str(report)
    assert report.ok


# Simulation


@pytest.mark.parametrize("source", ["sample", "program"])
def test_moments_against_simulation(case: Case, source: str) -> None:
    params, num_samples = case.params(11, spread=2.0), 50_000
    mean, covariance = case.family.moments(params)
    if source == "sample":
        x, _ = case.family.sample(params, num_samples, seeded(1))
    else:
        x = case.program_draws(params, num_samples, seed=2)["x"]
    assert x.shape == (num_samples, 2)
    assert_unbiased(x, mean, FALSE_ALARM / 2)
    deviations = x - mean
    assert_unbiased(deviations[:, :, None] * deviations[:, None, :], covariance, FALSE_ALARM / 2)
    assert torch.linalg.eigvalsh(covariance).min() > 0


def component_laws(case: Case, params: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights (J,), means (J, D) and covariances (J, D, D) of the program, one for each value of its latents."""
    latents = [name for name, site in case.sites().items() if site["infer"].get("enumerate")]
    sizes = [value.shape[0] for name, value in params._asdict().items() if name.endswith("weights")]
    if case.name == "KnownNoise":
        sizes.append(case.family.noise.weights.shape[0])
    grid = torch.cartesian_prod(*map(torch.arange, sizes)).reshape(-1, len(sizes))
    known = {name: getattr(params, name) for name in case.free}
    program = partial(case.program(), num_data=len(grid), num_features=params[1].shape[-1])
    conditioned = poutine.condition(program, data=known | dict(zip(latents, grid.mT, strict=True)))
    trace: Any = poutine.trace(conditioned).get_trace()
    trace.compute_log_prob()
    weights = torch.stack([trace.nodes[name]["log_prob"] for name in latents]).sum(0).exp()
    law = trace.nodes["x"]["fn"]
    covariances = getattr(law, "covariance_matrix", None)
    return weights, law.mean, torch.diag_embed(law.variance) if covariances is None else covariances


def test_moments_are_those_of_the_program_by_the_law_of_total_covariance(case: Case) -> None:
    params = case.params(11, spread=2.0)
    weights, means, covariances = (value.numpy() for value in component_laws(case, params))
    mean = sum(weight * each for weight, each in zip(weights, means, strict=True))
    second = sum(w * (c + np.outer(m, m)) for w, m, c in zip(weights, means, covariances, strict=True))
    assert_equal_to_rounding(
        case.family.moments(params), (torch.tensor(mean), torch.tensor(second - np.outer(mean, mean)))
    )


def test_sample_frequencies_of_components(case: Case) -> None:
    params, num_samples = case.params(12), 20_000
    _, z = case.family.sample(params, num_samples, seeded(3))
    weights = [value for name, value in params._asdict().items() if name.endswith("weights")]
    if case.name == "KnownNoise":
        weights.append(case.family.noise.weights)
    probs = weights[0] if len(weights) == 1 else torch.outer(*weights).flatten()
    assert z.shape == (num_samples,)
    counts = z.bincount(minlength=len(probs))
    assert len(counts) == len(probs)
    assert scipy.stats.chisquare(counts, num_samples * probs).pvalue > FALSE_ALARM


def test_sample_pairs_rows_with_their_components(case: Case) -> None:
    """E[(1{z = k} - p(k | x)) f(x)] = 0 for every f: the labels are those that the density declares."""
    params, num_samples = case.params(13, spread=2.0), 50_000
    x, z = case.family.sample(params, num_samples, seeded(4))
    resp = case.family.log_joint(params, x).softmax(-1)
    surprise = torch.nn.functional.one_hot(z, resp.shape[1]) - resp
    features = torch.cat([torch.ones_like(x[:, :1]), x, x.square(), x[:, :1] * x[:, 1:]], 1)
    products = surprise[:, :, None] * features[:, None, :]
    assert_unbiased(products, torch.zeros(products.shape[1:], dtype=torch.float64))


def test_sample_is_deterministic_given_the_generator(case: Case) -> None:
    params = case.params(14)
    first, again = (case.family.sample(params, 50, seeded(6)) for _ in range(2))
    other = case.family.sample(params, 50, seeded(7))
    torch.manual_seed(0)
    with_global_seed = case.family.sample(params, 50, seeded(6))
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, first, with_global_seed))
    assert not torch.equal(first[0], other[0])


# Vectorisation and precision


def stack(values: list[Any]) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves), *values)


def test_functions_run_under_vmap(case: Case, kind: str) -> None:
    family, prior = case.family, case.prior_or_flat(kind)
    points = [case.params(seed) for seed in range(4)]
    x, resp = case.data(1, 10), case.resp(2, 10)
    batch = stack(points)

    def step(params: Any) -> Any:
        return family.m_step(family.statistics(params, x, resp), prior)

    functions: list[Callable[[Any], Any]] = [
        lambda params: family.log_joint(params, x),
        lambda params: family.statistics(params, x, resp),
        step,
        family.moments,
    ]
    if prior is not None:
        functions.append(lambda params: family.log_prior(params, prior))
    for function in functions:
        vectorised = torch.func.vmap(function)(batch)
        assert_equal_to_rounding(vectorised, stack([function(params) for params in points]))
    stats = stack([family.statistics(params, x, resp) for params in points])
    expected = stack([step(params) for params in points])
    assert_equal_to_rounding(torch.func.vmap(lambda stats: family.m_step(stats, prior))(stats), expected)


def test_data_and_responsibilities_run_under_vmap(case: Case) -> None:
    family, params = case.family, case.params(3)
    xs = [case.data(seed, 10) for seed in range(4)]
    resps = [case.resp(seed, 10) for seed in range(4)]

    def step(x: Tensor, resp: Tensor) -> Any:
        return family.m_step(family.statistics(params, x, resp))

    vectorised = torch.func.vmap(step)(torch.stack(xs), torch.stack(resps))
    assert_equal_to_rounding(vectorised, stack([step(x, resp) for x, resp in zip(xs, resps, strict=True)]))


def test_sample_runs_under_vmap(case: Case) -> None:
    points = [case.params(seed, spread=2.0) for seed in range(3)]
    num_samples = 20_000

    def draw(params: Any) -> tuple[Tensor, Tensor]:
        return case.family.sample(params, num_samples, generator)

    generator = seeded(8)
    x, z = torch.func.vmap(draw, randomness="different")(stack(points))
    assert x.shape == (3, num_samples, 2)
    assert z.shape == (3, num_samples)
    for i, params in enumerate(points):
        assert_unbiased(x[i], case.family.moments(params)[0], FALSE_ALARM / 3)
    assert not torch.equal(x[0] - x[0].mean(0), x[1] - x[1].mean(0))


def single(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.to(torch.float32), tree)


def test_single_precision_in_is_single_precision_out(case: Case, kind: str) -> None:
    family, prior, x = case.family, case.prior_or_flat(kind), case.data(1)
    if case.name == "KnownNoise":
        family = gaussian_sum.KnownNoise(single(family.noise))
    params, resp = case.params(2), case.resp(3, len(x))
    low = single((params, x, resp, prior)) if prior is not None else (*single((params, x, resp)), None)

    def outputs(params: Any, x: Tensor, resp: Tensor, prior: Any) -> list[Any]:
        family = case.family if x.dtype == torch.float64 else single_family
        stats = family.statistics(params, x, resp)
        log_prior = [] if prior is None else [family.log_prior(params, prior)]
        return [family.log_joint(params, x), stats, family.m_step(stats, prior), family.moments(params), *log_prior]

    single_family = family
    found, expected = outputs(*low), outputs(params, x, resp, prior)
    assert {leaf.dtype for leaf in tree_flatten(found)[0]} == {torch.float32}
    assert_equal_to_rounding(found, expected, factor=2**8)
    draws, _ = family.sample(low[0], 5, seeded(0))
    assert draws.dtype == torch.float32
    start = family.init_params(low[1], case.num_components(), seeded(1))
    assert {leaf.dtype for leaf in start} == {torch.float32}
    fit = few_steps(family, low[1], found[2], prior=prior)
    assert {leaf.dtype for leaf in (*fit.params, fit.log_lik)} == {torch.float32}


# Brute force and closed forms


def test_marginal_likelihood_is_the_sum_over_all_assignments(case: Case) -> None:
    """log sum over K^N assignments of p(x, z | params), from the program run at every assignment at once."""
    num_data, params = (6, case.params(15, k=3)) if case.num_weights == 1 else (3, case.params(15, k=2))
    x = case.data(16, num_data)
    site_names = [name for name, site in case.sites().items() if site["infer"].get("enumerate")]
    sizes = [value.shape[0] for name, value in params._asdict().items() if name.endswith("weights")]
    if case.name == "KnownNoise":
        sizes, num_data = [*sizes, 2], 3
        x = x[:3]
    joint = int(np.prod(sizes))
    assignments = torch.cartesian_prod(*[torch.arange(joint)] * num_data)  # (joint^N, N)
    values: dict[str, Tensor] = {name: getattr(params, name) for name in case.free}
    for name, size in reversed(list(zip(site_names, sizes, strict=True))):
        values[name], assignments = assignments % size, assignments // size
    k = sizes[: case.num_weights]
    program = partial(case.family.model, num_components=k[0] if len(k) == 1 else tuple(k))
    trace: Any = poutine.trace(poutine.condition(program, data=values)).get_trace(x)
    trace.compute_log_prob()
    table = sum(trace.nodes[name]["log_prob"] for name in (*site_names, "x"))
    assert table.shape == (joint**num_data, num_data)
    expected = table.sum(-1).logsumexp(0)
    assert_equal_to_rounding(case.family.log_joint(params, x).logsumexp(-1).sum(), expected)


def test_responsibilities_of_a_single_row(case: Case) -> None:
    params, x = case.params(17), case.data(18, 1)
    found = responsibilities(case.family, params, x)
    table = case.family.log_joint(params, x)
    assert found.shape == table.shape
    assert_equal_to_rounding(found, (table - table.logsumexp(-1, keepdim=True)).exp())
    assert_equal_to_rounding(found.sum(), torch.tensor(1.0))


def test_em_far_from_zero_finds_the_same_spread(real_case: Case) -> None:
    offset = 1e6
    x = (real_case.data(19, 80) * 1024).round() / 1024  # a grid on which adding the offset is exact
    assert torch.equal(x + offset - offset, x)
    start = real_case.family.init_params(x, real_case.num_components(), seeded(0))
    far_start = start._replace(**{real_case.location: getattr(start, real_case.location) + offset})
    near = few_steps(real_case.family, x, start, max_steps=10)
    far = few_steps(real_case.family, x + offset, far_start, max_steps=10)
    rounding = 2**6 * torch.finfo(torch.float64).eps * offset
    shift = {real_case.location: getattr(far.params, real_case.location) - offset}
    for found, expected in zip(far.params._replace(**shift), near.params, strict=True):
        assert (found - expected).abs().max() <= rounding * max(1.0, expected.abs().max().item())
    assert ((far.log_lik - near.log_lik).abs() <= rounding * len(x)).all()


def one_component(family: Any, x: np.ndarray) -> dict[str, np.ndarray]:
    mean, covariance = x.mean(0), np.cov(x.T, bias=True)
    median = np.median(x, axis=0)
    if isinstance(family, GaussianIsotropic):
        return {"locs": mean}
    if isinstance(family, bernoulli.UniformWeights):
        return {"probs": mean}
    return {
        bernoulli: {"probs": mean},
        gaussian_full: {"locs": mean, "covariances": covariance},
        gaussian_diagonal: {"locs": mean, "variances": np.diag(covariance)},
        gaussian_spherical: {"locs": mean, "variances": np.trace(covariance) / len(mean)},
        gaussian_tied: {"locs": mean, "covariance": covariance},
        laplace: {"locs": median, "scales": np.abs(x - median).mean(0)},
    }[family]


def test_one_component_has_a_closed_form(case: Case) -> None:
    x = case.data(20, 33)
    if case.module is gaussian_sum:
        return check_one_pair(case, x)
    start = case.params(21, k=1)
    fit = em(case.family, x, start)
    assert fit.converged
    assert fit.num_steps == 2
    assert fit.params.weights == 1
    for name, expected in one_component(case.family, x.numpy()).items():
        value = getattr(fit.params, name)
        assert_equal_to_rounding(value if name == "covariance" else value[0], torch.tensor(expected))
    return None


def check_one_pair(case: Case, x: Tensor) -> None:
    """With one component each, the sum is one Gaussian, and its moments are those of the data."""
    family: Any = case.family
    if case.name == "KnownNoise":
        mean, covariance = x.mean(0), torch.cov(x.mT, correction=0)
        family = gaussian_sum.KnownNoise(
            gaussian_full.Params(torch.ones(1).double(), mean[None] / 3, covariance[None] / 2)
        )
    fit = em(family, x, case.params(21, k=1), rtol=1e-15, max_steps=5000)
    mean, covariance = family.moments(fit.params)
    assert_equal_to_rounding(mean, x.mean(0), 2**10)
    assert (covariance - torch.cov(x.mT, correction=0)).abs().max() < 1e-6  # stops at a gain of 1e-15: its root


# The sum of two mixtures


def scalar_parts() -> tuple[gaussian_full.Params, gaussian_full.Params]:
    def part(weights: list[float], locs: list[float], variances: list[float]) -> gaussian_full.Params:
        as_tensor = partial(torch.tensor, dtype=torch.float64)
        return gaussian_full.Params(as_tensor(weights), as_tensor(locs)[:, None], as_tensor(variances)[:, None, None])

    return part([0.5, 0.2, 0.3], [-2.0, 0.5, 3.0], [0.4, 1.5, 0.2]), part([0.35, 0.65], [-1.0, 1.5], [0.1, 0.9])


def scipy_density(part: gaussian_full.Params, point: float) -> float:
    weights, locs, covariances = (value.numpy().ravel() for value in part)
    return float((weights * scipy.stats.norm.pdf(point, locs, np.sqrt(covariances))).sum())


@pytest.mark.parametrize("point", [-6.0, -1.3, 0.2, 2.1, 5.5])
def test_density_of_the_sum_is_the_convolution(point: float) -> None:
    x_part, y_part = scalar_parts()
    convolution, error = scipy.integrate.quad(
        lambda u: scipy_density(x_part, u) * scipy_density(y_part, point - u),
        -20,
        20,
        points=[-2.0, 0.5, 3.0, point - 1.5, point + 1.0],
        epsabs=1e-14,
        epsrel=1e-11,
        limit=500,
    )
    x = torch.tensor([[point]], dtype=torch.float64)
    for density in (
        gaussian_sum.log_joint(gaussian_sum.Params(*x_part, *y_part), x).logsumexp(-1).exp().item(),
        gaussian_sum.KnownNoise(y_part).log_joint(x_part, x).logsumexp(-1).exp().item(),
    ):
        assert abs(density - convolution) <= error + 1e-11 * convolution


@pytest.mark.parametrize("program", ["generative", "collapsed"])
def test_both_programs_of_the_sum_draw_from_its_density(program: str) -> None:
    x_part, y_part = scalar_parts()
    params = gaussian_sum.Params(*x_part, *y_part)
    model = gaussian_sum.generative_model if program == "generative" else gaussian_sum.model
    with torch.random.fork_rng(), poutine.trace() as tape:
        pyro.set_rng_seed(9)
        conditioned: Any = poutine.condition(model, data=params._asdict())
        draws = conditioned(num_components=(3, 2), num_data=50_000, num_features=1)
    nodes: Any = tape.trace.nodes
    total = gaussian_sum.collapse(x_part, y_part)
    weights, locs, variances = (value.numpy().ravel() for value in total)

    def distribution_function(x: np.ndarray) -> np.ndarray:
        return (weights * scipy.stats.norm.cdf(x[:, None], locs, np.sqrt(variances))).sum(-1)

    assert scipy.stats.kstest(draws[:, 0].numpy(), distribution_function).pvalue > FALSE_ALARM
    pairs = nodes["k"]["value"] * 2 + nodes["l"]["value"]
    assert scipy.stats.chisquare(pairs.bincount(minlength=6), len(draws) * weights).pvalue > FALSE_ALARM
    if program == "generative":
        assert torch.equal(nodes["x_part"]["value"] + nodes["y_part"]["value"], draws)


def test_generative_program_of_the_sum_draws_under_a_prior(all_families: list[Case]) -> None:
    case = next(case for case in all_families if case.family is gaussian_sum)
    with torch.random.fork_rng():
        pyro.set_rng_seed(1)
        x = gaussian_sum.generative_model(num_components=(3, 2), prior=case.prior(), num_data=6)
    assert x.shape == (6, 2)
    assert torch.isfinite(x).all()


# Laws over random instances

instances = given(seed=st.integers(0, 2**16), k=st.integers(1, 3), num_data=st.integers(25, 60))
over_instances = settings(max_examples=8, deadline=None, derandomize=True, database=None)


@over_instances
@instances
def test_em_never_falls(case: Case, kind: str, seed: int, k: int, num_data: int) -> None:
    x, prior = case.data(seed, num_data), case.prior_or_flat(kind, seed, k)
    start = case.start(seed, x, k, prior)
    fit = few_steps(case.family, x, start, prior=prior)
    rounding = 2**6 * torch.finfo(torch.float64).eps * (fit.log_lik.abs().max() + num_data)
    assert (fit.log_lik.diff() >= -rounding).all()
    log_prior = 0 if prior is None else case.family.log_prior(fit.params, prior)
    assert_equal_to_rounding(fit.log_lik[-1], case.family.log_joint(fit.params, x).logsumexp(-1).sum() + log_prior)


@over_instances
@instances
def test_em_does_not_see_the_order_of_rows(case: Case, kind: str, seed: int, k: int, num_data: int) -> None:
    x, prior = case.data(seed, num_data), case.prior_or_flat(kind, seed, k)
    start = case.start(seed, x, k, prior)
    order = torch.randperm(num_data, generator=seeded(seed))
    fit, permuted = (few_steps(case.family, rows, start, prior=prior) for rows in (x, x[order]))
    assert_equal_to_rounding(permuted.params, fit.params, 2**16)
    assert_equal_traces(permuted.log_lik, fit.log_lik, 2**16)


@over_instances
@instances
def test_em_does_not_see_the_order_of_components(case: Case, seed: int, k: int, num_data: int) -> None:
    x = case.data(seed, num_data)
    start = case.start(seed, x, k)
    size = start[0].shape[0]
    part = [name for name in start._fields if name.split("_")[0] == start._fields[0].split("_")[0]]
    part = part if case.num_weights > 1 else list(start._fields)

    def permute(params: Any) -> Any:
        own = [name for name in part if name != "covariance"]  # all components share this one
        return params._replace(**{name: getattr(params, name).flip(0) for name in own})

    fit, flipped = (few_steps(case.family, x, params) for params in (start, permute(start)))
    assert size == k
    assert_equal_to_rounding(flipped.params, permute(fit.params), 2**16)
    assert_equal_traces(flipped.log_lik, fit.log_lik, 2**16)


@over_instances
@instances
def test_em_weights_repeat_rows(case: Case, kind: str, seed: int, k: int, num_data: int) -> None:
    x, prior = case.data(seed, num_data), case.prior_or_flat(kind, seed, k)
    times = torch.randint(0, 4, (num_data,), generator=seeded(seed))
    times[:k] = 2
    start = case.start(seed, x, k, prior)
    weighted = few_steps(case.family, x, start, prior=prior, weights=times)
    repeated = few_steps(case.family, x.repeat_interleave(times, 0), start, prior=prior)
    assert_equal_to_rounding(weighted.params, repeated.params, 2**16)
    assert_equal_traces(weighted.log_lik, repeated.log_lik, 2**16)


@over_instances
@given(seed=st.integers(0, 2**16), k=st.integers(1, 3))
def test_full_covariances_are_affine_equivariant(seed: int, k: int) -> None:
    x = torch.cat([randn(30, 2, seed=seed), 5 + randn(30, 2, seed=seed + 1)])
    resp = randn(60, k, seed=seed + 4).softmax(-1)
    start = gaussian_full.m_step(gaussian_full.statistics(gaussian_full.init_params(x, k, seeded(seed)), x, resp))
    matrix, shift = randn(2, 2, seed=seed + 2) + 2 * torch.eye(2, dtype=torch.float64), randn(2, seed=seed + 3)

    def transform(params: gaussian_full.Params) -> gaussian_full.Params:
        return gaussian_full.Params(
            params.weights, params.locs @ matrix.mT + shift, matrix @ params.covariances @ matrix.mT
        )

    fit = few_steps(gaussian_full, x, start)
    transformed = few_steps(gaussian_full, x @ matrix.mT + shift, transform(start))
    rounding = 2**16 * torch.linalg.cond(matrix).item()
    assert_equal_to_rounding(transformed.params, transform(fit.params), rounding)
    expected = fit.log_lik - len(x) * torch.linalg.slogdet(matrix).logabsdet
    assert_equal_traces(transformed.log_lik, expected, rounding)
