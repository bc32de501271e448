"""Reads the program of a function, and evaluates of it what is wanted and no more.

All that clipax knows of the inside of JAX's programs stands here: equations, their bodies, and
how a `scan` lays out its operands.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from clipax._core import _compat
from clipax._core._typing import Array

Program = core.Jaxpr
Equation = core.JaxprEqn
Variable = core.Var
Literal = core.Literal
# Equations that only wrap a program. What is traced under `jit` had another name before jax 0.7.
_CALLS = {"jit", "pjit", "closed_call", "core_call"}
_REMATS = {"checkpoint", "remat", "remat2"}
# Equations that return their operands. They change the mesh axes over which a type varies, the
# place of an array, or what a compiler may join.
_PASSING = {
    "copy",
    "copy_p",
    "layout_constraint",
    "optimization_barrier",
    "pvary",
    "reduced_vary_cast",
    "reduced_vary_cast_p",  # its name before jax 0.12
    "reshard",
    "sharding_constraint",
}


class Ref(NamedTuple):
    """A variable of a program, or of the body of an equation of it."""

    path: tuple[Equation, ...]
    """The equations in whose bodies it stands, from the outermost."""
    variable: Any


class Constant:
    """A number that stands in a program, as one of its literals does, but can be looked up."""

    def __init__(self, literal: Literal):
        self.val, self.aval = literal.val, literal.aval


def is_variable(atom: Any) -> bool:
    return isinstance(atom, Variable)


def shape_of(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def constant(atom: Any) -> Constant:
    return atom if isinstance(atom, Constant) else Constant(atom)


def ref(path: tuple[Equation, ...], atom: Any) -> Ref:
    """Of a variable, or of a literal, which is the same everywhere."""
    return Ref(path, atom) if is_variable(atom) else Ref((), constant(atom))


def passes_on(equation: Equation) -> bool:
    """Whether an equation returns its operands with no change but to their types."""
    if equation.primitive.name == "convert_element_type":
        # A weak type matters for promotion alone, and a program holds no promotions.
        before: Any = equation.invars[0].aval
        return bool(before.dtype == equation.params["new_dtype"])
    return equation.primitive.name in _PASSING


def has_mutable_arrays(program: Program) -> bool:
    """Whether a program, or a body that it calls, has a mutable array."""
    pending = [program]
    while pending:
        current = pending.pop()
        made = [variable for equation in current.eqns for variable in equation.outvars]
        if any(map(_is_mutable, (*current.constvars, *current.invars, *made))):
            return True
        bodies = map(body_of, current.eqns)
        pending += [body.program for body in bodies if body is not None]
    return False


def _is_mutable(variable: Any) -> bool:
    # This attribute marks the type of a mutable array, which has no public name in all of the
    # supported versions of JAX.
    return hasattr(variable.aval, "inner_aval")


class Body(NamedTuple):
    """What an equation with a program inside does."""

    program: Program
    consts: tuple[Any, ...]
    is_scan: bool


class ScanLayout(NamedTuple):
    """How many of a scan's operands are seen whole by every step, and how many are carried."""

    consts: int
    carries: int


def of_example(
    function: Callable[..., Any], args: Sequence[Any], in_axes: Sequence[int | None]
) -> tuple[core.ClosedJaxpr, Any]:
    """The program for one example, of the types that `vmap` gives it, and its outputs' shapes."""
    programs: list[Any] = []

    def trace(*example: Any) -> tuple[()]:
        programs.append(jax.make_jaxpr(function, return_shape=True)(*example))
        return ()

    # Inside a `vmap`, so that mesh axes and weak types are as they will be in it.
    jax.eval_shape(jax.vmap(trace, tuple(in_axes)), *args)
    return programs[0]


def body_of(equation: Equation) -> Body | None:
    """The program inside an equation, where it is a call or a scan."""
    name = equation.primitive.name
    if name not in _CALLS | _REMATS | {"scan"}:
        return None
    inside = equation.params.get("jaxpr") or equation.params["call_jaxpr"]
    if isinstance(inside, core.ClosedJaxpr):
        return Body(inside.jaxpr, tuple(inside.consts), name == "scan")
    return Body(inside, (), name == "scan")


