"""How far rounding takes a point off its manifold: 100 000 steps of projUNN, beside geoopt's Stiefel and an SVD.

Points make random steps a b^H of rank one (once of rank four) and a given length, by projUNN-T, by projUNN-D along the
tangent and by raw projUNN-D, or are trained by geoopt's optimisers on noisy data.  The error is ‖X^H X - I‖_F/√m in
double precision.

Run ``python benchmarks/drift.py`` (half an hour on two cores).  It leaves ``drift.json`` and ``drift.png`` in the
output folder, and fails if an error of this package exceeds its promise: 1e-6 in single, 5e-15 in double precision.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from time import perf_counter
from typing import Any

import geoopt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from common.labels import label_ends
from common.report import add_record_options, environment, machine_of, recorded, tell

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, projunn_d_
from projunn_manifold.linalg import dense
from projunn_manifold.sketching.factored_tensor import FactoredTensor
from projunn_manifold.sketching.lowrank import LowRank

Step = Callable[[], Tensor]  # makes one step and returns the point
PROMISED = {torch.float32: 1e-6, torch.complex64: 1e-6, torch.float64: 5e-15}
SIZES = (0.02, 0.5)
POINTS = {
    "n = 128": (torch.float32, (128, 128)),
    "n = 512": (torch.float32, (512, 512)),
    "4 blocks, n = 64": (torch.complex64, (4, 64, 64)),
    "n = 128, double": (torch.float64, (128, 128)),
    "n = 512, double": (torch.float64, (512, 512)),
}
#: Who is drawn beside this package, under which name and how; the table has all.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "projUNN-D, T alike": ("this package", {"color": "tab:blue"}),
    "the same, sweep=None": ("this package, sweep=None", {"color": "tab:blue", "linestyle": "--"}),
    "SVD in every step": ("SVD in every step", {"color": "0.6"}),
    "Stiefel canonical": ("CanonicalStiefel", {"color": "0.2"}),
    "Stiefel canonical, stabilize=100": ("CanonicalStiefel, stabilize=100", {"color": "0.2", "linestyle": "--"}),
    "Stiefel Euclidean": ("EuclideanStiefel", {"color": "0.4"}),
}
WALKS = 100_000
RIVALS = TRAINING = 20_000


@dataclass(frozen=True)
class Course:
    """One curve: who moves, from which point, by steps of which length, and what was promised."""

    panel: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    size: float | None  # length of a step; None: training
    steps: int
    start: Callable[[Course], Step]
    promised: float | None
    rank: int = 1


# -- random walks -----------------------------------------------------------------------------------


def directions(course: Course) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a source of random factors with ‖a‖‖b‖ the length of a step, its own for every shape and length."""
    *batch, n, m = course.shape
    generator = torch.Generator().manual_seed(1)

    def draw() -> tuple[Tensor, Tensor]:
        shapes = ((*batch, side, course.rank) for side in (n, m))
        a, b = (torch.randn(shape, dtype=course.dtype, generator=generator) for shape in shapes)
        return dense.normalized(a) * course.size, dense.normalized(b)

    return draw


def first_point(course: Course) -> Tensor:
    """Return a random point on the manifold."""
    generator = torch.Generator().manual_seed(0)
    return dense.haar(*course.shape, dtype=course.dtype, generator=generator).contiguous()


def along_tangents(manifold: UnitaryLowRank, course: Course) -> Step:
    """Move by the manifold's own steps, given the factors of each gradient."""
    x, draw = first_point(course), directions(course)
    return lambda: manifold.step_(x, FactoredTensor(LowRank(*draw())), -1.0)


def along_raw_factors(manifold: UnitaryLowRank, course: Course) -> Step:
    """Move by projUNN-D as the paper has it, with the manifold's correction."""
    x, draw = first_point(course), directions(course)
    return lambda: manifold.correct_(projunn_d_(x, *draw()))


def on_stiefel(stiefel: geoopt.Stiefel, stabilize: int | None, course: Course) -> Step:
    """Move on geoopt's Stiefel manifold, projected every ``stabilize`` steps."""
    x, draw, count = first_point(course), directions(course), 0

    def step() -> Tensor:
        nonlocal x, count
        a, b = draw()
        x, count = stiefel.retr(x, stiefel.egrad2rgrad(x, a @ b.mH)), count + 1
        if stabilize is not None and count % stabilize == 0:
            x = stiefel.projx(x)
        return x

    return step


def by_svd(course: Course) -> Step:
    """Move to the polar factor of X + a b^H through a dense SVD."""
    x, draw = first_point(course), directions(course)

    def step() -> Tensor:
        nonlocal x
        a, b = draw()
        u, _, vh = torch.linalg.svd(x + a @ b.mH)
        x = u @ vh
        return x

    return step


# -- training ---------------------------------------------------------------------------------------


