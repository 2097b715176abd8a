"""Densities: one integrates to one, and agrees with the sampler of the same law.

A finite support is summed exactly. On the line and in the plane a grid is summed, with the error read off from coarser
grids within it. In any dimension the integral is a Monte Carlo average under a proposal of heavy tails, fitted to a
pilot sample; the same proposal gives expectations of bounded functions, which are compared with those of the sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from mixproof.inference.verification.moments import Sampler, draw
from mixproof.inference.verification.report import Check, Report, asserting, conclude

LogProb = Callable[[Tensor], Tensor]
ROUNDING = 2.0**10 * torch.finfo(torch.float64).eps
NUM_SAMPLES = 2**16
NUM_CLUSTERS = 8
NUM_PILOT = 2**14
SMALLEST_EFFECTIVE_SIZE = 5000
GRID = {1: 2**16, 2: 2**9}
SMALLEST_CELL = 10.0
COARSE = 2.0**-7


class DensityError(ValueError):
    """A log density raised at some points (N, D), or returned something other than (N,)."""

    def __init__(self, message: str, points: Tensor):
        super().__init__(message)
        self.points = points


def verify_density(
    log_prob: LogProb,
    sample: Sampler,
    *,
    support: Tensor | None = None,
    seed: int,
    false_alarm: float = 1e-6,
    num_samples: int = NUM_SAMPLES,
    subject: str | None = None,
) -> Report:
    """Try to refute that a log density is normalised and belongs to a sampler.

    Args:
        log_prob: of points (N, D) returns their log densities (N,), or log probabilities on a finite support.
        sample: ``sample(num_samples, generator)`` returns independent draws (N, D), or (N,) for a law on the line.
        support: all points (M, D) of a finite support; None for a density on R^D, which must be minus infinity (not an
            error) where it vanishes.
        seed: of the draws.
        false_alarm: the probability of refuting a right claim, shared by the checks.
        num_samples: how many draws of the sampler, and how many of the proposal.
        subject: the claim in words, for the report.

    Returns:
        A report; undecided where the sampler is not finite, or the proposal covers too little of the density.

    Raises:
        ValueError: the support has repeated points, or the sampler does not return (N, D).
    """
    subject = subject or "the density"
    generator = torch.Generator().manual_seed(seed)
    pilot = draw(sample, NUM_PILOT, generator)  # apart, so that what is fitted to it is independent of the draws
    draws = draw(sample, num_samples, generator)
    if not (pilot.isfinite().all() and draws.isfinite().all()):
        nan = float("nan")
        return conclude(subject, [Check("finite draws", False, nan, nan, detail="the sampler is not finite")], seed)
    try:
        support = None if support is None else support.reshape(len(support), -1).to(torch.float64)
        if support is not None:
            checks = [
                sums_to_one(log_prob, support),
                frequencies_agree(log_prob, draws, support, false_alarm=false_alarm),
            ]
            return conclude(subject, checks, seed)
        checks = [grid_integral(log_prob, draws)] if draws.shape[1] in GRID else []
        log_proposal, points = proposal(pilot, num_samples, generator)
        log_weights = heights(log_prob, points) - log_proposal(points)
        checks.append(bridge(heights(log_prob, draws) - log_proposal(draws), log_weights, false_alarm=false_alarm / 3))
    except DensityError as error:
        failed = Check("log_prob", False, float("nan"), 0.0, counterexample={"points": error.points}, detail=str(error))
        return conclude(subject, [failed], seed)
    effective = effective_size(log_weights)
    if effective < SMALLEST_EFFECTIVE_SIZE:
        detail = f"the proposal's draws are worth only {effective:.0f}: law and normalisation were not tested apart"
        checks[-1] = checks[-1]._replace(detail=detail)
    else:
        checks.append(sampled_integral(log_weights, false_alarm=false_alarm / 3))
        checks.append(
            expectations_agree(pilot, draws, points, log_weights, generator=generator, false_alarm=false_alarm / 3)
        )
    return conclude(subject, checks, seed)


def sums_to_one(log_prob: LogProb, support: Tensor) -> Check:
    """Check that the probabilities of all points (M, D) of a finite support sum to one, to rounding."""
    total = float(heights(log_prob, support).exp().sum())
    passed = abs(total - 1) <= ROUNDING
    return Check(
        "sums to one", passed, abs(total - 1), ROUNDING, None, None if passed else {"sum": total, "claimed": 1.0}
    )


def frequencies_agree(log_prob: LogProb, draws: Tensor, support: Tensor, *, false_alarm: float) -> Check:
    """Test the frequencies of draws (N, D) on a finite support (M, D), by Pearson's chi-square, sparse cells pooled."""
    name = "agrees with its sampler"
    cells, index = torch.unique(torch.cat([support, draws]), dim=0, return_inverse=True)
    places, where = index[: len(support)], index[len(support) :]
    if len(places.unique()) < len(support):
        raise ValueError("the support has repeated points")
    probs = torch.zeros(len(cells), dtype=torch.float64)
    probs[places] = heights(log_prob, support).exp()
    counts = torch.bincount(where, minlength=len(cells)).to(torch.float64)
    impossible = (probs == 0) & (counts > 0)
    if impossible.any():
        found = {"draw": cells[impossible][0], "times": int(counts[impossible][0]), "claimed probability": 0.0}
        return Check(name, False, math.inf, 0.0, 0.0, found, "a draw that is impossible under the claimed law")
    kept = probs > 0
    expected = probs[kept] / probs.sum() * len(draws)
    order = expected.argsort()
    expected, counts, cells = expected[order], counts[kept][order], cells[kept][order]
    first = min(int((expected.cumsum(0) < SMALLEST_CELL).sum()), len(expected) - 1)
    sparse = slice(0, first + 1)
    pooled = torch.cat([expected[sparse].sum()[None], expected[first + 1 :]])
    seen = torch.cat([counts[sparse].sum()[None], counts[first + 1 :]])
    terms = (seen - pooled).square() / pooled
    degrees = len(pooled) - 1
    p_value = float(stats.chi2.sf(float(terms.sum()), degrees)) if degrees else 1.0
    passed = p_value >= false_alarm
    worst = first + int(terms.argmax())
    found = {"point": cells[worst], "expected": float(expected[worst]), "drawn": float(counts[worst])}
    error = float((seen - pooled).abs().sum() / 2 / len(draws))
    tolerance = float(0.5 * (stats.chi2.isf(false_alarm, max(degrees, 1)) / len(draws)) ** 0.5)
    detail = f"chi-square {float(terms.sum()):.4g} on {degrees} degrees of freedom, error in total variation"
    return Check(name, passed, error, tolerance, p_value, None if passed else found, detail)


