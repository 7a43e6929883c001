"""Which parameter is on which manifold, and what to do when a parameter has lost it.

A parameter's manifold is an attribute of the parameter object.  Whatever puts another object in its place
(``load_state_dict(assign=True)``, ``to_empty``, sharding wrappers) loses it, and geoopt's optimisers then treat the new
one as Euclidean, without a word.  A plan, made while all is well, tells afterwards what is missing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from geoopt import ManifoldParameter, ManifoldTensor
from geoopt.manifolds.base import Manifold
from torch import Tensor

from projunn_manifold.manifold.geometry import Geometry
from projunn_manifold.manifold.parameters import (
    ADVICE,
    inner_optimizer,
    is_dtensor,
    keeps,
    manifold_of,
    parameters_of,
    shares_groups,
    warn_of_interpolation,
    watch_shards,
)

__all__ = ["Plan", "check_manifolds", "manifolds_of", "reattach_manifolds"]


class Plan(dict[str, Manifold]):
    """Manifolds by the parameters' names; ``ties`` are names of one parameter each, with those that share it."""

    def __init__(self, manifolds: Mapping[str, Manifold], ties: Iterable[tuple[str, ...]] = ()) -> None:
        super().__init__(manifolds)
        self.ties = list(ties)


def manifolds_of(model: torch.nn.Module) -> Plan:
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
    _reshard(model)
    found, names = {}, defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        manifold = manifold_of(p)
        if manifold is not None:
            found[name] = manifold
            names[id(p)].append(name)
    return Plan(found, (tuple(tied) for tied in names.values() if len(tied) > 1))


