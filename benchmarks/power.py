"""How much each check sees: every derivation of the fault bank by every check.

Prints a line for each faulty derivation and the share of the faults that each check sees alone, with the two usual
tests as a baseline: monotone ascent (50 passes from the given parameters, the reported log likelihood must not fall)
and parameter recovery (30 passes on simulated rows from the truth, no parameter further than 4 standard errors from
it). Then the alarms on right derivations, and how long a verdict takes. Exit status 1 if ``verify_em`` misses or
misplaces a fault, or alarms on a right derivation.

    python benchmarks/power.py [--family poisson] [--workers 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pyro
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from mixproof.inference.enumeration import bind
from mixproof.inference.verification.em import verify_subject
from mixproof.inference.verification.fault_bank import entries
from mixproof.inference.verification.report import blamed
from mixproof.inference.verification.subject import Subject
from mixproof.inference.verification.trial import StepError, Trial

SEED = 0
NUM_PASSES = 50
NUM_RECOVERY_PASSES = 30
NUM_ROWS = 1000
STANDARD_ERRORS = 4.0
COLUMNS = {
    "E": "responsibilities = enumeration",
    "Q": "grad Q = 0 at random responsibilities, without and with the prior",
    "fix": "a maximum is a fixed point (of steps that take the current parameters)",
    "log p": "log likelihood = enumeration",
    "ascent": "baseline: the reported log likelihood rises over 50 passes",
    "recovery": "baseline: 30 passes on 1,000 simulated rows stay within 4 standard errors of the truth",
    "verdict": "verify_em names the right step, and the right site",
}


def main() -> int:
    """Run the bank and print the matrix; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", help="only this file of the bank; may be repeated")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write every outcome there")
    options = parser.parse_args()
    bank = entries()
    if unknown := set(options.family or ()) - set(bank):
        parser.error(f"the bank has no {', '.join(sorted(unknown))}; it has {', '.join(bank)}")
    jobs = [(family, i) for family in options.family or bank for i in range(len(bank[family]))]
    start = time.perf_counter()
    rows = run(jobs, options.workers)
    seconds = time.perf_counter() - start
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(matrix(rows))
    console.print(summary(rows))
    good = all(row["verdict"] and row["blind"] is not False for row in rows)
    judged = "all judged right" if good else "NOT ALL JUDGED RIGHT"
    console.print(f"{len(rows)} derivations in {seconds:.0f} s by {options.workers} processes; {judged}")
    return 0 if good else 1


def run(jobs: list[tuple[str, int]], workers: int) -> list[dict[str, Any]]:
    """Return the outcome of every job, in order, by several processes of one thread."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(outcome, *job): job for job in jobs}
        console = Console(stderr=True)
        done = {
            futures[future]: future.result()
            for future in track(as_completed(futures), "the bank", len(futures), console=console, transient=True)
        }
    return [done[job] for job in jobs]


def outcome(family: str, index: int) -> dict[str, Any]:
    """Return what every check says of one derivation: True where it sees a fault, None where it was not run."""
    entry = entries()[family][index]
    start = time.perf_counter()
    report = verify_subject(entry.subject, seed=SEED)
    seconds = time.perf_counter() - start
    failed = {check.name: not check.passed for check in report.checks}
    site = blamed(report.checks)
    return {
        "family": family,
        "name": entry.name,
        "right": entry.is_right,
        "expected": entry.verdict,
        "got": report.verdict,
        "site": (site.counterexample or {}).get("site", "") if site is not None else "",
        "hints": list(report.hints),
        "snippet": bool(report.smallest),
        "seconds": seconds,
        "E": failed.get("responsibilities = enumeration"),
        "Q": next((not check.passed for check in report.checks if check.name.startswith("grad")), None),
        "fix": failed.get("a maximum is a fixed point"),
        "log p": failed.get("log likelihood = enumeration"),
        "ascent": falls(entry.subject),
        "recovery": strays(entry.subject),
        "verdict": entry.agrees(report),
        "blind": None if entry.blind is None else verify_subject(entry.blind, seed=SEED).ok,
    }


def falls(subject: Subject) -> bool:
    """Whether the log likelihood that the person reports, or without one the program's, falls in some pass."""
    own = Trial(subject)
    params, trace = dict(own.params), []
    try:
        for _ in range(NUM_PASSES):
            trace.append(
                own.reported(params).item() if subject.log_likelihood else own.joint(params).log_likelihood.item()
            )
            params = own.m_step(own.responsibilities(params), params)
    except (StepError, ValueError, RuntimeError):
        return True
    drops = [before - after for before, after in itertools.pairwise(trace)]
    return not all(drop <= 1e-9 * (1 + abs(trace[0])) for drop in drops)


