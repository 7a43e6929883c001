"""Recurrent networks whose transitions stay unitary, with the conventions of torch.nn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from projunn_manifold.layers.base import INITS, KeepsManifolds, cast, on_manifold
from projunn_manifold.layers.modrelu import ModReLU
from projunn_manifold.layers.recurrence import NONLINEARITIES, recurrence, step_by_step
from projunn_manifold.manifold.unitary import UnitaryLowRank, keeps_factors
from projunn_manifold.validation import check_positive

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
        if not callable(nonlinearity) and nonlinearity not in NONLINEARITIES:
            known = ", ".join(map(repr, NONLINEARITIES))
            raise ValueError(f"nonlinearity must be one of {known}, or a function of a tensor, got {nonlinearity!r}")
        if nonlinearity == "relu" and torch.empty((), dtype=dtype).is_complex():
            raise ValueError(
                "nonlinearity 'relu' is for real numbers; a complex network has 'modrelu', 'tanh' or 'none'"
            )
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self.nonlinearity, self.init = nonlinearity, init

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

    def _run_layer(self, suffix: str, x: Tensor, h0: Tensor) -> Tensor:  # (T, B, m), (B, n) -> (T, B, n)
        inward, weight = getattr(self, f"weight_ih{suffix}"), getattr(self, f"weight_hh{suffix}")
        beta = getattr(self, f"bias_ih{suffix}")
        if callable(self.nonlinearity):
            function = self.nonlinearity
            return step_by_step(x, h0, inward, weight, beta, None, lambda z, bias: function(z))
        bias = getattr(self, f"modrelu{suffix}").bias if self.nonlinearity == "modrelu" else None
        return recurrence(
            x, h0, inward, weight, beta, bias, self.nonlinearity, factored=len(x) > 1 and keeps_factors(weight)
        )

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
        nonlinearity = self.nonlinearity if isinstance(self.nonlinearity, str) else "function"
        text = f"{self.input_size}, {self.hidden_size}"
        for name, value, default in (
            ("num_layers", getattr(self, "num_layers", 1), 1),
            ("nonlinearity", nonlinearity, "modrelu"),
            ("bias", self.bias, True),
            ("batch_first", getattr(self, "batch_first", False), False),
            ("dropout", getattr(self, "dropout", 0.0), 0.0),
            ("init", self.init, "henaff"),
        ):
            if value != default:
                text += f", {name}={value}"
        return text

    def _plain_nonlinearity(self) -> str:
        if self.nonlinearity not in ("relu", "tanh"):
            raise ValueError(f"torch.nn has no recurrent network with nonlinearity {self.nonlinearity!r}")
        return str(self.nonlinearity)


def _copy_weights_(plain: nn.RNN | nn.RNNCell, ours: nn.Module) -> None:
    """Copy weights of the same names; torch's second bias is redundant."""
    for name, p in plain.named_parameters():
        if name.startswith("bias_hh"):
            p.zero_()
        else:
            p.copy_(getattr(ours, name)).requires_grad_(getattr(ours, name).requires_grad)


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
    k, manifold, init, device, dtype
        As for :class:`UnitaryRNN`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str | Callable[[Tensor], Tensor] = "modrelu",
        *,
        k: int | None = 1,
        manifold: UnitaryLowRank | None = None,
        init: str = "henaff",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, nonlinearity, init, dtype)
        self._add_layer("", input_size, UnitaryLowRank(k) if manifold is None else manifold, device, dtype)
        self.remember_manifolds()

    def forward(self, x: Tensor, hx: Tensor | None = None) -> Tensor:  # (B, m) or (m), like hx (B, n) or (n)
        """Return the next state."""
        self._check_input(x, (1, 2))
        x = cast(self, x, "input", self._weight("weight_hh").dtype)
        hx = self._first_state(hx, (*x.shape[:-1], self.hidden_size), x)
        batched = x.dim() == 2
        state = self._run_layer("", x[None] if batched else x[None, None], hx if batched else hx[None])
        return state[0] if batched else state[0, 0]

    def to_plain(self) -> nn.RNNCell:
        """Return the same cell as a ``torch.nn.RNNCell`` (relu or tanh), its weights copied."""
        weight = self._weight("weight_hh")
        kind = self._plain_nonlinearity()
        plain = nn.RNNCell(self.input_size, self.hidden_size, self.bias, kind, weight.device, weight.dtype)
        with torch.no_grad():
            _copy_weights_(plain, self)
        return plain.train(self.training)


