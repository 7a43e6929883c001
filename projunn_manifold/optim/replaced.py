"""Parameters that this package has replaced in their modules: an optimiser that was built before still holds them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

__all__ = ["count_of_replacements", "forget_replacement", "note_replacements", "replaced_name"]

_MARK = "_projunn_manifold_replaced"  # an attribute, for PyTorch swaps no tensor that has weak references
_count = 0


def note_replacements(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Mark parameters, given with their names, whose modules have got others in their place."""
    global _count
    for name, p in parameters:
        p.__dict__[_MARK] = name
        _count += 1


def count_of_replacements() -> int:
    """Return how many parameters have been replaced so far."""
    return _count


def replaced_name(p: Tensor) -> str | None:
    """Return the name of a parameter that was replaced, or None."""
    name: str | None = p.__dict__.get(_MARK)
    return name


def forget_replacement(p: Tensor) -> None:
    """Take the mark away."""
    p.__dict__.pop(_MARK, None)
