"""A model with the layers of this package, its data, and what all tests of this folder ask of it."""

import torch
from helpers import bound, double, error
from torch import nn

from projunn_manifold import manifolds_of
from projunn_manifold.layers import UnitaryLinear, UnitaryRNN


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent = UnitaryRNN(3, 16, batch_first=True)
        self.linear = UnitaryLinear(16, 16)
        self.readout = nn.Linear(16, 1)

    def forward(self, x):
        states, _ = self.recurrent(x)
        return self.readout(self.linear(states[:, -1]).tanh())


def seeded(seed=0):
    torch.manual_seed(seed)
    return Network()


def batches():
    """Four batches of 8 sequences of 6 vectors, and the products of their sums."""
    x = torch.randn(32, 6, 3, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(x, x.sum(1).prod(-1, keepdim=True).tanh())
    return torch.utils.data.DataLoader(data, batch_size=8)


def unitarity_errors(module):
    """Return ‖WᴴW - I‖_F/√m of each of the two weights on manifolds."""
    weights = [double(module.get_parameter(name).detach()) for name in manifolds_of(module)]
    assert len(weights) == 2
    return [error(w.mH @ w, torch.eye(w.shape[-1], dtype=w.dtype)) for w in weights]


def assert_unitary(module):
    assert max(unitarity_errors(module)) <= bound(torch.float32)


def assert_same(first, second):
    """Check that two state_dicts are equal bit for bit."""
    torch.testing.assert_close(first, second, rtol=0, atol=0)
