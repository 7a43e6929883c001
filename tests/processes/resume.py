"""A small training run that can be saved after any step and continued; as a script, continued in a process of its own.

``python resume.py SETTING FOLDER STEPS`` loads what FOLDER holds, trains and writes it back.
"""

import sys
from pathlib import Path

import geoopt
import torch
from torch import nn

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, optim


class Network(nn.Module):
    """Two unitary weights, one complex, and a Euclidean one; the manifolds are submodules, so they are saved."""

    def __init__(self, samplers):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.real = UnitaryLowRank(1, sampler=samplers[0], seed=3, sweep=40)
        self.complex = UnitaryLowRankExact(2, sampler=samplers[1], seed=4, sweep=40)
        start = self.real.random(24, 24, generator=generator)
        self.orthogonal = geoopt.ManifoldParameter(start, manifold=self.real)
        start = self.complex.random(2, 12, 9, dtype=torch.complex64, generator=generator)
        self.unitary = geoopt.ManifoldParameter(start, manifold=self.complex)
        self.bias = nn.Parameter(torch.zeros(24))

    def forward(self, x):
        return (x @ self.orthogonal + self.bias).square().sum() + (
            self.unitary @ self.unitary.new_ones(9, 1)
        ).real.sum()


SETTINGS = {
    "sgd": (("lsi", "lsi"), lambda p: optim.RiemannianSGD(p, lr=0.01)),
    "momentum": (("subspace", "column"), lambda p: optim.RiemannianSGD(p, lr=0.01, momentum=0.9)),
    "adam": (("lsi", "subspace"), lambda p: optim.RiemannianAdam(p, lr=0.01)),
    "geoopt sgd": (("column", "lsi"), lambda p: geoopt.optim.RiemannianSGD(p, lr=0.01, momentum=0.9, dampening=0.1)),
}


def start(setting):
    """Return a new network and its optimiser."""
    torch.set_num_threads(1)
    samplers, build = SETTINGS[setting]
    network = Network(samplers)
    return network, build(network.parameters())


def train(network, optimizer, first, last):
    """Make the steps from first to last, each on its own data."""
    for step in range(first, last):
        x = torch.randn(8, 24, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        network(x * torch.linspace(0.1, 2, 24)).backward()
        optimizer.step()


if __name__ == "__main__":
    setting, folder, first, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    network, optimizer = start(setting)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    network.load_state_dict(saved["network"])
    optimizer.load_state_dict(saved["optimizer"])
    train(network, optimizer, first, last)
    torch.save(network.state_dict(), folder / "result.pt")
