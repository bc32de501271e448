"""The weighted sums of gradients, from a second pass backwards.

The gradient of a weighted sum of losses is the weighted sum of the gradients, because the way back
is linear. A `jax.custom_vjp` can break that, so `_memory` refuses it.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipax._core import _compat, _leaves, _range
from clipax._core._typing import Array
from clipax.per_example._calls import Call
from clipax.per_example._sums import Weights


class Group(NamedTuple):
    """The leaves under one bound."""

    places: Sequence[int]
    norms: Array
    weights: Weights


def weighted_sums(call: Call, groups: Sequence[Group], is_left_out: Array | None) -> list[Array]:
    """The weighted sum of each leaf's gradients, in the width of norms: a pass for each bound."""
    call = _after(call, groups, is_left_out)
    params, structure = jax.tree.flatten(call.params)
    losses, pull = jax.vjp(
        lambda leaves: call.with_params(jax.tree.unflatten(structure, leaves)).losses, params
    )
    sums: list[Any] = [None] * len(params)
    for group in groups:
        seed, *units = _seeds(group, is_left_out)
        (gradients,) = pull(_compat.varying_like(seed.astype(losses.dtype), losses))
        for place in group.places:
            total = _leaves.widened(gradients[place])
            for unit in units:
                total = total * unit.astype(total.dtype)
            sums[place] = total
    if is_left_out is None:
        return sums
    return [jnp.where(jnp.all(is_left_out), 0, total) for total in sums]


def _after(call: Call, groups: Sequence[Group], is_left_out: Array | None) -> Call:
    """The same call, with a counted example in the place of those left out, which can be NaN.

    A compiler cannot start it before the norms are known. It would otherwise run both passes
    forwards first. A barrier is not enough on a CPU.
    """
    is_impossible = functools.reduce(jnp.logical_or, [group.norms < 0 for group in groups])
    is_replaced = is_impossible if is_left_out is None else is_impossible | is_left_out
    counted = None if is_left_out is None else jnp.argmin(is_left_out)

    def replaced(leaf: Array) -> Array:
        leaf = jnp.asarray(leaf)
        rows = is_replaced.reshape(-1, *[1] * (leaf.ndim - 1))
        if counted is not None:
            return jnp.where(rows, leaf[counted], leaf)
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
        return leaf if is_key else jnp.where(rows, jnp.zeros((), leaf.dtype), leaf)

    return call.with_batch(jax.tree.map(replaced, call.batch))


def _seeds(group: Group, is_left_out: Array | None) -> tuple[Array, Array, Array]:
    """The derivatives with respect to the losses, with two numbers that multiply the result.

    They are scaled to those of a mean, so that they leave the range of the program's floats no
    sooner than its own.
    """
    first, second = group.weights
    is_finite = jnp.isfinite(group.norms)
    if is_left_out is not None:
        first, is_finite = jnp.where(is_left_out, 0, first), is_finite | is_left_out
    largest = jnp.max(first)
    seeds = first / _range.finite_or_one(largest) * second
    unit = _range.finite_or_one(jnp.max(jnp.abs(seeds))) * seeds.shape[0]
    # A weight of zero could hide an infinite gradient.
    return jnp.where(is_finite, seeds / unit, jnp.nan), unit, largest
