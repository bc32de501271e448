"""Keeps the old state of a step that is not taken, by a choice at the equation that makes the new.

`where(is_taken, new, old)` around a finished step makes XLA hold the old and the new state at
once, because the updates are computed from the new state and the choice needs both: a temporary
tree for each moment. So this module traces the step, evaluates its program, and replaces each new
leaf by the chosen one as soon as it is made. Everything that follows is computed from the chosen
leaf, and XLA writes it in place of the old one.

    trace           the step -> its program, which has a variable for each new leaf
    up to a maker   the equations up to the next one that makes a new leaf, as one program
    choose          its new leaf -> where(is_taken, new, old), for all that follows
    at the end      leaves that could not be chosen in this way are chosen as a whole

In a step that is taken, this changes no value. In a step that is not, the updates are computed
from old leaves and must not be used. As under `jit` and `scan`, values that `update` stores
elsewhere must not be used either.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from clipax._core import _choice, _compat, _leaves
from clipax._core._compat import core
from clipax._core._typing import Array, Updates


def update_if(
    is_taken: Array,
    update: Callable[..., tuple[Updates, Any]],
    updates: Updates,
    state: Any,
    /,
    *args: Any,
    **extra_args: Any,
) -> tuple[Updates, Any]:
    """Calls `update(updates, state, ...)` and keeps the old state, bit for bit, unless taken.

    The updates of a step that is not taken are unspecified.
    """
    # Eager calls compute every value in turn, so an early choice would save nothing.
    if isinstance(is_taken, jax.core.Tracer):
        step = _traced(update, updates, state, *args, **extra_args)
        if step is not None:
            return _evaluated(step, is_taken)
    new_updates, new_state = update(updates, state, *args, **extra_args)
    return new_updates, _choice.choose(is_taken, new_state, state)


def learned_if(is_taken: Array, learn: Callable[[Any], Any], memory: Any) -> tuple[Any, Any]:
    """Returns `learn(memory)`, and the new memory, which is the old one unless the step is taken.

    It serves updates that depend on what was learned in every step, taken or not.
    """
    kept = _choice.choose(is_taken, learn(memory), memory)
    # The barrier writes each leaf before it is read, so that nothing later reads the old one too.
    # One barrier for all leaves would make each vary over the mapped axes of the others.
    kept = jax.tree.map(_compat.optimization_barrier, kept)
    # Where the old one was kept, the same is learned from it once more.
    return _choice.choose(is_taken, kept, learn(kept)), kept


class _Step(NamedTuple):
    """The program of a step, with the way from its outputs to the results of the step."""

    program: core.ClosedJaxpr
    args: list[Any]
    leaves: list[Any]
    """The leaves of the updates and the new state, with `_TRACED` for each output."""
    structures: tuple[Any, Any]
    olds: list[Any]
    """The old value for each leaf; None for the leaves of the updates."""


_TRACED = object()


def _traced(update: Callable[..., Any], /, *args: Any, **extra_args: Any) -> _Step | None:
    """Traces a step; None if the step must run as it is written."""
    given, structure = jax.tree.flatten((args, extra_args))
    # Values that are not tracers, such as numbers that an `if` needs, stay as they are.
    places = [place for place, leaf in enumerate(given) if isinstance(leaf, jax.core.Tracer)]
    found: list[Any] = []

    def run(*tracers: Any) -> list[Any]:
        leaves = list(given)
        for place, tracer in zip(places, tracers, strict=True):
            leaves[place] = tracer
        inner_args, inner_extra_args = jax.tree.unflatten(structure, leaves)
        pair = [jax.tree.flatten(each) for each in update(*inner_args, **inner_extra_args)]
        (updates, updates_structure), (state, state_structure) = pair
        olds = _leaves.up_to(state_structure, args[1])
        is_traced = [isinstance(leaf, jax.core.Tracer) for leaf in (*updates, *state)]
        rows = list(zip((*updates, *state), is_traced, strict=True))
        found[:] = (
            [_TRACED if is_result else leaf for leaf, is_result in rows],
            (updates_structure, state_structure),
            [None] * len(updates) + olds,
        )
        return [leaf for leaf, is_result in rows if is_result]

    dynamic = [given[place] for place in places]
    try:
        program = jax.make_jaxpr(run)(*dynamic)
    except Exception:
        # The step needs the value of a tracer, or has a fault. Calling it raises the error.
        return None
    # Other effects are those of callbacks and mutable arrays, whose order must be kept.
    if any(type(effect).__name__ != "NamedAxisEffect" for effect in program.effects):
        return None
    return _Step(program, dynamic, *found)


def _evaluated(step: _Step, is_taken: Array) -> tuple[Updates, Any]:
    """The updates and the state, chosen leaf by leaf where possible, and else as a whole."""
    leaves, olds = list(step.leaves), list(step.olds)
    places = [place for place, leaf in enumerate(leaves) if leaf is _TRACED]
    made = zip(step.program.out_avals, (olds[place] for place in places), strict=True)
    wanted = [old if _is_chosen_at_once(old, aval, is_taken) else None for aval, old in made]
    results, choices = _evaluate(step.program, step.args, wanted, is_taken)
    for place, result, choice in zip(places, results, choices, strict=True):
        leaves[place] = result
        if choice is not None:
            # A choice between two equal leaves leaves them as they are.
            leaves[place] = olds[place] = choice
    updates, new_state = step.structures
    count = updates.num_leaves
    return jax.tree.unflatten(updates, leaves[:count]), _choice.choose(
        is_taken,
        jax.tree.unflatten(new_state, leaves[count:]),
        jax.tree.unflatten(new_state, olds[count:]),
    )


def _is_chosen_at_once(old: Any, new: Any, is_taken: Array) -> bool:
    """Whether a choice between the old and a new leaf has the type of the new one."""
    # A scalar costs nothing, and a later division by a counter that stays at zero would fail.
    if not _leaves.is_measured(old) or not jnp.ndim(old):
        return False
    kind = jax.typeof(old)
    varying = _compat.varying_axes_of(new)
    return (
        (kind.shape, kind.dtype, kind.sharding) == (new.shape, new.dtype, new.sharding)
        and _compat.varying_axes_of(kind) == varying
        and _compat.varying_axes(is_taken) <= varying
    )


def _evaluate(
    program: core.ClosedJaxpr, args: Sequence[Any], olds: Sequence[Any], is_taken: Array
) -> tuple[list[Any], list[Any]]:
    """The outputs of a program, and the choice for each one that is chosen at once, or None.

    `olds` has the old value of each output that may be chosen at once, and None for others.
    """
    jaxpr = program.jaxpr
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, program.consts, strict=True))
    values |= zip(jaxpr.invars, args, strict=True)
    old_of: dict[Any, Any] = {}
    for variable, old in zip(jaxpr.outvars, olds, strict=True):
        # An input that is passed through may be an old value that another leaf still needs.
        if old is not None and isinstance(variable, core.Var) and variable not in values:
            old_of.setdefault(variable, old)
    kept: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return values[atom] if isinstance(atom, core.Var) else atom.val

    for part in _parts(jaxpr, old_of):
        if part.body is None:
            run = core.jaxpr_as_fun(core.ClosedJaxpr(part.program, []))
            values |= zip(part.program.outvars, run(*map(read, part.program.invars)), strict=True)
        else:
            (call,) = part.program.eqns
            inside = [old_of.get(variable) for variable in call.outvars]
            results, choices = _evaluate(part.body, [*map(read, call.invars)], inside, is_taken)
            values |= zip(call.outvars, results, strict=True)
            pairs = zip(call.outvars, choices, strict=True)
            kept |= {variable: choice for variable, choice in pairs if choice is not None}
        for variable in part.program.outvars:
            if variable in old_of and variable not in kept:
                new, old = values[variable], old_of[variable]
                kept[variable] = jnp.where(is_taken, new, old)
                # Later values of a skipped step are dropped. Their derivative must be zero, and
                # not zero times the infinite derivative of the root of an old moment of zero.
                values[variable] = jnp.where(is_taken, new, jax.lax.stop_gradient(old))
    rows = zip(jaxpr.outvars, olds, strict=True)
    choices = [
        kept.get(variable)
        if isinstance(variable, core.Var) and old is not None and old_of.get(variable) is old
        else None
        for variable, old in rows
    ]
    return [*map(read, jaxpr.outvars)], choices


class _Part(NamedTuple):
    """Some equations of a program, as a program of its own."""

    program: core.Jaxpr
    body: core.ClosedJaxpr | None
    """The program that its only equation calls, if that one must be split too."""


def _parts(program: core.Jaxpr, made: Container[Any]) -> list[_Part]:
    """The equations in order, cut after each one that makes one of the variables."""
    runs: list[tuple[list[core.JaxprEqn], core.ClosedJaxpr | None]] = [([], None)]
    for equation in program.eqns:
        is_maker = any(variable in made for variable in equation.outvars)
        body = _body_of(equation) if is_maker else None
        if body is not None:
            runs += [([equation], body), ([], None)]
            continue
        runs[-1][0].append(equation)
        if is_maker:
            runs.append(([], None))
    needed = {variable for variable in program.outvars if isinstance(variable, core.Var)}
    replace: Callable[..., core.Jaxpr] = program.replace
    parts = []
    for equations, body in reversed(runs):
        inputs: dict[Any, None] = {}
        outputs: list[Any] = []
        own: set[Any] = set()
        for equation in equations:
            inputs |= {
                atom: None
                for atom in equation.invars
                if isinstance(atom, core.Var) and atom not in own
            }
            own.update(equation.outvars)
            outputs += [variable for variable in equation.outvars if variable in needed]
        if not outputs:
            continue
        needed.update(inputs)
        effects = frozenset().union(*(equation.effects for equation in equations))
        part = replace(
            constvars=[], invars=[*inputs], outvars=outputs, eqns=equations, effects=effects
        )
        parts.append(_Part(part, body))
    return parts[::-1]


def _body_of(equation: core.JaxprEqn) -> core.ClosedJaxpr | None:
    """The program that an equation calls, if inlining it loses nothing but the call."""
    if equation.primitive.name not in _compat.CALLS or len(equation.outvars) == 1:
        return None
    params = equation.params
    placed = jax.tree.leaves((params.get("in_shardings"), params.get("out_shardings")))
    if any(isinstance(each, Sharding) for each in placed) or params.get("compiler_options_kvs"):
        return None
    body = params.get("jaxpr") or params["call_jaxpr"]
    return body if isinstance(body, core.ClosedJaxpr) else core.ClosedJaxpr(body, [])
