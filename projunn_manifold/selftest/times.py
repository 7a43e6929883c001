"""Times of steps, beside torch's SGD and Adam, geoopt's Stiefel and POGO; of training steps, beside torch's layers.

On CPU, geoopt's Stiefel and POGO are timed up to n = 512.  POGO is left out if it is not installed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import geoopt
import torch
from torch import Tensor, nn

from projunn_manifold.context import wait_for
from projunn_manifold.layers import OrthogonalConv2d, UnitaryRNN
from projunn_manifold.linalg import dense
from projunn_manifold.manifold.unitary import UnitaryLowRank
from projunn_manifold.optim.in_place import RiemannianAdam, RiemannianSGD

__all__ = ["Time", "sizes_of", "step_times", "training_times"]

_REPETITIONS, _ENOUGH = 15, 0.5  # of a time, and seconds for them


class Time(NamedTuple):
    """Median milliseconds of a call."""

    what: str
    size: str
    ms: float


def sizes_of(device: torch.device, quick: bool) -> tuple[int, ...]:
    """Return the sizes n of the n x n matrices whose steps are timed."""
    if quick:
        return (64,)
    return (128, 256, 512, 1024) if device.type == "cpu" else (128, 256, 512, 1024, 2048, 4096, 8192)


def _largest_of_rivals(device: torch.device) -> int:
    return 512 if device.type == "cpu" else 8192


def median_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Return the median milliseconds of up to 15 calls, after two that are not counted; it ends after half a second."""
    found: list[float] = []
    start = time.perf_counter()
    for i in range(_REPETITIONS + 2):
        wait_for(device)
        before = time.perf_counter()
        call()
        wait_for(device)
        if i >= 2:
            found.append(1e3 * (time.perf_counter() - before))
        if found and time.perf_counter() - start > _ENOUGH:
            break
    return statistics.median(found)


def step_times(device: torch.device, sizes: tuple[int, ...]) -> Iterator[Time]:
    """Iterate over the times of a step of each optimiser, in float32."""
    for n in sizes:
        draw = torch.Generator().manual_seed(0)
        x = dense.haar(n, n, dtype=torch.float32, device="cpu", generator=draw).to(device)
        g = torch.randn(n, n, generator=draw).to(device)
        for name, make in _optimizers(n <= _largest_of_rivals(device)).items():
            step = make(x.clone(), g)
            yield Time(name, str(n), median_ms(step, device))


def _optimizers(with_rivals: bool) -> dict[str, Callable[[Tensor, Tensor], Callable[[], Any]]]:
    def on(manifold: Any, kind: Any) -> Callable[[Tensor, Tensor], Callable[[], Any]]:
        def make(x: Tensor, g: Tensor) -> Callable[[], Any]:
            p: Any = nn.Parameter(x) if manifold is None else geoopt.ManifoldParameter(x, manifold=manifold)
            p.grad = g
            step: Callable[[], Any] = kind([p], lr=1e-3).step
            return step

        return make

    found = {
        "torch SGD": on(None, torch.optim.SGD),
        "torch Adam": on(None, torch.optim.Adam),
        "RiemannianSGD, k = 1": on(UnitaryLowRank(1), RiemannianSGD),
        "RiemannianSGD, k = 4": on(UnitaryLowRank(4), RiemannianSGD),
        "RiemannianAdam, k = 1": on(UnitaryLowRank(1), RiemannianAdam),
        "RiemannianAdam, k = 4": on(UnitaryLowRank(4), RiemannianAdam),
        "RiemannianSGD, k = None": on(UnitaryLowRank(None), RiemannianSGD),
    }
    if with_rivals:
        found["geoopt EuclideanStiefel"] = on(geoopt.EuclideanStiefel(), geoopt.optim.RiemannianSGD)
        found |= _pogo()
    return found


def _pogo() -> dict[str, Callable[[Tensor, Tensor], Callable[[], Any]]]:
    try:
        from pogo import POGO, base
    except ImportError:
        return {}

    def make(x: Tensor, g: Tensor) -> Callable[[], Any]:
        p = nn.Parameter(x)
        p.grad = g
        step: Callable[[], Any] = POGO([p], base.SGD(), 1e-3, flatten_fn=lambda t: t[None]).step
        return step

    return {"POGO": make}


def training_times(device: torch.device, quick: bool) -> Iterator[Time]:
    """Iterate over the times of whole training steps, beside torch's layers."""
    length, batch, hidden = (8, 4, 16) if quick else (100, 64, 170) if device.type == "cpu" else (784, 128, 170)
    size = f"T = {length}, B = {batch}, n = {hidden}"
    for rnn in (nn.RNN(1, hidden), UnitaryRNN(1, hidden, k=1)):
        yield Time(type(rnn).__name__, size, _training_ms(rnn.to(device), torch.randn(length, batch, 1, device=device)))
    side, channels = (8, 4) if quick else (16, 32)
    size = f"{channels} channels, {side} x {side}"
    images = torch.randn(4 if quick else 16, channels, side, side, device=device)
    around: dict[str, Any] = {"padding": 1, "padding_mode": "circular"}
    for conv in (nn.Conv2d(channels, channels, 3, **around), OrthogonalConv2d(channels, channels, image_size=side)):
        yield Time(type(conv).__name__, size, _training_ms(conv.to(device), images))


def _training_ms(layer: nn.Module, x: Tensor) -> float:
    optimizer: Any = RiemannianSGD(layer.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        y = layer(x)
        (y[0] if isinstance(y, tuple) else y).square().mean().backward()
        optimizer.step()

    return median_ms(step, x.device)
