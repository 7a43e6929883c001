"""The kernels of ``projunn_manifold.linalg.gpu``; this module imports Triton.

A program has a block of rows of one matrix; in the last kernel also a tile of columns.

PARTS is 2 for complex matrices, whose entries are pairs in memory, and 1 for real ones.  To the kernels a complex
matrix M, n x n, is a real one of 2n columns.  The product of one of its rows with q is that of 2n real numbers with
conj(q) (real part) and with i conj(q) (imaginary part); X + p q^H adds the real part of p times the pairs of conj(q)
and its imaginary part times those of i conj(q).  So only thin vectors are ever taken apart.  What the functions return
as an imaginary part has no meaning for real matrices.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["sketch", "tangent", "update"]


@triton.jit
def _column(q, rows, inside, PARTS: tl.constexpr):
    """Return real and imaginary part of a column's entries."""
    real = tl.load(q + rows * PARTS, mask=inside, other=0.0)
    imaginary = real
    if PARTS == 2:
        imaginary = tl.load(q + rows * PARTS + 1, mask=inside, other=0.0)
    return real, imaginary


@triton.jit
def _store(q, rows, inside, real, imaginary, PARTS: tl.constexpr):
    """Write a column's entries."""
    tl.store(q + rows * PARTS, real, mask=inside)
    if PARTS == 2:
        tl.store(q + rows * PARTS + 1, imaginary, mask=inside)


@triton.jit
def _conjugate(q, places, inside, PARTS: tl.constexpr):
    """Return the numbers that conj(q) and i conj(q) have at these places in memory."""
    row = tl.load(q + places, mask=inside, other=0.0)
    row_i = row
    if PARTS == 2:
        row = tl.where(places % 2 == 0, row, -row)
        row_i = tl.load(q + (places ^ 1), mask=inside, other=0.0)
    return row, row_i


@triton.jit
def _times(a, b, u, v, PARTS: tl.constexpr):
    """Return real and imaginary part of (a + ib)(u + iv)."""
    real = a * u
    imaginary = real
    if PARTS == 2:
        real, imaginary = real - b * v, a * v + b * u
    return real, imaginary


