"""The mapped axes over which the gradient of one example lies in shards.

In `shard_map`, `pmap` and `vmap` with a name, each device runs a program of its own. Types say
over which mapped axes a value varies, where the mapping keeps types (`shard_map` does, unless
`check_vma=False`). Sharded arrays under plain `jit` need none of this: gradients are whole there.

| over a mapped axis | what is done | why |
|---|---|---|
| nothing crosses; examples or loss vary | clipped on each device | its gradients are whole |
| examples vary, a parameter does not | refused | JAX sums its gradient over all examples |
| only a leaf varies, not examples or loss | norms combined | it is a shard of one gradient |
| the same, but mask or bound vary | refused | shards of one gradient need one weight |
| the loss crosses; examples vary | refused | gradients of several examples mix |
| the loss crosses and varies, examples do not | refused | JAX sums the losses of all devices |
| the loss crosses; no types | refused | nothing says which of these cases it is |

*The loss crosses* an axis if something on the way from parameters or examples to the loss or its
gradient communicates over it, as `jax.lax.psum` does.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax

from clipax._core import _compat, _paths
from clipax.per_example import _programs
from clipax.per_example._programs import Equation, Program, is_variable

# They name a mapped axis and do not communicate. Those with `cast` in their name change types.
_QUIET = {"axis_index", "pvary", "preduced"}
_OUTSIDE = (
    "call this outside the mapped program, under jax.jit with sharded arrays, where each gradient"
    " is whole"
)


def refuse_summed_gradients(params: Any, batch: Any) -> None:
    """Refuses parameters that are the same on devices with different examples."""
    if not _compat.bound_axes():
        return
    of_examples = {axis for leaf in jax.tree.leaves(batch) for axis in _compat.varying_axes(leaf)}
    for path, leaf in zip(_paths.of_leaves(params), jax.tree.leaves(params), strict=True):
        shards = of_examples - _compat.varying_axes(leaf)
        if shards:
            raise ValueError(
                f"The examples vary over the mesh axes {sorted(map(str, shards))}, and the"
                f" parameter {path or 'itself'} does not: JAX would sum the gradients of examples"
                " on different devices. Let all parameters vary, by"
                " jax.lax.pcast(params, axes, to='varying') or, before jax 0.8.3, jax.lax.pvary,"
                " and sum the clipped gradients afterwards."
            )


def refuse_different_weights(shards: Sequence[Sequence[Hashable]], **arguments: Any) -> None:
    """Refuses a mask or a bound that differs between the shards of one gradient."""
    axes = {axis for of_leaf in shards for axis in of_leaf}
    for name, value in arguments.items():
        varying = [_compat.varying_axes(leaf) for leaf in jax.tree.leaves(value)]
        if different := axes.intersection(*[frozenset().union(*varying)]):
            raise ValueError(
                f"{name} must be the same over the mesh axes {sorted(map(str, different))}, over"
                " which the gradient of each example lies in shards, and its type says that it"
                f" varies. Compute {name} from values that do not vary there, or make it the same"
                " by jax.lax.pmax (of a mask: as integers)."
            )


def sharding_axes(
    program: Program, matters: Sequence[bool], batched: Sequence[bool], gradients: int
) -> list[tuple[Hashable, ...]]:
    """The axes over which the gradient of each leaf lies in shards.

    Args:
      program: Returns the loss, then aux, then the gradient of each leaf.
      matters: Which inputs are parameters or examples.
      batched: Which inputs are examples.
      gradients: The number of leaves.

    Raises:
      ValueError: The loss communicates in a way that the table above refuses.
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
            _refuse_communication(axis, crossing[axis], axis in examples, axis in of_loss)
    one_loss = [axis for axis in axes if _compat.is_typed(axis) and axis not in examples | of_loss]
    return [
        tuple(axis for axis in one_loss if axis in _compat.varying_axes_of(leaf.aval))
        for leaf in leaves
    ]


def _refuse_communication(axis: Hashable, by: str, examples_vary: bool, loss_varies: bool) -> None:
    crosses = f"loss_fn or its gradient communicates over the mapped axis {axis!r} (by {by})"
    if not _compat.is_typed(axis):
        raise ValueError(
            f"{crosses}, and no types say what is sharded there, so the gradient of one example"
            " cannot be told from those of others. Communicate before and after this call, and"
            f" not in loss_fn; or use jax.shard_map with check_vma=True; or {_OUTSIDE}."
        )
    if examples_vary:
        raise ValueError(
            f"{crosses}, over which the examples vary: the gradient of one example would be"
            " mixed with those on other devices. Communicate before and after this call, and not"
            " in loss_fn: gather sharded parameters first, and reduce the gradients of mean=False"
            " afterwards. If each example is sharded, pass whole examples and slice them in"
            f" loss_fn by jax.lax.axis_index. Or {_OUTSIDE}."
        )
    if loss_varies:
        raise ValueError(
            f"{crosses}, over which the examples do not vary, but the loss does: JAX would"
            " differentiate the sum of the losses of all devices. Return the same loss on all of"
            f" them: jax.lax.psum(loss, {axis!r}) if each has a part of it,"
            f" jax.lax.pmean(loss, {axis!r}) if each has all of it. Or {_OUTSIDE}."
        )


def _crossing(
    program: Program, depends: Sequence[bool], wanted: set[Any]
) -> Mapping[Hashable, str]:
    """The axes over which devices communicate to make the wanted variables, with a primitive each.

    Values that depend neither on parameters nor on examples are constants, even if they have
    been communicated.
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
        for inside in _programs.bodies(equation):
            everything = set(filter(is_variable, inside.outvars))
            found = {**_crossing(inside, [True] * len(inside.invars), everything), **found}
    return found


def _named_by(equation: Equation) -> set[Hashable]:
    """The mapped axes over which an equation communicates, apart from its bodies."""
    name = equation.primitive.name
    if (
        name in _QUIET
        or "cast" in name.split("_")
        or any(True for _ in _programs.bodies(equation))
    ):
        return set()
    # Some primitives that communicate have no such effect, and others no such parameter.
    named = {effect.name for effect in equation.effects if hasattr(effect, "name")}
    for key in ("axis_name", "axes"):
        value = equation.params.get(key, ())
        each = value if isinstance(value, tuple | list) else (value,)
        # Integers are axes of an array, not of a mesh.
        named.update(axis for axis in each if not isinstance(axis, int))
    return named & set(_compat.bound_axes())
