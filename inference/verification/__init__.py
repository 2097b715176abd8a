"""Seven verbs that try to refute an analytic result, and the report that they return."""

from mixproof.inference.verification.density import assert_density, verify_density
from mixproof.inference.verification.domain import (
    Domain,
    binary,
    one_hot,
    positive,
    positive_definite,
    reals,
    simplex,
    support,
    symmetric,
    unit_interval,
)
from mixproof.inference.verification.em import assert_em, verify_em, verify_subject
from mixproof.inference.verification.gradient import assert_gradient, verify_gradient
from mixproof.inference.verification.identity import assert_identity, verify_identity
from mixproof.inference.verification.limit import assert_limit, verify_limit
from mixproof.inference.verification.maximiser import assert_maximiser, verify_maximiser
from mixproof.inference.verification.moments import assert_moments, verify_moments
from mixproof.inference.verification.report import Check, Refuted, Report
from mixproof.inference.verification.subject import Subject, load_subject

__all__ = [
    "Check",
    "Domain",
    "Refuted",
    "Report",
    "Subject",
    "assert_density",
    "assert_em",
    "assert_gradient",
    "assert_identity",
    "assert_limit",
    "assert_maximiser",
    "assert_moments",
    "binary",
    "load_subject",
    "one_hot",
    "positive",
    "positive_definite",
    "reals",
    "simplex",
    "support",
    "symmetric",
    "unit_interval",
    "verify_density",
    "verify_em",
    "verify_gradient",
    "verify_identity",
    "verify_limit",
    "verify_maximiser",
    "verify_moments",
    "verify_subject",
]
