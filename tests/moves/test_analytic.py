"""Derivatives of moves where bases have none: at zero, for dependent and parallel factors, for repeated angles."""

import pytest
import torch
from helpers import bound, double, error

from projunn_manifold import UnitaryLowRank, projunn_d, projunn_t

CASES = {
    "zero a": lambda x, a, b: (0 * a, b),
    "zero b": lambda x, a, b: (a, 0 * b),
    "equal columns of a": lambda x, a, b: (a[..., :1].repeat_interleave(a.shape[-1], -1), b),
    "equal columns of b": lambda x, a, b: (a, b[..., :1].repeat_interleave(a.shape[-1], -1)),
    "a zero column": lambda x, a, b: (torch.cat((a[..., :1], 0 * a[..., 1:]), -1), b),
    "normal": lambda x, a, b: (x @ b / 4, b),
    "inside": lambda x, a, b: (x @ (x.mH @ a), b),
    "a tiny column": lambda x, a, b: (torch.cat((a[..., :1], 1e-8 * a[..., 1:]), -1), b),
    "tiny": lambda x, a, b: (1e-9 * a, b),
    "one member is zero": lambda x, a, b: (torch.cat((0 * a[:1], a[1:])), b),
}
SHAPES = [(1, 1), (2, 2), (6, 6), (2, 6, 6), (6, 4), (5, 4), (2, 7, 3), (2, 1)]


def cases(shapes):
    """Shapes with the cases that suit them."""
    return [(shape, case) for shape in shapes for case in CASES if len(shape) > 2 or not case.startswith("one member")]


def geodesic(x, a, b):
    """The map of T by a power series, for X and factors of any kind."""
    u = (a @ b.mH - x @ b @ a.mH @ x) / 2
    lift = u @ x.mH - x @ u.mH - x @ (x.mH @ u) @ x.mH
    return _exponential((lift - lift.mH) / 2) @ x


def _exponential(a):
    term = total = torch.eye(a.shape[-1], dtype=a.dtype)
    for j in range(1, 40):
        term = term @ a / (j * 2**4)
        total = total + term
    for _ in range(4):
        total = total @ total
    return total


def polar(x, a, b):
    """The map of D by Newton's iteration on the whole matrix."""
    y = x + a @ b.mH
    for _ in range(30):
        y = y @ (torch.linalg.inv(y.mH @ y) + torch.eye(y.shape[-1], dtype=y.dtype)) / 2
    return y


def derivatives(function, given, weight, wanted):
    leaves = [t.detach().clone().requires_grad_() for t in given]
    loss = (function(*leaves) * weight.conj()).real.sum()
    return torch.autograd.grad(loss, [leaves[i] for i in wanted])


def step(draw, shape, k, dtype, case):
    """A point, and factors of a step of length one half before the case changes them."""
    x = draw.point(*shape, dtype=dtype)
    return x, *CASES[case](x, *draw.factors(shape, k, dtype, 0.5))


@pytest.mark.parametrize(("shape", "case"), cases(SHAPES), ids=str)
@pytest.mark.parametrize(("ours", "dense"), [(projunn_t, geodesic), (projunn_d, polar)])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_derivatives_are_those_of_the_dense_map(draw, shape, k, dtype, ours, dense, case):
    given, weight = step(draw, shape, k, dtype, case), draw.matrix(*shape, dtype=dtype)
    found, expected = (derivatives(function, given, weight, (1, 2)) for function in (ours, dense))
    for actual, right in zip(found, expected, strict=True):
        assert error(actual, right) <= 20 * bound(dtype, right.abs().max().item())


@pytest.mark.parametrize(("shape", "case"), cases([(5, 5), (2, 5, 5), (6, 4)]), ids=str)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("function", [projunn_d, projunn_t])
def test_derivatives_of_both_orders(draw, shape, k, function, case):
    given = [t.requires_grad_() for t in step(draw, shape, k, torch.float64, case)]
    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True, atol=1e-4)