def training(build: Callable[[list[Any]], torch.optim.Optimizer], manifold: UnitaryLowRank, course: Course) -> Step:
    """Fit an orthogonal matrix to noisy data by one of geoopt's optimisers."""
    w = geoopt.ManifoldParameter(first_point(course), manifold=manifold)
    generator = torch.Generator().manual_seed(2)
    target = dense.haar(*course.shape, dtype=course.dtype, generator=generator)
    optimizer = build([w])

    def step() -> Tensor:
        data = torch.randn(course.shape[-1], 16, dtype=course.dtype, generator=generator)
        answers = target @ data + 0.1 * torch.randn(data.shape, dtype=course.dtype, generator=generator)
        optimizer.zero_grad()
        ((w @ data - answers).square().sum() / 32).backward()
        optimizer.step()
        return w.detach()

    return step


# -- all curves -------------------------------------------------------------------------------------


def courses(walk: int, rivals: int, train: int) -> list[Course]:
    """Return every curve, with so many steps for each of the three kinds."""
    ways = {
        "T": lambda: partial(along_tangents, UnitaryLowRankExact()),
        "D along the tangent": lambda: partial(along_tangents, UnitaryLowRank()),
        "raw D": lambda: partial(along_raw_factors, UnitaryLowRank()),
    }
    found = [
        Course(panel, name, dtype, shape, size, walk, way(), PROMISED[dtype])
        for panel, (dtype, shape) in POINTS.items()
        for size in SIZES
        for name, way in ways.items()
    ]
    found += [
        Course("n = 128, rank 4", name, torch.float32, (128, 128), size, walk, partial(along_tangents, cls(4)), 1e-6, 4)
        for size in SIZES
        for name, cls in (("T", UnitaryLowRankExact), ("D along the tangent", UnitaryLowRank))
    ]
    others = {
        "projUNN-D, T alike": partial(along_tangents, UnitaryLowRank()),
        "the same, sweep=None": partial(along_tangents, UnitaryLowRank(sweep=None)),
        "SVD in every step": by_svd,
    }
    for stiefel, name in ((geoopt.CanonicalStiefel(), "canonical"), (geoopt.EuclideanStiefel(), "Euclidean")):
        for stabilize in (None, 100):
            suffix = "" if stabilize is None else f", stabilize={stabilize}"
            others[f"Stiefel {name}{suffix}"] = partial(on_stiefel, stiefel, stabilize)
    point = POINTS["n = 128"]
    for size in SIZES:
        panel = f"rivals, steps of {size:g}"
        found += [Course(panel, name, *point, size, rivals, start, None) for name, start in others.items()]
    optimisers = {
        "RiemannianSGD, momentum": lambda params: geoopt.optim.RiemannianSGD(params, lr=0.02, momentum=0.9),
        "RiemannianAdam": lambda params: geoopt.optim.RiemannianAdam(params, lr=0.05),
    }
    found += [
        Course(
            "training",
            f"{name}, {letter}",
            torch.float32,
            (128, 128),
            None,
            train,
            partial(training, build, cls()),
            1e-6,
        )
        for name, build in optimisers.items()
        for letter, cls in (("D", UnitaryLowRank), ("T", UnitaryLowRankExact))
    ]
    return found


