"""Which sampler, which rank, and what to do with what a rank-k step leaves out: five seeds each, at equal steps.

Three tasks: copying memory and permuted digits (both with RMSprop's direction, as the paper trains) and a random
unitary matrix (plain gradient).  A step takes a direction D, sketches rank-k factors of it and moves; what it leaves
out, D - a b^H, is

- ``dropped``, as in the paper;
- ``kept``: added to the next direction (error feedback), turned along with the point (``transported``) or not;
- ``momentum``: D is a buffer M = 0.9 M + G that stays whole, as geoopt keeps it;
- ``used up``: from that buffer a tenth of what the move used is taken out, as in Dion (Ahn et al. 2025).

``frozen`` makes no steps at all.  Each variant has the best of some learning rates, searched with one seed more.  Run
``python experiments/sampler_study.py``; finished runs are kept in the output folder and not run again, and neither are
those of an earlier record that ``--add`` names.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common.descents import Matrix
from common.experiment import summary
from common.figures import study
from common.matrices import RandomUnitary
from common.networks import Choices, Method, Optimizers, Reader, on_manifold
from common.report import add_record_options, environment, markdown, recorded, tell
from common.tasks import Copying, Pixels, Task
from common.training import NonFiniteError, train
from torch import Tensor
from tqdm import tqdm

from projunn_manifold import UnitaryLowRank
from projunn_manifold.layers import UnitaryLinear
from projunn_manifold.linalg.products import matrix
from projunn_manifold.moves.projunn import tangent_of_gradient
from projunn_manifold.sketching.samplers import Column, Sampler, Subspace, svd

SAMPLERS: dict[str, Sampler] = {
    "lsi": Subspace(),
    "lsi, oversampled": Subspace(oversample=4),
    "lsi, 1 power": Subspace(power=1),
    "lsi, 2 powers": Subspace(power=2),
    "subspace": Subspace(power=1, oversample=4),
    "column": Column(),
    "svd": svd,
}
REST = ("dropped", "kept", "transported", "momentum", "used up")
MOMENTUM = 0.9


@dataclass(frozen=True)
class Variant:
    """A way to make a step."""

    sampler: str = "lsi"
    k: int = 1
    rest: str = "dropped"

    @property
    def name(self) -> str:
        """The variant in words."""
        return f"{self.sampler}, k = {self.k}, {self.rest}" if self.k else self.rest


FROZEN = Variant("", 0, "frozen")
#: What is compared.
VARIANTS = [
    *(Variant(sampler, k) for k in (1, 4) for sampler in SAMPLERS),
    *(Variant(sampler, k, rest) for k in (1, 4) for sampler in ("lsi", "lsi, 1 power") for rest in REST[1:]),
    FROZEN,
]


class Steps(torch.optim.Optimizer):
    """Steps of projUNN-D with all that the study varies; ``rms`` divides the gradient as RMSprop does."""

    def __init__(self, point: Tensor, variant: Variant, lr: float, rms: bool) -> None:
        super().__init__([point], {"lr": lr})
        self.variant, self.rms = variant, rms

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Make one step."""
        if self.variant == FROZEN:
            return
        (group,) = self.param_groups
        (x,) = group["params"]
        manifold, rest = x.manifold, self.variant.rest
        state = self.state[x]
        direction = x.grad.clone()
        if self.rms:
            squares = state.setdefault("squares", torch.zeros_like(x))
            squares.mul_(0.99).addcmul_(direction, direction, value=0.01)
            direction /= squares.sqrt().add_(1e-8)
        memory = state.get("memory")
        if memory is not None:
            direction += memory * (MOMENTUM if rest == "momentum" else 1.0)
        factors = manifold.sketcher.factors(matrix(x), direction)
        if rest in ("kept", "transported"):
            memory = direction - factors.dense()
        elif rest == "momentum":
            memory = direction
        elif rest == "used up":
            memory = direction - (1 - MOMENTUM) * factors.dense()
        move = tangent_of_gradient(matrix(x), factors).scaled(-group["lr"]).retraction()
        move.apply_(matrix(x))
        manifold.correct_(x)
        if memory is not None:
            state["memory"] = memory if rest == "kept" else move.transport_(memory.contiguous())


