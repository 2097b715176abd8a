"""``verify_em`` passes right derivations, and says of wrong ones which step is wrong and where."""

from __future__ import annotations

import ast
import io
import math
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.enumeration import log_joint
from mixproof.inference.verification import Refuted, Report, assert_em, verify_em, verify_subject
from mixproof.inference.verification.fault_bank import entries
from mixproof.models import bernoulli, gaussian_full, gaussian_sum

X = torch.tensor(
    [[-2.1, 0.3], [-1.4, 1.2], [-0.7, -0.8], [0.4, 2.2], [0.9, 1.1], [1.7, -1.3], [2.5, 0.6], [3.1, -0.2], [3.3, 2.8]],
    dtype=torch.float64,
)
COUNTS = torch.tensor([0, 1, 1, 2, 4, 5, 5, 7, 9, 12], dtype=torch.float64)
Params = dict[str, Tensor]


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def diagonal(x: Tensor, penalised: bool = False) -> None:
    """Three Gaussians with diagonal covariances; ``stds`` are standard deviations."""
    weights = pyro.param("weights", torch.ones(3).double() / 3, constraint=constraints.simplex)
    with pyro.plate("components", 3):
        locs = pyro.sample("locs", dist.Normal(tensor(1.0, 0.0), 2.0).to_event(1).mask(penalised))
        positive = constraints.independent(constraints.positive, 1)
        stds = pyro.param("stds", torch.ones(3, 2).double(), constraint=positive, event_dim=1)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[z], stds[z]).to_event(1), obs=x)


START = {
    "weights": tensor(0.5, 0.3, 0.2),
    "locs": tensor([-1.0, 0.5], [1.0, 1.0], [3.0, 0.0]),
    "stds": tensor([1.0, 0.8], [0.9, 1.2], [1.1, 1.5]),
}


def table(params: Params, x: Tensor) -> Tensor:
    normal = dist.Normal(params["locs"], params["stds"]).log_prob(x[:, None]).sum(-1)
    return params["weights"].log() + normal


def e_step(params: Params, x: Tensor) -> Tensor:
    return table(params, x).softmax(-1)


def m_step(resp: Tensor, x: Tensor) -> Params:
    counts = resp.sum(0)[:, None]
    locs = resp.mT @ x / counts
    variances = (resp.mT[..., None] * (x - locs[:, None]).square()).sum(1) / counts
    return {"weights": counts[:, 0] / len(x), "locs": locs, "stds": variances.sqrt()}


def log_likelihood(params: Params, x: Tensor) -> Tensor:
    return table(params, x).logsumexp(-1).sum()


