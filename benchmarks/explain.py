"""Two pictures that explain: the plane in which a rank-one step turns, and where a step's reads and writes go.

The first shows a real step of rank one in the plane of X b and a, with the tangent, the geodesic (T) and the closest
unitary (D), and the angles of both against the length of the step; all points are computed by the package.  The second
counts how often a step reads or writes a matrix of full size: a step is made with each optimiser, and every operator of
PyTorch and every compiled loop is seen.

Run ``python benchmarks/explain.py``: a few seconds.  It leaves ``rotation.png``, ``passes.png`` and ``explain.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geoopt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from common.report import markdown

from projunn_manifold import UnitaryLowRank, optim, projunn_t
from projunn_manifold.linalg import dense, products
from projunn_manifold.linalg.products import compiled_loops

T, D, TANGENT = "tab:blue", "tab:orange", "tab:green"

# -- the plane of a step ----------------------------------------------------------------------------


class Plane:
    """A step of rank one, ``b`` of unit length and ``a`` orthogonal to X b, seen in the plane of the two.

    The step turns X b towards a by θ = ‖a‖‖b‖/2 along the geodesic, and leaves all that is orthogonal to the plane.
    """

    def __init__(self, n: int = 6) -> None:
        draw = torch.Generator().manual_seed(0)
        self.x = dense.haar(n, n, dtype=torch.float64, generator=draw)
        self.b = dense.normalized(torch.randn(n, 1, dtype=torch.float64, generator=draw))
        start = self.x @ self.b
        a = torch.randn(n, 1, dtype=torch.float64, generator=draw)
        self.up = dense.normalized(a - start * (start.mT @ a))
        self.axes = torch.cat((start, self.up), -1)

    def seen(self, y: Tensor) -> tuple[float, float]:
        """Return the coordinates of Y b in the plane."""
        across, upward = (self.axes.mT @ y @ self.b).flatten().tolist()
        return across, upward

    def tangent(self, theta: float) -> tuple[float, float]:
        """Return where X + u, not on the manifold, takes b."""
        g = 2 * theta * self.up @ self.b.mT
        return self.seen(self.x + (g - self.x @ g.mT @ self.x) / 2)

    def geodesic(self, theta: float) -> tuple[float, float]:
        """Return where projUNN-T takes b."""
        return self.seen(projunn_t(self.x, 2 * theta * self.up, self.b))

    def closest(self, theta: float) -> tuple[float, float]:
        """Return where projUNN-D takes b: the polar factor of X + u."""
        g = 2 * theta * self.up @ self.b.mT
        u = (g - self.x @ g.mT @ self.x) / 2
        return self.seen(UnitaryLowRank(1).retr(self.x, u))


def draw_rotation(path: Path, theta: float = 1.1) -> dict[str, list[float]]:
    """Draw a step in its plane, and the angles of both maps against its length; return these angles."""
    plane, lengths = Plane(), [i / 8 for i in range(25)]
    angles = {
        "theta": lengths,
        "T": [_angle(plane.geodesic(length)) for length in lengths],
        "D": [_angle(plane.closest(length)) for length in lengths],
    }
    figure = Figure(figsize=(11.5, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.05))
    _draw_plane(left, plane, theta)
    right.plot(lengths, angles["T"], "o", color=T, markersize=5, label="projUNN-T, computed")
    right.plot(lengths, lengths, "-", color=T, linewidth=1.2, label=r"$\theta$")
    right.plot(lengths, angles["D"], "s", color=D, markersize=5, label="projUNN-D, computed")
    right.plot(lengths, [math.atan(t) for t in lengths], "-", color=D, linewidth=1.2, label=r"$\arctan\,\theta$")
    right.axhline(math.pi / 2, color="0.4", linestyle=":", linewidth=1.2)
    right.text(0.05, math.pi / 2 + 0.05, "a quarter turn", fontsize=10, color="0.3")
    right.set(xlabel=r"$\theta = \tau\,\|a\|\,\|b\|\,/\,2$", ylabel="angle turned", ylim=(0, 3.1), xlim=(0, 3.05))
    right.set_title("Angle against the length of the step", fontsize=12)
    right.grid(alpha=0.3)
    right.legend(fontsize=10, loc="upper left", bbox_to_anchor=(0.0, 0.98), frameon=False)
    figure.savefig(path, dpi=120)
    return angles


def _angle(point: tuple[float, float]) -> float:
    return math.atan2(point[1], point[0])


def _draw_plane(axes: Axes, plane: Plane, theta: float) -> None:
    tip, t, d = plane.tangent(theta), plane.geodesic(theta), plane.closest(theta)
    turn = [math.pi * i / 180 for i in range(-25, 116)]
    axes.plot([math.cos(r) for r in turn], [math.sin(r) for r in turn], color="0.75", linewidth=1.5)
    arc = [plane.geodesic(theta * i / 60) for i in range(61)]
    axes.plot(*zip(*arc, strict=True), color=T, linewidth=3)
    axes.plot((0, tip[0]), (0, tip[1]), "--", color=D, linewidth=1.5)
    arrow = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "linewidth": 2, "mutation_scale": 16}
    for end, colour in (((1, 0), "black"), (t, T), (d, D)):
        axes.annotate("", xy=end, xytext=(0, 0), arrowprops={**arrow, "color": colour})
    axes.annotate("", xy=tip, xytext=(1, 0), arrowprops={**arrow, "color": TANGENT})
    axes.plot(*tip, "o", color=TANGENT, markersize=7)
    for radius, angle, colour, text in (
        (0.30, theta, T, r"$\theta$"),
        (0.52, math.atan(theta), D, r"$\arctan\theta$"),
    ):
        sweep = [angle * i / 40 for i in range(41)]
        axes.plot([radius * math.cos(r) for r in sweep], [radius * math.sin(r) for r in sweep], color=colour)
        at = 0.35 * angle
        axes.text((radius + 0.03) * math.cos(at), (radius + 0.03) * math.sin(at), text, fontsize=12, color=colour)
    words = {"fontsize": 12}
    axes.text(1.03, -0.09, "$X b$", **words)
    axes.text(tip[0] + 0.05, tip[1] - 0.02, "$(X + u)\\,b$", color=TANGENT, **words)
    axes.text(1.04, theta / 2 - 0.05, "$u\\,b$", color=TANGENT, **words)
    axes.text(t[0] - 0.01, t[1] + 0.05, "T", color=T, weight="bold", **words)
    axes.text(d[0] + 0.08, d[1] - 0.07, "D", color=D, weight="bold", **words)
    axes.text(-0.5, -0.22, r"T: along the arc, by the angle $\theta$", color=T, **words)
    axes.text(-0.5, -0.36, r"D: to the closest unitary, by $\arctan\theta$", color=D, **words)
    axes.annotate("", xy=(0, 1.22), xytext=(0, 0), arrowprops={**arrow, "color": "0.6", "linewidth": 1})
    axes.text(-0.07, 1.13, "$a$", color="0.4", ha="right", **words)
    axes.set(aspect="equal", xlim=(-0.52, 1.5), ylim=(-0.45, 1.26))
    axes.set_title("The plane of $X b$ and $a$; all else stays", fontsize=12)
    axes.axis("off")


# -- reads and writes -------------------------------------------------------------------------------

KINDS = {
    "gradient read": ("tab:green", ""),
    "point read": ("tab:blue", ""),
    "other matrices read": ("0.6", ""),
    "gradient written": ("tab:green", "////"),
    "point written": ("tab:blue", "////"),
    "other matrices written": ("0.6", "////"),
}
_WRITES_ONLY = {"copy_", "zero_", "fill_"}  # what they are called on is not read
_LIKE = {"empty_like", "zeros_like", "new_empty", "new_zeros", "empty", "zeros"}


class Traffic(TorchDispatchMode):
    """Counts how often operators and compiled loops read or write a matrix of n² elements.

    Tensor subclasses unpack themselves first, and their operators are seen here.
    """

    def __init__(self, point: Tensor, gradient: Tensor) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.size = point.numel()
        self.names = {point.data_ptr(): "point", gradient.data_ptr(): "gradient"}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        aliases = [out.alias_info for out in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return result  # a view
        name = func._schema.name.removeprefix("aten::")
        written = {
            id(arg)
            for given, arg in zip(func._schema.arguments, args, strict=False)
            if given.alias_info is not None and given.alias_info.is_write
        }
        tensors = {arg.data_ptr(): arg for arg in tree_leaves((args, kwargs)) if isinstance(arg, Tensor)}
        for address, arg in tensors.items():  # one that is given twice is read once
            if name not in _LIKE and not (name in _WRITES_ONLY and id(arg) in written):
                self.see(address, arg.numel(), "read")
            if id(arg) in written:
                self.see(address, arg.numel(), "written")
        if not written and not name.startswith(("empty", "new_empty")):
            for out in tree_leaves(result):
                if isinstance(out, Tensor):
                    self.see(out.data_ptr(), out.numel(), "written")
        return result

    def see(self, address: int, size: int, what: str) -> None:
        """Count a read or write, if it is of a whole matrix."""
        if size >= self.size:
            self.counts[f"{self.names.get(address, 'other matrices')} {what}"] += 1


class Loops:
    """The compiled loops, each of whose calls reads its matrices once."""

    def __init__(self, loops: Any, traffic: Traffic) -> None:
        self._loops, self._traffic = loops, traffic

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loops, name)

    def products(self, x: Any, *others: Any) -> None:
        """Read the matrix."""
        self._traffic.see(x.ctypes.data, x.size, "read")
        self._loops.products(x, *others)

    def sketched_tangent(self, g: Any, x: Any, *others: Any) -> Any:
        """Read both matrices."""
        for matrix in (g, x):
            self._traffic.see(matrix.ctypes.data, matrix.size, "read")
        return self._loops.sketched_tangent(g, x, *others)

    def add_product(self, y: Any, x: Any, *others: Any) -> None:
        """Read one matrix, and write it or another."""
        self._traffic.see(x.ctypes.data, x.size, "read")
        self._traffic.see(y.ctypes.data, y.size, "written")
        self._loops.add_product(y, x, *others)


class DenseTangents(UnitaryLowRank):
    """The manifold without factored tangents: the gradient it hands to an optimiser is a plain matrix."""

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the dense gradient."""
        return super().egrad2rgrad(x, u).clone()


