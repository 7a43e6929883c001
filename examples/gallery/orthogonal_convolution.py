r"""
An orthogonal convolution and its singular values
=================================================

An orthogonal convolution preserves norms, :math:`\|y\| = \|x\|`: all its singular values are one, and stay one during
training.  Here it learns from noisy samples to shift images and to permute their channels.  For comparison, an
unconstrained torch convolution learns the same task.
"""

import matplotlib.pyplot as plt
import torch

from projunn_manifold.layers import OrthogonalConv2d
from projunn_manifold.optim import RiemannianSGD

CHANNELS, SIDE, NOISE, STEPS = 3, 8, 0.3, 300


def moved(x):
    """Return the images two rows further down, the last channel first."""
    return x.roll(2, dims=-2).roll(1, dims=-3)


# %%
# Both kernels are as large as the image.  ``to_plain`` turns an orthogonal convolution into a torch convolution, so
# that both start as the same map.  In the Fourier domain, some blocks of the convolution are real.  Their determinants
# cannot change sign in training, so the task must have determinant one, which it has with an odd number of channels.

torch.manual_seed(0)
orthogonal = OrthogonalConv2d(CHANNELS, CHANNELS, image_size=SIDE, bias=False, k=1)
plain = orthogonal.to_plain()


def train(layer, optimizer):
    """Return the mean squared error, without the noise, at every step."""
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        x = torch.randn(16, CHANNELS, SIDE, SIDE, generator=generator)
        y = layer(x)
        losses.append((y.detach() - moved(x)).square().mean().item())
        optimizer.zero_grad()
        noise = NOISE * torch.randn(x.shape, generator=generator)
        (y - moved(x) - noise).square().mean().backward()
        optimizer.step()
    return losses


losses = {
    "OrthogonalConv2d": train(orthogonal, RiemannianSGD(orthogonal.parameters(), lr=10.0)),
    "torch.nn.Conv2d": train(plain, torch.optim.SGD(plain.parameters(), lr=0.3)),
}

# %%
# The noise reaches every entry of the plain kernel and spreads its singular values.  The singular values of the
# orthogonal convolution are one up to rounding, before, during and after training.  How far the losses fall depends
# on the learning rates.

values = {
    "OrthogonalConv2d": orthogonal.singular_values(),
    "torch.nn.Conv2d": orthogonal.singular_values(plain.weight.detach()),
}
figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
for name in losses:
    axes[0].semilogy(losses[name], label=name)
    axes[1].plot(values[name], label=name)
axes[0].set(title="loss", xlabel="step")
axes[0].legend()
axes[1].set(title="singular values after training", xlabel="number")

for name, found in values.items():
    print(f"{name:16} loss {losses[name][-1]:.1e}   singular values {found.min():.6f} to {found.max():.6f}")
