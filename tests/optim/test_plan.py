"""Parameters that lost their manifold are found, named and put back."""

import geoopt
import pytest
import torch
from torch import nn

from projunn_manifold import UnitaryLowRank, check_manifolds, manifolds_of, optim, reattach_manifolds
from projunn_manifold.averaging import AveragedModel
from projunn_manifold.linalg.dense import unitarity_error
from projunn_manifold.optim.plan import Plan


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.manifold = UnitaryLowRank(1)
        self.inner = nn.Linear(8, 8)
        self.inner.weight = geoopt.ManifoldParameter(self.manifold.random(8, 8), manifold=self.manifold)
        self.tied = self.inner.weight
        self.other = geoopt.ManifoldParameter(torch.ones(3), manifold=geoopt.Sphere())

    def forward(self, x):
        return self.inner(x) @ self.tied


def lose(network, how):
    if how == "assign":
        network.load_state_dict({k: v.clone() for k, v in network.state_dict().items()}, assign=True)
        return network
    values = {k: v.clone() for k, v in network.state_dict().items()}
    network = network.to("meta").to_empty(device="cpu")
    network.load_state_dict(values)
    return network


@pytest.mark.parametrize("how", ["assign", "to_empty"])
def test_lost_manifolds_are_named_and_restored(how):
    network = Network()
    plan = manifolds_of(network)
    assert plan.keys() == {"inner.weight", "tied", "other"}
    check_manifolds(network, plan)
    values = network.inner.weight.detach().clone()
    network = lose(network, how)
    optimizer = optim.RiemannianSGD(network.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"'inner.weight' is a plain Parameter, not on UnitaryLowRank") as caught:
        check_manifolds(network, plan, optimizer)
    for words in (
        "'tied', 'inner.weight' were one parameter",
        "'tied' is",
        "'other' is",
        "RiemannianSGD moves 'inner.weight' as Euclidean",
        "reattach_manifolds",
    ):
        assert words in str(caught.value)
    assert network.tied is not network.inner.weight
    network(torch.randn(4, 8)).square().sum().backward()
    grad = network.inner.weight.grad + network.tied.grad
    reattach_manifolds(network, plan, optimizer)
    check_manifolds(network, plan, optimizer)
    assert network.inner.weight.manifold is plan["inner.weight"]
    assert isinstance(network.other.manifold, geoopt.Sphere)
    assert network.tied is network.inner.weight
    assert torch.equal(network.inner.weight, values)
    assert torch.equal(network.inner.weight.grad, grad)
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    assert unitarity_error(network.inner.weight) < 1e-5
    assert not torch.equal(network.inner.weight, values)


def test_an_optimizers_state_moves_with_the_parameter():
    network = Network()
    plan = manifolds_of(network)
    network = lose(network, "assign")
    optimizer = geoopt.optim.RiemannianSGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    buffer = optimizer.state[network.tied]["momentum_buffer"]
    reattach_manifolds(network, plan, optimizer)
    assert optimizer.state[network.inner.weight]["momentum_buffer"] is buffer


def test_an_optimizer_built_before_the_parameters_were_replaced_is_found():
    network = Network()
    plan = manifolds_of(network)
    before = optim.RiemannianSGD(network.parameters(), lr=0.1)
    check_manifolds(network, plan, before)
    network = lose(network, "assign")
    with pytest.raises(ValueError, match=r"no given optimiser holds .*'inner.weight'.*build it again"):
        reattach_manifolds(network, plan, before)
    assert type(network.inner.weight) is nn.Parameter
    reattach_manifolds(network, plan)
    check_manifolds(network, plan)
    with pytest.raises(ValueError, match=r"no given optimiser holds 'inner.weight'"):
        check_manifolds(network, plan, before)


def test_an_optimizer_that_knows_no_manifolds_is_found():
    network = Network()
    with pytest.raises(ValueError, match=r"Adam moves 'inner.weight' as Euclidean"):
        check_manifolds(network, manifolds_of(network), torch.optim.Adam(network.parameters()))


def test_adam_reads_the_state_of_steps_made_without_the_manifold(draw):
    network = Network()
    plan = manifolds_of(network)
    network = lose(network, "assign")
    optimizer = optim.RiemannianAdam(network.parameters(), lr=0.1)
    network(torch.randn(4, 8)).square().sum().backward()
    squares = network.tied.grad.square().sum().item()
    optimizer.step()
    optimizer.zero_grad()
    reattach_manifolds(network, plan, optimizer)
    network.inner.weight.grad = torch.zeros(8, 8)
    with pytest.warns(RuntimeWarning, match="starts off the manifold"):
        optimizer.step()
    assert optimizer.state[network.inner.weight]["exp_avg_sq"].item() == pytest.approx(0.999 * 0.001 * squares)


def test_what_cannot_be_mended_is_refused_and_nothing_changed():
    network = Network()
    plan = manifolds_of(network)
    network = lose(network, "assign")
    before = dict(network.named_parameters())
    network.tied = network.inner.weight = nn.Parameter(torch.zeros(3, 8))
    with pytest.raises(ValueError, match="square or tall"):
        reattach_manifolds(network, plan)
    assert network.other is before["other"]
    assert type(network.inner.weight) is nn.Parameter
    del network.inner
    with pytest.raises(ValueError, match=r"'inner.weight' is no longer a parameter of the model"):
        check_manifolds(network, plan)
    with pytest.raises(ValueError, match=r"no longer parameters of the model: 'inner.weight'"):
        reattach_manifolds(network, plan)
    network = Network()
    with pytest.raises(ValueError, match="'other' is on Sphere, not on UnitaryLowRank"):
        check_manifolds(network, Plan({"other": UnitaryLowRank()}))


def test_a_model_that_is_wrapped_is_averaged_too(draw):
    network = Network()
    averaged = AveragedModel(network)
    network.manifold.step_(network.inner.weight, draw.matrix(8, 8, dtype=torch.float32), 0.3)
    for _ in range(2):
        averaged.update_parameters(torch.nn.Sequential(network))
    assert torch.dist(averaged.module.inner.weight, network.inner.weight) < 1e-5
    assert averaged.module.inner.weight.manifold.draws() == network.manifold.draws()


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averages_stay_on_the_manifold(draw, kind):
    network = Network()
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9) if kind == "ema" else None
    averaged = AveragedModel(network, multi_avg_fn=average)
    assert averaged.module.inner.weight.manifold is not network.manifold
    expected = None
    for step in range(20):
        g = draw.matrix(8, 8, dtype=torch.float32)
        network.manifold.step_(network.inner.weight, g, 0.3)
        averaged.update_parameters(network)
        x = network.inner.weight.detach().double()
        share = 0.1 if kind == "ema" else 1 / (step + 1)
        mean = x if step == 0 else (1 - share) * expected + share * x
        u, _, vh = torch.linalg.svd(mean)
        expected = u @ vh
    assert torch.dist(averaged.module.inner.weight.double(), expected) < 1e-4
    assert unitarity_error(averaged.module.inner.weight) < 1e-6
    assert torch.linalg.vector_norm(averaged.module.other).item() == pytest.approx(1.0)
