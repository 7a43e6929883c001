"""Recurrent networks in the place of torch's: the same names, arguments, states and derivatives, in both directions.

The oracle of all values is torch.nn.RNN with the same weights, copied here by name.
"""

import copy
import inspect
import io
import itertools
import pickle
import typing

import geoopt
import numpy as np
import pytest
import torch
from helpers import bound
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from projunn_manifold import UnitaryLowRank, fold, manifolds_of, optim, unitarize
from projunn_manifold.layers import UnitaryRNN, UnitaryRNNCell, param_groups, unitary_
from projunn_manifold.linalg.dense import unitarity_error
from projunn_manifold.sketching.factored_tensor import FactoredTensor

WIDTH, HIDDEN = 4, 10
#: Public names of torch's classes that ours do not have.
WITHOUT = dict.fromkeys(
    ("check_forward_args", "check_hidden_size", "check_input", "get_expected_hidden_size", "permute_hidden"),
    "a part of torch's own forward, on no page of its documentation",
)
#: Attributes of torch's objects that ours do not have.
WITHOUT_IN_OBJECTS = dict.fromkeys(
    ("_flat_weights", "_flat_weights_names", "_flat_weight_refs"),
    "weights as cuDNN wants them: whoever writes into them is told at once that they are not there",
)
PAIRS = [(nn.RNN, UnitaryRNN), (nn.RNNCell, UnitaryRNNCell)]
#: Arguments by position, none of them the default.
POSITIONAL = {
    nn.RNN: (WIDTH, HIDDEN, 2, "relu", False, True, 0.5, True, 0, "cpu", torch.float64),
    nn.RNNCell: (WIDTH, HIDDEN, False, "relu", "cpu", torch.float64),
}


def made(**kwargs):
    """Return a network with biases that are not zero."""
    torch.manual_seed(0)
    network = UnitaryRNN(WIDTH, HIDDEN, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "bias" in name:
                p.normal_(0, 0.1)
    return network


def torchs(ours):
    """Return torch's network with the weights of ours."""
    plain = nn.RNN(
        ours.input_size,
        ours.hidden_size,
        ours.num_layers,
        ours.nonlinearity,
        ours.bias,
        ours.batch_first,
        ours.dropout,
        ours.bidirectional,
        dtype=ours.weight_ih_l0.dtype,
    )
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.zero_() if "bias_hh" in name else p.copy_(getattr(ours, name))
    return plain


def close(actual, expected, dtype=torch.float64):
    assert actual.shape == expected.shape
    size = torch.linalg.vector_norm(expected).item()
    return torch.linalg.vector_norm(actual - expected).item() <= bound(dtype, size)


def kind_of(owner, name):
    found = inspect.getattr_static(owner, name)
    return "function" if callable(found) else type(found)


def arguments(function):
    return list(inspect.signature(function).parameters.values())[1:]


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_every_public_name_of_torchs_class_is_there_or_has_a_reason_not_to_be(theirs, ours):
    names = {name for name in dir(theirs) if not name.startswith("_")}
    assert {name for name in names if not hasattr(ours, name)} == names & WITHOUT.keys()
    for name in names - WITHOUT.keys():
        assert kind_of(ours, name) == kind_of(theirs, name), name
        if kind_of(theirs, name) == "function":
            got = [(a.name, a.kind, a.default) for a in arguments(getattr(ours, name))]
            assert got == [(a.name, a.kind, a.default) for a in arguments(getattr(theirs, name))], name


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True, "dropout": 0.5}])
@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_every_attribute_of_torchs_objects_is_there_or_has_a_reason_not_to_be(theirs, ours, nonlinearity, options):
    if theirs is nn.RNNCell:
        options = {key: value for key, value in options.items() if key == "bias"}
    plain, network = (kind(WIDTH, HIDDEN, nonlinearity=nonlinearity, **options) for kind in (theirs, ours))
    for name, value in vars(plain).items():
        if name in WITHOUT_IN_OBJECTS:
            assert not hasattr(network, name)
            continue
        assert type(getattr(network, name)) is type(value), name
        if not name.startswith("_"):
            assert getattr(network, name) == value, name
    # one bias: the second is redundant
    shapes = {name: None if p is None else p.shape for name, p in plain._parameters.items() if "bias_hh" not in name}
    assert {name: getattr(getattr(network, name), "shape", None) for name in shapes} == shapes
    trained = [name for name, shape in shapes.items() if shape is not None]
    assert [name for name, _ in network.named_parameters()] == trained  # the order, too
    if theirs is nn.RNN:
        names = [[name for name in own if "bias_hh" not in name] for own in plain._all_weights]
        assert network._all_weights == names
        for own, weights in zip(names, network.all_weights, strict=True):
            assert all(weight is getattr(network, name) for name, weight in zip(own, weights, strict=True))


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_arguments_by_position_are_torchs(theirs, ours):
    names = list(vars(theirs(*POSITIONAL[theirs])))
    for count in range(2, len(POSITIONAL[theirs]) + 1):
        given = POSITIONAL[theirs][:count]
        options = {} if "relu" in given else {"nonlinearity": "tanh"}  # ours starts with modReLU
        plain, network = theirs(*given, **options), ours(*given, **options)
        for name in names:
            if not name.startswith("_"):
                assert getattr(network, name) == getattr(plain, name), (name, given)
        weight = next(network.parameters())
        assert weight.dtype == next(plain.parameters()).dtype
    positional = [a for a in arguments(ours.__init__) if a.kind is not inspect.Parameter.KEYWORD_ONLY]
    documented = typing.get_overloads(theirs.__init__)[:1] or [theirs.__init__]
    expected = [(a.name, a.default) for a in arguments(documented[0]) if a.name != "nonlinearity"]
    assert [(a.name, a.default) for a in positional if a.name not in ("nonlinearity", "proj_size")] == expected


