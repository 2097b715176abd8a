"""Hints: the one change that was measured to mend a wrong step.

A hint is never a guess. Each change below is made to the person's step at fresh random points, everything else being
left alone, and is told only where the step is then right to rounding at all of them. Constants that a change needs (a
floor, a pseudo-count) are estimated at one point, rounded to two digits, and tested at the others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.verification.report import Check
from mixproof.inference.verification.trial import StepError, Target, Trial

NUM_FRESH = 2
MAX_ORDERS = 24
POWERS = {
    "square of {site} for {site}": lambda value: value.sqrt(),
    "square root of {site} for {site}": torch.square,
    "reciprocal of {site} for {site}": torch.reciprocal,
}
"""What is written for what, and the change that undoes it."""


class Point(NamedTuple):
    """What an M-step made of random parameters and responsibilities."""

    params: dict[str, Tensor]
    target: Target
    new: dict[str, Tensor]
    better: dict[str, Tensor]
    """What it should have made, by a numerical maximiser; meaningful at the first point only."""


class Mend(NamedTuple):
    """A change to an M-step's result, or to what it is taken to maximise."""

    says: str
    values: Callable[[Point], Mapping[str, Tensor]] = lambda point: point.new
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
        failed = next(
            (check.counterexample for check in checks if check.name.startswith("grad") and not check.passed), None
        )
        return _m_step_hints(own, failed["site"], generator) if failed and "site" in failed else ()
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
    if all((claim > 0).all() for claim in claims) and not found:
        sums = [claim.sum(1, keepdim=True) for claim in claims]
        if all(_same(claim / total, right) for claim, total, right in zip(claims, sums, rights, strict=True)):
            found.append(
                "the responsibilities are not normalised: divided by their sum over the components they are right"
            )
        exponent = _constant(_slope(claims[0].log(), rights[0].log())) or 1.0
        if exponent != 1 and hold(lambda i: (exponent * joints[i].rows).softmax(1)):
            found.append(f"a power of the densities, exponent {exponent:g}: it is right with exponent 1")
    if all((claim <= 0).all() for claim in claims) and hold(lambda i: joints[i].rows.log_softmax(1)):
        found.append("logarithms of the responsibilities: it is right once exponentiated")
    weights = [joint.row_weights[:, None] for joint in joints]
    if (weights[0] != 1).any() and hold(lambda i: weights[i] * rights[i]):
        found.append("the row weights are in the responsibilities: they belong to the sums of the M-step")
    for order in _orders(num):
        if hold(lambda i, order=order: rights[i][:, order]):
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
        if value.ndim >= 2 and value.shape[-1] == value.shape[-2] and not torch.allclose(value, value.mT):
            yield site, f"{site} transposed", lambda value: value.mT


def _report_hints(own: Trial, generator: torch.Generator) -> tuple[str, ...]:
    points = [own.random_params(generator) for _ in range(NUM_FRESH + 1)]
    with torch.no_grad():
        joints = [own.joint(params) for params in points]
    claims = torch.tensor([own.reported(params) for params in points], dtype=torch.float64)
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
    elif (factor := _constant(claims / rights)) and hold((rights * factor).tolist()):
        found.append(f"a factor of {factor:g}: it is right divided by it")
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


def _m_step_hints(own: Trial, site: str, generator: torch.Generator) -> tuple[str, ...]:
    points = []
    for fresh in range(NUM_FRESH + 1):
        params = own.random_params(generator)
        target = Target(own.random_resp(params, generator))
        new = own.maximise(target.resp, params)
        better = new if fresh else own.maximiser(new, target, [site])
        points.append(Point(params, target, new, better))
    found: list[str] = []
    for mend in _mends(own, site, points[0]):
        if all(_mends_all(own, mend, point) for point in points[1:]):
            found.append(mend.says)
            if len(found) == 1 and not mend.says.startswith("mean"):
                break
    return tuple(found)


