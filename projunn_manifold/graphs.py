"""What stays out of the graphs of torch.compile: the steps of optimisers on manifolds.

torch.compile takes an optimiser's parameters for plain ones: their class, by which geoopt knows a manifold, is gone
(torch 2.13).  A step that is traced is Euclidean, without a word.  So geoopt's optimisers are added to the list of
what is not traced, and this package's functions that make steps are kept out as well: they draw numbers by a count,
look at values and run compiled loops of their own, which no graph can.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch._dynamo

__all__ = ["constant_in_graphs", "outside_graphs"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_REASON = "a step on a manifold draws numbers by a count of steps and looks at values, which no graph can"
# older versions of torch take no reason
_OPTIONS = {"reason": _REASON} if "reason" in inspect.signature(torch.compiler.disable).parameters else {}

torch._dynamo.trace_rules.add("geoopt.optim")


def outside_graphs(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function that compiled code calls as it is: the graph ends before it, and another starts after it."""
    outside: Callable[_Arguments, _Result] = torch.compiler.disable(function, **_OPTIONS)
    return outside


def constant_in_graphs(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function of constants that is called while a graph is made: the graph takes its result as it is."""
    constant: Callable[_Arguments, _Result] = torch.compiler.assume_constant_result(function)
    return constant
