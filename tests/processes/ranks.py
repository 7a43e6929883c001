"""What every process of a distributed test runs; results go to files, errors to the caller."""

import os
import time
from datetime import timedelta

import geoopt
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, optim
from projunn_manifold.distributed import data_parallel
from projunn_manifold.layers import OrthogonalConv2d, UnitaryLinear, UnitaryRNN

MANIFOLDS = {"D": UnitaryLowRank, "T": UnitaryLowRankExact}


def constrained(optimizer, feedback=False):
    """An optimiser of torch that stays on the manifolds."""
    optim.constrain(optimizer, feedback=feedback)
    return optimizer


OPTIMIZERS = {
    "RSGD": lambda params: geoopt.optim.RiemannianSGD(params, lr=0.05),
    "RAdam": lambda params: geoopt.optim.RiemannianAdam(params, lr=0.05),
    "in place": lambda params: optim.RiemannianSGD(params, lr=0.05),
    "in place, RAdam": lambda params: optim.RiemannianAdam(params, lr=0.05),
    "SGD, feedback": lambda params: constrained(torch.optim.SGD(params, lr=0.05, momentum=0.5), True),
    "RMSprop": lambda params: constrained(torch.optim.RMSprop(params, lr=0.003)),
}
BATCH = 8


def network(manifold, dtype, sampler="lsi"):
    """Unitary and other weights, the same in every process."""
    torch.manual_seed(0)
    own = MANIFOLDS[manifold](1, sampler=sampler)
    return nn.Sequential(
        UnitaryLinear(12, 12, manifold=own, dtype=dtype),
        Modulus(),
        UnitaryLinear(12, 20, k=2, dtype=torch.float64),
        nn.Tanh(),
        nn.Linear(20, 2, dtype=torch.float64),
    )


class Modulus(nn.Module):
    """Real numbers, whatever comes in."""

    def forward(self, x):
        return x.abs() if x.is_complex() else x.relu()


def train(model, parameters_of, optimizer, dtype, steps, rank=0, world=1):
    """Train on this process's part of every batch; return all weights."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        x = torch.randn(BATCH, 12, dtype=dtype, generator=generator)
        goal = torch.randn(BATCH, 2, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        (model(x[rank::world]) - goal[rank::world]).square().mean().backward()
        optimizer.step()
    return [p.detach().as_subclass(torch.Tensor).clone() for p in parameters_of.parameters()]


def made(case):
    """Return model and optimiser of a case (manifold, dtype, optimiser)."""
    manifold, dtype, name = case
    model = network(manifold, dtype)
    return model, OPTIMIZERS[name](model.parameters())


def join(rank, world, port, seconds=60):
    """Join the process group."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=seconds))


def leave():
    """Leave it, together, and end: torch may abort a process whose peers are gone, or whose threads are not."""
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def all_cases(rank, world, port, folder, cases, steps, exchanged):
    """Train every case, by torch's DDP or by the exchange of sketches."""
    join(rank, world, port)
    found = []
    for case in cases:
        model, optimizer = made(case)
        if exchanged:
            ddp, exchange = data_parallel(model, optimizer)
        else:
            ddp = DistributedDataParallel(model)
        weights = train(ddp, model, optimizer, case[1], steps, rank, world)
        found.append((weights, exchange.bytes if exchanged else None))
    torch.save(found, f"{folder}/{rank}.pt")
    leave()


class Holder(nn.Module):
    """A module one level below the root, of which torch's names differ."""

    def __init__(self, inner, nested):
        super().__init__()
        if nested:
            self.inner = inner
        else:
            self.__dict__["inner"] = inner

    def forward(self, x):
        y = self.inner(x)
        return y[0][-1] if isinstance(y, tuple) else y


