"""A sum of two mixtures in the plane: x_n | i, j ~ Normal(locs_a_i + locs_b_j, scales), with two enumerated sites.

A constant may move from locs_a to locs_b without any change: the M-step is a least-squares problem of deficient rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from mixproof.inference.verification.fault_bank.entry import Entry, replace_site
from mixproof.inference.verification.subject import Subject

Params = dict[str, Tensor]

X = torch.tensor(
    [
        [-1.32, 3.41], [-0.57, 2.18], [-2.11, 4.07], [-1.04, 2.92], [0.21, 3.63], [2.43, -0.66], [3.17, 0.94],
        [2.08, 0.31], [3.94, -1.45], [1.36, 0.12], [4.71, 5.22], [6.29, 6.83], [5.58, 4.36], [7.02, 5.91],
        [1.47, 6.74], [5.83, 1.38], [8.16, 8.45], [4.39, 3.07],
    ],
    dtype=torch.float64,
)  # fmt: skip
PARAMS = {
    "weights_a": torch.tensor([0.6, 0.4], dtype=torch.float64),
    "weights_b": torch.tensor([0.45, 0.35, 0.2], dtype=torch.float64),
    "locs_a": torch.tensor([[-0.4, 0.3], [2.1, 2.6]], dtype=torch.float64),
    "locs_b": torch.tensor([[-0.9, 2.7], [2.9, -0.4], [5.1, 4.2]], dtype=torch.float64),
    "scales": torch.tensor([1.1, 0.9], dtype=torch.float64),
}


def model(x: Tensor) -> None:
    """Draw each row of x (N, D) as a sum of two parts and noise; sizes follow from the parameters."""
    weights_a = pyro.param("weights_a", PARAMS["weights_a"], constraint=constraints.simplex)
    weights_b = pyro.param("weights_b", PARAMS["weights_b"], constraint=constraints.simplex)
    locs_a, locs_b = pyro.param("locs_a", PARAMS["locs_a"]), pyro.param("locs_b", PARAMS["locs_b"])
    scales = pyro.param("scales", PARAMS["scales"], constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        i = pyro.sample("i", dist.Categorical(weights_a), infer={"enumerate": "parallel"})
        j = pyro.sample("j", dist.Categorical(weights_b), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(locs_a[i] + locs_b[j], scales).to_event(1), obs=x)


def log_densities(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n | i, j), (N, I, J)."""
    residuals = (x[:, None, None] - params["locs_a"][:, None] - params["locs_b"]) / params["scales"]
    constant = params["scales"].log().sum() + x.shape[1] * math.log(2 * math.pi) / 2
    return -residuals.square().sum(3) / 2 - constant


def log_joint(params: Params, x: Tensor) -> Tensor:
    """Return log p(x_n, i, j), (N, I, J)."""
    return log_densities(params, x) + params["weights_a"].log()[:, None] + params["weights_b"].log()


def normalise(table: Tensor) -> Tensor:
    """Return the responsibilities of a table of log joint densities (N, I, J)."""
    return table.flatten(1).softmax(1).reshape(table.shape)


def e_step(params: Params, x: Tensor) -> Tensor:
    """Return p(i, j | x_n), (N, I, J)."""
    return normalise(log_joint(params, x))


def log_likelihood(params: Params, x: Tensor) -> Tensor:
    """Return log p(x), summed over the rows."""
    return log_joint(params, x).logsumexp((1, 2)).sum()


