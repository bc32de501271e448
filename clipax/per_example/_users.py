"""Adds the gradients of each user's examples, to clip users in place of examples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _leaves
from clipax._core._typing import Array
from clipax.per_example import _arguments, _mapped
from clipax.per_example._calls import Call
from clipax.per_example._clipping import Options
from clipax.per_example._gradients import Kind, LeafGradients, made
from clipax.per_example._grams import row_norms
from clipax.per_example._measured import Measured, measure, traced
from clipax.per_example._microbatches import in_parts
from clipax.per_example._plans import Way


def checked_users(user_ids: Any, examples: int, num_users: int | None) -> Array | None:
    """Checks whose each example is."""
    if (user_ids is None) != (num_users is None):
        raise ValueError(
            "user_ids must be given where clipped_grad has num_users, and only there, got"
            f" user_ids={user_ids!r} for num_users={num_users!r}."
        )
    if isinstance(user_ids, np.ndarray) and np.issubdtype(user_ids.dtype, np.integer):
        # JAX would wrap an integer of 64 bits, and give the example to another user.
        user_ids = user_ids.astype(np.int64)
        is_known = (user_ids >= 0) & (user_ids <= np.iinfo(np.int32).max)
        user_ids = np.where(is_known, user_ids, -1).astype(np.int32)
    found = _arguments.of_examples(examples, np.integer, user_ids=user_ids)
    if found is not None and found.dtype.itemsize < 4:
        return found.astype(jnp.int32)  # The number of users can need more bits than the ids.
    return found


def measure_users(
    call: Call, mask: Array | None, user_ids: Array, options: Options
) -> tuple[Measured, Array]:
    """Measures one gradient for each user, and says which users have a counted example.

    These gradients are made, because the examples of a user are known only as the program runs.
    """
    users = options.num_users
    assert users is not None
    known = traced(call)
    _mapped.refuse_different_weights(known.program.shards, user_ids=user_ids, mask=mask)
    is_known = (user_ids >= 0) & (user_ids < users)
    is_counted = is_known if mask is None else is_known & mask

    def add(part: Call, is_counted: Array, user_ids: Array) -> Any:
        measured = measure(part, known, is_twice=False, mask=is_counted)
        assert measured.leaves is not None
        # Whatever is not counted goes to a row behind the last user, even if it is NaN.
        rows = jnp.where(is_counted, user_ids, users)
        number = _rows_added(jnp.ones(rows.shape, jnp.int32), rows, users)
        each = [_leaves.widened(made(leaf)) for leaf in measured.leaves]
        gradients = [_rows_added(leaf, rows, users) for leaf in each]
        return (number, gradients), (measured.losses, measured.aux)

    start = (jnp.zeros(users, jnp.int32), jax.tree.leaves(call.wide_zeros(users)))
    size = options.microbatch_size or max(1, call.examples)
    (number, gradients), (losses, aux) = in_parts(add, call, (is_counted, user_ids), size, start)
    if options.user_mean:
        gradients = [leaf / _shares(number, leaf) for leaf in gradients]
    leaves = [
        LeafGradients(Kind(users, plan.shape, plan.dtype, Way.EACH, ()), [], None, each)
        for plan, each in zip(known.plans, gradients, strict=True)
    ]
    norms = [row_norms(each) for each in gradients]
    program = known.program
    return Measured(losses, aux, program.gradient, leaves, norms, program.shards), number > 0


def _rows_added(array: Array, rows: Array, users: int) -> Array:
    return jax.ops.segment_sum(array, rows, num_segments=users + 1)[:users]


def _shares(number: Array, leaf: Array) -> Array:
    shape = (-1, *[1] * (leaf.ndim - 1))
    return jnp.maximum(number, 1).reshape(shape).astype(leaf.dtype)