def grid_integral(log_prob: LogProb, draws: Tensor) -> Check:
    """Check that a density on the line or in the plane integrates to one, on a grid about draws (N, D), D <= 2.

    The box is the range of the draws, widened by itself on each side. The tolerance is what the grid can resolve: how
    far the sums over the coarser grids inside it differ, and the mass in the outer half of the widening, of which less
    lies beyond it. A grid that resolves less than ``COARSE`` says nothing, and passes with an infinite tolerance.
    """
    dim = draws.shape[1]
    size = GRID[dim]
    low, high = draws.amin(0), draws.amax(0)
    width = high - low
    axes = [
        torch.linspace(0, 1, size + 1, dtype=torch.float64)[:-1] * 3 * w + lo - w
        for lo, w in zip(low, width, strict=True)
    ]
    points = torch.cartesian_prod(*axes).reshape(-1, dim)
    cell = float((3 * width / size).prod())
    mass = (heights(log_prob, points).exp() * cell).reshape((size,) * dim)
    total = float(mass.sum())
    if math.isnan(total):
        where = points[mass.flatten().isnan()][0]
        return Check("integrates to one on a grid", False, math.inf, 0.0, None, {"x": where, "density": float("nan")})
    halves = [float(mass[(slice(i, None, 2),) * dim].sum()) * 2**dim for i in range(2)]
    quarters = [float(mass[(slice(i, None, 4),) * dim].sum()) * 4**dim for i in range(4)]
    inner = slice(size // 6, size - size // 6)
    beyond = abs(total - float(mass[(inner,) * dim].sum()))
    resolution = 2 * max([abs(h - total) for h in halves] + [abs(q - total) / 4 for q in quarters])
    tolerance = resolution + beyond + ROUNDING
    error = abs(total - 1)
    tolerance = tolerance if tolerance < COARSE else math.inf
    passed = error <= tolerance
    return Check(
        "integrates to one on a grid",
        passed,
        error,
        tolerance,
        counterexample=None
        if passed
        else {"integral": total, "claimed": 1.0, "low": low - width, "high": high + width},
        detail="" if tolerance < COARSE else "the grid does not resolve this density: left to sampling",
    )


def proposal(pilot: Tensor, num_samples: int, generator: torch.Generator) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return a normalised log density of heavy tails that is fitted to a pilot (N, D), and points (M, D) drawn from it.

    It mixes Student laws of five degrees of freedom at clusters of the draws with a wide Cauchy law over all of them.
    """
    dim = pilot.shape[1]
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
    everywhere = torch.atleast_2d(y.T.cov())
    prior = dim + 2.0  # as many pseudo-draws from the whole keep a small cluster's covariance proper
    parts = [y[labels == k] - centers[k] for k in range(len(centers))]
    scatter = [(1 + 1 / dim) * (part.T @ part + 0.1 * prior * everywhere) / (len(part) + prior) for part in parts]
    factors = torch.linalg.cholesky(torch.stack([*scatter, everywhere]) + 1e-9 * torch.eye(dim, dtype=torch.float64))
    locs = torch.cat([centers, torch.zeros(1, dim, dtype=torch.float64)])
    inverses = torch.linalg.inv(factors)
    freedom = torch.tensor([5] * len(centers) + [1])
    shares = torch.tensor([max(len(part) / len(y), 0.01) for part in parts], dtype=torch.float64)
    shares = torch.cat([0.9 * shares / shares.sum(), torch.tensor([0.1], dtype=torch.float64)])

    def log_density(x: Tensor) -> Tensor:
        y = (x - middle) / spread
        terms = []
        for loc, inverse, f, share in zip(locs, inverses, freedom.tolist(), shares, strict=True):
            distance = ((y - loc) @ inverse.T).square().sum(1)
            constant = math.lgamma((f + dim) / 2) - math.lgamma(f / 2) - dim / 2 * math.log(f * math.pi)
            log_det = -inverse.diagonal().log().sum()
            terms.append(share.log() + constant - log_det - (f + dim) / 2 * torch.log1p(distance / f))
        return torch.stack(terms).logsumexp(0) - spread.log().sum()

    which = torch.multinomial(shares, num_samples, replacement=True, generator=generator)
    normal = torch.randn(num_samples, dim, generator=generator, dtype=torch.float64)
    # chi-square of f degrees as a sum of f squares: torch's gamma sampler takes no generator
    squares = torch.randn(num_samples, 5, generator=generator, dtype=torch.float64).square().cumsum(1)
    chi2 = squares.gather(1, freedom[which, None] - 1).squeeze(1)
    steps = torch.empty_like(normal)
    for k in range(len(locs)):
        steps[which == k] = normal[which == k] @ factors[k].T
    y = locs[which] + steps * (freedom[which] / chi2).sqrt()[:, None]
    return log_density, y * spread + middle


def bridge(log_ratios: Tensor, log_weights: Tensor, *, false_alarm: float) -> Check:
    """Test that a density p, normalised, is that of its sampler, against a proposal q in any dimension.

    The integral of p q / (p + q) is the sampler's expectation of q / (p + q) and the proposal's of p / (p + q). Both
    variables lie between 0 and 1, so that their errors are known however badly q fits (Meng and Wong, Statistica
    Sinica 6, 1996).

    Args:
        log_ratios: log p / q at the sampler's draws, (N,).
        log_weights: log p / q at the proposal's draws, (M,).
        false_alarm: the probability of refuting a right claim.
    """
    sampled, proposed = torch.sigmoid(-log_ratios), torch.sigmoid(log_weights)
    error = abs(float(sampled.mean() - proposed.mean()))
    standard_error = float((sampled.var() / len(sampled) + proposed.var() / len(proposed)).sqrt())
    p_value = float(2 * stats.norm.sf(error / standard_error)) if error > ROUNDING else 1.0
    passed = p_value >= false_alarm
    found = {"under the sampler": float(sampled.mean()), "under the density": float(proposed.mean())}
    tolerance = float(stats.norm.isf(false_alarm / 2)) * standard_error
    return Check("the sampler's density", passed, error, tolerance, p_value, None if passed else found)


def sampled_integral(log_weights: Tensor, *, false_alarm: float) -> Check:
    """Test that importance weights, given by their logs (N,), average to one: that the density integrates to one."""
    name = "integrates to one, by sampling"
    weights = log_weights.exp()
    if not weights.isfinite().all():
        where = {"log weight": log_weights[~weights.isfinite()][0]}
        return Check(name, False, math.inf, 0.0, None, where, "the density is not finite")
    standard_error = float(weights.std() / len(weights) ** 0.5)
    error = abs(float(weights.mean()) - 1)
    p_value = float(2 * stats.norm.sf(error / standard_error)) if standard_error > 0 else float(error <= ROUNDING)
    passed = p_value >= false_alarm
    found = {"integral": float(weights.mean()), "standard error": standard_error, "claimed": 1.0}
    tolerance = float(stats.norm.isf(false_alarm / 2)) * standard_error
    detail = f"{len(weights)} draws, worth {effective_size(log_weights):.0f}"
    return Check(name, passed, error, tolerance, p_value, None if passed else found, detail)


def expectations_agree(
    pilot: Tensor,
    draws: Tensor,
    points: Tensor,
    log_weights: Tensor,
    *,
    generator: torch.Generator,
    false_alarm: float,
    num_tests: int = 64,
) -> Check:
    """Test expectations of bounded functions under draws (N, D) against those under weighted points (M, D).

    The functions are indicators of random half-spaces and sines of random projections, at random places of a pilot
    sample.
    """
    name = "agrees with its sampler"
    weights = (log_weights - log_weights.max()).exp()
    total = float(weights.sum())
    spread = pilot.std(0)
    directions = torch.randn(draws.shape[1], num_tests, generator=generator, dtype=torch.float64)
    directions = directions / torch.where(spread > 0, spread, 1.0)[:, None]
    directions = directions / (pilot @ directions).std(0).clamp(min=torch.finfo(torch.float64).tiny)
    half = num_tests // 2
    places = pilot[torch.randint(len(pilot), (num_tests,), generator=generator)]
    thresholds = (places * directions.T).sum(1)
    frequencies = torch.rand(num_tests - half, generator=generator, dtype=torch.float64) * 4

    def functions(x: Tensor) -> Tensor:
        along = x @ directions - thresholds
        return torch.cat([(along[:, :half] > 0).to(torch.float64), (along[:, half:] * frequencies).sin()], 1)

    here, there = functions(draws), functions(points)
    sampled, computed = here.mean(0), weights @ there / total
    variance = here.var(0) / len(draws) + (weights.square() @ (there - computed).square()) / total**2
    error = (sampled - computed).abs()
    z = torch.where(error <= ROUNDING, 0.0, error / variance.sqrt())
    worst = int(z.argmax())
    p_value = min(1.0, 2 * num_tests * float(stats.norm.sf(float(z[worst]))))
    passed = p_value >= false_alarm
    kind = "P(a.x > c)" if worst < half else f"E sin({float(frequencies[worst - half]):.3g} (a.x - c))"
    where: dict[str, Any] = {
        "expectation": kind,
        "a": directions[:, worst],
        "c": float(thresholds[worst]),
        "under the density": float(computed[worst]),
        "under the sampler": float(sampled[worst]),
    }
    quantile = float(stats.norm.isf(false_alarm / num_tests / 2))
    tolerance = quantile * float(variance[worst].sqrt())
    detail = f"{num_tests} bounded functions"
    return Check(name, passed, float(error[worst]), tolerance, p_value, None if passed else where, detail)


def heights(log_prob: LogProb, points: Tensor) -> Tensor:
    """Return the log density at points (N, D) as float64 (N,).

    Raises:
        DensityError: the log density raises, or has another shape.
    """
    try:
        found = log_prob(points).detach().to(torch.float64)
    except Exception as error:
        raise DensityError(f"log_prob raised {type(error).__name__}: {error}", points[:7]) from error
    if found.shape != points.shape[:1]:
        message = f"log_prob of points {tuple(points.shape)} has shape {tuple(found.shape)}"
        raise DensityError(message, points[:7])
    return found


def effective_size(log_weights: Tensor) -> float:
    """Return the number of equally weighted draws that are worth as much as the weighted ones, of log weights (N,)."""
    return float((2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp().nan_to_num(0.0))


assert_density = asserting(verify_density)
