"""Which parameter is on which manifold, and what to do when a parameter has lost it.

A parameter's manifold is an attribute of the parameter object.  Whatever puts another object in its place
(``load_state_dict(assign=True)``, ``to_empty``, sharding wrappers) loses it, and geoopt's optimisers then treat the new
one as Euclidean, without a word.  A plan, made while all is well, tells afterwards what is missing.

Modules whose weights this package has put on manifolds have a :class:`Guard`, which holds such a plan.  It is asked
before the steps of an optimiser (:mod:`projunn_manifold.optim.watch`), and in :func:`manifolds_of`; never in a forward
pass, where anything may stand in for a parameter.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from geoopt import ManifoldParameter, ManifoldTensor
from geoopt.manifolds.base import Manifold
from torch import Tensor

from projunn_manifold.context import is_plain
from projunn_manifold.init import nearest_unitary_
from projunn_manifold.linalg import dense
from projunn_manifold.manifold.geometry import Geometry
from projunn_manifold.manifold.hooks import before_conversions
from projunn_manifold.manifold.parameters import is_dtensor, manifold_of
from projunn_manifold.manifold.state import counts_of
from projunn_manifold.optim.optimizers import (
    ADVICE,
    inner_optimizer,
    keeps,
    parameters_of,
    shares_groups,
    warn_of_interpolation,
    watch_shards,
)
from projunn_manifold.validation import warn

__all__ = ["Guard", "Plan", "check_manifolds", "guard_of", "guarded_parameters", "manifolds_of", "reattach_manifolds"]

_NEAR = 0.01  # a unitarity error that the drift correction makes good, and above that of a rounding to bfloat16
_guards: weakref.WeakSet[Guard] = weakref.WeakSet()


class Plan(dict[str, Manifold]):
    """Manifolds by the parameters' names; ``ties`` are names of one parameter each, with those that share it."""

    def __init__(self, manifolds: Mapping[str, Manifold], ties: Iterable[tuple[str, ...]] = ()) -> None:
        super().__init__(manifolds)
        self.ties = list(ties)


