"""What a loss function shares with other devices, where it runs in a mapped program.

In `shard_map`, `pmap` and `vmap` with a name, each device has a program of its own. There, the
gradient of one example is whole, or lies in shards, or is mixed with those of other examples.
What crosses a mapped axis, of the loss and its gradients, tells, together with types:

| over a mapped axis | the gradient of an example |
|---|---|
| nothing crosses | is whole on each device |
| there is one loss: neither it nor the examples vary | lies in the shards of what varies |
| the loss varies, the examples do not | is of the sum of all losses: refused |
| the examples vary | is mixed with those of others: refused |
| no types say what varies | cannot be known: refused |
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from jax.extend import core

from clipax._core import _compat
from clipax.per_example import _programs
from clipax.per_example._programs import Equation, Program, is_variable

# They name a mapped axis, and nothing crosses it. Those with `cast` only change a type.
_QUIET = {"axis_index", "pvary", "preduced"}
_OUTSIDE = (
    "call this outside of the mapped program, under jax.jit with sharded arrays, where each"
    " gradient is whole"
)


def sharding_axes(
    program: Program, matters: Sequence[bool], batched: Sequence[bool], gradients: int
) -> list[tuple[Hashable, ...]]:
    """The mapped axes over which each leaf's gradient of one example lies in parts.

    The program's outputs are the loss, what is returned besides, and the gradients; of its
    inputs, parameters and examples matter, and some are batched.
    """
    axes = _compat.bound_axes()
    loss, leaves = program.outvars[0], program.outvars[len(program.outvars) - gradients :]
    if not axes:
        return [()] * gradients
    crossing = _crossing(program, matters, set(filter(is_variable, [loss, *leaves])))
    examples = {
        axis
        for variable, flag in zip(program.invars, batched, strict=True)
        if flag
        for axis in _compat.varying_axes_of(variable.aval)
    }
    of_loss = _compat.varying_axes_of(loss.aval)
    for axis in axes:
        if axis in crossing:
            _refuse(axis, crossing[axis], axis in examples, axis in of_loss)
    one_loss = [axis for axis in axes if _compat.is_typed(axis) and axis not in examples | of_loss]
    return [
        tuple(axis for axis in one_loss if axis in _compat.varying_axes_of(leaf.aval))
        for leaf in leaves
    ]


def _refuse(axis: Hashable, by: str, examples_vary: bool, loss_varies: bool) -> None:
    crosses = f"loss_fn or its gradient communicates over the mapped axis {axis!r} (by {by})"
    if not _compat.is_typed(axis):
        raise ValueError(
            f"{crosses}, and no types say what is sharded there, so that the gradient of one"
            " example cannot be known. Communicate before and after this call, and not in"
            f" loss_fn; or use jax.shard_map with check_vma=True; or {_OUTSIDE}."
        )
    if examples_vary:
        raise ValueError(
            f"{crosses}, over which the examples vary: the gradient of one example would be"
            " mixed with those on other devices. Communicate before and after this call, and not"
            " in loss_fn (gather sharded parameters, give what was gathered, and reduce the"
            " gradients of mean=False; or, where each example is sharded, let examples enter"
            f" whole, and slice them in loss_fn by jax.lax.axis_index); or {_OUTSIDE}."
        )
    if loss_varies:
        raise ValueError(
            f"{crosses}, over which the examples do not vary, but the loss does: what JAX"
            " differentiates is the sum of the losses of all devices. Let loss_fn return the"
            f" same loss on all of them: jax.lax.psum(loss, {axis!r}) if each has a part of it,"
            f" jax.lax.pmean(loss, {axis!r}) if each has all of it; or {_OUTSIDE}."
        )


def _crossing(
    program: Program, depends: Sequence[bool], wanted: set[Any]
) -> Mapping[Hashable, str]:
    """The mapped axes over which devices communicate, and by what, on the way to what is wanted.

    What depends neither on parameters nor on examples is a constant, wherever it comes from.
    """
    found: dict[Hashable, str] = {}
    rows = zip(program.invars, depends, strict=True)
    depending = {variable for variable, flag in rows if flag}
    for equation in program.eqns:
        if any(is_variable(each) and each in depending for each in equation.invars):
            depending.update(equation.outvars)
    needed = set(wanted)
    for equation in reversed(program.eqns):
        if needed.isdisjoint(equation.outvars):
            continue
        needed.update(filter(is_variable, equation.invars))
        flags = [is_variable(each) and each in depending for each in equation.invars]
        if not any(flags):
            continue
        for axis in _named_by(equation):
            found.setdefault(axis, equation.primitive.name)
        body = _programs.body_of(equation)
        if body is not None and not body.is_scan:
            pairs = zip(equation.outvars, body.program.outvars, strict=True)
            inner = {each for outer, each in pairs if outer in needed and is_variable(each)}
            found = {**_crossing(body.program, flags, inner), **found}
            continue
        for inside in _bodies(equation):
            everything = set(filter(is_variable, inside.outvars))
            found = {**_crossing(inside, [True] * len(inside.invars), everything), **found}
    return found


def _bodies(equation: Equation) -> Iterator[Program]:
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each


def _named_by(equation: Equation) -> set[Hashable]:
    """The mapped axes over which an equation itself communicates."""
    name = equation.primitive.name
    if name in _QUIET or "cast" in name.split("_") or any(True for _ in _bodies(equation)):
        return set()
    # Not all that communicate have the effect, and not all have the parameter.
    named = {effect.name for effect in equation.effects if hasattr(effect, "name")}
    for key in ("axis_name", "axes"):
        value = equation.params.get(key, ())
        each = value if isinstance(value, tuple | list) else (value,)
        # Integers are axes of an array.
        named.update(axis for axis in each if not isinstance(axis, int))
    return named & set(_compat.bound_axes())
