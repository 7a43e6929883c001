r"""
A trained network made unitary
==============================

.. image:: /tutorials/images/sphx_glr_plot_4_pretrained_001.png
   :alt: What this page makes
   :class: sphx-glr-single-img

At the end of this tutorial you will have taken a trained network of plain layers, made
its hidden weights orthogonal, trained it a little further, and turned it back into plain
PyTorch.

``unitarize`` replaces each weight by the orthogonal matrix closest to it.  This changes
what the network computes, so the network has to be trained further.  The question is
whether it then learns faster than from scratch.
"""

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from projunn_manifold import fold, unitarize
from projunn_manifold.layers import param_groups
from projunn_manifold.optim import RiemannianAdam

torch.set_num_threads(1)
WIDTH, BATCH, EPOCHS = 64, 64, 10

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, test = order[:-360], order[-360:]

# %%
# The plain network
# -----------------
# The plain network has four hidden layers, and is trained with torch's Adam.


def fresh():
    """Return a network of torch's layers, with torch's initial weights."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10))


@torch.no_grad()
def accuracy(network):
    """Return the accuracy on the test images."""
    return (network(images[test]).argmax(-1) == labels[test]).double().mean().item()


def fit(network, optimizer, epochs):
    """Train a network; return its accuracy before training and after every epoch."""
    scores = [accuracy(network)]
    for _ in range(epochs):
        for chosen in train[torch.randperm(len(train))].split(BATCH):
            optimizer.zero_grad()
            cross_entropy(network(images[chosen]), labels[chosen]).backward()
            optimizer.step()
        scores.append(accuracy(network))
    return scores


plain = fresh()
before = fit(plain, torch.optim.Adam(plain.parameters()), 2 * EPOCHS)

# %%
# Make it unitary
# ---------------
# The report shows how far each weight moved, and its singular values before and after.
# We do not select the last layer, so it stays a plain layer.

HIDDEN = ["0.weight", "2.weight", "4.weight", "6.weight"]
converted = copy.deepcopy(plain)
report = unitarize(converted, HIDDEN, k=4)
print(report)

# %%
# The weights moved by about their own norm, since trained weights are far from
# orthogonal.  Most of the accuracy is lost, but much of it comes back in one epoch.
# Build the optimiser after the conversion, because the weights are new parameters.


def fit_on_manifold(network):
    """Train a network with orthogonal weights."""
    optimizer = RiemannianAdam(param_groups(network, lr=0.001, unitary_lr=0.03), lr=0.001)
    return fit(network, optimizer, EPOCHS)


after = fit_on_manifold(converted)

# %%
# For comparison, we train a network from scratch for the same number of epochs.  It
# starts from torch's initial weights, made orthogonal.

scratch = fresh()
unitarize(scratch, HIDDEN, k=4)
from_scratch = fit_on_manifold(scratch)

# %%
# Fold it back
# ------------
# ``fold`` turns the orthogonal weights into plain parameters.  The result is a plain
# PyTorch network: you can save it, export it, and run it where this package is not
# installed.  It computes the same function as before.

outputs = converted(images[test]).detach()
error = max(
    (layer.weight.mT @ layer.weight - torch.eye(WIDTH)).abs().max().item()
    for layer in converted[:-1:2]
)
folded = fold(converted)
print(f"largest entry of W^T W - I: {error:.1e}")
print(f"same outputs: {torch.equal(folded(images[test]), outputs)}")
print(f"class of a weight: {type(folded[0].weight).__name__}")

# %%
# The picture: accuracy after the conversion
# ------------------------------------------
# The gray line is the network from scratch.  The dashed line is the accuracy of the plain
# network before the conversion.

figure, axis = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
axis.plot(
    [100 * share for share in after],
    color="tab:blue",
    label="trained, made unitary, trained further",
)
axis.plot(
    [100 * share for share in from_scratch],
    color="gray",
    label="made unitary, trained from scratch",
)
axis.axhline(
    100 * before[-1],
    color="black",
    linestyle="--",
    linewidth=1,
    label="plain network",
)
axis.set(
    xlabel="epochs of training as a unitary network",
    ylabel="test accuracy, %",
    ylim=(0, 100),
)
axis.grid(alpha=0.3)
axis.legend(loc="lower right")

# %%
# The number: accuracy after one epoch
# ------------------------------------
# The number is the accuracy one epoch after the conversion.  The plain network stays
# ahead by a few points: the constraint costs some accuracy on this task, and has no
# property that the task needs.  Convert a network if you need a property of orthogonal
# weights: the outputs of a layer are no further apart than its inputs, and signals keep
# their size in deep networks.

print(f"plain network: {before[-1]:.1%}")
print(f"made unitary, before training: {after[0]:.1%}")
for epoch in (1, EPOCHS):
    scratch_score = f"from scratch: {from_scratch[epoch]:.1%}"
    print(f"made unitary, after epoch {epoch}: {after[epoch]:.1%} ({scratch_score})")

assert after[1] > 0.8, after
assert after[1] > from_scratch[1] + 0.3, from_scratch
assert error < 1e-5, error
