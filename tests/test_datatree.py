"""Draws in ArviZ: every number under its name, the likelihood marginal, LOO against leaving one out."""

from __future__ import annotations

import importlib
import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import arviz_plots
import arviz_stats
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.signal
import torch
import xarray
from pyro import poutine
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference.at_draws import label_invariant
from mixproof.inference.datatree import loo, relative_efficiency, summary, to_datatree
from mixproof.inference.draws import Draws
from mixproof.inference.gibbs import gibbs
from mixproof.inference.labels import align
from mixproof.inference.log_posterior import LogPosterior
from mixproof.models import bernoulli, gaussian_full, gaussian_sum, gaussian_tied
from tests.conftest import Case, seeded
from tests.test_labels import ExactPosterior, binary_rows

matplotlib.use("Agg")
PRIOR_OF_TWO = gaussian_full.weakly_informative_prior(torch.tensor([[-0.1], [0.2], [9.8], [10.1]]).double(), 2)


def unmixed() -> Any:
    """Expect that chains of a few draws are said not to have mixed, or to have empty components."""
    return pytest.warns(ConvergenceWarning)


def draws_near(posterior: LogPosterior, params: Any, shape: tuple[int, int], seed: int) -> Draws:
    """Return draws around parameters that are not from any posterior; each differs from each."""
    free = {site: getattr(params, site)[None] for site in posterior.program.supports}
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(*shape, posterior.size, generator=generator, dtype=torch.float64)
    draws = Draws(posterior.constrain(posterior.unconstrain(free) + 0.1 * noise), {}, {"engine": "none"})
    return draws._replace(sample_stats={"lp": label_invariant(draws, posterior)["lp"]})


def test_every_number_is_under_its_name(case: Case) -> None:
    """Read back by name from the tree of every family, against the family's own formulas at that draw."""
    params = case.params(0)
    x = case.data(0, 11, params)
    posterior = LogPosterior(case.program(3), x)
    draws = draws_near(posterior, params, (2, 5), seed=1)
    tree = to_datatree(draws, posterior, seed=2, num_predictive=4, family=None)
    known = params._asdict()
    for chain, draw in [(0, 1), (1, 0), (1, 4)]:
        at = {"chain": chain, "draw": draw}
        point = case.family.Params(**known | {site: value[chain, draw] for site, value in draws.params.items()})
        table = case.family.log_joint(point, x)
        rows = tree["log_likelihood"]["x"].sel(at)
        for row in range(len(x)):
            assert float(rows.sel(obs_id=row)) == pytest.approx(float(table[row].logsumexp(0)), rel=1e-11)
        assert float(tree["label_invariant"]["log_likelihood"].sel(at)) == pytest.approx(
            float(table.logsumexp(1).sum()), rel=1e-11
        )
        for site in posterior.program.supports:
            found, value = tree["posterior"][site].sel(at), getattr(point, site)
            component = component_of(site, case)
            if value.ndim == 1 and component:
                assert float(found.sel({component: 1})) == value[1]
            elif value.ndim == 2 and component:
                assert float(found.sel({component: 1, "feature": 0})) == value[1, 0]
            elif value.ndim == 2:
                assert float(found.sel(feature=1, feature_bis=0)) == value[1, 0]
            else:
                assert float(found.sel({component: 1, "feature": 0, "feature_bis": 1})) == value[1, 0, 1]
    assert tree["observed_data"]["x"].dims == ("obs_id", "feature")
    assert np.array_equal(tree["observed_data"]["x"].values, x.numpy())
    assert "prior" not in tree.children  # which is improper
    predicted = tree["posterior_predictive"]["x"]
    assert predicted.dims == ("chain", "draw", "obs_id", "feature")
    assert predicted["draw"].values.tolist() == [0, 2, 4]  # every second, for at least four in all


def component_of(site: str, case: Case) -> str | None:
    if site == "covariance":
        return None
    if case.name in ("gaussian_sum", "KnownNoise"):
        return "component_l" if site.startswith("y_") else "component_k"
    return "component"


@pytest.fixture(scope="module")
def exact() -> ExactPosterior:
    return ExactPosterior(*binary_rows())


@pytest.fixture(scope="module")
def posterior(exact: ExactPosterior) -> LogPosterior:
    return program(exact.x, exact.prior)


def program(x: Tensor, prior: bernoulli.Prior) -> LogPosterior:
    return LogPosterior(partial(bernoulli.model, num_components=len(prior.concentration), prior=prior), x)


@pytest.fixture(scope="module")
def draws(exact: ExactPosterior) -> Draws:
    return exact.draw(4, 1000, seed=3)


@pytest.fixture(scope="module")
def tree(draws: Draws, posterior: LogPosterior) -> Any:
    return to_datatree(draws, posterior, seed=1, family=bernoulli)


