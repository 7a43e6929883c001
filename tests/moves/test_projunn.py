"""projunn_d and projunn_t against the SVD polar factor and the matrix exponential in double precision.

The tolerance is the package's promise: ‖Y - Y_ref‖_F/√m ≤ 50 eps max(1, ‖a b^H‖₂)/min(1, σ_min(X + a b^H)), the
last factor for D only.  The reference is exact up to its own rounding, which in float64 is of the same order
as ours; the promise leaves room for both.
"""

import math

import pytest
import torch
from helpers import DTYPES, SHAPES, bound, double, error, norm2, ranks

from projunn_manifold import projunn_d, projunn_d_, projunn_t, projunn_t_, reference
from projunn_manifold.linalg.products import matrix
from projunn_manifold.moves.projunn import move_d, move_t
from projunn_manifold.sketching.lowrank import LowRank

CASES = [(shape, k) for shape in SHAPES for k in ranks(shape)]
BOTH = [(projunn_d, reference.projunn_d), (projunn_t, reference.projunn_t)]


def smallest_singular_value(x, a, b):
    return torch.linalg.svdvals(double(x) + double(a) @ double(b).mH).min().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "k"), CASES, ids=str)
@pytest.mark.parametrize("norm", [0.0, 1e-12, 1e-3, 0.5, 30.0, 1e3])
def test_equals_the_dense_map(draw, shape, k, dtype, norm):
    x = draw.point(*shape, dtype=dtype)
    a, b = draw.factors(shape, k, dtype, norm)
    expected = reference.projunn_t(double(x), double(a), double(b))
    assert error(projunn_t(x, a, b), expected) <= bound(dtype, norm)
    smallest = smallest_singular_value(x, a, b)
    expected = reference.projunn_d(double(x), double(a), double(b))
    assert error(projunn_d(x, a, b), expected) <= bound(dtype, norm, smallest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 16), (20, 8)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("norm", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("kind", ["a = X b", "equal columns", "one zero column"])
def test_parallel_factors(draw, shape, k, dtype, norm, kind):
    x = draw.point(*shape, dtype=dtype)
    a, b = draw.factors(shape, k, dtype, norm)
    if kind == "a = X b":  # a positive multiple of X on span b: the step is normal to the manifold
        a = x @ b * (norm / norm2(x @ b @ b.mH))
    elif kind == "equal columns":
        a, b = a[..., :1].expand_as(a), b[..., :1].expand_as(b)
    else:
        a = torch.cat((a[..., :-1], torch.zeros_like(a[..., -1:])), -1)
    size = norm2(double(a) @ double(b).mH)
    for ours, dense in BOTH:
        smallest = smallest_singular_value(x, a, b) if ours is projunn_d else 1.0
        expected = dense(double(x), double(a), double(b))
        assert error(ours(x, a, b), expected) <= bound(dtype, size, smallest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shape", [(64, 64), (64, 20)], ids=str)
def test_unbalanced_and_huge_factors_stay_finite_and_right(draw, shape, k, dtype):
    x = draw.point(*shape, dtype=dtype)
    for size_a, size_b in ((1e-10, 1e10), (1e8, 1e-8), (1e3, 1e3)):
        a, b = draw.factors(shape, k, dtype)
        a, b = a * size_a, b * size_b
        norm = norm2(double(a) @ double(b).mH)
        expected = reference.projunn_t(double(x), double(a), double(b))
        assert error(projunn_t(x, a, b), expected) <= bound(dtype, norm)


@pytest.mark.parametrize("ours", [projunn_d, projunn_t])
@pytest.mark.parametrize("is_a_large", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 64])
@pytest.mark.parametrize("shape", [(64, 64), (64, 20), (2, 8, 8)], ids=str)
def test_factors_at_the_ends_of_the_range_make_the_step_of_balanced_ones(draw, shape, k, dtype, is_a_large, ours):
    x, (a, b) = draw.point(*shape, dtype=dtype), draw.factors(shape, k, dtype, 0.5)
    size = 2.0 ** round(math.log2(torch.finfo(dtype).max / 2 / max(a.abs().max(), b.abs().max()).item()))
    size = size if is_a_large else 1 / size
    balanced = ours(x, a, b)
    assert error(ours(x, a * size, b / size), balanced) <= bound(dtype) + 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("ours", [projunn_d, projunn_t, projunn_d_, projunn_t_])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("shape", [(16, 16), (20, 9), (3, 12, 12)], ids=str)
def test_a_product_beyond_the_range_is_refused_and_nothing_is_changed(draw, shape, k, dtype, ours):
    x, (a, b) = draw.point(*shape, dtype=dtype), draw.factors(shape, k, dtype)
    kept, size = x.clone(), torch.finfo(dtype).max ** 0.8 / 1e3
    if len(shape) > 2:
        a[1:] /= size  # one member suffices
        b[1:] /= size
    with pytest.raises(ValueError, match=r"singular|too large|too long"):
        ours(x, a * size, b * size)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(32, 32), (32, 12)], ids=str)
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("ours", [projunn_d, projunn_t])
def test_the_increment_is_accurate_at_every_step_size(draw, ours, shape, k, dtype):
    """Y - X itself, before it is rounded into X: relative error under 1e-5 in single precision.

    The increment is read off by moving X = 0 of the same factors' thin products, that is from the move; the
    oracle is the series of the dense map, in double precision, where Y - X would cancel.
    """
    move_of = {projunn_d: move_d, projunn_t: move_t}[ours]  # the public functions add the move to X
    x = draw.point(*shape, dtype=dtype)
    for exponent in range(0, -13, -1):
        a, b = draw.factors(shape, k, dtype, 0.5 * 10.0**exponent)
        move = move_of(matrix(x), LowRank(a, b))
        increment = double(move.left @ move.core) @ double(move.right).mH
        expected = dense_increment(ours, double(x), double(a), double(b))
        relative = torch.linalg.matrix_norm(increment - expected) / torch.linalg.matrix_norm(expected)
        assert relative.item() < 1e-5, exponent


