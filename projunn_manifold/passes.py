r"""Products of a large matrix with thin ones, in as few reads of the large matrix as possible.

Every update of this package is made of these few operations: but for a few columns (drift, samples) a large matrix is
read and written nowhere else in a step.  :func:`both` computes :math:`Y = X R` and :math:`X^H [Y, L]` in one read of X;
:func:`add_product_` adds :math:`L R^H` in one read and one write.

On CPU the loops of :mod:`~projunn_manifold.kernels` do this, if numba is installed (the extra ``fast``), the
matrix is contiguous and nothing is to be differentiated.  Otherwise, and on other devices, PyTorch's own
products do, at one read for each.  Both give the same result to rounding.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from projunn_manifold import linalg, rows

__all__ = [
    "add_product_",
    "adjoint_times",
    "both",
    "compiled",
    "cosine",
    "plus_product",
    "rank_one_tangent",
    "times",
    "unit_image",
]

#: The compiled loops, or None: then PyTorch's products are used throughout.
compiled: Any
try:
    from projunn_manifold import kernels as compiled
except ImportError as error:
    compiled = None
    if importlib.util.find_spec("numba") is not None:
        warnings.warn(f"numba is installed, but cannot be used, and steps will be slower: {error}", stacklevel=2)

_LITTLE = 1 / 64  # of a squared norm
_WIDEST = 32  # from here on a matrix product pays for its own blocking
_GRAIN = 2**18  # elements that are worth a thread of their own
_MAPPED = 2**22  # bytes; from here on NumPy asks for large pages
_LINE = 64  # bytes of the cache
_DISPATCH = Tensor.__torch_dispatch__


def times(x: Tensor, q: Tensor) -> Tensor:  # (*batch, n, m), (*batch, m, k) -> (*batch, n, k)
    """Return ``X q``."""
    if _by_loops(x, q):
        return _columns(_products(x, _rows(q), None)[0], x)
    if rows.are_spread(x):
        return rows.gathered(x, times(rows.local(x), q))
    return x @ q if q.shape[-1] == 1 else (q.mT.contiguous() @ x.mT).mT  # a thin product is fast from the left only


def adjoint_times(x: Tensor, q: Tensor) -> Tensor:  # (*batch, n, m), (*batch, n, k) -> (*batch, m, k)
    """Return ``X^H q``."""
    if _by_loops(x, q):
        return _columns(_products(x, None, _rows(q))[1], x)
    if rows.are_spread(x):
        return rows.summed(x, adjoint_times(rows.local(x), rows.own(x, q)))
    return linalg.adjoint_times(x, q)


def both(x: Tensor, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``Y = X right`` and ``X^H [Y, left]``."""
    if _by_loops(x, right, left):
        y, z = _products(x, _rows(right), _rows(left), normal=True)
        return _columns(y, x), _columns(z, x)
    if rows.are_spread(x):
        y, z = both(rows.local(x), right, rows.own(x, left))
        return rows.gathered(x, y), rows.summed(x, z)
    y = times(x, right)
    return y, adjoint_times(x, torch.cat((y.mT, left.mT), -2).mT)


