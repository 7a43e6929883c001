"""Many matrices of one shape: a step of a stack, which is one batch, and of as many parameters by themselves.

Run ``python benchmarks/many_matrices.py`` (three minutes); ``--record JSON --into PAGE`` writes the tables of a
recorded run into a page.  Every time is that of a whole step, taken in turn with that of torch's own SGD or Adam with
``foreach=True`` on the same numbers.
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

#: What the matrices are, the shape of their stack, and whether they are timed as separate parameters, too.
CASES = [
    ("blocks", (10_000, 64, 64), False),
    ("heads of all layers", (96, 512, 64), True),
    ("heads of one layer", (8, 512, 64), True),
    ("middle blocks", (24, 128, 128), True),
    ("small blocks", (200, 32, 32), True),
    ("tiny blocks", (1_000, 16, 16), True),
]
ADAM = ("heads of all layers", "middle blocks", "small blocks")
SGD: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "torch SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, foreach=True),
    "in place D": lambda parameters: optim.RiemannianSGD(parameters, lr=1e-3),
    "in place T": lambda parameters: optim.RiemannianSGD(parameters, lr=1e-3),
    "foreach=False D": lambda parameters: optim.RiemannianSGD(parameters, lr=1e-3, foreach=False),
    "RiemannianSGD D": lambda parameters: geoopt.optim.RiemannianSGD(parameters, lr=1e-3),
    "RiemannianSGD T": lambda parameters: geoopt.optim.RiemannianSGD(parameters, lr=1e-3),
}
ADAMS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "torch Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-3, foreach=True),
    "in place D": lambda parameters: optim.RiemannianAdam(parameters, lr=1e-3),
    "in place T": lambda parameters: optim.RiemannianAdam(parameters, lr=1e-3),
    "foreach=False D": lambda parameters: optim.RiemannianAdam(parameters, lr=1e-3, foreach=False),
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


def measure(
    optimizers: dict[str, Callable[[Any], torch.optim.Optimizer]], shape: tuple[int, ...], separate: bool, rounds: int
) -> dict[str, list[float]]:
    """Return quartiles of the milliseconds of a step of each optimiser."""
    steps = {
        name: make(parameters(shape, name.endswith(" T"), separate)).step
        for name, make in optimizers.items()
        if separate or "foreach" not in name
    }
    return milliseconds(steps, rounds)


def measure_all(rounds: int) -> dict[str, Any]:
    """Time every case, as a stack and as separate parameters."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    planned = [(what, shape, way) for what, shape, both in CASES for way in ((False, True) if both else (False,))]
    cells: dict[str, list[dict[str, Any]]] = {"cells": [], "adam": []}
    for what, shape, separate in tqdm(planned, "cases", disable=None):
        cell = {"what": what, "shape": shape, "separate": separate}
        cells["cells"].append({**cell, "times": measure(SGD, shape, separate, rounds)})
        if what in ADAM:
            cells["adam"].append({**cell, "times": measure(ADAMS, shape, separate, rounds)})
    return {**cells, "rounds": rounds, **environment()}


def table(cells: list[dict[str, Any]]) -> str:
    """Return a row for each case: the first optimiser's time, all others as multiples of it on the same parameters."""
    first, *others = max((list(cell["times"]) for cell in cells), key=len)
    rows = [["matrices", "parameters", f"{first} (ms)", *others]]
    for cell in cells:
        times, (number, n, m) = cell["times"], cell["shape"]
        unit = times[first][1]
        ratios = [
            f"{b / unit:.2f} ({a / unit:.2f}–{c / unit:.2f})" if name in times else "–"
            for name in others
            for a, b, c in [times.get(name, (0, 0, 0))]
        ]
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
    unit = "SGD's time, or Adam's" if "adam" in record else "SGD's time"
    how = (
        f"Medians of {record['rounds']} steps, with quartiles in brackets; the other columns are multiples of "
        f"{unit}.  float32, k = 1, on {machine_of(record)}."
    )
    tables = [table(record[key]) for key in ("cells", "adam") if key in record]
    text = "\n" + "\n\n".join([*tables, how]) + "\n"
    tell(options, "many matrices", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
