"""Draws as an ArviZ ``DataTree``: named axes, the marginal likelihood of each row, predictions, and provenance."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import torch
from pyro import poutine
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference.at_draws import log_likelihood_and_label_invariant
from mixproof.inference.diagnostics import complaints, diagnose, import_arviz
from mixproof.inference.draws import NOT_MIXED, Draws
from mixproof.inference.enumeration import bind, default_dtype_of
from mixproof.inference.exchangeability import exchanges, numberings, otherwise_exchangeable
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.random_state import seeded

if TYPE_CHECKING:
    from pandas import DataFrame  # type: ignore[import-untyped]
    from xarray import DataTree

OWN_PARAMETERS = "parameters_of_rows"
"""The attribute of ``log_likelihood`` that names the parameters in the plates of the rows, where there are such."""
EXCHANGEABLE, SUMMANDS, OTHERWISE = "exchangeable", "summands exchangeable", "exchangeable otherwise"
ALIGNED, NAMED = "aligned", "named"
"""What ``component_labels`` of the posterior says: draws do not agree on them, agree but for whole latents that may
change places, do not agree by a symmetry that is no renumbering of axes, were made to agree, or cannot disagree."""
NO_LABELS = {
    EXCHANGEABLE: "the components are exchangeable and the draws were not aligned: their numberings need not agree, "
    "and means, R-hat and effective sample sizes of component parameters then describe no component; use align()",
    SUMMANDS: "whole latents may change places, as summands under one prior do, which align() does not treat: draws "
    "need not agree which is which, and means, R-hat and effective sample sizes of their parameters then describe "
    "none of them; read the quantities that need no labels, or give the summands priors that tell them apart",
    OTHERWISE: "the components may change places, though by no renumbering of axes, as a share and one less it do: "
    "align() does not treat that, nor are the parameters sorted, and their means, R-hat and effective sample sizes "
    "then describe no component; write the shares as a simplex and the other parameters of all components in one site",
}
"""What ``summary`` warns of."""
NOT_DRAWS = {
    "bootstrap": "fits of other data, which spread like the estimate and not like the posterior",
    "svi": "draws from a fitted guide, which is as narrow as its family makes it",
}
"""What ``loo`` says of engines whose draws are not of the posterior, by the end of their names."""


FEWEST_DRAWS = 25
"""A fifth of them are the tail of 5 that a generalised Pareto law is fitted to."""


def to_datatree(
    draws: Draws,
    posterior: LogPosterior,
    *,
    seed: int,
    family: Any = None,
    num_predictive: int = 500,
    num_prior: int = 500,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> DataTree:
    """Return draws as a ``DataTree`` in ArviZ's conventions, for ``arviz_stats``, ``arviz_plots`` and ``to_netcdf``.

    The axes have names: ``chain``, ``draw``, ``component`` (``component_k`` for each latent k where there are several),
    ``feature``, ``feature_bis`` for the second axis of a covariance, and ``obs_id`` for rows. Which axis numbers the
    components is measured by ``numbering``.

    Args:
        draws: from any engine, of the parameters of ``posterior``; ``align`` them first where component parameters are
            to be read.
        posterior: the program with its data.
        seed: seeds the draws of predictions and of the prior.
        family: the family of the contract whose program it is, for its moments; None leaves them out.
        num_predictive: for about how many draws, evenly spaced in each chain, to predict the data; 0 for none.
            ``arviz_stats.loo_pit`` and ``plot_loo_pit`` need all: the number of chains times that of draws, each of
            which takes a few milliseconds and the memory of one data set.
        num_prior: how many draws of the prior and of its predictions; 0 for none. There are none of an improper prior,
            nor, after a warning, of one that includes a density which the program does not draw from.
        dims: names of the axes of a parameter that are to be others, by site.

    Returns:
        A tree with the groups ``posterior``; ``log_likelihood``, log p(x_n | params) with the latents summed out, of
        the rows of which it is not 0 at every draw, as under a mask; ``label_invariant``, the quantities of each draw
        that no numbering of components enters; ``sample_stats``; ``observed_data``; ``posterior_predictive``; ``prior``
        and ``prior_predictive``. The attributes of ``posterior`` say which engine, seed and versions it is from, and in
        ``component_labels`` whether draws agree on them. ``tree.sel(obs_id=tree["log_likelihood"].obs_id)`` leaves
        masked rows out of the data and predictions too, as ``arviz_stats.loo_pit`` needs it. There are no predictions,
        after a warning, where latents enter both the densities of the rows' own parameters and those of the data.

    Raises:
        ImportError: ArviZ is not installed.
        ValueError: the draws or ``dims`` are not of this program's parameters, or a site has the name of a quantity
            that ``label_invariant`` computes.
    """
    import_arviz("arviz_base")
    from arviz_base import dict_to_dataset
    from xarray import DataTree

    sites = posterior.constrain(torch.zeros(posterior.size, dtype=torch.float64, device=posterior.device))
    shapes = {site: tuple(value.shape) for site, value in sites.items()}
    found = {site: tuple(value.shape[2:]) for site, value in draws.params.items()}
    if found != shapes:
        raise ValueError(f"the draws are of the parameters {found}, and the program has {shapes}")
    if unknown := sorted(set(dims or {}) - set(shapes)):
        raise ValueError(f"dims names the axes of {', '.join(unknown)}, and the parameters are {', '.join(shapes)}")
    point = {site: value[0, 0] for site, value in draws.params.items()}
    with seeded(seed):  # a run draws the latents
        observed = _observed(posterior, point)
    rows, invariant = log_likelihood_and_label_invariant(draws, posterior, family=family)
    data_dims = {site: _data_dims(value, rows.shape[-1]) for site, value in observed.items()}
    component_names, sorted_names, labels = _numbering(posterior, draws)
    num_features = next((value.shape[1] for value in observed.values() if value.ndim == 2), None)
    param_dims = {
        site: list((dims or {}).get(site) or _param_dims(site, shape, component_names.get(site, {}), num_features))
        for site, shape in shapes.items()
    }
    invariant_dims = {"row_mean": ["feature"], "row_covariance": ["feature", "feature_bis"]}
    for site, names in param_dims.items():
        invariant_dims[site] = names
        if ranked := {axis: name for axis, name in component_names.get(site, {}).items() if name in sorted_names}:
            others = [name for axis, name in enumerate(names) if axis not in ranked]
            rank = "rank" + "".join(name.removeprefix("component") for name in ranked.values())
            invariant_dims[f"{site}_sorted"] = [*others[: min(ranked)], rank, *others[min(ranked) :]]
    outcome = "_".join(observed)
    attributes = {name: _storable(value) for name, value in draws.attributes.items()}
    provenance = {"inference_library": "mixproof", "inference_library_version": version("mixproof")}
    provenance |= {"torch_version": str(torch.__version__), "pyro_version": pyro.__version__}

    def dataset(values: Mapping[str, Tensor], names: Any, attributes: Any = None, **options: Any) -> Any:
        arrays = {name: value.detach().cpu().numpy() for name, value in values.items()}
        # by its conventions ArviZ warns of more chains than draws, which many short chains have
        options |= {"attrs": provenance | (attributes or {}), "check_conventions": False}
        return dict_to_dataset(arrays, dims=names, **options)

    groups = {
        "posterior": dataset(draws.params, param_dims, attributes | {"component_labels": labels}),
        "label_invariant": dataset(invariant, invariant_dims),
        "sample_stats": dataset(draws.sample_stats, {}),
        "observed_data": dataset(observed, data_dims, sample_dims=[]),
    }
    kept = (rows.abs().amax((0, 1)) > 10 * torch.finfo(rows.dtype).eps).nonzero()[:, 0]
    if len(kept) > 0:
        of_rows = {OWN_PARAMETERS: ", ".join(posterior.in_rows)} if posterior.in_rows else {}
        coords = {"obs_id": kept.cpu().numpy()}
        groups["log_likelihood"] = dataset({outcome: rows[..., kept]}, {outcome: ["obs_id"]}, of_rows, coords=coords)
    predictable = max(num_predictive, num_prior) > 0 and _predictable(posterior, point)
    if num_predictive > 0 and predictable:
        num_chains, num_draws = rows.shape[:2]
        step = max(num_draws * num_chains // num_predictive, 1)
        chosen = {site: value[:, ::step] for site, value in draws.params.items()}
        coords = {"draw": torch.arange(0, num_draws, step).numpy()}
        predicted = _predict(posterior, chosen, observed, seed)
        groups["posterior_predictive"] = dataset(predicted, data_dims, {"seed": seed}, coords=coords)
    if num_prior > 0 and (of_prior := _draw_prior(posterior, num_prior, seed)) is not None:
        groups["prior"] = dataset(of_prior, param_dims, {"seed": seed})
        if predictable:
            predicted = _predict(posterior, of_prior, observed, seed + 1)
            groups["prior_predictive"] = dataset(predicted, data_dims, {"seed": seed + 1})
    return DataTree.from_dict(groups)


def summary(tree: DataTree, *, components: bool = False, **options: Any) -> DataFrame:
    """Return means, standard deviations, effective sample sizes and R-hat of the quantities that need no labels.

    Args:
        tree: from ``to_datatree``.
        components: whether to add the parameters of the components, whose draws must have been aligned to be read.
        options: for ``arviz_stats.summary``, such as ``var_names``, ``kind`` and ``round_to``.

    Returns:
        A row for each number, as ``arviz_stats.summary``. Component parameters of draws that do not agree on labels, or
        on which summand is which, come with a warning, and so do chains that have plainly not mixed and components
        without rows.

    Raises:
        ImportError: ArviZ is not installed.
        ValueError: ``var_names`` or ``coords`` name what is not there.
    """
    stats = import_arviz("arviz_stats")
    shown: Any = tree["label_invariant"].to_dataset()
    labels = tree["posterior"].attrs["component_labels"]
    if components:
        shown = shown.merge(tree["posterior"].to_dataset().drop_vars(shown.data_vars, errors="ignore"))
    if (components or labels == OTHERWISE) and (words := NO_LABELS.get(labels)):
        warnings.warn(words, UserWarning, stacklevel=2)
    _warn_of_draws(tree)
    try:
        # R-hat of what never varies, as the weight of a single component, is NaN
        with np.errstate(invalid="ignore", divide="ignore"):
            return stats.summary(shown, **options)
    except KeyError as error:
        advice = "" if components else "; components=True adds the parameters of the components"
        names = ", ".join(map(str, shown.data_vars))
        raise ValueError(f"var_names or coords do not fit the tree, which has {names}{advice}: {error}") from error


def loo(tree: DataTree, **options: Any) -> Any:
    """Return the expected log predictive density under leave-one-out cross-validation, by importance sampling.

    Pareto-smoothed importance sampling (Vehtari, Gelman and Gabry 2017, Statistics and Computing 27). How far the draws
    of a chain repeat one another is read from the rows' likelihoods, as there. ``arviz_stats.loo`` on its own reads it
    from the parameters, where components that never switch labels within a chain, and do between chains, look like a
    chain that is stuck.

    Args:
        tree: from ``to_datatree``.
        options: for ``arviz_stats.loo``, such as ``pointwise``.

    Returns:
        An ``ELPDData``, as ``arviz_stats.compare`` takes them. Where rows have parameters of their own, a warning says
        that their likelihoods are given these, which few draws fit once the row is left out; others tell of chains that
        have plainly not mixed, of components without rows, and of engines whose draws are not of the posterior. A row
        whose likelihood is the same at all draws adds that, and has a Pareto k of -inf.

    Raises:
        ImportError: ArviZ is not installed.
        ValueError: the tree has no likelihood of a row, none varies over the draws, or there are fewer than 25 of them.
    """
    stats = import_arviz("arviz_stats")
    if (num_draws := _rows(tree).sizes["chain"] * _rows(tree).sizes["draw"]) < FEWEST_DRAWS:
        raise ValueError(f"LOO needs at least {FEWEST_DRAWS} draws, of all chains, and there are {num_draws}")
    options = {"reff": relative_efficiency(tree)} | options
    engine = str(tree["posterior"].attrs.get("engine", ""))
    if what := next((words for name, words in NOT_DRAWS.items() if engine.endswith(name)), None):
        warnings.warn(
            f"the draws are {what}: what LOO weighs are not draws from the posterior given all rows, and Pareto k does "
            "not show it; take them by gibbs or hmc",
            UserWarning,
            stacklevel=2,
        )
    if own := tree["log_likelihood"].attrs.get(OWN_PARAMETERS):
        warnings.warn(
            f"log p(x_n | params) is given the row's own parameters {own}, which have seen x_n in every draw: "
            "importance sampling hardly undoes that, so that LOO is to be trusted only where these say little of their "
            "row and no Pareto k is high; integrate them out of the program",
            UserWarning,
            stacklevel=2,
        )
    _warn_of_draws(tree)
    rows = _rows(tree)
    constant = _constant(rows)
    if not constant.any():
        return stats.loo(tree, **options)
    return _with_constant_rows(stats, tree, rows, constant, options)


def _with_constant_rows(stats: Any, tree: DataTree, rows: Any, constant: Any, options: dict[str, Any]) -> Any:
    """Return LOO where some rows have one likelihood at all draws, which importance sampling cannot weigh by: that
    likelihood is what they add, whatever the draws, and the tails of their ratios have no shape."""
    found = stats.loo(tree.sel(obs_id=rows.obs_id[~constant.values]), **options | {"pointwise": True})
    each = found.elpd_i.reindex(obs_id=rows.obs_id).fillna(rows.isel(chain=0, draw=0, drop=True))
    pointwise = options.get("pointwise") is not False
    return replace(
        found,
        elpd=float(each.sum()),
        se=float((len(each) * each.var()) ** 0.5),
        n_data_points=len(each),
        elpd_i=each if pointwise else None,
        pareto_k=found.pareto_k.reindex(obs_id=rows.obs_id, fill_value=-np.inf) if pointwise else None,
    )


def relative_efficiency(tree: DataTree) -> float:
    """Return the effective over the actual number of draws of p(x_n | params), averaged over rows.

    Args:
        tree: from ``to_datatree``.

    Raises:
        ImportError: ArviZ is not installed.
        ValueError: the tree has no likelihood of a row, or none varies over the draws.
    """
    stats = import_arviz("arviz_stats")
    rows = _rows(tree)
    varying = rows.isel(obs_id=~_constant(rows).values)
    if not varying.size:
        raise ValueError("no row's likelihood varies over the draws: there is nothing for LOO to weigh")
    densities = np.exp(varying - varying.max(["chain", "draw"]))
    return float(stats.ess(densities, method="mean").mean()) / (rows.sizes["chain"] * rows.sizes["draw"])


def _rows(tree: DataTree) -> Any:
    """Return log p(x_n | params) of the tree, or say that it has none."""
    if "log_likelihood" not in tree.children:
        raise ValueError("the tree has no group log_likelihood, as where all rows are masked: LOO needs rows")
    return next(iter(tree["log_likelihood"].data_vars.values()))


def _constant(rows: Any) -> Any:
    """Return of which rows the likelihood is the same at all draws, to rounding."""
    spread = rows.max(["chain", "draw"]) - rows.min(["chain", "draw"])
    return spread <= 8 * np.finfo(rows.dtype).eps * (1 + abs(rows).max(["chain", "draw"]))


def _warn_of_draws(tree: DataTree) -> None:
    """Warn where the chains of a tree have plainly not mixed, or components have no rows."""
    quantities = tree["label_invariant"].to_dataset()
    if tree["posterior"].attrs["component_labels"] == OTHERWISE:  # by a symmetry that the parameters there show
        quantities = quantities.drop_vars(tree["posterior"].data_vars, errors="ignore")
    remedy = "warm up longer, start the chains elsewhere, or weigh the modes by log_evidence"
    empty = (
        "the data carry fewer, and the prior decides what the others are, or all chains sit in a mode without them, as "
        "under wide priors; log_evidence from several seeds tells which"
    )
    limits: Any = {"max_rhat": NOT_MIXED, "min_effective_draws": 0}
    for words in complaints(diagnose(quantities), **limits, remedy=remedy, empty=empty):
        warnings.warn(words, ConvergenceWarning, stacklevel=3)


def _observed(posterior: LogPosterior, point: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the values of the sites that the program observes."""
    nodes = _run(posterior, posterior.model, point)
    return {
        name: site["value"]
        for name, site in nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and name not in posterior.program.supports
        and not site["infer"].get("_deterministic")
        and type(site["fn"]).__name__ not in ("_Subsample", "Unit")  # the latter is a pyro.factor
    }


