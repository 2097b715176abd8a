"""The smallest counterexample: few rows, few components, short numbers, as Python that runs by itself."""

from __future__ import annotations

import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.supports import base_of
from mixproof.inference.verification.report import Check, blamed
from mixproof.inference.verification.subject import Subject
from mixproof.inference.verification.trial import BLIND, PENALISED, ROUNDING, Target, Trial, largest_eps

MOST_ROWS = 6
NUM_DRAWS = 3
MAX_SLICINGS = 256
CLEAR = 16.0
"""A counterexample's error is at least so many times its tolerance."""


class Found(NamedTuple):
    """A small instance at which a step is wrong."""

    own: Trial
    params: dict[str, Tensor]
    target: Target
    site: str = ""
    """Of a wrong M-step: the site to blame."""
    better: Mapping[str, Tensor] = MappingProxyType({})
    """Of a wrong M-step: parameters that the target prefers to those returned."""


class NoMaximum(Exception):
    """Q has no maximum inside the support at an instance: the right step fails there too."""


Slicing = dict[str, tuple[int, int]]
"""Which axis of a site counts the values of which latent."""


def smallest_counterexample(own: Trial, verdict: str, checks: Sequence[Check], seed: int) -> str:
    """Return the smallest counterexample that was found to a wrong step, as Python to run; empty where none was.

    Components come first, then rows: one component and one row are tried before two rows, and two components last.
    Parameters, rows and responsibilities are rounded to two digits where the fault still shows.

    Args:
        own: the derivation.
        verdict: ``wrong E-step``, ``wrong M-step`` or ``wrong report``.
        checks: those that led to it.
        seed: of the rows, responsibilities and parameters that are tried.
    """
    fails, write = FAULTS[verdict]
    failed = blamed(checks)
    prior = float(any(check.name == PENALISED and not check.passed for check in checks))
    hopeless = set()  # sizes at which Q has no maximum, so that no step is right
    for instance, params, resp in _instances(own, torch.Generator().manual_seed(seed)):
        if resp.shape in hopeless:
            continue
        try:
            found = fails(instance, params, Target(resp.to(instance.origin), prior=prior), failed)
        except NoMaximum:
            hopeless.add(resp.shape)
            continue
        except Exception:  # too small for this program or for this step
            continue
        if found is not None:
            return write(found)
    return ""


def _instances(own: Trial, generator: torch.Generator) -> Iterator[tuple[Trial, dict[str, Tensor], Tensor]]:
    """Yield ever larger instances with parameters and responsibilities, tidy numbers first."""
    with torch.no_grad():
        num_rows = len(own.joint(own.params).rows)
    sizes = own.program.latent_sizes
    slicing = component_axes(own)
    kept = [tuple(min(k, size) for size in sizes) for k in range(1, max(sizes) + 1)] if slicing else [sizes]
    for components in kept:
        for count in [*range(1, min(MOST_ROWS, num_rows) + 1), *([num_rows] if num_rows > MOST_ROWS else [])]:
            for _ in range(NUM_DRAWS):
                rows = torch.randperm(num_rows, generator=generator)[:count].sort().values
                chosen = [
                    torch.randperm(size, generator=generator)[:k].sort().values
                    for size, k in zip(sizes, components, strict=True)
                ]
                for tidy in (True, False):
                    try:
                        instance = restricted(own, rows, chosen, slicing or {}, tidy=tidy)
                        params = instance.random_params(generator) if instance.takes_params else instance.params
                        params = tidied(instance, params) if tidy else params
                        with torch.no_grad():
                            possible = torch.isfinite(instance.joint(params).rows)
                    except Exception:  # a program run at sizes that it was not written for
                        continue
                    if possible.any(1).all():
                        yield instance, params, _short_resp(possible, generator)


