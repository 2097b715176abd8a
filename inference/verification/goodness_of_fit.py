"""Goodness of fit: tests of draws against the probabilities, the density or the distribution function of their law."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from scipy import stats
from torch import Tensor
from torch.nn.functional import logsigmoid as log_sigmoid

from mixproof.inference.verification.importance import effective_size
from mixproof.inference.verification.moments import ROUNDING
from mixproof.inference.verification.quadrature import LogProb, heights
from mixproof.inference.verification.report import Check

SMALLEST_CELL = 10.0
"""How many draws a cell is expected to hold at least; sparser cells are pooled."""
SMALLEST_TAIL = 100.0
"""How many draws beyond a threshold are expected at least, so that their number is close to normal."""


def frequencies_agree(
    log_prob: LogProb, draws: Tensor, support: Tensor, *, complete: bool = True, false_alarm: float
) -> Check:
    """Test the frequencies of draws on a finite support by their deviance, sparse cells pooled.

    Far in its tail, where few false alarms are allowed, the deviance 2 sum O log(O / E) keeps close to chi-square at
    cells that expect few draws, and Pearson's statistic does not; its mean is corrected (Williams, Biometrika 63,
    1976).

    Args:
        log_prob: of points (M, D) returns their log probabilities (M,).
        draws: (N, D), from the sampler.
        support: points (M, D), none of them twice.
        complete: whether these are all points. If not, they must not come from the same draws; all other points are
            then one more cell.
        false_alarm: the probability of refuting a right claim.

    Raises:
        ValueError: the support has repeated points.
        DensityError: the log probabilities cannot be computed.
    """
    name = "agrees with its sampler" if complete else "frequencies"
    cells, index = torch.unique(torch.cat([support, draws]), dim=0, return_inverse=True)
    places, where = index[: len(support)], index[len(support) :]
    if len(places.unique()) < len(support):
        raise ValueError("the support has repeated points")
    probs = torch.zeros(len(cells), dtype=torch.float64)
    probs[places] = heights(log_prob, support).exp()
    counts = torch.bincount(where, minlength=len(cells)).to(torch.float64)
    if not complete:
        rest = float(1 - probs.sum())
        if not rest >= -ROUNDING:
            found = {"sum over the points seen": float(probs.sum()), "claimed": "at most 1"}
            return Check(name, False, -rest, ROUNDING, 0.0, found, "the probabilities sum to more than one")
        elsewhere = torch.ones(len(cells), dtype=torch.bool)
        elsewhere[places] = False
        nowhere = torch.full((1, cells.shape[1]), torch.nan, dtype=torch.float64)
        cells = torch.cat([cells[~elsewhere], nowhere])
        counts = torch.cat([counts[~elsewhere], counts[elsewhere].sum()[None]])
        probs = torch.cat([probs[~elsewhere], probs.new_tensor([max(rest, 0.0)])])
        if counts[-1] and rest <= ROUNDING:
            found = {"draws at other points": int(counts[-1]), "claimed probability": rest}
            return Check(name, False, math.inf, 0.0, 0.0, found, "a draw that is impossible under the claimed law")
    impossible = (probs == 0) & (counts > 0)
    if impossible.any():
        found = {"draw": cells[impossible][0], "times": int(counts[impossible][0]), "claimed probability": 0.0}
        return Check(name, False, math.inf, 0.0, 0.0, found, "a draw that is impossible under the claimed law")
    kept = probs > 0
    expected = probs[kept] / probs.sum() * len(draws)
    order = expected.argsort()
    expected, counts, cells = expected[order], counts[kept][order], cells[kept][order]
    pool = pools(expected)
    awaited, seen = (torch.zeros(int(pool[-1]) + 1).double().index_add(0, pool, part) for part in (expected, counts))
    terms = 2 * (torch.xlogy(seen, seen / awaited) - seen + awaited)
    degrees = len(awaited) - 1
    correction = 1 + float((len(draws) / awaited).sum() - 1) / (6 * len(draws) * max(degrees, 1))
    deviance = float(terms.sum()) / correction
    p_value = float(stats.chi2.sf(deviance, degrees)) if degrees else 1.0
    passed = p_value >= false_alarm
    worst = int(terms.argmax())
    members = (pool == worst).nonzero().flatten()
    example = int(members[(counts - expected)[members].abs().argmax()])
    found = {"point": cells[example], "expected": float(expected[example]), "drawn": float(counts[example])}
    if len(members) > 1:
        found["pooled with others"] = {"points": len(members), "expected": awaited[worst], "drawn": seen[worst]}
    error = float((seen - awaited).abs().sum() / 2 / len(draws))
    critical = float(stats.chi2.isf(false_alarm, max(degrees, 1)))
    tolerance = 0.5 * (correction * critical / len(draws)) ** 0.5  # Pinsker's inequality
    detail = f"deviance {deviance:.4g} on {degrees} degrees of freedom, error in total variation"
    return Check(name, passed, error, tolerance, p_value, None if passed else found, detail)


def pools(expected: Tensor) -> Tensor:
    """Return the number of the pool (M,) of each cell, so that each pool expects ``SMALLEST_CELL`` draws or more.

    Args:
        expected: (M,), how many draws each cell expects, ascending.
    """
    found, filled, number = [], 0.0, 0
    for size in expected.tolist():
        found.append(number)
        filled += size
        if filled >= SMALLEST_CELL:
            filled, number = 0.0, number + 1
    return torch.tensor(found).clamp(max=max(number - 1, 0))  # what is left over joins the last full pool


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


def expectations_agree(
    pilot: Tensor,
    draws: Tensor,
    points: Tensor,
    log_weights: Tensor,
    *,
    generator: torch.Generator,
    false_alarm: float,
    num_tests: int = 64,
    log_ratios: Tensor | None = None,
) -> Check:
    """Test expectations of bounded functions under draws (N, D) against those under weighted points (M, D).

    The functions are indicators of random half-spaces and sines of random projections, at random places of a pilot
    sample. With ``log_ratios``, those of ``bridge``, each function is multiplied by q / (p + q) on the side of the
    draws and by p / (p + q) on that of the points: the errors are then known however badly q fits, but nothing is seen
    where p and q do not overlap.
    """
    name = "agrees with its sampler"
    weights = (log_weights - log_weights.max()).exp()
    total = float(weights.sum())
    worth = min(float(len(draws)), effective_size(log_weights if log_ratios is None else log_sigmoid(log_weights)))
    directions = random_directions(pilot, num_tests, generator)
    half = num_tests // 2
    places = pilot[torch.randint(len(pilot), (num_tests,), generator=generator)]
    along = pilot @ directions
    tail = min(SMALLEST_TAIL / max(worth, 1.0), 0.5)
    low, high = (torch.quantile(along, q, dim=0) for q in (tail, 1 - tail))
    thresholds = (places * directions.T).sum(1).clamp(low, high)
    frequencies = torch.rand(num_tests - half, generator=generator, dtype=torch.float64) * 4

    def functions(x: Tensor) -> Tensor:
        along = x @ directions - thresholds
        return torch.cat([(along[:, :half] > 0).to(torch.float64), (along[:, half:] * frequencies).sin()], 1)

    here, there = functions(draws), functions(points)
    if log_ratios is None:
        sampled, computed = here.mean(0), weights @ there / total
        variance = here.var(0) / len(draws) + (weights.square() @ (there - computed).square()) / total**2
    else:
        here = torch.sigmoid(-log_ratios)[:, None] * here
        there = torch.sigmoid(log_weights)[:, None] * there
        sampled, computed = here.mean(0), there.mean(0)
        variance = here.var(0) / len(draws) + there.var(0) / len(points)
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


def projections_agree(
    pilot: Tensor,
    draws: Tensor,
    points: Tensor,
    log_weights: Tensor,
    *,
    generator: torch.Generator,
    false_alarm: float,
    num_tests: int = 8,
) -> Check:
    """Test random projections of draws (N, D) against those of the density, by Kolmogorov's and Smirnov's statistic.

    Independent draws from the density are kept from the weighted points (M, D) by rejection. The bound on the weights
    comes from a quarter of the points, which is then left out; the share of the mass by which later weights exceed it
    counts as tolerance.
    """
    name = "projections"
    quarter = len(points) // 4
    bound = float(log_weights[:quarter].max()) + math.log(2)
    rest = log_weights[quarter:]
    excess = float((rest.exp() - math.exp(bound)).clamp(min=0).sum() / rest.exp().sum())
    coin = torch.rand(len(rest), generator=generator, dtype=torch.float64)
    kept = points[quarter:][coin.log() < rest - bound]
    if len(kept) < SMALLEST_TAIL:
        return Check(name, True, 0.0, math.inf, None, None, f"only {len(kept)} draws were kept: nothing is seen")
    size = round(len(draws) * len(kept) / (len(draws) + len(kept)))
    worst, where = 0.0, torch.zeros(draws.shape[1])
    for direction in random_directions(pilot, num_tests, generator).T:
        a, b = (draws @ direction).sort().values, (kept @ direction).sort().values
        both = torch.cat([a, b])
        shares = [torch.searchsorted(side, both, right=True) / len(side) for side in (a, b)]
        distance = float((shares[0] - shares[1]).abs().max())
        if distance > worst:
            worst, where = distance, direction
    p_value = min(1.0, num_tests * float(stats.kstwo.sf(max(worst - excess, 0.0), size)))
    passed = p_value >= false_alarm
    tolerance = float(stats.kstwo.isf(false_alarm / num_tests, size)) + excess
    found = {"direction": where, "distance of the distribution functions": worst}
    detail = f"{num_tests} directions, {len(kept)} draws from the density"
    return Check(name, passed, worst, tolerance, p_value, None if passed else found, detail)


def distribution_function_agrees(
    cdf: Callable[..., Tensor],
    draws: Tensor,
    *,
    generator: torch.Generator,
    false_alarm: float,
    num_tests: int = 8,
) -> Check:
    """Test draws (N, D) against their distribution function, by Kolmogorov's statistic along random directions.

    ``cdf`` is that of ``verify_density``. The test is exact for continuous laws and conservative for others.
    """
    name = "agrees with the distribution function"
    line = draws.shape[1] == 1
    directions = torch.ones(1, 1, dtype=torch.float64) if line else random_directions(draws, num_tests, generator)
    worst, found = 0.0, {}
    for direction in directions.T:
        x, counts = (draws @ direction).unique(return_counts=True)
        before = torch.nextafter(x, torch.full_like(x, -torch.inf))
        options = () if line else (direction,)
        try:
            at, left = (cdf(place, *options).detach().to(torch.float64) for place in (x, before))
        except Exception as error:
            detail = f"cdf raised {type(error).__name__}: {error}"
            return Check(name, False, math.inf, 0.0, None, {"x": x[:7], "direction": direction}, detail)
        if at.shape != x.shape or at.isnan().any():
            detail = f"cdf of points {tuple(x.shape)} has shape {tuple(at.shape)}, or is NaN"
            return Check(name, False, math.inf, 0.0, None, {"x": x[:7], "direction": direction}, detail)
        share = counts.cumsum(0) / len(draws)
        gap = torch.maximum((share - at).abs(), (share - counts / len(draws) - left).abs())
        if float(gap.max()) > worst:
            worst, place = float(gap.max()), int(gap.argmax())
            found = {"x": float(x[place]), "claimed": float(at[place]), "share of the draws": float(share[place])}
            found = found if line else {"direction": direction, **found}
    num = directions.shape[1]
    p_value = min(1.0, num * float(stats.kstwo.sf(worst, len(draws))))
    passed = p_value >= false_alarm
    tolerance = float(stats.kstwo.isf(false_alarm / num, len(draws)))
    return Check(name, passed, worst, tolerance, p_value, None if passed else found, f"{len(draws)} draws")


def random_directions(sample: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Return random directions (D, M) along which a sample (N, D) has standard deviation one."""
    spread = sample.std(0)
    directions = torch.randn(sample.shape[1], num, generator=generator, dtype=torch.float64)
    directions = directions / torch.where(spread > 0, spread, 1.0)[:, None]
    return directions / (sample @ directions).std(0).clamp(min=torch.finfo(torch.float64).tiny)
