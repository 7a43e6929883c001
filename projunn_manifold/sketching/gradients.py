"""Gradients that are known by their products only: without weight decay, or the mean over processes."""

from __future__ import annotations

from typing import Protocol, final

import torch
from torch import Tensor

from projunn_manifold.linalg.products import LinearOperator, Matrix, matrix, normalized_image

__all__ = ["Averaging", "WithoutDecay"]


class Averaging(Protocol):
    """Means over processes, each of which has a gradient of its own."""

    def anywhere(self, here: bool) -> bool:
        """Return whether a condition holds in any process."""

    def mean(self, t: Tensor) -> Tensor:
        """Return the mean of all processes' tensors, in place."""

    def gradient(self, local: LinearOperator) -> LinearOperator:
        """Return the mean of all processes' gradients, known by its products."""


@final
class WithoutDecay:
    r"""The gradient :math:`G - \lambda X`, where an optimiser has added the weight decay λX to G; never formed.

    λX is normal to the manifold, so it does not move the point; but it has full rank and would spoil a rank-k sketch.

    Parameters
    ----------
    g : Tensor
        The gradient with its decay, ``(*batch, n, m)``.
    x : Matrix
        The point.
    decay : float
        λ
    """

    def __init__(self, g: Tensor, x: Matrix, decay: float) -> None:
        self._g, self._x, self._decay = matrix(g), x, decay

    @property
    def like(self) -> Tensor:
        """A tensor with the gradient's dtype and device."""
        return self._g.like

    @property
    def shape(self) -> torch.Size:
        """Shape ``(*batch, n, m)``."""
        return self._g.shape

    def times(self, q: Tensor) -> Tensor:
        """Return ``G q - λ X q``."""
        return self._g.times(q) - self._decay * self._x.times(q)

    def adjoint_times(self, q: Tensor) -> Tensor:
        """Return ``G^H q - λ X^H q``."""
        return self._g.adjoint_times(q) - self._decay * self._x.adjoint_times(q)

    def normalized_image(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return y, the product at unit norm, and the adjoint's product with y."""
        return normalized_image(self, q)

    def dense(self) -> Tensor:
        """Return ``G - λ X`` as a new matrix."""
        return self._g.dense() - self._decay * self._x.dense()
