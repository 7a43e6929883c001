r"""Gradients as samplers see them: a matrix G known by its products with thin ones, which need not exist itself.

Weight decay adds a multiple of X to a gradient; :func:`without_normal_part` takes it out, the difference unformed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from projunn_manifold import linalg, passes, rows

__all__ = ["Averaging", "Dense", "Gradient", "Shifted", "without_normal_part"]

_SAMPLED = 192**2  # entries on which the cosine of random matrices is below 1/64, by three standard deviations
_TURNS = 1 / 64  # the part along X that is worth taking out


class Gradient(Protocol):
    """A matrix G of shape ``(*batch, n, m)`` as a sampler sees it."""

    @property
    def like(self) -> Tensor:
        """A tensor with G's dtype and device."""

    @property
    def shape(self) -> torch.Size:
        """Shape ``(*batch, n, m)``."""

    def times(self, q: Tensor) -> Tensor:  # (*batch, m, j) -> (*batch, n, j)
        """Return ``G q``."""

    def adjoint_times(self, q: Tensor) -> Tensor:  # (*batch, n, j) -> (*batch, m, j)
        """Return ``G^H q``."""

    def unit_image(self, q: Tensor) -> tuple[Tensor, Tensor]:  # (*batch, m, j) -> (*batch, n, j), (*batch, m, j)
        """Return y = G q / ‖G q‖_F and ``G^H y``; y = 0 where G q is."""

    def dense(self) -> Tensor:
        """Return G itself."""


class Averaging(Protocol):
    """Means over processes, each of which has a gradient of its own."""

    def anywhere(self, here: bool) -> bool:
        """Tell whether something is so in any process."""

    def mean(self, t: Tensor) -> Tensor:
        """Return the mean of all processes' tensors, in place."""

    def gradient(self, local: Gradient) -> Gradient:
        """Return the mean of all processes' gradients, known by its products."""


@dataclass(frozen=True)
class Dense:
    """A gradient that exists as a matrix."""

    g: Tensor

    @property
    def like(self) -> Tensor:
        """The matrix."""
        return self.g

    @property
    def shape(self) -> torch.Size:
        """Shape ``(*batch, n, m)``."""
        return self.g.shape

    def times(self, q: Tensor) -> Tensor:
        """Return ``G q``."""
        return passes.times(self.g, q)

    def adjoint_times(self, q: Tensor) -> Tensor:
        """Return ``G^H q``."""
        return passes.adjoint_times(self.g, q)

    def unit_image(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return y = G q / ‖G q‖_F and ``G^H y``, in one read of G."""
        return passes.unit_image(self.g, q)

    def dense(self) -> Tensor:
        """Return G."""
        return self.g


@dataclass(frozen=True)
class Shifted(Dense):
    """The gradient ``G - c X``, never formed; ``c`` is real, one number per matrix, ``(*batch, 1, 1)``."""

    x: Tensor
    c: Tensor

    def times(self, q: Tensor) -> Tensor:
        """Return ``G q - c X q``."""
        return passes.times(self.g, q) - self.c * passes.times(self.x, q)

    def adjoint_times(self, q: Tensor) -> Tensor:
        """Return ``G^H q - c X^H q``."""
        return passes.adjoint_times(self.g, q) - self.c * passes.adjoint_times(self.x, q)

    def unit_image(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return y, the product at unit norm, and the adjoint's product with y."""
        return linalg.unit_image(self, q)

    def dense(self) -> Tensor:
        """Return ``G - c X`` as a new matrix."""
        return self.g - self.c * self.x


def without_normal_part(g: Tensor, x: Tensor, k: int) -> Gradient:
    r"""Return G without the multiple of X that weight decay added to it.

    A real multiple of X is normal to the manifold: it does not move the point, but it has full rank and
    would spoil a rank-k sketch.  On a set J of 2k + 1 columns :math:`\mathrm{sym}(X_J^H G_J)` has c as its
    middle eigenvalue if :math:`G = S + cX`, S of rank at most k plus any tangent; the mean over up to 21 such
    sets is taken out.  So adding λX to G adds exactly λ to c, and c is zero for a gradient of rank at most k.
    A part along X of less than 1/64 of G cannot turn the step and is left where it is.
    Cost: on CPU the cosine between G and X, on at most 36 864 entries of a matrix and a quarter of a large batch, tells
    which matrices need the eigenvalues (what chance alone would give a small matrix stays unseen), and these
    read 21 (2k + 1) columns; a matrix where c counts takes one product with X for each product with G.
    """
    if not linalg.readable(g):
        return Shifted(g, x, _normal_coefficient(g, x, k))
    suspects = _suspects(g, x)
    if not (suspects.any() if isinstance(suspects, Tensor) else suspects):
        return Dense(g)
    if g.dim() == 2:
        c = _normal_coefficient(g, x, k)
    else:
        c = torch.zeros(*g.shape[:-2], 1, 1, dtype=g.real.dtype, device=g.device)
        c[suspects] = _normal_coefficient(g[suspects], x[suspects], k)
    return Shifted(g, x, c) if c.any() else Dense(g)


def _suspects(g: Tensor, x: Tensor) -> Tensor | bool:  # (*batch, n, m) -> (*batch,)
    """Tell which matrices may have a part along X: by their own cosine, or, since a decay is common, by the mean."""
    n, m = g.shape[-2:]
    batch = g.numel() // (n * m) if g.numel() else 0
    if rows.peers_of(x) is not None and not rows.are_spread(x):  # others have matrices of the stack, too
        batch = int(rows.total(x, torch.tensor(batch)))
    if batch <= 1:
        count = min(n, -(-_SAMPLED // m))
        return bool(abs(passes.cosine(x, g, count)) > max(_TURNS, 3 / math.sqrt(count * m))) if g.numel() else False
    count = min(n, max(-(-n // 4), _SAMPLED // (batch * m)))
    cosines = passes.cosine(x, g, count)
    mean = rows.total(x, cosines.sum()) / batch
    if mean.abs() > max(_TURNS, 3 / math.sqrt(batch * count * m)):
        return torch.ones_like(cosines, dtype=torch.bool)
    return cosines.abs() > max(_TURNS, 4 / math.sqrt(count * m))


def _normal_coefficient(g: Tensor, x: Tensor, k: int) -> Tensor:  # -> (*batch, 1, 1), real
    """Return the multiple of X in G, or 0 where it does not count."""
    m = g.shape[-1]
    size = min(2 * k + 1, m)
    sets = min(21, m // size)
    x_sets, g_sets = (_column_sets(rows.local(t), sets, size) for t in (x, g))
    overlap = rows.summed(x, linalg.adjoint_times(x_sets, g_sets).to(linalg.high_precision(g.dtype)))
    c = linalg.middle_eigenvalue(linalg.sym(overlap)).mean(-1)
    energy = rows.summed(x, linalg.squared_norm(g_sets).sum(-1))
    counts = c.abs() * math.sqrt(sets * size) > _TURNS * energy.sqrt()
    return torch.where(counts, c, 0.0)[..., None, None].to(g.real.dtype)


def _column_sets(t: Tensor, sets: int, size: int) -> Tensor:  # (*batch, n, m) -> (*batch, sets, n, size)
    return t[..., : sets * size].reshape(*t.shape[:-1], sets, size).movedim(-2, -3)
