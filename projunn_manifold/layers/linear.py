"""A linear map with an orthonormal weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from projunn_manifold.layers.base import INITS, KeepsManifolds, cast, on_manifold
from projunn_manifold.manifold.unitary import UnitaryLowRank, manifold_or_new
from projunn_manifold.validation import check_choice, check_positive

__all__ = ["UnitaryLinear"]


class UnitaryLinear(KeepsManifolds):
    """``torch.nn.Linear`` with an orthonormal weight: an isometry for tall weights, its adjoint for wide ones.

    Parameters
    ----------
    in_features, out_features : int
        The weight has shape ``(out_features, in_features)`` where that is square or tall; for a wide map ``weight``
        holds its adjoint, ``(in_features, out_features)``.
    bias : bool
        Whether to add a bias, which starts at zero.
    k : int or None
        Rank of the moves, for a manifold made here.
    manifold : UnitaryLowRank, optional
        To be used instead; it has a k of its own.
    init : {"haar", "identity", "henaff", "cayley"}
        First weight; the last two for square ones.
    device, dtype
        As in torch.nn; complex dtypes give a unitary map.

    Raises
    ------
    ValueError
        Sizes below 1; unknown ``init``, or one that does not fit the shape.
    TypeError
        A ``bias`` that is not True or False; a ``manifold`` that is none.  In ``forward``: input that is not floating,
        or that the weight's dtype would cut.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        k: int | None = 1,
        manifold: UnitaryLowRank | None = None,
        init: str = "haar",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive("in_features", in_features)
        check_positive("out_features", out_features)
        check_choice(bias, "bias")
        self.in_features, self.out_features = in_features, out_features
        self.manifold = manifold_or_new(manifold, k)
        self.init = init
        shape = (max(in_features, out_features), min(in_features, out_features))
        self.weight = on_manifold(shape, self.manifold, init, device, dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.remember_manifolds()

    def reset_parameters(self) -> None:
        """Draw new weights, as after ``to_empty``."""
        INITS[self.init](self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        """Return ``x W^T + b``."""
        return nn.functional.linear(cast(self, x, "input", self.weight.dtype), self._matrix(), self.bias)

    def _matrix(self) -> Tensor:  # (out_features, in_features)
        if self.out_features >= self.in_features:
            return self.weight
        return self.weight.t().conj()  # not all exporters to ONNX know mH

    def _prepare(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Take the adjoint of a plain layer's wide weight."""
        given, wide = state_dict.get(f"{prefix}weight"), (self.out_features, self.in_features)
        if isinstance(given, Tensor) and given.shape == wide != self.weight.shape:
            state_dict[f"{prefix}weight"] = given.mH.resolve_conj().contiguous()

    def to_plain(self) -> nn.Linear:
        """Return the same map as a ``torch.nn.Linear``, its weights copied."""
        weight = self._matrix().detach().resolve_conj()
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, weight.device, weight.dtype)
        with torch.no_grad():
            plain.weight.copy_(weight).requires_grad_(self.weight.requires_grad)
            if self.bias is not None:
                plain.bias.copy_(self.bias).requires_grad_(self.bias.requires_grad)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """Return the sizes, as torch.nn.Linear does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
