r"""Drift: rounding takes X off the manifold by a random walk, and a few columns at a time are put back.

A low-rank update in float32 leaves :math:`\|X^H X - I\|_F/\sqrt m` near :math:`3.4\cdot10^{-8}\sqrt{t}` after t steps,
whatever n is.  For a block J of columns :math:`E = X^H X_J - I_J`, with the rows J of E halved, and
:math:`X_J \leftarrow X_J - X E` make J orthonormal, and orthogonal to the other columns, up to terms in E².
Every column once in t steps holds the error near :math:`3.4\cdot10^{-8}\sqrt{t/2}`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from projunn_manifold import linalg

__all__ = ["Schedule", "correct_columns_"]

WIDTH = 32  # columns in a block: enough for a matrix product to run at its full speed

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
_FAR = 0.25  # ‖E‖ of a column beyond which the correction might not converge


class Schedule:
    """Whose turn it is: counts gradients, and visits every column once in max(sweep, m) of them on average.

    The multiples of the golden ratio, modulo 1, fill the unit interval evenly, and so does every k-th of them:
    parameters that share a manifold, and so a count, are corrected evenly too.
    """

    def __init__(self, sweep: int | None) -> None:
        self.sweep = sweep
        self.tick = 0  # gradients seen

    def first_due_column(self, m: int) -> int | None:
        """Return where the block to be corrected after this gradient starts, or None if none is due."""
        if self.sweep is None or self.tick == 0:
            return None
        width = min(WIDTH, m)
        blocks = -(-m // width)
        share = blocks / max(self.sweep, m)  # of the ticks
        phase = (self.tick * _GOLDEN) % 2**64 / 2**64
        return min(int(phase / share * blocks) * width, m - width) if phase < share else None

    def correct_(self, x: Tensor) -> None:
        """Correct the block of columns that is due, if any."""
        start = self.first_due_column(x.shape[-1]) if x.numel() else None
        if start is not None:
            correct_columns_(x, start)


def correct_columns_(x: Tensor, start: int) -> None:
    """Correct the block of x that starts at this column; columns too far off are left as they are."""
    width = min(WIDTH, x.shape[-1])
    block = x[..., start : start + width]
    excess = linalg.adjoint_times(x, block)
    own = excess[..., start : start + width, :]
    own.diagonal(dim1=-2, dim2=-1).sub_(1)
    near = torch.linalg.vector_norm(excess, dim=-2, keepdim=True) <= _FAR
    own.div_(2)
    block.sub_(x @ excess.masked_fill_(~near, 0))
