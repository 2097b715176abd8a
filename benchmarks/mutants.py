"""Change every line of the families' mathematics, one node at a time, and see whether the tests notice.

    python benchmarks/mutants.py [--family gaussian_full] [--function draw] [--list] [--workers 2] [--json FILE]

A mutant is one function with one node of its syntax tree replaced. It changes a result if some probe (random
parameters, data, responsibilities, allocations, priors, and the edges of their domains; of what draws, from a seeded
generator and under every sign of its normal variables) gives another value beyond rounding, or an exception; otherwise
it is equivalent, and counted apart. It is killed if a quick test of its family fails, or a claim of the exercise sheet;
of what the families share, a test of any family. Progress goes to stderr, the table to stdout; the exit status is 1 if
fewer than 98 % of the mutants that change a result are killed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import inspect
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import textwrap
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Literal, NamedTuple, cast
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

import mixproof.models
from mixproof.inference.verification.exercise_sheet import claims, verify_sheet
from mixproof.models import missing

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "test_contract",
    "test_limits",
    "test_references",
    "test_em",
    "test_missing",
    "test_bad_input",
    "test_exact_evidence",
    "test_gibbs",
    "test_default_priors",
)
SELECTION = ("-m", "not slow")
MATHEMATICS = (
    "log_joint",
    "statistics",
    "log_joint_observed",
    "statistics_observed",
    "m_step",
    "log_prior",
    "moments",
    "posterior",
    "draw_statistics",
    "draw",
    "log_marginal",
    "log_predictive",
    "weakly_informative_prior",
)
REQUIRED = 0.98
PATIENCE = 5.0  # seconds beyond ten times what a check takes without a mutation

# The mutation operators

OTHER_OPERATOR: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
}
OTHER_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}


def replacements(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield what a node may be replaced by, each with the name of the mutation operator."""
    match node:
        case ast.BinOp(left, operator, right):
            if other := OTHER_OPERATOR.get(type(operator)):
                yield "operator", ast.BinOp(left, other(), right)
            if isinstance(operator, ast.Sub | ast.Div | ast.MatMult):
                yield "operand order", ast.BinOp(right, operator, left)
            if isinstance(operator, ast.Add | ast.Sub):
                yield "sign added", ast.BinOp(negative(left), operator, right)
            yield "dropped operand", left
            yield "dropped operand", right
        case ast.Compare(left, [operator], [right]):
            for comparison in OTHER_COMPARISONS.get(type(operator), ()):
                yield "comparison", ast.Compare(left, [comparison()], [right])
        case ast.BoolOp(operator, values):
            yield "comparison", ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
        case ast.UnaryOp(ast.USub(), operand):
            yield "sign dropped", operand
            if isinstance(operand, ast.Constant) and isinstance(operand.value, int):
                yield "constant", ast.Constant(1 - operand.value)
        case ast.Constant(bool() as value):
            yield "constant", ast.Constant(not value)
        case ast.Constant(int() as value):
            yield "constant", ast.Constant(value + 1)
            yield "constant", ast.Constant(value - 1)
        case ast.Constant(float() as value):
            yield "constant", ast.Constant(2 * value)
            yield "constant", ast.Constant(value + 1)
        case ast.Attribute(value, "mT"):
            yield "dropped mT", value
        case ast.Subscript(value, index):
            yield "dropped index", value
            if isinstance(index, ast.Tuple):
                for i, element in enumerate(index.elts):
                    if isinstance(element, ast.Constant) and element.value is None:
                        without = [*index.elts[:i], *index.elts[i + 1 :]]
                        yield "moved None", ast.Subscript(value, ast.Tuple(without, ast.Load()), ast.Load())
                        for j in {max(i - 1, 0), min(i + 1, len(without))} - {i}:
                            moved = [*without[:j], element, *without[j:]]
                            yield "moved None", ast.Subscript(value, ast.Tuple(moved, ast.Load()), ast.Load())
        case ast.Call(function, arguments, keywords):
            for i in range(len(arguments) - 1):
                swapped = [*arguments[:i], arguments[i + 1], arguments[i], *arguments[i + 2 :]]
                yield "swapped arguments", ast.Call(function, swapped, keywords)
            for i, argument in enumerate(arguments):
                if not isinstance(argument, ast.Constant | ast.Starred | ast.UnaryOp | ast.Tuple):
                    signed = [*arguments[:i], negative(argument), *arguments[i + 1 :]]
                    yield "sign added", ast.Call(function, signed, keywords)
            for i in range(len(keywords)):
                yield "dropped keyword", ast.Call(function, arguments, [*keywords[:i], *keywords[i + 1 :]])
            if isinstance(function, ast.Attribute) and not is_module(function.value):
                yield "dropped call", function.value
            elif arguments and not isinstance(arguments[0], ast.Starred) and not ast.unparse(function)[0].isupper():
                yield "dropped call", arguments[0]
        case ast.Tuple(elements, ast.Load()) if not any(
            isinstance(e, ast.Constant | ast.Slice | ast.UnaryOp) for e in elements
        ):
            for i in range(len(elements) - 1):
                swapped = [*elements[:i], elements[i + 1], elements[i], *elements[i + 2 :]]
                yield "swapped arguments", ast.Tuple(swapped, ast.Load())
            for i, element in enumerate(elements):
                if not isinstance(element, ast.UnaryOp | ast.Starred):
                    signed = [*elements[:i], negative(element), *elements[i + 1 :]]
                    yield "sign added", ast.Tuple(signed, ast.Load())
        case ast.Assign(targets, value) if not isinstance(value, ast.Tuple | ast.UnaryOp):
            yield "sign added", ast.Assign(targets, negative(value))
        case ast.Return(value) if not isinstance(value, ast.Tuple | ast.UnaryOp | ast.Call | None):
            yield "sign added", ast.Return(negative(value))


