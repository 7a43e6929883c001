"""Several processes: replicas stay bit-identical, and are one process on the joined batch; only sketches travel.

The oracle is one process that trains on whole batches, in double precision.
"""

import socket

import pytest
import ranks
import torch
import torch.multiprocessing as mp

CASES = [
    (manifold, dtype, optimizer)
    for manifold in ("D", "T")
    for dtype in (torch.float64, torch.complex128)
    for optimizer in ranks.OPTIMIZERS
]
LINEAR = [case for case in CASES if case[2] != "RMSprop"]


def start(function, world, folder, *arguments):
    """Run a function in so many processes; return what each left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(function, (world, port, str(folder), *arguments), nprocs=world)
    return [torch.load(file, weights_only=True) for file in sorted(folder.glob("*.pt"))]


def assert_told(found, expected):
    """Every process told what was expected, by its beginning."""
    for told in found:
        assert len(told) == len(expected)
        for message, beginning in zip(told, expected, strict=True):
            assert message.startswith(beginning), message


def alone(case, steps):
    """One process, on whole batches."""
    torch.set_num_threads(1)
    model, optimizer = ranks.made(case)
    return ranks.train(model, model, optimizer, case[1], steps)


def assert_replicas(found, cases, steps, atol):
    first, *others = found
    for other in others:
        for (weights, _), (same, _) in zip(first, other, strict=True):
            assert all(torch.equal(w, v) for w, v in zip(weights, same, strict=True))
    for case, (weights, _) in zip(cases, first, strict=True):
        for w, v in zip(weights, alone(case, steps), strict=True):
            torch.testing.assert_close(w, v, atol=atol, rtol=0, msg=lambda m, case=case: f"{case}: {m}")


def test_replicas_stay_the_same_and_are_one_process(tmp_path):
    assert_replicas(start(ranks.all_cases, 2, tmp_path, CASES, 20, False), CASES, 20, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_replicas_stay_the_same_over_200_steps(tmp_path, world):
    found = start(ranks.all_cases, world, tmp_path, CASES, 200, False)
    assert_replicas(found, CASES, 200, 1e-6)


def test_sketches_of_the_mean_gradient_are_all_that_travels(tmp_path):
    found = start(ranks.all_cases, 2, tmp_path, LINEAR, 10, True)
    assert_replicas(found, LINEAR, 10, 1e-9)
    for (_, dtype, _), (_, sent) in zip(LINEAR, found[0], strict=True):
        numbers = (12 + 12) * (2 if dtype.is_complex else 1) + 2 * (20 + 12)  # k = 1 and k = 2, for one step
        assert sent == 10 * 8 * numbers


@pytest.mark.slow
def test_sketches_among_four_processes(tmp_path):
    assert_replicas(start(ranks.all_cases, 4, tmp_path, LINEAR, 10, True), LINEAR, 10, 1e-9)


def test_layers_of_every_kind_are_those_of_one_process(tmp_path):
    for found, root, largest_bucket, sent in start(ranks.layers, 2, tmp_path):
        for kind, weights in zip(ranks.LAYERS, found, strict=True):
            for w, v in zip(weights, ranks.train_layer(kind)[0], strict=True):
                torch.testing.assert_close(w, v, atol=1e-9, rtol=0, msg=lambda m, kind=kind: f"{kind}: {m}")
        for w, v in zip(root, ranks.train_layer("recurrent")[0], strict=True):
            torch.testing.assert_close(w, v, atol=1e-9, rtol=0)
        assert largest_bucket < 64 * 64  # the recurrent gradient is not among what torch averages
        assert sent == 4 * 8 * (64 + 64)


def test_parameters_without_a_gradient_stay(tmp_path):
    (first, here), (second, there) = start(ranks.unused, 2, tmp_path)
    assert first == second == [False, True, True]
    assert all(torch.equal(w, v) for w, v in zip(here, there, strict=True))


def test_a_matrix_of_a_stack_that_is_idle_in_one_process_moves_in_all(tmp_path):
    first, second = start(ranks.idle_matrices, 2, tmp_path)
    assert torch.equal(first, second)
    assert (first - ranks.idle_matrices(0, 1, None, None)).abs().max() < 1e-9


def test_what_cannot_be_exchanged_is_refused(tmp_path):
    expected = [
        "TypeError: 0.weight: the sampler Column",
        "TypeError: 0.weight: the sampler <function svd",
        "TypeError: RMSprop is not linear",
        "ValueError: feedback=True of RiemannianSGD",
        "ValueError: the optimiser does not have 0.weight, 2.weight",
        "ValueError: shape, dtype, manifold, seed or count of 0.weight differs",
        "ValueError: weight decay",
        "ValueError: a closure",
    ]
    assert_told(start(ranks.refusals, 2, tmp_path), expected)


@pytest.mark.parametrize("exchanged", [False, True])
def test_a_gradient_that_is_not_finite_is_refused_by_all(tmp_path, exchanged):
    (told, kept, here), (also, as_well, there) = start(ranks.one_gradient_is_not_finite, 2, tmp_path, exchanged)
    assert "finite" in told
    assert "finite" in also
    assert kept
    assert as_well
    assert torch.equal(here, there)  # after more steps


def test_a_process_that_dies_does_not_leave_the_others_waiting(tmp_path):
    ((told, seconds),) = start(ranks.one_dies, 2, tmp_path)
    assert "by peer" in told
    assert seconds < 15  # the group's time limit