def _run(posterior: LogPosterior, model: Any, point: Mapping[str, Tensor]) -> Any:
    """Return the sites of the program, run at given parameters."""
    with pyro.get_param_store().scope(), torch.no_grad(), default_dtype_of(*posterior.args):
        return poutine.trace(bind(model, point)).get_trace(*posterior.args).nodes


def _predictable(posterior: LogPosterior, point: Mapping[str, Tensor]) -> bool:
    """Return whether the program, run at given parameters, draws data from their law, and warn where it does not.

    It draws latents before the parameters of the rows that depend on them, as if these were not known.
    """
    if not posterior.in_rows:
        return True
    joint = posterior.log_joint(point)
    parts = (joint.unobserved - joint.latent, joint.rows - joint.unobserved)  # of the rows' parameters, and of the data
    if any(torch.allclose(part, part[:, :1].expand_as(part)) for part in parts):
        return True
    warnings.warn(
        f"the rows' own parameters {', '.join(posterior.in_rows)} depend on the latents, and so do the data given "
        "them: the program run at such parameters draws other latents than theirs, and the tree has no predictions; "
        "integrate them out of the program",
        UserWarning,
        stacklevel=3,
    )
    return False


def _predict(
    posterior: LogPosterior, params: Mapping[str, Tensor], observed: Mapping[str, Tensor], seed: int
) -> dict[str, Tensor]:
    """Return new data (C, S, *shape) by observed site, a set from each draw (C, S, *shape) of the parameters."""
    shape = next(iter(params.values())).shape[:2]
    model = poutine.uncondition(posterior.model)
    drawn: dict[str, list[Tensor]] = {site: [] for site in observed}
    with seeded(seed), pyro.validation_enabled(False):
        for number in range(shape.numel()):
            nodes = _run(posterior, model, {site: value.flatten(0, 1)[number] for site, value in params.items()})
            for site, values in drawn.items():
                values.append(nodes[site]["value"])
    return {site: torch.stack(values).unflatten(0, shape) for site, values in drawn.items()}