def dense_increment(ours, x, a, b):
    """Y - X by power series, which does not cancel: Σ A^j X/j! for T, (X + ab^H)(I + N)^(-1/2) - X for D.

    The oracle works with ‖a b^H‖ ≤ ½, where twelve terms of N's binomial series would not do; it uses sixty.
    """
    x = torch.linalg.svd(x, full_matrices=False)
    x = x.U @ x.Vh  # the float32 point, made unitary in double precision
    step = a @ b.mH
    if ours is projunn_t:
        lift = reference.lift(x, reference.gradient(x, step))
        term = increment = lift @ x
        for j in range(2, 30):
            term = lift @ term / j
            increment = increment + term
        return increment
    n = x.mH @ step + step.mH @ x + step.mH @ step
    if torch.linalg.matrix_norm(n, 2) > 0.3:  # the series is slow; nothing cancels for steps as large as this
        return reference.polar(x + step) - x
    power, series, coefficient = n, torch.zeros_like(n), 1.0
    for j in range(1, 60):
        coefficient *= -(2 * j - 1) / (2 * j)
        series = series + coefficient * power
        power = power @ n
    return step + (x + step) @ series


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(("shape", "slope"), [((12, 12), 2), ((16, 8), 1)], ids=str)
def test_order_of_d_against_t_on_raw_factors(draw, shape, slope, k, dtype):
    x = draw.point(*shape, dtype=dtype)
    a, b = draw.factors(shape, k, dtype)
    sizes = [10.0**-e for e in (1.0, 1.5, 2.0, 2.5)]
    distances = [error(projunn_d(x, t * a, b), projunn_t(x, t * a, b)) for t in sizes]
    slopes = [math.log10(distances[i] / distances[i + 1]) / 0.5 for i in range(len(sizes) - 1)]
    assert slopes[-1] == pytest.approx(slope, abs=0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_a_batch_equals_its_members(draw, k, dtype):
    x = draw.point(4, 10, 10, dtype=dtype)
    a, b = draw.factors((4, 10, 10), k, dtype)
    for ours, _ in BOTH:
        together = ours(x, a, b)
        one_by_one = torch.stack([ours(x[i], a[i], b[i]) for i in range(4)])
        assert error(together, one_by_one) <= bound(dtype) / 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 8), (2, 9, 4)], ids=str)
def test_in_place_equals_pure_and_keeps_the_tensor(draw, shape, dtype):
    x = draw.point(*shape, dtype=dtype)
    a, b = draw.factors(shape, 2, dtype)
    for pure, in_place in ((projunn_d, projunn_d_), (projunn_t, projunn_t_)):
        kept, target = x.clone(), x.clone()
        expected = pure(x, a, b)
        assert torch.equal(x, kept)
        assert in_place(target, a, b) is target
        assert torch.equal(target, expected)
        assert expected.is_contiguous()


def test_memory_order_is_kept(draw):
    x = draw.point(3, 6, 6, dtype=torch.float64).mT.contiguous().mT
    a, b = draw.factors((3, 6, 6), 1, torch.float64)
    y = projunn_t(x, a, b)
    assert y.stride() == x.stride()
    assert error(y, projunn_t(x.contiguous(), a, b)) <= bound(torch.float64)


def test_an_expanded_point_is_not_written_to(draw):
    a, b = draw.factors((2, 4, 4), 1, torch.float32)
    x = torch.eye(4).expand(2, 4, 4)
    for function in (projunn_d_, projunn_t_):
        with pytest.raises(ValueError, match="expanded"):
            function(x, a, b)
    assert torch.equal(x[0], torch.eye(4))
    assert error(projunn_t(x, a, b), projunn_t(x.clone(), a, b)) <= bound(torch.float32)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shape", [(5, 5), (2, 5, 5), (6, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("wanted", ["x", "a", "b", "ab"])
def test_derivatives_backwards_and_forwards(draw, shape, k, dtype, wanted):
    x = draw.point(*shape, dtype=dtype)
    a, b = draw.factors(shape, k, dtype)
    inputs = [t.requires_grad_(name in wanted) for name, t in (("x", x), ("a", a), ("b", b))]
    assert torch.autograd.gradcheck(projunn_t, inputs, check_forward_ad=k == 1, fast_mode=True)


