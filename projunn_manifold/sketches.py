r"""Sketches: how a gradient, or any vector, becomes a tangent of low rank; what is remembered, and what is refused.

:class:`Sketches` is all that a step needs before it moves: rank, sampler and seed; the count of gradients, from which
every draw and every turn of the drift correction follow; and the one place where numbers that are not finite are
refused or counted, by all processes that share a parameter together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from projunn_manifold import drift, linalg, passes, rows, sampling, validation
from projunn_manifold.factors import FactoredTensor, LowRank, Scalar
from projunn_manifold.frame import Frame
from projunn_manifold.geometry import Geometry, plain
from projunn_manifold.gradients import Averaging, Gradient, without_normal_part
from projunn_manifold.graphs import outside_graphs
from projunn_manifold.linalg import in_full_precision
from projunn_manifold.state import Faults, State
from projunn_manifold.tangents import Tangent, only_where, tangent_of_gradient

__all__ = ["Sketches"]

# Products with u^H u when a dense tangent is reduced: Adam at small k needs half the steps it needs with none.
_POWER = 2

_SKETCH, _MOVE = 0, 1  # purposes of random numbers
_FAR_OFF = 0.1  # a unitarity error that no rounding explains, of bfloat16 neither
_BACK = "put it there first: with torch.no_grad(): x.copy_(manifold.projx(x))"


class Sketches(Geometry):
    """A geometry with sketches of rank k; its parameters are :class:`~projunn_manifold.UnitaryLowRank`'s."""

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

    # -- state ----------------------------------------------------------------------------------------

    def check(self) -> Faults:
        """Return how many matrices were skipped and how many columns left uncorrected since the last call.

        Skipped are matrices with a gradient or step that was not finite (``non_finite="skip"``, or CUDA); left are
        columns too far off the manifold for the drift correction, which CPU also warns of.  Waits for the device.
        """
        faults = self._state.faults()
        self._state.forget_faults()
        return faults

    def check_same_draws(self, p: Any) -> None:
        """Raise unless this manifold is as far in all processes of a sharded parameter's mesh; a collective call.

        Raises
        ------
        ValueError
            Seeds or counts of gradients that differ between processes.
        """
        for dim in range(p.device_mesh.ndim):
            group = p.device_mesh.get_group(dim)
            rows.agreement(group, torch.device(p.device_mesh.device_type), True, *self.stamp)

    def share(self, p: Any) -> None:
        """Register a parameter by its local piece."""
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

    # -- sketches -------------------------------------------------------------------------------------

    def is_dense(self, x: Tensor) -> bool:
        """Tell whether moves of x use the whole gradient: k is None, or 2k >= m."""
        return self.k is None or 2 * self.k >= x.shape[-1]

    def _sketch(self, x: Tensor, u: Tensor | LowRank, averaging: Averaging | None = None) -> LowRank:
        """Rank-k factors of the gradient, or of its mean over processes."""
        assert self.k is not None
        if isinstance(u, LowRank) and u.rank <= self.k:
            return u.balanced()
        gradient = u if isinstance(u, LowRank) else without_normal_part(u, x, self.k)
        return self.sketch(x, gradient if averaging is None else averaging.gradient(gradient))

    @in_full_precision
    def sketch(self, x: Tensor, gradient: Gradient, ahead: int = 0) -> LowRank:
        """Return the factors that a step at x would make of a gradient, which is known by its products.

        ``ahead`` counts the steps of this manifold's that come before that one.
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

    # -- refusals -------------------------------------------------------------------------------------

    def _bounded(self, x: Tensor, tangent: Tangent, u: Tensor | None = None) -> Tangent:
        """Return the tangent (of u), or refuse one that is not finite or beyond all rounding."""
        limit = 2 * x.shape[-1] / torch.finfo(x.dtype).eps ** 2
        return self._finite(x, tangent, limit, tangent if u is None else u, "step")

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

    def _look(self, x: Tensor) -> None:
        """Warn of a parameter that comes for the first time and is far off the manifold; only CPU looks."""
        if not (self._state.is_new(x) and linalg.readable(x)):
            return
        error = linalg.probed_unitarity_error(x.detach())
        if ((error > _FAR_OFF) & error.isfinite()).any():  # what is not finite will be refused
            validation.warn(
                f"a parameter of shape {tuple(x.shape)} starts off the manifold, ‖X^H X - I‖_F/√m about "
                f"{error.max().item():.2g}, where its moves are wrong; {_BACK}"
            )

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
            validation.warn(
                f"a point of shape {tuple(x.shape)} is off the manifold: columns overlap by more than {drift.FAR}, too "
                f"far for the drift correction; {_BACK}"
            )


def _largest(numbers: float | Tensor) -> float:
    if isinstance(numbers, Tensor):
        return numbers.max().item() if numbers.numel() else 0.0
    return numbers
