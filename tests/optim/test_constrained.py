"""torch's own optimisers, constrained: they follow the dense raw maps, and nothing of theirs is touched."""

import copy
import pickle

import geoopt
import pytest
import torch
from helpers import DTYPES, bound, error

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, check_manifolds, manifolds_of, reference
from projunn_manifold.linalg import dense
from projunn_manifold.optim import RiemannianSGD, constrain
from projunn_manifold.optim.constrained import is_constrained, raw_step_

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
}
REAL_ONLY = {"muon": lambda p: torch.optim.Muon(p, lr=0.01, weight_decay=0.0)} if hasattr(torch.optim, "Muon") else {}
DECAYING = {
    "sgd": lambda p, decay: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=decay),
    "maximising sgd": lambda p, decay: torch.optim.SGD(p, lr=0.01, maximize=True, weight_decay=decay),
    "rmsprop": lambda p, decay: torch.optim.RMSprop(p, lr=0.01, weight_decay=decay),
    "adam": lambda p, decay: torch.optim.Adam(p, lr=0.01, weight_decay=decay),
    "adamw": lambda p, decay: torch.optim.AdamW(p, lr=0.01, weight_decay=decay),
}


def dense_raw(variant, x, a, b):
    """Polar factor, or exponential, of the rank-k update, in double precision by dense linear algebra."""
    step = a @ b.mH
    if variant is UnitaryLowRank:
        u, _, vh = torch.linalg.svd(x + step, full_matrices=False)
        return u @ vh
    return reference.geodesic(x, (step - x @ step.mH @ x) / 2)


CASES = [(name, dtype) for name in OPTIMIZERS for dtype in (torch.float64, torch.complex128)]
CASES += [(name, torch.float64) for name in REAL_ONLY]


@pytest.mark.parametrize("variant", [UnitaryLowRank, UnitaryLowRankExact])
@pytest.mark.parametrize("k", [1, 3, None])
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_it_follows_the_dense_trajectory(draw, variant, name, k, dtype):
    """A free twin of the optimiser makes the move, an SVD its rank-k part, and dense linear algebra the step."""
    n = 10
    p = geoopt.ManifoldParameter(draw.point(n, n, dtype=dtype), manifold=variant(k, sampler="svd", sweep=None))
    twin = torch.nn.Parameter(p.detach().clone())
    build = (OPTIMIZERS | REAL_ONLY)[name]
    optimizer, free = build([p]), build([twin])
    constrain(optimizer)
    y = p.detach().clone()
    for _ in range(200):
        p.grad = draw.matrix(n, n, dtype=dtype)
        twin.grad = p.grad.clone()
        with torch.no_grad():
            twin.copy_(y)
        optimizer.step(), free.step()
        u, s, vh = torch.linalg.svd(twin.detach() - y)
        y = dense_raw(variant, y, u[:, :k] * s[:k], vh[:k].mH)
        assert error(p, y) <= 1e-10
    assert dense.unitarity_error(p) <= 1e-12


