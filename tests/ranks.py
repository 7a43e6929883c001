"""What every process of a distributed test runs; results go to files, errors to the caller."""

import os
from datetime import timedelta

import geoopt
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, optim
from projunn_manifold.distributed import data_parallel
from projunn_manifold.layers import UnitaryLinear

MANIFOLDS = {"D": UnitaryLowRank, "T": UnitaryLowRankExact}
OPTIMIZERS = {
    "RSGD": lambda params: geoopt.optim.RiemannianSGD(params, lr=0.05),
    "RAdam": lambda params: geoopt.optim.RiemannianAdam(params, lr=0.05),
    "in place": lambda params: optim.RiemannianSGD(params, lr=0.05),
    "in place, RAdam": lambda params: optim.RiemannianAdam(params, lr=0.05),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.003),
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
    optimizer = OPTIMIZERS[name](model.parameters())
    if name == "RMSprop":
        optim.constrain(optimizer)
    return model, optimizer


def join(rank, world, port, seconds=60):
    """Join the process group."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=seconds))


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
    dist.destroy_process_group()


def never_formed(rank, world, port, folder):
    """A recurrent network whose gradient is never formed, by exchange and by DDP of a formed one."""
    from projunn_manifold.layers import UnitaryRNN

    join(rank, world, port)
    found = []
    for exchanged in (True, False):
        torch.manual_seed(0)
        model = UnitaryRNN(2, 64, k=1, dtype=torch.float64)
        optimizer = optim.RiemannianSGD(model.parameters(), lr=0.05)
        if exchanged:
            ddp, _ = data_parallel(model, optimizer)
        else:
            ddp = DistributedDataParallel(model)
        for step in range(5):
            torch.manual_seed(step)
            x = torch.randn(6, 4, 2, dtype=torch.float64)[:, rank::world]
            optimizer.zero_grad()
            ddp(x)[0][-1].sub(1).square().mean().backward()
            optimizer.step()
        found.append(model.weight_hh_l0.detach().as_subclass(torch.Tensor).clone())
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


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
    refused(lambda: data_parallel(model, OPTIMIZERS["in place"](model[4].parameters())))
    seeded = nn.Sequential(UnitaryLinear(8, 8, manifold=UnitaryLowRank(1, seed=rank)))
    refused(lambda: data_parallel(seeded, OPTIMIZERS["in place"](seeded.parameters())))
    ours = OPTIMIZERS["in place"](model.parameters())
    data_parallel(model, ours)
    refused(lambda: ours.step(lambda: None))
    torch.save(told, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


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
    unitary = [i for i, p in enumerate(model.parameters()) if isinstance(p, geoopt.ManifoldParameter)]
    after = list(model.parameters())
    kept = torch.equal(after[unitary[0]].detach().as_subclass(torch.Tensor), before[unitary[0]])
    torch.save((told, kept), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def one_dies(rank, world, port, folder):
    """One process ends without a word in the middle of a training: the other must not hang."""
    join(rank, world, port, seconds=15)
    model, optimizer = made(("D", torch.float64, "in place"))
    ddp, _ = data_parallel(model, optimizer)
    train(ddp, model, optimizer, torch.float64, 3, rank, world)
    if rank == 1:
        os._exit(0)
    try:
        train(ddp, model, optimizer, torch.float64, 3, rank, world)
        told = "nothing"
    except RuntimeError as error:
        told = str(error)
    torch.save(told, f"{folder}/{rank}.pt")
    os._exit(0)
