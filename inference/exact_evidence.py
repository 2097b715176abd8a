"""The evidence and the posterior of a mixture of few rows, exactly: a sum over all K^N allocations of rows.

Given the allocation z the parameters integrate out in closed form, p(x) = sum_z p(x, z) (Nobile and Fearnside 2007,
Statistics and Computing 17, section 2). Every approximation can be held against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixproof.inference.trees import tree_expand
from mixproof.inference.validation import (
    about_mean,
    check_num_components,
    check_proper_prior,
    check_rows,
    example_params,
)

MAX_ALLOCATIONS = 2**22
"""How many allocations are summed at most: a few seconds to a minute. The log joints take 32 MB; the allocations
themselves, which only ``exact_posterior`` keeps, 8 N times as many bytes as there are."""
AT_ONCE = 2**13


class ExactPosterior(NamedTuple):
    """p(z | x) of all A = K^N allocations z, the parameters integrated out."""

    log_evidence: Tensor
    """(), log p(x)."""
    allocations: Tensor
    """(A, N), the component of each row, all K^N of them."""
    probs: Tensor
    """(A,), p(z | x)."""

    @property
    def coclustering(self) -> Tensor:
        """(N, N), the probability that two rows are of the same component, whatever the components are called."""
        together = self.probs.new_zeros(2 * self.allocations.shape[1:])
        for z, probs in zip(self.allocations.split(AT_ONCE), self.probs.split(AT_ONCE), strict=True):
            together += torch.einsum("a,aij->ij", probs, (z[:, :, None] == z[:, None]).to(probs))
        return together


def exact_log_evidence(family: Any, x: Any, prior: Any, *, num_components: int) -> Tensor:
    """Return log p(x), (), by summing over all K^N allocations of the rows.

    Args:
        family: a family of the contract that has ``log_marginal``.
        x: (N, D), so few rows that K^N is at most 2^22; the computation is in float64.
        prior: the family's ``Prior``.
        num_components: K.

    Raises:
        TypeError, ValueError: as ``exact_posterior``.
    """
    log_joints = [log_joint for log_joint, _ in _allocations(family, x, prior, num_components)]
    return torch.cat(log_joints).logsumexp(0)


def exact_posterior(family: Any, x: Any, prior: Any, *, num_components: int) -> ExactPosterior:
    """Return the evidence, and the posterior over all K^N allocations of the rows to components.

    Args:
        family: a family of the contract that has ``log_marginal``.
        x: (N, D), so few rows that K^N is at most 2^22; the computation is in float64.
        prior: the family's ``Prior``.
        num_components: K.

    Raises:
        TypeError: the family has no ``log_marginal``, or an argument is of another type.
        ValueError: the data or the prior are not what they must be, the prior is None, or K^N is above 2^22.
    """
    log_joint, allocations = map(torch.cat, zip(*_allocations(family, x, prior, num_components), strict=True))
    log_evidence = log_joint.logsumexp(0)
    return ExactPosterior(log_evidence, allocations, (log_joint - log_evidence).exp())


def exact_draws(
    family: Any, x: Any, prior: Any, *, num_components: int, num_draws: int, generator: torch.Generator
) -> Any:
    """Return independent draws from p(params | x): an allocation from its exact posterior, and parameters given it.

    Args:
        family: a family of the contract that has ``log_marginal``.
        x: (N, D), so few rows that K^N is at most 2^22; the computation is in float64.
        prior: the family's ``Prior``.
        num_components: K.
        num_draws: S.
        generator: the only source of randomness.

    Returns:
        The family's ``Params``, each field (S, ...).

    Raises:
        TypeError, ValueError: as ``exact_posterior``.
    """
    x = check_rows(family, x).to(torch.float64)
    posterior = exact_posterior(family, x, prior, num_components=num_components)
    chosen = torch.multinomial(posterior.probs, num_draws, replacement=True, generator=generator)
    template, _ = example_params(family, num_components, x)
    params = tree_expand(about_mean(template, x), num_draws)
    stats = family.statistics(params, x, _one_hot(posterior.allocations[chosen], num_components, x))
    return family.draw(params, stats, check_proper_prior(family, prior, template), generator)


def _allocations(family: Any, x: Any, prior: Any, num_components: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all allocations in chunks: log p(x, z), (C,), and z (C, N)."""
    if not hasattr(family, "log_marginal"):
        raise TypeError(
            "this family has no log_marginal(stats, prior): its rows are not complete once their components are known, "
            "and its parameters do not integrate out. Use log_evidence, which approximates"
        )
    size: Any = check_num_components(family, num_components)
    x = check_rows(family, x).to(torch.float64)
    if size ** len(x) > MAX_ALLOCATIONS:
        raise ValueError(
            f"{size} components and {len(x)} rows have {size ** len(x):.3g} allocations, above {MAX_ALLOCATIONS}: take "
            "fewer rows, or approximate by log_evidence"
        )
    params, _ = example_params(family, size, x)
    prior = check_proper_prior(family, prior, params)
    powers = size ** torch.arange(len(x), device=x.device)
    for numbers in torch.arange(size ** len(x), device=x.device).split(AT_ONCE):
        z = numbers[:, None] // powers % size
        batch = tree_expand(about_mean(params, x), len(z))
        yield family.log_marginal(family.statistics(batch, x, _one_hot(z, size, x)), prior), z


def _one_hot(z: Tensor, num_components: int, like: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(z, num_components).to(like)
