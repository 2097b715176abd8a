"""Run the notebooks: each .py in percent format becomes an .ipynb of the same name, with the outputs of a fresh run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent


def sources() -> list[Path]:
    """Return the sources of the notebooks: the Python files beside this one that open with a jupytext header."""
    return sorted(path for path in FOLDER.glob("*.py") if path.read_text(encoding="utf-8").startswith("# ---\n"))


def execute(source: Path, timeout: int = 600) -> NotebookNode:
    """Return the notebook of a percent script, run in a fresh kernel of this very interpreter.

    Args:
        source: the script.
        timeout: seconds allowed for each cell.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = jupytext.read(source)
    # Without folders to search, the kernel is ipykernel's own: no other one installed as "python3" can take its place.
    kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(
        notebook,
        km=kernel,
        timeout=timeout,
        resources={"metadata": {"path": str(source.parent)}},
        record_timing=False,
        coalesce_streams=True,
    )
    environment = {
        **os.environ,
        # Pyro's progress bar asks for widgets, by a warning that shows this machine's paths; no notebook uses them.
        "PYTHONWARNINGS": "ignore:IProgress not found",
        # Beside other work on the machine, threads wait for one another: one is steady, several can be far slower.
        "OMP_NUM_THREADS": "1",
    }
    client.execute(cleanup_kc=True, env=environment)
    for position, cell in enumerate(notebook.cells):
        cell.id = f"cell-{position}"  # jupytext draws ids at random: these make two runs comparable
    return notebook


def main(names: list[str]) -> None:
    """Run the notebooks named, or all, and write each .ipynb beside its source."""
    for source in sources():
        if not names or source.stem in names:
            print(source.stem, flush=True)
            nbformat.write(execute(source), source.with_suffix(".ipynb"))


if __name__ == "__main__":
    main(sys.argv[1:])
