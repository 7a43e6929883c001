r"""What must hold on any device.

Steps, samplers and layers are compared with dense double-precision references on the CPU, and in-place optimisers with
geoopt's on the device.  Drift is the distance from the manifold.  Resumed runs, compiled models and captured graphs are
compared with plain ones on the device.

Errors of points are :math:`\|\cdot\|_F/\sqrt m` of the worst matrix of a stack.  Errors of sketches and gradients are
relative to the norm of what is expected.  A resumed run has to be equal bit for bit.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import geoopt
import torch
from torch import Tensor, nn

from projunn_manifold import reference
from projunn_manifold.layers import OrthogonalConv2d, UnitaryLinear, UnitaryRNN
from projunn_manifold.linalg import dense
from projunn_manifold.linalg.products import matrix
from projunn_manifold.manifold.unitary import UnitaryLowRank, UnitaryLowRankExact
from projunn_manifold.optim.in_place import RiemannianAdam, RiemannianSGD
from projunn_manifold.sketching import SAMPLERS, Sampler

__all__ = ["Device", "Law", "laws"]

_ROUNDING = 50  # eps: the promise for a step
_SHAPES = {"square": (48, 48), "tall": (48, 20), "stack": (3, 32, 32)}
_MAPS: dict[str, tuple[type[UnitaryLowRank], Callable[[Tensor, Tensor], Tensor]]] = {
    "D": (UnitaryLowRank, reference.retraction),
    "T": (UnitaryLowRankExact, reference.geodesic),
}


@dataclass(frozen=True)
class Device:
    """A device, and the dtypes that points can have on it."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, name: str) -> Device:
        """Return the device of this name, after trying a product in every dtype."""
        device = torch.device(name)
        return cls(device, tuple(dtype for dtype in dense.DTYPES if _has(device, dtype)))


def _has(device: torch.device, dtype: torch.dtype) -> bool:
    try:
        x = torch.ones(2, 2, dtype=dtype, device=device)
        return bool((x @ x).real.sum().item() == 8)
    except (
        AssertionError,
        RuntimeError,
        TypeError,
        NotImplementedError,
    ):  # PyTorch has no such device, or it no such dtype
        return False


@dataclass(frozen=True)
class Law:
    """Something that must hold: ``error`` returns a number that is at most ``limit``."""

    name: str
    error: Callable[[], float]
    limit: float


def laws(on: Device, quick: bool) -> Iterator[Law]:
    """Iterate over all laws that can be checked on a device; fewer of them if ``quick``."""
    yield from _steps(on, quick)
    yield from _samplers(on)
    yield from _optimizers(on)
    yield from _drift(on, 200 if quick else 2000)
    yield from _layers(on)
    yield from _checkpoints(on)
    if not quick:
        yield from _compiled(on)
    if on.device.type == "cuda":
        yield from _captured(on)


