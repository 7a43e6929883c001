"""Learning a random unitary matrix (the paper's Fig. 2b): complex, 4096 Gaussian samples, batches of 16, plain SGD.

The loss is ``‖(U - U*) x‖² / (2 n)``, the mean over a batch, so that at first it is 1.  Its gradient has rank 16, the
batch; k = 16 keeps all of it.  Run ``python experiments/random_unitary.py``; ``--hidden 2048`` is the
paper's, which samples columns (``--sampler column``).  ``--unitary-lr`` is in units of twice the inverse of the batch's
largest curvature.  What is called projUNN here is SGD along the tangent (``retr``, ``expmap``);
geoopt's Stiefel manifolds know no complex matrices.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from common.descents import METHODS
from common.experiment import parser, run
from common.tasks import Batch
from torch import Tensor, nn

from projunn_manifold.linalg.dense import haar

SAMPLES = 4096


@dataclass(frozen=True)
class RandomUnitary:
    """The linear map of a Haar-distributed U*, from samples."""

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
        return haar(self.width, self.width, dtype=torch.complex64, generator=generator)

    def batches(self) -> Iterator[Batch]:
        """Yield samples ``(batch, n)``, reshuffled when all have been seen, and where U* takes them."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        samples = torch.randn(SAMPLES, self.width, dtype=torch.complex64, generator=generator)
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
        eye = torch.eye(self.width, dtype=torch.complex64, device=device)
        return self.loss(network(eye).cpu(), self.target.mT).item() * self.width


def main(arguments: list[str] | None = None) -> int:
    """Train, report, and return the exit status."""
    command = parser(
        (__doc__ or "").partition("\n")[0],
        methods=METHODS,
        chosen=["projUNN-D", "projUNN-T"],
        steps=12000,
        batch=16,
        hidden=512,
        unitary_lr=1.0,
        k=[1, 2, 4, 8, 16],
        out=Path("results/random_unitary"),
    )
    command.add_argument("--sampler", default="lsi", help="see UnitaryLowRank (default: %(default)s)")
    options = command.parse_args(arguments)
    options.lr = 0.0  # there is nothing but the matrix
    run(
        options,
        lambda seed: RandomUnitary(options.hidden, options.batch, options.steps, seed),
        METHODS,
        sampler=options.sampler,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