@pytest.mark.parametrize("name", DECAYING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_weight_decay_moves_no_point(draw, name, dtype):
    """A decay far larger than the gradient leaves the trajectory as it is, and ``p.grad`` too."""
    start, points = draw.point(12, 12, dtype=dtype), []
    gradients = [draw.matrix(12, 12, dtype=dtype) for _ in range(20)]
    for decay in (0.0, 10.0):
        p = geoopt.ManifoldParameter(start.clone(), manifold=UnitaryLowRank(2))
        optimizer = DECAYING[name]([p], decay)
        constrain(optimizer)
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
            assert torch.equal(p.grad, gradient)
        points.append(p.detach())
    assert error(*points) <= 1e-10


class Mine(torch.optim.AdamW):
    """Steps like its parent."""


class Foreign(torch.optim.SGD):
    """Has a step of its own, whose decay nobody knows."""

    def step(self, closure=None):
        return super().step(closure)


def test_subclasses_decay_as_their_parents_and_others_are_warned_of(draw):
    start, g, points = draw.point(12, 12, dtype=torch.float64), draw.matrix(12, 12, dtype=torch.float64), []
    for decay in (0.0, 10.0):
        p = geoopt.ManifoldParameter(start.clone(), manifold=UnitaryLowRank(2))
        p.grad = g.clone()
        optimizer = Mine([p], lr=0.01, weight_decay=decay)
        constrain(optimizer)
        optimizer.step()
        points.append(p.detach())
    assert error(*points) <= 1e-10
    with pytest.warns(RuntimeWarning, match="weight decay of Foreign is not known"):
        constrain(Foreign([p], lr=0.1, weight_decay=0.1))


def test_a_gradient_survives_a_step_that_raises(draw):
    p = geoopt.ManifoldParameter(draw.point(8, 8, dtype=torch.float64), manifold=UnitaryLowRank(1))
    other = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
    optimizer = torch.optim.Adam([{"params": [p]}, {"params": [other]}], lr=0.1, weight_decay=0.5)
    constrain(optimizer)
    g = draw.matrix(8, 8, dtype=torch.float64)
    p.grad, other.grad = g.clone(), torch.eye(8, dtype=torch.float64).to_sparse()
    with pytest.raises(RuntimeError):
        optimizer.step()
    other.grad = None
    optimizer.step()
    assert torch.equal(p.grad, g)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_weight_decay_under_a_gradient_scaler_moves_no_point(draw, kind):
    start, g, points = draw.point(12, 12, dtype=torch.float32), draw.matrix(12, 12, dtype=torch.float32), []
    for decay in (0.0, 1.0):
        p = geoopt.ManifoldParameter(start.clone(), manifold=UnitaryLowRank(2))
        optimizer = kind([p], lr=0.01, weight_decay=decay, fused=True)
        constrain(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        scaler.scale((p * g).sum()).backward()
        scaler.step(optimizer)
        points.append(p.detach())
    assert error(*points) <= 1e-4 * error(points[0], start)


def test_a_point_that_only_shrinks_has_made_no_step(draw):
    p = geoopt.ManifoldParameter(draw.point(12, 12, dtype=torch.float64), manifold=UnitaryLowRank(2))
    start, before = p.detach().clone(), p.manifold.draws()
    optimizer = torch.optim.AdamW([p], lr=0.01, weight_decay=0.1)
    constrain(optimizer)
    p.grad = torch.zeros_like(start)
    optimizer.step()
    assert torch.equal(p.detach(), start)
    assert p.manifold.draws() == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(20, 20), (24, 10), (3, 12, 12)], ids=str)
@pytest.mark.parametrize("variant", [UnitaryLowRank, UnitaryLowRankExact])
def test_points_of_every_shape_stay_on_the_manifold(draw, dtype, shape, variant):
    p = geoopt.ManifoldParameter(draw.point(*shape, dtype=dtype), manifold=variant(2))
    bias = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.RMSprop([p, bias], lr=0.01)
    constrain(optimizer)
    for _ in range(50):
        p.grad, bias.grad = draw.matrix(*shape, dtype=dtype), torch.ones(3)
        optimizer.step()
    assert dense.unitarity_error(p).max() <= bound(dtype)
    assert (bias < 1).all()


def test_a_step_that_raises_half_way_is_taken_back_by_the_next(draw):
    p = geoopt.ManifoldParameter(draw.point(8, 8, dtype=torch.float64), manifold=UnitaryLowRank(1))
    other = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
    optimizer = torch.optim.Adam([{"params": [p]}, {"params": [other]}], lr=0.1)
    constrain(optimizer)
    p.grad, other.grad = draw.matrix(8, 8, dtype=torch.float64), torch.eye(8, dtype=torch.float64).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert dense.unitarity_error(p) > 0.01
    other.grad = None
    optimizer.step()
    assert dense.unitarity_error(p) < 1e-14


def raise_half_way(optimizer):
    """Begin a step that ends with an error before it has moved anything."""

    def closure():
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        optimizer.step(closure)


def test_a_stack_within_its_tolerance_is_not_put_back(draw):
    """The tolerance is that of a matrix's side, not of the number of matrices."""
    manifold = UnitaryLowRank(1)
    p = geoopt.ManifoldParameter(draw.point(1, 256, 256, dtype=torch.float32), manifold=manifold)
    optimizer, nearby = torch.optim.SGD([p], lr=1e-6), dense.polar(draw.point(1, 256, 256, dtype=torch.float32))
    nearby *= 1 + 4.5 * torch.finfo(torch.float32).eps  # an error between the two tolerances
    assert dense.tolerance(p.dtype, 1) < dense.probed_unitarity_error(nearby) < dense.tolerance(p.dtype, 256)
    constrain(optimizer)
    raise_half_way(optimizer)
    with torch.no_grad():
        p.copy_(nearby)
    p.grad = torch.zeros_like(nearby)
    optimizer.step()
    assert torch.equal(p.detach(), nearby)