def component_axes(own: Trial) -> Slicing | None:
    """Return which axes of the parameters count components, or None where the program has a fixed number of them.

    Found by trying: a slicing is right when the program runs with it and the log joint density of the remaining
    components is what it was, up to a constant of each row.
    """
    sizes = own.program.latent_sizes
    with torch.no_grad():
        whole = own.joint(own.params).rows
    chosen = [torch.arange(max(1, size - 1)) for size in sizes]
    columns = torch.arange(whole.shape[1]).reshape(sizes)
    for latent, index in enumerate(chosen):
        columns = columns.index_select(latent, index)
    rest = whole[:, columns.flatten()]
    options = []
    for value in own.params.values():
        axes: list[tuple[int, int] | None] = [
            (axis, latent)
            for axis, length in enumerate(value.shape)
            for latent, size in enumerate(sizes)
            if length == size
        ]
        options.append([*axes, None])
    for picked in itertools.islice(itertools.product(*options), MAX_SLICINGS):
        slicing = {site: axis for site, axis in zip(own.params, picked, strict=True) if axis is not None}
        try:
            sliced = restricted(own, torch.arange(len(whole)), chosen, slicing, tidy=False)
            with torch.no_grad():
                rows = sliced.joint(sliced.params).rows
        except Exception:  # a program run at sizes that it was not written for
            continue
        if _equal_up_to_rows(rows, rest):
            return slicing
    return None


def _equal_up_to_rows(rows: Tensor, rest: Tensor) -> bool:
    """Whether two tables of logarithms (N, K) differ by a constant of each row alone, or of all if K is 1."""
    known = torch.isfinite(rest)
    if rows.shape != rest.shape or not torch.equal(known, torch.isfinite(rows)):
        return False
    shift = torch.where(known, rows - rest, torch.nan)
    shift = shift - shift.nanmean(None if rest.shape[1] == 1 else 1, keepdim=True)
    return bool(shift[known].abs().max() <= BLIND * (1 + rest[known].abs().max()))


def restricted(own: Trial, rows: Tensor, chosen: Sequence[Tensor], slicing: Slicing, *, tidy: bool) -> Trial:
    """Return the derivation on some rows and some values of each latent; ``tidy`` rounds what it is made of.

    Raises:
        ValueError: the program does not run with these sizes.
    """
    with torch.no_grad():
        num_rows = len(own.joint(own.params).rows)
    params = {}
    for site, value in own.params.items():
        axis, latent = slicing.get(site, (0, -1))
        params[site] = value if latent < 0 else value.index_select(axis, chosen[latent])
        if latent >= 0 and own.program.supports[site] is constraints.simplex and axis == value.ndim - 1:
            params[site] = params[site] / params[site].sum(-1, keepdim=True)
    data = tuple(_take(argument, rows, num_rows, tidy) for argument in own.data)
    model = own.model
    if isinstance(model, partial) and "num_components" in model.keywords:
        counts = tuple(len(index) for index in chosen)
        given = model.keywords["num_components"]
        model = partial(
            model.func,
            *model.args,
            **{**model.keywords, "num_components": counts if isinstance(given, tuple) else counts[0]},
        )
    subject = replace(own.subject, model=model, data=data, params=own.wrap(params))
    found = Trial(subject)
    return Trial(replace(subject, params=found.wrap(tidied(found, found.params)))) if tidy else found


def _take(argument: Any, rows: Tensor, num_rows: int, tidy: bool) -> Any:
    if not (isinstance(argument, Tensor | np.ndarray) and argument.ndim and len(argument) == num_rows):
        return argument
    taken = argument[rows] if isinstance(argument, Tensor) else argument[rows.numpy()]
    return _short(taken) if tidy and isinstance(taken, Tensor) and taken.is_floating_point() else taken


