"""How a subject is set up: from a problem to a callable that makes one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import geoopt
import torch
from geoopt.manifolds.base import Manifold
from torch import Tensor, nn

from .problems import Problem


class Trial:
    """A subject ready to step.

    Parameters
    ----------
    step : callable
        Makes one step; what is timed.
    point : callable
        Returns the matrix as it is now.
    moved : list of Tensor
        The tensors that steps write to.
    """

    def __init__(self, step: Callable[[], object], point: Callable[[], Tensor], moved: list[Tensor]) -> None:
        self.step = step
        self.point = point
        self._moved = moved
        self._start = [tensor.detach().clone() for tensor in moved]

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the start, so that every sample of a timing makes the same steps."""
        for tensor, start in zip(self._moved, self._start, strict=True):
            tensor.copy_(start)


Build = Callable[[Problem], Trial]
Optimizer = Callable[..., torch.optim.Optimizer]


class Unconstrained(geoopt.Euclidean):
    """Matrices without a constraint: through it, geoopt's optimisers show what they cost themselves."""

    def __init__(self) -> None:
        super().__init__(ndim=2)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the gradient."""
        return u

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Return x + u."""
        return x + u

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Return the vector."""
        return v

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Return the squared Frobenius norm of u, ``(*batch, 1, 1)``: one number for each matrix."""
        return torch.linalg.matrix_norm(u, keepdim=True).square()


def in_place(manifold: Callable[[int | None], Any]) -> Build:
    """Step by the manifold's own ``step_``, without an optimiser."""

    def build(problem: Problem) -> Trial:
        on, x, g = manifold(problem.k), problem.x.clone(), problem.gradient()
        return Trial(lambda: on.step_(x, g, problem.rate), lambda: x, [x])

    return build


def optimised(optimizer: Optimizer, manifold: Callable[[int | None], Manifold] | None = None) -> Build:
    """Step by an optimiser, on a manifold made for rank k or on a plain parameter."""

    def build(problem: Problem) -> Trial:
        if manifold is None:
            p = nn.Parameter(problem.x.clone())
        else:
            p = geoopt.ManifoldParameter(problem.x.clone(), manifold=manifold(problem.k))
        p.grad = problem.gradient()
        return Trial(optimizer([p], lr=problem.rate).step, lambda: p.detach(), [p])

    return build


def stacked(optimizer: Optimizer) -> Build:
    """Step by an optimiser that expects a batch dimension."""

    def build(problem: Problem) -> Trial:
        p = nn.Parameter(problem.x.clone().reshape(-1, problem.n, problem.n))
        p.grad = problem.gradient().reshape(p.shape)
        return Trial(optimizer([p], lr=problem.rate).step, lambda: p.detach().view(problem.x.shape), [p])

    return build


def parametrised(register: Callable[[nn.Module], object]) -> Build:
    """Go forward, backward and a step of torch's SGD, for constraints that are kept in the forward pass."""

    def build(problem: Problem) -> Trial:
        layer: Any = nn.Linear(problem.n, problem.n, bias=False)
        with torch.no_grad():
            layer.weight.copy_(problem.x)
        register(layer)
        g, optimizer = problem.gradient(), torch.optim.SGD(layer.parameters(), lr=problem.rate)

        def step() -> None:
            optimizer.zero_grad()
            layer.weight.backward(g)
            optimizer.step()

        return Trial(step, lambda: layer.weight.detach(), list(layer.parameters()))

    return build


def dense_exponential(problem: Problem) -> Trial:
    """Step along the geodesic of the whole gradient, by the matrix exponential of its skew part."""
    x, g = problem.x.clone(), problem.gradient()

    def step() -> None:
        outer = g @ x.mH
        x.copy_(torch.linalg.matrix_exp((problem.rate / 2) * (outer.mH - outer)) @ x)

    return Trial(step, lambda: x, [x])


def fresh_copy(problem: Problem) -> Trial:
    """Make a new matrix with the values of the old: what fresh memory costs on this machine."""
    x = problem.x.clone()
    return Trial(x.clone, x.clone, [])


def copy_in_place(problem: Problem) -> Trial:
    """Write the values of one matrix to another."""
    x, y = problem.x.clone(), torch.zeros_like(problem.x)
    return Trial(lambda: y.copy_(x), lambda: y, [])
