"""Questions to the record of a run: its cells, their ratios, and the exponents that fit them."""

from __future__ import annotations

import math
from typing import Any

Cell = dict[str, Any]


def series(cells: list[Cell], section: str, subject: str, **where: object) -> list[Cell]:
    """Return the cells of a subject in a section that were measured and have the given values."""
    return [
        cell
        for cell in cells
        if cell["section"] == section
        and cell["subject"] == subject
        and "not_run" not in cell
        and all(cell[name] == value for name, value in where.items())
    ]


def median_ratio(cell: Cell, yardstick: str = "sgd") -> float:
    """Return the median multiple of a yardstick's step."""
    return cell["ratio"][yardstick]["median"]


def times_by_size(cells: list[Cell], section: str, subject: str, least: int = 512) -> list[tuple[float, float]]:
    """Return sides and seconds, from the side on where operators no longer dominate."""
    found = series(cells, section, subject)
    return [(cell["shape"][-1], cell["seconds"]["median"]) for cell in found if cell["shape"][-1] >= least]


def matrices_per_step(cell: Cell, what: str = "bytes_per_step") -> float:
    """Return an allocation in multiples of the matrix (float32)."""
    return cell[what] / (4 * math.prod(cell["shape"]))


def exponent(points: list[tuple[float, float]]) -> float | None:
    """Least-squares slope of log y against log x."""
    if len(points) < 2:
        return None
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)
