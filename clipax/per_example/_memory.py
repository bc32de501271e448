"""The argument `memory`: whether the factors are kept, or made twice."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax

from clipax.per_example._calls import Call
from clipax.per_example._plans import Plan
from clipax.per_example._programs import REMATS, Program, bodies
from clipax.per_example._tracing import ExampleProgram, program_of_loss

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
    examples are larger than the parameters. A `jax.custom_vjp` must have no part in the loss,
    because its way back may not be linear.
    """
    if memory != "auto":
        return memory == "twice"
    kept = call.examples * sum(plan.entries for plan in plans)
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(program.gradient))
    if bounds != 1 or kept <= size or not _has(program.closed.jaxpr, REMATS):
        return False
    return not _has(program_of_loss(call).jaxpr, _CUSTOM)


# Its name depends on the version of JAX.
_CUSTOM = {"custom_vjp_call", "custom_vjp_call_jaxpr"}


def _has(program: Program, primitives: Collection[str]) -> bool:
    """Whether one of these primitives is in a program, or in the body of one of its equations."""
    pending = [program]
    while pending:
        current = pending.pop()
        if any(equation.primitive.name in primitives for equation in current.eqns):
            return True
        pending += [each for equation in current.eqns for each in bodies(equation)]
    return False
