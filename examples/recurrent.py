"""A recurrent network whose transition is a point of a manifold: ``h_t = modReLU(W h_{t-1} + u_t)``.

The same network serves every method of the comparison; only the manifold of W differs.
"""

from __future__ import annotations

from typing import Any

import geoopt
import torch
from geoopt.manifolds.base import Manifold
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from projunn_manifold.init import henaff_


class ModReLURecurrence(torch.autograd.Function):
    r"""All states ``h_t = modReLU(W h_{t-1} + u_t)`` from ``h_0 = 0``, with ``modReLU(z) = sign(z) relu(|z| + b)``.

    One node of the autograd graph for the whole sequence: several times faster on a CPU than one per
    operation and step, and the gradient of W is a single product over all steps.
    """

    @staticmethod
    def forward(ctx: Any, drive: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the states ``(time, batch, hidden)`` for a drive u of that shape."""
        states = drive.clone(memory_format=torch.contiguous_format)
        transition = weight.mT.contiguous()  # states are rows, so that a step is h W^T
        for t, state in enumerate(states):
            if t:
                state.addmm_(states[t - 1], transition)
            magnitude = state.abs().add_(bias).relu_()
            state.sign_().mul_(magnitude)
        ctx.save_for_backward(states, weight)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of drive, weight and bias."""
        states, weight = ctx.saved_tensors
        signs = states.sign()
        active = signs.abs()  # modReLU has slope 1 where its value is not 0, and slope 0 elsewhere
        grad = grad_states.clone(memory_format=torch.contiguous_format)  # becomes the gradient of u_t, from the last on
        for t in range(len(grad) - 1, -1, -1):
            grad[t].mul_(active[t])
            if t:
                grad[t - 1].addmm_(grad[t], weight)
        grad_weight = grad[1:].flatten(0, 1).mT @ states[:-1].flatten(0, 1)
        grad_bias = signs.mul_(grad).sum((0, 1))
        return grad, grad_weight, grad_bias


class RecurrentNetwork(nn.Module):
    """Encoder, modReLU recurrence with an orthogonal transition, linear read-out of every state.

    Parameters
    ----------
    encoder : nn.Module
        Maps inputs ``(time, batch, ...)`` to the drive ``(time, batch, hidden)`` of the recurrence.
    hidden, outputs : int
        Number of hidden units and of classes.
    manifold : geoopt.manifolds.base.Manifold
        Manifold of the transition W, which starts at Henaff's block rotations.
    """

    def __init__(self, encoder: nn.Module, hidden: int, outputs: int, manifold: Manifold) -> None:
        super().__init__()
        self.encoder = encoder
        self.transition = geoopt.ManifoldParameter(henaff_(torch.empty(hidden, hidden)), manifold=manifold)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.readout = nn.Linear(hidden, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits ``(time, batch, outputs)`` at every step."""
        return self.readout(ModReLURecurrence.apply(self.encoder(inputs), self.transition, self.bias))

    def dense_parameters(self) -> list[nn.Parameter]:
        """Return all parameters but the transition."""
        return [p for p in self.parameters() if p is not self.transition]

    @torch.no_grad()
    def unitarity_error(self) -> float:
        r"""Distance :math:`\|W^T W - I\|_F/\\sqrt n` of the transition from the manifold, in double precision."""
        weight = self.transition.double()
        n = weight.shape[-1]
        return (torch.linalg.matrix_norm(weight.mT @ weight - torch.eye(n)).item()) / n**0.5
