r"""Training over several processes: unitary parameters exchange 2kN numbers instead of N², and lose nothing by it.

A sketch is linear in the gradient.  With the same test matrix q in every process

.. math:: y = \frac1P \sum_r G_r q, \qquad a = \mathrm{orth}(y), \qquad b = \frac1P \sum_r G_r^H a

are exactly the rank-k factors that one process would make of the mean gradient :math:`\frac1P\sum_r G_r`: only y and b
travel.  The test matrices are the same everywhere because they follow from the manifold's seed and its count of
gradients.  Everything else is left to torch's ``DistributedDataParallel``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from geoopt import ManifoldTensor
from geoopt.optim.mixin import OptimMixin
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from projunn_manifold import linalg
from projunn_manifold.ambient import parameters_of
from projunn_manifold.factors import FactoredTensor, LowRank
from projunn_manifold.manifold import UnitaryLowRank
from projunn_manifold.sampling import Gradient, Subspace, without_normal_part

__all__ = ["Exchange", "MeanGradient", "data_parallel"]


def data_parallel(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, process_group: Any = None, **options: Any
) -> tuple[DistributedDataParallel, Exchange]:
    """Replicate a model: its unitary parameters exchange sketches at each step, all others are torch's to average.

    Every process calls it with the same model; parameters become those of the first process.  Per step and unitary
    parameter 2k(n + m)/2 numbers travel, twice that with ``power=1``, and so on; those that are dense anyhow
    (``k=None``, or 2k >= m) travel whole.  Use ``ddp`` for the forward pass and ``optimizer`` as ever; gradients of
    unitary parameters that are accumulated, or clipped, are each process's own until the step.

    Parameters
    ----------
    model : torch.nn.Module
    optimizer : torch.optim.Optimizer
        Of geoopt's kind, or this package's, over all unitary parameters of the model.
    process_group
        As for torch; the default group if left out.
    options
        Of ``torch.nn.parallel.DistributedDataParallel``.

    Returns
    -------
    ddp, exchange
        The wrapped model; a handle that counts the bytes that its processes hand over, and can be removed.

    Raises
    ------
    TypeError
        A sampler that is not linear in the gradient (``column``, ``svd``, a function): train with torch's
        ``DistributedDataParallel`` as it is.  An optimiser that is not linear in it (one that was constrained).
    ValueError
        Unitary parameters that the optimiser does not have; manifolds whose seed or count differ between processes.
        In ``step``: a closure, which would make gradients too late.
    """
    names = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad and isinstance(p, ManifoldTensor) and isinstance(p.manifold, UnitaryLowRank)
    }
    _check(names, optimizer, process_group)
    first = dist.get_process_group_ranks(process_group or dist.group.WORLD)[0]
    for p in names.values():
        dist.broadcast(_numbers(p.detach()), first, process_group)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(names))
    ddp = DistributedDataParallel(model, process_group=process_group, **options)
    return ddp, Exchange(optimizer, list(names.values()), process_group)


def _check(names: dict[str, Any], optimizer: torch.optim.Optimizer, group: Any) -> None:
    if not isinstance(optimizer, OptimMixin):
        raise TypeError(
            f"{type(optimizer).__name__} is not linear in the gradient of a unitary parameter: take geoopt's "
            "optimisers or this package's, or torch's DistributedDataParallel as it is"
        )
    held = {id(p) for p in parameters_of(optimizer)}
    missing = [name for name, p in names.items() if id(p) not in held]
    if missing:
        raise ValueError(f"the optimiser does not have {', '.join(missing)}: build it after the parameters")
    for name, p in names.items():
        if p.manifold.k is not None and not isinstance(p.manifold.sampler, Subspace):
            raise TypeError(
                f"{name}: the sampler {p.manifold.sampler!r} needs the whole gradient; take 'lsi' or 'subspace', or "
                "torch's DistributedDataParallel as it is"
            )
    own = {name: (tuple(p.shape), p.manifold.seed, p.manifold.get_extra_state().tolist()) for name, p in names.items()}
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, own, group)
    for rank, theirs in enumerate(everyone):
        if theirs != own:
            differing = [name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name)]
            raise ValueError(f"shape, seed or count of {', '.join(sorted(differing))} differs in process {rank}")


class Exchange:
    """Puts the factors of the mean gradient into ``p.grad`` before each step of an optimiser.

    A multiple of X in a gradient, which moves nothing, is taken out of each process's own.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, points: list[Any], group: Any) -> None:
        #: Bytes handed to the process group by this process so far.
        self.bytes = 0
        self._points, self._group = points, group
        self._hook = optimizer.register_step_pre_hook(self._before)

    def remove(self) -> None:
        """Leave gradients as they are from now on: each process's own."""
        self._hook.remove()

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if len(args) > 1 or kwargs.get("closure") is not None:  # the first is the optimiser
            raise ValueError("a closure would make gradients after they have been exchanged: call it before the step")
        for p in self._points:
            p.grad = self._mean_of(p)

    def _mean_of(self, p: Any) -> Tensor:
        """Return the mean gradient as the manifold will see it."""
        grad = torch.zeros_like(p.detach()) if p.grad is None else p.grad  # all must take part
        if p.manifold.is_dense(p):
            return self.mean(grad.clone())
        local: Gradient
        if isinstance(grad, FactoredTensor) and isinstance(grad.factors, LowRank):
            local = grad.factors
        else:
            local = without_normal_part(grad.detach(), p.detach(), p.manifold.k)
        return FactoredTensor(p.manifold.sketch(p, MeanGradient(local, self)))

    def mean(self, t: Tensor) -> Tensor:
        """Return the mean over all processes, in place."""
        numbers = _numbers(t)
        self.bytes += numbers.numel() * numbers.element_size()
        dist.all_reduce(numbers, group=self._group)
        return t.div_(dist.get_world_size(self._group))


@dataclass(frozen=True)
class MeanGradient:
    """The mean of the gradients of all processes, known by its products: one here, then the mean of them."""

    local: Gradient
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

    def unit_image(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return y, the product with the gradient at unit norm, and its adjoint's product with y."""
        y = linalg.of_unit_norm(self.times(q))
        return y, self.adjoint_times(y)

    def dense(self) -> Tensor:
        """Return G itself: never asked for by samplers that are linear."""
        raise TypeError("the mean gradient is not formed")


def _numbers(t: Tensor) -> Tensor:
    """Return a tensor as real numbers, in the same memory."""
    plain = t.as_subclass(Tensor)
    return torch.view_as_real(plain) if t.is_complex() else plain
