"""The evidence of a Pyro program, log p(data), parameters and latents summed out, and what it says of candidates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from mixproof.inference.allocation_smc import allocation_smc, integrates_out
from mixproof.inference.bridge_sampling import bridge_sampling
from mixproof.inference.draws import NOT_MIXED, Draws, split_rhat
from mixproof.inference.enumeration import default_dtype_of, trace_of
from mixproof.inference.exchangeability import otherwise_exchangeable
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.particles import systematic
from mixproof.inference.random_state import seeded
from mixproof.inference.relabelling import Relabelling
from mixproof.inference.supports import ends
from mixproof.inference.tempered_smc import tempered_smc
from mixproof.inference.validation import check_prior, check_rows, example_params, feasible_params

NUM_CHAINS = 4
"""Into how many chains the particles of the replicates go: as many as R-hat and effective sample sizes ask for at least
(Vehtari et al. 2021, Bayesian Analysis 16, section 4)."""

MAX_LOST = 1e-3
"""How large a share of draws may lie so near the upper end of a support that rounding takes them for it."""


class Evidence(NamedTuple):
    """An estimate of log p(data) with its error."""

    log_evidence: float
    """log p(data), natural logarithm."""
    standard_error: float
    """The standard deviation of the estimate over repetitions of the run with other seeds; or, where the bridge and the
    particles that it starts from differ by more than four of it, how far they are apart: a warning says so."""
    draws: Draws
    """Draws from p(params | data) that the run made or was given."""
    diagnostics: dict[str, Any]
    """By name, what the method says of its run."""


def log_evidence(
    model: Callable[..., Any],
    *args: Any,
    method: Literal["smc", "bridge"] = "bridge",
    seed: int,
    family: Any = None,
    draws: Draws | None = None,
    relabel: bool = True,
    num_replicates: int | None = None,
    num_chains: int | None = None,
    num_moves: int | None = None,
    efficiency: float | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
) -> Evidence:
    """Estimate the evidence of any Pyro program with enumerated latents and proper priors.

    Args:
        model: the program; ``model(*args)`` observes the data. Bind other arguments with ``functools.partial``.
        args: the positional arguments of the program.
        method: ``"smc"``, sequential Monte Carlo; or ``"bridge"``, bridge sampling from ``draws`` or else from the
            particles at which that ends, by far the more exact. Draws that miss a mode leave it out; particles that do
            are a warning, as the two methods then differ.
        seed: seeds every random number.
        family: the family of the contract whose program it is, ``partial(family.model, num_components=K, prior=prior)``
            of x alone. Where its parameters integrate out, sequential Monte Carlo then takes in row by row
            (``allocation_smc``), which finds groups of rows that tempering from a wide prior misses, and is faster.
            None, and a family that does not integrate out, go from the prior to the posterior (``tempered_smc``).
        draws: for ``"bridge"``, draws from p(params | data) by any sampler, all modes among them in their shares. A
            warning says where their chains have plainly not mixed, or where components may change places by a symmetry
            that is not treated (``otherwise_exchangeable``).
        relabel: whether the symmetry of exchangeable components is treated. Without it, ``"bridge"`` takes one mode for
            the whole posterior where the draws show no other, and is then too low by log K!.
        num_replicates, num_chains, num_moves, efficiency: as ``allocation_smc`` or ``tempered_smc`` takes them, None
            for its default. The standard error falls with the root of the product of the first three.
        checkpoint: a file for the state of the particles, as the one of the two takes it. What comes after them is
            repeated when the run goes on from there, to the same result.
        progress: whether to show the run on stderr.

    Returns:
        ``Evidence``. Its draws are those given, or the last particles in four chains (fewer of fewer replicates), each
        of replicates of its own, in which a replicate has the share that its evidence has. So R-hat says whether
        independent runs agree, and particles of one ancestry are neighbours, as draws of a Markov chain are.

    Raises:
        TypeError: ``draws`` are no ``Draws``.
        ValueError: the method is unknown or takes no draws, a prior is improper or not a density, the program has
            ``pyro.param`` sites, or without ``draws`` observes something that prior draws do not know of or has a
            parameter in the plates of the rows, the program is not that of the family, the draws are not of its sites;
            or as ``tempered_smc``, ``allocation_smc`` and ``bridge_sampling``.
        RuntimeError: as ``tempered_smc``.
        OSError: the checkpoint cannot be read or written, which is tried first.
    """
    if method not in ("smc", "bridge"):
        raise ValueError(f'method must be "smc" or "bridge", not {method!r}')
    if draws is not None and (method == "smc" or checkpoint is not None):
        what = (
            'method="smc" makes draws of its own' if method == "smc" else "draws leave nothing to put in a checkpoint"
        )
        raise ValueError(f'{what}: leave draws out, or take method="bridge" without a checkpoint')
    if family is not None:
        size, prior = _bound(model, family, args)
        args = (check_rows(family, args[0]),)
        prior = check_prior(family, prior, example_params(family, size, args[0])[0])
        model = partial(family.model, num_components=size, prior=prior)
    _check_priors(model, *args, from_prior=draws is None)
    posterior = LogPosterior(model, *args)
    relabelling = Relabelling(posterior) if relabel else None
    if draws is not None:
        u = _coordinates(posterior, draws)
        _warn_of_draws(draws, posterior, relabel)
        bridge = bridge_sampling(posterior, u, seed=seed, relabelling=relabelling)
        diagnostics: dict[str, Any] = {"bridge_effective_sample_size": bridge.effective_sample_size}
        return Evidence(bridge.log_evidence, bridge.standard_error, draws, diagnostics)
    chosen = {
        "num_replicates": num_replicates,
        "num_chains": num_chains,
        "num_moves": num_moves,
        "efficiency": efficiency,
    }
    settings: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    settings |= {"checkpoint": checkpoint}
    run: Any
    if integrates_out(family):
        settings |= {"seed": seed, "progress": progress}
        engine, run = "allocation_smc", allocation_smc(family, args[0], prior, num_components=size, **settings)
        lp = run.lp
        params = {
            name: value for name, value in run.params._asdict().items() if name in posterior.coordinates.transforms
        }
    else:
        turn = None if relabelling is None else relabelling.random
        engine, run = "tempered_smc", tempered_smc(posterior, seed=seed, relabel=turn, progress=progress, **settings)
        params = posterior.constrain(run.u)
        lp = run.log_prior + run.log_likelihood - posterior.log_jacobian(run.u)
    particles = Draws(params, {"lp": lp}, {"engine": engine, "seed": seed})
    resampled = _resampled(particles, run.log_evidences, seed)
    diagnostics = {name: value for name, value in vars(run).items() if getattr(value, "ndim", 0) == 1}
    if method == "smc":
        return Evidence(run.log_evidence, run.standard_error, resampled, diagnostics)
    shares = (run.log_evidences - run.log_evidence).exp()
    try:
        u = _coordinates(posterior, particles)
        bridge = bridge_sampling(posterior, u, seed=seed, relabelling=relabelling, weights=shares)
    except ValueError as reason:
        warnings.warn(f"no bridge from the particles, whose own evidence it is: {reason}", stacklevel=2)
        return Evidence(run.log_evidence, run.standard_error, resampled, diagnostics)
    diagnostics |= {
        "bridge_effective_sample_size": bridge.effective_sample_size,
        "smc_log_evidence": run.log_evidence,
        "smc_standard_error": run.standard_error,
    }
    gap, error = abs(bridge.log_evidence - run.log_evidence), math.hypot(bridge.standard_error, run.standard_error)
    if not relabel or gap <= 4 * error:
        return Evidence(bridge.log_evidence, bridge.standard_error, resampled, diagnostics)
    warnings.warn(
        f"the bridge puts the log evidence at {bridge.log_evidence:.3f} and the particles that it starts from at "
        f"{run.log_evidence:.3f}, which is {gap / error:.1f} standard errors away, so that its standard error is their "
        "distance: raise num_moves and num_chains of the particles until they agree",
        stacklevel=2,
    )
    return Evidence(bridge.log_evidence, gap, resampled, diagnostics)


def _bound(model: Callable[..., Any], family: Any, args: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return K and the prior of a program that is that of a family."""
    known = {"num_components", "prior"}
    if not (
        isinstance(model, partial) and model.func == family.model and model.keywords.keys() == known and not model.args
    ):
        raise ValueError(
            "the program is not that of the family: give partial(family.model, num_components=K, prior=prior), or "
            "leave family out"
        )
    if len(args) != 1:
        raise ValueError(f"the program of a family takes the rows alone, not {len(args)} arguments")
    return model.keywords["num_components"], model.keywords["prior"]


