"""The networks that are compared: one reader of sequences, whose recurrent part and optimisers differ by method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import geoopt
import torch
from geoopt.manifolds.base import Manifold
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.parametrize import cached

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, unitarity_error
from projunn_manifold.layers import UnitaryRNN, plain_
from projunn_manifold.optim import constrain

from .rivals import RSDM, MomentumStiefel
from .tasks import Task

Optimizers = list[torch.optim.Optimizer]


@dataclass(frozen=True)
class Choices:
    """What all methods are asked for alike."""

    hidden: int
    k: int = 1  # 0 for full rank
    sampler: Any = "lsi"
    seed: int = 0
    nonlinearity: str = "relu"
    init: str = "henaff"
    lr: float = 1e-3
    unitary_lr: float = 1e-3 / 32  # of the transition, where a method has one on a manifold or parametrised


class Reader(nn.Module):
    """A recurrent network over a sequence, and a linear read-out of its last state, or of every state."""

    def __init__(self, recurrent: nn.Module, hidden: int, task: Task) -> None:
        super().__init__()
        self.recurrent, self.width, self.everywhere = recurrent, task.width, task.everywhere
        self.readout = nn.Linear(hidden, task.outputs)

    def forward(self, inputs: Tensor) -> Tensor:  # (T, B) integers or (T, B, width) -> (T, B, outputs) or (B, outputs)
        """Return the outputs."""
        return self.readout(self.states(inputs) if self.everywhere else self.states(inputs)[-1])

    def states(self, inputs: Tensor) -> Tensor:
        """Return the states ``(T, B, hidden)``."""
        if not inputs.is_floating_point():
            inputs = nn.functional.one_hot(inputs, self.width).to(self.readout.weight.dtype)
        with cached():  # a parametrised transition is computed once
            return self.recurrent(inputs)[0]

    @property
    def transition(self) -> Tensor | None:
        """The matrix from state to state, where a method has one."""
        return getattr(self.recurrent, "weight_hh_l0", None)

    def unitarity_error(self) -> float | None:
        """Distance of the transition from the manifold, where there is one."""
        square = self.transition is not None and self.transition.shape[0] == self.transition.shape[1]
        return unitarity_error(self.transition).item() if square else None


@dataclass(frozen=True)
class Method:
    """A recurrent part and its optimisers.

    ``rates`` are those of RMSprop and of the transition that the method's authors published for a task.
    """

    name: str
    recurrent: Callable[[int, Choices], nn.Module]
    optimizers: Callable[[Reader, Choices], Optimizers]
    colour: str
    low_rank: bool = False
    riemannian_lr: float | None = None
    rates: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def build(self, task: Task, choices: Choices, device: torch.device | str = "cpu") -> tuple[Reader, Optimizers]:
        """Return a fresh network, whose weights follow from the seed, and its optimisers."""
        torch.manual_seed(choices.seed)
        network = Reader(self.recurrent(task.width, choices), choices.hidden, task).to(device)
        return network, self.optimizers(network, choices)


# -- recurrent parts ------------------------------------------------------------------------------------


def on_manifold(make: Callable[[Choices], Manifold]) -> Callable[[int, Choices], nn.Module]:
    """Return a network with its transition on a manifold."""

    def build(width: int, choices: Choices) -> nn.Module:
        return UnitaryRNN(
            width, choices.hidden, nonlinearity=choices.nonlinearity, init=choices.init, manifold=make(choices)
        )

    return build


def parametrised(kind: str) -> Callable[[int, Choices], nn.Module]:
    """Return the same network, its transition by torch's orthogonal parametrisation instead."""

    def build(width: int, choices: Choices) -> nn.Module:
        return orthogonal(plain(width, choices), "weight_hh_l0", orthogonal_map=kind)

    return build


REBASE = 100  # steps between two bases, as in the paper of DTRIV


