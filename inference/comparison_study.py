"""One candidate of a comparison: its fit by EM, its evidence, its draws, and what they say of it."""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference.datatree import loo, to_datatree
from mixproof.inference.diagnostics import complaints, diagnose
from mixproof.inference.draws import Draws
from mixproof.inference.effective_dimension import effective_dimension
from mixproof.inference.em import Fit, responsibilities
from mixproof.inference.evidence import NUM_CHAINS, Evidence, log_evidence
from mixproof.inference.gibbs import gibbs
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.restarts import em_restarts
from mixproof.inference.validation import check_prior, example_params

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xarray import DataTree

MAX_RHAT, MIN_EFFECTIVE_DRAWS = 1.01, 400
"""Below and above which chains agree and quantiles are known (Vehtari et al. 2021, Bayesian Analysis 16, section 4)."""

REMEDY = "raise num_warmup, or the evidence's num_replicates or num_chains"
EMPTY = "the data carry fewer, and the prior decides what the others are"


class Candidate(NamedTuple):
    """A mixture that may have made the data."""

    family: Any
    """A family of the contract."""
    num_components: int | tuple[int, ...]
    """K, or a number for each latent."""
    prior: Any
    """The family's ``Prior``, proper; ``family.weakly_informative_prior(x, num_components)`` is one."""
    name: str
    """What the table calls it."""


class Row(NamedTuple):
    """What is known of one candidate; None is what could not be computed, and a warning of the comparison says why."""

    name: str
    log_likelihood: float | None
    """log p(x | params), natural logarithm, the highest that EM found."""
    num_parameters: int
    """How many numbers the data decide, by ``effective_dimension``: weights sum to 1, a covariance matrix is symmetric,
    and what can be passed from one part of a sum to the other without a trace does not count twice."""
    bic: float | None
    """num_parameters log N - 2 log_likelihood (Schwarz 1978); the lower, the better."""
    aic: float | None
    """2 num_parameters - 2 log_likelihood; the lower, the better."""
    icl: float | None
    """bic + 2 times the entropy of p(z | x, params), summed over rows (Biernacki, Celeux and Govaert 2000, IEEE TPAMI
    22; McLachlan and Peel 2000, section 6.10.3). The lower, the better. In the place of the entropy mclust has
    sum_n -log max_k p(z_n = k | x_n, params)."""
    elpd_loo: float | None
    """sum_n log p(x_n | all other rows), by Pareto-smoothed importance sampling; the higher, the better."""
    elpd_loo_standard_error: float | None
    """Over rows, as another sample of so many rows would change it."""
    elpd_loo_difference: float | None
    """Below the highest; 0 for that one."""
    elpd_loo_difference_standard_error: float | None
    """Of the difference, over rows."""
    max_pareto_k: float | None
    """The largest shape of the tails of the importance ratios of a row."""
    num_high_pareto_k: int | None
    """How many rows have one above the threshold for so many draws (Vehtari et al. 2024, section 3.2.4)."""
    log_evidence: float | None
    """log p(x), parameters and latents integrated out, under the candidate's prior."""
    log_evidence_standard_error: float | None
    """Over repetitions with other seeds."""
    probability: float | None
    """p(candidate | x) among those with an evidence."""
    probability_standard_error: float | None
    """To first order, from those of the evidences."""
    stacking_weight: float | None
    """In the mixture of predictions that predicts left-out rows best (Yao et al. 2018, Bayesian Analysis 13)."""
    max_rhat: float | None
    """The largest R-hat of the quantities of the draws that do not depend on labels."""
    min_effective_draws: float | None
    """The smallest effective sample size of these, in the bulk and in the tails."""
    num_empty_components: float | None
    """How many components have no row, averaged over the posterior; None where there are several latents."""


class Runs(NamedTuple):
    """The settings of the three runs that each candidate goes through."""

    num_starts: int
    max_steps: int
    sampling: dict[str, Any]
    evidence: dict[str, Any]
    progress: bool
    folder: Path | None

    def checkpoint(self, name: str) -> Path | None:
        """Return the file for the state of a run."""
        return None if self.folder is None else self.folder / name


class Study(NamedTuple):
    """One candidate, its row without what takes other candidates, and what the runs left behind."""

    candidate: Candidate
    row: Row
    sentences: list[str]
    fit: Fit | None
    tree: DataTree | None
    elpd: Any
    evidence: Evidence | None

    @property
    def name(self) -> str:
        return self.candidate.name


