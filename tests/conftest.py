"""Finds the families by walking the package, and makes parameters, priors and data for any of them.

Everything comes from what the contract asks of a family: the sites and supports of its program, the annotations of its
settings, and the shape comment beside each hyperparameter. A new family needs no line here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from sklearn.datasets import load_digits, load_iris, load_sample_image
from torch import Tensor
from torch.distributions import constraints, transform_to

from mixproof.inference.validation import feasible_params
from mixproof.models import families

# The instances are tiny: a second thread costs each operation more than it saves, twentyfold on a busy machine.
torch.set_num_threads(1)

NUM_FEATURES = 2
SHAPE_COMMENT = re.compile(r"^\s*(\w+): Tensor\s+# \(([^)]*)\)", re.MULTILINE)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class Case:
    """A family under test."""

    name: str
    family: Any

    @property
    def module(self) -> ModuleType:
        return self.family if isinstance(self.family, ModuleType) else sys.modules[type(self.family).__module__]

    @property
    def num_weights(self) -> int:
        """The number of latents with weights of their own: 2 for the sum of two mixtures."""
        return sum(field.endswith("weights") for field in self.family.Params._fields)

    def num_components(self, k: int = 3) -> Any:
        """Return K as the program takes it; of several latents, one has k components and each further one fewer."""
        return k if self.num_weights == 1 else tuple(max(k - i, 1) for i in range(self.num_weights))

    def program(self, k: int = 3, prior: Any = None) -> Any:
        """Return ``model`` with everything bound but the data."""
        return partial(self.family.model, num_components=self.num_components(k), prior=prior)

    def sites(self, k: int = 3, num_features: int = NUM_FEATURES) -> dict[str, Any]:
        """Return the program's sites, run at an arbitrary point of its supports."""
        program = partial(self.program(k), num_data=2, num_features=num_features)
        with feasible_params(), poutine.trace() as tape:
            program()
        nodes: Any = tape.trace.nodes
        return {name: site for name, site in nodes.items() if site["type"] == "sample"}

    @property
    def free(self) -> tuple[str, ...]:
        """The fields of ``Params`` that the data decide; a known one is a deterministic site."""
        sites = self.sites()
        return tuple(name for name in self.family.Params._fields if not sites[name]["infer"].get("_deterministic"))

    @property
    def has_real_data(self) -> bool:
        return _is_real(self.sites()["x"]["fn"].support)

    @property
    def location(self) -> str:
        """The first field of ``Params`` that is a place in the space of the data."""
        sites = self.sites()
        return next(name for name in self.family.Params._fields if _is_real(sites[name]["fn"].support))

    def params(self, seed: int = 0, k: int = 3, num_features: int = NUM_FEATURES, spread: float = 1.0) -> Any:
        """Return random parameters, by torch's maps onto the supports of the sites; locations are ``spread`` wide."""
        generator, values = seeded(seed), {}
        sites = self.sites(k, num_features)
        for name in self.family.Params._fields:
            site = sites[name]
            if site["infer"].get("_deterministic"):
                values[name] = site["value"]
                continue
            support, shape = site["fn"].support, site["fn"].shape()
            if _is_real(support):
                values[name] = spread * randn(*shape, generator=generator)
                continue
            transform = transform_to(support)
            values[name] = transform(0.5 * randn(*transform.inverse_shape(shape), generator=generator))
        return self.family.Params(**values)

    def prior(self, seed: int = 0, k: int = 3, num_features: int = NUM_FEATURES) -> Any:
        """Return a random proper prior with a mode inside the supports."""
        return _random_prior(self.family.Prior, self.num_components(k), num_features, seeded(seed))

    def prior_or_flat(self, kind: str, seed: int = 0, k: int = 3) -> Any:
        return None if kind == "flat" else self.prior(seed, k)

    def data(self, seed: int = 0, num_data: int = 40, params: Any = None, k: int = 3) -> Tensor:
        """Return rows (N, D) drawn from the family, at random parameters unless given."""
        params = self.params(seed, k, spread=2.0) if params is None else params
        return self.family.sample(params, num_data, seeded(seed + 1))[0]

    def program_draws(self, params: Any, num_data: int, seed: int) -> dict[str, Tensor]:
        """Return the values of every site of the program, generating at given parameters."""
        k = tuple(value.shape[0] for name, value in params._asdict().items() if name.endswith("weights"))
        program = partial(self.family.model, num_components=k if len(k) > 1 else k[0])
        known = {name: getattr(params, name) for name in self.free}
        with torch.random.fork_rng(), poutine.trace() as tape:
            pyro.set_rng_seed(seed)
            poutine.condition(program, data=known)(num_data=num_data, num_features=num_features_of(params))
        nodes: Any = tape.trace.nodes
        return {name: site["value"] for name, site in nodes.items() if site["type"] == "sample"}

    def start(self, seed: int, x: Tensor, k: int = 3, prior: Any = None) -> Any:
        """Return the step of EM from random responsibilities: parameters from which no component collapses soon."""
        stats = self.family.statistics(self.params(seed, k), x, self.resp(seed, len(x), k))
        return self.family.m_step(stats, prior)

    def resp(self, seed: int, num_data: int, k: int = 3) -> Tensor:
        """Return random responsibilities, one column for each joint value of the latents."""
        columns = self.family.log_joint(self.params(0, k), self.data(0, 1, k=k)).shape[1]
        return randn(num_data, columns, generator=seeded(seed)).softmax(-1)


