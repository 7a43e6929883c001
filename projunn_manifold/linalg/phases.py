r"""Functions of a skew-Hermitian Ω with eigenvalues iθ by matrix products, in Ω's own precision.

.. math:: e^\Omega - I \qquad\text{and}\qquad (I + \Omega)(I - \Omega^2)^{-1/2} - I

are what the geodesic and the polar retraction add to the identity.  A factorisation of side n takes the time of 20 to
80 products.  A polynomial takes 2 to 9, by the degree that the size of Ω asks for, and that is known from products
which the polynomial needs anyway: :math:`\|\Omega\|_2^4 = \|\Omega^4\|_2 \le \|\Omega^4\|_\infty`.

Where the host cannot look at values (on a GPU, while traced) the number of products is fixed.  It is good up to
``LONGEST``, and an Ω for which that bound, up to 1.6 times its norm, is larger is shortened to it.

Sources: Paterson and Stockmeyer 1973 for the evaluation; for the iteration Amsel, Persson, Musco, Gower 2025 (*The
Polar Express*), who compose minimax polynomials of degree 5.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from projunn_manifold import context
from projunn_manifold.linalg import dense, small

__all__ = [
    "LONGEST",
    "LONGEST_SUM",
    "corrected",
    "excess_of",
    "exponential_functions",
    "exponential_increment",
    "increment_of_phases",
    "polar",
    "polar_functions",
    "polar_increment",
    "polar_near",
    "polar_of_any_sum",
    "polar_of_sum",
    "within_reach",
]

LONGEST = 64.0  # ‖Ω‖₂ that a fixed number of products is good for
LONGEST_SUM = math.sqrt(1 + LONGEST**2)  # ‖X + u‖₂ of such a tangent u at X; its singular values are at least 1
_LONG_GEODESIC = 8.0  # ‖Ω‖₂ beyond which repeated squaring loses digits that an eigendecomposition keeps
_LONG_POLAR = 2.0  # ‖Ω‖₂ beyond which the coefficients of a polynomial outgrow its values
_SHORT = 2.0**-20
_SHORT_SQUARE = 1 / 16  # ‖N‖₂ up to which a polynomial of low degree serves
_BEYOND = 1 / 64  # share by which intervals are widened: rounding leads beyond their ends, where slopes are steep
_UPPER = 1 / 32  # where the upper part of an interval of singular values starts, relative to its end
_DEGREES = (2, 4, 6, 9, 12, 16)  # of the exponential's series: the highest for so many products, 1 to 6


def exponential_increment(omega: Tensor) -> Tensor:  # (*batch, n, n) -> (*batch, n, n)
    r"""Return :math:`e^\Omega - I` by a part of its series, scaled and squared.

    Cost in single precision: 2 or 3 products for :math:`\|\Omega\|_2 \le 0.1`, 6 up to 1, one more for each factor of
    two.
    """
    square = omega @ omega
    if context.readable(omega):
        degree, squarings = _series(_largest_row_sum(square) ** 0.5, omega.dtype)
        if degree + squarings > 4:  # a product for a sharper bound is worth it
            bound = _largest_row_sum(square @ square) ** 0.25
            if not bound <= _LONG_GEODESIC:
                return increment_of_phases(omega, lambda theta: theta, torch.linalg.matrix_exp)
            degree, squarings = _series(bound, omega.dtype)
    else:
        scale = _shrinkage(square)
        omega, square = omega * scale, square * (scale * scale)
        degree, squarings = _series(LONGEST, omega.dtype)
    if squarings:
        omega, square = omega * 0.5**squarings, square * 0.25**squarings
    coefficients = [0.0, *(1 / math.factorial(j) for j in range(1, degree + 1))]
    increment = _polynomial(coefficients, omega, square)
    for _ in range(squarings):
        increment = dense.plus_product(2 * increment, increment, increment)
    return increment


def polar_increment(omega: Tensor) -> Tensor:  # (*batch, n, n) -> (*batch, n, n)
    r"""Return :math:`(I + \Omega)(I - \Omega^2)^{-1/2} - I`: the polar factor of I + Ω, less I.

    Cost in single precision: 3 products for :math:`\|\Omega\|_2 \le 0.05`, 6 to 8 up to 1, 12 to 16 beyond 2.
    """
    square = -(omega @ omega)  # eigenvalues θ²
    if not context.readable(omega):
        return polar_of_sum(omega * _shrinkage(square))
    bound = _largest_row_sum(square)
    if bound < _LONG_POLAR and _degree(_level(bound), torch.finfo(omega.dtype).eps) == 1:
        shrink = _inverse_root_increment(square, None, bound)
    else:
        fourth = square @ square
        bound = _largest_row_sum(fourth) ** 0.5
        if not bound <= _LONG_POLAR**2:
            longest = math.sqrt(1 + bound)
            if longest <= LONGEST:
                return _by_iteration(omega, _level(longest))
            return increment_of_phases(omega, torch.atan, _long_polar)
        shrink = _inverse_root_increment(square, fourth, bound)
    return dense.plus_product(omega + shrink, omega, shrink)


def exponential_functions(e: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (*batch, r, r) -> the same, three times
    r"""Return ψ, φ = I + Eψ and f = Eφ = :math:`e^E - I` for any skew-Hermitian E up to ``LONGEST``, without a look.

    ψ is the series of :math:`1/2! + z/3! + z^2/4! + \dots`, of E divided by a power of two;
    :math:`\psi(2z) = \tfrac14(\varphi(z)^2 + 2\psi(z))` and :math:`\varphi(2z) = \varphi(z)(1 + \tfrac z2\varphi(z))`.
    """
    squarings = math.ceil(math.log2(2 * LONGEST))
    x = e * 0.5**squarings
    psi = _polynomial([1 / math.factorial(j + 2) for j in range(_terms(e.dtype))], x, None)
    phi = _plus_identity(x @ psi, 1.0)
    for _ in range(squarings):
        psi = dense.plus_product(psi / 2, phi / 4, phi)
        phi = dense.plus_product(phi, phi / 2, x @ phi)
        x = 2 * x
    return psi, phi, e @ phi


def polar_functions(e: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (*batch, r, r) -> the same, three times
    r"""Return ψ, φ = I + Eψ and f = Eφ = :math:`(I + E)C - I`, :math:`C = (I - E^2)^{-1/2}`, likewise.

    C is the Hermitian part of the polar factor of I + E, and :math:`\chi = C^2(I + C)^{-1}` a polynomial in C.  Then
    :math:`\psi = (I + E)\chi` and :math:`\varphi = C + E\chi`; to multiply by E more often would multiply the rounding
    of C.
    """
    longest = LONGEST_SUM
    increment = polar_of_sum(e)
    cosine = _plus_identity(dense.sym(increment), 1.0)
    middle, half = (1 + 1 / longest) / 2, (1 - 1 / longest) / 2
    chi = _polynomial(_chi(longest, torch.finfo(e.dtype).eps), _plus_identity(cosine / half, -middle / half), None)
    turned = e @ chi
    return chi + turned, cosine + turned, increment


def polar_of_sum(d: Tensor) -> Tensor:  # (*batch, n, m) -> (*batch, n, m)
    r"""Return the polar factor of Î + D, less Î = [I; 0], for D = [Ω; C] up to ``LONGEST``, without a look.

    With :math:`N = D^H D` it is :math:`D + (\hat I + D)\big((I + N)^{-1/2} - I\big)`.  For short D that is N times a
    polynomial: exact to the digits of a small increment, for a constant error would add up over many steps.  Long D
    takes the iteration.
    """
    start = dense.columns_of_identity(*d.shape, dtype=d.dtype, device=d.device)
    square = dense.adjoint_times(d, d)
    near = _short_increment(d, square, 0.0)
    far = polar((start + d) / LONGEST_SUM, LONGEST_SUM) - start
    increment = torch.where(_row_sums(square)[..., None, None] <= _SHORT_SQUARE, near, far)
    return corrected(increment, excess_of(increment))


def polar_of_any_sum(d: Tensor, longest: float) -> tuple[Tensor, Tensor]:  # (*batch, n, m) -> the same, (*batch,)
    r"""Return the polar factor of Î + D, less Î, for any D = [H; C], and where it is not found, without a look.

    There the increment is zero.  It is found for singular values of Î + D from σ / ``longest`` to σ, the larger of 1
    and the root of the largest row sum of :math:`(\hat I + D)^H (\hat I + D)`.  For much smaller ones it is not found:
    what the iteration makes of them is not unitary.  Small N is treated as by :func:`polar_of_sum`, with
    :math:`N = H + H^H + D^H D`, which may be negative.
    """
    start = dense.columns_of_identity(*d.shape, dtype=d.dtype, device=d.device)
    excess = excess_of(d)
    near = _short_increment(d, excess, -_SHORT_SQUARE)
    gram = _plus_identity(excess.clone(), 1.0)
    size = _row_sums(gram).sqrt().clamp_min(1.0)
    far = polar((start + d) / size[..., None, None], longest) - start
    increment = torch.where((_row_sums(excess) <= _SHORT_SQUARE)[..., None, None], near, far)
    defect = excess_of(increment)
    limit = dense.tolerance(d.dtype, d.shape[-1]) * math.sqrt(d.shape[-1])
    lost = ~(torch.linalg.matrix_norm(defect) <= limit)  # which NaN is
    return corrected(increment, defect).masked_fill(lost[..., None, None], 0), lost


def excess_of(d: Tensor) -> Tensor:  # (*batch, n, m) -> (*batch, m, m)
    r"""Return :math:`(\hat I + D)^H (\hat I + D) - I`, to the digits of a small D."""
    inside = d[..., : d.shape[-1], :]
    return dense.plus_product(inside + inside.mH, d.mH, d)


def corrected(increment: Tensor, excess: Tensor) -> Tensor:  # (*batch, n, m), (*batch, m, m) -> (*batch, n, m)
    """Return what the polar factor of a sum Î + D adds to Î, given its excess, after a step of Newton and Schulz.

    Its rounding error is then relative to itself: one of the size of Î or of D would add up where a step repeats.
    """
    increment = dense.plus_product(increment, increment, excess, alpha=-0.5)
    increment[..., : excess.shape[-1], :].sub_(excess, alpha=0.5)
    return increment


def within_reach(omega: Tensor) -> tuple[Tensor, Tensor]:  # (*batch, n, n) -> (*batch, n, n), (*batch,)
    """Return Ω, shortened where a fixed number of products would not do, and where that is."""
    scale = _shrinkage(omega @ omega)
    return omega * scale, scale[..., 0, 0] < 1


def increment_of_phases(
    omega: Tensor, alpha: Callable[[Tensor], Tensor], smooth: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return f(Ω) - I, where f(Ω) has the eigenvalues e^{iα(θ)}, from an eigendecomposition in double precision.

    Eigenvectors have no derivatives where angles repeat; those of ``smooth``, the same function of Ω up to a constant,
    take their place.
    """
    wide = dense.finite_entries(dense.in_double(omega))
    if smooth is None or not context.wants_derivatives(omega):
        return small.to(small.phase_core(wide, alpha), omega)
    value = small.to(small.phase_core(wide.detach(), alpha), omega)
    return dense.with_derivatives_of(small.to(smooth(wide), omega), value)


