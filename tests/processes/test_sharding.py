"""Sharded parameters: the same steps as those of whole matrices, and only thin matrices travel.

The oracle is one process that has whole matrices and the same gradients, in double precision.
"""

import itertools

import geoopt
import pytest
import shards
import torch
from test_distributed import assert_told, start

REAL, COMPLEX = torch.float64, torch.complex128
CASES = [
    *((manifold, dtype, "lsi", name) for manifold in "DT" for dtype in (REAL, COMPLEX) for name in ("SGD", "Adam")),
    *(("D", REAL, "subspace", name) for name in shards.OPTIMIZERS),
    *(("T", COMPLEX, "lsi", name) for name in ("RMSprop", "feedback")),
]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shards_step_as_whole_matrices(tmp_path, world):
    found = start(shards.all_cases, world, tmp_path, CASES)
    for index, case in enumerate(CASES):
        expected = shards.alone(case)
        for weights in found:
            for w, v in zip(weights[index], expected, strict=True):
                torch.testing.assert_close(w, v, atol=1e-9, rtol=0, msg=lambda m, case=case: f"{case}: {m}")


def test_stacks_replicas_and_replicas_of_shards(tmp_path):
    cases = list(itertools.product(shards.PLACED, (REAL, COMPLEX), ("SGD", "momentum", "Adam", "feedback")))
    found = start(shards.stacks_and_meshes, 2, tmp_path, cases)
    for index, ((shape, _, _), dtype, name) in enumerate(cases):
        manifold, value = shards.parameter(shape, dtype)
        p = geoopt.ManifoldParameter(value.clone(), manifold=manifold)
        shards.stepped(p, shards.OPTIMIZERS[name]([p]), value, shards.STEPS)
        for weights in found:
            torch.testing.assert_close(weights[index], p.detach().as_subclass(torch.Tensor), atol=1e-9, rtol=0)


def test_a_step_never_gathers_the_matrix(tmp_path):
    n, k = 64, 2
    for counts in start(shards.counted, 2, tmp_path, n, k):
        for sent, hidden in counts.values():
            assert hidden == len(sent)  # DTensor makes none by itself
            assert max(sent) <= 4 * k * n
        steepest = counts["SGD"][0]
        assert sum(size for size in steepest if size >= n) == 5 * k * n  # y, b, X b and X^H [X b, a]


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_a_checkpoint_goes_on_among_another_number_of_processes(tmp_path, before, after):
    names, half = ("momentum", "Adam", "feedback"), shards.STEPS // 2
    checkpoint, *folders = [tmp_path / part for part in ("checkpoint", "first", "second")]
    for folder in folders:
        folder.mkdir()
    start(shards.saved, before, folders[0], str(checkpoint), names, 0, half)
    found = start(shards.saved, after, folders[1], str(checkpoint), names, half, shards.STEPS)
    for name, weights in zip(names, found[0], strict=True):
        for w, v in zip(weights, shards.alone(("D", REAL, "lsi", name)), strict=True):
            torch.testing.assert_close(w, v, atol=1e-9, rtol=0)


def test_a_gradient_that_is_not_finite_anywhere_is_refused_by_all(tmp_path):
    first, second = start(shards.faults, 2, tmp_path, [(12, 12), (5, 6, 6)])
    for (here, kept, stamp), (there, as_well, same) in zip(first, second, strict=True):
        assert "finite" in here
        assert "finite" in there
        assert kept
        assert as_well
        assert stamp == same
        assert stamp[1] == 2


def test_what_cannot_be_sharded_or_would_leave_the_manifold_is_refused(tmp_path):
    expected = [
        "NotImplementedError: 'weight' is placed as (Shard(dim=1),)",
        "NotImplementedError: 'weight' has sharded rows, but UnitaryLowRank",
        "NotImplementedError: 'weight' has sharded rows, but the sampler Column",
        "ValueError: the processes that share a parameter differ in the seed or count",
        "NotImplementedError: 'weight' is a DTensor, which cannot carry",
        "ValueError: the processes that share a parameter differ in the seed or count",
        "TypeError: SGD would move a sharded unitary parameter",
        "ValueError: RiemannianSGD moves 'weight' as Euclidean",
        "TypeError: RiemannianSGD would move a sharded unitary parameter",
        "ValueError: SGD moves 'weight' as Euclidean",
        "TypeError: SGD would move a sharded unitary parameter",
        "ValueError: stabilize",
        "ValueError: manifolds lost: 'weight' is a plain DTensor, not on UnitaryLowRank",
        "ValueError: sharded parameters, and none of them on a manifold",
        "ValueError: sharded parameters, and none of them on a manifold",
    ]
    assert_told(start(shards.refusals, 2, tmp_path), expected)


def test_gradients_that_are_placed_otherwise_are_brought_there(tmp_path):
    manifold, value = shards.parameter((12, 12), REAL)
    expected = manifold.step_(value.clone(), shards.gradient(value, 0), 0.05)
    for found in start(shards.gradients_placed_otherwise, 2, tmp_path):
        for weight in found:
            torch.testing.assert_close(weight, expected, atol=1e-9, rtol=0)


def test_a_model_that_was_made_unitary_is_sharded_as_any_other(tmp_path):
    names = ("momentum", "Adam", "RMSprop")
    found = start(shards.existing, 2, tmp_path, names)
    for index, name in enumerate(names):
        expected = shards.unitarized_alone(name)
        for told, weights in (process[index] for process in found):
            assert "lost its manifold: 'FSDPLinear.weight' of shape (9, 9), 'FSDPLinear.weight' of shape (13" in told
            for w, v in zip(weights, expected, strict=True):
                torch.testing.assert_close(w, v, atol=1e-9, rtol=0)


def test_a_sharded_layer_that_is_converted_keeps_its_manifold(tmp_path):
    told = ("torch.float64", (8, 8), None, "RiemannianSGD", ("sharded",))
    assert start(shards.conversions, 2, tmp_path) == [told] * 2


@pytest.mark.parametrize("world", [1, 2])
def test_the_states_of_a_sharded_recurrent_network_may_be_changed_in_place(tmp_path, world):
    for found in start(shards.recurrent, world, tmp_path, 2):
        for batch_first, gradients in zip((False, True), found, strict=True):
            network, x = shards.recurrent_network(2, batch_first)
            shards.recurrent_loss(network, x, False).backward()
            for g, p in zip(gradients, network.parameters(), strict=True):
                torch.testing.assert_close(g, p.grad.clone(), atol=1e-9, rtol=1e-9)
