r"""A large matrix known by its products with thin ones, computed in as few reads of the large matrix as possible.

Every update of this package is made of these few operations: except for a few columns (drift, samples) no large matrix
is read or written anywhere else in a step.  :func:`matrix` chooses how, once for each matrix and step:

- :class:`PlainMatrix`: PyTorch's own products, one read for each, on any device and through any derivative;
- :class:`CompiledMatrix`: the loops of :mod:`~projunn_manifold.linalg.kernels`, on CPU, for a contiguous matrix that is
  not differentiated, if numba is installed (the extra ``fast``); fewer reads, and the same result to rounding;
- :class:`RowShardedMatrix`: a ``DTensor`` whose rows are sharded over processes.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor

from projunn_manifold import context
from projunn_manifold.linalg import dense, sharded, threads
from projunn_manifold.linalg.loops import NOT_YET, loops_are_usable
from projunn_manifold.linalg.small import Small

__all__ = [
    "CompiledMatrix",
    "LinearOperator",
    "Matrix",
    "PlainMatrix",
    "RowShardedMatrix",
    "compiled_loops",
    "matrix",
    "normalized_image",
]

#: The compiled loops, once they are needed; None: PyTorch's products are used throughout.
compiled: Any = NOT_YET

_LITTLE = 1 / 64  # of a squared norm
_NARROW = 16  # columns of a move up to which thin matrices are left to loops: k <= 8; NumPy's cores of more use threads
_WIDEST = 32  # columns from which a matrix product pays for its own blocking
_MAPPED = 2**22  # bytes from which NumPy asks for large pages
_LINE = 64  # bytes of a cache line


class LinearOperator(Protocol):
    """A matrix M of shape ``(*batch, n, m)`` known by its products; the matrix itself need not exist."""

    @property
    def like(self) -> Tensor:
        """A tensor with M's dtype and device."""

    @property
    def shape(self) -> torch.Size:
        """Shape ``(*batch, n, m)``."""

    def times(self, q: Tensor) -> Tensor:  # (*batch, m, j) -> (*batch, n, j)
        """Return ``M q``."""

    def adjoint_times(self, q: Tensor) -> Tensor:  # (*batch, n, j) -> (*batch, m, j)
        """Return ``M^H q``."""

    def normalized_image(self, q: Tensor) -> tuple[Tensor, Tensor]:  # (*batch, m, j) -> (*batch, n, j), (*batch, m, j)
        """Return y = M q / ‖M q‖_F, for each matrix, and ``M^H y``; y = 0 where M q is."""

    def dense(self) -> Tensor:
        """Return M itself."""


