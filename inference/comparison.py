"""Candidate mixtures for one data set, side by side: likelihood, information criteria, LOO, evidence, and how sure."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import Tensor

from mixproof.inference import checkpoint as checkpoints
from mixproof.inference.comparison_report import (
    CRITERIA,
    UNFOLDED,
    as_tables,
    best_row,
    check_matplotlib,
    plot_rows,
    prior_in_words,
)
from mixproof.inference.datatree import loo, to_datatree
from mixproof.inference.draws import Draws
from mixproof.inference.effective_dimension import effective_dimension
from mixproof.inference.em import Fit, responsibilities
from mixproof.inference.evidence import NUM_CHAINS, Evidence, log_evidence, posterior_probabilities
from mixproof.inference.gibbs import gibbs
from mixproof.inference.labels import at_draws
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.particles import check_settings
from mixproof.inference.restarts import em_restarts
from mixproof.inference.validation import (
    check_integer,
    check_num_components,
    check_prior,
    check_rows,
    data_support,
    example_params,
)
from mixproof.inference.verification.report import plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure
    from xarray import DataTree

MAX_RHAT, MIN_EFFECTIVE_DRAWS = 1.01, 400
"""Below and above which chains agree and quantiles are known (Vehtari et al. 2021, Bayesian Analysis 16, section 4)."""

MIN_DRAWS = 100
"""Of all chains: a tail of 5, the least to fit, is a fifth of 25 draws, and chains are cut in halves for R-hat."""

EVIDENCE_SETTINGS = {
    each.name for each in signature(log_evidence).parameters.values() if each.kind is each.KEYWORD_ONLY
} - {"seed", "draws", "family", "checkpoint", "progress"}
"""What ``compare`` leaves to its caller of ``log_evidence``."""


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


@dataclass(frozen=True)
class Comparison:
    """The candidates side by side; ``print`` shows them as a table, with the warnings in words, each a line that is not
    folded, and rich as many columns beside one another as the screen is wide."""

    rows: tuple[Row, ...]
    """One for each candidate, in the order given."""
    warnings: tuple[str, ...]
    """Where criteria disagree, and what is wrong with a fit or a run, a sentence each."""
    candidates: tuple[Candidate, ...]
    """Those of the rows."""
    fits: Mapping[str, Fit]
    """By name, the best fit of EM, where there is one."""
    trees: Mapping[str, DataTree]
    """By name, the posterior draws as ``to_datatree`` gives them, for ArviZ."""
    num_rows: int
    """N."""
    seed: int
    interrupted: bool
    """Whether candidates are missing because the run was interrupted from the keyboard."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from as_tables(self.rows, console, options)
        yield Text(
            "* the best by this criterion; LOO and log evidence are the better the higher, the others the lower; "
            "LOO diff is from the best"
        )
        for candidate in self.candidates:
            yield Text(f"prior of {candidate.name}: {prior_in_words(candidate.prior)}", "dim")
        for words in self.warnings:
            yield Text(f"warning: {words}", "yellow")

    def __str__(self) -> str:
        console = Console(width=UNFOLDED, color_system=None, force_terminal=False, force_jupyter=False)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as plain Python values for JSON, with the priors and the fitted parameters."""
        rows = []
        for row, candidate in zip(self.rows, self.candidates, strict=True):
            fit = self.fits.get(row.name)
            more = {
                "num_components": candidate.num_components,
                "prior": plain(_by_name(candidate.prior)),
                "params": None if fit is None else plain(fit.params._asdict()),
            }
            rows.append(row._asdict() | more)
        return {
            "num_rows": self.num_rows,
            "seed": self.seed,
            "interrupted": self.interrupted,
            "candidates": rows,
            "warnings": list(self.warnings),
        }

    def plot(self) -> Figure:
        """Return a figure of the criteria, each in a panel, better always to the right.

        Raises:
            ImportError: matplotlib is not installed.
        """
        check_matplotlib()
        from matplotlib.figure import Figure

        return plot_rows(self.rows, Figure(figsize=(13, 1.2 + 0.35 * len(self.rows)), layout="constrained"))


def compare(
    candidates: Sequence[Candidate],
    x: Any,
    *,
    seed: int,
    num_starts: int = 10,
    max_steps: int = 2000,
    num_chains: int = 1024,
    num_draws: int = 8,
    num_warmup: int = 100,
    evidence: Mapping[str, Any] | None = None,
    probabilities: Mapping[str, float] | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> Comparison:
    """Fit candidate mixtures to one data set and put what each criterion says of them into one table.

    Each is fitted by EM from several starts (log likelihood, BIC, AIC, ICL) and integrated by ``log_evidence``
    (evidence, posterior probability). From the particles at which that ends many short Gibbs chains go on (LOO,
    stacking weights, diagnostics): the particles bring the modes in their shares, between which chains may never
    change, and the chains make draws of one mode independent of one another. What is diagnosed is four long chains,
    each of the short ones from replicates of its own, one after another: whether independent runs agree (as the nested
    R-hat of Margossian et al. 2021, arXiv:2110.13017).

    Args:
        candidates: at least one, each under a name of its own and with a proper prior.
        x: (N, D), the data; what numpy reads as a matrix. The computation is in float64.
        seed: seeds every start and draw.
        num_starts: of EM, by k-means++.
        max_steps: the largest number of EM steps from each.
        num_chains, num_draws, num_warmup: as ``gibbs`` takes them, the first a multiple of 4.
        evidence: the settings of ``log_evidence`` that are to be others than its defaults.
        probabilities: by name, the probability of each candidate before the data, in any unit; None takes all alike.
        checkpoint: a folder, made where there is none, for the states of the Gibbs chains and of the particles of each
            candidate. If it holds those of this comparison, it goes on from there, to the same table.
        progress: whether to show each fit on stderr.

    Returns:
        ``Comparison``. What fails for one candidate is None in its row and a warning in words, and so is a criterion
        that disagrees with others or a diagnostic that is bad. An interrupt from the keyboard leaves out the candidate
        at hand and those after it, once there is one before them.

    Raises:
        ImportError: ArviZ is not installed.
        TypeError, ValueError: the data, a candidate or a setting are not what they must be, a prior is None, laws of 0
            and 1 stand beside densities, or the checkpoint is of another comparison.
        OSError: the checkpoint cannot be read or written.
    """
    _arviz_stats()
    x = _check(candidates, x)
    numbers = {"num_starts": num_starts, "max_steps": max_steps, "num_chains": num_chains, "num_draws": num_draws}
    _check_settings(numbers | {"num_warmup": num_warmup}, evidence or {})
    _check_probabilities(probabilities, [candidate.name for candidate in candidates])
    sampling = {"num_chains": num_chains, "num_draws": num_draws, "num_warmup": num_warmup}
    folder = None if checkpoint is None else Path(checkpoint)
    if folder is not None:
        _claim(
            folder,
            candidates,
            x,
            {"seed": seed, "num_starts": num_starts, "max_steps": max_steps, **sampling},
            evidence,
        )
    runs = _Runs(num_starts, max_steps, sampling, dict(evidence or {}), progress, folder)
    seeds = torch.randint(2**31, (len(candidates),), generator=torch.Generator().manual_seed(seed)).tolist()
    studies: list[_Study] = []
    sentences: list[str] = []
    for number, (candidate, own_seed) in enumerate(zip(candidates, seeds, strict=True)):
        if progress:
            words = f"{candidate.name}: {number + 1} of {len(candidates)}"
            Console(stderr=True).print(words, highlight=False, markup=False)
        try:
            studies.append(_study(candidate, number + 1, x, own_seed, runs))
        except KeyboardInterrupt:
            if not studies:
                raise
            left_out = ", ".join(candidate.name for candidate in candidates[number:])
            sentences.append(f"interrupted, which leaves out {left_out}")
            break
    evidences = {study.name: study.evidence for study in studies if study.evidence is not None}
    chosen = None if probabilities is None else {name: probabilities[name] for name in evidences}
    posterior = posterior_probabilities(evidences, chosen) if evidences else {}
    elpds = {study.name: study.elpd for study in studies if study.elpd is not None}
    of_loo: list[str] = []
    ranking = _ranking(elpds, of_loo)
    rows = []
    for study in studies:
        row = study.row
        if study.name in posterior:
            probability, error = posterior[study.name]
            row = row._replace(probability=probability, probability_standard_error=error)
        if study.name in elpds:
            found = {"weight": 1.0, "elpd_diff": 0.0, "dse": 0.0} if ranking is None else ranking.loc[study.name]
            row = row._replace(
                stacking_weight=float(found["weight"]),
                elpd_loo_difference=float(found["elpd_diff"]),
                elpd_loo_difference_standard_error=float(found["dse"]),
            )
        rows.append(row)
    for study in studies:
        sentences += study.sentences
    sentences += of_loo
    done = tuple(study.candidate for study in studies)
    sentences += [*_disagreements(rows, ranking), *_gaps(rows, done, x)]
    return Comparison(
        tuple(rows),
        tuple(sentences),
        done,
        {study.name: study.fit for study in studies if study.fit is not None},
        {study.name: study.tree for study in studies if study.tree is not None},
        len(x),
        seed,
        len(studies) < len(candidates),
    )


def _claim(
    folder: Path,
    candidates: Sequence[Candidate],
    x: Tensor,
    settings: dict[str, Any],
    evidence: Mapping[str, Any] | None,
) -> None:
    """Make a folder for the checkpoints of a comparison, or say in what the one that it is of differs."""
    identity = settings | {
        "x": checkpoints.digest(x),
        "candidates": [
            [each.name, checkpoints.identify(each.family), each.num_components, checkpoints.digest(each.prior)]
            for each in candidates
        ],
        "evidence": {name: str(value) for name, value in (evidence or {}).items()},
    }
    folder.mkdir(exist_ok=True)
    checkpoints.load(folder / "comparison", identity)
    checkpoints.save(folder / "comparison", identity, {})


class _Runs(NamedTuple):
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


class _Study(NamedTuple):
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


def _arviz_stats() -> Any:
    try:
        import arviz_base  # noqa: F401
        import arviz_stats
    except ImportError as error:
        raise ImportError("ArviZ is not installed: pip install 'mixproof[compare]'") from error
    return arviz_stats


def _check(candidates: Sequence[Candidate], x: Any) -> Tensor:
    """Return the data in float64, or say which candidate cannot be one."""
    if len(candidates) == 0:
        raise ValueError("there are no candidates: give at least one")
    names = [candidate.name for candidate in candidates]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several candidates are called {', '.join(repeated)}: give each a name of its own")
    rows = x
    kinds = {}
    for candidate in candidates:
        rows = check_rows(candidate.family, x).to(torch.float64)
        size: Any = check_num_components(candidate.family, candidate.num_components)
        if candidate.prior is None:
            raise ValueError(
                f"{candidate.name} has no prior: under a flat one the evidence is not defined and the posterior is "
                "improper. Give a proper one, such as family.weakly_informative_prior(x, num_components)"
            )
        try:
            params, _ = example_params(candidate.family, size, rows)
            prior = check_prior(candidate.family, candidate.prior, params)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{candidate.name}: {error}") from error
        if not candidate.family.log_prior(params, prior).isfinite():
            raise ValueError(
                f"{candidate.name}: the prior is improper, for it has no density inside its support, and the evidence "
                "is not defined: is a strength 0?"
            )
        kinds[data_support(candidate.family, rows.shape[1]).is_discrete] = candidate.name
    if len(kinds) > 1:
        raise ValueError(
            f"{kinds[True]} gives the data probabilities and {kinds[False]} gives them densities, which have a unit: "
            "no criterion compares the two"
        )
    return rows


def _check_settings(numbers: Mapping[str, int], evidence: Mapping[str, Any]) -> None:
    """Say in words which setting is wrong for all candidates, before the first run."""
    for name, value in numbers.items():
        check_integer(value, name, 0 if name == "num_warmup" else 1)
    if numbers["num_chains"] % NUM_CHAINS:
        raise ValueError(
            f"num_chains must be a multiple of {NUM_CHAINS}, the groups that R-hat compares, and "
            f"{numbers['num_chains']} is none"
        )
    if (total := numbers["num_chains"] * numbers["num_draws"]) < MIN_DRAWS:
        raise ValueError(f"num_chains times num_draws is {total}, too few for LOO: take at least {MIN_DRAWS}")
    if unknown := sorted(set(evidence) - EVIDENCE_SETTINGS):
        raise ValueError(f"evidence takes {', '.join(sorted(EVIDENCE_SETTINGS))}, and not {', '.join(unknown)}")
    of_particles = {"num_replicates": 32, "num_chains": 2, "num_moves": 1}  # where there is a default, it is right
    for name, value in of_particles.items():
        of_particles[name] = value if evidence.get(name) is None else evidence[name]
        check_integer(of_particles[name], f"{name} of evidence", 1)
    check_settings(**of_particles, efficiency=evidence.get("efficiency", 0.5))
    if of_particles["num_replicates"] < NUM_CHAINS:
        raise ValueError(
            f"num_replicates of evidence must be at least {NUM_CHAINS}, the groups that R-hat compares, not "
            f"{of_particles['num_replicates']}"
        )
    if evidence.get("method", "bridge") not in ("smc", "bridge"):
        raise ValueError(f'the method of evidence must be "smc" or "bridge", not {evidence["method"]!r}')


def _check_probabilities(probabilities: Mapping[str, float] | None, names: Sequence[str]) -> None:
    if probabilities is None:
        return
    if set(probabilities) != set(names):
        raise ValueError(
            f"probabilities must be given for each candidate by its name, not for {', '.join(probabilities)}"
        )
    if bad := [name for name, value in probabilities.items() if not 0 < value < math.inf]:
        raise ValueError(
            f"probabilities must be positive, and that of {bad[0]} is {probabilities[bad[0]]}: leave it out"
        )


def _study(candidate: Candidate, number: int, x: Tensor, seed: int, runs: _Runs) -> _Study:
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
    with _in_words(sentences, name):
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
            moments_of = family if draws.params.keys() == set(family.Params._fields) else None
            tree = to_datatree(draws, posterior, seed=0, family=moments_of, num_predictive=0, num_prior=0)
            found, complaints = _diagnostics(tree)
            row = row._replace(**found)
            sentences += [f"{name}: {complaint}" for complaint in complaints]
            if len(posterior.program.latents) == 1:
                empty = float(at_draws(posterior, draws.params, _num_empty)["empty"].mean())
                row = row._replace(num_empty_components=empty)
                if empty >= 0.5:
                    sentences.append(
                        f"{name}: on average {empty:.1f} of its {size} components have no row, so that the data carry "
                        "fewer, and the prior decides what the others are"
                    )
            with warnings.catch_warnings():
                # said below, with the number of rows and for the candidate by name
                warnings.filterwarnings("ignore", "Estimated shape parameter of Pareto", UserWarning)
                warnings.filterwarnings("ignore", "The point-wise LOO is the same", UserWarning)  # as of a single row
                elpd = loo(tree, pointwise=True)
            row = row._replace(**_loo(elpd, sentences, name))
    return _Study(candidate, row, sentences, fit, tree, elpd, evidence)


@contextmanager
def _in_words(sentences: list[str], name: str) -> Iterator[None]:
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
    runs: _Runs,
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


def _diagnostics(tree: DataTree) -> tuple[dict[str, Any], list[str]]:
    """Return the worst R-hat and effective sample size of what needs no labels, and what is bad about them."""
    stats = _arviz_stats()
    quantities = tree["label_invariant"].to_dataset()
    varying = quantities[[key for key, value in quantities.items() if float(value.max() - value.min()) > 0]]
    if not varying.data_vars:
        return {"max_rhat": None, "min_effective_draws": None}, ["nothing varies over the draws: no chain has moved"]
    with warnings.catch_warnings():
        # an entry that is the same in all draws has no R-hat; it comes out as NaN and is passed over
        warnings.filterwarnings("ignore", "invalid value encountered", RuntimeWarning)
        rhats = {str(key): float(value.max()) for key, value in stats.rhat(varying).data_vars.items()}
        sizes = [stats.ess(varying, method=method) for method in ("bulk", "tail")]
    ess = min(float(value.min()) for size in sizes for value in size.data_vars.values())
    worst = max(rhats, key=lambda key: rhats[key])
    complaints = []
    if rhats[worst] > MAX_RHAT or ess < MIN_EFFECTIVE_DRAWS:
        complaints.append(
            f"the chains do not agree, or their draws are worth too little: R-hat of {worst} is {rhats[worst]:.3f} "
            f"(at most {MAX_RHAT}), the draws are worth {ess:.0f} independent ones (at least {MIN_EFFECTIVE_DRAWS}), "
            "and LOO and stacking rest on them; raise num_warmup, or the evidence's num_replicates or num_chains"
        )
    return {"max_rhat": rhats[worst], "min_effective_draws": ess}, complaints


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


def _ranking(elpds: Mapping[str, Any], sentences: list[str]) -> Any:
    """Return ArviZ's table of the candidates by LOO, the best first, or None of less than two."""
    if len(elpds) < 2:
        return None
    # the weights exponentiate log densities, which may underflow; what all candidates share of a row is of no effect
    shared = np.max([elpd.elpd_i.values for elpd in elpds.values()], axis=0)
    shifted = {
        name: replace(elpd, elpd=float(elpd.elpd) - shared.sum(), elpd_i=elpd.elpd_i - shared)
        for name, elpd in elpds.items()
    }
    with _in_words(sentences, "LOO"):
        # arviz-stats 0.8 sorts a table of its own in place, which pandas 3.1 announces to drop
        warnings.filterwarnings("ignore", "The inplace keyword in DataFrame.sort_values", DeprecationWarning)
        return _arviz_stats().compare(shifted)


