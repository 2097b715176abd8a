"""A subject: a Pyro program and a person's EM for it, in one object."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Subject:
    """A Pyro program with enumerated latents, and the two steps that a person derived for it."""

    model: Callable[..., Any]
    """The program; ``model(*data)`` observes the data."""
    params: Any
    """A dict or NamedTuple with a value for each parameter site, inside its support."""
    data: tuple[Any, ...]
    """The positional arguments of the program."""
    e_step: Callable[..., Any]
    """``e_step(params, *data)`` -> responsibilities p(z_n = k | x_n, params), (N, K)."""
    m_step: Callable[..., Any]
    """``m_step(resp, *data)`` -> params; with a keyword ``params`` where it builds on the current ones."""
    log_likelihood: Callable[..., Any] | None = None
    """``log_likelihood(params, *data)`` -> log p(data | params), the number that the person reports."""
