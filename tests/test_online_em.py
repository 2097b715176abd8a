"""Online EM against batch EM where they must agree, a recursion written by hand, and the law of its error."""

from __future__ import annotations

import math
import re
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from mixproof.inference.em import em
from mixproof.inference.expectation import expectation
from mixproof.inference.online_em import OnlineFit, online_em
from mixproof.models import gaussian_diagonal, gaussian_full, gaussian_sum, gaussian_tied, laplace
from mixproof.models.gaussian_isotropic import GaussianIsotropic
from tests.conftest import Case, seeded

EPS = torch.finfo(torch.float64).eps


def has_sums(case: Case) -> bool:
    return getattr(case.family, "additive", False)


def leaves(value: Any) -> list[Tensor]:
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, tuple) else [value]


def one_step(family: Any, x: Tensor, params: Any, prior: Any = None) -> Any:
    """Return the image of parameters under one step of batch EM, by the contract alone."""
    return family.m_step(family.statistics(params, x, family.log_joint(params, x).softmax(-1)), prior)


def differ(a: Any, b: Any) -> float:
    """Return the largest difference between entries of parameters, over the largest entry of their field."""
    return max(float((p - q).abs().max() / q.abs().max()) for p, q in zip(leaves(a), leaves(b), strict=True))


def test_every_family_whose_statistics_add_up_can_move_them(case: Case) -> None:
    assert hasattr(case.family, "recentre") == has_sums(case)
    assert has_sums(case) or case.family is laplace


def test_moved_statistics_have_the_same_m_step_and_moments(case: Case, kind: str) -> None:
    """Of complete data, the statistics about new locations can be computed from the rows: a second route."""
    if not has_sums(case):
        return
    x, old, new = case.data(1, 60), case.params(2, spread=2.0), case.params(3, spread=2.0)
    resp, prior = case.resp(4, 60), case.prior_or_flat(kind)
    stats = case.family.statistics(old, x, resp)
    moved = case.family.recentre(stats, old, new)
    assert type(moved) is type(stats)
    assert differ(case.family.m_step(moved, prior), case.family.m_step(stats, prior)) <= 1e4 * EPS
    there_and_back = case.family.recentre(moved, new, old)
    assert differ(there_and_back, stats) <= 1e3 * EPS
    if case.module is not gaussian_sum:  # whose expected statistics depend on the parameters beyond their locations
        assert differ(moved, case.family.statistics(new, x, resp)) <= 1e3 * EPS


def test_one_chunk_is_one_step_of_batch_em(case: Case, kind: str) -> None:
    if not has_sums(case):
        return
    x, prior = case.data(1, 80), case.prior_or_flat(kind)
    start = case.start(2, x, prior=prior)
    fit = online_em(case.family, [x], start, prior=prior)
    assert isinstance(fit, OnlineFit)
    assert isinstance(fit.params, case.family.Params)
    assert differ(fit.params, one_step(case.family, x, start, prior)) <= 1e3 * EPS
    expected = case.family.log_joint(start, x).logsumexp(-1).mean()
    assert abs(fit.log_lik[0] - expected) <= 1e2 * EPS * abs(expected)
    assert (fit.num_rows, fit.averaged) == (80, None)


def test_equal_chunks_before_the_first_update_are_one_step_of_batch_em(case: Case, kind: str) -> None:
    """With exponent 1 the running average is the plain mean of the chunks."""
    if not has_sums(case):
        return
    x, prior = case.data(1, 80), case.prior_or_flat(kind)
    start = case.start(2, x, prior=prior)
    fit = online_em(case.family, x.split(16), start, prior=prior, step_size=1.0, warm_up=80)
    assert differ(fit.params, one_step(case.family, x, start, prior)) <= 1e3 * EPS
    assert len(fit.log_lik) == 5


def test_chunks_are_predicted_before_they_are_learnt_from(case: Case) -> None:
    if not has_sums(case):
        return
    x = case.data(1, 120)
    start = case.start(2, x)
    chunks = x.split(40)
    fit = online_em(case.family, chunks, start)
    for t in range(3):
        before = start if t == 0 else online_em(case.family, chunks[:t], start).params
        expected = case.family.log_joint(before, chunks[t]).logsumexp(-1).mean()
        assert abs(fit.log_lik[t] - expected) <= 1e3 * EPS * abs(expected)


