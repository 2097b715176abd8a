"""The table of candidates: each column by another route, and each warning by what it must see."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas  # type: ignore[import-untyped]
import pytest
import torch
import xarray
from arviz_stats.utils import ELPDData
from rich.console import Console
from sklearn.mixture import GaussianMixture
from torch import Tensor

from mixproof.inference import comparison, comparison_study
from mixproof.inference.comparison import Candidate, Comparison, compare
from mixproof.inference.comparison_verdicts import disagreements, gaps
from mixproof.inference.datatree import loo
from mixproof.inference.draws import Draws
from mixproof.inference.evidence import Evidence
from mixproof.inference.exact_evidence import exact_draws, exact_log_evidence
from mixproof.inference.gibbs import gibbs
from mixproof.models import bernoulli, gaussian_diagonal, gaussian_full, gaussian_spherical, gaussian_sum, gaussian_tied
from mixproof.models.gaussian_isotropic import GaussianIsotropic

if TYPE_CHECKING:
    from tests.conftest import Case

DATA = Path(__file__).parent / "data"
QUICK: dict[str, Any] = {"num_chains": 64, "num_draws": 16, "num_warmup": 50}
QUICK["evidence"] = {"num_replicates": 8, "num_chains": 8, "num_moves": 8}
ONLY_EM: dict[str, Any] = {"num_chains": 4, "num_draws": 25, "num_warmup": 1}
ONLY_EM["evidence"] = {"num_replicates": 4, "num_chains": 2, "num_moves": 1}
"""Runs as short as can be beside EM, for what only EM decides."""


def candidate(family: Any, size: int, x: Tensor, name: str | None = None) -> Candidate:
    return Candidate(family, size, family.weakly_informative_prior(x, size), name or f"{family.__name__} {size}")


def exact(candidate: Candidate, x: Tensor) -> Tensor:
    assert isinstance(candidate.num_components, int)
    return exact_log_evidence(candidate.family, x, candidate.prior, num_components=candidate.num_components)


def tiny(num_rows: int = 7) -> Tensor:
    """Two groups so close that rows of one may be of the other."""
    return torch.cat(
        [torch.linspace(-2, 0, num_rows // 2), torch.linspace(0.7, 2.4, num_rows - num_rows // 2)]
    ).double()[:, None]


@pytest.fixture(scope="module")
def of_tiny() -> tuple[Tensor, Comparison]:
    x = tiny()
    return x, compare([candidate(gaussian_diagonal, size, x, f"K = {size}") for size in (1, 2)], x, seed=0, **QUICK)


@pytest.mark.parametrize(
    ("family", "shape"),
    [(gaussian_full, "full"), (gaussian_tied, "tied"), (gaussian_diagonal, "diag"), (gaussian_spherical, "spherical")],
)
def test_information_criteria_as_scikit_learn_has_them(family: Any, shape: Any, real_data: dict[str, Tensor]) -> None:
    x = real_data["iris"][::3]
    found = compare([candidate(family, 2, x, "two")], x, seed=1, **ONLY_EM)
    params = found.fits["two"].params
    other = GaussianMixture(2, covariance_type=shape)
    other.weights_, other.means_, other.covariances_ = (value.numpy() for value in params)
    covariances = torch.as_tensor(other.covariances_)
    precisions = covariances.inverse() if shape in ("full", "tied") else 1 / covariances
    other.precisions_cholesky_ = (
        torch.linalg.cholesky(precisions).numpy() if shape in ("full", "tied") else precisions.sqrt().numpy()
    )
    (row,) = found.rows
    assert row.log_likelihood == pytest.approx(other.score(x) * len(x), rel=1e-10)
    assert row.num_parameters == other._n_parameters()
    assert row.bic == pytest.approx(other.bic(x), rel=1e-10)
    assert row.aic == pytest.approx(other.aic(x), rel=1e-10)
    resp = other.predict_proba(x)
    entropy = -sum(r * math.log(r) for r in resp.ravel() if r > 0)
    assert row.icl == pytest.approx(other.bic(x) + 2 * entropy, rel=1e-10)


def test_a_sum_of_two_gaussians_has_the_criteria_of_the_gaussian_that_it_is() -> None:
    x = tiny(12)
    one = candidate(gaussian_full, 1, x, "one")
    both = Candidate(gaussian_sum, (1, 1), gaussian_sum.Prior(one.prior, one.prior), "both")
    first, second = compare([one, both], x, seed=0, num_starts=1, **ONLY_EM).rows
    assert first.num_parameters == second.num_parameters == 2
    assert second.log_likelihood == pytest.approx(first.log_likelihood, rel=1e-8)  # where EM stops
    assert second.bic == pytest.approx(first.bic, rel=1e-8)


def test_information_criteria_of_iris_as_mclust_prints_them(real_data: dict[str, Tensor]) -> None:
    """mclust's BIC is 2 log L - p log N: -574.0178 for VVV, 2 on its reference page of mclustBIC."""
    x = real_data["iris"]
    found = compare([candidate(gaussian_full, 2, x, "VVV, 2")], x, seed=1, **ONLY_EM)
    assert found.rows[0].bic == pytest.approx(574.0178, abs=1e-3)


