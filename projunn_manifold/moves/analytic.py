r"""Moves whose derivatives exist wherever the map is smooth: at zero, dependent and parallel factors too.

The bases of the other modules, square roots, QR and eigenvectors, have no derivatives where columns depend on each
other or angles repeat, but the moves do.  Where autograd asks for them, a move gives its value, and the derivatives are
those of the same map in another form: thin matrices V and a function of a small matrix.  There :math:`V = Q R` with a
basis Q of two parts.  The first is orthonormal and constant.  The second is the rest of V, which is zero but has
derivatives.

.. math::

    e^A = I + Q E\,\varphi_1(PE)\,Q^H,\quad A = Q E Q^H,\qquad P = Q^H Q .

The polar factor comes from two steps of Newton's method, which start at its value and keep the Jacobian of that point.
Each step makes another order of derivatives right.  Derivatives of T are right to rounding in every order, those of D
in the first and second.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn

from projunn_manifold.linalg import dense, phases, qr, small
from projunn_manifold.linalg.dense import Scalar
from projunn_manifold.linalg.products import Matrix
from projunn_manifold.moves.angle import GEODESIC, Angle
from projunn_manifold.moves.move import LowRankMove, Move
from projunn_manifold.moves.tangent import Tangent, without, without_scale
from projunn_manifold.sketching.lowrank import LowRank

__all__ = ["AnalyticMove", "AnalyticTangent", "polar_move"]


@final
@dataclass(frozen=True)
class AnalyticMove:
    """A move by value, and the same one by its derivatives."""

    value: Move
    derivatives: LowRankMove

    def apply_(self, x: Matrix) -> Tensor:
        """Move X in place and return its tensor."""
        return self.value.apply_(x)

    def apply(self, x: Matrix) -> Tensor:
        """Return the moved point."""
        return dense.with_derivatives_of(self.derivatives.apply(x), self.value.apply(x))

    def transport(self, v: Tensor) -> Tensor:
        """Return g v, the tangent v at X carried to Y."""
        carried = self.value.transport(v)
        if self.derivatives.group is None:
            return carried
        return dense.with_derivatives_of(self.derivatives.transport(v), carried)

    def transport_(self, v: Tensor) -> Tensor:
        """Carry v to Y in place."""
        return self.value.transport_(v)


@final
@dataclass(frozen=True)
class AnalyticTangent(Tangent):
    """The tangent ``½ τ (a b^H - X b a^H X)``; ``left`` is W = [X b, a], ``right`` is S = [b, X^H a].

    The values of its moves are those of another tangent.
    """

    value: Tangent
    x: Matrix
    outside: Tensor | None  # the part of a outside range X, where W is made from S: W = X S + [0, outside]
    from_left: bool  # whether S is made from W instead: S = X^H W
    scale: Scalar = 1.0  # τ

    @classmethod
    def of_gradient(cls, value: Tangent, x: Matrix, factors: LowRank) -> AnalyticTangent:
        """Return the tangent of the gradient ``a b^H`` at X."""
        a, b = factors
        if x.shape[-2] == x.shape[-1]:
            left = torch.cat((x.times(b), a), -1)
            return cls(value.footpoint, left, x.adjoint_times(left), value, x, None, from_left=True)
        along = x.adjoint_times(a)
        return cls._in_frame(value, x, b, along, a - x.times(along))

    @classmethod
    def of_dense(cls, value: Tangent, x: Matrix, u: Tensor, q: Tensor | None) -> AnalyticTangent:
        """Return the tangent that a dense vector u is reduced to inside the right basis q (None: all of it)."""
        if q is None:
            m = x.shape[-1]
            q = dense.columns_of_identity(*x.shape[:-2], m, m, dtype=u.dtype, device=u.device)
        uq = u @ q
        along = q @ dense.skew(dense.adjoint_times(x.times(q), uq))
        outside = None if x.shape[-2] == x.shape[-1] else 2 * _normal_part(x, uq)
        return cls._in_frame(value, x, q, along, outside)

    @classmethod
    def _in_frame(cls, value: Tangent, x: Matrix, b: Tensor, along: Tensor, outside: Tensor | None) -> AnalyticTangent:
        """Return the tangent of ``(X along + outside) b^H``; outside is projected out of the range of X once more."""
        right = torch.cat((b, along), -1)
        left = x.times(right)
        if outside is not None:
            outside = _normal_part(x, outside)
            left = left + _after_zeros(outside)
        return cls(value.footpoint, left, right, value, x, outside, from_left=False)

    def scaled(self, c: Scalar) -> AnalyticTangent:
        """Return ``c`` times the tangent."""
        return replace(self, value=self.value.scaled(c), scale=self.scale * dense.wide(c))

    def without(self, lost: Tensor) -> AnalyticTangent:
        """Return the tangent with zero for the matrices that are lost."""
        parts = {name: without(lost, getattr(self, name)) for name in ("left", "right", "outside")}
        return replace(self, value=self.value.without(lost), scale=without_scale(lost, self.scale), **parts)

    def outer(self) -> tuple[Tensor, Tensor]:
        """Return ``W K`` and ``S``."""
        return self._turned(self.left), self.right

    def squared_norm(self) -> Scalar:
        """Return the squared norm of the tangent's lift."""
        return self.value.squared_norm()

    def within_reach(self) -> tuple[AnalyticTangent, None]:
        """Return the tangent as it is: where derivatives are asked for, the host may wait."""
        return self, None

    def move(self, angle: Angle) -> AnalyticMove:
        """Return the move that turns the rotation angles θ into α(θ); on tall X, D is the polar factor of X + u."""
        if angle is GEODESIC:
            return AnalyticMove(self.value.move(angle), self._geodesic())
        outside = None if self.outside is None else self._turned(_after_zeros(self.outside))
        return AnalyticMove(self.value.move(angle), _polar_move(self.x, self.right, self._turned(self.right), outside))

    def _turned(self, pair: Tensor) -> Tensor:
        """Return ``[u, v] K = τ/2 [v, -u]``."""
        first, last = pair.tensor_split(2, -1)
        return (torch.cat((last, -first), -1) * dense.per_matrix(0.5 * self.scale)).to(pair.dtype)

    def _geodesic(self) -> LowRankMove:
        q, r = _around_constant(self.left if self.from_left else self.right)
        r_b, r_a = r.tensor_split(2, -1)
        e, p = r_a @ r_b.mH - r_b @ r_a.mH, _gram(q)
        q = q.to(self.left.dtype)
        left, right = (q, self.x.adjoint_times(q)) if self.from_left else (self.x.times(q), q)
        if self.outside is not None:
            beyond, r_out = _around_constant(self.outside, self.x)
            below, gram = r_out @ r_b.mH, _gram(beyond)
            left = torch.cat((left, beyond.to(left.dtype)), -1)
            e = small.block(e, -below.mH, below, torch.zeros_like(gram))
            p = _side_by_side(p, gram)
        e = dense.per_matrix(0.5 * self.scale) * e
        group = (e @ _phi_one(p @ e)).to(left.dtype)
        return LowRankMove(left, group[..., : q.shape[-1]], right, group)


