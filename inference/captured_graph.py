"""A function of tensors as a graph of operations, from which what broadcasting repeats has been taken out.

A log density that is vectorised over many points spends most of its time on repeated work: the logarithm of a scale is
taken in every row, and factors that no row changes are multiplied in before the sum over rows. Here the function is run
once on examples. What each operation gives is kept as a product of tensors no larger than they need be, with the shape
that it stands for; an operation on single entries is done on those, and a sum leaves out the factors that do not vary
along it. Operations with constants alone are done at once, equal ones once. The results are those of the function up to
rounding, but that a matrix without a Cholesky factor gets one of NaNs and no exception, and that factors taken out of a
mask or a sum meet zeros as they are: where one overflows, NaN may stand for 0, and a gradient far out, where a density
underflows, may be NaN.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the new graph."""

    node: fx.Node | None
    """What gives it; None for a constant."""
    example: Tensor
    """What it is for the example; of a constant, its value."""


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """What an operation of the old graph gives: scale times the product of the parts, spread to the shape."""

    shape: tuple[int, ...]
    scale: float
    parts: tuple[Value, ...]
    """At least one; of as many dimensions as the shape, each of its size or 1."""


def capture(function: Callable[..., Any], *examples: Tensor) -> Callable[..., Any]:
    """Return the function for tensors of these shapes, as a graph of the operations that it made on the examples.

    Args:
        function: it takes tensors and returns tensors in any nest of tuples; what it does must not depend on their
            values.
        examples: tensors to run it on.
    """

    def plain(*tensors: Tensor) -> Any:  # the tracer counts the arguments of what it is given, and not of methods
        return function(*tensors)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")  # it is paid once
        graph = make_fx(torch.func.functionalize(plain))(*examples)
        graph.graph.eliminate_dead_code()
        rewritten = _Rewriter(graph, examples).run()
        if _agree(rewritten(*examples), graph, examples):
            return rewritten
    warnings.warn(
        "a captured graph came out wrong where repeated work was taken out of it, and is used as it was traced, which "
        "is slower: please report this as a bug of mixproof",
        RuntimeWarning,
        stacklevel=2,
    )
    return graph


def _agree(found: Any, graph: fx.GraphModule, examples: Sequence[Tensor]) -> bool:
    """Return whether results are those of a graph on its examples, to half of the digits of their type."""
    expected = graph(*examples)

    def close(a: Tensor, b: Tensor) -> bool:
        tolerance = math.sqrt(torch.finfo(b.dtype).eps)
        size = b.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().max().item()
        return torch.allclose(a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True)

    return all(close(a, b) for a, b in zip(tree_flatten(found)[0], tree_flatten(expected)[0], strict=True))


