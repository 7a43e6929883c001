"""Many matrices of one shape: a step of a stack, which is one batch, and of as many parameters by themselves.

Run ``python benchmarks/many_matrices.py`` (two minutes); ``--record JSON --into PAGE`` writes the table of a recorded
run into a page.  Every time is that of a whole step, taken in turn with ``torch.optim.SGD``'s on the same numbers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geoopt
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from common.report import add_record_options, environment, machine_of, markdown, recorded, tell
from suite.in_turn import milliseconds

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, optim

#: What the matrices are, the shape of their stack, and whether they are timed one by one, too.
CASES = [
    ("blocks", (10_000, 64, 64), False),
    ("heads of all layers", (96, 512, 64), True),
    ("heads of one layer", (8, 512, 64), True),
    ("small blocks", (1_000, 16, 16), True),
]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "torch SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    "in place": lambda parameters: optim.RiemannianSGD(parameters, lr=1e-3),
    "RiemannianSGD": lambda parameters: geoopt.optim.RiemannianSGD(parameters, lr=1e-3),
}


def parameters(shape: tuple[int, ...], exact: bool, separate: bool) -> list[torch.Tensor]:
    """Return one parameter for the stack, or one for each matrix, with gradients."""
    manifold = (UnitaryLowRankExact if exact else UnitaryLowRank)(1)
    points = manifold.random(*shape)
    made = []
    for point in points.unbind() if separate else [points]:
        parameter = geoopt.ManifoldParameter(point.clone(), manifold=manifold)
        parameter.grad = torch.randn(parameter.shape)
        made.append(parameter)
    return made


def measure(shape: tuple[int, ...], separate: bool, rounds: int) -> dict[str, list[float]]:
    """Return quartiles of the milliseconds of a step of each optimiser, D and T."""
    steps: dict[str, Callable[[], Any]] = {}
    for name, make in OPTIMIZERS.items():
        for variant in ("",) if name == "torch SGD" else (" D", " T"):
            steps[name + variant] = make(parameters(shape, variant == " T", separate)).step
    return milliseconds(steps, rounds)


def measure_all(rounds: int) -> dict[str, Any]:
    """Time every case, as a stack and one by one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    planned = [(what, shape, way) for what, shape, both in CASES for way in ((False, True) if both else (False,))]
    cells = [
        {"what": what, "shape": shape, "separate": separate, "times": measure(shape, separate, rounds)}
        for what, shape, separate in tqdm(planned, "cases", disable=None)
    ]
    return {"cells": cells, "rounds": rounds, **environment()}


def table(record: dict[str, Any]) -> str:
    """Return a row for each case: SGD's time, all others as multiples of SGD's on the same parameters."""
    names = list(record["cells"][0]["times"])
    rows = [["matrices", "parameters", f"{names[0]} (ms)", *names[1:]]]
    for cell in record["cells"]:
        times, (number, n, m) = cell["times"], cell["shape"]
        unit = times[names[0]][1]
        ratios = [f"{b / unit:.2f} ({a / unit:.2f}–{c / unit:.2f})" for a, b, c in (times[name] for name in names[1:])]
        count = str(number) if cell["separate"] else "1 (a stack)"
        rows.append([f"{number} {cell['what']}, {n}×{m}", count, f"{unit:.3g}", *ratios])
    return markdown(rows)


def main(arguments: list[str] | None = None) -> int:
    """Time or render, and return the exit status."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--rounds", type=int, default=21, help="(default: %(default)s)")
    add_record_options(command, "results/many_matrices")
    options = command.parse_args(arguments)
    record = recorded(options, "many_matrices", lambda: measure_all(options.rounds))
    how = (
        f"Medians of {record['rounds']} steps, with quartiles in brackets; the other columns are multiples of "
        f"SGD's time.  float32, k = 1, on {machine_of(record)}."
    )
    text = f"\n{table(record)}\n\n{how}\n"
    tell(options, "many matrices", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
