"""What all scripts leave behind in one way: markdown tables, text within a page, versions and machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geoopt
import torch

import projunn_manifold


def markdown(rows: list[list[str]]) -> str:
    """Align the columns, the two of words to the left and the numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligns = ["<", "<", *">" * (len(widths) - 2)]
    lines = [
        "| "
        + " | ".join(f"{cell:{align}{width}}" for cell, align, width in zip(row, aligns, widths, strict=True))
        + " |"
        for row in rows
    ]
    rule = [f"{'-' * (width + 1)}{':' if align == '>' else '-'}" for align, width in zip(aligns, widths, strict=True)]
    return "\n".join([lines[0], f"|{'|'.join(rule)}|", *lines[1:]])


def write_between(page: Path, name: str, text: str) -> None:
    """Replace what a page has between the marks ``<!-- name -->`` and ``<!-- /name -->``."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")


def add_record_options(command: argparse.ArgumentParser, out: str) -> None:
    """Add the options of scripts that keep a record, and can report on one again."""
    command.add_argument("--record", type=Path, metavar="JSON", help="report on this record instead of a new one")
    command.add_argument("--into", type=Path, metavar="PAGE", help="write its table into this page")
    command.add_argument("--out", type=Path, default=Path(out), help="folder of the results (default: %(default)s)")


def recorded(options: argparse.Namespace, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the record that was given, or a new one, kept as ``<name>.json``."""
    if options.record is not None:
        return json.loads(options.record.read_text(encoding="utf-8"))
    record = measure()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def tell(options: argparse.Namespace, name: str, text: str) -> None:
    """Print a report, and write it into the page that was asked for."""
    print(text)
    if options.into is not None:
        write_between(options.into, name, text)


def machine_of(record: dict[str, Any]) -> str:
    """Return the machine of a record; older records say "1 threads used" where new ones say "1 thread"."""
    return re.sub(r"\b1 threads", "1 thread", record["machine"].removesuffix(" used").replace(" used,", ","))


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return versions and machine, for a record of results."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "geoopt": geoopt.__version__,
            "projunn_manifold": projunn_manifold.__version__,
        },
        "machine": _machine() if device == "cpu" else f"{torch.cuda.get_device_name(device)}, {_machine()}",
    }


def thinned(length: int, kept: int = 200) -> list[int]:
    """Return indices of at most about ``kept`` of so many values, the last among them."""
    stride = -(-length // kept)
    return list(range((length - 1) % stride, length, stride))


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}"


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    model = models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores, {_threads()}, {platform.system()}"
