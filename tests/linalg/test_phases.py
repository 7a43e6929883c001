"""The increments of geodesic and polar retraction by products, against eigendecompositions in double precision."""

import pytest
import torch
from helpers import DTYPES, bound, double, error

from projunn_manifold import context
from projunn_manifold.linalg import phases

INCREMENTS = [(phases.exponential_increment, lambda theta: theta), (phases.polar_increment, torch.atan)]
SIZES = [0.0, 1e-8, 1e-4, 0.02, 0.05, 0.12, 0.3, 0.7, 1.0, 1.4, 1.99, 2.5, 5.0, 7.9, 15.0, 63.0, 70.0, 500.0]


@pytest.fixture(params=INCREMENTS, ids=["exponential", "polar"])
def increment(request):
    return request.param


@pytest.fixture
def skew(draw):
    """Random skew-Hermitian matrices of a spectral norm."""

    def make(size, dtype, *shape):
        omega = double(draw.matrix(*shape, dtype=dtype))
        omega = omega - omega.mH
        norm = torch.linalg.matrix_norm(omega, 2)[..., None, None]
        return (omega * (size / norm.clamp_min(1e-300))).to(dtype)

    return make


def exact(omega, alpha):
    theta, q = torch.linalg.eigh(-1j * omega.to(torch.complex128))
    return (q * torch.expm1(1j * alpha(theta)).unsqueeze(-2)) @ q.mH


def away(found, omega, alpha):
    expected = exact(omega, alpha)
    assert found.dtype == omega.dtype
    return error(found, expected if omega.is_complex() else expected.real)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (33, 33), (3, 12, 12), (2, 2, 5, 5), (0, 4, 4)], ids=str)
def test_increments_of_any_size(increment, skew, shape, size, dtype):
    function, alpha = increment
    omega = skew(size, dtype, *shape)
    assert function(omega).shape == omega.shape
    if omega.numel():
        assert away(function(omega), omega, alpha) <= bound(dtype, size / 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-4, 0.3, 7.0, 60.0])
def test_the_fixed_number_of_products(increment, skew, size, dtype, monkeypatch):
    monkeypatch.setattr(context, "readable", lambda x: False)
    function, alpha = increment
    omega = skew(size, dtype, 3, 10, 10) / 4  # the bound of a row sum is up to three times the norm
    assert away(function(omega), omega, alpha) <= bound(dtype, size)


def test_a_longer_one_is_shortened_where_the_host_cannot_look(increment, skew, monkeypatch):
    monkeypatch.setattr(context, "readable", lambda x: False)
    function, alpha = increment
    omega = skew(1e4, torch.float64, 8, 8)
    short = omega * (phases.LONGEST / torch.linalg.matrix_power(omega, 4).abs().sum(-1).amax() ** 0.25)
    assert away(function(omega), short, alpha) <= bound(torch.float64, phases.LONGEST)


