"""The contract of tangents, for every leaf: what they stand for, how they scale, and where their moves arrive."""

import pytest
import torch
from helpers import DTYPES, bound, double, error

from projunn_manifold import reference
from projunn_manifold.linalg.products import matrix
from projunn_manifold.moves.angle import GEODESIC, POLAR
from projunn_manifold.moves.frame import FramedTangent
from projunn_manifold.moves.full_rank import FullRankTangent
from projunn_manifold.moves.rank_k import RankKTangent
from projunn_manifold.moves.rank_one import RankOneTangent
from projunn_manifold.moves.tangent import Footpoint
from projunn_manifold.sketching.lowrank import LowRank

LEAVES = [
    (RankOneTangent, (12, 12), 1),
    (RankOneTangent, (3, 8, 8), 1),
    (RankKTangent, (12, 12), 3),
    (RankKTangent, (3, 8, 8), 2),
    (FramedTangent, (12, 12), 2),
    (FramedTangent, (14, 6), 2),
    (FramedTangent, (3, 9, 5), 1),
    (FullRankTangent, (12, 12), 12),
    (FullRankTangent, (3, 8, 8), 8),
]


@pytest.fixture(params=LEAVES, ids=lambda leaf: f"{leaf[0].__name__}-{leaf[1]}-{leaf[2]}")
def given(request, draw):
    """A point, a tangent there, and the dense tangent that it stands for, in double precision."""

    def make(dtype, norm=1.0):
        kind, shape, k = request.param
        x, (a, b) = draw.point(*shape, dtype=dtype), draw.factors(shape, k, dtype, norm)
        u = reference.gradient(double(x), double(a) @ double(b).mH)
        if kind is FullRankTangent:
            return x, kind.of_vector(matrix(x), a @ b.mH), u
        return x, kind.of_gradient(matrix(x), LowRank(a, b)), u

    return make


def formed(tangent):
    left, right = tangent.outer()
    return double(left) @ double(right).mH


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tangent_stands_for_the_gradient(given, dtype):
    x, tangent, u = given(dtype)
    assert error(formed(tangent), u) <= bound(dtype)
    assert tangent.shape == x.shape
    assert (tangent.like.dtype, tangent.like.device) == (x.dtype, x.device)
    squares = torch.as_tensor(tangent.squared_norm(), dtype=torch.float64)
    exact = reference.inner(double(x), u, u)
    assert torch.allclose(squares.expand(exact.shape), exact, rtol=1e3 * torch.finfo(dtype).eps)
    assert error(formed(tangent.scaled(-0.5)), -0.5 * u) <= bound(dtype)
    if x.dim() > 2:
        each = torch.arange(1.0, len(x) + 1)
        assert error(formed(tangent.scaled(each)), u * each[:, None, None]) <= bound(dtype, len(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [0.0, 1e-3, 1.0, 3.0])
def test_its_moves_arrive_where_the_dense_maps_do(given, dtype, norm):
    x, tangent, u = given(dtype, norm)
    limit = bound(dtype, norm)
    assert error(tangent.geodesic().apply(matrix(x)), reference.geodesic(double(x), u)) <= limit
    assert error(tangent.retraction().apply(matrix(x)), reference.retraction(double(x), u)) <= limit
    v = reference.gradient(double(x), double(x).flip(-1)).to(dtype)
    carried = reference.transport_geodesic(double(x), u, double(v))
    assert error(tangent.geodesic().transport(v), carried) <= limit
    carried = reference.transport_retraction(double(x), u, double(v))
    assert error(tangent.retraction().transport(v), carried) <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128], ids=str)
def test_what_is_lost_is_zero_whatever_its_entries(given, dtype):
    x, tangent, u = given(dtype)
    kept = torch.ones(x.shape[:-2], dtype=torch.bool)
    kept.view(-1)[0] = False
    spoilt = tangent.scaled(torch.where(kept, 1.0, torch.nan) if kept.dim() else float("nan"))
    masked = spoilt.without(~kept)
    assert error(formed(masked), u * kept[..., None, None]) <= bound(dtype)
    assert torch.isfinite(torch.as_tensor(masked.squared_norm())).all()
    assert error(masked.geodesic().apply(matrix(x))[~kept] if kept.dim() else masked.geodesic().apply(matrix(x)),
                 x[~kept] if kept.dim() else x) == 0  # fmt: skip


def test_a_footpoint_knows_its_point_and_what_was_written_to_it(draw):
    x = draw.point(6, 6, dtype=torch.float64)
    footpoint = Footpoint.of(x)
    assert footpoint.is_at(x)
    assert not footpoint.is_at(x.clone())
    assert not footpoint.is_at(x.mT)
    x.mul_(1.0)
    assert not footpoint.is_at(x)


@pytest.mark.parametrize(("angle", "alpha"), [(GEODESIC, lambda t: t), (POLAR, torch.atan)], ids=["geodesic", "polar"])
def test_functions_of_the_angle_are_their_definitions(angle, alpha):
    theta = torch.tensor([-20.0, -1.0, -0.1, 0.1, 0.5, 3.0, 50.0], dtype=torch.float64)
    phi = (torch.exp(1j * alpha(theta)) - 1) / (1j * theta)
    assert torch.equal(angle.alpha(theta), alpha(theta))
    assert torch.allclose(angle.complex_phi(theta), phi, atol=1e-14)
    assert torch.allclose(angle.psi(theta), (phi - 1) / (1j * theta), atol=1e-13)
    for t, exact in zip(theta.tolist(), phi.tolist(), strict=True):
        assert complex(*angle.phi(t)) == pytest.approx(exact, abs=1e-14)
    zero = torch.zeros(1, dtype=torch.float64)
    assert angle.complex_phi(zero) == 1
    assert angle.psi(zero) == 0.5
    assert angle.phi(0.0) == (1.0, 0.0)
