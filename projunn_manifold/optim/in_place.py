r"""geoopt's optimisers with the step made in place, for the fastest steps.

:class:`RiemannianSGD` and :class:`RiemannianAdam` take the arguments, keep the state and make the steps of geoopt's
classes of the same names, of which they are subclasses; a state_dict of one can be loaded by the other.
Parameters on :class:`~projunn_manifold.UnitaryLowRank` move in place, without a matrix of their size being allocated,
many small ones as a stack (``foreach``); all other parameters are left to geoopt.

Weight decay is a multiple of X, which is normal to the manifold: it does not move a point and is not
added to its gradient here.

``foreach`` says whether parameters of one kind step as one stack, with the results of stepping one by one (to
rounding), their manifolds' own draws and counts included.  Of one kind are those of one group with equal shapes,
dtypes, devices, settings of their manifolds, moments and counts of steps.  None: where it pays on CPU, for at least 4
of at most 128 KiB each (32 KiB if their moves are of full rank); True: wherever it is possible; False: never.  A stack,
which on CPU has at most 2 MiB (or two members), is copied.  Left to step alone are subclasses of this package's
manifolds and samplers of your own, the first step on a manifold, non-contiguous parameters, gradients of other classes,
and groups with ``stabilize`` or with numbers for each matrix.

``feedback`` is error feedback: the part of the gradient that the sketch leaves out is added to the next gradient,

.. math:: M = G + R,\qquad M \approx a b^H,\qquad R \leftarrow g\,(M - a b^H),

where g is the unitary matrix of the step, which transports the residual R to the new point.  R is one more dense matrix
for each parameter, ``state[p]["residual"]``, and is saved in ``state_dict``.  A step makes 8 to 10 passes more, and
allocates one temporary matrix.  A gradient that is kept as factors is multiplied out, so that R can be added.  Moves of
full rank leave nothing out, and have no residual.  :func:`~projunn_manifold.distributed.data_parallel` refuses
``feedback``: it exchanges sketches of the gradient alone.

``fused`` says whether kernels in Triton make the steps that they know, where Triton is installed and the parameter is
on a CUDA device: those of rank one with the sampler ``lsi``, of square matrices, real or complex, without ``feedback``
and ``nesterov``.  They draw the columns that steps without kernels draw, and make the same steps (to rounding) where
squares of a gradient's or moment's norm are in the range of its precision; see :mod:`projunn_manifold.linalg.gpu`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import geoopt
import torch
from torch import Tensor

from projunn_manifold import context
from projunn_manifold.context import in_full_precision, outside_graphs
from projunn_manifold.linalg import dense, sharded
from projunn_manifold.linalg.products import matrix
from projunn_manifold.manifold.parameters import gradient_of, is_dtensor, local_view
from projunn_manifold.manifold.unitary import UnitaryLowRank, unitary_of
from projunn_manifold.moves.tangent import Tangent
from projunn_manifold.optim.optimizers import keepers, parameters_of
from projunn_manifold.optim.stacked import Member, move_all_
from projunn_manifold.validation import check_choice, check_in_place, check_number

__all__ = ["InPlace", "RiemannianAdam", "RiemannianSGD", "check_attached"]

#: Options that torch.optim.Adam, of which geoopt's Adam is a subclass, has added, and that no step here knows.
_UNKNOWN = ("maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay")


def check_attached(parameters: Iterable[Tensor]) -> None:
    """Raise if there are sharded parameters and none at all is on a manifold: then they have lost it.

    Raises
    ------
    ValueError
        See above.
    """
    parameters = list(parameters)
    if any(map(is_dtensor, parameters)) and not any(unitary_of(p) is not None for p in parameters):
        raise ValueError("sharded parameters, and none of them on a manifold: call reattach_manifolds with a plan")


def _keeps(optimizer: torch.optim.Optimizer, p: Tensor) -> bool:
    """Return whether an optimiser on manifolds keeps p on its own; geoopt's classes do not see that of a shard."""
    return isinstance(optimizer, InPlace if is_dtensor(p) else geoopt.optim.mixin.OptimMixin)


