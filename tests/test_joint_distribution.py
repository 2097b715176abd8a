"""Geweke's test: right transitions hold, and those with a planted fault do not; every family's Gibbs sweep holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from mixproof.inference.gibbs import gibbs
from mixproof.inference.joint_distribution_test import Transition, joint_distribution_test
from mixproof.models import gaussian_spherical

if TYPE_CHECKING:
    from tests.conftest import Case


def real(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


PRIOR = gaussian_spherical.Prior(real([2.0, 2.0]), real([0.0]), real(0.2), real(3.0), real(2.0))
MODEL = partial(gaussian_spherical.model, num_components=2, prior=PRIOR)
ROWS = torch.zeros(6, 1, dtype=torch.float64)
SEED = 1
OF_DATA = ("log likelihood", "log p(row 1)", "p(rows 1, 2 together)")


def sweep(
    params: dict[str, Tensor],
    x: Tensor,
    generator: torch.Generator,
    *,
    rate_factor: float = 1.0,
    loc_factor: float = 1.0,
    num_rows: int = 6,
    one_chance: bool = False,
) -> dict[str, Tensor]:
    """Draw allocations and then parameters, written out here for one dimension; the settings plant faults."""
    squares = (x[:, :, None] - params["locs"][:, None]).square().sum(-1)  # (C, N, K)
    variances = params["variances"][:, None]
    log_joint = params["weights"].log()[:, None] - (variances.log() + squares / variances) / 2
    shape = log_joint[:, :1].shape if one_chance else log_joint.shape  # one random number for all rows is a fault
    noise = torch.rand(shape, generator=generator, dtype=torch.float64).log().neg().log().neg()
    resp = torch.nn.functional.one_hot((log_joint + noise).argmax(-1), 2).double()[:, :num_rows]
    rows = x[:, :num_rows]
    counts, sums = resp.sum(1), resp.mT @ rows
    total = PRIOR.strength + counts
    locs = sums / total[..., None]
    raw = torch.einsum("cnk,cn->ck", resp, rows.square().sum(-1))
    rate = PRIOR.rate + (raw - total * locs.square().sum(-1)) / 2
    variances = rate_factor * rate / torch._standard_gamma(PRIOR.shape + counts / 2, generator)
    deviations = (
        torch.randn(locs.shape, generator=generator, dtype=torch.float64) * (variances / total).sqrt()[..., None]
    )
    weights = torch._sample_dirichlet(PRIOR.concentration + counts, generator)
    return {"weights": weights, "locs": locs + loc_factor * deviations, "variances": variances}


def verdict(transition: Transition, **settings: Any) -> str:
    sizes = {"num_chains": 60, "num_steps": 15, "num_reference": 500} | settings
    return joint_distribution_test(MODEL, transition, ROWS, seed=SEED, **sizes).verdict


def test_a_right_sweep_holds() -> None:
    assert verdict(sweep) == "holds"


def test_progress_is_on_stderr(capsys: pytest.CaptureFixture) -> None:
    verdict(sweep, num_chains=20, num_steps=2, num_reference=20, progress=True)
    captured = capsys.readouterr()
    assert [captured.err.count("100%"), captured.out] == [1, ""]


def test_any_transition_that_leaves_the_posterior_as_it_is_holds() -> None:
    """One that stays where it is too: the test is of the law that is left as it is, not of mixing."""
    assert verdict(lambda params, x, generator: params) == "holds"


@pytest.mark.parametrize(
    "faults",
    [{"rate_factor": 6 / 5}, {"loc_factor": 0.0}, {"num_rows": 3}, {"one_chance": True}],
    ids=[
        "variance times n / (n - 1)",
        "locations at their means, not drawn",
        "half the rows dropped",
        "one chance for all rows",
    ],
)
def test_wrong_sweeps_are_refuted(faults: dict[str, Any]) -> None:
    assert verdict(partial(sweep, **faults)) == "refuted"


def test_a_transition_that_ignores_the_data_is_refuted() -> None:
    """Its parameters have the right law, and so have data drawn from them: only both together, as drawn, are wrong."""
    report = joint_distribution_test(
        MODEL, partial(sweep, num_rows=0), ROWS, seed=SEED, num_chains=60, num_steps=15, num_reference=500
    )
    failed = {check.name for check in report.checks if not check.passed}
    assert "log likelihood, location" in failed
    assert failed <= {f"{name}, {kind}" for name in OF_DATA for kind in ("location", "spread")}


def test_wrong_settings_and_transitions_are_told() -> None:
    with pytest.raises(ValueError, match="num_chains must be at least 20, not 19"):
        verdict(sweep, num_chains=19)
    with pytest.raises(TypeError, match="num_steps must be an integer"):
        verdict(sweep, num_steps=1.5)
    for false_alarm in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="false_alarm must lie between 0 and 1"):
            verdict(sweep, false_alarm=false_alarm)
    with pytest.raises(ValueError, match="values of weights that are not finite"):
        verdict(lambda params, x, generator: {name: value * torch.nan for name, value in params.items()})


def gibbs_sweep(case: Case, prior: Any, split_merge: bool) -> Callable[..., dict[str, Tensor]]:
    """Return the sweep of ``gibbs`` as a transition of chains, each with rows of its own."""

    def transition(params: dict[str, Tensor], x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        settings = {"num_components": case.num_components(2), "num_chains": 1, "num_draws": 1, "num_warmup": 1}
        found = [
            gibbs(
                case.family,
                rows,
                prior,
                **settings,
                generator=generator,
                init={name: value[chain][None] for name, value in params.items()},
                split_merge=split_merge,
            ).params
            for chain, rows in enumerate(x)
        ]
        return {name: torch.cat([after[name][:, 0] for after in found]) for name in params}

    return transition


def gibbs_report(case: Case, num_chains: int, num_steps: int, num_reference: int, split_merge: bool = False) -> Any:
    prior = case.prior(k=2)
    return joint_distribution_test(
        case.program(2, prior),
        gibbs_sweep(case, prior, split_merge),
        torch.zeros(5, 2, dtype=torch.float64),
        num_chains=num_chains,
        num_steps=num_steps,
        num_reference=num_reference,
        seed=SEED,
    )


def test_gibbs_sweeps_of_every_family_hold(case: Case) -> None:
    report = gibbs_report(case, 20, 4, 200)
    assert report.ok, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("split_merge", [False, True])
def test_gibbs_sweeps_of_every_family_hold_for_long(case: Case, split_merge: bool) -> None:
    if split_merge and not hasattr(case.family, "log_marginal"):
        return
    report = gibbs_report(case, 100, 20, 2000, split_merge)
    assert report.ok, str(report)
