"""Devices: on a GPU everything agrees with the CPU; without one, no function mixes devices or goes through the host.

A tensor on torch's device ``meta`` has a shape and no values, so that a mistake about devices shows on any machine.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mixproof.inference.em import em, responsibilities
from mixproof.inference.expectation import Workspace, expectation
from mixproof.inference.lloyd import kmeans, kmedians
from mixproof.inference.posterior_mode import posterior_mode
from mixproof.inference.restarts import em_restarts
from mixproof.inference.sampling import sample
from mixproof.models import gaussian_diagonal
from tests.conftest import Case, seeded

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
both_types = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def moved(tree: Any, device: str, dtype: torch.dtype) -> Any:
    return tree_map(lambda leaf: leaf.to(device, dtype) if isinstance(leaf, Tensor) else leaf, tree)


def assert_agree(found: Any, expected: Any, dtype: torch.dtype, growth: float) -> None:
    """Compare what lies on a GPU with the CPU's: sums in another order, each rounding grown by so much."""
    tolerance = growth * torch.finfo(dtype).eps
    for gpu, cpu in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert gpu.device.type == "cuda"
        scale = max(1.0, cpu.abs().max().item())
        torch.testing.assert_close(gpu.cpu(), cpu, rtol=tolerance, atol=tolerance * scale)


# Without a GPU


class NoHost(TorchFunctionMode):
    """Fails where values go to the host as numbers or arrays."""

    forbidden = ("item", "tolist", "numpy", "cpu", "__array__", "__float__", "__int__", "__index__")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.forbidden:
            raise AssertionError(f"Tensor.{func.__name__} takes values to the host")
        return func(*args, **(kwargs or {}))


class CountWaits(TorchDispatchMode):
    """Counts the operations at which the host would wait for a GPU: reading a number, or a shape that values decide."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.waiting:
            self.waits.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def waits_of(function: Callable[[], Any]) -> list[str]:
    with NoHost(), CountWaits() as mode:
        function()
    return mode.waits


def test_modes_catch_planted_round_trips() -> None:
    x = torch.ones(3)
    for trip in (x[0].item, x.tolist, x.numpy, x.cpu, x[0].__float__):
        with pytest.raises(AssertionError, match="to the host"):
            waits_of(trip)
    for wait in (x[0].__bool__, x.nonzero, x.unique):
        assert waits_of(wait)
    assert waits_of(lambda: x.softmax(0) @ x) == []


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_pass_waits_at_most_for_its_choice_of_sums(case: Case, weighted: bool) -> None:
    """Moments are used if exact before the pass and after it: two questions, however many chunks."""
    params, x = case.params(1), case.data(2, 64)
    weights = torch.rand(64, generator=seeded(3), dtype=torch.float64) if weighted else None
    counts = [waits_of(partial(expectation, case.family, params, x, weights, chunk=chunk)) for chunk in (64, 4)]
    assert counts[0] == counts[1]
    assert len(counts[0]) <= 2
    assert set(counts[0]) <= {"_local_scalar_dense"}


class OneDevice(TorchDispatchMode):
    """Fails where an operation takes a tensor from elsewhere than the device; a number () may come from the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.ndim and leaf.device.type != "meta":
                raise AssertionError(f"{func} takes a tensor from the {leaf.device.type}")
        return func(*args, **(kwargs or {}))


def on_meta(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, tree)


def test_mode_catches_planted_mixing() -> None:
    x = torch.ones(3, device="meta")
    with OneDevice():
        assert (x + torch.tensor(1.0)).device.type == "meta"
    for mix in (lambda: x + torch.ones(3), lambda: torch.eye(3) @ x, lambda: torch.ones(3)[:2]):
        with OneDevice(), pytest.raises(AssertionError, match="takes a tensor from the cpu"):
            mix()


def test_functions_of_a_family_stay_on_the_device(case: Case, kind: str) -> None:
    family = case.family
    if case.name == "KnownNoise":
        pytest.skip("its setting holds tensors, which stay where they were made")
    prior, params, x, resp = case.prior_or_flat(kind), case.params(1), case.data(2, 40), case.resp(3, 40)
    prior, params, x, resp = (on_meta(value) for value in (prior, params, x, resp))
    with OneDevice():
        found = [family.log_joint(params, x), family.m_step(family.statistics(params, x, resp), prior)]
        found.append(family.moments(params))
        if prior is not None:
            found.append(family.log_prior(params, prior))
        center = family.moments(params)[0]
        if hasattr(family, "features"):
            features = family.features(x, center)
            found += [features, family.natural(params, center), family.reach(params, center)]
            found.append(family.statistics_of(features @ resp, params, center))
        if hasattr(family, "prepare"):
            form = family.prepare(params, center)
            space = Workspace(x)
            table = form.table(x[None], space)
            sums = [part.sum(0) for part in form.sums(x[None], resp.mT[None].contiguous(), space)]
            found += [table, form.statistics(tuple(sums))]
        assert {leaf.device.type for leaf in tree_leaves(found)} == {"meta"}


