r"""Any rank, any shape: a tangent in an orthonormal frame, its geodesic and its polar retraction.

Every tangent of rank r, and every raw step a b^H, is :math:`u = (P H + B C) Q^H` with Q (m x r) orthonormal,
P = X Q, and B (n x j) orthonormal and orthogonal to the range of X (empty for square X).  u is tangent
when H = Ω is skew-Hermitian.  In the basis W = [P, B] the lift :math:`A` with :math:`A X = u` is
:math:`E = \begin{pmatrix}\Omega & -C^H\\ C & 0\end{pmatrix}`, so with :math:`\hat I = [I; 0]`

- geodesic (projUNN-T): Γ = exp(E) - I, F = Γ Î;
- polar factor of X + u (projUNN-D): F = polar(Î + [H; C]) - Î,

and Y = X + W F Q^H.  The thin matrices have orthonormal columns, so nothing is lost to large or parallel
factors, and all cores are computed in double precision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from projunn_manifold import linalg, passes
from projunn_manifold.factors import LowRank, Scalar
from projunn_manifold.moves import Base, Move

__all__ = ["Frame", "Step"]


@dataclass(frozen=True)
class Step:
    """A step ``(P H + B C) Q^H`` from X, not necessarily tangent."""

    p: Tensor  # X Q                    (*batch, n, r)
    b: Tensor | None  # outside range(X)  (*batch, n, j); None for square X
    q: Tensor  # right basis            (*batch, m, r)
    h: Tensor  # double                 (*batch, r, r)
    c: Tensor | None  # double            (*batch, j, r)

    @classmethod
    def of_factors(cls, x: Tensor, factors: LowRank) -> Step:
        """Bring ``a b^H`` into a frame: two products with X (four on tall X) and thin QRs; Q spans b and X^H a."""
        a = factors.a
        wide = linalg.high_precision(x.dtype)
        q, r = linalg.thin_qr(torch.cat((factors.b, passes.adjoint_times(x, a)), -1))
        r = r.to(wide)
        p = passes.times(x, q)
        r_b, r_a = r.tensor_split([a.shape[-1]], -1)
        if x.shape[-2] == x.shape[-1]:
            return cls(p, None, q, r_a @ r_b.mH, None)
        b, r_out = _basis_outside(x, a - p @ r_a.to(x.dtype))
        return cls(p, b, q, r_a @ r_b.mH, r_out.to(wide) @ r_b.mH)

    def raw_retraction(self) -> Move:
        """Move to the polar factor of X + a b^H (the paper's projUNN-D).

        Raises
        ------
        ValueError
            On CPU, if X + a b^H is numerically singular: its polar factor is then not unique.
        """
        core, smallest, largest = _polar_increment(self.h, self.c)
        if (
            linalg.readable(self.p)
            and (smallest <= linalg.tolerance(self.p.dtype, self.p.shape[-2]) * largest.clamp_min(1.0)).any()
        ):
            raise ValueError(
                "projunn_d: X + a b^H is numerically singular (smallest singular value "
                f"{smallest.min().item():.1e}), so its closest unitary is not unique; take a smaller step"
            )
        return Move(_basis(self.p, self.b), core.to(self.p.dtype), self.q, None)

    def tangent(self, base: Base) -> Frame:
        """Project on the tangent space: ½(a b^H - X b a^H X)."""
        return Frame(base, self.p, self.b, self.q, linalg.skew(self.h), None if self.c is None else self.c / 2)


@dataclass(frozen=True)
class Frame:
    """A tangent ``τ (P Ω + B C) Q^H`` at X; see the module's text."""

    base: Base
    p: Tensor  # (*batch, n, r)
    b: Tensor | None  # (*batch, n, j)
    q: Tensor  # (*batch, m, r)
    omega: Tensor  # (*batch, r, r) double, skew-Hermitian
    c: Tensor | None  # (*batch, j, r) double

    @classmethod
    def of_gradient(cls, x: Tensor, factors: LowRank) -> Frame:
        """Tangent of the gradient ``a b^H`` at x: two products with X."""
        return Step.of_factors(x, factors).tangent(Base.of(x))

    @classmethod
    def of_dense(cls, x: Tensor, u: Tensor, q: Tensor | None) -> Frame:
        r"""Reduce a dense vector u to the tangent of largest rank inside the right basis q (None: all of it).

        :math:`u_k = X Q\,\mathrm{skew}(Q^H X^H u Q)\,Q^H + (I - X X^H) u Q Q^H`: one product with u, one
        with X (five on tall X); for a tangent u whose rows lie in Q it is u itself.
        """
        wide = linalg.high_precision(x.dtype)
        if q is None:
            m = x.shape[-1]
            q = linalg.columns_of_identity(*x.shape[:-2], m, m, dtype=x.dtype, device=x.device)
            p, uq = x, u
        else:
            p, uq = passes.times(x, q), passes.times(u, q)
        inside = linalg.adjoint_times(p, uq)
        omega = linalg.skew(inside.to(wide))
        if x.shape[-2] == x.shape[-1]:
            return cls(Base.of(x), p, None, q, omega, None)
        along = inside if p is x else passes.adjoint_times(x, uq)
        b, c = _basis_outside(x, uq - passes.times(x, along))
        return cls(Base.of(x), p, b, q, omega, c.to(wide))

    @property
    def like(self) -> Tensor:
        """A tensor with the matrix's dtype and device."""
        return self.p

    @property
    def shape(self) -> torch.Size:
        """Shape ``(*batch, n, m)``."""
        return torch.Size((*self.p.shape[:-1], self.q.shape[-2]))

    def scaled(self, c: Scalar) -> Frame:
        """Return ``c`` times the tangent."""
        c = linalg.each(c)
        return replace(self, omega=self.omega * c, c=None if self.c is None else self.c * c)

    def outer(self) -> tuple[Tensor, Tensor]:
        """Return ``P Ω + B C`` and ``Q``."""
        left = self.p @ self.omega.to(self.p.dtype)
        if self.b is not None and self.c is not None:
            left = left + self.b @ self.c.to(self.p.dtype)
        return left, self.q

    def squared_norm(self) -> Tensor:  # (*batch,), double
        """Squared norm of the lift, ``‖Ω‖² + 2‖C‖²``."""
        squares = torch.linalg.matrix_norm(self.omega).square()
        if self.c is not None:
            squares = squares + 2 * torch.linalg.matrix_norm(self.c).square()
        return squares

    def geodesic(self) -> Move:
        """Move along the geodesic (projUNN-T)."""
        r = self.omega.shape[-1]
        group = linalg.phase_core(self._lift(), "exp").to(self.p.dtype)
        return Move(_basis(self.p, self.b), group[..., :r].contiguous(), self.q, group)

    def retraction(self) -> Move:
        """Move to the polar factor of X + u (projUNN-D): on square X every angle θ becomes arctan θ."""
        if self.c is None:
            group = linalg.phase_core(self.omega, "polar").to(self.p.dtype)
            return Move(self.p, group, self.q, group)
        core, _, _ = _polar_increment(self.omega, self.c)
        return Move(_basis(self.p, self.b), core.to(self.p.dtype), self.q, None)

    def _lift(self) -> Tensor:
        if self.c is None:
            return self.omega
        j = self.c.shape[-2]
        top = torch.cat((self.omega, -self.c.mH), -1)
        bottom = torch.cat((self.c, self.c.new_zeros((*self.c.shape[:-1], j))), -1)
        return torch.cat((top, bottom), -2)


def _basis_outside(x: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis B of ``rest``, which is what was left outside the range of X, and its coordinates.

    Rest is taken out of the range once more: its first projection was as inexact as X is, and a B that is not
    orthogonal to X would let the error of X grow with every step.
    """
    return linalg.thin_qr(rest - passes.times(x, passes.adjoint_times(x, rest)))


def _basis(p: Tensor, b: Tensor | None) -> Tensor:  # W = [P, B]
    return p if b is None else torch.cat((p, b), -1)


def _polar_increment(h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return polar(Î + D) - Î for D = [H; C], and the smallest and largest singular value of Î + D.

    With :math:`N = (\hat I + D)^H(\hat I + D) - I = H + H^H + D^H D` and T = (I + N)^(-1/2) the increment is
    D T + Î (T - I), :math:`T - I = -N[(I + N) + (I + N)^{1/2}]^{-1}`: exact to relative precision for small
    steps, while an SVD of Î + D is for large ones, where N loses the small singular values.
    """
    step = h if c is None else torch.cat((h, c), -2)
    eye = linalg.columns_of_identity(*step.shape, dtype=step.dtype, device=step.device)
    u, sigma, vh = torch.linalg.svd(eye + step, full_matrices=False)
    far = u @ vh - eye
    excess, basis = torch.linalg.eigh(h + h.mH + step.mH @ step)
    one_plus = (1 + excess).clamp_min(torch.finfo(excess.dtype).tiny)
    shrink = (basis * (-excess / (one_plus + one_plus.sqrt())).unsqueeze(-2)) @ basis.mH
    near = step + step @ shrink + eye @ shrink
    is_near = (excess.abs().amax(-1) < 0.25)[..., None, None]
    return torch.where(is_near, near, far), sigma[..., -1], sigma[..., 0]
