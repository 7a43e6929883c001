"""Which learning rates permuted MNIST wants, for the long runs of ``pixels.py``: one epoch each, falling to zero.

For each method the rate of all other weights is searched first, at the second rate of the transition, and then that of
the transition.  Other starts and nonlinearities are tried at the rates that projUNN-D with k = 1 has then.  A sixth of
the training images takes the place of the test images, which choose nothing.

Run ``python experiments/pixels_rates.py --data package/data``.  Finished trainings are kept in the output folder and
are not run again, so several processes can share it, each with methods of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common.networks import METHODS, Choices
from common.report import add_record_options, environment, machine_of, markdown, recorded, tell
from common.tasks import Pixels
from common.training import NonFiniteError, train

SEED = 100
LRS = (1e-3, 3e-3)
#: The methods that are searched, with the rates of the transition that are tried.
SEARCHED: dict[str, tuple[float, ...]] = {
    "projUNN-D": (3e-5, 1e-4, 3e-4, 1e-3),
    "projUNN-D, RAdam": (1e-2, 3e-2, 1e-1),
    "Stiefel-canonical, RAdam": (3e-3, 1e-2, 3e-2, 1e-1),
    "Stiefel-euclidean, RAdam": (3e-3, 1e-2, 3e-2, 1e-1),
    "frozen": (0.0,),
}
USUAL = {"init": "henaff", "nonlinearity": "modrelu"}  # of the long runs
#: What is tried in their place, with projUNN-D of rank one.
OTHERS = [
    {"init": init, "nonlinearity": nonlinearity}
    for nonlinearity, inits in {"modrelu": ("haar", "cayley"), "relu": ("henaff", "haar", "cayley", "identity")}.items()
    for init in inits
]


def search(options: argparse.Namespace, name: str) -> None:
    """Make the trainings of one method that are missing."""
    rates = SEARCHED[name]
    for k in options.k if METHODS[name].low_rank else [0]:
        found = [_trained(options, name, k, lr, rates[min(1, len(rates) - 1)]) for lr in LRS]
        lr = max(found, key=_accuracy)["lr"]
        found = [_trained(options, name, k, lr, rate) for rate in rates]
        if (name, k) == ("projUNN-D", 1):
            for other in OTHERS:
                _trained(options, name, k, lr, max(found, key=_accuracy)["unitary_lr"], **other)


def best(record: dict[str, Any]) -> dict[tuple[str, int], tuple[float, float]]:
    """Return the learning rates of each method and rank in a record: of all other weights, and of the transition."""
    found: dict[tuple[str, int], tuple[float, float]] = {}
    for cell in sorted((row for row in record["rows"] if row.items() >= USUAL.items()), key=_accuracy):
        found[cell["method"], cell["k"]] = cell["lr"], cell["unitary_lr"]
    return found


def _accuracy(cell: dict[str, Any]) -> float:
    return -math.inf if cell["score"] is None else cell["score"]


def _trained(
    options: argparse.Namespace, name: str, k: int, lr: float, unitary_lr: float, **others: str
) -> dict[str, Any]:
    """Return a training, made now or before."""
    stem = "-".join([name, f"k{k}", f"{lr:g}", f"{unitary_lr:g}", *others.values()])
    file = options.out / f"{stem}.json".replace(", ", "_")
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    chosen: dict[str, Any] = {"k": k, **USUAL, **others, "lr": lr, "unitary_lr": unitary_lr}
    choices = Choices(options.hidden, seed=SEED, **chosen)
    task = Pixels(128, 1, SEED, folder=options.data, choosing=True)
    cell = {"method": name, "hidden": options.hidden, **chosen, "loss": None, "score": None}
    try:
        run = train(task, METHODS[name], choices, decay=True)
        cell |= {"loss": run.final_loss, "score": run.score}
    except NonFiniteError as error:
        print(f"{name}, k {k}, {lr:g}, {unitary_lr:g}: {error}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(cell) + "\n", encoding="utf-8")
    return cell


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    for name in options.methods:
        search(options, name)
    cells = [json.loads(file.read_text(encoding="utf-8")) for file in options.out.glob("*-*.json")]
    order = list(SEARCHED)
    cells.sort(key=lambda cell: (order.index(cell["method"]), cell["k"], cell["init"], -_accuracy(cell)))
    return {"rows": cells, **environment()}  # those of other calls, too


def table(cells: list[dict[str, Any]]) -> str:
    """Return a row for each training."""
    rows = [["method", "k", "start", "nonlinearity", "learning rates", "loss", "accuracy"]]
    for cell in cells:
        results = ("diverged", "") if cell["score"] is None else (f"{cell['loss']:.4f}", f"{cell['score']:.4f}")
        recipe = [cell["init"], cell["nonlinearity"], f"{cell['lr']:g}, {cell['unitary_lr']:g}"]
        rows.append([cell["method"], str(cell["k"] or ""), *recipe, *results])
    return markdown(rows)


def main(arguments: list[str] | None = None) -> int:
    """Train what is missing, report, and return the exit status."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--data", type=Path, help="folder of MNIST's four IDX files (default: scikit-learn's digits)")
    command.add_argument("--methods", nargs="+", choices=SEARCHED, default=list(SEARCHED), metavar="METHOD")
    command.add_argument("--k", nargs="+", type=int, default=[1], help="ranks, for methods that have one (default: 1)")
    command.add_argument("--hidden", type=int, default=170, help="hidden units n (default: %(default)s)")
    add_record_options(command, "results/pixels_rates")
    options = command.parse_args(arguments)
    record = recorded(options, "pixels_rates", partial(_measure, options))
    tell(options, "pixels rates", f"\n{table(record['rows'])}\n\nMeasured on {machine_of(record)}.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