@triton.jit
def _image(start, q, m, inside, PARTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Return the product of a block of rows, which start there, with the column q."""
    real = tl.zeros([ROWS], dtype=q.dtype.element_ty)
    imaginary = tl.zeros([ROWS], dtype=q.dtype.element_ty)
    for low in range(0, m, TILE):
        places = low + tl.arange(0, TILE)
        here = inside[:, None] & (places < m)[None, :]
        tile = tl.load(start + places[None, :], mask=here, other=0.0)
        row, row_i = _conjugate(q, places, places < m, PARTS)
        real += tl.sum(tile * row[None, :], 1)
        if PARTS == 2:
            imaginary += tl.sum(tile * row_i[None, :], 1)
    return real, imaginary


@triton.jit
def _adjoint_image(tile, real, imaginary, PARTS: tl.constexpr, TILE: tl.constexpr):
    """Return the product of a tile's adjoint with a column."""
    image = tl.sum(tile * real[:, None], 0)
    if PARTS == 2:
        a, b = tl.split(tl.reshape(image, [TILE // 2, 2]))
        c, d = tl.split(tl.reshape(tl.sum(tile * imaginary[:, None], 0), [TILE // 2, 2]))
        image = tl.interleave(a + d, c - b)
    return image


@triton.jit
def sketch(g, z, y, back, n, PARTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Write y = G z, and of G^H y the part that this block of rows adds."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    m = n * PARTS
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    start = g + matrix * n * m + rows[:, None].to(tl.int64) * m
    real, imaginary = _image(start, z + matrix * m, m, inside, PARTS, ROWS, TILE)
    _store(y + matrix * m, rows, inside, real, imaginary, PARTS)
    target = back + (matrix * tl.num_programs(0) + block) * m
    for low in range(0, m, TILE):
        places = low + tl.arange(0, TILE)
        here = inside[:, None] & (places < m)[None, :]
        tile = tl.load(start + places[None, :], mask=here, other=0.0)
        tl.store(target + places, _adjoint_image(tile, real, imaginary, PARTS, TILE), mask=places < m)


@triton.jit
def tangent(x, b, y, xb, images, gram, n, PARTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Write X b, and of X^H [X b, y] and of ‖X b‖², (X b)^H y and ‖y‖² the parts that this block of rows adds."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    m = n * PARTS
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    start = x + matrix * n * m + rows[:, None].to(tl.int64) * m
    real, imaginary = _image(start, b + matrix * m, m, inside, PARTS, ROWS, TILE)
    _store(xb + matrix * m, rows, inside, real, imaginary, PARTS)
    y_real, y_imaginary = _column(y + matrix * m, rows, inside, PARTS)
    part = matrix * tl.num_programs(0) + block
    for low in range(0, m, TILE):
        places = low + tl.arange(0, TILE)
        here = inside[:, None] & (places < m)[None, :]
        tile = tl.load(start + places[None, :], mask=here, other=0.0)
        target = images + part * 2 * m + places
        tl.store(target, _adjoint_image(tile, real, imaginary, PARTS, TILE), mask=places < m)
        tl.store(target + m, _adjoint_image(tile, y_real, y_imaginary, PARTS, TILE), mask=places < m)
    u, v = real.to(tl.float64), y_real.to(tl.float64)
    bb, h, yy = u * u, u * v, v * v
    if PARTS == 2:
        p, q = imaginary.to(tl.float64), y_imaginary.to(tl.float64)
        bb, h, yy = bb + p * p, h + p * q, yy + q * q
        tl.store(gram + part * 4 + 3, tl.sum(u * q - p * v, 0))
    tl.store(gram + part * 4, tl.sum(bb, 0))
    tl.store(gram + part * 4 + 1, tl.sum(h, 0))
    tl.store(gram + part * 4 + 2, tl.sum(yy, 0))


@triton.jit
def _phi(square, POLAR: tl.constexpr):
    """Return Re φ(θ) and Im φ(θ) / θ, even functions, from θ²; see ``projunn_manifold.moves.angle``."""
    if POLAR:
        secant = tl.sqrt(1 + square)
        real, slope = 1 / secant, 1 / (secant * (1 + secant))
    else:
        theta = tl.sqrt(square)
        safe = tl.where(theta > 0, theta, 1.0)
        real = tl.where(theta > 0, tl.sin(safe) / safe, 1.0)
        quarter = tl.where(theta > 0, tl.sin(safe / 2) / (safe / 2), 1.0)
        slope = quarter * quarter / 2
    return real, slope


@triton.jit
def _core(square, s, POLAR: tl.constexpr, PARTS: tl.constexpr):
    """Return c = (φ(θ+) + φ(θ-)) / 2 and d = i (φ(θ+) - φ(θ-)) / 2p, θ± = s ± p and p² = square, each in two parts."""
    if PARTS == 1:
        c, d = _phi(square, POLAR)
        c_i, d = c, -d
        d_i = d
    else:
        p = tl.sqrt(square)
        plus, minus = s + p, s - p
        c_plus, d_plus = _phi(plus * plus, POLAR)
        c_minus, d_minus = _phi(minus * minus, POLAR)
        d_plus, d_minus = plus * d_plus, minus * d_minus
        twice = tl.where(p > 0, 2 * p, 1.0)  # p = 0: a' or X b is zero, and d does not matter
        c, c_i = (c_plus + c_minus) / 2, (d_plus + d_minus) / 2
        d, d_i = (d_minus - d_plus) / twice, (c_plus - c_minus) / twice
    return c, c_i, d, d_i


@triton.jit
def update(
    x,
    xb,
    y,
    right,
    gram,
    rate,
    lost,
    limit,
    n,
    blocks,
    POLAR: tl.constexpr,
    LEAST: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Add W F S^H to a tile of X, F from the Gram matrix of [X b, y]; nothing if the step is beyond the limit.

    W = [X b, a'], a' = y - ρ X b.  F is computed for these columns over ‖X b‖ and ‖y‖: then its entries have the size
    of the step, whatever that of the gradient is.  Squared norms below LEAST, which have too few digits, count as
    zero.
    """
    block, across, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    m = n * PARTS
    parts = tl.arange(0, BLOCKS)
    known, within = gram + (matrix * blocks + parts) * 4, parts < blocks
    bb = tl.sum(tl.load(known, mask=within, other=0.0), 0)
    h = tl.sum(tl.load(known + 1, mask=within, other=0.0), 0)
    yy = tl.sum(tl.load(known + 2, mask=within, other=0.0), 0)
    bb, yy = tl.where(bb < LEAST, 0.0, bb), tl.where(yy < LEAST, 0.0, yy)
    rho = h / tl.where(bb > 0, bb, 1.0)  # then (X b)^H a' has no real part
    of_b, of_y = 1 / tl.sqrt(tl.where(bb > 0, bb, 1.0)), 1 / tl.sqrt(tl.where(yy > 0, yy, 1.0))
    half = -0.5 * tl.load(rate + matrix) * tl.sqrt(bb) * of_y
    aa = tl.maximum(yy - rho * h, 0.0) * of_y * of_y
    s, square = 0.0, half * half * aa
    length = square
    if PARTS == 2:
        s = half * of_b * of_y * tl.sum(tl.load(known + 3, mask=within, other=0.0), 0)
        length += s * s
    is_kept = 2 * length <= limit  # which NaN is not
    if (block == 0) & (across == 0):
        tl.store(lost + matrix, tl.where(is_kept, 0, 1).to(tl.uint8))
    if is_kept:
        dtype = x.dtype.element_ty
        c, c_i, d, d_i = _core(square, s, POLAR, PARTS)
        c, c_i, d, d_i = half * c, half * c_i, half * half * d, half * half * d_i
        rows, places = block * ROWS + tl.arange(0, ROWS), across * TILE + tl.arange(0, TILE)
        in_rows, in_places = rows < n, places < m
        u, u_i = _column(xb + matrix * m, rows, in_rows, PARTS)
        v, v_i = _column(y + matrix * m, rows, in_rows, PARTS)
        p, p_i = _conjugate(right + matrix * 2 * m, places, in_places, PARTS)
        q, q_i = _conjugate(right + matrix * 2 * m + m, places, in_places, PARTS)
        ratio = rho.to(dtype)
        v, v_i, q, q_i = v - ratio * u, v_i - ratio * u_i, q - ratio * p, q_i - ratio * p_i
        cu, cu_i = _times((c * of_b).to(dtype), (c_i * of_b).to(dtype), u, u_i, PARTS)
        cv, cv_i = _times((c * of_y).to(dtype), (c_i * of_y).to(dtype), v, v_i, PARTS)
        du, du_i = _times((d * aa * of_b).to(dtype), (d_i * aa * of_b).to(dtype), u, u_i, PARTS)
        dv, dv_i = _times((d * of_y).to(dtype), (d_i * of_y).to(dtype), v, v_i, PARTS)
        p, p_i, q, q_i = p * of_b.to(dtype), p_i * of_b.to(dtype), q * of_y.to(dtype), q_i * of_y.to(dtype)
        change = (cv + du)[:, None] * p[None, :] + (dv - cu)[:, None] * q[None, :]
        if PARTS == 2:
            change += (cv_i + du_i)[:, None] * p_i[None, :] + (dv_i - cu_i)[:, None] * q_i[None, :]
        place = x + matrix * n * m + rows[:, None].to(tl.int64) * m + places[None, :]
        here = in_rows[:, None] & in_places[None, :]
        tl.store(place, tl.load(place, mask=here, other=0.0) + change, mask=here)
