"""Candidate mixtures for one data set, side by side: likelihood, information criteria, LOO, evidence, and how sure."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import Tensor

from mixproof.inference import checkpoint as checkpoints
from mixproof.inference.comparison_report import UNFOLDED, as_tables, check_matplotlib, plot_rows, prior_in_words
from mixproof.inference.comparison_study import Candidate, Row, Runs, Study, in_words, study_of
from mixproof.inference.comparison_verdicts import disagreements, gaps
from mixproof.inference.diagnostics import import_arviz
from mixproof.inference.em import Fit
from mixproof.inference.evidence import NUM_CHAINS, log_evidence, posterior_probabilities
from mixproof.inference.particles import check_settings
from mixproof.inference.validation import (
    check_integer,
    check_num_components,
    check_proper_prior,
    check_rows,
    data_support,
    example_params,
)
from mixproof.inference.verification.report import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from xarray import DataTree


MIN_DRAWS = 100
"""Of all chains: a tail of 5, the least to fit, is a fifth of 25 draws, and chains are cut in halves for R-hat."""

EVIDENCE_SETTINGS = {
    each.name for each in signature(log_evidence).parameters.values() if each.kind is each.KEYWORD_ONLY
} - {"seed", "draws", "family", "checkpoint", "progress"}
"""What ``compare`` leaves to its caller of ``log_evidence``."""


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
    import_arviz("arviz_stats")
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
    runs = Runs(num_starts, max_steps, sampling, dict(evidence or {}), progress, folder)
    seeds = torch.randint(2**31, (len(candidates),), generator=torch.Generator().manual_seed(seed)).tolist()
    studies: list[Study] = []
    sentences: list[str] = []
    for number, (candidate, own_seed) in enumerate(zip(candidates, seeds, strict=True)):
        if progress:
            words = f"{candidate.name}: {number + 1} of {len(candidates)}"
            Console(stderr=True).print(words, highlight=False, markup=False)
        try:
            studies.append(study_of(candidate, number + 1, x, own_seed, runs))
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
    sentences += [*disagreements(rows, ranking), *gaps(rows, done, x)]
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
        try:
            check_proper_prior(candidate.family, candidate.prior, example_params(candidate.family, size, rows)[0])
        except (TypeError, ValueError) as error:
            raise type(error)(f"{candidate.name}: {error}") from error
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
    of_particles = ("num_replicates", "num_chains", "num_moves", "efficiency")
    try:
        check_settings(**{name: evidence.get(name) for name in of_particles})
    except (TypeError, ValueError) as error:
        raise type(error)(f"evidence: {error}") from error
    if (num_replicates := evidence.get("num_replicates") or NUM_CHAINS) < NUM_CHAINS:
        raise ValueError(
            f"num_replicates of evidence must be at least {NUM_CHAINS}, the groups that R-hat compares, not "
            f"{num_replicates}"
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
    with in_words(sentences, "LOO"):
        # arviz-stats 0.8 sorts a table of its own in place, which pandas 3.1 announces to drop
        warnings.filterwarnings("ignore", "The inplace keyword in DataFrame.sort_values", DeprecationWarning)
        return import_arviz("arviz_stats").compare(shifted)


def _by_name(prior: Any) -> Any:
    """Return hyperparameters by name, those of parts too."""
    return {name: _by_name(value) for name, value in prior._asdict().items()} if hasattr(prior, "_asdict") else prior
