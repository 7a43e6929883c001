"""Trained models made unitary and back: what changes, what stays, and what is refused without a trace."""

import copy

import geoopt
import pytest
import scipy.linalg
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
from projunn_manifold.layers import UnitaryLinear, UnitaryRNN, UnitaryRNNCell, plain_, unitary_


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
    singular = mlp()
    singular[2].weight.data = torch.randn(16, 15) @ torch.randn(15, 16)
    rows = of((50, 6))
    zeros = cnn(padding_mode="zeros")
    uneven = nn.Sequential(nn.Conv2d(2, 2, 3, stride=2, padding=1, padding_mode="circular"))
    mixed = mlp()
    mixed[4].half()
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
        (pulled, {}, "hooks .*which would be lost"),
        (Sizes(), {"inputs": x}, "more than one size"),
        (tied, {}, "shared by 2 modules"),
        (hooked, {}, "hooks .*which would be lost"),
        (deficient, {}, "rank deficient"),
        (nn.Linear(4, 2), {}, "the model itself"),
        (cnn(), {}, "inputs are not given"),
        (zeros, {"inputs": x, "select": ["0.weight"]}, "'0.weight' cannot become unitary: expected circular padding"),
        (uneven, {"inputs": x, "select": ["0.weight"]}, "a stride that divides the size"),
        (mlp().bfloat16(), {}, "`0.weight` must be .* got torch.bfloat16; keep the parameter in float32"),
        (mixed, {}, "`4.weight` must be .* got torch.float16; keep the parameter in float32"),
        (nn.Sequential(nn.LSTM(3, 3)), {"select": "0.weight_hh_l0"}, "stack of gates"),
        (nn.Sequential(nn.Linear(3, 3)), {"select": "0.bias"}, "at least 2 dimensions"),
        (nn.Sequential(nn.Embedding(3, 5)), {"select": "0.weight"}, "square or tall"),
        (singular, {}, r"2.weight: `weight` of shape \(16, 16\) is rank deficient in torch.float32"),
        (singular, {"method": "lie"}, r"2.weight: `weight` of shape \(16, 16\) is rank deficient in torch.float32"),
        (singular, {"method": "procrustes", "inputs": rows, "select": "2.*"}, "rank deficient in torch.float32"),
        (mlp(), {"method": "procrustes"}, "needs inputs"),
        (Recurrent(num_layers=2), {"method": "procrustes", "inputs": of((7, 5, 3))}, "in a way that can be seen"),
        (mlp(), {"method": "svd"}, "method must be"),
    ]


@pytest.mark.parametrize("case", range(22))
def test_what_cannot_be_is_refused_and_the_model_stays_as_it_was(case):
    model, options, message = refused()[case]
    before, modules = weights(model), [type(m) for m in model.modules()]
    with pytest.raises((ValueError, TypeError), match=message):
        unitarize(model, **options)
    assert [type(m) for m in model.modules()] == modules
    after = weights(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
def test_our_own_recurrent_layers_become_torchs(nonlinearity):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = UnitaryRNN(3, 8, 2, nonlinearity=nonlinearity, batch_first=True)
            self.cell = UnitaryRNNCell(8, 8, nonlinearity=nonlinearity, bias=False)

        def forward(self, x):
            return self.cell(self.rnn(x)[0][:, -1])

    model, x = Both(), of((5, 7, 3))
    expected, weights_hh = model(x), model.rnn.weight_hh_l1.detach().clone()
    fold(model)
    assert type(model.rnn) is nn.RNN
    assert type(model.cell) is nn.RNNCell
    assert torch.equal(model.rnn.weight_hh_l1, weights_hh)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)
    assert type(fold(UnitaryRNN(3, 8, nonlinearity=nonlinearity))) is nn.RNN
    assert [c.distance < 1e-5 for c in unitarize(model)] == [True] * 3


