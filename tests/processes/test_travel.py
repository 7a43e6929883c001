"""Models as arguments of other processes, in their data loaders, in copies and in files."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import travel

METHODS = ["spawn", "forkserver", "fork"]


def assert_same(found, expected):
    values, *rest = found
    assert len(values) == len(expected[0])
    assert all(np.array_equal(value, own) for value, own in zip(values, expected[0], strict=True))
    assert tuple(rest) == tuple(expected[1:])
    assert rest[-1]


@pytest.mark.parametrize("method", METHODS)
def test_a_process_gets_the_model_and_trains_on_as_here(method):
    made = travel.models()
    expected = {name: travel.described(model) for name, model in made.items()}
    context = mp.get_context(method)
    queue = context.SimpleQueue()
    process = context.Process(target=travel.answer, args=(copy.deepcopy(made), queue))
    process.start()
    answer = queue.get()
    process.join(300)  # a busy machine compiles the loops slowly
    assert not isinstance(answer, str), answer
    assert process.exitcode == 0
    arrived, weight = answer
    assert arrived.keys() == expected.keys()
    for name, found in arrived.items():
        assert_same(found, expected[name])
    travel.train(made["linear"], 3)
    assert np.array_equal(weight, made["linear"].weight.detach().numpy())
    assert made["linear"].manifold.draws()[1] == 6


@pytest.mark.parametrize("method", METHODS)
def test_weights_in_shared_memory_are_trained_elsewhere(method):
    model, here = travel.models()["linear"].share_memory(), travel.models()["linear"]
    process = mp.get_context(method).Process(target=travel.climb, args=(model,))
    process.start()
    process.join(300)  # a busy machine compiles the loops slowly
    assert process.exitcode == 0
    travel.train(here, 2)
    assert torch.equal(model.weight, here.weight)


@pytest.mark.parametrize("method", METHODS)
def test_a_data_loader_has_a_data_set_with_a_model(method):
    data = travel.Rotated()
    loader = torch.utils.data.DataLoader(data, num_workers=1, multiprocessing_context=method)
    rows = list(loader)
    assert len(rows) == 4
    for i, (row, count, attached) in enumerate(rows):
        assert torch.allclose(row[0], data.rotation.weight[:, i] + data.rotation.bias, atol=1e-6)
        assert count.item() == 3
        assert attached.item()


def through_a_file(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_a_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("how", [copy.deepcopy, through_a_pickle, through_a_file])
def test_a_copy_has_all_and_can_be_loaded(how):
    for name, model in travel.models().items():
        other = how(model)
        assert_same(travel.described(other), travel.described(model))
        other.load_state_dict(model.state_dict())
        if name == "linear":
            for each in (model, other):
                travel.train(each, 3)
            assert torch.equal(other.weight, model.weight)
