"""The global random generators, which Pyro draws from: seeded for a while, and then as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pyro
import torch
from torch import Tensor


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


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's global generators, of the processor and of a device, by name."""
    found = {"rng": torch.get_rng_state()}
    if device.type == "cuda":
        found["rng.cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put torch's global generators back into the states that ``generator_states`` returned."""
    torch.set_rng_state(states["rng"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["rng.cuda"], device)
