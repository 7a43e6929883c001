"""What the package has promised itself, and whether a run met it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .records import Cell, exponent, matrices_per_step, median_ratio, series, times_by_size

VARIANTS = ("D", "T")
LARGE: dict[str, Any] = {"shape": [2048, 2048]}
IN_PLACE = {128: 5.0, 512: 4.0, 1024: 3.6, 2048: 2.5, 4096: 2.4}
RSGD = {128: 18.0, 512: 9.0, 1024: 6.5, 2048: 6.0, 4096: 6.0}
RADAM = {512: 5.0, 1024: 5.0, 2048: 2.6, 4096: 2.6}
IN_PLACE_RADAM = {1024: 2.0, 2048: 2.0, 4096: 2.0}
RANK_4 = {"in place": 8.0, "RiemannianSGD": 9.0}
COMPLEX_SHAPES = ((544, 64, 64), (144, 128, 128), (40, 256, 256))
BLOCKS = {"in place": 8.0, "RiemannianSGD": 14.0}
FASTER_THAN_EXPONENTIAL = 10.0
EXPONENT_IN_N = 2.1
EXPONENT_IN_K = 1.1
SLOWER_RIVALS = 50.0
OVER_EUCLIDEAN = {96: 1.0, 128: 0.7, 256: 0.3}  # small rank, by side
FULL_RANK_SIZES = (128, 256, 512, 1024)
FULL_RANK = {0.05: (1.1, 0.7), 1.0: (2.0, 1.2)}  # over EuclideanStiefel and CanonicalStiefel, by length of the step
COMPLEX_SIZES = (128, 256, 512)
MEMORY_IN_PLACE = 0.05
MEMORY_BEYOND_GEOOPT = 1.05  # a temporary and the factors


@dataclass(frozen=True)
class Bar:
    """A limit and what was measured, the less favourable of D and T; None where it was not measured."""

    what: str
    limit: float
    measured: float | None
    least: bool = False  # the limit is a lower one

    @property
    def verdict(self) -> str:
        """Return whether the bar is met, in a word."""
        if self.measured is None:
            return "not measured"
        met = self.measured >= self.limit if self.least else self.measured <= self.limit
        return "met" if met else "MISSED"


def bars(record: dict[str, Any]) -> list[Bar]:
    """Return every bar with what a run measured."""
    cells = record["cells"]
    return [
        *_speed(cells),
        *_rank(cells),
        *_stiefel(cells),
        *_blocks(cells),
        *_exponents(cells),
        *_rivals(cells),
        *_memory(cells),
    ]


def _worst(
    cells: list[Cell],
    section: str,
    form: str,
    where: dict[str, Any],
    value: Callable[[Cell], float] = median_ratio,
) -> float | None:
    """Return the largest value of D and T; None if neither was measured."""
    found = [cell for letter in VARIANTS for cell in series(cells, section, f"{form} {letter}", **where)]
    return max(map(value, found), default=None)


def _speed(cells: list[Cell]) -> list[Bar]:
    tables = (
        ("in place", IN_PLACE, "SGD"),
        ("RiemannianSGD", RSGD, "SGD"),
        ("RiemannianAdam", RADAM, "Adam"),
        ("in-place RiemannianAdam", IN_PLACE_RADAM, "Adam"),
    )
    return [
        Bar(
            f"{form}, n = {n}, relative to torch's {yardstick}{_missing(cells, form, n)}",
            limit,
            _worst(cells, "speed", form, {"shape": [n, n]}, partial(median_ratio, yardstick=yardstick.lower())),
        )
        for form, limits, yardstick in tables
        for n, limit in limits.items()
    ]


def _missing(cells: list[Cell], form: str, n: int) -> str:
    """Say which of D and T was not timed at this size, if one was."""
    missing = [letter for letter in VARIANTS if not series(cells, "speed", f"{form} {letter}", shape=[n, n])]
    return f" ({missing[0]} not timed)" if len(missing) == 1 else ""


def _rank(cells: list[Cell]) -> list[Bar]:
    return [
        Bar(f"{form}, n = 2048, k = 4, relative to torch's SGD", limit, _worst(cells, "rank", form, LARGE | {"k": 4}))
        for form, limit in RANK_4.items()
    ]


def _stiefel(cells: list[Cell]) -> list[Bar]:
    """Return the bars for steps beside geoopt's with the same optimiser, and beside POGO's."""
    over_rival = partial(median_ratio, yardstick="rival")
    found = []
    for kind in ("RiemannianSGD", "RiemannianAdam"):
        form = f"in-place {kind}"
        for k in (1, 4):
            for n, limit in OVER_EUCLIDEAN.items():
                ours = _worst(cells, "stiefel", form, {"shape": [n, n], "k": k}, over_rival)
                found.append(Bar(f"{form}, n = {n}, k = {k}, relative to EuclideanStiefel's", limit, ours))
        for length, (euclidean, canonical) in FULL_RANK.items():
            for n in FULL_RANK_SIZES:
                where: dict[str, Any] = {"shape": [n, n], "k": None, "length": length}
                ours = _worst(cells, "stiefel", form, where, over_rival)
                rival = series(cells, "stiefel", f"CanonicalStiefel, {kind}", **where)
                over = ours / over_rival(rival[0]) if ours is not None and rival else None
                what = f"{form}, n = {n}, k = None, ‖u‖₂ = {length:g}, relative to"
                found.append(Bar(f"{what} EuclideanStiefel's", euclidean, ours))
                found.append(Bar(f"{what} CanonicalStiefel's", canonical, over))
    for n in COMPLEX_SIZES:
        ours = _worst(cells, "complex", "in-place RiemannianSGD", {"shape": [n, n]}, over_rival)
        found.append(Bar(f"complex in-place RiemannianSGD, n = {n}, k = None, relative to POGO's", 1.0, ours))
    return found


def _blocks(cells: list[Cell]) -> list[Bar]:
    found = []
    for shape in COMPLEX_SHAPES:
        where: dict[str, Any] = {"shape": list(shape), "dtype": "complex64"}
        name = "x".join(map(str, shape))
        dense = series(cells, "batch", "dense exponential", **where)
        for form, limit in BLOCKS.items():
            ours = _worst(cells, "batch", form, where)
            found.append(Bar(f"{form}, complex {name}, relative to torch's SGD", limit, ours))
            times = median_ratio(dense[0]) / ours if dense and ours else None
            what = f"{form}, complex {name}, speed-up over the dense exponential"
            found.append(Bar(what, FASTER_THAN_EXPONENTIAL, times, least=True))
    return found


def _exponents(cells: list[Cell]) -> list[Bar]:
    found = []
    for form in ("in place", "RiemannianSGD"):
        names = [f"{form} {letter}" for letter in VARIANTS]
        in_n = [exponent(times_by_size(cells, "speed", name)) for name in names]
        found.append(Bar(f"{form}, exponent of n from 512 to 4096", EXPONENT_IN_N, _largest(in_n)))
        by_rank = [series(cells, "rank", name, **LARGE) for name in names]
        in_k = [exponent([(cell["k"], cell["seconds"]["median"]) for cell in found_]) for found_ in by_rank]
        found.append(Bar(f"{form}, exponent of k from 1 to 16", EXPONENT_IN_K, _largest(in_k)))
    return found


def _rivals(cells: list[Cell]) -> list[Bar]:
    ours = _worst(cells, "speed", "RiemannianSGD", LARGE)
    found = []
    for name in ("CanonicalStiefel, RiemannianSGD", "EuclideanStiefel, RiemannianSGD", "POGO"):
        rival = series(cells, "rivals", name, **LARGE)
        times = median_ratio(rival[0]) / ours if rival and ours else None
        found.append(Bar(f"{name}, n = 2048, relative to our RiemannianSGD", SLOWER_RIVALS, times, least=True))
    return found


def _memory(cells: list[Cell]) -> list[Bar]:
    alone = series(cells, "memory", "unconstrained, RiemannianSGD", **LARGE)
    ours = _worst(cells, "memory", "RiemannianSGD", LARGE, matrices_per_step)
    beyond = ours - matrices_per_step(alone[0]) if ours is not None and alone else None
    in_place = _worst(cells, "memory", "in place", LARGE, matrices_per_step)
    return [
        Bar("in place, n = 2048, elements allocated by a step / n²", MEMORY_IN_PLACE, in_place),
        Bar("RiemannianSGD, n = 2048, elements allocated beyond geoopt's own / n²", MEMORY_BEYOND_GEOOPT, beyond),
    ]


def _largest(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return max(present) if len(present) == len(values) else None
