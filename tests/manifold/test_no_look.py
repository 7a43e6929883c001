"""A step where the host must not look at values: no look, no eigenproblem, and the same step as where it may.

It holds with the sampler "lsi"; the other samplers go through a small eigenproblem or singular value decomposition.
Thin matrices have a QR.
"""

import geoopt
import pytest
import torch
from helpers import bound, double, error
from torch.utils._python_dispatch import TorchDispatchMode

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, context, optim, projunn_t, reference
from projunn_manifold.linalg import dense, products, qr
from projunn_manifold.linalg.phases import LONGEST
from projunn_manifold.linalg.products import matrix
from projunn_manifold.moves.angle import GEODESIC, POLAR
from projunn_manifold.optim.constrained import raw_step_
from projunn_manifold.sketching.factored_tensor import FactoredTensor

LOOKS = {"_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "_linalg_check_errors", "allclose"}
FACTORISES = {"linalg_eigh", "_linalg_eigh", "linalg_svd", "_linalg_svd", "linalg_eig", "linalg_inv_ex"}


class Blind(TorchDispatchMode):
    """Fails on every operator with which the host reads a value, or that factorises a matrix."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if FactoredTensor in types:
            return NotImplemented
        name = func._schema.name.removeprefix("aten::")
        assert name not in LOOKS | FACTORISES, name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def device(monkeypatch):
    """The CPU as a device that the host does not wait for, without the compiled loops."""
    monkeypatch.setattr(context, "readable", lambda x: False)
    monkeypatch.setattr(products, "compiled", None)


class Single(Blind):
    """Fails also on every number in double precision, and on the factorisations that such devices lack."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.removeprefix("aten::")
        assert name != "linalg_qr", name
        for t in found if isinstance(found, tuple | list) else [found]:
            assert not isinstance(t, torch.Tensor) or t.dtype not in (torch.float64, torch.complex128), name
        return found


def parameter(k, shape, dtype=torch.float32, kind=UnitaryLowRank, **options):
    draw = torch.Generator().manual_seed(0)
    manifold = kind(k, **options)
    p = geoopt.ManifoldParameter(manifold.random(shape, dtype=dtype, generator=draw), manifold=manifold)
    p.grad = torch.randn(shape, dtype=dtype, generator=draw)
    return p


MAKE = {
    "SGD": lambda p: optim.RiemannianSGD([p], lr=0.1),
    "momentum": lambda p: optim.RiemannianSGD([p], lr=0.1, momentum=0.9),
    "Adam": lambda p: optim.RiemannianAdam([p], lr=0.1),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("shape", [(40, 40), (3, 40, 40), (48, 40)], ids=str)
@pytest.mark.parametrize("kind", [UnitaryLowRank, UnitaryLowRankExact])
@pytest.mark.parametrize("k", [1, 2, 4, 16, None])
def test_a_step_looks_at_nothing_and_factorises_nothing(device, make, dtype, shape, k, kind):
    p = parameter(k, shape, dtype, kind, sweep=40)
    step = make(p).step
    with Blind():
        for _ in range(4):
            step()
    assert dense.unitarity_error(p.detach()).max() <= bound(dtype)
    assert p.manifold.pop_faults() == (0, 0, 0)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("shape", [(40, 40), (3, 40, 40), (48, 40)], ids=str)
@pytest.mark.parametrize("kind", [UnitaryLowRank, UnitaryLowRankExact])
@pytest.mark.parametrize("k", [1, 2, 16, None])
def test_a_step_needs_no_double_precision(device, monkeypatch, make, dtype, shape, k, kind):
    monkeypatch.setattr(dense, "is_single", lambda device: True)
    p = parameter(k, shape, dtype, kind, sweep=40)
    step = make(p).step
    with Single():
        for _ in range(4):
            step()
    assert p.manifold.pop_faults() == (0, 0, 0)
    monkeypatch.setattr(dense, "is_single", lambda device: False)
    assert dense.unitarity_error(p.detach()).max() <= 2 * bound(dtype)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("shape", [(40, 40), (3, 40, 40), (48, 40)], ids=str)
@pytest.mark.parametrize("kind", [UnitaryLowRank, UnitaryLowRankExact])
@pytest.mark.parametrize("k", [1, 2, 4, None])
def test_a_constrained_step_looks_at_nothing_and_factorises_nothing(
    device, monkeypatch, k, kind, shape, dtype, feedback, single
):
    monkeypatch.setattr(dense, "is_single", lambda device: single)
    p = parameter(k, shape, dtype, kind, sweep=40)
    start, optimizer = p.detach().clone(), torch.optim.RMSprop([p], lr=1e-2)
    optim.constrain(optimizer, feedback=feedback)
    with Single() if single else Blind():
        for _ in range(4):
            optimizer.step()
    monkeypatch.setattr(dense, "is_single", lambda device: False)
    assert dense.unitarity_error(p.detach()).max() <= 2 * bound(dtype)
    assert p.manifold.pop_faults() == (0, 0, 0)
    assert (p.detach() - start).norm() > 0.1


@pytest.mark.parametrize("length", [1e-8, 1e-3, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(24, 24), (2, 24, 24), (30, 24)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_constrained_step_is_the_exact_polar_factor_and_carries_what_it_leaves_out(device, k, shape, dtype, length):
    p = parameter(k, shape, dtype, sweep=None)
    x, move = p.detach().clone(), p.grad * (length / torch.linalg.matrix_norm(p.grad, 2).max())
    a, b = p.manifold.sketcher.factors(matrix(x), move)
    residual = torch.zeros_like(x)
    y = raw_step_(p.manifold, x.clone(), move, residual)
    u, sigma, vh = torch.linalg.svd(double(x) + double(a) @ double(b).mH, full_matrices=False)
    exact = bound(dtype, length, sigma.min().item())
    assert error(y, u @ vh) <= exact
    assert dense.unitarity_error(y).max() <= bound(dtype, length)
    rest = double(move) - double(a) @ double(b).mH
    lengths = torch.linalg.matrix_norm(double(residual)), torch.linalg.matrix_norm(rest)
    assert (lengths[0] - lengths[1]).abs().max() <= bound(dtype, length) * lengths[1].max()  # g is unitary,
    before, after = double(x).mH @ rest, double(y).mH @ double(residual)
    assert error(after, before) <= 4 * exact * max(1.0, length)  # and takes X to Y
    assert p.manifold.pop_faults() == (0, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64])
@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 20, 16)], ids=str)
@pytest.mark.parametrize("k", [1, 3, None])
def test_a_singular_step_leaves_its_matrix_where_it_is_and_is_counted(device, k, shape, dtype):
    p = parameter(k, shape, dtype, sweep=None)
    x, move = p.detach().clone(), 0.01 * p.grad
    move[1] = -x[1] @ torch.ones(16, 16, dtype=dtype) / 16  # X + a b^H has a zero singular value
    y = raw_step_(p.manifold, x.clone(), move)
    assert p.manifold.pop_faults() == (1, 0, 0)
    assert torch.equal(y[1], x[1])
    for member in (0, 2):
        assert (y[member] - x[member]).norm() > 1e-3
        alone = parameter(k, shape, dtype, sweep=None)
        zeros = torch.zeros_like(move)
        zeros[member] = move[member]
        assert error(raw_step_(alone.manifold, x.clone(), zeros)[member], y[member]) <= bound(dtype)
        assert alone.manifold.pop_faults() == (0, 0, 0)


