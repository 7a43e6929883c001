r"""k = 1 in closed form: a rank-one gradient's tangent, its geodesic and (square X) its polar retraction.

A pair (a, b) gives the tangent :math:`u = \tfrac12(a b^H - X b\,a^H X) = W K S^H` with
W = [X b, a], S = [b, X^H a], K = ½ τ J, J = [[0, -1], [1, 0]], τ a real scale.  Adding a real multiple of
X b to a does not change u; the multiple that makes :math:`\mathrm{Re}\, b^H X^H a = 0` is taken out first.
Then :math:`W^H W = \begin{pmatrix}\|b\|^2 & is\\ -is & \|a\|^2\end{pmatrix}` with s = Im b^H X^H a (0 for real),
the lift :math:`A = W K W^H` has the two rotation angles :math:`\theta_\pm = \tau(s \pm p)/2`, p = ‖a‖‖b‖, and

.. math::

    Y = X + W F S^H,\quad g = I + W F W^H,\quad
    F = \tfrac{\tau}{2}\Big(c J - d \begin{pmatrix}\|a\|/\|b\| & 0\\ 0 & \|b\|/\|a\|\end{pmatrix}\Big),

where c and d are the half sum and half difference over i of :math:`\varphi(\theta_\pm)`,
:math:`\varphi(\theta) = (e^{i\alpha(\theta)} - 1)/(i\theta)`, with α = θ for the geodesic (projUNN-T) and
α = arctan θ for the polar factor of X + u (projUNN-D).  Nothing is factorised and nothing is divided by a
number that can be small.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from projunn_manifold import linalg
from projunn_manifold.factors import LowRank, Scalar
from projunn_manifold.moves import Base, Move

__all__ = ["Pair"]


@dataclass(frozen=True)
class Pair:
    """The tangent ``½ τ (a b^H - X b a^H X)`` of a rank-one gradient; see the module's text."""

    base: Base
    left: Tensor  # W = [X b, a]    (*batch, n, 2)
    right: Tensor  # S = [b, X^H a]  (*batch, m, 2)
    norm_a: Tensor  # (*batch,) double
    norm_b: Tensor  # (*batch,) double
    s: Tensor | None  # (*batch,) double; None for real matrices
    scale: Scalar = 1.0

    @classmethod
    def of_gradient(cls, x: Tensor, factors: LowRank) -> Pair:
        """Tangent of the gradient ``a b^H`` at x: two products with X, ``X b`` and ``X^H a``."""
        a, b = factors
        wide = linalg.high_precision(x.dtype)
        xb, xha = x @ b, linalg.adjoint_times(x, a)
        b_wide = b.to(wide)
        bb = torch.linalg.vector_norm(b_wide, dim=(-2, -1)).square()
        overlap = (b_wide.conj() * xha).sum((-2, -1))
        rho = (overlap.real / torch.where(bb == 0, 1.0, bb)).to(x.real.dtype)[..., None, None]
        a, xha = a - rho * xb, xha - rho * b
        return cls(
            base=Base.of(x),
            left=torch.cat((xb, a), -1),
            right=torch.cat((b, xha), -1),
            norm_a=torch.linalg.vector_norm(a, dim=(-2, -1), dtype=wide).real,
            norm_b=bb.sqrt(),
            s=overlap.imag if x.is_complex() else None,
        )

    @property
    def like(self) -> Tensor:
        """A tensor with the matrix's dtype and device."""
        return self.left

    @property
    def shape(self) -> torch.Size:
        """Shape ``(*batch, n, m)``."""
        return torch.Size((*self.left.shape[:-1], self.right.shape[-2]))

    def scaled(self, c: Scalar) -> Pair:
        """Return ``c`` times the tangent."""
        return replace(self, scale=self.scale * c)

    def outer(self) -> tuple[Tensor, Tensor]:
        """Return ``W K`` and ``S``."""
        xb, a = self.left[..., :1], self.left[..., 1:]
        return torch.cat((a, -xb), -1) * (0.5 * self.scale), self.right

    def squared_norm(self) -> Tensor:  # (*batch,), double
        """Squared norm of the lift, ``½ τ² (p² + s²)``."""
        p = self.norm_a * self.norm_b
        squares = p * p if self.s is None else p * p + self.s * self.s
        return 0.5 * self.scale * self.scale * squares

    def geodesic(self) -> Move:
        """Move along the geodesic (projUNN-T)."""
        return self._move(_exponential)

    def retraction(self) -> Move:
        """Move to the polar factor of X + u (projUNN-D); square X only."""
        return self._move(_polar)

    def _move(self, phi: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Move:
        p = self.norm_a * self.norm_b
        half = 0.5 * self.scale
        if self.s is None:
            c, d = phi(half * p)
        else:
            (c_plus, d_plus), (c_minus, d_minus) = phi(half * (self.s + p)), phi(half * (self.s - p))
            c = torch.complex(c_plus + c_minus, d_plus + d_minus) / 2
            d = torch.complex(d_plus - d_minus, c_minus - c_plus) / 2
        d_over_p = d / torch.where(p == 0, 1.0, p)  # p = 0: W or S is zero in the column d multiplies
        diagonal = d_over_p * self.norm_a.square(), d_over_p * self.norm_b.square()
        entries = torch.stack((-diagonal[0], -c, c, -diagonal[1]), -1) * half
        core = entries.reshape(*entries.shape[:-1], 2, 2).to(self.left.dtype)
        return Move(self.left, core, self.right, core)


def _exponential(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of φ for α = θ."""
    return torch.sinc(theta / math.pi), torch.sin(theta / 2) * torch.sinc(theta / (2 * math.pi))


def _polar(theta: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of φ for α = arctan θ."""
    secant = torch.hypot(torch.ones_like(theta), theta)
    return 1 / secant, theta / (secant * (1 + secant))