def dynamic_trivialisation(module: nn.Module, name: str) -> Callable[..., None]:
    """Put a weight on geotorch's exponential; return a hook that moves its base there every ``REBASE`` steps."""
    import geotorch  # of the extra `bench`

    start = getattr(module, name).detach().clone()
    geotorch.orthogonal(module, name)
    setattr(module, name, start)
    module.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # a checkpoint has it

    def rebase(*_: Any) -> None:
        module.steps += 1
        if module.steps % REBASE == 0:
            with torch.no_grad():
                setattr(module, name, getattr(module, name).clone())

    return rebase


def dtriv(width: int, choices: Choices) -> nn.Module:
    """Return the same network, its transition by the dynamic trivialisation of geotorch."""
    network = plain(width, choices)
    network.rebase = dynamic_trivialisation(network, "weight_hh_l0")
    return network


def plain(width: int, choices: Choices) -> nn.Module:
    """Return the same network, its transition unconstrained; with ``init="torch"`` that of torch.nn.RNN."""
    init = "identity" if choices.init == "torch" else choices.init
    network = UnitaryRNN(width, choices.hidden, nonlinearity=choices.nonlinearity, init=init)
    plain_(network, "weight_hh_l0")
    del network.manifold_l0
    if choices.init == "torch":
        bound = choices.hidden**-0.5
        nn.init.uniform_(network.weight_hh_l0, -bound, bound)
    return network


def frozen(width: int, choices: Choices) -> nn.Module:
    """Return the same network, its transition never moved."""
    network = plain(width, choices)
    network.weight_hh_l0.requires_grad_(False)
    return network


def lstm(width: int, choices: Choices) -> nn.Module:
    """Return torch's LSTM."""
    return nn.LSTM(width, choices.hidden)


def eunn(width: int, choices: Choices) -> nn.Module:
    """Return torch_eunn's tunable network of capacity 2, complex, with modReLU."""
    try:
        from torch_eunn import EURNN
    except ImportError:
        raise SystemExit(
            "the EUNN is that of torch_eunn: python -m pip install -c constraints.txt torch_eunn"
        ) from None

    return EURNN(width, choices.hidden, capacity=2)


# -- optimisers -----------------------------------------------------------------------------------------


def _of_transition(network: Reader) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters behind the transition, and all others."""
    own = [p for name, p in network.named_parameters() if "weight_hh_l0" in name or "angles" in name]
    own = own if network.transition is None or network.transition.shape[0] == network.transition.shape[1] else []
    return own, [p for p in network.parameters() if all(p is not q for q in own)]


def rmsprop(network: Reader, choices: Choices) -> Optimizers:
    """One RMSprop, the transition at its own rate."""
    own, others = _of_transition(network)
    groups = [{"params": others, "lr": choices.lr}, {"params": own, "lr": choices.unitary_lr}]
    return [torch.optim.RMSprop([group for group in groups if group["params"]])]


def constrained(network: Reader, choices: Choices, *, feedback: bool = False) -> Optimizers:
    """RMSprop as above, its moves of the transition made of rank k: the paper's training."""
    (optimizer,) = rmsprop(network, choices)
    constrain(optimizer, feedback=feedback)
    return [optimizer]


def rebased(network: Reader, choices: Choices) -> Optimizers:
    """RMSprop as above, the base of the transition moved now and then."""
    (optimizer,) = rmsprop(network, choices)
    optimizer.register_step_post_hook(network.recurrent.rebase)
    return [optimizer]


