r"""Any rank, any shape: a tangent in an orthonormal frame, its geodesic and its polar retraction.

Every tangent of rank r, and every raw step a b^H, is :math:`u = (P H + B C) Q^H` with Q (m x r) orthonormal,
P = X Q, and B (n x j) orthonormal and orthogonal to the range of X (empty for square X).  u is tangent
when H = Ω is skew-Hermitian.  In the basis W = [P, B] the lift :math:`A` with :math:`A X = u` is
:math:`E = \begin{pmatrix}\Omega & -C^H\\ C & 0\end{pmatrix}`, so with :math:`\hat I = [I; 0]`

- geodesic (projUNN-T): Γ = exp(E) - I, F = Γ Î;
- polar factor of X + u (projUNN-D): F = polar(Î + [H; C]) - Î,

and Y = X + W F Q^H.  The thin matrices have orthonormal columns, so nothing is lost to large or parallel
factors, and all cores are computed in double precision, where the device has it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from projunn_manifold import context
from projunn_manifold.linalg import cores, dense, phases, qr, small
from projunn_manifold.linalg.dense import Scalar
from projunn_manifold.linalg.products import CompiledMatrix, Matrix, matrix
from projunn_manifold.linalg.small import Small
from projunn_manifold.moves.angle import POLAR, Angle
from projunn_manifold.moves.move import LowRankMove, thin
from projunn_manifold.moves.tangent import Footpoint, Tangent, without
from projunn_manifold.sketching.lowrank import LowRank

__all__ = ["FramedStep", "FramedTangent"]


@final
@dataclass(frozen=True)
class FramedStep:
    """A step ``(P H + B C) Q^H`` from X, not necessarily tangent."""

    footpoint: Footpoint
    p: Tensor  # X Q                    (*batch, n, r)
    b: Tensor | None  # outside range(X)  (*batch, n, j); None for square X
    q: Tensor  # right basis            (*batch, m, r)
    h: Tensor  # double                 (*batch, r, r)
    c: Tensor | None  # double            (*batch, j, r)

    @classmethod
    def of_factors(cls, x: Matrix, factors: LowRank) -> FramedStep:
        """Bring ``a b^H`` into a frame: two products with X (four on tall X) and thin QRs; Q spans b and X^H a."""
        a, footpoint = factors.a, Footpoint.of(x.like)
        wide = dense.high_precision(a)
        q, r = qr.thin_qr(torch.cat((factors.b, x.adjoint_times(a)), -1))
        r = r.to(wide)
        p = x.times(q)
        r_b, r_a = r.tensor_split([a.shape[-1]], -1)
        if x.shape[-2] == x.shape[-1]:
            return cls(footpoint, p, None, q, r_a @ r_b.mH, None)
        b, r_out = _basis_outside(x, a - p @ r_a.to(a.dtype))
        return cls(footpoint, p, b, q, r_a @ r_b.mH, r_out.to(wide) @ r_b.mH)

    def raw_retraction(self) -> LowRankMove:
        """Return the move to the polar factor of X + a b^H (the paper's projUNN-D).

        Raises
        ------
        ValueError
            On CPU, if X + a b^H is numerically singular, so that its polar factor is not unique.  Also on CPU, if
            squares of the step leave the range.
        """
        is_readable = context.readable(self.p)
        if is_readable and not all(
            torch.isfinite(dense.squared_norm(t)).all() for t in (self.h, self.c) if t is not None
        ):
            raise ValueError("projunn_d: a b^H is too large for its precision; use a smaller step")
        core, smallest, largest = _polar_increment(self.h, self.c)
        least = dense.tolerance(self.p.dtype, self.p.shape[-2]) * largest.clamp_min(1.0)
        if is_readable and not (smallest > least).all():
            raise ValueError(
                "projunn_d: X + a b^H is numerically singular (smallest singular value "
                f"{smallest.min().item():.1e}), so the closest unitary matrix is not unique; use a smaller step"
            )
        return LowRankMove(_basis(self.p, self.b), core.to(self.p.dtype), self.q, None)

    def raw_retraction_by_products(self) -> tuple[LowRankMove, Tensor]:
        """Return the same move without a look, and which matrices it leaves where they are, ``(*batch,)``.

        Those have a singular value of X + a b^H that is, relative to the largest or to 1, within the tolerance of X, as
        on CPU, or below the root of the cores' precision, so that rounding would leave less than half the digits.
        """
        d = self.h if self.c is None else torch.cat((self.h, self.c), -2)
        smallest = max(dense.tolerance(self.p.dtype, self.p.shape[-2]), torch.finfo(d.dtype).eps ** 0.5)
        core, lost = phases.polar_of_any_sum(d, 1 / smallest)
        left, right = without(lost, _basis(self.p, self.b)), without(lost, self.q)  # whose NaN times 0 would be NaN
        return LowRankMove(left, core.to(self.p.dtype), right, None, 1 / smallest), lost

    def tangent(self) -> FramedTangent:
        """Project on the tangent space: ½(a b^H - X b a^H X)."""
        c = None if self.c is None else self.c / 2
        return FramedTangent(self.footpoint, self.p, self.q, self.b, small.skew(self.h), c)


@final
@dataclass(frozen=True)
class FramedTangent(Tangent):
    """A tangent ``(P Ω + B C) Q^H`` at X; see the module's text.  ``left`` is P = X Q, ``right`` is Q."""

    b: Tensor | None  # (*batch, n, j)
    omega: Small  # (*batch, r, r), skew-Hermitian
    c: Tensor | None  # (*batch, j, r) double

    @classmethod
    def of_gradient(cls, x: Matrix, factors: LowRank) -> FramedTangent:
        """Return the tangent of the gradient ``a b^H`` at X: two products with X, four on tall X."""
        return FramedStep.of_factors(x, factors).tangent()

    @classmethod
    def of_sketch(cls, x: CompiledMatrix, g: Matrix, test: Tensor) -> FramedTangent | None:
        """Return the tangent of a (G^H a)^H, a = orth(G test), at tall X, in one call, or None where that cannot be."""
        found = x.sketched_frame(g, test)
        return None if found is None else FramedStep(Footpoint.of(x.like), *found).tangent()

    @classmethod
    def of_dense(cls, x: Matrix, u: Tensor, q: Tensor | None) -> FramedTangent:
        r"""Reduce a dense vector u to the tangent of largest rank inside the right basis q (None: all of it).

        :math:`u_k = X Q\,\mathrm{skew}(Q^H X^H u Q)\,Q^H + (I - X X^H) u Q Q^H`: one product with u, one
        with X (five on tall X); a tangent u whose rows lie in the range of Q stays as it is.
        """
        footpoint, wide = Footpoint.of(x.like), dense.high_precision(u)
        if q is None:
            m = x.shape[-1]
            q = dense.columns_of_identity(*x.shape[:-2], m, m, dtype=u.dtype, device=u.device)
            p, uq = x.dense(), u
        else:
            p, uq = x.times(q), matrix(u).times(q)
        inside = dense.adjoint_times(p, uq)
        omega = small.skew(inside.to(wide))
        if x.shape[-2] == x.shape[-1]:
            return cls(footpoint, p, q, None, omega, None)
        along = inside if p is x.like else x.adjoint_times(uq)
        b, c = _basis_outside(x, uq - x.times(along))
        return cls(footpoint, p, q, b, omega, c.to(wide))

    @classmethod
    def of_reduced(cls, x: CompiledMatrix, u: Matrix, test: Tensor, power: int) -> FramedTangent | None:
        """Return what :meth:`of_dense` does for q = orth((u^H u)^power test), in one call, or None if impossible."""
        found = x.reduced_frame(u, test, power)
        if found is None:
            return None
        p, q, inside = found
        return cls(Footpoint.of(x.like), p, q, None, small.skew(inside), None)

    def scaled(self, c: Scalar) -> FramedTangent:
        """Return ``c`` times the tangent."""
        scaled_c = None if self.c is None else small.multiple(c, self.c)
        return replace(self, omega=small.multiple(c, self.omega), c=scaled_c, in_reach=False)

    def without(self, lost: Tensor) -> FramedTangent:
        """Return the tangent with zero for the matrices that are lost."""
        names = ("left", "right", "b", "omega", "c")
        return replace(self, **{name: without(lost, getattr(self, name)) for name in names})

    def within_reach(self) -> tuple[Tangent, Tensor | None]:
        """Return the tangent, shortened where a core of products would not do, and where that is; two angles never."""
        return (self, None) if self.c is None and self.omega.shape[-1] == 2 else super().within_reach()

    def outer(self) -> tuple[Tensor, Tensor]:
        """Return ``P Ω + B C`` and ``Q``."""
        left = thin(self.left, small.to(self.omega, self.left))
        if self.b is not None and self.c is not None:
            left = left + self.b @ self.c.to(left.dtype)
        return left, self.right

    def squared_norm(self) -> Scalar:  # (*batch,), double
        """Return the squared norm of the lift, ``‖Ω‖² + 2‖C‖²``."""
        squares = small.squared_norm(self.omega)
        if self.c is not None:
            squares = squares + 2 * small.squared_norm(self.c)
        return squares

    def move(self, angle: Angle) -> LowRankMove:
        """Return the move that turns the rotation angles θ into α(θ); on tall X, D is the polar factor of X + u."""
        p, dtype, r = self.left, self.left.dtype, self.omega.shape[-1]
        if angle is POLAR and self.c is not None:
            if self.in_reach:
                core = phases.polar_of_sum(torch.cat((self.omega, self.c), -2))
            else:
                core, _, _ = _polar_increment(self.omega, self.c)
            longest = phases.LONGEST_SUM if self.in_reach else None
            return LowRankMove(_basis(p, self.b), core.to(dtype), self.right, None, longest)
        group = small.to(self._group(angle), p)
        core = group if self.c is None else group[..., :r].contiguous()
        return LowRankMove(_basis(p, self.b), core, self.right, group)

    def _group(self, angle: Angle) -> Small:
        """Return Γ, from one call of the loops, a closed form, products, or eigenvectors of the lift."""
        lift = self._lift()
        group = cores.phases(lift, angle.polar)
        if group is not None:
            return group
        if isinstance(lift, Tensor):
            if lift.shape[-1] == 2:
                return _core_of_two(lift, angle)
            if self.in_reach:
                return angle.functions(lift)[2]
        return small.phase_core(angle.suited(lift), angle.alpha)

    def _lift(self) -> Small:
        """Return E, the lift in the basis [P, B]."""
        if self.c is None:
            return self.omega
        j = self.c.shape[-2]
        return small.block(self.omega, -self.c.mH, self.c, self.c.new_zeros((*self.c.shape[:-1], j)))


def _basis_outside(x: Matrix, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis B of ``rest``, the part of a vector outside the range of X, and its coordinates.

    Rest is projected out of the range once more: its first projection was as inexact as X is, and a B that is not
    orthogonal to X would let the error of X grow with every step.
    """
    return qr.thin_qr(rest - x.times(x.adjoint_times(rest)))


def _basis(p: Tensor, b: Tensor | None) -> Tensor:  # W = [P, B]
    return p if b is None else torch.cat((p, b), -1)


def _core_of_two(e: Tensor, angle: Angle) -> Tensor:  # (*batch, 2, 2) -> (*batch, 2, 2)
    """Return f(E) - I from the two angles θ± = t ± p of a skew-Hermitian E: linear in E, through both f(iθ±)."""
    off = e[..., 1, 0]
    if not e.is_complex():  # θ± = ± off
        c, d = angle.phi(off)
        diagonal, off = -(off * d), off * c
        return torch.stack((diagonal, -off, off, diagonal), -1).view(e.shape)
    first, last = e[..., 0, 0].imag, e[..., 1, 1].imag
    t, half = (first + last) / 2, (first - last) / 2
    p = (half * half + off.real * off.real + off.imag * off.imag).sqrt()
    above, below = (1j * theta * angle.complex_phi(theta) for theta in (t + p, t - p))
    mean = (above + below) / 2
    slope = (above - below) / (2 * p.clamp_min(torch.finfo(p.dtype).tiny))  # p = 0: of E - it I = 0
    entries = (mean + slope * half, 1j * slope * off.conj(), -1j * slope * off, mean - slope * half)
    return torch.stack(entries, -1).view(e.shape)


def _polar_increment(h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return polar(Î + D) - Î for D = [H; C], and the smallest and largest singular value of Î + D.

    With :math:`N = (\hat I + D)^H(\hat I + D) - I = H + H^H + D^H D` and T = (I + N)^(-1/2) the increment is
    D T + Î (T - I), :math:`T - I = -N[(I + N) + (I + N)^{1/2}]^{-1}`: exact to relative precision for small
    steps, while an SVD of Î + D is for large ones, where N loses the small singular values.
    """
    step = h if c is None else torch.cat((h, c), -2)
    eye = dense.columns_of_identity(*step.shape, dtype=step.dtype, device=step.device)
    u, sigma, vh = torch.linalg.svd(eye + step, full_matrices=False)
    far = u @ vh - eye
    excess, basis = torch.linalg.eigh(phases.excess_of(step))
    one_plus = (1 + excess).clamp_min(torch.finfo(excess.dtype).tiny)
    shrink = (basis * (-excess / (one_plus + one_plus.sqrt())).unsqueeze(-2)) @ basis.mH
    near = step + step @ shrink + eye @ shrink
    is_near = (excess.abs().amax(-1) < 0.25)[..., None, None]
    increment = torch.where(is_near, near, far)
    return phases.corrected(increment, phases.excess_of(increment)), sigma[..., -1], sigma[..., 0]
