"""Moves Y = X + W F Sᴴ: in place and fresh, for another batch, and their completion to a unitary."""

import pytest
import torch
from helpers import DTYPES, bound, double, error

from projunn_manifold.linalg.products import matrix
from projunn_manifold.moves.move import LowRankMove, complete_to_unitary


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 8), (9, 5), (3, 7, 7)], ids=str)
def test_a_move_adds_its_product_in_place_and_fresh(draw, shape, dtype):
    *batch, n, m = shape
    x = draw.matrix(*shape, dtype=dtype)
    w, f, s = (draw.matrix(*batch, *size, dtype=dtype) for size in ((n, 3), (3, 2), (m, 2)))
    move = LowRankMove(w, f, s, None)
    expected = double(x) + double(w) @ double(f) @ double(s).mH
    y = move.apply(matrix(x))
    assert error(y, expected) <= bound(dtype, 100.0)
    assert y.data_ptr() != x.data_ptr()
    assert move.apply_(matrix(x)) is x
    assert error(x, expected) <= bound(dtype, 100.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_one_point_follows_a_move_of_many(draw, dtype):
    x, w, s = draw.point(6, 6, dtype=dtype), draw.matrix(4, 6, 2, dtype=dtype), draw.matrix(4, 6, 2, dtype=dtype)
    move = LowRankMove(w, torch.eye(2, dtype=dtype).expand(4, 2, 2), s, None)
    assert error(move.apply(matrix(x)), x + w @ s.mH) <= bound(dtype, 10.0)
    with pytest.raises(ValueError, match=r"batch shape \(3,\) cannot follow a move of batch shape \(4,\)"):
        move.apply(matrix(x.expand(3, 6, 6).contiguous()))


@pytest.mark.parametrize("longest", [None, 1e3])
def test_a_square_core_is_complete_and_nothing_is_computed(draw, longest):
    core = draw.matrix(3, 4, 4, dtype=torch.float32)
    assert complete_to_unitary(core, longest) is core


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("w", "r"), [(4, 4), (5, 2), (6, 3)])
def test_a_core_is_completed_to_a_unitary_that_extends_it(draw, w, r, dtype):
    image = draw.point(3, w, r, dtype=dtype)
    start = torch.eye(w, dtype=dtype)
    group = complete_to_unitary(image - start[:, :r])
    g = double(group) + double(start)
    assert error(g[..., :r], image) <= bound(dtype)
    assert error(g.mH @ g, double(start)) <= bound(dtype)