@pytest.mark.parametrize("kind", [UnitaryLowRank, UnitaryLowRankExact])
@pytest.mark.parametrize("size", [1e-34, 1e-38, 1e-44])
@pytest.mark.parametrize("shape", [(2, 13, 12), (2, 12, 12)], ids=str)
@pytest.mark.parametrize("k", [3, 6])
def test_tiny_moves_of_deficient_rank_leave_a_stack_on_the_manifold(device, k, shape, size, kind):
    p = parameter(k, shape, torch.complex64, kind)
    start = torch.eye(*shape[1:], dtype=p.dtype).repeat(2, 1, 1)  # from whose zeros a tiny number can be taken
    with torch.no_grad():
        p.copy_(start)
    p.grad = torch.stack((p.grad[0, :, :1] @ p.grad[0, :1] * size, 0.01 * p.grad[1]))
    optimizer = torch.optim.SGD([p], lr=1.0)
    optim.constrain(optimizer)
    optimizer.step()
    assert dense.unitarity_error(p.detach()).max() <= bound(p.dtype)
    assert error(p[0].detach(), start[0]) <= bound(p.dtype)
    assert error(p[1].detach(), start[1]) > 1e-3
    assert p.manifold.pop_faults() == (0, 0, 0)


@pytest.mark.parametrize("kind", [UnitaryLowRank, UnitaryLowRankExact])
@pytest.mark.parametrize("shape", [(2, 13, 12), (2, 12, 12)], ids=str)
@pytest.mark.parametrize("k", [1, 3, 6])
def test_a_raw_move_leaves_matrices_that_are_not_finite(device, k, shape, kind):
    p = parameter(k, shape, kind=kind, sweep=None)
    x, factors = p.detach(), p.manifold.sketcher.factors(matrix(p.detach()), 0.1 * p.grad)
    factors.a[0, 0, 0] = torch.nan
    move, left = p.manifold.raw_move(x, factors)
    y = move.apply_(matrix(x.clone()))
    assert left.tolist() == [True, False]
    assert p.manifold.pop_faults() == (1, 0, 0)
    assert torch.equal(y[0], x[0])
    assert error(y[1], x[1]) > 1e-3
    assert error(move.transport_(p.grad.clone())[0], p.grad[0]) <= 5 * bound(x.dtype)  # a norm of that size


