"""What a manifold remembers between steps: a count of gradients, from which all its random numbers follow.

Before every draw the generator is seeded by the manifold's seed, the count and the purpose of the draw.  So
the count is the whole state of the sketches: a refused gradient leaves it as it was, equal moves between two
gradients use equal sketches, and a checkpoint holds a few integers.  Parameters that share a manifold share this
count; divided by their number it counts the steps of each, whose turns of the drift correction must not depend on
how many others there are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from geoopt import ManifoldTensor
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Faults", "State"]

_MASK = 2**64 - 1
_PURPOSES = 4  # an upper bound; changing it changes every draw


class Faults(NamedTuple):
    """What a manifold could not do, in matrices and columns."""

    skipped: int  # matrices whose gradient or step was not finite
    uncorrected: int  # columns too far off the manifold for the drift correction


class State:
    """Counts of gradients and of faults; the latter are counted where they happen, on the tensors' device."""

    def __init__(self, seed: int) -> None:
        self.gradients = 0  # seen and accepted
        self._sharers: Any = WeakIdKeyDictionary()  # the parameters that had them
        self._known_sharers = 1  # how many there were before this process
        self._start = _mixed(seed & _MASK)
        self._generators: dict[torch.device, torch.Generator] = {}
        self._faults: dict[torch.device, Tensor] = {}

    def generator(self, device: torch.device, purpose: int, ahead: int = 0) -> torch.Generator:
        """Return a generator seeded for the count of gradients plus ``ahead``, and for a purpose."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        mixed = _mixed(self._start + (self.gradients + ahead) * _PURPOSES + purpose)
        return self._generators[device].manual_seed(mixed >> 32)  # CPU generators look at 32 bits

    def is_new(self, x: Tensor) -> bool:
        """Return whether x is a parameter that has had no gradient yet."""
        return isinstance(x, ManifoldTensor) and x not in self._sharers

    def count_gradient(self, x: Tensor) -> None:
        """Count a gradient at x."""
        self.gradients += 1
        if isinstance(x, ManifoldTensor):
            self.register(x)

    def register(self, x: Tensor) -> None:
        """Count x among the parameters that share this state."""
        self._sharers[x] = True

    @property
    def stamp(self) -> tuple[int, int]:
        """Seed and count, from which all draws follow, as two numbers of 63 bits."""
        return self._start >> 1, self.gradients

    def turn(self) -> int:
        """Return about how many gradients each of the parameters that share this state has had."""
        return self.gradients // self._sharing()

    def _sharing(self) -> int:
        """Return how many parameters share this state."""
        return max(self._known_sharers, len(self._sharers))

    def count_faults(self, device: torch.device, *, skipped: Tensor | int = 0, uncorrected: Tensor | int = 0) -> None:
        """Add to the faults, without waiting for the device."""
        if device not in self._faults:
            self._faults[device] = torch.zeros(2, dtype=torch.int64, device=device)
        for slot, number in zip(self._faults[device], (skipped, uncorrected), strict=True):
            slot.add_(number)

    def faults(self) -> Faults:
        """Return all faults; waits for the devices."""
        return Faults(*map(sum, zip((0, 0), *(counts.tolist() for counts in self._faults.values()), strict=True)))

    def forget_faults(self) -> None:
        """Reset the counts of faults."""
        self._faults = {}

    def packed(self) -> Tensor:  # (32,) uint8
        """Return the state as bytes."""
        return torch.tensor([self.gradients, self._sharing(), *self.faults()], dtype=torch.int64, device="cpu").view(
            torch.uint8
        )

    def unpack(self, packed: object) -> None:
        """Take over a packed state."""
        if not isinstance(packed, Tensor) or packed.dtype != torch.uint8 or packed.shape != (32,):
            found = f"{packed.dtype} {tuple(packed.shape)}" if isinstance(packed, Tensor) else type(packed).__name__
            raise ValueError(f"the state of a manifold must be a uint8 tensor of 32 bytes, got {found}")
        numbers = packed.detach().cpu().contiguous().view(torch.int64).tolist()
        if min(numbers) < 0 or numbers[1] < 1:
            raise ValueError(f"the state of a manifold must hold counts, got {numbers}")
        self.gradients, self._known_sharers, skipped, uncorrected = numbers
        self._sharers = WeakIdKeyDictionary()
        self.forget_faults()
        self.count_faults(torch.device("cpu"), skipped=skipped, uncorrected=uncorrected)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle takes along: the counts, from which the rest follows."""
        return {"_start": self._start, "packed": self.packed()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the counts."""
        self._start, self._generators = state["_start"], {}
        self.unpack(state["packed"])


def _mixed(z: int) -> int:
    """Spread neighbouring integers over 64 bits (the finaliser of SplitMix64, Steele, Lea, Flood 2014)."""
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
