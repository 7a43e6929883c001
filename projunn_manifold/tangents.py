"""The three forms of a factored tangent vector, and which one a gradient's factors take."""

from __future__ import annotations

from torch import Tensor

from projunn_manifold.factors import LowRank
from projunn_manifold.frame import Frame
from projunn_manifold.pair import Pair
from projunn_manifold.pairs import Pairs

__all__ = ["TANGENTS", "Tangent", "tangent_of_gradient"]

Tangent = Pair | Pairs | Frame
TANGENTS = (Pair, Pairs, Frame)


def tangent_of_gradient(x: Tensor, factors: LowRank) -> Tangent:
    """Return ``½(a b^H - X b a^H X)``: a pair for k = 1, pairs on square X, else a frame."""
    if x.shape[-2] != x.shape[-1]:
        return Frame.of_gradient(x, factors)
    return Pair.of_gradient(x, factors) if factors.rank == 1 else Pairs.of_gradient(x, factors)
