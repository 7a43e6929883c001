r"""A matrix whose rows are spread over processes (torch's ``DTensor``, ``Shard(0)``), seen through thin products.

Thin matrices, n x k and m x k, are whole in every process, and so is all that is made of them.  The large matrix is
touched in its own rows :math:`X_r` only:

- :math:`X q`: own rows, then all rows are gathered, kn numbers;
- :math:`X^H y = \sum_r X_r^H y_r`: own rows of y, then a sum over the processes, km numbers;
- :math:`X + L R^H`: own rows of L, and nothing travels.

For an ordinary tensor every function here is the identity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = [
    "agreed",
    "agreement",
    "are_spread",
    "corner",
    "gathered",
    "local",
    "numbers",
    "own",
    "part_of_stack",
    "peers_of",
    "start",
    "summed",
    "total",
]


def are_spread(x: Tensor) -> bool:
    """Tell whether other processes have rows of x, too."""
    return any(placement.is_shard() for placement in getattr(x, "placements", ()))


def local(x: Tensor) -> Tensor:
    """Return the rows of x that are here, in the same memory."""
    if not are_spread(x):
        return x
    here: Tensor = x.to_local()  # type: ignore[attr-defined]
    return here


def own(x: Tensor, t: Tensor) -> Tensor:  # (n, k) -> (own rows, k)
    """Return the rows of a thin matrix that belong to the rows of x that are here."""
    if not are_spread(x):
        return t
    return t[start(x) : start(x) + len(local(x))]


def start(x: Tensor) -> int:
    """Return the number of the first row of x that is here."""
    if not are_spread(x):
        return 0
    _, rank, _, height = _owners(x)
    return rank * height


def summed(x: Tensor, t: Tensor) -> Tensor:
    """Return the sum of all processes' t, each made from its rows of x."""
    if not are_spread(x):
        return t
    t = t.contiguous()
    dist.all_reduce(numbers(t), group=_owners(x)[0])
    return t


def gathered(x: Tensor, t: Tensor) -> Tensor:  # (own rows, k) -> (n, k)
    """Return all rows of a thin matrix, of which each process has those that belong to its rows of x."""
    if not are_spread(x):
        return t
    group, _, processes, height = _owners(x)
    piece = t.new_zeros(height, t.shape[-1])  # the last processes may have fewer rows, or none
    piece[: len(t)] = t
    whole = t.new_empty(processes * height, t.shape[-1])
    dist.all_gather(list(numbers(whole).chunk(processes)), numbers(piece), group=group)
    return whole[: x.shape[0]]


def corner(x: Tensor) -> Tensor:  # (*batch, n, m) -> (*batch, 1, 1)
    """Return the first entry of each matrix."""
    first = local(x)[..., :1, :1]
    return first if not are_spread(x) else summed(x, first if start(x) == 0 else first.new_zeros(1, 1))


def part_of_stack(x: Any) -> Tensor:
    """Return the matrices of a sharded stack that are here, which know their peers."""
    here: Any = local(x)
    here.peers = _owners(x)[0]
    assert isinstance(here, Tensor)
    return here


def peers_of(x: Any) -> Any:
    """Return the group of processes that have other rows, or other matrices of the stack, or None."""
    return _owners(x)[0] if are_spread(x) else getattr(x, "peers", None)


def total(x: Tensor, t: Tensor) -> Tensor:
    """Return the sum of all processes' t, each made from its matrices of a stack."""
    if (group := peers_of(x)) is not None:
        dist.all_reduce(t, group=group)
    return t


def agreed(x: Tensor, ok: bool, *same: int) -> bool:
    """Tell whether every process that holds a piece of x says ``ok``; a collective call, on CPU.

    Raises
    ------
    ValueError
        One of the numbers that must be the same everywhere is not.
    """
    return ok if (group := peers_of(x)) is None else agreement(group, torch.device("cpu"), ok, *same)


def agreement(group: Any, device: torch.device, ok: bool, *same: int) -> bool:
    """Tell whether all processes of a group say so; see :func:`agreed`."""
    own = [*same, *(-number for number in same)]
    least = torch.tensor([int(ok), *own], device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN, group)
    everyone, *lowest = least.tolist()
    if lowest != own:
        raise ValueError("the processes that share a parameter differ in the seed or count of its manifold")
    return bool(everyone)


def _owners(x: Any) -> tuple[Any, int, int, int]:
    """Return the group of processes that share the rows of x, our rank in it, its size, and how many rows each has."""
    mesh, dim = x.device_mesh, next(d for d, placement in enumerate(x.placements) if placement.is_shard())
    return mesh.get_group(dim), mesh.get_local_rank(dim), mesh.size(dim), -(-x.shape[0] // mesh.size(dim))


def numbers(t: Tensor) -> Tensor:
    """Return a tensor as real numbers, in the same memory."""
    plain = t.as_subclass(Tensor)
    return torch.view_as_real(plain) if t.is_complex() else plain