@pytest.mark.parametrize("size", [0.01, 0.5, 3.0])
def test_matrices_of_different_sizes_in_a_stack(increment, skew, size):
    function, alpha = increment
    omega = torch.stack([skew(size * factor, torch.float32, 9, 9) for factor in (1e-6, 0.1, 1.0)])
    assert away(function(omega), omega, alpha) <= bound(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("size", [0.05, 0.9, 5.0])
def test_derivatives(increment, skew, size, dtype):
    function, _ = increment
    omega = skew(size, dtype, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: function((t - t.mH) / 2), (omega,))


def test_a_transformed_call_is_the_plain_one(increment, skew):
    function, _ = increment
    omega = skew(0.7, torch.float64, 3, 6, 6)
    assert error(torch.func.vmap(function)(omega), function(omega)) <= bound(torch.float64)


def polar_and_increment(d):
    """The polar factor of Î + D, and what it adds to Î, in double precision."""
    start = torch.zeros_like(double(d))
    start.diagonal(dim1=-2, dim2=-1).fill_(1)
    u, _, vh = torch.linalg.svd(start + double(d), full_matrices=False)
    return u @ vh, u @ vh - start


@pytest.fixture
def of_singular_values(draw):
    """D for which Î + D has these singular values."""

    def make(values, *shape):
        u, _, vh = torch.linalg.svd(draw.matrix(*shape, dtype=torch.complex128), full_matrices=False)
        d = (u * torch.tensor(values, dtype=torch.float64)) @ vh
        d.diagonal(dim1=-2, dim2=-1).sub_(1)
        return d

    return make


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [0.0, 1e-8, 1e-3, 0.02, 0.1, 0.99, 5.0])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 2), (3, 8, 8), (2, 2, 7, 4), (0, 3, 3)], ids=str)
def test_the_polar_factor_of_any_sum(draw, shape, norm, dtype):
    """The increment of a short D has digits of its own: an error of constant size would add up over many steps."""
    d = double(draw.matrix(*shape, dtype=dtype))
    d = (d * (norm / torch.linalg.matrix_norm(d, 2)[..., None, None])).to(dtype)
    increment, lost = phases.polar_of_any_sum(d, 1e3)
    assert increment.shape == d.shape
    assert increment.dtype == d.dtype
    assert not lost.any()
    if d.numel():
        whole, exact = polar_and_increment(d)
        smallest = torch.linalg.svdvals(whole - exact + double(d)).min().item()
        assert error(increment, exact) <= bound(dtype, 1.0, smallest) * min(1.0, norm) + bound(torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 3])
def test_the_largest_singular_value_may_be_at_the_end_of_the_interval(draw, m, dtype):
    """As it is where the bound of the norm is exact; rounding must not lead beyond the end."""
    d = torch.diag_embed(draw.matrix(100_000 // m, m, dtype=dtype))
    sizes = (1 + d.diagonal(dim1=-2, dim2=-1)).abs()
    d = d[sizes.amin(-1) > 0.05 * sizes.amax(-1).clamp_min(1)]
    increment, lost = phases.polar_of_any_sum(d, torch.finfo(dtype).eps ** -0.5)
    assert not lost.any()
    whole = double(increment.diagonal(dim1=-2, dim2=-1)) + 1
    assert (whole.abs() - 1).abs().max() <= bound(dtype) / 20
    exact = 1 + double(d.diagonal(dim1=-2, dim2=-1))
    assert (whole - exact / exact.abs()).abs().max() <= bound(dtype, 1.0, 0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 6), (9, 6)], ids=str)
@pytest.mark.parametrize("size", [1e-2, 0.2, 3.0])
def test_an_increment_is_as_unitary_as_its_own_size_allows(draw, size, shape, dtype):
    """However long D is, as where a step repeats until X + u stays in its direction."""
    root = draw.matrix(6, 6, dtype=dtype)
    positive = root @ root.mH
    turn = 1e-4 * draw.matrix(*shape, dtype=dtype)
    turn[:6] = turn[:6] - turn[:6].mH.clone()
    d = turn.clone()
    d[:6] += positive * (size / torch.linalg.matrix_norm(positive, 2))
    found = [(phases.polar_of_any_sum(d, 1e3)[0], 1e-4), (phases.polar_of_sum(turn * (size / 1e-4)), size)]
    for increment, length in found:
        f = double(increment)
        assert torch.linalg.matrix_norm(f[:6] + f[:6].mH + f.mH @ f) <= bound(dtype) * min(1.0, length)


@pytest.mark.parametrize("shape", [(4, 4), (6, 4)], ids=str)
def test_squares_of_a_long_sum_stay_in_the_range_of_single_precision(draw, shape):
    d = 1e12 * draw.point(*shape, dtype=torch.float32)
    increment, lost = phases.polar_of_any_sum(d, 1e3)
    assert not lost.any()
    assert error(increment, polar_and_increment(d)[1]) <= bound(torch.float32)


