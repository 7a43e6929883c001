"""What layers load: averages, other dtypes and devices, and the state_dicts of plain modules."""

import copy
import io

import geoopt
import pytest
import torch
from helpers import bound, error
from torch import nn
from torch.optim.swa_utils import AveragedModel

from projunn_manifold import UnitaryLowRank, averaging, fold, unitarize
from projunn_manifold.layers import (
    OrthogonalConv1d,
    OrthogonalConv2d,
    UnitaryConv2d,
    UnitaryLinear,
    UnitaryRNN,
    UnitaryRNNCell,
    plain_,
    unitary_,
)

LAYERS = {
    "linear": lambda: UnitaryLinear(6, 6),
    "tall": lambda: UnitaryLinear(4, 6),
    "wide": lambda: UnitaryLinear(6, 4),
    "rnn": lambda: UnitaryRNN(3, 6, num_layers=2),
    "one manifold": lambda: UnitaryRNN(3, 6, num_layers=2, manifold=UnitaryLowRank(1)),
    "cell": lambda: UnitaryRNNCell(3, 6, nonlinearity="tanh"),
    "convolution": lambda: OrthogonalConv1d(2, 2, image_size=6),
    "existing": lambda: unitary_(nn.Linear(6, 6)),
    "nested": lambda: nn.Sequential(nn.Linear(6, 6), nn.Sequential(UnitaryLinear(6, 6))),
}


def manifolds(model):
    return [module for module in model.modules() if isinstance(module, UnitaryLowRank)]


def counted(build, count):
    """A model whose manifolds have seen so many gradients."""
    model = build()
    for manifold in manifolds(model):
        manifold._state.gradients = count
    return model


def counts(model):
    return {manifold.draws()[1] for manifold in manifolds(model)}


def values(model):
    return {name: p.detach().as_subclass(torch.Tensor).clone() for name, p in model.named_parameters()}


