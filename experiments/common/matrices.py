"""Tasks for one square matrix: a random unitary matrix from samples, and orthogonal Procrustes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from .descents import rotation
from .tasks import Batch

SAMPLES = 4096


@dataclass(frozen=True)
class RandomUnitary:
    """The linear map of a Haar-distributed U*, of determinant one if it is real, from samples."""

    width: int
    batch: int
    steps: int
    seed: int

    name: ClassVar[str] = "random unitary"
    everywhere: ClassVar[bool] = True
    measure: ClassVar[str] = "‖U - U*‖² / 2n"
    baseline: ClassVar[None] = None
    goal: ClassVar[float] = 1e-6
    dtype: ClassVar[torch.dtype] = torch.complex64

    @property
    def outputs(self) -> int:
        """Width of the targets."""
        return self.width

    @property
    def rate(self) -> float:
        """The inverse of the loss's largest curvature: the gradient is (U - U*) X X^H / (B n)."""
        return self.batch / (1 + math.sqrt(self.batch / self.width)) ** 2  # X X^H reaches about n (1 + √(B/n))²

    @cached_property
    def target(self) -> Tensor:
        """The matrix to be learnt."""
        generator = torch.Generator().manual_seed(self.seed)
        return rotation(self.width, self.dtype, generator)

    def batches(self) -> Iterator[Batch]:
        """Yield samples ``(batch, n)``, reshuffled when all have been seen, and where U* takes them."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        samples = torch.randn(SAMPLES, self.width, dtype=self.dtype, generator=generator)
        for step in range(self.steps):
            if step % (SAMPLES // self.batch) == 0:
                order = torch.randperm(SAMPLES, generator=generator).split(self.batch)
            x = samples[order[step % (SAMPLES // self.batch)]]
            yield x, x @ self.target.mT

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the squared error of a sample, over 2n."""
        return (outputs - targets).abs().square().sum(-1).mean() / (2 * self.width)

    @torch.no_grad()
    def score(self, network: nn.Module, device: torch.device | str) -> float:
        """Return the squared distance from U*, over 2n: the loss on all samples there are."""
        eye = torch.eye(self.width, dtype=self.dtype, device=device)
        return self.loss(network(eye).cpu(), self.target.mT).item() * self.width


@dataclass(frozen=True)
class RandomRotation(RandomUnitary):
    """The same with real numbers."""

    name: ClassVar[str] = "random rotation"
    measure: ClassVar[str] = "‖W - W*‖² / 2n"
    dtype: ClassVar[torch.dtype] = torch.float32


@dataclass(frozen=True)
class Procrustes:
    """Orthogonal Procrustes: the rotation W with least ``‖R (W - W*)^T‖² / (2n)``, R a triangle of condition three.

    R is that of the QR of four times as many Gaussian samples as there are dimensions, so that a step sees all of them;
    the gradient has full rank.
    """

    width: int
    steps: int
    seed: int

    name: ClassVar[str] = "Procrustes"
    everywhere: ClassVar[bool] = True
    measure: ClassVar[str] = "‖W - W*‖² / 2n"
    baseline: ClassVar[None] = None
    goal: ClassVar[float] = 1e-6
    dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def outputs(self) -> int:
        """Width of the targets."""
        return self.width

    @property
    def rate(self) -> float:
        """The inverse of the loss's largest curvature: that of R^T R / n is (1 + 1/2)² / n."""
        return self.width / 1.5**2

    @cached_property
    def problem(self) -> Batch:
        """R, and where W* takes its rows."""
        generator = torch.Generator().manual_seed(self.seed)
        target = rotation(self.width, self.dtype, generator)
        samples = torch.randn(4 * self.width, self.width, generator=generator) / math.sqrt(4 * self.width)
        r = torch.linalg.qr(samples, mode="r")[1]
        return r, r @ target.mT

    def batches(self) -> Iterator[Batch]:
        """Yield the same again and again."""
        for _ in range(self.steps):
            yield self.problem

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the squared error over 2n."""
        return (outputs - targets).square().sum() / (2 * self.width)

    @torch.no_grad()
    def score(self, network: nn.Module, device: torch.device | str) -> float:
        """Return the squared distance from W*, over 2n."""
        r, targets = self.problem
        target = torch.linalg.solve_triangular(r, targets, upper=True)
        return self.loss(network(torch.eye(self.width, device=device)).cpu(), target).item()
