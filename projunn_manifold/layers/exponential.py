r"""The convolution exponential: any kernel A gives an orthogonal or unitary one, :math:`U = e^{(A - A^*)/2}`.

The adjoint of a convolution has the kernel :math:`A^*(x) = \overline{A(-x)}^T`; what is antisymmetric (anti-Hermitian)
under it has skew-Hermitian blocks :math:`S(\omega)` in the Fourier domain, and :math:`U(\omega) = e^{S(\omega)}` is
unitary (Magnasco 2023).  For one channel that is a phase for each frequency, :math:`e^{i\,\mathrm{Im}\,A(\omega)}`:
:math:`O(N \log N)`, less than one iteration of the network that uses it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from projunn_manifold import context
from projunn_manifold.context import in_full_precision
from projunn_manifold.layers import fourier
from projunn_manifold.layers.base import StaysComplex, cast
from projunn_manifold.linalg import dense
from projunn_manifold.validation import check_dtype, check_image_size, check_positive, sides_of

__all__ = ["ExpConv1d", "ExpConv2d", "UnitaryConvRNN", "UnitaryConvRNNCell", "conv_exponential", "squash"]


@in_full_precision
def conv_exponential(kernel: Tensor, image_size: int | tuple[int, ...]) -> Tensor:
    r"""Return the kernel of :math:`e^{(A - A^*)/2}` on a periodic grid, A a kernel of torch's circular convolution.

    Real kernels give orthogonal convolutions, complex ones unitary.  Cost: an FFT, and for C channels the exponential
    of a C x C matrix for each frequency; for one channel only a phase, with its derivative
    :math:`\partial L/\partial A = F^{-1}\{i\,\mathrm{Im}(\overline{U}\,F\{\partial L/\partial U\})\}` written out.

    Parameters
    ----------
    kernel : Tensor
        ``(C, C, *kernel_size)``, centre at ``(kernel_size - 1) // 2``.
    image_size : int or tuple of int
        Size of the grid, not smaller than the kernel.

    Returns
    -------
    Tensor
        ``(C, C, *size)``, centre at ``(size - 1) // 2``.

    References
    ----------
    Magnasco, *Convolutional unitary or orthogonal recurrent neural networks*, 2023; Hoogeboom, Garcia Satorras,
    Tomczak, Welling, *The convolution exponential and generalized Sylvester flows*, NeurIPS 2020.
    """
    grid = _grid_of(kernel, image_size)
    centred = fourier.embedded(fourier.at_least_single(kernel), grid.size)
    by_operators = kernel.shape[0] > 1 or context.operators_only()
    whole = _by_operators(centred, grid) if by_operators else _Phases.apply(centred, grid)  # type: ignore[no-untyped-call]
    return fourier.from_origin(whole, grid.size).to(kernel.dtype)


def _grid_of(kernel: Tensor, size: int | tuple[int, ...]) -> fourier.Spectrum:
    dims = kernel.dim() - 2
    if dims < 1 or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(f"a kernel must be (C, C, *kernel_size), got shape {tuple(kernel.shape)}")
    sides = sides_of(size, dims)
    if any(side > whole for side, whole in zip(kernel.shape[2:], sides, strict=True)):
        raise ValueError(f"a kernel of {tuple(kernel.shape[2:])} does not fit a grid of size {sides}")
    return fourier.spectrum(sides, not kernel.is_complex(), str(kernel.device))


def _by_operators(kernel: Tensor, grid: fourier.Spectrum) -> Tensor:
    """Return the exponential of a kernel on the whole grid."""
    return fourier.kernel_of_blocks(_blocks(kernel, grid), grid)


def _blocks(kernel: Tensor, grid: fourier.Spectrum) -> Tensor:  # (C, C, *size) -> (stored, C, C)
    """Return the unitary blocks."""
    blocks = fourier.blocks_of_kernel(kernel, grid)
    if kernel.shape[0] == 1:
        return torch.polar(blocks.real.new_ones(()), blocks.imag)
    return torch.linalg.matrix_exp(dense.skew(blocks))


class _Phases(torch.autograd.Function):
    """The exponential for one channel, between kernels on the whole grid."""

    @staticmethod
    def forward(ctx: Any, kernel: Tensor, grid: fourier.Spectrum) -> Tensor:
        phases = _blocks(kernel, grid)
        ctx.save_for_backward(kernel, phases)
        ctx.grid = grid
        return fourier.kernel_of_blocks(phases, grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kernel, phases = ctx.saved_tensors
        if torch.is_grad_enabled():  # for derivatives of this derivative
            phases = _blocks(kernel, ctx.grid)
        turned = phases.conj() * fourier.blocks_of_kernel(grad, ctx.grid)
        return fourier.kernel_of_blocks(1j * turned.imag, ctx.grid), None


class _ExpConv(StaysComplex):
    """What the exponential convolutions share; see :class:`ExpConv2d`."""

    dims: ClassVar[int]

    def __init__(
        self,
        channels: int,
        *unexpected: Any,
        image_size: int | tuple[int, ...] | None = None,
        kernel_size: int | tuple[int, ...] | None = None,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("channels", channels)
        check_dtype(dtype or torch.get_default_dtype(), "dtype")
        self.image_size = check_image_size(image_size, self.dims, type(self).__name__, (channels,), unexpected)
        self.channels = channels
        sides = self.image_size if kernel_size is None else sides_of(kernel_size, self.dims, "kernel_size")
        self.generator = nn.Parameter(torch.empty(channels, channels, *sides, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        _grid_of(self.generator, self.image_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a new generator, its blocks of norm about one, and a bias of zero."""
        self.generator.normal_(std=(self.generator[0, 0].numel() * self.channels) ** -0.5)
        if self.bias is not None:
            self.bias.zero_()

    @in_full_precision
    def blocks(self) -> Tensor:  # (stored, C, C)
        """Return the unitary blocks at the stored frequencies: compute them once and pass them to many calls."""
        return _blocks(fourier.embedded(self.generator, self.image_size), self._grid())

    def kernel(self) -> Tensor:  # (C, C, *size)
        """Return the kernel, as torch's circular convolution of this size has it; differentiable."""
        return conv_exponential(self.generator, self.image_size)

    @in_full_precision
    def forward(self, x: Tensor, blocks: Tensor | None = None) -> Tensor:  # (B, C, *size) -> (B, C, *size)
        """Return the convolution of a batch of images; ``blocks`` may be given as they were prepared."""
        if x.dim() != self.dims + 2 or x.shape[1:] != (self.channels, *self.image_size):
            expected = (self.channels, *self.image_size)
            raise ValueError(f"{type(self).__name__}: expected (batch, *{expected}), got shape {tuple(x.shape)}")
        x = cast(self, x, "input", self.generator.dtype)
        grid = self._grid()
        waves = fourier.analyse(x, grid)  # (B, C, stored)
        blocks = self.blocks() if blocks is None else blocks
        several = self.channels > 1
        turned = (blocks @ waves.permute(2, 1, 0)).permute(2, 1, 0) if several else waves * blocks[:, 0, 0]
        y = fourier.synthesise(turned, grid).to(x.dtype)
        return y if self.bias is None else y + self.bias.view(-1, *(1,) * self.dims)

    def _grid(self) -> fourier.Spectrum:
        return _grid_of(self.generator, self.image_size)

    def extra_repr(self) -> str:
        """Return channels and sizes."""
        return f"{self.channels}, image_size={self.image_size}, kernel_size={tuple(self.generator.shape[2:])}"


