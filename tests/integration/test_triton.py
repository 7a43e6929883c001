"""The kernels for a GPU: in Triton's interpreter the exact maps, and machine code for two generations of GPUs."""

import os
import subprocess
import sys

import geoopt
import pytest
import torch
from helpers import DTYPES, bound, double, error
from torch._subclasses.fake_tensor import FakeTensorMode

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, context, optim, reference
from projunn_manifold.linalg import dense, gpu, products
from projunn_manifold.linalg.products import matrix

pytestmark = [pytest.mark.integration]
pytest.importorskip("triton")


@pytest.fixture
def on_gpu(monkeypatch):
    """The CPU as the device of the kernels."""
    monkeypatch.setattr(gpu, "suits", lambda x, g: x.shape[-1] == x.shape[-2])
    monkeypatch.setattr(products, "compiled", None)


MAPS = {"D": (UnitaryLowRank, reference.retraction), "T": (UnitaryLowRankExact, reference.geodesic)}


def first_sketch(x, g):
    """What a new manifold makes of a gradient without kernels, in double precision."""
    return double(UnitaryLowRank(1).sketcher.factors(matrix(x), g).dense())


@pytest.mark.parametrize("length", [1e-6, 0.1, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 16), (300, 300), (3, 70, 70), (2, 2, 5, 5)], ids=str)
@pytest.mark.parametrize(("kind", "map_"), MAPS.values(), ids=MAPS)
def test_a_step_is_the_exact_map_and_draws_as_without_kernels(on_gpu, kind, map_, shape, dtype, length):
    draw = torch.Generator().manual_seed(0)
    manifold = kind(1, sweep=None)
    x, g = manifold.random(shape, dtype=dtype, generator=draw), torch.randn(shape, dtype=dtype, generator=draw)
    u = reference.gradient(double(x), first_sketch(x, g))
    lr = length / torch.linalg.matrix_norm(u, 2).max().item()
    y = manifold.step_(x.clone(), g, lr)
    assert error(y, map_(double(x), -lr * u)) <= bound(dtype, length)
    assert dense.unitarity_error(y).max() <= bound(dtype, length)


@pytest.mark.parametrize(("room", "rows"), [(15, 8), (7, 4), (1, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_have_a_power_of_two_of_rows_whatever_the_cache_has_room_for(on_gpu, monkeypatch, dtype, room, rows):
    monkeypatch.setattr(gpu, "_RESIDENT", room * 21 * dtype.itemsize)
    manifolds, draw = [UnitaryLowRank(1, sweep=None) for _ in range(2)], torch.Generator().manual_seed(0)
    x, g = manifolds[0].random(21, 21, dtype=dtype, generator=draw), torch.randn(21, 21, dtype=dtype, generator=draw)
    y, plain = (m.descend_(x.clone(), g, 0.1, fused) for m, fused in zip(manifolds, (True, False), strict=True))
    assert gpu._rows(21, dtype.itemsize) == rows
    assert error(y, plain) <= bound(dtype)
    assert error(plain, x) > 0.01


def test_no_size_of_a_matrix_has_other_blocks_than_these():
    for itemsize, most in ((4, 16), (8, 16), (16, 8)):
        rows = [gpu._rows(n, itemsize) for n in range(1, 20_000)]
        assert set(rows) == {r for r in (16, 8, 4) if r <= most}
        assert all(r == 4 or r * n * itemsize <= 2**18 for n, r in enumerate(rows, 1))
        assert rows == sorted(rows, reverse=True)


GRADIENTS = {
    "parallel": lambda x, noise: x.clone(),
    "a change of phase": lambda x, noise: 1j * x if x.is_complex() else x.clone(),
    "ones": lambda x, noise: torch.ones_like(x),
    "zero": lambda x, noise: torch.zeros_like(x),
    **{f"parallel but for {size}": lambda x, noise, size=size: x + size * noise for size in (1e-2, 1e-8)},
}


@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "map_"), MAPS.values(), ids=MAPS)
def test_points_and_gradients_at_right_angles_or_parallel_take_the_same_kernels(on_gpu, kind, map_, dtype, gradient):
    draw, lr = torch.Generator().manual_seed(0), 0.3
    noise = torch.randn(20, 20, dtype=dtype, generator=draw)
    for x in (torch.eye(20, dtype=dtype), kind(1).random(20, 20, dtype=dtype, generator=draw)):
        g = gradient(x, noise)
        sketch, y = first_sketch(x, g), kind(1, sweep=None).step_(x.clone(), g, lr)
        step = lr * torch.linalg.matrix_norm(sketch, 2).item()  # what is normal to the manifold also leaves rounding
        assert error(y, map_(double(x), -lr * reference.gradient(double(x), sketch))) <= bound(dtype, step)
        assert dense.unitarity_error(y).max() <= bound(dtype, step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "map_"), MAPS.values(), ids=MAPS)
