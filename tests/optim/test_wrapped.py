"""Optimisers inside the wrappers of other libraries: what takes an optimiser looks inside, or says what came.

The wrappers are small classes with the habits of the real ones; ``ZeroRedundancyOptimizer`` is torch's own.
"""

import warnings

import geoopt
import pytest
import torch
import torch.distributed as dist
from helpers import bound
from torch import nn

from projunn_manifold import UnitaryLowRank, check_manifolds, manifolds_of, optim, reattach_manifolds
from projunn_manifold.distributed import data_parallel
from projunn_manifold.linalg.dense import unitarity_error
from projunn_manifold.optim import constrain
from projunn_manifold.optim.constrained import constraint_of, is_constrained


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        manifold = UnitaryLowRank(1)
        start = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
        self.weight = geoopt.ManifoldParameter(start.contiguous(), manifold=manifold)
        self.bias = nn.Parameter(torch.zeros(16))

    def forward(self, x):
        return x @ self.weight + self.bias


class LikeAccelerates(torch.optim.Optimizer):
    """An optimiser by class, without torch's set-up; groups and state are those of the one inside."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self, closure=None):
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none=None):
        self.optimizer.zero_grad()


class LikeLightnings:
    """Of its own class and that of the one inside, whose attributes it takes over."""

    def __init__(self, optimizer):
        self.__dict__ = {key: value for key, value in optimizer.__dict__.items() if key != "step"}
        self.__class__ = type("Lightning" + type(optimizer).__name__, (type(self), type(optimizer)), {})
        self._inner = optimizer

    optimizer = property(lambda self: self._inner)

    def step(self, closure=None):
        return self._inner.step(closure)


class ByName:
    """Nothing but a place for an optimiser."""

    def __init__(self, optimizer, name="optimizer"):
        setattr(self, name, optimizer)

    def step(self, *closure):
        next(iter(vars(self).values())).step(*closure)


class Lookahead:
    """Every two steps the weights go half-way back to where they were."""

    def __init__(self, optimizer, put_back=False):
        self.optimizer, self.put_back, self.steps = optimizer, put_back, 0
        self.slow = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        self.steps += 1
        if self.steps % 2:
            return
        for slow, p in zip(self.slow, (p for g in self.optimizer.param_groups for p in g["params"]), strict=True):
            slow.add_(p.data - slow, alpha=0.5)
            p.data.copy_(slow)
            if self.put_back and hasattr(p, "manifold"):
                slow.copy_(p.copy_(p.manifold.projx(p)))


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def zero_redundancy(net, class_):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's own modules, when they are imported
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(net.parameters(), optimizer_class=class_, lr=0.05)


WRAPPERS = {
    "accelerate": LikeAccelerates,
    "lightning": LikeLightnings,
    "optimizer": ByName,
    "optim": lambda o: ByName(o, "optim"),
    "base_optimizer": lambda o: ByName(o, "base_optimizer"),
    "twice": lambda o: LikeAccelerates(ByName(o, "optim")),
    "lightning of accelerate": lambda o: ByName(LikeAccelerates(o)),
}


def train(net, optimizer, steps=4):
    torch.manual_seed(1)
    for _ in range(steps):
        for p in net.parameters():
            p.grad = None
        (net(torch.randn(8, 16)) - torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    return net


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_is_inside_a_wrapper_is_constrained(name):
    net, other = Network(), Network()
    inner = torch.optim.RMSprop(net.parameters(), lr=1e-2)
    wrapped = WRAPPERS[name](inner)
    assert not is_constrained(wrapped)
    handle = constrain(wrapped)
    assert constraint_of(inner) is constraint_of(wrapped) is constrain(inner) is handle
    assert is_constrained(wrapped)
    train(net, wrapped)
    bare = torch.optim.RMSprop(other.parameters(), lr=1e-2)
    constrain(bare)
    train(other, bare)
    assert torch.equal(net.weight, other.weight)
    assert unitarity_error(net.weight).item() <= bound(torch.float32)
    handle.remove()
    assert not is_constrained(wrapped)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("make", [optim.RiemannianAdam, geoopt.optim.RiemannianSGD])
def test_manifolds_are_checked_and_put_back_through_a_wrapper(name, make):
    net = Network()
    plan = manifolds_of(net)
    wrapped = WRAPPERS[name](make(net.parameters(), lr=1e-2))
    check_manifolds(net, plan, wrapped)
    train(net, wrapped)
    state = {key: value.clone() for key, value in net.state_dict().items() if key in ("weight", "bias")}
    net.load_state_dict(state, assign=True, strict=False)
    with pytest.raises(ValueError, match="no given optimiser holds 'weight'"):
        check_manifolds(net, plan, wrapped)
    wrapped = WRAPPERS[name](make(net.parameters(), lr=1e-2))
    with pytest.raises(ValueError, match=rf"{make.__name__} moves 'weight' as Euclidean"):
        check_manifolds(net, plan, wrapped)
    reattach_manifolds(net, plan, wrapped)
    check_manifolds(net, plan, wrapped)
    train(net, wrapped)
    assert unitarity_error(net.weight).item() <= bound(torch.float32)


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_optimizer_of_torchs_is_told_from_a_constrained_one(name):
    net = Network()
    wrapped = WRAPPERS[name](torch.optim.Adam(net.parameters(), lr=1e-2))
    with pytest.raises(ValueError, match="Adam moves 'weight' as Euclidean: use an optimiser"):
        check_manifolds(net, manifolds_of(net), wrapped)
    constrain(wrapped)
    check_manifolds(net, manifolds_of(net), wrapped)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.LBFGS(p), "LBFGS cannot be constrained"),
        (lambda p: torch.optim.ASGD(p), "ASGD cannot be constrained"),
        (lambda p: geoopt.optim.RiemannianSGD(p, lr=0.1), "RiemannianSGD is an optimiser on manifolds"),
    ],
)
def test_what_cannot_be_constrained_cannot_be_in_a_wrapper(make, message):
    with pytest.raises(TypeError, match=message):
        constrain(LikeAccelerates(make(Network().parameters())))


def loop():
    first, second = ByName(None), ByName(None)
    first.optimizer, second.optimizer = second, first
    return first


NO_OPTIMIZERS = {
    "list": lambda o: [o],
    "str": lambda o: "adam",
    "NoneType": lambda o: None,
    "Linear": lambda o: nn.Linear(2, 2),
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
    "type": lambda o: torch.optim.SGD,
    "ByName": lambda o: ByName("nothing"),
    "LikeAccelerates": lambda o: LikeAccelerates(None),
    "function": lambda o: test_what_is_no_optimizer_is_named,
    " ByName": lambda o: loop(),
}


@pytest.mark.parametrize("name", NO_OPTIMIZERS)
def test_what_is_no_optimizer_is_named(name, one_process):
    net = Network()
    plan = manifolds_of(net)
    other = NO_OPTIMIZERS[name](torch.optim.SGD(net.parameters(), lr=0.1))
    for take in (
        constrain,
        is_constrained,
        constraint_of,
        lambda o: check_manifolds(net, plan, o),
        lambda o: reattach_manifolds(net, plan, o),
        lambda o: data_parallel(net, o),
    ):
        with pytest.raises(TypeError, match=rf"`optimizer` must be a torch.optim.Optimizer.*got {name.strip()}"):
            take(other)


@pytest.mark.parametrize("class_", [torch.optim.SGD, torch.optim.AdamW, optim.RiemannianSGD, optim.RiemannianAdam])
def test_zero_redundancy(class_, one_process):
    net, other = Network(), Network()
    plan = manifolds_of(net)
    zero = zero_redundancy(net, class_)
    bare = class_(other.parameters(), lr=0.05)
    if not isinstance(bare, geoopt.optim.mixin.OptimMixin):
        with pytest.raises(ValueError, match=f"{class_.__name__} moves 'weight' as Euclidean"):
            check_manifolds(net, plan, zero)
        constrain(zero)
        constrain(bare)
    check_manifolds(net, plan, zero)
    reattach_manifolds(net, plan, zero)  # nothing to do
    train(net, zero)
    train(other, bare)
    assert torch.equal(net.weight, other.weight)
    assert unitarity_error(net.weight).item() <= bound(torch.float32)
    with pytest.raises(TypeError, match="ZeroRedundancyOptimizer moves each parameter in one process only"):
        data_parallel(net, zero)


def test_parameters_are_not_replaced_in_lists_that_a_wrapper_keeps(one_process):
    net = Network()
    plan = manifolds_of(net)
    net.weight = nn.Parameter(net.weight.detach().clone())
    zero = zero_redundancy(net, optim.RiemannianSGD)
    lost = net.weight
    with pytest.raises(TypeError, match=r"ZeroRedundancyOptimizer keeps lists.*build it again"):
        reattach_manifolds(net, plan, zero)
    assert net.weight is lost


@pytest.mark.parametrize("name", ["accelerate", "lightning", "optim"])
def test_sketches_are_exchanged_through_a_wrapper(name, one_process):
    net, other = Network(), Network()
    inner = optim.RiemannianSGD(net.parameters(), lr=0.05)
    ddp, exchange = data_parallel(net, WRAPPERS[name](inner))
    train(ddp, inner)
    train(other, optim.RiemannianSGD(other.parameters(), lr=0.05))
    assert exchange.bytes > 0
    assert (net.weight - other.weight).abs().max().item() <= bound(torch.float32)


@pytest.mark.parametrize(
    "take",
    [constrain, lambda o: check_manifolds(o.net, manifolds_of(o.net), o), lambda o: data_parallel(o.net, o)],
    ids=["constrain", "check_manifolds", "data_parallel"],
)
def test_lookahead_is_told_of_at_once(take, one_process):
    net = Network()
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    constrain(inner)
    wrapped = Lookahead(inner)
    wrapped.net = net
    with pytest.warns(RuntimeWarning, match=r"Lookahead interpolates weights.*p.copy_\(p.manifold.projx\(p\)\)"):
        take(wrapped)


@pytest.mark.parametrize("make", [optim.RiemannianSGD, geoopt.optim.RiemannianAdam, torch.optim.SGD])
def test_weights_that_leave_the_manifold_between_steps_are_told_of_once(make):
    """Whatever class writes to them, also where PyTorch's version counter does not see it."""

    class Unheard(Lookahead):
        pass

    for put_back in (False, True):
        net = Network()
        inner = make(net.parameters(), lr=0.3)
        if make is torch.optim.SGD:
            constrain(inner)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(net, Unheard(inner, put_back), 9)
        told = [w for w in caught if "has left its manifold between two steps" in str(w.message)]
        assert len(told) == (0 if put_back else 1)
        assert all("p.copy_(p.manifold.projx(p))" in str(w.message) for w in told)
    assert unitarity_error(net.weight).item() <= bound(torch.float32)
