r"""k > 1 on square X: the tangent of a rank-k gradient, its geodesic and its polar retraction.

With orthonormal a (any other is brought there by a thin QR) and c = a^H X b, the part of X b outside the range of
a is X b' = X b - a c.  All is made from these two, W = [a, X b'] and S = X^H W, not from b: then I + W F W^H stays
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

On the eigenvalues iθ of E, :math:`f = e^{i\alpha} - 1` with α = θ for the geodesic (projUNN-T) and α = arctan θ for
the polar factor of X + u (projUNN-D).  The cores are computed in double precision; their error grows as that
precision times θ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from projunn_manifold import linalg, passes
from projunn_manifold.factors import LowRank, Scalar
from projunn_manifold.moves import Base, Move

__all__ = ["Pairs"]


@dataclass(frozen=True)
class Pairs:
    """The tangent ``½ τ (a b^H - X b a^H X)`` of a rank-k gradient at square X; see the module's text."""

    base: Base
    left: Tensor  # W = [a, X b']   (*batch, n, 2k)
    right: Tensor  # S = X^H W  (*batch, n, 2k)
    omega: Tensor  # Ω  (*batch, k, k) double
    r: Tensor  # R  (*batch, k, k) double
    scale: Scalar = 1.0

    @classmethod
    def of_gradient(cls, x: Tensor, factors: LowRank) -> Pairs:
        """Tangent of the gradient ``a b^H`` at x."""
        wide = linalg.high_precision(x.dtype)
        a, triangle = linalg.thin_qr(factors.a)
        b = factors.b @ triangle.mH
        xb, back = passes.both(x, b, a)
        back, xha = back.tensor_split(2, -1)
        inside, size = linalg.adjoint_times(a, xb), linalg.squared_norm(xb)
        rest, back = xb - a @ inside, back - xha @ inside
        if not linalg.readable(x) or (linalg.squared_norm(rest) < size / 64).any():
            rest = rest - a @ linalg.adjoint_times(a, rest)
            back = passes.adjoint_times(x, rest)
        r = linalg.thin_qr(rest)[1]
        return cls(
            Base.of(x),
            torch.cat((a.mT, rest.mT), -2).mT,
            torch.cat((xha.mT, back.mT), -2).mT,
            -linalg.skew(inside.to(wide)),
            r.to(wide),
        )

    @property
    def like(self) -> Tensor:
        """A tensor with the matrix's dtype and device."""
        return self.left

    @property
    def shape(self) -> torch.Size:
        """Shape ``(*batch, n, n)``."""
        return torch.Size((*self.left.shape[:-1], self.right.shape[-2]))

    def scaled(self, c: Scalar) -> Pairs:
        """Return ``c`` times the tangent."""
        return replace(self, scale=self.scale * (c.double() if isinstance(c, Tensor) else c))

    def outer(self) -> tuple[Tensor, Tensor]:
        """Return ``W K`` and ``S``."""
        a, xb = self.left.tensor_split(2, -1)
        omega = self.omega.to(a.dtype)
        left = torch.cat((a @ omega - xb / 2, a / 2), -1) * linalg.each(self.scale)
        return left.to(a.dtype), self.right

    def squared_norm(self) -> Tensor:  # (*batch,), double
        """Squared norm of the lift, ``τ² (‖Ω‖² + ½‖R‖²)``."""
        squares = torch.linalg.matrix_norm(self.omega).square() + torch.linalg.matrix_norm(self.r).square() / 2
        return squares * self.scale**2

    def geodesic(self) -> Move:
        """Move along the geodesic (projUNN-T)."""
        return self._move(_exponential)

    def retraction(self) -> Move:
        """Move to the polar factor of X + u (projUNN-D)."""
        return self._move(_polar)

    def _move(self, functions: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> Move:
        k, scale = self.r.shape[-1], linalg.each(self.scale)
        top = torch.cat((self.omega, self.r.mH / 2), -1)
        bottom = torch.cat((-self.r / 2, torch.zeros_like(self.r)), -1)
        theta, basis = torch.linalg.eigh(-1j * scale * torch.cat((top, bottom), -2))
        f, phi, psi = functions(theta)
        basis = basis[..., :k, :]
        f11, phi11, psi11 = ((basis * values.unsqueeze(-2)) @ basis.mH for values in (f, phi, psi))
        phi11, psi11 = phi11 * (scale / 2), psi11 * (-scale * scale / 4)
        core = torch.cat((torch.cat((f11, phi11), -1), torch.cat((-phi11, psi11), -1)), -2)
        core = (core if self.left.is_complex() else core.real).to(self.left.dtype)
        return Move(self.left, core, self.right, core)


def _exponential(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f, φ and ψ at iθ for α = θ."""
    sinc, half = torch.sinc(theta / math.pi), torch.sinc(theta / (2 * math.pi))
    phi = torch.complex(sinc, theta / 2 * half.square())
    rest = (1 - sinc) / torch.where(theta == 0, 1.0, theta)
    return 1j * theta * phi, phi, torch.complex(half.square() / 2, rest)


def _polar(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f, φ and ψ at iθ for α = arctan θ."""
    secant = (1 + theta * theta).sqrt()
    phi = torch.complex(1 / secant, theta / (secant * (1 + secant)))
    psi = torch.complex(torch.ones_like(theta), theta) / (secant * (1 + secant))
    return 1j * theta * phi, phi, psi
