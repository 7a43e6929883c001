"""Pictures of trainings: loss against steps and against seconds, a colour for each method, a dash for each rank."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

DASHES = {1: "-", 2: (0, (5, 1)), 4: "--", 8: "-.", 16: ":"}


def curves(path: Path, records: list[dict[str, Any]]) -> None:
    """Draw all runs of a task: losses against steps and seconds, and what was seen when they were looked at."""
    seen = {name for record in records for look in record.get("looks", []) for name in look}
    figure = Figure(figsize=(11, 8.4 if seen else 4.6), layout="constrained")
    upper, *lower = figure.subplots(2 if seen else 1, 2, squeeze=False)
    named = set()
    several = len({record["settings"]["k"] for record in records}) > 1
    for record in records:
        name = record["method"]
        if several and "projUNN" in name:
            name += f", k = {record['settings']['k']}"
        style = {"color": record["colour"], "linestyle": DASHES.get(record["settings"]["k"], "-"), "linewidth": 1.2}
        for panel, axis in zip(upper, ("step", "seconds"), strict=True):
            label = name if panel is upper[0] and name not in named else None
            panel.plot(record["curves"][axis], record["curves"]["loss"], label=label, **style)
        for panels in lower:
            _looks(panels, record["looks"], style)
        named.add(name)
    for panel, axis in zip(upper, ("step", "seconds of training"), strict=True):
        panel.set(xlabel=axis, yscale="log")
        for key, dash, label in (("baseline", "--", "without memory"), ("goal", ":", "goal")):
            value = records[0][key]
            if value is not None:
                style = {"color": "black", "linestyle": dash, "linewidth": 1}
                panel.axhline(value, label=label if panel is upper[0] else None, **style)
    upper[0].set(ylabel="training loss", title=records[0]["task"])
    upper[1].sharey(upper[0])
    for panels in lower:
        panels[0].set(xlabel="step", ylabel=records[0]["measure"])
        if "smallest" in seen:
            panels[0].set(ylim=(0, 1))
            panels[1].set(xlabel="step", ylabel="smallest and largest singular value", yscale="log")
        else:
            panels[1].set(xlabel="step", ylabel=f"1 - {records[0]['measure']}", yscale="log")
    for panel in figure.axes:
        panel.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def _looks(panels: Any, looks: list[dict[str, float]], style: dict[str, Any]) -> None:
    """Draw scores, and the range of singular values, or else what scores lack to one."""
    steps = [look["step"] for look in looks]
    panels[0].plot(steps, [look["score"] for look in looks], **style)
    if not all("smallest" in look for look in looks):
        panels[1].plot(steps, [1 - look["score"] for look in looks], **style)
        return
    for end in ("smallest", "largest"):
        panels[1].plot(steps, [max(look[end], 1e-6) for look in looks], **style)


def study(path: Path, cells: list[dict[str, Any]]) -> None:
    """Draw the losses of all variants and seeds, a row for each task: at equal steps, and at equal time."""
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    names = list(dict.fromkeys(cell["name"] for cell in cells))
    figure = Figure(figsize=(4.2 * len(tasks), 0.22 * len(names) * 2 + 2), layout="constrained")
    for row, key in zip(figure.subplots(2, len(tasks), squeeze=False), ("losses", "losses_at_equal_time"), strict=True):
        for panel, task in zip(row, tasks, strict=True):
            for cell in (cell for cell in cells if cell["task"] == task):
                height = -names.index(cell["name"])
                colour = "tab:blue" if cell["k"] == 1 else "tab:orange"
                panel.plot(cell[key], [height] * len(cell[key]), ".", color=colour, alpha=0.6)
                panel.plot([median(cell[key])], [height], "|", color=colour, markersize=12)
            budget = next(cell["budget"] for cell in cells if cell["task"] == task)
            when = "after equal steps" if key == "losses" else f"after {budget:.1f} s"
            panel.set(xscale="log", title=f"{task}: loss {when}", yticks=[-i for i in range(len(names))])
            panel.set_yticklabels(names if panel is row[0] else [], fontsize="x-small")
            losses = [loss for cell in cells if cell["task"] == task for loss in cell[key]]
            wide = max(losses) > 100 * min(losses)
            panel.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def premise(path: Path, trainings: list[dict[str, Any]]) -> None:
    """Draw for each task the share of rank-k parts and the spectrum of G, and how far derivatives reach back."""
    tasks = list(dict.fromkeys(training["task"] for training in trainings))
    figure = Figure(figsize=(14, 4 * len(tasks)), layout="constrained")
    for row, task in zip(figure.subplots(len(tasks), 3, squeeze=False), tasks, strict=True):
        of_task = [training for training in trainings if training["task"] == task]
        seen = of_task[0]["observations"]
        for k in seen[0]["share"]:
            (line,) = row[0].plot([o["step"] for o in seen], [o["share"][k] for o in seen], label=f"k = {k}")
            row[0].plot([o["step"] for o in seen], [o["share_of_move"][k] for o in seen], ":", color=line.get_color())
        row[0].set(
            xlabel="step", ylabel="‖G_k‖ / ‖G‖", ylim=(0, 1.02), title=f"{task}: G (solid), RMSprop's move (dotted)"
        )
        for o in seen[:: max(1, len(seen) // 4)]:
            row[1].plot(range(1, len(o["singular_values"]) + 1), o["singular_values"], label=f"step {o['step']}")
        row[1].set(
            xlabel="index",
            ylabel="singular value / largest",
            xscale="log",
            yscale="log",
            ylim=(1e-3, 2),
            title="spectrum of G",
        )
        for training, colour in zip(of_task, ("tab:blue", "tab:orange", "tab:gray"), strict=True):
            for o, dash in ((training["observations"][0], ":"), (training["observations"][-1], "-")):
                label = f"{training['network']}, step {o['step']}"
                norms = [value or None for value in o["states"]]  # nothing at all cannot be drawn
                row[2].plot(range(1, len(norms) + 1), norms, dash, color=colour, label=label)
        row[2].set(xlabel="t", ylabel="‖∂L/∂h_t‖", yscale="log", title="how far derivatives reach back")
        for panel in row:
            panel.grid(alpha=0.3)
            panel.legend(fontsize="x-small", frameon=False)
    figure.savefig(path, dpi=120)
