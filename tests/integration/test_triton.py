"""The kernels for a GPU: in Triton's interpreter the exact maps, and machine code for two generations of GPUs."""

import os
import subprocess
import sys

import geoopt
import pytest
import torch
from helpers import bound, double, error

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, optim, reference
from projunn_manifold.linalg import dense, gpu, products
from projunn_manifold.linalg.products import matrix

pytestmark = [pytest.mark.integration]
pytest.importorskip("triton")


@pytest.fixture
def on_gpu(monkeypatch):
    """The CPU as the device of the kernels."""
    monkeypatch.setattr(gpu, "suits", lambda x, g: x.shape[-1] == x.shape[-2] and not x.is_complex())
    monkeypatch.setattr(products, "compiled", None)


MAPS = {"D": (UnitaryLowRank, reference.retraction), "T": (UnitaryLowRankExact, reference.geodesic)}


@pytest.mark.parametrize("length", [1e-6, 0.1, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(16, 16), (300, 300), (3, 70, 70)], ids=str)
@pytest.mark.parametrize(("kind", "map_"), MAPS.values(), ids=MAPS)
def test_a_step_is_the_exact_map_and_draws_as_without_kernels(on_gpu, kind, map_, shape, dtype, length):
    draw = torch.Generator().manual_seed(0)
    manifold = kind(1, sweep=None)
    x, g = manifold.random(shape, dtype=dtype, generator=draw), torch.randn(shape, dtype=dtype, generator=draw)
    sketch = double(manifold.sketcher.factors(matrix(x), g).dense())
    u = reference.gradient(double(x), sketch)
    lr = length / torch.linalg.matrix_norm(u, 2).max().item()
    y = manifold.step_(x.clone(), g, lr)
    assert error(y, map_(double(x), -lr * u)) <= bound(dtype, length)
    assert dense.unitarity_error(y).max() <= bound(dtype, length)


def test_points_and_gradients_at_right_angles_or_parallel_take_the_same_kernels(on_gpu):
    x = torch.eye(20, dtype=torch.float64)
    manifold = UnitaryLowRank(1, sweep=None)
    for g in (x.clone(), torch.ones(20, 20, dtype=torch.float64), torch.zeros(20, 20, dtype=torch.float64)):
        sketch = manifold.sketcher.factors(matrix(x), g).dense()
        y = manifold.step_(x.clone(), g, 0.3)
        assert error(y, reference.retraction(x, -0.3 * reference.gradient(x, sketch))) <= bound(torch.float64, 2.0)


def test_matrices_that_are_not_finite_are_left_and_counted(on_gpu):
    manifold, draw = UnitaryLowRank(1, sweep=None), torch.Generator().manual_seed(0)
    p = geoopt.ManifoldParameter(manifold.random(3, 20, 20, generator=draw), manifold=manifold)
    p.grad = torch.randn(3, 20, 20, generator=draw)
    p.grad[1, 2, 3] = torch.nan
    before, version = p.detach().clone(), p._version
    optim.RiemannianSGD([p], lr=0.1).step()
    assert [torch.equal(a, b) for a, b in zip(p, before, strict=True)] == [False, True, False]
    assert manifold.pop_faults() == (1, 0, 0)
    assert p._version > version


def test_a_trained_weight_stays_on_the_manifold(on_gpu):
    manifold, draw = UnitaryLowRank(1), torch.Generator().manual_seed(0)
    p = geoopt.ManifoldParameter(manifold.random(24, 24, generator=draw), manifold=manifold)
    optimizer = optim.RiemannianSGD([p], lr=0.3)
    for _ in range(150):
        p.grad = torch.randn(24, 24, generator=draw)
        optimizer.step()
    assert dense.unitarity_error(p.detach()) <= dense.tolerance(torch.float32, 24)


def test_fused_is_an_argument_of_the_optimiser(on_gpu, monkeypatch):
    steps = []
    monkeypatch.setattr(gpu, "step_of_rank_one_", lambda x, *_: steps.append(x) or torch.zeros((), dtype=torch.uint8))
    p = geoopt.ManifoldParameter(torch.eye(8), manifold=UnitaryLowRank(1))
    p.grad = torch.ones(8, 8)
    for fused, count in ((True, 1), (False, 1)):
        optim.RiemannianSGD([p], lr=0.1, fused=fused).step()
        assert len(steps) == count
    with pytest.raises(TypeError, match="`fused` must be True or False"):
        optim.RiemannianSGD([p], lr=0.1, fused=None)


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from projunn_manifold.linalg import gpu_kernels as kernels

tiles = {"ROWS": 16, "TILE": 256}
for number in ("*fp32", "*fp64"):
    x = lambda *names: dict.fromkeys(names, number)
    sketch = {**x("g", "z", "y", "back"), "n": "i32"}
    tangent = {**x("x", "b", "y", "xb", "images"), "gram": "*fp64", "n": "i32"}
    update = {**x("x", "xb", "y", "right"), "gram": "*fp64", "rate": "*fp64", "lost": "*u8", "limit": "fp32"}
    update |= {"n": "i32", "blocks": "i32"}
    jobs = [(kernels.sketch, sketch, tiles), (kernels.tangent, tangent, tiles)]
    jobs += [(kernels.update, update, {**tiles, "POLAR": polar, "BLOCKS": 64}) for polar in (True, False)]
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
    assert len(result.stdout.split()) == 16
