"""Importance sampling: a proposal of heavy tails fitted to draws, and what its weights say of a density's integral."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from mixproof.inference.verification.moments import ROUNDING, without_skewness
from mixproof.inference.verification.report import Check

NUM_CLUSTERS = 8


def proposal(
    pilot: Tensor, num_samples: int, generator: torch.Generator, *, columns: Sequence[Any] | None = None
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return a normalised log density of heavy tails that is fitted to a pilot (N, D), and points (M, D) drawn from it.

    It mixes laws fitted to clusters of the draws with a wide law over all of them. The continuous columns of a cluster
    are Student laws of five degrees of freedom, those of the wide law are Cauchy; discrete columns and columns with
    atoms are independent of the others within a cluster. ``columns`` is that of ``fitting_columns``.
    """
    columns = ["continuous"] * pilot.shape[1] if columns is None else columns
    smooth = [j for j, column in enumerate(columns) if isinstance(column, str) and column == "continuous"]
    others = [j for j in range(len(columns)) if j not in smooth]
    dim = len(smooth)
    spread = pilot.std(0)
    spread = torch.where(spread > 0, spread, 1.0)
    middle = pilot.median(0).values
    y = (pilot - middle) / spread
    centers = y[torch.randperm(len(y), generator=generator)[:NUM_CLUSTERS]]
    for _ in range(10):  # Lloyd's algorithm; an emptied cluster keeps its center
        labels = torch.cdist(y, centers).argmin(1)
        counts = torch.bincount(labels, minlength=len(centers)).double()
        sums = torch.zeros_like(centers).index_add(0, labels, y)
        centers = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), centers)
    y, centers, middle, spread = y[:, smooth], centers[:, smooth], middle[smooth], spread[smooth]
    everywhere = torch.atleast_2d(y.T.cov()).reshape(dim, dim)
    prior = dim + 2.0  # as many pseudo-draws from the whole keep a small cluster's covariance proper
    parts = [y[labels == k] - centers[k] for k in range(len(centers))]
    inflate = 1 + 1 / max(dim, 1)
    scatter = [inflate * (part.T @ part + 0.1 * prior * everywhere) / (len(part) + prior) for part in parts]
    factors = torch.linalg.cholesky(torch.stack([*scatter, everywhere]) + 1e-9 * torch.eye(dim, dtype=torch.float64))
    locs = torch.cat([centers, torch.zeros(1, dim, dtype=torch.float64)])
    inverses = torch.linalg.inv(factors)
    freedom = torch.tensor([5] * len(centers) + [1])
    shares = torch.tensor([max(len(part) / len(y), 0.01) for part in parts], dtype=torch.float64)
    shares = torch.cat([0.9 * shares / shares.sum(), torch.tensor([0.1], dtype=torch.float64)])
    rows = [labels == k for k in range(len(centers))]
    wide = 0.1 / max(len(others), 1)
    columnwise = [{j: Marginal(pilot[row, j], pilot[:, j], columns[j], wide) for j in others} for row in rows] + [
        {j: Marginal(pilot[:, j], pilot[:, j], columns[j], 0.5) for j in others}
    ]

    def log_density(x: Tensor) -> Tensor:
        y = (x[:, smooth] - middle) / spread
        terms = []
        for k, (loc, inverse, f) in enumerate(zip(locs, inverses, freedom.tolist(), strict=True)):
            distance = ((y - loc) @ inverse.T).square().sum(1)
            constant = math.lgamma((f + dim) / 2) - math.lgamma(f / 2) - dim / 2 * math.log(f * math.pi)
            log_det = -inverse.diagonal().log().sum()
            term = shares[k].log() + constant - log_det - (f + dim) / 2 * torch.log1p(distance / f)
            terms.append(sum((law.log_prob(x[:, j]) for j, law in columnwise[k].items()), term))
        return torch.stack(terms).logsumexp(0) - spread.log().sum()

    which = torch.multinomial(shares, num_samples, replacement=True, generator=generator)
    normal = torch.randn(num_samples, dim, generator=generator, dtype=torch.float64)
    # chi-square of f degrees as a sum of f squares: torch's gamma sampler takes no generator
    squares = torch.randn(num_samples, 5, generator=generator, dtype=torch.float64).square().cumsum(1)
    chi2 = squares.gather(1, freedom[which, None] - 1).squeeze(1)
    steps = torch.empty_like(normal)
    for k in range(len(locs)):
        steps[which == k] = normal[which == k] @ factors[k].T
    points = torch.empty(num_samples, len(columns), dtype=torch.float64)
    points[:, smooth] = (locs[which] + steps * (freedom[which] / chi2).sqrt()[:, None]) * spread + middle
    for k, laws in enumerate(columnwise):
        for j, law in laws.items():
            points[which == k, j] = law.sample(int((which == k).sum()), generator)
    return log_density, points