def _num_empty(joint: Any) -> dict[str, Tensor]:
    """Return how many components are expected to have no row, given the parameters."""
    return {"empty": torch.log1p(-joint.rows.softmax(1)).sum(0).exp().sum()}


def _by_name(prior: Any) -> Any:
    """Return hyperparameters by name, those of parts too."""
    return {name: _by_name(value) for name, value in prior._asdict().items()} if hasattr(prior, "_asdict") else prior


def _disagreements(rows: Sequence[Row], ranking: Any) -> list[str]:
    """Return which criterion prefers which candidate, where they do not all agree, and what is as good as a draw."""
    sentences = []
    best = {name: row.name for name in CRITERIA if (row := best_row(rows, name)) is not None}
    if len(set(best.values())) > 1:
        parts = []
        for name in dict.fromkeys(best.values()):
            own = [criterion for criterion, preferred in best.items() if preferred == name]
            parts.append(f"{_prefer(own)} {name}")
        sentences.append(f"the criteria disagree: {'; '.join(parts)}")
    if ranking is not None:
        gap, error = ranking["elpd_diff"].iloc[1], ranking["dse"].iloc[1]
        if gap < 2 * error:
            sentences.append(
                f"LOO does not tell {ranking.index[0]} from {ranking.index[1]}: {gap:.1f} apart, with a standard error "
                f"of {error:.1f}"
            )
    evidences = [(row.log_evidence, row.log_evidence_standard_error or 0.0, row.name) for row in rows]
    ordered = sorted(((-value, error, name) for value, error, name in evidences if value is not None))
    if len(ordered) > 1:
        (first, first_error, best_name), (second, second_error, second_name) = ordered[:2]
        gap, error = second - first, math.hypot(first_error, second_error)
        if gap < 2 * error:
            sentences.append(
                f"the log evidences of {best_name} and {second_name} are {gap:.2f} apart with a standard error of "
                f"{error:.2f}: this run does not say which is the larger; raise num_replicates or num_moves of the "
                "evidence"
            )
    if ordered and (without := [name for value, _, name in evidences if value is None]):
        sentences.append(f"{', '.join(without)} has no evidence, and the probabilities are among the others")
    return sentences


