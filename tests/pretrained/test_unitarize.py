"""Trained models made unitary and back: what changes, what stays, and what is refused without a trace."""

import copy

import geoopt
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from projunn_manifold import (
    UnitaryLowRank,
    UnitaryLowRankExact,
    check_manifolds,
    fold,
    manifolds_of,
    nearest_unitary,
    optim,
    unitarize,
)
from projunn_manifold.layers import UnitaryLinear, UnitaryRNN, plain_, unitary_


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Recurrent(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.rnn = nn.RNN(3, 12, nonlinearity="relu", **options)
        self.readout = nn.Linear(12, 4)

    def forward(self, x):
        return self.readout(self.rnn(x)[0][-1])


class Stepwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.RNNCell(3, 12)

    def forward(self, x):
        h = x.new_zeros(x.shape[1], 12)
        for row in x:
            h = self.cell(row, h)
        return h


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 3))


def cnn(**options):
    circular = {"padding": "same", "padding_mode": "circular", **options}
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, **circular),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, bias=False, groups=2, **circular),
        nn.Flatten(),
        nn.Linear(6 * 25, 3),
    )


CASES = [(mlp, (5, 6)), (cnn, (5, 2, 5, 5)), (Recurrent, (7, 5, 3)), (Stepwise, (7, 5, 3))]
IDS = ["mlp", "cnn", "rnn", "cell"]


