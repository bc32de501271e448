"""Processes some examples after others, to save memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipax._core import _compat
from clipax._core._typing import Array
from clipax.per_example._calls import Call


def in_parts(
    step: Callable[..., tuple[Any, Any]], call: Call, others: Any, size: int, zeros: Any
) -> tuple[Any, Any]:
    """Adds the first results of all parts, and joins their second results.

    Args:
      step: `(call, *others) -> (sums, rows)`, for the examples of one part.
      call: The call with all examples. If there are none, there are no parts.
      others: A tuple of arrays that have the examples along their first axis.
      size: The number of examples in a part.
      zeros: The start of the sums.
    """
    examples = call.examples
    if examples % size:
        raise ValueError(f"microbatch_size must divide the {examples} examples, got {size}.")

    arrays = (call.batch, others)
    parts, part_of = _parts(arrays, examples, size) if examples else _no_parts(arrays, size)

    def run(total: Any, index: Any) -> Any:
        batch, others = part_of(index)
        sums, rows = step(call.with_batch(batch), *others)
        return jax.tree.map(jnp.add, total, sums), rows

    if _compat.bound_axes():
        zeros = _varying_as_after(run, zeros, parts)
    total, rows = jax.lax.scan(run, zeros, parts)
    return total, jax.tree.map(_joined, rows)


def _parts(arrays: Any, examples: Any, size: int) -> tuple[Any, Callable[[Any], Any]]:
    """What to scan over, and a function that makes a part of it.

    A part has every n-th example, so that each device of a sharded batch has some of its own. It
    is cut out where it is needed, because the batch would have to be copied to be in this order.
    """
    number = examples // size  # Not -1 below, which is unknown for a leaf without entries.

    def part_of(index: Array) -> Any:
        def cut(leaf: Any) -> Array:
            rows = leaf.reshape(size, number, *leaf.shape[1:])
            return jax.lax.dynamic_index_in_dim(rows, index, 1, keepdims=False)

        return jax.tree.map(cut, arrays)

    return jnp.arange(number), part_of


def _no_parts(arrays: Any, size: int) -> tuple[Any, Callable[[Any], Any]]:
    """The same where there are no examples, from which nothing can be cut out."""

    def split(leaf: Any) -> Any:
        return leaf.reshape(0, size, *leaf.shape[1:])

    return jax.tree.map(split, arrays), lambda part: part


def _joined(rows: Array) -> Array:
    """The rows of all parts, in the order of the batch."""
    number, size, *shape = rows.shape
    return jnp.swapaxes(rows, 0, 1).reshape(number * size, *shape)


def _varying_as_after(run: Callable[..., Any], zeros: Any, parts: Any) -> Any:
    """Zeros of the type that comes out of a step, which a scan must also carry into it."""
    types: list[Any] = []

    def look(part: Any) -> tuple[()]:
        types.extend(jax.make_jaxpr(run)(zeros, part).out_avals)
        return ()

    # Not the first part, because there may be none.
    jax.eval_shape(jax.vmap(look), parts)
    leaves, structure = jax.tree.flatten(zeros)
    rows = zip(leaves, types, strict=False)
    varying = [_compat.varying_over(leaf, _compat.varying_axes_of(each)) for leaf, each in rows]
    return jax.tree.unflatten(structure, varying)
