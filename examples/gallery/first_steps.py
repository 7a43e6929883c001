r"""
First steps
===========

An unknown unitary matrix is learnt from samples of what it does, :math:`y = Ux`: the first experiment of the paper in
small.  Two runs keep the matrix unitary, with moves of rank 1 and of rank 4; a third is torch's SGD without constraint.
"""

import geoopt
import matplotlib.pyplot as plt
import torch

from projunn_manifold import UnitaryLowRank, unitarity_error

N, BATCH, STEPS = 32, 16, 500

# %%
# The goal and the start are Haar-distributed.  ``ManifoldParameter`` ties the start to its manifold; for geoopt's
# optimiser this is a parameter like any other.

torch.manual_seed(0)
target = UnitaryLowRank().random(N, N, dtype=torch.complex64)
start = UnitaryLowRank().random(N, N, dtype=torch.complex64)


def constrained(k):
    """Return a parameter that stays unitary, and its optimiser."""
    w = geoopt.ManifoldParameter(start.clone(), manifold=UnitaryLowRank(k=k))
    return w, geoopt.optim.RiemannianSGD([w], lr=1.0)


def free():
    """Return a parameter without constraint, and its optimiser."""
    w = torch.nn.Parameter(start.clone())
    return w, torch.optim.SGD([w], lr=1.0)


# %%
# All three see the same samples.


def train(w, optimizer):
    """Return the loss and the distance from unitarity at every step."""
    generator = torch.Generator().manual_seed(1)
    losses, errors = [], []
    for _ in range(STEPS):
        x = torch.randn(N, BATCH, dtype=torch.complex64, generator=generator)
        loss = (w @ x - target @ x).abs().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        errors.append(unitarity_error(w.detach()).item())
    return losses, errors


runs = {
    "projUNN-D, k = 1": train(*constrained(1)),
    "projUNN-D, k = 4": train(*constrained(4)),
    "SGD, unconstrained": train(*free()),
}

# %%
# Rank 4 follows more of each gradient than rank 1, and gets there in fewer steps.  Without constraint this problem is
# convex, and SGD solves it too, but by way of matrices that are far from unitary.

figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
for name, curves in runs.items():
    for axis, curve in zip(axes, curves, strict=True):
        axis.semilogy(curve, label=name)
axes[0].set(title="loss", xlabel="step")
axes[1].set(title=r"$\|W^H W - I\|_F / \sqrt{n}$", xlabel="step")
axes[1].legend()

for name, (losses, errors) in runs.items():
    print(f"{name:20} loss {losses[-1]:.1e}   largest error {max(errors):.1e}")
