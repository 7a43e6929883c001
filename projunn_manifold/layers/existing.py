"""Weights of existing modules put on a manifold, and parameter groups for models that have some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from geoopt import ManifoldParameter, ManifoldTensor
from torch import Tensor, nn

from projunn_manifold.context import in_full_precision
from projunn_manifold.init import nearest
from projunn_manifold.manifold.notes import note_name, noted_name
from projunn_manifold.manifold.parameters import is_dtensor, manifold_of
from projunn_manifold.manifold.unitary import UnitaryLowRank, manifold_or_new, unitary_of
from projunn_manifold.optim.plan import Guard, Plan, guard_of
from projunn_manifold.optim.replaced import note_replacements
from projunn_manifold.validation import check_precision, shape_problem

__all__ = ["attach", "param_groups", "parameter_problem", "plain_", "unitary_", "weight_problem"]


@torch.no_grad()
@in_full_precision
def unitary_(
    module: nn.Module, name: str = "weight", k: int | None = 1, *, manifold: UnitaryLowRank | None = None
) -> nn.Module:
    """Put a weight of an existing module on a manifold, at its closest point, and return the module.

    The manifold becomes the submodule ``{name}_manifold``.  After ``load_state_dict`` (also with ``assign=True``) the
    weight is put back on it, and ``reset_parameters`` draws the module's own first values and takes their closest
    point.  On the meta device there are no values yet: ``to_empty`` and ``reset_parameters`` draw them.  Call it before
    you build an optimiser, and before the weight is shared with another module.

    In a forward pass anything may stand in for the weight.  If the weight itself loses its manifold, the next step of
    an optimiser that holds it raises ValueError, and :func:`~projunn_manifold.manifolds_of` has it in its plan.

    ``load_state_dict`` takes what the plain module had if the weight is on the manifold, and raises ValueError if it
    is not.

    Cost: one SVD in double precision, :math:`O(n m^2)`.

    Parameters
    ----------
    module : torch.nn.Module
    name : str
        Of a parameter ``(*batch, n, m)``, n >= m: a square or tall matrix, or a stack of them.
    k, manifold
        As for :class:`UnitaryLinear`.

    Raises
    ------
    AttributeError, TypeError
        The module has no such parameter.
    ValueError
        A weight that is no matrix or stack of matrices: a kernel of a convolution, the gates of an LSTM or GRU, the
        joint weight of a MultiheadAttention; a wide one; another dtype than the manifold's; a rank-deficient one, whose
        closest unitary is not unique; one that is on a manifold, or sharded, or has no shape yet.

    Examples
    --------
    >>> import torch
    >>> from projunn_manifold.layers import unitary_
    >>> unitary_(torch.nn.RNN(4, 16, nonlinearity="relu"), "weight_hh_l0", k=2).weight_hh_l0.manifold
    UnitaryLowRank(k=2, sampler=lsi, dense where 2k >= m) manifold
    """
    weight = _weight_of(module, name)
    if not isinstance(weight, nn.Parameter):
        advice = ": remove the pruning or parametrisation that computes it" if isinstance(weight, Tensor) else ""
        raise TypeError(f"`{name}` must be a parameter, got {type(weight).__name__}{advice}")
    problem = weight_problem(module, name) or shape_problem(weight.shape, name)
    if problem:
        raise ValueError(problem)
    check_precision(weight.dtype, name)
    manifold = manifold_or_new(manifold, k)
    return attach(module, name, nearest(weight, f"`{name}`"), manifold)


def _weight_of(module: nn.Module, name: str) -> Any:
    """Return a parameter, or what has taken its place; raise AttributeError with the names of those that there are."""
    if not hasattr(module, name):
        names = ", ".join(repr(own) for own, _ in module.named_parameters(recurse=False)) or "none"
        raise AttributeError(f"{type(module).__name__} has no parameter {name!r}; its own parameters are {names}")
    return getattr(module, name)


def attach(module: nn.Module, name: str, point: Tensor, manifold: UnitaryLowRank) -> nn.Module:
    """Put a point of a manifold in the place of a weight, guard it, and return the module."""
    weight = module.get_parameter(name)
    setattr(module, name, ManifoldParameter(point, manifold=manifold, requires_grad=weight.requires_grad))
    note_replacements([(noted_name(weight) or f"{type(module).__name__}.{name}", weight)])
    module.add_module(f"{name}_manifold", manifold)
    guard = guard_of(module) or Guard(module, Plan({}))
    guard.plan[name] = manifold
    if hasattr(type(module), "reset_parameters"):
        module.__dict__["reset_parameters"] = guard.reset_parameters
    return module


def plain_(module: nn.Module, name: str = "weight") -> nn.Module:
    """Make a weight that is on a manifold an ordinary parameter again; return the module: undoes :func:`unitary_`.

    A weight that has lost its manifold stays as it is, and is no longer expected to have one.  One that is pruned or
    parametrised stays so.

    Raises
    ------
    TypeError
        The module has no such parameter on a manifold.
    """
    guard = guard_of(module)
    found = None if guard is None else guard.find(name)
    planned, now = found or (name, name)
    weight = module.get_parameter(now) if found else _weight_of(module, name)
    if not isinstance(weight, ManifoldTensor) and not found:
        raise TypeError(f"`{name}` must be on a manifold, got {type(weight).__name__}")
    if guard is not None and found:
        guard.forget(planned)
    module._modules.pop(f"{planned}_manifold", None)
    if isinstance(weight, ManifoldTensor):
        path, _, leaf = now.rpartition(".")
        free = nn.Parameter(weight.detach().as_subclass(Tensor).clone(), weight.requires_grad)
        setattr(module.get_submodule(path), leaf, free)
        note_replacements([(noted_name(weight) or f"{type(module).__name__}.{now}", weight)])
    return module


# -- which weights -------------------------------------------------------------------------------------------


def weight_problem(module: nn.Module, name: str) -> str | None:
    """Return why a module's parameter is no matrix, or stack of matrices, that can become unitary; None if it is one.

    Shape and dtype are not looked at: a wide matrix has an adjoint, and a dtype can be changed.
    """
    weight, own = module.get_parameter(name), f"{type(module).__name__}.{name}"
    if isinstance(module, nn.LSTM | nn.GRU | nn.LSTMCell | nn.GRUCell):
        return f"{own} is a stack of gates: as one matrix it means nothing"
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        return f"{own} is a stack of three weights: as one matrix it means nothing"
    if isinstance(module, nn.modules.conv._ConvNd | nn.Bilinear) and weight.dim() > 2:
        return f"{own} must be a matrix, or a stack of them, got a kernel of shape {tuple(weight.shape)}"
    return parameter_problem(weight, own)


def parameter_problem(weight: Any, name: str) -> str | None:
    """Return why a parameter, whatever its module makes of it, cannot become unitary, or None."""
    if nn.parameter.is_lazy(weight):
        return f"{name} has no shape yet: pass a batch through the model first"
    manifold = manifold_of(weight)
    if manifold is not None:
        return f"{name} is on a manifold already: {manifold}"
    if is_dtensor(weight):
        return f"{name} is sharded: make it unitary first, and shard it then"
    return None


# -- optimisers ----------------------------------------------------------------------------------------------


def param_groups(model: nn.Module, lr: float, *, unitary_lr: float) -> list[dict[str, Any]]:
    """Return two groups for an optimiser: parameters on unitary manifolds at ``unitary_lr``, all others at ``lr``.

    With torch's RMSprop and Adam, constrained, the paper's choice is ``unitary_lr=lr/32`` (Kiani et al. 2022,
    section 5).  The learning rates of geoopt's optimisers, and of those of :mod:`projunn_manifold.optim`, are of
    another kind, and there lr/32 would hardly move anything.  A group without parameters is left out.  Messages about
    unitary parameters use their names in this model.
    """
    unitary: list[Any] = []
    others: list[Any] = []
    for name, p in model.named_parameters():
        if unitary_of(p) is None:
            others.append(p)
        else:
            unitary.append(p)
            note_name(p, name)
    groups: Iterable[tuple[list[Any], float]] = ((others, lr), (unitary, unitary_lr))
    return [{"params": params, "lr": rate} for params, rate in groups if params]
