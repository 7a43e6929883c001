"""What every process of a test with sharded parameters runs; results go to files, errors to the caller."""

import itertools
import warnings

import geoopt
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import MANIFOLDS, Modulus, join, leave
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from projunn_manifold import (
    UnitaryLowRank,
    check_manifolds,
    manifolds_of,
    optim,
    reattach_manifolds,
    summary,
    unitarize,
)
from projunn_manifold.layers import UnitaryLinear, UnitaryRNN

STEPS, BATCH = 6, 8


def rmsprop(params, feedback=False):
    """torch's own, constrained."""
    optimizer = torch.optim.RMSprop(params, lr=0.01)
    optim.constrain(optimizer, feedback=feedback)
    return optimizer


OPTIMIZERS = {
    "SGD": lambda params: optim.RiemannianSGD(params, lr=0.05),
    "momentum": lambda params: optim.RiemannianSGD(params, lr=0.05, momentum=0.9),
    "nesterov": lambda params: optim.RiemannianSGD(params, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda params: optim.RiemannianAdam(params, lr=0.05),
    "amsgrad": lambda params: optim.RiemannianAdam(params, lr=0.05, amsgrad=True),
    "RMSprop": rmsprop,
    "feedback": lambda params: rmsprop(params, True),
}


def network(manifold, dtype, sampler="lsi"):
    """Unitary and other weights; among four processes the first weight leaves the last without rows.

    No complex bias: torch's RMSprop leaves a complex vector in uneven shards where it is (2.13).
    """
    torch.manual_seed(0)
    return nn.Sequential(
        UnitaryLinear(9, 9, bias=False, manifold=MANIFOLDS[manifold](1, sampler=sampler), dtype=dtype),
        Modulus(),
        UnitaryLinear(9, 13, manifold=MANIFOLDS[manifold](2, sampler=sampler), dtype=torch.float64),
        nn.Tanh(),
        nn.Linear(13, 2, dtype=torch.float64),
    )


def whole(model):
    """All weights, put together."""
    weights = (p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters())
    return [w.as_subclass(torch.Tensor).clone() for w in weights]


def sharded(model, mesh):
    """Shard a model as FSDP2 does, its weights on their manifolds."""
    plan = manifolds_of(model)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    reattach_manifolds(model, plan)
    return plan


def evaluated(model):
    """Look at the model as one does between steps, which leaves parameters gathered."""
    with torch.no_grad():
        model(torch.zeros(1, 9, dtype=model[0].weight.dtype))


def train(model, optimizer, dtype, first, last):
    """Make these steps, on data that are the same in every process."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 9, dtype=dtype, generator=generator)
        goal = torch.randn(BATCH, 2, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        (model(x) - goal).square().mean().backward()
        optimizer.step()


def alone(case):
    """One process with whole weights."""
    manifold, dtype, sampler, name = case
    model = network(manifold, dtype, sampler)
    train(model, OPTIMIZERS[name](model.parameters()), dtype, 0, STEPS)
    return whole(model)


def all_cases(rank, world, port, folder, cases):
    """Train every case on shards."""
    join(rank, world, port)
    mesh = init_device_mesh("cpu", (world,))
    found = []
    for manifold, dtype, sampler, name in cases:
        model = network(manifold, dtype, sampler)
        plan = sharded(model, mesh)
        optimizer = OPTIMIZERS[name](model.parameters())
        evaluated(model)
        reattach_manifolds(model, plan, optimizer)
        check_manifolds(model, plan, optimizer)
        train(model, optimizer, dtype, 0, STEPS)
        found.append(whole(model))
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


def unitarized():
    """A model of torch's own layers, made unitary."""
    torch.manual_seed(0)
    layers = (nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 13), nn.Tanh(), nn.Linear(13, 2))
    model = nn.Sequential(*layers).double()
    unitarize(model, ["0.weight", "2.weight"])
    return model


def unitarized_alone(name):
    """One process with whole weights."""
    model = unitarized()
    train(model, OPTIMIZERS[name](model.parameters()), torch.float64, 0, STEPS)
    return whole(model)


def existing(rank, world, port, folder, names):
    """Shard a model that was made unitary; its manifolds are lost, are missed by the first step, and put back."""
    join(rank, world, port)
    mesh, found = init_device_mesh("cpu", (world,)), []
    for name in names:
        model = unitarized()
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        optimizer = OPTIMIZERS[name](model.parameters())
        try:
            train(model, optimizer, torch.float64, 0, 1)
            told = "nothing"
        except ValueError as error:
            told = str(error)
        reattach_manifolds(model, manifolds_of(model), optimizer)
        check_manifolds(model, manifolds_of(model), optimizer)
        train(model, optimizer, torch.float64, 0, STEPS)
        found.append((told, whole(model)))
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


def parameter(shape, dtype, off=0.0):
    """A random point and its manifold, the same in every process, with much correction of drift."""
    manifold = UnitaryLowRank(1, sweep=1, non_finite="raise" if off else "skip")
    generator = torch.Generator().manual_seed(1)
    point = manifold.random(*shape, dtype=dtype, generator=generator).as_subclass(torch.Tensor)
    return manifold, point * (1 + off)


