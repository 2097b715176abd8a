"""What the processes of ``torch.distributed`` say to each other in EM: sums of statistics, one answer, and failure.

Each process goes over its own rows; statistics are additive, so that their sum over the processes is that of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any
"""A ``torch.distributed.ProcessGroup``, or None for a process on its own."""
T = TypeVar("T")


@contextmanager
def together(group: Group, device: torch.device) -> Iterator[None]:
    """Let every process of a group fail if one does; else the others would wait for it forever.

    Raises:
        RuntimeError: another process failed.
    """
    try:
        yield
    except Exception:
        _num_failures(group, 1, device)
        raise
    if _num_failures(group, 0, device):
        raise RuntimeError("another process of the group failed: its own message says why")


def _num_failures(group: Group, own: int, device: torch.device) -> int:
    if group is None:
        return 0
    failures = torch.tensor(own, device=device)
    dist.all_reduce(failures, group=group)
    return int(failures)


def all_sum(group: Group, value: T) -> T:
    """Return the sum over the processes of tensors in nested tuples, computed in float64 and in one message."""
    if group is None:
        return value
    flat = _flatten(value)
    dist.all_reduce(flat, group=group)
    return _unflatten(flat, value)[0]


def first_of(group: Group, value: T) -> T:
    """Return the first process's value of tensors in nested tuples, so that rounding cannot part the processes."""
    if group is None:
        return value
    flat = _flatten(value)
    dist.broadcast(flat, group=group, group_src=0)
    return _unflatten(flat, value)[0]


def object_of_first(group: Group, value: T) -> T:
    """Return the first process's value of any picklable object."""
    if group is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, group=group, group_src=0)
    return values[0]


def is_first(group: Group) -> bool:
    """Return whether this process is the one that writes files and shows progress."""
    return group is None or dist.get_rank(group) == 0


def _flatten(value: Any) -> Tensor:
    if isinstance(value, tuple):
        return torch.cat([_flatten(part) for part in value])
    return value.to(torch.float64).flatten()


def _unflatten(flat: Tensor, like: Any, start: int = 0) -> tuple[Any, int]:
    """Return the tensors that begin at ``flat[start]`` in the shape and type of others, and where they end."""
    if not isinstance(like, tuple):
        end = start + like.numel()
        return flat[start:end].reshape(like.shape).to(like), end
    parts = []
    for part in like:
        found, start = _unflatten(flat, part, start)
        parts.append(found)
    return (type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)), start
