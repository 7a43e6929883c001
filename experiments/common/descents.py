"""Ways to learn one square matrix by gradient descent: on a manifold, by a parametrisation, or without constraint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol

import geoopt
import torch
from geoopt import ManifoldParameter
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact
from projunn_manifold.linalg.dense import haar, unitarity_error
from projunn_manifold.optim import RiemannianSGD

from .networks import Choices, Optimizers, dynamic_trivialisation, pogo
from .rivals import RSDM, MomentumStiefel


class MatrixTask(Protocol):
    """What a descent needs to know."""

    width: int
    dtype: torch.dtype

    @property
    def rate(self) -> float:
        """The inverse of the loss's largest curvature."""


class Matrix(nn.Module):
    """A square matrix."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x U^T``."""
        return self.linear(x)

    def unitarity_error(self) -> float:
        """Distance of U from the manifold."""
        return unitarity_error(self.linear.weight).item()


Put = Callable[[nn.Linear, Choices, float], Optimizers]  # of a layer, its constraint, and an optimiser of that rate


@dataclass(frozen=True)
class Descent:
    """A way to learn a matrix; ``put`` constrains the weight of a layer."""

    name: str
    put: Put
    colour: str
    low_rank: bool = False
    real_only: bool = False
    riemannian_lr: ClassVar[None] = None
    rates: ClassVar[dict[str, tuple[float, float]]] = {}

    def build(
        self, task: MatrixTask, choices: Choices, device: torch.device | str = "cpu"
    ) -> tuple[Matrix, Optimizers]:
        """Return a random rotation and its optimiser; rates are in units of the task's."""
        torch.manual_seed(choices.seed + 2)
        n = task.width
        linear = nn.Linear(n, n, bias=False, dtype=task.dtype, device=device)
        with torch.no_grad():
            linear.weight.copy_(rotation(n, task.dtype))
        return Matrix(linear), self.put(linear, choices, choices.unitary_lr * task.rate)


def rotation(n: int, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Return a Haar-distributed matrix; a real one of determinant one."""
    found = haar(n, n, dtype=dtype, generator=generator)
    if not dtype.is_complex:
        found[0] *= torch.linalg.slogdet(found)[0]
    return found


def _on_manifold(
    make: Callable[[Choices], Any], layer: nn.Linear, choices: Choices, rate: float, *, scale: float = 2
) -> Optimizers:
    layer.weight = ManifoldParameter(layer.weight.detach(), manifold=make(choices))
    return [RiemannianSGD([layer.weight], lr=scale * rate)]  # the tangent is half of the gradient


def _low_rank(kind: type[UnitaryLowRank]) -> Put:
    return partial(_on_manifold, lambda c: kind(c.k or None, sampler=c.sampler, seed=c.seed))


def _parametrised(kind: str, layer: nn.Linear, choices: Choices, rate: float) -> Optimizers:
    orthogonal(layer, orthogonal_map=kind)
    return [torch.optim.SGD(layer.parameters(), lr=rate)]


def _dtriv(layer: nn.Linear, choices: Choices, rate: float) -> Optimizers:
    rebase = dynamic_trivialisation(layer, "weight")
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    optimizer.register_step_post_hook(rebase)
    return [optimizer]


METHODS: dict[str, Descent] = {
    method.name: method
    for method in (
        Descent("projUNN-D", _low_rank(UnitaryLowRank), "tab:blue", low_rank=True),
        Descent("projUNN-T", _low_rank(UnitaryLowRankExact), "tab:orange", low_rank=True),
        Descent("full rank", _low_rank(UnitaryLowRank), "black"),
        Descent(
            "Stiefel-canonical",
            partial(_on_manifold, lambda c: geoopt.Stiefel(canonical=True), scale=0.5),  # its gradient is 4 times ours
            "tab:red",
            real_only=True,
        ),
        Descent(
            "Stiefel-euclidean",
            partial(_on_manifold, lambda c: geoopt.Stiefel(canonical=False)),
            "tab:green",
            real_only=True,
        ),
        Descent("parametrised, matrix_exp", partial(_parametrised, "matrix_exp"), "tab:purple"),
        Descent("parametrised, cayley", partial(_parametrised, "cayley"), "tab:brown"),
        Descent("DTRIV", _dtriv, "tab:cyan", real_only=True),
        Descent("POGO", lambda layer, choices, rate: [pogo(layer.weight, 2 * rate, "SGD")], "gold"),
        Descent(
            "RSDM",
            lambda layer, choices, rate: [RSDM([layer.weight], 2 * rate, layer.in_features // 4, choices.seed)],
            "sienna",
            real_only=True,
        ),
        Descent(
            "StiefelSGD",
            lambda layer, choices, rate: [MomentumStiefel([layer.weight], rate, adaptive=False)],
            "plum",
            real_only=True,
        ),
        Descent(
            "unconstrained", lambda layer, choices, rate: [torch.optim.SGD(layer.parameters(), lr=rate)], "tab:gray"
        ),
        Descent("frozen", lambda layer, choices, rate: [torch.optim.SGD(layer.parameters(), lr=0.0)], "tab:gray"),
    )
}
