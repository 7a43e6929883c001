"""Random numbers of a stack whose members draw from seeds of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

__all__ = ["Generators", "drawn"]


@final
class Generators:
    """One seeded generator for each member of a stack.

    Parameters
    ----------
    device : torch.device
    seeds : sequence of int
        One for each member.
    dims : int
        Batch dimensions of a member, all of whose matrices use the same numbers.
    """

    def __init__(self, device: torch.device, seeds: Sequence[int], dims: int) -> None:
        self._device, self._seeds, self._dims = device, seeds, dims

    def stacked(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:  # -> (members, *(1,)*dims, *shape)
        """Return what each member draws, as a stack; what members with equal seeds draw is drawn once."""
        generator = torch.Generator(self._device)
        found = {seed: draw(generator.manual_seed(seed)) for seed in dict.fromkeys(self._seeds)}
        together = torch.stack([found[seed] for seed in self._seeds])
        return together.view(len(self._seeds), *(1,) * self._dims, *together.shape[1:])


def drawn(generator: torch.Generator | Generators, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
    """Return what is drawn with a generator, or with each of many, stacked."""
    return generator.stacked(draw) if isinstance(generator, Generators) else draw(generator)
