"""What PyTorch is doing right now; the private names of PyTorch that tell it are confined to this module.

Compiled code, transforms of ``torch.func``, forward-mode derivatives, fake tensors, GPUs and autocast each change what
a function may do: look at a tensor's values, touch its memory, or compute in its own precision.

``torch.compile`` treats an optimiser's parameters as plain tensors and drops their class, by which geoopt recognises
a manifold (torch 2.13), and a traced step is then silently Euclidean.  So the functions of this package that make steps
stay outside its graphs, and :func:`keep_optimizers_outside_graphs` does the same for geoopt's optimisers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable, without the one-second import of torch._dynamo
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map

__all__ = [
    "batched",
    "constant_in_graphs",
    "copy_each_",
    "disabled_torch_function",
    "has_step_hooks",
    "in_full_precision",
    "is_differentiated",
    "is_on_host",
    "is_plain",
    "keep_optimizers_outside_graphs",
    "make_wrapper",
    "operators_only",
    "outside_graphs",
    "readable",
    "register_optimizer_step_post_hook",
    "register_optimizer_step_pre_hook",
    "step_post_hooks",
    "traced",
    "transformed",
    "tree_map",
    "wait_for",
    "wants_derivatives",
    "would_wait",
]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_DEVICES = ("cpu", "cuda", "mps", "xpu")  # of which each has its own regions of autocast

_DISPATCH = Tensor.__torch_dispatch__

#: Returns whether torch.export runs; torch 2.6 does not distinguish it from torch.compile.
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)

#: The ``__torch_function__`` of a tensor subclass that acts through ``__torch_dispatch__`` alone.
disabled_torch_function: Any = torch._C._disabled_torch_function_impl

#: Copies each of many tensors to the one at its place in another list, in one call.
copy_each_: Callable[..., None] = torch._foreach_copy_

#: Makes a tensor of a subclass that has no storage.
make_wrapper: Any = Tensor._make_wrapper_subclass


# -- tensors and modes -----------------------------------------------------------------------------------


def traced() -> bool:
    """Return whether tensors are abstract now: compiled, recorded, or under a transform of torch.func."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or torch._C._is_tracing()


def readable(x: Tensor) -> bool:
    """Return whether the host may read x's values: on CPU, where it need not wait, unless they are abstract."""
    return x.is_cpu and not traced()


def would_wait(x: Tensor) -> bool:
    """Return whether the host would wait if it looked at x's values, or had it factorised."""
    return not (readable(x) or traced())


def is_on_host(t: Tensor) -> bool:
    """Return whether NumPy can compute with t's memory."""
    return t.is_cpu and is_plain(t) and not t.requires_grad and not traced()


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def transformed() -> bool:
    """Return whether a transform of torch.func or a forward-mode derivative is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def operators_only() -> bool:
    """Return whether autograd functions of this package cannot be called.

    That is so under transforms, and while torch.export, torch.jit.trace or an exporter to ONNX records a graph that
    must run without this package.
    """
    return transformed() or _is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]


def batched(t: Tensor) -> bool:
    """Return whether t stands for many tensors, as gradients do in ``autograd.grad(..., is_grads_batched=True)``."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_legacy_batchedtensor(t) or torch._C._functorch.is_batchedtensor(t)


def is_differentiated(t: Tensor) -> bool:
    """Return whether a derivative may depend on t, backward or forward."""
    return (t.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0


def wants_derivatives(*tensors: Tensor) -> bool:
    """Return whether derivatives may be asked of what is made from these tensors, backward or forward."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    return not torch.compiler.is_compiling() and transformed()


def is_plain(t: Tensor) -> bool:
    """Return whether t's memory can be used directly: not differentiated, conjugated, fake, traced or distributed."""
    if is_differentiated(t) or t.is_conj() or t.is_neg():
        return False
    return type(t).__torch_dispatch__ is _DISPATCH


def in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function of tensors: inside a region of torch.autocast it runs in the tensors' own precision."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        enabled = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
        if not enabled:
            return function(*args, **kwargs)
        with ExitStack() as regions:
            for device in enabled:
                regions.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return run


# -- torch.compile ---------------------------------------------------------------------------------------


def outside_graphs(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function that compiled code calls as it is: the graph ends before it, and another starts after it.

    Steps draw numbers by a count of steps and look at values, which no graph can do.
    """
    outside: Callable[_Arguments, _Result] = _disable_dynamo(function)
    return outside


def constant_in_graphs(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function of constants that is called while a graph is made: the graph takes its result as it is."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result
    return function


@functools.cache
def keep_optimizers_outside_graphs() -> None:
    """Keep the steps of geoopt's optimisers outside the graphs of torch.compile, from now on."""
    from torch._dynamo import trace_rules

    trace_rules.add("geoopt.optim")


# -- optimisers ------------------------------------------------------------------------------------------


def has_step_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether functions can be called after each step of an optimiser: some classes leave out torch's set-up."""
    return hasattr(optimizer, "_optimizer_step_post_hooks")


def step_post_hooks(optimizer: torch.optim.Optimizer) -> list[Callable[..., Any]]:
    """Return the functions that are called after each step of an optimiser."""
    return list(optimizer._optimizer_step_post_hooks.values())
