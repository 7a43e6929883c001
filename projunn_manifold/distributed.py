r"""Training with several processes: unitary parameters exchange 2kN numbers, not N², with no further approximation.

A sketch is linear in the gradient.  With the same test matrix q in every process

.. math:: y = \frac1P \sum_r G_r q, \qquad a = \mathrm{orth}(y), \qquad b = \frac1P \sum_r G_r^H a

are exactly the rank-k factors that one process would make of the mean gradient :math:`\frac1P\sum_r G_r`: only y and b
are sent.  The test matrices are the same everywhere because they follow from the manifold's seed and its count of
gradients.  Everything else is left to torch's ``DistributedDataParallel``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from geoopt.optim.mixin import OptimMixin
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from projunn_manifold.context import in_full_precision, outside_graphs
from projunn_manifold.linalg import sharded
from projunn_manifold.linalg.products import LinearOperator, matrix, normalized_image
from projunn_manifold.manifold.parameters import is_dtensor
from projunn_manifold.manifold.unitary import unitary_of
from projunn_manifold.optim.constrained import constraint_of, is_constrained
from projunn_manifold.optim.in_place import InPlace
from projunn_manifold.optim.optimizers import (
    has_closure_among,
    inner_optimizer,
    parameters_of,
    shares_groups,
    warn_of_interpolation,
)
from projunn_manifold.sketching.factored_tensor import FactoredTensor
from projunn_manifold.sketching.lowrank import LowRank

__all__ = ["Exchange", "MeanGradient", "data_parallel"]


def data_parallel(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, process_group: Any = None, **options: Any
) -> tuple[nn.Module, Exchange]:
    """Replicate a model: unitary parameters exchange sketches at each step, and torch averages all other gradients.

    Every process calls it with the same model; parameters become those of the first process.  A unitary parameter
    sends k(n + m) numbers in a step (``subspace``: 2(k + 4)(n + m)); gradients of parameters whose moves are dense
    (``k=None``, or 2k >= m) are sent whole.  Use ``ddp`` for the forward pass and keep using this ``optimizer``;
    gradients of unitary parameters that are accumulated, or clipped, are each process's own until the step.  Copies of
    the model or the optimiser take no part in the exchange, and ``ddp.join()`` is not supported.

    Parameters
    ----------
    model : torch.nn.Module
    optimizer : torch.optim.Optimizer
        One of geoopt's, or of this package's, or torch's SGD :func:`~projunn_manifold.optim.constrain`-ed, over all
        unitary parameters of the model; or a wrapper of one.  With ``feedback`` each process keeps its share of what a
        step leaves out of the mean.
    process_group
        As for torch; the default group if left out.
    options
        Of ``torch.nn.parallel.DistributedDataParallel``.

    Returns
    -------
    ddp, exchange
        The wrapped model, or the model itself where all parameters are unitary; a handle that counts the bytes that
        this process sends for unitary parameters.

    Raises
    ------
    TypeError
        A sampler that is not linear in the gradient (``column``, ``svd``, a function): train with torch's
        ``DistributedDataParallel`` as it is.  An optimiser that is not linear in it (RMSprop, Adam, constrained), that
        moves each parameter in one process only (``ZeroRedundancyOptimizer``), or that is none.
    ValueError
        Unitary parameters that the optimiser does not have; manifolds that differ between processes; weight decay,
        except in this package's optimisers: it would mix X into the factors.  In ``step``: a closure, which would
        make gradients too late.
    """
    warn_of_interpolation(optimizer)
    if not shares_groups(optimizer):
        raise TypeError(
            f"{type(optimizer).__name__} moves each parameter in one process only, and data_parallel exchanges its "
            "sketch with all: use the optimiser that it wraps, or torch's DistributedDataParallel unchanged"
        )
    optimizer = inner_optimizer(optimizer)
    named = {
        name: p
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.requires_grad and unitary_of(p) is not None and not is_dtensor(p)
    }
    _check(named, optimizer, process_group)
    exchange = Exchange(optimizer, list(named.values()), process_group)
    first = dist.get_process_group_ranks(process_group or dist.group.WORLD)[0]
    for p in exchange.points:
        dist.broadcast(sharded.as_real(p.detach()), first, process_group)
    others = {id(p) for p in model.parameters() if p.requires_grad} - {id(p) for p in named.values()}
    return _averaged(model, list(named), process_group, options) if others else model, exchange


def _averaged(model: nn.Module, left_out: list[str], group: Any, options: dict[str, Any]) -> nn.Module:
    """Wrap a model in torch's DistributedDataParallel, except for some parameters; leave no mark on the model."""
    ignored = [*left_out, *(f".{name}" for name in left_out)]  # torch looks for the latter on the root module
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    try:
        return DistributedDataParallel(model, process_group=group, **options)
    finally:
        del model._ddp_params_and_buffers_to_ignore
        for p in model.parameters():
            p.__dict__.pop("_ddp_ignored", None)


