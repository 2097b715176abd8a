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

from mixproof.inference.checkpoint import CheckpointError

Group = Any
"""A ``torch.distributed.ProcessGroup``, or None for a process on its own."""
T = TypeVar("T")


_KINDS = (CheckpointError, ValueError, TypeError, ArithmeticError, OSError)


@contextmanager
def together(group: Group, device: torch.device) -> Iterator[None]:
    """Let every process of a group fail if one does; else the others would wait for it forever.

    Raises:
        ValueError, TypeError, ArithmeticError, OSError, RuntimeError: another process failed with an error of that
            kind, and the message is its own.
    """
    try:
        yield
    except Exception as error:
        _raise_for_others(group, (_kind(error), str(error)), device)
        raise
    _raise_for_others(group, None, device)


def _kind(error: Exception) -> type[Exception]:
    return next((kind for kind in _KINDS if isinstance(error, kind)), RuntimeError)


def _raise_for_others(group: Group, own: tuple[type[Exception], str] | None, device: torch.device) -> None:
    """Tell the other processes how this one fares, and raise what they say if it fares well itself."""
    if group is None:
        return
    num_failures = torch.tensor(0 if own is None else 1, device=device)
    dist.all_reduce(num_failures, group=group)
    if not num_failures:
        return
    failures: list[Any] = gather_objects(group, own)
    if own is None:
        rank, (kind, message) = next((rank, failure) for rank, failure in enumerate(failures) if failure is not None)
        raise kind(f"process {rank} of the group failed: {message}")


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


def gather_objects(group: Group, value: T) -> list[T]:
    """Return every process's value of any picklable object, in the order of the processes."""
    if group is None:
        return [value]
    values: list[Any] = [None] * rank_and_size(group)[1]
    dist.all_gather_object(values, value, group=group)
    return values


def rank_and_size(group: Group) -> tuple[int, int]:
    """Return the number of this process, from 0, and how many there are."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def is_first(group: Group) -> bool:
    """Return whether this process is the one that writes files and shows progress."""
    return rank_and_size(group)[0] == 0


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
