"""What of UnitaryLowRank needs no moves: tangent space and metric, points, distance, against dense oracles.

Everything is compared in ‖·‖_F/√m with the promise of helpers.bound.
"""

import math

import geoopt
import pytest
import torch
from helpers import DTYPES, SHAPES, bound, double, error

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, reference
from projunn_manifold.linalg import dense
from projunn_manifold.sketching.factored_tensor import FactoredTensor
from projunn_manifold.sketching.lowrank import LowRank


def rank_one_tangent(draw, manifold, x, norm=1.0):
    """A factored tangent of a rank-one gradient at x, as geoopt's optimisers would hold it."""
    a, b = draw.factors(tuple(x.shape), 1, x.dtype, norm)
    with torch.no_grad():
        return manifold.egrad2rgrad(x, FactoredTensor(LowRank(a, b)))


# -- tangent space and metric ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_proju_is_the_orthogonal_projection(draw, shape, dtype):
    manifold = UnitaryLowRank()
    x, u, v = draw.point(*shape, dtype=dtype), draw.matrix(*shape, dtype=dtype), draw.matrix(*shape, dtype=dtype)
    once = manifold.proju(x, u)
    scale = bound(dtype, float(torch.linalg.matrix_norm(u).max()))
    assert manifold.check_vector_on_tangent(x, once / torch.linalg.matrix_norm(once).max().clamp_min(1.0))
    assert error(manifold.proju(x, once), once) <= scale
    tangent = draw.tangent(x)
    assert error(manifold.proju(x, tangent), tangent) <= bound(dtype)
    self_adjoint = manifold.inner(x, once, v) - manifold.inner(x, u, manifold.proju(x, v))
    assert self_adjoint.abs().max().item() <= 10 * scale * float(torch.linalg.matrix_norm(v).max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("k", [None, 1])
def test_egrad2rgrad_is_the_gradient_of_the_metric(draw, shape, k, dtype):
    """<grad f, v>_X = d f(X)[v] for every tangent v; exact when G has rank k."""
    x, v = draw.point(*shape, dtype=dtype), draw.tangent(draw.point(*shape, dtype=dtype))
    v = UnitaryLowRank().proju(x, v)
    a, b = draw.factors(shape, 1, dtype)
    g = a @ b.mH
    gradient = UnitaryLowRank(k).egrad2rgrad(x, g)
    derivative = (g.conj() * v).sum((-2, -1)).real
    assert (reference.inner(x, gradient, v) - derivative).abs().max().item() <= bound(dtype)
    assert (UnitaryLowRank(k).inner(x, gradient, v) - derivative).abs().max().item() <= bound(dtype)
    assert error(gradient, reference.gradient(x, g)) <= bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inner_and_norm_of_dense_and_factored_tangents(draw, shape, dtype):
    x = draw.point(*shape, dtype=dtype)
    for k in (1, 2):
        manifold = UnitaryLowRank(k)
        u, v = rank_one_tangent(draw, manifold, x, 3.0), draw.tangent(x)
        dense = u.clone()
        expected = reference.inner(double(x), double(dense), double(dense))
        for value in (manifold.inner(x, u), manifold.inner(x, dense), manifold.inner(x, u, u)):
            assert value.dtype == x.real.dtype
            assert value.shape == x.shape[:-2]
            assert (value - expected).abs().max().item() <= 10 * bound(dtype, 10.0)
        assert (manifold.norm(x, u) - expected.sqrt()).abs().max().item() <= 10 * bound(dtype, 10.0)
        mixed = reference.inner(double(x), double(dense), double(v))
        assert (manifold.inner(x, u, v) - mixed).abs().max().item() <= 10 * bound(dtype, 10.0)
        assert manifold.component_inner(x, u).shape == (*x.shape[:-2], 1, 1)


# -- points ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_projx_is_the_closest_point_and_leaves_points_alone(draw, shape, dtype):
    manifold = UnitaryLowRank()
    eps = torch.finfo(dtype).eps
    for noise in (1.0, 1e-2, 50 * eps**0.5, eps**0.5 / 20, 60 * eps):
        a = draw.point(*shape, dtype=dtype) + noise * draw.matrix(*shape, dtype=dtype) / shape[-2] ** 0.5
        smallest = torch.linalg.svdvals(double(a)).min().item()
        projected = manifold.projx(a)
        assert error(projected, reference.polar(double(a))) <= bound(dtype, 1.0, smallest)
        assert projected.is_contiguous()
        assert manifold.projx(projected) is projected
    assert manifold.check_point_on_manifold(projected)


def test_projx_touches_only_the_bad_members_of_a_batch(draw):
    x = draw.point(4, 10, 6, dtype=torch.float64)
    x[2] *= 1.01
    projected = UnitaryLowRank().projx(x)
    assert torch.equal(projected[[0, 1, 3]], x[[0, 1, 3]])
    assert error(projected[2], reference.polar(x[2])) <= bound(torch.float64)
    with pytest.raises(ValueError, match="1 non-finite"):
        UnitaryLowRank().projx(x.index_fill(0, torch.tensor([0]), 0.0).masked_fill(x == x[1, 0, 0], math.nan))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (512, 512), (300, 40), (50, 8, 8)], ids=str)
