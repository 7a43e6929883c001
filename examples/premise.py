"""Evidence for the premise: gradients of a recurrent weight are nearly low-rank, and unitary ones reach the past.

While a network learns (copying memory, permuted digits), every so many steps are recorded: the singular values of the
dense gradient G of the transition, the share of its norm that the best rank-k part has, and how large the derivative of
the loss by each state is, for a unitary network, an unconstrained one that starts with the same weights, and one that
starts as torch.nn.RNN does.  Run ``python examples/premise.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from figures import premise
from networks import METHODS, Choices, Reader
from report import environment
from tasks import Copying, Pixels, Task
from torch import Tensor
from training import train

RANKS = (1, 2, 4, 8, 16)
NETWORKS = {  # name -> method, start
    "unitary": ("projUNN-D", "henaff"),
    "unconstrained, the same start": ("RNN", "henaff"),
    "unconstrained, torch's start": ("RNN", "torch"),
}


class Observations:
    """What is seen between backward pass and step."""

    def __init__(self, task: Task, every: int) -> None:
        self.every = every
        self.records: list[dict[str, Any]] = []
        self.probe = next(iter(task.batches()))
        self.task = task

    def __call__(self, step: int, network: Reader, inputs: Tensor) -> None:
        """Record the gradient and the derivatives by the states, on one batch that stays the same."""
        if step % self.every:
            return
        weight = network.transition
        assert weight is not None
        values = torch.linalg.svdvals(weight.grad.clone().double())
        energy = values.square().cumsum(0).sqrt() / values.norm()
        self.records.append(
            {
                "step": step,
                "share": {str(k): round(float(energy[k - 1]), 4) for k in RANKS},
                "singular_values": [float(f"{v:.3g}") for v in (values / values[0])[:64]],
                "states": [float(f"{v:.3g}") for v in by_states(network, self.task, *self.probe)],
            }
        )


def by_states(network: Reader, task: Task, inputs: Tensor, targets: Tensor) -> list[float]:
    """Return ``‖∂L/∂h_t‖`` for every t."""
    if not inputs.is_floating_point():
        inputs = torch.nn.functional.one_hot(inputs, task.width).float()
    cell = dict(network.recurrent.named_parameters())
    bias = sum(b for name, b in cell.items() if name.startswith("bias"))
    h, states = inputs.new_zeros(inputs.shape[1], cell["weight_hh_l0"].shape[0]), []
    for drive in inputs @ cell["weight_ih_l0"].mT + bias:
        h = torch.relu(drive + h @ cell["weight_hh_l0"].mT)
        states.append(h)
    outputs = network.readout(torch.stack(states) if task.everywhere else h)
    return [g.norm().item() for g in torch.autograd.grad(task.loss(outputs, targets), states)]


def main(arguments: list[str] | None = None) -> int:
    """Train, record, draw, and return the exit status."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--steps", type=int, default=1000, help="of each training (default: %(default)s)")
    command.add_argument("--every", type=int, default=20, help="steps between observations (default: %(default)s)")
    command.add_argument("--hidden", type=int, default=128, help="hidden units (default: %(default)s)")
    command.add_argument("--out", type=Path, default=Path("results/premise"), help="default: %(default)s")
    command.add_argument("--record", type=Path, metavar="JSON", help="draw this record instead")
    options = command.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.record is not None:
        premise(options.out / "premise.png", json.loads(options.record.read_text(encoding="utf-8"))["trainings"])
        return 0
    torch.set_num_threads(1)
    epochs = -(-options.steps // 23)  # of 23 batches
    found = []
    for task in (Copying(100, 64, options.steps, 0), Pixels(64, epochs, 0)):
        for name, (method, init) in NETWORKS.items():
            seen = Observations(task, options.every)
            run = train(task, METHODS[method], Choices(options.hidden, init=init), observe=seen)
            found.append({"task": task.name, "network": name, "loss": run.final_loss, "observations": seen.records})
    record = {"hidden": options.hidden, "trainings": found, **environment()}
    (options.out / "premise.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    premise(options.out / "premise.png", found)
    print(f"written to {options.out}: premise.json, premise.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
