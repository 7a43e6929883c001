"""Times of several subjects, taken in turn, so that a slow moment of the machine is everyone's."""

from __future__ import annotations

from collections.abc import Callable
from statistics import quantiles
from time import perf_counter
from typing import Any


def milliseconds(subjects: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Return quartiles of the milliseconds of every subject's calls, after two that do not count."""
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds + 2):
        for name, subject in subjects.items():
            begin = perf_counter()
            subject()
            times[name].append(1e3 * (perf_counter() - begin))
    return {name: quantiles(values[2:], n=4) for name, values in times.items()}
