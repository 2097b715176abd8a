"""The command line: what it writes, and that bad input gets one sentence and exit code 2."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
import xarray
from safetensors import SafetensorError
from safetensors.torch import save_file
from sklearn.datasets import load_iris
from typer.testing import CliRunner

from mixproof.inference import checkpoint, cli, comparison_study, tables
from mixproof.inference.cli import app
from mixproof.inference.sampling import sample
from mixproof.models import families, gaussian_full

DATA = Path(__file__).parent / "data"
PARAMS: dict[str, dict[str, Any]] = {
    "gaussian_full": {
        "weights": [0.25, 0.75],
        "locs": [[0, 0], [3, 1]],
        "covariances": [[[1, 0.5], [0.5, 1]], [[2, 0], [0, 1]]],
    },
    "gaussian_diagonal": {"weights": [0.25, 0.75], "locs": [[0, 0], [3, 1]], "variances": [[1, 2], [3, 4]]},
    "gaussian_spherical": {"weights": [0.25, 0.75], "locs": [[0, 0], [3, 1]], "variances": [1, 2]},
    "gaussian_tied": {"weights": [0.25, 0.75], "locs": [[0, 0], [3, 1]], "covariance": [[1, 0.5], [0.5, 1]]},
    "gaussian_isotropic": {"variance": 0.5, "weights": [0.25, 0.75], "locs": [[0, 0], [3, 1]]},
    "bernoulli": {"weights": [0.25, 0.75], "probs": [[0, 1], [0.5, 0.5]]},
    "laplace": {"weights": [0.25, 0.75], "locs": [[0, 0], [3, 1]], "scales": [[1, 2], [3, 4]]},
}
PARAMS["bernoulli.UniformWeights"] = {"weights": [0.5, 0.5], "probs": [[0, 1], [0.5, 0.5]]}
PARAMS["gaussian_isotropic.GaussianIsotropic"] = PARAMS["gaussian_isotropic"]
PARAMS["gaussian_sum"] = {f"{part}_{name}": value for part in "xy" for name, value in PARAMS["gaussian_full"].items()}
PARAMS["gaussian_sum.KnownNoise"] = {**PARAMS["gaussian_full"], "noise": PARAMS["gaussian_full"]}


def run(*command: object) -> Any:
    return CliRunner().invoke(app, [str(part) for part in command])


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_the_examples_here_are_all_the_families() -> None:
    assert PARAMS.keys() == families().keys()


@pytest.mark.parametrize("family", sorted(PARAMS))
def test_every_family_is_sampled(family: str, tmp_path: Path) -> None:
    params = write(tmp_path / "params.json", PARAMS[family])
    result = run("sample", family, "--params", params, "-n", 50, "--out", tmp_path / "rows.csv", "--seed", 3)
    assert result.exit_code == 0, result.output
    table = pyarrow.csv.read_csv(tmp_path / "rows.csv")
    assert table.column_names == ["x1", "x2", "z"]
    assert table.num_rows == 50


def test_the_command_and_its_python_twin_give_the_same_rows_in_every_format(tmp_path: Path) -> None:
    params = write(tmp_path / "params.json", PARAMS["gaussian_full"])
    x, z = sample(gaussian_full, PARAMS["gaussian_full"], 40, generator=torch.Generator().manual_seed(5))
    for ending in ("csv", "parquet", "npz", "safetensors"):
        out = tmp_path / f"rows.{ending}"
        result = run("sample", "gaussian_full", "--params", params, "-n", 40, "--out", out, "--seed", 5)
        assert result.exit_code == 0, result.output
        if ending == "npz":
            with np.load(out) as stored:
                np.testing.assert_array_equal(stored["x"], x.numpy())
                np.testing.assert_array_equal(stored["z"], z.numpy())
        elif ending != "safetensors":
            read = pyarrow.csv.read_csv if ending == "csv" else pyarrow.parquet.read_table
            table = read(out)
            np.testing.assert_array_equal(table["x2"].to_numpy(), x[:, 1].numpy())
            np.testing.assert_array_equal(table["z"].to_numpy(), z.numpy())


def test_a_fit_finds_what_was_sampled_and_goes_back_into_sample(tmp_path: Path) -> None:
    params = write(tmp_path / "params.json", PARAMS["gaussian_full"])
    rows, found = tmp_path / "rows.parquet", tmp_path / "found.json"
    assert run("sample", "gaussian_full", "--params", params, "-n", 4000, "--out", rows).exit_code == 0
    result = run("fit", rows, "--family", "gaussian_full", "-k", 2, "--starts", 3, "--out", found, "--json")
    assert result.exit_code == 0, result.output
    fit = json.loads(result.stdout)
    assert fit["converged"]
    data = np.column_stack([pyarrow.parquet.read_table(rows)[name].to_numpy() for name in ("x1", "x2")])
    fitted = gaussian_full.Params(*(torch.tensor(value, dtype=torch.float64) for value in fit["params"].values()))
    log_lik = gaussian_full.log_joint(fitted, torch.tensor(data))
    assert fit["log_lik"] == pytest.approx(log_lik.logsumexp(-1).sum().item(), rel=1e-12)
    assert json.loads(found.read_text()) == fit["params"]
    again = run("sample", "gaussian_full", "--params", found, "-n", 5, "--out", tmp_path / "again.csv")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("ending", ["json", "safetensors"])
@pytest.mark.parametrize("family", ["gaussian_isotropic", "gaussian_sum.KnownNoise", "bernoulli.UniformWeights"])
def test_a_fit_with_settings_goes_back_into_sample(family: str, ending: str, tmp_path: Path) -> None:
    params = write(tmp_path / "params.json", PARAMS[family])
    names = [] if family.startswith("bernoulli") else ["variance" if family == "gaussian_isotropic" else "noise"]
    settings = write(tmp_path / "settings.json", {name: PARAMS[family][name] for name in names})
    rows, found = tmp_path / "rows.csv", tmp_path / f"found.{ending}"
    assert run("sample", family, "--params", params, "-n", 400, "--out", rows, "--seed", 1).exit_code == 0
    table = pyarrow.csv.read_csv(rows).drop(["z"])
    pyarrow.csv.write_csv(table, rows)
    command = ["fit", rows, "--family", family, "-k", 2, "--settings", settings, "--starts", 3, "--json"]
    fit = run(*command, "--max-steps", 3, "--out", found)
    assert fit.exit_code == 0, fit.output
    by_file, by_stdout = tmp_path / "by_file.csv", tmp_path / "by_stdout.csv"
    assert run("sample", family, "--params", found, "-n", 20, "--out", by_file, "--seed", 2).exit_code == 0
    printed = json.loads(fit.stdout)
    assert set(printed["settings"]) == set(names)
    everything = write(tmp_path / "printed.json", {**printed["settings"], **printed["params"]})
    assert run("sample", family, "--params", everything, "-n", 20, "--out", by_stdout, "--seed", 2).exit_code == 0
    assert by_file.read_text() == by_stdout.read_text()


def test_old_faithful_is_fitted_from_its_table() -> None:
    result = run("fit", DATA / "faithful.csv", "--family", "gaussian_full", "-k", 2, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["log_lik"] == pytest.approx(-1130.264, abs=1e-3)  # as R's mclust prints it


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("gaussian_full", {"weights": [0.5, 0.6]}, "weights must be a probability vector"),
        ("gaussian_full", {"weights": [1.5, -0.5]}, "weights must be a probability vector"),
        ("gaussian_full", {"covariances": [[[1, 2], [2, 1]], [[1, 0], [0, 1]]]}, "covariances[0] must be"),
        ("gaussian_full", {"locs": [[0, 0, 0], [1, 1, 1]]}, "shape"),
        ("gaussian_full", {"variances": [1, 1]}, "variances"),
        ("gaussian_diagonal", {"variances": [[1, -2], [3, 4]]}, "variances"),
        ("laplace", {"scales": [[1, float("nan")], [3, 4]]}, "finite"),
        ("bernoulli", {"probs": [[0, 1.5], [0.5, 0.5]]}, "probs"),
        ("gaussian_isotropic", {"variance": -1.0}, "known variance must be positive"),
        ("gaussian_isotropic", {"variance": "abc"}, "the setting variance must be a number, not 'abc'"),
        ("gaussian_isotropic", {"variance": [1.0]}, "the setting variance must be a number, not [1.0]"),
        ("gaussian_sum.KnownNoise", {"noise": [1.0, 2.0]}, "noise must be an object with the fields weights, locs"),
        ("gaussian_sum.KnownNoise", {"noise": {"weights": [1.0]}}, "noise must be an object with the fields weights"),
        ("gaussian_sum.KnownNoise", {"noise": {**PARAMS["gaussian_full"], "locs": ["a", "b"]}}, "locs of noise must"),
    ],
)
def test_bad_parameters_get_a_sentence_and_exit_code_2(
    family: str, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    params = write(tmp_path / "params.json", {**PARAMS[family], **change})
    result = run("sample", family, "--params", params, "-n", 5, "--out", tmp_path / "rows.csv")
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert result.stderr.startswith("error: ")
    assert not (tmp_path / "rows.csv").exists()


def test_other_bad_input_gets_a_sentence_and_exit_code_2(tmp_path: Path) -> None:
    params = write(tmp_path / "params.json", PARAMS["gaussian_full"])
    no_setting = write(tmp_path / "isotropic.json", {"weights": [1.0], "locs": [[0.0]]})
    text = tmp_path / "text.csv"
    text.write_text("a,b\n1,x\n2,y\n")
    missing = tmp_path / "missing.csv"
    missing.write_text("a,b\n1,2\n,4\n")
    gap = tmp_path / "gap.csv"
    gap.write_text("a\n1\n\n4\n")
    void = tmp_path / "void.csv"
    void.write_text("a,b\n1,\n2,\n4,\n")
    nameless = tmp_path / "nameless.csv"
    nameless.write_text("1,2.5\n3,4\n5,7\n")
    headless = {first: tmp_path / f"headless{i}.csv" for i, first in enumerate(("NA,1.0", ",1.0", "a,1.0"))}
    for first, file in headless.items():
        file.write_text(f"{first}\n3,4\n5,7\n")
    indexed = tmp_path / "indexed.csv"
    indexed.write_text(",a,b\n0,3,4\n1,5,7\n")
    bits = tmp_path / "bits.csv"
    bits.write_text("a,b\n1,0\n0.5,1\n")
    garbage = {ending: tmp_path / f"rows.{ending}" for ending in ("npz", "npy", "parquet", "safetensors")}
    for file in garbage.values():
        file.write_bytes(b"no such format")
    unnamed, unnamed_tensors = tmp_path / "unnamed.npz", tmp_path / "unnamed.safetensors"
    np.savez(unnamed, y=np.zeros((3, 2)))
    save_file({"y": torch.zeros(3, 2)}, unnamed_tensors)
    out = tmp_path / "out.csv"
    for command, words in [
        (("sample", "gaussian", "--params", params, "-n", 5, "--out", out), "there is no family 'gaussian'"),
        (("sample", "gaussian_isotropic", "--params", no_setting, "-n", 5, "--out", out), "needs its setting variance"),
        (("sample", "gaussian_full", "--params", params, "-n", 0, "--out", out), "at least 1"),
        (("sample", "gaussian_full", "--params", params, "-n", 5, "--out", tmp_path / "rows.xls"), ".parquet"),
        (("sample", "gaussian_full", "--params", tmp_path / "no.json", "-n", 5, "--out", out), "No such file"),
        (("fit", text, "--family", "gaussian_full", "-k", 1), "column 'b' of text.csv holds string"),
        (("fit", missing, "--family", "gaussian_full", "-k", 1), "x[1, 0] is nan"),
        (("fit", gap, "--family", "gaussian_full", "-k", 1), "x[1, 0] is nan"),
        (("fit", void, "--family", "gaussian_full", "-k", 1, "--missing"), "column 1 holds no value in 3 rows"),
        (("fit", nameless, "--family", "gaussian_full", "-k", 1), f"the first line of {nameless} must be the names"),
        *(
            (("fit", file, "--family", "gaussian_full", "-k", 1), "holds the number 1.0: if it is the first row")
            for file in headless.values()
        ),
        (("fit", indexed, "--family", "gaussian_full", "-k", 1), f"column 1 of {indexed} has no name: name it, or"),
        (("fit", tmp_path / "no.csv", "--family", "gaussian_full", "-k", 1), f"there is no file or folder {tmp_path}"),
        (("fit", bits, "--family", "bernoulli", "-k", 1), "x[1, 0] is 0.5"),
        (("fit", bits, "--family", "gaussian_full", "-k", 3), "3 components need at least as many rows"),
        (("fit", bits, "--family", "gaussian_full", "-k", 0), "at least 1"),
        (("fit", bits, "--family", "gaussian_full", "-k", "two"), "-k takes a number, or of two latents both"),
        (("fit", bits, "--family", "gaussian_full", "-k", "1,1"), "must be an integer, not (1, 1)"),
        (("fit", garbage["npz"], "--family", "gaussian_full", "-k", 1), "rows.npz is not a NumPy file"),
        (("fit", garbage["npy"], "--family", "gaussian_full", "-k", 1), "rows.npy is not a NumPy file"),
        (("fit", garbage["parquet"], "--family", "gaussian_full", "-k", 1), "Parquet"),
        (("fit", garbage["safetensors"], "--family", "gaussian_full", "-k", 1), "is not a safetensors file"),
        (("fit", unnamed, "--family", "gaussian_full", "-k", 1), "must hold the rows under the name x, and holds y"),
        (("fit", unnamed_tensors, "--family", "gaussian_full", "-k", 1), "rows under the name x, and holds y"),
        (
            ("sample", "gaussian_full", "--params", garbage["safetensors"], "-n", 5, "--out", out),
            "is not a safetensors",
        ),
        (("sample", "gaussian_full", "--params", params, "-n", 5, "--out", out, "--device", "warp"), "torch cannot"),
        (
            ("fit", bits, "--family", "gaussian_full", "-k", 1, "--device", "cuda:99"),
            "torch cannot compute on 'cuda:99'",
        ),
        (("fit", bits, "--family", "gaussian_full", "-k", 1, "--seed", 2**70), "--seed"),
        (("sample", "gaussian_full", "--params", params, "-n", 5, "--out", out, "--seed", 2**64), "--seed"),
        (("verify", "--problem", "P1", "--seed", 2**32), "--seed"),
        (("verify", "--problem", "P9"), "no claim or problem is called P9"),
        (("verify", "--problem", "P1", "--json", tmp_path / "no" / "report.json"), "there is no folder"),
    ]:
        result = run(*command)
        assert result.exit_code == 2, (command, result.output)
        assert words in " ".join(result.stderr.split()), result.stderr
        assert "Traceback" not in result.stderr
    assert not out.exists()


# Data that need not fit in memory, and several processes


@pytest.fixture
def mixture(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """Return a folder with the same 900 rows in every form, and the rows."""
    x = sample(gaussian_full, PARAMS["gaussian_full"], 900, generator=torch.Generator().manual_seed(5))[0]
    x[:2] = x[:2].round()  # so that the first rows of the table look like whole numbers
    table = pyarrow.table({"x1": x[:, 0].numpy(), "x2": x[:, 1].numpy(), "z": np.zeros(900)})
    pyarrow.csv.write_csv(table, tmp_path / "rows.csv")
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=100)
    (tmp_path / "folder").mkdir()
    for i in range(3):
        pyarrow.parquet.write_table(table.slice(300 * i, 300), tmp_path / "folder" / f"{i}.parquet")
    np.save(tmp_path / "rows.npy", x.numpy())
    np.savez(tmp_path / "rows.npz", x=x.numpy())
    weighted = table.append_column("often", pyarrow.array(np.arange(900) % 3))
    pyarrow.parquet.write_table(weighted, tmp_path / "weighted.parquet")
    repeated = weighted.take(np.repeat(np.arange(900), np.arange(900) % 3))
    pyarrow.parquet.write_table(repeated.drop_columns(["often"]), tmp_path / "repeated.parquet")
    return tmp_path, x


FIT = ("--family", "gaussian_full", "-k", 2, "--starts", 2, "--json")


def test_rows_on_disk_are_fitted_as_rows_in_memory(
    mixture: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, x = mixture
    expected = json.loads(run("fit", folder / "rows.npz", *FIT).stdout)
    for limit, names in ((cli.MAX_ENTRIES_IN_MEMORY, ("rows.csv",)), (1000, ("rows.csv", "folder", "rows.npy"))):
        monkeypatch.setattr(cli, "MAX_ENTRIES_IN_MEMORY", limit)
        for name in names:
            result = run("fit", folder / name, *FIT, "--accelerate", "anderson")
            assert result.exit_code == 0, result.output
            found = json.loads(result.stdout)
            assert found["log_lik"] == pytest.approx(expected["log_lik"], rel=1e-8)
            assert "EM step" in result.stderr
    assert x.numel() > 1000


def test_a_column_of_weights_counts_rows(mixture: tuple[Path, torch.Tensor]) -> None:
    folder, _ = mixture
    weighted, repeated = (
        run("fit", folder / name, "--family", "gaussian_full", "-k", 1, "--json", *options)
        for name, options in (("weighted.parquet", ("--weights", "often")), ("repeated.parquet", ()))
    )
    assert weighted.exit_code == 0, weighted.output
    found, expected = json.loads(weighted.stdout), json.loads(repeated.stdout)
    assert found["log_lik"] == pytest.approx(expected["log_lik"], rel=1e-12)
    np.testing.assert_allclose(found["params"]["locs"], expected["params"]["locs"], rtol=1e-12)
    result = run("fit", folder / "weighted.parquet", "--family", "gaussian_full", "-k", 1, "--weights", "no")
    assert result.exit_code == 2
    assert "there is no column 'no' of weights" in " ".join(result.stderr.split())


def test_a_column_of_weights_counts_rows_in_the_starts_too(tmp_path: Path) -> None:
    """Forty stray rows draw a component to themselves from starts in which they count as much as all others."""
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(40, 2)), rng.normal(5, 1, (40, 2)), rng.normal((0, 60), 3, (40, 2))])
    often = np.repeat([500, 1], [80, 40])
    columns = pyarrow.table({"a": x[:, 0], "b": x[:, 1], "often": often})
    pyarrow.csv.write_csv(columns, tmp_path / "rows.csv")
    pyarrow.csv.write_csv(columns.take(np.repeat(np.arange(120), often)).drop(["often"]), tmp_path / "repeated.csv")
    weighted = json.loads(run("fit", tmp_path / "rows.csv", *FIT, "--weights", "often").stdout)
    repeated = json.loads(run("fit", tmp_path / "repeated.csv", *FIT).stdout)
    assert weighted["log_lik"] == pytest.approx(repeated["log_lik"], rel=1e-8)


def log_lik_of(*command: object) -> Any:
    result = run("fit", *command, "--family", "gaussian_full", "-k", 1, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["log_lik"]


def test_the_index_of_pandas_is_no_feature(tmp_path: Path) -> None:
    frame = pd.DataFrame(np.random.default_rng(0).normal(size=(20, 2)), columns=["a", "b"])
    often = np.arange(20) ** 2 % 7
    for name, indexed in (
        ("range", frame),
        ("gap", frame.drop(index=3)),
        ("named", frame.set_index(pd.Index(often, name="often"))),
    ):
        indexed.to_parquet(tmp_path / f"{name}.parquet")
        np.save(tmp_path / "rows.npy", indexed.to_numpy())
        assert log_lik_of(tmp_path / f"{name}.parquet") == pytest.approx(log_lik_of(tmp_path / "rows.npy"), rel=1e-12)
    np.save(tmp_path / "rows.npy", np.repeat(frame.to_numpy(), often, 0))
    weighted = log_lik_of(tmp_path / "named.parquet", "--weights", "often")
    assert weighted == pytest.approx(log_lik_of(tmp_path / "rows.npy"), rel=1e-12)


def test_z_is_left_out_where_sample_writes_it_and_nowhere_else(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(20, 2))
    z = np.arange(20) % 3
    expected = {}
    for name, rows in (("x", x), ("xz", np.column_stack([x, z])), ("repeated", np.repeat(x, z, 0))):
        np.save(tmp_path / "rows.npy", rows)
        expected[name] = pytest.approx(log_lik_of(tmp_path / "rows.npy"), rel=1e-12)
    for columns, left in ((("x1", "x2"), "x"), (("x1", "y"), "xz"), (("x1", "x3"), "xz")):
        table = pyarrow.table({columns[0]: x[:, 0], columns[1]: x[:, 1], "z": z})
        pyarrow.csv.write_csv(table, tmp_path / "rows.csv")
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
        for file in ("rows.csv", "rows.parquet"):
            assert log_lik_of(tmp_path / file) == expected[left]
            assert log_lik_of(tmp_path / file, "--weights", "z") == expected["repeated"]


def test_all_files_of_a_folder_have_a_say_in_the_types(tmp_path: Path) -> None:
    first, second = np.arange(10.0) ** 2, np.random.default_rng(0).normal(size=10)
    np.save(tmp_path / "rows.npy", np.concatenate([first, second])[:, None])
    expected = log_lik_of(tmp_path / "rows.npy")
    for name, kind in (("whole", np.int32), ("single", np.float32)):
        folder = tmp_path / name
        folder.mkdir()
        pyarrow.parquet.write_table(pyarrow.table({"a": first.astype(kind)}), folder / "0.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"a": second}), folder / "1.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.null())}), folder / "2.parquet")
        assert log_lik_of(folder) == pytest.approx(expected, rel=1e-12)


def test_files_of_a_folder_with_other_columns_are_refused(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=10)
    pyarrow.parquet.write_table(pyarrow.table({"a": x, "b": x**2}), tmp_path / "0.parquet")
    for columns, words in (
        ({"a": x}, "1.parquet must have the same columns, and only one of them has b: rename or drop"),
        ({"a": x, "b": x**2, "c": x**3}, "only one of them has c"),
        ({"a": x, "B": x**2}, "only one of them has B, b"),
        ({"a": x, "b": ["text"] * 10}, "column 'b' of 1.parquet holds string, not numbers"),
    ):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "1.parquet")
        result = run("fit", tmp_path, "--family", "gaussian_full", "-k", 1, "--missing")
        assert result.exit_code == 2
        assert words in " ".join(result.stderr.split())


def test_empty_entries_are_missing_if_one_says_so(tmp_path: Path) -> None:
    text = "a,b\n" + "".join(f"{i},{'' if i % 5 == 0 else i % 7}\n" for i in range(40))
    (tmp_path / "rows.csv").write_text(text)
    command = ("fit", tmp_path / "rows.csv", "--family", "gaussian_full", "-k", 1, "--json")
    assert run(*command).exit_code == 2
    result = run(*command, "--missing", "--rtol", "1e-12")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["params"]["locs"][0][0] == pytest.approx(19.5, rel=1e-6)


def test_a_warning_is_that_of_the_start_that_is_reported(tmp_path: Path) -> None:
    rows = tmp_path / "iris.csv"
    np.savetxt(rows, load_iris().data, delimiter=",", header="a,b,c,d", comments="")
    command = ("fit", rows, "--family", "gaussian_full", "-k", 3, "--max-steps", 2, "--json")
    few, many = (run(*command, "--starts", number) for number in (2, 4))
    assert json.loads(few.stdout)["log_lik"] == json.loads(many.stdout)["log_lik"]
    said = [[line for line in result.stderr.splitlines() if line.startswith("warning")] for result in (few, many)]
    assert "EM made 2 steps and the last still changed the log likelihood by 6.6" in said[0][0]
    assert said[0] == said[1]


def test_a_second_run_goes_on_from_the_checkpoint(mixture: tuple[Path, torch.Tensor]) -> None:
    folder, _ = mixture
    command = ("fit", folder / "rows.npy", *FIT, "--checkpoint", folder / "state")
    assert run(*command, "--max-steps", 2).exit_code == 0
    assert {file.name for file in folder.glob("state*")} == {"state.1", "state.2"}
    result = run(*command)
    assert json.loads(result.stdout) == json.loads(run("fit", folder / "rows.npy", *FIT).stdout)
    other = run("fit", folder / "rows.npy", *FIT, "--checkpoint", folder / "state", "--seed", 1)
    assert other.exit_code == 2
    assert "differs in init" in " ".join(other.stderr.split())
    (folder / "state.2").unlink()  # whose start would not fail
    other = run("fit", folder / "rows.npy", *FIT, "--checkpoint", folder / "state", "--seed", 1)
    assert other.exit_code == 2
    assert other.stdout == ""
    assert "state.1 belongs to another run, which differs in init" in " ".join(other.stderr.split())


def test_what_cannot_be_written_is_said_before_the_work(
    mixture: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = mixture
    (folder / "made.json").mkdir()

    def check(option: str, file: Path, words: str) -> None:
        result = run("fit", folder / "rows.npy", *FIT, option, file)
        assert result.exit_code == 2
        assert words in " ".join(result.stderr.split())
        assert "EM step 1" not in result.stderr

    check("--checkpoint", folder / "no" / "file.json", "there is no folder")
    check("--out", folder / "no" / "file.json", "there is no folder")
    check("--out", folder / "made.json", "made.json is a folder: give a file in it")
    monkeypatch.setattr("os.access", lambda _, mode: mode != os.W_OK)
    check("--out", folder / "file.json", "you may not write")


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_a_disk_that_fills_up_costs_no_fit(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space") if ending == "json" else SafetensorError("no space")

    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(20, 2)))
    command = ("fit", tmp_path / "rows.npy", "--family", "gaussian_full", "-k", 1, "--json")
    expected = run(*command).stdout
    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(tables, "save_file", full)
    result = run(*command, "--out", tmp_path / f"found.{ending}")
    assert result.exit_code == 2
    assert result.stdout == expected
    words = f"the parameters cannot be written to {tmp_path / f'found.{ending}'}: no space"
    assert words in " ".join(result.stderr.split())


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def children(process: int) -> list[int]:
    """Return the processes that a process has started."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in table.splitlines()]
    return [child for child, parent in pairs if parent == process]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(DATA.parents[1] / ".links"), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_torchrun_starts_a_killed_process_again_and_the_run_goes_on(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 2, generator=generator, dtype=torch.float64)
    np.save(tmp_path / "rows.npy", x.numpy())
    options = ["fit", tmp_path / "rows.npy", "--family", "gaussian_full", "-k", "3", "--starts", "1", "--rtol", "0"]
    options += ["--max-steps", "150", "--json"]
    state = tmp_path / "state.1"
    command = [*TORCHRUN, "--max-restarts", "3", "-m", "mixproof.inference.cli", *options]
    command += ["--checkpoint", tmp_path / "state"]
    with (tmp_path / "stderr").open("w") as stderr, (tmp_path / "stdout").open("w") as stdout:
        agent = subprocess.Popen([str(part) for part in command], stdout=stdout, stderr=stderr, env=environment())
        lengths: list[int] = []
        killed = None
        deadline = time.monotonic() + 300
        while agent.poll() is None:
            if time.monotonic() > deadline:
                agent.terminate()
                pytest.fail(f"it hangs: {(tmp_path / 'stderr').read_text()}")
            time.sleep(0.02)
            found = checkpoint.load(state, {})
            if found is None:
                continue
            lengths.append(len(found["trace"]))
            if killed is None and lengths[-1] >= 5:
                killed = lengths[-1]
                os.kill(children(agent.pid)[1], signal.SIGKILL)
    assert agent.returncode == 0, (tmp_path / "stderr").read_text()
    assert killed is not None
    assert killed < 150
    assert lengths == sorted(lengths)
    printed = json.loads((tmp_path / "stdout").read_text())  # by one process, once
    alone = run(*options)
    assert alone.exit_code == 0, alone.output
    expected = json.loads(alone.stdout)
    assert printed["num_steps"] == expected["num_steps"] == 150
    assert printed["log_lik"] == pytest.approx(expected["log_lik"], rel=1e-12)
    for name, value in expected["params"].items():
        np.testing.assert_allclose(printed["params"][name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_torchrun_says_what_is_wrong_with_the_share_of_one_process(tmp_path: Path) -> None:
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[70, 1] = torch.nan
    np.save(tmp_path / "rows.npy", x.numpy())
    command = [*TORCHRUN, "-m", "mixproof.inference.cli", "fit", tmp_path / "rows.npy", *FIT]
    ran = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment(), check=False
    )
    assert ran.returncode == 1
    assert ran.stdout == ""
    said = " ".join(ran.stderr.split())
    assert "error: process 1 of the group failed: x[20, 1] is nan" in said
    assert "error in process 1: x[20, 1] is nan" in said


SUBJECTS = """
import pyro
import pyro.distributions as dist
import torch

from mixproof.inference.verification import Subject


def model(x):
    weights = pyro.param("weights", torch.ones(3) / 3, constraint=dist.constraints.simplex)
    rates = pyro.param("rates", torch.ones(3), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Poisson(rates[z]), obs=x)


def e_step(params, x):
    return (params["weights"].log() + dist.Poisson(params["rates"]).log_prob(x[:, None])).softmax(-1)


def m_step(resp, x):
    counts = resp.sum(0)
    return {"weights": counts / len(x), "rates": resp.T @ x / (counts - 1)}


def mended(resp, x):
    return {"weights": resp.mean(0), "rates": resp.T @ x / resp.sum(0)}


data = (torch.tensor([0, 1, 1, 2, 4, 5, 5, 7, 9, 12, 13, 15], dtype=torch.float64),)
params = {"weights": torch.tensor([0.3, 0.3, 0.4]).double(), "rates": torch.tensor([1.0, 5.0, 12.0]).double()}
right = Subject(model, params, data, e_step, mended)
wrong = Subject(model, params, data, e_step, m_step)
half = {"model": model}
"""


@pytest.fixture
def subjects(tmp_path: Path) -> Path:
    path = tmp_path / "my_poisson.py"
    path.write_text(SUBJECTS, encoding="utf-8")
    return path


def test_verify_judges_a_subject_of_ones_own(subjects: Path) -> None:
    found = run("verify", f"{subjects}:right")
    assert found.exit_code == 0, found.stderr
    assert "exact EM" in found.stdout
    assert "not a proof" in " ".join(found.stdout.split())


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("leaves.py", "import sys; sys.exit(0)", "raises SystemExit"),
        ("json.py", SUBJECTS, "name of an installed module"),
        ("divides.py", SUBJECTS.replace("weights = pyro", "1 / 0; weights = pyro"), "ZeroDivisionError"),
    ],
)
def test_a_file_that_cannot_be_run_is_bad_input_and_leaves_nothing_behind(
    tmp_path: Path, name: str, code: str, words: str
) -> None:
    path, paths, before = tmp_path / name, list(sys.path), sys.modules.get("json")
    path.write_text(code, encoding="utf-8")
    found = run("verify", str(path))
    assert found.exit_code == 2
    assert words in " ".join(found.stderr.split())
    assert sys.path == paths
    assert "leaves" not in sys.modules
    assert sys.modules.get("json") is before


