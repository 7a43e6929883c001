"""UnitaryLowRank as a manifold: geoopt's laws, the metric, moves and transport against dense references.

geoopt's own laws are stated for full-rank tangents: they hold for k = None and 2k >= m, and at k = 1 for the
tangents of rank-one gradients.  Everything is compared in ‖·‖_F/√m with the promise of helpers.bound.
"""

import copy
import math
import pickle

import geoopt
import numpy as np
import pytest
import torch
from helpers import DTYPES, SHAPES, bound, double, error

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, linalg, reference
from projunn_manifold.factors import FactoredTensor, LowRank
from projunn_manifold.moves import Move

VARIANTS = [UnitaryLowRank, UnitaryLowRankExact]
BIG = [(12, 12), (3, 9, 9), (14, 6)]


def full_rank_k(shape):
    """Ranks at which a move is not truncated."""
    return [None, max(1, math.ceil(shape[-1] / 2)), shape[-1] + 3]


def rank_one_tangent(draw, manifold, x, norm=1.0):
    """A factored tangent of a rank-one gradient at x, as geoopt's optimisers would hold it."""
    a, b = draw.factors(tuple(x.shape), 1, x.dtype, norm)
    with torch.no_grad():
        return manifold.egrad2rgrad(x, FactoredTensor(LowRank(a, b)))


# -- moves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", [0.0, 1e-9, 1.0, 50.0])
def test_full_rank_moves_equal_the_dense_maps(draw, shape, dtype, norm):
    x = draw.point(*shape, dtype=dtype)
    u = draw.tangent(x, norm)
    for k in full_rank_k(shape):
        manifold = UnitaryLowRank(k)
        assert error(manifold.retr(x, u), reference.retraction(double(x), double(u))) <= bound(dtype, norm)
        assert error(manifold.expmap(x, u), reference.geodesic(double(x), double(u))) <= bound(dtype, norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BIG, ids=str)
@pytest.mark.parametrize("k", [1, 2])
def test_moves_of_a_low_rank_gradient_are_exact_factored_or_dense(draw, shape, k, dtype):
    x = draw.point(*shape, dtype=dtype)
    a, b = draw.factors(shape, k, dtype)
    manifold = UnitaryLowRank(k)
    with torch.no_grad():
        factored = manifold.egrad2rgrad(x, a @ b.mH)
    assert isinstance(factored, FactoredTensor)
    expected = reference.gradient(double(x), double(a @ b.mH))
    for u in (factored, factored.clone()):
        for scale in (1.0, -0.3):
            step = scale * expected
            assert error(scale * u + 0 * x, step) <= bound(dtype)
            assert error(manifold.retr(x, scale * u), reference.retraction(double(x), step)) <= bound(dtype)
            assert error(manifold.expmap(x, scale * u), reference.geodesic(double(x), step)) <= bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 16), (20, 12)], ids=str)
