"""Checks of what users pass in; every message says what came and what was expected."""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from projunn_manifold.linalg.dense import DTYPES, suited

__all__ = [
    "broadcast",
    "check_choice",
    "check_count",
    "check_dtype",
    "check_finite",
    "check_full_rank",
    "check_image_size",
    "check_in_place",
    "check_number",
    "check_point",
    "check_positive",
    "check_precision",
    "check_rate",
    "check_same_matrix",
    "check_seed",
    "check_tensor",
    "check_writable",
    "dtype_problem",
    "shape_problem",
    "sides_of",
    "warn",
]

_INNER = ("torch", "geoopt", "projunn_manifold", "contextlib")


def shape_problem(shape: Sequence[int], name: str) -> str | None:
    """Return why ``shape`` is not a batch of square or tall matrices, or None."""
    if len(shape) < 2:
        return f"`{name}` must have at least 2 dimensions (*batch, n, m), got shape {tuple(shape)}"
    if shape[-2] < shape[-1]:
        advice = "for a wide weight, store its adjoint and use w.mH"
        return f"`{name}` must be square or tall, shape[-2] >= shape[-1], got shape {tuple(shape)}; {advice}"
    if shape[-1] < 1:
        return f"the matrices of `{name}` must not be empty, got shape {tuple(shape)}"
    return None


def dtype_problem(dtype: torch.dtype, name: str) -> str | None:
    """Return why ``dtype`` cannot hold a point, or None."""
    if dtype in DTYPES:
        return None
    advice = ""
    if dtype in (torch.float16, torch.bfloat16, torch.complex32):
        advice = "; keep the parameter in float32 or complex64 and run the forward pass under torch.autocast"
    return f"`{name}` must be float32, float64, complex64 or complex128, got {dtype}{advice}"


def check_point(x: Tensor, name: str = "x") -> None:
    """Raise unless x is a tensor of a point's shape and dtype."""
    check_tensor(x, name)
    problem = shape_problem(x.shape, name)
    if problem:
        raise ValueError(problem)
    check_dtype(x.dtype, name)


def check_dtype(dtype: torch.dtype, name: str) -> None:
    """Raise TypeError unless the dtype can hold a point."""
    problem = dtype_problem(dtype, name)
    if problem:
        raise TypeError(problem)


def check_precision(dtype: torch.dtype, name: str) -> None:
    """Raise ValueError unless a weight of that dtype can be made unitary."""
    problem = dtype_problem(dtype, name)
    if problem:
        raise ValueError(problem)


def check_tensor(x: object, name: str, missing: str = "") -> None:
    """Raise unless x is a tensor; ``missing`` is the message for None."""
    if not isinstance(x, Tensor):
        advice = missing if x is None else ""
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(x).__name__}{advice}")


def check_number(value: object, name: str) -> float | Tensor:
    """Return a real number as Python's own, NumPy's scalars and 0-d arrays too; a real tensor is returned as it is."""
    if type(value) is float or type(value) is int:
        return value
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"`{name}` must be real, got {value.dtype}")
        return value
    number = _pythons_own(value)
    if isinstance(number, bool) or not isinstance(number, int | float | Real):
        raise TypeError(f"`{name}` must be a number or a tensor, got {value!r} of type {type(value).__name__}")
    return number if isinstance(number, int | float) else float(number)


def check_rate(value: object, name: str, x: Tensor) -> float | Tensor:
    """Return a real number, or a real tensor with one for all or for each matrix of x; raise for anything else."""
    number = check_number(value, name)
    if isinstance(number, Tensor) and number.shape not in (torch.Size(), x.shape[:-2]):
        raise ValueError(f"`{name}` must have shape () or {tuple(x.shape[:-2])}, got {tuple(number.shape)}")
    return suited(number, x)


def check_count(value: object, name: str, none: str) -> int | None:
    """Return a count of at least 1 as an int, or None, which means ``none``; raise for anything else."""
    expected = f"{name} must be an int >= 1, or None for {none}"
    if value is None:
        return None
    number = _whole(value)
    if number is None:
        raise TypeError(f"{expected}, got {value!r} of type {type(value).__name__}")
    if number < 1:
        raise ValueError(f"{expected}, got {value}")
    return number


def check_seed(seed: object) -> int:
    """Return the seed; raise unless it is an int that torch.Generator takes."""
    number = _whole(seed)
    if number is None:
        raise TypeError(f"seed must be an int, got {seed!r} of type {type(seed).__name__}")
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must fit in 64 bits, got {number}")
    return number


def check_choice(value: object, name: str, or_none: bool = False) -> None:
    """Raise TypeError unless a value is True or False, or None where that is a choice, too."""
    if not (isinstance(value, bool) or (or_none and value is None)):
        expected = "True, False or None" if or_none else "True or False"
        raise TypeError(f"`{name}` must be {expected}, got {value!r} of type {type(value).__name__}")


def _whole(value: object) -> int | None:
    """Return an int for what is one, also as a scalar of NumPy's, a 0-d array or tensor, and None for anything else."""
    number = _pythons_own(value)
    return None if isinstance(number, bool) or not isinstance(number, SupportsIndex) else operator.index(number)