class Matrix(LinearOperator, Protocol):
    """A matrix X that exists, ``(*batch, n, m)``."""

    def two_sided_product(self, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``Y = X right`` and ``X^H [Y, left]``."""

    def rank_one_tangent(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, list[Any]]:
        r"""Return W = [X b, a'], S = X^H W and the numbers ‖a'‖², ‖X b‖², Im b^H X^H a.

        a' = a - ρ X b with the real ρ that makes Re b^H X^H a' = 0, and :math:`X^H a' = X^H a - ρ X^H X b`, unless a'
        is much smaller than a: then rounding would dominate the difference, and X is read once more.  S is made from W,
        not from b: then I + W F W^H stays unitary where X is not quite, and no step enlarges what rounding has left.
        Numbers are ``(*batch,)`` in double precision, or Python's own for a single matrix on CPU: there every
        operator on a tensor would cost more than all the arithmetic that follows.
        """

    def add_product_(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:  # (*batch, n, r), (*batch, m, r)
        """Make of X ``scale X + left right^H``, in place, and return its tensor."""

    def plus_product(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``X + left right^H`` in fresh memory of X's layout."""


def matrix(x: Tensor) -> Matrix:
    """Return x as the fastest :class:`Matrix` that suits it."""
    if _suits_loops(x):
        return CompiledMatrix(x)
    return RowShardedMatrix(x) if sharded.is_sharded(x) else PlainMatrix(x)


def normalized_image(operator: LinearOperator, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return y, the product at unit norm, and the adjoint's product with y, in two products."""
    y = dense.normalized(operator.times(q))
    return y, operator.adjoint_times(y)


class _TensorMatrix:
    """What the final classes share: the tensor that they multiply."""

    __slots__ = ("like",)

    def __init__(self, x: Tensor) -> None:
        self.like = x

    @property
    def shape(self) -> torch.Size:
        """Shape ``(*batch, n, m)``."""
        return self.like.shape

    def dense(self) -> Tensor:
        """Return X."""
        return self.like


@final
class PlainMatrix(_TensorMatrix):
    """A matrix multiplied by PyTorch."""

    __slots__ = ()

    def times(self, q: Tensor) -> Tensor:
        """Return ``X q``."""
        x = self.like
        if q.shape[-1] == 1:
            return x @ q
        return (q.mT.contiguous() @ x.mT).mT  # a thin product is fast from the left only

    def adjoint_times(self, q: Tensor) -> Tensor:
        """Return ``X^H q``."""
        return dense.adjoint_times(self.like, q)

    def normalized_image(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return y, the product at unit norm, and the adjoint's product with y."""
        return normalized_image(self, q)

    def two_sided_product(self, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``Y = X right`` and ``X^H [Y, left]``."""
        y = self.times(right)
        return y, self.adjoint_times(torch.cat((y.mT, left.mT), -2).mT)

    def rank_one_tangent(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, list[Any]]:
        """Return W, S and three numbers; see :meth:`Matrix.rank_one_tangent`."""
        return _rank_one_tangent(self, a, b)

    def add_product_(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        """Make of X ``scale X + left right^H``, in place, and return it."""
        return dense.add_product_(self.like, left, right, scale)

    def plus_product(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``X + left right^H`` in fresh memory."""
        if context.transformed():  # vmap writes nothing in place that has not its batch
            return self.like + left @ right.mH
        return matrix(self.like.clone()).add_product_(left, right)


@final
class RowShardedMatrix(_TensorMatrix):
    """A matrix whose rows are sharded over processes; thin matrices are whole in each of them.

    - ``X q``: the local rows, and then all rows are gathered, kn numbers;
    - ``X^H q``: the local rows of q, and then a sum over the processes, km numbers;
    - ``X + L R^H``: the local rows of L, and nothing travels.
    """

    __slots__ = ("_local",)

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        self._local = matrix(sharded.local_shard(x))

    def times(self, q: Tensor) -> Tensor:
        """Return ``X q``."""
        return sharded.gather_rows(self.like, self._local.times(q))

    def adjoint_times(self, q: Tensor) -> Tensor:
        """Return ``X^H q``."""
        return sharded.sum_over_shards(self.like, self._local.adjoint_times(sharded.local_rows(self.like, q)))

    def normalized_image(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return y, the product at unit norm, and the adjoint's product with y."""
        return normalized_image(self, q)

    def two_sided_product(self, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``Y = X right`` and ``X^H [Y, left]``."""
        y, z = self._local.two_sided_product(right, sharded.local_rows(self.like, left))
        return sharded.gather_rows(self.like, y), sharded.sum_over_shards(self.like, z)

    def rank_one_tangent(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, list[Any]]:
        """Return W, S and three numbers; see :meth:`Matrix.rank_one_tangent`."""
        return _rank_one_tangent(self, a, b)

    def add_product_(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        """Make of X ``scale X + left right^H``, in place, and return it."""
        self._local.add_product_(sharded.local_rows(self.like, left), right, scale)
        return self.like

    def plus_product(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``X + left right^H`` in fresh memory."""
        return RowShardedMatrix(self.like.clone()).add_product_(left, right)


@final
class CompiledMatrix(_TensorMatrix):
    """A matrix multiplied by compiled loops; thin matrices that do not suit these are left to PyTorch."""

    __slots__ = ("_memory",)

    def __init__(self, x: Tensor) -> None:
        super().__init__(x)
        self._memory = _interleaved(_array(x))  # (batch, n, m), or (batch, n, 2m)

    def times(self, q: Tensor) -> Tensor:
        """Return ``X q``."""
        if not self._takes(q):
            return PlainMatrix(self.like).times(q)
        return self._columns(self._products(_rows(q), None)[0])

    def adjoint_times(self, q: Tensor) -> Tensor:
        """Return ``X^H q``."""
        if not self._takes(q):
            return PlainMatrix(self.like).adjoint_times(q)
        return self._columns(self._products(None, _rows(q))[1])

    def two_sided_product(self, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``Y = X right`` and ``X^H [Y, left]``, in one read of X."""
        if not self._takes(right, left):
            return PlainMatrix(self.like).two_sided_product(right, left)
        y, z = self._products(_rows(right), _rows(left), normal=True)
        return self._columns(y), self._columns(z)

    def normalized_image(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return y and ``X^H y``, in one read of X unless its square leaves the range of its precision."""
        if not self._takes(q):
            return PlainMatrix(self.like).normalized_image(q)
        y, z = self._products(_rows(q), None, normal=True)
        image = self._columns(y)
        if self._is_in_range(*compiled.normalise(y, z)):
            return image, self._columns(z)
        return image, self.adjoint_times(image)

    def rank_one_tangent(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, list[Any]]:
        """Return W, S and three numbers in one read of X; see :meth:`Matrix.rank_one_tangent`."""
        if not self._takes(a, b):
            return PlainMatrix(self.like).rank_one_tangent(a, b)
        a_rows, b_rows = _rows(a), _rows(b)
        xb, back = self._products(b_rows, a_rows, normal=True)
        (left, right), table = self._room(2), np.empty((len(xb), 3))
        return self._tangent(left, right, table, compiled.rank_one_tangent(a_rows, xb, back, left, right, table))

    def sketched_tangent(self, g: Matrix, test: Tensor) -> tuple[Tensor, Tensor, list[Any]] | None:
        """Return what ``rank_one_tangent`` does for y = G test at unit norm and G^H y, in one call of the loops.

        ``test`` is ``(m, 1)``, or has one for each matrix.  None: G does not suit the loops, its products leave the
        range of their precision, or the work is worth more than one thread.
        """
        given = self._one_call(g, test, 2 * test.shape[-1])
        if given is None:
            return None
        (left, right), table = self._room(2), np.empty((self.like.shape[:-2].numel(), 3))
        smallest, largest, kept = compiled.sketched_tangent(*given, left, right, table)
        return self._tangent(left, right, table, kept) if self._is_in_range(smallest, largest) else None

    def sketched_tangent_of_rank_k(self, g: Matrix, test: Tensor) -> tuple[Tensor, Tensor, Small, Small] | None:
        """Return W = [a, X b'], S = X^H W, c and R for a = orth(G test) and b = G^H a, by the loops alone.

        ``test`` is ``(m, k)``; b', c and R are those of :mod:`projunn_manifold.moves.rank_k`.  None: G does not suit
        the loops, or its products leave the range of their precision.
        """
        k = test.shape[-1]
        known = self._known(g, test, 2 * k)
        if known is None:
            return None
        g, rows = known
        left, right = self._room(2 * k)
        cores = self._small_room(k), self._small_room(k)
        if self._is_for_one_thread():
            norms = compiled.sketched_tangent_of_rank_k(g._memory, self._memory, rows, left, right, *cores)
        else:
            a, _ = g._products(rows, None)
            norms = compiled.orthonormalise(a, cores[1])
            _, b = g._products(None, a)
            compiled.rank_k_tangent(self._memory, a, *self._products(b, a, normal=True), left, right, *cores)
        inside, triangle = map(self._small, cores)
        return (self._columns(left), self._columns(right), inside, triangle) if self._is_in_range(*norms) else None

    def sketched_frame(self, g: Matrix, test: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
        """Return P, B, Q, H, C with ``a b^H = (P H + B C) Q^H`` at tall X, for these a and b; None as above."""
        given = self._one_call(g, test, 2 * test.shape[-1])
        if given is None:
            return None
        x, k = self.like, test.shape[-1]
        (p, q), (outside, _) = self._room(2 * k), self._room(k)
        h, c = self._small_room(2 * k), self._small_room(k, 2 * k)
        if not self._is_in_range(*compiled.sketched_frame(*given, p, q, outside, h, c)):
            return None
        inside, rest = (torch.from_numpy(core).view(*x.shape[:-2], *core.shape[1:]) for core in (h, c))
        return self._columns(p), self._columns(outside), self._columns(q), inside, rest

    def reduced_frame(self, u: Matrix, test: Tensor, power: int) -> tuple[Tensor, Tensor, Small] | None:
        """Return X Q, Q = orth((U^H U)^power test) and (X Q)^H U Q; None as above."""
        known = self._known(u, test, test.shape[-1])
        if known is None:
            return None
        u, rows = known
        (p, q), inside = self._room(test.shape[-1]), self._small_room(test.shape[-1])
        if self._is_for_one_thread():
            norms = [compiled.reduced_frame(u._memory, self._memory, rows, power, p, q, inside)]
        else:
            norms, q[:] = [], rows
            for _ in range(power):
                y, q[:] = u._products(q, None, normal=True)
                norms.append(compiled.normalise(y, q))
                compiled.orthonormalise(q, inside)
            p[:], y = self._products(q, None)[0], u._products(q, None)[0]
            for own, image, core in zip(p, y, inside, strict=True):
                compiled.inner_products(own, image, core)
        in_range = all(self._is_in_range(*each) for each in norms)
        return (self._columns(p), self._columns(q), self._small(inside)) if in_range else None

    def _known(self, g: Matrix, test: Tensor, columns: int) -> tuple[CompiledMatrix, Any] | None:
        """Return G, and test columns for each matrix as the loops see them; None: too wide, or not of X's kind."""
        x = self.like
        if not isinstance(g, CompiledMatrix) or g.shape != x.shape or g.like.dtype is not x.dtype:
            return None
        return None if columns > _NARROW else (g, _rows(test.expand(*x.shape[:-2], *test.shape[-2:])))

    def _is_for_one_thread(self) -> bool:
        return len(threads.parts(self.like.shape[:-2].numel(), *self.shape[-2:])) == 1

    def _one_call(self, g: Matrix, test: Tensor, columns: int) -> tuple[Any, Any, Any] | None:
        """Return G, X and the test columns as the loops see them; None as above, or too much for one thread."""
        known = self._known(g, test, columns) if self._is_for_one_thread() else None
        return None if known is None else (known[0]._memory, self._memory, known[1])

    def _room(self, rows: int) -> list[Any]:
        """Return new arrays for thin matrices of both sides, by rows."""
        x = self.like  # PyTorch's memory is aligned, for the update
        return [x.new_empty(x.shape[:-2].numel(), rows, side).numpy() for side in x.shape[-2:]]

    def _small_room(self, rows: int, columns: int | None = None) -> Any:
        """Return a new small matrix for each of X, square if only its rows are given."""
        x = self.like
        shape = (x.shape[:-2].numel(), rows, rows if columns is None else columns)
        return np.empty(shape, np.complex128 if x.is_complex() else np.float64)

    def _small(self, array: Any) -> Small:
        """Return one small matrix for each of X."""
        shape = self.like.shape[:-2]
        return torch.from_numpy(array).view(*shape, *array.shape[1:]) if shape else array[0]

    def _tangent(self, left: Any, right: Any, table: Any, kept: float) -> tuple[Tensor, Tensor, list[Any]]:
        """Return W, S and the numbers; ``kept`` is the smallest ‖a'‖²/‖a‖²."""
        x = self.like
        if kept < _LITTLE:
            right[:, 1:] = self._products(None, left[:, 1:].copy())[1]
        single = x.dim() == 2
        numbers = table[0].tolist() if single else list(torch.from_numpy(table).view(*x.shape[:-2], 3).unbind(-1))
        return self._columns(left), self._columns(right), numbers

    def _is_in_range(self, smallest: float, largest: float) -> bool:
        """Return whether squares of these numbers keep their digits."""
        info = torch.finfo(self.like.dtype)
        return math.sqrt(info.tiny / info.eps) < smallest and largest < math.sqrt(info.max * info.eps)

    def add_product_(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        """Make of X ``scale X + left right^H``, in one pass, and return it."""
        x = self.like
        if not self._takes(left, right):
            return PlainMatrix(x).add_product_(left, right, scale)
        self._write_sum(x, left, right, scale)
        torch.autograd.graph.increment_version(x)
        return x

    def plus_product(self, left: Tensor, right: Tensor) -> Tensor:
        """Return ``X + left right^H`` in fresh memory."""
        if not self._takes(left, right):
            return PlainMatrix(self.like).plus_product(left, right)
        y = _empty_like(self.like)
        self._write_sum(y, left, right)
        return y

    def _takes(self, *thin: Tensor) -> bool:
        """Return whether the loops can take these thin matrices."""
        x = self.like
        for t in thin:
            if t.dtype is not x.dtype or t.shape[-1] >= _WIDEST or not context.is_plain(t):
                return False
            if t.dim() != x.dim() or (t.dim() > 2 and t.shape[:-2] != x.shape[:-2]):
                return False
        return True

    def _products(self, right: Any, left: Any, normal: bool = False) -> tuple[Any, Any]:
        """Return ``Y = X right`` and ``X^H left``, or ``X^H [Y, left]`` if ``normal``; all thin matrices by rows.

        NumPy ``(batch, k, n)`` and ``(batch, k, m)``; without a factor, its product has no rows.
        """
        array, given = self._memory, left if right is None else right
        batch, n, m = len(array), array.shape[1], self.like.shape[-1]
        right = np.empty((batch, 0, m), given.dtype) if right is None else right
        left = np.empty((batch, 0, n), given.dtype) if left is None else left
        y = np.empty((batch, right.shape[1], n), given.dtype)
        loops = compiled.complex_products if self.like.is_complex() else compiled.products
        parts = threads.parts(batch, n, m)
        shared = 1 if batch > 1 else len(parts)  # threads that share a matrix have sums of their own
        z = np.zeros((shared, batch, left.shape[1] + normal * right.shape[1], m), y.dtype)
        calls = [(array, right, y, left, z[c % shared], normal, *part) for c, part in enumerate(parts)]
        threads.in_parallel(loops, calls)
        return y, z[0] if shared == 1 else z.sum(0)

    def _write_sum(self, y: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
        """Write ``scale X + left right^H`` to y, which may be X."""
        x = self.like
        source, left_rows, right_rows = self._memory, _rows(left), _rows(right)
        parts = threads.parts(len(source), *x.shape[-2:])
        target = source if y is x else _interleaved(_array(y))
        loops = compiled.complex_add_product if x.is_complex() else compiled.add_product
        given = (target, source, y is not x, float(scale), left_rows, right_rows)
        threads.in_parallel(loops, [(*given, *part) for part in parts])

    def _columns(self, rows: Any) -> Tensor:  # NumPy (batch, k, n) -> (*batch, n, k), stored by columns
        if self.like.dim() == 2:
            return torch.from_numpy(rows[0].T)
        return torch.from_numpy(rows).view(*self.like.shape[:-2], *rows.shape[1:]).mT


def compiled_loops() -> Any:
    """Return the module of compiled loops, or None where they cannot be used."""
    if not loops_are_usable():
        return None
    from projunn_manifold.linalg import kernels  # which imports numba

    return kernels


def _suits_loops(x: Tensor) -> bool:
    """Return whether the compiled loops can take x."""
    global compiled
    if compiled is None or not x.is_cpu or not x.is_contiguous() or x.dtype not in dense.DTYPES or not x.numel():
        return False
    if context.traced() or not context.is_plain(x):
        return False
    if compiled is NOT_YET:
        compiled = compiled_loops()
    return compiled is not None


def _rank_one_tangent(x: Matrix, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, list[Any]]:
    """Return W, S and three numbers by two products; see :meth:`Matrix.rank_one_tangent`."""
    xb = x.times(b)
    wide = _side_by_side(xb, a).to(dense.high_precision(xb))
    gram = wide[..., :1].mH @ wide
    bb, overlap = gram[..., 0, 0].real, gram[..., 0, 1]
    rho = overlap.real / bb.clamp_min(torch.finfo(bb.dtype).tiny)
    a = torch.addcmul(wide[..., 1:], wide[..., :1], rho.to(wide)[..., None, None], value=-1).to(xb.dtype)
    left = _side_by_side(xb, a)
    numbers: list[Any] = [dense.squared_norm(a), bb, overlap.imag if xb.is_complex() else 0.0]
    if _is_readable_number(bb):
        numbers = [number.item() if isinstance(number, Tensor) else number for number in numbers]
    return left, x.adjoint_times(left), numbers


def _is_readable_number(t: Tensor) -> bool:
    """Return whether this one-element tensor can become a Python number without a wait or the loss of a derivative."""
    return t.numel() == 1 and t.is_cpu and context.readable(t) and not context.is_differentiated(t)


def _side_by_side(u: Tensor, v: Tensor) -> Tensor:  # (*batch, n, 1) twice -> (*batch, n, 2), stored by columns
    return torch.cat((u.mT, v.mT), -2).mT


# -- memory, as the loops see it ---------------------------------------------------------------------------


def _array(t: Tensor) -> Any:  # (*batch, n, m) -> NumPy (batch, n, m), C-contiguous like t
    array = (t.detach() if t.requires_grad else t).numpy()
    return array[None] if array.ndim == 2 else array.reshape(t.shape[:-2].numel(), *t.shape[-2:])


def _rows(t: Tensor) -> Any:  # (*batch, n, k) -> NumPy (batch, k, n), C-contiguous
    return np.ascontiguousarray(_array(t).swapaxes(1, 2))


def _interleaved(array: Any) -> Any:  # (batch, n, m) complex -> (batch, n, 2m) real view; real arrays as they are
    return array.view(array.real.dtype) if array.dtype.kind == "c" else array


def _empty_like(x: Tensor) -> Tensor:
    """Return new memory of x's shape; NumPy's large pages make 64 MB four times faster to write than torch.empty's."""
    size = x.numel() * x.itemsize
    if size < _MAPPED:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    memory = np.empty(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return torch.from_numpy(memory[start : start + size]).view(x.dtype).view(x.shape)
