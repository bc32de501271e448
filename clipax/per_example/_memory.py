"""The argument `memory`: whether the factors are kept, or made twice."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Literal, TypeAlias, get_args

import jax

from clipax._core import _leaves
from clipax._core._shown import shown
from clipax.per_example._calls import Call
from clipax.per_example._measured import Traced
from clipax.per_example._programs import REMATS, Program, bodies
from clipax.per_example._tracing import program_of_loss

Memory: TypeAlias = Literal["auto", "kept", "twice"]


def check_memory(memory: Any) -> None:
    """Refuses anything but the three words."""
    if not isinstance(memory, str) or memory not in get_args(Memory):
        raise ValueError(f"memory must be 'auto', 'kept' or 'twice', got {shown(memory)}.")


def is_twice(memory: Memory, call: Call, known: Traced, bounds: int = 1) -> bool:
    """Whether to make the factors again for the sum.

    By default this is so if the loss rematerializes, there is one bound, and the factors of all
    examples are larger than the parameters.
    """
    if memory != "auto":
        return memory == "twice"
    kept = call.examples * sum(plan.entries for plan in known.plans)
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(known.program.gradient))
    is_less = _leaves.is_known(kept) and kept <= size
    return bounds == 1 and not is_less and _has(known.program.closed.jaxpr, REMATS)


def second_pass(
    memory: Memory, call: Call, known: Traced, bounds: int = 1, *, widens: bool = False
) -> Call | None:
    """The call for a second pass, from which the sum is made, or None if the factors are kept.

    Its loss function is traced already. The second pass must be right for the sum.

    Args:
      memory: The argument.
      call: The call.
      known: Its program and plans.
      bounds: How many bounds there are.
      widens: Whether a sum is wider than its parameter, in whose width the second pass adds.
    """
    if not is_twice(memory, call, known, bounds):
        return None
    program = program_of_loss(call)
    if widens:
        why = "a second pass adds gradients in the dtypes of the parameters, and grads are wider"
    elif _has(program.jaxpr, _CUSTOM):
        why = "loss_fn has a jax.custom_vjp, whose way back may not be linear"
    else:
        return call.with_program(program)
    if memory == "twice":
        raise ValueError(f"memory must be 'kept' or 'auto' here, because {why}, got 'twice'.")
    return None


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
