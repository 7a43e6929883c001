"""What the demo trains: its tasks, and for each method the optimiser, the start, and the rates that its study tries."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from . import deep, descents, networks
from .matrices import RandomRotation
from .networks import Choices
from .tasks import Adding, Pixels, Task
from .training import Run, train

FOREVER = 100_000  # steps; a time ends such a training


class Rotation(RandomRotation):
    """A rotation from samples, learnt when a loss of 1 has fallen to 1e-4."""

    goal: ClassVar[float] = 1e-4


class Sums(Adding):
    """Adding, judged by the share of the variance that the answers explain."""

    measure: ClassVar[str] = "variance explained"
    goal: ClassVar[None] = None  # nobody stops before the end

    def score(self, network: nn.Module, device: torch.device | str) -> float:
        """Return one less the mean squared error over the variance."""
        return 1 - super().score(network, device) / self.baseline


@dataclass(frozen=True)
class Recipe:
    """How one method is trained on a panel's task.

    Parameters
    ----------
    name : str
        In table and picture.
    method
        Of :mod:`common.descents`, :mod:`common.deep` or :mod:`common.networks`: start and optimiser.
    rates : tuple of float
        Learning rates of the square weights that the study tries; none where they never move.
    k : int
        Rank, or 0.
    seconds : float, optional
        Time of training after which to end.
    trial : dict
        How the task differs in the study.
    """

    name: str
    method: Any
    rates: tuple[float, ...] = ()
    k: int = 0
    seconds: float | None = None
    trial: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """A task, what all methods have in common, and the methods."""

    name: str
    task: Task
    choices: Choices
    recipes: tuple[Recipe, ...]
    seeds: int = 1
    decay: bool = False  # of the learning rates
    looks: bool = False  # whether scores are taken during the training

    def train(self, recipe: Recipe, rate: float | None, seed: int, **options: Any) -> Run:
        """Train one method from a seed."""
        task = replace(self.task, seed=seed, **options.pop("trial", {}))
        choices = replace(self.choices, seed=seed, k=recipe.k, unitary_lr=rate or 0.0)
        look = (lambda network: {"score": task.score(network, "cpu")}) if self.looks else None
        return train(task, recipe.method, choices, decay=self.decay, look=look, **options)


MATRIX = (1.0, 2.0, 4.0)  # rates in units of the inverse curvature
SPHERE = (0.001, 0.003, 0.01, 0.03)  # rates of Adam, which takes the length of a whole matrix
LIMIT, LONGEST = 25.0, 30.0  # seconds for a dense method, and for one of ours
DENSE = {
    "Stiefel-euclidean": descents.METHODS["Stiefel-euclidean"],
    "Stiefel-canonical": descents.METHODS["Stiefel-canonical"],
    "Cayley": descents.METHODS["parametrised, cayley"],
}


def panels(quick: bool) -> tuple[Panel, ...]:
    """Return the tasks with their methods; small ones for a smoke run."""
    if quick:
        return point(64, steps=30), cost(16), nothing_lost(16, steps=20)
    return point(1024, FOREVER), cost(1024), nothing_lost(48, steps=4000)


def point(n: int, steps: int) -> Panel:
    """Return the paper's first experiment with real numbers: plain gradient descent from a random rotation."""
    low_rank = (("D", 1, 1500), ("D", 4, 500), ("D", 16, 300), ("T", 16, 300))
    return Panel(
        "rotation",
        Rotation(n, 16, steps, 0),
        Choices(n),
        (
            *(
                Recipe(f"projUNN-{v}, k = {k}", descents.METHODS[f"projUNN-{v}"], MATRIX, k, LONGEST, {"steps": trial})
                for v, k, trial in low_rank
            ),
            *(Recipe(name, method, (*MATRIX, 8.0), 0, LIMIT, {"steps": 25}) for name, method in DENSE.items()),
            Recipe("frozen", descents.METHODS["frozen"], seconds=1.0),
        ),
    )


def cost(n: int) -> Panel:
    """Return ten square layers and tanh on whole digits: Adam of each kind, two epochs of 64 images a step."""
    return Panel(
        "deep network",
        Pixels(64, 2, 0, permuted=False),
        Choices(n, lr=1e-3),
        (
            Recipe("projUNN-D, k = 1", deep.METHODS["projUNN-D"], SPHERE, 1, trial={"epochs": 1}),
            Recipe("Stiefel-euclidean", deep.METHODS["Stiefel-euclidean"], SPHERE, trial={"epochs": 1}),
            Recipe("unconstrained", deep.METHODS["unconstrained"], (1e-5, 1e-4, 1e-3), trial={"epochs": 1}),
            Recipe("frozen", deep.METHODS["frozen"]),
        ),
        looks=True,
    )


def nothing_lost(n: int, steps: int) -> Panel:
    """Return a narrow recurrent network that adds: Adam moves the transition, RMSprop all else, at falling rates."""
    low_rank = [
        Recipe(f"projUNN-{v}, k = 4", networks.METHODS[f"projUNN-{v}, RAdam"], (0.1, 0.3, 1.0), 4) for v in ("D", "T")
    ]
    return Panel(
        "narrow network",
        Sums(20, 64, steps, 0),
        Choices(n, nonlinearity="relu", init="henaff", lr=1e-2),
        (
            *low_rank,
            Recipe("Stiefel-euclidean", networks.METHODS["Stiefel-euclidean, RAdam"], (0.1, 0.3, 1.0)),
            Recipe("frozen", networks.METHODS["frozen"]),
        ),
        seeds=3,
        decay=True,
        looks=True,
    )


def timed(quick: bool) -> list[tuple[str, descents.Descent, int, list[int]]]:
    """Return whose steps are timed: name, method, k, and sizes n, those of dense methods up to 1024."""
    sizes = [2**i for i in (range(4, 6) if quick else range(6, 13))]
    low_rank = [(f"projUNN-D, k = {k}", descents.METHODS["projUNN-D"], k, sizes) for k in (1, 16)]
    dense = [(name, method, 0, [n for n in sizes if n <= 1024]) for name, method in DENSE.items()]
    return [*low_rank, *dense, ("unconstrained", descents.METHODS["unconstrained"], 0, sizes)]