def test_what_is_loaded_after_a_step_that_raised_is_kept(draw):
    p = geoopt.ManifoldParameter(draw.point(8, 8, dtype=torch.float64), manifold=UnitaryLowRank(1))
    optimizer, loaded = torch.optim.SGD([p], lr=1e-6), draw.point(8, 8, dtype=torch.float64)
    constrain(optimizer)
    raise_half_way(optimizer)
    with torch.no_grad():
        p.copy_(loaded)
    p.grad = draw.matrix(8, 8, dtype=torch.float64)
    optimizer.step()
    assert error(p, loaded) < 1e-4


@pytest.mark.filterwarnings("ignore:Adam moves")
def test_groups_schedulers_and_state_dict_are_untouched(draw):
    x = draw.point(8, 8, dtype=torch.float64)
    results = []
    for constrained in (True, False):
        p = geoopt.ManifoldParameter(x.clone(), manifold=UnitaryLowRank(1))
        optimizer = torch.optim.Adam([{"params": [p], "lr": 0.1}], lr=0.3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        handle = constrain(optimizer) if constrained else None
        p.grad = torch.ones(8, 8, dtype=torch.float64)
        optimizer.step(), scheduler.step()
        results.append(copy.deepcopy(optimizer.state_dict()))
        if handle:
            assert constrain(optimizer) is handle
            assert len(optimizer._optimizer_step_post_hooks) == 1
            handle.remove()
            assert not is_constrained(optimizer)
            optimizer.step()
            assert dense.unitarity_error(p) > 1e-3
    first, second = results
    assert first["param_groups"] == second["param_groups"]
    for key, value in first["state"][0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(second["state"][0][key]))


def test_closures_make_their_gradients_inside_the_step(draw):
    for zeroed_inside in (True, False):
        p = geoopt.ManifoldParameter(draw.point(8, 8, dtype=torch.float32), manifold=UnitaryLowRank(1))
        idle = geoopt.ManifoldParameter(draw.point(8, 8, dtype=torch.float32), manifold=UnitaryLowRank(1))
        start, rest = p.detach().clone(), idle.detach().clone()
        optimizer = torch.optim.SGD([p, idle], lr=1.0)
        constrain(optimizer)

        def closure(p=p, optimizer=optimizer, zeroed_inside=zeroed_inside):
            if zeroed_inside:
                optimizer.zero_grad()
            loss = (p[:, 0] * 10).sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(closure)
        assert dense.unitarity_error(p) < 1e-6
        assert not torch.equal(p, start)
        assert torch.equal(idle, rest)


def test_no_failure_leaves_a_parameter_off_its_manifold(draw):
    def fail(gradient, k, generator):
        raise TypeError("a sampler's own fault")

    points = [draw.point(8, 8, dtype=torch.float32) for _ in range(2)]
    bad = geoopt.ManifoldParameter(points[0].clone(), manifold=UnitaryLowRank(1, sampler=fail))
    good = geoopt.ManifoldParameter(points[1].clone(), manifold=UnitaryLowRank(1))
    optimizer = torch.optim.SGD([bad, good], lr=1.0)
    constrain(optimizer)
    bad.grad, good.grad = draw.matrix(8, 8, dtype=torch.float32), draw.matrix(8, 8, dtype=torch.float32)
    with pytest.raises(TypeError, match="own fault"):
        optimizer.step()
    assert torch.equal(bad, points[0])
    assert dense.unitarity_error(good) < 1e-6


def test_nothing_is_drawn_without_a_move(draw):
    p = geoopt.ManifoldParameter(draw.point(8, 8, dtype=torch.float32), manifold=UnitaryLowRank(1))
    start = p.detach().clone()
    optimizer = torch.optim.SGD([p], lr=0.1)
    constrain(optimizer)
    optimizer.step()
    p.grad = torch.zeros(8, 8)
    optimizer.step()
    assert torch.equal(p, start)
    assert p.manifold._state.gradients == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_move_that_is_not_finite_is_refused_or_skipped(draw, bad):
    for mode in ("raise", "skip"):
        p = geoopt.ManifoldParameter(draw.point(8, 8, dtype=torch.float32), manifold=UnitaryLowRank(1, non_finite=mode))
        good = geoopt.ManifoldParameter(draw.point(8, 8, dtype=torch.float32), manifold=UnitaryLowRank(1))
        start = p.detach().clone()
        optimizer = torch.optim.SGD([p, good], lr=0.1)
        constrain(optimizer)
        p.grad, good.grad = torch.full((8, 8), bad), torch.ones(8, 8)
        if mode == "raise":
            with pytest.raises(ValueError, match=r"move of shape \(8, 8\) has 64 non-finite"):
                optimizer.step()
        else:
            optimizer.step()
            assert p.manifold.pop_faults().skipped == 1
        assert torch.equal(p, start)
        assert dense.unitarity_error(good) < 1e-6


def test_copies_are_free_and_said_to_be(draw):
    model = torch.nn.Linear(8, 8)
    model.weight = geoopt.ManifoldParameter(draw.point(8, 8, dtype=torch.float32), manifold=UnitaryLowRank(1))
    plan = manifolds_of(model)
    optimizer = torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match="Adam moves 'weight' as Euclidean"):
        check_manifolds(model, plan, optimizer)
    constrain(optimizer)
    check_manifolds(model, plan, optimizer)
    for clone in (lambda t: copy.deepcopy(t), lambda t: pickle.loads(pickle.dumps(t))):
        other, copied = clone((model, optimizer))
        assert not is_constrained(copied)
        with pytest.raises(ValueError, match="Adam moves 'weight' as Euclidean"):
            check_manifolds(other, manifolds_of(other), copied)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (torch.optim.LBFGS, "LBFGS cannot be constrained"),
        (torch.optim.ASGD, "ASGD cannot be constrained"),
        (lambda p: RiemannianSGD(p, lr=0.1), "RiemannianSGD is an optimiser on manifolds"),
    ],
)
def test_what_cannot_be_constrained_is_refused_by_name(draw, build, message):
    p = geoopt.ManifoldParameter(draw.point(8, 8, dtype=torch.float32), manifold=UnitaryLowRank(1))
    with pytest.raises(TypeError, match=message):
        constrain(build([p]))