def count(optimizer: Callable[[Any], Any], manifold: UnitaryLowRank | None, with_loops: bool, n: int) -> dict[str, int]:
    """Return the counts of the third step of an optimiser; the first ones make its state."""
    draw = torch.Generator().manual_seed(0)
    p: Any = dense.haar(n, n, generator=draw).contiguous()
    p = torch.nn.Parameter(p) if manifold is None else geoopt.ManifoldParameter(p, manifold=manifold)
    p.grad = torch.randn(n, n, generator=draw)
    loops = compiled_loops()
    products.compiled = loops if with_loops else None
    try:
        step = optimizer(p)
        for _ in range(2):
            step()
        traffic = Traffic(p, p.grad)
        if with_loops:
            products.compiled = Loops(loops, traffic)
        with traffic:
            step()
    finally:
        products.compiled = loops
    return {kind: traffic.counts[kind] for kind in KINDS}


def count_all(n: int) -> dict[str, dict[str, int]]:
    """Return the counts of every way to step; without numba, of those that do not need it."""
    own = UnitaryLowRank(1, sweep=None)
    dense = DenseTangents(1, sweep=None)
    ways: list[tuple[str, Callable[[Any], Any], UnitaryLowRank | None, bool]] = [
        ("torch SGD", lambda p: torch.optim.SGD([p], lr=0.1, foreach=False).step, None, False),
        ("in place", lambda p: lambda: own.step_(p, p.grad, 0.1), own, True),
        ("in place, without numba", lambda p: lambda: own.step_(p, p.grad, 0.1), own, False),
        ("geoopt's RiemannianSGD, factors", lambda p: geoopt.optim.RiemannianSGD([p], lr=0.1).step, own, True),
        ("the same, dense tangents", lambda p: geoopt.optim.RiemannianSGD([p], lr=0.1).step, dense, True),
        ("torch Adam", lambda p: torch.optim.Adam([p], lr=0.1, foreach=False).step, None, False),
        ("in-place RiemannianAdam", lambda p: optim.RiemannianAdam([p], lr=0.1).step, own, True),
        ("geoopt's RiemannianAdam", lambda p: geoopt.optim.RiemannianAdam([p], lr=0.1).step, own, True),
    ]
    usable = [way for way in ways if compiled_loops() is not None or not way[3]]
    return {name: count(optimizer, manifold, loops, n) for name, optimizer, manifold, loops in usable}