def negative(node: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.USub(), node)


def is_module(node: ast.expr) -> bool:
    name = ast.unparse(node)
    return name in sys.modules or f"mixproof.models.{name}" in sys.modules


# Mutants


@dataclass(frozen=True)
class Mutant:
    """A function with one node replaced."""

    function: str
    """The name under which the function is among the targets."""
    line: int
    operator: str
    before: str
    """The statement as it is."""
    after: str
    """The statement with the replacement."""
    code: CodeType
    """Of the whole function, changed."""

    def __str__(self) -> str:
        return f"{self.function}, line {self.line}, {self.operator}\n    - {self.before}\n    + {self.after}"


def mutants(name: str, function: FunctionType) -> list[Mutant]:
    """Return the mutants of a function, each different from it and from one another after compilation."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    if ast.get_docstring(definition) is not None:
        del definition.body[0]
    seen = {_identity(_compiled(tree, function))}
    found: list[Mutant] = []

    def visit(parent: ast.AST, statement: ast.stmt | None) -> None:
        for field, value in ast.iter_fields(parent):
            for i, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(node, ast.AST):
                    continue
                own = node if isinstance(node, ast.stmt) else statement
                assert own is not None
                visit(node, own)
                before = _text(own)
                for operator, replacement in list(replacements(node)):
                    new = ast.copy_location(copy.deepcopy(replacement), node)
                    _put(parent, field, i, new)
                    after = _text(new if own is node else own)
                    code = _compiled(tree, function)
                    _put(parent, field, i, node)
                    if _identity(code) not in seen:
                        seen.add(_identity(code))
                        found.append(Mutant(name, own.lineno, operator, before, after, code))

    visit(ast.Module(definition.body, []), None)
    return found


def _compiled(tree: ast.Module, function: FunctionType) -> CodeType:
    source = function.__code__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # 2[..., None] is one
        module = compile(ast.fix_missing_locations(tree), source.co_filename, "exec")
    return next(value for value in module.co_consts if isinstance(value, CodeType) and value.co_name == source.co_name)


def _identity(code: CodeType) -> tuple[Any, ...]:
    return code.co_code, repr(code.co_consts), code.co_names, code.co_varnames


def _put(parent: ast.AST, field: str, i: int | None, node: ast.AST) -> None:
    if i is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[i] = node


def _text(statement: ast.AST) -> str:
    return ast.unparse(statement).split("\n", 1)[0]


# What is mutated: the contract's mathematics in each file of the models, and what it calls in them


def targets() -> dict[str, FunctionType]:
    """Return the functions to mutate by name, ``file.function`` or ``file.Class.function``."""
    pending: list[FunctionType] = []
    for family in mixproof.models.families().values():
        pending += [inspect.unwrap(getattr(family, name)) for name in MATHEMATICS if hasattr(family, name)]
    found: dict[str, FunctionType] = {}
    while pending:
        function = pending.pop()
        name = f"{function.__module__.rsplit('.', 1)[-1]}.{function.__qualname__}"
        if name not in found:
            found[name] = function
            called = [function.__globals__.get(each) for each in _names(function.__code__)]
            pending += [
                f for f in called if isinstance(f, FunctionType) and f.__module__.startswith("mixproof.models.")
            ]
    return dict(sorted(found.items(), key=lambda item: (file_of(item[0]), item[1].__code__.co_firstlineno)))


def _names(code: CodeType) -> Iterator[str]:
    """Yield the global names that a function uses, those of its comprehensions too."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


def file_of(name: str) -> str:
    return name.split(".", 1)[0]


# What a mutant changes: the functions' results at probes

Probe = Callable[[], Any]


