r"""The same maps, dense, slow and shaped like the paper: what the tests compare everything else with.

Nothing is imported from the rest of the package.  Every function takes and returns whole matrices
``(*batch, n, m)``, costs :math:`O(n^3)` and is meant for float64 and complex128.
"""

import torch
from torch import Tensor

__all__ = [
    "geodesic",
    "gradient",
    "inner",
    "lift",
    "polar",
    "projunn_d",
    "projunn_t",
    "retraction",
    "transport_geodesic",
    "transport_retraction",
]


def _identity(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


def polar(a: Tensor) -> Tensor:
    r"""Closest matrix with orthonormal columns, :math:`A (A^H A)^{-1/2}` (projUNN, Lemma 4.1)."""
    u, _, vh = torch.linalg.svd(a, full_matrices=False)
    return u @ vh


def gradient(x: Tensor, g: Tensor) -> Tensor:
    r"""Riemannian gradient :math:`\tfrac12(G - X G^H X)` (projUNN, Lemma 4.3)."""
    return (g - x @ g.mH @ x) / 2


def lift(x: Tensor, u: Tensor) -> Tensor:
    r"""Skew-Hermitian A of least norm with A X = u: :math:`u X^H - X u^H - X X^H u X^H`."""
    return u @ x.mH - x @ u.mH - x @ x.mH @ u @ x.mH


def inner(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    r"""Metric :math:`\mathrm{Re}\,\mathrm{tr}\,u^H(2I - XX^H)v`."""
    weight = 2 * _identity(x.shape[-2], x) - x @ x.mH
    return (u.conj() * (weight @ v)).sum((-2, -1)).real


def geodesic(x: Tensor, u: Tensor) -> Tensor:
    """Exponential map exp(A) X of the tangent u."""
    return torch.linalg.matrix_exp(lift(x, u)) @ x


def retraction(x: Tensor, u: Tensor) -> Tensor:
    """Polar factor of X + u."""
    return polar(x + u)


def transport_geodesic(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Tangent v carried along the geodesic of u by exp(A)."""
    return torch.linalg.matrix_exp(lift(x, u)) @ v


def transport_retraction(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Tangent v carried along the retraction of u, by the unitary that maps X to Y and complement to complement."""
    y, eye = retraction(x, u), _identity(x.shape[-2], x)
    complement = (eye - y @ y.mH) @ (eye - x @ x.mH)
    outside = torch.linalg.svd(complement)
    rank = x.shape[-2] - x.shape[-1]
    return (y @ x.mH + outside.U[..., :rank] @ outside.Vh[..., :rank, :]) @ v


def projunn_d(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Polar factor of X + a b^H (projUNN, Theorem 4.2)."""
    return polar(x + a @ b.mH)


def projunn_t(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Geodesic along the tangent part of a b^H (projUNN, Theorem 4.4)."""
    return geodesic(x, gradient(x, a @ b.mH))
