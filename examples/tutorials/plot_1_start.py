r"""
Start in five minutes
=====================

.. image:: /tutorials/images/sphx_glr_plot_1_start_001.png
   :alt: What this page makes
   :class: sphx-glr-single-img

At the end of this tutorial you will have a network of 30 layers that has learnt to
classify digits, without shortcuts and without normalisation.  The same network made of
``torch.nn.Linear`` learns almost nothing.

Install the package from a checkout:

.. code-block:: console

   $ python -m pip install '.[fast]' matplotlib scikit-learn

With the extra ``fast``, the first run compiles a few loops and takes up to a minute
longer; later runs find them on disk.

The idea is simple.  A ``UnitaryLinear`` is a ``torch.nn.Linear`` whose weight is an
orthogonal matrix, and stays orthogonal during training.  So it rotates or reflects a
vector, but never makes it longer or shorter: :math:`\|Wx\| = \|x\|`.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from projunn_manifold.layers import UnitaryLinear, param_groups
from projunn_manifold.optim import RiemannianAdam

torch.set_num_threads(1)
WIDTH, DEPTH, BATCH, EPOCHS = 64, 30, 64, 8

# %%
# The data
# --------
# scikit-learn includes 1797 images of digits with 8 × 8 pixels.  We keep 360 of them as
# test images.

digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32)
labels = torch.tensor(digits.target)
images = (images - images.mean()) / (2 * images.std())
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
train, test = order[:-360], order[-360:]

# %%
# The networks
# ------------
# Both networks have 30 layers with tanh after each.  Only the class of the layers
# differs.  Each step follows a part of the gradient that has rank ``k``.  Such a step
# costs :math:`O(kn^2)` for an :math:`n \times n` weight.


def deep(linear):
    """Return a network of 30 layers and an output layer for the ten classes."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(DEPTH) for layer in (linear(), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 10))


orthogonal = deep(lambda: UnitaryLinear(WIDTH, WIDTH, k=4))
plain = deep(lambda: nn.Linear(WIDTH, WIDTH))

# %%
# What happens to a signal
# ------------------------
# We run one batch through each network, forward and backward.  The signal is what
# distinguishes one image from another, so at every layer we record how far the images
# are from their mean.  We also record the size of the gradient at that layer.


def sizes(network):
    """Return the sizes of the signal and of the gradient after each hidden layer."""
    x, states = images[train[:256]], []
    for layer in network[:-1]:
        x = layer(x)
        if isinstance(layer, nn.Tanh):
            states.append(x)
    loss = cross_entropy(network[-1](x), labels[train[:256]])
    signals = [(state - state.mean(0)).norm().item() for state in states]
    gradients = torch.autograd.grad(loss, states)
    return signals, [gradient.norm().item() for gradient in gradients]


at_start = {"UnitaryLinear": sizes(orthogonal), "nn.Linear": sizes(plain)}

# %%
# Training
# --------
# One optimiser trains all parameters.  ``RiemannianAdam`` is Adam for ordinary weights,
# and keeps orthogonal weights orthogonal.  The learning rate of an orthogonal weight is
# about the angle of a step, so these weights need a learning rate of their own.
# ``param_groups`` makes the two parameter groups.


def accuracy_of(network, lr, unitary_lr):
    """Train a network, and return its accuracy on the test images."""
    torch.manual_seed(1)
    groups = param_groups(network, lr=lr, unitary_lr=unitary_lr)
    optimizer = RiemannianAdam(groups, lr=lr)
    for _ in range(EPOCHS):
        for chosen in train[torch.randperm(len(train))].split(BATCH):
            optimizer.zero_grad()
            cross_entropy(network(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    with torch.no_grad():
        return (network(images[test]).argmax(-1) == labels[test]).double().mean().item()


# %%
# A third network keeps its orthogonal weights at their initial values.  Only its biases
# and its last layer learn.  The learning rate of the plain network, the one made of
# ``nn.Linear``, is the best of 0.0003, 0.001 and 0.003.

frozen = deep(lambda: UnitaryLinear(WIDTH, WIDTH))
for layer in frozen:
    if isinstance(layer, UnitaryLinear):
        layer.weight.requires_grad_(False)

accuracy = accuracy_of(orthogonal, lr=0.01, unitary_lr=0.03)
accuracy_frozen = accuracy_of(frozen, lr=0.01, unitary_lr=0.03)
accuracy_plain = accuracy_of(plain, lr=0.001, unitary_lr=0.03)

# %%
# The picture: signals and gradients
# ----------------------------------
# Every ``nn.Linear`` shrinks the signal in the forward pass, and the gradient in the
# backward pass.  After 30 layers almost nothing is left of either: all images look the
# same.  Orthogonal layers preserve both, before training and after it.  The slow decline
# of the signal is due to tanh alone.

curves = {
    "nn.Linear": (at_start["nn.Linear"], "gray", "-"),
    "UnitaryLinear": (at_start["UnitaryLinear"], "tab:blue", "-"),
    "UnitaryLinear, after training": (sizes(orthogonal), "tab:blue", ":"),
}
figure, axes = plt.subplots(2, sharex=True, figsize=(5.6, 5), layout="constrained")
for panel, axis in enumerate(axes):
    for name, (found, colour, style) in curves.items():
        axis.semilogy(range(1, DEPTH + 1), found[panel], style, color=colour, label=name)
    axis.grid(alpha=0.3)
axes[0].set(title="size of the signal")
axes[1].set(title="size of the gradient", xlabel="layer")
axes[0].legend(loc="lower left")

# %%
# The number: test accuracy
# -------------------------
# The number is the accuracy on the test images.  Note the middle row: a network whose
# orthogonal weights never move does nearly as well on these digits.  Here most of the
# gain comes from the signal that reaches the last layer, and the last layer does the
# rest.  Training the weights pays off where a random rotation is not enough: in narrow
# layers, in recurrent networks (the next tutorial), or if a trained network has to learn
# a new task (the last tutorial).

print(f"UnitaryLinear, trained  {accuracy:.1%}")
print(f"UnitaryLinear, frozen   {accuracy_frozen:.1%}")
print(f"nn.Linear               {accuracy_plain:.1%}")

assert accuracy > 0.85, accuracy
assert accuracy_plain < 0.5, accuracy_plain
