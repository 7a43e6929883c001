"""The sections of the suite: which subjects meet which matrices, checked first and then measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from .checks import CheckFailedError
from .counting import allocated, operators
from .problems import Problem, random_problem
from .subjects import (
    ADAM,
    CANONICAL,
    DENSE_EXPONENTIAL,
    EUCLIDEAN,
    EVERYTHING,
    IN_PLACE,
    IN_PLACE_RADAM,
    IN_PLACE_RSGD,
    NULL_RSGD,
    PLAIN,
    RADAM,
    RIVALS,
    RSGD,
    SGD,
    STACKED_POGO,
    Subject,
)
from .timing import Effort, Timed, compare, one_step, yardstick

SECTIONS = ("speed", "rank", "batch", "rivals", "stiefel", "complex", "memory", "ops")
RANKS = (1, 4, 16, 64, None)  # of the moves that are timed beside geoopt's Stiefel
LENGTHS = (0.05, 1.0)  # spectral norms of the full-rank steps timed there
COUNTED_RIVALS = 512  # largest side at which the rivals' memory is counted


@dataclass(frozen=True)
class Plan:
    """Sizes of a run."""

    sizes: tuple[int, ...]
    rank_size: int
    ranks: tuple[int, ...]
    blocks: tuple[tuple[int, int, int], ...]  # complex, as a convolution's frequencies
    stacks: tuple[tuple[int, int, int], ...]  # real, small
    memory_sizes: tuple[int, ...]
    ops_size: int
    small_sizes: tuple[int, ...]  # where dense steps are timed, too


FULL = Plan(
    sizes=(128, 512, 1024, 2048, 4096),
    rank_size=2048,
    ranks=(1, 2, 4, 8, 16),
    blocks=((544, 64, 64), (144, 128, 128), (40, 256, 256)),
    stacks=tuple((batch, 32, 32) for batch in (1, 4, 16, 64, 256, 1024, 4096)),
    memory_sizes=(128, 512, 2048),
    ops_size=512,
    small_sizes=(96, 128, 256, 512, 1024),
)
QUICK = Plan(
    sizes=(64, 128),
    rank_size=128,
    ranks=(1, 2, 4),
    blocks=((8, 16, 16),),
    stacks=((1, 16, 16), (32, 16, 16)),
    memory_sizes=(32, 64),
    ops_size=64,
    small_sizes=(32, 64),
)


@dataclass(frozen=True)
class Group:
    """The subjects that are measured on one matrix, or on one batch."""

    section: str
    shape: tuple[int, ...]
    subjects: list[Subject]
    k: int | None = 1
    dtype: torch.dtype = torch.float32
    length: float | None = None  # spectral norm of a step; None: of the usual rate
    yardstick: Subject | None = None  # None: torch's optimisers


def groups(section: str, plan: Plan) -> list[Group]:
    """Return what a section measures."""
    ours = [*IN_PLACE, *RSGD]
    stacks = [SGD, NULL_RSGD, *ours]
    rivals = [STACKED_POGO, DENSE_EXPONENTIAL]
    found = {
        "speed": [Group(section, (n, n), [*PLAIN, *ours, *IN_PLACE_RSGD, *RADAM, *IN_PLACE_RADAM]) for n in plan.sizes],
        "rank": [Group(section, (plan.rank_size,) * 2, ours, k) for k in plan.ranks],
        "batch": [
            *(Group(section, shape, [*stacks, *rivals], dtype=torch.complex64) for shape in plan.blocks),
            *(Group(section, shape, [*stacks, *rivals]) for shape in plan.stacks),
        ],
        "rivals": [Group(section, (n, n), RIVALS) for n in plan.sizes],
        "stiefel": [
            Group(section, (n, n), [rival, *subjects], k, length=length, yardstick=yardstick)
            for n in plan.small_sizes
            for subjects, rival, yardstick in (
                (IN_PLACE_RSGD, CANONICAL[0], EUCLIDEAN[0]),
                (IN_PLACE_RADAM, CANONICAL[1], EUCLIDEAN[1]),
            )
            for k in RANKS
            for length in (LENGTHS if k is None else LENGTHS[:1])
        ],
        "complex": [
            Group(section, (n, n), IN_PLACE_RSGD, None, torch.complex64, LENGTHS[0], STACKED_POGO)
            for n in plan.small_sizes[1:4]
        ],
        "memory": [
            Group(section, (n, n), [s for s in EVERYTHING if s.family != "rival" or n <= COUNTED_RIVALS])
            for n in plan.memory_sizes
        ],
        "ops": [Group(section, (plan.ops_size,) * 2, EVERYTHING)],
    }[section]
    return [replace(g, subjects=[s for s in g.subjects if g.shape[-1] <= s.largest]) for g in found]


class Runner:
    """Measures groups, and remembers how long a rival took so as not to start what would not end."""

    def __init__(self, effort: Effort) -> None:
        self.effort = effort
        self._last: dict[str, tuple[int, float]] = {}

    def cells(self, group: Group) -> Iterator[dict[str, Any]]:
        """Check and measure one subject of a group after the other."""
        problem = random_problem(group.shape, group.dtype, group.k)
        measure = partial(self._count, group.section)
        if group.length is not None:
            problem = problem.of_length(group.length, any(s.adam for s in group.subjects))
        if group.yardstick is not None:
            yards = {"rival": yardstick(group.yardstick.build(problem), self.effort)}
            measure = partial(self._time, yards)
        elif group.section not in ("memory", "ops"):
            needed = {"sgd": SGD} | ({"adam": ADAM} if any(s.adam for s in group.subjects) else {})
            yards = {name: yardstick(subject.build(problem), self.effort) for name, subject in needed.items()}
            measure = partial(self._time, yards)
        for subject in group.subjects:
            yield {
                "section": group.section,
                "subject": subject.name,
                "family": subject.family,
                "source": subject.source,
                "cost": subject.cost,
                "shape": list(group.shape),
                "dtype": str(group.dtype).removeprefix("torch."),
                "k": group.k,
                "length": group.length,
            } | measure(subject, problem)

    def _count(self, section: str, subject: Subject, problem: Problem) -> dict[str, Any]:
        _check(subject, problem)
        steps = max(4, subject.steps)
        return (allocated if section == "memory" else operators)(subject.build(problem), steps)

    def _time(self, yards: dict[str, Timed], subject: Subject, problem: Problem) -> dict[str, Any]:
        rival = subject.family == "rival"
        cap = self.effort.cap
        expected = self._expected(subject, problem) if rival else 0.0
        if 3 * expected > cap:  # the least Timer can do: two steps to warm up, one to time
            return {"not_run": f"not run: a step would take about {expected:.2g} s"}
        _check(subject, problem)
        trial = subject.build(problem)
        seconds = one_step(trial)
        if problem.x.dim() == 2:
            self._last[subject.name] = problem.n, seconds
        if rival and 3 * seconds > cap:
            return {"not_run": f"not run: a step takes {seconds:.2g} s"}
        beside = {name: yard for name, yard in yards.items() if subject.adam or name != "adam"}
        return compare(trial, subject.steps, beside, self.effort, seconds, cap if rival else float("inf"))

    def _expected(self, subject: Subject, problem: Problem) -> float:
        """Extrapolate from the last size, by n³."""
        n, seconds = self._last.get(subject.name, (problem.n, 0.0))
        return seconds * (problem.n / n) ** 3 if problem.x.dim() == 2 else 0.0  # of stacks nothing is known


def _check(subject: Subject, problem: Problem) -> None:
    try:
        subject.check(subject.build, problem)
    except CheckFailedError as failure:
        matrices = f"{'x'.join(map(str, problem.x.shape))} {problem.x.dtype}, k={problem.k}"
        raise CheckFailedError(f"{subject.name} ({subject.source}) on {matrices}: {failure}") from failure
