"""The nonlinearity of unitary networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from projunn_manifold.layers.recurrence import modrelu

__all__ = ["ModReLU"]


class ModReLU(nn.Module):
    r""":math:`\max(|z| + b, 0)\, z/|z|` with a learnt real bias for each feature, ``(..., n)`` to ``(..., n)``.

    For real numbers :math:`\mathrm{sign}(z)\max(|z| + b, 0)`.  It keeps the phase (the sign) of its argument and so
    suits unitary networks.  The bias starts uniform in (-0.01, 0.01).

    Parameters
    ----------
    features : int
        n
    device, dtype
        Of the bias; for a complex dtype its real counterpart.

    References
    ----------
    Arjovsky, Shah, Bengio, *Unitary evolution recurrent neural networks*, ICML 2016, equation 8.
    """

    def __init__(self, features: int, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        real = torch.empty((), dtype=dtype).real.dtype
        self.bias = nn.Parameter(torch.empty(features, device=device, dtype=real))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a new bias, as after ``to_empty``."""
        nn.init.uniform_(self.bias, -0.01, 0.01)

    def forward(self, z: Tensor) -> Tensor:
        """Return the activation of z."""
        return modrelu(z, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Convert the bias, which stays real where its network becomes complex."""

        def converted(t: Tensor) -> Tensor:
            found: Tensor = fn(t)
            return found.real.clone() if found.is_complex() else found

        return super()._apply(converted, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Return the number of features."""
        return f"{len(self.bias)}"