class _Rewriter:
    def __init__(self, old: fx.GraphModule, examples: Sequence[Tensor]):
        self.old, self.examples = old, list(examples)
        self.graph, self.root = fx.Graph(), torch.nn.Module()
        self.made: dict[Any, tuple[Any, list[Value]]] = {}
        self.constants: dict[int, fx.Node] = {}
        self.reshaped_from: dict[int, Value] = {}

    def run(self) -> fx.GraphModule:
        env: dict[fx.Node, Any] = {}
        for node in self.old.graph.nodes:
            if node.op == "placeholder":
                example = self.examples.pop(0)
                env[node] = _whole(Value(self.graph.placeholder(node.name), example))
            elif node.op == "get_attr":
                env[node] = _whole(Value(None, _rows_innermost(getattr(self.old, node.target))))
            elif node.op == "output":
                flat, spec = tree_flatten(node.args[0])
                found = [self.node(self.full(env[each])) for each in flat]
                self.graph.output(tree_unflatten(found, spec))
            else:
                args, kwargs = (
                    tree_map(lambda each: env[each] if isinstance(each, fx.Node) else each, each)
                    for each in (tuple(node.args), dict(node.kwargs))
                )
                env[node] = self.apply(node.target, args, kwargs)
        self.graph.eliminate_dead_code()
        return fx.GraphModule(self.root, self.graph)

    # The old graph's operations

    def apply(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is operator.getitem:
            return args[0][args[1]]
        rule = _RULES.get(target)
        if rule is not None and isinstance(args[0], Product):
            found = rule(self, *args, **kwargs)
            if found is not None:
                return found
        if torch.Tag.pointwise in target.tags and not target._schema.is_mutable:
            return self.pointwise(target, args, kwargs)
        args, kwargs = tree_map(lambda each: self.full(each) if isinstance(each, Product) else each, (args, kwargs))
        found = self.emit(target, args, kwargs)
        return tuple(map(_whole, found)) if isinstance(found, tuple) else _whole(found)

    def pointwise(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product:
        """Return an operation on single entries, done on no more of them than differ."""
        flat, spec = tree_flatten((args, kwargs))
        shape = torch.broadcast_shapes(*(each.shape for each in flat if isinstance(each, Product)))
        flat = [self.small(each, len(shape)) if isinstance(each, Product) else each for each in flat]
        args, kwargs = tree_unflatten(flat, spec)
        return Product(tuple(shape), 1.0, (self.emit(target, args, kwargs),))

    def mul(self, left: Product, right: Any) -> Product | None:
        if not isinstance(right, Product):
            return dataclasses.replace(left, scale=left.scale * right) if _is_real(left) else None
        if not (_is_real(left) and _is_real(right) and _dtype(left) == _dtype(right)):
            return None
        shape = tuple(torch.broadcast_shapes(left.shape, right.shape))
        parts = (*self.aligned(left, len(shape)), *self.aligned(right, len(shape)))
        return Product(shape, left.scale * right.scale, self.collected(parts))

    def div(self, left: Product, right: Any) -> Product | None:
        if not isinstance(right, Product):
            return dataclasses.replace(left, scale=left.scale / right) if _is_real(left) and right != 0 else None
        if not (_is_real(left) and _is_real(right) and _dtype(left) == _dtype(right)):
            return None
        below = self.small(right, len(right.shape))
        size = math.prod(torch.broadcast_shapes(*(part.example.shape for part in left.parts), below.example.shape))
        if below.example.numel() == size:
            return None
        inverse = Product(right.shape, 1.0, (self.emit(aten.reciprocal.default, (below,), {}),))
        return self.mul(left, inverse)

    def add(self, left: Product, right: Any, alpha: float = 1) -> Product | None:
        if not isinstance(right, Product):
            if not _is_real(left) or left.scale == 0:
                return None
            total = self.emit(aten.add.Scalar, (self.product(left.parts), alpha * right / left.scale), {})
            return Product(left.shape, left.scale, (total,))
        if not (_is_real(left) and _is_real(right) and _dtype(left) == _dtype(right)):
            return None
        shape = tuple(torch.broadcast_shapes(left.shape, right.shape))
        if left.scale == 0:
            return self.expand(dataclasses.replace(right, scale=alpha * right.scale), shape)
        if right.scale == 0:
            return self.expand(left, shape)
        mine, other = (list(self.aligned(each, len(shape))) for each in (left, right))
        common = []
        for part in list(mine):
            if any(part is each for each in other) and len(mine) > 1 and len(other) > 1:
                common.append(part)
                mine = _without(mine, part)
                other = _without(other, part)
        ratio = alpha * right.scale / left.scale
        total = self.emit(
            aten.add.Tensor, (self.product(mine), self.product(other)), {} if ratio == 1 else {"alpha": ratio}
        )
        return Product(shape, left.scale, self.collected((*common, total)))

    def sub(self, left: Product, right: Any, alpha: float = 1) -> Product | None:
        return self.add(left, right, -alpha)

    def neg(self, x: Product) -> Product | None:
        return self.mul(x, -1.0)

    def pow(self, x: Product, exponent: float) -> Product | None:
        return x if exponent == 1 and _is_real(x) else None

    def same(self, x: Product, *_: Any, **__: Any) -> Product:
        return x

    def cast(self, x: Product, *, dtype: Any = None, **others: Any) -> Product | None:
        return (
            x if dtype in (None, _dtype(x)) and not any(v for k, v in others.items() if k != "non_blocking") else None
        )

    def sum(
        self, x: Product, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: Any = None
    ) -> Product | None:
        if not _is_real(x) or dtype not in (None, _dtype(x)):
            return None
        rank = len(x.shape)
        axes = sorted({dim % rank for dim in dims}) if dims else list(range(rank))
        if not axes:
            return None
        varying = [part for part in x.parts if any(part.example.shape[axis] != 1 for axis in axes)]
        others = [part for part in x.parts if all(part is not each for each in varying)]
        scale = x.scale
        for axis in axes:
            if all(part.example.shape[axis] == 1 for part in varying):
                scale *= x.shape[axis]
        if varying:
            inner = self.product(varying)
            others.append(self.emit(aten.sum.dim_IntList, (inner, axes, True), {}))
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
        total = Product(shape, scale, self.collected(tuple(others)))
        return (
            total if keepdim else self.reshaped(total, tuple(n for axis, n in enumerate(x.shape) if axis not in axes))
        )

    def sum_all(self, x: Product, *, dtype: Any = None) -> Product | None:
        return self.sum(x, None, dtype=dtype) if x.shape else None

    def view(self, x: Product, shape: Sequence[int]) -> Product:
        known = -math.prod(shape) if -1 in shape else 1
        return self.reshaped(x, tuple(math.prod(x.shape) // known if size == -1 else size for size in shape))

    def unsqueeze(self, x: Product, dim: int) -> Product:
        dim %= len(x.shape) + 1
        return self.reshaped(x, (*x.shape[:dim], 1, *x.shape[dim:]))

    def squeeze(self, x: Product, dims: int | Sequence[int]) -> Product:
        axes = {dim % len(x.shape) for dim in ([dims] if isinstance(dims, int) else dims)}
        return self.reshaped(x, tuple(n for axis, n in enumerate(x.shape) if n != 1 or axis not in axes))

    def permute(self, x: Product, order: Sequence[int]) -> Product:
        order = [axis % len(x.shape) for axis in order]
        if order == list(range(len(order))):
            return x
        parts = tuple(self.emit(aten.permute.default, (part, order), {}) for part in x.parts)
        return Product(tuple(x.shape[axis] for axis in order), x.scale, parts)

    def transpose(self, x: Product, left: int, right: int) -> Product:
        order = list(range(len(x.shape)))
        order[left], order[right] = order[right], order[left]
        return self.permute(x, order)

    def expand(self, x: Product, shape: Sequence[int], **_: Any) -> Product:
        sizes = (*(1,) * (len(shape) - len(x.shape)), *x.shape)
        shape = tuple(size if new == -1 else new for size, new in zip(sizes, shape, strict=True))
        return Product(shape, x.scale, self.aligned(x, len(shape)))

    def index(self, x: Product, indices: Sequence[Product | None]) -> Product | None:
        """Return x where the index is all of a dimension in order, which takes nothing out."""
        return self._whole_dimension(x.shape, indices, lambda new, _: self.reshaped(x, new))

    def index_put(
        self, x: Product, indices: Sequence[Product | None], values: Product, accumulate: bool = False
    ) -> Product | None:
        if not self.is_zero(x):
            return None
        return self._whole_dimension(x.shape, indices, lambda new, old: self.reshaped(self.expand(values, new), old))

    def _whole_dimension(
        self, shape: tuple[int, ...], indices: Sequence[Product | None], then: Callable[..., Product]
    ) -> Product | None:
        taken = [(axis, index) for axis, index in enumerate(indices) if index is not None]
        if len(taken) != 1 or not _is_constant(taken[0][1]):
            return None
        axis, index = taken[0]
        values = self.full(index).example
        if values.dtype != torch.long or values.numel() != shape[axis]:
            return None
        if not torch.equal(values.reshape(-1), torch.arange(shape[axis], device=values.device)):
            return None
        return then((*shape[:axis], *values.shape, *shape[axis + 1 :]), shape)

    def fill(self, x: Product, value: float, **kwargs: Any) -> Product | None:
        return self.filled(x, x.shape, value, **kwargs)

    def zeros_like(self, x: Product, **kwargs: Any) -> Product | None:
        return self.filled(x, x.shape, 0.0, **kwargs)

    def ones_like(self, x: Product, **kwargs: Any) -> Product | None:
        return self.filled(x, x.shape, 1.0, **kwargs)

    def new_zeros(self, x: Product, shape: Sequence[int], **kwargs: Any) -> Product | None:
        return self.filled(x, shape, 0.0, **kwargs)

    def new_ones(self, x: Product, shape: Sequence[int], **kwargs: Any) -> Product | None:
        return self.filled(x, shape, 1.0, **kwargs)

    def filled(self, x: Product, shape: Sequence[int], value: float, *, dtype: Any = None, **_: Any) -> Product | None:
        """Return a constant of equal entries in the type of x, whatever the entries of x."""
        if not _is_real(x) or dtype not in (None, _dtype(x)):
            return None
        one = x.parts[0].example.new_ones((1,) * len(shape))
        return Product(tuple(shape), float(value), (Value(None, one),))

    def where(self, condition: Product, left: Product, right: Product) -> Product | None:
        """Return what a condition leaves of a product, taking it to the factors that vary no more than it does."""
        if not (isinstance(left, Product) and isinstance(right, Product) and _is_real(left) and self.is_zero(right)):
            return None
        shape = tuple(torch.broadcast_shapes(condition.shape, left.shape, right.shape))
        mask = self.small(condition, len(shape))
        parts = self.aligned(left, len(shape))
        inner = [
            part
            for part in parts
            if torch.broadcast_shapes(part.example.shape, mask.example.shape) == mask.example.shape
        ]
        others = [part for part in parts if all(part is not each for each in inner)]
        if not inner or not others:
            return None
        zero = Value(None, inner[0].example.new_zeros(()))
        kept = self.emit(aten.where.self, (mask, self.product(inner), zero), {})
        return Product(shape, left.scale, self.collected((*others, kept)))

    def cholesky(self, x: Product, **kwargs: Any) -> tuple[Product, Product]:
        factor, info = self.emit(aten.linalg_cholesky_ex.default, (self.full(x),), {**kwargs, "check_errors": False})
        regular = self.emit(aten.eq.Scalar, (info, 0), {})
        regular = self.reshape(regular, (*x.shape[:-2], 1, 1))
        nan = Value(None, factor.example.new_full((), math.nan))
        return _whole(self.emit(aten.where.self, (regular, factor, nan), {})), _whole(info)

    def check(self, *_: Any, **__: Any) -> tuple[()]:
        """Leave out a check that raises: NaNs say the same of the one point that they belong to."""
        return ()

    # Products

    def is_zero(self, x: Product) -> bool:
        return x.scale == 0 or (_is_constant(x) and not any(part.example.any() for part in x.parts))

    def aligned(self, x: Product, rank: int) -> tuple[Value, ...]:
        """Return the parts with leading dimensions of size 1 up to a rank."""
        if rank == len(x.shape):
            return x.parts
        lead = (1,) * (rank - len(x.shape))
        return tuple(self.reshape(part, (*lead, *part.example.shape)) for part in x.parts)

    def collected(self, parts: tuple[Value, ...]) -> tuple[Value, ...]:
        """Return the parts with the constants multiplied, which costs nothing later, and without those that are 1."""
        constants = [part for part in parts if part.node is None]
        others = [part for part in parts if part.node is not None]
        if constants:
            constant = self.product(constants)
            if constant.example.numel() > 1 or constant.example.item() != 1 or not others:
                others.append(constant)
        return tuple(others)

    def product(self, parts: Sequence[Value]) -> Value:
        """Return the product of parts, the small ones first."""
        first, *others = sorted(parts, key=lambda part: part.example.numel())
        for other in others:
            first = self.emit(aten.mul.Tensor, (first, other), {})
        return first

    def small(self, x: Product, rank: int) -> Value:
        """Return a product as one tensor that is no larger than need be, of at least the given rank."""
        parts = self.aligned(x, rank)
        first, *others = sorted(parts, key=lambda part: part.example.numel())
        if x.scale != 1:
            first = self.emit(aten.mul.Tensor, (first, x.scale), {})
        return self.product([first, *others])

    def full(self, x: Product) -> Value:
        """Return a product as one tensor of its shape."""
        value = self.small(x, len(x.shape))
        return (
            value
            if tuple(value.example.shape) == x.shape
            else self.emit(aten.expand.default, (value, list(x.shape)), {})
        )

    def reshape(self, value: Value, shape: tuple[int, ...]) -> Value:
        value = self.reshaped_from.get(id(value.example), value)
        if tuple(value.example.shape) == shape:
            return value
        found = self.emit(aten.reshape.default, (value, list(shape)), {})
        self.reshaped_from[id(found.example)] = value
        return found

    def reshaped(self, x: Product, shape: tuple[int, ...]) -> Product:
        """Return the product with its shape split and merged anew; parts stay small in the groups where they are."""
        if shape == x.shape:
            return x
        if 0 in shape:
            return _whole(self.reshape(self.full(x), shape))
        groups = _groups(x.shape, shape)
        parts = []
        for part in x.parts:
            sizes, spread, target = part.example.shape, list(part.example.shape), []
            for old, new in groups:
                if all(sizes[axis] == 1 for axis in old):
                    target += [1] * len(new)
                else:
                    for axis in old:
                        spread[axis] = x.shape[axis]
                    target += [shape[axis] for axis in new]
            if spread != list(sizes):
                parts.append(self.reshape(self.emit(aten.expand.default, (part, spread), {}), tuple(target)))
            else:
                parts.append(self.reshape(part, tuple(target)))
        return Product(shape, x.scale, tuple(parts))

    # The new graph

    def node(self, value: Value) -> fx.Node:
        """Return the node of a value, for constants one that reads it."""
        if value.node is not None:
            return value.node
        found = self.constants.get(id(value.example))
        if found is None:
            name = f"constant_{len(self.constants)}"
            self.root.register_buffer(name, value.example)
            found = self.constants[id(value.example)] = self.graph.get_attr(name)
        return found

    def emit(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an operation gives in the new graph: at once for constants, the same for the same arguments."""
        flat, spec = tree_flatten((args, kwargs))
        values = [each for each in flat if isinstance(each, Value)]
        key = (
            target,
            spec,
            tuple(id(each.example) if isinstance(each, Value) else (type(each), repr(each)) for each in flat),
        )
        if key in self.made:
            return self.made[key][0]
        e_args, e_kwargs = tree_unflatten([each.example if isinstance(each, Value) else each for each in flat], spec)
        example = target(*e_args, **e_kwargs)
        if all(each.node is None for each in values):
            found = (
                tuple(Value(None, each) for each in example)
                if isinstance(example, (tuple, list))
                else Value(None, example)
            )
        else:
            n_args, n_kwargs = tree_unflatten(
                [self.node(each) if isinstance(each, Value) else each for each in flat], spec
            )
            node = self.graph.call_function(target, n_args, n_kwargs)
            if isinstance(example, (tuple, list)):
                found = tuple(
                    Value(self.graph.call_function(operator.getitem, (node, i)), each) for i, each in enumerate(example)
                )
            else:
                found = Value(node, example)
        self.made[key] = found, values  # which live as long, so that no later tensor gets the number of one of them
        return found


_RULES: dict[Any, Callable[..., Any]] = {
    aten.mul.Tensor: _Rewriter.mul,
    aten.mul.Scalar: _Rewriter.mul,
    aten.div.Tensor: _Rewriter.div,
    aten.div.Scalar: _Rewriter.div,
    aten.add.Tensor: _Rewriter.add,
    aten.sub.Tensor: _Rewriter.sub,
    aten.neg.default: _Rewriter.neg,
    aten.pow.Tensor_Scalar: _Rewriter.pow,
    aten.sum.dim_IntList: _Rewriter.sum,
    aten.sum.default: _Rewriter.sum_all,
    aten.view.default: _Rewriter.view,
    aten.reshape.default: _Rewriter.view,
    aten._unsafe_view.default: _Rewriter.view,
    aten.unsqueeze.default: _Rewriter.unsqueeze,
    aten.squeeze.dim: _Rewriter.squeeze,
    aten.squeeze.dims: _Rewriter.squeeze,
    aten.permute.default: _Rewriter.permute,
    aten.transpose.int: _Rewriter.transpose,
    aten.expand.default: _Rewriter.expand,
    aten.index.Tensor: _Rewriter.index,
    aten.index_put.default: _Rewriter.index_put,
    aten.full_like.default: _Rewriter.fill,
    aten.zeros_like.default: _Rewriter.zeros_like,
    aten.ones_like.default: _Rewriter.ones_like,
    aten.new_zeros.default: _Rewriter.new_zeros,
    aten.new_ones.default: _Rewriter.new_ones,
    aten.where.self: _Rewriter.where,
    aten.alias.default: _Rewriter.same,
    aten.detach.default: _Rewriter.same,
    aten.clone.default: _Rewriter.same,
    aten.lift_fresh_copy.default: _Rewriter.same,
    aten._to_copy.default: _Rewriter.cast,
    aten.linalg_cholesky_ex.default: _Rewriter.cholesky,
    aten._linalg_check_errors.default: _Rewriter.check,
}


def _whole(value: Value) -> Product:
    return Product(tuple(value.example.shape), 1.0, (value,))


def _dtype(x: Product) -> torch.dtype:
    return x.parts[0].example.dtype


def _is_real(x: Product) -> bool:
    return _dtype(x).is_floating_point


def _is_constant(x: Product) -> bool:
    return all(part.node is None for part in x.parts)


def _without(parts: list[Value], part: Value) -> list[Value]:
    """Return the parts without one occurrence of a part."""
    where = next(i for i, each in enumerate(parts) if each is part)
    return parts[:where] + parts[where + 1 :]


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the finest groups of neighbouring dimensions of two shapes that hold equally many entries."""
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        mine, other = [], []
        left = right = 1
        if i < len(old):
            mine, left, i = [i], old[i], i + 1
        if j < len(new) and (left != 1 or not mine or new[j] == 1):
            other, right, j = [j], new[j], j + 1
        while left != right:
            if left < right:
                mine, left, i = [*mine, i], left * old[i], i + 1
            else:
                other, right, j = [*other, j], right * new[j], j + 1
        groups.append((mine, other))
    return groups


def _rows_innermost(x: Tensor) -> Tensor:
    """Return a constant with its longest dimension innermost in memory, along which everything made of it is fast."""
    if x.ndim < 2 or x.numel() == 0:
        return x
    axis = max(range(x.ndim), key=lambda axis: x.shape[axis])
    return x.movedim(axis, -1).contiguous().movedim(-1, axis)
