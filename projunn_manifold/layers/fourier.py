r"""Circular convolutions in the Fourier domain: kernels and blocks, and which frequencies are free.

A circular convolution with :math:`C_{out} \times C_{in}` channels on a grid of :math:`N = \prod n_j` points is
:math:`\hat y(\omega) = B(\omega)\,\hat x(\omega)`, one block for each of the N frequencies.  With torch's convention (a
cross-correlation, :math:`y_i = \sum_j w_j\, x_{i+j}`, j from the kernel's centre)

.. math:: B(\omega) = \sum_j w_j e^{i\omega j},\qquad w_j = \frac1N \sum_\omega B(\omega) e^{-i\omega j}.

The operator is unitary if all blocks are.  A real kernel has :math:`B(-\omega) = \overline{B(\omega)}`: about half of
the blocks are free, and those with :math:`\omega = -\omega`, up to :math:`2^d`, are real (:class:`Spectrum`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from projunn_manifold.context import constant_in_graphs

__all__ = [
    "Spectrum",
    "analyse",
    "at_least_single",
    "blocks_of_kernel",
    "centre_of",
    "depth_to_space",
    "embedded",
    "everywhere",
    "from_origin",
    "kernel_of_blocks",
    "space_to_depth",
    "spectrum",
    "synthesise",
]

_POSITIONS = ("paired", "self_conjugate", "source", "opposite")


@dataclass(frozen=True)
class Spectrum:
    """Frequencies of a grid.  Those stored are all N, or, for real signals, the half that ``torch.fft.rfftn`` keeps.

    The free frequencies come in two kinds: the paired ones, one of each pair of opposites, and after them the
    self-conjugate ones, which are their own opposite.  Every stored frequency is free or the opposite of a free one.
    """

    size: tuple[int, ...]
    real: bool
    paired: Tensor  # (f,) positions of the paired free frequencies, among those stored
    self_conjugate: Tensor  # (s,) positions of the self-conjugate ones; none for complex signals
    source: Tensor  # which free frequency is at every stored position, paired before self-conjugate
    opposite: Tensor  # whether the block stored there is the conjugate of its free partner's


@constant_in_graphs
def spectrum(size: tuple[int, ...], real: bool, device: str = "cpu") -> Spectrum:
    """Return the frequencies of a grid of that size, with positions on a device."""
    return _kept_spectrum(size, real, device)


@lru_cache
def _kept_spectrum(size: tuple[int, ...], real: bool, device: str) -> Spectrum:
    with (
        torch.inference_mode(False),
        torch.device("cpu"),
    ):  # cached for the life of the process: independent of the caller's modes
        if device == "cpu":
            return _on_cpu(size, real)
        on_cpu = _kept_spectrum(size, real, "cpu")
        return Spectrum(size, real, *(getattr(on_cpu, name).to(device) for name in _POSITIONS))


def _on_cpu(size: tuple[int, ...], real: bool) -> Spectrum:
    if not real:
        everything = torch.arange(math.prod(size))
        nothing = everything[:0]
        return Spectrum(size, real, everything, nothing, everything, torch.zeros(len(everything), dtype=torch.bool))
    stored = (*size[:-1], size[-1] // 2 + 1)
    position = torch.arange(math.prod(stored)).view(stored)
    mirrored = position
    for axis in range(len(size) - 1):
        mirrored = mirrored.index_select(axis, -torch.arange(size[axis]) % size[axis])
    last = torch.arange(stored[-1])
    within = (last == 0) | (2 * last == size[-1])  # -ω is stored, too
    position, mirrored = position.flatten(), torch.where(within, mirrored, position).flatten()
    is_own_opposite = (position == mirrored) & within.expand(stored).flatten()
    paired = position[(position <= mirrored) & ~is_own_opposite]
    self_conjugate = position[is_own_opposite]
    rank = torch.empty_like(position)
    rank[torch.cat((paired, self_conjugate))] = torch.arange(len(paired) + len(self_conjugate))
    return Spectrum(size, real, paired, self_conjugate, rank[torch.minimum(position, mirrored)], position > mirrored)


def at_least_single(t: Tensor) -> Tensor:
    """Return t in single precision if it has half: PyTorch has no transforms of half precision on CPU."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def analyse(x: Tensor, grid: Spectrum) -> Tensor:  # (..., *size) -> (..., stored)
    """Return the Fourier transform of signals at the stored frequencies."""
    dims = tuple(range(-len(grid.size), 0))
    x = at_least_single(x)
    transformed = torch.fft.rfftn(x, dim=dims) if grid.real else torch.fft.fftn(x, dim=dims)
    return transformed.flatten(-len(grid.size))