def results(probes: Iterable[Probe]) -> Iterator[Any]:
    """Yield what each probe returns, as a tree of tensors, or the type of the exception that it raises."""
    for probe in probes:
        try:
            yield probe()
        except Exception as error:
            yield type(error)


def same(found: Any, expected: Any) -> bool:
    """Return whether two results agree, to rounding of the largest entry of each tensor."""
    actual, wanted = tree_flatten(found)[0], tree_flatten(expected)[0]
    if len(actual) != len(wanted):
        return False
    for a, b in zip(actual, wanted, strict=True):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            if a is not b:
                return False
            continue
        finite = torch.isfinite(b)
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(finite, torch.isfinite(a)):
            return False
        if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
            return False
        if finite.any():
            rounding = 2**12 * torch.finfo(b.dtype).eps * b[finite].abs().max()
            if (a[finite] - b[finite]).abs().max() > rounding:
                return False
    return True


def family_probes(case: Any) -> Iterator[Probe]:
    """Yield calls of a family's functions at random points and at the edges of their domains; case is the tests'."""
    family = case.family
    for seed, (k, num_features, num_data) in enumerate([(3, 2, 7), (2, 3, 6), (4, 2, 5), (1, 1, 4), (3, 3, 3)]):
        size = family.noise.locs.shape[-1] if hasattr(family, "noise") else num_features
        params = case.params(seed, k, size, spread=2.0)
        x = case.data(seed, num_data, params=params)
        resp = case.resp(seed, num_data, k)
        without = torch.cat([torch.zeros_like(resp[:, :1]), resp[:, 1:]], 1)  # a component without rows
        hard = torch.nn.functional.one_hot(resp.argmax(-1), resp.shape[-1]).to(resp)
        prior = case.prior(seed, k, size)
        edge = at_the_edge(params)
        batch = [tree_map(lambda *leaves: torch.stack(leaves), *pair) for pair in [(params, edge), (resp, hard)]]
        for point, rows in [(params, x), (edge, x), (params, 1 - x), single((params, x))]:
            yield partial(call, family, "log_joint", point, rows)
            yield partial(call, family, "moments", point)
        if hasattr(family, "log_joint_observed"):
            gaps = torch.arange(x.numel()).reshape(x.shape) % 5 < 2
            gaps[0], gaps[1] = True, False
            seen = torch.where(gaps, torch.nan, x)
            for point, rows, weights in [(params, seen, resp), (edge, seen, without), single((params, seen, resp))]:
                yield partial(call, family, "log_joint_observed", point, rows)
                yield partial(call, family, "statistics_observed", point, rows, weights)
            yield partial(torch.func.vmap(partial(call, family, "log_joint_observed"), (0, None)), batch[0], seen)
            observed = torch.func.vmap(partial(call, family, "statistics_observed"), (0, None, 0))
            yield partial(observed, batch[0], seen, batch[1])
        for law in (None, prior):
            for point, rows, weights in [(params, x, resp), (edge, x, without), (params, x, hard), (params, -x, hard)]:
                yield partial(step, family, point, rows, weights, law)
            point, rows, weights = single((params, x, resp))
            yield partial(step, family, point, rows, weights, None if law is None else single(law))
            yield partial(torch.func.vmap(partial(step, family), (0, None, 0, None)), batch[0], x, batch[1], law)
        for point in (params, edge):
            yield partial(call, family, "log_prior", point, prior)
        yield partial(call, family, "log_prior", *single((params, prior)))
        yield partial(torch.func.vmap(partial(call, family, "log_prior"), (0, None)), batch[0], prior)
        yield partial(torch.func.vmap(partial(call, family, "log_joint"), (0, None)), batch[0], x)
        yield partial(torch.func.vmap(partial(call, family, "moments")), batch[0])
        chains = [tree_map(lambda value: torch.stack([value, value]), params), torch.stack([hard, hard.flip(-1)])]
        for point, rows, allocations, law in [
            (params, x, hard, prior),
            (params, x[:0], hard[:0], prior),
            (chains[0], x, chains[1], prior),
            (chains[0], x[:0], chains[1][:, :0], prior),
            single((params, x, hard, prior)),
        ]:
            yield partial(given_allocations, family, point, rows, allocations, law, next_rows=x[:2])
        if hasattr(family, "weakly_informative_prior"):
            constant, unknown = x.clone(), x.clone()
            constant[:, -1], unknown[-1, -1] = 1, torch.nan
            for rows, number in [
                (x, k),
                (x[:1], k),
                (x[: x.shape[1]], k),
                (constant, k),
                (unknown, k),
                (x, 0),
                (x, 1.5),
            ]:
                yield partial(call, family, "weakly_informative_prior", rows, number)
            yield partial(call, family, "weakly_informative_prior", single(x), k)


