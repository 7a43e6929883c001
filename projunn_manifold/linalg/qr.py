"""Orthonormal bases of thin matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from projunn_manifold.linalg import dense

__all__ = ["thin_qr"]


def thin_qr(y: Tensor) -> tuple[Tensor, Tensor]:  # (*batch, n, k) -> (*batch, n, k), (*batch, k, k)
    """QR factorisation of a thin matrix of any rank; Q contiguous.

    By LAPACK or its like, but on devices that have single precision alone, whose factorisations take tens of times as
    long as the products, by products.
    """
    if dense.is_single(y.device):
        return _by_reflections(y)
    return _by_lapack(y)


def _by_lapack(y: Tensor) -> tuple[Tensor, Tensor]:
    """Factorise y with a floor under its diagonal.

    A linearly dependent column leaves only rounding error, the next one the rounding error of that, until LAPACK
    divides by the remainder (complex routines overflow there).  So each column gets its rounding error, eps times its
    norm, as a floor.
    """
    y = y.clone(memory_format=torch.contiguous_format)
    norms = torch.linalg.vector_norm(y.detach(), dim=-2, dtype=dense.high_precision(y))
    floor = (torch.finfo(y.dtype).eps * norms[..., : min(y.shape[-2:])]).to(y.dtype)
    y.diagonal(dim1=-2, dim2=-1).add_(floor)
    q, r = torch.linalg.qr(y)
    return q.contiguous(), r


def _by_reflections(y: Tensor) -> tuple[Tensor, Tensor]:
    r"""Factorise y by reflections I - 2 v v^H, one for each column whose remainder is more than rounding.

    Their product is :math:`I - V T V^H` with :math:`T^{-1} = \tfrac12 I + \mathrm{striu}(V^H V)` (Schreiber, Van Loan
    1989).
    """
    n, columns = y.shape[-2:]
    k = min(n, columns)
    rest, v = y.clone(memory_format=torch.contiguous_format), y.new_zeros(*y.shape[:-1], k)
    rounding = torch.finfo(y.dtype).eps * torch.linalg.vector_norm(y, dim=-2, keepdim=True)
    for c in range(k):
        below, reflector = rest[..., c:, c:], v[..., c:, c : c + 1]
        reflector.copy_(below[..., :1])
        first = reflector[..., :1, :]
        phase = torch.where(first == 0, 1.0, torch.sgn(first))
        remainder = torch.linalg.vector_norm(reflector, dim=-2, keepdim=True)
        first.add_(phase * remainder)
        reflector.div_(torch.linalg.vector_norm(reflector, dim=-2, keepdim=True))
        reflector.masked_fill_(remainder <= rounding[..., c : c + 1], 0)
        below.sub_(reflector @ (2 * (reflector.mH @ below)))
    inverse = torch.triu(v.mH @ v, 1)
    inverse.diagonal(dim1=-2, dim2=-1).add_(0.5)
    top = v[..., :k, :].mH.resolve_conj()
    q = -(v @ torch.linalg.solve_triangular(inverse, top, upper=True))
    q.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return q, torch.triu(rest[..., :k, :])