def scan_layout(equation: Equation, body: Body) -> ScanLayout:
    """Read off the ranks: what is scanned over has one axis less inside."""

    def unscanned(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        pairs = zip(outer, inner, strict=True)
        return sum(len(shape_of(one)) == len(shape_of(other)) for one, other in pairs)

    carries = unscanned(equation.outvars, body.program.outvars)
    return ScanLayout(unscanned(equation.invars, body.program.invars) - carries, carries)


def evaluate(closed: core.ClosedJaxpr, args: Sequence[Any], wanted: Sequence[Ref]) -> list[Any]:
    """The values of some variables of a program. In a scan, those of all steps are stacked."""
    if has_mutable_arrays(closed.jaxpr):
        return _evaluate_in_one(closed, args, wanted)
    inputs = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    return _evaluate(
        closed.jaxpr, inputs | dict(zip(closed.jaxpr.invars, args, strict=True)), wanted
    )


def _evaluate_in_one(
    closed: core.ClosedJaxpr, args: Sequence[Any], wanted: Sequence[Ref]
) -> list[Any]:
    """Evaluates outputs by the whole program, so that reads and writes keep their order."""
    try:
        outputs = core.jaxpr_as_fun(closed)(*args)
    except FloatingPointError:  # of jax_debug_nans
        raise
    except Exception as error:
        raise ValueError(
            "loss_fn must use mutable arrays so that JAX can map it over examples, which fails:"
            f" {error} Make an array that loss_fn writes to inside of loss_fn, by jax.new_ref, and"
            " write to it outside of jax.lax.cond and jax.lax.switch."
        ) from error
    pairs = zip(closed.jaxpr.outvars, outputs, strict=True)
    values = {variable: value for variable, value in pairs if is_variable(variable)}
    return [values[variable] if is_variable(variable) else variable.val for _, variable in wanted]


class _Step(NamedTuple):
    """An equation that is needed, and what of it."""

    equation: Equation
    positions: tuple[int, ...]
    """Of its outputs."""
    inside: tuple[Ref, ...]
    """In its body, as seen from there."""

    def wanted_in(self, body: Body) -> list[Ref]:
        outputs = [Ref((), body.program.outvars[position]) for position in self.positions]
        return [*outputs, *self.inside]


def _schedule(program: Program, wanted: Sequence[Ref]) -> tuple[list[_Step], set[Variable]]:
    """What has to be evaluated, in order, and the variables that it needs."""
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
    """The carries that what is wanted of a scan depends on."""
    layout = scan_layout(step.equation, body)
    live = {position for position in step.positions if position < layout.carries}
    while True:
        carried = [Ref((), body.program.outvars[position]) for position in sorted(live)]
        _, needed = _schedule(body.program, [*step.wanted_in(body), *carried])
        carries = body.program.invars[layout.consts : layout.consts + layout.carries]
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
    # As a program of one equation: how a primitive is bound differs from version to version.
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
    if step.equation.primitive.name in _REMATS and step.equation.params["prevent_cse"]:
        # Else the compiler would keep what is meant to be computed again.
        present = [index for index, operand in enumerate(operands) if operand is not None]
        kept = _compat.optimization_barrier([operands[index] for index in present])
        for index, value in zip(present, kept, strict=True):
            operands[index] = value
    return _evaluate(body.program, _body_inputs(body, operands), step.wanted_in(body))


def _scan(step: _Step, body: Body, operands: Sequence[Any]) -> list[Any]:
    """A scan of what is live: accumulators that nobody asks for are left out."""
    layout = scan_layout(step.equation, body)
    live = _live_carries(step, body)
    first_scanned = layout.consts + layout.carries
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
        list(operands[first_scanned:]),
        params["length"],
        params["reverse"],
        params["unroll"],
    )
    by_position = dict(zip(live, last, strict=True)) | dict(zip(stacked, stacks, strict=False))
    outputs = [by_position[position] for position in step.positions]
    return [*outputs, *stacks[len(stacked) :]]
