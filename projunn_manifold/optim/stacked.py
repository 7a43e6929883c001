"""Parameters of one kind step as one stack, with the results of stepping one by one.

A step of a small matrix is calls from Python, not arithmetic.  A stack of many needs the calls of a single one, and a
copy of every parameter, gradient and moment into the stack and, except for gradients, back.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from geoopt import ManifoldParameter
from torch import Tensor

from projunn_manifold import context
from projunn_manifold.manifold.state import State
from projunn_manifold.manifold.states import Place, States

__all__ = ["Member", "Move", "move_all_"]

#: Measured on CPU: bytes of a parameter up to which, and how many of a kind from which on, copies cost less than the
#: calls that they save, also for the step that costs least.
_SMALL, _FEW = 2**17, 4
_SMALL_IF_DENSE = 2**15
_CACHED, _MOST = 2**21, 2**28  # bytes of a stack, on CPU, where a step reads it several times, and elsewhere


class Stackable(Protocol):
    """A manifold of this package, as far as stacks know it."""

    @property
    def memory(self) -> State:
        """What it remembers between steps."""

    @property
    def settings(self) -> Hashable | None:
        """What manifolds must have in common to step as one; None: this one cannot."""

    def is_dense(self, x: Tensor) -> bool:
        """Return whether moves of x use the whole gradient."""

    def has_seen(self, p: Tensor) -> bool:
        """Return whether a parameter has had a gradient."""

    def together(self, states: States) -> Any:
        """Return a manifold of these settings for a stack whose members have states of their own."""


class Member(NamedTuple):
    """A parameter that has a gradient, and what its step depends on."""

    point: Tensor
    manifold: Stackable
    group: dict[str, Any]
    state: dict[str, Any]


Move = Callable[[Any, Any, dict[str, Any], dict[str, Any]], None]


def move_all_(members: Sequence[Member], move_: Move) -> None:
    """Move all members in their order, those of one kind together where the first of them stands.

    What raises ValueError in a stack has changed nothing: its members are then moved one by one.
    """
    stacks = _in_stacks(members)
    if len(stacks) == len(members):
        for member in members:
            move_(*member)
        return
    places = _places(members)
    counts = {places[i].state: places[i].state.gradients for stack in stacks if len(stack) > 1 for i in stack}
    try:
        for stack in stacks:
            at = [places[i] for i in stack]
            if len(stack) > 1 and _move_stack_([members[i] for i in stack], at, move_):
                _note(counts, at)
                continue
            for i in stack:
                state, gradients = places[i]
                if state in counts:  # which a stack may have taken further
                    state.gradients = gradients
                try:
                    move_(*members[i])
                finally:
                    _note(counts, [places[i]])
    finally:
        for state, gradients in counts.items():
            state.gradients = gradients


def _note(counts: dict[State, int], places: Sequence[Place]) -> None:
    """Keep the largest counts of gradients that have been reached."""
    for state in {place.state for place in places}:
        if state in counts:
            counts[state] = max(counts[state], state.gradients)


def _places(members: Sequence[Member]) -> list[Place]:
    """Return where the gradients of members stand among those of their manifolds if all are moved in their order."""
    following: dict[State, int] = {}
    places = []
    for member in members:
        state = member.manifold.memory
        place = Place(state, following.get(state, state.gradients))
        following[state] = place.gradients + 1
        places.append(place)
    return places


# -- which members make a stack --------------------------------------------------------------------------------


def _in_stacks(members: Sequence[Member]) -> list[list[int]]:
    """Cut the members into stacks, in the order of their first ones; most have one member."""
    allowed = {key: _steps_together(group) for key, group in {id(m.group): m.group for m in members}.items()}
    if len(members) == 1 or not any(allowed.values()):
        return [[i] for i in range(len(members))]
    new = {m.manifold.memory for m in members if not m.manifold.has_seen(m.point)}  # they become known, and may warn
    manifolds = {id(m.manifold): m.manifold for m in members}
    settings = {key: None if m.memory in new else m.settings for key, m in manifolds.items()}
    found: list[list[int]] = []
    stacks: list[list[int]] = []
    growing: dict[Hashable, list[int]] = {}
    addresses = set()
    for i, member in enumerate(members):
        shared = settings[id(member.manifold)]
        kind = None if shared is None or not allowed[id(member.group)] else _kind(member)
        address = member.point.data_ptr()
        if kind is None or address in addresses:  # of a parameter that is there twice, or shares its memory
            found.append([i])
            continue
        addresses.add(address)
        stack = growing.get((kind, shared))
        if stack is None or len(stack) >= _most(member.point):
            stack = growing[kind, shared] = []
            stacks.append(stack)
        stack.append(i)
    for stack in stacks:
        is_worth_it = len(stack) >= (2 if members[stack[0]].group["foreach"] else _FEW)
        found.extend([stack] if is_worth_it else [[i] for i in stack])
    return sorted(found)


def _steps_together(group: dict[str, Any]) -> bool:
    """Return whether parameters of a group may step together: not where it has numbers for each matrix."""
    if group["foreach"] is False or group["stabilize"] is not None:
        return False
    return not any(isinstance(value, Tensor) and value.dim() for value in group.values())


def _most(point: Tensor) -> int:
    """Return how many of these a stack may have."""
    return max(2, (_CACHED if point.is_cpu else _MOST) // point.nbytes)


def _kind(member: Member) -> Hashable | None:
    """Return what members of a stack have in common besides their manifolds' settings; None: this one moves alone."""
    point, manifold, group, state = member
    grad: Any = point.grad
    if type(point) is not ManifoldParameter or not point.is_contiguous() or point.is_conj() or point.is_neg():
        return None
    if not group["foreach"] and point.nbytes > (_SMALL_IF_DENSE if manifold.is_dense(point) else _SMALL):
        return None
    if type(grad) is not Tensor or grad.layout is not torch.strided:
        return None
    shape, dtype, device = point.shape, point.dtype, point.device
    if grad.shape != shape or grad.dtype is not dtype or grad.device != device or not point.numel():
        return None  # the first three are to be refused
    moments: list[Hashable] = []
    for name, value in state.items():
        if type(value) is int:
            moments.append((name, value))
        elif type(value) is Tensor and value.dim() == len(shape) and value.device == device:
            moments.append((name, value.shape, value.dtype))
        else:
            return None
    return id(group), shape, dtype, device, *moments


# -- the step of a stack ---------------------------------------------------------------------------------------


def _move_stack_(members: Sequence[Member], places: Sequence[Place], move_: Move) -> bool:
    """Move members of one kind together and return True; return False, with nothing changed, where one is refused."""
    points = [member.point for member in members]
    first, states = members[0], [member.state for member in members]
    many = States(places, first.point.dim() - 2)
    x = torch.stack(points)
    gradients: list[Any] = [point.grad for point in points]
    x.grad = torch.stack(gradients)
    moments = {name: [state[name] for state in states] for name in first.state}
    before = {name: torch.stack(each) if isinstance(each[0], Tensor) else each[0] for name, each in moments.items()}
    after = dict(before)
    try:
        move_(x, first.manifold.together(many), first.group, after)
    except ValueError:
        return False
    many.settle()
    context.copy_each_(points, x.unbind())
    for name, value in after.items():
        if value is before.get(name) and isinstance(value, Tensor):
            context.copy_each_(moments[name], value.unbind())
        else:
            each = (row.clone() for row in value.unbind()) if isinstance(value, Tensor) else [value] * len(states)
            for state, own in zip(states, each, strict=True):
                state[name] = own
    return True
