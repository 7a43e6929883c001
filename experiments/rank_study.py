"""Whether the rank that ``diagnose`` recommends is a good one: seconds to a goal at each rank, and other rules.

Each task is trained at k = 1, 4, 16 and full rank, each at the best of some learning rates, which another seed chooses.
:func:`projunn_manifold.diagnose` looks at twenty steps of a fresh network.  A rule takes its shares and times, and
returns one of the trained ranks; its cost is the seconds to the goal at this rank over those at the best one.  The rule
of ``diagnose`` follows from theory and was tried on the tasks of the comparison; the others are held out.

Run ``python experiments/rank_study.py`` on an idle machine (about 20 minutes).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from common import descents
from common.matrices import Procrustes, RandomRotation, RandomUnitary
from common.networks import Choices, Method, Optimizers, Reader, on_manifold
from common.report import add_record_options, environment, machine_of, markdown, recorded, tell
from common.tasks import Adding, Copying, Pixels
from common.training import NonFiniteError, train
from matplotlib.figure import Figure
from tqdm import tqdm

from projunn_manifold import UnitaryLowRank, diagnose
from projunn_manifold.inspection.diagnosis import Need, speed_of_descent
from projunn_manifold.layers import param_groups
from projunn_manifold.optim import RiemannianAdam

RANKS = (1, 4, 16, None)
CHOOSING, SEEDS = 100, (0, 1, 2)


class Digits(Pixels):
    """Digits with a goal."""

    goal: ClassVar[float] = 0.2


# -- what is trained ----------------------------------------------------------------------------------


def _adam(network: Reader, choices: Choices) -> Optimizers:
    return [RiemannianAdam(param_groups(network, choices.lr, unitary_lr=choices.unitary_lr))]


RECURRENT = Method("", on_manifold(lambda c: UnitaryLowRank(c.k or None, seed=c.seed)), _adam, "black", low_rank=True)
MATRIX = descents.METHODS["projUNN-D"]


@dataclass(frozen=True)
class Setting:
    """A task of n units, which takes a number of steps and a seed."""

    make: Callable[[int, int], Any]
    hidden: int
    is_recurrent: bool = True
    is_held_out: bool = True
    steps: int = 2000

    @property
    def method(self) -> Any:
        """How it is trained."""
        return RECURRENT if self.is_recurrent else MATRIX

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates of the transition to choose from; of a matrix, in units of the inverse curvature."""
        return (0.003, 0.01, 0.03) if self.is_recurrent else (0.5, 1.0, 2.0)

    def choices(self, k: int | None, rate: float, seed: int) -> Choices:
        """Return the choices of a training."""
        return Choices(self.hidden, k=k or 0, seed=seed, nonlinearity="modrelu", lr=0.003, unitary_lr=rate)


def _digits(batch: int, steps: int, seed: int) -> Digits:
    return Digits(batch, math.ceil(steps * batch / 1437), seed)


SETTINGS = {
    "copying, n = 96": Setting(partial(Copying, 100, 32), 96, is_held_out=False),
    "permuted digits, n = 96": Setting(partial(_digits, 128), 96, is_held_out=False),
    "random unitary, n = 256": Setting(partial(RandomUnitary, 256, 16), 256, False, False, 6000),
    "Procrustes, n = 256": Setting(partial(Procrustes, 256), 256, False, False, 6000),
    "adding, n = 96": Setting(partial(Adding, 30, 32), 96),
    "copying, n = 512": Setting(partial(Copying, 30, 4), 512),
    "permuted digits, n = 384": Setting(partial(_digits, 16), 384),
    "rotation, n = 512, batch 4": Setting(partial(RandomRotation, 512, 4), 512, False, steps=6000),
    "rotation, n = 256, batch 64": Setting(partial(RandomRotation, 256, 64), 256, False, steps=6000),
}

# -- rules --------------------------------------------------------------------------------------------


#: Rules: of a rank, its share of the gradient's norm and the milliseconds of a whole step, what is to be largest.
RULES: dict[str, Callable[[int | None, float, float], float]] = {
    "share² per second (diagnose)": lambda _, share, ms: speed_of_descent(share, ms),
    "share per second": lambda _, share, ms: share / ms,
    **{f"always k = {rank}": partial(lambda fixed, k, *_: float(k == fixed), rank) for rank in RANKS},
}


def chosen_by(rule: str, need: Need, closure_ms: float) -> int | None:
    """Return the trained rank that a rule chooses for a weight."""
    return max(RANKS, key=lambda k: RULES[rule](k, need.shares[k], closure_ms + need.step_ms[k]))


# -- measurements -------------------------------------------------------------------------------------


def seconds_to_goal(setting: Setting, k: int | None, rate: float, seed: int, limit: float) -> float:
    """Train until the goal or a limit of seconds; infinity if it is not reached."""
    try:
        run = train(
            setting.make(setting.steps, seed),
            setting.method,
            setting.choices(k, rate, seed),
            stop_when_solved=True,
            seconds=limit,
            quiet=True,
        )
    except NonFiniteError:
        return math.inf
    return math.inf if run.solved_at is None else run.seconds[run.solved_at - 1]


