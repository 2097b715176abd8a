"""Every front door computes where its data lie: the same numbers on an imitated device as on the CPU, to the last bit.

The device compares tensors by where they say they are. What a GPU does in another order is for ``test_cuda``, on one.
"""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mixproof.inference import log_posterior
from mixproof.inference.datatree import to_datatree
from mixproof.inference.em import em, responsibilities
from mixproof.inference.enumeration import default_dtype_of
from mixproof.inference.evidence import log_evidence
from mixproof.inference.exact_evidence import exact_log_evidence
from mixproof.inference.gibbs import gibbs
from mixproof.inference.hmc import hmc
from mixproof.inference.labels import align
from mixproof.inference.lloyd import kmeans, kmedians
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.nuts import nuts
from mixproof.inference.online_em import online_em
from mixproof.inference.posterior_mode import posterior_mode
from mixproof.inference.restarts import em_restarts
from mixproof.inference.sampling import sample
from mixproof.inference.standard_errors import bootstrap, standard_errors
from mixproof.inference.svi import guide_draws, svi
from mixproof.models import gaussian_full
from tests.conftest import Case, seeded
from tests.imitation_device import NAME, OnDevice, imitated, on_device

CHAINS = {"num_components": 2, "num_chains": 2, "num_draws": 5, "num_warmup": 2}


@pytest.fixture(autouse=True)
def _evaluate_without_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes tensors of no other class than torch's own: the density is evaluated as it would be traced."""

    def capture(function: Callable[..., Any], *_: Tensor) -> Callable[..., Any]:
        def evaluate(*args: Tensor) -> Any:
            with pyro.validation_enabled(False), default_dtype_of(*args):
                return function(*args)

        return evaluate

    monkeypatch.setattr(log_posterior, "capture", capture)


def assert_same(compute: Callable[..., Any], *args: Any) -> None:
    """Compare what a function returns for arguments on the CPU and on the device, where its result must lie."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # short runs do not converge
        expected = tree_leaves(compute(*args))
        with imitated():
            found = tree_leaves(compute(*on_device(args)))
    assert any(isinstance(leaf, OnDevice) for leaf in found) or not any(isinstance(leaf, Tensor) for leaf in found)
    for there, here in zip(found, expected, strict=True):
        if isinstance(here, Tensor):
            values = there.plain if isinstance(there, OnDevice) else there
            assert torch.equal(values.nan_to_num(), here.nan_to_num())
        else:
            assert there == here


def generator_at(x: Tensor) -> torch.Generator:
    return torch.Generator(x.device).manual_seed(0)


# The imitation itself


def test_device_refuses_what_a_gpu_refuses() -> None:
    with imitated():
        there = torch.ones(3, device=NAME)
        for mix in (
            lambda: there + torch.ones(3),
            lambda: torch.eye(3) @ there,
            lambda: torch.cat([there, torch.ones(1)]),
            lambda: torch.rand(2, device=NAME, generator=seeded(0)),
            lambda: torch.rand(2, generator=generator_at(there)),
        ):
            with pytest.raises(RuntimeError, match=r"to the device|from elsewhere"):
                mix()
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()
        assert (there + torch.tensor(1.0)).device == there.device
        assert torch.equal(there.cpu(), torch.ones(3))
        assert there[torch.tensor([0, 2])].tolist() == [1.0, 1.0]
        assert torch.vmap(lambda row: row @ there)(torch.ones(2, 3, device=NAME)).tolist() == [3.0, 3.0]


# Families


def placed(family: Any) -> Any:
    """Return a family with the tensors of its settings on the device."""
    if not dataclasses.is_dataclass(family) or isinstance(family, type):
        return family
    settings = {field.name: on_device(getattr(family, field.name)) for field in dataclasses.fields(family)}
    return dataclasses.replace(family, **settings)


def test_em_of_every_family(case: Case, kind: str) -> None:
    prior, x = case.prior_or_flat(kind, k=2), case.data(3, 60, k=2)
    start = case.start(1, x, k=2, prior=prior)

    def compute(x: Tensor, start: Any, prior: Any) -> Any:
        family = placed(case.family) if isinstance(x, OnDevice) else case.family
        fit = em(family, x, start, prior=prior, max_steps=3)
        return fit.params, fit.log_lik, responsibilities(family, fit.params, x)

    assert_same(compute, x, start, prior)


def test_draws_of_every_family(case: Case) -> None:
    prior, x = case.prior(k=2), case.data(3, 30, k=2)

    def compute(x: Tensor, prior: Any) -> Any:
        family = placed(case.family) if isinstance(x, OnDevice) else case.family
        settings = CHAINS | {"num_components": case.num_components(2)}
        draws = gibbs(family, x, prior, generator=generator_at(x), **settings)
        return draws.params, draws.sample_stats

    assert_same(compute, x, prior)


# Front doors


def model_under(prior: Any) -> Any:
    return partial(gaussian_full.model, num_components=2, prior=prior)


def few_draws(x: Tensor, prior: Any, **settings: Any) -> Any:
    return gibbs(gaussian_full, x, prior, generator=generator_at(x), **CHAINS | settings)


FEW_PARTICLES: dict[str, Any] = {"num_replicates": 4, "num_chains": 4, "num_moves": 4}


def resumed(run: Callable[..., Any]) -> Any:
    """Return what a run returns that goes on from where another ended."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state"
        run(checkpoint=file)
        return run(checkpoint=file)