def _coordinates(posterior: LogPosterior, draws: Draws) -> Tensor:
    """Return the unconstrained coordinates (C, S, P) of draws."""
    if not isinstance(draws, Draws):
        raise TypeError(f"draws must be Draws, as every sampler returns them, not a {type(draws).__name__}")
    names = list(posterior.coordinates.transforms)
    if missing := sorted(set(names) - set(draws.params)):
        raise ValueError(f"the draws lack the sites {', '.join(missing)}; they have {', '.join(sorted(draws.params))}")
    for name in names:
        values, (_, highest) = draws.params[name], ends(posterior.program.supports[name])
        close = highest - values < 4 * torch.finfo(values.dtype).eps * abs(highest)
        lost = close.reshape(*values.shape[:2], -1).any(2)
        if lost.double().mean() > MAX_LOST:
            raise ValueError(
                f"{float(lost.double().mean()):.1%} of the draws of {name} lie within rounding of {highest}, between "
                "which and that floating point has no numbers: the prior puts too much of its weight there"
            )
    shape = draws.params[names[0]].shape[:2]
    u = posterior.unconstrain({name: draws.params[name].flatten(0, 1) for name in names})
    if not u.isfinite().all():
        bad = int((~u.isfinite().all(1)).sum())
        raise ValueError(f"{bad} of {len(u)} draws lie outside the supports of the sites, or at their edge")
    return u.reshape(*shape, -1)