def inputs(draw, form, batch_first=False):
    """Return an input of that form, the leaves that it is made of, and the size of its batch."""
    if form in ("packed", "sorted"):
        lengths = (5, 7, 1, 5) if form == "packed" else (7, 5, 5, 1)
        leaves = [draw.matrix(length, WIDTH, dtype=torch.float64).requires_grad_() for length in lengths]
        return pack_sequence(leaves, enforce_sorted=form == "sorted"), leaves, (4,)
    x = draw.matrix(*((6, 7, WIDTH) if form == "batch" else (6, WIDTH)), dtype=torch.float64).requires_grad_()
    return x, [x], () if form == "one" else (6 if batch_first else 7,)


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("with_hx", [True, False])
@pytest.mark.parametrize("form", ["batch", "one", "packed", "sorted"])
def test_it_is_torch_nn_rnn_with_a_unitary_weight(
    draw, nonlinearity, layers, bias, batch_first, bidirectional, with_hx, form
):
    options = {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    ours = made(num_layers=layers, nonlinearity=nonlinearity, **options)
    plain = torchs(ours)
    x, leaves, batch = inputs(draw, form, batch_first)
    hx = None
    if with_hx:
        hx = draw.matrix(layers * (1 + bidirectional), *batch, HIDDEN, dtype=torch.float64).requires_grad_()
        leaves = [*leaves, hx]
    (states, last), (expected, expected_last) = ours(x, hx), plain(x, hx)
    if isinstance(x, PackedSequence):
        for got, wanted in zip(states[1:], expected[1:], strict=True):
            assert (got is None and wanted is None) or torch.equal(got, wanted)
        states, expected = states.data, expected.data
    assert close(states, expected)
    assert close(last, expected_last)
    # every state and every last state counts in its own way
    of_states, of_last = draw.matrix(*states.shape, dtype=torch.float64), draw.matrix(*last.shape, dtype=torch.float64)
    ((states * of_states).sum() + (last.square() * of_last).sum()).backward(retain_graph=True)  # of the input
    found = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    ((expected * of_states).sum() + (expected_last.square() * of_last).sum()).backward()
    assert all(close(grad, leaf.grad) for grad, leaf in zip(found, leaves, strict=True))
    for name, p in ours.named_parameters():
        assert close(p.grad.clone(), getattr(plain, name).grad), name


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("form", "share"),
    # where packed, torch draws for the packed states and ours for the padded ones
    [*itertools.product(("batch", "one"), (0.0, 0.5, 1.0)), ("packed", 0.0), ("packed", 1.0)],
)
def test_dropout_is_torchs(draw, form, bidirectional, share):
    ours = made(num_layers=3, nonlinearity="relu", dropout=share, bidirectional=bidirectional)
    plain = torchs(ours)
    x, _, _ = inputs(draw, form)
    outputs = []
    for network, training in itertools.product((ours, plain), (True, False)):
        network.train(training)
        torch.manual_seed(1)
        states, last = network(x)
        outputs.append((states.data, last))
    for got, wanted in zip(outputs[:2], outputs[2:], strict=True):
        assert all(close(a, b) for a, b in zip(got, wanted, strict=True))
    assert torch.equal(outputs[0][0], outputs[1][0]) == (share == 0.0)


