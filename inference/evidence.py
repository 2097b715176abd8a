"""The evidence of a Pyro program, log p(data), parameters and latents summed out, and what it says of candidates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor

from mixproof.inference.bridge_sampling import bridge_sampling
from mixproof.inference.draws import Draws
from mixproof.inference.enumeration import default_dtype_of
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.relabelling import Relabelling
from mixproof.inference.tempered_smc import TemperedSMC, systematic, tempered_smc
from mixproof.inference.validation import feasible


class Evidence(NamedTuple):
    """An estimate of log p(data) with its error."""

    log_evidence: float
    """log p(data), natural logarithm."""
    standard_error: float
    """The standard deviation of the estimate over repetitions of the run with other seeds."""
    draws: Draws
    """Draws from p(params | data) that the run made or was given."""
    diagnostics: dict[str, Any]
    """By name, what the method says of its run."""


def log_evidence(
    model: Callable[..., Any],
    *args: Any,
    method: Literal["smc", "bridge"] = "bridge",
    seed: int,
    draws: Draws | None = None,
    relabel: bool = True,
    num_replicates: int = 32,
    num_chains: int = 16,
    num_moves: int = 15,
    efficiency: float = 0.5,
    progress: bool = False,
) -> Evidence:
    """Estimate the evidence of any Pyro program with enumerated latents and proper priors.

    Args:
        model: the program; ``model(*args)`` observes the data. Bind other arguments with ``functools.partial``.
        args: the positional arguments of the program.
        method: ``"smc"``, tempered sequential Monte Carlo from the prior to the posterior; or ``"bridge"``, bridge
            sampling from ``draws`` or else from the particles at which that ends, by far the more exact. Draws that
            miss a mode leave it out; particles that do are a warning, as the two methods then differ.
        seed: seeds every random number.
        draws: for ``"bridge"``, draws from p(params | data) by any sampler, all modes among them in their shares.
        relabel: whether the symmetry of exchangeable components is treated. Without it, ``"bridge"`` takes one mode for
            the whole posterior where the draws show no other, and is then too low by log K!.
        num_replicates, num_chains, num_moves, efficiency: as ``tempered_smc`` takes them. The standard error falls with
            the root of the product of the first three.
        progress: whether to show the run on stderr.

    Returns:
        ``Evidence``. Its draws are those given, or the last particles, (num_replicates, S, ...), resampled, in no
        order.

    Raises:
        TypeError: ``draws`` are no ``Draws``.
        ValueError: the method is unknown or takes no draws, a prior is improper or not a density, the program has
            ``pyro.param`` sites, or without ``draws`` observes something that prior draws do not know of or has a
            parameter in the plates of the rows, the draws are not of its sites; or as ``tempered_smc`` and
            ``bridge_sampling``.
        RuntimeError: as ``tempered_smc``.
    """
    if method not in ("smc", "bridge"):
        raise ValueError(f'method must be "smc" or "bridge", not {method!r}')
    if method == "smc" and draws is not None:
        raise ValueError('method="smc" makes draws of its own: leave draws out, or take method="bridge"')
    _check_priors(model, *args, from_prior=draws is None)
    posterior = LogPosterior(model, *args)
    relabelling = Relabelling(posterior) if relabel else None
    weights = None
    diagnostics: dict[str, Any] = {}
    if draws is not None:
        u = _coordinates(posterior, draws)
    else:
        run = tempered_smc(
            posterior,
            seed=seed,
            num_replicates=num_replicates,
            num_chains=num_chains,
            num_moves=num_moves,
            efficiency=efficiency,
            relabel=None if relabelling is None else relabelling.random,
            progress=progress,
        )
        u, weights = run.u, (run.log_evidences - run.log_evidence).exp()
        diagnostics = {name: value for name, value in run._asdict().items() if value.ndim == 1}
        draws = _draws(posterior, run, seed)
    if method == "smc":
        return Evidence(run.log_evidence, run.standard_error, draws, diagnostics)
    bridge = bridge_sampling(posterior, u, seed=seed, relabelling=relabelling, weights=weights)
    diagnostics["bridge_effective_sample_size"] = bridge.effective_sample_size
    if weights is not None:
        diagnostics |= {"smc_log_evidence": run.log_evidence, "smc_standard_error": run.standard_error}
        gap, error = bridge.log_evidence - run.log_evidence, math.hypot(bridge.standard_error, run.standard_error)
        if relabel and abs(gap) > 4 * error:
            warnings.warn(
                f"the bridge puts the log evidence at {bridge.log_evidence:.3f} and the particles that it starts from "
                f"at {run.log_evidence:.3f}, which is {abs(gap) / error:.1f} standard errors away: raise num_moves and "
                "num_chains until they agree",
                stacklevel=2,
            )
    return Evidence(bridge.log_evidence, bridge.standard_error, draws, diagnostics)


def _coordinates(posterior: LogPosterior, draws: Draws) -> Tensor:
    """Return the unconstrained coordinates (C, S, P) of draws."""
    if not isinstance(draws, Draws):
        raise TypeError(f"draws must be Draws, as every sampler returns them, not a {type(draws).__name__}")
    names = list(posterior.coordinates.transforms)
    if missing := sorted(set(names) - set(draws.params)):
        raise ValueError(f"the draws lack the sites {', '.join(missing)}; they have {', '.join(sorted(draws.params))}")
    shape = draws.params[names[0]].shape[:2]
    u = posterior.unconstrain({name: draws.params[name].flatten(0, 1) for name in names})
    if not u.isfinite().all():
        bad = int((~u.isfinite().all(1)).sum())
        raise ValueError(f"{bad} of {len(u)} draws lie outside the supports of the sites, or at their edge")
    return u.reshape(*shape, -1)


def _draws(posterior: LogPosterior, run: TemperedSMC, seed: int) -> Draws:
    """Return particles in the shares of their replicates' evidences."""
    weights = run.log_evidences.softmax(0)[:, None].expand_as(run.log_prior).flatten() / run.log_prior.shape[1]
    generator = torch.Generator().manual_seed(seed)
    chosen = systematic(weights[None], len(weights), generator)[0]
    chosen = chosen[torch.randperm(len(chosen), generator=generator)].reshape(run.log_prior.shape)
    u = run.u.flatten(0, 1)[chosen]
    lp = (run.log_prior + run.log_likelihood).flatten()[chosen] - posterior.log_jacobian(u)
    attributes = {"engine": "tempered_smc", "seed": seed, "num_chains": len(lp), "num_draws": lp.shape[1]}
    return Draws(posterior.constrain(u), {"lp": lp}, attributes)


