"""Errors in words: what was wrong with data or parameters, where, and what to do about it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.distributions import constraints, transform_to
from torch.utils._pytree import tree_leaves

from mixproof.inference.supports import base_of, contains


def check_integer(value: Any, name: str, least: int) -> None:
    """Say what is wrong with a setting that must be an integer, at least so large.

    Raises:
        TypeError: it is not an integer; a truth value is none.
        ValueError: it is smaller.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


def check_probability(value: float, name: str) -> None:
    """Say what is wrong with a setting that must lie between 0 and 1, neither of them included.

    Raises:
        ValueError: it does not.
    """
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, not {value}")


def check_tolerance(rtol: float) -> None:
    """Say what is wrong with the relative change at which to stop.

    Raises:
        ValueError: it is negative or not finite.
    """
    if not 0 <= rtol < math.inf:
        raise ValueError(f"rtol must be finite and not negative, and is {rtol}")


def check_generator(generator: Any) -> None:
    """Say what is wrong with a source of randomness that is none.

    Raises:
        TypeError: it is not a ``torch.Generator``.
    """
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, as torch.Generator().manual_seed(0), not {generator!r}")


def check_data(
    x: Any, support: constraints.Constraint | None = None, *, first_row: int = 0, missing: bool = False
) -> Tensor:
    """Return the data as a floating tensor (N, D), or say what is wrong with them.

    Args:
        x: (N, D), a tensor or anything numpy reads as a numeric matrix; integers and booleans become float64.
        support: the torch constraint that a single row, or each of its entries, must satisfy.
        first_row: the number of the first row in all the data, by which a message names the rows.
        missing: whether NaN marks a missing entry rather than a fault.

    Raises:
        TypeError: the data are not numbers, or an array has masked entries.
        ValueError: the shape is not (N, D) with N, D >= 1, or an entry is NaN, infinite or outside the support.
    """
    if not isinstance(x, Tensor):
        array = as_array(x, "x")
        if array.dtype.kind not in "buif":
            raise TypeError(f"x must hold numbers, not {array.dtype}: convert or encode the columns first")
        x = torch.as_tensor(array)
    if x.is_complex():
        raise TypeError("x must hold real numbers, not complex ones")
    if x.ndim != 2:
        hint = ": one feature is x[:, None]" if x.ndim == 1 else ""
        raise ValueError(f"x must have shape (N, D), not {tuple(x.shape)}{hint}")
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: it needs at least one row and one column")
    x = x.detach() if x.is_floating_point() else x.to(torch.float64)
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x holds {x.dtype}: convert it to float32 or float64, in which everything is computed")
    if missing:
        _raise_at_first(torch.isinf(x), x, "is {value}: only NaN marks a missing entry", first_row)
    elif not torch.isfinite(x.sum()):  # a sum tells it as surely, and ten times sooner, unless it overflows
        advice = "drop or impute the row (em takes missing=True, the command line --missing, where NaN marks a gap)"
        _raise_at_first(~torch.isfinite(x), x, f"is {{value}}: {advice}", first_row)
    if support is not None:
        elementwise = base_of(support)
        if elementwise is constraints.real:
            return x
        outside = ~elementwise.check(x) & ~torch.isnan(x)
        words = f"is {{value}}, outside the support of this family ({_words(elementwise)})"
        _raise_at_first(outside, x, words, first_row)
    return x


def check_rows(family: Any, x: Any, *, first_row: int = 0, missing: bool = False) -> Tensor:
    """Return the data (N, D) of a family as a floating tensor, or say what is wrong with them.

    Args:
        family: a family of the contract.
        x: (N, D), as ``check_data`` takes them.
        first_row: the number of the first row in all the data, by which a message names the rows.
        missing: whether NaN marks a missing entry rather than a fault.

    Raises:
        TypeError: the data are not numbers.
        ValueError: the shape is not (N, D) with N, D >= 1, D is not that of the family's settings, or an entry is not
            finite or outside the support of the family.
    """
    x = check_data(x, first_row=first_row, missing=missing)
    return check_data(x, data_support(family, x.shape[1]), first_row=first_row, missing=missing)