def test_what_has_no_counterpart_in_torch_is_named_all_at_once():
    model = nn.ModuleDict(
        {"rnn": UnitaryRNN(3, 8), "cell": UnitaryRNNCell(3, 8, nonlinearity=torch.sin), "linear": UnitaryLinear(3, 8)}
    )
    parts = list(model.modules())
    with pytest.raises(ValueError, match=r"rnn \(UnitaryRNN\): .*'modrelu'; cell \(UnitaryRNNCell\): .*nonlinearity"):
        fold(model)
    assert list(model.modules()) == parts


# -- what is left alone ------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """A weight of every kind."""

    def __init__(self):
        super().__init__()
        circular = {"padding": 1, "padding_mode": "circular"}
        self.zero_padded = nn.Conv2d(3, 8, 3, padding=1)
        self.unpadded = nn.Conv2d(3, 8, 3)
        self.dilated = nn.Conv2d(3, 8, 3, dilation=2, **circular)
        self.transposed = nn.ConvTranspose2d(3, 8, 3)
        self.pointwise = nn.Conv1d(4, 4, 1)
        self.strided = nn.Conv1d(4, 16, 4, stride=2, groups=2, **circular)
        self.misfit = nn.Conv1d(4, 4, 5, stride=3, padding=2, padding_mode="circular")
        self.lstm = nn.LSTM(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.embedding = nn.Embedding(9, 4)
        self.rotation = nn.Parameter(torch.randn(3, 4, 4))
        self.own = UnitaryLinear(4, 4)
        self.blocks = nn.ModuleList([nn.ModuleDict({"deep": nn.Linear(4, 4)})])
        self.pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.lazy = nn.LazyLinear(4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.pointwise(x), self.strided(x), self.misfit(x)


REASONS = {
    "zero_padded.weight": "circular padding",
    "unpadded.weight": "keeps the size",
    "dilated.weight": "no dilation",
    "transposed.weight": "kernel",
    "misfit.weight": "divides the size",
    "lstm.weight_ih_l0": "stack of gates",
    "lstm.weight_hh_l0": "stack of gates",
    "attention.in_proj_weight": "three weights",
    "attention.out_proj.weight": "only by its full name",
    "embedding.weight": "only by its full name",
    "rotation": "only by its full name",
    "own.weight": "on a manifold already",
    "pruned.weight_orig": "pruning",
    "normed.parametrizations.weight.original0": "parametrisation",
    "normed.parametrizations.weight.original1": "parametrisation",
    "lazy.weight": "no shape yet",
    "lazy.bias": "no shape yet",
}


def test_what_is_left_alone_is_named_with_the_reason():
    model = Mixed()
    report = unitarize(model, inputs=of((2, 4, 8)))
    assert {c.name for c in report} == {"pointwise.weight", "strided.weight", "blocks.0.deep.weight"}
    assert dict(report.left_alone).keys() == REASONS.keys()
    for name, reason in report.left_alone:
        assert REASONS[name] in reason
        assert f"{name} left alone: {reason}" in str(report)
    assert all(c.after.sub(1).abs().max() < 1e-5 for c in report)
    operator = model.strided(torch.eye(32).view(32, 4, 8)).flatten(1) - model.strided(torch.zeros(4, 8)).flatten()
    torch.testing.assert_close(operator @ operator.mT, torch.eye(32), atol=1e-5, rtol=0)
    assert model.strided.groups == model.strided.stride == 2


def test_a_model_whose_convolutions_are_zero_padded_needs_no_inputs():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 128))
    report = unitarize(model)
    assert [c.name for c in report] == ["2.weight"]
    assert [name for name, _ in report.left_alone] == ["0.weight"]


def test_full_names_take_what_unitary_takes():
    model = Mixed()
    before = model.rotation.detach().clone()
    names = ["rotation", "embedding.weight", "attention.out_proj.weight"]
    report = unitarize(model, names, k=2)
    assert {c.name for c in report} == set(names)
    for u, w in zip(model.rotation.detach(), before, strict=True):
        torch.testing.assert_close(u, torch.from_numpy(scipy.linalg.polar(w.numpy())[0]), atol=1e-5, rtol=0)
    (stack,) = (c for c in report if c.name == "rotation")
    expected = torch.linalg.svdvals(before).flatten().sort(descending=True).values
    torch.testing.assert_close(stack.before, expected)
    torch.testing.assert_close(stack.after, torch.ones(12))
    assert stack.distance == pytest.approx((expected - 1).norm().item() / expected.norm().item(), rel=1e-5)
    fold(model)
    assert type(model.rotation) is nn.Parameter