def follow(course: Course) -> dict[str, Any]:
    """Make all steps; return the errors, looked at two hundred times and at every power of two.

    A factorisation that fails ends a curve: geoopt's ``projx`` does not converge on what its canonical steps can leave.
    """
    torch.manual_seed(0)
    every = max(1, course.steps // 200)
    looks = {*range(every, course.steps + 1, every), *(2**i for i in range(int(math.log2(course.steps)) + 1))}
    step, steps, errors = course.start(course), [0], [_error(first_point(course))]
    begin, failure = perf_counter(), None
    for count in range(1, course.steps + 1):
        try:
            x = step()
        except torch.linalg.LinAlgError as error:
            failure = str(error).partition("\n")[0]
            break
        if count in looks:
            steps.append(count)
            errors.append(_error(x))
    return {
        "panel": course.panel,
        "name": course.name,
        "dtype": str(course.dtype).removeprefix("torch."),
        "shape": list(course.shape),
        "size": course.size,
        "promised": course.promised,
        "largest": max(errors),
        "failure": failure,
        "seconds": round(perf_counter() - begin, 1),
        "steps": steps,
        "errors": [float(f"{error:.3g}") for error in errors],
    }


def _error(x: Tensor) -> float:
    """Return ‖X^H X - I‖_F/√m, the largest of a batch, and 1e300 for what is not finite."""
    error = dense.unitarity_error(x).max().item()
    return error if math.isfinite(error) else 1e300


def _follow(index: int, share: int) -> dict[str, Any]:
    """Follow one curve, in a process of its own."""
    torch.set_num_threads(1)
    return follow(courses(WALKS // share, RIVALS // share, TRAINING // share)[index])


# -- the picture ------------------------------------------------------------------------------------


def draw(path: Path, curves: list[dict[str, Any]]) -> None:
    """Draw this package beside the others, and below, for every kind of point, how much of a promise errors use."""
    figure = Figure(figsize=(8, 7.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 2.4))
    _draw_others(upper, [curve for curve in curves if curve["promised"] is None and curve["size"] == SIZES[0]])
    _draw_promises(lower, [curve for curve in curves if curve["promised"]])
    figure.savefig(path, dpi=150)


def _draw_others(axes: Axes, curves: list[dict[str, Any]]) -> None:
    """Draw the largest error so far against steps."""
    for curve in curves:
        label, style = OTHERS.get(curve["name"], (None, {}))
        if label is not None:
            so_far = list(accumulate(curve["errors"][1:], max))
            axes.plot(curve["steps"][1:], so_far, label=label, linewidth=1.8, **style)
    dtype, shape = curves[0]["dtype"], "×".join(map(str, curves[0]["shape"]))
    axes.set(xlabel="step", ylabel="largest error so far", xscale="log", yscale="log")
    axes.set_title(f"Beside others: {shape}, {dtype}, steps of {curves[0]['size']:g}", fontsize=11)
    axes.grid(alpha=0.3)
    label_ends(axes)


def _draw_promises(axes: Axes, curves: list[dict[str, Any]]) -> None:
    """Draw a row of dots for each kind of point, the largest error of every run in units of its promise."""
    panels = list(dict.fromkeys(curve["panel"] for curve in curves))
    for curve in curves:
        is_t = curve["name"] == "T" or curve["name"].endswith(", T")
        style = {"color": "tab:orange" if is_t else "tab:blue", "markersize": 7, "alpha": 0.6}
        height = panels.index(curve["panel"]) + (0.16 if is_t else -0.16)
        axes.plot(curve["largest"] / curve["promised"], height, "o", **style)
    axes.axvline(1, color="black", linestyle=":", linewidth=1.2)
    axes.annotate("promised", (1, 3), (-5, 0), textcoords="offset points", ha="right", va="center")
    for height, colour, name in ((0, "tab:blue", "D"), (0.55, "tab:orange", "T")):
        axes.annotate(f"● projUNN-{name}", (0.02, height), color=colour, va="center")
    names = [panel if "double" in panel else f"{panel}, single" for panel in panels]
    axes.set_yticks(range(len(panels)), names)
    axes.set(xlabel="largest error, in units of what is promised", xlim=(0, 1.05))
    axes.set_title("This package: every run, 20 000 or 100 000 steps", fontsize=11)
    axes.grid(alpha=0.3)
    axes.invert_yaxis()


def table(curves: list[dict[str, Any]]) -> str:
    """Return the largest error of every curve."""
    lines = ["| point | method | step size | steps | largest error | promised |", "|---|---|---:|---:|---:|---:|"]
    for curve in curves:
        size = "–" if curve["size"] is None else f"{curve['size']:g}"
        promised = f"{curve['promised']:.0e}" if curve["promised"] else ""
        largest = f"{curve['largest']:.1e}" if curve["largest"] < 1e300 else "not finite"
        ended = " (then its SVD fails)" if curve["failure"] else ""
        cells = (curve["panel"], curve["name"], size, f"{curve['steps'][-1]}{ended}", largest, promised)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def measure(share: int, jobs: int) -> dict[str, Any]:
    """Follow every curve over one part in ``share`` of its steps, so many at a time."""
    planned = courses(WALKS // share, RIVALS // share, TRAINING // share)
    by_cost = sorted(range(len(planned)), key=lambda i: -planned[i].steps * math.prod(planned[i].shape))
    curves = {}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_follow, index, share): index for index in by_cost}
        for future in tqdm(as_completed(futures), total=len(planned), unit="curve", disable=None):
            curves[futures[future]] = future.result()
    return {"quick": share > 1, **environment(), "curves": [curves[index] for index in range(len(planned))]}


def main(arguments: list[str] | None = None) -> int:
    """Follow every curve; return 0 if all promises were kept."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--quick", action="store_true", help="a thousandth of the steps")
    command.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="curves at a time (default: all cores)")
    add_record_options(command, "results/drift")
    options = command.parse_args(arguments)
    torch.set_num_threads(1)
    record = recorded(options, "drift", lambda: measure(1000 if options.quick else 1, options.jobs))
    options.out.mkdir(parents=True, exist_ok=True)
    curves = record["curves"]
    draw(options.out / "drift.png", curves)
    machine = f"One run on {machine_of(record)}.  `sweep` is 256, the default, unless stated otherwise.\n\n"
    tell(options, "drift table", machine + table(curves))
    broken = [curve for curve in curves if curve["promised"] and not curve["largest"] <= curve["promised"]]
    for curve in broken:
        print(f"promise broken: {curve['panel']}, {curve['name']}: {curve['largest']:.1e}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
