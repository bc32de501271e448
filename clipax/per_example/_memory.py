"""The argument `memory`: whether the factors are kept, or made twice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax

from clipax.per_example._calls import Call
from clipax.per_example._plans import Plan
from clipax.per_example._programs import REMATS, Program, body_of
from clipax.per_example._tracing import ExampleProgram

Memory: TypeAlias = Literal["auto", "kept", "twice"]


def check_memory(memory: Any) -> None:
    """Refuses anything but the three words."""
    if not isinstance(memory, str) or memory not in get_args(Memory):
        raise ValueError(f"memory must be 'auto', 'kept' or 'twice', got {memory!r}.")


def is_twice(
    memory: Memory, call: Call, program: ExampleProgram, plans: Sequence[Plan], bounds: int
) -> bool:
    """Whether to make the factors again for the sum.

    By default this is so if the loss rematerializes, there is one bound, and the factors of all
    examples are larger than the parameters.
    """
    if memory != "auto":
        return memory == "twice"
    if bounds != 1 or not _rematerializes(program.closed.jaxpr):
        return False
    kept = call.examples * sum(plan.entries for plan in plans)
    return kept > sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.gradient))


def _rematerializes(program: Program) -> bool:
    pending = [program]
    while pending:
        for equation in pending.pop().eqns:
            if equation.primitive.name in REMATS:
                return True
            body = body_of(equation)
            pending += [] if body is None else [body.program]
    return False
