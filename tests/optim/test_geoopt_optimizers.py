"""geoopt's unmodified optimisers on UnitaryLowRank: right steps, tangent momentum, no dense work, no lost term.

A gradient of rank one is represented exactly at k = 1, and so are all its momenta when every call brings the
same gradient: then k = 1 must follow k = None, the dense and exact path, to rounding.
"""

import copy

import geoopt
import pytest
import torch
from helpers import DTYPES, bound, double, error
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact
from projunn_manifold.linalg import dense, products
from projunn_manifold.sketching.factored_tensor import FactoredTensor, factors_at
from projunn_manifold.sketching.lowrank import LowRank
from projunn_manifold.sketching.samplers import SAMPLERS

VARIANTS = [UnitaryLowRank, UnitaryLowRankExact]
SHAPES = [(12, 12), (14, 6), (3, 10, 10)]


class AdamOfMainBranch(geoopt.optim.RiemannianAdam):
    """geoopt's development version projects every point before its step; 0.5.1 does not."""

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for point in group["params"]:
                    if point.grad is not None:
                        point.copy_(point.manifold.projx(point))
        return super().step(closure)


OPTIMIZERS = {
    "sgd": lambda p: geoopt.optim.RiemannianSGD(p, lr=0.1),
    "tensor lr": lambda p: geoopt.optim.RiemannianSGD(p, lr=torch.tensor(0.1)),
    "momentum": lambda p: geoopt.optim.RiemannianSGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "nesterov": lambda p: geoopt.optim.RiemannianSGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: geoopt.optim.RiemannianAdam(p, lr=0.1),
    "adam, stabilize": lambda p: geoopt.optim.RiemannianAdam(p, lr=0.1, stabilize=2),
    "adam of geoopt's main branch": lambda p: AdamOfMainBranch(p, lr=0.1),
}

DECAYING = {
    "sgd, decay": lambda p: geoopt.optim.RiemannianSGD(p, lr=0.1, weight_decay=0.05),
    "nesterov, decay": lambda p: geoopt.optim.RiemannianSGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    "adam, decay": lambda p: geoopt.optim.RiemannianAdam(p, lr=0.1, weight_decay=0.05),
}


def parameter(draw, variant, k, shape, dtype, start=None):
    manifold = variant(k)
    x = draw.point(*shape, dtype=dtype) if start is None else start.clone()
    return geoopt.ManifoldParameter(x, manifold=manifold)


