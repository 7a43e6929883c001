"""Training of one network on one task, everything timed and recorded; it can be interrupted and goes on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .networks import Choices, Method, Reader
from .report import thinned
from .tasks import Task

LAST = 10  # a final loss is the mean over so many last steps
LOOKS = 16  # about so many times a training is looked at
Observer = Callable[[int, Reader, Tensor], None]  # of the step, the network with its gradients, and the inputs
Look = Callable[[Reader], dict[str, float]]


class NonFiniteError(ValueError):
    """The loss, or with it a gradient, is not finite any more."""


@dataclass
class Run:
    """A training: a value for every step."""

    task: str
    method: str
    colour: str
    settings: dict[str, Any]
    baseline: float | None
    goal: float | None
    measure: str
    parameters: int
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # elapsed at the end of the step, measurements left out
    unitarity: list[float | None] = field(default_factory=list)  # None where it was not measured
    optimiser_ms: list[float] = field(default_factory=list)  # the step of the last optimiser: the transition's own
    looks: list[dict[str, float]] = field(default_factory=list)
    score: float | None = None
    held: int = 0  # bytes of weights, gradients and the optimisers' state after the last step

    @property
    def final_loss(self) -> float:
        """Mean loss of the last few steps."""
        return statistics.fmean(self.losses[-LAST:])

    @property
    def running_mean(self) -> np.ndarray:
        """Mean over the last ``LAST`` steps up to each one, so that a curve ends at the final loss."""
        sums = np.concatenate(([0.0], np.cumsum(self.losses)))
        ends = np.arange(1, len(self.losses) + 1)
        starts = np.maximum(ends - LAST, 0)
        return (sums[ends] - sums[starts]) / (ends - starts)

    @property
    def optimiser_quartiles(self) -> list[float]:
        """Quartiles of the milliseconds that the transition's optimiser takes for a step."""
        return torch.quantile(torch.tensor(self.optimiser_ms), torch.tensor([0.25, 0.5, 0.75])).tolist()

    @property
    def solved_at(self) -> int | None:
        """The first step after which the mean of the last few losses is below the goal."""
        if self.goal is not None:
            for step in range(LAST, len(self.losses) + 1):
                if statistics.fmean(self.losses[step - LAST : step]) < self.goal:
                    return step
        return None

    @property
    def solved(self) -> bool | None:
        """Whether the final loss is below the goal; None where there is none."""
        return None if self.goal is None else self.final_loss < self.goal


