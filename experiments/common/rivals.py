"""Rivals without a package, written from the published algorithms: our reading of them, for real square matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class _Moved(torch.optim.Optimizer):
    """An optimiser that moves one parameter after the other."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for x in group["params"]:
                if x.grad is not None:
                    self.move(x, x.grad, self.state[x], **{name: v for name, v in group.items() if name != "params"})

    def move(self, x: Tensor, g: Tensor, state: dict[str, Any], **group: Any) -> None:
        """Move one parameter."""
        raise NotImplementedError


class RSDM(_Moved):
    """Descent on random submanifolds, which rotates r random rows: O(r² n) for an n x n matrix.

    Han, Poirion, Takeda, *Efficient Optimization with Orthogonality Constraint: a Randomized Riemannian Submanifold
    Method*, ICML 2025, with permutations: X_P becomes qf(I - lr·skew(G_P X_P^T)) X_P.

    Parameters
    ----------
    params
        Orthogonal matrices ``(n, n)``.
    lr : float
        Learning rate.
    rows : int
        r.
    seed : int
        Of the draws of rows.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, rows: int, seed: int = 0) -> None:
        super().__init__(params, {"lr": lr, "rows": rows})
        self.generator = torch.Generator().manual_seed(seed)

    def move(self, x: Tensor, g: Tensor, state: dict[str, Any], lr: float, rows: int) -> None:  # (n, n), (n, n)
        """Rotate random rows among themselves."""
        chosen = torch.randperm(len(x), generator=self.generator)[:rows]
        x_p = x[chosen]
        f = g[chosen] @ x_p.mT
        q, r = torch.linalg.qr(torch.eye(rows, dtype=x.dtype) - lr / 2 * (f - f.mT))
        x[chosen] = (q * r.diagonal().sign()) @ x_p


class MomentumStiefel(_Moved):
    """StiefelSGD and StiefelAdam, whose momentum stays in the Lie algebra: O(n³).

    Kong, Wang, Tao, *Momentum Stiefel Optimizer, with Applications to Suitably-Orthogonal Attention, and Optimal
    Transport*, ICLR 2023.  A velocity XY + V has its part V orthogonal to X, which square X leaves at zero; so only the
    skew Y is here.  Y averages X^T G - G^T X, Adam divides it by the root of the averaged squares entry by entry, and X
    becomes X·cay(-lr Y).  Left out: the polar factor after each step, which Cayley's map makes superfluous up to
    rounding.  The average of the SGD has Adam's weights (dampening), with the start corrected for.

    Parameters
    ----------
    params
        Orthogonal matrices ``(n, n)``.
    lr : float
        Learning rate.
    adaptive : bool
        Whether this is Adam.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, adaptive: bool) -> None:
        super().__init__(params, {"lr": lr, "adaptive": adaptive, "betas": (0.9, 0.99), "eps": 1e-5})

    def move(
        self, x: Tensor, g: Tensor, state: dict[str, Any], lr: float, adaptive: bool, betas: Any, eps: float
    ) -> None:  # (n, n), (n, n)
        """Move along the averaged direction."""
        if not state:
            state.update(step=0, mean=torch.zeros_like(x), squares=torch.zeros_like(x) if adaptive else None)
        state["step"] += 1
        skew = x.mT @ g
        skew = skew - skew.mT
        y = state["mean"].lerp_(skew, 1 - betas[0]) / (1 - betas[0] ** state["step"])
        if adaptive:
            squares = state["squares"].lerp_(skew.square(), 1 - betas[1]) / (1 - betas[1] ** state["step"])
            y /= squares.sqrt_() + eps
        y.mul_(lr / 2).diagonal().add_(1)
        x.copy_(2 * torch.linalg.solve(y, x, left=False) - x)  # X·cay(-lr Y) = X (2 (I + lr Y / 2)^-1 - I)