def test_a_wrong_subject_exits_with_1_and_its_counterexample_runs_in_its_folder(subjects: Path) -> None:
    report, page = subjects.with_suffix(".json"), subjects.with_suffix(".html")
    found = run("verify", str(subjects), f"{subjects}:right", "--json", str(report), "--html", str(page))
    assert found.exit_code == 1, found.stderr
    assert "n - 1 for n" in found.stdout
    wrong, right = json.loads(report.read_text())
    assert (wrong["verdict"], right["verdict"]) == ("wrong M-step", "exact EM")
    assert "n - 1 for n" in page.read_text()
    assert "http" not in page.read_text()
    ran = subprocess.run(
        [sys.executable, "-c", wrong["smallest"]], cwd=subjects.parent, capture_output=True, text=True, check=True
    )
    claimed, better = (float(value) for value in re.findall(r"Q = (-?[\d.]+)", ran.stdout))
    assert claimed < better


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("{}:nothing", "has no nothing"),
        ("{}:half", "has no model, params, data, e_step, m_step"),
        ("missing.py:right", "there is no file missing.py"),
    ],
)
def test_a_subject_that_is_none_is_bad_input(subjects: Path, reference: str, words: str) -> None:
    found = run("verify", reference.format(subjects))
    assert found.exit_code == 2
    assert words in " ".join(found.stderr.split())
    both = run("verify", f"{subjects}:right", "--problem", "P3")
    assert both.exit_code == 2


