"""Positive definite matrices: their Cholesky factor under batching, and the inverse-Wishart law on them."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

from mixproof.models.conjugate import draw_gamma, draw_normal

Size = torch.Size | list[int] | tuple[int, ...]


def cholesky(covariances: Tensor) -> Tensor:
    """Return lower triangular L with L L^T = covariances, for matrices of shape (..., D, D).

    A matrix that is not positive definite beyond rounding gets a factor of NaNs rather than an exception, so that one
    bad member of a batch does not hide the others and the function can be vectorised by ``torch.func.vmap``.
    """
    factor, info = torch.linalg.cholesky_ex(covariances)
    variances = covariances.diagonal(dim1=-2, dim2=-1)
    rounding = covariances.shape[-1] * torch.finfo(covariances.dtype).eps
    conditional_variances = factor.diagonal(dim1=-2, dim2=-1).square()
    regular = (info == 0) & (conditional_variances > rounding * variances).all(-1)
    return torch.where(regular[..., None, None], factor, torch.nan)


def check_regular(covariance: Tensor, num_rows: int) -> None:
    """Raise unless the covariance (D, D) of so many rows is positive definite beyond rounding.

    Raises:
        ValueError: it is singular.
    """
    if num_rows <= len(covariance):
        raise ValueError(
            f"x has {num_rows} rows of {len(covariance)} columns, whose covariance is singular: give a prior of your "
            "own, or take a family of fewer parameters"
        )
    if cholesky(covariance).isnan().any():
        raise ValueError("the columns of x are linearly dependent: drop those that follow from others")


def log_det(factor: Tensor) -> Tensor:
    """Return log det of L L^T from its lower triangular factor L of shape (..., D, D)."""
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def outer(vectors: Tensor) -> Tensor:
    """Return v v^T for vectors of shape (..., D)."""
    return vectors[..., :, None] * vectors[..., None, :]


def log_inverse_wishart(covariances: Tensor, df: Tensor, scale: Tensor) -> Tensor:
    """Return the log density of the inverse-Wishart law at matrices of shape (..., D, D).

    It is the law of the inverse of a Wishart matrix with ``df`` degrees of freedom and scale matrix ``scale`` inverted,
    so that its mean is scale / (df - D - 1) (Gelman et al., Bayesian Data Analysis, 3rd edition, appendix A).

    Args:
        covariances: (..., D, D), positive definite.
        df: (), degrees of freedom, above D - 1.
        scale: (D, D), positive definite.
    """
    size = covariances.shape[-1]
    factor = cholesky(covariances)
    scale_factor = cholesky(scale)
    ratio = torch.linalg.solve_triangular(factor, scale_factor.expand_as(factor), upper=False)
    normaliser = (df * size / 2) * math.log(2) + torch.special.multigammaln(df / 2, size)
    trace = ratio.square().sum((-2, -1))
    return df / 2 * log_det(scale_factor) - normaliser - (df + size + 1) / 2 * log_det(factor) - trace / 2


def draw_inverse_wishart_root(df: Tensor, scale: Tensor, generator: torch.Generator) -> Tensor:
    """Return M (..., D, D) such that M M^T has the inverse-Wishart law, by Bartlett's decomposition.

    A Wishart matrix is (C A)(C A)^T with C C^T its scale, A lower triangular, its diagonal the roots of chi-squared
    variables with df, df - 1, ... degrees of freedom and standard normal below (Anderson 2003, An Introduction to
    Multivariate Statistical Analysis, section 7.2). With scale = L L^T, the inverse of such a matrix has M = L A^-T.

    Args:
        df: (...), degrees of freedom, above D - 1.
        scale: (..., D, D), positive definite.
        generator: the only source of randomness.
    """
    size = scale.shape[-1]
    halves = (df[..., None] - torch.arange(size, dtype=scale.dtype, device=scale.device)) / 2
    diagonal = (2 * draw_gamma(halves, generator)).sqrt()
    bartlett = draw_normal(scale, generator).tril(-1) + torch.diag_embed(diagonal)
    return torch.linalg.solve_triangular(bartlett, cholesky(scale).mT, upper=False).mT


class InverseWishart(TorchDistribution):
    """The inverse-Wishart law with ``df`` degrees of freedom () and scale matrix (D, D), as a Pyro distribution."""

    arg_constraints: ClassVar = {"df": constraints.positive, "scale": constraints.positive_definite}
    support = constraints.positive_definite

    def __init__(
        self, df: Tensor, scale: Tensor, batch_shape: torch.Size | None = None, validate_args: bool | None = None
    ):
        if df.ndim or scale.ndim != 2:
            raise ValueError(
                f"the degrees of freedom must be one number and the scale one matrix, not of shapes {tuple(df.shape)} "
                f"and {tuple(scale.shape)}: use expand for a batch"
            )
        self.df, self.scale = df, scale
        super().__init__(batch_shape or torch.Size(), scale.shape[-2:], validate_args=validate_args)
        if self._validate_args and not (df > scale.shape[-1] - 1).all():
            raise ValueError(f"the degrees of freedom must exceed D - 1 = {scale.shape[-1] - 1}, and are {df.tolist()}")

    def expand(self, batch_shape: Size, _instance: None = None) -> InverseWishart:
        return InverseWishart(self.df, self.scale, torch.Size(batch_shape), validate_args=False)

    def sample(self, sample_shape: Size = ()) -> Tensor:
        """Draw by Bartlett's decomposition: the inverse of a Wishart matrix is (C A)^-T (C A)^-1, A triangular."""
        size = self.scale.shape[-1]
        shape = self._extended_shape(torch.Size(sample_shape))
        bartlett = torch.randn(shape, dtype=self.scale.dtype, device=self.scale.device).tril(-1)
        halves = (self.df - torch.arange(size, dtype=self.scale.dtype, device=self.scale.device)) / 2
        chi2 = 2 * torch.distributions.Gamma(halves, torch.ones_like(halves)).sample(shape[:-2])
        bartlett = bartlett + torch.diag_embed(chi2.sqrt())
        # With scale = L L^T and A the Bartlett factor, the draw is M M^T, M = L A^-T.
        root = torch.linalg.solve_triangular(bartlett, cholesky(self.scale).mT.expand(shape), upper=False).mT
        return root @ root.mT

    def log_prob(self, value: Tensor) -> Tensor:
        return log_inverse_wishart(value, self.df, self.scale).expand(value.shape[:-2])


