"""Products with thin matrices: the compiled loops and PyTorch's own products against dense ones in double precision."""

import gc
import os
import signal
import tracemalloc

import geoopt
import numpy as np
import pytest
import torch
from helpers import DTYPES, NewStorages, bound, double, error

from projunn_manifold import UnitaryLowRank, optim
from projunn_manifold.linalg import dense, products, threads
from projunn_manifold.manifold.state import digits_of
from projunn_manifold.moves import drift

MATRICES = [(1, 1), (3, 2), (7, 7), (64, 64), (70, 33), (5, 16, 16), (2, 3, 9, 6), (130, 40)]


def close(actual, expected, *factors):
    """Tell whether a product has no more than a sum's rounding error."""
    size = 1.0
    for f in factors:
        size = size * torch.linalg.matrix_norm(double(f))
    difference = torch.linalg.matrix_norm(double(actual) - expected)
    return bool((difference <= bound(actual.dtype) * size).all())


@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_those_of_dense_matrices(draw, path, shape, k, dtype):
    *batch, n, m = shape
    x, q = draw.matrix(*shape, dtype=dtype), draw.matrix(*batch, m, k, dtype=dtype)
    p, s = draw.matrix(*batch, n, k, dtype=dtype), draw.matrix(*batch, m, k, dtype=dtype)
    wide, wide_q, wide_p = double(x), double(q), double(p)
    assert close(products.matrix(x).times(q), wide @ wide_q, x, q)
    assert close(products.matrix(x).adjoint_times(p), wide.mH @ wide_p, x, p)
    image, back = products.matrix(x).two_sided_product(q, p[..., : k // 2 + 1])
    assert close(image, wide @ wide_q, x, q)
    assert close(back[..., :k], wide.mH @ wide @ wide_q, x, x, q)
    assert close(back[..., k:], wide.mH @ wide_p[..., : k // 2 + 1], x, p)
    y, back = products.matrix(x).normalized_image(q)
    norm = torch.linalg.matrix_norm(wide @ wide_q)[..., None, None]
    assert close(y, wide @ wide_q / norm, x, q / norm)
    assert close(back, wide.mH @ wide @ wide_q / norm, x, x, q / norm)
    expected = wide + wide_p @ double(s).mH
    rounding = bound(dtype, expected.abs().max().item())
    assert error(products.matrix(x).plus_product(p, s), expected) <= rounding
    version = x._version
    assert products.matrix(x).add_product_(p, s) is x
    assert x._version > version
    assert error(x, expected) <= rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_results_are_fresh_aligned_memory(draw, dtype, monkeypatch):
    monkeypatch.setattr(products, "_MAPPED", 0)
    x, p, q = draw.matrix(3, 9, 7, dtype=dtype), draw.matrix(3, 9, 2, dtype=dtype), draw.matrix(3, 7, 2, dtype=dtype)
    y = products.matrix(x).plus_product(p, q)
    assert error(y, double(x) + double(p) @ double(q).mH) <= bound(dtype, 10.0)
    assert y.data_ptr() % 64 == 0 or products.compiled is None
    assert y.is_contiguous()
    y.resize_(2, 9, 7)  # an ordinary tensor


@pytest.mark.parametrize("shape", [(1, 1), (9, 9), (70, 33), (5, 16, 16), (2, 3, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rank_one_tangents(draw, path, shape, dtype):
    x = draw.point(*shape, dtype=dtype)
    a, b = draw.factors(shape, 1, dtype)
    left, right, (aa, bb, s) = products.matrix(x).rank_one_tangent(a, b)
    x, a, b = double(x), double(a), double(b)
    overlap = (b.mH @ x.mH @ a)[..., 0, 0]
    rest = a - x @ b * (overlap.real / torch.linalg.matrix_norm(b) ** 2)[..., None, None]
    assert close(left, torch.cat((x @ b, rest), -1), x, b)
    assert close(right, torch.cat((b, x.mH @ rest), -1), x, b)
    zero = torch.zeros_like(overlap.real)
    squares = [torch.linalg.matrix_norm(t) ** 2 for t in (rest, b)]
    for number, exact in zip((aa, bb, s), (*squares, overlap.imag if dtype.is_complex else zero), strict=True):
        number = torch.as_tensor(number, dtype=torch.float64)
        scale = torch.linalg.matrix_norm(a) * torch.linalg.matrix_norm(b) + exact.abs()
        assert ((number - exact).abs() <= bound(left.dtype) * scale).all()


def gradients(draw, shape, dtype):
    """Gradients of full rank, of rank one, zero, and at the ends of the range of single precision."""
    *batch, n, m = shape
    g = draw.matrix(*shape, dtype=dtype)
    one = draw.matrix(*batch, n, 1, dtype=dtype) @ draw.matrix(*batch, m, 1, dtype=dtype).mH
    return {"full": g, "rank one": one, "zero": torch.zeros_like(g), "small": g * 1e-15, "large": g * 1e10}


@pytest.mark.skipif(products.compiled is None, reason="needs numba")
@pytest.mark.parametrize("shape", [(9, 9), (70, 70), (5, 16, 16), (2, 3, 8, 8)], ids=str)
@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sketched_tangents_in_one_call(draw, shape, k, dtype):
    x, test = draw.point(*shape, dtype=dtype), draw.matrix(shape[-1], k, dtype=dtype)
    for name, g in gradients(draw, shape, dtype).items():
        known = products.matrix(x).sketched_tangent_of_rank_k(products.matrix(g), test)
        assert known is not None, name
        left, right, inside, triangle = (double(torch.as_tensor(t)) for t in known)
        a, rest = left[..., :k], left[..., k:]
        assert error(a.mH @ a, torch.eye(k)) <= bound(dtype), name
        image = double(g) @ double(test)
        size = torch.linalg.matrix_norm(image).max().item()
        assert error(a @ (a.mH @ image), image) <= bound(dtype) * size, name
        b = double(x) @ (double(g).mH @ a)
        size = torch.linalg.matrix_norm(b).max().item()
        assert error(inside, a.mH @ b) <= bound(dtype) * size, name
        assert error(rest, b - a @ (a.mH @ b)) <= bound(dtype) * size, name
        assert error(right, double(x).mH @ left) <= bound(dtype, max(1.0, size)), name
        assert error(triangle.mH @ triangle, rest.mH @ rest) <= bound(dtype) * size**2, name


@pytest.mark.skipif(products.compiled is None, reason="needs numba")
@pytest.mark.parametrize("shape", [(9, 9), (70, 70), (5, 16, 16), (2, 3, 8, 8)], ids=str)
@pytest.mark.parametrize("columns", [2, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduced_frames_in_one_call(draw, shape, columns, dtype):
    x, test = draw.point(*shape, dtype=dtype), draw.matrix(shape[-1], columns, dtype=dtype)
    for name, u in gradients(draw, shape, dtype).items():
        found = products.matrix(x).reduced_frame(products.matrix(u), test, 2)
        assert found is not None, name
        p, q, inside = (double(torch.as_tensor(t)) for t in found)
        assert error(q.mH @ q, torch.eye(columns)) <= bound(dtype), name
        assert error(p, double(x) @ q) <= bound(dtype), name
        size = torch.linalg.matrix_norm(double(u)).max().item()
        assert error(inside, p.mH @ double(u) @ q) <= bound(dtype) * size, name
        if name == "rank one":
            assert error(double(u) @ q @ q.mH, double(u)) <= bound(dtype) * size


@pytest.mark.skipif(products.compiled is None, reason="needs numba")
@pytest.mark.parametrize(
    ("shape", "k"), [((9, 8), 1), ((9, 8), 3), ((70, 33), 1), ((70, 33), 8), ((5, 24, 17), 2), ((2, 3, 40, 18), 8)]
)
@pytest.mark.parametrize("common", [True, False], ids=["one test", "one for each"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sketched_frames_of_tall_matrices_in_one_call(draw, shape, k, dtype, common):
    *batch, _, m = shape
    x, test = draw.point(*shape, dtype=dtype), draw.matrix(*(() if common else batch), m, k, dtype=dtype)
    for name, g in gradients(draw, shape, dtype).items():
        found = products.matrix(x).sketched_frame(products.matrix(g), test)
        assert found is not None, name
        p, outside, q, h, c = map(double, found)
        assert error(q.mH @ q, torch.eye(2 * k)) <= bound(dtype), name
        assert error(p, double(x) @ q) <= bound(dtype), name
        assert error(outside.mH @ outside, torch.eye(k)) <= bound(dtype), name
        size = torch.linalg.matrix_norm(double(g)).max().item()
        if name == "full" and k <= shape[-2] - m:
            assert error(double(x).mH @ outside, torch.zeros(())) <= bound(dtype)
        a = torch.linalg.qr(double(g) @ double(test)).Q if name != "zero" else double(g)[..., :k]
        if name == "rank one":
            a = a[..., :1]
        projected = a @ (a.mH @ double(g))
        assert error((p @ h + outside @ c) @ q.mH, projected) <= bound(dtype) * size, name


@pytest.mark.skipif(products.compiled is None, reason="needs numba")
def test_what_one_call_does_not_take(draw):
    x, g, test = (draw.matrix(20, n, dtype=torch.float32) for n in (20, 20, 4))
    wide = draw.matrix(20, products._NARROW + 1, dtype=torch.float32)
    for other, columns in ((g.mT, test), (g.double(), test), (g[:, :10].contiguous(), test), (g, wide)):
        assert products.matrix(x).reduced_frame(products.matrix(other), columns, 1) is None
    for scale in (torch.nan, torch.inf, 1e-25, 1e25):
        assert products.matrix(x).reduced_frame(products.matrix(g * scale), test, 1) is None
        assert products.matrix(x).sketched_tangent_of_rank_k(products.matrix(g * scale), test) is None
    tall, known = x[:, :12].contiguous(), draw.matrix(12, 2, dtype=torch.float32)
    for scale in (torch.nan, torch.inf, 1e-25, 1e25):
        assert products.matrix(tall).sketched_frame(products.matrix(g[:, :12].contiguous() * scale), known) is None


@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
@pytest.mark.parametrize("r", [0, 1, 2, 3, 5, 9])
@pytest.mark.parametrize("shape", [(9, 7), (2, 9, 9)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_matrix_is_scaled_in_the_pass_that_adds_to_it(draw, path, shape, dtype, r, scale):
    x, p, q = draw.matrix(*shape, dtype=dtype), *draw.factors(shape, r, dtype)
    expected = scale * double(x) + double(p) @ double(q).mH
    assert error(products.matrix(x).add_product_(p, q, scale), expected) <= bound(dtype, 20.0)


@pytest.mark.skipif(products.compiled is None, reason="needs numba")
@pytest.mark.parametrize("shape", [(40, 40), (3, 16, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_threads_find_what_one_does(draw, monkeypatch, shape, dtype):
    x, g, test = (
        draw.point(*shape, dtype=dtype),
        draw.matrix(*shape, dtype=dtype),
        draw.matrix(shape[-1], 3, dtype=dtype),
    )
    known, gradient = products.matrix(x), products.matrix(g)

    def found():
        return [*known.sketched_tangent_of_rank_k(gradient, test), *known.reduced_frame(gradient, test, 2)]

    one = found()
    monkeypatch.setattr(threads, "_GRAIN", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert len(threads.parts(1, *shape[-2:])) == 3
    size = torch.linalg.matrix_norm(double(g)).max().item()
    for several, single in zip(found(), one, strict=True):
        assert error(torch.as_tensor(several), torch.as_tensor(single)) <= bound(dtype, size)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_normalized_images_at_the_ends_of_float32(draw, path, scale):
    x, q = draw.matrix(20, 20, dtype=torch.float32) * scale, draw.matrix(20, 1, dtype=torch.float32)
    y, back = products.matrix(x).normalized_image(q)
    exact = double(x) @ double(q)
    exact = exact / (torch.linalg.matrix_norm(exact) if scale else 1.0)
    assert error(y, exact) <= bound(torch.float32)
    assert error(back / (scale or 1.0), double(x).mH @ exact / (scale or 1.0)) <= bound(torch.float32, 20.0)


@pytest.mark.parametrize("scale", [1e-170, 1e-155, 1e150, 1e160])
def test_norms_whose_squares_leave_the_range(draw, path, scale):
    x, q = draw.matrix(20, 20, dtype=torch.float64), draw.matrix(20, 1, dtype=torch.float64)
    y, back = products.matrix(x * scale).normalized_image(q)
    exact = x @ q / torch.linalg.matrix_norm(x @ q)
    assert error(y, exact) <= bound(torch.float64)
    assert error(back / scale, x.mH @ exact) <= bound(torch.float64, 20.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(40, 40), (3, 40, 40)], ids=str)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("lr", [0.1, 10.0, 1e3, 1e5])
def test_a_gradient_nearly_normal_to_the_manifold_moves_within_it(draw, path, dtype, shape, k, lr):
    x = draw.point(*shape, dtype=dtype)
    v = draw.matrix(*shape[:-1], 1, dtype=dtype)
    g = x @ v @ v.mH / shape[-1] + 1e-2 * draw.matrix(*shape, dtype=dtype) / shape[-1]
    angle = lr * 1e-2 * k  # of the step, roughly
    manifold = UnitaryLowRank(k, sweep=None)
    y = manifold.step_(x.clone(), g, lr)
    assert dense.unitarity_error(y).max() <= bound(dtype, angle)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("lr", [1.0, 1e2, 1e4, 1e8])
def test_large_steps_lose_no_more_than_their_angle_times_rounding(draw, path, k, lr):
    x, g = draw.point(40, 40, dtype=torch.float64), draw.matrix(40, 40, dtype=torch.float64)
    y = UnitaryLowRank(k, sweep=None).step_(x, g, lr)
    assert dense.unitarity_error(y) <= bound(torch.float64, lr)


def test_non_finite_entries_stay_visible(draw, path):
    for value in (torch.nan, torch.inf):
        x, q = draw.matrix(9, 9, dtype=torch.float32), draw.matrix(9, 1, dtype=torch.float32)
        x[3, 4] = value
        image, back = products.matrix(x).two_sided_product(q, q)
        assert not torch.isfinite(image[3])
        assert not torch.isfinite(back[4]).any()
        assert not torch.isfinite(products.matrix(x).normalized_image(q)[1]).all()


@pytest.mark.parametrize("shape", [(60, 60), (5, 30, 30), (61, 45)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_share_the_work(draw, path, shape, dtype, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(threads, "_GRAIN", 100)
    assert len(threads.parts(1, 60, 60)) == len(threads.parts(5, 30, 30)) == 3
    x, g = draw.matrix(*shape, dtype=dtype), draw.matrix(*shape[:-2], shape[-1], 2, dtype=dtype)
    left = draw.matrix(*shape[:-1], 2, dtype=dtype)
    wide = double(x)
    image, back = products.matrix(x).two_sided_product(g, left)
    assert close(image, wide @ double(g), x, g)
    assert close(back[..., :2], wide.mH @ wide @ double(g), x, x, g)
    assert close(back[..., 2:], wide.mH @ double(left), x, left)
    assert error(products.matrix(x).plus_product(left, g), wide + double(left) @ double(g).mH) <= bound(dtype, 10.0)


def takes(x, thin):
    """Tell whether the compiled loops compute a product."""
    known = products.matrix(x)
    return isinstance(known, products.CompiledMatrix) and known._takes(thin)


@pytest.mark.skipif(products.compiled is None, reason="numba is not installed")
def test_what_the_loops_leave_to_torch(draw):
    x, q = draw.matrix(4, 8, 8, dtype=torch.complex64), draw.matrix(4, 8, 1, dtype=torch.complex64)
    assert takes(x, q)
    others = {
        "transposed": (x.mT, q),
        "conjugate": (x.conj(), q),
        "imaginary part": (x.imag, q.real),
        "broadcast": (x, q[0]),
        "other dtype": (x, q.to(torch.complex128)),
        "half": (x.real.half(), q.real.half()),
        "meta": (x.to("meta"), q.to("meta")),
        "wide": (x, x.repeat(1, 1, 4)),
        "empty": (x[:0], q[:0]),
        "differentiated": (x, q.clone().requires_grad_()),
        "subclass": (x, torch.nn.Parameter(q)),
    }
    for name, (matrix, thin) in others.items():
        with torch.set_grad_enabled(name != "subclass"):
            assert takes(matrix, thin) == (name == "subclass"), name
        if name not in ("half", "meta", "other dtype", "empty"):
            product = products.matrix(matrix).times(thin).detach()
            assert error(product, double(matrix) @ double(thin.detach())) <= bound(torch.float32, 100.0), name


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shape", [(24, 24), (30, 12), (4, 16, 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_is_the_same_on_both_paths(draw, monkeypatch, k, shape, dtype):
    x, g = draw.point(*shape, dtype=dtype), draw.matrix(*shape, dtype=dtype)
    results = []
    for loops in (products.compiled, None):
        monkeypatch.setattr(products, "compiled", loops)
        p = geoopt.ManifoldParameter(x.clone(), manifold=UnitaryLowRank(k))
        p.grad = g.clone()
        optimizer = optim.RiemannianSGD([p], lr=0.3, momentum=0.9)
        optimizer.step(), optimizer.step()
        results.append(p.detach())
    assert error(*results) <= 20 * bound(dtype)


@pytest.mark.parametrize("variant", ["step_", "RiemannianSGD", "RiemannianAdam"])
def test_a_step_in_place_allocates_no_matrix(draw, path, variant):
    n = 2048
    g = draw.matrix(n, 1, dtype=torch.float32) @ draw.matrix(1, n, dtype=torch.float32)
    manifold = UnitaryLowRank(1)
    p = geoopt.ManifoldParameter(torch.eye(n), manifold=manifold)
    p.grad = g
    step = (lambda: manifold.step_(p, g, 1e-3)) if variant == "step_" else getattr(optim, variant)([p], lr=1e-3).step
    for _ in range(3):  # makes the optimiser's state and the machine code
        step()
    for turn in range(3, n):  # on to a step that corrects a block of columns, the one that needs most memory
        if drift.Schedule(manifold.sweep).first_due_column(turn + 1, n) is not None:
            break
    manifold.set_extra_state(digits_of([turn - 1, 1, 0, 0, 0]))
    step()  # the first one after a state is loaded looks whether the point is on the manifold
    gc.collect()
    tracemalloc.start()  # NumPy reports its memory here, PyTorch does not
    with NewStorages() as storages:
        step()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    share = 0.1 if variant == "RiemannianAdam" else 0.05  # it also sketches its dense direction, to 2k columns
    assert 0 < sum(storages.sizes) + peak <= share * n * n * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_starts_its_own_threads():
    calls = []
    threads.in_parallel(calls.append, [(1,), (2,)])
    assert sorted(calls) == [1, 2]
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a pool without threads would wait for ever
        threads.in_parallel(calls.append, [(3,), (4,)])
        os._exit(0 if sorted(calls) == [1, 2, 3, 4] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_failure_in_a_thread_is_raised():
    def fail(part):
        if part:
            raise ValueError("in a thread")

    with pytest.raises(ValueError, match="in a thread"):
        threads.in_parallel(fail, [(0,), (1,)])


def test_rows_are_what_the_loops_expect():
    t = torch.arange(6.0).view(3, 2)
    assert np.array_equal(products._rows(t), [[[0, 2, 4], [1, 3, 5]]])
    assert products._rows(t).flags.c_contiguous


def test_stacks_of_any_dimension_are_updated_in_place(draw, monkeypatch):
    monkeypatch.setattr(products, "compiled", None)
    x, (left, right) = draw.point(2, 3, 64, 64, dtype=torch.float64), draw.factors((2, 3, 64, 64), 1, torch.float64)
    expected = x + left @ right.mH
    with NewStorages() as storages:
        products.matrix(x).add_product_(left, right)
    assert error(x, expected) <= bound(x.dtype)
    assert max(storages.sizes, default=0) < x.numel() * x.itemsize / 8


@pytest.mark.skipif(products.compiled is None, reason="needs numba")
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize(
    ("dtype", "r"), [(torch.float32, 2), (torch.float32, 4), (torch.complex64, 1), (torch.complex64, 2)]
)
@pytest.mark.parametrize("shape", [(70, 70), (30, 5000), (3, 40, 40)], ids=str)
def test_an_update_rounds_each_entry_once(draw, shape, dtype, r, fresh):
    """X + L R^H for a small product is the exact sum, rounded; the product's own rounding shows in few entries."""
    *batch, n, m = shape
    x = draw.matrix(*shape, dtype=dtype)
    left, right = 1e-2 * draw.matrix(*batch, n, r, dtype=dtype), draw.matrix(*batch, m, r, dtype=dtype)
    expected = (double(x) + double(left) @ double(right).mH).to(dtype)
    known = products.matrix(x)
    actual = known.plus_product(left, right) if fresh else known.add_product_(left, right)
    if dtype.is_complex:
        actual, expected = torch.view_as_real(actual), torch.view_as_real(expected)
    assert (actual != expected).double().mean().item() < 0.05
