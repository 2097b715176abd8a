"""Standard errors of maximum likelihood fits: from the curvature of the likelihood, and from resampled data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference import checkpoint as checkpoints
from mixproof.inference.at_draws import log_likelihood, responsibilities
from mixproof.inference.dataset import Block
from mixproof.inference.draws import Draws
from mixproof.inference.em import has_collapsed, has_spread
from mixproof.inference.enumeration import log_joint_table
from mixproof.inference.exchangeability import numberings
from mixproof.inference.labels import assign, renumber
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.supports import at_edge, base_of, contains
from mixproof.inference.trees import tree_at, tree_expand, tree_map
from mixproof.inference.validation import (
    as_floating,
    check_generator,
    check_integer,
    check_params,
    check_rows,
    check_tolerance,
    num_components,
)

LOG_ERROR = 10.0
"""The standard error of a logarithm or a log odds above which its parameter may as well be at the edge."""
DISTANCE = 0.01
"""How far from the maximum, in standard errors, a fit may lie before its standard errors come with a warning."""


class StandardErrors(NamedTuple):
    """How exactly the data decide the parameters, by the curvature of their likelihood at its maximum."""

    params: dict[str, Tensor]
    """By site, (*shape): the standard error of each parameter."""
    covariance: Tensor
    """(M, M), of all parameters' entries in the order of ``params``; those of a simplex sum to a constant."""
    information: Tensor
    """(P, P), the observed information: minus the Hessian of log p(x | params) in unconstrained coordinates."""


def standard_errors(posterior: LogPosterior, params: Any) -> StandardErrors:
    """Return standard errors of a maximum likelihood fit by the observed information and the delta method.

    The latents are summed out before the likelihood is differentiated, twice, by autograd; a prior of the program does
    not enter. The errors are those of a fit whose components keep their numbering, and hold for many rows (Efron and
    Hinkley 1978, Biometrika 65(3); McLachlan and Peel 2000, Finite Mixture Models, section 2.15).

    Args:
        posterior: the program with its data.
        params: the fit, a value for each parameter site, as a dict or NamedTuple; others are ignored.

    Returns:
        ``StandardErrors``; a fit that is further from the maximum than a hundredth of a standard error is a warning.

    Raises:
        ValueError: the fit lacks a site or has one of another shape, a parameter is at the edge of its support, the
            data leave a direction of the parameters open, or the likelihood rises from the fit: the message names the
            parameters. Use ``bootstrap`` at an edge.
    """
    coordinates = posterior.coordinates
    fit, u = _coordinates_of(posterior, params)
    information = observed_information(posterior, params)

    def entries(u: Tensor) -> Tensor:
        return torch.cat([value.reshape(-1) for value in coordinates(u).values()])

    owners = [site for site, shape in coordinates.shapes.items() for _ in range(shape.numel())]
    _raise_unless_definite(information, owners)
    factor = torch.linalg.cholesky(information)
    slope = torch.autograd.functional.jacobian(partial(_log_likelihood, posterior), u)
    distance = float(torch.linalg.solve_triangular(factor, slope[:, None], upper=False).norm())
    if distance > DISTANCE:
        warnings.warn(
            f"the fit is {distance:.2g} standard errors away from the maximum of the likelihood: run EM further, with "
            "a lower rtol or a higher max_steps",
            ConvergenceWarning,
            stacklevel=2,
        )
    jacobian = torch.autograd.functional.jacobian(entries, u)
    _raise_next_to_edge(posterior, torch.cholesky_inverse(factor).diagonal().sqrt(), owners)
    root = torch.linalg.solve_triangular(factor, jacobian.mT, upper=False)
    covariance = root.mT @ root
    errors = covariance.diagonal().sqrt().split([value.numel() for value in fit.values()])
    by_site = {site: part.reshape(fit[site].shape) for site, part in zip(fit, errors, strict=True)}
    return StandardErrors(by_site, covariance, information)


