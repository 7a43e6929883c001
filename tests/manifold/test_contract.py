"""UnitaryLowRank among geoopt's manifolds: broadcasting, products, copies, refusals, steps in place."""

import copy
import math
import pickle

import geoopt
import numpy as np
import pytest
import torch
from helpers import bound, error

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, layers, nearest_unitary
from projunn_manifold.sketching.factored_tensor import FactoredTensor
from projunn_manifold.sketching.samplers import SAMPLERS, Subspace

VARIANTS = [UnitaryLowRank, UnitaryLowRankExact]


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


@pytest.mark.parametrize("rank", [np.int64(2), np.array(2), torch.tensor(2)], ids=repr)
def test_integers_of_any_library_are_ranks(rank):
    assert UnitaryLowRank(rank).k == 2


@pytest.mark.parametrize("rank", [0, -1, 1.5, "1", True, torch.tensor([1]), torch.tensor(1.0)])
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
@pytest.mark.parametrize("sampler", SAMPLERS)
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


def test_a_default_device_reaches_into_nothing_that_has_one(draw):
    network = layers.UnitaryRNN(3, 8)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    conv, weight = layers.OrthogonalConv2d(2, 2, image_size=4), draw.matrix(4, 4, dtype=torch.float64)
    state = conv.state_dict()
    with torch.device("meta"):
        assert network(packed)[0].data.is_cpu
        assert copy.deepcopy(network.manifold_l0).seed == 0
        conv.load_state_dict(state, assign=True)
        assert nearest_unitary(weight, "lie", tolerance=1e-2).unitary.is_cpu


def test_whole_numbers_of_numpy_are_sizes_and_seeds():
    manifold = UnitaryLowRank(np.int64(2), seed=np.int64(3), sweep=np.int32(8), sampler=Subspace(power=np.int64(1)))
    assert (manifold.k, manifold.seed, manifold.sweep) == (2, 3, 8)
    assert layers.UnitaryRNN(np.int64(3), np.int64(4))(torch.zeros(2, 1, 3))[0].shape == (2, 1, 4)
    assert layers.OrthogonalConv2d(2, 2, image_size=np.int64(4)).image_size == (4, 4)


def test_a_default_device_does_not_reach_into_a_step(draw):
    x, g = draw.point(3, 8, 8, dtype=torch.float64), draw.matrix(3, 8, 8, dtype=torch.float64)
    with torch.device("meta"), torch.no_grad():
        for point, gradient in ((x, g), (x[0].clone(), g[0])):
            manifold = UnitaryLowRank(1)
            assert manifold.retr(point, manifold.egrad2rgrad(point, gradient + 0.1 * point)).is_cpu
            assert manifold.step_(point, gradient, 0.1).is_cpu


def test_an_empty_stack_in_numpys_layout_is_stepped_in_place():
    """NumPy gives an empty array strides of 0, and nothing shares memory there."""
    x = torch.from_numpy(np.zeros((0, 5, 5)))
    assert 0 in x.stride()
    assert UnitaryLowRank(k=1).step_(x, x, lr=0.1) is x
