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

from projunn_manifold import context, validation
from projunn_manifold.linalg import sharded

__all__ = [
    "ADVICE",
    "PUT_BACK_WRAPPED",
    "about_to_move",
    "after_steps",
    "before_steps",
    "gradient_of",
    "has_closure_among",
    "inner_optimizer",
    "is_dtensor",
    "keepers",
    "keeps",
    "local_view",
    "manifold_of",
    "note_added_decay",
    "note_whole_gradient",
    "parameters_of",
    "search_along_slopes",
    "shares_groups",
    "take_added_decay",
    "warn_of_interpolation",
    "watch_optimizers",
    "watch_shards",
    "whole_gradient",
]

Optimizer = torch.optim.Optimizer

#: What to do about an optimiser that moves a parameter off its manifold.
ADVICE = "take an optimiser of geoopt or of projunn_manifold.optim, or constrain this one"

#: What to do about a wrapper that writes to weights itself.
PUT_BACK_WRAPPED = (
    "after each of its own writes put them back, with torch.no_grad(): p.copy_(p.manifold.projx(p)), or leave unitary "
    "weights to an optimiser without it; averages for evaluation are made by projunn_manifold.averaging.AveragedModel"
)

_HOLDING = ("optimizer", "optim", "base_optimizer", "original_optimizer")  # where wrappers hold what they wrap

#: Functions of (optimizer, args, kwargs) that are called before and after each step of any optimiser.
before_steps: list[Callable[[Optimizer, Any, Any], None]] = []
after_steps: list[Callable[[Optimizer, Any, Any], None]] = []
#: Functions of (optimizer, p) that tell whether an optimiser keeps a parameter on its manifold.
keepers: list[Callable[[Optimizer, Tensor], bool]] = []

_added_decay: Any = WeakIdKeyDictionary()
_whole_gradients: Any = WeakIdKeyDictionary()  # parameters of line searches: whole gradients by sketched ones


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


def note_added_decay(x: Tensor, decay: float | Tensor) -> None:
    """Note the weight decay that a step is going to add to the gradient at x; 0: none."""
    if decay:
        _added_decay[x] = decay
    elif _added_decay:
        _added_decay.pop(x, None)


# -- line searches -------------------------------------------------------------------------------------------


def search_along_slopes(x: Tensor) -> None:
    """Have the manifold of x remember, from now on, the whole gradients from which it makes sketched ones at x."""
    if x not in _whole_gradients:
        _whole_gradients[x] = WeakIdKeyDictionary()


def note_whole_gradient(x: Tensor, sketched: Tensor, whole: Tensor) -> None:
    """Note the gradient from which a sketched one was made, if a line search at x will ask for it."""
    if _whole_gradients and x in _whole_gradients:
        _whole_gradients[x][sketched] = whole.detach().clone()


def whole_gradient(x: Tensor, sketched: Tensor) -> Tensor | None:
    """Return the gradient from which a sketched one at x was made, or None."""
    if not _whole_gradients or x not in _whole_gradients:
        return None
    found: Tensor | None = _whole_gradients[x].get(sketched)
    return found


# -- optimisers ----------------------------------------------------------------------------------------------


def inner_optimizer(optimizer: object) -> Optimizer:
    """Return the optimiser of torch's kind that makes the steps of this one: itself, or what it wraps.

    Wrappers (accelerate's, Lightning's, ``ZeroRedundancyOptimizer``, Lookahead) hold it as ``optimizer`` or ``optim``.

    Raises
    ------
    TypeError
        No optimiser, and nothing that holds one.
    """
    return _layers(optimizer)[-1]


def _layers(optimizer: object) -> list[Any]:
    """Return an optimiser, what it wraps, what that wraps, and so on."""
    layers: list[Any] = [optimizer]
    if not isinstance(optimizer, torch.optim.lr_scheduler.LRScheduler):  # which holds one, but is none
        while True:
            within = (getattr(layers[-1], name, None) for name in _HOLDING)
            inner = next((found for found in within if _is_optimizer(found) or _holds(found)), None)
            if inner is None or any(inner is layer for layer in layers):
                break
            layers.append(inner)
    if not _is_optimizer(layers[-1]):
        advice = "; give them one by one" if isinstance(optimizer, list | tuple) else ""
        raise TypeError(
            "`optimizer` must be a torch.optim.Optimizer, or a wrapper that holds one as .optimizer or .optim, got "
            f"{type(optimizer).__name__}{advice}"
        )
    return layers


def _is_optimizer(found: object) -> bool:
    """Return whether this is an optimiser that torch has set up; some wrappers are of its class, but not set up."""
    return isinstance(found, Optimizer) and context.has_step_hooks(found)


def _holds(found: object) -> bool:
    return any(_is_optimizer(getattr(found, name, None)) for name in _HOLDING)


def shares_groups(optimizer: Any) -> bool:
    """Return whether an optimiser and all it wraps have the same groups; not those of ``ZeroRedundancyOptimizer``.

    A wrapper without groups has those of what it wraps.
    """
    inner = inner_optimizer(optimizer)
    return all(getattr(layer, "param_groups", inner.param_groups) is inner.param_groups for layer in _layers(optimizer))


def warn_of_interpolation(optimizer: object) -> None:
    """Warn of a wrapper that is known to average weights, which takes them off their manifolds."""
    for layer in _layers(optimizer):
        if any("lookahead" in kind.__name__.lower() for kind in type(layer).__mro__):
            validation.warn(
                f"{type(layer).__name__} interpolates weights, and so takes unitary ones off their manifolds: "
                f"{PUT_BACK_WRAPPED}"
            )


def parameters_of(optimizer: Any) -> Iterator[Any]:
    """Iterate over the parameters of all groups."""
    groups = getattr(optimizer, "param_groups", None)
    return (p for group in groups or inner_optimizer(optimizer).param_groups for p in group["params"])


def has_closure_among(args: Any, kwargs: Any) -> bool:
    """Return whether these arguments of a step, the optimiser first, include a closure."""
    return any(argument is not None for argument in (*args[1:], kwargs.get("closure")))


def keeps(optimizer: Optimizer, p: Tensor) -> bool:
    """Return whether an optimiser, or what it wraps, keeps a parameter on its manifold."""
    inner = inner_optimizer(optimizer)
    return any(keeper(inner, p) for keeper in keepers)


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
