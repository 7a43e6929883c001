"""Optimisers that take a parameter on a manifold for a Euclidean one, and so move it off: they are seen and named.

A hook before the steps of all optimisers of the process warns of torch's own, once of each; on sharded parameters, of
which geoopt's optimisers know nothing either, it refuses all that do not.
"""

from __future__ import annotations

import functools
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
_plain: Any = WeakIdKeyDictionary()  # optimisers that have no unitary parameters, and how many others
_named: Any = WeakIdKeyDictionary()  # optimisers that were warned of


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
    """Warn, once, before torch's own optimiser moves unitary parameters as Euclidean ones; others may know them."""
    if torch.compiler.is_compiling() or not type(optimizer).__module__.startswith("torch.optim"):
        return
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if optimizer in _named or _plain.get(optimizer) == count:
        return
    unitary = [p for p in parameters_of(optimizer) if unitary_of(p) is not None and not is_sharded(p)]
    if not unitary:
        _plain[optimizer] = count
    moved = [p for p in unitary if _moves_off(optimizer, p, args, kwargs)]
    if moved:
        _named[optimizer] = True
        validation.warn(
            f"{type(optimizer).__name__} moves a parameter of shape {tuple(moved[0].shape)} on "
            f"{type(unitary_of(moved[0])).__name__} as a Euclidean one, and so off it: {ADVICE}"
        )


register_optimizer_step_pre_hook(_warn)
