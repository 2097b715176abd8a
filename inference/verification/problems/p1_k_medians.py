"""Problem 1: Lloyd's algorithm for K-medians."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mixproof.inference.verification.claim import Claim, Problem, all_of, both
from mixproof.inference.verification.domain import one_hot, reals
from mixproof.inference.verification.gradient import verify_gradient
from mixproof.inference.verification.identity import verify_identity
from mixproof.inference.verification.limit import verify_limit
from mixproof.inference.verification.maximiser import verify_maximiser
from mixproof.inference.verification.report import Report

PROBLEM = Problem(
    "P1",
    "K-medians",
    r"Consider a modified version of the K-means objective, where we use $L_1$ distance instead, "
    r"$\mathcal{J}(\mathbf{X}, \mathbf{Z}, \boldsymbol{\mu}) = \sum_{i=1}^N \sum_{k=1}^K z_{ik} "
    r"\|\mathbf{x}_i - \boldsymbol{\mu}_k\|_1$. Derive Lloyd's algorithm for this model.",
)

ROWS, CENTRES = reals(9, 2), reals(3, 2)
POINTS = torch.tensor([[-1.0], [2.0], [4.0], [5.0], [7.0]], dtype=torch.float64)


def objective(x: Tensor, z: Tensor, centres: Tensor) -> Tensor:
    return (z * distances(x, centres)).sum()


def distances(x: Tensor, centres: Tensor) -> Tensor:
    return (x[:, None] - centres).abs().sum(-1)


def printed_assignment(x: Tensor, centres: Tensor) -> Tensor:
    """Every k that attains the minimum gets a one, which is what the rule says."""
    table = distances(x, centres)
    return (table == table.min(-1, keepdim=True).values).to(x.dtype)


def single_objective(x: Tensor, members: Tensor, centre: Tensor) -> Tensor:
    return (members * (x - centre).abs().sum(-1)).sum()


def with_first_centre(centres: Tensor, centre: Tensor) -> Tensor:
    return torch.cat([centre[None], centres[1:]])


def count_difference(x: Tensor, members: Tensor, centre: Tensor) -> Tensor:
    return (members[:, None] * ((centre > x).to(x.dtype) - (centre < x).to(x.dtype))).sum(0)


def slope_from_the_right(function: Callable[[Tensor], Tensor], at: Tensor) -> Callable[[float], Tensor]:
    return lambda eps: (function(at + eps) - function(at)) / eps


def halves(x: Tensor) -> Tensor:
    """The numbers of points to the left and to the right of the median."""
    median = x.quantile(0.5)
    return torch.stack([(x < median).sum(), (x > median).sum()]).to(x.dtype)


def medians(x: Tensor, labels: Tensor, num_centres: int) -> Tensor:
    members = [x[labels == k] for k in range(num_centres)]
    return torch.stack([part.quantile(0.5, dim=0) if len(part) else part.sum(0) * torch.nan for part in members])


def verify_medians(sizes: tuple[int, ...], *, seed: int) -> Report:
    """Check that coordinate-wise medians of clusters of the given sizes, with duplicates in one, minimise the objective."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    x = torch.randn(len(labels), 2, generator=generator, dtype=torch.float64)
    x[1] = x[0]
    z = torch.nn.functional.one_hot(labels, len(sizes)).to(x.dtype)
    return verify_maximiser(medians(x, labels, len(sizes)), lambda centres: -objective(x, z, centres), seed=seed)


NOT_AT_A_POINT = r"$\mu_{kd}$ differs from every $x_{id}$ of the cluster"
KINK = torch.tensor(2.0, dtype=torch.float64)
ASSIGNMENT = partial(
    verify_identity,
    lambda x, m: objective(x, printed_assignment(x, m), m),
    lambda x, m: distances(x, m).min(-1).values.sum(),
)
COUNT_SLOPE = partial(
    verify_gradient,
    lambda m, x, z: count_difference(x, z[:, 0], m),
    lambda m, x, z: single_objective(x, z[:, 0], m),
    reals(2),
    ROWS,
    one_hot(9, 3),
)

