r"""A tensor without storage that carries thin factors through autograd and optimisers.

A :class:`FactoredTensor` stands for a low-rank matrix: geoopt's optimisers scale it, negate it, add it to their buffers
and hand it back to the manifold, and none of that needs the n x m matrix.

The one danger of such a tensor is an update that is silently lost, because PyTorch returns the tensor that an
in-place operator was called on, whatever the handler computed.  So it has two states, factors or dense, held in a cell
that all its aliases share, and three rules (``tests/sketching/test_factored_tensor.py``):

1. ``detach`` and multiplication by a real scalar keep the factors; ``clone`` returns a plain dense tensor,
   so that no optimiser state is ever a :class:`FactoredTensor`;
2. whatever only reads it, an operator, a view or an array, sees a dense copy, and the factors stay;
3. any other operator that writes to it, or to a view of it, first makes it dense for good; so does every operator
   from outside ATen (collectives among them), whose schema does not say what it writes to.

What would write to its memory unseen (a pointer, a shared storage) is refused as long as there are factors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from projunn_manifold.context import disabled_torch_function, make_wrapper, outside_graphs, tree_map
from projunn_manifold.linalg.dense import Scalar
from projunn_manifold.linalg.products import matrix

__all__ = ["FactoredTensor", "Factors", "as_plain", "factors_at"]


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

    __slots__ = ("_copy", "_dense", "_factors")

    def __init__(self, factors: Factors) -> None:
        self._factors: Factors | None = factors
        self._copy: Tensor | None = None  # what views read
        self._dense: Tensor | None = None

    @property
    def factors(self) -> Factors | None:
        """The factors, or None once dense."""
        return self._factors

    @property
    def has_memory(self) -> bool:
        """Whether there is a dense tensor that is written to."""
        return self._factors is None

    def scale(self, c: Scalar) -> None:
        """Multiply the factors."""
        assert self._factors is not None
        self._factors, self._copy = self._factors.scaled(c), None

    def read(self) -> Tensor:
        """Return a dense tensor to read from."""
        if self._factors is None:
            assert self._dense is not None
            return self._dense
        return self.form() if self._copy is None else self._copy

    def form(self) -> Tensor:
        """Return the matrix of the factors, in fresh memory."""
        assert self._factors is not None
        left, right = self._factors.outer()
        return (left @ right.mH).contiguous()

    def read_as_view(self) -> Tensor:
        """Return a dense tensor to read from; as views are read one by one, it is formed once for all of them."""
        if self._factors is not None and self._copy is None:
            self._copy = self.form()
        return self.read()

    def make_dense(self) -> Tensor:
        """Become dense for good, and return the dense tensor to write to or to view."""
        if self._factors is not None:
            self._dense, self._factors, self._copy = self.read(), None, None
        assert self._dense is not None
        return self._dense


class _View:
    """The state of a view: read from a dense copy of its base; a write to it makes the base dense."""

    __slots__ = ("_base", "_view")
    factors = None

    def __init__(self, base: _Cell | _View, view: Callable[[Tensor], Tensor]) -> None:
        self._base, self._view = base, view

    @property
    def has_memory(self) -> bool:
        """Whether there is a dense tensor that is written to."""
        return self._base.has_memory

    def read(self) -> Tensor:
        """Return a dense tensor to read from."""
        return self._view(self._base.read_as_view())

    read_as_view = read

    def make_dense(self) -> Tensor:
        """Make the base dense for good, and return the view of it."""
        return self._view(self._base.make_dense())


class FactoredTensor(Tensor):
    """A tensor known through :class:`Factors`; see the module's text for its two states and three rules."""

    __torch_function__ = disabled_torch_function
    _cell: _Cell | _View

    @staticmethod
    def __new__(cls, factors: Factors) -> FactoredTensor:
        """Return a tensor without storage that carries ``factors``."""
        like = factors.like
        tensor: FactoredTensor = make_wrapper(cls, factors.shape, dtype=like.dtype, device=like.device)
        tensor._cell = _Cell(factors)
        return tensor

    @classmethod
    def _sharing(cls, cell: _Cell | _View, layout: Tensor, device: torch.device) -> FactoredTensor:
        """Return a tensor with that state, and with the shape, strides and dtype of ``layout``."""
        tensor: FactoredTensor = make_wrapper(
            cls, layout.shape, layout.stride(), layout.storage_offset(), dtype=layout.dtype, device=device
        )
        tensor._cell = cell
        return tensor

    def __init__(self, factors: Factors) -> None:
        """Carry ``factors``; every other attribute follows from them."""

    @property
    def factors(self) -> Factors | None:
        """The factors, or None once the tensor has been written to, and for a view."""
        return self._cell.factors

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        state = type(self.factors).__name__ if self.factors is not None else "dense"
        if isinstance(self._cell, _View):
            state = "view"
        return f"FactoredTensor({state}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __str__(self) -> str:
        """Return the entries, as any tensor prints them."""
        return str(self.clone())

    def __format__(self, format_spec: str) -> str:
        """Return the entries, as any tensor formats them."""
        return format(self.clone(), format_spec)

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

    def data_ptr(self) -> int:
        """Refuse: a write through a pointer would not reach the factors.

        Raises
        ------
        TypeError
            As long as there are factors; a tensor that has been written to has its dense values in memory.
        """
        if self._cell.has_memory:
            return self._cell.make_dense().data_ptr()
        raise TypeError(
            "a FactoredTensor has no memory to point to: use its clone().data_ptr(), and keep the clone as long as "
            "the pointer; or give the parameter a dense gradient first, p.grad = p.grad.clone()"
        )

    def numpy(self, *, force: bool = False) -> Any:
        """Return the entries as a read-only array: a write to it would be lost.

        A tensor that has been written to shares its memory with the array, as any tensor does.
        """
        if self._cell.has_memory:
            return self._cell.make_dense().numpy(force=force)
        array = self.clone().resolve_conj().resolve_neg().numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        """Return the entries as lists of numbers, as for any tensor."""
        return self.clone().tolist()

    def __dlpack__(self, *, copy: bool | None = None, **options: Any) -> Any:
        if copy:
            return self.clone().__dlpack__(**options)
        raise TypeError("a FactoredTensor has no storage to export; export its clone(), or ask for copy=True")

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