def given_allocations(family: Any, params: Any, x: Tensor, resp: Tensor, prior: Any, next_rows: Tensor) -> Any:
    """Return what a family says of rows each in one component, and of two rows to come."""
    if hasattr(family, "draw_statistics"):
        stats = family.draw_statistics(params, x, resp, torch.Generator().manual_seed(0))
        found = [over_signs(partial(family.draw_statistics, params, x, resp))]
    else:
        stats = family.statistics(params, x, resp)
        found = []
    found.append(over_signs(partial(family.draw, params, stats, prior)))
    found += [call(family, name, stats, prior) for name in ("posterior", "log_marginal") if hasattr(family, name)]
    if hasattr(family, "log_predictive"):
        found += [family.log_predictive(stats, prior, rows) for rows in (next_rows[0], next_rows)[: resp.ndim - 1]]
    if hasattr(family, "posterior"):  # where rounding has left less than no scatter
        lost = {name: 0 * value for name, value in stats._asdict().items() if name.startswith(("squares", "scatter"))}
        found.append(family.posterior(stats._replace(**lost), prior))
    return found


def over_signs(draw: Callable[[torch.Generator], Any]) -> Any:
    """Return what is drawn from a seeded generator under every choice of signs for the calls of ``torch.randn``.

    The draws are in an order that depends on their values alone: the normal law is symmetric, so that a mutant which
    turns the sign of a normal variable draws from the same law, and gives the same result here.
    """
    normal = torch.randn
    found: list[Any] = []
    signs: list[int] = []  # of the calls so far

    def signed(*shape: Any, **options: Any) -> Tensor:
        signs.append(-1 if len(found) >> len(signs) & 1 else 1)
        return signs[-1] * normal(*shape, **options)

    while len(found) < 2 ** len(signs):
        signs.clear()
        with mock.patch.object(torch, "randn", signed):
            found.append(draw(torch.Generator().manual_seed(0)))
    leaves = [torch.cat([leaf.double().flatten() for leaf in tree_flatten(tree)[0]]).nan_to_num() for tree in found]
    keys = torch.stack(leaves) @ torch.arange(len(leaves[0])).double().cos()
    return tree_map(lambda *values: torch.stack(values)[keys.argsort()], *found)


def call(family: Any, name: str, *arguments: Any) -> Any:
    return getattr(family, name)(*arguments)


def step(family: Any, params: Any, x: Tensor, resp: Tensor, prior: Any) -> Any:
    stats = family.statistics(params, x, resp)
    return stats, family.m_step(stats, prior)


def single(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.to(torch.float32), tree)


def at_the_edge(params: Any) -> Any:
    """Return parameters with a weight of 0 and, where there are probabilities, some of 0 and 1."""
    values = params._asdict()
    for name, value in values.items():
        if name.endswith("weights"):
            first = torch.arange(len(value)) == 0
            values[name] = torch.where(first, 0, value) / value[1:].sum() if len(value) > 1 else value
        if name == "probs":
            values[name] = torch.where(value < 0.4, 0, torch.where(value > 0.6, 1, value))
    return type(params)(**values)


def matrix_probes(functions: dict[str, FunctionType]) -> Iterator[Probe]:
    """Yield calls of the functions of ``positive_definite`` at batches of matrices, some singular and some nearly."""
    generator = torch.Generator().manual_seed(0)
    for size, scale in [(1, 1.0), (2, 1e-12), (3, 1.0), (4, 1e12)]:
        roots = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
        matrices = scale * (roots @ roots.mT + 0.1 * torch.eye(size))
        near = matrices.clone()
        gap = torch.tensor([0.0, 0.5, 0.9, 1.1, 2.0, -1.0]).double() * size * torch.finfo(torch.float64).eps
        indefinite = matrices.clone()
        indefinite[0, 1, 0, 0] *= -1
        indefinite[1, 0, -1, -1] *= -1
        near[..., -1, -1] = scale
        near[..., :-1, -1] = near[..., -1, :-1] = 0
        if size > 1:  # conditional variance of the last coordinate given the one before
            near[..., -2, :] = near[..., :, -2] = 0
            near[..., -2, -2] = scale
            near[..., -2, -1] = near[..., -1, -2] = scale * (1 - gap.reshape(2, 3) / 2)
        for batch in (matrices, near, indefinite, matrices[0, 0], single(matrices)):
            yield partial(functions["positive_definite.cholesky"], batch)
        factor = torch.linalg.cholesky(matrices)
        for batch in (factor, factor[0, 0]):
            yield partial(functions["positive_definite.log_det"], batch)
            yield partial(functions["positive_definite.outer"], batch[..., 0])
        df = torch.tensor(size + 0.7, dtype=torch.float64)
        for batch in (matrices, matrices[0, 0]):
            yield partial(functions["positive_definite.log_inverse_wishart"], batch, df, matrices[1, 1] + 1)
            each_df = df + torch.arange(batch[..., 0, 0].numel()).reshape(batch.shape[:-2])
            draw = partial(functions["positive_definite.draw_inverse_wishart_root"], each_df, batch)
            yield partial(over_signs, draw)
        for matrix, num_rows in itertools.product([*matrices[0], *near[0], *near[1]], [size - 1, size, size + 1]):
            yield partial(functions["positive_definite.check_regular"], matrix, num_rows)


