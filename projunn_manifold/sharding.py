"""Parameters in pieces: which manifold a ``DTensor`` is on, and what of it a step sees.

A manifold is an attribute of a parameter; ``fully_shard`` and ``distribute_tensor`` put a ``DTensor`` in its place,
which has none.  So a registry, filled by :func:`~projunn_manifold.reattach_manifolds` from a plan by the parameters'
names, holds the manifolds of sharded parameters.  Two ways of sharding are known:

- the rows of one matrix, ``Shard(0)`` of ``(n, m)``: its products with thin matrices are made by all processes together
  (:mod:`~projunn_manifold.rows`);
- a stack of matrices, ``Shard(0)`` of ``(batch, n, m)``: every process moves its own, and nothing travels.
"""

from __future__ import annotations

from typing import Any

from geoopt import ManifoldTensor
from geoopt.manifolds.base import Manifold
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from projunn_manifold import rows, validation
from projunn_manifold.manifold import UnitaryLowRank
from projunn_manifold.sampling import Subspace

__all__ = ["attach", "check_shards", "is_sharded", "manifold_of", "seen", "unitary_of"]

_manifolds: Any = WeakIdKeyDictionary()  # of sharded parameters


def is_sharded(p: object) -> bool:
    """Tell whether p is a ``DTensor``."""
    return hasattr(p, "placements")


def manifold_of(p: Tensor) -> Manifold | None:
    """Return the manifold that a parameter is on, sharded or not, or None."""
    found = p.manifold if isinstance(p, ManifoldTensor) else _manifolds.get(p) if is_sharded(p) else None
    return found if isinstance(found, Manifold) else None


def unitary_of(p: Tensor) -> UnitaryLowRank | None:
    """Return the manifold of this package that a parameter is on, or None."""
    manifold = manifold_of(p)
    return manifold if isinstance(manifold, UnitaryLowRank) else None


def seen(t: Any) -> Any:
    """Return what a manifold sees of a tensor: rows of one matrix as they are, of a sharded stack the matrices here."""
    return t.to_local() if is_sharded(t) and (t.dim() > 2 or not rows.are_spread(t)) else t


def check_shards(name: str, p: Any, manifold: Manifold) -> None:
    """Raise unless steps can be made on a sharded parameter.

    Raises
    ------
    NotImplementedError
        Another kind of manifold; shards that are not of the first dimension; full-rank moves (k=None, or 2k >= m) and
        samplers that need the whole gradient, for a matrix whose rows are spread.
    ValueError, TypeError
        A shape or dtype that no point has.
    """
    if not isinstance(manifold, UnitaryLowRank):
        raise NotImplementedError(f"{name!r} is a {type(p).__name__}, which cannot carry {manifold}")
    validation.check_point(p, name)
    others = [placement for placement in p.placements if not placement.is_replicate()]
    if len(others) > 1 or any(not placement.is_shard(0) or "Strided" in repr(placement) for placement in others):
        raise NotImplementedError(
            f"{name!r} is placed as {tuple(p.placements)}: a unitary parameter can be sharded once, by Shard(0)"
        )
    if p.dim() > 2 or not rows.are_spread(p):
        return
    if manifold.is_dense(p):
        raise NotImplementedError(
            f"{name!r} has spread rows, but {manifold} moves it by its whole gradient: take 2k < m"
        )
    if not isinstance(manifold.sampler, Subspace):
        raise NotImplementedError(
            f"{name!r} has spread rows, but the sampler {manifold.sampler!r} needs the whole gradient: take 'lsi' or "
            "'subspace'"
        )


def attach(p: Any, manifold: UnitaryLowRank) -> None:
    """Register a sharded parameter that has been checked; all processes that share it do so together.

    Raises
    ------
    ValueError
        Seeds or counts of gradients that differ between processes.
    """
    if _manifolds.get(p) is not manifold:
        manifold.shared_by(p, rows.group_of(p))
        _manifolds[p] = manifold
