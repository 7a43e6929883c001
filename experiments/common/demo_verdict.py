"""What the demo claims, each claim computed from the rows of its table."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

Row = dict[str, Any]

SOONER = 3  # times: the quickest of ours to the goal, against all dense methods
LOWER = 10  # times: the loss of each of ours, against all dense methods
CHEAPER = 8  # times: a whole training step of ours, against Stiefel's
POINT = 0.01  # of accuracy
MARGIN = 0.10  # of accuracy, by which a transition that never moves is behind


@dataclass(frozen=True)
class Claim:
    """A sentence about a panel, with its figures, and whether it holds."""

    panel: str
    holds: bool
    words: str

    @property
    def told(self) -> str:
        """The sentence, after what came of it."""
        return f"{'ok' if self.holds else 'FAILED'}: {self.panel}: {self.words}"


def verdict(rows: list[Row]) -> list[Claim]:
    """Return all claims about the rows of the demo."""
    return [*_point(rows), *_cost(rows), *_nothing_lost(rows), *_step_times(rows)]


def of(rows: list[Row], panel: str) -> dict[str, Row]:
    """Return the rows of a panel by method."""
    return {row["method"]: row for row in rows if row["panel"] == panel}


def is_ours(method: str) -> bool:
    """Whether a method is one of this package."""
    return method.startswith("projUNN")


def is_dense(method: str) -> bool:
    """Whether a method moves an orthogonal matrix by factorisations of its size."""
    return method.startswith(("Stiefel", "Cayley"))


def _point(rows: list[Row]) -> list[Claim]:
    """When dense methods reach the goal, or are stopped, ours are far below; the quickest was there long before."""
    panel = of(rows, "rotation")
    dense = {name: row for name, row in panel.items() if is_dense(name)}
    ours = {name: row for name, row in panel.items() if is_ours(name)}
    soonest = min(row["seconds"] for row in dense.values())
    lowest = min(row["loss"] for row in dense.values())
    claims = [
        Claim(
            "rotation",
            LOWER * _loss_at(row, soonest) <= lowest,
            f"after {soonest:.3g} s the loss of {name} is {_loss_at(row, soonest):.2g}, the best dense "
            f"method's {lowest:.2g} (at least {LOWER} times as much)",
        )
        for name, row in ours.items()
    ]
    quickest, row = min(ours.items(), key=lambda item: (not item[1]["reached"], item[1]["seconds"]))
    arrival = f"reaches the goal after {row['seconds']:.3g} s" if row["reached"] else "does not reach the goal"
    claims.append(
        Claim(
            "rotation",
            row["reached"] and SOONER * row["seconds"] <= soonest,
            f"{quickest} {arrival}, no dense method within {soonest:.3g} s (at least {SOONER} times as long)",
        )
    )
    return claims


def _loss_at(row: Row, seconds: float) -> float:
    """Return the loss that a training had after so many seconds, or at its end; its first one before that."""
    (curve,) = row["curves"]
    before = [loss for loss, at in zip(curve["loss"], curve["seconds"], strict=True) if at <= seconds]
    return [curve["loss"][0], *before][-1]


def _cost(rows: list[Row]) -> list[Claim]:
    """At equal steps ours is as good as Stiefel, and cheaper."""
    panel = of(rows, "deep network")
    stiefel = panel["Stiefel-euclidean"]
    claims = []
    for name, row in panel.items():
        if is_ours(name):
            ours, theirs = row["scores"][0], stiefel["scores"][0]
            claims.append(
                Claim(
                    "deep network",
                    ours >= theirs - POINT,
                    f"{name} at equal steps recognises {ours:.1%}, Stiefel {theirs:.1%} (at most one point less)",
                )
            )
            claims.append(
                Claim(
                    "deep network",
                    CHEAPER * row["whole_ms"] <= stiefel["whole_ms"],
                    f"a whole step of {name} takes {row['whole_ms']:.3g} ms, Stiefel's "
                    f"{stiefel['whole_ms']:.3g} ms (at most 1/{CHEAPER})",
                )
            )
    return claims


def _nothing_lost(rows: list[Row]) -> list[Claim]:
    """Ours learn as much as Stiefel where a transition that never moves does not."""
    panel = of(rows, "narrow network")
    stiefel, frozen = panel["Stiefel-euclidean"]["scores"], panel["frozen"]["scores"]
    claims = []
    for name, row in panel.items():
        if is_ours(name):
            scores = row["scores"]
            claims.append(
                Claim(
                    "narrow network",
                    fmean(scores) >= min(fmean(stiefel) - POINT, *stiefel),
                    f"{name} explains {_range(scores)}, Stiefel {_range(stiefel)} "
                    "(at most one point less, or within the range of its seeds)",
                )
            )
            claims.append(
                Claim(
                    "narrow network",
                    fmean(scores) >= fmean(frozen) + MARGIN and min(scores) > max(frozen),
                    f"{name} explains {_range(scores)}, a frozen transition {_range(frozen)} "
                    f"(at least {100 * MARGIN:.0f} points less, the ranges apart)",
                )
            )
    return claims


def _range(scores: list[float]) -> str:
    return f"{fmean(scores):.1%} ({100 * min(scores):.1f} to {100 * max(scores):.1f})"


def _step_times(rows: list[Row]) -> list[Claim]:
    """Ours make a step of one large layer cheaper."""
    panel = of(rows, "step times")
    ours = panel["projUNN-D, k = 1"]
    name, dense = min(((m, row) for m, row in panel.items() if is_dense(m)), key=lambda item: item[1]["whole_ms"])
    return [
        Claim(
            "step times",
            CHEAPER * ours["whole_ms"] <= dense["whole_ms"],
            f"at n = {ours['n']} a whole step takes {ours['whole_ms']:.3g} ms, and "
            f"{dense['whole_ms']:.3g} ms with {name}, the quickest dense method (at most 1/{CHEAPER})",
        )
    ]