# Of tiny factors the second derivatives have the rounding of balanced ones, times the ratio of their sizes.
@pytest.mark.parametrize(
    ("shape", "case"), [each for each in cases([(5, 5), (2, 5, 5), (6, 4)]) if each[1] != "tiny"], ids=str
)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize(("ours", "dense"), [(projunn_t, geodesic), (projunn_d, polar)])
def test_second_derivatives_are_those_of_the_dense_map(draw, shape, k, ours, dense, case):
    x, *factors = step(draw, shape, k, torch.float64, case)
    weight, along = draw.matrix(*shape, dtype=torch.float64), [draw.matrix(*f.shape, dtype=f.dtype) for f in factors]

    def second(function):
        leaves = [f.clone().requires_grad_() for f in factors]
        first = torch.autograd.grad((function(x, *leaves) * weight).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((d * v).sum() for d, v in zip(first, along, strict=True)), leaves)

    for actual, right in zip(second(ours), second(dense), strict=True):
        assert error(actual, right) <= 40 * bound(torch.float64, right.abs().max().item())


def by_singular_vectors(x, a, b, weight):
    """The derivatives of D's map by a and b, from Sylvester's equation for the derivative of a polar factor."""
    u, s, vh = torch.linalg.svd(x + a @ b.mH, full_matrices=False)
    y, v = u @ vh, vh.mH
    pull = y.mH @ weight
    turn = 2 * v @ ((vh @ (pull - pull.mH) / 2 @ v) / (s[..., :, None] + s[..., None, :])) @ vh
    of_sum = y @ turn + (weight - y @ pull) @ (v / s[..., None, :]) @ vh
    return of_sum @ b, of_sum.mH @ a


def nearly_singular(x, k, least):
    """Factors that shorten k directions of X to ``least``."""
    b = torch.linalg.qr(torch.randn(x.shape[-1], k, dtype=x.dtype))[0]
    return (least - 1) * x @ b, b


@pytest.mark.parametrize("shape", [(10, 10), (10, 4)], ids=str)
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kind", [10.0, 100.0, 1e3, 1e4, 1e-2, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_derivatives_of_d_lose_no_more_than_the_condition_of_the_sum(draw, shape, k, kind, dtype):
    torch.manual_seed(int(kind) + k)
    x, weight = draw.point(*shape, dtype=dtype), draw.matrix(*shape, dtype=dtype)
    a, b = draw.factors(shape, k, dtype, kind) if kind > 1 else nearly_singular(x, k, kind)
    condition = torch.linalg.cond(x + a @ b.mH).item()
    if kind < 1 and shape[0] > shape[1]:  # what leaves the range of X is divided by the smallest singular value
        condition = condition**2
    found = derivatives(projunn_d, (x, a, b), weight, (1, 2))
    for actual, right in zip(found, by_singular_vectors(x, a, b, weight), strict=True):
        assert torch.dist(actual, right) <= bound(dtype, 2 * condition) * right.norm()


@pytest.mark.parametrize("length", [100.0, 1e4])
def test_derivatives_of_long_whole_steps_lose_no_more_either(draw, length):
    x, weight = draw.point(8, 8, dtype=torch.float64), draw.matrix(8, 8, dtype=torch.float64)
    u, one = draw.tangent(x, length), torch.eye(8, dtype=torch.float64)
    (found,) = derivatives(lambda u: UnitaryLowRank(k=None).retr(x, u), (u,), weight, (0,))
    right = by_singular_vectors(x, u, one, weight)[0]
    right = x @ (x.mT @ right - right.mT @ x) / 2  # the manifold projects its tangents
    assert torch.dist(found, right) <= bound(torch.float64, 2 * length) * right.norm()