def spoil(**changes: Callable[[Params, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Params]:
    """Return the M-step with some sites replaced by a function of its result, the responsibilities and the data."""

    def wrong(resp: Tensor, x: Tensor) -> Params:
        right = m_step(resp, x)
        return {**right, **{name: change(right, resp, x) for name, change in changes.items()}}

    return wrong


def verify(start: dict[str, Any] | None = None, **spoilt: Any) -> Report:
    steps = {"e_step": e_step, "m_step": m_step, "log_likelihood": log_likelihood, **spoilt}
    return verify_em(diagonal, {**START, **(start or {})}, data=(X.clone(),), seed=0, **steps)


def counts_of(resp: Tensor) -> Tensor:
    return resp.sum(0)[:, None]


def smoothed(right: Params, resp: Tensor, x: Tensor) -> Tensor:
    return (resp.sum(0) + 1) / (len(x) + 3)


def about_overall_mean(right: Params, resp: Tensor, x: Tensor) -> Tensor:
    return ((resp.mT[..., None] * (x - x.mean(0)).square()).sum(1) / counts_of(resp)).sqrt()


M_FAULTS: dict[str, tuple[str, Callable[[Tensor, Tensor], Params]]] = {
    "n - 1 for n": ("stds", spoil(stds=lambda r, g, x: r["stds"] * (counts_of(g) / (counts_of(g) - 1)).abs().sqrt())),
    "variance for standard deviation": ("stds", spoil(stds=lambda r, g, x: r["stds"].square())),
    "a floor on the variance": ("stds", spoil(stds=lambda r, g, x: (r["stds"].square() + 1e-6).sqrt())),
    "deviations from the overall mean": ("stds", spoil(stds=about_overall_mean)),
    "one feature's variance for all": ("stds", spoil(stds=lambda r, g, x: r["stds"][:, :1].expand(-1, 2))),
    "means off by a millionth": ("locs", spoil(locs=lambda r, g, x: r["locs"] * (1 + 1e-6))),
    "unweighted means": ("locs", spoil(locs=lambda r, g, x: x.mean(0).expand(3, -1))),
    "components exchanged": ("locs", spoil(locs=lambda r, g, x: r["locs"].roll(1, 0))),
    "counts smoothed": ("weights", spoil(weights=smoothed)),
    "uniform weights": ("weights", spoil(weights=lambda r, g, x: torch.ones(3).double() / 3)),
    "hard counts": ("weights", spoil(weights=lambda r, g, x: (g.argmax(-1).bincount(minlength=3) + 0.1) / 9.3)),
}
E_FAULTS: dict[str, Callable[[Params, Tensor], Tensor]] = {
    "weights forgotten": lambda p, x: (table(p, x) - p["weights"].log()).softmax(-1),
    "hard assignment": lambda p, x: torch.nn.functional.one_hot(table(p, x).argmax(-1), 3).double(),
    "softmax over the rows": lambda p, x: table(p, x).softmax(0),
    "variance for standard deviation": lambda p, x: table({**p, "stds": p["stds"].square()}, x).softmax(-1),
    "normaliser without its square root": lambda p, x: (table(p, x) - p["stds"].log().sum(-1)).softmax(-1),
    "off by a millionth": lambda p, x: e_step(p, x) * (1 + 1e-6),
    "squared weights": lambda p, x: (table(p, x) + p["weights"].log()).softmax(-1),
}


def test_the_right_derivation_is_exact() -> None:
    report = verify()
    assert report.verdict == "exact EM"
    assert report.ok
    assert assert_em(diagonal, START, e_step=e_step, m_step=m_step, data=(X,), seed=0).ok


@pytest.mark.parametrize("fault", M_FAULTS)
def test_a_wrong_m_step_is_found_and_placed(fault: str) -> None:
    site, wrong = M_FAULTS[fault]
    report = verify(m_step=wrong)
    assert report.verdict == "wrong M-step"
    failed = next(check for check in report.checks if check.name == "grad Q = 0")
    assert failed.counterexample is not None
    if fault not in ("means off by a millionth", "unweighted means", "components exchanged"):  # the scales follow them
        assert failed.counterexample["site"] == site
    right = m_step(failed.counterexample["resp"], X)[failed.counterexample["site"]]
    if failed.counterexample["site"] == site:
        torch.testing.assert_close(failed.counterexample["maximiser of Q"], right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fault", E_FAULTS)
def test_a_wrong_e_step_is_found_and_its_row_shown(fault: str) -> None:
    report = verify(e_step=E_FAULTS[fault])
    assert report.verdict == "wrong E-step"
    shown = report.checks[0].counterexample
    assert shown is not None
    right = e_step({name: shown[name] for name in START}, X)[shown["row"]]
    torch.testing.assert_close(shown["actual"], right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda p, x: log_likelihood(p, x) / len(x),
        lambda p, x: log_likelihood({**p, "weights": torch.ones(3).double() / 3}, x),
        lambda p, x: (e_step(p, x) * table(p, x)).sum(),
        lambda p, x: log_likelihood(p, x) * (1 + 1e-9),
    ],
    ids=["mean for sum", "other weights", "Q for log likelihood", "off by a billionth"],
)
def test_a_wrong_report_is_found(wrong: Callable[[Params, Tensor], Tensor]) -> None:
    assert verify(log_likelihood=wrong).verdict == "wrong report"


def test_a_step_that_maximises_with_the_prior_is_map_em_and_one_that_counts_it_twice_is_wrong() -> None:
    def penalised(resp: Tensor, x: Tensor, *, times: int = 1) -> Params:
        """Maximise over locs and stds in turn until both stand: neither has a closed form beside the other."""
        params = m_step(resp, x)
        counts, prior = counts_of(resp), tensor(1.0, 0.0)
        for _ in range(500):
            precision = counts / params["stds"].square()
            locs = (precision * (resp.mT @ x / counts) + times * prior / 4) / (precision + times / 4)
            squares = (resp.mT[..., None] * (x - locs[:, None]).square()).sum(1)
            params = {**params, "locs": locs, "stds": (squares / counts).sqrt()}
        return params

    model = partial(diagonal, penalised=True)
    check = partial(verify_em, model, START, e_step=e_step, data=(X,), seed=0)
    assert check(m_step=penalised).verdict == "MAP-EM"
    assert check(m_step=m_step).verdict == "exact EM"
    assert check(m_step=partial(penalised, times=2)).verdict == "wrong M-step"


def test_a_step_that_only_rises_is_generalised_em() -> None:
    def halfway(resp: Tensor, x: Tensor, *, params: Params) -> Params:
        right = m_step(resp, x)
        return {**right, "locs": (params["locs"] + right["locs"]) / 2, "stds": params["stds"]}

    fixed = {**START, "stds": START["stds"]}

    def model(x: Tensor) -> None:
        weights = pyro.param("weights", fixed["weights"], constraint=constraints.simplex)
        with pyro.plate("components", 3):
            locs = pyro.sample("locs", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1).mask(False))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[z], fixed["stds"][z]).to_event(1), obs=x)

    def e(params: Params, x: Tensor) -> Tensor:
        return e_step({**params, "stds": fixed["stds"]}, x)

    def m(resp: Tensor, x: Tensor, *, params: Params) -> Params:
        found = halfway(resp, x, params={**params, "stds": fixed["stds"]})
        return {"weights": found["weights"], "locs": found["locs"]}

    start = {"weights": START["weights"], "locs": START["locs"]}
    assert verify_em(model, start, e_step=e, m_step=m, data=(X,), seed=0).verdict == "generalised EM"


