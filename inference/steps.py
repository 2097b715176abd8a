"""A run of equal steps that goes on from a file, to the same end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from mixproof.inference import checkpoint as checkpoints


class Process(Protocol):
    """What a run repeats."""

    def step(self, number: int) -> Tensor:
        """Take step ``number``, counted from 0, and return what is kept of it: of one shape in all steps."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return all that the next steps depend on, by name; ``results`` is taken."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a state."""
        ...


def take_steps(
    process: Process,
    num_steps: int,
    *,
    file: Path | None,
    identity: dict[str, Any],
    every: int,
    progress: str | None,
) -> Tensor:
    """Take the steps of a process, and return what is kept of each, (num_steps, ...).

    The file holds the state before a step, and what was kept up to it. A run that goes on takes that step again, and
    knows a process whose functions are others, which no identity can tell, by what the step gives.

    Args:
        process: at its start.
        num_steps: at least 1.
        file: written after the first step, and after every so many; if it exists, the run goes on from there.
        identity: the settings by which the run is known, as JSON holds them.
        every: after how many steps the file is written, at least 1.
        progress: the name of the bar on stderr; None for none.

    Raises:
        CheckpointError: the file is no checkpoint, or one of another run.
        OSError: it cannot be read or written.
    """
    results: list[Tensor] = []
    known: Tensor | None = None
    found = None if file is None else checkpoints.load(file, identity)
    if found is not None:
        *results, known = found.pop("results")
        process.restore(found)
    first = len(results)
    with Progress(console=Console(stderr=True), disable=progress is None) as bar:
        task = bar.add_task(progress or "", total=num_steps, completed=first)
        for number in range(first, num_steps):
            due = file is not None and number % every == 0 and (known is None or number > first)
            before = {name: value.clone() for name, value in process.state().items()} if due else {}
            results.append(process.step(number))
            if known is not None and number == first:
                _check_same(results[-1], known.to(results[-1]), number)
            if file is not None and due:
                checkpoints.save(file, identity, {**before, "results": torch.stack(results)})
            bar.update(task, completed=number + 1)
    return torch.stack(results)


def _check_same(result: Tensor, known: Tensor, number: int) -> None:
    rounding = math.sqrt(torch.finfo(result.dtype).eps)
    if not torch.allclose(result, known, rtol=rounding, atol=rounding):
        entry = int((result - known).abs().argmax())
        raise checkpoints.CheckpointError(
            f"the checkpoint belongs to another run: its step {number} gave {float(known.flatten()[entry]):.10g}, and "
            f"gives {float(result.flatten()[entry]):.10g} now: delete it, or give another file"
        )
