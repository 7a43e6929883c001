"""Optimisers that take a parameter on a manifold for a Euclidean one, and so move it off: they are seen and named.

A hook before the steps of all optimisers of the process warns of torch's own, once of each; on sharded parameters, of
which geoopt's optimisers know nothing either, it refuses all that do not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from geoopt.optim.mixin import OptimMixin
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from projunn_manifold import validation
from projunn_manifold.ambient import has_closure_among, is_constrained, parameters_of
from projunn_manifold.optim import InPlace
from projunn_manifold.sharding import is_sharded, unitary_of

__all__ = ["ADVICE", "keeps", "watch_shards"]

#: What to do about such an optimiser.
ADVICE = "take an optimiser of geoopt or of projunn_manifold.optim, or constrain this one"
_WARNED = -1
_settled: Any = WeakIdKeyDictionary()  # optimisers warned of; those without unitary parameters, by how many they have


def keeps(optimizer: torch.optim.Optimizer, p: Tensor) -> bool:
    """Tell whether an optimiser keeps a parameter on its manifold; geoopt's cannot see that of a sharded one."""
    return isinstance(optimizer, InPlace if is_sharded(p) else OptimMixin) or is_constrained(optimizer)


@functools.cache
def watch_shards() -> None:
    """Have all optimisers asked before every step, from now on, whether they know the shards they move."""
    register_optimizer_step_pre_hook(_refuse)


def _about_to_move(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Walk through the parameters on manifolds of this package that a step will move, if only by its closure."""
    has_closure = has_closure_among(args, kwargs)
    return (p for p in parameters_of(optimizer) if (has_closure or p.grad is not None) and unitary_of(p) is not None)


def _refuse(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raise before an optimiser moves sharded unitary parameters as Euclidean ones."""
    for p in _about_to_move(optimizer, args, kwargs):
        if is_sharded(p) and not keeps(optimizer, p):
            raise TypeError(
                f"{type(optimizer).__name__} would move a sharded unitary parameter of shape {tuple(p.shape)} as a "
                "Euclidean one: take the optimisers of projunn_manifold.optim, or constrain this one"
            )


def _warn(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Warn, once, before torch's own optimiser moves unitary parameters as Euclidean ones; others may know them."""
    if torch.compiler.is_compiling() or not type(optimizer).__module__.startswith("torch.optim"):
        return
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if _settled.get(optimizer) in (count, _WARNED) or is_constrained(optimizer):
        return
    for p in _about_to_move(optimizer, args, kwargs):
        if not is_sharded(p):
            _settled[optimizer] = _WARNED
            validation.warn(
                f"{type(optimizer).__name__} moves a parameter of shape {tuple(p.shape)} on "
                f"{type(unitary_of(p)).__name__} as a Euclidean one, and so off it: {ADVICE}"
            )
            return
    if all(unitary_of(p) is None for p in parameters_of(optimizer)):
        _settled[optimizer] = count


register_optimizer_step_pre_hook(_warn)