def posterior_probabilities(
    evidences: Mapping[Any, Evidence], prior: Mapping[Any, float] | None = None
) -> dict[Any, tuple[float, float]]:
    """Return the posterior probability of each candidate, and its standard error, from independent evidences.

    Args:
        evidences: by candidate, a number of components or a family, its evidence on the same data.
        prior: by candidate, its probability before the data, positive, in any unit; None takes all alike.

    Returns:
        By candidate, the probability p and its standard error to first order,
        p ((1 - p)^2 s^2 + sum over others of p_j^2 s_j^2)^(1/2), s the standard errors of the log evidences.

    Raises:
        ValueError: there is no candidate, or the prior is not positive for each of the same candidates.
    """
    if not evidences:
        raise ValueError("there are no candidates: give the evidence of at least one")
    names = list(evidences)
    if prior is not None and set(prior) != set(names):
        raise ValueError(
            f"the prior is of {', '.join(map(str, prior))}, the evidences are of {', '.join(map(str, names))}"
        )
    before = torch.tensor([1.0 if prior is None else prior[name] for name in names], dtype=torch.float64)
    if not (before.isfinite() & (before > 0)).all():
        raise ValueError(f"prior probabilities must be positive, not {before.tolist()}: leave a candidate of 0 out")
    logs = torch.tensor([evidences[name].log_evidence for name in names], dtype=torch.float64)
    errors = torch.tensor([evidences[name].standard_error for name in names], dtype=torch.float64)
    probabilities = (logs + before.log()).softmax(0)
    derivatives = torch.diag(probabilities) - torch.outer(probabilities, probabilities)
    spreads = (derivatives * errors).square().sum(1).sqrt()
    return {name: (float(p), float(s)) for name, p, s in zip(names, probabilities, spreads, strict=True)}


def _check_priors(model: Callable[..., Any], *args: Any, from_prior: bool) -> None:
    """Say in words why a program has no evidence, or not one that starts from draws of its prior."""
    with pyro.get_param_store().scope(), torch.no_grad(), default_dtype_of(*args), InitMessenger(feasible):
        trace: Any = poutine.trace(model).get_trace(*args)
    latents = [site for site in trace.nodes.values() if site["type"] == "sample" and site["infer"].get("enumerate")]
    rows = {frame.name for site in latents for frame in site["cond_indep_stack"]}
    for name, site in trace.nodes.items():
        if site["type"] == "param":
            raise ValueError(
                f'"{name}" is a pyro.param, without a prior, so that there is no evidence: give it one by pyro.sample'
            )
        if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
            continue
        outside = not rows <= {frame.name for frame in site["cond_indep_stack"]}
        if site["infer"].get("_deterministic") or not outside:
            continue
        if site["is_observed"]:
            if not from_prior:
                continue
            raise ValueError(
                f'"{name}" is observed outside the plate of the rows, and draws from the prior do not know of it: '
                'observe it in a row, or give draws to method="bridge"'
            )
        if site["mask"] is not None or not torch.as_tensor(site["scale"] == 1).all():
            raise ValueError(f'the prior of "{name}" is masked or scaled, and so is no density: leave that out')
        try:
            with torch.no_grad():
                site["fn"].sample()
        except NotImplementedError as error:
            raise ValueError(
                f'the prior of "{name}" is improper ({type(site["fn"]).__name__}), so that the evidence is known only '
                "up to a constant that differs between candidates: give it a proper prior"
            ) from error
