r"""The manifold of unitary, orthogonal and orthonormal-column matrices with rank-k moves, for geoopt.

This module translates: geoopt's names and contract on one side, sketches, tangents and moves on the
other.  A gradient becomes rank-k factors (:mod:`~projunn_manifold.sketches`), the factors a tangent
(:mod:`~projunn_manifold.tangents`), and the tangent a move
(:mod:`~projunn_manifold.moves`).  Between ``egrad2rgrad`` and ``retr`` the tangent travels through geoopt's
unmodified optimisers as a :class:`~projunn_manifold.factors.FactoredTensor`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from projunn_manifold import linalg, passes, rows, validation
from projunn_manifold.factors import FactoredTensor, LowRank
from projunn_manifold.frame import Frame, Step
from projunn_manifold.geometry import plain
from projunn_manifold.gradients import Averaging
from projunn_manifold.graphs import outside_graphs
from projunn_manifold.linalg import in_full_precision
from projunn_manifold.moves import Move
from projunn_manifold.sketches import Sketches
from projunn_manifold.tangents import Tangent, tangent_of_gradient

__all__ = ["UnitaryLowRank", "UnitaryLowRankExact"]


class UnitaryLowRank(Sketches):
    r"""Matrices with orthonormal columns, :math:`\{X : X^H X = I\}`, moved by rank-k updates (projUNN).

    Square X is unitary U(n) or orthogonal O(n), tall X a point of the Stiefel manifold, real or complex,
    with any leading batch dimensions.  ``retr`` is projUNN-D, the closest unitary to X + u; ``expmap`` is
    projUNN-T, the geodesic.  Both use a part of rank at most 2k of what an optimiser hands them and cost
    :math:`O(k n^2)`; nothing of side n is factorised.

    The metric is :math:`\langle u, v\rangle_X = \mathrm{Re}\,\mathrm{tr}\,u^H (2I - XX^H) v`: the Frobenius inner
    product on square X, twice the canonical one on tall X.  Its gradient is :math:`\tfrac12(G - X G^H X)`,
    half of what geoopt's canonical Stiefel uses: at equal learning rate that one steps (at least) twice as far.

    Parameters
    ----------
    k : int or None
        Rank of a gradient's sketch; a move has rank at most 2k.  None: full rank, dense and exact, in
        :math:`O(n^3)`; so is every matrix of m <= 2k columns, where a sketch would save nothing.
    sampler : str or callable
        How a gradient becomes rank-k factors: ``"lsi"`` (default), ``"column"``, ``"subspace"``, ``"svd"`` or
        a callable ``(gradient, k, generator) -> LowRank``; see :mod:`projunn_manifold.sampling`.
    seed : int
        Seed of the manifold's own generator, from which the sketches draw.  The global generator is
        never touched; replicas with equal seeds draw equal sketches.
    sweep : int or None
        Steps in which the drift correction visits every column once, on average; never more than one column per
        step.  Visits are k times as frequent (2k times if complex), because rounding has that times the variance.  The
        correction puts back what rounding takes off the manifold (:mod:`projunn_manifold.drift`), up to 32 columns at a
        time in an optimiser's move, at the cost of at most :math:`4 k n^2` operations per step.  None: no correction.
    non_finite : {"raise", "skip"}
        What becomes of a matrix whose gradient or step is not finite (NaN, infinity, or a square beyond the range
        of its dtype).  ``"raise"``: ValueError, with point and state as they were; on CUDA, where that would wait for
        the device, and with ``"skip"`` everywhere: zero is taken for it, and it is counted (:meth:`check`).

    Raises
    ------
    TypeError, ValueError
        k or sweep not an int or below 1, unknown sampler or ``non_finite``.  In every method: a point that is not
        ``(*batch, n, m)``, n >= m, in float32, float64, complex64 or complex128; a vector of another matrix shape,
        dtype or device.  In every move, on CPU: a vector that is not finite, or longer than
        :math:`\sqrt{2m}/\epsilon`, of which rounding would leave nothing.

    References
    ----------
    Kiani, Balestriero, LeCun, Lloyd, *projUNN: efficient method for training deep networks with unitary
    matrices*, NeurIPS 2022, Theorems 4.2 and 4.4.

    Examples
    --------
    >>> import geoopt, torch
    >>> from projunn_manifold import UnitaryLowRank
    >>> manifold = UnitaryLowRank(k=1)
    >>> w = geoopt.ManifoldParameter(manifold.random(64, 64), manifold=manifold)
    >>> optimizer = geoopt.optim.RiemannianSGD([w], lr=0.1)
    >>> (w - torch.eye(64)).square().sum().backward()
    >>> optimizer.step()
    >>> manifold.check_point_on_manifold(w.detach())
    True
    """

    name = "UnitaryLowRank"
    reversible = False  # the polar retraction of a truncated tangent is not

    # -- gradients and tangent vectors --------------------------------------------------------------

    @outside_graphs
    @in_full_precision
    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        r"""Riemannian gradient of the rank-k part of the Euclidean gradient u: :math:`\tfrac12(G_k - X G_k^H X)`.

        Cost: two products of u and two of X (four on tall X) with k to 2k columns.  Under ``torch.no_grad()``, as in
        geoopt's optimisers, the result is a :class:`~projunn_manifold.factors.FactoredTensor`; with
        gradients enabled it is a plain dense tensor.

        Raises
        ------
        ValueError
            A gradient of another shape or device; on CPU, a gradient with non-finite entries.
        """
        self._accept(x, u, "gradient")
        self._look(x)
        if self.is_dense(x):
            gradient = self._dense_gradient(x, plain(u))
            self._state.count_gradient(x)
            return gradient
        tangent = self._gradient(x, u)
        self._state.count_gradient(x)
        if torch.is_grad_enabled():
            left, right = tangent.outer()
            return left @ right.mH
        return FactoredTensor(tangent)

    # -- moves --------------------------------------------------------------------------------------

    @outside_graphs
    @in_full_precision
    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        r"""projUNN-D: the polar factor of X + u, :math:`(X+u)(I + u^H u)^{-1/2}`, for the rank-2k part of u.

        A tangent of higher rank (momentum, Adam), or a vector that is not tangent, is first reduced to
        the tangent :math:`X Q\,\mathrm{skew}(Q^H X^H u Q)\,Q^H + (I - XX^H) u Q Q^H`, Q an orthonormal basis of
        2k columns sketched from u; a tangent of rank at most 2k stays as it is.  The sketch is the same for
        equal u until the next gradient is drawn, so that ``retr`` and ``transp_follow_retr`` agree.
        On square X every rotation angle θ of the geodesic becomes arctan θ: a retraction of second order.
        Under ``torch.no_grad()`` the block of columns that is due is put back, too (``sweep``).
        Cost on square X, with compiled loops (without): 2 (4) reads or writes of X for a factored u; for a dense one 4
        (6) more, most of them of u, and on tall X 8 (10) more.
        """
        return self._arrive(self._retraction(x, u), x)

    @outside_graphs
    @in_full_precision
    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        r"""projUNN-T: the geodesic :math:`\exp(A) X`, A skew-Hermitian with A X = u; u reduced as in ``retr``."""
        return self._arrive(self._geodesic(x, u), x)

    @outside_graphs
    @torch.no_grad()
    @in_full_precision
    def step_(self, x: Tensor, grad: Tensor, lr: float | Tensor) -> Tensor:
        r"""One step of steepest descent, in place: x becomes ``retr(x, -lr egrad2rgrad(x, grad))`` and is returned.

        The fastest way to move: one read of the gradient (k = 1), one of x, and one pass of x that writes it;
        no matrix of x's size is allocated (where 2k >= m, or k is None, four).  ``lr`` is a number, or a tensor
        ``(*batch,)`` with one for each matrix.  Raises what ``egrad2rgrad`` and ``retr`` raise, ValueError for a
        gradient of another shape, and TypeError for a gradient that is None or a ``lr`` that is no number; x is then as
        it was.

        Examples
        --------
        >>> import torch
        >>> from projunn_manifold import UnitaryLowRank
        >>> manifold = UnitaryLowRank(k=1)
        >>> x, g = manifold.random(64, 64), torch.randn(64, 64)
        >>> x = manifold.step_(x, g, lr=0.1)
        """
        self._accept_in_place(x, grad, "gradient")
        validation.check_rate(lr, "lr", x)
        self._look(x)
        if self.is_dense(x):
            tangent: Tangent = Frame.of_dense(x, self._dense_gradient(x, plain(grad)), None)
        else:
            tangent = self._gradient(x, grad)
        move = self._along(self._bounded(x, tangent.scaled(-lr)))
        self._state.count_gradient(x)
        move.apply_(x)
        self._correct_(x)
        return x

    @outside_graphs
    @in_full_precision
    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Move along ``retr`` and carry v by the same group element g (see :meth:`transp_follow_retr`)."""
        move = self._retraction(x, u)
        return self._arrive(move, x), self._carry(move, x, v)

    @outside_graphs
    @torch.no_grad()
    @in_full_precision
    def retr_transp_(self, x: Tensor, u: Tensor, *vectors: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Move x along ``retr`` by ``scale`` times u and carry the vectors with it, all in place; return x.

        ``scale`` is a real number, or a tensor ``(*batch,)`` with one for each matrix.  Raises what ``retr``
        raises; x and the vectors are then as they were.
        """
        self._accept_in_place(x, u, "u")
        validation.check_rate(scale, "scale", x)
        for v in vectors:
            self._accept_in_place(x, v, "v")
            validation.check_writable(v, "v")
        move = self._along(self._bounded(x, self._reduced(x, u).scaled(scale), u))
        move.apply_(x)
        for v in vectors:
            move.carry_(v)
        self._correct_(x)
        return x

    @outside_graphs
    @in_full_precision
    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Move along ``expmap`` and carry v by the same group element g (see :meth:`transp_follow_expmap`)."""
        move = self._geodesic(x, u)
        return self._arrive(move, x), self._carry(move, x, v)

    @outside_graphs
    @in_full_precision
    def transp_follow_retr(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        r"""Carry v along ``retr(x, u)``: g v, with :math:`g = I + W\Gamma W^H` unitary and g X = Y.

        Left translation, not parallel transport: an isometry onto the tangent space at Y, at the cost
        of two products of v with at most 2k (tall X: 4k) columns.
        """
        return self._carry(self._retraction(x, u), x, v)

    @outside_graphs
    @in_full_precision
    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Carry v along ``expmap(x, u)``: exp(A) v, left translation by the geodesic's own one-parameter group."""
        return self._carry(self._geodesic(x, u), x, v)

    @outside_graphs
    @in_full_precision
    @torch.no_grad()
    def step_raw_(
        self, x: Tensor, move: Tensor, residual: Tensor | None = None, averaging: Averaging | None = None
    ) -> Tensor:
        r"""Move x in place by the rank-k part of any matrix, not necessarily tangent: the paper's step; return x.

        With factors :math:`a b^H` of the move, sketched as gradients are, x becomes :func:`~projunn_manifold.projunn_d`
        (X, a, b), the closest unitary to :math:`X + a b^H`; on :class:`UnitaryLowRankExact`
        :func:`~projunn_manifold.projunn_t`.  A move of zeros is no step: nothing is drawn or counted.

        ``residual``, of x's shape, feeds back what earlier steps left out: it is added to the move, and in its place
        comes what this step leaves out, carried to the new point by the unitary g of the step,
        :math:`R \leftarrow g\,(M + R - a b^H)`.  Cost: 10 to 12 passes more.

        ``averaging`` makes the step of the mean of all processes' moves.  Each keeps what a leaves out of its own,
        :math:`M_r + R_r - a a^H (M_r + R_r)`, so that the mean of the residuals is the residual of the mean.

        Raises
        ------
        ValueError
            On CPU, a move that is not finite, or, for projUNN-D, :math:`X + a b^H` singular; x is then as it was.
        """
        self._accept_in_place(x, move, "move")
        if residual is not None:
            self._accept_in_place(x, residual, "residual")
            validation.check_writable(residual, "residual")
        self._look(x)
        here = rows.local(move)
        if linalg.readable(x):
            moves = bool(here.any())
            moves = not rows.agreed(x, not moves) if averaging is None else averaging.anywhere(moves)
            if not moves:
                return x
        idle = None
        if residual is not None:
            if x.dim() > 2 or not linalg.readable(x):  # matrices of a batch whose move is zero, in all processes
                moving = (here != 0).flatten(-2).any(-1).to(x.real.dtype)
                idle = (rows.summed(x, moving) if averaging is None else averaging.mean(moving)) == 0
            move = move + residual
        if self.is_dense(x):
            q = linalg.columns_of_identity(*x.shape[:-2], x.shape[-1], x.shape[-1], dtype=x.dtype, device=x.device)
            factors = LowRank(move if averaging is None else averaging.mean(move.clone()), q)
        else:
            factors = self._sketch(x, move, averaging)
        sizes = linalg.squared_norm(factors.b) * linalg.squared_norm(factors.a)
        kept = self._kept(x, sizes, torch.finfo(x.dtype).max, move, "move")
        if idle is not None:
            kept = ~idle if kept is None else kept & ~idle
        if kept is not None:
            factors = LowRank(*(torch.where(kept[..., None, None], t, 0) for t in factors))
        step = self._agreed_raw_move(x, factors)
        step.apply_(x)
        if residual is not None:
            rest = self._left_out(x, move, factors, averaging)
            if kept is not None:
                here = rows.local(rest)
                here.copy_(torch.where(kept[..., None, None], here, rows.local(residual)))
            residual.copy_(step.carry_(rest))
        self._state.count_gradient(x)
        self._correct_(x)
        return x

    # -- internals --------------------------------------------------------------------------------------

    def _agreed_raw_move(self, x: Tensor, factors: LowRank) -> Move:
        """Return the move along any factors; if it fails for one process's matrices, it does for all."""
        try:
            step, failure = self._raw_move(x, factors), None
        except ValueError as error:
            failure = error
        moves = failure is None
        if not (rows.agreed(x, moves) if linalg.readable(x) else moves):
            raise failure or ValueError("the move of another process is singular; no process has moved")
        return step

    def _left_out(self, x: Tensor, move: Tensor, factors: LowRank, averaging: Averaging | None) -> Tensor:
        """Return what the factors leave out of a move; if they are of the mean of many, what a leaves out of this."""
        if averaging is None:
            return passes.plus_product(move, -factors.a, factors.b)
        if self.is_dense(x):
            return torch.zeros_like(move)
        return passes.plus_product(move, -factors.a, passes.adjoint_times(move, factors.a))

    def _along(self, tangent: Tangent) -> Move:
        """Return the move that this manifold's optimisers make."""
        return tangent.retraction()

    def _raw_move(self, x: Tensor, factors: LowRank) -> Move:
        """Return the move along any factors, tangent or not."""
        return Step.of_factors(x, factors).raw_retraction()

    def _retraction(self, x: Tensor, u: Tensor) -> Move:
        return self._bounded(x, self._reduced(x, u), u).retraction()

    def _geodesic(self, x: Tensor, u: Tensor) -> Move:
        return self._bounded(x, self._reduced(x, u), u).geodesic()

    def _arrive(self, move: Move, x: Tensor) -> Tensor:
        """Return the moved point; in an optimiser's step, with a block of columns put back where that is due."""
        y = move.apply(x)
        if not torch.is_grad_enabled():
            self._correct_(y)
        return y

    def _carry(self, move: Move, x: Tensor, v: Tensor) -> Tensor:
        self._accept(x, v, "v")
        return move.carry(plain(v))


class UnitaryLowRankExact(UnitaryLowRank):
    """:class:`UnitaryLowRank` whose optimisers move along ``expmap`` (projUNN-T), geoopt's "Exact" convention.

    geoopt's optimisers call ``retr`` and ``retr_transp`` only; here these are the geodesic ones.
    """

    name = "UnitaryLowRankExact"

    retr = UnitaryLowRank.expmap
    retr_transp = UnitaryLowRank.expmap_transp
    transp_follow_retr = UnitaryLowRank.transp_follow_expmap

    def _along(self, tangent: Tangent) -> Move:
        return tangent.geodesic()

    def _raw_move(self, x: Tensor, factors: LowRank) -> Move:
        return tangent_of_gradient(x, factors).geodesic()

    @property
    def reversible(self) -> bool:  # type: ignore[override]  # geoopt declares a plain attribute
        """Whether moving on and back returns to the start; the geodesic does, unless k truncates it."""
        return self.k is None
