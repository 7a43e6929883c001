"""torch's circular convolutions, as operators on images of one size."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from projunn_manifold.layers import fourier

__all__ = ["PLAIN", "centred_kernel"]

#: torch's convolutions, by the number of dimensions less one.
PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def centred_kernel(conv: Any, size: tuple[int, ...]) -> Tensor:  # -> (out, in / groups, *size)
    """Return the kernel of one of torch's circular convolutions on the whole grid, its centre at entry 0."""
    plain = PLAIN[len(size) - 1]
    if not issubclass(type(conv), plain):
        raise TypeError(f"expected {plain.__name__}, got {type(conv).__name__}")
    stride: int = conv.stride[0]
    kernel: tuple[int, ...] = conv.kernel_size
    named = {"same": tuple((side - 1) // 2 for side in kernel), "valid": (0,) * len(size)}
    padding: tuple[int, ...] = named.get(conv.padding, conv.padding)
    if {*conv.dilation} != {1} or {*conv.stride} != {stride}:
        raise ValueError(f"expected one stride and no dilation, got {conv}")
    if any(padding) and conv.padding_mode != "circular":
        raise ValueError(f"expected circular padding, got {conv}")
    for side, width, pad in zip(size, kernel, padding, strict=True):
        if (
            width <= side
            and conv.padding != "same"
            and (side % stride or (side + 2 * pad - width) // stride + 1 != side // stride)
        ):
            raise ValueError(f"expected padding that keeps the size, got {conv}")
    return fourier.embedded(conv.weight.detach(), size, padding)