def shrunk(z):
    """A function of one's own, bounded for complex numbers, too."""
    return z / (1 + z.abs())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("nonlinearity", ["modrelu", "tanh", "none", shrunk])
def test_two_directions_are_two_networks_and_a_sequence_is_blind_to_the_padding_of_its_batch(draw, dtype, nonlinearity):
    both = UnitaryRNN(3, 6, nonlinearity=nonlinearity, dtype=dtype, bidirectional=True)
    ways = []
    for end in ("", "_reverse"):
        way = UnitaryRNN(3, 6, nonlinearity=nonlinearity, dtype=dtype)
        for name, p in way.named_parameters():
            stem, _, rest = name.partition(".")
            source = getattr(both, stem + end)
            p.data.copy_(getattr(source, rest) if rest else source)
        ways.append(way)
    sequences = [draw.matrix(length, 3, dtype=torch.float64) for length in (2, 6, 1, 4)]
    states, last = both(pack_sequence(sequences, enforce_sorted=False))
    for i, (x, found) in enumerate(zip(sequences, unpack_sequence(states), strict=True)):
        forward, end = ways[0](x)
        backward, beginning = ways[1](x.flip(0))
        for alone, alone_last in ((found, last[:, i]), both(x)):
            assert close(alone, torch.cat((forward, backward.flip(0)), -1), dtype)
            assert close(alone_last, torch.cat((end, beginning)), dtype)


def of_states(output):
    return output.data if isinstance(output, PackedSequence) else output


