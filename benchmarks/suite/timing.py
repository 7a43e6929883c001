"""Times of a step and their ratios to a yardstick that is timed right before and right after."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter
from typing import Any

from torch.utils.benchmark import Timer

from .trials import Trial

YARDSTICK_STEPS = 8  # at least, in a sample of a yardstick


@dataclass(frozen=True)
class Effort:
    """How much is spent on a cell of the tables."""

    samples: int  # at least, unless the cap cuts them short
    sample_seconds: float  # a sample lasts at least this long
    cell_seconds: float  # samples are added up to this time
    cap: float  # seconds for a cell of a rival
    threads: int


@dataclass(frozen=True)
class Timed:
    """A trial with the number of steps that make a sample."""

    trial: Trial
    steps: int
    threads: int

    def sample(self) -> float:
        """Return the seconds of a step, the mean over a sample that starts where every sample starts."""
        self.trial.restore()
        timer = Timer("step()", globals={"step": self.trial.step}, num_threads=self.threads)
        return timer.timeit(self.steps).median


def yardstick(trial: Trial, effort: Effort) -> Timed:
    """Return a yardstick: a trial with samples of its own."""
    return Timed(trial, _steps(one_step(trial), YARDSTICK_STEPS, effort), effort.threads)


def one_step(trial: Trial) -> float:
    """Return the seconds of one step, to plan with."""
    trial.step()
    start = perf_counter()
    trial.step()
    return perf_counter() - start


def compare(
    trial: Trial, least_steps: int, yardsticks: dict[str, Timed], effort: Effort, seconds: float, cap: float
) -> dict[str, Any]:
    """Time a trial between samples of the yardsticks; ``seconds`` is what a step takes, ``cap`` a limit for all."""
    timed = Timed(trial, _steps(seconds, least_steps, effort), effort.threads)
    sample_seconds = (timed.steps + max(2, timed.steps // 100)) * seconds  # with the warm-up of Timer
    wanted = max(effort.samples, min(4 * effort.samples, int(effort.cell_seconds / sample_seconds)))
    samples = max(1, int(min(wanted, cap / sample_seconds)))
    times: list[float] = []
    beside: dict[str, list[float]] = {name: [yard.sample()] for name, yard in yardsticks.items()}
    for _ in range(samples):
        times.append(timed.sample())
        for name, yard in yardsticks.items():
            beside[name].append(yard.sample())
    return {
        "seconds": spread(times),
        "ratio": {
            name: spread([time / median(yard[i : i + 2]) for i, time in enumerate(times)])
            for name, yard in beside.items()
        },
        "yardstick_seconds": {name: spread(yard) for name, yard in beside.items()},
        "samples": samples,
        "steps_in_a_sample": timed.steps,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    lower, middle, upper = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {name: float(f"{value:.5g}") for name, value in (("median", middle), ("lower", lower), ("upper", upper))}


def _steps(seconds: float, least: int, effort: Effort) -> int:
    """Return a multiple of the least number of steps that lasts long enough for a sample."""
    return least * max(1, math.ceil(effort.sample_seconds / (least * seconds)))
