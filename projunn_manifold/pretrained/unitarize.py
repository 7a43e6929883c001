"""Trained networks made unitary: weights replaced by their closest unitary ones, on a manifold, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from projunn_manifold.layers.conv import (
    OrthogonalConv1d,
    OrthogonalConv2d,
    OrthogonalConv3d,
    UnitaryConv1d,
    UnitaryConv2d,
    UnitaryConv3d,
)
from projunn_manifold.layers.existing import attach, parameter_problem, plain_, weight_problem
from projunn_manifold.layers.fourier_conv import FourierConv
from projunn_manifold.layers.linear import UnitaryLinear
from projunn_manifold.layers.plain_conv import centred_kernel, conv_problem, size_problem
from projunn_manifold.layers.rnn import UnitaryRNN, UnitaryRNNCell
from projunn_manifold.manifold.notes import note_name
from projunn_manifold.manifold.unitary import UnitaryLowRank, unitary_of
from projunn_manifold.optim.plan import guard_of
from projunn_manifold.optim.replaced import note_replacements
from projunn_manifold.pretrained.convolutions import nearest_layer
from projunn_manifold.pretrained.nearest import as_problem, nearest_unitary
from projunn_manifold.pretrained.observed import observed
from projunn_manifold.validation import check_precision, shape_problem

__all__ = ["Converted", "LeftAlone", "Report", "fold", "unitarize"]

Select = Callable[[str], bool] | Iterable[str]
_CONVS: dict[type[nn.Module], tuple[type[FourierConv], type[FourierConv]]] = {
    nn.Conv1d: (OrthogonalConv1d, UnitaryConv1d),
    nn.Conv2d: (OrthogonalConv2d, UnitaryConv2d),
    nn.Conv3d: (OrthogonalConv3d, UnitaryConv3d),
}


@dataclass(frozen=True)
class Converted:
    """What became of a weight."""

    name: str
    #: ‖U - W‖_F / ‖W‖_F, of a convolution as an operator on its images; NaN on the meta device.
    distance: float
    #: Singular values of the weight, of all matrices of a stack, or of the operator, descending.
    before: Tensor
    after: Tensor


class LeftAlone(NamedTuple):
    """A matrix, a kernel or a stack of matrices that was left as it is."""

    name: str
    reason: str


class Report(list[Converted]):
    """One entry for each weight that was changed; printed, a table.

    Attributes
    ----------
    left_alone : list of LeftAlone
        All other parameters of two or more dimensions, each with the reason.
    """

    def __init__(self, converted: Iterable[Converted] = (), left_alone: Iterable[LeftAlone] = ()) -> None:
        super().__init__(converted)
        self.left_alone = list(left_alone)

    def __str__(self) -> str:
        rows = [("weight", "distance", "singular values before", "after")]
        rows += [(c.name, f"{c.distance:.3g}", _range(c.before), _range(c.after)) for c in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*table, *(f"{name} left alone: {reason}" for name, reason in self.left_alone)])


def unitarize(
    model: nn.Module,
    select: Select | None = None,
    *,
    k: int | None = 1,
    manifold: type[UnitaryLowRank] = UnitaryLowRank,
    method: str = "polar",
    inputs: Any = None,
    rotation: bool = False,
    **options: Any,
) -> Report:
    r"""Replace weights of a trained model, in place, by the closest unitary ones, each on a manifold of its own.

    It takes the weights of ``torch.nn.Linear``, the recurrent weights of ``torch.nn.RNN`` and ``RNNCell``, and circular
    ``torch.nn.Conv1d/2d/3d``; by its full name also any other square or tall matrix, or stack of matrices, that
    :func:`~projunn_manifold.layers.unitary_` takes.  What it leaves alone is in ``report.left_alone``, with the reason.
    Square and tall matrices stay in their module; a wide ``Linear`` becomes a
    :class:`~projunn_manifold.UnitaryLinear`, a convolution an ``OrthogonalConv`` or ``UnitaryConv``.  Build the
    optimiser afterwards.  If anything is refused, the model stays as it was.

    On the meta device there are no values yet: ``to_empty`` and every module's ``reset_parameters`` draw them.

    Parameters
    ----------
    model : torch.nn.Module
    select : callable or iterable of str, optional
        Which weights, by name as in ``named_parameters``: a function, or names, where ``*`` stands for anything.  All
        of those above if left out.
    k, manifold
        Rank of the moves, and ``UnitaryLowRank`` or a subclass.
    method : {"polar", "procrustes", "lie"}
        Of :func:`~projunn_manifold.nearest_unitary`; the last two look at what the weights are applied to.
    inputs : Tensor or tuple, optional
        Arguments of a call of the model.  It is run once, in eval mode and without gradients, for the sizes of the
        images that convolutions see, and, with ``"procrustes"`` and ``"lie"``, for what every weight is applied to.
    rotation, options
        Of :func:`~projunn_manifold.nearest_unitary`.

    Returns
    -------
    Report
        Distance moved, and the singular values before and after, of every weight that was changed; ``left_alone``.

    Raises
    ------
    TypeError
        ``manifold`` is an object, not a class.
    ValueError
        A name that selects nothing, or a full name of a weight that cannot become unitary; a weight that is shared by
        two modules, rank deficient, or of another dtype than the manifold's (half precision); a circular convolution
        whose images have an unknown size; a module with hooks that would be lost.

    Examples
    --------
    >>> import torch
    >>> from projunn_manifold import fold, unitarize
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
    >>> report = unitarize(model, ["2.weight"], k=2)
    >>> [converted.name for converted in report], model[2].weight.manifold.k
    (['2.weight'], 2)
    >>> report.left_alone
    [LeftAlone(name='0.weight', reason='not selected')]
    >>> fold(model)[2].weight.__class__
    <class 'torch.nn.parameter.Parameter'>
    """
    if isinstance(manifold, nn.Module) or not callable(manifold):
        raise TypeError(
            f"`manifold` must be a class, such as UnitaryLowRank, of which each weight gets an object, got {manifold!r}"
        )
    search: Any = {"rotation": rotation, **options}
    problem = as_problem(method, search)[1]
    chosen, left_alone = _chosen(model, select)
    sighted = inputs is not None and method != "polar"
    watched = [entry.module for entry in chosen if sighted or type(entry.module) in _CONVS]
    seen = {} if inputs is None else observed(model, watched, inputs)
    plans: list[tuple[_Entry, Tensor | nn.Module]] = []
    report = Report(left_alone=left_alone)
    for entry in chosen:
        name, module, own, _ = entry
        _check_free(model, name, module, own)
        data, is_conv = seen.get(module), type(module) in _CONVS
        if data is None and (sighted or is_conv):
            why = "are not given" if inputs is None else "do not reach it in a way that can be seen"
            raise ValueError(f"{name}: what it is applied to is needed, and inputs {why}")
        new: Tensor | nn.Module
        try:
            if is_conv and data is not None:
                misfit = size_problem(module, tuple(data.shape[2:]))
                if misfit and not entry.is_named:
                    report.left_alone.append(LeftAlone(name, misfit))
                    continue
                own_problem = {**problem, "inputs": data} if sighted else problem
                new, converted = _of_conv(name, module, tuple(data.shape[2:]), own_problem, manifold(k))
            else:
                new, converted = _of_matrix(name, getattr(module, own).detach(), data if sighted else None, problem)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        plans.append((entry, new))
        report.append(converted)
    for entry, new in plans:
        note_name(entry.module.get_parameter(entry.own), entry.name)
        _apply(model, entry.module, entry.own, new, manifold(k))
    for name, p in model.named_parameters():
        if unitary_of(p) is not None:
            note_name(p, name)
    return report


def fold(model: nn.Module) -> nn.Module:
    """Replace unitary weights by plain parameters, in place, and return the model: the way back from unitarize.

    Layers of this package become those of torch: ``UnitaryLinear`` a ``torch.nn.Linear``, ``UnitaryRNN`` and
    ``UnitaryRNNCell`` (relu or tanh) a ``torch.nn.RNN`` and ``RNNCell``, an ``OrthogonalConv`` or ``UnitaryConv`` a
    circular convolution with a kernel as large as the image.  Weights of other modules that are on a
    ``UnitaryLowRank`` become ordinary parameters.  The function that the model computes stays the same.

    Raises
    ------
    ValueError
        A recurrent layer with a nonlinearity that torch's has not; a weight that is shared; a module with hooks.  All
        are named, and the model stays as it was.
    """
    problems: list[str] = []
    plain: dict[nn.Module, nn.Module] = {}
    for path, module in model.named_modules():
        name = f"{path or 'the model'} ({type(module).__name__})"
        if isinstance(module, UnitaryLinear | UnitaryRNN | UnitaryRNNCell | FourierConv):
            try:
                plain[module] = module.to_plain()
                _check_hooks(name, module)
            except ValueError as error:
                problem = str(error)
                problems.append(problem if problem.startswith(name) else f"{name}: {problem}")
    inside = {part for module in plain for part in module.modules()}
    freed: dict[Tensor, tuple[str, nn.Module, str]] = {}
    for path, module in model.named_modules():
        guard = guard_of(module)
        guarded = [] if guard is None else [(name, p) for name, _, p, _ in guard.present()]
        for own, p in [*guarded, *module.named_parameters(recurse=False)]:
            if module not in inside and unitary_of(p) is not None:
                freed.setdefault(p, (f"{path}.{own}".lstrip("."), module, own))
    for p, (name, _, _) in freed.items():
        try:
            _check_alone(model, name, p)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    for module, new in plain.items():
        model = _replace(model, module, new)
    for p, (name, module, own) in freed.items():
        note_name(p, name)
        plain_(module, own)
    return model


# -- which weights ----------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """A parameter of a model."""

    name: str
    module: nn.Module
    own: str  # its name within the module
    is_named: bool  # in full, by the user


def _chosen(model: nn.Module, select: Select | None) -> tuple[list[_Entry], list[LeftAlone]]:
    """Return the selected weights that can become unitary, and what is left alone."""
    patterns = [] if select is None or callable(select) else [select] if isinstance(select, str) else list(select)
    matches = select if callable(select) else lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)
    parameters = (
        (f"{path}.{own}" if path else own, module, own)
        for path, module in model.named_modules()
        for own, _ in module.named_parameters(recurse=False)
    )
    entries = [_Entry(name, module, own, name in patterns) for name, module, own in parameters]
    chosen, left_alone = [], []
    for entry in entries:
        p, name = entry.module.get_parameter(entry.own), entry.name
        reason = _reason(entry) if select is None or matches(name) else "not selected"
        if reason and entry.is_named:
            raise ValueError(f"{name!r} cannot become unitary: {reason}")
        if reason is None:
            check_precision(p.dtype, name)
            chosen.append(entry)
        elif nn.parameter.is_lazy(p) or p.dim() > 1:
            left_alone.append(LeftAlone(name, reason))
    for pattern in patterns:
        if not any(fnmatchcase(entry.name, pattern) for entry in chosen):
            there = ", ".join(entry.name for entry in entries if _reason(entry) is None) or "none"
            raise ValueError(f"{pattern!r} selects no weight that can become unitary; there are {there}")
    return chosen, left_alone


def _reason(entry: _Entry) -> str | None:
    """Return why a selected parameter is left alone, or None."""
    name, module, own, is_named = entry
    kind, weight = type(module), module.get_parameter(own)
    if kind in _CONVS and own == "weight":
        return parameter_problem(weight, name) or conv_problem(module)
    problem = weight_problem(module, own)
    if (kind is nn.Linear and own == "weight") or (kind in (nn.RNN, nn.RNNCell) and own.startswith("weight_hh")):
        return problem
    if problem is None and not is_named:
        if isinstance(module, ParametrizationList) or own.endswith(("_orig", "_g", "_v")):
            return "a parametrisation or pruning computes another weight from it"
        return f"{kind.__name__}.{own} is taken only by its full name"
    return problem or shape_problem(weight.shape, name)


def _check_free(model: nn.Module, name: str, module: nn.Module, own: str) -> None:
    """Raise if a weight has other owners, or hooks, or if its module would be replaced and cannot be."""
    weight = module.get_parameter(own)
    _check_alone(model, name, weight)
    if weight._backward_hooks:
        raise ValueError(f"{name} has hooks, which would be lost")
    if type(module) in _CONVS or (type(module) is nn.Linear and weight.shape[0] < weight.shape[1]):
        if module is model:
            raise ValueError(f"{name}: the model itself would be replaced; put it into a torch.nn.Sequential")
        _check_hooks(name, module)


def _check_alone(model: nn.Module, name: str, weight: Tensor) -> None:
    owners = sum(p is weight for module in model.modules() for p in module._parameters.values())
    if owners > 1:
        raise ValueError(f"{name} is shared by {owners} modules or names: untie it first")


def _check_hooks(name: str, module: Any) -> None:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    if any(getattr(module, kind) for kind in kinds):
        raise ValueError(f"{name}: its module has hooks (pruning has, too), which would be lost: remove them first")


# -- conversion -------------------------------------------------------------------------------------------


def _of_matrix(name: str, old: Tensor, inputs: Tensor | None, problem: dict[str, Any]) -> tuple[Tensor, Converted]:
    """Return what takes the place of a matrix, or of a stack of them."""
    new = nearest_unitary(old, inputs=inputs, **problem).unitary
    return new, Converted(name, _distance(new, old), *(_singular_values(w) for w in (old, new)))


def _singular_values(w: Tensor) -> Tensor:
    return torch.linalg.svdvals(w).flatten().sort(descending=True).values


def _of_conv(
    name: str, conv: Any, size: tuple[int, ...], problem: dict[str, Any], manifold: UnitaryLowRank
) -> tuple[FourierConv, Converted]:
    """Return the convolution that takes the place of one of torch's."""
    kind = _CONVS[type(conv)][conv.weight.is_complex()]
    layer = nearest_layer(kind, conv, size, problem, manifold=manifold).train(conv.training)
    for own, p in layer.named_parameters(recurse=False):
        p.requires_grad_((conv.bias if own == "bias" else conv.weight).requires_grad)
    old, new = centred_kernel(conv, size), centred_kernel(layer.to_plain(), size)
    return layer, Converted(name, _distance(new, old), layer.singular_values(old), layer.singular_values())