@pytest.mark.parametrize("packed", [False, True])
def test_both_directions_learn_on_manifolds_of_their_own(draw, packed):
    torch.manual_seed(0)
    network = UnitaryRNN(2, 64, num_layers=2, nonlinearity="relu", dtype=torch.float64, bidirectional=True)
    plain = torchs(network)
    names = [f"weight_hh_l{layer}{end}" for layer in range(2) for end in ("", "_reverse")]
    assert list(manifolds_of(network)) == names
    assert len({id(manifold) for manifold in manifolds_of(network).values()}) == 4
    groups = param_groups(network, lr=0.001, unitary_lr=0.01)
    assert [id(p) for p in groups[1]["params"]] == [id(getattr(network, name)) for name in names]
    x = [draw.matrix(length, 2, dtype=torch.float64) for length in (9, 4, 6)]
    x = pack_sequence(x, enforce_sorted=False) if packed else torch.stack([s[:4] for s in x], 1)
    optimizer = optim.RiemannianSGD(groups, lr=0.01)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        loss = of_states(network(x)[0]).square().sum()
        loss.backward()
        if step == 0:
            of_states(plain(x)[0]).square().sum().backward()
            for name in names:
                grad = getattr(network, name).grad
                assert isinstance(grad, FactoredTensor)  # never formed in either direction
                assert close(grad.clone(), getattr(plain, name).grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name in names:
        assert unitarity_error(getattr(network, name)) < bound(torch.float64)


def test_one_manifold_may_be_that_of_all_directions():
    manifold = UnitaryLowRank(2)
    network = UnitaryRNN(2, 6, num_layers=2, bidirectional=True, manifold=manifold)
    assert all(found is manifold for found in manifolds_of(network).values())
    assert len(manifolds_of(network)) == 4


@pytest.mark.parametrize("how", ["copy", "pickle", "save", "assign", "to_empty", "double"])
def test_two_directions_travel(draw, how):
    network = UnitaryRNN(2, 6, 2, batch_first=True, bidirectional=True)
    x = draw.matrix(3, 4, 2, dtype=torch.float32)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    expected, plan = network(x), manifolds_of(network)
    if how == "copy":
        moved = copy.deepcopy(network)
    elif how == "pickle":
        moved = pickle.loads(pickle.dumps(network))
    elif how == "save":
        file = io.BytesIO()
        torch.save(network, file)
        file.seek(0)
        moved = torch.load(file, weights_only=False)
    elif how == "double":
        moved = network.double().float()
    else:
        moved = UnitaryRNN(2, 6, 2, batch_first=True, bidirectional=True)
        if how == "to_empty":
            moved = moved.to("meta").to_empty(device="cpu")
        moved.load_state_dict(state, assign=how == "assign")
    assert list(manifolds_of(moved)) == list(plan)
    for name in plan:
        assert getattr(moved, name).manifold is getattr(moved, name.replace("weight_hh", "manifold"))
    for got, wanted in zip(moved(x), expected, strict=True):
        assert torch.equal(got, wanted)
    assert repr(moved) == repr(network)


def test_new_weights_in_both_directions():
    network = UnitaryRNN(2, 6, 2, bidirectional=True).to("meta").to_empty(device="cpu")
    network.reset_parameters()
    assert all(torch.isfinite(p).all() for p in network.parameters())
    ends = [f"l{layer}{end}" for layer in range(2) for end in ("", "_reverse")]
    assert all(unitarity_error(getattr(network, f"weight_hh_{end}")) < bound(torch.float32) for end in ends)
    assert not any(getattr(network, f"bias_ih_{end}").any() for end in ends)
    assert len({getattr(network, f"weight_ih_{end}").abs().max().item() for end in ends}) == 4


@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_copy_has_everything(draw, bias):
    ours = made(num_layers=2, nonlinearity="tanh", bias=bias, batch_first=True, dropout=0.5, bidirectional=True).eval()
    for name in ("weight_hh_l1_reverse", *(("bias_ih_l0_reverse",) if bias else ())):
        getattr(ours, name).requires_grad_(False)
    plain, expected = ours.to_plain(), torchs(ours)
    assert type(plain) is nn.RNN
    assert not plain.training
    for name, value in vars(expected).items():
        if not name.startswith("_") and name != "training":
            assert getattr(plain, name) == value, name
    assert plain.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(plain.state_dict()[name], value) for name, value in expected.state_dict().items())
    frozen = {name for name, p in plain.named_parameters() if not p.requires_grad}
    # a second bias that went on learning would move what is frozen
    second = {"bias_ih_l0_reverse", "bias_hh_l0_reverse"} if bias else set()
    assert frozen == {"weight_hh_l1_reverse"} | second
    cell = UnitaryRNNCell(WIDTH, HIDDEN, nonlinearity="relu", dtype=torch.float64, bias=bias)
    x, h = draw.matrix(3, WIDTH, dtype=torch.float64), draw.matrix(3, HIDDEN, dtype=torch.float64)
    assert close(cell.to_plain()(input=x, hx=h), cell(input=x, hx=h))


def test_a_program_for_torchs_network_runs_on_ours():
    for kind, options in itertools.product((nn.RNN, UnitaryRNN), ({}, {"num_layers": 2, "bidirectional": True})):
        network = kind(3, 8, **options)
        assert network.flatten_parameters() is None
        directions = 2 if network.bidirectional else 1
        h = torch.zeros(network.num_layers * directions, 2, network.hidden_size)
        states, last = network(input=torch.randn(5, 2, 3), hx=h)
        assert states.shape == (5, 2, 8 * directions)
        assert last.shape == h.shape
        halves = states.view(5, 2, directions, 8)
        assert torch.equal(last[-directions], halves[-1, :, 0])
        assert torch.equal(last[-1], halves[0 if directions == 2 else -1, :, -1])


