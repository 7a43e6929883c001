"""Orthonormal bases of thin matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from projunn_manifold import context
from projunn_manifold.linalg.dense import high_precision

__all__ = ["thin_qr"]


def thin_qr(y: Tensor) -> tuple[Tensor, Tensor]:  # (*batch, n, k) -> (*batch, n, k), (*batch, k, k)
    """QR factorisation of a thin matrix of any rank; Q contiguous.

    A linearly dependent column leaves only rounding error, the next one the rounding error of that, until LAPACK
    divides by the remainder (complex routines overflow there).  So each column gets its rounding error, eps times its
    norm, as a floor.

    Where the host cannot look, it is made of products and Cholesky factors of k x k matrices; there a zero column stays
    zero.
    """
    if context.would_wait(y):
        return _cholesky_qr(y)
    y = y.clone(memory_format=torch.contiguous_format)
    norms = torch.linalg.vector_norm(y.detach(), dim=-2, dtype=high_precision(y.dtype))
    floor = (torch.finfo(y.dtype).eps * norms[..., : min(y.shape[-2:])]).to(y.dtype)
    y.diagonal(dim1=-2, dim2=-1).add_(floor)
    q, r = torch.linalg.qr(y)
    return q.contiguous(), r


def _cholesky_qr(y: Tensor) -> tuple[Tensor, Tensor]:  # (*batch, n, k) -> (*batch, n, k), (*batch, k, k)
    """QR factorisation by Cholesky factors of Gram matrices, in double precision (Fukaya et al. 2020).

    Each pass divides the columns by the factor of their Gram matrix, whose diagonal is enlarged by more than its
    rounding, so that dependent columns do no harm: what rounding leaves of them grows to unit norm from pass to pass,
    and a column that is zero stays so.  The last pass enlarges nothing.
    """
    largest = y.detach().abs().amax(-2, keepdim=True)
    q = (y / torch.where(largest == 0, 1, largest)).to(high_precision(y.dtype))
    rounding = 8 * torch.finfo(q.dtype).eps * (q.shape[-2] ** 0.5 + q.shape[-1])
    for enlarged in (rounding,) * (2 if q.dtype != y.dtype else 3) + (0.0,):
        gram = q.mH @ q
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        diagonal.copy_(torch.where(diagonal == 0, 1, diagonal * (1 + enlarged)))
        factor, _ = torch.linalg.cholesky_ex(gram)
        q = torch.linalg.solve_triangular(factor, q.mH, upper=False).mH
    q = q.to(y.dtype).contiguous()
    return q, q.mH @ y
