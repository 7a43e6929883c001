r"""A step of rank one on a GPU in six launches, by kernels in Triton: square real X, in place.

For the gradient's sketch :math:`y y^T G / \|y\|^2`, y = G z, the step is :math:`X \leftarrow X + W F S^T` with
W = [X b, y], b = G^T y and S = X^T W.  Three kernels make it, each in one read of a large matrix from memory:

1. y and :math:`G^T y`, from G;
2. X b, :math:`X^T [X b, y]` and the Gram matrix of W, from X;
3. F, from that Gram matrix, and the update of X.

Sums over rows are left in parts, one for each block of rows, and added by PyTorch, so that results repeat.  F is that
of :mod:`~projunn_manifold.moves.rank_one`, in double precision, brought from the basis [X b, a'] to [X b, y].  The
columns of the sketch are not scaled to unit norm: squares of the gradient's norm must be in the range of its precision.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from projunn_manifold import context

__all__ = ["step_of_rank_one_", "suits"]

_RESIDENT = 2**18  # bytes of a block of rows, which is read twice: the second time from the cache of the second level
_TILE = 256  # columns that a program takes at a time
_LEAST, _MOST = 4, 16  # rows of a block
_MOST_MATRICES = 2**16 - 1  # of a stack: the last dimensions of a grid are no longer
_DTYPES = (torch.float32, torch.float64)


@functools.cache
def _is_installed() -> bool:
    """Return whether Triton is, without importing it."""
    return importlib.util.find_spec("triton") is not None


def suits(x: Tensor, g: Tensor) -> bool:
    """Return whether the kernels can take a point and its gradient."""
    if not (x.is_cuda and _is_installed()):
        return False
    if not 0 < x.shape[:-2].numel() <= _MOST_MATRICES or x.shape[-1] != x.shape[-2] or x.dtype not in _DTYPES:
        return False
    return all(t.dtype is x.dtype and t.is_contiguous() and context.is_plain(t) for t in (x, g))


def step_of_rank_one_(x: Tensor, g: Tensor, z: Tensor, rate: Tensor, polar: bool, limit: float) -> Tensor:
    """Move X in place by ``-rate`` times the gradient's tangent of rank one, and return which matrices were left out.

    Parameters
    ----------
    x, g : Tensor
        ``(*batch, n, n)``, float32 or float64, contiguous.
    z : Tensor
        ``(n, 1)``, or ``(*batch, n, 1)``: the column with which the gradient is sketched.
    rate : Tensor
        In double precision, one number or one for each matrix.
    polar : bool
        Whether the move is D, or else T.
    limit : float
        Matrices with a longer step than the root of this, or with one that is not finite, are left as they are.

    Returns
    -------
    Tensor
        ``(*batch,)``: 1 where a matrix was left out, else 0.
    """
    from projunn_manifold.linalg import gpu_kernels

    n, batch = x.shape[-1], x.shape[:-2].numel()
    rows = max(_LEAST, min(_MOST, _RESIDENT // (n * x.itemsize)))
    blocks = -(-n // rows)
    whole = {"n": n, "ROWS": rows, "TILE": _TILE}
    z = z.expand(*x.shape[:-2], n, 1).contiguous()
    rate = rate.expand(x.shape[:-2]).contiguous()
    y = x.new_empty(batch, n)
    back = x.new_empty(batch, blocks, n)
    gpu_kernels.sketch[blocks, batch](g, z, y, back, **whole)
    b = back.sum(1)
    xb = x.new_empty(batch, n)
    images = x.new_empty(batch, blocks, 2, n)
    gram = x.new_empty(batch, blocks, 4, dtype=torch.float64)
    gpu_kernels.tangent[blocks, batch](x, b, y, xb, images, gram, **whole)
    right = images.sum(1)
    lost = torch.empty(x.shape[:-2], dtype=torch.uint8, device=x.device)
    grid = (blocks, -(-n // _TILE), batch)
    gpu_kernels.update[grid](
        x, xb, y, right, gram, rate, lost, limit, n, blocks, POLAR=polar, ROWS=rows, TILE=_TILE, BLOCKS=_power(blocks)
    )
    torch.autograd.graph.increment_version(x)
    return lost


def _power(count: int) -> int:
    """Return the smallest power of two that is not smaller, as Triton's ranges must be."""
    return 1 << (count - 1).bit_length()
