"""Expectation-maximisation for any family of the contract (Dempster, Laird and Rubin 1977)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference import checkpoint as checkpoints
from mixproof.inference.acceleration import Anderson
from mixproof.inference.dataset import Block, Dataset
from mixproof.inference.distributed import Group, all_sum, first_of, is_first, object_of_first, together
from mixproof.inference.expectation import MOMENTS_ERROR, Expectation, expectation
from mixproof.inference.progress import EMProgress
from mixproof.inference.supports import base_of
from mixproof.inference.trees import tree_map, tree_to
from mixproof.inference.validation import (
    check_integer,
    check_params,
    check_prior,
    check_rows,
    check_tolerance,
    data_support,
)
from mixproof.models.initial import check_num_components

ROWS_AT_ONCE = 1 << 14


class Fit(NamedTuple):
    """What EM found."""

    params: Any
    """The family's ``Params`` after the last step."""
    log_lik: Tensor
    """(num_steps,), log p(x | params), plus log p(params) under a prior, after each step; the last is at ``params``."""
    converged: bool
    """Whether the last step changed ``log_lik`` by no more than ``rtol`` of its size."""
    num_steps: int
    """The number of steps made, each one pass over the data."""


def em(
    family: Any,
    x: Any,
    init: Any,
    *,
    prior: Any = None,
    weights: Any = None,
    max_steps: int = 500,
    rtol: float = 1e-10,
    accelerate: Literal["anderson"] | None = None,
    missing: bool = False,
    device: torch.device | str | None = None,
    group: Group = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    progress: bool = False,
) -> Fit:
    """Return the parameters at which EM from a start stops rising.

    Args:
        family: a family of the contract.
        x: (N, D), the data: a tensor or what numpy reads as a matrix; a memory map, an Arrow table or dataset, or
            chunks (n, D) that can be read again and again, of which a block at a time is in memory (see ``Dataset``).
        init: the family's ``Params`` to start from, as from ``family.init_params``.
        prior: the family's ``Prior``; EM then climbs to a mode of the posterior. None climbs the likelihood.
        weights: (N,), how often each row counts, not negative, or the name of the Arrow column that holds them; None
            counts each once.
        max_steps: the largest number of steps, at least 1.
        rtol: the relative change of the log likelihood at which to stop, finite and not negative.
        accelerate: ``"anderson"`` tries where EM will be some steps ahead, and takes EM's own step where that is lower
            or does not look like EM's path; a step is a pass over the data, whether what it tried was taken or not. It
            may still end at another maximum than EM.
        missing: whether NaN in x marks an entry that is missing at random; the likelihood is that of the others.
        device: where to compute; None computes where x lies.
        group: the ``torch.distributed`` processes that work together, each with its own rows as x (see ``share``),
            its own weights for them, and the settings of all; they start from the first one's init, and each returns
            the same Fit. An error counts rows within the process's own. None is a process on its own.
        checkpoint: a file for the state of the run, which the first process writes. If it exists, the run goes on from
            there, to the same trace.
        checkpoint_every: after how many steps to write it, at least 1.
        progress: whether to show the steps on stderr.

    Returns:
        A ``Fit``; reaching ``max_steps`` first is a warning and ``converged`` False.

    Raises:
        TypeError, ValueError: the data, the start, the weights or a setting are not what they must be, or a component
            has lost its last row or collapsed: the message names it; or one is so nearly singular that the step's
            sums, by their rounding, lower the objective.
        ArithmeticError: a step lowered the objective by more than rounding, so that ``m_step`` does not belong to
            ``log_joint``.
        OSError: the checkpoint cannot be read or written, which is tried before the first pass.
        RuntimeError: another process of the group died, or failed with an error of no other kind; all processes raise
            an error of the kind that one of them met.
    """
    check_integer(max_steps, "max_steps", 1)
    check_tolerance(rtol)
    if accelerate not in (None, "anderson"):
        raise ValueError(f'accelerate must be "anderson" or None, not {accelerate!r}')
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, not {checkpoint_every}")
    with EMProgress(progress and is_first(group)) as bar:
        file = None if checkpoint is None else Path(checkpoint)
        settings = {"max_steps": max_steps, "rtol": rtol, "accelerate": accelerate, "checkpoint": file is not None}
        settings["checkpoint_every"] = checkpoint_every
        data = _Data(family, x, init, prior, weights, settings, missing=missing, device=device, group=group, bar=bar)
        state = _State(family, data.init, accelerate)
        if file is not None:
            state.load(file, data)
            state.save(file, data)  # a disk that takes no file is found before the first pass, not after
        state.begin(data, file)
        while len(state.trace) < max_steps and not state.has_converged(data, rtol):
            state.step(data, rtol)
            finished = len(state.trace) == max_steps or state.has_converged(data, rtol)
            if file is not None and (finished or len(state.trace) % checkpoint_every == 0):
                state.save(file, data)
    data.raise_for_collapse(state.point.params, len(state.trace))
    converged = state.has_converged(data, rtol)
    if not converged:
        warnings.warn(
            f"EM made {len(state.trace)} steps and the last still changed the log likelihood by "
            f"{state.last_change:.3g}: raise max_steps, or raise rtol if that is close enough",
            ConvergenceWarning,
            stacklevel=2,
        )
    return Fit(state.point.params, torch.tensor(state.trace, dtype=data.like.dtype), converged, len(state.trace))