def conjugate_probes(functions: dict[str, FunctionType]) -> Iterator[Probe]:
    """Yield calls of the functions of ``conjugate`` at shapes down to where draws underflow, counts, and rows."""

    def drawn(name: str, *arguments: Tensor) -> list[Tensor]:
        result = over_signs(partial(functions[f"conjugate.{name}"], *arguments))
        return [result, result.log(), (-result).log1p()]  # where it is next to 0 or 1

    generator = torch.Generator().manual_seed(0)
    for exponents in (
        torch.ones(3),
        torch.linspace(-1, 1, 8).reshape(2, 4),
        torch.linspace(-300, 9, 36).reshape(3, 3, 4),
    ):
        shapes = 10 ** exponents.double()
        squares = torch.rand(shapes.shape, generator=generator, dtype=torch.float64)
        for each in (shapes, single(shapes.clamp_min(1e-30))):
            for name in ("draw_gamma", "draw_normal", "draw_uniform", "draw_dirichlet"):
                yield partial(drawn, name, each)
            yield partial(drawn, "draw_beta", each, each.flip(-1))
        counts = (5 * squares).round()
        for concentration in (shapes, shapes.flatten()[: shapes.shape[-1]]):
            yield partial(functions["conjugate.log_allocations"], counts, concentration)
            yield partial(functions["conjugate.log_urn"], counts, concentration)
        for size, rate in itertools.product([1, 3], [0.5, squares + 1]):
            yield partial(functions["conjugate.log_student"], squares, size, counts + 0.7, rate, squares.flip(-1) + 0.2)
    for x, num_components in itertools.product(row_probes(), [1, 3]):
        yield partial(functions["conjugate.data_scale"], x, num_components)


def initial_probes(functions: dict[str, FunctionType]) -> Iterator[Probe]:
    """Yield calls of the functions of ``initial`` that check rows and numbers of components."""
    for x in row_probes():
        yield partial(functions["initial.check_rows"], x)
    for number, most in itertools.product([-1, 0, 1, 2, 3, 1.5, True], [None, 2]):
        yield partial(functions["initial.check_num_components"], number, *([] if most is None else [most]))