def test_a_truncated_move_is_a_move_along_a_projection_of_the_tangent(draw, shape, dtype):
    """At k = 2 a full-rank u moves along X Q skew(Q^H X^H u Q) Q^H + (I - XX^H) u Q Q^H for an orthonormal Q."""
    x = draw.point(*shape, dtype=dtype)
    u = draw.tangent(x, 1.0)
    manifold = UnitaryLowRank(2)
    reduced = manifold._reduced(x, u)
    q = double(reduced.q)
    assert q.shape == (shape[-1], 4)
    assert error(q.mH @ q, torch.eye(4, dtype=q.dtype)) <= bound(dtype)
    wide, v = double(x), double(u)
    inside = q.mH @ wide.mH @ v @ q
    expected = wide @ q @ (inside - inside.mH) / 2 @ q.mH + (v - wide @ wide.mH @ v) @ q @ q.mH
    left, right = reduced.outer()
    assert error(left @ right.mH, expected) <= bound(dtype)
    captured = torch.linalg.matrix_norm(expected) / torch.linalg.matrix_norm(v)
    assert captured > 0.1  # the projection of u, not of noise


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize(("shape", "slope"), [((12, 12), 3), ((16, 8), 2)], ids=str)
@pytest.mark.parametrize("k", [1, 2, None])
def test_order_of_d_against_t_on_tangents(draw, shape, slope, k, dtype):
    x = draw.point(*shape, dtype=dtype)
    a, b = draw.factors(shape, k or 5, dtype)
    manifold = UnitaryLowRank(k)
    with torch.no_grad():
        u = manifold.egrad2rgrad(x, a @ b.mH)
        sizes = [10.0**-e for e in (0.5, 1.0, 1.5, 2.0)]
        distances = [error(manifold.retr(x, t * u), manifold.expmap(x, t * u)) for t in sizes]
    slopes = [math.log10(distances[i] / distances[i + 1]) / 0.5 for i in range(len(sizes) - 1)]
    assert slopes[-1] == pytest.approx(slope, abs=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", BIG, ids=str)
def test_retr_of_zero_is_the_point_and_its_derivative_is_the_tangent(draw, shape, variant):
    x = draw.point(*shape, dtype=torch.float64)
    u = draw.tangent(x, 1.0)
    manifold = variant(None)
    assert torch.equal(manifold.retr(x, torch.zeros_like(u)), x)
    t = 1e-6
    derivative = (manifold.retr(x, t * u) - manifold.retr(x, -t * u)) / (2 * t)
    assert error(derivative, u) < 1e-9


def test_exact_rebinds_every_retraction(draw):
    x = draw.point(8, 8, dtype=torch.float64)
    u = draw.tangent(x, 1.5)
    exact = UnitaryLowRankExact(None)
    assert torch.equal(exact.retr(x, u), exact.expmap(x, u))
    assert torch.equal(exact.transp_follow_retr(x, u, u), exact.transp_follow_expmap(x, u, u))
    for ours, theirs in zip(exact.retr_transp(x, u, u), exact.expmap_transp(x, u, u), strict=True):
        assert torch.equal(ours, theirs)
    assert error(UnitaryLowRank(None).retr(x, u), exact.retr(x, u)) > 1e-2


# -- transport ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*BIG, (5, 1), (7, 6)], ids=str)
@pytest.mark.parametrize("k", [1, 2, None])
def test_transport_is_an_isometry_onto_the_new_tangent_space(draw, shape, k, dtype):
    x = draw.point(*shape, dtype=dtype)
    v, w = draw.tangent(x), draw.tangent(x)
    manifold = UnitaryLowRank(k)
    a, b = draw.factors(shape, 1, dtype, 1.5)
    with torch.no_grad():
        u = manifold.egrad2rgrad(x, a @ b.mH)
        for both, follow, dense in (
            (manifold.retr_transp, manifold.transp_follow_retr, reference.transport_retraction),
            (manifold.expmap_transp, manifold.transp_follow_expmap, reference.transport_geodesic),
        ):
            y, carried = both(x, u, v)
            assert torch.equal(follow(x, u, v), carried)
            assert error(carried, dense(double(x), double(u.clone()), double(v))) <= bound(dtype)
            normal = linalg.sym(double(y).mH @ double(carried))
            assert error(normal, torch.zeros_like(normal)) <= bound(dtype)
            before = reference.inner(double(x), double(v), double(w))
            after = reference.inner(double(y), double(carried), double(follow(x, u, w)))
            assert (before - after).abs().max().item() <= bound(dtype)
            general = manifold.transp(x, y, v)  # not told which move led to y
            assert error(linalg.sym(double(y).mH @ double(general)), torch.zeros_like(normal)) <= bound(dtype)
            squares = [reference.inner(double(p), double(t), double(t)) for p, t in ((x, v), (y, general))]
            assert (squares[0] - squares[1]).abs().max().item() <= bound(dtype)
            if shape[-1] == shape[-2] or dense is reference.transport_retraction:
                assert error(general, carried) <= bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*BIG, (5, 1)], ids=str)
