r"""Any optimiser of torch, constrained: it moves X freely to X', and a rank-k step along X' - X takes the place of X'.

This is the training loop of the projUNN paper, with RMSprop: the optimiser sees the Euclidean gradient, and its step
:math:`X' - X` is replaced by rank-k factors, :math:`X \leftarrow \mathrm{projunn}(X, a, b)`, raw projUNN-D on
:class:`~projunn_manifold.UnitaryLowRank` and projUNN-T on :class:`~projunn_manifold.UnitaryLowRankExact`.

X' - X carries the rounding of X', which counts for steps near the precision of X: 0.6 % of a step of norm 1e-4 in
float32 at n = 512.  Weight decay is normal to the manifold and moves no point; that of torch's own optimisers is taken
out to rounding, of the gradient where it is coupled, of the move where it is decoupled (AdamW, Muon, Adafactor).  Of
other optimisers, and of steps with a closure, it is not known: give unitary weights no decay there.
"""

from __future__ import annotations

from typing import Any

import torch
from geoopt.optim.mixin import OptimMixin
from torch import Tensor

from projunn_manifold import context, validation
from projunn_manifold.context import in_full_precision, outside_graphs
from projunn_manifold.linalg import dense, sharded
from projunn_manifold.linalg.products import matrix
from projunn_manifold.manifold.parameters import is_dtensor, local_view
from projunn_manifold.manifold.unitary import UnitaryLowRank, unitary_of
from projunn_manifold.moves.move import Move
from projunn_manifold.optim.in_place import check_attached
from projunn_manifold.optim.optimizers import (
    has_closure_among,
    inner_optimizer,
    keepers,
    parameters_of,
    warn_of_interpolation,
)
from projunn_manifold.optim.plan import guarded_parameters
from projunn_manifold.sketching.factored_tensor import FactoredTensor
from projunn_manifold.sketching.gradients import Averaging
from projunn_manifold.sketching.lowrank import LowRank

__all__ = ["Constraint", "constrain", "constraint_of", "is_constrained", "raw_step_"]

_REFUSED: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.LBFGS: "evaluates the loss off the manifold",
    torch.optim.ASGD: "keeps an average that leaves the manifold",
}