def polar_near(core: Tensor, known: Tensor, h: Tensor, gram: Tensor) -> Tensor:
    r"""Return C of the polar factor X + P C Q^H of X + P ``core`` Q^H, with derivatives of first and second order.

    P = [X Q, Q'], with Q' normal to X, has the Gram matrix ``gram``; C is ``(*batch, p, q)``.  The polar factor Y of
    the sum M is known by value: Y Q = P ``known``, and the Hermitian factor H satisfies H Q = Q diag(``h``).  The
    equations are that Y is an isometry, that :math:`Y^H M` is Hermitian, and that :math:`Y Y^H M = M`.  Each of two
    Newton steps, whose Jacobian is that of the known value, makes another order right.
    """
    q = core.shape[-1]
    embedding = dense.columns_of_identity(*core.shape[-2:], dtype=core.dtype, device=core.device)
    rows, columns = h[..., :, None], h[..., None, :]
    found = known - embedding
    for _ in range(2):
        weighted = found.mH @ gram
        product = core[..., :q, :] + found[..., :q, :].mH + weighted @ core  # Y^H M less the identity
        hermitian = -(found[..., :q, :] + found[..., :q, :].mH + weighted @ found) / 2
        turn = product - product.mH + hermitian * columns - rows * hermitian
        normal = core - found - (embedding + found @ gram[..., :q, :q]) @ product
        normal = normal - known @ (known.mH @ normal)
        found = found + known @ (hermitian + turn / (rows + columns)) + normal / columns
    return found


