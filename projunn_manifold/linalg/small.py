r"""Small matrices, r x r for a move of rank r: the same code for tensors and for NumPy's arrays.

A stack of them, or one on another device or under a derivative, is a tensor ``(*batch, r, r)``.  A single one on CPU is
an array: there an operator of PyTorch costs several times the arithmetic, and one of NumPy a third of that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Small",
    "adjoint",
    "block",
    "identity_like",
    "multiple",
    "namespace",
    "phase_core",
    "skew",
    "spectral",
    "squared_norm",
    "to",
]

#: A tensor ``(*batch, r, r)`` or a NumPy array ``(r, r)``, in double precision.
Small = Any


def namespace(x: Any) -> Any:
    """Return the library of x's operators, torch or numpy."""
    return torch if isinstance(x, Tensor) else np


def adjoint(x: Small) -> Small:
    """Return ``x^H``."""
    return x.mH if isinstance(x, Tensor) else x.conj().T


def skew(x: Small) -> Small:
    """Return the skew-Hermitian part ``(x - x^H) / 2``."""
    return (x - adjoint(x)) / 2


def identity_like(x: Small) -> Small:
    """Return the identity of x's shape and dtype."""
    if isinstance(x, Tensor):
        return torch.diag_embed(torch.ones_like(x.diagonal(dim1=-2, dim2=-1)))
    return np.eye(len(x), dtype=x.dtype)


def block(a: Small, b: Small, c: Small, d: Small) -> Small:
    """Return ``[[a, b], [c, d]]``."""
    xp = namespace(a)
    return xp.concatenate((xp.concatenate((a, b), -1), xp.concatenate((c, d), -1)), -2)


def squared_norm(x: Small) -> float | Tensor:  # (*batch, r, s) -> (*batch,), or a number
    """Return the squared Frobenius norm."""
    if isinstance(x, Tensor):
        return torch.linalg.matrix_norm(x).square()
    return float(np.vdot(x, x).real)


def multiple(c: float | Tensor, x: Small) -> Small:
    """Return c x, for a real number, or one for each matrix ``(*batch,)``."""
    if isinstance(x, Tensor):
        return x * (c.to(x.real)[..., None, None] if isinstance(c, Tensor) else c)
    with np.errstate(all="ignore"):  # what is not finite is refused later
        return x * (c.item() if isinstance(c, Tensor) else c)


def to(x: Small, like: Tensor) -> Tensor:
    """Return x as a tensor of ``like``'s dtype and device; a complex x of real matrices is real but for rounding."""
    if not like.is_complex():
        x = x.real
    return (x if isinstance(x, Tensor) else torch.from_numpy(x)).to(like)


def spectral(basis: Small, values: Small) -> Small:  # (*batch, r, s), (*batch, s) -> (*batch, r, r)
    """Return ``B diag(values) B^H``."""
    return (basis * values[..., None, :]) @ adjoint(basis)


def phase_core(omega: Small, alpha: Callable[[Any], Any]) -> Small:  # (*batch, r, r) -> (*batch, r, r)
    r"""Return :math:`f(\Omega) - I` of a skew-Hermitian Ω without losing small increments.

    Ω has eigenvalues iθ, f(Ω) has :math:`e^{i\alpha(\theta)}`: the exponential for α = θ, the polar factor of I + Ω
    for α = arctan θ.  The increment is evaluated as :math:`2i\sin(\alpha/2)e^{i\alpha/2}`.
    """
    xp = namespace(omega)
    theta, q = xp.linalg.eigh(-1j * omega)
    half = alpha(theta) / 2
    core = spectral(q, 2j * xp.sin(half) * xp.exp(1j * half))
    return core if omega.dtype == core.dtype else core.real
