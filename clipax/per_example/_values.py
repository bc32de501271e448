"""Values of a program for all examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from clipax.per_example._calls import Call
from clipax.per_example._evaluation import evaluate
from clipax.per_example._schedules import Wanted
from clipax.per_example._tracing import ExampleProgram


def values_of(call: Call, program: ExampleProgram, differs: Mapping[Any, bool]) -> Any:
    """What is wanted, for all examples, or once if it is the same for all."""
    wanted: list[Wanted] = list(differs)

    def evaluate_one(*example: Any) -> list[Any]:
        return evaluate(program.closed, jax.tree.leaves(example), wanted)

    out_axes = [0 if differs[each] else None for each in wanted]
    found = jax.vmap(evaluate_one, call.in_axes, out_axes)(*call.args)
    return dict(zip(wanted, found, strict=True))