def test_the_size_of_a_gradient_does_not_matter(on_gpu, kind, map_, dtype):
    draw = torch.Generator().manual_seed(0)
    x = kind(1).random(40, 40, dtype=dtype, generator=draw)
    g = torch.randn(40, 40, dtype=dtype, generator=draw)
    u = reference.gradient(double(x), first_sketch(x, g))
    lr = 1 / torch.linalg.matrix_norm(u, 2).item()
    for scale in (1e-15, 1e15) if torch.finfo(dtype).bits == 32 else (1e-70, 1e-50, 1e50, 1e70):
        manifold = kind(1, sweep=None)
        y = manifold.step_(x.clone(), g * scale, lr / scale)
        assert error(y, map_(double(x), -lr * u)) <= bound(dtype)
        assert manifold.pop_faults() == (0, 0, 0)


@pytest.mark.filterwarnings("ignore:(invalid|overflow|divide):RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_out_of_range_move_nothing(on_gpu, dtype):
    draw, manifold = torch.Generator().manual_seed(0), UnitaryLowRank(1, sweep=None)
    x, g = manifold.random(20, 20, dtype=dtype, generator=draw), torch.randn(20, 20, dtype=dtype, generator=draw)
    tiny, huge = (range(-40, -20), (22, 36)) if torch.finfo(dtype).bits == 32 else (range(-160, -78, 3), (85, 150))
    for power in tiny:
        assert torch.equal(manifold.step_(x.clone(), g * 10.0**power, 0.1), x)
    assert manifold.pop_faults() == (0, 0, 0)
    for power in huge:
        assert torch.equal(manifold.step_(x.clone(), g * 10.0**power, 0.1), x)
    assert manifold.pop_faults() == (2, 0, 0)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_change_of_phase_has_its_whole_length(on_gpu, dtype):
    x = UnitaryLowRank(1).random(20, 20, dtype=dtype, generator=torch.Generator().manual_seed(0))
    longest = (2 * 20) ** 0.5 / torch.finfo(dtype).eps
    for length, skipped in ((0.8 * longest, 0), (1.2 * longest, 1)):  # of i y y^H X, y of unit norm
        manifold = UnitaryLowRank(1, sweep=None)
        y = manifold.step_(x.clone(), 1j * x, length)
        assert torch.equal(y, x) == bool(skipped)
        assert manifold.pop_faults() == (skipped, 0, 0)


@pytest.mark.filterwarnings("ignore:(invalid|overflow|divide):RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_gradients_at_large_rates_leave_a_point_on_the_manifold(on_gpu, dtype):
    """Their squares have few digits, or none."""
    draw, manifold = torch.Generator().manual_seed(0), UnitaryLowRank(1, sweep=None)
    x, g = manifold.random(40, 40, dtype=dtype, generator=draw), torch.randn(40, 40, dtype=dtype, generator=draw)
    for power in range(-22, -15) if torch.finfo(dtype).bits == 32 else range(-84, -76):
        y = manifold.step_(x.clone(), g * 10.0**power, 0.1 * 10.0**-power)
        assert dense.unitarity_error(y) <= bound(dtype)
        assert error(y, x) <= 1.0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, complex(0, torch.nan), complex(0, -torch.inf)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_that_are_not_finite_are_left_and_counted(on_gpu, dtype, bad):
    if isinstance(bad, complex) and not dtype.is_complex:
        return
    manifold, draw = UnitaryLowRank(1, sweep=None), torch.Generator().manual_seed(0)
    p = geoopt.ManifoldParameter(manifold.random(3, 20, 20, dtype=dtype, generator=draw), manifold=manifold)
    p.grad = torch.randn(3, 20, 20, dtype=dtype, generator=draw)
    p.grad[1, 2, 3] = bad
    before, version = p.detach().clone(), p._version
    optim.RiemannianSGD([p], lr=0.1).step()
    assert [torch.equal(a, b) for a, b in zip(p, before, strict=True)] == [False, True, False]
    assert manifold.pop_faults() == (1, 0, 0)
    assert p._version > version


@pytest.mark.parametrize(
    ("kind", "dtype"), [(UnitaryLowRank, torch.float32), (UnitaryLowRankExact, torch.complex64)], ids=MAPS
)
def test_a_trained_weight_stays_on_the_manifold(on_gpu, kind, dtype):
    manifold, draw = kind(1), torch.Generator().manual_seed(0)
    p = geoopt.ManifoldParameter(manifold.random(24, 24, dtype=dtype, generator=draw), manifold=manifold)
    optimizer = optim.RiemannianSGD([p], lr=0.3)
    for _ in range(150):
        p.grad = torch.randn(24, 24, dtype=dtype, generator=draw)
        optimizer.step()
    assert dense.unitarity_error(p.detach()) <= dense.tolerance(dtype, 24)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("kind", [kind for kind, _ in MAPS.values()], ids=MAPS)
def test_training_goes_as_without_kernels(on_gpu, kind, dtype):
    steps, target = 10, kind(1).random(2, 21, 21, dtype=dtype, generator=torch.Generator().manual_seed(1))
    found = []
    for fused in (True, False):
        manifold, draw = kind(1), torch.Generator().manual_seed(0)
        p = geoopt.ManifoldParameter(manifold.random(2, 21, 21, dtype=dtype, generator=draw), manifold=manifold)
        optimizer = optim.RiemannianSGD([p], lr=0.3, fused=fused)
        for _ in range(steps):
            p.grad = p.detach() - target
            optimizer.step()
        found.append(p.detach())
    assert error(*found) <= steps * bound(dtype)


OPTIMIZERS = {
    "momentum": lambda ps, fused: optim.RiemannianSGD(ps, 0.3, momentum=0.9, dampening=0.1, fused=fused),
    "Adam": lambda ps, fused: optim.RiemannianAdam(ps, 0.1, fused=fused),
    "AMSGrad": lambda ps, fused: optim.RiemannianAdam(ps, 0.1, betas=(0.0, 0.9), amsgrad=True, fused=fused),
}


@pytest.mark.parametrize("tile", [16, 256])  # several for a row, and one
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(21, 21), (2, 19, 19)], ids=str)
@pytest.mark.parametrize("kind", [kind for kind, _ in MAPS.values()], ids=MAPS)
def test_training_with_moments_goes_as_without_kernels(on_gpu, monkeypatch, kind, shape, dtype, make, tile):
    monkeypatch.setattr(gpu, "_TILE", tile)
    monkeypatch.setattr(gpu, "_LONG_TILE", tile)
    steps, target = 4, kind(1).random(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    found = []
    for fused in (True, False):
        manifold, draw = kind(1), torch.Generator().manual_seed(0)
        p = geoopt.ManifoldParameter(manifold.random(shape, dtype=dtype, generator=draw), manifold=manifold)
        optimizer = make([p], fused)
        for _ in range(steps):
            p.grad = p.detach() - target
            optimizer.step()
        moments = optimizer.state_dict()["state"][0]
        found.append((p.detach(), moments["exp_avg" if "exp_avg" in moments else "momentum_buffer"]))
    (with_kernels, moment), (without, plain) = found
    assert error(with_kernels, without) <= 10 * steps * bound(dtype)
    assert error(moment, plain) <= 10 * steps * bound(dtype)
    assert error(without, target) > 0.1


def exact_step(kind, x, u, z, rate):
    """The dense step along the part of u in the columns orth((u^H u)^2 z), and u carried along, in double precision."""
    x, u, q = double(x), double(u), double(z)
    for _ in range(2):
        q = torch.linalg.qr(u.mH @ (u @ q)).Q
    inside = q.mH @ x.mH @ u @ q
    y = MAPS[kind][1](x, rate * x @ q @ (inside - inside.mH) @ q.mH / 2)
    return y, y @ x.mH @ u


@pytest.mark.parametrize("length", [1e-6, 0.1, 3.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 16), (70, 70), (3, 20, 20), (2, 2, 5, 5)], ids=str)
@pytest.mark.parametrize("kind", MAPS)
def test_a_step_along_a_vector_is_the_exact_map_of_its_part_in_two_columns(on_gpu, kind, shape, dtype, length):
    draw = torch.Generator().manual_seed(0)
    x = UnitaryLowRank(1).random(shape, dtype=dtype, generator=draw)
    factors = [torch.randn(*shape[:-1], 2, dtype=dtype, generator=draw) for _ in range(2)]
    u = factors[0] @ factors[1].mH + 0.1 * torch.randn(shape, dtype=dtype, generator=draw)
    z = torch.randn(shape[-1], 2, dtype=dtype, generator=draw)
    rate = length / torch.linalg.matrix_norm(u, 2).max().item()
    y, v = x.clone(), u.clone()
    assert not gpu.follow_(y, v, z, 2, rate, kind == "D", torch.inf).any()
    expected, carried = exact_step(kind, x, u, z, rate)
    assert error(y, expected) <= 10 * bound(dtype, length)
    assert error(v, carried) <= 10 * bound(dtype, length) * torch.linalg.matrix_norm(u, 2).max().item()
    assert dense.unitarity_error(y).max() <= bound(dtype)