def polar_move(value: Move, x: Matrix, factors: LowRank) -> AnalyticMove:
    """Return the move to the polar factor of X + a b^H, whose value is known."""
    along, outside = x.adjoint_times(factors.a), None
    if x.shape[-2] > x.shape[-1]:
        outside = _normal_part(x, factors.a - x.times(along))
    return AnalyticMove(value, _polar_move(x, factors.b, along, outside))


def _polar_move(x: Matrix, b: Tensor, along: Tensor, outside: Tensor | None) -> LowRankMove:
    r"""Return the move to the polar factor of :math:`X + (X\tilde a + a_\perp) b^H`."""
    q, r = _around_constant(torch.cat((b, along), -1))
    r_b, r_a = r.tensor_split(2, -1)
    core, gram, free = r_a @ r_b.mH, _gram(q), r.shape[-1]
    fixed = q.shape[-1] - free
    known = _plus_identity(core.detach()[..., :fixed, :fixed])
    if outside is not None:
        beyond, r_out = _around_constant(outside, x)
        below, fixed_out = r_out @ r_b.mH, beyond.shape[-1] - r_out.shape[-1]
        known = torch.cat((known, below.detach()[..., :fixed_out, :fixed]), -2)
    u, h, vh = torch.linalg.svd(known, full_matrices=False)
    turn = _with_ones(vh.mH, free)
    q, gram, core = q @ turn, turn.mH @ gram @ turn, turn.mH @ core @ turn
    known = _with_ones(vh @ u[..., :fixed, :], free)
    if outside is not None:
        known = torch.cat((known, nn.functional.pad(u[..., fixed:, :], (0, free, 0, r_out.shape[-1]))), -2)
        core = torch.cat((core, below @ turn), -2)
        gram = _side_by_side(gram, _gram(beyond))
    found = phases.polar_near(core, known, nn.functional.pad(h, (0, free), value=1.0), gram).to(b.dtype)
    q = q.to(b.dtype)
    if outside is None:
        return LowRankMove(x.times(q), found, q, found)
    return LowRankMove(torch.cat((x.times(q), beyond.to(b.dtype)), -1), found, q, None)


