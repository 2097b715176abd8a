"""Densities: one integrates to one, and agrees with the sampler of the same law.

A density is one with respect to Lebesgue measure in the continuous columns, to counting measure in the discrete ones,
and to their sum in a column of atoms beside a density. A finite support is summed exactly. In up to three dimensions a
grid is summed, with the error read off from coarser grids within it. In any dimension the integral is a Monte Carlo
average under a proposal of heavy tails, fitted to a pilot sample; the same proposal gives expectations of bounded
functions and distribution functions of random projections, which are compared with those of the sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from scipy import stats
from torch import Tensor
from torch.nn.functional import logsigmoid as log_sigmoid

from mixproof.inference.verification.moments import Sampler, draw, without_skewness
from mixproof.inference.verification.report import Check, Report, asserting, conclude

LogProb = Callable[[Tensor], Tensor]
Column = Literal["continuous", "discrete"] | Sequence[float]
ROUNDING = 2.0**10 * torch.finfo(torch.float64).eps
NUM_SAMPLES = 2**16
NUM_CLUSTERS = 8
NUM_PILOT = 2**14
SMALLEST_EFFECTIVE_SIZE = 5000
SMALLEST_OVERLAP = 1000
GRID = {0: 1, 1: 5461 * 12, 2: 43 * 12, 3: 8 * 12}
"""Points on each continuous axis, by the number of those axes; multiples of twelve, for the coarser grids within."""
SMALLEST_GRID = 48
LARGEST_GRID = 2**20
SMALLEST_CELL = 10.0
SMALLEST_TAIL = 100.0
"""How many draws beyond a threshold are expected at least, so that their number is close to normal."""
COARSE = 2.0**-7
REPEATS = 8
"""So many equal draws are an atom: continuous ones in single precision repeat two or three times."""


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
    columns: Sequence[Column] | None = None,
    cdf: Callable[..., Tensor] | None = None,
    seed: int,
    false_alarm: float = 1e-6,
    num_samples: int = NUM_SAMPLES,
    subject: str | None = None,
) -> Report:
    """Try to refute that a log density is normalised and belongs to a sampler.

    What is not seen: atoms of probability below about 8 / ``num_samples``; mass that neither the sampler nor the
    proposal ever reaches; errors of the law below about 5 / sqrt(``num_samples``) in the probability of a half-space;
    on a finite support or a grid the normalisation is tested to rounding or to what the grid resolves, else within
    the Monte Carlo error that the report states.

    Args:
        log_prob: of points (N, D) returns their log densities (N,), or log probabilities on a finite support. It must
            be minus infinity (not an error) where the density vanishes.
        sample: ``sample(num_samples, generator)`` returns independent draws (N, D), or (N,) for a law on the line.
        support: all points (M, D) of a finite support; None for a density.
        columns: one statement for each column, None if all are ``"continuous"``: ``"discrete"`` for whole numbers,
            finitely many or not, where the density is with respect to counting measure; the list of the atoms for a
            column that is continuous elsewhere, such as ``[0.0]`` for a zero-inflated one, where ``log_prob`` counts
            probability at the atoms and density elsewhere.
        cdf: the distribution function, where known: on the line ``cdf(x)`` of points (N,) returns P(X <= x), in more
            dimensions ``cdf(x, direction)`` returns P(direction . X <= x) for a direction (D,).
        seed: of the draws.
        false_alarm: the probability of refuting a right claim, shared by the checks.
        num_samples: how many draws of the sampler, and how many of the proposal.
        subject: the claim in words, for the report.

    Returns:
        A report; undecided where the sampler is not finite, a continuous column has atoms that were not stated, or the
        proposal covers too little of the law.

    Raises:
        ValueError: the support has repeated points, the sampler does not return (N, D), or ``columns`` does not fit
            its draws.
    """
    subject = subject or "the density"
    generator = torch.Generator().manual_seed(seed)
    pilot = draw(sample, NUM_PILOT, generator)  # apart, so that what is fitted to it is independent of the draws
    draws = draw(sample, num_samples, generator)
    if not (pilot.isfinite().all() and draws.isfinite().all()):
        nan = float("nan")
        return conclude(subject, [Check("finite draws", False, nan, nan, detail="the sampler is not finite")], seed)
    if support is not None and columns is not None:
        raise ValueError("a finite support is discrete: give columns only without a support")
    share = false_alarm / 6  # of the checks below
    extra = []
    if cdf is not None:
        extra.append(distribution_function_agrees(cdf, draws, generator=generator, false_alarm=share))
    try:
        support = None if support is None else support.reshape(len(support), -1).to(torch.float64)
        if support is not None:
            checks = [
                sums_to_one(log_prob, support),
                frequencies_agree(log_prob, draws, support, false_alarm=false_alarm - share * len(extra)),
            ]
            return conclude(subject, checks + extra, seed)
        columns = fitting_columns(columns, pilot, draws)
        repeated = no_atoms(draws, columns)
        if not repeated.passed:
            return conclude(subject, [repeated, *extra], seed)
        summed = grid_integral(log_prob, draws, columns=columns) if draws.shape[1] in GRID else None
        checks = [] if summed is None else [summed]
        if set(columns) == {"discrete"}:
            seen = torch.unique(pilot, dim=0)
            checks.append(frequencies_agree(log_prob, draws, seen, complete=False, false_alarm=share))
        log_proposal, points = proposal(pilot, num_samples, generator, columns=columns)
        log_weights = heights(log_prob, points) - log_proposal(points)
        log_ratios = heights(log_prob, draws) - log_proposal(draws)
        checks.append(bridge(log_ratios, log_weights, false_alarm=share))
    except DensityError as error:
        failed = Check("log_prob", False, float("nan"), 0.0, counterexample={"points": error.points}, detail=str(error))
        return conclude(subject, [failed, *extra], seed)
    effective = effective_size(log_weights)
    options: dict[str, Any] = {"generator": generator, "false_alarm": share}
    if effective < SMALLEST_EFFECTIVE_SIZE:
        detail = f"the proposal's draws are worth only {effective:.0f}: law and normalisation were not tested apart"
        checks[-1] = checks[-1]._replace(detail=detail)
        checks.append(expectations_agree(pilot, draws, points, log_weights, log_ratios=log_ratios, **options))
        overlap = min(effective_size(side) for side in (log_sigmoid(-log_ratios), log_sigmoid(log_weights)))
        if overlap < SMALLEST_OVERLAP:
            nan, detail = float("nan"), f"the density and the proposal share draws worth only {overlap:.0f}"
            checks.append(Check("overlap with the proposal", False, nan, nan, detail=detail))
    else:
        checks.append(sampled_integral(log_weights, false_alarm=share))
        checks.append(expectations_agree(pilot, draws, points, log_weights, **options))
        checks.append(projections_agree(pilot, draws, points, log_weights, **options))
    return conclude(subject, checks + extra, seed)


def fitting_columns(columns: Sequence[Column] | None, *samples: Tensor) -> list[Any]:
    """Return what each column is, atoms as a sorted tensor, or say why samples (N, D) do not fit it.

    Raises:
        ValueError: there is not one statement for each column, or a discrete column holds other than whole numbers.
    """
    dim = samples[0].shape[1]
    found: list[Any] = ["continuous"] * dim if columns is None else list(columns)
    if len(found) != dim:
        raise ValueError(f"columns has {len(found)} entries, the draws have {dim} columns")
    for j, column in enumerate(found):
        if isinstance(column, str) and column not in ("continuous", "discrete"):
            raise ValueError(f"a column is 'continuous', 'discrete' or a list of atoms, not {column!r}")
        if not isinstance(column, str):
            found[j] = torch.as_tensor(column, dtype=torch.float64).reshape(-1).unique()
        if column == "discrete" and any((sample[:, j] != sample[:, j].round()).any() for sample in samples):
            raise ValueError(f"column {j} is not of whole numbers: rescale it, or give a finite support")
    return found


def no_atoms(draws: Tensor, columns: Sequence[Any]) -> Check:
    """Check that values of draws (N, D) do not repeat, but for discrete columns and stated atoms."""
    name, nan = "no other atoms", float("nan")
    for j, column in enumerate(columns):
        if isinstance(column, str) and column == "discrete":
            continue
        values = draws[:, j] if isinstance(column, str) else draws[~torch.isin(draws[:, j], column), j]
        found, counts = values.unique(return_counts=True)
        if len(counts) and int(counts.max()) >= REPEATS:
            value, times = float(found[counts.argmax()]), int(counts.max())
            detail = f"column {j} has {times} of {len(draws)} draws at {value:.8g}: state its atoms in columns"
            return Check(name, False, nan, nan, detail=detail)
    return Check(name, True, 0.0, 0.0)


def sums_to_one(log_prob: LogProb, support: Tensor) -> Check:
    """Check that the probabilities of all points (M, D) of a finite support sum to one, to rounding."""
    total = float(heights(log_prob, support).exp().sum())
    tolerance = rounding(log_prob, support)
    passed = abs(total - 1) <= tolerance
    return Check(
        "sums to one", passed, abs(total - 1), tolerance, None, None if passed else {"sum": total, "claimed": 1.0}
    )


def frequencies_agree(
    log_prob: LogProb, draws: Tensor, support: Tensor, *, complete: bool = True, false_alarm: float
) -> Check:
    """Test the frequencies of draws (N, D) on a finite support (M, D), by Pearson's chi-square, sparse cells pooled.

    A support that is not complete must not come from the same draws; all other points are then one more cell.
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


