"""Orthonormal bases of thin matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from projunn_manifold.linalg import dense

__all__ = ["thin_qr"]


def thin_qr(y: Tensor) -> tuple[Tensor, Tensor]:  # (*batch, n, k) -> (*batch, n, k), (*batch, k, k)
    """QR factorisation of a thin matrix of any rank; Q contiguous.

    By LAPACK or its like, but on devices that have single precision alone, whose factorisations take tens of times as
    long as the products, by products.
    """
    unit = y.detach().abs().sum(-2, keepdim=True)  # of each column, so that no square leaves the range
    unit = unit.clamp_min(torch.finfo(y.dtype).tiny)
    q, r = (_by_reflections if dense.is_single(y.device) else _by_lapack)(y / unit)
    return q, r * unit


def _by_lapack(y: Tensor) -> tuple[Tensor, Tensor]:
    """Factorise y with a floor under its diagonal.

    A linearly dependent column leaves only rounding error, the next one the rounding error of that, until LAPACK
    divides by the remainder (complex routines overflow there).  So each column gets its rounding error, eps times its
    norm, as a floor.
    """
    floor = torch.finfo(y.dtype).eps * torch.linalg.vector_norm(y.detach(), dim=-2)[..., : min(y.shape[-2:])]
    y = y.clone(memory_format=torch.contiguous_format)
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
    rest, reflectors, rows = y, [], []
    rounding = torch.finfo(y.dtype).eps * torch.linalg.vector_norm(rest.detach(), dim=-2, keepdim=True)
    for c in range(k):
        first = rest[..., :1, :1]
        remainder = torch.linalg.vector_norm(rest[..., :1], dim=-2, keepdim=True)
        is_rounding = remainder <= rounding[..., c : c + 1]
        v = torch.cat((first + torch.where(first == 0, 1.0, torch.sgn(first)) * remainder, rest[..., 1:, :1]), -2)
        length = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
        v = (v / length.masked_fill(is_rounding, 1)).masked_fill(is_rounding, 0)
        rest = rest - v @ (2 * (v.mH @ rest))
        rows.append(nn.functional.pad(rest[..., :1, :], (c, 0)))
        reflectors.append(nn.functional.pad(v, (0, 0, c, 0)))
        rest = rest[..., 1:, 1:]
    if not k:
        return y.new_zeros(*y.shape[:-1], 0), y.new_zeros(*y.shape[:-2], 0, columns)
    v, r = torch.cat(reflectors, -1), torch.cat(rows, -2)
    half = torch.diag_embed(v.new_full((k,), 0.5))
    top = v[..., :k, :].mH.resolve_conj()
    q = v @ torch.linalg.solve_triangular(torch.triu(v.mH @ v, 1) + half, top, upper=True)
    return dense.columns_of_identity(*q.shape, dtype=q.dtype, device=q.device) - q, r
