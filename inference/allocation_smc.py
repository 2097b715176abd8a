"""Sequential Monte Carlo over the rows of a mixture under its conjugate prior, the parameters integrated out.

Rows come in one by one. A particle is the allocation of the rows so far to components, and the next row weighs it by
its predictive density, the sum over components of p(x_n, z_n = k | x_<n, z_<n), before its component is drawn from that
sum's terms (MacEachern, Clyde and Liu 1999, Canadian Journal of Statistics 27, section 3; Fearnhead 2004, Statistics
and Computing 14). Where the weights have become unequal the particles are resampled and moved by Gibbs sweeps over the
rows so far (Chopin 2002, Biometrika 89). The product of the mean weights is the evidence, right on average.

Nothing starts from the prior: under a vague one the first rows settle each component, and groups of rows that
tempering would have to discover at a sharp change of temperature are there from the outset. All K! labels are reached
alike, since each component is empty at first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from mixproof.inference import checkpoint as checkpoints
from mixproof.inference.allocations import draw_allocations
from mixproof.inference.particles import Replicates, check_settings, systematic
from mixproof.inference.trees import tree_at, tree_expand, tree_map
from mixproof.inference.validation import (
    about_mean,
    check_num_components,
    check_proper_prior,
    check_rows,
    example_params,
)

TABLE_ENTRIES = 1 << 22
"""How many entries of the tables of particles, rows and components are in memory at once."""


@dataclass(frozen=True)
class AllocationSMC(Replicates):
    """What R replicates found, each with M particles."""

    params: Any
    """The family's ``Params``, each field (R, S, ...): draws from p(params | x), dependent within a replicate."""
    lp: Tensor
    """(R, S), log p(x, params) at the draws."""
    num_rows: Tensor
    """(T,), after how many rows the particles were resampled."""
    effective_sample_size: Tensor
    """(T,), the smallest among replicates, of M, of the weights there."""


def integrates_out(family: Any) -> bool:
    """Whether a family says how rows so far predict one more, its parameters integrated out."""
    return hasattr(family, "log_predictive")


