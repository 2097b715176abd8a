"""A comparison on the screen, in a file, and as a figure: what is shown of the rows of ``comparison.Comparison``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mixproof.inference.comparison_study import Row

UNFOLDED = 10_000
"""Of what width text is where no screen folds it."""
CRITERIA: dict[str, Callable[[Row], float | None]] = {
    "BIC": lambda row: None if row.bic is None else -row.bic,
    "AIC": lambda row: None if row.aic is None else -row.aic,
    "ICL": lambda row: None if row.icl is None else -row.icl,
    "LOO": lambda row: row.elpd_loo,
    "the evidence": lambda row: row.log_evidence,
}
"""By criterion, what is the higher the better."""


def best_row(rows: Sequence[Row], criterion: str) -> Row | None:
    """Return the first row that is the best by a criterion, or None where no row has it."""
    known = [(value, -place, row) for place, row in enumerate(rows) if (value := CRITERIA[criterion](row)) is not None]
    return max(known)[2] if known else None


def prior_in_words(prior: Any) -> str:
    """Return hyperparameters in a line, one number for entries that are all the same."""
    parts = []
    for name, value in prior._asdict().items():
        if hasattr(value, "_asdict"):
            parts.append(f"{name} ({prior_in_words(value)})")
            continue
        array = np.asarray(value, dtype=np.float64)
        if (array == array.flat[0]).all():
            array = array.reshape(-1)[:1].reshape(())
        text = np.array2string(array, formatter={"float_kind": "{:.4g}".format}, separator=", ", threshold=36)
        parts.append(f"{name} {' '.join(text.split())}")
    return ", ".join(parts)


def _signed(value: float | None, error: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def _share(value: float | None, error: float | None) -> str:
    """Return a probability, or which end it is next to where three digits do not tell it and its error from that."""
    if value is None or error is None or error >= 5e-4 or 5e-4 <= value <= 1 - 5e-4:
        return _signed(value, error, 3)
    return "< 0.001" if value < 0.5 else "> 0.999"


def _difference(row: Row) -> str:
    if row.elpd_loo_difference is None:
        return ""
    if row.elpd_loo_difference == 0:
        return "0.0"
    return _signed(-row.elpd_loo_difference, row.elpd_loo_difference_standard_error, 1)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


COLUMNS: dict[str, tuple[str | None, Callable[[Row], str]]] = {
    "log lik": (None, lambda row: _number(row.log_likelihood, 2)),
    "params": (None, lambda row: str(row.num_parameters)),
    "BIC": ("BIC", lambda row: _number(row.bic, 1)),
    "AIC": ("AIC", lambda row: _number(row.aic, 1)),
    "ICL": ("ICL", lambda row: _number(row.icl, 1)),
    "LOO": ("LOO", lambda row: _number(row.elpd_loo, 1)),
    "LOO diff": (None, _difference),
    "Pareto k": (
        None,
        lambda row: "" if row.max_pareto_k is None else f"{row.max_pareto_k:.2f} ({row.num_high_pareto_k} high)",
    ),
    "log evidence": ("the evidence", lambda row: _signed(row.log_evidence, row.log_evidence_standard_error, 2)),
    "probability": (None, lambda row: _share(row.probability, row.probability_standard_error)),
    "stacking": (None, lambda row: _number(row.stacking_weight, 2)),
}
"""By title, the criterion whose best is starred, and what a row shows."""


def as_tables(rows: Sequence[Row], console: Console, options: ConsoleOptions) -> Iterator[Table]:
    """Yield the columns as tables one below another, each of as many as fit beside the names."""
    best = {name: best_row(rows, name) for name in CRITERIA}

    def table(titles: Sequence[str]) -> Table:
        made = Table(box=None, pad_edge=False)
        made.add_column("candidate", no_wrap=True)
        for title in titles:
            made.add_column(title, justify="right", no_wrap=True)
        for row in rows:
            cells = []
            for criterion, write in (COLUMNS[title] for title in titles):
                star = "" if criterion is None else "*" if best[criterion] is row else " "
                cells.append(f"{write(row)}{star}")
            made.add_row(Text(row.name), *cells)
        return made

    unlimited = options.update(width=UNFOLDED)
    titles: list[str] = []
    for title in COLUMNS:
        width = console.measure(table([*titles, title]), options=unlimited).maximum
        if titles and width > options.max_width:
            yield table(titles)
            titles = []
        titles.append(title)
    yield table(titles)


def check_matplotlib() -> None:
    """Say in words that figures cannot be drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("matplotlib is not installed: pip install 'mixproof[compare]'") from error


def plot_rows(rows: Sequence[Row], figure: Figure) -> Figure:
    """Return the figure with the criteria drawn into it, each in a panel, better always to the right."""
    criteria, loo_panel, evidence, probabilities = figure.subplots(1, 4, sharey=True)
    places = range(len(rows))

    def points(
        panel: Any,
        field: str,
        error: str | None = None,
        sign: int = 1,
        shift: float = 0,
        below: float = 0,
        **style: Any,
    ) -> None:
        values = [getattr(row, field) for row in rows]
        errors = [0.0 if error is None else getattr(row, error) for row in rows]
        known = [place for place in places if values[place] is not None]
        panel.errorbar(
            [sign * values[place] - shift for place in known],
            [place + below for place in known],
            xerr=None if error is None else [errors[place] for place in known],
            linestyle="none",
            capsize=3,
            **style,
        )

    for name, marker in (("bic", "o"), ("aic", "s"), ("icl", "^")):
        least = min((value for row in rows if (value := getattr(row, name)) is not None), default=0.0)
        points(criteria, name, shift=least, marker=marker, label=name.upper(), alpha=0.7)
    criteria.set(title="information criteria", xlabel="above the lowest")
    criteria.invert_xaxis()
    criteria.legend()
    points(loo_panel, "elpd_loo_difference", "elpd_loo_difference_standard_error", sign=-1, marker="o")
    loo_panel.set(title="LOO", xlabel="elpd, below the highest")
    most = max((row.log_evidence for row in rows if row.log_evidence is not None), default=0.0)
    points(evidence, "log_evidence", "log_evidence_standard_error", shift=most, marker="o")
    evidence.set(title="evidence", xlabel="log p(x), below the highest")
    points(probabilities, "probability", "probability_standard_error", marker="o", label="posterior probability")
    points(probabilities, "stacking_weight", below=0.2, marker="x", label="stacking weight")
    probabilities.set(title="share of a candidate", xlabel="probability or weight", xlim=(-0.05, 1.05))
    probabilities.legend()
    criteria.set_yticks(list(places), [row.name for row in rows])
    criteria.invert_yaxis()
    for panel in (criteria, loo_panel, evidence, probabilities):
        panel.grid(axis="y", alpha=0.3)
    return figure