def test_families_that_are_not_shipped() -> None:
    def poisson(x: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(3).double() / 3, constraint=constraints.simplex)
        rates = pyro.param("rates", torch.ones(3).double(), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Poisson(rates[z]), obs=x)

    def zero_inflated(x: Tensor) -> None:
        weights = pyro.param("weights", torch.ones(2).double() / 2, constraint=constraints.simplex)
        rate = pyro.param("rate", tensor(1.0)[0], constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Poisson(torch.where(z == 0, 1e-300, rate)), obs=x)

    def poisson_e(params: Params, x: Tensor) -> Tensor:
        return (params["weights"].log() + dist.Poisson(params["rates"]).log_prob(x[:, None])).softmax(-1)

    def poisson_m(resp: Tensor, x: Tensor) -> Params:
        return {"weights": resp.mean(0), "rates": x @ resp / resp.sum(0)}

    start = {"weights": tensor(0.2, 0.3, 0.5), "rates": tensor(1.0, 4.0, 9.0)}
    check = partial(verify_em, poisson, start, e_step=poisson_e, data=(COUNTS,), seed=1)
    assert check(m_step=poisson_m).verdict == "exact EM"
    wrong = check(m_step=lambda r, x: {"weights": r.mean(0), "rates": (x + 1e-6) @ r / r.sum(0)})
    assert wrong.verdict == "wrong M-step"

    def inflated_e(params: Params, x: Tensor) -> Tensor:
        point = torch.where(x == 0, 0.0, -torch.inf)
        return (params["weights"].log() + torch.stack([point, dist.Poisson(params["rate"]).log_prob(x)], -1)).softmax(
            -1
        )

    start = {"weights": tensor(0.3, 0.7), "rate": tensor(4.0)[0]}
    inflated = verify_em(
        zero_inflated,
        start,
        e_step=inflated_e,
        m_step=lambda r, x: {"weights": r.mean(0), "rate": r[:, 1] @ x / r[:, 1].sum()},
        data=(COUNTS,),
        seed=1,
    )
    assert inflated.checks[0].passed


def test_two_latent_sites_share_a_table() -> None:
    start = gaussian_full.init_params(X, 2, torch.Generator().manual_seed(0))
    noise = gaussian_full.Params(
        tensor(0.6, 0.4), torch.zeros(2, 2).double(), 0.1 * torch.eye(2).double().expand(2, 2, 2)
    )
    family = gaussian_sum.KnownNoise(noise._replace(covariances=noise.covariances * tensor(1.0, 3.0)[:, None, None]))

    def e(params: gaussian_full.Params, x: Tensor) -> Tensor:
        return family.log_joint(params, x).softmax(-1).reshape(len(x), 2, 2)

    def m(resp: Tensor, x: Tensor, *, params: gaussian_full.Params) -> gaussian_full.Params:
        return family.m_step(family.statistics(params, x, resp.flatten(1)))

    model = partial(family.model, num_components=2)
    assert verify_em(model, start, e_step=e, m_step=m, data=(X,), seed=0).verdict == "generalised EM"


def test_probabilities_at_the_edge_pass() -> None:
    x = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 0, 0]], dtype=torch.float64)
    start = bernoulli.init_params(x, 3, torch.Generator().manual_seed(0))
    model = partial(bernoulli.model, num_components=3)
    check = partial(
        verify_em, model, start, e_step=lambda p, x: bernoulli.log_joint(p, x).softmax(-1), data=(x,), seed=0
    )

    def m(resp: Tensor, x: Tensor) -> bernoulli.Params:
        return bernoulli.m_step(bernoulli.statistics(start, x, resp))

    assert check(m_step=m).verdict == "exact EM"  # a column of zeros has probability exactly 0
    flipped = check(m_step=lambda r, x: m(r, x)._replace(probs=1 - m(r, x).probs))
    assert flipped.verdict == "wrong M-step"


