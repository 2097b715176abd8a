"""Missing values: rows grouped by their observed entries, and what a Gaussian says of the others.

A NaN is an entry that was not recorded, and it was not for a reason that the value itself decides (missing at random,
Little and Rubin, Statistical Analysis with Missing Data, 3rd edition, section 1.3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mixproof.models.positive_definite import cholesky, outer


class Pattern(NamedTuple):
    """The rows that have the same entries observed."""

    rows: Tensor  # (n,), their numbers
    observed: Tensor  # (D_o,), the numbers of their observed features


def patterns(x: Tensor) -> list[Pattern]:
    """Return the patterns of missingness of x (N, D), in which NaN is missing; each row is in one."""
    masks, pattern, sizes = torch.unique(~x.isnan(), dim=0, return_inverse=True, return_counts=True)
    rows = pattern.argsort().split(sizes.tolist())
    return [Pattern(own, mask.nonzero().flatten()) for own, mask in zip(rows, masks, strict=True)]


def in_row_order(pieces: list[Tensor], groups: list[Pattern]) -> Tensor:
    """Return one tensor (..., N, m) from a piece (..., n, m) for the rows of each pattern."""
    return torch.cat(pieces, -2)[..., torch.cat([group.rows for group in groups]).argsort(), :]


def expected_deviations(locs: Tensor, covariances: Tensor, x: Tensor, resp: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the first two moments of rows about the components' locs, given what is observed of each.

    .. math::
        \mathbb{E}[x_m \mid x_o] = \mu_m + \Sigma_{mo} \Sigma_{oo}^{-1} (x_o - \mu_o), \qquad
        \mathrm{Cov}[x_m \mid x_o] = \Sigma_{mm} - \Sigma_{mo} \Sigma_{oo}^{-1} \Sigma_{om}

    Ghahramani and Jordan 1994, Supervised learning from incomplete data via an EM approach, section 3.

    Args:
        locs: (K, D).
        covariances: (K, D, D), or (1, D, D) for one that all components share.
        x: (N, D), in which NaN is missing.
        resp: (N, K), responsibilities.

    Returns:
        E[x_n | observed, z_n = k] - loc_k, shape (K, N, D), and the sum over rows of r_nk Cov[x_n | observed, z_n = k],
        shape (K, D, D); the covariance is 0 wherever an entry is observed.
    """
    deviations = x - locs[..., None, :]  # (K, N, D), NaN where x is
    groups = patterns(x)
    expected, remaining = [], torch.zeros_like(covariances)
    for rows, observed in groups:
        missing = x[rows[0]].isnan()
        factors = cholesky(covariances[..., observed[:, None], observed])
        halves = torch.linalg.solve_triangular(factors, covariances[..., observed, :], upper=False)  # L^-1 Sigma_o.
        whitened = torch.linalg.solve_triangular(factors, deviations[..., rows[:, None], observed].mT, upper=False)
        expected.append(torch.where(missing, whitened.mT @ halves, deviations[..., rows, :]))
        covariance = torch.where(outer(missing), covariances - halves.mT @ halves, 0)
        remaining = remaining + resp[..., rows, :].sum(-2)[..., None, None] * covariance
    return in_row_order(expected, groups), remaining