def check_row_weights(weights: Any, x: Tensor, *, first_row: int | None = None) -> Tensor | None:
    """Return row weights (N,) in the type of the data x (N, D), or say what is wrong with them.

    Args:
        weights: (N,), how often each row counts; None counts each once.
        x: (N, D).
        first_row: the number of the first row in all the data, by which a message names the rows; None if these are
            all the data.

    Raises:
        TypeError: they are not numbers.
        ValueError: there is not one for each row, one is negative or not finite, their sum overflows, or all of all the
            data are 0.
    """
    if weights is None:
        return None
    is_whole, first_row = first_row is None, first_row or 0
    weights = as_floating(weights, "weights").to(x)
    if weights.shape != x.shape[:1]:
        expected = f"({first_row + len(x)},), one for each row"
        if weights.ndim == 0:
            raise ValueError(f"weights must have shape {expected}, and is the number {weights.item()}")
        found = (first_row + len(weights), *weights.shape[1:])
        raise ValueError(f"weights must have shape {expected}, not {found}")
    bad = ~(torch.isfinite(weights) & (weights >= 0))
    if bad.any():
        row = int(bad.nonzero()[0])
        value = weights[row].item()
        raise ValueError(f"weights[{first_row + row}] is {value}: a weight must be finite and not negative")
    if not weights.sum().isfinite():
        raise ValueError(f"the weights add up to more than {weights.dtype} holds: give them in a larger unit")
    if is_whole and not weights.sum() > 0:
        raise ValueError("all weights are 0: at least one row must count")
    return weights


def check_params(family: Any, params: Any, num_features: int | None = None) -> Any:
    """Return the parameters of a family as floating tensors, or say which field is wrong and where.

    The shapes and supports come from the family's Pyro program, run once with the parameters put in its sites.

    Args:
        family: a family of the contract.
        params: its ``Params``, a mapping, or a sequence of its fields; entries may be numpy arrays or nested lists.
        num_features: D of the data the parameters must fit; None if there are none.

    Raises:
        TypeError: a field is missing, unknown, or not numeric.
        ValueError: a field has the wrong shape, is not finite, or leaves its support (weights off the simplex, a
            covariance that is not positive definite, a variance that is not positive).
    """
    fields = family.Params._fields
    if not isinstance(params, Mapping | list | tuple):
        raise TypeError(f"the parameters of this family are {', '.join(fields)}, not a {type(params).__name__}")
    if not isinstance(params, Mapping) and len(params) != len(fields):
        raise TypeError(f"the parameters of this family are {', '.join(fields)}, and there are {len(params)} values")
    values = params if isinstance(params, Mapping) else dict(zip(fields, params, strict=True))
    if unknown := set(fields) ^ set(values):
        raise TypeError(
            f"the parameters of this family are {', '.join(fields)}; missing or unknown: {', '.join(sorted(unknown))}"
        )
    tensors = {}
    for name in fields:
        tensors[name] = as_floating(values[name], name)
        if 0 in tensors[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}: it needs at least one entry")
        bad = ~torch.isfinite(tensors[name])
        if bad.any():
            where = ", ".join(str(i) for i in bad.nonzero()[0].tolist())
            raise ValueError(f"{name}[{where}] is {tensors[name][bad][0].item()}: every parameter must be finite")
    result = family.Params(**tensors)
    for name, (site, known) in _parameter_sites(family, result, num_features).items():
        value, shape = getattr(result, name), tuple(site.shape())
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; the other parameters and the data call for {shape}"
            )
        if known is not None:
            if not torch.allclose(value.to(known), known):
                raise ValueError(f"{name} is known in this family, {known.tolist()}, and not {value.tolist()}")
            continue
        valid = site.support.check(value)
        if not valid.all():
            at = tuple((~valid).nonzero()[0].tolist()) if valid.ndim else ()
            where = "".join(f"[{i}]" for i in at)
            raise ValueError(f"{name}{where} must be {_words(site.support)}, and is {_shown(value[at])}")
        if not contains(site.support, value):
            raise ValueError(f"{name} must be {_words(site.support)}, and is not symmetric: {_shown(value)}")
        if site.support is constraints.simplex:  # up to the last bit, where torch allows 1e-6
            result = result._replace(**{name: value / value.sum(-1, keepdim=True)})
    return result


