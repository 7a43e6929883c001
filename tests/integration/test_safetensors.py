"""A file of safetensors holds all of a model, the states of its manifolds too."""

import pytest
import torch
from network import assert_same, batches, seeded
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from projunn_manifold import layers, optim

pytestmark = pytest.mark.integration

LAYERS = {
    "linear": lambda: layers.UnitaryLinear(8, 8),
    "wide": lambda: layers.UnitaryLinear(8, 4),
    "complex": lambda: layers.UnitaryLinear(8, 8, dtype=torch.complex64),
    "recurrent": lambda: layers.UnitaryRNN(3, 8, num_layers=2, bidirectional=True),
    "orthogonal convolution": lambda: layers.OrthogonalConv2d(3, 4, image_size=8),
    "unitary convolution": lambda: layers.UnitaryConv1d(3, 4, image_size=8, dtype=torch.complex64),
    "exponential": lambda: layers.ExpConv2d(3, image_size=8),
    "converted": lambda: layers.unitary_(nn.Linear(8, 8)),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_every_layer_is_saved_and_loaded(make, tmp_path):
    saved, by_dictionary, by_module = make(), make(), make()
    save_file(saved.state_dict(), tmp_path / "dictionary.safetensors")
    save_model(saved, tmp_path / "module.safetensors")
    by_dictionary.load_state_dict(load_file(tmp_path / "dictionary.safetensors"), strict=True)
    load_model(by_module, tmp_path / "module.safetensors", strict=True)
    assert_same(by_dictionary.state_dict(), saved.state_dict())
    assert_same(by_module.state_dict(), saved.state_dict())


def test_a_loaded_model_makes_the_next_step_bit_for_bit(tmp_path):
    model, loaded = seeded(), seeded(1)
    train(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    train(model)
    train(loaded)
    assert_same(loaded.state_dict(), model.state_dict())


def train(model):
    optimizer = optim.RiemannianSGD(model.parameters(), lr=0.05)
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
