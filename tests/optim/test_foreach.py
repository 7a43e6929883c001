"""Parameters that step as one stack: the results are those of ``foreach=False``, the errors and counts included."""

import copy
import pickle
import warnings

import geoopt
import pytest
import torch
from helpers import bound, error

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, context, optim
from projunn_manifold.linalg import dense
from projunn_manifold.moves import drift
from projunn_manifold.optim import stacked
from projunn_manifold.sketching.factored_tensor import FactoredTensor
from projunn_manifold.sketching.lowrank import LowRank
from projunn_manifold.sketching.samplers import Subspace

SETTINGS = {
    "sgd": ("RiemannianSGD", {"lr": 0.2}),
    "tensor lr": ("RiemannianSGD", {"lr": torch.tensor(0.2)}),
    "momentum": ("RiemannianSGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    "nesterov": ("RiemannianSGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": ("RiemannianAdam", {"lr": 0.1}),
    "amsgrad": ("RiemannianAdam", {"lr": 0.1, "amsgrad": True, "betas": (0.8, 0.9)}),
}
CASES = [
    (name, dtype, variant)
    for name in SETTINGS
    for dtype, variant in ((torch.float64, UnitaryLowRank), (torch.complex64, UnitaryLowRankExact))
    if not (name == "amsgrad" and dtype.is_complex)  # geoopt's cannot compare complex numbers
]


@pytest.fixture
def stacks(monkeypatch):
    """Numbers of members of all stacks that have been moved as one."""
    found = []
    move_stack_ = stacked._move_stack_

    def spy(members, *args):
        moved = move_stack_(members, *args)
        if moved:
            found.append(len(members))
        return moved

    monkeypatch.setattr(stacked, "_move_stack_", spy)
    return found


def make(points, manifolds):
    return [geoopt.ManifoldParameter(x.clone(), manifold=m) for x, m in zip(points, manifolds, strict=True)]


def optimizer_of(name, parameters, foreach, **more):
    kind, arguments = SETTINGS[name]
    return getattr(optim, kind)(parameters, **arguments, foreach=foreach, **more)


def give(parameters, gradients):
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = None if g is None else g.clone()


def assert_alike(ours, theirs, dtype, size=20.0):
    """Points, the optimisers' states and the manifolds' of two runs, each (parameters, optimizer)."""
    for p, q in zip(ours[0], theirs[0], strict=True):
        assert error(p.detach(), q.detach()) <= size * bound(dtype)
        if isinstance(p, geoopt.ManifoldParameter):
            assert p.manifold.get_extra_state().tolist() == q.manifold.get_extra_state().tolist()
    mine, other = (run[1].state_dict()["state"] for run in (ours, theirs))
    assert {i for i in mine if mine[i]} == {i for i in other if other[i]}
    for i, entries in mine.items():
        assert entries.keys() == other.get(i, {}).keys()
        for name, value in entries.items():
            expected = other[i][name]
            assert type(value) is type(expected)
            if isinstance(value, torch.Tensor):
                assert value.dtype is expected.dtype
                scale = max(1.0, expected.abs().max().item())
                assert torch.allclose(value, expected, rtol=0, atol=size * 2 * bound(dtype) * scale)
            else:
                assert value == expected


def go_on_together(ours, theirs):
    """Give one run the points and moments of the other, so that rounding does not add up."""
    with torch.no_grad():
        for p, q in zip(ours[0], theirs[0], strict=True):
            p.copy_(q)
            for name, value in theirs[1].state[q].items():
                if isinstance(value, torch.Tensor):
                    ours[1].state[p][name].copy_(value)


@pytest.mark.parametrize("k", [1, 4, None])
@pytest.mark.parametrize("shape", [(12, 12), (20, 9), (2, 10, 10)], ids=str)
@pytest.mark.parametrize(("name", "dtype", "variant"), CASES)
def test_the_steps_are_those_of_one_by_one(draw, stacks, name, dtype, variant, shape, k):
    """Two shapes in turn, some on a manifold of their own and some on one for both shapes, and a Euclidean one."""
    *batch, n, m = shape
    shapes = [shape, (*batch, n + 4, m), shape, shape, (*batch, n + 4, m)]
    points = [draw.point(*each, dtype=dtype) for each in shapes]
    bias = draw.matrix(3, 3, dtype=dtype)
    runs = []
    for foreach in (True, False):
        common = variant(k, seed=7, sweep=6)
        own = [variant(k, seed=seed, sweep=6) for seed in range(2)]
        parameters = [*make(points, [common, common, own[0], common, own[1]]), torch.nn.Parameter(bias.clone())]
        runs.append((parameters, optimizer_of(name, parameters, foreach)))
    for t in range(30):
        gradients = [draw.matrix(*p.shape, dtype=dtype) for p in runs[0][0]]
        if t == 10:
            gradients[3] = None  # from then on it is behind the others
        for run in runs:
            give(run[0], gradients)
            run[1].step()
        assert_alike(*runs, dtype)
        go_on_together(*runs)
    assert {3, 2} == set(stacks)
    assert len(stacks) == 58


@pytest.mark.parametrize("sampler", ["lsi", "column", "subspace", "svd", Subspace(power=2)], ids=str)
def test_every_sampler_draws_for_each_member(draw, stacks, path, sampler):
    points = [draw.point(11, 8, dtype=torch.float64) for _ in range(3)]
    runs = []
    for foreach in (True, False):
        manifolds = [UnitaryLowRank(2, sampler=sampler, seed=seed) for seed in (1, 2, 1)]
        parameters = make(points, manifolds)
        runs.append((parameters, optimizer_of("momentum", parameters, foreach)))
    for _ in range(4):
        gradients = [draw.matrix(11, 8, dtype=torch.float64) for _ in points]
        for run in runs:
            give(run[0], gradients)
            run[1].step()
    assert_alike(*runs, torch.float64)
    assert stacks == [3, 3, 3]


def test_a_sampler_of_the_users_own_is_given_a_generator(draw, stacks):
    def sampler(gradient, k, generator):
        assert type(generator) is torch.Generator
        a = torch.linalg.qr(gradient.dense() @ torch.randn(8, k, dtype=torch.float64, generator=generator)).Q
        return LowRank(a, gradient.adjoint_times(a))

    parameters = make(
        [draw.point(8, 8, dtype=torch.float64) for _ in range(3)], [UnitaryLowRank(2, sampler=sampler)] * 3
    )
    optimizer = optimizer_of("sgd", parameters, True)
    for _ in range(2):
        give(parameters, [draw.matrix(8, 8, dtype=torch.float64) for _ in parameters])
        optimizer.step()
    assert not stacks


class Own(UnitaryLowRank):
    """A subclass, whose methods may do anything."""


def other_manifold(p, optimizer):
    p.manifold = UnitaryLowRank(2)


def other_class(p, optimizer):
    p.manifold = UnitaryLowRankExact(1)


def subclass(p, optimizer):
    p.manifold = Own(1)


def other_sweep(p, optimizer):
    p.manifold = UnitaryLowRank(1, sweep=None)


def skipping(p, optimizer):
    p.manifold = UnitaryLowRank(1, non_finite="skip")


def strided(p, optimizer):
    p.data = p.data.mT.contiguous().mT


def factored(p, optimizer):
    p.grad = FactoredTensor(LowRank(p.grad[:, :1].clone(), p.grad[:1].mT.clone()))


def without_gradient(p, optimizer):
    p.grad = None


def other_count(p, optimizer):
    if "step" in optimizer.state[p]:
        optimizer.state[p]["step"] += 3
    else:
        optimizer.state[p]["residual"] = torch.zeros(3, dtype=torch.float64)


def without_state(p, optimizer):
    optimizer.state[p].clear()


def new_to_its_manifold(p, optimizer):
    p.manifold = UnitaryLowRank(1, seed=9)


WAYS = [
    other_manifold, other_class, subclass, other_sweep, skipping, strided, factored, without_gradient, other_count,
    without_state, new_to_its_manifold,
]  # fmt: skip


@pytest.mark.parametrize("name", ["momentum", "adam"])
@pytest.mark.parametrize("change", WAYS, ids=lambda change: change.__name__)
def test_what_differs_steps_alone(draw, stacks, change, name):
    points = [draw.point(8, 8, dtype=torch.float64) for _ in range(4)]
    runs = []
    for foreach in (True, False):
        parameters = make(points, [UnitaryLowRank(1, seed=seed) for seed in range(4)])
        runs.append((parameters, optimizer_of(name, parameters, foreach)))
    for t in range(4):
        gradients = [draw.matrix(8, 8, dtype=torch.float64) for _ in points]
        for parameters, optimizer in runs:
            give(parameters, gradients)
            if t == 1 or (t > 1 and change in (factored, without_gradient)):
                change(parameters[1], optimizer)
            optimizer.step()
    assert_alike(*runs, torch.float64)
    assert stacks[0] == 3
    returns = (without_state, new_to_its_manifold) if name == "momentum" else (new_to_its_manifold,)
    assert stacks[-1] == (4 if change in returns else 3)


@pytest.mark.parametrize("change", [{"stabilize": 2}, {"lr": torch.full((3,), 0.1)}, {"foreach": False}], ids=str)
def test_groups_that_step_one_by_one(draw, stacks, change):
    if "lr" in change:
        change = {"lr": change["lr"].double()}
    shape = (3, 6, 6) if "lr" in change else (6, 6)
    points = [draw.point(*shape, dtype=torch.float64) for _ in range(4)]
    runs = []
    for foreach in (True, False):
        parameters = make(points, [UnitaryLowRank(1)] * 4)
        groups = [{"params": parameters[:2], **change}, {"params": parameters[2:]}]
        runs.append((parameters, optimizer_of("adam" if "stabilize" in change else "sgd", groups, foreach)))
    for _ in range(3):
        gradients = [draw.matrix(*shape, dtype=torch.float64) for _ in points]
        for run in runs:
            give(run[0], gradients)
            run[1].step()
    for p, q in zip(runs[0][0], runs[1][0], strict=True):
        assert error(p, q) <= bound(torch.float64)
    assert stacks == [2, 2]


@pytest.mark.parametrize("common", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [("sgd", torch.nan, "non-finite"), ("momentum", torch.inf, "non-finite"), ("adam", 1e200, "too large")],
)
@pytest.mark.parametrize("non_finite", ["raise", "skip", "as on CUDA"])
def test_one_gradient_that_is_not_finite(draw, stacks, monkeypatch, name, bad, message, non_finite, common):
    """Refused: those before it have moved, as one by one.  Skipped: only it stays, and its manifold counts it."""
    if non_finite == "as on CUDA":
        monkeypatch.setattr(context, "readable", lambda x: False)
        non_finite = "skip"
    points = [draw.point(8, 8, dtype=torch.float64) for _ in range(4)]
    runs = []
    for foreach in (True, False):
        first = UnitaryLowRank(1, non_finite=non_finite)
        manifolds = [first if common else UnitaryLowRank(1, seed=s, non_finite=non_finite) for s in range(4)]
        parameters = make(points, manifolds)
        runs.append((parameters, optimizer_of(name, parameters, foreach)))
    for t in range(4):
        gradients = [draw.matrix(8, 8, dtype=torch.float64) for _ in points]
        if t == 2:
            gradients[2][0, 1], gradients[2][4, 5] = bad, -bad
        for parameters, optimizer in runs:
            give(parameters, gradients)
            before = [p.detach().clone() for p in parameters]
            if t == 2 and non_finite == "raise":
                with pytest.raises(ValueError, match=rf"of shape \(8, 8\).*{message}"):
                    optimizer.step()
                assert [torch.equal(p, x) for p, x in zip(parameters, before, strict=True)] == [
                    False,
                    False,
                    True,
                    True,
                ]
            else:
                optimizer.step()
            if t == 2 and non_finite == "skip" and name == "sgd":
                assert [torch.equal(p, x) for p, x in zip(parameters, before, strict=True)] == [
                    False,
                    False,
                    True,
                    False,
                ]
        assert_alike(*runs, torch.float64)
    expected = [4, 2, 2] if name == "adam" else [4, 4]  # whose counts of steps then differ
    assert stacks == (expected if non_finite == "raise" else [4, 4, 4])
    skipped = [sum(m.pop_faults().skipped for m in {p.manifold for p in run[0]}) for run in runs]
    assert skipped == ([0, 0] if non_finite == "raise" else [1, 1])


def test_a_refused_step_of_adam_is_that_of_one_by_one(draw):
    points = [draw.point(8, 8, dtype=torch.float64) for _ in range(3)]
    runs = []
    for foreach in (True, False):
        parameters = make(points, [UnitaryLowRank(1)] * 3)
        runs.append((parameters, optimizer_of("adam", parameters, foreach)))
    for lr in (0.1, 1e200, 0.1):
        gradients = [draw.matrix(8, 8, dtype=torch.float64) for _ in points]
        for parameters, optimizer in runs:
            optimizer.param_groups[0]["lr"] = lr
            give(parameters, gradients)
            if lr > 1:
                with pytest.raises(ValueError, match=r"step of shape \(8, 8\)"):
                    optimizer.step()
            else:
                optimizer.step()
        assert_alike(*runs, torch.float64)


def test_columns_too_far_off_are_left_and_counted_for_their_manifold(draw):
    points = [draw.point(8, 8, dtype=torch.float64) for _ in range(3)]
    results = []
    for foreach in (True, False):
        parameters = make(points, [UnitaryLowRank(1, seed=seed, sweep=4) for seed in range(3)])
        parameters[0].manifold.correct_(points[0].clone())  # its turn is another one
        optimizer = optimizer_of("sgd", parameters, foreach)
        generator = torch.Generator().manual_seed(0)
        for t in range(8):
            give(parameters, [torch.randn(8, 8, dtype=torch.float64, generator=generator) for _ in parameters])
            if t == 1:
                with torch.no_grad():
                    parameters[1][:, 0] = parameters[1][:, 1]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
            assert all(
                "off the" in str(warning.message) or "left its manifold" in str(warning.message) for warning in caught
            )
        results.append([p.manifold.pop_faults() for p in parameters])
    assert results[0] == results[1]
    assert [faults.uncorrected > 0 for faults in results[0]] == [False, True, False]


def test_every_member_is_corrected_in_its_own_turn(draw, monkeypatch):
    """Manifolds of their own that have counted differently, and one for two parameters."""
    points = [draw.point(8, 8, dtype=torch.float64) for _ in range(5)]
    correct_columns_, found = drift.correct_columns_, []

    def spy(x, start):
        found.extend([start] * x.shape[:-2].numel())
        return correct_columns_(x, start)

    monkeypatch.setattr(drift, "correct_columns_", spy)
    starts = []
    for foreach in (True, False):
        manifolds = [UnitaryLowRank(1, seed=seed, sweep=12) for seed in range(4)]
        for manifold, more in zip(manifolds, (0, 1, 5, 2), strict=True):
            for _ in range(more):
                manifold.correct_(points[0].clone())
        parameters = make(points, [*manifolds, manifolds[0]])
        optimizer = optimizer_of("sgd", parameters, foreach)
        steps = []
        for _ in range(20):
            found.clear()
            give(parameters, [torch.ones(8, 8, dtype=torch.float64).tril() for _ in parameters])
            optimizer.step()
            steps.append(sorted(found))
        starts.append(steps)
    assert starts[0] == starts[1]
    assert {len(step) for step in starts[0]} >= {0, 1, 2}


def test_drift_is_corrected(draw, stacks):
    parameters = make([draw.point(16, 16, dtype=torch.float32) for _ in range(5)], [UnitaryLowRank(1, sweep=16)] * 5)
    optimizer = optimizer_of("sgd", parameters, True)
    for t in range(60):
        give(parameters, [draw.matrix(16, 16, dtype=torch.float32) for _ in parameters])
        optimizer.step()
        if t == 3:
            with torch.no_grad():
                for p in parameters:
                    p.mul_(1 + 1e-4)
    assert stacks == [5] * 59
    assert max(dense.unitarity_error(p).item() for p in parameters) < 2e-6


def test_the_same_memory_twice_moves_twice(draw):
    x, gradients = draw.point(8, 8, dtype=torch.float64), [draw.matrix(8, 8, dtype=torch.float64) for _ in range(6)]
    ends = []
    for foreach in (True, False):
        manifold = UnitaryLowRank(1, sweep=None)
        p, other = make([x, x], [manifold, manifold])
        q = geoopt.ManifoldParameter(p.data, manifold=manifold)
        optimizer = optimizer_of("sgd", [p, q, other], foreach)
        for pair in (gradients[:3], gradients[3:]):
            give([p, q, other], pair)
            optimizer.step()
        ends.append(p.detach().clone())
    assert error(*ends) <= bound(torch.float64)


def test_by_default_stacks_are_made_where_they_pay(draw, stacks):
    """Of at least 4 parameters of at most 128 KiB, 32 KiB if their moves are of full rank."""
    counts = {
        ((8, 8), 1): 5,
        ((128, 128), 1): 4,
        ((130, 130), 1): 4,
        ((9, 9), 1): 3,
        ((64, 64), None): 4,
        ((66, 66), None): 4,
    }
    parameters = []
    for ((n, _), k), count in counts.items():
        parameters += make([torch.eye(n, dtype=torch.float64)] * count, [UnitaryLowRank(k)] * count)
    for foreach, expected in ((None, [5, 4, 4]), (True, [5, 4, 4, 3, 4, 4]), (False, [])):
        optimizer = optimizer_of("sgd", parameters, foreach)
        for _ in range(2):
            stacks.clear()
            give(parameters, [draw.matrix(*p.shape, dtype=torch.float64) for p in parameters])
            optimizer.step()
        assert stacks == expected


def test_a_stack_on_cpu_stays_in_the_cache(draw, stacks):
    parameters = make([torch.eye(128, dtype=torch.float64)] * 37, [UnitaryLowRank(1)] * 37)
    optimizer = optimizer_of("sgd", parameters, True)
    for _ in range(2):
        give(parameters, [draw.matrix(128, 128, dtype=torch.float64)] * 37)
        optimizer.step()
    assert stacks == [16, 16, 5]


def test_a_parameter_that_comes_later_joins(draw, stacks):
    points = [draw.point(8, 8, dtype=torch.float64) for _ in range(4)]
    runs = []
    for foreach in (True, False):
        parameters = make(points, [UnitaryLowRank(1)] * 4)
        runs.append((parameters, optimizer_of("adam", parameters[:2], foreach)))
    for t in range(5):
        gradients = [draw.matrix(8, 8, dtype=torch.float64) for _ in points]
        for parameters, optimizer in runs:
            if t == 2:
                optimizer.add_param_group({"params": parameters[2:]})
            give(parameters, gradients)
            optimizer.step()
    assert_alike(*runs, torch.float64)
    assert stacks == [2, 2, 2, 2, 2]  # of step 2 none, as the shared manifold has new parameters then


@pytest.mark.parametrize("name", ["momentum", "adam"])
@pytest.mark.parametrize("way", ["state_dict", "from geoopt", "to geoopt", "copy", "pickle"])
@pytest.mark.parametrize("foreach", [True, False, None])
def test_the_choice_survives(draw, way, name, foreach):
    kind, arguments = SETTINGS[name]
    parameters = make([draw.point(8, 8, dtype=torch.float64) for _ in range(2)], [UnitaryLowRank(1)] * 2)
    optimizer = optimizer_of(name, parameters, foreach)
    theirs = getattr(geoopt.optim, kind)(parameters, **arguments)
    give(parameters, [draw.matrix(8, 8, dtype=torch.float64) for _ in parameters])
    optimizer.step()
    if way == "state_dict":
        other = optimizer_of(name, parameters, None)
        other.load_state_dict(optimizer.state_dict())
    elif way == "from geoopt":
        theirs.step()
        other = optimizer
        other.load_state_dict(theirs.state_dict())
    elif way == "to geoopt":
        theirs.load_state_dict(optimizer.state_dict())
        theirs.step()
        other = optimizer
    else:
        other = copy.deepcopy(optimizer) if way == "copy" else pickle.loads(pickle.dumps(optimizer))
    assert [group["foreach"] for group in other.param_groups] == [foreach]
    give([p for g in other.param_groups for p in g["params"]], [draw.matrix(8, 8, dtype=torch.float64)] * 2)
    other.step()


@pytest.mark.parametrize("kind", [optim.RiemannianSGD, optim.RiemannianAdam])
def test_a_choice_that_is_none_is_named(draw, kind):
    (p,) = make([draw.point(6, 6, dtype=torch.float64)], [UnitaryLowRank(1)])
    start = p.detach().clone()
    for value in (1, "yes", torch.tensor(True)):
        with pytest.raises(TypeError, match="`foreach` must be True, False or None"):
            kind([p], lr=0.1, foreach=value)
        optimizer = kind([p], lr=0.1)
        optimizer.param_groups[0]["foreach"] = value
        p.grad = torch.eye(6, dtype=torch.float64)
        with pytest.raises(TypeError, match="`foreach` must be True, False or None"):
            optimizer.step()
    assert torch.equal(p, start)


def test_hooks_closures_and_gradients_are_as_ever(draw, stacks):
    parameters = make([draw.point(8, 8, dtype=torch.float64) for _ in range(3)], [UnitaryLowRank(1)] * 3)
    optimizer = optimizer_of("momentum", parameters, True)

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square()[0].sum() for p in parameters)
        loss.backward()
        return loss

    for _ in range(2):
        assert optimizer.step(closure).item() == pytest.approx(3.0)
    assert stacks == [3]
    versions = [p._version for p in parameters]
    gradients = [p.grad.clone() for p in parameters]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True))
    assert all(p._version > version for p, version in zip(parameters, versions, strict=True))
    assert all(type(optimizer.state[p]["momentum_buffer"]) is torch.Tensor for p in parameters)
