"""Convolutional networks for images of one size, with orthogonal or with plain convolutions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from projunn_manifold import UnitaryLowRank, unitarity_error
from projunn_manifold.layers import OrthogonalConv2d

Convolution = Callable[[int, int, int], nn.Module]  # of channels in, channels out, and the side of the images


def orthogonal(manifold: Callable[[], UnitaryLowRank], *, identity: bool = False) -> Convolution:
    """Return convolutions on a manifold, each on its own, that start within windows of 3 x 3.

    With ``identity`` those that keep the number of channels start as the identity.
    """

    def build(inward: int, outward: int, side: int) -> nn.Module:
        start: dict[str, Any] = {"init": "identity"} if identity and inward == outward else {"support": min(3, side)}
        return OrthogonalConv2d(inward, outward, image_size=side, bias=False, manifold=manifold(), **start)

    return build


def frozen(convolution: Convolution) -> Convolution:
    """Return the same convolutions, never moved."""

    def build(inward: int, outward: int, side: int) -> nn.Module:
        return convolution(inward, outward, side).requires_grad_(False)

    return build


def plain(inward: int, outward: int, side: int) -> nn.Module:
    """Return torch's convolution of 3 x 3, circular."""
    return nn.Conv2d(inward, outward, min(3, side), padding="same", padding_mode="circular", bias=False)


def dirac(inward: int, outward: int, side: int) -> nn.Module:
    """Return torch's convolution, which starts as the identity if it keeps the number of channels."""
    layer = plain(inward, outward, side)
    if inward == outward:
        nn.init.dirac_(layer.weight)
    return layer


def aoc(inward: int, outward: int, side: int) -> nn.Module:
    """Return orthogonium's orthogonal convolution of 3 x 3, circular."""
    from orthogonium.layers.conv.AOC import AdaptiveOrthoConv2d  # of the extra `bench`

    return AdaptiveOrthoConv2d(inward, outward, 3, padding=1, padding_mode="circular", bias=False)


def block(convolution: Convolution, inward: int, outward: int, side: int) -> list[nn.Module]:
    """Return a convolution that knows the side of its images, a batch norm and a ReLU."""
    layer = convolution(inward, outward, side)
    layer.image_side = side
    return [layer, nn.BatchNorm2d(outward), nn.ReLU()]


class Residual(nn.Module):
    """Two blocks beside the identity."""

    def __init__(self, convolution: Convolution, channels: int, side: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(*(m for _ in range(2) for m in block(convolution, channels, channels, side)))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + inner(x)``."""
        return x + self.inner(x)


class ResNet9(nn.Sequential):
    """The paper's network (Kiani et al. 2022, section 5): eight convolutions, two residual parts, a linear read-out.

    ``width`` is that of the first layer, 64 in the paper; later layers have 2, 4 and 8 times as many channels, on
    images that are pooled to a half of their side before each.
    """

    def __init__(self, convolution: Convolution, channels: int, classes: int, side: int, width: int = 64) -> None:
        w, half, quarter, eighth = width, side // 2, side // 4, side // 8
        super().__init__(
            *block(convolution, channels, w, side),
            *block(convolution, w, 2 * w, side),
            nn.MaxPool2d(2),
            Residual(convolution, 2 * w, half),
            *block(convolution, 2 * w, 4 * w, half),
            nn.MaxPool2d(2),
            *block(convolution, 4 * w, 8 * w, quarter),
            nn.MaxPool2d(2),
            Residual(convolution, 8 * w, eighth),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * w, classes),
        )


class Deep(nn.Sequential):
    """So many blocks one after the other, without shortcuts: the paper's test of depth (Fig. 5)."""

    def __init__(
        self, convolution: Convolution, channels: int, classes: int, side: int, width: int = 32, depth: int = 100
    ) -> None:
        blocks = block(convolution, channels, width, side)
        for _ in range(depth - 1):
            blocks += block(convolution, width, width, side)
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


def blocks_error(network: nn.Module) -> float | None:
    """Return how far the blocks of the orthogonal convolutions are from unitary, at most; None without any."""
    layers = [m for m in network.modules() if isinstance(m, OrthogonalConv2d)]
    errors = [unitarity_error(p.detach()).amax() for m in layers for p in (m.weight, m.weight_real) if p is not None]
    return max(errors).item() if errors else None


@torch.no_grad()
def singular_range(network: nn.Module) -> dict[str, float]:
    """Return the smallest and the largest singular value of all convolutions as operators on their images."""
    found = torch.cat([_singular_values(m).cpu() for m in network.modules() if hasattr(m, "image_side")])
    return {"smallest": found.min().item(), "largest": found.max().item()}


def _singular_values(layer: nn.Module) -> Tensor:
    if isinstance(layer, OrthogonalConv2d):
        return layer.singular_values()
    blocks = torch.fft.fft2(layer.weight, s=(layer.image_side, layer.image_side)).permute(2, 3, 0, 1)
    return torch.linalg.svdvals(blocks).flatten()
