"""What every sampler returns: draws by chain, beside what it says of its own run."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

NOT_MIXED = 1.1
"""The R-hat above which chains have plainly not mixed (Gelman and Rubin 1992, Statistical Science 7). One to ask for is
1.01, which takes more draws to tell from noise."""


class Draws(NamedTuple):
    """Draws of a program's parameters from p(params | data), S of them from each of C chains."""

    params: dict[str, Tensor]
    """By parameter site, (C, S, *shape): the value in each draw."""
    sample_stats: dict[str, Tensor]
    """By ArviZ's names, (C, S): ``lp``, log p(data, params), and what the sampler reports of each draw, such as
    ``acceptance_rate``, ``diverging`` or ``step_size``."""
    attributes: dict[str, Any]
    """Of the run as a whole, numbers and text: the engine's name, the seed, the numbers of warm-up steps and of draws,
    rates of moves that are accepted."""


def split_rhat(values: Tensor) -> float:
    """Return R-hat of values (C, S), each chain split in halves (Gelman et al., BDA, 3rd edition, section 11.4).

    It is 1 where nothing varies, and where there are fewer than 4 draws to split.
    """
    half = values.shape[1] // 2
    if half < 2:
        return 1.0
    halves = torch.cat([values[:, :half], values[:, -half:]])
    within, between = halves.var(1).mean(), halves.mean(1).var()
    return float(((half - 1) / half + between / within).sqrt()) if between > 0 else 1.0
