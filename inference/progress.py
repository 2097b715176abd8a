"""What a person sees of a long run: steps, log likelihood and rows a second, on stderr."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn


class EMProgress:
    """A bar that fills with the rows of each pass, behind the count of steps, the log likelihood and the rate.

    Args:
        shown: whether there is one at all.
    """

    def __init__(self, shown: bool):
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), transient=False, disable=not shown)
        self._task = self._bar.add_task("EM", total=None)
        self._rows = 0
        self._began = time.perf_counter()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, rows: int) -> None:
        """Count rows of the present pass."""
        self._rows += rows
        self._bar.update(self._task, completed=self._rows)

    def end_pass(self, step: int, objective: float) -> None:
        """Show the step and its objective, and start the bar anew."""
        now = time.perf_counter()
        rate = self._rows / max(now - self._began, 1e-9)
        words = f"EM step {step}  log likelihood {objective:.6f}  {rate:,.0f} rows/s"
        self._bar.update(self._task, description=words, total=self._rows, completed=self._rows)
        self._rows, self._began = 0, now