def study_of(candidate: Candidate, number: int, x: Tensor, seed: int, runs: Runs) -> Study:
    """Return what EM, Gibbs sampling and the evidence say of one candidate, by its number from 1."""
    family, size, name = candidate.family, candidate.num_components, candidate.name
    template, _ = example_params(family, size, x)
    prior = check_prior(family, candidate.prior, template)
    generator = torch.Generator().manual_seed(seed)
    model = partial(family.model, num_components=size, prior=prior)
    posterior = LogPosterior(model, x)
    sentences: list[str] = []
    unknown: dict[str, Any] = dict.fromkeys(Row._fields)
    num_parameters = effective_dimension(family, posterior, template, seed=seed)
    row = Row(**unknown | {"name": name, "num_parameters": num_parameters})
    with in_words(sentences, name):
        fit, tree, elpd, evidence = None, None, None, None
        with _failing(sentences, name, "EM"):
            starts = [family.init_params(x, size, generator) for _ in range(runs.num_starts)]
            fit, _, failures = em_restarts(family, x, starts, max_steps=runs.max_steps, progress=runs.progress)
            row = row._replace(**_likelihood_criteria(family, fit, x, num_parameters))
            if failures:
                last = failures[max(failures)]
                sentences.append(f"{name}: {len(failures)} of {runs.num_starts} starts of EM failed, the last: {last}")
        with _failing(sentences, name, "the evidence"):
            settings = {"family": family, "checkpoint": runs.checkpoint(f"{number}.evidence")} | runs.evidence
            evidence = log_evidence(model, x, seed=seed, progress=runs.progress, **settings)
            row = row._replace(log_evidence=evidence.log_evidence, log_evidence_standard_error=evidence.standard_error)
            if evidence.standard_error > 0.5:
                sentences.append(
                    f"{name}: the standard error of the log evidence is {evidence.standard_error:.2f}, too large for "
                    "the errors of probabilities, which are to first order: raise num_replicates or num_moves of the "
                    "evidence"
                )
        with _failing(sentences, name, "Gibbs sampling"):
            particles = None if evidence is None else evidence.draws
            draws = _sample(family, x, prior, size, particles, generator, runs, number)
            tree = to_datatree(draws, posterior, seed=0, family=family, num_predictive=0, num_prior=0)
            found = diagnose(tree["label_invariant"].to_dataset())
            row = row._replace(
                max_rhat=found.max_rhat,
                min_effective_draws=found.min_effective_draws,
                num_empty_components=found.num_empty_components.get("num_empty_components"),
            )
            limits: Any = {"max_rhat": MAX_RHAT, "min_effective_draws": MIN_EFFECTIVE_DRAWS}
            sentences += [f"{name}: {words}" for words in complaints(found, **limits, remedy=REMEDY, empty=EMPTY)]
            if len(x) < 2:
                sentences.append(f"{name}: a single row has no LOO with an error: the evidence alone compares here")
            else:
                with warnings.catch_warnings():
                    # said below, with the number of rows and for the candidate by name
                    warnings.filterwarnings("ignore", "Estimated shape parameter of Pareto", UserWarning)
                    warnings.filterwarnings("ignore", category=ConvergenceWarning)  # said above, with R-hat and size
                    elpd = loo(tree, pointwise=True)
                row = row._replace(**_loo(elpd, sentences, name))
    return Study(candidate, row, sentences, fit, tree, elpd, evidence)


@contextmanager
def in_words(sentences: list[str], name: str) -> Iterator[None]:
    """Collect warnings to the user as sentences about a candidate, and let other warnings through."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for found in caught:
        if issubclass(found.category, UserWarning | RuntimeWarning):
            sentences.append(f"{name}: {found.message}")
        else:
            warnings.warn_explicit(found.message, found.category, found.filename, found.lineno)


@contextmanager
def _failing(sentences: list[str], name: str, run: str) -> Iterator[None]:
    """Let a run fail without the others, and say why."""
    try:
        yield
    except (ValueError, ArithmeticError, RuntimeError) as error:
        sentences.append(f"{name}: {run} failed: {error}")


def _likelihood_criteria(family: Any, fit: Fit, x: Tensor, num_parameters: int) -> dict[str, Any]:
    log_lik = float(fit.log_lik[-1])
    resp = responsibilities(family, fit.params, x)
    entropy = -float(torch.special.xlogy(resp, resp).sum())
    bic = num_parameters * math.log(len(x)) - 2 * log_lik
    return {"log_likelihood": log_lik, "bic": bic, "aic": 2 * num_parameters - 2 * log_lik, "icl": bic + 2 * entropy}


def _sample(
    family: Any,
    x: Tensor,
    prior: Any,
    size: int | tuple[int, ...],
    particles: Draws | None,
    generator: torch.Generator,
    runs: Runs,
    number: int,
) -> Draws:
    """Return draws of short chains from particles, in as many chains as these, one after another in each.

    Without particles the chains start apart.
    """
    num_short, num_draws = runs.sampling["num_chains"] // NUM_CHAINS, runs.sampling["num_draws"]
    init = None
    if particles is not None:
        some = torch.arange(num_short) * particles.attributes["num_draws"] // num_short
        init = {site: value[:, some].flatten(0, 1) for site, value in particles.params.items()}
    draws = gibbs(
        family,
        x,
        prior,
        num_components=size,
        generator=generator,
        init=init,
        checkpoint=runs.checkpoint(f"{number}.gibbs"),
        progress=runs.progress,
        **runs.sampling,
    )
    if draws.attributes["num_draws"] < num_draws:
        raise KeyboardInterrupt  # which gibbs answers with what it has, too little to stand beside the others

    def together(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.unflatten(0, (NUM_CHAINS, -1)).flatten(1, 2) for name, value in values.items()}

    shape = {"num_chains": NUM_CHAINS, "num_draws": num_short * num_draws, "num_draws_of_a_start": num_draws}
    return Draws(together(draws.params), together(draws.sample_stats), draws.attributes | shape)


def _loo(elpd: Any, sentences: list[str], name: str) -> dict[str, Any]:
    largest, num_high = float(elpd.pareto_k.max()), int((elpd.pareto_k > elpd.good_k).sum())
    if num_high:
        sentences.append(
            f"{name}: {num_high} of {elpd.n_data_points} rows have a Pareto k above {elpd.good_k:.2f}, the largest "
            f"{largest:.2f}: without such a row the posterior is another, and its part in LOO is not to be trusted"
        )
    return {
        "elpd_loo": float(elpd.elpd),
        "elpd_loo_standard_error": float(elpd.se),
        "max_pareto_k": largest,
        "num_high_pareto_k": num_high,
    }
