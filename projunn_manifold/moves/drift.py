r"""Drift: rounding takes X off the manifold by a random walk, and a few columns at a time are put back.

A low-rank update in float32 leaves :math:`\|X^H X - I\|_F/\sqrt m` near :math:`3.4\cdot10^{-8}\sqrt{t}` after t steps,
whatever n is.  For a block J of columns :math:`E = X^H X_J - I_J`, with the rows J of E halved, and
:math:`X_J \leftarrow X_J - X E` make J orthonormal, and orthogonal to the other columns, up to terms in E².
Every column once in t steps holds the error near :math:`3.4\cdot10^{-8}\sqrt{t/2}`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from projunn_manifold.linalg import dense, sharded

__all__ = ["FAR", "Schedule", "correct_columns_"]

_WIDEST = 32  # columns in a block: enough for a matrix product to run at its full speed
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
FAR = 0.25  # ‖E‖ of a column beyond which the correction might not converge


def width(m: int) -> int:
    """Return the columns in a block; there are at least four blocks, so that the whole error does not follow one."""
    return min(_WIDEST, -(-m // 4))


@dataclass(frozen=True)
class Schedule:
    """When each column is corrected: once in max(sweep, m) gradients on average; sweep None: never.

    Visits are ``rate`` times as frequent, because the variance of rounding is larger by that factor: k, and twice that
    for complex numbers.  The multiples of the golden ratio, modulo 1, fill the unit interval evenly.
    """

    sweep: int | None

    def first_due_column(self, gradients: int, m: int, rate: int = 1) -> int | None:
        """Return where the block to be corrected after so many gradients starts, or None if none is due."""
        if self.sweep is None or gradients == 0:
            return None
        blocks = -(-m // width(m))
        share = min(1.0, blocks * rate / max(self.sweep, m))  # of the gradients
        phase = (gradients * _GOLDEN) % 2**64 / 2**64
        return min(int(phase / share * blocks) * width(m), m - width(m)) if phase < share else None


def correct_columns_(x: Tensor, start: int) -> Tensor:
    """Correct the block of x that starts at this column; return how many of its columns were left, ``(*batch,)``.

    Left are those too far off, that have a large part along the others or are not finite.  A column whose norm alone is
    wrong is brought to unit norm, whatever its norm was, and so does not spoil the others for long.
    """
    due = slice(start, start + width(x.shape[-1]))
    here = sharded.local_shard(x)
    block = here[..., due]
    excess = sharded.sum_over_shards(x, dense.adjoint_times(here, block))
    among = excess[..., due, :]
    squares = among.diagonal(dim1=-2, dim2=-1).real.clone()
    squares = torch.where(squares > 0, squares, 1.0)
    scale = squares.rsqrt()
    excess.mul_(scale.unsqueeze(-2))
    among.mul_(scale.unsqueeze(-1))  # of the block's columns at unit norm
    among.diagonal(dim1=-2, dim2=-1).fill_(0)
    near = torch.linalg.vector_norm(excess, dim=-2, keepdim=True) <= FAR
    among.mul_(scale.unsqueeze(-1) / 2)
    among.diagonal(dim1=-2, dim2=-1).copy_((squares - 1) / (squares + squares.sqrt()))  # 1 - 1/‖x_j‖
    block.sub_((here @ excess).masked_fill_(~near, 0))
    return (~near).sum((-2, -1))
