"""Pyro's own No-U-Turn sampler behind ``nuts``: plain and compiled, on one data set and on one for each chain."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from safetensors.torch import load_file
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.nuts import nuts

nuts_module = importlib.import_module("mixproof.inference.nuts")
RECORDER = nuts_module._recorder
X = torch.tensor([-1.2, -0.4, 0.3, 1.9, 2.4, 3.0], dtype=torch.float64)


def share_and_loc(x: Tensor) -> None:
    """Two parameters, which the program meets in another order than that of their names."""
    share = pyro.sample("share", dist.Beta(1.5, 2.0))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc[z.long()], 1.0), obs=x)


def share_of_two(x: Tensor, apart: float = 2.0) -> None:
    """Two known components: their share alone is unknown, and its posterior a quadrature in one dimension."""
    share = pyro.sample("share", dist.Beta(1.5, 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(apart * z, 1.0), obs=x)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("model", "data_sets"),
    [
        pytest.param(share_and_loc, None, id="chains on one data set"),
        pytest.param(share_and_loc, torch.stack([X, X.flip(0) + 1]), id="a data set for each chain"),
    ],
)
def test_it_draws_the_same_when_compiled(model: Any, data_sets: Tensor | None) -> None:
    """A few steps, before rounding grows; the latents summed out, and lp by another route."""
    batched = data_sets is not None
    settings: Any = {"num_chains": 2, "num_draws": 5, "num_warmup": 5, "seed": 3, "batched": batched}
    x = X if data_sets is None else data_sets
    plain, compiled = (nuts(model, x, **settings, jit_compile=jit_compile) for jit_compile in (False, True))
    for chain in range(2):
        posterior = LogPosterior(model, x[chain] if batched else x)
        u = posterior.unconstrain({name: value[chain] for name, value in compiled.params.items()})
        parts = posterior(u, torch.ones_like(u[:, 0]))
        lp = parts.log_prior + parts.log_likelihood - posterior.log_jacobian(u)
        assert (compiled.sample_stats["lp"][chain] - lp).abs().max() < 1e-10
    for name, value in plain.params.items():
        assert (compiled.params[name] - value).abs().max() < 1e-8
        assert len(value.unique()) > 2


def branching(x: Tensor) -> None:
    share = pyro.sample("share", dist.Beta(x.new_tensor(1.5), x.new_tensor(2.0)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(share + 0 if share > 0.5 else share), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(2 * z, x.new_ones(())), obs=x)


def test_it_says_what_cannot_be_compiled() -> None:
    settings: Any = {"num_chains": 1, "num_draws": 5, "num_warmup": 5, "seed": 3, "jit_compile": True}
    init = {"share": torch.tensor([0.3], dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"cannot be compiled, by .item\(\) or an if: leave jit_compile out"):
        nuts(branching, X, **settings, init=init)


@pytest.mark.slow
def test_it_says_that_there_is_no_compiler(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("""
import pyro, pyro.distributions as dist, torch
from mixproof.inference.nuts import nuts