class _Draw:
    """Random matrices, drawn on the CPU, so that they are the same on every device."""

    def __init__(self, on: Device, seed: int = 0) -> None:
        self._device, self._generator = on.device, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=self._generator).to(self._device)

    def point(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return dense.haar(*shape, dtype=dtype, device="cpu", generator=self._generator).to(self._device)


def _wide(t: Tensor) -> Tensor:
    return dense.in_double(t.detach().cpu())


def _error(found: Tensor, expected: Tensor) -> float:
    off = torch.linalg.matrix_norm(_wide(found) - _wide(expected)) / math.sqrt(found.shape[-1])
    return off.max().item() if off.isfinite().all() else math.inf


def _relative(found: Tensor, expected: Tensor) -> float:
    off = torch.linalg.vector_norm(_wide(found) - _wide(expected)) / torch.linalg.vector_norm(_wide(expected))
    return off.item() if off.isfinite() else math.inf


def _off_manifold(x: Tensor) -> float:
    return dense.unitarity_error(_wide(x)).max().item()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- steps ------------------------------------------------------------------------------------------


def _steps(on: Device, quick: bool) -> Iterator[Law]:
    """Check that a step is the exact map of the sketch that it follows."""
    dtypes = on.dtypes[:: 2 if quick else 1]
    for letter, k, label, dtype, length in itertools.product(_MAPS, (1, 4, None), _SHAPES, dtypes, (1e-3, 1.0)):
        name = f"step {letter}, k = {k}, {label}, {_short(dtype)}, length {length:g}"
        error = partial(_error_of_step, on, *_MAPS[letter], k, _SHAPES[label], dtype, length)
        yield Law(name, error, _ROUNDING * torch.finfo(dtype).eps)


def _error_of_step(
    on: Device, kind: type[UnitaryLowRank], map_: Any, k: int | None, shape: tuple[int, ...], dtype: torch.dtype,
    length: float,
) -> float:  # fmt: skip
    draw, manifold = _Draw(on), kind(k, sweep=None)
    x, g = draw.point(*shape, dtype=dtype), draw.normal(*shape, dtype=dtype)
    wide = _wide(x)
    sketch = _wide(g) if manifold.is_dense(x) else _wide(manifold.sketcher.factors(matrix(x), g).dense())
    u = reference.gradient(wide, sketch)
    lr = length / torch.linalg.matrix_norm(u, 2).max().item()
    y = manifold.step_(x.clone(), g, lr)
    return max(_error(y, map_(wide, -lr * u)), _off_manifold(y))


def _samplers(on: Device) -> Iterator[Law]:
    """Check that a sketch keeps all of a gradient of rank at most k."""
    for name, dtype in itertools.product(SAMPLERS, on.dtypes):
        limit = 20 * _ROUNDING * torch.finfo(dtype).eps
        yield Law(f"sampler {name}, {_short(dtype)}", partial(_error_of_sampler, on, SAMPLERS[name], dtype), limit)


def _error_of_sampler(on: Device, sampler: Sampler, dtype: torch.dtype) -> float:
    draw = _Draw(on)
    g = draw.normal(40, 2, dtype=dtype) @ draw.normal(2, 30, dtype=dtype)
    return _relative(sampler(matrix(g), 3, torch.Generator(on.device).manual_seed(0)).dense(), g)


# -- optimisers -------------------------------------------------------------------------------------

_OPTIMIZERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SGD": (RiemannianSGD, geoopt.optim.RiemannianSGD, {"lr": 0.1}),
    "momentum": (RiemannianSGD, geoopt.optim.RiemannianSGD, {"lr": 0.1, "momentum": 0.9}),
    "Adam": (RiemannianAdam, geoopt.optim.RiemannianAdam, {"lr": 0.1}),
}


def _trained(on: Device, dtype: torch.dtype, make: Any, options: dict[str, Any], k: int | None, steps: int) -> Tensor:
    draw = _Draw(on)
    manifold = UnitaryLowRank(k)
    p: Any = geoopt.ManifoldParameter(draw.point(64, 64, dtype=dtype), manifold=manifold)
    target = draw.point(64, 64, dtype=dtype)
    optimizer = make([p], **options)
    for _ in range(steps):
        optimizer.zero_grad()
        (p - target).abs().square().sum().backward()
        optimizer.step()
    return p.detach()


def _optimizers(on: Device) -> Iterator[Law]:
    """Check that in-place optimisers make the steps of geoopt's."""
    for label, k, dtype in itertools.product(_OPTIMIZERS, (1, 4, None), on.dtypes):
        error = partial(_difference_from_geoopt, on, label, k, dtype)
        name = f"in place as geoopt's, {label}, k = {k}, {_short(dtype)}"
        yield Law(name, error, 20 * _ROUNDING * torch.finfo(dtype).eps)


def _difference_from_geoopt(on: Device, label: str, k: int | None, dtype: torch.dtype) -> float:
    own, theirs, options = _OPTIMIZERS[label]
    return _error(*(_trained(on, dtype, make, options, k, 4) for make in (own, theirs)))


def _drift(on: Device, steps: int) -> Iterator[Law]:
    """Check that rounding errors do not add up."""
    dtype = on.dtypes[0]
    for label, k in (("SGD", 1), ("SGD", None), ("momentum", 4), ("Adam", 1)):
        name = f"drift in {steps} steps, {label}, k = {k}, {_short(dtype)}"
        yield Law(name, partial(_drifted, on, label, k, dtype, steps), 10 * torch.finfo(dtype).eps)


def _drifted(on: Device, label: str, k: int | None, dtype: torch.dtype, steps: int) -> float:
    make, _, options = _OPTIMIZERS[label]
    return _off_manifold(_trained(on, dtype, make, options, k, steps))


