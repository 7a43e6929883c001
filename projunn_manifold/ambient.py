r"""Any optimiser of torch, constrained: it moves X freely to X', and X arrives at a rank-k step of its move.

This is the training loop of the projUNN paper, with RMSprop: the optimiser sees the Euclidean gradient, and its step
:math:`X' - X` is replaced by rank-k factors, :math:`X \leftarrow \mathrm{projunn}(X, a, b)`, raw projUNN-D on
:class:`~projunn_manifold.UnitaryLowRank` and projUNN-T on :class:`~projunn_manifold.UnitaryLowRankExact`.

X' - X carries the rounding of X', which counts for steps near the precision of X: 0.6 % of a step of norm 1e-4 in
float32 at n = 512.  Give the weights no decay: in SGD it does nothing, but RMSprop and Adam divide λX entry by entry,
and what comes of that does move X.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from geoopt.optim.mixin import OptimMixin
from torch import Tensor

from projunn_manifold import linalg
from projunn_manifold.factors import FactoredTensor
from projunn_manifold.graphs import outside_graphs
from projunn_manifold.sharding import check_attached, is_sharded, seen, unitary_of

__all__ = ["Constraint", "constrain", "constraint_of", "has_closure_among", "is_constrained", "parameters_of"]

_REFUSED: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.LBFGS: "evaluates the loss off the manifold",
    torch.optim.ASGD: "keeps an average that leaves the manifold",
}


class Constraint:
    """Handle of a constrained optimiser; :meth:`remove` sets it free."""

    def __init__(self, optimizer: torch.optim.Optimizer, feedback: bool) -> None:
        self.feedback = feedback
        self.exchange: Any = None  # with other processes; see projunn_manifold.distributed
        self._before: dict[Tensor, Tensor] = {}
        self._hooks = (
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._arrive),
        )

    def remove(self) -> None:
        """Lift the constraint; parameters stay where they are."""
        for hook in self._hooks:
            hook.remove()

    @outside_graphs
    @torch.no_grad()
    def _remember(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.exchange is not None:
            self.exchange.complete(args, kwargs)
        check_attached(parameters_of(optimizer))
        has_closure = has_closure_among(args, kwargs)  # which may make gradients
        for p, x in self._before.items():  # left by a step that raised half-way
            if not is_sharded(p) and (linalg.probed_unitarity_error(p) > linalg.tolerance(p.dtype, len(p))).any():
                p.copy_(x)
        self._before = {}
        for p in parameters_of(optimizer):
            if unitary_of(p) is not None:
                if has_closure or p.grad is not None:
                    self._before[p] = p.detach().clone()
                if isinstance(p.grad, FactoredTensor):
                    p.grad = p.grad.clone()  # formed once: the optimiser will read it more than once

    @outside_graphs
    @torch.no_grad()
    def _arrive(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        before, self._before = self._before, {}
        moves = {}
        for p, x in before.items():  # all are put back first, so that a failure leaves none off its manifold
            if p.grad is not None:  # there may be a closure that makes none
                moves[p] = p.detach() - x
                p.copy_(x)
        failures = []
        for p, move in moves.items():
            try:
                manifold: Any = unitary_of(p)
                residual = self._residual(optimizer, p)
                manifold.step_raw_(seen(p), seen(move), seen(residual), self.exchange)
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _residual(self, optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor | None:
        """Return what steps have left out of p's moves; it is kept with the optimiser's state of p."""
        if not self.feedback:
            return None
        state = optimizer.state[p]
        if "residual" not in state:
            state["residual"] = torch.zeros_like(p, requires_grad=False)
        residual: Tensor = state["residual"]
        return residual


def constrain(optimizer: torch.optim.Optimizer, *, feedback: bool = False) -> Constraint:
    """Keep the parameters that an optimiser of torch moves on their manifolds; return a handle.

    Parameters on no such manifold move as ever.  Schedulers and groups are untouched, and so is ``state_dict`` but for
    ``feedback``.  Calling it twice returns the handle of the first call.  A parameter without a gradient, or (on CPU)
    whose move is zero, is left alone.  Hooks do not survive ``copy.deepcopy`` and ``pickle``: constrain the copy again
    (:func:`~projunn_manifold.check_manifolds` tells).  If the optimiser's own step raises half-way, parameters that it
    left off their manifold are put back at the next one.  A step takes a copy of X and one of its move, and the passes
    of :func:`~projunn_manifold.projunn_d_`.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    feedback : bool
        Error feedback: what a rank-k step leaves out of the optimiser's move is added to the next one, carried along
        with the point.  It costs one more matrix for each parameter, ``optimizer.state[p]["residual"]``, which travels
        with ``state_dict``.

    Raises
    ------
    TypeError
        LBFGS, which evaluates the loss off the manifold between its steps; ASGD, whose average leaves it;
        geoopt's optimisers, which know manifolds themselves.
    ValueError
        A second call that differs in ``feedback``.  In ``step``, on CPU: a move that is not finite; the parameter is
        back where it was, the optimiser's state is not.

    Examples
    --------
    >>> import geoopt, torch
    >>> from projunn_manifold import UnitaryLowRankExact
    >>> from projunn_manifold.optim import constrain
    >>> manifold = UnitaryLowRankExact(k=1)
    >>> w = geoopt.ManifoldParameter(manifold.random(32, 32), manifold=manifold)
    >>> optimizer = torch.optim.RMSprop([w], lr=1e-3)
    >>> handle = constrain(optimizer)
    >>> (w @ torch.randn(32, 4)).relu().sum().backward()
    >>> optimizer.step()
    >>> manifold.check_point_on_manifold(w.detach())
    True
    """
    for kind, reason in _REFUSED.items():
        if isinstance(optimizer, kind):
            raise TypeError(f"{kind.__name__} cannot be constrained: it {reason}")
    if isinstance(optimizer, OptimMixin):
        raise TypeError(f"{type(optimizer).__name__} is an optimiser on manifolds: use it as it is")
    handle = constraint_of(optimizer) or Constraint(optimizer, feedback)
    if handle.feedback is not feedback:
        raise ValueError(f"the optimiser is constrained already, with feedback={handle.feedback}: remove that first")
    return handle


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    """Walk through the parameters of all groups."""
    return (p for group in optimizer.param_groups for p in group["params"])


def has_closure_among(args: Any, kwargs: Any) -> bool:
    """Tell whether these arguments of a step, the optimiser first, hold a closure."""
    return any(argument is not None for argument in (*args[1:], kwargs.get("closure")))


def is_constrained(optimizer: torch.optim.Optimizer) -> bool:
    """Tell whether this very optimiser has been constrained."""
    return constraint_of(optimizer) is not None


def constraint_of(optimizer: torch.optim.Optimizer) -> Constraint | None:
    """Return the handle of a constrained optimiser, or None."""
    for hook in optimizer._optimizer_step_post_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Constraint):
            return owner
    return None