def row_probes() -> list[Any]:
    """Return rows of several sizes, some of them none to read a scale from, and what is no matrix of numbers."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    constant, unknown = x.clone(), x.clone()
    constant[:, 1], unknown[2, 1] = 0.7, torch.nan
    return [x, x[:2], x[:1], x[:0], x[:, :1], x[:, 0], x.float(), x.long(), x.numpy(), x[None], constant, unknown]


def missing_probes(functions: dict[str, FunctionType]) -> Iterator[Probe]:
    """Yield calls of the functions of ``missing`` at rows with gaps, under covariances for each and one for all."""
    generator = torch.Generator().manual_seed(0)
    for size, num_data in [(1, 4), (2, 9), (4, 7)]:
        x = torch.randn(num_data, size, generator=generator, dtype=torch.float64)
        seen = torch.where(torch.rand(num_data, size, generator=generator) < 0.4, torch.nan, x)
        locs = torch.randn(3, size, generator=generator, dtype=torch.float64)
        roots = torch.randn(3, size, size, generator=generator, dtype=torch.float64)
        covariances = roots @ roots.mT + 0.1 * torch.eye(size)
        resp = torch.rand(num_data, 3, generator=generator, dtype=torch.float64).softmax(-1)
        for rows in (x, seen):
            groups = missing.patterns(rows)
            pieces = [rows[group.rows] for group in groups]
            yield partial(functions["missing.in_row_order"], pieces, groups)
            yield partial(functions["missing.in_row_order"], [torch.stack([piece, -piece]) for piece in pieces], groups)
            for matrices in (covariances, covariances[:1]):
                arguments = (locs, matrices, rows, resp)
                yield partial(functions["missing.expected_deviations"], *arguments)
                yield partial(functions["missing.expected_deviations"], *single(arguments))


# The driver: one process that has imported everything, and a fork of it for each mutant

Fate = Literal["equivalent", "killed", "survived"]


class Check(NamedTuple):
    """A test or a claim."""

    name: str
    passes: Callable[[], bool]
    file: str = ""
    """The file of the family that it is about; empty if it is about none in particular."""
    seconds: float = math.inf
    """What it takes without a mutation."""
    calls: frozenset[str] = frozenset()
    """The names of the targets that it calls."""


class Outcome(NamedTuple):
    """What became of a mutant."""

    mutant: Mutant
    fate: Fate
    killer: str
    """The check that failed; empty unless killed."""


def forked(
    tasks: Iterable[Callable[[Callable[[Any], None]], None]], num_workers: int
) -> Iterator[tuple[int, list[Any], int]]:
    """Run tasks in forks of this process, and yield each one's number, what it told, and its exit status.

    Args:
        tasks: called with a function that takes what there is to tell; an iterator is advanced when a fork is free.
        num_workers: how many run at a time.
    """
    context = multiprocessing.get_context("fork")
    running: dict[Any, tuple[int, Any, list[Any]]] = {}  # by the end of the pipe that we read
    pending = enumerate(tasks)
    while True:
        while len(running) < num_workers and (entry := next(pending, None)) is not None:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_quietly, args=(entry[1], sender))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: ours all sleep
                process.start()
            sender.close()
            running[receiver] = (entry[0], process, [])
        if not running:
            return
        for ready in multiprocessing.connection.wait(list(running)):
            number, process, told = running[ready]
            try:
                told.append(cast(Any, ready).recv())
            except EOFError:
                process.join()
                del running[ready]
                yield number, told, process.exitcode


def _quietly(task: Callable[[Callable[[Any], None]], None], sender: Any) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    task(sender.send)


def measured(checks: list[Check], functions: dict[str, FunctionType], num_workers: int) -> list[Check]:
    """Return the checks with the seconds they take and the functions they call, quick ones first.

    Raises:
        RuntimeError: a check fails without a mutation.
    """

    def run(part: list[Check], tell: Callable[[Any], None]) -> None:
        calls: set[str] = set()
        for name, function in functions.items():
            _record(function, name, calls)
        for check in part:
            calls.clear()
            started = time.perf_counter()
            passed = check.passes()
            tell((check.name, passed, time.perf_counter() - started, frozenset(calls)))

    by_name = {check.name: check for check in checks}
    found = []
    size = min(20, len(checks))  # 20 end-to-end cases: the claims of each share a fit
    parts = [checks[i::size] for i in range(size)]
    for _, told, _ in forked([partial(run, part) for part in parts], num_workers):
        for name, passed, seconds, calls in told:
            if not passed:
                raise RuntimeError(f"{name} fails without a mutation")
            found.append(by_name[name]._replace(seconds=seconds, calls=calls))
    if len(found) != len(checks):
        raise RuntimeError(f"{len(checks) - len(found)} of {len(checks)} checks did not end without a mutation")
    return sorted(found, key=lambda check: check.seconds)


def _record(function: FunctionType, name: str, calls: set[str]) -> None:
    """Make a function add its name to ``calls`` whenever it is called."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.body[:0] = ast.parse(f"_calls.add({name!r})").body
    function.__globals__["_calls"] = calls
    function.__code__ = _compiled(tree, function)


def survey(
    found: list[Mutant],
    functions: dict[str, FunctionType],
    checks: list[Check],
    probes: dict[str, list[Probe]],
    num_workers: int,
) -> Iterator[Outcome]:
    """Yield the fate of each mutant, as it is known.

    Args:
        found: the mutants.
        functions: the functions by name. A mutant's code is put into the function itself, in a fork, so that every
            module that has imported it runs the mutant.
        checks: as ``measured`` returns them. A mutant meets those that call its function and are about its file or
            none, until one fails or loses ``PATIENCE``; all that call it, if none is about its file, which families
            share. Those that killed many mutants of the function in little time come first.
        probes: for each file, the calls of which a mutant that is not equivalent changes a result.
        num_workers: how many forks run at a time.
    """
    expected: dict[str, list[Any]] = {}
    seconds: dict[str, float] = {}
    for file in {*map(_file, found)}:
        started = time.perf_counter()
        expected[file] = list(results(probes[file]))
        seconds[file] = time.perf_counter() - started
    kills: Counter[tuple[str, str]] = Counter()

    def judge(mutant: Mutant, own: list[Check], tell: Callable[[Any], None]) -> None:
        functions[mutant.function].__code__ = mutant.code
        file = _file(mutant)
        tell("a probe")
        signal.setitimer(signal.ITIMER_REAL, PATIENCE + 10 * seconds[file])
        if all(map(same, results(probes[file]), expected[file])):
            tell("equivalent")
            return
        for check in own:
            tell(check.name)
            signal.setitimer(signal.ITIMER_REAL, PATIENCE + 10 * check.seconds)
            if not check.passes():
                tell("killed")
                return
        tell("survived")

    files = {check.file for check in checks}

    def tasks() -> Iterator[Callable[[Callable[[Any], None]], None]]:
        for mutant in found:
            name, file = mutant.function, _file(mutant)
            own = [check for check in checks if name in check.calls]
            if file in files:
                own = [check for check in own if check.file in ("", file)]
            own.sort(key=lambda check: check.seconds / (1 + kills[name, check.name]))
            yield partial(judge, mutant, own)

    for number, told, status in forked(tasks(), num_workers):
        mutant = found[number]
        if told[-1] in ("equivalent", "survived"):
            yield Outcome(mutant, told[-1], "")
            continue
        killer = told[-2] if told[-1] == "killed" else told[-1]
        kills[mutant.function, killer] += 1
        how = "" if told[-1] == "killed" else " (time limit)" if status == -signal.SIGALRM else f" (exit {status})"
        yield Outcome(mutant, "killed", killer + how)