def by_hand(
    chunks: list[np.ndarray], weights: np.ndarray, locs: np.ndarray, variances: np.ndarray, kappa: float, delay: float
) -> tuple[np.ndarray, ...]:
    """Return where the recursion leads for two normals on the line, with moments about 0: s = (sum r, r x, r x^2)."""
    s = np.zeros((3, len(weights)))
    trace = []
    for t, x in enumerate(chunks, 1):
        density = weights * np.exp(-((x[:, None] - locs) ** 2) / (2 * variances)) / np.sqrt(2 * np.pi * variances)
        trace.append(np.log(density.sum(1)).mean())
        r = density / density.sum(1, keepdims=True)
        new = np.stack([r.mean(0), (r * x[:, None]).mean(0), (r * x[:, None] ** 2).mean(0)])
        gamma = 1.0 if t == 1 else 1 / (delay + t) ** kappa
        s = s + gamma * (new - s)
        weights, locs = s[0], s[1] / s[0]
        variances = s[2] / s[0] - locs**2
    return weights, locs, variances, np.array(trace)


@pytest.mark.parametrize(("kappa", "delay"), [(0.6, 0.0), (1.0, 0.0), (0.75, 10.0)])
def test_recursion_is_the_one_written_by_hand(kappa: float, delay: float) -> None:
    rng = np.random.default_rng(5)
    x = np.where(rng.random(3000) < 0.4, rng.normal(-1.0, 0.7, 3000), rng.normal(2.0, 1.2, 3000))
    chunks = np.split(x, 30)
    start = np.array([0.5, 0.5]), np.array([-0.5, 1.0]), np.array([1.0, 1.5])
    expected = by_hand(chunks, *start, kappa, delay)
    init = gaussian_diagonal.Params(*(torch.as_tensor(v) for v in (start[0], start[1][:, None], start[2][:, None])))
    fit = online_em(gaussian_diagonal, (c[:, None] for c in chunks), init, step_size=kappa, delay=delay)
    found = (fit.params.weights, fit.params.locs[:, 0], fit.params.variances[:, 0], fit.log_lik)
    for own, other in zip(found, expected, strict=True):
        assert np.abs(own.numpy() - other).max() <= 1e3 * EPS * np.abs(other).max()
    full = online_em(
        gaussian_full,
        [c[:, None] for c in chunks],
        gaussian_full.Params(init.weights, init.locs, init.variances[..., None]),
        step_size=kappa,
        delay=delay,
    )
    assert differ(tuple(v.flatten() for v in full.params), tuple(v.flatten() for v in fit.params)) <= 1e3 * EPS


TRUTH = gaussian_full.Params(
    torch.tensor([0.35, 0.65]).double(),
    torch.tensor([[-1.5, 0.5], [1.5, -0.5]]).double(),
    torch.tensor([[[1.0, 0.3], [0.3, 0.8]], [[0.7, -0.2], [-0.2, 1.1]]]).double(),
)


def free(params: gaussian_full.Params) -> Tensor:
    """Return the 11 free numbers of two normals in the plane."""
    rows, columns = torch.tril_indices(2, 2)
    return torch.cat([params.weights[:1], params.locs.flatten(), params.covariances[:, rows, columns].flatten()])


def from_free(u: Tensor) -> gaussian_full.Params:
    a, b, c = u[5:].reshape(2, 3).unbind(-1)
    covariances = torch.stack([torch.stack([a, b], -1), torch.stack([b, c], -1)], -2)
    return gaussian_full.Params(torch.stack([u[0], 1 - u[0]]), u[1:5].reshape(2, 2), covariances)


def squared_distance(params: gaussian_full.Params, x: Tensor) -> float:
    """Return (u - u*)^T I (u - u*) with the information I of rows x at the truth: chi-squared for an efficient u."""

    def loss(u: Tensor) -> Tensor:
        return -gaussian_full.log_joint(from_free(u), x).logsumexp(-1).sum()

    information = torch.autograd.functional.hessian(loss, free(TRUTH))
    error = free(params) - free(TRUTH)
    return float(error @ information @ error)


START = gaussian_full.Params(
    torch.tensor([0.5, 0.5]).double(),
    torch.tensor([[-0.5, 0.0], [0.5, 0.0]]).double(),
    torch.eye(2).double().expand(2, 2, 2),
)