def _warn_of_draws(draws: Draws, posterior: LogPosterior, relabel: bool) -> None:
    """Say in words why an evidence from these draws, and its standard error, are not to be trusted."""
    reasons = []
    if low := draws.attributes.get("low_chains"):
        reasons.append(f"{len(low)} of {draws.attributes['num_chains']} chains stay in a lower mode")
    if (lp := draws.sample_stats.get("lp")) is not None and (found := split_rhat(lp)) > NOT_MIXED:
        reasons.append(f"R-hat of the log posterior is {found:.2f}")
    if reasons:
        warnings.warn(
            f"the chains have not mixed ({' and '.join(reasons)}): the modes do not have their shares among the draws, "
            "the log evidence may be far off, and its standard error does not see it; draw anew from other starts, or "
            "leave draws out",
            ConvergenceWarning,
            stacklevel=3,
        )
    if relabel and (free := [each for each in posterior.program.latents if otherwise_exchangeable(posterior, each)]):
        warnings.warn(
            f"the components that {', '.join(free)} counts may change places, though by no renumbering of axes, as a "
            "share and one less it do: that is not treated, and draws that show one of the orders alone give an "
            "evidence that is too low, of two components by log 2; write the shares as a simplex and the other "
            "parameters of all components in one site, or leave draws out",
            UserWarning,
            stacklevel=3,
        )


def _resampled(particles: Draws, log_evidences: Tensor, seed: int) -> Draws:
    """Return the particles (R, S) of replicates in chains of replicates that no other chain has."""
    lp = particles.sample_stats["lp"]
    num_replicates, size = lp.shape
    generator = torch.Generator(lp.device).manual_seed(seed)
    num_chains, chosen = min(NUM_CHAINS, num_replicates), []
    for own in torch.arange(num_replicates, device=lp.device).tensor_split(num_chains):
        weights = log_evidences[own].softmax(0).repeat_interleave(size)[None] / size
        chosen.append(own[0] * size + systematic(weights, lp.numel() // num_chains, generator)[0])
    places = torch.stack(chosen)
    params = {site: value.flatten(0, 1)[places] for site, value in particles.params.items()}
    attributes = particles.attributes | {"num_chains": num_chains, "num_draws": places.shape[1]}
    return Draws(params, {"lp": lp.flatten()[places]}, attributes)


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
        ValueError: there is no candidate, an evidence is not finite, or the prior is not positive for each of the same
            candidates.
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
    for name, evidence in evidences.items():
        if not (math.isfinite(evidence.log_evidence) and 0 <= evidence.standard_error < math.inf):
            raise ValueError(
                f"the log evidence of {name} is {evidence.log_evidence} with standard error "
                f"{evidence.standard_error}: estimate it again, or leave {name} out"
            )
    logs = torch.tensor([evidences[name].log_evidence for name in names], dtype=torch.float64)
    errors = torch.tensor([evidences[name].standard_error for name in names], dtype=torch.float64)
    probabilities = (logs + before.log()).softmax(0)
    derivatives = torch.diag(probabilities) - torch.outer(probabilities, probabilities)
    spreads = (derivatives * errors).square().sum(1).sqrt()
    return {name: (float(p), float(s)) for name, p, s in zip(names, probabilities, spreads, strict=True)}


def _check_priors(model: Callable[..., Any], *args: Any, from_prior: bool) -> None:
    """Say in words why a program has no evidence, or not one that starts from draws of its prior."""
    with default_dtype_of(*args), feasible_params(*args, dtype=torch.get_default_dtype()):  # one precision, as of draws
        trace = trace_of(model, *args)
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
            with torch.no_grad(), default_dtype_of(*args), seeded(0):
                site["fn"].sample()
                proper = bool(site["fn"].log_prob(site["value"]).isfinite().all())  # not of an infinite scale
        except NotImplementedError:
            proper = False
        if not proper:
            raise ValueError(
                f'the prior of "{name}" is improper ({type(site["fn"]).__name__}), so that the evidence is known only '
                "up to a constant that differs between candidates: give it a proper prior"
            )
