"""Training of one network: Riemannian Adam for the transition, RMSprop for the rest, everything timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from geoopt.manifolds.base import Manifold
from geoopt.optim import RiemannianAdam
from tasks import Task
from tqdm import tqdm

DENSE_RATE = 1e-3  # of RMSprop, the same for every method
LAST = 10  # a final loss is the mean over so many last steps


@dataclass(frozen=True)
class Method:
    """A manifold for the transition, and the best learning rate of its Riemannian Adam on every task."""

    name: str
    manifold: Callable[[int], Manifold]  # of a seed
    rates: dict[str, float]
    low_rank: bool
    colour: str


@dataclass(frozen=True)
class Run:
    """One finished training: a value for every step, and the accuracy at the end."""

    task: Task
    method: Method
    rate: float
    losses: list[float]
    seconds: list[float]  # elapsed at the end of the step, measurements left out
    unitarity: list[float]
    optimiser_ms: list[float]  # the step of the transition's optimiser alone
    accuracy: float

    @property
    def final_loss(self) -> float:
        """Mean loss of the last few steps."""
        return statistics.fmean(self.losses[-LAST:])

    @property
    def optimiser_quartiles(self) -> list[float]:
        """Quartiles of the milliseconds that the transition's optimiser takes for a step."""
        return torch.quantile(torch.tensor(self.optimiser_ms), torch.tensor([0.25, 0.5, 0.75])).tolist()

    @property
    def solved(self) -> bool | None:
        """Whether the loss fell under a tenth of the memoryless baseline; None where no baseline is known."""
        return None if self.task.baseline is None else self.final_loss < self.task.baseline / 10


def train(task: Task, method: Method, rate: float) -> Run:
    """Train a fresh network on a task, with a progress bar where there is a terminal to show it."""
    network = task.network(method.manifold(task.seed))
    riemannian = RiemannianAdam([network.transition], lr=rate)
    dense = torch.optim.RMSprop(network.dense_parameters(), lr=DENSE_RATE)
    losses, seconds, unitarity, optimiser_ms = [], [], [], []
    elapsed = 0.0
    label = f"{task.name}, {method.name}, lr {rate:g}"
    with tqdm(task.batches(), label, task.steps, unit="step", leave=False, disable=None) as batches:
        for inputs, targets in batches:
            start = perf_counter()
            network.zero_grad()
            loss = task.loss(network(inputs), targets)
            loss.backward()
            dense.step()
            before = perf_counter()
            riemannian.step()
            end = perf_counter()
            elapsed += end - start
            losses.append(loss.item())
            seconds.append(elapsed)
            optimiser_ms.append(1e3 * (end - before))
            unitarity.append(network.unitarity_error())
            batches.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    run = Run(task, method, rate, losses, seconds, unitarity, optimiser_ms, task.accuracy(network))
    print(f"{label}: loss {run.final_loss:.4g}, accuracy {run.accuracy:.1%}, {elapsed:.1f} s", flush=True)
    return run
