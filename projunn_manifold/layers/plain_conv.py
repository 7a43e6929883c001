"""torch's circular convolutions, as operators on images of one size."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from projunn_manifold.layers import fourier

__all__ = ["PLAIN", "centred_kernel", "conv_problem", "size_problem"]

#: torch's convolutions, by the number of dimensions less one.
PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def centred_kernel(conv: Any, size: tuple[int, ...]) -> Tensor:  # -> (out, in / groups, *size)
    """Return the kernel of one of torch's circular convolutions on the whole grid, its centre at entry 0."""
    plain = PLAIN[len(size) - 1]
    if not issubclass(type(conv), plain):
        raise TypeError(f"expected {plain.__name__}, got {type(conv).__name__}")
    problem = conv_problem(conv) or size_problem(conv, size)
    if problem:
        raise ValueError(problem)
    return fourier.embedded(conv.weight.detach(), size, _padding(conv))


def conv_problem(conv: Any) -> str | None:
    """Return why one of torch's convolutions is no circular one that keeps the size (over its stride), or None."""
    stride: int = conv.stride[0]
    padding = _padding(conv)
    if {*conv.dilation} != {1} or {*conv.stride} != {stride}:
        return f"expected one stride and no dilation, got {conv}"
    if any(padding) and conv.padding_mode != "circular":
        return f"expected circular padding, got {conv}"
    keeps = (width - stride <= 2 * pad < width for width, pad in zip(conv.kernel_size, padding, strict=True))
    if conv.padding != "same" and not all(keeps):
        return f"expected padding that keeps the size, got {conv}"
    return None


def size_problem(conv: Any, size: tuple[int, ...]) -> str | None:
    """Return why a circular convolution is no operator on images of that size, or None."""
    if any(side % conv.stride[0] for side in size):
        return f"expected a stride that divides the size {size} of the images, got {conv}"
    if any(width > side for width, side in zip(conv.kernel_size, size, strict=True)):
        return f"a kernel of size {tuple(conv.kernel_size)} does not fit images of size {size}"
    return None


def _padding(conv: Any) -> tuple[int, ...]:
    """Return the padding of a convolution at the beginning of every side."""
    named = {"same": tuple((side - 1) // 2 for side in conv.kernel_size), "valid": (0,) * len(conv.kernel_size)}
    padding: tuple[int, ...] = named.get(conv.padding, conv.padding)
    return padding
