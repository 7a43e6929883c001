r"""From a gradient G to rank-k factors: samplers that return (a, b) with :math:`G \approx a b^H`.

Every sampler finds an orthonormal a of k columns for the part of G's range that matters and returns the
projection :math:`a a^H G`, that is :math:`b = G^H a`.  They differ in how a is found.

A sampler is a callable ``(gradient, k, generator) -> LowRank``.  ``gradient`` is a
:class:`~projunn_manifold.linalg.products.LinearOperator`; the matrix itself need not exist.  Random numbers come from
``generator`` alone.  One draw serves all matrices of a batch, so a batch gives what its members give one by one.  The
samplers of this module also take :class:`~projunn_manifold.sketching.draws.Generators`, one for each member of a stack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from projunn_manifold.linalg import dense, qr
from projunn_manifold.linalg.products import LinearOperator
from projunn_manifold.sketching.draws import Generators, drawn
from projunn_manifold.sketching.lowrank import LowRank
from projunn_manifold.validation import check_positive

__all__ = [
    "SAMPLERS",
    "Column",
    "Sampler",
    "Subspace",
    "check_sample",
    "resolve_sampler",
    "svd",
    "takes_generators",
]

Sampler = Callable[[LinearOperator, int, torch.Generator], LowRank]


def orthonormal(y: Tensor) -> Tensor:  # (*batch, n, k) -> (*batch, n, k)
    """Orthonormal basis of the columns of y.  A single zero column stays zero (so a zero G gives b = 0)."""
    y = dense.normalized(y)  # LAPACK loses orthogonality near underflow
    return y if y.shape[-1] == 1 else qr.thin_qr(y)[0]


def draw_columns(m: int, columns: int, like: Tensor, generator: torch.Generator | Generators) -> Tensor:
    """Draw the Gaussian columns with which a range finder tests matrices ``(*batch, n, m)``.

    ``(m, columns)``, or with many generators a stack of them that expands to ``(*batch, m, columns)``.
    """
    return drawn(generator, lambda g: torch.randn(m, columns, dtype=like.dtype, device=like.device, generator=g))


def leading(basis: Tensor, gradient: LinearOperator, k: int) -> LowRank:
    """Project G on ``basis`` (orthonormal, at least k columns) and keep the best k directions inside it."""
    b = gradient.adjoint_times(basis)
    if basis.shape[-1] > k:
        thin = dense.in_double(b)
        thin = thin / thin.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(thin.dtype).tiny)
        _, w = torch.linalg.eigh(
            dense.finite_entries(thin.mH @ thin)
        )  # ascending: the last k columns are the leading ones
        w = w[..., -k:].to(b)
        basis, b = basis @ w, b @ w
    return LowRank(basis, b)


@dataclass(frozen=True)
class Subspace:
    r"""Randomised range finder with oversampling and power iterations (Halko, Martinsson, Tropp 2011).

    :math:`\mathrm{orth}((G G^H)^p\, G\, Z)` for a Gaussian Z of k + ``oversample`` columns, then the best k
    directions inside.  ``power=0, oversample=0`` is the one-pass range finder, which is the LSI sampler of
    the projUNN paper (section 4.3) from the left instead of the right.  Cost: ``2 + 2 power`` products of G
    with k + ``oversample`` columns, a pair of them in one read where nothing comes between; and an eigendecomposition
    of side k + ``oversample`` where this is more than k, for which the host waits on CUDA.

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
            check_positive(f"Subspace: {name}", value, 0)

    def __call__(self, gradient: LinearOperator, k: int, generator: torch.Generator | Generators) -> LowRank:
        """Return the factors of the projection of G on its sketched range."""
        columns = min(k + self.oversample, *gradient.shape[-2:])
        test = draw_columns(gradient.shape[-1], columns, gradient.like, generator)
        test = test.expand(*gradient.shape[:-2], *test.shape[-2:])
        for _ in range(self.power):
            test = orthonormal(gradient.normalized_image(test)[1])
        if columns > 1:
            return leading(orthonormal(gradient.times(test)), gradient, k)
        return LowRank(*gradient.normalized_image(test))


@dataclass(frozen=True)
class Column:
    r"""Linear-time SVD by column sampling (Drineas, Kannan, Mahoney 2006), the sampler of the paper's Fig. 2b and 4.

    Draws c columns of G with replacement, with probability proportional to their squared norms, rescales
    them by :math:`1/\sqrt{c\,p_j}`, and takes the k leading left singular vectors of the result as a.
    Cost: one read of G for the norms, c columns and their SVD, for which the host waits on CUDA, one product.  A zero
    gradient is sampled uniformly.

    Parameters
    ----------
    columns_per_rank : int
        c / k, at least 1.
    """

    columns_per_rank: int = 4

    def __post_init__(self) -> None:
        check_positive("Column: columns_per_rank", self.columns_per_rank)

    def __call__(self, gradient: LinearOperator, k: int, generator: torch.Generator | Generators) -> LowRank:
        """Return the factors of the projection of G on the sampled columns' leading directions."""
        g = gradient.dense()
        m = g.shape[-1]
        c = max(k, min(self.columns_per_rank * k, m))
        norms = torch.linalg.vector_norm(g, dim=-2, dtype=dense.high_precision(g)).real
        largest = norms.amax(-1, keepdim=True)
        weights = torch.where(largest > 0, (norms / largest).square(), 1.0)
        cumulative = weights.cumsum(-1)
        draws = drawn(generator, lambda one: torch.rand(c, dtype=cumulative.dtype, device=g.device, generator=one))
        levels = draws * cumulative[..., -1:]  # one set of draws for the batch, its own columns for each matrix
        chosen = torch.searchsorted(cumulative, levels, right=True).clamp_max(m - 1)
        scale = torch.rsqrt(weights.gather(-1, chosen)).unsqueeze(-2)
        columns = g.gather(-1, chosen.unsqueeze(-2).expand(*g.shape[:-1], c))
        columns = columns * scale.to(columns.real.dtype)
        u = torch.linalg.svd(columns, full_matrices=False).U[..., :k]
        return LowRank(u, gradient.adjoint_times(u))


def svd(gradient: LinearOperator, k: int, generator: torch.Generator | Generators) -> LowRank:
    """Best rank-k approximation (Eckart-Young), by a dense SVD in O(n m^2): the reference for the others."""
    u, s, vh = torch.linalg.svd(gradient.dense(), full_matrices=False)
    return LowRank(u[..., :k], (vh.mH * s.unsqueeze(-2))[..., :k])


def takes_generators(sampler: Sampler) -> bool:
    """Return whether a sampler can draw for each member of a stack; others know a single generator."""
    return isinstance(sampler, Subspace | Column) or sampler is svd


def check_sample(factors: object, shape: torch.Size, like: Tensor, k: int) -> LowRank:
    """Return a sampler's result; raise unless it is a LowRank of the gradient's shape and of rank at most k."""
    if not isinstance(factors, LowRank):
        raise TypeError(f"a sampler must return a LowRank(a, b), got {type(factors).__name__}")
    if factors.shape != shape or factors.rank > k or factors.b.shape[-1] != factors.rank:
        raise ValueError(
            f"a sampler must return factors of a {tuple(shape)} matrix with at most k={k} columns, "
            f"got a {tuple(factors.a.shape)} and b {tuple(factors.b.shape)}"
        )
    for t in factors:
        if t.dtype != like.dtype or t.device != like.device:
            raise TypeError(f"a sampler must return {like.dtype} on {like.device}, got {t.dtype} on {t.device}")
    return factors


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
