r"""
Sixty layers without a shortcut
===============================

A signal that passes sixty matrices grows or shrinks by the product of their gains.  Orthogonal matrices have gain one
in every direction, and here they keep it while they learn.  Three networks of one shape read scikit-learn's digits: one
keeps its matrices orthogonal, one only starts with them, one starts as PyTorch does.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from projunn_manifold.layers import UnitaryLinear, param_groups
from projunn_manifold.optim import RiemannianAdam

torch.set_num_threads(1)
WIDTH, DEPTH, BATCH, EPOCHS = 64, 60, 64, 8

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, test = order[:-360], order[-360:]


# %%
# MaxMin sorts the channels in pairs.  It preserves norms, as the matrices do.


class MaxMin(nn.Module):
    """Sort pairs of channels."""

    def forward(self, x):
        """Return the larger of each pair, then the smaller."""
        a, b = x.chunk(2, dim=1)
        return torch.cat((torch.maximum(a, b), torch.minimum(a, b)), dim=1)


def network(layer):
    """Return a deep network of such layers."""
    torch.manual_seed(0)
    middle = [module for _ in range(DEPTH) for module in (layer(), MaxMin())]
    return nn.Sequential(*middle, nn.Linear(WIDTH, 10))


def orthogonal_start():
    """Return torch's linear layer, orthogonal before its first step."""
    layer = nn.Linear(WIDTH, WIDTH)
    nn.init.orthogonal_(layer.weight)
    return layer


# %%
# The learning rate of the matrices is the best of five for each network.

networks = {
    "UnitaryLinear": (network(lambda: UnitaryLinear(WIDTH, WIDTH, k=4)), 0.01),
    "nn.Linear, orthogonal at the start": (network(orthogonal_start), 0.0003),
    "nn.Linear": (network(lambda: nn.Linear(WIDTH, WIDTH)), 0.001),
}


def fit(model, lr):
    """Train a network and return its losses."""
    torch.manual_seed(1)
    optimizer = RiemannianAdam(param_groups(model, lr=min(lr, 0.001), unitary_lr=lr), lr=0.001)
    losses = []
    for _ in range(EPOCHS):
        for chosen in train[torch.randperm(len(train))].split(BATCH):
            loss = cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def gains(model):
    """Return the largest and the smallest gain of the layers up to each depth, along the way of one image."""
    x, product, found = images[test[:1]], torch.eye(WIDTH), []
    for layer in model[:-1]:
        product = torch.autograd.functional.jacobian(lambda v, f=layer: f(v)[0], x)[:, 0] @ product
        x = layer(x).detach()
        if isinstance(layer, MaxMin):
            values = torch.linalg.svdvals(product.double())
            found.append((values[0].item(), values[-1].item()))
    return found


losses = {name: fit(*choice) for name, choice in networks.items()}

# %%
# After training, the gains of the first network are one at every depth, from input to output and back.  Those of the
# others spread by orders of magnitude.

COLOURS = ("tab:blue", "tab:orange", "gray")
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for (name, (model, _)), colour in zip(networks.items(), COLOURS, strict=True):
    left.plot(losses[name], color=colour, label=name)
    top, bottom = zip(*gains(model), strict=True)
    right.fill_between(range(1, DEPTH + 1), bottom, top, color=colour, alpha=0.3)
    right.semilogy(range(1, DEPTH + 1), top, color=colour)
left.set(title="loss", xlabel="step", ylim=(0, 2.6))
right.set(title="largest and smallest gain", xlabel="layers", ylim=(1e-12, 1e6))
figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)

with torch.no_grad():
    for name, (model, _) in networks.items():
        right_answers = (model(images[test]).argmax(-1) == labels[test]).double().mean().item()
        top, bottom = gains(model)[-1]
        print(f"{name:36} test images read {right_answers:.1%}   gains {bottom:.1e} to {top:.1e}")
