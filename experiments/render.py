"""Tables and pictures of recorded experiments, for the documentation.

``python experiments/render.py docs/results/experiments --out docs/_static --into docs/reference/experiments.md`` reads
every folder of runs, draws ``<folder>.png`` and replaces what the page has between ``<!-- folder -->`` marks.  The
demo's record lies beside that folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from common.demo_figure import draw
from common.demo_table import CAPTION
from common.demo_table import table as demo_table
from common.demo_verdict import verdict
from common.descents import METHODS as DESCENTS
from common.experiment import caption, table
from common.figures import curves
from common.networks import METHODS
from common.report import machine_of, write_between
from image_classification import METHODS as IMAGES

SORTED_BY = ("k", "lr", "unitary_lr", "seed")


def _demo(file: Path, out: Path, into: Path) -> None:
    record = json.loads(file.read_text(encoding="utf-8"))
    rows = record["rows"]
    draw(out / "demo.png", rows)
    claims = "\n".join(f"- {claim.told}" for claim in verdict(rows))
    took = f"{CAPTION}  {record['seconds']} s in all, on {machine_of(record)}."
    write_between(into, "demo", f"\n{demo_table(rows)}\n\n{took}\n\n{claims}\n")


def main(arguments: list[str] | None = None) -> int:
    """Render, and return the exit status."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("records", type=Path, help="folder of folders of runs")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the pictures")
    command.add_argument("--into", type=Path, required=True, metavar="PAGE", help="for the tables")
    options = command.parse_args(arguments)
    _demo(options.records.with_name("demo.json"), options.out, options.into)
    order = [*METHODS, *DESCENTS, *IMAGES]
    for folder in sorted(folder for folder in options.records.iterdir() if folder.is_dir()):
        runs = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")]
        runs.sort(
            key=lambda run: (order.index(run["method"]), *map(run["settings"].get, ("k", "lr", "unitary_lr", "seed")))
        )
        curves(options.out / f"{folder.name}.png", runs)
        machines = " and ".join(sorted({machine_of(run) for run in runs}))
        write_between(options.into, folder.name, f"\n{table(runs)}\n\n{caption(runs)}  Measured on {machines}.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
