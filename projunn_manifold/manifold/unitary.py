r"""The manifold of unitary, orthogonal and orthonormal-column matrices with rank-k moves, for geoopt.

A step of geoopt's ``RiemannianSGD`` from top to bottom:

1. ``egrad2rgrad``: the sketcher (:mod:`~projunn_manifold.manifold.sketcher`) makes a tangent of the gradient, in one
   call of the compiled loops where these can (:mod:`~projunn_manifold.linalg.products`), else from the sampler's rank-k
   factors (:mod:`~projunn_manifold.sketching.samplers`);
2. geoopt scales it, and travels with it as with any tensor (:mod:`~projunn_manifold.sketching.factored_tensor`);
3. ``retr``: the tangent becomes a move (``Tangent.move``, :mod:`~projunn_manifold.moves.rank_one` at k = 1), which D
   and T make with different angles (:mod:`~projunn_manifold.moves.angle`), and the move is applied
   (:mod:`~projunn_manifold.moves.move`);
4. now and then a block of columns is corrected (:mod:`~projunn_manifold.moves.drift`).
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from geoopt.manifolds.base import Manifold
from torch import Tensor

from projunn_manifold import context, validation
from projunn_manifold.context import in_full_precision, outside_graphs
from projunn_manifold.linalg import dense, gpu, sharded
from projunn_manifold.linalg.dense import Scalar
from projunn_manifold.linalg.products import Matrix, matrix
from projunn_manifold.manifold.finiteness import PUT_BACK, Finiteness, is_far_off
from projunn_manifold.manifold.geometry import Geometry
from projunn_manifold.manifold.hooks import watch_optimizers
from projunn_manifold.manifold.notes import in_words, note_whole_gradient, take_added_decay, whole_gradient
from projunn_manifold.manifold.parameters import manifold_of
from projunn_manifold.manifold.sketcher import POWER, Sketcher
from projunn_manifold.manifold.state import Faults, Members, State, counts_of, digits_of
from projunn_manifold.manifold.states import States
from projunn_manifold.moves import drift
from projunn_manifold.moves.angle import GEODESIC, POLAR, Angle
from projunn_manifold.moves.frame import FramedStep
from projunn_manifold.moves.full_rank import FullRankTangent
from projunn_manifold.moves.move import Move
from projunn_manifold.moves.projunn import move_d, tangent_of_gradient
from projunn_manifold.moves.tangent import Tangent, longest_step
from projunn_manifold.sketching.factored_tensor import FactoredTensor, as_plain, factors_at
from projunn_manifold.sketching.lowrank import LowRank
from projunn_manifold.sketching.samplers import Sampler, Subspace, takes_generators

__all__ = ["UnitaryLowRank", "UnitaryLowRankExact", "keeps_factors", "manifold_or_new", "unitary_of"]

_DENSE_RATE = 2  # a product over all columns rounds once, whatever their number; k passes round k times
_THIN = 16  # cost of an entry in a product with thin factors, relative to the product that forms a gradient


def manifold_or_new(manifold: UnitaryLowRank | None, k: int | None) -> UnitaryLowRank:
    """Return the manifold given, or for None a new one whose moves have rank k; raise TypeError for anything else."""
    if manifold is None:
        return UnitaryLowRank(k)
    if not isinstance(manifold, Manifold):
        raise TypeError(f"`manifold` must be one such as UnitaryLowRank(k=1), got {manifold!r}")
    return manifold


def unitary_of(p: Tensor) -> UnitaryLowRank | None:
    """Return the manifold of this package that a parameter is on, or None."""
    manifold = manifold_of(p)
    return manifold if isinstance(manifold, UnitaryLowRank) else None


def keeps_factors(p: Tensor) -> bool:
    """Return whether to keep a gradient of p as factors: sketching them takes less time than forming it."""
    manifold = unitary_of(p)
    return manifold is not None and manifold.keeps_factors(p)


class UnitaryLowRank(Geometry):
    r"""Matrices with orthonormal columns, :math:`\{X : X^H X = I\}`, moved by rank-k updates (projUNN).

    Square X is unitary U(n) or orthogonal O(n), tall X a point of the Stiefel manifold, real or complex,
    with any leading batch dimensions.  ``retr`` is projUNN-D, the closest unitary to X + u; ``expmap`` is
    projUNN-T, the geodesic.  Both use a part of rank at most 2k of what an optimiser hands them and cost
    :math:`O(k n^2)`; no matrix of side n is factorised.

    The metric is :math:`\langle u, v\rangle_X = \mathrm{Re}\,\mathrm{tr}\,u^H (2I - XX^H) v`: the Frobenius inner
    product on square X, twice the canonical one on tall X.  Its gradient is :math:`\tfrac12(G - X G^H X)`,
    half of what geoopt's canonical Stiefel uses, which at equal learning rate steps (at least) twice as far.

    Parameters
    ----------
    k : int or None
        Rank of a gradient's sketch; a move has rank at most 2k.  None: full rank, dense and exact, in
        :math:`O(n^3)`; so is every matrix of m <= 2k columns, where a sketch would save nothing.
    sampler : str or callable
        How a gradient becomes rank-k factors: ``"lsi"`` (default), ``"column"``, ``"subspace"``, ``"svd"`` or
        a callable ``(gradient, k, generator) -> LowRank``; see :mod:`projunn_manifold.sketching.samplers`.
    seed : int
        Seed of the manifold's own generator, from which the sketches draw.  The global generator is
        never touched; replicas with equal seeds draw equal sketches.
    sweep : int or None
        Steps in which the drift correction visits every column once, on average; never more than one column per
        step.  Visits are k times as frequent (2k times if complex, twice for dense moves), because rounding has that
        times the variance.  The correction undoes what rounding does to a point (:mod:`projunn_manifold.moves.drift`),
        up to 32 columns at a time in an optimiser's move, at the cost of at most :math:`4 k n^2` operations per step.
        None: no correction.
    non_finite : {"raise", "skip"}
        What to do with a matrix whose gradient or step is not finite (NaN, infinity, or a square beyond the range
        of its dtype).  ``"raise"``: raise ValueError, with point and state as they were.  ``"skip"``: leave the matrix
        where it is and count it (:meth:`pop_faults`).  On CUDA matrices are always skipped, because raising would wait
        for the device.

    Raises
    ------
    TypeError, ValueError
        k or sweep not an int or below 1, unknown sampler or ``non_finite``.  In every method: a point that is not
        ``(*batch, n, m)``, n >= m, in float32, float64, complex64 or complex128; a vector of another matrix shape,
        dtype or device.  In every move, on CPU: a vector that is not finite, or longer than
        :math:`\sqrt{2m}/\epsilon`, of which rounding would leave nothing.

    Notes
    -----
    The first manifold of a process registers hooks on the steps of all optimisers.  They tell the manifold how much
    weight decay geoopt's optimisers add, and warn of optimisers that would move a parameter off its manifold.  It also
    keeps the steps of geoopt's optimisers outside the graphs of ``torch.compile``, whose compiler is imported for this,
    in about a second.

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
    #: What ``retr`` and steps in place make of a tangent's rotation angles.
    angle: Angle = POLAR

    def __init__(
        self,
        k: int | None = 1,
        *,
        sampler: str | Sampler = "lsi",
        seed: int = 0,
        sweep: int | None = 256,
        non_finite: str = "raise",
    ) -> None:
        super().__init__()
        self._seed = validation.check_seed(seed)
        self._state = State(self._seed)
        self.sketcher = Sketcher(k, sampler, self._state)
        self.finiteness = Finiteness(non_finite, self._state)
        self._schedule = drift.Schedule(validation.check_count(sweep, "sweep", "no drift correction"))
        watch_optimizers()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what a copy or a pickle brings along."""
        super().__setstate__(state)
        watch_optimizers()

    @property
    def k(self) -> int | None:
        """Rank of a gradient's sketch; None: full rank."""
        return self.sketcher.k

    @property
    def sampler(self) -> Sampler:
        """How a gradient becomes factors."""
        return self.sketcher.sampler

    @property
    def seed(self) -> int:
        """Seed of the sketches."""
        return self._seed

    @property
    def sweep(self) -> int | None:
        """Steps in which the drift correction visits every column once."""
        return self._schedule.sweep

    @property
    def non_finite(self) -> str:
        """What to do with a gradient or step that is not finite."""
        return self.finiteness.non_finite

    def extra_repr(self) -> str:
        """Return the rank and whether moves are dense, as geoopt prints it."""
        if self.k is None:
            return "k=None, dense"
        return f"k={self.k}, sampler={self.sketcher.sampler_name}, dense where 2k >= m"

    def is_dense(self, x: Tensor) -> bool:
        """Return whether moves of x use the whole gradient: k is None, or 2k >= m."""
        return self.sketcher.is_dense(x)

    # -- a step ---------------------------------------------------------------------------------------

    @outside_graphs
    @in_full_precision
    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        r"""Riemannian gradient of the rank-k part of the Euclidean gradient u: :math:`\tfrac12(G_k - X G_k^H X)`.

        Cost: two products of u and two of X (four on tall X) with k to 2k columns.  Under ``torch.no_grad()``, as in
        geoopt's optimisers, the result is a :class:`~projunn_manifold.sketching.factored_tensor.FactoredTensor`; with
        gradients enabled it is a plain dense tensor.

        Raises
        ------
        ValueError
            A gradient of another shape or device; on CPU, a gradient with non-finite entries.
        """
        self._accept(x, u, "gradient")
        self.warn_if_far_off(x)
        decay = take_added_decay(x)
        point, u = validation.broadcast(x, u)
        tangent = self._sketched(matrix(point), u, decay)
        self._state.count_gradient(point)
        if torch.is_grad_enabled():
            left, right = tangent.outer()
            sketched = left @ right.mH
            if not self.is_dense(x):
                note_whole_gradient(x, sketched, u)
            return sketched
        return FactoredTensor(tangent)

    @in_full_precision
    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        r"""Inner product :math:`\mathrm{Re}\,\mathrm{tr}\,u^H(2I - XX^H)v`, real, ``(*batch,)`` or ``(*batch, 1, 1)``.

        Cost: :math:`O(k n)` for a factored u alone, one read of u and v on square X, :math:`O(n m^2)` on tall X.

        To a line search that asks for slopes (geoopt's ``RiemannianLineSearch`` with Wolfe's conditions) it gives those
        of the loss: where u is the sketch of a gradient G and v a tangent, :math:`\mathrm{Re}\,\mathrm{tr}\,G^H v`.
        Sketches at two trial points are not comparable.
        """
        whole = None if v is None else whole_gradient(x, u)
        if whole is None or v is None:
            return super().inner(x, u, v, keepdim=keepdim)
        slope = dense.frobenius_inner(*validation.broadcast(whole, as_plain(v)))
        return slope[..., None, None] if keepdim else slope

    @outside_graphs
    @in_full_precision
    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        r"""projUNN-D: the polar factor of X + u, :math:`(X+u)(I + u^H u)^{-1/2}`, for the rank-2k part of u.

        A tangent of higher rank (momentum, Adam), or a vector that is not tangent, is first reduced to the tangent

        .. math:: X Q\,\mathrm{skew}(Q^H X^H u Q)\,Q^H + (I - XX^H) u Q Q^H,

        Q an orthonormal basis of 2k columns sketched from u; a tangent of rank at most 2k stays as it is.  The
        sketch is the same for equal u until the next gradient is drawn, so that ``retr`` and ``transp_follow_retr``
        agree.
        On square X every rotation angle θ of the geodesic becomes arctan θ: a retraction of second order.
        Under ``torch.no_grad()`` the block of columns that is due is put back, too (``sweep``).
        Cost on square X, with compiled loops (without): 2 (4) reads or writes of X for a factored u; for a dense one 4
        (6) more, most of them of u, and on tall X 8 (10) more.
        """
        return self._moved(x, self._tangent(x, u).move(self.angle))

    @outside_graphs
    @in_full_precision
    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        r"""projUNN-T: the geodesic :math:`\exp(A) X`, A skew-Hermitian with A X = u; u reduced as in ``retr``."""
        return self._moved(x, self._tangent(x, u).geodesic())

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
        return self.descend_(x, grad, lr)

    @outside_graphs
    @in_full_precision
    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Move along ``retr`` and carry v by the same group element g (see :meth:`transp_follow_retr`)."""
        move = self._tangent(x, u).move(self.angle)
        return self._moved(x, move), self._transported(x, move, v)

    @outside_graphs
    @in_full_precision
    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Move along ``expmap`` and carry v by the same group element g (see :meth:`transp_follow_expmap`)."""
        move = self._tangent(x, u).geodesic()
        return self._moved(x, move), self._transported(x, move, v)

    @outside_graphs
    @torch.no_grad()
    @in_full_precision
    def retr_transp_(self, x: Tensor, u: Tensor, *vectors: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Move x along ``retr`` by ``scale`` times u and carry the vectors with it, all in place; return x.

        ``scale`` is a real number, or a tensor ``(*batch,)`` with one for each matrix.  Raises what ``retr``
        raises; x and the vectors are then as they were.
        """
        return self.follow_(x, u, vectors, scale)

    @outside_graphs
    @in_full_precision
    def transp_follow_retr(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        r"""Carry v along ``retr(x, u)``: g v, with :math:`g = I + W\Gamma W^H` unitary and g X = Y.

        Left translation, not parallel transport: an isometry onto the tangent space at Y, at the cost
        of two products of v with at most 2k (tall X: 4k) columns.
        """
        return self._transported(x, self._tangent(x, u).move(self.angle), v)

    @outside_graphs
    @in_full_precision
    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Carry v along ``expmap(x, u)``: exp(A) v, left translation by the geodesic's own one-parameter group."""
        return self._transported(x, self._tangent(x, u).geodesic(), v)

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

    def raw_move(self, x: Tensor, factors: LowRank) -> tuple[Move, Tensor | None]:
        """Return the move along factors that need not be tangent, and which matrices it leaves (None: none).

        It is projUNN-D of ``X + a b^H``.  Not on CPU, a matrix with a numerically singular X + a b^H stays where it is
        and is counted (:meth:`pop_faults`).

        Raises
        ------
        ValueError
            On CPU, if X + a b^H is numerically singular.
        """
        if not context.would_wait(x):
            try:
                return move_d(matrix(x), factors), None
            except ValueError as error:
                raise ValueError(f"{in_words(x)}: {error}") from None
        move, lost = FramedStep.of_factors(matrix(x), factors).raw_retraction_by_products()
        self._state.count_faults(x.device, skipped=lost)
        return move, lost

    # -- the parts of a step ----------------------------------------------------------------------------

    def _sketched(self, x: Matrix, grad: Tensor, decay: float = 0.0) -> Tangent:
        """Return the Riemannian gradient as a tangent, checked."""
        return self.finiteness.checked_gradient(x.like, self.sketcher.tangent(x, grad, decay), grad)

    def _reduced(self, x: Tensor, u: Tensor) -> Tangent:
        """Return u as a tangent of rank at most 2k (all of u where 2k >= m)."""
        self._accept(x, u, "u")
        tangent: Tangent | None = factors_at(x, u)
        if tangent is not None:
            return tangent
        x, u = validation.broadcast(x, as_plain(u))
        return self.sketcher.reduced(matrix(x), u)

    def _tangent(self, x: Tensor, u: Tensor) -> Tangent:
        """Return u as a tangent that a move can follow."""
        return self.finiteness.checked_step(x, self._reduced(x, u), u)

    def _moved(self, x: Tensor, move: Move) -> Tensor:
        """Return the moved point; without gradients, as in an optimiser's step, corrected for drift."""
        y = move.apply(matrix(x))
        if not torch.is_grad_enabled():
            self._correct_(y)
        return y

    def _transported(self, x: Tensor, move: Move, v: Tensor) -> Tensor:
        self._accept(x, v, "v")
        return move.transport(as_plain(v))

    def _correct_(self, x: Tensor) -> None:
        """Correct the block of columns that is due, if any."""
        rate = _DENSE_RATE if self.k is None or self.is_dense(x) else self.k
        rate *= 2 if x.is_complex() else 1
        for turn, members in self._state.turns():
            start = self._schedule.first_due_column(turn, x.shape[-1], rate)
            if start is not None and x.numel() and not context.traced():
                self._correct_block_(x[members], start, members)

    def _correct_block_(self, x: Tensor, start: int, members: Members) -> None:
        left = drift.correct_columns_(x, start)
        if context.readable(x) and not left.any():
            return
        self._state.count_faults(x.device, members, uncorrected=left)
        if context.readable(x):
            validation.warn(
                f"{in_words(x, 'a point')} is off the manifold: columns overlap by more than {drift.FAR}, too far for "
                f"the drift correction; {PUT_BACK}"
            )

    # -- state --------------------------------------------------------------------------------------------

    def pop_faults(self) -> Faults:
        """Return how many matrices were skipped, columns left uncorrected and steps shortened, and forget them.

        Skipped are matrices with a gradient or step that was not finite (``non_finite="skip"``, or not on CPU), and,
        not on CPU, those under :func:`~projunn_manifold.optim.constrain` whose X + a b^H was singular.  Left are
        columns too far off the manifold for the drift correction, of which CPU also warns.  Shortened are steps with
        angles beyond 64, where the host does not look at them.  Waits for the device.
        """
        faults = self._state.faults()
        self._state.forget_faults()
        return faults

    def get_extra_state(self) -> Tensor:  # (5, 8) int64
        """Return the state of sketches, drift correction and faults, for ``state_dict``; waits for the device.

        These are five counts, as digits to the base 256: gradients, parameters that share the manifold, and the three
        of :meth:`pop_faults`.
        """
        return digits_of(self._state.counts())

    def set_extra_state(self, state: Tensor) -> None:
        """Take over the state from a ``state_dict``, converted to any real dtype, or averaged: fractions round up.

        Raises
        ------
        ValueError
            Another shape; counts that are negative or not finite.
        """
        self._state.adopt(counts_of(state, "state"))

    def take_largest_state(self, other: UnitaryLowRank) -> None:
        """Go on, as an average of several models does, after the larger of both counts of gradients."""
        self._state.catch_up(other._state)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load the state, checked under its full name; a missing one leaves the counts as they are."""
        key = f"{prefix}_extra_state"
        if key in state_dict:
            counts_of(state_dict[key], key)
        else:
            state_dict[key] = self.get_extra_state()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # -- for optimisers that have taken care of derivatives, autocast and graphs -------------------------------

    def gradient_tangent(self, x: Tensor, grad: Tensor, fused: bool = False) -> Tangent | gpu.SketchedTangent:
        """Return what ``egrad2rgrad`` does, as a tangent; if ``fused``, from the kernels for a GPU where they can."""
        validation.check_in_place(x, grad, "gradient")
        if fused and self._suits_kernels(x, grad):
            found = gpu.SketchedTangent.of_gradient(x, grad, self.sketcher.test_columns(x))
            self._state.count_faults(x.device, skipped=found.lost)
            self._state.count_gradient(x)
            return found
        self.warn_if_far_off(x)
        tangent = self._sketched(matrix(x), grad)
        self._state.count_gradient(x)
        return tangent

    def gradient_tangent_and_rest(self, x: Tensor, grad: Tensor, residual: Tensor) -> tuple[Tangent, Tensor]:
        """Return the tangent of ``grad + residual``, and what its sketch leaves out, ``grad + residual - a b^H``.

        A matrix whose gradient is skipped keeps its residual.
        """
        for u, what in ((grad, "gradient"), (residual, "residual")):
            validation.check_in_place(x, u, what)
        validation.check_writable(residual, "residual")
        self.warn_if_far_off(x)
        total = residual + as_plain(grad)
        factors = self.sketcher.factors(matrix(x), total)
        tangent = tangent_of_gradient(matrix(x), factors)
        lost = self.finiteness.lost(x, tangent.squared_norm(), torch.finfo(x.dtype).max, total, "gradient")
        self._state.count_gradient(x)
        matrix(total).add_product_(-factors.a, factors.b)
        if lost is not None:
            tangent, here = tangent.without(lost), sharded.local_shard(total)
            here.copy_(torch.where(lost[..., None, None], sharded.local_shard(residual), here))
        return tangent, total

    def descend_(self, x: Tensor, grad: Tensor, lr: float | Tensor, fused: bool = True) -> Tensor:
        """Do what :meth:`step_` does, with the kernels for a GPU where they can (unless not ``fused``)."""
        validation.check_in_place(x, grad, "gradient")
        lr = validation.check_rate(lr, "lr", x)
        if fused and self._suits_kernels(x, grad):
            return self._descend_by_kernels_(x, grad, lr)
        self.warn_if_far_off(x)
        point = matrix(x)
        tangent = self.sketcher.tangent(point, grad)
        move = self.finiteness.checked_descent(x, tangent, lr, grad).move(self.angle)
        self._state.count_gradient(x)
        move.apply_(point)
        self._correct_(x)
        return x

    def _suits_kernels(self, x: Tensor, grad: Tensor) -> bool:
        """Return whether a step of x is one of rank one that the kernels know."""
        is_known = self.k == 1 and self.sketcher.is_plain and self.angle in (GEODESIC, POLAR)
        return is_known and not self.is_dense(x) and gpu.suits(x, grad)

    def _descend_by_kernels_(self, x: Tensor, grad: Tensor, lr: float | Tensor) -> Tensor:
        test, is_polar = self.sketcher.test_columns(x), self.angle is POLAR
        lost = gpu.step_of_rank_one_(x, grad, test, lr, is_polar, longest_step(x))
        self._state.count_faults(x.device, skipped=lost)
        self._state.count_gradient(x)
        self._correct_(x)
        return x

    def follow_(self, x: Tensor, u: Tensor, vectors: Iterable[Tensor], scale: float | Tensor) -> Tensor:
        """Do what :meth:`retr_transp_` does."""
        validation.check_in_place(x, u, "u")
        scale = validation.check_rate(scale, "scale", x)
        for v in vectors:
            validation.check_in_place(x, v, "v")
            validation.check_writable(v, "v")
        return self._follow_(x, self._reduced(x, u), u, vectors, scale)

    def follow_tangent_(self, x: Tensor, tangent: Tangent, vectors: Iterable[Tensor], scale: float | Tensor) -> Tensor:
        """Move x along ``scale`` times a tangent, and carry the vectors along."""
        return self._follow_(x, tangent, None, vectors, validation.check_rate(scale, "scale", x))

    def follow_sum_(
        self,
        x: Tensor,
        u: Tensor,
        c: Scalar,
        tangent: Tangent | gpu.SketchedTangent,
        scale: float | Tensor,
        vectors: Iterable[Tensor] = (),
    ) -> Tensor:
        """Move x along ``scale (c u + tangent)``, make of u that sum, and carry it and the vectors along."""
        scale = validation.check_rate(scale, "scale", x)
        validation.check_writable(u, "u")
        if isinstance(tangent, gpu.SketchedTangent):
            assert not tuple(vectors)  # which steps without kernels have
            return self._follow_sum_by_kernels_(x, u, c, tangent, scale)
        if isinstance(tangent, FullRankTangent):
            total: Tangent = tangent.plus(c, u)
        else:
            if isinstance(c, Tensor):
                u, c = u.mul_(c), 1.0
            elif not c:  # whatever its entries are
                u, c = u.zero_(), 1.0
            matrix(u).add_product_(*tangent.outer(), c)
            total = self._reduced(x, u)
        return self._follow_(x, total, u, (u, *vectors), scale)

    def _follow_sum_by_kernels_(
        self, x: Tensor, u: Tensor, c: Scalar, tangent: gpu.SketchedTangent, scale: float | Tensor
    ) -> Tensor:
        vector = u.resolve_conj().resolve_neg().contiguous()  # u, unless its state was loaded in another layout
        tangent.add_to_(vector, c)
        test, is_polar = self.sketcher.columns_of_vector(x), self.angle is POLAR
        lost = gpu.follow_(x, vector, test, POWER, scale, is_polar, longest_step(x))
        if vector is not u:
            u.copy_(vector)
        self._state.count_faults(x.device, skipped=lost)
        self._correct_(x)
        return x

    def _follow_(
        self, x: Tensor, tangent: Tangent, u: Tensor | None, vectors: Iterable[Tensor], scale: float | Tensor
    ) -> Tensor:
        """Follow a tangent, to which u was reduced, if there is one."""
        move = self.finiteness.checked_step(x, tangent.scaled(scale), u).move(self.angle)
        move.apply_(matrix(x))
        for v in vectors:
            if v is u:
                tangent.carry_(move, v)
            else:
                move.transport_(v)
        self._correct_(x)
        return x

    # -- for optimisers: stacks, starts, gradients that are not formed, shards -------------------------------

    @property
    def memory(self) -> State:
        """What the manifold remembers between steps."""
        return self._state

    @property
    def settings(self) -> Hashable | None:
        """What manifolds must have in common to step as one; None: this one cannot be :meth:`together` with others."""
        kind, sampler = type(self), self.sketcher.sampler
        if kind not in (UnitaryLowRank, UnitaryLowRankExact) or not takes_generators(sampler):
            return None
        return kind, self.sketcher.k, sampler, self._schedule.sweep, self.finiteness.non_finite

    def together(self, states: States) -> UnitaryLowRank:
        """Return a manifold of these settings for a stack whose members have states of their own."""
        many = copy.copy(self)
        many._state = states
        many.sketcher = self.sketcher.drawing_from(states)
        many.finiteness = Finiteness(self.non_finite, states)
        return many

    def keeps_factors(self, x: Tensor) -> bool:
        """Return whether to keep a gradient of x as factors: sketching them takes less time than forming it."""
        if self.k is None or not isinstance(self.sampler, Subspace) or torch.compiler.is_compiling():
            return False  # the gradient is formed in any case, or a compiled graph could not return it
        passes = 2 * (2 + 2 * self.sampler.power) * (self.k + self.sampler.oversample)  # over factors, for columns
        return _THIN * passes <= x.shape[-1]

    def warn_if_far_off(self, x: Tensor) -> None:
        """Warn of a parameter that is new and far off the manifold; only CPU checks this."""
        if not (self._state.is_new(x) and context.readable(x)):
            return
        error = dense.probed_unitarity_error(x.detach())
        if is_far_off(error[error.isfinite()]):  # what is not finite will be refused
            validation.warn(
                f"{in_words(x)} starts off the manifold, ‖X^H X - I‖_F/√m about {error.max().item():.2g}, where its "
                f"moves are wrong; {PUT_BACK}"
            )

    def has_seen(self, p: Tensor) -> bool:
        """Return whether a parameter has had a gradient on this manifold."""
        return not self._state.is_new(p)

    def draws(self) -> tuple[int, int]:
        """Return seed and count of gradients, from which all draws follow; equal in all processes of a parameter."""
        return self._state.stamp

    def check_shard(self, name: str, p: Any) -> None:
        """Raise unless steps can be made on a sharded parameter; all processes that share it ask together."""
        validation.check_point(p, name)
        others = [placement for placement in p.placements if not placement.is_replicate()]
        whole = range(max(1, p.dim() - 2), p.dim())  # dimensions that cannot be cut
        if len(others) > 1 or any(not _is_shard(other) or other.dim in whole for other in others):
            raise NotImplementedError(
                f"{name!r} is placed as {tuple(p.placements)}: a unitary parameter can be cut once, by its rows or, if "
                "it is a stack, by its matrices"
            )
        if p.dim() == 2 and sharded.is_sharded(p):
            if self.is_dense(p):
                raise NotImplementedError(
                    f"{name!r} has sharded rows, but {self} moves it by its whole gradient: use 2k < m"
                )
            if not self.sketcher.is_linear:
                raise NotImplementedError(
                    f"{name!r} has sharded rows, but the sampler {self.sampler!r} needs the whole gradient: use "
                    "'lsi' or 'subspace'"
                )
        for dim in range(p.device_mesh.ndim):
            group = p.device_mesh.get_group(dim)
            sharded.group_agrees(group, torch.device(p.device_mesh.device_type), True, *self.draws())

    def adopt_shard(self, p: Any) -> None:
        """Take a sharded parameter that has been checked."""
        self._state.register(sharded.local_shard(p))
        p.manifold = self


def _is_shard(placement: Any) -> bool:
    """Return whether a placement is torch's Shard, and not a subclass that lays rows out in another way."""
    from torch.distributed.tensor import Shard  # slow to import, and there already if a parameter is sharded

    return type(placement) is Shard


class UnitaryLowRankExact(UnitaryLowRank):
    """:class:`UnitaryLowRank` whose optimisers move along ``expmap`` (projUNN-T), geoopt's "Exact" convention.

    geoopt's optimisers call ``retr`` and ``retr_transp`` only; here these follow the geodesic.
    """

    name = "UnitaryLowRankExact"
    angle = GEODESIC

    def raw_move(self, x: Tensor, factors: LowRank) -> tuple[Move, Tensor | None]:
        """Return the move along factors that need not be tangent, and which matrices it leaves (None: none).

        It is projUNN-T of ``a b^H``.  Not on CPU, a matrix whose step is too long for its precision stays where it is
        and is counted (:meth:`pop_faults`), as with ``non_finite="skip"``.

        Raises
        ------
        ValueError
            On CPU, a step that is too long for its precision.
        """
        step, lost = self.finiteness.step_and_lost(x, tangent_of_gradient(matrix(x), factors))
        return step.geodesic(), lost

    @property
    def reversible(self) -> bool:  # type: ignore[override]  # geoopt declares a plain attribute
        """Whether moving on and back returns to the start; the geodesic does, unless k truncates it."""
        return self.k is None
