"""TensorBoard draws the histogram of a gradient that is never formed, and leaves the gradient as it is."""

import pytest
import torch
from network import assert_same, batches, seeded
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from projunn_manifold import monitor, optim
from projunn_manifold.layers import UnitaryRNN
from projunn_manifold.sketching.factored_tensor import FactoredTensor

pytestmark = pytest.mark.integration


def write_histograms(folder, model):
    """Write the histograms of all weights and gradients."""
    with SummaryWriter(folder) as writer:
        for name, p in model.named_parameters():
            writer.add_histogram(name, p)
            writer.add_histogram(f"{name}.grad", p.grad)


def write_numbers(writer, model, optimizer, step):
    """Write what `monitor` returns."""
    for name, value in monitor(model, optimizer).items():
        writer.add_scalar(name, value, step)


def test_the_numbers_of_a_run_are_written(tmp_path):
    model = seeded()
    optimizer = optim.RiemannianSGD(model.parameters(), lr=0.05)
    expected = []
    with SummaryWriter(tmp_path) as writer:
        for step, (x, y) in enumerate(batches()):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
            write_numbers(writer, model, optimizer, step)
            expected.append(monitor(model, optimizer))
    read = EventAccumulator(str(tmp_path)).Reload()
    assert set(read.Tags()["scalars"]) == set(expected[0])
    for name in expected[0]:
        assert [event.value for event in read.Scalars(name)] == pytest.approx([each[name] for each in expected])


def test_histograms_are_those_of_the_dense_gradients(tmp_path):
    torch.manual_seed(0)
    network = UnitaryRNN(3, 64, nonlinearity="tanh")
    plain = network.to_plain().double()
    x = torch.randn(20, 4, 3)
    network(x)[0].square().sum().backward()
    plain(x.double())[0].square().sum().backward()
    assert isinstance(network.weight_hh_l0.grad, FactoredTensor)
    write_histograms(tmp_path, network)
    read = EventAccumulator(str(tmp_path)).Reload()
    for name, p in network.named_parameters():
        for tag, dense in ((name, p.detach()), (f"{name}.grad", plain.get_parameter(name).grad)):
            (event,) = read.Histograms(tag)
            found, dense = event.histogram_value, dense.double()
            size = dense.square().sum().item()
            assert found.num == dense.numel()
            assert sum(found.bucket) == dense.numel()
            expected = [dense.min().item(), dense.max().item(), size, dense.sum().item()]
            actual = [found.min, found.max, found.sum_squares, found.sum]
            assert actual[:3] == pytest.approx(expected[:3], rel=1e-4)  # float32, summed over time steps
            assert actual[3] == pytest.approx(expected[3], abs=1e-4 * (size * dense.numel()) ** 0.5)


def test_a_run_that_is_watched_makes_the_same_steps(tmp_path):
    watched, alone = seeded(), seeded()
    for model in (watched, alone):
        optimizer = optim.RiemannianAdam(model.parameters(), lr=0.05)
        for step, (x, y) in enumerate(batches()):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            if model is watched:
                write_histograms(tmp_path / str(step), model)
            optimizer.step()
    assert_same(watched.state_dict(), alone.state_dict())
