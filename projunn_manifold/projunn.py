r"""projUNN-D and projUNN-T for those who have factors: pure functions of (X, a, b).

The abstract of the paper swaps the two names; its body, its figures, its code and this package agree:
D (direct) projects the updated matrix to the closest unitary, T (tangent) projects the gradient to the
tangent space and follows the geodesic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from projunn_manifold.factors import LowRank
from projunn_manifold.frame import Step
from projunn_manifold.linalg import in_full_precision
from projunn_manifold.moves import Move
from projunn_manifold.tangents import tangent_of_gradient
from projunn_manifold.validation import check_factors, check_writable

__all__ = ["projunn_d", "projunn_d_", "projunn_t", "projunn_t_"]


def _move_d(x: Tensor, a: Tensor, b: Tensor) -> Move:
    check_factors(x, a, b)
    return Step.of_factors(x, LowRank(a, b)).raw_retraction()


def _move_t(x: Tensor, a: Tensor, b: Tensor) -> Move:
    check_factors(x, a, b)
    return tangent_of_gradient(x, LowRank(a, b).balanced()).geodesic()


@in_full_precision
def projunn_d(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    r"""Closest unitary (orthonormal-column) matrix to :math:`X + a b^H`: the paper's projUNN-D.

    .. math:: Y = (X + a b^H)\,\big[(X + a b^H)^H (X + a b^H)\big]^{-1/2}

    Parameters
    ----------
    x : Tensor
        ``(*batch, n, m)``, n >= m, orthonormal columns; float32, float64, complex64 or complex128.
    a : Tensor
        ``(*batch, n, k)``.  The step includes its sign and size: descent on G is ``a b^H = -lr G_k``.
    b : Tensor
        ``(*batch, m, k)``

    Returns
    -------
    Tensor
        Y, in fresh memory.  Cost: :math:`O(k^2 n)`, and 4 reads or writes of square X, 6 of tall X, with compiled
        loops; without them 2 more where it is not in place.

    Raises
    ------
    TypeError, ValueError
        Shapes, dtypes or devices that do not match; on CPU also non-finite factors and a numerically
        singular :math:`X + a b^H`, whose closest unitary is not unique.

    Notes
    -----
    Kiani, Balestriero, LeCun, Lloyd 2022, Lemma 4.1 and Theorem 4.2.  On O(n), a step so large that
    X + a b^H changes the sign of its determinant leaves the component of X.

    Examples
    --------
    >>> import torch
    >>> from projunn_manifold import projunn_d
    >>> x = torch.eye(3, dtype=torch.float64)
    >>> a, b = torch.tensor([[0.0], [1.0], [0.0]]).double(), torch.tensor([[1.0], [0.0], [0.0]]).double()
    >>> u, _, vh = torch.linalg.svd(x + a @ b.mH)
    >>> torch.allclose(projunn_d(x, a, b), u @ vh)
    True
    """
    return _move_d(x, a, b).apply(x)


@in_full_precision
def projunn_t(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    r"""Geodesic from X along the tangent part of :math:`a b^H`: the paper's projUNN-T.

    .. math:: Y = \exp(A)\,X,\qquad A = \tfrac12\,(a b^H X^H - X b a^H)

    Parameters and errors are those of :func:`projunn_d`, without the singular case: the exponential
    always exists.  Cost: as there, with one read of square X less in compiled loops; at k = 1 the cores are scalars.

    Notes
    -----
    Kiani, Balestriero, LeCun, Lloyd 2022, Lemma 4.3 and Theorem 4.4.  On tall X this is the geodesic of
    :math:`\langle u,v\rangle_X = \mathrm{Re}\,\mathrm{tr}\,u^H(2I - XX^H)v` (twice the canonical metric).

    Examples
    --------
    >>> import torch
    >>> from projunn_manifold import projunn_t
    >>> x = torch.eye(2, dtype=torch.float64)
    >>> a, b = torch.tensor([[0.0], [1.0]]).double(), torch.tensor([[2.0], [0.0]]).double()
    >>> projunn_t(x, a, b)  # a rotation by one radian
    tensor([[ 0.5403, -0.8415],
            [ 0.8415,  0.5403]], dtype=torch.float64)
    """
    return _move_t(x, a, b).apply(x)


@in_full_precision
def projunn_d_(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Like :func:`projunn_d`, in place: x becomes Y and is returned.  An error leaves x untouched."""
    with torch.no_grad():
        check_writable(x)
        return _move_d(x, a, b).apply_(x)


@in_full_precision
def projunn_t_(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Like :func:`projunn_t`, in place: x becomes Y and is returned.  An error leaves x untouched."""
    with torch.no_grad():
        check_writable(x)
        return _move_t(x, a, b).apply_(x)