# -- layers -----------------------------------------------------------------------------------------

_LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "UnitaryLinear": (lambda: UnitaryLinear(24, 16), (5, 24)),
    "UnitaryRNN, modReLU": (lambda: UnitaryRNN(3, 24), (12, 4, 3)),
    "UnitaryRNN, tanh": (lambda: UnitaryRNN(3, 24, nonlinearity="tanh"), (12, 4, 3)),
    "OrthogonalConv2d": (lambda: OrthogonalConv2d(3, 6, image_size=8), (2, 3, 8, 8)),
}


def _loss(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x)
    return ((y[0] if isinstance(y, tuple) else y).square() * 0.5).sum()


def _layers(on: Device) -> Iterator[Law]:
    """Check that gradients are those of the CPU in double precision."""
    for label in _LAYERS:
        yield Law(f"layer {label}, backward", partial(_error_of_layer, on, label), 200 * torch.finfo(torch.float32).eps)


def _error_of_layer(on: Device, label: str) -> float:
    make, shape = _LAYERS[label]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(*shape)
    exact = copy.deepcopy(layer).double()
    _loss(exact, x.double()).backward()
    layer = layer.to(on.device)
    _loss(layer, x.to(on.device)).backward()
    pairs = zip(layer.parameters(), exact.parameters(), strict=True)
    return max(_relative(_dense(p.grad), _dense(q.grad)) for p, q in pairs if q.grad is not None)


def _dense(gradient: Any) -> Tensor:
    return torch.Tensor.clone(gradient)


def _model(on: Device) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(UnitaryLinear(32, 32), nn.Tanh(), nn.Linear(32, 4)).to(on.device)
    return model, RiemannianAdam(model.parameters(), lr=0.01)


def _go_on(model: nn.Module, optimizer: Any, on: Device, steps: range) -> None:
    for step in steps:
        x = _Draw(on, step).normal(8, 32, dtype=torch.float32)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def _checkpoints(on: Device) -> Iterator[Law]:
    """Check that a run that resumes from a checkpoint is the uninterrupted one, bit for bit."""
    yield Law("checkpoint there and back", partial(_error_after_checkpoint, on), 0.0)


def _error_after_checkpoint(on: Device) -> float:
    whole, optimizer = _model(on)
    _go_on(whole, optimizer, on, range(6))
    first, optimizer = _model(on)
    _go_on(first, optimizer, on, range(3))
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    resumed, optimizer = _model(on)
    for holder, state in zip((resumed, optimizer), torch.load(file, weights_only=True), strict=True):
        holder.load_state_dict(state)
    _go_on(resumed, optimizer, on, range(3, 6))
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    return 0.0 if all(torch.equal(p, q) for p, q in pairs) else math.inf


def _compiled(on: Device) -> Iterator[Law]:
    """Check that a compiled model has the gradients of the plain one."""
    yield Law("torch.compile, backward", partial(_error_of_compiled, on), 200 * torch.finfo(torch.float32).eps)


def _error_of_compiled(on: Device) -> float:
    model, _ = _model(on)
    x, found = _Draw(on).normal(8, 32, dtype=torch.float32), []
    for function in (model, torch.compile(model)):
        model.zero_grad()
        function(x).square().sum().backward()
        found.append([_dense(p.grad) for p in model.parameters()])
    return max(_relative(compiled, plain) for plain, compiled in zip(*found, strict=True))


def _captured(on: Device) -> Iterator[Law]:
    """Check that a step in a captured graph equals the same step outside."""
    yield Law("captured graph, k = None", partial(_error_of_captured, on), _ROUNDING * torch.finfo(torch.float32).eps)


def _error_of_captured(on: Device) -> float:
    draw, found = _Draw(on), []
    start, g = draw.point(64, 64, dtype=torch.float32), draw.normal(64, 64, dtype=torch.float32)
    for is_captured in (False, True):
        x, manifold = start.clone(), UnitaryLowRank(None, sweep=None)  # which draws nothing
        manifold.step_(x, g, 1e-3)
        if is_captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                manifold.step_(x, g, 1e-3)
            graph.replay()
        else:
            manifold.step_(x, g, 1e-3)
        found.append(x)
    return _error(*found)