def allocation_smc(
    family: Any,
    x: Any,
    prior: Any,
    *,
    num_components: int,
    seed: int,
    num_replicates: int = 32,
    num_chains: int = 128,
    num_moves: int = 2,
    efficiency: float = 0.5,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> AllocationSMC:
    """Carry allocations of rows to components from the first row to the last.

    Every replicate takes the rows in a random order of its own. The replicates run as one batch and never exchange
    particles: what they differ by is the error.

    Args:
        family: a family of the contract that ``integrates_out``.
        x: (N, D), the data.
        prior: the family's ``Prior``, proper.
        num_components: K.
        seed: of all random numbers.
        num_replicates: R, at least 2.
        num_chains: M, the particles of each replicate, at least 2.
        num_moves: Gibbs sweeps of each particle after a resampling, at least 1. Those after the last row are all kept:
            S = num_chains num_moves.
        efficiency: the effective sample size at which the particles are resampled, as share of M, averaged over
            replicates.
        checkpoint: a file for the state at each resampling. If it exists, the run goes on from there, to the same end.
        progress: whether to show the rows on stderr.

    Returns:
        ``AllocationSMC``.

    Raises:
        TypeError: the family does not integrate out, or an argument is of another type.
        ValueError: the data, the prior or a setting are not what they must be, or the checkpoint is of another run.
        KeyboardInterrupt: with a note that says how far it was; there is no evidence before the last row.
        OSError: the checkpoint cannot be read or written, which is tried first.
    """
    if not integrates_out(family):
        raise TypeError("this family has no log_predictive(stats, prior, x): use tempered_smc")
    check_settings(num_replicates=num_replicates, num_chains=num_chains, num_moves=num_moves, efficiency=efficiency)
    size: Any = check_num_components(family, num_components)
    rows = check_rows(family, x).to(torch.float64)
    prior = check_proper_prior(family, prior, example_params(family, size, rows)[0])
    generator = torch.Generator(rows.device).manual_seed(seed)
    particles = _Particles(family, rows, prior, size, num_replicates, num_chains, generator)
    sizes = {"num_replicates": num_replicates, "num_chains": num_chains, "num_moves": num_moves}
    identity = {
        "engine": "allocation_smc",
        "family": checkpoints.identify(family),
        "prior": checkpoints.digest(prior),
        "x": checkpoints.digest(rows),
        "num_components": size,
        "seed": seed,
        "efficiency": efficiency,
        **sizes,
    }
    file = None if checkpoint is None else Path(checkpoint)
    if file is not None:
        particles.restore(checkpoints.load(file, identity))
        checkpoints.save(file, identity, particles.state())  # a disk that takes no file is found now
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
            task = bar.add_task("SMC over rows", total=len(rows), completed=particles.num_rows)
            while particles.num_rows < len(rows):
                particles.add_row()
                bar.update(task, completed=particles.num_rows)
                last = particles.num_rows == len(rows)
                if last or particles.effective_sample_size().mean() < efficiency * num_chains:
                    particles.resample()
                    if not last:
                        particles.move(num_moves)
                    if file is not None:
                        checkpoints.save(file, identity, particles.state())
            params, lp = particles.move(num_moves)
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(f"stopped at row {particles.num_rows} of {len(rows)}: there is no evidence before the last")
        raise
    found = AllocationSMC(
        particles.log_evidences, params, lp, torch.tensor(particles.resampled_at), torch.tensor(particles.sizes)
    )
    found.check()
    return found


class _Particles:
    """M particles of each of R replicates, as one batch of B = R M, and the evidence so far."""

    def __init__(
        self,
        family: Any,
        x: Tensor,
        prior: Any,
        num_components: int,
        num_replicates: int,
        num_chains: int,
        generator: torch.Generator,
    ):
        self.family, self.prior, self.generator = family, prior, generator
        self.size, self.shape = num_components, (num_replicates, num_chains)
        self.batch = num_replicates * num_chains
        self._numbers = torch.arange(self.batch, device=x.device)
        order = torch.rand(num_replicates, len(x), generator=generator, device=x.device).argsort(1)
        self.x = x[order]  # (R, N, D)
        template = about_mean(example_params(family, num_components, x)[0], x)
        self.about = tree_expand(template, self.batch)
        self.num_rows = 0
        self.stats = self._statistics(
            self.about, x.new_zeros(self.batch, 0, x.shape[1]), x.new_zeros(self.batch, 0, num_components)
        )
        self.log_weights = x.new_zeros(self.shape)
        self.log_evidences = x.new_zeros(num_replicates)
        self.resampled_at: list[int] = []
        self.sizes: list[float] = []

    def add_row(self) -> None:
        """Weigh the particles by the predictive density of the next row, and draw its component."""
        row = self.x[:, self.num_rows].repeat_interleave(self.shape[1], 0)  # (B, D)
        log_terms = self.family.log_predictive(self.stats, self.prior, row)
        resp, log_density = draw_allocations(log_terms[..., None], None, self.generator)
        self.log_weights = self.log_weights + log_density.view(self.shape)
        self.stats = tree_map(torch.add, self.stats, self._statistics(self.about, row[:, None], resp.mT))
        self.num_rows += 1

    def _statistics(self, about: Any, x: Tensor, resp: Tensor) -> Any:
        """Return the statistics of rows x (B, n, D) in the components resp (B, n, K)."""
        return torch.func.vmap(self.family.statistics)(about, x, resp)

    def effective_sample_size(self) -> Tensor:
        """Return it by replicate, (R,)."""
        return 1 / self.log_weights.softmax(1).square().sum(1)

    def resample(self) -> None:
        """Draw the particles of each replicate in proportion to their weights."""
        self.resampled_at.append(self.num_rows)
        self.sizes.append(float(self.effective_sample_size().min()))
        self.log_evidences = self.log_evidences + self.log_weights.logsumexp(1) - math.log(self.shape[1])
        chosen = systematic(self.log_weights.softmax(1), self.shape[1], self.generator)
        chosen = (chosen + torch.arange(self.shape[0], device=chosen.device)[:, None] * self.shape[1]).flatten()
        self.stats = tree_at(self.stats, chosen)
        self.log_weights = torch.zeros_like(self.log_weights)

    def move(self, num_moves: int) -> tuple[Any, Tensor]:
        """Move all particles by Gibbs sweeps over the rows so far; return parameters (R, S, ...) and lp (R, S) there.

        A sweep draws parameters given the allocation, and the allocation given those.
        """
        kept, lps = [], []
        for _ in range(num_moves):
            params = self.family.draw(self.about, self.stats, self.prior, self.generator)
            log_prior = torch.func.vmap(self.family.log_prior, (0, None))(params, self.prior)
            kept.append(params)
            lps.append(log_prior + self._allocate(params))
        stacked = tree_map(lambda *values: torch.stack(values, 1).unflatten(0, self.shape).flatten(1, 2), *kept)
        return stacked, torch.stack(lps, 1).reshape(self.shape[0], -1)

    def _allocate(self, params: Any) -> Tensor:
        """Draw all allocations given parameters, and return log p(x | params), (B,)."""
        at_once = max(TABLE_ENTRIES // (self.num_rows * self.size), 1)
        parts, log_likelihoods = [], []
        for rows, own in zip(self.x[:, : self.num_rows], self._numbers.view(self.shape), strict=True):
            for some in own.split(at_once):
                table = torch.func.vmap(self.family.log_joint, (0, None))(tree_at(params, some), rows)
                resp, log_likelihood = draw_allocations(table.mT.contiguous(), None, self.generator)
                parts.append(
                    torch.func.vmap(self.family.statistics, (0, None, 0))(tree_at(self.about, some), rows, resp.mT)
                )
                log_likelihoods.append(log_likelihood)
        self.stats = tree_map(lambda *values: torch.cat(values), *parts)
        return torch.cat(log_likelihoods)

    def state(self) -> dict[str, Tensor]:
        """Return what a run needs to go on from after a resampling."""
        return {
            "generator": self.generator.get_state(),
            "num_rows": torch.tensor(self.num_rows),
            "log_evidences": self.log_evidences,
            "resampled_at": torch.tensor(self.resampled_at, dtype=torch.int64),
            "sizes": torch.tensor(self.sizes, dtype=torch.float64),
            **{f"stats.{name}": value for name, value in self.stats._asdict().items()},
        }

    def restore(self, state: dict[str, Tensor] | None) -> None:
        """Go on from a state, if there is one."""
        if state is None:
            return
        self.generator.set_state(state["generator"])
        self.num_rows = int(state["num_rows"])
        self.log_evidences = state["log_evidences"].to(self.x)
        self.resampled_at, self.sizes = state["resampled_at"].tolist(), state["sizes"].tolist()
        self.stats = type(self.stats)(*(state[f"stats.{name}"].to(self.x) for name in self.stats._fields))
