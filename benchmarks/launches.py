"""Launches of a step: the operators that it gives to a device on which the host does not look at values.

Run ``python benchmarks/launches.py`` (a minute, most of it for a compiler); ``--record JSON --into PAGE`` writes the
table of a recorded run into a page.  The CPU stands in for the device.  A launch is an operator of ATen other than
views and allocations; the drift correction, which comes once in many steps, is spread over all of them.  Under
``torch.compile`` a launch is a kernel that the compiler makes, or a product that it leaves to a library.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geoopt
import torch
from torch._inductor import metrics
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from common.report import add_record_options, environment, markdown, recorded, tell

from projunn_manifold import UnitaryLowRank, context, linalg, optim, projunn_d, projunn_t
from projunn_manifold.linalg import gpu, products

SIDE = 64
STEPS = 320  # every column is corrected several times
NO_LAUNCH = frozenset(
    """alias as_strided conj _conj detach diagonal empty empty_like empty_strided expand imag lift_fresh new_empty
    new_empty_strided permute real reshape _reshape_alias resolve_conj select slice split split_with_sizes squeeze t
    tensor_split transpose unbind unsqueeze _unsafe_view view view_as_real""".split()  # noqa: SIM905
)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "RiemannianSGD": lambda p: optim.RiemannianSGD([p], lr=1e-3),
    "RiemannianSGD, momentum": lambda p: optim.RiemannianSGD([p], lr=1e-3, momentum=0.9),
    "RiemannianAdam": lambda p: optim.RiemannianAdam([p], lr=1e-3),
}


class Counted(TorchDispatchMode):
    """Counts launches."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operator, and call it."""
        name = func._schema.name
        self.count += name.startswith("aten::") and name.removeprefix("aten::") not in NO_LAUNCH
        return func(*args, **(kwargs or {}))


def launches(optimizer: str, k: int | None, dtype: torch.dtype) -> float:
    """Return the mean number of launches of a step."""
    manifold, draw = UnitaryLowRank(k), torch.Generator().manual_seed(0)
    p = geoopt.ManifoldParameter(manifold.random(SIDE, SIDE, dtype=dtype, generator=draw), manifold=manifold)
    p.grad = torch.randn(SIDE, SIDE, dtype=dtype, generator=draw)
    step = OPTIMIZERS[optimizer](p).step
    step()
    with Counted() as counted:
        for _ in range(STEPS):
            step()
    return counted.count / STEPS


class Kernels:
    """Stands in for the module of the kernels in Triton: counts their launches, and computes nothing."""

    count = 0

    def __getattr__(self, name: str) -> Any:
        """Return a kernel, to be given a grid and then arguments."""
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return what is called with the arguments."""
        return self.launched

    def launched(self, *arguments: Any, **constants: Any) -> None:
        """Count a launch; what the kernels would say of steps is that they were made."""
        self.count += 1
        for t in arguments:
            if isinstance(t, torch.Tensor) and t.dtype in (torch.uint8, torch.float64):
                t.numpy().fill(0)  # behind the back of the count of operators


def launches_with_kernels(optimizer: str, dtype: torch.dtype) -> float:
    """Return the same for a step by the kernels in Triton and what is around them."""
    suits, kernels, name = gpu.suits, Kernels(), "projunn_manifold.linalg.gpu_kernels"
    gpu.suits = lambda x, g: True
    sys.modules[name] = vars(linalg)["gpu_kernels"] = kernels
    try:
        operators = launches(optimizer, 1, dtype)
        return operators + kernels.count / (STEPS + 1)
    finally:
        gpu.suits = suits
        del sys.modules[name], vars(linalg)["gpu_kernels"]


def launches_of(move: Callable[..., torch.Tensor], k: int) -> tuple[int, int]:
    """Return the launches of a function of (X, a, b), real, as it is and under ``torch.compile``."""
    draw = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(SIDE, SIDE, generator=draw)).Q
    factors = [torch.randn(SIDE, k, generator=draw) / SIDE for _ in range(2)]
    with torch.no_grad():
        with Counted() as counted:
            move(x, *factors)
        metrics.reset()
        torch.compile(move, fullgraph=True)(x, *factors)
        made = metrics.generated_kernel_count
        torch._dynamo.reset()
        _, code = run_and_get_code(torch.compile(move, fullgraph=True), x, *factors)
    return counted.count, made + sum(text.count("extern_kernels.") for text in code)


def measure_all() -> dict[str, Any]:
    """Count every step."""
    context.readable = lambda x: False
    products.compiled = None
    dtypes = {"float32": torch.float32, "complex64": torch.complex64}
    cells = [
        {"optimizer": f"{name}, Triton", "k": 1, "dtype": number, "launches": launches_with_kernels(name, dtype)}
        for name in OPTIMIZERS
        for number, dtype in dtypes.items()
    ]
    cells += [
        {"optimizer": optimizer, "k": k, "dtype": name, "launches": launches(optimizer, k, dtype)}
        for optimizer in OPTIMIZERS
        for k in (1, 4, 16, None)
        for name, dtype in dtypes.items()
    ]
    for move in (projunn_t, projunn_d) if shutil.which("g++") else ():  # which the compiler needs on CPU
        plain, compiled = launches_of(move, 1)
        for name, count in ((move.__name__, plain), (f"{move.__name__}, compiled", compiled)):
            cells.append({"optimizer": name, "k": 1, "dtype": "float32", "launches": count})
    return {"cells": cells, "steps": STEPS, "side": SIDE, **environment()}


def table(cells: list[dict[str, Any]]) -> str:
    """Return a row for each optimiser and dtype."""
    found = {(cell["optimizer"], cell["dtype"], cell["k"]): cell["launches"] for cell in cells}
    ranks = list(dict.fromkeys(k for _, _, k in found))
    rows = [["step", "dtype", *(f"k = {k}" for k in ranks)]]
    for name, dtype in dict.fromkeys((name, dtype) for name, dtype, _ in found):
        counts = (found.get((name, dtype, k)) for k in ranks)
        rows.append([name, dtype, *("" if count is None else f"{count:.0f}" for count in counts)])
    return markdown(rows)


def main(arguments: list[str] | None = None) -> int:
    """Count or render, and return the exit status."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_record_options(command, "results/launches")
    options = command.parse_args(arguments)
    record = recorded(options, "launches", measure_all)
    tell(options, "launches", f"\n{table(record['cells'])}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