def buffers(optimizer, w):
    return {key: value for key, value in optimizer.state[w].items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("how", ["dense", "factored", "accumulated", "accumulated factored", "clipped", "shared"])
def test_a_rank_one_gradient_gives_the_full_rank_trajectory(draw, name, variant, shape, dtype, how):
    start = draw.point(*shape, dtype=dtype)
    a, b = draw.factors(shape, 1, dtype)
    trajectories, momenta = [], []
    for k in (1, None):
        w = parameter(draw, variant, k, shape, dtype, start)
        optimizers = [OPTIMIZERS[name]([w])]
        if how == "shared":
            optimizers.append(geoopt.optim.RiemannianSGD([w], lr=0.03))
        points = []
        for _ in range(4):
            w.grad = gradient(a, b, how if k == 1 else how.replace(" factored", "").replace("factored", "dense"))
            if how == "clipped":
                torch.nn.utils.clip_grad_norm_([w], 0.7)
            for optimizer in optimizers:
                optimizer.step()
                assert not any(isinstance(value, FactoredTensor) for value in buffers(optimizer, w).values())
            points.append(w.detach().clone())
        trajectories.append(points)
        momenta.append([v for key, v in buffers(optimizers[0], w).items() if key in ("momentum_buffer", "exp_avg")])
    for ours, formed in zip(*trajectories, strict=True):
        assert error(ours, formed) <= 4 * bound(dtype)
    for ours, formed in zip(*momenta, strict=True):
        assert error(ours, formed) <= 4 * bound(dtype, float(torch.linalg.matrix_norm(formed).max()))
    assert error(trajectories[0][-1], start) > 1e-2


def gradient(a, b, how):
    """The same gradient a b^H, brought in different ways."""
    factored = FactoredTensor(LowRank(a, b))
    if how == "factored":
        return factored
    if not how.startswith("accumulated"):
        return a @ b.mH
    total = 0.25 * factored if how == "accumulated factored" else 0.25 * (a @ b.mH)
    total.add_(FactoredTensor(LowRank(a, b)), alpha=0.75)
    return total


@pytest.mark.parametrize("name", {**OPTIMIZERS, **DECAYING})
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", [(12, 12), (14, 6)], ids=str)
def test_full_rank_gradients_keep_point_and_momentum_on_their_spaces(draw, name, variant, shape, k, dtype):
    w = parameter(draw, variant, k, shape, dtype)
    optimizer = (OPTIMIZERS | DECAYING)[name]([w])
    target = draw.point(*shape, dtype=dtype)
    for _ in range(12):
        optimizer.zero_grad()
        (w - target).abs().square().sum().backward()
        optimizer.step()
    assert dense.unitarity_error(w).item() <= bound(dtype)
    if name.startswith("adam"):  # RiemannianSGD's first buffer is the Euclidean gradient
        momentum = optimizer.state[w]["exp_avg"]
        normal = dense.sym(double(w.detach()).mH @ double(momentum))
        assert error(normal, torch.zeros_like(normal)) <= bound(dtype, float(torch.linalg.matrix_norm(momentum)))
    assert w.grad.is_contiguous()
    assert w.is_contiguous()


@pytest.mark.parametrize("name", DECAYING)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(40, 40), (60, 30)], ids=str)
def test_weight_decay_does_not_change_the_way(draw, name, variant, shape):
    """λX is normal: the point after five steps is where the run without decay arrives."""
    start = draw.point(*shape, dtype=torch.float64)
    a, b = draw.factors(shape, 1, torch.float64)
    arrived = []
    for decay in (None, 0.0):
        w = parameter(draw, variant, 1, shape, torch.float64, start)
        optimizer = DECAYING[name]([w])
        if decay is not None:
            optimizer.param_groups[0]["weight_decay"] = decay
        for _ in range(5):
            w.grad = a @ b.mH
            optimizer.step()
        arrived.append(w.detach())
    assert error(*arrived) < 1e-3 * error(arrived[1], start)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(10, 10), (12, 4)], ids=str)