@pytest.mark.parametrize("kind", [UnitaryLowRank, UnitaryLowRankExact])
@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 20, 16)], ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_a_step_that_is_left_out_leaves_its_residual(device, k, shape, kind):
    p = parameter(k, shape, torch.float64, kind, sweep=None)
    x, move = p.detach().clone(), 0.01 * p.grad
    move[1] = -x[1] @ torch.ones(16, 16, dtype=p.dtype) / 16  # singular with D
    if kind is UnitaryLowRankExact:
        move[1] = 1e20 * p.grad[1]  # too long with T
    residual = 0.01 * p.grad.flip(0)
    residual[1] = 0 if kind is UnitaryLowRank else residual[1]
    before = residual.clone()
    y = raw_step_(p.manifold, x.clone(), move, residual)
    assert p.manifold.pop_faults() == (1, 0, 0)
    assert torch.equal(y[1], x[1])
    assert torch.equal(residual[1], before[1])
    for member in (0, 2):
        assert error(residual[member], before[member]) > 1e-3


@pytest.mark.parametrize("size", [1e4, 1e15, 1e30])
@pytest.mark.parametrize("shape", [(24, 24), (30, 24)], ids=str)
@pytest.mark.parametrize("kind", [UnitaryLowRank, UnitaryLowRankExact])
@pytest.mark.parametrize("k", [1, 3, None])
def test_constrained_steps_of_any_length_stay_on_the_manifold_or_are_counted(device, k, kind, shape, size):
    p = parameter(k, shape, torch.float32, kind)
    start = p.detach().clone()
    y = raw_step_(p.manifold, p.detach().clone(), p.grad * size)
    faults = p.manifold.pop_faults()
    closed_form = k == 1 and kind is UnitaryLowRankExact and shape[0] == shape[1]
    if size == 1e4 and kind is UnitaryLowRankExact:
        assert faults == (0, 0, not closed_form)
    else:
        assert faults.skipped == torch.equal(y, start) == (kind is UnitaryLowRankExact or faults.skipped)
    assert dense.unitarity_error(y) <= 2 * bound(torch.float32, LONGEST)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("shape", [(24, 24), (30, 24)], ids=str)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("size", [1e-3, 0.3])
