"""Compiled loops for :mod:`projunn_manifold.linalg.products`: every element of a large matrix is loaded once.

Arrays are C-contiguous: a stack of real matrices ``(batch, n, m)``, and thin factors by rows, ``(batch, k, n)``
or ``(batch, k, m)``.  A complex matrix comes as the real one of its interleaved real and imaginary parts, twice
as wide, and its factors complex.  A call works on the matrices ``t0 <= t < t1`` and their rows
``i0 <= i < i1``, so that threads can share a stack or a matrix; the loops release Python's global lock.
Sums may be taken in any order, but in updates; NaN and infinity keep their meaning.

The innermost loops are written out for four rows of the matrix and one or two factors (updates: one or four rows and
two or four factors): so the compiler keeps all sums in registers and uses each load for several multiplications.

All loops are in one module, long as it is: numba invalidates its cache by the date of the function's own file, and
would not notice a change of a function in another file that it calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numba.extending
import numpy as np
from numpy.polynomial import chebyshev

_FLAGS = {"nsz", "arcp", "contract", "reassoc"}
_CACHE = 2**15  # bytes of the first-level cache
_BAND = 2**18  # bytes of a matrix that stay in the second-level cache


def _compiled(function: Callable[..., Any], flags: set[str] = _FLAGS) -> Callable[..., Any]:
    try:
        return numba.njit(nogil=True, fastmath=flags, cache=True)(function)
    except RuntimeError:  # no folder to keep the machine code in: compile once in every process
        return numba.njit(nogil=True, fastmath=flags)(function)


def _compiled_in_order(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop whose sums are taken as written: what is added to X first, and X, which is rounded once, last."""
    return _compiled(function, _FLAGS - {"reassoc"})


# -- products: Y = X R and Z += X^T L, or Z += X^T [Y, L] in the same read of X --------------------------------


@_compiled
def products(
    x: Any, right: Any, y: Any, left: Any, z: Any, normal: bool, t0: int, t1: int, i0: int, i1: int
) -> None:  # pragma: no cover
    """``y = X right`` and ``z += X^T left``; if ``normal``, ``z += X^T [y, left]``."""
    for t in range(t0, t1):
        _products(x[t, i0:i1], right[t], y[t, :, i0:i1], left[t, :, i0:i1], z[t], normal)


@_compiled
def complex_products(
    x: Any, right: Any, y: Any, left: Any, z: Any, normal: bool, t0: int, t1: int, i0: int, i1: int
) -> None:  # pragma: no cover
    """``y = X right`` and ``z += X^H left``; if ``normal``, ``z += X^H [y, left]``.

    Re and Im of X v are the products of the interleaved matrix with conj(v) and i conj(v), and X^H a follows
    from its adjoint products with Re a and Im a.
    """
    k, r, m = right.shape[1], left.shape[1], right.shape[2]
    v = np.empty((2 * k, x.shape[2]), x.dtype)
    s = np.empty((2 * k, i1 - i0), x.dtype)
    a = np.empty((2 * r, i1 - i0), x.dtype)
    q = np.empty((2 * z.shape[1], x.shape[2]), x.dtype)
    for t in range(t0, t1):
        for c in range(k):
            _interleave_conjugate(right[t, c], v[2 * c], v[2 * c + 1])
        for c in range(r):
            for i in range(i1 - i0):
                a[2 * c, i], a[2 * c + 1, i] = left[t, c, i0 + i].real, left[t, c, i0 + i].imag
        q[:] = 0
        _products(x[t, i0:i1], v, s, a, q, normal)
        for c in range(k):
            for i in range(i1 - i0):
                y[t, c, i0 + i] = s[2 * c, i] + 1j * s[2 * c + 1, i]
        for c in range(z.shape[1]):
            for j in range(m):  # X^H a = conj(X^T Re a) + i conj(X^T Im a)
                re, im = q[2 * c], q[2 * c + 1]
                z[t, c, j] += (re[2 * j] + im[2 * j + 1]) + 1j * (im[2 * j] - re[2 * j + 1])


@_compiled
def _interleave_conjugate(v: Any, re: Any, im: Any) -> None:  # pragma: no cover
    """Write conj(v) and i conj(v), interleaved."""
    for j in range(v.shape[0]):
        re[2 * j], re[2 * j + 1] = v[j].real, -v[j].imag
        im[2 * j], im[2 * j + 1] = v[j].imag, v[j].real


