r"""
An unknown rotation of 512 dimensions
=====================================

A rotation is learnt from samples of what it does, :math:`y = Ux`: the first experiment of the projUNN paper.  The same
optimiser moves the same matrix on two manifolds, for as many seconds: this package's, with moves of rank 4, and
geoopt's ``EuclideanStiefel``, whose step multiplies and factorises whole matrices.
"""

import time

import geoopt
import matplotlib.pyplot as plt
import torch

from projunn_manifold import UnitaryLowRank, unitarity_error, warm_up

torch.set_num_threads(1)
N, BATCH, SECONDS = 512, 16, 6

# %%
# Target and start are drawn uniformly among the rotations.  Both have determinant 1: no continuous path leads from one
# sign to the other.


def rotation(generator):
    """Return a random rotation."""
    matrix = UnitaryLowRank().random(N, N, generator=generator)
    matrix[:, 0] *= torch.linalg.det(matrix.double()).sign()
    return matrix


generator = torch.Generator().manual_seed(0)
target, start = rotation(generator), rotation(generator)

# %%
# The learning rates are the best of 8, 16, 32 and 64.  The frozen matrix never moves.  The loops are compiled before
# the clock starts.

manifolds = {
    "UnitaryLowRank(k=4)": (UnitaryLowRank(k=4), 32.0),
    "geoopt.EuclideanStiefel": (geoopt.EuclideanStiefel(), 32.0),
    "frozen": (UnitaryLowRank(k=4), 0.0),
}
warm_up()


def train(manifold, lr):
    """Return the seconds and the loss after every step, and the matrix."""
    w = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
    optimizer = geoopt.optim.RiemannianSGD([w], lr=lr)
    samples = torch.Generator().manual_seed(1)
    begin, seconds, losses = time.perf_counter(), [], []
    while time.perf_counter() - begin < SECONDS:
        x = torch.randn(N, BATCH, generator=samples)
        loss = (w @ x - target @ x).square().sum() / (2 * N * BATCH)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
        losses.append(loss.item())
    return seconds, losses, w.detach()


runs = {name: train(*choice) for name, choice in manifolds.items()}

# %%
# A step of the low-rank manifold moves less of the matrix, and costs so little that it makes many more of them.

figure, axis = plt.subplots(figsize=(5.6, 3.8), layout="constrained")
for (name, (seconds, losses, _)), colour in zip(runs.items(), ("tab:blue", "gray", "black"), strict=True):
    axis.semilogy(seconds, losses, ":" if name == "frozen" else "-", color=colour, label=name)
axis.set(xlabel="seconds", ylabel="loss")
axis.grid(alpha=0.3)
axis.legend()

for name, (seconds, losses, w) in runs.items():
    last = sum(losses[-20:]) / len(losses[-20:])
    step = 1e3 * seconds[-1] / len(seconds)
    error = unitarity_error(w).item()
    print(f"{name:24} {len(losses):6} steps of {step:5.2f} ms   loss {last:.1e}   error {error:.0e}")

assert runs["UnitaryLowRank(k=4)"][1][-1] < runs["geoopt.EuclideanStiefel"][1][-1] / 10
assert runs["frozen"][1][-1] > 0.5
