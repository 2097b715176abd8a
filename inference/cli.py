"""The command line: ``mixproof verify``, ``mixproof fit``, ``mixproof compare`` and ``mixproof sample``.

Results go to stdout, progress to stderr. Exit code 0: it holds, or it is done; 1: refuted; 2: bad input.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from mixproof.inference import comparison, tables
from mixproof.inference.checkpoint import CheckpointError
from mixproof.inference.comparison_report import check_matplotlib
from mixproof.inference.dataset import Dataset, read_at_once, sample_rows, share
from mixproof.inference.distributed import Group, is_first, rank_and_size, together
from mixproof.inference.em import em
from mixproof.inference.sampling import sample as draw
from mixproof.inference.trees import tree_to
from mixproof.inference.validation import as_floating, check_params
from mixproof.inference.verification import exercise_sheet, sheet_report
from mixproof.inference.verification.em import verify_subject
from mixproof.inference.verification.report import Report, plain
from mixproof.inference.verification.subject import load_subject
from mixproof.models import families
from mixproof.models.initial import check_num_components

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

ROWS_AT_ONCE = 1_000_000
ROWS_FOR_STARTS = 100_000
MAX_ENTRIES_IN_MEMORY = 1 << 27
"""1 GiB in float64, of each process; more rows than that are read from disk in each step."""

Method = Literal["smc", "bridge"]
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**32 - 1, help="Seeds every random point and draw; the same seed gives the same result."),
]
Device = Annotated[str, typer.Option(help="The torch device to compute on, cpu or cuda.")]


@app.callback()
def main() -> None:
    """Verify, fit, compare and sample mixture models."""


@app.command()
def verify(
    subjects: Annotated[
        list[str] | None,
        typer.Argument(
            help="Your own derivations, as my_model.py:subject: objects with model, params, data, e_step, m_step "
            "(and log_likelihood). Without one, Exercise Sheet 12 is verified.",
        ),
    ] = None,
    problem: Annotated[
        list[str] | None, typer.Option(help="A problem (P3) or a claim (P3.12a); may be repeated.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report there as JSON.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write the report there as a web page.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one for each core by default.")] = None,
    seed: Seed = 0,
) -> None:
    """Check every formula of Exercise Sheet 12, or your own EM. Exit code 1 if a verdict is not as it should be."""
    with _errors():
        for file in (json_file, html_file):
            if file is not None and not file.parent.is_dir():
                raise ValueError(f"there is no folder {file.parent} to write {file.name} to: make it first")
        if subjects:
            if problem:
                raise ValueError("--problem selects from the exercise sheet: leave it out beside a subject of your own")
            reports = _verify_subjects(subjects, seed)
            if json_file is not None:
                document = [report.to_dict() for report in reports]
                json_file.write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")
            if html_file is not None:
                html_file.write_text(sheet_report.reports_to_html(reports, seed), encoding="utf-8")
    if subjects:
        _stdout().print(*reports, sep="\n\n")
        raise typer.Exit(0 if all(report.ok for report in reports) else 1)
    with _errors():
        total = len(exercise_sheet.claims(problem or ()))
        with _progress() as progress:
            task = progress.add_task("verifying", total=total)
            outcomes = exercise_sheet.verify_sheet(
                seed,
                problem or (),
                lambda outcome: progress.update(task, advance=1, description=outcome.claim.id),
                workers,
            )
        if json_file is not None:
            json_file.write_text(sheet_report.to_json(outcomes, seed), encoding="utf-8")
        if html_file is not None:
            html_file.write_text(sheet_report.to_html(outcomes, exercise_sheet.problems(), seed), encoding="utf-8")
    _stdout().print(sheet_report.to_table(outcomes))
    raise typer.Exit(0 if all(outcome.ok for outcome in outcomes) else 1)


def _verify_subjects(references: list[str], seed: int) -> list[Report]:
    with _progress() as progress:
        tracked = progress.track(references, description="verifying")
        return [verify_subject(load_subject(reference), seed=seed, name=reference) for reference in tracked]


@app.command()
def sample(
    family: Annotated[str, typer.Argument(help="A family, such as gaussian_full.")],
    params: Annotated[Path, typer.Option(help="JSON or safetensors: the family's parameters and settings by name.")],
    num_samples: Annotated[int, typer.Option("-n", "--num-samples", help="How many rows.")],
    out: Annotated[Path, typer.Option(help="Where to write them: .csv, .parquet, .npz or .safetensors.")],
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Generate rows from a mixture: columns x1 to xD, and z, the component that each row came from."""
    with _errors():
        chosen, values = _family(family, tables.read_params(params))
        checked = check_params(chosen, values)
        target = _device(device)
        checked = tree_to(checked, target)
        generator = torch.Generator(target).manual_seed(seed)
        first = draw(chosen, checked, min(num_samples, ROWS_AT_ONCE), generator=generator)
        with tables.writer(out) as write, _progress() as progress:
            task = progress.add_task("sampling", total=num_samples)
            write(*first)
            for start in range(ROWS_AT_ONCE, num_samples, ROWS_AT_ONCE):
                progress.update(task, completed=start)
                write(*draw(chosen, checked, min(ROWS_AT_ONCE, num_samples - start), generator=generator))


