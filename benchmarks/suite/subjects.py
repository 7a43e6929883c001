"""Who is timed: this package in its forms, torch's optimisers, geoopt's own cost, and the rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import geoopt
import geotorch
import torch
from geoopt.optim import RiemannianAdam, RiemannianSGD
from pogo import POGO, base
from torch.nn.utils.parametrizations import orthogonal

from projunn_manifold import UnitaryLowRank, UnitaryLowRankExact, optim, reference

from .checks import Check, arrives_at, follows_map, stays_orthogonal
from .problems import Problem
from .trials import (
    Build,
    Unconstrained,
    copy_in_place,
    dense_exponential,
    fresh_copy,
    in_place,
    optimised,
    parametrised,
    stacked,
)


@dataclass(frozen=True)
class Subject:
    """Something that steps, and what it is measured with."""

    name: str
    family: str  # "ours", "torch", "geoopt alone" or "rival"
    source: str  # the package it comes from
    cost: str  # of a step on n x n
    build: Build
    check: Check
    steps: int = 1  # at least so many consecutive steps make a sample
    adam: bool = False  # measured with torch's Adam besides SGD
    largest: int = 4096  # side it is timed at


def _ours(prefix: str, build: Callable[[Any], Build], *, adam: bool = False) -> list[Subject]:
    """Return D and T of one form of this package; ``build`` takes the manifold's class."""
    variants = ((" D", UnitaryLowRank, reference.retraction), (" T", UnitaryLowRankExact, reference.geodesic))
    return [
        Subject(
            prefix + letter,
            "ours",
            "projunn_manifold",
            "O(k n²)",
            build(manifold),
            follows_map(map_, normalised=adam),
            steps=64,  # a block of columns is corrected every so many steps
            adam=adam,
            largest=2048 if adam and letter == " T" else 4096,  # beyond, minutes; T differs from D in a tiny core
        )
        for letter, manifold, map_ in variants
    ]


def _plain(name: str, build: Build, expected: Callable[[Problem], torch.Tensor], source: str = "torch") -> Subject:
    return Subject(name, "geoopt alone" if source == "geoopt" else source, source, "O(n²)", build, arrives_at(expected))


def _rival(name: str, source: str, build: Build, *, adam: bool = False) -> Subject:
    return Subject(name, "rival", source, "O(n³)", build, stays_orthogonal, adam=adam, largest=2048)


IN_PLACE = _ours("in place", in_place)
RSGD = _ours("RiemannianSGD", partial(optimised, RiemannianSGD))
RADAM = _ours("RiemannianAdam", partial(optimised, RiemannianAdam), adam=True)
IN_PLACE_RSGD = _ours("in-place RiemannianSGD", partial(optimised, optim.RiemannianSGD))
IN_PLACE_RADAM = _ours("in-place RiemannianAdam", partial(optimised, optim.RiemannianAdam), adam=True)


def _normalised(problem: Problem, root: float) -> torch.Tensor:
    """First step of Adam and RMSprop: every element over its modulus times ``root``, and their epsilon."""
    g = problem.gradient()
    return problem.x - problem.rate * g / (root * g.abs() + 1e-8)


SGD = _plain("torch SGD", optimised(torch.optim.SGD), lambda p: p.x - p.rate * p.gradient())
RMSPROP = _plain("torch RMSprop", optimised(torch.optim.RMSprop), lambda p: _normalised(p, 0.1))
ADAM = _plain("torch Adam", optimised(torch.optim.Adam), lambda p: _normalised(p, 1.0))
NULL_RSGD = _plain(
    "unconstrained, RiemannianSGD",
    optimised(RiemannianSGD, lambda k: Unconstrained()),
    lambda p: p.x - p.rate * p.gradient(),
    "geoopt",
)
NULL_RADAM = _plain(
    "unconstrained, RiemannianAdam",
    optimised(RiemannianAdam, lambda k: Unconstrained()),
    lambda p: p.x - p.rate * p.gradient() / torch.linalg.matrix_norm(p.gradient()),
    "geoopt",
)
COPY = _plain("copy_", copy_in_place, lambda p: p.x)
CLONE = _plain("clone", fresh_copy, lambda p: p.x)
PLAIN = [SGD, RMSPROP, ADAM, COPY, CLONE, NULL_RSGD, NULL_RADAM]

DENSE_EXPONENTIAL = _rival("dense exponential", "torch", dense_exponential)
STACKED_POGO = _rival("POGO", "pogo-torch", stacked(lambda params, lr: POGO(params, base.SGD(), lr)))
CANONICAL, EUCLIDEAN = (
    [
        _rival(
            f"{stiefel.__name__}, {kind.__name__}",
            "geoopt",
            optimised(kind, lambda k, cls=stiefel: cls()),
            adam=kind is RiemannianAdam,
        )
        for kind in (RiemannianSGD, RiemannianAdam)
    ]
    for stiefel in (geoopt.CanonicalStiefel, geoopt.EuclideanStiefel)
)
RIVALS = [
    CANONICAL[0],
    EUCLIDEAN[0],
    STACKED_POGO,
    *(
        _rival(f"parametrizations.orthogonal, {name}", "torch", parametrised(partial(orthogonal, orthogonal_map=name)))
        for name in ("matrix_exp", "cayley", "householder")
    ),
    *(
        _rival(f"geotorch.orthogonal, {name}", "geotorch", parametrised(partial(geotorch.orthogonal, triv=name)))
        for name in ("expm", "cayley")
    ),
]
EVERYTHING = [*PLAIN, *IN_PLACE, *RSGD, *IN_PLACE_RSGD, *RADAM, *IN_PLACE_RADAM, *RIVALS]