def draw_passes(path: Path, counts: dict[str, dict[str, int]], n: int) -> None:
    """Draw a bar for every way to step, made of its reads and writes."""
    figure = Figure(figsize=(10.5, 0.46 * len(counts) + 1.6), layout="constrained")
    axes = figure.subplots()
    for row, of_step in enumerate(counts.values()):
        start = 0
        for kind, (colour, hatch) in KINDS.items():
            if of_step[kind]:
                axes.barh(-row, of_step[kind], left=start, color=colour, hatch=hatch, edgecolor="white", height=0.7)
                start += of_step[kind]
        axes.text(start + 0.3, -row, str(start), va="center", fontsize=11)
    for kind, (colour, hatch) in KINDS.items():
        axes.barh(0, 0, color=colour, hatch=hatch, edgecolor="white", label=kind)
    axes.set_yticks([-row for row in range(len(counts))], list(counts), fontsize=11)
    axes.set_xlabel(f"passes over an n×n matrix in one step (k = 1, float32, counted at n = {n})", fontsize=11)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=10, ncols=3, loc="outside upper center", frameon=False)
    figure.savefig(path, dpi=120)


def table(counts: dict[str, dict[str, int]]) -> str:
    """Return the counts as a table in markdown."""
    rows = [[name, *map(str, (*of_step.values(), sum(of_step.values())))] for name, of_step in counts.items()]
    return markdown([["a step of", *KINDS, "all"], *rows])


def main() -> None:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder of the pictures (default: %(default)s)"
    )
    parser.add_argument("--side", type=int, default=1024, metavar="N", help="side of the counted matrix")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    angles = draw_rotation(options.out / "rotation.png")
    counts = count_all(options.side)
    draw_passes(options.out / "passes.png", counts, options.side)
    record = {"angles": angles, "passes": counts}
    (options.out / "explain.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(counts))


if __name__ == "__main__":
    main()
