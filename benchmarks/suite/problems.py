"""What is stepped: a random point of the manifold, a fixed gradient of low rank, a learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

GRADIENT_RANK = 32  # of the gradient that is timed
RATE = 1e-3  # a step turns the point by about a thousandth of a radian
CHECK_RATE = 0.5  # long enough to tell the maps apart from each other and from rounding


@dataclass(frozen=True)
class Problem:
    """A point x, a gradient a b^H whose singular values are about one, and how to step."""

    x: Tensor  # (*batch, n, n)
    a: Tensor  # (*batch, n, r)
    b: Tensor  # (*batch, n, r)
    k: int | None
    rate: float

    @property
    def n(self) -> int:
        """Side of the matrices."""
        return self.x.shape[-1]

    def gradient(self) -> Tensor:
        """Return the Euclidean gradient as a new dense matrix."""
        return self.a @ self.b.mH

    def of_rank_k(self) -> Problem:
        """Return the same point with a gradient that a sketch finds, and a long step: what checks compare.

        Its rank is 3k/4, rounded up.  k random columns find a gradient of rank k as well, with an error that grows with
        the condition of a square Gaussian matrix, and that has no bound: 2800 was met at k = 64.
        """
        rank = None if self.k is None else -(-3 * self.k // 4)
        return Problem(self.x, self.a[..., :rank], self.b[..., :rank], self.k, CHECK_RATE)

    def of_length(self, length: float, normalised: bool) -> Problem:
        """Return the same problem with the rate at which a step has this spectral norm.

        ``normalised`` is for Adam, which divides by the gradient's Frobenius norm.
        """
        g, x = self.gradient(), self.x
        u = (g - x @ g.mH @ x) / 2
        size = torch.linalg.matrix_norm(u, 2) / (torch.linalg.matrix_norm(u) if normalised else 1)
        return replace(self, rate=length / size.item())


def random_problem(shape: tuple[int, ...], dtype: torch.dtype, k: int | None) -> Problem:
    """Draw a problem of the given shape ``(*batch, n, n)``; equal arguments draw equal problems.

    The gradient has the rank ``GRADIENT_RANK``, at least k, and full rank where k is None.
    """
    generator = torch.Generator().manual_seed(0)
    n = shape[-1]
    rank = n if k is None else min(max(GRADIENT_RANK, k), n)
    x = torch.linalg.qr(torch.randn(shape, dtype=dtype, generator=generator)).Q.contiguous()
    a, b = (torch.randn(*shape[:-1], rank, dtype=dtype, generator=generator) / math.sqrt(n) for _ in range(2))
    return Problem(x, a, b, k, RATE)
