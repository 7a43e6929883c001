"""Orthonormal bases of thin matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from projunn_manifold.linalg.dense import high_precision

__all__ = ["thin_qr"]


def thin_qr(y: Tensor) -> tuple[Tensor, Tensor]:  # (*batch, n, k) -> (*batch, n, k), (*batch, k, k)
    """QR factorisation of a thin matrix of any rank; Q contiguous.

    A linearly dependent column leaves only rounding error, the next one the rounding error of that, until LAPACK
    divides by the remainder (complex routines overflow there).  So each column gets its rounding error, eps times its
    norm, as a floor.
    """
    y = y.clone(memory_format=torch.contiguous_format)
    norms = torch.linalg.vector_norm(y.detach(), dim=-2, dtype=high_precision(y.dtype))
    floor = (torch.finfo(y.dtype).eps * norms[..., : min(y.shape[-2:])]).to(y.dtype)
    y.diagonal(dim1=-2, dim2=-1).add_(floor)
    q, r = torch.linalg.qr(y)
    return q.contiguous(), r
