"""A device that is not there: tensors on it compute on the CPU, and refuse what tensors on a GPU refuse.

An operation fails that takes tensors from the device and from the CPU, but for single numbers and for indices, and one
that makes random numbers there by a generator here; so does a view as a NumPy array. The numbers are the CPU's to the
last bit: a function that is given the same on both must return the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "imitation"
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class _Backend:
    """What torch asks the module of a device for; its random numbers are the CPU's."""

    def is_initialized(self) -> bool:
        return True

    is_available = is_initialized

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any) -> None:
        pass


_setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)


class OnDevice(Tensor):
    """A tensor that says it lies on the device, around one on the CPU."""

    plain: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        found: OnDevice = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=inner.requires_grad,
        )
        found.plain = inner
        return found

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnDevice({self.plain})"

    def tolist(self) -> Any:
        return self.plain.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without the operation
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _compute(func, args, kwargs or {})


def on_device(tree: Any) -> Any:
    """Return the tensors of a tree on the device."""
    return tree_map(lambda leaf: leaf.to(NAME) if isinstance(leaf, Tensor) else leaf, tree)


@contextmanager
def imitated() -> Iterator[None]:
    """Let tensors and generators be made on the device; a generator there makes the numbers of one here."""
    made = torch.Generator

    class Family(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, made)

    class Either(metaclass=Family):
        def __new__(cls, device: Any = "cpu") -> Any:
            if torch.device(device).type != NAME:
                return made(device)
            there: Any = _Generator()
            _generators[there._cdata] = there
            return there

    with pytest.MonkeyPatch.context() as patch, _Mode():
        patch.setattr(torch, "Generator", Either)
        yield
    _generators.clear()


class _Generator(torch.Generator):
    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE


_generators: dict[int, torch.Generator] = {}
"""Those of the device, by their address, as torch does not hand on their class; kept, that none gets it again."""


class _Mode(TorchDispatchMode):
    """Sees the operations that make tensors from none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__  # type: ignore[attr-defined]
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    there = any(isinstance(tensor, OnDevice) for tensor in tensors)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == NAME
        kwargs = kwargs | {"device": torch.device("cpu")}
    elif name in ("copy_", "set_"):
        there = isinstance(tensors[0], OnDevice)
    elif there:
        for tensor in tensors:
            index = name in INDEXING and not tensor.is_floating_point() and tensor is not tensors[0]
            if tensor.ndim and not index and not isinstance(tensor, OnDevice):
                raise RuntimeError(f"{func} takes a tensor {tuple(tensor.shape)} from the CPU to the device")
    generators: list[Any] = [leaf for leaf in leaves if isinstance(leaf, torch._C.Generator)]
    for generator in generators:
        if (generator._cdata in _generators) != there:
            raise RuntimeError(f"{func} takes a generator from elsewhere")
    if torch.Tag.inplace_view in func.tags:  # type: ignore[attr-defined]
        with no_dispatch():
            func(*args, **kwargs)  # the shape that the outer tensor shows
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    found = func(*inner_args, **inner_kwargs)
    if not there:
        return found
    same = {id(tensor.plain): tensor for tensor in tensors if isinstance(tensor, OnDevice)}  # in place, or into out
    return tree_map(lambda leaf: _outer(leaf, same), found)


def _inner(leaf: Any) -> Any:
    return leaf.plain if isinstance(leaf, OnDevice) else leaf


def _outer(leaf: Any, same: dict[int, OnDevice]) -> Any:
    return leaf if not isinstance(leaf, Tensor) else same[id(leaf)] if id(leaf) in same else OnDevice(leaf)


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _inner(target).copy_(_inner(source))
    return target


_LIBRARY = torch.library.Library("aten", "IMPL")
"""What ``torch.tensor`` calls past all modes."""
_LIBRARY.impl("empty_strided", _empty_strided, "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy_from, "PrivateUse1")
