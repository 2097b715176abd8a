"""EM from several starts: as one batch and one after another, against ``em`` from each start."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference import restarts
from mixproof.inference.em import Fit, em
from mixproof.inference.restarts import Restarts, em_restarts
from mixproof.models import gaussian_diagonal, gaussian_full, laplace
from tests.conftest import Case, seeded


def one_by_one(family: Any, x: Any, inits: list[Any], **settings: Any) -> tuple[dict[int, Fit], dict[int, str]]:
    """Return what ``em`` finds from each start, or the sentence that it raises."""
    fits, failures = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for number, init in enumerate(inits):
            try:
                fits[number] = em(family, x, init, **settings)
            except ValueError as error:
                failures[number] = str(error)
    return fits, failures


def assert_best(found: Restarts, fits: dict[int, Fit], failures: dict[int, str], num_starts: int) -> None:
    """Check all starts to the stop rule, and the best to rounding: the batch sums in another order than ``em``."""
    assert found.failures == failures
    assert found.log_lik.shape == (num_starts,)
    assert found.log_lik.isnan().nonzero().flatten().tolist() == sorted(failures)
    for number, fit in fits.items():
        torch.testing.assert_close(found.log_lik[number], fit.log_lik[-1], rtol=1e-9, atol=0)
    number = int(found.log_lik.nan_to_num(nan=-math.inf).argmax())  # of starts that end in one place, rounding picks
    best = fits[number]
    torch.testing.assert_close(best.log_lik[-1], max(fit.log_lik[-1] for fit in fits.values()), rtol=1e-9, atol=0)
    assert (found.best.num_steps, found.best.converged) == (best.num_steps, best.converged)
    torch.testing.assert_close(found.best.log_lik, best.log_lik, rtol=1e-11, atol=0)
    for value, expected in zip(found.best.params, best.params, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-9)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of starts that each batch brought to an end, so that a test knows which way the starts ran."""
    sizes: list[int] = []
    run = restarts._run_as_batch

    def counted(*arguments: Any) -> Any:
        ends = run(*arguments)
        sizes.append(len(ends))
        return ends

    monkeypatch.setattr(restarts, "_run_as_batch", counted)
    return sizes


@pytest.mark.slow_for("gaussian_sum", "KnownNoise")
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_every_family_ends_where_the_best_em_ends(case: Case, kind: str, weighted: bool, batches: list[int]) -> None:
    prior = case.prior_or_flat(kind, k=2)
    x = case.data(3, 80, k=2)
    inits = [case.start(seed, x, k=2, prior=prior) for seed in range(4)]
    weights = 0.5 + torch.rand(len(x), generator=seeded(4), dtype=torch.float64) if weighted else None
    settings: dict[str, Any] = {"prior": prior, "weights": weights, "rtol": 1e-8}
    fits, failures = one_by_one(case.family, x, inits, **settings)
    assert fits, "no start survives, and the test shows nothing"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = em_restarts(case.family, x, inits, **settings)
    assert batches == [len(fits)]
    assert_best(found, fits, failures, len(inits))


