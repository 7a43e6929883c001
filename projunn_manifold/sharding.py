"""Parameters in pieces: which manifold a ``DTensor`` is on, and what of it a step sees.

A manifold is an attribute of a parameter; ``fully_shard`` and ``distribute_tensor`` put a ``DTensor`` in its place,
which has none.  :func:`~projunn_manifold.reattach_manifolds` puts it there, from a plan by the parameters' names.  Two
ways of sharding are known:

- the rows of one matrix, ``Shard(0)`` of ``(n, m)``: its products with thin matrices are made by all processes together
  (:mod:`~projunn_manifold.rows`);
- a stack of matrices, ``Shard(d)`` of a dimension d of its batch: every process moves its own, and nothing travels but
  a few numbers by which all refuse a step together, or none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from geoopt import ManifoldTensor
from geoopt.manifolds.base import Manifold
from torch import Tensor

from projunn_manifold import rows, validation
from projunn_manifold.manifold import UnitaryLowRank
from projunn_manifold.sampling import Subspace

__all__ = [
    "attach",
    "check_attached",
    "check_shards",
    "gradient_of",
    "is_sharded",
    "manifold_of",
    "seen",
    "unitary_of",
]


def is_sharded(p: object) -> bool:
    """Tell whether p is a ``DTensor``."""
    return hasattr(p, "placements")


def manifold_of(p: Tensor) -> Manifold | None:
    """Return the manifold that a parameter is on, sharded or not, or None."""
    found = getattr(p, "manifold", None) if isinstance(p, ManifoldTensor) or is_sharded(p) else None
    return found if isinstance(found, Manifold) else None


def unitary_of(p: Tensor) -> UnitaryLowRank | None:
    """Return the manifold of this package that a parameter is on, or None."""
    manifold = manifold_of(p)
    return manifold if isinstance(manifold, UnitaryLowRank) else None


def seen(t: Any) -> Any:
    """Return what a manifold sees of a tensor: rows of one matrix as they are, of a sharded stack the matrices here."""
    if not is_sharded(t):
        return t
    if not rows.are_spread(t):
        return t.to_local()
    return t if t.dim() == 2 else rows.part_of_stack(t)


def gradient_of(p: Any) -> Any:
    """Return the gradient of a parameter, placed like it: sums and shards that differ are brought there.

    Raises
    ------
    TypeError
        A gradient that is not distributed as its parameter is.
    """
    if is_sharded(p):
        if not is_sharded(p.grad) or p.grad.device_mesh != p.device_mesh:
            raise TypeError(f"the gradient of a DTensor on {p.device_mesh} must be a DTensor there, got {type(p.grad)}")
        if p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)
    return seen(p.grad)


def check_attached(parameters: Iterable[Tensor]) -> None:
    """Raise if there are sharded parameters and none at all is on a manifold: then their manifolds were lost.

    Raises
    ------
    ValueError
        See above.
    """
    parameters = list(parameters)
    if any(map(is_sharded, parameters)) and not any(unitary_of(p) is not None for p in parameters):
        raise ValueError("sharded parameters, and none of them on a manifold: call reattach_manifolds with a plan")


def check_shards(name: str, p: Any, manifold: Manifold) -> None:
    """Raise unless steps can be made on a sharded parameter; all processes that share it ask together.

    Raises
    ------
    NotImplementedError
        Another kind of manifold; columns in shards; full-rank moves (k=None, or 2k >= m) and
        samplers that need the whole gradient, for a matrix whose rows are spread.
    ValueError, TypeError
        A shape or dtype that no point has; seeds or counts of gradients that differ between processes.
    """
    if manifold_of(p) is manifold:
        return
    if not isinstance(manifold, UnitaryLowRank):
        raise NotImplementedError(f"{name!r} is a {type(p).__name__}, which cannot carry {manifold}")
    from torch.distributed.tensor import Shard  # slow to import, and there already if p is

    validation.check_point(p, name)
    others = [placement for placement in p.placements if not placement.is_replicate()]
    whole = range(max(1, p.dim() - 2), p.dim())  # dimensions that cannot be cut
    if len(others) > 1 or any(type(other) is not Shard or other.dim in whole for other in others):
        raise NotImplementedError(
            f"{name!r} is placed as {tuple(p.placements)}: a unitary parameter can be cut once, in its rows, or if it "
            "is a stack, between its matrices"
        )
    if p.dim() == 2 and rows.are_spread(p):
        if manifold.is_dense(p):
            raise NotImplementedError(
                f"{name!r} has spread rows, but {manifold} moves it by its whole gradient: take 2k < m"
            )
        if not isinstance(manifold.sampler, Subspace):
            raise NotImplementedError(
                f"{name!r} has spread rows, but the sampler {manifold.sampler!r} needs the whole gradient: take 'lsi' "
                "or 'subspace'"
            )
    manifold.check_same_draws(p)


def attach(p: Any, manifold: UnitaryLowRank) -> None:
    """Put a sharded parameter that has been checked on its manifold."""
    manifold.share(p)
    p.manifold = manifold