def _long_polar(omega: Tensor) -> Tensor:
    u, h, vh = torch.linalg.svd(_plus_identity(omega.detach().clone(), 1.0))
    one = torch.eye(omega.shape[-1], dtype=omega.dtype, device=omega.device)
    return vh.mH @ polar_near(vh @ omega @ vh.mH, vh @ u, h, one) @ vh


# -- sizes ---------------------------------------------------------------------------------------------------


def _row_sums(x: Tensor) -> Tensor:  # (*batch, n, n) -> (*batch,)
    """Return ‖x‖_∞, the largest row sum, which bounds ‖x‖₂ for Hermitian x."""
    return x.detach().abs().sum(-1).amax(-1)


def _largest_row_sum(x: Tensor) -> float:
    """Return the largest of a stack; 0 for an empty one."""
    return _row_sums(x).max().item() if x.numel() else 0.0


def _shrinkage(square: Tensor) -> Tensor:  # (*batch, n, n) -> (*batch, 1, 1)
    """Return the factors that bring the bounds of ‖Ω‖₂, given Ω², down to LONGEST, without a look at them."""
    return (LONGEST / _row_sums(square @ square) ** 0.25).clamp_max(1.0)[..., None, None]


# -- polynomials ---------------------------------------------------------------------------------------------


