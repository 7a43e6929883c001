"""The two tasks of the comparison: copying memory, and handwritten digits read pixel by pixel.

A task's weights and batches follow from its seed, so all methods start alike and see the same data in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Protocol

import torch
from geoopt.manifolds.base import Manifold
from recurrent import RecurrentNetwork
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Batch = tuple[Tensor, Tensor]


class Task(Protocol):
    """What training needs to know of a task; inputs and logits are ``(time, batch, ...)``."""

    name: ClassVar[str]
    seed: int

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""

    @property
    def baseline(self) -> float | None:
        """Loss of a network without memory, where it is known."""

    def network(self, manifold: Manifold) -> RecurrentNetwork:
        """Return a freshly initialised network."""

    def batches(self) -> Iterator[Batch]:
        """Yield ``steps`` pairs of inputs and targets."""

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the training loss."""

    def accuracy(self, network: RecurrentNetwork) -> float:
        """Return the fraction of correct answers on data not trained on."""


@dataclass(frozen=True)
class Copying:
    """Copying memory: repeat ten symbols after ``length`` steps.

    A sequence is ten random symbols of eight, ``length - 1`` blanks, a delimiter and ten blanks; the
    target is ``length + 10`` blanks and then the ten symbols.  A network without memory can at best
    answer blank and then guess, with mean cross entropy ``10 ln 8 / (length + 20)``.
    """

    length: int
    hidden: int
    batch: int
    steps: int
    seed: int

    name: ClassVar[str] = "copying"
    symbols: ClassVar[int] = 8
    copied: ClassVar[int] = 10
    blank: ClassVar[int] = 8
    delimiter: ClassVar[int] = 9

    @property
    def baseline(self) -> float:
        """Loss of the memoryless strategy."""
        return self.copied * math.log(self.symbols) / (self.length + 2 * self.copied)

    def network(self, manifold: Manifold) -> RecurrentNetwork:
        """Return a network that looks its input symbols up and answers with a symbol or blank."""
        torch.manual_seed(self.seed)
        encoder = nn.Embedding(self.symbols + 2, self.hidden)
        return RecurrentNetwork(encoder, self.hidden, self.symbols + 1, manifold)

    def batches(self) -> Iterator[Batch]:
        """Yield fresh random sequences."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            yield self.sequences(generator)

    def sequences(self, generator: torch.Generator) -> Batch:
        """Draw one batch of sequences and their targets."""
        symbols = torch.randint(self.symbols, (self.copied, self.batch), generator=generator)
        inputs = torch.full((self.length + 2 * self.copied, self.batch), self.blank)
        targets = inputs.clone()
        inputs[: self.copied] = symbols
        inputs[self.copied + self.length - 1] = self.delimiter
        targets[-self.copied :] = symbols
        return inputs, targets

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy over all positions."""
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def accuracy(self, network: RecurrentNetwork) -> float:
        """Return the fraction of the ten symbols recalled, on a batch of sequences of another seed."""
        inputs, targets = self.sequences(torch.Generator().manual_seed(self.seed + 1))
        correct = network(inputs)[-self.copied :].argmax(-1) == targets[-self.copied :]
        return correct.float().mean().item()


@dataclass(frozen=True)
class Digits:
    """Scikit-learn's 8 x 8 handwritten digits, one pixel a step, in one fixed random order of the 64."""

    hidden: int
    batch: int
    epochs: int
    seed: int

    name: ClassVar[str] = "digits"
    classes: ClassVar[int] = 10
    baseline: ClassVar[None] = None

    @property
    def steps(self) -> int:
        """Number of optimiser steps; an epoch's last batch may be smaller."""
        (_, labels), _ = permuted_digits()
        return self.epochs * math.ceil(len(labels) / self.batch)

    def network(self, manifold: Manifold) -> RecurrentNetwork:
        """Return a network that reads one grey value a step."""
        torch.manual_seed(self.seed)
        return RecurrentNetwork(nn.Linear(1, self.hidden), self.hidden, self.classes, manifold)

    def batches(self) -> Iterator[Batch]:
        """Yield the training images, reshuffled every epoch."""
        (images, labels), _ = permuted_digits()
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            for chosen in torch.randperm(len(labels), generator=generator).split(self.batch):
                yield images[:, chosen], labels[chosen]

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy of the answer after the last pixel."""
        return cross_entropy(logits[-1], targets)

    @torch.no_grad()
    def accuracy(self, network: RecurrentNetwork) -> float:
        """Return the test accuracy."""
        _, (images, labels) = permuted_digits()
        return (network(images)[-1].argmax(-1) == labels).float().mean().item()


@cache
def permuted_digits() -> tuple[Batch, Batch]:
    """Return the training and test images ``(64, images, 1)`` with their labels; order and split never change."""
    digits = load_digits()
    order = torch.randperm(digits.data.shape[1], generator=torch.Generator().manual_seed(0))
    pixels = torch.tensor(digits.data / 16, dtype=torch.float32)[:, order].T.unsqueeze(-1)
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return (pixels[:, train], labels[train]), (pixels[:, test], labels[test])
