r"""
A recurrent network that remembers
==================================

.. image:: /tutorials/images/sphx_glr_plot_2_recurrent_001.png
   :alt: What this page makes
   :class: sphx-glr-single-img

At the end of this tutorial you will have a recurrent network that is shown eight symbols,
waits for a hundred steps, and repeats the symbols.  ``torch.nn.RNN`` learns nothing of
this in the same number of steps.

A recurrent network multiplies its state by the same matrix again and again.  If the
matrix shrinks the state, the state is soon forgotten.  If the matrix stretches the state,
the state explodes.  The matrix of a ``UnitaryRNN`` does neither, throughout training.
"""

import math

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from projunn_manifold.layers import UnitaryRNN, param_groups
from projunn_manifold.optim import RiemannianAdam

torch.set_num_threads(1)
SYMBOLS, SHOWN, WAIT, BATCH, STEPS = 8, 8, 100, 32, 150
BLANK, ASK = SYMBOLS, SYMBOLS + 1

# %%
# The task
# --------
# Each input is one of eight symbols, a blank, or the request to answer.  The best network
# without memory answers blank until it is asked, and then guesses.  Its loss is known.


def sequences():
    """Return a batch of inputs ``(time, batch, width)`` and answers ``(time, batch)``."""
    symbols = torch.randint(SYMBOLS, (SHOWN, BATCH))
    inputs = torch.full((SHOWN + WAIT + SHOWN, BATCH), BLANK)
    answers = inputs.clone()
    inputs[:SHOWN], inputs[-SHOWN - 1], answers[-SHOWN:] = symbols, ASK, symbols
    return one_hot(inputs, SYMBOLS + 2).float(), answers


without_memory = SHOWN * math.log(SYMBOLS) / (2 * SHOWN + WAIT)

# %%
# The networks
# ------------
# ``UnitaryRNN`` takes the arguments of ``nn.RNN`` and returns outputs in the same form.
# Its nonlinearity, modReLU, has a learnable bias.  A second ``UnitaryRNN`` is frozen: its
# recurrent matrix stays at its initial value, and everything else learns.


class Network(nn.Module):
    """A recurrent network with a linear readout of every state."""

    def __init__(self, recurrent, outputs):
        super().__init__()
        self.recurrent, self.readout = (
            recurrent,
            nn.Linear(recurrent.hidden_size, outputs),
        )

    def forward(self, x):
        """Map ``(time, batch, inputs)`` to ``(time, batch, outputs)``."""
        return self.readout(self.recurrent(x)[0])


def frozen(recurrent):
    """Keep the recurrent matrix at its initial value."""
    recurrent.weight_hh_l0.requires_grad_(False)
    return recurrent


def networks(inputs, hidden, outputs, **options):
    """Return the three networks, initialised from the same seed."""
    recurrent = {
        "UnitaryRNN": lambda: UnitaryRNN(inputs, hidden, **options),
        "UnitaryRNN, frozen": lambda: frozen(UnitaryRNN(inputs, hidden, **options)),
        "nn.RNN": lambda: nn.RNN(inputs, hidden),
    }
    for name, make in recurrent.items():
        torch.manual_seed(0)
        yield name, Network(make(), outputs)


# %%
# Training
# --------
# One optimiser trains all parameters.  The recurrent matrix has a learning rate of its
# own, which is about the angle of a step.  The learning rate of all other parameters is
# the best of 0.001, 0.003 and 0.01 for ``nn.RNN``.

losses = {}
for name, network in networks(SYMBOLS + 2, 64, SYMBOLS + 1, k=1):
    optimizer = RiemannianAdam(param_groups(network, lr=0.01, unitary_lr=0.02), lr=0.01)
    losses[name] = []
    for _ in range(STEPS):
        inputs, answers = sequences()
        loss = cross_entropy(network(inputs).flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[name].append(loss.item())

# %%
# A task for which the matrix has to learn
# ----------------------------------------
# The frozen network remembers nearly as well as the trained one.  This task only needs
# that nothing is lost, and a random orthogonal matrix loses nothing.  So copying shows
# why the constraint helps, not why training the matrix helps.
#
# Here is a task for which the matrix must learn: to classify a digit whose 64 pixels
# arrive one by one, in a shuffled order, with only 32 hidden units.

digits = load_digits()
torch.manual_seed(0)
pixels = torch.tensor(digits.data, dtype=torch.float32)[:, torch.randperm(64)] / 16
labels, order = torch.tensor(digits.target), torch.randperm(len(digits.target))
train, test = order[:-360], order[-360:]


def answer(network, chosen):
    """Return the scores after the last pixel."""
    return network(pixels[chosen].T.unsqueeze(-1))[-1]


accuracy = {}
for name, network in networks(1, 32, 10, k=4, nonlinearity="relu"):
    optimizer = RiemannianAdam(param_groups(network, lr=0.003, unitary_lr=0.1), lr=0.003)
    for _ in range(15):
        for chosen in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            cross_entropy(answer(network, chosen), labels[chosen]).backward()
            optimizer.step()
    with torch.no_grad():
        right = answer(network, test).argmax(-1) == labels[test]
        accuracy[name] = right.double().mean().item()

# %%
# The picture: both tasks
# -----------------------
# In the upper panel, only ``nn.RNN`` stays above the dotted line, which is the loss
# without memory.  In the lower panel the frozen network is far behind, but ``nn.RNN`` is
# not: 64 steps are few, and the task does not need a long memory.

COLOURS = {"UnitaryRNN": "tab:blue", "UnitaryRNN, frozen": "gray", "nn.RNN": "black"}
figure, axes = plt.subplots(
    2, figsize=(5.6, 5.4), height_ratios=(3, 2), layout="constrained"
)
for name, curve in losses.items():
    axes[0].semilogy(curve, color=COLOURS[name], label=name)
axes[0].axhline(without_memory, color="black", linestyle=":", label="without memory")
axes[0].set(title=f"copying after {WAIT} steps: loss", xlabel="step")
axes[0].grid(alpha=0.3)
axes[0].legend()
percent = [100 * share for share in accuracy.values()]
bars = axes[1].barh(list(accuracy), percent, color=COLOURS.values())
axes[1].bar_label(bars, fmt="%.0f", padding=3)
axes[1].set(title="shuffled digits: test accuracy, %", xlim=(0, 100))
axes[1].invert_yaxis()

# %%
# The number: loss relative to a network without memory
# -----------------------------------------------------
# The number is the loss of the last steps, as a percentage of the loss without memory.

shares = {name: sum(curve[-20:]) / 20 / without_memory for name, curve in losses.items()}
for name, share in shares.items():
    copying = f"{share:.0%} of the loss without memory"
    print(f"{name:18}  copying: {copying:30}  digits: {accuracy[name]:.1%}")

assert shares["UnitaryRNN"] < 0.5, shares
assert shares["nn.RNN"] > 1, shares
assert accuracy["UnitaryRNN"] > accuracy["UnitaryRNN, frozen"] + 0.05, accuracy
