"""What is logged of a training is what a dense computation finds, and looking changes nothing."""

import copy
import math

import geoopt
import pytest
import torch
from helpers import bound

from projunn_manifold import UnitaryLowRank, layers, monitor, optim


def model_with_gradient(n=24, k=2, rank=8, sampler="lsi"):
    torch.manual_seed(0)
    model = torch.nn.Sequential(layers.UnitaryLinear(n, n, k=k), torch.nn.Linear(n, 2))
    model[0].weight.manifold = UnitaryLowRank(k, sampler=sampler)
    model(torch.randn(rank, n)).square().sum().backward()
    return model


@pytest.mark.parametrize("sampler", ["lsi", "column", "subspace", "svd"])
def test_the_share_is_that_of_the_sketch_that_the_step_has_made(sampler):
    model = model_with_gradient(sampler=sampler)
    weight, lr = model[0].weight, 1e-3
    x, g = weight.detach().double().clone(), weight.grad.double()
    optimizer = optim.RiemannianSGD(model.parameters(), lr=lr)
    optimizer.step()
    numbers = monitor(model, optimizer)
    assert numbers["0.weight/gradient_norm"] == pytest.approx(g.norm().item(), rel=1e-5)
    # a short step moves X by -lr/2 (P G - X G^T P X), P the projection on the sketch's range, to first order
    u = (weight.detach().double() - x) / -lr
    assert numbers["0.weight/step_length"] == pytest.approx(lr * (u.norm() / math.sqrt(24)).item(), rel=2e-2)
    # of the move's row space the sketch is the part that G^T P spans
    omega = x.T @ u  # skew of X^T P G, which has rank 2k: at most as long as the sketch
    share = numbers["0.weight/share_kept"]
    assert (omega.norm() / g.norm()).item() <= share * (1 + 2e-2)
    best = torch.linalg.svdvals(g)[:2].norm() / g.norm()
    assert 0 < share <= best.item() * (1 + 1e-5)
    if sampler == "svd":
        assert share == pytest.approx(best.item(), rel=1e-5)


def test_the_sketch_is_the_last_one_and_draws_nothing_from_the_next():
    model = model_with_gradient()
    manifold = model[0].weight.manifold
    seen = []
    true_sketch = manifold.sketcher.sampler

    class Spying:
        def __call__(self, gradient, k, generator):
            factors = true_sketch(gradient, k, generator)
            seen.append((factors.a @ factors.b.mT).norm())
            return factors

    model[0].weight.manifold = spied = UnitaryLowRank(2, sampler=Spying())
    optimizer = optim.RiemannianSGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.step()
        in_the_step = seen[-1] / model[0].weight.grad.norm()
        before = spied.get_extra_state()
        assert monitor(model)["0.weight/share_kept"] == pytest.approx(in_the_step.item(), rel=1e-5)
        assert torch.equal(spied.get_extra_state(), before)


def test_looking_changes_no_training():
    def trained(look):
        model = model_with_gradient()
        optimizer = optim.RiemannianAdam(model.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.step()
            if look:
                monitor(model, optimizer)
        return model[0].weight.detach().clone(), torch.get_rng_state()

    for plain, looked in zip(trained(False), trained(True), strict=True):
        assert torch.equal(plain, looked)


def test_a_gradient_that_is_not_formed_has_nearly_the_same_numbers():
    torch.manual_seed(0)
    rnn = layers.UnitaryRNN(3, 700, manifold=UnitaryLowRank(1, sampler="subspace"))
    rnn(torch.randn(5, 4, 3))[0].square().sum().backward()
    weight = rnn.weight_hh_l0
    assert weight.grad.factors is not None
    formed = copy.deepcopy(rnn)
    formed.weight_hh_l0.grad = torch.Tensor.clone(weight.grad)
    found, exact = monitor(rnn), monitor(formed)
    assert weight.grad.factors is not None
    name = "weight_hh_l0/"
    assert found[name + "gradient_norm"] == pytest.approx(exact[name + "gradient_norm"], rel=0.6)
    assert found[name + "step_length"] == pytest.approx(exact[name + "step_length"], rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", [(16, 16), (20, 12), (3, 16, 16)])
@pytest.mark.parametrize("k", [1, 3, None])
def test_lengths_are_those_of_the_move(shape, dtype, k):
    draw = torch.Generator().manual_seed(3)
    manifold = UnitaryLowRank(k, sweep=None)
    model = torch.nn.Module()
    model.w = geoopt.ManifoldParameter(manifold.random(shape, dtype=dtype, generator=draw), manifold=manifold)
    model.w.grad = torch.randn(shape, dtype=dtype, generator=draw)
    numbers, before, lr = monitor(model), model.w.detach().clone(), 1e-6
    manifold.step_(model.w.detach(), model.w.grad, lr)
    moved = (model.w.detach() - before).norm() / before.norm() / lr
    estimated = 0.3 if k is None else 1e-3  # eight columns
    assert numbers["w/step_length"] == pytest.approx(moved.item(), rel=estimated)
    assert numbers["w/unitarity_error"] <= bound(dtype)


def test_a_weight_without_gradient_has_its_error_and_counts():
    model = model_with_gradient()
    model.zero_grad()
    assert set(monitor(model)) == {
        f"0.weight/{key}" for key in ("unitarity_error", "skipped", "uncorrected", "shortened")
    }


def test_the_distance_is_seen_and_faults_stay():
    model = model_with_gradient()
    with torch.no_grad():
        model[0].weight *= 2
    weight = model[0].weight
    weight.manifold.memory.count_faults(weight.device, skipped=3, uncorrected=5)
    for _ in range(2):
        numbers = monitor(model)
        assert numbers["0.weight/unitarity_error"] == pytest.approx(3, rel=1e-3)
        assert (numbers["0.weight/skipped"], numbers["0.weight/uncorrected"]) == (3, 5)
    assert weight.manifold.pop_faults() == (3, 5, 0)


def test_a_gradient_that_is_not_finite_is_shown_as_it_is():
    model = model_with_gradient()
    model[0].weight.grad[0, 0] = math.nan
    numbers = monitor(model)
    assert math.isnan(numbers["0.weight/gradient_norm"])
    assert all(isinstance(value, float) for value in numbers.values())


@pytest.mark.parametrize("model", [None, torch.nn.Linear(2, 2).weight, layers])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(TypeError, match="model"):
        monitor(model)
    with pytest.raises(TypeError, match="optimizer"):
        monitor(torch.nn.Linear(2, 2), optimizer="Adam" if model is None else model)
    assert monitor(torch.nn.Linear(2, 2)) == {}
