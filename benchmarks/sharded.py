"""One matrix in many processes: what a step costs each of them, by a model, by measurement and by simulation.

Three ways to step on an n x n matrix, k = 1: the gradient is averaged and every process makes the same step (DDP); only
sketches are sent (``data_parallel``); every process has some rows (``DTensor``).  Run ``python benchmarks/sharded.py``
(six minutes): 1, 2 and 4 processes on gloo are measured, and the first of up to 1024, whose peers do not answer, is run
alone for its own share of work, memory and traffic.  It leaves ``sharded.json`` and ``sharded.png``;
``--record JSON --into PAGE`` writes the tables of a recorded run into a page.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import geoopt
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
from common.report import add_record_options, environment, machine_of, markdown, recorded, tell

from projunn_manifold import UnitaryLowRank, manifolds_of, reattach_manifolds
from projunn_manifold.distributed import data_parallel
from projunn_manifold.linalg import products
from projunn_manifold.optim import RiemannianSGD

WAYS = ("matrices", "sketches", "rows")
COLOURS = dict(zip(WAYS, ("tab:gray", "tab:blue", "tab:green"), strict=True))
MEASURED, SIMULATED = (1, 2, 4), ((16384, 64), (16384, 1024), (65536, 256), (65536, 1024))
STEPS = 128  # some; a block of columns is corrected in every 32nd or so


def model(way: str, n: int, processes: int, k: int = 1, sweep: int = 256) -> dict[str, float]:
    """Return what a step costs each process: numbers that collectives carry, numbers held, operations.

    A sketch is y and b, kn numbers each.  With rows, y and X b are gathered, b and X^H [X b, a] are summed; and the
    correction of drift, about k columns in a step, sums a column for each.
    """
    drift = k * n / max(n, sweep)  # columns in a step
    share = processes if way == "rows" else 1
    carried = {"matrices": n * n, "sketches": 2 * k * n, "rows": 5 * k * n + drift * n}[way]
    return {
        "carried": 0 if processes == 1 else carried,
        "held": 2 * n * n / share,  # X and its gradient
        "operations": (14 * k + 4 * drift) * n * n / share,  # 2 for each entry and column of 7 thin products
    }


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the numbers that collectives carry: those of a sum, or of all that is gathered."""
    carried, reduce, gather = [], dist.all_reduce, dist.all_gather

    def all_reduce(t: Any, *arguments: Any, **options: Any) -> Any:
        carried.append(t.numel())
        return reduce(t, *arguments, **options)

    def all_gather(pieces: Any, t: Any, *arguments: Any, **options: Any) -> Any:
        carried.append(sum(piece.numel() for piece in pieces))
        return gather(pieces, t, *arguments, **options)

    dist.all_reduce, dist.all_gather = all_reduce, all_gather
    try:
        yield carried
    finally:
        dist.all_reduce, dist.all_gather = reduce, gather


def stepper(way: str, n: int, mesh: DeviceMesh) -> tuple[Any, Callable[[], None]]:
    """Return a parameter with a gradient, and a step on it along that gradient."""
    manifold = UnitaryLowRank(1, non_finite="skip")  # simulated peers answer with whatever there was in memory
    module = nn.Module()
    if way == "rows":
        module.weight = geoopt.ManifoldParameter(torch.empty(n, n, device="meta"), manifold=manifold)
        plan = manifolds_of(module)
        height = -(-n // mesh.size())
        first = mesh.get_local_rank() * height
        own = torch.zeros(max(0, min(height, n - first)), n)
        own[:, first : first + len(own)].fill_diagonal_(1)
        shape = {"shape": torch.Size((n, n)), "stride": (n, 1)}
        module.weight = nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)], run_check=False, **shape))
        gradient = DTensor.from_local(torch.randn(own.shape), mesh, [Shard(0)], run_check=False, **shape)
        reattach_manifolds(module, plan)
    else:
        module.weight, gradient = geoopt.ManifoldParameter(torch.eye(n), manifold=manifold), torch.randn(n, n)
    optimizer = RiemannianSGD(module.parameters(), lr=1e-6)
    if way == "sketches":
        data_parallel(module, optimizer)

    def step() -> None:
        if way == "matrices":
            dist.all_reduce(gradient)
            gradient.div_(dist.get_world_size())
        module.weight.grad = gradient
        optimizer.step()

    return module.weight, step


def added(_: Any, left: Any, right: Any, **__: Any) -> int:
    """Return the operations of a product of these shapes that is added in place, which torch's counter leaves out."""
    return 2 * left[0] * left[1] * right[1]


def cost(way: str, n: int, mesh: DeviceMesh, steps: int) -> dict[str, Any]:
    """Return what steps cost this process, in the mean, and the median of their milliseconds."""
    weight, step = stepper(way, n, mesh)
    times = []
    with counted() as carried:
        for _ in range(steps):
            begin = perf_counter()
            step()
            times.append(1e3 * (perf_counter() - begin))
    own = weight.detach().to_local() if isinstance(weight, DTensor) else weight
    loops, products.compiled = products.compiled, None  # torch counts its own products only
    try:
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as operations:
            for _ in range(steps):
                step()
    finally:
        products.compiled = loops
    return {
        "way": way,
        "n": n,
        "processes": mesh.size(),
        "carried": sum(carried) / steps if mesh.size() > 1 else 0,
        "held": 2 * own.numel(),
        "operations": operations.get_total_flops() / steps,
        "ms": median(times),
    }