def of(shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("make", "shape"), CASES, ids=IDS)
def test_a_model_becomes_unitary_learns_and_folds_back(make, shape):
    model, x = make(), of(shape)
    before = weights(model)
    report = unitarize(model, inputs=x, k=2)
    assert all(c.after.sub(1).abs().max() < 1e-5 for c in report)
    assert len(manifolds_of(model)) >= len(report)
    for converted in report:
        w = before[converted.name]
        if w.dim() == 2:
            s = torch.linalg.svdvals(w)
            torch.testing.assert_close(converted.before, s)
            distance = ((s - 1).square().sum() / s.square().sum()).sqrt().item()
            assert converted.distance == pytest.approx(distance, rel=1e-5)
            assert converted.name in str(report)
    optimizer = optim.RiemannianSGD(model.parameters(), lr=1e-2)
    check_manifolds(model, manifolds_of(model), optimizer)
    first = None
    for _ in range(20):
        optimizer.zero_grad()
        model.eval()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < first
    expected = model(x)
    names = set(before)
    folded = fold(model)
    assert set(weights(folded)) == names
    assert not any(isinstance(p, geoopt.ManifoldParameter) for p in folded.parameters())
    assert not any(isinstance(m, UnitaryLowRank) for m in folded.modules())
    torch.testing.assert_close(folded(x), expected, atol=1e-5, rtol=1e-5)
    fresh = make()
    if make is not cnn:  # kernels are larger now
        fresh.load_state_dict(folded.state_dict())
        torch.testing.assert_close(fresh.eval()(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("make", "shape"), CASES, ids=IDS)
def test_what_is_unitary_already_stays_as_it_is(make, shape):
    model, x = make().double().eval(), of(shape, torch.float64)
    unitarize(model, inputs=x)
    folded = copy.deepcopy(fold(model))
    report = unitarize(model, inputs=x)
    assert all(c.distance < 1e-10 for c in report)
    torch.testing.assert_close(model(x), folded(x))


@pytest.mark.parametrize("manifold", [UnitaryLowRank, UnitaryLowRankExact])
def test_only_what_is_selected_is_converted(manifold):
    model = mlp()
    report = unitarize(model, lambda name: name == "2.weight", manifold=manifold, k=3)
    assert [c.name for c in report] == ["2.weight"]
    assert type(model[2].weight.manifold) is manifold
    assert model[2].weight.manifold.k == 3
    assert type(model[0].weight) is nn.Parameter
    assert [c.name for c in unitarize(model, "4.*")] == ["4.weight"]
    assert isinstance(model[4], UnitaryLinear)
    with pytest.raises(ValueError, match=r"'9.weight' selects no weight that can become unitary; there are 0.weight"):
        unitarize(model, ["9.weight"])


@pytest.mark.parametrize(("make", "shape"), CASES[:1] + CASES[2:], ids=IDS[:1] + IDS[2:])
def test_a_weight_that_sees_its_inputs_changes_what_comes_out_less(make, shape):
    shape = (200, *shape[1:]) if make is mlp else (shape[0], 50, *shape[2:])
    x = of(shape) * torch.linspace(0.1, 4, shape[-1])
    name = {mlp: "2.weight", Recurrent: "rnn.weight_hh_l0", Stepwise: "cell.weight_hh"}[make]
    plain = make().eval()
    seen = _applied(plain, x)
    old = weights(plain)[name]
    moved = {}
    for method in ("polar", "procrustes", "lie"):
        model = copy.deepcopy(plain)
        unitarize(model, [name], method=method, inputs=x, rotation=method == "polar")
        moved[method] = (seen @ (weights(model)[name] - old).mT).norm().item()
    assert moved["procrustes"] < 0.99 * moved["polar"]
    assert moved["procrustes"] <= moved["lie"] * (1 + 1e-5)


def _applied(model, x):
    """What the weight is applied to, by hand."""
    with torch.no_grad():
        if isinstance(model, Recurrent):
            return model.rnn(x)[0][:-1].flatten(0, 1)
        if isinstance(model, Stepwise):
            h, seen = x.new_zeros(x.shape[1], 12), []
            for row in x:
                seen.append(h)
                h = model.cell(row, h)
            return torch.cat(seen)
        return model[1](model[0](x))


def test_convolutions_see_images():
    model, x = cnn(), of((60, 2, 5, 5)) * torch.tensor([0.2, 3.0]).view(2, 1, 1)
    plain = copy.deepcopy(model)
    error = {}
    for method in ("polar", "procrustes"):
        model = copy.deepcopy(plain)
        (report,) = unitarize(model, ["0.weight"], method=method, inputs=x)
        assert report.before.numel() == report.after.numel() == 2 * 25
        error[method] = (model[0](x) - plain[0](x)).norm().item()
    assert error["procrustes"] < error["polar"]


def test_modes_flags_and_dtypes_are_kept():
    model = cnn().double()
    model[0].weight.requires_grad_(False)
    model[2].eval()
    unitarize(model, inputs=(of((2, 2, 5, 5), torch.float64),))
    assert [m.training for m in model] == [True, True, False, True, True]
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
    assert model[2].bias is None
    assert model[2].groups == 2
    assert model[0].weight_real.dtype == torch.float64
    fold(model)
    assert [m.training for m in model] == [True, True, False, True, True]
    assert [p.requires_grad for p in model[0].parameters()] == [False, True]


def test_complex_models():
    model = nn.Sequential(*(nn.Linear(i, o, dtype=torch.complex128) for i, o in ((4, 8), (8, 8), (8, 2))))
    x = of((3, 4), torch.complex128)
    unitarize(model)
    y = model(x)
    torch.testing.assert_close(fold(model)(x), y)


def test_a_module_used_twice_is_converted_once():
    shared = nn.Linear(6, 3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    unitarize(model)
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], UnitaryLinear)
    fold(model)
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is nn.Linear


class Sizes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding="same", padding_mode="circular")

    def forward(self, x):
        return self.conv(self.conv(x)[..., ::2])


def refused():
    tied = mlp()
    tied[2].weight = nn.Parameter(torch.randn(16, 16))
    tied.append(nn.Linear(16, 16))
    tied[5].weight = tied[2].weight
    hooked = mlp()
    hooked[4].register_forward_hook(lambda *_: None)
    deficient = mlp()
    nn.init.zeros_(deficient[2].weight)
    zeros = cnn(padding_mode="zeros")
    x = of((5, 2, 5, 5))
    inside = Recurrent(num_layers=2)
    inside.rnn.weight_hh_l1 = inside.rnn.weight_hh_l0
    weighed = mlp()
    weighed[2].weight.register_hook(lambda g: g * 0)
    pulled = mlp()
    pulled[4].register_full_backward_pre_hook(lambda *_: None)
    return [
        (inside, {}, "shared by 2"),
        (weighed, {}, "has hooks"),
        (pulled, {}, "hooks, which would be lost"),
        (Sizes(), {"inputs": x}, "more than one size"),
        (tied, {}, "shared by 2 modules"),
        (hooked, {}, "hooks, which would be lost"),
        (deficient, {}, "rank deficient"),
        (nn.Linear(4, 2), {}, "the model itself"),
        (cnn(), {}, "inputs are not given"),
        (zeros, {"inputs": x}, "expected circular padding"),
        (mlp(), {"method": "procrustes"}, "needs inputs"),
        (Recurrent(num_layers=2), {"method": "procrustes", "inputs": of((7, 5, 3))}, "in a way that can be seen"),
        (mlp(), {"method": "svd"}, "method must be"),
    ]


