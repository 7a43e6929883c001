"""What this package needs to know of any optimiser: which parameters it moves, and if it keeps them on their manifolds.

Wrappers (accelerate's, Lightning's, ``ZeroRedundancyOptimizer``, Lookahead) hold the optimiser that makes the steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from projunn_manifold import context, validation
from projunn_manifold.manifold.hooks import before_steps
from projunn_manifold.manifold.notes import in_words
from projunn_manifold.manifold.parameters import is_dtensor, manifold_of

__all__ = [
    "ADVICE",
    "PUT_BACK_WRAPPED",
    "about_to_move",
    "has_closure_among",
    "inner_optimizer",
    "keepers",
    "keeps",
    "layers_of",
    "parameters_of",
    "shares_groups",
    "warn_of_interpolation",
    "watch_shards",
]

Optimizer = torch.optim.Optimizer

#: What to do about an optimiser that moves a parameter off its manifold.
ADVICE = "use an optimiser of geoopt or of projunn_manifold.optim, or constrain this one"

#: What to do about a wrapper that writes to weights itself.
PUT_BACK_WRAPPED = (
    "after each such write put the weights back, with torch.no_grad(): p.copy_(p.manifold.projx(p)), or give unitary "
    "weights to an optimiser without it; for averages use projunn_manifold.averaging.AveragedModel"
)

_HOLDING = ("optimizer", "optim", "base_optimizer", "original_optimizer")  # where wrappers hold what they wrap

#: Functions of (optimizer, p) that return whether an optimiser keeps a parameter on its manifold.  If a class of your
#: own does so, append a function: ``keepers.append(lambda optimizer, p: isinstance(optimizer, Own))``.
keepers: list[Callable[[Optimizer, Tensor], bool]] = []


def inner_optimizer(optimizer: object) -> Optimizer:
    """Return the ``torch.optim.Optimizer`` that makes the steps of this optimiser: itself, or the one that it wraps.

    Wrappers (accelerate's, Lightning's, ``ZeroRedundancyOptimizer``, Lookahead) hold it as ``optimizer``, ``optim``,
    ``base_optimizer`` or ``original_optimizer``.

    Raises
    ------
    TypeError
        ``optimizer`` is not an optimiser and holds none; a learning rate scheduler, which holds one, is refused too.
    """
    return layers_of(optimizer)[-1]


def layers_of(optimizer: object) -> list[Any]:
    """Return an optimiser, the one that it wraps, the one that this wraps, and so on; raise as ``inner_optimizer``."""
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
        names = f".{', .'.join(_HOLDING[:-1])} or .{_HOLDING[-1]}"
        raise TypeError(
            f"`optimizer` must be a torch.optim.Optimizer, or a wrapper that holds one as {names}, got "
            f"{type(optimizer).__name__}{advice}"
        )
    return layers


def _is_optimizer(found: object) -> bool:
    """Return whether torch has set up this optimiser; some wrappers are of its class, but do not call ``__init__``."""
    return isinstance(found, Optimizer) and context.has_step_hooks(found)


def _holds(found: object) -> bool:
    return any(_is_optimizer(getattr(found, name, None)) for name in _HOLDING)


def shares_groups(optimizer: Any) -> bool:
    """Return whether an optimiser and all that it wraps have the same groups; ``ZeroRedundancyOptimizer`` does not.

    A wrapper without groups counts as having those of the optimiser that it wraps.
    """
    inner = inner_optimizer(optimizer)
    return all(
        getattr(layer, "param_groups", inner.param_groups) is inner.param_groups for layer in layers_of(optimizer)
    )


def warn_of_interpolation(optimizer: object) -> None:
    """Warn of a wrapper that is known to interpolate weights, which takes them off their manifolds."""
    for layer in layers_of(optimizer):
        if any("lookahead" in kind.__name__.lower() for kind in type(layer).__mro__):
            validation.warn(
                f"{type(layer).__name__} interpolates weights, and so takes unitary ones off their manifolds: "
                f"{PUT_BACK_WRAPPED}"
            )


def parameters_of(optimizer: Any) -> Iterator[Any]:
    """Iterate over the parameters of all groups, of the optimiser inside if a wrapper has no groups."""
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
    """Iterate over the parameters on manifolds that a step will move; with a closure, over all on manifolds."""
    has_closure = has_closure_among(args, kwargs)
    return (p for p in parameters_of(optimizer) if (has_closure or p.grad is not None) and manifold_of(p) is not None)


@functools.cache
def watch_shards() -> None:
    """Raise TypeError, from now on, in every step that would move a sharded parameter as a Euclidean one."""
    before_steps.append(_refuse)


def _refuse(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for p in about_to_move(optimizer, args, kwargs):
        if is_dtensor(p) and not keeps(optimizer, p):
            raise TypeError(
                f"{type(optimizer).__name__} would move {in_words(p, 'a sharded unitary parameter')} as a Euclidean "
                "one: use the optimisers of projunn_manifold.optim, or constrain this one"
            )
