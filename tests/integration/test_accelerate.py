"""Accelerate wraps a model and its optimiser, accumulates gradients, and saves and loads the state of both."""

import accelerate
import geoopt
import pytest
import torch
from network import assert_same, assert_unitary, batches, seeded
from torch import nn

from projunn_manifold import check_manifolds, manifolds_of, optim

pytestmark = pytest.mark.integration


def constrained(parameters):
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    optim.constrain(optimizer)
    return optimizer


OPTIMIZERS = {
    "in place": lambda ps: optim.RiemannianAdam(ps, lr=0.05),
    "geoopt": lambda ps: geoopt.optim.RiemannianSGD(ps, lr=0.05, momentum=0.9),
    "constrained": constrained,
}


def train(accelerator, model, optimizer, loader):
    """Train for one epoch."""
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.mse_loss(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()


def prepared(make, seed=0):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = seeded(seed)
    return accelerator, *accelerator.prepare(model, make(model.parameters()), batches())


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_epoch_is_that_of_a_plain_loop(make):
    accelerator, model, optimizer, loader = prepared(make)
    train(accelerator, model, optimizer, loader)
    check_manifolds(model, manifolds_of(seeded()), optimizer)
    plain = seeded()
    own = make(plain.parameters())
    for index, (x, y) in enumerate(batches()):
        (nn.functional.mse_loss(plain(x), y) / 2).backward()
        if index % 2:
            nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            own.step()
            own.zero_grad()
    assert_unitary(model)
    assert_same(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("name", ["in place", "constrained"])
def test_a_run_goes_on_from_a_saved_state_bit_for_bit(name, tmp_path):
    make = OPTIMIZERS[name]
    accelerator, model, optimizer, loader = prepared(make)
    train(accelerator, model, optimizer, loader)
    accelerator.save_state(tmp_path)
    train(accelerator, model, optimizer, loader)
    again, loaded, its_optimizer, loader = prepared(make, seed=1)
    again.load_state(tmp_path)
    train(again, loaded, its_optimizer, loader)
    assert_unitary(loaded)
    assert_same(loaded.state_dict(), model.state_dict())


def test_a_saved_model_is_loaded_by_name(tmp_path):
    accelerator, model, optimizer, loader = prepared(OPTIMIZERS["in place"])
    train(accelerator, model, optimizer, loader)
    accelerator.save_model(model, tmp_path)
    loaded = seeded(1)
    accelerate.load_checkpoint_in_model(loaded, tmp_path, strict=True)
    assert_same(loaded.state_dict(), model.state_dict())
    check_manifolds(loaded, manifolds_of(model))
