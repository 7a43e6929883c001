r"""The manifold of unitary, orthogonal and orthonormal-column matrices with rank-k moves, for geoopt.

This module translates: geoopt's names and contract on one side, samplers, tangents and moves on the
other.  A gradient becomes rank-k factors (:mod:`~projunn_manifold.sampling`), the factors a tangent
(:mod:`~projunn_manifold.tangents`), and the tangent a move
(:mod:`~projunn_manifold.moves`).  Between ``egrad2rgrad`` and ``retr`` the tangent travels through geoopt's
unmodified optimisers as a :class:`~projunn_manifold.factors.FactoredTensor`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from projunn_manifold import drift, linalg, passes, rows, sampling, validation
from projunn_manifold.factors import FactoredTensor, LowRank, Scalar
from projunn_manifold.frame import Frame, Step
from projunn_manifold.geometry import Geometry, plain
from projunn_manifold.graphs import outside_graphs
from projunn_manifold.linalg import in_full_precision
from projunn_manifold.moves import Move
from projunn_manifold.state import Faults, State
from projunn_manifold.tangents import Tangent, only_where, tangent_of_gradient

__all__ = ["UnitaryLowRank", "UnitaryLowRankExact"]

# Products with u^H u when a dense tangent is reduced: Adam at small k needs half the steps it needs with none.
_POWER = 2

_SKETCH, _MOVE = 0, 1  # purposes of random numbers


class UnitaryLowRank(Geometry):
    r"""Matrices with orthonormal columns, :math:`\{X : X^H X = I\}`, moved by rank-k updates (projUNN).

    Square X is unitary U(n) or orthogonal O(n), tall X a point of the Stiefel manifold, real or complex,
    with any leading batch dimensions.  ``retr`` is projUNN-D, the closest unitary to X + u; ``expmap`` is
    projUNN-T, the geodesic.  Both use the rank-k part of what an optimiser hands them and cost
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
        step.  Both times k, and times two if complex, as rounding has that times the variance.  It puts back what
        rounding takes off the manifold (:mod:`projunn_manifold.drift`), up to 32 columns at a time in an optimiser's
        move, at the cost of at most :math:`4 k n^2` operations per step.
        None: no correction.
    non_finite : {"raise", "skip"}
        What becomes of a matrix whose gradient or step is not finite (NaN, infinity, or a square beyond the range
        of its dtype).  ``"raise"``: ValueError, with point and state as they were; on CUDA, where that would wait for
        the device, and with ``"skip"`` everywhere: zero is taken for it, and it is counted (:meth:`check`).

    Raises
    ------
    TypeError, ValueError
        k or sweep not an int or below 1, unknown sampler or ``non_finite``.

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
    __scaling__ = Geometry.__scaling__.copy()

    def __init__(
        self,
        k: int | None = 1,
        *,
        sampler: str | sampling.Sampler = "lsi",
        seed: int = 0,
        sweep: int | None = 256,
        non_finite: str = "raise",
    ) -> None:
        super().__init__()
        if non_finite not in ("raise", "skip"):
            raise ValueError(f"non_finite must be 'raise' or 'skip', got {non_finite!r}")
        self.k = validation.check_count(k, "k", "full rank")
        self._drift = drift.Schedule(validation.check_count(sweep, "sweep", "no drift correction"))
        self._seed = validation.check_seed(seed)
        self.non_finite = non_finite
        self.sampler = sampling.resolve_sampler(sampler)
        self._sampler_name = sampler if isinstance(sampler, str) else getattr(sampler, "__name__", repr(sampler))
        self._state = State(self._seed)

    @property
    def seed(self) -> int:
        """Seed of the sketches."""
        return self._seed

    @property
    def sweep(self) -> int | None:
        """Steps in which the drift correction visits every column once."""
        return self._drift.sweep

    def extra_repr(self) -> str:
        """Return the rank and the path it takes, as geoopt prints it."""
        if self.k is None:
            return "k=None, dense"
        return f"k={self.k}, sampler={self._sampler_name}, dense where 2k >= m"

    # -- state --------------------------------------------------------------------------------------

    def check(self) -> Faults:
        """Return how many matrices were skipped and how many columns left uncorrected since the last call.

        Skipped are matrices with a gradient or step that was not finite (``non_finite="skip"``, or CUDA); left are
        columns too far off the manifold for the drift correction, which CPU also warns of.  Waits for the device.
        """
        faults = self._state.faults()
        self._state.forget_faults()
        return faults

    def know_shard(self, p: Any) -> None:
        """Know a sharded parameter; all processes of its mesh do so together.

        Raises
        ------
        ValueError
            Seeds or counts of gradients that differ between processes.
        """
        for dim in range(p.device_mesh.ndim):
            group = p.device_mesh.get_group(dim)
            rows.agreement(group, torch.device(p.device_mesh.device_type), True, *self.stamp)
        self._state.share(rows.local(p))

    @property
    def stamp(self) -> tuple[int, int]:
        """Seed and count of gradients, from which all draws follow, as two numbers."""
        return self._state.stamp

    def get_extra_state(self) -> Tensor:  # (32,) uint8
        """Return the state of sketches, drift correction and faults, for ``state_dict``; waits for the device."""
        return self._state.packed()

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the state from a ``state_dict``."""
        self._state.unpack(state)

    # -- gradients and tangent vectors --------------------------------------------------------------

    @outside_graphs
    @in_full_precision
    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        r"""Riemannian gradient of the rank-k part of the Euclidean gradient u: :math:`\tfrac12(G_k - X G_k^H X)`.

        Cost: two products of u and two of X with k to 2k columns.  Under ``torch.no_grad()``, as in
        geoopt's optimisers, the result is a :class:`~projunn_manifold.factors.FactoredTensor`; with
        gradients enabled it is a plain dense tensor.

        Raises
        ------
        ValueError
            A gradient of another shape or device; on CPU, a gradient with non-finite entries.
        """
        self._accept(x, u, "gradient")
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
        Cost: 4 passes over X for a factored u; for a dense one also one over X and four over u.
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
        no matrix of x's size is allocated.  ``lr`` is a number, or a tensor ``(*batch,)`` with one for each matrix.
        Raises what ``egrad2rgrad`` and ``retr`` raise, ValueError for a gradient of another shape, and TypeError
        for a gradient that is None or a ``lr`` that is no number; x is then as it was.

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
        self, x: Tensor, move: Tensor, residual: Tensor | None = None, averaging: sampling.Averaging | None = None
    ) -> Tensor:
        r"""Move x in place by the rank-k part of any matrix, not necessarily tangent: the paper's step; return x.

        With factors :math:`a b^H` of the move, sketched as gradients are, x becomes :func:`~projunn_manifold.projunn_d`
        (X, a, b), the closest unitary to :math:`X + a b^H`; on :class:`UnitaryLowRankExact`
        :func:`~projunn_manifold.projunn_t`.  A move of zeros is no step: nothing is drawn or counted.

        ``residual``, of x's shape, feeds back what earlier steps left out: it is added to the move, and in its place
        comes what this step leaves out, carried to the new point by the unitary g of the step,
        :math:`R \leftarrow g\,(M + R - a b^H)`.  Cost: about 9 passes more.

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
        here = rows.local(move)
        if linalg.readable(x):
            moves = bool(here.any())
            moves = not rows.agreed(x, not moves) if averaging is None else averaging.anywhere(moves)
            if not moves:
                return x
        idle = None
        if residual is not None:
            if x.dim() > 2 or not linalg.readable(x):  # matrices of a batch whose move is zero
                idle = rows.summed(x, (here != 0).flatten(-2).any(-1).int()) == 0
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

    # -- drift ----------------------------------------------------------------------------------------

    @outside_graphs
    @in_full_precision
    @torch.no_grad()
    def correct_(self, x: Tensor) -> Tensor:
        """Make one step's share of the drift correction (``sweep``) on x, in place, and return x.

        Optimisers and :meth:`step_` do it by themselves; this is for points moved by other means, such as
        :func:`~projunn_manifold.projunn_d_`: call it after each move.
        """
        validation.check_point(x)
        validation.check_writable(x, "x")
        self._state.count_gradient(x)
        self._correct_(x)
        return x

    # -- internals --------------------------------------------------------------------------------------

    def is_dense(self, x: Tensor) -> bool:
        """Tell whether moves of x use the whole gradient: k is None, or 2k >= m."""
        return self.k is None or 2 * self.k >= x.shape[-1]

    def _gradient(self, x: Tensor, u: Tensor) -> Tangent:
        """Riemannian gradient of the rank-k part of the Euclidean gradient u."""
        given = u.factors if isinstance(u, FactoredTensor) else None
        x, u = validation.broadcast(x, u)
        tangent = tangent_of_gradient(x, self._sketch(x, given if isinstance(given, LowRank) else plain(u)))
        return self._finite(x, tangent, torch.finfo(x.dtype).max, u, "gradient")

    def _dense_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        tangent = (g - x @ linalg.adjoint_times(g, x)) / 2
        kept = self._kept(x, linalg.squared_norm(tangent), torch.finfo(x.dtype).max, g, "gradient")
        return tangent if kept is None else torch.where(kept[..., None, None], tangent, 0)

    def _finite(self, x: Tensor, tangent: Tangent, limit: float, u: Tensor | Tangent, what: str) -> Tangent:
        """Return the tangent made from u; not, see ``_kept``, where its squared norm is beyond the limit."""
        kept = self._kept(x, tangent.squared_norm(), limit, u, what)
        return tangent if kept is None else only_where(kept, tangent)

    def _kept(self, x: Tensor, sizes: Scalar, limit: float, u: Tensor | Tangent, what: str) -> Tensor | None:
        """Return None if all sizes are within the limit, or unknown; otherwise raise, or count and tell which are."""
        if linalg.traced():
            return None
        if linalg.readable(x):
            within = _largest(sizes) <= limit
            if rows.agreed(x, within, *self.stamp):
                return None
            healthy = bool(torch.isfinite(rows.local(x)).all())
            if not rows.agreed(x, healthy):
                raise validation.non_finite(x, "point" if not healthy else "point of another process")
            if self.non_finite == "raise" and within:
                raise ValueError(f"{what} of another process is not finite; no process has moved")
            if self.non_finite == "raise":
                raise validation.non_finite(plain(u if isinstance(u, Tensor) else FactoredTensor(u)), what)
        kept = torch.as_tensor(sizes, device=x.device) <= limit
        self._state.count_faults(x.device, skipped=(~kept).sum())
        return kept

    def _correct_(self, x: Tensor) -> None:
        """Correct the block of columns that is due, if any."""
        rate = (self.k or x.shape[-1]) * (2 if x.is_complex() else 1)
        start = self._drift.first_due_column(self._state.turn(), x.shape[-1], rate)
        if start is None or not x.numel() or linalg.traced():
            return
        left = drift.correct_columns_(x, start)
        if linalg.readable(x) and not left:
            return
        self._state.count_faults(x.device, uncorrected=left)
        if linalg.readable(x):
            warnings.warn(
                f"a point of shape {tuple(x.shape)} is off the manifold: columns overlap by more than {drift.FAR}, too "
                "far for the drift correction; put it back first, by manifold.projx",
                RuntimeWarning,
                stacklevel=3,
            )

    def _sketch(self, x: Tensor, u: Tensor | LowRank, averaging: sampling.Averaging | None = None) -> LowRank:
        """Rank-k factors of the gradient, or of its mean over processes."""
        assert self.k is not None
        if isinstance(u, LowRank) and u.rank <= self.k:
            return u
        gradient = u if isinstance(u, LowRank) else sampling.without_normal_part(u, x, self.k)
        return self.sketch(x, gradient if averaging is None else averaging.gradient(gradient))

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

    def _left_out(self, x: Tensor, move: Tensor, factors: LowRank, averaging: sampling.Averaging | None) -> Tensor:
        """Return what the factors leave out of a move; if they are of the mean of many, what a leaves out of this."""
        if averaging is None:
            return passes.plus_product(move, -factors.a, factors.b)
        if self.is_dense(x):
            return torch.zeros_like(move)
        return passes.plus_product(move, -factors.a, passes.adjoint_times(move, factors.a))

    @in_full_precision
    def sketch(self, x: Tensor, gradient: sampling.Gradient, ahead: int = 0) -> LowRank:
        """Return the factors that a step at x would make of a gradient, which is known by its products.

        It is the step after as many others of this manifold's as ``ahead`` says.
        """
        assert self.k is not None
        try:
            factors = self.sampler(gradient, self.k, self._state.generator(x.device, _SKETCH, ahead))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            dense = gradient.dense()
            if (linalg.squared_norm(dense) <= torch.finfo(x.dtype).max).all():
                raise validation.not_converged(dense) from None
            nothing = (x.new_full((*gradient.shape[:-2], side, 1), torch.nan) for side in gradient.shape[-2:])
            return LowRank(*nothing)  # to be refused like any gradient that is not finite
        return validation.check_sample(factors, gradient.shape, x, self.k)

    def _reduced(self, x: Tensor, u: Tensor) -> Tangent:
        """Return u as a tangent of rank at most 2k (all of u where 2k >= m)."""
        self._accept(x, u, "u")
        factors = self._factors_at(x, u)
        if factors is not None:
            return factors
        x, u = validation.broadcast(x, plain(u))
        if self.k is None or self.is_dense(x):
            return Frame.of_dense(x, u, None)
        size, generator = (x.shape[-1], 2 * self.k), self._state.generator(x.device, _MOVE)
        test = torch.randn(size, dtype=x.dtype, device=x.device, generator=generator)
        basis = test.expand(*x.shape[:-2], *size)
        for _ in range(_POWER):
            basis = sampling.orthonormal(passes.unit_image(u, basis)[1])
        return Frame.of_dense(x, u, basis)

    def _bounded(self, x: Tensor, tangent: Tangent, u: Tensor | None = None) -> Tangent:
        """Return the tangent (of u), or refuse one that is not finite or beyond all rounding."""
        limit = 2 * x.shape[-1] / torch.finfo(x.dtype).eps ** 2
        return self._finite(x, tangent, limit, tangent if u is None else u, "step")

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


def _largest(numbers: float | Tensor) -> float:
    if isinstance(numbers, Tensor):
        return numbers.max().item() if numbers.numel() else 0.0
    return numbers