class ExpConv1d(_ExpConv):
    """:class:`ExpConv2d` for sequences ``(B, C, size)``."""

    dims = 1


class ExpConv2d(_ExpConv):
    """A circular convolution by the exponential of a free kernel: orthogonal, or unitary for a complex dtype.

    Parameters
    ----------
    channels : int
        C, in and out.
    image_size : int or tuple of int
        Size of the images; the layer accepts no other.  Keyword-only.
    kernel_size : int or tuple of int, optional
        Sides of the generator; the kernel itself is as large as the image.
    bias : bool
        Whether to add a bias, which starts at zero.
    device, dtype
        As in torch.nn.

    Attributes
    ----------
    generator : Parameter
        ``(C, C, *kernel_size)``, free, for any optimiser.

    References
    ----------
    Magnasco 2023; Hoogeboom et al. 2020.

    Examples
    --------
    >>> import torch
    >>> from projunn_manifold.layers import ExpConv2d
    >>> layer = ExpConv2d(1, image_size=16, kernel_size=3, bias=False)
    >>> x = torch.randn(2, 1, 16, 16)
    >>> torch.allclose(layer(x).norm(), x.norm())
    True
    """

    dims = 2


def squash(z: Tensor) -> Tensor:
    r""":math:`\varphi(z) = z / \sqrt{1 + |z|^2}`: keeps phases, and moduli below one."""
    return z * torch.rsqrt(1 + (z.real.square() + z.imag.square() if z.is_complex() else z.square()))