def test_rounding_of_constrained_steps_does_not_add_up(device, monkeypatch, size, k, shape, single):
    """Without the drift correction, over 2000 steps, short ones and some that are not."""
    p = parameter(k, shape, torch.float32, sweep=None if single else 256)
    draw, x = torch.Generator().manual_seed(1), p.detach().clone()
    monkeypatch.setattr(dense, "is_single", lambda device: single)
    for _ in range(2000):
        raw_step_(p.manifold, x, size / 5 * torch.randn(shape, generator=draw))
    monkeypatch.setattr(dense, "is_single", lambda device: False)
    assert dense.unitarity_error(x) <= (bound(torch.float32) if single else 2 * dense.tolerance(torch.float32, 32))


@pytest.mark.parametrize("where", ["looked at", "double", "single"])
@pytest.mark.parametrize("shape", [(24, 24), (30, 24)], ids=str)
@pytest.mark.parametrize("size", [0.05, 0.2])
def test_rounding_does_not_add_up_where_a_constrained_step_repeats(monkeypatch, size, shape, where):
    """Its core is then the same each time."""
    monkeypatch.setattr(products, "compiled", None)
    monkeypatch.setattr(context, "readable", lambda x: where == "looked at")
    dtype = torch.float32 if where == "single" else torch.float64
    p = parameter(None, shape, dtype, sweep=None)
    x, move = p.detach().clone(), size / 7 * p.grad
    monkeypatch.setattr(dense, "is_single", lambda device: where == "single")
    for _ in range(800):
        raw_step_(p.manifold, x, move)
    monkeypatch.setattr(dense, "is_single", lambda device: False)
    assert dense.unitarity_error(x) <= 2 * dense.tolerance(dtype, 24)


@pytest.mark.parametrize("where", ["looked at", "double", "single"])
@pytest.mark.parametrize("size", [0.2, 2.0])
def test_rounding_does_not_add_up_where_a_tangent_is_carried_along(monkeypatch, size, where):
    monkeypatch.setattr(products, "compiled", None)
    monkeypatch.setattr(context, "readable", lambda x: where == "looked at")
    dtype = torch.float32 if where == "single" else torch.float64
    p = parameter(None, (30, 24), dtype, sweep=None)
    x, u = p.detach().clone(), p.manifold.proju(p.detach(), p.grad)
    u *= size / torch.linalg.matrix_norm(u, 2)
    monkeypatch.setattr(dense, "is_single", lambda device: where == "single")
    for _ in range(400):
        p.manifold.retr_transp_(x, u, u)
    monkeypatch.setattr(dense, "is_single", lambda device: False)
    assert dense.unitarity_error(x) <= 2 * dense.tolerance(dtype, 24)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("make", [MAKE["SGD"], lambda p: optim.RiemannianAdam([p], lr=0.02)], ids=["SGD", "Adam"])
@pytest.mark.parametrize("shape", [(32, 32), (40, 32)], ids=str)
@pytest.mark.parametrize("kind", [UnitaryLowRank, UnitaryLowRankExact])
@pytest.mark.parametrize("k", [1, 4, None])
def test_rounding_has_no_direction_that_adds_up(device, monkeypatch, make, shape, k, kind, single):
    p = parameter(k, shape, torch.float32, kind)
    draw, step = torch.Generator().manual_seed(1), make(p).step
    monkeypatch.setattr(dense, "is_single", lambda device: single)
    for _ in range(150):
        p.grad = torch.randn(shape, generator=draw)
        step()
    monkeypatch.setattr(dense, "is_single", lambda device: False)
    assert dense.unitarity_error(p.detach()) <= dense.tolerance(torch.float32, 32)


