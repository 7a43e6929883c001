"""Circular convolutions that are orthogonal or unitary operators, for one, two and three dimensions.

What they share is :class:`~projunn_manifold.layers.fourier_conv.FourierConv`.
"""

from projunn_manifold.layers.fourier_conv import FourierConv

__all__ = [
    "OrthogonalConv1d",
    "OrthogonalConv2d",
    "OrthogonalConv3d",
    "UnitaryConv1d",
    "UnitaryConv2d",
    "UnitaryConv3d",
]


class OrthogonalConv1d(FourierConv):
    """:class:`OrthogonalConv2d` for sequences ``(B, in, image_size)``."""

    dims, real = 1, True


class OrthogonalConv2d(FourierConv):
    r"""A circular convolution of real images that preserves norms: :math:`\|y\| = \|x\|`, an orthogonal operator.

    With more outputs than inputs (times stride²) it is an isometry, with fewer the adjoint of one.  With a stride,
    the skipped points first become channels of their own.  The kernel is as large as the image.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels.
    image_size : int or tuple of int
        Size of the images; the layer accepts no other.  Keyword-only.
    stride, groups : int
        As in torch.nn.Conv2d; the stride divides the image size.
    bias : bool
        Whether to add a bias, which starts at zero.
    k : int or None
        Rank of the moves of every block, for a manifold made here.
    manifold : UnitaryLowRank, optional
        To be used instead.
    init : {"haar", "identity"}
        First blocks: independent ones, or all the identity.
    support : int, optional
        Start instead with a random kernel that is zero outside a window of this many points per side (times the
        stride).  With a single channel the only such kernel is a single point.
    device, dtype
        As in torch.nn; dtype is that of the images.  The output is contiguous.

    Attributes
    ----------
    weight : ManifoldParameter
        ``(groups, f, n, m)``, complex, n >= m: blocks at the frequencies that have an opposite, one of each pair
        (adjoints of the blocks for fewer outputs than inputs).
    weight_real : ManifoldParameter
        ``(groups, s, n, m)``: blocks at the self-conjugate frequencies, 1 to 4 of them.  Square ones keep the sign
        of their determinant; it starts positive.

    Raises
    ------
    ValueError, TypeError
        Sizes, stride or groups that do not fit; in ``forward`` another number of channels or another size.

    References
    ----------
    Kiani et al. 2022, section 4.4; Trockman, Kolter, *Orthogonalizing convolutional layers with the Cayley transform*,
    ICLR 2021.

    Examples
    --------
    >>> import torch
    >>> from projunn_manifold.layers import OrthogonalConv2d
    >>> layer = OrthogonalConv2d(3, 16, image_size=32, bias=False)
    >>> x = torch.randn(8, 3, 32, 32)
    >>> y = layer(x)
    >>> y.shape, torch.allclose(y.norm(), x.norm())
    (torch.Size([8, 16, 32, 32]), True)
    """

    dims, real = 2, True


class OrthogonalConv3d(FourierConv):
    """:class:`OrthogonalConv2d` for volumes ``(B, in, *image_size)``."""

    dims, real = 3, True


class UnitaryConv1d(FourierConv):
    """:class:`UnitaryConv2d` for sequences ``(B, in, image_size)``."""

    dims, real = 1, False


class UnitaryConv2d(FourierConv):
    """A unitary circular convolution of complex images: :class:`OrthogonalConv2d` with all blocks complex and free.

    The space of unitary convolutions is connected, that of orthogonal ones is not (Kiani et al. 2022, Theorem 4.5).
    ``dtype`` may be real: then only its precision counts.  Real images are converted to complex ones.
    """

    dims, real = 2, False


class UnitaryConv3d(FourierConv):
    """:class:`UnitaryConv2d` for volumes ``(B, in, *image_size)``."""

    dims, real = 3, False
