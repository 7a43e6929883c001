r"""Random kernels of small support that are exactly unitary.

A random unitary matrix H times factors :math:`I + (e^{-i\omega_a} - 1) P P^H`, P a random projection: each shifts half
of the channels by one point along the axis a, and so is unitary at every frequency ω and widens the kernel by one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from projunn_manifold.layers.fourier import Spectrum
from projunn_manifold.linalg import dense

__all__ = ["confined"]


def confined(grid: Spectrum, groups: int, block: tuple[int, int], support: int, adjoint: bool) -> Tensor:
    """Return blocks ``(groups, stored, n, m)`` of kernels that are zero outside a window of ``support`` points a side.

    With ``adjoint`` the blocks are adjoints of the operator's; the window then stays in the same place.
    """
    n, m = block
    precision = torch.float64 if grid.real else torch.complex128
    start = dense.haar(groups, 1, n, m, dtype=precision, device="cpu")
    if grid.real and n == m:
        start[..., 0] *= torch.linalg.det(start).sign()[..., None]
    sides = (*grid.size[:-1], grid.size[-1] // 2 + 1) if grid.real else grid.size  # as stored
    blocks = start.to(torch.complex128).expand(groups, math.prod(sides), n, m)
    for axis, (side, stored) in enumerate(zip(grid.size, sides, strict=True)):
        shifts = min(support, side) - 1
        rank = max(1, n // 2)
        if grid.real and n == m and shifts % 2:  # at π a shift changes signs: an even number is a rotation
            rank = min(2 * max(1, round(n / 4)), n - n % 2)
        angle = 2 * math.pi * torch.arange(stored, dtype=torch.float64, device="cpu") / side
        angle = angle.view(-1, *(1,) * (len(sides) - 1 - axis)).expand(*sides[axis:]).expand(*sides).flatten()
        for number in range(shifts if rank else 0):
            backward = (number % 2 == 1) != adjoint
            half = dense.haar(groups, 1, n, rank, dtype=precision, device="cpu").to(torch.complex128)
            turn = torch.polar(torch.ones_like(angle), -angle if backward else angle)[:, None, None]
            blocks = blocks + half @ ((turn - 1) * (half.mH @ blocks))
    return blocks