def check_prior(family: Any, prior: Any, params: Any) -> Any:
    """Return a prior with every entry a tensor in the type of the parameters, or say what is wrong with it.

    Args:
        family: a family of the contract.
        prior: its ``Prior``, whose entries may be numbers, numpy arrays or nested lists; None is flat.
        params: its ``Params``, which the prior must fit.

    Raises:
        TypeError: the prior is not the family's, or holds something else than numbers.
        ValueError: a hyperparameter has a value that its distribution refuses, or a shape that does not fit.
    """
    if prior is None:
        return None
    prior = _convert(prior, family.Prior, params[0])
    try:
        sites = _parameter_sites(family, params, None, prior)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the prior does not define a distribution of the parameters: {error}") from error
    for name, (site, _) in sites.items():
        if site.shape() != getattr(params, name).shape:
            raise ValueError(
                f"the prior is one of {name} of shape {tuple(site.shape())}, "
                f"and the parameters have {tuple(getattr(params, name).shape)}"
            )
    _check_shapes(family, prior, num_components(params), _num_features(params))
    return prior


def check_proper_prior(family: Any, prior: Any, params: Any) -> Any:
    """Return a prior as ``check_prior`` does, which must be one of total mass 1.

    Args:
        family: a family of the contract.
        prior: its ``Prior``.
        params: its ``Params`` inside their supports, which the prior must fit.

    Raises:
        TypeError: as ``check_prior``.
        ValueError: the prior is None or improper, or as ``check_prior``.
    """
    if prior is None:
        raise ValueError(
            "prior is None, which is flat: the posterior of a mixture is then improper, because a component may be "
            f"empty, and it has no evidence. Give the family's Prior({', '.join(family.Prior._fields)}), such as "
            "family.weakly_informative_prior(x, num_components)"
        )
    prior = check_prior(family, prior, params)
    if not family.log_prior(params, prior).isfinite():
        raise ValueError(
            "the prior is improper, for it has no density inside its support, and neither posterior nor evidence is "
            "defined: is a strength 0?"
        )
    return prior


def as_floating(value: Any, name: str) -> Tensor:
    """Return a tensor, or what numpy reads as one, as a floating tensor; integers and booleans become float64.

    Raises:
        TypeError: it does not hold real numbers, or has masked entries; the message calls it by its name.
    """
    if isinstance(value, Tensor):
        tensor = value.detach()
    else:
        array = as_array(value, name)
        if array.dtype.kind not in "buifc":
            raise TypeError(f"{name} must hold numbers in the shape of an array, not {array.dtype}")
        tensor = torch.as_tensor(array)
    if tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers, not complex ones")
    return tensor if tensor.is_floating_point() else tensor.to(torch.float64)


def as_array(value: Any, name: str) -> np.ndarray:
    """Return what numpy reads as an array as one that torch shares without complaint.

    It is in C order and the machine's byte order, and writable; numpy calls an axis of length 1 contiguous whatever its
    stride.

    Raises:
        TypeError: it is no array, or has masked entries; the message calls it by its name.
    """
    check_unmasked(value, name)
    try:
        array = np.asarray(value, order="C")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must hold numbers in the shape of an array: {error}") from error
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array if array.flags.writeable and all(stride >= 0 for stride in array.strides) else array.copy()


