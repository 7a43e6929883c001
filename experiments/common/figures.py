"""Pictures of trainings: loss against steps and against seconds, a colour for each method, a dash for each rank."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from .labels import label_ends

DASHES = {1: "-", 2: (0, (5, 1)), 4: "--", 8: "-.", 16: ":"}


def curves(path: Path, records: list[dict[str, Any]]) -> None:
    """Draw all runs of a task: losses against steps and seconds, and what was seen when they were looked at."""
    seen = {name for record in records for look in record.get("looks", []) for name in look}
    by_singular_values = "smallest" in seen
    figure = Figure(figsize=(11, 8.4 if by_singular_values else 4.6), layout="constrained")
    panels = figure.subplots(1 + by_singular_values, 2 + (bool(seen) and not by_singular_values), squeeze=False)
    upper, looks = panels[0, :2], panels[1] if by_singular_values else panels[0, 2:]
    named = set()
    several = len({record["settings"]["k"] for record in records}) > 1
    rates: dict[tuple[str, int], list[str]] = {}  # of the runs of a method and rank: all but the first are pale
    for record in records:
        known = rates.setdefault((record["method"], record["settings"]["k"]), [])
        known.extend({_rates(record)}.difference(known))
    for record in records:
        name, k = record["method"], record["settings"]["k"]
        known = rates[name, k]
        if several and "projUNN" in name:
            name += f", k = {k}"
        if len(known) > 1:
            name += f", rates {_rates(record)}"
        style = {"color": record["colour"], "linestyle": DASHES.get(k, "-"), "linewidth": 1.2}
        style["alpha"] = 1.0 if known.index(_rates(record)) == 0 else 0.5
        for panel, axis in zip(upper, ("step", "seconds"), strict=True):
            label = name if panel is upper[0] and name not in named else None
            panel.plot(record["curves"][axis], record["curves"]["loss"], label=label, **style)
        if seen:
            _looks(looks, record["looks"], style)
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
    for panel in looks[:1]:
        panel.set(xlabel="step", ylabel=records[0]["measure"])
    if by_singular_values:
        looks[0].set(ylim=(0, 1))
        looks[1].set(xlabel="step", ylabel="smallest and largest singular value", yscale="log")
    for panel in figure.axes:
        panel.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def _rates(record: dict[str, Any]) -> str:
    """Return the learning rates of a run, in words."""
    return f"{record['settings']['lr']:g}, {record['settings']['unitary_lr']:g}"


def _looks(panels: Any, looks: list[dict[str, float]], style: dict[str, Any]) -> None:
    """Draw scores and, where there is a panel for it, the range of singular values."""
    steps = [look["step"] for look in looks]
    panels[0].plot(steps, [look["score"] for look in looks], **style)
    for panel in panels[1:]:
        for end in ("smallest", "largest"):
            panel.plot(steps, [max(look[end], 1e-6) for look in looks], **style)


def study(path: Path, cells: list[dict[str, Any]]) -> None:
    """Draw a panel for each task: of every variant the median loss of the seeds after equal steps, and the range."""
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    names = list(dict.fromkeys(map(_variant, cells)))
    figure = Figure(figsize=(9, 0.36 * len(names) + 1.3), layout="constrained")
    for panel, task in zip(figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0], tasks, strict=True):
        of_task = [cell for cell in cells if cell["task"] == task]
        for cell in of_task:
            height, colour = names.index(_variant(cell)), {1: "tab:blue", 4: "tab:orange"}.get(cell["k"], "tab:gray")
            height += -0.14 if cell["k"] == 1 else 0.14
            panel.plot([min(cell["losses"]), max(cell["losses"])], [height] * 2, color=colour, linewidth=1.2)
            panel.plot(median(cell["losses"]), height, "o", color=colour, markersize=5)
        losses = [loss for cell in of_task for loss in cell["losses"]]
        wide = max(losses) > 100 * min(losses)
        panel.set(xscale="log", xlabel="loss after equal steps")
        panel.set_title(task, fontsize=11)
        panel.xaxis.set_major_locator(LogLocator(numticks=5) if wide else LogLocator(subs=(1.0, 2.0, 5.0)))
        if not wide:
            panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3)
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    dots = [
        Line2D([], [], color=colour, marker="o", label=f"k = {k}") for k, colour in ((1, "tab:blue"), (4, "tab:orange"))
    ]
    figure.legend(handles=dots, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def _variant(cell: dict[str, Any]) -> str:
    return cell["sampler"] if cell["rest"] == "dropped" else ", ".join(filter(None, (cell["sampler"], cell["rest"])))


def premise(path: Path, trainings: list[dict[str, Any]]) -> None:
    """Draw for each task the share of rank-k parts of G and of RMSprop's move, and how far derivatives reach back."""
    tasks = list(dict.fromkeys(training["task"] for training in trainings))
    figure = Figure(figsize=(9, 3.6 * len(tasks)), layout="constrained")
    for row, task in zip(figure.subplots(len(tasks), 2, squeeze=False), tasks, strict=True):
        of_task = [training for training in trainings if training["task"] == task]
        seen = of_task[0]["observations"]
        for k, colour in (("1", "tab:blue"), ("4", "tab:green"), ("16", "tab:purple")):
            steps = [o["step"] for o in seen]
            row[0].plot(steps, [o["share"][k] for o in seen], color=colour, label=f"k = {k}")
            row[0].plot(steps, [o["share_of_move"][k] for o in seen], ":", color=colour, linewidth=1)
        row[0].set(xlabel="step", ylabel="‖G_k‖ / ‖G‖", ylim=(0, 1.02))
        row[0].set_title(f"{task}: G (solid), RMSprop's move (dotted)", fontsize=10)
        for training, colour in zip(of_task, ("tab:blue", "tab:orange", "tab:gray"), strict=True):
            for o, dash, when in ((training["observations"][0], ":", None), (training["observations"][-1], "-", "")):
                norms = [value or None for value in o["states"]]  # nothing at all cannot be drawn
                label = None if when is None else training["network"]
                row[1].plot(range(1, len(norms) + 1), norms, dash, color=colour, label=label)
        row[1].set(xlabel="t", ylabel="‖∂L/∂h_t‖", yscale="log")
        row[1].set_title("derivatives at the start (dotted) and the end", fontsize=10)
        for panel in row:
            panel.grid(alpha=0.3)
        label_ends(row[0])
    handles, labels = row[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150)