QUICK_COMPARISON = ("--starts", 3, "--chains", 8, "--draws", 16, "--warmup", 20, "--moves", 4)


@pytest.fixture
def eruptions(tmp_path: Path) -> Path:
    """The durations of every fourth eruption of Old Faithful."""
    table = pyarrow.csv.read_csv(DATA / "faithful.csv")
    file = tmp_path / "eruptions.csv"
    pyarrow.csv.write_csv(table.select(table.column_names[:1]).take(list(range(0, len(table), 4))), file)
    return file


def test_candidates_are_compared_on_a_table_and_in_json(eruptions: Path, tmp_path: Path) -> None:
    picture = tmp_path / "comparison.svg"
    command = ("compare", eruptions, "-k", "1-2", "--family", "gaussian_diagonal", "--family", "laplace", "--seed", 2)
    shown = run(*command, *QUICK_COMPARISON, "--plot", picture)
    assert shown.exit_code == 0, shown.output
    assert picture.read_text().count("gaussian_diagonal K = 2") == 1
    document = json.loads(run(*command, *QUICK_COMPARISON, "--json").stdout)
    names = [f"{family} K = {size}" for family in ("gaussian_diagonal", "laplace") for size in (1, 2)]
    assert [row["name"] for row in document["candidates"]] == names
    for row in document["candidates"]:
        line = next(line for line in shown.stdout.splitlines() if line.startswith(row["name"]))
        assert f"{row['log_likelihood']:.2f}" in line
        assert f"{row['log_evidence']:.2f} ± {row['log_evidence_standard_error']:.2f}" in line
        assert f"prior of {row['name']}: concentration 1, " in shown.stdout
        fitted = run("fit", eruptions, "--family", row["name"].split()[0], "-k", row["num_components"], "--json")
        assert row["log_likelihood"] == pytest.approx(json.loads(fitted.stdout)["log_lik"], rel=1e-8)
    assert "laplace K = 2: 4 of 4" in " ".join(shown.stderr.split())
    assert document["candidates"][1]["probability"] > 0.5  # two kinds of eruption, seen by the eye
    for sentence in document["warnings"]:
        assert sentence[:60] in " ".join(shown.stdout.split())