def check_unmasked(value: Any, name: str) -> None:
    """Refuse an array with masked entries, whose values would be taken as if they were not.

    Raises:
        TypeError: an entry is masked.
    """
    if np.ma.is_masked(value):
        raise TypeError(
            f"{name} has masked entries: drop their rows, or fill them with NaN, {name}.astype(float).filled(np.nan), "
            "and pass missing=True where it is taken"
        )


def _convert(prior: Any, expected: Any, like: Tensor) -> Any:
    if not isinstance(prior, expected):
        raise TypeError(
            f"the prior of this family is a {expected.__qualname__}({', '.join(expected._fields)}), "
            f"not a {type(prior).__name__}"
        )
    values: dict[str, Any] = {}
    for name, value in prior._asdict().items():
        if isinstance(value, tuple):  # the prior of a part
            values[name] = type(value)(*_convert(value, type(value), like))
            continue
        values[name] = as_floating(value, f"{name} of the prior").to(like)
        if not torch.isfinite(values[name]).all():
            raise ValueError(f"{name} of the prior must be finite, and is {value}")
    return expected(**values)


def _num_features(params: Any) -> int:
    return params[1].shape[-1] if params[1].ndim else 1


def _check_shapes(family: Any, prior: Any, size: Any, num_features: int) -> None:
    """Hold a prior against the family's own for other rows, and each part of one against that of its family.

    Some wrong shapes broadcast where K = D, and mean one thing to the program and another to the closed forms.
    """
    if isinstance(prior[0], tuple):
        for part, part_size in zip(prior, size, strict=True):
            _check_shapes(sys.modules[type(part).__module__], part, part_size, num_features)
    elif hasattr(family, "weakly_informative_prior"):
        rows = torch.eye(num_features + 1, num_features, dtype=torch.float64)
        for name, expected in family.weakly_informative_prior(rows, size)._asdict().items():
            shape = getattr(prior, name).shape
            if shape != expected.shape:
                raise ValueError(f"{name} of the prior must have shape {tuple(expected.shape)}, not {tuple(shape)}")


def num_components(params: Any) -> int | tuple[int, ...]:
    """Return K as the family's program takes it: the length of ``weights``, or of each of several fields of weights."""
    sizes = tuple(value.shape[-1] for name, value in params._asdict().items() if name.endswith("weights"))
    return sizes[0] if len(sizes) == 1 else sizes


def check_num_components(family: Any, num_components: Any) -> int | tuple[int, ...]:
    """Return K as the family's program takes it, or say what is wrong with it.

    Raises:
        TypeError: it is not an integer, or a tuple of them for a family with several fields of weights.
        ValueError: a number is below 1.
    """
    groups = [name for name in family.Params._fields if name.endswith("weights")]
    sizes = num_components if len(groups) > 1 else (num_components,)
    if not isinstance(sizes, tuple) or len(sizes) != len(groups):
        raise TypeError(f"num_components must be a number for each of {', '.join(groups)}, not {num_components!r}")
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int | np.integer):
            raise TypeError(f"num_components must be an integer, not {size!r}")
        if size < 1:
            raise ValueError(f"num_components must be at least 1, not {size}")
    return tuple(map(int, sizes)) if len(groups) > 1 else int(sizes[0])


def example_params(family: Any, num_components: int | tuple[int, ...], x: Tensor) -> tuple[Any, tuple[str, ...]]:
    """Return parameters of the right shapes inside their supports, and the names of those that are not known.

    Args:
        family: a family of the contract.
        num_components: K as the family's program takes it.
        x: (N, D), the data, whose type and device the parameters get.
    """
    with feasible_params(*settings_of(family)), poutine.trace() as tape:
        family.model(num_components=num_components, num_data=1, num_features=x.shape[1])
    nodes: Any = tape.trace.nodes
    fields = family.Params._fields
    free = tuple(name for name in fields if not nodes[name]["infer"].get("_deterministic"))
    return family.Params(*(nodes[name]["value"].to(x) for name in fields)), free