def diagnosed(setting: Setting) -> tuple[Need, float]:
    """Return what ``diagnose`` says of a fresh network, and the milliseconds of a closure."""
    task = setting.make(setting.steps, CHOOSING)
    network, (optimizer,) = setting.method.build(task, setting.choices(1, setting.rates[1], CHOOSING))
    batches = iter(task.batches())

    def closure() -> None:
        inputs, targets = next(batches)
        task.loss(network(inputs), targets).backward()

    report = diagnose(network, closure, optimizer, verbose=False)
    (need,) = report
    return need, report.closure_ms


def measure(limit: float) -> dict[str, Any]:
    """Train and diagnose all."""
    torch.set_num_threads(1)
    rows = []
    for name, setting in tqdm(SETTINGS.items(), "tasks", disable=None):
        seconds: dict[str, list[float]] = {}
        rates: dict[str, float] = {}
        for k in RANKS:
            tried = {rate: seconds_to_goal(setting, k, rate, CHOOSING, limit) for rate in setting.rates}
            rates[str(k)] = min(tried, key=lambda rate: tried[rate])
            seconds[str(k)] = [seconds_to_goal(setting, k, rates[str(k)], seed, limit) for seed in SEEDS]
        need, closure_ms = diagnosed(setting)
        rows.append(
            {
                "task": name,
                "held_out": setting.is_held_out,
                "seconds": {k: [None if math.isinf(s) else round(s, 3) for s in of] for k, of in seconds.items()},
                "rates": rates,
                "shares": {str(k): round(need.shares[k], 4) for k in RANKS},
                "step_ms": {str(k): round(need.step_ms[k], 4) for k in RANKS},
                "closure_ms": round(closure_ms, 4),
                "chosen": {rule: str(chosen_by(rule, need, closure_ms)) for rule in RULES},
            }
        )
    return {"limit": limit, "rows": rows, **environment()}


# -- the report ---------------------------------------------------------------------------------------


def median(seconds: list[float | None]) -> float:
    """Return the median time; a goal that was not reached counts as infinity."""
    return statistics.median(math.inf if s is None else s for s in seconds)


def cost(row: dict[str, Any], k: str) -> float:
    """Return the seconds to the goal at a rank over those at the best one."""
    return median(row["seconds"][k]) / min(map(median, row["seconds"].values()))


def table(rows: list[dict[str, Any]]) -> str:
    """Return a row for every task."""
    lines = [["task", "", *(f"k = {k}" for k in RANKS), "recommended", "cost"]]
    rule = next(iter(RULES))
    for row in rows:
        times = [median(row["seconds"][str(k)]) for k in RANKS]
        told = ["not reached" if math.isinf(t) else f"{t:.2g} s" for t in times]
        chosen = row["chosen"][rule]
        kind = "held out" if row["held_out"] else "comparison"
        lines.append([row["task"], kind, *told, f"k = {chosen}", f"{cost(row, chosen):.2f}"])
    return markdown(lines)


def rules_table(rows: list[dict[str, Any]]) -> str:
    """Return a row for every rule: the mean and the largest cost, on the tasks that are held out and on the others."""
    lines = [["rule", "mean cost", "largest", "mean, held out", "largest, held out"]]
    for rule in RULES:
        cells = []
        for held_out in (False, True):
            costs = [cost(row, row["chosen"][rule]) for row in rows if row["held_out"] is held_out]
            mean = math.exp(statistics.fmean(map(math.log, costs))) if costs else math.nan
            cells += [f"{each:.2f}" if math.isfinite(each) else "no goal" for each in (mean, max(costs, default=0.0))]
        lines.append([rule, *cells])
    return markdown(lines)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draw for every task the cost of each rank, and a ring around the recommended one."""
    figure = Figure(figsize=(8, 0.45 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    rule = next(iter(RULES))
    for k, marker in zip(map(str, RANKS), "osD^", strict=True):
        costs = [cost(row, k) for row in rows]
        axes.plot(costs, range(len(rows)), marker, color="tab:blue", alpha=0.7, label=f"k = {k}", linestyle="none")
    chosen = [cost(row, row["chosen"][rule]) for row in rows]
    axes.plot(chosen, range(len(rows)), "o", color="tab:red", markersize=14, fillstyle="none", label="recommended")
    axes.set_yticks(range(len(rows)), [row["task"] + ", held out" * row["held_out"] for row in rows], fontsize=8)
    axes.set(xscale="log", xlabel="seconds to the goal, over those at the best k", ylim=(len(rows) - 0.5, -0.5))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Measure, report, and return the exit status."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--seconds", type=float, default=20.0, help="of a training, at most (default: %(default)s)")
    add_record_options(command, "results/rank_study")
    options = command.parse_args(arguments)
    record = recorded(options, "rank_study", partial(measure, options.seconds))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(options.out / "rank_study.png", record["rows"])
    machine = f"Seconds: medians of three seeds.  Measured on {machine_of(record)}."
    tell(options, "rank study", f"\n{table(record['rows'])}\n\n{rules_table(record['rows'])}\n\n{machine}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
