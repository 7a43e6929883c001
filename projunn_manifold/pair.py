r"""k = 1 in closed form: a rank-one gradient's tangent, its geodesic and (square X) its polar retraction.

A pair (a, b) gives the tangent :math:`u = \tfrac12(a b^H - X b\,a^H X) = W K S^H` with
W = [X b, a], S = X^H W, K = ½ τ J, J = [[0, -1], [1, 0]], τ a real scale.  Adding a real multiple of
X b to a does not change u; the multiple that makes :math:`\mathrm{Re}\, b^H X^H a = 0` is taken out first.
Then :math:`W^H W = \begin{pmatrix}\|Xb\|^2 & is\\ -is & \|a\|^2\end{pmatrix}` with s = Im b^H X^H a (0 for real),
the lift :math:`A = W K W^H` has the two rotation angles :math:`\theta_\pm = \tau(s \pm p)/2`, p = ‖a‖‖X b‖, and

.. math::

    Y = X + W F S^H,\quad g = I + W F W^H,\quad
    F = \tfrac{\tau}{2}\Big(c J - d \begin{pmatrix}\|a\|/\|Xb\| & 0\\ 0 & \|Xb\|/\|a\|\end{pmatrix}\Big),

where c and d are the half sum and half difference over i of :math:`\varphi(\theta_\pm)`,
:math:`\varphi(\theta) = (e^{i\alpha(\theta)} - 1)/(i\theta)`, with α = θ for the geodesic (projUNN-T) and
α = arctan θ for the polar factor of X + u (projUNN-D).  Nothing is factorised; the error
grows as the machine precision times the angles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from projunn_manifold import linalg, passes
from projunn_manifold.factors import LowRank, Scalar
from projunn_manifold.moves import Base, Move

__all__ = ["Pair"]


@dataclass(frozen=True)
class Pair:
    """The tangent ``½ τ (a b^H - X b a^H X)`` of a rank-one gradient; see the module's text.

    Its numbers are tensors of shape ``(*batch,)``, or Python's own for a single matrix on CPU, where each
    operator on a tensor would cost more than all the arithmetic.
    """

    base: Base
    left: Tensor  # W = [X b, a]    (*batch, n, 2)
    right: Tensor  # S = X^H W  (*batch, m, 2)
    aa: Scalar  # ‖a‖²
    bb: Scalar  # ‖X b‖²
    s: Scalar | None  # None for real matrices
    scale: Scalar = 1.0

    @classmethod
    def of_gradient(cls, x: Tensor, factors: LowRank) -> Pair:
        """Tangent of the gradient ``a b^H`` at x: ``X b`` and ``X^H W``, in one read of X."""
        left, right, (aa, bb, s) = passes.rank_one_tangent(x, *factors)
        return cls(Base.of(x), left, right, aa, bb, s if x.is_complex() else None)

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
        scale = self.scale * (c.double() if isinstance(c, Tensor) else c)
        return Pair(self.base, self.left, self.right, self.aa, self.bb, self.s, scale)

    def outer(self) -> tuple[Tensor, Tensor]:
        """Return ``W K`` and ``S``."""
        xb, a = self.left[..., :1], self.left[..., 1:]
        return (torch.cat((a, -xb), -1) * linalg.each(0.5 * self.scale)).to(a.dtype), self.right

    def squared_norm(self) -> Scalar:
        """Squared norm of the lift, ``½ τ² (p² + s²)``."""
        squares = self.aa * self.bb
        if self.s is not None:
            squares = squares + self.s * self.s
        return 0.5 * self.scale * self.scale * squares

    def geodesic(self) -> Move:
        """Move along the geodesic (projUNN-T)."""
        return self._move(_exponential)

    def retraction(self) -> Move:
        """Move to the polar factor of X + u (projUNN-D); square X only."""
        return self._move(_polar)

    def _move(self, phi: Callable[[Scalar], tuple[Scalar, Scalar]]) -> Move:
        p = (self.aa * self.bb) ** 0.5
        half = 0.5 * self.scale
        c: Scalar | complex
        d: Scalar | complex
        if self.s is None:
            c, d = phi(half * p)
        else:
            (c_plus, d_plus), (c_minus, d_minus) = phi(half * (self.s + p)), phi(half * (self.s - p))
            c = (c_plus + c_minus + 1j * (d_plus + d_minus)) / 2
            d = (d_plus - d_minus + 1j * (c_minus - c_plus)) / 2
        d_over_p = d / _or_one(p)  # p = 0: W or S is zero in the column d multiplies
        entries: list[Any] = [half * e for e in (-d_over_p * self.aa, -c, c, -d_over_p * self.bb)]
        if isinstance(entries[0], Tensor):
            core = torch.stack(entries, -1).view(*entries[0].shape, 2, 2).to(self.left)
        else:
            core = torch.tensor([entries[:2], entries[2:]], dtype=self.left.dtype, device=self.left.device)
        return Move(self.left, core, self.right, core)


def _or_one(x: Scalar) -> Scalar:
    """x, and 1 for x = 0."""
    return torch.where(x == 0, 1.0, x) if isinstance(x, Tensor) else x or 1.0


def _sinc(x: Scalar) -> Scalar:
    """sin(x) / x, and 1 at 0."""
    return torch.sinc(x / math.pi) if isinstance(x, Tensor) else math.sin(x) / x if x else 1.0


def _exponential(theta: Scalar) -> tuple[Scalar, Scalar]:
    """Real and imaginary part of φ for α = θ."""
    return _sinc(theta), theta / 2 * _sinc(theta / 2) ** 2


def _polar(theta: Scalar) -> tuple[Scalar, Scalar]:
    """Real and imaginary part of φ for α = arctan θ."""
    secant = (1 + theta * theta) ** 0.5
    return 1 / secant, theta / (secant * (1 + secant))