def noise(locs_a: Tensor, locs_b: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return the standard deviations of the residuals, (D,)."""
    residuals = x[:, None, None] - locs_a[:, None] - locs_b
    return (torch.einsum("nij,nijd->d", resp, residuals**2) / len(x)).sqrt()


def finish(locs_a: Tensor, locs_b: Tensor, resp: Tensor, x: Tensor) -> Params:
    """Return the parameters with given locs: the shares of either part, and the residuals' standard deviations."""
    scales = noise(locs_a, locs_b, resp, x)
    weights_a, weights_b = resp.sum((0, 2)) / len(x), resp.sum((0, 1)) / len(x)
    return {"weights_a": weights_a, "weights_b": weights_b, "locs_a": locs_a, "locs_b": locs_b, "scales": scales}


def m_step(resp: Tensor, x: Tensor) -> Params:
    """Return the least-squares fit of a table with two factors, by its normal equations."""
    counts = resp.sum(0)
    normal = torch.cat(
        [
            torch.cat([counts.sum(1).diag(), counts], 1),
            torch.cat([counts.T, counts.sum(0).diag()], 1),
        ]
    )
    sums = torch.cat([resp.sum(2).T @ x, resp.sum(1).T @ x])
    locs = torch.linalg.pinv(normal, rtol=1e-12, hermitian=True) @ sums
    return finish(locs[: len(counts)], locs[len(counts) :], resp, x)


def m_step_by_regression(resp: Tensor, x: Tensor) -> Params:
    """Return the same by weighted regression on indicators, the first of the second factor left out."""
    n, num_a, num_b = resp.shape
    a = torch.arange(num_a).repeat_interleave(num_b).repeat(n)
    b = torch.arange(num_b).repeat(n * num_a)
    one_hot = torch.nn.functional.one_hot
    design = torch.cat([one_hot(a, num_a), one_hot(b, num_b)[:, 1:]], 1).to(x)
    roots = resp.reshape(-1, 1).sqrt()
    found = torch.linalg.lstsq(roots * design, roots * x.repeat_interleave(num_a * num_b, 0)).solution
    locs_b = torch.cat([torch.zeros_like(x[:1]), found[num_a:]])
    return finish(found[:num_a], locs_b, resp, x)


def m_step_by_elimination(resp: Tensor, x: Tensor) -> Params:
    """Return the same by putting locs_b, as a function of locs_a, into the equations for locs_a; locs_a_0 is 0."""
    counts = resp.sum(0)
    per_b = counts / counts.sum(0)
    means_b = resp.sum(1).T @ x / counts.sum(0)[:, None]
    reduced = counts.sum(1).diag() - counts @ per_b.T
    sums = resp.sum(2).T @ x - counts @ means_b
    locs_a = torch.cat([torch.zeros_like(x[:1]), torch.linalg.solve(reduced[1:, 1:], sums[1:])])
    return finish(locs_a, means_b - per_b.T @ locs_a, resp, x)


def best_a(locs_b: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return the best locs_a at given locs_b: means of what is left, (I, D)."""
    left = x[:, None, None] - locs_b
    return torch.einsum("nij,nijd->id", resp, left.expand(*resp.shape, -1)) / resp.sum((0, 2))[:, None]


def best_b(locs_a: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return the best locs_b at given locs_a, (J, D)."""
    return best_a(locs_a, resp.transpose(1, 2), x)


def in_turn(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return locs_a at the old locs_b, then locs_b at the new locs_a: a conditional maximisation."""
    locs_a = best_a(params["locs_b"], resp, x)
    return finish(locs_a, best_b(locs_a, resp, x), resp, x)


def both_at_once_by_halves(resp: Tensor, x: Tensor, *, params: Params) -> Params:
    """Return both locs half of the way to the best ones at the other's old value: a damped Jacobi sweep."""
    locs_a = (params["locs_a"] + best_a(params["locs_b"], resp, x)) / 2
    locs_b = (params["locs_b"] + best_b(params["locs_a"], resp, x)) / 2
    return finish(locs_a, locs_b, resp, x)


def one_part_ignored(resp: Tensor, x: Tensor) -> Params:
    """Return either locs as the plain means by its own part, which count the other part's mean twice."""
    return finish(best_a(torch.zeros_like(x[:1]).expand(resp.shape[2], -1), resp, x),
                  best_b(torch.zeros_like(x[:1]).expand(resp.shape[1], -1), resp, x), resp, x)  # fmt: skip


def marginal_effects(resp: Tensor, x: Tensor) -> Params:
    """Return the means by part about the overall mean: least squares only where the two parts are balanced."""
    found = one_part_ignored(resp, x)
    return finish(found["locs_a"], found["locs_b"] - x.mean(0), resp, x)


def one_part(subject: Subject) -> Subject:
    """Return the subject with a single component in the first mixture."""
    single = {"weights_a": torch.ones(1, dtype=torch.float64), "locs_a": PARAMS["locs_a"][:1]}
    return replace(subject, params={**PARAMS, **single})


def with_e_step(table: Callable[[Params, Tensor], Tensor]) -> Subject:
    """Return the subject with the responsibilities of another table of log joint densities."""
    return replace(SUBJECT, e_step=lambda p, x: normalise(table(p, x)))


def product_of_marginals(params: Params, x: Tensor) -> Tensor:
    """Return p(i | x_n) p(j | x_n), as if the two parts were independent given x."""
    right = e_step(params, x)
    return right.sum(2, keepdim=True) * right.sum(1, keepdim=True)


def millionth(right: Tensor, resp: Tensor, x: Tensor) -> Tensor:
    """Return the right value with its last entries off by a millionth."""
    return torch.cat([right[:-1], right[-1:] * (1 + 1e-6)])


SUBJECT = Subject(model, PARAMS, (X,), e_step, m_step, log_likelihood)
PRODUCT = replace(SUBJECT, e_step=product_of_marginals)
LAST_AXIS = replace(SUBJECT, e_step=lambda p, x: log_joint(p, x).softmax(2))
MARGINAL = replace(SUBJECT, m_step=marginal_effects)
LOCS = ("locs_a", "locs_b")
WRONG_SITES: dict[str, tuple[str, tuple[str, ...], str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "shares squared": ("weights_a", ("weights_a",), "", lambda right, r, x: right**2 / (right**2).sum()),
    "shares from hard assignments": (
        "weights_b",
        ("weights_b",),
        "",
        lambda right, r, x: (r.sum(1).argmax(1).bincount(minlength=len(right)) + 0.5) / (len(x) + len(right) / 2),
    ),
    "shares of the other end": ("weights_b", ("weights_b",), "", lambda right, r, x: right.flip(0)),
    "shares off by a millionth": (
        "weights_b",
        ("weights_b",),
        "",
        lambda right, r, x: millionth(right, r, x) / millionth(right, r, x).sum(),
    ),
    "second part shrunk": ("locs_b", LOCS, "a factor of 0.9", lambda right, r, x: 0.9 * right),
    "one loc off by a millionth": ("locs_b", LOCS, "", millionth),
    "scales are variances": ("scales", ("scales",), "square of scales for scales", lambda right, r, x: right**2),
    "scales over N - 1": (
        "scales",
        ("scales",),
        "n - 1 for n",
        lambda right, r, x: right * (len(x) / (len(x) - 1)) ** 0.5,
    ),
    "one scale for both features": ("scales", ("scales",), "", lambda right, r, x: right.mean().expand_as(right)),
    "scales exchanged": ("scales", ("scales",), "in another order", lambda right, r, x: right.flip(0)),
    "scales off by a millionth": ("scales", ("scales",), "", lambda right, r, x: right * (1 + 1e-6)),
}
ENTRIES = (
    Entry("as derived", SUBJECT, "exact EM"),
    Entry("by regression on indicators", replace(SUBJECT, m_step=m_step_by_regression), "exact EM"),
    Entry("by elimination", replace(SUBJECT, m_step=m_step_by_elimination), "exact EM"),
    Entry("one part after the other", replace(SUBJECT, m_step=in_turn), "generalised EM"),
    Entry("both parts at once, by halves", replace(SUBJECT, m_step=both_at_once_by_halves), "generalised EM"),
    Entry("joint table as a product of its marginals", PRODUCT, "wrong E-step", blind=one_part(PRODUCT)),
    Entry("normalised over the second part only", LAST_AXIS, "wrong E-step", blind=one_part(LAST_AXIS)),
    Entry("normalised over the first part only", replace(SUBJECT, e_step=lambda p, x: log_joint(p, x).softmax(1)),
          "wrong E-step"),
    Entry("axes exchanged", replace(SUBJECT, e_step=lambda p, x: e_step(p, x).transpose(1, 2)), "wrong E-step"),
    Entry("weights of both parts forgotten", with_e_step(log_densities), "wrong E-step"),
    Entry("weights of one part forgotten", with_e_step(lambda p, x: log_densities(p, x) + p["weights_b"].log()),
          "wrong E-step"),
    Entry("hard assignment",
          replace(SUBJECT, e_step=lambda p, x: (e_step(p, x) == e_step(p, x).amax((1, 2), True)).to(x)),
          "wrong E-step", hint="hard assignments"),
    Entry("noise counted for each part", with_e_step(lambda p, x: log_joint({**p, "scales": p["scales"] * 2**0.5}, x)),
          "wrong E-step"),
    Entry("difference for sum", with_e_step(lambda p, x: log_joint({**p, "locs_b": -p["locs_b"]}, x)), "wrong E-step"),
    Entry("plain means by part", replace(SUBJECT, m_step=one_part_ignored), "wrong M-step", (*LOCS, "scales")),
    Entry("marginal effects", MARGINAL, "wrong M-step", (*LOCS, "scales"), blind=one_part(MARGINAL)),
    Entry("mean for sum", replace(SUBJECT, log_likelihood=lambda p, x: log_likelihood(p, x) / len(x)), "wrong report",
          hint="mean for sum"),
    Entry("one part in the report", replace(
        SUBJECT, log_likelihood=lambda p, x: log_joint(p, x).amax(2).logsumexp(1).sum()), "wrong report"),
    Entry("parts summed apart in the report", replace(
        SUBJECT, log_likelihood=lambda p, x: (log_joint(p, x).logsumexp(1) + log_joint(p, x).logsumexp(2).mean(1, True)
                                              ).mean(1).sum() / 2), "wrong report"),
    *(
        Entry(name, replace_site(SUBJECT, site, change), "wrong M-step", blamed, hint)
        for name, (site, blamed, hint, change) in WRONG_SITES.items()
    ),
)  # fmt: skip