@app.command()
def fit(
    data: Annotated[
        Path, typer.Argument(help="The rows: .csv, .parquet, a folder of .parquet, .npy, .npz or .safetensors.")
    ],
    family: Annotated[str, typer.Option(help="A family, such as gaussian_full.")],
    components: Annotated[str, typer.Option("-k", "--components", help="K; of two latents both, as 3,2.")],
    settings: Annotated[Path | None, typer.Option(help="JSON with the family's settings, where it has any.")] = None,
    starts: Annotated[int, typer.Option(min=1, help="Starts by k-means++; the best fit is kept.")] = 10,
    max_steps: Annotated[int, typer.Option(min=1, help="The largest number of EM steps from each.")] = 500,
    rtol: Annotated[float, typer.Option(min=0, help="The relative change of the log likelihood to stop at.")] = 1e-10,
    weights: Annotated[str | None, typer.Option(help="The column of row weights: how often each row counts.")] = None,
    accelerate: Annotated[
        Literal["anderson"] | None, typer.Option(help="Fewer passes over the data to the same limit.")
    ] = None,
    missing: Annotated[bool, typer.Option("--missing", help="Empty entries and NaN are missing at random.")] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Go on from there if the run was interrupted; each start writes a file of this name and .i."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the parameters there: .json or .safetensors.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Fit a mixture by EM and print its parameters.

    Data that do not fit in memory are read from disk in each step. Under torchrun each process takes its share of them.
    All columns are features but that of the weights, the index of a pandas table and, beside nothing but x1 to xD, z.
    """
    with _errors(), _processes(device) as (group, target):
        with together(group, target):
            chosen, rest = _family(family, tables.read_params(settings) if settings else {})
            if rest:
                raise ValueError(f"{settings} names {', '.join(rest)}, which are no settings of {family}")
            if out is not None:
                tables.check_params_path(out)
            rows = share(tables.open_rows(data, weights), *rank_and_size(group))
            dataset = Dataset(chosen, rows, weights, missing=missing)
            whole = read_at_once(dataset, MAX_ENTRIES_IN_MEMORY if getattr(chosen, "additive", False) else None)
        if whole is not None:
            dataset = Dataset(chosen, whole.x.to(target), whole.weights, missing=missing)
        drawn, counts = sample_rows(dataset, ROWS_FOR_STARTS, torch.Generator().manual_seed(seed), group)
        sample = _without_gaps(drawn, counts)
        generator = torch.Generator().manual_seed(seed)
        num_components = _num_components(components, len(sample))
        best, failures, told = None, [], []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for start in range(starts):
                if starts > 1 and is_first(group):
                    Console(stderr=True).print(f"start {start + 1} of {starts}", highlight=False)
                caught.clear()
                try:
                    found = em(
                        chosen,
                        rows if whole is None else whole.x,
                        chosen.init_params(sample, num_components, generator, weights=counts),
                        weights=weights if whole is None else whole.weights,
                        max_steps=max_steps,
                        rtol=rtol,
                        accelerate=accelerate,
                        missing=missing,
                        device=target,
                        group=group,
                        checkpoint=checkpoint and checkpoint.with_name(f"{checkpoint.name}.{start + 1}"),
                        checkpoint_every=1,  # who asks for one has long steps
                        progress=True,
                    )
                except CheckpointError:
                    raise
                except ValueError as error:
                    failures.append(str(error))
                    continue
                if best is None or found.log_lik[-1] > best.log_lik[-1]:
                    best, told = found, [str(warning.message) for warning in caught]
        if best is None:
            raise ValueError(f"none of {starts} starts survived; the last: {failures[-1]}")
        if not is_first(group):
            return
        result = {
            "family": family,
            "settings": plain(_settings_of(chosen)),
            "params": plain(best.params._asdict()),
            "log_lik": best.log_lik[-1].item(),
            "converged": best.converged,
            "num_steps": best.num_steps,
            "failed_starts": len(failures),
        }
    for message in told:
        Console(stderr=True).print(f"warning: {message}", style="yellow", highlight=False, soft_wrap=True)
    if failures:
        Console(stderr=True).print(
            f"warning: {len(failures)} of {starts} starts failed: {failures[-1]}", style="yellow"
        )
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        table = Table("", "", box=None, show_header=False)
        for name, value in best.params._asdict().items():
            table.add_row(name, str(value.cpu().numpy()))
        table.add_row("log likelihood", f"{best.log_lik[-1].item():.6f}")
        table.add_row("steps", f"{best.num_steps}{'' if best.converged else ' (not converged)'}")
        _stdout().print(table)
    if out is not None:
        with _errors():
            found_params = {name: value.cpu() for name, value in best.params._asdict().items()}
            tables.write_params(out, {**_settings_of(chosen), **found_params})


@app.command()
def compare(
    data: Annotated[
        Path, typer.Argument(help="The rows: .csv, .parquet, a folder of .parquet, .npy, .npz or .safetensors.")
    ],
    family: Annotated[list[str], typer.Option(help="A family, such as gaussian_full; may be repeated.")],
    components: Annotated[
        list[str],
        typer.Option("-k", "--components", help="K, or 1-6 for all from 1 to 6; of two latents, 3,2. May be repeated."),
    ],
    prior: Annotated[
        Path | None,
        typer.Option(
            help="JSON: hyperparameters by name, under the name of each family; a concentration that is a number is "
            "for all components. A family left out has the weakly informative prior on the scale of the data."
        ),
    ] = None,
    settings: Annotated[Path | None, typer.Option(help="JSON with the settings of families that have any.")] = None,
    starts: Annotated[int, typer.Option(min=1, help="Starts of EM by k-means++; the best fit is kept.")] = 10,
    max_steps: Annotated[int, typer.Option(min=1, help="The largest number of EM steps from each start.")] = 2000,
    method: Annotated[
        Method | None,
        typer.Option(
            help="How the evidence is estimated: smc, sequential Monte Carlo alone; bridge, from its last particles. "
            "By default bridge."
        ),
    ] = None,
    replicates: Annotated[int, typer.Option(min=4, help="Replicates of the particles, for the evidence.")] = 32,
    particles: Annotated[int | None, typer.Option(min=2, help="Particles of each replicate.")] = None,
    moves: Annotated[int | None, typer.Option(min=1, help="Moves of each particle after a resampling.")] = None,
    chains: Annotated[int, typer.Option(min=4, help="Gibbs chains from the particles; a multiple of 4.")] = 1024,
    draws: Annotated[int, typer.Option(min=1, help="Draws kept of each; 100 of all chains at least.")] = 8,
    warmup: Annotated[int, typer.Option(min=0, help="Draws of each before them.")] = 100,
    plot: Annotated[Path | None, typer.Option(help="Draw the table there: .png, .pdf or .svg.")] = None,
    save: Annotated[
        Path | None, typer.Option(help="A folder for the draws of each candidate, a netCDF file for ArviZ each.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A folder for the states of the runs; if it holds those of this, they go on.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    seed: Seed = 0,
) -> None:
    """Compare mixtures on one data set: BIC, AIC, ICL, LOO, evidence, posterior probability, stacking weight.

    All columns of the data are features but the index of a pandas table and, beside nothing but x1 to xD, z.
    Prints the priors besides, on which evidence and probability depend. Ctrl-C keeps the candidates done so far.
    """
    with _errors():
        if plot is not None:
            if plot.suffix not in (".png", ".pdf", ".svg"):
                raise ValueError(f"a plot is drawn to .png, .pdf or .svg, not to {plot.name}")
            if not plot.parent.is_dir():
                raise ValueError(f"there is no folder {plot.parent} to draw {plot.name} to: make it first")
            check_matplotlib()
        if save is not None:
            save.mkdir(exist_ok=True)  # found now if it cannot be made
        candidates, rows = _candidates(data, family, components, prior, settings)
        evidence = {"method": method, "num_replicates": replicates, "num_chains": particles, "num_moves": moves}
        found = comparison.compare(
            candidates,
            rows,
            seed=seed,
            num_starts=starts,
            max_steps=max_steps,
            num_chains=chains,
            num_draws=draws,
            num_warmup=warmup,
            evidence={name: value for name, value in evidence.items() if value is not None},
            checkpoint=checkpoint,
            progress=True,
        )
    if as_json:
        typer.echo(json.dumps(plain(found.to_dict()), indent=1, allow_nan=False))
    elif sys.stdout.isatty():
        _stdout().print(found)
    else:
        typer.echo(str(found))
    with _errors():
        if plot is not None:
            found.plot().savefig(plot)
        if save is not None:
            for name, tree in found.trees.items():
                tree.to_netcdf(save / f"{name.replace(' = ', '').replace(', ', '_').replace(' ', '_')}.nc")
    if found.interrupted:
        raise typer.Exit(130)


def _candidates(
    data: Path, names: list[str], components: list[str], prior: Path | None, settings: Path | None
) -> tuple[list[comparison.Candidate], Tensor]:
    """Return a candidate for each family and number of components, and the rows (N, D)."""
    given = tables.read_params(settings) if settings else {}
    priors = tables.read_params(prior) if prior else {}
    if unknown := sorted(set(priors) - set(names)):
        raise ValueError(f"{prior} names {', '.join(unknown)}, and the families are {', '.join(names)}")
    chosen, unused = {}, set(given)
    for name in names:
        chosen[name], rest = _family(name, given)
        unused &= rest.keys()
    if unused:
        raise ValueError(f"{settings} names {', '.join(sorted(unused))}, which are no settings of {', '.join(names)}")
    whole = read_at_once(Dataset(chosen[names[0]], tables.open_rows(data)))
    assert whole is not None
    x = whole.x.to(torch.float64)
    sizes = dict.fromkeys(size for text in components for size in _sizes(text, len(x)))
    candidates = []
    for name, family in chosen.items():
        for size in sizes:
            called = f"{name} K = {size if isinstance(size, int) else ', '.join(map(str, size))}"
            if name in priors:
                own = _prior(family.Prior, priors[name], size, f"the prior of {name}")
            elif hasattr(family, "weakly_informative_prior"):
                check_num_components(size, len(x))
                own = family.weakly_informative_prior(x, size)
            else:
                raise ValueError(
                    f"the data do not scale a prior of {name}, whose parts they do not tell apart: give one by --prior"
                )
            candidates.append(comparison.Candidate(family, size, own, called))
    return candidates, x


def _sizes(text: str, num_rows: int) -> list[int | tuple[int, ...]]:
    """Return all K from 1 to 6 for 1-6, and what ``_num_components`` reads otherwise."""
    if found := re.fullmatch(r"(\d+)-(\d+)", text):
        first, last = (check_num_components(int(end), num_rows) for end in found.groups())
        if first > last:
            raise ValueError(f"-k {text} counts down: write {last}-{first}")
        return list(range(first, last + 1))
    return [_num_components(text, num_rows)]


def _prior(kind: Any, given: Any, size: int | tuple[int, ...], words: str) -> Any:
    """Return a prior from its hyperparameters by name, a concentration repeated for K components."""
    if not isinstance(given, dict) or given.keys() != set(kind._fields):
        raise ValueError(f"{words} must be an object with the fields {', '.join(kind._fields)}, not {given!r}")
    values = {}
    for place, (name, value) in enumerate((name, given[name]) for name in kind._fields):
        if isinstance(value, dict):  # the prior of a part
            part = size[place] if isinstance(size, tuple) else size
            values[name] = _prior(get_type_hints(kind)[name], value, part, f"{name} of {words}")
        elif name == "concentration" and isinstance(value, int | float):
            values[name] = [float(value)] * (size if isinstance(size, int) else 1)
        else:
            values[name] = value
    return kind(**values)


def _family(name: str, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the family with its settings taken from what a file gives, and the rest of it."""
    known = families()
    if name not in known:
        raise ValueError(f"there is no family {name!r}; the families are {', '.join(known)}")
    found = known[name]
    if not isinstance(found, type):
        return found, given
    hints = get_type_hints(found)
    settings, rest = {}, dict(given)
    for field in (field.name for field in dataclasses.fields(found)):
        if field not in rest:
            raise ValueError(f"{name} needs its setting {field} beside the parameters in the file")
        settings[field] = _setting(field, rest.pop(field), hints[field])
    return found(**settings), rest


def _setting(name: str, value: Any, kind: Any) -> Any:
    """Return a setting as the family annotates it, a number or the parameters of another family."""
    if kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"the setting {name} must be a number, not {value!r}")
        return float(value)
    fields = ", ".join(kind._fields)
    if not isinstance(value, dict) or value.keys() != set(kind._fields):
        raise TypeError(f"the setting {name} must be an object with the fields {fields}, not {value!r}")
    return kind(**{field: as_floating(part, f"{field} of {name}") for field, part in value.items()})