def _series(bound: float, dtype: torch.dtype) -> tuple[int, int]:
    """Return degree and number of squarings with which the exponential's series is exact to rounding."""
    return min(
        ((degree, max(0, math.ceil(math.log2(max(bound, _SHORT) / _reach(degree, dtype))))) for degree in _DEGREES),
        key=lambda way: _DEGREES.index(way[0]) + way[1],
    )


@functools.cache
def _reach(degree: int, dtype: torch.dtype) -> float:
    """Return the θ up to which the first term left out of the exponential's series is rounding."""
    return float((torch.finfo(dtype).eps / 2 * math.factorial(degree + 1)) ** (1 / (degree + 1)))


def _degree(level: float, eps: float) -> int:
    """Return the degree at which (1 + s)^(-1/2) on [0, level] is exact to rounding, by its distance from s = -1."""
    pole = 1 + 2 / level  # in t; coefficients in Chebyshev's basis fall by pole + sqrt(pole² - 1) from each to the next
    return max(1, math.ceil(-math.log(eps) / math.acosh(pole)) - 1)


def _level(bound: float) -> float:
    """Round a bound up to a power of the fourth root of 2, so that few sets of coefficients are made."""
    return float(2 ** (math.ceil(4 * math.log2(max(bound, _SHORT))) / 4))


@functools.cache
def _inverse_root(level: float, eps: float) -> list[float]:
    """Return the coefficients of (1 + s)^(-1/2) - 1 in powers of t = 2 s / level - 1, for |t| <= 1."""

    def increment(t: Any) -> Any:
        root = np.sqrt(1 + level * (t + 1) / 2)
        return -(level * (t + 1) / 2) / (root * (1 + root))

    return [float(c) for c in chebyshev.cheb2poly(chebyshev.chebinterpolate(increment, _degree(level, eps)))]


@functools.cache
def _shrinking(low: float, high: float, eps: float) -> list[float]:
    """Return the coefficients of (1 - (1 + s)^(-1/2)) / s in powers of t, -1 for s = low > -1 and 1 for s = high."""

    def shrinking(t: Any) -> Any:
        root = np.sqrt(1 + low + (high - low) * (t + 1) / 2)
        return 1 / (root * (1 + root))

    degree = _degree((high - low) / (1 + low), eps)
    return [float(c) for c in chebyshev.cheb2poly(chebyshev.chebinterpolate(shrinking, degree))]


def _short_increment(d: Tensor, n: Tensor, low: float) -> Tensor:
    """Return ``D + (Î + D) ((I + N)^(-1/2) - I)`` for N from ``low`` to ``_SHORT_SQUARE``: N times a polynomial."""
    t = _plus_identity(n * (2 / (_SHORT_SQUARE - low)), -(_SHORT_SQUARE + low) / (_SHORT_SQUARE - low))
    shrink = -n @ _polynomial(_shrinking(low, _SHORT_SQUARE, torch.finfo(d.dtype).eps), t, None)
    increment = dense.plus_product(d, d, shrink)
    increment[..., : d.shape[-1], :].add_(shrink)
    return increment


def _inverse_root_increment(s: Tensor, square: Tensor | None, bound: float) -> Tensor:
    """Return ``(I + s)^(-1/2) - I`` for a Hermitian s >= 0 of norm at most ``bound``, given its square if that exists.

    The polynomial is one in t = 2 s / level - I, whose eigenvalues fill [-1, 1].
    """
    level = _level(bound)
    scale = 2 / level
    t = _plus_identity(s * scale, -1.0)
    if square is not None:
        square = _plus_identity((square * scale - 2 * s) * scale, 1.0)
    return _polynomial(_inverse_root(level, torch.finfo(s.dtype).eps), t, square)


