"""The in-place optimisers take the steps, keep the state and obey the rules of geoopt's own."""

import copy
import pickle

import geoopt
import numpy as np
import pytest
import torch
from helpers import DTYPES, bound, error

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, optim
from projunn_manifold.linalg import dense
from projunn_manifold.sketching.factored_tensor import FactoredTensor
from projunn_manifold.sketching.lowrank import LowRank

SETTINGS = {
    "sgd": ("RiemannianSGD", {"lr": 0.2}),
    "tensor lr": ("RiemannianSGD", {"lr": torch.tensor(0.2)}),
    "momentum": ("RiemannianSGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}),
    "nesterov": ("RiemannianSGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "stabilize": ("RiemannianSGD", {"lr": 0.1, "momentum": 0.9, "stabilize": 2}),
    "adam": ("RiemannianAdam", {"lr": 0.1}),
    "amsgrad": ("RiemannianAdam", {"lr": 0.1, "amsgrad": True, "betas": (0.8, 0.9)}),
    "adam, stabilize": ("RiemannianAdam", {"lr": 0.1, "stabilize": 2}),
}


#: geoopt's amsgrad cannot compare complex numbers.
CASES = [(name, dtype) for name in SETTINGS for dtype in DTYPES if not (name == "amsgrad" and dtype.is_complex)]


def pair_of_runs(name, points, variant, k):
    """Parameters and optimiser of geoopt, and the same in place, with manifolds that draw the same sketches."""
    kind, arguments = SETTINGS[name]
    runs = []
    for module in (geoopt.optim, optim):
        manifold = variant(k)
        parameters = [geoopt.ManifoldParameter(x.clone(), manifold=manifold) for x in points]
        runs.append((parameters, getattr(module, kind)(parameters, **arguments)))
    return runs


def step(run, gradients):
    parameters, optimizer = run
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = None if g is None else g.clone()
    optimizer.step()


@pytest.mark.parametrize("variant", [UnitaryLowRank, UnitaryLowRankExact])
@pytest.mark.parametrize("k", [1, 2, None])
@pytest.mark.parametrize("shape", [(12, 12), (14, 6), (3, 10, 10)], ids=str)
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_the_steps_are_those_of_geoopt(draw, name, variant, k, shape, dtype):
    geoopts, ours = pair_of_runs(name, [draw.point(*shape, dtype=dtype)], variant, k)
    for _ in range(4):
        g = draw.matrix(*shape, dtype=dtype)
        step(geoopts, [g]), step(ours, [g])
    (p,), (q,) = geoopts[0], ours[0]
    assert error(q, p) <= 20 * bound(dtype)
    assert dense.unitarity_error(q).max() <= bound(dtype)
    for key, value in geoopts[1].state[p].items():
        mine = ours[1].state[q][key]
        expected = value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
        actual = torch.as_tensor(mine, dtype=expected.dtype).expand(expected.shape)
        assert torch.allclose(actual, expected, rtol=0, atol=100 * bound(dtype) * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("name", SETTINGS)
def test_other_parameters_are_left_to_geoopt(draw, name):
    kind, arguments = SETTINGS[name]
    results = []
    w, s, e = (draw.point(8, 8, dtype=torch.float64) for _ in range(3))
    gradients = [[draw.matrix(8, 8, dtype=torch.float64) for _ in range(3)] for _ in range(3)]
    for module in (geoopt.optim, optim):
        own = geoopt.ManifoldParameter(w.clone(), manifold=UnitaryLowRank(1))
        stiefel = geoopt.ManifoldParameter(s.clone(), manifold=geoopt.CanonicalStiefel())
        euclidean = torch.nn.Parameter(e.clone())
        optimizer = getattr(module, kind)(
            [{"params": [own, euclidean]}, {"params": [stiefel], "weight_decay": 0.1}], **arguments
        )
        for g in gradients:
            step(([own, stiefel, euclidean], optimizer), g)
        assert all(p.grad is not None for p in (own, stiefel, euclidean))
        results.append((own, stiefel, euclidean))
    for mine, theirs in zip(*results, strict=True):
        assert error(mine, theirs) <= 20 * bound(torch.float64)


@pytest.mark.parametrize("direction", ["to geoopt", "from geoopt", "own"])
@pytest.mark.parametrize(
    ("name", "dtype"), [case for case in CASES if case[1].itemsize > 8 or case[1] is torch.float64], ids=str
)
def test_a_state_goes_over_to_geoopt_and_back(draw, name, direction, dtype):
    shape = (3, 10, 10)
    geoopts, ours = pair_of_runs(name, [draw.point(*shape, dtype=dtype)], UnitaryLowRank, 2)
    source, target = (ours, geoopts) if direction == "to geoopt" else (geoopts, ours)
    source = ours if direction == "own" else source
    straight = source
    step(source, [draw.matrix(*shape, dtype=dtype)])
    saved = copy.deepcopy(source[1].state_dict())
    if direction == "own":
        source[0][0].manifold.random(4, 4)  # nothing a state would have to know
        target = pair_of_runs(name, [source[0][0].detach()], UnitaryLowRank, 2)[1]
    with torch.no_grad():
        target[0][0].copy_(source[0][0])
    target[0][0].manifold = copy.deepcopy(source[0][0].manifold)
    target[1].load_state_dict(saved)
    for _ in range(2):
        g = draw.matrix(*shape, dtype=dtype)
        step(straight, [g]), step(target, [g])
    # torch.optim.Adam loads the count of steps as a float32 tensor, and geoopt's corrections then have that precision
    assert error(target[0][0], straight[0][0]) <= 20 * bound(torch.float32 if direction == "to geoopt" else dtype)


def test_gradients_that_are_none_sparse_or_factored(draw):
    x = draw.point(8, 8, dtype=torch.float64)
    p = geoopt.ManifoldParameter(x.clone(), manifold=UnitaryLowRank(1))
    optimizer = optim.RiemannianSGD([p], lr=0.1, momentum=0.9)
    optimizer.step()
    assert torch.equal(p, x)
    assert not optimizer.state
    p.grad = torch.eye(8, dtype=torch.float64).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    a, b = draw.factors((8, 8), 1, torch.float64)
    q = geoopt.ManifoldParameter(x.clone(), manifold=UnitaryLowRank(1))
    p.grad, q.grad = FactoredTensor(LowRank(a, b)), a @ b.mH
    optimizer.step()
    geoopt.optim.RiemannianSGD([q], lr=0.1, momentum=0.9).step()
    assert error(p, q) <= bound(torch.float64)
    assert type(optimizer.state[p]["momentum_buffer"]) is torch.Tensor


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("sgd", torch.nan, "non-finite"),
        ("momentum", torch.nan, "non-finite"),
        ("adam", torch.nan, "non-finite"),
        ("adam", 1e25, "too large"),
    ],
)
def test_a_refused_gradient_leaves_point_and_state(draw, name, bad, message):
    kind, arguments = SETTINGS[name]
    x = draw.point(8, 8, dtype=torch.float32)
    p = geoopt.ManifoldParameter(x.clone(), manifold=UnitaryLowRank(1))
    optimizer = getattr(optim, kind)([p], **arguments)
    for first in (True, False):
        before, state = p.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
        p.grad = torch.full((8, 8), bad)
        p.grad[0] = 0  # not a multiple of X
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert torch.equal(p, before)
        after = optimizer.state_dict()["state"]
        assert (not after or not after[0]) if first else after.keys() == state.keys()
        for key, value in (state.get(0) or {}).items():
            assert torch.equal(torch.as_tensor(after[0][key]), torch.as_tensor(value))
        p.grad = draw.matrix(8, 8, dtype=torch.float32)
        optimizer.step()
        assert not torch.equal(p, before)


def test_closures_hooks_and_schedulers(draw):
    p = geoopt.ManifoldParameter(draw.point(8, 8, dtype=torch.float64), manifold=UnitaryLowRank(1))
    geoopt.optim.RiemannianSGD([p], lr=0.1)  # torch wraps the step of every class of optimiser it has seen
    optimizer = optim.RiemannianSGD([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = p.square()[0].sum()
        loss.backward()
        calls.append("closure")
        return loss

    assert optimizer.step(closure).item() == pytest.approx(1.0)
    scheduler.step()
    assert calls == ["before", "closure", "after"]
    assert scheduler.get_last_lr() == [0.05]
    clone = copy.deepcopy(optimizer)
    assert type(clone) is optim.RiemannianSGD


class MainBranch(geoopt.optim.RiemannianAdam):
    """geoopt's development version projects every point before its step."""

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for point in group["params"]:
                    if point.grad is not None:
                        point.copy_(point.manifold.projx(point))
        return super().step(closure)


class OnMainBranch(optim.RiemannianAdam, MainBranch):
    _geoopt = MainBranch


@pytest.mark.filterwarnings("ignore:a parameter of shape")
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("shape", [(12, 12), (3, 10, 6)], ids=str)
def test_adam_starts_off_the_manifold_as_geoopts_does(draw, shape, amsgrad):
    """The development version's brings the point to the manifold first, the release's does not; so do ours."""
    start, g = 3 * draw.matrix(*shape, dtype=torch.float64), draw.matrix(*shape, dtype=torch.float64)
    for theirs, ours in ((MainBranch, OnMainBranch), (geoopt.optim.RiemannianAdam, optim.RiemannianAdam)):
        points = []
        for kind in (theirs, ours):
            w = geoopt.ManifoldParameter(start.clone(), manifold=UnitaryLowRank(2, sweep=None))
            optimizer = kind([w], lr=0.05, amsgrad=amsgrad)
            for _ in range(1 if theirs is geoopt.optim.RiemannianAdam else 3):
                w.grad = g.clone()
                optimizer.step()
            points.append(w.detach())
        size = torch.linalg.matrix_norm(start, 2).max().item()
        assert error(*points) <= bound(torch.float64, size**3)
        on_manifold = dense.unitarity_error(points[1]).max().item() <= bound(torch.float64)
        assert on_manifold is (theirs is MainBranch)


KINDS = {
    "float32": np.float32,
    "float64": np.float64,
    "longdouble": np.longdouble,
    "0-d array": np.array,
    "0-d float32 array": lambda v: np.array(v, dtype=np.float32),
    "0-d tensor": torch.tensor,
    "0-d double tensor": lambda v: torch.tensor(v, dtype=torch.float64),
}
HYPER = {
    optim.RiemannianSGD: {"lr": 0.125, "momentum": 0.75, "dampening": 0.25, "weight_decay": 0.5},
    optim.RiemannianAdam: {"lr": 0.125, "betas": (0.75, 0.875), "eps": 2.0**-20, "weight_decay": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", HYPER)
def test_every_hyper_parameter_may_be_a_number_of_any_library(draw, make, kind):
    """All values are exact in single precision, so the steps are equal."""
    start, g = draw.point(12, 12, dtype=torch.float64), draw.matrix(12, 12, dtype=torch.float64)

    def steps(options, later=None):
        w = geoopt.ManifoldParameter(start.clone(), manifold=UnitaryLowRank(1))
        optimizer = make([w], **options)
        optimizer.param_groups[0].update(later or {})
        for _ in range(3):
            w.grad = g.clone()
            optimizer.step()
        return w.detach()

    expected = steps(HYPER[make])
    for name, value in HYPER[make].items():
        given = tuple(map(KINDS[kind], value)) if isinstance(value, tuple) else KINDS[kind](value)
        for points in (steps(HYPER[make] | {name: given}), steps(HYPER[make], {name: given})):
            assert error(points, expected) <= bound(torch.float64), name


@pytest.mark.parametrize("make", HYPER)
@pytest.mark.parametrize("value", [True, np.bool_(True), "0.1", 1j, np.array([0.1, 0.2]), torch.tensor(True), None])
def test_a_hyper_parameter_that_is_no_number_is_named(draw, make, value):
    for name in HYPER[make]:
        w = geoopt.ManifoldParameter(draw.point(6, 6, dtype=torch.float64), manifold=UnitaryLowRank(1))
        start = w.detach().clone()
        optimizer = make([w], **HYPER[make])
        optimizer.param_groups[0][name] = (value, value) if name == "betas" else value
        w.grad = torch.eye(6, dtype=torch.float64)
        with pytest.raises(TypeError, match=f"`{name}` must be"):
            optimizer.step()
        assert torch.equal(w, start)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_optimiser_is_built_again_from_its_defaults(draw, name):
    kind, arguments = SETTINGS[name]
    w = geoopt.ManifoldParameter(draw.point(6, 6, dtype=torch.float64), manifold=UnitaryLowRank(1))
    first = getattr(optim, kind)([w], **arguments)
    second = type(first)([w], **first.defaults)
    assert second.defaults == first.defaults
    assert {name: second.param_groups[0][name] for name in arguments} == arguments


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("travel", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copied_optimiser_takes_more_parameters(draw, name, travel):
    kind, arguments = SETTINGS[name]
    points = [draw.point(6, 6, dtype=torch.float64) for _ in range(2)]
    w, v = (geoopt.ManifoldParameter(x.clone(), manifold=UnitaryLowRank(1)) for x in points)
    optimizer = getattr(optim, kind)([w], **arguments)
    copied = travel(optimizer)
    for each in (optimizer, copied):
        each.add_param_group({"params": [v]})
    names = optimizer.param_groups[1].keys() - {"params"}
    assert {n: copied.param_groups[1][n] for n in names} == {n: optimizer.param_groups[1][n] for n in names}
    step(([*copied.param_groups[0]["params"], v], copied), [draw.matrix(6, 6, dtype=torch.float64) for _ in range(2)])
    assert not torch.equal(v, points[1])


TORCHS = [
    (torch.optim.Adam, {}, optim.RiemannianAdam),
    (torch.optim.AdamW, {"weight_decay": 0}, optim.RiemannianAdam),
    (torch.optim.SGD, {}, optim.RiemannianSGD),
    (torch.optim.SGD, {"momentum": 0.9}, optim.RiemannianSGD),
]


@pytest.mark.parametrize(("torchs", "arguments", "ours"), TORCHS)
def test_a_run_goes_on_from_the_state_of_torchs_optimiser(draw, torchs, arguments, ours):
    w = geoopt.ManifoldParameter(draw.point(6, 6, dtype=torch.float64), manifold=UnitaryLowRank(1))
    b = torch.nn.Parameter(draw.matrix(6, 1, dtype=torch.float64))
    optimizer = torchs([w, b], lr=0.1, **arguments)
    optim.constrain(optimizer)
    step(([w, b], optimizer), [draw.matrix(*p.shape, dtype=p.dtype) for p in (w, b)])
    saved = copy.deepcopy(optimizer.state_dict())
    runs = []
    for _ in range(2):
        points = copy.deepcopy([w, b])
        runs.append((points, ours(points, lr=0.1, **arguments)))
    (found, loaded), (expected, built) = runs
    loaded.load_state_dict(saved)
    built.load_state_dict({**built.state_dict(), "state": copy.deepcopy(saved["state"])})  # groups of its own kind
    for _ in range(2):
        gradients = [draw.matrix(*p.shape, dtype=p.dtype) for p in (w, b)]
        step((found, loaded), gradients), step((expected, built), gradients)
    assert all(map(torch.equal, found, expected))
    assert error(found[0].mT @ found[0], torch.eye(6)) <= bound(torch.float64)


@pytest.mark.parametrize("kind", [optim.RiemannianSGD, optim.RiemannianAdam])
@pytest.mark.parametrize("option", [{"maximize": True}, {"decoupled_weight_decay": True, "weight_decay": 0.1}], ids=str)
def test_what_no_step_obeys_is_refused_in_groups_too(draw, kind, option):
    w = geoopt.ManifoldParameter(draw.point(6, 6, dtype=torch.float64), manifold=UnitaryLowRank(1))
    b = torch.nn.Parameter(torch.ones(6, dtype=torch.float64))
    with pytest.raises(TypeError, match=next(iter(option))):
        kind([{"params": [w], **option}], lr=0.1)
    optimizer = kind([w], lr=0.1)
    optimizer.add_param_group({"params": [b], **option})
    before = copy.deepcopy([w, b])
    with pytest.raises(TypeError, match=next(iter(option))):
        step(([w, b], optimizer), [torch.ones_like(w), torch.ones_like(b)])
    assert all(map(torch.equal, [w, b], before))
    assert not any(optimizer.state.values())
    optimizer.param_groups[1].update(dict.fromkeys(option, 0))
    optimizer.step()
    assert not torch.equal(b, before[1])


@pytest.mark.parametrize("shape", [(6, 6), (3, 6, 6)], ids=str)
def test_a_gradient_of_zeros_without_eps_is_refused_as_a_step(draw, shape):
    w = geoopt.ManifoldParameter(draw.point(*shape, dtype=torch.float64), manifold=UnitaryLowRank(1))
    optimizer, start = optim.RiemannianAdam([w], lr=0.1, eps=0.0), w.detach().clone()
    with pytest.raises(ValueError, match="step of shape"):  # 0/0, of which torch's Adam makes NaN
        step(([w], optimizer), [torch.zeros(shape, dtype=torch.float64)])
    assert torch.equal(w, start)
    step(([w], optimizer), [draw.matrix(*shape, dtype=torch.float64)])
    assert not torch.equal(w, start)


@pytest.mark.parametrize("part", [lambda t: t[0], lambda t: t[:1], lambda t: t[..., :4]], ids=["one", "(1,)", "narrow"])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda p: optim.RiemannianSGD([p], lr=0.1, momentum=0.9), "momentum_buffer"),
        (lambda p: optim.RiemannianAdam([p], lr=0.1), "exp_avg"),
    ],
)
def test_moments_of_another_shape_are_refused(make, name, part):
    p = geoopt.ManifoldParameter(torch.eye(5).repeat(3, 1, 1), manifold=UnitaryLowRank(1))
    p.grad = torch.ones(3, 5, 5).triu()
    optimizer = make(p)
    optimizer.step()
    before = p.detach().clone()
    optimizer.state[p][name] = part(optimizer.state[p][name]).clone()
    with pytest.raises(ValueError, match=rf"`{name}` must have the point's"):
        optimizer.step()
    assert torch.equal(p, before)
