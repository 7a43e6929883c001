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

__all__ = ["accumulate", "frame", "measure", "power", "sketch", "straighten", "tangent", "turn", "update"]


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
def _pull_back(start, target, a, a_i, b, b_i, m, inside, PARTS: tl.constexpr, TILE: tl.constexpr):
    """Write the products of a block's adjoint with two columns."""
    for low in range(0, m, TILE):
        places = low + tl.arange(0, TILE)
        here = inside[:, None] & (places < m)[None, :]
        tile = tl.load(start + places[None, :], mask=here, other=0.0)
        tl.store(target + places, _adjoint_image(tile, a, a_i, PARTS, TILE), mask=places < m)
        tl.store(target + m + places, _adjoint_image(tile, b, b_i, PARTS, TILE), mask=places < m)


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
    _pull_back(start, images + part * 2 * m, real, imaginary, y_real, y_imaginary, m, inside, PARTS, TILE)
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
def _lengths(gram, LEAST: tl.constexpr, PARTS: tl.constexpr):
    """Return what the tangent's lengths are, from the Gram matrix of [X b, y].

    These are ‖X b‖ / ‖y‖, ρ, 1 / ‖X b‖, 1 / ‖y‖, ‖a'‖² / ‖y‖² and Im (X b)^H y / ‖X b‖‖y‖.  Squared norms below LEAST,
    which have too few digits, count as zero.
    """
    bb, h, yy = tl.load(gram), tl.load(gram + 1), tl.load(gram + 2)
    bb, yy = tl.where(bb < LEAST, 0.0, bb), tl.where(yy < LEAST, 0.0, yy)
    rho = h / tl.where(bb > 0, bb, 1.0)  # then (X b)^H a' has no real part
    of_b, of_y = 1 / tl.sqrt(tl.where(bb > 0, bb, 1.0)), 1 / tl.sqrt(tl.where(yy > 0, yy, 1.0))
    turned = 0.0 * of_b
    if PARTS == 2:
        turned = of_b * of_y * tl.load(gram + 3)
    return tl.sqrt(bb) * of_y, rho, of_b, of_y, tl.maximum(yy - rho * h, 0.0) * of_y * of_y, turned


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
    POLAR: tl.constexpr,
    LEAST: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add W F S^H to a tile of X, F from the Gram matrix of [X b, y]; nothing if the step is beyond the limit.

    W = [X b, a'], a' = y - ρ X b.  F is computed for these columns over ‖X b‖ and ‖y‖: then its entries have the size
    of the step, whatever that of the gradient is.
    """
    block, across, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    m = n * PARTS
    size, rho, of_b, of_y, aa, turned = _lengths(gram + matrix * 4, LEAST, PARTS)
    half = -0.5 * tl.load(rate + matrix) * size
    s, square = half * turned, half * half * aa
    is_kept = 2 * (square + s * s) <= limit  # which NaN is not
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


# -- moments: a tangent is added to a dense vector u, and the step goes along the part of u in two columns ----------


@triton.jit
def measure(
    gram,
    square,
    lost,
    LIMIT: tl.constexpr,
    LEAST: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write the squared length of the tangent of y y^H G / ‖y‖², and whether it is beyond the limit: then 0."""
    matrix = tl.program_id(0).to(tl.int64)
    size, _, _, _, aa, turned = _lengths(gram + matrix * 4, LEAST, PARTS)
    found = size * size * (aa + turned * turned) / 2
    is_kept = found <= LIMIT  # which NaN is not
    tl.store(square + matrix, tl.where(is_kept, found, 0.0))
    tl.store(lost + matrix, tl.where(is_kept, 0, 1).to(tl.uint8))


@triton.jit
def accumulate(
    u,
    xb,
    y,
    right,
    gram,
    lost,
    kept,
    weight,
    n,
    LEAST: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Make a tile of u ``kept`` times itself and ``weight`` times the tangent ½ (a' b^H - X b a'^H X) / ‖y‖²."""
    block, across, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    m = n * PARTS
    dtype = u.dtype.element_ty
    rows, places = block * ROWS + tl.arange(0, ROWS), across * TILE + tl.arange(0, TILE)
    in_rows, in_places = rows < n, places < m
    here = in_rows[:, None] & in_places[None, :]
    place = u + matrix * n * m + rows[:, None].to(tl.int64) * m + places[None, :]
    c = tl.load(kept + matrix).to(dtype)
    old = tl.where(c != 0, tl.load(place, mask=here, other=0.0), 0.0) * c
    if tl.load(lost + matrix) == 0:
        size, rho, of_b, of_y, _, _ = _lengths(gram + matrix * 4, LEAST, PARTS)
        half = (0.5 * tl.load(weight + matrix) * size).to(dtype)
        of_b, of_y, ratio = of_b.to(dtype), of_y.to(dtype), rho.to(dtype)
        p, p_i = _column(xb + matrix * m, rows, in_rows, PARTS)
        a, a_i = _column(y + matrix * m, rows, in_rows, PARTS)
        s, s_i = _conjugate(right + matrix * 2 * m, places, in_places, PARTS)
        t, t_i = _conjugate(right + matrix * 2 * m + m, places, in_places, PARTS)
        a, a_i, t, t_i = a - ratio * p, a_i - ratio * p_i, t - ratio * s, t_i - ratio * s_i
        a, a_i, p, p_i = half * (a * of_y), half * (a_i * of_y), half * (p * of_b), half * (p_i * of_b)
        s, s_i, t, t_i = s * of_b, s_i * of_b, t * of_y, t_i * of_y
        old += a[:, None] * s[None, :] - p[:, None] * t[None, :]
        if PARTS == 2:
            old += a_i[:, None] * s_i[None, :] - p_i[:, None] * t_i[None, :]
    tl.store(place, old, mask=here)


@triton.jit
def _images(start, q, m, inside, PARTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Return the products of a block of rows, which start there, with both columns of q."""
    a = tl.zeros([ROWS], dtype=q.dtype.element_ty)
    b, a_i, b_i = a, a, a
    for low in range(0, m, TILE):
        places = low + tl.arange(0, TILE)
        here = inside[:, None] & (places < m)[None, :]
        tile = tl.load(start + places[None, :], mask=here, other=0.0)
        row, row_i = _conjugate(q, places, places < m, PARTS)
        other, other_i = _conjugate(q + m, places, places < m, PARTS)
        a += tl.sum(tile * row[None, :], 1)
        b += tl.sum(tile * other[None, :], 1)
        if PARTS == 2:
            a_i += tl.sum(tile * row_i[None, :], 1)
            b_i += tl.sum(tile * other_i[None, :], 1)
    return a, a_i, b, b_i


@triton.jit
def power(u, q, back, n, PARTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Write the part of u^H u q, two columns, that this block of rows adds."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    m = n * PARTS
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    start = u + matrix * n * m + rows[:, None].to(tl.int64) * m
    a, a_i, b, b_i = _images(start, q + matrix * 2 * m, m, inside, PARTS, ROWS, TILE)
    target = back + (matrix * tl.num_programs(0) + block) * 2 * m
    _pull_back(start, target, a, a_i, b, b_i, m, inside, PARTS, TILE)


@triton.jit
def straighten(v, q, m, LAST: tl.constexpr, EPS: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr):
    """Write v, two columns, with the first at unit norm and the second without what lies along the first.

    Where v is nearly of rank one, only rounding remains of the second.  So this is done twice, which is enough (Kahan
    and Parlett), in double precision: then the columns are orthonormal.  The ``LAST`` time, what loses most of its norm
    again was rounding along the first column, and becomes zero.
    """
    matrix = tl.program_id(0).to(tl.int64)
    start, target = v + matrix * 2 * m, q + matrix * 2 * m
    aa = tl.zeros([TILE], dtype=tl.float64)
    ab, ab_i, bb = aa, aa, aa
    for low in range(0, m, TILE):
        places = low + tl.arange(0, TILE)
        a = tl.load(start + places, mask=places < m, other=0.0).to(tl.float64)
        b = tl.load(start + m + places, mask=places < m, other=0.0).to(tl.float64)
        aa += a * a
        ab += a * b
        bb += b * b
        if PARTS == 2:
            ab_i += a * _times_minus_i(start + m, places, m)
    aa, ab, ab_i, bb = tl.sum(aa, 0), tl.sum(ab, 0), tl.sum(ab_i, 0), tl.sum(bb, 0)
    safe = tl.where(aa > 0, aa, 1.0)
    real, imaginary = ab / safe, ab_i / safe
    rest = bb - (ab * ab + ab_i * ab_i) / safe
    rest = tl.where(2 * rest < bb, float("inf"), rest) if LAST else tl.maximum(rest, 64 * EPS * EPS * bb)
    of_a, of_rest = 1 / tl.sqrt(safe), 1 / tl.sqrt(tl.where(rest > 0, rest, 1.0))
    for low in range(0, m, TILE):
        places = low + tl.arange(0, TILE)
        a = tl.load(start + places, mask=places < m, other=0.0).to(tl.float64)
        b = tl.load(start + m + places, mask=places < m, other=0.0).to(tl.float64) - real * a
        if PARTS == 2:
            b += imaginary * _times_minus_i(start, places, m)
        tl.store(target + places, (a * of_a).to(v.dtype.element_ty), mask=places < m)
        tl.store(target + m + places, (b * of_rest).to(v.dtype.element_ty), mask=places < m)


@triton.jit
def _times_minus_i(q, places, m):
    """Return the numbers that -i q has at these places in memory, in double precision."""
    other = tl.load(q + (places ^ 1), mask=places < m, other=0.0).to(tl.float64)
    return tl.where(places % 2 == 0, other, -other)


@triton.jit
def frame(x, u, q, p, images, inner, n, PARTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Write P = X Q, two columns, and of u^H P and of Ω = skew(P^H u Q) the parts that this block of rows adds.

    Of Ω these are the real and the imaginary part below the diagonal, and the imaginary parts on it.
    """
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    m = n * PARTS
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    offset = matrix * n * m + rows[:, None].to(tl.int64) * m
    a, a_i, b, b_i = _images(x + offset, q + matrix * 2 * m, m, inside, PARTS, ROWS, TILE)
    s, s_i, t, t_i = _images(u + offset, q + matrix * 2 * m, m, inside, PARTS, ROWS, TILE)
    _store(p + matrix * 2 * m, rows, inside, a, a_i, PARTS)
    _store(p + matrix * 2 * m + m, rows, inside, b, b_i, PARTS)
    part = matrix * tl.num_programs(0) + block
    _pull_back(u + offset, images + part * 2 * m, a, a_i, b, b_i, m, inside, PARTS, TILE)
    a, b, s, t = a.to(tl.float64), b.to(tl.float64), s.to(tl.float64), t.to(tl.float64)
    below = b * s - a * t
    if PARTS == 2:
        a_i, b_i, s_i, t_i = a_i.to(tl.float64), b_i.to(tl.float64), s_i.to(tl.float64), t_i.to(tl.float64)
        below += b_i * s_i - a_i * t_i
        tl.store(inner + part * 4 + 1, tl.sum(b * s_i - b_i * s + a * t_i - a_i * t, 0) / 2)
        tl.store(inner + part * 4 + 2, tl.sum(a * s_i - a_i * s, 0))
        tl.store(inner + part * 4 + 3, tl.sum(b * t_i - b_i * t, 0))
    tl.store(inner + part * 4, tl.sum(below, 0) / 2)


@triton.jit
def turn(
    x,
    u,
    p,
    q,
    images,
    inner,
    rate,
    lost,
    limit,
    n,
    POLAR: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add P Γ Q^H to a tile of X and P Γ (u^H P)^H to that of u; nothing if the step is beyond the limit.

    Γ is what the exponential or the polar factor of ``rate`` times Ω, 2 x 2, adds to the identity; see
    ``projunn_manifold.moves.frame``.
    """
    block, across, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    m = n * PARTS
    known, scale = inner + matrix * 4, tl.load(rate + matrix)
    off = scale * tl.load(known)
    square, middle, half, off_i = off * off, 0.0 * off, 0.0 * off, 0.0 * off
    if PARTS == 2:
        off_i = scale * tl.load(known + 1)
        first = scale * tl.load(known + 2)
        last = scale * tl.load(known + 3)
        middle, half = (first + last) / 2, (first - last) / 2
        square += off_i * off_i + half * half
    is_kept = 2 * (square + middle * middle) <= limit  # which NaN is not
    if (block == 0) & (across == 0):
        tl.store(lost + matrix, tl.where(is_kept, 0, 1).to(tl.uint8))
    if is_kept:
        dtype = x.dtype.element_ty
        c, c_i, d, d_i = _core(square, middle, POLAR, PARTS)
        mean, mean_i = square * d, square * d_i  # Γ = mean I + slope [[half, i off*], [-i off, -half]]
        slope, slope_i = 0.0 * c, c
        if PARTS == 2:
            mean, mean_i = mean - middle * c_i, mean_i + middle * c
            slope, slope_i = middle * d - c_i, middle * d_i + c
        above, above_i = _times(slope, slope_i, off_i, off, 2)  # i off*
        below, below_i = _times(slope, slope_i, off_i, -off, 2)  # -i off
        upper, upper_i = (mean + half * slope).to(dtype), (mean_i + half * slope_i).to(dtype)
        lower, lower_i = (mean - half * slope).to(dtype), (mean_i - half * slope_i).to(dtype)
        above, above_i, below, below_i = above.to(dtype), above_i.to(dtype), below.to(dtype), below_i.to(dtype)
        rows, places = block * ROWS + tl.arange(0, ROWS), across * TILE + tl.arange(0, TILE)
        in_rows, in_places = rows < n, places < m
        a, a_i = _column(p + matrix * 2 * m, rows, in_rows, PARTS)
        b, b_i = _column(p + matrix * 2 * m + m, rows, in_rows, PARTS)
        v, v_i = _times(upper, upper_i, a, a_i, PARTS)
        w, w_i = _times(below, below_i, b, b_i, PARTS)
        v, v_i = v + w, v_i + w_i
        w, w_i = _times(above, above_i, a, a_i, PARTS)
        a, a_i = _times(lower, lower_i, b, b_i, PARTS)
        w, w_i = w + a, w_i + a_i
        place = matrix * n * m + rows[:, None].to(tl.int64) * m + places[None, :]
        here = in_rows[:, None] & in_places[None, :]
        _add_two(x + place, q + matrix * 2 * m, places, here, v, v_i, w, w_i, m, PARTS)
        _add_two(u + place, images + matrix * 2 * m, places, here, v, v_i, w, w_i, m, PARTS)


@triton.jit
def _add_two(place, columns, places, here, v, v_i, w, w_i, m, PARTS: tl.constexpr):
    """Add v s^H + w t^H to a tile, [s, t] the columns."""
    s, s_i = _conjugate(columns, places, places < m, PARTS)
    t, t_i = _conjugate(columns + m, places, places < m, PARTS)
    change = v[:, None] * s[None, :] + w[:, None] * t[None, :]
    if PARTS == 2:
        change += v_i[:, None] * s_i[None, :] + w_i[:, None] * t_i[None, :]
    tl.store(place, tl.load(place, mask=here, other=0.0) + change, mask=here)