# On a GPU


@needs_gpu
@both_types
def test_em_and_responsibilities_agree(case: Case, kind: str, dtype: torch.dtype) -> None:
    """Three steps: each multiplies a rounding by the condition of a step, which is below 100 for these data."""
    prior, x = case.prior_or_flat(kind, k=2), case.data(3, 200, k=2)
    start = case.start(1, x, k=2, prior=prior)
    fits = []
    for device in ("cpu", "cuda"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # three steps are not to converge
            fit = em(case.family, moved(x, device, dtype), moved(start, device, dtype), prior=prior, max_steps=3)
        fits.append((fit.params, responsibilities(case.family, fit.params, moved(x, device, dtype))))
    assert_agree(fits[1], fits[0], dtype, growth=100**2 * math.sqrt(len(x)))


@needs_gpu
@both_types
def test_restarts_agree(dtype: torch.dtype) -> None:
    x = gaussian_full_rows(200)
    inits = [gaussian_diagonal.init_params(x, 2, seeded(seed)) for seed in range(3)]
    cpu, gpu = (
        em_restarts(gaussian_diagonal, moved(x, device, dtype), moved(inits, device, dtype))
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(gpu.log_lik, cpu.log_lik, rtol=max(1e-9, 100 * torch.finfo(dtype).eps), atol=0)
    assert gpu.failures == cpu.failures == {}
    assert gpu.best.params.locs.device.type == "cuda"


def gaussian_full_rows(num_data: int) -> Tensor:
    x = torch.randn(num_data, 2, generator=seeded(1), dtype=torch.float64)
    return torch.where(torch.arange(num_data)[:, None] < num_data // 2, x, x + 6)


@needs_gpu
@both_types
@pytest.mark.parametrize("method", [kmeans, kmedians])
def test_clusterings_agree(method: Any, dtype: torch.dtype) -> None:
    x = gaussian_full_rows(300)
    cpu, gpu = (method(moved(x, device, dtype), 2, num_starts=3, generator=seeded(2)) for device in ("cpu", "cuda"))
    assert torch.equal(gpu.labels.cpu(), cpu.labels)
    assert_agree(gpu.centers, cpu.centers, dtype, growth=math.sqrt(len(x)))


@needs_gpu
@both_types
def test_sample_has_the_moments_of_the_law(case: Case, dtype: torch.dtype) -> None:
    """The draws differ between devices, their mean by no more than six standard errors."""
    if case.name == "KnownNoise":
        pytest.skip("its setting holds tensors, which stay where they were made")
    params = moved(case.params(2), "cuda", dtype)
    x, z = sample(case.family, params, 20_000, generator=torch.Generator("cuda").manual_seed(1))
    assert (x.device.type, x.dtype, z.device.type) == ("cuda", dtype, "cuda")
    mean, covariance = case.family.moments(case.params(2))
    errors = (covariance.diagonal() / len(x)).sqrt()
    assert ((x.cpu().double().mean(0) - mean).abs() < 6 * errors).all()


@needs_gpu
def test_posterior_mode_agrees() -> None:
    """Both stop where the objective is flat to rounding, the square root of which is seen in the parameters."""
    x = gaussian_full_rows(100)
    case = Case("gaussian_diagonal", gaussian_diagonal)
    prior = case.prior(k=2)
    modes = []
    for device in ("cpu", "cuda"):
        program = case.program(2, moved(prior, device, torch.float64))
        start = moved(gaussian_diagonal.init_params(x, 2, seeded(1)), device, torch.float64)
        modes.append(posterior_mode(program, start._asdict(), moved(x, device, torch.float64)))
    cpu, gpu = ([mode[name] for name in sorted(mode)] for mode in modes)
    assert_agree(gpu, cpu, torch.float64, growth=100 / math.sqrt(torch.finfo(torch.float64).eps))


@needs_gpu
def test_pass_synchronises_only_for_its_choice_of_sums(case: Case) -> None:
    params, x = (moved(value, "cuda", torch.float64) for value in (case.params(1), case.data(2, 64)))
    if case.name == "KnownNoise":
        pytest.skip("its setting holds tensors, which stay where they were made")
    expectation(case.family, params, x)  # the first call makes handles of libraries
    counts = []
    for chunk in (64, 4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                expectation(case.family, params, x, chunk=chunk)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counts.append(len([w for w in caught if "synchroniz" in str(w.message)]))
    assert counts[0] == counts[1]
    assert counts[0] <= 2