@pytest.mark.parametrize("variant", [UnitaryLowRank, UnitaryLowRankExact])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shape", [(10, 10), (2, 9, 9)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_feedback_keeps_what_a_step_leaves_out_and_carries_it_along(draw, variant, k, shape, dtype):
    p = geoopt.ManifoldParameter(draw.point(*shape, dtype=dtype), manifold=variant(k, sampler="svd", sweep=None))
    optimizer = torch.optim.SGD([p], lr=0.1)
    constrain(optimizer, feedback=True)
    x, left_out = p.detach().clone(), torch.zeros_like(p.detach())
    for _ in range(20):
        p.grad = draw.matrix(*shape, dtype=dtype)
        optimizer.step()
        u, s, vh = torch.linalg.svd(left_out - 0.1 * p.grad, full_matrices=False)
        whole = (u * s.unsqueeze(-2)) @ vh
        a, b = u[..., :k] * s[..., None, :k], vh.mH[..., :k]
        y = dense_raw(variant, x, a, b)
        left_out = y @ x.mH @ (whole - a @ b.mH)  # on square X the unitary that takes X to Y is Y X^H
        x = y
        assert error(p, x) <= 1e-10
        assert error(optimizer.state[p]["residual"], left_out) <= 1e-10


@pytest.mark.parametrize("shape", [(12, 7), (3, 8, 5)], ids=str)
def test_the_residual_of_tall_points_keeps_its_length(draw, shape):
    manifold = UnitaryLowRank(1, sampler="svd")
    x, residual = draw.point(*shape, dtype=torch.float32), torch.zeros(shape)
    for _ in range(5):
        move = draw.matrix(*shape, dtype=torch.float32) * 0.1
        s = torch.linalg.svdvals(move + residual)
        raw_step_(manifold, x, move, residual)
        assert torch.allclose(torch.linalg.matrix_norm(residual), s[..., 1:].norm(dim=-1), rtol=1e-4)


def test_training_with_feedback_goes_on_from_a_checkpoint_bit_for_bit(draw):
    gradients = [draw.matrix(16, 16, dtype=torch.float32) for _ in range(8)]

    def start():
        p = geoopt.ManifoldParameter(torch.eye(16), manifold=UnitaryLowRank(2))
        optimizer = torch.optim.Adam([p], lr=0.01)
        constrain(optimizer, feedback=True)
        return p, optimizer

    def train(p, optimizer, gradients):
        for p.grad in gradients:
            optimizer.step()

    whole, resumed = start(), start()
    train(*whole, gradients[:4])
    resumed[1].load_state_dict(copy.deepcopy(whole[1].state_dict()))
    resumed[0].manifold.load_state_dict(whole[0].manifold.state_dict())
    resumed[0].data.copy_(whole[0].data)
    train(*whole, gradients[4:])
    train(*resumed, gradients[4:])
    assert torch.equal(whole[0], resumed[0])
    assert torch.equal(whole[1].state[whole[0]]["residual"], resumed[1].state[resumed[0]]["residual"])
    assert whole[1].state[whole[0]]["residual"].any()


