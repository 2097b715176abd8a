"""Draws from a mixture whose parameters have been checked first; the family's own ``sample`` trusts its caller."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixproof.inference.validation import check_generator, check_params


def sample(family: Any, params: Any, num_samples: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw rows from a family at given parameters.

    Args:
        family: a family of the contract.
        params: its ``Params``, a mapping, or a sequence of its fields; entries may be numpy arrays or nested lists.
        num_samples: how many rows, at least 1.
        generator: the only source of randomness.

    Returns:
        x: (n, D), the rows.
        z: (n,), the component that each row came from; of two latents k and l the pair k K_y + l.

    Raises:
        TypeError: a field is missing, unknown or not numeric, or ``num_samples`` or ``generator`` is of another type.
        ValueError: a field has the wrong shape or leaves its support, or ``num_samples`` is below 1.
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int | np.integer):
        raise TypeError(f"the number of samples must be an integer, not {num_samples!r}")
    if num_samples < 1:
        raise ValueError(f"the number of samples must be at least 1, not {num_samples}")
    check_generator(generator)
    return family.sample(check_params(family, params), int(num_samples), generator)
