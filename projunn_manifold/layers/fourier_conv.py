r"""What all unitary convolutions share: the operator, its initialisation, its kernel, the closest layer to a kernel.

There is one unitary block for each frequency.  Kernels are as large as the image, and live in the Fourier domain
(:mod:`projunn_manifold.layers.fourier`): a stack of unitary blocks, and for real signals a second one of real
orthogonal blocks, at the frequencies that are their own opposite.  So a rank-k update of all blocks costs
:math:`O(k N C^2)` on N points, and the operator, not only its blocks, stays orthogonal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from geoopt import ManifoldParameter
from torch import Tensor, nn

from projunn_manifold.context import in_full_precision
from projunn_manifold.init import closest_unitary, haar_, identity_
from projunn_manifold.layers import fourier
from projunn_manifold.layers.base import KeepsManifolds, cast
from projunn_manifold.layers.blocks import apply_blocks
from projunn_manifold.layers.confined import confined
from projunn_manifold.layers.plain_conv import PLAIN, centred_kernel
from projunn_manifold.linalg import dense
from projunn_manifold.manifold.state import digits_of, numbers_of
from projunn_manifold.manifold.unitary import UnitaryLowRank, keeps_factors, manifold_or_new
from projunn_manifold.validation import check_dtype, check_image_size, check_positive, sides_of

__all__ = ["FourierConv", "NearestBlocks"]

#: Chooses unitary blocks for a layer; see :meth:`FourierConv.from_centred_kernel`.
NearestBlocks = Callable[["FourierConv", Tensor], Sequence[Tensor]]


class FourierConv(KeepsManifolds):
    """A unitary convolution in any dimension; see :class:`~projunn_manifold.layers.OrthogonalConv2d`."""

    dims: ClassVar[int]
    real: ClassVar[bool]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *unexpected: Any,
        image_size: int | tuple[int, ...] | None = None,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        k: int | None = 1,
        manifold: UnitaryLowRank | None = None,
        init: str = "haar",
        support: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("in_channels", in_channels)
        check_positive("out_channels", out_channels)
        check_positive("stride", stride)
        check_positive("groups", groups)
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}")
        channels = (in_channels, out_channels)
        self.image_size = check_image_size(image_size, self.dims, type(self).__name__, channels, unexpected)
        if any(side % stride for side in self.image_size):
            raise ValueError(f"stride={stride} must divide every side of the image, got image_size={self.image_size}")
        if init not in ("haar", "identity"):
            raise ValueError(f"init must be 'haar' or 'identity', got {init!r}")
        if support is not None:
            check_positive("support", support)
            if support > max(self.image_size) // stride:
                raise ValueError(
                    f"support={support} does not fit images of size {self.image_size} with stride {stride}"
                )
            if init != "haar":
                raise ValueError(f"support={support} sets the initial kernel: leave init at its default, got {init!r}")
        self.in_channels, self.out_channels, self.stride, self.groups = in_channels, out_channels, stride, groups
        self.init, self.support = init, support
        self.manifold = manifold_or_new(manifold, k)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self._check_conversion(dtype)
        check_dtype(dtype, "dtype")
        precision = torch.empty((), dtype=dtype).real.dtype
        wide = torch.promote_types(precision, torch.complex64)
        grid = self.grid("cpu")
        block = self._block
        self.weight = self._stack(len(grid.paired), block, device, wide)
        self.weight_real = self._stack(len(grid.self_conjugate), block, device, precision)
        own = precision if self.real else wide
        self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=own)) if bias else None
        self.reset_parameters()
        self.remember_manifolds()

    def _check_conversion(self, dtype: torch.dtype) -> None:
        if self.real and dtype.is_complex:
            raise TypeError(f"{type(self).__name__} is for real signals, got dtype {dtype}")

    def get_extra_state(self) -> Tensor:  # (4 + dims, 8) int64
        """Return what the blocks belong to, for ``state_dict``: other grids have stacks of the same shape."""
        return digits_of(self._origin)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse the blocks of another layer."""
        self._check_origin(state, "state")

    @property
    def _origin(self) -> list[int]:
        return [self.in_channels, self.out_channels, self.stride, self.groups, *self.image_size]

    def _check_origin(self, state: object, name: str) -> None:
        found = [round(number) for number in numbers_of(state, len(self._origin), name)]
        if found != self._origin:
            names = "in_channels, out_channels, stride, groups, *size"
            raise ValueError(
                f"{name!r} is that of another {type(self).__name__}: ({names}) are {found}, expected {self._origin}"
            )

    def _prepare(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Refuse the blocks of another layer, and a plain kernel."""
        key, given = f"{prefix}_extra_state", state_dict.get(f"{prefix}weight")
        if key in state_dict:
            self._check_origin(state_dict[key], key)
        elif given is not None and getattr(given, "shape", None) != getattr(self.weight, "shape", None):
            raise ValueError(
                f"{key!r} is missing, so {prefix + 'weight'!r} is not that of {type(self).__name__}, which keeps a "
                "unitary block for each frequency: make the layer from a torch convolution by from_plain, or "
                "`unitarize` the model"
            )

    @property
    def _block(self) -> tuple[int, int]:
        """Outputs and inputs of the operator at a point of the coarse grid, for each group."""
        return self.out_channels // self.groups, self.in_channels // self.groups * self.stride**self.dims

    def grid(self, device: torch.device | str) -> fourier.Spectrum:
        """Return the frequencies of the layer's (coarse) grid, with positions on a device."""
        return fourier.spectrum(tuple(side // self.stride for side in self.image_size), self.real, str(device))

    def _stack(self, count: int, block: tuple[int, int], device: Any, dtype: torch.dtype) -> ManifoldParameter | None:
        """Return blocks for that many frequencies, square or tall; None for none."""
        if not count:
            return None
        empty = torch.empty(self.groups, count, max(block), min(block), device=device, dtype=dtype)
        return ManifoldParameter(empty, manifold=self.manifold)

    def _stacks(self) -> list[ManifoldParameter]:
        """Return the blocks that there are."""
        return [stack for stack in (self.weight, self.weight_real) if stack is not None]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights, as after ``to_empty``."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        stacks = self._stacks()
        if stacks[0].is_meta:
            return
        if self.support is not None:
            out, inward = self._block
            grid = self.grid("cpu")
            blocks = confined(grid, self.groups, (max(out, inward), min(out, inward)), self.support, out < inward)
            if self.weight is not None:
                self.weight.copy_(blocks[:, grid.paired])
            if self.weight_real is not None:
                self.weight_real.copy_(blocks[:, grid.self_conjugate].real)
            return
        for stack in stacks:
            (haar_ if self.init == "haar" else identity_)(stack)
        if self.weight_real is not None and self.init == "haar" and self._block[0] == self._block[1]:
            turned = torch.linalg.det(self.weight_real) < 0  # training never changes the sign of a determinant
            self.weight_real[..., 0].mul_(torch.where(turned, -1.0, 1.0)[..., None])

    # -- the operator -----------------------------------------------------------------------------------

    @in_full_precision
    def forward(self, x: Tensor) -> Tensor:  # (B, in, *size) -> (B, out, *size // stride)
        """Return the convolution of a batch of images, or of one."""
        name, d = type(self).__name__, self.dims
        if x.dim() not in (d + 1, d + 2) or x.shape[-d - 1] != self.in_channels:
            raise ValueError(f"{name}: expected ([batch,] {self.in_channels}, *size), got shape {tuple(x.shape)}")
        if tuple(x.shape[-d:]) != self.image_size:
            raise ValueError(f"{name}: made for images of size {self.image_size}, got {tuple(x.shape[-d:])}")
        if x.dim() == d + 1:
            return self.forward(x[None])[0]
        if x.shape[0] == 0:  # which FFTs refuse
            return self.forward(torch.cat((x, x.new_zeros(1, *x.shape[1:]))))[:0]
        x = cast(self, x, "input", self._dtype)
        grid = self.grid(x.device)
        waves = self.waves(x, grid)
        if torch.compiler.is_compiling():
            waves = waves.contiguous()  # inductor assumes a wrong layout for what is selected from it (torch 2.13)
        parts = []
        for stack, chosen in ((self.weight, grid.paired), (self.weight_real, grid.self_conjugate)):
            if stack is not None:
                at = waves.index_select(1, chosen) if self.real else waves
                adjoint = self._block[0] < self._block[1]
                parts.append(apply_blocks(stack, at.contiguous(), adjoint, keeps_factors(stack)))
        answer = fourier.everywhere(torch.cat(parts, 1) if len(parts) > 1 else parts[0], grid)
        y = fourier.synthesise(answer.permute(3, 0, 2, 1).flatten(1, 2), grid).to(x.dtype)
        return y if self.bias is None else y + self.bias.view(-1, *(1,) * d)

    def waves(self, x: Tensor, grid: fourier.Spectrum) -> Tensor:  # -> (groups, stored, in, batch)
        """Return the Fourier transform of images at the stored frequencies."""
        coarse = fourier.space_to_depth(x.unflatten(1, (self.groups, -1)), self.stride, self.dims)
        return fourier.analyse(coarse, grid).permute(1, 3, 2, 0)

    @property
    def _dtype(self) -> torch.dtype:
        """Dtype of the signals."""
        if self.weight_real is not None:
            return self.weight_real.dtype
        assert self.weight is not None
        return self.weight.dtype

    # -- kernels ----------------------------------------------------------------------------------------

    @in_full_precision
    def kernel(self) -> Tensor:  # (out, in / groups, *size)
        """Return the kernel, as torch's circular convolution of this size has it; differentiable."""
        grid = self.grid(self._device)
        stacks = self._stacks()
        free = torch.cat([stack.to(torch.promote_types(stack.dtype, torch.complex64)) for stack in stacks], 1)
        blocks = fourier.everywhere(free.mH.resolve_conj() if self._block[0] < self._block[1] else free, grid)
        fine = fourier.depth_to_space(fourier.kernel_of_blocks(blocks, grid), self.stride, self.dims)
        return fine.roll(self._centre, tuple(range(-self.dims, 0))).flatten(0, 1)

    @property
    def _device(self) -> torch.device:
        """Device of the blocks."""
        stack = self.weight if self.weight is not None else self.weight_real
        assert stack is not None
        return stack.device

    @property
    def _centre(self) -> tuple[int, ...]:
        """Position of the kernel's centre: as many points come before it as torch pads."""
        return tuple(fourier.centre_of(side, self.stride) for side in self.image_size)

    @classmethod
    def from_kernel(cls, kernel: Tensor, *, stride: int = 1, groups: int = 1, **options: Any) -> Any:
        """Return the layer closest to a kernel ``(out, in / groups, *size)`` of torch's circular convolution.

        Every block becomes its closest unitary; the kernel of such a layer gives this layer again.  ``options`` are
        those of the layer.

        Raises
        ------
        ValueError
            A block without full rank, whose closest unitary is not unique.
        """
        centre = tuple(fourier.centre_of(side, stride) for side in kernel.shape[2:])
        centred = fourier.embedded(kernel, tuple(kernel.shape[2:]), centre)
        return cls.from_centred_kernel(centred, stride=stride, groups=groups, **{"bias": False, **options})

    @classmethod
    def from_plain(
        cls, conv: Any, image_size: int | tuple[int, ...], *, nearest: NearestBlocks | None = None, **options: Any
    ) -> Any:
        """Return the layer closest to a ``torch.nn.Conv`` with circular padding, for images of that size.

        ``nearest`` and ``options`` are as for :meth:`from_centred_kernel`.

        Raises
        ------
        TypeError, ValueError
            Another module, dilation, or a padding that is not circular or does not keep the size (divided by the
            stride).
        """
        given = {"stride": conv.stride[0], "groups": conv.groups, "bias": conv.bias is not None, **options}
        layer = cls.from_centred_kernel(centred_kernel(conv, sides_of(image_size, cls.dims)), nearest, **given)
        if conv.bias is not None and layer.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(conv.bias)
        return layer

    @classmethod
    def from_centred_kernel(cls, centred: Tensor, nearest: NearestBlocks | None = None, **options: Any) -> Any:
        """Return the layer closest to a kernel ``(out, in / groups, *image_size)`` with its centre at entry 0.

        ``nearest`` is a function of the layer and of its blocks ``(groups, stored, out, in)``, in double precision,
        that returns the unitary blocks at the paired and at the self-conjugate frequencies: the closest ones if left
        out.
        """
        out, per_group, *size = centred.shape
        given = {"dtype": centred.dtype, "device": centred.device, **options}
        layer = cls(per_group * given["groups"], out, image_size=tuple(size), **given)
        with torch.no_grad():
            blocks = layer._blocks_of(dense.in_double(centred))
            found = (nearest or _polar_blocks)(layer, blocks)
            for stack, own in zip((layer.weight, layer.weight_real), found, strict=True):
                if stack is not None:
                    own = own if stack.is_complex() else own.real
                    stack.copy_(own.mH if layer._block[0] < layer._block[1] else own)
        return layer

    def _blocks_of(self, centred: Tensor) -> Tensor:  # (out, in / groups, *size) -> (groups, stored, *block)
        """Return the blocks of any kernel of this layer's shape, its centre at entry 0."""
        coarse = fourier.space_to_depth(centred.unflatten(0, (self.groups, -1)), self.stride, self.dims)
        return fourier.blocks_of_kernel(coarse, self.grid(centred.device))

    def to_plain(self) -> nn.Module:
        """Return the same operator as a ``torch.nn.Conv`` with circular padding, its kernel as large as the image."""
        padding: Any = "same" if self.stride == 1 else self._centre
        plain_class: Any = PLAIN[self.dims - 1]
        plain = plain_class(
            self.in_channels,
            self.out_channels,
            self.image_size,
            stride=self.stride,
            padding=padding,
            groups=self.groups,
            bias=self.bias is not None,
            padding_mode="circular",
            device=self._device,
            dtype=self._dtype,
        )
        with torch.no_grad():
            plain.weight.copy_(self.kernel())
            if self.bias is not None and plain.bias is not None:
                plain.bias.copy_(self.bias).requires_grad_(self.bias.requires_grad)
        stacks = self._stacks()
        plain.weight.requires_grad_(any(stack.requires_grad for stack in stacks))
        plain.train(self.training)
        assert isinstance(plain, nn.Module)
        return plain

    @torch.no_grad()
    def singular_values(self, kernel: Tensor | None = None) -> Tensor:
        """Return all singular values of the operator, descending: they are one but for rounding.

        Given another ``kernel`` of the shape that :meth:`kernel` returns, return those of its operator.
        """
        grid = self.grid(self._device)
        blocks = None if kernel is None else self._blocks_of(kernel)
        found = []
        for stack, chosen, times in (
            (self.weight, grid.paired, 2 if self.real else 1),
            (self.weight_real, grid.self_conjugate, 1),
        ):
            if stack is not None:
                own = fourier.at_least_single(stack) if blocks is None else blocks.index_select(1, chosen)
                found.append(torch.linalg.svdvals(own).flatten().repeat(times))
        return torch.cat(found).sort(descending=True).values

    def support_energy(self, kernel_size: int) -> Tensor:
        """Return the share of the kernel's squared norm within a window of so many points a side, at its centre.

        Differentiable: ``1 - layer.support_energy(3)`` added to a loss keeps filters local.
        """
        check_positive("kernel_size", kernel_size)
        kernel = self.kernel()
        window = kernel
        for axis, (centre, side) in enumerate(zip(self._centre, self.image_size, strict=True), -self.dims):
            width = min(kernel_size, side)
            first = max(0, min(centre - fourier.centre_of(width, self.stride), side - width))
            window = window.narrow(axis, first, width)
        return window.abs().square().sum() / kernel.abs().square().sum()

    def extra_repr(self) -> str:
        """Return channels, size and what differs from the default."""
        text = f"{self.in_channels}, {self.out_channels}, image_size={self.image_size}"
        for name, default in (("stride", 1), ("groups", 1)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text if self.bias is not None else f"{text}, bias=False"


def _polar_blocks(layer: FourierConv, blocks: Tensor) -> list[Tensor]:
    """Return the closest unitary blocks at the paired and at the self-conjugate frequencies."""
    grid, found = layer.grid(blocks.device), []
    for chosen in (grid.paired, grid.self_conjugate):
        own = blocks.index_select(-3, chosen)
        own = own.real if chosen is grid.self_conjugate and grid.real else own
        found.append(closest_unitary(own, "a block of the kernel", layer._dtype) if own.numel() else own)
    return found