def _side_by_side(a: Tensor, b: Tensor) -> Tensor:
    """Return diag(a, b)."""
    return small.block(a, a.new_zeros(*a.shape[:-1], b.shape[-1]), a.new_zeros(*b.shape[:-1], a.shape[-1]), b)


def _with_ones(a: Tensor, count: int) -> Tensor:
    """Return diag(a, 1, ..., 1)."""
    one = torch.eye(count, dtype=a.dtype, device=a.device)
    return _side_by_side(a, one.expand(*a.shape[:-2], -1, -1))


def _after_zeros(v: Tensor) -> Tensor:
    """Return ``[0, v]``."""
    return torch.cat((torch.zeros_like(v), v), -1)


def _normal_part(x: Matrix, v: Tensor) -> Tensor:
    """Return the part of the columns of V that is normal to the range of X."""
    return v - x.times(x.adjoint_times(v))


def _around_constant(v: Tensor, x: Matrix | None = None) -> tuple[Tensor, Tensor]:
    """Return Q, ``(*batch, n, s + r)``, and R, ``(*batch, s + r, r)``, with V = Q R; columns normal to X stay so."""
    wide = v.to(dense.high_precision(v))
    known = qr.thin_qr(wide.detach())[0]
    along = known.mH @ wide
    if x is not None:
        known = _normal_part(x, known.to(v.dtype)).to(wide.dtype)
    one = torch.eye(v.shape[-1], dtype=wide.dtype, device=v.device).expand(*v.shape[:-2], -1, -1)
    return torch.cat((known, wide - known @ along), -1), torch.cat((along, one), -2)


def _gram(v: Tensor) -> Tensor:  # (*batch, n, r) -> (*batch, r, r)
    """Return ``V^H V`` in the precision of small cores."""
    wide = v.to(dense.high_precision(v))
    return wide.mH @ wide


def _phi_one(x: Tensor) -> Tensor:  # (*batch, r, r) -> (*batch, r, r)
    """Return (e^x - 1) / x of a matrix: a block of an exponential."""
    r = x.shape[-1]
    top = torch.cat((x, _plus_identity(torch.zeros_like(x))), -1)
    return torch.linalg.matrix_exp(torch.cat((top, torch.zeros_like(top)), -2))[..., :r, r:]


def _plus_identity(x: Tensor) -> Tensor:
    return x + torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