def unit_image(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:  # (*batch, m, k) -> (*batch, n, k), (*batch, m, k)
    """Return y = X q / ‖X q‖_F and ``X^H y``, for each matrix; y = 0 where X q is.

    Both come from one read of X, unless its square leaves the range of its precision.
    """
    if _by_loops(x, q):
        y, z = _products(x, _rows(q), None, normal=True)
        smallest, largest = compiled.normalise(y, z)
        info = torch.finfo(x.dtype)
        if math.sqrt(info.tiny / info.eps) < smallest and largest < math.sqrt(info.max * info.eps):
            return _columns(y, x), _columns(z, x)
        image = _columns(y, x)
    else:
        image = linalg.of_unit_norm(times(x, q))
    return image, adjoint_times(x, image)


def rank_one_tangent(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, list[Any]]:
    r"""Return W = [X b, a'], S = X^H W and the numbers ‖a'‖², ‖X b‖², Im b^H X^H a, in one read of X.

    a' = a - ρ X b with the real ρ that makes Re b^H X^H a' = 0, and :math:`X^H a' = X^H a - ρ X^H X b`, unless little
    is left of a: then rounding of the difference would count, and X is read once more.  S is made from W, not
    from b: then I + W F W^H stays unitary where X is not quite, and no step enlarges what rounding has left.
    Numbers are ``(*batch,)`` in double precision, or Python's own for a single matrix on CPU: there every
    operator on a tensor would cost more than all the arithmetic that follows.
    """
    if _by_loops(x, a, b):
        a_rows, b_rows = _rows(a), _rows(b)
        xb, back = _products(x, b_rows, a_rows, normal=True)
        left, right = (x.new_empty(len(t), 2, t.shape[-1]).numpy() for t in (a_rows, b_rows))  # aligned, for the update
        table = np.empty((len(xb), 3))
        kept = compiled.rank_one_tangent(a_rows, xb, back, left, right, table)
        if kept < _LITTLE:
            right[:, 1:] = _products(x, None, left[:, 1:].copy())[1]
        single = x.dim() == 2
        numbers = table[0].tolist() if single else list(torch.from_numpy(table).view(*x.shape[:-2], 3).unbind(-1))
        return _columns(left, x), _columns(right, x), numbers
    xb, back = both(x, b, a)
    wide = linalg.high_precision(x.dtype)
    bb, overlap = linalg.squared_norm(xb), (xb.mH.to(wide) @ a.to(wide))[..., 0, 0]
    rho = (overlap.real / torch.where(bb == 0, 1.0, bb)).to(x.real.dtype)[..., None, None]
    size = linalg.squared_norm(a)
    back, xha = back.tensor_split(2, -1)
    a, xha = a - rho * xb, xha - rho * back
    aa = linalg.squared_norm(a)
    if not linalg.readable(x) or (aa < _LITTLE * size).any():
        xha = adjoint_times(x, a)
    numbers = [aa, bb, overlap.imag if x.is_complex() else torch.zeros_like(bb)]
    if all(map(_is_single, numbers)):
        numbers = [number.item() for number in numbers]
    return _side_by_side(xb, a), _side_by_side(back, xha), numbers


def add_product_(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Add ``left right^H`` to x in place and return x; ``(*batch, n, r)`` and ``(*batch, m, r)``."""
    if rows.are_spread(x):
        add_product_(rows.local(x), rows.own(x, left), right)
        return x
    if not _by_loops(x, left, right):
        return linalg.add_product_(x, left, right)
    _add_product(x, x, left, right)
    torch.autograd.graph.increment_version(x)
    return x


def plus_product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``x + left right^H`` in fresh memory of x's layout."""
    if not _by_loops(x, left, right):
        return add_product_(x.clone(), left, right)
    y = _fresh(x)
    _add_product(y, x, left, right)
    return y


def _fresh(x: Tensor) -> Tensor:
    """Return new memory of x's shape.

    From some size on the C library maps every new block page by page, which costs more than to write it; NumPy
    asks for large pages.
    """
    size = x.numel() * x.itemsize
    if size < _MAPPED:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    memory = np.empty(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return torch.from_numpy(memory[start : start + size]).view(x.dtype).view(x.shape)


def _add_product(y: Tensor, x: Tensor, left: Tensor, right: Tensor) -> None:
    source, left_rows, right_rows = _array(x), _rows(left), _rows(right)
    parts = _parts(*source.shape)
    source = _interleaved(source)
    target = source if y is x else _interleaved(_array(y))
    loops = compiled.complex_add_product if x.is_complex() else compiled.add_product
    _in_parallel(loops, [(target, source, y is not x, left_rows, right_rows, *part) for part in parts])


def cosine(x: Tensor, g: Tensor, count: int) -> Any:  # (*batch, n, m) twice -> (*batch,), real
    """Return ``Re<x, g> / (‖x‖ ‖g‖)`` over the first ``count`` rows; 0 where one of them is 0.

    For a single matrix on CPU a number of Python's.
    """
    if _by_loops(x) and _is_plain(g) and g.is_contiguous():
        flat = [_interleaved(_array(t).reshape(-1, t.shape[-2] * t.shape[-1])) for t in (x, g)]
        entries = count * flat[0].shape[1] // x.shape[-2]
        values = np.empty(len(flat[0]), flat[0].dtype)
        compiled.cosines(*flat, entries, values)
        return values.item() if x.dim() == 2 else torch.from_numpy(values).view(x.shape[:-2])
    first = max(0, count - rows.start(x))
    x_rows, g_rows = (rows.local(t)[..., :first, :] for t in (x, g))
    products = (*map(linalg.squared_norm, (x_rows, g_rows)), linalg.frobenius_inner(x_rows, g_rows).double())
    xx, gg, xg = rows.summed(x, torch.stack(products))
    size = (xx * gg).sqrt()
    return xg / torch.where(size == 0, 1.0, size)


def _by_loops(x: Tensor, *thin: Tensor) -> bool:
    """Tell whether the compiled loops can take x and these thin matrices."""
    if compiled is None or not x.is_cpu or not x.is_contiguous() or x.dtype not in linalg.DTYPES or not x.numel():
        return False
    if linalg.traced() or not _is_plain(x):
        return False
    for t in thin:
        if t.dtype is not x.dtype or t.shape[-1] >= _WIDEST or not _is_plain(t):
            return False
        if t.dim() != x.dim() or (t.dim() > 2 and t.shape[:-2] != x.shape[:-2]):
            return False
    return True


def _is_plain(t: Tensor) -> bool:
    """Tell whether t's memory is what it seems: no derivatives to follow, not fake, traced or distributed."""
    if _is_differentiated(t) or t.is_conj() or t.is_neg():
        return False
    return type(t).__torch_dispatch__ is _DISPATCH


def _is_differentiated(t: Tensor) -> bool:
    """Tell whether a derivative may depend on t, backwards or forwards."""
    return (t.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0


def _is_single(number: Tensor) -> bool:
    """Tell whether this tensor of one element can become Python's number without a wait or a derivative lost."""
    return number.numel() == 1 and number.is_cpu and linalg.readable(number) and not _is_differentiated(number)


def _side_by_side(u: Tensor, v: Tensor) -> Tensor:  # (*batch, n, 1) twice -> (*batch, n, 2), stored by columns
    return torch.cat((u.mT, v.mT), -2).mT


def _array(t: Tensor) -> Any:  # (*batch, n, m) -> NumPy (batch, n, m), C-contiguous like t
    array = (t.detach() if t.requires_grad else t).numpy()
    return array[None] if array.ndim == 2 else array.reshape(-1, *t.shape[-2:])


def _rows(t: Tensor) -> Any:  # (*batch, n, k) -> NumPy (batch, k, n), C-contiguous
    return np.ascontiguousarray(_array(t).swapaxes(1, 2))


def _interleaved(array: Any) -> Any:  # (batch, n, m) complex -> (batch, n, 2m) real view; real arrays as they are
    return array.view(array.real.dtype) if array.dtype.kind == "c" else array


def _products(x: Tensor, right: Any, left: Any, normal: bool = False) -> tuple[Any, Any]:
    """Return ``Y = X right`` and ``X^H left``, or ``X^H [Y, left]`` if ``normal``; all thin matrices by rows.

    NumPy ``(batch, k, n)`` and ``(batch, k, m)``; without a factor, its product has no rows.
    """
    array = _array(x)
    batch, n, m = array.shape
    right = np.empty((batch, 0, m), array.dtype) if right is None else right
    left = np.empty((batch, 0, n), array.dtype) if left is None else left
    y = np.empty((batch, right.shape[1], n), array.dtype)
    loops, array = (compiled.complex_products, _interleaved(array)) if x.is_complex() else (compiled.products, array)
    parts = _parts(batch, n, m)
    shared = 1 if batch > 1 else len(parts)  # threads that share a matrix have sums of their own
    z = np.zeros((shared, batch, left.shape[1] + normal * right.shape[1], m), y.dtype)
    _in_parallel(
        loops,
        [(array, right, y, left, z[c % shared], normal, *part) for c, part in enumerate(parts)],
    )
    return y, z[0] if shared == 1 else z.sum(0)


def _columns(rows: Any, x: Tensor) -> Tensor:  # NumPy (batch, k, n) -> (*batch, n, k), stored by columns
    if x.dim() == 2:
        return torch.from_numpy(rows[0].T)
    return torch.from_numpy(rows).view(*x.shape[:-2], *rows.shape[1:]).mT


def _parts(batch: int, n: int, m: int) -> list[tuple[int, int, int, int]]:
    """Cut a stack between its matrices, or a single matrix between rows: ``(t0, t1, i0, i1)`` for each thread."""
    cut = batch if batch > 1 else n
    count = min(torch.get_num_threads(), -(-batch * n * m // _GRAIN), cut)
    if count == 1:
        return [(0, batch, 0, n)]
    ends = [cut * c // count for c in range(count + 1)]
    pieces = list(itertools.pairwise(ends))
    return [(*piece, 0, n) if batch > 1 else (0, 1, *piece) for piece in pieces]


_pool: ThreadPoolExecutor | None = None


def _in_parallel(function: Callable[..., None], calls: list[tuple[Any, ...]]) -> None:
    """Make all calls, the first in this thread, the others in a pool's; return when all have ended."""
    global _pool
    if len(calls) == 1:
        return function(*calls[0])
    pool = _pool = _pool or ThreadPoolExecutor(thread_name_prefix="projunn_manifold")
    others = [pool.submit(function, *call) for call in calls[1:]]
    try:
        function(*calls[0])
    finally:
        wait(others)
    for other in others:
        other.result()


def _forget_pool() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)  # threads do not survive a fork
