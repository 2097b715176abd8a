"""Labels of mixture components: how the numberings of all draws are made to agree.

A density of exchangeable components is the same under all K! numberings of them, so that draws of one component's
parameters describe that component only after the numberings of all draws have been made to agree. What does not depend
on the numbering needs none of this: ``at_draws.label_invariant``.
"""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference.at_draws import responsibilities
from mixproof.inference.draws import Draws
from mixproof.inference.exchangeability import component_axes, latent_site, numbering
from mixproof.inference.log_posterior import LogPosterior


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
    convergence by ``label_invariant`` quantities. Components that the prior tells apart keep their numbers.

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
        ValueError: no two components are exchangeable, or a setting is not what it must be.
    """
    if method not in ("stephens", "equivalence"):
        raise ValueError(f'method must be "stephens" or "equivalence", not {method!r}')
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, not {max_iterations}")
    latent = latent_site(posterior, latent)
    found = numbering(posterior, latent)
    axes = found.axes if found.some_exchangeable else None
    axes = axes or component_axes(posterior, latent)  # which says why there are none
    classes = torch.tensor(found.classes, device=posterior.device)
    resp = responsibilities(posterior, draws.params, latent).flatten(0, 1)
    lp = draws.sample_stats["lp"]
    permutations, iterations = _agree(resp, classes, int(lp.argmax()), method, max_iterations)
    values, counts = permutations.unique(dim=0, return_counts=True)
    permutations = permutations[:, values[counts.argmax()].argsort()]  # the numbering of most draws is the one kept
    moved = (permutations != torch.arange(permutations.shape[1], device=permutations.device)).any(1)
    by_chain = permutations.unflatten(0, lp.shape)
    params = {site: renumber(value, by_chain, axes.get(site, ())) for site, value in draws.params.items()}
    report = {"": method, "_share": float(moved.double().mean()), "_iterations": iterations}
    attributes = draws.attributes | {
        f"relabelled_{each}{name}": value for each in found.latents for name, value in report.items()
    }
    return Draws(params, draws.sample_stats, attributes)


def assign(agreement: Tensor) -> Tensor:
    """Return the permutations (S, K) that maximise agreement (S, K, K), of a summary's component j and the draw's k.

    Component j of the renumbered draw is the one that was number permutation[j].
    """
    found = [linear_sum_assignment(scores, maximize=True)[1] for scores in agreement.cpu().numpy()]
    return torch.as_tensor(np.stack(found), device=agreement.device)


def renumber(value: Tensor, permutations: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return draws (C, S, *shape) with axes of the shape renumbered by permutations (C, S, K)."""
    for axis in axes:
        shape = [1] * (value.ndim - 2)
        shape[axis] = permutations.shape[-1]
        value = value.take_along_dim(permutations.reshape(*permutations.shape[:2], *shape), dim=axis + 2)
    return value


def _agree(resp: Tensor, classes: Tensor, pivot: int, method: str, max_iterations: int) -> tuple[Tensor, int]:
    """Return permutations (S, K) within classes (K,) that make responsibilities (S, N, K) agree, and after how many
    repetitions."""
    size = resp.shape[-1]
    average = resp[pivot]
    certain = torch.nn.functional.one_hot(resp.argmax(-1), size).to(resp) if method == "equivalence" else resp
    permutations = torch.arange(size, device=resp.device).expand(len(resp), size)
    for iteration in range(1, max_iterations + 1):
        if method == "equivalence":
            target = torch.nn.functional.one_hot(average.argmax(-1), size).to(resp)
        else:  # sum p log p is the same under all permutations, so that - sum p log q remains of the divergence
            target = average.clamp_min(torch.finfo(average.dtype).tiny).log()
        agreement = (target.mT @ certain).masked_fill(classes != classes[:, None], -torch.inf)
        before, permutations = permutations, assign(agreement)
        if iteration > 1 and torch.equal(before, permutations):
            return permutations, iteration
        average = resp.take_along_dim(permutations[:, None], dim=-1).mean(0)
    warnings.warn(
        f"the numberings still changed after {max_iterations} repetitions: raise max_iterations",
        ConvergenceWarning,
        stacklevel=3,
    )
    return permutations, max_iterations
