"""Two threads against one: the time of a step of the in-place optimisers, and of torch's own, by size and rank.

Run ``python benchmarks/two_threads.py`` (two minutes); ``--record JSON --into PAGE`` writes the table of a recorded run
into a page.  Blocks of steps with one thread and with two are timed in turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

import geoopt
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from common.report import add_record_options, environment, machine_of, markdown, recorded, tell

from projunn_manifold import UnitaryLowRank, optim

SIZES = (128, 256, 512, 1024, 2048, 4096)
LARGEST_DENSE = 1024
BLOCK = 0.05  # seconds of steps with one number of threads before the other's turn
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "torch SGD": partial(torch.optim.SGD, lr=1e-3),
    "RiemannianSGD": partial(optim.RiemannianSGD, lr=1e-3),
    "torch Adam": partial(torch.optim.Adam, lr=1e-3),
    "RiemannianAdam": partial(optim.RiemannianAdam, lr=1e-3),
}


def cases() -> list[tuple[str, int | None, int]]:
    """Return optimiser, rank and size of all steps."""
    ranks = {name: (None,) if name.startswith("torch") else (1, 4, None) for name in OPTIMIZERS}
    known = [(name, k, n) for name in OPTIMIZERS for k in ranks[name] for n in SIZES]
    return [(name, k, n) for name, k, n in known if k is not None or name.startswith("torch") or n <= LARGEST_DENSE]


def step_of(name: str, k: int | None, n: int) -> Callable[[], Any]:
    """Return the step of a parameter with a random gradient."""
    manifold, draw = UnitaryLowRank(k), torch.Generator().manual_seed(0)
    parameter = geoopt.ManifoldParameter(manifold.random(n, n, generator=draw), manifold=manifold)
    parameter.grad = torch.randn(n, n, generator=draw) / n
    if name.startswith("torch"):
        plain = torch.nn.Parameter(parameter.detach().clone())
        plain.grad = parameter.grad
        return OPTIMIZERS[name]([plain]).step
    return OPTIMIZERS[name]([parameter]).step


def milliseconds(step: Callable[[], Any], rounds: int) -> dict[int, list[float]]:
    """Return quartiles of the milliseconds of a step, by the number of threads."""
    times: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(3):
        step()
    begin = perf_counter()
    step()
    steps = max(3, int(BLOCK / (perf_counter() - begin)))
    for _ in range(rounds):
        for threads, found in times.items():
            torch.set_num_threads(threads)
            step()
            begin = perf_counter()
            for _ in range(steps):
                step()
            found.append(1e3 * (perf_counter() - begin) / steps)
    torch.set_num_threads(1)
    return {threads: quantiles(found, n=4) for threads, found in times.items()}


def measure_all(rounds: int) -> dict[str, Any]:
    """Time every step."""
    torch.set_num_threads(1)
    cells = [
        {"optimizer": name, "k": k, "n": n, "ms": milliseconds(step_of(name, k, n), rounds)}
        for name, k, n in tqdm(cases(), "steps", disable=None)
    ]
    return {"cells": cells, "rounds": rounds, **environment()}


def table(cells: list[dict[str, Any]]) -> str:
    """Return a row for each optimiser and rank: two threads' time as a multiple of one's, by size."""
    rows = [["optimiser", "k", *(f"n = {n}" for n in SIZES)]]
    for name, k in dict.fromkeys((cell["optimizer"], cell["k"]) for cell in cells):
        found = {cell["n"]: cell["ms"] for cell in cells if (cell["optimizer"], cell["k"]) == (name, k)}
        ratios = [f"{found[n]['2'][1] / found[n]['1'][1]:.2f}" if n in found else "" for n in SIZES]
        rows.append([name, "" if name.startswith("torch") else str(k), *ratios])
    return markdown(rows)


def main(arguments: list[str] | None = None) -> int:
    """Time or render, and return the exit status."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    add_record_options(command, "results/two_threads")
    options = command.parse_args(arguments)
    record = recorded(options, "two_threads", lambda: measure_all(options.rounds))
    cells = [{**cell, "ms": {str(threads): found for threads, found in cell["ms"].items()}} for cell in record["cells"]]
    machine = machine_of(record).replace(", 1 thread", "")
    how = (
        "The time of a step with two threads as a multiple of its time with one: medians of "
        f"{record['rounds']} blocks of steps, float32, on {machine}."
    )
    tell(options, "two threads", f"\n{table(cells)}\n\n{how}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
