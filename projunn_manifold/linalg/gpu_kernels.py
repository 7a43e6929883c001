"""The kernels of ``projunn_manifold.linalg.gpu``; this module imports Triton.

A program has a block of rows of one matrix; in the last kernel also a tile of columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["sketch", "tangent", "update"]


@triton.jit
def _image(start, q, n, inside, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Return the product of a block of rows, which start there, with the column q."""
    image = tl.zeros([ROWS], dtype=q.dtype.element_ty)
    for low in range(0, n, TILE):
        columns = low + tl.arange(0, TILE)
        here = inside[:, None] & (columns < n)[None, :]
        tile = tl.load(start + columns[None, :], mask=here, other=0.0)
        image += tl.sum(tile * tl.load(q + columns, mask=columns < n, other=0.0)[None, :], 1)
    return image


@triton.jit
def sketch(g, z, y, back, n, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Write y = G z, and of G^T y the part that this block of rows adds."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    start = g + matrix * n * n + rows[:, None].to(tl.int64) * n
    image = _image(start, z + matrix * n, n, inside, ROWS, TILE)
    tl.store(y + matrix * n + rows, image, mask=inside)
    target = back + (matrix * tl.num_programs(0) + block) * n
    for low in range(0, n, TILE):
        columns = low + tl.arange(0, TILE)
        here = inside[:, None] & (columns < n)[None, :]
        tile = tl.load(start + columns[None, :], mask=here, other=0.0)
        tl.store(target + columns, tl.sum(tile * image[:, None], 0), mask=columns < n)


@triton.jit
def tangent(x, b, y, xb, images, gram, n, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Write X b, and of X^T [X b, y] and of ‖X b‖², (X b)^T y and ‖y‖² the parts that this block of rows adds."""
    block, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = block * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    start = x + matrix * n * n + rows[:, None].to(tl.int64) * n
    first = _image(start, b + matrix * n, n, inside, ROWS, TILE)
    tl.store(xb + matrix * n + rows, first, mask=inside)
    second = tl.load(y + matrix * n + rows, mask=inside, other=0.0)
    part = matrix * tl.num_programs(0) + block
    for low in range(0, n, TILE):
        columns = low + tl.arange(0, TILE)
        here = inside[:, None] & (columns < n)[None, :]
        tile = tl.load(start + columns[None, :], mask=here, other=0.0)
        tl.store(images + part * 2 * n + columns, tl.sum(tile * first[:, None], 0), mask=columns < n)
        tl.store(images + (part * 2 + 1) * n + columns, tl.sum(tile * second[:, None], 0), mask=columns < n)
    u, v = first.to(tl.float64), second.to(tl.float64)
    tl.store(gram + part * 4, tl.sum(u * u, 0))
    tl.store(gram + part * 4 + 1, tl.sum(u * v, 0))
    tl.store(gram + part * 4 + 2, tl.sum(v * v, 0))


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
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Add W F S^T to a tile of X, F from the Gram matrix of W = [X b, y]; nothing if the step is beyond the limit."""
    block, across, matrix = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts = tl.arange(0, BLOCKS)
    known, within = gram + (matrix * blocks + parts) * 4, parts < blocks
    bb = tl.sum(tl.load(known, mask=within, other=0.0), 0)
    h = tl.sum(tl.load(known + 1, mask=within, other=0.0), 0)
    yy = tl.sum(tl.load(known + 2, mask=within, other=0.0), 0)
    rho = h / tl.where(bb > 0, bb, 1.0)  # a' = y - ρ X b is orthogonal to X b
    aa = tl.maximum(yy - rho * h, 0.0)
    half = -0.5 * tl.load(rate + matrix) / tl.where(yy > 0, yy, 1.0)
    square = half * half * aa * bb  # θ²
    if POLAR:
        secant = tl.sqrt(1 + square)
        c, slope = 1 / secant, 1 / (secant * (1 + secant))
    else:
        theta = tl.sqrt(square)
        safe = tl.where(theta > 0, theta, 1.0)
        c = tl.where(theta > 0, tl.sin(safe) / safe, 1.0)
        quarter = tl.where(theta > 0, tl.sin(safe / 2) / (safe / 2), 1.0)
        slope = quarter * quarter / 2
    c, slope = half * c, -half * half * slope
    # F' = [[slope aa, -c], [c, slope bb]] in the basis [X b, a'] is T F' T^T in [X b, y], T = [[1, -ρ], [0, 1]]
    f11 = slope * aa + rho * rho * slope * bb
    f12, f21, f22 = -c - rho * slope * bb, c - rho * slope * bb, slope * bb
    is_kept = 2 * square <= limit  # which NaN is not
    if (block == 0) & (across == 0):
        tl.store(lost + matrix, tl.where(is_kept, 0, 1).to(tl.uint8))
    if is_kept:
        dtype = x.dtype.element_ty
        rows, columns = block * ROWS + tl.arange(0, ROWS), across * TILE + tl.arange(0, TILE)
        in_rows, in_columns = rows < n, columns < n
        u = tl.load(xb + matrix * n + rows, mask=in_rows, other=0.0)
        v = tl.load(y + matrix * n + rows, mask=in_rows, other=0.0)
        s = tl.load(right + matrix * 2 * n + columns, mask=in_columns, other=0.0)
        t = tl.load(right + matrix * 2 * n + n + columns, mask=in_columns, other=0.0)
        change = (f11.to(dtype) * u + f21.to(dtype) * v)[:, None] * s[None, :]
        change += (f12.to(dtype) * u + f22.to(dtype) * v)[:, None] * t[None, :]
        place = x + matrix * n * n + rows[:, None].to(tl.int64) * n + columns[None, :]
        here = in_rows[:, None] & in_columns[None, :]
        tl.store(place, tl.load(place, mask=here, other=0.0) + change, mask=here)
