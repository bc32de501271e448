"""Evaluates the variables of a program that are wanted, with as little else as possible."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from clipax._core import _compat
from clipax._core._compat import core
from clipax._core._typing import Array
from clipax.per_example._programs import (
    REMATS,
    Body,
    Equation,
    Program,
    Ref,
    Variable,
    body_of,
    has_mutable_arrays,
    is_variable,
    scan_layout,
)


def evaluate(closed: core.ClosedJaxpr, args: Sequence[Any], wanted: Sequence[Ref]) -> list[Any]:
    """The values of some variables. Those inside a scan are stacked over its steps."""
    if has_mutable_arrays(closed.jaxpr):
        return _evaluate_in_one(closed, args, wanted)
    inputs = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    return _evaluate(
        closed.jaxpr, inputs | dict(zip(closed.jaxpr.invars, args, strict=True)), wanted
    )


def _evaluate_in_one(
    closed: core.ClosedJaxpr, args: Sequence[Any], wanted: Sequence[Ref]
) -> list[Any]:
    """Runs the whole program, so that reads and writes keep their order."""
    try:
        outputs = core.jaxpr_as_fun(closed)(*args)
    except FloatingPointError:  # of jax_debug_nans
        raise
    except Exception as error:
        raise ValueError(
            "loss_fn must use mutable arrays in such a way that JAX can map it over examples. JAX"
            f" says: {error} Create the arrays that loss_fn writes to inside loss_fn, with"
            " jax.new_ref, and write to them outside jax.lax.cond and jax.lax.switch."
        ) from error
    pairs = zip(closed.jaxpr.outvars, outputs, strict=True)
    values = {variable: value for variable, value in pairs if is_variable(variable)}
    return [values[variable] if is_variable(variable) else variable.val for _, variable in wanted]


class _Step(NamedTuple):
    """An equation to evaluate."""

    equation: Equation
    positions: tuple[int, ...]
    """The positions of the outputs that are needed."""
    inside: tuple[Ref, ...]
    """The variables of its body that are wanted, with paths that start in the body."""

    def wanted_in(self, body: Body) -> list[Ref]:
        outputs = [Ref((), body.program.outvars[position]) for position in self.positions]
        return [*outputs, *self.inside]


def _schedule(program: Program, wanted: Sequence[Ref]) -> tuple[list[_Step], set[Variable]]:
    """The steps that lead to the wanted variables, in order, with all variables they need."""
    needed: set[Variable] = set()
    inside: dict[int, list[Ref]] = {}
    for path, variable in wanted:
        if path:
            inside.setdefault(id(path[0]), []).append(Ref(path[1:], variable))
        elif is_variable(variable):
            needed.add(variable)
    steps = []
    for equation in reversed(program.eqns):
        positions = tuple(
            index for index, variable in enumerate(equation.outvars) if variable in needed
        )
        within = tuple(inside.get(id(equation), ()))
        if positions or within or equation.effects:
            steps.append(_Step(equation, positions, within))
            needed.update(_operands(steps[-1]))
    return steps[::-1], needed


def _operands(step: _Step) -> list[Variable]:
    """The operands that a step needs."""
    body = body_of(step.equation)
    operands: list[Any] = list(step.equation.invars)
    if body is not None:
        inner = _live_inputs(step, body)
        pairs = zip(operands, body.program.invars, strict=True)
        operands = [outer for outer, variable in pairs if variable in inner]
    return [operand for operand in operands if is_variable(operand)]


def _live_inputs(step: _Step, body: Body) -> set[Variable]:
    live = _live_carries(step, body) if body.is_scan else []
    carried = [Ref((), body.program.outvars[index]) for index in live]
    return _schedule(body.program, [*carried, *step.wanted_in(body)])[1]


def _live_carries(step: _Step, body: Body) -> list[int]:
    """The carries of a scan that its wanted outputs depend on."""
    layout = scan_layout(step.equation, body)
    live = {position for position in step.positions if position < layout.carries}
    while True:
        carried = [Ref((), body.program.outvars[position]) for position in sorted(live)]
        _, needed = _schedule(body.program, [*step.wanted_in(body), *carried])
        carries = body.program.invars[layout.consts : layout.first_scanned]
        found = live | {index for index, variable in enumerate(carries) if variable in needed}
        if found == live:
            return sorted(live)
        live = found


def _evaluate(
    program: Program, inputs: Mapping[Variable, Any], wanted: Sequence[Ref]
) -> list[Any]:
    values: dict[Any, Any] = dict(inputs)

    def read(variable: Any) -> Any:
        return values.get(variable) if is_variable(variable) else variable.val

    for step in _schedule(program, wanted)[0]:
        body = body_of(step.equation)
        operands = [read(variable) for variable in step.equation.invars]
        if body is None:
            results = _bind(program, step.equation, operands)
            outputs = [results[position] for position in step.positions]
        elif body.is_scan:
            outputs = _scan(step, body, operands)
        else:
            outputs = _call(step, body, operands)
        names: list[Any] = [step.equation.outvars[position] for position in step.positions]
        names += [Ref((step.equation, *path), variable) for path, variable in step.inside]
        values.update(zip(names, outputs, strict=True))
    return [values[ref] if ref.path else read(ref.variable) for ref in wanted]


def _bind(program: Program, equation: Equation, operands: Sequence[Any]) -> list[Any]:
    # As a program of one equation, because JAX's versions differ in how they bind a primitive.
    given = {
        variable: value
        for variable, value in zip(equation.invars, operands, strict=True)
        if is_variable(variable)
    }
    replace: Callable[..., Program] = program.replace
    alone = replace(
        constvars=[],
        invars=list(given),
        outvars=list(equation.outvars),
        eqns=[equation],
        effects=equation.effects,
    )
    return list(core.jaxpr_as_fun(core.ClosedJaxpr(alone, []))(*given.values()))


def _body_inputs(body: Body, operands: Sequence[Any]) -> dict[Variable, Any]:
    consts = dict(zip(body.program.constvars, body.consts, strict=True))
    return consts | dict(zip(body.program.invars, operands, strict=True))


def _call(step: _Step, body: Body, operands: list[Any]) -> list[Any]:
    if step.equation.primitive.name in REMATS and step.equation.params["prevent_cse"]:
        # Without a barrier, the compiler would store values that are meant to be recomputed.
        present = [index for index, operand in enumerate(operands) if operand is not None]
        kept = _compat.optimization_barrier([operands[index] for index in present])
        for index, value in zip(present, kept, strict=True):
            operands[index] = value
    return _evaluate(body.program, _body_inputs(body, operands), step.wanted_in(body))


def _scan(step: _Step, body: Body, operands: Sequence[Any]) -> list[Any]:
    """Scans over the live carries alone. Accumulators that nothing reads are left out."""
    layout = scan_layout(step.equation, body)
    live = _live_carries(step, body)
    consts = list(operands[: layout.consts])
    carries = [operands[layout.consts + index] for index in live]
    stacked = [position for position in step.positions if position >= layout.carries]
    wanted = [Ref((), body.program.outvars[index]) for index in [*live, *stacked]]

    def body_of_step(carried: list[Array], scanned: list[Any]) -> tuple[list[Array], list[Array]]:
        all_carries: list[Any] = [None] * layout.carries
        for index, value in zip(live, carried, strict=True):
            all_carries[index] = value
        inputs = _body_inputs(body, [*consts, *all_carries, *scanned])
        results = _evaluate(body.program, inputs, [*wanted, *step.inside])
        return results[: len(live)], results[len(live) :]

    params = step.equation.params
    last, stacks = jax.lax.scan(
        body_of_step,
        carries,
        list(operands[layout.first_scanned :]),
        params["length"],
        params["reverse"],
        params["unroll"],
    )
    by_position = dict(zip(live, last, strict=True)) | dict(zip(stacked, stacks, strict=False))
    outputs = [by_position[position] for position in step.positions]
    return [*outputs, *stacks[len(stacked) :]]