@dataclass(frozen=True)
class Varied:
    """A variant as a method to train with."""

    name: str
    variant: Variant
    rms: bool
    colour: str = "black"
    low_rank: bool = True

    def build(self, task: Any, choices: Choices, device: torch.device | str = "cpu") -> tuple[Any, Optimizers]:
        """Return a network and its optimisers."""
        sampler = SAMPLERS[self.variant.sampler or "lsi"]
        manifold = UnitaryLowRank(self.variant.k or None, sampler=sampler, seed=choices.seed)
        if isinstance(task, RandomUnitary):
            torch.manual_seed(choices.seed + 2)
            n = task.width
            network = Matrix(UnitaryLinear(n, n, bias=False, manifold=manifold, dtype=torch.complex64))
            return network, [Steps(network.linear.weight, self.variant, choices.unitary_lr, self.rms)]
        return Method(self.name, on_manifold(lambda _: manifold), self._optimizers, self.colour).build(
            task, choices, device
        )

    def _optimizers(self, network: Reader, choices: Choices) -> Optimizers:
        others = [p for p in network.parameters() if p is not network.transition]
        return [
            torch.optim.RMSprop(others, lr=choices.lr),
            Steps(network.transition, self.variant, choices.unitary_lr, self.rms),
        ]


@dataclass(frozen=True)
class Setting:
    """A task of the study, and the rates to choose from."""

    task: Callable[[int], Task]
    hidden: int
    rms: bool
    rates: tuple[float, ...]
    lr: float = 1e-3


RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SETTINGS = {
    "random unitary": Setting(
        lambda seed: RandomUnitary(96, 16, 600, seed), 96, False, tuple(2.0 ** (j / 2) for j in range(-2, 14))
    ),
    "permuted digits": Setting(lambda seed: Pixels(64, 20, seed), 64, True, RATES),
    "copying": Setting(lambda seed: Copying(30, 64, 1500, seed), 64, True, RATES),
}
SEARCH = 100  # the seed of the search for a rate
SEEDS = (0, 1, 2, 3, 4)


def measure(setting: Setting, variant: Variant, rate: float, seed: int) -> dict[str, Any]:
    """Train once."""
    method = Varied(variant.name, variant, setting.rms)
    choices = Choices(setting.hidden, k=variant.k, sampler=variant.sampler, seed=seed, lr=setting.lr, unitary_lr=rate)
    return summary(train(setting.task(seed), method, choices, quiet=True))


def study_one(setting: Setting, variant: Variant) -> dict[str, Any]:
    """Return the runs of all seeds at the best rate of a search."""
    scale = 1 - MOMENTUM if variant.rest in ("momentum", "used up") else 1.0
    rates = (0.0,) if variant == FROZEN else setting.rates
    searched = {scale * rate: _lost(measure, setting, variant, scale * rate, SEARCH) for rate in rates}
    best = min(searched, key=searched.__getitem__)
    runs = [measure(setting, variant, best, seed) for seed in SEEDS]
    return {**asdict(variant), "name": variant.name, "searched": searched, "rate": best, "runs": runs}


def _lost(train_once: Callable[..., dict[str, Any]], *arguments: Any) -> float:
    """Return the final loss; infinity for a training that diverged."""
    try:
        loss = train_once(*arguments)["final_loss"]
    except NonFiniteError:
        return math.inf
    return loss if math.isfinite(loss) else math.inf


