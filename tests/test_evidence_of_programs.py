"""Evidence of programs whose symmetry is a part of K!, whose supports move, whose bounds differ; rows of any type."""

from __future__ import annotations

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from arviz_stats.base import array_stats
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference.at_draws import label_invariant
from mixproof.inference.datatree import summary, to_datatree
from mixproof.inference.draws import Draws, split_rhat
from mixproof.inference.evidence import log_evidence
from mixproof.inference.exact_evidence import exact_log_evidence
from mixproof.inference.exchangeability import Numbering, component_axes, numbering, numberings, otherwise_exchangeable
from mixproof.inference.gibbs import gibbs
from mixproof.inference.hmc import hmc
from mixproof.inference.labels import align
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.nuts import nuts
from mixproof.inference.relabelling import Relabelling
from mixproof.models import bernoulli
from tests.conftest import Case

TOLD_APART = (torch.tensor([-20.0, 10.0, 10.0]).double(), torch.tensor([2.0, 15.0, 15.0]).double())
THREE_GROUPS = torch.tensor([-20.0, -20.5, -19.0, 0.0, 0.5, -0.3, 20.0, 20.6, 19.5]).double()


def first_told_apart(x: Tensor) -> None:
    """The prior of the first of three components is its own."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3).to(x)))
    with pyro.plate("components", 3):
        locs = pyro.sample("locs", dist.Normal(*TOLD_APART))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x)


def evidence_of_first_told_apart(x: Tensor) -> float:
    """By the sum over all allocations, each component's rows by their normal law of one common location."""
    loc, scale = TOLD_APART
    log_joint = []
    for allocation in itertools.product(range(3), repeat=len(x)):
        z = torch.tensor(allocation)
        counts = z.bincount(minlength=3)
        total = (torch.lgamma(1.0 + counts).sum() - math.lgamma(3 + len(x)) + math.lgamma(3)).double()
        for k in range(3):
            own, n = x[z == k] - loc[k], int(counts[k])
            spread = 1 + n * scale[k] ** 2
            square = own.square().sum() - scale[k] ** 2 * own.sum() ** 2 / spread
            total = total - n / 2 * math.log(2 * math.pi) - spread.log() / 2 - square / 2
        log_joint.append(total)
    return float(torch.stack(log_joint).logsumexp(0))


def test_components_of_which_some_may_change_places() -> None:
    """Draws that show one order of the last two: the evidence is whole, where it would be too low by log 2."""
    x = THREE_GROUPS
    posterior = LogPosterior(first_told_apart, x)
    found = numbering(posterior, "z")
    assert found.classes == (0, 1, 1)
    assert not found.exchangeable
    draws = hmc(first_told_apart, x, num_chains=12, num_draws=300, num_warmup=200, seed=1)
    locs = draws.params["locs"].mean(1)
    (chains,) = (locs[:, 1] < locs[:, 2]).nonzero(as_tuple=True)
    assert len(chains) >= 2
    one_order = Draws({name: value[chains] for name, value in draws.params.items()}, {}, {})
    evidence = log_evidence(first_told_apart, x, seed=1, draws=one_order)
    exact = evidence_of_first_told_apart(x)
    assert abs(evidence.log_evidence - exact) < 4 * evidence.standard_error < 0.2
    invariant = label_invariant(draws, posterior)["locs_sorted"]
    swapped = Draws({name: value[..., [0, 2, 1]] for name, value in draws.params.items()}, {}, {})
    assert torch.equal(label_invariant(swapped, posterior)["locs_sorted"], invariant)
    assert torch.equal(invariant[..., 0], draws.params["locs"][..., 0])
    relabelling = Relabelling(posterior)
    assert relabelling.log_count == pytest.approx(math.log(2))
    u = posterior.unconstrain({name: value[0] for name, value in draws.params.items()})
    moved = posterior.constrain(relabelling.random(u, torch.Generator().manual_seed(0)))["locs"]
    assert torch.allclose(moved[:, 0], draws.params["locs"][0, :, 0])
    assert 0.4 < float((moved[:, 1] - draws.params["locs"][0, :, 1]).abs().gt(1e-6).double().mean()) < 0.6
    aligned = align(draws, posterior).params["locs"]
    assert torch.equal(aligned[..., 0], draws.params["locs"][..., 0])
    assert ((aligned[..., 1] < aligned[..., 2]).double().mean() - 0.5).abs() > 0.49
    with pytest.raises(ValueError, match="the prior or a support tells some of them apart, though not all"):
        component_axes(posterior)


