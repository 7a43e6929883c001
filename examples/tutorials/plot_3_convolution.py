r"""
A convolution with a certificate
================================

.. image:: /tutorials/images/sphx_glr_plot_3_convolution_001.png
   :alt: What this page makes
   :class: sphx-glr-single-img

At the end of this tutorial you will have a convolutional network whose predictions come
with a proof: no change of the image below a known size can change the prediction.

Every layer of the network is orthogonal.  So the network has Lipschitz constant 1: two
outputs are no further apart than the two images are, :math:`\|f(x) - f(x')\|
\le \|x - x'\|`.
"""

import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from projunn_manifold.layers import OrthogonalConv2d, UnitaryLinear, param_groups
from projunn_manifold.optim import RiemannianAdam

torch.set_num_threads(1)
CHANNELS, BATCH, EPOCHS = 8, 64, 8

# %%
# The data are scikit-learn's digits, with pixels scaled to the range from 0 to 1.  A
# typical image has a norm of 4.

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, test = order[:-360], order[-360:]

# %%
# Two networks
# ------------
# ``OrthogonalConv2d`` replaces a circular ``nn.Conv2d``; it has to know the size of the
# images.  Its outputs have the same norm as its inputs, or a smaller norm if the layer
# reduces their number.  ReLU would discard half of the signal.  MaxMin does not: it sorts
# the channels in pairs.  Sorting preserves norms, and moves no two signals further apart.


class MaxMin(nn.Module):
    """Sort pairs of channels."""

    def forward(self, x):
        """Return the larger of each pair, then the smaller."""
        a, b = x.chunk(2, dim=1)
        return torch.cat((torch.maximum(a, b), torch.minimum(a, b)), dim=1)


torch.manual_seed(0)
orthogonal = nn.Sequential(
    OrthogonalConv2d(1, CHANNELS, image_size=8, k=4),
    MaxMin(),
    OrthogonalConv2d(CHANNELS, 2 * CHANNELS, image_size=8, stride=2, k=4),
    MaxMin(),
    OrthogonalConv2d(2 * CHANNELS, 2 * CHANNELS, image_size=4, k=4),
    MaxMin(),
    nn.Flatten(),
    UnitaryLinear(2 * CHANNELS * 4 * 4, 10, k=4),
)
around = {"padding": 1, "padding_mode": "circular"}
plain = nn.Sequential(
    nn.Conv2d(1, CHANNELS, 3, **around),
    nn.ReLU(),
    nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, stride=2, **around),
    nn.ReLU(),
    nn.Conv2d(2 * CHANNELS, 2 * CHANNELS, 3, **around),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(2 * CHANNELS * 4 * 4, 10),
)

# %%
# Training
# --------
# The outputs of the orthogonal network cannot grow.  Its loss multiplies the outputs by
# 4, which makes the network learn a wide margin.


def fit(network, scale):
    """Train a network; its parameters on manifolds have their own learning rate."""
    torch.manual_seed(1)
    optimizer = RiemannianAdam(param_groups(network, lr=0.003, unitary_lr=0.1), lr=0.003)
    for _ in range(EPOCHS):
        for chosen in train[torch.randperm(len(train))].split(BATCH):
            optimizer.zero_grad()
            cross_entropy(scale * network(images[chosen]), labels[chosen]).backward()
            optimizer.step()


fit(orthogonal, scale=4)
fit(plain, scale=1)

# %%
# The certificate
# ---------------
# The margin of an image is the score of its class minus the best score of the other
# classes.  If the output moves by a distance :math:`r`, the difference of two scores
# changes by at most :math:`\sqrt 2\, r`.  So no change of the image below margin
# :math:`/ \sqrt 2` makes the prediction wrong.  For a network with Lipschitz constant
# :math:`L` this size is margin :math:`/ (\sqrt 2 L)`.


