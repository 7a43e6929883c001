"""What all layers share: keeping weights on their manifolds, initialising them, checking the dtypes of inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from geoopt import ManifoldParameter
from torch import Tensor, nn

from projunn_manifold import init as initialise
from projunn_manifold.context import is_plain
from projunn_manifold.linalg import dense
from projunn_manifold.manifold.geometry import Geometry
from projunn_manifold.manifold.state import counts_of
from projunn_manifold.optim.plan import Plan, manifolds_of, reattach_manifolds
from projunn_manifold.sketching.factored_tensor import FactoredTensor
from projunn_manifold.validation import warn

__all__ = ["INITS", "KeepsManifolds", "StaysComplex", "cast", "check_loaded", "on_manifold"]

_NEAR = 0.01  # a unitarity error that the drift correction makes good, and above that of a rounding to bfloat16

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
        """Remember the manifolds of all parameters; call it once these have been created."""
        self._plan = manifolds_of(self)
        self.register_load_state_dict_post_hook(_reattach)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load what has been prepared and checked, so that an error leaves this module as it was."""
        self._prepare(state_dict, prefix)
        check_loaded(self, self._plan, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _prepare(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Put this layer's entries in the place of those of torch's layer; the dictionary is the loader's own."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Convert parameters, and put them back on their manifolds."""
        for p in self.parameters(recurse=False):
            if isinstance(p.grad, FactoredTensor):
                p.grad = p.grad.clone()  # PyTorch would convert the wrapper, but not its factors
        plan = manifolds_of(self)
        super()._apply(fn, recurse)
        reattach_manifolds(self, plan)
        return self


def _reattach(module: Any, _: Any) -> None:
    reattach_manifolds(module, module._plan)


def check_loaded(module: nn.Module, plan: Plan, state_dict: dict[str, Any], prefix: str) -> None:
    """Check what a module is about to load: the states of its manifolds, and its weights' distances from them.

    Points on manifolds that come with a state were points once, and are an average, say, if they are none: a warning
    says so.  Without a state they are the weights of a plain module.  What has another shape is left to PyTorch.

    Raises
    ------
    ValueError
        Something that is no state of a manifold, or a plain weight that is off the manifold.
    """
    for name, manifold in plan.items():
        keys = [f"{prefix}{child}._extra_state" for child, found in module.named_children() if found is manifold]
        states = [key for key in keys if key in state_dict]
        for key in states:
            counts_of(state_dict[key], key)
        error = _distance(state_dict.get(f"{prefix}{name}"), module, name)
        if error <= _NEAR:
            continue
        found = f"{prefix + name!r} is off the manifold, ‖X^H X - I‖_F/√m about {error:.2g}"
        if not states:
            raise ValueError(
                f"{found}, expected at most {_NEAR}: without a manifold's state it counts as the weight of a plain "
                "module; `unitarize` and `fold` that module before its state_dict is taken, or put the weight on the "
                "manifold by init.nearest_unitary_"
            )
        warn(
            f"{found}, and is loaded as it is; if it is an average, put it on the manifold afterwards: with "
            "torch.no_grad(): parameter.proj_()"
        )


@torch.no_grad()
def _distance(given: object, module: nn.Module, name: str) -> float:
    """Return the unitarity error that a parameter will have once loaded, or 0 if that is not for us to say."""
    if not isinstance(given, Tensor) or given.is_meta or not given.numel():
        return 0.0
    own, given = module.get_parameter(name), given.detach().resolve_conj()
    if given.shape != own.shape or not is_plain(given):
        return 0.0
    return dense.probed_unitarity_error(given.to(own.dtype)).amax().item()


def cast(module: nn.Module, x: Tensor, what: str, dtype: torch.dtype) -> Tensor:
    """Convert real or less precise input to the layer's dtype; refuse a conversion that would lose information."""
    if x.dtype == dtype:
        return x
    if not (x.is_floating_point() or x.is_complex()) or torch.promote_types(x.dtype, dtype) != dtype:
        raise TypeError(f"{type(module).__name__}: {what} must be {dtype}, as the weights are, got {x.dtype}")
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