def test_a_support_that_moves_with_another_parameter_is_refused() -> None:
    def program(x: Tensor) -> None:
        top = pyro.sample("top", dist.Exponential(torch.tensor(1.0).to(x)))
        loc = pyro.sample("loc", dist.Uniform(torch.zeros(()).to(x), top))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2).to(x) / 2), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(torch.stack([-loc, loc])[z], 0.7), obs=x)

    x = torch.tensor([-1.2, 1.5]).double()
    for run in (partial(log_evidence, seed=0), partial(hmc, num_chains=2, num_draws=5, num_warmup=20, seed=0)):
        with pytest.raises(ValueError, match='the support of "loc" depends on other parameters'):
            run(program, x)


@pytest.mark.parametrize("method", ["smc", "bridge"])
def test_bounds_of_their_own_for_each_column(method: Any) -> None:
    """One component: the evidence is a product over columns of normal integrals over the box."""
    x = torch.tensor([[0.1, 3.0], [0.4, 4.0], [-0.2, 3.3]]).double()
    low, high = torch.tensor([-1.0, 2.0]).double(), torch.tensor([1.5, 5.0]).double()

    def program(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Uniform(low, high).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(torch.ones(1).to(x)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    mean, n = x.mean(0), len(x)
    normal = torch.distributions.Normal(mean, torch.tensor(n).double().rsqrt())
    heights = -n / 2 * math.log(2 * math.pi) - (x - mean).square().sum(0) / 2 + 0.5 * math.log(2 * math.pi / n)
    exact = float((heights + ((normal.cdf(high) - normal.cdf(low)) / (high - low)).log()).sum())
    found = log_evidence(program, x, seed=0, method=method)
    assert abs(found.log_evidence - exact) < 4 * found.standard_error < 0.2


def test_a_checkpoint_of_other_rows_is_refused_where_a_density_of_0_hides_them(tmp_path: Path) -> None:
    def program(x: Tensor) -> None:
        top = pyro.sample("top", dist.LogNormal(torch.tensor(0.0).to(x), torch.tensor(1.0).to(x)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2).to(x) / 2), infer={"enumerate": "parallel"})
            bound = torch.stack([top, 2 * top])[z]
            pyro.sample("x", dist.Uniform(0.0, bound, validate_args=False), obs=x)

    run = partial(log_evidence, program, method="smc", seed=0, checkpoint=tmp_path / "run", num_replicates=8)
    first = run(torch.tensor([0.5, 3.1]).double())
    assert run(torch.tensor([0.5, 3.1]).double()).log_evidence == first.log_evidence
    with pytest.raises(ValueError, match=r"belongs to another run, which differs in .*arguments"):
        run(torch.tensor([0.5, 6.5]).double())


def test_rows_and_priors_of_a_family_are_taken_as_elsewhere(tmp_path: Path) -> None:
    """NumPy rows, whole numbers, single precision beside a prior in double; a setting that is a number of numpy's."""
    rows = np.array([[0, 1], [1, 1], [1, 0], [0, 0], [1, 1]])
    prior = bernoulli.weakly_informative_prior(torch.tensor(rows).double(), 2)
    program = partial(bernoulli.model, num_components=2, prior=prior)
    for x in (rows, rows.astype(bool), torch.tensor(rows), torch.tensor(rows).float(), torch.tensor(rows).double()):
        settings: dict[str, Any] = {"num_replicates": np.int64(8), "checkpoint": tmp_path / f"run{id(x)}"}
        found = log_evidence(program, x, seed=0, family=bernoulli, **settings)
        exact = exact_log_evidence(bernoulli, torch.tensor(rows).double(), prior, num_components=2)
        assert abs(found.log_evidence - exact) < 4 * found.standard_error + 1e-3


def test_draws_in_single_precision_serve_a_program_in_double() -> None:
    rows = torch.tensor([[0.0, 1], [1, 1], [1, 0], [0, 0], [1, 1]], dtype=torch.float64)
    prior = bernoulli.weakly_informative_prior(rows, 2)
    settings: Any = {"num_components": 2, "num_chains": 8, "num_draws": 200, "num_warmup": 20, "relabel": True}
    draws = gibbs(bernoulli, rows.float(), prior, generator=torch.Generator().manual_seed(0), **settings)
    assert draws.params["probs"].dtype == torch.float32
    found = log_evidence(partial(bernoulli.model, num_components=2, prior=prior), rows, seed=0, draws=draws)
    assert abs(found.log_evidence - exact_log_evidence(bernoulli, rows, prior, num_components=2)) < 4 * (
        found.standard_error + 1e-3
    )


def chain_of_two(x: Tensor) -> None:
    """Each row holds two steps of a hidden Markov chain: both latents count the same two states."""
    start = pyro.sample("start", dist.Dirichlet(torch.ones(2)))
    moves = pyro.sample("moves", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    locs = pyro.sample("locs", dist.Normal(0.0, 5.0).expand([2]).to_event(1))
    with pyro.plate("rows", len(x)):
        first = pyro.sample("first", dist.Categorical(start), infer={"enumerate": "parallel"})
        second = pyro.sample("second", dist.Categorical(moves[first]), infer={"enumerate": "parallel"})
        pyro.sample("x1", dist.Normal(locs[first], 1.0), obs=x[:, 0])
        pyro.sample("x2", dist.Normal(locs[second], 1.0), obs=x[:, 1])


def evidence_of_chain(x: Tensor) -> float:
    """By the sum over all paths, Dirichlet-multinomial in the starts and moves, normal in the entries of each state."""
    paths = torch.tensor(list(itertools.product(range(2), repeat=2 * len(x)))).reshape(-1, len(x), 2)
    visits = torch.nn.functional.one_hot(paths, 2).double()  # (A, N, 2, K)
    starts = visits[:, :, 0].sum(1)
    moves = torch.einsum("ani,anj->aij", visits[:, :, 0], visits[:, :, 1])
    log_joint = dirichlet_multinomial(starts) + dirichlet_multinomial(moves).sum(1)
    counts, sums = visits.sum((1, 2)), torch.einsum("antk,nt->ak", visits, x)
    variance = 25.0
    precision = counts + 1 / variance
    log_joint += ((sums.square() / precision - precision.log()) / 2 - math.log(variance) / 2).sum(1)
    return float(log_joint.logsumexp(0) - x.square().sum() / 2 - x.numel() / 2 * math.log(2 * math.pi))


def dirichlet_multinomial(counts: Tensor) -> Tensor:
    """Return the log probability of a sequence with counts (..., 2) under shares that are uniform."""
    return torch.lgamma(counts + 1).sum(-1) - torch.lgamma(counts.sum(-1) + 2)


def test_states_that_two_latents_share_change_places_together() -> None:
    """Draws of one numbering of the states tell the evidence of both."""
    states = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 1], [0, 0], [1, 0]])
    x = 4 * states.double() + torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    posterior = LogPosterior(chain_of_two, x)
    together = {"start": (0,), "moves": (0, 1), "locs": (0,)}
    assert numberings(posterior) == [Numbering(("first", "second"), together, (0, 0))]
    assert Relabelling(posterior).log_count == pytest.approx(math.log(2))
    draws = hmc(chain_of_two, x, num_chains=8, num_draws=200, num_warmup=200, seed=0)
    aligned = align(draws, posterior, latent="second")
    assert {"relabelled_first", "relabelled_second"} <= set(aligned.attributes)
    trees: Any = [to_datatree(each, posterior, seed=0, num_predictive=0, num_prior=0) for each in (draws, aligned)]
    assert [tree["posterior"].attrs["component_labels"] for tree in trees] == ["exchangeable", "aligned"]
    assert trees[0]["posterior"]["moves"].dims[2:] == ("component_first", "component_second")
    for name in ("start_sorted", "moves_sorted", "locs_sorted"):
        assert torch.equal(*(torch.as_tensor(tree["label_invariant"][name].values) for tree in trees))
    exact = evidence_of_chain(x)
    for found in (log_evidence(chain_of_two, x, seed=0, draws=aligned), log_evidence(chain_of_two, x, seed=0)):
        assert found.standard_error < 0.1 < math.log(2) / 4
        assert abs(found.log_evidence - exact) < 4 * found.standard_error


