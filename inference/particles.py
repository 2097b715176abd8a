"""What the samplers of sequential Monte Carlo share: replicates that each estimate the evidence, and resampling."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from mixproof.inference.validation import check_integer, check_probability


@dataclass(frozen=True)
class Replicates:
    """Independent runs of R replicates, each with particles of its own."""

    log_evidences: Tensor
    """(R,), log of the evidence as each replicate estimates it: an estimate that is right on average, but for what the
    run adapts to the particles of all."""

    @property
    def log_evidence(self) -> float:
        """log of the mean of the replicates' evidences."""
        return float(self.log_evidences.logsumexp(0)) - math.log(len(self.log_evidences))

    @property
    def standard_error(self) -> float:
        """Of ``log_evidence``, to first order: the standard deviation of the evidences over their mean and R^(1/2)."""
        return float((self.log_evidences - self.log_evidence).exp().std()) / math.sqrt(len(self.log_evidences))

    @property
    def effective_replicates(self) -> float:
        """How many replicates of equal evidences the mean is worth: the square of their sum by the sum of squares."""
        return float(1 / self.log_evidences.softmax(0).square().sum())

    def check(self) -> None:
        """Raise where there is no mean, and warn where too few replicates decide it to trust its standard error.

        R / e of R are left by evidences of a log-normal law whose logarithm has the standard deviation 1.
        """
        if not math.isfinite(self.log_evidence):
            raise ArithmeticError(
                f"the evidence of the particles is {self.log_evidence}: the prior is so far from the data, or the data "
                "from zero, that rounding decides; centre and scale the data, or widen the prior"
            )
        if self.effective_replicates < len(self.log_evidences) / math.e:
            warnings.warn(
                f"the mean of the evidences of {len(self.log_evidences)} replicates rests on "
                f"{self.effective_replicates:.1f} of them, and its standard error is too small; raise num_chains or "
                "num_moves of the particles",
                stacklevel=3,
            )


def check_settings(
    *,
    num_replicates: int | None = None,
    num_chains: int | None = None,
    num_moves: int | None = None,
    efficiency: float | None = None,
) -> None:
    """Raise TypeError or ValueError where a setting of the particles cannot be; None is a default, which can."""
    least = {"num_replicates": (num_replicates, 2), "num_chains": (num_chains, 2), "num_moves": (num_moves, 1)}
    for name, (value, smallest) in least.items():
        if value is not None:
            check_integer(value, name, smallest)
    if efficiency is not None:
        check_probability(efficiency, "efficiency")


def systematic(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return the numbers (R, count) of particles drawn in proportion to weights (R, S), by systematic resampling."""
    offsets = torch.rand(len(weights), 1, generator=generator, dtype=weights.dtype, device=weights.device)
    places = (torch.arange(count, dtype=weights.dtype, device=weights.device) + offsets) / count
    return torch.searchsorted(weights.cumsum(1), places).clamp_max(weights.shape[1] - 1)
