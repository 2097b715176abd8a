"""What every sampler returns: draws by chain, beside what it says of its own run."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


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
