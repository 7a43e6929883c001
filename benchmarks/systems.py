"""projUNN and nine other systems that learn an orthogonal matrix, on six tasks: which reaches the goal first.

The others are geoopt's two Stiefel manifolds, POGO, RSDM, StiefelAdam (StiefelSGD on single matrices), expRNN, DTRIV,
scoRNN and EUNN.  References are a network without the constraint, a frozen one and an LSTM.  Each system trains at the
best of its learning rates.

The tasks: copying memory and permuted digits with a recurrent network, a random unitary matrix (complex, gradients of
rank 16) and orthogonal Procrustes (real, gradients of full rank), 20 seconds for a training; and two tasks where a
matrix product takes long, a random rotation of n = 2048 and a recurrent network of n = 1024, 120 seconds.  Run ``make
compare`` or ``python benchmarks/systems.py`` (under 60 minutes): two trainings at a time, a thread each.  It leaves
``compare.json`` and ``compare.png``; ``--record JSON --into PAGE`` writes the tables of a recorded run into a page.

The learning rates are those of ``docs/results/compare_rates.json``, which ``--search`` finds: the best of four to six
on the recurrent tasks and of five on the matrices, there in units of the inverse curvature.  Each is tried for a few
seconds with another seed, single matrices at a smaller n.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from common import descents, networks
from common.matrices import Procrustes, RandomRotation, RandomUnitary
from common.networks import Choices
from common.report import add_record_options, environment, machine_of, markdown, recorded, tell, thinned
from common.tasks import Copying, Pixels
from common.training import NonFiniteError, Run, train
from suite.counting import Allocations

FOREVER = 100_000
RATES_FILE = Path(__file__).parents[1] / "docs" / "results" / "compare_rates.json"


class Digits(Pixels):
    """Digits with a goal, so that systems can be compared by the time to it."""

    goal: ClassVar[float] = 0.1


@dataclass(frozen=True)
class Setting:
    """A task, and how it is trained."""

    about: str
    make: Callable[[int, int, int], Any]  # of n, steps and seed
    hidden: int  # n
    recurrent: bool
    seconds: float  # of a training
    trial: float  # seconds in which a rate is tried
    tuned_at: int  # n, where rates are tried


SETTINGS: dict[str, Setting] = {
    "copying": Setting(
        "A recurrent network reads ten symbols and repeats them after 200 steps.",
        lambda n, steps, seed: Copying(200, 32, steps, seed),
        hidden=96,
        recurrent=True,
        seconds=20,
        trial=4,
        tuned_at=96,
    ),
    "permuted digits": Setting(
        "A recurrent network reads images of 8 × 8 pixels, one pixel a step, in a fixed random order.",
        lambda n, steps, seed: Digits(128, math.ceil(steps / 12), seed),
        hidden=96,
        recurrent=True,
        seconds=20,
        trial=4,
        tuned_at=96,
    ),
    "random unitary": Setting(
        "A complex unitary matrix is learnt from 16 samples a step, so that its gradient has rank 16.",
        lambda n, steps, seed: RandomUnitary(n, 16, steps, seed),
        hidden=256,
        recurrent=False,
        seconds=20,
        trial=2,
        tuned_at=128,
    ),
    "Procrustes": Setting(
        "A rotation is learnt from all samples at once, so that its gradient has full rank.",
        lambda n, steps, seed: Procrustes(n, steps, seed),
        hidden=1024,
        recurrent=False,
        seconds=20,
        trial=2,
        tuned_at=128,
    ),
    "large rotation": Setting(
        "A rotation is learnt from 16 samples a step, the first experiment of the paper.",
        lambda n, steps, seed: RandomRotation(n, 16, steps, seed),
        hidden=2048,
        recurrent=False,
        seconds=120,
        trial=5,
        tuned_at=512,
    ),
    "large network": Setting(
        "Permuted digits again, 32 images a step, with a transition ten times as wide.",
        lambda n, steps, seed: Digits(32, math.ceil(steps / 45), seed),
        hidden=1024,
        recurrent=True,
        seconds=120,
        trial=8,
        tuned_at=1024,
    ),
}
SMALL = 16  # n, to see that all works
RATES = {  # tried: of the transition, or of everything where that is not apart; for matrices of the inverse curvature
    "ambient": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    "unit length": (0.003, 0.01, 0.03, 0.1),  # Adam of the whole matrix
    "gradient": (1e-5, 1e-4, 1e-3, 1e-2, 0.1),  # plain gradients
    "matrix": (0.25, 0.5, 1.0, 2.0, 4.0),
}
GREY, LIGHT_GREY = "0.6", "0.8"


@dataclass(frozen=True)
class System:
    """A way to a unitary weight: its name among the recurrent methods and among the descents, or why it has none."""

    name: str
    package: str
    recurrent: str | None
    matrix: str | None
    group: str = "others"  # or "ours", or "references": what learns no orthogonal matrix
    k: int = 0
    colour: str = GREY
    kind: str = "ambient"  # of rates on the recurrent tasks
    apart: bool = True  # whether the transition has a rate of its own
    largest: float = math.inf  # n
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
        if setting.hidden > self.largest:
            return f"too slow above n = {self.largest}"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        return None

    def rates(self, setting: Setting) -> tuple[float, ...]:
        """Return the learning rates to try."""
        return RATES[self.kind if setting.recurrent else "matrix"]

    def choices(self, n: int, rate: float, seed: int) -> Choices:
        """Return the choices of a training at a learning rate."""
        lr = 1e-3 if self.apart else rate
        return Choices(n, k=self.k, seed=seed, lr=lr, unitary_lr=rate, nonlinearity="modrelu", init="henaff")


SYSTEMS = {
    system.name: system
    for system in (
        *(
            System(f"projUNN-{v}, k = {k or None}", "", f"projUNN-{v}", f"projUNN-{v}", "ours", k, colour)
            for v, colour in (("D", "tab:blue"), ("T", "tab:orange"))
            for k in (1, 4, 16, 0)
        ),
        *(
            System(f"Stiefel, {form} (geoopt)", "", f"Stiefel-{form}, RAdam", f"Stiefel-{form}", kind="unit length")
            for form in ("canonical", "euclidean")
        ),
        System("POGO (pogo-torch)", "pogo", "POGO", "POGO", kind="unit length"),
        System("RSDM (Han et al.)", "", "RSDM", "RSDM", kind="gradient"),
        System("StiefelAdam, -SGD (Kong et al.)", "", "StiefelAdam", "StiefelSGD"),
        System("expRNN (torch, matrix_exp)", "", "expRNN", "parametrised, matrix_exp", largest=1024),
        System("DTRIV (geotorch)", "geotorch", "DTRIV", "DTRIV", largest=1024),
        System("scoRNN (torch, cayley)", "", "scoRNN", "parametrised, cayley"),
        System(
            "EUNN (torch_eunn)",
            "torch_eunn",
            "EUNN",
            None,
            apart=False,
            why_not="a cell of rotations, no matrix weight",
        ),
        System("unconstrained", "", "RNN, unitary start", "unconstrained", "references", 0, LIGHT_GREY, apart=False),
        System("frozen", "", "frozen", None, "references", 0, LIGHT_GREY, apart=False, why_not="nothing else to train"),
        System("LSTM", "", "LSTM", None, "references", 0, LIGHT_GREY, apart=False, why_not="no transition matrix"),
    )
}


# -- trainings --------------------------------------------------------------------------------------------


def _setting(task: str, small: bool) -> Setting:
    setting = SETTINGS[task]
    return replace(setting, hidden=SMALL, tuned_at=SMALL) if small else setting


def _train(setting: Setting, system: System, n: int, rate: float, seed: int, seconds: float) -> Run | None:
    """Train; None if it diverges."""
    torch.set_num_threads(1)
    task, choices = setting.make(n, FOREVER, seed), system.choices(n, rate, seed)
    try:
        return train(task, system.method(setting), choices, stop_when_solved=True, seconds=seconds, quiet=True)
    except NonFiniteError:
        return None


def tried(task: str, name: str, small: bool, seconds: float | None) -> dict[str, Any] | None:
    """Try the learning rates of one system on one task; None if it cannot do the task."""
    setting, system = _setting(task, small), SYSTEMS[name]
    if system.refusal(setting) is not None:
        return None
    found: dict[float, dict[str, Any]] = {}
    for rate in system.rates(setting):
        run = _train(setting, system, setting.tuned_at, rate, 1, seconds or setting.trial)
        end = math.nan if run is None else fmean(run.losses[-3:])
        solved = run is not None and run.solved_at is not None
        found[rate] = {
            "final_loss": end if math.isfinite(end) else None,
            "solved_after": run.seconds[-1] if solved else None,
        }
    return {"rate": min(found, key=lambda rate: _place(found[rate])), "n": setting.tuned_at, "tried": found}


def _place(result: dict[str, Any]) -> tuple[int, float]:
    """Order results: those that reach the goal by their time, the others by their last losses, None being the last."""
    if result["solved_after"] is not None:
        return 0, result["solved_after"]
    return (2, 0.0) if result["final_loss"] is None else (1, result["final_loss"])


def cell(task: str, name: str, small: bool, seconds: float | None, rate: float | None) -> dict[str, Any]:
    """Train one system on one task, and measure."""
    setting, system = _setting(task, small), SYSTEMS[name]
    found: dict[str, Any] = {"task": task, "system": name}
    refusal = system.refusal(setting)
    if refusal is not None or rate is None:
        return {**found, "not_run": refusal or "no rate was searched"}
    peak = _peak(setting, system)
    run = _train(setting, system, setting.hidden, rate, 0, seconds or setting.seconds)
    if run is None:
        return {**found, "not_run": "diverged"}
    kept = thinned(len(run.losses))
    return {
        **found,
        "rate": rate,
        "steps": len(run.losses),
        "seconds": round(run.seconds[-1], 2),
        "final_loss": run.final_loss,
        "score": run.score,
        "solved_after": None if run.solved_at is None else round(run.seconds[run.solved_at - 1], 2),
        "unitarity_error": run.unitarity[-1],
        "peak_mib": round(peak / 2**20, 2),
        "curves": {
            "step": [i + 1 for i in kept],
            "seconds": [round(run.seconds[i], 3) for i in kept],
            "loss": [float(f"{run.running_mean[i]:.4g}") for i in kept],
        },
    }


def _peak(setting: Setting, system: System) -> int:
    """Return the most bytes that a training step has in use beyond weights and state; it compiles what is to be."""
    torch.set_num_threads(1)
    task = setting.make(setting.hidden, 2, 0)
    network, optimizers = system.method(setting).build(task, system.choices(setting.hidden, 1e-6, 0))
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

HEADER = ["system", "learning rate", "steps", "goal after (s)", "loss", "score"]


def _cells(record: dict[str, Any], task: str) -> list[dict[str, Any]]:
    return [c for c in record["cells"] if c["task"] == task]


def table(cells: list[dict[str, Any]]) -> str:
    """Return a row for each system."""
    rows = [HEADER]
    for c in cells:
        if "not_run" in c:
            rows.append([c["system"], c["not_run"], *[""] * (len(HEADER) - 2)])
            continue
        after = "not reached" if c["solved_after"] is None else f"{c['solved_after']:.3g}"
        rows.append(
            [c["system"], f"{c['rate']:.2g}", str(c["steps"]), after, f"{c['final_loss']:.3g}", f"{c['score']:.3g}"]
        )
    return markdown(rows)


def _groups(cells: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return what ran, by group, the best first."""
    order = sorted((c for c in cells if "not_run" not in c), key=_place)
    return {g: [c for c in order if SYSTEMS[c["system"]].group == g] for g in ("ours", "others", "references")}


