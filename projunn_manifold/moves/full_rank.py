r"""Any rank on square X, without a frame: the tangent X Ω, its geodesic and its polar retraction by matrix products.

A tangent at square X is u = X Ω with a skew-Hermitian Ω; from any G it is :math:`\Omega = \mathrm{skew}(X^H G)`, which
is the Riemannian gradient :math:`\tfrac12(G - X G^H X)` as well.  A move turns the eigenspaces of Ω by α(θ):
:math:`Y = X f(\Omega)`, with f(Ω) from :mod:`projunn_manifold.linalg.phases`.  A vector is carried by g = Y X^H.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from projunn_manifold.linalg import dense, phases
from projunn_manifold.linalg.dense import Scalar
from projunn_manifold.linalg.products import Matrix
from projunn_manifold.moves.angle import Angle
from projunn_manifold.moves.move import Move, expanded
from projunn_manifold.moves.tangent import Footpoint, Tangent, without

__all__ = ["FullRankTangent"]


@final
@dataclass(frozen=True)
class FullRankTangent(Tangent):
    """The tangent X Ω; ``left`` is a copy of X, for X may move before u is read, and ``right`` is Ω^H = -Ω."""

    source: Tensor  # G^H X of the G that the tangent was made from

    @classmethod
    def of_vector(cls, x: Matrix, g: Tensor) -> FullRankTangent:
        """Return X skew(X^H G): the projection of G, and the Riemannian gradient of a Euclidean one; one product."""
        point = x.dense()
        source = g.mH @ point
        return cls(Footpoint.of(x.like), point.clone(), dense.skew(source), source)

    def plus(self, c: Scalar, v: Tensor) -> FullRankTangent:
        """Return the projection of ``c v`` plus the tangent; one product, and neither matrix is formed."""
        source = (v.mH @ self.left).mul_(c).add_(self.right)
        return replace(self, right=dense.skew(source), source=source)

    def scaled(self, c: Scalar) -> FullRankTangent:
        """Return ``c`` times the tangent."""
        factor = c.to(self.right.real.dtype)[..., None, None] if isinstance(c, Tensor) else c
        return replace(self, right=self.right * factor)

    def without(self, lost: Tensor) -> FullRankTangent:
        """Return the tangent with zero for the matrices that are lost."""
        return replace(self, right=without(lost, self.right))

    def outer(self) -> tuple[Tensor, Tensor]:
        """Return X and Ω^H."""
        return self.left, self.right

    def squared_norm(self) -> Tensor:  # (*batch,), double
        """Return ‖Ω‖²."""
        return dense.squared_norm(self.right)

    def within_reach(self) -> tuple[FullRankTangent, Tensor]:
        """Return the tangent, shortened where a fixed number of products would not do, and where that is."""
        right, shortened = phases.within_reach(self.right)
        return replace(self, right=right), shortened

    def move(self, angle: Angle) -> FullRankMove:
        """Return the move that turns the rotation angles θ into α(θ)."""
        return FullRankMove(self.left, angle.increment(-self.right))

    def carry_(self, move: Move, u: Tensor) -> Tensor:
        """Carry G, the vector that the tangent was made from, in place: one product less than for any other."""
        if not isinstance(move, FullRankMove):
            return move.transport_(u)
        return u.copy_(move.target @ self.source.mH)


@final
class FullRankMove:
    """The map X ↦ Y = X f(Ω), known by X and f(Ω) - I."""

    def __init__(self, x: Tensor, increment: Tensor) -> None:
        self._x = x
        self.target = dense.plus_product(x, x, increment)  # Y

    def apply_(self, x: Matrix) -> Tensor:
        """Move X in place and return its tensor."""
        return x.dense().copy_(self.target)

    def apply(self, x: Matrix) -> Tensor:
        """Return Y."""
        return self.target

    def transport(self, v: Tensor) -> Tensor:
        """Return Y X^H v, the tangent v at X carried to Y."""
        return self.target @ dense.adjoint_times(self._x, expanded(v, self._x))

    def transport_(self, v: Tensor) -> Tensor:
        """Carry v to Y in place."""
        return v.copy_(self.transport(v))
