"""What the weights of a model are applied to, seen by running it once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from projunn_manifold.layers.plain_conv import PLAIN

__all__ = ["observed"]


def observed(model: nn.Module, modules: list[nn.Module], inputs: Any) -> dict[nn.Module, Tensor]:
    """Return what the weights of these modules are applied to, as rows, or as images."""
    seen: dict[nn.Module, list[Tensor]] = {}

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        rows = _applied_to(module, [*args, *kwargs.values()], output)
        if rows is not None and rows.numel():
            seen.setdefault(module, []).append(rows.detach())

    handles = [module.register_forward_hook(look, with_kwargs=True) for module in dict.fromkeys(modules)]
    try:
        with _in_eval_mode(model), torch.no_grad():
            model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    for module, parts in seen.items():
        if len({part.shape[1:] for part in parts}) > 1:
            raise ValueError(f"{module} sees images of more than one size, for which no one convolution is made")
    return {module: torch.cat(parts) for module, parts in seen.items()}


def _applied_to(module: Any, args: list[Any], output: Any) -> Tensor | None:
    """Return what a module's weight was applied to in one call, where that can be seen."""
    if type(module) in PLAIN:
        images: Tensor = args[0]
        return images if images.dim() == module.weight.dim() else images[None]
    if type(module) is nn.Linear:
        return torch.as_tensor(args[0]).reshape(-1, module.in_features)
    before = args[1] if len(args) > 1 else None  # the first state; zero, which counts for nothing, if None
    if type(module) is nn.RNNCell:
        return None if before is None else torch.as_tensor(before).reshape(-1, module.hidden_size)
    if type(module) is not nn.RNN:
        return None
    if module.num_layers > 1 or module.bidirectional or not isinstance(output[0], Tensor):
        return None
    states = output[0]
    time = 1 if module.batch_first and states.dim() == 3 else 0
    seen = states.narrow(time, 0, states.shape[time] - 1).reshape(-1, module.hidden_size)  # all but the last
    return seen if before is None else torch.cat((torch.as_tensor(before).reshape(-1, module.hidden_size), seen))


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
