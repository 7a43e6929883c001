r"""k > 1 on square X: the tangent of a rank-k gradient, its geodesic and its polar retraction.

With orthonormal a (a thin QR makes it so) and c = a^H X b, the part of X b outside the range of a is
X b' = X b - a c.  Everything is made from these two, W = [a, X b'] and S = X^H W, not from b: then I + W F W^H stays
unitary where X is not quite, and no step enlarges what rounding has left.  The tangent is

.. math::

    u = \tfrac12(a b^H - X b\,a^H X) = W K S^H,\quad W = [a, X b'],\quad S = X^H W,\quad
    K = \begin{pmatrix}\Omega & \tfrac12 I\\ -\tfrac12 I & 0\end{pmatrix},\quad \Omega = -\mathrm{skew}(c).

In an orthonormal basis of the range of W, with X b' = Q R, the lift is
:math:`E = \begin{pmatrix}\Omega & \frac12 R^H\\ -\frac12 R & 0\end{pmatrix}`.  For f(z) = z φ(z) and
φ(z) = 1 + z ψ(z), the increment f(E) in the basis W itself needs no inverse of R:

.. math::

    Y = X + W F S^H,\quad g = I + W F W^H,\quad F = \begin{pmatrix}
    f(E)_{11} & \tfrac12 \varphi(E)_{11}\\ -\tfrac12 \varphi(E)_{11} & -\tfrac14 \psi(E)_{11}\end{pmatrix}.

On the eigenvalues iθ of E, :math:`f = e^{i\alpha} - 1` (:mod:`~projunn_manifold.moves.angle`).  The cores are computed
in double precision; their error grows as that precision times θ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from projunn_manifold import context
from projunn_manifold.linalg import dense
from projunn_manifold.linalg.dense import Scalar
from projunn_manifold.linalg.products import Matrix
from projunn_manifold.moves.angle import Angle
from projunn_manifold.moves.move import LowRankMove
from projunn_manifold.moves.tangent import Footpoint, Tangent, where_kept
from projunn_manifold.sketching.lowrank import LowRank

__all__ = ["RankKTangent"]


@final
@dataclass(frozen=True)
class RankKTangent(Tangent):
    """The tangent ``½ τ (a b^H - X b a^H X)`` of a rank-k gradient at square X; see the module's text.

    ``left`` is W = [a, X b'], ``right`` is S = X^H W.
    """

    omega: Tensor  # Ω  (*batch, k, k) double
    r: Tensor  # R  (*batch, k, k) double
    scale: Scalar = 1.0  # τ

    @classmethod
    def of_gradient(cls, x: Matrix, factors: LowRank) -> RankKTangent:
        """Return the tangent of the gradient ``a b^H`` at X."""
        a, triangle = dense.thin_qr(factors.a)
        b = factors.b @ triangle.mH
        xb, back = x.two_sided_product(b, a)
        back, xha = back.tensor_split(2, -1)
        inside, size = dense.adjoint_times(a, xb), dense.squared_norm(xb)
        rest, back = xb - a @ inside, back - xha @ inside
        if not context.readable(rest) or (dense.squared_norm(rest) < size / 64).any():
            rest = rest - a @ dense.adjoint_times(a, rest)
            back = x.adjoint_times(rest)
        r = dense.thin_qr(rest)[1]
        wide = dense.high_precision(a.dtype)
        return cls(
            Footpoint.of(x.like),
            torch.cat((a.mT, rest.mT), -2).mT,
            torch.cat((xha.mT, back.mT), -2).mT,
            -dense.skew(inside.to(wide)),
            r.to(wide),
        )

    def scaled(self, c: Scalar) -> RankKTangent:
        """Return ``c`` times the tangent."""
        return replace(self, scale=self.scale * (c.double() if isinstance(c, Tensor) else c))

    def masked(self, kept: Tensor) -> RankKTangent:
        """Return the tangent with zero for the matrices that are not kept."""
        names = ("left", "right", "omega", "r", "scale")
        return replace(self, **{name: where_kept(kept, getattr(self, name)) for name in names})

    def outer(self) -> tuple[Tensor, Tensor]:
        """Return ``W K`` and ``S``."""
        a, xb = self.left.tensor_split(2, -1)
        omega = self.omega.to(a.dtype)
        left = torch.cat((a @ omega - xb / 2, a / 2), -1) * dense.per_matrix(self.scale)
        return left.to(a.dtype), self.right

    def squared_norm(self) -> Tensor:  # (*batch,), double
        """Return the squared norm of the lift, ``τ² (‖Ω‖² + ½‖R‖²)``."""
        squares = torch.linalg.matrix_norm(self.omega).square() + torch.linalg.matrix_norm(self.r).square() / 2
        return squares * self.scale**2

    def move(self, angle: Angle) -> LowRankMove:
        """Return the move that turns the rotation angles θ into α(θ)."""
        k, scale = self.r.shape[-1], dense.per_matrix(self.scale)
        top = torch.cat((self.omega, self.r.mH / 2), -1)
        bottom = torch.cat((-self.r / 2, torch.zeros_like(self.r)), -1)
        theta, basis = torch.linalg.eigh(-1j * scale * torch.cat((top, bottom), -2))
        phi, psi = angle.complex_phi(theta), angle.psi(theta)
        basis = basis[..., :k, :]
        f11, phi11, psi11 = ((basis * values.unsqueeze(-2)) @ basis.mH for values in (1j * theta * phi, phi, psi))
        phi11, psi11 = phi11 * (scale / 2), psi11 * (-scale * scale / 4)
        core = torch.cat((torch.cat((f11, phi11), -1), torch.cat((-phi11, psi11), -1)), -2)
        core = (core if self.left.is_complex() else core.real).to(self.left.dtype)
        return LowRankMove(self.left, core, self.right, core)
