"""Exercise Sheet 12 on clustering, every displayed formula of both transcriptions as a claim with a verdict."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import pkgutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from types import ModuleType

import torch

from mixproof.inference.random_state import seeded
from mixproof.inference.verification import problems as package
from mixproof.inference.verification.claim import Claim, Outcome, Problem, Verdict, Verification
from mixproof.inference.verification.report import Report


def _modules() -> list[ModuleType]:
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def problems() -> list[Problem]:
    """Return the problems in the order of the sheet, the end-to-end claims last."""
    return sorted((module.PROBLEM for module in _modules()), key=lambda problem: (problem.id == "E", problem.id))


def claims(select: Iterable[str] = ()) -> list[Claim]:
    """Return the claims in the order of the sheet.

    Args:
        select: problem ids (``P3``) or claim ids (``P3.12a``); all if there are none.

    Raises:
        ValueError: a selection matches no claim.
    """
    found = {module.PROBLEM.id: module.CLAIMS for module in _modules()}
    everything = [claim for problem in problems() for claim in found[problem.id]]
    chosen = set(select)
    if unknown := chosen - {claim.id for claim in everything} - found.keys():
        raise ValueError(
            f"no claim or problem is called {', '.join(sorted(unknown))}; the problems are {', '.join(found)}"
        )
    return [claim for claim in everything if not chosen or {claim.id, claim.problem} & chosen]


def judge(claim: Claim, seed: int, memory: dict[Verification, Report] | None = None) -> Outcome:
    """Return the verdict on one claim.

    Args:
        claim: the claim.
        seed: seeds every random point and draw; the same seed gives the same report.
        memory: reports already made at this seed, which claims that share a verification share; updated in place.
    """
    memory = {} if memory is None else memory
    started = time.perf_counter()
    reports: list[Report] = []

    def verify(verification: Verification, what: str) -> Report:
        if verification not in memory:
            memory[verification] = verification(seed=seed)
        reports.append(replace(memory[verification], subject=f"{claim.id} {what}"))
        return reports[-1]

    verdict: Verdict
    if claim.check is None:
        verdict = "illegible"
    else:
        report = verify(claim.check, "as printed" if claim.source else "end to end")
        if report.ok:
            refuted_without = (
                claim.without is not None and verify(claim.without, "without its condition").verdict == "refuted"
            )
            verdict = "holds if" if refuted_without else "holds"
        elif report.verdict == "undecided":
            verdict = "undecided"
        else:
            mended = claim.corrected is not None and verify(claim.corrected, "as corrected").ok
            verdict = "refuted as printed" if mended else "refuted"
    return Outcome(claim, verdict, tuple(reports), time.perf_counter() - started)


def verify_sheet(
    seed: int,
    select: Iterable[str] = (),
    progress: Callable[[Outcome], None] | None = None,
    num_workers: int | None = None,
) -> list[Outcome]:
    """Judge the claims of the sheet, in the order of the sheet.

    With several processes, a script must call it under ``if __name__ == "__main__"``, since each process imports it.

    Args:
        seed: seeds every random point and draw; the same seed gives the same report, whatever the number of workers.
        select: problem ids (``P3``) or claim ids (``P3.12a``); all if there are none.
        progress: called with each outcome as it comes.
        num_workers: the number of processes; None takes one for each core, and 1 stays in this process.
    """
    chosen = claims(select)
    groups: dict[str, list[str]] = {}
    for claim in chosen:
        groups.setdefault(_group(claim), []).append(claim.id)
    workers = min(num_workers or os.cpu_count() or 1, len(groups))
    by_id = {claim.id: claim for claim in chosen}
    outcomes: dict[str, Outcome] = {}

    def collect(results: Iterable[tuple[str, Verdict, tuple[Report, ...], float]]) -> None:
        for claim_id, verdict, reports, seconds in results:
            outcomes[claim_id] = Outcome(by_id[claim_id], verdict, reports, seconds)
            if progress is not None:
                progress(outcomes[claim_id])

    if workers == 1:
        for ids in groups.values():
            collect(pickle.loads(_judge_group(ids, seed)))
    else:
        heavy_first = sorted(groups.values(), key=lambda ids: not ids[0].startswith("E"))
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            tasks = [pool.submit(_judge_group, ids, seed) for ids in heavy_first]
            for task in as_completed(tasks):
                collect(pickle.loads(task.result()))
    return [outcomes[claim.id] for claim in chosen]


def _group(claim: Claim) -> str:
    """Return what claims share: a formula's check with the other transcription, a family's fit with its other
    results."""
    return claim.id.split(".")[2] if claim.problem == "E" else claim.id[:-1]


def _judge_group(ids: list[str], seed: int) -> bytes:
    """Judge claims in one thread, so that sums are added in the same order everywhere, and leave the global state as
    it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    memory: dict[Verification, Report] = {}
    results = []
    try:
        for claim in claims(ids):
            with seeded(seed):
                outcome = judge(claim, seed, memory)
            results.append((claim.id, outcome.verdict, outcome.reports, outcome.seconds))
    finally:
        torch.set_num_threads(threads)
    return pickle.dumps(results)  # by value: torch would send tensors between processes as open files