def test_the_evidence_is_that_of_all_allocations(of_tiny: tuple[Tensor, Comparison]) -> None:
    x, found = of_tiny
    for row, chosen in zip(found.rows, found.candidates, strict=True):
        truth = exact(chosen, x)
        assert row.log_evidence_standard_error is not None
        assert 0 < row.log_evidence_standard_error < 0.2
        assert row.log_evidence is not None
        assert abs(row.log_evidence - truth.item()) < 4 * row.log_evidence_standard_error


def test_posterior_probabilities_are_those_of_exact_evidences(of_tiny: tuple[Tensor, Comparison]) -> None:
    x, found = of_tiny
    truth = torch.stack([exact(each, x) for each in found.candidates]).softmax(0)
    assert sum(row.probability or 0 for row in found.rows) == pytest.approx(1, abs=1e-12)
    for row, probability in zip(found.rows, truth.tolist(), strict=True):
        assert row.probability is not None
        assert row.probability_standard_error is not None
        assert abs(row.probability - probability) < 4 * row.probability_standard_error


def test_probabilities_before_the_data_enter(of_tiny: tuple[Tensor, Comparison]) -> None:
    x, found = of_tiny
    odds = 3.0
    other = compare(found.candidates, x, seed=0, probabilities={"K = 1": 1.0, "K = 2": odds}, **QUICK)
    (before, after) = ([row.probability or 0.0 for row in each.rows] for each in (found, other))
    assert after[1] / after[0] == pytest.approx(odds * before[1] / before[0], rel=1e-10)


def test_loo_is_that_of_leaving_rows_out() -> None:
    """log p(x_n | others) = log p(x) - log p(others), by summing all allocations; the error is that of 6 seeds."""
    x, size = tiny(), 2
    family: Any = gaussian_diagonal
    prior = family.Prior([2.0] * size, [0.0], 1.0, [8.0], [8.0])
    whole = exact_log_evidence(gaussian_diagonal, x, prior, num_components=size)
    truth = 0.0
    for left_out in range(len(x)):
        others = torch.cat([x[:left_out], x[left_out + 1 :]])
        truth += (whole - exact_log_evidence(gaussian_diagonal, others, prior, num_components=size)).item()
    few = {**QUICK, "num_draws": 60, "evidence": ONLY_EM["evidence"]}
    only = Candidate(gaussian_diagonal, size, prior, "only")
    runs = [compare([only], x, seed=seed, **few) for seed in range(6)]
    assert max(run.rows[0].max_pareto_k or 0 for run in runs) < 0.7
    values = np.array([run.rows[0].elpd_loo for run in runs], dtype=np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values))
    assert abs(values.mean() - truth) < 5 * error
    log_likelihood: Any = runs[0].trees["only"]["log_likelihood"]["x"]
    with_all_rows = float(np.log(np.exp(log_likelihood).mean(["chain", "draw"])).sum())
    assert abs(with_all_rows - truth) > 10 * error  # leaving no row out would be noticed


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")  # which the comparison says in its words
def test_loo_and_its_differences_are_sums_over_rows(of_tiny: tuple[Tensor, Comparison]) -> None:
    x, found = of_tiny
    of_rows = [np.asarray(loo(found.trees[row.name], pointwise=True).elpd_i, dtype=np.float64) for row in found.rows]
    best = max(of_rows, key=lambda values: values.sum())
    for row, values in zip(found.rows, of_rows, strict=True):
        assert row.elpd_loo == pytest.approx(values.sum(), rel=1e-12)
        assert row.elpd_loo_standard_error == pytest.approx(values.std() * math.sqrt(len(x)), rel=1e-12)
        assert row.elpd_loo_difference == pytest.approx((best - values).sum(), rel=1e-9, abs=1e-12)
        assert row.elpd_loo_difference_standard_error == pytest.approx(
            (best - values).std() * math.sqrt(len(x)), rel=1e-9, abs=1e-12
        )
    assert max(row.elpd_loo_difference or 0 for row in found.rows) > 0.01


