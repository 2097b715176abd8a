"""Mixtures as scikit-learn estimators: EM under the names of that ecosystem.

Nothing is added to a variance: what ``reg_covar`` does in scikit-learn belongs in a prior. A component that collapses
is an error, or a warning where another start survives.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from mixproof.inference.em import responsibilities
from mixproof.inference.restarts import em_restarts
from mixproof.inference.sampling import sample
from mixproof.inference.validation import as_floating, check_prior, check_row_weights, check_rows, check_unmasked
from mixproof.models import bernoulli, gaussian_diagonal, gaussian_full, gaussian_spherical, gaussian_tied, laplace
from mixproof.models.initial import check_num_components, partition


@dataclass(kw_only=True, eq=False, repr=False)
class _Mixture(DensityMixin, BaseEstimator, ABC):
    """What the estimators share: everything but the family.

    scikit-learn reads the settings from the signature of ``__init__``, which ``dataclass`` writes.
    """

    n_components: int = field(default=1, kw_only=False)
    """K."""
    prior: Any = None
    """The ``Prior`` of the family, for the mode of the posterior; None maximises the likelihood."""
    tol: float = 1e-10
    """The relative change of the log likelihood, plus log prior, at which EM stops."""
    max_iter: int = 500
    """The largest number of EM steps from each start."""
    n_init: int = 1
    """The number of starts, of which the best fit is kept."""
    init_params: Literal["k-means++", "random"] = "k-means++"
    """The seeds of a start: rows spread over the data, or any rows."""
    random_state: int | np.random.RandomState | None = None
    """As everywhere in scikit-learn: an integer makes ``fit`` and ``sample`` repeat themselves exactly."""

    weights_: NDArray[Any] = field(init=False)
    """(K,), p(z = k)."""
    params_: Any = field(init=False)
    """All parameters, as the ``Params`` of the family; float64, or float32 as the data."""
    log_likelihood_: float = field(init=False)
    """log p(X | ``params_``), each row times its ``sample_weight``, without the prior."""
    converged_: bool = field(init=False)
    """Whether EM came to rest from the best start."""
    n_iter_: int = field(init=False)
    """The number of EM steps from the best start."""
    n_features_in_: int = field(init=False)
    """D."""

    _attributes: ClassVar[tuple[str, ...]]
    """The fitted attributes that hold the fields of the family's ``Params``, in their order."""

    @property
    @abstractmethod
    def _family(self) -> Any:
        """The family of the contract; not stored, since a module cannot be pickled."""

    def fit(self, X: ArrayLike, y: None = None, sample_weight: ArrayLike | None = None) -> Self:
        """Fit the parameters by EM and return the estimator.

        A start is seeded by rows, each as likely as if it were there as often as its weight says.

        Args:
            X: (N, D), the data.
            y: ignored.
            sample_weight: (N,), how often each row counts, not negative; None counts each once.

        Raises:
            TypeError, ValueError: the data, the weights or a setting are not what they must be, or no start survives
                because a component loses its last row or collapses.
        """
        family = self._family
        self._check_settings()
        x = self._rows(X, reset=True)
        weights = None if sample_weight is None else as_floating(sample_weight, "sample_weight").double()
        if weights is not None and not weights.any():
            raise ValueError("sample_weight is zero in every row: at least one row must count")
        row_weights = check_row_weights(weights, x)
        if row_weights is not None:  # a row that does not count may be impossible under the fit
            x, row_weights = x[row_weights > 0], row_weights[row_weights > 0]
        num_components = check_num_components(self.n_components, len(x))
        generator = self._generator()
        settings = (num_components, generator, self.init_params, row_weights)
        starts = [family.init_params(x, *settings) for _ in range(self.n_init)]
        prior = check_prior(family, self.prior, starts[0])
        if prior is not None:  # it keeps regular what few rows leave singular, from the first step on
            parts = [partition(x, *settings) for _ in starts]
            if row_weights is not None:
                parts = [part * row_weights[:, None] for part in parts]
            starts = [
                family.m_step(family.statistics(start, x, part), prior)
                for start, part in zip(starts, parts, strict=True)
            ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            try:
                best, _, failures = em_restarts(
                    family, x, starts, prior=prior, weights=row_weights, max_steps=self.max_iter, rtol=self.tol
                )
            except ValueError as error:
                raise ValueError(f"no start survived: {error}") from error
        if failures:
            warnings.warn(
                f"{len(failures)} of {self.n_init} starts failed and are left out; the last: {failures[max(failures)]}",
                RuntimeWarning,
                stacklevel=2,
            )
        if not best.converged:
            warnings.warn(
                f"EM has not converged after {self.max_iter} steps: raise max_iter, or tol if this is close enough",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.params_, self.converged_, self.n_iter_ = best.params, best.converged, best.num_steps
        for name, value in zip(self._attributes, best.params, strict=True):
            setattr(self, name, value.numpy().copy())
        log_density = family.log_joint(best.params, x).logsumexp(-1)
        self.log_likelihood_ = (log_density if row_weights is None else log_density * row_weights).sum().item()
        return self

    def fit_predict(self, X: ArrayLike, y: None = None, sample_weight: ArrayLike | None = None) -> NDArray[np.int64]:
        """Fit, and return the most probable component (N,) of each row of X (N, D)."""
        return self.fit(X, y, sample_weight).predict(X)

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """Return the most probable component (N,) of each row of X (N, D)."""
        return self.predict_proba(X).argmax(1)

    def predict_proba(self, X: ArrayLike) -> NDArray[Any]:
        """Return p(z_n = k | x_n), shape (N, K), for X (N, D).

        Raises:
            ValueError: X is not what it must be, or a row is impossible under every component.
        """
        check_is_fitted(self)
        return responsibilities(self._family, self.params_, self._rows(X, reset=False)).numpy()

    def score_samples(self, X: ArrayLike) -> NDArray[Any]:
        """Return log p(x_n), shape (N,), for X (N, D); -inf for a row that is impossible under every component."""
        check_is_fitted(self)
        return self._family.log_joint(self.params_, self._rows(X, reset=False)).logsumexp(-1).numpy()

    def score(self, X: ArrayLike, y: None = None) -> float:
        """Return the mean of log p(x_n) over the rows of X (N, D)."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Draw rows X (n, D) and the components (n,) that they came from, in no order.

        Raises:
            TypeError, ValueError: ``n_samples`` is not an integer of at least 1.
        """
        check_is_fitted(self)
        x, z = sample(self._family, self.params_, n_samples, generator=self._generator())
        return x.numpy(), z.numpy()

    def bic(self, X: ArrayLike) -> float:
        """Return the Bayesian information criterion on X (N, D), the lower the better (Schwarz 1978)."""
        log_densities = self.score_samples(X)
        return float(self._num_free_parameters() * math.log(len(log_densities)) - 2 * log_densities.sum())

    def aic(self, X: ArrayLike) -> float:
        """Return Akaike's information criterion on X (N, D), the lower the better."""
        return float(2 * self._num_free_parameters() - 2 * self.score_samples(X).sum())

    def _num_free_parameters(self) -> int:
        """Return how many numbers the parameters hold: weights sum to 1, and a covariance matrix is symmetric."""
        count = -1
        for name, value in self.params_._asdict().items():
            is_symmetric = name in ("covariance", "covariances")
            count += value.numel() * (value.shape[-1] + 1) // (2 * value.shape[-1]) if is_symmetric else value.numel()
        return count

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(check_random_state(self.random_state).randint(2**31 - 1))

    def _matrix(self, X: ArrayLike, *, reset: bool) -> NDArray[Any]:
        """Return X (N, D) as scikit-learn validates it, in an array that torch can share."""
        check_unmasked(X, "X")
        return validate_data(
            self,
            X,
            reset=reset,
            dtype=[np.float64, np.float32],
            order="C",
            force_writeable=True,
            ensure_min_samples=2 if reset else 1,
        )

    def _rows(self, X: ArrayLike, *, reset: bool) -> Tensor:
        x = check_rows(self._family, torch.from_numpy(self._matrix(X, reset=reset)))
        return x if reset else x.to(self.params_.weights)

    def _check_settings(self) -> None:
        for name in ("max_iter", "n_init"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")
        if not isinstance(self.tol, Real) or not 0 <= self.tol < math.inf:
            raise ValueError(f"tol must be a finite number that is not negative, not {self.tol!r}")
        if self.init_params not in ("k-means++", "random"):
            raise ValueError(f'init_params must be "k-means++" or "random", not {self.init_params!r}')


@dataclass(kw_only=True, eq=False, repr=False)
class GaussianMixture(_Mixture):
    """Mixture of Gaussians."""

    covariance_type: Literal["full", "tied", "diag", "spherical"] = "full"
    """A matrix for each component, one for all, variances for each component, or one variance for each."""

    means_: NDArray[Any] = field(init=False)
    """(K, D)."""
    covariances_: NDArray[Any] = field(init=False)
    """(K, D, D), (D, D), variances (K, D) or variances (K,), by ``covariance_type``."""

    _attributes = ("weights_", "means_", "covariances_")
    _families: ClassVar[dict[str, Any]] = {
        "full": gaussian_full,
        "tied": gaussian_tied,
        "diag": gaussian_diagonal,
        "spherical": gaussian_spherical,
    }

    @property
    def _family(self) -> Any:
        if self.covariance_type not in self._families:
            raise ValueError(
                f"covariance_type must be one of {', '.join(self._families)}, not {self.covariance_type!r}"
            )
        return self._families[self.covariance_type]


@dataclass(kw_only=True, eq=False, repr=False)
class BernoulliMixture(_Mixture):
    """Mixture of products of Bernoullis, for data of zeros and ones."""

    binarize: float | None = None
    """The threshold above which an entry counts as a one; None refuses entries other than 0 and 1."""

    probs_: NDArray[Any] = field(init=False)
    """(K, D), of a one."""

    _attributes = ("weights_", "probs_")

    @property
    def _family(self) -> Any:
        return bernoulli

    def _matrix(self, X: ArrayLike, *, reset: bool) -> NDArray[Any]:
        values = super()._matrix(X, reset=reset)
        return values if self.binarize is None else (values > self.binarize).astype(values.dtype)


@dataclass(kw_only=True, eq=False, repr=False)
class LaplaceMixture(_Mixture):
    """Mixture of products of Laplace laws."""

    means_: NDArray[Any] = field(init=False)
    """(K, D), which are the medians too."""
    scales_: NDArray[Any] = field(init=False)
    """(K, D); the standard deviations are sqrt(2) times as large."""

    _attributes = ("weights_", "means_", "scales_")

    @property
    def _family(self) -> Any:
        return laplace
