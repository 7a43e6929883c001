"""The contract of tangent vectors that are known by thin factors, and the footpoint they belong to."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from projunn_manifold.linalg import sharded
from projunn_manifold.linalg.dense import Scalar
from projunn_manifold.linalg.phases import LONGEST
from projunn_manifold.moves.angle import GEODESIC, POLAR, Angle
from projunn_manifold.moves.move import Move

__all__ = ["Footpoint", "Tangent", "longest_step", "without", "without_scale"]


class Footpoint(NamedTuple):
    """The point a factored tangent belongs to: its tensor and the version of its values.

    A tangent's factors hold X b and X^H a; at another point, or after X was written to, they are wrong.
    (Writing through ``x.data`` is invisible to PyTorch's version counter, and so to this check.)
    """

    x: Tensor
    version: int | None

    @classmethod
    def of(cls, x: Tensor) -> Footpoint:
        """Remember x as it is now."""
        unknown = torch.compiler.is_compiling() or x.is_inference()
        x = sharded.local_shard(x)
        return cls(x.detach(), None if unknown else x._version)

    def is_at(self, x: Tensor) -> bool:
        """Return whether ``x`` is that point, unchanged."""
        x = sharded.local_shard(x)
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
class Tangent(ABC):
    """A tangent vector u at X, of low rank, known by thin factors.

    Attributes
    ----------
    footpoint : Footpoint
        X
    left : Tensor
        ``(*batch, n, r)``, in whose range u moves X.
    right : Tensor
        ``(*batch, m, s)``, in whose range the rows of u are.
    in_reach : bool
        Whether u is so short that products make its core: then the host need not look at it.
    """

    footpoint: Footpoint
    left: Tensor
    right: Tensor
    in_reach: bool = field(default=False, kw_only=True)

    @property
    def like(self) -> Tensor:
        """A tensor with the matrix's dtype and device."""
        return self.left

    @property
    def shape(self) -> torch.Size:
        """Shape ``(*batch, n, m)``."""
        return torch.Size((*self.left.shape[:-1], self.right.shape[-2]))

    @abstractmethod
    def scaled(self, c: Scalar) -> Tangent:
        """Return ``c`` times the tangent, for a real ``c``, or one for each matrix ``(*batch,)``."""

    @abstractmethod
    def without(self, lost: Tensor) -> Tangent:  # lost: (*batch,), bool
        """Return the tangent with zero for the matrices that are lost, whatever their entries are."""

    @abstractmethod
    def outer(self) -> tuple[Tensor, Tensor]:
        """Return two thin matrices L and R with ``u = L R^H``."""

    @abstractmethod
    def squared_norm(self) -> Scalar:
        """Return the squared norm of the tangent's lift: its squared length in the manifold's metric."""

    def within_reach(self) -> tuple[Tangent, Tensor | None]:
        """Return the tangent, shortened where a core of products would not do, and where that is, ``(*batch,)``.

        None instead says that any length will do.
        """
        scale = (LONGEST / torch.as_tensor(self.squared_norm(), device=self.left.device).sqrt()).clamp_max(1.0)
        return replace(self.scaled(scale), in_reach=True), scale < 1

    @abstractmethod
    def move(self, angle: Angle) -> Move:
        """Return the move that turns the tangent's rotation angles θ into α(θ)."""

    def carry_(self, move: Move, u: Tensor) -> Tensor:
        """Carry u, the vector that the tangent was made from, along a move, in place."""
        return move.transport_(u)

    def geodesic(self) -> Move:
        """Return the move along the geodesic (projUNN-T)."""
        return self.move(GEODESIC)

    def retraction(self) -> Move:
        """Return the move to the polar factor of X + u (projUNN-D)."""
        return self.move(POLAR)


def longest_step(x: Tensor) -> float:
    """Return the squared norm beyond which a step from x has no digits in x's precision."""
    return 2 * x.shape[-1] / torch.finfo(x.dtype).eps ** 2


def without_scale(lost: Tensor, scale: Scalar) -> Scalar:
    """Return the factor of a tangent whose other parts are zero for the matrices that are lost; finite if a number."""
    if isinstance(scale, Tensor):
        return scale.masked_fill(lost, 0)
    return scale if math.isfinite(scale) else 0.0


def without(lost: Tensor, value: Any) -> Any:
    """Return a tensor ``(*batch, ...)``, or the number of a single matrix, with zero for the matrices that are lost."""
    if isinstance(value, Tensor):
        return value.masked_fill(lost[(..., *(None,) * (value.dim() - lost.dim()))], 0)
    if isinstance(value, float | np.ndarray) and lost.is_cpu and not lost.dim():  # of a single matrix
        return np.zeros_like(value)[()] if lost else value
    return value
