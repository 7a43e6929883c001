"""The states belong to the caller: what torch.nn.RNN lets one do with its outputs can be done with these."""

import pytest
import torch
from helpers import bound
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from projunn_manifold.layers import UnitaryRNN, UnitaryRNNCell
from projunn_manifold.sketching.factored_tensor import FactoredTensor

CHANGES = {
    "relu": lambda t: nn.functional.relu(t, inplace=True),
    "residual": lambda t: t.add_(torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)),
    "masked_fill_": lambda t: t.masked_fill_(torch.arange(t.shape[-1]) % 3 == 0, 0.5),
    "dropout": lambda t: nn.functional.dropout(t, 0.5, inplace=True),
    "entry": lambda t: t.__setitem__(0, 0.0),
    "outside autograd": lambda t: torch.no_grad()(t.zero_)(),
    "detach_": lambda t: t.detach_(),
}
FORMS = ["whole", "batch_first", "unbatched", "packed", "layers"]


def network(form, nonlinearity, n=64, dtype=torch.float64):
    torch.manual_seed(0)
    layers = 2 if form == "layers" else 1
    made = UnitaryRNN(
        3, n, layers, nonlinearity, batch_first=form == "batch_first", dropout=0.4 * (layers - 1), dtype=dtype
    )
    with torch.no_grad():
        made.bias_ih_l0.normal_(0, 0.1)
    return made


def given(draw, form, dtype=torch.float64):
    if form == "packed":
        return pack_sequence([draw.matrix(length, 3, dtype=dtype) for length in (3, 5, 2)], enforce_sorted=False)
    return draw.matrix(*((5, 3) if form == "unbatched" else (5, 4, 3)), dtype=dtype)


def gradients(module, x, change, which):
    """Return states and gradients of a loss of the outputs, one of which was changed in place."""
    torch.manual_seed(1)  # of both dropouts
    states, last = module(x)
    states = states.data if isinstance(states, PackedSequence) else states
    change((states, last)[which])
    (states * states).sum().add(last.sum()).backward()
    return [states.detach(), last.detach(), *(getattr(module, name).grad for name in ("weight_ih_l0", "weight_hh_l0"))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("which", [0, 1], ids=["states", "last"])
def test_outputs_may_be_changed_in_place_where_those_of_torch_nn_rnn_may(draw, form, nonlinearity, change, which):
    ours, x = network(form, nonlinearity), given(draw, form)
    plain = ours.to_plain()
    if change == "detach_" and form == "unbatched":  # views, there as here
        for module in (ours, plain):
            with pytest.raises(RuntimeError, match="detach views"):
                gradients(module, x, CHANGES[change], which)
        return
    found = gradients(ours, x, CHANGES[change], which)
    expected = gradients(plain, x, CHANGES[change], which)
    for f, e in zip(found, expected, strict=True):
        assert (f - e).abs().max() <= 20 * bound(torch.float64) * max(1.0, e.abs().max().item())


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("unbatched", "packed")])
@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
def test_truncated_backpropagation_may_detach_the_state_in_place(draw, form, nonlinearity):
    ours = network(form, nonlinearity).eval()
    plain, chunks = ours.to_plain(), [given(draw, form) for _ in range(3)]
    for module in (ours, plain):
        h = None
        for x in chunks:
            states, h = module(x, h)
            states.square().sum().backward()
            h.detach_()
            states.detach_()
    expected = plain.weight_hh_l0.grad
    assert (ours.weight_hh_l0.grad - expected).abs().max() <= 20 * bound(torch.float64) * expected.abs().max()


