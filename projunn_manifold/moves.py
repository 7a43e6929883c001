r"""What all updates share: Y = X + W F S^H, and the group element that carries tangent vectors along.

Whatever its rank, variant or shape, an update of X adds a product of thin matrices, and the unitary
:math:`g = I + W \Gamma W^H` that takes X to Y takes the tangent space at X to the one at Y and is an
isometry.  Both cost :math:`O(r n^2)` for r columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from projunn_manifold import linalg, passes, rows

__all__ = ["Base", "Move"]


class Base(NamedTuple):
    """The point a factored tangent belongs to: its tensor and the version of its values.

    A tangent's factors hold X b and X^H a; at another point, or after X was written to, they are wrong.
    (Writing through ``x.data`` is invisible to PyTorch's version counter, and so to this check.)
    """

    x: Tensor
    version: int | None

    @classmethod
    def of(cls, x: Tensor) -> Base:
        """Remember x as it is now."""
        unknown = torch.compiler.is_compiling() or x.is_inference()
        x = rows.local(x)
        return cls(x.detach(), None if unknown else x._version)

    def is_at(self, x: Tensor) -> bool:
        """Tell whether ``x`` is that point, unchanged."""
        x = rows.local(x)
        return (
            self.version is not None
            and not x.is_inference()
            and self.version == x._version
            and self.x.data_ptr() == x.data_ptr()
            and self.x.shape == x.shape
            and self.x.stride() == x.stride()
            and self.x.is_conj() == x.is_conj()
            and self.x.is_neg() == x.is_neg()
        )


@dataclass(frozen=True)
class Move:
    """The map X -> Y = X + W F S^H and, for transport, the core Γ of its group element."""

    left: Tensor  # W  (*batch, n, w)
    core: Tensor  # F  (*batch, w, r)
    right: Tensor  # S  (*batch, m, r)
    group: Tensor | None  # Γ  (*batch, w, w); None: to be completed from F (see completed)

    @classmethod
    def between(cls, x: Tensor, y: Tensor) -> Move:
        """Return a move from x to any y of its shape: dense, in the basis [X, rest of Y]."""
        along = linalg.adjoint_times(x, y)
        outside, r = linalg.thin_qr(y - x @ along)
        image = torch.cat((along, r), -2)
        start = linalg.columns_of_identity(*image.shape, dtype=x.dtype, device=x.device)
        m = x.shape[-1]
        right = linalg.columns_of_identity(*x.shape[:-2], m, m, dtype=x.dtype, device=x.device)
        return cls(torch.cat((x, outside), -1), image - start, right, None)

    def apply_(self, x: Tensor) -> Tensor:
        """Move x in place."""
        return passes.add_product_(x, _thin(self.left, self.core), self.right)

    def apply(self, x: Tensor) -> Tensor:
        """Return the moved point in fresh memory of x's layout."""
        return passes.plus_product(self._whole(x), _thin(self.left, self.core), self.right)

    def carry(self, v: Tensor) -> Tensor:
        """Return g v, the tangent v at X transported to Y."""
        v = self._whole(v)
        return passes.plus_product(v, *self._turn(v))

    def carry_(self, v: Tensor) -> Tensor:
        """Transport v in place."""
        return passes.add_product_(v, *self._turn(v))

    def _turn(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return thin factors of ``g v - v = W Γ (v^H W)^H``."""
        group = completed(self.core) if self.group is None else self.group
        return _thin(self.left, group), passes.adjoint_times(v, self.left)

    def _whole(self, x: Tensor) -> Tensor:
        """Expand x to the batch of the move, where they differ."""
        batch = self.left.shape[:-2]
        if x.shape[:-2] == batch:
            return x
        try:
            return x.expand(*batch, *x.shape[-2:])
        except RuntimeError:
            raise ValueError(
                f"a matrix of batch shape {tuple(x.shape[:-2])} cannot follow a move of batch shape {tuple(batch)}"
            ) from None


def _thin(left: Tensor, core: Tensor) -> Tensor:  # (*batch, n, w), (*batch, w, r) -> (*batch, n, r), stored by columns
    return (core.mT @ left.mT).mT


def completed(core: Tensor) -> Tensor:  # (*batch, w, r) -> (*batch, w, w)
    r"""Γ of a move given only by F, for orthonormal W whose first r columns span X S.

    In the basis W the move takes :math:`\hat P = [I; 0]` to :math:`\hat R = [I; 0] + F`.  The unitary
    polar(R̂ P̂^H + (I - R̂ R̂^H)(I - P̂ P̂^H)) extends that map; its first r columns are R̂, the others the
    polar factor of the rest.
    """
    w, r = core.shape[-2:]
    eye = linalg.columns_of_identity(*core.shape[:-1], w, dtype=linalg.high_precision(core.dtype), device=core.device)
    image = eye[..., :r] + core
    rest = (eye - image @ image.mH)[..., r:]
    return (torch.cat((image, linalg.polar(rest)), -1) - eye).to(core.dtype)
