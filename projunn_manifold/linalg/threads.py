"""Threads for compiled loops: how a stack of matrices, or one matrix, is cut between them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch

__all__ = ["in_parallel", "parts"]

_GRAIN = 2**21  # elements that are worth a thread of their own: two threads were no faster than one on fewer
_pool: ThreadPoolExecutor | None = None


def parts(batch: int, n: int, m: int) -> list[tuple[int, int, int, int]]:
    """Cut a stack between its matrices, or a single matrix between rows: ``(t0, t1, i0, i1)`` for each thread."""
    cut = batch if batch > 1 else n
    count = min(torch.get_num_threads(), -(-batch * n * m // _GRAIN), cut)
    if count == 1:
        return [(0, batch, 0, n)]
    ends = [cut * c // count for c in range(count + 1)]
    pieces = list(itertools.pairwise(ends))
    return [(*piece, 0, n) if batch > 1 else (0, 1, *piece) for piece in pieces]


def in_parallel(function: Callable[..., None], calls: list[tuple[Any, ...]]) -> None:
    """Make all calls, the first in this thread and the others in a pool; return when all have ended."""
    if len(calls) == 1:
        return function(*calls[0])
    others = [_threads().submit(function, *call) for call in calls[1:]]
    try:
        function(*calls[0])
    finally:
        wait(others)
    for other in others:
        other.result()


def _threads() -> ThreadPoolExecutor:
    """Return the pool, made when it is first needed."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(thread_name_prefix="projunn_manifold")
        os.register_at_fork(after_in_child=_forget_pool)  # threads do not survive a fork
    return _pool


def _forget_pool() -> None:
    global _pool
    _pool = None
