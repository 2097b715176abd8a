"""Hints: the one change that was measured to mend a wrong step.

A hint is never a guess. Each change below is made to the person's step at fresh random points, everything else being
left alone, and is told only where the step is then right to rounding at all of them. Constants that a change needs (a
floor, a pseudo-count) are estimated at one point, rounded to two digits, and tested at the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.supports import base_of
from mixproof.inference.verification.report import Check, blamed
from mixproof.inference.verification.trial import PENALISED, SMALL, StepError, Target, Trial

NUM_FRESH = 2
MAX_ORDERS = 24
POWERS = {
    "square of {site} for {site}": lambda value: value.sqrt(),
    "square root of {site} for {site}": torch.square,
    "reciprocal of {site} for {site}": torch.reciprocal,
}
"""What is written for what, and the change that undoes it."""
POWERS_OF_COUNTS = {
    1.0: "",
    0.5: " under the root",
    -1.0: " in the reciprocal",
    -0.5: " under the root of the reciprocal",
}
"""How a site may depend on its denominator: a variance, a standard deviation, a precision, its root."""


class Point(NamedTuple):
    """What an M-step made of random parameters and responsibilities."""

    params: dict[str, Tensor]
    target: Target
    new: dict[str, Tensor]
    better: dict[str, Tensor]
    """What it should have made, by a numerical maximiser; meaningful at the first point only."""
    error: float
    """The largest gradient that it leaves; NaN where it leaves the support."""


Values = Callable[[Point], Mapping[str, Tensor]]
Term = Callable[[Mapping[str, Tensor]], Tensor]


class Mend(NamedTuple):
    """A change to an M-step's result, or to what it is taken to maximise."""

    says: str
    values: Values = lambda point: point.new
    target: Callable[[Point], Target] = lambda point: point.target
    only: str = ""
    """A site whose own gradient alone must vanish; all must otherwise."""


def measured_hints(own: Trial, verdict: str, checks: Sequence[Check], generator: torch.Generator) -> tuple[str, ...]:
    """Return the changes that mend a wrong step, in words; none where it breaks or no known change mends it.

    Args:
        own: the derivation.
        verdict: ``wrong E-step``, ``wrong M-step`` or ``wrong report``.
        checks: those that led to it.
        generator: draws the fresh points.
    """
    try:
        if verdict == "wrong E-step":
            return _e_step_hints(own, generator)
        if verdict == "wrong report":
            return _report_hints(own, generator)
        failed = blamed(checks)
        if failed is None or failed.counterexample is None:
            return ()
        prior = float(any(check.name == PENALISED and not check.passed for check in checks))
        return _m_step_hints(own, failed.counterexample["site"], prior, generator)
    except StepError:
        return ()


def _e_step_hints(own: Trial, generator: torch.Generator) -> tuple[str, ...]:
    points = [own.random_params(generator) for _ in range(NUM_FRESH + 1)]
    with torch.no_grad():
        joints = [own.joint(params) for params in points]
    claims = [own.responsibilities(params) for params in points]
    rights = [joint.rows.softmax(1) for joint in joints]
    if any(claim.shape != right.shape for claim, right in zip(claims, rights, strict=True)):
        return ()

    def hold(mended: Callable[[int], Tensor]) -> bool:
        """Whether the claims equal this, at all points."""
        try:
            return all(_same(claim, mended(i)) for i, claim in enumerate(claims))
        except StepError:
            return False

    num = claims[0].shape[1]
    found = []
    if hold(lambda i: (joints[i].rows - joints[i].latent).softmax(1)):
        found.append("the weights are missing: it is right once each density is multiplied by its component's weight")
    if hold(lambda i: (joints[i].rows + joints[i].latent).softmax(1)):
        found.append("the weights are counted twice: it is right once they are counted once")
    if hold(lambda i: joints[i].latent.softmax(1)):
        found.append("the data are missing: it returns the weights")
    if hold(lambda i: torch.nn.functional.one_hot(rights[i].argmax(1), num).to(rights[i])):
        found.append("hard assignments in place of responsibilities: it is right without the argmax")
    if hold(lambda i: joints[i].rows.softmax(0)):
        found.append("the softmax runs over the rows: it is right over the components")
    sums = [claim.sum(1, keepdim=True) for claim in claims]
    exponent = _constant(_slope(claims[0].clamp_min(0).log(), rights[0].log())) or 1.0
    if not found and all(_same(claim / total, right) for claim, total, right in zip(claims, sums, rights, strict=True)):
        found.append("the responsibilities are not normalised: divided by their sum over the components they are right")
    elif not found and exponent != 1 and hold(lambda i: (exponent * joints[i].rows).softmax(1)):
        found.append(f"a power of the densities, exponent {exponent:g}: it is right with exponent 1")
    if all((claim <= 0).all() for claim in claims) and hold(lambda i: joints[i].rows.log_softmax(1)):
        found.append("logarithms of the responsibilities: it is right once exponentiated")
    weights = [joint.row_weights[:, None] for joint in joints]
    if (weights[0] != 1).any() and hold(lambda i: weights[i] * rights[i]):
        found.append("the row weights are in the responsibilities: they belong to the sums of the M-step")
    for order in _orders(num):
        if all(_same(claim, right[:, list(order)]) for claim, right in zip(claims, rights, strict=True)):
            found.append(f"components in another order: column k is that of component {list(order)}[k]")
    for site, says, change in _substitutions(own):
        try:
            mended = [own.responsibilities({**params, site: change(params[site])}) for params in points]
        except StepError:
            continue
        if all(_same(claim, right) for claim, right in zip(mended, rights, strict=True)):
            found.append(f"{says}: with the other it is right")
    return tuple(found)


