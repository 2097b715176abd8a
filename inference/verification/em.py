"""Is this E-step, this M-step, this log likelihood right for that Pyro program?

Nobody writes Q down: log p(x_n, z_n = k | params) comes from the program by enumeration, and its gradients by
autograd. The E-step is held against the normalised table at random parameters; the M-step must leave no gradient of Q,
nor of Q plus log prior, at **random** responsibilities, where no lucky symmetry hides a fault; a step that does not
maximise must at least rise and stop where the log likelihood is stationary (generalised EM: Dempster, Laird and Rubin
1977, section 2). What rounding explains is measured: each step is run again with its arguments changed in their last
places.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mixproof.inference.newton import descend
from mixproof.inference.supports import at_edge
from mixproof.inference.verification.hints import measured_hints
from mixproof.inference.verification.report import Check, Report, asserting
from mixproof.inference.verification.smallest import smallest_counterexample
from mixproof.inference.verification.subject import Subject
from mixproof.inference.verification.trial import (
    BLIND,
    NUM_NUDGES,
    PENALISED,
    ROUNDING,
    OutsideSupport,
    StepError,
    Target,
    Trial,
    Undecided,
    changes,
    largest_eps,
    nudge,
)

GRAVITY = ("wrong E-step", "wrong M-step", "wrong report", "undecided", "generalised EM", "MAP-EM", "exact EM")
"""The verdicts, the gravest first: of several steps the gravest is the derivation's."""
NUM_POINTS = 3
NUM_STARTS = 4
TILT = 1.0
"""How much of the program's own log responsibilities enters where unrelated ones lead an M-step out of its support."""
SOFT = 1e-3
"""A responsibility so near to 0 or 1 counts as hard."""
RADII = (1e-3, 1e-2, 1e-1, 1.0)


def verify_em(
    model: Callable[..., Any],
    params: Any,
    *,
    e_step: Callable[..., Any],
    m_step: Callable[..., Any],
    data: tuple[Any, ...],
    log_likelihood: Callable[..., Any] | None = None,
    seed: int,
    subject: str = "EM derivation",
) -> Report:
    """Try to refute an EM derivation for a Pyro program with enumerated discrete latents.

    Each function gets copies of its arguments. It may return tensors, arrays or lists.

    Args:
        model: the program; ``model(*data)`` observes the data. Bind other arguments with ``functools.partial``. Rows
            that count differently have their weights (N,) in ``poutine.scale`` inside the data plate.
        params: a dict or NamedTuple with a value for each parameter site, ``pyro.sample`` or ``pyro.param``. Choose
            K >= 3 components and D >= 2 features: several faults cannot be seen with fewer. Whole-number parameters
            are held fixed.
        e_step: ``e_step(params, *data)`` -> responsibilities (N, K), or (N, K, L) for two enumerated sites.
        m_step: ``m_step(resp, *data)`` -> parameters, in the type of ``params``. A step that builds on the current
            parameters takes them as a further keyword argument, ``params``.
        data: the positional arguments of the program, a tuple.
        log_likelihood: ``log_likelihood(params, *data)`` -> the log likelihood the person reports; None if there is
            none.
        seed: seeds the random parameters and responsibilities.
        subject: what the report calls the derivation.

    Returns:
        A report whose verdict is ``exact EM`` (the M-step maximises Q), ``MAP-EM`` (Q plus the program's log prior),
        ``generalised EM`` (it raises Q and stops at stationary points only), ``wrong E-step``, ``wrong M-step``,
        ``wrong report``, or ``undecided`` where the data or the rounding do not let the checks decide. A wrong one
        comes with the smallest counterexample that was found and, where one change was measured to mend it, with that
        hint. Agreement at random points to rounding refutes any wrong analytic step with probability one up to the
        tolerance; it is not a proof.

    Raises:
        ValueError: the program raises, has no enumerated site or an unmarked one, loops over its plate or subsamples
            it, or ``params`` do not fit its sites or lie outside their supports.
        TypeError: ``data`` is not a tuple, ``params`` is neither a mapping nor a NamedTuple, or one of
            them is no tensor.
    """
    return verify_subject(Subject(model, params, data, e_step, m_step, log_likelihood), seed=seed, name=subject)