@pytest.mark.parametrize(
    ("spoilt", "verdict", "words"),
    [
        ({"e_step": lambda p, x: e_step(p, x).mT}, "wrong E-step", "returns shape (3, 9)"),
        ({"e_step": lambda p, x: p["nothing"]}, "wrong E-step", "KeyError"),
        ({"e_step": lambda p, x: e_step(p, x) * math.nan}, "wrong E-step", ""),
        ({"m_step": lambda r, x: {"weights": r.mean(0)}}, "wrong M-step", "m_step returns ['weights']"),
        ({"m_step": spoil(locs=lambda r, g, x: r["locs"].mT)}, "wrong M-step", "locs of shape (2, 3)"),
        ({"m_step": spoil(locs=lambda r, g, x: r["locs"] * math.nan)}, "wrong M-step", "not finite"),
        ({"m_step": spoil(stds=lambda r, g, x: -r["stds"])}, "wrong M-step", "outside its support"),
        ({"m_step": spoil(weights=lambda r, g, x: 2 * r["weights"])}, "wrong M-step", "outside its support"),
        ({"log_likelihood": lambda p, x: 1 / 0}, "wrong report", "ZeroDivisionError"),
        ({"e_step": lambda p, x: [[1.0], [0.5, 0.5]]}, "wrong E-step", "cannot be responsibilities"),
        ({"e_step": lambda p, x: (e_step(p, x), log_likelihood(p, x))}, "wrong E-step", "cannot be responsibilities"),
        ({"e_step": lambda p, x: e_step(p, x) + 0j}, "wrong E-step", "complex numbers"),
        ({"e_step": lambda p, x: e_step(p, x) > 0.5}, "wrong E-step", "hard assignments"),
        ({"e_step": lambda p, x: e_step(p, x).sum()}, "wrong E-step", "returns shape ()"),
        ({"e_step": lambda p, x: (x.mul_(0.5), e_step(p, x))[1]}, "wrong E-step", "changes argument 0 of the data"),
        ({"e_step": lambda p, x: sys.exit(0)}, "wrong E-step", "SystemExit"),
        ({"m_step": lambda r, x: (m_step(r, x), x.add_(1))[0]}, "wrong M-step", "changes argument 0 of the data"),
        ({"m_step": lambda r, x: {**m_step(r, x), "locs": "abc"}}, "wrong M-step", "locs as a str"),
        ({"m_step": spoil(locs=lambda r, g, x: r["locs"] + 0j)}, "wrong M-step", "complex numbers"),
        ({"m_step": lambda r, x: {1: r, "locs": x}}, "wrong M-step", "m_step returns ['1', 'locs']"),
        ({"m_step": dict}, "wrong M-step", "m_step raises TypeError"),
        ({"log_likelihood": lambda p, x: "-3.2"}, "wrong report", "no number"),
    ],
)
def test_steps_that_break_are_reported_as_what_they_are(spoilt: Any, verdict: str, words: str) -> None:
    report = verify(**spoilt)
    assert report.verdict == verdict
    assert words in str(report)
    with pytest.raises(Refuted, match=verdict):
        report.raise_for_refuted()


@pytest.mark.parametrize(
    "right",
    [
        {"e_step": lambda p, x: e_step(p, x).tolist()},
        {"e_step": lambda p, x: list(e_step(p, x))},
        {"e_step": lambda p, x: e_step(p, x).numpy()},
        {"e_step": lambda p, x: e_step(p, x).to_sparse()},
        {"e_step": lambda p, x: (e_step(p, x), p["weights"].mul_(0))[0]},
        {"m_step": lambda r, x: {name: value.tolist() for name, value in m_step(r, x).items()}},
        {"m_step": lambda r, x: {name: value.requires_grad_() for name, value in m_step(r, x).items()}},
        {"m_step": lambda r, x: (m_step(r, x), r.zero_())[0]},
        {"log_likelihood": lambda p, x: log_likelihood(p, x).requires_grad_()},
        {"log_likelihood": lambda p, x: log_likelihood(p, x).float()},
    ],
)
def test_right_steps_pass_in_any_container_and_whatever_they_do_to_their_own_arguments(right: Any) -> None:
    assert verify(**right).verdict == "exact EM"


def test_responsibilities_in_single_precision_are_judged_by_their_own_rounding() -> None:
    def m(resp: Tensor, x: Tensor) -> Params:
        return m_step(resp.double(), x)

    right = verify(e_step=lambda p, x: e_step(p, x).float(), m_step=m)
    assert right.verdict == "exact EM"
    assert "torch.float32" in right.checks[0].detail
    wrong = verify(e_step=lambda p, x: (table(p, x) - p["weights"].log()).softmax(-1).float(), m_step=m)
    assert wrong.verdict == "wrong E-step"


def test_parameters_that_are_python_numbers_are_judged_in_double_precision() -> None:
    start: dict[str, Any] = {name: value.tolist() for name, value in START.items()}
    assert verify(start, m_step=M_FAULTS["means off by a millionth"][1]).verdict == "wrong M-step"


def test_a_step_that_updates_the_parameters_in_place_is_judged_as_one_that_copies_them() -> None:
    def halfway(resp: Tensor, x: Tensor, *, params: Params) -> Params:
        right = line_m_step(resp, x)
        return {**right, "locs": (params["locs"] + right["locs"]) / 2, "variances": params["variances"]}

    def in_place(resp: Tensor, x: Tensor, *, params: Params) -> Params:
        for name, value in halfway(resp, x, params=params).items():
            params[name].copy_(value)
        return params

    copied, changed = (verify_line(X[:, 0], step) for step in (halfway, in_place))
    assert copied.verdict == "wrong M-step"  # the variances never move
    assert str(copied) == str(changed)


