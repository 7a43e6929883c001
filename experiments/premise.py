"""Evidence for the premise: gradients of a recurrent weight are nearly low-rank, and unitary ones reach the past.

While a network learns (copying memory, permuted digits), every so many steps are recorded: the singular values of the
dense gradient G of the transition, the share of its norm that the best rank-k part has, the same for the move that
RMSprop makes of it, which is what is cut to rank k here, and how large the derivative of the loss by each state is, for
a unitary network, an unconstrained one that starts with the same weights, and one that starts as torch.nn.RNN does.
Run ``python experiments/premise.py``.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common.figures import premise
from common.networks import METHODS, Choices, Reader
from common.report import environment
from common.tasks import Copying, Pixels, Task
from common.training import train
from torch import Tensor

from projunn_manifold.layers.recurrence import modrelu

RANKS = (1, 2, 4, 8, 16)
NETWORKS = {  # name -> method
    "unitary": "projUNN-D",
    "unconstrained, the same start": "RNN, unitary start",
    "unconstrained, torch's start": "RNN",
}


class Observations:
    """What is seen between backward pass and step."""

    def __init__(self, task: Task, every: int, device: str) -> None:
        self.every, self.task = every, task
        self.records: list[dict[str, Any]] = []
        batch = next(iter(replace(task, seed=task.seed + 1).batches()))  # always the same, not trained on
        self.probe = tuple(t.to(device) for t in batch)
        self.squares: Tensor | None = None

    def __call__(self, step: int, network: Reader, inputs: Tensor) -> None:
        """Record the gradient of this step, the move RMSprop makes of it, and the derivatives by the states."""
        weight = network.transition
        assert weight is not None
        gradient = weight.grad.clone()
        if self.squares is None:
            self.squares = torch.zeros_like(gradient)
        self.squares.mul_(0.99).addcmul_(gradient, gradient, value=0.01)
        if step % self.every:
            return
        move = gradient / (self.squares.sqrt() + 1e-8)
        values = torch.linalg.svdvals(gradient.double())
        self.records.append(
            {
                "step": step,
                "share": shares(values),
                "share_of_move": shares(torch.linalg.svdvals(move.double())),
                "singular_values": [float(f"{v:.3g}") for v in (values / values[0])[:64]],
                "states": [float(f"{v:.3g}") for v in by_states(network, self.task, *self.probe)],
            }
        )


def shares(values: Tensor) -> dict[str, float]:
    """Return the share of the norm that the best rank-k parts have."""
    energy = values.square().cumsum(0).sqrt() / values.norm()
    return {str(k): round(float(energy[k - 1]), 4) for k in RANKS}


def by_states(network: Reader, task: Task, inputs: Tensor, targets: Tensor) -> list[float]:
    """Return ``‖∂L/∂h_t‖`` for every t; L is the loss of the answers that need memory, the last ones."""
    if not inputs.is_floating_point():
        inputs = torch.nn.functional.one_hot(inputs, task.width).float()
    cell = network.recurrent
    h, states = inputs.new_zeros(inputs.shape[1], cell.hidden_size), []
    for drive in inputs @ cell.weight_ih_l0.mT + cell.bias_ih_l0:
        h = modrelu(drive + h @ cell.weight_hh_l0.mT, cell.modrelu_l0.bias)
        states.append(h)
    if isinstance(task, Copying):
        outputs, targets = network.readout(torch.stack(states[-task.copied :])), targets[-task.copied :]
    else:
        outputs = network.readout(h)
    gradients = torch.autograd.grad(task.loss(outputs, targets), states, allow_unused=True)
    return [0.0 if g is None else g.norm().item() for g in gradients]


def main(arguments: list[str] | None = None) -> int:
    """Train, record, draw, and return the exit status."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--steps", type=int, default=1000, help="of each training (default: %(default)s)")
    command.add_argument("--every", type=int, default=20, help="steps between observations (default: %(default)s)")
    command.add_argument("--hidden", type=int, default=128, help="hidden units (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    command.add_argument("--device", default="cpu", help="(default: %(default)s)")
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
    for task in (Copying(100, 64, options.steps, options.seed), Pixels(64, epochs, options.seed)):
        for name, method in NETWORKS.items():
            seen = Observations(task, options.every, options.device)
            choices = Choices(options.hidden, seed=options.seed, nonlinearity="modrelu", unitary_lr=1e-4)
            run = train(task, METHODS[method], choices, device=options.device, observe=seen)
            ends = {"loss": run.final_loss, "baseline": task.baseline, "score": run.score}
            found.append({"task": task.name, "network": name, **ends, "observations": seen.records})
    record = {"hidden": options.hidden, "trainings": found, **environment(options.device)}
    (options.out / "premise.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    premise(options.out / "premise.png", found)
    print(f"written to {options.out}: premise.json, premise.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
