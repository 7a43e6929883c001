"""Dense linear algebra against definitions and torch's own factorisations, in double precision."""

import math

import pytest
import torch
from helpers import DTYPES, SHAPES, SQUARE, bound, double, error

from projunn_manifold.linalg import dense, qr, small


def eye(x):
    return torch.eye(x.shape[-1], dtype=double(x).dtype)


@pytest.mark.parametrize("single", [False, True], ids=["LAPACK", "reflections"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (40, 32), (3, 5)], ids=str)
def test_thin_qr_of_any_rank(draw, monkeypatch, shape, dtype, single):
    monkeypatch.setattr(dense, "is_single", lambda device: single)
    for rank in (min(1, shape[-1]), shape[-1]):
        y = draw.matrix(*shape[:-1], rank, dtype=dtype) @ draw.matrix(*shape[:-2], rank, shape[-1], dtype=dtype)
        q, r = qr.thin_qr(y)
        assert q.is_contiguous()
        assert error(double(q).mH @ double(q), eye(q)) <= bound(dtype)
        size = torch.linalg.matrix_norm(double(y)).max().item()
        assert error(double(q) @ double(r), double(y)) <= bound(dtype, size)
    equal = draw.matrix(*shape[:-1], 1, dtype=dtype).expand(shape)
    for y in (equal, torch.zeros(shape, dtype=dtype)):
        q, _ = qr.thin_qr(y)
        assert error(double(q).mH @ double(q), eye(q)) <= bound(dtype)


@pytest.mark.parametrize("single", [False, True], ids=["LAPACK", "reflections"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_thin_qr_of_tiny_and_large_dependent_columns(draw, monkeypatch, exact, dtype, single):
    monkeypatch.setattr(dense, "is_single", lambda device: single)
    y = draw.matrix(13, 1, dtype=dtype) @ draw.matrix(1, 6, dtype=dtype)
    y = y if exact else y + 1e-3 * torch.finfo(dtype).eps * draw.matrix(13, 6, dtype=dtype)
    for size in (1e-36, 1e-34, 1e-20, 1e18) if torch.finfo(dtype).bits == 32 else (1e-300, 1e-290, 1e-160, 1e150):
        sizes = torch.tensor([1.0, size, 1.0, size, size, size], dtype=dtype)
        for given in (y * size, y * sizes):
            q, r = qr.thin_qr(given)
            assert error(double(q).mH @ double(q), eye(q)) <= bound(dtype)
            scale = given.abs().amax(-2)
            assert error(double(q) @ double(r) / scale, double(given) / scale) <= bound(dtype, 6.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_polar_factor_is_unitary_and_leaves_a_positive_factor(draw, shape, dtype):
    x = draw.matrix(*shape, dtype=dtype)
    u = dense.polar(x)
    assert dense.unitarity_error(u).max() <= dense.tolerance(dtype, shape[-2])
    h = double(u).mH @ double(x)
    assert error(h, h.mH) <= bound(dtype, torch.linalg.matrix_norm(double(x), 2).max().item())
    assert (torch.linalg.eigvalsh((h + h.mH) / 2) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-9])
def test_phase_cores_keep_small_increments(draw, dtype, size):
    a = draw.matrix(3, 6, 6, dtype=dtype) * size
    omega = (a - a.mH) / 2
    exponential = small.phase_core(omega, lambda theta: theta)
    term, series = torch.eye(6, dtype=dtype), 0
    for j in range(1, 40):
        term = omega @ term / j
        series = series + term
    assert error(exponential / size, series / size) <= bound(dtype)
    cayley = small.phase_core(omega, lambda theta: 2 * torch.atan(theta / 2))
    exact = torch.linalg.solve(torch.eye(6, dtype=dtype) - omega / 2, omega)
    assert error(cayley / size, exact / size) <= bound(dtype)
    assert exponential.is_complex() == dtype.is_complex


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_and_norms(draw, shape, dtype):
    x, y, q = (draw.matrix(*shape[:-1], m, dtype=dtype) for m in (shape[-1], shape[-1], 2))
    wide = torch.linalg.matrix_norm(double(x))
    scale = (wide * torch.linalg.matrix_norm(double(q))).max().item()
    product = dense.adjoint_times(x, q)
    assert not product.is_conj()
    assert error(product, double(x).mH @ double(q)) <= bound(dtype, scale)
    inner = (double(x).conj() * double(y)).sum((-2, -1)).real
    limit = bound(dtype) * (wide * torch.linalg.matrix_norm(double(y)))
    assert ((dense.frobenius_inner(x, y).double() - inner).abs() <= limit).all()
    assert torch.allclose(dense.squared_norm(x), wide.square(), rtol=1e-6)
    for factor in (1.0, 1e30, 1e-30):
        unit = dense.normalized(x * factor)
        assert error(unit, double(x) / wide[..., None, None]) <= bound(dtype)
    assert not dense.normalized(0 * x).any()
    left, right = draw.matrix(*shape[:-1], 2, dtype=dtype), draw.matrix(*shape[:-2], shape[-1], 2, dtype=dtype)
    expected = double(x) + double(left) @ double(right).mH
    given = x.clone()
    assert dense.add_product_(given, left, right) is given
    assert error(given, expected) <= bound(dtype, 10.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", SQUARE, ids=str)
def test_the_logarithm_of_a_unitary_matrix(draw, shape, dtype):
    a = draw.matrix(*shape, dtype=dtype)
    skew = (a - a.mH) / (2 * torch.linalg.matrix_norm(a, 2)[..., None, None])
    w = torch.linalg.matrix_exp(3.0 * skew)  # angles up to 3
    log = dense.log_unitary(w)
    assert error(log, -log.mH) <= bound(dtype)
    assert error(torch.linalg.matrix_exp(log), w) <= bound(dtype, 10.0)
    angles = dense.rotation_angles(w).sort().values
    assert torch.allclose(angles, torch.linalg.eigvals(log).imag.sort().values, atol=1e-10)


def test_the_probed_error_estimates_the_error(draw):
    x = draw.point(64, 32, dtype=torch.float64)
    for size in (1e-10, 1e-3):
        off = x + size * draw.matrix(64, 32, dtype=torch.float64)
        exact = torch.linalg.matrix_norm(off.mH @ off - torch.eye(32)) / math.sqrt(32)
        assert 0.5 < dense.probed_unitarity_error(off) / exact < 2
        assert torch.allclose(dense.unitarity_error(off), exact)
    x[3, 4] = torch.nan
    assert dense.probed_unitarity_error(x) == math.inf


def test_small_helpers():
    h = torch.tensor([[1.0, torch.nan], [torch.inf, 2.0]])
    assert torch.equal(dense.finite_entries(h), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    assert dense.per_matrix(2.0) == 2.0
    assert dense.per_matrix(torch.ones(3)).shape == (3, 1, 1)
    assert torch.equal(dense.columns_of_identity(3, 2), torch.eye(3)[:, :2])
    assert dense.high_precision(torch.ones(1, dtype=torch.complex64)) is torch.complex128
