"""Evaluates the variables of a program that are wanted, with as little else as possible."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from clipax._core import _compat
from clipax._core._compat import core
from clipax._core._typing import Array
from clipax.per_example._programs import (
    REMATS,
    Body,
    Program,
    Ref,
    Variable,
    body_of,
    branches_of,
    has_mutable_arrays,
    is_variable,
    scan_layout,
)
from clipax.per_example._schedules import (
    Reading,
    Step,
    Wanted,
    live_carries,
    read_here,
    schedule,
)


def evaluate(closed: core.ClosedJaxpr, args: Sequence[Any], wanted: Sequence[Wanted]) -> list[Any]:
    """The values of variables, or of functions. Those inside a scan are stacked over its steps."""
    if has_mutable_arrays(closed.jaxpr):
        return _evaluate_in_one(closed, args, wanted)
    whole = Body(closed.jaxpr, tuple(closed.consts), False)
    return _evaluate(whole, args, wanted, {})


def _evaluate_in_one(
    closed: core.ClosedJaxpr, args: Sequence[Any], wanted: Sequence[Wanted]
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

    def found(each: Wanted) -> Any:
        if isinstance(each, Reading):
            return each.function(*map(found, each.refs))
        return values[each.variable] if is_variable(each.variable) else each.variable.val

    return list(map(found, wanted))


_Calls: TypeAlias = dict[Any, Callable[..., list[Any]]]
"""How to run the bodies of calls that are known, which a program often calls more than once."""


def _evaluate(
    body: Body, args: Sequence[Any], wanted: Sequence[Wanted], calls: _Calls
) -> list[Any]:
    program = body.program
    values: dict[Any, Any] = dict(zip(program.constvars, body.consts, strict=True))
    values.update(zip(program.invars, args, strict=True))
    readings = _Readings(wanted)

    def read(variable: Any) -> Any:
        return values.get(variable) if is_variable(variable) else variable.val

    def found(each: Wanted) -> Any:
        return values[each] if isinstance(each, Reading) or each.path else read(each.variable)

    def read_after(new: Collection[Any]) -> tuple[list[Reading], list[Any]]:
        ready = readings.ready_after(new)
        return ready, [each.function(*map(found, each.refs)) for each in ready]

    values.update(zip(*read_after(values), strict=True))
    for names, steps in _runs(schedule(program, wanted)[0], wanted, readings.awaited):
        if steps[0].inside:
            operands = [read(variable) for variable in steps[0].equation.invars]
            outputs = _run_inside(steps[0], operands, calls)
        else:
            outputs = _run(program, steps, names, values)
        values.update(zip(names, outputs, strict=True))
        ready, made = read_after(names)
        if ready:
            # What follows waits for them, or the compiler could keep their variables until then.
            made, outputs = _compat.optimization_barrier((made, outputs))
            values.update(zip([*ready, *names], [*made, *outputs], strict=True))
    return list(map(found, wanted))


class _Readings:
    """The functions to run in one body, each of which waits for its variables."""

    def __init__(self, wanted: Sequence[Wanted]):
        of_body = [each for each in wanted if isinstance(each, Reading) and not each.path]
        self._missing = {each: {_name(ref) for ref in each.refs} - {None} for each in of_body}
        self._ready = [each for each, names in self._missing.items() if not names]
        self.awaited = {name for names in self._missing.values() for name in names}
        self._waiting: dict[Any, list[Reading]] = {}
        for each, names in self._missing.items():
            for name in names:
                self._waiting.setdefault(name, []).append(each)

    def ready_after(self, new: Collection[Any]) -> list[Reading]:
        """The functions that have all of their variables now that they have these."""
        ready, self._ready = self._ready, []
        for name in new:
            for each in self._waiting.pop(name, ()):
                self._missing[each].remove(name)
                if not self._missing[each]:
                    ready.append(each)
        return ready


def _name(ref: Ref) -> Any:
    """The key of a value during an evaluation. Literals have none."""
    if ref.path:
        return ref
    return ref.variable if is_variable(ref.variable) else None


def _runs(
    steps: Sequence[Step], wanted: Sequence[Wanted], awaited: Collection[Any]
) -> list[tuple[list[Any], list[Step]]]:
    """Cuts steps into runs that are evaluated at once, with the names of what each has to give.

    A step inside which something is wanted is a run of its own. Others end where they make what a
    function waits for.
    """
    runs: list[list[Step]] = []
    is_open = False
    for step in steps:
        if is_open and not step.inside:
            runs[-1].append(step)
        else:
            runs.append([step])
        is_open = not step.inside and not any(each in awaited for each in step.made)
    read_later = {each.variable for each in read_here(wanted) if isinstance(each, Ref)}
    found = []
    for run in reversed(runs):
        names: list[Any] = [each for step in run for each in step.made if each in read_later]
        if run[0].inside:
            names = [*run[0].made, *run[0].made_inside]
        found.append((names, run))
        read_later.update(operand for step in run for operand in step.operands)
    return found[::-1]


def _run(
    program: Program, steps: Sequence[Step], names: Sequence[Variable], values: Mapping[Any, Any]
) -> list[Any]:
    """Evaluates steps as one program, in which JAX maps bodies that it has seen before once."""
    equations = [step.equation for step in steps]
    operands = filter(is_variable, (each for one in equations for each in one.invars))
    inputs = [each for each in dict.fromkeys(operands) if values.get(each) is not None]
    replace: Callable[..., Program] = program.replace
    effects = frozenset().union(*(one.effects for one in equations))
    alone = replace(
        constvars=[], invars=inputs, outvars=list(names), eqns=equations, effects=effects
    )
    needed, is_used = _compat.without_unused(core.ClosedJaxpr(alone, []))
    used = itertools.compress(inputs, is_used)
    return list(core.jaxpr_as_fun(needed)(*map(values.__getitem__, used)))


def _run_inside(step: Step, operands: list[Any], calls: _Calls) -> list[Any]:
    """Evaluates the bodies of a step, inside which something is wanted."""
    body = body_of(step.equation)
    if body is None:
        return _branch(step, branches_of(step.equation), operands, calls)
    return (_scan if body.is_scan else _call)(step, body, operands, calls)


def _call(step: Step, body: Body, operands: list[Any], calls: _Calls) -> list[Any]:
    if step.equation.primitive.name in REMATS and step.equation.params["prevent_cse"]:
        # Without a barrier, the compiler would store values that are meant to be recomputed.
        present = [index for index, operand in enumerate(operands) if operand is not None]
        kept = _compat.optimization_barrier([operands[index] for index in present])
        for index, value in zip(present, kept, strict=True):
            operands[index] = value
    wanted = tuple(step.wanted_in(body))
    key = id(body.program), tuple(map(id, body.consts)), wanted

    def run(*operands: Any) -> list[Any]:
        return _evaluate(body, operands, wanted, calls)

    return calls.setdefault(key, jax.jit(run))(*operands)


def _branch(
    step: Step, branches: Sequence[Body], operands: Sequence[Any], calls: _Calls
) -> list[Any]:
    """Runs the branch that is chosen. What is wanted of the others is zero."""
    index, *inputs = operands
    count = len(step.positions)
    types: dict[int, list[Any]] = {}

    def of_branch(number: int, *inputs: Any) -> list[Any]:
        body = branches[number]
        inside = [each for each in step.inside if each.path[0] == number]
        further = tuple(each._replace(path=each.path[1:]) for each in inside)
        wanted = step._replace(inside=further).wanted_in(body)
        found = _evaluate(body, inputs, wanted, calls)
        types[number] = [jax.typeof(value) for value in found[count:]]
        return found

    def run(number: int, *inputs: Any) -> list[Any]:
        found = of_branch(number, *inputs)
        of_branches: dict[int, Iterator[Any]] = {
            other: map(_zeros, of_types) for other, of_types in types.items()
        }
        of_branches[number] = iter(found[count:])
        return found[:count] + [next(of_branches[each.path[0]]) for each in step.inside]

    runs = [functools.partial(run, number) for number in range(len(branches))]
    for number in range(len(branches)):
        jax.eval_shape(functools.partial(of_branch, number), *inputs)
    return list(jax.lax.switch(index, runs, *inputs))


def _zeros(of_type: Any) -> Array:
    zeros = jnp.zeros(of_type.shape, of_type.dtype)
    return _compat.varying_over(zeros, _compat.varying_axes_of(of_type))


def _scan(step: Step, body: Body, operands: Sequence[Any], calls: _Calls) -> list[Any]:
    """Scans over the live carries alone. Accumulators that nothing reads are left out."""
    layout = scan_layout(step.equation, body)
    live = live_carries(step, body)
    consts = list(operands[: layout.consts])
    carries = [operands[layout.consts + index] for index in live]
    stacked = [position for position in step.positions if position >= layout.carries]
    wanted = [Ref((), body.program.outvars[index]) for index in [*live, *stacked]]

    def body_of_step(carried: list[Array], scanned: list[Any]) -> tuple[list[Array], list[Array]]:
        all_carries: list[Any] = [None] * layout.carries
        for index, value in zip(live, carried, strict=True):
            all_carries[index] = value
        inputs = [*consts, *all_carries, *scanned]
        results = _evaluate(body, inputs, [*wanted, *step.inside], calls)
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