CLAIMS = [
    *both(
        Claim(
            "P1.1",
            r"The objective adds up the $L_1$ distance of each point to the centre it is assigned to.",
            r"\mathcal{J}(\mathbf{X}, \mathbf{Z}, \boldsymbol{\mu}) = \sum_{i=1}^N \sum_{k=1}^K z_{ik} \|\mathbf{x}_i - "
            r"\boldsymbol{\mu}_k\|_1",
            "holds",
            partial(verify_identity, objective, lambda x, z, m: (x - z @ m).abs().sum(), ROWS, one_hot(9, 3), CENTRES),
        )
    ),
    *both(
        Claim(
            "P1.2",
            "Each point goes to its nearest centre.",
            r"z_{ik}^{\text{new}} = \begin{cases} 1 & \text{if } k = \arg\min_j \|\mathbf{x}_i - \boldsymbol{\mu}_j\|_1 \\ "
            r"0 & \text{else} \end{cases}",
            "holds if",
            partial(ASSIGNMENT, ROWS, CENTRES),
            condition="the nearest centre is unique, or a tie is broken for one of the nearest",
            without=partial(
                ASSIGNMENT,
                torch.zeros(1, 1, dtype=torch.float64),
                torch.tensor([[-1.0], [1.0], [3.0]], dtype=torch.float64),
            ),
            note="With a tie the rule, read to the letter, assigns the point twice and counts its distance twice.",
        )
    ),
    *both(
        Claim(
            "P1.3",
            r"A centre can be updated by itself: the rest of the objective does not depend on it.",
            r"\boldsymbol{\mu}_k^{\text{new}} = \arg\min_{\boldsymbol{\mu}_k} \sum_{i=1}^N z_{ik} \|\mathbf{x}_i - "
            r"\boldsymbol{\mu}_k\|_1",
            "holds",
            partial(
                verify_identity,
                lambda x, z, m, u, v: single_objective(x, z[:, 0], u) - single_objective(x, z[:, 0], v),
                lambda x, z, m, u, v: (
                    objective(x, z, with_first_centre(m, u)) - objective(x, z, with_first_centre(m, v))
                ),
                ROWS,
                one_hot(9, 3),
                CENTRES,
                reals(2),
                reals(2),
            ),
        )
    ),
    *both(
        Claim(
            "P1.4",
            "The distance is a sum over the coordinates.",
            r"\mathcal{J}(\mathbf{X}, \mathbf{Z}, \boldsymbol{\mu}_k) = \sum_{i=1}^N z_{ik} \|\mathbf{x}_i - "
            r"\boldsymbol{\mu}_k\|_1 = \sum_{i=1}^N z_{ik} \sum_{d=1}^D |x_{id} - \mu_{kd}|",
            "holds",
            partial(
                verify_identity,
                lambda x, z, m: single_objective(x, z[:, 0], m),
                lambda x, z, m: (z[:, 0] * torch.linalg.vector_norm(x - m, ord=1, dim=-1)).sum(),
                ROWS,
                one_hot(9, 3),
                reals(2),
            ),
        )
    ),
    *both(
        Claim(
            "P1.5",
            "The derivative of one term is the sign of the difference.",
            r"\frac{\partial}{\partial \mu_{kd}} |x_{id} - \mu_{kd}| = \begin{cases} 1 & \text{if } \mu_{kd} > x_{id} \\ -1 & "
            r"\text{if } \mu_{kd} < x_{id} \\ 0 & \text{if } \mu_{kd} = x_{id} \end{cases}",
            "holds if",
            partial(
                verify_gradient,
                lambda m, x: (m > x).to(x.dtype) - (m < x).to(x.dtype),
                lambda m, x: (x - m).abs(),
                reals(),
                reals(),
            ),
            condition=r"$\mu_{kd} \neq x_{id}$",
            without=partial(verify_limit, slope_from_the_right(lambda m: (KINK - m).abs(), KINK), 0.0),
            note="At the kink the slope is 1 to the right and -1 to the left; 0 is a subgradient, as the sheet's note says.",
        )
    ),
    Claim(
        "P1.6a",
        "The derivative of the objective counts the members to the left and to the right.",
        r"\frac{\partial}{\partial \mu_{kd}} \mathcal{J}(\mathbf{X}, \mathbf{Z}, \boldsymbol{\mu}) = \sum_{i=1}^N z_{ik} |x_{id} "
        r"- \mu_{kd}| = \sum_{i=1}^N z_{ik} \mathbb{I}[\mu_{kd} > x_{id}] - \sum_{i=1}^N z_{ik} \mathbb{I}[\mu_{kd} < x_{id}]",
        "refuted as printed",
        partial(
            verify_gradient,
            lambda m, x, z: (z[:, :1] * (x - m).abs()).sum(0),
            lambda m, x, z: single_objective(x, z[:, 0], m),
            reals(2),
            ROWS,
            one_hot(9, 3),
        ),
        correction=r"\frac{\partial}{\partial \mu_{kd}} \mathcal{J}(\mathbf{X}, \mathbf{Z}, \boldsymbol{\mu}) = \sum_{i=1}^N "
        r"z_{ik} \frac{\partial}{\partial \mu_{kd}} |x_{id} - \mu_{kd}| = \sum_{i=1}^N z_{ik} \mathbb{I}[\mu_{kd} > x_{id}] - "
        r"\sum_{i=1}^N z_{ik} \mathbb{I}[\mu_{kd} < x_{id}]",
        corrected=COUNT_SLOPE,
        note="The derivative sign is missing behind the sum in the middle; harmless to the end result. Like P1.6b the correction "
        rf"holds if {NOT_AT_A_POINT}.",
    ),
    Claim(
        "P1.6b",
        "The derivative of the objective counts the members to the left and to the right.",
        r"\frac{\partial}{\partial \mu_{kd}} \sum_{i=1}^N z_{ik} |x_{id} - \mu_{kd}| = \sum_{i=1}^N z_{ik} \mathbb{I}[\mu_{kd} > "
        r"x_{id}] - \sum_{i=1}^N z_{ik} \mathbb{I}[\mu_{kd} < x_{id}]",
        "holds if",
        COUNT_SLOPE,
        condition=NOT_AT_A_POINT,
        without=partial(
            verify_limit,
            slope_from_the_right(lambda m: (POINTS - m).abs().sum(), POINTS[1, 0]),
            count_difference(POINTS, torch.ones(5, dtype=torch.float64), POINTS[1]).item(),
        ),
    ),
    *both(
        Claim(
            "P1.7",
            "At the root, half of the members are to the left and half to the right.",
            r"\sum_{i=1}^N z_{ik} \mathbb{I}[\mu_{kd} > x_{id}] = \sum_{i=1}^N z_{ik} \mathbb{I}[\mu_{kd} < x_{id}] = "
            r"\frac{N_k}{2}",
            "holds if",
            partial(verify_identity, halves, lambda x: torch.full((2,), 4.0, dtype=torch.float64), reals(8)),
            condition=r"$N_k$ is even and the two middle values differ",
            without=partial(verify_identity, halves, lambda x: torch.full((2,), 3.5, dtype=torch.float64), reals(7)),
            note="For odd $N_k$ the median is a point itself, with $(N_k - 1)/2$ on either side. The sheet says this in words.",
        )
    ),
    *both(
        Claim(
            "P1.8",
            "The best centre is the median in each coordinate.",
            r"\mu_{kd} = \text{median} \{x_{id} \text{ such that } z_{ik} = 1\}",
            "holds if",
            all_of(partial(verify_medians, (5, 4, 1)), partial(verify_medians, (6, 7, 3))),
            condition="the cluster is not empty",
            without=partial(verify_medians, (5, 4, 0)),
            note="For even $N_k$ every point between the two middle values is as good. An empty cluster has no median.",
        )
    ),
]