VECTORS = {
    "zero": lambda x, draw: torch.zeros_like(x),
    "of rank one": lambda x, draw: torch.randn(20, 1, dtype=x.dtype, generator=draw) @ x[:1],
    "nearly of rank one": lambda x, draw: (
        torch.randn(20, 1, dtype=x.dtype, generator=draw) @ x[:1]
        + 1e-7 * torch.randn(20, 20, dtype=x.dtype, generator=draw)
    ),
    "normal": lambda x, draw: x.clone(),
    "a change of phase": lambda x, draw: 1j * x if x.is_complex() else x.clone(),
    "one entry": lambda x, draw: torch.nn.functional.pad(torch.ones(1, 1, dtype=x.dtype), (3, 16, 5, 14)),
}


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("make", VECTORS.values(), ids=VECTORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MAPS)
def test_steps_along_vectors_of_low_rank_stay_on_the_manifold_and_carry_isometrically(on_gpu, kind, dtype, make, size):
    draw = torch.Generator().manual_seed(0)
    for x in (torch.eye(20, dtype=dtype), UnitaryLowRank(1).random(20, 20, dtype=dtype, generator=draw)):
        u, z = make(x, draw) * size, torch.randn(20, 2, dtype=dtype, generator=draw)
        y, v = x.clone(), u.clone()
        assert not gpu.follow_(y, v, z, 2, 0.5 / size, kind == "D", torch.inf).any()
        assert dense.unitarity_error(y) <= bound(dtype)
        moved = double(y) @ double(x).mH @ double(u)
        assert error(v / size, moved / size) <= 10 * bound(dtype)


