"""Trained networks made unitary: weights replaced by their closest unitary ones, on a manifold, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from geoopt import ManifoldTensor
from torch import Tensor, nn

from projunn_manifold.layers.conv import (
    OrthogonalConv1d,
    OrthogonalConv2d,
    OrthogonalConv3d,
    UnitaryConv1d,
    UnitaryConv2d,
    UnitaryConv3d,
)
from projunn_manifold.layers.existing import plain_, unitary_
from projunn_manifold.layers.fourier_conv import FourierConv
from projunn_manifold.layers.linear import UnitaryLinear
from projunn_manifold.layers.plain_conv import centred_kernel
from projunn_manifold.layers.rnn import UnitaryRNN, UnitaryRNNCell
from projunn_manifold.manifold.unitary import UnitaryLowRank, unitary_of
from projunn_manifold.pretrained.convolutions import nearest_layer
from projunn_manifold.pretrained.nearest import nearest_unitary
from projunn_manifold.pretrained.observed import observed
from projunn_manifold.validation import dtype_problem

__all__ = ["Converted", "Report", "fold", "unitarize"]

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
    #: ‖U - W‖_F / ‖W‖_F, of a convolution as an operator on its images.
    distance: float
    #: Singular values of the weight, or of the operator, descending.
    before: Tensor
    after: Tensor


class Report(list[Converted]):
    """One entry for each weight; printed, a table."""

    def __str__(self) -> str:
        rows = [("weight", "distance", "singular values before", "after")]
        rows += [(c.name, f"{c.distance:.3g}", _range(c.before), _range(c.after)) for c in self]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


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

    Weights are those of ``torch.nn.Linear``, the recurrent ones of ``torch.nn.RNN`` and ``RNNCell``, and circular
    ``torch.nn.Conv1d/2d/3d``.  Square and tall matrices stay in their module; a wide ``Linear`` becomes a
    :class:`~projunn_manifold.UnitaryLinear`, a convolution an ``OrthogonalConv`` or ``UnitaryConv``.  Build the
    optimiser afterwards.  If anything is refused, the model stays as it was.

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
        Distance moved, and the singular values before and after, of every weight.

    Raises
    ------
    ValueError
        A name that selects nothing; a weight that cannot become unitary: shared by two modules, rank deficient, of a
        convolution that is not circular or of unknown size; a module with hooks that would be lost.

    Examples
    --------
    >>> import torch
    >>> from projunn_manifold import fold, unitarize
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32))
    >>> report = unitarize(model, ["2.weight"], k=2)
    >>> [converted.name for converted in report], model[2].weight.manifold.k
    (['2.weight'], 2)
    >>> fold(model)[2].weight.__class__
    <class 'torch.nn.parameter.Parameter'>
    """
    chosen = _chosen(model, select)
    sighted = inputs is not None and method != "polar"
    watched = [module for _, module, _ in chosen if sighted or type(module) in _CONVS]
    seen = {} if inputs is None else observed(model, watched, inputs)
    problem = {"method": method, "rotation": rotation, **options}
    plans: list[tuple[Any, str, Any]] = []
    report = Report()
    for name, module, own in chosen:
        _check_free(model, name, module, own)
        data = seen.get(module)
        if data is None and (sighted or type(module) in _CONVS):
            why = "are not given" if inputs is None else "do not reach it in a way that can be seen"
            raise ValueError(f"{name}: what it is applied to is needed, and inputs {why}")
        own_problem = {**problem, "inputs": data} if sighted else problem
        old = getattr(module, own).detach()
        if type(module) in _CONVS and data is not None:
            new, converted = _of_conv(name, module, tuple(data.shape[2:]), own_problem, manifold(k))
        else:
            new = nearest_unitary(old, **own_problem).unitary
            converted = Converted(name, _distance(new, old), torch.linalg.svdvals(old), torch.linalg.svdvals(new))
        plans.append((module, own, new))
        report.append(converted)
    for module, own, new in plans:
        _apply(model, module, own, new, k, manifold)
    return report