@pytest.mark.parametrize(("k", "rate"), [(1, 0.2), (2, 0.2), (None, 0.2)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_procrustes_converges_to_the_target(draw, shape, k, rate, dtype, variant):
    """RiemannianSGD finds T from X in ‖X - T‖²: every sampled step descends, the limit is exact."""
    w = parameter(draw, variant, k, shape, dtype)
    target = UnitaryLowRank(None).expmap(w.detach(), draw.tangent(w.detach(), 1.5))
    optimizer = geoopt.optim.RiemannianSGD([w], lr=rate)
    for _ in range(1000):
        optimizer.zero_grad()
        loss = (w - target).abs().square().sum()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-18
    assert error(w.detach(), target) < 1e-8


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [1, None])
@pytest.mark.parametrize("shape", [(8, 8), (9, 4)], ids=str)
def test_line_search(draw, shape, k, variant):
    w = parameter(draw, variant, k, shape, torch.float64)
    target = UnitaryLowRank(None).expmap(w.detach(), draw.tangent(w.detach(), 0.7))
    optimizer = geoopt.optim.RiemannianLineSearch([w])

    def closure():
        optimizer.zero_grad()
        loss = (w - target).square().sum()
        loss.backward()
        return loss.item()

    first = closure()
    for _ in range(15):
        optimizer.step(closure)
        assert not any(isinstance(value, FactoredTensor) for value in optimizer.state[w].values())
    assert closure() < 0.5 * first
    assert dense.unitarity_error(w).item() <= bound(torch.float64)


class NoBigFactorisation(TorchDispatchMode):
    """Fail on a factorisation, solve or matrix exponential whose smaller side exceeds ``limit``."""

    HARMLESS = ("linalg_vector_norm", "linalg_cross", "linalg_diagonal", "linalg_vecdot")
    LEGACY = ("geqrf", "orgqr", "ormqr", "cholesky", "cholesky_solve", "triangular_solve", "lu_solve", "matrix_exp")

    def __init__(self, limit):
        super().__init__()
        self.limit = limit
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in self.LEGACY or ("linalg_" in name and name not in self.HARMLESS):
            self.seen += 1
            assert min(args[0].shape[-2:]) <= self.limit, (name, tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


STEPS = {
    "sgd": lambda p: geoopt.optim.RiemannianSGD(p, lr=0.05, weight_decay=1e-2),
    "momentum": lambda p: geoopt.optim.RiemannianSGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: geoopt.optim.RiemannianAdam(p, lr=0.05),
    "adam of geoopt's main branch": lambda p: AdamOfMainBranch(p, lr=0.05),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(96, 96), (96, 64), (2, 80, 80)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_a_step_factorises_nothing_big_and_counts_few_flops(draw, name, variant, shape, k, dtype):
    w = parameter(draw, variant, k, shape, dtype)
    optimizer = STEPS[name]([w])
    *batch, n, m = shape
    # without loops, also those by which projx looks at the point: two products with four columns
    probes = 16 if "main branch" in name and products.compiled is None else 0
    for _ in range(3):
        w.grad = draw.matrix(*shape, dtype=dtype)
        with NoBigFactorisation(4 * k if n == m else 8 * k), FlopCounterMode(display=False) as counter:
            optimizer.step()
        assert counter.get_total_flops() <= (64 * k + probes) * n * n * (batch[0] if batch else 1)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_long_run_under_the_main_branch_factorises_nothing_big(draw, variant):
    """2000 steps in float32 drift past projx's tolerance; it repairs them without a factorisation."""
    w = parameter(draw, variant, 1, (128, 128), torch.float32)
    optimizer = AdamOfMainBranch([w], lr=0.1)
    with NoBigFactorisation(4):
        for _ in range(2000):
            w.grad = draw.matrix(128, 128, dtype=torch.float32)
            optimizer.step()
    assert dense.unitarity_error(w).item() <= 1.1 * dense.tolerance(torch.float32, 128)


def test_the_spy_sees_what_it_should(draw):
    x = draw.matrix(20, 20, dtype=torch.float64)
    for forbidden in (
        torch.linalg.svd,
        torch.linalg.qr,
        torch.linalg.eigvals,
        torch.linalg.inv,
        torch.linalg.matrix_exp,
        torch.linalg.det,
        lambda t: torch.linalg.eigh(t + t.mT),
        lambda t: torch.linalg.cholesky(t @ t.mT + torch.eye(20)),
        lambda t: torch.linalg.solve(t, t),
        lambda t: torch.linalg.solve_triangular(t.triu(), t, upper=True),
        lambda t: torch.linalg.lstsq(t, t),
    ):
        with pytest.raises(AssertionError), NoBigFactorisation(19):
            forbidden(x)
    with NoBigFactorisation(20) as spy:
        torch.linalg.svd(x)
        x.exp(), x.expand(2, 20, 20)
    assert spy.seen == 1


class NewMatrices(TorchDispatchMode):
    """Count operators that return new memory of the parameter's shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = [t for t in args if isinstance(t, torch.Tensor) and not isinstance(t, FactoredTensor)]
        old = {t.untyped_storage().data_ptr() for t in given}
        if type(result) is torch.Tensor and result.shape == self.shape:
            self.count += result.untyped_storage().data_ptr() not in old
        return result


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(200, 200), (2, 150, 150), (300, 160)], ids=str)
@pytest.mark.parametrize("k", [1, 2])
def test_plain_sgd_sketches_once_and_builds_no_dense_tangent(draw, variant, shape, k):
    """The only new matrix of a step is the point that retr returns; the sampler is called once."""
    calls = []
    manifold = variant(k, sampler=lambda *given: calls.append(given) or SAMPLERS["lsi"](*given))
    w = geoopt.ManifoldParameter(draw.point(*shape, dtype=torch.float32), manifold=manifold)
    optimizer = geoopt.optim.RiemannianSGD([w], lr=0.1)
    w.grad = draw.matrix(*shape, dtype=torch.float32)
    with NewMatrices(torch.Size(shape)) as spy:
        optimizer.step()
    assert spy.count == 1
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(20, 20), (24, 10), (3, 12, 12)], ids=str)
def test_a_column_major_parameter_keeps_its_layout_and_gets_the_same_steps(draw, name, variant, shape):
    start = draw.point(*shape, dtype=torch.float64)
    weights = []
    for point in (start, start.mT.contiguous().mT):
        w = geoopt.ManifoldParameter(point.clone(), manifold=variant(2))
        strides = w.stride()
        optimizer = OPTIMIZERS[name]([w])
        for _ in range(3):
            optimizer.zero_grad()
            (w**3).sum().backward()
            assert w.grad.stride() == strides
            optimizer.step()
        move = w.manifold.retr(w.detach(), draw.tangent(w.detach(), 0.1))
        assert w.stride() == move.stride() == strides
        weights.append(w.detach())
    assert error(*weights) <= bound(torch.float64, 10.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("k", [1, 2, None])
def test_a_refused_gradient_leaves_the_parameter(draw, name, k):
    w = parameter(draw, UnitaryLowRank, k, (12, 12), torch.float32)
    optimizer = OPTIMIZERS[name]([w])
    kept = w.detach().clone()
    w.grad = torch.full_like(w, torch.nan)
    with pytest.raises(ValueError, match="non-finite"):
        optimizer.step()
    assert torch.equal(w.detach(), kept)


def test_a_tangent_is_not_used_at_another_point(draw):
    """Factors hold X b and X^H a: after X changed, or elsewhere, the dense path is taken."""
    manifold = UnitaryLowRank(1)
    x, y = draw.point(10, 10, dtype=torch.float64), draw.point(10, 10, dtype=torch.float64)
    a, b = draw.factors((10, 10), 1, torch.float64)
    with torch.no_grad():
        u = manifold.egrad2rgrad(x, a @ b.mH)
        assert factors_at(x, u) is not None
        assert factors_at(x.detach(), u) is not None
        assert factors_at(y, u) is None
        assert dense.unitarity_error(manifold.retr(y, u)).item() <= bound(torch.float64)
        assert factors_at(x[:9, :9], u) is None
        assert factors_at(x.mT, u) is None
        z = draw.point(10, 10, dtype=torch.complex128)
        w = manifold.egrad2rgrad(z, draw.matrix(10, 10, dtype=z.dtype))
        assert factors_at(z, w) is not None
        assert factors_at(z.conj(), w) is None
        x.copy_(y)
        assert factors_at(x, u) is None
        assert dense.unitarity_error(manifold.expmap(x, u)).item() <= bound(torch.float64)


def test_parameters_of_one_manifold_and_plain_ones_share_an_optimizer(draw):
    manifold = UnitaryLowRank(1)
    module = torch.nn.Module()
    module.square = geoopt.ManifoldParameter(manifold.random(8, 8), manifold=manifold)
    module.tall = geoopt.ManifoldParameter(manifold.random(9, 3), manifold=manifold)
    module.plain = torch.nn.Parameter(torch.randn(4))
    optimizer = geoopt.optim.RiemannianAdam(module.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        sum((p**3).sum() for p in module.parameters()).backward()
        optimizer.step()
    other = copy.deepcopy(module)
    assert other.square.manifold is other.tall.manifold
    assert other.square.manifold is not manifold
    for p in (module.square, module.tall):
        assert dense.unitarity_error(p).item() <= bound(torch.float32)


def test_graph_mode_returns_plain_differentiable_gradients(draw):
    """With gradients enabled nothing is carried: egrad2rgrad is an ordinary differentiable function."""
    manifold = UnitaryLowRank(1)
    x = draw.point(6, 6, dtype=torch.float64).requires_grad_()
    a, b = draw.factors((6, 6), 1, torch.float64)
    u = manifold.egrad2rgrad(x, a @ b.mH)
    assert type(u) is torch.Tensor
    (derivative,) = torch.autograd.grad(u.sum(), x)
    assert torch.isfinite(derivative).all()


@pytest.mark.parametrize("sampler", ["lsi", "column", "subspace", "svd"])
@pytest.mark.parametrize(("shape", "dtype"), [((10, 10), torch.complex128), ((12, 5), torch.float64)], ids=str)
def test_a_wolfe_search_makes_progress_at_rank_one(draw, sampler, shape, dtype):
    """The slopes it asks for are those of the loss, though its directions come from another sketch each."""
    manifold = UnitaryLowRank(k=1, sampler=sampler)
    a = draw.matrix(*shape[:-2], shape[-1], 20, dtype=dtype)
    b = draw.point(*shape, dtype=dtype) @ a
    w = geoopt.ManifoldParameter(draw.point(*shape, dtype=dtype), manifold=manifold)
    optimizer = geoopt.optim.RiemannianLineSearch([w], line_search_method="wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (w @ a - b).abs().square().sum()
        loss.backward()
        return loss.item()

    first = closure()
    for _ in range(100):
        optimizer.step(closure)
    assert closure() < 1e-2 * first
    assert dense.unitarity_error(w).item() <= bound(dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("shape", "dtype"), [((9, 9), torch.complex128), ((12, 5), torch.float64)], ids=str)
def test_the_slope_a_wolfe_search_sees_is_the_derivative_of_the_loss(draw, variant, shape, dtype):
    """Against a difference quotient of the loss along the move, at the start and, on geodesics, at trial points.

    On other curves the direction that is carried along, which geoopt takes the slope with, is not their velocity.
    """
    w = parameter(draw, variant, 1, shape, dtype)
    target = draw.point(*shape, dtype=dtype)
    seen, trials = [], (0.0, 0.1, 0.7) if variant is UnitaryLowRankExact else (0.0,)

    def search(phi, derphi, **given):
        h = 1e-5
        for step in trials:
            slope = given["derphi0"] if step == 0 else derphi(step)
            seen.append((slope, (phi(step + h) - phi(step - h)) / (2 * h)))
        phi(0.1)  # geoopt goes wrong by a step that was not tried
        return 0.1

    optimizer = geoopt.optim.RiemannianLineSearch([w], line_search_method=search)

    def closure():
        optimizer.zero_grad(set_to_none=False)
        loss = (w - target).abs().square().sum() + (w**3).real.sum()
        loss.backward()
        return loss.item()

    for _ in range(3):
        optimizer.step(closure)
    assert len(seen) == 3 * len(trials)
    for slope, quotient in seen:
        assert slope == pytest.approx(quotient, rel=1e-6, abs=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of SciPy, where the sketched slopes of the parts mislead it
@pytest.mark.parametrize("method", ["wolfe", "armijo"])
@pytest.mark.parametrize("options", [{}, {"sampler": "subspace"}, {"sampler": "svd"}, {"k": None}], ids=str)
def test_a_wolfe_search_on_parts_of_a_manifold_says_what_it_needs(draw, method, options):
    manifold = geoopt.Scaled(UnitaryLowRank(**{"k": 1, **options}), 2.0)
    w = geoopt.ManifoldParameter(draw.point(8, 8, dtype=torch.float64), manifold=manifold)
    start = w.detach().clone()
    optimizer = geoopt.optim.RiemannianLineSearch([w], line_search_method=method)

    def closure():
        optimizer.zero_grad()
        loss = (w**3).sum()
        loss.backward()
        return loss.item()

    if method == "wolfe" and not options:
        with pytest.raises(ValueError, match='sampler="subspace"'):
            optimizer.step(closure)
        assert torch.equal(w, start)
    else:
        optimizer.step(closure)
        assert dense.unitarity_error(w).item() <= bound(torch.float64)