def _polynomial(coefficients: list[float], x: Tensor, square: Tensor | None) -> Tensor:
    """Return Σ c_j x^j, given x² if the degree is above 1, by Horner's rule for blocks of coefficients."""
    width = _width(len(coefficients) - 1)
    powers = [x]
    for j in range(2, width + 1):
        powers.append(square if j == 2 and square is not None else powers[-1] @ x)
    blocks = [coefficients[low : low + width] for low in range(0, len(coefficients), width)]
    top = blocks.pop()
    result = _combination(blocks.pop() + top if len(top) == 1 else top, powers)
    for block in reversed(blocks):
        result = dense.plus_product(_combination(block, powers), result, powers[-1])
    return result


def _width(degree: int) -> int:
    """Return the width of blocks that takes the fewest products: width - 1 for powers, one for each block but one."""
    return min(range(min(2, degree), degree + 1), key=lambda width: width + degree // width - (degree % width == 0))


def _combination(coefficients: list[float], powers: list[Tensor]) -> Tensor:
    """Return c_0 I + c_1 x + c_2 x² + ..."""
    constant, first, *others = coefficients
    result = powers[0] * first
    for c, power in zip(others, powers[1:], strict=False):
        result.add_(power, alpha=c)
    return _plus_identity(result, constant)


def _plus_identity(x: Tensor, c: float) -> Tensor:
    """Add c to the diagonal of a new x, and return it."""
    if c:
        x.diagonal(dim1=-2, dim2=-1).add_(c)
    return x


@functools.cache
def _terms(dtype: torch.dtype) -> int:
    """Return how many terms of ψ's series are exact to rounding up to θ = 1/2."""
    return next(j for j in range(2, 30) if 0.5**j / math.factorial(j + 2) < torch.finfo(dtype).eps / 8)


@functools.cache
def _chi(longest: float, eps: float) -> list[float]:
    """Return the coefficients of c² / (1 + c) in powers of t for c from 1 / longest (t = -1) to 1 (t = 1)."""
    middle, half = (1 + 1 / longest) / 2, (1 - 1 / longest) / 2

    def chi(t: Any) -> Any:
        c = middle + half * t
        return c * c / (1 + c)

    pole = (1 + middle) / half
    degree = math.ceil(-math.log(eps) / math.acosh(pole))
    return [float(c) for c in chebyshev.cheb2poly(chebyshev.chebinterpolate(chi, degree))]


# -- large angles --------------------------------------------------------------------------------------------


def _by_iteration(omega: Tensor, longest: float) -> Tensor:
    """Return the polar factor of I + Ω, less I, whose singular values are between 1 and ``longest``."""
    return _plus_identity(polar(_plus_identity(omega / longest, 1 / longest), longest), -1.0)


def polar(z: Tensor, longest: float) -> Tensor:  # (*batch, n, m) -> (*batch, n, m)
    """Return the polar factor of z, whose singular values are between 1 / ``longest`` and 1.

    The polynomials are written in powers of E = z^H z - I, which vanishes: so the last ones only correct z.
    """
    for a, b, c in _minimax(longest, torch.finfo(z.dtype).eps):
        e = _plus_identity(dense.adjoint_times(z, z), -1.0)
        z = dense.plus_product(z, z, dense.plus_product(e, e, e, b + 2 * c, c), a + b + c)
    return z


@functools.cache
def _minimax(longest: float, eps: float) -> list[tuple[float, float, float]]:
    """Return polynomials a x + b x³ + c x⁵ whose composition is 1 on [1 / longest, 1] to rounding.

    Each is the best on the upper part of its interval, and enlarges what lies below: the best on a whole long interval
    would bring some large singular values down to the smallest one, and so into rounding.
    """
    low, high, found = 1 / longest, 1 + _BEYOND, []
    while high - low > eps:
        a, b, c, error = _alternant(max(low, high * _UPPER), high)
        found.append((a, b, c))
        error *= 1 + _BEYOND
        low, high = min(low * (a + low * low * (b + low * low * c)), 1 - error), 1 + error
    return found


def _alternant(low: float, high: float) -> tuple[float, float, float, float]:
    """Return the odd polynomial of degree 5 closest to 1 on [low, high], and its error, by Remez's exchange."""
    if high - low < 1e-3:  # the first terms of 1 - (1 - x²) ...: the exchange would be singular
        return 15 / 8, -10 / 8, 3 / 8, (high - low) ** 3
    points = np.linspace(low, high, 4)
    for _ in range(50):
        system = np.stack([points, points**3, points**5, [1.0, -1.0, 1.0, -1.0]], -1)
        a, b, c, error = np.linalg.solve(system, np.ones(4))
        turns = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]).real))
        points = np.array([low, *turns, high])
    return float(a), float(b), float(c), float(abs(error))