class Constraint:
    """Handle of a constrained optimiser; :meth:`remove` sets it free."""

    def __init__(self, optimizer: torch.optim.Optimizer, feedback: bool) -> None:
        self.feedback = feedback
        self._kind = type(optimizer).__name__
        self.exchange: Any = None  # with other processes; see projunn_manifold.distributed
        self._points: dict[Tensor, Tensor] = {}  # before the step
        self._gradients: dict[Tensor, tuple[Tensor, Tensor]] = {}  # before and after weight decay was taken out
        self._hooks: tuple[Any, ...] = (
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._constrain),
        )

    def __repr__(self) -> str:
        state = "" if self._hooks else ", removed"
        return f"Constraint({self._kind}, feedback={self.feedback}{state})"

    def __getattr__(self, name: str) -> Any:
        """Say where an optimiser's own methods are."""
        if hasattr(torch.optim.Optimizer, name) or name in ("param_groups", "state", "defaults"):
            raise AttributeError(f"this is the handle of a constraint: {name} is the optimiser's that you constrained")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def remove(self) -> None:
        """Lift the constraint; parameters stay where they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    @property
    def is_interrupted(self) -> bool:
        """Whether the last step has raised half-way, and left points that the next one puts back."""
        return bool(self._points)

    @outside_graphs
    @torch.no_grad()
    def _remember(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Keep a copy of every point that the step will move."""
        if self.exchange is not None:
            self.exchange.complete(args, kwargs)
        check_attached(parameters_of(optimizer))
        has_closure = has_closure_among(args, kwargs)  # which may make gradients
        for p, x in self._points.items():  # left by a step that raised half-way
            if not is_dtensor(p) and (dense.probed_unitarity_error(p) > dense.tolerance(p.dtype, p.shape[-2])).any():
                p.copy_(x)
        self._restore_gradients()
        self._points = {}
        for group in optimizer.param_groups:
            for p in group["params"]:
                if unitary_of(p) is not None and (has_closure or p.grad is not None):
                    self._points[p] = p.detach().clone()
                    if isinstance(p.grad, FactoredTensor):
                        p.grad = p.grad.clone()  # formed once: the optimiser will read it more than once
                    decay = _coupled_decay(optimizer, group)
                    if decay is not None and not has_closure:  # the optimiser will add it back
                        without = p.grad - decay * p
                        self._gradients[p] = (p.grad, without)
                        p.grad = without

    @outside_graphs
    @torch.no_grad()
    def _constrain(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Take every point from where the optimiser has left it to the end of a rank-k step."""
        points, self._points = self._points, {}
        self._restore_gradients()
        moves = {}
        for p, x in points.items():  # all are put back first, so that a failure leaves none off its manifold
            if p.grad is not None:  # there may be a closure that makes none
                moves[p] = p.detach() - x
                p.copy_(x)
        for group in optimizer.param_groups:
            shrinkage = _decoupled_decay(optimizer, group)
            if shrinkage is None:
                continue
            for p in group["params"]:
                if p in moves:
                    moves[p].add_(points[p] * shrinkage)
                    rounding = 2 * torch.finfo(p.dtype).eps * points[p].abs()
                    moves[p].masked_fill_(moves[p].abs() <= rounding, 0)  # a point that only shrank has not moved
        failures = []
        for p, move in moves.items():
            try:
                manifold: Any = unitary_of(p)
                residual = self._residual(optimizer, p)
                raw_step_(manifold, local_view(p), local_view(move), local_view(residual), self.exchange)
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def _restore_gradients(self) -> None:
        """Give parameters back their gradients with the weight decay, unless they have got others since."""
        for p, (grad, without) in self._gradients.items():
            if p.grad is without:
                p.grad = grad
        self._gradients = {}

    def _residual(self, optimizer: torch.optim.Optimizer, p: Tensor) -> Tensor | None:
        """Return what steps have left out of p's moves; it is kept with the optimiser's state of p."""
        if not self.feedback:
            return None
        state = optimizer.state[p]
        if "residual" not in state:
            state["residual"] = torch.zeros_like(p, requires_grad=False)
        residual: Tensor = state["residual"]
        return residual


# -- weight decay, which is normal to the manifold: it moves no point, but would spoil a sketch -------------


def _coupled_decay(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float | Tensor | None:
    """Return the λ of the λX that an optimiser of torch adds to a gradient, scaled and signed as it is, or None."""
    decay = validation.check_number(group.get("weight_decay", 0.0), "weight_decay")
    if not decay or not _steps_like_torchs(optimizer) or _is_decoupled(optimizer, group):
        return None
    decay = -decay if group.get("maximize", False) else decay
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)  # of a GradScaler, which a fused step undoes itself
    return decay if scale is None else decay * scale


def _decoupled_decay(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float | Tensor | None:
    """Return the part of X by which an optimiser of torch shrinks it in a step, or None."""
    if not group.get("weight_decay") or not _steps_like_torchs(optimizer) or not _is_decoupled(optimizer, group):
        return None
    return validation.check_number(group["lr"], "lr") * validation.check_number(group["weight_decay"], "weight_decay")


def _steps_like_torchs(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a class makes the steps of an optimiser of torch's own: it is one, or inherits its step."""
    owner = next(kind for kind in type(optimizer).__mro__ if "step" in vars(kind))
    return owner.__module__.partition(".")[0] == "torch"


def _is_decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    names = {kind.__name__ for kind in type(optimizer).__mro__}
    return bool(names & {"AdamW", "Adafactor", "Muon"}) or group.get("decoupled_weight_decay", False)


# -- the step ----------------------------------------------------------------------------------------------


@outside_graphs
@in_full_precision
@torch.no_grad()
def raw_step_(
    manifold: UnitaryLowRank,
    x: Tensor,
    move: Tensor,
    residual: Tensor | None = None,
    averaging: Averaging | None = None,
) -> Tensor:
    r"""Move x in place by the rank-k part of any matrix, not necessarily tangent: the paper's step; return x.

    With factors :math:`a b^H` of the move, sketched as gradients are, x becomes :func:`~projunn_manifold.projunn_d`
    (X, a, b), the closest unitary to :math:`X + a b^H`; on :class:`~projunn_manifold.UnitaryLowRankExact`
    :func:`~projunn_manifold.projunn_t`.  A move of zeros is no step: nothing is drawn or counted.

    The host does not wait for a device: there a matrix stays where it is, and keeps its residual, if its move is not
    finite, its :math:`X + a b^H` singular (D), or its step too long for its precision (T).  Steps of T with angles
    beyond 64 are shortened.  ``manifold.pop_faults()`` counts both.  If a step of D turns a column of tall X by 90
    degrees there, its g is not unitary: it shortens the residual, and this is not counted.

    Parameters
    ----------
    manifold : UnitaryLowRank
    x, move : Tensor
        ``(*batch, n, m)``
    residual : Tensor, optional
        What earlier steps left out, of x's shape.  It is added to the move, and replaced by what this step leaves out,
        transported to the new point by the unitary g of the step, :math:`R \leftarrow g\,(M + R - a b^H)`.  Cost: 10
        to 12 passes more.
    averaging : Averaging, optional
        Makes the step of the mean of all processes' moves.  Each process keeps what a leaves out of its own move,
        :math:`M_r + R_r - a a^H (M_r + R_r)`, so that the mean of the residuals is the residual of the mean.

    Raises
    ------
    ValueError
        On CPU, a move that is not finite, for projUNN-D :math:`X + a b^H` singular, for projUNN-T a tangent part too
        long for its precision; x is then as it was.
    """
    validation.check_in_place(x, move, "move")
    if residual is not None:
        validation.check_in_place(x, residual, "residual")
        validation.check_writable(residual, "residual")
    manifold.warn_if_far_off(x)
    moving = _moving(x, move, averaging, residual is not None)
    if moving is False:
        return x
    if residual is not None:
        move = move + residual
    factors = _factors_of_move(manifold, x, move, averaging)
    sizes = dense.squared_norm(factors.b) * dense.squared_norm(factors.a)
    lost = manifold.finiteness.lost(x, sizes, torch.finfo(x.dtype).max, move, "move")
    lost = _either(lost, ~moving if isinstance(moving, Tensor) else None)
    if lost is not None:
        factors = factors.without(lost)
    step, left = _agreed_move(manifold, x, factors)
    step.apply_(matrix(x))
    if residual is not None:
        rest = _left_out(manifold, x, move, factors, averaging)
        lost = _either(lost, left)
        if lost is not None:
            here = sharded.local_shard(rest)
            here.copy_(torch.where(lost[..., None, None], sharded.local_shard(residual), here))
        residual.copy_(step.transport_(rest))
    return manifold.correct_(x)


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return where one of both holds; None holds nowhere."""
    if a is None or b is None:
        return b if a is None else a
    return a | b


def _moving(x: Tensor, move: Tensor, averaging: Averaging | None, of_batch: bool) -> Tensor | bool:
    """Return whether anything moves in any process, and ``of_batch``, which matrices of a batch do."""
    here = sharded.local_shard(move)
    if context.readable(x):
        moves = bool(here.any())
        if not (averaging.anywhere(moves) if averaging is not None else not sharded.all_agree(x, not moves)):
            return False
    if not of_batch or (x.dim() == 2 and context.readable(x)):
        return True
    moving = (here != 0).flatten(-2).any(-1).to(x.real.dtype)
    return (sharded.sum_over_shards(x, moving) if averaging is None else averaging.mean(moving)) != 0


def _factors_of_move(manifold: UnitaryLowRank, x: Tensor, move: Tensor, averaging: Averaging | None) -> LowRank:
    """Return factors of a move, or of its mean over processes; where moves are dense, the move itself."""
    if not manifold.is_dense(x):
        return manifold.sketcher.factors(matrix(x), move, averaging=averaging)
    q = dense.columns_of_identity(*x.shape[:-2], x.shape[-1], x.shape[-1], dtype=x.dtype, device=x.device)
    return LowRank(move if averaging is None else averaging.mean(move.clone()), q)


def _agreed_move(manifold: UnitaryLowRank, x: Tensor, factors: LowRank) -> tuple[Move, Tensor | None]:
    """Return the manifold's raw move along factors; if it fails for one process's matrices, it does for all."""
    try:
        found, failure = manifold.raw_move(x, factors), None
    except ValueError as error:
        failure = error
    moves = failure is None
    if not (sharded.all_agree(x, moves) if context.readable(x) else moves):
        raise failure or ValueError("the move of another process is singular; no process has moved")
    return found


def _left_out(
    manifold: UnitaryLowRank, x: Tensor, move: Tensor, factors: LowRank, averaging: Averaging | None
) -> Tensor:
    """Return what the factors leave out of a move; of the mean of many, what a leaves out of this process's move."""
    known = matrix(move)
    if averaging is None:
        return known.plus_product(-factors.a, factors.b)
    if manifold.is_dense(x):
        return torch.zeros_like(move)
    return known.plus_product(-factors.a, known.adjoint_times(factors.a))


def constrain(optimizer: torch.optim.Optimizer, *, feedback: bool = False) -> Constraint:
    """Keep the parameters that an optimiser of torch moves on their manifolds; return a handle.

    Other parameters move as before.  Schedulers and groups are unaffected, as is ``state_dict`` except with
    ``feedback``.  Calling it twice returns the handle of the first call.  A parameter without a gradient, or (on CPU)
    whose move is zero, is left alone.  Hooks do not survive ``copy.deepcopy`` and ``pickle``: constrain the copy again
    (:func:`~projunn_manifold.check_manifolds` tells).  If the optimiser's own step raises half-way, parameters that it
    left off their manifold are put back at the next one.  A step takes a copy of X and one of its move, and the passes
    of :func:`~projunn_manifold.projunn_d_`.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Or a wrapper that holds one as ``optimizer`` or ``optim`` (accelerate's, Lightning's,
        ``ZeroRedundancyOptimizer``): that one is constrained.  Of Lookahead, whose averages leave the manifold, a
        warning says what to do.
    feedback : bool
        Error feedback: what a rank-k step leaves out of the optimiser's move is added to the next one, carried along
        with the point.  It costs one more matrix for each parameter, ``optimizer.state[p]["residual"]``, which travels
        with ``state_dict``.  Not on CPU, a step of D that turns a column of tall X by 90 degrees shortens what it
        carries.

    Raises
    ------
    TypeError
        LBFGS, which evaluates the loss off the manifold between its steps; ASGD, whose average leaves it; what is no
        optimiser; geoopt's optimisers, which know manifolds themselves.
    ValueError
        A second call that differs in ``feedback``.  In ``step``, on CPU: a move that is not finite, for which X + a b^H
        is singular (D), or that is too long for its precision (T); the parameter is back where it was, the optimiser's
        state is not.  Elsewhere such moves are left out, and ``manifold.pop_faults()`` counts them.

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
    warn_of_interpolation(optimizer)
    optimizer = inner_optimizer(optimizer)
    for kind, reason in _REFUSED.items():
        if isinstance(optimizer, kind):
            raise TypeError(f"{kind.__name__} cannot be constrained: it {reason}")
    if isinstance(optimizer, OptimMixin):
        raise TypeError(f"{type(optimizer).__name__} is an optimiser on manifolds: use it as it is")
    guarded = guarded_parameters()  # which, and shards, are refused by a step if they have lost their manifolds
    if not any(unitary_of(p) is not None or is_dtensor(p) or id(p) in guarded for p in parameters_of(optimizer)):
        validation.warn(
            f"{type(optimizer).__name__} holds no unitary parameter, so there is nothing to constrain: build it over "
            "the parameters of a model whose weights are unitary already, by unitary_, unitarize or a layer of this "
            "package"
        )
    for group in optimizer.param_groups:
        decays = group.get("weight_decay") and not _steps_like_torchs(optimizer)
        if decays and any(unitary_of(p) is not None for p in group["params"]):
            validation.warn(
                f"the weight decay of {type(optimizer).__name__} is not known to constrain and spoils the sketch of a "
                "step: put parameters on manifolds into a group with weight_decay=0"
            )
    handle = constraint_of(optimizer) or Constraint(optimizer, feedback)
    if handle.feedback is not feedback:
        raise ValueError(f"the optimiser is already constrained, with feedback={handle.feedback}: call remove() first")
    return handle


def is_constrained(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether this very optimiser, or what it wraps, has been constrained."""
    return constraint_of(optimizer) is not None


def constraint_of(optimizer: torch.optim.Optimizer) -> Constraint | None:
    """Return the handle of a constrained optimiser, or None."""
    for hook in context.step_post_hooks(inner_optimizer(optimizer)):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Constraint):
            return owner
    return None


def _keeps(optimizer: torch.optim.Optimizer, p: Tensor) -> bool:
    return is_constrained(optimizer)


keepers.append(_keeps)