def synthesise(x: Tensor, grid: Spectrum) -> Tensor:  # (..., stored) -> (..., *size)
    """Return the signals with these transforms; inverse of :func:`analyse`."""
    dims = tuple(range(-len(grid.size), 0))
    if not grid.real:
        return torch.fft.ifftn(x.unflatten(-1, grid.size), dim=dims)
    stored = (*grid.size[:-1], grid.size[-1] // 2 + 1)
    return torch.fft.irfftn(x.unflatten(-1, stored), s=grid.size, dim=dims)


def embedded(kernel: Tensor, size: tuple[int, ...], before: tuple[int, ...] | None = None) -> Tensor:
    """Return a kernel ``(..., *kernel_size)`` on the whole grid, its centre at entry 0.

    ``before`` is the number of points that torch pads before the image, which locates the centre; as for
    padding="same" if left out.
    """
    dims = len(size)
    widths = kernel.shape[-dims:]
    if any(side > whole for side, whole in zip(widths, size, strict=True)):
        raise ValueError(f"a kernel of {tuple(widths)} does not fit a grid of size {tuple(size)}")
    pads = [end for side, whole in zip(widths[::-1], size[::-1], strict=True) for end in (0, whole - side)]
    whole = torch.nn.functional.pad(kernel, pads) if any(pads) else kernel
    centre = tuple((side - 1) // 2 for side in widths) if before is None else before
    return whole.roll([-c for c in centre], tuple(range(-dims, 0)))


def from_origin(kernel: Tensor, size: tuple[int, ...]) -> Tensor:
    """Move the centre of a kernel as large as the grid from entry 0 to where torch's padding="same" has it."""
    return kernel.roll([(side - 1) // 2 for side in size], tuple(range(-len(size), 0)))


def blocks_of_kernel(kernel: Tensor, grid: Spectrum) -> Tensor:  # (..., out, in, *size) -> (..., stored, out, in)
    """Return the blocks of a kernel whose entry 0 is its centre."""
    dims = tuple(range(-len(grid.size), 0))
    transform = torch.fft.ihfftn if grid.real else torch.fft.ifftn  # e^{+iωj}, and no factor of 1/N
    return transform(at_least_single(kernel), dim=dims, norm="forward").flatten(-len(grid.size)).movedim(-1, -3)


def kernel_of_blocks(blocks: Tensor, grid: Spectrum) -> Tensor:  # (..., stored, out, in) -> (..., out, in, *size)
    """Return the kernel of these blocks, its centre at entry 0; inverse of :func:`blocks_of_kernel`."""
    dims, values = tuple(range(-len(grid.size), 0)), blocks.movedim(-3, -1)
    if not grid.real:
        return torch.fft.fftn(values.unflatten(-1, grid.size), dim=dims, norm="forward")
    stored = (*grid.size[:-1], grid.size[-1] // 2 + 1)
    return torch.fft.hfftn(values.unflatten(-1, stored), s=grid.size, dim=dims, norm="forward")


def everywhere(free: Tensor, grid: Spectrum) -> Tensor:  # (..., free, r, c) -> (..., stored, r, c)
    """Return matrices at all stored frequencies from those at the free ones."""
    if not grid.real:
        return free
    stored = free.index_select(-3, grid.source)
    return torch.where(grid.opposite[:, None, None], stored.conj(), stored)


def space_to_depth(x: Tensor, stride: int, dims: int) -> Tensor:  # (..., c, *size) -> (..., c stride^d, *size / stride)
    """Move the points that a stride skips into channels of their own (space to depth)."""
    lead = x.dim() - dims
    for axis in range(dims):
        x = x.unflatten(lead + 2 * axis, (-1, stride))
    x = x.permute(*range(lead), *range(lead + 1, lead + 2 * dims, 2), *range(lead, lead + 2 * dims, 2))
    return x.flatten(lead - 1, lead - 1 + dims)


def depth_to_space(x: Tensor, stride: int, dims: int) -> Tensor:  # (..., c stride^d, *size / stride) -> (..., c, *size)
    """Undo :func:`space_to_depth`."""
    lead = x.dim() - dims
    x = x.unflatten(lead - 1, (-1, *(stride,) * dims))
    x = x.permute(*range(lead), *(axis for j in range(dims) for axis in (lead + dims + j, lead + j)))
    for j in range(dims):
        x = x.flatten(lead + j, lead + j + 1)
    return x


def centre_of(side: int, stride: int) -> int:
    """Return how many points torch pads before an image for a kernel of that side to keep the image's size."""
    return (side - 1) // 2 if stride == 1 else max(0, side - stride + 1) // 2