keepers.append(_keeps)


class InPlace(geoopt.optim.mixin.OptimMixin, torch.optim.Optimizer):
    """A step that moves this package's parameters in place and hides them from the step of geoopt's class."""

    _geoopt: type[torch.optim.Optimizer]
    _numbers: tuple[str, ...]  # hyper-parameters that are real numbers, or pairs of them
    _choices: Mapping[str, bool | None] = {  # how steps are made; geoopt has none
        "foreach": None,
        "feedback": False,
        "fused": True,
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        choices = {name: kwargs.pop(name) for name in self._choices}
        _check_choices(choices)
        super().__init__(*args, **kwargs)
        known = {name: value for name, value in self.defaults.items() if name not in _UNKNOWN}
        self.defaults = known | choices | {"stabilize": kwargs["stabilize"]}  # geoopt keeps it apart
        self._fill_in_options()
        self._check_groups()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the state of this optimiser or of geoopt's, from a state_dict, a copy or a pickle."""
        super().__setstate__(state)
        self._stabilize = self.defaults.get("stabilize")  # of geoopt's, which has groups added by it, and no copy of it
        self._fill_in_options()

    def _fill_in_options(self) -> None:
        """Give what they lack to groups of other optimisers, geoopt's or torch's, whose state has been loaded."""
        for group in self.param_groups:
            for name, otherwise in self._choices.items():
                if group.get(name) is None:
                    group[name] = self.defaults.get(name, otherwise)
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def _check_groups(self) -> None:
        """Raise TypeError for options that no step obeys, or that are none."""
        name = type(self).__name__
        for group in self.param_groups:
            _check_choices({choice: group[choice] for choice in self._choices})
            if group.get("maximize"):
                raise TypeError(f"{name} has no `maximize`, got True in a group: set it to False, and negate the loss")
            if group.get("decoupled_weight_decay") and group["weight_decay"]:
                raise TypeError(
                    f"the weight decay of {name} is added to gradients, but a group has decoupled_weight_decay=True "
                    f"and weight_decay={group['weight_decay']}: set one of them to False or 0"
                )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; as in geoopt, a closure is called once, before it, and its value returned."""
        loss = None if closure is None else closure()
        self._move_all_()
        return loss

    @outside_graphs
    @in_full_precision
    def _move_all_(self) -> None:
        for group in self.param_groups:  # a scheduler may have put NumPy's numbers there
            group.update(_numbers(group, self._numbers))
        self._check_groups()
        check_attached(parameters_of(self))
        stabilized = (p for g in self.param_groups if g["stabilize"] is not None for p in g["params"])
        if any(is_dtensor(p) and unitary_of(p) is not None for p in stabilized):
            raise ValueError("stabilize needs whole matrices, not shards; the manifold corrects drift")
        members = [
            Member(point, manifold, group, self.state[point])  # there, if empty: geoopt makes one for every parameter
            for group in self.param_groups
            for point in group["params"]
            if (manifold := unitary_of(point)) is not None and point.grad is not None and not point.grad.is_sparse
        ]
        with torch.no_grad():
            move_all_(members, self._move_)
        with _without_gradients(member.point for member in members):
            # torch may have wrapped it to call the hooks, which are ours to call
            inspect.unwrap(self._geoopt.step)(self)

    def _move_(self, point: Any, manifold: UnitaryLowRank, group: dict[str, Any], state: dict[str, Any]) -> None:
        """Make the step of one parameter, or of a stack."""
        x, grad = local_view(point), gradient_of(point)
        if not group["feedback"] or manifold.is_dense(x):  # then nothing is left out
            gradient = manifold.gradient_tangent(x, grad, group["fused"] and not group.get("nesterov"))
            self._follow_(point, manifold, gradient, (), group, state)
            return
        kept = {"residual": state["residual"] if "residual" in state else torch.zeros_like(point, requires_grad=False)}
        residual = _moment(kept, "residual", x)
        gradient, rest = manifold.gradient_tangent_and_rest(x, grad, residual)
        self._follow_(point, manifold, gradient, (rest,), group, state)
        residual.copy_(rest)
        state.update(kept)  # not before a step has been made

    def _follow_(
        self,
        point: Any,
        manifold: UnitaryLowRank,
        gradient: Any,  # a Tangent, or one that the kernels have
        carried: tuple[Tensor, ...],
        group: dict[str, Any],
        state: dict[str, Any],
    ) -> None:
        """Move a point by its gradient and its moments, and take what is carried along with it."""
        raise NotImplementedError


class RiemannianSGD(InPlace, geoopt.optim.RiemannianSGD):
    r"""geoopt's ``RiemannianSGD``, in place on :class:`~projunn_manifold.UnitaryLowRank`.

    Without momentum a step is ``manifold.step_``: one read of the gradient (k = 1), one of X and one pass
    that writes X.  With momentum the buffer is scaled, updated and carried along in place: 11 passes more, and one
    temporary matrix with ``nesterov``.

    Parameters
    ----------
    params : iterable
        Parameters or groups of them, on this package's manifolds, on others, or Euclidean.
    lr : float
        Learning rate: X moves by -lr times the Riemannian gradient (of the rank-k sketch), in units of X per
        gradient.
    momentum, dampening, weight_decay, nesterov
        As in geoopt; weight decay acts on other parameters only.
    stabilize : int, optional
        Steps between two exact projections; the manifold's own drift correction makes it unnecessary.
    foreach : bool, optional
        Whether parameters of one kind step as one stack; None: where it pays.  See the module's text.
    feedback : bool, optional
        Whether the part of a gradient that its sketch leaves out is added to the next gradient (error feedback).
        Default: ``False``.  See the module's text.
    fused : bool, optional
        Whether kernels in Triton are used where they can be.  Default: ``True``.  See the module's text.

    Raises
    ------
    TypeError
        ``foreach`` is not True, False or None; ``feedback`` or ``fused`` is not True or False; a group has
        ``maximize=True``, or decoupled weight decay.  Also in ``step``, from a group that was added or loaded.
    ValueError
        In ``step``: what ``egrad2rgrad`` raises, parameter and state as they were; and what ``retr`` raises for a
        direction too long for its precision: the parameter is then as it was, but its moments, as in geoopt, may be
        updated.  If a stack is refused, its parameters step one by one: those before the refused one have moved.
    """

    _geoopt = geoopt.optim.RiemannianSGD
    _numbers = ("lr", "momentum", "dampening", "weight_decay")

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        stabilize: int | None = None,
        *,
        foreach: bool | None = None,
        feedback: bool = False,
        fused: bool = True,
    ) -> None:
        options: dict[str, Any] = {"stabilize": stabilize, "foreach": foreach, "feedback": feedback, "fused": fused}
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, **options)

    def _move_(self, point: Any, manifold: UnitaryLowRank, group: dict[str, Any], state: dict[str, Any]) -> None:
        if group["momentum"] == 0 and not group["feedback"]:
            manifold.descend_(local_view(point), gradient_of(point), group["lr"], group["fused"])
        else:
            super()._move_(point, manifold, group, state)

    def _follow_(
        self,
        point: Any,
        manifold: UnitaryLowRank,
        gradient: Any,  # a Tangent, or one that the kernels have
        carried: tuple[Tensor, ...],
        group: dict[str, Any],
        state: dict[str, Any],
    ) -> None:
        x, momentum, scale = local_view(point), group["momentum"], -group["lr"]
        if momentum == 0:
            manifold.follow_tangent_(x, gradient, carried, scale)
            return
        if "momentum_buffer" not in state:
            grad = sharded.local_shard(gradient_of(point))
            sizes = sharded.sum_over_shards(x, dense.squared_norm(grad))[..., None, None]
            finite = sizes <= torch.finfo(point.dtype).max  # as the manifold has it: anything else counts as zero
            state["momentum_buffer"] = point.grad.clone()  # geoopt starts from the Euclidean gradient
            sharded.local_shard(state["momentum_buffer"]).masked_fill_(~finite, 0)
        buffer, weighted = _moment(state, "momentum_buffer", x), gradient.scaled(1 - group["dampening"])
        if not group["nesterov"]:
            manifold.follow_sum_(x, buffer, momentum, weighted, scale, carried)
            return
        _add_(buffer.mul_(momentum), weighted)
        manifold.follow_(x, _add_(buffer * momentum, gradient), (buffer, *carried), scale)


class RiemannianAdam(InPlace, geoopt.optim.RiemannianAdam):
    r"""geoopt's ``RiemannianAdam``, in place on :class:`~projunn_manifold.UnitaryLowRank`.

    The second moment is one number for each matrix, the squared length of its gradient; geoopt keeps it n x m
    times.  Here it is kept once, ``(*batch, 1, 1)``, and ``state_dict`` writes it out in geoopt's shape.
    A step costs 15 passes over square X (19 without compiled loops) and allocates no matrix of its size.
    Where the installed geoopt projects points before it moves them, as its main branch does, a parameter that starts
    off the manifold is projected before its first step; after that the manifold corrects drift.

    Parameters
    ----------
    params : iterable
        Parameters or groups of them, on this package's manifolds, on others, or Euclidean.
    lr : float
        Length of a step in units of X: the direction is divided by the gradient's running length.
    betas, eps, weight_decay, amsgrad
        As in geoopt; weight decay acts on other parameters only.
    stabilize : int, optional
        Steps between two exact projections; the manifold's own drift correction makes it unnecessary.
    foreach : bool, optional
        Whether parameters of one kind step as one stack; None: where it pays.  See the module's text.
    feedback : bool, optional
        Whether the part of a gradient that its sketch leaves out is added to the next gradient (error feedback).
        Default: ``False``.  See the module's text.
    fused : bool, optional
        Whether kernels in Triton are used where they can be.  Default: ``True``.  See the module's text.

    Raises
    ------
    TypeError
        ``foreach`` is not True, False or None; ``feedback`` or ``fused`` is not True or False; a group has
        ``maximize=True``, or decoupled weight decay.  Also in ``step``, from a group that was added or loaded.
    ValueError
        In ``step``: what ``egrad2rgrad`` raises, parameter and state as they were; and what ``retr`` raises for a
        direction too long for its precision: the parameter is then as it was, but its moments, as in geoopt, may be
        updated.  If a stack is refused, its parameters step one by one: those before the refused one have moved.
    """

    _geoopt = geoopt.optim.RiemannianAdam
    _numbers = ("lr", "betas", "eps", "weight_decay")
    _second_moments = ("exp_avg_sq", "max_exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        stabilize: int | None = None,
        *,
        foreach: bool | None = None,
        feedback: bool = False,
        fused: bool = True,
    ) -> None:
        options: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        options.update(_numbers(options, self._numbers))
        options |= {"amsgrad": amsgrad, "stabilize": stabilize}
        super().__init__(params, **options, foreach=foreach, feedback=feedback, fused=fused)

    def _move_(self, point: Any, manifold: UnitaryLowRank, group: dict[str, Any], state: dict[str, Any]) -> None:
        if "step" not in state and not is_dtensor(point) and _projects(self._geoopt):
            point.copy_(manifold.projx(point))
        super()._move_(point, manifold, group, state)

    def _follow_(
        self,
        point: Any,
        manifold: UnitaryLowRank,
        gradient: Any,  # a Tangent, or one that the kernels have
        carried: tuple[Tensor, ...],
        group: dict[str, Any],
        state: dict[str, Any],
    ) -> None:
        x = local_view(point)
        lr, beta1, beta2, eps = (dense.suited(c, x) for c in (group["lr"], *group["betas"], group["eps"]))
        one = (*x.shape[:-2], 1, 1)
        if "step" not in state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(point)
            state["exp_avg_sq"] = sharded.local_shard(x).new_zeros(one).real
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
        for name in self._second_moments:
            if name in state and state[name].shape != one:
                state[name] = _one_for_each(state[name])
        direction = _moment(state, "exp_avg", x)
        state["step"] += 1
        second = state["exp_avg_sq"].mul_(beta2).add_(dense.per_matrix((1 - beta2) * gradient.squared_norm()))
        if group["amsgrad"]:
            second = torch.maximum(state["max_exp_avg_sq"], second, out=state["max_exp_avg_sq"])
        number = second.item() if second.numel() == 1 and context.readable(second) else 0.0
        second = number or second[..., 0, 0]  # a tensor may be divided by zero, as it is with eps=0
        length = (second / (1 - beta2 ** state["step"])) ** 0.5 + eps
        scale = -lr / (length * (1 - beta1 ** state["step"]))
        manifold.follow_sum_(x, direction, beta1, gradient.scaled(1 - beta1), scale, carried)
        if group["stabilize"] is not None and state["step"] % group["stabilize"] == 0:
            point.copy_(manifold.projx(point))
            direction.copy_(manifold.proju(point, direction))

    def state_dict(self) -> dict[str, Any]:
        """Return the state as geoopt's optimiser of this name would."""
        packed: dict[str, Any] = super().state_dict()
        for index, point in enumerate(parameters_of(self)):
            if index in packed["state"] and unitary_of(point) is not None:
                state = packed["state"][index] = dict(packed["state"][index])
                for name in self._second_moments:
                    if name in state:
                        full = torch.zeros_like(point, requires_grad=False)
                        sharded.local_shard(full).add_(state[name])
                        state[name] = full
        return packed

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the state of this optimiser or of geoopt's, from a state_dict, a copy or a pickle."""
        super().__setstate__(state)
        for point in parameters_of(self):
            own = self.state.get(point, {})
            if "step" in own:
                own["step"] = int(own["step"])  # torch.optim.Adam makes a float32 tensor of it, and so of its powers
            for name in self._second_moments:
                if name in own and unitary_of(point) is not None:
                    own[name] = _one_for_each(own[name])


def _check_choices(choices: Mapping[str, object]) -> None:
    """Raise TypeError unless choices of how steps are made are True or False, or for ``foreach`` None."""
    for name, value in choices.items():
        check_choice(value, name, or_none=name == "foreach")


def _projects(kind: type[torch.optim.Optimizer]) -> bool:
    """Return whether a class of geoopt projects points before it moves them, as its main branch's Adam does."""
    return "projx" in inspect.unwrap(kind.step).__code__.co_names


def _numbers(options: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return these hyper-parameters as Python's own numbers, or the tensors that they are; raise for anything else."""
    numbers = {}
    for name in names:
        value = options[name]
        is_pair = isinstance(value, tuple | list)
        numbers[name] = tuple(check_number(each, name) for each in value) if is_pair else check_number(value, name)
    return numbers


def _moment(state: dict[str, Any], name: str, x: Tensor) -> Tensor:
    """Return a moment as the manifold sees it; raise if x was converted after it was made."""
    moment: Tensor = local_view(state[name])
    check_in_place(x, moment, name)
    return moment


def _one_for_each(moments: Tensor) -> Tensor:  # (*batch, n, m) -> (*batch, 1, 1), real
    """Return one second moment for each matrix.

    geoopt keeps it in every entry.  After Euclidean steps, made while a manifold was lost, the entries are squares
    whose sum it is.
    """
    if is_dtensor(moments):  # on which no Euclidean steps are made
        return sharded.first_entry(local_view(moments)).real.clone()
    corner, flat = sharded.first_entry(moments).real, moments.real
    constant = ((flat - corner).abs() <= 1e-3 * corner.abs()).all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.where(constant, corner, flat.sum((-2, -1), keepdim=True))


def _add_(t: Tensor, u: Tangent) -> Tensor:
    """Add u to t, in place."""
    return matrix(t).add_product_(*u.outer())


@contextmanager
def _without_gradients(points: Iterable[Tensor]) -> Iterator[None]:
    """Hide the gradients of these parameters."""
    hidden = [(point, point.grad) for point in points]
    for point, _ in hidden:
        point.grad = None
    try:
        yield
    finally:
        for point, grad in hidden:
            point.grad = grad
