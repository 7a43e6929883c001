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
from typing import Any, final

import torch
from torch import Tensor

from projunn_manifold.linalg import phases, small
from projunn_manifold.linalg.small import Small, namespace

__all__ = ["GEODESIC", "POLAR", "Angle"]


class Angle(ABC):
    """The angle α that a rotation by θ of the tangent becomes, and the functions φ and ψ made from it.

    θ is a tensor, or a NumPy array for a class that says so.
    """

    #: Whether θ may be a NumPy array; arrays are faster for a single matrix on CPU.
    takes_arrays = False
    #: Whether the compiled loops know this class as D (True) or as T (False); None: they do not know it.
    polar: bool | None = None

    def suited(self, x: Small) -> Small:
        """Return a small matrix in a form whose eigenvalues this class takes."""
        return x if self.takes_arrays or isinstance(x, Tensor) else torch.from_numpy(x)

    @abstractmethod
    def alpha(self, theta: Any) -> Any:
        """Return α."""

    @abstractmethod
    def phi(self, theta: Any) -> tuple[Any, Any]:
        """Return real and imaginary part of φ; θ may also be a number."""

    def complex_phi(self, theta: Any) -> Any:
        """Return φ, complex."""
        real, imaginary = self.phi(theta)
        return real + 1j * imaginary

    @abstractmethod
    def psi(self, theta: Any) -> Any:
        """Return ψ, complex."""

    def increment(self, omega: Tensor) -> Tensor:  # (*batch, n, n) -> (*batch, n, n)
        """Return f(Ω) - I for a skew-Hermitian Ω of any size, where f(Ω) has the eigenvalues e^{iα(θ)}."""
        return phases.increment_of_phases(omega, self.alpha)

    def functions(self, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (*batch, r, r) -> the same, three times
        """Return ψ(E), φ(E) and f(E) - I for a small skew-Hermitian tensor E that a fixed number of products can do."""
        theta, basis = torch.linalg.eigh(-1j * e)
        phi = self.complex_phi(theta)
        found = (small.spectral(basis, values) for values in (self.psi(theta), phi, 1j * theta * phi))
        psi, phi, increment = (t if e.is_complex() else t.real for t in found)
        return psi, phi, increment


@final
class _Geodesic(Angle):
    takes_arrays = True
    polar = False

    def alpha(self, theta: Any) -> Any:
        return theta

    def phi(self, theta: Any) -> tuple[Any, Any]:
        return _sinc(theta), theta / 2 * _sinc(theta / 2) ** 2

    def psi(self, theta: Any) -> Any:
        imaginary = (1 - _sinc(theta)) / namespace(theta).where(theta == 0, 1.0, theta)
        return _sinc(theta / 2) ** 2 / 2 + 1j * imaginary

    def increment(self, omega: Tensor) -> Tensor:
        return phases.exponential_increment(omega)

    def functions(self, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return phases.exponential_functions(e)


@final
class _Polar(Angle):
    takes_arrays = True
    polar = True

    def alpha(self, theta: Any) -> Any:
        return namespace(theta).arctan(theta)

    def phi(self, theta: Any) -> tuple[Any, Any]:
        secant = (1 + theta * theta) ** 0.5
        return 1 / secant, theta / (secant * (1 + secant))

    def psi(self, theta: Any) -> Any:
        secant = (1 + theta * theta) ** 0.5
        return (1 + 1j * theta) / (secant * (1 + secant))

    def increment(self, omega: Tensor) -> Tensor:
        return phases.polar_increment(omega)

    def functions(self, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return phases.polar_functions(e)


GEODESIC: Angle = _Geodesic()
POLAR: Angle = _Polar()


def _sinc(x: Any) -> Any:
    """Return sin(x) / x, and 1 at 0."""
    if isinstance(x, float):
        return math.sin(x) / x if x else 1.0
    return namespace(x).sinc(x / math.pi)
