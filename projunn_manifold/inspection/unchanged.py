"""Steps of training that are undone afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from projunn_manifold.manifold.state import State
from projunn_manifold.optim.optimizers import inner_optimizer, layers_of, parameters_of

__all__ = ["unchanged"]


@contextmanager
def unchanged(model: nn.Module, optimizer: Any, states: Iterable[State]) -> Iterator[None]:
    """Undo at the end what the block changes in model, optimiser, manifolds and global random numbers, bit for bit.

    This covers parameters, gradients, buffers and modes, and all tensors, numbers, lists and dicts that modules and
    the optimiser hold, including the optimiser's state and groups.  At the start of the block no parameter has a
    gradient.  Two things are not undone: what the block reads from elsewhere, such as the next batches of an iterator,
    and changes inside objects of other classes that modules hold.

    Raises
    ------
    RuntimeError
        At the end, if some tensors could not be given back their values; all others have them.
    """
    held = () if optimizer is None else parameters_of(inner_optimizer(optimizer))
    parameters = list({id(p): p for p in (*model.parameters(), *held)}.values())
    before = _Snapshot()
    for module in model.modules():
        before.take(vars(module))
    for holder in () if optimizer is None else layers_of(optimizer):
        before.take(vars(holder))
    gradients, wanted = [p.grad for p in parameters], [p.requires_grad for p in parameters]
    with ExitStack() as kept:
        kept.enter_context(_same_random_numbers(parameters))
        for state in {id(state): state for state in states}.values():
            kept.enter_context(state.unchanged())
        try:
            for p in parameters:
                p.grad = None
            yield
        finally:
            for p, gradient, is_wanted in zip(parameters, gradients, wanted, strict=True):
                p.grad = gradient
                p.requires_grad_(is_wanted)
            before.put_back()


class _Snapshot:
    """Values of tensors and contents of containers, which can be put back in place."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, Any]] = {}
        self._versions: dict[int, int] = {}

    def take(self, value: Any) -> None:
        """Remember a tensor, or a container and everything in it."""
        if id(value) in self._kept:
            return
        if isinstance(value, Tensor):
            if not value.is_meta:
                self._kept[id(value)] = value, value.detach().clone()
                if not value.is_inference():
                    self._versions[id(value)] = value._version
        elif isinstance(value, MutableMapping):
            self._kept[id(value)] = value, dict(value)
            for each in (*value.keys(), *value.values()):
                self.take(each)
        elif isinstance(value, list):
            self._kept[id(value)] = value, list(value)
            for each in value:
                self.take(each)
        elif isinstance(value, tuple):
            for each in value:
                self.take(each)

    @torch.no_grad()
    def put_back(self) -> None:
        """Give every tensor its values and every container its contents; raise at the end if some tensors refused."""
        failures = []
        for value, before in self._kept.values():
            try:
                self._put_back_one(value, before)
            except RuntimeError as failure:
                failures.append(failure)
        if failures:
            raise RuntimeError(f"{len(failures)} tensors could not be given back their values") from failures[0]

    def _put_back_one(self, value: Any, before: Any) -> None:
        if isinstance(value, Tensor):
            if value.shape != before.shape:
                value.resize_(before.shape)
            if self._was_written(value, before):
                value.copy_(before)
        elif isinstance(value, list):
            value[:] = before
        elif not _holds_the_same(value, before):
            value.clear()
            value.update(before)

    def _was_written(self, value: Tensor, before: Tensor) -> bool:
        """Return whether a tensor may have other values: it was written to, or its memory was, as through ``.data``."""
        version = self._versions.get(id(value))
        if version is not None and version != value._version:
            return True
        return value.layout is torch.strided and not torch.equal(value, before)


def _holds_the_same(value: MutableMapping[Any, Any], before: dict[Any, Any]) -> bool:
    pairs = zip(value.items(), before.items(), strict=False)
    return len(value) == len(before) and all(k is j and v is w for (k, v), (j, w) in pairs)


@contextmanager
def _same_random_numbers(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Restore the global generators: Python's, NumPy's, PyTorch's on CPU and on the devices of the parameters."""
    devices = {p.device for p in parameters if p.device.type not in ("cpu", "meta")}
    kept, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with ExitStack() as forks:
        forks.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {device.type for device in devices}:
            indices = sorted({device.index or 0 for device in devices if device.type == kind})
            forks.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        try:
            yield
        finally:
            random.setstate(kept)
            np.random.set_state(legacy)  # noqa: NPY002
