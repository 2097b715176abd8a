"""The log density of a Pyro program with its discrete latents summed out, as a function of its parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceEnum_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import IndependentTransform, Transform, biject_to, constraints, transform_to

import mixproof.models.positive_definite  # noqa: F401 - registers the coordinates of positive definite matrices
from mixproof.inference.log_ratios import LogRatios
from mixproof.inference.random_state import seeded
from mixproof.inference.supports import base_of, contains

Model = Callable[..., Any]


class Program(NamedTuple):
    """What a program says of itself when it is run once with its parameters set."""

    supports: dict[str, constraints.Constraint]
    """The support of each parameter site, ``pyro.sample`` or ``pyro.param``, that is not deterministic."""
    latents: tuple[str, ...]
    """The enumerated sites, in order of appearance."""
    latent_sizes: tuple[int, ...]
    """How many values each of them has."""
    max_plate_nesting: int
    """How many dimensions its plates take."""


class Bind(Messenger):
    """Runs a program at given parameters: sample sites are conditioned on them, param sites replaced by them."""

    def __init__(self, params: Mapping[str, Tensor]):
        super().__init__()
        self.params = params

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] in self.params:
            message["value"], message["is_observed"] = self.params[message["name"]], True

    def _pyro_param(self, message: Any) -> None:
        if message["name"] in self.params:
            message["value"], message["done"] = self.params[message["name"]], True


class _Checked(Messenger):
    """Says at which site a value is not one of the program's, before the program makes something else of it."""

    def __init__(self, params: Mapping[str, Tensor]):
        super().__init__()
        self._params = params

    def _pyro_post_sample(self, message: Any) -> None:
        if message["name"] in self._params:
            shape, expected = tuple(message["value"].shape), tuple(message["fn"].shape())
            if shape != expected:
                raise ValueError(f"{message['name']} has shape {shape}, and that of the program has {expected}")
            self._check_support(message, message["fn"].support)

    def _pyro_post_param(self, message: Any) -> None:
        if message["name"] in self._params:
            self._check_support(message, message["kwargs"].get("constraint", constraints.real))

    def _check_support(self, message: Any, support: constraints.Constraint) -> None:
        if not contains(support, message["value"]):
            raise ValueError(f"{message['name']} lies outside of its support, {base_of(support)}")


def bind(model: Model, params: Mapping[str, Tensor]) -> Model:
    """Return the program run at the given parameters."""
    return Bind(params)(model)