def test_a_vector_of_rank_two_moves_by_its_whole_tangent(on_gpu):
    draw = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        x = UnitaryLowRank(1).random(30, 30, dtype=dtype, generator=draw)
        g = torch.randn(30, 1, dtype=dtype, generator=draw) @ torch.randn(1, 30, dtype=dtype, generator=draw)
        u = reference.gradient(double(x), double(g)).to(dtype)
        y, rate = x.clone(), -1 / torch.linalg.matrix_norm(u, 2).item()
        gpu.follow_(y, u.clone(), torch.randn(30, 2, dtype=dtype, generator=draw), 2, rate, True, torch.inf)
        assert error(y, reference.retraction(double(x), rate * double(u))) <= 10 * bound(dtype)


@pytest.mark.filterwarnings("ignore:(invalid|overflow|divide):RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_that_is_not_finite_leaves_no_trace_in_moments(on_gpu, dtype, make):
    found = []
    for fused in (True, False):
        manifold, draw = UnitaryLowRank(1, sweep=None, non_finite="skip"), torch.Generator().manual_seed(0)
        p = geoopt.ManifoldParameter(manifold.random(3, 20, 20, dtype=dtype, generator=draw), manifold=manifold)
        optimizer = make([p], fused)
        for bad in (0.0, torch.nan, torch.inf, torch.finfo(dtype).max, 0.0):
            p.grad = torch.randn(3, 20, 20, dtype=dtype, generator=draw)
            p.grad[1, 2, 3] += bad
            optimizer.step()
        assert manifold.pop_faults().skipped == 3
        found.append(p.detach())
    assert error(*found) <= 100 * bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_too_long_is_left_out_and_its_moments_are_kept(on_gpu, dtype):
    manifold, draw = UnitaryLowRank(1, sweep=None), torch.Generator().manual_seed(0)
    p = geoopt.ManifoldParameter(manifold.random(2, 20, 20, dtype=dtype, generator=draw), manifold=manifold)
    before = p.detach().clone()
    p.grad = torch.randn(2, 20, 20, dtype=dtype, generator=draw)
    optimizer = optim.RiemannianAdam([p], lr=1e3 / torch.finfo(dtype).eps)
    optimizer.step()
    assert torch.equal(p, before)
    assert manifold.pop_faults() == (2, 0, 0)
    assert 0 < optimizer.state[p]["exp_avg"].abs().max() < torch.inf


def test_a_tiny_gradient_has_its_moments_and_moves_nothing(on_gpu):
    for dtype in DTYPES:
        tiny = 1e-25 if torch.finfo(dtype).bits == 32 else 1e-100
        manifold, draw = UnitaryLowRank(1, sweep=None), torch.Generator().manual_seed(0)
        p = geoopt.ManifoldParameter(manifold.random(20, 20, dtype=dtype, generator=draw), manifold=manifold)
        before = p.detach().clone()
        p.grad = tiny * torch.randn(20, 20, dtype=dtype, generator=draw)
        optim.RiemannianAdam([p], lr=0.1).step()
        assert torch.isfinite(torch.view_as_real(p.detach()) if dtype.is_complex else p.detach()).all()
        assert error(p.detach(), before) <= bound(dtype)


def test_moments_of_another_layout_take_the_same_steps(on_gpu):
    found = []
    for layout in (lambda t: t, lambda t: t.mT.contiguous().mT):
        manifold, draw = UnitaryLowRank(1), torch.Generator().manual_seed(0)
        p = geoopt.ManifoldParameter(manifold.random(20, 20, generator=draw), manifold=manifold)
        optimizer = optim.RiemannianAdam([p], lr=0.1)
        for _ in range(3):
            p.grad = torch.randn(20, 20, generator=draw)
            optimizer.step()
            optimizer.state[p]["exp_avg"] = layout(optimizer.state[p]["exp_avg"])
        found.append(p.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_stack_steps_as_its_members_do(on_gpu, make):
    found = []
    for foreach in (True, False):
        draw, ps = torch.Generator().manual_seed(0), []
        for seed in range(3):
            manifold = UnitaryLowRank(1, seed=seed)
            ps.append(geoopt.ManifoldParameter(manifold.random(20, 20, generator=draw), manifold=manifold))
        optimizer = make(ps, True)
        optimizer.param_groups[0]["foreach"] = foreach
        for _ in range(4):
            for p in ps:
                p.grad = torch.randn(20, 20, generator=draw)
            optimizer.step()
        found.append(torch.stack([p.detach() for p in ps]))
    assert error(*found) <= 10 * bound(torch.float32)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(("kind", "dtype"), [(UnitaryLowRank, torch.float32), (UnitaryLowRankExact, torch.complex64)])
def test_a_weight_trained_with_moments_stays_on_the_manifold(on_gpu, kind, dtype, make):
    manifold, draw = kind(1), torch.Generator().manual_seed(0)
    p = geoopt.ManifoldParameter(manifold.random(24, 24, dtype=dtype, generator=draw), manifold=manifold)
    optimizer = make([p], True)
    for _ in range(60):
        p.grad = torch.randn(24, 24, dtype=dtype, generator=draw)
        optimizer.step()
    assert dense.unitarity_error(p.detach()) <= dense.tolerance(dtype, 24)


def test_square_matrices_of_all_dtypes_suit_the_kernels(monkeypatch):
    monkeypatch.setattr(context, "is_plain", lambda t: True)
    with FakeTensorMode():
        for dtype in (*DTYPES, torch.float16, torch.bfloat16):
            x = torch.empty(2, 8, 8, dtype=dtype, device="cuda")
            assert gpu.suits(x, x) == (dtype in DTYPES)
            assert not gpu.suits(x.mT, x)
            tall = torch.empty(2, 8, 6, dtype=dtype, device="cuda")
            assert not gpu.suits(tall, tall)
            host = torch.empty(2, 8, 8, dtype=dtype)
            assert not gpu.suits(host, host)


def test_fused_is_an_argument_of_the_optimiser(on_gpu, monkeypatch):
    steps = []
    monkeypatch.setattr(gpu, "step_of_rank_one_", lambda x, *_: steps.append(x) or torch.zeros((), dtype=torch.uint8))
    p = geoopt.ManifoldParameter(torch.eye(8), manifold=UnitaryLowRank(1))
    p.grad = torch.ones(8, 8)
    for fused, count in ((True, 1), (False, 1)):
        optim.RiemannianSGD([p], lr=0.1, fused=fused).step()
        assert len(steps) == count
    for kind in (optim.RiemannianSGD, optim.RiemannianAdam):
        with pytest.raises(TypeError, match="`fused` must be True or False"):
            kind([p], lr=0.1, fused=None)


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda p: optim.RiemannianAdam([p]), 1),
        (lambda p: optim.RiemannianSGD([p], lr=0.1, momentum=0.9), 1),
        (lambda p: optim.RiemannianAdam([p], fused=False), 0),
        (lambda p: optim.RiemannianAdam([p], feedback=True), 0),
        (lambda p: optim.RiemannianSGD([p], lr=0.1, momentum=0.9, nesterov=True), 0),
        (lambda p: optim.RiemannianSGD([p], lr=0.1, feedback=True), 0),
    ],
)
def test_steps_with_moments_use_kernels_where_they_can(on_gpu, monkeypatch, make, count):
    steps, follow_ = [], gpu.follow_
    monkeypatch.setattr(gpu, "follow_", lambda x, *others: steps.append(x) or follow_(x, *others))
    p = geoopt.ManifoldParameter(torch.eye(8), manifold=UnitaryLowRank(1))
    p.grad = torch.ones(8, 8).triu()
    make(p).step()
    assert len(steps) == count
    assert error(p.detach(), torch.eye(8)) > 0


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from projunn_manifold.linalg import gpu_kernels as kernels

