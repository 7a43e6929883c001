"""The table of unitary weights says what is there, and what an optimiser does with it."""

import math

import geoopt
import pytest
import torch
from helpers import bound

from projunn_manifold import UnitaryLowRankExact, layers, optim, summary, unitarity_error


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


class Network(torch.nn.Module):
    """A layer, a raw parameter, a convolution, a weight of torch's layer, and weights that are free."""

    def __init__(self):
        super().__init__()
        self.linear = layers.UnitaryLinear(6, 9, k=2)
        manifold = UnitaryLowRankExact(k=None)
        self.raw = geoopt.ManifoldParameter(manifold.random(3, 5, 4, dtype=torch.complex128), manifold=manifold)
        self.conv = layers.OrthogonalConv2d(4, 4, image_size=(4, 4))
        self.inner = torch.nn.Sequential(layers.unitary_(torch.nn.Linear(8, 8)), torch.nn.Linear(8, 2))
        self.stiefel = geoopt.ManifoldParameter(torch.eye(3), manifold=geoopt.Stiefel())


def test_every_unitary_weight_is_in_it_and_no_other():
    model = Network()
    found = {weight.name: weight for weight in summary(model)}
    convolution = {f"conv.{name}" for name, p in model.conv.named_parameters() if hasattr(p, "manifold")}
    assert convolution
    assert set(found) == {"linear.weight", "raw", "inner.0.weight", *convolution}
    assert [found["linear.weight"].shape, found["raw"].shape] == [(9, 6), (3, 5, 4)]
    assert [found["linear.weight"].k, found["raw"].k, found["inner.0.weight"].k] == [2, None, 1]
    assert [found["linear.weight"].manifold, found["raw"].manifold] == ["UnitaryLowRank", "UnitaryLowRankExact"]
    assert [found["linear.weight"].dtype, found["raw"].dtype] == [torch.float32, torch.complex128]
    assert all(weight.error <= bound(weight.dtype) for weight in found.values())
    assert all(weight.optimizer is None and weight.lr is None and not weight.notes for weight in found.values())


def test_the_error_is_the_largest_of_a_stack():
    model = Network()
    with torch.no_grad():
        model.raw[1] *= 2
    [error] = [weight.error for weight in summary(model) if weight.name == "raw"]
    assert error == pytest.approx(3)


@pytest.mark.parametrize(
    ("make", "kind", "notes"),
    [
        (lambda params: optim.RiemannianAdam(params, lr=0.3), "RiemannianAdam", ()),
        (lambda params: Wrapper(geoopt.optim.RiemannianSGD(params, lr=0.3)), "RiemannianSGD", ()),
        (lambda params: torch.optim.RMSprop(params, lr=0.3), "RMSprop", ("constrained",)),
    ],
    ids=["in place", "wrapped", "constrained"],
)
def test_optimisers_are_named_with_the_rates_of_their_groups(make, kind, notes):
    model = Network()
    model.inner[0].weight.requires_grad_(False)
    optimizer = make([{"params": [model.raw]}, {"params": [model.inner[0].weight], "lr": 0.01}])
    if notes:
        optim.constrain(optimizer)
    found = {weight.name: weight for weight in summary(model, optimizer)}
    assert (found["raw"].optimizer, found["raw"].lr, found["raw"].notes) == (kind, 0.3, notes)
    assert (found["inner.0.weight"].optimizer, found["inner.0.weight"].lr) == (kind, 0.01)
    assert found["inner.0.weight"].notes == ("frozen", *notes)
    assert (found["linear.weight"].optimizer, found["linear.weight"].notes) == (None, ("not in the optimiser",))


def test_it_is_printed_as_a_table():
    lines = str(summary(layers.UnitaryLinear(8, 8))).splitlines()
    assert [line.split()[:5] for line in lines] == [
        ["weight", "shape", "dtype", "manifold", "k"],
        ["weight", "8x8", "float32", "UnitaryLowRank", "1"],
    ]
    assert str(summary(torch.nn.Linear(2, 2))) == "no unitary weights"


def test_weights_that_are_lost_shared_or_without_values():
    model = layers.unitary_(torch.nn.Linear(8, 8))
    model.weight = torch.nn.Parameter(model.weight.detach().as_subclass(torch.Tensor).clone())
    assert [weight.notes for weight in summary(model)] == [("lost its manifold",)]
    linear = layers.UnitaryLinear(8, 8)
    assert [weight.name for weight in summary(torch.nn.Sequential(linear, linear))] == ["0.weight"]
    assert [weight.error for weight in summary(layers.UnitaryLinear(8, 8, device="meta"))] == [None]


def test_what_is_no_model_or_no_optimiser_is_refused():
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, got list"):
        summary([layers.UnitaryLinear(8, 8)])
    with pytest.raises(TypeError, match=r"`optimizer` must be a torch.optim.Optimizer"):
        summary(layers.UnitaryLinear(8, 8), 0.1)


def test_the_unitarity_error_is_public(draw):
    x = draw.point(2, 8, 5, dtype=torch.complex64) * torch.tensor([1.0, 2.0]).view(2, 1, 1)
    found = unitarity_error(x)
    assert found.shape == (2,)
    assert found[0] <= bound(torch.complex64)
    assert math.isclose(found[1].item(), 3, rel_tol=1e-5)
    with pytest.raises(ValueError, match=r"at least 2 dimensions .*, got shape \(3,\)"):
        unitarity_error(torch.ones(3))
    with pytest.raises(TypeError, match=r"must be a torch.Tensor, got list"):
        unitarity_error([[1.0]])
