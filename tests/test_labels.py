"""Which axes number the components, and the numberings of draws made to agree."""

from __future__ import annotations

from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from mixproof.inference.labels import component_axes
from mixproof.inference.log_posterior import LogPosterior
from mixproof.models import gaussian_tied

from tests.conftest import Case


def with_equal_components(prior: Any) -> Any:
    """Return the prior with one concentration for all components."""
    if prior is None:
        return None
    values = {
        name: with_equal_components(value) if isinstance(value, tuple) else value
        for name, value in prior._asdict().items()
    }
    if "concentration" in values:
        values["concentration"] = torch.full_like(values["concentration"], 1.5)
    return prior._replace(**values)


def expected_axes(case: Case, latent: str) -> dict[str, int]:
    """Return the first axis of each parameter whose shape comment in the source starts with K."""
    part = {"k": "x_", "l": "y_"}.get(latent, "") if case.num_weights > 1 else ""
    shared = {"covariance"}
    return {name: 0 for name in case.free if name.startswith(part) and name not in shared}


def test_axes_are_those_of_the_families(case: Case, kind: str) -> None:
    """With as many features as components, where a (D, D) covariance has axes of length K too."""
    prior = with_equal_components(case.prior_or_flat(kind, k=2))
    posterior = LogPosterior(case.program(2, prior), case.data(0, 12, k=2))
    latent = posterior.program.latents[0]
    assert component_axes(posterior, latent) == expected_axes(case, latent)


@pytest.mark.parametrize("part", ["k", "l"])
def test_each_latent_of_the_sum_has_its_own(all_families: list[Case], part: str) -> None:
    case = next(case for case in all_families if case.name == "gaussian_sum")
    posterior = LogPosterior(case.program(3), case.data(0, 12))
    axes = component_axes(posterior, part)
    assert axes == expected_axes(case, part)
    with pytest.raises(ValueError, match="say of which one"):
        component_axes(posterior)
    with pytest.raises(ValueError, match="no latent 'z'"):
        component_axes(posterior, "z")


def test_components_of_known_noise_are_not_exchangeable(all_families: list[Case]) -> None:
    case = next(case for case in all_families if case.name == "KnownNoise")
    posterior = LogPosterior(case.program(3), case.data(0, 12))
    with pytest.raises(ValueError, match=r"components that l counts .* log joint density of the rows"):
        component_axes(posterior, "l")


def test_an_asymmetric_prior_is_seen(case: Case) -> None:
    prior = case.prior()  # concentrations that differ
    posterior = LogPosterior(case.program(3, prior), case.data(0, 12))
    latent = posterior.program.latents[0]
    if "weights" not in case.free and "x_weights" not in case.free:
        assert component_axes(posterior, latent) == {"probs": 0}
        return
    with pytest.raises(ValueError, match="the prior or a support tells them apart"):
        component_axes(posterior, latent)


X = torch.tensor([-1.0, 0.2, 0.5, 2.0, 2.5, 4.0], dtype=torch.float64)


def gaussians(x: Tensor, weights: Tensor, locs: Tensor, scales: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[z], scales[z]), obs=x)


def ordered(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    locs = pyro.sample("locs", dist.ImproperUniform(dist.constraints.ordered_vector, (), (3,)))
    gaussians(x, weights, locs, torch.ones(3))


def known_scales(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    gaussians(x, weights, locs, torch.tensor([1.0, 1.0, 2.0]))  # the first two are exchangeable, the third is not


def prior_means_differ(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    locs = pyro.sample("locs", dist.Normal(torch.tensor([0.0, 0.0, 1e-4]), 3.0).to_event(1))
    gaussians(x, weights, locs, torch.ones(3))


def sticks(x: Tensor) -> None:
    parts = pyro.sample("parts", dist.Beta(torch.ones(2), torch.full((2,), 2.0)).to_event(1))
    rest = torch.cat([parts.new_ones(1), (1 - parts).cumprod(0)])
    locs = pyro.sample("locs", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    gaussians(x, torch.cat([parts, parts.new_ones(1)]) * rest, locs, torch.ones(3))


@pytest.mark.parametrize("program", [ordered, known_scales, prior_means_differ, sticks])
def test_programs_with_named_components_are_refused(program: Any) -> None:
    with pytest.raises(ValueError, match="not exchangeable"):
        component_axes(LogPosterior(program, X))


def hierarchical(x: Tensor) -> None:
    """Each component has a prior of its own, whose scale no row sees, and its number is the last axis."""
    scales = pyro.sample("prior_scales", dist.Gamma(2.0, 1.0).expand([3]).to_event(1))
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2, 3), scales).to_event(2))
    offsets = pyro.sample("offsets", dist.Normal(torch.tensor([0.0, 1.0, 2.0]), 1.0).to_event(1))  # of length K, shared
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[0, z] + offsets[0], (locs[1, z] / 2).exp()), obs=x)


def test_axes_need_not_be_first_nor_seen_by_the_rows() -> None:
    assert component_axes(LogPosterior(hierarchical, X)) == {"prior_scales": 0, "locs": 1}


def test_one_component_has_one_name() -> None:
    posterior = LogPosterior(partial(gaussian_tied.model, num_components=1), X[:, None])
    assert component_axes(posterior) == {"weights": 0, "locs": 0}