@contextmanager
def default_dtype_of(*values: Any) -> Iterator[None]:
    """Make torch's default dtype that of the first floating tensor, for the numbers a program and Pyro write out."""
    before = torch.get_default_dtype()
    dtypes = [value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    torch.set_default_dtype(dtypes[0] if dtypes else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _quiet_nan() -> Iterator[None]:
    """Leave out Pyro's warnings of NaN: the caller sees it in the result, and to a climb it is a wall like others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered", category=UserWarning)
        yield


def trace_of(model: Model, *args: Any, params: Mapping[str, Tensor] | None = None) -> Any:
    """Return Pyro's trace of one run of a program, at ``params`` where they are given.

    The global random generators are as they were afterwards.

    Raises:
        TypeError: an observation is a NumPy array, for which Pyro has no density.
        ValueError: a plate is empty, an observation is NaN or infinite, or a parameter has another shape than that of
            the program or lies outside of its support.
    """
    known = params or {}
    with pyro.get_param_store().scope(), torch.no_grad(), default_dtype_of(*args, *known.values()), seeded(0):
        try:
            trace: Any = poutine.trace(_Checked(known)(bind(model, known))).get_trace(*args)
        except ZeroDivisionError as error:
            if str(error) != "size cannot be zero":  # what Pyro says of a plate
                raise
            raise ValueError("a plate of the program is empty: the data need at least one row") from error
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and site["is_observed"] and name not in known:
            if isinstance(site["value"], np.ndarray):
                raise TypeError(f"{name} is observed to be a NumPy array: give the program tensors, torch.as_tensor(x)")
            _check_finite(name, torch.as_tensor(site["value"]))
    return trace


def inspect(model: Model, params: Mapping[str, Tensor], *args: Any) -> Program:
    """Return the parameter sites, their supports and the enumerated sites of ``model(*args)``.

    Args:
        model: a Pyro program.
        params: a value for each continuous latent site and each param site.

    Raises:
        ValueError: there is no enumerated site, a discrete site is not marked for enumeration, a continuous site has no
            value in ``params``, ``params`` names a site that the program does not have, or as ``trace_of``.
    """
    trace = trace_of(model, *args, params=params)
    supports, latents, nesting = {}, {}, 0
    for name, site in trace.nodes.items():
        if site["type"] == "param":
            supports[name] = site["kwargs"].get("constraint", constraints.real)
        if site["type"] != "sample":
            continue
        nesting = max([nesting, *(-frame.dim for frame in site["cond_indep_stack"] if frame.dim is not None)])
        if type(site["fn"]).__name__ == "_Subsample":
            continue
        if site["infer"].get("_deterministic"):
            continue
        if name in params:
            supports[name] = site["fn"].support
        elif not site["is_observed"] and site["fn"].support.is_discrete:
            if not site["fn"].has_enumerate_support:
                raise ValueError(f'site "{name}" is discrete with infinitely many values, and cannot be summed out')
            if site["infer"].get("enumerate") != "parallel":
                raise ValueError(
                    f'site "{name}" is discrete and not marked for enumeration: give it '
                    'infer={"enumerate": "parallel"}, or wrap the model in pyro.infer.config_enumerate'
                )
            latents[name] = site["fn"].enumerate_support(expand=False).shape[0]
        elif not site["is_observed"]:
            raise ValueError(f'site "{name}" is continuous, unobserved and not among the parameters {sorted(params)}')
    if unknown := sorted(set(params) - set(trace.nodes)):
        raise ValueError(f"the program has no site {', '.join(unknown)}; its parameter sites are {', '.join(supports)}")
    if missing := sorted(name for name, site in trace.nodes.items() if site["type"] == "param" and name not in params):
        raise ValueError(f"the param sites {', '.join(missing)} have no value among the parameters {sorted(params)}")
    if not latents:
        raise ValueError("the program has no enumerated site: there is no discrete latent to sum out")
    return Program(supports, tuple(latents), tuple(latents.values()), nesting)


def _check_finite(name: str, value: Tensor) -> None:
    """Refuse an observation that has no density; under a mask too, since its gradient would be NaN."""
    bad = ~value.isfinite()
    if bad.any():
        where = bad.nonzero()[0].tolist()
        what = f"{name}{where or ''} is observed to be {value[tuple(where)].item()}"
        raise ValueError(f"{what}: drop or impute the row; under a mask any number will do")


def log_density(model: Model, program: Program, params: Mapping[str, Tensor], *args: Any) -> Tensor:
    """Return log p(data, params), the discrete latents summed out by ``TraceEnum_ELBO``; differentiable in params."""
    elbo = TraceEnum_ELBO(max_plate_nesting=program.max_plate_nesting)
    differentiable = torch.is_grad_enabled() and any(value.requires_grad for value in params.values())
    with pyro.get_param_store().scope(), default_dtype_of(*args, *params.values()), _quiet_nan():
        loss = elbo.differentiable_loss if differentiable else elbo.loss
        return -torch.as_tensor(loss(bind(model, params), lambda *args: None, *args), dtype=torch.float64)


class LogJoint(NamedTuple):
    """The log joint density of data and latents, by enumeration, at given parameters."""

    rows: Tensor
    """(N, K), log p(x_n, z_n = k | params)."""
    log_prior: Tensor
    """(), log p(params), of the sites outside the plates of the latents, or outside some of them."""
    latent: Tensor
    """(N, K), the part log p(z_n = k | params) of ``rows``."""
    unobserved: Tensor
    """(N, K), the part of ``rows`` that no observation enters: ``latent``, and the log densities of the parameters in
    the plates of the latents."""
    row_weights: Tensor
    """(N,), how often each row counts: the program's ``poutine.scale``, or 1."""

    @property
    def log_likelihood(self) -> Tensor:
        """(), log p(x | params), the latents summed out; of parameters in their plates the density is part of it."""
        return self.row_weights @ self.rows.logsumexp(1)

    @property
    def log_likelihood_of_rows(self) -> Tensor:
        """(N,), log p(x_n | params), as often as the row counts, the latents summed out; exactly 0 of a masked row.

        No density of a parameter is part of it: log p(x_n, b_n | params) - log p(b_n | params) of parameters b_n in the
        plates of the latents.
        """
        return self.row_weights * (self.rows.logsumexp(1) - self.unobserved.logsumexp(1))

    def expected(self, resp: Tensor) -> Tensor:
        """Return Q, (): the expectation of log p(x, z | params) under responsibilities (N, K) or (N, K, L)."""
        resp = resp.reshape(self.rows.shape)
        return self.row_weights @ torch.where(resp > 0, resp * self.rows, 0).sum(1)


def log_joint(model: Model, params: Any, *args: Any) -> LogJoint:
    """Return the log joint density of any program with enumerated latents, by enumeration.

    Args:
        model: the program; ``model(*args)`` observes the data.
        params: a dict or NamedTuple with a value for each parameter site.
        args: the positional arguments of the program.

    Raises:
        ValueError: as ``inspect`` and ``log_joint_table``.
    """
    params = params if isinstance(params, Mapping) else params._asdict()
    return log_joint_table(model, inspect(model, params, *args), params, *args)


def log_joint_table(
    model: Model, program: Program, params: Mapping[str, Tensor], *args: Any, same_scales: bool = False
) -> LogJoint:
    """Return the log joint density of ``model(*args)`` at ``params``, differentiable in them.

    With more than one enumerated site, K counts their joint values, the first site varying slowest. The program must be
    independent over the plates that its enumerated sites share.

    Args:
        model: the program.
        program: what ``inspect`` says of it.
        params: a value for each parameter site.
        args: the positional arguments of the program.
        same_scales: whether an earlier call found that the sites of one row are scaled alike; a captured graph cannot
            look.

    Raises:
        ValueError: an enumerated site is in no plate, in a sequential one or in others than the first, an observation
            outside those plates depends on it, a plate is subsampled, or sites of one row count differently often.
    """
    first = -1 - program.max_plate_nesting
    with pyro.get_param_store().scope(), default_dtype_of(*args, *params.values()):
        trace: Any = poutine.trace(poutine.enum(bind(model, params), first_available_dim=first)).get_trace(*args)
    with _quiet_nan():
        trace.compute_log_prob()
    frames = trace.nodes[program.latents[0]]["cond_indep_stack"]
    if not frames:
        raise ValueError(f"the enumerated site {program.latents[0]} is in no plate, and so has no rows: give it one")
    for frame in frames:
        if frame.dim is None:
            raise ValueError(f'the plate {frame.name} is sequential: write "with pyro.plate(...)" for a loop over it')
    plates = {frame.name for frame in frames}
    dims = [trace.nodes[name]["infer"]["_enumerate_dim"] for name in program.latents]
    table = latent = unobserved = log_prior = torch.zeros(())
    scales = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample":
            continue
        if type(site["fn"]).__name__ == "_Subsample":
            if site["fn"].subsample_size not in (None, site["fn"].size):
                raise ValueError(f"the plate {name} is subsampled, and the log joint density is of all rows")
            continue
        if site["infer"].get("_deterministic"):
            continue
        own = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
        if name in program.latents and own.keys() != plates:
            raise ValueError(
                f"the enumerated sites {program.latents[0]} and {name} lie in different plates, {_listed(plates)} and "
                f"{_listed(own)}, and rows are not independent over both: put them in the same plates"
            )
        if not plates <= own.keys() and any(_size(site["log_prob"], dim) > 1 for dim in dims):
            raise ValueError(
                f"the site {name} depends on the enumerated site {program.latents[0]} and lies outside its plates "
                f"{_listed(plates)}, so that rows are not independent: put it into them"
            )
        if not plates <= own.keys():
            log_prior = log_prior + site["log_prob"].sum()
            continue
        mask = None if name in program.latents else site["mask"]  # else a masked row would add log K
        log_prob = scale_and_mask(site["unscaled_log_prob"], 1.0, mask)
        inner = [dim for plate, dim in own.items() if plate not in plates]
        log_prob = log_prob.sum(inner, keepdim=True) if inner else log_prob
        table = table + log_prob
        latent = latent + log_prob if name in program.latents else latent
        unobserved = unobserved + log_prob if name in program.latents or name in program.supports else unobserved
        scales[name] = site["scale"]
    rows = table.shape[len(table.shape) - program.max_plate_nesting :]
    shape = (
        *reversed(program.latent_sizes),
        *rows,
    )  # the first enumerated site has the rightmost enumeration dimension
    order = [*range(len(program.latents), len(shape)), *reversed(range(len(program.latents)))]
    parts = (part.expand(shape).permute(order).reshape(rows.numel(), -1) for part in (table, latent, unobserved))
    table, latent, unobserved = parts
    return LogJoint(table, log_prior, latent, unobserved, _row_weights(scales, rows, same_scales).to(table))


def _row_weights(scales: Mapping[str, float | Tensor], rows: torch.Size, known_same: bool) -> Tensor:
    """Return the one scale that all sites of a row have, spread over the rows."""
    first, *others = scales
    for other in others:
        if not known_same and not _same(scales[first], scales[other]):
            raise ValueError(f"the sites {first} and {other} of one row carry different scales: scale both alike")
    return torch.as_tensor(scales[first]).expand(rows).reshape(-1)


def _listed(plates: Iterable[str]) -> str:
    return ", ".join(sorted(plates)) or "none"


def _size(values: Tensor, dim: int) -> int:
    """Return the size of a negative dimension, 1 where it is absent."""
    return values.shape[dim] if values.ndim >= -dim else 1


def _same(left: float | Tensor, right: float | Tensor) -> bool:
    """Return whether two scales are equal."""
    return bool((torch.as_tensor(left) == torch.as_tensor(right)).all())


def unconstrain(support: constraints.Constraint) -> Transform:
    """Return a smooth map from unconstrained coordinates onto a support, one to one where there is such a map.

    For positive definite matrices torch has none, and it is ``LogCholesky``, which its module registers. For
    probabilities it is ``LogRatios`` in the place of torch's.
    """
    if support is constraints.simplex:
        return LogRatios()
    if isinstance(support, constraints.independent):
        return IndependentTransform(unconstrain(support.base_constraint), support.reinterpreted_batch_ndims)
    try:
        return biject_to(support)
    except NotImplementedError:
        return transform_to(support)


class Coordinates:
    """Unconstrained coordinates, one flat vector u (P,), of the parameters with a continuous support.

    The others, whole numbers among them, stay fixed.

    Args:
        supports: by site.
        params: by site, values inside the supports.
        onto: the smooth map onto a support.
    """

    def __init__(
        self,
        supports: Mapping[str, constraints.Constraint],
        params: Mapping[str, Tensor],
        onto: Callable[[Any], Transform] = unconstrain,
    ):
        self.onto = onto
        free = [name for name in params if name in supports and not supports[name].is_discrete]
        self.transforms = {name: onto(supports[name]) for name in free}
        self.fixed = {name: value for name, value in params.items() if name not in free}
        self.shapes = {name: transform.inv(params[name]).shape for name, transform in self.transforms.items()}

    def __call__(self, u: Tensor) -> dict[str, Tensor]:
        """Return the parameters at unconstrained coordinates u (P,)."""
        blocks = u.split([shape.numel() for shape in self.shapes.values()])
        free = {
            name: self.transforms[name](block.reshape(shape))
            for (name, shape), block in zip(self.shapes.items(), blocks, strict=True)
        }
        return {**self.fixed, **free}

    def log_jacobian(self, u: Tensor) -> Tensor:
        """Return log |d params / d u|, (), at unconstrained coordinates u (P,)."""
        blocks = u.split([shape.numel() for shape in self.shapes.values()])
        parts = []
        for (name, shape), block in zip(self.shapes.items(), blocks, strict=True):
            transform, inner = self.transforms[name], block.reshape(shape)
            parts.append(transform.log_abs_det_jacobian(inner, transform(inner)).sum())
        return torch.stack(parts).sum()

    def inverse(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the unconstrained coordinates (P,) of parameters inside their supports."""
        return torch.cat([transform.inv(params[name]).reshape(-1) for name, transform in self.transforms.items()])
