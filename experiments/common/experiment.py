"""What the experiments of the paper share: a command line, runs side by side, a table, curves, JSON.

A finished training leaves ``<task>-<method>-k<k>-s<seed>.json`` in the output folder and is not run again; an
interrupted one goes on from its checkpoint, and one that ran out of time has both.  So several processes can share a
folder, each with methods of its own, and a last call without work to do draws them all.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from .networks import METHODS, Choices, unconstrained
from .report import environment, markdown, thinned
from .tasks import Task
from .training import LAST, Look, NonFiniteError, Run, settings_of, train

HEADER = [
    "method",
    "k",
    "parameters",
    "learning rates",
    "runs",
    "loss",
    "score",
    "solved at step",
    "solved after (s)",
    "ms per step",
    "unitarity error",
]
CAPTION = (
    "{what}.  Parameters: of the whole network; a complex parameter counts once.  Learning rates: of RMSprop, and of "
    f"the transition.  Loss: mean of the last {LAST} steps.  Score: {{score}}.  Solved: {{solved}}.  ms per step: the "
    "whole training step.  Unitarity error: ‖WᵀW - I‖_F / √n."
)
HELD_OUT = ("symbols recalled", "mean squared error")  # other scores say what they are of


def parser(description: str, methods: dict[str, Any], chosen: list[str], **defaults: Any) -> argparse.ArgumentParser:
    """Return a command line with what all experiments take; ``defaults`` are those of :class:`Choices` and more."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--methods", nargs="+", choices=methods, metavar="METHOD", help=f"from {', '.join(methods)}")
    found.add_argument("--k", nargs="+", type=int, help="ranks, for methods that have one (default: %(default)s)")
    found.add_argument("--seeds", nargs="+", type=int, help="of weights, batches and sketches (default: %(default)s)")
    for name, kind, what in (
        ("steps", int, "optimiser steps"),
        ("batch", int, "sequences in a batch"),
        ("hidden", int, "hidden units n"),
        ("nonlinearity", str, "relu, modrelu or tanh"),
        ("lr", float, "of RMSprop, for methods without a published rate"),
        ("unitary_lr", float, "of the transition, likewise"),
    ):
        if name in defaults:
            found.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{what} (default: %(default)s)")
    if "steps" in defaults:
        found.add_argument("--stop", action="store_true", help="end a training once it has solved the task")
    found.add_argument("--minutes", type=float, help="after which trainings stop, until the next such call")
    found.add_argument("--device", help="such as cpu or cuda (default: %(default)s)")
    found.add_argument("--threads", type=int, help="for PyTorch (default: %(default)s)")
    found.add_argument("--save-every", type=int, help="steps between checkpoints (default: %(default)s)")
    found.add_argument("--out", type=Path, help="folder of the results (default: %(default)s)")
    found.set_defaults(**{"seeds": [0], "k": [1], "device": "cpu", "threads": 1, "save_every": 50, **defaults})
    found.set_defaults(methods=chosen, stop=False, decay=False)
    return found


def run(
    options: argparse.Namespace,
    task_of: Callable[[int], Task],
    methods: dict[str, Any] = METHODS,
    *,
    look_of: Callable[[Task], Look] | None = None,
    rates: Mapping[tuple[str, int], tuple[float, float]] | None = None,
    **choices: Any,
) -> list[dict[str, Any]]:
    """Train every method at every rank from every seed, but what is done already, and report on all in the folder.

    ``rates`` are the learning rates of methods by name and rank; others have those of the command line, or their own.
    """
    torch.set_num_threads(options.threads)
    ends = math.inf if options.minutes is None else monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.methods:
            for k in options.k if methods[name].low_rank else [0]:
                task = task_of(seed)
                own = _choices(options, methods[name], task, k, seed)
                if rates and (name, k) in rates:
                    own["lr"], own["unitary_lr"] = rates[name, k]
                _run_one(options, task, methods[name], Choices(**own, **choices), look_of and look_of(task), ends)
    found = records(options.out, task_of(0).name, list(methods))
    report(options.out, found)
    return found


def _choices(options: argparse.Namespace, method: Any, task: Task, k: int, seed: int) -> dict[str, Any]:
    """Return the method's own rates where it has some, else those of the command line."""
    lr, unitary = method.rates.get(task.name, (options.lr, options.unitary_lr))
    if getattr(method, "optimizers", None) is unconstrained:
        unitary = lr
    if method.name == "frozen":
        unitary = 0.0
    if method.riemannian_lr is not None:
        lr, unitary = options.lr, method.riemannian_lr
    own = {"hidden": options.hidden, "k": k, "seed": seed, "lr": lr, "unitary_lr": unitary}
    return {**own, "nonlinearity": options.nonlinearity} if hasattr(options, "nonlinearity") else own


def _run_one(
    options: argparse.Namespace, task: Task, method: Any, choices: Choices, look: Look | None, ends: float
) -> None:
    stem = f"{task.name}-{method.name}-k{choices.k}-s{choices.seed}".replace(" ", "_").replace(",", "")
    done, checkpoint = options.out / f"{stem}.json", options.out / f"{stem}.pt"
    if done.exists():
        settings = {"decay over": None, **settings_of(task, choices, options.device, decay=options.decay)}
        _refuse_another(done, {**settings, "steps": task.steps})
        if not checkpoint.exists():
            return
    left = ends - monotonic()
    if left <= 0:
        return
    try:
        finished = train(
            task,
            method,
            choices,
            device=options.device,
            checkpoint=checkpoint,
            every=options.save_every,
            stop_when_solved=options.stop,
            seconds=left,
            decay=options.decay,
            look=look,
        )
    except NonFiniteError as error:
        print(f"{stem}: {error}; no result", flush=True)
        return
    record = {**summary(finished), "steps": task.steps, **environment(options.device)}
    partial = done.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    partial.replace(done)  # a file that is there is whole
    if _ended(record):
        checkpoint.unlink(missing_ok=True)