def assert_unchanged(model, before):
    after = values(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def combined(models, weights):
    """Return a combination, tensor by tensor, of all that state_dicts hold."""
    states = [model.state_dict() for model in models]
    return {key: sum(w * state[key] for w, state in zip(weights, states, strict=True)) for key in states[0]}


AVERAGES = {
    "sum / n": lambda tensors: sum(tensors) / len(tensors),
    "mean of a stack": lambda tensors: torch.stack([t if t.is_complex() else t.float() for t in tensors]).mean(0),
    "weights": lambda tensors: sum(w * t for w, t in zip((0.25, 0.25, 0.5), tensors, strict=True)),
}


# -- averages --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.* is off the manifold")
@pytest.mark.parametrize("how", ["sum / n", "mean of a stack", "weights"])
@pytest.mark.parametrize("kind", LAYERS)
def test_averages_of_state_dicts_are_loaded(kind, how):
    models = [counted(LAYERS[kind], count) for count in (4, 8, 1001)]
    states = [model.state_dict() for model in models]
    mean = {key: AVERAGES[how]([state[key] for state in states]) for key in states[0]}
    target = LAYERS[kind]()
    target.load_state_dict(mean)
    own = values(target)
    share = (0.25, 0.25, 0.5) if how == "weights" else (1 / 3,) * 3
    for name, value in own.items():
        expected = sum(s * values(model)[name].to(torch.complex128) for s, model in zip(share, models, strict=True))
        assert torch.allclose(value.to(torch.complex128), expected, atol=1e-6), name
    assert counts(target) == {504 if how == "weights" else 338}  # of 503.5 and 337.67


@pytest.mark.parametrize("kind", LAYERS)
def test_an_average_of_equal_models_is_that_model(kind, recwarn):
    model = counted(LAYERS[kind], 70_000)
    target = LAYERS[kind]()
    target.load_state_dict(combined([model, copy.deepcopy(model)], (0.5, 0.5)))
    assert_unchanged(target, values(model))
    assert counts(target) == {70_000}
    assert not recwarn.list


def test_an_average_off_the_manifold_is_told_with_what_to_do(draw):
    first = UnitaryLinear(8, 8)
    with torch.no_grad():
        first.weight.copy_(draw.point(8, 8, dtype=torch.float32))
    second = copy.deepcopy(first)
    second.manifold.step_(second.weight, draw.matrix(8, 8, dtype=torch.float32), 0.5)
    mean = (first.weight.double() + second.weight.double()).detach() / 2
    state = combined([first, second], (0.5, 0.5))
    u, s, vh = torch.linalg.svd(mean)
    distance = error(mean.mH @ mean, torch.eye(8))
    assert distance > 0.05
    model = nn.Sequential(UnitaryLinear(8, 8))
    with pytest.warns(RuntimeWarning, match=r"'0\.weight' is off the manifold.*an average.*proj_\(\)"):
        model.load_state_dict({f"0.{key}": value for key, value in state.items()})
    assert error(model[0].weight, mean) <= bound(torch.float32)
    with torch.no_grad():
        model[0].weight.proj_()
    assert error(model[0].weight, u @ vh) <= bound(torch.float32, smallest=s.min().item())


@pytest.mark.parametrize("options", [{}, {"use_buffers": True}], ids=str)
@pytest.mark.parametrize("average", [AveragedModel, averaging.AveragedModel])
def test_averaged_models_count_as_the_model_ahead(average, options):
    model = nn.Sequential(nn.BatchNorm1d(6), counted(LAYERS["linear"], 3))
    averaged = average(model, **options)
    for manifold in manifolds(model):
        manifold._state.gradients = 9
    averaged.update_parameters(model)
    ours = average is averaging.AveragedModel
    assert counts(averaged) == {9 if ours else 3}
    averaged.update_parameters(counted(lambda: model, 5))
    assert counts(averaged) == {9 if ours else 3}
    other = average(model, **options)
    other.load_state_dict(averaged.state_dict())
    assert counts(other) == counts(averaged)
    assert_unchanged(other, values(averaged))


def test_a_moving_average_of_a_state_dict_in_place_leaves_counts_alone():
    """timm's ModelEma writes into the tensors that state_dict returns."""
    model, ema = counted(LAYERS["rnn"], 100), counted(LAYERS["rnn"], 40)
    for own, given in zip(ema.state_dict().values(), model.state_dict().values(), strict=True):
        own.copy_(0.9 * own + 0.1 * given)
    assert counts(ema) == {40}


# -- other dtypes and devices ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_checkpoints_of_another_precision_are_loaded(kind, dtype, recwarn):
    model, target = counted(LAYERS[kind], 100_000), LAYERS[kind]()
    stored = {key: value if value.is_complex() else value.to(dtype) for key, value in model.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    for name, value in values(target).items():
        original = values(model)[name]
        assert torch.equal(value, original if value.is_complex() else original.to(dtype).to(value.dtype))
    assert counts(target) == {100_000}
    assert not recwarn.list


def test_sizes_that_bfloat16_cannot_hold_are_told_apart():
    layer = OrthogonalConv2d(1, 1, image_size=(1, 257))
    stored = {k: v if v.is_complex() else v.bfloat16() for k, v in layer.state_dict().items()}
    OrthogonalConv2d(1, 1, image_size=(1, 257)).load_state_dict(stored)
    with pytest.raises(ValueError, match=r"\[1, 1, 1, 1, 1, 257\], expected \[1, 1, 1, 1, 257, 1\]"):
        OrthogonalConv2d(1, 1, image_size=(257, 1)).load_state_dict(stored)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_state_dict_is_plain_tensors_that_a_model_made_on_meta_takes_over(kind):
    model = counted(LAYERS[kind], 7)
    state = model.state_dict()
    assert {type(value).__name__ for value in state.values()} <= {"Tensor", "Parameter", "ManifoldParameter"}
    extras = {key: value for key, value in state.items() if key.endswith("_extra_state")}
    assert extras
    assert all(value.dtype == torch.int64 and value.shape[-1] == 8 for value in extras.values())
    target = LAYERS[kind]().to("meta")
    target.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    assert_unchanged(target, values(model))
    assert counts(target) == {7}


# -- plain state_dicts ---------------------------------------------------------------------------------------


def orthogonal(*modules):
    """Put all square and tall weights of plain modules, or those of recurrences, on the manifold."""
    for module in modules:
        for name, p in module.named_parameters():
            if name == "weight" or name.startswith("weight_hh"):
                nn.init.orthogonal_(p)
    return modules[0]


def stiefel():
    module = nn.Linear(6, 6)
    manifold = geoopt.Stiefel()
    module.weight = geoopt.ManifoldParameter(manifold.random(6, 6), manifold=manifold)
    return module


X = torch.linspace(-1, 1, 60)
PLAIN = {
    "linear": (lambda: UnitaryLinear(6, 6), lambda: nn.Linear(6, 6), X.view(10, 6), "weight"),
    "tall": (lambda: UnitaryLinear(4, 6), lambda: nn.Linear(4, 6), X.view(15, 4), "weight"),
    "wide": (lambda: UnitaryLinear(6, 4), lambda: nn.Linear(6, 4), X.view(10, 6), "weight"),
    "existing": (lambda: unitary_(nn.Linear(6, 6)), lambda: nn.Linear(6, 6), X.view(10, 6), "weight"),
    "rnn": (
        lambda: UnitaryRNN(3, 6, 2, "tanh"), lambda: nn.RNN(3, 6, 2), X.view(10, 2, 3), "weight_hh_l1"
    ),
    "rnn, no bias": (
        lambda: UnitaryRNN(3, 6, 1, "relu", bias=False),
        lambda: nn.RNN(3, 6, 1, "relu", bias=False), X.view(10, 2, 3), "weight_hh_l0"
    ),
    "cell": (
        lambda: UnitaryRNNCell(3, 6, nonlinearity="relu"),
        lambda: nn.RNNCell(3, 6, nonlinearity="relu"), X.view(20, 3), "weight_hh"
    ),
    "existing rnn": (
        lambda: unitary_(nn.RNN(3, 6), "weight_hh_l0"), lambda: nn.RNN(3, 6), X.view(10, 2, 3), "weight_hh_l0"
    ),
}  # fmt: skip


def output(model, x):
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y[0]


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("kind", PLAIN)
def test_plain_modules_on_the_manifold_are_loaded_strictly(kind, assign):
    build, build_plain, x, _ = PLAIN[kind]
    model, plain = counted(build, 5), orthogonal(build_plain())
    given = copy.deepcopy(plain.state_dict())
    found = model.load_state_dict(given, assign=assign)
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert torch.allclose(output(model, x), output(plain, x), atol=1e-6)
    assert counts(model) == {5}
    assert given.keys() == plain.state_dict().keys()  # the dictionary given is left alone
    assert all(torch.equal(given[key], value) for key, value in plain.state_dict().items())
    assert all(p.manifold in manifolds(model) for p in model.parameters() if hasattr(p, "manifold"))


def test_a_module_on_geoopts_stiefel_is_loaded_strictly():
    plain, model = stiefel(), UnitaryLinear(6, 6)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(values(model)["weight"], values(plain)["weight"])


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("kind", PLAIN)
def test_plain_weights_off_the_manifold_are_refused_and_nothing_is_changed(kind, strict):
    build, build_plain, _, name = PLAIN[kind]
    model, plain = nn.Sequential(build()), orthogonal(build_plain())
    with torch.no_grad():
        plain.get_parameter(name).mul_(3)  # X^H X - I is 8 I
    before = values(model)
    state = {f"0.{key}": value for key, value in plain.state_dict().items()}
    with pytest.raises(
        ValueError, match=rf"'0\.{name}' is off the manifold, .* about 8, .*nearest_unitary_.*`unitarize`"
    ):
        model.load_state_dict(state, strict=strict)
    assert_unchanged(model, before)
    on_manifold = orthogonal(build_plain()).get_parameter(name).detach()
    model.load_state_dict({**state, f"0.{name}": on_manifold}, strict=strict)


@pytest.mark.parametrize("kind", PLAIN)
def test_the_advice_holds_unitarized_and_folded_models_are_loaded(kind):
    build, build_plain, x, _ = PLAIN[kind]
    plain, model = nn.Sequential(build_plain()), nn.Sequential(build())
    unitarize(plain)
    folded = fold(plain)
    model.load_state_dict(folded.state_dict())
    assert torch.allclose(output(model, x), output(folded, x), atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in PLAIN if not kind.startswith("existing")])
def test_what_to_plain_returns_is_loaded_again(kind):
    build, _, x, _ = PLAIN[kind]
    model, other = build(), build()
    other.load_state_dict(model.to_plain().state_dict())
    assert torch.equal(output(other, x), output(model, x))


def test_a_not_finite_weight_is_refused_or_told():
    state = orthogonal(nn.Linear(6, 6)).state_dict()
    state["weight"][1, 2] = torch.nan
    with pytest.raises(ValueError, match="about inf"):
        UnitaryLinear(6, 6).load_state_dict(state)
    whole = {**UnitaryLinear(6, 6).state_dict(), "weight": state["weight"]}
    with pytest.warns(RuntimeWarning, match="about inf"):
        UnitaryLinear(6, 6).load_state_dict(whole)


def test_a_missing_modrelu_bias_is_an_error_and_a_second_bias_without_a_first_one_too():
    plain = orthogonal(nn.RNN(3, 6))
    with pytest.raises(RuntimeError, match=r"Missing key.*\"modrelu_l0\.bias\"\. $"):
        UnitaryRNN(3, 6).load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias_ih_l0"):
        UnitaryRNN(3, 6, 1, "tanh", bias=False).load_state_dict(plain.state_dict())
    state = plain.state_dict()
    del state["bias_ih_l0"]
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*bias_ih_l0.*Unexpected key.*bias_hh_l0"):
        UnitaryRNN(3, 6, 1, "tanh").load_state_dict(state)
    state = {**plain.state_dict(), "bias_hh_l0": torch.zeros(5)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias_hh_l0"):
        UnitaryRNN(3, 6, 1, "tanh").load_state_dict(state)


def test_biases_are_added_in_the_precision_of_the_layer():
    plain = orthogonal(nn.RNN(3, 6)).half()
    network = UnitaryRNN(3, 6, 1, "tanh")
    network.load_state_dict(plain.state_dict())
    assert torch.equal(network.bias_ih_l0, plain.bias_ih_l0.float() + plain.bias_hh_l0.float())


@pytest.mark.parametrize(
    ("layer", "plain"),
    [
        (lambda: OrthogonalConv1d(2, 3, image_size=6), lambda: nn.Conv1d(2, 3, 3)),
        (lambda: OrthogonalConv2d(2, 3, image_size=6), lambda: nn.Conv2d(2, 3, 3)),
        (lambda: UnitaryConv2d(2, 3, image_size=6), lambda: nn.Conv2d(2, 3, 3, dtype=torch.complex64)),
    ],
)
def test_a_plain_kernel_is_refused_with_what_to_do(layer, plain):
    model = nn.Sequential(layer())
    before = values(model)
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"'0\._extra_state' is missing.*from_plain, or `unitarize`"):
            model.load_state_dict(nn.Sequential(plain()).state_dict(), strict=strict)
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_state_that_is_none_changes_nothing(kind):
    model = LAYERS[kind]()
    before = values(model)
    state = LAYERS[kind]().state_dict()
    key = next(key for key in state if key.endswith("manifold._extra_state") or "manifold_" in key)
    state[key] = state[key].float() * torch.inf
    with pytest.raises(ValueError, match=f"'{key}' must hold finite"):
        model.load_state_dict(state)
    layer = key.rpartition("manifold")[0].rpartition(".")[0]
    assert_unchanged(model, {name: value for name, value in before.items() if name.startswith(layer)})


def test_a_weight_made_plain_loads_anything():
    plain = nn.Linear(6, 6)
    folded = fold(nn.Sequential(unitary_(nn.Linear(6, 6))))[0]
    for module in (plain_(unitary_(nn.Linear(6, 6))), folded):
        module.load_state_dict(plain.state_dict())
        assert torch.equal(module.weight, plain.weight)


def test_a_point_is_close_enough_if_the_drift_correction_brings_it_back(draw):
    for size, refused in ((0.004, False), (0.02, True)):
        state = nn.Linear(6, 6).state_dict()
        state["weight"] = draw.point(6, 6, dtype=torch.float32) * (1 + size)
        model = UnitaryLinear(6, 6)
        if refused:
            with pytest.raises(ValueError, match=r"expected at most 0\.01"):
                model.load_state_dict(state)
        else:
            model.load_state_dict(state)
            assert error(model.weight, state["weight"]) <= bound(torch.float32)
