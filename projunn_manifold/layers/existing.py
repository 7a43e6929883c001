"""Weights of existing modules put on a manifold, and parameter groups for models that have some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from geoopt import ManifoldParameter, ManifoldTensor
from torch import nn

from projunn_manifold import init as initialise
from projunn_manifold.layers.base import check_loaded
from projunn_manifold.manifold.unitary import UnitaryLowRank, unitary_of
from projunn_manifold.optim.plan import Plan, reattach_manifolds

__all__ = ["param_groups", "plain_", "unitary_"]


def unitary_(
    module: nn.Module, name: str = "weight", k: int | None = 1, *, manifold: UnitaryLowRank | None = None
) -> nn.Module:
    """Put a square or tall weight of an existing module on a manifold, at its closest point; return the module.

    The manifold becomes the submodule ``{name}_manifold``.  The module keeps a plan: after
    ``load_state_dict(assign=True)`` the weight is put back on its manifold, and a forward pass with a weight that lost
    it otherwise is refused.  ``load_state_dict`` takes what the plain module had if the weight is on the manifold, and
    raises ValueError if it is not.  Do it before an optimiser is built, and before the weight is shared with another
    module.

    Parameters
    ----------
    module : torch.nn.Module
    name : str
        Of a parameter ``(n, m)``, n >= m.
    k, manifold
        As for :class:`UnitaryLinear`.

    Raises
    ------
    AttributeError, TypeError
        The module has no such parameter.
    ValueError
        A wide weight; a convolution's; an LSTM's or GRU's, which is a stack of gates and no one matrix, and the like; a
        rank-deficient one, whose closest unitary is not unique.

    Examples
    --------
    >>> import torch
    >>> from projunn_manifold.layers import unitary_
    >>> unitary_(torch.nn.RNN(4, 16, nonlinearity="relu"), "weight_hh_l0", k=2).weight_hh_l0.manifold
    UnitaryLowRank(k=2, sampler=lsi, dense where 2k >= m) manifold
    """
    weight = getattr(module, name)
    if not isinstance(weight, nn.Parameter):
        raise TypeError(f"`{name}` must be a parameter, got {type(weight).__name__}")
    if isinstance(module, nn.LSTM | nn.GRU | nn.LSTMCell | nn.GRUCell):
        raise ValueError(f"{type(module).__name__}.{name} is a stack of gates: as one matrix it means nothing")
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        raise ValueError(f"{type(module).__name__}.{name} is a stack of three weights: as one matrix it means nothing")
    if weight.dim() != 2:
        raise ValueError(
            f"{type(module).__name__}.{name} must be a matrix, got a kernel of shape {tuple(weight.shape)}"
        )
    if isinstance(weight, ManifoldTensor):
        raise ValueError(f"`{name}` is on a manifold already: {weight.manifold}")
    manifold = UnitaryLowRank(k) if manifold is None else manifold
    point = initialise.nearest_unitary_(weight.detach().clone(memory_format=torch.contiguous_format))
    setattr(module, name, ManifoldParameter(point, manifold=manifold, requires_grad=weight.requires_grad))
    module.add_module(f"{name}_manifold", manifold)
    guard = _Guard(name, manifold)
    module.register_load_state_dict_pre_hook(guard.check_loaded)
    module.register_load_state_dict_post_hook(guard.reattach)
    module.register_forward_pre_hook(guard.check)
    return module


def plain_(module: nn.Module, name: str = "weight") -> nn.Module:
    """Make a weight that is on a manifold an ordinary parameter again; return the module: undoes :func:`unitary_`.

    Raises
    ------
    TypeError
        The module has no such parameter on a manifold.
    """
    weight = getattr(module, name)
    if not isinstance(weight, ManifoldTensor):
        raise TypeError(f"`{name}` must be on a manifold, got {type(weight).__name__}")
    for hooks in (module._forward_pre_hooks, module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks):
        for key, hook in list(hooks.items()):
            guard = getattr(getattr(hook, "hook", hook), "__self__", None)  # PyTorch wraps some
            if isinstance(guard, _Guard) and name in guard.plan:
                del hooks[key]
    module._modules.pop(f"{name}_manifold", None)
    setattr(module, name, nn.Parameter(weight.detach().as_subclass(torch.Tensor).clone(), weight.requires_grad))
    return module


class _Guard:
    """Keeps the manifold of one weight of a module that is not ours."""

    def __init__(self, name: str, manifold: UnitaryLowRank) -> None:
        self.plan = Plan({name: manifold})

    def check_loaded(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Refuse a weight that is off the manifold."""
        check_loaded(module, self.plan, state_dict, prefix)

    def reattach(self, module: nn.Module, _: Any) -> None:
        """Put the weight back."""
        reattach_manifolds(module, self.plan)

    def check(self, module: nn.Module, _: Any) -> None:
        """Refuse a forward pass with a weight that is on no manifold."""
        for name in self.plan:
            if not isinstance(getattr(module, name), ManifoldTensor):
                raise RuntimeError(
                    f"`{name}` has lost its manifold; call reattach_manifolds, or load a state_dict, before an "
                    "optimiser is built"
                )


def param_groups(model: nn.Module, lr: float, *, unitary_lr: float) -> list[dict[str, Any]]:
    """Return two groups for an optimiser: parameters on unitary manifolds at ``unitary_lr``, all others at ``lr``.

    With torch's RMSprop and Adam, constrained, the paper's choice is ``unitary_lr=lr/32`` (Kiani et al. 2022,
    section 5).  The learning rates of geoopt's optimisers, and of those of :mod:`projunn_manifold.optim`, are of
    another kind, and there lr/32 would hardly move anything.  A group without parameters is left out.
    """
    unitary: list[Any] = []
    others: list[Any] = []
    for p in model.parameters():
        (others if unitary_of(p) is None else unitary).append(p)
    groups: Iterable[tuple[list[Any], float]] = ((others, lr), (unitary, unitary_lr))
    return [{"params": params, "lr": rate} for params, rate in groups if params]
