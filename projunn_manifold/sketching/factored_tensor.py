r"""A tensor without storage that carries thin factors through autograd and optimisers.

A :class:`FactoredTensor` stands for a low-rank matrix: geoopt's optimisers scale it, negate it, add it to their buffers
and hand it back to the manifold, and none of that needs the n x m matrix.

The one danger of such a tensor is an update that is silently lost, because PyTorch returns the tensor that an
in-place operator was called on, whatever the handler computed.  So it has two states, factors or dense, held in a cell
that all its aliases share, and three rules (``tests/sketching/test_factored_tensor.py``):

1. ``detach`` and multiplication by a real scalar keep the factors; ``clone`` returns a plain dense tensor,
   so that no optimiser state is ever a :class:`FactoredTensor`;
2. an operator that only reads sees a temporary dense copy;
3. any other operator that writes to it, or returns a view of it, first makes it dense for good; so does every
   operator from outside ATen (collectives among them), whose schema does not say what it writes to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from projunn_manifold.context import disabled_torch_function, make_wrapper, outside_graphs, tree_map
from projunn_manifold.linalg.products import matrix
from projunn_manifold.sketching.lowrank import Scalar

__all__ = ["FactoredTensor", "Factors", "as_plain"]


class Factors(Protocol):
    """What a :class:`FactoredTensor` can carry: a matrix known through thin factors."""

    @property
    def like(self) -> Tensor:
        """A tensor with the dtype and device of the matrix."""

    @property
    def shape(self) -> torch.Size:
        """Shape ``(*batch, n, m)`` of the matrix."""

    def scaled(self, c: Scalar) -> Factors:
        """Return the factors of ``c`` times the matrix, for a real ``c``, or one for each matrix ``(*batch,)``."""

    def outer(self) -> tuple[Tensor, Tensor]:
        """Return ``left, right`` with matrix = ``left @ right^H``."""


class _Cell:
    """The state all aliases of a factored tensor share: factors, or (once it was written to) dense."""

    __slots__ = ("dense", "factors")

    def __init__(self, factors: Factors) -> None:
        self.factors: Factors | None = factors
        self.dense: Tensor | None = None

    def read(self) -> Tensor:
        """Return a dense tensor to read from."""
        if self.factors is None:
            assert self.dense is not None
            return self.dense
        left, right = self.factors.outer()
        return left @ right.mH

    def make_dense(self) -> Tensor:
        """Become dense for good, and return the dense tensor to write to or to view."""
        if self.factors is not None:
            self.dense, self.factors = self.read(), None
        assert self.dense is not None
        return self.dense


class FactoredTensor(Tensor):
    """A tensor known through :class:`Factors`; see the module's text for its two states and three rules."""

    __torch_function__ = disabled_torch_function
    _cell: _Cell

    @staticmethod
    def __new__(cls, factors: Factors) -> FactoredTensor:
        """Return a tensor without storage that carries ``factors``."""
        return cls._sharing(_Cell(factors), factors.shape, factors.like)

    @classmethod
    def _sharing(cls, cell: _Cell, shape: torch.Size, like: Tensor) -> FactoredTensor:
        tensor: FactoredTensor = make_wrapper(cls, shape, dtype=like.dtype, device=like.device)
        tensor._cell = cell
        return tensor

    def __init__(self, factors: Factors) -> None:
        """Carry ``factors``; every other attribute follows from them."""

    @property
    def factors(self) -> Factors | None:
        """The factors, or None once the tensor has been written to."""
        return self._cell.factors

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        state = type(self.factors).__name__ if self.factors is not None else "dense"
        return f"FactoredTensor({state}, shape={tuple(self.shape)}, dtype={self.dtype})"

    @property
    def data(self) -> Tensor:
        """An alias of this tensor outside autograd, as for any tensor; assigning copies into it."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        self._cell.make_dense().copy_(value)

    def share_memory_(self) -> Any:
        """Refuse: there is no storage to share."""
        raise TypeError("a FactoredTensor has no storage to share; share its clone()")

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse an array that would share memory with this tensor; ``force`` gives a copy."""
        if not force:
            raise TypeError("a FactoredTensor has no storage for an array; take its clone()")
        return self.clone().numpy(force=True)

    def tolist(self) -> Any:
        """Return the entries as lists of numbers, as for any tensor."""
        return self.clone().tolist()

    def __dlpack__(self, **_: Any) -> Any:
        raise TypeError("a FactoredTensor has no storage to export; export its clone()")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)

    @classmethod
    @outside_graphs
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        keep = _KEEPING_FACTORS.get(func)
        if keep is not None:
            result = keep(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _on_dense(func, args, kwargs)


def as_plain(u: Tensor) -> Tensor:
    """Return u as an ordinary dense tensor."""
    return u.clone() if isinstance(u, FactoredTensor) else u


def _on_dense(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``func`` on dense tensors; arguments it writes to or views are made dense for good first."""
    wrapper_of: dict[int, FactoredTensor] = {}

    def made_dense(t: Any) -> Any:
        if not isinstance(t, FactoredTensor):
            return t
        dense = t._cell.make_dense()
        wrapper_of[id(dense)] = t
        return dense

    def read(t: Any) -> Any:
        return t._cell.read() if isinstance(t, FactoredTensor) else t

    if torch.Tag.inplace_view in func.tags:
        raise TypeError(f"{func} changes a tensor's shape in place, which a FactoredTensor cannot; use its clone()")
    foreign = func.namespace != "aten"  # such schemas do not say what they write to
    touched = {s.name: foreign or s.alias_info is not None for s in func._schema.arguments}
    names = [s.name for s in func._schema.arguments]
    args = tuple(tree_map(made_dense if touched[name] else read, arg) for name, arg in zip(names, args, strict=False))
    kwargs = {name: tree_map(made_dense if touched[name] else read, arg) for name, arg in kwargs.items()}
    return tree_map(lambda t: wrapper_of.get(id(t), t), func(*args, **kwargs))


def _is_real_scalar(c: Any) -> bool:
    if isinstance(c, Tensor):
        return c.dim() == 0 and not c.is_complex() and not isinstance(c, FactoredTensor)
    return isinstance(c, int | float)


def _detach(t: FactoredTensor) -> Any:
    return FactoredTensor._sharing(t._cell, t.shape, t)


def _clone(t: FactoredTensor, memory_format: Any = None) -> Any:
    return NotImplemented if t.factors is None else t._cell.read().contiguous()


def _scale(t: Any, c: Any) -> Any:
    if isinstance(c, FactoredTensor):  # multiplication commutes
        t, c = c, t
    if t.factors is None or not _is_real_scalar(c):
        return NotImplemented
    return FactoredTensor(t.factors.scaled(c))


def _scale_(t: Any, c: Any) -> Any:
    if not isinstance(t, FactoredTensor) or t.factors is None or not _is_real_scalar(c):
        return NotImplemented
    t._cell.factors = t.factors.scaled(c)
    return t


def _inverse(c: Any) -> Any:
    """Reciprocal of a scalar divisor; anything else (zero too: torch gives inf, Python raises) is left to torch."""
    return 1.0 / c if _is_real_scalar(c) and (isinstance(c, Tensor) or c != 0) else NotImplemented


def _add_(t: Tensor, other: Any, alpha: Any = 1) -> Any:
    if isinstance(t, FactoredTensor):
        no_change = alpha == 0 and not isinstance(alpha, Tensor) and t.factors is not None
        return t if no_change else NotImplemented
    if other.factors is None or t.shape != other.shape or t.dtype != other.dtype:
        return NotImplemented
    if not _is_real_scalar(alpha):
        return NotImplemented
    left, right = other.factors.scaled(alpha).outer()
    storage = t.untyped_storage().data_ptr()
    if storage in (left.untyped_storage().data_ptr(), right.untyped_storage().data_ptr()):
        return NotImplemented  # a product must not read what it writes
    return matrix(t).add_product_(left, right)


aten = torch.ops.aten
_KEEPING_FACTORS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.clone.default: _clone,
    aten.neg.default: lambda t: _scale(t, -1.0),
    aten.mul.Tensor: _scale,
    aten.mul.Scalar: _scale,
    aten.div.Tensor: lambda t, c: _scale(t, _inverse(c)) if isinstance(t, FactoredTensor) else NotImplemented,
    aten.mul_.Tensor: _scale_,
    aten.mul_.Scalar: _scale_,
    aten.div_.Tensor: lambda t, c: _scale_(t, _inverse(c)),
    aten.add_.Tensor: _add_,
}