def _substitutions(own: Trial) -> Iterator[tuple[str, str, Callable[[Tensor], Tensor]]]:
    """Yield a site, what may be written for it, and the change that undoes it."""
    for site in own.coordinates.transforms:
        if own.program.supports[site] is not constraints.real:
            for says, change in POWERS.items():
                yield site, says.format(site=site), change
        value = own.params[site]
        if _is_square(value) and not torch.allclose(value, value.mT):
            yield site, f"{site} transposed", lambda value: value.mT


def _report_hints(own: Trial, generator: torch.Generator) -> tuple[str, ...]:
    points = [own.random_params(generator) for _ in range(NUM_FRESH + 1)]
    with torch.no_grad():
        joints = [own.joint(params) for params in points]
    claims = torch.tensor([own.reported(params).item() for params in points], dtype=torch.float64)
    if not claims.isfinite().all():
        return ()
    sizes = [(joint.row_weights * joint.rows.logsumexp(1)).abs().sum().item() + 1 for joint in joints]

    def log_lik(joint: Any, rows: Tensor) -> float:
        return (joint.row_weights @ rows.logsumexp(1)).item()

    def hold(values: Sequence[float]) -> bool:
        eps = torch.finfo(own.origin.dtype).eps
        return all(
            abs(claim - value) <= 2**10 * eps * size
            for claim, value, size in zip(claims.tolist(), values, sizes, strict=True)
        )

    rights = torch.tensor([log_lik(joint, joint.rows) for joint in joints], dtype=torch.float64)
    totals = torch.tensor([joint.row_weights.sum().item() for joint in joints], dtype=torch.float64)
    found = []
    if hold((rights / totals).tolist()):
        found.append("the mean for sum over the rows: it is right times the number of rows")
    elif not hold(rights.tolist()) and hold((rights * (claims / rights)[0]).tolist()):
        found.append(f"a factor of {claims[0] / rights[0]:.7g}: it is right divided by it")
    if hold([log_lik(joint, joint.rows - joint.latent) for joint in joints]):
        found.append("the weights are missing: it is right with each component's log weight added")
    if hold([log_lik(joint, joint.rows + joint.latent) for joint in joints]):
        found.append("the weights are counted twice")
    if hold([(joint.row_weights @ joint.rows.sum(1)).item() for joint in joints]):
        found.append("a sum over the components of logarithms: the logarithm of the sum is right")
    expected = [torch.where(joint.rows.isfinite(), joint.rows.softmax(1) * joint.rows, 0).sum(1) for joint in joints]
    if hold([(joint.row_weights @ rows).item() for joint, rows in zip(joints, expected, strict=True)]):
        found.append("the expected log joint Q, without the entropy of the responsibilities: with it, it is right")
    if own.has_prior and hold(
        [right + joint.log_prior.item() for right, joint in zip(rights.tolist(), joints, strict=True)]
    ):
        found.append("the log prior is added: without it, it is right")
    if (joints[0].row_weights != 1).any() and hold([joint.rows.logsumexp(1).sum().item() for joint in joints]):
        found.append("the row weights are missing: it is right with each row counted as often as its weight says")
    gap = claims - rights
    if hold((rights + gap.mean()).tolist()):
        found.append(f"a term free of the parameters, {gap.mean().item():.6g}, is added: without it, it is right")
    return tuple(found)