def main(arguments: list[str] | None = None) -> int:
    """Train all that is missing, report on what there is, and return the exit status."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--tasks", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="TASK")
    command.add_argument("--add", type=Path, metavar="JSON", help="record to which what it lacks is added")
    add_record_options(command, "results/sampler_study")
    options = command.parse_args(arguments)
    earlier = json.loads(options.add.read_text(encoding="utf-8"))["cells"] if options.add else []
    cells = recorded(options, "sampler_study", lambda: train_all(options.tasks, options.out, earlier))["cells"]
    options.out.mkdir(parents=True, exist_ok=True)
    study(options.out / "sampler_study.png", cells)
    tell(options, "sampler study", f"\n{table(cells)}\n")
    return 0


def train_all(tasks: list[str], folder: Path, earlier: list[dict[str, Any]]) -> dict[str, Any]:
    """Train all variants that are neither in an earlier record nor in the folder; return all that there are."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    known = {(cell["task"], cell["name"]) for cell in earlier}
    wanted = [(task, variant) for task in tasks for variant in VARIANTS if (task, variant.name) not in known]
    for task, variant in tqdm(wanted, "variants", disable=None):
        stem = f"{task}-{variant.name}".replace(" ", "_").replace(",", "").replace("=", "")
        file = folder / f"{stem}.json"
        if not file.exists():
            found = {"task": task, **study_one(SETTINGS[task], variant), **environment()}
            file.write_text(json.dumps(found) + "\n", encoding="utf-8")
            print(
                f"{task}, {variant.name}: {statistics.median(r['final_loss'] for r in found['runs']):.3g}", flush=True
            )
    names = [variant.name for variant in VARIANTS]
    files = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*-*.json")]
    files.sort(key=lambda cell: names.index(cell["name"]))
    cells = [*earlier, *compact(files, {cell["task"]: cell["budget"] for cell in earlier})]
    cells.sort(key=lambda cell: (list(SETTINGS).index(cell["task"]), names.index(cell["name"])))
    return {"cells": cells, **environment()}


def compact(found: list[dict[str, Any]], budgets: dict[str, float]) -> list[dict[str, Any]]:
    """Return for every cell its losses after all steps, and after the time the fastest variant took for them.

    ``budgets`` are such times that are known.
    """
    cells = []
    for task in dict.fromkeys(cell["task"] for cell in found):
        of_task = [cell for cell in found if cell["task"] == task]
        moving = [cell for cell in of_task if cell["k"]] or of_task
        budget = budgets.get(task) or min(
            statistics.median(run["total_seconds"] for run in cell["runs"]) for cell in moving
        )
        for cell in of_task:
            runs, rates = cell["runs"], [float(rate) for rate in cell["searched"]]
            cells.append(
                {
                    **{key: cell[key] for key in ("task", "sampler", "k", "rest", "name", "rate")},
                    "edge": len(rates) > 1 and cell["rate"] in (min(rates), max(rates)),  # a better rate may be beyond
                    "losses": [run["final_loss"] for run in runs],
                    "losses_at_equal_time": [_loss_at(run["curves"], budget) for run in runs],
                    "scores": [run["score"] for run in runs],
                    "seconds": statistics.median(run["total_seconds"] for run in runs),
                    "budget": budget,
                    "measure": runs[0]["measure"],
                }
            )
    return cells


def _loss_at(curves: dict[str, list[float]], seconds: float) -> float:
    """Return the loss at a time."""
    before = [loss for loss, time in zip(curves["loss"], curves["seconds"], strict=True) if time <= seconds]
    return before[-1] if before else curves["loss"][0]


def table(cells: list[dict[str, Any]]) -> str:
    """Return a row for every variant: medians over seeds of the loss after equal steps and time, and of the score.

    A star tells that the best rate was the first or last of the search.
    """
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    columns = [f"{task}: {what}" for task in tasks for what in ("loss", "equal time", _score_of(cells, task))]
    rows = [["sampler", "k", "residual", *columns]]
    for name in dict.fromkeys(cell["name"] for cell in cells):
        of_name = {cell["task"]: cell for cell in cells if cell["name"] == name}
        first = next(iter(of_name.values()))
        row = [first["sampler"], str(first["k"] or ""), first["rest"]]
        for task in tasks:
            cell = of_name.get(task)
            if cell is None:
                row += ["", "", ""]
                continue
            medians = [f"{statistics.median(cell[key]):.2g}" for key in ("losses", "losses_at_equal_time", "scores")]
            row += [medians[0] + "*" * cell["edge"], *medians[1:]]
        rows.append(row)
    return markdown(rows)


def _score_of(cells: list[dict[str, Any]], task: str) -> str:
    return next(cell["measure"] for cell in cells if cell["task"] == task)


if __name__ == "__main__":
    sys.exit(main())