def model(x):
    share = pyro.sample("share", dist.Beta(x.new_tensor(1.5), 2.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

nuts(model, torch.zeros(3), num_chains=1, num_draws=5, num_warmup=5, seed=0, jit_compile=True)
""")
    environment = os.environ | {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    ran = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "RuntimeError: torch.compile failed (InvalidCxxCompiler: No working C++ compiler found" in ran.stderr
    assert "install a C++ compiler, or leave jit_compile out" in ran.stderr


def test_it_says_what_it_did() -> None:
    settings: dict[str, Any] = {"num_chains": 2, "num_draws": 10, "num_warmup": 10, "seed": 3}
    init = {"share": torch.tensor([0.3, 0.6], dtype=torch.float64)}
    draws = nuts(share_of_two, X, **settings, init=init)
    again = nuts(share_of_two, X, **settings, init=init)
    share = draws.params["share"]
    assert share.shape == (2, 10)
    assert torch.equal(again.params["share"], share)
    assert not torch.equal(share[0], share[1])
    rows = torch.stack([(1 - share).log()[..., None] - X.square() / 2, share.log()[..., None] - (X - 2).square() / 2])
    prior = dist.Beta(torch.tensor(1.5).double(), torch.tensor(2.0).double()).log_prob(share)
    by_hand = prior + rows.logsumexp(0).sum(-1) - len(X) / 2 * math.log(2 * math.pi)
    assert (draws.sample_stats["lp"] - by_hand).abs().max() < 1e-12
    rates = draws.sample_stats["acceptance_rate"]
    assert ((rates > -1e-12) & (rates < 1 + 1e-12)).all()
    assert draws.sample_stats["diverging"].sum() == draws.attributes["num_divergences"]
    step_size = draws.sample_stats["step_size"]
    assert torch.equal(step_size, step_size[:, :1].expand_as(step_size))
    assert (step_size > 0).all()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"num_draws": 0}, "num_draws must be at least 1, not 0"),
        ({"max_tree_depth": 0}, "max_tree_depth must be at least 1, not 0"),
        ({"target_acceptance": 2.0}, "target_acceptance must lie between 0 and 1, not 2.0"),
        ({"batched": True}, rf"there are {len(X)} data sets, and 2 chains: one each"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any], words: str) -> None:
    x = X[:, None] if "batched" in setting else X
    with pytest.raises(ValueError, match=words):
        nuts(share_of_two, x, **{"num_draws": 5, "num_warmup": 5, "seed": 0, **setting})


SETTINGS: dict[str, Any] = {"num_chains": 3, "num_draws": 5, "num_warmup": 5, "seed": 3}


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Interrupt the next run behind a draw after the warm-up, by its number from 1; 0 for none."""

    def arrange(stop: int) -> None:
        seen: list[str] = []

        def interrupting(*args: Any) -> Any:
            hook = RECORDER(*args)

            def hooked(kernel: Any, params: Any, stage: str, number: int) -> None:
                hook(kernel, params, stage, number)
                seen.extend([stage] if stage.startswith("Sample") else [])
                if len(seen) == stop:
                    raise KeyboardInterrupt

            return hooked

        monkeypatch.setattr(nuts_module, "_recorder", interrupting)

    return arrange


@pytest.mark.parametrize(("stop", "num_chains", "num_draws"), [(3, 1, 3), (7, 1, 5), (12, 2, 5)])
def test_an_interrupt_keeps_whole_chains_or_the_draws_so_far(
    stop: int, num_chains: int, num_draws: int, interrupt: Any
) -> None:
    """The first draws of the run that was not interrupted, number by number; after draw 12 the third chain is begun."""
    whole = nuts(share_of_two, X, **SETTINGS)
    interrupt(stop)
    words = f"stopped after {stop} of 5 draws of a chain" if stop < 5 else f"stopped after {num_chains} of 3 chains"
    with pytest.warns(ConvergenceWarning, match=words):
        found = nuts(share_of_two, X, **SETTINGS)
    assert found.attributes["num_chains"] == num_chains
    for values, of_whole in ((found.params, whole.params), (found.sample_stats, whole.sample_stats)):
        for name, value in values.items():
            assert torch.equal(value, of_whole[name][:num_chains, :num_draws])
    interrupt(stop)
    with pytest.raises(KeyboardInterrupt):  # each chain has data of its own, and none can be missing
        nuts(share_of_two, torch.stack([X, X + 1, X - 1]), batched=True, **SETTINGS)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.filterwarnings("ignore:stopped after")
def test_a_run_goes_on_with_the_chain_at_which_it_stopped(batched: bool, interrupt: Any, tmp_path: Path) -> None:
    run: Any = partial(nuts, **SETTINGS, batched=batched)
    x = torch.stack([X, X + 1, X - 1]) if batched else X
    whole, file = run(share_of_two, x), tmp_path / "state"
    for stop, num_kept in ((3, 0), (7, 1), (8, 2)):
        interrupt(stop)
        with contextlib.suppress(KeyboardInterrupt):
            run(share_of_two, x, checkpoint=file)
        assert len(load_file(file).get("stats", ())) == num_kept
    interrupt(6)  # one more than are left
    for _ in range(2):
        found = run(share_of_two, x, checkpoint=file)
        for values, of_whole in ((found.params, whole.params), (found.sample_stats, whole.sample_stats)):
            assert all(torch.equal(value, of_whole[name]) for name, value in values.items())
        interrupt(1)  # nothing is left to draw


def test_a_killed_run_goes_on_to_the_same_draws(tmp_path: Path) -> None:
    """The process ends by a signal that it cannot answer, as soon as its first chain is in the file."""
    file, settings = tmp_path / "state", SETTINGS | {"num_draws": 50}
    script = tmp_path / "run.py"
    words = "import sys, test_nuts as t; t.nuts(t.share_of_two, t.X, checkpoint=sys.argv[1], **eval(sys.argv[2]))"
    script.write_text(words)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen([sys.executable, script, file, repr(settings)], env=environment)
    while process.poll() is None and (not file.exists() or not load_file(file)):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < len(load_file(file)["stats"]) < 3
    found, whole = (nuts(share_of_two, X, **settings, checkpoint=each) for each in (file, None))
    assert torch.equal(found.params["share"], whole.params["share"])


def test_a_checkpoint_in_single_precision_is_known_again(tmp_path: Path) -> None:
    file = tmp_path / "state"

    def program(x: Tensor, num_components: int = 4) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(torch.ones(num_components)))
        locs = pyro.sample("locs", dist.Normal(torch.zeros(num_components), 5.0).to_event(1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(locs[z], 1.0), obs=x)

    first, again = (nuts(program, X.float(), **SETTINGS, checkpoint=file) for _ in range(2))
    assert first.params["locs"].dtype == torch.float32
    assert all(torch.equal(again.params[name], value) for name, value in first.params.items())
    with pytest.raises(ValueError, match="belongs to another run, which differs in sites"):
        nuts(partial(program, num_components=3), X.float(), **SETTINGS, checkpoint=file)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state"
    with pytest.raises(FileNotFoundError):
        nuts(share_of_two, X, **SETTINGS | {"num_draws": 10**9}, checkpoint=tmp_path / "none" / "file")
    nuts(share_of_two, X, **SETTINGS, checkpoint=file)
    with pytest.raises(ValueError, match="belongs to another run, which differs in seed"):
        nuts(share_of_two, X, **SETTINGS | {"seed": 4}, checkpoint=file)
    with pytest.raises(ValueError, match="belongs to another run, which differs in data"):
        nuts(share_of_two, X + 1, **SETTINGS, checkpoint=file)
    with pytest.raises(ValueError, match="belongs to another program: the log posterior where chain"):
        nuts(partial(share_of_two, apart=2.5), X, **SETTINGS, checkpoint=file)
