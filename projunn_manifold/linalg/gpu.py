r"""A step of rank one on a GPU in six launches, by kernels in Triton: square X, in place.

For the gradient's sketch :math:`y y^H G / \|y\|^2`, y = G z, the step is :math:`X \leftarrow X + W F S^H` with
W = [X b, a'], b = G^H y, a' = y - ρ X b and S = X^H W.  Three kernels make it, each in one read of a large matrix from
memory:

1. y and :math:`G^H y`, from G;
2. X b, :math:`X^H [X b, y]` and the Gram matrix of [X b, y], from X;
3. ρ and F, from that Gram matrix, and the update of X.

Sums over rows are left in parts, one for each block of rows, and added by PyTorch, so that results repeat.  ρ and F are
those of :mod:`~projunn_manifold.moves.rank_one`, in double precision.  The columns of the sketch are brought to unit
norm by the last kernel: until then squares of the gradient's norm must be in the range of its precision, and fourth
powers in that of double precision.  A smaller gradient moves nothing, and a larger one is left out and counted.
Where a' is much smaller than y it is not recomputed from X, so rounding grows with the length of the sketch.  To the
kernels complex numbers are pairs of real ones.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from projunn_manifold import context
from projunn_manifold.linalg import dense

__all__ = ["step_of_rank_one_", "suits"]

_RESIDENT = 2**18  # bytes of a block of rows, which is read twice: the second time from the cache of the second level
_TILE = 256  # real numbers of each row that a program takes at a time
_LEAST, _MOST = 4, 16  # rows of a block
_TALLEST = 128  # bytes of a block's column: of more the registers do not suffice for all columns of a thread
_MOST_MATRICES = 2**16 - 1  # of a stack: the last dimensions of a grid are no longer


@functools.cache
def _is_installed() -> bool:
    """Return whether Triton is, without importing it."""
    return importlib.util.find_spec("triton") is not None


def suits(x: Tensor, g: Tensor) -> bool:
    """Return whether the kernels can take a point and its gradient."""
    if not (x.is_cuda and _is_installed()):
        return False
    if not 0 < x.shape[:-2].numel() <= _MOST_MATRICES or x.shape[-1] != x.shape[-2] or x.dtype not in dense.DTYPES:
        return False
    return all(t.dtype is x.dtype and t.is_contiguous() and context.is_plain(t) for t in (x, g))


def step_of_rank_one_(x: Tensor, g: Tensor, z: Tensor, rate: Tensor, polar: bool, limit: float) -> Tensor:
    """Move X in place by ``-rate`` times the gradient's tangent of rank one, and return which matrices were left out.

    Parameters
    ----------
    x, g : Tensor
        ``(*batch, n, n)``, float32, float64, complex64 or complex128; contiguous.
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
    rows = _rows(n, x.itemsize)
    blocks = -(-n // rows)
    z = z.expand(*x.shape[:-2], n, 1).contiguous()
    rate = rate.expand(x.shape[:-2]).contiguous()
    point, gradient, test = map(_as_real, (x, g, z))
    m = point.shape[-1]
    whole = {"n": n, "PARTS": m // n, "ROWS": rows, "TILE": _TILE}
    y = point.new_empty(batch, m)
    back = point.new_empty(batch, blocks, m)
    gpu_kernels.sketch[blocks, batch](gradient, test, y, back, **whole)
    b = back.sum(1)
    xb = point.new_empty(batch, m)
    images = point.new_empty(batch, blocks, 2, m)
    gram = point.new_empty(batch, blocks, 4, dtype=torch.float64)
    gpu_kernels.tangent[blocks, batch](point, b, y, xb, images, gram, **whole)
    right = images.sum(1)
    lost = torch.empty(x.shape[:-2], dtype=torch.uint8, device=x.device)
    constants = {"POLAR": polar, "LEAST": _least(x.dtype), "BLOCKS": _power(blocks)}
    gpu_kernels.update[blocks, -(-m // _TILE), batch](
        point, xb, y, right, gram, rate, lost, limit, blocks=blocks, **whole, **constants
    )
    torch.autograd.graph.increment_version(x)
    return lost


def _rows(n: int, itemsize: int) -> int:
    """Return how many rows a block has: a power of two, as the lengths of Triton's ranges must be."""
    most = max(_LEAST, min(_MOST, _TALLEST // itemsize, _RESIDENT // (n * itemsize)))
    return 1 << (most.bit_length() - 1)


def _least(dtype: torch.dtype) -> float:
    """Return the least squared norm that has all its digits, and a root that is a normal number."""
    wide = torch.finfo(torch.float64)
    return max(torch.finfo(dtype).tiny ** 2, wide.tiny / wide.eps)


def _as_real(x: Tensor) -> Tensor:  # (*batch, n, m) -> (*batch, n, 2m) if complex, in the same memory
    """Return a view of complex numbers as pairs of real ones, and a real matrix as it is."""
    return torch.view_as_real(x).flatten(-2) if x.is_complex() else x


def _power(count: int) -> int:
    """Return the smallest power of two that is not smaller."""
    return 1 << (count - 1).bit_length()
