"""What a step allocates, and how many operators it calls."""

from __future__ import annotations

import os
import tracemalloc
import weakref
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .trials import Trial

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's log lines would tear the progress bar

STEPS = 64  # averaged over; ours correct a block of columns every so many steps


class Allocations(TorchDispatchMode):
    """Counts the bytes of every storage that an operator of torch makes.

    Tensor subclasses unpack themselves first, and their operators are seen here.  What happens inside one operator
    (workspaces of LAPACK) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.peak = 0
        self._live = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented
        known = _storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        for key, storage in _storages(result).items():
            if key not in known:
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.total += max(size, 0)
        self._live += size
        self.peak = max(self.peak, self._live)


def allocated(trial: Trial, steps: int = STEPS) -> dict[str, float]:
    """Return bytes allocated by a step, on average, and the most that lived at one time.

    NumPy's arrays are counted too, by their peak in each step, which Python's tracemalloc tells.
    """
    for _ in range(2):  # state of optimisers is made at the first step
        trial.step()
    peaks = []
    tracemalloc.start()
    with Allocations() as allocations:
        for _ in range(steps):
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            trial.step()
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
    tracemalloc.stop()
    return {
        "bytes_per_step": allocations.total / steps + sum(peaks) / steps,
        "peak_bytes": allocations.peak + max(peaks),
    }


def operators(trial: Trial, steps: int = STEPS) -> dict[str, float]:
    """Return calls of ATen's operators in a step: from outside ATen, and all with those they call in turn."""
    for _ in range(2):
        trial.step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            trial.step()
    events = [event for event in profiler.events() if event.name.startswith("aten::")]
    outer = [event for event in events if not (event.cpu_parent and event.cpu_parent.name.startswith("aten::"))]
    return {"calls": len(outer) / steps, "calls_with_inner": len(events) / steps}


def _storages(tree: Any) -> dict[int, torch.UntypedStorage]:
    """Return the storages of the tensors in a tree by their identity."""
    storages = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return {storage._cdata: storage for storage in storages}