def train(
    task: Task,
    method: Method,
    choices: Choices,
    *,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    every: int = 100,
    stop_when_solved: bool = False,
    seconds: float | None = None,
    decay: bool = False,
    observe: Observer | None = None,
    look: Look | None = None,
    quiet: bool = False,
) -> Run:
    """Train a fresh network, or go on from a checkpoint, with a progress bar where there is a terminal to show it.

    Parameters
    ----------
    task, method, choices, device
        What is trained, on what, how and where.
    checkpoint : Path, optional
        File to go on from, where there is one; it is written ``every`` so many steps.
    stop_when_solved : bool
        Whether to end at the goal.
    seconds : float, optional
        Time of training, counted from this call, after which to end; a checkpoint is left to go on from.
    decay : bool
        Whether all learning rates fall along a line to zero, which they would reach after the last step.
    observe : callable, optional
        Called in each step between backward pass and optimisers, outside the time taken.
    look : callable, optional
        Called a few times after a step, outside the time taken; what it returns is kept with the step.
    quiet : bool
        Whether to show and print nothing.
    """
    network, optimizers = method.build(task, choices, device)
    run = Run(
        task.name,
        method.name,
        method.colour,
        settings_of(task, choices, device, decay=decay),
        task.baseline,
        task.goal,
        task.measure,
        sum(p.numel() for p in network.parameters()),
    )
    rates = [group["lr"] for group in _groups(optimizers)]
    if checkpoint is not None and checkpoint.exists():
        _restore(checkpoint, run, network, optimizers)
    done, elapsed = len(run.losses), run.seconds[-1] if run.seconds else 0.0
    limit = math.inf if seconds is None else elapsed + seconds
    label = f"{task.name}, {method.name}, k {choices.k}, seed {choices.seed}"
    measured, looked_at = set(thinned(task.steps)), set(thinned(task.steps, LOOKS)) if look is not None else set()
    batches = islice(task.batches(), done, None)
    with tqdm(batches, label, task.steps, initial=done, unit="step", leave=False, disable=quiet or None) as bar:
        for step, (inputs, targets) in enumerate(bar, done):
            inputs, targets = inputs.to(device), targets.to(device)
            start = perf_counter()
            network.zero_grad()
            loss = task.loss(network(inputs), targets)
            if not torch.isfinite(loss):
                raise NonFiniteError(f"the loss is {loss.item()} at step {step}")
            loss.backward()
            if observe is not None:
                elapsed += perf_counter() - start
                observe(step, network, inputs)
                start = perf_counter()
            if decay:
                for group, rate in zip(_groups(optimizers), rates, strict=True):
                    group["lr"] = rate * (1 - step / task.steps)
            for optimizer in optimizers[:-1]:
                optimizer.step()
            before = perf_counter()
            optimizers[-1].step()
            run.losses.append(loss.item())
            end = perf_counter()
            elapsed += end - start
            run.seconds.append(elapsed)
            run.optimiser_ms.append(1e3 * (end - before))
            run.unitarity.append(network.unitarity_error() if step in measured else None)
            if look is not None and step in looked_at:
                run.looks.append({"step": step + 1, **look(network)})
            bar.set_postfix(loss=f"{run.losses[-1]:.4f}", refresh=False)
            if checkpoint is not None and ((step + 1) % every == 0 or elapsed >= limit):
                _save(checkpoint, run, network, optimizers)
            if elapsed >= limit or (stop_when_solved and step + 1 >= LAST and run.solved):
                break
    run.unitarity[-1:] = [network.unitarity_error()]
    run.held = _held(network, optimizers)
    run.score = task.score(network, device)
    if not quiet:
        print(f"{label}: loss {run.final_loss:.4g}, {task.measure} {run.score:.4g}, {elapsed:.1f} s", flush=True)
    return run


def _held(network: Reader, optimizers: list[torch.optim.Optimizer]) -> int:
    """Return the bytes of weights, gradients and the optimisers' state."""
    weights = list(network.parameters())
    gradients = [p.grad for p in weights if p.grad is not None]
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return sum(t.nbytes for t in (*weights, *gradients, *states) if isinstance(t, Tensor))


def _groups(optimizers: list[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def settings_of(task: Task, choices: Choices, device: torch.device | str, *, decay: bool = False) -> dict[str, Any]:
    """Return all that makes a training what it is, as JSON can hold it; its length only where rates depend on it."""
    whole = {**{f"task {name}": value for name, value in vars(task).items()}, **asdict(choices), "device": str(device)}
    whole |= {"decay over": task.steps} if decay else {}
    left_out = ("task steps", "task epochs", "task folder", "task target")
    return {
        name: v if isinstance(v, int | float | str) else str(v) for name, v in whole.items() if name not in left_out
    }


def _save(file: Path, run: Run, network: Reader, optimizers: list[torch.optim.Optimizer]) -> None:
    """Write a checkpoint; an interruption leaves the one before."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    partial = file.with_suffix(".partial")
    torch.save({"run": asdict(run), "network": network.state_dict(), "optimizers": states}, partial)
    partial.replace(file)


def _restore(file: Path, run: Run, network: Reader, optimizers: list[torch.optim.Optimizer]) -> None:
    """Go on from a checkpoint of the same training; refuse another's."""
    saved = torch.load(file, weights_only=True)
    for name in ("task", "method", "settings"):
        if saved["run"][name] != getattr(run, name):
            raise ValueError(f"{file} is of another training: {name} is {saved['run'][name]}, not {getattr(run, name)}")
    for name in ("losses", "seconds", "unitarity", "optimiser_ms", "looks"):
        getattr(run, name).extend(saved["run"][name])
    network.load_state_dict(saved["network"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    own = {id(p) for p in network.parameters()}
    if any(id(p) not in own for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]):
        raise RuntimeError(f"{file}: loading it replaced parameters that an optimiser has")
