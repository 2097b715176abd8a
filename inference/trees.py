"""Parameters and statistics are tuples of tensors, mostly named, or of tuples in turn: what is done to each tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def tree_map(function: Callable[..., Tensor], *trees: Any) -> Any:
    """Return what a function makes of the tensors of trees of one shape, place by place, as such a tree."""
    first, *_ = trees
    if not isinstance(first, tuple):
        return function(*trees)
    found = [tree_map(function, *parts) for parts in zip(*trees, strict=True)]
    return type(first)(*found) if hasattr(first, "_fields") else tuple(found)


def tree_at(tree: Any, index: Any) -> Any:
    """Return what lies at an index of each tensor: an integer, a slice, or a tensor of integers or booleans."""
    return tree_map(lambda value: value[index], tree)


def tree_to(tree: Any, target: Tensor | torch.dtype | torch.device) -> Any:
    """Return each tensor in the type and on the device of the target."""
    return tree_map(lambda value: value.to(target), tree)


def tree_expand(tree: Any, count: int) -> Any:
    """Return each tensor so many times along a new first axis, without copies."""
    return tree_map(lambda value: value.expand(count, *value.shape), tree)
