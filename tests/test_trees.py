"""Functions over trees of tensors reach every tensor, keep the types, and refuse trees that differ in shape."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mixproof.inference.trees import tree_at, tree_expand, tree_map, tree_to


class Part(NamedTuple):
    counts: Tensor
    sums: Tensor


class Whole(NamedTuple):
    part: Part
    total: Tensor


TREE = Whole(Part(torch.arange(3.0), torch.arange(6.0).reshape(3, 2)), torch.tensor([7.0, 8.0, 9.0]))


def tensors(tree: Any) -> list[Tensor]:
    return [*tree.part, tree.total]


def test_every_tensor_is_reached_and_types_are_kept() -> None:
    found = tree_map(torch.add, TREE, TREE)
    assert type(found) is Whole
    assert type(found.part) is Part
    assert all(torch.equal(new, 2 * old) for new, old in zip(tensors(found), tensors(TREE), strict=True))
    assert torch.equal(tree_map(torch.neg, TREE.total), -TREE.total)


def test_index_expansion_and_type() -> None:
    kept = torch.tensor([True, False, True])
    for new, old in zip(tensors(tree_at(TREE, kept)), tensors(TREE), strict=True):
        assert torch.equal(new, old[kept])
    for new, old in zip(tensors(tree_expand(TREE, 5)), tensors(TREE), strict=True):
        assert torch.equal(new, torch.stack([old] * 5))
        assert new.data_ptr() == old.data_ptr()
    assert {value.dtype for value in tensors(tree_to(TREE, torch.float64))} == {torch.float64}


def test_tuples_without_names_are_trees_too() -> None:
    first, (second, third) = tree_map(torch.neg, (TREE.total, (TREE.total, TREE.part.sums)))
    assert torch.equal(first, second)
    assert torch.equal(third, -TREE.part.sums)


def test_trees_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        tree_map(torch.add, TREE, (TREE.part,))