TWO_GROUPS = torch.tensor([-3.1, -2.4, -2.9, 2.2, 3.0, 2.7, 3.3, 2.5]).double()


def share(x: Tensor, concentrations: tuple[float, float] = (2.0, 2.0), wide: bool = False) -> None:
    """Two components by a share and one less it; or one of them far and wide, which no parameters make the other."""
    theta = pyro.sample("theta", dist.Beta(*torch.tensor(concentrations).double()))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(torch.zeros(()).double(), 3.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.stack([theta, 1 - theta])), infer={"enumerate": "parallel"})
        scale = torch.tensor([1.0, 10.0 if wide else 1.0]).double()
        pyro.sample("x", dist.Normal(locs[z], scale[z]), obs=x)


def simplex(x: Tensor) -> None:
    """The same two components, in axes."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 2.0]).double()))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(torch.zeros(()).double(), 3.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x)


def sites(x: Tensor) -> None:
    """The same two components, each location in a site of its own."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 2.0]).double()))
    first, second = (pyro.sample(name, dist.Normal(torch.zeros(()).double(), 3.0)) for name in ("first", "second"))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(torch.stack([first, second])[z], 1.0), obs=x)


def test_components_that_change_places_by_no_renumbering_are_found_and_said() -> None:
    """The evidence of draws in one order is too low by log 2, as said; the truth is by the same program in axes."""
    for model in (share, sites):
        assert otherwise_exchangeable(LogPosterior(model, TWO_GROUPS))
    for model in (partial(share, concentrations=(2.0, 5.0)), partial(share, wide=True), simplex):
        assert not otherwise_exchangeable(LogPosterior(model, TWO_GROUPS))
    init = {"theta": torch.full((8,), 0.4).double(), "locs": torch.tensor([[-2.8, 2.7]]).double().expand(8, 2)}
    draws = hmc(share, TWO_GROUPS, num_chains=8, num_draws=150, num_warmup=100, seed=0, init=init)
    with pytest.warns(UserWarning, match="by no renumbering of axes.*too low, of two components by log 2"):
        found = log_evidence(share, TWO_GROUPS, seed=0, draws=draws)
    theta = draws.params["theta"]
    in_axes = draws._replace(
        params={"weights": torch.stack([theta, 1 - theta], -1), "locs": draws.params["locs"]}, sample_stats={}
    )
    truth = log_evidence(simplex, TWO_GROUPS, seed=0, draws=in_axes)
    error = math.hypot(found.standard_error, truth.standard_error)
    assert abs(found.log_evidence + math.log(2) - truth.log_evidence) < 5 * error < 0.2
    tree = to_datatree(draws, LogPosterior(share, TWO_GROUPS), seed=0, num_predictive=0, num_prior=0)
    assert tree["posterior"].attrs["component_labels"] == "exchangeable otherwise"
    with pytest.warns(UserWarning, match="by no renumbering of axes"):
        summary(tree)


