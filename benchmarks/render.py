"""Print the tables and draw the pictures of a recorded run: ``python benchmarks/render.py benchmark.json``.

With ``--into`` the tables are also written into pages, between ``<!-- benchmark: HEADING -->`` and
``<!-- /benchmark -->``; ``machine`` in place of a heading stands for the machine and the versions.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from suite.plots import draw
from suite.tables import tables

PLACE = re.compile(r"(<!-- benchmark: (.+?) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)


def text(record: dict[str, Any]) -> str:
    """Return machine, versions and every table as markdown."""
    not_run = [
        f"- {cell['subject']}, n = {cell['shape'][-1]}: {cell['not_run']}"
        for cell in record["cells"]
        if "not_run" in cell
    ]
    parts = [machine(record)]
    for heading, table in tables(record).items():
        parts += [f"### {heading}", table]
        if heading.startswith("Rivals"):
            parts += [*(["\n".join(not_run)] if not_run else []), f"Original projUNN: {record['original_source']}."]
    parts.append("Medians, quartiles in brackets; `not run`: longer than the cap.")
    return "\n\n".join(parts)


def machine(record: dict[str, Any]) -> str:
    """Return the machine and the versions, in words."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{record['machine'].removesuffix(' used')}\n\n{versions}"


def filled(page: str, record: dict[str, Any]) -> str:
    """Return the page with the record's tables in their places."""
    parts = tables(record) | {"machine": machine(record)}
    return PLACE.sub(lambda place: f"{place[1]}{parts[place[2]]}\n{place[3]}", page)


def main() -> None:
    """Render the record that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("record", type=Path, metavar="JSON")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the pictures (default: the record's)")
    parser.add_argument("--into", type=Path, nargs="+", default=[], metavar="PAGE", help="pages to write tables into")
    options = parser.parse_args()
    record = json.loads(options.record.read_text(encoding="utf-8"))
    print(text(record))
    draw(record, options.out or options.record.parent)
    for page in options.into:
        page.write_text(filled(page.read_text(encoding="utf-8"), record), encoding="utf-8")


if __name__ == "__main__":
    main()