def _settings_of(family: Any) -> dict[str, Any]:
    """Return the settings of a family by name, numbers and dicts of tensors; empty where it has none."""
    if not dataclasses.is_dataclass(family):
        return {}
    found = {field.name: getattr(family, field.name) for field in dataclasses.fields(family)}
    return {name: value._asdict() if hasattr(value, "_asdict") else value for name, value in found.items()}


def _num_components(text: str, num_rows: int) -> int | tuple[int, ...]:
    """Return K as it stands on the command line: a number, or one for each of several latents."""
    if not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise ValueError(f"-k takes a number, or of two latents both, as 3,2, and not {text!r}")
    sizes = tuple(check_num_components(int(size), num_rows) for size in text.split(","))
    return sizes[0] if len(sizes) == 1 else sizes


def _device(name: str) -> torch.device:
    """Return a torch device after a first tensor on it, or say that there is none."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"torch cannot compute on {name!r} here: {str(error).splitlines()[0]}") from error


@contextmanager
def _processes(device: str) -> Iterator[tuple[Group, torch.device]]:
    """Give the group of the processes that torchrun started, or None, and the device that this one computes on."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield None, _device(device)
        return
    local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
    target = _device(local)
    if target.type == "cuda":
        torch.cuda.set_device(target)
    store, rank, size = next(rendezvous("env://"))
    # torchrun may keep its store over a restart, and the processes would connect to those that died
    store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "nccl" if target.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    yield dist.group.WORLD, target
    dist.destroy_process_group()  # not after an error: that would wait for those who failed