def grid_integral(log_prob: LogProb, draws: Tensor, *, columns: Sequence[Any] | None = None) -> Check | None:
    """Check that a density integrates to one, on a grid about draws (N, D), D <= 3; None if that has too many points.

    The box is the range of the draws, widened by itself on each side; discrete columns take all whole numbers in it.
    The tolerance is what the grid can resolve: how far the sums over the coarser grids inside it differ, and the mass
    in the outer half of the widening, of which less lies beyond it. A grid that resolves less than ``COARSE`` says
    nothing, and passes with an infinite tolerance. ``columns`` is that of ``fitting_columns``.
    """
    name = "integrates to one on a grid"
    columns = ["continuous"] * draws.shape[1] if columns is None else columns
    low, high = draws.amin(0), draws.amax(0)
    width = torch.where(high > low, high - low, 1.0)
    discrete = [isinstance(column, str) and column == "discrete" for column in columns]
    counted = math.prod(int(3 * w) + 1 for w, is_counted in zip(width.tolist(), discrete, strict=True) if is_counted)
    smooth = len(columns) - sum(discrete)
    size = GRID[smooth]
    if smooth:
        size = min(size, int((LARGEST_GRID / counted) ** (1 / smooth)) // 12 * 12)
    if counted > LARGEST_GRID or (smooth and size < SMALLEST_GRID):
        return None
    axes, masses = [], []  # of each axis, a function of (offset, step) that gives the weights of a coarser grid
    inner = []
    for lo, hi, w, column, is_counted in zip(
        low.tolist(), high.tolist(), width.tolist(), columns, discrete, strict=True
    ):
        if is_counted:
            axis = torch.arange(lo - w, hi + w + 1, dtype=torch.float64)
            fine = torch.zeros(len(axis), dtype=torch.bool)
        else:
            atoms = torch.empty(0, dtype=torch.float64) if isinstance(column, str) else column
            cell = 3 * w / size
            grid = lo - w + cell * (torch.arange(size, dtype=torch.float64) + 0.5)
            grid = torch.where(torch.isin(grid, atoms), grid + cell / 2**10, grid)
            axis = torch.cat([grid, atoms])
            fine = torch.arange(len(axis)) < size
        axes.append(axis)
        masses.append((fine, fine.double() * (3 * w / size) + (~fine).double()))
        inner.append(~((axis < lo - w / 2) | (axis > hi + w / 2)) | (~fine & (not is_counted)))
    points = torch.cartesian_prod(*axes).reshape(-1, len(axes))
    parts = [heights(log_prob, part) for part in points.split(2**17)]
    density = torch.cat(parts).exp()
    if density.isnan().any():
        where = points[density.isnan()][0]
        return Check(name, False, math.inf, 0.0, None, {"x": where, "density": float("nan")})
    density = density.reshape([len(axis) for axis in axes])

    def total(weights: Sequence[Tensor]) -> float:
        left = density
        for weight in weights:
            left = torch.tensordot(weight, left, dims=1)
        return float(left)

    def coarser(offset: int, step: int) -> float:
        kept = [~fine | (torch.arange(len(fine)) % step == offset) for fine, _ in masses]
        return total([mass * keep * (1 + (step - 1) * fine) for (fine, mass), keep in zip(masses, kept, strict=True)])

    whole = total([mass for _, mass in masses])
    beyond = abs(whole - total([mass * keep for (_, mass), keep in zip(masses, inner, strict=True)]))
    halves = [abs(coarser(i, 2) - whole) for i in range(2)]
    quarters = [abs(coarser(i, 4) - whole) / 4 for i in range(4)]
    tolerance = 2 * max(halves + quarters) + beyond + rounding(log_prob, points)
    error = abs(whole - 1)
    tolerance = tolerance if tolerance < COARSE else math.inf
    passed = error <= tolerance
    box = {"low": low - width, "high": high + width}
    return Check(
        name,
        passed,
        error,
        tolerance,
        counterexample=None if passed else {"integral": whole, "claimed": 1.0, **box},
        detail="" if tolerance < COARSE else "the grid does not resolve this density: left to sampling",
    )


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


def rounding(log_prob: LogProb, points: Tensor) -> float:
    """Return the rounding that a sum of densities may carry, in the precision in which a log density answers."""
    dtype = log_prob(points[:1]).dtype
    return 2.0**10 * torch.finfo(dtype if dtype.is_floating_point else torch.float64).eps


def effective_size(log_weights: Tensor) -> float:
    """Return the number of equally weighted draws that are worth as much as the weighted ones, of log weights (N,)."""
    return float((2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp().nan_to_num(0.0))


assert_density = asserting(verify_density)
