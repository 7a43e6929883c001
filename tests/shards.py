"""What every process of a test with sharded parameters runs; results go to files, errors to the caller."""

import itertools

import geoopt
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import MANIFOLDS, Modulus, join, leave
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from projunn_manifold import UnitaryLowRank, check_manifolds, manifolds_of, optim, reattach_manifolds
from projunn_manifold.layers import UnitaryLinear

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
        check_manifolds(model, plan, optimizer)
        train(model, optimizer, dtype, 0, STEPS)
        found.append(whole(model))
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


def parameter(shape, dtype, **options):
    """A random point and its manifold, the same in every process."""
    manifold = UnitaryLowRank(1, **options)
    generator = torch.Generator().manual_seed(1)
    return manifold, manifold.random(*shape, dtype=dtype, generator=generator).as_subclass(torch.Tensor)


def gradient(shape, dtype, step):
    """A random gradient."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(100 + step))


def stepped(p, optimizer, shape, dtype, steps, mesh=None, placements=None):
    """Make steps along random gradients."""
    for step in range(steps):
        grad = gradient(shape, dtype, step)
        p.grad = grad if mesh is None else distribute_tensor(grad, mesh, placements)
        optimizer.step()
    return p


def placed(value, manifold, mesh, placements):
    """A DTensor parameter on its manifold."""
    model = nn.Module()
    model.weight = geoopt.ManifoldParameter(value.clone(), manifold=manifold)
    plan = manifolds_of(model)
    model.weight = nn.Parameter(distribute_tensor(value, mesh, placements))
    reattach_manifolds(model, plan)
    return model.weight, model, plan


PLACED = [
    ((12, 12), 1, (Shard(0),)),
    ((12, 12), 1, (Replicate(),)),
    ((5, 6, 6), 1, (Shard(0),)),  # a stack
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
        stepped(p, OPTIMIZERS[name]([p]), shape, dtype, STEPS, mesh, placements)
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
        stepped(p, optimizer, (n, n), p.dtype, 1, mesh, (Shard(0),))
        p.grad = distribute_tensor(gradient((n, n), p.dtype, 1), mesh, (Shard(0),))
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
        manifold, value = parameter(shape, torch.float64)
        p, _, _ = placed(value, manifold, mesh, (Shard(0),))
        optimizer = OPTIMIZERS[name]([p])
        stepped(p, optimizer, shape, torch.float64, 2, mesh, (Shard(0),))
        before = p.detach().full_tensor()
        bad = gradient(shape, torch.float64, 2)
        bad[-1, 0] = torch.nan
        p.grad = distribute_tensor(bad, mesh, (Shard(0),))
        try:
            optimizer.step()
            message = "nothing"
        except ValueError as error:
            message = str(error)
        kept = torch.equal(before, p.detach().full_tensor())
        told.append((message, kept, manifold.stamp))
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
    p, model, plan = place(UnitaryLowRank(1))
    p.grad = distribute_tensor(gradient((12, 12), torch.float32, 0), mesh, (Shard(0),))
    for optimizer in (geoopt.optim.RiemannianSGD([p], lr=0.1), torch.optim.SGD([p], lr=0.1)):
        refused(lambda o=optimizer: check_manifolds(model, plan, o))
        refused(optimizer.step)
    refused(optim.RiemannianSGD([p], lr=0.1, stabilize=2).step)
    model.weight = nn.Parameter(p.detach())
    refused(lambda: check_manifolds(model, plan))
    torch.save(told, f"{folder}/{rank}.pt")
    leave()
