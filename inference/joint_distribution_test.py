"""Geweke's joint distribution test of a Markov chain's transition (Geweke 2004, JASA 99(467), section 3).

There are two ways to draw parameters and data together: parameters from the prior and data given them, or, by turns,
parameters by the transition given the data and data given the parameters. If the transition leaves the posterior as it
is, both have one law, after every half of every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from mixproof.inference.quantities import Quantities, Quantity, Simulation, simulate
from mixproof.inference.steps import take_steps
from mixproof.inference.validation import check_integer, check_probability
from mixproof.inference.verification.report import Check, Report, conclude

Transition = Callable[[dict[str, Tensor], Tensor, torch.Generator], Mapping[str, Tensor]]
"""Parameters (C, *shape) by site after one step of C chains, given those before, data (C, N, D) and a generator."""

MOMENTS = {
    "location": (lambda share: share, 1 / 12),
    "spread": (lambda share: (share - 0.5).square(), 1 / 180),
}
"""What is averaged of a uniform variable, and its variance."""


def joint_distribution_test(
    model: Callable[..., Any],
    transition: Transition,
    x: Tensor,
    *,
    num_chains: int,
    num_steps: int,
    num_reference: int = 2000,
    seed: int,
    quantities: Mapping[str, Quantity] | None = None,
    false_alarm: float = 0.01,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 20,
    progress: bool = False,
) -> Report:
    """Try to refute that a transition leaves the posterior of a program as it is, whatever the data.

    The chains are independent, and each starts from a draw of the joint law, so that a right transition needs no
    warm-up, and the averages over each chain give the Monte Carlo error without an estimate of autocorrelation. A
    quantity enters by its share of reference draws below it: the test needs no moments, and feels location and spread.

    Args:
        model: a Pyro program with enumerated latents; ``model(x)`` observes the data, and all its priors are proper.
        transition: one step of C chains, each with data of its own.
        x: (N, D), of which only shape and type count.
        num_chains: C, at least 20, so that their averages are close to normal.
        num_steps: how many steps each chain makes, at least 1. A wrong transition drifts further with more.
        num_reference: draws from prior and program, which the chains are compared with.
        seed: of all draws.
        quantities: further ones by name, each a function of the parameters by site and the data x (N, D).
        false_alarm: the probability, about, that a right transition is refuted, shared by all checks alike.
        checkpoint: a file for the state of the chains. If it exists, the test goes on from there to the same report,
            with a reference drawn anew. Another transition is told by what a step of it gives.
        checkpoint_every: after how many steps to write it, at least 1; the first one writes it too.
        progress: whether to show the steps on stderr.

    Returns:
        A report of two checks for each quantity of ``Quantities``: the mean share and its spread, with their p-values.

    Raises:
        TypeError: a number of chains, steps or draws is not an integer.
        ValueError: a prior is improper, there are too few chains or steps, ``false_alarm`` is no probability, the
            program is not as above, the transition returns numbers that are not finite, or the checkpoint belongs to
            another run.
        OSError: the checkpoint cannot be read or written, which is tried after the first step.
    """
    check_integer(num_chains, "num_chains", 20)
    check_integer(num_steps, "num_steps", 1)
    check_integer(num_reference, "num_reference", 1)
    check_integer(checkpoint_every, "checkpoint_every", 1)
    check_probability(false_alarm, "false_alarm")
    generator = torch.Generator().manual_seed(seed)
    compared = Quantities(model, x, seed=seed, further=quantities)

    def draw(params: Mapping[str, Tensor] | None = None) -> Simulation:
        return simulate(model, x, seed=int(torch.randint(2**31, (), generator=generator)), params=params)

    reference = _values(compared, [draw() for _ in range(num_reference)])
    chains = _Chains(draw, transition, compared, num_chains, generator)
    identity = {
        "engine": "joint distribution test",
        "x": [*x.shape, str(x.dtype)],
        "num_chains": num_chains,
        "num_steps": num_steps,
        "num_reference": num_reference,
        "seed": seed,
        "quantities": list(reference),
    }
    visited = take_steps(
        chains,
        num_steps,
        file=None if checkpoint is None else Path(checkpoint),
        identity=identity,
        every=checkpoint_every,
        progress="steps" if progress else None,
    )
    checks = []
    for (name, known), values in zip(reference.items(), visited.unbind(-1), strict=True):
        shares = _shares(known, values.mT)
        own = _shares(known, known)
        for kind, (function, variance) in MOMENTS.items():
            by_chain = function(shares).mean(1)
            level = false_alarm / (len(reference) * len(MOMENTS))
            checks.append(_compare(f"{name}, {kind}", by_chain, function(own), variance, level))
    subject = f"{num_chains} chains of {num_steps} steps, each followed by new data, against {num_reference} draws"
    return conclude(subject, checks, seed)


class _Chains:
    """The chains' parameters and data, which a step replaces one after the other."""

    def __init__(
        self,
        draw: Callable[..., Simulation],
        transition: Transition,
        quantities: Quantities,
        num_chains: int,
        generator: torch.Generator,
    ):
        self._draw, self._transition, self._quantities, self._generator = draw, transition, quantities, generator
        self._set([draw() for _ in range(num_chains)])

    def _set(self, states: list[Simulation]) -> None:
        self._params = {name: torch.stack([state.params[name] for state in states]) for name in states[0].params}
        self._x = torch.stack([state.x for state in states])

    def step(self, _: int) -> Tensor:
        """Draw parameters and then data, and return the quantities (C, Q) in between."""
        after = self._transition(self._params, self._x, self._generator)
        for name in self._params:
            if not torch.isfinite(after[name]).all():
                raise ValueError(f"the transition returned values of {name} that are not finite")
        # with the data that it was made for: beside new data, a draw that ignores the data would look right
        found = self._quantities({name: after[name][:, None] for name in self._params}, self._x)
        self._set([self._draw({name: after[name][chain] for name in self._params}) for chain in range(len(self._x))])
        return torch.stack([value[:, 0] for value in found.values()], -1)

    def state(self) -> dict[str, Tensor]:
        params = {f"params.{name}": value for name, value in self._params.items()}
        return params | {"x": self._x, "generator": self._generator.get_state()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._params = {name: state[f"params.{name}"].to(value) for name, value in self._params.items()}
        self._x = state["x"].to(self._x)
        self._generator.set_state(state["generator"])


def _values(quantities: Quantities, states: list[Simulation]) -> dict[str, Tensor]:
    """Return the quantities (B,) by name in B states."""
    params = {name: torch.stack([state.params[name] for state in states])[:, None] for name in states[0].params}
    return {name: value[:, 0] for name, value in quantities(params, torch.stack([one.x for one in states])).items()}


def _shares(reference: Tensor, values: Tensor) -> Tensor:
    """Return the share of reference draws (M,) below each value, those equal to it by half."""
    ordered = reference.sort().values
    below = torch.searchsorted(ordered, values.contiguous())
    up_to = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + up_to).double() / (2 * len(reference))


def _compare(name: str, by_chain: Tensor, own: Tensor, variance: float, level: float) -> Check:
    """Test that the averages over chains (C,) have the mean of the reference draws (M,), whose variance is known.

    A share of reference draws varies with the chains' draws and with the reference: to first order, each sample adds
    the variance of the same function of a uniform variable.
    """
    parts = (float(by_chain.var()) / len(by_chain), variance / len(own))
    error = sum(parts) ** 0.5
    freedom = (len(by_chain) - 1) * (sum(parts) / parts[0]) ** 2 if parts[0] else float("inf")
    gap = float(by_chain.mean() - own.mean())
    p_value = float(2 * stats.t.sf(abs(gap) / error, freedom))
    found = {"by steps": float(by_chain.mean()), "by prior and program": float(own.mean())}
    tolerance = float(stats.t.isf(level / 2, freedom)) * error
    return Check(name, p_value > level, abs(gap), tolerance, p_value, None if p_value > level else found)