@pytest.mark.parametrize("length", [1e-8, 1e-3, 1.0, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(24, 24), (2, 24, 24), (30, 24)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize(
    ("kind", "map_"), [(UnitaryLowRank, reference.retraction), (UnitaryLowRankExact, reference.geodesic)]
)
def test_a_step_is_the_exact_map(device, kind, map_, k, shape, dtype, length):
    p = parameter(k, shape, dtype, kind=kind, sweep=None)
    x = double(p.detach())
    sketch = double(p.manifold.sketcher.factors(matrix(p.detach()), p.grad).dense())
    u = reference.gradient(x, sketch)
    lr = length / torch.linalg.matrix_norm(u, 2).max().item()
    y = p.manifold.step_(p.detach().clone(), p.grad, lr)
    assert error(y, map_(x, -lr * u)) <= bound(dtype, length)
    assert dense.unitarity_error(double(y)).max() <= bound(dtype, length)


@pytest.mark.parametrize("shape", [(24, 24), (3, 24, 24), (30, 24)], ids=str)
@pytest.mark.parametrize("k", [1, 3, None])
def test_steps_beyond_reach_are_shortened_and_counted(device, shape, k):
    p = parameter(k, shape, torch.float64)
    before = p.detach().clone()
    optim.RiemannianSGD([p], lr=1e6).step()
    faults = p.manifold.pop_faults()
    closed_form = k == 1 and shape[-1] == shape[-2]
    assert faults.shortened == (0 if closed_form else p.numel() // (shape[-1] * shape[-2]))
    assert faults.skipped == 0
    assert dense.unitarity_error(p.detach()).max() <= 2 * bound(torch.float64, LONGEST)
    assert (p.detach() - before).norm() > 0.1
    optim.RiemannianSGD([p], lr=1e-3).step()
    assert p.manifold.pop_faults().shortened == 0


@pytest.mark.parametrize(
    "gradient",
    [
        lambda g: torch.zeros_like(g),
        lambda g: g[:, :1] @ g[:1],  # of rank one: all columns of its sketch are parallel
        lambda g: torch.cat((g[:, :2], torch.zeros_like(g[:, 2:])), -1),
        lambda g: 1e-8 * g,
        lambda g: 1e3 * g,
    ],
    ids=["zero", "rank one", "rank two", "tiny", "large"],
)
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("k", [1, 4])
def test_gradients_of_deficient_rank_and_of_any_size(device, k, make, gradient):
    p = parameter(k, (32, 32), torch.float64)
    p.grad = gradient(p.grad)
    step = make(p).step
    for _ in range(3):
        step()
    assert torch.isfinite(p).all()
    assert dense.unitarity_error(p.detach()).max() <= 3 * bound(torch.float64, LONGEST)  # three steps, some that long


@pytest.mark.parametrize("shape", [(20, 16), (17, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("kind", [UnitaryLowRank, UnitaryLowRankExact])
@pytest.mark.parametrize("k", [2, 5])
def test_starts_with_zero_rows_and_gradients_of_equal_rows(device, k, kind, shape):
    """Then thin matrices have dependent columns, whose remainders are parallel to others."""
    p = parameter(k, shape, torch.float64, kind=kind, sweep=None)
    with torch.no_grad():
        p.copy_(torch.eye(*shape))
    for gradient in (p.grad, torch.ones(shape[0], 1, dtype=p.dtype) @ p.grad[:1]):
        p.grad = gradient
        optim.RiemannianSGD([p], lr=0.1).step()
        assert dense.unitarity_error(p.detach()).max() <= bound(torch.float64)
    assert p.manifold.pop_faults() == (0, 0, 0)


@pytest.mark.parametrize("theta", [1.0, 200.0, 1e4])
def test_raw_moves_that_nobody_shortens_are_exact(device, theta):
    draw = torch.Generator().manual_seed(0)
    x = dense.haar(12, 12, dtype=torch.float64, generator=draw)
    a, b = (torch.randn(12, 2, dtype=torch.float64, generator=draw) for _ in range(2))
    a *= theta / torch.linalg.matrix_norm(a @ b.mT, 2)
    assert error(projunn_t(x, a, b), reference.projunn_t(x, a, b)) <= bound(torch.float64, 10 * theta)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("size", [0.0, 1e-9, 0.1, 3.0, 40.0])
def test_functions_by_products_are_the_dense_ones(device, dtype, size):
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(3, 6, 6, dtype=dtype, generator=draw)
    a = a - a.mH
    e = a * (size / torch.linalg.matrix_norm(a, 2)[..., None, None])
    # exp of [[E, I, 0], [0, 0, I], [0, 0, 0]] has e^E, φ and ψ in its first row
    eye, zero = torch.eye(6, dtype=dtype).expand(3, 6, 6), torch.zeros(3, 6, 6, dtype=dtype)
    rows = [torch.cat(row, -1) for row in ((e, eye, zero), (zero, zero, eye), (zero, zero, zero))]
    whole, phi, psi = torch.linalg.matrix_exp(torch.cat(rows, -2))[..., :6, :].tensor_split(3, -1)
    for found, exact in zip(GEODESIC.functions(e), (psi, phi, whole - eye), strict=True):
        assert error(found, exact) <= bound(dtype, size)
    theta, basis = torch.linalg.eigh(-1j * e)
    for found, values in zip(
        POLAR.functions(e), (POLAR.psi(theta), POLAR.complex_phi(theta), torch.exp(1j * theta.atan()) - 1), strict=True
    ):
        exact = (basis * values.unsqueeze(-2)) @ basis.mH
        assert error(found, exact if e.is_complex() else exact.real) <= bound(dtype, size)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(("size", "lr"), [(1e20, 1e-20), (1e25, 1e-25), (1e30, 0.0), (1e25, 0.1)])
@pytest.mark.parametrize("shape", [(20, 20), (20, 16)], ids=str)
@pytest.mark.parametrize("k", [1, 2, None])
def test_gradients_beyond_range_are_skipped_and_counted_whatever_the_rate(
    device, monkeypatch, k, shape, size, lr, single
):
    monkeypatch.setattr(dense, "is_single", lambda device: single)
    p = parameter(k, shape)
    p.grad[3, 4] = size
    before = p.detach().clone()
    optim.RiemannianSGD([p], lr=lr).step()
    assert p.manifold.pop_faults() == (1, 0, 0)
    assert torch.equal(p, before)


def test_a_column_of_tiny_numbers_keeps_its_frame_orthonormal(device, monkeypatch):
    """As the gradient of a unit that is dead."""
    p = parameter(None, (48, 24), sweep=None)
    with torch.no_grad():
        p.copy_(torch.eye(48, 24))
    p.grad[:, 5] *= 1e-22
    monkeypatch.setattr(dense, "is_single", lambda device: True)
    optim.RiemannianSGD([p], lr=0.1).step()
    monkeypatch.setattr(dense, "is_single", lambda device: False)
    assert dense.unitarity_error(p.detach()) <= bound(torch.float32)


def test_parallel_factors_leave_a_point_on_the_manifold(device):
    p = parameter(1, (40, 40), sweep=None)
    p.grad = 1e6 * p.detach().clone()
    optim.RiemannianSGD([p], lr=1.0).step()
    assert dense.unitarity_error(p.detach()) <= bound(torch.float32)


def test_a_moment_whose_factor_is_zero_is_replaced_whatever_it_was():
    p = parameter(1, (12, 12), non_finite="skip")
    optimizer = optim.RiemannianAdam([p], lr=0.1, betas=(0.0, 0.9))
    optimizer.step()
    optimizer.state[p]["exp_avg"].fill_(torch.inf)
    optimizer.step()
    assert torch.isfinite(optimizer.state[p]["exp_avg"]).all()
    assert p.manifold.pop_faults() == (0, 0, 0)


@pytest.mark.parametrize("shape", [(7, 3), (2, 6, 6)], ids=str)
def test_reflections_have_derivatives(monkeypatch, shape):
    monkeypatch.setattr(dense, "is_single", lambda device: True)
    y = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(qr.thin_qr, (y,))