class UnitaryRNN(_Recurrent):
    r"""``torch.nn.RNN`` with unitary transitions: :math:`h_t = \sigma(V x_t + \beta + W h_{t-1})`, each W unitary.

    The whole sequence is one operation for autograd if σ is built in.  The gradient of a W on
    :class:`~projunn_manifold.UnitaryLowRank` is then a :class:`~projunn_manifold.sketching.FactoredTensor`: it is kept
    as factors, and never formed unless somebody reads it.

    Parameters
    ----------
    input_size, hidden_size, num_layers : int
        m, n and the number of layers.
    nonlinearity : {"modrelu", "relu", "tanh", "none"} or callable
        σ; a callable is a function of a tensor, such as a module (one for all layers).  A complex network has
        no relu.
    bias : bool
        Whether there is a β (one: torch's second bias would be redundant).
    batch_first : bool
        Input and output are ``(B, T, ·)`` instead of ``(T, B, ·)``.
    dropout : float
        Share of states set to zero between layers, while training.
    k : int or None
        Rank of the moves, for manifolds made here, one for each layer.
    manifold : UnitaryLowRank, optional
        One for all layers, to be used instead.
    init : {"henaff", "cayley", "haar", "identity"}
        First transition.
    device, dtype
        As in torch.nn; a complex dtype gives a unitary network, and real input is converted to complex.

    Raises
    ------
    ValueError, TypeError
        Unknown names, sizes below 1; in ``forward``: wrong shapes or dtypes of input or first state, no time step.

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
        *,
        k: int | None = 1,
        manifold: UnitaryLowRank | None = None,
        init: str = "henaff",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, nonlinearity, init, dtype)
        check_positive("num_layers", num_layers)
        if isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout must be a number from 0 to 1, got {dropout!r}")
        self.num_layers, self.batch_first, self.dropout = num_layers, batch_first, dropout
        for layer in range(num_layers):
            own = UnitaryLowRank(k) if manifold is None else manifold
            self._add_layer(f"_l{layer}", input_size if layer == 0 else hidden_size, own, device, dtype)
        self.remember_manifolds()

    def forward(self, input: Tensor | PackedSequence, hx: Tensor | None = None) -> Any:
        """Return the last layer's states, and the last state of every layer ``(num_layers, B, n)``.

        ``input`` is ``(T, B, m)``, ``(T, m)``, with ``batch_first`` ``(B, T, m)``, or a PackedSequence; the states have
        its form.  ``hx`` holds first states, ``(num_layers, B, n)`` or, for unbatched input, ``(num_layers, n)``.
        """
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx)
        self._check_input(input, (2, 3))
        batched = input.dim() == 3
        x = input if batched else input[None] if self.batch_first else input[:, None]
        x = x.transpose(0, 1) if self.batch_first else x
        if hx is not None and hx.dim() != x.dim() - (not batched):
            shape = (self.num_layers, *((x.shape[1],) if batched else ()), self.hidden_size)
            raise ValueError(f"UnitaryRNN: expected hidden state of shape {shape}, got {tuple(hx.shape)}")
        states, last = self._run(x, hx if hx is None or batched else hx[:, None], lambda states: states[-1])
        states = states.transpose(0, 1) if self.batch_first else states
        return (states, last) if batched else (states.squeeze(0 if self.batch_first else 1), last.squeeze(1))

    def _run(
        self, x: Tensor, hx: Tensor | None, last_of: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:  # (T, B, m), (L, B, n) -> (T, B, n), (L, B, n)
        if x.shape[0] == 0:
            raise ValueError("UnitaryRNN: expected at least one time step, got none")
        x = cast(self, x, "input", self._weight("weight_hh_l0").dtype)
        hx = self._first_state(hx, (self.num_layers, x.shape[1], self.hidden_size), x)
        last = []
        for layer in range(self.num_layers):
            if layer > 0:
                x = nn.functional.dropout(x, self.dropout, self.training)
            x = self._run_layer(f"_l{layer}", x, hx[layer])
            last.append(last_of(x))
        return x, torch.stack(last)

    def _run_packed(self, packed: PackedSequence, hx: Tensor | None) -> tuple[PackedSequence, Tensor]:
        """Run over the padded sequences: states beyond a sequence's end are computed and dropped."""
        self._check_input(packed.data, (2,))
        sorted_ = PackedSequence(packed.data, packed.batch_sizes)  # by length, as the data are
        x, lengths = pad_packed_sequence(sorted_)
        if hx is not None and packed.sorted_indices is not None and hx.dim() == 3:
            hx = hx[:, packed.sorted_indices]
        ends, rows = (lengths - 1).to(x.device), torch.arange(x.shape[1], device=x.device)
        states, last = self._run(x, hx, lambda states: states[ends, rows])
        valid = torch.arange(x.shape[0], device=lengths.device)[:, None] < lengths
        output = PackedSequence(
            states[valid.to(x.device)], packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        )
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
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            _copy_weights_(plain, self)
        return plain.train(self.training)
