r"""How much rank the unitary weights of a network need, measured in a few of its own training steps.

Let :math:`G_k` be the best rank-k approximation of the gradient G.  A short step along :math:`-G_k` lowers the loss in
proportion to :math:`\|G_k\|_F^2` (the part of G normal to the manifold left aside), and takes the time of the whole
training step.  The recommended k has the largest :math:`(\|G_k\|_F / \|G\|_F)^2` per second.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geoopt
import torch
from torch import Tensor, nn

from projunn_manifold.context import wait_for
from projunn_manifold.inspection.gradients import best_shares, gradient_operator, length_of_descent
from projunn_manifold.inspection.unchanged import unchanged
from projunn_manifold.inspection.weights import Weight, weights_of
from projunn_manifold.linalg.dense import unitarity_error
from projunn_manifold.manifold.unitary import UnitaryLowRank
from projunn_manifold.optim.in_place import RiemannianAdam, RiemannianSGD
from projunn_manifold.optim.optimizers import inner_optimizer, parameters_of
from projunn_manifold.validation import check_positive

__all__ = ["Diagnosis", "Need", "diagnose", "speed_of_descent"]

RANKS = (1, 2, 4, 8, 16, 32)
_REPETITIONS = 5
_LONG = 1000.0  # milliseconds after which a time is not measured again


@dataclass(frozen=True)
class Need:
    """What a unitary weight's gradients are like, and what its steps cost; k is None for a step of full rank."""

    name: str
    shape: tuple[int, ...]
    #: The rank of its manifold.
    k: int | None
    #: The recommended rank.
    recommended: int | None
    #: For each k, the median share of the gradient's norm that the best factors of rank k keep.
    shares: dict[int | None, float]
    #: For each k, milliseconds of the weight's own step.
    step_ms: dict[int | None, float]
    #: For each k, ``step_ms`` as a part of the whole training step.
    parts: dict[int | None, float]
    #: The largest :func:`~projunn_manifold.unitarity_error` of its matrices, before the steps.
    error: float
    #: Median of :math:`\|X' - X\|_F / \|X\|_F` over the steps; without an optimiser, that of steepest descent with
    #: learning rate 1.
    update: float


def speed_of_descent(share: float, ms: float) -> float:
    """Return share² per millisecond: the speed at which short steps of a rank lower the loss."""
    return share**2 / ms


