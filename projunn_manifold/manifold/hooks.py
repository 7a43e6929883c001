"""What is called before and after each step of any optimiser, and before conversions, from the first manifold on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from geoopt.optim.mixin import OptimMixin
from torch import Tensor

from projunn_manifold import context

__all__ = ["after_steps", "before_conversions", "before_steps", "watch_optimizers"]

Optimizer = torch.optim.Optimizer

#: Functions of (optimizer, args, kwargs) that are called before and after each step.
before_steps: list[Callable[[Optimizer, Any, Any], None]] = []
after_steps: list[Callable[[Optimizer, Any, Any], None]] = []

#: Functions of (manifold, convert) that are called before a module converts its manifold and its weights.
before_conversions: list[Callable[[Any, Callable[[Tensor], Tensor]], None]] = []


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
