"""Messages about arguments: what came, and what was expected."""

import warnings

import numpy as np
import pytest
import torch

from projunn_manifold import UnitaryLowRank, validation


@pytest.mark.parametrize(
    ("check", "kind", "message"),
    [
        (lambda: validation.check_point([1.0]), TypeError, "`x` must be a torch.Tensor, got list"),
        (lambda: validation.check_point(torch.ones(3)), ValueError, r"at least 2 dimensions .* got shape \(3,\)"),
        (lambda: validation.check_point(torch.ones(2, 3)), ValueError, r"square or tall.* got shape \(2, 3\)"),
        (lambda: validation.check_point(torch.ones(3, 0)), ValueError, "must not be empty"),
        (lambda: validation.check_point(torch.ones(3, 2).half()), TypeError, "float16; keep the parameter in float32"),
        (lambda: validation.check_point(torch.ones(3, 2).int()), TypeError, "int32$"),
        (lambda: validation.check_rate(1j, "lr", torch.eye(2)), TypeError, "must be a number or a tensor, got 1j"),
        (lambda: validation.check_rate(True, "lr", torch.eye(2)), TypeError, "got True"),
        (lambda: validation.check_rate(torch.ones(3), "lr", torch.eye(2)), ValueError, r"shape \(\) or \(\)"),
        (lambda: validation.check_rate(torch.tensor(1j), "lr", torch.eye(2)), TypeError, "must be real"),
        (
            lambda: validation.check_count(0, "k", "full rank"),
            ValueError,
            "k must be an int >= 1, or None for full rank",
        ),
        (lambda: validation.check_count(1.0, "k", "full rank"), TypeError, "got 1.0 of type float"),
        (lambda: validation.check_seed("a"), TypeError, "seed must be an int"),
        (lambda: validation.check_seed(2**64), ValueError, "fit in 64 bits"),
        (lambda: validation.check_writable(torch.ones(1, 2).expand(2, 2)), ValueError, "expanded"),
        (lambda: validation.check_positive("size", 0), ValueError, "size must be an int >= 1, got 0"),
        (lambda: validation.sides_of((3, 3, 3), 2), ValueError, "an int or 2 of them"),
        (lambda: validation.check_same_matrix(torch.eye(2), None, "gradient"), TypeError, "call backward"),
        (lambda: validation.check_same_matrix(torch.eye(2), torch.eye(3), "u"), ValueError, r"matrix shape \(2, 2\)"),
        (
            lambda: validation.check_same_matrix(torch.ones(2, 3, 3), torch.ones(4, 3, 3), "u"),
            ValueError,
            "must broadcast",
        ),
        (
            lambda: validation.check_full_rank(
                torch.tensor([1.0, 1e-9]).double(), torch.Size((2, 2)), "w", torch.float32
            ),
            ValueError,
            "rank deficient",
        ),
    ],
)
def test_what_is_wrong_is_named(check, kind, message):
    with pytest.raises(kind, match=message):
        check()


def test_what_is_right_passes():
    assert validation.check_count(np.int64(3), "k", "full rank") == 3
    assert validation.check_count(None, "k", "full rank") is None
    assert validation.sides_of(np.int32(4), 2) == (4, 4)
    assert validation.sides_of([4, 5], 2) == (4, 5)
    x = torch.eye(2)
    assert validation.broadcast(x, x)[0] is x
    validation.check_rate(torch.ones(3), "lr", torch.ones(3, 2, 2))


def test_a_warning_names_the_line_of_the_caller():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        validation.warn("something")
    assert caught[0].filename == __file__
    assert caught[0].category is RuntimeWarning


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, np.array, torch.tensor], ids=lambda kind: kind.__name__)
def test_a_whole_number_of_any_library_is_one(kind):
    assert validation.check_count(kind(3), "k", "full rank") == 3
    assert validation.check_seed(kind(3)) == 3
    assert validation.sides_of(kind(3), 2) == (3, 3)
    manifold = UnitaryLowRank(kind(3), seed=kind(5), sweep=kind(7))
    assert (manifold.k, manifold.seed, manifold.sweep) == (3, 5, 7)
    assert all(type(number) is int for number in (manifold.k, manifold.seed, manifold.sweep))


@pytest.mark.parametrize(
    "value",
    [True, np.bool_(True), np.array(True), torch.tensor(True), np.array([3]), torch.tensor([3]), np.float64(3.0)],
)
def test_what_only_looks_like_a_whole_number_is_none(value):
    for check in (validation.check_seed, lambda v: validation.check_count(v, "k", "full rank")):
        with pytest.raises(TypeError, match="must be an int"):
            check(value)
    with pytest.raises(ValueError, match="an int or 2 of them"):
        validation.sides_of(value, 2)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble, np.array, np.int8, int, float])
def test_a_rate_becomes_pythons_own_number(kind):
    value = validation.check_rate(kind(2), "lr", torch.eye(2))
    assert value == 2
    assert type(value) in (int, float)
    x = UnitaryLowRank(1).random(8, 8)
    UnitaryLowRank(1).step_(x, torch.eye(8), kind(0.5))


@pytest.mark.parametrize("value", [np.bool_(True), np.array(True), np.array([0.1]), np.complex64(1), "0.1", None])
def test_what_only_looks_like_a_rate_is_none(value):
    with pytest.raises(TypeError, match="`lr` must be a number or a tensor, got"):
        validation.check_rate(value, "lr", torch.eye(2))