def _file(mutant: Mutant) -> str:
    return file_of(mutant.function)


# The tests and the claims


class Tests:
    """A pytest plugin that hands the collected tests, as checks, to a function instead of running them."""

    def __init__(self, use: Callable[[list[Check], list[Any]], None]):
        self.use = use
        self.failed = False

    def pytest_sessionstart(self) -> None:
        from hypothesis import Phase, settings  # after pytest, which rewrites its assertions

        settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate])
        settings.load_profile("mutants")  # a failure is enough: nobody reads the smallest one

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        checks, cases = [], {}
        for item in session.items:
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            case = parameters.get("case") or parameters.get("real_case")
            file = case.module.__name__.rsplit(".", 1)[-1] if case else ""
            if case:
                cases[case.name] = case
            name = item.nodeid.removeprefix("tests/")
            checks.append(Check(name, partial(self.passes, item), file))
        self.use(checks, list(cases.values()))
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def passes(self, item: pytest.Item) -> bool:
        self.failed = False
        item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        return not self.failed


def claim_holds(name: str) -> bool:
    """Return whether a claim of the exercise sheet gets the expected verdict."""
    try:
        return verify_sheet(0, [name], num_workers=1)[0].ok
    except Exception:
        return False


def claims_as_checks(files: set[str]) -> list[Check]:
    """Return the claims; an end-to-end claim, as E.em.bernoulli.digits, is about the one of the files that it names."""

    def about(name: str) -> str:
        return next((file for file in files if file and re.match(rf"E\.\w+\.{file}", name)), "")

    return [Check(claim.id, partial(claim_holds, claim.id), about(claim.id)) for claim in claims()]


