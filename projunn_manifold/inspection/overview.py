"""A table of a model's unitary weights, and of how an optimiser moves them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from projunn_manifold.inspection.weights import Weight, rate_of, weights_of
from projunn_manifold.linalg.dense import unitarity_error
from projunn_manifold.manifold.parameters import is_dtensor, manifold_of
from projunn_manifold.optim.constrained import is_constrained
from projunn_manifold.optim.optimizers import inner_optimizer

__all__ = ["Summary", "UnitaryWeight", "summary"]


@dataclass(frozen=True)
class UnitaryWeight:
    """A unitary weight, and how an optimiser moves it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    #: The name of its manifold.
    manifold: str
    #: The rank of its manifold; None for full rank.
    k: int | None
    #: The largest :func:`~projunn_manifold.unitarity_error` of its matrices; None if it is sharded or has no values.
    error: float | None
    #: The class of the optimiser that holds it; None if the optimiser does not hold it, or none is given.
    optimizer: str | None = None
    #: Its learning rate in that optimiser.
    lr: float | None = None
    #: Those that apply of ``"lost its manifold"``, ``"sharded"``, ``"frozen"``, ``"constrained"`` and
    #: ``"not in the optimiser"``.
    notes: tuple[str, ...] = ()


class Summary(list[UnitaryWeight]):
    """A list with one entry for each unitary weight; ``print`` shows a table."""

    def __str__(self) -> str:
        rows = [("weight", "shape", "dtype", "manifold", "k", "error", "optimiser", "lr", "")]
        rows += [
            (
                w.name,
                "x".join(map(str, w.shape)),
                str(w.dtype).removeprefix("torch."),
                w.manifold,
                str(w.k),
                "-" if w.error is None else f"{w.error:.1e}",
                w.optimizer or "-",
                "-" if w.lr is None else f"{w.lr:g}",
                ", ".join(w.notes),
            )
            for w in self
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(table if self else ["no unitary weights"])


def summary(model: nn.Module, optimizer: Any = None) -> Summary:
    """Return a table of a model's unitary weights: shape, dtype, manifold, k, error, and how an optimiser moves them.

    A weight that was made unitary and has lost its manifold is listed with a note.  A weight that two modules share is
    listed once.

    Cost for each weight: one product with itself in double precision, :math:`O(nm^2)`.  Waits for the device.

    Parameters
    ----------
    model : torch.nn.Module
    optimizer : torch.optim.Optimizer, optional
        The optimiser, or a wrapper that holds it; the table names the class of the optimiser inside.

    Returns
    -------
    Summary
        A list of :class:`~projunn_manifold.inspection.overview.UnitaryWeight`; ``print`` shows a table.

    Raises
    ------
    TypeError
        ``model`` is not a module; ``optimizer`` is not an optimiser and holds none.

    Examples
    --------
    >>> import torch
    >>> from projunn_manifold import layers, optim, summary
    >>> model = torch.nn.Sequential(layers.UnitaryLinear(8, 8, k=2), torch.nn.Linear(8, 2))
    >>> [weight] = summary(model, optim.RiemannianSGD(model.parameters(), lr=0.1))
    >>> weight.name, weight.shape, weight.k, weight.optimizer, weight.lr
    ('0.weight', (8, 8), 2, 'RiemannianSGD', 0.1)
    """
    inner = None if optimizer is None else inner_optimizer(optimizer)
    return Summary(_described(weight, inner) for weight in weights_of(model, optimizer))


def _described(weight: Weight, optimizer: torch.optim.Optimizer | None) -> UnitaryWeight:
    name, p, manifold, group = weight
    held = optimizer is not None and group is not None
    notes = {
        "lost its manifold": manifold_of(p) is None,
        "sharded": is_dtensor(p),
        "frozen": not p.requires_grad,
        "constrained": optimizer is not None and held and is_constrained(optimizer),
        "not in the optimiser": optimizer is not None and not held,
    }
    return UnitaryWeight(
        name=name,
        shape=tuple(p.shape),
        dtype=p.dtype,
        manifold=str(manifold.name),
        k=manifold.k,
        error=unitarity_error(p).max().item() if weight.has_values else None,
        optimizer=type(optimizer).__name__ if held else None,
        lr=rate_of(weight),
        notes=tuple(note for note, holds in notes.items() if holds),
    )
