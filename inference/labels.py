"""Labels of mixture components: which axes of the parameters they number, and how their numberings are made to agree.

A density of exchangeable components is the same under all K! numberings of them, so that draws of one component's
parameters describe that component only after the numberings of all draws have been made to agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.enumeration import LogJoint, log_joint_table
from mixproof.inference.log_posterior import LogPosterior


def component_axes(posterior: LogPosterior, latent: str | None = None) -> dict[str, int]:
    """Return which axis of each parameter numbers the exchangeable components of a program.

    It is measured at points that nothing singles out: permuting these axes together must permute the values of the
    latent in the table of log p(x_n, z_n | params), and leave log p(params) as it is. A cycle and a transposition are
    tried, which generate all K! permutations.

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
    latent = latent_site(posterior, latent)
    size = posterior.program.latent_sizes[posterior.program.latents.index(latent)]
    points = [(params, _log_joint(posterior, params)) for params in _generic_points(posterior)]
    sites = {site: value.shape for site, value in points[0][0].items()}
    options = [_candidates(posterior.program.supports[site], shape, size) for site, shape in sites.items()]
    numbers = torch.arange(size)
    permutations = [numbers.roll(1), torch.cat([numbers[:2].flip(0), numbers[2:]])]
    prior_is_the_obstacle = False
    for choice in itertools.product(*options):
        axes = {site: axis for site, axis in zip(sites, choice, strict=True) if axis is not None}
        outcomes = (
            _symmetries(posterior, latent, params, before, axes, permutation)
            for params, before in points
            for permutation in permutations
        )
        of_likelihood, of_prior = True, True
        for likelihood, prior in outcomes:
            of_likelihood, of_prior = of_likelihood and likelihood, of_prior and prior
            if not of_likelihood:
                break
        if of_likelihood and of_prior:
            return axes
        prior_is_the_obstacle |= of_likelihood
    reason = (
        "the prior or a support tells them apart, so that each has a name of its own"
        if prior_is_the_obstacle
        else f"no choice of axes of length {size} permutes them in the log joint density of the rows"
    )
    raise ValueError(f"the {size} components that {latent} counts are not exchangeable: {reason}")


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


def permute(params: Mapping[str, Tensor], axes: Mapping[str, int], permutation: Tensor) -> dict[str, Tensor]:
    """Return parameters, a value a site, renumbered: component j is the one that was number permutation[j], (K,)."""
    return {
        site: value.index_select(axes[site], permutation) if site in axes else value for site, value in params.items()
    }


def _candidates(support: constraints.Constraint, shape: torch.Size, size: int) -> list[int | None]:
    """Return the axes of a value that may number the components, the first the likeliest, and None for no axis.

    Rows and columns of a matrix are one index, and permuting one of the two leaves a symmetric matrix not symmetric.
    """
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    num_axes = len(shape) - (support.event_dim if support.event_dim > 1 else 0)
    return [*(axis for axis in range(num_axes) if shape[axis] == size), None]


def _generic_points(posterior: LogPosterior) -> list[dict[str, Tensor]]:
    """Return parameters at three points, by fractional parts of multiples of irrational numbers, which none repeats."""
    multiples = torch.arange(1, posterior.size + 1, dtype=torch.float64)
    u = torch.stack([(multiples * root).frac() - 0.5 for root in (2**0.5, 3**0.5, 5**0.5)])
    params = posterior.constrain(u)
    return [{site: value[i] for site, value in params.items()} for i in range(len(u))]


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
    """Whether two results of the same sums in another order agree: both round, each by far less than eps^(3/4)."""
    rounding = torch.finfo(left.dtype).eps ** 0.75
    scale = float(right[right.isfinite()].abs().max()) if right.isfinite().any() else 0.0
    return torch.allclose(left, right, rtol=0, atol=rounding * max(scale, 1), equal_nan=True)
