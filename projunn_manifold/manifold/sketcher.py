r"""From a gradient, or any vector, to a tangent of low rank.

A gradient is sketched once, :math:`G \approx a b^H`, and becomes the tangent :math:`\tfrac12(a b^H - X b a^H X)`.  Any
other vector (momentum, Adam's direction) is reduced inside a right basis of 2k columns.
"""

from __future__ import annotations

import copy
from typing import Any, final

import torch
from torch import Tensor

from projunn_manifold import validation
from projunn_manifold.context import in_full_precision
from projunn_manifold.linalg import dense
from projunn_manifold.linalg.products import CompiledMatrix, LinearOperator, Matrix, matrix
from projunn_manifold.manifold.state import State
from projunn_manifold.moves.frame import FramedTangent
from projunn_manifold.moves.full_rank import FullRankTangent
from projunn_manifold.moves.projunn import sketched_tangent, tangent_of_gradient, tangent_of_vector
from projunn_manifold.moves.tangent import Tangent
from projunn_manifold.sketching import samplers
from projunn_manifold.sketching.factored_tensor import FactoredTensor, as_plain
from projunn_manifold.sketching.gradients import Averaging, WithoutDecay
from projunn_manifold.sketching.lowrank import LowRank

__all__ = ["POWER", "Sketcher"]

_GRADIENT, _MOVE = 0, 1  # purposes of random numbers
POWER = 2  # products with u^H u when a vector is reduced: Adam at small k needs half the steps it needs with none


@final
class Sketcher:
    """Rank, sampler and random numbers of one manifold.

    Parameters
    ----------
    k : int or None
        Rank of a gradient's sketch; None: full rank.
    sampler : str or callable
        How a gradient becomes factors; see :mod:`projunn_manifold.sketching.samplers`.
    state : State
        Seeds every draw.
    """

    def __init__(self, k: int | None, sampler: str | samplers.Sampler, state: State) -> None:
        self.k = validation.check_count(k, "k", "full rank")
        self.sampler = samplers.resolve_sampler(sampler)
        self.sampler_name = sampler if isinstance(sampler, str) else getattr(sampler, "__name__", repr(sampler))
        #: Whether a gradient is sketched by k Gaussian columns and nothing else.
        self.is_plain = self.sampler == samplers.SAMPLERS["lsi"]
        self._state = state

    def drawing_from(self, state: State) -> Sketcher:
        """Return a sketcher like this one, whose draws follow from another state."""
        other = copy.copy(self)
        other._state = state
        return other

    @property
    def is_linear(self) -> bool:
        """Whether factors of a gradient follow from its products with a few columns, which processes can sum."""
        return isinstance(self.sampler, samplers.Subspace)

    def is_dense(self, x: Tensor) -> bool:
        """Return whether moves of x use the whole gradient: k is None, or 2k >= m."""
        return self.k is None or 2 * self.k >= x.shape[-1]

    def tangent(self, x: Matrix, u: Tensor, decay: float = 0.0) -> Tangent:
        """Return the Riemannian gradient of u - decay X, u a Euclidean gradient; of its rank-k part unless dense."""
        if self.k is None or self.is_dense(x.like):
            return _full_rank_gradient(x, as_plain(u))
        if self.is_plain and isinstance(x, CompiledMatrix) and not decay and not isinstance(u, FactoredTensor):
            found = sketched_tangent(x, matrix(u), self.test_columns(x.like))
            if found is not None:
                return found
        return tangent_of_gradient(x, self.factors(x, u, decay))

    def test_columns(self, x: Tensor) -> Tensor:
        """Draw the columns with which the plain sampler tests a gradient."""
        assert self.k is not None
        return samplers.draw_columns(x.shape[-1], self.k, x, self._generator(x.device))

    def factors(self, x: Matrix, u: Tensor, decay: float = 0.0, averaging: Averaging | None = None) -> LowRank:
        """Return rank-k factors of the gradient u, or of its mean over processes."""
        assert self.k is not None
        given = u.factors if isinstance(u, FactoredTensor) else None
        if isinstance(given, LowRank) and given.rank <= self.k and averaging is None:
            return given.balanced()
        gradient: LinearOperator
        if isinstance(given, LowRank):
            gradient = given
        else:
            gradient = WithoutDecay(as_plain(u), x, decay) if decay else matrix(as_plain(u))
        return self.sketch(gradient if averaging is None else averaging.gradient(gradient))

    @in_full_precision
    def sketch(self, gradient: LinearOperator, ahead: int = 0) -> LowRank:
        """Return rank-k factors of a gradient; ``ahead`` gradients come before it that are not counted yet.

        Raises
        ------
        RuntimeError
            The sampler's factorisation of a finite gradient did not converge.
        """
        assert self.k is not None
        like, shape = gradient.like, gradient.shape
        try:
            factors = self.sampler(gradient, self.k, self._generator(like.device, ahead))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if (dense.squared_norm(gradient.dense()) <= torch.finfo(like.dtype).max).all():
                raise RuntimeError(
                    f"the sampler's factorisation of a finite gradient of shape {tuple(shape)} did not converge"
                ) from None
            nothing = (like.new_full((*shape[:-2], side, 1), torch.nan) for side in shape[-2:])
            return LowRank(*nothing)  # to be refused like any gradient that is not finite
        return samplers.check_sample(factors, shape, like, self.k)

    def _generator(self, device: torch.device, ahead: int = 0) -> Any:  # Generators, for samplers that take them
        return self._state.generator(device, _GRADIENT, ahead)

    def columns_of_vector(self, u: Tensor) -> Tensor:
        """Draw the 2k columns with which a vector is reduced."""
        assert self.k is not None
        return samplers.draw_columns(u.shape[-1], 2 * self.k, u, self._state.generator(u.device, _MOVE))

    def reduced(self, x: Matrix, u: Tensor) -> Tangent:
        """Return the tangent of rank at most 2k that u is reduced to (all of u where 2k >= m)."""
        if self.k is None or self.is_dense(x.like):
            return _full_rank_tangent(x, u)
        test, known = self.columns_of_vector(u), matrix(u)
        if isinstance(x, CompiledMatrix) and x.shape[-2] == x.shape[-1]:
            found = FramedTangent.of_reduced(x, known, test, POWER)
            if found is not None:
                return found
        basis = test.expand(*x.shape[:-2], *test.shape[-2:])
        for _ in range(POWER):
            basis = samplers.orthonormal(known.normalized_image(basis)[1])
        return tangent_of_vector(x, u, basis)


def _full_rank_gradient(x: Matrix, g: Tensor) -> Tangent:
    """Return ``½(G - X G^H X)``, all of it; on square X it is the projection of G."""
    if x.shape[-2] > x.shape[-1]:
        point = x.dense()
        g = (g - point @ dense.adjoint_times(g, point)) / 2
    return _full_rank_tangent(x, g)


def _full_rank_tangent(x: Matrix, u: Tensor) -> Tangent:
    """Return the projection of u on the tangent space, all of it."""
    if x.shape[-2] == x.shape[-1]:
        return FullRankTangent.of_vector(x, u)
    return tangent_of_vector(x, u, None)
