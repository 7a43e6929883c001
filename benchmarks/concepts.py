"""Four pictures for the pages of concepts: D and T, what samplers keep, how exact a move is, what leaves the manifold.

1. A step of rank two on 12 × 12 matrices: the unitary g with Y = g X in a basis that suits it, its eigenvalues, and a
   loss along the curves of D and T.
2. The share of a gradient's norm that every sampler keeps, against k, for singular values that fall fast and slowly.
3. The unitarity error of a point after one step, against the length of the step, from nothing to one over the
   precision, beside the promised bound.
4. The distance from the manifold while a rotation is learnt: of this package's optimisers, of torch's without a
   constraint, of averages, and of conversions to half precision and back.

Run ``python benchmarks/concepts.py``: about half a minute.  It leaves ``d_and_t.png``, ``samplers.png``,
``exactness.png``, ``leaving.png`` and ``concepts.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geoopt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import swa_utils
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from common.report import markdown

from projunn_manifold import UnitaryLowRank, averaging, unitarity_error
from projunn_manifold.linalg.products import matrix
from projunn_manifold.optim import RiemannianSGD, constrain
from projunn_manifold.sketching import SAMPLERS

COLOURS = {"lsi": "tab:blue", "column": "tab:green", "subspace": "tab:orange", "svd": "black"}

# -- D and T ------------------------------------------------------------------------------------------


class Step:
    """A step of rank two from X: the tangent u of a gradient, of spectral norm 1."""

    def __init__(self, n: int = 12, k: int = 2) -> None:
        draw = torch.Generator().manual_seed(3)
        self.manifold = UnitaryLowRank(k, sweep=None)
        self.x, self.target = self.manifold.random(2, n, n, dtype=torch.float64, generator=draw)
        u = -self.manifold.egrad2rgrad(self.x, self.x - self.target)
        self.u = u / torch.linalg.matrix_norm(u, 2)
        self.basis = torch.linalg.svd(self.u).U  # the first 2k columns span all that moves

    def moved(self, letter: str, t: float) -> Tensor:
        """Return the point of D or of T at t u."""
        with torch.no_grad():
            return (self.manifold.retr if letter == "D" else self.manifold.expmap)(self.x, t * self.u)

    def group_element(self, letter: str, t: float) -> Tensor:
        """Return g with Y = g X in the basis."""
        return self.basis.mT @ self.moved(letter, t) @ self.x.mT @ self.basis

    def loss(self, letter: str, t: float) -> float:
        """Return the squared distance from the target."""
        return (self.moved(letter, t) - self.target).square().sum().item()


def draw_d_and_t(path: Path) -> dict[str, list[float]]:
    """Draw g, its eigenvalues and the loss along both curves; return the angles of the eigenvalues at t = 1.5."""
    step, length = Step(), 1.5
    figure = Figure(figsize=(11.5, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    g = step.group_element("D", length)
    picture = left.imshow(g, cmap="RdBu", vmin=-1, vmax=1)
    figure.colorbar(picture, ax=left, shrink=0.8)
    left.set_title("$g$ of D: all but 4 directions stay", fontsize=12)
    left.set_xticks([])
    left.set_yticks([])
    turn = torch.linspace(0, 2 * torch.pi, 181)
    middle.plot(turn.cos(), turn.sin(), color="0.75")
    angles = {}
    for letter, colour, marker, size in (("T", "tab:blue", "o", 8), ("D", "tab:orange", "s", 6)):
        values = torch.linalg.eigvals(step.group_element(letter, length))
        middle.plot(values.real, values.imag, marker, color=colour, markersize=size, label=f"projUNN-{letter}")
        angles[letter] = sorted(values.angle().tolist())
        times = [i / 20 for i in range(81)]
        right.plot(times, [step.loss(letter, t) for t in times], color=colour, label=f"projUNN-{letter}")
    middle.set_aspect("equal")
    middle.axis("off")
    middle.set_title(r"eigenvalues of $g$: $\theta$ (T), $\arctan\theta$ (D)", fontsize=12)
    middle.legend(fontsize=10, loc="center")
    _finish(right, "a loss along both curves", xlabel=r"length of the step, $\|u\|_2$", ylabel=r"$\|Y - T\|_F^2$")
    figure.savefig(path, dpi=120)
    return angles


# -- what samplers keep -----------------------------------------------------------------------------

SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "singular values $0.7^i$": lambda i: 0.7**i,
    "singular values $1/(1+i)$": lambda i: 1 / (1 + i),
}
RANKS = (1, 2, 4, 8, 16)


def shares_kept(n: int, draws: int) -> dict[str, dict[str, list[float]]]:
    """Return the mean share of the norm that each sampler keeps, for every spectrum and rank."""
    generator = torch.Generator().manual_seed(0)
    u, v = UnitaryLowRank().random(2, n, n, dtype=torch.float64, generator=generator)
    found: dict[str, dict[str, list[float]]] = {}
    for name, values in SPECTRA.items():
        g = u @ torch.diag(values(torch.arange(n, dtype=torch.float64))) @ v.mT
        found[name] = {
            sampler: [
                sum(draw(matrix(g), k, generator).dense().norm().item() for _ in range(draws))
                / (draws * g.norm().item())
                for k in RANKS
            ]
            for sampler, draw in SAMPLERS.items()
        }
    return found


def draw_samplers(path: Path, shares: dict[str, dict[str, list[float]]]) -> None:
    """Draw the shares against the rank, a panel for each spectrum."""
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    panels = figure.subplots(1, len(shares), sharey=True)
    for axes, (title, of_samplers) in zip(panels, shares.items(), strict=True):
        for name, kept in of_samplers.items():
            axes.plot(RANKS, kept, "--" if name == "svd" else "o-", color=COLOURS[name], label=f'"{name}"')
        _finish(axes, title, xlabel="k", ylim=(0, 1.03))
        axes.set_xscale("log", base=2)
        axes.set_xticks(RANKS, map(str, RANKS))
    panels[0].set_ylabel("share of the norm kept")
    panels[1].legend(fontsize=10, loc="lower right")
    figure.savefig(path, dpi=120)


# -- how exact a move is ----------------------------------------------------------------------------

PROMISE = 50  # eps max(1, norm of the step)


def errors_of_a_step(n: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """Return the unitarity errors of points after one step of D and of T, against its length, in units of eps."""
    generator, eps = torch.Generator().manual_seed(0), torch.finfo(dtype).eps
    manifold = UnitaryLowRank(4, sweep=None)
    x = manifold.random(n, n, dtype=dtype, generator=generator)
    tangent = manifold.egrad2rgrad(x, torch.randn(n, n, dtype=dtype, generator=generator))
    tangent = tangent / torch.linalg.matrix_norm(tangent, 2)
    count = 41
    lengths = [float(10 ** (-8 + (8 - torch.tensor(eps).log10().item()) * i / (count - 1))) for i in range(count)]
    found: dict[str, list[float]] = {"length": lengths}
    for name, move in (("D", manifold.retr), ("T", manifold.expmap)):
        with torch.no_grad():
            found[name] = [unitarity_error(move(x, length * tangent)).item() / eps for length in lengths]
    return found


def draw_exactness(path: Path, errors: dict[str, dict[str, list[float]]]) -> None:
    """Draw the errors and the bound, a panel for each dtype."""
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    panels = figure.subplots(1, len(errors), sharey=True)
    for axes, (dtype, found) in zip(panels, errors.items(), strict=True):
        lengths = found["length"]
        bound = [PROMISE * max(1, length) for length in lengths]
        axes.loglog(lengths, bound, "--", color="0.4", label=r"promise: $50\,\epsilon\max(1, \|u\|_2)$")
        axes.loglog(lengths, found["D"], "s", color="tab:orange", markersize=4, label="projUNN-D")
        axes.loglog(lengths, found["T"], "o", color="tab:blue", markersize=4, label="projUNN-T")
        _finish(axes, dtype, xlabel=r"length of the step, $\|u\|_2$", ylim=(0.1, 1e18))
    panels[0].set_ylabel(r"$\|Y^H Y - I\|_F / \sqrt{n}$, in units of $\epsilon$")
    panels[0].legend(fontsize=10, loc="upper left")
    figure.savefig(path, dpi=120)


# -- what leaves the manifold -----------------------------------------------------------------------


class Training:
    """A rotation learnt from samples, and what is done to its matrix after every step."""

    def __init__(
        self, n: int, optimizer: Callable[[Any], Any], after: Callable[[nn.Module], Any] | None = None
    ) -> None:
        draw = torch.Generator().manual_seed(0)
        manifold = UnitaryLowRank(1)
        self.target = manifold.random(n, n, generator=draw)
        self.model = nn.Linear(n, n, bias=False)
        self.model.weight = geoopt.ManifoldParameter(manifold.random(n, n, generator=draw), manifold=manifold)
        self.optimizer = optimizer(self.model.parameters())
        self.seen = after(self.model) if after is not None else None
        self.samples = torch.Generator().manual_seed(1)

    def step(self) -> float:
        """Make a step, and return the unitarity error of the matrix or of what is made of it."""
        n = self.target.shape[0]
        x = torch.randn(16, n, generator=self.samples)
        self.optimizer.zero_grad()
        (self.model(x) - x @ self.target.mT).square().mean().backward()
        self.optimizer.step()
        seen = self.model.weight if self.seen is None else self.seen(self.model)
        return unitarity_error(seen.detach()).item()


def _averaged(kind: Any) -> Callable[[nn.Module], Any]:
    def begin(model: nn.Module) -> Any:
        average = kind(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.95))

        def seen(model: nn.Module) -> Tensor:
            average.update_parameters(model)
            weight: Tensor = average.module.weight
            return weight

        return seen

    return begin


def _sgd(parameters: Any) -> Any:
    return RiemannianSGD(parameters, lr=0.5)


def _constrained(parameters: Any) -> Any:
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    constrain(optimizer)
    return optimizer


WAYS: dict[str, tuple[Callable[[Any], Any], Any, str]] = {
    "torch's Adam, without constrain": (lambda p: torch.optim.Adam(p, lr=1e-3), None, "tab:red"),
    "torch's average (EMA) of the weights": (_sgd, _averaged(swa_utils.AveragedModel), "tab:orange"),
    "converted to bfloat16 and back": (_sgd, lambda _: lambda model: model.weight.bfloat16().float(), "tab:brown"),
    "optim.RiemannianSGD": (_sgd, None, "tab:blue"),
    "torch's Adam under constrain": (_constrained, None, "tab:green"),
    "averaging.AveragedModel": (_sgd, _averaged(averaging.AveragedModel), "tab:purple"),
}


def distances(n: int, steps: int) -> dict[str, list[float]]:
    """Return the unitarity errors of every way, step by step."""
    found = {}
    for name, (optimizer, after, _) in tqdm(WAYS.items(), desc="trainings", leave=False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong here is warned of
            training = Training(n, optimizer, after)
            found[name] = [training.step() for _ in range(steps)]
    return found


def draw_leaving(path: Path, errors: dict[str, list[float]]) -> None:
    """Draw the errors against the step."""
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    axes = figure.subplots()
    for name, of_steps in errors.items():
        axes.semilogy(range(1, len(of_steps) + 1), of_steps, color=WAYS[name][2], label=name)
    _finish(axes, "Distance from the manifold", xlabel="step", ylabel=r"$\|W^H W - I\|_F / \sqrt{n}$")
    figure.legend(fontsize=10, loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120)


def _finish(axes: Axes, title: str, **labels: Any) -> None:
    axes.set(**labels)
    axes.set_title(title, fontsize=12)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Compute and draw all four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=600, metavar="N", help="of the trainings (default: %(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    angles = draw_d_and_t(options.out / "d_and_t.png")
    shares = shares_kept(n=64, draws=50)
    draw_samplers(options.out / "samplers.png", shares)
    exact = {str(d).removeprefix("torch."): errors_of_a_step(256, d) for d in (torch.float32, torch.float64)}
    draw_exactness(options.out / "exactness.png", exact)
    left = distances(64, options.steps)
    draw_leaving(options.out / "leaving.png", left)
    record = {
        "angles": angles,
        "shares": shares,
        "errors of a step": exact,
        "largest errors": {k: max(v) for k, v in left.items()},
    }
    (options.out / "concepts.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    rows = [[name, f"{error:.1e}"] for name, error in record["largest errors"].items()]
    print(markdown([["way", "largest distance"], *rows]))


if __name__ == "__main__":
    main()