def _without_gaps(x: Tensor, weights: Tensor) -> Tensor:
    """Return rows (n, D) with the mean of its column in the place of each missing entry, good enough to start from."""
    gaps = x.isnan()
    if empty := gaps.all(0).nonzero().flatten().tolist():
        raise ValueError(f"column {empty[0]} holds no value in {len(x)} rows to start from: leave it out")
    shares = (weights / weights.max())[:, None].masked_fill(gaps, 0)
    return torch.where(gaps, (x.nan_to_num() * (shares / shares.sum(0))).sum(0), x)


def _stdout() -> Console:
    """Return a console that does not fold a table to 80 columns when nobody's screen is there to measure."""
    return Console(width=None if sys.stdout.isatty() else 140)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


@contextmanager
def _errors() -> Iterator[None]:
    """Turn bad input into one sentence on stderr and exit code 2, an interrupt that left nothing to show into 130."""
    try:
        yield
    except KeyboardInterrupt:
        words = "interrupted before there was anything to show; with --checkpoint, the same command goes on"
        Console(stderr=True).print(words, style="yellow", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    except (ValueError, TypeError, ArithmeticError, OSError, RuntimeError, ImportError) as error:
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f" in process {rank}"
        Console(stderr=True).print(
            f"error{where}: {error}", style="red", highlight=False, markup=False, soft_wrap=True
        )  # a path in two lines cannot be copied
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app()