@_compiled
def _products(x: Any, right: Any, y: Any, left: Any, z: Any, normal: bool) -> None:  # pragma: no cover
    n, k, r = x.shape[0], right.shape[0], left.shape[0]
    whole = n - n % 4
    if normal and k == 1 and r == 0:
        _normal_one(x[:whole], right[0], y[0], z[0])
    elif normal and k == 2 and r == 0:
        _normal_two(x[:whole], right[0], right[1], y[0], y[1], z[0], z[1])
    elif normal and k == 1 and r == 1:
        _tangent_one(x[:whole], right[0], left[0], y[0], z[0], z[1])
    elif normal and k == 2 and r == 2:
        _tangent_two(
            x[:whole], right[0], right[1], left[0], left[1], y[0], y[1], z[0], z[1], z[2], z[3]
        )  # fmt: skip
    else:
        band = max(4, _BAND // (x.shape[1] * x.itemsize) // 4 * 4)
        for lo in range(0, whole, band):
            hi = min(lo + band, whole)
            _times(x[lo:hi], right, y[:, lo:hi])
            if normal:
                _adjoint(x[lo:hi], y[:, lo:hi], z[:k])
            _adjoint(x[lo:hi], left[:, lo:hi], z[z.shape[0] - r :])
    for i in range(whole, n):
        for c in range(k):
            y[c, i] = _dot(x[i], right[c])
            if normal:
                _add_row(y[c, i], x[i], z[c])
        for c in range(r):
            _add_row(left[c, i], x[i], z[z.shape[0] - r + c])


@_compiled
def _times(x: Any, right: Any, y: Any) -> None:  # pragma: no cover
    k = right.shape[0]
    for c in range(0, k - 1, 2):
        _times_two(x, right[c], right[c + 1], y[c], y[c + 1])
    if k % 2:
        _times_one(x, right[k - 1], y[k - 1])


@_compiled
def _adjoint(x: Any, left: Any, z: Any) -> None:  # pragma: no cover
    r = left.shape[0]
    for c in range(0, r - 1, 2):
        _adjoint_two(x, left[c], left[c + 1], z[c], z[c + 1])
    if r % 2:
        _adjoint_one(x, left[r - 1], z[r - 1])


# The two-sided products of one or two columns are fused by hand: a fifth faster than the separate loops.


@_compiled
def _normal_one(x: Any, v: Any, y: Any, z: Any) -> None:  # pragma: no cover
    zero = x.dtype.type(0)
    for i in range(0, x.shape[0], 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        s0, s1, s2, s3 = zero, zero, zero, zero
        for j in range(v.shape[0]):
            s0 += x0[j] * v[j]
            s1 += x1[j] * v[j]
            s2 += x2[j] * v[j]
            s3 += x3[j] * v[j]
        y[i], y[i + 1], y[i + 2], y[i + 3] = s0, s1, s2, s3
        for j in range(v.shape[0]):
            z[j] += s0 * x0[j] + s1 * x1[j] + s2 * x2[j] + s3 * x3[j]


@_compiled
def _normal_two(x: Any, v: Any, w: Any, y: Any, u: Any, z: Any, q: Any) -> None:  # pragma: no cover
    zero = x.dtype.type(0)
    for i in range(0, x.shape[0], 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        s0, s1, s2, s3 = zero, zero, zero, zero
        r0, r1, r2, r3 = zero, zero, zero, zero
        for j in range(v.shape[0]):
            s0 += x0[j] * v[j]
            s1 += x1[j] * v[j]
            s2 += x2[j] * v[j]
            s3 += x3[j] * v[j]
            r0 += x0[j] * w[j]
            r1 += x1[j] * w[j]
            r2 += x2[j] * w[j]
            r3 += x3[j] * w[j]
        y[i], y[i + 1], y[i + 2], y[i + 3] = s0, s1, s2, s3
        u[i], u[i + 1], u[i + 2], u[i + 3] = r0, r1, r2, r3
        for j in range(v.shape[0]):
            z[j] += s0 * x0[j] + s1 * x1[j] + s2 * x2[j] + s3 * x3[j]
            q[j] += r0 * x0[j] + r1 * x1[j] + r2 * x2[j] + r3 * x3[j]


@_compiled
def _tangent_one(x: Any, v: Any, a: Any, y: Any, z: Any, p: Any) -> None:  # pragma: no cover
    zero = x.dtype.type(0)
    for i in range(0, x.shape[0], 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        a0, a1, a2, a3 = a[i], a[i + 1], a[i + 2], a[i + 3]
        s0, s1, s2, s3 = zero, zero, zero, zero
        for j in range(v.shape[0]):
            s0 += x0[j] * v[j]
            s1 += x1[j] * v[j]
            s2 += x2[j] * v[j]
            s3 += x3[j] * v[j]
            p[j] += a0 * x0[j] + a1 * x1[j] + a2 * x2[j] + a3 * x3[j]
        y[i], y[i + 1], y[i + 2], y[i + 3] = s0, s1, s2, s3
        for j in range(v.shape[0]):
            z[j] += s0 * x0[j] + s1 * x1[j] + s2 * x2[j] + s3 * x3[j]


@_compiled
def _tangent_two(
    x: Any, v: Any, w: Any, a: Any, b: Any, y: Any, u: Any, z: Any, q: Any, p: Any, o: Any
) -> None:  # pragma: no cover
    zero = x.dtype.type(0)
    for i in range(0, x.shape[0], 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        a0, a1, a2, a3 = a[i], a[i + 1], a[i + 2], a[i + 3]
        b0, b1, b2, b3 = b[i], b[i + 1], b[i + 2], b[i + 3]
        s0, s1, s2, s3 = zero, zero, zero, zero
        r0, r1, r2, r3 = zero, zero, zero, zero
        for j in range(v.shape[0]):
            s0 += x0[j] * v[j]
            s1 += x1[j] * v[j]
            s2 += x2[j] * v[j]
            s3 += x3[j] * v[j]
            r0 += x0[j] * w[j]
            r1 += x1[j] * w[j]
            r2 += x2[j] * w[j]
            r3 += x3[j] * w[j]
            p[j] += a0 * x0[j] + a1 * x1[j] + a2 * x2[j] + a3 * x3[j]
            o[j] += b0 * x0[j] + b1 * x1[j] + b2 * x2[j] + b3 * x3[j]
        y[i], y[i + 1], y[i + 2], y[i + 3] = s0, s1, s2, s3
        u[i], u[i + 1], u[i + 2], u[i + 3] = r0, r1, r2, r3
        for j in range(v.shape[0]):
            z[j] += s0 * x0[j] + s1 * x1[j] + s2 * x2[j] + s3 * x3[j]
            q[j] += r0 * x0[j] + r1 * x1[j] + r2 * x2[j] + r3 * x3[j]


@_compiled
def _times_one(x: Any, v: Any, y: Any) -> None:  # pragma: no cover
    zero = x.dtype.type(0)
    for i in range(0, x.shape[0], 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        s0, s1, s2, s3 = zero, zero, zero, zero
        for j in range(v.shape[0]):
            s0 += x0[j] * v[j]
            s1 += x1[j] * v[j]
            s2 += x2[j] * v[j]
            s3 += x3[j] * v[j]
        y[i], y[i + 1], y[i + 2], y[i + 3] = s0, s1, s2, s3


@_compiled
def _times_two(x: Any, v: Any, w: Any, y: Any, u: Any) -> None:  # pragma: no cover
    zero = x.dtype.type(0)
    for i in range(0, x.shape[0], 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        s0, s1, s2, s3 = zero, zero, zero, zero
        r0, r1, r2, r3 = zero, zero, zero, zero
        for j in range(v.shape[0]):
            s0 += x0[j] * v[j]
            s1 += x1[j] * v[j]
            s2 += x2[j] * v[j]
            s3 += x3[j] * v[j]
            r0 += x0[j] * w[j]
            r1 += x1[j] * w[j]
            r2 += x2[j] * w[j]
            r3 += x3[j] * w[j]
        y[i], y[i + 1], y[i + 2], y[i + 3] = s0, s1, s2, s3
        u[i], u[i + 1], u[i + 2], u[i + 3] = r0, r1, r2, r3


@_compiled
def _adjoint_one(x: Any, a: Any, z: Any) -> None:  # pragma: no cover
    for i in range(0, x.shape[0], 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        a0, a1, a2, a3 = a[i], a[i + 1], a[i + 2], a[i + 3]
        for j in range(z.shape[0]):
            z[j] += a0 * x0[j] + a1 * x1[j] + a2 * x2[j] + a3 * x3[j]


@_compiled
def _adjoint_two(x: Any, a: Any, b: Any, z: Any, q: Any) -> None:  # pragma: no cover
    for i in range(0, x.shape[0], 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        a0, a1, a2, a3 = a[i], a[i + 1], a[i + 2], a[i + 3]
        b0, b1, b2, b3 = b[i], b[i + 1], b[i + 2], b[i + 3]
        for j in range(z.shape[0]):
            z[j] += a0 * x0[j] + a1 * x1[j] + a2 * x2[j] + a3 * x3[j]
            q[j] += b0 * x0[j] + b1 * x1[j] + b2 * x2[j] + b3 * x3[j]


@_compiled
def _dot(x0: Any, v: Any) -> Any:  # pragma: no cover
    s = x0.dtype.type(0)
    for j in range(x0.shape[0]):
        s += x0[j] * v[j]
    return s


@_compiled
def _add_row(a: Any, x0: Any, z: Any) -> None:  # pragma: no cover
    for j in range(z.shape[0]):
        z[j] += a * x0[j]


# -- updates: Y = c X + L R^H; Y may be X itself ----------------------------------------------------------------


@_compiled
def add_product(
    y: Any, x: Any, fresh: bool, scale: float, left: Any, right: Any, t0: int, t1: int, i0: int, i1: int
) -> None:  # pragma: no cover
    """``y = scale x + left right^T``; unless ``fresh``, x is y."""
    for t in range(t0, t1):
        _add_product(y[t, i0:i1], x[t, i0:i1], fresh, scale, left[t, :, i0:i1], right[t])


@_compiled
def complex_add_product(
    y: Any, x: Any, fresh: bool, scale: float, left: Any, right: Any, t0: int, t1: int, i0: int, i1: int
) -> None:  # pragma: no cover
    """``y = scale x + left right^H`` likewise, as w conj(v) = Re w conj(v) + Im w (i conj(v))."""
    r = left.shape[1]
    w = np.empty((2 * r, i1 - i0), x.dtype)
    v = np.empty((2 * r, x.shape[2]), x.dtype)
    for t in range(t0, t1):
        for c in range(r):
            _interleave_conjugate(right[t, c], v[2 * c], v[2 * c + 1])
            for i in range(i1 - i0):
                w[2 * c, i], w[2 * c + 1, i] = left[t, c, i0 + i].real, left[t, c, i0 + i].imag
        _add_product(y[t, i0:i1], x[t, i0:i1], fresh, scale, w, v)


@_compiled
def _add_product(y: Any, x: Any, fresh: bool, scale: float, w: Any, v: Any) -> None:  # pragma: no cover
    n, m, r = y.shape[0], y.shape[1], w.shape[0]
    wide = r * m * y.itemsize > _CACHE // 2  # the factors' rows leave the cache: use them for four rows of Y at once
    band = max(4, _BAND // (m * y.itemsize) // 4 * 4) if fresh or r > 4 else n
    for lo in range(0, n, band):
        hi = min(lo + band, n)
        whole = lo + (hi - lo) // 4 * 4 if wide else lo
        if fresh or r < 2:
            for i in range(lo, hi):
                _scale_row(scale if r < 2 else 1.0, x[i], y[i])
        s = y.dtype.type(scale)  # by which the first columns that are added multiply Y
        for c in range(0, r - 3, 4):
            w0, w1, w2, w3 = w[c, lo:hi], w[c + 1, lo:hi], w[c + 2, lo:hi], w[c + 3, lo:hi]
            _add_four_to_four(s, y[lo:whole], w0, w1, w2, w3, v[c], v[c + 1], v[c + 2], v[c + 3])
            _add_four(s, y[lo:hi], whole - lo, w0, w1, w2, w3, v[c], v[c + 1], v[c + 2], v[c + 3])
            s = y.dtype.type(1)
        c = r - r % 4
        if r % 4 >= 2:
            _add_two_to_four(s, y[lo:whole], w[c, lo:hi], w[c + 1, lo:hi], v[c], v[c + 1])
            _add_two(s, y[lo:hi], whole - lo, w[c, lo:hi], w[c + 1, lo:hi], v[c], v[c + 1])
        if r % 2:
            for i in range(lo, hi):
                _add_row(w[r - 1, i], v[r - 1], y[i])


@_compiled
def _scale_row(scale: float, x0: Any, y0: Any) -> None:  # pragma: no cover
    factor = x0.dtype.type(scale)
    for j in range(x0.shape[0]):
        y0[j] = factor * x0[j]


@_compiled_in_order
def _add_four(
    s: float, x: Any, start: int, a: Any, b: Any, c: Any, d: Any, u: Any, v: Any, w: Any, q: Any
) -> None:  # pragma: no cover
    for i in range(start, x.shape[0]):
        row, ai, bi, ci, di = x[i], a[i], b[i], c[i], d[i]
        for j in range(row.shape[0]):
            row[j] = s * row[j] + (ai * u[j] + bi * v[j] + ci * w[j] + di * q[j])


@_compiled_in_order
def _add_two(s: float, x: Any, start: int, a: Any, b: Any, u: Any, v: Any) -> None:  # pragma: no cover
    for i in range(start, x.shape[0]):
        row, ai, bi = x[i], a[i], b[i]
        for j in range(row.shape[0]):
            row[j] = s * row[j] + (ai * u[j] + bi * v[j])


@_compiled_in_order
def _add_four_to_four(
    s: float, x: Any, a: Any, b: Any, c: Any, d: Any, u: Any, v: Any, w: Any, q: Any
) -> None:  # pragma: no cover
    for i in range(0, x.shape[0], 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        a0, a1, a2, a3 = a[i], a[i + 1], a[i + 2], a[i + 3]
        b0, b1, b2, b3 = b[i], b[i + 1], b[i + 2], b[i + 3]
        c0, c1, c2, c3 = c[i], c[i + 1], c[i + 2], c[i + 3]
        d0, d1, d2, d3 = d[i], d[i + 1], d[i + 2], d[i + 3]
        for j in range(u.shape[0]):
            x0[j] = s * x0[j] + (a0 * u[j] + b0 * v[j] + c0 * w[j] + d0 * q[j])
            x1[j] = s * x1[j] + (a1 * u[j] + b1 * v[j] + c1 * w[j] + d1 * q[j])
            x2[j] = s * x2[j] + (a2 * u[j] + b2 * v[j] + c2 * w[j] + d2 * q[j])
            x3[j] = s * x3[j] + (a3 * u[j] + b3 * v[j] + c3 * w[j] + d3 * q[j])


@_compiled_in_order
def _add_two_to_four(s: float, x: Any, a: Any, b: Any, u: Any, v: Any) -> None:  # pragma: no cover
    for i in range(0, x.shape[0], 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        a0, a1, a2, a3 = a[i], a[i + 1], a[i + 2], a[i + 3]
        b0, b1, b2, b3 = b[i], b[i + 1], b[i + 2], b[i + 3]
        for j in range(u.shape[0]):
            x0[j] = s * x0[j] + (a0 * u[j] + b0 * v[j])
            x1[j] = s * x1[j] + (a1 * u[j] + b1 * v[j])
            x2[j] = s * x2[j] + (a2 * u[j] + b2 * v[j])
            x3[j] = s * x3[j] + (a3 * u[j] + b3 * v[j])


# -- thin factors: everything between two passes over a large matrix -------------------------------


@_compiled
def normalise(y: Any, z: Any) -> Any:  # pragma: no cover
    """Divide y and z by the norm of y, for every matrix of a stack; return the smallest and the largest norm.

    A zero y counts as of norm 1.
    """
    smallest, largest = np.inf, 0.0
    for t in range(y.shape[0]):
        norm = _norm(y[t])
        for c in range(y.shape[1]):
            _divide(y[t, c], norm)
        for c in range(z.shape[1]):
            _divide(z[t, c], norm)
        smallest, largest = _widened(smallest, largest, norm, norm)
    return smallest, largest


@_compiled
def _widened(smallest: float, largest: float, low: float, high: float) -> Any:  # pragma: no cover
    """Return a range that holds both ranges; NaN stays NaN."""
    smallest = low if low < smallest or low != low else smallest
    largest = high if high > largest or high != high else largest
    return smallest, largest


@_compiled
def _norm(y: Any) -> float:  # pragma: no cover
    """Norm of all rows together, safe at the ends of the range; 1 for zero."""
    total = _squared_norms(y, 1.0)
    if 1e-280 < total < 1e280 or total != total:
        return float(np.sqrt(total))
    unit = 0.0
    for c in range(y.shape[0]):
        for j in range(y.shape[1]):
            unit = max(unit, abs(y[c, j].real), abs(y[c, j].imag))
    if unit == 0:
        return 1.0
    return float(unit * np.sqrt(_squared_norms(y, unit)))


@_compiled
def _squared_norms(y: Any, unit: float) -> float:  # pragma: no cover
    total = 0.0
    for c in range(y.shape[0]):
        total += _squared_norm(y[c], unit)
    return total


@_compiled
def _squared_norm(v: Any, unit: float) -> float:  # pragma: no cover
    total = 0.0
    for j in range(v.shape[0]):
        re, im = v[j].real / unit, v[j].imag / unit
        total += re * re + im * im
    return total


@_compiled
def _divide(v: Any, norm: float) -> None:  # pragma: no cover
    for j in range(v.shape[0]):
        v[j] = v[j] / norm


def _any_products(x: Any, right: Any, y: Any, left: Any, z: Any, normal: bool) -> None:
    """Stand for :func:`products` or :func:`complex_products` of all matrices and rows, by the dtype of the factors."""
    raise NotImplementedError("called by compiled code only")


@numba.extending.overload(_any_products)
def _chosen_products(x: Any, right: Any, y: Any, left: Any, z: Any, normal: bool) -> Callable[..., None]:
    loops = complex_products if isinstance(right.dtype, numba.types.Complex) else products

    def call(x: Any, right: Any, y: Any, left: Any, z: Any, normal: bool) -> None:  # pragma: no cover
        loops(x, right, y, left, z, normal, 0, x.shape[0], 0, x.shape[1])

    return call


@_compiled
def sketched_tangent(g: Any, x: Any, test: Any, left: Any, right: Any, numbers: Any) -> Any:  # pragma: no cover
    """Normalise y = G test, one column, and write what :func:`rank_one_tangent` does for the gradient y (G^H y)^H.

    Return the smallest and the largest norm of G test, and the smallest ‖a'‖²/‖a‖² of all matrices.
    """
    batch, _, m = right.shape
    n = left.shape[2]
    nothing = np.empty((batch, 0, n), left.dtype)
    y, z = np.empty((batch, 1, n), left.dtype), np.zeros((batch, 1, m), left.dtype)
    _any_products(g, test, y, nothing, z, True)
    smallest, largest = normalise(y, z)
    xb, back = np.empty((batch, 1, n), left.dtype), np.zeros((batch, 2, m), left.dtype)
    _any_products(x, z, xb, y, back, True)
    return smallest, largest, rank_one_tangent(y, xb, back, left, right, numbers)


@_compiled
def sketched_tangent_of_rank_k(
    g: Any, x: Any, test: Any, left: Any, right: Any, inside: Any, triangle: Any
) -> Any:  # pragma: no cover
    """Do the same for k columns: a = orth(G test), b = G^H a, and X b' = X b - a c with c = a^H X b.

    Write ``left`` = [a, X b'], ``right`` = X^H [a, X b'], ``inside`` = c and ``triangle``, the R of X b' = Q R.
    Return the smallest and the largest norm of G test.
    """
    batch, k, n = left.shape[0], left.shape[1] // 2, left.shape[2]
    m = right.shape[2]
    nothing, no_image = np.empty((batch, 0, n), left.dtype), np.empty((batch, 0, m), left.dtype)
    a, b = np.empty((batch, k, n), left.dtype), np.zeros((batch, k, m), left.dtype)
    _any_products(g, test, a, nothing, b, False)
    smallest, largest = orthonormalise(a, triangle)
    _any_products(g, no_image, nothing, a, b, False)
    xb, back = np.empty((batch, k, n), left.dtype), np.zeros((batch, 2 * k, m), left.dtype)
    _any_products(x, b, xb, a, back, True)
    rank_k_tangent(x, a, xb, back, left, right, inside, triangle)
    return smallest, largest


@_compiled
def orthonormalise(y: Any, r: Any) -> Any:  # pragma: no cover
    """Replace the columns of each Y by an orthonormal basis, and write R; return the least and largest norm of Y."""
    smallest, largest = normalise(y, np.empty((len(y), 0, 0), y.dtype))
    for t in range(len(y)):
        _orthonormalise(y[t], r[t])
    return smallest, largest


@_compiled
def rank_k_tangent(
    x: Any, a: Any, xb: Any, back: Any, left: Any, right: Any, inside: Any, triangle: Any
) -> None:  # pragma: no cover
    """Write ``left``, ``right``, ``inside`` and ``triangle`` from a, X b and ``back`` = X^H [X b, a]; X b is lost."""
    batch, k, n = a.shape
    nothing, no_image = np.empty((batch, 0, n), a.dtype), np.empty((batch, 0, right.shape[2]), a.dtype)
    for t in range(batch):
        left[t, :k], left[t, k:] = a[t], xb[t]
        right[t, :k], right[t, k:] = back[t, k:], back[t, :k]
        size = _squared_norms(xb[t], 1.0)
        inner_products(a[t], xb[t], inside[t])
        _subtract(left[t, k:], inside[t], a[t])
        _subtract(right[t, k:], inside[t], right[t, :k])
        if not _squared_norms(left[t, k:], 1.0) >= size / 64:  # the difference has lost digits
            inner_products(a[t], left[t, k:], triangle[t])
            _subtract(left[t, k:], triangle[t], a[t])
            right[t, k:] = 0
            _any_products(
                x[t : t + 1], no_image[:1], nothing[:1], left[t : t + 1, k:].copy(), right[t : t + 1, k:], False
            )
        xb[t] = left[t, k:]
        _orthonormalise(xb[t], triangle[t])


@_compiled
def sketched_frame(g: Any, x: Any, test: Any, p: Any, q: Any, outside: Any, h: Any, c: Any) -> Any:  # pragma: no cover
    """Do the same at tall X: write q = orth([b, X^H a]), p = X q, and ``outside``, a basis of a's part outside range X.

    Of a b^H = (p H + outside C) q^H write H and C.  Matrix after matrix, so that X stays in the cache.  Return the
    smallest and the largest norm of G test.
    """
    batch, k, n = outside.shape
    m, smallest, largest = q.shape[2], np.inf, 0.0
    nothing, no_image = np.empty((1, 0, n), p.dtype), np.empty((1, 0, m), p.dtype)
    a, rest, known = np.empty((1, k, n), p.dtype), np.empty((1, k, n), p.dtype), np.empty((1, k, m), p.dtype)
    r, triangle = np.empty((2 * k, 2 * k), h.dtype), np.empty((k, k), h.dtype)
    for t in range(batch):
        here, frame = x[t : t + 1], q[t : t + 1]
        b = np.zeros((1, k, m), p.dtype)
        _any_products(g[t : t + 1], test[t : t + 1], a, nothing, b, k == 1)
        smallest, largest = _widened(smallest, largest, *normalise(a, b))
        if k > 1:
            _orthonormalise(a[0], triangle)
            _any_products(g[t : t + 1], no_image, nothing, a, b, False)
        known[:] = 0
        _any_products(here, no_image, nothing, a, known, False)
        frame[0, :k], frame[0, k:] = b[0], known[0]
        _orthonormalise(frame[0], r)
        _any_products(here, frame, p[t : t + 1], nothing, no_image, False)
        rest[:] = a
        _subtract(rest[0], r[:, k:], p[t])
        known[:] = 0
        _any_products(here, no_image, nothing, rest, known, False)
        _any_products(here, known, a, nothing, no_image, False)
        outside[t] = rest[0] - a[0]
        _orthonormalise(outside[t], triangle)
        _times_adjoint(r[:, k:], r[:, :k], h[t])
        _times_adjoint(triangle, r[:, :k], c[t])
    return smallest, largest


@_compiled
def _times_adjoint(a: Any, b: Any, c: Any) -> None:  # pragma: no cover
    """``c = a b^H`` of small matrices."""
    for i in range(a.shape[0]):
        for j in range(b.shape[0]):
            s = 0.0 * a[0, 0]
            for l in range(a.shape[1]):
                s += a[i, l] * np.conj(b[j, l])
            c[i, j] = s


@_compiled
def reduced_frame(u: Any, x: Any, basis: Any, power: int, p: Any, q: Any, inside: Any) -> Any:  # pragma: no cover
    """Write q = orth((U^H U)^power basis), p = X q and ``inside`` = p^H U q.

    Return the smallest and the largest norm of a product with U.
    """
    batch, k, n = p.shape
    nothing, smallest, largest = np.empty((batch, 0, n), p.dtype), np.inf, 0.0
    q[:] = basis
    y = np.empty((batch, k, n), p.dtype)
    for _ in range(power):
        z = np.zeros(q.shape, p.dtype)
        _any_products(u, q, y, nothing, z, True)
        smallest, largest = _widened(smallest, largest, *normalise(y, z))
        q[:] = z
        orthonormalise(q, inside)
    _any_products(x, q, p, nothing, q[:, :0], False)
    _any_products(u, q, y, nothing, q[:, :0], False)
    for t in range(batch):
        inner_products(p[t], y[t], inside[t])
    return smallest, largest


@_compiled
def _orthonormalise(y: Any, r: Any) -> None:  # pragma: no cover
    """Replace the columns of Y by an orthonormal basis, and write R of Y = Q R; Householder's reflections I - τ v v^H.

    A column that depends on those before it, or is zero, gets some unit vector.
    """
    k = y.shape[0]
    scales = np.zeros(k)
    for c in range(k):
        norm = np.sqrt(_squared_norm(y[c, c:], 1.0))
        first = 1.0 * y[c, c]
        phase = first / abs(first) if first != 0 else 1.0 + 0.0 * first
        for j in range(c + 1, k):
            r[j, c] = 0
        r[c, c] = -phase * norm
        if norm > 0:
            y[c, c] += phase * norm
            scales[c] = 1 / (norm * (norm + abs(first)))
        for d in range(c + 1, k):
            _reflect(scales[c], y[c, c:], y[d, c:])
            r[c, d] = y[d, c]
    for c in range(k - 1, -1, -1):
        v = y[c].copy()
        y[c] = 0
        y[c, c] = 1
        for d in range(c, k):
            _reflect(scales[c], v[c:], y[d, c:])


@_compiled
def _reflect(tau: float, v: Any, y: Any) -> None:  # pragma: no cover
    """``y -= tau v v^H y``."""
    s = 0.0 * v[0]
    for j in range(v.shape[0]):
        s += np.conj(1.0 * v[j]) * y[j]
    s *= tau
    for j in range(v.shape[0]):
        y[j] -= s * v[j]


@_compiled
def inner_products(a: Any, y: Any, c: Any) -> None:  # pragma: no cover
    """``c = a^H y``."""
    for i in range(a.shape[0]):
        for j in range(y.shape[0]):
            s = 0.0 * a[0, 0]
            for l in range(a.shape[1]):
                s += np.conj(1.0 * a[i, l]) * y[j, l]
            c[i, j] = s


@_compiled
def _subtract(y: Any, c: Any, a: Any) -> None:  # pragma: no cover
    """``y -= a c``."""
    for j in range(y.shape[0]):
        for i in range(a.shape[0]):
            for l in range(a.shape[1]):
                y[j, l] -= c[i, j] * a[i, l]


@_compiled
def rank_one_tangent(a: Any, xb: Any, back: Any, left: Any, right: Any, numbers: Any) -> float:  # pragma: no cover
    """Write ``[X b, a']``, ``X^H [X b, a']`` and ‖a'‖², ‖X b‖², Im b^H X^H a.

    a' = a - ρ X b with ρ = Re b^H X^H a / ‖X b‖², where ``back`` is X^H [X b, a].
    Return the smallest ‖a'‖²/‖a‖² of all matrices.
    """
    smallest = 1.0
    for t in range(a.shape[0]):
        bb, re, im = 0.0, 0.0, 0.0
        for i in range(a.shape[2]):
            u, v = xb[t, 0, i], a[t, 0, i]
            ure, uim, vre, vim = 1.0 * u.real, 1.0 * u.imag, 1.0 * v.real, 1.0 * v.imag
            bb += ure * ure + uim * uim
            re += ure * vre + uim * vim
            im += ure * vim - uim * vre
        rho = re / bb if bb != 0 else 0.0 * re
        size, aa = 0.0, 0.0
        for i in range(a.shape[2]):
            whole = a[t, 0, i]
            rest = whole - rho * xb[t, 0, i]
            left[t, 0, i], left[t, 1, i] = xb[t, 0, i], rest
            size += 1.0 * whole.real * whole.real + 1.0 * whole.imag * whole.imag
            aa += rest.real * rest.real + rest.imag * rest.imag
        for j in range(back.shape[2]):
            right[t, 0, j], right[t, 1, j] = back[t, 0, j], back[t, 1, j] - rho * back[t, 0, j]
        numbers[t, 0], numbers[t, 1], numbers[t, 2] = aa, bb, im
        if aa < smallest * size:
            smallest = aa / size
    return smallest


# -- cores: functions of a small skew-Hermitian E with ‖E‖_F <= 1, by products, in double precision --------------


def _polar_series() -> Any:
    """Return the coefficients of χ(s) = (1 - (1 + s)^(-1/2)) / s in powers of t = 2 s - 1, exact on 0 <= s <= 1."""

    def chi(t: Any) -> Any:
        root = np.sqrt(1 + (t + 1) / 2)
        return 1 / (root * (1 + root))

    return chebyshev.cheb2poly(chebyshev.chebinterpolate(chi, 21))


_POLAR = _polar_series()
_EXPONENTIAL = np.array([1 / math.factorial(j + 2) for j in range(18)])


@_compiled
def core_of_phases(e: Any, polar: bool, increment: Any) -> bool:  # pragma: no cover
    """Write f(E), the increment of D (``polar``) or of T, or return False where E is too long."""
    psi, phi = np.empty_like(e), np.empty_like(e)
    return _functions(e, polar, psi, phi, increment)


@_compiled
def core_of_rank_k(omega: Any, r: Any, scale: float, polar: bool, core: Any) -> bool:  # pragma: no cover
    """Write the core of a rank-k move on square X, ``[[f, τ/2 φ], [-τ/2 φ, -τ²/4 ψ]]``, all their blocks ₁₁.

    They are functions of ``E = τ [[Ω, R^H / 2], [-R / 2, 0]]``.  Return False where E is too long.
    """
    k = len(r)
    e = np.zeros((2 * k, 2 * k), r.dtype)
    for i in range(k):
        for j in range(k):
            e[i, j] = scale * omega[i, j]
            e[k + i, j] = -scale / 2 * r[i, j]
            e[j, k + i] = scale / 2 * np.conj(r[i, j])
    psi, phi, f = np.empty_like(e), np.empty_like(e), np.empty_like(e)
    if not _functions(e, polar, psi, phi, f):
        return False
    for i in range(k):
        for j in range(k):
            core[i, j] = f[i, j]
            core[i, k + j] = scale / 2 * phi[i, j]
            core[k + i, j] = -scale / 2 * phi[i, j]
            core[k + i, k + j] = -scale * scale / 4 * psi[i, j]
    return True


@_compiled
def _functions(e: Any, polar: bool, psi: Any, phi: Any, f: Any) -> bool:  # pragma: no cover
    """Write ψ(E), φ = I + E ψ and f = E φ; return False where ‖E‖_F > 1.

    For T, ψ is the series Σ E^j / (j + 2)!; for D it is (I + E) χ(-E²).
    """
    if not _squared_norms(e, 1.0) <= 1:
        return False
    if polar:
        for i in range(len(e)):  # φ holds t = -2 E² - I
            phi[i] = 0
            phi[i, i] = -1
        _add_small_product(-2.0, e, e, phi)
        _horner(_POLAR, phi, f, psi)
        psi[:] = f
        _add_small_product(1.0, e, f, psi)
    else:
        _horner(_EXPONENTIAL, e, psi, phi)
    for i in range(len(e)):
        phi[i] = 0
        phi[i, i] = 1
    _add_small_product(1.0, e, psi, phi)
    f[:] = 0
    _add_small_product(1.0, e, phi, f)
    return True


@_compiled
def _horner(coefficients: Any, x: Any, y: Any, other: Any) -> None:  # pragma: no cover
    """Write Σ c_j X^j to y; ``other`` is overwritten."""
    y[:] = 0
    for i in range(len(x)):
        y[i, i] = coefficients[-1]
    for step in range(len(coefficients) - 2, -1, -1):
        other[:] = y
        y[:] = 0
        for i in range(len(x)):
            y[i, i] = coefficients[step]
        _add_small_product(1.0, x, other, y)


@_compiled
def _add_small_product(c: float, a: Any, b: Any, y: Any) -> None:  # pragma: no cover
    """``y += c a b``."""
    for i in range(len(a)):
        for l in range(len(b)):
            factor = c * a[i, l]
            for j in range(b.shape[1]):
                y[i, j] += factor * b[l, j]