def tidied(own: Trial, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return parameters rounded to two digits where they then still lie in their support."""
    found = dict(params)
    for site in own.coordinates.transforms:
        support = own.program.supports[site]
        base = base_of(support)
        rounded = _short(found[site])
        if base is constraints.simplex:
            rounded = (found[site] * 20).round().clamp_min(1) / 20
            rest = (20 - (rounded[..., :-1] * 20).round().sum(-1, keepdim=True)) / 20
            rounded = torch.cat([rounded[..., :-1], rest], -1)
        inside = (
            own.coordinates.transforms[site].inv(rounded)
            if bool(support.check(rounded).all())
            else torch.tensor(torch.inf)
        )
        if bool(torch.isfinite(inside).all()):
            found[site] = rounded
    return found


def _short(value: Tensor, digits: int = 2) -> Tensor:
    """Return a tensor with each entry rounded to a few significant digits."""
    rounded = [float(f"{entry:.{digits}g}") for entry in value.flatten().tolist()]
    return torch.tensor(rounded, dtype=torch.float64).to(value).reshape(value.shape)


def _neat(value: Tensor, support: constraints.Constraint) -> Tensor:
    """Return a numerical maximiser without its last digits, where it stays inside its support."""
    rounded = value.round(decimals=12)
    return rounded if support.check(rounded).all() else _short(value, 12)


def _short_resp(possible: Tensor, generator: torch.Generator) -> Tensor:
    """Return random responsibilities (N, K) in tenths where K is small; 0 where a component is impossible."""
    num = possible.shape[1]
    parts = max(10, 2 * num)
    extra = torch.multinomial(torch.ones(possible.shape), parts - num, replacement=True, generator=generator)
    counts = torch.ones(possible.shape, dtype=torch.float64)
    counts.scatter_add_(1, extra, torch.ones(extra.shape, dtype=torch.float64))
    counts = torch.where(possible, counts, 0.0)
    return counts / counts.sum(1, keepdim=True)


def _wrong_e_step(own: Trial, params: dict[str, Tensor], target: Target, failed: Check | None) -> Found | None:
    with torch.no_grad():
        rows = own.joint(params).rows
    claimed, right = own.responsibilities(params), rows.softmax(1)
    if claimed.shape != right.shape:
        return None
    tolerance = CLEAR * 64 * largest_eps(rows, claimed) * (1 + rows[torch.isfinite(rows)].abs().max())
    return None if bool(((claimed - right).abs() <= tolerance).all()) else Found(own, params, target)


def _wrong_report(own: Trial, params: dict[str, Tensor], target: Target, failed: Check | None) -> Found | None:
    with torch.no_grad():
        joint = own.joint(params)
    size = 1 + (joint.row_weights * joint.rows.logsumexp(1)).abs().sum()
    reported = own.reported(params)
    tolerance = ROUNDING * largest_eps(size, reported) * size
    return None if abs(reported - joint.log_likelihood) <= tolerance else Found(own, params, target)


def _wrong_m_step(own: Trial, params: dict[str, Tensor], target: Target, failed: Check | None) -> Found | None:
    if failed is None or failed.counterexample is None or "site" not in failed.counterexample:
        return None
    site, new = failed.counterexample["site"], own.returned(target.resp, params)
    leaves_support = math.isnan(failed.error)
    if leaves_support == own.is_inside(site, new[site]):
        return None  # a small instance of another fault, such as a division by 1 - 1
    if not leaves_support:
        for prior in (0.0, 1.0) if own.has_prior else (0.0,):  # a MAP step leaves a gradient of Q, and is right
            residual = own.residual(new, target._replace(prior=prior))
            blurred = residual.tolerances.max() > torch.finfo(own.origin.dtype).eps ** 0.5
            if blurred or bool((residual.errors.abs() <= CLEAR * residual.tolerances).all()):
                return None
        start = new
    else:
        start = {**new, site: params[site]}
    better = own.maximiser(start, target, [site])
    if own.runs_off(start, better).any():
        raise NoMaximum
    with torch.no_grad():
        heights = [own.terms(own.unconstrained(at)[0], target).sum() for at in (start, better)]
    return Found(own, params, target, site, better) if heights[1] > heights[0] else None


def _write_e_step(found: Found) -> str:
    lines = [
        *_preamble(found.own.subject, "model", "e_step"),
        *_assign(found.own, found.params),
        "",
        f"claimed = e_step(params, {_names(found.own)})",
        f"right = log_joint(model, params, {_names(found.own)}).rows.softmax(1)",
        'print("claimed", claimed, "by enumeration", right, sep="\\n")',
    ]
    return "\n".join(lines)


def _write_report(found: Found) -> str:
    lines = [
        *_preamble(found.own.subject, "model", "log_likelihood"),
        *_assign(found.own, found.params),
        "",
        f'print("claimed", float(log_likelihood(params, {_names(found.own)})))',
        f'print("by enumeration", log_joint(model, params, {_names(found.own)}).log_likelihood.item())',
    ]
    return "\n".join(lines)


def _write_m_step(found: Found) -> str:
    own, site = found.own, found.site
    mapping = own.container is None
    new = own.returned(found.target.resp, found.params)
    changed = [name for name, value in found.better.items() if name == site or not torch.equal(value, new[name])]
    moved = {name: _literal(_neat(found.better[name], own.program.supports[name])) for name in changed}
    if mapping:
        better = "{**claimed, " + ", ".join(f'"{name}": {value}' for name, value in moved.items()) + "}"
    else:
        better = "claimed._replace(" + ", ".join(f"{name}={value}" for name, value in moved.items()) + ")"
    value = f'["{site}"]' if mapping else f".{site}"
    extra = ", params=params" if own.takes_params else ""
    objective = "Q + log prior" if found.target.prior else "Q"
    lines = [
        *_preamble(own.subject, "model", "m_step"),
        *_assign(own, found.params if own.takes_params else None),
        f"resp = {_literal(own.in_their_shape(found.target.resp))}",
        "",
        f"claimed = m_step(resp, {_names(own)}{extra})",
        f"better = {better}",
    ]
    if not own.is_inside(site, new[site]):
        says = f"{site} outside its support {own.program.supports[site]}, and the maximiser of {objective}:"
        return "\n".join([*lines, f'print("{says}", claimed{value}, better{value}, sep="\\n")'])
    lines += [
        'for name, found in (("claimed", claimed), ("better", better)):',
        f"    joint = log_joint(model, found, {_names(own)})",
        f"    q = joint.expected(resp){' + joint.log_prior' if found.target.prior else ''}",
        f'    print(f"{{name}}: {objective} = {{q.item()!r}} at {site} =", found{value}, sep="\\n")',
    ]
    return "\n".join(lines)


FAULTS: dict[
    str, tuple[Callable[[Trial, dict[str, Tensor], Target, Check | None], Found | None], Callable[[Found], str]]
] = {
    "wrong E-step": (_wrong_e_step, _write_e_step),
    "wrong M-step": (_wrong_m_step, _write_m_step),
    "wrong report": (_wrong_report, _write_report),
}
"""For each verdict, the test of a small instance, and how it is written down."""


def _preamble(subject: Subject, *roles: str) -> list[str]:
    """Return the imports of a snippet, and a remark on what cannot be imported."""
    lines = ["import torch", "", "from mixproof.inference.enumeration import log_joint"]
    bindings, missing = [], []
    container = None if isinstance(subject.params, Mapping) else type(subject.params)
    wanted: list[tuple[str, Any]] = [(role, getattr(subject, role)) for role in roles]
    if container is not None and "m_step" not in roles:
        wanted.append((container.__name__, container))
    for role, value in wanted:
        function: Any = value
        keywords: dict[str, Any] = {}
        if isinstance(value, partial) and not value.args and all(map(_is_plain, value.keywords.values())):
            function, keywords = value.func, dict(value.keywords)
        module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "<")
        if (
            module in (None, "__main__")
            or "." in name
            or "<" in name
            or getattr(sys.modules.get(module), name, None) is not function
        ):
            missing.append(role)
            continue
        alias = f"{name} as {role}" if name != role and not keywords else name
        if keywords:
            alias = f"{name} as {role}_program" if role == "model" else f"{name} as whole_{role}"
            given = ", ".join(f"{key}={value!r}" for key, value in keywords.items())
            bindings.append(f"{role} = partial({alias.split()[-1]}, {given})")
        lines.append(f"from {module} import {alias}")
    if bindings:
        lines.insert(0, "from functools import partial\n")
    if missing:
        lines.append(f"# {' and '.join(missing)}: as given to verify_em")
    return [*lines, "", *bindings]


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str | None) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _names(own: Trial) -> str:
    names = [name for name in inspect.signature(own.model).parameters if name not in ("params", "resp", "model")]
    names = names if len(names) >= len(own.data) else [f"argument_{i}" for i in range(len(own.data))]
    return ", ".join(names[: len(own.data)])


def _assign(own: Trial, params: Mapping[str, Tensor] | None) -> list[str]:
    lines = [f"{name} = {_literal(value)}" for name, value in zip(_names(own).split(", "), own.data, strict=True)]
    if params is None:
        return lines
    if own.container is None:
        entries = ", ".join(f'"{name}": {_literal(value)}' for name, value in params.items())
        return [*lines, f"params = {{{entries}}}"]
    entries = ", ".join(f"{name}={_literal(value)}" for name, value in params.items())
    return [*lines, f"params = {own.container.__name__}({entries})"]


def _literal(value: Any) -> str:
    """Return Python that makes a value again, to the last digit."""
    if isinstance(value, Tensor):
        return f"torch.tensor({value.tolist()!r}, dtype={value.dtype})".replace("inf", "float('inf')").replace(
            "nan", "float('nan')"
        )
    if isinstance(value, np.ndarray):
        return f"torch.tensor({value.tolist()!r}).numpy()"
    return repr(value)