def _distance(new: Tensor, old: Tensor) -> float:
    return math.nan if old.is_meta else (torch.linalg.vector_norm(new - old) / torch.linalg.vector_norm(old)).item()


def _apply(model: nn.Module, module: Any, own: str, new: Any, manifold: UnitaryLowRank) -> None:
    """Put a new weight, or a new module, in the place of the old."""
    if isinstance(new, nn.Module):
        _replace(model, module, new)
        return
    if new.shape[-2] >= new.shape[-1]:
        attach(module, own, new, manifold)
        return
    wide = UnitaryLinear(
        module.in_features,
        module.out_features,
        module.bias is not None,
        manifold=manifold,
        device=new.device,
        dtype=new.dtype,
    ).train(module.training)
    with torch.no_grad():
        wide.weight.copy_(new.mH).requires_grad_(module.weight.requires_grad)
        if wide.bias is not None:
            wide.bias.copy_(module.bias).requires_grad_(module.bias.requires_grad)
    _replace(model, module, wide)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put a module in the place of another wherever that stands; return the model."""
    kept = set(new.parameters())
    path = next((path for path, module in model.named_modules() if module is old), "") or type(old).__name__
    note_replacements((f"{path}.{name}", p) for name, p in old.named_parameters() if p not in kept)
    if model is old:
        return new
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
    return model


def _range(values: Tensor) -> str:
    if values.is_meta:
        return "not drawn yet"
    return f"{values[-1].item():.3g} to {values[0].item():.3g}"
