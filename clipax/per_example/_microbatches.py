"""Clips some examples after others, to save memory."""

from typing import Any

import jax
import jax.numpy as jnp

from clipax._core import _compat, _leaves
from clipax._core._typing import Array
from clipax.per_example._calls import Call
from clipax.per_example._clipping import Options, clip
from clipax.per_example._info import OfExamples


def clip_in_parts(
    call: Call, mask: Array | None, bound: Any, options: Options, size: int
) -> tuple[Any, OfExamples]:
    """As `clip`: the sum of the sums, and the records of all parts."""
    examples = call.examples
    if examples % size:
        raise ValueError(f"microbatch_size must divide the {examples} examples, got {size}.")

    def split(tree: Any) -> Any:
        parts = examples // size  # Not -1, which is unknown for a leaf without entries.
        return jax.tree.map(lambda leaf: leaf.reshape(parts, size, *leaf.shape[1:]), tree)

    def step(total: Any, part: Any) -> Any:
        batch, part_mask = part
        sums, of_part = clip(call.with_batch(batch), part_mask, bound, options)
        return jax.tree.map(jnp.add, total, sums), of_part

    parts = (split(call.batch), split(mask))
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, _leaves.widened(leaf).dtype), call.params
    )
    if _compat.bound_axes():
        # What a scan carries must have the type of what comes out of its steps.
        first = jax.tree.map(lambda leaf: leaf[0], parts)
        types = jax.make_jaxpr(step)(zeros, first).out_avals
        leaves, structure = jax.tree.flatten(zeros)
        rows = zip(leaves, types, strict=False)
        varying = [
            _compat.varying_over(leaf, _compat.varying_axes_of(each)) for leaf, each in rows
        ]
        zeros = jax.tree.unflatten(structure, varying)
    total, of_parts = jax.lax.scan(step, zeros, parts)
    return total, jax.tree.map(lambda leaf: leaf.reshape(examples, *leaf.shape[2:]), of_parts)
