"""Norms of gradients that are found where their factors are made, in the step of a scan.

Each step then leaves one number for each example, not the factors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _compat, _paths
from clipax._core._typing import Array
from clipax.per_example import _programs
from clipax.per_example._gradients import as_made, leaf_gradients
from clipax.per_example._grams import row_norms
from clipax.per_example._norms import beside_parts, norms_of
from clipax.per_example._plans import Plan, numbered, plan
from clipax.per_example._programs import Ref, is_variable, shape_of
from clipax.per_example._schedules import Reading
from clipax.per_example._scopes import Origin, Scope
from clipax.per_example._tracing import ExampleProgram


def readings_of(program: ExampleProgram) -> list[list[Reading]]:
    """For each leaf, functions that return norms and whether they are exact enough, or None.

    Both are of one example, with one axis for each scan whose steps make a part of the gradient.
    A leaf that falls into parts has a function for each of them.
    """
    rows = zip(_paths.of_leaves(program.gradient), program.gradients, strict=True)
    return [_readings(name, program.scope, variable) for name, variable in rows]


def _readings(name: str, scope: Scope, variable: Any) -> list[Reading]:
    scope, atom = _parts(scope, variable)
    leaf = _compat.shape_dtype_struct(shape_of(atom), atom.aval.dtype)
    found = plan(name, leaf, scope, atom)
    path = _path_of_step(scope)

    def inside(ref: Ref) -> Ref:
        return Ref(ref.path[len(path) :], ref.variable) if is_variable(ref.variable) else ref

    def reading(plan: Plan, function: Callable[..., Any]) -> Reading:
        refs = tuple(inside(ref) for ref, _ in plan.refs_of_terms)
        return Reading(path, refs, functools.partial(function, numbered(plan)))

    if not found.parts:
        return [reading(found, _norm_of_one)]
    rest = [reading(found, _norm_of_rest)] if found.terms else []
    return [*(reading(part, _norm_of_one) for _, part in found.parts), *rest]


_for_alike_plans = functools.partial(jax.jit, static_argnums=0)


def _of_one(found: Plan, values: Sequence[Any]) -> dict[Ref, Array]:
    rows = zip(found.refs_of_terms, values, strict=True)
    return {ref: value[None] if depends else value for (ref, depends), value in rows}


@_for_alike_plans
def _norm_of_one(found: Plan, *values: Any) -> tuple[Array, Array | None]:
    norms, is_exact = norms_of(leaf_gradients(found, _of_one(found, values), 1))
    return norms[0], None if is_exact is None else is_exact[0]


@_for_alike_plans
def _norm_of_rest(found: Plan, *values: Any) -> tuple[Array, None]:
    """The norm of what all examples share, outside the parts."""
    constant = as_made(found, _of_one(found, values), depends=False)
    assert constant is not None
    boxes = [box for box, _ in found.parts]
    return row_norms(beside_parts(boxes, constant)[None])[0], None


# They move all entries to other places or change their signs, which keeps the norm.
_KEEPING = {"transpose", "reshape", "squeeze", "rev", "neg"}


def _parts(scope: Scope, variable: Any) -> Origin:
    """A variable whose parts, one for each step of the scans around it, have the same norm."""
    place = scope.origin(variable)
    while not scope.is_mutable:
        scope, atom = place
        equation, position = scope.maker(atom)
        if equation is None:
            break
        body = _programs.body_of(equation)
        if body is not None:
            if position < _programs.scan_layout(equation, body).carries:
                break
            inside = scope.inside(equation, body)
            place = inside.origin(body.program.outvars[position])
        elif _keeps_norm(equation):
            place = scope.origin(equation.invars[0])
        else:
            break
    return place


def _keeps_norm(equation: _programs.Equation) -> bool:
    name = equation.primitive.name
    if name == "convert_element_type":
        # A norm is taken before rounding.
        before: Any = equation.invars[0].aval
        dtypes = before.dtype, equation.params["new_dtype"]
        return all(jnp.issubdtype(dtype, np.floating) for dtype in dtypes)
    if name == "broadcast_in_dim":
        shapes = shape_of(equation.invars[0]), shape_of(equation.outvars[0])
        return math.prod(shapes[0]) == math.prod(shapes[1])
    return name in _KEEPING


def _path_of_step(scope: Scope) -> tuple[_programs.Equation, ...]:
    """The path to the innermost step around a scope, or to the whole program."""
    while not scope.is_step and scope.outer is not None:
        scope = scope.outer
    return scope.path
