r"""Dense linear algebra: polar factors, Haar measure, functions of skew-Hermitian matrices, norms.

``^H`` is the conjugate transpose, so every
function covers the real case; leading dimensions are batch dimensions.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

__all__ = [
    "DTYPES",
    "Scalar",
    "add_product_",
    "adjoint_times",
    "columns_of_identity",
    "finite_entries",
    "frobenius_inner",
    "haar",
    "high_precision",
    "in_double",
    "is_single",
    "log_unitary",
    "newton_schulz",
    "normalized",
    "per_matrix",
    "plus_product",
    "polar",
    "probed_unitarity_error",
    "rotation_angles",
    "skew",
    "squared_norm",
    "suited",
    "sym",
    "tolerance",
    "unitarity_error",
    "wide",
    "with_derivatives_of",
]


#: One number for all matrices of a stack, or one for each of them, ``(*batch,)``.
Scalar = float | Tensor
#: Dtypes of points.
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def is_single(device: torch.device) -> bool:
    """Return whether a device computes in single precision alone, as Apple's and some of Intel's do."""
    return device.type == "mps" or (device.type == "xpu" and _lacks_double(device))


@functools.cache
def _lacks_double(device: torch.device) -> bool:
    return not torch.xpu.get_device_properties(device).has_fp64


def high_precision(x: Tensor) -> torch.dtype:
    """Return the dtype in which small cores are computed: double precision, single where x's device has no other."""
    if is_single(x.device):
        return x.dtype
    return torch.complex128 if x.is_complex() else torch.float64


def in_double(x: Tensor) -> Tensor:
    """Return x in double precision, on the host if its device has none: for what is done once, or waits anyway."""
    x = x.cpu() if is_single(x.device) else x
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def tolerance(dtype: torch.dtype, n: int) -> float:
    r"""Largest :math:`\|X^H X - I\|_F/\sqrt{m}` that counts as "on the manifold" for side ``n``.

    Rounding alone leaves 3 to 7 eps from n = 8 to n = 1024 (a Haar sample, :func:`polar`); the tolerance is
    about twice that, and grows with ``n`` as a sum's rounding error does.
    """
    return torch.finfo(dtype).eps * (8.0 + math.sqrt(n) / 4.0)


def skew(x: Tensor) -> Tensor:  # (*batch, n, n) -> (*batch, n, n)
    """Skew-Hermitian part ``(x - x^H) / 2``."""
    return torch.sub(x, x.mT.contiguous().conj()).mul_(0.5)  # two to three times faster than with a strided operand


def sym(x: Tensor) -> Tensor:  # (*batch, n, n) -> (*batch, n, n)
    """Hermitian part ``(x + x^H) / 2``."""
    return (x + x.mH) / 2


def adjoint_times(x: Tensor, q: Tensor) -> Tensor:  # (*batch, n, m), (*batch, n, k) -> (*batch, m, k)
    """Return ``x^H q``, conjugating the thin side: ``x.mH`` of a complex batch would copy the big matrix."""
    return (q.mH @ x).mH.resolve_conj()


