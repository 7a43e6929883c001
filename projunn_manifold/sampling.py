r"""From a gradient G to rank-k factors: samplers that return (a, b) with :math:`G \approx a b^H`.

Every sampler finds an orthonormal basis Q of k columns for the part of G's range that matters and returns
the projection :math:`Q Q^H G`, that is a = Q and :math:`b = G^H Q`.  They differ in how Q is found.

A sampler is a callable ``(gradient, k, generator) -> LowRank``.  ``gradient`` is anything with the three
methods of :class:`Gradient`; the matrix itself need not exist.  Random numbers come from ``generator``
alone.  One draw serves all matrices of a batch, so a batch equals its members one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from projunn_manifold import linalg
from projunn_manifold.factors import LowRank

__all__ = [
    "SAMPLERS",
    "Column",
    "Dense",
    "Gradient",
    "Sampler",
    "Subspace",
    "resolve_sampler",
    "svd",
    "without_normal_part",
]


class Gradient(Protocol):
    """A matrix G of shape ``(*batch, n, m)`` as a sampler sees it."""

    @property
    def like(self) -> Tensor:
        """A tensor with G's dtype and device."""

    @property
    def shape(self) -> torch.Size:
        """Shape ``(*batch, n, m)``."""

    def times(self, q: Tensor) -> Tensor:  # (*batch, m, j) -> (*batch, n, j)
        """Return ``G q``."""

    def adjoint_times(self, q: Tensor) -> Tensor:  # (*batch, n, j) -> (*batch, m, j)
        """Return ``G^H q``."""

    def dense(self) -> Tensor:
        """Return G itself."""


Sampler = Callable[[Gradient, int, torch.Generator], LowRank]


@dataclass(frozen=True)
class Dense:
    """A gradient that exists as a matrix."""

    g: Tensor

    @property
    def like(self) -> Tensor:
        """The matrix."""
        return self.g

    @property
    def shape(self) -> torch.Size:
        """Shape ``(*batch, n, m)``."""
        return self.g.shape

    def times(self, q: Tensor) -> Tensor:
        """Return ``G q``."""
        return self.g @ q

    def adjoint_times(self, q: Tensor) -> Tensor:
        """Return ``G^H q``."""
        return linalg.adjoint_times(self.g, q)

    def dense(self) -> Tensor:
        """Return G."""
        return self.g


@dataclass(frozen=True)
class Shifted:
    """The gradient ``G - c X``, never formed; ``c`` is real, one number per matrix, ``(*batch, 1, 1)``."""

    g: Tensor
    x: Tensor
    c: Tensor

    @property
    def like(self) -> Tensor:
        """A tensor with the matrix's dtype and device."""
        return self.g

    @property
    def shape(self) -> torch.Size:
        """Shape ``(*batch, n, m)``."""
        return self.g.shape

    def times(self, q: Tensor) -> Tensor:
        """Return ``G q - c X q``."""
        return self.g @ q - self.c * (self.x @ q)

    def adjoint_times(self, q: Tensor) -> Tensor:
        """Return ``G^H q - c X^H q``."""
        return linalg.adjoint_times(self.g, q) - self.c * linalg.adjoint_times(self.x, q)

    def dense(self) -> Tensor:
        """Return ``G - c X`` as a new matrix."""
        return self.g - self.c * self.x