def verdict(cells: list[dict[str, Any]]) -> str:
    """Say whether one of ours is first among those that learn an orthogonal matrix, or by how much it is behind."""
    ours, others, references = _groups(cells).values()
    if not ours or not others:
        return "There is nothing to compare."
    first, second = sorted((ours[0], others[0]), key=_place)
    heading, rest = ("One of ours is first", "the others") if first is ours[0] else ("None of ours is first", "ours")
    before = [_result(c) for c in references if _place(c) < _place(first)]
    besides = f"  Before it, without learning an orthogonal matrix: {', '.join(before)}." if before else ""
    return (
        f"**{heading}**: {_result(first)}.  The best of {rest}, {_result(second)}, {_behind(first, second)}.{besides}"
    )


def _result(c: dict[str, Any]) -> str:
    result = f"loss {c['final_loss']:.3g}" if c["solved_after"] is None else f"{c['solved_after']:.3g} s"
    return f"{c['system']} ({result})"


def _behind(first: dict[str, Any], second: dict[str, Any]) -> str:
    if first["solved_after"] is None:
        return f"ends with a loss {100 * (second['final_loss'] / first['final_loss'] - 1):.0f} % larger"
    if second["solved_after"] is None:
        return "does not reach the goal"
    return f"takes {100 * (second['solved_after'] / first['solved_after'] - 1):.0f} % longer"