def with_tests(use: Callable[[list[Check], list[Any]], None]) -> None:
    """Collect the tests and call a function with them, as checks, and with their cases of families."""
    paths = [str(ROOT / "tests" / f"{name}.py") for name in TESTS]
    output = io.StringIO()
    options = ["--quiet", "--capture=no", "--tb=line", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    with contextlib.redirect_stdout(output):
        status = pytest.main([*paths, *SELECTION, *options], plugins=[Tests(use)])
    if status != 0:
        raise SystemExit(output.getvalue())


# The report

EQUIVALENT_BECAUSE = [  # the first line whose mutation operator and pattern in the changed statement both match
    ("sign added", r"-torch\.nan", "a NaN has no sign that counts"),
    ("sign added", r"check_\w+\(-|weakly_informative_prior\(-", "rows are as finite, and as many, with another sign"),
    ("sign added|dropped call", r"_standard_gamma", "torch draws no smaller number"),
    (
        "sign added|constant",
        r"full_like\(-|ones_like\(|expand_as\(-|len\(-|draw_(normal|uniform)\(-|full_like\(\w+\[\.\.\., -1\]",
        "of this argument the shape and the type alone are used",
    ),
    (
        "sign added|operator|operand order|dropped call",
        r"draw_normal",
        "a normal variable has either sign by the same law",
    ),
    ("swapped arguments", r"log_urn", "counts and concentration add, in either order"),
    ("sign added|operand order", r"^weights = ", "a common sign cancels in weights / weights.sum()"),
    ("sign added|operand order", r"return .*variances @ params.weights", "an inner product commutes"),
    ("sign added|operand order", r"", "it enters by a square, an absolute value or an outer product with itself"),
    ("swapped arguments", r"moments", "the moments of independent summands add in either order"),
    ("constant", r"where\(probs", "the value stands where the row is excluded or its factor is 0"),
    ("constant", r"where\(missing", "the value stands where the entry is missing and its term is left out"),
    ("dropped mT", r"scatters \+ scatters", "they differ by rounding alone, which only many steps of EM would raise"),
    ("swapped arguments", r"transpose\(", "two axes are exchanged, whichever is named first"),
    ("comparison", r">= rounding", "differs where a variance is the threshold to the last bit, which no probe hits"),
    ("dropped keyword", r"torch\.eye\(.*dtype", "the probes are on one device"),
    (
        "constant|sign dropped|dropped keyword|dropped index",
        r"sum\(|shape|unflatten|half",
        "the same axis by another name, or kept and broadcast",
    ),
    ("constant", r"\[\.\.\., -1\]", "the axis has one entry, or each of its entries gives the same"),
    ("constant|dropped call", r"^raise ", "the words of an error change, and not its type"),
    ("dropped index|moved None|dropped call", r"", "broadcasting puts the missing axes in front"),
]


def why_equivalent(mutant: Mutant) -> str:
    """Return the reason why a mutant changes no result, as far as its look tells it."""
    for operators, pattern, reason in EQUIVALENT_BECAUSE:
        if re.fullmatch(operators, mutant.operator) and re.search(pattern, mutant.after):
            return reason
    return "unexplained: no probe sees a difference"


def table(outcomes: list[Outcome]) -> str:
    """Return the numbers of mutants for each file, by fate."""
    lines = ["file                mutants  equivalent  change a result  killed  survived  killed %"]
    files = list(dict.fromkeys(_file(outcome.mutant) for outcome in outcomes))
    for file in [*files, "all"]:
        fates = Counter(outcome.fate for outcome in outcomes if file in ("all", _file(outcome.mutant)))
        changing = fates["killed"] + fates["survived"]
        lines.append(
            f"{file:18}  {fates.total():7}  {fates['equivalent']:10}  {changing:15}  {fates['killed']:6}"
            f"  {fates['survived']:8}  {100 * share_killed(fates):8.1f}"
        )
    return "\n".join(lines)


def share_killed(fates: Counter[Fate]) -> float:
    changing = fates["killed"] + fates["survived"]
    return fates["killed"] / changing if changing else 1.0


def main() -> None:
    files = sorted({file_of(name) for name in targets()})
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--family", choices=files, action="append", help="mutate this file of models/ alone")
    parser.add_argument("--function", action="append", help="mutate the functions of this name alone")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="how many mutants run at a time")
    parser.add_argument("--json", type=Path, help="write the fate of each mutant to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    functions = targets()
    found = [
        mutant
        for name, function in functions.items()
        if not arguments.family or file_of(name) in arguments.family
        if not arguments.function or name.rsplit(".", 1)[1] in arguments.function
        for mutant in mutants(name, function)
    ]
    if arguments.list:
        print(*found, sep="\n")
        return
    outcomes: list[Outcome] = []
    started = time.perf_counter()

    def use(checks: list[Check], cases: list[Any]) -> None:
        files, wanted = {check.file for check in checks}, {*map(_file, found)}
        checks += claims_as_checks(files)
        if wanted <= files:
            checks = [check for check in checks if check.file in ("", *wanted)]
        checks = measured(checks, functions, arguments.workers)
        say(f"{len(checks)} tests and claims hold without a mutation; {len(found)} mutants")
        probes: dict[str, list[Probe]] = defaultdict(list)
        for case in cases:
            probes[case.module.__name__.rsplit(".", 1)[-1]] += family_probes(case)
        probes["positive_definite"] += matrix_probes(functions)
        probes["missing"] += missing_probes(functions)
        probes["conjugate"] += conjugate_probes(functions)
        probes["initial"] += initial_probes(functions)
        for outcome in survey(found, functions, checks, probes, arguments.workers):
            outcomes.append(outcome)
            if outcome.fate == "survived":
                say(f"survived: {outcome.mutant}")
            if len(outcomes) % 100 == 0:
                say(f"{len(outcomes)} of {len(found)} mutants")

    def say(words: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {words}", file=sys.stderr, flush=True)

    with_tests(use)
    order = {id(mutant): i for i, mutant in enumerate(found)}
    outcomes.sort(key=lambda outcome: order[id(outcome.mutant)])
    equivalent = [outcome.mutant for outcome in outcomes if outcome.fate == "equivalent"]
    for reason, group in itertools.groupby(sorted(equivalent, key=why_equivalent), why_equivalent):
        print(f"\nEquivalent: {reason}\n", *group, sep="\n")
    print("\nSurvived\n", *(outcome.mutant for outcome in outcomes if outcome.fate == "survived"), sep="\n")
    print(f"\n{table(outcomes)}")
    if arguments.json:
        rows = []
        for mutant, fate, killer in outcomes:
            values = {name: value for name, value in vars(mutant).items() if name != "code"}
            rows.append({**values, "fate": fate, "killer": killer})
        arguments.json.write_text(json.dumps(rows, indent=1))
    sys.exit(share_killed(Counter(outcome.fate for outcome in outcomes)) < REQUIRED)


if __name__ == "__main__":
    main()