def _m_step_hints(own: Trial, site: str, prior: float, generator: torch.Generator) -> tuple[str, ...]:
    points = []
    for fresh in range(NUM_FRESH + 1):
        params = own.random_params(generator)
        target = Target(own.random_resp(params, generator), prior=prior)
        new = own.returned(target.resp, params)
        better = new if fresh else _better(own, params, new, target, site)
        inside = all(own.is_inside(name, new[name]) for name in own.coordinates.transforms)
        error = own.residual(new, target).errors.abs().max().item() if inside else math.nan
        points.append(Point(params, target, new, better, error))
    found: list[str] = []
    for mend in _known_mends(own, site, points[0]):
        if all(_is_right(own, mend, point) for point in points[1:]):
            found.append(mend.says)
            if len(found) == 1 and not mend.says.startswith("mean"):
                break
    return tuple(found)


def _better(
    own: Trial, params: dict[str, Tensor], new: dict[str, Tensor], target: Target, site: str
) -> dict[str, Tensor]:
    """Return what the M-step should have made of a site, the others as it made them where it could."""
    start = {
        name: new[name] if name != site and own.is_inside(name, new[name]) else params[name]
        for name in own.coordinates.transforms
    }
    return own.maximiser({**new, **start}, target, [site])


def _is_right(own: Trial, mend: Mend, point: Point) -> bool:
    """Whether an M-step leaves no gradient once it is changed."""
    try:
        values = {**point.new, **mend.values(point)}
        if not all(own.is_inside(name, values[name]) for name in own.coordinates.transforms):
            return False
        residual = own.residual(values, mend.target(point))
    except (StepError, ValueError, RuntimeError):  # the change does not apply to these shapes or numbers
        return False
    known = 0.0 if math.isnan(point.error) else SMALL**2 * point.error  # of a constant that was estimated
    small = residual.errors.abs() <= 4 * residual.tolerances + known
    return bool(small[own.spans()[mend.only]].all() if mend.only else small.all())


def _known_mends(own: Trial, site: str, first: Point) -> Iterator[Mend]:
    """Yield the known changes to an M-step that is wrong in a site, likelier ones first."""
    yield from _counts(own, site, first)
    yield from _functions(own, site, first)
    yield from _responsibilities(own, site, first)
    yield from _orders_of_axes(site, first)
    yield from _constants(own, site, first)
    yield from _of_the_data(own, site, first)


def _put(site: str, change: Callable[[Tensor], Tensor]) -> Values:
    return lambda point: {site: change(point.new[site])}


def _counts(own: Trial, site: str, first: Point) -> Iterator[Mend]:
    """Yield the changes of what a site is divided by: a function of the soft counts to some power."""
    value, (num_rows, num) = first.new[site], first.target.resp.shape

    def times(ratio: Callable[[Tensor], Tensor], power: float) -> Values:
        def change(point: Point) -> dict[str, Tensor]:
            soft = (own.joint(point.params).row_weights[:, None] * point.target.resp).sum(0)
            counts = soft.reshape(num, *[1] * (value.ndim - 1)) if value.shape[:1] == (num,) else soft.sum()
            return {site: point.new[site] * ratio(counts) ** power}

        return change

    for power, of in POWERS_OF_COUNTS.items():
        yield Mend(f"n - 1 for n{of}: {site} is right with n", times(lambda n: (n - 1) / n, power))
        says = f"N for n{of}: {site} is right with the component's soft count in place of the number of rows"
        yield Mend(says, times(lambda n: num_rows / n, power))
        says = f"undivided{of}: {site} is right divided by the component's soft count"
        yield Mend(says, times(lambda n: 1 / n, power))


def _functions(own: Trial, site: str, first: Point) -> Iterator[Mend]:
    """Yield the changes that take another function of a site's value, or leave another site where it was."""
    for says, change in POWERS.items():
        yield Mend(f"{says.format(site=site)}: with the other it is right", _put(site, change))
    if _is_square(first.new[site]):
        yield Mend(f"{site} is transposed", _put(site, lambda value: value.mT))
    yield Mend(f"{site} has the other sign", _put(site, torch.neg))
    for other in own.coordinates.transforms:
        if other != site:
            says = f"about the old {other}: {site} is right about the new one"
            yield Mend(says, partial(_old, other), only=site)


