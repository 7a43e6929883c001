"""Deep networks for whole images: square layers of one width and tanh, without shortcuts, constrained or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import geoopt
import torch
from torch import Tensor, nn

from projunn_manifold import unitarity_error
from projunn_manifold.layers import UnitaryLinear
from projunn_manifold.optim import RiemannianAdam

from .networks import Choices, Optimizers
from .tasks import Task

DEPTH = 10
PIXELS = 64

Square = Callable[[UnitaryLinear], nn.Module]  # what stands in for such a layer
Moved = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]  # of the parameters' groups: others, square layers


class Deep(nn.Module):
    """A linear map of the pixels, ``DEPTH`` square layers, a linear read-out; tanh after all but the last."""

    def __init__(self, square: Square, choices: Choices, outputs: int) -> None:
        super().__init__()
        n = choices.hidden
        self.first, self.last = nn.Linear(PIXELS, n), nn.Linear(n, outputs)
        layers = [UnitaryLinear(n, n, k=choices.k or None) for _ in range(DEPTH)]  # all draws, before others draw more
        self.squares = nn.Sequential(*map(square, layers))

    def forward(self, pixels: Tensor) -> Tensor:  # (pixels, B, 1) -> (B, outputs)
        """Return the outputs."""
        h = self.first(pixels[..., 0].mT).tanh()
        for square in self.squares:
            h = square(h).tanh()
        return self.last(h)

    def unitarity_error(self) -> float:
        """Distance of the first square layer from the manifold."""
        return unitarity_error(self.squares[0].weight).item()


@dataclass(frozen=True)
class DeepMethod:
    """A kind of square layer, and the optimiser that moves it."""

    name: str
    square: Square
    optimizer: Moved
    colour: ClassVar[str] = "black"

    def build(self, task: Task, choices: Choices, device: torch.device | str = "cpu") -> tuple[Deep, Optimizers]:
        """Return a fresh network, whose weights follow from the seed, and its optimiser."""
        torch.manual_seed(choices.seed)
        network = Deep(self.square, choices, task.outputs).to(device)
        squares = list(network.squares.parameters())
        others = [*network.first.parameters(), *network.last.parameters()]
        groups = [{"params": others, "lr": choices.lr}, {"params": squares, "lr": choices.unitary_lr}]
        return network, [self.optimizer(groups)]


def _same(layer: UnitaryLinear) -> nn.Module:
    return layer


def _stiefel(layer: UnitaryLinear) -> nn.Module:
    plain = layer.to_plain()
    plain.weight = geoopt.ManifoldParameter(plain.weight.detach(), manifold=geoopt.Stiefel(canonical=False))
    return plain


def _frozen(layer: UnitaryLinear) -> nn.Module:
    return layer.to_plain().requires_grad_(False)


def _from_torch(layer: UnitaryLinear) -> nn.Module:
    return nn.Linear(layer.in_features, layer.out_features)


METHODS = {
    method.name: method
    for method in (
        DeepMethod("projUNN-D", _same, RiemannianAdam),
        DeepMethod("Stiefel-euclidean", _stiefel, geoopt.optim.RiemannianAdam),
        DeepMethod("unconstrained", _from_torch, torch.optim.Adam),
        DeepMethod("frozen", _frozen, torch.optim.Adam),
    )
}