def test_stacking_weights_maximise_the_log_score_of_the_mixture(real_data: dict[str, Tensor]) -> None:
    """Two candidates: one weight, by a grid, on their leave-one-out densities."""
    x = real_data["faithful"][::6, :1]
    found = compare([candidate(gaussian_diagonal, size, x, str(size)) for size in (1, 2)], x, seed=0, **QUICK)
    assert all(row.num_high_pareto_k == 0 for row in found.rows)
    densities = [
        np.exp(np.asarray(loo(found.trees[name], pointwise=True).elpd_i, dtype=np.float64)) for name in ("1", "2")
    ]
    grid = np.linspace(0, 1, 100_001)
    scores = sum(np.log((1 - grid) * first + grid * second) for first, second in zip(*densities, strict=True))
    weights = [row.stacking_weight or 0 for row in found.rows]
    assert sum(weights) == pytest.approx(1, abs=1e-6)
    assert np.interp(weights[1], grid, scores) == pytest.approx(scores.max(), abs=1e-4)
    assert scores.max() - scores.min() > 1


def planted_elpd(values: Tensor) -> Any:
    """Return what ArviZ keeps of LOO, of given log densities (N,) of left-out rows."""
    array = xarray.DataArray(values.numpy(), dims="obs_id")
    error = float(values.std(correction=0)) * math.sqrt(len(values))
    return ELPDData("loo", float(values.sum()), error, 1.0, 100, len(values), "log", False, 0.7, array, 0 * array)


def test_the_unit_of_the_rows_does_not_enter_stacking() -> None:
    """A factor of every density of a row, from e^-1000, which no float holds, to e^800, which none holds either."""
    generator = torch.Generator().manual_seed(1)
    first, second, third = torch.randn(3, 60, generator=generator, dtype=torch.float64) - 1
    found = []
    for unit in (0.0, -1000.0, 800.0):
        elpds = {name: planted_elpd(values + unit) for name, values in (("a", first), ("b", second), ("c", third - 3))}
        sentences: list[str] = []
        ranking = comparison._ranking(elpds, sentences)
        assert sentences == []
        found.append([ranking.loc[name, "weight"] for name in "abc"])
        assert ranking.loc["c", "elpd_diff"] == pytest.approx(float(max(first.sum(), second.sum()) - (third - 3).sum()))
        differences = (first if first.sum() > second.sum() else second) - (third - 3)
        assert ranking.loc["c", "dse"] == pytest.approx(float(differences.std(correction=0)) * math.sqrt(60), rel=1e-9)
    assert found[1] == pytest.approx(found[0], abs=1e-6)
    assert found[2] == pytest.approx(found[0], abs=1e-6)
    assert min(found[0][:2]) > 0.1  # of a start at thirds nothing would be left
    assert found[0][2] < 0.1


def test_what_arviz_says_of_many_candidates_is_a_sentence() -> None:
    """Six of twelve are as good as one another, and a little better than the others."""
    values = torch.linspace(-3, -1, 30, dtype=torch.float64)
    elpds = {str(k): planted_elpd(values + 0.01 * (k < 6)) for k in range(12)}
    sentences: list[str] = []
    comparison._ranking(elpds, sentences)
    (sentence,) = sentences
    assert sentence.startswith("LOO: Difference in performance potentially due to chance")


def test_the_same_seed_gives_the_same_table_and_another_does_not(of_tiny: tuple[Tensor, Comparison]) -> None:
    x, found = of_tiny
    assert compare(found.candidates, x, seed=0, **QUICK).rows == found.rows
    assert compare(found.candidates, x, seed=1, **QUICK).rows != found.rows


def test_the_table_the_json_and_the_plot_say_the_same(of_tiny: tuple[Tensor, Comparison]) -> None:
    _, found = of_tiny
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    lines = str(found).splitlines()
    for row, entry in zip(found.rows, document["candidates"], strict=True):
        assert {name: entry[name] for name in row._fields} == row._asdict()
        line = next(line for line in lines if line.startswith(row.name))
        assert f"{row.log_evidence:.2f} ± {row.log_evidence_standard_error:.2f}" in line
        assert f"{row.bic:.1f}" in line
        assert f" {row.elpd_loo:.1f}" in line
        if row.elpd_loo_difference:
            assert f"{-row.elpd_loo_difference:.1f} ± {row.elpd_loo_difference_standard_error:.1f}" in line
        assert entry["prior"].keys() == set(gaussian_diagonal.Prior._fields)
        assert any(line.startswith(f"prior of {row.name}: concentration 1, loc ") for line in lines)
    panels: Any = found.plot().axes
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [row.name for row in found.rows]


def test_the_number_of_components_that_made_the_data_is_found() -> None:
    """Three groups ten standard deviations apart, under one prior of a component for all K."""
    locs = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]).double()
    truth = gaussian_spherical.Params(torch.full((3,), 1 / 3).double(), locs, torch.ones(3).double())
    x, _ = gaussian_spherical.sample(truth, 90, torch.Generator().manual_seed(3))
    family: Any = gaussian_spherical
    candidates = [
        Candidate(family, size, family.Prior([2.0] * size, [3, 3], 0.01, 2.0, 2.0), str(size)) for size in (2, 3, 4)
    ]
    found = compare(candidates, x, seed=0, **QUICK)
    few, right, many = (row.probability or 0.0 for row in found.rows)
    assert few < 1e-6
    assert right > 3 * many  # 6 by long runs of both methods
    assert min(found.rows, key=lambda row: row.bic or math.inf).name == "3"


