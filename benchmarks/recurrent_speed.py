"""A training step of UnitaryRNN against torch.nn.RNN, a Python loop, and torch's orthogonal parametrisations.

A step is forward, backward and optimiser, with inputs of width 10; every time is a multiple of what
``torch.nn.RNN(relu)`` with SGD takes at the same shape in the same run, medians with quartiles.  States are compared
before they are timed.

Run ``python benchmarks/recurrent_speed.py`` (about five minutes).  It leaves ``recurrent_speed.json`` in the output
folder; ``--record JSON --into PAGE`` writes the table of a recorded run into a page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from common.report import add_record_options, environment, machine_of, recorded, tell
from suite.timing import spread

from projunn_manifold import UnitaryLowRank
from projunn_manifold.layers import UnitaryRNN, param_groups
from projunn_manifold.optim import RiemannianSGD

WIDTH = 10
SHAPES = ((784, 128, 170), (1000, 128, 190), (784, 16, 170), (100, 32, 1024), (50, 16, 2048))
QUICK = ((20, 4, 32),)
RATE = 1e-6  # nothing is learnt here
LARGE = 1024  # from here on the parametrisations are timed
BARS = {  # (T, B, n) -> factored, dense, times faster than a loop
    (784, 128, 170): (1.0, 1.15, 1.0),
    (1000, 128, 190): (1.0, 1.15, 1.0),
    (784, 16, 170): (None, None, 1.4),
    (100, 32, 1024): (0.85, 1.15, 1.0),
    (50, 16, 2048): (0.65, 1.15, 1.0),
}


Subject = tuple[nn.Module, torch.optim.Optimizer]


def plain(n: int) -> Subject:
    """Return torch's network and SGD."""
    network = nn.RNN(WIDTH, n, nonlinearity="relu")
    nn.init.orthogonal_(network.weight_hh_l0)
    return network, torch.optim.SGD(network.parameters(), lr=RATE)


def ours(n: int, nonlinearity: Any, *, form: bool = False) -> Subject:
    """Return a unitary network and its optimiser; ``form``: with the gradient formed, as any network's."""
    network = UnitaryRNN(WIDTH, n, nonlinearity=nonlinearity, init="haar", manifold=UnitaryLowRank(1))
    if form:
        network.weight_hh_l0.register_hook(lambda grad: grad.clone())
    return network, RiemannianSGD(param_groups(network, lr=RATE, unitary_lr=RATE / 32), lr=RATE)


def parametrised(n: int, kind: str) -> Subject:
    """Return torch's network with an orthogonal parametrisation of its transition, and SGD."""
    network = nn.RNN(WIDTH, n, nonlinearity="relu")
    nn.init.orthogonal_(network.weight_hh_l0)
    orthogonal(network, "weight_hh_l0", orthogonal_map=kind)
    return network, torch.optim.SGD(network.parameters(), lr=RATE)


def subjects(n: int) -> dict[str, Subject]:
    """Return everything that is timed with n states."""
    found = {
        "torch.nn.RNN(relu), SGD": plain(n),
        "UnitaryRNN(relu)": ours(n, "relu"),
        "UnitaryRNN(relu), dense gradient": ours(n, "relu", form=True),
        "UnitaryRNN(modrelu)": ours(n, "modrelu"),
        "UnitaryRNN(modrelu), dense gradient": ours(n, "modrelu", form=True),
        "the same cell (relu) as a Python loop": ours(n, torch.relu),
    }
    if n >= LARGE:
        found |= {f"parametrizations.orthogonal, {kind}": parametrised(n, kind) for kind in ("matrix_exp", "cayley")}
    return found


def step_of(subject: Subject, x: Tensor, g: Tensor) -> Callable[[], None]:
    """Return a training step."""
    network, optimizer = subject

    def step() -> None:
        optimizer.zero_grad()
        network(x)[0].backward(g)
        optimizer.step()

    return step


def check(n: int, x: Tensor) -> None:
    """Compare the states with those of torch's network of the same weights, and of the loop."""
    network = UnitaryRNN(WIDTH, n, nonlinearity="relu", init="haar")
    loop = UnitaryRNN(WIDTH, n, nonlinearity=torch.relu)
    loop.load_state_dict(network.state_dict())
    states = network(x[:10])[0]
    for other in (network.to_plain(), loop):
        if not torch.allclose(states, other(x[:10])[0], rtol=1e-3, atol=1e-4):
            raise RuntimeError(f"wrong states at n = {n}, not timed")