def gradient(value, step):
    """A random gradient, with a multiple of the first point, which the sketch takes out."""
    noise = torch.randn(value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(100 + step))
    return noise + step % 2 * value


def stepped(p, optimizer, value, steps, mesh=None, placements=None):
    """Make steps along random gradients; one is zero at the first rows or matrices, another everywhere."""
    for step in range(steps):
        grad = gradient(value, step) * (step != 3)
        if step == 2:
            grad[: -(-len(grad) // 2)] = 0
        p.grad = grad if mesh is None else distribute_tensor(grad, mesh, placements)
        optimizer.step()
    return p


def placed(value, manifold, mesh, placements):
    """A DTensor parameter on its manifold."""
    model = nn.Module()
    model.weight = geoopt.ManifoldParameter(value.clone(), manifold=manifold)
    plan = manifolds_of(model)
    model.weight = nn.Parameter(distribute_tensor(value.clone(), mesh, placements))  # replicas share memory
    reattach_manifolds(model, plan)
    return model.weight, model, plan


PLACED = [
    ((12, 12), 1, (Shard(0),)),
    ((12, 12), 1, (Replicate(),)),
    ((5, 6, 6), 1, (Shard(0),)),  # a stack
    ((9, 16, 16), 1, (Shard(0),)),
    ((1, 3, 6, 6), 1, (Shard(1),)),
    ((12, 12), 2, (Replicate(), Shard(0))),  # replicas of shards
]


def stacks_and_meshes(rank, world, port, folder, cases):
    """Step DTensors that are placed in other ways."""
    join(rank, world, port)
    found = []
    meshes = {dims: init_device_mesh("cpu", (world,) if dims == 1 else (world // 2, 2)) for dims in (1, 2)}
    for (shape, dims, placements), dtype, name in cases:
        mesh, (manifold, value) = meshes[dims], parameter(shape, dtype)
        p, _, _ = placed(value, manifold, mesh, placements)
        stepped(p, OPTIMIZERS[name]([p]), value, STEPS, mesh, placements)
        assert manifold.pop_faults() == (0, 0, 0)
        found.append(p.detach().full_tensor())
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


def counted(rank, world, port, folder, n, k):
    """Count the numbers that every collective of a step carries."""
    join(rank, world, port)
    mesh = init_device_mesh("cpu", (world,))
    counts = {}
    for name in ("SGD", "momentum", "RMSprop"):
        manifold = UnitaryLowRank(k, sweep=None)
        p, _, _ = placed(manifold.random(n, n).as_subclass(torch.Tensor), manifold, mesh, (Shard(0),))
        optimizer = OPTIMIZERS[name]([p])
        stepped(p, optimizer, torch.zeros(n, n), 1, mesh, (Shard(0),))
        p.grad = distribute_tensor(gradient(torch.zeros(n, n), 1), mesh, (Shard(0),))
        sent, reduce, gather = [], dist.all_reduce, dist.all_gather

        def all_reduce(t, *args, _sent=sent, _reduce=reduce, **kwargs):
            _sent.append(t.numel())
            return _reduce(t, *args, **kwargs)

        def all_gather(whole, piece, _sent=sent, _gather=gather, **kwargs):
            _sent.append(sum(t.numel() for t in whole))
            return _gather(whole, piece, **kwargs)

        dist.all_reduce, dist.all_gather = all_reduce, all_gather
        with CommDebugMode() as hidden:
            optimizer.step()
        dist.all_reduce, dist.all_gather = reduce, gather
        counts[name] = sent, hidden.get_total_counts()
    torch.save(counts, f"{folder}/{rank}.pt")
    leave()


def saved(rank, world, port, folder, checkpoint, names, first, last):
    """Go on from a checkpoint, if there is one, and leave one."""
    join(rank, world, port)
    mesh, found = init_device_mesh("cpu", (world,)), []
    for name in names:
        model = network("D", torch.float64)
        sharded(model, mesh)
        optimizer = OPTIMIZERS[name](model.parameters())
        if first:
            weights, state = get_state_dict(model, optimizer)
            dcp.load({"model": weights, "optimizer": state}, checkpoint_id=f"{checkpoint}/{name}")
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        train(model, optimizer, torch.float64, first, last)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{checkpoint}/{name}")
        found.append(whole(model))
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


def faults(rank, world, port, folder, shapes):
    """A gradient that is not finite where the last process has its piece."""
    join(rank, world, port)
    mesh = init_device_mesh("cpu", (world,))
    told = []
    for shape, name in itertools.product(shapes, ("SGD", "momentum", "RMSprop")):
        manifold, value = parameter(shape, torch.float64, 1e-9)
        p, _, _ = placed(value, manifold, mesh, (Shard(0),))
        optimizer = OPTIMIZERS[name]([p])
        stepped(p, optimizer, value, 2, mesh, (Shard(0),))
        before = p.detach().full_tensor()
        bad = gradient(value, 2)
        bad[-1, 0] = torch.nan
        p.grad = distribute_tensor(bad, mesh, (Shard(0),))
        try:
            optimizer.step()
            message = "nothing"
        except ValueError as error:
            message = str(error)
        kept = torch.equal(before, p.detach().full_tensor())
        told.append((message, kept, manifold.draws()))
    torch.save(told, f"{folder}/{rank}.pt")
    leave()


def refusals(rank, world, port, folder):
    """What cannot be sharded, and optimisers that would move shards as Euclidean ones."""
    join(rank, world, port)
    mesh = init_device_mesh("cpu", (world,))
    told = []

    def refused(call):
        try:
            call()
            told.append("nothing")
        except (TypeError, ValueError, NotImplementedError) as error:
            told.append(f"{type(error).__name__}: {error}")

    def place(manifold, dim=0):
        return placed(parameter((12, 12), torch.float32)[1], manifold, mesh, (Shard(dim),))

    refused(lambda: place(UnitaryLowRank(1), 1))
    refused(lambda: place(UnitaryLowRank(None)))
    refused(lambda: place(UnitaryLowRank(1, sampler="column")))
    refused(lambda: place(UnitaryLowRank(1, seed=rank)))
    refused(lambda: place(geoopt.Stiefel()))
    refused(lambda: placed(parameter((12, 12), torch.float32)[1], UnitaryLowRank(1, seed=rank), mesh, (Replicate(),)))
    p, model, plan = place(UnitaryLowRank(1))
    grad = gradient(torch.zeros(12, 12), 0)

    def closure():
        p.grad = distribute_tensor(grad, mesh, (Shard(0),))

    refused(lambda: torch.optim.SGD([p], lr=0.1).step(closure))
    closure()
    for optimizer in (geoopt.optim.RiemannianSGD([p], lr=0.1), torch.optim.SGD([p], lr=0.1)):
        refused(lambda o=optimizer: check_manifolds(model, plan, o))
        refused(optimizer.step)
    refused(optim.RiemannianSGD([p], lr=0.1, stabilize=2).step)
    model.weight = nn.Parameter(p.detach())
    refused(lambda: check_manifolds(model, plan))
    for make in (OPTIMIZERS["SGD"], OPTIMIZERS["RMSprop"]):
        model.weight.grad = p.grad
        refused(make([model.weight]).step)
    torch.save(told, f"{folder}/{rank}.pt")
    leave()


def gradients_placed_otherwise(rank, world, port, folder):
    """Gradients that are sums, or cut another way, as DTensor's own products leave them."""
    join(rank, world, port)
    mesh, found = init_device_mesh("cpu", (world,)), []
    for placement, other in itertools.product((Shard(0), Replicate()), (Shard(0), Shard(1), Replicate(), Partial())):
        manifold, value = parameter((12, 12), torch.float64)
        p, _, _ = placed(value, manifold, mesh, (placement,))
        part = gradient(value, 0) / world if isinstance(other, Partial) else gradient(value, 0)
        if isinstance(other, Partial):
            p.grad = DTensor.from_local(part, mesh, (other,))
        else:
            p.grad = distribute_tensor(part, mesh, (other,))
        OPTIMIZERS["SGD"]([p]).step()
        found.append(p.detach().full_tensor())
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


def conversions(rank, world, port, folder):
    """A sharded layer that is converted and moved keeps its manifold."""
    join(rank, world, port)
    layer = UnitaryLinear(8, 8)
    plan = manifolds_of(layer)
    fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))
    reattach_manifolds(layer, plan)
    layer.to("cpu").to(torch.float64)
    check_manifolds(layer, plan, OPTIMIZERS["SGD"](layer.parameters()))
    [weight] = summary(layer, OPTIMIZERS["SGD"](layer.parameters()))
    told = weight.shape, weight.error, weight.optimizer, weight.notes
    torch.save((str(layer.weight.dtype), *told), f"{folder}/{rank}.pt")
    leave()


def recurrent_loss(network, x, in_place):
    """A loss of a recurrent network's states, changed in place or not."""
    states, _ = network(x)
    if in_place:
        states += 0.1
        return torch.nn.functional.relu(states, inplace=True).square().sum()
    return (states + 0.1).relu().square().sum()


def recurrent(rank, world, port, folder, layers):
    """Gradients of a sharded recurrent network whose states are changed in place; warnings are errors."""
    join(rank, world, port)
    warnings.simplefilter("error")
    mesh, found = init_device_mesh("cpu", (world,)), []
    for batch_first in (False, True):
        network, x = recurrent_network(layers, batch_first)
        fully_shard(network, mesh=mesh)
        for _ in range(2):
            network.zero_grad()
            recurrent_loss(network, x, True).backward()
        found.append([p.grad.full_tensor() for p in network.parameters()])
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


def recurrent_network(layers, batch_first):
    """A network wide enough for factored gradients, and its input, the same in every process."""
    torch.manual_seed(0)
    network = UnitaryRNN(3, 64, layers, "relu", batch_first=batch_first, dtype=torch.float64)
    return network, torch.randn(5, 4, 3, dtype=torch.float64)