@pytest.mark.parametrize("rank", [0, 1, None])
@pytest.mark.parametrize("way", ["retr", "expmap"])
@pytest.mark.parametrize("shape", [(3, 3), (6, 6), (2, 6, 6), (7, 4), (5, 4), (2, 12, 6), (2, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_moves_of_whole_tangents_have_derivatives_at_every_rank(draw, dtype, shape, way, rank):
    """Also at zero, from where a parametrisation by the tangent space starts, and where n - m < m."""
    x = draw.point(*shape, dtype=dtype)
    a, b = draw.factors(shape, 1, dtype)
    u = draw.tangent(x) if rank is None else rank * (a @ b.mH - x @ b @ a.mH @ x) / 2
    move = getattr(UnitaryLowRank(k=None), way)

    def dense(u):
        along = x.mH @ u
        u = u - x @ (along + along.mH) / 2
        if way == "retr":
            return polar(x, u, torch.eye(shape[-1], dtype=dtype))
        lift = u @ x.mH - x @ u.mH - x @ along @ x.mH
        return _exponential((lift - lift.mH) / 2) @ x

    weight = draw.tangent(x)
    (found,) = derivatives(lambda u: move(x, u), (u,), weight, (0,))
    (expected,) = derivatives(dense, (u,), weight, (0,))
    assert error(found, expected) <= 20 * bound(dtype)


@pytest.mark.parametrize("way", ["retr", "expmap"])
@pytest.mark.parametrize("length", [30.0, 300.0])
def test_long_steps_of_a_stack_with_a_zero_have_derivatives(draw, way, length):
    """A long member takes eigenvectors, and those of the zero have no derivatives."""
    x = draw.point(2, 5, 5, dtype=torch.float64)
    u = draw.tangent(x, length)
    u[1] = 0
    manifold, weight = UnitaryLowRank(k=None), draw.matrix(2, 5, 5, dtype=torch.float64)
    (together,) = derivatives(lambda u: getattr(manifold, way)(x, u), (u,), weight, (0,))
    for member in range(2):
        v = draw.tangent(x)[member]
        h = 1e-5 * v
        ends = [getattr(manifold, way)(x[member], u[member] + s * h) for s in (1, -1)]
        slope = ((ends[0] - ends[1]) / 2e-5 * weight[member]).sum()
        assert abs((together[member] * v).sum() - slope) <= 1e-6 * max(1.0, abs(slope))


@pytest.mark.parametrize("function", [projunn_d, projunn_t])
@pytest.mark.parametrize("shape", [(40, 40), (40, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("k", [1, 3])
def test_values_do_not_depend_on_whether_derivatives_are_asked_for(draw, function, shape, k, dtype):
    x = draw.point(*shape, dtype=dtype)
    a, b = draw.factors(shape, k, dtype, 3.0)
    y = function(x, a.clone().requires_grad_(), b)
    assert y.requires_grad
    assert error(y.detach(), function(x, a, b)) <= bound(dtype, 3.0)
    (found,) = derivatives(lambda a: function(x, a, b), (a,), x, (0,))
    (wide,) = derivatives(lambda a: function(double(x), a, double(b)), (double(a),), double(x), (0,))
    assert error(found, wide) <= 10 * bound(dtype, 3.0) * wide.abs().max().item()


@pytest.mark.parametrize("shape", [(5, 5), (5, 4), (2, 7, 3)], ids=str)
def test_a_transport_along_a_zero_step_has_the_lift_as_its_derivative(draw, shape):
    x, v = draw.point(*shape, dtype=torch.float64), draw.matrix(*shape, dtype=torch.float64)
    u = draw.tangent(x)
    slope = torch.func.jvp(lambda t: UnitaryLowRank(k=None).transp_follow_expmap(x, t, v), (0 * u,), (u,))[1]
    lift = u @ x.mH - x @ u.mH - x @ (x.mH @ u) @ x.mH
    assert error(slope, lift @ v) <= bound(torch.float64, 10.0)


@pytest.mark.parametrize("function", [projunn_d, projunn_t])
@pytest.mark.parametrize("shape", [(5, 5), (6, 4)], ids=str)
@pytest.mark.parametrize("k", [1, 2])
def test_vmap_over_factors_and_the_hessian_at_zero(draw, function, shape, k):
    x, weight = draw.point(*shape, dtype=torch.float64), draw.matrix(*shape, dtype=torch.float64)
    members = [draw.factors(shape, k, torch.float64, 0.5)[0] for _ in range(3)]
    b = draw.matrix(shape[-1], k, dtype=torch.float64)

    def loss(a):
        return (weight * function(x, a, b)).sum()

    together = torch.func.vmap(torch.func.grad(loss))(torch.stack(members))
    for member, found in zip(members, together, strict=True):
        (alone,) = derivatives(lambda a: function(x, a, b), (member,), weight, (0,))
        assert error(found, alone) <= 10 * bound(torch.float64)
    zero = torch.zeros_like(members[0])
    dense = polar if function is projunn_d else geodesic
    expected = torch.func.hessian(lambda a: (weight * dense(x, a, b)).sum())(zero)
    assert error(torch.func.hessian(loss)(zero), expected) <= 20 * bound(torch.float64, expected.abs().max().item())