@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
@pytest.mark.parametrize("batch", [(4,), ()], ids=["batch", "one"])
def test_a_cells_state_may_be_detached_in_place(draw, nonlinearity, batch):
    ours = UnitaryRNNCell(3, 8, nonlinearity=nonlinearity, dtype=torch.float64)
    plain, inputs = ours.to_plain(), [draw.matrix(*batch, 3, dtype=torch.float64) for _ in range(6)]
    for module in (ours, plain):
        h = None
        for t, x in enumerate(inputs):
            h = module(x, h)
            if t % 2:
                h.square().sum().backward()
                h = h.detach_() if module is ours else h.detach()  # torch's is a view, without a batch
    expected = plain.weight_hh.grad
    assert (ours.weight_hh.grad - expected).abs().max() <= 20 * bound(torch.float64) * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_a_residual_is_added_in_place_between_the_steps_of_a_cell(draw, dtype):
    cell = UnitaryRNNCell(3, 8, nonlinearity="modrelu", dtype=dtype)
    inputs, found = [draw.matrix(4, 3, dtype=dtype) for _ in range(3)], []
    for in_place in (True, False):
        cell.zero_grad()
        h = torch.zeros(4, 8, dtype=dtype)
        for x in inputs:
            new = cell(x, h)
            if in_place:
                new += h
            h = new if in_place else new + h
        h.abs().square().sum().backward()
        found.append([h.detach(), *(p.grad for p in cell.parameters())])
    for f, e in zip(*found, strict=True):
        assert torch.equal(f, e)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_factors_scaled_in_place_leave_the_next_gradient_of_one_graph_alone(draw, dtype):
    """The factors of both gradients share the states that the graph keeps."""
    rnn = network("whole", "modrelu", dtype=dtype)
    states, _ = rnn(given(draw, "whole", dtype))
    loss = (states * draw.matrix(*states.shape, dtype=dtype)).sum().abs()
    states.detach().zero_()
    loss.backward(retain_graph=True)
    first = rnn.weight_hh_l0.grad
    assert isinstance(first, FactoredTensor)
    expected = first.clone()
    nn.utils.clip_grad_norm_([rnn.weight_hh_l0], expected.norm().item() / 4)
    first.mul_(0.5)
    rnn.weight_hh_l0.grad = None
    loss.backward(retain_graph=True)
    assert torch.equal(rnn.weight_hh_l0.grad.clone(), expected)
    loss.backward()
    assert torch.allclose(rnn.weight_hh_l0.grad.clone(), 2 * expected, rtol=bound(torch.float64))


@pytest.mark.parametrize("form", ["whole", "batch_first"])
@pytest.mark.parametrize("nonlinearity", ["relu", "tanh", "modrelu"])
def test_many_gradients_at_once(draw, form, nonlinearity):
    rnn, x = network(form, nonlinearity, n=5), given(draw, form).requires_grad_()
    inputs = [x, *rnn.parameters()]
    last = rnn(x)[1][0, 0]
    found = torch.autograd.grad(last, inputs, torch.eye(5, dtype=last.dtype), is_grads_batched=True, retain_graph=True)
    for i, entry in enumerate(last):
        for f, e in zip(found, torch.autograd.grad(entry, inputs, retain_graph=True), strict=True):
            assert (f[i] - e).abs().max() <= 20 * bound(torch.float64) * max(1.0, e.abs().max().item())

    def states(x):
        return rnn(x)[0]

    jacobian = torch.autograd.functional.jacobian(states, x)
    for options in ({"vectorize": True}, {"vectorize": True, "strategy": "forward-mode"}):
        assert torch.allclose(torch.autograd.functional.jacobian(states, x, **options), jacobian, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("nonlinearity", ["relu", torch.tanh], ids=["relu", "function"])
@pytest.mark.parametrize("kind", [UnitaryRNN, UnitaryRNNCell])
def test_autocast_reaches_neither_network_nor_cell(draw, kind, nonlinearity):
    module, x = kind(3, 8, nonlinearity=nonlinearity), draw.matrix(5, 3, dtype=torch.float32)
    expected = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(x)
    assert torch.equal(found[0], expected[0])
    assert found[0].dtype == torch.float32


@pytest.mark.parametrize("nonlinearity", ["modrelu", "none", "tanh"])
@pytest.mark.parametrize("layers", [1, 2])
def test_packed_complex_sequences_run_as_one_by_one(draw, nonlinearity, layers):
    """To rounding: that of the inputs grows, too, where tanh's argument comes near one of its poles."""
    torch.manual_seed(0)
    dtype = torch.complex128
    rnn = UnitaryRNN(3, 16, layers, nonlinearity, dtype=dtype)
    sequences = [draw.matrix(length, 3, dtype=dtype) for length in (5, 9, 3)]
    packed, _ = pad_packed_sequence(rnn(pack_sequence(sequences, enforce_sorted=False))[0])
    for i, x in enumerate(sequences):
        states = rnn(x)[0]
        moved = (rnn(x * (1 + bound(dtype)))[0] - states).abs().max()
        assert (packed[: len(x), i] - states).abs().max() <= bound(dtype) + 10 * moved
