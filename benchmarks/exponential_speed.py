"""What the convolution exponential costs beside one iteration of the network that uses it, one channel, batch 1.

The parametrisation is an FFT and a phase for each frequency, once for a sequence; an iteration is an FFT, a product, an
inverse FFT and φ.  Run ``python benchmarks/exponential_speed.py`` (a few seconds); ``--record JSON --into PAGE`` writes
the table of a recorded run into a page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from common.report import add_record_options, environment, machine_of, markdown, recorded, tell
from suite.in_turn import milliseconds

from projunn_manifold.layers import UnitaryConvRNNCell

SIZES = (64, 128, 256, 512)
DTYPES = {"complex64": torch.complex64, "float32": torch.float32}


@torch.no_grad()
def measure(size: int, dtype: torch.dtype, rounds: int) -> dict[str, list[float]]:
    """Return quartiles of the milliseconds of both, taken in turn."""
    cell = UnitaryConvRNNCell(1, image_size=size, dtype=dtype)
    z, blocks = torch.randn(1, 1, size, size, dtype=dtype), cell.conv.blocks()
    subjects: dict[str, Callable[[], Any]] = {
        "parametrisation": cell.conv.blocks,
        "iteration": lambda: cell(None, z, blocks),
    }
    return milliseconds(subjects, rounds)


def measure_all(rounds: int) -> dict[str, Any]:
    """Time every size in both dtypes."""
    torch.set_num_threads(1)
    cases = [(name, size) for name in DTYPES for size in SIZES]
    cells = [
        {"dtype": name, "size": size, **measure(size, DTYPES[name], rounds)}
        for name, size in tqdm(cases, "cases", disable=None)
    ]
    return {"cells": cells, **environment()}


def table(record: dict[str, Any]) -> str:
    """Return a row for each size."""
    rows = [["dtype", "grid", "parametrisation (ms)", "iteration (ms)", "ratio"]]
    for cell in record["cells"]:
        spread = [f"{b:.3g} ({a:.3g}–{c:.3g})" for a, b, c in (cell["parametrisation"], cell["iteration"])]
        ratio = cell["parametrisation"][1] / cell["iteration"][1]
        rows.append([cell["dtype"], f"{cell['size']}²", *spread, f"{ratio:.2f}"])
    return markdown(rows)


def main(arguments: list[str] | None = None) -> int:
    """Time or render, and return the exit status."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--rounds", type=int, default=51, help="(default: %(default)s)")
    add_record_options(command, "results/exponential_speed")
    options = command.parse_args(arguments)
    record = recorded(options, "exponential_speed", lambda: measure_all(options.rounds))
    text = f"\n{table(record)}\n\nMedians, with quartiles in brackets, on {machine_of(record)}.\n"
    tell(options, "exponential speed", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
