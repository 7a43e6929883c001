"""Training in several processes: communication and time of a step with sketches, with matrices and with PowerSGD.

Run ``torchrun --nproc-per-node 2 examples/distributed.py`` (a minute): a classifier of scikit-learn's digits with one
unitary layer of n x n, trained by torch's DistributedDataParallel as it is, by the exchange of sketches, and, without
the constraint, by DDP with torch's PowerSGD hook of rank one.  The first process shows progress and leaves
``distributed.json`` and ``distributed.png``.  ``python examples/distributed.py --record JSON --into PAGE`` writes the
table of a recorded run into a page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from matplotlib.figure import Figure
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from common.data import digits
from common.report import add_record_options, environment, machine_of, markdown, recorded, tell

from projunn_manifold import unitarity_error
from projunn_manifold.distributed import data_parallel
from projunn_manifold.layers import UnitaryLinear
from projunn_manifold.optim import RiemannianSGD

BATCH = 64
COLOURS = {"matrices (DDP)": "tab:gray", "sketches": "tab:blue", "PowerSGD, unconstrained": "tab:red"}


class Counted:
    """How many bytes a process has handed over."""

    bytes = 0


def dense_hook(counted, bucket):  # a GradBucket; torch would refuse a postponed annotation
    """Average a bucket, as DDP does, and count it."""
    buffer = bucket.buffer()
    counted.bytes += buffer.numel() * buffer.element_size()
    future = dist.all_reduce(buffer.div_(dist.get_world_size()), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def network(n: int, unitary: bool) -> nn.Sequential:
    """Return a classifier with one layer of n x n."""
    torch.manual_seed(0)
    middle = UnitaryLinear(n, n, k=1) if unitary else nn.Linear(n, n)
    return nn.Sequential(nn.Linear(64, n), nn.ReLU(), middle, nn.ReLU(), nn.Linear(n, 10))


def run(name: str, n: int, steps: int) -> dict[str, Any]:
    """Train, and return what travelled and how long steps took."""
    model = network(n, "PowerSGD" not in name)
    optimizer = RiemannianSGD(model.parameters(), lr=0.05)
    handed_over: Callable[[], int]
    if name.startswith("PowerSGD"):
        # one bucket: with several, the hook's second exchanges were seen to come in different orders on gloo
        ddp = DistributedDataParallel(model, bucket_cap_mb=4096)
        state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        handed_over = lambda: 4 * state.total_numel_after_compression  # noqa: E731
    else:
        counted, exchange = Counted(), Counted()
        if name == "sketches":
            ddp, exchange = data_parallel(model, optimizer)
        else:
            ddp = DistributedDataParallel(model)
        ddp.register_comm_hook(counted, dense_hook)
        handed_over = lambda: counted.bytes + exchange.bytes  # noqa: E731
    (train, labels), (test, answers) = digits(False)
    pixels, generator = train[..., 0].T, torch.Generator().manual_seed(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    times, sent = [], 0
    for _ in tqdm(range(steps), f"{name}, n = {n}", leave=False, disable=True if rank else None):
        chosen = torch.randint(len(labels), (BATCH,), generator=generator)[rank::world]
        dist.barrier()
        before = handed_over()
        begin = perf_counter()
        optimizer.zero_grad()
        cross_entropy(ddp(pixels[chosen]), labels[chosen]).backward()
        optimizer.step()
        times.append(1e3 * (perf_counter() - begin))
        sent = handed_over() - before
    with torch.no_grad():
        accuracy = (model(test[..., 0].T).argmax(-1) == answers).double().mean().item()
    error = unitarity_error(model[2].weight).item() if "PowerSGD" not in name else None
    quartiles = quantiles(times[3:], n=4)
    return {"name": name, "n": n, "bytes": sent, "ms": quartiles, "accuracy": accuracy, "unitarity_error": error}


def table(record: dict[str, Any]) -> str:
    """Return a row for each way and size."""
    rows = [["n", "communicated", "KiB per step", "ms per step", "test accuracy", "unitarity error"]]
    for c in record["cells"]:
        low, middle, high = c["ms"]
        error = "–" if c["unitarity_error"] is None else f"{c['unitarity_error']:.1e}"
        rows.append(
            [
                str(c["n"]),
                c["name"],
                f"{c['bytes'] / 1024:.1f}",
                f"{middle:.3g} ({low:.3g}–{high:.3g})",
                f"{c['accuracy']:.1%}",
                error,
            ]
        )
    return markdown(rows)


def draw(path: Path, record: dict[str, Any]) -> None:
    """Draw bytes and milliseconds against n."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    values: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("KiB that a process hands over in a step", lambda c: c["bytes"] / 1024),
        ("milliseconds for a step", lambda c: c["ms"][1]),
    ]
    for panel, (what, value) in zip(figure.subplots(1, 2), values, strict=True):
        for name, colour in COLOURS.items():
            cells = [c for c in record["cells"] if c["name"] == name]
            panel.plot([c["n"] for c in cells], [value(c) for c in cells], "o-", color=colour, label=name)
        panel.set(xscale="log", yscale="log", xlabel="n", ylabel=what)
        sizes = sorted({c["n"] for c in record["cells"]})
        panel.set_xticks(sizes, sizes)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)


def measure(sizes: list[int], steps: int) -> dict[str, Any]:
    """Train in this process beside the others; only the first returns, to report for all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cells = [run(name, n, steps) for n in sizes for name in COLOURS]
    record = {"processes": dist.get_world_size(), "steps": steps, "cells": cells, **environment()}
    first = dist.get_rank() == 0
    # Gloo's threads must end before Python does, or the process may abort.  They end with the last reference to the
    # process group.  DistributedDataParallel imports a module whose functions keep the group of that moment as a
    # default argument; imported above, before there is a group, it keeps none.
    dist.barrier()
    dist.destroy_process_group()
    if not first:
        sys.exit()
    return record


def main(arguments: list[str] | None = None) -> int:
    """Train in this process, or render, and return the exit status."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="(default: %(default)s)")
    command.add_argument("--steps", type=int, default=20, help="(default: %(default)s)")
    add_record_options(command, "results/distributed")
    options = command.parse_args(arguments)
    record = recorded(options, "distributed", lambda: measure(options.sizes, options.steps))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(options.out / "distributed.png", record)
    text = (
        f"\n{table(record)}\n\n{record['processes']} processes with gloo on the loopback interface; total batch "
        f"size {BATCH}; medians of {record['steps']} steps, with quartiles in brackets.  DDP and sketches send the "
        "gradients of the two other layers and of all biases in full; PowerSGD sends every matrix at rank one.  "
        f"Measured on {machine_of(record)}.\n"
    )
    tell(options, "distributed", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
