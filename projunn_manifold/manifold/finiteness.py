"""The one place where numbers that are not finite are refused or counted, by all processes that share a parameter."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from projunn_manifold import context
from projunn_manifold.linalg import sharded
from projunn_manifold.manifold.state import State
from projunn_manifold.moves.tangent import Tangent
from projunn_manifold.sketching.factored_tensor import FactoredTensor, as_plain
from projunn_manifold.sketching.lowrank import Scalar

__all__ = ["Finiteness"]


@final
class Finiteness:
    """The check of every gradient and step.

    Parameters
    ----------
    non_finite : {"raise", "skip"}
        Whether a matrix that is not finite raises, or is replaced by zero and counted.
    state : State
        Counts the matrices that were replaced.
    """

    def __init__(self, non_finite: str, state: State) -> None:
        if non_finite not in ("raise", "skip"):
            raise ValueError(f"non_finite must be 'raise' or 'skip', got {non_finite!r}")
        self.non_finite, self._state = non_finite, state

    def checked_gradient(self, x: Tensor, tangent: Tangent, u: Tensor) -> Tangent:
        """Return the tangent made from the gradient u, with zero for matrices that are not finite."""
        return self._checked(x, tangent, torch.finfo(x.dtype).max, u, "gradient")

    def checked_step(self, x: Tensor, tangent: Tangent, u: Tensor | None = None) -> Tangent:
        """Return a step (made from u), with zero for matrices that are not finite or too long for their precision."""
        limit = 2 * x.shape[-1] / torch.finfo(x.dtype).eps ** 2
        return self._checked(x, tangent, limit, tangent if u is None else u, "step")

    def _checked(self, x: Tensor, tangent: Tangent, limit: float, u: Tensor | Tangent, what: str) -> Tangent:
        kept = self.kept(x, tangent.squared_norm(), limit, u, what)
        return tangent if kept is None else tangent.masked(kept)

    def kept(self, x: Tensor, sizes: Scalar, limit: float, u: Tensor | Tangent, what: str) -> Tensor | None:
        """Return which matrices to keep, those whose squared norm is within the limit; None means all of them.

        Raises
        ------
        ValueError
            On CPU, with ``non_finite="raise"``: a matrix beyond the limit, in any process.
        """
        if context.traced():
            return None
        if context.readable(x):
            within = _largest(sizes) <= limit
            if sharded.all_agree(x, within, *self._state.stamp):
                return None
            healthy = bool(torch.isfinite(sharded.local_shard(x)).all())
            if not sharded.all_agree(x, healthy):
                raise _error(x, "point of another process" if healthy else "point")
            if self.non_finite == "raise" and within:
                raise ValueError(f"{what} of another process is not finite; no process has moved")
            if self.non_finite == "raise":
                raise _error(as_plain(u if isinstance(u, Tensor) else FactoredTensor(u)), what)
        kept = torch.as_tensor(sizes, device=x.device) <= limit
        self._state.count_faults(x.device, skipped=(~kept).sum())
        return kept


def _largest(numbers: Scalar) -> float:
    if isinstance(numbers, Tensor):
        return numbers.max().item() if numbers.numel() else 0.0
    return numbers


def _error(u: Tensor, what: str) -> ValueError:
    """Return the error for a tensor with inf or NaN in it, or with entries whose products overflow."""
    bad = int((~torch.isfinite(sharded.local_shard(u))).sum())
    problem = f"{bad} non-finite entries of {u.numel()}" if bad else "entries too large for its precision"
    if what == "step":
        problem += " (look at the learning rate and the optimiser's moments)"
    if what == "gradient" and not bad:
        problem += ", or the sampler returned such factors"
    if sharded.is_sharded(u) and not bad:
        problem += ", or non-finite ones in another process"
    return ValueError(f"{what} of shape {tuple(u.shape)} has {problem}; the parameter was not changed")
