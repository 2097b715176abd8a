"""Sequential Monte Carlo over rows against sums over all allocations, and the groups that tempering misses."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from mixproof.inference import allocation_smc as module
from mixproof.inference.allocation_smc import AllocationSMC, allocation_smc, integrates_out
from mixproof.inference.evidence import log_evidence
from mixproof.inference.exact_evidence import exact_log_evidence
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.validation import example_params
from mixproof.models import gaussian_diagonal, gaussian_full, laplace

if TYPE_CHECKING:
    from tests.conftest import Case

NUM_SEEDS = 50
RARE = 1e-4
"""How often a right estimate may fail one of the tests here over all seeds."""
SMALL: dict[str, Any] = {"num_replicates": 32, "num_chains": 8, "num_moves": 2}


@pytest.fixture(scope="module")
def x() -> Tensor:
    """Two groups and a row between them."""
    return torch.tensor([[-3.9], [-3.2], [-3.4], [0.3], [3.9], [3.4], [4.3]], dtype=torch.float64)


@pytest.fixture(scope="module")
def prior(x: Tensor) -> gaussian_diagonal.Prior:
    return gaussian_diagonal.weakly_informative_prior(x, 2)


@pytest.fixture(scope="module")
def exact(x: Tensor, prior: gaussian_diagonal.Prior) -> float:
    return float(exact_log_evidence(gaussian_diagonal, x, prior, num_components=2))


def runs(x: Tensor, prior: Any, num_seeds: int) -> list[AllocationSMC]:
    settings = {**SMALL, "efficiency": 0.999}  # so that there are resamplings on the way
    return [
        allocation_smc(gaussian_diagonal, x, prior, num_components=2, seed=seed, **settings)
        for seed in range(num_seeds)
    ]


def z_scores(found: list[AllocationSMC], exact: float) -> Tensor:
    return torch.tensor([(run.log_evidence - exact) / run.standard_error for run in found])


def check_z_scores(z: Tensor) -> None:
    """Assert that z-scores (Z,) of right estimates have mean 0 and unit spread."""
    assert abs(float(z.mean())) * math.sqrt(len(z)) < scipy.stats.norm.isf(RARE / 2)
    low, high = scipy.stats.chi2.ppf([RARE / 2, 1 - RARE / 2], len(z) - 1)
    assert low < float(z.var()) * (len(z) - 1) < high


def test_the_standard_error_is_true_and_a_replicate_unbiased(x: Tensor, prior: Any, exact: float) -> None:
    found = runs(x, prior, NUM_SEEDS)
    assert max(len(run.num_rows) for run in found) > 1
    check_z_scores(z_scores(found, exact))
    ratios = torch.stack([run.log_evidences for run in found]).sub(exact).exp().mean(1)
    error = float(ratios.std()) / math.sqrt(len(found))
    assert abs(float(ratios.mean()) - 1) < scipy.stats.norm.isf(RARE / 2) * error


@pytest.mark.filterwarnings("ignore:the mean of the evidences")
@pytest.mark.parametrize(
    "fault", [pytest.param("weights forgotten", marks=pytest.mark.slow), "a row left out of the moves"]
)
def test_planted_faults_are_seen(
    fault: str, x: Tensor, prior: Any, exact: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "weights forgotten":
        right = module.systematic
        monkeypatch.setattr(
            module, "systematic", lambda weights, *rest: right(weights.sign() / weights.shape[1], *rest)
        )
    else:
        statistics = gaussian_diagonal.statistics
        monkeypatch.setattr(
            gaussian_diagonal,
            "statistics",
            lambda params, rows, resp: statistics(
                params, rows[-max(len(rows) - 1, 1) :], resp[-max(len(rows) - 1, 1) :]
            ),
        )
    with pytest.raises(AssertionError):
        check_z_scores(z_scores(runs(x, prior, NUM_SEEDS), exact))


def test_every_family_that_integrates_out(case: Case) -> None:
    if not integrates_out(case.family):
        return
    rows, own = case.data(3, num_data=6, k=2), case.prior(1, k=2)
    truth = float(exact_log_evidence(case.family, rows, own, num_components=2))
    program = case.program(2, own)
    smc = log_evidence(program, rows, family=case.family, method="smc", seed=1)
    assert abs(smc.log_evidence - truth) < scipy.stats.t.isf(RARE / 2, 31) * smc.standard_error + 1e-12
    bridge = log_evidence(program, rows, family=case.family, seed=2)
    assert abs(bridge.log_evidence - truth) < scipy.stats.norm.isf(RARE / 2) * bridge.standard_error
    lp = smc.draws.sample_stats["lp"].flatten()[:20]
    posterior = LogPosterior(program, rows)
    u = posterior.unconstrain({site: value.flatten(0, 1)[:20] for site, value in smc.draws.params.items()})
    at = posterior(u, torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(lp, at.log_prior + at.log_likelihood - posterior.log_jacobian(u), rtol=1e-9, atol=1e-9)


def test_one_component_has_no_error(real_data: dict[str, Tensor]) -> None:
    rows = real_data["iris"]
    own = gaussian_full.weakly_informative_prior(rows, 1)
    params, _ = example_params(gaussian_full, 1, rows)
    stats = gaussian_full.statistics(params, rows, torch.ones(len(rows), 1, dtype=torch.float64))
    truth = float(gaussian_full.log_marginal(stats, own))
    found = allocation_smc(gaussian_full, rows, own, num_components=1, seed=0, **SMALL)
    assert found.log_evidence == pytest.approx(truth, rel=1e-11)


def test_two_groups_of_iris_are_found(real_data: dict[str, Tensor]) -> None:
    """p(x) is more than p(x, z) of one allocation under both its numberings: setosa in one component, the rest in one.

    Tempering from this wide prior ends below that.
    """
    rows = real_data["iris"]
    own = gaussian_full.weakly_informative_prior(rows, 2)
    params, _ = example_params(gaussian_full, 2, rows)
    z = (torch.arange(len(rows)) >= 50).long()
    stats = gaussian_full.statistics(params, rows, torch.nn.functional.one_hot(z, 2).to(rows))
    bound = float(gaussian_full.log_marginal(stats, own)) + math.log(2)
    found = allocation_smc(gaussian_full, rows, own, num_components=2, seed=0, num_replicates=16)
    assert found.log_evidence > bound - 4 * found.standard_error
    assert found.standard_error < 1


# Bad input and long runs


def test_failures_are_said_in_words(x: Tensor, prior: Any) -> None:
    run = partial(allocation_smc, gaussian_diagonal, x, num_components=2, seed=0)
    with pytest.raises(TypeError, match="no log_predictive"):
        allocation_smc(laplace, x, laplace.weakly_informative_prior(x, 2), num_components=2, seed=0)
    with pytest.raises(ValueError, match="prior is None"):
        run(None)
    with pytest.raises(ValueError, match="num_moves must be at least 1"):
        run(prior, num_moves=0)
    program = partial(gaussian_diagonal.model, num_components=2, prior=prior)
    with pytest.raises(ValueError, match="not that of the family"):
        log_evidence(partial(program), x, family=gaussian_full, seed=0)


def test_replicates_of_which_one_decides_are_a_warning(x: Tensor) -> None:
    far = torch.cat([x, x + 1000, x - 3000])
    own = gaussian_diagonal.weakly_informative_prior(x, 3)
    with pytest.warns(UserWarning, match="of 8 replicates rests on 2.0 of them"):
        allocation_smc(
            gaussian_diagonal, far, own, num_components=3, seed=0, num_replicates=8, num_chains=2, num_moves=1
        )


RUN = """
import sys, torch
from functools import partial
from pathlib import Path
from mixproof.inference.evidence import log_evidence
from mixproof.models import gaussian_diagonal
torch.set_num_threads(1)
x = torch.linspace(-3, 3, 60, dtype=torch.float64)[:, None] ** 3
prior = gaussian_diagonal.weakly_informative_prior(x, 3)
program = partial(gaussian_diagonal.model, num_components=3, prior=prior)
family = gaussian_diagonal if sys.argv[1] == "rows" else None
found = log_evidence(program, x, family=family, seed=4, checkpoint=sys.argv[2] if len(sys.argv) > 2 else None)
print(found.log_evidence.hex(), found.standard_error.hex())
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", ["rows", "temperatures"])
def test_a_killed_run_goes_on_to_the_same_evidence(path: str, tmp_path: Path) -> None:
    """A process is killed as soon as its checkpoint has been written for the third time."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    file = tmp_path / "state"
    command = [sys.executable, "-c", RUN, path]
    whole = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    process = subprocess.Popen([*command, str(file)], env=environment, stdout=subprocess.PIPE, text=True)
    seen: set[int] = set()
    while process.poll() is None and len(seen) < 3:
        if file.exists():
            seen.add(file.stat().st_mtime_ns)
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.communicate()[0] == ""
    assert process.returncode == -signal.SIGKILL
    rest = subprocess.run([*command, str(file)], env=environment, capture_output=True, text=True, check=True).stdout
    assert rest == whole


def test_a_checkpoint_of_another_run_is_refused(x: Tensor, prior: Any, tmp_path: Path) -> None:
    program = partial(gaussian_diagonal.model, num_components=2, prior=prior)
    settings: dict[str, Any] = {"num_replicates": 8, "num_chains": 16, "num_moves": 15}
    for number, family in enumerate((gaussian_diagonal, None)):
        own = {**settings, "family": family, "checkpoint": tmp_path / str(number)}
        first = log_evidence(program, x, seed=0, **own)
        assert log_evidence(program, x, seed=0, **own).log_evidence == first.log_evidence
        with pytest.raises(ValueError, match="belongs to another run, which differs in"):
            log_evidence(program, x + 1, seed=0, **own)
        with pytest.raises(ValueError, match="belongs to another run, which differs in seed"):
            log_evidence(program, x, seed=1, **own)
        with pytest.raises(FileNotFoundError):
            log_evidence(program, x, seed=1, **{**own, "checkpoint": tmp_path / "none" / "file"})
