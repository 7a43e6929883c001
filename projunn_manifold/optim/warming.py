"""Compiling the loops before they are needed, by steps of small matrices."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

import geoopt
import torch

from projunn_manifold.linalg import dense
from projunn_manifold.linalg.products import compiled_loops
from projunn_manifold.manifold.unitary import UnitaryLowRank
from projunn_manifold.optim.constrained import constrain
from projunn_manifold.optim.in_place import RiemannianAdam, RiemannianSGD
from projunn_manifold.validation import check_dtype, check_positive

__all__ = ["warm_up"]

_log = logging.getLogger("projunn_manifold")


def warm_up(*dtypes: torch.dtype, k: int | Iterable[int] = (1, 4)) -> None:
    """Compile the loops now that steps would compile when they first need them.

    It takes up to a minute for each dtype, and about a second where numba has the machine code in its cache.  The
    logger ``projunn_manifold`` says so.  Without numba there is nothing to compile.

    Parameters
    ----------
    dtypes : torch.dtype
        float32, float64, complex64 or complex128; torch's default dtype if left out.
    k : int or iterable of int
        Ranks of the steps to come; all ranks above 1 share their loops.

    Raises
    ------
    TypeError, ValueError
        A dtype that no point can have; a rank that is no int of at least 1.

    Examples
    --------
    >>> import torch
    >>> from projunn_manifold import warm_up
    >>> warm_up(torch.float32, k=1)
    """
    chosen = dtypes or (torch.get_default_dtype(),)
    ranks = list(k) if isinstance(k, Iterable) else [k]
    for dtype in chosen:
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"warm_up takes dtypes, such as torch.float32, got {dtype!r}")
        check_dtype(dtype, "dtype")
    for rank in ranks:
        check_positive("k", rank)
    if compiled_loops() is None:
        return
    start = time.perf_counter()
    for dtype in chosen:
        for rank in sorted({min(int(rank), 2) for rank in ranks}):
            _make_steps(rank, dtype)
    _log.info("loops for %s are ready after %.1f s", ", ".join(map(str, chosen)), time.perf_counter() - start)


def _make_steps(k: int, dtype: torch.dtype) -> None:
    """Make steps of every kind, of square matrices and a tall one, with numbers of a generator of their own."""
    draw = torch.Generator().manual_seed(0)
    parameters: list[Any] = []
    for n in (12, 16, 16, 20):
        x, g = (dense.haar(n, min(n, 16), dtype=dtype, device="cpu", generator=draw) for _ in range(2))
        p: Any = geoopt.ManifoldParameter(x, manifold=UnitaryLowRank(k))
        p.grad = g
        parameters.append(p)
    constrained = torch.optim.SGD(parameters, lr=1e-3)
    constrain(constrained, feedback=True)
    descent: Any = RiemannianSGD
    for optimizer in (
        descent(parameters, lr=1e-3),
        descent(parameters, lr=1e-3, momentum=0.9),
        RiemannianAdam(parameters, lr=1e-3),
        geoopt.optim.RiemannianSGD(parameters, lr=1e-3),
        constrained,
    ):
        optimizer.step()
