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
in double precision where the device has it, by series in the compiled loops where E is short
(:mod:`~projunn_manifold.linalg.cores`); their error grows as that precision times θ.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from projunn_manifold import context
from projunn_manifold.linalg import cores, dense, qr, small
from projunn_manifold.linalg.dense import Scalar
from projunn_manifold.linalg.products import CompiledMatrix, Matrix
from projunn_manifold.linalg.small import Small
from projunn_manifold.moves.angle import Angle
from projunn_manifold.moves.move import LowRankMove, thin
from projunn_manifold.moves.tangent import Footpoint, Tangent, without, without_scale
from projunn_manifold.sketching.lowrank import LowRank

__all__ = ["RankKTangent"]


@final
@dataclass(frozen=True)
class RankKTangent(Tangent):
    """The tangent ``½ τ (a b^H - X b a^H X)`` of a rank-k gradient at square X; see the module's text.

    ``left`` is W = [a, X b'], ``right`` is S = X^H W.
    """

    omega: Small  # Ω  (*batch, k, k)
    r: Small  # R  (*batch, k, k)
    scale: Scalar = 1.0  # τ

    @classmethod
    def of_gradient(cls, x: Matrix, factors: LowRank) -> RankKTangent:
        """Return the tangent of the gradient ``a b^H`` at X."""
        a, triangle = qr.thin_qr(factors.a)
        b = factors.b @ triangle.mH
        xb, back = x.two_sided_product(b, a)
        back, xha = back.tensor_split(2, -1)
        inside, size = dense.adjoint_times(a, xb), dense.squared_norm(xb)
        rest, back = xb - a @ inside, back - xha @ inside
        if not context.readable(rest) or (dense.squared_norm(rest) < size / 64).any():
            rest = rest - a @ dense.adjoint_times(a, rest)
            back = x.adjoint_times(rest)
        r = qr.thin_qr(rest)[1]
        wide = dense.high_precision(a)
        return cls(
            Footpoint.of(x.like),
            torch.cat((a.mT, rest.mT), -2).mT,
            torch.cat((xha.mT, back.mT), -2).mT,
            -small.skew(inside.to(wide)),
            r.to(wide),
        )

    @classmethod
    def of_sketch(cls, x: CompiledMatrix, g: Matrix, test: Tensor) -> RankKTangent | None:
        """Return the tangent of a (G^H a)^H, a = orth(G test), in one call, or None where that cannot be."""
        found = x.sketched_tangent_of_rank_k(g, test)
        if found is None:
            return None
        left, right, inside, r = found
        return cls(Footpoint.of(x.like), left, right, -small.skew(inside), r)

    def scaled(self, c: Scalar) -> RankKTangent:
        """Return ``c`` times the tangent."""
        return replace(self, scale=self.scale * dense.wide(c), in_reach=False)

    def without(self, lost: Tensor) -> RankKTangent:
        """Return the tangent with zero for the matrices that are lost."""
        names = ("left", "right", "omega", "r")
        parts = {name: without(lost, getattr(self, name)) for name in names}
        return replace(self, scale=without_scale(lost, self.scale), **parts)

    def outer(self) -> tuple[Tensor, Tensor]:
        """Return ``W K`` and ``S``."""
        half = small.identity_like(self.r) / 2
        k = small.multiple(self.scale, small.block(self.omega, half, -half, 0 * half))
        return thin(self.left, small.to(k, self.left)), self.right

    def squared_norm(self) -> Scalar:  # (*batch,), double
        """Return the squared norm of the lift, ``τ² (‖Ω‖² + ½‖R‖²)``."""
        return (small.squared_norm(self.omega) + small.squared_norm(self.r) / 2) * self.scale * self.scale

    def move(self, angle: Angle) -> LowRankMove:
        """Return the move that turns the rotation angles θ into α(θ)."""
        core = cores.rank_k(self.omega, self.r, self.scale, angle.polar)
        core = small.to(self._core(angle) if core is None else core, self.left)
        return LowRankMove(self.left, core, self.right, core)

    def _core(self, angle: Angle) -> Small:
        """Return F from eigenvectors of E, or where the host cannot look from products."""
        k = self.r.shape[-1]
        omega, r = angle.suited(self.omega), angle.suited(self.r)
        omega, half = small.multiple(self.scale, omega), small.multiple(self.scale / 2, r)
        lift = small.block(omega, small.adjoint(half), -half, 0 * half)
        if isinstance(lift, Tensor) and self.in_reach:
            psi11, phi11, f11 = (t[..., :k, :k] for t in angle.functions(lift))
        else:
            theta, basis = small.namespace(lift).linalg.eigh(-1j * lift)
            phi, psi = angle.complex_phi(theta), angle.psi(theta)
            f11, phi11, psi11 = (small.spectral(basis[..., :k, :], values) for values in (1j * theta * phi, phi, psi))
        phi11, psi11 = small.multiple(self.scale / 2, phi11), small.multiple(self.scale * self.scale / -4, psi11)
        return small.block(f11, phi11, -phi11, psi11)