def test_no_family_has_components_that_change_places_otherwise(case: Case) -> None:
    """The known part of a sum has components of its own, and the search for others may leave what can be computed."""
    x, make = case.data(5, 30), getattr(case.family, "weakly_informative_prior", None)
    prior = case.prior(2, 2) if make is None else make(x, case.num_components(2))
    posterior = LogPosterior(case.program(2, prior), x)
    assert not any(otherwise_exchangeable(posterior, latent) for latent in posterior.program.latents)


def test_draws_that_have_not_mixed_are_said() -> None:
    """By R-hat of the log posterior, which is ArviZ's, and by the sampler's own word."""
    settings: Any = {"num_chains": 4, "num_draws": 100, "num_warmup": 100}
    draws = hmc(simplex, TWO_GROUPS, seed=0, **settings)
    lp = draws.sample_stats["lp"]
    assert split_rhat(lp) == pytest.approx(
        float(array_stats.rhat(lp.numpy(), chain_axis=0, draw_axis=1, method="split"))
    )
    assert log_evidence(simplex, TWO_GROUPS, seed=0, draws=draws).standard_error < 0.1
    shifted = draws._replace(sample_stats={"lp": lp + 5 * torch.arange(4.0)[:, None]})
    named = draws._replace(attributes=draws.attributes | {"low_chains": [1, 2]})
    for bad, words in ((shifted, "R-hat of the log posterior is"), (named, "2 of 4 chains stay in a lower mode")):
        with pytest.warns(ConvergenceWarning, match=f"the chains have not mixed .{words}"):
            log_evidence(simplex, TWO_GROUPS, seed=0, draws=bad)


def test_flat_priors_are_said_where_starts_hide_them() -> None:
    def flat(x: Tensor) -> None:
        with pyro.plate("components", 2):
            locs = pyro.sample("locs", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2).double() / 2), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x)

    init = {"locs": torch.tensor([[-2.8, 2.7]] * 2).double()}
    settings: Any = {"num_chains": 2, "num_draws": 20, "num_warmup": 20, "seed": 0}
    said = 'prior of "locs" is improper: the posterior of a mixture is then improper'
    advice = 'prior of "locs" is improper: it cannot be drawn from; give init, or a proper prior'
    for sampler in (hmc, nuts):
        with pytest.warns(UserWarning, match=said):
            sampler(flat, TWO_GROUPS, init=init, **settings)
        with pytest.raises(ValueError, match=f"^the {advice}$"):  # and no more, such as the shapes of the trace
            sampler(flat, TWO_GROUPS, **settings)
