"""Exported layers: graphs of ATen operators with the same values for any batch, which run without this package."""

import subprocess
import sys
import warnings

import pytest
import torch
from helpers import bound
from torch import nn

from projunn_manifold.layers import (
    ExpConv1d,
    ExpConv2d,
    OrthogonalConv2d,
    UnitaryConv2d,
    UnitaryConvRNN,
    UnitaryLinear,
    UnitaryRNN,
    UnitaryRNNCell,
)
from projunn_manifold.sketching.factored_tensor import FactoredTensor

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # torch's own
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python:torch.jit.TracerWarning"),  # torch.nn.RNN's, too
]

REAL, COMPLEX = torch.float32, torch.complex64
NETWORKS = {
    "modrelu": (lambda: UnitaryRNN(3, 8), REAL, (5, 2, 3), 1),
    "relu, wide": (lambda: UnitaryRNN(3, 64, nonlinearity="relu"), REAL, (5, 2, 3), 1),
    "layers": (lambda: UnitaryRNN(3, 8, 2, "tanh", batch_first=True, dropout=0.5), REAL, (2, 5, 3), 0),
    "function": (lambda: UnitaryRNN(3, 8, nonlinearity=torch.sin), REAL, (5, 2, 3), 1),
    "complex": (lambda: UnitaryRNN(3, 8, dtype=COMPLEX), COMPLEX, (5, 2, 3), 1),
    "cell": (lambda: UnitaryRNNCell(3, 8), REAL, (2, 3), 0),
    "linear": (lambda: UnitaryLinear(3, 5), REAL, (2, 3), 0),
    "convolution": (lambda: OrthogonalConv2d(3, 4, image_size=4), REAL, (2, 3, 4, 4), 0),
    "wide convolution": (lambda: OrthogonalConv2d(64, 64, image_size=3), REAL, (2, 64, 3, 3), 0),
    "complex convolution": (lambda: UnitaryConv2d(2, 3, image_size=4), COMPLEX, (2, 2, 4, 4), 0),
    "exponential": (lambda: ExpConv2d(2, image_size=4, kernel_size=3), REAL, (2, 2, 4, 4), 0),
    "exponential, one channel": (lambda: ExpConv1d(1, image_size=6, kernel_size=3), REAL, (2, 1, 6), 0),
    "convolutional network": (lambda: UnitaryConvRNN(1, image_size=4, kernel_size=3), REAL, (3, 2, 1, 4, 4), 1),
    "complex cell": (lambda: UnitaryRNNCell(3, 8, nonlinearity="tanh", dtype=COMPLEX), COMPLEX, (2, 3), 0),
}


def made(draw, name):
    """Return a network, an input, an input with another batch, and that input's states."""
    make, dtype, shape, batch = NETWORKS[name]
    torch.manual_seed(0)
    module, wider = make().eval(), list(shape)
    wider[batch] = 7
    x, y = draw.matrix(*shape, dtype=dtype), draw.matrix(*wider, dtype=dtype)
    return module, x, y, first(module(y)).detach(), batch


def first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@pytest.mark.parametrize("gradients", [True, False], ids=["", "no_grad"])
def test_torch_export(draw, name, strict, gradients):
    torch.compiler.reset()
    module, x, y, expected, batch = made(draw, name)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(module, (x,), dynamic_shapes=({batch: torch.export.Dim("batch")},), strict=strict)
    assert (first(program.module()(y)) - expected).abs().max() <= bound(REAL)
    for graph in (program.graph, program.run_decompositions().graph):
        called = [node.target for node in graph.nodes if node.op == "call_function"]
        assert {f.namespace for f in called if isinstance(f, torch._ops.OpOverload)} == {"aten"}
        others = {f.__name__ for f in called if not isinstance(f, torch._ops.OpOverload)}
        assert others <= {"getitem", "mul", "eq", "ge", "le"}  # of lists and of sizes


@pytest.mark.parametrize("name", NETWORKS)
def test_torch_jit_trace(draw, name):
    module, x, y, expected, _ = made(draw, name)
    traced = torch.jit.trace(module, (x,))
    assert "prim::PythonOp" not in {node.kind() for node in traced.inlined_graph.nodes()}
    assert (first(traced(y)) - expected).abs().max() <= bound(REAL)


def test_an_exported_network_can_be_trained_with_dense_gradients(draw):
    module, x, _, _, _ = made(draw, "relu, wide")
    weight, gradients = module.weight_hh_l0, []
    for network in (module, torch.export.export(module, (x,)).module()):  # they share their weights
        weight.grad = None
        network(x)[0].square().sum().backward()
        gradients.append(weight.grad)
    expected, found = gradients
    assert isinstance(expected, FactoredTensor)
    assert not isinstance(found, FactoredTensor)
    assert (found - expected).abs().max() <= bound(REAL) * found.abs().max()


ELSEWHERE = """
import sys
for name in ("projunn_manifold", "geoopt"):
    sys.modules[name] = None  # cannot be imported
import torch
folder = sys.argv[1]
x, expected = torch.load(folder + "/data.pt")
for network in (torch.export.load(folder + "/program.pt2").module(), torch.jit.load(folder + "/traced.pt")):
    torch.testing.assert_close(network(x)[0], expected)
"""


def test_what_was_exported_loads_without_this_package(draw, tmp_path):
    module, x, _, _, _ = made(draw, "modrelu")
    torch.save((x, module(x)[0].detach()), tmp_path / "data.pt")
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "program.pt2")
    torch.jit.save(torch.jit.trace(module, (x,)), tmp_path / "traced.pt")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_traced_packed_sequence_has_any_batch(bidirectional):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = UnitaryRNN(3, 6, bidirectional=bidirectional)

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            states, last = self.network(packed)
            return states.data, last

    module = Packed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, (torch.randn(4, 1, 3), torch.tensor([4])))
        for lengths in ([4], [4, 2, 3]):
            x = torch.randn(4, len(lengths), 3)
            for found, expected in zip(traced(x, torch.tensor(lengths)), module(x, torch.tensor(lengths)), strict=True):
                assert torch.allclose(found, expected, atol=1e-6)
