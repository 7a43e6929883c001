"""Which manifold a parameter is on, also if it is a ``DTensor``, and what an optimiser's step sees of it.

A manifold is an attribute of a parameter.  ``fully_shard`` and ``distribute_tensor`` put a ``DTensor`` in its place,
which has none; :func:`~projunn_manifold.reattach_manifolds` gives it one, from a plan by the parameters' names.  Two
ways of sharding are supported:

- the rows of one matrix, ``Shard(0)`` of ``(n, m)``: all processes compute its products with thin matrices together
  (:mod:`~projunn_manifold.linalg.sharded`);
- a stack of matrices, ``Shard(d)`` of a batch dimension d: every process moves its own matrices, and only a
  few numbers are communicated, by which either all processes refuse a step or none does.
"""

from __future__ import annotations

from typing import Any

from geoopt import ManifoldTensor
from geoopt.manifolds.base import Manifold
from torch import Tensor

from projunn_manifold.linalg import sharded
from projunn_manifold.linalg.sharded import is_dtensor

__all__ = ["gradient_of", "is_dtensor", "local_view", "manifold_of"]


def manifold_of(p: Tensor) -> Manifold | None:
    """Return the manifold that a parameter is on, sharded or not, or None."""
    found = getattr(p, "manifold", None) if isinstance(p, ManifoldTensor) or is_dtensor(p) else None
    return found if isinstance(found, Manifold) else None


def local_view(t: Any) -> Any:
    """Return what a step works on: a row-sharded ``DTensor`` as it is, the local matrices of a sharded stack."""
    if not is_dtensor(t):
        return t
    if not sharded.is_sharded(t):
        return t.to_local()
    return t if t.dim() == 2 else sharded.local_matrices(t)


def gradient_of(p: Any) -> Any:
    """Return what a step sees of a parameter's gradient; a ``DTensor`` is first redistributed like its parameter.

    Raises
    ------
    TypeError
        A gradient that is not distributed as its parameter is.
    """
    if is_dtensor(p):
        if not is_dtensor(p.grad) or p.grad.device_mesh != p.device_mesh:
            raise TypeError(f"the gradient of a DTensor on {p.device_mesh} must be a DTensor there, got {type(p.grad)}")
        if p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)
    return local_view(p.grad)