FRONT_DOORS: dict[str, Callable[[Tensor, Any, Any], Any]] = {
    "accelerated em": lambda x, start, prior: em(gaussian_full, x, start, accelerate="anderson"),
    "weighted em": lambda x, start, prior: em(gaussian_full, x, start, weights=x[:, 0].square()),
    "incomplete em": lambda x, start, prior: em(
        gaussian_full, torch.where(x > 6, torch.nan, x), start, missing=True, max_steps=5
    ),
    "restarts": lambda x, start, prior: em_restarts(gaussian_full, x, [start, start._replace(locs=start.locs + 1)])[:1],
    "online em": lambda x, start, prior: online_em(gaussian_full, list(x.split(20)), start),
    "init_params": lambda x, start, prior: gaussian_full.init_params(x, 2, generator_at(x)),
    "init_params, seeded on the CPU": lambda x, start, prior: gaussian_full.init_params(x, 2, seeded(0)),
    "kmeans": lambda x, start, prior: kmeans(x, 2, generator=seeded(0), num_starts=2),
    "kmedians": lambda x, start, prior: kmedians(x, 2, generator=seeded(0), num_starts=2),
    "posterior_mode": lambda x, start, prior: posterior_mode(model_under(prior), start._asdict(), x),
    "sample": lambda x, start, prior: sample(gaussian_full, start, 10, generator=generator_at(x)),
    "svi": lambda x, start, prior: (
        guide_draws(
            model_under(prior), svi(model_under(prior), "AutoNormal", x, num_steps=5, seed=0), x, num_draws=3, seed=1
        ).params
    ),
    "tempered gibbs": lambda x, start, prior: few_draws(x, prior, temperatures=(1.0, 0.5)).params,
    "relabelled gibbs": lambda x, start, prior: few_draws(x, prior, relabel=True).params,
    "nuts": lambda x, start, prior: nuts(model_under(prior), x, num_chains=1, num_draws=2, num_warmup=3, seed=0).params,
    "exact evidence": lambda x, start, prior: exact_log_evidence(gaussian_full, x[:6], prior, num_components=2),
    "bridge": lambda x, start, prior: log_evidence(model_under(prior), x[:8], seed=0, **FEW_PARTICLES)[:2],
    "resumed hmc": lambda x, start, prior: (
        resumed(partial(hmc, model_under(prior), x, num_chains=4, num_draws=2, num_warmup=20, seed=0)).params
    ),
    "resumed gibbs": lambda x, start, prior: resumed(partial(few_draws, x, prior)).params,
    "resumed particles of temperatures": lambda x, start, prior: resumed(
        partial(log_evidence, model_under(prior), x[:8], method="smc", seed=0, **FEW_PARTICLES)
    )[:2],
    "resumed particles of rows": lambda x, start, prior: resumed(
        partial(log_evidence, model_under(prior), x[:8], method="smc", seed=0, family=gaussian_full, **FEW_PARTICLES)
    )[:2],
    "stephens": lambda x, start, prior: (
        align(few_draws(x, prior), LogPosterior(model_under(prior), x), method="stephens").params
    ),
    "equivalence": lambda x, start, prior: (
        align(few_draws(x, prior), LogPosterior(model_under(prior), x), method="equivalence").params
    ),
    "datatree": lambda x, start, prior: (
        to_datatree(few_draws(x, prior), LogPosterior(model_under(prior), x), seed=0, family=gaussian_full)[
            "log_likelihood"
        ]["x"]
        .to_numpy()
        .tolist()
    ),
    "standard errors": lambda x, start, prior: standard_errors(
        LogPosterior(partial(gaussian_full.model, num_components=2), x), em(gaussian_full, x, start).params
    ),
    "bootstrap": lambda x, start, prior: (
        bootstrap(
            gaussian_full, x, em(gaussian_full, x, start).params, num_replicates=3, generator=generator_at(x)
        ).params
    ),
}


LONG = {"posterior_mode", "datatree", "resumed hmc", "resumed particles of temperatures"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in FRONT_DOORS]
)
def test_front_doors(name: str) -> None:
    noise = torch.randn(60, 2, generator=seeded(1), dtype=torch.float64)
    x = noise + 5.0 * (torch.arange(60) < 30)[:, None]
    prior = gaussian_full.weakly_informative_prior(x, 2)
    assert_same(FRONT_DOORS[name], x, gaussian_full.init_params(x, 2, seeded(0)), prior)