def test_a_fresh_point_counts_as_a_point(shape, dtype):
    """Haar samples and one dense polar factor are within tolerance, with a factor of 1.5 to spare."""
    manifold = UnitaryLowRank()
    x = manifold.random(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for point in (x, dense.polar(x + 0.1)):
        assert dense.unitarity_error(point).max().item() <= dense.tolerance(dtype, shape[-2]) / 1.5
        assert manifold.projx(point) is point


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", [UnitaryLowRank, UnitaryLowRankExact])
def test_random_and_origin_are_points_of_this_manifold(shape, dtype, variant):
    manifold = variant(2)
    for point in (manifold.random(*shape, dtype=dtype), manifold.origin(*shape, dtype=dtype)):
        assert isinstance(point, geoopt.ManifoldTensor)
        assert point.manifold is manifold
        assert point.dtype == dtype
        assert point.shape == shape
        assert point.is_contiguous()
        assert manifold.check_point_on_manifold(point)
    assert torch.equal(manifold.origin(shape, dtype=dtype, seed=1), manifold.origin(*shape, dtype=dtype))


def test_random_draws_like_torch_nn_init():
    manifold = UnitaryLowRank()
    torch.manual_seed(3)
    first, second = manifold.random(6, 6), manifold.random(6, 6)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(manifold.random(6, 6), first)
    given = [manifold.random(6, 6, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_random_is_haar(dtype):
    """Moments of the Haar law on 4000 matrices: E X = 0, E |X_ij|² = 1/n, and both determinants on O(n)."""
    n, count = 3, 4000
    x = UnitaryLowRank().random(count, n, n, dtype=dtype, generator=torch.Generator().manual_seed(0))
    five_sigma = 5 / count**0.5
    assert x.mean(0).abs().max().item() < five_sigma
    assert (x.abs().square().mean(0) - 1 / n).abs().max().item() < five_sigma
    trace = torch.linalg.diagonal(x).sum(-1)
    assert abs((trace.abs() ** 2).mean().item() - 1) < 3 * five_sigma  # QR without the phase fix fails this
    if not dtype.is_complex:
        assert abs(torch.linalg.det(x).mean().item()) < five_sigma


# -- distance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (9, 9), (4, 8, 8)], ids=str)
def test_dist_and_logmap_invert_expmap(draw, shape, dtype):
    x = draw.point(*shape, dtype=dtype)
    manifold = UnitaryLowRank(None)
    for spectral_norm in (1e-7, 0.5, 3.0):  # angles under π
        u = draw.tangent(x)
        u = u * (spectral_norm / torch.linalg.matrix_norm(u, 2).clamp_min(1e-300)[..., None, None])
        y = manifold.expmap(x, u)
        tolerance = bound(dtype) / (math.pi - spectral_norm)
        assert error(manifold.logmap(x, y), u) <= tolerance
        assert (manifold.dist(x, y) - manifold.norm(x, u)).abs().max().item() <= 3 * tolerance
        assert error(manifold.expmap(x, manifold.logmap(x, y)), y) <= tolerance
    zero = manifold.logmap(x, x)
    assert error(zero, torch.zeros_like(zero)) <= bound(dtype)
    assert manifold.dist(x, x, keepdim=True).shape == (*shape[:-2], 1, 1)


def test_logmap_with_repeated_and_opposite_angles():
    """Angles ±θ and repeated ones share eigenspaces of W's Hermitian part; the logarithm must not mix them."""
    manifold = UnitaryLowRank(None)
    angles = torch.tensor([1.0, 1.0, -1.0, 2.5, -2.5, 0.0, 1e-9], dtype=torch.float64)
    basis = manifold.random(7, 7, dtype=torch.complex128)
    omega = basis @ torch.diag(1j * angles) @ basis.mH
    y = torch.linalg.matrix_exp(omega)
    assert error(manifold.logmap(torch.eye(7, dtype=y.dtype), y), omega) <= bound(y.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_points_half_a_turn_apart_have_no_logarithm(draw, dtype):
    manifold, (x, basis) = UnitaryLowRank(None), (draw.point(6, 6, dtype=dtype) for _ in range(2))
    turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, 1.0], dtype=dtype))
    with pytest.raises(ValueError, match="not unique"):
        manifold.logmap(x, x @ basis @ turn @ basis.mH)


def test_dist_at_an_angle_of_pi_and_errors(draw):
    manifold = UnitaryLowRank(None)
    eye = torch.eye(4, dtype=torch.float64)
    half_turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64))
    assert manifold.dist(eye, half_turn).item() == pytest.approx(math.pi * 2**0.5)
    reflection = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0], dtype=torch.float64))
    for y in (half_turn, -eye, half_turn.to(torch.complex128)):
        with pytest.raises(ValueError, match="not unique"):
            manifold.logmap(eye.to(y.dtype), y)
    for function in (manifold.dist, manifold.logmap):
        with pytest.raises(ValueError, match="determinant"):
            function(eye, reflection)
        with pytest.raises(NotImplementedError, match="square"):
            function(eye[:, :2], eye[:, :2])
