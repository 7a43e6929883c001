"""From gradients and vectors to tangents of low rank: exact where the rank allows it, refused where it must be."""

import pytest
import torch
from helpers import DTYPES, bound, double, error

from projunn_manifold import reference
from projunn_manifold.linalg.products import matrix
from projunn_manifold.manifold.sketcher import Sketcher
from projunn_manifold.manifold.state import State
from projunn_manifold.sketching import FactoredTensor, LowRank


def formed(factors):
    left, right = factors.outer()
    return double(left) @ double(right).mH


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(12, 12), (15, 8), (3, 10, 10)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_gradient_of_rank_k_is_kept_whole(draw, shape, k, dtype):
    x, (a, b) = draw.point(*shape, dtype=dtype), draw.factors(shape, k, dtype)
    sketcher = Sketcher(k, "lsi", State(0))
    g = a @ b.mH
    for u in (g, FactoredTensor(LowRank(a, b))):
        assert error(formed(sketcher.factors(matrix(x), u)), g) <= bound(dtype) * 10
        assert (
            error(formed(sketcher.tangent(matrix(x), u)), reference.gradient(double(x), double(g))) <= bound(dtype) * 10
        )
    decayed = sketcher.factors(matrix(x), g + 0.5 * x, decay=0.5)
    assert error(formed(decayed), g) <= bound(dtype) * 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_look_ahead(draw, dtype):
    g, state = draw.matrix(12, 12, dtype=dtype), State(0)
    sketcher = Sketcher(2, "lsi", state)
    ahead = sketcher.sketch(matrix(g), ahead=1)
    state.count_gradient(g)
    assert all(map(torch.equal, sketcher.sketch(matrix(g)), ahead))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(12, 12), (16, 10)], ids=str)
def test_a_vector_of_rank_2k_is_projected_and_nothing_else(draw, shape, dtype):
    x, (a, b) = draw.point(*shape, dtype=dtype), draw.factors(shape, 4, dtype)
    u = a @ b.mH
    reduced = Sketcher(2, "lsi", State(0)).reduced(matrix(x), u)
    inside = x.mH @ u
    q = torch.linalg.qr(b).Q
    inside = q.mH @ inside @ q
    expected = x @ q @ (inside - inside.mH) / 2 @ q.mH + (u - x @ x.mH @ u)
    assert error(formed(reduced), expected) <= bound(dtype) * 10


def test_a_factorisation_that_fails_is_told_from_a_gradient_that_is_not_finite(draw):
    def failing(gradient, k, generator):
        raise torch.linalg.LinAlgError("no convergence")

    sketcher = Sketcher(1, failing, State(0))
    with pytest.raises(RuntimeError, match=r"finite gradient of shape .* did not converge"):
        sketcher.sketch(matrix(torch.eye(4)))
    factors = sketcher.sketch(matrix(torch.full((4, 4), torch.nan)))
    assert all(t.isnan().all() for t in factors)


def test_names_of_samplers_and_dense_moves():
    assert Sketcher(1, "subspace", State(0)).sampler_name == "subspace"
    assert Sketcher(1, test_draws_look_ahead, State(0)).sampler_name == "test_draws_look_ahead"
    for k, m, is_dense in ((None, 100, True), (1, 2, True), (1, 3, False), (4, 8, True), (4, 9, False)):
        assert Sketcher(k, "lsi", State(0)).is_dense(torch.empty(100, m)) is is_dense
    with pytest.raises(ValueError, match="sampler must be one of"):
        Sketcher(1, "nothing", State(0))
