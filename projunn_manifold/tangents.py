"""The three forms of a factored tangent vector, and which one a gradient's factors take."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from projunn_manifold.factors import LowRank
from projunn_manifold.frame import Frame
from projunn_manifold.pair import Pair
from projunn_manifold.pairs import Pairs

__all__ = ["TANGENTS", "Tangent", "only_where", "tangent_of_gradient"]

Tangent = Pair | Pairs | Frame
TANGENTS = (Pair, Pairs, Frame)


def tangent_of_gradient(x: Tensor, factors: LowRank) -> Tangent:
    """Return ``½(a b^H - X b a^H X)``: a pair for k = 1, pairs on square X, else a frame."""
    if x.shape[-2] != x.shape[-1]:
        return Frame.of_gradient(x, factors)
    return Pair.of_gradient(x, factors) if factors.rank == 1 else Pairs.of_gradient(x, factors)


def only_where(kept: Tensor, tangent: Tangent) -> Tangent:  # kept: (*batch,), bool
    """Return the tangent with zero for the matrices not kept, whatever their entries are."""
    changed: dict[str, Any] = {}
    for field in fields(tangent):
        value = getattr(tangent, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = torch.where(kept[(..., *(None,) * (value.dim() - kept.dim()))], value, 0)
        elif isinstance(value, float) and kept.is_cpu and not kept.dim():  # a single matrix, Python's own numbers
            changed[field.name] = value if kept else 0.0
    return replace(tangent, **changed)
