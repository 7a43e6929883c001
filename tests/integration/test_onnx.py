"""What is exported to ONNX gives the values of the model, for any batch.

Values are of order 1, and 1e-5 allows for float32 sums in another order.
"""

import onnxruntime
import pytest
import torch
from network import seeded
from torch import nn

from projunn_manifold import fold, layers, unitarize

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights.*"),  # of torch.nn.RNN
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export"),
    pytest.mark.filterwarnings("ignore:The feature will be removed"),
    pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size other than 1"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def trained():
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.Tanh(), nn.Linear(16, 16))


def unitarized():
    model = trained()
    unitarize(model, inputs=torch.randn(2, 3, 6, 6))
    return model


def recurrent(**options):
    return layers.UnitaryRNN(3, 8, batch_first=True, **options)


MODELS = {
    "folded": (lambda: fold(unitarized()), (3, 6, 6)),
    "network": (seeded, (6, 3)),
    "modrelu": (recurrent, (6, 3)),
    "relu": (lambda: recurrent(nonlinearity="relu"), (6, 3)),
    "tanh": (lambda: recurrent(nonlinearity="tanh", num_layers=2, bidirectional=True), (6, 3)),
    "plain": (lambda: recurrent(nonlinearity="relu").to_plain(), (6, 3)),
    "wide": (lambda: layers.UnitaryLinear(8, 4), (8,)),
    "tall": (lambda: layers.UnitaryLinear(4, 8), (4,)),
    "converted": (lambda: layers.unitary_(nn.Linear(8, 8)), (8,)),
}


def export(model, x, file):
    """Write a model to a file, for any batch, and return what was written."""
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, (x,), dynamic_shapes=(batch,))
    torch.onnx.export(program, f=file, external_data=False)
    return program


def run(file, x):
    """Run an exported model."""
    session = onnxruntime.InferenceSession(file)
    return [torch.from_numpy(array) for array in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


@pytest.mark.parametrize(("make", "shape"), MODELS.values(), ids=MODELS)
def test_onnxruntime_has_the_values_of_torch(make, shape, tmp_path):
    model, x = make().eval(), torch.randn(4, *shape)
    program = export(model, x, file := tmp_path / "model.onnx")
    for batch in (x, torch.randn(7, *shape)):
        compare(program.module()(batch), model(batch))
        compare(run(file, batch), model(batch))


@pytest.mark.parametrize(("make", "shape"), MODELS.values(), ids=MODELS)
def test_the_older_exporter_knows_the_operators(make, shape, tmp_path):
    model, x = make().eval(), torch.randn(4, *shape)
    axes = {"x": {0: "batch"}}
    torch.onnx.export(model, (x,), file := tmp_path / "old.onnx", dynamo=False, input_names=["x"], dynamic_axes=axes)
    for batch in (x, torch.randn(7, *shape)):
        compare(run(file, batch), model(batch))


def compare(actual, expected):
    actual, expected = (tuple(out) if isinstance(out, list | tuple) else (out,) for out in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