def of_one_layer(kind):
    """Return a layer of that kind, in double precision, and its input's shape for a batch."""
    torch.manual_seed(0)
    if kind == "recurrent":
        return UnitaryRNN(2, 64, k=1, dtype=torch.float64), lambda b: (5, b, 2)
    if kind == "convolution":
        return OrthogonalConv2d(6, 6, image_size=4, k=1, dtype=torch.float64), lambda b: (b, 6, 4, 4)
    if kind == "two on one manifold":
        shared = UnitaryLowRank(1, sampler="subspace")
        pair = [UnitaryLinear(24, 24, manifold=shared, dtype=torch.float64) for _ in range(2)]
        return nn.Sequential(pair[0], nn.Tanh(), pair[1]), lambda b: (b, 24)
    if kind == "dense":
        return UnitaryLinear(12, 12, k=None, dtype=torch.float64), lambda b: (b, 12)
    return nn.Sequential(UnitaryLinear(16, 16, bias=False, k=1, dtype=torch.float64)), lambda b: (b, 16)


LAYERS = ("recurrent", "convolution", "two on one manifold", "dense", "all unitary")


def train_layer(kind, rank=0, world=1, exchanged=False, nested=True, hook=None):
    """Train a layer towards random targets; return its weights and what was exchanged."""
    layer, shape = of_one_layer(kind)
    model = Holder(layer, True) if nested else layer
    optimizer = optim.RiemannianSGD(model.parameters(), lr=0.05)
    exchange = None
    if exchanged:
        model, exchange = data_parallel(model, optimizer)
        if hook is not None:
            model.register_comm_hook(None, hook)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(shape(4), dtype=torch.float64, generator=generator)
        part = x[:, rank::world] if kind == "recurrent" else x[rank::world]
        y = model(part)
        y = y[0][-1] if isinstance(y, tuple) else y
        goal = torch.randn(4, *y.shape[1:], dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        (y * goal[rank::world]).flatten(1).sum(-1).tanh().mean().backward()  # no multiple of X in the gradient
        optimizer.step()
    return [p.detach().as_subclass(torch.Tensor).clone() for p in layer.parameters()], exchange


def layers(rank, world, port, folder):
    """Train a layer of every kind by exchange, nested; the recurrent one also as the root, counting DDP's bytes."""
    join(rank, world, port)
    found = [train_layer(kind, rank, world, exchanged=True)[0] for kind in LAYERS]
    sent = []

    def count(_, bucket):
        sent.append(bucket.buffer().numel())
        future = dist.all_reduce(bucket.buffer().div_(world), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    root, exchange = train_layer("recurrent", rank, world, exchanged=True, nested=False, hook=count)
    torch.save((found, root, max(sent), exchange.bytes), f"{folder}/{rank}.pt")
    leave()


def unused(rank, world, port, folder):
    """A parameter that no process uses, one that only the first uses, and one that is frozen later."""
    join(rank, world, port)
    torch.manual_seed(0)
    model = nn.ModuleList([UnitaryLinear(8, 8, dtype=torch.float64) for _ in range(3)])
    optimizer = optim.RiemannianAdam(model.parameters(), lr=0.05)
    data_parallel(model, optimizer)
    model[2].weight.requires_grad_(False)
    before = [layer.weight.detach().as_subclass(torch.Tensor).clone() for layer in model]
    if rank == 0:
        model[0](torch.ones(2, 8, dtype=torch.float64)).square().square().sum().backward()
    optimizer.step()
    after = [layer.weight.detach().as_subclass(torch.Tensor).clone() for layer in model]
    torch.save(([torch.equal(a, b) for a, b in zip(after, before, strict=True)], after), f"{folder}/{rank}.pt")
    leave()


def idle_matrices(rank, world, port, folder):
    """A stack of which a matrix has no gradient in one process, with feedback."""
    if world > 1:
        join(rank, world, port)
    torch.manual_seed(0)
    manifold = UnitaryLowRank(1)
    model = nn.Module()
    model.weight = geoopt.ManifoldParameter(manifold.random(3, 6, 6, dtype=torch.float64), manifold=manifold)
    optimizer = constrained(torch.optim.SGD(model.parameters(), lr=0.1), True)
    if world > 1:
        data_parallel(model, optimizer)
    for _ in range(4):
        gradients = torch.randn(2, 3, 6, 6, dtype=torch.float64)
        gradients[0, 0] = gradients[:, 2] = 0
        model.weight.grad = gradients[rank] if world > 1 else gradients.mean(0)
        optimizer.step()
    weight = model.weight.detach().as_subclass(torch.Tensor).clone()
    if world == 1:
        return weight
    torch.save(weight, f"{folder}/{rank}.pt")
    leave()


def refusals(rank, world, port, folder):
    """What data_parallel and its steps refuse."""
    join(rank, world, port)
    told = []

    def refused(call):
        try:
            call()
        except (TypeError, ValueError) as error:
            told.append(f"{type(error).__name__}: {error}")

    for sampler in ("column", "svd"):
        model = network("D", torch.float64, sampler)
        refused(lambda m=model: data_parallel(m, OPTIMIZERS["in place"](m.parameters())))
    model = network("D", torch.float64)
    refused(lambda: data_parallel(model, OPTIMIZERS["RMSprop"](model.parameters())))
    refused(lambda: data_parallel(model, optim.RiemannianSGD(model.parameters(), lr=0.1, feedback=True)))
    refused(lambda: data_parallel(model, OPTIMIZERS["in place"](model[4].parameters())))
    seeded = nn.Sequential(UnitaryLinear(8, 8, manifold=UnitaryLowRank(1, seed=rank)))
    refused(lambda: data_parallel(seeded, OPTIMIZERS["in place"](seeded.parameters())))
    decayed = geoopt.optim.RiemannianSGD(model.parameters(), lr=0.1, weight_decay=0.1)
    refused(lambda: data_parallel(model, decayed))
    ours = OPTIMIZERS["in place"](model.parameters())
    data_parallel(model, ours)
    ours.step(None)
    refused(lambda: ours.step(lambda: None))
    torch.save(told, f"{folder}/{rank}.pt")
    leave()


def one_gradient_is_not_finite(rank, world, port, folder, exchanged):
    """A NaN in one process: every process must refuse the step, and go on together."""
    join(rank, world, port)
    model, optimizer = made(("D", torch.float64, "in place"))
    ddp = data_parallel(model, optimizer)[0] if exchanged else DistributedDataParallel(model)
    before = [p.detach().as_subclass(torch.Tensor).clone() for p in model.parameters()]
    x = torch.randn(4, 12, dtype=torch.float64)
    if rank == 1:
        x[0] = torch.nan
    ddp(x).square().mean().backward()
    try:
        optimizer.step()
        told = "nothing"
    except ValueError as error:
        told = str(error)
    kept = [
        torch.equal(p.detach().as_subclass(torch.Tensor), b)
        for p, b in zip(model.parameters(), before, strict=True)
        if isinstance(p, geoopt.ManifoldParameter)
    ]
    after = train(ddp, model, optimizer, torch.float64, 3, rank, world)
    torch.save((told, kept[0], after[0]), f"{folder}/{rank}.pt")
    leave()


def one_dies(rank, world, port, folder):
    """One process ends without a word in the middle of a training: the other must not hang."""
    join(rank, world, port, seconds=15)
    model, optimizer = made(("D", torch.float64, "in place"))
    ddp, _ = data_parallel(model, optimizer)
    train(ddp, model, optimizer, torch.float64, 3, rank, world)
    if rank == 1:
        os._exit(0)
    began = time.monotonic()
    try:
        train(ddp, model, optimizer, torch.float64, 3, rank, world)
        told = "nothing"
    except RuntimeError as error:
        told = str(error)
    torch.save((told, time.monotonic() - began), f"{folder}/{rank}.pt")
    os._exit(0)