def verify_subject(subject: Subject, *, seed: int, name: str = "EM derivation") -> Report:
    """Return the report of ``verify_em`` on a program and its EM in one object, called by a name."""
    if not isinstance(subject.data, tuple):
        raise TypeError("data must be a tuple of the program's positional arguments: (x,) for one")
    own = Trial(subject)
    generator = torch.Generator().manual_seed(seed)
    judged = [_judge("wrong E-step", partial(check_e_step, own, generator))]
    judged.append(judge_m_step(own, generator, climb=judged[0][0] == "exact EM"))
    if subject.log_likelihood is not None:
        judged.append(_judge("wrong report", partial(check_log_likelihood, own, generator)))
    verdict = next(verdict for verdict in GRAVITY if verdict in [found for found, _ in judged])
    checks = tuple(check for _, made in judged for check in made)
    if not verdict.startswith("wrong"):
        return Report(name, verdict, checks, seed)
    return Report(
        name,
        verdict,
        checks,
        seed,
        hints=measured_hints(own, verdict, checks, generator),
        smallest=smallest_counterexample(own, verdict, checks, seed),
    )


assert_em = asserting(verify_em)


def judge_m_step(own: Trial, generator: torch.Generator, *, climb: bool) -> tuple[str, list[Check]]:
    """Return what the M-step says of the derivation, and the checks; ``climb`` where the E-step is fit for a pass."""
    priors = (False, True) if own.has_prior else (False,)
    for with_prior in priors:
        kind, checks = _judge("wrong M-step", partial(check_m_step, own, generator, with_prior=with_prior))
        if kind == "exact EM":
            rises, rose = _judge("wrong M-step", partial(check_rise, own, generator)) if climb else ("undecided", [])
            kind = "MAP-EM" if with_prior else "exact EM"
            return (kind, checks) if rises == "undecided" else (kind if rises == "exact EM" else rises, checks + rose)
    made: list[Check] = []
    if climb and own.takes_params and kind == "wrong M-step" and not math.isnan(checks[0].error):
        # a step that sees responsibilities alone can only climb by maximising
        tried = [
            _judge("wrong M-step", partial(check, own, generator))
            for check in (check_rise, check_moves, check_fixed_point)
        ]
        made = [check for _, one in tried for check in one]
        verdicts = {found for found, _ in tried}
        if verdicts == {"exact EM"}:
            error = checks[0].error
            detail = f"it leaves a gradient of Q (error {error:.2g}), as a step that raises Q and does not maximise it"
            return "generalised EM", [*made[:-1], made[-1]._replace(detail=detail)]
        if "wrong M-step" not in verdicts:
            return "undecided", made + checks
    placed_in = [
        _judge("wrong M-step", partial(check_m_step, own, generator, with_prior=with_prior, place=True))
        for with_prior in priors
    ]
    kind, checks = min(placed_in, key=_nearness)
    return kind, made + checks


def _nearness(judged: tuple[str, list[Check]]) -> tuple[bool, int, float]:
    """Order failed checks of the M-step: decided ones first, then by how many sites are wrong, and by how much."""
    kind, (check,) = judged
    sites = (check.counterexample or {}).get("not stationary", ())
    return kind == "undecided", len(sites), math.inf if math.isnan(check.error) else check.error


def _judge(wrong: str, check: Callable[[], Check]) -> tuple[str, list[Check]]:
    """Return ``exact EM``, the wrong verdict or ``undecided`` by one check, and the check."""
    try:
        made = check()
    except Undecided as reason:
        name, text = reason.args
        return "undecided", [Check(name, False, math.nan, math.nan, detail=f"undecided: {text}")]
    return "exact EM" if made.passed else wrong, [made]


