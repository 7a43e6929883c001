"""UnitaryLowRank as a manifold: its moves and transport against dense references.

geoopt's own laws are stated for full-rank tangents: they hold for k = None and 2k >= m.  Everything is compared in
‖·‖_F/√m with the promise of helpers.bound.
"""

import math

import pytest
import torch
from helpers import DTYPES, SHAPES, bound, double, error

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, reference
from projunn_manifold.linalg import dense
from projunn_manifold.linalg.products import matrix
from projunn_manifold.moves.move import LowRankMove
from projunn_manifold.sketching.factored_tensor import FactoredTensor

VARIANTS = [UnitaryLowRank, UnitaryLowRankExact]
BIG = [(12, 12), (3, 9, 9), (14, 6)]


def full_rank_k(shape):
    """Ranks at which a move is not truncated."""
    return [None, max(1, math.ceil(shape[-1] / 2)), shape[-1] + 3]


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
    q = double(reduced.right)
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


@pytest.mark.parametrize("k", [1, None])
def test_exact_moves_along_the_geodesic_wherever_optimisers_move(draw, k):
    x = draw.point(8, 8, dtype=torch.float64)
    exact, direct = UnitaryLowRankExact(k), UnitaryLowRank(k)
    with torch.no_grad():
        u = exact.egrad2rgrad(x, draw.matrix(8, 8, dtype=torch.float64)).clone()
    y, carried = reference.geodesic(x, u), reference.transport_geodesic(x, u, u)
    assert error(exact.retr(x, u), y) <= bound(x.dtype)
    assert error(exact.transp_follow_retr(x, u, u), carried) <= bound(x.dtype)
    for ours, theirs in zip(exact.retr_transp(x, u, u), (y, carried), strict=True):
        assert error(ours, theirs) <= bound(x.dtype)
    moved = u.clone()
    assert error(exact.retr_transp_(x.clone(), u, moved), y) <= bound(x.dtype)
    assert error(moved, carried) <= bound(x.dtype)
    assert error(direct.retr(x, u), y) > 1e-2


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
        for both, follow, exact in (
            (manifold.retr_transp, manifold.transp_follow_retr, reference.transport_retraction),
            (manifold.expmap_transp, manifold.transp_follow_expmap, reference.transport_geodesic),
        ):
            y, carried = both(x, u, v)
            assert torch.equal(follow(x, u, v), carried)
            assert error(carried, exact(double(x), double(u.clone()), double(v))) <= bound(dtype)
            normal = dense.sym(double(y).mH @ double(carried))
            assert error(normal, torch.zeros_like(normal)) <= bound(dtype)
            before = reference.inner(double(x), double(v), double(w))
            after = reference.inner(double(y), double(carried), double(follow(x, u, w)))
            assert (before - after).abs().max().item() <= bound(dtype)
            general = manifold.transp(x, y, v)  # not told which move led to y
            assert error(dense.sym(double(y).mH @ double(general)), torch.zeros_like(normal)) <= bound(dtype)
            squares = [reference.inner(double(p), double(t), double(t)) for p, t in ((x, v), (y, general))]
            assert (squares[0] - squares[1]).abs().max().item() <= bound(dtype)
            if shape[-1] == shape[-2] or exact is reference.transport_retraction:
                assert error(general, carried) <= bound(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*BIG, (5, 1)], ids=str)
def test_the_move_between_two_points_arrives(draw, shape, dtype):
    x, y = draw.point(*shape, dtype=dtype), draw.point(*shape, dtype=dtype)
    move = LowRankMove.between(x, y)
    assert error(move.apply(matrix(x)), y) <= bound(dtype)
    assert error(move.transport(x), y) <= bound(dtype)  # g X = Y


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
