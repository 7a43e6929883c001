"""The demo's table: a row for each method of each panel."""

from __future__ import annotations

from statistics import fmean

from .demo_verdict import Row
from .report import markdown

CAPTION = (
    "Rate: of the square weights.  Result: the loss; the share of test images that are recognised; the share of the\n"
    "variance that the answers explain, with the range of three seeds; the whole step at a larger n.  Step: the\n"
    "optimiser's.  Whole step: forward, backward and step.  Both are medians.  Memory: weights, gradients and the\n"
    "optimiser's state."
)
HEADER = ["panel", "method", "rate", "steps", "seconds", "result", "step, ms", "whole step, ms", "memory, MB"]


def table(rows: list[Row]) -> str:
    """Return the table as markdown."""
    return markdown([HEADER, *map(_cells, rows)])


def _cells(row: Row) -> list[str]:
    timed = [f"{row['step_ms']:.3g}", f"{row['whole_ms']:.3g}"]
    if row["panel"] == "step times":
        n, last = max((int(n), cell) for n, cell in row["sizes"].items())
        result = f"{last['whole_ms']:.3g} ms at n = {n}" if n > row["n"] else ""
        return [row["panel"], f"{row['method']}, n = {row['n']}", "", "", "", result, *timed, ""]
    rate = "" if row["rate"] is None else f"{row['rate']:g}"
    lead = [row["panel"], row["method"], rate, str(row["steps"]), f"{row['seconds']:.1f}"]
    return [*lead, _result(row), *timed, f"{row['memory_mb']:.3g}"]


def _result(row: Row) -> str:
    if row["reached"] is not None:
        return f"{row['loss']:.2g}{' (goal)' * row['reached']}"
    scores = [100 * score for score in row["scores"]]
    spread = f" ({min(scores):.1f} to {max(scores):.1f})" if len(scores) > 1 else ""
    return f"{fmean(scores):.1f} %{spread}"
