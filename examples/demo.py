"""Compare projUNN with geoopt's Stiefel: the same recurrent network, trained on two tasks that need memory.

A modReLU network with an orthogonal transition learns (a) copying memory and (b) scikit-learn's
handwritten digits read pixel by pixel in a fixed permutation.  The transition lives on
:class:`~projunn_manifold.UnitaryLowRank` or :class:`~projunn_manifold.UnitaryLowRankExact` with k = 1, or on
geoopt's Stiefel manifold with either metric; geoopt's Riemannian Adam moves it.  Initial weights and
batches are the same for all methods, and each has the best learning rate that ``--grid`` found for it.

Run ``python examples/demo.py``, or ``make demo``.  It leaves ``results.json``, ``table.md`` and
``compare_stiefel.png`` in the output folder, and fails if a low-rank run did not solve copying.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import geoopt
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from common.demo_results import CAPTION, draw, grid_table, results_table, verdict, write_json
from common.networks import METHODS, Choices
from common.tasks import Copying, Pixels, Task
from common.training import Run, train

from projunn_manifold import UnitaryLowRank

DENSE_RATE = 1e-3  # of RMSprop, which moves all but the transition, the same for every method
RATES = {
    "projUNN-D, RAdam": {"copying": 0.03, "permuted digits": 0.03},
    "projUNN-T, RAdam": {"copying": 0.03, "permuted digits": 0.03},
    "Stiefel-euclidean, RAdam": {"copying": 0.03, "permuted digits": 0.03},
    "Stiefel-canonical, RAdam": {"copying": 0.01, "permuted digits": 0.01},
}  # the best rates that --grid found
GRID = (0.003, 0.01, 0.03, 0.1, 0.3)
FULL = {"steps": 600, "epochs": 40, "length": 200, "hidden": 128, "batch": 128}
QUICK = {"steps": 20, "epochs": 1, "length": 20, "hidden": 32, "batch": 64}


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison, or the search, and return the exit status."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    compile_loops()
    start = perf_counter()
    runs = [
        train(task, METHODS[name], choices(options, rate))
        for task in tasks(options)
        for name in options.methods
        for rate in (GRID if options.grid else (RATES[name][task.name],))
    ]
    seconds = perf_counter() - start
    return (report_grid if options.grid else report_comparison)(runs, options, seconds)


def compile_loops() -> None:
    """Make two steps, so that no training is timed while numba compiles."""
    print("compiling the package's loops, once on this machine: up to half a minute", flush=True)
    manifold = UnitaryLowRank(k=1)
    for _ in range(2):
        p = geoopt.ManifoldParameter(manifold.random(8, 8), manifold=manifold)
        p.grad = torch.ones(8, 8)
        geoopt.optim.RiemannianAdam([p], lr=0.1).step()


def tasks(options: argparse.Namespace) -> list[Task]:
    """Return the tasks asked for."""
    chosen: list[Task] = []
    if options.task in ("copying", "both"):
        chosen.append(Copying(options.length, options.batch, options.steps, options.seed))
    if options.task in ("digits", "both"):
        chosen.append(Pixels(options.batch, options.epochs, options.seed))
    return chosen


def choices(options: argparse.Namespace, rate: float) -> Choices:
    """Return what all methods have in common, and a rate for the transition."""
    return Choices(
        options.hidden,
        seed=options.seed,
        nonlinearity="modrelu",
        lr=DENSE_RATE,
        unitary_lr=rate,
    )


def report_grid(runs: list[Run], options: argparse.Namespace, seconds: float) -> int:
    """Write and print the search over learning rates."""
    write_json(options.out / "grid.json", runs, settings(options), seconds)
    print(f"\nfinal training loss by learning rate, the lowest starred\n\n{grid_table(runs)}\n")
    print(f"{seconds:.0f} s in all; written to {options.out}/grid.json")
    return 0


def report_comparison(runs: list[Run], options: argparse.Namespace, seconds: float) -> int:
    """Write the table, the JSON and the picture, print the table and the verdict."""
    table = results_table(runs)
    write_json(options.out / "results.json", runs, settings(options), seconds)
    (options.out / "table.md").write_text(table + "\n", encoding="utf-8")
    draw(options.out / "compare_stiefel.png", runs)
    print(f"\n{table}\n\n{CAPTION}\n")
    print(f"{seconds:.0f} s in all; written to {options.out}: results.json, table.md, compare_stiefel.png")
    if options.quick:
        print("A smoke run, too short to judge whether copying is solved.")
        return 0
    solved, sentence = verdict(runs)
    print(sentence)
    print(
        "Rank-one steps pay for large n: at n = 128 a dense one costs no more, and uses the whole gradient.  What the "
        "table says is\nexplained in docs/reference/experiments.md, and docs/howto/speed.md times steps up to n = 4096."
    )
    return 0 if solved else 1


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that results depend on."""
    return {name: value for name, value in vars(options).items() if name != "out"}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line; sizes not given are those of a full run, or of a smoke run under ``--quick``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=("copying", "digits", "both"), default="both", help="default: both")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=RATES,
        default=list(RATES),
        metavar="METHOD",
        help=f"from {', '.join(RATES)} (default: all)",
    )
    for name, what in (
        ("steps", "training steps on copying"),
        ("epochs", "passes over the training images of digits"),
        ("length", "steps T over which copying must remember"),
        ("hidden", "hidden units n: the transition is n x n"),
        ("batch", "sequences in a batch"),
    ):
        number = _at_least(2 if name == "hidden" else 1)
        defaults = f"default: {FULL[name]}; quick: {QUICK[name]}"
        parser.add_argument(f"--{name}", type=number, metavar="N", help=f"{what} ({defaults})")
    parser.add_argument("--seed", type=_at_least(0), default=0, metavar="N", help="of weights, batches and sketches")
    parser.add_argument("--threads", type=_at_least(1), default=1, metavar="N", help="for PyTorch (default: 1)")
    parser.add_argument("--grid", action="store_true", help=f"train at each of the rates {', '.join(map(str, GRID))}")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few seconds")
    parser.add_argument(
        "--out", type=_folder, default=Path("results/compare_stiefel"), metavar="DIR", help="default: %(default)s"
    )
    options = parser.parse_args(arguments)
    for name, default in (QUICK if options.quick else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    return options


def _at_least(least: int) -> Callable[[str], int]:
    """Return an argparse type for whole numbers from ``least`` on."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return value

    return number


def _folder(text: str) -> Path:
    """Read a path that is a folder, or can become one."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, got the file {text!r}")
    return path


if __name__ == "__main__":
    sys.exit(main())