class LogCholesky(Transform):
    """Vectors (..., D (D + 1) / 2) to positive definite matrices L L^T: the rows of L, its diagonal by logarithm.

    Pinheiro and Bates 1996, Statistics and Computing 6, section 2.2.
    """

    domain = constraints.real_vector
    codomain = constraints.positive_definite
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        factor = self._factor(x)
        return factor @ factor.mT

    def _inverse(self, y: Tensor) -> Tensor:
        size = y.shape[-1]
        factor = cholesky(y)
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        rows, columns = torch.tril_indices(size, size, device=y.device)
        return (factor - torch.diag_embed(diagonal) + torch.diag_embed(diagonal.log()))[..., rows, columns]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return log |dy / dx|, y by its lower triangle: D log 2 + sum_i (D + 2 - i) log L_ii, i from 1."""
        size = y.shape[-1]
        powers = torch.arange(size + 1, 1, -1, dtype=x.dtype, device=x.device)
        return size * math.log(2) + (powers * self._log_diagonal(x)).sum(-1)

    def _log_diagonal(self, x: Tensor) -> Tensor:
        size = _size_of(x.shape[-1])
        ends = torch.arange(1, size + 1, device=x.device).cumsum(0) - 1
        return x[..., ends]

    def _factor(self, x: Tensor) -> Tensor:
        size = _size_of(x.shape[-1])
        rows, columns = torch.tril_indices(size, size, device=x.device)
        places = torch.zeros(size, size, dtype=torch.long, device=x.device)
        places[rows, columns] = torch.arange(x.shape[-1], device=x.device)
        return x[..., places].tril(-1) + torch.diag_embed(self._log_diagonal(x).exp())

    def forward_shape(self, shape: Size) -> torch.Size:
        size = _size_of(shape[-1])
        return torch.Size((*shape[:-1], size, size))

    def inverse_shape(self, shape: Size) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


def _size_of(length: int) -> int:
    """Return D from D (D + 1) / 2."""
    return (math.isqrt(8 * length + 1) - 1) // 2


@biject_to.register(constraints.positive_definite)  # torch has none, and no sampler or autoguide does without
def _log_cholesky(constraint: constraints.Constraint) -> Transform:
    return LogCholesky()
