"""What a training step of one square layer costs as the layer grows: forward, backward and the optimiser's step."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .descents import Descent
from .networks import Choices

BATCH = 16


def step_times(descent: Descent, k: int, sizes: list[int], seconds: float) -> dict[int, dict[str, float]]:
    """Return for each n the median milliseconds of the optimiser's step and of the whole one, taken for some seconds.

    Each size gets at least three steps, after two that are not timed.
    """
    return {n: _timed(descent, k, n, seconds) for n in tqdm(sizes, f"{descent.name}, k {k}", leave=False, disable=None)}


def _timed(descent: Descent, k: int, n: int, seconds: float) -> dict[str, float]:
    torch.manual_seed(0)
    layer, x, targets = nn.Linear(n, n, bias=False), torch.randn(BATCH, n), torch.randn(BATCH, n)
    with torch.no_grad():
        layer.weight.copy_(_reflection(n))
    (optimizer,) = descent.put(layer, Choices(n, k=k), 1e-3)
    steps, whole, end = [], [], perf_counter() + seconds
    while len(whole) < 5 or perf_counter() < end:
        start = perf_counter()
        optimizer.zero_grad()
        (layer(x) - targets).square().mean().backward()
        before = perf_counter()
        optimizer.step()
        now = perf_counter()
        steps.append(1e3 * (now - before))
        whole.append(1e3 * (now - start))
    return {"step_ms": median(steps[2:]), "whole_ms": median(whole[2:])}


def _reflection(n: int) -> Tensor:
    """Return a dense orthogonal matrix that costs no factorisation."""
    v = torch.randn(n, 1)
    return torch.eye(n) - 2 / v.square().sum() * v @ v.mT
