r"""
Fine-tuning by a rotation
=========================

.. image:: /tutorials/images/sphx_glr_plot_5_finetuning_001.png
   :alt: What this page makes
   :class: sphx-glr-single-img

At the end of this tutorial you will have adapted a trained network to new data with a few
examples of each class.  All trained weights stay as they are.  Only a rotation in front
of the first layer learns.

The first layer of a network computes :math:`y = Wx + b`.  We put an orthogonal matrix in
front,

.. math:: y = W R x + b,

and train only :math:`R`.  It starts at the identity, so the adapted network starts as the
trained one.  All neurons (the rows of :math:`W`) rotate together: their lengths, and the
angles between them, stay as the first training left them.  This method is known as
orthogonal fine-tuning.
"""

import copy
from statistics import mean

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from projunn_manifold.layers import UnitaryLinear
from projunn_manifold.optim import RiemannianAdam

torch.set_num_threads(1)
WIDTH, BATCH, STEPS, SEEDS = 64, 32, 300, 3
SHOTS = (1, 3, 10)

# %%
# A trained network
# -----------------
# The network classifies scikit-learn's digits.  We keep 600 images as test images.

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
upright, turned = images.flatten(1), images.rot90(1, (1, 2)).flatten(1)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, test = order[:-600], order[-600:]


def fit(network, optimizer, pixels, targets, steps):
    """Train a network on batches drawn at random."""
    for _ in range(steps):
        chosen = torch.randint(len(targets), (min(BATCH, len(targets)),))
        optimizer.zero_grad()
        cross_entropy(network(pixels[chosen]), targets[chosen]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(network, pixels, targets):
    """Return the accuracy on the images."""
    return (network(pixels).argmax(-1) == targets).double().mean().item()


torch.manual_seed(0)
base = nn.Sequential(
    nn.Linear(WIDTH, WIDTH),
    nn.ReLU(),
    nn.Linear(WIDTH, WIDTH),
    nn.ReLU(),
    nn.Linear(WIDTH, 10),
)
fit(base, torch.optim.Adam(base.parameters()), upright[train], labels[train], 600)
print(f"upright digits: {accuracy(base, upright[test], labels[test]):.1%}")
print(f"turned by 90 degrees: {accuracy(base, turned[test], labels[test]):.1%}")

# %%
# Three ways to adapt it
# ----------------------
# We train the rotation, all weights, or the last layer alone.  The learning rate of each
# way is the best of a few.  With rank ``k = 4`` one step can turn the rotation in several
# planes at once.


def rotation(network):
    """Put a rotation in front, and train nothing else."""
    front = UnitaryLinear(WIDTH, WIDTH, bias=False, init="identity", k=4)
    return nn.Sequential(front, network), RiemannianAdam(front.parameters(), lr=0.3)


def everything(network):
    """Train all weights."""
    return network, torch.optim.Adam(network.parameters(), lr=0.01)


def last_layer(network):
    """Train the last layer."""
    return network, torch.optim.Adam(network[-1].parameters(), lr=0.01)


def adapted(way, pixels, targets, shots):
    """Adapt to a few examples of each class; return the accuracies of three draws."""
    found = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        shuffled = train[torch.randperm(len(train))]
        few = torch.cat(
            [shuffled[targets[shuffled] == digit][:shots] for digit in range(10)]
        )
        network, optimizer = way(copy.deepcopy(base))
        fit(network, optimizer, pixels[few], targets[few], STEPS)
        found.append(accuracy(network, pixels[test], targets[test]))
    return found


# %%
# Turned digits
# -------------
# Turning an image by 90 degrees permutes its pixels, and a permutation is an orthogonal
# matrix.  So some :math:`R` undoes the turn exactly.  The network is not told which one:
# it must find :math:`R` from the examples.

WAYS = {
    "rotation in front": rotation,
    "all weights": everything,
    "last layer": last_layer,
}
turned_scores = {
    name: [adapted(way, turned, labels, shots) for shots in SHOTS]
    for name, way in WAYS.items()
}

# %%
# The picture: accuracy with few examples
# ---------------------------------------
# Each line is the mean of three random draws of the examples, and the dots are the single
# draws.

figure, axis = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
colours = {"rotation in front": "tab:blue", "all weights": "black", "last layer": "gray"}
for name, scores in turned_scores.items():
    means = [100 * mean(draws) for draws in scores]
    axis.plot(SHOTS, means, color=colours[name], label=name)
    for shots, draws in zip(SHOTS, scores, strict=True):
        percent = [100 * draw for draw in draws]
        axis.plot([shots] * SEEDS, percent, ".", color=colours[name])
axis.set(
    title="digits turned by 90 degrees",
    xlabel="examples of each class",
    ylabel="test accuracy, %",
    xscale="log",
)
axis.set_xticks(SHOTS, labels=SHOTS)
axis.minorticks_off()
axis.grid(alpha=0.3)
axis.legend()

# %%
# The number: gain over training all weights
# ------------------------------------------
# The number is the accuracy that the rotation gains over training all weights, with three
# examples of each class.  The rotation wins here because it fits the task: it can do what
# is needed, and not much else.  It does not always win.  In a second task the images are
# upright, and the classes have new names.  There it is best to train the last layer
# alone, and the rotation is far behind.

renamed = (labels + 3) % 10
for name, way in WAYS.items():
    few_renamed = mean(adapted(way, upright, renamed, 3))
    print(f"{name}, turned digits: {mean(turned_scores[name][1]):.1%}")
    print(f"{name}, renamed classes: {few_renamed:.1%}")

gain = mean(turned_scores["rotation in front"][1]) - mean(turned_scores["all weights"][1])
print(f"turned digits: {100 * gain:+.1f} points over training all weights")

assert gain > 0.01, gain