def without_normal_part(g: Tensor, x: Tensor, k: int) -> Gradient:
    r"""Return G without the multiple of X that weight decay added to it.

    A real multiple of X is normal to the manifold: it does not move the point, but it has full rank and
    would spoil a rank-k sketch.  The multiple c is measured on a sample I of rows, such that adding λX to
    G adds exactly λ to c.  A gradient of rank at most k has
    :math:`|\mathrm{Re}\langle X_I, G_I\rangle| \le \sqrt{k}\,\|G_I\|_F`; where this holds nothing is removed, and such
    gradients are sketched exactly.
    Cost: a sample of 64 k rows (or columns), and one product with X for each product with G where c is not zero.
    """
    axis = -2 if x.stride(-1) == 1 else -1  # whole rows of a row-major matrix, whole columns of a column-major one
    step = max(1, x.shape[axis] // (64 * k))
    sample = (..., slice(None, None, step), slice(None)) if axis == -2 else (..., slice(None, None, step))
    x_part, g_part = x[sample], g[sample]
    energy = torch.linalg.vector_norm(g_part, dim=(-2, -1), dtype=linalg.high_precision(g.dtype)).real
    excess = linalg.frobenius_inner(x_part, g_part).abs().double() > 1.01 * math.sqrt(k) * energy  # 1.01: rounding
    if not x.is_cuda and not excess.any():
        return Dense(g)
    c = torch.where(excess[..., None, None], _multiple(x_part, g_part, k), 0.0)
    return Shifted(g, x, c)


def _multiple(x: Tensor, g: Tensor, k: int) -> Tensor:  # (*batch, n, m) twice -> (*batch, 1, 1), real
    r"""Return c with :math:`G \approx S + c X`, S of rank k.

    :math:`c = \mathrm{Re}\langle X, G - S\rangle/\|X\|_F^2` with S the leading part of G - cX, in turn; if G - λX has
    rank k, each turn divides the error c - λ by about the number of rows over k.
    """
    norm = linalg.frobenius_inner(x, x)
    c = (linalg.frobenius_inner(x, g) / norm)[..., None, None]
    for _ in range(2):
        rest = g - c * x
        heaviest = torch.linalg.vector_norm(rest, dim=-2).topk(k, dim=-1).indices
        start = rest.gather(-1, heaviest.unsqueeze(-2).expand(*rest.shape[:-1], k))
        basis = orthonormal(rest @ linalg.adjoint_times(rest, orthonormal(start)))
        main_part = basis @ linalg.adjoint_times(rest, basis).mH
        c = (linalg.frobenius_inner(x, g - main_part) / norm)[..., None, None]
    return c


def orthonormal(y: Tensor) -> Tensor:  # (*batch, n, k) -> (*batch, n, k)
    """Orthonormal basis of the columns of y.  A single zero column stays zero (so a zero G gives b = 0)."""
    if y.shape[-1] > 1:
        return torch.linalg.qr(y).Q.contiguous()
    wide = y.to(linalg.high_precision(y.dtype))
    norm = torch.linalg.vector_norm(wide, dim=-2, keepdim=True)
    return (wide / torch.where(norm == 0, 1.0, norm)).to(y.dtype)


def leading(basis: Tensor, gradient: Gradient, k: int) -> LowRank:
    """Project G on ``basis`` (orthonormal, at least k columns) and keep the best k directions inside it."""
    b = gradient.adjoint_times(basis)
    if basis.shape[-1] > k:
        thin = b.to(linalg.high_precision(b.dtype))
        thin = thin / thin.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(thin.dtype).tiny)
        _, w = torch.linalg.eigh(thin.mH @ thin)  # ascending: the last k columns are the leading ones
        w = w[..., -k:].to(b.dtype)
        basis, b = basis @ w, b @ w
    return LowRank(basis, b)


@dataclass(frozen=True)
class Subspace:
    r"""Randomised range finder with oversampling and power iterations (Halko, Martinsson, Tropp 2011).

    :math:`Q = \mathrm{orth}((G G^H)^p\, G\, \Omega)` for a Gaussian Ω of k + ``oversample`` columns, then the
    best k directions inside Q.  ``power=0, oversample=0`` is the one-pass range finder, which equals the
    LSI sampler of the projUNN paper (section 4.3).  Cost: ``2 + 2 power`` products of G with k + ``oversample``
    columns.

    Parameters
    ----------
    power : int
        Power iterations p; each sharpens the decay of the singular values.
    oversample : int
        Extra columns of the test matrix.
    """

    power: int = 0
    oversample: int = 0

    def __post_init__(self) -> None:
        for name, value in (("power", self.power), ("oversample", self.oversample)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"Subspace: {name} must be an integer >= 0, got {value!r}")

    def __call__(self, gradient: Gradient, k: int, generator: torch.Generator) -> LowRank:
        """Return the factors of the projection of G on its sketched range."""
        n, m = gradient.shape[-2:]
        like = gradient.like
        columns = min(k + self.oversample, n, m)
        test = torch.randn(m, columns, dtype=like.dtype, device=like.device, generator=generator)
        basis = orthonormal(gradient.times(test))
        for _ in range(self.power):
            basis = orthonormal(gradient.times(orthonormal(gradient.adjoint_times(basis))))
        return leading(basis, gradient, k)


