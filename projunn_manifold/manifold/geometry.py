"""Matrices with orthonormal columns as a geoopt manifold: points, tangent vectors, metric, distance.

Everything that needs no rank is here.  Moves are defined in :class:`~projunn_manifold.UnitaryLowRank`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from geoopt import ManifoldTensor
from geoopt.manifolds.base import Manifold
from geoopt.utils import size2shape
from torch import Tensor

from projunn_manifold import validation
from projunn_manifold.context import in_full_precision, outside_graphs
from projunn_manifold.linalg import dense
from projunn_manifold.manifold.hooks import before_conversions
from projunn_manifold.moves.move import LowRankMove
from projunn_manifold.sketching.factored_tensor import as_plain, factors_at

__all__ = ["Geometry"]


class Geometry(Manifold):
    r""":math:`\{X : X^H X = I\}` with the metric :math:`\mathrm{Re}\,\mathrm{tr}\,u^H (2I - XX^H) v`."""

    ndim = 2

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Tell those who know the weights of a conversion of the module that holds this manifold."""
        for function in before_conversions:
            function(self, fn)
        return super()._apply(fn, recurse)

    # -- checks -------------------------------------------------------------------------------------

    def _check_shape(self, shape: Any, name: str) -> tuple[bool, str | None]:
        problem = validation.shape_problem(shape, name)
        return problem is None, problem

    def check_point(self, x: Tensor, *, explain: bool = False) -> Any:
        """Return whether x has a point's shape and dtype (its values are not checked)."""
        problem = validation.shape_problem(x.shape, "x") or validation.dtype_problem(x.dtype, "x")
        return (problem is None, problem) if explain else problem is None

    def assert_check_point(self, x: Tensor) -> None:
        """Raise ValueError (shape) or TypeError (dtype) unless x can be a point."""
        validation.check_point(x)

    @in_full_precision
    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> tuple[bool, str | None]:
        gram = dense.adjoint_times(x, x)
        eye = dense.columns_of_identity(*gram.shape, dtype=x.dtype, device=x.device)
        if torch.allclose(gram, eye, atol=atol, rtol=rtol):
            return True, None
        return False, f"`X^H X != I` with atol={atol}, rtol={rtol}"

    @in_full_precision
    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        normal = dense.sym(dense.adjoint_times(x, as_plain(u)))
        if torch.allclose(normal, torch.zeros_like(normal), atol=atol, rtol=rtol):
            return True, None
        return False, f"`X^H u + u^H X != 0` with atol={atol}, rtol={rtol}"

    # -- tangent vectors ------------------------------------------------------------------------------

    @in_full_precision
    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        r"""Orthogonal projection on the tangent space at x: :math:`u - X\,\mathrm{sym}(X^H u)`; :math:`O(n m^2)`."""
        self._accept(x, u, "u")
        if factors_at(x, u) is not None:
            return u
        u = as_plain(u)
        return u - x @ dense.sym(dense.adjoint_times(x, u))

    @in_full_precision
    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        r"""Inner product :math:`\mathrm{Re}\,\mathrm{tr}\,u^H(2I - XX^H)v`, real, ``(*batch,)`` or ``(*batch, 1, 1)``.

        Cost: :math:`O(k n)` for a factored u alone, one read of u and v on square X, :math:`O(n m^2)` on tall X.
        """
        self._accept(x, u, "u")
        factors = factors_at(x, u) if v is None or v is u else None
        if factors is not None:
            value = torch.as_tensor(factors.squared_norm(), dtype=x.real.dtype, device=x.device)
        else:
            u = as_plain(u)
            v = u if v is None else as_plain(v)
            x, u, v = validation.broadcast(x, u, v)
            value = dense.frobenius_inner(u, v)
            if x.shape[-2] != x.shape[-1]:
                value = 2 * value - dense.frobenius_inner(dense.adjoint_times(x, u), dense.adjoint_times(x, v))
        return value[..., None, None] if keepdim else value

    @outside_graphs
    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Return ``inner`` with ``keepdim``: one number for each matrix, Adam's second moment."""
        return self.inner(x, u, v, keepdim=True)

    @in_full_precision
    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        r"""Transport v from x to any y by a unitary g with g X = Y: :math:`Y X^H v` on square X.

        On tall X, g maps range(X) to range(Y) by :math:`Y X^H` and its complement by the closest unitary
        to the projection.  An isometry; :math:`O(n m^2)`, for when the move that led to y is not known.
        """
        self._accept(x, y, "y")
        self._accept(x, v, "v")
        v = as_plain(v)
        if x.shape[-2] == x.shape[-1]:
            return y @ dense.adjoint_times(x, v)
        x, y, v = (t.contiguous() for t in validation.broadcast(x, y, v))
        return LowRankMove.between(x, y).transport(v)

    # -- geodesic distance ----------------------------------------------------------------------------

    @in_full_precision
    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        r"""Geodesic distance on square X: the norm of the rotation angles of :math:`X^H Y`; :math:`O(n^3)`.

        Raises
        ------
        ValueError
            Orthogonal matrices of different determinant: no geodesic joins them.
        NotImplementedError
            Tall X, where no closed form is known.
        """
        angles = dense.rotation_angles(self._quotient(x, y))
        distance: Tensor = torch.linalg.vector_norm(angles, dim=-1).to(x.real)
        return distance[..., None, None] if keepdim else distance

    @in_full_precision
    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Tangent :math:`X \log(X^H Y)` with ``expmap(x, logmap(x, y)) = y`` at full rank; square X, :math:`O(n^3)`.

        Raises
        ------
        ValueError
            As in :meth:`dist`; also at a rotation angle of π, where the shortest path is not unique.
        NotImplementedError
            Tall X.
        """
        w = self._quotient(x, y)
        rounding = 2 * dense.tolerance(x.dtype, x.shape[-1])
        if (math.pi - dense.rotation_angles(w).abs() < rounding).any():
            raise ValueError("x and y are a rotation by π apart: the shortest geodesic between them is not unique")
        return x @ dense.log_unitary(w).to(x)

    # -- points ---------------------------------------------------------------------------------------

    @in_full_precision
    def projx(self, x: Tensor) -> Tensor:
        r"""Closest point of the manifold (polar factor), exact.

        x itself is returned, after :math:`O(n m)` work, if it is on the manifold to working precision,
        :math:`\|X^H X - I\|_F/\sqrt m` within :func:`~projunn_manifold.linalg.dense.tolerance`, as estimated by a few
        fixed random probes z of :math:`X^H X z - z` (an error in one column alone may be underestimated by up to a
        factor of ten).  Otherwise the matrices of a batch that are not, and only
        these, are replaced: by a Newton-Schulz step (three matrix products) where that is exact, else
        through an SVD.

        Raises
        ------
        ValueError
            A point with non-finite entries.
        """
        validation.check_point(x)
        error = dense.probed_unitarity_error(x)
        off = error > dense.tolerance(x.dtype, x.shape[-2])
        if not off.any():
            return x
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise ValueError(f"cannot project a point with {bad} non-finite entries, shape {tuple(x.shape)}")
        # ‖X^H X - I‖₂ is at most the Frobenius norm that the probes estimate; a factor of two for their spread
        near = 2 * error.amax() * math.sqrt(x.shape[-1]) < math.sqrt(torch.finfo(x.dtype).eps)
        project = dense.newton_schulz if near else dense.polar
        if x.dim() == 2:
            return project(x).contiguous()
        y = x.clone(memory_format=torch.contiguous_format)
        y[off] = project(x[off])
        return y

    def random(
        self,
        *size: Any,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> ManifoldTensor:
        """Haar-distributed points of shape ``size``, from torch's default generator unless one is given."""
        shape = self._accept_size(size, dtype)
        return ManifoldTensor(dense.haar(*shape, dtype=dtype, device=device, generator=generator), manifold=self)

    def origin(
        self,
        *size: Any,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> ManifoldTensor:
        """Identity matrices (first columns of the identity on tall shapes); ``seed`` is ignored, nothing is drawn."""
        shape = self._accept_size(size, dtype)
        return ManifoldTensor(dense.columns_of_identity(*shape, dtype=dtype, device=device), manifold=self)

    # -- sharded parameters -----------------------------------------------------------------------------

    @abstractmethod
    def check_shard(self, name: str, p: Any) -> None:
        """Raise unless steps can be made on a sharded parameter; all processes that share it ask together.

        Raises
        ------
        NotImplementedError
            Columns in shards; full-rank moves (k=None, or 2k >= m) and samplers that need the whole gradient, for a
            matrix whose rows are sharded.
        ValueError, TypeError
            A shape or dtype that no point has; seeds or counts of gradients that differ between processes.
        """

    @abstractmethod
    def adopt_shard(self, p: Any) -> None:
        """Take a sharded parameter that has been checked."""

    # -- internals ------------------------------------------------------------------------------------

    def _accept(self, x: Tensor, u: Tensor, name: str) -> None:
        validation.check_point(x)
        validation.check_same_matrix(x, u, name)

    def _accept_size(self, size: tuple[Any, ...], dtype: torch.dtype | None) -> tuple[int, ...]:
        shape: tuple[int, ...] = size2shape(*size)
        problem = validation.shape_problem(shape, "size")
        if problem:
            raise ValueError(problem)
        validation.check_dtype(dtype or torch.get_default_dtype(), "dtype")
        return shape

    def _quotient(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``X^H Y`` in double precision, after checking that a geodesic joins the points."""
        self._accept(x, y, "y")
        if x.shape[-2] != x.shape[-1]:
            raise NotImplementedError(
                f"dist and logmap are known in closed form for square matrices only, got shape {tuple(x.shape)}"
            )
        w = dense.in_double(x).mH @ dense.in_double(y)
        if not w.is_complex() and (torch.linalg.det(w) < 0).any():
            raise ValueError("the determinants of x and y differ in sign: no geodesic joins the two components of O(n)")
        return w