@pytest.mark.parametrize("k", [1, 2])
def test_torch_func_sees_the_same_derivative(draw, k):
    x = draw.point(5, 5, dtype=torch.float64)
    a, b = draw.factors((5, 5), k, torch.float64)
    weight = draw.matrix(5, 5, dtype=torch.float64)

    def loss(a):
        return (weight * projunn_t(x, a, b)).sum()

    gradient = torch.func.grad(loss)(a)
    loss(a.requires_grad_()).backward()
    assert error(gradient, a.grad) <= bound(torch.float64)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of vmap, in its own words
@pytest.mark.parametrize("function", [projunn_d, projunn_t])
@pytest.mark.parametrize(("shape", "k"), [((5, 5), 1), ((5, 5), 2), ((7, 4), 2), ((64, 64), 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("many", [(None, 0, 0), (None, 0, None), (None, None, 0), (0, 0, 0), (0, None, None)], ids=str)
def test_vmap_maps_over_points_and_factors(draw, function, shape, k, dtype, many):
    x = draw.point(3, *shape, dtype=dtype)
    a, b = draw.factors((3, *shape), k, dtype, norm=0.5)
    given = [t if mapped == 0 else t[0] for t, mapped in zip((x, a, b), many, strict=True)]
    found = torch.vmap(function, many)(*given)
    expected = torch.stack(
        [function(*(t[i] if m == 0 else t for t, m in zip(given, many, strict=True))) for i in range(3)]
    )
    assert error(found, expected) <= bound(dtype, 4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_many_derivatives_by_factors_at_one_point(draw):
    x = draw.point(5, 5, dtype=torch.float64)
    a, b = draw.factors((3, 5, 5), 2, torch.float64)

    def loss(a, b):
        return projunn_d(x, a, b).sin().sum()

    found = torch.vmap(torch.func.grad(loss))(a, b)
    for i in range(3):
        own = a[i].clone().requires_grad_()
        loss(own, b[i]).backward()
        assert error(found[i], own.grad) <= 10 * bound(torch.float64)


def test_a_singular_step_is_refused_and_nothing_is_changed(draw):
    x = draw.point(6, 6, dtype=torch.float64)
    b = torch.nn.functional.normalize(draw.matrix(6, 1, dtype=torch.float64), dim=0)
    a = -x @ b  # X + a b^H has a zero singular value
    kept = x.clone()
    for function in (projunn_d, projunn_d_):
        with pytest.raises(ValueError, match="singular"):
            function(x, a, b)
    assert torch.equal(x, kept)
    assert error(projunn_t(x, a, b), x) <= bound(torch.float64)  # a normal step does not move T


def bad_inputs():
    x, a, b = torch.eye(4), torch.zeros(4, 1), torch.zeros(4, 1)
    return {
        "wide x": ((x[:2], a[:2], b), ValueError, "square or tall"),
        "vector x": ((x[0], a, b), ValueError, "at least 2 dimensions"),
        "half": ((x.half(), a.half(), b.half()), TypeError, "autocast"),
        "bfloat16": ((x.bfloat16(), a.bfloat16(), b.bfloat16()), TypeError, "autocast"),
        "integer": ((x.long(), a.long(), b.long()), TypeError, "float32"),
        "dtype": ((x, a.double(), b), TypeError, "dtype"),
        "device": ((x, a, b.to("meta")), ValueError, "device"),
        "rows": ((x, a[:3], b), ValueError, r"\(4, k\)"),
        "columns": ((x, a, b.repeat(1, 2)), ValueError, "same number of columns"),
        "no columns": ((x, a[:, :0], b[:, :0]), ValueError, "k >= 1"),
        "batch": ((x, a[None], b[None]), ValueError, "shape"),
        "nan": ((x, a / 0, b), ValueError, "4 non-finite"),
        "not a tensor": ((x, [1.0], b), TypeError, "torch.Tensor"),
    }


@pytest.mark.parametrize("case", bad_inputs())
@pytest.mark.parametrize("function", [projunn_d, projunn_t, projunn_d_, projunn_t_])
def test_bad_input_is_refused(function, case):
    arguments, kind, message = bad_inputs()[case]
    kept = arguments[0].clone()
    with pytest.raises(kind, match=message):
        function(*arguments)
    assert torch.equal(arguments[0], kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_factors_of_full_rank_are_moved_by_matrix_products(draw, dtype, monkeypatch):
    x, (a, b) = draw.point(12, 12, dtype=dtype), draw.factors((12, 12), 12, dtype, norm=0.3)

    def refuse(*_, **__):
        raise AssertionError("a factorisation")

    for name in ("eigh", "svd", "qr"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    y = projunn_t(x, a, b)
    skew = a @ b.mH @ x.mH
    assert error(y, torch.linalg.matrix_exp((skew - skew.mH) / 2) @ x) <= bound(dtype)
