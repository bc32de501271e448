"""The equations to evaluate for what is wanted of a program, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from clipax.per_example._programs import (
    Body,
    Equation,
    Program,
    Ref,
    Variable,
    body_of,
    is_variable,
    scan_layout,
)


class Reading(NamedTuple):
    """A function of some variables that is wanted in place of their values."""

    path: tuple[Any, ...]
    """The path to the body that runs the function as soon as it has the variables."""
    refs: tuple[Ref, ...]
    """The variables, with paths that start in that body."""
    function: Callable[..., Any]


Wanted: TypeAlias = Ref | Reading


class Step(NamedTuple):
    """An equation to evaluate."""

    equation: Equation
    positions: tuple[int, ...]
    """The positions of the outputs that are needed."""
    inside: tuple[Wanted, ...]
    """What is wanted of its body, with paths that start in the body."""
    operands: tuple[Variable, ...] = ()
    """The operands that are needed."""

    @property
    def made(self) -> list[Variable]:
        """The outputs that are needed."""
        return [self.equation.outvars[position] for position in self.positions]

    @property
    def made_inside(self) -> list[Wanted]:
        """What is wanted of its body, by paths that start where the equation is."""
        return [each._replace(path=(self.equation, *each.path)) for each in self.inside]

    def wanted_in(self, body: Body) -> list[Wanted]:
        outputs = [Ref((), body.program.outvars[position]) for position in self.positions]
        return [*outputs, *self.inside]


def schedule(program: Program, wanted: Sequence[Wanted]) -> tuple[list[Step], set[Variable]]:
    """The steps that lead to what is wanted, in order, with all variables they need."""
    needed: set[Variable] = set()
    inside: dict[int, dict[Wanted, None]] = {}
    for each in read_here(wanted):
        if each.path:
            further = each._replace(path=each.path[1:])
            inside.setdefault(id(each.path[0]), {})[further] = None
        elif isinstance(each, Ref) and is_variable(each.variable):
            needed.add(each.variable)
    steps = []
    for equation in reversed(program.eqns):
        positions = tuple(
            index for index, variable in enumerate(equation.outvars) if variable in needed
        )
        within = tuple(inside.get(id(equation), ()))
        if positions or within or equation.effects:
            step = Step(equation, positions, within)
            steps.append(step._replace(operands=_operands(step)))
            needed.update(steps[-1].operands)
    return steps[::-1], needed


def read_here(wanted: Sequence[Wanted]) -> list[Wanted]:
    """What is wanted, with the variables of functions that run in this body in their place."""
    found: list[Wanted] = []
    for each in wanted:
        found += each.refs if isinstance(each, Reading) and not each.path else [each]
    return found


def _operands(step: Step) -> tuple[Variable, ...]:
    body = body_of(step.equation)
    operands: list[Any] = list(step.equation.invars)
    if body is not None and not step.equation.effects:
        inner = _live_inputs(step, body)
        pairs = zip(operands, body.program.invars, strict=True)
        operands = [outer for outer, variable in pairs if variable in inner]
    return tuple(operand for operand in operands if is_variable(operand))


def _live_inputs(step: Step, body: Body) -> set[Variable]:
    live = live_carries(step, body) if body.is_scan else []
    carried = [Ref((), body.program.outvars[index]) for index in live]
    return schedule(body.program, [*carried, *step.wanted_in(body)])[1]


def live_carries(step: Step, body: Body) -> list[int]:
    """The carries of a scan that its wanted outputs depend on."""
    layout = scan_layout(step.equation, body)
    live = {position for position in step.positions if position < layout.carries}
    while True:
        carried = [Ref((), body.program.outvars[position]) for position in sorted(live)]
        _, needed = schedule(body.program, [*step.wanted_in(body), *carried])
        carries = body.program.invars[layout.consts : layout.first_scanned]
        found = live | {index for index, variable in enumerate(carries) if variable in needed}
        if found == live:
            return sorted(live)
        live = found