def check_manifolds(model: torch.nn.Module, plan: Plan, *optimizers: torch.optim.Optimizer) -> None:
    """Raise unless every parameter of the plan is in the model, on its manifold, and known to the optimisers.

    With optimisers given, each trainable parameter of the plan must be held by one of them, of geoopt's kind or
    :func:`constrained <projunn_manifold.optim.constrain>`: an optimiser built before a parameter was replaced goes on
    moving the old one.  Of a wrapper the optimiser inside is asked.

    Raises
    ------
    TypeError
        One of the optimisers is none.
    ValueError
        Names each parameter that is gone, off its manifold, no longer shared or held by none of the optimisers, and
        each optimiser that moves it as a Euclidean one.
    """
    for optimizer in optimizers:
        warn_of_interpolation(optimizer)
    _reshard(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    problems, lost = [], False
    held = [{id(p) for p in parameters_of(optimizer)} for optimizer in optimizers]
    for tied in plan.ties:
        if len({id(parameters[name]) for name in tied if name in parameters}) > 1:
            lost = True
            problems.append(f"{', '.join(map(repr, tied))} were one parameter and are no longer")
    for name, manifold in plan.items():
        p = parameters.get(name)
        if p is None:
            problems.append(f"{name!r} is no parameter of the model any more")
            continue
        found = manifold_of(p)
        if found is None:
            lost = True
            problems.append(f"{name!r} is a plain {type(p).__name__}, not on {_name(manifold)}")
        elif type(found) is not type(manifold):
            problems.append(f"{name!r} is on {_name(found)}, not on {_name(manifold)}")
        holders = [optimizer for optimizer, ids in zip(optimizers, held, strict=True) if id(p) in ids]
        for optimizer in holders:
            if found is None or not keeps(optimizer, p):
                advice = "" if found is None else f": {ADVICE}"
                problems.append(f"{type(inner_optimizer(optimizer)).__name__} moves {name!r} as Euclidean{advice}")
        if optimizers and not holders and p.requires_grad:
            problems.append(f"no given optimiser holds {name!r}: build it again and load its state_dict")
    if problems:
        remedy = "; call reattach_manifolds" if lost else ""
        raise ValueError(f"{'manifolds lost: ' if lost else ''}{'; '.join(problems)}{remedy}")


def reattach_manifolds(model: torch.nn.Module, plan: Plan, *optimizers: torch.optim.Optimizer) -> None:
    """Put every parameter of the plan that became a plain tensor back on its manifold, values and gradient kept.

    Sharded parameters (``fully_shard``, ``distribute_tensor``) stay the ``DTensor`` they are, and are registered
    (:mod:`projunn_manifold.manifold.parameters`); all processes call this together.

    Parameters that were shared are shared again, with the first one's values and all gradients' sum.  In the
    optimisers given, the new parameter takes the place of the plain one, with its state.  Values are taken as they
    are: after steps without the manifold, ``p.proj_()`` under ``torch.no_grad()`` brings them back to it.  All is
    checked first: an error leaves everything as it was.

    Raises
    ------
    ValueError, TypeError
        The model lacks a parameter of the plan, it cannot be a point of its manifold (shape, dtype), or none of the
        optimisers given holds it: then build the optimiser again and load its state_dict.  One of the optimisers is
        none, or (``ZeroRedundancyOptimizer``) has lists of its own: then build it after the parameters are back.
    NotImplementedError
        A sharded parameter on which no step can be made: columns are sharded, k=None or 2k >= m, ``column`` or ``svd``.
    """
    _reshard(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in plan if name not in parameters]
    if missing:
        raise ValueError(f"not parameters of the model any more: {', '.join(map(repr, missing))}")
    held = {id(p) for optimizer in optimizers for p in parameters_of(optimizer)}
    stray = [name for name in plan if parameters[name].requires_grad and id(parameters[name]) not in held]
    if optimizers and stray:
        raise ValueError(
            f"no given optimiser holds {', '.join(map(repr, stray))}: it was built before they were replaced; "
            "build it again and load its state_dict"
        )
    apart = [type(optimizer).__name__ for optimizer in optimizers if not shares_groups(optimizer)]
    if apart and any(manifold_of(parameters[name]) is None for name in plan):
        raise TypeError(
            f"{', '.join(apart)} keeps lists of the parameters in which none can be replaced: reattach without it, and "
            "build it again"
        )
    first = {name: tied[0] for tied in plan.ties for name in tied}
    mended: dict[int, Tensor] = {}  # what takes the place of which parameter
    for name, manifold in plan.items():
        p, leader = parameters[name], parameters[first.get(name, name)]
        if p.shape != leader.shape:
            raise ValueError(
                f"{name!r} and {first[name]!r} were one parameter, but have shapes {tuple(p.shape)} and "
                f"{tuple(leader.shape)} now"
            )
        if is_dtensor(leader):
            if not isinstance(manifold, Geometry):
                raise NotImplementedError(f"{name!r} is a {type(leader).__name__}, which cannot carry {manifold}")
            if manifold_of(leader) is not manifold:
                manifold.check_shard(name, leader)
        elif id(leader) not in mended and not isinstance(leader, ManifoldTensor):
            if type(leader).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                raise NotImplementedError(f"{name!r} is a {type(leader).__name__}, which cannot carry a manifold")
            new = ManifoldParameter(leader.data, manifold=manifold, requires_grad=leader.requires_grad)
            mended[id(leader)] = new
        if p is not leader:
            mended[id(p)] = mended.get(id(leader), leader)
    olds = {id(parameters[name]): parameters[name] for name in plan if id(parameters[name]) in mended}
    for name, manifold in plan.items():
        leader = parameters[first.get(name, name)]
        if is_dtensor(leader) and isinstance(manifold, Geometry):
            watch_shards()
            if manifold_of(leader) is not manifold:
                manifold.adopt_shard(leader)
        if id(parameters[name]) in mended:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, mended[id(parameters[name])])
    for old in olds.values():
        new = mended[id(old)]
        if old.grad is not None:
            new.grad = old.grad if new.grad is None else new.grad + old.grad
    for optimizer in map(inner_optimizer, optimizers):
        for group in optimizer.param_groups:
            replaced = (mended.get(id(p), p) for p in group["params"])
            group["params"] = list({id(p): p for p in replaced}.values())
        for old in olds.values():
            if old in optimizer.state:
                state = optimizer.state.pop(old)
                optimizer.state.setdefault(mended[id(old)], state)


def _reshard(model: torch.nn.Module) -> None:
    """Have FSDP2 put back the shards of parameters that a forward pass has left gathered."""
    for module in model.modules():
        reshard = getattr(module, "reshard", None) if hasattr(module, "unshard") else None
        if callable(reshard):
            reshard()


def _name(manifold: Manifold) -> str:
    return str(manifold.name or type(manifold).__name__)
