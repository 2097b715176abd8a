"""What the log joint density says at every draw of a posterior, and what of it depends on no numbering of components.

Convergence is judged by the latter: ``label_invariant``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from mixproof.inference.draws import Draws
from mixproof.inference.enumeration import LogJoint, log_joint_table
from mixproof.inference.exchangeability import exchanges, latent_site, numberings
from mixproof.inference.log_posterior import LogPosterior

TABLE_ENTRIES = 1 << 22
"""How many entries of log joint tables are in memory at once where only sums of them are kept."""


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
    first = posterior.log_joint({site: value[0] for site, value in flat.items()})
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

    A row that counts w times in the program counts w times here. It is given the row's own parameters too, where the
    program has such, and their density is not part of it.

    Args:
        posterior: the program with its data.
        params: by site, (C, S, *shape).
    """
    return at_draws(posterior, params, lambda joint: {"rows": joint.log_likelihood_of_rows})["rows"]


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
        family: the family of the contract whose program it is, for its moments; None, and a family whose parameters
            are not all drawn, leave them out.

    Returns:
        By name, (C, S, ...): ``lp``, log p(x, params); ``log_likelihood``, log p(x | params); ``allocation_entropy``,
        the entropy of p(z | x, params), summed over rows; ``num_empty_components``, how many components are expected to
        have no row, given x and the parameters (of latent z ``num_empty_components_z``, where there are several); each
        parameter that numbers exchangeable components, sorted along that axis, or along all such axes as one, as
        ``*_sorted``, together with those that may change places with it (``exchanges``); the other parameters as they
        are; and of a family ``row_mean`` and ``row_covariance``, the moments of one row given the parameters.

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
        family: the family of the contract whose program it is, for its moments; None, and a family whose parameters
            are not all drawn, leave them out.

    Raises:
        ValueError: a site of the program has the name of a quantity of ``label_invariant``.
    """
    latents, sizes = posterior.program.latents, posterior.program.latent_sizes

    def of_rows(joint: LogJoint) -> dict[str, Tensor]:
        rows, resp = joint.log_likelihood_of_rows, joint.rows.softmax(1)
        entropy = -torch.special.xlogy(resp, resp).sum(1)
        found = {
            "rows": rows,
            "lp": joint.log_prior + joint.log_likelihood,
            "log_likelihood": rows.sum(),
            "allocation_entropy": joint.row_weights @ entropy,
        }
        for place, (latent, size) in enumerate(zip(latents, sizes, strict=True), 1):
            of_latent = resp.reshape(-1, *sizes).movedim(place, 1).reshape(-1, size, resp.shape[1] // size).sum(2)
            name = f"num_empty_components_{latent}" if len(latents) > 1 else "num_empty_components"
            found[name] = torch.log1p(-of_latent.clamp_max(1)).sum(0).exp().sum()  # it may round to above 1
        return found

    found = at_draws(posterior, draws.params, of_rows)
    of_each_row = found.pop("rows")
    axes: dict[str, dict[int, tuple[int, ...]]] = {}
    for numbered in numberings(posterior):
        if numbered.some_exchangeable:
            for site, own in (numbered.axes or {}).items():
                axes[site] = axes.get(site, {}) | dict.fromkeys(own, numbered.classes)
    partners: dict[str, set[str]] = {site: {site} for site in draws.params}
    for exchange in exchanges(posterior):
        for site, source in exchange.sources.items():
            partners[site].add(source)
    if family is not None and draws.params.keys() == set(family.Params._fields):
        moments = torch.func.vmap(torch.func.vmap(family.moments))(family.Params(**draws.params))
        found |= dict(zip(("row_mean", "row_covariance"), moments, strict=True))
    groups: dict[str, list[str]] = {name: [] for name in found}
    for site, value in draws.params.items():
        group = [other for other in draws.params if other in partners[site]]
        name = f"{'_and_'.join(group)}_sorted" if site in axes else site
        if groups.setdefault(name, group) != group:
            raise ValueError(f'the site "{site}" has the name of another quantity of the draws, {name}: rename it')
        found[name] = _sorted([draws.params[other] for other in group], axes[site]) if site in axes else value
    return of_each_row, found


def _sorted(values: Sequence[Tensor], classes: Mapping[int, Sequence[int]]) -> Tensor:
    """Return parameters (C, S, *shape) together, sorted over all axes that number components at once.

    Each axis sorted on its own would not be invariant. These axes become one, in the place of the first.

    Args:
        values: of one shape.
        classes: by axis of the shape, (K,), the class of each component: only within a class they change places.
    """
    places = [axis + 2 for axis in classes]
    lined_up = [value.movedim(places, tuple(range(-len(places), 0))).flatten(-len(places)) for value in values]
    whole = torch.cat(lined_up, -1)
    kinds = list(itertools.product(*classes.values())) * len(values)
    for kind in set(kinds):
        members = torch.tensor([each == kind for each in kinds], device=whole.device)
        whole[..., members] = whole[..., members].sort(-1).values
    return whole.movedim(-1, min(places))
