"""What the comparison leaves behind: a table, the same with all curves as JSON, and one picture."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import geoopt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from training import LAST, Run

import projunn_manifold

CAPTION = (
    f"final loss: mean of the last {LAST} steps; accuracy: symbols recalled (copying), test images (digits);\n"
    "step: median of the Riemannian optimiser's step; total: the whole training; "
    "unitarity error: ||W^T W - I||_F / sqrt(n)"
)


def results_table(runs: list[Run]) -> str:
    """Return the comparison as an aligned markdown table."""
    header = ["task", "method", "lr", "final loss", "accuracy", "step, ms", "total, s", "unitarity error"]
    rows = [
        [
            run.task.name,
            run.method.name,
            f"{run.rate:g}",
            f"{run.final_loss:.4f}",
            f"{run.accuracy:.1%}",
            f"{run.optimiser_quartiles[1]:.2f}",
            f"{run.seconds[-1]:.1f}",
            f"{run.unitarity[-1]:.1e}",
        ]
        for run in runs
    ]
    return _markdown([header, *rows])


def grid_table(runs: list[Run]) -> str:
    """Return the final losses of a search, one row for every task and method, the lowest of a row starred."""
    rates = sorted({run.rate for run in runs})
    rows = [["task", "method", *(f"lr {rate:g}" for rate in rates)]]
    for key in dict.fromkeys((run.task.name, run.method.name) for run in runs):
        losses = {run.rate: run.final_loss for run in runs if (run.task.name, run.method.name) == key}
        best = min(losses, key=losses.__getitem__)
        rows.append([*key, *(f"{losses[rate]:.4f}{'*' if rate == best else ' '}" for rate in rates)])
    return _markdown(rows)


def verdict(runs: list[Run]) -> tuple[bool, str]:
    """Tell whether every low-rank run with a baseline fell under a tenth of it, and say so in a sentence."""
    judged = [run for run in runs if run.method.low_rank and run.solved is not None]
    if not judged:
        return True, "No low-rank run on copying to judge."
    threshold = f"a tenth of the memoryless baseline, {judged[0].task.baseline / 10:.5f}"
    failed = [f"{run.method.name} ({run.final_loss:.5f})" for run in judged if not run.solved]
    if failed:
        return False, f"Copying NOT solved by {', '.join(failed)}: the loss is not under {threshold}."
    return True, f"Copying solved by {', '.join(run.method.name for run in judged)}: the loss is under {threshold}."


def write_json(path: Path, runs: list[Run], settings: dict[str, Any], total_seconds: float) -> None:
    """Write settings, versions, machine and every run with its curves."""
    content = {
        "settings": settings,
        **environment(),
        "total_seconds": round(total_seconds, 1),
        "runs": [_summary(run) for run in runs],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_between(page: Path, name: str, text: str) -> None:
    """Replace what a page has between the marks ``<!-- name -->`` and ``<!-- /name -->``."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")


def environment() -> dict[str, Any]:
    """Return versions and machine, for a record of results."""
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "geoopt": geoopt.__version__,
            "projunn_manifold": projunn_manifold.__version__,
        },
        "machine": _machine(),
    }


def draw(path: Path, runs: list[Run]) -> None:
    """Draw a row of panels for every task: loss against steps and seconds, unitarity against steps."""
    names = list(dict.fromkeys(run.task.name for run in runs))
    figure = Figure(figsize=(15, 0.8 + 4 * len(names)), layout="constrained")
    for row, name in zip(figure.subplots(len(names), 3, squeeze=False), names, strict=True):
        of_task = [run for run in runs if run.task.name == name]
        _draw_losses(row[0], row[1], of_task)
        _draw_unitarity(row[2], of_task)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=120)


def _markdown(rows: list[list[str]]) -> str:
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


def _summary(run: Run) -> dict[str, Any]:
    lower, median, upper = (round(value, 4) for value in run.optimiser_quartiles)
    return {
        "task": run.task.name,
        "method": run.method.name,
        "lr": run.rate,
        "steps": len(run.losses),
        "final_loss": run.final_loss,
        "baseline": run.task.baseline,
        "accuracy": run.accuracy,
        "optimiser_step_ms": {"lower_quartile": lower, "median": median, "upper_quartile": upper},
        "total_seconds": round(run.seconds[-1], 3),
        "unitarity_error": {"final": run.unitarity[-1], "maximum": max(run.unitarity)},
        "curves": {
            "loss": _rounded(run.losses),
            "seconds": _rounded(run.seconds),
            "unitarity_error": _rounded(run.unitarity),
        },
    }


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    model = models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads used, {platform.system()}"


def _draw_losses(against_steps: Axes, against_seconds: Axes, runs: list[Run]) -> None:
    for run in runs:
        loss = _running_mean(run.losses)
        style = {"color": run.method.colour, "label": run.method.name}
        against_steps.plot(range(1, len(loss) + 1), loss, **style)
        against_seconds.plot(run.seconds, loss, **style)
    for axes, unit in (against_steps, "step"), (against_seconds, "seconds of training"):
        axes.set(xlabel=unit, ylabel="loss", yscale="log", title=f"{runs[0].task.name}: loss")
        axes.grid(alpha=0.3)
        baseline = runs[0].task.baseline
        if baseline is not None:
            axes.axhline(baseline, color="black", linestyle="--", linewidth=1, label="memoryless baseline")
            axes.axhline(baseline / 10, color="black", linestyle=":", linewidth=1, label="a tenth of it")


def _draw_unitarity(axes: Axes, runs: list[Run]) -> None:
    for run in runs:
        axes.plot(range(1, len(run.unitarity) + 1), run.unitarity, color=run.method.colour)
    axes.set(
        xlabel="step",
        ylabel=r"$\|W^T W - I\|_F\,/\,\sqrt{n}$",
        yscale="log",
        title=f"{runs[0].task.name}: distance from orthogonality",
    )
    axes.grid(alpha=0.3)


def _running_mean(values: list[float]) -> np.ndarray:
    """Mean over the last ``LAST`` steps up to each one, so that a curve ends at the final loss of the table."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - LAST, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
