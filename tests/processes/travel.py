"""What processes of another start method do with a model that they are handed."""

import torch
from torch import nn

from projunn_manifold import UnitaryLowRank, optim
from projunn_manifold.layers import OrthogonalConv2d, UnitaryLinear, UnitaryRNN, UnitaryRNNCell, unitary_


def models():
    """One of each kind, the first of which has made steps."""
    torch.manual_seed(0)
    made = {
        "linear": UnitaryLinear(6, 6),
        "wide": UnitaryLinear(6, 4, dtype=torch.complex64),
        "rnn": UnitaryRNN(3, 6, num_layers=2),
        "one manifold": UnitaryRNN(3, 6, num_layers=2, manifold=UnitaryLowRank(1, seed=3)),
        "cell": UnitaryRNNCell(3, 6, nonlinearity="tanh"),
        "convolution": OrthogonalConv2d(2, 3, image_size=4),
        "existing": unitary_(nn.RNN(3, 6), "weight_hh_l0"),
        "manifold": UnitaryLowRank(2, sampler="subspace", seed=5),
        "nested": nn.Sequential(nn.Sequential(UnitaryLinear(6, 6)), nn.Linear(6, 2)),
    }
    train(made["linear"], 3)
    return made


def train(linear, steps):
    """Make steps that depend on the number of those already made, by the sketches alone."""
    optimizer = optim.RiemannianSGD(linear.parameters(), lr=0.1)
    x = torch.arange(30.0).view(5, 6) / 30
    for _ in range(steps):
        optimizer.zero_grad()
        (linear(x) * torch.linspace(0, 1, 6)).sum().backward()
        optimizer.step()


def described(model):
    """Return all that a copy must have: values, and the manifolds' arguments and states."""
    values = [value.clone() for value in model.state_dict().values()]
    weights = [(name, type(p).__name__, str(getattr(p, "manifold", None))) for name, p in model.named_parameters()]
    owned = {id(module): module for module in model.modules() if isinstance(module, UnitaryLowRank)}
    attached = {id(p.manifold) for p in model.parameters() if hasattr(p, "manifold")}
    draws = [manifold.draws() for manifold in owned.values()]
    return values, weights, draws, attached <= owned.keys()


def answer(made, queue):
    """Send back what has arrived, and what three more steps make of the first."""
    torch.set_num_threads(1)
    try:
        arrived = {name: described(model) for name, model in made.items()}
        train(made["linear"], 3)
        weight = made["linear"].weight.detach().as_subclass(torch.Tensor).numpy()
        found = {n: ([v.numpy() for v in values], *rest) for n, (values, *rest) in arrived.items()}
        queue.put((found, weight))
    except BaseException as error:
        queue.put(repr(error))
        raise


class Rotated(torch.utils.data.Dataset):
    """Data that are prepared by a frozen rotation, and tell its manifold's count."""

    def __init__(self):
        self.rotation = models()["linear"].requires_grad_(False)
        self.manifold = self.rotation.manifold

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return self.rotation(torch.eye(6)[i]), self.manifold.draws()[1], self.rotation.weight.manifold is self.manifold


def climb(model):
    """Train the parent's weight, in shared memory."""
    torch.set_num_threads(1)
    train(model, 2)
