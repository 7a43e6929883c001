"""An optimiser that knows no manifolds is named once, before its first step, and no other is."""

import sys
import warnings
from collections import OrderedDict

import geoopt
import pytest
import torch

from projunn_manifold import UnitaryLowRank, layers, optim

KNOWING = {
    "geoopt": lambda params: geoopt.optim.RiemannianAdam(params, lr=0.1),
    "in place": lambda params: optim.RiemannianSGD(params, lr=0.1),
}


def layer(draw):
    module = layers.UnitaryLinear(8, 8)
    module(draw.matrix(4, 8, dtype=torch.float32)).square().sum().backward()
    return module


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_plain_optimiser_is_named_once(draw, kind):
    module = layer(draw)
    optimizer = kind(module.parameters(), lr=0.1)
    with pytest.warns(RuntimeWarning, match=rf"{kind.__name__} moves .* \(8, 8\) on UnitaryLowRank .*constrain"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_closure_may_make_the_gradients(draw):
    module = layer(draw)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.zero_grad()

    def closure():
        loss = module(torch.ones(2, 8)).square().sum()
        loss.backward()
        return loss

    with pytest.warns(RuntimeWarning, match="SGD moves"):
        optimizer.step(closure)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [*KNOWING, "constrained", "no gradient", "no manifold"])
def test_others_are_left_in_peace(draw, name):
    module = layer(draw)
    parameters = list(torch.nn.Linear(8, 8).parameters()) if name == "no manifold" else list(module.parameters())
    optimizer = KNOWING.get(name, lambda params: torch.optim.SGD(params, lr=0.1))(parameters)
    if name == "constrained":
        optim.constrain(optimizer)
    if name == "no gradient":
        module.zero_grad()
    optimizer.step()


@pytest.mark.parametrize("held_back", ["no gradient", "constrained"])
def test_a_parameter_that_was_held_back_is_named_later(draw, held_back):
    module = layer(draw)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    gradient = module.weight.grad
    if held_back == "constrained":
        handle = optim.constrain(optimizer)
        optimizer.step()
        handle.remove()
    else:
        module.zero_grad()
        optimizer.step()
        module.weight.grad = gradient
    with pytest.warns(RuntimeWarning, match="SGD moves"):
        optimizer.step()


def test_the_line_that_is_named_is_the_callers(draw):
    optimizer = torch.optim.SGD(layer(draw).parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(RuntimeWarning, match="SGD moves") as caught:
        optimizer.step()
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_optimisers_of_ones_own_are_left_in_peace(draw):
    class Own(torch.optim.SGD):
        def __eq__(self, other):
            return True

        __hash__ = None

    Own(layer(draw).parameters(), lr=0.1).step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_a_step_of_plain_parameters_compiles_as_without_the_hook(monkeypatch):
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    counts, steps = [], []
    for watched in (True, False):
        if not watched:
            monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_global_optimizer_pre_hooks", OrderedDict())
        torch.compiler.reset()
        graphs.clear()
        module = torch.nn.Linear(8, 8)
        module(torch.ones(2, 8)).sum().backward()
        optimizer, before = torch.optim.SGD(module.parameters(), lr=0.1), module.bias.detach().clone()
        torch.compile(optimizer.step, backend=backend)()
        counts.append(len(graphs))
        steps.append(module.bias.detach() - before)
    assert counts[0] == counts[1] > 0
    assert torch.allclose(*steps)


def test_a_point_that_starts_far_off_is_named_once(draw):
    manifold = UnitaryLowRank(k=1)
    for start, said in ((2 * draw.point(8, 8, dtype=torch.float32), True), (manifold.random(8, 8), False)):
        p = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
        p.grad = draw.matrix(8, 8, dtype=torch.float32)
        for expected in (said, False):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                manifold.step_(p, p.grad, 0.01)
            assert any("starts off the manifold" in str(warning.message) for warning in caught) is expected


# -- weight decay of geoopt's optimisers --------------------------------------------------------------------


def turned(step, direction):
    """Cosine between a step that was made and one without weight decay."""
    return ((step * direction).sum() / (step.norm() * direction.norm())).item()


def decayed_step(draw, prepare=lambda manifold: manifold, run=lambda optimizer: optimizer.step(), before=None):
    """Cosine between the steps of geoopt's SGD with a large weight decay and without, for a gradient of rank 2."""
    x, (a, b) = draw.point(64, 64, dtype=torch.float64), draw.factors((64, 64), 2, torch.float64)
    steps = []
    for decay in (0.0, 10.0):
        p = geoopt.ManifoldParameter(x.clone(), manifold=prepare(UnitaryLowRank(2)))
        optimizer = geoopt.optim.RiemannianSGD([p], lr=1e-3, weight_decay=decay)
        if before is not None:
            optimizer = before(p, optimizer)
        p.grad = a @ b.mH
        run(optimizer)
        steps.append(p.detach() - x)
    return turned(*steps)


def test_the_decay_of_geoopts_optimisers_is_known(draw):
    assert decayed_step(draw) > 0.999
    assert decayed_step(draw, lambda manifold: geoopt.Scaled(manifold, 2.0)) > 0.999


def test_it_is_known_to_compiled_steps(draw):
    torch.compiler.reset()
    assert decayed_step(draw, run=lambda optimizer: torch.compile(optimizer.step, backend="eager")()) > 0.999


def test_it_is_known_to_every_part_of_a_product(draw):
    x, (a, b) = draw.point(48, 48, dtype=torch.float64), draw.factors((48, 48), 2, torch.float64)
    steps = []
    for decay in (0.0, 10.0):
        manifold = geoopt.ProductManifold((UnitaryLowRank(2), (48, 48)), (UnitaryLowRank(2), (48, 48)))
        p = geoopt.ManifoldParameter(torch.cat((x.flatten(), x.flatten())), manifold=manifold)
        p.grad = torch.cat(((a @ b.mH).flatten(),) * 2)
        geoopt.optim.RiemannianSGD([p], lr=1e-3, weight_decay=decay).step()
        steps.append(p.detach().view(2, 48, 48) - x)
    for without, with_decay in zip(*steps, strict=True):
        assert turned(without, with_decay) > 0.999


def test_it_is_forgotten_after_a_step_that_was_refused(draw):
    def refused(p, optimizer):
        p.grad = torch.full_like(p, torch.nan).detach()
        with pytest.raises(ValueError, match="non-finite"):
            optimizer.step()
        return geoopt.optim.RiemannianSGD([p], lr=1e-3)

    assert decayed_step(draw, before=refused) > 0.999
