r"""projUNN-D and projUNN-T as pure functions of (X, a, b), and the tangent of a gradient that is known by factors.

The abstract of the paper swaps the two names; its body, its figures, its code and this package agree:
D (direct) projects the updated matrix to the closest unitary, T (tangent) projects the gradient to the
tangent space and follows the geodesic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from projunn_manifold import context, validation
from projunn_manifold.context import in_full_precision
from projunn_manifold.linalg.products import CompiledMatrix, Matrix, matrix
from projunn_manifold.moves.analytic import AnalyticTangent, polar_move
from projunn_manifold.moves.frame import FramedStep, FramedTangent
from projunn_manifold.moves.full_rank import FullRankTangent
from projunn_manifold.moves.move import Move
from projunn_manifold.moves.rank_k import RankKTangent
from projunn_manifold.moves.rank_one import RankOneTangent
from projunn_manifold.moves.tangent import Tangent, longest_step
from projunn_manifold.sketching.lowrank import LowRank

__all__ = [
    "move_d",
    "move_t",
    "projunn_d",
    "projunn_d_",
    "projunn_t",
    "projunn_t_",
    "sketched_tangent",
    "tangent_of_gradient",
    "tangent_of_vector",
]


def tangent_of_gradient(x: Matrix, factors: LowRank) -> Tangent:
    """Return ``½(a b^H - X b a^H X)``: in closed form on square X, in an orthonormal frame on tall X.

    Factors of m/2 columns or more save nothing on square X; there the tangent is that of their product.
    """
    is_square = x.shape[-2] == x.shape[-1]
    if is_square and factors.rank > 1 and 2 * factors.rank >= x.shape[-1]:
        return FullRankTangent.of_vector(x, factors.dense())
    kind = FramedTangent if not is_square else RankOneTangent if factors.rank == 1 else RankKTangent
    tangent = kind.of_gradient(x, factors)
    return AnalyticTangent.of_gradient(tangent, x, factors) if context.wants_derivatives(x.like, *factors) else tangent


def tangent_of_vector(x: Matrix, u: Tensor, q: Tensor | None) -> Tangent:
    """Return the tangent that a dense vector u is reduced to inside the right basis q (None: all of it)."""
    tangent = FramedTangent.of_dense(x, u, q)
    return AnalyticTangent.of_dense(tangent, x, u, q) if context.wants_derivatives(x.like, u) else tangent


def sketched_tangent(x: CompiledMatrix, g: Matrix, test: Tensor) -> Tangent | None:  # test: (m, k)
    """Return the tangent of a (G^H a)^H, a = orth(G test), in one call, or None where that cannot be."""
    if x.shape[-2] != x.shape[-1]:
        return FramedTangent.of_sketch(x, g, test)
    return (RankOneTangent if test.shape[-1] == 1 else RankKTangent).of_sketch(x, g, test)


def move_d(x: Matrix, factors: LowRank) -> Move:
    """Return the move of projUNN-D: to the closest unitary to ``X + a b^H``."""
    move = FramedStep.of_factors(x, factors).raw_retraction()
    return polar_move(move, x, factors) if context.wants_derivatives(x.like, *factors) else move


def move_t(x: Matrix, factors: LowRank) -> Move:
    """Return the move of projUNN-T: along the geodesic of the tangent part of ``a b^H``.

    Raises
    ------
    ValueError
        On CPU, if the tangent part is too long for its precision.
    """
    tangent = tangent_of_gradient(x, factors)
    if context.readable(x.like):
        within = torch.as_tensor(tangent.squared_norm()) <= longest_step(x.like)  # which NaN is not
        if not within.all():
            raise ValueError(
                f"projunn_t: the tangent part of a b^H is too long for {x.like.dtype}, rounding would leave nothing of "
                "it; use a smaller step"
            )
    return tangent.geodesic()


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
        Shapes, dtypes or devices that do not match; on CPU also non-finite factors, steps whose squares leave the
        range, and a numerically singular :math:`X + a b^H`, whose closest unitary is not unique.

    Notes
    -----
    The core is factorised, for which the host waits on CUDA; the steps of :func:`~projunn_manifold.optim.constrain` do
    not.

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
    known, factors = _checked(x, a, b)
    return move_d(known, factors).apply(known)


@in_full_precision
def projunn_t(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    r"""Geodesic from X along the tangent part of :math:`a b^H`: the paper's projUNN-T.

    .. math:: Y = \exp(A)\,X,\qquad A = \tfrac12\,(a b^H X^H - X b a^H)

    Parameters and errors are those of :func:`projunn_d`, without the singular case: the exponential
    always exists.  On CPU a tangent part longer than :math:`\sqrt{2m}/\epsilon` is refused, of which rounding would
    leave nothing.  Cost: as there, with one read of square X less in compiled loops; at k = 1 on square X the cores are
    scalars, for which the host never waits.

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
    known, factors = _checked(x, a, b)
    return move_t(known, factors).apply(known)


@in_full_precision
def projunn_d_(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Like :func:`projunn_d`, in place: x becomes Y and is returned.  An error leaves x untouched."""
    with torch.no_grad():
        validation.check_writable(x)
        known, factors = _checked(x, a, b)
        return move_d(known, factors).apply_(known)


@in_full_precision
def projunn_t_(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Like :func:`projunn_t`, in place: x becomes Y and is returned.  An error leaves x untouched."""
    with torch.no_grad():
        validation.check_writable(x)
        known, factors = _checked(x, a, b)
        return move_t(known, factors).apply_(known)


def _checked(x: Tensor, a: Tensor, b: Tensor) -> tuple[Matrix, LowRank]:
    """Return X and its factors; raise unless x has a point's shape and ``a b^H`` is a finite step of that shape."""
    validation.check_point(x)
    validation.check_tensor(a, "a")
    validation.check_tensor(b, "b")
    *batch, n, m = x.shape
    for name, t, side in (("a", a, n), ("b", b, m)):
        if t.dtype != x.dtype:
            raise TypeError(f"`{name}` must have the dtype of `x`, {x.dtype}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"`{name}` must be on the device of `x`, {x.device}, got {t.device}")
        if t.dim() != x.dim() or list(t.shape[:-2]) != batch or t.shape[-2] != side or t.shape[-1] < 1:
            expected = ", ".join(map(str, [*batch, side, "k"]))
            raise ValueError(f"`{name}` must have shape ({expected}) with k >= 1, got {tuple(t.shape)}")
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(f"`a` and `b` must have the same number of columns k, got {a.shape[-1]} and {b.shape[-1]}")
    if context.readable(x) and not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        bad = sum(int((~torch.isfinite(t)).sum()) for t in (a, b))
        raise ValueError(
            f"the factors must be finite, got {bad} non-finite entries in a {tuple(a.shape)} and b {tuple(b.shape)}"
        )
    return matrix(x), LowRank(a, b).balanced()