def fold(model: nn.Module) -> nn.Module:
    """Replace unitary weights by plain parameters, in place, and return the model: the way back from unitarize.

    ``UnitaryLinear`` becomes ``torch.nn.Linear``, an ``OrthogonalConv`` or ``UnitaryConv`` a circular convolution of
    torch with a kernel as large as the image, and weights of other modules that are on a ``UnitaryLowRank`` become
    ordinary parameters.  The function that the model computes stays the same.

    Raises
    ------
    ValueError
        A recurrent layer of this package, which has no equivalent in torch; a weight that is shared; a module with
        hooks.
    """
    for name, module in model.named_modules():
        if isinstance(module, UnitaryRNN | UnitaryRNNCell):
            raise ValueError(f"{name or 'the model'} is a {type(module).__name__}, of which torch has none alike")
    replaced = [module for module in model.modules() if isinstance(module, UnitaryLinear | FourierConv)]
    for module in replaced:
        _check_hooks(type(module).__name__, module)
    freed = [
        (module, own, p)
        for module in model.modules()
        if module not in replaced
        for own, p in module.named_parameters(recurse=False)
        if unitary_of(p) is not None
    ]
    for _, own, p in freed:
        _check_alone(model, own, p)
    for module in replaced:
        model = _replace(model, module, module.to_plain())
    for module, own, _ in freed:
        plain_(module, own)
    return model


# -- which weights ----------------------------------------------------------------------------------------


def _chosen(model: nn.Module, select: Select | None) -> list[tuple[str, nn.Module, str]]:
    """Return name, module and name within the module of the selected weights."""
    found = [
        (f"{path}.{own}" if path else own, module, own)
        for path, module in model.named_modules()
        for own in _weights_of(module)
    ]
    if select is None:
        return found
    if callable(select):
        return [entry for entry in found if select(entry[0])]
    patterns = [select] if isinstance(select, str) else list(select)
    names = [name for name, _, _ in found]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{pattern!r} selects no weight that can become unitary; there are {', '.join(names)}")
    return [entry for entry in found if any(fnmatchcase(entry[0], pattern) for pattern in patterns)]


def _weights_of(module: nn.Module) -> list[str]:
    """Return the names of a module's weights that can become unitary."""
    kind = type(module)
    names = ["weight"] if kind is nn.Linear or kind in _CONVS else []
    if kind is nn.RNN or kind is nn.RNNCell:
        names = [name for name, _ in module.named_parameters(recurse=False) if name.startswith("weight_hh")]
    return [name for name in names if _is_free(module._parameters.get(name))]


def _is_free(weight: Tensor | None) -> bool:
    """Tell whether a weight is a parameter that could be on a manifold, and is on none."""
    return weight is not None and not isinstance(weight, ManifoldTensor) and dtype_problem(weight.dtype, "") is None


def _check_free(model: nn.Module, name: str, module: nn.Module, own: str) -> None:
    """Raise if a weight has other owners, or hooks, or if its module would be replaced and cannot be."""
    weight = getattr(module, own)
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
        raise ValueError(f"{name}: its module has hooks, which would be lost")


# -- conversion -------------------------------------------------------------------------------------------


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
    return (torch.linalg.vector_norm(new - old) / torch.linalg.vector_norm(old)).item()


def _apply(model: nn.Module, module: Any, own: str, new: Any, k: int | None, manifold: type[UnitaryLowRank]) -> None:
    """Put a new weight, or a new module, in the place of the old."""
    if isinstance(new, nn.Module):
        _replace(model, module, new)
        return
    if new.shape[0] >= new.shape[1]:
        with torch.no_grad():
            getattr(module, own).copy_(new)
        unitary_(module, own, manifold=manifold(k))
        return
    wide = UnitaryLinear(
        module.in_features,
        module.out_features,
        module.bias is not None,
        manifold=manifold(k),
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
    if model is old:
        return new
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
    return model


def _range(values: Tensor) -> str:
    return f"{values[-1].item():.3g} to {values[0].item():.3g}"