def _pythons_own(value: Any) -> Any:
    """Return the number in a scalar of NumPy's or a 0-d array or tensor, and anything else that has no dimensions."""
    dimensions = getattr(value, "ndim", None)
    return value if dimensions is None else value.item() if dimensions == 0 else None


def check_in_place(x: Tensor, u: Tensor, name: str) -> None:
    """Raise unless x is a point that can be written to, and u a matrix of exactly its shape."""
    check_point(x)
    check_same_matrix(x, u, name)
    check_writable(x, "x")
    if u.shape != x.shape:
        raise ValueError(f"in place, `{name}` must have the point's shape {tuple(x.shape)}, got {tuple(u.shape)}")


def check_writable(x: Tensor, name: str = "x") -> None:
    """Raise if several elements of x share memory, as in an expanded tensor."""
    if x.numel() and any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(f"`{name}` of shape {tuple(x.shape)} is expanded (stride 0) and cannot be updated in place")


def check_same_matrix(x: Tensor, u: Tensor, name: str) -> None:
    """Raise unless u has x's dtype, device and matrix shape, and a batch shape that broadcasts with x's."""
    check_tensor(u, name, "; call backward() first" if name == "gradient" else "")
    if u.dtype != x.dtype:
        raise TypeError(f"`{name}` must have the point's dtype {x.dtype}, got {u.dtype}")
    if u.device != x.device:
        raise ValueError(f"`{name}` must be on the point's device {x.device}, got {u.device}")
    if u.shape == x.shape:
        return
    if u.shape[-2:] != x.shape[-2:]:
        raise ValueError(f"`{name}` must have the point's matrix shape {tuple(x.shape[-2:])}, got {tuple(u.shape)}")
    try:
        broadcast(x, u)
    except RuntimeError:
        raise ValueError(
            f"the batch shape of `{name}` must broadcast with the point's {tuple(x.shape[:-2])}, "
            f"got {tuple(u.shape[:-2])}"
        ) from None


def broadcast(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Expand all tensors to their common shape; tensors of equal shapes are returned as they are."""
    if all(t.shape == x.shape for t in others):
        return (x, *others)
    return tuple(torch.broadcast_tensors(x, *others))


def warn(message: str) -> None:
    """Warn, at the line of whoever called PyTorch, geoopt or this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INNER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def check_full_rank(s: Tensor, shape: torch.Size, name: str, dtype: torch.dtype) -> None:
    r"""Raise ValueError unless matrices of that shape and dtype have full rank.

    ``s`` holds their singular values, descending, computed in double precision.  Rounding to ``dtype`` changes a
    matrix by a matrix of random signs, whose largest singular value is about :math:`\epsilon\,\sigma/2`, where
    :math:`\sigma = \|W\|_F/\sqrt m` is the root mean square of the singular values.  A smallest singular value
    within :math:`4\epsilon\,\sigma`, or within the rounding error of ``s`` itself, may be zero.
    """
    if s.is_meta:
        return
    relative = s / s[..., :1]  # NaN for a matrix of zeros
    spread = relative.square().mean(-1).sqrt()
    least = 4 * torch.finfo(dtype).eps * spread + torch.finfo(s.dtype).eps * max(shape[-2:])
    if not (relative[..., -1] > least).all():
        raise ValueError(
            f"{name} of shape {tuple(shape)} is rank deficient in {dtype} (smallest singular value "
            f"{s[..., -1].min().item():.1e}): its closest unitary matrix is not unique; add small random numbers first"
        )


def check_finite(t: Tensor, name: str) -> None:
    """Raise ValueError if a tensor has entries that are not finite."""
    if not t.is_meta and not torch.isfinite(t).all():
        raise ValueError(f"{name} of shape {tuple(t.shape)} has non-finite entries: it has no closest unitary matrix")


def check_positive(name: str, value: object, least: int = 1) -> None:
    """Raise ValueError unless a size or number is an int and at least ``least``."""
    number = _whole(value)
    if number is None or number < least:
        raise ValueError(f"{name} must be an int >= {least}, got {value!r}")


def check_image_size(
    size: int | tuple[int, ...] | None, dims: int, layer: str, channels: tuple[int, ...], unexpected: tuple[object, ...]
) -> tuple[int, ...]:
    """Return the sides of a convolution's images; raise TypeError where torch's convolutions have the kernel's size."""
    if unexpected or size is None:
        call = ", ".join(map(repr, (*channels, *unexpected)))
        raise TypeError(
            f"{layer}({call}): give the size of the images as image_size=; the layer is made for images of one size, "
            "and its kernel is as large as they are"
        )
    return sides_of(size, dims, "image_size")


def sides_of(size: int | tuple[int, ...], dims: int, name: str = "size") -> tuple[int, ...]:
    """Return the sides of an image, given as one int for all dimensions or one for each."""
    sides: Any = size if _whole(size) is None else (size,) * dims
    if not isinstance(sides, tuple | list) or len(sides) != dims:
        raise ValueError(f"{name} must be an int or {dims} of them, got {size!r}")
    for side in sides:
        check_positive(name, side)
    return tuple(operator.index(side) for side in sides)