def test_a_prior_from_a_file_is_the_one_used(eruptions: Path, tmp_path: Path) -> None:
    own = {"concentration": 2, "loc": [-3], "strength": 1, "shape": [2], "rate": [0.5]}
    file = write(tmp_path / "prior.json", {"gaussian_diagonal": own})
    command = ("compare", eruptions, "-k", 1, "-k", 2, "--family", "gaussian_diagonal", "--prior", file, "--json")
    result = run(*command, *QUICK_COMPARISON)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [row["prior"] for row in document["candidates"]] == [
        {**own, "concentration": [2.0] * size} for size in (1, 2)
    ]
    other = json.loads(run(*command[:-3], "--json", *QUICK_COMPARISON).stdout)
    for row, default in zip(document["candidates"], other["candidates"], strict=True):
        assert abs(row["log_evidence"] - default["log_evidence"]) > 1  # the prior matters, and is the one used


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-k", "2-1", "--family", "laplace"), "-k 2-1 counts down: write 1-2"),
        (("-k", "one", "--family", "laplace"), "-k takes a number"),
        (("-k", "0-2", "--family", "laplace"), "must be at least 1"),
        (("-k", "99", "--family", "laplace"), "need at least as many rows"),
        (("-k", "1", "--family", "poisson"), "there is no family 'poisson'"),
        (("-k", "1", "--family", "bernoulli"), "outside the support of this family"),
        (("-k", "1,2", "--family", "gaussian_sum"), "the data do not scale a prior of gaussian_sum"),
        (("-k", "1", "--family", "gaussian_isotropic"), "needs its setting variance"),
        (("-k", "1", "--family", "laplace", "--plot", "table.txt"), "to .png, .pdf or .svg"),
        (("-k", "1", "--family", "laplace", "--plot", "nowhere/table.png"), "there is no folder nowhere"),
        (("-k", "1", "--family", "laplace", "--chains", "6"), "num_chains must be a multiple of 4"),
        (("-k", "1", "--family", "laplace", "--method", "chib"), "Invalid value for '--method'"),
        (("-k", "1", "--family", "laplace", "--save", "nowhere/draws"), "No such file or directory"),
        (("-k", "1", "--family", "laplace", "--checkpoint", "nowhere/runs"), "No such file or directory"),
        (
            ("-k", "1", "--family", "laplace", "--chains", "4", "--draws", "4"),
            "num_chains times num_draws is 16, too few",
        ),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_in_words(
    arguments: tuple[str, ...], words: str, eruptions: Path
) -> None:
    result = run("compare", eruptions, *arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"laplace": {}}, "names laplace, and the families are gaussian_diagonal"),
        ({"gaussian_diagonal": {"loc": [3]}}, "must be an object with the fields concentration, loc, strength"),
        ({"gaussian_diagonal": None}, "must be an object with the fields"),
        (
            {"gaussian_diagonal": {"concentration": 1, "loc": [3], "strength": 0, "shape": [2], "rate": [1]}},
            "gaussian_diagonal K = 1: the prior is improper",
        ),
    ],
)
def test_a_prior_that_is_none_is_refused_in_words(given: Any, words: str, eruptions: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "prior.json", given)
    result = run("compare", eruptions, "-k", 1, "--family", "gaussian_diagonal", "--prior", file)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split())