def _check(named: dict[str, Any], optimizer: torch.optim.Optimizer, group: Any) -> None:
    if not isinstance(optimizer, OptimMixin) and not (type(optimizer) is torch.optim.SGD and is_constrained(optimizer)):
        raise TypeError(
            f"{type(optimizer).__name__} is not linear in the gradient of a unitary parameter: use geoopt's "
            "optimisers, this package's or torch's SGD, constrained; or torch's DistributedDataParallel unchanged"
        )
    if not isinstance(optimizer, InPlace) and any(g.get("weight_decay", 0) for g in optimizer.param_groups):
        raise ValueError(
            f"weight decay in {type(optimizer).__name__} would mix X into the factors: use this package's optimisers"
        )
    if isinstance(optimizer, InPlace) and any(g["feedback"] for g in optimizer.param_groups):
        raise ValueError(
            f"feedback=True of {type(optimizer).__name__} has no effect on exchanged sketches: use torch's SGD under "
            "constrain with feedback=True"
        )
    held = {id(p) for p in parameters_of(optimizer)}
    missing = [name for name, p in named.items() if id(p) not in held]
    if missing:
        raise ValueError(f"the optimiser does not have {', '.join(missing)}: build it after the parameters")
    for name, p in named.items():
        if p.manifold.k is not None and not p.manifold.sketcher.is_linear:
            raise TypeError(
                f"{name}: the sampler {p.manifold.sampler!r} needs the whole gradient; use 'lsi' or 'subspace', or "
                "torch's DistributedDataParallel unchanged"
            )
    own = {name: (tuple(p.shape), str(p.dtype), str(p.manifold), p.manifold.draws()) for name, p in named.items()}
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group)
    for rank, theirs in enumerate(everyone):
        if theirs != own:
            differing = [name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name)]
            raise ValueError(
                f"shape, dtype, manifold, seed or count of {', '.join(sorted(differing))} differs in process {rank}"
            )


class Exchange:
    """Puts the factors of the mean gradient into ``p.grad`` before each step of an optimiser.

    torch's SGD, constrained, sees each process's own gradient; the mean is then that of the moves.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, points: list[Any], group: Any) -> None:
        #: Bytes handed to the process group by this process so far.
        self.bytes = 0
        ours = {id(p) for p in points}
        #: The parameters, in the order of the optimiser's steps.
        self.points = [p for p in parameters_of(optimizer) if id(p) in ours]
        self._group = group
        constraint = constraint_of(optimizer)
        if constraint is None:
            optimizer.register_step_pre_hook(self._before)
        else:
            constraint.exchange = self

    @outside_graphs
    @in_full_precision
    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        ahead: dict[Any, int] = {}  # of every manifold, gradients that come before in this step
        for p in self.complete(args, kwargs):
            p.grad = self._mean_of(p, ahead.get(p.manifold, 0))
            ahead[p.manifold] = ahead.get(p.manifold, 0) + 1

    def complete(self, args: Any, kwargs: Any) -> list[Any]:
        """Return the parameters with a gradient in any process; it is zero where this process has none."""
        if has_closure_among(args, kwargs):
            raise ValueError("a closure would make gradients after they have been exchanged: call it before the step")
        active = [p for p, somewhere in zip(self.points, self._gradients_anywhere(), strict=True) if somewhere]
        for p in active:
            if p.grad is None:
                p.grad = torch.zeros_like(p.detach()).as_subclass(Tensor)
        return active

    def _gradients_anywhere(self) -> list[bool]:
        """Return, for each parameter, whether any process has a gradient."""
        here = [p.requires_grad and p.grad is not None for p in self.points]
        flags = torch.tensor(here, dtype=torch.int32, device=self.points[0].device) if here else torch.zeros(0)
        dist.all_reduce(flags, group=self._group)
        return [flag > 0 for flag in flags.tolist()]

    def _mean_of(self, p: Any, ahead: int) -> Tensor:
        """Return the mean gradient as the manifold will see it."""
        grad = p.grad
        if p.manifold.is_dense(p):
            return self.mean(grad.clone())
        local: LinearOperator
        if isinstance(grad, FactoredTensor) and isinstance(grad.factors, LowRank):
            local = grad.factors
        else:
            local = matrix(grad.detach())
        return FactoredTensor(p.manifold.sketcher.sketch(self.gradient(local), ahead))

    def gradient(self, local: LinearOperator) -> MeanGradient:
        """Return the mean of all processes' gradients."""
        return MeanGradient(local, self)

    def anywhere(self, here: bool) -> bool:
        """Return whether a condition holds in any process."""
        flag = torch.tensor([int(here)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, self._group)
        return bool(flag)

    def mean(self, t: Tensor) -> Tensor:
        """Return the mean over all processes, in place."""
        numbers = sharded.as_real(t)
        self.bytes += numbers.numel() * numbers.element_size()
        dist.all_reduce(numbers, group=self._group)
        return t.div_(dist.get_world_size(self._group))


@dataclass(frozen=True)
class MeanGradient:
    """The mean of all processes' gradients, known by its products: each process computes its own, then the mean."""

    local: LinearOperator
    exchange: Exchange

    @property
    def like(self) -> Tensor:
        """A tensor with the dtype and device of the gradient."""
        return self.local.like

    @property
    def shape(self) -> torch.Size:
        """Shape ``(*batch, n, m)``."""
        return self.local.shape

    def times(self, q: Tensor) -> Tensor:  # (*batch, m, j) -> (*batch, n, j)
        """Return ``G q``."""
        return self.exchange.mean(self.local.times(q).contiguous())

    def adjoint_times(self, q: Tensor) -> Tensor:  # (*batch, n, j) -> (*batch, m, j)
        """Return ``G^H q``."""
        return self.exchange.mean(self.local.adjoint_times(q).contiguous())

    def normalized_image(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return y, the product at unit norm, and the adjoint's product with y."""
        return normalized_image(self, q)

    def dense(self) -> Tensor:
        """Return G itself; linear samplers never ask for it."""
        raise TypeError("the mean gradient is not formed")
