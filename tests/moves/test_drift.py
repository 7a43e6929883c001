"""The drift correction: fair turns, and columns that are orthonormal again, whatever else is wrong."""

import math

import geoopt
import pytest
import torch
from helpers import DTYPES, bound, double, error

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, optim
from projunn_manifold.linalg import dense
from projunn_manifold.moves import drift


@pytest.mark.parametrize(("m", "sweep"), [(7, 40), (32, 512), (100, 512), (128, 30), (600, 512), (2048, 512)])
@pytest.mark.parametrize("rate", [1, 2, 4])
def test_every_column_has_its_turn(m, sweep, rate):
    schedule = drift.Schedule(sweep)
    period = max(m, sweep) / rate
    turns, last, longest = torch.zeros(m), torch.zeros(m), torch.zeros(m)
    for gradient in range(1, int(20 * period) + 1):
        start = schedule.first_due_column(gradient, m, rate)
        if start is not None:
            assert 0 <= start <= m - drift.width(m)
            due = slice(start, start + drift.width(m))
            longest[due] = torch.maximum(longest[due], gradient - last[due])
            turns[due], last[due] = turns[due] + 1, gradient
    assert turns.min() >= 17
    assert turns[: m - drift.width(m)].max() <= 23
    assert longest.max() <= 2.5 * period


@pytest.mark.parametrize("sharers", [2, 3, 7, 55])
@pytest.mark.parametrize("optimizer", [geoopt.optim.RiemannianSGD, optim.RiemannianSGD])
def test_parameters_that_share_a_manifold_are_all_corrected(draw, sharers, optimizer):
    manifold = UnitaryLowRank(1, sweep=16)
    points = [draw.point(8, 8, dtype=torch.float64) * (1 + 1e-3) for _ in range(sharers)]
    parameters = [geoopt.ManifoldParameter(x, manifold=manifold) for x in points]
    step = optimizer(parameters, lr=0.1).step
    for _ in range(40):
        for p in parameters:
            p.grad = draw.matrix(8, 1, dtype=torch.float64) @ draw.matrix(1, 8, dtype=torch.float64)
        step()
    assert max(dense.unitarity_error(p).item() for p in parameters) <= 1e-5


def test_no_sweep_no_turn():
    schedule = drift.Schedule(None)
    assert all(schedule.first_due_column(t, m) is None for m in (1, 64) for t in range(100))


