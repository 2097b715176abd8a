"""What the bank is made of: an EM derivation with its true verdict, and the faults that any mixture can have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixproof.inference.verification.report import ACCEPTED, Report, blamed
from mixproof.inference.verification.subject import Subject

LogJoint = Callable[..., Tensor]


class Entry(NamedTuple):
    """An EM derivation whose verdict is known."""

    name: str
    """What was done, right or wrong, in a few words."""
    subject: Subject
    verdict: str
    """What ``verify_em`` must say of it."""
    sites: tuple[str, ...] = ()
    """The parameter sites of a wrong M-step, any of which may be blamed."""
    hint: str = ""
    """What the measured hint must contain; empty where the fault has no known signature."""
    source: str = ""
    """The public thread or text in which the fault was found."""
    blind: Subject | None = None
    """The same fault where nothing shows it: two components, one feature, equal weights."""

    @property
    def is_right(self) -> bool:
        """Whether the derivation is right."""
        return self.verdict in ACCEPTED

    def agrees(self, report: Report) -> bool:
        """Whether a report gives this verdict, blames one of the sites, and has the hint."""
        check = blamed(report.checks)
        site = "" if check is None or check.counterexample is None else check.counterexample["site"]
        return (
            report.verdict == self.verdict
            and (not self.sites or site in self.sites)
            and (not self.hint or any(self.hint in hint for hint in report.hints))
        )


def wrong_e_steps(subject: Subject, log_joint: LogJoint) -> tuple[Entry, ...]:
    """Return faults of the E-step that every mixture with a site ``weights`` can have.

    Args:
        subject: the right derivation.
        log_joint: ``log_joint(params, *data)`` -> log p(x_n, z_n = k | params), (N, K).
    """

    def hard(params: Any, *data: Any) -> Tensor:
        found = log_joint(params, *data)
        return torch.nn.functional.one_hot(found.argmax(1), found.shape[1]).to(found)

    faults: dict[str, tuple[str, Callable[..., Tensor]]] = {
        "weights forgotten": (
            "weights are missing",
            lambda params, *data: (log_joint(params, *data) - params["weights"].log()).softmax(1),
        ),
        "weights counted twice": (
            "weights are counted twice",
            lambda params, *data: (log_joint(params, *data) + params["weights"].log()).softmax(1),
        ),
        "hard assignment": ("hard assignments", hard),
        "softmax over the rows": ("over the rows", lambda params, *data: log_joint(params, *data).softmax(0)),
        "square root of the densities": (
            "exponent 0.5",
            lambda params, *data: (log_joint(params, *data) / 2).softmax(1),
        ),
        "densities not normalised": ("not normalised", lambda params, *data: log_joint(params, *data).exp()),
        "off by a millionth": (
            "",
            lambda params, *data: (log_joint(params, *data) + 1e-6 * torch.arange(len(params["weights"]))).softmax(1),
        ),
    }
    return tuple(
        Entry(name, replace(subject, e_step=e_step), "wrong E-step", hint=hint)
        for name, (hint, e_step) in faults.items()
    )


def wrong_weights(subject: Subject) -> tuple[Entry, ...]:
    """Return faults of the M-step for a free site ``weights`` (K,); the other sites stay right."""

    def smoothed(right: Tensor, resp: Tensor, *data: Any) -> Tensor:
        return (resp.sum(0) + 1) / (len(resp) + resp.shape[1])

    def hard(right: Tensor, resp: Tensor, *data: Any) -> Tensor:
        counts = resp.argmax(1).bincount(minlength=resp.shape[1]).to(resp)
        return (counts + 1e-3) / (counts + 1e-3).sum()

    def off_by_a_millionth(right: Tensor, resp: Tensor, *data: Any) -> Tensor:
        tilted = right * (1 + 1e-6 * torch.arange(len(right)))
        return tilted / tilted.sum()

    faults: dict[str, tuple[str, Callable[..., Tensor]]] = {
        "weights smoothed by one": ("smoothed by 1", smoothed),
        "weights from hard counts": ("", hard),
        "weights left uniform": ("", lambda right, resp, *data: torch.full_like(right, 1 / len(right))),
        "weights off by a millionth": ("", off_by_a_millionth),
    }
    return tuple(
        Entry(name, replace_site(subject, "weights", change), "wrong M-step", ("weights",), hint)
        for name, (hint, change) in faults.items()
    )


def wrong_reports(subject: Subject, log_joint: LogJoint) -> tuple[Entry, ...]:
    """Return faults of the reported log likelihood; ``log_joint(params, *data)`` returns (N, K)."""
    faults: dict[str, tuple[str, Callable[..., Tensor]]] = {
        "mean for sum": ("mean for sum", lambda params, *data: log_joint(params, *data).logsumexp(1).mean()),
        "weights left out of the report": (
            "weights are missing",
            lambda params, *data: (log_joint(params, *data) - params["weights"].log()).logsumexp(1).sum(),
        ),
        "Q reported": (
            "expected log joint",
            lambda params, *data: (log_joint(params, *data).softmax(1) * log_joint(params, *data)).sum(),
        ),
    }
    return tuple(
        Entry(name, replace(subject, log_likelihood=log_likelihood), "wrong report", hint=hint)
        for name, (hint, log_likelihood) in faults.items()
    )


def replace_site(subject: Subject, site: str, change: Callable[..., Tensor]) -> Subject:
    """Return the subject with one site of its M-step's result replaced by ``change(right value, resp, *data)``."""
    right = subject.m_step

    def wrong(resp: Tensor, *data: Any) -> dict[str, Tensor]:
        found = right(resp, *data)
        return {**found, site: change(found[site], resp, *data)}

    return replace(subject, m_step=wrong)
