"""The closest orthogonal or unitary convolution to a circular one: each Fourier block becomes its closest unitary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from projunn_manifold.context import in_full_precision
from projunn_manifold.layers import fourier
from projunn_manifold.layers.fourier_conv import FourierConv
from projunn_manifold.linalg import dense
from projunn_manifold.pretrained.nearest import Nearest, Search, Stack, as_problem, solve
from projunn_manifold.validation import check_precision, sides_of

__all__ = ["nearest_blocks", "nearest_convolution", "nearest_layer"]


@torch.no_grad()
@in_full_precision
def nearest_convolution(
    kernel: Tensor, image_size: int | tuple[int, ...], method: str = "polar", **search: Unpack[Search]
) -> Nearest:
    r"""Return the kernel of the orthogonal or unitary convolution that is closest to ``kernel``.

    Distances are those of the operators on images of ``image_size``; the result is as large as the image.

    Parameters
    ----------
    kernel : Tensor
        ``(out, in, *kernel_size)``, of torch's circular convolution.
    image_size : int or tuple of int
        Size of the images.
    inputs : Tensor, optional
        Images ``(samples, in, *image_size)`` that the kernel is applied to, for ``"procrustes"`` and ``"lie"``.
    rotation : bool
        Whether the real square blocks of a real kernel get determinant one.
    method, steps, tolerance, seed, callback
        As for :func:`~projunn_manifold.nearest_unitary`.

    Returns
    -------
    Nearest
        ``unitary``, a kernel ``(out, in, *image_size)`` in the dtype of the given one; ``losses``.

    Raises
    ------
    ValueError, TypeError
        As for :func:`~projunn_manifold.nearest_unitary`.

    Examples
    --------
    >>> import torch
    >>> from projunn_manifold import nearest_convolution
    >>> nearest_convolution(torch.randn(4, 4, 3, 3), image_size=16).unitary.shape
    torch.Size([4, 4, 16, 16])
    """
    check_precision(kernel.dtype, "kernel")
    if kernel.dim() < 3 or not kernel.numel():
        raise ValueError(f"kernel must be (out, in, *kernel_size), and not empty, got shape {tuple(kernel.shape)}")
    inputs, problem = as_problem(method, search)
    if problem.get("rotation") and kernel.is_complex():
        raise ValueError(f"rotation=True is for real kernels, got {kernel.dtype}")
    sides = sides_of(image_size, kernel.dim() - 2, "image_size")
    wide = dense.in_double(kernel.detach())
    grid = fourier.spectrum(sides, not kernel.is_complex(), str(wide.device))
    blocks = fourier.blocks_of_kernel(fourier.embedded(wide, sides), grid)
    waves = None
    if inputs is not None:
        _check_images(inputs, kernel.shape[1], sides)
        waves = fourier.analyse(inputs.detach().to(wide), grid).permute(2, 0, 1) / math.sqrt(math.prod(sides))
    free, losses = nearest_blocks(blocks, grid, waves, dtype=kernel.dtype, **problem)
    nearest = fourier.kernel_of_blocks(fourier.everywhere(torch.cat(free, -3), grid), grid)
    return Nearest(fourier.from_origin(nearest, sides).to(kernel).contiguous(), losses)


def nearest_layer(
    kind: type[FourierConv],
    conv: Any,
    image_size: int | tuple[int, ...],
    problem: Mapping[str, Any],
    **options: Any,
) -> Any:
    """Return the layer of that kind that is closest to one of torch's, as :meth:`FourierConv.from_plain` does.

    ``problem`` holds arguments of :func:`nearest_convolution`: method, inputs, rotation, steps and so on.
    """
    problem = dict(problem)
    inputs = problem.pop("inputs", None)

    def nearest(layer: FourierConv, blocks: Tensor) -> list[Tensor]:
        grid, waves = layer.grid(blocks.device), None
        if inputs is not None:
            _check_images(inputs, layer.in_channels, layer.image_size)
            waves = layer.waves(inputs.to(blocks if not grid.real else blocks.real), grid).mT
        return nearest_blocks(blocks, grid, waves, dtype=conv.weight.dtype, **problem)[0]

    return kind.from_plain(conv, image_size, nearest=nearest, **options)


def nearest_blocks(
    blocks: Tensor, grid: fourier.Spectrum, waves: Tensor | None = None, *, dtype: torch.dtype, **problem: Any
) -> tuple[list[Tensor], list[float]]:
    """Return the closest unitary blocks at the free frequencies, paired and self-conjugate, and the squared distances.

    Parameters
    ----------
    blocks : Tensor
        ``(*batch, stored, out, in)``.
    grid : Spectrum
        Their frequencies.
    waves : Tensor, optional
        ``(*batch, stored, samples, in)``, the transforms of inputs.
    dtype : torch.dtype
        Dtype of the kernel, in whose precision the rank of its blocks is judged.
    problem
        Arguments of :func:`nearest_unitary`: method, rotation (of the real blocks), steps and so on.
    """
    stacks: list[Stack] = []
    for chosen, times in ((grid.paired, 2 if grid.real else 1), (grid.self_conjugate, 1)):
        own = blocks.index_select(-3, chosen)
        data = None if waves is None else waves.index_select(-3, chosen)
        if chosen is grid.self_conjugate:
            own, data = own.real, None if data is None else data.real
        stacks.append((own, data, times))
    there = [stack for stack in stacks if stack[0].numel()]
    found, losses, _ = solve(there, dtype, **problem)
    rest = iter(found)
    return [(next(rest) if own.numel() else own).to(blocks.dtype) for own, _, _ in stacks], losses


def _check_images(images: Tensor, channels: int, size: tuple[int, ...]) -> None:
    """Raise ValueError unless these are ``(samples, channels, *size)``."""
    if images.dim() != len(size) + 2 or images.shape[1] != channels or tuple(images.shape[2:]) != size:
        raise ValueError(f"inputs must be images (samples, {channels}, *{size}), got shape {tuple(images.shape)}")