def _mends_all(own: Trial, mend: Mend, point: Point) -> bool:
    """Whether a change leaves no gradient, where there was one without it."""
    try:
        values = {**point.new, **mend.values(point)}
        if not all(own.program.supports[name].check(values[name]).all() for name in own.coordinates.transforms):
            return False
        residual = own.residual(values, mend.target(point))
    except (StepError, ValueError, RuntimeError):  # the change does not apply to these shapes or numbers
        return False
    small = residual.errors.abs() <= 4 * residual.tolerances
    return bool(small[own.spans()[mend.only]].all() if mend.only else small.all())


def _mends(own: Trial, site: str, first: Point) -> Iterator[Mend]:
    """Yield the known changes to an M-step that is wrong in a site, likelier ones first."""
    value, support = first.new[site], own.program.supports[site]
    num = first.target.resp.shape[1]

    def set_to(change: Callable[[Point, Tensor], Tensor]) -> Callable[[Point], Mapping[str, Tensor]]:
        return lambda point: {site: change(point, point.new[site])}

    def counts(point: Point) -> Tensor:
        """Return the soft counts of the components, to multiply the site with."""
        weights = own.joint(point.params).row_weights if point.target.row_weights is None else point.target.row_weights
        soft = (weights[:, None] * point.target.resp).sum(0)
        return soft.reshape(num, *[1] * (value.ndim - 1)) if value.shape[:1] == (num,) else soft.sum()

    for power, of in (
        (1.0, ""),
        (0.5, " under the root"),
        (-1.0, " in the reciprocal"),
        (-0.5, " under the root of the reciprocal"),
    ):
        yield Mend(
            f"n - 1 for n{of}: {site} is right with n in the denominator",
            set_to(lambda p, v, power=power: v * ((counts(p) - 1) / counts(p)) ** power),
        )
        yield Mend(f"n for n - 1{of}", set_to(lambda p, v, power=power: v * (counts(p) / (counts(p) - 1)) ** power))
        yield Mend(
            f"N for n{of}: {site} is right with the component's soft count in place of the number of rows",
            set_to(lambda p, v, power=power: v * (len(p.target.resp) / counts(p)) ** power),
        )
        yield Mend(
            f"undivided{of}: {site} is right divided by the component's soft count",
            set_to(lambda p, v, power=power: v / counts(p) ** power),
        )
    for says, change in POWERS.items():
        yield Mend(
            f"{says.format(site=site)}: with the other it is right", set_to(lambda p, v, change=change: change(v))
        )
    if value.ndim >= 2 and value.shape[-1] == value.shape[-2]:
        yield Mend(f"{site} is transposed", set_to(lambda p, v: v.mT))
    yield Mend(f"{site} has the other sign", set_to(lambda p, v: -v))
    others = [other for other in own.coordinates.transforms if other != site]
    for other in others:
        yield Mend(
            f"about the old {other}: {site} is right about the new one",
            lambda point, other=other: {other: point.params[other]},
            only=site,
        )
    yield Mend(
        f"hard assignments: {site} maximises Q at the argmax of the responsibilities",
        target=lambda point: point.target._replace(resp=_hardened(point.target.resp)),
        only=site,
    )
    yield Mend(
        f"unweighted: {site} maximises Q with all responsibilities equal",
        target=lambda point: point.target._replace(resp=torch.full_like(point.target.resp, 1 / num)),
        only=site,
    )
    if (own.joint(first.params).row_weights != 1).any():
        yield Mend(
            f"the row weights are missing: {site} maximises Q with each row counted once",
            target=lambda point: point.target._replace(row_weights=torch.ones_like(point.target.resp[:, 0])),
            only=site,
        )
    if value.shape[:1] == (num,):
        for order in _orders(num):
            yield Mend(
                f"components in another order: {site}[{list(order)}] is right",
                set_to(lambda p, v, order=order: v[list(order)]),
            )
    yield from _estimated(own, site, first, set_to)
    yield from _of_the_data(own, site, first)
    if support is not constraints.simplex and value.ndim >= 1:
        for axis in range(value.ndim):
            if value.shape[axis] > 1:
                yield Mend(f"{site} is reversed along axis {axis}", set_to(lambda p, v, axis=axis: v.flip(axis)))