def _old(site: str, point: Point) -> dict[str, Tensor]:
    return {site: point.params[site]}


def _responsibilities(own: Trial, site: str, first: Point) -> Iterator[Mend]:
    """Yield the changes of the weights with which rows enter Q."""
    num_rows, num = first.target.resp.shape

    def resp(change: Callable[[Tensor], Tensor]) -> Callable[[Point], Target]:
        return lambda point: point.target._replace(resp=change(point.target.resp))

    says = f"hard assignments: {site} maximises Q at the argmax of the responsibilities"
    yield Mend(says, target=resp(_hardened), only=site)
    says = f"unweighted: {site} maximises Q with all responsibilities equal"
    yield Mend(says, target=resp(lambda resp: torch.full_like(resp, 1 / num)), only=site)
    if (own.joint(first.params).row_weights != 1).any():
        ones = torch.ones(num_rows, dtype=first.new[site].dtype)
        says = f"the row weights are missing: {site} maximises Q with each row counted once"
        yield Mend(says, target=lambda point: point.target._replace(row_weights=ones), only=site)


def _orders_of_axes(site: str, first: Point) -> Iterator[Mend]:
    """Yield the changes of the order along an axis of a site."""
    for axis, size in enumerate(first.new[site].shape):
        what = "components" if axis == 0 and size == first.target.resp.shape[1] else f"axis {axis}"
        for order in _orders(size):
            change = partial(torch.index_select, dim=axis, index=torch.tensor(order))
            says = f"{what} in another order: {site} is right when taken as {list(order)}"
            yield Mend(says, _put(site, change))


def _is_square(value: Tensor) -> bool:
    """Whether a tensor holds square matrices."""
    return value.ndim >= 2 and value.shape[-1] == value.shape[-2]


def _constants(own: Trial, site: str, first: Point) -> Iterator[Mend]:
    """Yield the changes by a constant that the first point determines."""
    value, right, has_prior = first.new[site], first.better[site], own.has_prior
    if measured := _common(value / right):
        for factor in dict.fromkeys((_rounded(measured) or measured, measured)):
            says = f"a factor of {factor:.7g}: {site} is right divided by it"
            yield Mend(says, _put(site, partial(torch.mul, other=1 / factor)))
    if added := _constant(value - right):
        yield Mend(f"{added:g} is added to {site}: without it, it is right", _put(site, lambda value: value - added))
    if _is_square(value):
        eye = torch.eye(value.shape[-1], dtype=value.dtype)
        if floor := _constant((value - right).diagonal(dim1=-2, dim2=-1)):
            says = f"{floor:g} is added to the diagonal of {site}: without it, it is right"
            yield Mend(says, _put(site, lambda value: value - floor * eye))
    if has_prior and (times := _multiplier(own, first, site, lambda target, c: target._replace(prior=c))):
        says = f"the prior counted {times:g} times: once is MAP-EM, never is exact EM"
        yield Mend(says, target=lambda point: point.target._replace(prior=times), only=site)
    for prior, (says, term) in itertools.product((1.0, 0.0) if has_prior else (0.0,), _pseudo_counts(own, site)):

        def smoothed(target: Target, count: float, prior: float = prior, term: Term = term) -> Target:
            return target._replace(prior=prior, penalty=lambda params: count * term(params))

        if count := _multiplier(own, first, site, smoothed):
            yield Mend(says.format(count=f"{count:g}"), target=_with_count(smoothed, count), only=site)


def _with_count(smoothed: Callable[[Target, float], Target], count: float) -> Callable[[Point], Target]:
    return lambda point: smoothed(point.target, count)


def _multiplier(own: Trial, point: Point, site: str, with_constant: Callable[[Target, float], Target]) -> float | None:
    """Return the constant c at which Q + c term is stationary in a site, to two digits, or None where there is none."""
    u, edge = own.unconstrained(point.new)
    span = own.spans()[site]
    if edge[span].any():
        return None
    base = own.gradient(u, with_constant(point.target, 0.0))[span]
    term = own.gradient(u, with_constant(point.target, 1.0))[span] - base
    if not (term.isfinite().all() and base.isfinite().all()) or not term.any():
        return None
    constant = -(base @ term) / (term @ term)
    left = (base + constant * term).norm() / base.norm().clamp_min(1e-300)
    return _rounded(constant.item()) if left < 1e-4 else None