def measure(shape: tuple[int, int, int], rounds: int, progress: Callable[[str], object]) -> dict[str, Any]:
    """Time all subjects in turn, round by round; return seconds and their ratios to torch's network in that round."""
    steps, batch, n = shape
    torch.manual_seed(0)
    x, g = torch.randn(steps, batch, WIDTH), torch.randn(steps, batch, n) / n
    check(n, x)
    seconds: dict[str, list[float]] = {}
    made = {name: step_of(subject, x, g) for name, subject in subjects(n).items()}
    for name, step in made.items():
        begin = perf_counter()
        step()
        seconds[name] = []
        progress(name)
        if perf_counter() - begin > 20:  # seconds: once is enough
            seconds[name] = [perf_counter() - begin]
    for _ in range(rounds):
        for name, step in made.items():
            if len(seconds[name]) == 1 and seconds[name][0] > 20:
                continue
            begin = perf_counter()
            step()
            seconds[name].append(perf_counter() - begin)
            progress(name)
    yard = seconds["torch.nn.RNN(relu), SGD"]
    ratios = {
        name: spread(
            [time / median(yard) if len(times) < len(yard) else time / yard[i] for i, time in enumerate(times)]
        )
        for name, times in seconds.items()
    }
    return {
        "shape": shape,
        "seconds": {name: spread(times) for name, times in seconds.items()},
        "ratio": ratios,
        "bars": _bars(shape, ratios),
    }


def _bars(shape: tuple[int, int, int], ratios: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the shape was to reach, and what it did."""

    def ratio(name: str) -> float:
        return float(ratios[name]["median"])

    factored, dense, loop = BARS.get(shape, (None, None, None))
    found = [("a whole step (relu)", "≤", factored, ratio("UnitaryRNN(relu)"))]
    found += [
        (f"with a dense gradient ({name})", "≤", dense, ratio(f"UnitaryRNN({name}), dense gradient"))
        for name in ("relu", "modrelu")
    ]
    times = ratio("the same cell (relu) as a Python loop") / ratio("UnitaryRNN(relu), dense gradient")
    found.append(("speed-up over a loop", "≥", loop, times))
    for name in ratios:
        if name.startswith("parametrizations"):
            found.append((f"speed-up over {name}", "≥", 10.0, ratio(name) / ratio("UnitaryRNN(relu)")))
    return [
        {"what": what, "limit": f"{sign} {limit:g}", "measured": float(f"{value:.3g}"), "met": _met(sign, limit, value)}
        for what, sign, limit, value in found
        if limit is not None
    ]


def _met(sign: str, limit: float, value: float) -> bool:
    return value <= limit if sign == "≤" else value >= limit


def table(record: dict[str, Any]) -> str:
    """Return all ratios, a row for each subject."""
    shapes = [tuple(cell["shape"]) for cell in record["cells"]]
    names = list(dict.fromkeys(name for cell in record["cells"] for name in cell["ratio"]))
    lines = [
        f"| method | {' | '.join(str(shape) for shape in shapes)} |",
        f"|---|{'---:|' * len(shapes)}",
        "| torch.nn.RNN(relu), SGD (s) | "
        + " | ".join(f"{cell['seconds'][names[0]]['median']:.3g}" for cell in record["cells"])
        + " |",
    ]
    for name in names[1:]:
        found = (cell["ratio"].get(name) for cell in record["cells"])
        cells = (f"{r['median']:.2f} ({r['lower']:.2f}–{r['upper']:.2f})" if r else "" for r in found)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(record: dict[str, Any]) -> str:
    """Return every bar with what was measured."""
    lines = ["| (T, B, n) | bar | limit | measured | verdict |", "|---|---|---:|---:|---|"]
    for cell in record["cells"]:
        for bar in cell["bars"]:
            verdict = "met" if bar["met"] else "MISSED"
            shape = tuple(cell["shape"])
            what = bar["what"].replace("times faster than", "speed-up over")  # in older records
            lines.append(f"| {shape} | {what} | {bar['limit']} | {bar['measured']:g} | {verdict} |")
    return "\n".join(lines)


def measure_all(shapes: tuple[tuple[int, int, int], ...], rounds: int) -> dict[str, Any]:
    """Time every shape."""
    cells = []
    with tqdm(unit="step", disable=None) as progress:
        for shape in shapes:

            def show(name: str, shape: tuple[int, int, int] = shape) -> None:
                progress.set_description(f"{shape}: {name}")
                progress.update()

            cells.append(measure(shape, rounds, show))
    return {"quick": shapes is QUICK, **environment(), "cells": cells}


def main(arguments: list[str] | None = None) -> int:
    """Time everything, or show a record."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--quick", action="store_true", help="one small shape")
    command.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    command.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    add_record_options(command, "results/recurrent_speed")
    options = command.parse_args(arguments)
    torch.set_num_threads(options.threads)
    shapes = QUICK if options.quick else SHAPES
    record = recorded(options, "recurrent_speed", lambda: measure_all(shapes, options.rounds))
    tell(options, "recurrent speed", f"One run on {machine_of(record)}:\n\n{table(record)}")
    print(f"\n{verdicts(record)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
