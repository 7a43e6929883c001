"""The one place where numbers that are not finite are refused or counted, by all processes that share a parameter."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from projunn_manifold import context
from projunn_manifold.linalg import dense, sharded
from projunn_manifold.linalg.dense import Scalar
from projunn_manifold.manifold.notes import noted_name
from projunn_manifold.manifold.state import State
from projunn_manifold.moves.tangent import Tangent, longest_step
from projunn_manifold.sketching.factored_tensor import FactoredTensor, as_plain

__all__ = ["PUT_BACK", "Finiteness", "is_far_off"]

PUT_BACK = "put it there first: with torch.no_grad(): p.copy_(p.manifold.projx(p))"
_FAR_OFF = 0.1  # a unitarity error that no rounding explains, not even that of bfloat16


def is_far_off(error: Tensor) -> bool:
    """Return whether unitarity errors are those of points that have never been on the manifold."""
    return not bool((error <= _FAR_OFF).all())


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
        return self._checked(x, tangent, torch.finfo(x.dtype).max, u, "gradient")[0]

    def checked_step(self, x: Tensor, tangent: Tangent, u: Tensor | None = None) -> Tangent:
        """Return a step (made from u), with zero for matrices that are not finite or too long for their precision.

        Where the host cannot look, longer ones than a fixed number of products is good for are shortened and counted.
        """
        return self.step_and_lost(x, tangent, u)[0]

    def step_and_lost(self, x: Tensor, tangent: Tangent, u: Tensor | None = None) -> tuple[Tangent, Tensor | None]:
        """Return a checked step, and which matrices it leaves where they are (None: none of them)."""
        tangent, lost = self._checked(x, tangent, longest_step(x), tangent if u is None else u, "step")
        return self._within_reach(x, tangent), lost

    def _within_reach(self, x: Tensor, tangent: Tangent) -> Tangent:
        if not context.would_wait(x):
            return tangent
        tangent, shortened = tangent.within_reach()
        if shortened is not None:
            self._state.count_faults(x.device, shortened=shortened)
        return tangent

    def checked_descent(self, x: Tensor, tangent: Tangent, lr: float | Tensor, u: Tensor) -> Tangent:
        """Return the step, -lr times the tangent made from the gradient u, both checked.

        Where the host cannot look, one comparison does for both if lr is a number.
        """
        if not context.would_wait(x) or isinstance(lr, Tensor) or not math.isfinite(lr):
            return self.checked_step(x, self.checked_gradient(x, tangent, u).scaled(-lr))
        limit = min(torch.finfo(x.dtype).max, longest_step(x) / abs(lr) / abs(lr) if lr else math.inf)
        tangent, _ = self._checked(x, tangent, limit, u, "step")
        return self._within_reach(x, tangent.scaled(-lr))

    def _checked(
        self, x: Tensor, tangent: Tangent, limit: float, u: Tensor | Tangent, what: str
    ) -> tuple[Tangent, Tensor | None]:
        lost = self.lost(x, tangent.squared_norm(), limit, u, what)
        return tangent if lost is None else tangent.without(lost), lost

    def lost(self, x: Tensor, sizes: Scalar, limit: float, u: Tensor | Tangent, what: str) -> Tensor | None:
        """Return which matrices to leave out, those whose squared norm is beyond the limit; None means none of them.

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
                raise _error(x, "point of another process" if healthy else "point", None)
            if self.non_finite == "raise" and within:
                raise ValueError(f"{what} of another process is not finite; no process has moved")
            if self.non_finite == "raise":
                raise _error(as_plain(u if isinstance(u, Tensor) else FactoredTensor(u)), what, x)
        wide = sizes if isinstance(sizes, Tensor) else torch.tensor(sizes, dtype=torch.float64, device=x.device)
        lost = ~(wide <= limit)  # which NaN is not
        self._state.count_faults(x.device, skipped=lost)
        return lost


def _largest(numbers: Scalar) -> float:
    if isinstance(numbers, Tensor):
        return numbers.max().item() if numbers.numel() else 0.0
    return numbers


def _error(u: Tensor, what: str, x: Tensor | None) -> ValueError:
    """Return the error for a tensor with inf or NaN in it, or with entries whose products overflow at a finite x."""
    name = noted_name(u if x is None else x)
    called = f"{what}{'' if name is None else f' of {name!r}'} of shape {tuple(u.shape)}"
    bad = int((~torch.isfinite(sharded.local_shard(u))).sum())
    problem = f"{bad} non-finite entries of {u.numel()}" if bad else "entries too large for its precision"
    start = None if x is None or bad or sharded.is_sharded(x) else dense.probed_unitarity_error(x.detach())
    if start is not None and is_far_off(start):
        return ValueError(
            f"{called} is too large for its precision, because the parameter is off the "
            f"manifold, ‖X^H X - I‖_F/√m about {start.max().item():.2g}: it started there, or something else wrote to "
            f"it; {PUT_BACK}; the parameter was not changed"
        )
    if what == "step":
        problem += " (look at the learning rate and the optimiser's moments)"
    if what == "gradient" and not bad:
        problem += ", or the sampler returned such factors"
    if sharded.is_sharded(u) and not bad:
        problem += ", or non-finite ones in another process"
    return ValueError(f"{called} has {problem}; the parameter was not changed")
