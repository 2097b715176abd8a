"""Runs of equal steps, and all that are built on them: stopped anywhere, they go on to the same end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from pyro.optim import PyroOptim
from safetensors import safe_open
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference import checkpoint as checkpoints
from mixproof.inference.checkpoint import CheckpointError
from mixproof.inference.joint_distribution_test import joint_distribution_test
from mixproof.inference.standard_errors import bootstrap
from mixproof.inference.steps import take_steps
from mixproof.inference.svi import svi
from mixproof.models import bernoulli

NUM_STEPS = 7


class Walk:
    """A random walk whose state is its place and its generator."""

    def __init__(self, scale: float = 1.0):
        self.generator = torch.Generator().manual_seed(0)
        self.place, self.scale, self.num_taken = torch.zeros(2, dtype=torch.float64), scale, 0

    def step(self, number: int) -> Tensor:
        self.num_taken += 1
        self.place += self.scale * torch.randn(2, generator=self.generator, dtype=torch.float64)  # in place
        return torch.cat([self.place, self.place.new_full((1,), number)])

    def state(self) -> dict[str, Tensor]:
        return {"place": self.place, "generator": self.generator.get_state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.place = state["place"]
        self.generator.set_state(state["generator"])


def walk(file: Path | None, process: Walk, every: int = 1, identity: Any = "a walk") -> Tensor:
    return take_steps(process, NUM_STEPS, file=file, identity={"is": identity}, every=every, progress=None)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, num_saves: int) -> None:
    """Let Ctrl-C fall right behind a write of the file."""
    save, left = checkpoints.save, iter(range(num_saves - 1))

    def stopping(*args: Any) -> None:
        save(*args)
        if next(left, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", stopping)


@pytest.mark.parametrize("every", [1, 2, 3, 100])
def test_a_run_stopped_anywhere_goes_on_to_the_same_end(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = walk(None, Walk())
    assert whole.shape == (NUM_STEPS, 3)
    num_saves = len(range(0, NUM_STEPS, every))
    for number in range(1, num_saves + 1):
        file = tmp_path / str(number)
        with monkeypatch.context() as patch:
            interrupt_after(patch, number)
            with pytest.raises(KeyboardInterrupt):
                walk(file, Walk(), every)
        rest = Walk()
        assert torch.equal(walk(file, rest, every), whole)
        assert rest.num_taken == NUM_STEPS - (number - 1) * every, "it takes the last step in the file again"
        assert torch.equal(walk(file, Walk(), every), whole)


def test_another_process_is_told_by_its_step(tmp_path: Path) -> None:
    file = tmp_path / "state"
    walk(file, Walk(), every=3)
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"belongs to another run: its step 6 gave .*, and gives"):
        walk(file, Walk(scale=1.001), every=3)
    with pytest.raises(CheckpointError, match="belongs to another run, which differs in is"):
        walk(file, Walk(), every=3, identity="another")
    assert file.read_bytes() == before
    assert not torch.equal(walk(None, Walk(scale=1.001)), walk(None, Walk()))


def test_a_file_that_cannot_be_written_costs_one_step(tmp_path: Path) -> None:
    process = Walk()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        walk(tmp_path / "nowhere" / "state", process)
    assert process.num_taken == 1


# What is built on them, and the bootstrap, which ends when all replicates have stopped


X = torch.linspace(-1, 2, 30, dtype=torch.float64)
BINARY = (torch.rand(40, 5, generator=torch.Generator().manual_seed(1)) < 0.5).double()
START = bernoulli.Params(
    torch.tensor([0.4, 0.6], dtype=torch.float64),
    torch.tensor([[0.3, 0.6, 0.4, 0.5, 0.7], [0.6, 0.4, 0.5, 0.6, 0.3]], dtype=torch.float64),
)


def share_of_two(x: Tensor, concentration: float = 2.0) -> None:
    share = pyro.sample("share", dist.Beta(x.new_tensor(concentration), x.new_tensor(2.0)))
    centre = pyro.sample("centre", dist.Normal(x.new_tensor(0.0), 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(centre + 2 * z - 1, 1.0), obs=x)


def with_param_site(x: Tensor) -> None:
    scale = pyro.param("scale", lambda: torch.ones((), dtype=torch.float64), constraint=constraints.positive)
    share = pyro.sample("share", dist.Beta(x.new_tensor(2.0), x.new_tensor(2.0)))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(2 * z - 1, scale), obs=x)


def beta_guide(x: Tensor) -> None:
    counts = pyro.param("counts", lambda: 2 * torch.ones(2, dtype=torch.float64), constraint=constraints.positive)
    pyro.sample("share", dist.Beta(counts[0], counts[1]))


def by_name(name: str, checkpoint: Path | None = None, **settings: Any) -> list[Tensor]:
    settings = dict[str, Any]({"seed": 0, "model": share_of_two, "x": X}) | settings
    found = svi(settings.pop("model"), name, settings.pop("x"), num_steps=12, checkpoint=checkpoint, **settings)
    return [found.losses, *found.guide.median().values()]


def by_autoguide(checkpoint: Path | None = None, optimiser: Any = None, **settings: Any) -> list[Tensor]:
    settings = dict[str, Any]({"seed": 0, "model": share_of_two, "x": X}) | settings
    model = settings.pop("model")
    guide = AutoNormal(poutine.block(model, hide=["z"]))
    optimiser = optimiser and optimiser()
    x = settings.pop("x")
    found = svi(model, guide, x, num_steps=12, optimiser=optimiser, checkpoint=checkpoint, **settings)
    return [found.losses, *found.guide.median().values()]


def by_functions(checkpoint: Path | None = None) -> list[Tensor]:
    found = svi(with_param_site, beta_guide, X, num_steps=12, seed=0, checkpoint=checkpoint, checkpoint_every=2)
    drawn = poutine.trace(found.guide).get_trace(X).nodes["counts"]["value"]
    return [found.losses, drawn]


def by_bootstrap(checkpoint: Path | None = None, method: Any = "parametric", seed: int = 0, **settings: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    settings = dict[str, Any]({"x": BINARY, "params": START, "num_replicates": 6, "rtol": 1e-6}) | settings
    found = bootstrap(
        bernoulli,
        settings.pop("x"),
        settings.pop("params"),
        generator=generator,
        method=method,
        checkpoint=checkpoint,
        checkpoint_every=4,
        **settings,
    )
    return [*found.params.values(), found.sample_stats["lp"], generator.get_state()]


def stay(params: Mapping[str, Tensor], x: Tensor, generator: torch.Generator) -> Mapping[str, Tensor]:
    return {"share": params["share"].clone(), "centre": params["centre"] + 0 * x.mean()}


def drift(params: Mapping[str, Tensor], x: Tensor, generator: torch.Generator) -> Mapping[str, Tensor]:
    noise = torch.rand(params["share"].shape, generator=generator, dtype=torch.float64)
    return {"share": noise, "centre": params["centre"]}


def by_joint_test(checkpoint: Path | None = None, transition: Any = drift, seed: int = 0) -> list[Tensor]:
    found = joint_distribution_test(
        share_of_two,
        transition,
        X[:4],
        num_chains=20,
        num_steps=5,
        num_reference=20,
        seed=seed,
        checkpoint=checkpoint,
        checkpoint_every=2,
    )
    return [torch.tensor([check.p_value for check in found.checks])]


RUNS: dict[str, Callable[..., list[Tensor]]] = {
    "AutoNormal": partial(by_name, "AutoNormal", checkpoint_every=3),
    "AutoMultivariateNormal": partial(by_name, "AutoMultivariateNormal", checkpoint_every=3),
    "AutoLaplace": partial(by_name, "AutoLaplace", checkpoint_every=3),
    "a guide of Pyro's": partial(by_autoguide, checkpoint_every=5),
    "resilient backpropagation": partial(
        by_autoguide, optimiser=lambda: PyroOptim(torch.optim.Rprop, {"lr": 0.01}), checkpoint_every=3
    ),
    "param sites of model and guide": by_functions,
    "parametric bootstrap": by_bootstrap,
    "nonparametric bootstrap": partial(by_bootstrap, method="nonparametric"),
    "joint distribution test": by_joint_test,
}


@pytest.mark.parametrize("name", RUNS)
def test_engines_go_on_to_the_same_result(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, file = RUNS[name], tmp_path / "state"
    for _ in range(2):  # at the first write, and at one in the middle
        with monkeypatch.context() as patch:
            interrupt_after(patch, 2 if file.exists() else 1)
            with pytest.raises(KeyboardInterrupt):
                run(checkpoint=file)
    assert all(torch.equal(*pair) for pair in zip(run(checkpoint=file), run(), strict=True))


@pytest.mark.parametrize(
    ("run", "other", "what"),
    [
        (RUNS["AutoNormal"], {"name": "AutoLaplace"}, "engine"),
        (RUNS["AutoNormal"], {"seed": 1}, "seed"),
        (RUNS["AutoNormal"], {"x": X + 1}, "data"),
        (RUNS["AutoNormal"], {"learning_rate": 0.2}, "learning_rate"),
        (RUNS["AutoNormal"], {"model": partial(share_of_two, concentration=2.1)}, "its step"),
        (RUNS["a guide of Pyro's"], {"seed": 1}, "seed"),
        (RUNS["a guide of Pyro's"], {"x": X + 1}, "data"),
        (RUNS["a guide of Pyro's"], {"model": with_param_site}, "guide"),
        (RUNS["a guide of Pyro's"], {"learning_rate": 0.2}, "optimiser"),
        (RUNS["a guide of Pyro's"], {"model": partial(share_of_two, concentration=2.1)}, "its step"),
        (RUNS["parametric bootstrap"], {"method": "nonparametric"}, "engine"),
        (RUNS["parametric bootstrap"], {"seed": 1}, "generator"),
        (RUNS["parametric bootstrap"], {"x": 1 - BINARY}, "x"),
        (RUNS["parametric bootstrap"], {"params": START._replace(probs=START.probs.flip(0))}, "params"),
        (RUNS["parametric bootstrap"], {"num_replicates": 7}, "num_replicates"),
        (by_joint_test, {"transition": stay}, "its step"),
        (by_joint_test, {"seed": 1}, "seed"),
    ],
)
def test_the_file_of_another_run_is_refused(run: Any, other: dict[str, Any], what: str, tmp_path: Path) -> None:
    file = tmp_path / "state"
    run(checkpoint=file)
    before = file.read_bytes()
    changed = partial(by_name, other["name"], checkpoint_every=3) if "name" in other else partial(run, **other)
    with pytest.raises(CheckpointError, match=f"belongs to another run.*{what}"):
        changed(checkpoint=file)
    assert file.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AutoMultivariateNormal", "a guide of Pyro's", "parametric bootstrap"])
def test_a_killed_run_goes_on(name: str, tmp_path: Path) -> None:
    """The process ends by a signal that it cannot answer, as soon as its file is there."""
    file, script = tmp_path / "state", tmp_path / "run.py"
    longer = {"rtol": 1e-13} if "bootstrap" in name else {"checkpoint_every": 1}
    script.write_text(
        "import sys, test_steps as t; t.RUNS[sys.argv[1]](checkpoint=t.Path(sys.argv[2]), **eval(sys.argv[3]))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen([sys.executable, script, name, file, repr(longer)], env=environment)
    while process.poll() is None and not file.exists():
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with safe_open(file, framework="pt") as found:
        assert len(list(found.keys())) > 0
    whole = RUNS[name](**longer)
    assert all(torch.equal(*pair) for pair in zip(RUNS[name](checkpoint=file, **longer), whole, strict=True))
