r"""The pair (a, b) of thin factors that means :math:`a b^H`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from projunn_manifold.linalg import dense
from projunn_manifold.linalg.dense import Scalar
from projunn_manifold.linalg.products import normalized_image

__all__ = ["LowRank"]


class LowRank(NamedTuple):
    r"""The matrix :math:`a b^H` of rank at most k, a :class:`~projunn_manifold.linalg.products.LinearOperator`.

    Attributes
    ----------
    a : Tensor
        ``(*batch, n, k)``
    b : Tensor
        ``(*batch, m, k)``
    """

    a: Tensor
    b: Tensor

    @property
    def like(self) -> Tensor:
        """A tensor with the dtype and device of the matrix."""
        return self.a

    @property
    def shape(self) -> torch.Size:
        """Shape ``(*batch, n, m)`` of the matrix."""
        return torch.Size((*self.a.shape[:-1], self.b.shape[-2]))

    @property
    def rank(self) -> int:
        """Number of columns k."""
        return self.a.shape[-1]

    def scaled(self, c: Scalar) -> LowRank:
        """Return the factors of ``c`` times the matrix."""
        return LowRank((self.a * dense.per_matrix(c)).to(self.a.dtype), self.b)

    def balanced(self) -> LowRank:
        """Return the same matrix with factors of about one size, so that neither leaves the range of its precision."""
        if not self.rank:
            return self
        sizes = [(t.detach() / 2).abs().amax((-2, -1), keepdim=True) for t in self]  # whose moduli stay in range
        ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), sizes[1].sqrt() / sizes[0].sqrt(), 1.0)
        tiny = torch.finfo(ratio.dtype).tiny
        ratio = ratio.clamp(tiny, 1 / tiny)
        return LowRank(self.a * ratio, self.b / ratio)

    def without(self, lost: Tensor) -> LowRank:  # lost: (*batch,), bool
        """Return the factors with zeros for the matrices that are lost, whatever their entries are."""
        return LowRank(*(t.masked_fill(lost[..., None, None], 0) for t in self))

    def outer(self) -> tuple[Tensor, Tensor]:
        """Return ``(a, b)``."""
        return self.a, self.b

    def times(self, q: Tensor) -> Tensor:  # (*batch, m, j) -> (*batch, n, j)
        """Return ``a (b^H q)``."""
        return self.a @ dense.adjoint_times(self.b, q)

    def adjoint_times(self, q: Tensor) -> Tensor:  # (*batch, n, j) -> (*batch, m, j)
        """Return ``b (a^H q)``."""
        return self.b @ dense.adjoint_times(self.a, q)

    def normalized_image(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return y, the product at unit norm, and the adjoint's product with y."""
        return normalized_image(self, q)

    def dense(self) -> Tensor:
        """Return the matrix itself, in fresh memory."""
        return self.a @ self.b.mH