def test_bad_candidates_are_refused_before_any_run() -> None:
    x = tiny()
    good = candidate(gaussian_diagonal, 2, x, "two")
    with pytest.raises(ValueError, match="no candidates"):
        compare([], x, seed=0)
    with pytest.raises(ValueError, match="several candidates are called two"):
        compare([good, good], x, seed=0)
    with pytest.raises(ValueError, match="one: prior is None, which is flat"):
        compare([good, good._replace(prior=None, name="one")], x, seed=0)
    improper = good.prior._replace(shape=torch.zeros(1).double())
    with pytest.raises(ValueError, match="two: the prior does not define a distribution"):
        compare([good._replace(prior=improper)], x, seed=0)
    flat = good.prior._replace(strength=torch.tensor(0.0).double())
    with pytest.raises(ValueError, match="two: the prior is improper"):
        compare([good._replace(prior=flat)], x, seed=0)
    with pytest.raises(TypeError, match="two: the prior of this family"):
        compare([good._replace(prior=(1, 2))], x, seed=0)
    with pytest.raises(ValueError, match="probabilities must be given for each candidate"):
        compare([good], x, seed=0, probabilities={"other": 1.0})
    bits = (x > 0).double()
    with pytest.raises(ValueError, match="densities, which have a unit"):
        compare([candidate(bernoulli, 1, bits, "bits"), good], bits, seed=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_starts": 0}, "num_starts must be at least 1, not 0"),
        ({"max_steps": 0}, "max_steps must be at least 1, not 0"),
        ({"num_draws": 0}, "num_draws must be at least 1, not 0"),
        ({"num_chains": 0}, "num_chains must be at least 1, not 0"),
        ({"num_chains": 18}, "num_chains must be a multiple of 4, .*, and 18 is none"),
        ({"num_chains": 4, "num_draws": 24}, "num_chains times num_draws is 96, too few for LOO: take at least 100"),
        ({"evidence": {"num_replicates": 3}}, "num_replicates of evidence must be at least 4, .* not 3"),
        ({"evidence": {"num_move": 4}}, "evidence takes .*num_moves.*, and not num_move"),
        ({"evidence": {"seed": 1}}, "evidence takes .*, and not seed"),
        ({"evidence": {"checkpoint": "file"}}, "evidence takes .*, and not checkpoint"),
        ({"evidence": {"num_moves": 0}}, "evidence: num_moves must be at least 1, not 0"),
        ({"evidence": {"num_chains": 1}}, "evidence: num_chains must be at least 2, not 1"),
        ({"evidence": {"efficiency": 2.0}}, "efficiency must lie between 0 and 1, not 2.0"),
        ({"num_warmup": -1}, "num_warmup must be at least 0, not -1"),
        ({"num_chains": 64.0}, "num_chains must be an integer, not 64.0"),
        ({"evidence": {"method": "chib"}}, 'the method of evidence must be "smc" or "bridge", not \'chib\''),
        ({"probabilities": {"two": 0.0}}, "probabilities must be positive, and that of two is 0.0"),
        ({"probabilities": {"two": math.nan}}, "probabilities must be positive, and that of two is nan"),
    ],
)
def test_bad_settings_are_refused_before_any_run(
    settings: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = tiny()
    monkeypatch.setattr(comparison, "study_of", lambda *_: pytest.fail("it ran"))
    with pytest.raises((TypeError, ValueError), match=words):
        compare([candidate(gaussian_diagonal, 2, x, "two")], x, seed=0, **settings)


def test_without_arviz_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arviz_stats", None)
    x = tiny()
    with pytest.raises(ImportError, match=r"pip install 'mixproof\[compare\]'"):
        compare([candidate(gaussian_diagonal, 1, x)], x, seed=0)


def planted(**changes: Any) -> comparison_study.Row:
    unknown: dict[str, Any] = dict.fromkeys(comparison_study.Row._fields)
    return comparison_study.Row(**unknown | {"name": "A", "num_parameters": 2} | changes)


def test_disagreement_is_said_with_who_prefers_what() -> None:
    first = planted(name="A", bic=10.0, aic=9.0, icl=11.0, elpd_loo=-5.0, log_evidence=-7.0)
    second = planted(name="B", bic=11.0, aic=8.0, icl=12.0, elpd_loo=-4.0, log_evidence=-6.0)
    (sentence,) = disagreements([first, second], None)[:1]
    assert sentence == "the criteria disagree: BIC and ICL prefer A; AIC, LOO and the evidence prefer B"
    agreeing = second._replace(bic=9.0, icl=10.0, log_evidence=-6.0, log_evidence_standard_error=0.01)
    assert disagreements([first, agreeing], None) == []


def test_evidences_within_their_error_are_said_to_be() -> None:
    rows = [
        planted(name=name, log_evidence=value, log_evidence_standard_error=0.2)
        for name, value in (("A", -7.0), ("B", -6.9))
    ]
    (sentence,) = disagreements(rows, None)
    assert sentence.startswith("the log evidences of B and A are 0.10 apart with a standard error of 0.28")
    assert disagreements([rows[0], rows[1]._replace(log_evidence=-6.0)], None) == []


def test_a_likelihood_that_falls_and_a_best_at_the_end_are_said() -> None:
    x = tiny()
    candidates = [candidate(gaussian_diagonal, size, x, str(size)) for size in (1, 2, 3)]
    rows = [
        planted(name=str(size), log_likelihood=value, aic=-value) for size, value in ((1, -9.0), (2, -5.0), (3, -6.0))
    ]
    (sentence,) = gaps(rows, candidates, x)
    assert sentence.startswith("the log likelihood falls from 2 to 3, which contains it")
    rows[2] = rows[2]._replace(log_likelihood=-4.0, aic=0.0)
    (sentence,) = gaps(rows, candidates, x)
    assert sentence == "AIC prefers 3, the largest K of its family here: try larger ones"


def test_the_largest_is_named_that_the_criteria_prefer() -> None:
    """Two of one K, by their priors; and two instances of one setting, which are one family."""
    x = tiny()
    candidates = [candidate(gaussian_diagonal, size, x, name) for size, name in ((1, "1"), (2, "far"), (2, "near"))]
    rows = [
        planted(name=name, bic=bic, aic=bic, log_evidence=value)
        for name, bic, value in (("1", 9.0, -60.0), ("far", 5.0, -50.0), ("near", 6.0, -10.0))
    ]
    assert gaps(rows, candidates, x) == [
        "BIC and AIC prefer far, the largest K of its family here: try larger ones",
        "the evidence prefers near, the largest K of its family here: try larger ones",
    ]
    own = [c._replace(family=GaussianIsotropic(1.0)) for c in candidates[:2]]
    assert len(gaps(rows[:2], own, x)) == 1
    own[1] = own[1]._replace(family=GaussianIsotropic(2.0))
    assert gaps(rows[:2], own, x) == []


def test_fixed_weights_contain_no_fewer_components() -> None:
    """Weights of a third each contain no halves, so that the likelihood may fall as K grows."""
    x = (tiny() > 0).double()
    rows = [planted(name=str(size), log_likelihood=value) for size, value in ((2, -5.0), (3, -6.0))]
    for family, said in ((bernoulli.UniformWeights(), 0), (bernoulli, 1)):
        own = [Candidate(family, size, None, str(size)) for size in (2, 3)]
        assert len(gaps(rows, own, x)) == said


def test_probabilities_of_some_candidates_are_said_to_be() -> None:
    rows = [planted(name="A", log_evidence=-7.0), planted(name="B")]
    assert disagreements(rows, None) == ["B has no evidence, and the probabilities are among the others"]
    rows.append(planted(name="C"))
    assert disagreements(rows, None) == ["B, C have no evidence, and the probabilities are among the others"]
    assert disagreements([planted(name="A"), planted(name="B")], None) == []


def test_names_are_shown_as_they_are() -> None:
    names = ("gaussian [full] K=1", "a [/b]")
    x = tiny()
    rows = tuple(planted(name=name) for name in names)
    candidates = tuple(candidate(gaussian_diagonal, 1, x, name) for name in names)
    shown = str(Comparison(rows, (), candidates, {}, {}, len(x), 0, False))
    for name in names:
        assert f"\n{name} " in shown
        assert f"prior of {name}: " in shown


THREE = (
    planted(name="A", bic=12.0, aic=11.0, icl=13.0, elpd_loo=-4.0, log_evidence=-9.0, probability=0.99996)
    ._replace(elpd_loo_difference=0.0, elpd_loo_difference_standard_error=0.0, log_evidence_standard_error=0.25)
    ._replace(probability_standard_error=1e-5, stacking_weight=0.75),
    planted(name="B", bic=10.0, aic=13.0, icl=13.5, elpd_loo=-6.5, log_evidence=-7.0, probability=4e-5)
    ._replace(elpd_loo_difference=2.5, elpd_loo_difference_standard_error=1.5, log_evidence_standard_error=0.5)
    ._replace(probability_standard_error=1e-5, stacking_weight=0.25),
    planted(name="C"),
)


def three() -> Comparison:
    x = tiny()
    candidates = tuple(candidate(gaussian_diagonal, 1, x, row.name) for row in THREE)
    return Comparison(THREE, ("a sentence " + 30 * "of words ",), candidates, {}, {}, len(x), 0, False)


def test_what_a_row_shows() -> None:
    first, second, third = (line.split() for line in str(three()).splitlines()[1:4])
    assert first == ["A", "2", "12.0", "11.0*", "13.0*", "-4.0*", "0.0", "-9.00", "±", "0.25", ">", "0.999", "0.75"]
    assert second == (
        ["B", "2", "10.0*", "13.0", "13.5", "-6.5", "-2.5", "±", "1.5", "-7.00", "±", "0.50*", "<", "0.001", "0.25"]
    )
    assert third == ["C", "2"]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_number_is_cut_on_a_narrow_screen(width: int) -> None:
    console = Console(width=width, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as capture:
        console.print(three())
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in capture.get()
    for name, wide in zip("ABC", str(three()).splitlines()[1:4], strict=True):
        assert wide.split()[1:] == [word for line in lines if line.split()[:1] == [name] for word in line.split()[1:]]
    num_tables = sum(line.startswith("candidate ") for line in lines)
    assert (num_tables == 1) == (width == 200)


def test_a_pipe_folds_nothing() -> None:
    assert [line for line in str(three()).splitlines() if line.startswith("warning: ")] == [
        f"warning: {three().warnings[0]}".rstrip()
    ]


def test_the_plot_shows_differences_from_the_best() -> None:
    panels: Any = three().plot().axes
    criteria, of_loo, evidence, shares = panels

    def drawn(panel: Any, which: int = 0) -> list[tuple[float, float]]:
        line = panel.containers[which].lines[0]
        return list(zip(line.get_xdata(), line.get_ydata(), strict=True))

    assert drawn(criteria, 0) == [(2.0, 0), (0.0, 1)]  # BIC, AIC, ICL, above the lowest
    assert drawn(criteria, 1) == [(0.0, 0), (2.0, 1)]
    assert drawn(criteria, 2) == [(0.0, 0), (0.5, 1)]
    assert criteria.xaxis_inverted()
    assert drawn(of_loo) == [(0.0, 0), (-2.5, 1)]
    assert drawn(evidence) == [(-2.0, 0), (0.0, 1)]
    assert [y for _, y in drawn(shares, 0)] == [0, 1]
    assert drawn(shares, 1) == [(0.75, 0.2), (0.25, 1.2)]
    segments = evidence.containers[0].lines[2][0].get_segments()
    assert [(end[1, 0] - end[0, 0]) / 2 for end in segments] == [0.25, 0.5]


def test_the_loo_sentence_is_said_within_two_errors_and_not_beyond() -> None:
    rows = [planted(name="A", elpd_loo=-4.0), planted(name="B", elpd_loo=-6.5)]
    for error, said in ((1.5, True), (1.2, False)):
        ranking = pandas.DataFrame({"elpd_diff": [0.0, 2.5], "dse": [0.0, error]}, index=["A", "B"])
        sentences = disagreements(rows, ranking)
        assert bool(sentences) == said
    first = pandas.DataFrame({"elpd_diff": [0.0, 2.5], "dse": [0.0, 1.5]}, index=["A", "B"])
    (sentence,) = disagreements(rows, first)
    assert sentence == "LOO does not tell A from B: 2.5 apart, with a standard error of 1.5"


def numbered(num_chains: int, num_draws: int) -> Draws:
    """Return a draw of one site which says where it is: the chain, and by hundredths the place in it."""
    values = torch.arange(num_chains).double()[:, None] + torch.arange(num_draws).double() / 100
    return Draws({"site": values}, {"lp": -values}, {"num_chains": num_chains, "num_draws": num_draws})


@pytest.mark.parametrize("with_particles", [True, False])
def test_chains_go_on_from_particles_of_their_own_group(with_particles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight starts evenly spaced in each of four groups of 24 particles; of three draws of each, none is moved."""
    starts = []

    def stuck(*_: Any, init: Any, num_chains: int, num_draws: int, **__: Any) -> Draws:
        starts.append(init)
        first = init["site"] if init else torch.arange(num_chains).double()
        values = first[:, None].expand(-1, num_draws)
        return Draws({"site": values}, {"lp": -values}, {"num_draws": num_draws})

    monkeypatch.setattr(comparison_study, "gibbs", stuck)
    runs = comparison_study.Runs(1, 1, {"num_chains": 32, "num_draws": 3, "num_warmup": 5}, {}, False, None)
    unused: Any = None
    particles = numbered(4, 24) if with_particles else None
    draws = comparison_study._sample(unused, unused, unused, 2, particles, unused, runs, 1)
    expected = [[group + 3 * start / 100 for start in range(8) for _ in range(3)] for group in range(4)]
    if not with_particles:
        assert starts == [None]
        expected = [[8.0 * group + start for start in range(8) for _ in range(3)] for group in range(4)]
    assert draws.params["site"].tolist() == expected
    assert draws.sample_stats["lp"].equal(-draws.params["site"])
    assert draws.attributes == {"num_chains": 4, "num_draws": 24, "num_draws_of_a_start": 3}


def test_modes_between_which_no_chain_changes_have_their_shares() -> None:
    """Three groups of three rows and two components: the middle one is with the first, or with the last, or neither.

    By all 2^9 allocations it is with the nearer in half of the posterior, and by k-means++ in most of the starts.
    """
    x = torch.tensor([-6.2, -6.0, -5.8, -0.7, -0.5, -0.3, 5.8, 6.0, 6.2]).double()[:, None]
    family: Any = gaussian_diagonal
    prior = family.Prior([1.0] * 2, [0.0], 0.1, [2.0], [0.2])

    def with_the_first(params: Mapping[str, Any]) -> Tensor:
        values = (torch.as_tensor(params[name]).flatten(0, 1) for name in family.Params._fields)
        component = torch.func.vmap(family.log_joint, (0, None))(family.Params(*values), x).argmax(2)
        return (component[:, 4] == component[:, 1]).double()

    generator = torch.Generator().manual_seed(0)
    runs: dict[str, Any] = {"num_chains": 512, "num_draws": 4, "num_warmup": 100}
    draws = exact_draws(family, x, prior, num_components=2, num_draws=20_000, generator=generator)
    share = float(with_the_first({name: value[None] for name, value in draws._asdict().items()}).mean())
    limit = 4 * math.sqrt(share * (1 - share) / 512)
    found = compare([Candidate(family, 2, prior, "only")], x, seed=0, **runs)
    posterior: Any = found.trees["only"]["posterior"]
    of_chains = with_the_first({name: posterior[name].values for name in family.Params._fields}).reshape(512, 4)
    assert (of_chains == of_chains[:, :1]).double().mean() > 0.9  # they stick
    assert abs(float(of_chains.mean()) - share) < limit
    alone = gibbs(family, x, prior, num_components=2, generator=generator, **runs)
    assert float(with_the_first(alone.params).mean()) - share > 3 * limit


def test_candidates_have_seeds_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    x = tiny()
    found = [candidate(gaussian_diagonal, size, x) for size in (1, 2, 3)]
    kept = comparison_study.Study(found[0], planted(), [], None, None, None, None)

    def study(_: Any, __: int, ___: Any, seed: int, ____: Any) -> Any:
        seeds.append(seed)
        return kept

    monkeypatch.setattr(comparison, "study_of", study)
    compare(found, x, seed=0)
    assert len(set(seeds)) == 3
    compare(found, x, seed=1)
    assert len(set(seeds)) == 6


def test_bad_runs_are_said_for_the_candidate() -> None:
    """Two far groups of a few rows and five components: what each run finds wrong with it comes out in words."""
    x = torch.tensor([0.0, 0.1, 0.2, 8.0, 8.1, 8.25]).double()[:, None]
    few = {**ONLY_EM, "num_draws": 100}
    found = compare([candidate(gaussian_diagonal, 5, x, "five")], x, seed=0, **few)
    for words in ("EM failed: ", "have no row", "the draws are worth"):
        assert any(sentence.startswith("five: ") and words in sentence for sentence in found.warnings), words
    assert found.rows[0].bic is None
    alone = torch.cat([tiny(), torch.tensor([[40.0]]).double()])
    own = gaussian_diagonal.weakly_informative_prior(tiny(), 1)
    found = compare([Candidate(gaussian_diagonal, 1, own, "one")], alone, seed=0, **QUICK)
    assert found.rows[0].num_high_pareto_k == 1
    assert any(sentence.startswith("one: 1 of 8 rows have a Pareto k above") for sentence in found.warnings)


def test_a_vague_evidence_is_said(monkeypatch: pytest.MonkeyPatch, of_tiny: tuple[Tensor, Comparison]) -> None:
    x, found = of_tiny
    assert not any("standard error of the log evidence" in sentence for sentence in found.warnings)
    real = comparison_study.log_evidence
    monkeypatch.setattr(
        comparison_study, "log_evidence", lambda *args, **settings: real(*args, **settings)._replace(standard_error=0.8)
    )
    vague = compare(found.candidates, x, seed=0, **QUICK)
    assert any("K = 1: the standard error of the log evidence is 0.80" in sentence for sentence in vague.warnings)


def test_em_that_has_not_converged_is_said(real_data: dict[str, Tensor]) -> None:
    x = real_data["faithful"][::4]
    found = compare([candidate(gaussian_full, 2, x, "two")], x, seed=0, max_steps=2, **ONLY_EM)
    assert any("two: the best start has not converged after 2 steps" in sentence for sentence in found.warnings)
    good = compare([candidate(gaussian_full, 2, x, "two")], x, seed=0, **ONLY_EM)
    assert not any("converged" in sentence for sentence in good.warnings)


def test_a_single_row_has_no_loo() -> None:
    x = torch.tensor([[1.5]]).double()
    prior = gaussian_diagonal.Prior(*(torch.tensor(v).double() for v in ([1.0], [0.0], 0.1, [2.0], [1.0])))
    found = compare([Candidate(gaussian_diagonal, 1, prior, name) for name in "ab"], x, seed=0, **ONLY_EM)
    assert [row.elpd_loo for row in found.rows] == [None, None]
    assert any("a single row has no LOO with an error" in words for words in found.warnings)


def test_what_fails_for_one_candidate_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    x, real = tiny(), comparison_study.log_evidence

    def fails_for_two(model: Any, *args: Any, **settings: Any) -> Evidence:
        if model.keywords["num_components"] == 2:
            raise RuntimeError("the particles do not move")
        return real(model, *args, **settings)

    monkeypatch.setattr(comparison_study, "log_evidence", fails_for_two)
    found = compare([candidate(gaussian_diagonal, size, x, f"K = {size}") for size in (1, 2)], x, seed=0, **QUICK)
    assert "K = 2: the evidence failed: the particles do not move" in found.warnings
    first, second = found.rows
    assert second.log_evidence is None
    assert second.probability is None
    assert second.elpd_loo is not None
    assert first.probability == 1
    json.dumps(found.to_dict(), allow_nan=False)
    assert "K = 2" in str(found)
    found.plot()


@pytest.mark.parametrize("run", ["em_restarts", "gibbs", "log_evidence"])
def test_an_interrupt_keeps_what_is_done(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, real, calls = tiny(), getattr(comparison_study, run), []

    def interrupted(*args: Any, **settings: Any) -> Any:
        calls.append(run)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **settings)

    monkeypatch.setattr(comparison_study, run, interrupted)
    candidates = [candidate(gaussian_diagonal, size, x, f"K = {size}") for size in (1, 2, 3)]
    found = compare(candidates, x, seed=0, **QUICK)
    assert found.interrupted
    assert [row.name for row in found.rows] == ["K = 1"]
    assert found.warnings[0] == "interrupted, which leaves out K = 2, K = 3"
    calls[:] = [run]
    with pytest.raises(KeyboardInterrupt):
        compare(candidates, x, seed=0, **QUICK)


def test_a_chain_cut_short_by_an_interrupt_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """``gibbs`` returns what it has, with a warning, which would be a row of a few draws."""
    x, real = tiny(), comparison_study.gibbs

    def cut(*args: Any, **settings: Any) -> Any:
        if settings["num_components"] == 1:
            return real(*args, **settings)
        warnings.warn("interrupted after 7 of 250 draws from each chain, which are returned", stacklevel=2)
        return real(*args, **{**settings, "num_draws": 7})

    monkeypatch.setattr(comparison_study, "gibbs", cut)
    found = compare([candidate(gaussian_diagonal, size, x, f"K = {size}") for size in (1, 2)], x, seed=0, **QUICK)
    assert [row.name for row in found.rows] == ["K = 1"]
    assert found.interrupted


def test_sequential_monte_carlo_alone_gives_the_same_evidence(of_tiny: tuple[Tensor, Comparison]) -> None:
    x, found = of_tiny
    """Of one component it is exact, with an error of 0."""
    other = compare(found.candidates, x, seed=4, **{**QUICK, "evidence": {"method": "smc"}})
    for row, chosen in zip(other.rows, found.candidates, strict=True):
        truth = exact(chosen, x)
        assert row.log_evidence is not None
        assert row.log_evidence_standard_error is not None
        assert abs(row.log_evidence - truth.item()) < 4 * row.log_evidence_standard_error + 1e-12


@pytest.mark.slow_for("gaussian_sum", "KnownNoise")
def test_every_family_is_compared(case: Case) -> None:
    x = case.data(5, 30)
    size = case.num_components(2)
    prior = case.prior(2, 2) if not hasattr(case.family, "weakly_informative_prior") else None
    prior = prior or case.family.weakly_informative_prior(x, size)
    (row,) = compare([Candidate(case.family, size, prior, case.name)], x, seed=0, num_starts=3, **QUICK).rows
    needed = set(row._fields) - {"num_empty_components"}
    assert [name for name in sorted(needed) if getattr(row, name) is None] == []