def test_the_move_between_two_points_arrives(draw, shape, dtype):
    x, y = draw.point(*shape, dtype=dtype), draw.point(*shape, dtype=dtype)
    move = Move.between(x, y)
    assert error(move.apply(x), y) <= bound(dtype)
    assert error(move.carry(x), y) <= bound(dtype)  # g X = Y


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", BIG, ids=str)
def test_the_geodesic_carries_its_own_velocity_and_is_reversible(draw, shape, dtype):
    x = draw.point(*shape, dtype=dtype)
    u = draw.tangent(x, 1.0)
    manifold = UnitaryLowRankExact(None)
    assert manifold.reversible
    assert not UnitaryLowRankExact(1).reversible
    assert not UnitaryLowRank(None).reversible
    y, velocity = manifold.retr_transp(x, u, u)
    t = 1e-6
    derivative = (manifold.expmap(x, (1 + t) * u) - manifold.expmap(x, (1 - t) * u)) / (2 * t)
    assert error(velocity, derivative) < 1e-8
    back, returned = manifold.retr_transp(y, -velocity, velocity)
    assert error(back, x) <= bound(dtype)
    assert error(returned, u) <= bound(dtype)


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
    for point in (x, linalg.polar(x + 0.1)):
        assert linalg.unitarity_error(point).max().item() <= linalg.tolerance(dtype, shape[-2]) / 1.5
        assert manifold.projx(point) is point


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
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


