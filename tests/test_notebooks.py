"""The notebooks: pairs agree, outputs are there, a fresh run succeeds, and the functions of the exercise are right."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jupytext
import nbformat
import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.cluster import KMeans
from sklearn.datasets import load_iris, load_sample_image

from tests.conftest import load_script

FOLDER = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(path.with_suffix(".py") for path in FOLDER.glob("*.ipynb"))
NOTEBOOKS = pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])
LONG = {"galaxies", "compare_models", "mend_a_printed_formula"}
"""Notebooks that take half a minute or more."""
MAX_BYTES = 1_500_000

MIXTURE = (
    np.array([0.5, 0.3, 0.2]),
    np.array([[0.0, 0.0], [4.0, 1.0], [1.0, 5.0]]),
    np.array([[[1.0, 0.6], [0.6, 1.0]], [[0.5, 0.0], [0.0, 2.0]], [[1.5, -0.5], [-0.5, 0.5]]]),
)

execute = load_script("notebooks/execute.py")


@pytest.fixture
def exercise() -> SimpleNamespace:
    """Return the imports, the functions and the generator of the exercise notebook, without running its story."""
    tree = ast.parse((FOLDER / "exercise_12_clustering.py").read_text(encoding="utf-8"))
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef)
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "generator")
    ]
    names: dict[str, Any] = {}
    exec(compile(tree, "exercise_12_clustering", "exec"), names)
    return SimpleNamespace(**names)


def test_all_notebooks_are_here() -> None:
    assert execute.sources() == SOURCES
    names = {
        "exercise_12_clustering",
        "verify_your_own_em",
        "mend_a_printed_formula",
        "compare_models",
        "galaxies",
        "generate",
    }
    assert names <= {source.stem for source in SOURCES}


@NOTEBOOKS
def test_pair_agrees(source: Path) -> None:
    script, notebook = jupytext.read(source), nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert [(cell.cell_type, cell.source) for cell in script.cells] == [
        (cell.cell_type, cell.source) for cell in notebook.cells
    ]


@NOTEBOOKS
def test_committed_outputs(source: Path) -> None:
    file = source.with_suffix(".ipynb")
    assert file.stat().st_size < MAX_BYTES
    code = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize(
    "source",
    [pytest.param(source, id=source.stem, marks=pytest.mark.slow if source.stem in LONG else ()) for source in SOURCES],
)
def test_fresh_run(source: Path) -> None:
    """Run all cells; what comes out is of the committed kinds, and nothing goes to stderr."""

    def kinds(notebook: Any) -> list[list[tuple[str, ...]]]:
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        return [
            [(o.output_type, o.get("name", ""), *sorted(o.get("data", {}))) for o in cell.outputs] for cell in cells
        ]

    assert kinds(execute.execute(source)) == kinds(nbformat.read(source.with_suffix(".ipynb"), as_version=4))


def test_gmm_log_probability(exercise: SimpleNamespace) -> None:
    pi, mu, sigma = MIXTURE
    X = np.random.default_rng(0).normal(size=(50, 2), scale=5)
    log_joint = exercise.gmm_log_probability(X, pi, mu, sigma)
    assert isinstance(log_joint, np.ndarray)
    assert log_joint.dtype == np.float64
    assert log_joint.shape == (50, 3)
    density = sum(p * stats.multivariate_normal(m, s).pdf(X) for p, m, s in zip(pi, mu, sigma, strict=True))
    np.testing.assert_allclose(np.exp(log_joint).sum(1), density, rtol=1e-12)


def test_gmm_sample_has_the_moments_of_the_mixture(exercise: SimpleNamespace) -> None:
    """All means and second moments are within what the Monte Carlo error explains, but for one case in a million."""
    pi, mu, sigma = MIXTURE
    N = 200_000
    X = exercise.gmm_sample(N, pi, mu, sigma)
    assert isinstance(X, np.ndarray)
    assert X.shape == (N, 2)
    terms = np.column_stack([X, X[:, 0] ** 2, X[:, 0] * X[:, 1], X[:, 1] ** 2])
    second = np.einsum("k,kij->ij", pi, sigma + mu[:, :, None] * mu[:, None, :])
    exact = np.array([*(pi @ mu), second[0, 0], second[0, 1], second[1, 1]])
    standard_error = terms.std(0) / np.sqrt(N)
    assert np.all(np.abs(terms.mean(0) - exact) < stats.norm.isf(1e-6 / len(exact) / 2) * standard_error)


def test_gmm_sample_draws_anew(exercise: SimpleNamespace) -> None:
    first, second = (exercise.gmm_sample(10, *MIXTURE) for _ in range(2))
    assert not np.array_equal(first, second)
    exercise.generator.manual_seed(12)
    np.testing.assert_array_equal(exercise.gmm_sample(10, *MIXTURE), first)


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("data", ["iris", "flower"])
def test_kmeans_is_as_good_as_scikit_learn(exercise: SimpleNamespace, data: str, k: int) -> None:
    flower = load_sample_image("flower.jpg").reshape(-1, 3)[::97] / 255
    X = load_iris().data if data == "iris" else flower
    mu, z = exercise.kmeans(X, k)
    assert isinstance(mu, np.ndarray)
    assert isinstance(z, np.ndarray)
    assert (mu.shape, z.shape) == ((k, X.shape[1]), (len(X),))
    assert np.issubdtype(z.dtype, np.integer)
    inertia = ((X - mu[z]) ** 2).sum()
    assert inertia <= KMeans(k, n_init=10, random_state=0).fit(X).inertia_ * (1 + 1e-12)


def test_em(exercise: SimpleNamespace) -> None:
    """Any M-step leaves a mixture with the mean and the covariance of the data; a smaller ``tol`` climbs further."""
    X = load_iris().data
    log_liks = []
    for tol in (0.1, 1e-9):
        exercise.generator.manual_seed(0)
        pi, mu, sigma = exercise.em(X, 3, tol=tol)
        assert all(isinstance(value, np.ndarray) for value in (pi, mu, sigma))
        assert (pi.shape, mu.shape, sigma.shape) == ((3,), (3, 4), (3, 4, 4))
        np.testing.assert_allclose(pi.sum(), 1, rtol=1e-12)
        np.testing.assert_allclose(pi @ mu, X.mean(0), rtol=1e-12)
        second = np.einsum("k,kij->ij", pi, sigma + mu[:, :, None] * mu[:, None, :])
        np.testing.assert_allclose(second, X.T @ X / len(X), rtol=1e-12)
        log_liks.append(np.logaddexp.reduce(exercise.gmm_log_probability(X, pi, mu, sigma), axis=1).sum())
    assert log_liks[0] < log_liks[1]


def test_em_stops_by_the_relative_change(exercise: SimpleNamespace) -> None:
    """From where ``tol`` let EM stop, the step before had changed the log likelihood by more than ``tol`` allows."""
    X = load_iris().data
    exercise.generator.manual_seed(0)
    start = exercise.gaussian_full.init_params(torch.as_tensor(X), 3, exercise.generator)
    trace = exercise.expectation_maximisation.em(exercise.gaussian_full, X, start, rtol=0.001).log_lik.numpy()
    changes = np.abs(np.diff(trace)) / np.abs(trace[1:])
    assert changes[-1] <= 0.001
    assert np.all(changes[:-1] > 0.001)
    exercise.generator.manual_seed(0)
    found = exercise.gmm_log_probability(X, *exercise.em(X, 3))
    np.testing.assert_allclose(np.logaddexp.reduce(found, axis=1).sum(), trace[-1], rtol=1e-12)