def factors_at(x: Tensor, u: Tensor) -> Any:
    """Return the factors that u carries if they are a tangent at this very point, or None."""
    factors = u.factors if isinstance(u, FactoredTensor) else None
    footpoint = getattr(factors, "footpoint", None)  # factors of a Euclidean gradient have none
    return factors if footpoint is not None and footpoint.is_at(x) else None


def _on_dense(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``func`` on dense tensors; arguments it writes to are made dense for good first, and views stay ours."""
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
    if not foreign and _is_view(func) and isinstance(args[0], FactoredTensor) and not args[0]._cell.has_memory:
        return _views(func, args[0], args[1:], kwargs)
    touched = {s.name: foreign or s.alias_info is not None for s in func._schema.arguments}
    names = [s.name for s in func._schema.arguments]
    args = tuple(tree_map(made_dense if touched[name] else read, arg) for name, arg in zip(names, args, strict=False))
    kwargs = {name: tree_map(made_dense if touched[name] else read, arg) for name, arg in kwargs.items()}
    return tree_map(lambda t: wrapper_of.get(id(t), t), func(*args, **kwargs))


def _is_view(func: Any) -> bool:
    """Return whether an operator of ATen returns views of its first argument, and writes to nothing."""
    aliased = [s.alias_info for s in func._schema.arguments if s.alias_info is not None]
    return len(aliased) == 1 and func._schema.arguments[0].alias_info is not None and not aliased[0].is_write


def _views(func: Any, t: FactoredTensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the views of t that ``func`` makes, each with the layout that it has of a dense tensor."""

    def view(index: int | None, base: Tensor) -> Tensor:
        result = func(base, *args, **kwargs)
        viewed: Tensor = result if index is None else result[index]
        return viewed

    def wrapped(found: Tensor, index: int | None) -> FactoredTensor:
        cell = _View(t._cell, functools.partial(view, index))
        return FactoredTensor._sharing(cell, found, t.device)

    shapes = func(torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta"), *args, **kwargs)
    if isinstance(shapes, Tensor):
        return wrapped(shapes, None)
    return [wrapped(found, index) for index, found in enumerate(shapes)]


def _is_real_scalar(c: Any) -> bool:
    if isinstance(c, Tensor):
        return c.dim() == 0 and not c.is_complex() and not isinstance(c, FactoredTensor)
    return isinstance(c, int | float)


def _detach(t: FactoredTensor) -> Any:
    return FactoredTensor._sharing(t._cell, t, t.device)


def _clone(t: FactoredTensor, memory_format: Any = None) -> Any:
    return t._cell.form() if isinstance(t._cell, _Cell) and not t._cell.has_memory else NotImplemented


def _scale(t: Any, c: Any) -> Any:
    if isinstance(c, FactoredTensor):  # multiplication commutes
        t, c = c, t
    if t.factors is None or not _is_real_scalar(c):
        return NotImplemented
    return FactoredTensor(t.factors.scaled(c))


def _scale_(t: Any, c: Any) -> Any:
    if not isinstance(t, FactoredTensor) or not isinstance(t._cell, _Cell):
        return NotImplemented
    if t._cell.has_memory or not _is_real_scalar(c):
        return NotImplemented
    t._cell.scale(c)
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