def about_mean(params: Any, x: Tensor) -> Any:
    """Return parameters with their locations at the mean of rows x (N, D).

    Second moments are about them, and so lose nothing however far from zero the rows lie.
    """
    return params._replace(locs=x.mean(0).expand_as(params.locs)) if "locs" in params._fields else params


def data_support(family: Any, num_features: int) -> constraints.Constraint:
    """Return the torch constraint on one row of D features: the support of the site ``x`` of the family's program."""
    num_weights = sum(name.endswith("weights") for name in family.Params._fields)
    sizes = 1 if num_weights == 1 else (1,) * num_weights
    with feasible_params(*settings_of(family)), poutine.trace() as tape:
        family.model(num_components=sizes, num_data=1, num_features=num_features)
    program: Any = tape.trace
    return program.nodes["x"]["fn"].support


def _parameter_sites(
    family: Any, params: Any, num_features: int | None, prior: Any = None
) -> dict[str, tuple[Any, Tensor | None]]:
    """Return the distributions of the parameter sites, by the program's account, and the values of the known ones."""
    for name, value in params._asdict().items():
        least = 1 if name.endswith("weights") else 0
        if value.ndim < least:
            raise ValueError(f"{name} must have at least {least} axis, and is the number {value.item()}")
    features = num_features if num_features is not None else _num_features(params)
    with feasible_params(*params), poutine.trace() as tape:
        family.model(num_components=num_components(params), prior=prior, num_data=1, num_features=features)
    nodes: Any = tape.trace.nodes
    known = {name for name in params._fields if nodes[name]["infer"].get("_deterministic")}
    return {name: (nodes[name]["fn"], nodes[name]["value"] if name in known else None) for name in params._fields}


@contextmanager
def feasible_params(*like: Any, dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """Give parameter sites values in their supports, for running a program whose priors are flat, cannot be drawn from.

    The values lie where the first tensor of ``like`` does: the data's, the parameters' or those of a family's settings.
    """
    device = next((value.device for value in like if isinstance(value, Tensor)), torch.device("cpu"))
    # torch looks at each call of its own in the context of a device, which the CPU need not pay for
    with (
        torch.no_grad(),
        InitMessenger(partial(_feasible, dtype=dtype)),
        nullcontext() if device.type == "cpu" else device,
    ):
        yield


def settings_of(family: Any) -> list[Any]:
    """Return the numbers and tensors that a family is set to: none of a module."""
    return tree_leaves(vars(family)) if is_dataclass(family) else []


def _feasible(site: dict[str, Any], dtype: torch.dtype) -> Tensor:
    distribution = site["fn"]
    if distribution.support.is_discrete:
        return torch.zeros(distribution.shape(), dtype=torch.long)
    transform = transform_to(distribution.support)
    return transform(torch.zeros(transform.inverse_shape(distribution.shape()), dtype=dtype))


def _raise_at_first(bad: Tensor, x: Tensor, what: str, first_row: int) -> None:
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        count = int(bad.sum())
        more = f" (and {count - 1} more entries)" if count > 1 else ""
        raise ValueError(f"x[{first_row + row}, {column}] " + what.format(value=x[row, column].item()) + more)


def _shown(value: Tensor) -> str:
    """Return a value as a list, its middle left out where it is long."""
    if value.numel() <= 36:
        return str(value.tolist())
    return np.array2string(value.detach().cpu().numpy(), separator=", ", threshold=36).replace("\n", "")


def _words(support: Any) -> str:
    base = base_of(support)
    if base is constraints.boolean:
        return "0 or 1"
    if base is constraints.simplex:
        return "a probability vector: entries >= 0 that sum to 1"
    if base is constraints.positive_definite:
        return "a symmetric positive definite matrix"
    if isinstance(base, type(constraints.positive)):
        return "positive"
    if isinstance(base, type(constraints.unit_interval)):
        return "between 0 and 1"
    return str(base)