class Diagnosis(list[Need]):
    """A list with one entry for each unitary weight that has a gradient; ``print`` shows a table.

    Attributes
    ----------
    closure_ms : float
        Median time of the closure in milliseconds.
    has_optimizer : bool
        Whether an optimiser was given, whose updates are reported.
    """

    rule = "the k with the largest share² per second of the whole training step"

    def __init__(self, needs: list[Need], closure_ms: float, has_optimizer: bool) -> None:
        super().__init__(needs)
        self.closure_ms, self.has_optimizer = closure_ms, has_optimizer

    def __str__(self) -> str:
        lines = [f"closure: {self.closure_ms:.3g} ms; recommended: {self.rule}"]
        for need in self:
            update = "update" if self.has_optimizer else "update at rate 1"
            lines.append(
                f"\n{need.name}  {'x'.join(map(str, need.shape))}  k={need.k}, recommended k={need.recommended}  "
                f"error {need.error:.1e}  {update} {need.update:.1e}"
            )
            ranks = list(need.shares)
            rows = [
                ("k", [str(k) for k in ranks]),
                ("share of the gradient", [f"{need.shares[k]:.2f}" for k in ranks]),
                ("step, ms", [f"{need.step_ms[k]:.3g}" for k in ranks]),
                ("part of a training step", [f"{need.parts[k]:.0%}" for k in ranks]),
            ]
            lines += [f"{title:24}" + "".join(cell.rjust(8) for cell in cells) for title, cells in rows]
        return "\n".join(lines)

    def draw(self, path: str | Path | None = None) -> Any:
        """Return a figure of matplotlib, with shares and times against k; save it if a path is given."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        for need in self:
            ranks = [k for k in need.shares if k is not None]
            (line,) = left.plot(ranks, [need.shares[k] for k in ranks], "o-", label=need.name)
            right.plot(ranks, [need.step_ms[k] for k in ranks], "o-", color=line.get_color())
            right.axhline(need.step_ms[None], color=line.get_color(), linestyle="--")
            if need.recommended is not None:
                left.axvline(need.recommended, color=line.get_color(), linestyle=":")
        left.set(xlabel="k", ylabel="share of the gradient's norm", ylim=(0, 1.05), title="dotted: recommended k")
        right.set(xlabel="k", ylabel="step, ms", yscale="log", title="dashed: full rank")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=3)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def diagnose(
    model: nn.Module,
    closure: Callable[[], Any],
    optimizer: Any = None,
    steps: int = 20,
    *,
    verbose: bool = True,
) -> Diagnosis:
    r"""Run a few training steps of a network, and report what rank its unitary weights need.

    For every unitary weight that has a gradient it reports the distance from the manifold and the length of an update
    in units of X.  For full rank, for the weight's own k and for k = 1, 2, 4, 8, 16, 32, as long as 2k < m, it reports

    - the share of the gradient's norm that the best factors of rank k keep (the median over the steps, from a sketch
      with two power iterations);
    - the milliseconds of the weight's own step;
    - the part of the whole training step that this is.

    The whole training step is the closure and the steps of all unitary weights, each at its present k.  The recommended
    k has the largest share² per second of the whole training step.  This is the speed at which steepest descent lowers
    the loss.  On nine tasks, with learning rates tuned for each k, training at the recommended k took at most 1.67
    times as long as at the best one.

    Afterwards parameters, gradients, buffers, modes, the optimiser's state, the manifolds' counts and the global random
    numbers are what they were before, bit for bit.  What the closure reads from elsewhere, such as batches of a data
    loader, is not put back.

    A step is timed on a copy of the weight alone, as projUNN-D with the sampler ``"lsi"``: the median of five, or of
    fewer if they take more than a second.

    Parameters
    ----------
    model : torch.nn.Module
        Has unitary weights, none of them sharded.
    closure : callable
        Computes the loss of a batch and calls ``backward()``, nothing else.  It need not zero gradients.  Use a new
        batch in every call, so that the shares are those of training.
    optimizer : torch.optim.Optimizer, optional
        Makes the steps; or a wrapper that holds the optimiser.  Without one the parameters do not move, and updates are
        those of steepest descent with learning rate 1.  If the name of its class contains ``Adam``, steps are timed
        with :class:`~projunn_manifold.optim.RiemannianAdam`, otherwise with
        :class:`~projunn_manifold.optim.RiemannianSGD` without momentum.
    steps : int
        Training steps to run.  Default: 20.
    verbose : bool
        Whether to print the table.  Default: ``True``.

    Returns
    -------
    Diagnosis
        A list of :class:`~projunn_manifold.inspection.diagnosis.Need`; its method ``draw`` makes a picture.

    Raises
    ------
    TypeError
        ``model`` is not a module; ``optimizer`` is not an optimiser and holds none, or is LBFGS; ``closure`` is not
        callable.
    ValueError
        There are no unitary weights, one of them is sharded, or none has a gradient after the closure; ``steps`` is not
        an int of at least 1.

    Examples
    --------
    >>> import torch
    >>> from projunn_manifold import diagnose, layers
    >>> model = torch.nn.Sequential(layers.UnitaryLinear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2))
    >>> def closure():
    ...     model(torch.randn(4, 64)).square().sum().backward()
    >>> [need] = diagnose(model, closure, steps=3, verbose=False)
    >>> need.name, need.shape, f"{need.shares[4]:.2f}"  # a batch of four: gradients of rank 4
    ('0.weight', (64, 64), '1.00')
    """
    weights = list(weights_of(model, optimizer))
    if not weights:
        raise ValueError("the model has no unitary weights, whose rank could be chosen")
    without = [weight.name for weight in weights if not weight.has_values]
    if without:
        raise ValueError(
            f"{without[0]!r} is sharded, empty or on the meta device: diagnose a model whose weights have values here"
        )
    if not callable(closure):
        raise TypeError(f"`closure` must be a function that calls backward(), got {type(closure).__name__}")
    check_positive("steps", steps)
    inner = None if optimizer is None else inner_optimizer(optimizer)
    if isinstance(inner, torch.optim.LBFGS):
        raise TypeError("LBFGS calls the closure itself and cannot be diagnosed")
    parameters = [*model.parameters(), *(() if inner is None else parameters_of(inner))]
    with unchanged(model, optimizer, (weight.manifold.memory for weight in weights)):
        records = [_Record(weight) for weight in weights]
        closure_ms = statistics.median([_step(records, parameters, closure, optimizer) for _ in range(steps)])
        found = [record for record in records if record.shares]
        if not found:
            raise ValueError("no unitary weight has a gradient after the closure: it must call backward()")
        is_adam = inner is not None and "Adam" in type(inner).__name__
        report = Diagnosis(_needs(found, closure_ms, is_adam), closure_ms, optimizer is not None)
    if verbose:
        print(report)
    return report


class _Record:
    """What the steps show of a weight."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight
        own, m = weight.manifold.k, weight.p.shape[-1]
        low = {k for k in (*RANKS, own) if k is not None and 2 * k < m}
        self.ranks: tuple[int, ...] = tuple(sorted(low))
        self.own: int | None = own if own in low else None  # what its steps are at present
        self.error = unitarity_error(weight.p.detach()).max().item()
        self.shares: list[dict[int, float]] = []
        self.descents: list[float] = []
        self.updates: list[float] = []
        self.gradient: Tensor | None = None  # the last

    def see_gradient(self) -> None:
        """Record the shares of this step's gradient, and the length of steepest descent along it."""
        p = self.weight.p
        gradient = gradient_operator(p)
        if gradient is not None:
            self.gradient = p.grad
            self.shares.append(best_shares(gradient, self.ranks))
            self.descents.append(length_of_descent(self.weight.manifold, p, gradient))

    def median_shares(self) -> dict[int | None, float]:
        """Return for each k the median share of the gradients' norms that the best factors keep."""
        shares: dict[int | None, float] = {k: statistics.median(each[k] for each in self.shares) for k in self.ranks}
        return shares | {None: 1.0}

    def times(self, is_adam: bool) -> dict[int | None, float]:
        """Return for each k the milliseconds of a step, which moves a copy by about a hundredth of its norm."""
        length = self.descents[-1]
        lr = 0.01 * (math.sqrt(self.weight.p.shape[-1]) if is_adam else 1 / length if length else 1.0)
        found: dict[int | None, float] = {}
        for k in (*self.ranks, None):
            copied: Any = geoopt.ManifoldParameter(self.weight.p.detach().clone(), manifold=UnitaryLowRank(k))
            copied.grad = self.gradient
            step = (RiemannianAdam if is_adam else RiemannianSGD)([copied], lr).step
            step()  # makes the state
            found[k] = _timed(step, copied.device)
        return found


