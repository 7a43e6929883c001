"""Which manifold a parameter is on, also if it is a ``DTensor``, and what an optimiser's step sees of it.

A manifold is an attribute of a parameter.  ``fully_shard`` and ``distribute_tensor`` put a ``DTensor`` in its place,
which has none; :func:`~projunn_manifold.reattach_manifolds` gives it one, from a plan by the parameters' names.  Two
ways of sharding are supported:

- the rows of one matrix, ``Shard(0)`` of ``(n, m)``: all processes compute its products with thin matrices together
  (:mod:`~projunn_manifold.linalg.sharded`);
- a stack of matrices, ``Shard(d)`` of a batch dimension d: every process moves its own matrices, and only a
  few numbers are communicated, by which either all processes refuse a step or none does.

The first manifold that is made has all optimisers of the process call :data:`before_steps` and :data:`after_steps`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from geoopt import ManifoldTensor
from geoopt.manifolds.base import Manifold
from geoopt.optim.mixin import OptimMixin
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from projunn_manifold import context
from projunn_manifold.linalg import sharded

__all__ = [
    "ADVICE",
    "about_to_move",
    "after_steps",
    "before_steps",
    "gradient_of",
    "has_closure_among",
    "is_dtensor",
    "keepers",
    "keeps",
    "local_view",
    "manifold_of",
    "note_added_decay",
    "parameters_of",
    "take_added_decay",
    "watch_optimizers",
    "watch_shards",
]

Optimizer = torch.optim.Optimizer

#: What to do about an optimiser that moves a parameter off its manifold.
ADVICE = "take an optimiser of geoopt or of projunn_manifold.optim, or constrain this one"

#: Functions of (optimizer, args, kwargs) that are called before and after each step of any optimiser.
before_steps: list[Callable[[Optimizer, Any, Any], None]] = []
after_steps: list[Callable[[Optimizer, Any, Any], None]] = []
#: Functions of (optimizer, p) that tell whether an optimiser keeps a parameter on its manifold.
keepers: list[Callable[[Optimizer, Tensor], bool]] = []

_added_decay: Any = WeakIdKeyDictionary()


# -- sharded or not ----------------------------------------------------------------------------------------


def is_dtensor(p: object) -> bool:
    """Return whether p is a ``DTensor``."""
    return hasattr(p, "placements")


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


# -- weight decay --------------------------------------------------------------------------------------------


def take_added_decay(x: Tensor) -> float:
    """Return the λ of the weight decay λX that a step has added to the gradient at x, and forget it.

    A component of a product manifold is a view of the parameter, whose λ serves all its components.
    """
    if not _added_decay:
        return 0.0
    if x in _added_decay:
        return float(_added_decay.pop(x))
    return 0.0 if x._base is None else float(_added_decay.get(x._base, 0.0))


def note_added_decay(x: Tensor, decay: float) -> None:
    """Note the weight decay that a step is going to add to the gradient at x; 0: none."""
    if decay:
        _added_decay[x] = decay
    elif _added_decay:
        _added_decay.pop(x, None)


# -- optimisers ----------------------------------------------------------------------------------------------


def parameters_of(optimizer: Optimizer) -> Iterator[Any]:
    """Iterate over the parameters of all groups."""
    return (p for group in optimizer.param_groups for p in group["params"])


def has_closure_among(args: Any, kwargs: Any) -> bool:
    """Return whether these arguments of a step, the optimiser first, include a closure."""
    return any(argument is not None for argument in (*args[1:], kwargs.get("closure")))


def keeps(optimizer: Optimizer, p: Tensor) -> bool:
    """Return whether an optimiser keeps a parameter on its manifold."""
    return any(keeper(optimizer, p) for keeper in keepers)


def about_to_move(optimizer: Optimizer, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Iterate over the parameters on manifolds that a step will move, if only by its closure."""
    has_closure = has_closure_among(args, kwargs)
    return (p for p in parameters_of(optimizer) if (has_closure or p.grad is not None) and manifold_of(p) is not None)


@functools.cache
def watch_shards() -> None:
    """Refuse, from now on, every step that would move a sharded parameter as a Euclidean one."""
    before_steps.append(_refuse)


def _refuse(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for p in about_to_move(optimizer, args, kwargs):
        if is_dtensor(p) and not keeps(optimizer, p):
            raise TypeError(
                f"{type(optimizer).__name__} would move a sharded unitary parameter of shape {tuple(p.shape)} as a "
                "Euclidean one: take the optimisers of projunn_manifold.optim, or constrain this one"
            )


@functools.cache
def watch_optimizers() -> None:
    """Have the steps of all optimisers call the functions above, and stay outside the graphs of torch.compile."""

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if isinstance(optimizer, OptimMixin) or not torch.compiler.is_compiling():
            _call(before_steps, optimizer, args, kwargs)

    def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if isinstance(optimizer, OptimMixin) or not torch.compiler.is_compiling():
            _call(after_steps, optimizer, args, kwargs)

    context.register_optimizer_step_pre_hook(before)
    context.register_optimizer_step_post_hook(after)
    context.keep_optimizers_outside_graphs()


@context.outside_graphs  # in which parameters have lost their manifolds
def _call(functions: list[Callable[[Optimizer, Any, Any], None]], optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for function in functions:
        function(optimizer, args, kwargs)
