"""The tables of a run in markdown, from its record alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .bars import bars
from .records import Cell, exponent, matrices_per_step, median_ratio, series, times_by_size

Rows = list[list[str]]


def tables(record: dict[str, Any]) -> dict[str, str]:
    """Return every table that the record has cells for, by its heading."""
    made = {
        "In short": _in_short(record),
        "Step against torch.optim.SGD's": _speed(record, "sgd"),
        "Adam: step against torch.optim.Adam's": _speed(record, "adam"),
        "Step against torch.optim.SGD's, by rank": _by_column(record, "rank", _rank_column, _ratio),
        "Complex batches: step against torch.optim.SGD's": _batches(record, "complex64"),
        "Stacks of small real blocks: step against torch.optim.SGD's": _batches(record, "float32"),
        "Rivals: step against torch.optim.SGD's": _rivals(record),
        "Step against EuclideanStiefel's with geoopt's optimiser of the same name": _beside_rival(record, "stiefel"),
        "Complex full-rank step against POGO's": _beside_rival(record, "complex"),
        "Memory allocated by a step, in matrices (peak at one time)": _by_column(
            record, "memory", _side_column, _memory
        ),
        "Operators of ATen called by a step": _operators(record),
        "Bars": _bars(record),
    }
    return {heading: _markdown(rows) for heading, rows in made.items() if len(rows) > 1}


def subjects(cells: list[Cell]) -> list[str]:
    """Return the names of the subjects in the order they were met."""
    return list(dict.fromkeys(cell["subject"] for cell in cells))


def _speed(record: dict[str, Any], yardstick: str) -> Rows:
    cells = [c for c in record["cells"] if c["section"] == "speed" and yardstick in c["ratio"]]
    rows = _grid(cells, _side_column, lambda cell: _ratio(cell, yardstick))
    rows[0].append("exponent")
    for row in rows[1:]:
        slope = exponent(times_by_size(cells, "speed", row[0]))
        row.append("" if slope is None else f"{slope:.2f}")
    return [rows[0], _yardstick_row(cells, yardstick, rows[0]), *rows[1:]] if cells else [[]]


def _batches(record: dict[str, Any], dtype: str) -> Rows:
    cells = [cell for cell in record["cells"] if cell["section"] == "batch" and cell["dtype"] == dtype]
    rows = _grid(cells, _shape_column, _ratio)
    return [rows[0], _yardstick_row(cells, "sgd", rows[0]), *rows[1:]] if cells else [[]]


def _rivals(record: dict[str, Any]) -> Rows:
    """Rivals beside this package, and the original code with what is known of it."""
    ours = [cell for form in ("in place", "RiemannianSGD") for cell in series(record["cells"], "speed", f"{form} D")]
    rivals = [cell for cell in record["cells"] if cell["section"] == "rivals"]
    if not rivals:
        return [[]]
    cells = [*rivals, *ours]
    rows = _grid(cells, _side_column, _ratio)
    about = {cell["subject"]: [cell["cost"], cell["source"]] for cell in cells}
    known = [
        [
            original["subject"],
            *(str(original["ratio"].get(n, "")) for n in rows[0][1:]),
            original["cost"],
            "measured earlier",
        ]
        for original in record["original"]
    ]
    return [[*rows[0], "cost", "source"], *([*row, *about[row[0]]] for row in rows[1:]), *known]


def _beside_rival(record: dict[str, Any], section: str) -> Rows:
    """Return a row for every subject, rank and length of the step."""
    cells = [cell | {"subject": _step_name(cell)} for cell in record["cells"] if cell["section"] == section]
    return _grid(cells, _side_column, lambda cell: _ratio(cell, "rival"))


def _step_name(cell: Cell) -> str:
    rank = f", k = {cell['k']}" if cell["family"] == "ours" else ""
    return f"{cell['subject']}{rank}, ‖u‖₂ = {cell['length']:g}"


IN_SHORT = {  # the few rows and columns that a reader sees first, by section and subject
    ("speed", "in-place RiemannianSGD D"): "this package, `optim.RiemannianSGD`, k = 1",
    ("speed", "RiemannianSGD D"): "this package, geoopt's `RiemannianSGD`, k = 1",
    ("rivals", "EuclideanStiefel, RiemannianSGD"): "geoopt, `EuclideanStiefel`",
    ("rivals", "parametrizations.orthogonal, cayley"): "torch, `parametrizations.orthogonal`, Cayley",
    ("rivals", "POGO"): "pogo-torch",
}
IN_SHORT_SIZES = (128, 512, 2048)


def _in_short(record: dict[str, Any]) -> Rows:
    """Return medians alone, of a few."""
    rows = [
        [label, *(_short(median_ratio(cell)) for n in IN_SHORT_SIZES for cell in _at(record, section, name, n))]
        for (section, name), label in IN_SHORT.items()
    ]
    header = ["a step, in steps of `torch.optim.SGD`", *(f"n = {n}" for n in IN_SHORT_SIZES)]
    return [header, *(row for row in rows if len(row) == len(header))]


def _at(record: dict[str, Any], section: str, name: str, n: int) -> list[Cell]:
    return series(record["cells"], section, name, shape=[n, n])[:1]


def _operators(record: dict[str, Any]) -> Rows:
    cells = [cell for cell in record["cells"] if cell["section"] == "ops"]
    return [
        ["method", "calls", "with nested calls"],
        *([cell["subject"], f"{cell['calls']:.1f}", f"{cell['calls_with_inner']:.1f}"] for cell in cells),
    ]


def _bars(record: dict[str, Any]) -> Rows:
    return [
        ["bar", "limit", "measured", "verdict"],
        *(
            [
                bar.what.replace("in place,", "in-place step,"),
                f"{'≥' if bar.least else '≤'} {bar.limit:g}",
                "" if bar.measured is None else f"{bar.measured:.3g}",
                bar.verdict,
            ]
            for bar in bars(record)
        ),
    ]


def _by_column(
    record: dict[str, Any], section: str, column: Callable[[Cell], str], text: Callable[[Cell], str]
) -> Rows:
    return _grid([cell for cell in record["cells"] if cell["section"] == section], column, text)


def _grid(cells: list[Cell], column: Callable[[Cell], str], text: Callable[[Cell], str]) -> Rows:
    """Return a row for every subject and a column for every matrix."""
    columns = list(dict.fromkeys(map(column, cells)))
    rows = []
    for name in subjects(cells):
        found = {column(cell): _text_or_reason(cell, text) for cell in cells if cell["subject"] == name}
        rows.append([name, *(found.get(header, "") for header in columns)])
    return [["method", *columns], *rows]


def _yardstick_row(cells: list[Cell], yardstick: str, header: list[str]) -> list[str]:
    """Return the time of the yardstick for each matrix, from its samples beside the first subject."""
    times: dict[str, str] = {}
    for cell in cells:
        column = _side_column(cell) if cell["section"] == "speed" else _shape_column(cell)
        if "not_run" not in cell:
            times.setdefault(column, f"{1e3 * cell['yardstick_seconds'][yardstick]['median']:.3g} ms")
    label = {"sgd": "SGD, time", "adam": "Adam, time"}[yardstick]
    return [label, *(times.get(column, "") for column in header[1:])]


def _text_or_reason(cell: Cell, text: Callable[[Cell], str]) -> str:
    return "not run" if "not_run" in cell else text(cell)


def _side_column(cell: Cell) -> str:
    return str(cell["shape"][-1])


def _rank_column(cell: Cell) -> str:
    return f"k = {cell['k']}"


def _shape_column(cell: Cell) -> str:
    return "x".join(map(str, cell["shape"]))


def _ratio(cell: Cell, yardstick: str = "sgd") -> str:
    """Return the median and the quartiles."""
    ratio = cell["ratio"][yardstick]
    return f"{_short(ratio['median'])} ({_short(ratio['lower'])}–{_short(ratio['upper'])})"


def _memory(cell: Cell) -> str:
    return f"{matrices_per_step(cell):.3f} ({matrices_per_step(cell, 'peak_bytes'):.2f})"


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _markdown(rows: Rows) -> str:
    """Align the columns, the first to the left and the others to the right."""
    width = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:{'>' if i else '<'}{width[i]}}" for i, cell in enumerate(row)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(width)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
