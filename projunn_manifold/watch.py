"""Optimisers that take a parameter on a manifold for a Euclidean one, and so move it off: they are seen and named.

A hook before the steps of all optimisers of the process warns of one such step of each; on sharded parameters, of which
geoopt's optimisers know nothing either, it refuses them.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any
from weakref import WeakSet

import torch
from geoopt.optim.mixin import OptimMixin
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from projunn_manifold.ambient import has_closure_among, is_constrained, parameters_of
from projunn_manifold.optim import InPlace
from projunn_manifold.sharding import is_sharded, unitary_of

__all__ = ["ADVICE", "keeps", "watch_shards"]

#: What to do about such an optimiser.
ADVICE = "take an optimiser of geoopt or of projunn_manifold.optim, or constrain this one"
_seen: WeakSet[torch.optim.Optimizer] = WeakSet()  # optimisers that have made a step


def keeps(optimizer: torch.optim.Optimizer, p: Tensor) -> bool:
    """Tell whether an optimiser keeps a parameter on its manifold; geoopt's cannot see that of a sharded one."""
    return isinstance(optimizer, InPlace if is_sharded(p) else OptimMixin) or is_constrained(optimizer)


@functools.cache
def watch_shards() -> None:
    """Have all optimisers asked before every step, from now on, whether they know the shards they move."""
    register_optimizer_step_pre_hook(_refuse)


def _moves_off(optimizer: torch.optim.Optimizer, p: Tensor, args: Any, kwargs: Any) -> bool:
    has_gradient = p.grad is not None or has_closure_among(args, kwargs)
    return has_gradient and unitary_of(p) is not None and not keeps(optimizer, p)


def _refuse(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raise before an optimiser moves sharded unitary parameters as Euclidean ones."""
    for p in parameters_of(optimizer):
        if is_sharded(p) and _moves_off(optimizer, p, args, kwargs):
            raise TypeError(
                f"{type(optimizer).__name__} would move a sharded unitary parameter of shape {tuple(p.shape)} as a "
                "Euclidean one: take the optimisers of projunn_manifold.optim, or constrain this one"
            )


def _warn(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Warn before the first step of an optimiser that moves unitary parameters as Euclidean ones."""
    if torch.compiler.is_compiling() or optimizer in _seen:
        return
    _seen.add(optimizer)
    for p in parameters_of(optimizer):
        if not is_sharded(p) and _moves_off(optimizer, p, args, kwargs):
            warnings.warn(
                f"{type(optimizer).__name__} moves a parameter of shape {tuple(p.shape)} on "
                f"{type(unitary_of(p)).__name__} as a Euclidean one, and so off it: {ADVICE}",
                RuntimeWarning,
                stacklevel=3,
            )
            return


register_optimizer_step_pre_hook(_warn)
