"""Which axes of the parameters number the components of a program, and which numberings are as good as another.

Both are measured: a permutation of components, or of latents, must leave the log joint density as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.enumeration import LogJoint, log_joint_table
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.supports import base_of

NUM_POINTS = 16
"""Of how many draws of the prior the best three serve to tell components apart."""
SEARCH_STEPS, FOUND = 60, 1e-6
"""Of the search for parameters with a given table, and up to which share of its largest entry they have it."""
ROUNDINGS = 1000
"""How many eps of the largest of its terms two orders of one sum may differ by."""


class Numbering(NamedTuple):
    """Which axes number the components of a program, and whether another numbering is as good."""

    latents: tuple[str, ...]
    """The latents that count these components: one, or those of a chain, which share its states."""
    axes: dict[str, tuple[int, ...]] | None
    """By site, the axes of its value, of length K, that number the components; sites that have none are left out. None
    where no choice of axes permutes the components in the likelihood."""
    classes: tuple[int, ...]
    """By component, the least number of those with which it may change places in the likelihood and the prior."""

    @property
    def exchangeable(self) -> bool:
        """Whether all components may change places."""
        return self.axes is not None and not any(self.classes)

    @property
    def some_exchangeable(self) -> bool:
        """Whether two components or more may change places."""
        return self.axes is not None and len(set(self.classes)) < len(self.classes)


def component_axes(posterior: LogPosterior, latent: str | None = None) -> dict[str, tuple[int, ...]]:
    """Return which axes of each parameter number the exchangeable components of a program, measured by ``numbering``.

    Args:
        posterior: the program with its data.
        latent: the enumerated site that says which component a row is from; None is the only one.

    Returns:
        By site, the axes of its value, of length K, that number the components: one, or both of a transition matrix.
        Sites without one, such as a covariance that all components share, are left out.

    Raises:
        ValueError: the components are not exchangeable; or the program has several latents and none is named, or none
            of that name.
    """
    found = numbering(posterior, latent)
    if found.axes is not None and found.exchangeable:
        return found.axes
    latent = latent_site(posterior, latent)
    reason = (
        "no choice of axes of their number permutes them in the log joint density of the rows"
        if found.axes is None
        else "the prior or a support tells them apart, so that each has a name of its own"
        if not found.some_exchangeable
        else "the prior or a support tells some of them apart, though not all"
    )
    raise ValueError(
        f"the {num_values(posterior, latent)} components that {latent} counts are not exchangeable: {reason}"
    )


def numberings(posterior: LogPosterior) -> list[Numbering]:
    """Return the ``numbering`` of each latent of a program, once of those that count the same components."""
    found: dict[tuple[str, ...], Numbering] = {}
    for latent in posterior.program.latents:
        if not any(latent in latents for latents in found):
            own = numbering(posterior, latent)
            found[own.latents] = own
    return list(found.values())


def numbering(posterior: LogPosterior, latent: str | None = None) -> Numbering:
    """Measure which axes of the parameters number the components, and whether these are exchangeable.

    Permuting the axes together must permute the values of the latent in the table of log p(x_n, z_n | params); if it
    leaves log p(params) as it is, they are exchangeable. Both are tried at points that nothing singles out, with a
    cycle and a transposition, which generate all K! permutations. Of several choices an exchangeable one is taken; if
    there is none, the transpositions that leave both as they are say which components may change places. The points are
    draws of the prior, where it is proper: far from them the rounding of large log densities would hide small
    differences between components. Where no choice permutes the values of this latent alone, all latents of as many
    values are permuted together, which may count the same components, as the states of a chain.

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
    found = _numbering_of(posterior, (latent,), size, points)
    together = tuple(each for each in posterior.program.latents if num_values(posterior, each) == size)
    if found.axes is None and len(together) > 1:
        of_all = _numbering_of(posterior, together, size, points)
        found = found if of_all.axes is None else of_all
    return found


def _numbering_of(
    posterior: LogPosterior, latents: tuple[str, ...], size: int, points: list[tuple[dict[str, Tensor], LogJoint]]
) -> Numbering:
    """Return the numbering of the components that latents count together."""
    sites = {site: value.shape for site, value in points[0][0].items()}
    options = [
        _candidates(posterior.program.supports[site], shape, size, len(latents)) for site, shape in sites.items()
    ]
    numbers = torch.arange(size, device=posterior.device)
    permutations = [numbers.roll(1), torch.cat([numbers[:2].flip(0), numbers[2:]])]
    of_likelihood = None
    for choice in itertools.product(*options):
        axes = {site: own for site, own in zip(sites, choice, strict=True) if own}
        exchangeable = True
        for (params, before), permutation in itertools.product(points, permutations):
            table_agrees, prior_agrees = _symmetries(posterior, latents, params, before, axes, permutation)
            exchangeable &= prior_agrees
            if not table_agrees:
                break
        else:
            if exchangeable:
                return Numbering(latents, axes, (0,) * size)
            of_likelihood = of_likelihood or axes
    classes = list(range(size))
    if of_likelihood is None or size == 2:
        return Numbering(latents, of_likelihood, tuple(classes))
    for i, j in itertools.combinations(range(size), 2):
        swap = numbers.clone()
        swap[i], swap[j] = j, i
        if classes[j] == j and all(
            all(_symmetries(posterior, latents, params, before, of_likelihood, swap)) for params, before in points
        ):
            classes[j] = classes[i]
    return Numbering(latents, of_likelihood, tuple(classes))


