"""Which variables of a program depend on the example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clipax.per_example._programs import Body, Equation, Program, body_of, is_variable, scan_layout


def depending(program: Program, depends: Sequence[bool]) -> set[Any]:
    """The variables that depend on inputs that do."""
    found = {variable for variable, flag in zip(program.invars, depends, strict=True) if flag}
    for equation in program.eqns:
        flags = [is_variable(operand) and operand in found for operand in equation.invars]
        if not any(flags):
            continue
        body = body_of(equation)
        if body is None:
            found.update(equation.outvars)
            continue
        inside = depending(body.program, inputs_of_body(equation, body, flags))
        pairs = zip(equation.outvars, body.program.outvars, strict=True)
        found.update(outer for outer, inner in pairs if is_variable(inner) and inner in inside)
    return found


def inputs_of_body(equation: Equation, body: Body, flags: Sequence[bool]) -> list[bool]:
    """Which inputs of the body of an equation depend on the example, from its operands."""
    flags = list(flags)
    if not body.is_scan:
        return flags
    layout = scan_layout(equation, body)
    carries = body.program.outvars[: layout.carries]
    while True:
        # What one step makes of an example reaches the later steps.
        inside = depending(body.program, flags)
        carried = [is_variable(variable) and variable in inside for variable in carries]
        before = flags[layout.consts : layout.first_scanned]
        after = [one or other for one, other in zip(before, carried, strict=True)]
        if after == before:
            return flags
        flags[layout.consts : layout.first_scanned] = after
