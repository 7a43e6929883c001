r"""The closest unitary matrix to a given one: in closed form, or by backpropagation along the Lie algebra.

Closest means that :math:`\|U - W\|_F` is smallest, or, measured on data X, :math:`\|(U - W)X\|_F`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from projunn_manifold.context import in_full_precision
from projunn_manifold.init import closest_unitary
from projunn_manifold.linalg import dense
from projunn_manifold.pretrained.lie import Callback, Problem, descend, squared_distances
from projunn_manifold.validation import check_finite, check_full_rank, check_precision

__all__ = ["METHODS", "Nearest", "Search", "Stack", "as_problem", "nearest_unitary", "solve"]

#: Ways to the closest unitary matrix.
METHODS = ("polar", "procrustes", "lie")

Stack = tuple[Tensor, Tensor | None, int]  # as a Problem, with the inputs in the place of R


class Nearest(NamedTuple):
    """The closest unitary matrix."""

    unitary: Tensor
    #: The squared distance: after every step of ``"lie"``, else one number (NaN on the meta device).
    losses: list[float]
    #: θ, for ``"lie"`` alone: n(n-1)/2 numbers for each matrix, or n² where U is complex.
    parameters: Tensor | None = None


class Search(TypedDict, total=False):
    """What to look for, and how; see :func:`nearest_unitary`."""

    inputs: Tensor | None
    rotation: bool
    steps: int | None
    tolerance: float | None
    seed: int | None
    callback: Callback | None


@torch.no_grad()
@in_full_precision
def nearest_unitary(weight: Tensor, method: str = "polar", **search: Unpack[Search]) -> Nearest:
    r"""Return the matrix with orthonormal columns (of a wide one: rows) that is closest to ``weight``.

    ================  ========================  =================================================
    method            least                     how
    ================  ========================  =================================================
    ``"polar"``       :math:`\|U - W\|_F`       :math:`U = PQ^H` of the SVD :math:`W = PSQ^H`
    ``"procrustes"``  :math:`\|(U - W)X\|_F`    the same of :math:`W X X^H`; square and tall only
    ``"lie"``         either                    :math:`U = e^{\sum_i\theta_i L_i}`, L-BFGS over θ
    ================  ========================  =================================================

    The :math:`L_i` are :math:`E_{ij} - E_{ji}`, i < j, and for complex weights also :math:`i(E_{ij} + E_{ji})` and
    :math:`iE_{jj}`.  If a weight is not square, they have its larger side, and surplus columns or rows of U are
    discarded.  Real exponentials are rotations, so for a real square weight with a negative determinant ``"lie"``
    finds the closest *rotation*, as ``"polar"`` does with ``rotation=True``.  Everything is computed in double
    precision.  Cost: :math:`O(n^3)`, one SVD for ``"polar"``; for ``"lie"`` in every step.

    Parameters
    ----------
    weight : Tensor
        ``(*batch, n, m)``, real or complex; for kernels see :func:`nearest_convolution`.
    method : {"polar", "procrustes", "lie"}
        See above.
    inputs : Tensor, optional
        Rows that the weight is applied to, ``(samples, m)`` or ``(*batch, samples, m)``: the columns of X.  In
        directions that they do not reach, U is as close to the weight as possible (``"procrustes"``), or arbitrary
        (``"lie"``).
    rotation : bool
        Whether real square matrices get determinant one (Kabsch 1976).
    steps, tolerance : int, float, optional
        For ``"lie"`` (500, 1e-6).  It stops when, for every matrix, the derivative with respect to θ is at most
        ``tolerance`` times :math:`2\|W X X^H\|_F`, or, with a warning, after ``steps`` steps of five iterations each.
    seed : int, optional
        For ``"lie"`` (0): seed of the first θ, small random numbers, since θ = 0 is a saddle for Hermitian weights.
    callback : callable, optional
        For ``"lie"``: called after every step with its number, from 1, and the loss.

    Returns
    -------
    Nearest
        ``unitary``, in the dtype of the weight; ``losses``; ``parameters``.

    Raises
    ------
    ValueError
        A weight of deficient rank, whose closest unitary is not unique; non-finite entries; wrong shapes; another
        dtype than those of the manifold; arguments that the method has no use for.
    TypeError
        Unknown arguments.

    References
    ----------
    Chang, *A projection algorithm for the unitary weights*, 2021 (the Lie parameters; its loss is not published, this
    one is ours); Keller 1975 (polar); Schönemann 1966 (Procrustes); Kabsch 1976 (rotations).

    Examples
    --------
    >>> import torch
    >>> from projunn_manifold.pretrained.nearest import nearest_unitary
    >>> _ = torch.manual_seed(0)
    >>> w = torch.randn(20, 20, dtype=torch.complex128)
    >>> polar, lie = nearest_unitary(w).unitary, nearest_unitary(w, "lie").unitary
    >>> torch.allclose(polar, lie, atol=1e-4)
    True
    """
    inputs, problem = as_problem(method, search)
    _check_shapes(weight, inputs)
    wide = dense.in_double(weight.detach())
    data = None if inputs is None else inputs.detach().to(wide)
    (unitary,), losses, (theta,) = solve([(wide, data, 1)], weight.dtype, **problem)
    return Nearest(unitary.to(weight).contiguous(), losses, theta)


def as_problem(method: str, search: Search) -> tuple[Tensor | None, dict[str, Any]]:
    """Return the inputs, and the arguments of :func:`solve`: those that were given.

    Raises
    ------
    TypeError
        An argument that nothing here has.
    """
    unknown = search.keys() - Search.__annotations__.keys()
    if unknown:
        raise TypeError(
            f"unexpected arguments {', '.join(sorted(unknown))}: there are {', '.join(Search.__annotations__)}"
        )
    given = {name: value for name, value in search.items() if value is not None and name != "inputs"}
    return search.get("inputs"), {"method": method, **given}


def _check_shapes(weight: Tensor, inputs: Tensor | None) -> None:
    check_precision(weight.dtype, "weight")
    if weight.dim() < 2 or not weight.numel():
        raise ValueError(f"weight must be (*batch, n, m), and not empty, got shape {tuple(weight.shape)}")
    if inputs is None:
        return
    if inputs.dim() < 2 or inputs.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"inputs must have {weight.shape[-1]} features along dimension -1, as the weight has, "
            f"got shape {tuple(inputs.shape)}"
        )
    if inputs.shape[:-2] not in ((), weight.shape[:-2]):
        raise ValueError(f"inputs must have no batch or the weight's {tuple(weight.shape[:-2])}, got {inputs.shape}")


def _check_problem(
    weight: Tensor, inputs: Tensor | None, method: str, rotation: bool, options: Mapping[str, Any], among_blocks: bool
) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if options and method != "lie":
        raise ValueError(f"method={method!r} has no use for {', '.join(options)}: only 'lie' has")
    if weight.is_meta and method != "polar":
        raise ValueError(f"method={method!r} needs values, and the weight is on the meta device: use 'polar'")
    if inputs is None and method == "procrustes":
        raise ValueError("method='procrustes' needs inputs; without any it would be 'polar'")
    if inputs is not None and method == "polar":
        raise ValueError("method='polar' does not use inputs: choose 'procrustes' or 'lie'")
    if method == "procrustes" and weight.shape[-2] < weight.shape[-1]:
        raise ValueError(
            f"method='procrustes' has no closed form for wide weights, got shape {tuple(weight.shape)}: use 'lie'"
        )
    if rotation and weight.is_complex() and not among_blocks:
        raise ValueError(f"rotation=True is for real matrices, got {weight.dtype}")
    if inputs is not None and not inputs.numel():
        raise ValueError(f"inputs of shape {tuple(inputs.shape)} are empty")
    check_finite(weight, "`weight`")
    if inputs is not None:
        check_finite(inputs, "`inputs`")


def solve(
    stacks: list[Stack], dtype: torch.dtype, *, method: str = "polar", rotation: bool = False, **options: Any
) -> tuple[list[Tensor], list[float], list[Tensor | None]]:
    """Return the closest unitary matrices of stacks in double precision, and the squared distances of all.

    ``dtype`` is that in which the weights were given, in whose precision their rank is judged.
    """
    problems: list[Problem] = []
    for weight, inputs, times in stacks:
        _check_problem(weight, inputs, method, rotation, options, len(stacks) > 1)
        if method != "polar":  # which finds out on its own
            check_full_rank(torch.linalg.svdvals(weight), weight.shape, "`weight`", dtype)
        problems.append((weight, None if inputs is None else torch.linalg.qr(inputs, mode="r")[1], times))
    if method == "lie":
        with torch.inference_mode(False), torch.enable_grad():
            mine = [(weight.clone(), None if r is None else r.clone(), times) for weight, r, times in problems]
            return descend(mine, **options)
    found = []
    for weight, r, _ in problems:
        turned = rotation and not weight.is_complex()
        target, precision = (weight, dtype) if r is None else (_seen(weight, r, turned), weight.dtype)
        found.append(closest_unitary(target, "`weight`", precision, rotation=turned))
    distances = zip(found, problems, strict=True)
    losses = [times * squared_distances(unitary, weight, r).sum() for unitary, (weight, r, times) in distances]
    loss = math.nan if losses[0].is_meta else sum(loss.item() for loss in losses)
    return found, [loss], [None] * len(found)


def _seen(weight: Tensor, r: Tensor, rotation: bool) -> Tensor:
    """Return a matrix whose polar factor minimises ‖(U - W)X‖: W X X^H on the directions X spans, W on the rest."""
    cross = weight @ (r.mT @ r.conj())
    p, s, qh = torch.linalg.svd(cross, full_matrices=False)
    reached = s > torch.finfo(s.dtype).eps * max(weight.shape[-2:]) * s[..., :1]
    if reached.all():
        return cross
    if rotation:
        raise ValueError("rotation=True with inputs that do not span the whole space is not defined")
    p, q = p * reached.unsqueeze(-2), qh.mH * reached.unsqueeze(-2)
    beyond = weight - p @ (p.mH @ weight)
    beyond = beyond - beyond @ q @ q.mH
    scale = torch.linalg.matrix_norm(weight)[..., None, None]
    return p @ q.mH + beyond / scale  # of spaces at right angles: polar factors add
