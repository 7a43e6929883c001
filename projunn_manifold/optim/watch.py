"""Before each step of any optimiser: tell manifolds the weight decay, and tell of a step that would leave them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from geoopt.optim import RiemannianLineSearch
from geoopt.optim.mixin import OptimMixin
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from projunn_manifold import context, validation
from projunn_manifold.linalg import dense
from projunn_manifold.manifold.hooks import after_steps, before_steps
from projunn_manifold.manifold.notes import (
    in_words,
    note_added_decay,
    note_name,
    noted_name,
    search_along_slopes,
)
from projunn_manifold.manifold.parameters import is_dtensor, manifold_of
from projunn_manifold.manifold.unitary import UnitaryLowRank, unitary_of
from projunn_manifold.optim.in_place import InPlace
from projunn_manifold.optim.optimizers import (
    ADVICE,
    PUT_BACK_WRAPPED,
    about_to_move,
    has_closure_among,
    keeps,
    parameters_of,
)
from projunn_manifold.optim.plan import guarded_parameters
from projunn_manifold.optim.replaced import count_of_replacements, forget_replacement, replaced_name
from projunn_manifold.sketching.samplers import Subspace, svd

__all__: list[str] = []

_WARNED = -1
_counts: Any = WeakIdKeyDictionary()  # of every optimiser's steps
_off: Any = WeakIdKeyDictionary()  # optimisers of whose parameters one is known to be off its manifold
_settled: Any = WeakIdKeyDictionary()  # optimisers warned of; those without unitary parameters, by how many they have
_guarded: Any = WeakIdKeyDictionary()  # optimisers; at which counts it was asked which of their parameters have guards


def _refuse_lost(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raise before a step moves a weight that was made unitary, and has lost its manifold or its precision."""
    counts = _count(optimizer), count_of_replacements()
    known, places = _guarded.get(optimizer, (None, []))
    if known != counts:
        guarded = guarded_parameters()
        _note_names(optimizer, guarded)
        _tell_of_replaced(optimizer)
        places = [place for place, p in enumerate(parameters_of(optimizer)) if id(p) in guarded]
        _guarded[optimizer] = counts, places
    if not places:
        return
    parameters, has_closure = list(parameters_of(optimizer)), has_closure_among(args, kwargs)
    moving = [p for p in map(parameters.__getitem__, places) if has_closure or p.grad is not None]
    for p in moving:
        if p.dtype not in dense.DTYPES:
            validation.check_dtype(p.dtype, _names(optimizer, guarded_parameters()).get(id(p), "x"))
    lost = [p for p in moving if manifold_of(p) is None]
    if lost:
        guarded = guarded_parameters()
        names = _names(optimizer, guarded)
        called = [f"{names[id(p)]!r} of shape {tuple(p.shape)}" for p in lost if id(p) in guarded]
        if called:
            raise ValueError(
                f"{type(optimizer).__name__} would move as Euclidean a unitary weight that has lost its manifold: "
                f"{', '.join(called)}; call reattach_manifolds(model, manifolds_of(model), optimizer), or plain_ to "
                "leave it unconstrained"
            )


def _own_names(optimizer: torch.optim.Optimizer) -> dict[int, str]:
    """Return the names that an optimiser was given (``named_parameters()``), by the ids of the parameters."""
    groups = optimizer.param_groups
    return {id(p): name for g in groups for p, name in zip(g["params"], g.get("param_names", ()), strict=False)}


def _names(optimizer: torch.optim.Optimizer, guarded: dict[int, str]) -> dict[int, str]:
    """Return names of parameters by their ids: those that the optimiser was given, those noted, those of guards."""
    noted = {id(p): name for p in parameters_of(optimizer) if (name := noted_name(p)) is not None}
    return guarded | noted | _own_names(optimizer)


def _note_names(optimizer: torch.optim.Optimizer, guarded: dict[int, str]) -> None:
    """Have messages call parameters by their names."""
    names = _names(optimizer, guarded)
    for p in parameters_of(optimizer):
        if id(p) in names and manifold_of(p) is not None:
            note_name(p, names[id(p)])


def _tell_of_replaced(optimizer: torch.optim.Optimizer) -> None:
    """Warn of parameters that are no longer those of their modules: no step moves what has taken their place."""
    old = [p for p in parameters_of(optimizer) if replaced_name(p) is not None]
    if old:
        own = _own_names(optimizer)
        names = ", ".join(repr(own.get(id(p), replaced_name(p))) for p in old)
        for p in old:
            forget_replacement(p)
        validation.warn(
            f"{type(optimizer).__name__} was built before {names} got another parameter, by unitary_, unitarize, "
            "plain_ or fold, and does not move the new one: build the optimiser afterwards"
        )


