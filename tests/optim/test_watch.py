"""An optimiser that knows no manifolds is named once, before its first step, and no other is."""

import sys
import warnings
from collections import OrderedDict

import geoopt
import pytest
import torch
from helpers import bound, error

from projunn_manifold import UnitaryLowRank, fold, layers, manifolds_of, optim, reattach_manifolds, unitarize

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


class Counting(torch.optim.SGD):
    """A class of one's own that is made of torch's."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)

    def __eq__(self, other):
        return True

    __hash__ = None


class Foreign(torch.optim.Optimizer):
    """A class of one's own that is made of nothing, Euclidean or (with ``projects``) on manifolds."""

    def __init__(self, params, lr, projects=False):
        super().__init__(params, {"lr": lr})
        self.projects = projects

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])
                if self.projects and isinstance(p, geoopt.ManifoldParameter):
                    p.copy_(p.manifold.projx(p))


def test_a_subclass_of_torchs_warns_like_torchs_own(draw):
    optimizer = Counting(layer(draw).parameters(), lr=0.1)
    with pytest.warns(RuntimeWarning, match=r"Counting moves .* \(8, 8\) on UnitaryLowRank .*constrain.*keepers"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            optimizer.step()


@pytest.mark.filterwarnings("error")
def test_a_class_that_is_registered_is_left_in_peace(draw):
    def keep(optimizer, p):
        return isinstance(optimizer, Counting)

    optim.keepers.append(keep)
    try:
        Counting(layer(draw).parameters(), lr=0.1).step()
    finally:
        optim.keepers.remove(keep)


def test_any_other_class_is_named_when_its_step_has_left_the_manifold(draw):
    optimizer = Foreign(layer(draw).parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    with pytest.warns(RuntimeWarning, match="Foreign moves .* as a Euclidean one"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            optimizer.step()


@pytest.mark.filterwarnings("error")
def test_any_other_class_that_keeps_to_manifolds_is_left_in_peace(draw):
    module = layer(draw)
    optimizer, before = Foreign(module.parameters(), lr=0.1, projects=True), module.weight.detach().clone()
    for _ in range(9):
        optimizer.step()
    assert not torch.equal(module.weight, before)


# -- optimisers that were built before a weight was made unitary ----------------------------------------------


def convolution():
    return torch.nn.Sequential(torch.nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"))


REPLACING = {
    "unitary_": (lambda: torch.nn.Linear(8, 8), layers.unitary_, "'Linear.weight'"),
    "plain_": (lambda: layers.UnitaryLinear(8, 8), layers.plain_, "'UnitaryLinear.weight'"),
    "unitarize": (lambda: torch.nn.Sequential(torch.nn.Linear(8, 8)), unitarize, "'0.weight'"),
    "of a wide one": (lambda: torch.nn.Sequential(torch.nn.Linear(8, 4)), unitarize, "'0.weight', '0.bias'"),
    "of a convolution": (convolution, lambda m: unitarize(m, inputs=torch.ones(1, 4, 6)), "'0.weight'"),
    "fold": (lambda: torch.nn.Sequential(layers.UnitaryLinear(8, 8)), fold, "'0.weight'"),
}


@pytest.mark.parametrize("kind", [torch.optim.Adam, optim.RiemannianSGD, geoopt.optim.RiemannianAdam])
@pytest.mark.parametrize("name", REPLACING)
def test_an_optimiser_that_holds_what_was_replaced_is_told_of_once(name, kind):
    make, replace, said = REPLACING[name]
    model = make()
    optimizer = kind(model.parameters(), lr=0.1)
    optimizer.step()
    replace(model)
    with pytest.warns(RuntimeWarning, match=f"{kind.__name__} was built before {said}.*build the optimiser after"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_an_optimiser_of_named_parameters_names_what_was_replaced_in_full():
    model = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    layers.unitary_(model[1])
    with pytest.warns(RuntimeWarning, match=r"SGD was built before '1.weight' got another parameter"):
        optimizer.step()


@pytest.mark.filterwarnings("error")
def test_an_optimiser_that_is_built_afterwards_is_left_in_peace(draw):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    other = optim.RiemannianSGD(model[1].parameters(), lr=0.1)
    layers.unitary_(model[0])
    optimizer = optim.RiemannianSGD(model.parameters(), lr=0.1)
    model(draw.matrix(3, 8, dtype=torch.float32)).sum().backward()
    optimizer.step(), other.step()


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


# -- names in messages --------------------------------------------------------------------------------------------

NAMING = {
    "the optimiser": lambda model: model.named_parameters(),
    "param_groups": lambda model: layers.param_groups(model, lr=0.1, unitary_lr=0.1),
    "unitarize": lambda model: model.parameters(),
    "the layer": lambda model: model.parameters(),
    "nobody": lambda model: model.parameters(),
}
STEPPING = {
    "geoopt": lambda params: geoopt.optim.RiemannianAdam(params, lr=0.1),
    "in place": lambda params: optim.RiemannianSGD(params, lr=0.1),
    "in place, momentum": lambda params: optim.RiemannianSGD(params, lr=0.1, momentum=0.9),
    "feedback": lambda params: optim.RiemannianSGD(params, lr=0.1, feedback=True),
    "constrained": lambda params: constrained(params),
}


def nested(naming):
    """Return a model with one unitary weight, and what messages call it."""
    if naming == "unitarize":
        model = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(8, 8))
        unitarize(model)
    elif naming == "nobody":
        model = torch.nn.Sequential(torch.nn.Tanh(), torch.nn.Linear(8, 8))
        manifold = UnitaryLowRank(k=1)
        model[1].weight = geoopt.ManifoldParameter(manifold.random(8, 8), manifold=manifold)
    else:
        model = torch.nn.Sequential(torch.nn.Tanh(), layers.UnitaryLinear(8, 8))
    return model, {"the layer": "'UnitaryLinear.weight'", "nobody": "a parameter"}.get(naming, "'1.weight'")


@pytest.mark.parametrize("name", STEPPING)
@pytest.mark.parametrize("naming", NAMING)
def test_messages_about_a_start_and_a_gradient_call_the_parameter_by_its_name(draw, naming, name):
    model, called = nested(naming)
    optimizer = STEPPING[name](NAMING[naming](model))
    weight = model[1].weight
    with torch.no_grad():
        weight.mul_(2)
    weight.grad = draw.matrix(8, 8, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match=rf"^{called} of shape \(8, 8\) starts off the manifold"):
        optimizer.step()
    with torch.no_grad():
        weight.proj_()
    weight.grad = torch.full((8, 8), torch.nan)
    owner = "" if naming == "nobody" else f" of {called}"
    with pytest.raises(ValueError, match=rf"^(gradient|move){owner} of shape \(8, 8\) has 64 non-finite"):
        optimizer.step()


@pytest.mark.parametrize("naming", NAMING)
def test_messages_about_steps_off_the_manifold_call_the_parameter_by_its_name(draw, naming):
    model, called = nested(naming)
    plain = torch.optim.SGD(NAMING[naming](model), lr=0.1)
    model[1].weight.grad = draw.matrix(8, 8, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match=rf"^SGD moves {called} of shape \(8, 8\) on UnitaryLowRank"):
        plain.step()
    with torch.no_grad():
        model[1].weight.proj_()
    keeping = optim.RiemannianSGD(NAMING[naming](model), lr=0.1)
    keeping.step()
    with torch.no_grad():
        model[1].weight.add_(0.01)
    with pytest.warns(RuntimeWarning, match=rf"^{called} of shape \(8, 8\) has left its manifold"):
        keeping.step()


def test_a_singular_move_is_refused_with_the_parameters_name(draw):
    model, called = nested("the optimiser")
    optimizer = torch.optim.SGD(model.named_parameters(), lr=1.0)
    optim.constrain(optimizer)
    x = model[1].weight.detach()
    model[1].weight.grad = x[:, :1] @ torch.eye(8)[:1]  # X less its first column
    with pytest.raises(ValueError, match=rf"^{called} of shape \(8, 8\): .* numerically singular"):
        optimizer.step()


def test_a_lost_weight_is_refused_under_its_full_name(draw):
    model = torch.nn.Sequential(torch.nn.Tanh(), layers.unitary_(torch.nn.Linear(8, 8)))
    model[1].weight = torch.nn.Parameter(model[1].weight.detach().as_subclass(torch.Tensor).clone())
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    model(draw.matrix(2, 8, dtype=torch.float32)).sum().backward()
    with pytest.raises(ValueError, match=r"manifold: '1.weight' of shape .8, 8.; call reattach"):
        optimizer.step()


def test_names_follow_their_parameters_when_ties_are_restored():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.manifold = UnitaryLowRank(k=1)
            self.first = geoopt.ManifoldParameter(self.manifold.random(8, 8), manifold=self.manifold)
            self.second, self.third = self.first, torch.nn.Parameter(torch.ones(3))

    model = Tied()
    plan = manifolds_of(model)
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    assert model.first is not model.second
    optimizer = optim.RiemannianSGD(model.named_parameters(), lr=0.1)
    reattach_manifolds(model, plan, optimizer)
    (group,) = optimizer.param_groups
    assert [name for name, _ in model.named_parameters()] == group["param_names"] == ["first", "third"]
    assert all(map(torch.equal, group["params"], model.parameters()))


# -- weights that were made unitary, and have lost their manifold -------------------------------------------------


def lost_by_assignment(module, optimizer):
    """Lose the manifold before the optimiser is built."""
    for name, p in list(module.named_parameters()):
        if isinstance(p, geoopt.ManifoldParameter):
            setattr(module, name, torch.nn.Parameter(p.detach().as_subclass(torch.Tensor).clone()))
    return optimizer(module.parameters())


def lost_by_swap(module, optimizer):
    """Lose the manifold of the very object that the optimiser holds."""
    held = optimizer(module.parameters())
    torch.utils.swap_tensors(
        module.weight, torch.nn.Parameter(module.weight.detach().as_subclass(torch.Tensor).clone())
    )
    return held


OPTIMIZERS = {
    "geoopt": lambda params: geoopt.optim.RiemannianSGD(params, lr=0.1),
    "in place": lambda params: optim.RiemannianAdam(params, lr=0.1),
    "torch": lambda params: torch.optim.SGD(params, lr=0.1),
    "LBFGS": lambda params: torch.optim.LBFGS(params),
}


def constrained(params):
    optimizer = torch.optim.SGD(params, lr=0.1)
    optim.constrain(optimizer)
    return optimizer


@pytest.mark.parametrize("make", [lambda: layers.unitary_(torch.nn.Linear(8, 8)), lambda: layers.UnitaryLinear(8, 8)])
@pytest.mark.parametrize("lose", [lost_by_assignment, lost_by_swap])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "constrained"])
def test_a_step_that_would_move_a_lost_weight_is_refused_and_moves_nothing(make, lose, name):
    module = make()
    optimizer = lose(module, OPTIMIZERS.get(name, constrained))
    before = [p.detach().clone() for p in module.parameters()]

    def closure():
        optimizer.zero_grad()
        loss = module(torch.ones(2, 8)).square().sum()
        loss.backward()
        return loss

    closure()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"manifold: '(Unitary)?Linear.weight' of shape .8, 8.; call reattach"):
            optimizer.step(*([closure] if name == "LBFGS" else []))
    assert all(map(torch.equal, module.parameters(), before))
    if name in ("geoopt", "in place", "constrained"):
        reattach_manifolds(module, manifolds_of(module), optimizer)
        optimizer.step()
        x = module.weight.detach().double()
        assert not torch.equal(module.weight, before[0])
        assert error(x.mT @ x, torch.eye(8)) <= bound(torch.float32)


def test_a_weight_that_is_lost_after_many_steps_is_noticed(draw):
    module = layers.unitary_(torch.nn.Linear(8, 8))
    optimizer = torch.optim.SGD([module.weight], lr=0.1)
    optim.constrain(optimizer)
    for _ in range(2):
        optimizer.step()  # without a gradient: no manifold has a weak reference to it yet, which a swap refuses
    lost_by_swap(module, lambda params: optimizer)
    module(draw.matrix(2, 8, dtype=torch.float32)).sum().backward()
    with pytest.raises(ValueError, match="lost its manifold"):
        optimizer.step()


@pytest.mark.parametrize("held_back", ["frozen", "not held", "replaced by another's"])
def test_a_lost_weight_that_does_not_move_is_left_in_peace(draw, held_back):
    module = layers.unitary_(torch.nn.Linear(8, 8))
    optimizer = lost_by_assignment(module, OPTIMIZERS["in place"])
    if held_back == "frozen":
        module.weight.requires_grad_(False)
    else:
        optimizer = OPTIMIZERS["in place"]([module.bias])
    if held_back == "replaced by another's":
        module.weight = torch.nn.Parameter(torch.eye(8))
    module(draw.matrix(2, 8, dtype=torch.float32)).sum().backward()
    before = module.bias.detach().clone()
    optimizer.step()
    assert not torch.equal(module.bias, before)


def test_modules_are_walked_through_once_for_an_optimiser(draw, monkeypatch):
    module = layers.unitary_(torch.nn.Linear(8, 8))
    optimizer = OPTIMIZERS["in place"](module.parameters())
    walks = []
    walk = torch.nn.Module.named_parameters
    monkeypatch.setattr(torch.nn.Module, "named_parameters", lambda *a, **k: walks.append(a) or walk(*a, **k))
    counts = []
    for _ in range(3):
        module(draw.matrix(2, 8, dtype=torch.float32)).sum().backward()
        optimizer.step()
        counts.append(len(walks))
    assert counts[0] > 0
    assert counts[1:] == counts[:1] * 2


# -- half precision -------------------------------------------------------------------------------------------


@pytest.fixture
def untold(monkeypatch):
    """No conversion has been told of yet."""
    monkeypatch.setattr("projunn_manifold.optim.plan._told_of_half", set())


HALVING = {
    "layer": (lambda: layers.UnitaryLinear(8, 8), "UnitaryLinear.weight"),
    "unitary_": (lambda: layers.unitary_(torch.nn.Linear(8, 8)), "Linear.weight"),
}


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.to(torch.bfloat16)], ids=["half", "bfloat16"])
@pytest.mark.parametrize("name", [*OPTIMIZERS, "constrained"])
@pytest.mark.parametrize("make", HALVING)
def test_half_precision_is_for_inference_which_is_said_once_and_a_step_is_refused(untold, make, convert, name):
    model, said = HALVING[make]
    model = torch.nn.Sequential(model(), model())
    with pytest.warns(RuntimeWarning, match=r"unitary weights become torch.b?float16.*autocast") as told:
        convert(model)
    assert len(told) == 1
    optimizer = OPTIMIZERS.get(name, constrained)(model.parameters())

    def closure():
        loss = model(torch.ones(2, 8, dtype=model[0].weight.dtype)).sum()
        loss.backward()
        return loss

    closure()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(TypeError, match=rf"`{said}` must be float32.*float16; keep the parameter .*autocast"):
        optimizer.step(*([closure] if name == "LBFGS" else []))
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.filterwarnings("error")
def test_other_conversions_and_those_that_leave_complex_weights_alone_are_no_matter(untold):
    network = layers.UnitaryRNN(3, 8, dtype=torch.complex64)
    network.half()
    assert network.weight_hh_l0.dtype is torch.complex64
    layers.UnitaryLinear(8, 8).double().float().to("cpu")
    layers.plain_(layers.UnitaryLinear(8, 8)).half()


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
