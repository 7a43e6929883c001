"""What the demo leaves behind: a table, the same with all curves as JSON, and one picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .networks import METHODS
from .report import environment, markdown
from .training import LAST, Run

CAPTION = (
    f"final loss: mean of the last {LAST} steps; accuracy: symbols recalled (copying), test images (digits);\n"
    "step: median of the Riemannian optimiser's step; total: the whole training; "
    "unitarity error: ||W^T W - I||_F / sqrt(n)"
)


def results_table(runs: list[Run]) -> str:
    """Return the comparison as an aligned markdown table."""
    header = ["task", "method", "lr", "final loss", "accuracy", "step (ms)", "total (s)", "unitarity error"]
    rows = [
        [
            run.task,
            run.method,
            f"{_rate(run):g}",
            f"{run.final_loss:.4f}",
            f"{run.score:.1%}",
            f"{run.optimiser_quartiles[1]:.2f}",
            f"{run.seconds[-1]:.1f}",
            f"{run.unitarity[-1]:.1e}",
        ]
        for run in runs
    ]
    return markdown([header, *rows])


def _measured(run: Run) -> dict[int, float]:
    """Return the unitarity errors by the steps at which they were measured."""
    return {step: error for step, error in enumerate(run.unitarity, 1) if error is not None}


def _rate(run: Run) -> float:
    """Learning rate of the transition."""
    return float(run.settings["unitary_lr"])


def grid_table(runs: list[Run]) -> str:
    """Return the final losses of a search, one row for every task and method, the lowest of a row starred."""
    rates = sorted({_rate(run) for run in runs})
    rows = [["task", "method", *(f"lr {rate:g}" for rate in rates)]]
    for key in dict.fromkeys((run.task, run.method) for run in runs):
        losses = {_rate(run): run.final_loss for run in runs if (run.task, run.method) == key}
        best = min(losses, key=losses.__getitem__)
        rows.append([*key, *(f"{losses[rate]:.4f}{'*' if rate == best else ' '}" for rate in rates)])
    return markdown(rows)


def verdict(runs: list[Run]) -> tuple[bool, str]:
    """Tell whether every low-rank run with a baseline fell under a tenth of it, and say so in a sentence."""
    judged = [run for run in runs if METHODS[run.method].low_rank and run.solved is not None]
    if not judged:
        return True, "No low-rank run on copying to judge."
    threshold = f"a tenth of the memoryless baseline, {judged[0].goal:.5f}"
    failed = [f"{run.method} ({run.final_loss:.5f})" for run in judged if not run.solved]
    if failed:
        return False, f"Copying NOT solved by {', '.join(failed)}: the loss is not under {threshold}."
    return True, f"Every low-rank run solved copying ({', '.join(r.method for r in judged)}): loss under {threshold}."


def write_json(path: Path, runs: list[Run], settings: dict[str, Any], total_seconds: float) -> None:
    """Write settings, versions, machine and every run with its curves."""
    content = {
        "settings": settings,
        **environment(),
        "total_seconds": round(total_seconds, 1),
        "runs": [_summary(run) for run in runs],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def draw(path: Path, runs: list[Run]) -> None:
    """Draw a row of panels for every task: loss against steps and seconds, unitarity against steps."""
    names = list(dict.fromkeys(run.task for run in runs))
    figure = Figure(figsize=(15, 0.8 + 4 * len(names)), layout="constrained")
    for row, name in zip(figure.subplots(len(names), 3, squeeze=False), names, strict=True):
        of_task = [run for run in runs if run.task == name]
        _draw_losses(row[0], row[1], of_task)
        _draw_unitarity(row[2], of_task)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=120)


def _summary(run: Run) -> dict[str, Any]:
    lower, median, upper = (round(value, 4) for value in run.optimiser_quartiles)
    return {
        "task": run.task,
        "method": run.method,
        "lr": _rate(run),
        "steps": len(run.losses),
        "final_loss": run.final_loss,
        "baseline": run.baseline,
        "accuracy": run.score,
        "optimiser_step_ms": {"lower_quartile": lower, "median": median, "upper_quartile": upper},
        "total_seconds": round(run.seconds[-1], 3),
        "unitarity_error": {"final": run.unitarity[-1], "maximum": max(_measured(run).values())},
        "curves": {
            "loss": _rounded(run.losses),
            "seconds": _rounded(run.seconds),
            "unitarity_error": {"step": list(_measured(run)), "value": _rounded(list(_measured(run).values()))},
        },
    }


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _draw_losses(against_steps: Axes, against_seconds: Axes, runs: list[Run]) -> None:
    for run in runs:
        loss = run.running_mean
        style = {"color": run.colour, "label": run.method}
        against_steps.plot(range(1, len(loss) + 1), loss, **style)
        against_seconds.plot(run.seconds, loss, **style)
    for axes, unit in (against_steps, "step"), (against_seconds, "seconds of training"):
        axes.set(xlabel=unit, ylabel="loss", yscale="log", title=f"{runs[0].task}: loss")
        axes.grid(alpha=0.3)
        baseline = runs[0].baseline
        if baseline is not None:
            axes.axhline(baseline, color="black", linestyle="--", linewidth=1, label="memoryless baseline")
            axes.axhline(baseline / 10, color="black", linestyle=":", linewidth=1, label="a tenth of it")


def _draw_unitarity(axes: Axes, runs: list[Run]) -> None:
    for run in runs:
        axes.plot(list(_measured(run)), list(_measured(run).values()), color=run.colour)
    axes.set(
        xlabel="step",
        ylabel=r"$\|W^T W - I\|_F\,/\,\sqrt{n}$",
        yscale="log",
        title=f"{runs[0].task}: distance from orthogonality",
    )
    axes.grid(alpha=0.3)