def leave_one_out(exact: ExactPosterior) -> np.ndarray:
    """Return log p(x_i | x_-i) for each row: the posterior made again without it, by all allocations."""
    kept = [[j for j in range(len(exact.x)) if j != i] for i in range(len(exact.x))]
    return np.array([exact.log_evidence - ExactPosterior(exact.x[rows], exact.prior).log_evidence for rows in kept])


def importance_error(log_likelihood: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the Monte Carlo standard errors of - log mean 1 / p(x_i | params) for each i, and of their sum."""
    ratios = np.exp(-log_likelihood.reshape(-1, log_likelihood.shape[-1]))
    relative = ratios / ratios.mean(0)
    return relative.std(0) / math.sqrt(len(ratios)), float(relative.sum(1).std() / math.sqrt(len(ratios)))


def test_loo_is_leaving_one_out(tree: Any, exact: ExactPosterior) -> None:
    truth = leave_one_out(exact)
    found = loo(tree, pointwise=True)
    each, total = importance_error(tree["log_likelihood"]["x"].values)
    assert float(found.pareto_k.max()) < 0.7
    assert np.abs(found.elpd_i.values - truth).max() < 5 * each.max()
    assert abs(found.elpd - truth.sum()) < 5 * total
    assert total < 0.1  # or the test would see little


def test_a_likelihood_given_the_components_is_not_that(tree: Any, draws: Draws, exact: ExactPosterior) -> None:
    """The mistake that enumeration invites: log p(x_n | z_n, params) at the most probable z_n."""
    points = bernoulli.Params(*(value.flatten(0, 1) for value in draws.params.values()))
    table = torch.func.vmap(bernoulli.log_joint, in_dims=(0, None))(points, exact.x)
    conditional = (table - points.weights.log()[:, None]).gather(-1, table.argmax(-1, keepdim=True))[..., 0]
    wrong = tree.copy(deep=True)
    wrong["log_likelihood"]["x"].values[:] = conditional.reshape(4, 1000, -1).numpy()
    _, total = importance_error(wrong["log_likelihood"]["x"].values)
    assert abs(loo(wrong).elpd - leave_one_out(exact).sum()) > 20 * total


def test_loo_does_not_depend_on_labels(draws: Draws, posterior: LogPosterior, tree: Any) -> None:
    """Chains that stay each with a numbering of its own are no stuck chains, as their parameters would make believe."""
    aligned = align(draws, posterior)
    flipped = {
        site: torch.stack([value[0], value[1].flip(1), value[2], value[3].flip(1)])
        for site, value in aligned.params.items()
    }
    other = to_datatree(Draws(flipped, draws.sample_stats, {}), posterior, seed=1, num_predictive=0, num_prior=0)
    assert relative_efficiency(tree) == pytest.approx(1, abs=0.05)  # independent draws
    assert relative_efficiency(other) == pytest.approx(relative_efficiency(tree), rel=1e-9)
    assert loo(other).elpd == pytest.approx(loo(tree).elpd, rel=1e-12)
    assert float(arviz_stats.rhat(other["posterior"]["probs"]).min()) > 1.1
    assert float(arviz_stats.rhat(other["label_invariant"].to_dataset()).to_array().max()) < 1.01


def random_effects(x: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        effect = pyro.sample("effect", dist.Normal(0.0, 0.1))
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6]).double()), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc + 3.0 * z + effect, 1.0), obs=x)


@pytest.fixture(scope="module")
def effects() -> tuple[Any, Tensor, Tensor]:
    """Return the tree of exact draws of ``random_effects``, log p(x_i | x_-i) and Pr(y_i <= x_i | x_-i) of each row i.

    The location is on a grid, with the effects integrated out, and these are drawn given it.
    """
    x = torch.linspace(-1, 4, 20, dtype=torch.float64)
    grid = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    shares, shifts = torch.tensor([0.4, 0.6]).double(), torch.tensor([0.0, 3.0]).double()
    law = dist.Normal(grid[:, None, None] + shifts, 1.01**0.5)
    table = shares.log() + law.log_prob(x[:, None])
    of_rows = table.logsumexp(2)
    log_joint = dist.Normal(0.0, 2.0).log_prob(grid) + of_rows.sum(1)
    without = log_joint[:, None] - of_rows
    below = (without.softmax(0) * (law.cdf(x[:, None]) @ shares)).sum(0)
    at = log_joint.softmax(0).multinomial(2000, replacement=True, generator=seeded(1))
    allocations = table[at].softmax(2).flatten(0, 1).multinomial(1, generator=seeded(2)).reshape(2000, len(x))
    residuals = x - grid[at, None] - shifts[allocations]
    noise = torch.randn(2000, len(x), generator=seeded(3), dtype=torch.float64)
    values = 0.01 / 1.01 * residuals + (0.01 / 1.01) ** 0.5 * noise
    draws = Draws({"loc": grid[at].reshape(4, 500), "effect": values.reshape(4, 500, -1)}, {}, {})
    tree = to_datatree(draws, LogPosterior(random_effects, x), seed=0, num_predictive=2000)
    return tree, log_joint.logsumexp(0) - without.logsumexp(0), below


def test_loo_is_leaving_one_out_where_rows_have_parameters_of_their_own(effects: tuple[Any, Tensor, Tensor]) -> None:
    tree, truth, _ = effects
    with pytest.warns(UserWarning, match="given the row's own parameters effect, which have seen x_n in every draw"):
        found = loo(tree)
    _, total = importance_error(tree["log_likelihood"]["x"].values)
    assert abs(found.elpd - float(truth.sum())) < 5 * total
    assert total < 0.1  # the densities of the effects, left in, would add 25 to the sum of 20 rows
    of_prior = tree["prior"]["effect"].values
    assert of_prior.std() == pytest.approx(0.1, rel=5 / (2 * of_prior.size) ** 0.5)


def test_predictions_of_all_draws_are_those_of_leaving_one_out(effects: tuple[Any, Tensor, Tensor]) -> None:
    """A share of 2,000 independent draws has a standard error of at most 0.011, and the weights are close to equal."""
    tree, _, below = effects
    found = arviz_stats.loo_pit(tree, random_state=1)["x"].values
    assert np.abs(found - below.numpy()).max() < 5 * 0.012


@pytest.mark.parametrize("direct", [0.0, 100.0])
def test_data_are_not_predicted_by_latents_that_the_parameters_of_a_row_contradict(direct: float) -> None:
    """At effects of 10, which are of the second component, data have the mean 10 + direct; run forwards, 10 + half."""

    def program(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2), infer={"enumerate": "parallel"})
            effect = pyro.sample("effect", dist.Normal(10.0 * z, 0.1))
            pyro.sample("x", dist.Normal(loc + effect + direct * z, 1.0), obs=x)

    posterior = LogPosterior(program, torch.randn(4, generator=seeded(0), dtype=torch.float64))
    values = {"loc": torch.zeros(2, 50).double(), "effect": torch.full((2, 50, 4), 10.0).double()}
    if direct == 0:
        tree: Any = to_datatree(Draws(values, {}, {}), posterior, seed=0, num_prior=0)
        assert float(tree["posterior_predictive"]["x"].mean()) == pytest.approx(10, abs=5 / 400**0.5)
        return
    with pytest.warns(UserWarning, match="own parameters effect depend on the latents, .* has no predictions"):
        tree = to_datatree(Draws(values, {}, {}), posterior, seed=0)
    assert "prior" in tree.children
    assert not {"posterior_predictive", "prior_predictive"} & set(tree.children)


@pytest.mark.parametrize("hidden", ["observation", "row"])
@pytest.mark.filterwarnings("ignore:The inplace keyword")
def test_masked_rows_are_left_out_of_loo(hidden: str) -> None:
    """Against the program of the other rows alone."""
    x = torch.cat([torch.randn(12, generator=seeded(0), dtype=torch.float64) + shift for shift in (-2, 2)])
    known = torch.arange(24) % 4 > 0
    masks = {"observation": True, "row": True}

    def program(x: Tensor, masks: dict[str, Any]) -> None:
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2).double(), 3.0).to_event(1))
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(2).double()))
        with pyro.plate("data", len(x)), poutine.mask(mask=masks["row"]):
            z = pyro.sample("z", dist.Categorical(shares), infer={"enumerate": "parallel"})
            with poutine.mask(mask=masks["observation"]):
                pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x)

    some, few = LogPosterior(program, x, masks | {hidden: known}), LogPosterior(program, x[known], masks)
    noise = torch.randn(2, 200, 3, generator=seeded(1), dtype=torch.float64)
    draws = Draws(few.constrain(0.1 * noise + torch.tensor([-2.0, 2.0, 0.0]).double()), {}, {})
    settings: Any = {"seed": 0, "num_predictive": 400, "num_prior": 0}
    tree: Any = to_datatree(draws, some, **settings)
    expected = to_datatree(draws, few, **settings)
    assert tree["log_likelihood"]["obs_id"].values.tolist() == known.nonzero()[:, 0].tolist()
    assert loo(tree).elpd == pytest.approx(loo(expected).elpd, rel=1e-12)
    assert list(arviz_stats.compare({"some": loo(tree), "few": loo(expected)})["elpd_diff"]) == [0, 0]
    assert arviz_stats.loo(tree, reff=1.0).elpd == pytest.approx(arviz_stats.loo(expected, reff=1.0).elpd, rel=1e-12)
    counted: Any = tree.sel(obs_id=tree["log_likelihood"]["obs_id"])
    assert arviz_stats.loo_pit(counted)["x"].shape == (18,)
    none = LogPosterior(program, x, masks | {hidden: False})
    with pytest.raises(ValueError, match="no group log_likelihood, as where all rows are masked"):
        loo(to_datatree(draws, none, seed=0, num_predictive=0, num_prior=0))


def test_draws_are_worth_what_the_densities_of_rows_repeat_one_another() -> None:
    """Of p = exp(1.5 z), z an autoregression of correlation 0.8^k: neither that of log p nor that of the ranks of p."""
    correlation, scale, shape = 0.8, 1.5, (4, 4000, 40)
    noise = np.random.default_rng(1).standard_normal(shape)
    noise[:, 1:] *= math.sqrt(1 - correlation**2)
    rows = scale * scipy.signal.lfilter([1], [1, -correlation], noise, axis=1)
    tree = xarray.DataTree.from_dict(
        {"log_likelihood": xarray.Dataset({"x": (("chain", "draw", "obs_id"), rows - 1000)})}  # e^-1000 is 0
    )
    lags = correlation ** np.arange(1, 200)
    of_density = 1 / (1 + 2 * (np.expm1(scale**2 * lags) / np.expm1(scale**2)).sum())
    of_logarithm = (1 - correlation) / (1 + correlation)
    found = relative_efficiency(tree)
    assert abs(found - of_density) < abs(found - of_logarithm) / 4
    assert of_density > 1.5 * of_logarithm


def test_predictions_are_those_of_the_program(tree: Any, exact: ExactPosterior) -> None:
    """The mean of a new row under the exact posterior and, from the prior's own formula, under the prior."""
    weights = exact.counts / exact.counts.sum(-1, keepdim=True)
    probs = exact.ones / (exact.ones + exact.zeros)
    truth = torch.einsum("a,ak,akd->d", exact.probabilities, weights, probs).numpy()
    for group, mean in [("posterior_predictive", truth), ("prior_predictive", np.full(3, 0.5))]:
        of_draws = tree[group]["x"].mean("obs_id").stack(sample=("chain", "draw"))
        error = of_draws.std("sample") / math.sqrt(of_draws.sizes["sample"])
        assert float(np.abs((of_draws.mean("sample") - mean) / error).max()) < 5, group
        assert set(np.unique(tree[group]["x"])) == {0, 1}
    of_prior = tree["prior"]["weights"].values[0, :, 0]
    assert abs(of_prior.var() - 1 / 12) < 5 * math.sqrt((1 / 80 - 1 / 144) / len(of_prior))


def test_predictions_use_the_parameters_of_their_draw(posterior: LogPosterior) -> None:
    probs = torch.tensor([[[0.0]], [[1.0]], [[1.0]], [[0.0]]], dtype=torch.float64).expand(4, 2, 3)
    weights = torch.full((4, 2), 0.5, dtype=torch.float64)
    params = {"weights": weights.unflatten(0, (2, 2)), "probs": probs.unflatten(0, (2, 2))}
    ends = Draws(params, {"lp": torch.zeros(2, 2, dtype=torch.float64)}, {})
    found: Any = to_datatree(_inside(ends), posterior, seed=0, num_prior=0)["posterior_predictive"]["x"]
    assert found.mean(["obs_id", "feature"]).values.tolist() == [[0, 1], [1, 0]]


def _inside(draws: Draws) -> Draws:
    """Move probabilities of 0 and 1 inside by less than any draw of this test sees."""
    return draws._replace(params=draws.params | {"probs": draws.params["probs"].clamp(1e-12, 1 - 1e-12)})


def test_one_seed_gives_one_tree(draws: Draws, posterior: LogPosterior) -> None:
    few = Draws({site: value[:, :20] for site, value in draws.params.items()}, {}, {})
    before = torch.get_rng_state()
    one, same, other = (to_datatree(few, posterior, seed=seed, num_prior=20) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for group in ("posterior_predictive", "prior", "prior_predictive"):
        assert one[group].to_dataset().equals(same[group].to_dataset())
        assert not one[group].to_dataset().equals(other[group].to_dataset())


def test_it_is_read_back_from_netcdf_as_it_was(draws: Draws, posterior: LogPosterior, tmp_path: Path) -> None:
    stats = draws.sample_stats | {"diverging": draws.sample_stats["lp"] > -12}
    stats["n_steps"] = torch.arange(4000).view(4, -1)
    attributes = {"engine": "exact", "seed": 3, "warm": True, "rate": 0.25, "rates": torch.tensor([0.5]), "to": None}
    run = Draws(draws.params, stats, attributes)
    written = to_datatree(run, posterior, seed=1, num_predictive=20, num_prior=20)
    written.to_netcdf(tmp_path / "draws.nc")
    with xarray.open_datatree(tmp_path / "draws.nc") as read:
        assert read.identical(written)
        assert read["sample_stats"]["diverging"].dtype == bool
        attributes = {str(name): value for name, value in read["posterior"].attrs.items()}
    assert {"engine": "exact", "seed": 3, "warm": 1, "rate": 0.25, "rates": "[0.5]", "to": "null"}.items() <= (
        attributes.items()
    )
    assert attributes["inference_library"] == "mixproof"
    assert {"created_at", "inference_library_version", "torch_version", "pyro_version"} <= attributes.keys()


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # in arviz_stats.compare, by pandas 3.1
def test_the_tools_of_arviz_read_it(tree: Any, draws: Draws, posterior: LogPosterior) -> None:
    assert float(arviz_stats.rhat(tree["label_invariant"].to_dataset()).to_array().max()) < 1.01
    assert float(arviz_stats.ess(tree["label_invariant"].to_dataset())["lp"]) == pytest.approx(4000, rel=0.15)
    x, prior = binary_rows()
    one = program(x, prior._replace(concentration=prior.concentration[:1]))
    single = to_datatree(draws._replace(params=_one_component(x, draws)), one, seed=1)
    table = arviz_stats.compare({"two": loo(tree), "one": loo(single)})
    assert list(table.index) == ["two", "one"]
    assert float(table["weight"].sum()) == pytest.approx(1, abs=0.01)


def _one_component(x: Tensor, draws: Draws) -> dict[str, Tensor]:
    """Return exact draws of a single component: independent beta laws."""
    rng = np.random.default_rng(0)
    shape = (*draws.sample_stats["lp"].shape, 1, x.shape[1])
    probs = torch.as_tensor(rng.beta(1 + x.sum(0).numpy(), 1 + (1 - x).sum(0).numpy(), shape))
    return {"weights": torch.ones(*shape[:2], 1, dtype=torch.float64), "probs": probs}


PLOTS: dict[str, Any] = {
    "trace": lambda tree: arviz_plots.plot_trace(tree, group="label_invariant", var_names=["lp"]),
    "dist": lambda tree: arviz_plots.plot_dist(tree, var_names=["probs"]),
    "ess": lambda tree: arviz_plots.plot_ess(tree, group="label_invariant", var_names=["lp"]),
    "forest": lambda tree: arviz_plots.plot_forest(tree, var_names=["weights"]),
    "khat": lambda tree: arviz_plots.plot_khat(loo(tree, pointwise=True)),
    "prior": lambda tree: arviz_plots.plot_prior_posterior(tree, var_names=["weights"]),
}


@pytest.mark.parametrize("name", PLOTS)
def test_the_plots_of_arviz_draw_it(name: str, tree: Any) -> None:
    PLOTS[name](tree)
    assert plt.get_fignums()
    plt.close("all")


def test_predictions_are_drawn_beside_the_data(all_families: list[Case]) -> None:
    case = next(case for case in all_families if case.name == "gaussian_full")
    params = case.params(0)
    posterior = LogPosterior(case.program(3), case.data(0, 20, params))
    tree = to_datatree(draws_near(posterior, params, (2, 30), seed=1), posterior, seed=2)
    arviz_plots.plot_ppc_dist(tree)
    assert plt.get_fignums()
    plt.close("all")


def test_a_summary_of_components_that_do_not_agree_warns(draws: Draws, posterior: LogPosterior, tree: Any) -> None:
    invariant = summary(tree)
    assert {"lp", "allocation_entropy", "weights_sorted[0]", "row_mean[0]"} <= set(invariant.index)
    assert not any(name.startswith(("weights[", "probs[")) for name in invariant.index)
    with pytest.warns(UserWarning, match=r"not aligned.*align\(\)"):
        both = summary(tree, components=True)
    assert "probs[1, 2]" in both.index
    aligned: Any = to_datatree(align(draws, posterior), posterior, seed=1, num_predictive=0, num_prior=0)
    agreed = summary(aligned, components=True, round_to="none")
    assert agreed.loc["weights[0]", "mean"] == pytest.approx(float(aligned["posterior"]["weights"][..., 0].mean()))
    assert not agreed.index.duplicated().any()
    assert [name for name in both.index if not name.startswith("row_")] == list(agreed.index)
    some = summary(aligned, components=True, var_names=["lp", "weights"], round_to="none")
    assert list(some.index) == ["lp", "weights[0]", "weights[1]"]
    assert some.loc["lp"].equals(summary(aligned, var_names="lp", round_to="none").loc["lp"])
    with pytest.raises(ValueError, match=r"which has lp, .* components=True adds the parameters.*weights"):
        summary(aligned, var_names=["weights"])
    with pytest.raises(ValueError, match=r"which has lp, .*, weights, probs: .*weihgts"):
        summary(aligned, components=True, var_names=["weihgts"])


def test_a_parameter_and_a_moment_of_the_rows_are_two_rows_of_a_summary() -> None:
    """The covariance that components share, and that of a row, which holds the distance between them too."""
    double = partial(torch.tensor, dtype=torch.float64)
    params = gaussian_tied.Params(double([0.5, 0.5]), double([[-8.0], [8.0]]), double([[2.0]]))
    x, _ = gaussian_tied.sample(params, 12, torch.Generator().manual_seed(1))
    posterior = LogPosterior(partial(gaussian_tied.model, num_components=2), x)
    draws = draws_near(posterior, params, (2, 20), seed=1)
    tree = to_datatree(draws, posterior, seed=1, family=gaussian_tied, num_predictive=0, num_prior=0)
    with pytest.warns(UserWarning, match="not aligned"), unmixed():
        table = summary(tree, components=True, round_to="none")
    assert table.loc["covariance[0, 0]", "mean"] == pytest.approx(float(draws.params["covariance"].mean()))
    moments = [
        gaussian_tied.moments(
            gaussian_tied.Params(**{site: value[chain, draw] for site, value in draws.params.items()})
        )
        for chain in range(2)
        for draw in range(20)
    ]
    of_rows = float(torch.stack([covariance for _, covariance in moments]).mean())
    assert table.loc["row_covariance[0, 0]", "mean"] == pytest.approx(of_rows)
    assert of_rows > 50  # or the two would be hard to tell apart


def test_named_and_single_components_need_no_aligning(draws: Draws, exact: ExactPosterior) -> None:
    unequal = exact.prior._replace(concentration=torch.tensor([1.0, 2.0], dtype=torch.float64))
    named = to_datatree(draws, program(exact.x, unequal), seed=1, num_predictive=0, num_prior=0)
    assert named["posterior"]["probs"].dims == ("chain", "draw", "component", "feature")
    one = program(exact.x, exact.prior._replace(concentration=torch.ones(1, dtype=torch.float64)))
    single = to_datatree(
        draws._replace(params=_one_component(exact.x, draws)), one, seed=1, num_predictive=0, num_prior=0
    )
    for of in (named, single):
        assert of["posterior"].attrs["component_labels"] == "named"
        assert {"probs[0, 0]"} <= set(summary(of, components=True).index)


@pytest.mark.parametrize("num_features", [1, 2])
@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (1, 1)])
def test_a_single_component_of_a_sum_names_no_axis(sizes: tuple[int, int], num_features: int) -> None:
    """Of length 1 it could be any, that of a single column too, and would take the place of the other part's."""
    x = torch.randn(9, num_features, generator=seeded(0), dtype=torch.float64)
    prior = gaussian_sum.Prior(*(gaussian_full.weakly_informative_prior(x, size) for size in sizes))
    posterior = LogPosterior(partial(gaussian_sum.model, num_components=sizes, prior=prior), x)
    settings: Any = {"num_chains": 2, "num_draws": 5, "num_warmup": 2}
    draws = gibbs(gaussian_sum, x, prior, num_components=sizes, generator=seeded(1), **settings)
    tree = to_datatree(draws, posterior, seed=0, num_predictive=0, num_prior=0)
    renumbered = dict(draws.params)
    for part, latent, size in zip("xy", "kl", sizes, strict=True):
        expected = {f"{part}_{name}" for name in ("weights", "locs", "covariances")} if size > 1 else set()
        named = {name for name, value in tree["posterior"].data_vars.items() if f"component_{latent}" in value.dims}
        assert named == expected
        renumbered |= {name: draws.params[name].flip(2) for name in expected}
    before, after = label_invariant(draws, posterior), label_invariant(draws._replace(params=renumbered), posterior)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)


