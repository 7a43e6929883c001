"""A training step of OrthogonalConv2d against torch's convolution, AOC (orthogonium) and a Cayley layer.

A step is forward, backward and optimiser (SGD; ours the in-place RiemannianSGD), real images, as many channels out as
in.  torch's convolution is circular with a kernel as large as the image, unconstrained; AOC has 3 x 3 kernels, padded
circularly; the Cayley layer (Trockman, Kolter 2021) has a free kernel of 3 x 3, and a C x C linear solve for each
frequency.  Norms are compared before anything is timed.  One thread: with two, MKL's LU of a batch of complex matrices
was seen to fail from 192 channels on.

Run ``python benchmarks/convolution_speed.py`` (about ten minutes; the extra ``bench``).  It leaves
``convolution_speed.json`` and ``convolution_speed.png``; ``--record JSON --into PAGE`` writes the table of a recorded
run into a page.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from common.report import add_record_options, environment, machine_of, markdown, recorded, tell
from common.resnet import aoc
from suite.counting import Allocations

from projunn_manifold.layers import OrthogonalConv2d
from projunn_manifold.optim import RiemannianSGD

RATE = 1e-6  # nothing is learnt here
OURS, PLAIN, AOC, CAYLEY = "OrthogonalConv2d, k = 1", "torch.nn.Conv2d, full kernel", "AOC, 3 x 3", "Cayley"
CASES = [(c, 16, 16) for c in (16, 32, 64, 128, 256)] + [(64, side, 16) for side in (8, 32)] + [(128, 16, 64)]
QUICK = [(8, 4, 2)]
COLOURS = {OURS: "tab:blue", PLAIN: "tab:gray", AOC: "tab:green", CAYLEY: "tab:red"}


class Cayley(nn.Module):
    """A convolution whose blocks are Cayley transforms, (I + S)^-1 (I - S) with S skew, of those of a free kernel."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.kernel = nn.Parameter(torch.randn(channels, channels, 3, 3) / (3 * channels**0.5))

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution."""
        free = torch.fft.rfft2(self.kernel, s=(self.size, self.size)).permute(2, 3, 0, 1)
        skew, eye = free - free.mH, torch.eye(free.shape[-1])
        waves = torch.fft.rfft2(x).permute(2, 3, 1, 0)
        turned = torch.linalg.solve((eye + skew).contiguous(), (eye - skew).contiguous()) @ waves
        return torch.fft.irfft2(turned.permute(3, 2, 0, 1), s=x.shape[-2:])


MAKERS: dict[str, Callable[[int, int], nn.Module]] = {
    OURS: lambda channels, size: OrthogonalConv2d(channels, channels, image_size=size, bias=False),
    CAYLEY: Cayley,
    AOC: lambda channels, size: aoc(channels, channels, size),
    PLAIN: lambda channels, size: nn.Conv2d(
        channels, channels, size, padding="same", padding_mode="circular", bias=False
    ),
}


def step_of(name: str, channels: int, size: int, x: Tensor) -> Callable[[], None]:
    """Return a training step, after a look at the norm."""
    torch.manual_seed(0)
    layer = MAKERS[name](channels, size)
    with torch.no_grad():
        ratio = (layer(x[:1]).norm() / x[:1].norm()).item()
    if name != PLAIN and abs(ratio - 1) > (1e-4 if name != AOC else 0.05):
        raise RuntimeError(f"{name} changes the norm by a factor of {ratio}: not timed")
    make = RiemannianSGD if name == OURS else torch.optim.SGD
    optimizer = make(layer.parameters(), lr=RATE)
    g = torch.randn_like(x)

    def step() -> None:
        optimizer.zero_grad()
        layer(x).backward(g)
        optimizer.step()

    return step


def measure(case: tuple[int, int, int], rounds: int, cap: float, last: dict[str, float]) -> list[dict[str, Any]]:
    """Time all subjects in turn, round by round; those that would take longer than ``cap`` for a step are left out."""
    channels, size, batch = case
    x = torch.randn(batch, channels, size, size, requires_grad=True)
    cells, steps = [], {}
    for name in MAKERS:
        cell: dict[str, Any] = {"name": name, "channels": channels, "size": size, "batch": batch}
        cells.append(cell)
        if name == AOC and importlib.util.find_spec("orthogonium") is None:
            cell["not_run"] = "orthogonium is not installed"
        elif last.get(name, 0) > cap:
            cell["not_run"] = "longer than the cap"
        else:
            steps[name] = step_of(name, channels, size, x)
            begin = perf_counter()
            steps[name]()
            last[name] = perf_counter() - begin
            cell["times"] = []
            if last[name] > cap:  # once is enough
                cell["times"].append(last[name])
    for _ in range(rounds):
        for cell in cells:
            if cell["name"] in steps and last[cell["name"]] <= cap:
                begin = perf_counter()
                steps[cell["name"]]()
                cell["times"].append(perf_counter() - begin)
    for cell in cells:
        times = sorted(cell.pop("times", []))
        if times:
            quarter = len(times) // 4
            cell["ms"] = {
                "median": _short(1e3 * median(times)),
                "lower": _short(1e3 * times[quarter]),
                "upper": _short(1e3 * times[-1 - quarter]),
            }
            with Allocations() as allocations:
                steps[cell["name"]]()
            cell["peak_mib"] = _short(allocations.peak / 2**20)
    return cells


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """Time every case."""
    torch.set_num_threads(options.threads)
    cases: list[tuple[int, int, int]] = QUICK if options.quick else CASES
    last: dict[str, float] = {}
    cells: list[dict[str, Any]] = []
    for case in tqdm(cases, "cases", disable=None):
        cells += measure(case, options.rounds, options.cap, last if case[1:] == (16, 16) else {})
    return {"quick": options.quick, "cases": cases, "cells": cells, **environment()}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def table(record: dict[str, Any]) -> str:
    """Return times, ratios and memory, and the exponent of C from 64 to 256."""
    rows = [["C, pixels, batch", "layer", "ms per step", "relative to ours", "peak (MiB)"]]
    for case in record["cases"]:
        cells = [cell for cell in record["cells"] if [cell["channels"], cell["size"], cell["batch"]] == list(case)]
        ours = next(cell["ms"]["median"] for cell in cells if cell["name"] == OURS)
        for cell in cells:
            head = [f"{case[0]}, {case[1]}², {case[2]}", cell["name"]]
            if "ms" not in cell:
                rows.append([*head, cell["not_run"], "", ""])
                continue
            ms = cell["ms"]
            spread = f"{ms['median']:.3g} ({ms['lower']:.3g}–{ms['upper']:.3g})"
            rows.append([*head, spread, f"{ms['median'] / ours:.2f}", f"{cell['peak_mib']:.3g}"])
    grows = "; ".join(f"{name}: {time:.2f} and {memory:.2f}" for name, (time, memory) in _exponents(record).items())
    growth = "Growth of time and memory from 64 to 256 channels at 16² pixels, as exponents of C"
    return f"{markdown(rows)}\n\n{growth}: {grows}."


def _exponents(record: dict[str, Any]) -> dict[str, list[float]]:
    found = {}
    for name in MAKERS:
        at = {c["channels"]: (c["ms"]["median"], c["peak_mib"]) for c in _of_channels(record, name)}
        if 64 in at and 256 in at:
            found[name] = [math.log(b / a) / math.log(4) for a, b in zip(at[64], at[256], strict=True)]
    return found


def _of_channels(record: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [c for c in record["cells"] if c["name"] == name and (c["size"], c["batch"]) == (16, 16) and "ms" in c]


def draw(path: Path, record: dict[str, Any]) -> None:
    """Draw time and memory against channels."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for panel, value, what in zip(
        figure.subplots(1, 2),
        (lambda c: c["ms"]["median"], lambda c: c["peak_mib"]),
        ("milliseconds for a training step", "MiB allocated at most in a step"),
        strict=True,
    ):
        for name, colour in COLOURS.items():
            cells = _of_channels(record, name)
            panel.plot([c["channels"] for c in cells], [value(c) for c in cells], "o-", color=colour, label=name)
        panel.set(xscale="log", yscale="log", xlabel="channels C", ylabel=what, title="16² pixels, batch 16")
        channels = sorted({c["channels"] for c in record["cells"]})
        panel.set_xticks(channels, channels)
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Time or render, and return the exit status."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    command.add_argument("--cap", type=float, default=3.0, help="seconds for a rival's step (default: %(default)s)")
    command.add_argument("--threads", type=int, default=1, help="for PyTorch (default: %(default)s)")
    command.add_argument("--quick", action="store_true", help="one small case")
    add_record_options(command, "results/convolution_speed")
    options = command.parse_args(arguments)
    record = recorded(options, "convolution_speed", lambda: measure_all(options))
    options.out.mkdir(parents=True, exist_ok=True)
    if not record["quick"]:
        draw(options.out / "convolution_speed.png", record)
    text = f"Measured on {machine_of(record)}:\n\n{table(record)}"
    tell(options, "convolution speed", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