def _prefer(criteria: Sequence[str]) -> str:
    """Return criteria in a list with their verb."""
    listed = " and ".join(filter(None, [", ".join(criteria[:-1]), criteria[-1]]))
    return f"{listed} {'prefers' if len(criteria) == 1 else 'prefer'}"


def _same(left: Any, right: Any) -> bool:
    """Whether two families are one: the same module, or instances with the same settings, which may be tensors."""
    if left is right or not is_dataclass(left) or type(left) is not type(right):
        return left is right
    return bool(plain(vars(left)) == plain(vars(right)))


def _gaps(rows: Sequence[Row], candidates: Sequence[Candidate], x: Tensor) -> list[str]:
    """Return what the candidates leave open: a likelihood that falls as K grows, a best K that is the largest tried."""
    sentences = []
    families: list[tuple[Any, list[tuple[int, Row]]]] = []
    for row, candidate in zip(rows, candidates, strict=True):
        if isinstance(candidate.num_components, int):
            members = next((members for family, members in families if _same(family, candidate.family)), None)
            if members is None:
                families.append((candidate.family, members := []))
            members.append((candidate.num_components, row))
    for family, members in families:
        free = example_params(family, 1, x)[1]
        contained = any(name.endswith("weights") for name in free)  # a weight of 0 leaves a component out
        ladder = sorted(members, key=lambda member: member[0])
        known = [(size, row.log_likelihood, row.name) for size, row in ladder if row.log_likelihood is not None]
        for (few, lower, before), (many, higher, after) in itertools.pairwise(known):
            if contained and few < many and higher < lower - 1e-8 * abs(lower):
                sentences.append(
                    f"the log likelihood falls from {before} to {after}, which contains it: EM has missed "
                    "the highest maximum; raise num_starts"
                )
        largest = ladder[-1][0]
        if ladder[0][0] < largest:
            last = {row.name for size, row in ladder if size == largest}
            leaders = {name: leader.name for name in CRITERIA if (leader := best_row(rows, name)) is not None}
            best = {criterion: name for criterion, name in leaders.items() if name in last}
            for preferred in dict.fromkeys(best.values()):
                at_end = [criterion for criterion, name in best.items() if name == preferred]
                sentences.append(f"{_prefer(at_end)} {preferred}, the largest K of its family here: try larger ones")
    return sentences
