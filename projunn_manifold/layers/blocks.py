"""Products of a stack of blocks with the waves of a batch, whose gradient is kept as factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from projunn_manifold import context
from projunn_manifold.linalg import dense
from projunn_manifold.sketching.factored_tensor import FactoredTensor
from projunn_manifold.sketching.lowrank import LowRank

__all__ = ["apply_blocks"]


def apply_blocks(
    stack: Tensor, x: Tensor, adjoint: bool, factored: bool
) -> Tensor:  # (*batch, n, m), (*batch, m, B) -> (*batch, n, B)
    """Multiply each block, or with ``adjoint`` its adjoint, by the complex x.

    ``factored`` keeps the gradient of the blocks as factors.
    """
    if not stack.is_complex():
        return (stack.mT if adjoint else stack).to(x.dtype) @ x
    if context.operators_only():
        return (stack.mH if adjoint else stack) @ x
    return _Blocks.apply(stack, x, adjoint, factored)  # type: ignore[no-untyped-call]


class _Blocks(torch.autograd.Function):
    """One matrix product for each frequency; the gradient of the blocks is a product of rank at most the batch."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, adjoint: bool, factored: bool) -> Tensor:
        ctx.save_for_backward(weight, x)
        ctx.adjoint, ctx.factored = adjoint, factored
        return dense.adjoint_times(weight, x) if adjoint else weight @ x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, x = ctx.saved_tensors
        of_x: Tensor | None = None
        of_weight: Tensor | None = None
        if ctx.needs_input_grad[1]:
            of_x = weight @ grad if ctx.adjoint else dense.adjoint_times(weight, grad)
        if ctx.needs_input_grad[0]:
            a, b = (x, grad) if ctx.adjoint else (grad, x)
            if ctx.factored and not torch.is_grad_enabled() and not context.batched(grad):
                of_weight = FactoredTensor(LowRank(a.detach(), b.detach()))
            else:
                of_weight = a @ b.mH
        return of_weight, of_x, None, None