def _step(found: list[_Record], parameters: list[Tensor], closure: Callable[[], Any], optimizer: Any) -> float:
    """Make a training step, and return the milliseconds of the closure."""
    for p in parameters:
        p.grad = None
    ms = _timed(closure, found[0].weight.p.device, repetitions=1)
    for record in found:
        record.see_gradient()
    if optimizer is not None:
        before = [record.weight.p.detach().clone() for record in found]
        optimizer.step()
        for record, x in zip(found, before, strict=True):
            moved = torch.linalg.vector_norm(record.weight.p.detach() - x) / torch.linalg.vector_norm(x)
            record.updates.append(moved.item())
    return ms


def _timed(function: Callable[[], Any], device: torch.device, repetitions: int = _REPETITIONS) -> float:
    """Return the median milliseconds of a call; there are fewer repetitions if they take long."""
    found: list[float] = []
    while len(found) < repetitions and sum(found) < _LONG:
        wait_for(device)
        start = time.perf_counter()
        function()
        wait_for(device)
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)


def _needs(found: list[_Record], closure_ms: float, is_adam: bool) -> list[Need]:
    times = [record.times(is_adam) for record in found]
    now = closure_ms + sum(step_ms[record.own] for record, step_ms in zip(found, times, strict=True))
    return [_need(record, step_ms, now - step_ms[record.own]) for record, step_ms in zip(found, times, strict=True)]


def _need(record: _Record, step_ms: dict[int | None, float], rest: float) -> Need:
    """Weigh shares against times; ``rest`` is the time of the training step without this weight's own step."""
    shares = record.median_shares()
    return Need(
        name=record.weight.name,
        shape=tuple(record.weight.p.shape),
        k=record.weight.manifold.k,
        recommended=max(shares, key=lambda k: speed_of_descent(shares[k], rest + step_ms[k])),
        shares=shares,
        step_ms=step_ms,
        parts={k: ms / (rest + ms) for k, ms in step_ms.items()},
        error=record.error,
        update=statistics.median(record.updates or record.descents),
    )