def test_a_step_that_answers_at_random_is_told_from_one_that_rounds() -> None:
    report = verify(m_step=spoil(locs=lambda r, g, x: r["locs"] * (1 + torch.rand(()) / 100)))
    assert report.verdict == "undecided"
    assert "answers equal arguments differently" in str(report)


def test_programs_that_cannot_be_checked_say_what_to_do() -> None:
    def unmarked(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(z.double(), 1.0), obs=x)

    def without_latent(x: Tensor) -> None:
        rate = pyro.param("rate", torch.ones(()).double(), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    check = partial(verify_em, e_step=e_step, m_step=m_step, data=(COUNTS,), seed=0)
    with pytest.raises(ValueError, match='site "z" is discrete and not marked'):
        check(unmarked, {})
    with pytest.raises(ValueError, match="no enumerated site"):
        check(without_latent, {"rate": tensor(1.0)[0]})
    with pytest.raises(ValueError, match="no site scale"):
        verify_em(diagonal, {**START, "scale": tensor(1.0)}, e_step=e_step, m_step=m_step, data=(X,), seed=0)
    with pytest.raises(TypeError, match="must be a tuple"):
        verify_em(diagonal, START, e_step=e_step, m_step=m_step, data=X, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights lies outside of its support, Simplex"):
        verify({"weights": 2 * START["weights"]})
    with pytest.raises(TypeError, match="parameter weights is a str"):
        verify({"weights": "equal"})

    def without_plate(x: Tensor) -> None:
        z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3), infer={"enumerate": "parallel"})
        rates = pyro.param("rates", tensor(1.0, 2.0, 3.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rates[z]), obs=x)

    def in_a_loop(x: Tensor) -> None:
        rates = pyro.param("rates", tensor(1.0, 2.0, 3.0), constraint=constraints.positive)
        rows: Any = pyro.plate("data", len(x))
        for n in rows:
            z = pyro.sample(f"z{n}", dist.Categorical(torch.ones(3) / 3), infer={"enumerate": "parallel"})
            pyro.sample(f"x{n}", dist.Poisson(rates[z]), obs=x[n])

    def subsampled(x: Tensor) -> None:
        rates = pyro.param("rates", tensor(1.0, 2.0, 3.0), constraint=constraints.positive)
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Poisson(rates[z]), obs=x[rows])

    def broken(x: Tensor) -> None:
        raise ZeroDivisionError

    for program, words in (
        (without_plate, "z is in no plate"),
        (in_a_loop, "data is sequential"),
        (subsampled, "data is subsampled"),
        (broken, "the program raises ZeroDivisionError"),
    ):
        with pytest.raises(ValueError, match=words):
            check(program, {"rates": tensor(1.0, 2.0, 3.0)}, data=(COUNTS[:5],))


def test_the_seed_makes_the_report_exact() -> None:
    assert str(verify()) == str(verify())


def gaussian_line(x: Tensor, row_weights: Tensor | None = None) -> None:
    """Gaussians on the line, each row counted as often as its weight says."""
    weights = pyro.param("weights", tensor(0.5, 0.3, 0.2), constraint=constraints.simplex)
    locs = pyro.param("locs", tensor(0.0, 1.0, 2.0))
    variances = pyro.param("variances", tensor(1.0, 1.0, 1.0), constraint=constraints.positive)
    scale = torch.ones_like(x) if row_weights is None else row_weights
    with pyro.plate("data", len(x)), pyro.poutine.scale(scale=scale):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs[z], variances[z].sqrt()), obs=x)


LINE_START = {
    "weights": tensor(0.5, 0.3, 0.2),
    "locs": tensor(-1.0, 1.2, 3.0),
    "variances": tensor(0.8, 1.1, 0.6),
}


def line_table(params: Params, x: Tensor) -> Tensor:
    return params["weights"].log() + dist.Normal(params["locs"], params["variances"].sqrt()).log_prob(x[:, None])


def line_m_step(resp: Tensor, x: Tensor) -> Params:
    counts = resp.sum(0)
    locs = x @ resp / counts
    return {
        "weights": counts / counts.sum(),
        "locs": locs,
        "variances": (resp * (x[:, None] - locs) ** 2).sum(0) / counts,
    }


def line_m_step_by_moments(resp: Tensor, x: Tensor) -> Params:
    """The variance as mean square less squared mean: right, and hard on the digits far from zero."""
    counts = resp.sum(0)
    locs = x @ resp / counts
    return {"weights": counts / len(x), "locs": locs, "variances": (x**2) @ resp / counts - locs**2}


def verify_line(x: Tensor, m_step: Callable[..., Params] = line_m_step, **changes: Any) -> Report:
    steps = {"e_step": lambda p, x: line_table(p, x).softmax(1), "m_step": m_step, **changes}
    return verify_em(gaussian_line, LINE_START, data=(x,), seed=0, **steps)