@pytest.mark.parametrize("case", range(13))
def test_what_cannot_be_is_refused_and_the_model_stays_as_it_was(case):
    model, options, message = refused()[case]
    before, modules = weights(model), [type(m) for m in model.modules()]
    with pytest.raises((ValueError, TypeError), match=message):
        unitarize(model, **options)
    assert [type(m) for m in model.modules()] == modules
    after = weights(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(m.training for m in model.modules())


def test_our_own_recurrent_layers_are_not_folded():
    with pytest.raises(ValueError, match="0 is a UnitaryRNN, of which torch has none alike"):
        fold(nn.Sequential(UnitaryRNN(3, 8)))


def test_plain_undoes_unitary():
    layer = nn.RNN(3, 8)
    before = set(layer.state_dict())
    unitary_(layer, "weight_hh_l0")
    weight = layer.weight_hh_l0.detach().clone()
    plain_(layer, "weight_hh_l0")
    assert type(layer.weight_hh_l0) is nn.Parameter
    assert torch.equal(layer.weight_hh_l0, weight)
    assert set(layer.state_dict()) == before
    assert not layer._forward_pre_hooks
    layer(torch.randn(4, 3))
    layer.load_state_dict(layer.state_dict(), assign=True)
    with pytest.raises(TypeError, match="must be on a manifold"):
        plain_(layer, "weight_hh_l0")


def test_names_are_those_of_the_parameters():
    model = nn.Sequential(mlp(), cnn(), Recurrent(num_layers=2))
    names = [converted.name for converted in unitarize(model, lambda name: not name.startswith("1."))]
    assert set(names) <= set(dict(model.named_parameters()))
    assert "2.rnn.weight_hh_l1" in names


@pytest.mark.parametrize("make", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrised_weights_are_left_alone(make):
    model = mlp()
    make(model[2])
    assert [c.name for c in unitarize(model)] == ["0.weight", "4.weight"]
    with pytest.raises(ValueError, match="selects no weight"):
        unitarize(model, ["2.weight"])


def test_pruned_weights_are_left_alone():
    model = mlp()
    prune.l1_unstructured(model[2], "weight", 0.5)
    assert [c.name for c in unitarize(model)] == ["0.weight", "4.weight"]


class OwnLoop(nn.Module):
    """A network of torch's stepped by hand, from a first state that is not zero."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(3, 12)
        self.seen = []

    def forward(self, x):
        h = torch.ones(1, x.shape[1], 12)
        self.seen = []
        for row in x:
            self.seen.append(h[0])
            _, h = self.rnn(row[None], h)
        return h


def test_a_recurrent_network_stepped_by_hand_is_seen_right():
    model, x = OwnLoop(), of((9, 20, 3))
    model(x)
    rows, old = torch.cat(model.seen).detach(), model.rnn.weight_hh_l0.detach().clone()
    expected = nearest_unitary(old, "procrustes", inputs=rows).unitary
    unitarize(model, method="procrustes", inputs=x)
    torch.testing.assert_close(model.rnn.weight_hh_l0.detach().as_subclass(torch.Tensor), expected)


def test_inputs_by_name_are_seen():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return self.linear(input=x)

    model, inputs = Named(), of((20, 6))
    expected = nearest_unitary(model.linear.weight, "procrustes", inputs=inputs).unitary
    unitarize(model, method="procrustes", inputs=inputs)
    assert torch.allclose(model.linear.weight, expected, atol=1e-6)


def test_what_fold_would_lose_is_refused():
    model = mlp()
    unitarize(model)
    model[4].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        fold(model)
    assert isinstance(model[4], UnitaryLinear)
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    unitarize(tied)
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="shared by 2"):
        fold(tied)