def test_summands_that_change_places_are_not_aligned_by_their_components() -> None:
    x = torch.randn(9, 1, generator=seeded(0), dtype=torch.float64)
    part = gaussian_full.weakly_informative_prior(x, 2)._replace(loc=torch.zeros(1).double())
    prior = gaussian_sum.Prior(part, part)
    posterior = LogPosterior(partial(gaussian_sum.model, num_components=(2, 2), prior=prior), x)
    settings: Any = {"num_chains": 2, "num_draws": 5, "num_warmup": 2}
    draws = gibbs(gaussian_sum, x, prior, num_components=(2, 2), generator=seeded(1), **settings)
    for latent in "kl":
        tree = to_datatree(draws, posterior, seed=0, num_predictive=0, num_prior=0)
        with pytest.warns(UserWarning, match=r"not aligned.*use align\(\)"), unmixed():
            summary(tree, components=True)
        draws = align(draws, posterior, latent=latent)
    tree = to_datatree(draws, posterior, seed=0, num_predictive=0, num_prior=0)
    with pytest.warns(UserWarning, match=r"whole latents may change places.*align\(\) does not treat"), unmixed():
        summary(tree, components=True)


def test_components_that_change_places_only_among_some_are_no_names() -> None:
    x = torch.randn(9, 1, generator=seeded(0), dtype=torch.float64)
    prior = gaussian_full.weakly_informative_prior(x, 3)._replace(concentration=torch.tensor([5.0, 1.0, 1.0]).double())
    posterior = LogPosterior(partial(gaussian_full.model, num_components=3, prior=prior), x)
    settings: Any = {"num_components": 3, "num_chains": 2, "num_draws": 5, "num_warmup": 2}
    draws = gibbs(gaussian_full, x, prior, generator=seeded(1), **settings)
    tree = to_datatree(draws, posterior, seed=0, family=gaussian_full, num_predictive=0, num_prior=0)
    with pytest.warns(UserWarning, match="align"), unmixed():
        summary(tree, components=True)