class _Point(NamedTuple):
    """What one pass over the data says of some parameters."""

    params: Any
    objective: float
    """The log likelihood, plus the log prior."""
    image: Any
    """Where EM's own step leads from there."""


class _Sums(NamedTuple):
    """What processes add up in a pass."""

    expectation: Expectation
    num_rows: Tensor
    weight: Tensor
    """Of all rows."""
    content: Tensor
    """What tells data from others, in a first pass that a checkpoint asks for it; else nothing, (0,)."""


class _Data:
    """The rows, wherever they are, and all that does not change from step to step."""

    def __init__(
        self,
        family: Any,
        x: Any,
        init: Any,
        prior: Any,
        weights: Any,
        settings: dict[str, Any],
        *,
        missing: bool,
        device: torch.device | str | None,
        group: Group,
        bar: EMProgress,
    ):
        self.family, self.group, self._bar = family, group, bar
        self._device = torch.device(device or (x.device if isinstance(x, Tensor) else "cpu"))
        self._observed = _observed(family) if missing else family
        with self.together():
            self._rows = Dataset(family, x, weights, device=device, missing=missing)
            self.like = self._rows.like
            if not getattr(family, "additive", False) and (group is not None or not self._rows.in_memory):
                raise ValueError(
                    "the M-step of this family needs all rows at once, not sums over them: give x as one matrix, to "
                    "one process"
                )
            num_features = self.like.shape[1]
            try:
                self.init = tree_to(check_params(family, init, num_features), self.like)
            except ValueError as error:
                raise ValueError(f"EM cannot start: {error}.{self._no_spread()}") from error
            self._prior = check_prior(family, prior, self.init)
            self.identity = {
                "family": checkpoints.identify(family),
                "prior": checkpoints.digest(self._prior),
                "missing": missing,
                "columns of x": num_features,
                "type of x": str(self.like.dtype),
            }
        self._told_apart = bool(settings["checkpoint"])
        self.content: Tensor | None = None
        """What tells the data from others where the log likelihood, in float32, is rounded too much to: the number of
        rows, their weight, and by column the weighted sum of absolute entries, (2 + D,); known after a pass."""
        self.noise = 0.0
        """The relative error of the objective by roundings of the rows' densities that fall independently."""
        self._agree({**self.identity, **settings, "shape of init": [list(value.shape) for value in self.init]})
        self.init = first_of(group, self.init)
        self._rounding = 0.0

    def _agree(self, settings: dict[str, Any]) -> None:
        """Raise where a process was given other settings than the first: they would wait for each other forever."""
        first = object_of_first(self.group, settings)
        with self.together():
            different = [name for name in settings if settings[name] != first[name]]
            if different:
                raise ValueError(f"this process and the first of the group differ in {', '.join(different)}")

    def together(self) -> AbstractContextManager[None]:
        """Return a context in which every process fails if one does."""
        return together(self.group, self._device)

    def evaluate(self, params: Any, step: int, *, tentative: bool = False) -> _Point:
        """Make one pass over the data; where it is only tentative, an objective that is not finite is no error."""
        with self.together():
            own = self._own_rows(params)
            if not (tentative or torch.isfinite(own.expectation.log_lik)):
                self._explain(params, step)
        found, num_rows, weight, content = all_sum(self.group, own)
        self.content = content if len(content) else self.content
        if not weight > 0:
            raise ValueError("all weights are 0: at least one row must count")
        if step == 0:
            for value in (value for name, value in params._asdict().items() if name.endswith("weights")):
                check_num_components(len(value), int(num_rows))
        objective = found.log_lik
        if self._prior is not None:
            objective = objective + self.family.log_prior(params, self._prior)
            if not (tentative or torch.isfinite(objective)):
                raise ValueError(
                    f"the log prior is {self.family.log_prior(params, self._prior).item()} {_when(step)}: a parameter "
                    "is at the edge of the prior's support"
                )
        image = self.family.Params(*(value.to(self.like) for value in self.family.m_step(found.stats, self._prior)))
        objective, image = first_of(self.group, (objective, image))
        eps = torch.finfo(self.like.dtype).eps
        self.noise = 4 * eps / math.sqrt(num_rows)
        spread = 8 * eps * math.sqrt(num_rows) * (abs(objective.item()) + num_rows.item())
        self._rounding = max(spread, eps ** (2 / 3) * num_rows.item())  # the latter is what expectation permits itself
        self._bar.end_pass(step, objective.item())
        return _Point(params, objective.item(), image)

    def _own_rows(self, params: Any) -> _Sums:
        """Return the sums over this process's rows."""
        total: _Sums | None = None
        for block in self._rows:
            num_rows = torch.tensor(len(block.x), dtype=torch.float64, device=self.like.device)
            weight = num_rows if block.weights is None else block.weights.sum(dtype=torch.float64)
            content = self._content_of(block) if self._told_apart and self.content is None else weight.new_zeros(0)
            part = _Sums(expectation(self._observed, params, block.x, block.weights), num_rows, weight, content)
            total = part if total is None else tree_map(torch.add, total, part)
            self._bar.advance(len(block.x))
        assert total is not None
        return total

    def _content_of(self, block: Block) -> Tensor:
        """Return the number of rows, their weight and by column the weighted sum of absolute entries, (2 + D,)."""
        total = torch.zeros(2 + self.like.shape[1], dtype=torch.float64, device=self.like.device)
        for start in range(0, len(block.x), ROWS_AT_ONCE):
            piece = block.rows(start, start + ROWS_AT_ONCE)
            weights = torch.ones_like(piece.x[:, 0]) if piece.weights is None else piece.weights
            numbers = torch.stack([torch.ones_like(weights), weights]).double()
            total += torch.cat([numbers.sum(1), weights.double() @ piece.x.double().abs().nan_to_num(0)])
        return total

    def falls(self, before: float, after: float) -> bool:
        """Return whether an objective is below another by more than rounding."""
        return after < before - self._rounding

    def raise_for_fall(self, before: _Point, point: _Point, step: int) -> None:
        """Raise if EM's own step led down by more than rounding."""
        if not self.falls(before.objective, point.objective):
            return
        self.raise_for_collapse(point.params, step, lost=True)
        what = f"step {step} lowered the objective from {before.objective!r} to {point.objective!r}"
        fall = before.objective - point.objective
        if abs(self._gain_in_double(before.params) + fall) > fall / 8:  # a wrong step is as wrong in any precision
            advice = (
                "drop one of two features that are nearly the same, or give a prior"
                if self.like.dtype == torch.float64
                else "give x in float64"
            )
            raise ValueError(
                f"{what}, by rounding: a component is so nearly singular that "
                f"{str(self.like.dtype).removeprefix('torch.')} cannot follow it; {advice}"
            )
        raise ArithmeticError(
            f"{what}: m_step does not maximise what log_joint and log_prior declare; verify_em says which part is wrong"
        )

    def _gain_in_double(self, params: Any) -> float:
        """Return by how much EM's step from there raises the objective in float64, with the rows in reverse order."""
        params = tree_to(params, torch.float64)
        prior = None if self._prior is None else tree_to(self._prior, torch.float64)
        objectives = []
        for _ in range(2):
            with self.together():
                parts = []
                for block in self._rows:
                    weights = None if block.weights is None else block.weights.flip(0).double()
                    parts.append(expectation(self._observed, params, block.x.flip(0).double(), weights))
                own = reduce(partial(tree_map, torch.add), parts)
            found = all_sum(self.group, own)
            objectives.append(found.log_lik + (0 if prior is None else self.family.log_prior(params, prior)))
            params = tree_to(self.family.m_step(found.stats, prior), torch.float64)
        return float(objectives[1] - objectives[0])

    def raise_for_collapse(self, params: Any, step: int, *, lost: bool = False) -> None:
        """Raise if a component is so narrow that its density at its own rows changes with the rounding of the data."""
        if not has_spread(self.family, self.like.shape[1]):
            return
        with self.together():
            for piece in self._pieces():
                raise_for_collapse(self._observed, params, piece, _when(step), lost=lost)

    def _explain(self, params: Any, step: int) -> None:
        """Say which row or component makes the log likelihood not finite."""
        for piece in self._pieces():
            raise_for_impossible(self._observed.log_joint(params, piece.x), piece, _when(step))
        raise ArithmeticError(f"the log likelihood overflows {_when(step)}: rescale x")

    def _pieces(self) -> Iterator[Block]:
        """Yield the rows in pieces small enough for a table of K D numbers a row."""
        for block in self._rows:
            for start in range(0, len(block.x), ROWS_AT_ONCE):
                yield block.rows(start, start + ROWS_AT_ONCE)

    def _no_spread(self) -> str:
        """Return the advice that a start without spread calls for, if the data are to blame."""
        if not self._rows.in_memory:
            return ""
        x = next(iter(self._rows)).x
        constant = (x == x[0]).all(0).nonzero().flatten().tolist()
        if len(x) == 1:
            return " x has a single row, which has no spread: give a start of your own and a prior"
        return f" x is constant in column {', '.join(map(str, constant))}: drop it" if constant else ""


