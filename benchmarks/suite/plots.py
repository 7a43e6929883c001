"""The pictures of a run, from its record alone; the axes of lines are logarithmic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from common.labels import label_ends
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .records import Cell, matrices_per_step, times_by_size
from .tables import subjects

Points = list[tuple[float, float]]
Style = tuple[str, dict[str, Any]]  # the label of a line, and how it is drawn

#: Which lines a panel has; D and T take the same time, and the tables have all.
OURS: dict[str, Style] = {
    "in place D": ("manifold.step_", {"color": "tab:cyan"}),
    "in-place RiemannianSGD D": ("optim.RiemannianSGD", {"color": "tab:blue"}),
    "in-place RiemannianAdam D": ("optim.RiemannianAdam", {"color": "tab:blue", "linestyle": "--"}),
    "RiemannianSGD D": ("geoopt's RiemannianSGD", {"color": "tab:green"}),
    "RiemannianAdam D": ("geoopt's RiemannianAdam", {"color": "tab:green", "linestyle": "--"}),
    "torch SGD": ("torch SGD", {"color": "black"}),
    "torch Adam": ("torch Adam", {"color": "black", "linestyle": "--"}),
}
RIVALS: dict[str, Style] = {
    "RiemannianSGD D": ("this package", {"color": "tab:green"}),
    "EuclideanStiefel, RiemannianSGD": ("EuclideanStiefel", {"color": "0.45"}),
    "CanonicalStiefel, RiemannianSGD": ("CanonicalStiefel", {"color": "0.6"}),
    "POGO": ("POGO", {"color": "tab:purple"}),
    "parametrizations.orthogonal, cayley": ("parametrizations.orthogonal, Cayley", {"color": "tab:brown"}),
    "torch SGD": ("torch SGD", {"color": "black"}),
}
STACKS: dict[str, Style] = {
    "dense exponential": ("dense exponential", {"color": "tab:red"}),
    "POGO": ("POGO", {"color": "tab:purple"}),
    "RiemannianSGD D": ("geoopt's RiemannianSGD", {"color": "tab:green"}),
    "in place D": ("manifold.step_", {"color": "tab:cyan"}),
    "torch SGD": ("torch SGD", {"color": "black"}),
}
RANKS: dict[str, Style] = {name: OURS[name] for name in ("in place D", "RiemannianSGD D")}


def draw(record: dict[str, Any], folder: Path) -> list[Path]:
    """Draw what the record has cells for, and return the files."""
    made = {
        "size": _draw_size(record["cells"]),
        "rank": _draw_rank(record["cells"]),
        "batch": _draw_batch(record["cells"]),
        "memory": _draw_memory(record["cells"]),
    }
    paths = []
    for name, figure in made.items():
        if figure is not None:
            paths.append(folder / f"benchmark_{name}.png")
            figure.suptitle(record["machine"], fontsize=8, color="0.4")
            figure.savefig(paths[-1], dpi=150)
    return paths


def _draw_size(cells: list[Cell]) -> Figure | None:
    ours, rivals = (_measured(cells, section) for section in ("speed", "rivals"))
    if not ours and not rivals:
        return None
    figure, (upper, lower) = _panels(2)
    for panel, styles, title in (
        (upper, OURS, "A step of this package (D; T alike), and of torch's optimisers"),
        (lower, RIVALS, "Beside other systems: this package with geoopt's RiemannianSGD"),
    ):
        for name, style in styles.items():
            section = "rivals" if name in subjects(rivals) else "speed"
            _line(panel, style, [(n, 1e3 * seconds) for n, seconds in times_by_size(cells, section, name, least=0)])
        _finish(panel, "side n (float32, k = 1)", "milliseconds for a step", title)
    return figure


def _draw_rank(cells: list[Cell]) -> Figure | None:
    found = _measured(cells, "rank")
    if not found:
        return None
    figure, (axes,) = _panels(1)
    for name, style in RANKS.items():
        _line(axes, style, [(c["k"], 1e3 * c["seconds"]["median"]) for c in found if c["subject"] == name])
    _finish(axes, "rank k", "milliseconds for a step", f"D (T alike) by rank; n = {found[0]['shape'][-1]}, float32")
    return figure


def _draw_batch(cells: list[Cell]) -> Figure | None:
    found = [cell for cell in _measured(cells, "batch") if cell["dtype"] == "float32"]
    if not found:
        return None
    figure, (axes,) = _panels(1)
    for name, style in STACKS.items():
        _line(axes, style, [(c["shape"][0], 1e3 * c["seconds"]["median"]) for c in found if c["subject"] == name])
    side = found[0]["shape"][-1]
    _finish(
        axes, f"blocks of {side} x {side} in the stack (float32, k = 1)", "milliseconds for a step", "A stack of blocks"
    )
    return figure


def _draw_memory(cells: list[Cell]) -> Figure | None:
    """Draw a bar for every subject at the largest side at which all were measured."""
    left_out = (" T", "copy_", "clone")
    found = [cell for cell in _measured(cells, "memory") if not cell["subject"].endswith(left_out)]
    if not found:
        return None
    sides = [{cell["shape"][-1] for cell in found if cell["subject"] == name} for name in subjects(found)]
    common = set.intersection(*sides)
    if not common:
        return None
    shown = sorted((cell for cell in found if cell["shape"][-1] == max(common)), key=matrices_at_peak)
    figure = Figure(figsize=(8, 0.28 * len(shown) + 1), layout="constrained")
    axes = figure.subplots()
    colours = ["tab:blue" if cell["family"] == "ours" else "0.65" for cell in shown]
    names = [OURS.get(cell["subject"], (cell["subject"],))[0] for cell in shown]
    bars = axes.barh(names, [*map(matrices_at_peak, shown)], color=colours)
    axes.bar_label(bars, [f"{matrices_at_peak(cell):.2g}" for cell in shown], padding=3, fontsize=9)
    axes.set_xlabel(f"peak in a step, in matrices n x n (n = {max(common)})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.02)
    axes.grid(axis="x", alpha=0.3)
    axes.invert_yaxis()
    return figure


def matrices_at_peak(cell: Cell) -> float:
    """Return what a step holds at one time, in multiples of the matrix."""
    return matrices_per_step(cell, "peak_bytes")


def _measured(cells: list[Cell], section: str) -> list[Cell]:
    return [cell for cell in cells if cell["section"] == section and "not_run" not in cell]


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels one above the other."""
    figure = Figure(figsize=(8, 4.2 * count + 0.3), layout="constrained")
    return figure, list(figure.subplots(count, 1, squeeze=False)[:, 0])


def _line(axes: Axes, style: Style, points: Points) -> None:
    if points:
        label, options = style
        axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=4, **options)


def _finish(axes: Axes, x: str, y: str, title: str) -> None:
    """Label the axes, mark the values that were measured, and name the lines where they end."""
    axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.set_title(title, fontsize=11)
    axes.margins(y=0.1)
    ticks = sorted({value for line in axes.lines for value in np.asarray(line.get_xdata())})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    label_ends(axes)
