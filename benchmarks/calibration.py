"""Which test quantity of simulation-based calibration sees which fault of a posterior, and how the engines fare.

Run as ``python benchmarks/calibration.py``. The first two tables hold p-values of faults that are planted in exact
posteriors, by quantity, at 200 and at 1,000 simulations: of a normal distribution with two correlated means and one
variance, and of a mixture of two normals by the sum over all allocations. The third holds every engine on every family,
and the normal approximations also on three programs whose posterior is close to normal. Pyro's NUTS takes seconds for a
simulation, and runs where ``--engines nuts`` asks for it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from mixproof.inference.calibration import Calibration, Engine, calibrate
from mixproof.inference.draws import Draws
from mixproof.inference.gibbs import gibbs
from mixproof.inference.hmc import hmc
from mixproof.inference.log_posterior import LogPosterior
from mixproof.inference.nuts import nuts
from mixproof.inference.svi import normal_approximation
from mixproof.models import (
    bernoulli,
    gaussian_diagonal,
    gaussian_full,
    gaussian_isotropic,
    gaussian_spherical,
    gaussian_sum,
    gaussian_tied,
    laplace,
)

NUM_DRAWS = 99
FALSE_ALARM = 0.01


def real(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# Exact posteriors


CORRELATION = real([[1.0, 0.8], [0.8, 1.0]])
STRENGTH, SHAPE, RATE = 0.5, 3.0, 2.0


def correlated_normal(x: Tensor) -> None:
    """Rows of two features with a known correlation; the conjugate prior on means and variance."""
    variance = pyro.sample("variance", dist.InverseGamma(real(SHAPE), real(RATE)))
    spread = variance * CORRELATION
    means = pyro.sample("means", dist.MultivariateNormal(real([0.0, 0.0]), spread / STRENGTH))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Categorical(real([1.0])), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.MultivariateNormal(means, spread), obs=x)


def normal_posterior(
    x: Tensor, seed: int, *, strength: float = STRENGTH, shape: float = SHAPE, rate: float = RATE
) -> Draws:
    """Return independent draws for each of B data sets (B, N, 2)."""
    generator = torch.Generator().manual_seed(seed)
    num_data, size = x.shape[1:]
    total = strength + num_data
    mean = x.mean(1) if num_data else x.new_zeros(len(x), size)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(CORRELATION), (x - mean[:, None]).mT, upper=False)
    between = torch.einsum("bd,de,be->b", mean, torch.linalg.inv(CORRELATION), mean)
    squares = whitened.square().sum((1, 2)) + strength * num_data / total * between
    variances = inverse_gamma(shape + num_data * size / 2, (rate + squares / 2)[:, None], generator)
    noise = torch.randn(len(x), NUM_DRAWS, size, generator=generator, dtype=torch.float64)
    deviations = noise @ torch.linalg.cholesky(CORRELATION).mT * (variances / total).sqrt()[..., None]
    means = (num_data * mean / total)[:, None] + deviations
    return Draws({"variance": variances, "means": means}, {}, {})


def inverse_gamma(shape: float | Tensor, rate: Tensor, generator: torch.Generator) -> Tensor:
    """Return NUM_DRAWS draws along the second axis for rates (B, 1) or one draw for each entry of more."""
    size = (len(rate), NUM_DRAWS, *rate.shape[2:])
    return rate / torch._standard_gamma(torch.as_tensor(shape).to(rate).expand(size).contiguous(), generator)


MIXTURE_PRIOR = gaussian_spherical.Prior(real([2.0, 2.0]), real([0.0]), real(0.2), real(3.0), real(2.0))
MIXTURE = partial(gaussian_spherical.model, num_components=2, prior=MIXTURE_PRIOR)


def mixture_posterior(x: Tensor, seed: int, *, prior: gaussian_spherical.Prior = MIXTURE_PRIOR) -> Draws:
    """Return independent draws for each of B data sets (B, N, D), by the sum over all allocations of rows."""
    generator = torch.Generator().manual_seed(seed)
    num_data, size = x.shape[1:]
    allocations = torch.arange(2**num_data)[:, None] >> torch.arange(num_data) & 1
    resp = torch.nn.functional.one_hot(allocations, 2).double()  # (A, N, K)
    counts = resp.sum(1)  # (A, K)
    sums = torch.einsum("ank,bnd->bakd", resp, x)
    raw = torch.einsum("ank,bn->bak", resp, x.square().sum(-1))
    strength = prior.strength + counts
    locs = (prior.strength * prior.loc + sums) / strength[..., None]
    shape = prior.shape + counts * size / 2
    rate = prior.rate + (raw + prior.strength * prior.loc.square().sum() - strength * locs.square().sum(-1)) / 2
    alpha = prior.concentration + counts
    log_normal = shape.lgamma() - shape * rate.log() - size / 2 * strength.log()
    log_evidence = (alpha.lgamma() + log_normal).sum(-1)  # (B, A), up to a constant
    which = torch.multinomial(log_evidence.softmax(-1), NUM_DRAWS, replacement=True, generator=generator)
    data_set = torch.arange(len(x))[:, None]
    weights = torch._sample_dirichlet(alpha[which], generator)
    variances = inverse_gamma(shape[which], rate[data_set, which], generator)
    noise = torch.randn(len(x), NUM_DRAWS, 2, size, generator=generator, dtype=torch.float64)
    deviations = noise * (variances / strength[which]).sqrt()[..., None]
    found = {"weights": weights, "locs": locs[data_set, which] + deviations, "variances": variances}
    return Draws(found, {}, {})


# Faults


Batched = Callable[..., Draws]


def one_row_dropped(exact: Batched) -> Engine:
    return lambda x, seed: exact(x[:, :-1], seed)


def data_ignored(exact: Batched) -> Engine:
    return lambda x, seed: exact(x[:, :0], seed)


def lost_correlation(exact: Batched) -> Engine:
    """Shuffle the draws of each number by themselves: every marginal stays as it is."""

    def engine(x: Tensor, seed: int) -> Draws:
        generator = torch.Generator().manual_seed(seed + 1)
        shuffled = {}
        for name, value in exact(x, seed).params.items():
            order = torch.rand(value.shape, generator=generator).argsort(1)
            shuffled[name] = value.gather(1, order)
        return Draws(shuffled, {}, {})

    return engine


def variance_off(exact: Batched) -> Engine:
    """Multiply the variances by n / (n - 1)."""

    def engine(x: Tensor, seed: int) -> Draws:
        factor = x.shape[1] / (x.shape[1] - 1)
        params = exact(x, seed).params
        return Draws({name: value * factor if "variance" in name else value for name, value in params.items()}, {}, {})

    return engine


def too_narrow(exact: Batched) -> Engine:
    """Take a tenth off every standard deviation, that of a variance on the scale of its logarithm."""

    def engine(x: Tensor, seed: int) -> Draws:
        found = {}
        for name, value in exact(x, seed).params.items():
            on_line = value.log() if "variance" in name else value
            features = 2 if name == "locs" else 1  # all draws, and all components: they have no names
            centre = on_line.mean(tuple(range(1, 1 + features)) if value.ndim > 2 else 1, keepdim=True)
            narrowed = centre + 0.9 * (on_line - centre)
            found[name] = narrowed.exp() if "variance" in name else narrowed
        return Draws(found, {}, {})

    return engine


VAGUE = MIXTURE_PRIOR._replace(concentration=real([1.0, 1.0]), strength=real(0.002), shape=real(0.03), rate=real(0.02))


def faults(exact: Batched, **vague: Any) -> dict[str, Engine]:
    """Return the exact engine and the faulty ones, by name."""
    return {
        "none": exact,
        "prior ignored": partial(exact, **vague),
        "data ignored": data_ignored(exact),
        "one row dropped": one_row_dropped(exact),
        "lost correlation": lost_correlation(exact),
        "variance times n / (n - 1)": variance_off(exact),
        "sd 10 % too small": too_narrow(exact),
    }


SUBJECTS: dict[str, tuple[Any, Tensor, dict[str, Engine]]] = {
    "normal": (
        correlated_normal,
        torch.zeros(5, 2, dtype=torch.float64),
        faults(normal_posterior, strength=1e-9, shape=-1.0, rate=0.0),
    ),
    "mixture": (MIXTURE, torch.zeros(6, 1, dtype=torch.float64), faults(mixture_posterior, prior=VAGUE)),
}
"""The program, data of its shape, and the engines."""
FAULTS = tuple(SUBJECTS["normal"][2])


def calibrate_fault(subject: str, fault: str, num_simulations: int, seed: int) -> Calibration:
    """Return the calibration of a planted fault, or of the exact posterior under the name ``none``."""
    model, x, engines = SUBJECTS[subject]
    return calibrate(
        model,
        engines[fault],
        x,
        num_simulations=num_simulations,
        seed=seed,
        num_ranks=NUM_DRAWS + 1,
        batch_size=num_simulations,
        false_alarm=FALSE_ALARM,
    )


# Engines


def family_cases() -> dict[str, tuple[Any, Any, Any]]:
    """Return, by name, each family, its K and a prior under which its components are exchangeable and overlap."""
    eye = torch.eye(2, dtype=torch.float64)
    concentration = real([2.0, 2.0])
    normal = {"loc": real([0.0, 0.0]), "strength": real(0.5)}
    full = gaussian_full.Prior(concentration, **normal, df=real(6.0), scale=4 * eye)
    noise = gaussian_full.Params(real([0.3, 0.7]), real([[0.0, 0.0], [1.0, 0.0]]), torch.stack([eye / 2, eye / 4]))
    inverse_gamma_prior = {"shape": real([3.0, 3.0]), "rate": real([2.0, 2.0])}
    scalar = {"shape": real(3.0), "rate": real(2.0)}
    beta = {"ones": real([1.5, 1.5]), "zeros": real([1.5, 1.5])}
    isotropic, uniform_weights = gaussian_isotropic.GaussianIsotropic(0.7), bernoulli.UniformWeights()
    return {
        "gaussian_full": (gaussian_full, 2, full),
        "gaussian_diagonal": (
            gaussian_diagonal,
            2,
            gaussian_diagonal.Prior(concentration, **normal, **inverse_gamma_prior),
        ),
        "gaussian_spherical": (gaussian_spherical, 2, gaussian_spherical.Prior(concentration, **normal, **scalar)),
        "gaussian_tied": (gaussian_tied, 2, gaussian_tied.Prior(concentration, **normal, df=real(6.0), scale=4 * eye)),
        "gaussian_isotropic": (isotropic, 2, isotropic.Prior(concentration, **normal)),
        "bernoulli": (bernoulli, 2, bernoulli.Prior(concentration, **beta)),
        "uniform_weights": (uniform_weights, 2, uniform_weights.Prior(**beta)),
        "laplace": (laplace, 2, laplace.Prior(concentration, **normal, **inverse_gamma_prior)),
        "gaussian_sum": (gaussian_sum, (2, 2), gaussian_sum.Prior(full, full)),
        "known_noise": (gaussian_sum.KnownNoise(noise), 2, full),
    }


def gibbs_engine(family: Any, num_components: Any, prior: Any, **sizes: int) -> Engine:
    settings: Any = {"num_components": num_components, "num_chains": 8, "num_warmup": 30, "num_draws": 100} | sizes
    return lambda x, seed: gibbs(family, x, prior, generator=torch.Generator().manual_seed(seed), **settings)


def hmc_engine(model: Callable[..., Any], **sizes: int) -> Engine:
    settings: Any = {"num_warmup": 200, "num_draws": 200} | sizes
    return lambda x, seed: hmc(model, x, batched=True, num_chains=len(x), seed=seed, **settings)


def nuts_engine(model: Callable[..., Any], **sizes: int) -> Engine:
    settings: Any = {"num_warmup": 40, "num_draws": 120} | sizes

    def engine(x: Tensor, seed: int) -> Draws:
        posterior = LogPosterior(model, x, batched=True)
        init = posterior.constrain(posterior.draw_prior(len(x), seed=seed))
        return nuts(model, x, batched=True, num_chains=len(x), init=init, seed=seed, jit_compile=True, **settings)

    return engine


def guide_engine(name: str, model: Callable[..., Any], *, num_steps: int = 300) -> Engine:
    def engine(x: Tensor, seed: int) -> Draws:
        law = normal_approximation(model, name, x, batched=True, num_steps=num_steps, seed=seed)
        return law.draws(NUM_DRAWS, seed=seed + 1)

    return engine


GUIDES = ("AutoNormal", "AutoMultivariateNormal", "AutoLaplace")
BATCH_SIZES = {"gibbs": None, "hmc": 1000, "nuts": 50} | dict.fromkeys(GUIDES, 250)
"""By engine: how many data sets it takes at once; None where it takes one."""
MORE_DRAWS = {"gaussian_sum": {"num_draws": 400}}
"""Of gibbs, where 100 of each chain are worth fewer than 20 independent ones in too many data sets."""
CORRELATED = torch.linalg.cholesky(CORRELATION)


def separated(x: Tensor, scale: float | Tensor = 1.0, root: Tensor = CORRELATED) -> None:
    """Two groups eight standard deviations apart, named by their prior: the posterior of 60 rows is close to normal."""
    weights = pyro.sample("weights", dist.Dirichlet(real([5.0, 5.0])))
    locs = pyro.sample("locs", dist.Normal(real([[-4.0, -4.0], [4.0, 4.0]]), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.MultivariateNormal(locs[z], scale_tril=scale * root), obs=x)


def separated_uncorrelated(x: Tensor) -> None:
    """The same with features that are independent given the group: so are the locations given the rows."""
    separated(x, root=torch.eye(2, dtype=torch.float64))


def separated_scaled(x: Tensor) -> None:
    """The same with a scale to be found, which the mode of all parameters together puts lower than their law does."""
    separated(x, pyro.sample("scale", dist.LogNormal(real(0.0), real(0.2))))


CLOSE_TO_NORMAL = {
    "separated": separated,
    "separated_uncorrelated": separated_uncorrelated,
    "separated_scaled": separated_scaled,
}


def calibrate_engine(
    engine: str,
    name: str,
    num_simulations: int,
    seed: int,
    *,
    false_alarm: float = FALSE_ALARM,
    checkpoint: Path | None = None,
    **sizes: int,
) -> Calibration:
    """Return the calibration of an engine on a family, by eight rows whose posterior is far from normal, or a program.

    The programs of ``CLOSE_TO_NORMAL`` have 60 rows; they have no Gibbs sampler. The sizes are settings of the engine.
    """
    if name in CLOSE_TO_NORMAL:
        model, num_data, case = CLOSE_TO_NORMAL[name], 60, None
    else:
        case = family_cases()[name]
        family, num_components, prior = case
        model, num_data = partial(family.model, num_components=num_components, prior=prior), 8
    if engine == "gibbs":
        if case is None:
            raise ValueError(f"{name} is a program and no family: it has no Gibbs sampler")
        run = gibbs_engine(*case, **MORE_DRAWS.get(name, {}) | sizes)
    elif engine in GUIDES:
        run = guide_engine(engine, model, **sizes)
    else:
        run = {"hmc": hmc_engine, "nuts": nuts_engine}[engine](model, **sizes)
    return calibrate(
        model,
        run,
        torch.zeros(num_data, 2, dtype=torch.float64),
        num_simulations=num_simulations,
        seed=seed,
        batch_size=BATCH_SIZES[engine],
        false_alarm=false_alarm,
        checkpoint=checkpoint,
        checkpoint_every=20 if BATCH_SIZES[engine] is None else 1,
    )


def print_faults(seed: int) -> dict[str, Any]:
    """Print, for each fault, the quantities that see it and the smallest p-value, and return all p-values."""
    found: dict[str, Any] = {}
    for subject in SUBJECTS:
        for num_simulations in (200, 1000):
            print(f"\n{subject}, {num_simulations} simulations")
            for fault in FAULTS:
                result = calibrate_fault(subject, fault, num_simulations, seed)
                seen = [check.name for check in result.report.checks if not check.passed]
                print(f"{fault:<28}{result.p_value:>10.2g}  {', '.join(seen) or 'nothing'}", flush=True)
                found[f"{subject}, {num_simulations}, {fault}"] = result.p_values
    return found


def main() -> None:
    """Print the tables; write all p-values as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cheap = [engine for engine in BATCH_SIZES if engine != "nuts"]  # which takes a second or two a simulation
    names = [*family_cases(), *CLOSE_TO_NORMAL]
    parser.add_argument("--engines", nargs="*", default=cheap, choices=list(BATCH_SIZES))
    parser.add_argument("--families", nargs="*", default=names, choices=names)
    parser.add_argument("--num-simulations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--no-faults", action="store_true")
    parser.add_argument("--checkpoints", type=Path, help="a folder, from which an interrupted run goes on")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.checkpoints:
        options.checkpoints.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {} if options.no_faults else print_faults(options.seed)
    print(f"\n{'engine':<24}{'family':<20}{'verdict':<10}{'p-value':>10}{'ranks':>7}{'CPU s':>8}  refuting quantities")
    for engine in options.engines:
        for name in options.families:
            if engine == "gibbs" and name in CLOSE_TO_NORMAL:
                continue
            start = time.process_time()
            checkpoint = options.checkpoints and options.checkpoints / f"{engine}_{name}"
            result = calibrate_engine(engine, name, options.num_simulations, options.seed, checkpoint=checkpoint)
            seen = [check.name for check in result.report.checks if not check.passed]
            line = f"{engine:<24}{name:<20}{result.report.verdict:<10}{result.p_value:>10.2g}{result.num_ranks:>7}"
            print(f"{line}{time.process_time() - start:>8.0f}  {', '.join(seen)}", flush=True)
            found[f"{engine}, {name}"] = result.p_values | {"num_ranks": result.num_ranks}
            if options.json:
                options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
