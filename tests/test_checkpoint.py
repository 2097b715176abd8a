"""Checkpoints: runs killed at any moment and resumed end as if nothing had happened, and a wrong file is refused.

The kills are real. This file run as a script forks the processes that are killed, so that a test session pays for one
more start of Python and no more.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mixproof.inference import checkpoint
from mixproof.inference.em import Fit, em
from mixproof.models import gaussian_diagonal, gaussian_full
from mixproof.models.gaussian_isotropic import GaussianIsotropic
from tests.conftest import seeded

if TYPE_CHECKING:
    from tests.conftest import Case

ROOT = Path(__file__).resolve().parents[1]
SECONDS_A_PASS = 0.003
PRIOR = gaussian_full.Prior(
    torch.full((2,), 2.0).double(),
    torch.zeros(2).double(),
    torch.tensor(0.1).double(),
    torch.tensor(4.0).double(),
    torch.eye(2).double(),
)


def rows() -> Tensor:
    x = torch.randn(300, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x[::2, 0] += 3
    return x


def start(x: Tensor) -> Any:
    return gaussian_full.init_params(x, 2, torch.Generator().manual_seed(1))


class SlowRows:
    """Chunks that take their time, so that a kill finds a run in the midst of something."""

    def __init__(self, x: Tensor, delay: float):
        self.x, self.delay = x, delay

    def __iter__(self) -> Any:
        for chunk in self.x.split(100):
            time.sleep(self.delay / 3)
            yield chunk


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "anderson": {"accelerate": "anderson"},
    "prior, every third step": {"prior": PRIOR, "checkpoint_every": 3},
    "parquet": {"weights": "weight"},
}


def run(name: str, folder: Path, delay: float, file: Path | None) -> Fit:
    x = rows()
    source: Any = SlowRows(x, delay)
    if name == "parquet":
        source = pads.dataset(folder / "rows.parquet")
    return em(gaussian_full, source, start(x), checkpoint=file, rtol=1e-7, **{"checkpoint_every": 1, **RUNS[name]})


def killed_again_and_again(name: str, folder: Path) -> dict[str, Any]:
    """Start a run, kill it after a random time, start it again, until one ends, and return what that one found."""
    moments = random.Random(name)
    file, answer = folder / f"{name}.state", folder / f"{name}.answer"
    steps: list[int] = []
    while not answer.exists():
        child = os.fork()
        if child == 0:
            try:
                fit = run(name, folder, SECONDS_A_PASS, file)
                torch.save(tuple(fit), answer.with_suffix(".new"))
                answer.with_suffix(".new").replace(answer)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        # later each time, so that slow machines come to an end too
        time.sleep(moments.uniform(0, 0.15 + 0.1 * len(steps)))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            raise RuntimeError(f"{name} failed")
        steps.append(num_steps_in(file) if file.exists() else -1)
    return {"fit": torch.load(answer, weights_only=False), "steps": steps}


def num_steps_in(file: Path) -> int:
    """Return how many steps a checkpoint holds; it must be whole, whenever the process was killed."""
    found = checkpoint.load(file, {})
    assert found is not None
    return len(found["trace"])


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("killed")
    x = rows()
    table = pa.table({"a": x[:, 0].numpy(), "b": x[:, 1].numpy(), "weight": x.square().sum(1).numpy()})
    pa.parquet.write_table(table, folder / "rows.parquet", row_group_size=70)
    path = os.pathsep.join([str(ROOT / ".links"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return folder, torch.load(folder / "found", weights_only=False)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(
    name: str, killed: tuple[Path, dict[str, Any]]
) -> None:
    folder, found = killed
    expected = run(name, folder, 0.0, None)
    params, log_lik, converged, num_steps = found[name]["fit"]
    assert all(map(torch.equal, params, expected.params))
    assert torch.equal(log_lik, expected.log_lik)
    assert (converged, num_steps) == (expected.converged, expected.num_steps)
    steps = found[name]["steps"]
    assert steps == sorted(steps)  # what was written is never lost
    assert any(0 < step < num_steps for step in steps)  # and some kill came between the first step and the last


def test_a_killed_run_that_forgets_something_ends_otherwise(tmp_path: Path) -> None:
    """So that the test above would see it."""
    x = rows()
    expected = em(gaussian_full, x, start(x), accelerate="anderson")
    file = tmp_path / "state"
    interrupted(x, file, expected.num_steps // 2, accelerate="anderson")
    found = checkpoint.load(file, {})
    assert found is not None
    found["image.1"] = found["image.1"] * (1 + 1e-6)
    checkpoint.save(file, identity(file), found)
    fit = em(gaussian_full, x, start(x), accelerate="anderson", checkpoint=file)
    assert not torch.equal(fit.log_lik, expected.log_lik)


def interrupted(x: Tensor, file: Path, num_steps: int, family: Any = gaussian_full, **kwargs: Any) -> None:
    """Leave a checkpoint after so many steps."""
    init = kwargs.pop("init", start(x))
    with pytest.warns(UserWarning, match=f"EM made {num_steps} steps"):
        em(family, x, init, max_steps=num_steps, rtol=0.0, checkpoint=file, **kwargs)


def identity(file: Path) -> dict[str, Any]:
    """Return what a checkpoint says of the run that it belongs to."""
    with safe_open(file, framework="pt") as content:
        return json.loads(content.metadata()["run"])


def test_every_family_resumes_to_the_identical_trace(case: Case, kind: str, tmp_path: Path) -> None:
    x, prior = case.data(1, 50), case.prior_or_flat(kind)
    init, file = case.start(2, x, prior=prior), tmp_path / "state"
    interrupted(x, file, 3, case.family, init=init, prior=prior)
    interrupted(x, file, 7, case.family, init=init, prior=prior)
    with pytest.warns(UserWarning, match="EM made 7 steps"):
        expected = em(case.family, x, init, max_steps=7, rtol=0.0, prior=prior)
    with pytest.warns(UserWarning, match="EM made 7 steps"):
        again = em(case.family, x, init, max_steps=7, rtol=0.0, prior=prior, checkpoint=file)
    assert torch.equal(again.log_lik, expected.log_lik)
    assert all(map(torch.equal, again.params, expected.params))


# Files that are none, or of another run


def test_tensors_come_back_where_products_round_as_before(tmp_path: Path) -> None:
    """In the file they follow one another; a matrix at an odd address is multiplied in another order."""
    kept = {"a": torch.zeros(3), "matrix": torch.eye(9, dtype=torch.float64), "odd": torch.zeros(5, dtype=torch.uint8)}
    checkpoint.save(tmp_path / "state", {}, kept)
    found = checkpoint.load(tmp_path / "state", {})
    assert found is not None
    assert {value.data_ptr() % 64 for value in found.values()} == {kept["matrix"].data_ptr() % 64} == {0}


def test_a_start_that_another_machine_rounds_otherwise_is_the_same_start(tmp_path: Path) -> None:
    x, file = rows(), tmp_path / "state"
    interrupted(x, file, 5)
    init = start(x)
    fit = em(gaussian_full, x, init._replace(locs=init.locs * (1 + 1e-15)), checkpoint=file)
    assert torch.equal(fit.log_lik, em(gaussian_full, x, init).log_lik)


OTHER_RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "family": ("differs in family", {"family": gaussian_diagonal, "init": None}),
    "prior": ("differs in prior", {"prior": PRIOR}),
    "accelerate": ("differs in accelerate", {"accelerate": "anderson"}),
    "missing": ("differs in missing", {"missing": True}),
    "type": ("differs in type of x", {"x": rows().float()}),
    "init": ("differs in init", {"init": start(rows() + 1)}),
    "number of components": (
        "differs in init",
        {"init": gaussian_full.init_params(rows(), 3, torch.Generator().manual_seed(0))},
    ),
    "data": ("other data or weights, which differ in column 0, column 1", {"x": rows().flip(1)}),
    "order of entries": (
        "belongs to other data or weights: the log lik",
        {"x": torch.stack([rows()[:, 0], rows()[:, 1].flip(0)], 1)},
    ),
    "weights": ("other data or weights, which differ in their weight", {"weights": torch.full((300,), 2.0)}),
}


@pytest.mark.parametrize("what", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused_and_left_alone(what: str, tmp_path: Path) -> None:
    words, change = OTHER_RUNS[what]
    x, file = rows(), tmp_path / "state"
    interrupted(x, file, 5)
    content = checkpoint.load(file, {})
    options = {"family": gaussian_full, "x": x, "init": start(x), **change}
    if options["init"] is None:
        options["init"] = gaussian_diagonal.init_params(x, 2, torch.Generator().manual_seed(1))
    with pytest.raises(checkpoint.CheckpointError, match=words):
        em(options.pop("family"), options.pop("x"), options.pop("init"), checkpoint=file, **options)
    after = checkpoint.load(file, {})
    assert content is not None
    assert after is not None
    assert all(torch.equal(content[name], after[name]) for name in content)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("the number of rows", lambda x: (x[20:], None)),
        ("column 0", lambda x: (torch.cat([x[:30] + 2, x[30:]]), None)),
        ("their weight", lambda x: (x, torch.cat([torch.full((100,), 0.9), torch.ones(len(x) - 100)]))),
    ],
)
def test_float32_data_are_told_apart_below_the_rounding_of_their_likelihood(
    what: str, change: Any, tmp_path: Path
) -> None:
    x = torch.randn(100_000, 2, generator=seeded(0)) + 3 * (torch.arange(100_000) % 2)[:, None]
    init, file = gaussian_full.init_params(x, 2, seeded(1)), tmp_path / "state"
    em(gaussian_full, x, init, checkpoint=file, rtol=1e-2)
    changed, weights = change(x)
    with pytest.raises(checkpoint.CheckpointError, match=f"belongs to other data or weights, which differ in {what}"):
        em(gaussian_full, changed, init, weights=weights, checkpoint=file, rtol=1e-2)


def test_a_setting_that_differs_in_its_last_digit_is_another_family(tmp_path: Path) -> None:
    x, file = rows(), tmp_path / "state"
    init = GaussianIsotropic(0.7).init_params(x, 2, torch.Generator().manual_seed(1))
    interrupted(x, file, 2, GaussianIsotropic(0.7), init=init)
    with pytest.raises(ValueError, match="differs in family"):
        em(GaussianIsotropic(0.7 * (1 + 1e-15)), x, init, checkpoint=file)


def test_settings_of_a_plain_class_tell_families_apart() -> None:
    class Scaled:
        def __init__(self, scale: float):
            self.scale = scale

    names = [checkpoint.identify(family) for family in (Scaled(1.0), Scaled(2.0), Scaled(1.0), gaussian_full)]
    assert names[0] == names[2]
    assert len(set(names)) == 3
    assert names[3] == gaussian_full.__name__


def test_a_file_that_is_no_checkpoint_gets_one_sentence(tmp_path: Path) -> None:
    x, file = rows(), tmp_path / "state"
    interrupted(x, file, 5)
    whole = file.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{file} is not a checkpoint"):
            em(gaussian_full, x, start(x), checkpoint=file)
        assert file.read_bytes() == whole[:length]
    save_file({"x": x}, file)
    with pytest.raises(ValueError, match="is not a checkpoint of a run: delete it, or give another file"):
        em(gaussian_full, x, start(x), checkpoint=file)
    save_file({"x": x}, file, metadata={"run": "not JSON"})
    with pytest.raises(ValueError, match="is not a checkpoint"):
        em(gaussian_full, x, start(x), checkpoint=file)
    with pytest.raises(IsADirectoryError, match="is a folder, not a checkpoint"):
        em(gaussian_full, x, start(x), checkpoint=tmp_path)


# The disk


class Unreadable:
    """Rows of which a second pass is a fault: the first is the one that looks at the data."""

    def __init__(self, x: Tensor):
        self.x, self.num_passes = x, 0

    def __iter__(self) -> Any:
        self.num_passes += 1
        assert self.num_passes == 1, "a pass was made before the checkpoint was tried"
        yield self.x


def test_a_folder_that_is_not_there_is_found_before_the_first_pass(tmp_path: Path) -> None:
    x = rows()
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*/no for the checkpoint state: make it"):
        em(gaussian_full, Unreadable(x), start(x), checkpoint=tmp_path / "no" / "state")


def test_a_full_disk_is_found_before_the_first_pass_and_spares_the_old_state(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the system refuses the bytes in the same place."""
    x, file = rows(), tmp_path / "state"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
        with pytest.raises(OSError, match="File too large"):
            em(gaussian_full, Unreadable(x), start(x), checkpoint=file)
        assert not file.exists()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        interrupted(x, file, 5)
        whole = file.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
        with pytest.raises(OSError, match="File too large"):
            em(gaussian_full, x, start(x), checkpoint=file)
        assert file.read_bytes() == whole
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_file_is_whole_at_every_moment(tmp_path: Path) -> None:
    file, num_values = tmp_path / "state", 20_000
    checkpoint.save(file, {}, {"values": torch.zeros(num_values)})
    done, lengths = threading.Event(), []

    def write() -> None:
        for number in range(1, 60):
            checkpoint.save(file, {}, {"values": torch.full((num_values,), float(number))})
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        found = checkpoint.load(file, {})
        assert found is not None
        assert (found["values"] == found["values"][0]).all()
        lengths.append(found["values"][0].item())
    writer.join()
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 3  # the reader saw several of the writes


if __name__ == "__main__":
    found_here = {each: killed_again_and_again(each, Path(sys.argv[1])) for each in RUNS}
    torch.save(found_here, Path(sys.argv[1]) / "found")
