"""Pre-trained weights made unitary, against a unitary network from scratch: epochs to the same accuracy.

A plain network (hidden layers of torch's Linear and ReLU, on scikit-learn's digits) is trained; ``unitarize`` replaces
the weights of its hidden layers by the closest unitary ones, and projUNN trains it on.  Run
``python examples/pretrained.py`` (a few minutes); ``--record JSON --into PAGE`` writes the table of a recorded run
into a page.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from common.data import digits
from common.report import add_record_options, environment, machine_of, markdown, recorded, tell

from projunn_manifold import unitarize
from projunn_manifold.layers import param_groups
from projunn_manifold.optim import constrain

LEVELS = (0.8, 0.9, 0.95)
BATCH = 128
COLOURS = {
    "plain": "tab:gray",
    "plain, trained on": "black",
    "polar": "tab:blue",
    "procrustes": "tab:green",
    "from scratch": "tab:red",
}


def fresh(layers: int, seed: int) -> nn.Sequential:
    """Return a plain network of torch's, of so many hidden layers."""
    torch.manual_seed(seed)
    hidden = [module for _ in range(layers) for module in (nn.Linear(64, 64), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(64, 10))


def images() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return training and test images ``(images, 64)`` with their labels."""
    (train, train_labels), (test, test_labels) = digits(False)
    return (train[..., 0].T, train_labels), (test[..., 0].T, test_labels)


def train(network: nn.Module, epochs: int, options: argparse.Namespace, seed: int, label: str) -> list[float]:
    """Train by RMSprop, what is on a manifold by projUNN; return the test accuracy before, and after every epoch."""
    optimizer = torch.optim.RMSprop(param_groups(network, options.lr, unitary_lr=options.unitary_lr))
    constrain(optimizer)
    (pixels, labels), _ = images()
    generator = torch.Generator().manual_seed(seed)
    scores = [accuracy(network)]
    for _ in tqdm(range(epochs), f"{label}, seed {seed}", leave=False, disable=None, unit="epoch"):
        for chosen in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(network(pixels[chosen]), labels[chosen]).backward()
            optimizer.step()
        scores.append(accuracy(network))
    return scores


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    """Return the share of test images that are recognised."""
    _, (pixels, labels) = images()
    return (network(pixels).argmax(-1) == labels).double().mean().item()


def histories(options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """Train all networks from one seed."""
    plain = fresh(options.layers, seed)
    found = [{"name": "plain", "accuracy": train(plain, options.before, options, seed, "plain")}]
    inside = [f"{2 * i}.weight" for i in range(options.layers)]
    (pixels, _), _ = images()
    for name in ("plain, trained on", "polar", "procrustes", "from scratch"):
        network = fresh(options.layers, seed) if name == "from scratch" else copy.deepcopy(plain)
        cell: dict[str, Any] = {"name": name}
        if name != "plain, trained on":
            seen = {"method": "procrustes", "inputs": pixels} if name == "procrustes" else {}
            cell["distance"] = [c.distance for c in unitarize(network, inside, k=options.k, **seen)]
        cell["accuracy"] = train(network, options.epochs, options, seed + 100, name)
        found.append(cell)
    return [{**cell, "seed": seed} for cell in found]


def table(record: dict[str, Any]) -> str:
    """Return epochs to each accuracy, medians over seeds."""
    rows = [["network", "distance moved", *(f"epochs to {level:.0%}" for level in LEVELS)]]
    rows[0] += ["initial accuracy", "final accuracy"]
    for name in COLOURS:
        cells = [cell for cell in record["cells"] if cell["name"] == name]
        moved = [d for cell in cells for d in cell.get("distance", [])]
        about = f"{median(moved):.2g}" if moved else ""
        reached = [[_first(cell["accuracy"], level) for cell in cells] for level in LEVELS]
        ends = [median(cell["accuracy"][i] for cell in cells) for i in (0, -1)]
        epochs = ["–" if None in some else f"{median(some):g}" for some in reached]
        rows.append([name, about, *epochs, *(f"{end:.1%}" for end in ends)])
    return markdown(rows)


def _first(accuracy: list[float], level: float) -> int | None:
    return next((epoch for epoch, score in enumerate(accuracy) if score >= level), None)


def draw(path: Path, record: dict[str, Any]) -> None:
    """Draw accuracies against epochs, medians over seeds and the seeds; on the right with all epochs before."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name, colour in COLOURS.items():
        curves = [cell["accuracy"] for cell in record["cells"] if cell["name"] == name]
        later = record["settings"]["before"] if name not in ("plain", "from scratch") else 0
        for panel, shift in zip(panels, (0, later), strict=True):
            epochs = [shift + i for i in range(len(curves[0]))]
            for scores in curves:
                panel.plot(epochs, scores, color=colour, alpha=0.2, linewidth=0.8)
            middle = [median(scores) for scores in zip(*curves, strict=True)]
            panel.plot(epochs, middle, color=colour, linewidth=1.8, label=name if panel is panels[0] else None)
    panels[0].set(xlabel="epochs of its own", ylabel="test accuracy")
    panels[1].set(xlabel="epochs, those of the plain network before it included")
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Train all, report, and return the exit status."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--before", type=int, default=40, help="epochs of the plain network (default: %(default)s)")
    command.add_argument("--epochs", type=int, default=40, help="of the others (default: %(default)s)")
    command.add_argument("--layers", type=int, default=4, help="hidden, of 64 units (default: %(default)s)")
    command.add_argument("--k", type=int, default=1, help="rank of the moves (default: %(default)s)")
    command.add_argument("--lr", type=float, default=1e-3, help="(default: %(default)s)")
    command.add_argument("--unitary-lr", type=float, default=1e-3, help="of the transition (default: %(default)s)")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="(default: %(default)s)")
    add_record_options(command, "results/pretrained")
    options = command.parse_args(arguments)
    torch.set_num_threads(1)
    names = ("before", "epochs", "layers", "k", "lr", "unitary_lr", "seeds")
    record = recorded(
        options,
        "pretrained",
        lambda: {
            "settings": {name: getattr(options, name) for name in names},
            "cells": [cell for seed in options.seeds for cell in histories(options, seed)],
            **environment(),
        },
    )
    options.out.mkdir(parents=True, exist_ok=True)
    draw(options.out / "pretrained.png", record)
    settings = ", ".join(f"{name} {value}" for name, value in record["settings"].items())
    text = f"\n{table(record)}\n\nMedians over seeds.  Options: {settings}.  Measured on {machine_of(record)}.\n"
    tell(options, "pretrained", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
