"""Is this E-step, this M-step, this log likelihood right for that Pyro program?

Nobody writes Q down: log p(x_n, z_n = k | params) comes from the program by enumeration, and its gradients by
autograd. The E-step is held against the normalised table at random parameters; the M-step must leave no gradient of Q,
nor of Q plus log prior, at **random** responsibilities, where no lucky symmetry hides a fault; a step that does not
maximise must at least rise and stop where the log likelihood is stationary (generalised EM: Dempster, Laird and Rubin
1977, section 2).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mixproof.inference.bfgs import minimise, with_gradient
from mixproof.inference.enumeration import Coordinates, log_joint_table
from mixproof.inference.enumeration import inspect as inspect_program
from mixproof.inference.verification.report import Check, Report

NUM_POINTS = 3
MAX_GROUPS = 256
EDGE = 36.0  # stands for an infinite logit: beyond it a probability cannot be told from 0 or 1


class Subject:
    """A person's derivation beside the program that it is meant for."""

    def __init__(
        self,
        model: Callable[..., Any],
        params: Any,
        e_step: Callable[..., Any],
        m_step: Callable[..., Any],
        data: tuple[Any, ...],
    ):
        self.model, self.e_step, self.m_step, self.data = model, e_step, m_step, data
        self.container = None if isinstance(params, Mapping) else type(params)
        self.params = {name: torch.as_tensor(value) for name, value in self.as_dict(params).items()}
        self.program = inspect_program(model, self.params, *data)
        self.coordinates = Coordinates(self.program.supports, self.params)
        self.origin = self.coordinates.inverse(self.params)
        if not torch.isfinite(self.origin).all():
            raise ValueError("params lie at the edge of their support: give parameters inside it to start from")
        self.takes_params = "params" in inspect.signature(m_step).parameters

    @staticmethod
    def as_dict(params: Any) -> dict[str, Any]:
        return dict(params) if isinstance(params, Mapping) else params._asdict()

    def wrap(self, params: dict[str, Tensor]) -> Any:
        """Return parameters in the type the person uses."""
        return params if self.container is None else self.container(**params)

    def table(self, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return log p(x_n, z_n = k | params), shape (N, K), and log p(params), by enumeration."""
        return log_joint_table(self.model, self.program, params, *self.data)

    def random_params(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Return parameters near the given ones, in unconstrained coordinates."""
        noise = torch.randn(self.origin.shape, generator=generator, dtype=self.origin.dtype)
        return self.coordinates(self.origin + 0.3 * noise)

    def random_resp(self, params: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Return random responsibilities in the shape of the person's own."""
        shape = torch.as_tensor(self.e_step(self.wrap(params), *self.data)).shape
        logits = torch.randn(shape, generator=generator, dtype=self.origin.dtype)
        return logits.flatten(1).softmax(-1).reshape(shape)

    def maximise(self, resp: Tensor, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the person's M-step makes of responsibilities, refusing what is not a set of parameters."""
        new = self.m_step(resp, *self.data, **({"params": self.wrap(params)} if self.takes_params else {}))
        found = self.as_dict(new)
        if found.keys() != self.params.keys():
            raise ValueError(f"m_step returns {sorted(found)}, and the program's parameters are {sorted(self.params)}")
        for name, value in found.items():
            found[name] = torch.as_tensor(value)
            if found[name].shape != self.params[name].shape:
                shapes = tuple(found[name].shape), tuple(self.params[name].shape)
                raise ValueError(f"m_step returns {name} of shape {shapes[0]}, and the program's has {shapes[1]}")
            if not torch.isfinite(found[name]).all():
                raise ValueError(f"m_step returns {name} with an entry that is not finite")
            if name in self.program.supports and not self.program.supports[name].check(found[name]).all():
                raise ValueError(f"m_step returns {name} outside its support {self.program.supports[name]}")
        return found

    def site_of(self, coordinate: int) -> str:
        """Return the parameter site that an unconstrained coordinate belongs to."""
        for name, shape in self.coordinates.shapes.items():
            if coordinate < shape.numel():
                return name
            coordinate -= shape.numel()
        raise IndexError(coordinate)


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

    Args:
        model: the program; ``model(*data)`` observes the data. Bind other arguments with ``functools.partial``.
        params: a dict or NamedTuple with a value inside the support for each parameter site, ``pyro.sample`` or
        ``pyro.param``.
            Choose K >= 3 components and D >= 2 features: several faults cannot be seen with fewer.
        e_step: ``e_step(params, *data)`` -> responsibilities (N, K), or (N, K, L) for two enumerated sites.
        m_step: ``m_step(resp, *data)`` -> parameters, in the type of ``params``. A step that builds on the current
        parameters takes
            them as a further keyword argument, ``params``.
        data: the positional arguments of the program, a tuple.
        log_likelihood: ``log_likelihood(params, *data)`` -> the log likelihood the person reports; None if there is
        none.
        seed: seeds the random parameters and responsibilities.
        subject: what the report calls the derivation.

    Returns:
        A report whose verdict is ``exact EM`` (the M-step maximises Q), ``MAP-EM`` (Q plus the program's log prior),
        ``generalised EM`` (it raises Q and stops at stationary points only), ``wrong E-step``, ``wrong M-step``, or
        ``wrong report``. Agreement at random points to rounding refutes any wrong analytic step with probability one
        up to the tolerance; it is not a proof.

    Raises:
        ValueError: the program has no enumerated site or an unmarked one, or ``params`` do not fit its sites.
    """
    if not isinstance(data, tuple):
        raise TypeError("data must be a tuple of the program's positional arguments: (x,) for one")
    own = Subject(model, params, e_step, m_step, data)
    generator = torch.Generator().manual_seed(seed)
    checks = [check_e_step(own, generator)]
    if not checks[-1].passed:
        return Report(subject, "wrong E-step", tuple(checks), seed)
    exact = check_m_step(own, generator, with_prior=False)
    verdict = "exact EM"
    if not exact.passed:
        penalised = check_m_step(own, generator, with_prior=True)
        if penalised.passed:
            exact, verdict = penalised, "MAP-EM"
        elif not math.isnan(exact.error):
            generalised = [check_rise(own, generator), check_fixed_point(own)]
            checks += generalised
            if all(check.passed for check in generalised):
                detail = (
                    f"{exact.name} fails (error {exact.error:.2g}), as in a step that raises Q without maximising it"
                )
                exact, verdict = exact._replace(passed=True, detail=detail), "generalised EM"
            else:
                verdict, exact = "wrong M-step", _with_better(own, exact)
        else:
            verdict = "wrong M-step"
    checks.append(exact)
    if verdict in ("exact EM", "MAP-EM"):
        checks.append(check_rise(own, generator))
    if log_likelihood is not None:
        checks.append(check_log_likelihood(own, log_likelihood, generator))
        if not checks[-1].passed and verdict != "wrong M-step":
            verdict = "wrong report"
    return Report(subject, verdict, tuple(checks), seed)


def assert_em(*args: Any, **kwargs: Any) -> Report:
    """Call ``verify_em`` and raise ``Refuted`` unless the derivation survives."""
    return verify_em(*args, **kwargs).raise_for_refuted()


def check_e_step(own: Subject, generator: torch.Generator) -> Check:
    """Hold the responsibilities against the normalised enumerated table at the given and at random parameters."""
    name = "responsibilities = enumeration"
    worst = Check(name, True, 0.0, 0.0)
    for point in range(NUM_POINTS):
        params = own.params if point == 0 else own.random_params(generator)
        with torch.no_grad():
            table, _ = own.table(params)
        try:
            raw = torch.as_tensor(own.e_step(own.wrap(params), *own.data))
        except Exception as raised:  # a stranger's code: whatever it raises is its verdict
            return Check(name, False, math.nan, 0.0, None, params, f"e_step raises {type(raised).__name__}: {raised}")
        if raw.shape[:1] != table.shape[:1] or raw.numel() != table.numel():
            detail = (
                f"e_step returns shape {tuple(raw.shape)}, and the program has {tuple(table.shape)} (rows, components)"
            )
            return Check(name, False, math.nan, 0.0, None, params, detail)
        claimed, actual = raw.flatten(1), table.softmax(-1)
        tolerance = _eps(table) * 64 * (1 + table[torch.isfinite(table)].abs().max().item())
        gap = (claimed - actual).abs().nan_to_num(nan=math.inf)
        if gap.max() > worst.error or point == 0:
            row, k = divmod(int(gap.argmax()), gap.shape[1])
            passed = bool(gap.max() <= tolerance)
            counterexample = None
            if not passed:
                counterexample = {**params, "row": row, "component": k, "claimed": claimed[row], "actual": actual[row]}
            worst = Check(name, passed, gap.max().item(), tolerance, None, counterexample)
        if not worst.passed:
            break
    return worst


def check_m_step(own: Subject, generator: torch.Generator, *, with_prior: bool) -> Check:
    """Measure the gradient that the M-step leaves of Q, or of Q plus log prior, at random responsibilities."""
    name = "grad (Q + log prior) = 0" if with_prior else "grad Q = 0"
    worst = Check(name, True, 0.0, 0.0)
    for _ in range(NUM_POINTS):
        params = own.random_params(generator)
        resp = own.random_resp(params, generator)
        try:
            new = own.maximise(resp, params)
        except Exception as raised:  # a stranger's code: whatever it raises is its verdict
            return Check(name, False, math.nan, 0.0, None, {"resp": resp}, f"{type(raised).__name__}: {raised}")
        error, tolerance, coordinate = _residual(own, new, resp.flatten(1), with_prior)
        if error <= tolerance:
            error, tolerance, beaten = _beaten(own, new, resp.flatten(1), with_prior, generator, error, tolerance)
        else:
            beaten = False
        if error > worst.error or not worst.passed or worst.tolerance == 0.0:
            passed = error <= tolerance
            counterexample, detail = None, ""
            if not passed:
                site = own.site_of(coordinate)
                counterexample = {"resp": resp, "site": site, "claimed": new[site]}
                detail = f"a nearby or random point beats the claimed {site}" if beaten else f"{site} is not stationary"
            worst = Check(name, passed, error, tolerance, None, counterexample, detail)
        if not worst.passed:
            break
    return worst


def check_rise(own: Subject, generator: torch.Generator) -> Check:
    """Check that one pass raises the log likelihood, or the log posterior, from random parameters."""
    name = "the objective rises"
    worst = Check(name, True, 0.0, 0.0)
    for _ in range(NUM_POINTS):
        params = own.random_params(generator)
        resp = torch.as_tensor(own.e_step(own.wrap(params), *own.data))
        try:
            new = own.maximise(resp, params)
        except Exception as raised:  # a stranger's code: whatever it raises is its verdict
            return Check(name, False, math.nan, 0.0, None, {"resp": resp}, f"{type(raised).__name__}: {raised}")
        falls = []
        for with_prior in (False, True):
            before, after = (_log_density(own, point, with_prior) for point in (params, new))
            falls.append((before - after) / (abs(before) + abs(after) + 1))
        fall, tolerance = min(falls), _eps(resp) * 64 * len(resp) ** 0.5
        if fall > worst.error or worst.tolerance == 0.0:
            passed = fall <= tolerance
            worst = Check(
                name, passed, max(fall, 0.0), tolerance, None, None if passed else {"before": params, "after": new}
            )
    return worst


def check_fixed_point(own: Subject) -> Check:
    """Climb numerically to a mode of the likelihood, or the posterior, and check that a pass of both steps stays there.

    The tolerance is how far the mode itself is known: the last Newton step of the climb, and rounding.
    """
    name = "a mode is a fixed point"
    best = Check(name, False, math.inf, 0.0)
    for with_prior in (False, True):
        density = partial(_negative_log_density, own, with_prior=with_prior)
        mode, uncertainty = _mode(own, density)
        resp = torch.as_tensor(own.e_step(own.wrap(mode), *own.data))
        try:
            after = own.maximise(resp, mode)
        except Exception as raised:  # a stranger's code: whatever it raises is its verdict
            return Check(name, False, math.nan, 0.0, None, None, f"{type(raised).__name__}: {raised}")
        moves = _moves(mode, after)
        site = max(moves, key=lambda site: moves[site])
        tolerance = 64 * uncertainty + 2**12 * _eps(own.origin)
        if moves[site] < best.error:
            counterexample = {"site": site, "mode": mode[site], "after a pass": after[site]}
            passed = moves[site] <= tolerance
            best = Check(name, passed, moves[site], tolerance, None, None if passed else counterexample)
    return best


def _mode(own: Subject, density: Callable[[Tensor], Tensor]) -> tuple[dict[str, Tensor], float]:
    """Return a minimum of a function of the unconstrained coordinates as parameters, and how far it is known."""
    objective = with_gradient(density)
    u = minimise(objective, own.origin, max_steps=1000, rtol=1e-14).u
    moved = math.inf
    for _ in range(4):
        _, gradient = objective(u)
        hessian = torch.autograd.functional.hessian(density, u)
        step = torch.linalg.pinv(hessian, rtol=1e-10, hermitian=True) @ gradient
        after = u - step
        if not objective(after)[1].norm() < gradient.norm():
            break
        moved = max(_moves(own.coordinates(u), own.coordinates(after)).values())
        u = after
    if moved == math.inf:  # the climb had already arrived, or the function has a kink there
        moved = max(_moves(own.coordinates(u), own.coordinates(u - step)).values())
    return own.coordinates(u), min(moved, 1e-6)


def _moves(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest relative change at each site."""
    return {site: ((after[site] - before[site]).abs() / (1 + before[site].abs())).max().item() for site in before}


def check_log_likelihood(own: Subject, log_likelihood: Callable[..., Any], generator: torch.Generator) -> Check:
    """Hold the reported log likelihood against the enumerated one at the given and at random parameters."""
    name = "log likelihood = enumeration"
    worst = Check(name, True, 0.0, 0.0)
    for point in range(NUM_POINTS):
        params = own.params if point == 0 else own.random_params(generator)
        try:
            claimed = float(log_likelihood(own.wrap(params), *own.data))
        except Exception as raised:  # a stranger's code: whatever it raises is its verdict
            return Check(
                name, False, math.nan, 0.0, None, params, f"log_likelihood raises {type(raised).__name__}: {raised}"
            )
        with torch.no_grad():
            rows = own.table(params)[0].logsumexp(-1)
        actual, size = rows.sum().item(), rows.abs().sum().item() + 1
        error, tolerance = abs(claimed - actual) / size, 64 * _eps(rows)
        if not error <= worst.error or worst.tolerance == 0.0:
            passed = error <= tolerance
            values = None if passed else {**params, "claimed": claimed, "actual": actual}
            worst = Check(name, passed, error, tolerance, None, values)
    return worst


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


def _negative_log_density(own: Subject, u: Tensor, *, with_prior: bool) -> Tensor:
    table, log_prior = own.table(own.coordinates(u))
    return -(table.logsumexp(-1).sum() + with_prior * log_prior)


def _log_density(own: Subject, params: dict[str, Tensor], with_prior: bool) -> float:
    with torch.no_grad():
        table, log_prior = own.table(params)
    return (table.logsumexp(-1).sum() + with_prior * log_prior).item()


def _q(own: Subject, u: Tensor, resp: Tensor, with_prior: bool) -> Tensor:
    """Return the terms of Q at u, one for each group of rows and one for the prior: their sum is Q."""
    table, log_prior = own.table(own.coordinates(u))
    terms = torch.where(resp > 0, resp * table, 0).sum(-1)
    groups = torch.arange(len(terms)) % MAX_GROUPS
    summed = torch.zeros(min(len(terms), MAX_GROUPS), dtype=terms.dtype).index_add(0, groups, terms)
    return torch.cat([summed, (log_prior if with_prior else torch.zeros_like(terms[0])).reshape(1)])


def _terms_gradient(own: Subject, u: Tensor, resp: Tensor, with_prior: bool) -> Tensor:
    """Return the gradient of each term of Q at u, shape (terms, P)."""
    u = u.detach().requires_grad_()
    terms = _q(own, u, resp, with_prior)
    return torch.autograd.grad(terms, u, torch.eye(len(terms), dtype=terms.dtype), is_grads_batched=True)[0]


def _gradient(own: Subject, u: Tensor, resp: Tensor, with_prior: bool) -> Tensor:
    u = u.detach().requires_grad_()
    return torch.autograd.grad(_q(own, u, resp, with_prior).sum(), u)[0]


def _residual(own: Subject, params: dict[str, Tensor], resp: Tensor, with_prior: bool) -> tuple[float, float, int]:
    """Return the largest scale-free gradient of Q at params, its tolerance, and the coordinate it belongs to.

    Scale-free: the sum of the terms' gradients over the sum of their sizes, per coordinate. The tolerance is how far
    it moves when the parameters are rounded. At a kink the gradient need not vanish, only change its sign.
    """
    raw = own.coordinates.inverse(params)
    u = raw.nan_to_num(posinf=EDGE, neginf=-EDGE)
    terms = _terms_gradient(own, u, resp, with_prior)
    total, sizes = terms.sum(0), terms.abs().sum(0)
    scale = sizes.clamp_min(_eps(u) * sizes.max())
    shift = _eps(u) * (1 + u.abs())
    moved = [(_gradient(own, u + sign * shift, resp, with_prior) - total).abs() / scale for sign in (1, -1)]
    noise = torch.maximum(*moved)
    kinks = noise > math.sqrt(_eps(u))
    residual = total.abs() / scale
    tolerance = 2**10 * (_eps(u) + torch.where(kinks, 0.0, noise))
    residual = torch.where(raw.isinf(), torch.where(total * u.sign() >= 0, 0.0, residual), residual)
    for i in (kinks & (residual > tolerance)).nonzero().flatten().tolist():
        step = torch.zeros_like(u)
        step[i] = 2**10 * shift[i]
        below, above = (_gradient(own, u + sign * step, resp, with_prior)[i] for sign in (-1, 1))
        if below >= 0 >= above:
            residual[i] = 0.0
    worst = int((residual / tolerance).argmax())
    return residual[worst].item(), tolerance[worst].item(), worst


def _beaten(
    own: Subject,
    params: dict[str, Tensor],
    resp: Tensor,
    with_prior: bool,
    generator: torch.Generator,
    error: float,
    tolerance: float,
) -> tuple[float, float, bool]:
    """Return error and tolerance as they are, or the gain in Q of a point that beats the claimed maximiser."""
    u = own.coordinates.inverse(params).nan_to_num(posinf=EDGE, neginf=-EDGE)
    with torch.no_grad():
        terms = _q(own, u, resp, with_prior)
        size = terms.abs().sum().item() + 1
        rounding = 2**10 * _eps(u)
        for radius in (1e-3, 1e-2, 1e-1, 1.0):
            other = u + radius * torch.randn(u.shape, generator=generator, dtype=u.dtype)
            gain = ((_q(own, other, resp, with_prior) - terms).sum() / size).item()
            if gain > rounding:
                return gain, rounding, True
    return error, tolerance, False


def _with_better(own: Subject, check: Check) -> Check:
    """Add to a failed check of the M-step what a numerical maximiser of Q returns for the site it names."""
    if check.counterexample is None or "site" not in check.counterexample:
        return check
    site, resp = check.counterexample["site"], check.counterexample["resp"].flatten(1)

    objective = with_gradient(lambda u: -_q(own, u, resp, with_prior=False).sum())
    better = own.coordinates(minimise(objective, own.origin, max_steps=200, rtol=1e-12).u)
    return check._replace(counterexample={**check.counterexample, "maximiser of Q": better[site]})