def _count(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _warn(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Warn, once, before an optimiser of torch's kind moves unitary parameters as Euclidean ones.

    Others may know them: whether they do shows after their first steps (:func:`_notice_writes`).
    """
    if torch.compiler.is_compiling() or isinstance(optimizer, OptimMixin):
        return
    count = _count(optimizer)
    if _settled.get(optimizer) in (count, _WARNED) or not _is_torchs(optimizer):
        return
    for p in about_to_move(optimizer, args, kwargs):
        manifold = unitary_of(p)
        if manifold is None:
            continue
        if keeps(optimizer, p):
            return
        if not is_dtensor(p):
            _tell_of_euclidean_moves(optimizer, p, manifold)
            return
    if all(unitary_of(p) is None for p in parameters_of(optimizer)):
        _settled[optimizer] = count


def _is_torchs(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimiser is one of torch.optim, or of a class that is made of one."""
    kinds = (kind for kind in type(optimizer).__mro__ if kind is not torch.optim.Optimizer)
    return any(f"{kind.__module__}.".startswith("torch.optim.") for kind in kinds)


def _tell_of_euclidean_moves(optimizer: torch.optim.Optimizer, p: Tensor, manifold: UnitaryLowRank) -> None:
    _settled[optimizer] = _WARNED
    validation.warn(
        f"{type(optimizer).__name__} moves {in_words(p)} on {type(manifold).__name__} as a Euclidean one, and so off "
        f"its manifold: {ADVICE}; if this class keeps parameters on their manifolds, register it in "
        "projunn_manifold.optim.keepers"
    )


def _tell_decay(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Tell manifolds the λ of the λX that geoopt's optimisers are about to add to gradients; ours add none."""
    _note_decay(optimizer, about_to_step=True)


def _forget_decay(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    _note_decay(optimizer, about_to_step=False)


def _note_decay(optimizer: torch.optim.Optimizer, about_to_step: bool) -> None:
    if not isinstance(optimizer, OptimMixin):
        return
    for group in optimizer.param_groups:
        decay = validation.check_number(group.get("weight_decay", 0), "weight_decay") if about_to_step else 0
        for p in group["params"]:  # those without decay, too: a step that raised may have left a note
            note_added_decay(p, decay if decay and _adds_decay(optimizer, p) else 0)


def _adds_decay(optimizer: torch.optim.Optimizer, p: Tensor) -> bool:
    """Return whether decay is added to a gradient that this package's manifold sees, whole or as a part (product)."""
    manifold = manifold_of(p)
    if manifold is None or (isinstance(optimizer, InPlace) and isinstance(manifold, UnitaryLowRank)):
        return False
    return any(isinstance(part, UnitaryLowRank) for part in manifold.modules())


def _notice_writes(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Warn, once, if parameters leave their manifolds between steps, as Lookahead and other averages make them.

    So do optimisers of other kinds than torch's that know no manifolds.

    Only CPU looks, and only before steps 1, 2, 4, 8 and so on.  Of what is off before its first step others warn.
    """
    counter = _counts.get(optimizer)
    if counter is None:
        counter = _counts[optimizer] = itertools.count(1)
    count = next(counter)
    if count & (count - 1) or torch.compiler.is_compiling() or optimizer in _off:
        return
    owners = (getattr(hook, "__self__", None) for hook in context.step_post_hooks(optimizer))
    if any(getattr(owner, "is_interrupted", False) for owner in owners):  # a constraint will put points back
        return
    for p in about_to_move(optimizer, args, kwargs):
        manifold = unitary_of(p)
        if manifold is None or is_dtensor(p) or not context.readable(p):
            continue
        knows = keeps(optimizer, p)
        if not knows and (count == 1 or _settled.get(optimizer) == _WARNED):
            continue
        error = dense.probed_unitarity_error(p.detach(), probes=1)
        if not ((error > torch.finfo(p.dtype).eps ** 0.5) & error.isfinite()).any():
            continue
        _off[optimizer] = True
        if not knows:
            _tell_of_euclidean_moves(optimizer, p, manifold)
        elif manifold.has_seen(p):
            validation.warn(
                f"{in_words(p)} has left its manifold between two steps of "
                f"{type(optimizer).__name__}, ‖X^H X - I‖_F/√m about {error.max().item():.2g}: something else has "
                "written to it, such as a wrapper like Lookahead, an average, or a checkpoint in half precision; "
                f"{PUT_BACK_WRAPPED}"
            )
        return


def _prepare_search(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Have manifolds give a line search the slopes of the loss, not those of sketches that change between trials.

    Raises
    ------
    ValueError
        A manifold that has sketching ones as its parts, which see neither the parameter nor its gradient.
    """
    if not isinstance(optimizer, RiemannianLineSearch) or not optimizer.compute_derphi:
        return
    for p in parameters_of(optimizer):
        manifold = manifold_of(p)
        if isinstance(manifold, UnitaryLowRank):
            search_along_slopes(p)
        elif manifold is not None and any(map(_sketches_anew, manifold.modules())):
            raise ValueError(
                f"a line search that needs slopes cannot have them on {manifold}: its sketches of the gradient "
                'change between trial points; use a UnitaryLowRank with sampler="subspace" or k=None, or use '
                'line_search_method="armijo"'
            )


def _sketches_anew(part: object) -> bool:
    """Return whether sketches of one gradient differ, and their slopes; power iterations bring them close."""
    if not isinstance(part, UnitaryLowRank) or part.k is None:
        return False
    return not (part.sampler is svd or (isinstance(part.sampler, Subspace) and part.sampler.power > 0))


before_steps.extend((_refuse_lost, _warn, _tell_decay, _notice_writes, _prepare_search))
after_steps.append(_forget_decay)
