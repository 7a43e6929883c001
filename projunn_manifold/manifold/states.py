"""The states of many manifolds as one, for a stack of matrices whose members are on a manifold each.

A step of the stack draws for each member what a step of that member alone would draw, and counts a gradient for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor

from projunn_manifold.manifold.state import Members, State
from projunn_manifold.sketching.draws import Generators

__all__ = ["Place", "States"]


class Place(NamedTuple):
    """Where a gradient stands among those of a manifold."""

    state: State
    gradients: int  # before it


@final
class States(State):
    """What one step of a stack asks of a state; the members' own states change when it is made (:meth:`settle`).

    Parameters
    ----------
    places : sequence of Place
        One for each member, none of which is new.
    dims : int
        Batch dimensions of a member.
    """

    def __init__(self, places: Sequence[Place], dims: int) -> None:
        super().__init__(0)
        self._places, self._dims = places, dims
        self._unsettled: list[tuple[torch.device, Members, dict[str, Tensor | int]]] = []

    def generator(self, device: torch.device, purpose: int, ahead: int = 0) -> Generators:  # type: ignore[override]
        """Return the members' generators, each seeded as its state would."""
        ahead += self.gradients
        seeds = [state.seed_of(purpose, gradients + ahead) for state, gradients in self._places]
        return Generators(device, seeds, self._dims)

    def turns(self) -> Iterator[tuple[int, Members]]:
        """Iterate over turns and the runs of members whose turns they are."""
        each = [state.turn_after(gradients + self.gradients) for state, gradients in self._places]
        start = 0
        for turn, run in itertools.groupby(each):
            stop = start + len(list(run))
            yield turn, slice(start, stop)
            start = stop

    def count_faults(self, device: torch.device, members: Members = ..., /, **faults: Tensor | int) -> None:
        """Note the faults of these members, tensors with some for each."""
        self._unsettled.append((device, members, faults))

    def settle(self) -> None:
        """Count the step and its faults in the members' own states."""
        for device, members, faults in self._unsettled:
            places = self._places if members is ... else self._places[members]
            for name, many in faults.items():
                for (state, _), own in zip(places, _each(many, len(places)), strict=True):
                    state.count_faults(device, **{name: own})
        for state, gradients in self._places:
            state.gradients = gradients + self.gradients


def _each(faults: Tensor | int, members: int) -> Sequence[Tensor | int]:
    """Return each member's faults."""
    return faults.reshape(members, -1).sum(1).unbind() if isinstance(faults, Tensor) else [faults] * members
