r"""
A unitary recurrent network
===========================

Copying memory: eight symbols are shown, nothing happens for fifty steps, then they must be repeated.  A unitary
transition, :math:`\|W h\| = \|h\|`, keeps what was shown; a transition that is free to shrink states forgets it.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy, one_hot

from projunn_manifold.layers import UnitaryRNN, param_groups
from projunn_manifold.optim import RiemannianAdam

SYMBOLS, SHOWN, WAIT, HIDDEN, BATCH, STEPS = 8, 8, 50, 64, 64, 250
BLANK, ASK = SYMBOLS, SYMBOLS + 1

# %%
# An input is one of eight symbols, blank or the request to answer.  A network without memory answers blank until asked,
# and then guesses.


def sequences():
    """Return a batch of inputs ``(time, batch, width)`` and answers ``(time, batch)``."""
    symbols = torch.randint(SYMBOLS, (SHOWN, BATCH))
    inputs = torch.full((SHOWN + WAIT + SHOWN, BATCH), BLANK)
    answers = inputs.clone()
    inputs[:SHOWN], inputs[-SHOWN - 1], answers[-SHOWN:] = symbols, ASK, symbols
    return one_hot(inputs, SYMBOLS + 2).float(), answers


without_memory = SHOWN * math.log(SYMBOLS) / (2 * SHOWN + WAIT)

# %%
# ``UnitaryRNN`` takes the place of ``torch.nn.RNN``.  ``param_groups`` gives a unitary transition a rate of its own,
# and one optimiser moves everything.  The rate of all else is the best of 0.001, 0.003 and 0.01 for ``torch.nn.RNN``.


def train(network):
    """Return the losses of a network with a linear readout."""
    torch.manual_seed(1)
    readout = torch.nn.Linear(HIDDEN, SYMBOLS + 1)
    groups = [*param_groups(network, lr=0.01, unitary_lr=0.02), {"params": readout.parameters(), "lr": 0.01}]
    optimizer = RiemannianAdam(groups, lr=0.01)
    losses = []
    for _ in range(STEPS):
        inputs, answers = sequences()
        loss = cross_entropy(readout(network(inputs)[0]).flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


torch.manual_seed(0)
runs = {
    "UnitaryRNN": train(UnitaryRNN(SYMBOLS + 2, HIDDEN, nonlinearity="modrelu", k=1)),
    "torch.nn.RNN": train(torch.nn.RNN(SYMBOLS + 2, HIDDEN)),
}

# %%
# In as many steps the plain network has not even learnt to answer blank until it is asked.

figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
for name, losses in runs.items():
    axis.semilogy(losses, label=name)
axis.axhline(without_memory, color="gray", linestyle=":", label="without memory")
axis.set(title=f"copying {SHOWN} symbols after {WAIT} steps", xlabel="step", ylabel="loss")
axis.legend()

for name, losses in runs.items():
    print(f"{name:12} loss {losses[-1]:.4f}   without memory {without_memory:.4f}")