def _pseudo_counts(own: Trial, site: str) -> Iterator[tuple[str, Term]]:
    """Yield the terms that pseudo-counts add to Q at a site of probabilities, and what they are called."""
    support = base_of(own.program.supports[site])

    def ones(params: Mapping[str, Tensor]) -> Tensor:
        return params[site].log().sum()

    def zeros(params: Mapping[str, Tensor]) -> Tensor:
        return (1 - params[site]).log().sum()

    if support is constraints.simplex:
        yield f"smoothed by {{count}}: {site} is right without that pseudo-count in each cell", ones
    elif support is constraints.unit_interval:
        says = f"smoothed by {{count}}: {site} is right without that pseudo-count of each outcome"
        yield says, lambda params: ones(params) + zeros(params)
        yield f"smoothed by {{count}} of ones: {site} is right without that pseudo-count", ones
        yield f"smoothed by {{count}} of zeros: {site} is right without that pseudo-count", zeros


def _of_the_data(own: Trial, site: str, first: Point) -> Iterator[Mend]:
    """Yield the changes that need the data: a weighted median for a weighted mean, or the reverse."""
    value, resp = first.new[site], first.target.resp
    for x in own.data:
        if not (isinstance(x, Tensor) and x.is_floating_point() and len(x) == len(resp)):
            continue
        if value.shape != (resp.shape[1], *x.shape[1:]):
            continue
        for says, wrong, right in (
            ("mean for median", _weighted_mean, _weighted_median),
            ("median for mean", _weighted_median, _weighted_mean),
        ):
            if _same(value, wrong(x, resp)):
                yield Mend(
                    f"{says}: {site} is right as the weighted {says.split()[-1]}", _taken(site, right, x), only=site
                )


def _taken(site: str, statistic: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Values:
    return lambda point: {site: statistic(x, point.target.resp)}


def _weighted_mean(x: Tensor, resp: Tensor) -> Tensor:
    return torch.einsum("nk,n...->k...", resp, x) / resp.sum(0).reshape(-1, *[1] * (x.ndim - 1))


def _weighted_median(x: Tensor, resp: Tensor) -> Tensor:
    columns = x.reshape(len(x), -1)
    order = columns.argsort(0)
    reached = torch.stack([resp[index].cumsum(0) for index in order.T])  # (D, N, K)
    place = (reached < resp.sum(0) / 2).sum(1)  # (D, K)
    return columns.gather(0, order).T.gather(1, place).T.reshape(resp.shape[1], *x.shape[1:])


def _hardened(resp: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(resp.argmax(1), resp.shape[1]).to(resp)


def _orders(num: int) -> list[tuple[int, ...]]:
    """Return the orders of components other than their own: all of few, else the cyclic ones."""
    if math.factorial(num) <= MAX_ORDERS:
        return list(itertools.permutations(range(num)))[1:]
    return [tuple((k + shift) % num for k in range(num)) for shift in range(1, num)]


def _slope(claimed: Tensor, right: Tensor) -> Tensor:
    """Return the ratio of the differences between neighbouring components, of two tables of logarithms."""
    a, b = claimed.diff(dim=1), right.diff(dim=1)
    return (a / b)[(b.abs() > 1e-3) & a.isfinite() & b.isfinite()]


def _constant(values: Tensor) -> float | None:
    """Return the number that all entries equal, to two digits, or None where they differ."""
    common = _common(values)
    return None if common is None else _rounded(common)


def _common(values: Tensor) -> float | None:
    """Return the number that all entries equal, or None where they differ."""
    if not values.numel() or not values.isfinite().all():
        return None
    middle = values.double().median()
    return middle.item() if (values - middle).abs().max() <= 1e-3 * middle.abs() else None


def _rounded(value: float) -> float | None:
    rounded = float(f"{value:.2g}")
    return rounded if rounded and abs(rounded - value) <= 5e-3 * abs(value) else None


def _same(claimed: Tensor, right: Tensor) -> bool:
    """Whether two tensors agree to rounding."""
    if claimed.shape != right.shape or not claimed.isfinite().all():
        return False
    eps = torch.finfo(claimed.dtype).eps if claimed.is_floating_point() else 0.0
    return bool(((claimed - right).abs() <= 2**12 * eps * (1 + right.abs())).all())
