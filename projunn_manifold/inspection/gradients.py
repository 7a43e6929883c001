"""How large a gradient is, how much of it a sketch keeps, and how far the step along the sketch moves the point.

Everything is computed from products of gradient and point with a few columns.  A gradient that is kept as factors is
not multiplied out, except by samplers that need all of it (``"column"``, ``"svd"``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from projunn_manifold.linalg import dense
from projunn_manifold.linalg.products import LinearOperator, matrix
from projunn_manifold.manifold.unitary import UnitaryLowRank
from projunn_manifold.moves.projunn import tangent_of_gradient
from projunn_manifold.sketching.factored_tensor import FactoredTensor, as_plain
from projunn_manifold.sketching.lowrank import LowRank
from projunn_manifold.sketching.samplers import Subspace, draw_columns

__all__ = ["best_shares", "gradient_norm", "gradient_operator", "last_sketch", "length_of_descent", "norm_of"]

_PROBES = 8
_FEW = 1024  # columns of factors whose Gram matrices cost little
_BEST = Subspace(power=2, oversample=8)


def gradient_operator(p: Tensor) -> LinearOperator | None:
    """Return the gradient of a parameter as an operator; None if there is no gradient, or if it is sparse."""
    gradient: Any = p.grad
    if gradient is None or gradient.is_sparse:
        return None
    factors = gradient.factors if isinstance(gradient, FactoredTensor) else None
    return factors if isinstance(factors, LowRank) else matrix(as_plain(gradient.detach()))


def norm_of(left: Tensor, right: Tensor) -> float:
    r"""Return :math:`\|L R^H\|_F` of all matrices of a stack together, from the thin factors alone."""
    left, right = (dense.in_double(t.detach()) for t in (left, right))
    squared = ((left.mH @ left) * (right.mH @ right).mT).sum((-2, -1)).real
    return math.sqrt(max(0.0, squared.sum().item()))


def gradient_norm(gradient: LinearOperator) -> float:
    """Return the Frobenius norm of all matrices of a stack together; an estimate if there are more than 1024 factors.

    The estimate is ``‖G Z‖``, where Z has 8 Gaussian columns of variance 1/8.
    """
    if not isinstance(gradient, LowRank):
        return math.sqrt(dense.squared_norm(gradient.dense()).sum().item())
    if gradient.rank <= _FEW:
        return norm_of(*gradient)
    return math.sqrt(dense.squared_norm(gradient.times(_probes(gradient))).sum().item() / _PROBES)


def last_sketch(manifold: UnitaryLowRank, gradient: LinearOperator) -> LowRank:
    """Return the factors that the last step made of this gradient; before the first step, those that it will make.

    If other parameters share the manifold, the random numbers are those of the last step among all of them.
    """
    return manifold.sketcher.sketch(gradient, ahead=-1 if manifold.memory.gradients else 0)


def length_of_descent(manifold: UnitaryLowRank, x: Tensor, gradient: LinearOperator) -> float:
    r"""Return the length of the step of steepest descent at rate 1, in units of X: :math:`\|u\|_F / \|X\|_F`.

    If the step has full rank, the length is estimated from products with 8 Gaussian columns.
    """
    x = x.detach()
    size = math.sqrt(x.numel() // x.shape[-2])
    if not manifold.is_dense(x):
        return norm_of(*tangent_of_gradient(matrix(x), last_sketch(manifold, gradient)).outer()) / size
    z, point = _probes(gradient), matrix(x)
    z = z.expand(*x.shape[:-2], *z.shape)
    u = (gradient.times(z) - point.times(gradient.adjoint_times(point.times(z)))) / 2
    return math.sqrt(dense.squared_norm(u).sum().item() / _PROBES) / size


def best_shares(gradient: LinearOperator, ranks: tuple[int, ...]) -> dict[int, float]:
    """Return the share of the norm that the best factors of each rank keep, estimated with two power iterations."""
    if not ranks:
        return {}
    generator = torch.Generator(gradient.like.device).manual_seed(0)
    most = min(*gradient.shape[-2:], max(ranks))
    _, b = _BEST(gradient, most, generator)
    sizes = torch.linalg.vector_norm(b, dim=-2, dtype=dense.high_precision(b)).real  # b's columns are orthogonal
    squares = sizes.square().sort(-1, descending=True).values.reshape(-1, most).sum(0).cumsum(0)
    whole = max(gradient_norm(gradient) ** 2, squares[-1].item())
    kept = (squares / whole).sqrt().tolist() if whole else [1.0] * most
    return {k: min(1.0, kept[min(k, most) - 1]) if k < min(gradient.shape[-2:]) else 1.0 for k in ranks}


def _probes(gradient: LinearOperator) -> Tensor:  # (m, 8)
    generator = torch.Generator(gradient.like.device).manual_seed(1)
    return draw_columns(gradient.shape[-1], _PROBES, gradient.like, generator)