def strays(subject: Subject) -> bool | None:
    """Whether the person's EM, on rows simulated from the program and started at the truth, leaves it too far."""
    data = simulated(subject)
    if data is None:
        return None
    try:
        own = Trial(Subject(subject.model, subject.params, data, subject.e_step, subject.m_step))
        params = dict(own.params)
        for _ in range(NUM_RECOVERY_PASSES):
            params = own.m_step(own.responsibilities(params), params)
        u = own.unconstrained(params)[0]
    except (StepError, ValueError, RuntimeError):
        return True
    errors = standard_errors(own)
    return None if errors is None else not bool(((u - own.origin).abs() <= STANDARD_ERRORS * errors).all())


def simulated(subject: Subject) -> tuple[Any, ...] | None:
    """Return data like the subject's with more rows, its observed arguments drawn from the program."""
    own = Trial(subject)
    num = len(own.joint(own.params).rows)
    tiled = tuple(
        argument.repeat(math.ceil(NUM_ROWS / num), *[1] * (argument.ndim - 1))
        if isinstance(argument, Tensor) and argument.ndim and len(argument) == num
        else argument
        for argument in subject.data
    )
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(SEED)
        program = bind(subject.model, own.params)
        observed: Any = pyro.poutine.trace(program).get_trace(*tiled)
        drawn: Any = pyro.poutine.trace(bind(pyro.poutine.uncondition(subject.model), own.params)).get_trace(*tiled)
    found = list(tiled)
    for name, site in observed.nodes.items():
        for i, argument in enumerate(tiled):
            if not isinstance(argument, Tensor):
                continue
            if site["type"] == "sample" and site["is_observed"] and site["value"] is argument:
                found[i] = drawn.nodes[name]["value"].to(argument.dtype)
    changed = any(new is not old for new, old in zip(found, tiled, strict=True))
    return tuple(found) if changed else None


def standard_errors(own: Trial) -> Tensor | None:
    """Return the standard errors (P,) of the unconstrained coordinates by the observed information at the truth."""

    def log_likelihood(u: Tensor) -> Tensor:
        return own.joint(own.coordinates(u)).log_likelihood

    hessian = torch.autograd.functional.hessian(log_likelihood, own.origin)
    if not hessian.isfinite().all():
        return None
    return torch.linalg.pinv(-hessian, hermitian=True).diagonal().clamp_min(0).sqrt()


def matrix(rows: list[dict[str, Any]]) -> Table:
    """Return a line for each fault: which checks see it."""
    table = Table(title="faults by check: x sees it, . does not", box=None, pad_edge=False)
    for column in ("family", "fault", *COLUMNS):
        table.add_column(column, no_wrap=True)
    for row in rows:
        if not row["right"]:
            marks = [" " if row[column] is None else "x" if row[column] else "." for column in COLUMNS]
            table.add_row(row["family"], row["name"], *marks)
    return table


def summary(rows: list[dict[str, Any]]) -> Table:
    """Return, for each check, how many faults it sees of those it was run on, and its alarms on right derivations."""
    faults, right = [row for row in rows if not row["right"]], [row for row in rows if row["right"]]
    table = Table(box=None, pad_edge=False)
    for column in ("check", "what", "sees of the faults", "alarms on right ones"):
        table.add_column(column, no_wrap=column != "what", justify="left" if column in ("check", "what") else "right")
    for column, says in COLUMNS.items():
        seen = sum(bool(row[column]) for row in faults)
        alarms = sum(not row[column] if column == "verdict" else bool(row[column]) for row in right)
        table.add_row(
            column, says, f"{seen} of {len(faults)}, {seen / max(len(faults), 1):.1%}", f"{alarms} of {len(right)}"
        )
    blind = [row["blind"] for row in rows if row["blind"] is not None]
    hinted = sum(bool(row["hints"]) for row in faults)
    seconds = sorted(row["seconds"] for row in rows)
    table.add_row(
        "blind", "faults passed as right in the special case that hides them", f"{sum(blind)} of {len(blind)}", ""
    )
    table.add_row("hint", "faults with a measured hint", f"{hinted} of {len(faults)}", "")
    table.add_row(
        "snippet",
        "faults with a small counterexample to run",
        f"{sum(row['snippet'] for row in faults)} of {len(faults)}",
        "",
    )
    table.add_row(
        "time", "seconds for a verdict: median, largest", f"{seconds[len(seconds) // 2]:.2f}, {seconds[-1]:.2f}", ""
    )
    return table


if __name__ == "__main__":
    sys.exit(main())