def slopes(t: Tensor, y: Tensor, drawn: bool = False) -> None:
    """Two lines through the origin, of which a row at 0 says nothing."""
    weights = torch.full((2,), 0.5).double()
    if drawn:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2).double()))
    with pyro.plate("components", 2):
        slope = pyro.sample("slope", dist.Normal(torch.zeros(()).double(), 2.0))
    with pyro.plate("data", len(t)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(slope[z] * t, 0.5), obs=y)


@pytest.mark.parametrize("drawn", [False, True])
def test_a_row_whose_likelihood_never_varies_adds_it_to_loo(drawn: bool) -> None:
    """Exactly that where the weights are known, and to the rounding of their sum where they are drawn."""
    t = torch.linspace(-2, 2, 9, dtype=torch.float64)
    y = torch.where(torch.arange(9) % 2 == 0, 1.5 * t, -t) + 0.3 * torch.randn(9, generator=seeded(0)).double()
    posterior = LogPosterior(partial(slopes, drawn=drawn), t, y)
    noise = torch.randn(4, 250, posterior.size, generator=seeded(1), dtype=torch.float64)
    draws = Draws(posterior.constrain(0.1 * noise + 1), {}, {"engine": "none"})
    tree = to_datatree(draws, posterior, seed=0, num_predictive=0, num_prior=0)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    constant = float(dist.Normal(torch.zeros(()).double(), 0.5).log_prob(y[4]))
    found, rest = loo(tree), loo(tree.sel(obs_id=others))
    assert found.elpd == pytest.approx(rest.elpd + constant, rel=1e-12)
    assert found.elpd_i.values[others] == pytest.approx(rest.elpd_i.values, rel=1e-12)
    assert (found.n_data_points, float(found.pareto_k[4]), found.p) == (9, -math.inf, rest.p)
    assert found.se == pytest.approx(math.sqrt(9 * found.elpd_i.values.var()), rel=1e-12)
    assert rest.se == pytest.approx(math.sqrt(8 * rest.elpd_i.values.var()), rel=1e-12)
    assert loo(tree, pointwise=False).elpd_i is None
    with pytest.raises(ValueError, match="no row's likelihood varies"):
        loo(tree.sel(obs_id=[4]))