@torch.no_grad()
def radii(network, lipschitz):
    """Return sizes below which no change makes a prediction wrong; negative if it is."""
    scores, own = network(images[test]), labels[test, None]
    margin = scores.gather(1, own)[:, 0] - scores.scatter(1, own, -math.inf).amax(1)
    return margin / (math.sqrt(2) * lipschitz)


@torch.no_grad()
def lipschitz_bound(network):
    """Return the product of the largest singular values of all layers with weights."""
    x, bound = images[:1], 1.0
    for layer in network:
        if isinstance(layer, nn.Conv2d | nn.Linear | OrthogonalConv2d | UnitaryLinear):
            basis = torch.eye(x[0].numel()).view(-1, *x.shape[1:])
            matrix = (layer(basis) - layer(torch.zeros_like(basis))).flatten(1)
            bound *= torch.linalg.matrix_norm(matrix, 2).item()
        x = layer(x)
    return bound


bounds = {"orthogonal": lipschitz_bound(orthogonal), "plain": lipschitz_bound(plain)}
print("product of the largest singular values:")
for name, bound in bounds.items():
    print(f"{name:10}  {bound:.4f}")

# %%
# An attack
# ---------
# A certificate is a promise about the worst case.  An attack looks for bad cases: it
# increases the loss by gradient steps within a ball around each image.  The accuracy
# under attack is an upper bound of the accuracy in the worst case, and the certified
# accuracy is a lower bound.


def accuracy_under_attack(network, radius, steps=10):
    """Return the test accuracy after changes of this size."""
    clean, own = images[test], labels[test]
    change = torch.zeros_like(clean)
    for _ in range(steps):
        change.requires_grad_(True)
        loss = cross_entropy(network(clean + change), own)
        (gradient,) = torch.autograd.grad(loss, change)
        step = normalize(gradient.flatten(1)).view_as(gradient) * radius / 4
        # renorm keeps each change within its ball
        change = (change.detach() + step).renorm(2, 0, radius)
    with torch.no_grad():
        return (network(clean + change).argmax(-1) == own).double().mean().item()


# %%
# The picture: certified and attacked accuracy
# --------------------------------------------
# The solid lines are certified accuracies, and the dotted lines are accuracies under
# attack.  Both networks classify clean images equally well.  The certificate of the plain
# network is worthless.  Under attack, the plain network is about as accurate as the
# orthogonal network is certified to be.

SIZES = [i / 10 for i in range(9)]
NETWORKS = {"orthogonal": (orthogonal, "tab:blue"), "plain": (plain, "gray")}
figure, axis = plt.subplots(figsize=(5.6, 4), layout="constrained")
certified, attacked = {}, {}
for name, (network, colour) in NETWORKS.items():
    safe = radii(network, bounds[name])
    certified[name] = [(safe > size).double().mean().item() for size in SIZES]
    attacked[name] = [accuracy_under_attack(network, size) for size in SIZES]
    for kind, shares, style in (
        ("attacked", attacked[name], ":"),
        ("certified", certified[name], "-"),
    ):
        percent = [100 * share for share in shares]
        axis.plot(SIZES, percent, style, color=colour, label=f"{name}, {kind}")
axis.set(xlabel="size of the change of the image", ylabel="test images read, %")
axis.grid(alpha=0.3)
figure.legend(loc="outside upper center", ncols=2)

# %%
# The number: certified accuracy
# ------------------------------
# The number is the percentage of test images that are certified against every change of
# norm 0.3.

for name in certified:
    print(f"{name}, clean images: {certified[name][0]:.1%}")
    print(f"{name}, changes of norm 0.3, certified: {certified[name][3]:.1%}")
    print(f"{name}, changes of norm 0.3, attacked: {attacked[name][3]:.1%}")

assert abs(bounds["orthogonal"] - 1) < 1e-3, bounds
pairs = zip(certified["orthogonal"], attacked["orthogonal"], strict=True)
assert all(low <= high for low, high in pairs), (certified, attacked)
assert certified["orthogonal"][3] > 0.65, certified
assert certified["plain"][3] < 0.2, certified