def test_rows_that_count_differently_have_their_weights_in_the_program() -> None:
    x, row_weights = X[:, 0], tensor(1.0, 2.0, 0.5, 3.0, 1.0, 0.2, 2.0, 1.5, 4.0)

    def weighted(resp: Tensor, x: Tensor, row_weights: Tensor) -> Params:
        return line_m_step(row_weights[:, None] * resp, x)

    def weighted_log_likelihood(params: Params, x: Tensor, row_weights: Tensor) -> Tensor:
        return row_weights @ line_table(params, x).logsumexp(1)

    def check(m_step: Callable[..., Params], report: Callable[..., Tensor] = weighted_log_likelihood) -> Report:
        steps: dict[str, Any] = {"e_step": lambda p, x, w: line_table(p, x).softmax(1), "m_step": m_step}
        return verify_em(gaussian_line, LINE_START, data=(x, row_weights), log_likelihood=report, seed=0, **steps)

    assert check(weighted).verdict == "exact EM"
    forgotten = check(lambda resp, x, w: line_m_step(resp, x))
    assert forgotten.verdict == "wrong M-step"
    unweighted = check(weighted, lambda p, x, w: line_table(p, x).logsumexp(1).sum())
    assert unweighted.verdict == "wrong report"
    assert any("row weights are missing" in hint for hint in unweighted.hints)
    # the program's log joint density is what repeating rows gives
    whole = tensor(1.0, 2.0, 3.0, 3.0, 1.0, 5.0, 2.0, 1.0, 4.0)
    repeated = x.repeat_interleave(whole.long())
    once = log_joint(gaussian_line, LINE_START, x, whole).log_likelihood
    torch.testing.assert_close(once, log_joint(gaussian_line, LINE_START, repeated).log_likelihood)


def test_one_row_is_enough_where_it_fixes_the_parameters_and_undecided_where_not() -> None:
    poisson_entry = entries()["poisson"][0].subject
    one = replace(poisson_entry, data=(poisson_entry.data[0][:1].clamp_min(1),))
    assert verify_subject(one, seed=0).verdict == "exact EM"
    report = verify_line(X[:1, 0])
    assert report.verdict == "undecided"
    assert not report.ok
    assert "rises without bound" in str(report)


def test_one_component_and_duplicate_rows_pass() -> None:
    single = {name: value[:1] / (value[:1] if name == "weights" else 1) for name, value in LINE_START.items()}
    report = verify_em(
        gaussian_line,
        single,
        e_step=lambda p, x: line_table(p, x).softmax(1),
        m_step=line_m_step,
        data=(X[:, 0],),
        seed=0,
    )
    assert report.verdict == "exact EM"
    assert verify_line(X[:, 0].repeat(3)).verdict == "exact EM"


def test_single_precision_passes_within_its_rounding_and_shows_what_is_larger() -> None:
    single = {name: value.float() for name, value in LINE_START.items()}

    def check(m_step: Callable[..., Params]) -> Report:
        steps: dict[str, Any] = {"e_step": lambda p, x: line_table(p, x).softmax(1), "m_step": m_step}
        return verify_em(gaussian_line, single, data=(X[:, 0].float(),), seed=0, **steps)

    assert check(line_m_step).verdict == "exact EM"
    assert check(lambda r, x: {**line_m_step(r, x), "locs": 1.01 * line_m_step(r, x)["locs"]}).verdict == "wrong M-step"


@pytest.mark.parametrize(("offset", "verdict"), [(0.0, "exact EM"), (1e3, "exact EM"), (1e7, "undecided")])
def test_cancellation_is_measured_and_no_fault(offset: float, verdict: str) -> None:
    start = {**LINE_START, "locs": LINE_START["locs"] + offset}
    steps: dict[str, Any] = {"e_step": lambda p, x: line_table(p, x).softmax(1), "m_step": line_m_step_by_moments}
    report = verify_em(gaussian_line, start, data=(X[:, 0] + offset,), seed=0, **steps)
    assert report.verdict == verdict, report
    if verdict == "undecided":
        assert "center or scale the data" in str(report)


def test_densities_that_underflow_are_called_so() -> None:
    def by_products(params: Params, x: Tensor) -> Tensor:
        densities = line_table(params, x).exp()
        return densities / densities.sum(1, keepdim=True)

    report = verify_line(torch.cat([X[:, 0], tensor(1e3)]), e_step=by_products)
    assert report.verdict == "wrong E-step"
    assert "NaN in row 9: every density there underflows to 0" in str(report)


