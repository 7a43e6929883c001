"""In-place initialisers of unitary weights; like torch.nn.init they draw from torch's default generator.

Every function fills its argument with a point of the manifold, keeps its shape, dtype, device and memory
order, accepts leading batch dimensions (one draw for each matrix) and returns it.  An unsupported shape raises
ValueError, an unsupported dtype TypeError.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from projunn_manifold.context import in_full_precision
from projunn_manifold.linalg import dense
from projunn_manifold.validation import check_finite, check_full_rank, check_point

__all__ = ["cayley_", "haar_", "henaff_", "identity_", "nearest_unitary_"]


@torch.no_grad()
def haar_(tensor: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Fill ``(*batch, n, m)``, n >= m, with Haar-distributed matrices (uniform on the manifold)."""
    check_point(tensor, "tensor")
    return tensor.copy_(dense.haar(*tensor.shape, dtype=tensor.dtype, device=tensor.device, generator=generator))


@torch.no_grad()
def identity_(tensor: Tensor) -> Tensor:
    """Fill ``(*batch, n, m)``, n >= m, with the first m columns of the identity."""
    check_point(tensor, "tensor")
    return tensor.copy_(dense.columns_of_identity(*tensor.shape, dtype=tensor.dtype, device=tensor.device))


@torch.no_grad()
def henaff_(tensor: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Fill ``(*batch, n, n)`` with 2 x 2 rotations on the diagonal, angles uniform in (-π, π).

    The exponential of random skew block-diagonal matrices (Henaff, Szlam, LeCun 2016), a usual start for
    memory tasks.  For odd n the last row and column are those of the identity.
    """
    return _block_rotations_(tensor, -math.pi, math.pi, generator)


@torch.no_grad()
def cayley_(tensor: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Fill ``(*batch, n, n)`` with 2 x 2 rotations on the diagonal, angles uniform in (-π/2, 0).

    The start of scoRNN (Helfrich, Willmott, Ye 2018): the Cayley transform of skew blocks with entry
    -tan(θ/2), θ uniform in (0, π/2), rotates by -θ.  For odd n the last row and column are the identity's.
    """
    return _block_rotations_(tensor, -math.pi / 2, 0.0, generator)


@torch.no_grad()
@in_full_precision
def nearest_unitary_(tensor: Tensor) -> Tensor:
    """Replace each matrix of ``(*batch, n, m)``, n >= m, by the closest one with orthonormal columns (polar factor).

    It is computed in double precision by one SVD, :math:`O(n m^2)`.  A tensor on the meta device has no values, and
    stays as it is.

    Raises
    ------
    ValueError
        Non-finite entries, or a rank-deficient matrix, whose closest point is not unique.
    """
    check_point(tensor, "tensor")
    return tensor.copy_(nearest(tensor, "`tensor`"))


def nearest(w: Tensor, name: str) -> Tensor:  # (*batch, n, m) -> (*batch, n, m)
    """Return the polar factors of matrices, computed in double precision; messages call these by the name."""
    check_finite(w, name)
    polar = closest_unitary(dense.in_double(w.detach()), name, w.dtype)
    return polar.to(w).contiguous()


def closest_unitary(
    a: Tensor, name: str, dtype: torch.dtype, *, rotation: bool = False
) -> Tensor:  # (*batch, n, m) -> (*batch, n, m)
    """Return the polar factors of matrices in double precision.

    Parameters
    ----------
    a : Tensor
        ``(*batch, n, m)``, square, tall or wide.
    name : str
        What messages call it.
    dtype : torch.dtype
        Dtype in which the matrices were given, in whose precision their rank is judged.
    rotation : bool
        Whether real square matrices become rotations: where a determinant is negative, the direction of the smallest
        singular value is reversed.

    Raises
    ------
    ValueError
        A rank-deficient matrix (:func:`~projunn_manifold.validation.check_full_rank`).
    """
    u, s, vh = torch.linalg.svd(a, full_matrices=False)
    check_full_rank(s, a.shape, name, dtype)
    if rotation and u.shape[-2] == vh.shape[-1]:
        u[..., -1] *= torch.linalg.det(u @ vh).sign()[..., None]
    return dense.newton_schulz(u @ vh)


def _block_rotations_(tensor: Tensor, low: float, high: float, generator: torch.Generator | None) -> Tensor:
    check_point(tensor, "tensor")
    *batch, n, m = tensor.shape
    if n != m:
        raise ValueError(f"`tensor` must be square to hold rotation blocks, got shape {tuple(tensor.shape)}")
    theta = (
        torch.rand(*batch, n // 2, dtype=tensor.real.dtype, device=tensor.device, generator=generator) * (high - low)
        + low
    )
    first, second = torch.arange(0, n - 1, 2), torch.arange(1, n, 2)
    identity_(tensor)
    cosine, sine = theta.cos().to(tensor.dtype), theta.sin().to(tensor.dtype)
    tensor[..., first, first] = cosine
    tensor[..., second, second] = cosine
    tensor[..., first, second] = -sine
    tensor[..., second, first] = sine
    return tensor