def test_feedback_waits_out_what_is_no_move(draw):
    p = geoopt.ManifoldParameter(draw.point(8, 8, dtype=torch.float32), manifold=UnitaryLowRank(1, non_finite="skip"))
    optimizer = torch.optim.SGD([p], lr=0.1)
    constrain(optimizer, feedback=True)
    p.grad = draw.matrix(8, 8, dtype=torch.float32)
    optimizer.step()
    x, residual = p.detach().clone(), optimizer.state[p]["residual"].clone()
    for p.grad in (torch.zeros(8, 8), torch.full((8, 8), torch.nan)):
        optimizer.step()
        assert torch.equal(optimizer.state[p]["residual"], residual)
        assert error(p, x) <= 1e-6
    assert p.manifold.pop_faults().skipped == 1
    with pytest.raises(ValueError, match="feedback=True"):
        constrain(optimizer)


@pytest.mark.parametrize("shape", [(8, 8), (2, 9, 6)], ids=str)
@pytest.mark.parametrize("k", [1, 2, None])
def test_a_geodesic_too_long_for_its_precision_is_refused_or_skipped(draw, k, shape):
    x, move = draw.point(*shape, dtype=torch.float32), 1e12 * draw.matrix(*shape, dtype=torch.float32)
    for mode in ("raise", "skip"):
        manifold, y = UnitaryLowRankExact(k, non_finite=mode, sweep=None), x.clone()
        residual = 1e-3 * draw.matrix(*shape, dtype=torch.float32)
        before = residual.clone()
        if mode == "raise":
            with pytest.raises(ValueError, match=r"step of shape .* too large for its precision"):
                raw_step_(manifold, y, move, residual)
        else:
            raw_step_(manifold, y, move, residual)
            assert manifold.pop_faults() == (len(x) if x.dim() > 2 else 1, 0, 0)
        assert torch.equal(y, x)
        assert error(residual, before) <= bound(torch.float32)  # carried by the identity


def test_feedback_leaves_alone_what_has_no_gradient_yet(draw):
    first, second = (
        geoopt.ManifoldParameter(draw.point(6, 6, dtype=torch.float32), manifold=UnitaryLowRank(1)) for _ in range(2)
    )
    optimizer = torch.optim.Adam([first, second], lr=0.01)
    constrain(optimizer, feedback=True)

    def closure(of):
        optimizer.zero_grad()
        loss = (of * torch.arange(36.0).view(6, 6)).sum()
        loss.backward()
        return loss

    optimizer.step(lambda: closure(first))
    optimizer.step(lambda: closure(second))
    assert dense.unitarity_error(second) < 1e-5


def test_feedback_waits_for_each_matrix_of_a_batch(draw):
    manifold = UnitaryLowRank(1)
    x = draw.point(2, 6, 6, dtype=torch.float32)
    residual, move = draw.matrix(2, 6, 6, dtype=torch.float32), draw.matrix(2, 6, 6, dtype=torch.float32)
    move[1] = 0
    before, kept = x.clone(), residual.clone()
    raw_step_(manifold, x, move, residual)
    assert error(x[1], before[1]) <= 1e-6
    assert torch.equal(residual[1], kept[1])
    assert error(x[0], before[0]) > 0.1


def test_what_holds_no_unitary_parameter_is_told_of_and_the_handle_says_what_it_is():
    with pytest.warns(RuntimeWarning, match="RMSprop holds no unitary parameter.*build it over"):
        handle = constrain(torch.optim.RMSprop(torch.nn.Linear(4, 4).parameters(), lr=0.1))
    assert repr(handle) == "Constraint(RMSprop, feedback=False)"
    handle.remove()
    assert repr(handle) == "Constraint(RMSprop, feedback=False, removed)"


def test_a_handle_taken_for_the_optimiser_says_what_it_is(draw):
    w = geoopt.ManifoldParameter(torch.eye(4), manifold=UnitaryLowRank(1))
    handle = constrain(torch.optim.Adam([w]))
    for name in ("step", "zero_grad", "param_groups", "state_dict"):
        with pytest.raises(AttributeError, match=f"handle of a constraint: {name} is the optimiser's"):
            getattr(handle, name)
    with pytest.raises(AttributeError, match="no attribute 'stop'"):
        handle.stop()
    copy.copy(handle)