def text(record: dict[str, Any]) -> str:
    """Return for each task what it is, who is first, and a table; and what is in the tables."""
    parts = []
    for name, words in record["tasks"].items():
        cells = _cells(record, name)
        parts.append(f"### {name[0].upper()}{name[1:]}\n\n{words}\n\n{verdict(cells)}\n\n{table(cells)}")
    parts.append(
        f"Each training has one thread; {record['jobs']} run at a time.  A training ends when it reaches the goal.  "
        f"Loss: mean of the last 10 steps.  Measured on {machine_of(record)}."
    )
    return "\n\n".join(parts)


def about(setting: Setting, seconds: float | None) -> str:
    """Return a task in words."""
    task = setting.make(setting.hidden, 1, 0)
    return (
        f"{setting.about}  n = {setting.hidden}; goal: loss {task.goal:.3g}, within {seconds or setting.seconds:g} s; "
        f"score: {task.measure}."
    )


def draw(path: Path, record: dict[str, Any]) -> None:
    """Draw a panel for each task, a bar for each system that reaches the goal; of ours the better of D and T."""
    tasks = list(record["tasks"])
    figure = Figure(figsize=(9, 2.9 * math.ceil(len(tasks) / 2)), layout="constrained")
    panels = figure.subplots(math.ceil(len(tasks) / 2), 2, squeeze=False).flatten().tolist()
    for panel, task in zip(panels, tasks, strict=False):
        _bars(panel, _cells(record, task))
        panel.set_title(f"{task}: seconds to the goal", fontsize=10)
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()
    figure.savefig(path, dpi=150)


