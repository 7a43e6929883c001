"""Before each step of any optimiser: tell manifolds the weight decay, and warn of a step that would leave them."""

from __future__ import annotations

from typing import Any

import torch
from geoopt.optim.mixin import OptimMixin
from torch.utils.weak import WeakIdKeyDictionary

from projunn_manifold import validation
from projunn_manifold.manifold.parameters import (
    ADVICE,
    about_to_move,
    after_steps,
    before_steps,
    is_dtensor,
    keeps,
    parameters_of,
    set_added_decay,
)
from projunn_manifold.manifold.unitary import unitary_of
from projunn_manifold.optim.in_place import InPlace

__all__: list[str] = []

_WARNED = -1
_settled: Any = WeakIdKeyDictionary()  # optimisers warned of; those without unitary parameters, by how many they have


def _warn(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Warn, once, before torch's own optimiser moves unitary parameters as Euclidean ones; others may know them."""
    if torch.compiler.is_compiling() or not type(optimizer).__module__.startswith("torch.optim"):
        return
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if _settled.get(optimizer) in (count, _WARNED):
        return
    for p in about_to_move(optimizer, args, kwargs):
        manifold = unitary_of(p)
        if manifold is None:
            continue
        if keeps(optimizer, p):
            return
        if not is_dtensor(p):
            _settled[optimizer] = _WARNED
            validation.warn(
                f"{type(optimizer).__name__} moves a parameter of shape {tuple(p.shape)} on "
                f"{type(manifold).__name__} as a Euclidean one, and so off it: {ADVICE}"
            )
            return
    if all(unitary_of(p) is None for p in parameters_of(optimizer)):
        _settled[optimizer] = count


def _tell_decay(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Tell manifolds the λ of the λX that geoopt's optimisers are about to add to gradients; ours add none."""
    _note_decay(optimizer, about_to_step=True)


def _forget_decay(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    _note_decay(optimizer, about_to_step=False)


def _note_decay(optimizer: torch.optim.Optimizer, about_to_step: bool) -> None:
    if not isinstance(optimizer, OptimMixin) or isinstance(optimizer, InPlace):
        return
    for group in optimizer.param_groups:
        decay = group.get("weight_decay", 0)
        for p in group["params"] if decay else ():
            if unitary_of(p) is not None:
                set_added_decay(p, decay if about_to_step else 0)


before_steps.extend((_warn, _tell_decay))
after_steps.append(_forget_decay)
