"""What draws say of the run that made them: whether its chains agree, what they are worth, components without rows."""

from __future__ import annotations

import importlib
import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from xarray import Dataset

MANY_EMPTY = 0.5
"""From how many components without rows there is something to say."""


class Diagnosis(NamedTuple):
    """What the quantities of draws that need no labels show."""

    max_rhat: float | None
    """The largest R-hat; None where there are too few draws for any, or they are all alike."""
    worst: str | None
    """The quantity that has it."""
    min_effective_draws: float | None
    """The smallest effective sample size, in the bulk and in the tails."""
    has_moved: bool
    """Whether anything varies over the draws."""
    num_empty_components: dict[str, float]
    """How many components have no row, averaged over the draws, by the quantity's name."""


def diagnose(quantities: Dataset) -> Diagnosis:
    """Return R-hat, effective sample sizes and components without rows.

    Args:
        quantities: over ``chain`` and ``draw``, such as ``tree["label_invariant"].to_dataset()`` of ``to_datatree``.

    Raises:
        ImportError: ArviZ is not installed.
    """
    stats = import_arviz("arviz_stats")
    over = ["chain", "draw"]
    varying = quantities[
        [name for name, value in quantities.items() if bool((value.max(over) > value.min(over)).any())]
    ]
    rhats: dict[str, float] = {}
    sizes: list[float] = []
    if varying.data_vars:
        with warnings.catch_warnings():
            # an entry that is the same in all draws has no R-hat: it comes out as NaN and is passed over
            warnings.filterwarnings("ignore", "(invalid value|divide by zero) encountered", RuntimeWarning)
            rhats = {str(name): float(value.max()) for name, value in stats.rhat(varying).data_vars.items()}
            for method in ("bulk", "tail"):
                sizes += [float(value.min()) for value in stats.ess(varying, method=method).data_vars.values()]
    worst = max((name for name, value in rhats.items() if not math.isnan(value)), key=rhats.__getitem__, default=None)
    return Diagnosis(
        None if worst is None else rhats[worst],
        worst,
        min((size for size in sizes if not math.isnan(size)), default=None),
        bool(varying.data_vars),
        {
            str(name): float(value.mean())
            for name, value in quantities.data_vars.items()
            if str(name).startswith("num_empty_components")
        },
    )


def complaints(found: Diagnosis, *, max_rhat: float, min_effective_draws: float, remedy: str, empty: str) -> list[str]:
    """Return what no reader of the draws should miss, a sentence each.

    Args:
        found: from ``diagnose``.
        max_rhat: the largest R-hat that is passed over.
        min_effective_draws: the smallest effective sample size that is.
        remedy: what to do where chains have not mixed, in words.
        empty: what it may mean that components have no rows, in words.
    """
    words = []
    if not found.has_moved:
        words.append("nothing varies over the draws: no chain has moved")
    bad = []
    if found.max_rhat is not None and found.max_rhat > max_rhat:
        value = f"{found.max_rhat:.3f} (at most {max_rhat})"
        bad.append(f"the chains have not mixed, R-hat of {found.worst}, which needs no labels, being {value}")
    if found.min_effective_draws is not None and found.min_effective_draws < min_effective_draws:
        size = f"{found.min_effective_draws:.0f} independent ones (at least {min_effective_draws:g})"
        bad.append(f"the draws are worth {size}")
    if bad:
        words.append(
            f"{', and '.join(bad)}: averages over the draws, LOO among them, are not yet to be trusted; {remedy}"
        )
    for name, number in found.num_empty_components.items():
        if number >= MANY_EMPTY:
            words.append(f"on average {number:.1f} components have no row ({name}): {empty}")
    return words


def import_arviz(package: str) -> Any:
    """Return a package of ArviZ's, or raise ImportError with what to install."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"ArviZ is not installed: pip install 'mixproof[compare]' ({package})") from error