class UnitaryConvRNNCell(nn.Module):
    r"""One iteration on a periodic grid, :math:`z' = \varphi(U \otimes z + I)`, :math:`\varphi(z) = z/\sqrt{1+|z|^2}`.

    Parameters
    ----------
    channels, image_size, kernel_size, device
        As in :class:`ExpConv2d`, the class of U (``ExpConv1d`` for an ``image_size`` of one number in a tuple).
    dtype
        complex64 by default.

    References
    ----------
    Magnasco 2023.
    """

    def __init__(
        self,
        channels: int,
        *unexpected: Any,
        image_size: int | tuple[int, ...] | None = None,
        kernel_size: int | tuple[int, ...] | None = None,
        device: Any = None,
        dtype: torch.dtype = torch.complex64,
    ) -> None:
        super().__init__()
        conv = ExpConv1d if isinstance(image_size, tuple) and len(image_size) == 1 else ExpConv2d
        sides = check_image_size(image_size, conv.dims, type(self).__name__, (channels,), unexpected)
        self.conv = conv(channels, image_size=sides, kernel_size=kernel_size, bias=False, device=device, dtype=dtype)

    def forward(self, input: Tensor | None, z: Tensor, blocks: Tensor | None = None) -> Tensor:
        """Return the next state ``(B, C, *size)``; an input of None is zero."""
        moved: Tensor = self.conv(z, blocks)
        return squash(moved if input is None else moved + input)


class UnitaryConvRNN(UnitaryConvRNNCell):
    """:class:`UnitaryConvRNNCell` over a sequence; U is prepared once for all steps.

    Examples
    --------
    >>> import torch
    >>> from projunn_manifold.layers import UnitaryConvRNN
    >>> network = UnitaryConvRNN(1, image_size=16, kernel_size=3)
    >>> states, last = network(torch.randn(5, 2, 1, 16, 16, dtype=torch.complex64))
    >>> states.shape, last.shape
    (torch.Size([5, 2, 1, 16, 16]), torch.Size([2, 1, 16, 16]))
    """

    def forward(  # type: ignore[override]
        self, input: Tensor, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # (T, B, C, *size), (B, C, *size) -> (T, B, C, *size), (B, C, *size)
        """Return all states and the last, from z or from zero."""
        if input.shape[0] == 0:
            raise ValueError("UnitaryConvRNN: expected at least one time step, got none")
        blocks, states = self.conv.blocks(), []
        input = cast(self, input, "input", self.conv.generator.dtype)
        z = torch.zeros_like(input[0]) if z is None else z
        for of_step in input.unbind(0):
            z = super().forward(of_step, z, blocks)
            states.append(z)
        return torch.stack(states), z