def _estimated(own: Trial, site: str, first: Point, set_to: Callable[..., Any]) -> Iterator[Mend]:
    """Yield the changes by a constant that the first point determines."""
    value, right, support = first.new[site], first.better[site], own.program.supports[site]
    if factor := _constant(value / right):
        yield Mend(f"a factor of {factor:g}: {site} is right divided by it", set_to(lambda p, v: v / factor))
    if added := _constant(value - right):
        yield Mend(f"{added:g} is added to {site}: without it, it is right", set_to(lambda p, v: v - added))
    if (
        value.ndim >= 2
        and value.shape[-1] == value.shape[-2]
        and (added := _constant((value - right).diagonal(dim1=-2, dim2=-1)))
    ):
        eye = torch.eye(value.shape[-1], dtype=value.dtype)
        yield Mend(
            f"{added:g} is added to the diagonal of {site}: without it, it is right",
            set_to(lambda p, v: v - added * eye),
        )
    if own.has_prior and (times := _multiplier(own, first, lambda target, c: target._replace(prior=c), site)):
        yield Mend(
            f"the prior counted {times:g} times: with the prior once it is MAP-EM, without it exact EM",
            target=lambda point: point.target._replace(prior=times),
            only=site,
        )
    for base in [own.has_prior] if own.has_prior else [False]:
        for says, penalty in _pseudo_counts(site, support):
            for prior in (1.0, 0.0) if base else (0.0,):
                start = first._replace(target=first.target._replace(prior=prior))
                count = _multiplier(
                    own,
                    start,
                    lambda target, c, penalty=penalty: target._replace(penalty=lambda params: c * penalty(params)),
                    site,
                )
                if count:
                    yield Mend(
                        says.format(site=site, count=f"{count:g}"),
                        target=lambda point, count=count, penalty=penalty, prior=prior: point.target._replace(
                            prior=prior, penalty=lambda params: count * penalty(params)
                        ),
                        only=site,
                    )


def _pseudo_counts(site: str, support: Any) -> Iterator[tuple[str, Callable[[Mapping[str, Tensor]], Tensor]]]:
    base = support
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    if base is constraints.simplex:
        yield (
            "smoothed by {count}: {site} is right without that pseudo-count in each cell",
            lambda params: params[site].log().sum(),
        )
    elif base is constraints.unit_interval:
        yield (
            "smoothed by {count}: {site} is right without that pseudo-count of each outcome",
            lambda params: params[site].log().sum() + (1 - params[site]).log().sum(),
        )
        yield (
            "smoothed by {count} of ones: {site} is right without that pseudo-count",
            lambda params: params[site].log().sum(),
        )
        yield (
            "smoothed by {count} of zeros: {site} is right without that pseudo-count",
            lambda params: (1 - params[site]).log().sum(),
        )


def _multiplier(own: Trial, point: Point, with_constant: Callable[[Target, float], Target], site: str) -> float | None:
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
                    f"{says}: {site} is right as the weighted {says.split()[-1]}",
                    lambda point, x=x, right=right: {site: right(x, point.target.resp)},
                    only=site,
                )


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
    clear = b.abs() > 1e-3
    return (a / b)[clear]


def _constant(values: Tensor) -> float | None:
    """Return the number that all entries equal, to two digits, or None where they differ."""
    if not values.numel() or not values.isfinite().all():
        return None
    middle = values.double().median()
    spread = (values - middle).abs().max()
    return _rounded(middle.item()) if spread <= 1e-3 * middle.abs() else None


def _rounded(value: float) -> float | None:
    rounded = float(f"{value:.2g}")
    return rounded if rounded and abs(rounded - value) <= 5e-3 * abs(value) else None


def _same(claimed: Tensor, right: Tensor) -> bool:
    """Whether two tensors agree to rounding."""
    if claimed.shape != right.shape or not claimed.isfinite().all():
        return False
    eps = torch.finfo(claimed.dtype).eps if claimed.is_floating_point() else 0.0
    return bool(((claimed - right).abs() <= 2**12 * eps * (1 + right.abs())).all())
