r"""Online EM for streams: each chunk of rows is seen once, and its statistics enter a running average.

.. math::
    s_t = s_{t-1} + \gamma_t \left(\bar s(x_t; \theta_{t-1}) - s_{t-1}\right), \qquad
    \theta_t = \bar\theta(s_t), \qquad \gamma_t = (t_0 + t)^{-\kappa}

Cappé and Moulines 2009, On-line expectation-maximization algorithm for latent data models, Journal of the Royal
Statistical Society B 71(3), section 2; a chunk stands for their single observation (Liang and Klein 2009, Online EM for
unsupervised models, section 3). The statistics of Gaussian families are about the current locations, so that the family
says by ``recentre`` what the running average is about the next ones.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixproof.inference.dataset import stream
from mixproof.inference.em import has_spread, raise_for_collapse, raise_for_impossible, raise_for_lost_component
from mixproof.inference.expectation import expectation
from mixproof.inference.trees import tree_map, tree_to
from mixproof.inference.validation import check_integer, check_params, check_prior


class OnlineFit(NamedTuple):
    """What online EM found in one pass over a stream."""

    params: Any
    """The family's ``Params`` after the last chunk."""
    averaged: Any
    """The mean of the ``Params`` after the chunks from ``average_from`` on; None if there are none."""
    log_lik: Tensor
    """(num_chunks,), the mean over a chunk's rows of log p(x_n | the params before that chunk was seen)."""
    num_rows: int
    """The number of rows seen."""


def online_em(
    family: Any,
    chunks: Any,
    init: Any,
    *,
    prior: Any = None,
    step_size: float = 0.6,
    delay: float = 0.0,
    warm_up: int = 0,
    average_from: int | None = None,
    device: torch.device | str | None = None,
) -> OnlineFit:
    """Return the parameters that one pass of online EM over a stream leads to.

    The step for chunk t, from 1 on, is (delay + t)^-step_size, and 1 for the first, whose statistics start the running
    average; chunks should be of one size, since each counts as one whatever its size.

    Args:
        family: a family of the contract that has ``recentre``, as all shipped ones but ``laplace`` do.
        chunks: matrices (n, D) in any iterable, a generator too; or a memory map, an Arrow table or dataset.
        init: the family's ``Params`` to start from.
        prior: the family's ``Prior``, which counts against all rows seen so far; None for none.
        step_size: the exponent kappa, above 1/2 and at most 1. Small ones forget the start sooner and are noisier;
            below 1, the average from ``average_from`` on is as efficient in the limit as the maximum of the likelihood.
        delay: t_0, at least 0: larger ones make the first steps smaller.
        warm_up: how many rows to see before the parameters first change; below a few dozen rows a component, an
            M-step can leave a component without rows or without spread. A stream of so many rows in equal chunks, with
            step_size 1, makes one step of batch EM.
        average_from: the number of the chunk, from 1 on, with which to begin averaging the parameters (Polyak and
            Juditsky 1992); past the transient, say half the stream. None averages nothing.
        device: where to compute; None computes where the chunks lie.

    Returns:
        An ``OnlineFit``; a stream that ends before ``average_from`` is a warning and ``averaged`` None.

    Raises:
        TypeError, ValueError: a chunk, the start, the prior or a setting is not what it must be, or a component has
            lost its last row or collapsed: the message names it.
    """
    if not 0.5 < step_size <= 1:
        raise ValueError(f"step_size must be above 1/2 and at most 1, and is {step_size}")
    if not (delay >= 0 and math.isfinite(delay)):
        raise ValueError(f"delay must be finite and not negative, and is {delay}")
    check_integer(warm_up, "warm_up", 0)
    if average_from is not None:
        check_integer(average_from, "average_from", 1)
    if not hasattr(family, "recentre"):
        raise ValueError("this family has no recentre, which moves its statistics to other parameters: use em")
    params = stats = averaged = None
    log_lik: list[float] = []
    num_rows = 0
    for t, block in enumerate(stream(family, chunks, device=device), 1):
        if params is None:
            params = tree_to(check_params(family, init, block.x.shape[1]), block.x)
            prior = check_prior(family, prior, params)
        total, found = expectation(family, params, block.x)
        if not torch.isfinite(total):
            raise_for_impossible(family.log_joint(params, block.x), block, f"at chunk {t}")
            raise ArithmeticError(f"the log likelihood overflows at chunk {t}: rescale x")
        num_rows += len(block.x)
        log_lik.append(total.item() / len(block.x))
        mean = tree_map(partial(torch.div, other=len(block.x)), found)
        stats = mean if stats is None else tree_map(partial(torch.lerp, weight=(delay + t) ** -step_size), stats, mean)
        if num_rows >= warm_up:
            image = family.m_step(tree_map(partial(torch.mul, other=num_rows), stats), prior)
            image = family.Params(*(value.to(block.x) for value in image))
            raise_for_lost_component(image, f"at chunk {t}")
            stats, params = family.recentre(stats, params, image), image
        if average_from is not None and t >= average_from:
            share = 1 / (t - average_from + 1)
            before = params if averaged is None else averaged
            averaged = tree_map(partial(torch.lerp, weight=share), before, params)
    if params is None:
        raise ValueError("chunks have no rows: there must be at least one")
    if num_rows < warm_up:
        raise ValueError(f"the stream ended after {num_rows} rows, before the {warm_up} of warm_up")
    raise_for_impossible(family.log_joint(params, block.x), block, "after the last chunk")
    if has_spread(family, block.x.shape[1]):
        raise_for_collapse(family, params, block, "after the last chunk", lost=True)
    if average_from is not None and averaged is None:
        warnings.warn(
            f"the stream ended after {t} chunks, before average_from = {average_from}: begin sooner; averaged is None",
            RuntimeWarning,
            stacklevel=2,
        )
    return OnlineFit(params, averaged, torch.tensor(log_lik, dtype=torch.float64), num_rows)