def otherwise_exchangeable(posterior: LogPosterior, latent: str | None = None) -> bool:
    """Measure whether components may change places although ``numbering`` finds no axes that number them.

    A share θ beside 1 - θ, or the parameters of each component in sites of their own, have such a symmetry. Looked for
    are parameters, from those with permuted axes on, whose table is that of a point with its first two components
    exchanged, by least squares; the prior must have the same density there. One that is found is one, to 1e-6; where
    none is found there may be one.

    Args:
        posterior: the program with its data.
        latent: the enumerated site that says which component a row is from; None is the only one.

    Raises:
        ValueError: as ``numbering``.
    """
    latent = latent_site(posterior, latent)
    size = num_values(posterior, latent)
    if size == 1 or numbering(posterior, latent).axes is not None:
        return False
    points = _generic_points(posterior, latent)[:2]
    return all(_has_mirror(posterior, latent, size, params, before) for params, before in points)


def _has_mirror(
    posterior: LogPosterior, latent: str, size: int, params: Mapping[str, Tensor], before: LogJoint
) -> bool:
    """Return whether other parameters have the table of these with the first two components exchanged."""
    swap = torch.arange(size, device=posterior.device)
    swap[:2] = swap[:2].flip(0)
    table = before.rows.reshape(-1, *posterior.program.latent_sizes)
    table = table.index_select(posterior.program.latents.index(latent) + 1, swap).reshape(before.rows.shape)
    known = table.isfinite()
    scale = table[known].abs().max().clamp_min(1)
    supports = posterior.program.supports
    axes = {site: _candidates(supports[site], value.shape, size, 1)[0] for site, value in params.items()}
    start = permute(params, {site: own for site, own in axes.items() if own}, swap)
    if not all(bool(supports[site].check(value).all()) for site, value in start.items()):
        return False
    u = posterior.unconstrain({site: value[None] for site, value in start.items()})[0].requires_grad_()
    search = torch.optim.LBFGS(
        [u], max_iter=SEARCH_STEPS, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def distance() -> Tensor:
        search.zero_grad()
        found = log_joint_table(posterior.model, posterior.program, posterior.coordinates(u), *posterior.args)
        squares = ((found.rows[known] - table[known]) / scale).square().mean()
        squares.backward()
        return squares

    try:
        with torch.enable_grad(), pyro.validation_enabled(False):
            search.step(distance)
    except (RuntimeError, ValueError):  # it left the points at which the program can be run
        return False
    if not u.isfinite().all():
        return False
    after = posterior.log_joint(posterior.coordinates(u.detach()))
    prior = float(before.log_prior)
    close = abs(float(after.log_prior) - prior) <= FOUND * max(1, abs(prior))
    return close and bool(((after.rows[known] - table[known]).abs() <= FOUND * scale).all())


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
    after = posterior.log_joint({site: params[sources.get(site, site)] for site in params})
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


def permute(
    params: Mapping[str, Tensor], axes: Mapping[str, tuple[int, ...]], permutation: Tensor
) -> dict[str, Tensor]:
    """Return parameters, a value a site, renumbered: component j is the one that was number permutation[j], (K,)."""
    found = dict(params)
    for site, own in axes.items():
        for axis in own:
            found[site] = found[site].index_select(axis, permutation)
    return found


def _candidates(support: constraints.Constraint, shape: torch.Size, size: int, most: int) -> list[tuple[int, ...]]:
    """Return the axes of a value, ``most`` of them or fewer, that may number the components, the likeliest first.

    Rows and columns of a matrix are one index, and permuting one of the two leaves a symmetric matrix not symmetric.
    """
    size_of_event = base_of(support).event_dim
    num_axes = len(shape) - (size_of_event if size_of_event > 1 else 0)
    axes = [axis for axis in range(num_axes) if shape[axis] == size]
    return [own for number in range(most, -1, -1) for own in itertools.combinations(axes, number)]


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
        joint = posterior.log_joint(point)
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


def _symmetries(
    posterior: LogPosterior,
    latents: tuple[str, ...],
    params: Mapping[str, Tensor],
    before: LogJoint,
    axes: Mapping[str, tuple[int, ...]],
    permutation: Tensor,
) -> tuple[bool, bool]:
    """Return whether renumbering the axes renumbers the latents in the table, and leaves the prior as it is."""
    renumbered = permute(params, axes, permutation)
    after = posterior.log_joint(renumbered)
    table = before.rows.reshape(-1, *posterior.program.latent_sizes)
    for latent in latents:
        table = table.index_select(posterior.program.latents.index(latent) + 1, permutation)
    table = table.reshape(before.rows.shape)
    supported = all(bool(posterior.program.supports[site].check(renumbered[site]).all()) for site in axes)
    return _equal(after.rows, table), supported and _equal(after.log_prior, before.log_prior)


def _equal(left: Tensor, right: Tensor) -> bool:
    """Whether two results of the same sums in another order agree: each rounds by a few eps of its largest terms."""
    scale = float(right[right.isfinite()].abs().max())
    atol = ROUNDINGS * torch.finfo(left.dtype).eps * max(scale, 1)
    return torch.allclose(left, right, rtol=0, atol=atol, equal_nan=True)
