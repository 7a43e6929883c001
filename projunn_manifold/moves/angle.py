r"""The functions of a rotation angle in which projUNN-D and projUNN-T differ.

A tangent u at X lifts to a skew-Hermitian A with A X = u, whose eigenvalues are iθ.  Both maps turn each eigenspace of
A by an angle α(θ): Y = g X, and g has the eigenvalues :math:`e^{i\alpha}`.  In closed forms this appears as

.. math:: \varphi = \frac{e^{i\alpha} - 1}{i\theta},\qquad \psi = \frac{\varphi - 1}{i\theta}.

- :data:`GEODESIC`, projUNN-T, the exponential: :math:`\alpha = \theta`;
- :data:`POLAR`, projUNN-D, the closest unitary to X + u: :math:`\alpha = \arctan\theta` (square X).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from projunn_manifold.linalg import phases
from projunn_manifold.linalg.dense import Scalar

__all__ = ["GEODESIC", "POLAR", "Angle"]


class Angle(ABC):
    """The angle α that a rotation by θ of the tangent becomes, and the functions φ and ψ made from it."""

    @abstractmethod
    def alpha(self, theta: Tensor) -> Tensor:
        """Return α."""

    @abstractmethod
    def phi(self, theta: Scalar) -> tuple[Scalar, Scalar]:
        """Return real and imaginary part of φ, of a tensor or of a number."""

    def complex_phi(self, theta: Tensor) -> Tensor:
        """Return φ, complex."""
        return torch.complex(*map(torch.as_tensor, self.phi(theta)))

    @abstractmethod
    def psi(self, theta: Tensor) -> Tensor:
        """Return ψ, complex."""

    def increment(self, omega: Tensor) -> Tensor:  # (*batch, n, n) -> (*batch, n, n)
        """Return f(Ω) - I for a skew-Hermitian Ω of any size, where f(Ω) has the eigenvalues e^{iα(θ)}."""
        return phases.increment_of_phases(omega, self.alpha)


@final
class _Geodesic(Angle):
    def alpha(self, theta: Tensor) -> Tensor:
        return theta

    def phi(self, theta: Scalar) -> tuple[Scalar, Scalar]:
        return _sinc(theta), theta / 2 * _sinc(theta / 2) ** 2

    def psi(self, theta: Tensor) -> Tensor:
        rest = (1 - torch.sinc(theta / math.pi)) / torch.where(theta == 0, 1.0, theta)
        return torch.complex(torch.sinc(theta / (2 * math.pi)).square() / 2, rest)

    def increment(self, omega: Tensor) -> Tensor:
        return phases.exponential_increment(omega)


@final
class _Polar(Angle):
    def alpha(self, theta: Tensor) -> Tensor:
        return torch.atan(theta)

    def phi(self, theta: Scalar) -> tuple[Scalar, Scalar]:
        secant = (1 + theta * theta) ** 0.5
        return 1 / secant, theta / (secant * (1 + secant))

    def psi(self, theta: Tensor) -> Tensor:
        secant = (1 + theta * theta).sqrt()
        return torch.complex(torch.ones_like(theta), theta) / (secant * (1 + secant))

    def increment(self, omega: Tensor) -> Tensor:
        return phases.polar_increment(omega)


GEODESIC: Angle = _Geodesic()
POLAR: Angle = _Polar()


def _sinc(x: Scalar) -> Scalar:
    """Return sin(x) / x, and 1 at 0."""
    return torch.sinc(x / math.pi) if isinstance(x, Tensor) else math.sin(x) / x if x else 1.0
