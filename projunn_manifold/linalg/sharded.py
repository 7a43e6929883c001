"""A matrix whose rows, or a stack whose matrices, are sharded over processes (torch's ``DTensor``, ``Shard(d)``).

Thin matrices, n x k and m x k, are whole in every process, and so is all that is made of them.  For an ordinary tensor
every function here is the identity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "all_agree",
    "as_real",
    "first_entry",
    "first_row",
    "gather_rows",
    "group_agrees",
    "is_dtensor",
    "is_sharded",
    "local_matrices",
    "local_rows",
    "local_shard",
    "sum_over_shards",
]


def is_dtensor(x: object) -> bool:
    """Return whether x is a ``DTensor``."""
    return hasattr(x, "placements")


def is_sharded(x: Tensor) -> bool:
    """Return whether other processes hold other parts of x."""
    return is_dtensor(x) and any(placement.is_shard() for placement in x.placements)  # type: ignore[attr-defined]


def local_shard(x: Tensor) -> Tensor:
    """Return the part of x that this process holds, in the same memory."""
    if not is_sharded(x):
        return x
    here: Tensor = x.to_local()  # type: ignore[attr-defined]
    return here


# -- one matrix, its rows sharded ------------------------------------------------------------------------


def first_row(x: Tensor) -> int:
    """Return the number of the first local row of x."""
    if not is_sharded(x):
        return 0
    _, rank, _, height = _layout(x)
    return rank * height


def local_rows(x: Tensor, t: Tensor) -> Tensor:  # (n, k) -> (local rows, k)
    """Return the rows of a thin matrix that belong to the local rows of x."""
    if not is_sharded(x):
        return t
    return t[first_row(x) : first_row(x) + len(local_shard(x))]


def gather_rows(x: Tensor, t: Tensor) -> Tensor:  # (local rows, k) -> (n, k)
    """Return all rows of a thin matrix; each process holds those that belong to its rows of x."""
    if not is_sharded(x):
        return t
    group, _, processes, height = _layout(x)
    piece = t.new_zeros(height, t.shape[-1])  # the last processes may have fewer rows, or none
    piece[: len(t)] = t
    whole = t.new_empty(processes * height, t.shape[-1])
    dist.all_gather(list(as_real(whole).chunk(processes)), as_real(piece), group=group)
    return whole[: x.shape[0]]


def sum_over_shards(x: Tensor, t: Tensor) -> Tensor:
    """Return the sum of t over the processes, each of which made its own from its rows of x."""
    if not is_sharded(x):
        return t
    t = t.contiguous()
    dist.all_reduce(as_real(t), group=_layout(x)[0])
    return t


def first_entry(x: Tensor) -> Tensor:  # (*batch, n, m) -> (*batch, 1, 1)
    """Return the first entry of each matrix."""
    first = local_shard(x)[..., :1, :1]
    if not is_sharded(x):
        return first
    return sum_over_shards(x, first if first_row(x) == 0 else first.new_zeros(1, 1))


# -- a stack of matrices, sharded between them -----------------------------------------------------------


def local_matrices(x: Any) -> Tensor:
    """Return the local matrices of a sharded stack, with the group of the processes that hold the others."""
    here: Any = local_shard(x)
    here.process_group = _layout(x)[0]
    assert isinstance(here, Tensor)
    return here


# -- agreement -------------------------------------------------------------------------------------------


def all_agree(x: Tensor, ok: bool, *same: int) -> bool:
    """Return whether every process that holds a part of x says ``ok``; a collective call, on CPU.

    Raises
    ------
    ValueError
        One of the numbers that must be the same everywhere is not.
    """
    group = _layout(x)[0] if is_sharded(x) else x.__dict__.get("process_group")
    return ok if group is None else group_agrees(group, torch.device("cpu"), ok, *same)


def group_agrees(group: Any, device: torch.device, ok: bool, *same: int) -> bool:
    """Return whether all processes of a group say ``ok``; see :func:`all_agree`."""
    own = [*same, *(-number for number in same)]
    least = torch.tensor([int(ok), *own], device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group)
    everyone, *lowest = least.tolist()
    if lowest != own:
        raise ValueError("the processes that share a parameter differ in the seed or count of its manifold")
    return bool(everyone)


def _layout(x: Any) -> tuple[Any, int, int, int]:
    """Return the group of processes that share x, our rank in it, its size, and how many rows each process holds."""
    mesh, dim = x.device_mesh, next(d for d, placement in enumerate(x.placements) if placement.is_shard())
    return mesh.get_group(dim), mesh.get_local_rank(dim), mesh.size(dim), -(-x.shape[0] // mesh.size(dim))


def as_real(t: Tensor) -> Tensor:
    """Return a view of a tensor as real numbers."""
    plain = t.as_subclass(Tensor)
    return torch.view_as_real(plain) if t.is_complex() else plain
