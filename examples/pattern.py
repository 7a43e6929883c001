"""A pattern carried over 500 steps by a convolutional unitary network, and lost by plain ones (Magnasco 2023).

The network iterates z <- φ(U ⊗ z), φ(z) = z / sqrt(1 + |z|²), from a handwritten digit and without input.  Every step
can be undone, φ^-1(y) = y / sqrt(1 - |y|²) and the inverse convolution, so what a state still holds of the pattern is
seen by running the network backwards from it.  A unitary U loses nothing but rounding; a plain kernel shrinks some
waves and stretches others, every step by the same factor, until one wave is all there is.

Run ``python examples/pattern.py`` (a few seconds).  It leaves ``pattern.png`` and ``pattern.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import trange

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from common.report import environment

from projunn_manifold.layers import UnitaryConvRNNCell

SIDE = 32
SHOWN = (0, 1, 10, 100, 500)


def blocks_of(name: str, cell: UnitaryConvRNNCell) -> Tensor:  # (frequencies, 1, 1)
    """Return the factors by which a step multiplies every wave."""
    unitary = cell.conv.blocks().detach()
    if name == "unitary":
        return unitary
    free = torch.randn(SIDE * SIDE, 1, 1, dtype=unitary.dtype, generator=torch.Generator().manual_seed(1))
    sizes = 1 + 0.02 * free.real  # singular values as a random start has them, closer to one than most
    return unitary * sizes * (0.98 if name == "plain, contracting" else 1.02)


def carried(cell: UnitaryConvRNNCell, blocks: Tensor, pattern: Tensor, steps: int) -> list[Tensor]:
    """Return all states."""
    states = [pattern]
    for _ in trange(steps, leave=False, disable=None):
        states.append(cell(None, states[-1], blocks))
    return states


def recalled(cell: UnitaryConvRNNCell, blocks: Tensor, state: Tensor, steps: int) -> Tensor:
    """Return the pattern that a state comes from, by undoing every step."""
    for _ in range(steps):
        state = state / (1 - state.abs().square()).clamp_min(1e-30).sqrt()
        state = cell.conv(state, 1 / blocks)
    return state


def similarity(z: Tensor, pattern: Tensor) -> float:
    """Return |<z, pattern>| / (‖z‖ ‖pattern‖), 0 for what is no number."""
    value = (z.conj() * pattern).sum().abs() / (z.norm() * pattern.norm())
    return value.nan_to_num().item()


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """Iterate, undo, draw, and return the exit status."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--steps", type=int, default=500, help="(default: %(default)s)")
    command.add_argument("--out", type=Path, default=Path("results/pattern"), help="default: %(default)s")
    options = command.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    digit = torch.tensor(load_digits().images[4] / 16).repeat_interleave(4, 0).repeat_interleave(4, 1)
    pattern = digit.to(torch.complex64)[None, None]
    cell = UnitaryConvRNNCell(1, image_size=SIDE, kernel_size=5)
    shown = [t for t in SHOWN if t <= options.steps]
    rows: dict[str, Any] = {}
    for name in ("unitary", "plain, contracting", "plain, expanding"):
        blocks = blocks_of(name, cell)
        states = carried(cell, blocks, pattern, options.steps)
        back = [recalled(cell, blocks, states[t], t) for t in shown]
        rows[name] = {
            "states": [states[t] for t in shown],
            "back": back,
            "similarity": [similarity(z, pattern) for z in back],
            "norms": [z.norm().item() for z in states],
        }
    draw(options.out / "pattern.png", rows, shown)
    record = {name: {"similarity": row["similarity"], "norm": row["norms"][-1]} for name, row in rows.items()}
    text = json.dumps({"steps": shown, "networks": record, **environment()}, indent=1)
    (options.out / "pattern.json").write_text(text + "\n", encoding="utf-8")
    for name, row in rows.items():
        told = ", ".join(f"{value:.4f} after {t}" for t, value in zip(shown, row["similarity"], strict=True))
        print(f"{name}: similarity of what is recalled {told}; norm of the state at the end {row['norms'][-1]:.3g}")
    print(f"written to {options.out}: pattern.png, pattern.json")
    return 0


def draw(path: Path, rows: dict[str, Any], shown: list[int]) -> None:
    """Draw, for each network, the state and what is recalled from it, and norms over time."""
    figure = Figure(figsize=(2 * len(shown) + 3.5, 4.2 * len(rows)), layout="constrained")
    grid = figure.add_gridspec(2 * len(rows), len(shown) + 2)
    for r, (name, row) in enumerate(rows.items()):
        for half, key in enumerate(("states", "back")):
            for c, (z, t) in enumerate(zip(row[key], shown, strict=True)):
                panel = figure.add_subplot(grid[2 * r + half, c])
                panel.imshow(z[0, 0].abs().nan_to_num(), cmap="gray")
                panel.set(xticks=[], yticks=[])
                what = f"step {t}" if half == 0 else f"recalled, {row['similarity'][c]:.2f}"
                panel.set_title(what, fontsize="small")
                if c == 0:
                    panel.set_ylabel(f"{name}\n{'state' if half == 0 else 'run backwards'}", fontsize="small")
        panel = figure.add_subplot(grid[2 * r : 2 * r + 2, -2:])
        panel.plot(row["norms"])
        panel.set(yscale="log", xlabel="step", title="‖z‖")
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    sys.exit(main())