def test_the_mode_of_what_torch_does_not_have_is_none_of_torchs():
    modes = {f: UnitaryRNN(3, 8, nonlinearity=f).mode for f in ("modrelu", "none", torch.sin)}
    assert modes == {"modrelu": "RNN_MODRELU", "none": "RNN_NONE", torch.sin: "RNN_FUNCTION"}


def test_two_directions_of_torchs_network_become_unitary_and_plain_again(draw):
    model = nn.Sequential(nn.RNN(3, 8, 2, bidirectional=True))
    report = unitarize(model)
    names = [f"weight_hh_l{layer}{end}" for layer in range(2) for end in ("", "_reverse")]
    assert [converted.name for converted in report] == [f"0.{name}" for name in names]
    assert all(isinstance(getattr(model[0], name), geoopt.ManifoldParameter) for name in names)
    x = draw.matrix(5, 2, 3, dtype=torch.float32)
    expected = model(x)[0]
    fold(model)
    assert not manifolds_of(model)
    assert torch.equal(model(x)[0], expected)
    other = unitary_(nn.RNN(3, 8, bidirectional=True), "weight_hh_l0_reverse")
    assert list(manifolds_of(other)) == ["weight_hh_l0_reverse"]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: UnitaryRNN(3, 5, proj_size=2), ValueError, "proj_size must be 0, as for torch.nn.RNN, got 2"),
        (lambda: UnitaryRNN(3, 5, 1, "relu", True, False, 0.0, False, "cpu"), ValueError, "got 'cpu'; pass device"),
        (lambda: UnitaryRNN(3, 5, 1, "relu", 0.5), TypeError, "`bias` must be True or False, got 0.5"),
        (lambda: UnitaryRNNCell(3, 5, "relu"), TypeError, "`bias` must be True or False, got 'relu'"),
        (lambda: UnitaryRNN(3, 5, batch_first=None), TypeError, "`batch_first` must be True or False, got None"),
        (lambda: UnitaryRNN(3, 5, bidirectional=2), TypeError, "`bidirectional` must be True or False, got 2"),
        (lambda: UnitaryRNN(3, 5, 2, dropout="0.5"), ValueError, "dropout must be a number from 0 to 1, got '0.5'"),
        (lambda: UnitaryRNN(3, 5, 2, dropout=True), ValueError, "dropout must be a number"),
        (lambda: UnitaryRNN(3, 5, 2, dropout=float("nan")), ValueError, "dropout must be a number"),
        (lambda: UnitaryRNN(3, 5, dropout=0.5), RuntimeWarning, "dropout=0.5 does nothing.*num_layers is 1"),
        (
            lambda: UnitaryRNN(3, 5, 2, bidirectional=True)(torch.zeros(4, 2, 3), torch.zeros(2, 2, 5)),
            ValueError,
            r"shape \(4, 2, 5\), got \(2, 2, 5\)",
        ),
        (
            lambda: UnitaryRNN(3, 5, bidirectional=True)(torch.zeros(4, 3), torch.zeros(2, 1, 5)),
            ValueError,
            r"shape \(2, 5\), got \(2, 1, 5\)",
        ),
    ],
)
def test_wrong_arguments_are_told_what_was_expected(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_share_of_dropout_is_a_plain_number():
    for share in (np.float32(0.5), np.array(0.5), torch.tensor(0.5), 1):
        network = UnitaryRNN(3, 5, 2, dropout=share)
        assert type(network.dropout) is float
        assert network.dropout == float(share)


def test_the_repr_names_both_directions():
    network = UnitaryRNN(3, 8, 2, "relu", dropout=0.5, bidirectional=True, init="haar")
    assert "3, 8, num_layers=2, nonlinearity=relu, dropout=0.5, bidirectional=True, init=haar" in repr(network)
    assert "bidirectional" not in repr(UnitaryRNN(3, 8))
