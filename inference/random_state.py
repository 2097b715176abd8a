"""The global random generators, which Pyro draws from: seeded for a while, and then as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators that Pyro seeds, of torch, numpy and ``random``, and put their states back afterwards."""
    before = pyro.util.get_rng_state()
    with torch.random.fork_rng():  # of every device besides
        pyro.set_rng_seed(seed)
        try:
            yield
        finally:
            pyro.util.set_rng_state(before)