def _draw_prior(posterior: LogPosterior, num_draws: int, seed: int) -> dict[str, Tensor] | None:
    """Return draws (1, num_draws, *shape) of the prior by site, or None of one that cannot be drawn from."""
    try:
        draws = posterior.draw_sites(num_draws, seed=seed)
    except ValueError:
        return None
    if posterior.factors:
        warnings.warn(
            f"the prior includes the density of {', '.join(posterior.factors)}, which the program does not draw from, "
            "and the tree has no groups prior and prior_predictive: put it into the distributions of the parameters, "
            "or say num_prior=0",
            UserWarning,
            stacklevel=3,
        )
        return None
    return posterior.constrain(draws[None])


def _numbering(posterior: LogPosterior, draws: Draws) -> tuple[dict[str, dict[int, str]], set[str], str]:
    """Return by site the names of its axes that number components, those of the names under which some of them may
    change places, and whether the draws agree on labels."""
    is_only = len(posterior.program.latents) == 1
    found: dict[str, dict[int, str]] = {}
    exchangeable: set[str] = set()
    labels = NAMED
    for numbered in numberings(posterior):
        if len(numbered.classes) == 1 and not is_only:  # any axis of length 1 would do
            continue
        names = ["component"] if is_only else [f"component_{latent}" for latent in numbered.latents]
        for site, own in (numbered.axes or {}).items():
            found[site] = found.get(site, {}) | dict(zip(own, names, strict=False))
        if numbered.some_exchangeable:
            exchangeable.update(names)
            aligned = f"relabelled_{numbered.latents[0]}" in draws.attributes
            labels = ALIGNED if aligned and labels != EXCHANGEABLE else EXCHANGEABLE
        elif numbered.axes is None and len(numbered.latents) == 1:
            labels = OTHERWISE if otherwise_exchangeable(posterior, numbered.latents[0]) else labels
    if labels in (ALIGNED, NAMED) and len(exchanges(posterior)) > 1:
        labels = SUMMANDS
    return found, exchangeable, labels


def _param_dims(site: str, shape: Sequence[int], components: Mapping[int, str], num_features: int | None) -> list[str]:
    """Return names for the axes of a parameter: of components, of features, and ArviZ's own for what is neither."""
    features = iter(("feature", "feature_bis"))
    names = []
    for axis, size in enumerate(shape):
        if axis in components:
            names.append(components[axis])
        else:
            names.append(next(features, f"{site}_dim_{axis}") if size == num_features else f"{site}_dim_{axis}")
    return names


def _data_dims(value: Tensor, num_rows: int) -> list[str]:
    return ["obs_id", "feature"][: value.ndim] if value.ndim > 0 and len(value) == num_rows else []


def _storable(value: Any) -> Any:
    """Return a value as netCDF keeps it in an attribute: a number or text, JSON for what is neither."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, float):
        return value
    return str(value) if isinstance(value, str) else json.dumps(value, default=str)