def test_average_is_as_close_to_the_truth_as_the_batch_optimum() -> None:
    """Both are efficient (Cappe and Moulines 2009, on averaging), so that their squared distance is chi-squared (11).

    The bound is its quantile at 1e-6; the average, which uses three quarters of the rows, may have 4/3 of it.
    """
    x = gaussian_full.sample(TRUTH, 60_000, seeded(11))[0]
    bound = chi2.isf(1e-6, 11)
    batch = em(gaussian_full, x, START, accelerate="anderson").params
    fit = online_em(gaussian_full, x.split(100), START, average_from=151)
    assert squared_distance(batch, x) <= bound
    assert squared_distance(fit.averaged, x) <= 4 / 3 * bound
    assert squared_distance(fit.params, x) > squared_distance(fit.averaged, x)  # the last point is noisier
    assert squared_distance(START, x) > 100 * bound
    per_row = gaussian_full.log_joint(batch, x).logsumexp(-1)
    late = fit.log_lik[300:]
    assert abs(late.mean() - per_row.mean()) <= 6 * per_row.std() / math.sqrt(len(late) * 100)


def without_move(stats: Any, old: Any, new: Any) -> Any:
    return stats


def wrong_sign(stats: Any, old: Any, new: Any) -> Any:
    return gaussian_full.recentre(stats, new, old)


def no_counts(stats: Any, old: Any, new: Any) -> Any:
    right = gaussian_full.recentre(stats, old, new)
    return right._replace(shifts=stats.shifts)


@pytest.mark.parametrize("fault", [without_move, wrong_sign, no_counts])
def test_recursion_by_hand_sees_statistics_about_the_wrong_place(fault: Any) -> None:
    """The limit would not: there the parameters move no more."""
    x = gaussian_full.sample(TRUTH, 3000, seeded(11))[0][:, :1]
    start = np.array([0.5, 0.5]), np.array([-0.5, 1.0]), np.array([1.0, 1.5])
    weights, locs, variances, _ = by_hand([c[:, 0].numpy() for c in x.split(100)], *start, 0.6, 0.0)
    expected = gaussian_full.Params(*(torch.as_tensor(v) for v in (weights, locs[:, None], variances[:, None, None])))
    init = gaussian_full.Params(*(torch.as_tensor(v) for v in (start[0], start[1][:, None], start[2][:, None, None])))
    family = types.SimpleNamespace(**{**vars(gaussian_full), "recentre": fault})
    assert differ(online_em(gaussian_full, x.split(100), init).params, expected) <= 1e3 * EPS
    assert differ(online_em(family, x.split(100), init).params, expected) > 1e6 * EPS


def test_average_is_the_mean_of_the_later_parameters() -> None:
    x = gaussian_full.sample(TRUTH, 600, seeded(3))[0]
    chunks = x.split(100)
    fit = online_em(gaussian_full, chunks, START, average_from=4)
    later = [online_em(gaussian_full, chunks[:t], START).params for t in (4, 5, 6)]
    for field, *values in zip(fit.averaged, *later, strict=True):
        expected = torch.stack(values).mean(0)
        assert (field - expected).abs().max() <= 1e2 * EPS * expected.abs().max()
    with pytest.warns(RuntimeWarning, match="ended after 3 chunks, before average_from = 4: begin sooner"):
        assert online_em(gaussian_full, chunks[:3], START, average_from=4).averaged is None


@pytest.mark.parametrize("family", [gaussian_full, gaussian_diagonal, gaussian_tied])
def test_data_far_from_zero_lose_nothing_but_their_own_digits(family: Any) -> None:
    """On a grid on which the offset is exact, only the rounding of the locations themselves may be seen."""
    offset = 2.0**20
    x = (gaussian_full.sample(TRUTH, 2000, seeded(8))[0] * 2**20).round() / 2**20
    start = family.init_params(x, 2, seeded(9))
    near = online_em(family, x.split(100), start).params
    far = online_em(family, (x + offset).split(100), start._replace(locs=start.locs + offset)).params
    digit = offset * EPS  # of a location, about standard deviations of 1
    for name, value in far._asdict().items():
        error = (value - getattr(near, name) - (offset if name == "locs" else 0)).abs().max()
        assert error <= 1e3 * digit, name


def test_a_stream_is_read_once_and_a_chunk_at_a_time() -> None:
    x = gaussian_full.sample(TRUTH, 500, seeded(3))[0]
    asked: list[int] = []

    def chunks() -> Iterator[Tensor]:
        for i, part in enumerate(x.split(100)):
            asked.append(i)
            yield part

    fit = online_em(gaussian_full, chunks(), START)
    assert asked == [0, 1, 2, 3, 4]
    assert fit.num_rows == 500
    again = online_em(gaussian_full, list(x.split(100)), START)
    assert all(torch.equal(a, b) for a, b in zip(fit.params, again.params, strict=True))


