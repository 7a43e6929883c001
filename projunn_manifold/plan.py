"""Which parameter is on which manifold, and what to do when a parameter has lost it.

A parameter's manifold is an attribute of the parameter object.  Whatever puts another object in its place
(``load_state_dict(assign=True)``, ``to_empty``, sharding wrappers) loses it, and geoopt's optimisers then treat the new
one as Euclidean, without a word.  A plan, made while all is well, tells afterwards what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from geoopt import ManifoldParameter, ManifoldTensor
from geoopt.manifolds.base import Manifold
from torch import Tensor

__all__ = ["check_manifolds", "manifolds_of", "reattach_manifolds"]

Plan = Mapping[str, Manifold]


def manifolds_of(model: torch.nn.Module) -> dict[str, Manifold]:
    """Return the manifold of every parameter that has one, under each of the parameter's names.

    Examples
    --------
    >>> import geoopt, torch
    >>> from projunn_manifold import UnitaryLowRank, check_manifolds, manifolds_of, reattach_manifolds
    >>> manifold = UnitaryLowRank(k=1)
    >>> model = torch.nn.Linear(8, 8)
    >>> model.weight = geoopt.ManifoldParameter(manifold.random(8, 8), manifold=manifold)
    >>> plan = manifolds_of(model)
    >>> _ = model.load_state_dict(model.state_dict(), assign=True)  # replaces the parameter
    >>> check_manifolds(model, plan)
    Traceback (most recent call last):
    ...
    ValueError: manifolds lost: 'weight' is a plain Parameter, not on UnitaryLowRank; call reattach_manifolds
    >>> reattach_manifolds(model, plan)
    >>> check_manifolds(model, plan)
    """
    parameters = model.named_parameters(remove_duplicate=False)
    return {name: p.manifold for name, p in parameters if isinstance(p, ManifoldTensor)}


def check_manifolds(model: torch.nn.Module, plan: Plan, *optimizers: torch.optim.Optimizer) -> None:
    """Raise unless every parameter of the plan is in the model, on its manifold, and known to the optimisers.

    With optimisers given, each trainable parameter of the plan must be held by one of them: an optimiser built before a
    parameter was replaced goes on moving the old one.

    Raises
    ------
    ValueError
        Names each parameter that is gone, off its manifold or held by none of the optimisers, and each optimiser
        that moves it as a Euclidean one.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    problems, lost = [], False
    held = [{id(p) for p in _parameters(optimizer)} for optimizer in optimizers]
    for name, manifold in plan.items():
        p = parameters.get(name)
        if p is None:
            problems.append(f"{name!r} is no parameter of the model any more")
            continue
        if not isinstance(p, ManifoldTensor):
            lost = True
            problems.append(f"{name!r} is a plain {type(p).__name__}, not on {_name(manifold)}")
        elif type(p.manifold) is not type(manifold):
            problems.append(f"{name!r} is on {_name(p.manifold)}, not on {_name(manifold)}")
        holders = [optimizer for optimizer, ids in zip(optimizers, held, strict=True) if id(p) in ids]
        if not isinstance(p, ManifoldTensor):
            problems += [f"{type(optimizer).__name__} moves {name!r} as Euclidean" for optimizer in holders]
        if optimizers and not holders and p.requires_grad:
            problems.append(f"no given optimiser holds {name!r}: build it again and load its state_dict")
    if problems:
        advice = "; call reattach_manifolds" if lost else ""
        raise ValueError(f"manifolds lost: {'; '.join(problems)}{advice}")


def reattach_manifolds(model: torch.nn.Module, plan: Plan, *optimizers: torch.optim.Optimizer) -> None:
    """Put every parameter of the plan that became a plain tensor back on its manifold, values and gradient kept.

    Parameters that were shared stay shared.  In the optimisers given, the new parameter takes the place of the plain
    one, with its state.  Values are taken as they are: after steps without the manifold, ``p.proj_()`` under
    ``torch.no_grad()`` brings them back to it.  All is checked first: an error leaves everything as it was.

    Raises
    ------
    ValueError, TypeError
        The model lacks a parameter of the plan, or it cannot be a point of its manifold (shape, dtype).
    NotImplementedError
        A sharded parameter (DTensor), which cannot carry a manifold.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in plan if name not in parameters]
    if missing:
        raise ValueError(f"not parameters of the model any more: {', '.join(map(repr, missing))}")
    mended: dict[int, tuple[Tensor, ManifoldParameter]] = {}
    for name, manifold in plan.items():
        p = parameters[name]
        if isinstance(p, ManifoldTensor) or id(p) in mended:
            continue
        if type(p).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise NotImplementedError(f"{name!r} is a {type(p).__name__}, which cannot carry a manifold")
        mended[id(p)] = (p, ManifoldParameter(p.data, manifold=manifold, requires_grad=p.requires_grad))
    for name in plan:
        if id(parameters[name]) in mended:
            old, new = mended[id(parameters[name])]
            new.grad = old.grad
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, new)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [mended[id(p)][1] if id(p) in mended else p for p in group["params"]]
        for old, new in mended.values():
            if old in optimizer.state:
                optimizer.state[new] = optimizer.state.pop(old)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _name(manifold: Manifold) -> str:
    return str(manifold.name or type(manifold).__name__)