def _ended(record: dict[str, Any]) -> bool:
    """Return whether a training reached its last step or its goal."""
    return record["steps_made"] == record["steps"] or record["solved_at"] is not None


def _refuse_another(done: Path, settings: dict[str, Any]) -> None:
    """Raise if a finished run had other settings than those asked for."""
    record = json.loads(done.read_text(encoding="utf-8"))
    old = {**record["settings"], "steps": record["steps"]}
    other = [name for name in settings if old.get(name) != settings[name]]
    if other == ["steps"] and record["solved_at"] is not None:
        return  # it ended before
    if other:
        told = ", ".join(f"{name} {old.get(name)}, not {settings[name]}" for name in other)
        raise SystemExit(f"{done} is of a run with other settings ({told}): give another --out")


def summary(finished: Run) -> dict[str, Any]:
    """Return a run as JSON can hold it, its curves thinned."""
    kept = [i for i, error in enumerate(finished.unitarity) if error is not None]
    kept = kept if len(kept) > 1 else thinned(len(finished.losses))
    whole = asdict(finished)
    whole.pop("optimiser_ms")
    curves = {"step": [i + 1 for i in kept]}
    values_of = {
        "loss": finished.running_mean[kept].tolist(),
        **{name: [whole[name][i] for i in kept] for name in ("seconds", "unitarity")},
    }
    for name, values in values_of.items():
        curves[name] = [None if value is None else float(f"{value:.4g}") for value in values]
    for name in ("losses", "seconds", "unitarity"):
        whole.pop(name)
    solved_at = finished.solved_at
    return {
        **whole,
        "steps_made": len(finished.losses),
        "final_loss": finished.final_loss,
        "solved_at": solved_at,
        "solved_after": None if solved_at is None else round(finished.seconds[solved_at - 1], 2),
        "total_seconds": round(finished.seconds[-1], 2),
        "unitarity_error": finished.unitarity[-1],
        "curves": curves,
    }


def records(folder: Path, task: str, order: list[str]) -> list[dict[str, Any]]:
    """Return all finished runs on a task in a folder, in the order of methods, k and seed."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob(f"{task.replace(' ', '_')}-*.json")]
    return sorted(found, key=lambda r: (order.index(r["method"]), r["settings"]["k"], r["settings"]["seed"]))


def groups(found: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Return the runs that differ in their seed alone."""
    by_key: dict[str, list[dict[str, Any]]] = {}
    for record in found:
        settings = {name: v for name, v in record["settings"].items() if name not in ("seed", "task seed")}
        by_key.setdefault(f"{record['method']} {settings} {record['steps']}", []).append(record)
    return list(by_key.values())


def table(found: list[dict[str, Any]]) -> str:
    """Return a row for each method and rank, means over seeds."""
    rows = [HEADER]
    for runs in groups(found):
        settings = runs[0]["settings"]
        rows.append(
            [
                runs[0]["method"],
                str(settings["k"] or ""),
                str(runs[0]["parameters"]),
                f"{settings['lr']:.2g}, {settings['unitary_lr']:.2g}",
                str(len(runs)),
                _mean([r["final_loss"] for r in runs]),
                _mean([r["score"] for r in runs]),
                _mean([r["solved_at"] for r in runs], ".0f"),
                _mean([r["solved_after"] for r in runs], ".0f"),
                _mean([1e3 * r["total_seconds"] / r["steps_made"] for r in runs], ".3g"),
                _mean([r["unitarity_error"] for r in runs], ".1e"),
            ]
        )
    return markdown(rows)


def caption(found: list[dict[str, Any]]) -> str:
    """Return what the table shows, in words."""
    first = found[0]
    own = {name: v for name, v in first["settings"].items() if name.startswith("task ") and v != "None"}
    sizes = {name.removeprefix("task "): v for name, v in own.items()}
    if "width" not in sizes:
        sizes |= {name: first["settings"][name] for name in ("hidden", "nonlinearity")}
    named = [name if v is True else f"{name} {v}" for name, v in sizes.items() if name != "seed" and v is not False]
    what = f"{first['task']}: {', '.join(named)}, at most {max(run['steps'] for run in found)} steps"
    if "decay over" in first["settings"]:
        what += ", all learning rates falling along a line to zero"
    score = first["measure"] + " on held-out data" * (first["measure"] in HELD_OUT)
    solved = "this task has no goal"
    if first["goal"] is not None:
        solved = f"first mean of {LAST} losses below {first['goal']:.4g}; with `--stop` the training ends there"
    unfinished = [run for run in found if not _ended(run)]
    told = [f"{run['method']} at step {run['steps_made']}" for run in unfinished]
    rest = f"  Not finished: {', '.join(told)}." if told else ""
    return CAPTION.format(what=what, score=score, solved=solved) + rest


def _mean(values: list[float | None], form: str = ".4g") -> str:
    """Return the mean, or a dash where a value is missing."""
    known = [value for value in values if value is not None]
    return format(sum(known) / len(known), form) if len(known) == len(values) else "–"


def report(folder: Path, found: list[dict[str, Any]]) -> None:
    """Print the table of all finished runs and draw their curves."""
    from .figures import curves

    if not found:
        return
    name = found[0]["task"].replace(" ", "_")
    curves(folder / f"{name}.png", found)
    print(f"\n{table(found)}\n\n{caption(found)}\n\nwritten to {folder}: {name}-*.json, {name}.png")