kinds = [(number, parts, 16) for number in ("*fp32", "*fp64") for parts in (1, 2)]
for number, parts, rows in (*kinds, ("*fp32", 2, 8), ("*fp64", 2, 4)):
    tiles = {"PARTS": parts, "ROWS": rows, "TILE": 256}
    x = lambda *names: dict.fromkeys(names, number)
    sketch = {**x("g", "z", "y", "back"), "n": "i32"}
    tangent = {**x("x", "b", "y", "xb", "images"), "gram": "*fp64", "n": "i32"}
    update = {**x("x", "xb", "y", "right"), "gram": "*fp64", "rate": "*fp64", "lost": "*u8", "limit": "fp32"}
    update |= {"n": "i32"}
    jobs = [(kernels.sketch, sketch, tiles), (kernels.tangent, tangent, tiles)]
    last = {**tiles, "LEAST": 1e-76}
    jobs += [(kernels.update, update, {**last, "POLAR": polar}) for polar in (True, False)]
    doubles, marks = lambda *names: dict.fromkeys(names, "*fp64"), {"lost": "*u8"}
    measure = {**doubles("gram", "square"), **marks}
    accumulate = {**x("u", "xb", "y", "right"), **doubles("gram"), **marks, **doubles("kept", "weight")}
    accumulate |= {"n": "i32"}
    frame = {**x("x", "u", "q", "p", "images"), **doubles("inner"), "n": "i32"}
    turn = {**x("x", "u", "p", "q", "images"), **doubles("inner", "rate"), **marks, "limit": "fp32"}
    turn |= {"n": "i32"}
    jobs += [
        (kernels.measure, measure, {"LIMIT": 1.7e308, "LEAST": 1e-76, "PARTS": parts}),
        (kernels.accumulate, accumulate, last),
        (kernels.power, {**x("u", "q", "back"), "n": "i32"}, tiles),
        (kernels.frame, frame, tiles),
    ]
    straighten = {**x("v", "q"), "m": "i32"}
    long = {"EPS": 1e-7, "PARTS": parts, "TILE": 1024}
    jobs += [(kernels.straighten, straighten, {**long, "LAST": value}) for value in (True, False)]
    jobs += [(kernels.turn, turn, {**tiles, "POLAR": polar}) for polar in (True, False)]
    for kernel, arguments, constants in jobs:
        source = ASTSource(kernel, {**arguments, **dict.fromkeys(constants, "constexpr")}, constants)
        for capability in (80, 90):
            assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
            print(kernel.__name__)
"""


def test_the_kernels_compile_without_a_gpu(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.split()) == 144
