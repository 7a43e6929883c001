r"""What all updates of low rank share: Y = X + W F S^H, and the group element that carries tangent vectors along.

Whatever its rank, variant or shape, an update of X adds a product of thin matrices, and the unitary
:math:`g = I + W \Gamma W^H` that takes X to Y takes the tangent space at X to the one at Y and is an
isometry.  Both cost :math:`O(r n^2)` for r columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from projunn_manifold import context
from projunn_manifold.linalg import dense, phases, qr
from projunn_manifold.linalg.products import Matrix, matrix

__all__ = ["LowRankMove", "Move", "expanded", "thin"]


_LONG = 1024  # rows
_NARROW = 16  # columns up to which NumPy uses one thread


class Move(Protocol):
    """A map X ↦ Y, and the unitary g with g X = Y that carries tangent vectors along."""

    def apply_(self, x: Matrix) -> Tensor:
        """Move X in place and return its tensor."""

    def apply(self, x: Matrix) -> Tensor:
        """Return Y, a new tensor of X's layout."""

    def transport(self, v: Tensor) -> Tensor:
        """Return g v, the tangent v at X carried to Y."""

    def transport_(self, v: Tensor) -> Tensor:
        """Carry v to Y in place."""


@final
@dataclass(frozen=True)
class LowRankMove:
    """The map X ↦ Y = X + W F S^H and, for transport, the core Γ of its group element."""

    left: Tensor  # W  (*batch, n, w)
    core: Tensor  # F  (*batch, w, r)
    right: Tensor  # S  (*batch, m, r)
    group: Tensor | None  # Γ  (*batch, w, w); None: completed from F when it is needed
    longest: float | None = None  # 1 / the smallest cosine of an angle that a completion by products is good for

    @classmethod
    def between(cls, x: Tensor, y: Tensor) -> LowRankMove:
        """Return a move from x to any y of its shape: dense, in the basis [X, rest of Y]."""
        along = dense.adjoint_times(x, y)
        outside, r = qr.thin_qr(y - x @ along)
        image = torch.cat((along, r), -2)
        start = dense.columns_of_identity(*image.shape, dtype=x.dtype, device=x.device)
        m = x.shape[-1]
        right = dense.columns_of_identity(*x.shape[:-2], m, m, dtype=x.dtype, device=x.device)
        return cls(torch.cat((x, outside), -1), image - start, right, None)

    def apply_(self, x: Matrix) -> Tensor:
        """Move X in place and return its tensor."""
        return x.add_product_(thin(self.left, self.core), self.right)

    def apply(self, x: Matrix) -> Tensor:
        """Return the moved point in fresh memory of X's layout."""
        whole = expanded(x.like, self.left)
        x = x if whole is x.like else matrix(whole)
        return x.plus_product(thin(self.left, self.core), self.right)

    def transport(self, v: Tensor) -> Tensor:
        """Return g v, the tangent v at X carried to Y."""
        known = matrix(expanded(v, self.left))
        return known.plus_product(*self._rotation_of(known))

    def transport_(self, v: Tensor) -> Tensor:
        """Carry v to Y in place."""
        known = matrix(v)
        return known.add_product_(*self._rotation_of(known))

    def _rotation_of(self, v: Matrix) -> tuple[Tensor, Tensor]:
        """Return thin factors of ``g v - v = W Γ (v^H W)^H``."""
        group = complete_to_unitary(self.core, self.longest) if self.group is None else self.group
        return thin(self.left, group), v.adjoint_times(self.left)


def expanded(x: Tensor, left: Tensor) -> Tensor:
    """Expand x to the batch of a move, where they differ."""
    batch = left.shape[:-2]
    if x.shape[:-2] == batch:
        return x
    try:
        return x.expand(*batch, *x.shape[-2:])
    except RuntimeError:
        raise ValueError(
            f"a matrix of batch shape {tuple(x.shape[:-2])} cannot follow a move of batch shape {tuple(batch)}"
        ) from None


def thin(left: Tensor, core: Tensor) -> Tensor:  # (*batch, n, w), (*batch, w, r) -> (*batch, n, r)
    """Return ``left core``, stored by columns.

    A long one on CPU is left to NumPy: PyTorch would wake its threads, which then wait busily for more work and keep
    those of the compiled loops from theirs.
    """
    is_long = left.dim() == core.dim() == 2 and len(left) >= _LONG and core.shape[-1] <= _NARROW
    if is_long and context.is_on_host(left) and context.is_on_host(core):
        return torch.from_numpy(core.numpy().T @ left.numpy().T).mT
    return (core.mT @ left.mT).mT


def complete_to_unitary(core: Tensor, longest: float | None = None) -> Tensor:  # (*batch, w, r) -> (*batch, w, w)
    r"""Return Γ of a move given only by F, for orthonormal W whose first r columns span X S.

    In the basis W the move takes :math:`\hat P = [I; 0]` to :math:`\hat R = [I; 0] + F`.  The unitary
    polar(R̂ P̂^H + (I - R̂ R̂^H)(I - P̂ P̂^H)) extends that map; its first r columns are R̂, the others the
    polar factor of the rest, whose singular values are the cosines of the move's angles.  With ``longest`` it is made
    by products, for cosines of at least 1 / ``longest``; what has turned further is shortened.
    """
    w, r = core.shape[-2:]
    if w == r:
        return core
    eye = dense.columns_of_identity(*core.shape[:-1], w, dtype=dense.high_precision(core), device=core.device)
    image = eye[..., :r] + core
    rest = (eye - image @ image.mH)[..., r:]
    rest = dense.polar(rest) if longest is None else phases.polar(rest, longest)
    return (torch.cat((image, rest), -1) - eye).to(core.dtype)