class Marginal:
    """A law of heavy tails for one discrete column, or one with atoms, fitted to a cluster of its values.

    It is a table of the frequencies of the single values, or a Student law of five degrees of freedom where most
    values are rare, and a Cauchy law over the whole column, with a small share. On whole numbers both laws are
    rounded.
    """

    def __init__(self, values: Tensor, column: Tensor, kind: Any, wide: float):
        """Fit to the values (N,) of a cluster, given all values (M,) of the column, and the share of the wide law."""
        self.is_discrete = isinstance(kind, str)
        if self.is_discrete:
            low, high = int(column.min()) - 1, int(column.max()) + 1
            self.atoms = torch.arange(low, high + 1, dtype=torch.float64)
            if len(self.atoms) > max(len(values) / 8, 8):
                self.atoms = self.atoms[:0]
            rest, everything, pseudo = values, column, 0.0
        else:
            self.atoms = kind
            rest = values[~torch.isin(values, kind)]
            everything = column[~torch.isin(column, kind)]
            pseudo = len(rest) + 0.5
        counts = _counts(values, self.atoms)
        total = counts.sum() + pseudo
        body = 1.0 if not len(self.atoms) else float(pseudo / total)
        table = counts / total if len(self.atoms) else counts
        # on whole numbers the wide law covers what the table leaves out; beside atoms it shares their complement
        self.table = (1 - wide) * table if self.is_discrete else table
        self.shares = (body * (1 - wide), wide if self.is_discrete else body * wide)
        everything = everything if len(everything) > 1 else torch.tensor([-1.0, 1.0], dtype=torch.float64)
        rest = rest if len(rest) > 1 else everything
        smallest = 0.5 if self.is_discrete else 1e-3 * float(everything.std())
        self.laws = (
            (stats.t(5), float(rest.mean()), max(float(rest.std()), smallest)),
            (stats.cauchy, float(everything.median()), max(float(everything.std()), smallest)),
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density of values (N,)."""
        found = torch.zeros_like(x)
        for share, (law, loc, scale) in zip(self.shares, self.laws, strict=True):
            if share == 0:
                continue
            below = -((x - loc) / scale).abs().numpy()  # both laws are symmetric, and exact in their lower tail
            if self.is_discrete:
                height = law.cdf(below + 0.5 / scale) - law.cdf(below - 0.5 / scale)
            else:
                height = law.pdf(below) / scale
            found = found + share * torch.as_tensor(height)
        if len(self.atoms):
            place = torch.searchsorted(self.atoms, x.contiguous()).clamp(max=len(self.atoms) - 1)
            here = self.atoms[place] == x
            at_atom = self.table[place] + (found if self.is_discrete else 0.0)
            found = torch.where(here, at_atom, found)
        return found.log()

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Return independent draws (N,)."""
        chances = torch.cat([self.table, torch.tensor(self.shares, dtype=torch.float64)])
        which = torch.multinomial(chances, num_samples, replacement=True, generator=generator)
        uniform = torch.rand(num_samples, generator=generator, dtype=torch.float64).clamp(min=2.0**-60).numpy()
        drawn = torch.cat([self.atoms, torch.zeros(2, dtype=torch.float64)])[which]
        for k, (law, loc, scale) in enumerate(self.laws):
            chosen = which == len(self.atoms) + k
            values = loc + scale * torch.as_tensor(law.ppf(uniform[chosen.numpy()]))
            drawn[chosen] = values.round() if self.is_discrete else values
        return drawn


def _counts(values: Tensor, atoms: Tensor) -> Tensor:
    """Return how often each of some sorted numbers (M,) is among values (N,), and a half."""
    if not len(atoms):
        return torch.zeros(0, dtype=torch.float64)
    place = torch.searchsorted(atoms, values.contiguous()).clamp(max=len(atoms) - 1)
    return torch.bincount(place[atoms[place] == values], minlength=len(atoms)) + 0.5


def effective_size(log_weights: Tensor) -> float:
    """Return the number of equally weighted draws that are worth as much as the weighted ones, of log weights (N,)."""
    return float((2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp().nan_to_num(0.0))


def sampled_integral(log_weights: Tensor, *, false_alarm: float) -> Check:
    """Test that importance weights, given by their logs (N,), average to one: that the density integrates to one."""
    name = "integrates to one, by sampling"
    weights = log_weights.exp()
    if not weights.isfinite().all():
        where = {"log weight": log_weights[~weights.isfinite()][0]}
        return Check(name, False, math.inf, 0.0, None, where, "the density is not finite")
    standard_error = float(weights.std() / len(weights) ** 0.5)
    error = abs(float(weights.mean()) - 1)
    p_value = float(error <= ROUNDING)
    if standard_error > 0:
        skewness = (weights - weights.mean()).pow(3).mean() / weights.std().pow(3)
        ratio = without_skewness((weights.mean() - 1) / standard_error, skewness / len(weights) ** 0.5)
        p_value = float(2 * stats.t.sf(float(ratio.abs()), len(weights) - 1))
    passed = p_value >= false_alarm
    found = {"integral": float(weights.mean()), "standard error": standard_error, "claimed": 1.0}
    tolerance = float(stats.norm.isf(false_alarm / 2)) * standard_error
    detail = f"{len(weights)} draws, worth {effective_size(log_weights):.0f}"
    return Check(name, passed, error, tolerance, p_value, None if passed else found, detail)
