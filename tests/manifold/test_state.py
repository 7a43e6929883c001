"""The count of gradients and of faults: what draws follow from, and how it travels."""

import copy
import pickle

import pytest
import torch
from geoopt import ManifoldParameter

from projunn_manifold import UnitaryLowRank
from projunn_manifold.manifold.state import Faults, State

CPU = torch.device("cpu")


def drawn(state, purpose=0, ahead=0):
    return torch.randn(5, generator=state.generator(CPU, purpose, ahead))


def test_draws_follow_from_seed_count_and_purpose_alone():
    state, x = State(3), torch.eye(4)
    first = drawn(state)
    assert torch.equal(drawn(state), first)
    assert not torch.equal(drawn(state, purpose=1), first)
    assert not torch.equal(drawn(State(4)), first)
    later = drawn(state, ahead=1)
    state.count_gradient(x)
    assert torch.equal(drawn(state), later)
    assert state.stamp == (State(3).stamp[0], 1)
    assert torch.equal(drawn(State(-1)), drawn(State(2**64 - 1)))


def test_turns_are_counted_for_each_of_the_parameters_that_share_a_state():
    manifold = UnitaryLowRank(1)
    ps = [ManifoldParameter(manifold.random(4, 4), manifold=manifold) for _ in range(3)]
    state = State(0)
    for _ in range(4):
        for p in ps:
            assert state.is_new(p) == (state.gradients < 3)
            state.count_gradient(p)
    assert (state.gradients, state.turn()) == (12, 4)
    assert not state.is_new(torch.eye(4))


def test_it_travels_as_bytes_copies_and_pickles():
    state = State(7)
    state.count_gradient(torch.eye(2))
    state.count_faults(CPU, skipped=2, uncorrected=torch.tensor(3))
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), State(7)):
        other.unpack(state.packed())
        assert other.stamp == state.stamp
        assert other.faults() == Faults(2, 3)
        assert torch.equal(drawn(other), drawn(state))
    state.forget_faults()
    assert state.faults() == Faults(0, 0)
    assert state.gradients == 1


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (None, "NoneType"),
        (torch.zeros(3, dtype=torch.uint8), r"torch.uint8 \(3,\)"),
        (torch.tensor([-1, 1, 0, 0]).view(torch.uint8), "must hold counts"),
        (torch.tensor([1, 0, 0, 0]).view(torch.uint8), "must hold counts"),
    ],
)
def test_what_is_no_state_is_refused(packed, message):
    state = State(0)
    with pytest.raises(ValueError, match=message):
        state.unpack(packed)
    assert state.gradients == 0