def test_chains_that_have_not_mixed_and_components_without_rows_are_said() -> None:
    x = torch.tensor([[-0.1], [0.0], [0.2], [9.8], [10.0], [10.1]]).double()
    posterior = LogPosterior(partial(gaussian_full.model, num_components=2, prior=PRIOR_OF_TWO), x)
    at = gaussian_full.Params(
        torch.tensor([0.5, 0.5]).double(), torch.tensor([[0.0], [10.0]]).double(), torch.ones(2, 1, 1).double()
    )
    apart = at._replace(locs=torch.tensor([[5.0], [90.0]]).double(), covariances=torch.full((2, 1, 1), 25.0).double())
    good, bad = (draws_near(posterior, params, (2, 100), seed=1) for params in (at, apart))
    both = Draws(
        {site: torch.cat([good.params[site], bad.params[site]]) for site in good.params},
        {"lp": torch.cat([good.sample_stats["lp"], bad.sample_stats["lp"]])},
        {"engine": "none"},
    )
    expected = {
        "the chains have not mixed, R-hat of ": both,
        "on average 1.0 components have no row": bad,
        None: good,
    }
    for words, draws in expected.items():
        tree = to_datatree(draws, posterior, seed=0, num_predictive=0, num_prior=0)
        for reads in (summary, loo):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                reads(tree)
            said = [str(each.message) for each in caught if each.category is ConvergenceWarning]
            assert said == [] if words is None else len([each for each in said if each.startswith(words)]) == 1