def test_unselected_weights_are_named_too():
    report = unitarize(mlp(), ["2.*"])
    assert report.left_alone == [("0.weight", "not selected"), ("4.weight", "not selected")]


def test_half_precision_elsewhere_does_not_matter():
    model = mlp()
    model[0].half()
    with pytest.raises(ValueError, match=r"'9.*' selects no weight .*; there are 0.weight, 2.weight"):
        unitarize(model, "9.*")
    assert [c.name for c in unitarize(model, ["2.weight", "4.weight"])] == ["2.weight", "4.weight"]


def test_unknown_arguments_are_refused():
    for call in (unitarize, lambda m, **o: nearest_unitary(m[2].weight, **o)):
        with pytest.raises(TypeError, match="unexpected arguments tol: there are inputs, rotation"):
            call(mlp(), tol=1)


def test_a_manifold_in_the_place_of_its_class_is_refused():
    model = mlp()
    with pytest.raises(TypeError, match=r"`manifold` must be a class, such as UnitaryLowRank, .* got UnitaryLowRank"):
        unitarize(model, manifold=UnitaryLowRank(2))
    assert not manifolds_of(model)


@pytest.mark.parametrize(("make", "shape"), CASES[:3], ids=IDS[:3])
@pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights")  # torch's own, of any torch.nn.RNN
def test_a_unitarized_model_is_exported_and_copied_and_runs_with_other_weights(make, shape):
    model, x = make().eval(), of(shape)
    unitarize(model, inputs=x)
    expected = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    plain = {name: p.detach().as_subclass(torch.Tensor).clone() for name, p in model.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(model, plain, (x,)), expected)
    other = {name: torch.zeros_like(p) for name, p in plain.items()}
    torch.testing.assert_close(torch.func.functional_call(model, other, (x,)), torch.zeros_like(expected))


# -- the meta device ---------------------------------------------------------------------------------------


def test_on_the_meta_device_weights_are_drawn_when_they_are_materialised():
    with torch.device("meta"):
        model = cnn().append(nn.Linear(3, 3))
    report = unitarize(model, inputs=torch.empty(5, 2, 5, 5, device="meta"))
    assert [c.name for c in report] == ["0.weight", "2.weight", "4.weight", "5.weight"]
    assert "not drawn yet" in str(report)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    check_manifolds(model, manifolds_of(model))
    assert len(manifolds_of(model)) == 6
    for weight in map(model.get_parameter, manifolds_of(model)):
        eye = torch.eye(weight.shape[-1], dtype=weight.dtype).expand(*weight.shape[:-2], -1, -1)
        torch.testing.assert_close(weight.detach().mH @ weight.detach(), eye, atol=1e-5, rtol=0)
    optimizer = optim.RiemannianSGD(model.parameters(), lr=0.1)
    model(of((5, 2, 5, 5))).square().sum().backward()
    optimizer.step()
    with torch.device("meta"), pytest.raises(ValueError, match="needs values"):
        unitarize(mlp(), method="lie")


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
    report = unitarize(model)
    assert [c.name for c in report] == ["0.weight", "4.weight"]
    assert all(name.startswith("2.parametrizations.weight") for name, _ in report.left_alone)
    with pytest.raises(ValueError, match="selects no weight"):
        unitarize(model, ["2.weight"])


def test_pruned_weights_are_left_alone():
    model = mlp()
    prune.l1_unstructured(model[2], "weight", 0.5)
    report = unitarize(model)
    assert [c.name for c in report] == ["0.weight", "4.weight"]
    assert [name for name, _ in report.left_alone] == ["2.weight_orig"]


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
