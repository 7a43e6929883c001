"""Whether a subject computes what it claims; asked before it is timed.

Ours are compared with the dense float64 maps of :mod:`projunn_manifold.reference` for a gradient of rank k,
where nothing is truncated.  Such a step moves a subspace of 2k dimensions only, so on large matrices the dense map is
applied inside it, which costs O(k n²); on small ones both ways are computed and have to agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from projunn_manifold import reference

from .problems import Problem
from .trials import Build

Check = Callable[[Build, Problem], None]
Map = Callable[[Tensor, Tensor], Tensor]

STEPS = 8  # before a point of ours is looked at; a rival takes two
DENSE = 2**16  # most elements for which the whole dense map is computed
PROBES = 32
TOLERANCE = 16  # eps, of a column of norm one: rounding leaves 3 to 7 in a point
RIVAL_TOLERANCE = 1e-4


class CheckFailedError(RuntimeError):
    """A subject's answer is wrong, so that its time would mean nothing."""


def follows_map(map_: Map, *, normalised: bool = False) -> Check:
    """Return a check that a step agrees with a map of the reference, and that further steps stay unitary.

    ``normalised`` is for Adam, whose first step has the length of its rate.
    """

    def check(build: Build, problem: Problem) -> None:
        exact = problem.of_rank_k()
        trial = build(exact)
        trial.step()
        expected = _reference_step(map_, exact, normalised)
        eps = torch.finfo(exact.x.dtype).eps
        error = _error_per_column(trial.point().to(expected.dtype) - expected)
        if not error <= TOLERANCE * eps:
            raise CheckFailedError(f"a step is {error:.1e} per column away from the float64 reference")
        moving = build(problem)
        for _ in range(STEPS):
            moving.step()
        _expect_unitary(moving.point(), TOLERANCE * eps * (1 + math.sqrt(problem.n) / 16))

    return check


def stays_orthogonal(build: Build, problem: Problem) -> None:
    """Check of a rival: two steps go downhill and what they yield is unitary."""
    trial = build(problem)
    start = trial.point().clone()
    trial.step()
    trial.step()
    point = trial.point()
    if not (problem.gradient().conj() * (point - start)).sum().real < 0:
        raise CheckFailedError("two steps did not go downhill")
    _expect_unitary(point, RIVAL_TOLERANCE)


def arrives_at(expected: Callable[[Problem], Tensor]) -> Check:
    """Return a check that one step ends where a formula says."""

    def check(build: Build, problem: Problem) -> None:
        trial = build(problem)
        trial.step()
        error = _error_per_column(trial.point() - expected(problem))
        if not error <= 1e-5:
            raise CheckFailedError(f"a step ends {error:.1e} per column away from where its formula says")

    return check


def _reference_step(map_: Map, problem: Problem, normalised: bool) -> Tensor:
    x, a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (problem.x, problem.a, problem.b))
    q = torch.linalg.qr(torch.cat([b, _adjoint_times(x, a)], dim=-1)).Q
    product = _adjoint_times(q, _adjoint_times(x, a)) @ _adjoint_times(q, b).mH
    eye = torch.eye(q.shape[-1], dtype=x.dtype)
    inner = map_(eye, _scaled(product.mH - product, problem.rate, normalised))
    y = x + (x @ q) @ (inner - eye) @ q.mH
    if x.numel() <= DENSE:
        dense = map_(x, _scaled(-2 * reference.gradient(x, a @ b.mH), problem.rate, normalised))
        if not _error_per_column(y - dense) <= torch.finfo(problem.x.dtype).eps * TOLERANCE:
            raise CheckFailedError("the reference inside the subspace differs from the dense reference")
    return y


def _scaled(twice: Tensor, rate: float, normalised: bool) -> Tensor:
    """Return half of twice the descent direction times the rate, or its multiple of the rate's length."""
    return rate * (twice / torch.linalg.matrix_norm(twice, keepdim=True) if normalised else twice / 2)


def _expect_unitary(x: Tensor, tolerance: float) -> None:
    """Estimate the unitarity error from random probes, an error for each column of x on average."""
    x = x.to(torch.complex128 if x.is_complex() else torch.float64)
    z = torch.randn(x.shape[-1], PROBES, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    error = (torch.linalg.matrix_norm(_adjoint_times(x, x @ z) - z) / torch.linalg.vector_norm(z)).max().item()
    if not error <= tolerance:
        raise CheckFailedError(f"its point is not unitary: an error of {error:.1e}, above {tolerance:.1e}")


def _adjoint_times(x: Tensor, q: Tensor) -> Tensor:
    return (q.mH @ x).mH


def _error_per_column(x: Tensor) -> float:
    """Norm of a column, root mean square over columns and batch."""
    return torch.linalg.vector_norm(x, dim=-2).square().mean().sqrt().item()