@pytest.mark.parametrize(
    ("engine", "words"),
    [("parametric bootstrap", "fits of other data"), ("svi", "draws from a fitted guide"), ("gibbs", None)],
)
def test_loo_tells_draws_from_what_is_not(draws: Draws, posterior: LogPosterior, engine: str, words: Any) -> None:
    relabelled = draws._replace(attributes=draws.attributes | {"engine": engine})
    tree = to_datatree(relabelled, posterior, seed=1, num_predictive=0, num_prior=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loo(tree)
    said = [str(each.message) for each in caught if str(each.message).startswith("the draws are ")]
    assert said == [] if words is None else (len(said) == 1 and words in said[0])


def test_draws_that_never_change_and_few_draws_are_said(draws: Draws, posterior: LogPosterior) -> None:
    frozen = {site: value[:1, :1].expand(4, 100, *value.shape[2:]) for site, value in draws.params.items()}
    tree = to_datatree(Draws(frozen, {}, {}), posterior, seed=1, num_predictive=0, num_prior=0)
    with pytest.warns(ConvergenceWarning, match="nothing varies over the draws: no chain has moved"):
        summary(tree)
    with pytest.raises(ValueError, match="no row's likelihood varies over the draws"):
        loo(tree)
    few = {site: value[:2, :3] for site, value in draws.params.items()}
    with pytest.raises(ValueError, match="LOO needs at least 25 draws, of all chains, and there are 6"):
        loo(to_datatree(Draws(few, {}, {}), posterior, seed=1, num_predictive=0, num_prior=0))


def test_moments_of_a_family_with_known_weights_are_left_out() -> None:
    family, x = bernoulli.UniformWeights(), binary_rows()[0]
    prior = family.weakly_informative_prior(x, 2)
    posterior = LogPosterior(partial(family.model, num_components=2, prior=prior), x)
    settings: Any = {"num_components": 2, "num_chains": 2, "num_draws": 5, "num_warmup": 2}
    draws = gibbs(family, x, prior, generator=seeded(1), **settings)
    found = label_invariant(draws, posterior, family=family)
    assert "row_mean" not in found
    assert found.keys() == label_invariant(draws, posterior).keys()


def test_a_factor_is_no_observation() -> None:
    def program(x: Tensor) -> None:
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2).double(), 3.0).to_event(1))
        pyro.factor("extra", -locs.square().sum())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2).double() / 2), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x)

    posterior = LogPosterior(program, torch.randn(6, generator=seeded(0), dtype=torch.float64))
    draws = Draws({"locs": torch.randn(2, 5, 2, generator=seeded(1), dtype=torch.float64)}, {}, {})
    tree = to_datatree(draws, posterior, seed=0, num_predictive=3, num_prior=0)
    for group in ("observed_data", "posterior_predictive", "log_likelihood"):
        assert list(tree[group].data_vars) == ["x"]
    with pytest.warns(UserWarning, match=r"density of extra, .* no groups prior and prior_predictive"):
        assert "prior" not in to_datatree(draws, posterior, seed=0, num_predictive=0).children