def two_clusters(num_data: int = 60) -> Tensor:
    x = torch.randn(num_data, 2, generator=seeded(1), dtype=torch.float64)
    return torch.where(torch.arange(num_data)[:, None] < num_data // 2, x, x + 4)


def starts_of(family: Any, x: Tensor, num_starts: int) -> list[Any]:
    return [family.init_params(x, 2, seeded(seed)) for seed in range(num_starts)]


def test_rows_of_weight_zero_have_no_say(batches: list[int]) -> None:
    x = two_clusters()
    weights = torch.ones(len(x), dtype=torch.float64)
    weights[-10:] = 0
    far = x.clone()
    far[-10:] = 1e200  # impossible under every component
    inits = starts_of(gaussian_diagonal, x[:-10], 3)
    fits, failures = one_by_one(gaussian_diagonal, x[:-10], inits)
    assert_best(em_restarts(gaussian_diagonal, far, inits, weights=weights), fits, failures, 3)
    assert batches == [3]


def planted_failures(x: Tensor) -> tuple[list[Any], list[int]]:
    """Return good starts with one of each kind that fails among them, and the numbers of those."""
    good = starts_of(gaussian_full, x, 3)
    first = good[0]
    on_a_row = first._replace(
        locs=torch.stack([x[0], x.mean(0)]), covariances=torch.stack([1e-8 * torch.eye(2).double(), torch.cov(x.mT)])
    )
    far_away = first._replace(locs=torch.stack([x.mean(0), x.mean(0) + 1e3]))  # loses its last row
    impossible = first._replace(locs=first.locs + 1e200)
    singular = first._replace(covariances=torch.ones_like(first.covariances))
    return [good[0], on_a_row, far_away, good[1], impossible, singular, good[2]], [1, 2, 4, 5]


def test_failing_starts_disturb_no_other_and_say_why(batches: list[int]) -> None:
    x = two_clusters()
    inits, bad = planted_failures(x)
    fits, failures = one_by_one(gaussian_full, x, inits)
    assert sorted(failures) == bad
    assert "has collapsed" in failures[1]
    assert "lost its last row" in failures[2]
    assert failures[5].startswith("EM cannot start")
    found = em_restarts(gaussian_full, x, inits)
    assert batches == [3]
    assert_best(found, fits, failures, len(inits))
    alone = em_restarts(gaussian_full, x, [init for number, init in enumerate(inits) if number not in bad])
    assert all(map(torch.equal, found.best.params, alone.best.params))


def test_collapse_that_ends_highest_is_not_the_best(batches: list[int]) -> None:
    """EM comes to rest on two rows that rounding tells apart: the density there means nothing, and is the largest."""
    x = two_clusters()
    x[1] = x[0] + 2e-15
    narrow = starts_of(gaussian_diagonal, x, 1)[0]._replace(
        locs=torch.stack([x[:2].mean(0), x.mean(0)]),
        variances=torch.stack([torch.full((2,), 1e-20).double(), x.var(0)]),
    )
    inits = [*starts_of(gaussian_diagonal, x, 2), narrow]
    fits, failures = one_by_one(gaussian_diagonal, x, inits)
    assert sorted(failures) == [2]
    assert_best(em_restarts(gaussian_diagonal, x, inits), fits, failures, 3)
    assert batches == [2]


def test_all_failing_raises_with_the_last_sentence() -> None:
    x = two_clusters()
    inits, bad = planted_failures(x)
    failing = [inits[number] for number in bad]
    _, failures = one_by_one(gaussian_full, x, failing)
    with pytest.raises(ValueError, match="EM cannot start") as caught:
        em_restarts(gaussian_full, x, failing)
    assert str(caught.value) == failures[3]


@pytest.mark.parametrize("max_steps", [1, 2, 7])
def test_too_few_steps_are_a_warning_and_a_value(max_steps: int, batches: list[int]) -> None:
    x = two_clusters()
    inits = starts_of(laplace, x, 3)
    fits, failures = one_by_one(laplace, x, inits, max_steps=max_steps, rtol=0.0)
    with pytest.warns(ConvergenceWarning, match=f"not converged after {max_steps} steps: raise max_steps"):
        found = em_restarts(laplace, x, inits, max_steps=max_steps, rtol=0.0)
    assert found.best.num_steps == max_steps
    assert not found.best.converged
    assert_best(found, fits, failures, 3)
    assert batches == ([] if max_steps == 1 else [3])


def test_one_start_is_em_itself() -> None:
    x = two_clusters()
    (init,) = starts_of(gaussian_full, x, 1)
    found, fit = em_restarts(gaussian_full, x, [init]), em(gaussian_full, x, init)
    assert all(map(torch.equal, found.best.params, fit.params))
    assert torch.equal(found.best.log_lik, fit.log_lik)
    assert found.log_lik.tolist() == [fit.log_lik[-1].item()]
    assert (found.best.num_steps, found.best.converged, found.failures) == (fit.num_steps, fit.converged, {})


def test_same_starts_same_fit() -> None:
    x = two_clusters()
    inits, _ = planted_failures(x)
    first, again = (em_restarts(gaussian_full, x, inits) for _ in range(2))
    assert all(map(torch.equal, first.best.params, again.best.params))
    assert torch.equal(first.best.log_lik, again.best.log_lik)
    assert torch.equal(first.log_lik.nan_to_num(), again.log_lik.nan_to_num())
    assert first.failures == again.failures


def with_nan(x: Tensor) -> Tensor:
    return torch.where(torch.arange(x.numel()).reshape(x.shape) % 17 == 3, math.nan, x)


@pytest.mark.parametrize(
    ("change", "settings", "num_batches"),
    [
        (lambda x: x.float(), {"rtol": 1e-6}, [0]),
        (lambda x: x.repeat(50, 1), {}, [0]),
        (lambda x: list(x.split(13)), {}, []),
        (with_nan, {"missing": True}, []),
        (lambda x: x, {"accelerate": "anderson"}, []),
    ],
    ids=["float32", "many rows", "chunks", "missing", "accelerated"],
)
def test_what_no_batch_takes_runs_one_by_one(
    change: Any, settings: dict[str, Any], num_batches: list[int], batches: list[int]
) -> None:
    x = two_clusters()
    inits = starts_of(gaussian_full, x, 3)
    fits, failures = one_by_one(gaussian_full, change(x), inits, **settings)
    found = em_restarts(gaussian_full, change(x), inits, **settings)
    assert batches == num_batches
    best = max(fits.values(), key=lambda fit: fit.log_lik[-1].item())
    assert all(map(torch.equal, found.best.params, best.params))
    assert torch.equal(found.best.log_lik, best.log_lik)
    assert found.log_lik.tolist() == [fits[number].log_lik[-1].item() for number in range(3)]
    assert found.failures == failures == {}


def test_family_that_branches_on_values_runs_one_by_one(batches: list[int]) -> None:
    def log_joint(params: Any, x: Tensor) -> Tensor:
        assert params.weights.sum().item() > 0
        return gaussian_full.log_joint(params, x)

    names = ("Params", "Prior", "Stats", "model", "statistics", "m_step", "moments")
    family = SimpleNamespace(log_joint=log_joint, **{name: getattr(gaussian_full, name) for name in names})
    x = two_clusters()
    inits = starts_of(gaussian_full, x, 3)
    fits, failures = one_by_one(family, x, inits)
    assert_best(em_restarts(family, x, inits), fits, failures, 3)
    assert batches == [0]


def test_wrong_m_step_is_found_in_the_batch_too(batches: list[int]) -> None:
    names = ("Params", "Prior", "Stats", "model", "log_joint", "statistics", "moments")

    def m_step(stats: Any, prior: Any = None) -> Any:
        params = gaussian_full.m_step(stats, prior)
        return params._replace(locs=-params.locs)

    family = SimpleNamespace(m_step=m_step, **{name: getattr(gaussian_full, name) for name in names})
    x = two_clusters()
    with pytest.raises(ArithmeticError, match="lowered the objective"):
        em_restarts(family, x, starts_of(gaussian_full, x, 3))
    assert batches == [0]


def test_bad_input_is_named() -> None:
    x = two_clusters()
    with pytest.raises(ValueError, match="inits is empty"):
        em_restarts(gaussian_full, x, [])
    inits = starts_of(gaussian_full, x, 3)
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        em_restarts(gaussian_full, x, inits, max_steps=0)
    for rtol in (-1.0, math.inf):
        with pytest.raises(ValueError, match="rtol must be finite and not negative"):
            em_restarts(gaussian_full, x, inits, rtol=rtol)
    with pytest.raises(ValueError, match=r"x\[2, 1\]"):
        em_restarts(
            gaussian_full, x.index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(math.nan).double()), inits
        )
    with pytest.raises(TypeError, match="the parameters of this family"):
        em_restarts(gaussian_full, x, [inits[0], None])
