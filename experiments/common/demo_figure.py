"""The demo's picture: four panels, ours in colour, all others in shades of grey."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .demo_verdict import Row, of

STYLES: dict[str, dict[str, Any]] = {
    "projUNN-D, k = 1": {"color": "tab:blue"},
    "projUNN-D, k = 4": {"color": "tab:blue", "linestyle": "--"},
    "projUNN-D, k = 16": {"color": "tab:blue", "linestyle": ":"},
    "projUNN-T, k = 4": {"color": "tab:orange", "linestyle": "--"},
    "projUNN-T, k = 16": {"color": "tab:orange", "linestyle": ":"},
    "Stiefel-euclidean": {"color": "0.35"},
    "Stiefel-canonical": {"color": "0.35", "linestyle": "--"},
    "Cayley": {"color": "0.35", "linestyle": ":"},
    "unconstrained": {"color": "tab:olive", "linestyle": "-."},
    "frozen": {"color": "0.7", "linestyle": "-"},
}


def draw(path: Path, rows: list[Row]) -> None:
    """Draw all panels."""
    figure = Figure(figsize=(12, 8.6), layout="constrained")
    (point, cost), (nothing_lost, times) = figure.subplots(2, 2)
    _losses(point, of(rows, "rotation"))
    _scores(cost, of(rows, "deep network"), "seconds", "Ten layers of n = {n}: what a step costs")
    _scores(nothing_lost, of(rows, "narrow network"), "step", "A recurrent network of n = {n}: nothing is lost")
    _times(times, of(rows, "step times"))
    cost.set(xscale="log", xlabel="seconds of training")
    for panel in (point, cost, nothing_lost, times):
        panel.grid(alpha=0.3)
        free = {"loc": "upper right", "bbox_to_anchor": (1.0, 0.63)} if panel is point else {}  # "best" covers a curve
        panel.legend(fontsize="small", frameon=False, **free)
    figure.savefig(path, dpi=120)


def _losses(panel: Axes, rows: dict[str, Row]) -> None:
    """Draw losses against seconds."""
    for name, row in rows.items():
        (curve,) = row["curves"]
        panel.plot(curve["seconds"], curve["loss"], label=name, **STYLES[name])
    panel.axhline(row["goal"], color="black", linewidth=0.8, linestyle=(0, (1, 4)))
    panel.set(xlabel="seconds of training", ylabel="loss", yscale="log", title=f"An unknown rotation, n = {row['n']}")


def _scores(panel: Axes, rows: dict[str, Row], axis: str, title: str) -> None:
    """Draw scores on held-out data, the mean of all seeds over their range."""
    for name, row in rows.items():
        x = np.mean([curve["looks"][axis] for curve in row["curves"]], axis=0)
        scores = np.array([curve["looks"]["score"] for curve in row["curves"]])
        panel.plot(x, scores.mean(0), label=name, **STYLES[name])
        panel.fill_between(x, scores.min(0), scores.max(0), color=STYLES[name]["color"], alpha=0.15, linewidth=0)
    panel.set(xlabel=axis, ylabel=row["measure"], ylim=(0, 1), title=title.format(n=row["n"]))


def _times(panel: Axes, rows: dict[str, Row]) -> None:
    """Draw the time of a whole step against n."""
    for name, row in rows.items():
        sizes = [int(n) for n in row["sizes"]]
        panel.plot(sizes, [cell["whole_ms"] for cell in row["sizes"].values()], marker=".", label=name, **STYLES[name])
    panel.set(xscale="log", yscale="log", xlabel="n", ylabel="ms", title="A training step of one layer, n x n")
    panel.set_xticks(sizes, [str(n) for n in sizes])
    panel.minorticks_off()