def test_names_of_axes_can_be_given(draws: Draws, posterior: LogPosterior) -> None:
    names = {"probs": ["type", "symptom"]}
    tree = to_datatree(draws, posterior, seed=1, num_predictive=0, num_prior=0, dims=names)
    assert tree["posterior"]["probs"].dims == ("chain", "draw", "type", "symptom")
    assert tree["label_invariant"]["probs_sorted"].dims == ("chain", "draw", "rank", "symptom")
    with pytest.raises(ValueError, match="dims names the axes of prbos, and the parameters are weights, probs"):
        to_datatree(draws, posterior, seed=1, dims={"prbos": ["type", "symptom"]})


def test_draws_of_another_program_are_refused(draws: Draws, exact: ExactPosterior) -> None:
    three = exact.prior._replace(concentration=torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"the draws are of the parameters .* and the program has"):
        to_datatree(draws, program(exact.x, three), seed=1)


def test_without_arviz_it_says_what_to_install(
    draws: Draws, posterior: LogPosterior, tree: Any, monkeypatch: Any
) -> None:
    def refuse(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", refuse)
    for call in (lambda: to_datatree(draws, posterior, seed=1), lambda: summary(tree), lambda: loo(tree)):
        with pytest.raises(ImportError, match=r"pip install 'mixproof\[compare\]'"):
            call()