def observed_information(posterior: LogPosterior, params: Any) -> Tensor:
    """Return minus the Hessian of log p(x | params) in unconstrained coordinates, (P, P), by autograd.

    Args:
        posterior: the program with its data.
        params: a value for each parameter site, as a dict or NamedTuple; others are ignored.

    Raises:
        ValueError: a site is missing or of another shape, or a parameter is at the edge of its support.
    """
    _, u = _coordinates_of(posterior, params)
    information = -torch.autograd.functional.hessian(partial(_log_likelihood, posterior), u)
    return (information + information.mT) / 2


def _coordinates_of(posterior: LogPosterior, params: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Return the free parameters by site, and their unconstrained coordinates (P,)."""
    given: Mapping[str, Tensor] = params if isinstance(params, Mapping) else params._asdict()
    transforms = posterior.coordinates.transforms
    if missing := sorted(set(transforms) - set(given)):
        raise ValueError(f"the fit lacks the sites {', '.join(missing)}; it has {', '.join(sorted(given))}")
    fit = {site: as_floating(given[site], site) for site in transforms}
    sites = posterior.constrain(torch.zeros(posterior.size, dtype=torch.float64, device=posterior.device))
    for site, value in sites.items():
        if fit[site].shape != value.shape:
            raise ValueError(f"{site} of the fit has shape {tuple(fit[site].shape)}, not {tuple(value.shape)}")
        if not contains(posterior.program.supports[site], fit[site]):
            raise ValueError(
                f"{site} of the fit lies outside of its support, {base_of(posterior.program.supports[site])}"
            )
    places = {site: transforms[site].inv(value).reshape(-1) for site, value in fit.items()}
    for site, value in fit.items():
        if not torch.isfinite(places[site]).all() or at_edge(value, posterior.program.supports[site]):
            raise ValueError(f"{site} is at the edge of its support, where the likelihood has no curvature: bootstrap")
    return fit, torch.cat(list(places.values()))


def _log_likelihood(posterior: LogPosterior, u: Tensor) -> Tensor:
    found = log_joint_table(posterior.model, posterior.program, posterior.coordinates(u), *posterior.args)
    return found.log_likelihood


def _raise_unless_definite(information: Tensor, owners: list[str]) -> None:
    """Raise, naming the sites of the offending direction, unless a symmetric matrix (P, P) is positive definite."""
    if not torch.isfinite(information).all():
        raise ValueError("the curvature of the likelihood is not finite: the fit is at or next to an edge; bootstrap")
    scales = information.diagonal().abs().sqrt()
    scales = scales.where(scales > 0, 1)
    values, directions = torch.linalg.eigh(information / (scales[:, None] * scales))
    if values[0] > math.sqrt(torch.finfo(values.dtype).eps):  # half the digits of the inverse are right
        return
    shares: dict[str, float] = {}
    for site, entry in zip(owners, directions[:, 0].square().tolist(), strict=True):
        shares[site] = shares.get(site, 0.0) + entry
    involved = ", ".join(site for site, share in shares.items() if share > 0.1)
    if values[0] < -math.sqrt(torch.finfo(values.dtype).eps):
        raise ValueError(
            f"the fit is no maximum: the likelihood curves upwards along {involved}; run EM further. A density with "
            "corners, such as Laplace's in its location, has no curvature that says how exact it is: bootstrap"
        )
    raise ValueError(
        f"the information is singular: along {involved} the likelihood is flat, and the data do not decide them. "
        "An empty component or two equal ones do this, and a model that is not identified: take fewer components"
    )


def _raise_next_to_edge(posterior: LogPosterior, errors: Tensor, owners: list[str]) -> None:
    """Raise where a bounded parameter is undecided by factors, from standard errors (P,) of the coordinates."""
    for site, error in zip(owners, errors.tolist(), strict=True):
        support = base_of(posterior.program.supports[site])
        bounded = support is not constraints.real and support.event_dim < 2
        if bounded and error > LOG_ERROR:
            raise ValueError(
                f"{site} is next to the edge of its support: on its logarithmic scale the standard error is "
                f"{error:.2g}, and the likelihood is no parabola that far. Bootstrap, or take fewer components"
            )


def bootstrap(
    family: Any,
    x: Any,
    params: Any,
    *,
    num_replicates: int,
    generator: torch.Generator,
    method: Literal["parametric", "nonparametric"] = "parametric",
    max_steps: int = 2000,
    rtol: float = 1e-10,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = False,
) -> Draws:
    """Return maximum likelihood fits of resampled data, by EM from the fit, their components numbered as its are.

    All replicates go as one batch, and leave it as they converge. Each is renumbered so that its components take the
    same rows of x as those of the fit, by linear assignment. Starting at the fit keeps to its mode of the likelihood
    (McLachlan and Peel 2000, Finite Mixture Models, section 2.16).

    Args:
        family: a family of the contract.
        x: (N, D), the data.
        params: the family's ``Params``, the fit to x.
        num_replicates: how many data sets, at least 2.
        generator: draws them.
        method: ``"parametric"`` draws each data set from the fit, ``"nonparametric"`` with replacement from the rows.
        max_steps: the largest number of EM steps of a replicate.
        rtol: the relative change of the log likelihood at which a replicate stops.
        checkpoint: a file for the replicates' state. If it exists, they go on from there to the same draws; it is known
            by the state of the generator at the start, the data, the fit and the settings but ``max_steps``.
        checkpoint_every: after how many EM steps to write it, at least 1; the end writes it too.
        progress: whether to show on stderr how many have stopped.

    Returns:
        ``Draws`` of one chain, a draw for each replicate that converged; ``lp`` is log p(x | params) of the data
        themselves. Their standard deviations are standard errors. Replicates that failed or did not converge are
        counted in the attributes and are a warning.

    Raises:
        TypeError, ValueError: the data, the fit or a setting is not what it must be, no replicate converged, or the
            checkpoint belongs to another run.
        OSError: the checkpoint cannot be read or written, which is tried before the first step.
    """
    check_integer(num_replicates, "num_replicates", 2)
    check_integer(max_steps, "max_steps", 1)
    check_integer(checkpoint_every, "checkpoint_every", 1)
    check_tolerance(rtol)
    check_generator(generator)
    if method not in ("parametric", "nonparametric"):
        raise ValueError(f'method must be "parametric" or "nonparametric", not {method!r}')
    x = check_rows(family, x)
    params = check_params(family, params, x.shape[1])
    params = family.Params(*(value.to(x) for value in params))
    ones = x.new_ones(len(x))
    identity = {
        "engine": f"{method} bootstrap",
        "family": checkpoints.identify(family),
        "x": checkpoints.digest(x),
        "params": checkpoints.digest(params),
        "num_replicates": num_replicates,
        "rtol": rtol,
        "generator": checkpoints.digest(generator.get_state()),
    }
    if method == "parametric":
        rows = torch.stack([family.sample(params, len(x), generator)[0] for _ in range(num_replicates)])
        counts = ones.expand(num_replicates, -1)
    else:
        drawn = torch.multinomial(ones.expand(num_replicates, -1), len(x), replacement=True, generator=generator)
        counts = torch.zeros_like(drawn, dtype=x.dtype).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=x.dtype))
        rows = x.expand(num_replicates, *x.shape)
    replicates = _Replicates(family, rows, counts, params, rtol)
    file = None if checkpoint is None else Path(checkpoint)
    if file is not None:
        replicates.restore(checkpoints.load(file, identity))
        checkpoints.save(file, identity, replicates.state())  # a disk that takes no file is found now
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("bootstrap", total=num_replicates, completed=replicates.num_stopped)
        while replicates.num_stopped < num_replicates and replicates.num_steps < max_steps:
            replicates.step()
            bar.update(task, completed=replicates.num_stopped)
            last = replicates.num_stopped == num_replicates or replicates.num_steps == max_steps
            if file is not None and (last or replicates.num_steps % checkpoint_every == 0):
                checkpoints.save(file, identity, replicates.state())
    fits, converged = replicates.fits, replicates.converged
    if has_spread(family, x.shape[1]):
        for i in converged.nonzero()[:, 0].tolist():
            converged[i] = not has_collapsed(family, tree_at(fits, i), Block(0, rows[i], counts[i]))
    num_failed = num_replicates - int(converged.sum())
    if num_failed == num_replicates:
        raise ValueError(f"none of {num_replicates} replicates converged in {max_steps} steps: take fewer components")
    if num_failed > 0:
        warnings.warn(
            f"{num_failed} of {num_replicates} replicates lost a component, by its rows or its spread, or did not "
            f"converge in {max_steps} steps: "
            "without them the spread looks too small. Take fewer components or more steps",
            ConvergenceWarning,
            stacklevel=2,
        )
    posterior = LogPosterior(partial(family.model, num_components=num_components(params)), x)
    draws = {site: getattr(fits, site)[converged][None] for site in posterior.program.supports}
    fit = {site: getattr(params, site)[None, None] for site in posterior.program.supports}
    for found in numberings(posterior):
        if not found.exchangeable:
            continue
        target = responsibilities(posterior, fit, found.latents[0])[0, 0]
        permutations = assign(target.mT @ responsibilities(posterior, draws, found.latents[0])[0])[None]
        draws |= {site: renumber(draws[site], permutations, axes) for site, axes in (found.axes or {}).items()}
    attributes = {"engine": f"{method} bootstrap", "num_replicates": num_replicates, "num_failed": num_failed}
    attributes |= {f"relabelled_{latent}": "bootstrap" for latent in posterior.program.latents}
    return Draws(draws, {"lp": log_likelihood(posterior, draws).sum(-1)}, attributes)


class _Replicates:
    """Where EM leads from one start on B data sets (B, N, D); those that stop leave the batch."""

    def __init__(self, family: Any, rows: Tensor, counts: Tensor, params: Any, rtol: float):
        self._family, self._rows, self._counts = family, rows, counts
        self._least = rtol + 16 * torch.finfo(rows.dtype).eps
        self._step_of_all = torch.func.vmap(self._step_of_one)
        self.num_steps = 0
        self.fits = tree_map(Tensor.clone, tree_expand(params, len(rows)))
        self.converged = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        self._active = torch.arange(len(rows), device=rows.device)
        self._last = rows.new_full((len(rows),), -math.inf)  # the log likelihoods of the active ones

    @property
    def num_stopped(self) -> int:
        return len(self._rows) - len(self._active)

    def _step_of_one(self, params: Any, x: Tensor, row_weights: Tensor) -> tuple[Tensor, Any]:
        family = self._family
        table = family.log_joint(params, x).masked_fill((row_weights == 0)[:, None], 0)
        log_density = table.logsumexp(-1)
        resp = (table - log_density[:, None]).exp() * row_weights[:, None]
        return row_weights @ log_density, family.Params(*family.m_step(family.statistics(params, x, resp), None))

    def step(self) -> None:
        """Take a step of EM in each active replicate, and let go of those at rest or without a component."""
        active = self._active
        log_lik, images = self._step_of_all(tree_at(self.fits, active), self._rows[active], self._counts[active])
        at_rest = (log_lik - self._last).abs() <= self._least * log_lik.abs()
        sound = torch.isfinite(log_lik)
        for name, value in images._asdict().items():
            valid = value > 0 if name.endswith("weights") else torch.isfinite(value)
            sound &= valid.flatten(1).all(1)
        self.converged[active[at_rest & sound]] = True
        goes_on = sound & ~at_rest
        self._active, self._last = active[goes_on], log_lik[goes_on]
        for old, new in zip(self.fits, images, strict=True):
            old[self._active] = new[goes_on]
        self.num_steps += 1

    def state(self) -> dict[str, Tensor]:
        return {
            "num_steps": torch.tensor(self.num_steps),
            "active": self._active,
            "converged": self.converged,
            "log_lik": self._last,
        } | {f"params.{name}": value for name, value in self.fits._asdict().items()}

    def restore(self, state: Mapping[str, Tensor] | None) -> None:
        """Go back to a state, if there is one."""
        if state is None:
            return
        self.num_steps = int(state["num_steps"])
        self._active, self.converged, self._last = (
            state[name].to(self._rows.device) for name in ("active", "converged", "log_lik")
        )
        for name, value in self.fits._asdict().items():
            value.copy_(state[f"params.{name}"])
