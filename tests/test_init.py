"""Initialisers: points of the manifold, of the law they promise, drawn from torch's default generator."""

import math

import geoopt
import pytest
import torch
from helpers import DTYPES, SHAPES, bound, double, error

from projunn_manifold import UnitaryLowRank, init, reference

RANDOM = [init.haar_, init.henaff_, init.cayley_]


def applicable(initialise, shape):
    return shape[-1] == shape[-2] or initialise in (init.haar_, init.identity_, init.nearest_unitary_)


@pytest.mark.parametrize("initialise", [*RANDOM, init.identity_, init.nearest_unitary_])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_initialiser_fills_in_place_with_a_point(draw, initialise, shape, dtype):
    tensor = draw.matrix(*shape, dtype=dtype)
    if not applicable(initialise, shape):
        with pytest.raises(ValueError, match="must be square"):
            initialise(tensor)
        return
    assert initialise(tensor) is tensor
    gram = double(tensor).mH @ double(tensor)
    assert error(gram, torch.eye(shape[-1], dtype=gram.dtype).expand_as(gram)) <= bound(dtype)


@pytest.mark.parametrize("initialise", RANDOM)
def test_random_ones_draw_from_torchs_generator_or_a_given_one(initialise):
    torch.manual_seed(1)
    first, second = initialise(torch.empty(7, 7)), initialise(torch.empty(7, 7))
    torch.manual_seed(1)
    assert torch.equal(initialise(torch.empty(7, 7)), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    given = [initialise(torch.empty(7, 7), generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    assert torch.equal(*given)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("n", [6, 7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize(
    ("initialise", "low", "high"), [(init.henaff_, -math.pi, math.pi), (init.cayley_, -math.pi / 2, 0.0)]
)
def test_blocks_are_rotations_by_angles_of_the_promised_range(initialise, low, high, n, dtype):
    matrices = initialise(torch.empty(500, n, n, dtype=dtype), generator=torch.Generator().manual_seed(0))
    matrices = matrices.real
    pairs = torch.arange(0, n - 1, 2)
    angles = torch.atan2(matrices[:, pairs + 1, pairs], matrices[:, pairs, pairs])
    assert angles.min() >= low
    assert angles.max() <= high
    spread = high - low
    assert abs(angles.mean().item() - (low + high) / 2) < 5 * spread / math.sqrt(12 * angles.numel())
    assert angles.var().item() == pytest.approx(spread**2 / 12, rel=0.1)
    rebuilt = torch.zeros(500, n, n, dtype=torch.float64)
    rebuilt[:, pairs + 1, pairs], rebuilt[:, pairs, pairs + 1] = angles, -angles
    assert error(matrices, torch.linalg.matrix_exp(rebuilt)) <= bound(torch.float64)


def test_cayley_is_the_cayley_transform_of_the_skew_blocks():
    """(I - A)(I + A)^-1 with blocks [[0, -t], [t, 0]], t = tan(θ/2), rotates by -θ: scoRNN's start."""
    matrix = init.cayley_(torch.empty(4, 4, dtype=torch.float64))
    theta = -torch.atan2(matrix[[1, 3], [0, 2]], matrix[[0, 2], [0, 2]])
    skew = torch.zeros(4, 4, dtype=torch.float64)
    skew[[1, 3], [0, 2]], skew[[0, 2], [1, 3]] = (theta / 2).tan(), -(theta / 2).tan()
    eye = torch.eye(4, dtype=torch.float64)
    assert error(matrix, (eye - skew) @ torch.linalg.inv(eye + skew)) <= bound(torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 9), (3, 12, 5)], ids=str)
def test_nearest_unitary_is_the_polar_factor(draw, shape, dtype):
    tensor = draw.matrix(*shape, dtype=dtype)
    smallest = torch.linalg.svdvals(double(tensor)).min().item()
    expected = reference.polar(double(tensor))
    assert error(init.nearest_unitary_(tensor), expected) <= bound(dtype, 5.0, smallest)


def test_identity_draws_nothing_and_parameters_can_be_initialised():
    state = torch.get_rng_state()
    w = geoopt.ManifoldParameter(init.identity_(torch.empty(2, 5, 3)), manifold=UnitaryLowRank())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(w.detach()[1], torch.eye(5)[:, :3])
    assert init.haar_(w) is w
    assert w.requires_grad
    assert w.grad_fn is None


@pytest.mark.parametrize("initialise", [*RANDOM, init.identity_, init.nearest_unitary_])
def test_bad_tensors_are_refused(initialise):
    for tensor, kind, message in (
        (torch.ones(2, 3), ValueError, "square or tall"),
        (torch.ones(3), ValueError, "at least 2"),
        (torch.ones(3, 3, dtype=torch.int64), TypeError, "float32"),
        (torch.ones(3, 3, dtype=torch.bfloat16), TypeError, "autocast"),
    ):
        kept = tensor.clone()
        with pytest.raises(kind, match=message):
            initialise(tensor)
        assert torch.equal(tensor, kept)


def test_nearest_unitary_refuses_what_has_no_unique_answer():
    for tensor, message in ((torch.ones(3, 3), "rank deficient"), (torch.full((2, 2), math.inf), "non-finite")):
        with pytest.raises(ValueError, match=message):
            init.nearest_unitary_(tensor)