def _bars(panel: Axes, cells: list[dict[str, Any]]) -> None:
    shown, ranks = [], set()
    for c in (c for group in _groups(cells).values() for c in group):
        system = SYSTEMS[c["system"]]
        if c["solved_after"] is None or (system.group == "ours" and system.k in ranks):
            continue
        ranks.add(system.k if system.group == "ours" else None)
        shown.append(c)
    shown.sort(key=_place)
    names = [c["system"].partition(" (")[0] for c in shown]
    bars = panel.barh(names, [c["solved_after"] for c in shown], color=[SYSTEMS[c["system"]].colour for c in shown])
    panel.bar_label(bars, [f"{c['solved_after']:.3g}" for c in shown], padding=3, fontsize=8)
    panel.tick_params(labelsize=8)
    panel.margins(x=0.12)
    panel.spines[["top", "right"]].set_visible(False)
    panel.invert_yaxis()


# -- the command ------------------------------------------------------------------------------------------


def in_processes(function: Callable[..., Any], jobs: list[tuple[Any, ...]], count: int) -> list[Any]:
    """Call a function with each tuple of arguments, so many at a time."""
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        for _ in tqdm(as_completed(futures), "compare", len(futures), unit="cell", disable=None):
            pass
        return [future.result() for future in futures]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train all systems on all tasks, each at its recorded learning rate."""
    rates = json.loads(options.rates.read_text(encoding="utf-8"))["rates"]
    jobs = [
        (task, name, options.small, options.seconds, rates.get(task, {}).get(name, {}).get("rate"))
        for task in options.tasks
        for name in options.systems
    ]
    cells = in_processes(cell, jobs, options.jobs)
    torch.set_num_threads(1)
    tasks = {name: about(_setting(name, options.small), options.seconds) for name in options.tasks}
    return {"jobs": options.jobs, "tasks": tasks, "cells": cells, **environment()}


def search(options: argparse.Namespace) -> None:
    """Try the learning rates of all systems on all tasks; write the best into the file, and keep its other entries."""
    jobs = [(task, name, options.small, options.seconds) for task in options.tasks for name in options.systems]
    found = in_processes(tried, jobs, options.jobs)
    torch.set_num_threads(1)
    rates = json.loads(options.rates.read_text(encoding="utf-8"))["rates"] if options.rates.exists() else {}
    for (task, name, *_), best in zip(jobs, found, strict=True):
        if best is not None:
            rates.setdefault(task, {})[name] = best
    options.rates.write_text(json.dumps({"rates": rates, **environment()}, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Compare, report, and return the exit status."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--seconds", type=float, help="for a training, instead of the task's")
    command.add_argument("--small", action="store_true", help="tiny sizes, to see that all works")
    command.add_argument("--tasks", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="TASK", help="these")
    command.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="SYSTEM", help="these alone"
    )
    command.add_argument("--jobs", type=int, default=2, help="trainings at a time (default: %(default)s)")
    command.add_argument("--rates", type=Path, default=RATES_FILE, metavar="JSON", help="file of the learning rates")
    command.add_argument("--search", action="store_true", help="search learning rates, into that file")
    add_record_options(command, "results/compare")
    options = command.parse_args(arguments)
    if options.search:
        search(options)
        return 0
    record = recorded(options, "compare", lambda: measure(options))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(options.out / "compare.png", record)
    tell(options, "comparison", f"\n{text(record)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
