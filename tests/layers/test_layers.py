"""Layers: torch.nn's conventions, weights that stay unitary, manifolds that are not lost."""

import copy
import pickle

import geoopt
import pytest
import torch
from helpers import bound, error
from torch import nn

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, manifolds_of, optim
from projunn_manifold.layers import (
    ExpConv2d,
    ModReLU,
    OrthogonalConv2d,
    UnitaryConv1d,
    UnitaryConvRNN,
    UnitaryLinear,
    UnitaryRNN,
    UnitaryRNNCell,
    param_groups,
    unitary_,
)
from projunn_manifold.linalg.dense import unitarity_error
from projunn_manifold.sketching.factored_tensor import FactoredTensor


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize(
    "nonlinearity", ["modrelu", "none", torch.sin, nn.Hardtanh()], ids=["modrelu", "none", "sin", "Hardtanh"]
)
def test_a_network_runs_its_cell_step_by_step(draw, dtype, nonlinearity):
    if dtype.is_complex and isinstance(nonlinearity, nn.Module):
        nonlinearity = torch.tanh
    network = UnitaryRNN(3, 8, nonlinearity=nonlinearity, dtype=dtype)
    cell = UnitaryRNNCell(3, 8, nonlinearity=nonlinearity, dtype=dtype)
    for name, p in cell.named_parameters():
        stem, _, rest = name.partition(".")
        source = getattr(network, f"{stem}_l0")
        p.data.copy_(source if not rest else getattr(source, rest))
    x = draw.matrix(5, 2, 3, dtype=torch.float64)  # real input for the complex network, too
    states, last = network(x)
    h = None
    for t in range(5):
        h = cell(x[t], h)
        assert error(states[t], h) <= bound(dtype)
    assert error(last[0], h) <= bound(dtype)
    assert error(cell(x[0, 0])[None], cell(x[0])[:1]) <= bound(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("variant", [UnitaryLowRank, UnitaryLowRankExact])
@pytest.mark.parametrize("build", [optim.RiemannianSGD, geoopt.optim.RiemannianSGD, optim.RiemannianAdam])
def test_training_lowers_the_loss_on_the_manifold(draw, dtype, variant, build):
    torch.manual_seed(0)
    network = UnitaryRNN(2, 24, num_layers=2, manifold=variant(1), dtype=dtype)
    head = UnitaryLinear(24, 3, dtype=dtype, k=1)
    model = nn.ModuleList([network, head])
    optimizer = build(param_groups(model, lr=0.01, unitary_lr=0.01), lr=0.01)
    x, y = draw.matrix(10, 16, 2, dtype=dtype), draw.matrix(16, 3, dtype=dtype)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (head(network(x)[0][-1]) - y).abs().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for weight in (network.weight_hh_l0, network.weight_hh_l1, head.weight):
        assert unitarity_error(weight) < 2e-6


@pytest.mark.parametrize(("inward", "outward"), [(5, 9), (9, 5), (7, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_unitary_linear_is_an_isometry_or_its_adjoint(draw, inward, outward, dtype):
    layer = UnitaryLinear(inward, outward, dtype=dtype)
    x = draw.matrix(6, inward, dtype=dtype)
    y = layer(x)
    if inward <= outward:
        assert torch.allclose(torch.linalg.vector_norm(y, dim=-1), torch.linalg.vector_norm(x, dim=-1))
    else:
        back = layer._matrix().mH @ y.mT
        assert torch.allclose(layer(back.mT), y)
    plain = layer.to_plain()
    assert type(plain) is nn.Linear
    assert torch.allclose(plain(x), y)


@pytest.mark.parametrize("how", ["assign", "to_empty", "deepcopy", "pickle", "double"])
def test_a_layer_keeps_its_manifolds(how):
    model = nn.Sequential(UnitaryRNN(2, 6, num_layers=2), UnitaryLinear(6, 3))
    plan = manifolds_of(model)
    assert len(plan) == 3
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if how == "assign":
        model.load_state_dict(state, assign=True)
    elif how == "to_empty":
        model = model.to("meta").to_empty(device="cpu")
        model.load_state_dict(state)
    elif how == "double":
        model = model.double()
    else:
        model = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert manifolds_of(model).keys() == plan.keys()
    assert all(
        torch.equal(model.state_dict()[key], value.to(model.state_dict()[key].dtype)) for key, value in state.items()
    )
    assert model[0].weight_hh_l0.manifold is model[0].manifold_l0


def test_unitary_converts_a_weight_and_guards_it(draw):
    module = nn.RNN(4, 16, nonlinearity="relu")
    before = module.weight_hh_l0.detach().clone()
    assert unitary_(module, "weight_hh_l0", k=2) is module
    u, _, vh = torch.linalg.svd(before)
    assert torch.allclose(module.weight_hh_l0, u @ vh, atol=1e-5)
    assert module.weight_hh_l0.manifold.k == 2
    optimizer = optim.RiemannianSGD(param_groups(module, 0.1, unitary_lr=0.1 / 32), lr=0.1)
    module(torch.randn(5, 3, 4))[0].square().mean().backward()
    optimizer.step()
    assert unitarity_error(module.weight_hh_l0) < 1e-6
    state = module.state_dict()
    assert "weight_hh_l0_manifold._extra_state" in state
    module.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    assert isinstance(module.weight_hh_l0, geoopt.ManifoldParameter)
    linear = unitary_(nn.Linear(5, 8))
    assert linear(torch.randn(2, 5)).shape == (2, 8)
    linear = linear.to("meta").to_empty(device="cpu")
    linear(torch.randn(2, 5)).sum().backward()
    optimizer = optim.RiemannianSGD(linear.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"lost its manifold: 'Linear.weight'"):
        optimizer.step()


def test_new_weights_after_to_empty_and_a_plain_copy_in_the_same_mode():
    model = nn.Sequential(UnitaryRNN(2, 6, num_layers=2, nonlinearity="relu", dropout=0.5), UnitaryLinear(6, 3))
    model = model.to("meta").to_empty(device="cpu")
    for layer in model:
        layer.reset_parameters()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert unitarity_error(model[0].weight_hh_l1) < 1e-6
    model.eval()
    model[0].weight_ih_l0.requires_grad_(False)
    plain = model[0].to_plain()
    assert not plain.training
    assert not plain.weight_ih_l0.requires_grad
    model[1].weight.requires_grad_(False)
    linear = model[1].to_plain()
    assert not linear.training
    assert not linear.weight.requires_grad
    assert linear.bias.requires_grad
    shared = UnitaryRNN(2, 6, num_layers=2, manifold=UnitaryLowRank(1))
    assert not any(key.startswith("_manifold") for key in shared.state_dict())


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("nonlinearity", ["modrelu", "tanh", "none"])
def test_a_network_may_be_made_complex(dtype, nonlinearity):
    network = UnitaryRNN(2, 6, 2, nonlinearity, bidirectional=True, dtype=dtype)
    x = torch.randn(4, 3, 2)
    y, _ = network(x)
    y.abs().sum().backward()
    biases = [p for name, p in network.named_parameters() if "modrelu" in name]
    assert len(biases) == (4 if nonlinearity == "modrelu" else 0)
    found, _ = network.to(torch.complex128)(x)
    assert torch.allclose(found, y.to(torch.complex128), atol=1e-5)
    assert all(p.dtype is p.grad.dtype is torch.float64 for p in biases)  # real, whatever the network is
    assert {p.dtype for p in network.parameters()} - {torch.float64} == {torch.complex128}
    optim.RiemannianAdam(network.parameters(), lr=0.1).step()
    assert unitarity_error(network.weight_hh_l1_reverse.detach()) < 1e-5


@pytest.mark.parametrize(
    "build",
    [
        lambda: UnitaryLinear(3, 5),
        lambda: UnitaryRNN(3, 5),
        lambda: OrthogonalConv2d(2, 2, image_size=4),
        lambda: unitary_(nn.Linear(4, 4)),
    ],
)
def test_a_default_device_does_not_reach_into_a_conversion(build):
    module = build()
    with torch.device("meta"):
        module.cpu().double()
    assert not any(p.is_meta for p in module.parameters())
    assert {p.real.dtype for p in module.parameters()} == {torch.float64}


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("kind", [UnitaryRNN, UnitaryRNNCell])
def test_a_network_with_relu_is_not_made_complex(kind):
    network = kind(2, 6, nonlinearity="relu")
    with pytest.raises(ValueError, match="'relu' is for real numbers"):
        network.to(torch.complex64)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    network(torch.randn(3, 2))


def test_a_gradient_is_factored_where_that_pays():
    for n, steps, options, factored in (
        (64, 5, {}, True),
        (32, 5, {}, False),
        (64, 1, {}, False),
        (64, 5, {"k": 4}, False),
        (64, 5, {"manifold": UnitaryLowRank(1, sampler="column")}, False),
    ):
        network = UnitaryRNN(2, n, nonlinearity="relu", **options)
        network(torch.randn(steps, 3, 2))[0].sum().backward()
        assert isinstance(network.weight_hh_l0.grad, FactoredTensor) == factored


@pytest.mark.parametrize(
    ("module", "name", "kind", "message"),
    [
        (nn.Linear(8, 5), "weight", ValueError, "square or tall"),
        (nn.LSTM(4, 4), "weight_hh_l0", ValueError, "stack of gates"),
        (nn.GRUCell(4, 4), "weight_hh", ValueError, "stack of gates"),
        (nn.Conv2d(4, 4, 3), "weight", ValueError, "kernel"),
        (nn.Bilinear(4, 4, 4), "weight", ValueError, "kernel"),
        (nn.MultiheadAttention(4, 1), "in_proj_weight", ValueError, "three weights"),
        (nn.Linear(4, 4), "nothing", AttributeError, "nothing"),
        (nn.Linear(4, 4), "in_features", TypeError, "parameter"),
        (UnitaryLinear(4, 4), "weight", ValueError, "already"),
    ],
    ids=str,
)
def test_what_unitary_refuses(module, name, kind, message):
    with pytest.raises(kind, match=message):
        unitary_(module, name)


def test_groups_and_modrelu():
    model = nn.Sequential(nn.Linear(3, 3), UnitaryLinear(3, 3))
    groups = param_groups(model, lr=0.32, unitary_lr=0.01)
    assert [group["lr"] for group in groups] == [0.32, 0.01]
    assert groups[1]["params"] == [model[1].weight]
    assert len(param_groups(model[0], lr=1.0, unitary_lr=1.0)) == 1
    activation = ModReLU(3, dtype=torch.complex64)
    activation.bias.data.fill_(-1.0)
    z = torch.tensor([3 + 4j, 0.5j, 0j])
    assert torch.allclose(activation(z), torch.tensor([2.4 + 3.2j, 0, 0]))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: UnitaryRNN(3, 5)(torch.zeros(4, 2, 6)), ValueError, "input_size=3"),
        (lambda: UnitaryRNN(3, 5)(torch.zeros(4, 2, 2, 3)), ValueError, "2D or 3D"),
        (lambda: UnitaryRNN(3, 5)(torch.zeros(0, 2, 3)), ValueError, "at least one time step"),
        (lambda: UnitaryRNN(3, 5)(torch.zeros(4, 2, 3), torch.zeros(1, 3, 5)), ValueError, r"\(1, 2, 5\)"),
        (lambda: UnitaryRNN(3, 5)(torch.zeros(4, 2, 3), torch.zeros(2, 5)), ValueError, r"\(1, 2, 5\)"),
        (lambda: UnitaryRNN(3, 5)(torch.zeros(4, 3), torch.zeros(1, 1, 5)), ValueError, r"\(1, 5\)"),
        (lambda: UnitaryRNN(3, 5)(torch.zeros(4, 2, 3), torch.zeros(1, 2, 5) * 1j), TypeError, "hidden state"),
        (lambda: UnitaryRNN(3, 5)(torch.zeros(4, 2, 3).long()), TypeError, "float32"),
        (lambda: UnitaryRNN(3, 5)(torch.zeros(4, 2, 3) * 1j), TypeError, "float32"),
        (lambda: UnitaryRNN(3, 5)(torch.zeros(4, 2, 3).double()), TypeError, "float32"),
        (lambda: UnitaryRNN(3, 5)(torch.zeros(4, 2, 3), torch.zeros(1, 2, 5).long()), TypeError, "hidden state"),
        (lambda: UnitaryLinear(3, 5)(torch.zeros(2, 3) * 1j), TypeError, "float32"),
        (lambda: UnitaryRNN(3, 5, nonlinearity="relu", dtype=torch.complex64), ValueError, "real numbers"),
        (lambda: UnitaryRNN(3, 5, nonlinearity="gelu"), ValueError, "'modrelu', 'relu'"),
        (lambda: UnitaryRNN(3, 5, init="zeros"), ValueError, "'cayley', 'haar'"),
        (lambda: UnitaryRNN(3, 0), ValueError, "hidden_size"),
        (lambda: UnitaryRNN(3, 5, num_layers=0), ValueError, "num_layers"),
        (lambda: UnitaryRNN(3, 5, dropout=2), ValueError, "dropout"),
        (lambda: UnitaryRNN(3, 5).to_plain(), ValueError, "modrelu"),
        (lambda: UnitaryRNNCell(3, 5)(torch.zeros(2, 2, 3)), ValueError, "1D or 2D"),
        (lambda: UnitaryRNNCell(3, 5)(torch.zeros(2, 3), torch.zeros(5)), ValueError, r"\(2, 5\)"),
        (lambda: UnitaryLinear(3, 5, init="henaff"), ValueError, "square"),
        (lambda: UnitaryLinear(-3, 5), ValueError, "in_features must be an int >= 1, got -3"),
        (lambda: UnitaryLinear(3, 0), ValueError, "out_features must be an int >= 1, got 0"),
        (lambda: UnitaryLinear(3, 3, 4), TypeError, "`bias` must be True or False, got 4"),
        *[
            (lambda build=build, wrong=wrong: build(wrong), TypeError, r"`manifold` must be one such as UnitaryLowRank")
            for wrong in (3, UnitaryLowRank)
            for build in (
                lambda wrong: UnitaryLinear(3, 3, manifold=wrong),
                lambda wrong: UnitaryRNN(3, 3, manifold=wrong),
                lambda wrong: UnitaryRNNCell(3, 3, manifold=wrong),
                lambda wrong: OrthogonalConv2d(3, 3, image_size=4, manifold=wrong),
                lambda wrong: unitary_(nn.Linear(3, 3), manifold=wrong),
            )
        ],
    ],
)
def test_wrong_input_is_told_what_was_expected(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    ("build", "call"),
    [
        (lambda: OrthogonalConv2d(3, 16, 3), r"OrthogonalConv2d\(3, 16, 3\)"),
        (lambda: UnitaryConv1d(3, 16, 3, image_size=8), r"UnitaryConv1d\(3, 16, 3\)"),
        (lambda: OrthogonalConv2d(3, 16), r"OrthogonalConv2d\(3, 16\)"),
        (lambda: ExpConv2d(3, 5), r"ExpConv2d\(3, 5\)"),
        (lambda: UnitaryConvRNN(1, 16, 3), r"UnitaryConvRNN\(1, 16, 3\)"),
    ],
)
def test_the_size_of_a_kernel_is_not_taken_for_that_of_the_images(build, call):
    with pytest.raises(TypeError, match=f"^{call}: give the size of the images as image_size="):
        build()


def test_the_repr_of_a_recurrent_network_shows_what_differs_from_the_defaults():
    assert repr(UnitaryRNN(3, 8)).startswith("UnitaryRNN(\n  3, 8\n")
    network = UnitaryRNN(3, 8, 2, "relu", bias=False, batch_first=True, dropout=0.5, init="haar")
    shown = "3, 8, num_layers=2, nonlinearity=relu, bias=False, batch_first=True, dropout=0.5, init=haar"
    assert shown in repr(network)
