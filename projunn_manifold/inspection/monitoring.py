"""Numbers for a logger: distance from the manifold, what sketches keep, lengths of steps, faults."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from projunn_manifold.context import in_full_precision, outside_graphs
from projunn_manifold.inspection.gradients import (
    gradient_norm,
    gradient_operator,
    last_sketch,
    length_of_descent,
    norm_of,
)
from projunn_manifold.inspection.weights import Weight, rate_of, weights_of
from projunn_manifold.linalg import dense

__all__ = ["monitor"]


@outside_graphs
@in_full_precision
def monitor(model: nn.Module, optimizer: Any = None) -> dict[str, float]:
    r"""Return numbers about every unitary weight, ``{"name/number": value}``, for a logger.

    ``unitarity_error``
        An estimate of :math:`\|X^H X - I\|_F / \sqrt m` from four columns; for a stack, the largest.
    ``gradient_norm``
        :math:`\|G\|_F` of ``.grad``; an estimate from eight columns if ``.grad`` is kept as more than 1024 factors.
    ``share_kept``
        The share of this norm that the sketch of the last step kept, :math:`\|a b^H\|_F / \|G\|_F`; 1 if the step has
        full rank.  With error feedback, under ``constrain``, and with weight decay in geoopt's optimisers, a step
        sketches something other than ``.grad``; the share is then that of a sketch of ``.grad``.
    ``step_length``
        The length of the step of steepest descent along this sketch, in units of X: :math:`\eta\|u\|_F / \|X\|_F`,
        where :math:`\eta` is the learning rate that ``optimizer`` has for this weight, or 1 if none.  Momentum and Adam
        change the direction and the length of a step, and this number does not include that;
        :func:`~projunn_manifold.diagnose` measures it.
    ``skipped``, ``uncorrected``, ``shortened``
        The counts of :meth:`~projunn_manifold.UnitaryLowRank.pop_faults`, which are not reset.  Weights that share a
        manifold share its counts.

    Call it after ``step`` and before ``zero_grad``.  Without a gradient, or with a sparse one, ``gradient_norm``,
    ``share_kept`` and ``step_length`` are missing.  A weight that is sharded, empty or on the meta device has only the
    counts.

    Cost for each weight: one sketch and a few products with thin matrices, :math:`O(k n m)` with the default sampler,
    which factorises no large matrix.  Waits for the device.  A step does no extra work, and later sketches are the same
    with and without a call.

    Parameters
    ----------
    model : torch.nn.Module
    optimizer : torch.optim.Optimizer, optional
        The optimiser, or a wrapper that holds it.

    Returns
    -------
    dict of str to float

    Raises
    ------
    TypeError
        ``model`` is not a module; ``optimizer`` is not an optimiser and holds none.
    RuntimeError
        The sampler's factorisation of a finite gradient did not converge.

    Examples
    --------
    >>> import torch
    >>> from projunn_manifold import layers, monitor, optim
    >>> model = torch.nn.Sequential(layers.UnitaryLinear(64, 64, k=2), torch.nn.Linear(64, 2))
    >>> optimizer = optim.RiemannianSGD(model.parameters(), lr=0.1)
    >>> model(torch.randn(2, 64)).square().sum().backward()
    >>> optimizer.step()
    >>> numbers = monitor(model, optimizer)
    >>> sorted(name for name in numbers)[:3]
    ['0.weight/gradient_norm', '0.weight/share_kept', '0.weight/shortened']
    >>> round(numbers["0.weight/share_kept"], 3)  # a batch of two: a gradient of rank 2
    1.0
    """
    numbers: dict[str, float] = {}
    for weight in weights_of(model, optimizer):
        numbers |= {f"{weight.name}/{key}": value for key, value in _numbers(weight).items()}
    return numbers


def _numbers(weight: Weight) -> dict[str, float]:
    _, p, manifold, _ = weight
    faults = {key: float(count) for key, count in manifold.memory.faults()._asdict().items()}
    if not weight.has_values:
        return faults
    found = {"unitarity_error": dense.probed_unitarity_error(p.detach()).max().item()}
    gradient = gradient_operator(p)
    if gradient is not None:
        norm = gradient_norm(gradient)
        found["gradient_norm"] = norm
        found["share_kept"] = 1.0
        if not manifold.is_dense(p) and norm:
            kept = norm_of(*last_sketch(manifold, gradient))
            found["share_kept"] = kept / norm if math.isnan(kept / norm) else min(1.0, kept / norm)
        rate = rate_of(weight)
        found["step_length"] = length_of_descent(manifold, p, gradient) * (1.0 if rate is None else rate)
    return found | faults
