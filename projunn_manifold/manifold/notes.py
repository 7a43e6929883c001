"""What is known of a parameter and its gradients, noted by those who know it for the manifold that sees only a matrix.

An optimiser of geoopt adds weight decay before the manifold is given a gradient; a line search takes inner products
with the sketches of gradients, and means those of the gradients.  A model knows its parameters' names.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [
    "in_words",
    "note_added_decay",
    "note_name",
    "note_whole_gradient",
    "noted_name",
    "search_along_slopes",
    "take_added_decay",
    "whole_gradient",
]

_added_decay: Any = WeakIdKeyDictionary()
_whole_gradients: Any = WeakIdKeyDictionary()  # parameters of line searches: whole gradients by sketched ones
_NAME = "_projunn_manifold_name"  # an attribute, for PyTorch swaps no tensor that has weak references


# -- names ---------------------------------------------------------------------------------------------------


def note_name(p: Tensor, name: str) -> None:
    """Note the name by which messages call a parameter."""
    p.__dict__[_NAME] = name


def noted_name(p: Tensor) -> str | None:
    """Return the name that was noted, or None."""
    name: str | None = p.__dict__.get(_NAME)
    return name


def in_words(p: Tensor, unnamed: str = "a parameter") -> str:
    """Return what a message calls a parameter: its name, if one was noted, and its shape."""
    name = noted_name(p)
    return f"{unnamed if name is None else repr(name)} of shape {tuple(p.shape)}"


# -- weight decay --------------------------------------------------------------------------------------------


def take_added_decay(x: Tensor) -> float:
    """Return the λ of the weight decay λX that a step has added to the gradient at x, and forget it.

    A component of a product manifold is a view of the parameter, whose λ serves all its components.
    """
    if not _added_decay:
        return 0.0
    if x in _added_decay:
        return float(_added_decay.pop(x))
    return 0.0 if x._base is None else float(_added_decay.get(x._base, 0.0))


def note_added_decay(x: Tensor, decay: float | Tensor) -> None:
    """Note the weight decay that a step is going to add to the gradient at x; 0: none."""
    if decay:
        _added_decay[x] = decay
    elif _added_decay:
        _added_decay.pop(x, None)


# -- line searches -------------------------------------------------------------------------------------------


def search_along_slopes(x: Tensor) -> None:
    """Have the manifold of x remember, from now on, the whole gradients from which it makes sketched ones at x."""
    if x not in _whole_gradients:
        _whole_gradients[x] = WeakIdKeyDictionary()


def note_whole_gradient(x: Tensor, sketched: Tensor, whole: Tensor) -> None:
    """Note the gradient from which a sketched one was made, if a line search at x will ask for it."""
    if _whole_gradients and x in _whole_gradients:
        _whole_gradients[x][sketched] = whole.detach().clone()


def whole_gradient(x: Tensor, sketched: Tensor) -> Tensor | None:
    """Return the gradient from which a sketched one at x was made, or None."""
    if not _whole_gradients or x not in _whole_gradients:
        return None
    found: Tensor | None = _whole_gradients[x].get(sketched)
    return found
