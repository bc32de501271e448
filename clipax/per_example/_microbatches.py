"""Processes some examples after others, to save memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from clipax._core import _compat
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

    def split(tree: Any) -> Any:
        parts = examples // size  # Not -1, which is unknown for a leaf without entries.
        return jax.tree.map(lambda leaf: leaf.reshape(parts, size, *leaf.shape[1:]), tree)

    def run(total: Any, part: Any) -> Any:
        batch, others = part
        sums, rows = step(call.with_batch(batch), *others)
        return jax.tree.map(jnp.add, total, sums), rows

    parts = (split(call.batch), split(others))
    if _compat.bound_axes():
        zeros = _varying_as_after(run, zeros, parts)
    total, rows = jax.lax.scan(run, zeros, parts)
    # Not -1, as above.
    return total, jax.tree.map(
        lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), rows
    )


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