# -- contract ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(7, 7), (9, 4)], ids=str)
def test_moves_broadcast(draw, shape, variant):
    manifold = variant(None)
    x, u, v = draw.point(*shape, dtype=torch.float64), draw.matrix(3, *shape, dtype=torch.float64), None
    u = manifold.proju(x, u)
    v = draw.tangent(x)
    for result, single in (
        (manifold.retr(x, u), lambda i: manifold.retr(x, u[i])),
        (manifold.retr(x.expand(3, *shape), u), lambda i: manifold.retr(x, u[i])),
        (manifold.proju(x.expand(3, *shape), u), lambda i: manifold.proju(x, u[i])),
        (manifold.transp_follow_retr(x, u, v.expand(3, *shape)), lambda i: manifold.transp_follow_retr(x, u[i], v)),
        (manifold.projx(2 * x.expand(3, *shape)), lambda i: manifold.projx(2 * x)),
        (manifold.egrad2rgrad(x, u), lambda i: manifold.egrad2rgrad(x, u[i])),
        (manifold.inner(x, u), lambda i: manifold.inner(x, u[i])[None, None]),
    ):
        expected = torch.stack([single(i) for i in range(3)])
        assert error(result.reshape(expected.shape), expected) <= bound(torch.float64, 10.0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scaled_and_product(draw, variant):
    base = variant(1)
    scaled = geoopt.Scaled(base, 2.0)
    x = draw.point(8, 8, dtype=torch.float64)
    a, b = draw.factors((8, 8), 1, torch.float64)
    with torch.no_grad():
        u = scaled.egrad2rgrad(x, a @ b.mH)
        assert isinstance(u, FactoredTensor)
        assert error(scaled.retr(x, u), base.retr(x, 0.5 * u.clone())) <= bound(torch.float64)
    y = UnitaryLowRank(None).expmap(x, draw.tangent(x, 0.5))
    assert scaled.dist(x, y).item() == pytest.approx(2 * base.dist(x, y).item())

    product = geoopt.ProductManifold((base, (8, 8)), (geoopt.Sphere(), 5))
    start = product.pack_point(x, torch.nn.functional.normalize(torch.ones(5, dtype=torch.float64), dim=0))
    p = geoopt.ManifoldParameter(start.clone(), manifold=product)
    optimizer = geoopt.optim.RiemannianAdam([p], lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (p * torch.linspace(-1, 1, p.numel(), dtype=p.dtype)).sum().backward()
        optimizer.step()
    assert product.check_point_on_manifold(p.detach())
    assert not torch.allclose(p.detach(), start)


def test_repr_and_copies_say_and_keep_what_they_are(draw):
    manifold = UnitaryLowRank(k=2, sampler="column", seed=7)
    assert repr(manifold) == "UnitaryLowRank(k=2, sampler=column, dense where 2k >= m) manifold"
    assert repr(UnitaryLowRankExact(None)) == "UnitaryLowRankExact(k=None, dense) manifold"
    x, g = draw.point(8, 8, dtype=torch.float64), draw.matrix(8, 8, dtype=torch.float64)
    manifold.egrad2rgrad(x, g)  # move the generator on
    copies = [copy.deepcopy(manifold), pickle.loads(pickle.dumps(manifold))]
    expected = manifold.egrad2rgrad(x, g)
    for other in copies:
        assert torch.equal(other.egrad2rgrad(x, g), expected)


def test_separate_calls_agree_until_the_next_gradient(draw):
    """A full-rank tangent at k = 1: retr twice, and transp_follow_retr after retr, use one sketch."""
    manifold = UnitaryLowRank(1)
    x = draw.point(20, 20, dtype=torch.float64)
    u, v = draw.tangent(x, 2.0), draw.tangent(x)
    y = manifold.retr(x, u)
    assert torch.equal(manifold.retr(x, u.clone()), y)
    carried = manifold.transp_follow_retr(x, u, v)
    assert manifold.check_vector_on_tangent(y, carried)
    assert torch.equal(carried, manifold.retr_transp(x, u, v)[1])
    manifold.egrad2rgrad(x, u)
    assert error(manifold.retr(x, u), y) > 1e-3


def test_numpy_integers_are_ranks():
    assert UnitaryLowRank(np.int64(2)).k == 2


@pytest.mark.parametrize("rank", [0, -1, 1.5, "1", True, torch.tensor(1)])
def test_bad_ranks_are_refused(rank):
    with pytest.raises((TypeError, ValueError), match="k must be an int >= 1"):
        UnitaryLowRank(rank)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"column, lsi, subspace, svd.*got 'lsy'"):
        UnitaryLowRank(1, sampler="lsy")
    with pytest.raises(TypeError, match="seed must be an int"):
        UnitaryLowRank(1, seed=0.5)
    with pytest.raises(ValueError, match="64 bits"):
        UnitaryLowRank(1, seed=2**70)
    manifold = UnitaryLowRank()
    for size, dtype, kind, name in (
        ((3, 5), None, ValueError, "size"),
        ((3,), None, ValueError, "size"),
        ((3, 3), torch.int64, TypeError, "dtype"),
        ((3, 3), torch.bfloat16, TypeError, "dtype"),
    ):
        for create in (manifold.random, manifold.origin):
            with pytest.raises(kind, match=f"`{name}` must"):
                create(*size, dtype=dtype)


def test_bad_points_and_vectors_are_refused():
    manifold = UnitaryLowRank()
    x = torch.eye(4)
    for data, kind, message in (
        (torch.zeros(2, 4), ValueError, "square or tall"),
        (torch.zeros(4), ValueError, "at least 2"),
        (x.half(), TypeError, "autocast"),
        (x.bfloat16(), TypeError, "autocast"),
        (x.long(), TypeError, "float32"),
    ):
        with pytest.raises(kind, match=message):
            geoopt.ManifoldParameter(data, manifold=manifold)
        ok, reason = manifold.check_point(data, explain=True)
        assert not ok
        assert message in reason
    for u, kind, message in (
        (None, TypeError, "NoneType"),
        (torch.zeros(4, 3), ValueError, "matrix shape"),
        (torch.zeros(4, 4).double(), TypeError, "dtype"),
        (torch.zeros(4, 4, device="meta"), ValueError, "device"),
    ):
        for method in (manifold.egrad2rgrad, manifold.retr, manifold.expmap, manifold.proju, manifold.inner):
            with pytest.raises(kind, match=message):
                method(x, u)
    start = x.clone()
    with pytest.raises(TypeError, match=r"backward\(\) first"):
        manifold.step_(x, None, 0.1)
    with pytest.raises(TypeError, match="`lr` must be a number"):
        manifold.step_(x, torch.ones(4, 4), "0.1")
    with pytest.raises(TypeError, match="`scale` must be a number"):
        manifold.retr_transp_(x, torch.zeros(4, 4), scale=None)
    assert torch.equal(x, start)
    with pytest.raises(ValueError, match="broadcast"):
        manifold.retr(torch.eye(4).expand(2, 4, 4), torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="cannot follow a move"):
        manifold.retr_transp(x, torch.zeros(4, 4), torch.zeros(3, 4, 4))


@pytest.mark.parametrize("k", [1, 2, None])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale", [math.nan, math.inf, 1e30])
def test_steps_beyond_all_rounding_are_refused(draw, variant, k, scale):
    """A learning rate of inf, nan or 1e30: the point is not touched, whichever way u comes."""
    manifold = variant(k)
    x, g = draw.point(12, 12, dtype=torch.float32), draw.matrix(12, 12, dtype=torch.float32)
    with torch.no_grad():
        u = manifold.egrad2rgrad(x, g)
        for step in (scale * u, scale * u.clone()):
            with pytest.raises(ValueError, match=r"step of shape .* has"):
                manifold.retr(x, step)
        with pytest.raises(ValueError, match="point of shape"):
            manifold.retr(x * math.nan, u.clone())
    with pytest.raises(ValueError, match=r"gradient of shape .* has"):
        manifold.egrad2rgrad(x, 3e38 * g.sign())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("k", [1, 2, None])
@pytest.mark.parametrize("sampler", ["lsi", "column", "subspace", "svd"])
def test_non_finite_gradients_and_steps_are_refused(draw, value, k, sampler):
    manifold = UnitaryLowRank(k, sampler=sampler)
    x, g = draw.point(12, 12, dtype=torch.float32), draw.matrix(12, 12, dtype=torch.float32)
    g[3, 4] = value
    with pytest.raises(ValueError, match=r"shape \(12, 12\) has \d+ non-finite"):
        manifold.egrad2rgrad(x, g)
    with pytest.raises(ValueError, match=r"step of shape \(12, 12\) has 1 non-finite"):
        manifold.retr(x, g)


def test_checks_explain_themselves(draw):
    manifold = UnitaryLowRank()
    x = draw.point(5, 5, dtype=torch.float64)
    ok, reason = manifold.check_point_on_manifold(2 * x, explain=True)
    assert not ok
    assert "X^H X != I" in reason
    ok, reason = manifold.check_vector_on_tangent(x, x, explain=True)
    assert not ok
    assert "X^H u + u^H X != 0" in reason
    assert manifold.check_vector_on_tangent(x, draw.tangent(x))


def test_steps_in_place_take_one_learning_rate_for_each_matrix(draw):
    for k in (1, 2, None):
        x, g = draw.point(8, 8, 8, dtype=torch.float64), draw.matrix(8, 8, 8, dtype=torch.float64)
        rates = torch.linspace(0.0, 1.0, 8, dtype=torch.float64)
        together = UnitaryLowRank(k).step_(x.clone(), g, rates)
        for t in range(8):
            assert error(together[t], UnitaryLowRank(k).step_(x[t].clone(), g[t], rates[t].item())) <= bound(x.dtype)


def test_steps_in_place_refuse_other_shapes_before_anything_moves(draw):
    manifold = UnitaryLowRank(1)
    x, v = draw.point(3, 8, 8, dtype=torch.float64), draw.matrix(8, 8, dtype=torch.float64)
    kept, u = x.clone(), draw.matrix(3, 8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"`v` must have the point's shape \(3, 8, 8\), got \(8, 8\)"):
        manifold.retr_transp_(x, u, v)
    with pytest.raises(ValueError, match="`gradient` must have the point's shape"):
        manifold.step_(x[0], u, 0.1)
    with pytest.raises(ValueError, match="is expanded"):
        manifold.retr_transp_(x, u, v.expand(3, 8, 8))
    assert torch.equal(x, kept)
    assert manifold._state.gradients == 0


def test_a_default_device_does_not_reach_into_a_step(draw):
    x, g = draw.point(3, 8, 8, dtype=torch.float64), draw.matrix(3, 8, 8, dtype=torch.float64)
    with torch.device("meta"), torch.no_grad():
        for point, gradient in ((x, g), (x[0].clone(), g[0])):
            manifold = UnitaryLowRank(1)
            assert manifold.retr(point, manifold.egrad2rgrad(point, gradient + 0.1 * point)).is_cpu
            assert manifold.step_(point, gradient, 0.1).is_cpu
