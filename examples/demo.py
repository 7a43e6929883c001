"""See what projUNN is for, in four panels: time to the goal, a deep network, nothing lost, step times.

1. *rotation*: an unknown rotation of 1024 dimensions is learnt from 16 samples a step, the paper's first experiment.
2. *deep network*: ten orthogonal layers of 1024 x 1024 on scikit-learn's digits.  It shows what a step costs, and no
   more: a network whose square layers never move does as well there.
3. *narrow network*: a recurrent network of 48 units adds two marked numbers out of twenty.  Here its transition must
   learn: a frozen one is far behind, and nothing is lost against whole gradients on Stiefel.
4. *step times*: a training step of one square layer, from n = 64 to 4096.

Run ``python examples/demo.py``, or ``make demo`` (at most 8 minutes on two cores).  It prints a table and a verdict
that is computed from it, leaves ``demo.json`` and ``demo.png`` in the output folder, and fails if a claim fails.  What
is trained, and how, stands in ``experiments/common/recipes.py``; the learning rates are those of
``docs/results/demo_rates.json``, which ``--study`` finds.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from time import perf_counter
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from common.demo_figure import draw
from common.demo_table import CAPTION, table
from common.demo_verdict import Row, verdict
from common.recipes import Panel, Recipe, panels, timed
from common.report import environment, thinned
from common.step_times import step_times
from common.training import NonFiniteError, Run

from projunn_manifold import warm_up

RATES = Path(__file__).parents[1] / "docs" / "results" / "demo_rates.json"
STUDY_SEED = 100  # apart from those of the demo


def main(arguments: list[str] | None = None) -> int:
    """Run the demo, or the study of its learning rates, and return the exit status."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    warm_up(torch.float32)
    if options.study:
        return study(options)
    rates = json.loads(RATES.read_text(encoding="utf-8"))["rates"]
    start = perf_counter()
    rows = [
        trained(panel, recipe, rates[panel.name].get(recipe.name, {}).get("rate"), options.seed)
        for panel in panels(options.quick)
        for recipe in panel.recipes
    ]
    rows += times(options.quick)
    seconds = perf_counter() - start
    report = {"quick": options.quick, "seconds": round(seconds), **environment(), "rows": rows}
    (options.out / "demo.json").write_text(json.dumps(report) + "\n", encoding="utf-8")
    draw(options.out / "demo.png", rows)
    print(f"\n{table(rows)}\n\n{CAPTION}\n")
    print(f"{seconds:.0f} s in all; written to {options.out}: demo.json, demo.png\n")
    if options.quick:
        print("A smoke run, too small to judge.")
        return 0
    claims = verdict(rows)
    print("\n".join(claim.told for claim in claims))
    return 0 if all(claim.holds for claim in claims) else 1


def trained(panel: Panel, recipe: Recipe, rate: float | None, seed: int) -> Row:
    """Train a method from each of a panel's seeds, and return its row of the table."""
    runs = [
        panel.train(recipe, rate, seed + i, stop_when_solved=True, seconds=recipe.seconds) for i in range(panel.seeds)
    ]
    return {
        "panel": panel.name,
        "method": recipe.name,
        "n": panel.choices.hidden,
        "rate": rate,
        "steps": len(runs[0].losses),
        "seconds": fmean(run.seconds[-1] for run in runs),
        "goal": runs[0].goal,
        "measure": runs[0].measure,
        "loss": fmean(run.final_loss for run in runs),
        "scores": [run.score for run in runs],
        "reached": runs[0].solved,  # None where a task has no goal
        "step_ms": median(ms for run in runs for ms in run.optimiser_ms),
        "whole_ms": median(1e3 * (b - a) for run in runs for a, b in pairwise(run.seconds)),
        "memory_mb": runs[0].held / 1e6,
        "unitarity_error": runs[0].unitarity[-1],
        "curves": [curve(run) for run in runs],
    }


def curve(run: Run) -> dict[str, Any]:
    """Return what is drawn of a training."""
    kept, at = thinned(len(run.losses)), [look["step"] - 1 for look in run.looks]
    return {
        "step": [i + 1 for i in kept],
        "seconds": [round(run.seconds[i], 4) for i in kept],
        "loss": [float(f"{run.running_mean[i]:.4g}") for i in kept],
        "looks": {
            "step": [i + 1 for i in at],
            "seconds": [round(run.seconds[i], 4) for i in at],
            "score": [round(look["score"], 4) for look in run.looks],
        },
    }


def times(quick: bool) -> list[Row]:
    """Return a row for each method whose steps are timed; what the table says of it is at n = 1024."""
    rows = []
    for name, method, k, sizes in timed(quick):
        found = step_times(method, k, sizes, 0.05 if quick else 0.5)
        n = min(1024, sizes[-1])
        rows.append({"panel": "step times", "method": name, "n": n, **found[n], "sizes": found})
        print(f"step times, {name}: {found[n]['whole_ms']:.3g} ms at n = {n}", flush=True)
    return rows


def study(options: argparse.Namespace) -> int:
    """Try all rates of all recipes from another seed, keep the losses, and say which is best."""
    found: dict[str, Any] = {}
    for panel in panels(options.quick):
        for recipe in panel.recipes:
            if recipe.rates:
                losses = {rate: tried(panel, recipe, rate) for rate in recipe.rates}
                best = min((loss, rate) for rate, loss in losses.items() if loss is not None)[1]
                found.setdefault(panel.name, {})[recipe.name] = {"rate": best, "tried": losses}
    record = {"rates": found, "seed": STUDY_SEED, **environment()}
    (options.out / "demo_rates.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {options.out}: demo_rates.json")
    return 0


def tried(panel: Panel, recipe: Recipe, rate: float) -> float | None:
    """Return the last losses at a rate, or None if the training diverges."""
    try:
        return panel.train(recipe, rate, STUDY_SEED, trial=recipe.trial).final_loss
    except NonFiniteError:
        return None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few seconds")
    parser.add_argument("--study", action="store_true", help="find the learning rates, and write demo_rates.json")
    parser.add_argument("--out", type=Path, default=Path("results/demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="for PyTorch (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, batches and sketches")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    sys.exit(main())