def test_a_formula_that_fails_only_at_the_edge_is_undecided() -> None:
    """0 log 0 at a probability of exactly 0: right inside the support."""
    x = tensor([0.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0])
    inside = bernoulli.Params(tensor(0.5, 0.5), tensor([0.3, 0.6], [0.8, 0.9]))
    edge = inside._replace(probs=tensor([0.0, 0.6], [0.8, 1.0]))

    def naive(params: bernoulli.Params, x: Tensor) -> Tensor:
        logs = x @ params.probs.log().T + (1 - x) @ (1 - params.probs).log().T
        return (params.weights.log() + logs).softmax(1)

    def m(resp: Tensor, x: Tensor) -> bernoulli.Params:
        return bernoulli.m_step(bernoulli.statistics(inside, x, resp))

    model = partial(bernoulli.model, num_components=2)
    assert verify_em(model, inside, e_step=naive, m_step=m, data=(x,), seed=0).verdict == "exact EM"
    report = verify_em(model, edge, e_step=naive, m_step=m, data=(x,), seed=0)
    assert report.verdict == "undecided"
    assert "not at its edge" in str(report)


def test_parameters_with_unusual_supports() -> None:
    def ordered(x: Tensor) -> None:
        weights = pyro.param("weights", tensor(0.5, 0.3, 0.2), constraint=constraints.simplex)
        locs = pyro.param("locs", tensor(0.0, 1.0, 2.0), constraint=dist.constraints.ordered_vector)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x)

    def means(resp: Tensor, x: Tensor) -> Params:
        return {"weights": resp.mean(0), "locs": x @ resp / resp.sum(0)}

    start = {"weights": LINE_START["weights"], "locs": tensor(-2.0, 1.0, 4.0)}

    def e(params: Params, x: Tensor) -> Tensor:
        return (params["weights"].log() + dist.Normal(params["locs"], 1.0).log_prob(x[:, None])).softmax(1)

    x = tensor(-2.4, -1.9, -1.5, 0.8, 1.1, 1.4, 3.6, 3.9, 4.3)
    report = verify_em(ordered, start, e_step=e, m_step=means, data=(x,), seed=0)
    assert report.verdict == "exact EM", report
    assert "near the program's own" in str(report)
    shifted = verify_em(ordered, start, e_step=e, m_step=lambda r, x: means(r, x + 1e-6), data=(x,), seed=0)
    assert shifted.verdict == "wrong M-step"

    def correlated(x: Tensor) -> None:
        weights = pyro.param("weights", tensor(0.6, 0.4), constraint=constraints.simplex)
        factors = pyro.param("factors", torch.eye(2).double().expand(2, 2, 2), constraint=constraints.corr_cholesky)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(2).double(), scale_tril=factors[z]), obs=x)

    def factor(rho: Tensor) -> Tensor:
        one, zero = torch.ones_like(rho), torch.zeros_like(rho)
        rows = [torch.stack([one, zero], -1), torch.stack([rho, (1 - rho**2).sqrt()], -1)]
        return torch.stack(rows, -2)

    def roots(resp: Tensor, x: Tensor) -> Params:
        """The correlation solves r^3 - c r^2 + (s - 1) r - c = 0, c and s the weighted mean of x y and of x^2 + y^2."""
        counts = resp.sum(0)
        c, s = (x[:, 0] * x[:, 1]) @ resp / counts, x.square().sum(1) @ resp / counts
        low, high = -torch.ones(2).double(), torch.ones(2).double()
        for _ in range(80):
            middle = (low + high) / 2
            rising = middle**3 - c * middle**2 + (s - 1) * middle - c > 0
            low, high = torch.where(rising, low, middle), torch.where(rising, middle, high)
        return {"weights": counts / len(x), "factors": factor(high)}

    def correlated_e(params: Params, x: Tensor) -> Tensor:
        normal = torch.distributions.MultivariateNormal(torch.zeros(2).double(), scale_tril=params["factors"])
        return (params["weights"].log() + normal.log_prob(x[:, None])).softmax(1)

    pairs = torch.cat([X / 2, tensor([0.5, -0.4], [-1.2, 0.9], [0.3, 1.8])])
    origin = {"weights": tensor(0.6, 0.4), "factors": factor(tensor(0.3, -0.4))}
    check = partial(verify_em, correlated, origin, e_step=correlated_e, data=(pairs,), seed=0)
    assert check(m_step=roots).verdict == "exact EM"

    def moment(resp: Tensor, x: Tensor) -> Params:
        right = roots(resp, x)
        return {**right, "factors": factor(((x[:, 0] * x[:, 1]) @ resp / resp.sum(0)).clamp(-0.9, 0.9))}

    assert check(m_step=moment).verdict == "wrong M-step"


def test_a_site_that_never_moves_is_seen_though_every_pass_rises() -> None:
    def keeps(resp: Tensor, x: Tensor, *, params: Params) -> Params:
        return {**line_m_step(resp, x), "variances": params["variances"]}

    report = verify_line(X[:, 0], keeps)
    assert report.verdict == "wrong M-step"
    failed = next(check for check in report.checks if check.name == "every parameter moves")
    assert failed.counterexample is not None
    assert failed.counterexample["site"] == "variances"
    assert next(check for check in report.checks if check.name == "the objective rises").passed


