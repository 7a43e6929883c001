"""What goes wrong in training: gradients that are not finite, of odd kinds and sizes; lower precision around."""

import copy

import geoopt
import pytest
import torch
from helpers import DTYPES, bound, double, error

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, context, optim, projunn_d, projunn_t
from projunn_manifold.linalg import dense
from projunn_manifold.manifold.state import Faults
from projunn_manifold.sketching.samplers import SAMPLERS

VARIANTS = [UnitaryLowRank, UnitaryLowRankExact]
STEPS = {
    "step_": lambda p: lambda: p.manifold.step_(p, p.grad, 0.1),
    "geoopt": lambda p: geoopt.optim.RiemannianSGD([p], lr=0.1).step,
    "sgd": lambda p: optim.RiemannianSGD([p], lr=0.1).step,
    "momentum": lambda p: optim.RiemannianSGD([p], lr=0.1, momentum=0.9).step,
    "adam": lambda p: optim.RiemannianAdam([p], lr=0.1).step,
}


def off_by(x):
    return dense.unitarity_error(x).max().item()


def repeat(step, times):
    for _ in range(times):
        step()


def parameter(draw, manifold, shape=(12, 12), dtype=torch.float32):
    p = geoopt.ManifoldParameter(draw.point(*shape, dtype=dtype), manifold=manifold)
    p.grad = draw.matrix(*shape, dtype=dtype)
    return p


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("k", [1, 3, None])
@pytest.mark.parametrize("how", STEPS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_after_a_refused_gradient_all_goes_on_as_if_it_had_not_been(draw, sampler, k, how, bad):
    p = parameter(draw, UnitaryLowRank(k, sampler=sampler))
    q = copy.deepcopy(p)
    good, p.grad = p.grad, p.grad.clone()
    p.grad[3, 5] = bad
    step = STEPS[how](p)
    start = p.detach().clone()
    with pytest.raises(ValueError, match=r"gradient of shape \(12, 12\) has (1 non-finite entries of 144|.*too large)"):
        step()
    assert torch.equal(p, start)
    p.grad, q.grad = good, good.clone()
    step(), STEPS[how](q)()
    assert torch.equal(p, q)
    assert p.manifold._state.gradients == 1


@pytest.mark.parametrize("device", ["host", "as on CUDA"])
@pytest.mark.parametrize("sampler", ["lsi", "subspace"])
@pytest.mark.parametrize("shape", [(12, 12), (4, 12, 12), (3, 14, 9)], ids=str)
@pytest.mark.parametrize("k", [1, 3, None])
@pytest.mark.parametrize("how", STEPS)
def test_skipped_gradients_count_as_zero(draw, monkeypatch, device, sampler, shape, k, how):
    manifold = UnitaryLowRank(k, sampler=sampler, non_finite="skip" if device == "host" else "raise")
    if device == "as on CUDA":
        monkeypatch.setattr(context, "readable", lambda x: False)
    p = parameter(draw, manifold, shape)
    p.grad.view(-1, *shape[-2:])[-1, 3, 5] = torch.nan
    zeroed = p.grad.clone()
    zeroed.view(-1, *shape[-2:])[-1] = 0
    q = geoopt.ManifoldParameter(p.detach().clone(), manifold=UnitaryLowRank(k, sampler=sampler))
    q.grad = zeroed
    STEPS[how](p)(), STEPS[how](q)()
    assert torch.isfinite(p).all()
    if how == "geoopt" or how in ("step_", "sgd"):
        assert torch.equal(p.view(-1, *shape[-2:])[-1], q.view(-1, *shape[-2:])[-1])
    assert error(p, q) <= bound(torch.float32)
    assert manifold.pop_faults() == Faults(1, 0)
    assert manifold.pop_faults() == Faults(0, 0)


@pytest.mark.parametrize("shape", [(12, 12), (1, 12, 12), (14, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("k", [1, 3, None])
@pytest.mark.parametrize("how", STEPS)
def test_gradients_whose_squares_overflow_double_precision_are_skipped(draw, how, k, dtype, shape):
    p = parameter(draw, UnitaryLowRank(k, non_finite="skip"), shape, dtype)
    start = p.detach().clone()
    p.grad = 1e200 * draw.matrix(*shape, dtype=dtype)
    STEPS[how](p)()
    assert torch.equal(p, start)
    assert p.manifold.pop_faults() == Faults(1, 0)


@pytest.mark.parametrize("device", ["host", "as on CUDA"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [1, 3])
def test_steps_beyond_all_rounding_are_skipped(draw, monkeypatch, device, variant, k):
    manifold = variant(k, non_finite="skip")
    if device == "as on CUDA":
        monkeypatch.setattr(context, "readable", lambda x: False)
    p = parameter(draw, manifold, (2, 12, 12))
    start = p.detach().clone()
    manifold.step_(p, p.grad, torch.tensor([1e20, 0.1]))
    assert torch.equal(p[0], start[0])
    assert not torch.equal(p[1], start[1])
    assert manifold.pop_faults() == Faults(1, 0)


@pytest.mark.parametrize("bad", [torch.nan, 1e20])
@pytest.mark.parametrize("how", ["momentum", "adam"])
def test_a_bad_first_gradient_leaves_no_trace_in_the_moments(draw, how, bad):
    p = parameter(draw, UnitaryLowRank(non_finite="skip"))
    good, p.grad = p.grad, p.grad.clone()
    p.grad[3, 5] = bad
    step, start = STEPS[how](p), p.detach().clone()
    step()
    assert torch.equal(p, start)
    p.grad = good
    step()
    assert 1e-3 < torch.dist(p, start) < 10
    assert p.manifold.pop_faults() == Faults(1, 0)


def test_a_refused_step_leaves_the_count(draw):
    p = parameter(draw, UnitaryLowRank())
    q, start = copy.deepcopy(p), p.detach().clone()
    for lr, kind in ((1e30, ValueError), (float("nan"), ValueError), (torch.ones(3), ValueError), (1j, TypeError)):
        with pytest.raises(kind):
            p.manifold.step_(p, p.grad, lr)
        assert torch.equal(p, start)
    assert torch.equal(p.manifold.step_(p, p.grad, 0.1), q.manifold.step_(q, p.grad, 0.1))


@pytest.mark.parametrize("scale", [1e-25, 1e20, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(12, 12), (14, 9)], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_factors_at_the_ends_of_the_range(draw, path, scale, dtype, shape, k):
    x, (a, b) = draw.point(*shape, dtype=dtype), draw.factors(shape, k, dtype, 0.3)
    for move in (projunn_d, projunn_t):
        assert error(move(x, a * scale, b / scale), move(double(x), double(a), double(b))) <= bound(dtype)


def test_a_point_that_is_not_finite_is_never_skipped(draw):
    p = parameter(draw, UnitaryLowRank(non_finite="skip"))
    p.detach()[0, 0] = torch.nan
    with pytest.raises(ValueError, match="point of shape"):
        p.manifold.step_(p, p.grad, 0.1)
    with pytest.raises(ValueError, match="non_finite must be 'raise' or 'skip', got 'ignore'"):
        UnitaryLowRank(non_finite="ignore")


@pytest.mark.parametrize("how", STEPS)
@pytest.mark.parametrize("k", [1, 2, 9, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_every_kind(draw, how, k, dtype):
    """Each step is the one a plain contiguous gradient of the same values makes."""
    g = draw.matrix(9, 9, dtype=dtype)
    row = draw.matrix(1, 9, dtype=dtype)
    kinds = {
        "zero": torch.zeros_like(g),
        "rank-deficient": g[:, :2] @ g[:2],
        "expanded": row.expand(9, 9),
        "transposed": g.mT,
        "strided": torch.stack((g, g), -1)[..., 0],
        "conjugate": g.conj(),
        "adjoint": g.mH,
        "negative": torch.conj(1j * g.real).imag if not dtype.is_complex else torch.conj(g),
    }
    x = draw.point(9, 9, dtype=dtype)
    for kind, gradient in kinds.items():
        points = []
        for given in (gradient, gradient.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)):
            p = geoopt.ManifoldParameter(x.clone(), manifold=UnitaryLowRank(k))
            p.grad = given
            if how == "geoopt" and kind == "expanded":
                given = p.grad = given.clone()  # geoopt writes to the gradient
            STEPS[how](p)()
            points.append(p.detach())
            assert off_by(p) <= bound(dtype)
        assert error(*points) <= 4 * bound(dtype), kind
        assert torch.equal(points[0], x) == (kind == "zero"), kind


@pytest.mark.parametrize("how", STEPS)
def test_gradients_that_are_missing(draw, how):
    p = parameter(draw, UnitaryLowRank())
    start, p.grad = p.detach().clone(), None
    if how == "step_":
        with pytest.raises(TypeError, match=r"backward\(\) first"):
            STEPS[how](p)()
    else:
        STEPS[how](p)()
    assert torch.equal(p, start)
    assert p.manifold._state.gradients == 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [1, 2, 3, 5, None])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 3), (2, 1), (3, 2), (5, 3), (0, 4, 4), (2, 0, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_smallest_points(draw, variant, k, shape, dtype):
    for how in STEPS:
        p = parameter(draw, variant(k), shape, dtype)
        step = STEPS[how](p)
        for _ in range(3):
            p.grad = draw.matrix(*shape, dtype=dtype)
            step()
        assert p.shape == shape
        assert not p.numel() or off_by(p) <= bound(dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [1, 2, 8, None])
@pytest.mark.parametrize("shape", [(16, 16), (20, 12), (2, 9, 9)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_learning_rates_from_nothing_to_one_over_eps(draw, variant, k, shape, dtype):
    """‖Y^H Y - I‖_F/√m ≤ 50 eps max(1, ‖u‖₂) while ‖u‖₂ ≤ 1/eps; far beyond a ValueError."""
    x, g = draw.point(*shape, dtype=dtype), draw.matrix(*shape, dtype=dtype)
    manifold = variant(k, sampler="svd", sweep=None)  # draws nothing, so all steps share their direction
    with torch.no_grad():
        size = torch.linalg.matrix_norm(double(manifold.egrad2rgrad(x, g).clone()), 2).max().item()
    eps = torch.finfo(dtype).eps
    assert torch.equal(manifold.step_(x.clone(), g, 0.0), x)
    for length in (1e-30, eps, 0.5, 3.0, 1e3, 0.1 / eps, 1 / eps):
        y = manifold.step_(x.clone(), g, length / size)
        assert torch.isfinite(y).all()
        assert off_by(y) <= bound(dtype, length), length
    start = x.clone()
    with pytest.raises(ValueError, match=r"too large|non-finite"):
        manifold.step_(start, g, 1e4 / eps**2)
    assert torch.equal(start, x)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", STEPS)
@pytest.mark.parametrize("k", [1, 3, None])
def test_steps_inside_autocast_keep_their_precision(draw, half, how, k):
    p = parameter(draw, UnitaryLowRank(k))
    q = copy.deepcopy(p)
    q.grad = p.grad.clone()
    with torch.autocast("cpu", dtype=half):
        STEPS[how](p)()
    STEPS[how](q)()
    assert torch.equal(p, q)


def test_maps_inside_autocast_keep_their_precision(draw):
    x, (a, b) = draw.point(9, 9, dtype=torch.float32), draw.factors((9, 9), 2, torch.float32)
    u, step = draw.tangent(x, 0.5), a @ b.mH
    manifold = UnitaryLowRank(2)
    calls = [
        lambda: projunn_d(x, a, b),
        lambda: projunn_t(x, a, b),
        lambda: manifold.retr(x, u),
        lambda: manifold.expmap_transp(x, u, u)[1],
        lambda: manifold.retr_transp_(x.clone(), u),
        lambda: manifold.proju(x, step),
        lambda: manifold.projx(x + 0.1 * u),
        lambda: manifold.inner(x, u),
        lambda: manifold.transp(x, manifold.retr(x, u), u),
        lambda: manifold.dist(x, manifold.retr(x, u)),
    ]
    for call in calls:
        expected = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(call(), expected)


def test_autocast_training_with_a_gradient_scaler(draw):
    p = parameter(draw, UnitaryLowRank(1))
    optimizer = optim.RiemannianSGD([p], lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    x = draw.matrix(6, 12, dtype=torch.float32)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ p
        assert y.dtype == torch.bfloat16
        loss = (y.float() - x.flip(-1)).square().mean()
        scaler.scale(loss).backward()
        if step == 10:
            p.grad[0, 0] = torch.inf
        before, count = p.detach().clone(), p.manifold._state.gradients
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(p, before) == (step == 10)
        assert p.manifold._state.gradients == count + (step != 10)
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert off_by(p) <= bound(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128], ids=str)
@pytest.mark.parametrize("off", [1e-4, 1e-2])
def test_a_start_off_the_manifold_converges(draw, recwarn, dtype, off):
    """Off by up to 1e-2 in ‖X^H X - I‖_F/√m, the correction brings a point back while it trains."""
    x = draw.point(48, 48, dtype=dtype)
    x += draw.matrix(48, 48, dtype=dtype) * (off / 48**0.5)
    p = geoopt.ManifoldParameter(
        x * (off / off_by(x)) + (1 - off / off_by(x)) * x, manifold=UnitaryLowRank(1, sweep=48)
    )
    optimizer = geoopt.optim.RiemannianSGD([p], lr=0.1, momentum=0.9)
    for _ in range(600):
        p.grad = draw.matrix(48, 48, dtype=dtype)
        optimizer.step()
    assert off_by(p) <= (1e-6 if dtype == torch.float32 else 5e-15)
    assert not recwarn.list


@pytest.mark.parametrize("how", ["step_", "geoopt", "sgd"])
def test_a_start_far_off_the_manifold_is_said(draw, how):
    manifold = UnitaryLowRank(1, sweep=32)
    p = geoopt.ManifoldParameter(draw.matrix(32, 32, dtype=torch.float32), manifold=manifold)
    p.grad = draw.matrix(32, 32, dtype=torch.float32)
    step = STEPS[how](p)
    with pytest.warns(RuntimeWarning, match=r"parameter of shape \(32, 32\) starts off the manifold.* about .*projx"):
        step()
    with pytest.warns(RuntimeWarning, match=r"point of shape \(32, 32\) is off the manifold.*projx"):
        repeat(step, 40)
    assert manifold.pop_faults().uncorrected > 0
    with torch.no_grad():
        p.proj_()
    repeat(step, 40)
    assert manifold.pop_faults() == Faults(0, 0)
    assert off_by(p) <= bound(torch.float32)


def test_sketches_do_not_depend_on_other_draws_or_threads(draw):
    x, g = draw.point(300, 300, dtype=torch.float32), draw.matrix(300, 300, dtype=torch.float32)
    points, state = [], torch.get_rng_state()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(threads)
        manifold, y = UnitaryLowRank(2), x.clone()
        for _ in range(5):
            torch.rand(threads)
            manifold.step_(y, g, 0.1)
        points.append(y)
    torch.set_num_threads(1)
    torch.set_rng_state(state)
    assert error(*points) <= bound(torch.float32)


@pytest.mark.filterwarnings("ignore:a parameter of shape")
@pytest.mark.parametrize("size", [1e8, 1e25])
@pytest.mark.parametrize("kind", [geoopt.optim.RiemannianSGD, optim.RiemannianSGD, optim.RiemannianAdam])
def test_an_error_at_a_start_off_the_manifold_names_the_start(draw, kind, size):
    w = geoopt.ManifoldParameter(size * draw.matrix(12, 12, dtype=torch.float32), manifold=UnitaryLowRank(1))
    start = w.detach().clone()
    w.grad = draw.matrix(12, 12, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"off the manifold.*p.copy_\(p.manifold.projx\(p\)\)") as caught:
        kind([w], lr=0.1).step()
    assert "learning rate" not in str(caught.value)
    assert torch.equal(w, start)


def test_an_error_at_a_point_of_the_manifold_still_names_the_rate(draw):
    w = geoopt.ManifoldParameter(draw.point(12, 12, dtype=torch.float32), manifold=UnitaryLowRank(1))
    w.grad = draw.matrix(12, 12, dtype=torch.float32)
    with pytest.raises(ValueError, match="look at the learning rate"):
        optim.RiemannianSGD([w], lr=1e12).step()