class _State:
    """Where a run is: the point it stands on, the trace, and what the accelerator has learnt."""

    def __init__(self, family: Any, init: Any, accelerate: str | None):
        self._accelerator = None if accelerate is None else Anderson(family, init)
        self._init = init
        self.point = _Point(init, -math.inf, init)
        self.trace: list[float] = []
        self.last_change = math.inf
        """Of the objective, by EM's own step; infinite after any other."""
        self._own_step_next = False
        self._content: Tensor | None = None
        """Of the data of the run that goes on, as its file has it."""

    def has_converged(self, data: _Data, rtol: float) -> bool:
        """Return whether EM's own step was the last and changed the objective by no more than a relative ``rtol``.

        In float32 the rounding of the rows' log densities, which add up as they happen to fall, may hide so small a
        change: then one within that rounding is enough, unless ``rtol`` is 0.
        """
        least = max(rtol, data.noise) if rtol > 0 else 0.0
        return self.last_change <= least * abs(self.point.objective)

    def step(self, data: _Data, rtol: float) -> None:
        """Make one pass, at a candidate of the accelerator or at the image of EM."""
        number = len(self.trace) + 1
        candidate = self._candidate(data)
        before = self.point
        if candidate is None or self._accelerator is None:
            raise_for_lost_component(self.point.image, _when(number))
            self.point = data.evaluate(self.point.image, number)
            data.raise_for_fall(before, self.point, number)
            self.last_change = abs(self.point.objective - before.objective)
            self._own_step_next = False
        else:
            found = data.evaluate(candidate, number, tentative=True)
            accepted = self._accelerator.accept(candidate, found.image, found.objective)
            # a candidate may gain little by chance: only EM's own step tells that there is no more to gain
            self._own_step_next = not accepted or found.objective - before.objective <= rtol * abs(before.objective)
            self.point = found if accepted else self.point
            self.last_change = math.inf
        self.trace.append(self.point.objective)

    def begin(self, data: _Data, file: Path | None) -> None:
        """Make the pass at the point to start from; after a resumed run, only to see that the data are the same.

        Raises:
            CheckpointError: they are not.
        """
        again = data.evaluate(self.point.params, len(self.trace))
        if self._content is not None and data.content is not None:
            same = torch.isclose(self._content.to(data.content), data.content, rtol=1e-9, atol=0)
            names = ["the number of rows", "their weight", *(f"column {d}" for d in range(len(same) - 2))]
            if different := [name for name, is_same in zip(names, same.tolist(), strict=True) if not is_same]:
                raise checkpoints.CheckpointError(
                    f"{file} belongs to other data or weights, which differ in {', '.join(different[:4])}: delete it, "
                    "or give another file"
                )
        if not self.trace:
            self.point = again
        elif data.falls(again.objective, self.point.objective) or data.falls(self.point.objective, again.objective):
            raise checkpoints.CheckpointError(
                f"{file} belongs to other data or weights: the log likelihood there is {self.point.objective!r}, and "
                f"here {again.objective!r}. Delete it, or give another file"
            )

    def save(self, file: Path, data: _Data) -> None:
        """Write what the next steps depend on."""
        with data.together():
            if is_first(data.group):
                content = self._content if data.content is None else data.content
                of_data = {} if content is None else {"content": content}
                checkpoints.save(file, self._identity(data), self._tensors() | of_data)

    def _tensors(self) -> dict[str, Tensor]:
        numbers: dict[str, Any] = {
            "objective": self.point.objective,
            "trace": self.trace,
            "last_change": self.last_change,
            "own_step_next": self._own_step_next,
        }
        if self._accelerator is not None:
            numbers |= {f"accelerator.{name}": value for name, value in self._accelerator.state_dict().items()}
        tensors = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        for part, params in (("init", self._init), ("params", self.point.params), ("image", self.point.image)):
            tensors |= {f"{part}.{i}": value for i, value in enumerate(params)}
        return tensors

    def load(self, file: Path, data: _Data) -> None:
        """Go on from a file, if there is one.

        Raises:
            CheckpointError: it is not of this run.
        """
        with data.together():
            found = checkpoints.load(file, self._identity(data)) if is_first(data.group) else None
            if found is not None and not all(_same(found[f"init.{i}"], value) for i, value in enumerate(self._init)):
                raise checkpoints.CheckpointError(
                    f"{file} belongs to another run, which differs in init: delete it, or give another"
                )
        found = object_of_first(data.group, found)
        if found is None:
            return
        self._content = found.get("content")
        params, image = (
            data.family.Params(*(found[f"{part}.{i}"].to(data.like) for i in range(len(data.init))))
            for part in ("params", "image")
        )
        self.trace = found["trace"].tolist()
        self.point = _Point(params, found["objective"].item(), image)
        self.last_change = found["last_change"].item()
        self._own_step_next = bool(found["own_step_next"])
        if self._accelerator is not None:
            prefix = "accelerator."
            self._accelerator.load_state_dict(
                {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
            )

    def _identity(self, data: _Data) -> dict[str, Any]:
        return {**data.identity, "accelerate": type(self._accelerator).__name__}

    def _candidate(self, data: _Data) -> Any:
        """Return what the accelerator of the first process proposes, or None for EM's own step."""
        if self._accelerator is None:
            return None
        found = self._accelerator.propose(self.point.params, self.point.image, self.point.objective)
        found = None if self._own_step_next else found
        exists = first_of(data.group, torch.tensor(found is not None, device=data.like.device))
        return first_of(data.group, self.point.image if found is None else found) if exists else None


def responsibilities(family: Any, params: Any, x: Any, *, missing: bool = False) -> Tensor:
    """Return p(z_n = k | x_n, params), shape (N, K), for data x (N, D); with ``missing`` given the entries not NaN.

    Raises:
        TypeError, ValueError: the data or the parameters are not what they must be, or a row is impossible under them.
    """
    x = check_rows(family, x, missing=missing)
    params = tree_to(check_params(family, params, x.shape[1]), x)
    table = (_observed(family) if missing else family).log_joint(params, x)
    raise_for_impossible(table, Block(0, x, None), "in these parameters", advice="drop it, or take others")
    return table.softmax(-1)


class _Observed(NamedTuple):
    """The two functions of a family that a pass calls, of the entries that are not missing."""

    log_joint: Any
    statistics: Any


def _observed(family: Any) -> _Observed:
    if not hasattr(family, "log_joint_observed"):
        raise ValueError("this family has no E-step for missing values: drop or impute the rows with NaN")
    return _Observed(family.log_joint_observed, family.statistics_observed)


def _same(left: Tensor, right: Tensor) -> bool:
    """Return whether two starts are one, drawn perhaps on machines that round differently."""
    if left.shape != right.shape:
        return False
    right = right.to(left)
    return bool((left - right).abs().max() <= math.sqrt(torch.finfo(left.dtype).eps) * right.abs().max())


def _when(step: int) -> str:
    return "at the start" if step == 0 else f"at step {step}"


def raise_for_impossible(
    table: Tensor,
    block: Block,
    when: str,
    *,
    advice: str = "start from parameters under which each row has positive density, as init_params gives",
) -> None:
    """Say which component has collapsed, or which row that counts is impossible, by the table (n, K) of log joints."""
    counts = torch.ones_like(table[:, 0], dtype=torch.bool) if block.weights is None else block.weights > 0
    impossible = (torch.isnan(table) | (table == torch.inf)) & counts[:, None]
    if impossible.any():
        row, k = impossible.nonzero()[0].tolist()
        raise ValueError(
            f"component {k} has collapsed {when}: its spread is zero to rounding, so that the density of row "
            f"{block.first_row + row} is not finite. Give a prior, use fewer components, or start elsewhere"
        )
    excluded = (table.logsumexp(-1) == -torch.inf) & counts
    if excluded.any():
        row = int(excluded.nonzero()[0])
        raise ValueError(
            f"row {block.first_row + row} is impossible under every component {when}: its density underflows to 0; "
            f"{advice}"
        )


def has_spread(family: Any, num_features: int) -> bool:
    """Return whether the data are real, so that a component may become too narrow for them."""
    return base_of(data_support(family, num_features)) is constraints.real


def raise_for_collapse(family: Any, params: Any, block: Block, when: str, *, lost: bool = False) -> None:
    """Raise if a component is narrower than the rounding of the rows, or of its own covariance.

    At the row where a component is most probable, its density then changes with such a rounding. What happens at a row
    of another component does not count, unless the component may have ``lost`` its rows by becoming narrower than its
    location is exact.
    """
    x = block.x if block.weights is None else block.x[block.weights > 0]
    if len(x) == 0:
        return
    table = family.log_joint(params, x)
    _raise_below_rounding_of_rows(family, params, x, table, when, lost)
    if any("covariance" in name for name in params._fields):
        _raise_below_rounding_of_covariance(family, params, x, table, when)


MOST_CHANGE = 0.5
"""Of a log density by a rounding: what a standard deviation from the location costs."""


def _raise_below_rounding_of_rows(family: Any, params: Any, x: Tensor, table: Tensor, when: str, lost: bool) -> None:
    rows = table.argmax(0)
    nudged = x[rows] + torch.finfo(x.dtype).eps * x.nan_to_num().abs().amax(0)
    moved = (family.log_joint(params, nudged) - table[rows]).abs()
    moved = moved.diagonal() if lost else (table.softmax(-1)[rows] * moved).amax(0)
    k = int(moved.argmax())
    if not moved[k] < MOST_CHANGE:
        raise ValueError(
            f"component {k} has collapsed {when}: its spread is below the rounding of x, so that its density means "
            "nothing. Give a prior, use fewer components, or start elsewhere"
        )


def _raise_below_rounding_of_covariance(family: Any, params: Any, x: Tensor, table: Tensor, when: str) -> None:
    rows, resp, known = table.argmax(0), table.softmax(-1), (~x.isnan()).to(x)
    mass = (resp.mT @ known).clamp_min(torch.finfo(x.dtype).tiny)
    centred = x.nan_to_num() - known * (x.nan_to_num().sum(0) / known.sum(0).clamp_min(1))
    means, squares = (resp.mT @ values / mass for values in (centred, centred.square()))
    spreads = (squares - means.square()).clamp_min(0).sqrt()  # (K, D)
    error = torch.finfo(x.dtype).eps ** (MOMENTS_ERROR / 2)  # of a standard deviation
    nudges = torch.diag_embed(error * spreads)  # one feature after another
    of_nudged = family.log_joint(params, (x[rows][:, None] + nudges).flatten(0, 1)).unflatten(0, spreads.shape)
    component = torch.arange(len(rows), device=x.device)
    change = (of_nudged[component, :, component] - table[rows, component][:, None]).abs()
    moved = resp[rows, component] * change.amax(1)
    k = int(moved.argmax())
    if not moved[k] < MOST_CHANGE:
        raise ValueError(
            f"component {k} has collapsed {when}: along some direction its spread is below the rounding of its "
            f"covariance in {str(x.dtype).removeprefix('torch.')}, so that its density means nothing. Drop one of two "
            "features that are nearly the same, give a prior, use fewer components, or start elsewhere"
        )


def has_collapsed(family: Any, params: Any, block: Block) -> bool:
    """Return whether ``raise_for_collapse`` would raise."""
    try:
        raise_for_collapse(family, params, block, "")
    except ValueError:
        return True
    return False


def raise_for_lost_component(params: Any, when: str) -> None:
    """Say which component of an M-step's parameters has no rows left, or no spread."""
    for name, value in params._asdict().items():
        if name.endswith("weights") and not (value > 0).all():
            k = int((~(value > 0)).nonzero()[0])
            raise ValueError(
                f"component {k} lost its last row {when}: {name}[{k}] is {value[k].item():.3g}. "
                "Start elsewhere, use fewer components, or give a prior (with concentration above 1 where the "
                "weight itself vanished)"
            )
        if not torch.isfinite(value).all():
            k = int((~torch.isfinite(value)).nonzero()[0][0])
            raise ValueError(
                f"{name}[{k}] is not finite {when}: component {k} has collapsed. Start elsewhere, use fewer "
                "components, or give a prior"
            )