def test_a_fault_in_one_entry_is_placed_there() -> None:
    def one_off(resp: Tensor, x: Tensor) -> Params:
        right = m_step(resp, x)
        stds = right["stds"].clone()
        stds[1, 0] *= 1 + 1e-6
        return {**right, "stds": stds}

    failed = next(check for check in verify(m_step=one_off).checks if not check.passed)
    assert failed.counterexample is not None
    assert failed.counterexample["where"] == "stds[1, 0]"


def test_a_fault_without_a_known_signature_gets_no_hint() -> None:
    report = verify(m_step=spoil(stds=lambda r, g, x: r["stds"] + r["locs"].abs() / 7))
    assert report.verdict == "wrong M-step"
    assert report.hints == ()


@pytest.mark.parametrize(("family", "name"), [("poisson", "rates over n - 1"), ("deconvolution", "printed")])
def test_the_smallest_counterexample_runs_by_itself_and_shows_the_fault(family: str, name: str) -> None:
    subject = next(entry.subject for entry in entries()[family] if name in entry.name)
    report = verify_subject(subject, seed=0)
    assert "joint.expected(resp)" in report.smallest
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(report.smallest, {"m_step": subject.m_step, "model": subject.model})  # the names it does not import
    claimed, better = (float(value) for value in re.findall(r"Q = (-?[\d.]+)", printed.getvalue()))
    assert claimed < better
    rows = re.search(r"resp = torch.tensor\((.*?), dtype", report.smallest, re.DOTALL)
    assert rows is not None
    assert len(ast.literal_eval(rows.group(1))) <= 3


# In any unit


def in_units_of(scale: float, **spoilt: Any) -> Report:
    """Verify the derivation on data, locations and standard deviations ``scale`` times as large."""
    start = {"weights": tensor(1.0, 1.0, 1.0) / 3, "locs": scale * START["locs"], "stds": scale * START["stds"]}
    steps = {"e_step": e_step, "m_step": m_step, "log_likelihood": log_likelihood, **spoilt}
    return verify_em(diagonal, start, data=(scale * X,), seed=0, **steps)


SCALES = [1e-9, 1e-4, 1e9]


@pytest.mark.parametrize("scale", SCALES)
def test_a_right_derivation_is_exact_in_any_unit(scale: float) -> None:
    assert in_units_of(scale).verdict == "exact EM"


@pytest.mark.parametrize("scale", SCALES)
def test_an_e_step_without_weights_is_wrong_in_any_unit(scale: float) -> None:
    """The given weights are equal: only points near them, where the responsibilities are soft, can tell."""

    def without_weights(params: Params, x: Tensor) -> Tensor:
        return (table(params, x) - params["weights"].log()).softmax(-1)

    report = in_units_of(scale, e_step=without_weights)
    assert report.verdict == "wrong E-step"
    assert not in_units_of(scale, log_likelihood=lambda params, x: without_weights(params, x).sum()).ok


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
def test_a_damped_step_rises_in_any_unit(scale: float) -> None:
    def damped(resp: Tensor, x: Tensor, params: Params) -> Params:
        right = m_step(resp, x)
        return {**right, "locs": (params["locs"] + right["locs"]) / 2}

    assert in_units_of(scale, m_step=damped).verdict == "generalised EM"


@pytest.mark.parametrize("factor", [1 + 9e-7, 1 + 2e-6, 1 + 1e-4])
def test_weights_that_do_not_add_up_are_wrong(factor: float) -> None:
    """torch lets a sum pass that is off by 1e-6."""
    report = verify(m_step=spoil(weights=lambda right, resp, x: factor * right["weights"]))
    assert report.verdict == "wrong M-step"


def test_given_weights_in_single_precision_do_not_spoil_a_right_report() -> None:
    rounded = torch.tensor([0.3, 0.3, 0.4]).double()
    assert rounded.sum() != 1
    assert verify({"weights": rounded}).verdict == "exact EM"


@pytest.mark.parametrize(
    ("share", "scale"),
    [(1e-6, 1e-4), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1e-6, 1.0), (2.0, 1.0), (2.0, 1e-4)))],
)
def test_a_covariance_that_is_not_symmetric_is_wrong(scale: float, share: float) -> None:
    """Its Cholesky factor reads the lower triangle alone."""
    x, one = scale * X, gaussian_full.Params(tensor(1.0), tensor([0.8, 0.7]), torch.eye(2).double()[None])
    start = gaussian_full.Params(one.weights, scale * one.locs, scale**2 * one.covariances)

    def step(resp: Tensor, x: Tensor) -> gaussian_full.Params:
        right = gaussian_full.m_step(gaussian_full.statistics(start, x, resp))
        right.covariances[:, 0, 1] *= 1 - share
        return right

    found = verify_em(
        partial(gaussian_full.model, num_components=1),
        start,
        e_step=lambda params, x: torch.ones(len(x), 1, dtype=torch.float64),
        m_step=step,
        data=(x,),
        seed=0,
    )
    assert found.verdict == "wrong M-step"
