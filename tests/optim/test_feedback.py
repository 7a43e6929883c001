"""Error feedback in the in-place optimisers: what a sketch leaves out is added to the next gradient."""

import copy

import geoopt
import pytest
import torch
from helpers import bound

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, optim

N = 24


def polar(x):
    u, _, vh = torch.linalg.svd(x)
    return u @ vh


def parameter(k=2, n=N, m=N, dtype=torch.float64, **options):
    draw = torch.Generator().manual_seed(0)
    manifold = UnitaryLowRank(k, **{"sampler": "svd", "sweep": None} | options)
    return geoopt.ManifoldParameter(manifold.random(n, m, dtype=dtype, generator=draw), manifold=manifold)


def gradients(p, count=6, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, dtype=p.dtype, generator=draw) for _ in range(count)]


def best(m, k):
    u, s, vh = torch.linalg.svd(m)
    return (u[:, :k] * s[:k]) @ vh[:k]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_plain_descent_is_the_dense_recurrence(dtype):
    p, lr = parameter(dtype=dtype), 0.1
    optimizer = optim.RiemannianSGD([p], lr=lr, feedback=True)
    x, r = p.detach().clone(), torch.zeros_like(p.detach())
    for g in gradients(p):
        p.grad = g
        optimizer.step()
        total = g + r
        taken = best(total, 2)
        y = polar(x - lr * (taken - x @ taken.mH @ x) / 2)
        x, r = y, y @ x.mH @ (total - taken)
        assert (p.detach() - x).norm() <= 1e3 * bound(dtype)
        assert (optimizer.state[p]["residual"] - r).norm() <= 1e3 * bound(dtype) * r.norm()


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_follows_the_dense_recurrence(nesterov):
    p, lr, momentum = parameter(k=11), 0.05, 0.5  # moves of rank 22 of 24
    optimizer = optim.RiemannianSGD([p], lr=lr, momentum=momentum, nesterov=nesterov, feedback=True)
    x, r, buffer = p.detach().clone(), torch.zeros_like(p.detach()), None
    [g] = gradients(p, 1)
    p.grad = g
    optimizer.step()
    taken = best(g, 11)
    u = (taken - x @ taken.mT @ x) / 2
    buffer = momentum * g + u  # geoopt starts from the Euclidean gradient
    followed = u + momentum * buffer if nesterov else buffer
    assert p.manifold.check_point_on_manifold(p.detach())
    # what is left out is carried by the same unitary as the buffer: inner products with it stay
    rest, state = g - taken, optimizer.state[p]
    assert (state["residual"] * state["momentum_buffer"]).sum() == pytest.approx((rest * buffer).sum().item(), rel=1e-8)
    assert state["residual"].norm() == pytest.approx(rest.norm().item(), rel=1e-10)
    assert (followed * (p.detach() - x)).sum() < 0
    assert r.norm() == 0


MAKE = {
    "SGD": lambda p, **options: optim.RiemannianSGD(p, lr=0.1, **options),
    "momentum": lambda p, **options: optim.RiemannianSGD(p, lr=0.1, momentum=0.9, **options),
    "nesterov": lambda p, **options: optim.RiemannianSGD(p, lr=0.1, momentum=0.9, nesterov=True, **options),
    "Adam": lambda p, **options: optim.RiemannianAdam(p, lr=0.1, **options),
    "amsgrad": lambda p, **options: optim.RiemannianAdam(p, lr=0.1, amsgrad=True, **options),
}
every_optimiser = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


@every_optimiser
@pytest.mark.parametrize("shape", [(24, 24), (30, 18)])
def test_nothing_is_lost_of_what_was_put_in(make, shape):
    """Every gradient is taken or kept: with gradients of equal ranges the residual stays bounded."""
    p = parameter(k=1, n=shape[0], m=shape[1], sampler="lsi")
    optimizer = make([p], feedback=True)
    [g] = gradients(p, 1)
    taken_first = UnitaryLowRank(1, sampler="lsi").sketcher  # the same draws
    from projunn_manifold.linalg.products import matrix

    factors = taken_first.factors(matrix(p.detach()), g)
    p.grad = g
    optimizer.step()
    rest = g - factors.a @ factors.b.mT
    assert optimizer.state[p]["residual"].norm() == pytest.approx(rest.norm().item(), rel=1e-10)


@every_optimiser
@pytest.mark.parametrize("k", [None, 12])
def test_dense_moves_have_no_residual(make, k):
    plain, kept = parameter(k=k), parameter(k=k)
    optimisers = [make([plain]), make([kept], feedback=True)]
    for g in gradients(plain, 3):
        for p, optimizer in zip((plain, kept), optimisers, strict=True):
            p.grad = g.clone()
            optimizer.step()
    assert "residual" not in optimisers[1].state[kept]
    assert (plain - kept).norm() <= bound(torch.float64)


@every_optimiser
def test_a_gradient_of_rank_k_leaves_nothing(make):
    p = parameter(k=2)
    optimizer = make([p], feedback=True)
    g = best(gradients(p, 1)[0], 2)
    p.grad = g
    optimizer.step()
    assert optimizer.state[p]["residual"].norm() <= 1e3 * bound(torch.float64) * g.norm()


@every_optimiser
def test_a_checkpoint_goes_on_bit_for_bit(make):
    def run(interrupted):
        p = parameter(sampler="lsi", sweep=256)
        optimizer = make([p], feedback=True)
        for step, g in enumerate(gradients(p)):
            if interrupted and step == 3:
                state = copy.deepcopy((optimizer.state_dict(), p.manifold.get_extra_state(), p.detach()))
                p = parameter(sampler="lsi", sweep=256)
                optimizer = make([p])  # the choice comes with the groups
                optimizer.load_state_dict(state[0])
                p.manifold.set_extra_state(state[1])
                with torch.no_grad():
                    p.copy_(state[2])
            p.grad = g
            optimizer.step()
        return p.detach(), optimizer.state[p]["residual"]

    for whole, resumed in zip(run(False), run(True), strict=True):
        assert torch.equal(whole, resumed)


