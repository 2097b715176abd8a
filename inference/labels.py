"""Labels of mixture components: which axes of the parameters they number, and how their numberings are made to agree.

A density of exchangeable components is the same under all K! numberings of them, so that draws of one component's
parameters describe that component only after the numberings of all draws have been made to agree (``align``). What does
not depend on the numbering needs none of this, and is what convergence is judged by (``label_invariant``).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.draws import Draws
from mixproof.inference.enumeration import LogJoint, log_joint_table
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.supports import base_of

TABLE_ENTRIES = 1 << 22
"""How many entries of log joint tables are in memory at once where only sums of them are kept."""

NUM_POINTS = 16
"""Of how many draws of the prior the best three serve to tell components apart."""
ROUNDINGS = 1000
"""How many eps of the largest of its terms two orders of one sum may differ by."""


class Numbering(NamedTuple):
    """Which axes number the components of a program, and whether another numbering is as good."""

    axes: dict[str, int] | None
    """By site, the axis of its value, of length K, that numbers the components; sites that have none are left out. None
    where no choice of axes permutes the components in the likelihood."""
    exchangeable: bool
    """Whether the prior is the same under all numberings too."""


def component_axes(posterior: LogPosterior, latent: str | None = None) -> dict[str, int]:
    """Return which axis of each parameter numbers the exchangeable components of a program, measured by ``numbering``.

    Args:
        posterior: the program with its data.
        latent: the enumerated site that says which component a row is from; None is the only one.

    Returns:
        By site, the axis of its value, of length K, that numbers the components. Sites without one, such as a
        covariance that all components share, are left out.

    Raises:
        ValueError: the components are not exchangeable; or the program has several latents and none is named, or none
            of that name.
    """
    axes, exchangeable = numbering(posterior, latent)
    if axes is not None and exchangeable:
        return axes
    latent = latent_site(posterior, latent)
    reason = (
        "no choice of axes of their number permutes them in the log joint density of the rows"
        if axes is None
        else "the prior or a support tells them apart, so that each has a name of its own"
    )
    raise ValueError(
        f"the {num_values(posterior, latent)} components that {latent} counts are not exchangeable: {reason}"
    )


def numbering(posterior: LogPosterior, latent: str | None = None) -> Numbering:
    """Measure which axes of the parameters number the components, and whether these are exchangeable.

    Permuting the axes together must permute the values of the latent in the table of log p(x_n, z_n | params); if it
    leaves log p(params) as it is, they are exchangeable. Both are tried at points that nothing singles out, with a
    cycle and a transposition, which generate all K! permutations. Of several choices an exchangeable one is taken.
    The points are draws of the prior, where it is proper: far from them the rounding of large log densities would hide
    small differences between components.

    Args:
        posterior: the program with its data.
        latent: the enumerated site that says which component a row is from; None is the only one.

    Raises:
        ValueError: the program has several latents and none is named, or none of that name; or no row has a density at
            any draw of the prior.
    """
    latent = latent_site(posterior, latent)
    size = num_values(posterior, latent)
    points = _generic_points(posterior, latent)
    sites = {site: value.shape for site, value in points[0][0].items()}
    options = [_candidates(posterior.program.supports[site], shape, size) for site, shape in sites.items()]
    numbers = torch.arange(size, device=posterior.device)
    permutations = [numbers.roll(1), torch.cat([numbers[:2].flip(0), numbers[2:]])]
    of_likelihood = None
    for choice in itertools.product(*options):
        axes = {site: axis for site, axis in zip(sites, choice, strict=True) if axis is not None}
        exchangeable = True
        for (params, before), permutation in itertools.product(points, permutations):
            table_agrees, prior_agrees = _symmetries(posterior, latent, params, before, axes, permutation)
            exchangeable &= prior_agrees
            if not table_agrees:
                break
        else:
            if exchangeable:
                return Numbering(axes, True)
            of_likelihood = of_likelihood or axes
    return Numbering(of_likelihood, False)


class Exchange(NamedTuple):
    """An order of the latents of a program under which its density is the same, components and all."""

    order: tuple[int, ...]
    """Which latent, by its number in the program, takes the place of each."""
    sources: dict[str, str]
    """By site, the one whose value it takes; sites that keep theirs are left out."""


def exchanges(posterior: LogPosterior) -> list[Exchange]:
    """Measure under which orders of its latents the posterior of a program is the same, the order as it is first.

    The summands of a sum of two mixtures under one prior are told apart by nothing but their names: the parameters of
    both can change places. Sites that number the components of two latents are paired in the order of the program;
    that it makes no difference is tried at points that nothing singles out, as in ``numbering``. Of latents of a single
    component nothing says which parameters are whose, and their exchange is not found.

    Args:
        posterior: the program with its data.
    """
    latents, sizes = posterior.program.latents, posterior.program.latent_sizes
    found = [Exchange(tuple(range(len(latents))), {})]
    if len(latents) == 1:
        return found
    axes = [numbering(posterior, latent).axes or {} for latent in latents]
    points = _generic_points(posterior, latents[0])
    for order in itertools.permutations(range(len(latents))):
        pairs = [(place, other) for place, other in enumerate(order) if place != other]
        if not pairs or any(
            not axes[place] or sizes[place] != sizes[other] or list(axes[place].values()) != list(axes[other].values())
            for place, other in pairs
        ):
            continue
        sources = {site: source for i, j in pairs for site, source in zip(axes[i], axes[j], strict=True)}
        if all(site == source for site, source in sources.items()):
            continue
        if all(_is_symmetry(posterior, params, before, order, sources) for params, before in points):
            found.append(Exchange(order, sources))
    return found


def _is_symmetry(
    posterior: LogPosterior, params: Mapping[str, Tensor], before: LogJoint, order: tuple[int, ...], sources: Any
) -> bool:
    """Return whether sites that take the values of others reorder the table, and leave the prior as it is."""
    if any(params[site].shape != params[source].shape for site, source in sources.items()):
        return False
    after = _log_joint(posterior, {site: params[sources.get(site, site)] for site in params})
    table = before.rows.reshape(-1, *posterior.program.latent_sizes).permute(0, *(place + 1 for place in order))
    return _equal(after.rows, table.reshape(before.rows.shape)) and _equal(after.log_prior, before.log_prior)


def latent_site(posterior: LogPosterior, latent: str | None = None) -> str:
    """Return the enumerated site of that name, or the only one.

    Raises:
        ValueError: there are several and none is named, or none has that name.
    """
    latents = posterior.program.latents
    if latent is None and len(latents) > 1:
        raise ValueError(f"the program has the latents {', '.join(latents)}: say of which one, latent={latents[0]!r}")
    if latent is not None and latent not in latents:
        raise ValueError(f"the program has no latent {latent!r}; it has {', '.join(latents)}")
    return latents[0] if latent is None else latent


def num_values(posterior: LogPosterior, latent: str) -> int:
    """Return K, how many values an enumerated site has."""
    return posterior.program.latent_sizes[posterior.program.latents.index(latent)]


def permute(params: Mapping[str, Tensor], axes: Mapping[str, int], permutation: Tensor) -> dict[str, Tensor]:
    """Return parameters, a value a site, renumbered: component j is the one that was number permutation[j], (K,)."""
    return {
        site: value.index_select(axes[site], permutation) if site in axes else value for site, value in params.items()
    }


def _candidates(support: constraints.Constraint, shape: torch.Size, size: int) -> list[int | None]:
    """Return the axes of a value that may number the components, the first the likeliest, and None for no axis.

    Rows and columns of a matrix are one index, and permuting one of the two leaves a symmetric matrix not symmetric.
    """
    size_of_event = base_of(support).event_dim
    num_axes = len(shape) - (size_of_event if size_of_event > 1 else 0)
    return [*(axis for axis in range(num_axes) if shape[axis] == size), None]


def _generic_points(posterior: LogPosterior, latent: str) -> list[tuple[dict[str, Tensor], LogJoint]]:
    """Return the three points, and what is computed there, at which a density is computed the most exactly.

    They are draws of the prior, or of an improper one fractional parts of multiples of irrational numbers, which none
    repeats. Those come first at which the most rows have a density, and among these the smallest logarithms.
    """
    try:
        u = posterior.draw_sites(NUM_POINTS, seed=0)
    except ValueError:
        multiples = torch.arange(1, posterior.size + 1, dtype=torch.float64, device=posterior.device)
        u = torch.stack([(multiples * root).frac() - 0.5 for root in (2**0.5, 3**0.5, 5**0.5)])
    u = u[u.isfinite().all(1)]
    params = posterior.constrain(u)
    found = []
    for i in range(len(u)):
        point = {site: value[i] for site, value in params.items()}
        joint = _log_joint(posterior, point)
        known = joint.rows[joint.rows.isfinite()]
        if joint.log_prior.isfinite() and len(known):
            largest = max(float(known.abs().max()), abs(float(joint.log_prior)))
            found.append((-len(known), largest, i, point, joint))
    if not found:
        raise ValueError(
            f"no row has a density at any of {len(u)} points, so that what {latent} counts cannot be seen: does the "
            "prior allow the data?"
        )
    return [(point, joint) for *_, point, joint in sorted(found, key=lambda each: each[:3])[:3]]


def _log_joint(posterior: LogPosterior, params: Mapping[str, Tensor]) -> LogJoint:
    with torch.no_grad(), pyro.validation_enabled(False):
        return log_joint_table(posterior.model, posterior.program, params, *posterior.args)


def _symmetries(
    posterior: LogPosterior,
    latent: str,
    params: Mapping[str, Tensor],
    before: LogJoint,
    axes: Mapping[str, int],
    permutation: Tensor,
) -> tuple[bool, bool]:
    """Return whether renumbering the axes renumbers the latent in the table, and leaves the prior as it is."""
    renumbered = permute(params, axes, permutation)
    after = _log_joint(posterior, renumbered)
    sizes = posterior.program.latent_sizes
    place = posterior.program.latents.index(latent) + 1
    table = before.rows.reshape(-1, *sizes).index_select(place, permutation).reshape(before.rows.shape)
    supported = all(bool(posterior.program.supports[site].check(renumbered[site]).all()) for site in axes)
    return _equal(after.rows, table), supported and _equal(after.log_prior, before.log_prior)


def _equal(left: Tensor, right: Tensor) -> bool:
    """Whether two results of the same sums in another order agree: each rounds by a few eps of its largest terms."""
    scale = float(right[right.isfinite()].abs().max())
    atol = ROUNDINGS * torch.finfo(left.dtype).eps * max(scale, 1)
    return torch.allclose(left, right, rtol=0, atol=atol, equal_nan=True)


def at_draws(
    posterior: LogPosterior, params: Mapping[str, Tensor], function: Callable[[LogJoint], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return what a function says of the log joint density at every draw, computed for many draws at once.

    Args:
        posterior: the program with its data.
        params: by site, (C, S, *shape).
        function: takes a ``LogJoint`` to tensors by name, with operations that ``torch.func.vmap`` takes.

    Returns:
        By name, (C, S, ...).
    """
    flat = {site: value.flatten(0, 1) for site, value in params.items()}
    shape = next(iter(params.values())).shape[:2]
    first = _log_joint(posterior, {site: value[0] for site, value in flat.items()})
    sizes = [value.numel() for value in posterior.args if isinstance(value, Tensor)]
    num_features = max([*sizes, 0]) // len(first.rows) or 1
    at_once = max(TABLE_ENTRIES // (first.rows.numel() * num_features), 1)

    def traced(params: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        found = function(log_joint_table(posterior.model, posterior.program, params, *posterior.args))
        return torch.stack([value.sum() for value in params.values()]).sum(), found

    def at(params: dict[str, Tensor]) -> dict[str, Tensor]:
        # Pyro's enumeration reads the data of a value, which vmap refuses unless a gradient, of anything, is taken.
        return torch.func.grad(traced, has_aux=True)(params)[1]

    results: dict[str, Tensor] = {}
    with torch.no_grad(), pyro.validation_enabled(False):
        for start in range(0, shape.numel(), at_once):
            some = slice(start, start + at_once)
            # kept in one piece from the outset: parts that lie between what is freed would keep it from being reused
            for name, part in torch.func.vmap(at)({site: value[some] for site, value in flat.items()}).items():
                results.setdefault(name, part.new_empty(shape.numel(), *part.shape[1:]))[some] = part
    return {name: value.unflatten(0, shape) for name, value in results.items()}


def log_likelihood(posterior: LogPosterior, params: Mapping[str, Tensor]) -> Tensor:
    """Return the marginal log p(x_n | params) of each row at every draw, (C, S, N), the latents summed out.

    A row that counts w times in the program counts w times here.

    Args:
        posterior: the program with its data.
        params: by site, (C, S, *shape).
    """
    return at_draws(posterior, params, lambda joint: {"rows": joint.row_weights * joint.rows.logsumexp(1)})["rows"]


def responsibilities(posterior: LogPosterior, params: Mapping[str, Tensor], latent: str | None = None) -> Tensor:
    """Return p(z_n = k | x_n, params) at every draw, (C, S, N, K), other latents summed out.

    Args:
        posterior: the program with its data.
        params: by site, (C, S, *shape).
        latent: which latent z is; None is the only one.

    Raises:
        ValueError: there are several latents and none is named, or none of that name.
    """
    latent = latent_site(posterior, latent)
    sizes = posterior.program.latent_sizes
    others = [axis + 1 for axis, name in enumerate(posterior.program.latents) if name != latent]

    def of_latent(joint: LogJoint) -> dict[str, Tensor]:
        table = joint.rows.softmax(1).reshape(-1, *sizes)
        return {latent: table.sum(others) if others else table}

    return at_draws(posterior, params, of_latent)[latent]


def co_clustering(posterior: LogPosterior, params: Mapping[str, Tensor], latent: str | None = None) -> Tensor:
    """Return p(z_n = z_m | x), (N, N): the share of the posterior in which two rows are from one component.

    No numbering of the components enters. It is the average over draws of the probability given the parameters, the
    posterior similarity matrix of Fritsch and Ickstadt 2009, Bayesian Analysis 4(2), section 2.

    Args:
        posterior: the program with its data.
        params: by site, (C, S, *shape).
        latent: which latent z is; None is the only one.

    Raises:
        ValueError: there are several latents and none is named, or none of that name.
    """
    resp = responsibilities(posterior, params, latent).flatten(0, 1)
    columns = resp.movedim(1, 0).flatten(1)  # (N, S K)
    together = columns @ columns.mT / len(resp)
    return together.fill_diagonal_(1)


def label_invariant(draws: Draws, posterior: LogPosterior, *, family: Any = None) -> dict[str, Tensor]:
    """Return quantities of each draw that do not depend on how its components are numbered.

    Args:
        draws: of the parameters of ``posterior``.
        posterior: the program with its data.
        family: the family of the contract whose program it is, for its moments; None leaves them out.

    Returns:
        By name, (C, S, ...): ``lp``, log p(x, params); ``log_likelihood``, log p(x | params); ``allocation_entropy``,
        the entropy of p(z | x, params), summed over rows; ``num_empty_components``, how many components are expected to
        have no row, given x and the parameters (of latent z ``num_empty_components_z``, where there are several); each
        parameter that numbers exchangeable components, sorted along that axis, as ``*_sorted``, together with those
        that may change places with it (``exchanges``); the other parameters as they are; and of a family ``row_mean``
        and ``row_covariance``, the moments of one row given the parameters.

    Raises:
        ValueError: a site of the program has the name of one of the others.
    """
    return log_likelihood_and_label_invariant(draws, posterior, family=family)[1]


def log_likelihood_and_label_invariant(
    draws: Draws, posterior: LogPosterior, *, family: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what ``log_likelihood`` and ``label_invariant`` do, from one pass over the draws.

    Args:
        draws: of the parameters of ``posterior``.
        posterior: the program with its data.
        family: the family of the contract whose program it is, for its moments; None leaves them out.

    Raises:
        ValueError: a site of the program has the name of a quantity of ``label_invariant``.
    """
    latents, sizes = posterior.program.latents, posterior.program.latent_sizes

    def of_rows(joint: LogJoint) -> dict[str, Tensor]:
        rows, resp = joint.row_weights * joint.rows.logsumexp(1), joint.rows.softmax(1)
        log_lik = rows.sum()
        entropy = -torch.special.xlogy(resp, resp).sum(1)
        found = {
            "rows": rows,
            "lp": joint.log_prior + log_lik,
            "log_likelihood": log_lik,
            "allocation_entropy": joint.row_weights @ entropy,
        }
        for place, (latent, size) in enumerate(zip(latents, sizes, strict=True), 1):
            of_latent = resp.reshape(-1, *sizes).movedim(place, 1).reshape(-1, size, resp.shape[1] // size).sum(2)
            name = f"num_empty_components_{latent}" if len(latents) > 1 else "num_empty_components"
            found[name] = torch.log1p(-of_latent.clamp_max(1)).sum(0).exp().sum()  # it may round to above 1
        return found

    found = at_draws(posterior, draws.params, of_rows)
    of_each_row = found.pop("rows")
    axes: dict[str, int] = {}
    for latent in posterior.program.latents:
        of_latent, exchangeable = numbering(posterior, latent)
        axes |= of_latent if of_latent is not None and exchangeable else {}
    partners: dict[str, set[str]] = {site: {site} for site in draws.params}
    for exchange in exchanges(posterior):
        for site, source in exchange.sources.items():
            partners[site].add(source)
    if family is not None:
        moments = torch.func.vmap(torch.func.vmap(family.moments))(family.Params(**draws.params))
        found |= dict(zip(("row_mean", "row_covariance"), moments, strict=True))
    groups: dict[str, list[str]] = {name: [] for name in found}
    for site, value in draws.params.items():
        group = [other for other in draws.params if other in partners[site]]
        name = f"{'_and_'.join(group)}_sorted" if site in axes else site
        if groups.setdefault(name, group) != group:
            raise ValueError(f'the site "{site}" has the name of another quantity of the draws, {name}: rename it')
        if site in axes:
            axis = axes[site] + 2
            found[name] = torch.cat([draws.params[other] for other in group], axis).sort(dim=axis).values
        else:
            found[name] = value
    return of_each_row, found


def align(
    draws: Draws,
    posterior: LogPosterior,
    *,
    method: Literal["stephens", "equivalence"] = "stephens",
    latent: str | None = None,
    max_iterations: int = 100,
) -> Draws:
    """Return the draws with their components renumbered, draw by draw, so that the numberings agree.

    Both methods compare p(z_n = k | x_n, params) of a draw with a summary of all draws, renumber each draw as agrees
    best with it, a linear assignment, and repeat with the summary of the renumbered draws until no number changes. They
    start from the draw of the highest ``lp``. Renumbering does not mend a sampler that has missed a mode: judge its
    convergence by ``label_invariant`` quantities.

    Args:
        draws: of the parameters of ``posterior``, with ``lp`` among the sample statistics.
        posterior: the program with its data.
        method: ``"stephens"`` minimises the Kullback-Leibler divergence from a draw's probabilities to the average of
            all (Stephens 2000, Journal of the Royal Statistical Society B 62(4), algorithm 2).
            ``"equivalence"`` maximises how many rows have the same most probable component in the draw and in the
            average: equivalence-class representatives (Papastamoulis and Iliopoulos 2010, Journal of Computational and
            Graphical Statistics 19(2)), iterated with such a pivot (Papastamoulis 2016, Journal of Statistical Software
            69, code snippet 1, section 2).
        latent: whose components; None is the only latent. Align a program of several latents once for each.
        max_iterations: the largest number of repetitions, at least 1.

    Returns:
        ``Draws`` numbered as most of them were before. The attributes ``relabelled_*``, * the latent's name, hold the
        method, ``..._share`` the share of draws that were renumbered, and ``..._iterations`` the number of repetitions.

    Raises:
        ValueError: the components are not exchangeable, or a setting is not what it must be.
    """
    if method not in ("stephens", "equivalence"):
        raise ValueError(f'method must be "stephens" or "equivalence", not {method!r}')
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, not {max_iterations}")
    latent = latent_site(posterior, latent)
    axes = component_axes(posterior, latent)
    resp = responsibilities(posterior, draws.params, latent).flatten(0, 1)
    lp = draws.sample_stats["lp"]
    permutations, iterations = _agree(resp, int(lp.argmax()), method, max_iterations)
    values, counts = permutations.unique(dim=0, return_counts=True)
    permutations = permutations[:, values[counts.argmax()].argsort()]  # the numbering of most draws is the one kept
    moved = (permutations != torch.arange(permutations.shape[1], device=permutations.device)).any(1)
    by_chain = permutations.unflatten(0, lp.shape)
    params = {
        site: renumber(value, by_chain, axes[site]) if site in axes else value for site, value in draws.params.items()
    }
    report = {"": method, "_share": float(moved.double().mean()), "_iterations": iterations}
    attributes = draws.attributes | {f"relabelled_{latent}{name}": value for name, value in report.items()}
    return Draws(params, draws.sample_stats, attributes)


def assign(agreement: Tensor) -> Tensor:
    """Return the permutations (S, K) that maximise agreement (S, K, K), of a summary's component j and the draw's k.

    Component j of the renumbered draw is the one that was number permutation[j].
    """
    found = [linear_sum_assignment(scores, maximize=True)[1] for scores in agreement.cpu().numpy()]
    return torch.as_tensor(np.stack(found), device=agreement.device)


def renumber(value: Tensor, permutations: Tensor, axis: int) -> Tensor:
    """Return draws (C, S, *shape) with an axis of the shape renumbered by permutations (C, S, K)."""
    shape = [1] * (value.ndim - 2)
    shape[axis] = permutations.shape[-1]
    return value.take_along_dim(permutations.reshape(*permutations.shape[:2], *shape), dim=axis + 2)


def _agree(resp: Tensor, pivot: int, method: str, max_iterations: int) -> tuple[Tensor, int]:
    """Return permutations (S, K) that make responsibilities (S, N, K) agree, and after how many repetitions."""
    size = resp.shape[-1]
    average = resp[pivot]
    certain = torch.nn.functional.one_hot(resp.argmax(-1), size).to(resp) if method == "equivalence" else resp
    permutations = torch.arange(size, device=resp.device).expand(len(resp), size)
    for iteration in range(1, max_iterations + 1):
        if method == "equivalence":
            target = torch.nn.functional.one_hot(average.argmax(-1), size).to(resp)
        else:  # sum p log p is the same under all permutations, so that - sum p log q remains of the divergence
            target = average.clamp_min(torch.finfo(average.dtype).tiny).log()
        before, permutations = permutations, assign(target.mT @ certain)
        if iteration > 1 and torch.equal(before, permutations):
            return permutations, iteration
        average = resp.take_along_dim(permutations[:, None], dim=-1).mean(0)
    warnings.warn(
        f"the numberings still changed after {max_iterations} repetitions: raise max_iterations",
        ConvergenceWarning,
        stacklevel=3,
    )
    return permutations, max_iterations
