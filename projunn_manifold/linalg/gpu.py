r"""Steps of rank one on a GPU in few launches, by kernels in Triton: square X, in place.

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
Where a' is much smaller than y it is not recomputed from X, so rounding grows with the length of the sketch; in a
moment it is normal to the manifold, and moves nothing.  To the kernels complex numbers are pairs of real ones.

With momentum the tangent is added to a dense vector u, in one read and write of it, and the step goes along the part of
u in two columns Q = orth((u^H u)^2 Z), as in :mod:`~projunn_manifold.moves.frame`: each product with u^H u reads u
once, another read of u and of X gives P = X Q, Ω = skew(P^H u Q) and u^H P, and the last kernel moves X and carries u.
Q is made orthonormal in double precision, by two orthogonalisations of its second column against its first.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from projunn_manifold import context
from projunn_manifold.linalg import dense
from projunn_manifold.linalg.dense import Scalar

__all__ = ["SketchedTangent", "follow_", "step_of_rank_one_", "suits"]

_RESIDENT = 2**18  # bytes of a block of rows, which is read twice: the second time from the cache of the second level
_TILE = 256  # real numbers of each row that a program takes at a time
_LONG_TILE = 1024  # of a column, where a program has nothing else
_LEAST, _MOST = 4, 16  # rows of a block
_TALLEST = 128  # bytes of a block's columns: of more the registers do not suffice for all columns of a thread
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


_Made = TypeVar("_Made")


def _on_its_device(function: Callable[..., _Made]) -> Callable[..., _Made]:
    """Make the device of the first tensor the current one, to which Triton gives its kernels."""

    @functools.wraps(function)
    def guarded(*arguments: Any) -> _Made:
        with torch.cuda.device_of(next(t for t in arguments if isinstance(t, Tensor))):
            return function(*arguments)

    return guarded


@_on_its_device
def step_of_rank_one_(x: Tensor, g: Tensor, z: Tensor, rate: Scalar, polar: bool, limit: float) -> Tensor:
    """Move X in place by ``-rate`` times the gradient's tangent of rank one, and return which matrices were left out.

    Parameters
    ----------
    x, g : Tensor
        ``(*batch, n, n)``, float32, float64, complex64 or complex128; contiguous.
    z : Tensor
        ``(n, 1)``, or ``(*batch, n, 1)``: the column with which the gradient is sketched.
    rate : float or Tensor
        One number, or one for each matrix.
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

    grid, found, lost = _Grid.of(x), _sketched(x, g, z), _marks(x)
    constants = {"LEAST": _least(x.dtype), "POLAR": polar}
    gpu_kernels.update[grid.by_tiles](_as_real(x), *found, _for_each(rate, x), lost, limit, **grid.sizes, **constants)
    torch.autograd.graph.increment_version(x)
    return lost


@final
@dataclass(frozen=True)
class SketchedTangent:
    """A real multiple of the tangent of a gradient's sketch, as the kernels have it."""

    parts: tuple[Tensor, ...]  # X b, y, X^H [X b, y] and the Gram matrix of [X b, y]
    square: Tensor  # squared length for the factor 1, in double precision; 0 for what was left out
    lost: Tensor  # (*batch,): 1 where a matrix was left out, else 0
    scale: Scalar = 1.0

    @classmethod
    @_on_its_device
    def of_gradient(cls, x: Tensor, g: Tensor, z: Tensor) -> SketchedTangent:
        """Return the tangent at X of the gradient g, sketched with the column z as in :func:`step_of_rank_one_`.

        Matrices with a gradient that is not finite, or whose square is beyond the range, are left out.
        """
        from projunn_manifold.linalg import gpu_kernels

        grid, found, lost = _Grid.of(x), _sketched(x, g, z), _marks(x)
        square = torch.empty(x.shape[:-2], dtype=torch.float64, device=x.device)
        constants = {"LIMIT": torch.finfo(x.dtype).max, "LEAST": _least(x.dtype), "PARTS": grid.sizes["PARTS"]}
        gpu_kernels.measure[grid.by_matrices](found[-1], square, lost, **constants)
        return cls(found, square, lost)

    def scaled(self, c: Scalar) -> SketchedTangent:
        """Return ``c`` times the tangent."""
        return replace(self, scale=self.scale * dense.wide(c))

    def squared_norm(self) -> Tensor:
        """Return the squared length, in the manifold's metric."""
        return self.scale * self.scale * self.square

    @_on_its_device
    def add_to_(self, u: Tensor, c: Scalar) -> None:
        """Make u ``c`` times itself and the tangent; for c = 0 whatever its entries are."""
        from projunn_manifold.linalg import gpu_kernels

        grid, factors = _Grid.of(u), (_for_each(c, u), _for_each(self.scale, u))
        gpu_kernels.accumulate[grid.by_tiles](
            _as_real(u), *self.parts, self.lost, *factors, **grid.sizes, LEAST=_least(u.dtype)
        )
        torch.autograd.graph.increment_version(u)


