r"""A recurrence over a whole sequence as one autograd function.

.. math:: h_t = \sigma(V x_t + \beta + W h_{t-1}),\qquad t = 1, \dots, T

The forward pass keeps a copy of the states, so that the caller may write to those it returns.  Every derivative of a
built-in σ follows from its value (complex modReLU keeps the modulus of its argument, too).  The backward pass returns
the gradient of W from
:math:`\Delta = [\delta_1, \dots, \delta_T]` (what arrives at σ's argument) and :math:`H = [h_0, \dots, h_{T-1}]` at
once, :math:`G = \Delta H^H`: as a dense matrix, one product over all time, or as the factors (Δ, H) themselves, so that
a sketch costs O(T B n k) and G is never formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from projunn_manifold import context
from projunn_manifold.context import in_full_precision
from projunn_manifold.sketching.factored_tensor import FactoredTensor
from projunn_manifold.sketching.lowrank import LowRank

__all__ = ["NONLINEARITIES", "modrelu", "recurrence", "step_by_step", "steps"]

Nonlinearity = Callable[[Tensor, Any], Tensor]


def modrelu(z: Tensor, bias: Tensor) -> Tensor:  # (..., n), (n,) -> (..., n)
    r""":math:`\max(|z| + b, 0)\, z/|z|`, zero at z = 0 (Arjovsky, Shah, Bengio 2016, equation 8)."""
    direction = torch.sgn(z) if z.is_complex() else torch.sign(z)  # ONNX exporters know sign, but not all know sgn
    return direction * torch.relu(z.abs() + bias)


#: Built-in nonlinearities: functions of the argument and of modReLU's bias.
NONLINEARITIES: dict[str, Nonlinearity] = {
    "modrelu": modrelu,
    "relu": lambda z, bias: torch.relu(z),
    "tanh": lambda z, bias: torch.tanh(z),
    "none": lambda z, bias: z,
}


@in_full_precision
def recurrence(
    x: Tensor,
    h0: Tensor,
    inward: Tensor,
    weight: Tensor,
    beta: Tensor | None,
    bias: Tensor | None,
    nonlinearity: str,
    *,
    factored: bool,
) -> Tensor:
    """Return all states of the recurrence with a built-in nonlinearity.

    Parameters
    ----------
    x : Tensor
        Inputs, ``(T, B, m)``.
    h0 : Tensor
        First state, ``(B, n)``.
    inward, weight : Tensor
        V, ``(n, m)``, and W, ``(n, n)``.
    beta, bias : Tensor, optional
        β and modReLU's bias, ``(n,)``, the latter real.
    nonlinearity : str
        One of :data:`NONLINEARITIES`.
    factored : bool
        Whether the gradient of W is a :class:`~projunn_manifold.sketching.factored_tensor.FactoredTensor`.

    Returns
    -------
    Tensor
        ``(T, B, n)``
    """
    if context.operators_only():
        return step_by_step(x, h0, inward, weight, beta, bias, NONLINEARITIES[nonlinearity])
    given = (x, h0, inward, weight, beta, bias)
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in given):
        return _states_and_sizes(x, h0, inward, weight, beta, bias, nonlinearity)[0]
    states: Tensor = _Recurrence.apply(x, h0, inward, weight, beta, bias, nonlinearity, factored)  # type: ignore[no-untyped-call]
    return states


def step_by_step(*arguments: Any) -> Tensor:
    """Return the states of :func:`steps` as one tensor ``(T, B, n)``."""
    return torch.stack(steps(*arguments))


@in_full_precision
def steps(
    x: Tensor,
    h0: Tensor,
    inward: Tensor,
    weight: Tensor,
    beta: Tensor | None,
    bias: Tensor | None,
    nonlinearity: Nonlinearity,
) -> list[Tensor]:
    """Return the same states one by one, by a graph of operators for every step: for any σ and any derivative."""
    h, states = h0, []
    for pre in linear(x, inward, beta).unbind(0):
        h = nonlinearity(pre + linear(h, weight), bias)
        states.append(h)
    return states


def _states_and_sizes(
    x: Tensor,
    h0: Tensor,
    inward: Tensor,
    weight: Tensor,
    beta: Tensor | None,
    bias: Tensor | None,
    nonlinearity: str,
) -> tuple[Tensor, Tensor | None]:
    """Return all states and, for complex modReLU, the moduli of its arguments, both ``(T, B, n)``."""
    steps, batch, n = x.shape[0], x.shape[1], weight.shape[0]
    states = x.new_empty(steps, batch, n)
    product = states.view(steps * batch, n)
    if beta is not None:
        product.copy_(beta)
    product.addmm_(x.flatten(0, 1), inward.mT, beta=0 if beta is None else 1)
    transposed, activate_ = weight.mT, _ACTIVATE_[nonlinearity]
    sizes = states.real.new_empty(states.shape) if nonlinearity == "modrelu" and states.is_complex() else None
    h = h0
    for t, state in enumerate(states.unbind(0)):
        activate_(state.addmm_(h, transposed), bias, None if sizes is None else sizes[t])
        h = state
    return states, sizes


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h0: Tensor,
        inward: Tensor,
        weight: Tensor,
        beta: Tensor | None,
        bias: Tensor | None,
        nonlinearity: str,
        factored: bool,
    ) -> Tensor:
        states, sizes = _states_and_sizes(x, h0, inward, weight, beta, bias, nonlinearity)
        history = torch.cat((h0[None], states))  # a copy: the states belong to the caller
        ctx.save_for_backward(x, h0, inward, weight, beta, bias, history, sizes)
        ctx.nonlinearity, ctx.factored = nonlinearity, factored
        return states

    @staticmethod
    @in_full_precision
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, h0, inward, weight, beta, bias, history, sizes = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        if create_graph or context.batched(grad):  # further derivatives, or many at once: through a graph of every step
            with torch.enable_grad():
                # fresh aliases: one input may depend on another, which is differentiated outside this function
                given = [None if t is None else t.view_as(t) for t in (x, h0, inward, weight, beta, bias)]
                arguments: Any = (*given, NONLINEARITIES[ctx.nonlinearity])
                plain = step_by_step(*arguments)
            inputs = [t for t in given if t is not None and t.requires_grad]
            found = iter(torch.autograd.grad(plain, inputs, grad, create_graph=create_graph))
            return (*(next(found) if t is not None and t.requires_grad else None for t in given), None, None)
        steps, batch, n = grad.shape
        delta = torch.empty_like(grad, memory_format=torch.contiguous_format)
        conjugate = weight.conj().resolve_conj()
        pull_back_ = _PULL_BACK_[ctx.nonlinearity]
        of_bias = torch.zeros_like(bias) if bias is not None else None
        after = None
        for t in reversed(range(steps)):
            target = delta[t]
            if after is None:
                target.copy_(grad[t])
            else:
                torch.addmm(grad[t], after, conjugate, out=target)
            pull_back_(target, history[t + 1], bias, None if sizes is None else sizes[t], of_bias)
            after = target
        needs = ctx.needs_input_grad
        flat, before = delta.view(steps * batch, n), history[:-1].view(steps * batch, n)
        of_weight: Tensor | None = None
        if needs[3]:
            product = LowRank(flat.mT, before.mT)
            of_weight = FactoredTensor(product) if ctx.factored and batch else product.dense()
        return (
            (flat @ inward.conj()).view(x.shape) if needs[0] else None,
            delta[0] @ conjugate if needs[1] else None,
            flat.mT @ x.flatten(0, 1).conj() if needs[2] else None,
            of_weight,
            flat.sum(0) if needs[4] else None,
            of_bias if needs[5] else None,
            None,
            None,
        )


# -- built-in nonlinearities: the value written over the argument, and the pull-back from the value ---------------


def _modrelu_(z: Tensor, bias: Any, size: Tensor | None) -> None:
    """Write modReLU over z and, for complex z, |z| to ``size``."""
    size = z.abs() if size is None else torch.abs(z, out=size)
    z.sgn_().mul_((size + bias).relu_())


def _pull_back_modrelu_(g: Tensor, y: Tensor, bias: Any, size: Tensor | None, of_bias: Any) -> None:
    direction = torch.sgn(y)
    if size is None:
        of_bias.add_((direction * g).sum(0))
        g.mul_(direction.abs_())
        return
    turned = direction.conj() * g
    of_bias.add_(turned.real.sum(0))
    stretch = y.abs() / torch.where(size == 0, 1.0, size)  # of what is across the direction of z
    torch.mul(direction, torch.complex(turned.real, turned.imag * stretch), out=g)


_ACTIVATE_: dict[str, Callable[[Tensor, Tensor | None, Tensor | None], object]] = {
    "modrelu": _modrelu_,
    "relu": lambda z, bias, size: z.relu_(),
    "tanh": lambda z, bias, size: z.tanh_(),
    "none": lambda z, bias, size: z,
}
_PULL_BACK_: dict[str, Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], object]] = {
    "modrelu": _pull_back_modrelu_,
    "relu": lambda g, y, *_: torch.ops.aten.threshold_backward.grad_input(g, y, 0, grad_input=g),
    "tanh": lambda g, y, *_: torch.ops.aten.tanh_backward.grad_input(g, y, grad_input=g),
    "none": lambda g, *_: g,
}