@every_optimiser
def test_a_refused_gradient_leaves_no_trace(make):
    p = parameter()
    optimizer = make([p], feedback=True)
    good, bad = gradients(p, 2)
    bad[3, 4] = torch.nan
    p.grad = bad
    for steps in range(2):
        before = copy.deepcopy((p.detach(), dict(optimizer.state[p]), p.manifold.get_extra_state()))
        with pytest.raises(ValueError, match="non-finite"):
            optimizer.step()
        assert torch.equal(p.detach(), before[0])
        assert torch.equal(p.manifold.get_extra_state(), before[2])
        assert optimizer.state[p].keys() == before[1].keys(), steps
        for name, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[1][name])), name
        p.grad = good
        optimizer.step()
        p.grad = bad


@every_optimiser
def test_a_skipped_matrix_keeps_its_residual(make):
    draw = torch.Generator().manual_seed(0)
    manifold = UnitaryLowRank(1, non_finite="skip", sweep=None)
    p = geoopt.ManifoldParameter(manifold.random(3, N, N, dtype=torch.float64, generator=draw), manifold=manifold)
    optimizer = make([p], feedback=True)
    good, bad = gradients(p, 2)
    p.grad = good
    optimizer.step()
    before = optimizer.state[p]["residual"].clone()
    bad[1, 0, 0] = torch.inf
    p.grad = bad
    optimizer.step()
    after = optimizer.state[p]["residual"]
    assert manifold.pop_faults().skipped == 1
    assert after[1].norm() == pytest.approx(before[1].norm().item(), rel=1e-12)  # carried by what moments still do
    assert torch.isfinite(after).all()
    assert (after[[0, 2]] - before[[0, 2]]).norm() > 1


@every_optimiser
def test_a_stack_steps_as_its_members_do(make):
    def run(foreach):
        members = [parameter(k=1, sampler="lsi", seed=seed) for seed in range(5)]
        optimizer = make(members, feedback=True, foreach=foreach)
        for step in range(4):
            for seed, p in enumerate(members):
                p.grad = gradients(p, 4, seed)[step]
            optimizer.step()
        return [t for p in members for t in (p.detach(), optimizer.state[p]["residual"])]

    for one, together in zip(run(False), run(True), strict=True):
        assert (one - together).norm() <= 1e2 * bound(torch.float64) * max(1, one.norm())


def test_a_gradient_that_is_not_formed_makes_the_step_of_the_dense_one():
    from projunn_manifold.sketching import FactoredTensor, LowRank

    draw = torch.Generator().manual_seed(2)
    a, b = (torch.randn(N, 5, dtype=torch.float64, generator=draw) for _ in range(2))
    found = []
    for gradient in (FactoredTensor(LowRank(a, b)), a @ b.mT):
        p = parameter(k=2)
        optimizer = optim.RiemannianSGD([p], lr=0.1, feedback=True)
        p.grad = gradient
        optimizer.step()
        found.append((p.detach(), optimizer.state[p]["residual"]))
    for factored, dense in zip(*found, strict=True):
        assert (factored - dense).norm() <= 1e3 * bound(torch.float64)


@pytest.mark.parametrize("kind", [UnitaryLowRank, UnitaryLowRankExact])
def test_rank_one_with_feedback_gets_as_far_as_the_dense_step(kind):
    """Full-rank gradients that stay the same: without feedback "svd" at k = 1 never sees the second direction."""
    draw = torch.Generator().manual_seed(0)
    target = UnitaryLowRank().random(8, 8, dtype=torch.float64, generator=draw)
    start = target @ torch.linalg.matrix_exp(0.3 * torch.triu(torch.ones(8, 8, dtype=torch.float64), 1).sub_(
        torch.triu(torch.ones(8, 8, dtype=torch.float64), 1).mT
    ))  # fmt: skip
    losses = {}
    for feedback in (False, True):
        p = geoopt.ManifoldParameter(start.clone(), manifold=kind(1, sampler="svd"))
        optimizer = optim.RiemannianSGD([p], lr=0.3, feedback=feedback)
        for _ in range(60):
            optimizer.zero_grad()
            loss = (p - target).square().sum() / 2
            loss.backward()
            optimizer.step()
        losses[feedback] = loss.item()
    assert losses[True] < 1e-3


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_other_choices_are_refused(value):
    for kind in (optim.RiemannianSGD, optim.RiemannianAdam):
        with pytest.raises(TypeError, match="feedback"):
            kind([parameter()], lr=0.1, feedback=value)
        optimizer = kind([parameter()], lr=0.1)
        optimizer.param_groups[0]["feedback"] = value if value is not None else 3
        with pytest.raises(TypeError, match="feedback"):
            optimizer.step()


def test_geoopts_state_is_taken_and_left():
    for own, theirs in (
        (optim.RiemannianSGD, geoopt.optim.RiemannianSGD),
        (optim.RiemannianAdam, geoopt.optim.RiemannianAdam),
    ):
        p = parameter()
        p.grad = gradients(p, 1)[0]
        other = theirs([p], lr=0.1)
        other.step()
        mine = own([p], lr=0.1, feedback=True)
        mine.load_state_dict(other.state_dict())
        mine.step()
        assert mine.state[p]["residual"].norm() > 0
        other.load_state_dict(mine.state_dict())
        other.step()
        assert p.manifold.check_point_on_manifold(p.detach())
