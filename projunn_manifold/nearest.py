r"""The closest unitary matrix to a given one: in closed form, or by backpropagation along the Lie algebra.

Closest means least :math:`\|U - W\|_F`, or, seen by data, least :math:`\|(U - W)X\|_F`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from projunn_manifold import fourier, linalg
from projunn_manifold.linalg import high_precision
from projunn_manifold.validation import dtype_problem, sides_of

__all__ = ["METHODS", "Nearest", "nearest_blocks", "nearest_unitary"]

#: Ways to the closest unitary matrix.
METHODS = ("polar", "procrustes", "lie")
STEPS, TOLERANCE = 200, 1e-7

Callback = Callable[[int, float], None]


class Nearest(NamedTuple):
    """The closest unitary matrix."""

    unitary: Tensor
    #: The squared distance: after every step of ``"lie"``, else one number.
    losses: list[float]
    #: θ, for ``"lie"`` alone: (*batch, n(n-1)/2), or n² numbers where U is complex.
    parameters: Tensor | None = None


@torch.no_grad()
@linalg.in_full_precision
def nearest_unitary(
    weight: Tensor,
    method: str = "polar",
    *,
    inputs: Tensor | None = None,
    size: int | tuple[int, ...] | None = None,
    rotation: bool = False,
    steps: int = STEPS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    callback: Callback | None = None,
) -> Nearest:
    r"""Return the matrix with orthonormal columns (of a wide one: rows) that is closest to ``weight``.

    ===============  ====================================  ==================================================
    method           least                                 how
    ===============  ====================================  ==================================================
    ``"polar"``      :math:`\|U - W\|_F`                   :math:`U = PQ^H` of the SVD :math:`W = PSQ^H`
    ``"procrustes"`` :math:`\|(U - W)X\|_F`                the same of :math:`W X X^H`; square and tall only
    ``"lie"``        either                                :math:`U = e^{\sum_i\theta_i L_i}`, L-BFGS over θ
    ===============  ====================================  ==================================================

    The :math:`L_i` are :math:`E_{ij} - E_{ji}`, i < j, and for complex weights also :math:`i(E_{ij} + E_{ji})` and
    :math:`iE_{jj}`; of a weight that is not square they have the larger side, and the columns or rows of U in excess
    are discarded.  As real exponentials are rotations, ``"lie"`` ends at the closest *rotation* to a real square
    weight with a negative determinant, which is what ``"polar"`` gives with ``rotation=True``.  Everything is
    computed in double precision.  Cost: :math:`O(n^3)`, for ``"lie"`` in every step.

    Parameters
    ----------
    weight : Tensor
        ``(*batch, n, m)``, real or complex; with ``size`` a kernel ``(out, in, *kernel_size)``.
    method : {"polar", "procrustes", "lie"}
        See above.
    inputs : Tensor, optional
        Rows that the weight is applied to, ``(*batch, samples, m)``, or without batch; the columns of X.  Directions
        that they do not reach are left as close to the weight as can be (``"procrustes"``).  For a kernel, images
        ``(samples, in, *size)``.
    size : int or tuple of int, optional
        The weight is a kernel of torch's circular convolution on images of this size, and the answer the closest
        orthogonal or unitary convolution, with a kernel as large as the image: every Fourier block becomes its
        closest unitary.
    rotation : bool
        Whether the determinants of real square matrices shall be one (Kabsch 1976).
    steps, tolerance : int, float
        Of ``"lie"``: it ends when the derivative by θ is this small a part of :math:`2\|W X X^H\|_F`, or with a
        warning after so many steps, of five iterations each.
    seed : int
        Of the first θ, which are small random numbers: θ = 0 is a saddle for Hermitian weights.
    callback : callable, optional
        Called after every step of ``"lie"`` with its number, from 1, and the loss.

    Returns
    -------
    Nearest
        ``unitary``, in the dtype of the weight; ``losses``; ``parameters``.

    Raises
    ------
    ValueError
        A weight whose closest unitary is not unique, for want of rank; wrong shapes; options that the method has
        no use for.
    TypeError
        Other dtypes than those of the manifold.

    References
    ----------
    Chang, *A projection algorithm for the unitary weights*, 2021 (the Lie parameters; its loss is not published, this
    one is ours); Keller 1975 (polar); Schönemann 1966 (Procrustes); Kabsch 1976 (rotations).

    Examples
    --------
    >>> import torch
    >>> from projunn_manifold.nearest import nearest_unitary
    >>> w = torch.randn(20, 20, dtype=torch.complex128)
    >>> polar, lie = nearest_unitary(w).unitary, nearest_unitary(w, "lie").unitary
    >>> torch.allclose(polar, lie, atol=1e-5)
    True
    """
    _check_shapes(weight, inputs, size)
    problem: dict[str, Any] = {"method": method, "rotation": rotation}
    if method == "lie":
        problem |= {"steps": steps, "tolerance": tolerance, "seed": seed, "callback": callback}
    wide = weight.to(high_precision(weight.dtype))
    data = None if inputs is None else inputs.to(wide.dtype)
    if size is None:
        found = _nearest(wide, data, **problem)
        return found._replace(unitary=found.unitary.to(weight.dtype).contiguous())
    dims = weight.dim() - 2
    sides = sides_of(size, dims)
    grid = fourier.spectrum(sides, not weight.is_complex(), str(weight.device))
    blocks = fourier.blocks_of_kernel(fourier.embedded(wide, sides), grid)
    waves = None if data is None else fourier.analyse(data, grid).permute(2, 0, 1)
    free, losses = nearest_blocks(blocks, grid, waves, **problem)
    kernel = fourier.kernel_of_blocks(fourier.everywhere(torch.cat(free, -3), grid), grid)
    return Nearest(fourier.from_origin(kernel, sides).to(weight.dtype).contiguous(), losses)


def nearest_blocks(
    blocks: Tensor,
    grid: fourier.Spectrum,
    waves: Tensor | None = None,
    *,
    method: str = "polar",
    rotation: bool = False,
    **options: Any,
) -> tuple[list[Tensor], list[float]]:
    """Return the closest unitary blocks at the free frequencies, generic and alone, and the squared distances.

    Parameters
    ----------
    blocks : Tensor
        ``(*batch, stored, out, in)``.
    grid : Spectrum
        Their frequencies.
    waves : Tensor, optional
        ``(*batch, stored, samples, in)``, the transforms of inputs.
    method, rotation, options
        As for :func:`nearest_unitary`.
    """
    free, histories = [], []
    for chosen, times in ((grid.generic, 2 if grid.real else 1), (grid.alone, 1)):
        own = blocks.index_select(-3, chosen)
        data = None if waves is None else waves.index_select(-3, chosen)
        if chosen is grid.alone:
            own, data = own.real, None if data is None else data.real
        if not len(chosen):
            free.append(own.to(blocks.dtype))
            continue
        found = _nearest(own, data, method=method, rotation=rotation and not own.is_complex(), **options)
        free.append(found.unitary.to(blocks.dtype))
        histories.append([times * loss for loss in found.losses])
    length = max(map(len, histories))
    ended = [history + history[-1:] * (length - len(history)) for history in histories]  # each its own descent
    return free, [sum(losses) for losses in zip(*ended, strict=True)]


def _check_shapes(weight: Tensor, inputs: Tensor | None, size: int | tuple[int, ...] | None) -> None:
    problem = dtype_problem(weight.dtype, "weight")
    if problem:
        raise TypeError(problem)
    if weight.dim() < (2 if size is None else 3) or not weight.numel():
        what = "(*batch, n, m)" if size is None else "(out, in, *kernel_size)"
        raise ValueError(f"weight must be {what}, and not empty, got shape {tuple(weight.shape)}")
    axis = -1 if size is None else 1
    if inputs is not None and (inputs.dim() < 2 or inputs.shape[axis] != weight.shape[axis]):
        raise ValueError(
            f"inputs must have {weight.shape[axis]} features along dimension {axis}, as the weight has, "
            f"got shape {tuple(inputs.shape)}"
        )


def _check_problem(weight: Tensor, method: str, inputs: Tensor | None, rotation: bool) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if inputs is None and method == "procrustes":
        raise ValueError("method='procrustes' needs inputs; without any it would be 'polar'")
    if inputs is not None and method == "polar":
        raise ValueError("method='polar' looks at no inputs: take 'procrustes' or 'lie'")
    if method == "procrustes" and weight.shape[-2] < weight.shape[-1]:
        raise ValueError(
            f"method='procrustes' has no closed form for wide weights, got shape {tuple(weight.shape)}: take 'lie'"
        )
    if rotation and weight.is_complex():
        raise ValueError(f"rotation=True is for real matrices, got {weight.dtype}")
    for name, t in (("weight", weight), ("inputs", inputs)):
        if t is not None and not torch.isfinite(t).all():
            raise ValueError(f"{name} of shape {tuple(t.shape)} has non-finite entries")


def _nearest(
    weight: Tensor, inputs: Tensor | None, *, method: str = "polar", rotation: bool = False, **options: Any
) -> Nearest:
    """Solve for matrices in double precision."""
    _check_problem(weight, method, inputs, rotation)
    r = None if inputs is None else torch.linalg.qr(inputs, mode="r")[1]
    if method == "lie":
        return _lie(weight, r, **options)
    unitary = _polar(weight if r is None else _seen(weight, r, rotation), rotation)
    return Nearest(unitary, [_loss(unitary, weight, r).item()])


def _loss(unitary: Tensor, weight: Tensor, r: Tensor | None) -> Tensor:
    """Return the squared distance; ‖(U - W)X‖ = ‖R(U - W)^T‖ where R is that of X^T = QR."""
    moved = unitary - weight
    seen = moved if r is None else r @ moved.mT
    return torch.linalg.vector_norm(seen) ** 2


def _polar(weight: Tensor, rotation: bool) -> Tensor:  # (*batch, n, m) -> (*batch, n, m)
    """Return the polar factor; for a rotation the smallest singular direction is turned round where need be."""
    p, s, qh = torch.linalg.svd(weight, full_matrices=False)
    if (s[..., -1] <= torch.finfo(s.dtype).eps * max(weight.shape[-2:]) * s[..., 0]).any():
        raise ValueError(
            f"a matrix of shape {tuple(weight.shape)} is rank deficient (smallest singular value "
            f"{s[..., -1].min().item():.1e}): its closest unitary is not unique"
        )
    if rotation and p.shape[-2] == qh.shape[-1]:
        p[..., -1] *= torch.linalg.det(p @ qh).sign()[..., None]
    return p @ qh


def _seen(weight: Tensor, r: Tensor, rotation: bool) -> Tensor:
    """Return a matrix whose polar factor minimises ‖(U - W)X‖: W X X^H, and W itself where X does not reach."""
    cross = weight @ (r.mT @ r.conj())
    p, s, qh = torch.linalg.svd(cross, full_matrices=False)
    reached = s > torch.finfo(s.dtype).eps * max(weight.shape[-2:]) * s[..., :1]
    if reached.all():
        return cross
    if rotation:
        raise ValueError("rotation=True with inputs that do not span the whole space is not defined")
    p, q = p * reached.unsqueeze(-2), qh.mH * reached.unsqueeze(-2)
    beyond = weight - p @ (p.mH @ weight)
    beyond = beyond - beyond @ q @ q.mH
    scale = torch.linalg.matrix_norm(weight)[..., None, None]
    return p @ q.mH + beyond / scale  # of spaces at right angles: polar factors add


def _lie(
    weight: Tensor,
    r: Tensor | None,
    *,
    steps: int = STEPS,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    callback: Callback | None = None,
) -> Nearest:
    n, m = weight.shape[-2:]
    side = max(n, m)
    count = side * side if weight.is_complex() else side * (side - 1) // 2
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(*weight.shape[:-2], count, dtype=torch.float64, generator=generator) / side
    theta = start.to(weight.device).requires_grad_()
    optimizer = torch.optim.LBFGS(  # with a single iteration in a step torch's stands still: it forgets the slope
        [theta], max_iter=5, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=0, tolerance_change=0
    )

    def unitary() -> Tensor:
        return torch.linalg.matrix_exp(lie_element(theta, side, weight.is_complex()))[..., :n, :m]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(unitary(), weight, r)
        loss.backward()
        return loss

    target = weight if r is None else weight @ (r.mT @ r.conj())
    enough = 2 * tolerance * torch.linalg.vector_norm(target).item()
    losses: list[float] = []
    slope = math.inf
    with torch.enable_grad():
        for step in range(1, steps + 1):
            optimizer.step(closure)
            losses.append(closure().item())
            assert theta.grad is not None
            slope = torch.linalg.vector_norm(theta.grad).item()
            if callback is not None:
                callback(step, losses[-1])
            if slope <= enough:
                break
        else:
            warnings.warn(
                f"nearest_unitary: after {steps} steps the derivative is {slope:.1e}, not yet {enough:.1e}",
                stacklevel=5,
            )
    return Nearest(unitary().detach(), losses, theta.detach())


def lie_element(theta: Tensor, side: int, complex_: bool) -> Tensor:  # (*batch, count) -> (*batch, side, side)
    """Return Σ θ_i L_i, skew-Hermitian."""
    pairs = side * (side - 1) // 2
    i, j = torch.triu_indices(side, side, 1, device=theta.device)
    upper = theta[..., :pairs]
    if complex_:
        upper = torch.complex(upper, theta[..., pairs : 2 * pairs])
    half = upper.new_zeros(*theta.shape[:-1], side * side).index_copy(-1, i * side + j, upper).unflatten(-1, (side, -1))
    element = half - half.mH
    if complex_:
        element = element + torch.diag_embed(1j * theta[..., 2 * pairs :])
    return element
