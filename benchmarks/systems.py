"""Every system of the field on the same four tasks: at equal steps and at equal seconds.

Copying memory and permuted digits with a recurrent network, a random unitary matrix (complex, gradients of rank 16) and
orthogonal Procrustes (real, gradients of full rank).  Run ``make compare`` or ``python benchmarks/systems.py`` (under
20 minutes): 20 seconds for a cell, two cells at a time; ``--full`` without a limit of time.  Every system's rate is the
best of four on the recurrent tasks, each tried for a fifth of that time from another seed, and of five on the matrices,
tried at n = 128, as these rates are in units of the curvature.  It leaves ``compare.json`` and ``compare.png``;
``--record JSON --into PAGE`` writes the tables of a recorded run into a page.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from common import descents, networks
from common.matrices import Procrustes, RandomUnitary
from common.networks import Choices
from common.report import add_record_options, environment, machine_of, markdown, recorded, tell, thinned
from common.tasks import Copying, Pixels
from common.training import NonFiniteError, Run, train
from suite.counting import Allocations

FOREVER = 100_000


@dataclass(frozen=True)
class Setting:
    """A task, and what is asked of it."""

    make: Callable[[int, int, int], Any]  # of n, steps and seed
    hidden: int  # n
    recurrent: bool
    steps: int  # where systems are compared at equal steps
    full: int  # steps at most, without a limit of time


SETTINGS: dict[str, Setting] = {
    "copying": Setting(lambda n, steps, seed: Copying(200, 32, steps, seed), 96, True, 100, 3000),
    "permuted digits": Setting(lambda n, steps, seed: Pixels(128, math.ceil(steps / 12), seed), 96, True, 100, 3000),
    "random unitary": Setting(lambda n, steps, seed: RandomUnitary(n, 16, steps, seed), 256, False, 100, 3000),
    "Procrustes": Setting(lambda n, steps, seed: Procrustes(n, steps, seed), 1024, False, 30, 2000),
}
SMALL: dict[str, Setting] = {
    "copying": Setting(lambda n, steps, seed: Copying(10, 4, steps, seed), 12, True, 5, 12),
    "permuted digits": Setting(lambda n, steps, seed: Pixels(512, math.ceil(steps / 3), seed), 8, True, 2, 3),
    "random unitary": Setting(lambda n, steps, seed: RandomUnitary(n, 4, steps, seed), 16, False, 5, 12),
    "Procrustes": Setting(lambda n, steps, seed: Procrustes(n, steps, seed), 16, False, 5, 12),
}
TUNED_AT = 128  # n, where rates for matrices are tried
RATES = {  # tried: of the transition, or of everything where that is not apart; for matrices of the inverse curvature
    "ambient": (1e-4, 3e-4, 1e-3, 3e-3),
    "unit length": (0.003, 0.01, 0.03, 0.1),  # Adam of the whole matrix
    "matrix": (0.25, 0.5, 1.0, 2.0, 4.0),
}


@dataclass(frozen=True)
class System:
    """A way to a unitary weight: its name among the recurrent methods and among the descents, or why it has none."""

    name: str
    package: str
    recurrent: str | None
    matrix: str | None
    colour: str
    k: int = 0
    kind: str = "ambient"  # of rates on the recurrent tasks
    apart: bool = True  # whether the transition has a rate of its own
    why_not: str = ""

    def method(self, setting: Setting) -> Any:
        """Return how it is trained on a task."""
        name = self.recurrent if setting.recurrent else self.matrix
        return (networks.METHODS if setting.recurrent else descents.METHODS).get(name or "")

    def refusal(self, setting: Setting) -> str | None:
        """Return why it does not do a task, or None."""
        method = self.method(setting)
        if method is None:
            return self.why_not
        if not setting.recurrent and setting.make(1, 1, 0).dtype.is_complex and method.real_only:
            return "no complex matrices"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None


SYSTEMS = [
    *(
        System(f"projUNN-{v}, k = {k}", "", f"projUNN-{v}", f"projUNN-{v}", colour, k)
        for v, colour in (("D", "tab:blue"), ("T", "tab:orange"))
        for k in (1, 4, 16)
    ),
    *(
        System(
            f"Stiefel, {kind} (geoopt)", "geoopt", f"Stiefel-{kind}, RAdam", f"Stiefel-{kind}", colour, 0, "unit length"
        )
        for kind, colour in (("canonical", "tab:red"), ("euclidean", "tab:green"))
    ),
    System("POGO (pogo-torch)", "pogo", "POGO", "POGO", "gold", 0, "unit length"),
    System("expRNN (torch, matrix_exp)", "", "expRNN", "parametrised, matrix_exp", "tab:purple"),
    System("DTRIV (geotorch)", "geotorch", "DTRIV", "DTRIV", "teal"),
    System("scoRNN (torch, cayley)", "", "scoRNN", "parametrised, cayley", "tab:brown"),
    System(
        "EUNN (torch_eunn)",
        "torch_eunn",
        "EUNN",
        None,
        "tab:pink",
        apart=False,
        why_not="a cell of rotations, no matrix weight",
    ),
    System("unconstrained", "", "RNN, unitary start", "unconstrained", "tab:gray", apart=False),
    System("LSTM", "", "LSTM", None, "tab:olive", apart=False, why_not="no transition matrix"),
]


def cell(task_name: str, system_name: str, seconds: float | None, small: bool) -> dict[str, Any]:
    """Train one system on one task, at the best of its rates."""
    torch.set_num_threads(1)
    setting = (SMALL if small else SETTINGS)[task_name]
    (system,) = [s for s in SYSTEMS if s.name == system_name]
    found: dict[str, Any] = {"task": task_name, "system": system_name}
    refusal = system.refusal(setting)
    if refusal is not None:
        return {**found, "not_run": refusal}
    peak = _peak(setting, system)
    rates = RATES[system.kind if setting.recurrent else "matrix"]
    trials = {rate: _try(setting, system, rate, 20 if seconds is None else seconds) for rate in rates}
    rate = min(trials, key=lambda r: _rank(trials[r]))
    run = _train(setting, system, setting.hidden, rate, 0, seconds)
    if run is None:
        return {**found, "not_run": "diverged"}
    kept = thinned(len(run.losses))
    solved = run.solved_at
    return {
        **found,
        "colour": system.colour,
        "k": system.k,
        "rate": rate,
        "rates": list(rates),
        "steps": len(run.losses),
        "seconds": round(run.seconds[-1], 2),
        "at_equal_steps": float(run.running_mean[setting.steps - 1]) if len(run.losses) >= setting.steps else None,
        "final_loss": run.final_loss,
        "score": run.score,
        "measure": run.measure,
        "solved_at": solved,
        "solved_after": None if solved is None else round(run.seconds[solved - 1], 2),
        "unitarity_error": run.unitarity[-1],
        "peak_mib": round(peak / 2**20, 2),
        "curves": {
            "step": [i + 1 for i in kept],
            "seconds": [round(run.seconds[i], 3) for i in kept],
            "loss": [float(f"{run.running_mean[i]:.4g}") for i in kept],
        },
    }


def _choices(system: System, n: int, rate: float, seed: int) -> Choices:
    lr = 1e-3 if system.apart else rate
    return Choices(n, k=system.k, seed=seed, lr=lr, unitary_lr=rate, nonlinearity="modrelu", init="henaff")


def _try(setting: Setting, system: System, rate: float, seconds: float) -> Run | None:
    """Train for a while, from another seed, to see what a rate is good for."""
    n = setting.hidden if setting.recurrent else min(TUNED_AT, setting.hidden)
    return _train(setting, system, n, rate, 1, seconds / (5 if setting.recurrent else 10))


def _train(setting: Setting, system: System, n: int, rate: float, seed: int, seconds: float | None) -> Run | None:
    """Train; None if it diverges."""
    task = setting.make(n, setting.full if seconds is None else FOREVER, seed)
    choices = _choices(system, n, rate, seed)
    try:
        return train(task, system.method(setting), choices, stop_when_solved=True, seconds=seconds, quiet=True)
    except NonFiniteError:
        return None


def _rank(run: Run | None) -> tuple[int, float]:
    """Order trainings: those that reach the goal by their time, the others by their last losses."""
    if run is None or not math.isfinite(run.losses[-1]):
        return 2, 0.0
    return (0, run.seconds[-1]) if run.solved_at is not None else (1, fmean(run.losses[-3:]))


def _peak(setting: Setting, system: System) -> int:
    """Return the most bytes that a training step has in use beyond weights and state; it compiles what is to be."""
    task = setting.make(setting.hidden, 2, 0)
    network, optimizers = system.method(setting).build(task, _choices(system, setting.hidden, 1e-6, 0))
    inputs, targets = next(iter(task.batches()))

    def step() -> None:
        network.zero_grad()
        task.loss(network(inputs), targets).backward()
        for optimizer in optimizers:
            optimizer.step()

    step()
    with Allocations() as allocations:
        step()
    return allocations.peak


# -- reports ----------------------------------------------------------------------------------------------

HEADER = ["system", "learning rate", "steps", "time (s)", "loss at equal steps", "loss", "score", "goal at step"]
HEADER += ["goal after (s)", "error", "MiB"]


def table(record: dict[str, Any], task: str) -> str:
    """Return a row for each system."""
    rows = [HEADER]
    for c in (c for c in record["cells"] if c["task"] == task):
        if "not_run" in c:
            rows.append([c["system"], c["not_run"], *[""] * (len(HEADER) - 2)])
            continue
        reached = c["solved_at"] is not None
        error = c["unitarity_error"]
        rows.append(
            [
                c["system"],
                f"{c['rate']:.2g}",
                str(c["steps"]),
                f"{c['seconds']:.3g}",
                "not reached" if c["at_equal_steps"] is None else f"{c['at_equal_steps']:.3g}",
                f"{c['final_loss']:.3g}",
                f"{c['score']:.3g}",
                str(c["solved_at"]) if reached else "not reached",
                f"{c['solved_after']:.3g}" if reached else "",
                "–" if error is None else f"{error:.1e}",
                f"{c['peak_mib']:.3g}",
            ]
        )
    return markdown(rows)


def text(record: dict[str, Any]) -> str:
    """Return all tables, and what is in them."""
    parts = []
    for name, about in record["tasks"].items():
        about = about.replace(", where a training ends", "")  # of older records
        parts.append(f"### {name[0].upper()}{name[1:]}\n\n{table(record, name)}\n\n{about}")
    limit = "no time limit" if record["seconds"] is None else f"{record['seconds']:g} seconds"
    parts.append(
        f"Each training has one thread and {limit}; {record['jobs']} run at a time.  A training ends when it reaches "
        "the goal.  Learning rate: the best of those tried.  Loss: mean of the last 10 steps.  Error: "
        "‖WᵀW - I‖_F / √n.  MiB: peak memory of a training step beyond weights and optimiser state.  Measured on "
        f"{machine_of(record)}."
    )
    return "\n\n".join(parts)


def about(setting: Setting) -> str:
    """Return a task in words."""
    task = setting.make(setting.hidden, 1, 0)
    goal = "no goal" if task.goal is None else f"goal: loss {task.goal:.3g}"
    return f"n = {setting.hidden}; equal steps: {setting.steps}; score: {task.measure}; {goal}."


def draw(path: Path, record: dict[str, Any]) -> None:
    """Draw losses against steps and seconds, a row for each task."""
    tasks = list(record["tasks"])
    figure = Figure(figsize=(14, 3.6 * len(tasks)), layout="constrained")
    dashes = {0: "-", 1: "-", 4: "--", 16: ":"}
    for row, task in zip(figure.subplots(len(tasks), 2, squeeze=False, sharey="row"), tasks, strict=True):
        for c in (c for c in record["cells"] if c["task"] == task and "not_run" not in c):
            for panel, axis in zip(row, ("step", "seconds"), strict=True):
                label = c["system"] if task == tasks[0] and axis == "step" else None
                style = {"color": c["colour"], "linestyle": dashes[c["k"]], "linewidth": 1.2}
                panel.plot(c["curves"][axis], c["curves"]["loss"], label=label, **style)
        row[0].set(xlabel="step", ylabel=f"{task}: loss", yscale="log", xscale="log")
        row[1].set(xlabel="seconds of training", yscale="log")
        for panel in row:
            panel.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all cells, several at a time."""
    settings = SMALL if options.small else SETTINGS
    seconds = None if options.full else options.seconds
    jobs = [(task, system.name) for task in settings for system in SYSTEMS if system.name in options.systems]
    cells = {}
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(cell, *job, seconds, options.small): job for job in jobs}
        for future in tqdm(as_completed(futures), "compare", len(futures), unit="cell", disable=None):
            cells[futures[future]] = future.result()
    torch.set_num_threads(1)
    return {
        "seconds": seconds,
        "jobs": options.jobs,
        "tasks": {name: about(setting) for name, setting in settings.items()},
        "cells": [cells[job] for job in jobs],
        **environment(),
    }


def main(arguments: list[str] | None = None) -> int:
    """Compare, report, and return the exit status."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--seconds", type=float, default=20, help="for a cell (default: %(default)s)")
    command.add_argument("--full", action="store_true", help="without a limit of time: hours")
    command.add_argument("--small", action="store_true", help="tiny sizes, to see that all works")
    names = [system.name for system in SYSTEMS]
    command.add_argument("--systems", nargs="+", choices=names, default=names, metavar="SYSTEM", help="these alone")
    command.add_argument("--jobs", type=int, default=2, help="cells at a time (default: %(default)s)")
    add_record_options(command, "results/compare")
    options = command.parse_args(arguments)
    record = recorded(options, "compare", lambda: measure(options))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(options.out / "compare.png", record)
    tell(options, "comparison", f"\n{text(record)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
