"""Print the tables and draw the pictures of a recorded run: ``python examples/benchmark/render.py benchmark.json``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from plots import draw
from tables import tables


def text(record: dict[str, Any]) -> str:
    """Return machine, versions and every table as markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    not_run = [
        f"- {cell['subject']}, n = {cell['shape'][-1]}: {cell['not_run']}"
        for cell in record["cells"]
        if "not_run" in cell
    ]
    parts = [f"{record['machine']}\n\n{versions}"]
    for heading, table in tables(record).items():
        parts += [f"### {heading}", table]
        if heading.startswith("Rivals"):
            parts += [*(["\n".join(not_run)] if not_run else []), f"Original projUNN: {record['original_source']}."]
    parts.append("Medians, quartiles in brackets; `not run`: longer than the cap.")
    return "\n\n".join(parts)


def main() -> None:
    """Render the record that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("record", type=Path, metavar="JSON")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the pictures (default: the record's)")
    options = parser.parse_args()
    record = json.loads(options.record.read_text(encoding="utf-8"))
    print(text(record))
    draw(record, options.out or options.record.parent)


if __name__ == "__main__":
    main()
