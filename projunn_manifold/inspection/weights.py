"""The unitary weights of a model, each once, with the parameter group that holds it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from projunn_manifold.manifold.parameters import is_dtensor
from projunn_manifold.manifold.unitary import UnitaryLowRank
from projunn_manifold.optim.optimizers import inner_optimizer
from projunn_manifold.optim.plan import manifolds_of

__all__ = ["Weight", "rate_of", "weights_of"]


class Weight(NamedTuple):
    """A unitary weight of a model."""

    name: str
    p: Tensor
    manifold: UnitaryLowRank
    #: The parameter group of the optimiser that holds it, or None.
    group: dict[str, Any] | None

    @property
    def has_values(self) -> bool:
        """Whether its numbers can be looked at here: it is not sharded, empty or on the meta device."""
        return not (is_dtensor(self.p) or self.p.is_meta) and self.p.numel() > 0


def weights_of(model: object, optimizer: object = None) -> Iterator[Weight]:
    """Iterate over a model's unitary weights, including those that have lost their manifold; each comes once.

    Raises
    ------
    TypeError
        ``model`` is not a module; ``optimizer`` is not an optimiser and holds none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module, got {type(model).__name__}")
    groups: dict[int, dict[str, Any]] = {}
    for holder in () if optimizer is None else (inner_optimizer(optimizer), optimizer):
        for group in getattr(holder, "param_groups", ()):
            groups |= {id(p): group for p in group["params"]}
    plan, seen = manifolds_of(model), set[int]()
    for name, p in model.named_parameters(remove_duplicate=False):
        manifold = plan.get(name)
        if isinstance(manifold, UnitaryLowRank) and id(p) not in seen:
            yield Weight(name, p, manifold, groups.get(id(p)))
        seen.add(id(p))


def rate_of(weight: Weight) -> float | None:
    """Return the learning rate of a weight, or None if no optimiser holds it or its group has no ``lr``."""
    return None if weight.group is None or "lr" not in weight.group else float(weight.group["lr"])
