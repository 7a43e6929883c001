"""What a manifold remembers between steps: a count of gradients, from which all its random numbers follow.

Before every draw the generator is seeded by the manifold's seed, the count and the purpose of the draw.  So
the count is the whole state of the sketches: a refused gradient leaves it as it was, equal moves between two
gradients use equal sketches, and a checkpoint holds a few integers.  Parameters that share a manifold share this
count; divided by their number it counts the steps of each, whose turns of the drift correction must not depend on
how many others there are.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import EllipsisType
from typing import Any, NamedTuple

import torch
from geoopt import ManifoldTensor
from torch import Tensor

__all__ = ["Faults", "State", "counts_of", "digits_of", "numbers_of"]

_MARK = "_projunn_manifold_sharer"
_MASK = 2**64 - 1
_PURPOSES = 4  # an upper bound; changing it changes every draw
_BASE, _DIGITS = 256, 8  # bfloat16 holds integers up to 256 exactly

Members = slice | EllipsisType  # of a stack, or all that there is


class Faults(NamedTuple):
    """What a manifold could not do, in matrices and columns."""

    skipped: int  # matrices whose gradient or step was not finite, or led to a singular matrix
    uncorrected: int  # columns too far off the manifold for the drift correction
    shortened: int = 0  # matrices whose step was shortened, where the host cannot look at its length


_LEAST = (0, 1, *(0 for _ in Faults._fields))  # of gradients, sharers and faults


class _Sharer:
    """What a parameter carries whose gradients are counted; PyTorch swaps no tensor that has weak references itself."""


class State:
    """Counts of gradients and of faults; the latter are counted where they happen, on the tensors' device."""

    def __init__(self, seed: int) -> None:
        self.gradients = 0  # seen and accepted
        self._forget_sharers()
        self._known_sharers = 1  # how many there were before this process
        self._start = _mixed(seed & _MASK)
        self._generators: dict[torch.device, torch.Generator] = {}
        self._faults: dict[torch.device, Tensor] = {}

    def generator(self, device: torch.device, purpose: int, ahead: int = 0) -> torch.Generator:
        """Return a generator seeded for the count of gradients plus ``ahead``, and for a purpose."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device].manual_seed(self.seed_of(purpose, self.gradients + ahead))

    def seed_of(self, purpose: int, gradients: int) -> int:
        """Return the seed of a draw after so many gradients."""
        return _mixed(self._start + gradients * _PURPOSES + purpose) >> 32  # CPU generators look at 32 bits

    def is_new(self, x: Tensor) -> bool:
        """Return whether x is a parameter that has had no gradient yet."""
        return isinstance(x, ManifoldTensor) and not self._knows(x)

    def count_gradient(self, x: Tensor) -> None:
        """Count a gradient at x."""
        self.gradients += 1
        if self.is_new(x):
            self.register(x)

    def register(self, x: Tensor) -> None:
        """Count x among the parameters that share this state."""
        if not self._knows(x):
            x.__dict__[_MARK] = sharer = _Sharer()
            self._sharers.add(sharer)

    def _knows(self, x: Tensor) -> bool:
        return x.__dict__.get(_MARK) in self._sharers

    def _forget_sharers(self) -> None:
        self._sharers: weakref.WeakSet[_Sharer] = weakref.WeakSet()  # of the parameters that had gradients

    @property
    def stamp(self) -> tuple[int, int]:
        """Seed and count, from which all draws follow, as two numbers of 63 bits."""
        return self._start >> 1, self.gradients

    def turn(self) -> int:
        """Return about how many gradients each of the parameters that share this state has had."""
        return self.turn_after(self.gradients)

    def turn_after(self, gradients: int) -> int:
        """Return the turn when this state has had so many gradients."""
        return gradients // self._sharing()

    def turns(self) -> Iterator[tuple[int, Members]]:
        """Iterate over turns and the members of a stack whose turns they are; here all are one parameter's."""
        yield self.turn(), ...

    def _sharing(self) -> int:
        """Return how many parameters share this state."""
        return max(self._known_sharers, len(self._sharers))

    def count_faults(self, device: torch.device, members: Members = ..., /, **faults: Tensor | int) -> None:
        """Add to the faults, by their names, numbers or tensors with many, without waiting for the device."""
        if device not in self._faults:
            self._faults[device] = torch.zeros(len(Faults._fields), dtype=torch.int64, device=device)
        for name, number in faults.items():
            slot = self._faults[device][Faults._fields.index(name)]
            slot.add_(number.sum() if isinstance(number, Tensor) and number.dim() else number)

    def faults(self) -> Faults:
        """Return all faults; waits for the devices."""
        nothing = [0] * len(Faults._fields)
        return Faults(*map(sum, zip(nothing, *(counts.tolist() for counts in self._faults.values()), strict=True)))

    def forget_faults(self) -> None:
        """Reset the counts of faults."""
        self._faults = {}

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Leave all counts as they are, and new parameters new."""
        gradients, known, sharers = self.gradients, self._known_sharers, list(self._sharers)
        faults = {device: counts.clone() for device, counts in self._faults.items()}
        try:
            yield
        finally:
            self.gradients, self._known_sharers, self._faults = gradients, known, faults
            self._sharers = weakref.WeakSet(sharers)

    def catch_up(self, other: State) -> None:
        """Take the larger counts of gradients and of sharers: an average goes on where the one ahead would."""
        self.gradients = max(self.gradients, other.gradients)
        self._known_sharers = max(self._sharing(), other._sharing())

    def counts(self) -> tuple[int, ...]:
        """Return gradients, sharers and faults; waits for the devices."""
        return self.gradients, self._sharing(), *self.faults()

    def adopt(self, counts: Iterable[int]) -> None:
        """Take over what :meth:`counts` returned, here or elsewhere."""
        self.gradients, self._known_sharers, *faults = counts
        self._forget_sharers()
        self.forget_faults()
        self.count_faults(torch.device("cpu"), **dict(zip(Faults._fields, faults, strict=True)))

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle takes along: integers, from which the rest follows."""
        return {"_start": self._start, "counts": self.counts()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over the counts."""
        self._start, self._generators = state["_start"], {}
        self.adopt(state["counts"])


def digits_of(numbers: Iterable[int]) -> Tensor:  # -> (numbers, 8) int64
    """Return natural numbers as digits to the base 256, the lowest first."""
    digits = [[number // _BASE**place % _BASE for place in range(_DIGITS)] for number in numbers]
    return torch.tensor(digits, dtype=torch.int64, device="cpu")


def numbers_of(digits: object, count: int, name: str) -> list[float]:
    """Return so many numbers from their digits, of any real dtype and device: an average need not be whole.

    Raises
    ------
    ValueError
        Anything else than a real tensor ``(count, 8)``, or one without finite values; ``name`` says what it was.
    """
    if not isinstance(digits, Tensor) or digits.shape != (count, _DIGITS) or digits.is_complex() or digits.is_meta:
        found = f"{digits.dtype} {tuple(digits.shape)} on {digits.device}" if isinstance(digits, Tensor) else digits
        raise ValueError(f"{name!r} must be a real tensor of shape {(count, _DIGITS)}, from a state_dict, got {found}")
    exact = digits.detach().to("cpu", torch.float64 if digits.is_floating_point() else torch.int64)
    numbers = [sum(digit * _BASE**place for place, digit in enumerate(row)) for row in exact.tolist()]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name!r} must hold finite numbers, got {numbers}")
    return numbers


def counts_of(digits: object, name: str) -> list[int]:
    """Return a state's counts from their digits.

    A fraction, as averages have, is rounded up; a number below the least that a count can be, as differences of
    state_dicts have, is that least.

    Raises
    ------
    ValueError
        Digits of no numbers (:func:`numbers_of`), or counts beyond 63 bits.
    """
    numbers = numbers_of(digits, len(_LEAST), name)
    counts = [max(math.ceil(number), least) for number, least in zip(numbers, _LEAST, strict=True)]
    if max(counts) >= 2**63:
        raise ValueError(f"{name!r} must hold counts of gradients, sharers and faults, got {counts}")
    return counts


def _mixed(z: int) -> int:
    """Spread neighbouring integers over 64 bits (the finaliser of SplitMix64, Steele, Lea, Flood 2014)."""
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
