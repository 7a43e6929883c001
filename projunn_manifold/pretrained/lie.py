r"""Descent along the Lie algebra: the closest unitary as :math:`U = \exp(\sum_i \theta_i L_i)`, θ found by L-BFGS.

The L_i are the basis of the skew-Hermitian matrices, so every U on the way is unitary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from projunn_manifold.validation import check_positive

__all__ = ["STEPS", "TOLERANCE", "Callback", "Problem", "descend", "lie_element", "squared_distances"]

#: Steps at the most, and the derivative, in units of the loss's size, at which the descent ends.
STEPS, TOLERANCE = 500, 1e-6

Callback = Callable[[int, float], None]
Problem = tuple[Tensor, Tensor | None, int]  # matrices, the R factor of their inputs, multiplicity


def squared_distances(unitary: Tensor, weight: Tensor, r: Tensor | None) -> Tensor:  # -> (*batch,)
    """Return the squared distances; ‖(U - W)X‖ = ‖R(U - W)^T‖ where R is that of X^T = QR."""
    moved = unitary - weight
    return torch.linalg.matrix_norm(moved if r is None else r @ moved.mT) ** 2


def _varying_part(unitary: Tensor, target: Tensor, r: Tensor | None) -> Tensor:  # -> (*batch,)
    """Return the part of the squared distance that depends on U, divided by ‖W X X^H‖: small differences stay exact."""
    size = torch.linalg.matrix_norm(target)
    varying = -2 * (unitary.conj() * target).sum((-2, -1)).real
    if r is not None and unitary.shape[-2] < unitary.shape[-1]:  # ‖UX‖ is the same for all others
        varying = varying + torch.linalg.matrix_norm(r @ unitary.mT) ** 2
    return varying / size


def descend(
    problems: list[Problem],
    *,
    steps: int = STEPS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    callback: Callback | None = None,
) -> tuple[list[Tensor], list[float], list[Tensor | None]]:
    """Descend for all matrices at once, each loss in units of its own size: large ones do not hide small ones."""
    check_positive("steps", steps)
    generator = torch.Generator("cpu").manual_seed(seed)
    thetas, targets = [], []
    for weight, r, _ in problems:
        side = max(weight.shape[-2:])
        count = side * side if weight.is_complex() else side * (side - 1) // 2
        start = torch.randn(*weight.shape[:-2], count, dtype=torch.float64, device="cpu", generator=generator) / side
        thetas.append(start.to(weight.device).requires_grad_())
        targets.append(weight if r is None else weight @ (r.mT @ r.conj()))
    moving = [theta for theta in thetas if theta.numel()]

    def unitaries() -> list[Tensor]:
        found = []
        for theta, (weight, _, _) in zip(thetas, problems, strict=True):
            n, m = weight.shape[-2:]
            element = lie_element(theta, max(n, m), weight.is_complex())
            found.append(torch.linalg.matrix_exp(element)[..., :n, :m])
        return found

    def evaluated() -> tuple[Tensor, list[Tensor]]:
        """Return the objective and the current unitary matrices, and leave its gradient in θ."""
        for theta in thetas:
            theta.grad = None
        found = unitaries()
        parts = zip(found, targets, problems, strict=True)
        total = sum(_varying_part(u, target, r).sum() for u, target, (_, r, _) in parts)
        assert isinstance(total, Tensor)
        total.backward()
        return total, [u.detach() for u in found]

    def slope() -> float:
        """Return the largest derivative of a matrix's loss, in units of twice its size."""
        return max((torch.linalg.vector_norm(theta.grad, dim=-1).max().item() / 2 for theta in moving), default=0.0)

    losses: list[float] = []
    optimizer = moving and torch.optim.LBFGS(  # with one iteration per step torch's L-BFGS stalls
        moving, max_iter=5, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
    )
    for step in range(1, steps + 1):
        if optimizer:
            optimizer.step(lambda: evaluated()[0])
        _, found = evaluated()
        distances = zip(found, problems, strict=True)
        losses.append(sum(times * squared_distances(u, weight, r).sum().item() for u, (weight, r, times) in distances))
        if callback is not None:
            callback(step, losses[-1])
        left = slope()
        if left <= tolerance:
            break
    else:
        warnings.warn(
            f"nearest_unitary: after {steps} steps the derivative is {left:.1e}, not yet {tolerance:.1e}",
            stacklevel=5,
        )
    return found, losses, [theta.detach() for theta in thetas]


def lie_element(theta: Tensor, side: int, complex_: bool) -> Tensor:  # (*batch, count) -> (*batch, side, side)
    """Return Σ θ_i L_i, skew-Hermitian."""
    pairs = side * (side - 1) // 2
    i, j = torch.triu_indices(side, side, 1, device=theta.device)
    upper = theta[..., :pairs]
    if complex_:
        upper = torch.complex(upper, theta[..., pairs : 2 * pairs])
    half = upper.new_zeros(*theta.shape[:-1], side * side).index_copy(-1, i * side + j, upper).unflatten(-1, (side, -1))
    element = half - half.mH
    if complex_:
        element = element + torch.diag_embed(1j * theta[..., 2 * pairs :])
    return element