@_on_its_device
def follow_(x: Tensor, u: Tensor, z: Tensor, power: int, rate: Scalar, polar: bool, limit: float) -> Tensor:
    """Move X in place along ``rate`` times the part of u in two columns, carry u along, and return what was left out.

    Parameters
    ----------
    x, u : Tensor
        ``(*batch, n, n)``, as in :func:`step_of_rank_one_`.
    z : Tensor
        ``(n, 2)``, or ``(*batch, n, 2)``: Z, from which the columns are found.
    power : int
        Products of Z with u^H u.
    rate, polar, limit
        As there.

    Returns
    -------
    Tensor
        ``(*batch,)``: 1 where a matrix was left out, else 0.
    """
    from projunn_manifold.linalg import gpu_kernels

    grid, point, vector, lost = _Grid.of(x, 2), _as_real(x), _as_real(u), _marks(x)
    q = _as_real(z.mT.expand(*x.shape[:-2], 2, x.shape[-1]).contiguous())
    images = point.new_empty(grid.count, grid.blocks, 2, point.shape[-1])
    for _ in range(power):
        gpu_kernels.power[grid.by_rows](vector, q, images, **grid.sizes)
        q = _straightened(images.sum(1), x, grid, last=False)
    q = _straightened(q, x, grid, last=True)
    p, inner = torch.empty_like(q), point.new_empty(grid.count, grid.blocks, 4, dtype=torch.float64)
    gpu_kernels.frame[grid.by_rows](point, vector, q, p, images, inner, **grid.sizes)
    gpu_kernels.turn[grid.by_tiles](
        point,
        vector,
        p,
        q,
        images.sum(1),
        inner.sum(1),
        _for_each(rate, x),
        lost,
        limit,
        **grid.sizes,
        POLAR=polar,
    )
    for t in (x, u):
        torch.autograd.graph.increment_version(t)
    return lost


@final
@dataclass(frozen=True)
class _Grid:
    """How many programs the kernels have, and what they are told about sizes."""

    count: int  # matrices
    blocks: int  # of rows
    across: int  # tiles
    sizes: dict[str, int]  # of a matrix and its blocks

    @classmethod
    def of(cls, x: Tensor, columns: int = 1) -> _Grid:
        """Return the grid for products of x with so many columns."""
        n, parts = x.shape[-1], 2 if x.is_complex() else 1
        rows = _rows(n, x.itemsize, columns)
        sizes = {"n": n, "PARTS": parts, "ROWS": rows, "TILE": _TILE}
        return cls(x.shape[:-2].numel(), -(-n // rows), -(-n * parts // _TILE), sizes)

    @property
    def by_rows(self) -> tuple[int, ...]:
        return self.blocks, self.count

    @property
    def by_tiles(self) -> tuple[int, ...]:
        return self.blocks, self.across, self.count

    @property
    def by_matrices(self) -> tuple[int, ...]:
        return (self.count,)


def _sketched(x: Tensor, g: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """Return X b, y, X^H [X b, y] and the Gram matrix of [X b, y]."""
    from projunn_manifold.linalg import gpu_kernels

    grid = _Grid.of(x)
    point, gradient, test = map(_as_real, (x, g, z.expand(*x.shape[:-2], *z.shape[-2:]).contiguous()))
    count, blocks, m = grid.count, grid.blocks, point.shape[-1]
    y, back = point.new_empty(count, m), point.new_empty(count, blocks, m)
    gpu_kernels.sketch[grid.by_rows](gradient, test, y, back, **grid.sizes)
    xb, images = point.new_empty(count, m), point.new_empty(count, blocks, 2, m)
    gram = point.new_empty(count, blocks, 4, dtype=torch.float64)
    gpu_kernels.tangent[grid.by_rows](point, back.sum(1), y, xb, images, gram, **grid.sizes)
    return xb, y, images.sum(1), gram.sum(1)


def _straightened(v: Tensor, x: Tensor, grid: _Grid, last: bool) -> Tensor:  # (batch, 2, m) -> (batch, 2, m)
    """Return two columns with the first at unit norm and the second orthogonal to it; twice, they are orthonormal."""
    from projunn_manifold.linalg import gpu_kernels

    q, constants = torch.empty_like(v), {"EPS": torch.finfo(x.dtype).eps, "PARTS": grid.sizes["PARTS"]}
    gpu_kernels.straighten[grid.by_matrices](v, q, v.shape[-1], **constants, TILE=_LONG_TILE, LAST=last)
    return q


def _marks(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:-2], dtype=torch.uint8, device=x.device)


def _for_each(c: Scalar, x: Tensor) -> Tensor:  # -> (*batch,), in double precision
    """Return a number for each matrix."""
    if isinstance(c, Tensor):
        c = c.reshape(()) if c.numel() == 1 else c
        return c.to(x.device, torch.float64).expand(x.shape[:-2]).contiguous()
    return torch.full(x.shape[:-2], c, dtype=torch.float64, device=x.device)


def _rows(n: int, itemsize: int, columns: int = 1) -> int:
    """Return how many rows a block has: a power of two, as the lengths of Triton's ranges must be."""
    most = max(_LEAST, min(_MOST, _TALLEST // (columns * itemsize), _RESIDENT // (n * itemsize)))
    return 1 << (most.bit_length() - 1)


def _least(dtype: torch.dtype) -> float:
    """Return the least squared norm that has all its digits, and a root that is a normal number."""
    wide = torch.finfo(torch.float64)
    return max(torch.finfo(dtype).tiny ** 2, wide.tiny / wide.eps)


def _as_real(x: Tensor) -> Tensor:  # (*batch, n, m) -> (*batch, n, 2m) if complex, in the same memory
    """Return a view of complex numbers as pairs of real ones, and a real matrix as it is."""
    return torch.view_as_real(x).flatten(-2) if x.is_complex() else x
