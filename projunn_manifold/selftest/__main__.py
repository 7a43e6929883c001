"""``python -m projunn_manifold.selftest``: the laws and the times of this package on a device.

Run it first on new hardware, and put what it prints into a bug report.  It prints a line for each law: ``ok``, or
``OFF`` with the error and its limit, or with the exception.  A table of times follows.  The results are also written as
JSON.  The exit status is 0 if all laws hold.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import geoopt
import numpy as np
import torch

from projunn_manifold.linalg.products import compiled_loops
from projunn_manifold.selftest.laws import Device, Law, laws
from projunn_manifold.selftest.times import Time, sizes_of, step_times, training_times


def main(arguments: list[str] | None = None) -> int:
    """Check all laws, time the steps, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m projunn_manifold.selftest", description="Check the package on a device, and time its steps."
    )
    parser.add_argument(
        "--device", default=_default_device(), help="such as cuda, mps, xpu or cpu (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer laws and sizes: a few seconds")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where to write the JSON (default: selftest-DEVICE.json)"
    )
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        on = Device.of(options.device)
    except RuntimeError as error:  # a name that PyTorch does not know
        parser.error(f"argument --device: {str(error).splitlines()[0]}")
    if not on.dtypes:
        print(f"no product of matrices works on {options.device!r}", file=sys.stderr)
        return 1
    file = options.json or Path(f"selftest-{on.device.type}.json")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):  # known now, not after minutes
        parser.error(f"argument --json: {file} cannot be written")
    record: dict[str, Any] = {"versions": versions(), "device": described(on.device), "quick": options.quick}
    print(*(f"{name} {version}" for name, version in record["versions"].items()), sep=", ")
    print(f"{record['device']}; {', '.join(str(d).removeprefix('torch.') for d in on.dtypes)}\n")
    record["laws"] = [ask(law) for law in laws(on, options.quick)]
    failed = [law["name"] for law in record["laws"] if not law["ok"]]
    times = [*step_times(on.device, sizes_of(on.device, options.quick)), *training_times(on.device, options.quick)]
    record["ms"] = [each._asdict() for each in times]
    record["seconds"] = round(time.perf_counter() - start, 1)
    print(f"\n{table(times)}\n")
    print(f"{len(record['laws']) - len(failed)} laws hold, {len(failed)} do not; {record['seconds']:.0f} s")
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {file}")
    return 1 if failed else 0


def ask(law: Law) -> dict[str, Any]:
    """Check a law, print a line, and return the outcome."""
    try:
        found, problem = law.error(), ""
    except Exception as failure:
        found, problem = math.inf, f"{type(failure).__name__}: {failure}".partition("\n")[0]
    ok = found <= law.limit  # not where it is NaN
    said = "ok" if ok else f"OFF: {problem or f'{found:.1e}, limit {law.limit:.1e}'}"
    print(f"{law.name}: {said}", flush=True)
    error = found if math.isfinite(found) else None  # JSON has no infinity
    return {"name": law.name, "ok": ok, "error": error, "limit": law.limit, "problem": problem}


def table(times: list[Time]) -> str:
    """Return a table of steps, a row for each optimiser and a column for each size, then a list of training steps."""
    sizes = list(dict.fromkeys(t.size for t in times if t.size.isdigit()))
    found = {(t.what, t.size): t.ms for t in times}
    rows = [["ms of a step, n =", *sizes]]
    for what in dict.fromkeys(t.what for t in times if t.size.isdigit()):
        rows.append([what, *(f"{found[what, size]:.3g}" if (what, size) in found else "" for size in sizes)])
    width = max(len(row[0]) for row in rows)
    lines = [row[0].ljust(width) + "".join(cell.rjust(9) for cell in row[1:]) for row in rows]
    lines += ["", "ms of a training step"]
    lines += [f"{t.what.ljust(width)}{t.ms:9.3g}  {t.size}" for t in times if not t.size.isdigit()]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Return the versions of all that the result may depend on."""
    return {
        "projunn_manifold": importlib.metadata.version("projunn_manifold"),
        "torch": torch.__version__,
        "geoopt": geoopt.__version__,
        "numpy": np.__version__,
        "Python": platform.python_version(),
        "compiled loops": "no" if compiled_loops() is None else "yes",
    }


def described(device: torch.device) -> str:
    """Return a device in words."""
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu: {platform.processor() or platform.machine()}, {threads} thread{'s' * (threads > 1)}"
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return device.type


def _default_device() -> str:
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"  # type: ignore[union-attr]


if __name__ == "__main__":
    sys.exit(main())
