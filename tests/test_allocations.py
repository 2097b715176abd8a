"""Draws of the components of rows, against the log of the sum and against chi-squared."""

from __future__ import annotations

import pytest
import scipy.stats
import torch

from mixproof.inference.allocations import draw_allocations


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("num_components", "num_rows"), [(1, 5), (2, 0), (2, 3000), (3, 646), (300, 257)])
@pytest.mark.parametrize("power", [None, 0.0, 0.3])
def test_log_normalisers_are_those_of_all_rows(
    num_components: int, num_rows: int, dtype: torch.dtype, power: float | None
) -> None:
    """Components that weigh alike make the normalisers as large as they can be."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, num_components, num_rows, generator=generator, dtype=dtype)
    table = torch.stack([noise[0] * 1e-3, noise[1] * 50]) - 1000
    powers = None if power is None else torch.full((2,), power, dtype=dtype)
    expected = (table.double() * (1 if power is None else power)).logsumexp(1).sum(-1)
    resp, found = draw_allocations(table.clone(), powers, generator)
    size = max(num_rows, 1) * 1000
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=size * torch.finfo(dtype).eps)
    assert torch.equal(resp.sum(1), torch.ones_like(resp[:, 0]))
    assert set(resp.unique().tolist()) <= {0.0, 1.0}


def test_components_are_drawn_in_proportion() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.tensor([0.5, 1e-3, 0.299, 0.2], dtype=torch.float64)
    table = (weights.log() + 700)[None, :, None].expand(50, 4, 2000).contiguous()
    resp, _ = draw_allocations(table, None, generator)
    counts = resp.sum((0, 2))
    assert scipy.stats.chisquare(counts.numpy(), (weights * 100_000).numpy()).pvalue > 1e-3