@pytest.mark.parametrize("longest", [64.0, 1e3, 2.0**20, 2.0**26])
@pytest.mark.parametrize("largest", [0.3, 1.0, 40.0, 1e5])
@pytest.mark.parametrize("shape", [(4, 4, 4), (4, 6, 4)], ids=str)
def test_singular_values_down_to_the_limit_and_below(of_singular_values, shape, largest, longest):
    size = max(1.0, largest)
    for smallest in (0.9, 0.1, 0.01, 1e-4, 1e-6, 2 / longest, 0.2 / longest, 0.01 / longest, 1e-12, 0.0):
        d = of_singular_values([largest, largest, 0.7 * size * smallest, size * smallest], *shape)
        increment, lost = phases.polar_of_any_sum(d, longest)
        if smallest >= 2 / longest:
            assert not lost.any()
            whole, exact = polar_and_increment(d)
            assert error(increment, exact) <= bound(torch.float64, 1.0, smallest)
            assert error((whole - exact + increment).mH @ (whole - exact + increment), torch.eye(4)) <= bound(d.dtype)
        elif smallest <= 0.2 / longest:
            assert lost.all()
            assert not increment.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 4])
def test_between_found_and_lost_there_is_nothing_that_is_not_unitary(draw, m, dtype):
    longest = 1e3
    smallest = torch.logspace(-3, 0.5, 2000, dtype=torch.float64) / longest
    u, v = (double(draw.point(m, m, dtype=dtype)) for _ in range(2))
    values = torch.ones(2000, m, dtype=torch.float64)
    values[:, -1] = smallest
    d = (u * values[:, None]) @ v - torch.eye(m)
    increment, lost = phases.polar_of_any_sum(d.to(dtype), longest)
    assert lost[0]
    assert not lost[-1]
    assert not increment[lost].any()
    whole = double(increment[~lost]) + torch.eye(m)
    assert error(whole.mH @ whole, torch.eye(m)) <= bound(dtype) / 5
    exact, rounding = u @ v, 2 * torch.finfo(dtype).eps / smallest[~lost]
    assert (torch.linalg.matrix_norm(whole - exact) <= 5 * rounding + bound(dtype)).all()


def test_members_of_a_stack_are_independent_and_what_is_not_finite_is_lost(of_singular_values, draw):
    short, zero = 1e-6 * draw.matrix(3, 3, dtype=torch.complex128), torch.zeros(3, 3, dtype=torch.complex128)
    members = [
        short,
        of_singular_values([1.0, 1.0, 0.0], 3, 3),
        of_singular_values([4.0, 2.0, 0.1], 3, 3),
        torch.full_like(zero, torch.nan),
        zero,
        torch.full_like(zero, torch.inf),
        1e300 * short,
    ]
    increment, lost = phases.polar_of_any_sum(torch.stack(members), 1e6)
    assert lost.tolist() == [False, True, False, True, False, True, True]
    for member, found in zip(members, increment, strict=True):
        alone, _ = phases.polar_of_any_sum(member, 1e6)
        assert error(found, alone) <= bound(torch.float64) * alone.abs().max().item()
    assert not increment[lost].any()


@pytest.mark.parametrize(
    ("function", "size", "most"),
    [
        (phases.exponential_increment, 0.03, 2),
        (phases.exponential_increment, 0.9, 6),
        (phases.polar_increment, 0.005, 2),
        (phases.polar_increment, 0.05, 3),
        (phases.polar_increment, 1.0, 8),
        (phases.polar_increment, 7.0, 15),
    ],
)
def test_how_many_products_are_made(skew, function, size, most):
    from torch.utils.flop_counter import FlopCounterMode

    n = 256
    omega = skew(size, torch.float32, n, n)
    with FlopCounterMode(display=False) as operations:
        function(omega)
    assert operations.get_total_flops() <= most * 2 * n**3
