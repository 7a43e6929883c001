"""Recurrent networks whose transitions stay unitary, with the conventions of torch.nn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from projunn_manifold import context
from projunn_manifold.layers.base import INITS, KeepsManifolds, cast, on_manifold
from projunn_manifold.layers.modrelu import ModReLU
from projunn_manifold.layers.recurrence import NONLINEARITIES, Nonlinearity, recurrence, step_by_step, steps
from projunn_manifold.manifold.unitary import UnitaryLowRank, keeps_factors, manifold_or_new
from projunn_manifold.validation import check_choice, check_positive, warn

__all__ = ["UnitaryRNN", "UnitaryRNNCell"]


class _Recurrent(KeepsManifolds):
    """What the cell and the network share: arguments, one layer's weights, its step, messages for wrong input."""

    nonlinearity: Any

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        nonlinearity: str | Callable[[Tensor], Tensor],
        init: str,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_positive("input_size", input_size)
        check_positive("hidden_size", hidden_size)
        check_choice(bias, "bias")
        if not callable(nonlinearity) and nonlinearity not in NONLINEARITIES:
            known = ", ".join(map(repr, NONLINEARITIES))
            raise ValueError(f"nonlinearity must be one of {known}, or a function of a tensor, got {nonlinearity!r}")
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self.nonlinearity, self.init = nonlinearity, init
        self._check_conversion(dtype or torch.get_default_dtype())

    def _check_conversion(self, dtype: torch.dtype) -> None:
        if dtype.is_complex and self.nonlinearity == "relu":
            raise ValueError(
                "nonlinearity 'relu' is for real numbers; a complex network has 'modrelu', 'tanh' or 'none'"
            )

    def _add_layer(
        self, suffix: str, input_size: int, manifold: UnitaryLowRank, device: Any, dtype: torch.dtype | None
    ) -> None:
        """Make the weights of a layer: uniform inputs as in torch.nn.RNN, a unitary transition, no bias at first."""
        n = self.hidden_size
        inward = nn.Parameter(torch.empty(n, input_size, device=device, dtype=dtype))
        self.register_parameter(f"weight_ih{suffix}", inward)
        _uniform_(inward)
        self.add_module(f"manifold{suffix}", manifold)
        self.register_parameter(f"weight_hh{suffix}", on_manifold((n, n), manifold, self.init, device, dtype))
        beta = nn.Parameter(torch.zeros(n, device=device, dtype=dtype)) if self.bias else None
        self.register_parameter(f"bias_ih{suffix}", beta)
        if self.nonlinearity == "modrelu":
            self.add_module(f"modrelu{suffix}", ModReLU(n, device, dtype))

    def _prepare(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Add torch's second biases to the first."""
        for name, own in self._parameters.items():
            if own is None or not name.startswith("bias_ih"):
                continue
            first, second = prefix + name, prefix + name.replace("bias_ih", "bias_hh")
            both = [state_dict[key] for key in (first, second) if key in state_dict]
            if [getattr(beta, "shape", None) for beta in both] == [own.shape] * 2:
                state_dict[first] = both[0].to(own.dtype) + both[1].to(own.dtype)
                del state_dict[second]

    def _weights(self, suffix: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return a layer's V, W, β and bias of modReLU."""
        bias = getattr(self, f"modrelu{suffix}").bias if self.nonlinearity == "modrelu" else None
        return *(getattr(self, f"{name}{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih")), bias

    def _function(self) -> Nonlinearity:
        """Return σ as a function of its argument and of modReLU's bias."""
        if not callable(self.nonlinearity):
            return NONLINEARITIES[self.nonlinearity]
        return lambda z, bias: self.nonlinearity(z)

    def _run_layer(self, suffix: str, x: Tensor, h0: Tensor) -> Tensor:  # (T, B, m), (B, n) -> (T, B, n)
        weights = self._weights(suffix)
        if callable(self.nonlinearity):
            return step_by_step(x, h0, *weights, self._function())
        factored = x.shape[0] > 1 and keeps_factors(weights[1])
        return recurrence(x, h0, *weights, self.nonlinearity, factored=factored)

    def _check_input(self, x: Tensor, dims: tuple[int, ...]) -> None:
        name = type(self).__name__
        if x.dim() not in dims:
            expected = " or ".join(f"{d}D" for d in dims)
            raise ValueError(f"{name}: expected input to be {expected}, got {x.dim()}D, shape {tuple(x.shape)}")
        if x.shape[-1] != self.input_size:
            raise ValueError(
                f"{name}: the last dimension of input must be input_size={self.input_size}, got shape {tuple(x.shape)}"
            )

    def _first_state(self, hx: Tensor | None, shape: tuple[int, ...], x: Tensor) -> Tensor:
        """Return the state given, in the dtype of x, or zeros."""
        if hx is None:
            return x.new_zeros(shape)
        if tuple(hx.shape) != shape:
            raise ValueError(f"{type(self).__name__}: expected hidden state of shape {shape}, got {tuple(hx.shape)}")
        return cast(self, hx, "hidden state", x.dtype)

    def _weight(self, name: str) -> Tensor:
        weight: Tensor = getattr(self, name)  # it may be parametrised
        return weight

    def reset_parameters(self) -> None:
        """Draw new weights, as after ``to_empty``."""
        for name, p in self.named_parameters():
            if name.startswith("weight_ih"):
                _uniform_(p)
            elif name.startswith("weight_hh"):
                INITS[self.init](p)
            elif name.startswith("bias_ih"):
                nn.init.zeros_(p)
        for child in self.children():
            if isinstance(child, ModReLU):
                child.reset_parameters()

    def extra_repr(self) -> str:
        """Return the sizes and what differs from the defaults, as torch.nn.RNN does."""
        text = f"{self.input_size}, {self.hidden_size}"
        for name, value, default in (
            ("num_layers", getattr(self, "num_layers", 1), 1),
            ("nonlinearity", self._nonlinearity_name(), "modrelu"),
            ("bias", self.bias, True),
            ("batch_first", getattr(self, "batch_first", False), False),
            ("dropout", getattr(self, "dropout", 0.0), 0.0),
            ("bidirectional", getattr(self, "bidirectional", False), False),
            ("init", self.init, "henaff"),
        ):
            if value != default:
                text += f", {name}={value}"
        return text

    def _nonlinearity_name(self) -> str:
        return self.nonlinearity if isinstance(self.nonlinearity, str) else "function"

    def _plain_nonlinearity(self) -> str:
        if self.nonlinearity not in ("relu", "tanh"):
            raise ValueError(f"torch.nn has no recurrent network with nonlinearity {self.nonlinearity!r}")
        return str(self.nonlinearity)


def _copy_weights_(plain: nn.RNN | nn.RNNCell, ours: nn.Module) -> None:
    """Copy weights of the same names; torch's second bias, which is redundant, is zero and trained where ours is."""
    for name, p in plain.named_parameters():
        own = getattr(ours, name.replace("bias_hh", "bias_ih"))
        p.copy_(torch.zeros_like(own) if name.startswith("bias_hh") else own).requires_grad_(own.requires_grad)


@torch.no_grad()
def _uniform_(inward: Tensor) -> None:
    """Fill with numbers of the size that torch.nn.RNN has."""
    bound = 1 / math.sqrt(len(inward))
    (torch.view_as_real(inward) if inward.is_complex() else inward).uniform_(-bound, bound)


class UnitaryRNNCell(_Recurrent):
    r"""``torch.nn.RNNCell`` with a unitary transition: :math:`h' = \sigma(V x + \beta + W h)`, W unitary.

    Parameters
    ----------
    input_size, hidden_size : int
        m and n
    bias : bool
        Whether there is a β (one: torch's second bias would be redundant).
    nonlinearity : {"modrelu", "relu", "tanh", "none"} or callable
        σ; a callable is a function of a tensor, such as a module.
    device, dtype, k, manifold, init
        As for :class:`UnitaryRNN`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str | Callable[[Tensor], Tensor] = "modrelu",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        k: int | None = 1,
        manifold: UnitaryLowRank | None = None,
        init: str = "henaff",
    ) -> None:
        super().__init__(input_size, hidden_size, bias, nonlinearity, init, dtype)
        self._add_layer("", input_size, manifold_or_new(manifold, k), device, dtype)
        self.remember_manifolds()

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:  # (B, m) or (m), like hx (B, n) or (n)
        """Return the next state."""
        self._check_input(input, (1, 2))
        x = cast(self, input, "input", self._weight("weight_hh").dtype)
        hx = self._first_state(hx, (*x.shape[:-1], self.hidden_size), x)
        [state] = steps(x[None], hx, *self._weights(""), self._function())
        return state

    def to_plain(self) -> nn.RNNCell:
        """Return the same cell as a ``torch.nn.RNNCell`` (relu or tanh), its weights copied."""
        weight = self._weight("weight_hh")
        kind = self._plain_nonlinearity()
        plain = nn.RNNCell(self.input_size, self.hidden_size, self.bias, kind, weight.device, weight.dtype)
        with torch.no_grad():
            _copy_weights_(plain, self)
        return plain.train(self.training)


#: How names of the direction from the end to the beginning end.
_REVERSE = "_reverse"


def _check_dropout(dropout: object, num_layers: int) -> float:
    """Return the share as a float; warn of one that does nothing."""
    if isinstance(dropout, bool) or not isinstance(dropout, SupportsFloat) or not 0 <= float(dropout) <= 1:
        raise ValueError(f"dropout must be a number from 0 to 1, got {dropout!r}")
    if float(dropout) > 0 and num_layers == 1:
        warn(f"dropout={dropout} does nothing: states are dropped between layers, and num_layers is 1")
    return float(dropout)


def _steps(x: Tensor) -> Tensor:  # (T, B, ·) -> (T, 1)
    return torch.arange(x.shape[0], device=x.device)[:, None]


def _last(states: Tensor, lengths: Tensor | None) -> Tensor:  # (T, B, n), (B,) -> (B, n)
    """Return the state at the end of each sequence."""
    if lengths is None:
        return states[-1]
    return states[lengths - 1, torch.arange(states.shape[1], device=lengths.device)]


def _backwards(x: Tensor, lengths: Tensor | None) -> Tensor:  # (T, B, ·), (B,) -> (T, B, ·)
    """Return each sequence from its end to its beginning; what fills it up after the end stays there."""
    if lengths is None:
        return x.flip(0)
    steps, batch = _steps(x), torch.arange(x.shape[1], device=x.device)
    order = torch.where(steps < lengths, lengths - 1 - steps, steps) * x.shape[1] + batch
    return x.flatten(0, 1).index_select(0, order.flatten()).view_as(x)


class UnitaryRNN(_Recurrent):
    r"""``torch.nn.RNN`` with unitary transitions: :math:`h_t = \sigma(V x_t + \beta + W h_{t-1})`, each W unitary.

    The whole sequence is one operation for autograd if σ is built in.  The gradient of a W on
    :class:`~projunn_manifold.UnitaryLowRank` is then a :class:`~projunn_manifold.sketching.FactoredTensor`: it is kept
    as factors, and never formed unless somebody reads it.

    The caller may write to the states in place.  An exported or traced network is a graph of ATen operators, unrolled
    over the time steps.

    Parameters
    ----------
    input_size, hidden_size, num_layers : int
        m, n and the number of layers.
    nonlinearity : {"modrelu", "relu", "tanh", "none"} or callable
        σ; a callable is a function of a tensor, such as a module (one for all layers).  A complex network has
        no relu, and the complex tanh has poles, near which rounding errors grow.
    bias : bool
        Whether there is a β (one: torch's second bias would be redundant).
    batch_first : bool
        Input and output are ``(B, T, ·)`` instead of ``(T, B, ·)``.
    dropout : float
        Share of states set to zero between layers, while training.
    bidirectional : bool
        Every layer also runs over the sequence from its end, with weights and a manifold of its own: ``weight_hh_l0``
        and ``weight_hh_l0_reverse``.  The states of both directions are concatenated.
    proj_size : int
        0, as in ``torch.nn.RNN``: a projection would take the norm of the states away.
    device, dtype
        As in torch.nn; a complex dtype gives a unitary network, and real input is converted to complex.
    k : int or None
        Rank of the moves, for manifolds made here, one for each layer and direction.
    manifold : UnitaryLowRank, optional
        One for all layers and directions, to be used instead.
    init : {"henaff", "cayley", "haar", "identity"}
        First transition.

    Raises
    ------
    ValueError, TypeError
        Unknown names, sizes below 1, a projection; in ``forward``: wrong shapes or dtypes of input or first state, no
        time step.

    Warns
    -----
    RuntimeWarning
        Dropout with one layer, which has nothing between layers to drop.

    References
    ----------
    Kiani et al. 2022, section 5; Arjovsky, Shah, Bengio 2016.

    Examples
    --------
    >>> import torch
    >>> from projunn_manifold.layers import UnitaryRNN, param_groups
    >>> from projunn_manifold.optim import RiemannianSGD
    >>> network = UnitaryRNN(3, 64, nonlinearity="relu", k=1)
    >>> optimizer = RiemannianSGD(param_groups(network, lr=0.1, unitary_lr=0.1), lr=0.1)
    >>> output, last = network(torch.randn(50, 8, 3))
    >>> output.shape, last.shape
    (torch.Size([50, 8, 64]), torch.Size([1, 8, 64]))
    >>> output.square().mean().backward()
    >>> network.weight_hh_l0.grad
    FactoredTensor(LowRank, shape=(64, 64), dtype=torch.float32)
    >>> optimizer.step()
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str | Callable[[Tensor], Tensor] = "modrelu",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        k: int | None = 1,
        manifold: UnitaryLowRank | None = None,
        init: str = "henaff",
    ) -> None:
        super().__init__(input_size, hidden_size, bias, nonlinearity, init, dtype)
        check_positive("num_layers", num_layers)
        check_choice(batch_first, "batch_first")
        check_choice(bidirectional, "bidirectional")
        if proj_size != 0:
            raise ValueError(
                f"proj_size must be 0, as for torch.nn.RNN, got {proj_size!r}; pass device and dtype by keyword, or "
                "after it"
            )
        self.num_layers, self.dropout = num_layers, _check_dropout(dropout, num_layers)
        self.batch_first, self.bidirectional, self.proj_size = batch_first, bidirectional, 0
        for layer in range(num_layers):
            suffixes = self._suffixes(layer)
            width = input_size if layer == 0 else len(suffixes) * hidden_size
            for suffix in suffixes:
                self._add_layer(suffix, width, manifold_or_new(manifold, k), device, dtype)
        self.remember_manifolds()

    def _suffixes(self, layer: int) -> list[str]:
        """Return how the names of a layer's weights end, for each direction."""
        return [f"_l{layer}", f"_l{layer}{_REVERSE}"] if self.bidirectional else [f"_l{layer}"]

    @property
    def mode(self) -> str:
        """The nonlinearity by torch's name: ``"RNN_TANH"``, ``"RNN_RELU"``, and ``"RNN_MODRELU"`` and so on."""
        return f"RNN_{self._nonlinearity_name().upper()}"

    @property
    def _all_weights(self) -> list[list[str]]:  # a private name of torch.nn.RNN that programs go through
        kinds = ("weight_ih", "weight_hh", "bias_ih")[: 3 if self.bias else 2]
        suffixes = [suffix for layer in range(self.num_layers) for suffix in self._suffixes(layer)]
        return [[f"{kind}{suffix}" for kind in kinds] for suffix in suffixes]

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """V, W and β, if there is one, for each layer and direction; not the parameters of σ."""
        return [[self._weight(name) for name in names] for names in self._all_weights]

    def flatten_parameters(self) -> None:
        """Do nothing: ``torch.nn.RNN`` arranges its weights for cuDNN, which is not used here."""

    def forward(self, input: Tensor | PackedSequence, hx: Tensor | None = None) -> Any:
        """Return the last layer's states, and the last state of every layer and direction.

        ``input`` is ``(T, B, m)``, ``(T, m)``, with ``batch_first`` ``(B, T, m)``, or a PackedSequence; the states have
        its form, with D n features for D directions.  ``hx`` holds first states, ``(D num_layers, B, n)`` or, for
        unbatched input, ``(D num_layers, n)``, directions of one layer side by side; so do the last states.  The
        last state of a direction that runs from the end stands at the first time step.
        """
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx)
        self._check_input(input, (2, 3))
        batched = input.dim() == 3
        x = input if batched else input[None] if self.batch_first else input[:, None]
        x = x.transpose(0, 1) if self.batch_first else x
        if hx is not None and hx.dim() != x.dim() - (not batched):
            shape = self._shape_of_states(*((x.shape[1],) if batched else ()))
            raise ValueError(f"UnitaryRNN: expected hidden state of shape {shape}, got {tuple(hx.shape)}")
        states, last = self._run(x, hx if hx is None or batched else hx[:, None])
        if self.batch_first:  # no view where that can be: callers may detach the states in place, and FSDP2 hooks them
            states = states.transpose(0, 1) if context.transformed() else states.transpose_(0, 1)
        return (states, last) if batched else (states.squeeze(0 if self.batch_first else 1), last.squeeze(1))

    def _shape_of_states(self, *batch: int) -> tuple[int, ...]:
        return (self.num_layers * len(self._suffixes(0)), *batch, self.hidden_size)

    def _run(
        self, x: Tensor, hx: Tensor | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # (T, B, m), (L D, B, n), (B,) -> (T, B, D n), (L D, B, n)
        if x.shape[0] == 0:
            raise ValueError("UnitaryRNN: expected at least one time step, got none")
        x = cast(self, x, "input", self._weight("weight_hh_l0").dtype)
        hx = self._first_state(hx, self._shape_of_states(x.shape[1]), x)
        last: list[Tensor] = []
        for layer in range(self.num_layers):
            if layer > 0:
                x = nn.functional.dropout(x, self.dropout, self.training)
            first = enumerate(self._suffixes(layer), len(last))
            found = [self._run_direction(suffix, x, hx[i], lengths) for i, suffix in first]
            x = torch.cat([states for states, _ in found], -1) if self.bidirectional else found[0][0]
            last += [end for _, end in found]
        return x, torch.stack(last)

    def _run_direction(
        self, suffix: str, x: Tensor, h0: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # (T, B, m), (B, n), (B,) -> (T, B, n), (B, n)
        """Return the states of one direction of a layer in the order of time, and the last that it comes to."""
        if not suffix.endswith(_REVERSE):
            states = self._run_layer(suffix, x, h0)
            return states, _last(states, lengths)
        states = self._run_layer(suffix, _backwards(x, lengths), h0)
        return _backwards(states, lengths), _last(states, lengths)

    def _run_packed(self, packed: PackedSequence, hx: Tensor | None) -> tuple[PackedSequence, Tensor]:
        """Run over the padded sequences: states beyond a sequence's end are computed and dropped."""
        self._check_input(packed.data, (2,))
        sorted_ = PackedSequence(packed.data, packed.batch_sizes)  # by length, as the data are
        x, lengths = pad_packed_sequence(sorted_)
        if hx is not None and packed.sorted_indices is not None and hx.dim() == 3:
            hx = hx[:, packed.sorted_indices]
        lengths = lengths.to(x.device)
        states, last = self._run(x, hx, lengths)
        valid = _steps(x) < lengths
        output = PackedSequence(states[valid], packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return output, last if packed.unsorted_indices is None else last[:, packed.unsorted_indices]

    def to_plain(self) -> nn.RNN:
        """Return the same network as a ``torch.nn.RNN`` (relu or tanh), its weights copied.

        torch's network has a second bias, zero here; if training goes on, the two together move twice as fast as one.
        """
        weight = self._weight("weight_hh_l0")
        plain = nn.RNN(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            nonlinearity=self._plain_nonlinearity(),
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            bidirectional=self.bidirectional,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            _copy_weights_(plain, self)
        return plain.train(self.training)
