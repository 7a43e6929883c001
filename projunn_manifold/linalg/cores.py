"""Cores of moves by the compiled loops: functions of one small skew-Hermitian array on CPU, without an eigenproblem."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from projunn_manifold.linalg import products
from projunn_manifold.linalg.dense import Scalar
from projunn_manifold.linalg.loops import NOT_YET
from projunn_manifold.linalg.small import Small

__all__ = ["phases", "rank_k"]


def rank_k(omega: Small, r: Small, scale: Scalar, polar: bool | None) -> Small | None:  # (k, k) twice -> (2k, 2k)
    """Return the core of a rank-k move on square X, or None where the loops cannot make it: E too long, or tensors."""
    loops = _loops_for(r, polar)
    if loops is None or isinstance(scale, Tensor):
        return None
    core = np.empty((2 * len(r), 2 * len(r)), r.dtype)
    made = loops.core_of_rank_k(np.ascontiguousarray(omega), np.ascontiguousarray(r), float(scale), polar, core)
    return core if made else None


def phases(e: Small, polar: bool | None) -> Small | None:  # (r, r) -> (r, r)
    """Return f(E) - I for the phases of D or T, or None as above."""
    loops = _loops_for(e, polar)
    if loops is None:
        return None
    e = np.ascontiguousarray(e)
    increment = np.empty_like(e)
    return increment if loops.core_of_phases(e, polar, increment) else None


def _loops_for(x: Small, polar: bool | None) -> Any:
    """Return the loops where they are loaded and x is an array."""
    is_known = polar is not None and isinstance(x, np.ndarray)
    return products.compiled if is_known and products.compiled is not NOT_YET else None