def add_product_(x: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """Make of x ``scale x + left right^H``, in place, and return it; ``(*batch, n, r)`` and ``(*batch, m, r)``."""
    if x.dim() == 2:
        return x.addmm_(left, right.mH, beta=scale)
    if x.dim() > 3 and left.dim() == right.dim() == x.dim() and x.is_contiguous():
        add_product_(x.view(-1, *x.shape[-2:]), left.flatten(0, -3), right.flatten(0, -3), scale)
        return x
    if x.dim() == 3 and left.dim() == 3 and right.dim() == 3:
        return x.baddbmm_(left, right.mH, beta=scale)
    return x.mul_(scale).add_(left @ right.mH)


def plus_product(x: Tensor, left: Tensor, right: Tensor, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Return ``beta x + alpha left @ right``, in one pass where PyTorch has an operator for it."""
    if x.dim() == left.dim() == right.dim() == 2:
        return torch.addmm(x, left, right, beta=beta, alpha=alpha)
    if x.dim() == left.dim() == right.dim() == 3:
        return torch.baddbmm(x, left, right, beta=beta, alpha=alpha)
    return beta * x + alpha * (left @ right)


def finite_entries(h: Tensor) -> Tensor:
    """Return h with zeros in place of NaN and infinity, on which LAPACK would fail."""
    return torch.where(torch.isfinite(h), h, 0.0)


def frobenius_inner(x: Tensor, y: Tensor) -> Tensor:  # (*batch, n, m) twice -> (*batch,), real
    """Real inner product ``Re tr(x^H y)`` in one read of each, without an intermediate of their size."""
    if x.is_complex():
        x, y = torch.view_as_real(x.resolve_conj()).flatten(-2), torch.view_as_real(y.resolve_conj()).flatten(-2)
    if x.stride(-1) != 1 and x.stride(-2) == 1:  # read a column-major matrix in its own order
        x, y = x.mT, y.mT
    x, y = x.flatten(-2), y.flatten(-2)
    return (x.unsqueeze(-2) @ y.unsqueeze(-1)).squeeze(-1).squeeze(-1)


def squared_norm(x: Tensor) -> Tensor:  # (*batch, n, m) -> (*batch,), double
    """Squared Frobenius norm in double precision."""
    if not x.is_complex():
        return torch.linalg.vector_norm(x, dim=(-2, -1), dtype=high_precision(x)).square()
    parts = torch.view_as_real(x.conj() if x.is_conj() else x)  # the norm of complex numbers takes ten times as long
    return torch.linalg.vector_norm(parts, dim=(-3, -2, -1), dtype=high_precision(parts)).square()


def wide(c: Scalar) -> Scalar:
    """Return a number, or a tensor of numbers in the precision of small cores."""
    return c.to(high_precision(c)) if isinstance(c, Tensor) else c


def suited(c: Scalar, x: Tensor) -> Scalar:
    """Return a number, or a tensor of numbers as the small cores of x take them; a single one on the host is a number.

    The host need not wait for a number of its own, and a device may lack the precision that it has.
    """
    if not isinstance(c, Tensor):
        return c
    if not c.dim() and c.is_cpu and not x.is_cpu:
        return float(c.item())
    return c.to(x.device, high_precision(x).to_real())


def per_matrix(c: Scalar) -> Scalar:  # (*batch,) -> (*batch, 1, 1)
    """Return numbers, one for each matrix, in a shape that multiplies the matrices; in the precision of small cores."""
    number = wide(c)
    return number[..., None, None] if isinstance(number, Tensor) else number


def with_derivatives_of(smooth: Tensor, value: Tensor) -> Tensor:
    """Return a tensor with these values and the derivatives of another that differs by rounding."""
    return value.detach() + (smooth - smooth.detach())


def normalized(x: Tensor) -> Tensor:  # (*batch, n, m) -> (*batch, n, m)
    """Return x divided by its Frobenius norm, safe at the ends of the range; a zero x stays zero."""
    if high_precision(x) == x.dtype and x.numel():  # squares of narrower numbers stay in its range
        x = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=high_precision(x)).real
    return (x / norm.clamp_min(torch.finfo(norm.dtype).tiny)).to(x.dtype)


def polar(x: Tensor) -> Tensor:  # (*batch, n, m) -> (*batch, n, m)
    """Closest matrix with orthonormal columns (unitary polar factor); contiguous.

    A dense SVD leaves U V^H some 20 to 30 eps away from unitary; :func:`newton_schulz` removes that error.
    """
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return newton_schulz(u @ vh).contiguous()


def newton_schulz(x: Tensor) -> Tensor:  # (*batch, n, m) -> (*batch, n, m)
    r"""One Newton-Schulz step :math:`X - X E/2`, E = X^H X - I, towards the polar factor.

    The error left is :math:`\tfrac38\|E\|_2^2`: rounding, where :math:`\|E\|_2 \le \sqrt\epsilon`.
    """
    defect = adjoint_times(x, x)
    defect.diagonal(dim1=-2, dim2=-1).sub_(1)
    return x - x @ defect / 2


def columns_of_identity(
    *size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """First ``m`` columns of the ``n x n`` identity, repeated over the batch dimensions; contiguous."""
    eye = torch.zeros(size, dtype=dtype, device=device)
    eye.diagonal(dim1=-2, dim2=-1).fill_(1)
    return eye


def haar(
    *size: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Uniformly (Haar) distributed matrices with orthonormal columns, ``(*batch, n, m)`` with ``n >= m``.

    QR of a Gaussian matrix, the phases of R's diagonal moved into Q (Mezzadri 2007), which makes the
    factorisation unique and the law invariant.
    """
    gaussian = torch.randn(size, dtype=dtype, device=device, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    return (q * torch.sgn(r.diagonal(dim1=-2, dim2=-1)).unsqueeze(-2)).contiguous()


def unitarity_error(x: Tensor) -> Tensor:  # (*batch, n, m) -> (*batch,), real
    r"""Distance of each matrix from the manifold, :math:`\|X^H X - I\|_F/\sqrt{m}`, computed in double precision.

    It is about the machine epsilon of x's dtype on the manifold.  Derivatives do not pass.  Cost: :math:`O(nm^2)`.

    Raises
    ------
    TypeError, ValueError
        What is no tensor, or has fewer than two dimensions.

    Examples
    --------
    >>> import torch
    >>> from projunn_manifold import unitarity_error
    >>> unitarity_error(torch.stack((torch.eye(4), 2 * torch.eye(4))))
    tensor([0., 3.], dtype=torch.float64)
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"`x` must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() < 2:
        raise ValueError(f"`x` must have at least 2 dimensions (*batch, n, m), got shape {tuple(x.shape)}")
    x = in_double(x.detach())
    gram = x.mH @ x
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return torch.linalg.matrix_norm(gram) / math.sqrt(x.shape[-1])


def probed_unitarity_error(x: Tensor, probes: int = 4) -> Tensor:  # (*batch, n, m) -> (*batch,), real
    r"""Estimate :func:`unitarity_error` in :math:`O(nm)` from :math:`X^H X z - z` for a few fixed Gaussian z.

    Non-finite entries give inf.
    """
    generator = torch.Generator(x.device).manual_seed(0)
    z = torch.randn(x.shape[-1], probes, dtype=x.dtype, device=x.device, generator=generator)
    residual = adjoint_times(x, x @ z) - z
    norms = torch.linalg.vector_norm(residual, dim=(-2, -1)) / torch.linalg.vector_norm(z)
    return torch.where(torch.isfinite(norms), norms, math.inf)


def rotation_angles(w: Tensor) -> Tensor:  # (*batch, n, n) unitary -> (*batch, n) in (-pi, pi]
    """Angles of the eigenvalues of a unitary matrix."""
    return torch.linalg.eigvals(w).angle()


def log_unitary(w: Tensor) -> Tensor:  # (*batch, n, n) unitary -> (*batch, n, n) skew-Hermitian
    r"""Principal logarithm of a unitary matrix, by two unitary square roots and an arcsine.

    :math:`W^{1/2}` is the polar factor of I + W.  After two roots every angle is at most π/4, where
    :math:`\theta = \arcsin(\lambda)`, λ the eigenvalues of the root's skew part, is one-to-one and well
    conditioned, so that only truly repeated angles share an eigenspace; real input stays real.  A Newton
    step on :math:`e^{-L} W = I` takes back the rounding of the two SVDs.
    """
    eye = columns_of_identity(*w.shape, dtype=w.dtype, device=w.device)
    root = polar(eye + polar(eye + w))
    sine, q = torch.linalg.eigh(-1j * skew(root))
    log = (q * (4j * torch.arcsin(sine.clamp(-1, 1))).unsqueeze(-2)) @ q.mH
    log = skew(log if w.is_complex() else log.real)
    return log + skew(torch.linalg.matrix_exp(-log) @ w)
