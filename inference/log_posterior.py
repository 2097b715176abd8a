"""The posterior of a Pyro program over unconstrained coordinates, for many points at once: what samplers walk on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform

from mixproof.inference.captured_graph import capture
from mixproof.inference.enumeration import (
    Coordinates,
    LogJoint,
    default_dtype_of,
    inspect,
    log_joint_table,
    trace_of,
    unconstrain,
)
from mixproof.inference.random_state import seeded
from mixproof.inference.validation import feasible_params

MAX_GRAPHS = 8
"""How many graphs are kept, one for each number of points; the one not used for longest goes."""


class Evaluation(NamedTuple):
    """The two parts of a log posterior at C points, and its slope."""

    gradient: Tensor
    """(C, P), of log_prior + temperature * log_likelihood in the coordinates."""
    log_prior: Tensor
    """(C,), log p(params) + log |d params / d u|, of the sites outside the rows: the prior density over the coordinates
    u, unless a parameter lies in the plates of the rows, as a random effect does: its density is in the likelihood."""
    log_likelihood: Tensor
    """(C,), log p(data | params), the discrete latents summed out."""


class LogPosterior:
    """log p(u | data) of ``model(*args)`` up to a constant, at C points of unconstrained coordinates u (C, P) at once.

    The program is run and differentiated once for each number of points, under ``torch.func.vmap``, and captured as a
    graph of tensor operations; each further evaluation costs these operations alone. A program that branches on the
    values of its parameters has no such graph: it is run point by point, after a warning.

    ``pyro.param`` sites count as parameters with a flat prior over their constrained values.

    Args:
        model: a Pyro program with enumerated latents, each row independent of the others given the parameters.
        args: its positional arguments, the data among them.
        batched: whether the arguments are tensors (C, ...) that hold C data sets, of which each point has its own: the
            c-th of C points is then evaluated on the c-th. What concerns one point alone takes the first.
        onto: the map from unconstrained coordinates onto a support.

    Raises:
        ValueError: as ``enumeration.inspect`` and ``enumeration.log_joint_table``, there is no continuous parameter,
            the support of one depends on others, or batched arguments are not finite tensors of one leading size.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *args: Any,
        batched: bool = False,
        onto: Callable[[Any], Transform] = unconstrain,
    ):
        self.batch: tuple[Tensor, ...] = _data_sets(args) if batched else ()
        if batched:
            args = tuple(values[0] for values in args)
        with feasible_params(*args):
            trace = trace_of(model, *args)
        example: dict[str, Any] = {
            name: site["value"].detach()
            for name, site in trace.nodes.items()
            if site["type"] == "param" or (site["type"] == "sample" and _is_parameter(site))
        }
        if not example:
            raise ValueError("the program has no continuous parameter to draw")
        self.param_sites = [name for name, site in trace.nodes.items() if site["type"] == "param"]
        self.model, self.args = model, args
        with torch.no_grad():
            self.program = inspect(model, example, *args)
            log_joint_table(model, self.program, example, *args)  # says in words what a graph could not
        self.coordinates = Coordinates(self.program.supports, example, onto)
        self._inside = self.coordinates.inverse(example)
        self._check_supports()
        self.size = len(self._inside)
        self.device = self._inside.device
        plates = _plates(trace.nodes[self.program.latents[0]])
        self.factors = [name for name, site in trace.nodes.items() if _is_factor(site, plates)]
        self.in_rows = [name for name in example if plates <= _plates(trace.nodes[name])]
        self._graphs: dict[Any, Callable[..., Any]] = {}
        self._by_point = False

    def _check_supports(self) -> None:
        """Refuse a program of which a support is another where the parameters are others."""
        elsewhere = self._inside + 0.25
        params = self.coordinates(elsewhere)
        with torch.no_grad():
            supports = inspect(self.model, params, *self.args).supports
        for name, transform in self.coordinates.transforms.items():
            there = self.coordinates.onto(supports[name])
            if not torch.equal(there.inv(params[name]), transform.inv(params[name])):
                raise ValueError(
                    f'the support of "{name}" depends on other parameters: draw it on a fixed support, as a share or a '
                    "multiple of them"
                )

    def __call__(self, u: Tensor, temperature: Tensor) -> Evaluation:
        """Return both parts and the slope at points u (C, P), the likelihood raised to powers (C,) between 0 and 1."""
        if self.batch and len(u) != len(self.batch[0]):
            raise ValueError(f"there are {len(self.batch[0])} data sets, and {len(u)} points: one each")
        if self._by_point:
            return self._one_by_one(u, temperature)
        key = (len(u), u.dtype, u.device)
        graph = self._graphs.pop(key, None)
        if graph is None:
            try:
                graph = self._captured(u)
            except RuntimeError as error:  # vmap and tracing refuse to branch on values
                found = self._one_by_one(u, temperature)  # the program's own errors come from here
                self._by_point = True
                reason = str(error).splitlines()[0]
                warnings.warn(
                    "the program depends on its parameters in a way that cannot be vectorised, by .item() or an if, "
                    f"and is run point by point, many times slower ({reason}): write it with torch.where",
                    stacklevel=2,
                )
                return found
            while len(self._graphs) >= MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
        self._graphs[key] = graph
        with torch.no_grad():
            gradient, (log_prior, log_likelihood) = graph(u, temperature, *self.batch)
        return Evaluation(gradient, log_prior, log_likelihood)

    def _captured(self, u: Tensor) -> Callable[..., Any]:
        """Return the graph for points like u (C, P): traced at others, where no matrix is singular to rounding."""
        inside = self._inside.to(u) + torch.linspace(-0.5, 0.5, u.numel()).to(u).reshape(u.shape)
        powers = torch.linspace(0.5, 1, len(u)).to(u)
        with torch.no_grad(), pyro.validation_enabled(False), default_dtype_of(*self.args, u):
            return capture(torch.func.vmap(torch.func.grad(self._at, has_aux=True)), inside, powers, *self.batch)

    def log_joint(self, params: Mapping[str, Tensor]) -> LogJoint:
        """Return the log joint density of rows and latents at parameters, by site; not differentiable."""
        with torch.no_grad(), pyro.validation_enabled(False):
            return log_joint_table(self.model, self.program, params, *self.args)

    def log_density(self, u: Tensor) -> Tensor:
        """Return log p(u, data), (), at one point u (P,), differentiable as often as one likes."""
        return self._at(u, u.new_ones(()))[0]

    def hessian(self, u: Tensor) -> Tensor:
        """Return the second derivatives (C, P, P) of log p(u | data) at points u (C, P)."""

        points = (u.detach(), torch.ones_like(u[:, 0]), *self.batch)

        def of_gradient(point: Tensor, *others: Tensor) -> Tensor:
            return torch.func.jacrev(torch.func.grad(partial(self._height, others)))(point)

        try:
            with pyro.validation_enabled(False), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                return torch.func.vmap(of_gradient)(*points)
        except RuntimeError:  # the program branches on values, as ``__call__`` says
            with torch.enable_grad():
                found = []
                for point, *others in zip(*points, strict=True):
                    found.append(torch.autograd.functional.hessian(partial(self._height, others), point))
                return torch.stack(found)

    def _at(self, u: Tensor, temperature: Tensor, *args: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        found = log_joint_table(self.model, self.program, self.coordinates(u), *(args or self.args), same_scales=True)
        log_prior = found.log_prior + self.coordinates.log_jacobian(u)
        return log_prior + temperature * found.log_likelihood, (log_prior, found.log_likelihood)

    def _height(self, others: Sequence[Tensor], u: Tensor) -> Tensor:
        return self._at(u, *others)[0]

    def _one_by_one(self, u: Tensor, temperature: Tensor) -> Evaluation:
        found = []
        for each, power, *args in zip(u, temperature, *self.batch, strict=True):
            point = each.detach().requires_grad_()
            with torch.enable_grad():
                total, parts = self._at(point, power, *args)
                (gradient,) = torch.autograd.grad(total, point)
            found.append((gradient, *(part.detach() for part in parts)))
        return Evaluation(*(torch.stack(each) for each in zip(*found, strict=True)))

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Return the parameters, (..., *shape) by site, at points u (..., P)."""
        flat = torch.func.vmap(self.coordinates)(u.reshape(-1, u.shape[-1]))
        return {name: value.reshape((*u.shape[:-1], *value.shape[1:])) for name, value in flat.items()}

    def log_jacobian(self, u: Tensor) -> Tensor:
        """Return log |d params / d u|, (...), at points u (..., P)."""
        return torch.func.vmap(self.coordinates.log_jacobian)(u.reshape(-1, u.shape[-1])).reshape(u.shape[:-1])

    def unconstrain(self, params: Mapping[str, Tensor]) -> Tensor:
        """Return the points u (C, P) of parameters (C, *shape) by site, inside their supports, in its own precision."""
        return torch.func.vmap(self.coordinates.inverse)(dict(params)).to(self._inside.dtype)

    def draw_prior(self, num_draws: int, *, seed: int) -> Tensor:
        """Return draws (num_draws, P) of the coordinates under the prior.

        Raises:
            ValueError: a parameter has an improper prior, as every ``pyro.param`` has, or part of the prior is a
                ``pyro.factor`` or an observation outside the rows, so that the program does not draw from it, or a
                parameter lies in the rows, so that its density counts as likelihood.
        """
        draws = self.draw_sites(num_draws, seed=seed)
        if self.in_rows:
            raise ValueError(
                f"the parameter {', '.join(self.in_rows)} lies in the plates of the rows: its density is part of the "
                "likelihood, to which a way from the prior comes last; integrate it out of the program, or draw by hmc "
                'and give the draws to method="bridge"'
            )
        if self.factors:
            raise ValueError(
                f"the prior includes the density of {', '.join(self.factors)}, which the program does not draw from: "
                "put it into the distributions of the parameters"
            )
        return draws

    def draw_sites(self, num_draws: int, *, seed: int) -> Tensor:
        """Return draws (num_draws, P) of the coordinates from the distributions of the sites, factors left out.

        Of C data sets, each in turn is that of a draw.

        Raises:
            ValueError: a parameter has an improper prior.
        """

        def draw(_: Tensor, *args: Tensor) -> Tensor:
            with _ProperSites():
                nodes: Any = poutine.trace(self.model).get_trace(*(args or self.args)).nodes
            return self.coordinates.inverse({name: nodes[name]["value"] for name in self.program.supports})

        numbers = torch.arange(num_draws)
        batch = [values[numbers % len(values)] for values in self.batch]
        with pyro.get_param_store().scope(), torch.no_grad(), default_dtype_of(*self.args), seeded(seed):
            try:
                draw(numbers)
            except _ImproperError as error:
                raise ValueError(f"{error}: it cannot be drawn from; give init, or a proper prior") from None
            try:
                with pyro.validation_enabled(False), warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    return torch.func.vmap(draw, randomness="different")(numbers, *batch)
            except RuntimeError:  # it branches on what it draws, or torch has no such draw for batches
                return torch.stack([draw(*each) for each in zip(numbers, *batch, strict=True)])


def _data_sets(args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return the arguments, each of which holds as many data sets."""
    if not args or not all(isinstance(values, Tensor) and values.ndim > 0 for values in args):
        raise ValueError("batched arguments must be tensors with a leading dimension of data sets: bind the others")
    for values in args:
        for number, value in enumerate(values):
            if not value.isfinite().all():
                raise ValueError(f"data set {number} holds an entry that is NaN or infinite: drop or impute its row")
    if len({len(values) for values in args}) > 1 or len(args[0]) == 0:
        sizes = ", ".join(str(len(values)) for values in args)
        raise ValueError(f"batched arguments must hold as many data sets each, at least one, not {sizes}")
    return args


class _ImproperError(Exception):
    """Of a prior that cannot be drawn from; no ValueError, to which Pyro would add the shapes of the whole trace."""


class _ProperSites(Messenger):
    """Says which site has no proper prior, where a program is run forwards."""

    def _pyro_sample(self, message: Any) -> None:
        if message["done"] or message["is_observed"] or message["value"] is not None:
            return
        try:
            message["value"] = _drawn(message["fn"])
        except NotImplementedError as error:
            raise _ImproperError(f'the prior of "{message["name"]}" is improper') from error

    def _pyro_param(self, message: Any) -> None:
        raise _ImproperError(f'the prior of the param site "{message["name"]}" is flat and improper')


def _drawn(distribution: Any) -> Tensor:
    """Return a draw; of a Dirichlet law by way of gamma variables, since torch's own does not run under vmap.

    log G(a) = log G(a + 1) + log(U) / a keeps small shapes from underflow (Marsaglia and Tsang 2000, section 6).
    """
    if not isinstance(distribution, torch.distributions.Dirichlet):
        return distribution.sample()
    shape = distribution.concentration
    uniform = torch.rand_like(shape).clamp(min=torch.finfo(shape.dtype).tiny)
    gamma = torch._standard_gamma(shape + 1)
    return (gamma.log() + uniform.log() / shape).softmax(-1)


def _is_factor(site: Mapping[str, Any], plates: set[str]) -> bool:
    """Whether a site adds to the density outside one of the plates of the rows without being drawn."""
    if site["type"] != "sample" or not site["is_observed"] or site["infer"].get("_deterministic"):
        return False
    return type(site["fn"]).__name__ != "_Subsample" and not plates <= _plates(site)


def _plates(site: Mapping[str, Any]) -> set[str]:
    return {frame.name for frame in site.get("cond_indep_stack", ())}


def _is_parameter(site: Mapping[str, Any]) -> bool:
    """Whether a sample site is a continuous latent: not observed, not enumerated, not a deterministic name."""
    known = site["is_observed"] or site["infer"].get("_deterministic") or type(site["fn"]).__name__ == "_Subsample"
    return not known and not site["fn"].support.is_discrete