def test_an_interrupted_comparison_shows_what_is_done(eruptions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = comparison_study.log_evidence, []

    def interrupted(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **settings)

    monkeypatch.setattr(comparison_study, "log_evidence", interrupted)
    result = run("compare", eruptions, "-k", "1-3", "--family", "laplace", *QUICK_COMPARISON)
    assert result.exit_code == 130
    assert "laplace K = 1 " in result.stdout
    assert "interrupted, which leaves out laplace K = 2, laplace K = 3" in " ".join(result.stdout.split())
    calls[:] = [1]
    result = run("compare", eruptions, "-k", "1-3", "--family", "laplace", *QUICK_COMPARISON)
    assert (result.exit_code, result.stdout) == (130, "")
    assert "interrupted before there was anything to show; with --checkpoint" in " ".join(result.stderr.split())


def test_draws_are_saved_and_a_comparison_goes_on_from_its_checkpoint(eruptions: Path, tmp_path: Path) -> None:
    command = ("compare", eruptions, "-k", "1-2", "--family", "gaussian_diagonal", "--json", *QUICK_COMPARISON)
    runs, draws = tmp_path / "runs", tmp_path / "draws"
    first = run(*command, "--checkpoint", runs, "--save", draws, "--method", "smc")
    assert first.exit_code == 0, first.output
    for size in (1, 2):
        with xarray.open_datatree(draws / f"gaussian_diagonal_K{size}.nc") as tree:
            assert dict(tree["posterior"].sizes) == {"chain": 4, "draw": 32, "component": size, "feature": 1}
    assert (runs / "2.gibbs").exists()
    (runs / "2.evidence").unlink()
    again = run(*command, "--checkpoint", runs, "--method", "smc")
    assert again.stdout == first.stdout
    other = run(*command, "--checkpoint", runs, "--method", "smc", "--seed", 1)
    assert other.exit_code == 2
    assert "belongs to another run, which differs in seed" in " ".join(other.stderr.split())


def test_a_plot_that_cannot_be_drawn_costs_no_table(
    eruptions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def done(candidates: Any, x: Any, *, seed: int, **_: Any) -> Any:
        row: dict[str, Any] = dict.fromkeys(cli.comparison.Row._fields)
        row |= {"name": candidates[0].name, "num_parameters": 2}
        rows = (cli.comparison.Row(**row),)
        return cli.comparison.Comparison(rows, ("it ran",), tuple(candidates), {}, {}, len(x), seed, False)

    def full(_: Any) -> Any:
        raise OSError("no space left on device")

    monkeypatch.setattr(cli.comparison, "compare", done)
    monkeypatch.setattr(cli.comparison.Comparison, "plot", full)
    command = ("compare", eruptions, "-k", 1, "--family", "laplace", "--plot", tmp_path / "table.png")
    result = run(*command)
    assert result.exit_code == 2
    assert "laplace K = 1 " in result.stdout
    assert "no space left on device" in result.stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(*command)
    assert result.exit_code == 2
    assert "it ran" not in result.stdout  # it is refused before
    assert "matplotlib is not installed: pip install 'mixproof[compare]'" in " ".join(result.stderr.split())


@pytest.mark.slow
def test_a_comparison_survives_ctrl_c_and_a_kill(eruptions: Path, tmp_path: Path) -> None:
    """Real signals to real processes, while the particles of the second candidate are under way."""
    runs = tmp_path / "runs"
    long = (*QUICK_COMPARISON, "--moves", 200)  # seconds of particles, which a busy machine does not overlook
    arguments = ("compare", eruptions, "-k", "1-2", "--family", "laplace", "--json", *long)
    command = [sys.executable, "-m", "mixproof.inference.cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def stopped_by(sent: signal.Signals) -> tuple[int, str]:
        inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
        process = subprocess.Popen(
            [*command, "--checkpoint", str(runs)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        signal.signal(signal.SIGINT, inherited)
        file, seen = runs / "2.evidence", set[int]()
        while process.poll() is None and len(seen) < 2:
            if file.exists():
                seen.add(file.stat().st_mtime_ns)
            time.sleep(0.001)
        process.send_signal(sent)
        return process.wait(), process.communicate()[0]

    code, shown = stopped_by(signal.SIGINT)
    assert code == 130
    document = json.loads(shown)
    assert document["interrupted"]
    assert [row["name"] for row in document["candidates"]] == ["laplace K = 1"]
    code, shown = stopped_by(signal.SIGKILL)
    assert (code, shown) == (-signal.SIGKILL, "")
    ends = [
        subprocess.run([*command, *more], env=environment, capture_output=True, text=True, check=True).stdout
        for more in (("--checkpoint", str(runs)), ())
    ]
    assert ends[0] == ends[1]


def test_without_arviz_the_command_says_how_to_get_it(eruptions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arviz_stats", None)
    result = run("compare", eruptions, "-k", 1, "--family", "laplace")
    assert result.exit_code == 2
    assert "ArviZ is not installed: pip install 'mixproof[compare]'" in " ".join(result.stderr.split())


def test_an_overflow_is_an_error_in_words(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    for weight, words in (
        ("1e308", "the weights add up to more than torch.float64 holds"),
        ("1.4e307", "the log likelihood overflows"),
    ):
        rows.write_text("a,b,count\n" + "".join(f"{i / 10},{i % 3},{weight}\n" for i in range(12)))
        result = run("fit", rows, "--family", "gaussian_full", "-k", 1, "--weights", "count", "--starts", 1)
        assert result.exit_code == 2
        assert words in result.output
