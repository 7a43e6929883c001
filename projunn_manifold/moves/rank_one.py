r"""k = 1 on square X, in closed form: the tangent of a rank-one gradient, its geodesic and its polar retraction.

A pair (a, b) gives the tangent :math:`u = \tfrac12(a b^H - X b\,a^H X) = W K S^H` with
W = [X b, a], S = X^H W, K = ½ τ J, J = [[0, -1], [1, 0]], τ a real scale.  Adding a real multiple of
X b to a does not change u; the multiple that makes :math:`\mathrm{Re}\, b^H X^H a = 0` is taken out first.
Then, with s = Im b^H X^H a (0 for real),

.. math:: W^H W = \begin{pmatrix}\|Xb\|^2 & is\\ -is & \|a\|^2\end{pmatrix},

the lift :math:`A = W K W^H` has the two rotation angles :math:`\theta_\pm = \tau(s \pm p)/2`, p = ‖a‖‖X b‖, and

.. math::

    Y = X + W F S^H,\quad g = I + W F W^H,\quad
    F = \tfrac{\tau}{2}\Big(c J - d \begin{pmatrix}\|a\|/\|Xb\| & 0\\ 0 & \|Xb\|/\|a\|\end{pmatrix}\Big),

where c and d are the half sum and half difference over i of :math:`\varphi(\theta_\pm)`
(:mod:`~projunn_manifold.moves.angle`).  Nothing is factorised; the error grows as the machine precision times the
angles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from projunn_manifold.linalg import dense
from projunn_manifold.linalg.dense import Scalar
from projunn_manifold.linalg.products import CompiledMatrix, Matrix
from projunn_manifold.moves.angle import Angle
from projunn_manifold.moves.move import LowRankMove
from projunn_manifold.moves.tangent import Footpoint, Tangent, without, without_scale
from projunn_manifold.sketching.lowrank import LowRank

__all__ = ["RankOneTangent"]


@final
@dataclass(frozen=True)
class RankOneTangent(Tangent):
    """The tangent ``½ τ (a b^H - X b a^H X)`` of a rank-one gradient; see the module's text.

    ``left`` is W = [X b, a], ``right`` is S = X^H W.  Numbers are tensors of shape ``(*batch,)``, or Python's own for a
    single matrix on CPU, where each operator on a tensor would cost more than all the arithmetic.
    """

    aa: Scalar  # ‖a‖²
    bb: Scalar  # ‖X b‖²
    s: Scalar | None  # None for real matrices
    scale: Scalar = 1.0  # τ

    @classmethod
    def of_gradient(cls, x: Matrix, factors: LowRank) -> RankOneTangent:
        """Return the tangent of the gradient ``a b^H`` at X: ``X b`` and ``X^H W``, in one read of X."""
        return cls._of_parts(x, *x.rank_one_tangent(*factors))

    @classmethod
    def of_sketch(cls, x: CompiledMatrix, g: Matrix, test: Tensor) -> RankOneTangent | None:
        """Return the tangent of y (G^H y)^H, y = G test at unit norm, in one call, or None where that cannot be."""
        found = x.sketched_tangent(g, test)
        return None if found is None else cls._of_parts(x, *found)

    @classmethod
    def _of_parts(cls, x: Matrix, left: Tensor, right: Tensor, numbers: list[Any]) -> RankOneTangent:
        aa, bb, s = numbers
        return cls(Footpoint.of(x.like), left, right, aa, bb, s if left.is_complex() else None)

    def scaled(self, c: Scalar) -> RankOneTangent:
        """Return ``c`` times the tangent."""
        scale = self.scale * dense.wide(c)
        return RankOneTangent(self.footpoint, self.left, self.right, self.aa, self.bb, self.s, scale)

    def without(self, lost: Tensor) -> RankOneTangent:
        """Return the tangent with zero for the matrices that are lost."""
        names = ("left", "right", "aa", "bb", "s")
        parts = {name: without(lost, getattr(self, name)) for name in names}
        return replace(self, scale=without_scale(lost, self.scale), **parts)

    def within_reach(self) -> tuple[RankOneTangent, None]:
        """Return the tangent as it is: closed forms have no limit."""
        return self, None

    def outer(self) -> tuple[Tensor, Tensor]:
        """Return ``W K`` and ``S``."""
        xb, a = self.left[..., :1], self.left[..., 1:]
        return (torch.cat((a, -xb), -1) * dense.per_matrix(0.5 * self.scale)).to(a.dtype), self.right

    def squared_norm(self) -> Scalar:
        """Return the squared norm of the lift, ``½ τ² (p² + s²)``."""
        squares = self.aa * self.bb
        if self.s is not None:
            squares = squares + self.s * self.s
        return 0.5 * self.scale * self.scale * squares

    def move(self, angle: Angle) -> LowRankMove:
        """Return the move that turns the two rotation angles θ± into α(θ±)."""
        p = (self.aa * self.bb) ** 0.5
        half = 0.5 * self.scale
        c: Scalar | complex
        d: Scalar | complex
        if self.s is None:
            c, d = angle.phi(half * p)
        else:
            (c_plus, d_plus), (c_minus, d_minus) = angle.phi(half * (self.s + p)), angle.phi(half * (self.s - p))
            c = (c_plus + c_minus + 1j * (d_plus + d_minus)) / 2
            d = (d_plus - d_minus + 1j * (c_minus - c_plus)) / 2
        c, d_over_p = half * c, -half * (d / _not_zero(p))  # p = 0: W or S is zero in the column d multiplies
        entries: list[Any] = [d_over_p * self.aa, -c, c, d_over_p * self.bb]
        if isinstance(entries[0], Tensor):
            core = torch.stack(entries, -1).view(*entries[0].shape, 2, 2).to(self.left)
        else:
            core = torch.tensor([entries[:2], entries[2:]], dtype=self.left.dtype, device=self.left.device)
        return LowRankMove(self.left, core, self.right, core)


def _not_zero(x: Scalar) -> Scalar:
    """Return x >= 0, and a number by which 0 can be divided for x = 0."""
    return x.clamp_min(torch.finfo(x.dtype).tiny) if isinstance(x, Tensor) else x or 1.0