@pytest.mark.parametrize("shape", [(5, 5), (40, 33), (64, 64), (3, 48, 40)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("off", [1e-3, 1e-2])
def test_a_sweep_puts_a_point_back(draw, shape, dtype, off):
    x = draw.point(*shape, dtype=dtype)
    x = x + draw.matrix(*shape, dtype=dtype) * (off / math.sqrt(shape[-2]))
    errors = [dense.unitarity_error(x).max().item()]
    for _ in range(4):
        width = drift.width(shape[-1])
        for start in range(0, shape[-1], width):
            drift.correct_columns_(x, min(start, shape[-1] - width))
        errors.append(dense.unitarity_error(x).max().item())
    assert errors[0] > off / 2
    assert errors[1] <= 4 * math.sqrt(shape[-1]) * off**2
    assert errors[4] <= bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_corrected_block_is_orthonormal_and_orthogonal_to_the_rest(draw, dtype):
    x = draw.point(80, 80, dtype=dtype)
    x += draw.matrix(80, 80, dtype=dtype) * 1e-2 * torch.finfo(dtype).eps ** 0.5
    before = x.clone()
    drift.correct_columns_(x, 16)
    end = 16 + drift.width(80)
    gram = double(x).mH @ double(x[:, 16:end])
    gram[16:end].diagonal().sub_(1)
    assert torch.linalg.matrix_norm(gram) <= 20 * bound(dtype)
    assert torch.equal(x[:, :16], before[:, :16])
    assert torch.equal(x[:, end:], before[:, end:])


def test_columns_too_far_off_are_left_and_spoil_no_other(draw):
    x = draw.point(40, 40, dtype=torch.float64)
    x[:, 7] = (x[:, 7] + x[:, 30]) / 2**0.5
    before, left = x.clone(), 0
    for _ in range(50):
        for start in range(0, 40, drift.width(40)):
            left += int(drift.correct_columns_(x, start))
    assert left == 100
    assert torch.equal(x[:, [7, 30]], before[:, [7, 30]])
    assert torch.dist(x, before) <= bound(torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 0.5, 1.3, 1.6, 3.0, 1e3])
def test_a_column_of_any_norm_comes_back(draw, dtype, scale):
    x = draw.point(40, 40, dtype=dtype)
    x[:, 7] *= scale
    for _ in range(5):
        for start in range(0, 40, drift.width(40)):
            assert drift.correct_columns_(x, start) == 0
    assert dense.unitarity_error(x) <= bound(dtype)


def test_a_point_that_is_not_finite_is_left(draw):
    x = draw.point(40, 40, dtype=torch.float64)
    x[3, 7] = torch.nan
    before = x.clone()
    assert drift.correct_columns_(x, 20) == drift.width(40)
    assert torch.equal(x.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("variant", [UnitaryLowRank, UnitaryLowRankExact])
@pytest.mark.parametrize("how", ["step_", "geoopt", "in place"])
def test_rounding_does_not_add_up(draw, variant, how):
    n, steps = 32, 3000
    errors = {}
    for sweep in (64, None):
        manifold = variant(1, sweep=sweep)
        p = geoopt.ManifoldParameter(draw.point(n, n, dtype=torch.float32), manifold=manifold)
        optimizer = (optim if how == "in place" else geoopt.optim).RiemannianSGD([p], lr=1.0)
        for _ in range(steps):
            g = draw.matrix(n, 1, dtype=torch.float32) @ draw.matrix(1, n, dtype=torch.float32) / n
            p.grad = g
            manifold.step_(p, g, 1.0) if how == "step_" else optimizer.step()
        errors[sweep] = dense.unitarity_error(p).item()
    assert errors[64] <= 5e-7
    assert errors[None] >= 3 * errors[64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(4, 4), (8, 8), (200, 8, 8), (50, 16, 16)], ids=str)
def test_small_matrices_and_large_stacks_stay_near(draw, shape, dtype):
    """Their error is a mean of few columns, or the worst of many matrices: more than that of one large matrix."""
    manifold, worst = UnitaryLowRank(1), 0.0
    p = geoopt.ManifoldParameter(draw.point(*shape, dtype=dtype), manifold=manifold)
    for step in range(2000):
        manifold.step_(p, draw.matrix(*shape, dtype=dtype), 0.05)
        if step % 50 == 49:
            worst = max(worst, dense.unitarity_error(p).max().item())
    assert worst < 3e-6


@pytest.mark.parametrize("variant", [UnitaryLowRank, UnitaryLowRankExact])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("m", [32, 31, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_no_step_enlarges_the_error_it_finds(draw, variant, k, m, dtype):
    """Large steps in one lasting direction, where an error in that direction could grow from step to step."""
    x = draw.point(32, m, dtype=dtype)
    x += draw.matrix(32, m, dtype=dtype) * 1e-4
    start = dense.unitarity_error(x).item()
    manifold, g, turn = variant(k, sweep=None), draw.matrix(32, m, dtype=dtype), draw.matrix(m, m, dtype=dtype)
    for _ in range(200):
        manifold.step_(x, (x @ (g.mH @ x) + g) / 30 if m == 32 else x @ (turn - turn.mH) / 10 + g / 10, 1.0)
    assert dense.unitarity_error(x).item() <= 1.05 * start


def test_the_correction_is_a_part_of_optimisers_steps_only(draw):
    x = draw.point(8, 8, dtype=torch.float64).mul_(1 + 1e-6)
    manifold = UnitaryLowRank(1, sweep=1)
    u = draw.tangent(draw.point(8, 8, dtype=torch.float64), 0.0)
    assert error(manifold.retr(x, u), x) <= 10 * bound(torch.float64)  # a differentiable map: nothing but the map
    with torch.no_grad():
        assert error(manifold.retr(x, u), x) <= 10 * bound(torch.float64)  # before the first gradient nothing is due
        for _ in range(40):
            manifold.egrad2rgrad(x, x)
            x = manifold.retr(x, u)
        assert dense.unitarity_error(x) <= 1e-10
    assert manifold.sweep == 1