def in_process(rank: int, processes: int, port: int, sizes: list[int], folder: str) -> None:
    """Measure every way and size in one of several processes."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=processes, timeout=timedelta(seconds=120))
    mesh = init_device_mesh("cpu", (processes,))
    cases = [(way, n) for n in sizes for way in WAYS]
    progress = tqdm(cases, f"{processes} processes", leave=False, disable=True if rank else None)
    cells = [cost(way, n, mesh, STEPS) for way, n in progress]
    if rank == 0:
        Path(folder, "cells.json").write_text(json.dumps(cells), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # DTensor keeps the group, and with it gloo's threads, which may abort a process while Python ends


def simulate(_: int, n: int, processes: int, folder: str) -> None:
    """Run the first of many processes, whose peers do not answer."""
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    cell = cost("rows", n, init_device_mesh("cpu", (processes,)), STEPS)
    Path(folder, "cells.json").write_text(json.dumps([cell]), encoding="utf-8")
    dist.destroy_process_group()


def spawned(function: Callable[..., None], processes: int, *arguments: Any) -> list[dict[str, Any]]:
    """Run a function in so many processes and return the cells that it left."""
    with TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(function, (*arguments, folder), nprocs=processes)
        return json.loads(Path(folder, "cells.json").read_text(encoding="utf-8"))


def measure(sizes: list[int], measured: tuple[int, ...], simulated: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    """Measure and simulate everything."""
    torch.set_num_threads(1)
    cells, alone = [], []
    for processes in tqdm(measured, "measured", disable=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        cells += spawned(in_process, processes, processes, port, sizes)
    for n, processes in tqdm(simulated, "simulated", disable=None):
        alone += spawned(simulate, 1, n, processes)
    return {"measured": cells, "simulated": alone, "steps": STEPS, **environment()}


def table(cells: list[dict[str, Any]]) -> str:
    """Return a row for each case: what was found, and what the model says."""
    rows = [["communicated", "n", "processes", "sent (KiB)", "model", "stored (MiB)", "model", "Mflop", "model", "ms"]]
    for c in cells:
        said = model(c["way"], c["n"], c["processes"])
        rows.append(
            [
                c["way"],
                str(c["n"]),
                str(c["processes"]),
                *(f"{value['carried'] * 4 / 2**10:.4g}" for value in (c, said)),
                *(f"{value['held'] * 4 / 2**20:.4g}" for value in (c, said)),
                *(f"{value['operations'] / 1e6:.4g}" for value in (c, said)),
                f"{c['ms']:.3g}",
            ]
        )
    return markdown(rows)


def draw(path: Path, record: dict[str, Any]) -> None:
    """Draw the model's traffic and memory with what was found."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    traffic, memory = figure.subplots(1, 2)
    sizes = [2**e for e in range(10, 17)]
    found = [*record["measured"], *record["simulated"]]
    for way, colour in COLOURS.items():
        traffic.plot(sizes, [4 * model(way, n, 2)["carried"] for n in sizes], color=colour, label=way)
        cells = [c for c in found if c["way"] == way and c["processes"] > 1]
        traffic.plot([c["n"] for c in cells], [4 * c["carried"] for c in cells], "o", color=colour, markersize=5)
    traffic.set(xlabel="n", ylabel="bytes that collectives carry in a step", xscale="log", yscale="log")
    traffic.set_xticks(sizes, sizes, fontsize="small")
    counts = [2**e for e in range(11)]
    for n, shade in zip((1024, 4096, 16384, 65536), ("0.7", "0.5", "0.3", "0.0"), strict=True):
        memory.plot(counts, [4 * model("rows", n, p)["held"] for p in counts], color=shade, label=f"rows, n = {n}")
        cells = [c for c in found if c["way"] == "rows" and c["n"] == n]
        memory.plot([c["processes"] for c in cells], [4 * c["held"] for c in cells], "o", color=shade, markersize=5)
    memory.set(xlabel="processes", ylabel="bytes of X and its gradient in each", xscale="log", yscale="log")
    memory.set_xticks(counts[::2], counts[::2], fontsize="small")
    for panel in (traffic, memory):
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize="small")
    figure.suptitle("lines: the model; dots: measured with up to 4 processes, simulated beyond", fontsize="small")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """Measure or render, and return the exit status."""
    command = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    command.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096], help="(default: %(default)s)")
    command.add_argument("--small", action="store_true", help="few processes, none of them far away")
    add_record_options(command, "results/sharded")
    options = command.parse_args(arguments)
    many = ((2,), ((512, 8),)) if options.small else (MEASURED, SIMULATED)
    record = recorded(options, "sharded", lambda: measure(options.sizes, *many))
    options.out.mkdir(parents=True, exist_ok=True)
    draw(options.out / "sharded.png", record)
    text = (
        f"\nMeasured, with gloo on the loopback interface:\n\n{table(record['measured'])}\n\n"
        f"Simulated, for the first process:\n\n{table(record['simulated'])}\n\n"
        f"Means of {record['steps']} steps; times are medians, and simulated times contain no communication.  float32, "
        f"k = 1, on {machine_of(record)}.\n"
    )
    tell(options, "sharded", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