def check_e_step(own: Trial, generator: torch.Generator) -> Check:
    """Hold the responsibilities against the normalised enumerated table at the given and at random parameters.

    Raises:
        Undecided: rounding hides too much, or only parameters at the edge of their support are in question.
    """
    name = "responsibilities = enumeration"
    worst = None
    for params in points(own, generator):
        with torch.no_grad():
            rows = own.joint(params).rows
        try:
            found = own.responsibilities(params)
            if len(found) != len(rows) or found.numel() != rows.numel():
                shapes = tuple(own.shaped(params).shape), tuple(rows.shape)
                raise StepError(f"e_step returns shape {shapes[0]}, and the program has {shapes[1]} (rows, components)")
        except StepError as error:
            made = Check(name, False, math.nan, math.nan, None, params, str(error))
        else:
            made = _compare_rows(own, name, params, found, rows, generator)
        if not made.passed and own.at_edge and params is own.params:
            raise Undecided(
                name, f"right inside the support, but not at its edge, where the given params lie: {made.detail}"
            )
        if not made.passed:
            return made
        worst = made if worst is None or made.error > worst.error else worst
    assert worst is not None
    return worst


def points(own: Trial, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Return the parameters to compare formulas at: the given ones, last where they lie at an edge, and random ones."""
    random = [own.random_params(generator) for _ in range(NUM_POINTS - 1)]
    return [*random, own.params] if own.at_edge else [own.params, *random]


def _compare_rows(
    own: Trial, name: str, params: dict[str, Tensor], claimed: Tensor, rows: Tensor, generator: torch.Generator
) -> Check:
    """Compare responsibilities (N, K) with the enumerated ones, up to what the E-step's own rounding moves."""
    actual = rows.softmax(-1)
    error = claimed - actual
    eps = largest_eps(rows, claimed)
    tolerance = 64 * eps * (1 + rows[torch.isfinite(rows)].abs().max().item())
    nan = error.isnan().any(1)
    if nan.any():
        row = int(nan.int().argmax())
        underflow = bool((rows[row].exp() == 0).all())
        reason = ": every density there underflows to 0, work with logarithms" if underflow else ""
        found = {**params, "row": row, "claimed": claimed[row], "actual": actual[row]}
        return Check(name, False, math.inf, tolerance, None, found, f"e_step returns NaN in row {row}{reason}")
    if error.abs().max() > tolerance:
        noise = 16 * _rounding(error, [_e_error(own, nudged) for nudged in _nudged(own, params, generator)])
        _refuse_to_be_blind(name, "e_step", noise, lambda: (own.responsibilities(params) - claimed).abs().max().item())
        tolerance += noise
    worst = error.abs().max().item()
    if worst <= tolerance:
        detail = f"e_step answers in {claimed.dtype}, coarser than the program" if eps > _eps(rows) else ""
        return Check(name, True, worst, tolerance, detail=detail)
    row, k = divmod(int(error.abs().argmax()), error.shape[1])
    found = {**params, "row": row, "component": k, "claimed": claimed[row], "actual": actual[row]}
    wrong = (error.abs() > tolerance).any(0)
    only = "" if wrong.all() else f"only in component {', '.join(map(str, wrong.nonzero().flatten().tolist()))}"
    return Check(name, False, worst, tolerance, None, found, only)


def _e_error(own: Trial, params: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return own.responsibilities(params) - own.joint(params).rows.softmax(-1)


def check_m_step(own: Trial, generator: torch.Generator, *, with_prior: bool, place: bool = False) -> Check:
    """Measure the gradient that the M-step leaves of Q, or of Q plus log prior, at random responsibilities.

    Args:
        own: the derivation.
        generator: draws the points.
        with_prior: whether the program's log prior counts.
        place: whether a numerical maximiser is to find the site that is wrong, which takes longer.

    Raises:
        Undecided: Q has no maximum at these data, or rounding hides too much.
    """
    name = PENALISED if with_prior else "grad Q = 0"
    worst = None
    for _ in range(NUM_POINTS):
        params = own.random_params(generator)
        try:
            new, target, detail = _maximised(own, name, params, generator, with_prior)
            made = _stationary(own, name, params, new, target, generator, place=place)
        except StepError as error:
            found = {**error.site, **({"params": params} if own.takes_params else {})}
            return Check(name, False, math.nan, math.nan, None, found or None, str(error))
        if not made.passed:
            return made
        made = made._replace(detail=detail)
        worst = made if worst is None or made.error / made.tolerance > worst.error / worst.tolerance else worst
    assert worst is not None
    return worst


def _maximised(
    own: Trial, name: str, params: dict[str, Tensor], generator: torch.Generator, with_prior: bool
) -> tuple[dict[str, Tensor], Target, str]:
    """Return an M-step's result, what it should maximise, and what to know of the responsibilities it was given."""
    target = Target(own.random_resp(params, generator), prior=float(with_prior))
    try:
        return own.m_step(target.resp, params), target, ""
    except OutsideSupport as error:
        best, given = own.maximiser(params, target, list(own.spans())), own.returned(target.resp, params)
        if site := own.unbounded(params, best, target):
            reason = f"Q rises without bound as {site} goes to the edge of its support, so that no M-step exists here"
            raise Undecided(name, f"{reason}: give more rows ({error})") from error
        site = error.args[1]
        near_best = (best[site] - given[site]).abs().max() <= BLIND * params[site].abs().max()
        if near_best and at_edge(given[site], own.program.supports[site]):
            reason = f"Q is largest at the edge of the support of {site}, which does not belong to it"
            raise Undecided(name, f"{reason}: give rows of which no entry is estimated at an edge ({error})") from error
        near = target._replace(resp=own.random_resp(params, generator, tilt=TILT))
        try:
            found = own.m_step(near.resp, params)
        except OutsideSupport:
            raise error from None
        return found, near, "at responsibilities near the program's own: unrelated ones lead out of the support"


def _stationary(
    own: Trial,
    name: str,
    params: dict[str, Tensor],
    new: dict[str, Tensor],
    target: Target,
    generator: torch.Generator,
    *,
    place: bool,
) -> Check:
    """Check that an M-step's result maximises its target, and say which site does not."""
    residual = own.residual(new, target)
    if not residual.passed:
        others = [
            own.residual(own.m_step(resp, params), target._replace(resp=resp)).errors
            for resp in (nudge(target.resp, generator) for _ in range(NUM_NUDGES))
        ]
        noise = torch.stack([(other - residual.errors).abs() for other in others]).amax(0)
        residual = residual._replace(tolerances=residual.tolerances + 16 * noise)
        if residual.passed:
            _refuse_to_be_blind(
                name,
                "m_step",
                residual.tolerances.max().item(),
                lambda: max(changes(new, own.m_step(target.resp, params)).values()),
            )
    error, tolerance = residual.errors[residual.worst].abs().item(), residual.tolerances[residual.worst].item()
    if residual.passed:
        gain, rounding = beaten(own, new, target, generator)
        if gain <= rounding:
            return Check(name, True, error, tolerance)
        error, tolerance, detail = gain, rounding, "a nearby or random point has a larger Q"
    if not place:
        return Check(name, False, error, tolerance)
    if residual.passed:
        sites = [own.site_of(residual.worst)]
        better = own.maximiser(own.coordinates(own.origin), target, list(own.spans()))
    else:
        sites, better = own.blame(new, target, residual)
        if site := own.unbounded(new, better, target):
            raise Undecided(name, f"Q rises without bound as {site} goes to the edge of its support: give more rows")
        detail = f"{' and '.join(sites)} {'is' if len(sites) == 1 else 'are'} not stationary"
    site = sites[0]
    where = placed(site, new[site], better[site])
    found = {
        "resp": own.in_their_shape(target.resp),
        **({"params": params} if own.takes_params else {}),
        "site": site,
        "not stationary": sites,
        "where": where,
        "claimed": new[site],
        "maximiser of Q": better[site],
    }
    return Check(name, False, error, tolerance, None, found, f"{detail}; {where}" if where != site else detail)


def placed(site: str, claimed: Tensor, right: Tensor) -> str:
    """Return the entries of a site that are wrong, as an index: ``locs[1, :]`` where only component 1 is."""
    gap = (claimed - right).abs()
    wrong = gap > 1e-3 * gap.max()
    index = []
    for axis, size in enumerate(wrong.shape):
        touched = wrong.movedim(axis, 0).reshape(size, -1).any(1).nonzero().flatten().tolist()
        index.append(":" if len(touched) == size else str(touched[0]) if len(touched) == 1 else str(touched))
    return f"{site}[{', '.join(index)}]" if any(part != ":" for part in index) else site


def beaten(own: Trial, params: dict[str, Tensor], target: Target, generator: torch.Generator) -> tuple[float, float]:
    """Return the largest relative gain of other points over a claimed maximiser, and what rounding explains of it."""
    u, _ = own.unconstrained(params)
    rounding, best = ROUNDING * _eps(u), 0.0
    with torch.no_grad():
        terms = own.terms(u, target)
        size = terms.abs().sum().item() + 1
        for radius in RADII:
            other = u + radius * torch.randn(u.shape, generator=generator, dtype=torch.float64).to(u)
            gain = ((own.terms(other, target) - terms).sum() / size).item()
            best = max(best, gain) if math.isfinite(gain) else best
    return best, rounding


def check_rise(own: Trial, generator: torch.Generator) -> Check:
    """Check that one pass raises the log likelihood, or the log posterior, from random parameters.

    Raises:
        Undecided: every pass that was tried leaves the support.
    """
    name = "the objective rises"
    worst, outside = None, ""
    for _ in range(4 * NUM_POINTS):
        params = own.random_params(generator)
        try:
            new = own.m_step(own.responsibilities(params), params)
        except OutsideSupport as error:  # as from a start at which a component is empty
            outside = str(error)
            continue
        except StepError as error:
            return Check(name, False, math.nan, math.nan, None, params, str(error))
        before, after = (_log_densities(own, point) for point in (params, new))
        falls = (before - after) / (before.abs() + after.abs() + 1)  # of the likelihood, and of the posterior
        fall, tolerance = falls.min().item(), 64 * _eps(before) * len(own.joint(params).rows) ** 0.5
        if not fall <= tolerance:
            return Check(name, False, fall, tolerance, None, {"before": params, "after": new})
        if worst is None or fall > worst.error:
            worst = Check(name, True, max(fall, 0.0), tolerance)
    if worst is None:
        raise Undecided(name, outside)
    return worst


def check_moves(own: Trial, generator: torch.Generator) -> Check:
    """Check that a pass from random parameters moves each coordinate in which it leaves Q, or Q + log prior, rising."""
    name = "every parameter moves"
    params = own.random_params(generator)
    try:
        resp = own.responsibilities(params)
        new = own.m_step(resp, params)
    except StepError as error:
        return Check(name, False, math.nan, math.nan, None, params, str(error))
    before, after = own.unconstrained(params)[0], own.unconstrained(new)[0]
    still = (after - before).abs() <= ROUNDING * _eps(before) * (1 + before.abs())
    residual = own.residual(new, Target(resp, prior=float(own.has_prior)))
    stuck = still & (residual.errors.abs() > residual.tolerances)
    if not stuck.any():
        return Check(name, True, 0.0, 0.0)
    worst = int(torch.where(stuck, residual.errors.abs() / residual.tolerances, 0.0).argmax())
    site = own.site_of(worst)
    found = {**params, "site": site, "after a pass": new[site]}
    left, tolerance = residual.errors[worst].abs().item(), residual.tolerances[worst].item()
    return Check(name, False, left, tolerance, None, found, f"{site} stays where it is, and Q still rises in it")


def check_fixed_point(own: Trial, generator: torch.Generator) -> Check:
    """Check that a step rests where there is nothing left to climb.

    At random responsibilities the maximiser of Q, or of Q + log prior, must be a fixed point of the M-step. A step that
    takes the responsibilities again between its parts need not rest there; then a mode of the likelihood, or of the
    posterior, must be a fixed point of a whole pass. The tolerance is how far maximiser and mode are known.

    Raises:
        Undecided: the maximiser is no fixed point, and no climb of the likelihood ended at a mode.
    """
    name = "a maximum is a fixed point"
    tried = []
    for with_prior in (False, True) if own.has_prior else (False,):
        params = own.random_params(generator)
        target = Target(own.random_resp(params, generator), prior=float(with_prior))
        best, known = own.maximum(params, target, list(own.spans()))
        tried.append(_rests(own, name, best, target.resp, known))
        if tried[-1].passed:
            return tried[-1]
    for with_prior in (False, True) if own.has_prior else (False,):
        mode, known = _mode(own, partial(_negative_log_density, own, with_prior=with_prior), generator)
        if mode is not None:
            tried.append(_rests(own, name, mode, None, known))
            if tried[-1].passed:
                return tried[-1]
    if len(tried) == (2 if own.has_prior else 1):
        reason = f"no climb from {NUM_STARTS} starts ended at a mode whose responsibilities are soft and differ"
        raise Undecided(name, f"{reason}: give more rows, or components that overlap")
    return min(tried, key=lambda check: check.error)


def _rests(own: Trial, name: str, params: dict[str, Tensor], resp: Tensor | None, known: float) -> Check:
    """Check that an M-step, or without responsibilities a whole pass, leaves parameters where they are."""
    try:
        after = own.m_step(own.responsibilities(params) if resp is None else resp, params)
    except StepError as error:
        return Check(name, False, math.inf, 0.0, None, params, str(error))
    moved = changes(params, after)
    site = max(moved, key=lambda site: moved[site])
    tolerance = 64 * min(known, BLIND / 64) + ROUNDING * _eps(own.origin)
    passed = moved[site] <= tolerance
    found = {"site": site, "maximum": params[site], "after a pass": after[site]}
    return Check(name, passed, moved[site], tolerance, None, None if passed else found)


def _mode(
    own: Trial, density: Callable[[Tensor], Tensor], generator: torch.Generator
) -> tuple[dict[str, Tensor] | None, float]:
    """Return a minimum of a function of the unconstrained coordinates as parameters, and how far it is known."""
    for start in range(NUM_STARTS):
        noise = torch.randn(own.origin.shape, generator=generator, dtype=torch.float64).to(own.origin)
        u, step = descend(density, own.origin + 0.3 * start * noise)
        known = max(changes(own.coordinates(u + step), own.coordinates(u)).values())
        mode = own.coordinates(u)
        if known < BLIND and _is_informative(own, mode):
            return mode, known
    return None, math.inf


def _is_informative(own: Trial, params: dict[str, Tensor]) -> bool:
    """Whether responsibilities are soft and differ between rows: where not, many wrong steps rest."""
    with torch.no_grad():
        resp = own.joint(params).rows.softmax(1)
    soft = (resp > SOFT) & (resp < 1 - SOFT)
    return bool(soft.any()) and bool((resp - resp[0]).abs().max() > SOFT or len(resp) == 1)


def check_log_likelihood(own: Trial, generator: torch.Generator) -> Check:
    """Hold the reported log likelihood against the enumerated one at the given and at random parameters.

    Raises:
        Undecided: rounding hides too much.
    """
    worst = None
    for params in points(own, generator):
        made = _compare_reported(own, "log likelihood = enumeration", params, generator)
        if not made.passed:
            return made
        worst = made if worst is None or made.error > worst.error else worst
    assert worst is not None
    return worst


def _compare_reported(own: Trial, name: str, params: dict[str, Tensor], generator: torch.Generator) -> Check:
    """Compare the reported log likelihood with the enumerated one, up to what the person's own rounding moves."""
    try:
        reported = own.reported(params)
    except StepError as broken:
        return Check(name, False, math.nan, math.nan, None, params, str(broken))
    claimed, (actual, size) = reported.item(), _log_likelihood(own, params)
    gap, tolerance = (claimed - actual) / size, 64 * largest_eps(own.origin, reported)
    if abs(gap) > tolerance and math.isfinite(gap):
        noise = 16 * _rounding(
            torch.tensor(gap, dtype=torch.float64), [_gap(own, nudged) for nudged in _nudged(own, params, generator)]
        )
        _refuse_to_be_blind(name, "log_likelihood", noise, lambda: abs(own.reported(params).item() - claimed) / size)
        tolerance += noise
    passed = abs(gap) <= tolerance
    found = None if passed else {**params, "claimed": claimed, "actual": actual}
    return Check(name, passed, abs(gap), tolerance, None, found)


def _log_likelihood(own: Trial, params: dict[str, Tensor]) -> tuple[float, float]:
    """Return the enumerated log likelihood, and the sum of its rows' sizes and one."""
    with torch.no_grad():
        joint = own.joint(params)
    rows = joint.row_weights * joint.rows.logsumexp(-1)
    return joint.log_likelihood.item(), rows.abs().sum().item() + 1


def _gap(own: Trial, params: dict[str, Tensor]) -> Tensor:
    """Return the reported log likelihood less the enumerated one, (), over the sum of the rows' sizes."""
    actual, size = _log_likelihood(own, params)
    return (own.reported(params).double() - actual) / size


def _nudged(own: Trial, params: dict[str, Tensor], generator: torch.Generator) -> list[dict[str, Tensor]]:
    """Return parameters changed in their last places."""
    free = {name: params[name] for name in own.coordinates.transforms}
    return [{**params, **{name: nudge(value, generator) for name, value in free.items()}} for _ in range(NUM_NUDGES)]


def _rounding(error: Tensor, others: list[Tensor]) -> float:
    """Return how much an error moves when the arguments change in their last places: what of it is rounding."""
    return max((other - error).abs().max().nan_to_num(nan=0.0).item() for other in others)


def _refuse_to_be_blind(name: str, function: str, noise: float, repeated: Callable[[], float]) -> None:
    """Raise ``Undecided`` where the noise of a person's function hides too much.

    Args:
        name: the check.
        function: whose noise it is.
        noise: by how much the function's answers move when its arguments change in their last places.
        repeated: returns by how much they move when its arguments do not change.
    """
    if noise <= BLIND:
        return
    if (drift := repeated()) > BLIND:
        raise Undecided(name, f"{function} answers equal arguments differently, by up to {drift:.1g}: seed it")
    raise Undecided(name, f"rounding inside {function} hides errors up to {noise:.1g}: center or scale the data")


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


def _negative_log_density(own: Trial, u: Tensor, *, with_prior: bool) -> Tensor:
    joint = own.joint(own.coordinates(u))
    return -(joint.log_likelihood + with_prior * joint.log_prior)


def _log_densities(own: Trial, params: dict[str, Tensor]) -> Tensor:
    """Return the log likelihood and the log posterior up to its constant, (2,)."""
    with torch.no_grad():
        joint = own.joint(params)
    return torch.stack([joint.log_likelihood, joint.log_likelihood + joint.log_prior])
