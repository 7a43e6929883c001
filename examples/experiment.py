"""What the experiments of the paper share: a command line, runs side by side, a table, curves, JSON.

A finished training leaves ``<task>-<method>-k<k>-s<seed>.json`` in the output folder and is not run again; an
interrupted one goes on from its checkpoint.  So several processes can share a folder, each with methods of its own, and
a last call without work to do draws them all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from networks import METHODS, Choices, Method
from report import environment, markdown, thinned
from tasks import Task
from training import LAST, Run, train

HEADER = ["method", "k", "runs", "final loss", "score", "solved at step", "after, s", "ms per step", "unitarity error"]
CAPTION = (
    f"final loss: mean of the last {LAST} steps; score: {{measure}}, on data not trained on; solved: first mean of "
    f"{LAST} losses below {{goal}}; ms per step: the whole training step; unitarity error: ‖WᵀW - I‖_F / √n at the end"
)


def parser(description: str, methods: dict[str, Any], chosen: list[str], **defaults: Any) -> argparse.ArgumentParser:
    """Return a command line with what all experiments take; ``defaults`` are those of :class:`Choices` and more."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--methods", nargs="+", choices=methods, metavar="METHOD", help=f"from {', '.join(methods)}")
    found.add_argument("--k", nargs="+", type=int, help="ranks, for methods that have one (default: %(default)s)")
    found.add_argument("--seeds", nargs="+", type=int, help="of weights, batches and sketches (default: %(default)s)")
    found.add_argument("--steps", type=int, help="optimiser steps (default: %(default)s)")
    found.add_argument("--batch", type=int, help="sequences in a batch (default: %(default)s)")
    found.add_argument("--hidden", type=int, help="hidden units n (default: %(default)s)")
    found.add_argument("--nonlinearity", choices=("relu", "modrelu", "tanh"), help="(default: %(default)s)")
    found.add_argument("--lr", type=float, help="of RMSprop (default: %(default)s)")
    found.add_argument("--unitary-lr", type=float, help="of the transition (default: lr / 32)")
    found.add_argument("--riemannian-lr", type=float, help="of RiemannianAdam (default: %(default)s)")
    found.add_argument("--stop", action="store_true", help="end a training once it has solved the task")
    found.add_argument("--device", help="such as cpu or cuda (default: %(default)s)")
    found.add_argument("--threads", type=int, help="for PyTorch (default: %(default)s)")
    found.add_argument("--save-every", type=int, help="steps between checkpoints (default: %(default)s)")
    found.add_argument("--out", type=Path, help="folder of the results (default: %(default)s)")
    common = {
        "seeds": [0],
        "k": [1],
        "device": "cpu",
        "threads": 1,
        "save_every": 50,
        "riemannian_lr": 0.01,
        "nonlinearity": "relu",
    }
    found.set_defaults(**{"methods": chosen, **common, **defaults})
    return found


def run(
    options: argparse.Namespace, task_of: Callable[[int], Task], methods: dict[str, Any] = METHODS, **choices: Any
) -> list[dict[str, Any]]:
    """Train every method at every rank from every seed, but what is done already, and report on all in the folder."""
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.methods:
            method = methods[name]
            for k in options.k if method.low_rank else options.k[:1]:
                _run_one(options, task_of(seed), method, Choices(**_choices(options, method, k, seed), **choices))
    found = records(options.out, task_of(0).name, list(methods))
    report(options.out, found)
    return found


def _choices(options: argparse.Namespace, method: Method, k: int, seed: int) -> dict[str, Any]:
    unitary = options.lr / 32 if options.unitary_lr is None else options.unitary_lr
    rate = options.riemannian_lr if "RAdam" in method.name else unitary
    return {
        "hidden": options.hidden,
        "k": k,
        "seed": seed,
        "nonlinearity": options.nonlinearity,
        "lr": options.lr,
        "unitary_lr": rate,
    }


def _run_one(options: argparse.Namespace, task: Task, method: Method, choices: Choices) -> None:
    stem = f"{task.name}-{method.name}-k{choices.k}-s{choices.seed}".replace(" ", "_").replace(",", "")
    done = options.out / f"{stem}.json"
    if done.exists():
        return
    checkpoint = options.out / f"{stem}.pt"
    finished = train(
        task,
        method,
        choices,
        device=options.device,
        checkpoint=checkpoint,
        every=options.save_every,
        stop_when_solved=options.stop,
    )
    size = {"steps": task.steps, "batch": options.batch}
    done.write_text(json.dumps({**summary(finished), **size, **environment()}, indent=1) + "\n", encoding="utf-8")
    checkpoint.unlink(missing_ok=True)


def summary(finished: Run) -> dict[str, Any]:
    """Return a run as JSON can hold it, its curves thinned."""
    kept = thinned(len(finished.losses))
    whole = asdict(finished)
    milliseconds = sorted(whole.pop("optimiser_ms"))
    curves = {"step": [i + 1 for i in kept]}
    losses = [sum(finished.losses[max(0, i + 1 - LAST) : i + 1]) / min(LAST, i + 1) for i in kept]
    values_of = {"loss": losses, **{name: [whole[name][i] for i in kept] for name in ("seconds", "unitarity")}}
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
        "optimiser_ms": milliseconds[len(milliseconds) // 2],
        "unitarity_error": finished.unitarity[-1],
        "curves": curves,
    }


def records(folder: Path, task: str, order: list[str]) -> list[dict[str, Any]]:
    """Return all finished runs on a task in a folder, in the order of methods, k and seed."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob(f"{task.replace(' ', '_')}-*.json")]
    return sorted(found, key=lambda r: (order.index(r["method"]), r["settings"]["k"], r["settings"]["seed"]))


def groups(found: Iterable[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Return the runs that differ in their seed alone, by method and rank."""
    by_key: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in found:
        by_key.setdefault((record["method"], record["settings"]["k"]), []).append(record)
    return by_key


def table(found: list[dict[str, Any]]) -> str:
    """Return a row for each method and rank, means over seeds."""
    rows = [HEADER]
    for (method, k), runs in groups(found).items():
        rows.append(
            [
                method,
                str(k) if "projUNN" in method else "",
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


def _mean(values: list[float | None], form: str = ".4g") -> str:
    """Return the mean, or a dash where a value is missing."""
    known = [value for value in values if value is not None]
    return format(sum(known) / len(known), form) if len(known) == len(values) else "–"


def report(folder: Path, found: list[dict[str, Any]]) -> None:
    """Print the table of all finished runs and draw their curves."""
    from figures import curves

    if not found:
        return
    name = found[0]["task"].replace(" ", "_")
    curves(folder / f"{name}.png", found)
    caption = CAPTION.format(measure=found[0]["measure"], goal=found[0]["goal"] and f"{found[0]['goal']:.4g}")
    print(f"\n{found[0]['task']}\n\n{table(found)}\n\n{caption}\n\nwritten to {folder}: {name}-*.json, {name}.png")
