"""The pictures of a run, from its record alone; all axes are logarithmic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .records import Cell, exponent, matrices_per_step, times_by_size
from .tables import subjects

Points = list[tuple[float, float]]

COLOURS = {
    "in place": "tab:blue",
    "in-place RiemannianSGD": "tab:cyan",
    "RiemannianSGD": "tab:green",
    "in-place RiemannianAdam": "tab:orange",
    "RiemannianAdam": "tab:red",
}
GREYS = ("0.0", "0.2", "0.35", "0.5", "0.6", "0.7", "0.8")
RIVAL_COLOURS = (
    *("tab:purple", "tab:brown", "tab:pink", "tab:olive", "goldenrod"),
    *("navy", "slateblue", "darkred", "teal"),
)
MARKERS = "osv^DPX*<>"


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
            figure.savefig(paths[-1], dpi=120)
    return paths


def _draw_size(cells: list[Cell]) -> Figure | None:
    ours, rivals = (_measured(cells, section) for section in ("speed", "rivals"))
    if not ours and not rivals:
        return None
    beside = [cell for cell in ours if cell["subject"] in ("torch SGD", "RiemannianSGD D")]
    panels = [("this package, torch and geoopt alone", ours), ("rivals", [*rivals, *beside])]
    figure, axes = _panels([shown for _, shown in panels])
    for panel, (title, shown) in zip(axes, panels, strict=True):
        for name in subjects(shown):
            section = "rivals" if name in subjects(rivals) else "speed"
            slope = exponent(times_by_size(cells, section, name))
            label = name if slope is None else f"{name}: n^{slope:.2f}"
            _line(
                panel,
                name,
                [(n, 1e3 * seconds) for n, seconds in times_by_size(cells, section, name, least=0)],
                cells,
                label,
            )
        _finish(panel, "side n", "milliseconds for a step", f"{title}; float32, k = 1, exponents fitted from n = 512")
    return figure


def _draw_rank(cells: list[Cell]) -> Figure | None:
    found = _measured(cells, "rank")
    if not found:
        return None
    figure, (axes,) = _panels([found])
    for name in subjects(found):
        points = [(cell["k"], 1e3 * cell["seconds"]["median"]) for cell in found if cell["subject"] == name]
        slope = exponent(points)
        _line(axes, name, points, cells, name if slope is None else f"{name}: k^{slope:.2f}")
    _finish(axes, "rank k", "milliseconds for a step", f"n = {found[0]['shape'][-1]}, float32")
    return figure


def _draw_batch(cells: list[Cell]) -> Figure | None:
    found = [cell for cell in _measured(cells, "batch") if cell["dtype"] == "float32"]
    if not found:
        return None
    figure, (axes,) = _panels([found])
    for name in subjects(found):
        points = [(cell["shape"][0], 1e3 * cell["seconds"]["median"]) for cell in found if cell["subject"] == name]
        _line(axes, name, points, cells, name)
    side = found[0]["shape"][-1]
    _finish(axes, "blocks in the stack", "milliseconds for a step", f"stacks of {side} x {side} blocks, float32, k = 1")
    return figure


def _draw_memory(cells: list[Cell]) -> Figure | None:
    found = _measured(cells, "memory")
    if not found:
        return None
    panels = [[cell for cell in found if (cell["family"] == "rival") == rivals] for rivals in (False, True)]
    figure, axes = _panels(panels)
    for panel, shown, title in zip(axes, panels, ("this package, torch and geoopt alone", "rivals"), strict=True):
        for name in subjects(shown):
            of_name = [cell for cell in shown if cell["subject"] == name]
            points = [(cell["shape"][-1], cell["peak_bytes"] / 2**20) for cell in of_name if cell["peak_bytes"]]
            matrices = matrices_per_step(of_name[-1], "peak_bytes")
            _line(panel, name, points, cells, f"{name}: {matrices:.3g} n² at n = {of_name[-1]['shape'][-1]}")
        _finish(panel, "side n", "peak in MiB", f"{title}: memory of a step besides point, gradient and state")
    return figure


def _measured(cells: list[Cell], section: str) -> list[Cell]:
    return [cell for cell in cells if cell["section"] == section and "not_run" not in cell]


def _panels(shown: list[list[Cell]]) -> tuple[Figure, list[Axes]]:
    """Return a figure with a panel above the other for every set of cells, as high as its legend asks."""
    heights = [3.5 + 0.14 * len(subjects(cells)) for cells in shown]
    figure = Figure(figsize=(11, sum(heights) + 0.4), layout="constrained")
    return figure, list(figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0])


def _line(axes: Axes, name: str, points: Points, cells: list[Cell], label: str) -> None:
    """Draw D solid and T dashed in the colour of their form, the unconstrained in grey, each rival in its own."""
    if not points:
        return
    family = {cell["subject"]: cell["family"] for cell in cells}
    if family[name] == "ours":
        form, variant = name[:-2], name[-1]
        style: dict[str, Any] = {"color": COLOURS[form], "linestyle": "-" if variant == "D" else "--", "marker": "o"}
    else:
        rival = family[name] == "rival"
        alike = [other for other, kind in family.items() if (kind == "rival") == rival and kind != "ours"]
        place, colours = alike.index(name), RIVAL_COLOURS if rival else GREYS
        style = {"color": colours[place % len(colours)], "marker": MARKERS[place % len(MARKERS)]}
        style["linestyle"] = "-" if rival else ":"
    x, y = zip(*points, strict=True)
    axes.plot(x, y, label=label, markersize=4, **style)


def _finish(axes: Axes, x: str, y: str, title: str) -> None:
    """Label the axes, mark the values that were measured, and list the lines in the order they end."""
    axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.set_title(title, fontsize=10)
    ticks = sorted({value for line in axes.lines for value in np.asarray(line.get_xdata())})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    lines = sorted(axes.lines, key=lambda line: -np.asarray(line.get_ydata())[-1])
    axes.legend(handles=lines, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