def test_prior_counts_against_all_rows_seen(case: Case) -> None:
    """Chunks that repeat one chunk leave its mean statistics where they are: the M-step sees them times all rows."""
    if not has_sums(case) or case.module is gaussian_sum:
        return
    x, prior = case.data(1, 40), case.prior(0)
    start = case.start(2, x, prior=prior)
    fit = online_em(case.family, [x, x, x], start, prior=prior, step_size=1.0, warm_up=120)
    assert differ(fit.params, one_step(case.family, x.repeat(3, 1), start, prior)) <= 1e3 * EPS


def test_float32_rows_give_float32_parameters() -> None:
    x = gaussian_full.sample(TRUTH, 500, seeded(3))[0].float()
    fit = online_em(gaussian_full, x.split(100), START)
    assert {value.dtype for value in fit.params} == {torch.float32}
    exact = online_em(gaussian_full, x.double().split(100), START)
    assert differ(tuple(v.double() for v in fit.params), exact.params) <= 1e3 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("chunks", "options", "error", "message"),
    [
        ([torch.zeros(4, 2)], {"step_size": 0.5}, ValueError, "step_size must be above 1/2 and at most 1, and is 0.5"),
        ([torch.zeros(4, 2)], {"step_size": 1.1}, ValueError, "step_size must be above 1/2 and at most 1, and is 1.1"),
        ([torch.zeros(4, 2)], {"step_size": math.nan}, ValueError, "step_size must be above 1/2"),
        ([torch.zeros(4, 2)], {"delay": -1.0}, ValueError, "delay must be finite and not negative, and is -1.0"),
        ([torch.zeros(4, 2)], {"average_from": 0}, ValueError, "average_from must be at least 1, not 0"),
        ([torch.zeros(4, 2)], {"warm_up": math.nan}, TypeError, "warm_up must be an integer, not nan"),
        ([], {}, TypeError, "chunks must be an iterable of matrices (n, D): a single matrix x goes as [x]"),
        (iter([]), {}, ValueError, "chunks have no rows"),
        (torch.zeros(4, 2), {}, TypeError, "a single matrix x goes as [x]"),
        (3, {}, TypeError, "chunks must be an iterable of matrices"),
        (iter([torch.zeros(4, 3)]), {}, ValueError, "locs has shape (2, 2)"),
        (iter([torch.rand(9, 2).double(), torch.zeros(4, 3)]), {}, ValueError, "up to row 9 and 3 of"),
        (iter([torch.rand(9, 2).double(), torch.zeros(4)]), {}, ValueError, "x must have shape (N, D), not (4,)"),
        (iter([torch.rand(9, 2).double(), torch.full((4, 2), torch.nan).double()]), {}, ValueError, "x[9, 0] is nan"),
        (
            iter([torch.rand(9, 2).double()]),
            {"warm_up": 10},
            ValueError,
            "ended after 9 rows, before the 10 of warm_up",
        ),
        (iter([torch.rand(1, 2).double()] * 2), {}, ValueError, "collapsed at chunk 2"),
        (iter([torch.rand(1, 2).double()]), {}, ValueError, "collapsed after the last chunk"),
        (iter([torch.full((4, 2), 1e4).double()]), {}, ValueError, "component 0 lost its last row at chunk 1"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) else None,
)
def test_bad_input_is_an_error_in_words(chunks: Any, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        online_em(gaussian_full, chunks, START, **options)


def test_laplace_is_refused_in_words() -> None:
    x = torch.rand(20, 2).double()
    start = laplace.init_params(x, 2, seeded(0))
    with pytest.raises(
        ValueError, match="this family has no recentre, which moves its statistics to other parameters: use em"
    ):
        online_em(laplace, [x], start)


def test_impossible_rows_are_named_by_their_number_in_the_stream() -> None:
    family = GaussianIsotropic(1e-3)
    start = family.Params(torch.tensor([0.5, 0.5]).double(), torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double())
    chunks = [
        torch.rand(5, 2, generator=seeded(1)).double(),
        torch.tensor([[0.5, 0.5], [1e154, 0.0]], dtype=torch.float64),
    ]
    with pytest.raises(ValueError, match="row 6 is impossible under every component at chunk 2"):
        online_em(family, chunks, start)


def test_expectation_is_the_only_route_to_the_statistics() -> None:
    """So that a faster E-step serves streams too."""
    assert online_em.__globals__["expectation"] is expectation
