r"""From a gradient G to rank-k factors: samplers that return (a, b) with :math:`G \approx a b^H`.

Every sampler finds an orthonormal a of k columns for the part of G's range that matters and returns the
projection :math:`a a^H G`, that is :math:`b = G^H a`.  They differ in how a is found.

A sampler is a callable ``(gradient, k, generator) -> LowRank``.  ``gradient`` is anything with the three
methods of :class:`Gradient`; the matrix itself need not exist.  Random numbers come from ``generator``
alone.  One draw serves all matrices of a batch, so a batch equals its members one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from projunn_manifold import linalg, passes, rows
from projunn_manifold.factors import LowRank

_SAMPLED = 192**2  # entries on which the cosine of random matrices is below 1/64, by three standard deviations
_TURNS = 1 / 64  # the part along X that is worth taking out

__all__ = [
    "SAMPLERS",
    "Averaging",
    "Column",
    "Dense",
    "Gradient",
    "Sampler",
    "Subspace",
    "resolve_sampler",
    "svd",
    "without_normal_part",
]


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


Sampler = Callable[[Gradient, int, torch.Generator], LowRank]


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
        """Return y, the product with the gradient at unit norm, and its adjoint's product with y."""
        y = linalg.of_unit_norm(self.times(q))
        return y, self.adjoint_times(y)

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


def orthonormal(y: Tensor) -> Tensor:  # (*batch, n, k) -> (*batch, n, k)
    """Orthonormal basis of the columns of y.  A single zero column stays zero (so a zero G gives b = 0)."""
    y = linalg.of_unit_norm(y)  # LAPACK loses orthogonality near underflow
    return y if y.shape[-1] == 1 else linalg.thin_qr(y)[0]


def leading(basis: Tensor, gradient: Gradient, k: int) -> LowRank:
    """Project G on ``basis`` (orthonormal, at least k columns) and keep the best k directions inside it."""
    b = gradient.adjoint_times(basis)
    if basis.shape[-1] > k:
        thin = b.to(linalg.high_precision(b.dtype))
        thin = thin / thin.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(thin.dtype).tiny)
        _, w = torch.linalg.eigh(linalg.finite(thin.mH @ thin))  # ascending: the last k columns are the leading ones
        w = w[..., -k:].to(b.dtype)
        basis, b = basis @ w, b @ w
    return LowRank(basis, b)


@dataclass(frozen=True)
class Subspace:
    r"""Randomised range finder with oversampling and power iterations (Halko, Martinsson, Tropp 2011).

    :math:`\mathrm{orth}((G G^H)^p\, G\, Z)` for a Gaussian Z of k + ``oversample`` columns, then the best k
    directions inside.  ``power=0, oversample=0`` is the one-pass range finder, which is the LSI sampler of
    the projUNN paper (section 4.3) from the left instead of the right.  Cost: ``2 + 2 power`` products of G
    with k + ``oversample`` columns, a pair of them in one read where nothing comes between.

    Parameters
    ----------
    power : int
        Power iterations p; each sharpens the decay of the singular values.
    oversample : int
        Extra columns of the test matrix.
    """

    power: int = 0
    oversample: int = 0

    def __post_init__(self) -> None:
        for name, value in (("power", self.power), ("oversample", self.oversample)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"Subspace: {name} must be an integer >= 0, got {value!r}")

    def __call__(self, gradient: Gradient, k: int, generator: torch.Generator) -> LowRank:
        """Return the factors of the projection of G on its sketched range."""
        n, m = gradient.shape[-2:]
        like = gradient.like
        columns = min(k + self.oversample, n, m)
        test = torch.randn(m, columns, dtype=like.dtype, device=like.device, generator=generator)
        test = test.expand(*gradient.shape[:-2], m, columns)
        for _ in range(self.power):
            test = orthonormal(gradient.unit_image(test)[1])
        if columns > 1:
            return leading(orthonormal(gradient.times(test)), gradient, k)
        return LowRank(*gradient.unit_image(test))


@dataclass(frozen=True)
class Column:
    r"""Linear-time SVD by column sampling (Drineas, Kannan, Mahoney 2006), the sampler of the paper's Fig. 2b and 4.

    Draws c columns of G with replacement, with probability proportional to their squared norms, rescales
    them by :math:`1/\sqrt{c\,p_j}`, and takes the k leading left singular vectors of the result as a.
    Cost: one read of G for the norms, c columns, one product.  A zero gradient is sampled uniformly.

    Parameters
    ----------
    columns_per_rank : int
        c / k, at least 1.
    """

    columns_per_rank: int = 4

    def __post_init__(self) -> None:
        value = self.columns_per_rank
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"Column: columns_per_rank must be an integer >= 1, got {value!r}")

    def __call__(self, gradient: Gradient, k: int, generator: torch.Generator) -> LowRank:
        """Return the factors of the projection of G on the sampled columns' leading directions."""
        g = gradient.dense()
        m = g.shape[-1]
        c = max(k, min(self.columns_per_rank * k, m))
        norms = torch.linalg.vector_norm(g, dim=-2, dtype=linalg.high_precision(g.dtype)).real
        largest = norms.amax(-1, keepdim=True)
        weights = torch.where(largest > 0, (norms / largest).square(), 1.0)
        cumulative = weights.cumsum(-1)
        draws = torch.rand(c, dtype=cumulative.dtype, device=g.device, generator=generator)
        levels = draws * cumulative[..., -1:]  # one set of draws for the batch, its own columns for each matrix
        chosen = torch.searchsorted(cumulative, levels, right=True).clamp_max(m - 1)
        scale = torch.rsqrt(weights.gather(-1, chosen)).unsqueeze(-2)
        columns = g.gather(-1, chosen.unsqueeze(-2).expand(*g.shape[:-1], c))
        columns = columns * scale.to(columns.real.dtype)
        u = torch.linalg.svd(columns, full_matrices=False).U[..., :k]
        return LowRank(u, gradient.adjoint_times(u))


def svd(gradient: Gradient, k: int, generator: torch.Generator) -> LowRank:
    """Best rank-k approximation (Eckart-Young), by a dense SVD in O(n m^2): the reference for the others."""
    u, s, vh = torch.linalg.svd(gradient.dense(), full_matrices=False)
    return LowRank(u[..., :k], (vh.mH * s.unsqueeze(-2))[..., :k])


SAMPLERS: dict[str, Sampler] = {
    "lsi": Subspace(),
    "column": Column(),
    "subspace": Subspace(power=1, oversample=4),
    "svd": svd,
}


def resolve_sampler(sampler: str | Sampler) -> Sampler:
    """Return the sampler of that name, or the callable itself."""
    if isinstance(sampler, str) and sampler in SAMPLERS:
        return SAMPLERS[sampler]
    if callable(sampler):
        return sampler
    known = ", ".join(sorted(SAMPLERS))
    raise ValueError(
        f"sampler must be one of {known}, or a callable (gradient, k, generator) -> LowRank; got {sampler!r}"
    )
