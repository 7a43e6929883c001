"""Time this package against torch's optimisers and its rivals: check each answer, then time it.

Every figure is a multiple of the step that ``torch.optim.SGD`` makes on the same matrix in the same run.  Run
``python benchmarks/run.py``, or ``make bench``.  It leaves ``benchmark.json`` and ``benchmark_*.png`` in the
output folder and prints the tables; ``render.py`` makes them again from the JSON.  A subject with a wrong answer ends
the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from render import text
from suite.checks import CheckFailedError
from suite.machine import machine, versions
from suite.plots import draw
from suite.published import ORIGINAL, SOURCE
from suite.sections import FULL, QUICK, SECTIONS, Runner, groups
from suite.timing import Effort
from tqdm import tqdm


def main(arguments: list[str] | None = None) -> int:
    """Run the suite and return the exit status."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "benchmark.json"
    try:
        record = measure(options, file)
    except CheckFailedError as failure:
        print(f"A wrong answer, not timed: {failure}", file=sys.stderr)
        return 1
    pictures = draw(record, options.out)
    print(f"\n{text(record)}\n")
    print(f"{record['total_seconds']:.0f} s in all; written: {', '.join(str(path) for path in (file, *pictures))}")
    return 0


def measure(options: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Measure the sections asked for; the record is written after every group."""
    quick = options.quick
    effort = Effort(
        samples=3 if quick else 7,
        sample_seconds=0.005 if quick else 0.03,
        cell_seconds=0.05 if quick else 0.5,
        cap=options.cap,
        threads=options.threads,
    )
    sections = (options.only,) if options.only else SECTIONS
    planned = [group for section in sections for group in groups(section, QUICK if quick else FULL)]
    runner = Runner(effort)
    start = perf_counter()
    record: dict[str, Any] = {
        "settings": {"quick": quick, "only": options.only, "threads": options.threads, "cap_seconds": options.cap},
        "machine": machine(options.threads),
        "versions": versions(),
        "original": ORIGINAL,
        "original_source": SOURCE,
        "cells": [],
    }
    with tqdm(total=sum(len(group.subjects) for group in planned), unit="cell", disable=None) as progress:
        for group in planned:
            progress.set_description(f"{group.section} {'x'.join(map(str, group.shape))}, k={group.k}")
            for cell in runner.cells(group):
                record["cells"].append(cell)
                progress.update()
            record["total_seconds"] = round(perf_counter() - start, 1)
            file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small matrices and few samples, under a minute")
    parser.add_argument("--only", choices=SECTIONS, help="one section (default: all)")
    parser.add_argument("--threads", type=_positive(int), default=1, metavar="N", help="for PyTorch (default: 1)")
    parser.add_argument(
        "--cap", type=_positive(float), default=20.0, metavar="S", help="seconds for a cell of a rival (default: 20)"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="default: %(default)s")
    return parser.parse_args(arguments)


def _positive(kind: type[int] | type[float]) -> Any:
    """Return an argparse type for positive numbers."""

    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
        return value

    number.__name__ = f"positive {kind.__name__}"
    return number


if __name__ == "__main__":
    sys.exit(main())