@dataclass(frozen=True)
class Column:
    r"""Linear-time SVD by column sampling (Drineas, Kannan, Mahoney 2006), the sampler of the paper's Fig. 2b and 4.

    Draws c columns of G with replacement, with probability proportional to their squared norms, rescales
    them by :math:`1/\sqrt{c\,p_j}`, and takes the k leading left singular vectors of the result as Q.
    Cost: one read of G for the norms, c columns, one product.  A zero gradient is sampled uniformly.

    Parameters
    ----------
    columns_per_rank : int
        c / k, at least 1.
    """

    columns_per_rank: int = 4

    def __post_init__(self) -> None:
        value = self.columns_per_rank
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"Column: columns_per_rank must be an integer >= 1, got {value!r}")

    def __call__(self, gradient: Gradient, k: int, generator: torch.Generator) -> LowRank:
        """Return the factors of the projection of G on the sampled columns' leading directions."""
        g = gradient.dense()
        m = g.shape[-1]
        c = max(k, min(self.columns_per_rank * k, m))
        norms = torch.linalg.vector_norm(g, dim=-2, dtype=linalg.high_precision(g.dtype)).real
        largest = norms.amax(-1, keepdim=True)
        weights = torch.where(largest > 0, (norms / largest).square(), 1.0)
        cumulative = weights.cumsum(-1)
        draws = torch.rand(c, dtype=cumulative.dtype, device=g.device, generator=generator)
        levels = draws * cumulative[..., -1:]  # one set of draws for the batch, its own columns for each matrix
        chosen = torch.searchsorted(cumulative, levels, right=True).clamp_max(m - 1)
        scale = torch.rsqrt(weights.gather(-1, chosen)).unsqueeze(-2)
        columns = g.gather(-1, chosen.unsqueeze(-2).expand(*g.shape[:-1], c))
        columns = columns * scale.to(columns.real.dtype)
        u = torch.linalg.svd(columns, full_matrices=False).U[..., :k]
        return LowRank(u, gradient.adjoint_times(u))


def svd(gradient: Gradient, k: int, generator: torch.Generator) -> LowRank:
    """Best rank-k approximation (Eckart-Young), by a dense SVD in O(n m^2): the reference for the others."""
    u, s, vh = torch.linalg.svd(gradient.dense(), full_matrices=False)
    return LowRank(u[..., :k], (vh.mH * s.unsqueeze(-2))[..., :k])


SAMPLERS: dict[str, Sampler] = {
    "lsi": Subspace(),
    "column": Column(),
    "subspace": Subspace(power=1, oversample=4),
    "svd": svd,
}


def resolve_sampler(sampler: str | Sampler) -> Sampler:
    """Return the sampler of that name, or the callable itself."""
    if isinstance(sampler, str) and sampler in SAMPLERS:
        return SAMPLERS[sampler]
    if callable(sampler):
        return sampler
    known = ", ".join(sorted(SAMPLERS))
    raise ValueError(
        f"sampler must be one of {known}, or a callable (gradient, k, generator) -> LowRank; got {sampler!r}"
    )


def finite(factors: LowRank) -> bool:
    """Tell whether the sketch saw only finite numbers: an inf or NaN in G spreads into b."""
    return math.isfinite(
        torch.linalg.vector_norm(factors.b, ord=1, dtype=linalg.high_precision(factors.b.dtype)).real.item()
    )
