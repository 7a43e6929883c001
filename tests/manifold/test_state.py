"""The count of gradients and of faults: what draws follow from, and how it travels."""

import copy
import pickle

import pytest
import torch
from geoopt import ManifoldParameter

from projunn_manifold import UnitaryLowRank
from projunn_manifold.manifold.state import Faults, State, counts_of, digits_of

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


def copies(state):
    """All ways in which a state travels."""
    loaded = State(7)
    loaded.adopt(counts_of(digits_of(state.counts()), "state"))
    return loaded, copy.deepcopy(state), pickle.loads(pickle.dumps(state))


def test_it_travels_in_state_dicts_copies_and_pickles():
    state = State(7)
    state.count_gradient(torch.eye(2))
    state.count_faults(CPU, skipped=2, uncorrected=torch.tensor(3), shortened=4)
    for other in copies(state):
        assert other.stamp == state.stamp
        assert other.faults() == Faults(2, 3, 4)
        assert torch.equal(drawn(other), drawn(state))
    state.forget_faults()
    assert state.faults() == Faults(0, 0, 0)
    assert state.gradients == 1


def test_a_pickle_holds_no_tensor():
    state = UnitaryLowRank(2)._state
    state.count_faults(CPU, skipped=1)
    content = state.__getstate__()
    assert content["counts"] == (0, 1, 1, 0, 0)
    assert {type(number) for number in content["counts"]} == {int}


DTYPES = [
    torch.int64, torch.int32, torch.int16, torch.uint8, torch.float64, torch.float32, torch.float16, torch.bfloat16
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "numbers", [(0, 1, 0, 0, 0), (65_505, 3, 255, 256, 1), (2**53 - 1, 2**31, 100_000, 70_000, 9)], ids=str
)
def test_digits_survive_every_dtype(numbers, dtype):
    digits = digits_of(numbers)
    assert digits.dtype == torch.int64
    assert counts_of(digits.to(dtype), "state") == list(numbers)


def test_the_largest_count_of_64_bits_survives_as_integers():
    assert counts_of(digits_of([2**63 - 1, 1, 0, 0, 0]), "state")[0] == 2**63 - 1


@pytest.mark.parametrize(
    ("counts", "weights", "expected"),
    [
        ((3, 4), (0.5, 0.5), 4),
        ((255, 256), (0.5, 0.5), 256),
        ((100_000, 70_000), (0.5, 0.5), 85_000),
        ((1, 1, 2), (1 / 3, 1 / 3, 1 / 3), 2),
        ((255, 300), (-0.5, 1.5), 323),  # extrapolated, as task vectors are: 322.5
    ],
)
def test_combinations_of_digits_are_those_of_the_numbers_rounded_up(counts, weights, expected):
    digits = [w * digits_of([count, 1, 0, 0, 0]).double() for count, w in zip(counts, weights, strict=True)]
    assert counts_of(sum(digits), "state")[:2] == [expected, 1]


@pytest.mark.parametrize(
    ("digits", "message"),
    [
        (None, "got None"),
        (torch.zeros(32, dtype=torch.uint8), r"got torch.uint8 \(32,\) on cpu"),
        (torch.zeros(5, 8, dtype=torch.complex64), "a real tensor"),
        (torch.zeros(5, 8, device="meta"), "on meta"),
        (digits_of([1, 1, 0, 0, 0]).float() * float("inf"), "hold finite"),
        (digits_of([1, 1, 0, 0, 0]).float() * float("nan"), "hold finite"),
        (digits_of([2**63 - 1, 1, 0, 0, 0]) + 1, "hold counts"),
    ],
)
def test_what_is_no_state_is_refused_by_name(digits, message):
    manifold = UnitaryLowRank()
    manifold._state.gradients = 5
    with pytest.raises(ValueError, match=f"'state' must (be .*)?{message}"):
        manifold.set_extra_state(digits)
    with pytest.raises(ValueError, match=f"'0._extra_state' must (be .*)?{message}"):
        torch.nn.Sequential(manifold).load_state_dict({"0._extra_state": digits})
    assert manifold._state.gradients == 5


def test_a_difference_of_counts_is_no_less_than_a_count_can_be():
    ahead, behind = (digits_of([count, 2, 0, 0, 0]) for count in (300, 5))
    assert counts_of(behind - ahead, "state") == [0, 1, 0, 0, 0]


def test_an_average_takes_the_larger_counts():
    ahead, behind = State(1), State(1)
    ahead.adopt((9, 2, 1, 1, 1))
    behind.adopt((4, 3, 5, 0, 2))
    behind.catch_up(ahead)
    assert behind.counts() == (9, 3, 5, 0, 2)
    behind.catch_up(State(1))
    assert behind.counts() == (9, 3, 5, 0, 2)