class Guard:
    """Puts a module's parameters back on their manifolds after ``load_state_dict``, and tells which ones have a plan.

    It lives as long as its hook on the module, and is copied and pickled with it.
    """

    def __init__(self, module: torch.nn.Module, plan: Plan) -> None:
        self.plan = plan
        self._watch(module)
        module.register_load_state_dict_pre_hook(self.check_loaded)
        module.register_load_state_dict_post_hook(self.reattach)

    def _watch(self, module: torch.nn.Module) -> None:
        self._module = weakref.ref(module)  # a plain one would keep the module alive until the collector runs
        _guards.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {"plan": self.plan, "module": self._module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.plan = state["plan"]
        self._watch(state["module"])

    def present(self) -> Iterator[tuple[str, str, torch.nn.Parameter, Manifold]]:
        """Iterate over the plan: each name, the name that the parameter has now, the parameter and its manifold.

        Pruning, weight normalisation and parametrisations rename a parameter; one that they, or the user, have removed
        is left out.
        """
        module = self._module()
        parameters = {} if module is None else dict(module.named_parameters(remove_duplicate=False))
        for name, manifold in self.plan.items():
            path, dot, leaf = name.rpartition(".")
            for now in (name, f"{name}_orig", f"{name}_v", f"{path}{dot}parametrizations.{leaf}.original"):
                if now in parameters:
                    yield name, now, parameters[now], manifold

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter, Manifold]]:
        """Iterate over the parameters of the plan, under the names that they have now, and their manifolds."""
        return ((now, p, manifold) for _, now, p, manifold in self.present())

    def find(self, name: str) -> tuple[str, str] | None:
        """Return the name in the plan and the name now of a parameter, given either, or None."""
        return next(((planned, now) for planned, now, _, _ in self.present() if name in (planned, now)), None)

    def check_loaded(self, module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Check what the module is about to load: the states of its manifolds, and its weights' distances from them.

        Points on manifolds that come with a state were points once, and are an average, say, if they are none: a
        warning says so.  Without a state they are the weights of a plain module.  What has another shape is left to
        PyTorch.

        Raises
        ------
        ValueError
            Something that is no state of a manifold, or a plain weight that is off the manifold.
        """
        for name, p, manifold in self.named_parameters():
            keys = [f"{prefix}{child}._extra_state" for child, found in module.named_children() if found is manifold]
            states = [key for key in keys if key in state_dict]
            for key in states:
                counts_of(state_dict[key], key)
            error = _distance(state_dict.get(f"{prefix}{name}"), p)
            if error <= _NEAR:
                continue
            found = f"{prefix + name!r} is off the manifold, ‖X^H X - I‖_F/√m about {error:.2g}"
            if not states:
                raise ValueError(
                    f"{found}, expected at most {_NEAR}: it is treated as the weight of a plain module, since it "
                    "comes without a manifold's state; apply init.nearest_unitary_ to it before you load it, or make "
                    "the plain module unitary by `unitarize`, and load the state_dict of what `fold` returns"
                )
            warn(
                f"{found}, and is loaded as it is; if it is an average, put it on the manifold afterwards: with "
                "torch.no_grad(): parameter.proj_()"
            )

    def reattach(self, module: torch.nn.Module, _: Any = None) -> None:
        """Put the parameters back on their manifolds."""
        manifolds = {name: manifold for name, _, manifold in self.named_parameters()}
        reattach_manifolds(module, Plan(manifolds, (tied for tied in self.plan.ties if set(tied) <= manifolds.keys())))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the module's own first values, and put those of the plan at their closest points of the manifolds."""
        module: Any = self._module()
        type(module).reset_parameters(module)
        self.reattach(module)
        for _, p, _ in self.named_parameters():
            nearest_unitary_(p)

    def forget(self, name: str) -> None:
        """Take a parameter out of the plan; a guard without any leaves its module."""
        self.plan.pop(name)
        module = self._module()
        if module is None or self.plan:
            return
        for hooks in (module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks):
            for key, hook in list(hooks.items()):
                if getattr(getattr(hook, "hook", hook), "__self__", None) is self:  # PyTorch wraps some
                    del hooks[key]
        if getattr(module.__dict__.get("reset_parameters"), "__self__", None) is self:
            del module.__dict__["reset_parameters"]


@torch.no_grad()
def _distance(given: object, own: Tensor) -> float:
    """Return the unitarity error that a parameter will have once loaded, or 0 if that is not for us to say."""
    if not isinstance(given, Tensor) or given.is_meta or not given.numel():
        return 0.0
    given = given.detach().resolve_conj()
    if given.shape != own.shape or not is_plain(given):
        return 0.0
    return dense.probed_unitarity_error(given.to(own.dtype)).amax().item()


def guard_of(module: torch.nn.Module) -> Guard | None:
    """Return the guard of a module, or None."""
    owners = (getattr(hook, "__self__", None) for hook in module._load_state_dict_post_hooks.values())
    return next((owner for owner in owners if isinstance(owner, Guard)), None)


def guarded_parameters() -> dict[int, str]:
    """Return the modules' kinds and the names of all parameters that guards know, by their ids."""
    return {
        id(p): f"{type(guard._module()).__name__}.{name}"
        for guard in list(_guards)
        for name, p, _ in guard.named_parameters()
    }


_told_of_half: set[torch.dtype] = set()


def _tell_of_half(manifold: Any, convert: Callable[[Tensor], Tensor]) -> None:
    """Warn, once for a dtype, if a conversion is about to leave weights of a manifold in half precision."""
    dtype = convert(torch.empty(0, device="cpu")).dtype
    if dtype in dense.DTYPES or dtype in _told_of_half:
        return
    own = (p for guard in list(_guards) for _, p, found in guard.named_parameters() if found is manifold)
    if any(convert(torch.empty(0, dtype=p.dtype, device=p.device)).dtype is dtype for p in own):
        _told_of_half.add(dtype)
        warn(
            f"unitary weights become {dtype}: they stay unitary to that precision only, and a step on them is "
            "refused; to train, keep them in float32 and run the forward pass under torch.autocast"
        )


before_conversions.append(_tell_of_half)


def manifolds_of(model: torch.nn.Module) -> Plan:
    """Return the manifold of every parameter that has one, under each of the parameter's names.

    Weights that ``unitary_``, ``unitarize`` or a layer of this package has put on a manifold are in the plan even if
    they have lost it since.

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
    guards = filter(None, map(guard_of, model.modules()))
    guarded = {id(p): manifold for guard in guards for _, p, manifold in guard.named_parameters()}
    for name, p in model.named_parameters(remove_duplicate=False):
        manifold = manifold_of(p)
        manifold = guarded.get(id(p)) if manifold is None else manifold
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
            problems.append(f"{', '.join(map(repr, tied))} were one parameter and no longer are")
    for name, manifold in plan.items():
        p = parameters.get(name)
        if p is None:
            problems.append(f"{name!r} is no longer a parameter of the model")
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
        raise ValueError(f"no longer parameters of the model: {', '.join(map(repr, missing))}")
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
            f"{', '.join(apart)} keeps lists of its own, in which no parameter can be replaced: reattach without it, "
            "and build it again"
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
    if torch.__future__.get_swap_module_params_on_conversion():
        _swap_in(mended, [parameters[first.get(name, name)] for name in plan])
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
        if new is not old and old.grad is not None:
            new.grad = old.grad if new.grad is None else new.grad + old.grad
    for optimizer in map(inner_optimizer, optimizers):
        for group in optimizer.param_groups:
            replaced = [mended.get(id(p), p) for p in group["params"]]
            if "param_names" in group:  # of parameters that are one again, the first name
                names: dict[int, str] = {}
                for own, known in zip(replaced, group["param_names"], strict=False):
                    names.setdefault(id(own), known)
                group["param_names"] = list(names.values())
            group["params"] = list({id(p): p for p in replaced}.values())
        for old in olds.values():
            if old in optimizer.state:
                state = optimizer.state.pop(old)
                optimizer.state.setdefault(mended[id(old)], state)


def _swap_in(mended: dict[int, Any], leaders: Iterable[Any]) -> None:
    """Have parameters become what takes their place, as PyTorch's conversions do in this mode; optimisers keep them."""
    for p in leaders:
        new = mended.get(id(p))
        if new is None or new is p:
            continue
        new.grad = p.grad
        torch.utils.swap_tensors(p, new)
        mended.update({key: p for key, value in mended.items() if value is new})


def _reshard(model: torch.nn.Module) -> None:
    """Have FSDP2 put back the shards of parameters that a forward pass has left gathered."""
    for module in model.modules():
        reshard = getattr(module, "reshard", None) if hasattr(module, "unshard") else None
        if callable(reshard):
            reshard()


def _name(manifold: Manifold) -> str:
    return str(manifold.name or type(manifold).__name__)