def pogo(weight: nn.Parameter, lr: float, base: str) -> torch.optim.Optimizer:
    """Return POGO over one of its base optimisers, for a matrix that is orthogonal."""
    from pogo import POGO  # of the extra `bench`
    from pogo import base as bases

    def stack(x: Tensor) -> Tensor:
        return x[None]

    optimizer = POGO([weight], getattr(bases, base)(), lr, flatten_fn=stack)

    def leave_out(_: Any, state: dict[str, Any]) -> None:  # of checkpoints, which hold no functions
        for group in state["param_groups"]:
            group.pop("flatten_fn")

    def put_back(optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["flatten_fn"] = stack

    optimizer.register_state_dict_post_hook(leave_out)
    optimizer.register_load_state_dict_post_hook(put_back)
    return optimizer


def beside(make: Callable[[nn.Parameter, Choices], torch.optim.Optimizer]) -> Callable[[Reader, Choices], Optimizers]:
    """Return RMSprop for all but the transition, which has an optimiser of its own."""

    def build(network: Reader, choices: Choices) -> Optimizers:
        (own,), others = _of_transition(network)
        return [torch.optim.RMSprop(others, lr=choices.lr), make(own, choices)]

    return build


def unconstrained(network: Reader, choices: Choices) -> Optimizers:
    """RMSprop at one rate."""
    return [torch.optim.RMSprop(network.parameters(), lr=choices.lr)]


riemannian = beside(lambda own, choices: geoopt.optim.RiemannianAdam([own], lr=choices.unitary_lr))


def _d(choices: Choices) -> Manifold:
    return UnitaryLowRank(choices.k or None, sampler=choices.sampler, seed=choices.seed)


def _t(choices: Choices) -> Manifold:
    return UnitaryLowRankExact(choices.k or None, sampler=choices.sampler, seed=choices.seed)


def _canonical(choices: Choices) -> Manifold:
    return geoopt.Stiefel(canonical=True)


def _euclidean(choices: Choices) -> Manifold:
    return geoopt.Stiefel(canonical=False)


_EXPRNN = {"copying": (2e-4, 2e-5), "MNIST": (7e-4, 7e-5), "permuted MNIST": (7e-4, 7e-5)}
_SCORNN = {"copying": (1e-3, 1e-4)}
METHODS = {
    method.name: method
    for method in (
        Method("projUNN-D", on_manifold(_d), constrained, "tab:blue", low_rank=True),
        Method("projUNN-T", on_manifold(_t), constrained, "tab:orange", low_rank=True),
        Method("projUNN-D, feedback", on_manifold(_d), partial(constrained, feedback=True), "navy", low_rank=True),
        Method("projUNN-D, RAdam", on_manifold(_d), riemannian, "tab:cyan", low_rank=True, riemannian_lr=0.03),
        Method("projUNN-T, RAdam", on_manifold(_t), riemannian, "goldenrod", low_rank=True, riemannian_lr=0.03),
        Method("Stiefel-canonical, RAdam", on_manifold(_canonical), riemannian, "tab:red", riemannian_lr=0.01),
        Method("Stiefel-euclidean, RAdam", on_manifold(_euclidean), riemannian, "tab:green", riemannian_lr=0.03),
        Method("expRNN", parametrised("matrix_exp"), rmsprop, "tab:purple", rates=_EXPRNN),
        Method("scoRNN", parametrised("cayley"), rmsprop, "tab:brown", rates=_SCORNN),
        Method("DTRIV", dtriv, rebased, "teal", rates=_EXPRNN),
        Method(
            "POGO",
            plain,
            beside(lambda own, choices: pogo(own, choices.unitary_lr, "VectorAdam")),
            "gold",
            riemannian_lr=0.03,
        ),
        Method(
            "RSDM",
            plain,
            beside(lambda own, choices: RSDM([own], choices.unitary_lr, len(own) // 4, choices.seed)),
            "sienna",
        ),
        Method(
            "StiefelAdam",
            plain,
            beside(lambda own, choices: MomentumStiefel([own], choices.unitary_lr, adaptive=True)),
            "plum",
        ),
        Method("frozen", frozen, unconstrained, "tab:gray"),
        Method("EUNN", eunn, unconstrained, "tab:pink"),
        Method("LSTM", lstm, unconstrained, "tab:olive"),
        Method("RNN, unitary start", plain, unconstrained, "black"),
        Method("RNN", lambda width, choices: plain(width, replace(choices, init="torch")), unconstrained, "tab:gray"),
    )
}
