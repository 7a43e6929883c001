"""What all layers share: keeping weights on their manifolds, initialising them, checking the dtypes of inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from geoopt import ManifoldParameter, ManifoldTensor
from torch import Tensor, nn

from projunn_manifold import init as initialise
from projunn_manifold.manifold.geometry import Geometry
from projunn_manifold.manifold.parameters import manifold_of
from projunn_manifold.optim.plan import Guard, Plan, guard_of, manifolds_of, reattach_manifolds
from projunn_manifold.sketching.factored_tensor import FactoredTensor

__all__ = ["INITS", "KeepsManifolds", "StaysComplex", "cast", "on_manifold"]

#: First values of a weight, by name.
INITS: dict[str, Callable[[Tensor], Tensor]] = {
    "cayley": initialise.cayley_,
    "haar": initialise.haar_,
    "henaff": initialise.henaff_,
    "identity": initialise.identity_,
}


class StaysComplex(nn.Module):
    """A module whose complex parameters follow conversions of precision and stay complex."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Convert parameters; memory formats of images do not apply to stacks of matrices."""

        def whole(t: Tensor) -> Tensor:
            if not t.is_complex() and t.dim() < 4:
                converted: Tensor = fn(t)
                return converted
            detached = t.detach()
            numbers = torch.view_as_real(detached) if t.is_complex() else detached
            probe = fn(numbers.reshape(-1)[:0])  # for its dtype and device
            dtype = torch.promote_types(probe.dtype, torch.complex64) if t.is_complex() else probe.dtype
            if t.is_meta or probe.is_meta:
                return torch.empty_like(t, device=probe.device, dtype=dtype)
            return t.to(probe.device, dtype)

        return super()._apply(whole, recurse)  # type: ignore[no-untyped-call]


class KeepsManifolds(StaysComplex):
    """A module whose parameters return to their manifolds whenever PyTorch replaces them."""

    def remember_manifolds(self) -> None:
        """Remember the manifolds of all parameters; call it once these have been created, and when there are more."""
        guard = guard_of(self) or Guard(self, Plan({}))
        guard.plan = manifolds_of(self)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load what has been prepared, and checked by the guard, so that an error leaves this module as it was."""
        self._prepare(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _prepare(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Put this layer's entries in the place of those of torch's layer; the dictionary is the loader's own."""

    def _check_conversion(self, dtype: torch.dtype) -> None:
        """Raise, before anything of this layer is converted, for a dtype that it cannot have."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Convert parameters, and put them back on their manifolds."""
        self._check_conversion(fn(torch.empty(0, device="cpu")).dtype)
        for p in self.parameters(recurse=False):
            if isinstance(p.grad, FactoredTensor):
                p.grad = p.grad.clone()  # PyTorch would convert the wrapper, but not its factors
        plan = manifolds_of(self)
        kept = {name: plan[name] for name in plan if manifold_of(self.get_parameter(name)) is not None}
        super()._apply(lambda t: fn(t.as_subclass(Tensor) if isinstance(t, ManifoldTensor) else t), recurse)
        reattach_manifolds(self, Plan(kept, plan.ties))
        return self


def cast(module: nn.Module, x: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    """Convert real or less precise input to the layer's dtype; refuse a conversion that would lose information."""
    if x.dtype == dtype:
        return x
    if not (x.is_floating_point() or x.is_complex()) or torch.promote_types(x.dtype, dtype) != dtype:
        advice = ""
        if x.is_complex() and not dtype.is_complex:
            advice = ": take its parts as real numbers, torch.view_as_real(x).flatten(-2)"
        raise TypeError(f"{type(module).__name__}: {what} must be {dtype}, as the weights are, got {x.dtype}{advice}")
    return x.to(dtype)


def on_manifold(
    shape: tuple[int, ...],
    manifold: Geometry,
    init: str,
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> ManifoldParameter:
    """Return a parameter initialised by the named entry of INITS; on the meta device it stays uninitialised."""
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(map(repr, sorted(INITS)))}, got {init!r}")
    point = torch.empty(shape, device=device, dtype=dtype)
    return ManifoldParameter(point if point.is_meta else INITS[init](point), manifold=manifold)