def _is_real(support: constraints.Constraint) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def num_features_of(params: Any) -> int:
    return params[1].shape[-1]


def _random_prior(prior: Any, num_components: Any, num_features: int, generator: torch.Generator) -> Any:
    """Return hyperparameters of the shapes that the source states, all above D + 1.

    That is a place, a number of pseudo-observations, degrees of freedom and a shape with a mode; matrices are positive
    definite besides. A prior made of priors, one for each part, gets each part's number of components.
    """
    shapes = dict(SHAPE_COMMENT.findall(inspect.getsource(prior)))
    sizes = {"D": num_features, "K": num_components}
    values: dict[str, Any] = {}
    for i, name in enumerate(prior._fields):
        if name not in shapes:
            values[name] = _random_prior(get_type_hints(prior)[name], num_components[i], num_features, generator)
            continue
        shape = [sizes[axis] for axis in re.findall(r"\w+", shapes[name])]
        value = num_features + 1 + torch.rand(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 2 and shape[0] == shape[1] == num_features:
            value = torch.eye(num_features, dtype=torch.float64) + value @ value.mT / 10
        values[name] = value
    return prior(**values)


def _random_setting(hint: Any, seed: int) -> Any:
    """Return a value for a setting by its annotation: a positive number, or the parameters of another family."""
    if hint is float:
        return 0.7
    owner = Case("setting", sys.modules[hint.__module__])
    assert hint is owner.family.Params, f"no rule for a setting of type {hint}"
    return owner.params(seed, k=2, spread=0.3)


def walk_families() -> Iterator[Case]:
    """Yield every family in ``mixproof.models``, those with settings at some value of each."""
    for name, family in families().items():
        if not isinstance(family, type):
            yield Case(name, family)
        elif "." in name:  # a class that is alone in its module goes by the module's name too
            hints = get_type_hints(family)
            settings = {field.name: _random_setting(hints[field.name], 7) for field in dataclasses.fields(family)}
            yield Case(family.__name__, family(**settings))


FAMILIES = list(walk_families())
assert len(FAMILIES) >= 8, "the walk over mixproof.models finds no families"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with an argument ``case`` for every family, and one with ``kind`` flat and under a prior.

    The families that its mark ``slow_for`` names are left to the long run.
    ``real_case`` stands for the families whose data may be shifted and scaled, ``missing_case`` for those that take
    missing entries.
    """
    if "case" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("slow_for")
        slow = mark.args if mark else ()
        assert set(slow) <= {case.name for case in FAMILIES}, f"no families are called {slow}"
        cases = [pytest.param(case, marks=[pytest.mark.slow] * (case.name in slow), id=case.name) for case in FAMILIES]
        metafunc.parametrize("case", cases)
    if "real_case" in metafunc.fixturenames:
        real = [case for case in FAMILIES if case.has_real_data]
        metafunc.parametrize("real_case", real, ids=[case.name for case in real])
    if "missing_case" in metafunc.fixturenames:
        able = [case for case in FAMILIES if hasattr(case.family, "log_joint_observed")]
        metafunc.parametrize("missing_case", able, ids=[case.name for case in able])
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize("kind", ["flat", "prior"])


ROOT = Path(__file__).resolve().parents[1]


def load_script(path: str) -> Any:
    """Return a script of this repository, which is in no package, as a module."""
    name = path.removesuffix(".py").replace("/", "_")
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def all_families() -> list[Case]:
    return FAMILIES


DATA = Path(__file__).parent / "data"


def _table(name: str) -> Tensor:
    return torch.as_tensor(np.loadtxt(DATA / name, delimiter=",", skiprows=1))


@pytest.fixture(scope="session")
def real_data() -> dict[str, Tensor]:
    """Three data sets of measurements and two of zeros and ones; tests/data/README.md has the sources."""
    digits = torch.as_tensor(load_digits().data) > 7.5
    pixels = torch.as_tensor(load_sample_image("flower.jpg").reshape(-1, 3)[::700] / 255.0)
    return {
        "iris": torch.as_tensor(load_iris().data),
        "faithful": _table("faithful.csv"),
        "flower": pixels,
        "carcinoma": _table("carcinoma.csv") - 1,
        "digits": digits[::6][:, digits.double().var(0) > 0.05].double(),
    }
